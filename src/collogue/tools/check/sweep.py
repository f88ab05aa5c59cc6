"""Which cases ``collogue check`` runs: its default sweep, and the product of lists that a user gives."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import product
from typing import Any, cast, get_args

import torch

from collogue.contract.quant import FAMILIES, describe, parse, variants
from collogue.contract.spec import OWNING, Operation
from collogue.errors import FormatError
from collogue.testing.covering import PROLOGUES
from collogue.testing.inputs import KINDS
from collogue.tools.check.case import Case

DTYPES = ("bfloat16", "float16", "float32")
OPERATIONS: tuple[Operation, ...] = get_args(Operation)

#: Every option set of each format, by the name that stands for all of them.
VARIANTS: dict[str, tuple[str, ...]] = {
    "none": ("none",),
    **{family: variants(family) for family in FAMILIES},
}
#: One option set of each format, for cases about something else.
_ONE_EACH = ("none", "nvfp4", "mxfp4/floor", "mxfp8/ceil/8x4", "fp8_static", "fp8_per_token", "fp8_group64/ue8m0/column", "fp8_group16")


def expand(name: str) -> list[str]:
    """The full labels that ``name`` stands for: all variants of a bare format name (``"mxfp4"``, ``"fp8_group64"``), else the one label."""
    quant = parse(name)
    if "/" in name or quant is None:
        return [describe(quant)]
    if name.startswith("fp8_group"):
        return [label.replace("fp8_group128", f"fp8_group{quant.block}") for label in VARIANTS["fp8_group"]]
    return list(VARIANTS[name])


def sweep(
    *,
    world_size: Sequence[int] = (2,),
    tokens: Sequence[int] = (7,),
    hidden_size: Sequence[int] = (2880,),
    dtype: Sequence[str] = DTYPES,
    format: Sequence[str] = tuple(VARIANTS),
    operation: Sequence[str] = ("all_reduce",),
) -> list[Case]:
    """The product of the lists. A bare format name stands for all its variants; every second case has a float32 weight.

    Raises :class:`FormatError` where a list holds something that does not exist.
    """
    for name in dtype:
        if name not in DTYPES:
            raise FormatError(f"unknown dtype {name!r}", hint=f"choose from {', '.join(DTYPES)}")
    for name in operation:
        if name not in OPERATIONS:
            raise FormatError(f"unknown operation {name!r}", hint=f"choose from {', '.join(OPERATIONS)}")
    labels = list(dict.fromkeys(label for name in format for label in expand(name)))
    return [
        Case(t, h, d, label, n, weight_dtype="float32" if i % 2 else None, operation=cast(Operation, o))
        for o in operation
        for i, (n, d, h, t, label) in enumerate(product(world_size, dtype, hidden_size, tokens, labels))
    ]


def default_sweep(device: str) -> list[Case]:
    """Every dtype, format and layout; odd T; H of 8, 24, 576, 2880; every kind of input; every combination of outputs; every operation.

    World sizes are 2, 3 and 4 on CPU. On CUDA they are 2, 3, and the number of GPUs, and a few larger calls are added.
    """
    worlds = [2, 3, 4]
    if device == "cuda":
        worlds = sorted({2, 3, max(2, min(8, torch.cuda.device_count()))})
    cases = [case for part in (_formats, _inputs, _calls, _shapes, _operations, _experts, _branches, _uneven) for case in part(worlds)]
    if device == "cuda":
        cases += [
            Case(t, 7168, format=f, world_size=n) for n in worlds for t in (1, 8, 64, 1025) for f in ("none", "nvfp4", "fp8_per_token")
        ]
    return list(dict.fromkeys(cases))


def _formats(worlds: list[int]) -> list[Case]:
    """Every option set of every format; sizes turn, so that each dtype and world meets tiles, short last packs and padding."""
    labels = [label for labels in VARIANTS.values() for label in labels] + expand("fp8_group64") + expand("fp8_group16")
    shapes = [(1, 576), (3, 2880), (129, 576), (7, 1152), (5, 128)]
    cases = []
    for i, label in enumerate(labels):
        block = getattr(parse(label), "block", 0)
        fitting = [(t, h) for t, h in shapes if not block or h % block == 0]
        for j, dtype in enumerate(DTYPES):
            t, h = fitting[(i + j) % len(fitting)]
            cases.append(Case(t, h, dtype, label, worlds[(i + j) % len(worlds)], scale_tensors=(i + j) % 2 == 1))
    return cases


def _inputs(worlds: list[int]) -> list[Case]:
    """Every kind of input, with the norm and (so that special values reach the encoders) without."""
    return [
        Case(5, 576, DTYPES[(i + j) % 3], label, worlds[-(i % 2)], norm=norm, inputs=kind, seed=i)
        for i, kind in enumerate(k for k in KINDS if k != "normal")
        for j, label in enumerate(_ONE_EACH)
        for norm in (True, False)
    ]


def _calls(worlds: list[int]) -> list[Case]:
    """Every combination of residual, norm and outputs, and the options of the norm."""
    cases = [
        Case(3, 576, DTYPES[i % 3], label, worlds[i % len(worlds)], residual=residual, norm=norm, keep_norm=keep)
        for i, (label, residual, norm, keep) in enumerate(
            product(("none", "nvfp4", "fp8_static"), (True, False), (True, False), (True, False))
        )
    ]
    return cases + [
        Case(3, 2880, dtype, weight_dtype="float32", weight_offset=1.0, eps=1e-5, world_size=n) for dtype in DTYPES for n in worlds
    ]


def _shapes(worlds: list[int]) -> list[Case]:
    """Widths that leave lanes and blocks part empty, no tokens at all, and widths that a format must reject."""
    cases = [
        Case(t, h, dtype, f, 2)
        for h in (8, 24, 264)
        for t, dtype, f in zip((1, 3, 131), DTYPES, ("none", "fp8_static", "fp8_per_token"), strict=True)
    ]
    cases += [Case(0, 576, dtype, f, worlds[0]) for dtype, f in zip(DTYPES, ("none", "nvfp4", "fp8_group64/float32/column"), strict=True)]
    return cases + [Case(3, 24, "bfloat16", f, 2) for f in ("nvfp4", "mxfp4", "mxfp8", "fp8_group")]


def _experts(worlds: list[int]) -> list[Case]:
    """Every format once with each prologue: operations, dtypes, kinds of input and slots in turn."""
    summing: tuple[Operation, ...] = ("all_reduce", "sharded", "reduce_scatter")
    kinds, cases = list(KINDS), []
    for (i, prologue), (j, label) in product(enumerate(name for name in PROLOGUES if name != "none"), enumerate(_ONE_EACH)):
        n, t, slots = i + j, (3, 1, 130, 5, 0)[(2 * i + j) % 5], (2, 8, 1, 16, 5, 4)[(i + j) % 6]
        shape = Case(t, 576, DTYPES[n % 3], label, worlds[n % len(worlds)], norm=label == "none" or n % 4 > 0, operation=summing[n % 3])
        cases.append(replace(shape, inputs=kinds[n % len(kinds)], prologue=prologue, slots=slots, branch=(i + 2 * j) % 4 == 0))
    return cases


def _branches(worlds: list[int]) -> list[Case]:
    """A norm of the sum: every format, with and without the norm behind it; operations, dtypes and kinds of input in turn."""
    summing: tuple[Operation, ...] = ("all_reduce", "sharded", "reduce_scatter")
    kinds, cases = list(KINDS), []
    for (i, norm), (j, label) in product(enumerate((True, False)), enumerate(_ONE_EACH)):
        operation = "all_reduce" if label == "none" and not norm else summing[(i + j) % 3]
        n, wide = i + j, "float32" if (i + j) % 2 else None
        shape = Case((3, 1, 130, 5)[n % 4], 576, DTYPES[j % 3], label, worlds[n % len(worlds)], norm=norm, weight_dtype=wide)
        cases.append(replace(shape, operation=operation, inputs=kinds[n % len(kinds)], weight_offset=float(i), branch=True))
    return cases


def _uneven(worlds: list[int]) -> list[Case]:
    """Rows that are not shared out evenly: every operation that has owners, every format; all rows on one rank, on none but two, none."""
    cases = []
    for (i, operation), (j, label) in product(enumerate(OWNING), enumerate(_ONE_EACH)):
        n = worlds[(i + j) % len(worlds)]
        rows = {0: 5, 1: 3, 2: 0}.get((i + j) % 4, 1), *[0] * (n - 2), (0, 129, 0, 6)[(i + j) % 4]
        options: dict[str, Any] = {
            "norm": label == "none" or j % 3 != 1,
            "prologue": ("none", "combine/value")[(i + j) % 5 == 4 and operation != "all_gather"],
        }
        shape = Case(sum(rows), 576, DTYPES[(i + j) % 3], label, n, j % 2 == 0, operation=operation, rows=rows, **options)
        cases.append(replace(shape, inputs=("order", "nan")[j % 2], branch=shape.residual and operation != "all_gather" and j % 4 == 0))
    return cases


def _operations(worlds: list[int]) -> list[Case]:
    """The other operations: every format, fewer rows than ranks, short last blocks, with and without residual, norm and both outputs."""
    others = [o for o in OPERATIONS if o != "all_reduce"]
    cases = []
    for (i, operation), (j, label) in product(enumerate(others), enumerate(_ONE_EACH)):
        t, n = (1, 5, 129, 7, 2)[(i + j) % 5], worlds[(i + j) % len(worlds)]
        norm = label == "none" or j % 3 != 1
        cases.append(
            Case(
                t, 576, DTYPES[j % 3], label, n, j % 2 == 0, norm, keep_norm=j % 4 < 2, inputs=("order", "nan")[j % 2], operation=operation
            )
        )
    halves: tuple[Operation, ...] = ("reduce_scatter", "all_gather")
    cases += [Case(t, 24, world_size=n, residual=False, norm=False, operation=o) for t in (1, 5) for n in worlds for o in halves]
    return cases + [Case(0, 576, format="nvfp4", world_size=worlds[0], operation=o) for o in others]

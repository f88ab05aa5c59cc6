"""The full sweep of ``collogue check --sweep full``: what is claimed for GPUs, in a few minutes.

World 2 meets every (format, dtype, H), and with spot values of T every (T, format), (T, dtype) and (T, H), up to the largest call
that one-shot takes; then calls beyond it. Worlds 3 to 8 meet every (format, dtype), and together every (format, H).
The operations other than ``all_reduce`` meet every format in every world, and with odd numbers of rows every (T, dtype).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import product
from typing import Any

from collogue.contract.spec import Operation
from collogue.planning.plan import one_shot_tokens as most_of
from collogue.tools.check.case import Case
from collogue.tools.check.kernels import topology_on
from collogue.tools.check.sweep import DTYPES, VARIANTS, expand

HIDDEN_SIZES = (8, 24, 576, 2048, 2880, 4096, 5120, 7168, 8192, 12800, 16384)
WORLD_SIZES = tuple(range(2, 9))
#: Rows of a call; 0 stands for the most that one-shot takes at this hidden size.
TOKENS = (1, 2, 3, 7, 64, 0)
#: Every option set of every format, and group sizes that a warp, several groups of a warp, or only a whole CTA reduces.
LABELS = (*(v for variants in VARIANTS.values() for v in variants), *expand("fp8_group64"), "fp8_group16", "fp8_group48")
#: Rows that are beyond one-shot at the hidden sizes they are used with.
MANY = 8192
#: Rows of calls whose rows have owners: fewer than ranks, no multiple of a world size, many.
OWNED_TOKENS = (1, 2, 3, 5, 127, 129, 1000, 4097)
#: Rows around the crossover of one-shot and two-shot and far beyond it, at one hidden size.
FAR_TOKENS = (129, 255, 257, 320, 1000, 4097, 16384)
#: What is added, done and returned: mostly everything, and everything else sometimes.
_CALLS: tuple[dict[str, Any], ...] = (
    {},
    {"keep_norm": False},
    {"residual": False},
    {"keep_norm": False, "weight_dtype": "float32"},
    {"norm": False},
    {},
    {"residual": False, "norm": False},
)


def full_sweep() -> list[Case]:
    """All cases, by world size."""
    cases: list[Case] = []
    for world in WORLD_SIZES:
        largest = {dtype: one_shot_tokens(world, dtype) for dtype in DTYPES}
        chosen = [*_two(), *_two_any_width(), *_two_beyond(), *_two_far()] if world == 2 else [*_virtual(world), *_virtual_beyond()]
        for i, (t, h, dtype, label) in enumerate(chosen):
            most = largest[dtype][h]
            tokens = {0: most, -1: most + 1}.get(t, t)
            cases.append(Case(tokens, h, dtype, label, world, seed=i, **_CALLS[i % len(_CALLS)]))
        cases += _owned(world)
        if world == 2:
            cases += [_owned_case("sharded", 16384, label, world, i) for i, label in enumerate(("none", "nvfp4/128x4", "fp8_per_token"))]
    return list(dict.fromkeys(cases))


def one_shot_tokens(world: int, dtype: str) -> dict[int, int]:
    """The most rows that one-shot takes at each hidden size, on a communicator made for the largest of them and for many rows."""
    topology = topology_on([Case(MANY, max(HIDDEN_SIZES), dtype, world_size=world)], architecture=None, multiprocessors=0, gpus=1)
    return {h: most_of(topology, h) for h in HIDDEN_SIZES}


_Choice = tuple[int, int, str, str]  # T (0: one-shot's most, -1: one more), H, dtype, format


def _two() -> Iterator[_Choice]:
    for i, label in enumerate(LABELS):
        widths = _widths(label)
        for n, (dtype, h) in enumerate(product(DTYPES, widths)):
            yield TOKENS[(i + n) % len(TOKENS)], h, dtype, label
        for h in (h for h in HIDDEN_SIZES if h not in widths):
            yield 3, h, DTYPES[i % len(DTYPES)], label  # must be refused


def _two_beyond() -> Iterator[_Choice]:
    for (i, label), (j, dtype) in product(enumerate(LABELS), enumerate(DTYPES)):
        wide = [h for h in _widths(label) if h >= 576]
        yield -1, wide[(i + 4 * j) % len(wide)], dtype, label
        yield MANY, wide[(i + 4 * j + 1) % len(wide)], dtype, label


def _two_far() -> Iterator[_Choice]:
    for t, label in product(FAR_TOKENS, ("none", "nvfp4/128x4", "fp8_static")):
        yield t, 7168, "bfloat16", label


def _two_any_width() -> Iterator[_Choice]:
    """Formats that allow every hidden size: each T, and for each dtype the largest one-shot call and one row more."""
    labels = ("none", "fp8_static", "fp8_per_token")
    for (k, h), (m, t) in product(enumerate(HIDDEN_SIZES), enumerate(TOKENS)):
        yield t, h, DTYPES[(k + m) % len(DTYPES)], labels[m % len(labels)]
    for (k, h), (j, dtype), t in product(enumerate(HIDDEN_SIZES), enumerate(DTYPES), (0, -1)):
        yield t, h, dtype, labels[(j + k + t) % len(labels)]


def _virtual(world: int) -> Iterator[_Choice]:
    for (i, label), (j, dtype) in product(enumerate(LABELS), enumerate(DTYPES)):
        widths = _widths(label)
        turn = i + len(DTYPES) * (world - 3) + j
        yield TOKENS[(i + j + world) % len(TOKENS)], widths[turn % len(widths)], dtype, label


def _virtual_beyond() -> Iterator[_Choice]:
    for dtype, (t, h, label) in product(DTYPES, ((-1, 16384, "none"), (-1, 576, "nvfp4/128x4"), (MANY, 7168, "fp8_per_token"))):
        yield t, h, dtype, label


#: Beside ``sharded``, which has more cases.
_PARTS: tuple[Operation, ...] = ("reduce_scatter", "all_gather", "finish")


def _owned(world: int) -> Iterator[Case]:
    """The sharded residual with every format (at world 2 in half of all T each), its two halves and ``finish`` with some."""
    for i, label in enumerate(LABELS):
        turns = range(i % 2, len(OWNED_TOKENS), 2) if world == 2 else (i + world,)
        for n, turn in enumerate(turns):
            yield _owned_case("sharded", OWNED_TOKENS[turn % len(OWNED_TOKENS)], label, world, i + n)
        for n, operation in enumerate(_PARTS):
            if world == 2 or (i + n + world) % 4 == 0:
                yield _owned_case(operation, OWNED_TOKENS[(i + 3 * n + world) % len(OWNED_TOKENS)], label, world, i + n)


def _owned_case(operation: Operation, tokens: int, label: str, world: int, turn: int) -> Case:
    widths = [h for h in _widths(label) if h <= 7168 or tokens < 1000]
    options = _CALLS[turn % len(_CALLS)] if label != "none" else {"residual": turn % 2 == 0}
    h, dtype = widths[turn % len(widths)], DTYPES[(turn + world) % len(DTYPES)]
    return Case(tokens, h, dtype, label, world, seed=turn, operation=operation, **options)


def _widths(label: str) -> Sequence[int]:
    """The hidden sizes that the format allows."""
    return [h for h in HIDDEN_SIZES if Case(1, h, format=label).possible]

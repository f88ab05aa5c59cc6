"""What the soak calls: parts, each some communicators at once with their cases; pure data."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

from collogue.tools.check.case import Case

#: Every size of an output is a multiple of four bytes in these, at any number of rows.
_LABELS = (
    "none",
    "nvfp4/128x4",
    "fp8_per_token",
    "mxfp8/ceil/128x4",
    "fp8_static",
    "fp8_group128/float32/column",
    "nvfp4/8x4",
    "mxfp4/floor/128x4",
)
_KINDS = ("normal", "order", "outlier", "normal", "subnormal", "nan", "inf")


@dataclass(frozen=True)
class Run:
    """One communicator and the cases that it is called with. ``delays_inside``: with kernels whose warps are delayed."""

    cases: tuple[Case, ...]
    algorithm: Literal["one_shot", "two_shot"] | None = None
    delays_inside: bool = False


@dataclass(frozen=True)
class Part:
    """``calls`` calls on each of ``ranks`` processes, all ``runs`` at once on streams of their own.

    ``split``: the first half of the ranks is one group, the second another.
    """

    name: str
    ranks: int
    calls: int
    runs: tuple[Run, ...]
    split: bool = False
    graph_calls: int = 100
    graphs: int = 8


@dataclass(frozen=True)
class Counts:
    """Calls of each part."""

    one_shot: int = 1_000_000
    two_shot: int = 100_000
    owned: int = 100_000
    inside: int = 100_000
    streams: int = 100_000
    split: int = 100_000


def make_parts(world: int, counts: Counts = Counts()) -> list[Part]:
    """The parts for ``world`` GPUs, with a process each.

    Two groups at once: each has half the GPUs, or, where these are fewer than four or an odd number, a process on every one of them.
    """
    one_shot = _cases(world, (1, 1, 2, 3, 4, 8, 16, 32), (7168, 2880, 4096, 576), 24)
    two_shot = _cases(world, (1, 3, 16, 64, 127, 300, 512), (7168, 2880), 14)
    small = _cases(world, (1, 2, 4, 16), (7168, 2880), 8)
    narrow = tuple(replace(case, dtype="float16", seed=500 + case.seed) for case in _cases(world, (1, 3, 8, 16), (2880, 576), 8))
    eight = tuple(Run(_reseeded(narrow if n % 2 else small, 1000 * n), "two_shot" if n % 2 else "one_shot") for n in range(8))
    half = world // 2 if world >= 4 and world % 2 == 0 else world
    halves = _cases(half, (1, 2, 8, 64), (7168, 2880), 12)
    return [
        Part("one-shot", world, counts.one_shot, (Run(one_shot, "one_shot"),)),
        Part("two-shot", world, counts.two_shot, (Run(two_shot, "two_shot"),)),
        Part("rows with owners", world, counts.owned, (Run(_owned(world)),)),
        Part("delays inside kernels, one-shot", world, counts.inside, (Run(one_shot, "one_shot", delays_inside=True),)),
        Part("delays inside kernels, two-shot", world, counts.inside // 10, (Run(two_shot, "two_shot", delays_inside=True),)),
        Part("delays inside kernels, rows with owners", world, counts.inside // 10, (Run(_owned(world), delays_inside=True),)),
        Part("two communicators on two streams", world, counts.streams, eight[:2]),
        Part("eight communicators on eight streams", world, counts.streams, eight),
        Part("two groups at once", 2 * half, counts.split, (Run(halves),), split=True),
    ]


def _cases(world: int, tokens: Sequence[int], widths: Sequence[int], count: int) -> tuple[Case, ...]:
    """Numbers of rows, widths, formats, epilogues and kinds of input, each list turned at its own pace."""
    cases = []
    for i in range(count):
        label = _LABELS[(i + i // len(_LABELS)) % len(_LABELS)]
        bare = label == "none" and i % 3 == 1
        case = Case(
            tokens[i % len(tokens)],
            widths[i * 3 // 2 % len(widths)],
            format=label,
            world_size=world,
            residual=i % 5 != 2,
            norm=not bare and i % 7 != 4,
            keep_norm=i % 3 == 0,
            inputs=_KINDS[i % len(_KINDS)],
            seed=i,
        )
        cases.append(case if case.possible else replace(case, hidden_size=7168))
    return tuple(cases)


def _reseeded(cases: Sequence[Case], by: int) -> tuple[Case, ...]:
    """The same with other inputs."""
    return tuple(replace(case, seed=by + case.seed) for case in cases)


def _owned(world: int) -> tuple[Case, ...]:
    """The sharded residual, its halves, in turn."""
    operations: tuple[Literal["sharded", "reduce_scatter", "all_gather"], ...] = ("sharded", "reduce_scatter", "all_gather")
    cases = []
    for i, case in enumerate(_cases(world, (1, 3, 64, 129, 5), (7168, 2880), 12)):
        # Something is finished in every one.
        norm = case.norm or case.format == "none"
        cases.append(replace(case, operation=operations[i % 3], norm=norm, seed=100 + i))
    return tuple(cases)

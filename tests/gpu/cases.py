"""The cases that the GPU tests compare, by world size."""

from __future__ import annotations

import random
from dataclasses import replace

from collogue.contract.spec import OWNING
from collogue.planning.topology import Overrides
from collogue.tools.check import Case, default_sweep, full_sweep
from collogue.tools.check.sweep import DTYPES, OPERATIONS

#: Rows of most calls of a random sequence, and of some: those are two-shot in every world. The widest row.
ROWS, MANY_ROWS, WIDTH = 32, 300, 7168


def sweep_of(size: int, *, thorough: bool) -> list[Case]:
    """Every format, dtype and kind of input, hidden sizes from 8 to 16384, no tokens, and calls beyond one-shot."""
    default = list(dict.fromkeys(case.in_world(size) for case in default_sweep("cuda")))
    full = [case for case in full_sweep() if case.world_size == max(2, size)]
    full = [case.in_world(size) for case in full[:: max(1, len(full) // 90)]]
    return [*(default if thorough else default[size % 3 :: 3]), *full]


#: What communicators of further random sequences fix, by scenario.
FIXED = {
    "one_shot_sequence": Overrides(algorithm="one_shot"),
    "two_shot_sequence": Overrides(algorithm="two_shot"),
    "few_multiprocessors": Overrides(max_sms=8),
}
#: Calls of such a sequence.
FEW = 30


def random_cases(size: int, count: int = 100) -> list[Case]:
    """Shapes, formats and operations in random order, for one communicator; seeded."""
    rng = random.Random(100 * size + count)
    labels = ("none", "nvfp4/128x4", "nvfp4/8x4", "mxfp4/floor/linear", "mxfp8/ceil/128x4", "fp8_static", "fp8_per_token")
    labels = (*labels, "fp8_group128/ue8m0/column", "fp8_group64/float32/column", "fp8_group16/float32/row")
    cases: list[Case] = []
    while len(cases) < count:
        tokens = rng.choice((1, 1, 1, 2, 3, 5, 8, 17, ROWS))
        width, label = rng.choice((576, 2880, 4096, WIDTH)), rng.choice(labels)
        if rng.random() < 0.05:
            tokens, width = MANY_ROWS, WIDTH
        case = Case(
            tokens,
            width,
            DTYPES[size % 3],
            label,
            size,
            residual=rng.random() < 0.8,
            norm=label == "none" or rng.random() < 0.8,
            keep_norm=rng.random() < 0.3,
            inputs=rng.choice(("normal", "normal", "order", "outlier", "subnormal", "nan")),
            seed=len(cases),
            operation="all_reduce" if rng.random() < 0.7 else rng.choice(OPERATIONS),
        )
        if case.possible:
            cases.append(case)
    return cases


def operation_cases(size: int) -> list[Case]:
    """Every operation at a few numbers of rows, fewer than ranks among them, in random order, for one communicator; seeded."""
    labels = (
        "none",
        "nvfp4/128x4",
        "fp8_per_token",
        "mxfp8/ceil/8x4",
        "fp8_group128/float32/column",
        "fp8_static",
        "fp8_group64/ue8m0/column",
    )
    cases = [
        Case(t, width, DTYPES[size % 3], labels[(i + j) % len(labels)], size, j % 3 > 0, keep_norm=j % 2 == 0, seed=j, operation=operation)
        for i, operation in enumerate(OPERATIONS)
        for j, (t, width) in enumerate(((1, WIDTH), (2, 576), (3, 2880), (5, WIDTH), (7, 576), (129, WIDTH), (1000, 2880)))
    ]
    uneven = [case for case in cases if case.operation in OWNING][::2]
    cases += [replace(case, rows=(case.tokens // 2, case.tokens - case.tokens // 2), world_size=2).in_world(size) for case in uneven]
    cases = [case if case.possible else replace(case, hidden_size=WIDTH) for case in cases]
    random.Random(size).shuffle(cases)
    return cases

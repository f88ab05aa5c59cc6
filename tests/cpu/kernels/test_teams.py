"""Kernels whose CTAs have several teams of threads, each on a row of its own, on the CPU."""

from __future__ import annotations

import pytest
import torch
from emulated import PRESENT, Build

from collogue.contract.quant import MXFP8, NVFP4, FP8Group, FP8PerToken
from collogue.testing.emulator import Case, Edit, emulate
from collogue.testing.inputs import KINDS

pytestmark = pytest.mark.slow

CASES = {
    "one-shot": Case(2, 520, 64, vectors=2, rows=2, max_tokens=5, teams=2),
    "one-shot-words": Case(3, 272, 64, rows=4, max_tokens=9, quant=NVFP4(37.5), keep_norm=True, teams=2),
    "two-shot": Case(3, 520, 64, kernel="two_shot", vectors=2, rows=2, max_tokens=7, quant=FP8PerToken(), teams=2),
    "two-shot-three": Case(2, 768, 32, kernel="two_shot", vectors=4, rows=3, max_tokens=8, dtype=torch.float16, teams=3),
    "two-shot-launches": Case(2, 288, 64, kernel="two_shot", rows=2, max_tokens=9, launches=2, quant=NVFP4(37.5, "8x4"), teams=2),
    "sharded": Case(2, 528, 64, kernel="sharded", vectors=2, rows=2, max_tokens=10, quant=NVFP4(37.5), teams=2),
    "sharded-groups": Case(2, 576, 64, kernel="sharded", vectors=2, rows=2, max_tokens=9, quant=FP8Group(48), teams=2),
    "sharded-float32": Case(3, 288, 64, kernel="sharded", rows=2, max_tokens=12, dtype=torch.float32, quant=MXFP8("ceil"), teams=2),
    "reduce-scatter": Case(3, 264, 64, kernel="reduce_scatter", rows=2, max_tokens=12, teams=2),
    "branch": Case(2, 520, 64, kernel="two_shot", vectors=2, rows=2, max_tokens=7, branch=True, quant=FP8PerToken(), teams=2),
    "local": Case(2, 520, 64, kernel="local", vectors=2, rows=2, max_tokens=7, quant=FP8PerToken(), teams=2),
}


@pytest.mark.parametrize("name", CASES)
def test_every_call_equals_the_reference(build: Build, name: str) -> None:
    library, most, kinds = build(CASES[name]), CASES[name].max_tokens, list(KINDS)
    for number, mode in enumerate(PRESENT):
        kind = kinds[(number + len(name)) % len(kinds)]
        run = emulate(library, (most, most - 1, most), seed=number, mode=mode, victim=number % library.world, kind=kind)
        assert run.problem() == "", (mode, number)


def test_a_team_that_uses_the_memory_of_another_is_seen(build: Build) -> None:
    """Twins: of a barrier for one team, in which the sums of another row are read."""
    library = build(CASES["two-shot"], edits=(Edit("two_shot.cuh", "Row<C> row(p, shared);", "Row<C> row(p, shared_of_teams[0]);"),))
    assert any(emulate(library, (7, 7), seed=seed).problem() for seed in range(4))

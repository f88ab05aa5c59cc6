"""Kernels that norm the sum before the residual is added, on the CPU."""

from __future__ import annotations

import pytest
import torch
from emulated import PRESENT, Build

from collogue.contract.prologue import PrologueForm
from collogue.contract.quant import MXFP8, NVFP4, FP8Group, FP8PerToken
from collogue.testing.emulator import Case, Edit, emulate
from collogue.testing.inputs import KINDS

pytestmark = pytest.mark.slow

CASES = {
    "one-shot": Case(4, 24, 32, branch=True),
    "one-shot-cluster": Case(3, 576, 64, quant=NVFP4(37.5), keep_norm=True, branch=True),
    "one-shot-loop": Case(3, 576, 64, rows=1, norm=False, branch=True),
    "one-shot-vectors": Case(3, 576, 64, vectors=2, rows=1, dtype=torch.float16, quant=MXFP8("ceil"), branch=True),
    "two-shot": Case(4, 24, 32, kernel="two_shot", norm=False, branch=True),
    "two-shot-loop": Case(3, 576, 64, kernel="two_shot", rows=1, quant=FP8PerToken(), branch=True),
    "two-shot-vectors": Case(3, 576, 64, kernel="two_shot", vectors=2, rows=1, dtype=torch.float32, branch=True),
    "two-shot-experts": Case(2, 264, 64, kernel="two_shot", rows=1, branch=True, prologue=PrologueForm("expert_combine", "none")),
    "sharded": Case(2, 576, 64, kernel="sharded", rows=1, quant=NVFP4(37.5), max_tokens=5, branch=True),
    "sharded-vectors": Case(2, 576, 64, kernel="sharded", vectors=2, rows=1, quant=FP8Group(48), max_tokens=6, branch=True),
    "reduce-scatter": Case(3, 264, 32, kernel="reduce_scatter", norm=False, max_tokens=5, rows=1, branch=True),
    "local": Case(2, 576, 96, kernel="local", branch=True),
    "local-loop": Case(2, 576, 64, kernel="local", vectors=2, rows=1, quant=FP8PerToken(), branch=True),
}


@pytest.mark.parametrize("name", CASES)
def test_every_call_equals_the_reference(build: Build, name: str) -> None:
    library, most, kinds = build(CASES[name]), CASES[name].max_tokens, list(KINDS)
    for number, mode in enumerate(PRESENT):
        kind = kinds[(number + len(name)) % len(kinds)]
        run = emulate(library, (most, 1, 2, most), seed=number, mode=mode, victim=number % library.world, kind=kind)
        assert run.problem() == "", (mode, number)


@pytest.mark.parametrize(
    "edit",
    [
        Edit("row.cuh", "      x[i] = D::round(f);\n      D::widen(x[i], f);\n      add<D>", "      add<D>"),  # one rounding too few
        Edit("row.cuh", "+ p.branch_eps", "+ eps"),
    ],
)
def test_faults_are_seen(build: Build, edit: Edit) -> None:
    library = build(CASES["one-shot-cluster"], edits=(edit,))
    assert any(emulate(library, (3, 2), seed=seed, kind=kind).problem() for seed in range(3) for kind in ("normal", "zeros", "subnormal"))

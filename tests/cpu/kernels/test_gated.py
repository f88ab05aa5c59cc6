"""Kernels that compute a gated unit, on the CPU: alone with every format, and in the place of partials."""

from __future__ import annotations

import pytest
import torch
from emulated import PRESENT, Build
from samples import every_format

from collogue.contract.prologue import PrologueForm
from collogue.contract.quant import MXFP8, NVFP4, FP8Group, FP8PerToken, FP8Static, Quant
from collogue.testing.emulator import Case, Edit, emulate
from collogue.testing.inputs import KINDS

pytestmark = pytest.mark.slow

GATED = PrologueForm("gated", "none")
CASES = {
    "finish": Case(2, 576, 96, kernel="finish", norm=False, quant=NVFP4(100.0), prologue=GATED),
    "finish-loop": Case(2, 264, 64, kernel="finish", vectors=2, rows=1, norm=False, quant=FP8PerToken(), prologue=GATED),
    "finish-cluster": Case(2, 576, 64, kernel="finish", dtype=torch.float32, norm=False, quant=FP8Group(64), prologue=GATED),
    "finish-norm": Case(2, 264, 64, kernel="finish", dtype=torch.float16, quant=FP8Static(0.5), keep_norm=True, prologue=GATED),
    "local": Case(2, 576, 64, kernel="local", vectors=2, rows=1, residual=False, norm=False, prologue=GATED),
    "one-shot": Case(3, 576, 64, keep_norm=True, quant=NVFP4(37.5), prologue=GATED),
    "one-shot-loop": Case(3, 264, 32, rows=1, vectors=2, prologue=GATED),
    "two-shot": Case(3, 264, 32, kernel="two_shot", rows=2, dtype=torch.float16, quant=FP8PerToken(), prologue=GATED),
    "sharded": Case(2, 576, 64, kernel="sharded", vectors=2, rows=1, quant=MXFP8("ceil"), max_tokens=6, prologue=GATED),
    "reduce-scatter": Case(4, 24, 32, kernel="reduce_scatter", residual=False, norm=False, max_tokens=5, prologue=GATED),
}


@pytest.mark.parametrize("name", CASES)
def test_every_call_equals_the_reference(build: Build, name: str) -> None:
    library, most, kinds = build(CASES[name]), CASES[name].max_tokens, list(KINDS)
    for number, kind in enumerate(kinds):
        mode = PRESENT[number % len(PRESENT)]
        run = emulate(library, (most, 1, 2, most), seed=number, mode=mode, victim=number % library.world, kind=kind)
        assert run.problem() == "", (mode, kind)


@pytest.mark.parametrize("quant", every_format(64), ids=lambda quant: quant.label)
@pytest.mark.parametrize("prologue", [None, GATED], ids=["quantize", "gated"])
def test_every_format_without_a_sum(build: Build, quant: Quant, prologue: PrologueForm | None) -> None:
    case = Case(1, 576, 96, kernel="finish", norm=False, quant=quant, max_tokens=5, rows=2, prologue=prologue)
    library = build(case)
    for number, kind in enumerate(("normal", "outlier", "nan")):
        assert emulate(library, (5, 1), seed=number, kind=kind).problem() == "", kind


@pytest.mark.parametrize(
    "edit",
    [
        Edit("activation.cuh", "-88.0f ? 0.0f", "-1e30f ? 0.0f"),
        Edit("activation.cuh", "larger(-g, -32.0f)", "-g"),
        Edit("activation.cuh", "p * r + 0x1.fffffcp-2f", "p * r + 0x1p-1f"),
        Edit("activation.cuh", "(x - n * 0x1.62e4p-1f) - n * 0x1.7f7d1cp-20f", "x - n * 0x1.62e430p-1f"),
        Edit("source.cuh", "row.p.row_stride + row.vector(0)", "row.p.hidden + row.vector(0)"),
        Edit("source.cuh", "silu(g[j]) * u[j]", "silu(u[j]) * g[j]"),
    ],
    ids=lambda edit: edit.new,
)
def test_faults_are_seen(build: Build, edit: Edit) -> None:
    case = Case(2, 264, 64, kernel="local", dtype=torch.float32, residual=False, norm=False, prologue=GATED)
    library = build(case, edits=(edit,))
    assert any(emulate(library, (3, 2), seed=seed, kind=kind).problem() for seed in range(2) for kind in ("normal", "outlier", "inf"))

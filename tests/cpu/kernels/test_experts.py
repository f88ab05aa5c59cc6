"""Kernels whose terms are computed from experts' rows, on the CPU: every algorithm, no row read that nothing names."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from emulated import PRESENT, Build

from collogue.contract.prologue import PrologueForm
from collogue.contract.quant import MXFP8, NVFP4, FP8Group, FP8PerToken, FP8Static
from collogue.testing.emulator import Case, Edit, emulate
from collogue.testing.inputs import KINDS

pytestmark = pytest.mark.slow

COMBINE = PrologueForm("expert_combine", "float32", shared=True)
PLAIN = PrologueForm("expert_combine", "none")
REDUCE = PrologueForm("expert_reduce", "value", shared=True)
CASES = {
    "one-shot": Case(4, 24, 32, prologue=COMBINE, slots=5),
    "one-shot-cluster": Case(3, 576, 64, keep_norm=True, quant=NVFP4(37.5), prologue=REDUCE),
    "one-shot-float32": Case(2, 264, 32, dtype=torch.float32, quant=FP8PerToken(), prologue=replace(COMBINE, weights="value"), slots=1),
    "one-shot-loop": Case(3, 264, 32, rows=1, prologue=PLAIN),
    "one-shot-vectors": Case(3, 576, 64, vectors=2, rows=1, dtype=torch.float16, quant=MXFP8("ceil"), prologue=COMBINE, slots=16),
    "two-shot": Case(4, 24, 32, kernel="two_shot", prologue=REDUCE, slots=6),
    "two-shot-loop": Case(3, 264, 32, kernel="two_shot", rows=2, quant=FP8PerToken(), keep_norm=True, prologue=COMBINE, slots=6),
    "two-shot-vectors": Case(3, 576, 64, kernel="two_shot", vectors=2, rows=1, dtype=torch.float16, prologue=PLAIN, slots=8),
    "two-shot-launches": Case(3, 288, 64, kernel="two_shot", quant=NVFP4(37.5, "8x4"), max_tokens=5, launches=3, prologue=REDUCE),
    "sharded": Case(4, 24, 32, kernel="sharded", max_tokens=5, prologue=replace(COMBINE, weights="value", shared=False)),
    "sharded-float32": Case(2, 264, 64, kernel="sharded", quant=FP8Static(0.5), max_tokens=5, rows=1, dtype=torch.float32, prologue=REDUCE),
    "sharded-vectors": Case(2, 576, 64, kernel="sharded", vectors=2, rows=1, quant=FP8Group(48), max_tokens=6, prologue=COMBINE, slots=8),
    "sharded-launches": Case(2, 288, 64, kernel="sharded", quant=FP8Group(16), max_tokens=7, launches=2, rows=1, prologue=PLAIN),
    "reduce-scatter": Case(3, 264, 32, kernel="reduce_scatter", quant=FP8PerToken(), max_tokens=5, rows=1, prologue=COMBINE),
    "reduce-scatter-sum": Case(4, 24, 32, kernel="reduce_scatter", residual=False, norm=False, max_tokens=5, prologue=REDUCE),
    "local": Case(2, 576, 96, kernel="local", quant=NVFP4(100.0), prologue=COMBINE),
    "local-loop": Case(2, 576, 64, kernel="local", vectors=2, rows=1, prologue=REDUCE),
    "local-combine-loop": Case(2, 576, 64, kernel="local", vectors=2, rows=1, prologue=COMBINE, slots=9),
    "local-combine-vectors": Case(2, 1032, 64, kernel="local", vectors=4, rows=1, dtype=torch.float32, prologue=PLAIN, slots=7),
}


@pytest.mark.parametrize("name", CASES)
def test_every_call_equals_the_reference(build: Build, name: str) -> None:
    library, most, kinds = build(CASES[name]), CASES[name].max_tokens, list(KINDS)
    for number, mode in enumerate(PRESENT):
        tokens = (most, 1, min(2, most), most)
        if CASES[name].launches > 1:
            tokens = (most, most - 1)
        run = emulate(library, tokens, seed=number, mode=mode, victim=number % library.world, kind=kinds[(number + len(name)) % len(kinds)])
        assert run.problem() == "", (mode, number)


@pytest.mark.parametrize(
    ("name", "edit"),
    [
        # An index that names no row is taken for the first.
        ("two-shot-loop", Edit("source.cuh", "if (named[b] < row.p.expert_rows) Rows::add", "Rows::add")),
        ("one-shot", Edit("source.cuh", "if (of >= row.p.expert_rows) continue;", "")),
        # The slots of a token are those of the one before.
        ("local-combine-loop", Edit("source.cuh", "ask(t + grid_rows());", "asked = t + grid_rows();")),
        # A slot is another lane's.
        ("local-combine-loop", Edit("source.cuh", "from_bits(of_lane(bits(by_this), k + b))", "from_bits(of_lane(bits(by_this), b))")),
        # An expert that is not used.
        ("two-shot", Edit("source.cuh", "if (w[b] != 0.0f) Rows::add", "Rows::add")),
        # The last slots of a batch.
        ("two-shot-loop", Edit("source.cuh", "k += Rows::kBatch) {", "k += Rows::kBatch + 1) {")),
        ("local-combine-loop", Edit("source.cuh", "k += kTogether) {", "k += kTogether + 1) {")),
        # The sum is scaled after the shared expert.
        ("one-shot-vectors", Edit("source.cuh", "if (row.p.scaling != 1.0f) {", "if (false) {")),
    ],
)
def test_faults_are_seen(build: Build, name: str, edit: Edit) -> None:
    library = build(CASES[name], edits=(edit,))
    assert any(emulate(library, (3, 2), seed=seed).problem() for seed in range(3))

"""The kernel that adds the terms of the host path, on the CPU: every count, islands, dtypes, epilogues and formats."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from emulated import Build
from samples import every_format

from collogue.calls.request import make_request
from collogue.calls.terms import MAX_TERMS, TermsForm
from collogue.contract.quant import MXFP8, NVFP4, FP8Group, FP8PerToken
from collogue.gpu import jit
from collogue.planning.plan import make_kernels, make_plan
from collogue.planning.topology import Topology
from collogue.testing.emulator import Case, Edit, emulate
from collogue.testing.inputs import KINDS

pytestmark = pytest.mark.slow

BF16, F16, F32 = torch.bfloat16, torch.float16, torch.float32


def case(form: TermsForm, hidden_size: int = 288, threads: int = 64, **more: Any) -> Case:
    return Case(1, hidden_size, threads, **{"kernel": "local", "terms": form, "dtype": form.dtype, **more})


#: Two to eight terms in rank order, and the most that there can be.
COUNTS = {
    f"{n} terms": case(TermsForm(BF16, n), quant=NVFP4(37.5) if n % 2 else None, keep_norm=n % 2 == 1) for n in (*range(2, 9), MAX_TERMS)
}
#: Islands as an owner sees them: own terms, others' sums in float32 or, of islands of one rank, in D.
ISLANDS = {
    "own island first": case(TermsForm(BF16, 3, 0b100, 0b101)),
    "own island last": case(TermsForm(BF16, 3, 0b001, 0b011), quant=FP8PerToken()),
    "between": case(TermsForm(F16, 4, 0b1001, 0b1011), quant=MXFP8("ceil"), keep_norm=True),
    "alone": case(TermsForm(BF16, 3, 0b110, 0b111), norm=False),
    "one rank elsewhere": case(TermsForm(BF16, 4, 0, 0b1001), residual=False),
    "every term, by two and two": case(TermsForm(BF16, 4, 0, 0b0101)),
    "float32": case(TermsForm(F32, 5, 0, 0b01001), 192, quant=FP8Group(48)),
    "many in float32, several vectors": case(TermsForm(BF16, 9, 0x1F, 0x3F), 576, 64, vectors=2, rows=1, quant=NVFP4(37.5)),
    "eight islands": case(TermsForm(BF16, 15, 0x7F, 0xFF), norm=False),
    "decoded, of a bfloat16 sum": case(TermsForm(F32, 3), dtype=BF16, quant=NVFP4(37.5)),
    "decoded, islands": case(TermsForm(F32, 4, 0, 0b0101), 576, 64, vectors=2, rows=1, dtype=F16),
}
SHAPES = {
    "sum of an island": case(TermsForm(BF16, 3), dtype=F32, residual=False, norm=False),
    "sum of an island, float16": case(TermsForm(F16, 2), dtype=F32, residual=False, norm=False, rows=1, vectors=2, hidden_size=576),
    "one cta": case(TermsForm(BF16, 2), 24, 32),
    "cluster": case(TermsForm(BF16, 3), 576, 64, quant=NVFP4(37.5)),
    "loop": case(TermsForm(BF16, 3), 576, 64, rows=1, quant=FP8PerToken()),
    "vectors": case(TermsForm(BF16, 4), 576, 64, rows=1, vectors=2, quant=FP8Group(48), max_tokens=5),
    "branch": case(TermsForm(BF16, 3, 0b001, 0b011), 576, 96, branch=True),
    "branch loop": case(TermsForm(F32, 2), 576, 64, rows=1, vectors=2, branch=True, norm=False),
    "late weight": case(TermsForm(BF16, 2), prefetch=False),
}
FORMATS = {f"format {i}": case(TermsForm(BF16, 2), 576, 96, quant=quant, keep_norm=i % 2 == 0) for i, quant in enumerate(every_format())}
CASES = {**COUNTS, **ISLANDS, **SHAPES, **FORMATS}


@pytest.mark.parametrize("name", CASES)
def test_every_call_equals_the_reference(build: Build, name: str) -> None:
    library, most = build(CASES[name]), CASES[name].max_tokens
    for number, kind in enumerate(KINDS):
        run = emulate(library, (most, 1, 2, most), seed=number, mode=("fair", "slow_ctas")[number % 2], kind=kind)
        assert run.problem() == "", (kind, number)


_ORDER = Edit("source.cuh", "const u8* const from = row.p.terms[k];", "const u8* const from = row.p.terms[kTerms - 1 - k];")
_ROTATED = Edit(_ORDER.file, _ORDER.old, _ORDER.new.replace("kTerms - 1 - k", "(k + 1) % kTerms"))
_NO_ISLANDS = Edit("source.cuh", "const bool starts = k == 0 || (kStarts >> k & 1);", "const bool starts = k == 0;")
_LATE_ISLANDS = Edit("source.cuh", "|| (kStarts >> k & 1);", "|| (kStarts >> (k - 1) & 1);")
_FORGOTTEN = Edit("source.cuh", "if (k == kTerms - 1 && later(k)) join();", "")


@pytest.mark.parametrize(
    ("name", "edit"),
    [
        ("3 terms", _ORDER),
        ("8 terms", _ORDER),
        ("every term, by two and two", _ROTATED),  # turned around they would be the same sum
        ("every term, by two and two", _NO_ISLANDS),
        ("float32", _LATE_ISLANDS),
        ("own island last", _FORGOTTEN),
    ],
)
def test_a_wrong_order_is_seen(build: Build, name: str, edit: Edit) -> None:
    library = build(replace(CASES[name], norm=False, quant=None, keep_norm=False), edits=(edit,))
    assert any(emulate(library, (3, 2), seed=seed, kind=kind).problem() for seed in range(4) for kind in ("order", "normal"))


#: Shapes in which threads hold one vector of every term, and several: a few rows, and many.
COMPILED = [
    (tokens, form, dtype, quant)
    for tokens in (1, 4096)
    for form, dtype, quant in (
        (TermsForm(BF16, 2), BF16, NVFP4(2.0)),
        (TermsForm(BF16, 8), BF16, FP8PerToken()),
        (TermsForm(F16, 5, 0b00001, 0b00011), F16, None),
        (TermsForm(BF16, 8), F32, None),
        (TermsForm(F32, 8, 0, 0b10001), BF16, None),
        (TermsForm(F32, 8), F32, MXFP8("ceil")),
        (TermsForm(BF16, MAX_TERMS, 0x7F, 0xFF), BF16, NVFP4(2.0)),
    )
    if form.count < MAX_TERMS or tokens == 1  # with many rows those of the most terms spill up to 32 bytes
]


@pytest.mark.parametrize("architecture", ["sm_80", "sm_90a", "sm_100a"])
def test_nothing_spills(architecture: str) -> None:
    for tokens, form, dtype, quant in COMPILED:
        topology = Topology(1, tokens, 7168, dtype, architecture, 132, 1)
        epilogue = {"residual": quant is not None, "norm": quant is not None, "quant": quant}
        shape = {"wide_weight": False, "keep_norm": False, "operation": "all_reduce"}
        request = make_request(tokens, 7168, dtype, **epilogue, **shape, prologue=form)  # type: ignore[arg-type]
        (kernel,) = make_kernels(topology, request, make_plan(topology, request))
        code, _ = jit.compile_variant(kernel.variant, architecture)
        assert jit.local_bytes(code) == 0, (kernel.variant.name, tokens, kernel.shape)

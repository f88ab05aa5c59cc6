"""Kernels that scale a product of codes, on the CPU: every dtype and shape, with and without a bias."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from emulated import Build

from collogue.calls.product import ProductForm
from collogue.calls.request import make_request
from collogue.gpu import jit
from collogue.planning.plan import make_kernels, make_plan
from collogue.planning.topology import Topology
from collogue.testing.emulator import Case, Edit, emulate
from collogue.testing.inputs import KINDS

pytestmark = pytest.mark.slow

DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def case(hidden_size: int, threads: int, bias: bool, **more: Any) -> Case:
    return Case(1, hidden_size, threads, kernel="local", residual=False, norm=False, terms=ProductForm(bias), **more)


CASES = {
    f"{shape}, {str(dtype).removeprefix('torch.')}{', bias' * bias}": case(*sizes, bias, dtype=dtype, **more)
    for shape, (sizes, more) in {
        "one cta": ((24, 32), {}),
        "cluster": ((576, 64), {"max_tokens": 5}),
        "loop": ((264, 32), {"vectors": 2, "rows": 2, "max_tokens": 5}),
    }.items()
    for dtype in DTYPES
    for bias in (False, True)
}


@pytest.mark.parametrize("name", CASES)
def test_every_call_equals_the_reference(build: Build, name: str) -> None:
    library, most = build(CASES[name]), CASES[name].max_tokens
    for number, kind in enumerate(KINDS):
        run = emulate(library, (most, 1, 2, most), seed=number, mode=("fair", "slow_ctas")[number % 2], kind=kind)
        assert run.problem() == "", (kind, number)


@pytest.mark.parametrize(
    "edit",
    [
        Edit("source.cuh", "product[j] * by * scale[j]", "product[j] * (by * scale[j])"),
        Edit("source.cuh", "row.p.row_scales + t * Float32::kBytes", "row.p.row_scales"),
        Edit("source.cuh", "row.p.column_scales + at * Float32::kBytes", "row.p.column_scales"),
        Edit("source.cuh", "row.p.bias + at * D::kBytes", "row.p.bias"),
        Edit("source.cuh", "const u32 at = row.vector(i) * kVector;", "const u32 at = row.vector(0) * kVector;"),
    ],
    ids=lambda edit: edit.new,
)
def test_faults_are_seen(build: Build, edit: Edit) -> None:
    library = build(CASES["loop, float32, bias"], edits=(edit,))
    assert any(emulate(library, (3, 2), seed=seed, kind="normal").problem() for seed in range(2))


@pytest.mark.parametrize("architecture", ["sm_80", "sm_90a", "sm_100a"])
def test_nothing_spills(architecture: str) -> None:
    """Of one row, of a few and of many."""
    for tokens, hidden_size in ((1, 4096), (128, 14336), (4096, 6144)):
        for dtype in DTYPES:
            topology = Topology(1, tokens, hidden_size, dtype, architecture, 132, 1)
            plain: dict[str, Any] = {"residual": False, "norm": False, "wide_weight": False, "quant": None, "keep_norm": False}
            request = make_request(tokens, hidden_size, dtype, operation="all_reduce", prologue=ProductForm(True), **plain)
            (kernel,) = make_kernels(topology, request, make_plan(topology, request))
            code, _ = jit.compile_source(kernel.variant.source(), architecture, kernel.variant.name)
            assert jit.local_bytes(code) == 0, (kernel.variant.name, tokens, kernel.shape)

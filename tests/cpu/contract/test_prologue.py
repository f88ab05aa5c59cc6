"""What stands in the place of a partial: descriptions, the reference against the scalar version, bad input."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from collogue import ExpertCombine, ExpertReduce, FP8PerToken, Gated, PrologueForm, reference
from collogue.contract.prologue import MAX_EXPERTS, MAX_TOP_K
from collogue.errors import ArgumentError, DTypeError, LayoutError, ScaleError, ShapeError
from collogue.testing.inputs import KINDS, make_prologue
from collogue.testing.oracle import scalar_term

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
FORMS = [
    *(PrologueForm("expert_combine", w, s) for w, s in itertools.product(("none", "value", "float32"), (False, True))),  # type: ignore[arg-type]
    *(PrologueForm("expert_reduce", w, shared=True) for w in ("value", "float32")),  # type: ignore[arg-type]
    PrologueForm("gated", "none"),
]
BITS = {2: torch.int16, 4: torch.int32}


def same(a: torch.Tensor, b: torch.Tensor) -> bool:
    return torch.equal(a.view(BITS[a.element_size()]), b.view(BITS[b.element_size()]))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("form", FORMS, ids=str)
def test_reference_equals_scalar(form: PrologueForm, dtype: torch.dtype) -> None:
    for kind, (tokens, count), rank in itertools.product(KINDS, [(1, 1), (5, 3), (3, 16), (0, 2)], range(3)):
        given = make_prologue(form, kind, rank=rank, tokens=tokens, hidden_size=24, dtype=dtype, count=count, wild=True)
        assert same(reference.term_of(given), scalar_term(given)), (kind, tokens, count, rank)


def combine(**changed: Any) -> ExpertCombine:
    given = {"expert_output": torch.ones(5, 8), "index": torch.zeros(3, 2, dtype=torch.int32), "weights": torch.ones(3, 2)}
    return ExpertCombine(**{**given, **changed})


def test_by_hand() -> None:
    rows = torch.tensor([[1.0], [2.0**-24], [float("nan")], [-1.0]]).expand(4, 8).contiguous()
    index = torch.tensor([[0, 1, 1, 3], [1, 1, 0, 3], [-1, -1, -1, -1], [0, 0, 4, -9]], dtype=torch.int32)
    shared = torch.full((4, 8), -0.0)
    found = reference.term_of(ExpertCombine(rows, index, None, shared, scaling=3.0))
    assert found[:, 0].tolist() == [0.0, 3 * 2.0**-23, 0.0, 6.0]
    assert not torch.signbit(found).any()
    # Multiplied once, after the sum and before the shared expert.
    one = ExpertCombine(rows[:1], index[:1, :1], torch.full((1, 1), 0.1), torch.full((1, 8), 0.5), scaling=0.3)
    tenth, third = torch.tensor(0.1), torch.tensor(0.3)
    assert torch.equal(reference.term_of(one)[0, 0], tenth * third + 0.5)


def test_a_weight_of_zero_skips_an_expert() -> None:
    rows = torch.tensor([float("nan"), 2.0]).view(2, 1, 1).expand(2, 1, 8).contiguous()
    given = ExpertReduce(rows, torch.tensor([[-0.0], [0.5]]), torch.ones(1, 8))
    assert reference.term_of(given).unique().tolist() == [2.0]


def test_ranks_without_local_experts() -> None:
    none = combine(expert_output=torch.empty(0, 8), index=torch.full((3, 2), -1, dtype=torch.int32))
    found = reference.all_reduce([combine(), none])
    assert torch.equal(found.reduced, torch.full((3, 8), 2.0))


@pytest.mark.parametrize(
    ("error", "text", "changed"),
    [
        (DTypeError, "int64", {"index": torch.zeros(3, 2, dtype=torch.int64)}),
        (ShapeError, r"\[T, K\]", {"index": torch.zeros(6, dtype=torch.int32)}),
        (ShapeError, "0 slots", {"index": torch.zeros(3, 0, dtype=torch.int32), "weights": None}),
        (ShapeError, "17 slots", {"index": torch.zeros(3, MAX_TOP_K + 1, dtype=torch.int32), "weights": None}),
        (DTypeError, "bfloat16", {"weights": torch.ones(3, 2, dtype=torch.bfloat16)}),
        (ShapeError, r"\[3, 2\]", {"weights": torch.ones(2, 3)}),
        (LayoutError, "strides", {"weights": torch.ones(2, 3).t()}),
        (ShapeError, r"\[3, 8\]", {"shared_expert": torch.ones(3, 16)}),
        (DTypeError, "float64", {"shared_expert": torch.ones(3, 8, dtype=torch.float64)}),
        (ShapeError, r"\[P, H\]", {"expert_output": torch.ones(5)}),
        (DTypeError, "int32", {"expert_output": torch.ones(5, 8, dtype=torch.int32)}),
        (ScaleError, "nan", {"scaling": float("nan")}),
        (ScaleError, "None", {"scaling": None}),
        (ScaleError, "1e\\+300", {"scaling": 1e300}),
        (ScaleError, "-3.5e\\+38", {"scaling": -3.5e38}),
        (ScaleError, "finite in float32", {"scaling": 10**400}),
    ],
)
def test_bad_input(error: type[Exception], text: str, changed: dict[str, Any]) -> None:
    with pytest.raises(error, match=text) as found:
        combine(**changed)
    assert "hint: " in str(found.value)


def test_bad_input_of_a_reduction() -> None:
    rows, weights, own = torch.ones(2, 3, 8), torch.ones(2, 3), torch.ones(3, 8)
    with pytest.raises(ShapeError, match="65 experts"):
        ExpertReduce(torch.ones(MAX_EXPERTS + 1, 3, 8), torch.ones(MAX_EXPERTS + 1, 3), own)
    with pytest.raises(ShapeError, match=r"expected \[2, 3\]"):
        ExpertReduce(rows, weights.t().contiguous(), own)
    with pytest.raises(DTypeError, match="float64"):
        ExpertReduce(rows, weights.double(), own)
    with pytest.raises(ShapeError, match="token_input"):
        ExpertReduce(rows, weights, own[:2])
    with pytest.raises(ArgumentError, match="unknown prologue"):
        PrologueForm("finish")  # type: ignore[arg-type]
    with pytest.raises(ArgumentError, match="neither weights"):
        PrologueForm("gated")
    with pytest.raises(ArgumentError, match="token input"):
        PrologueForm("expert_reduce", "none", shared=True)


# ---- a gated unit


def off(found: torch.Tensor, exact: torch.Tensor) -> float:
    """The largest distance in units in the last place of float32."""
    units = np.spacing(exact.abs().float().numpy()).astype(np.float64)
    return float(((found.double() - exact).abs().numpy() / units).max())


def test_silu_is_near_that_of_float64() -> None:
    """Every bfloat16, a fine grid, and random numbers between; also the exponential in it. Each bound is nearly reached."""
    every = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(torch.bfloat16).float()
    random = torch.randn(2**20, generator=torch.Generator().manual_seed(0))
    g = torch.cat((every, torch.linspace(-88, 88, 2**21), random, 8 * random))
    g = g[g.isfinite() & (g >= -88)]
    error = off(reference.silu(g), g.double() / (1 + (-g.double()).exp()))
    assert 2.0 < error < 2.5, error


def test_silu_has_its_limits() -> None:
    g = torch.tensor([torch.inf, -torch.inf, torch.nan, -88.0, -88.00001, 0.0, 3e38, -3e38, 32.0, 1e-38])
    found = reference.silu(g)
    assert found[[0, 1, 4, 5, 6, 7, 8]].tolist() == [torch.inf, 0.0, 0.0, 0.0, float(torch.tensor(3e38)), 0.0, 32.0]
    assert found[2].isnan()
    assert -5.4e-37 < float(found[3]) < -5.3e-37
    assert float(found[9]) == float(g[9]) / 2


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_product_is_rounded_once(dtype: torch.dtype) -> None:
    """Every 16-bit gate by a few factors; no negative zero, one NaN."""
    if dtype == torch.float32:
        gate = torch.randn(64, 1024, generator=torch.Generator().manual_seed(1)) * 20
    else:
        gate = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype).view(64, 1024)
    for factor in (1.0, -1.0, 0.0, -0.37, torch.inf, torch.nan):
        given = Gated(gate, torch.full_like(gate, factor))
        found = reference.term_of(given)
        assert same(found, scalar_term(given)), factor
        assert not torch.signbit(found[(found == 0)]).any()
        assert same(found, reference.round_value(reference.silu(gate.float()) * given.up.float(), dtype))


def test_both_halves_of_one_tensor() -> None:
    x = torch.randn(3, 32)
    given = Gated.of(x)
    assert given.gate.data_ptr() == x.data_ptr()
    assert (given.tokens, given.hidden_size, given.row_stride) == (3, 16, 32)
    assert torch.equal(reference.term_of(given), reference.term_of(Gated(x[:, :16].clone(), x[:, 16:].clone())))
    assert given.rows(1, 3).tokens == 2
    assert Gated.of(x[:1]).row_stride == 16


@pytest.mark.parametrize(
    ("error", "text", "make"),
    [
        (ShapeError, r"\[T, 2 H\], got \[3, 9\]", lambda: Gated.of(torch.ones(3, 9))),
        (ShapeError, r"\[T, 2 H\], got \[8\]", lambda: Gated.of(torch.ones(8))),
        (ShapeError, r"Gated.gate must be a tensor of shape \[T, H\], got list", lambda: Gated([1.0], torch.ones(1, 8))),  # type: ignore[arg-type]
        (ShapeError, r"up has shape \[3, 8\], Gated.gate \[3, 16\]", lambda: Gated(torch.ones(3, 16), torch.ones(3, 8))),
        (DTypeError, "Gated.gate has dtype torch.float64", lambda: Gated.of(torch.ones(3, 16).double())),
        (DTypeError, "up has dtype torch.float16, Gated.gate torch.float32", lambda: Gated(torch.ones(3, 8), torch.ones(3, 8).half())),
        (LayoutError, "gate has strides", lambda: Gated(torch.ones(8, 3).t(), torch.ones(3, 8))),
        (LayoutError, "8 elements apart, of Gated.up 16", lambda: Gated(torch.ones(3, 8), torch.ones(3, 16)[:, :8])),
    ],
)
def test_bad_gates(error: type[Exception], text: str, make: Callable[[], Gated]) -> None:
    with pytest.raises(error, match=text) as found:
        make()
    assert "hint: " in str(found.value)


@pytest.mark.parametrize(
    ("label", "form"),
    [
        ("gated", PrologueForm("gated", "none")),
        ("expert_combine", PrologueForm("expert_combine")),
        ("expert_combine/none", PrologueForm("expert_combine", "none")),
        ("expert_combine/shared/float32", PrologueForm("expert_combine", "float32", shared=True)),
        ("expert_reduce", PrologueForm("expert_reduce", shared=True)),
        ("expert_reduce/float32/shared", PrologueForm("expert_reduce", "float32", shared=True)),
    ],
)
def test_forms_by_name(label: str, form: PrologueForm) -> None:
    assert PrologueForm.parse(label) == form


@pytest.mark.parametrize(
    "label", ["", "swiglu", "gated/shared", "gated/float32", "expert_reduce/none", "expert_combine/shared/shared", "gated/"]
)
def test_names_of_no_form(label: str) -> None:
    with pytest.raises(ArgumentError) as caught:
        PrologueForm.parse(label)
    assert caught.value.hint


def test_the_largest_scaling_is_finite() -> None:
    """The largest number of float32, and what rounds to it."""
    most = torch.finfo(torch.float32).max
    for scaling in (most, most + 2.0**102):
        assert torch.tensor(scaling, dtype=torch.float64).float().isfinite()
        combine(scaling=scaling)
    with pytest.raises(ScaleError):
        combine(scaling=most + 2.0**103)


def test_terms_that_ranks_do_not_agree_about() -> None:
    """The reference refuses what a communicator does: experts without a sum, another kind, another K; E is each rank's own."""
    mine, rows = combine(), torch.ones(3, 8)
    other = ExpertCombine(torch.ones(5, 8), torch.zeros(3, 1, dtype=torch.int32))
    unit = Gated(rows, rows)
    reduce = [ExpertReduce(torch.ones(e, 3, 8), torch.ones(e, 3), rows) for e in (1, 2)]
    for given, text in (
        ([mine, rows], "rank 0 ExpertCombine with K = 2, rank 1 tensor"),
        ([rows, rows, mine], "rank 0 tensor, rank 2 ExpertCombine with K = 2"),
        ([mine, other], "K = 2, rank 1 ExpertCombine with K = 1"),
        ([unit, rows], "rank 0 Gated, rank 1 tensor"),
        ([reduce[0], mine], "ExpertReduce"),
    ):
        for call in (reference.all_reduce, reference.sharded, reference.reduce_scatter):
            with pytest.raises(ArgumentError, match=text) as caught:
                call(given)  # type: ignore[operator]
            assert caught.value.hint
    assert reference.all_reduce(reduce).reduced is not None
    for one in (mine, reduce[0]):
        with pytest.raises(ArgumentError, match=f"y is a collogue.{type(one).__name__}, and finish sums nothing"):
            reference.finish(one, quant=FP8PerToken())  # type: ignore[arg-type]
    assert reference.finish(unit, quant=FP8PerToken()).codes is not None

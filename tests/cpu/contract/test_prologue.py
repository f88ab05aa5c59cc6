"""What stands in the place of a partial: descriptions, the reference against the scalar version, bad input."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch

from collogue import ExpertCombine, ExpertReduce, PrologueForm, reference
from collogue.contract.prologue import MAX_EXPERTS, MAX_TOP_K
from collogue.errors import ArgumentError, DTypeError, LayoutError, ScaleError, ShapeError
from collogue.testing.inputs import KINDS, make_prologue
from collogue.testing.oracle import scalar_term

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
FORMS = [
    *(PrologueForm("expert_combine", w, s) for w, s in itertools.product(("none", "value", "float32"), (False, True))),  # type: ignore[arg-type]
    *(PrologueForm("expert_reduce", w, shared=True) for w in ("value", "float32")),  # type: ignore[arg-type]
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
    with pytest.raises(ArgumentError, match="token input"):
        PrologueForm("expert_reduce", "none", shared=True)

"""Calls with a prologue on the CPU engine, through modules and operators; and norms whose weight is read late."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import collogue
from collogue import ExpertCombine, ExpertReduce, FP8PerToken, PrologueForm, RMSNorm, reference
from collogue.contract.prologue import Prologue
from collogue.contract.spec import Output, owned_rows
from collogue.errors import (
    ArgumentError,
    CapacityError,
    DTypeError,
    GradError,
    IndexRangeError,
    LayoutError,
    MismatchedCall,
    OverlapError,
    ShapeError,
)
from collogue.pytorch import nn
from collogue.testing import VirtualGroup, run_virtual
from collogue.testing.compare import compare
from collogue.testing.inputs import make_inputs, make_prologue

WIDTH = 64
FORMS = (PrologueForm("expert_combine", "float32", shared=True), PrologueForm("expert_reduce", "value", shared=True))


def made(form: PrologueForm, rank: int, tokens: int = 5) -> Prologue:
    return make_prologue(form, "normal", rank=rank, tokens=tokens, hidden_size=WIDTH, dtype=torch.bfloat16, count=4)


def given(tokens: int = 5) -> dict[str, Any]:
    inputs = make_inputs("normal", rank=0, tokens=tokens, hidden_size=WIDTH, dtype=torch.bfloat16)
    return {"residual": inputs.residual, "norm": RMSNorm(inputs.weight, prefetch=False), "quant": FP8PerToken()}


def equal(a: Output, b: Output) -> bool:
    return not any(d.count for d in compare(a, b).values())


def comm_of(group: VirtualGroup, **options: Any) -> collogue.Communicator:
    return collogue.Communicator(group, **{"max_tokens": 8, "hidden_size": WIDTH, **options})


@pytest.mark.parametrize("form", FORMS, ids=str)
@pytest.mark.parametrize("world", [1, 3])
def test_every_operation(form: PrologueForm, world: int) -> None:
    terms = [made(form, rank) for rank in range(world)]
    arguments = given()
    whole = reference.all_reduce(terms, **arguments)
    parts, halves = reference.sharded(terms, **arguments), reference.reduce_scatter(terms, **arguments)

    def rank(group: VirtualGroup) -> list[bool]:
        comm, mine = comm_of(group), terms[group.rank]
        rows = owned_rows(5, world, group.rank)
        own = {**arguments, "residual": arguments["residual"][rows.start : rows.stop].clone()}
        out = comm.empty(5, residual=True, norm=True, quant=FP8PerToken(), prologue=mine)
        comm.prepare(5, norm=arguments["norm"], prologue=mine.form)
        assert comm.explain(5, prologue=mine).algorithm == "reference"
        shape = (1, 5, WIDTH)
        by_module = nn.finish(comm, mine, **{**arguments, "residual": arguments["residual"].view(shape)})
        assert by_module.residual is not None
        assert by_module.residual.shape == shape
        by_module.residual = by_module.residual.view(5, WIDTH)
        return [
            equal(comm.all_reduce(mine, out=out, **arguments), whole),
            equal(by_module, whole),
            equal(comm.all_reduce(mine, sharded=True, **own), parts[group.rank]),
            equal(comm.reduce_scatter(mine, **own), halves[group.rank]),
        ]

    assert all(all(found) for found in run_virtual(world, rank))


@pytest.mark.parametrize("form", FORMS, ids=str)
@pytest.mark.parametrize("tokens", [3, 5])
def test_operators_and_compiled_calls(form: PrologueForm, tokens: int) -> None:
    """More rows than the communicator holds are several calls."""
    term, arguments = made(form, 0, tokens), given(tokens)
    expected = reference.all_reduce([term], **arguments)
    parts = vars(term)

    def rank(group: VirtualGroup) -> None:
        comm = comm_of(group, max_tokens=4)

        def call(parts: dict[str, Any], arguments: dict[str, Any]) -> Output:
            return comm.all_reduce(type(term)(**parts), **arguments)

        with torch.no_grad():
            compiled = torch.compile(call, backend="aot_eager", fullgraph=True)(parts, arguments)
        assert equal(compiled, expected)
        comm.close()

    run_virtual(1, rank)


@pytest.mark.parametrize("form", FORMS, ids=str)
def test_operators_are_sound(form: PrologueForm) -> None:
    term, arguments = made(form, 0), given()

    def rank(group: VirtualGroup) -> None:
        comm = comm_of(group)
        args = [term.expert_output, arguments["residual"], arguments["norm"].weight, 1e-6, 0.0, "fp8_per_token", None, 1.0, 1e-12, False]
        index, shared = (term.index, term.shared_expert) if isinstance(term, ExpertCombine) else (None, term.token_input)
        args += [comm.name, False, form.kind, index, term.weights, shared, 2.5 if index is not None else 1.0]
        torch.library.opcheck(torch.ops.collogue.all_reduce.default, tuple(args))
        with pytest.raises(ArgumentError, match="unknown prologue"):
            torch.ops.collogue.all_reduce(*args[:12], "none", *args[13:])
        comm.close()

    run_virtual(1, rank)


def test_bad_calls(monkeypatch: pytest.MonkeyPatch) -> None:
    term = made(FORMS[0], 0)
    assert isinstance(term, ExpertCombine)
    reduce = made(FORMS[1], 0)
    assert isinstance(reduce, ExpertReduce)

    def rank(group: VirtualGroup) -> None:
        comm = comm_of(group)
        with pytest.raises(ArgumentError, match="finish sums nothing"):
            comm.finish(term, norm=given()["norm"])  # type: ignore[call-overload]
        with pytest.raises(ArgumentError, match="all_gather sums nothing"):
            comm.prepare(3, operation="all_gather", prologue=term)
        with pytest.raises(ArgumentError, match="prologue is a str"):
            comm.empty(3, prologue="expert_combine")  # type: ignore[arg-type]
        with pytest.raises(ShapeError, match=r"residual has shape \[4, 64\], ExpertCombine \[5, 64\]"):
            comm.all_reduce(term, residual=given(4)["residual"])
        with pytest.raises(DTypeError, match="float32; the communicator"):
            comm.all_reduce(ExpertCombine(torch.ones(2, WIDTH), term.index, None))
        with pytest.raises(LayoutError, match="index has strides"):
            comm.all_reduce(ExpertCombine(term.expert_output, term.index.t().contiguous().t(), None))
        with pytest.raises(LayoutError, match="expert_output has strides"):
            comm.all_reduce(
                ExpertReduce(reduce.expert_output.transpose(0, 1).contiguous().transpose(0, 1), reduce.weights, reduce.token_input)
            )
        with pytest.raises(CapacityError, match="ExpertCombine has shape"):
            comm.all_reduce(made(FORMS[0], 0, 9))
        with pytest.raises(GradError, match=r"ExpertCombine\.weights requires grad"):
            comm.all_reduce(ExpertCombine(term.expert_output, term.index, torch.ones(5, 4, requires_grad=True)))
        assert term.shared_expert is not None
        with pytest.raises(OverlapError, match="shared_expert"):
            comm.all_reduce(term, out=Output(reduced=term.shared_expert))
        comm.close()

    run_virtual(1, rank)


def test_indices_are_looked_at_when_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    term = made(FORMS[0], 0)
    assert isinstance(term, ExpertCombine)
    wild = ExpertCombine(term.expert_output, term.index.clone().fill_(len(term.expert_output)), term.weights)

    def rank(group: VirtualGroup) -> None:
        comm = comm_of(group)
        comm.all_reduce(wild)
        comm.close()

    run_virtual(1, rank)
    monkeypatch.setenv("COLLOGUE_DEBUG", "1")
    with pytest.raises(IndexRangeError, match="holds 23; expert_output has 23 rows"):
        run_virtual(1, rank)


def test_ranks_that_differ() -> None:
    """About the kind or K: an error. About P, the shared expert and scaling: each rank's own."""
    shared = torch.ones(5, WIDTH, dtype=torch.bfloat16)

    def combine(rank: int, slots: int) -> ExpertCombine:
        rows = torch.ones(4 - 4 * rank, WIDTH, dtype=torch.bfloat16)
        return ExpertCombine(rows, torch.full((5, slots), -rank, dtype=torch.int32), None, shared if rank else None, 2.0 + rank)

    def rank(group: VirtualGroup) -> None:
        comm = comm_of(group)
        out = comm.all_reduce(combine(group.rank, 3))
        assert out.reduced is not None
        assert out.reduced.unique().tolist() == [7.0]
        with pytest.raises(MismatchedCall, match="top_k=2"):
            comm.all_reduce(combine(group.rank, 2 + group.rank))
        comm.reset()
        with pytest.raises(MismatchedCall, match="expert_combine"):
            comm.all_reduce(combine(0, 3) if group.rank else shared)

    run_virtual(2, rank)


def test_a_late_weight_stays_late(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of an operator, under torch.compile, and of a module."""
    seen: list[bool] = []
    run_virtual(1, lambda group: _late(group, monkeypatch, seen))
    assert seen == [False] * 3


def _late(group: VirtualGroup, monkeypatch: pytest.MonkeyPatch, seen: list[bool]) -> None:
    comm, arguments, partial = comm_of(group), given(), torch.ones(5, WIDTH, dtype=torch.bfloat16)
    engine = comm._engine
    assert engine is not None
    run = engine.run

    def look(call: Any, out: Output | None) -> Output:
        seen.append(call.norm.prefetch)
        assert call.signature.request.late_weight
        return run(call, out)

    monkeypatch.setattr(engine, "run", look)
    with torch.no_grad():
        torch.compile(lambda x: comm.all_reduce(x, **arguments), backend="aot_eager", fullgraph=True)(partial)
        norm = arguments["norm"]
        torch.ops.collogue.all_reduce(partial, None, norm.weight, 1e-6, 0.0, "none", None, 1.0, 0.0, False, comm.name, False)
        nn.FusedRMSNorm(norm.weight, comm, prefetch=False)(partial)
    comm.close()

"""A norm of the sum before the residual is added: contract, CPU engine, modules, operators, bad input."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import collogue
from collogue import FP8PerToken, RMSNorm, reference
from collogue.contract.quant import Quant
from collogue.contract.spec import Output, owned_rows
from collogue.errors import ArgumentError, GradError, MismatchedCall, ShapeError
from collogue.pytorch import nn
from collogue.testing import VirtualGroup, run_virtual, scalar
from collogue.testing.compare import compare
from collogue.testing.inputs import KINDS, make_inputs, make_partials

WIDTH = 576
NAMES = {torch.bfloat16: "bfloat16", torch.float16: "float16", torch.float32: "float32"}
BITS: dict[int, Any] = {2: (torch.int16, "uint16"), 4: (torch.int32, "uint32")}


def given(tokens: int = 5, quant: Quant | None = None, dtype: torch.dtype = torch.bfloat16, kind: str = "normal") -> dict[str, Any]:
    first, second = (make_inputs(kind, rank=0, tokens=tokens, hidden_size=WIDTH, dtype=dtype, seed=seed) for seed in (0, 1))
    branch = RMSNorm(second.weight.float(), eps=1e-5, weight_offset=1.0)
    return {"residual": first.residual, "branch_norm": branch, "norm": RMSNorm(first.weight), "quant": quant}


def terms(world: int, tokens: int = 5, dtype: torch.dtype = torch.bfloat16, kind: str = "normal") -> list[torch.Tensor]:
    return make_partials(kind, world, tokens=tokens, hidden_size=WIDTH, dtype=dtype)


def equal(a: Output, b: Output) -> bool:
    return not any(d.count for d in compare(a, b).values())


@pytest.mark.parametrize("dtype", NAMES, ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_reference_equals_scalar(kind: str, dtype: torch.dtype) -> None:
    arguments, partials = given(dtype=dtype, kind=kind), terms(3, dtype=dtype, kind=kind)
    right = reference.all_reduce(partials, **arguments)
    signed, unsigned = BITS[dtype.itemsize]
    branch = arguments["branch_norm"]
    found = scalar.all_reduce(
        [x.view(signed).numpy().view(unsigned) for x in partials],
        dtype=NAMES[dtype],  # type: ignore[arg-type]
        residual=arguments["residual"].view(signed).numpy().view(unsigned),
        weight=arguments["norm"].weight.float().numpy(),
        branch=(branch.weight.numpy(), branch.eps, branch.weight_offset),
    )
    for mine, theirs in ((right.residual, found.residual), (right.norm, found.norm)):
        assert mine is not None
        assert theirs is not None
        assert (mine.view(signed).numpy().view(unsigned) == theirs).all()


def test_it_is_two_calls_and_an_addition() -> None:
    """``y = round(residual + round(norm1(round(sum))))``, by three steps that each round."""
    arguments, partials = given(), terms(2)
    normed = reference.all_reduce(partials, norm=arguments["branch_norm"]).norm
    assert normed is not None
    y = reference.all_reduce([normed], residual=arguments["residual"], norm=arguments["norm"])
    assert equal(reference.all_reduce(partials, **arguments), y)


@pytest.mark.parametrize("world", [1, 3])
def test_every_operation(world: int) -> None:
    arguments, partials = given(quant=FP8PerToken()), terms(world)
    whole = reference.all_reduce(partials, **arguments)
    parts, halves = reference.sharded(partials, **arguments), reference.reduce_scatter(partials, **arguments)

    def rank(group: VirtualGroup) -> list[bool]:
        comm, mine = collogue.Communicator(group, max_tokens=8, hidden_size=WIDTH), partials[group.rank]
        rows = owned_rows(5, world, group.rank)
        own = {**arguments, "residual": arguments["residual"][rows.start : rows.stop].clone()}
        comm.prepare(5, norm=arguments["norm"], branch_norm=arguments["branch_norm"])
        out = comm.empty(5, residual=True, norm=True, quant=FP8PerToken(), branch_norm=True)
        linear = nn.RowParallelLinear(torch.eye(WIDTH, dtype=torch.bfloat16), None, comm)
        return [
            equal(comm.all_reduce(mine, out=out, **arguments), whole),
            equal(linear(mine, **arguments), whole),
            equal(comm.all_reduce(mine, sharded=True, **own), parts[group.rank]),
            equal(comm.reduce_scatter(mine, **own), halves[group.rank]),
        ]

    assert all(all(found) for found in run_virtual(world, rank))


def test_compiled_calls() -> None:
    arguments, partial = given(), terms(1)[0]

    def rank(group: VirtualGroup) -> None:
        comm = collogue.Communicator(group, max_tokens=4, hidden_size=WIDTH)
        with torch.no_grad():
            found = torch.compile(lambda x: comm.all_reduce(x, **arguments), backend="aot_eager", fullgraph=True)(partial)
        assert equal(found, reference.all_reduce([partial], **arguments))
        comm.close()

    run_virtual(1, rank)


def test_bad_calls() -> None:
    arguments, partial = given(), terms(1)[0]

    def rank(group: VirtualGroup) -> None:
        comm = collogue.Communicator(group, max_tokens=8, hidden_size=WIDTH)
        branch = arguments["branch_norm"]
        with pytest.raises(ArgumentError, match="branch_norm without residual"):
            comm.all_reduce(partial, norm=arguments["norm"], branch_norm=branch)
        with pytest.raises(ArgumentError, match="branch_norm without residual"):
            reference.all_reduce([partial], branch_norm=branch)
        with pytest.raises(ArgumentError, match="branch_norm without residual"):
            comm.explain(3, residual=False, branch_norm=True)
        with pytest.raises(ArgumentError, match="finish sums nothing and takes no branch_norm"):
            comm.prepare(3, operation="finish", norm=arguments["norm"], branch_norm=branch)
        with pytest.raises(ArgumentError, match=r"branch_norm: expected collogue\.RMSNorm, got torch\.Tensor"):
            comm.all_reduce(partial, residual=arguments["residual"], branch_norm=branch.weight)
        with pytest.raises(ShapeError, match=r"branch_norm\.weight has 8 elements"):
            comm.all_reduce(partial, residual=arguments["residual"], branch_norm=RMSNorm(torch.ones(8)))
        with pytest.raises(GradError, match=r"branch_norm\.weight requires grad"):
            comm.all_reduce(partial, residual=arguments["residual"], branch_norm=RMSNorm(torch.ones(WIDTH, requires_grad=True)))
        comm.close()

    run_virtual(1, rank)


def test_ranks_that_differ() -> None:
    arguments, partials = given(), terms(2)

    def rank(group: VirtualGroup) -> None:
        comm = collogue.Communicator(group, max_tokens=8, hidden_size=WIDTH)
        mine = arguments if group.rank else {**arguments, "branch_norm": RMSNorm(arguments["branch_norm"].weight, eps=1e-4)}
        with pytest.raises(MismatchedCall, match="branch_norm"):
            comm.all_reduce(partials[group.rank], **mine)

    run_virtual(2, rank)

"""What the CPU tests run on several ranks: a call's inputs, its expected outputs, and what a real process of a gloo group does."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist

import collogue
from collogue import reference
from collogue.contract.quant import FP8PerToken, Quant
from collogue.contract.spec import Output, RMSNorm
from collogue.errors import CollogueError
from collogue.testing.compare import compare, differing
from collogue.testing.inputs import make_inputs, make_partials

MAX_TOKENS, HIDDEN_SIZE = 8, 64


def communicator(group: Any, **options: Any) -> collogue.Communicator:
    """A small one. Every rank of the group together."""
    return collogue.Communicator(group, **{"max_tokens": MAX_TOKENS, "hidden_size": HIDDEN_SIZE, **options})


def arguments(
    rank: int, tokens: int = 4, *, hidden_size: int = HIDDEN_SIZE, seed: int = 0, dtype: torch.dtype = torch.bfloat16
) -> dict[str, Any]:
    """Partial, residual and norm of one rank."""
    inputs = make_inputs("order", rank=rank, tokens=tokens, hidden_size=hidden_size, dtype=torch.bfloat16, seed=seed)
    return {"partial": inputs.partial, "residual": inputs.residual, "norm": RMSNorm(inputs.weight)}


def expected(world_size: int, given: dict[str, Any], *, seed: int = 0) -> Output:
    """What the reference gives for ``given``, the arguments of any one rank as :func:`arguments` made them."""
    (tokens, hidden_size), dtype = given["partial"].shape, given["partial"].dtype
    partials = make_partials("order", world_size, tokens=tokens, hidden_size=hidden_size, dtype=dtype, seed=seed)
    return reference.all_reduce(partials, **{k: v for k, v in given.items() if k in ("residual", "norm", "quant", "keep_norm")})


def check_works(comm: collogue.Communicator, *, tokens: int = 4, seed: int = 0, quant: Quant | None = None) -> None:
    """One call, compared with the reference bit by bit. Collective."""
    given = {**arguments(comm.rank, tokens, seed=seed), "quant": quant}
    differences = compare(comm.all_reduce(**given), expected(comm.world_size, given, seed=seed))
    assert not differing(differences), differences


def gloo_rank(group: dist.ProcessGroup, tell: Any) -> dict[str, Any]:
    """One rank of a world of three: a call, a sub-group of ranks 0 and 2, a group this rank may not be in, moved bytes."""
    told: dict[str, Any] = {}
    with communicator(group) as comm:
        check_works(comm, quant=FP8PerToken())
        comm.reset()
        check_works(comm, tokens=1, seed=1)
        try:
            comm.all_reduce(torch.zeros(1 + comm.rank, HIDDEN_SIZE, dtype=torch.bfloat16))
        except CollogueError as error:
            told["mismatch"] = str(error)
        comm.reset()
        check_works(comm, seed=2)
    tell("sub-group")
    pair = dist.new_group([0, 2])
    try:
        with communicator(pair) as comm:
            check_works(comm, seed=3)
            told["pair"] = (comm.rank, comm.world_size)
    except CollogueError as error:
        told["outside"] = (type(error).__name__, str(error))
    tell("bytes")
    told["gathered"] = _gather(group)
    return told


def _gather(group: dist.ProcessGroup) -> bool:
    known = collogue.group.TorchGroup(group)
    blocks = [torch.arange(16, dtype=torch.int16).view(2, 8).view(torch.bfloat16) + 0 * r for r in range(known.size)]
    blocks = [(b.view(torch.int16) + 100 * r).view(torch.bfloat16) for r, b in enumerate(blocks)]
    output = torch.empty(known.size, 2, 8, dtype=torch.bfloat16)
    known.all_gather(output, blocks[known.rank])
    return torch.equal(output.view(torch.int16), torch.stack(blocks).view(torch.int16))

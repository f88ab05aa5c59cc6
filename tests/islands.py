"""What ranks on several hosts do: every operation and format, compared with the scalar version. Used by test_islands.py."""

from __future__ import annotations

import functools
import os
import time
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist
from ranks import HIDDEN_SIZE, MAX_TOKENS, communicator
from samples import every_format, wild

import collogue
from collogue import reference
from collogue.contract.prologue import PrologueForm
from collogue.contract.quant import NVFP4, Quant
from collogue.contract.spec import Output, RMSNorm, as_islands
from collogue.errors import CollogueError
from collogue.testing.compare import compare
from collogue.testing.inputs import make_inputs, make_partials, make_prologue
from collogue.testing.oracle import by_rank, by_reference, by_scalar

BF16, F16, F32 = torch.bfloat16, torch.float16, torch.float32


def wrong(actual: Output, expected: Output) -> list[str]:
    return [f"{name}: {d.first}" for name, d in compare(actual, expected).items() if d.count] + [
        "outputs" for _ in "x" if [n for n, _ in actual.items()] != [n for n, _ in expected.items()]
    ]


def check(
    comm: collogue.Communicator,
    islands: Sequence[Sequence[int]] | None,
    tokens: int,
    *,
    kind: str = "order",
    quant: Quant | None = None,
    norm: bool = True,
    residual: bool = True,
    rows: Sequence[int] | None = None,
    seed: int = 0,
    width: int = HIDDEN_SIZE,
) -> list[str]:
    """Every operation once, with the same arguments; what differs from the scalar version, or, on GPUs, from the reference there."""
    shape: dict[str, Any] = {"tokens": tokens, "hidden_size": width, "dtype": comm.dtype, "seed": seed, "device": comm.device}
    made, partials = make_inputs(kind, rank=comm.rank, **shape), make_partials(kind, comm.world_size, **shape)
    stream, weight = made.residual if residual else None, RMSNorm(made.weight) if norm else None
    keep = weight is not None and quant is not None
    epilogue = {"norm": weight, "quant": quant, "keep_norm": keep}
    oracle = functools.partial(by_scalar if comm.device.type == "cpu" else by_reference, islands=islands)

    def expected(operation: Any, split: Sequence[int] | None = None) -> Output:
        return by_rank(oracle, operation, partials, stream, weight, quant, keep, split)[comm.rank]

    found = wrong(comm.all_reduce(partials[comm.rank], residual=stream, **epilogue), expected("all_reduce"))
    mine = None if stream is None else comm.shard(stream, rows=rows)
    half = comm.reduce_scatter(partials[comm.rank], residual=mine, rows=rows, **epilogue)
    found += wrong(half, expected("reduce_scatter", rows))
    if weight is not None or quant is not None:
        sharded = comm.all_reduce(partials[comm.rank], residual=mine, sharded=True, rows=rows, **epilogue)
        found += wrong(sharded, expected("sharded", rows))
    found += wrong(comm.all_gather(half, tokens, quant=quant, rows=rows), expected("all_reduce"))
    if stream is not None:  # in place, and into the caller's tensors
        out = comm.empty(tokens, residual=True, norm=weight, quant=quant, keep_norm=keep, hidden_size=width)
        own = stream.clone()
        comm.all_reduce(partials[comm.rank], residual=own, out=replace(out, residual=own), **epilogue)
        found += wrong(replace(out, residual=own), expected("all_reduce"))
    return [f"{comm} {tokens} x {width} {quant} rows={rows}: {text}" for text in found]


def check_experts(comm: collogue.Communicator, islands: Sequence[Sequence[int]] | None) -> list[str]:
    """Prologues, and a norm of the sum."""
    found = []
    shape: dict[str, Any] = {"tokens": 5, "hidden_size": HIDDEN_SIZE, "dtype": comm.dtype, "device": comm.device}
    made = make_inputs("normal", rank=0, **shape)
    for form in (PrologueForm("expert_combine", "float32", shared=True), PrologueForm("expert_reduce", "value", shared=True)):
        terms = [make_prologue(form, "normal", rank=rank, count=3, **shape) for rank in range(comm.world_size)]
        more: dict[str, Any] = {"norm": RMSNorm(made.weight, 1e-5), "branch_norm": RMSNorm(made.weight.float(), 1e-4, 1.0)}
        out = comm.all_reduce(terms[comm.rank], residual=made.residual, **more)
        found += wrong(out, reference.all_reduce(terms, residual=made.residual, islands=islands, **more))
        half = comm.reduce_scatter(terms[comm.rank], residual=comm.shard(made.residual), **more)
        found += wrong(half, reference.reduce_scatter(terms, residual=made.residual, islands=islands, **more)[comm.rank])
    return found


def check_wire(comm: collogue.Communicator, tokens: int) -> list[str]:
    """Terms in the format of ``comm``'s wire, in every operation that sums: what differs from the reference."""
    wire, width, device = comm._capacity.wire, comm.hidden_size, comm.device
    partials = [wild(tokens, width, seed=s, dtype=comm.dtype).to(device) for s in range(comm.world_size)]
    whole, weight = (wild(*shape, seed=9, dtype=comm.dtype).to(device) for shape in ((tokens, width), (width,)))
    epilogue: dict[str, Any] = {"norm": RMSNorm(weight), "quant": NVFP4(3.0), "keep_norm": True}
    given: dict[str, Any] = {"residual": whole, **epilogue, "islands": comm.islands, "wire": wire}
    mine, own = comm.shard(whole), partials[comm.rank]
    found = wrong(comm.all_reduce(own, residual=whole, **epilogue), reference.all_reduce(partials, **given))
    found += wrong(comm.all_reduce(own), reference.all_reduce(partials, islands=comm.islands, wire=wire))
    found += wrong(comm.all_reduce(own, residual=mine, sharded=True, **epilogue), reference.sharded(partials, **given)[comm.rank])
    found += wrong(comm.reduce_scatter(own, residual=mine, **epilogue), reference.reduce_scatter(partials, **given)[comm.rank])
    return [f"{comm} {tokens} {wire}: {text}" for text in found]


def on_hosts(group: dist.ProcessGroup, tell: Any, sizes: Sequence[int], device: str = "cpu") -> list[str]:
    """One rank of islands of so many processes, hosts told apart by the environment: every operation and format, both ways.

    On GPUs with ``transport="host"``, as they may reach each other.
    """
    rank = dist.get_rank(group)
    where: dict[str, Any] = {"device": device, "timeout": 20, "transport": "host"}
    os.environ["COLLOGUE_HOST"] = f"host {next(i for i in range(len(sizes)) if rank < sum(sizes[: i + 1]))}"
    islands = [list(range(sum(sizes[:i]), sum(sizes[: i + 1]))) for i in range(len(sizes))]
    found: list[str] = []
    uneven = [(r * 2) % 3 for r in range(sum(sizes))]
    for algorithm in ("one_shot", "two_shot"):
        with communicator(group, algorithm=algorithm, max_tokens=16, **where) as comm:
            assert comm.islands == as_islands(islands, sum(sizes))
            for quant in (None, *every_format(device=device)):
                tell(f"{algorithm} {quant}")
                found += check(comm, islands, 5, quant=quant)
                found += check(comm, islands, sum(uneven), quant=quant, rows=uneven, kind="normal")
            found += check(comm, islands, 1, norm=False, residual=False, seed=1)
            found += check_experts(comm, islands)
        for dtype in (F16, F32):
            with communicator(group, algorithm=algorithm, dtype=dtype, **where) as comm:
                found += check(comm, islands, 7, kind="subnormal") + check(comm, islands, MAX_TOKENS, kind="zeros", residual=False)
    with communicator(group, order="rank", **where) as comm:
        found += check(comm, None, 5)
        assert "added in rank order" in " ".join(str(comm.explain(4)).split()) or len(sizes) == 1
    return found


def dying(group: dist.ProcessGroup, tell: Any, sizes: Sequence[int], victim: int) -> tuple[str, str, float] | None:
    """Islands of so many processes; ``victim`` ends in a call whose rows go by owners."""
    rank = dist.get_rank(group)
    os.environ["COLLOGUE_HOST"] = f"host {next(i for i in range(len(sizes)) if rank < sum(sizes[: i + 1]))}"
    comm = communicator(group, algorithm="two_shot", timeout=2)
    partial = torch.ones(4, HIDDEN_SIZE, dtype=BF16)
    comm.all_reduce(partial)
    if rank == victim:
        rows: Any = comm._engine._rows  # type: ignore[union-attr]
        swap = rows._swap
        rows._swap = lambda what, *rest: os._exit(3) if "between" in what else swap(what, *rest)
    begin = time.monotonic()
    try:
        comm.all_reduce(partial)
    except CollogueError as error:
        return type(error).__name__, str(error), time.monotonic() - begin
    return "", "", time.monotonic() - begin

"""Padding of scales that an earlier call has written, and one-shot of many rows, on virtual ranks: eager and from graphs, bit for bit."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

import collogue
from collogue import Output, RMSNorm
from collogue.contract.formats import scale_storage
from collogue.contract.quant import parse
from collogue.testing import VirtualGroup, run_virtual
from collogue.testing.compare import compare, differing
from collogue.testing.inputs import make_inputs

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU"), pytest.mark.timeout(300)]

WIDTH, POISON = 2880, 0xEE
LABELS = ("nvfp4/128x4", "nvfp4/8x4", "mxfp8/ceil/128x4", "fp8_group16/float32/column", "fp8_group32/ue8m0/column", "fp8_per_token")


def equal(actual: Output, expected: Output) -> None:
    assert not differing(compare(actual, expected)), compare(actual, expected)


@pytest.mark.parametrize("world", [1, 2])
@pytest.mark.parametrize("label", LABELS)
@pytest.mark.parametrize("tokens", [1, 5, 130])
def test_padding_is_left_as_it_is(tokens: int, label: str, world: int) -> None:
    """By every operation: not one byte of it is written, all others are, also by calls that are bound and by graphs."""
    quant = parse(label, global_scale=37.5, static_scale=0.02)

    def rank(group: VirtualGroup) -> None:
        comm = collogue.Communicator(group, max_tokens=tokens, hidden_size=WIDTH, table=False)
        mine, first = (
            make_inputs("normal", tokens=tokens, hidden_size=WIDTH, dtype=torch.bfloat16, rank=r, seed=3) for r in (group.rank, 0)
        )
        assert first.residual is not None
        partial, residual, norm = mine.partial.cuda(), first.residual.cuda(), RMSNorm(first.weight.cuda())
        whole = {"norm": norm, "quant": quant}
        for operation in ("all_reduce", "sharded", "reduce_scatter", "finish"):
            comm.prepare(tokens, **whole, residual=operation != "finish", operation=operation)  # type: ignore[arg-type]
        comm.prepare(tokens, quant=quant, operation="all_gather")
        group.settle()
        shard = comm.reduce_scatter(partial, residual=comm.shard(residual), **whole)
        group.settle()
        calls: dict[str, Callable[..., Output]] = {
            "all_reduce": lambda **more: comm.all_reduce(partial, residual=residual, **whole, **more),
            "sharded": lambda **more: comm.all_reduce(partial, residual=comm.shard(residual), sharded=True, **whole, **more),
            "reduce_scatter": lambda **more: comm.reduce_scatter(partial, residual=comm.shard(residual), **whole, **more),
            "all_gather": lambda **more: comm.all_gather(shard, tokens, quant=quant, **more),
            "finish": lambda **more: comm.finish(partial, **whole, **more),
        }
        for name, call in calls.items():
            if (world, name) == (1, "all_gather"):
                continue  # a copy, padding and all
            right, out, ones = call(), call(), call()
            group.settle()
            # What is padding: bytes that a call leaves alone, whatever they are.
            for tensors, byte in ((out, POISON), (ones, 0xFF)):
                for tensor in dict(tensors.items()).values():
                    (scale_storage(tensor) if tensor is tensors.scales else tensor.view(torch.uint8)).fill_(byte)
            group.settle()
            for _ in range(2):  # the second is bound
                call(out=out, write_padding=False)
                call(out=ones, write_padding=False)
            group.settle()
            assert right.scales is not None
            assert out.scales is not None
            assert ones.scales is not None
            held, other, expected = (scale_storage(t.scales) for t in (out, ones, right))  # type: ignore[arg-type]
            padding = held != other
            assert bool((held[padding] == POISON).all())
            assert not bool(expected[padding].any())
            held[padding] = 0
            equal(out, right)
            graph = torch.cuda.CUDAGraph()
            for turn in range(world):  # capturing waits for the GPU: one rank at a time
                if turn == group.rank:
                    with torch.cuda.graph(graph, stream=torch.cuda.current_stream(), capture_error_mode="thread_local"):
                        call(out=out, write_padding=False)
                group.settle()
            held.fill_(POISON)
            group.settle()
            graph.replay()
            group.settle()
            assert bool((held[padding] == POISON).all())
            assert torch.equal(held[~padding], expected[~padding])
            del graph
            group.settle()
        comm.close()

    run_virtual(world, rank, device="cuda:0")


@pytest.mark.parametrize("label", ["none", "nvfp4/128x4", "fp8_per_token"])
@pytest.mark.parametrize("tokens", [35, 128, 300, 585])
def test_one_shot_of_many_rows(tokens: int, label: str) -> None:
    """One-shot of many rows: two-shot's bits, in calls of changing size behind each other."""
    quant = parse(label, global_scale=37.5, static_scale=0.02)

    def rank(group: VirtualGroup) -> None:
        ways = {
            algorithm: collogue.Communicator(group, max_tokens=585, hidden_size=7168, algorithm=algorithm, table=False)
            for algorithm in ("one_shot", "two_shot")
        }
        assert ways["one_shot"].explain(tokens, quant=quant).algorithm == "one_shot"
        for count in (tokens, 1, tokens - 1, tokens):
            mine, first = (
                make_inputs("normal", tokens=count, hidden_size=7168, dtype=torch.bfloat16, rank=r, seed=count) for r in (group.rank, 0)
            )
            assert first.residual is not None
            given = {"residual": first.residual.cuda(), "norm": RMSNorm(first.weight.cuda()), "quant": quant}
            outs = []
            for comm in ways.values():
                comm.prepare(count, norm=given["norm"], quant=quant)
                group.settle()
                outs.append(comm.all_reduce(mine.partial.cuda(), **given))
                group.settle()
                comm.check()
            equal(*outs)
        for comm in ways.values():
            comm.close()

    run_virtual(2, rank, device="cuda:0")

"""Operators, CUDA graphs and ``torch.compile`` on GPUs: one process for each, all scenarios in one set of processes."""

from __future__ import annotations

import random
import traceback
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist

import collogue
from collogue import FP8PerToken, Quant, RMSNorm, reference
from collogue.errors import CaptureError
from collogue.testing.compare import compare, differing
from collogue.testing.inputs import make_inputs, make_partials
from collogue.testing.processes import run_processes

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs"), pytest.mark.timeout(300)]

TOKENS, WIDTH, EPS = 8, 1024, 1e-5


def same(group: Any, out: collogue.Output, tokens: int, seed: int, quant: Quant | None) -> bool:
    """Whether ``out`` is the contract's answer to the inputs of this seed, bit for bit."""
    given = inputs(group, tokens, seed)
    shape = {"tokens": tokens, "hidden_size": WIDTH, "dtype": torch.bfloat16, "seed": seed, "device": "cuda"}
    partials = make_partials("normal", dist.get_world_size(group), **shape)
    return not differing(compare(out, reference.all_reduce(partials, residual=given["residual"], norm=given["norm"], quant=quant)))


def inputs(group: Any, tokens: int, seed: int) -> dict[str, Any]:
    shape = {"tokens": tokens, "hidden_size": WIDTH, "dtype": torch.bfloat16, "seed": seed, "device": "cuda"}
    made = make_inputs("normal", rank=dist.get_rank(group), **shape)
    return {"partial": made.partial, "residual": made.residual, "norm": RMSNorm(made.weight, EPS)}


def operators(group: Any, comm: collogue.Communicator) -> None:
    """opcheck on CUDA tensors; every rank makes the same calls."""
    given = inputs(group, 4, 0)
    for label in ("none", "fp8_per_token", "nvfp4/128x4"):
        arguments = (given["partial"], given["residual"], given["norm"].weight, EPS, 0.0, label, None, 1.0, 1e-6, False, comm.name)
        torch.library.opcheck(torch.ops.collogue.all_reduce.default, arguments)


def many_graphs(group: Any, comm: collogue.Communicator) -> None:
    """Twelve graphs of different calls, replayed in another order than captured, between eager calls; through the operator, too."""
    rng, quants = random.Random(0), (None, FP8PerToken(), collogue.NVFP4(400.0))
    shapes = [(rng.randint(1, TOKENS), rng.choice(quants)) for _ in range(12)]
    for tokens, quant in shapes:
        comm.prepare(tokens, norm=inputs(group, 1, 0)["norm"], quant=quant)
    static = [inputs(group, tokens, i) for i, (tokens, _) in enumerate(shapes)]
    graphs, outs = [], []
    for i, ((_, quant), given) in enumerate(zip(shapes, static, strict=True)):
        graph = torch.cuda.CUDAGraph()
        torch.cuda.synchronize()
        with torch.cuda.graph(graph, capture_error_mode="thread_local"):
            if i % 2:
                outs.append(comm.all_reduce(**given, quant=quant))
            else:
                outs.append(collogue.ops.call(comm.name, "all_reduce", given["partial"], given["residual"], given["norm"], quant, False))
        graphs.append(graph)
    order = [rng.randrange(len(graphs)) for _ in range(60)]
    kept = []
    for step, i in enumerate(order):
        (tokens, quant), fresh = shapes[i], inputs(group, shapes[i][0], 100 + step)
        static[i]["partial"].copy_(fresh["partial"])
        static[i]["residual"].copy_(fresh["residual"])
        static[i]["norm"].weight.copy_(fresh["norm"].weight)
        torch.cuda.synchronize()  # weights must not be written just before a call
        graphs[i].replay()
        kept.append((collogue.Output(**{name: t.clone() for name, t in outs[i].items()}), tokens, 100 + step, quant))
        if step % 3 == 0:
            given = inputs(group, TOKENS, 500 + step)
            kept.append((comm.all_reduce(**given), TOKENS, 500 + step, None))
    torch.cuda.synchronize()
    comm.check()
    assert all(same(group, *k) for k in kept)


def refused(group: Any, comm: collogue.Communicator) -> None:
    """What meets other ranks on the host is refused under capture, and the communicator works afterwards."""
    x = torch.ones(1, device="cuda")
    for action in (lambda: comm.prepare(1), comm.reset, comm.close):
        graph = torch.cuda.CUDAGraph()
        torch.cuda.synchronize()
        with torch.cuda.graph(graph, capture_error_mode="thread_local"):
            x.add_(1)
            with pytest.raises(CaptureError, match="under graph capture"):
                action()
    assert same(group, comm.all_reduce(**inputs(group, 3, 7)), 3, 7, None)


def reduce_overhead(group: Any, comm: collogue.Communicator) -> None:
    """``torch.compile(mode="reduce-overhead")`` around eager-style calls."""

    def step(partial: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor) -> Any:
        first = comm.all_reduce(partial * 1, residual=residual, norm=RMSNorm(weight, EPS))
        return comm.all_reduce(partial * 1, residual=residual, norm=RMSNorm(weight, EPS), quant=FP8PerToken()), first.norm + 0

    compiled = torch.compile(step, mode="reduce-overhead", fullgraph=True)
    for seed in range(6):
        given = inputs(group, TOKENS, seed)
        torch.compiler.cudagraph_mark_step_begin()
        out, _ = compiled(given["partial"], given["residual"], given["norm"].weight)
        assert same(group, out, TOKENS, seed, FP8PerToken()), seed
    torch.cuda.synchronize()
    comm.check()


def fused(group: Any, comm: collogue.Communicator) -> None:
    """The fusion pass, with and without CUDA graphs."""

    def model(partial: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor) -> Any:
        partial = partial * 1
        dist.all_reduce(partial, group=group)
        y = partial + residual
        return y, torch.nn.functional.rms_norm(y, (WIDTH,), weight, EPS)

    for mode in (None, "reduce-overhead"):
        torch._dynamo.reset()
        collogue.compile.report().clear()
        compiled = collogue.compile(model, mode=mode, fullgraph=True, options={"fx_graph_cache": False})
        with torch._functorch.config.patch(enable_autograd_cache=False):
            for seed in range(5):
                given = inputs(group, TOKENS, seed)
                torch.compiler.cudagraph_mark_step_begin()
                y, n = compiled(given["partial"], given["residual"], given["norm"].weight)
                assert same(group, collogue.Output(residual=y, norm=n), TOKENS, seed, None), (mode, seed)
        assert len(collogue.compile.report().fused) == 1, str(collogue.compile.report())
    comm.check()


def hugging_face(group: Any, comm: collogue.Communicator) -> None:
    """A sharded transformers model on GPUs, eager and compiled, against the unsharded one."""
    import copy

    import transformers

    torch.manual_seed(0)
    config = transformers.Qwen3Config(
        hidden_size=512, intermediate_size=1024, num_hidden_layers=4, num_attention_heads=8, num_key_value_heads=4, vocab_size=1024
    )
    whole = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    tokens = torch.randint(0, 1024, (2, 16))
    expected = whole(tokens).logits
    part = collogue.parallelize(copy.deepcopy(whole), group, max_tokens=64)
    logits = part(tokens.cuda(), use_cache=False).logits
    torch.testing.assert_close(logits.cpu(), expected, rtol=1e-3, atol=1e-3)
    plain = collogue.parallelize(copy.deepcopy(whole), group, max_tokens=64, fuse=False)
    collogue.compile.report().clear()
    with torch._functorch.config.patch(enable_autograd_cache=False):
        compiled = collogue.compile(plain, fullgraph=True, options={"fx_graph_cache": False})
        torch.testing.assert_close(compiled(tokens.cuda(), use_cache=False).logits, logits, rtol=1e-3, atol=1e-3)
    assert (len(collogue.compile.report().fused), collogue.compile.report().missed) == (8, [])


SCENARIOS: dict[str, Callable[[Any, collogue.Communicator], None]] = {
    f.__name__: f for f in (operators, many_graphs, refused, reduce_overhead, fused, hugging_face)
}


def run_all(group: Any, tell: Callable[[str], None]) -> dict[str, str]:
    """The traceback of every scenario that failed on this rank."""
    failed = {}
    with torch.inference_mode(False), torch.no_grad():
        for name, scenario in SCENARIOS.items():
            tell(name)
            comm = collogue.Communicator(group, max_tokens=TOKENS, hidden_size=WIDTH, timeout=10.0)
            try:
                scenario(group, comm)
            except BaseException:
                failed[name] = traceback.format_exc()
            torch.cuda.synchronize()
            dist.barrier(group)
            if name not in failed:
                comm.close()
    return failed


@pytest.fixture(scope="module")
def failed() -> list[dict[str, str]]:
    return run_processes(2, run_all, device="cuda", silence=120.0)


@pytest.mark.parametrize("scenario", SCENARIOS)
def test_on_two_gpus(scenario: str, failed: list[dict[str, str]]) -> None:
    assert "\n".join(rank.get(scenario, "") for rank in failed).strip() == ""

"""SGLang's own layers on gloo ranks, stock and with Collogue's plugin: norms with all-reduce, and its groups' sums.

`python scripts/run_sglang.py`, in the environment of `SGLANG=1 scripts/setup_engines.sh`

SGLang's server needs a GPU; its process groups, its plugin loader with the hook registry and its norms do not. Each rank builds SGLang's
groups, loads the plugins as its scheduler does, runs the hooked step of the warm-up and then the layers. Results are compared with
Collogue's reference, bit for bit, and with stock SGLang's. Ends with 1 where something differs, and says what.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.metadata
import json
import os
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from vllm_ranks import run_ranks  # type: ignore[import-not-found]  # beside this file

from collogue import FP8Group, reference
from collogue.communicator import Communicator
from collogue.contract.spec import RMSNorm
from collogue.testing.inputs import make_inputs, make_partials

WIDTH, EPS = 512, 1e-5
#: Rows of the calls; the last is more than the communicators take.
TOKENS = (1, 5, 300, 513)
MOST = 512
_LIBRARY: Any = torch.library.Library("torchvision", "FRAGMENT")  # type: ignore[no-untyped-call]


def without_vision() -> None:
    """The names of two operators that torchvision's Python code looks up: its CPU build is not in every index, and nothing here sees."""
    for name in ("nms", "qnms"):
        _LIBRARY.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")


class Layers:
    """SGLang's layers of one rank, on its real groups."""

    def __init__(self, rank: int, world: int, port: int, dtype: torch.dtype) -> None:
        import sglang.srt.runtime_context as context
        from sglang.srt.distributed import parallel_state
        from sglang.srt.layers import flashinfer_comm_fusion
        from sglang.srt.layers.layernorm import GemmaRMSNorm, RMSNorm

        # For plain CUDA tensors SGLang calls this function itself, past its operator, which has no CPU form.
        operator = flashinfer_comm_fusion.flashinfer_allreduce_residual_rmsnorm
        flashinfer_comm_fusion.flashinfer_allreduce_residual_rmsnorm = operator.__wrapped__
        context.get_context().override_server_args(tp_size=world, device="cpu", chunked_prefill_size=MOST).install()
        parallel_state.init_distributed_environment(world, rank, f"tcp://127.0.0.1:{port}", rank, "gloo")
        context.get_parallel().override_permanently(tp_rank=rank, attn_tp_rank=rank, moe_tp_rank=rank)
        parallel_state.initialize_model_parallel(backend="gloo")
        self.group = context.get_parallel().tp_group
        self.rank, self.world, self.dtype = rank, world, dtype
        self.norm, self.gemma = RMSNorm(WIDTH, EPS).to(dtype), GemmaRMSNorm(WIDTH, EPS).to(dtype)

    def inputs(self, tokens: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """This rank's partial, the residual and the weight."""
        made = make_inputs("normal", rank=self.rank, tokens=tokens, hidden_size=WIDTH, dtype=self.dtype)
        return made.partial, made.residual, made.weight

    def give(self, weight: torch.Tensor) -> None:
        """Both norms get ``weight``."""
        with torch.no_grad():
            self.norm.weight.copy_(weight)
            self.gemma._weight_loader(self.gemma.weight, weight)

    def run(self, tokens: int) -> dict[str, tuple[torch.Tensor, ...]]:
        """What SGLang's decoder layers call, by names."""
        from sglang.srt.layers.layer_boundary.fusions import allreduce
        from sglang.srt.layers.layer_boundary.output import UnreducedOutput
        from sglang.srt.layers.moe import post_experts_reduction_group

        x, residual, weight = self.inputs(tokens)
        self.give(weight)
        done: dict[str, Any] = {
            "attention": self.norm.forward_with_allreduce_fusion(x.clone(), residual.clone(), use_attn_tp_group=True),
            "experts": self.norm.forward_with_allreduce_fusion(x.clone(), residual.clone(), use_attn_tp_group=False),
            "Gemma": self.gemma.forward_with_allreduce_fusion(x.clone(), residual.clone()),
        }
        plan = SimpleNamespace(norm=self.norm, fusions=None)
        owed = UnreducedOutput(partial=x.clone(), group=post_experts_reduction_group())
        done["into the attention"] = allreduce.fused_attn_input(
            plan, owed, residual.clone(), None, None, fuses_quant=False, keep_bf16=False
        )
        done["into the FFN"] = allreduce.fused_ffn_input(plan, x.clone(), residual.clone(), None)
        return {name: pair for name, pair in done.items() if pair is not None}

    def quantized(self, tokens: int, keep: bool) -> Any:
        """The norm with all-reduce and FP8 in groups of 128."""
        x, residual, _ = self.inputs(tokens)
        return self.norm.forward_with_allreduce_fusion_quant_per_group(x, residual, use_attn_tp_group=True, keep_bf16=keep)


def right(layers: Layers, tokens: int, quant: FP8Group | None = None, norm: bool = True, weight: torch.Tensor | None = None) -> Any:
    """The contract's result."""
    partials = make_partials("normal", layers.world, tokens=tokens, hidden_size=WIDTH, dtype=layers.dtype)
    _, residual, given = layers.inputs(tokens)
    if not norm:
        return reference.all_reduce(partials)
    weight = given if weight is None else weight
    return reference.all_reduce(partials, residual=residual, norm=RMSNorm(weight, EPS), quant=quant, keep_norm=quant is not None)


def rank_run(rank: int, world: int, dtype: torch.dtype) -> dict[str, Any]:
    """One rank: the layers before the plugin is loaded, and after it."""
    calls: list[int] = []
    whole = Communicator.all_reduce

    def counted(self: Communicator, partial: Any, **rest: Any) -> Any:
        calls.append(partial.shape[0])
        return whole(self, partial, **rest)

    Communicator.all_reduce = counted  # type: ignore[method-assign, assignment]
    layers = Layers(rank, world, int(os.environ["MASTER_PORT"]) + 1, dtype)
    wrong: list[str] = []
    with torch.no_grad():
        stock = {tokens: layers.run(tokens) for tokens in TOKENS}
        if calls:
            wrong.append(f"{len(calls)} calls of Collogue before its plugin")
        _load(layers, wrong)
        ours = {tokens: layers.run(tokens) for tokens in TOKENS}
        wrong += _compare(layers, stock, ours)
        if sorted(set(calls)) != [*TOKENS[:-1]] or len(calls) != 5 * (len(TOKENS) - 1):
            wrong.append(f"calls of Collogue of {calls} rows")
        wrong += _others(layers)
        wrong += _compiled(layers)
        from sglang.srt.layers import flashinfer_comm_fusion
        from sglang.srt.layers.layer_boundary import exit as exits

        flashinfer_comm_fusion.cleanup_flashinfer_workspace()
        if exits.flashinfer_ar_fusion_applies(1):
            wrong.append("fusion applies after the clean-up")
    return {"wrong": wrong, "calls": len(calls)}


def _load(layers: Layers, wrong: list[str]) -> None:
    """The plugins by SGLang's own loader, and the step of its warm-up."""
    from sglang.srt import plugins
    from sglang.srt.layers.layer_boundary import exit as exits
    from sglang.srt.layers.layer_boundary.fusions import allreduce
    from sglang.srt.model_executor.runner.base_runner import BaseRunner

    os.environ["COLLOGUE_SGLANG"] = "1"
    plugins.load_plugins()
    if allreduce.flashinfer_ar_fusion_applies(1) or exits.flashinfer_ar_fusion_applies(1):
        wrong.append("fusion applies before the warm-up")
    model = SimpleNamespace(device="cpu", dtype=layers.dtype, model_config=SimpleNamespace(hidden_size=WIDTH))
    BaseRunner._pre_initialize_flashinfer_allreduce_workspace(SimpleNamespace(model_runner=model))
    said = [exits.flashinfer_ar_fusion_applies(tokens) for tokens in (0, 1, MOST, MOST + 1)]
    if said != [False, True, True, False]:
        wrong.append(f"whether fusion applies to 0, 1, {MOST} and {MOST + 1} rows: {said}")


def _compare(layers: Layers, stock: dict[int, Any], ours: dict[int, Any]) -> list[str]:
    wrong = []
    near = 1e-5 if layers.dtype == torch.float32 else 0.05
    for tokens in TOKENS:
        fits = tokens <= MOST
        names = {"attention", "experts", "Gemma"} | ({"into the attention", "into the FFN"} if fits else set())
        if set(ours[tokens]) != names:
            wrong.append(f"{tokens} tokens: {sorted(ours[tokens])}, expected {sorted(names)}")
        for name, (norm, stream) in ours[tokens].items():
            weight = layers.gemma.gemma_weight if name == "Gemma" else None
            answer = right(layers, tokens, weight=None if weight is None else _gemma(layers, tokens))
            exact = torch.equal(norm, answer.norm) and torch.equal(stream, answer.residual)
            theirs = stock[tokens].get(name, stock[tokens]["attention"])
            close = all(torch.allclose(a.float(), b.float(), rtol=near, atol=near) for a, b in zip((norm, stream), theirs, strict=True))
            if (fits and not exact) or not close:
                wrong.append(f"{name} at {tokens} tokens: equal to the reference: {exact}, near stock: {close}")
    return wrong


def _gemma(layers: Layers, tokens: int) -> torch.Tensor:
    """What Gemma's norm multiplies by: one more than its weight, in the weight's dtype."""
    return layers.inputs(tokens)[2] + 1.0


def _others(layers: Layers) -> list[str]:
    """The quantized form, and the plain sum of a group."""
    wrong = []
    for tokens in TOKENS[:-1]:
        layers.give(layers.inputs(tokens)[2])
        answer = right(layers, tokens, FP8Group(128, "float32", "column", smallest=1e-10 / 448))
        (codes, scales), stream = layers.quantized(tokens, False)
        (norm, codes_again, scales_again), _ = layers.quantized(tokens, True)
        pairs = [(codes, answer.codes), (scales, answer.scales), (stream, answer.residual), (norm, answer.norm)]
        pairs += [(codes_again, answer.codes), (scales_again, answer.scales)]
        for i, (a, b) in enumerate(pairs):
            if a.dtype != b.dtype or a.stride() != b.stride() or not torch.equal(a.float(), b.float()):
                wrong.append(f"FP8 in groups at {tokens} tokens: output {i} differs")
        x = layers.inputs(tokens)[0]
        if not layers.group._can_use_flashinfer_allreduce(x):
            wrong.append(f"the plain sum of {tokens} tokens is not taken")
        elif not torch.equal(layers.group._flashinfer_allreduce(x), right(layers, tokens, norm=False).reduced):
            wrong.append(f"the plain sum of {tokens} tokens differs")
    if layers.quantized(TOKENS[-1], False) is not None or layers.group._can_use_flashinfer_allreduce(layers.inputs(TOKENS[-1])[0]):
        wrong.append("more rows than fit were taken")
    return wrong


def _compiled(layers: Layers) -> list[str]:
    """SGLang compiles pieces of its models: the hooks are traced."""
    x, residual, weight = layers.inputs(5)
    layers.give(weight)
    traced: Any = torch.compile(layers.norm.forward_with_allreduce_fusion, backend="eager", fullgraph=True)
    norm, stream = traced(x, residual)
    answer = right(layers, 5)
    return [] if torch.equal(norm, answer.norm) and torch.equal(stream, answer.residual) else ["the compiled call differs"]


def main() -> int:
    """Both dtypes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--world", type=int, default=2)
    parser.add_argument("--commit", default="", help="goes into the result")
    parser.add_argument("--json", type=Path)
    asked = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = "1"
    without_vision()
    importlib.import_module("sglang.srt.layers.layer_boundary")
    importlib.import_module("sglang.srt.model_executor.runner.base_runner")

    runs = {}
    for dtype in (torch.float32, torch.bfloat16):
        runs[str(dtype)] = run_ranks(asked.world, "", lambda rank, dtype=dtype: rank_run(rank, asked.world, dtype))
    wrong = [f"{dtype}, rank {i}: {text}" for dtype, ranks in runs.items() for i, rank in enumerate(ranks) for text in rank["wrong"]]
    result = {
        "commit": asked.commit,
        "sglang": importlib.metadata.version("sglang"),
        "case": f"layers, world {asked.world}, rows {TOKENS}, width {WIDTH}",
        "calls of a rank": {dtype: ranks[0]["calls"] for dtype, ranks in runs.items()},
        "wrong": wrong,
    }
    print(json.dumps(result, indent=1))
    if asked.json:
        asked.json.write_text(json.dumps(result, indent=1) + "\n")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())

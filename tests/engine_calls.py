"""What the engines' ranks do in `cpu/test_engines.py`: a plugin is loaded, then ``flashinfer.comm`` is called as the engine calls it.

The call patterns are those of vLLM 0.33 (its all-reduce fusion pass and its FlashInfer all-reduce) and SGLang 0.5.23 (its FlashInfer
fusion layer), written anew from their public sources: which group, which buffers are shared, which arguments.
"""

from __future__ import annotations

import inspect
import os
import sys
import tomllib
from importlib.metadata import EntryPoint
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
import torch.distributed as dist
from samples import same

import collogue.flashinfer
from collogue import reference
from collogue.contract.quant import NVFP4, FP8Static, Quant
from collogue.contract.spec import Output, RMSNorm
from collogue.formats import scale_storage
from collogue.testing.inputs import make_inputs, make_partials

ROOT = Path(__file__).resolve().parents[1]
WORLD, MAX_TOKENS, WIDTH, EPS = 2, 16, 64, 1e-5


def load_plugins(group: str) -> None:
    """As the engines do: every entry point of the group, loaded and called."""
    points = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["entry-points"][group]
    for name, value in points.items():
        EntryPoint(name, value, group).load()()


def given(rank: int, tokens: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    made = make_inputs("normal", rank=rank, tokens=tokens, hidden_size=WIDTH, dtype=torch.bfloat16)
    return made.partial, made.residual, made.weight


def right(tokens: int, *, residual: bool = True, quant: Quant | None = None, bias: float = 0.0) -> Output:
    partials = make_partials("normal", WORLD, tokens=tokens, hidden_size=WIDTH, dtype=torch.bfloat16)
    _, stream, weight = given(0, tokens)
    stream = stream if residual else torch.zeros_like(stream)
    return reference.all_reduce(partials, residual=stream, norm=RMSNorm(weight, EPS, bias), quant=quant)


def summed(tokens: int) -> torch.Tensor:
    made = reference.all_reduce(make_partials("normal", WORLD, tokens=tokens, hidden_size=WIDTH, dtype=torch.bfloat16)).reduced
    assert made is not None
    return made


# vLLM


def vllm_rank(group: dist.ProcessGroup, tell: Any, path: str) -> list[str]:
    """One worker: the plugin, the workspace of the fusion pass, its fused calls, and the all-reduce of its communicator."""
    sys.path.insert(0, path)
    import flashinfer.comm as comm  # imported first, as the pass does
    from flashinfer.comm.mnnvl import TorchDistBackend

    os.environ["COLLOGUE_VLLM"] = "flashinfer"
    load_plugins("vllm.general_plugins")
    load_plugins("vllm.general_plugins")
    rank, wrong = dist.get_rank(group), []

    def workspace_of(backend: str) -> Any:
        return comm.create_allreduce_fusion_workspace(
            backend=backend,
            world_size=WORLD,
            rank=rank,
            max_token_num=MAX_TOKENS,
            hidden_dim=WIDTH,
            dtype=torch.bfloat16,
            comm_backend=TorchDistBackend(group=group),
            group=group,
        )

    tell("workspace")
    workspace = workspace_of("mnnvl")
    if not getattr(workspace, "mc_ptr", 0):  # no multicast: vLLM takes the other backend
        workspace.destroy()
        workspace = workspace_of("trtllm")

    def fused(pattern: int, x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, **more: Any) -> torch.Tensor:
        """The custom op: without ``norm_out`` in place, with it the stream goes over the input."""
        norm_out = more.pop("norm_out", None)
        residual_out = residual if norm_out is None else x
        norm_out = x if norm_out is None else norm_out
        outputs = {"quant_out": None, "scale_out": None, "scale_factor": None} | more
        comm.allreduce_fusion(
            input=x,
            workspace=workspace,
            pattern=pattern,
            launch_with_pdl=True,
            output=None,
            residual_out=residual_out,
            norm_out=norm_out,
            residual_in=residual,
            rms_gamma=weight,
            rms_eps=EPS,
            layout_code=comm.QuantizationSFLayout.SWIZZLED_128x4,
            use_oneshot=True,
            fp32_acc=True,
            trigger_completion_at_end=True,
            **{"weight_bias": 0.0} | outputs,
        )
        return norm_out

    def expect(what: str, *pairs: tuple[torch.Tensor, torch.Tensor | None]) -> None:
        wrong.extend(f"{what}, output {i}" for i, (a, b) in enumerate(pairs) if not same(a, b))

    codes = collogue.flashinfer.AllReduceFusionPattern
    for tokens in (1, 5, MAX_TOKENS):
        tell(f"{tokens} tokens")
        x, residual, weight = given(rank, tokens)
        answer = right(tokens)
        norm = fused(codes.kARResidualRMSNorm, x, residual, weight)
        expect("in place", (norm, answer.norm), (residual, answer.residual))

        x, _, weight = given(rank, tokens)
        answer, norm = right(tokens, residual=False, bias=1.0), torch.empty_like(x)
        fused(codes.kARResidualRMSNorm, x, torch.zeros_like(x), weight, norm_out=norm, weight_bias=1.0)
        expect("first layer, Gemma", (norm, answer.norm), (x, answer.residual))

        x, residual, weight = given(rank, tokens)
        scale = torch.tensor([0.0112])
        answer, quantized = right(tokens, quant=FP8Static(scale)), torch.empty(tokens, WIDTH, dtype=torch.float8_e4m3fn)
        fused(codes.kARResidualRMSNormFP8Quant, x, residual, weight, quant_out=quantized, scale_factor=scale)
        expect("FP8", (quantized, answer.codes), (residual, answer.residual), (x, given(rank, tokens)[0]))

        x, _, weight = given(rank, tokens)
        multiplier = torch.tensor([[500.0]])
        answer = right(tokens, residual=False, quant=NVFP4(multiplier))
        assert answer.scales is not None
        packed, scales = torch.empty(tokens, WIDTH // 2, dtype=torch.uint8), torch.empty(128, WIDTH // 64, dtype=torch.int32)
        fused(
            codes.kARResidualRMSNormFP4Quant,
            x,
            torch.zeros_like(x),
            weight,
            norm_out=torch.empty_like(x),
            quant_out=packed,
            scale_out=scales.view(torch.float8_e4m3fn),
            scale_factor=multiplier,
        )
        expect("NVFP4", (packed, answer.codes), (scales.view(-1).view(torch.uint8), scale_storage(answer.scales)), (x, answer.residual))

        x = given(rank, tokens)[0]
        assert workspace.is_buffer_size_sufficient(tp_size=WORLD, num_tokens=tokens, hidden_dim=WIDTH, dtype=x.dtype)
        expect("all-reduce", (comm.allreduce_fusion(x, workspace, comm.AllReduceFusionPattern.kAllReduce, True), summed(tokens)))
    assert not workspace.is_buffer_size_sufficient(tp_size=WORLD, num_tokens=MAX_TOKENS + 1, hidden_dim=WIDTH, dtype=torch.bfloat16)
    with pytest.raises(NotImplementedError):
        workspace.checkpoint_prepare()
    workspace.destroy()
    return wrong


# SGLang


def sglang_layer(comm: Any) -> ModuleType:
    """The engine's layer as it is when the plugins are loaded: imported, with the workspace function under its own name."""
    layer = ModuleType("sglang.srt.layers.flashinfer_comm_fusion")
    layer.__dict__["_create_allreduce_fusion_workspace"] = comm.create_allreduce_fusion_workspace
    sys.modules[layer.__name__] = layer
    return layer


def sglang_rank(group: dist.ProcessGroup, tell: Any, path: str) -> list[str]:
    """One scheduler: the plugin, a workspace on a sub-group, the fused norm, the plain all-reduce, a second workspace that is larger."""
    sys.path.insert(0, path)
    import flashinfer.comm as comm
    from flashinfer.comm.mnnvl import TorchDistBackend

    class Backend(TorchDistBackend):  # type: ignore[misc]
        def __init__(self, device_group: Any, cpu_group: Any) -> None:
            super().__init__(group=device_group)
            self.cpu_group = cpu_group

    layer: Any = sglang_layer(comm)
    os.environ["COLLOGUE_SGLANG"] = "flashinfer"
    load_plugins("sglang.srt.plugins")
    assert "trigger_completion_at_end" in inspect.signature(comm.allreduce_fusion).parameters
    assert "group" in inspect.signature(layer._create_allreduce_fusion_workspace).parameters
    subgroup = dist.new_group([1, 2])
    if dist.get_rank(group) == 0:
        return []
    rank, wrong = dist.get_rank(subgroup), []
    for tokens, most in ((4, 4), (MAX_TOKENS, MAX_TOKENS)):
        tell(f"{tokens} tokens")
        workspace = layer._create_allreduce_fusion_workspace(
            backend="trtllm",
            world_size=WORLD,
            rank=rank,
            max_token_num=most,
            hidden_dim=WIDTH,
            dtype=torch.bfloat16,
            gpus_per_node=WORLD,
            comm_backend=Backend(device_group=subgroup, cpu_group=subgroup),
            group=subgroup,
        )
        assert workspace.backend == "trtllm"
        assert workspace.metadata["use_fp32_lamport"] is False
        assert "use_oneshot" in inspect.signature(workspace.is_buffer_size_sufficient).parameters
        assert workspace.is_buffer_size_sufficient(
            tp_size=WORLD, num_tokens=tokens, hidden_dim=WIDTH, dtype=torch.bfloat16, use_oneshot=None
        )
        x, residual, weight = given(rank, tokens)
        norm_out, residual_out, output = torch.empty_like(x), torch.empty_like(x), torch.empty_like(x)
        common = {"input": x, "workspace": workspace, "launch_with_pdl": True, "fp32_acc": True, "trigger_completion_at_end": False}
        comm.allreduce_fusion(
            pattern=comm.AllReduceFusionPattern.kARResidualRMSNorm,
            residual_out=residual_out,
            norm_out=norm_out,
            residual_in=residual,
            rms_gamma=weight,
            rms_eps=EPS,
            use_oneshot=None,
            **common,
        )
        comm.allreduce_fusion(pattern=comm.AllReduceFusionPattern.kAllReduce, output=output, **common)
        answer = right(tokens)
        pairs = {"norm": (norm_out, answer.norm), "residual": (residual_out, answer.residual), "sum": (output, summed(tokens))}
        wrong += [f"{name} at {tokens} tokens" for name, (a, b) in pairs.items() if not same(a, b)]
        workspace.destroy()
    return wrong

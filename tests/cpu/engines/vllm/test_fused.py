"""The fused operators of vLLM's graphs on real process groups: the contract's bits in vLLM's forms, and what tracing says of them."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from engine_calls import EPS, MAX_TOKENS, WORLD, given, right
from samples import same
from torch._subclasses.fake_tensor import FakeTensorMode

from collogue.contract.formats import scale_storage
from collogue.contract.spec import Output
from collogue.testing.processes import run_processes

pytestmark = pytest.mark.slow
LABELS = (
    "fp8_static",
    "fp8_per_token",
    "fp8_group32/float32/row",
    "fp8_group32/float32/column",
    "nvfp4/linear",
    "nvfp4/128x4",
    "mxfp8/ceil/linear",
    "mxfp8/ceil/128x4",
)
#: Shapes of the scales of 5 rows of 64, as vLLM has them.
SHAPES = ((), (5, 1), (5, 2), (5, 2), (5, 4), (128, 1), (5, 2), (512,))


def quantized_rank(group: dist.ProcessGroup, tell: Any) -> list[str]:
    """One worker: every format, within the communicator's capacity and beyond it, traced and run."""
    from collogue.engines.vllm import fused
    from collogue.engines.vllm.quantized import format_of

    def summed(x: torch.Tensor) -> torch.Tensor:
        dist.all_reduce(x, group=group)
        return x

    tensor_parallel = SimpleNamespace(unique_name="tp:0", cpu_group=group, all_reduce=summed)
    fused.get_tp_group = lambda: tensor_parallel
    wrong = []
    for label, shape in zip(LABELS, SHAPES, strict=True):
        tell(label)
        for tokens in (5, MAX_TOKENS + 3):
            x, residual, weight = given(dist.get_rank(group), tokens)
            scale = torch.tensor([0.0112]) if label == "fp8_static" else torch.tensor([500.0]) if label.startswith("nvfp4") else None
            arguments = (x, residual, weight, EPS, 0.0, "tp:0", MAX_TOKENS, label, scale, 1e-12, True)
            made = torch.ops.collogue_vllm.all_reduce_norm_quant.default(*arguments)
            answer = right(tokens, quant=format_of(label, scale, 1e-12))
            if tokens <= MAX_TOKENS and not _equal(made, answer):
                wrong.append(f"{label} at {tokens} tokens")
            if tokens == 5 and shape and tuple(made[2].shape) != shape:
                wrong.append(f"{label}: scales of {tuple(made[2].shape)}")
            with FakeTensorMode() as mode:
                fakes = [mode.from_tensor(each) if isinstance(each, torch.Tensor) else each for each in arguments]
                traced = torch.ops.collogue_vllm.all_reduce_norm_quant.default(*fakes)
            if [_form(each) for each in traced] != [_form(each) for each in made]:
                wrong.append(f"{label} at {tokens} tokens: {[*map(_form, made)]}, traced {[*map(_form, traced)]}")
    if dict(fused.counts)["fused"] != len(LABELS) or fused.counts["unfused"] != len(LABELS):
        wrong.append(f"counts {fused.counts}")
    return wrong


def _form(tensor: torch.Tensor) -> tuple[Any, ...]:
    return tuple(tensor.shape), tensor.stride(), tensor.dtype


def _equal(made: list[torch.Tensor], answer: Output) -> bool:
    """The stream, the codes and the norm, and the bytes of the scales that rows have."""
    if answer.scales is not None:
        memory = made[2].untyped_storage().nbytes() // made[2].element_size()
        ours, theirs = scale_storage(answer.scales), made[2].as_strided((memory,), (1,))
        if not torch.equal(ours, theirs.view(torch.uint8)[: len(ours)]):
            return False
    return same(made[0], answer.residual) and same(made[1], answer.codes) and same(made[-1], right(len(made[0])).norm)


def test_the_operator() -> None:
    assert run_processes(WORLD, quantized_rank, silence=100) == [[]] * WORLD

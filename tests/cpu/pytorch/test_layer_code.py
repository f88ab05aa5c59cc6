"""Code of one's own in a decoder layer, before ``collogue.parallelize``: found and named, or the unsharded model's numbers."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from models import small_model
from parallel_checks import check_refused, check_right, replace
from torch import nn
from transformers.models.llama import modeling_llama

from collogue.pytorch.layer_code import check_norm

EPS = torch.finfo(torch.float32).eps


@pytest.mark.parametrize("kind", ["LlamaMLP", "LlamaAttention", "LlamaDecoderLayer"])
def test_a_class_that_was_patched(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """``functools.wraps`` gives the patch the name and module of what it wraps."""
    forward = getattr(modeling_llama, kind).forward

    @functools.wraps(forward)
    def patch(*args: Any, **kwargs: Any) -> Any:
        return forward(*args, **kwargs)

    monkeypatch.setattr(getattr(modeling_llama, kind), "forward", patch)
    check_refused(small_model("llama"), rf"layers\.0\S* is a .*{kind} with a forward that is not transformers'")


class CallsOtherwise(modeling_llama.LlamaMLP):
    def __call__(self, x: torch.Tensor) -> Any:
        return super().__call__(x).tanh()


class AcrossHeads(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x / x.abs().amax((-1, -2), keepdim=True)


def _called_otherwise(model: Any) -> None:
    model.model.layers[1].mlp.__class__ = CallsOtherwise


def _a_function(model: Any) -> None:
    del model.model.layers[1].mlp.act_fn
    model.model.layers[1].mlp.act_fn = functools.partial(torch.softmax, dim=-1)


def _across_heads(model: Any) -> None:
    model.model.layers[1].self_attn.q_norm = AcrossHeads()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_called_otherwise, r"layers\.1\.mlp is a .*CallsOtherwise with a __call__ that is not transformers'"),
        (_a_function, r"layers\.1\.mlp\.act_fn is .*, not an activation known to act on each element alone"),
        (_across_heads, r"layers\.1\.self_attn\.q_norm is a .*AcrossHeads with a forward that is not transformers'"),
    ],
)
def test_parts_of_ones_own(change: Any, message: str) -> None:
    model = small_model("qwen3" if change is _across_heads else "llama")
    change(model)
    check_refused(model, message)


def test_a_layers_own_factor() -> None:
    model = small_model("granite", residual_multiplier=0.3)
    model.model.layers[0].residual_multiplier = 0.9
    check_right(model)


# ---- norms


class OwnNorm(nn.Module):
    """``name``: of its eps."""

    def __init__(self, norm: Any, name: str, eps: float) -> None:
        super().__init__()
        self.weight, self.name = norm.weight, name
        setattr(self, name, eps)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.weight * x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + getattr(self, self.name))


def _torch_norm(norm: Any) -> nn.Module:
    new = nn.RMSNorm(64)
    new.weight = norm.weight
    return new


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_eps_of_a_norm_is_seen(dtype: torch.dtype) -> None:
    """In values of its own size, as behind small embeddings."""
    for wrap in (lambda norm: OwnNorm(norm, "epsilon", 1e-3), _torch_norm):
        model = replace(small_model("llama"), wrap, "layernorm").to(dtype)
        for layer in model.model.layers:
            assert check_norm(layer.input_layernorm, "norm")[0] == (1e-3 if wrap is not _torch_norm else EPS)
    model = replace(small_model("llama"), _torch_norm, "layernorm")
    check_right(model)


def test_a_norm_whose_eps_is_not_found() -> None:
    odd = replace(small_model("llama"), lambda norm: OwnNorm(norm, "tiny", 1e-6), "1.input_layernorm")
    check_refused(odd, "is a OwnNorm without variance_epsilon, eps or epsilon: its eps is not known")
    odd.model.layers[1].input_layernorm.eps = 1e-8
    check_refused(odd, "OwnNorm is not an RMSNorm that Collogue knows")

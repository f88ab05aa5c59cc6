"""``collogue.parallelize``: a Hugging Face decoder, cut by rank, with every layer boundary in one fused call."""

from __future__ import annotations

import fnmatch
import functools
from typing import Any

import torch
from torch import Tensor, nn

from collogue.communicator import Communicator
from collogue.contract import reference
from collogue.contract.spec import RMSNorm
from collogue.errors import ArgumentError
from collogue.pytorch.nn import ColumnParallelLinear, FusedRMSNorm, RowParallelLinear, finish

#: ``model_type`` of the decoders whose layers have one of the two forms below. Other models may share names and yet differ
#: (a factor on the residual, attention beside the MLP), so nothing is guessed.
TWO_NORMS = ("llama", "mistral", "qwen2", "qwen3", "smollm3", "gemma")
FOUR_NORMS = ("gemma2", "gemma3_text")

#: For models without a plan of their own.
PLAN = {
    "layers.*.self_attn.[qkv]_proj": "colwise",
    "layers.*.self_attn.o_proj": "rowwise",
    "layers.*.mlp.gate_proj": "colwise",
    "layers.*.mlp.up_proj": "colwise",
    "layers.*.mlp.down_proj": "rowwise",
}


def parallelize(
    model: Any,
    group: Any,
    *,
    max_tokens: int = 4096,
    device: torch.device | str | None = None,
    timeout: float = 30.0,
    fuse: bool = True,
) -> Any:
    """Cut a transformers decoder among the ranks of ``group``, and end attention and MLP of every layer in one fused call each.

    ``y = sum of partials + residual; n = norm(y)``, where ``norm`` is the layer's next one, that of the next layer, or the last.

    Args:
        model: ``AutoModelForCausalLM`` of type Llama, Mistral, Qwen2, Qwen3, SmolLM (Llama), SmolLM3, Gemma, Gemma 2 or
            Gemma 3 (text), or its base model; the same weights on every rank. Changed in place, for inference: no gradients.
        group: the tensor-parallel process group. The plan is transformers' own (``base_model_tp_plan``) where there is one.
        max_tokens: most tokens (batch times sequence) of one forward pass.
        device: where this rank's part goes; default as for :class:`collogue.Communicator`.
        timeout: of the communicator, in seconds.
        fuse: ``False`` leaves norms and additions as they are and ends row-parallel layers in a functional all-reduce: a baseline,
            or something for :data:`collogue.compile`. Needs a ``torch.distributed`` group.
    Returns:
        ``model``; its communicator is ``model.comm``, which stays open as long as the model is used.
    Order and rounding:
        Sums and norms follow docs/contract.md, so logits differ from the unsharded model's by roundings, and are the same
        on every rank.
    Synchronisation:
        Collective; so is every forward pass afterwards.
    Raises:
        ArgumentError: a model of another type, or a plan with other styles. ShapeError: heads or features that do not divide.
    """
    base = getattr(model, model.base_model_prefix, model)
    kind, config = str(base.config.model_type), base.config
    if kind not in TWO_NORMS + FOUR_NORMS:
        raise ArgumentError(
            f"models of type {kind!r} are not known to parallelize",
            hint=f"use one of {', '.join(TWO_NORMS + FOUR_NORMS)}, or collogue.compile on a model that is tensor-parallel already",
        )
    comm = Communicator(group, max_tokens=max_tokens, hidden_size=config.hidden_size, dtype=base.dtype, device=device, timeout=timeout)
    if config.num_key_value_heads % comm.world_size or config.num_attention_heads % comm.world_size:
        comm.close()
        raise ArgumentError(
            f"{config.num_attention_heads} heads and {config.num_key_value_heads} key-value heads do not divide among "
            f"{comm.world_size} ranks",
            hint="use a world size that divides both",
        )
    _cut(base, getattr(config, "base_model_tp_plan", None) or PLAN, comm, fuse)
    if model is not base and isinstance(getattr(model, "lm_head", None), nn.Linear) and config.vocab_size % comm.world_size == 0:
        model.lm_head = ColumnParallelLinear.of(model.lm_head, comm, gather=True)
    if fuse:
        _fuse(base, comm, FOUR_NORMS if kind in FOUR_NORMS else TWO_NORMS)
    model.comm = comm
    return model.to(comm.device).requires_grad_(False).eval()


def _cut(base: nn.Module, plan: dict[str, str], comm: Communicator, fuse: bool) -> None:
    """Replace every linear layer that the plan names by this rank's part."""
    for name, module in list(base.named_modules()):
        style = next((style for pattern, style in plan.items() if fnmatch.fnmatchcase(name, pattern)), None)
        if style is None or style.startswith("replicated") or not isinstance(module, nn.Linear):
            continue
        if style == "colwise":
            part: nn.Module = ColumnParallelLinear.of(module, comm)
        elif style == "rowwise":
            part = _Row(RowParallelLinear.of(module, comm), fuse)
        else:
            raise ArgumentError(f"the model's plan cuts {name} by {style!r}", hint="colwise and rowwise are supported")
        base.set_submodule(name, part)


class _Row(nn.Module):
    """A row-parallel layer inside a model's own code: it returns its partial, which the layer's boundary finishes, or the plain sum."""

    def __init__(self, linear: RowParallelLinear, fuse: bool) -> None:
        super().__init__()
        self.linear, self.fuse = linear, fuse

    def forward(self, x: Tensor) -> Tensor:
        partial = self.linear.partial(x)
        if self.fuse:
            return partial
        from torch.distributed._functional_collectives import all_reduce

        group: Any = self.linear.comm.group_name
        summed: Tensor = all_reduce(partial, "sum", group)
        return summed


def _fuse(base: Any, comm: Communicator, form: tuple[str, ...]) -> None:
    """Norms become ones that take handed-over results; every decoder layer gets a forward pass that hands over."""
    layers, forward = list(base.layers), _two_norms if form is TWO_NORMS else _four_norms
    for layer in layers:
        layer.input_layernorm = _fused_norm(layer.input_layernorm, comm)
        layer.post_attention_layernorm = _fused_norm(layer.post_attention_layernorm, comm)
        if form is FOUR_NORMS:
            layer.post_feedforward_layernorm = _fused_norm(layer.post_feedforward_layernorm, comm)
    base.norm = _fused_norm(base.norm, comm)
    following = [layer.input_layernorm for layer in layers[1:]] + [base.norm]
    for layer, norm in zip(layers, following, strict=True):
        layer.forward = functools.partial(forward, layer, comm, norm)


def _two_norms(layer: Any, comm: Communicator, next_norm: FusedRMSNorm, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """A layer whose branches are added to the stream as they are: the norm of each boundary is the one that reads the new stream."""
    attention, _ = layer.self_attn(layer.input_layernorm(hidden_states), *args, **kwargs)
    middle = finish(comm, attention, residual=hidden_states, norm=layer.post_attention_layernorm)
    out = finish(comm, layer.mlp(middle.norm), residual=middle.residual, norm=next_norm, hand_over=True)
    assert out.residual is not None
    return out.residual


def _four_norms(layer: Any, comm: Communicator, next_norm: FusedRMSNorm, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """A layer whose branches are normed before they are added: the sum and that norm are one call, the addition follows."""
    attention, _ = layer.self_attn(layer.input_layernorm(hidden_states), *args, **kwargs)
    first = finish(comm, attention, norm=layer.post_attention_layernorm).norm
    assert first is not None
    stream = hidden_states + first
    mlp = layer.mlp(layer.pre_feedforward_layernorm(stream))
    second = finish(comm, mlp, norm=layer.post_feedforward_layernorm).norm
    assert second is not None
    return stream + second


def _fused_norm(module: Any, comm: Communicator) -> FusedRMSNorm:
    """``module`` as a :class:`FusedRMSNorm`. What it computes is tried on a row, which also tells the offset of its weight."""
    weight: Tensor = module.weight.detach()
    eps = float(getattr(module, "variance_epsilon", getattr(module, "eps", 0.0)))
    probe = torch.linspace(-2.0, 3.0, len(weight), device=weight.device).to(weight.dtype)[None]
    found = module(probe).float()
    for offset in (0.0, 1.0):
        expected = reference.rms_norm(probe, RMSNorm(weight, eps, offset)).float()
        if torch.allclose(found, expected, rtol=4 * torch.finfo(weight.dtype).eps, atol=1e-5):
            return FusedRMSNorm(weight, comm, eps, offset)
    raise ArgumentError(f"{type(module).__name__} is not an RMSNorm that Collogue knows", hint="use collogue.compile instead")

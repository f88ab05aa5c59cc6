"""What :func:`collogue.parallelize` needs to know of a model before it changes anything: is it one of ours, and how is it cut?"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from collogue.contract import reference
from collogue.contract.spec import RMSNorm
from collogue.errors import ArgumentError, ShapeError
from collogue.pytorch.cut import Cut, Section
from collogue.pytorch.nn import check_linear, own_ways

#: ``model_type`` of the decoders whose layers have one of the two forms below. Other models may share names and yet differ
#: (a factor on the residual, attention beside the MLP), so nothing is guessed.
TWO_NORMS = ("llama", "mistral", "qwen2", "qwen3", "smollm3", "gemma")
FOUR_NORMS = ("gemma2", "gemma3_text")

#: The linear layers of a decoder layer, each with what its cut dimension counts, one word for each section.
COLUMNS = {
    "self_attn.q_proj": ("heads",),
    "self_attn.k_proj": ("key-value heads",),
    "self_attn.v_proj": ("key-value heads",),
    "mlp.gate_proj": ("features",),
    "mlp.up_proj": ("features",),
}
ROWS = {"self_attn.o_proj": ("heads",), "mlp.down_proj": ("features",)}
_NORMS = ("input_layernorm", "post_attention_layernorm")
_MORE_NORMS = ("post_feedforward_layernorm",)


@dataclass(frozen=True)
class LinearPlan:
    """One linear layer of the base model: ``nn.Linear``, or peft's LoRA around one."""

    name: str
    linear: nn.Module
    column: bool
    cut: Cut

    @property
    def lora(self) -> bool:
        """Whether it is peft's wrapper."""
        return not isinstance(self.linear, nn.Linear)


@dataclass(frozen=True)
class Decoder:
    """A model that can be cut. ``model`` holds ``base`` and maybe an ``lm_head``.

    ``norms``: eps and weight offset by name in ``base``.
    """

    model: Any
    base: Any
    four_norms: bool
    linears: tuple[LinearPlan, ...]
    norms: dict[str, tuple[float, float]]
    key_value_groups: int
    head: Cut | None

    @property
    def summary(self) -> str:
        """What ranks must agree on."""
        shapes = [(each.name, each.cut, tuple(p.shape for p in each.linear.parameters())) for each in self.linears]
        return repr((self.base.config.model_type, str(self.base.dtype), self.norms, self.head, shapes))


def plan(model: Any, world_size: int, *, fuse: bool) -> Decoder:
    """How ``model`` is cut among so many ranks. Changes nothing.

    Raises:
        ArgumentError: not a decoder that Collogue knows, or one whose layers are wrapped, quantized, hooked or patched.
        ShapeError: features that do not divide.
    """
    whole, base = _find(model)
    kind, config = str(base.config.model_type), base.config
    if getattr(whole, "_tp_size", None) is not None:
        raise ArgumentError("transformers has made the model tensor-parallel", hint="load it without tp_plan=, or use collogue.compile")
    queries, keys = int(config.num_attention_heads), int(config.num_key_value_heads)
    if queries % world_size or (keys % world_size and world_size % keys):
        raise ArgumentError(
            f"{queries} heads and {keys} key-value heads do not divide among {world_size} ranks",
            hint="use a world size that divides the heads, and divides the key-value heads or is a multiple of them",
        )
    linears: list[LinearPlan] = []
    norms: dict[str, tuple[float, float]] = {}
    for index, layer in enumerate(base.layers):
        _check_code(base, layer, f"layers.{index}", fuse)
        for name, counted in (COLUMNS | ROWS).items():
            linears.append(_linear(base, f"layers.{index}.{name}", name in COLUMNS, counted, keys, world_size))
        for name in (_NORMS + _MORE_NORMS if kind in FOUR_NORMS else _NORMS) if fuse else ():
            norms[f"layers.{index}.{name}"] = _norm(getattr(layer, name), f"layers.{index}.{name}")
    if fuse:
        norms["norm"] = _norm(base.norm, "norm")
    groups = queries // world_size // max(1, keys // world_size)
    return Decoder(whole, base, kind in FOUR_NORMS, tuple(linears), norms, groups, _head(whole, base, world_size))


def _find(model: Any) -> tuple[Any, Any]:
    """The transformers model, without peft's wrapper, and its base model."""
    for config in (getattr(model, "peft_config", None) or {}).values() if isinstance(model, nn.Module) else ():
        if getattr(config, "is_prompt_learning", False):
            raise ArgumentError(f"the model has a {type(config).__name__}", hint="of peft's methods, LoRA can be parallelized")
    if isinstance(model, nn.Module) and hasattr(model, "peft_config"):
        unwrap: Any = getattr(model, "get_base_model", lambda: model)
        model = unwrap()
    base = getattr(model, str(getattr(model, "base_model_prefix", "")), model)
    kind = getattr(getattr(base, "config", None), "model_type", None)
    if not isinstance(base, nn.Module) or not isinstance(kind, str):
        raise ArgumentError(
            f"expected a transformers decoder, got {type(model).__module__}.{type(model).__qualname__}",
            hint="pass AutoModelForCausalLM.from_pretrained(..); for other models use collogue.nn or collogue.compile",
        )
    if kind not in TWO_NORMS + FOUR_NORMS:
        raise ArgumentError(
            f"models of type {kind!r} are not known to parallelize",
            hint=f"use one of {', '.join(TWO_NORMS + FOUR_NORMS)}, or collogue.compile on a model that is tensor-parallel already",
        )
    if not isinstance(getattr(base, "layers", None), nn.ModuleList) or not isinstance(getattr(base, "norm", None), nn.Module):
        raise ArgumentError(f"{type(base).__qualname__} of type {kind!r} has no layers and norm", hint="pass a transformers model")
    for name, tensor in model.named_parameters():
        if tensor.is_meta:
            raise ArgumentError(f"{name} is not loaded (it is on the meta device)", hint="load the model without offloading")
    return model, base


def _check_code(base: Any, layer: nn.Module, name: str, fuse: bool) -> None:
    """Whether the layer, its attention and its MLP run transformers' own code for this type, and nothing beside it."""
    home = f"transformers.models.{base.config.model_type.removesuffix('_text')}."
    for inner, module in layer.named_modules(prefix=name):
        named = inner in (name, f"{name}.self_attn", f"{name}.mlp")
        if named and not str(type(module).forward.__module__).startswith(home):
            raise ArgumentError(
                f"{inner} is a {type(module).__module__}.{type(module).__qualname__} with a forward that is not transformers'",
                hint="pass the model as transformers made it; use collogue.nn or collogue.compile for layers of your own",
            )
        problem = "has a forward of its own" * ("forward" in vars(module)) if module is layer else own_ways(module)
        if problem:
            hint = "parallelize the model without it" + "; fuse=False lets hooks on attention, MLP and norms see whole tensors" * fuse
            raise ArgumentError(f"{inner} {problem}", hint=hint + "; hooks on a decoder layer are fine")


def _linear(base: nn.Module, name: str, column: bool, counted: tuple[str, ...], keys: int, world_size: int) -> LinearPlan:
    try:
        linear = base.get_submodule(name)
    except AttributeError:
        raise ArgumentError(f"the model has no {name}", hint="pass the model as transformers made it") from None
    lora = f"{type(linear).__module__}.{type(linear).__qualname__}" == "peft.tuners.lora.layer.Linear"
    if lora:
        _check_lora(linear, name)
    plain: Any = getattr(linear, "base_layer", linear) if lora else linear
    check_linear(plain, name)
    size = plain.weight.shape[0 if column else 1]
    if len(counted) != 1:
        raise AssertionError(counted)
    parts = min(keys, world_size) if counted[0] == "key-value heads" else world_size
    if size % parts:
        raise ShapeError(f"{name}: {size} features do not divide among {world_size} ranks", hint="use a world size that divides it")
    return LinearPlan(name, linear, column, Cut(0 if column else 1, (Section(size, parts),)))


def _check_lora(linear: Any, name: str) -> None:
    """Whether peft's wrapper adds ``B(A(x)) * scaling`` and nothing else, for every adapter."""
    odd = [f"adapter {adapter!r} is {type(variant).__name__}" for adapter, variant in linear.lora_variant.items()]
    odd += [f"adapter {adapter!r} has a bias" for adapter, bias in linear.lora_bias.items() if bias]
    odd += ["its weight is transposed"] * bool(linear.fan_in_fan_out)
    if odd:
        raise ArgumentError(f"{name} is peft's LoRA, but {odd[0]}", hint="merge the adapter first: model = model.merge_and_unload()")
    for kind in ("lora_A", "lora_B"):
        for adapter, factor in getattr(linear, kind).items():
            check_linear(factor, f"{name}.{kind}.{adapter}")


def _norm(module: Any, name: str) -> tuple[float, float]:
    """Eps and weight offset. What the module computes is tried on a row, which also tells the offset."""
    weight = module._parameters.get("weight")
    problem = "has no weight of its own" if not isinstance(weight, Tensor) else own_ways(module)
    if problem:
        raise ArgumentError(f"{name} {problem}", hint="parallelize the model as transformers made it, or with fuse=False")
    weight = weight.detach()
    eps = float(getattr(module, "variance_epsilon", getattr(module, "eps", 0.0)))
    probe = torch.linspace(-2.0, 3.0, len(weight), device=weight.device).to(weight.dtype)[None]
    with torch.no_grad():
        found = module(probe).float()
    for offset in (0.0, 1.0):
        expected = reference.rms_norm(probe, RMSNorm(weight, eps, offset)).float()
        if torch.allclose(found, expected, rtol=4 * torch.finfo(weight.dtype).eps, atol=1e-5):
            return eps, offset
    raise ArgumentError(f"{name}: {type(module).__name__} is not an RMSNorm that Collogue knows", hint="use collogue.compile instead")


def _head(model: Any, base: Any, world_size: int) -> Cut | None:
    """The output layer's cut, where it is a plain linear layer that divides; else every rank keeps it whole, which is as right."""
    head = getattr(model, "lm_head", None) if model is not base else None
    try:
        check_linear(head, "lm_head")
        assert isinstance(head, nn.Linear)
        return Cut.even(head.weight.shape[0], 0, world_size, "lm_head")
    except ArgumentError:
        return None

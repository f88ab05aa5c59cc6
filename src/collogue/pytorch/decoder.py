"""What :func:`collogue.parallelize` needs to know of a model before it changes anything: is it one of ours, and how is it cut?"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from collogue.contract import reference
from collogue.contract.spec import RMSNorm
from collogue.errors import ArgumentError, ShapeError
from collogue.pytorch.cut import Cut, Section
from collogue.pytorch.nn import check_linear, own_ways


@dataclass(frozen=True)
class Form:
    """A kind of decoder layer: the names of its parts. Norms are named by what they stand before or behind; ``None``: there is none.

    ``columns`` and ``rows``: the linear layers, each with what its cut dimension counts, a word for each section.
    ``whole_norms``: of attention, over the features of all heads, by the linear layer in front of each.
    """

    attention_in: str | None = "input_layernorm"
    attention_out: str | None = None
    mlp_in: str | None = "post_attention_layernorm"
    mlp_out: str | None = None
    columns: dict[str, tuple[str, ...]] = field(
        default_factory=lambda: {
            "self_attn.q_proj": ("heads",),
            "self_attn.k_proj": ("key-value heads",),
            "self_attn.v_proj": ("key-value heads",),
            "mlp.gate_proj": ("features",),
            "mlp.up_proj": ("features",),
        }
    )
    rows: dict[str, tuple[str, ...]] = field(default_factory=lambda: {"self_attn.o_proj": ("heads",), "mlp.down_proj": ("features",)})
    whole_norms: dict[str, str] = field(default_factory=dict)

    @property
    def fused(self) -> tuple[str, ...]:
        """The norms that fused calls take: behind branches, or else of the stream behind them."""
        names = (self.attention_out, self.mlp_out) if self.attention_out else (self.attention_in, self.mlp_in)
        return tuple(name for name in names if name is not None)

    @property
    def called(self) -> tuple[str, ...]:
        """The norms that are called as modules, with whole tensors."""
        names = (self.attention_in, self.mlp_in if self.attention_out else None)
        return tuple(name for name in names if name is not None)


_LLAMA = Form()
_GEMMA_2 = Form(attention_out="post_attention_layernorm", mlp_in="pre_feedforward_layernorm", mlp_out="post_feedforward_layernorm")
_GATE_UP = {"mlp.gate_up_proj": ("features", "features")}
_SEPARATE = {name: counted for name, counted in _LLAMA.columns.items() if name.startswith("self_attn")}

#: By ``model_type``. Other models may share names and yet differ (attention beside the MLP, say), so nothing is guessed.
FORMS = {
    **dict.fromkeys(("llama", "mistral", "qwen2", "qwen3", "smollm3", "gemma", "granite"), _LLAMA),
    "phi3": Form(columns={"self_attn.qkv_proj": ("heads", "key-value heads", "key-value heads"), **_GATE_UP}),
    **dict.fromkeys(("gemma2", "gemma3_text"), _GEMMA_2),
    "glm4": Form(attention_out="post_self_attn_layernorm", mlp_out="post_mlp_layernorm", columns=_SEPARATE | _GATE_UP),
    "olmo2": Form(
        attention_in=None,
        attention_out="post_attention_layernorm",
        mlp_in=None,
        mlp_out="post_feedforward_layernorm",
        whole_norms={"q_norm": "q_proj", "k_norm": "k_proj"},
    ),
}


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

    ``norms``: eps and weight offset by name in ``base``. ``heads`` and ``key_value_heads``: of one rank.
    """

    model: Any
    base: Any
    form: Form
    linears: tuple[LinearPlan, ...]
    norms: dict[str, tuple[float, float]]
    heads: int
    key_value_heads: int
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
    form, config = FORMS[base.config.model_type], base.config
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
        for name, counted in (form.columns | form.rows).items():
            parts = [min(keys, world_size) if each == "key-value heads" else world_size for each in counted]
            shares = {"heads": queries, "key-value heads": keys, "features": 1}
            of_all = sum(shares[each] for each in counted)
            sections = [(shares[each], of_all, part) for each, part in zip(counted, parts, strict=True)]
            linears.append(_linear(base, f"layers.{index}.{name}", name in form.columns, sections, world_size))
        for name in form.fused if fuse else ():
            norms[f"layers.{index}.{name}"] = _norm(getattr(layer, name), f"layers.{index}.{name}")
    if fuse:
        norms["norm"] = _norm(base.norm, "norm")
    heads = queries // world_size, max(1, keys // world_size)
    return Decoder(whole, base, form, tuple(linears), norms, *heads, _head(whole, base, world_size))


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
    if kind not in FORMS:
        raise ArgumentError(
            f"models of type {kind!r} are not known to parallelize",
            hint=f"use one of {', '.join(FORMS)}, or collogue.compile on a model that is tensor-parallel already",
        )
    if not isinstance(getattr(base, "layers", None), nn.ModuleList) or not isinstance(getattr(base, "norm", None), nn.Module):
        raise ArgumentError(f"{type(base).__qualname__} of type {kind!r} has no layers and norm", hint="pass a transformers model")
    for name, tensor in model.named_parameters():
        if tensor.is_meta:
            raise ArgumentError(f"{name} is not loaded (it is on the meta device)", hint="load the model without offloading")
    return model, base


#: What models call the activation of their MLP.
_ACTIVATIONS = ("act_fn", "activation_fn")
_OF_SEVERAL = (nn.Softmax, nn.LogSoftmax, nn.Softmin, nn.Softmax2d, nn.GLU, nn.MultiheadAttention)


def _is_elementwise(activation: nn.Module) -> bool:
    """Whether it is one of transformers' or PyTorch's that acts on each element alone, whichever features it is given."""
    known = type(activation).__module__ in ("transformers.activations", "torch.nn.modules.activation")
    return known and not isinstance(activation, _OF_SEVERAL) and all(tensor.numel() == 1 for tensor in activation.parameters())


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
        if inner.rpartition(".")[2] in _ACTIVATIONS and not _is_elementwise(module):
            raise ArgumentError(
                f"{inner} is a {type(module).__module__}.{type(module).__qualname__}, not an activation known to act on each element alone",
                hint="each rank has a part of the features: use an activation of transformers or PyTorch, or collogue.nn",
            )
        problem = "has a forward of its own" * ("forward" in vars(module)) if module is layer else own_ways(module)
        if problem:
            hint = "parallelize the model without it" + "; fuse=False lets hooks on attention, MLP and norms see whole tensors" * fuse
            raise ArgumentError(f"{inner} {problem}", hint=hint + "; hooks on a decoder layer are fine")


def _linear(base: nn.Module, name: str, column: bool, sections: list[tuple[int, int, int]], world_size: int) -> LinearPlan:
    """``sections``: of each its share, of how much, and its parts."""
    try:
        linear = base.get_submodule(name)
    except AttributeError:
        raise ArgumentError(f"the model has no {name}", hint="pass the model as transformers made it") from None
    lora = f"{type(linear).__module__}.{type(linear).__qualname__}" == "peft.tuners.lora.layer.Linear"
    if lora:
        _check_lora(linear, name)
    plain: Any = getattr(linear, "base_layer", linear) if lora else linear
    check_linear(plain, name)
    dim = 0 if column else 1
    size = plain.weight.shape[dim]
    sizes = [size * share // of_all for share, of_all, _ in sections]
    if sum(sizes) != size or any(part_size % parts for part_size, (_, _, parts) in zip(sizes, sections, strict=True)):
        raise ShapeError(f"{name}: {size} features do not divide among {world_size} ranks", hint="use a world size that divides it")
    cut = tuple(Section(part_size, parts) for part_size, (_, _, parts) in zip(sizes, sections, strict=True))
    return LinearPlan(name, linear, column, Cut(dim, cut))


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

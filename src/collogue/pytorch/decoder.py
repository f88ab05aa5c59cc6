"""What :func:`collogue.parallelize` needs to know of a model before it changes anything: is it one of ours, and how is it cut?"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from collogue.communicator import Communicator
from collogue.contract.quant import Quant
from collogue.errors import ArgumentError, FormatError, ScaleError, ShapeError
from collogue.pytorch.checkpoints import (
    EXPERTS,
    QuantizedExperts,
    QuantizedLinear,
    algorithm_of,
    check_loaded,
    is_quantized,
    method_of,
    quantizes_cache_alone,
    read,
    read_experts,
    shared_input,
)
from collogue.pytorch.checksum import checksums
from collogue.pytorch.cut import Cut, OnFirst, Section
from collogue.pytorch.forms import FORMS, WHOLE, Counted, Cuts, Form
from collogue.pytorch.layer_code import ACTIVATIONS, INTEGRATIONS, check_code, check_norm
from collogue.pytorch.origin import Origin
from collogue.pytorch.plain import check_dtype, check_linear, odd_parameter
from collogue.pytorch.published import Published
from collogue.pytorch.recipes import Recipe
from collogue.pytorch.schemes import CACHE_SCALES, NAMES
from collogue.pytorch.stated import check_stated, check_transforms
from collogue.pytorch.untouched import check_attention


@dataclass(frozen=True)
class LinearPlan:
    """One linear layer of the base model: ``nn.Linear``, peft's LoRA around one, or a quantized one, and how it is ``published``."""

    name: str
    linear: nn.Module
    column: bool
    cut: Cut
    quantized: QuantizedLinear | None = None
    published: Published | None = None

    @property
    def lora(self) -> bool:
        """Whether it is peft's wrapper."""
        return self.quantized is None and not isinstance(self.linear, nn.Linear)


@dataclass(frozen=True)
class TensorPlan:
    """A module of the base model that holds parameters itself, such as experts: the cut of each.

    ``quantized``: what some of them are decoded from; ``module`` is then transformers' own for experts that are not quantized, and
    ``around`` the one that holds it, where the checkpoint's is of another class.
    """

    name: str
    module: nn.Module
    cuts: dict[str, Cut | OnFirst]
    quantized: dict[str, QuantizedExperts] = field(default_factory=dict)
    around: nn.Module | None = None

    @property
    def labels(self) -> list[str]:
        """The formats of what is quantized, in words."""
        return [experts.label for experts in self.quantized.values()]


@dataclass(frozen=True)
class Decoder:
    """A model that can be cut. ``model`` holds ``base`` and maybe an ``lm_head``.

    ``sums``: the names of modules that add several partials. ``norms``: eps and weight offset by name in ``base``. ``inputs``: the
    format that a norm's result has for the linear layers behind it, and their names. ``gated``: the MLPs whose last layer has quantized
    inputs ``silu(gate) * up``, with the names of their layers, the last one last. ``heads`` and ``key_value_heads``: of one rank.
    """

    model: Any
    base: Any
    form: Form
    linears: tuple[LinearPlan, ...]
    tensors: tuple[TensorPlan, ...]
    sums: tuple[str, ...]
    norms: dict[str, tuple[float, float]]
    inputs: dict[str, tuple[Quant, tuple[str, ...]]]
    gated: dict[str, tuple[str, ...]]
    heads: int
    key_value_heads: int
    head: Cut | None

    @property
    def summary(self) -> dict[str, str]:
        """What ranks must agree on, in words: configuration, kind and numbers of every module, shape and elements of every tensor."""
        config = {f"config.{key}": repr(value) for key, value in self.base.config.to_dict().items() if key not in _OF_ONE_RANK}
        found = config | {"dtype": str(self.base.dtype), "norms": repr(self.norms), "tied embeddings": repr(self.tied)}
        for name, module in self.base.named_modules():
            numbers = {
                key: value for key, value in vars(module).items() if isinstance(value, int | float | str) and key not in _OF_ONE_RANK
            }
            found[name] = f"{type(module).__qualname__} {numbers}"
        named = (*self.model.named_parameters(), *self.model.named_buffers())
        tensors = {name: tensor for name, tensor in named if name.rpartition(".")[2] not in CACHE_SCALES}
        found |= {name: f"{tensor.dtype} {list(tensor.shape)}" for name, tensor in tensors.items()}
        found |= {f"the checksum of {name}": sum for name, sum in checksums(tensors).items()}
        for each in self.linears:
            found[f"{each.name}, cut"] = f"{each.cut}, {each.quantized and each.quantized.label}"
        for held in self.tensors:
            found[f"{held.name}, cut"] = f"{held.cuts}, {held.labels}"
        return found

    @property
    def tied(self) -> bool:
        """Whether the output layer's weight is the embedding's."""
        head = getattr(self.model, "lm_head", None)
        return head is not None and head.weight is getattr(self.model.get_input_embeddings(), "weight", None)


#: What of a configuration, or a module, ranks need not have in common.
_OF_ONE_RANK = ("_name_or_path", "name_or_path", "transformers_version", "training")


def plan(model: Any, world_size: int, *, fuse: bool, recipe: Recipe | None = None) -> Decoder:
    """How ``model`` is cut among so many ranks, and quantized where there is a recipe. Changes nothing.

    Raises:
        ArgumentError: not a decoder that Collogue knows, or one whose layers are wrapped, quantized, hooked or patched.
        ShapeError: features that do not divide.
    """
    whole, base = _find(model)
    if isinstance(getattr(whole, "comm", None), Communicator):
        raise ArgumentError("the model is parallel already", hint="load it again to cut it in another way")
    check_attention(base.config)
    check_dtype(base.dtype)
    form, config = FORMS[base.config.model_type], base.config
    if getattr(whole, "_tp_size", None) is not None:
        raise ArgumentError("transformers has made the model tensor-parallel", hint="load it without tp_plan=, or use collogue.compile")
    queries, keys = int(config.num_attention_heads), int(config.num_key_value_heads)
    if queries % world_size or (keys % world_size and world_size % keys):
        raise ArgumentError(
            f"{queries} heads and {keys} key-value heads do not divide among {world_size} ranks",
            hint="use a world size that divides the heads, and divides the key-value heads or is a multiple of them",
        )
    ranks, source = _Ranks(world_size, queries, keys), _Source.of(whole, base, recipe)
    linears: list[LinearPlan] = []
    tensors: list[TensorPlan] = []
    sums: list[str] = []
    norms: dict[str, tuple[float, float]] = {}
    inputs: dict[str, tuple[Quant, tuple[str, ...]]] = {}
    gated: dict[str, tuple[str, ...]] = {}
    for index, layer in enumerate(base.layers):
        prefix, blocks = f"layers.{index}.", form.blocks(layer)
        check_code(base, layer, f"layers.{index}", form, fuse)
        for block, norm in zip(blocks, (form.attention_in, form.mlp_in), strict=True):
            columns = {name: _linear(base, prefix + name, True, counted, ranks, source) for name, counted in block.columns.items()}
            if block.alone:
                format = _share(columns, [name for name in columns if name not in block.inner], prefix)
                if format is not None and norm is not None:
                    inputs[prefix + norm] = format, tuple(prefix + name for name in columns if name not in block.inner)
            linears += [each for each in columns.values() if each is not None]
            planned = [_linear(base, prefix + name, False, counted, ranks, source) for name, counted in block.rows.items()]
            rows = [each for each in planned if each is not None]
            linears += rows
            if fuse and block.gated is not None and _is_gated(base.get_submodule(prefix + block.gated), rows, world_size):
                gated[prefix + block.gated] = *block.columns, *block.rows
            tensors += [_tensors(base, index, name, cuts, ranks, source) for name, cuts in block.tensors.items()]
            sums += [prefix + block.sums] if block.sums is not None else []
        _check_all_planned(layer, prefix, {each.name for each in linears} | {each.name for each in tensors})
        for name in form.norms if fuse else ():
            norms[prefix + name] = check_norm(getattr(layer, name), prefix + name)
    _check_shared(linears)
    if fuse:
        norms["norm"] = check_norm(base.norm, "norm")
    heads = queries // world_size, max(1, keys // world_size)
    return Decoder(
        whole, base, form, tuple(linears), tuple(tensors), tuple(sums), norms, inputs, gated, *heads, _head(whole, base, world_size)
    )


@dataclass(frozen=True)
class _Ranks:
    """How many there are, and the heads of the model."""

    size: int
    queries: int
    keys: int

    def of(self, tensor: Tensor, how: tuple[int, Counted] | None, what: str) -> Cut | OnFirst:
        """Of a parameter."""
        return OnFirst() if how is None else self.cut(tensor.shape[how[0]], *how, what)

    def cut(self, size: int, dim: int, counted: Counted, what: str) -> Cut:
        """Of a dimension of ``size``. Raises :class:`ShapeError` where it does not divide."""
        shares = [{"heads": self.queries, "key-value heads": self.keys}.get(each, 1) for each in counted]
        parts = [{"key-value heads": min(self.keys, self.size), "whole": 1}.get(each, self.size) for each in counted]
        sizes = [size * share // sum(shares) for share in shares]
        steps = [2 * part if each == "pairs" else part for each, part in zip(counted, parts, strict=True)]
        if sum(sizes) != size or any(section % step for section, step in zip(sizes, steps, strict=True)):
            raise ShapeError(f"{what}: {size} features do not divide among {self.size} ranks", hint="use a world size that divides it")
        return Cut(dim, tuple(Section(section, part) for section, part in zip(sizes, parts, strict=True)))


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
    layers = getattr(base, "layers", None)
    if not isinstance(layers, nn.ModuleList) or not isinstance(getattr(base, "norm", None), nn.Module):
        raise ArgumentError(f"{type(base).__qualname__} of type {kind!r} has no layers and norm", hint="pass a transformers model")
    if not len(layers):
        raise ArgumentError(f"{type(base).__qualname__} has no decoder layers", hint="pass a model with num_hidden_layers of 1 or more")
    for name, tensor in model.named_parameters():
        if tensor.is_meta:
            raise ArgumentError(f"{name} is not loaded (it is on the meta device)", hint="load the model without offloading")
    return model, base


@dataclass(frozen=True)
class _Source:
    """Where quantized weights come from: the checkpoint's ``method``, or a ``recipe``; or from nowhere. ``prefix``: of the base model.

    ``outer``: the same in checkpoints, where the base model alone was passed too.
    """

    method: str | None
    recipe: Recipe | None
    prefix: str
    config: Any
    origin: Origin
    outer: str

    @classmethod
    def of(cls, model: Any, base: Any, recipe: Recipe | None) -> _Source:
        method = method_of(base.config)
        outer, origin = f"{model.base_model_prefix}.", Origin(base.config)
        check_transforms(base.config, origin)
        if not quantizes_cache_alone(base.config) or origin.has_codes:
            check_loaded(model, method)
        return cls(method, recipe, "" if model is base else outer, base.config, origin, outer)

    def quantized(self, linear: nn.Module, name: str) -> QuantizedLinear | None:
        """The layer's weight and input format; ``None`` where it is not quantized: a checkpoint may have been dequantized on load."""
        if is_quantized(linear):
            if self.recipe is not None:
                raise ArgumentError(f"{name} is quantized already ({self.method})", hint="leave quant= out")
            if self.method in ("fp8", "compressed-tensors"):  # transformers has read it
                self.origin.check_read(linear, name, self.prefix, NAMES[self.method].quantized)
            if self.method != "modelopt":
                return read(linear, name, self.method)
            found = read(linear, name, self.method, algorithm_of(self.config, self.outer + name))
            check_stated(self.config, self.outer + name, found)
            return found
        if self.method == "fp8" and isinstance(getattr(linear, "weight_scale_inv", None), Tensor):
            raise ArgumentError(
                f"{name} has weight_scale_inv, but its weight is {linear.weight.dtype}: no longer codes",
                hint="load the model again, and do not convert it: .to(dtype) and .half() change its codes to values",
            )
        if self.recipe is None:
            return None
        if _is_lora(linear):
            raise ArgumentError(
                f"{name} has an adapter, and quant= quantizes plain weights alone", hint="merge it first: model = model.merge_and_unload()"
            )
        check_linear(linear, name)
        assert isinstance(linear, nn.Linear)
        try:
            return self.recipe.quantize(linear.weight, self.prefix + name)
        except ScaleError as error:
            raise ScaleError(f"{name}: {error.message}", hint="quantize models whose weights are finite and not all zero") from None

    def check_part(self, quantized: QuantizedLinear, cut: Cut, world_size: int, name: str) -> None:
        """Raise where a part does not end where a block of scales ends."""
        try:
            quantized.check_part(cut, world_size, name)
        except (FormatError, ShapeError) as error:
            hint = error.hint if self.recipe is None else "use a world size whose parts are whole blocks, or another quant="
            raise type(error)(error.message, hint=hint) from None


def _share(columns: dict[str, LinearPlan | None], readers: list[str], prefix: str) -> Quant | None:
    """Give those that read one input its one format, which is returned."""
    format = shared_input({prefix + name: None if each is None else each.quantized for name, each in columns.items() if name in readers})
    for name, each in columns.items():
        if name in readers and each is not None and each.quantized is not None:
            columns[name] = replace(each, quantized=replace(each.quantized, activation=format))
    return format


def _check_shared(linears: list[LinearPlan]) -> None:
    """Raise :class:`ArgumentError` where layers share a linear layer with adapters, whose factors would be cut twice, or one that is
    quantized, whose inputs come from the norm of one layer.
    """
    seen: dict[int, str] = {}
    for each in linears:
        if (each.lora or each.quantized is not None) and (other := seen.setdefault(id(each.linear), each.name)) != each.name:
            how, hint = ("with adapters", "merge the adapters first") if each.lora else ("that is quantized", "give each its own copy")
            raise ArgumentError(f"{other} and {each.name} are one layer {how}", hint=hint)


def _check_all_planned(layer: nn.Module, prefix: str, planned: set[str]) -> None:
    """Raise :class:`ArgumentError` for a quantized layer that stays as it is: its own product may not run here."""
    for name, module in layer.named_modules():
        if is_quantized(module) and prefix + name not in planned:
            raise ArgumentError(
                f"{prefix}{name} is quantized, and stays whole on every rank",
                hint="load the model dequantized: known are quantized layers that are cut",
            )


def _linear(base: nn.Module, name: str, column: bool, counted: Counted, ranks: _Ranks, source: _Source) -> LinearPlan | None:
    """``None`` for one that stays as it is: every rank has all of it, and it is not quantized."""
    linear, dim = _submodule(base, name), 0 if column else 1
    quantized = source.quantized(linear, name)
    if quantized is None and counted == WHOLE:
        return None
    if quantized is not None:
        cut = ranks.cut(quantized.weight.shape[dim], dim, counted, name)
        source.check_part(quantized, cut, ranks.size, name)
        published = Published.of(linear, source.method if is_quantized(linear) else None, quantized)
        return LinearPlan(name, linear, column, cut, quantized, published)
    lora = _is_lora(linear)
    if lora:
        _check_lora(linear, name)
    plain: Any = getattr(linear, "base_layer", linear) if lora else linear
    check_linear(plain, name)
    return LinearPlan(name, linear, column, ranks.cut(plain.weight.shape[dim], dim, counted, name))


def _is_gated(mlp: nn.Module, rows: list[LinearPlan], world_size: int) -> bool:
    """Whether the MLP's activation is silu, and each rank's part of what it gives its last layer is quantized."""
    (down,) = rows
    activation = next((child for name, child in mlp.named_children() if name in ACTIVATIONS), None)
    quantized = down.quantized is not None and down.quantized.activation is not None
    return quantized and type(activation).__name__ in ("SiLU", "SiLUActivation") and down.cut.size // world_size % 8 == 0


def _submodule(base: nn.Module, name: str) -> nn.Module:
    try:
        return base.get_submodule(name)
    except AttributeError:
        raise ArgumentError(f"the model has no {name}", hint="pass the model as transformers made it") from None


#: How transformers may multiply experts. Each gives, of a part of the features, a term of the sum.
_IMPLEMENTATIONS = ("eager", "batched_mm", "grouped_mm", "deepgemm", "sonicmoe", None)


def _tensors(base: Any, index: int, name: str, cuts: Cuts, ranks: _Ranks, source: _Source) -> TensorPlan:
    layer, whole_name, around = base.layers[index], f"layers.{index}.{name}", None
    given: Any = _submodule(base, whole_name)
    module, quantized = given, dict[str, QuantizedExperts]()
    if is_quantized(given) or type(given).__module__.startswith(INTEGRATIONS):
        module, around, quantized = _dequantized(base, layer, index, name, cuts, source)
    held = dict(module.named_parameters(recurse=False))
    implementation = getattr(module.config, "_experts_implementation", None)
    odd = (f"{each} {problem}" for each, tensor in held.items() if each not in quantized and (problem := odd_parameter(tensor)))
    problem = next(odd, "")
    if set(held) != set(cuts):
        problem = f"parameters {', '.join(held) or 'none'}, not {', '.join(cuts)}"
    elif getattr(given, "_is_expert_parallel", False) or getattr(given, "has_post_expert_norm", False):
        problem = "experts that are parallel already, or a norm behind each"
    elif implementation not in _IMPLEMENTATIONS:
        problem = f"an experts_implementation {implementation!r} that is not transformers'"
    if problem:
        raise ArgumentError(
            f"{whole_name} has {problem}",
            hint='load the model as transformers made it, unquantized, with experts_implementation="grouped_mm"',
        )
    planned = {each: ranks.of(held[each], how, f"{whole_name}.{each}") for each, how in cuts.items()}
    for each, weights in quantized.items():
        cut = planned[each]
        assert isinstance(cut, Cut)
        weights.check_part(cut, ranks.size, f"{whole_name}.{each}")
    if implementation == "grouped_mm" and "down_proj" in planned:
        _check_grouped(base.dtype, planned["down_proj"], whole_name, ranks.size)
    return TensorPlan(whole_name, module, planned, quantized, around)


def _dequantized(
    base: Any, layer: Any, index: int, name: str, cuts: Cuts, source: _Source
) -> tuple[nn.Module, nn.Module | None, dict[str, QuantizedExperts]]:
    """Experts as the model has them where they are not quantized, with no memory for their weights; what holds them; the weights."""
    given, outer = layer.get_submodule(name), name.rpartition(".")[0]
    with torch.device("meta"):
        plain: Any = type(layer)(base.config, index)
    experts: Any = plain.get_submodule(name)
    held = dict(experts.named_parameters(recurse=False))
    shapes = {each: parameter.shape for each, parameter in held.items() if parameter.ndim == 3}
    transposed = cuts.get("gate_up_proj") == (2, ("pairs",))
    if source.method == "fp8":
        source.origin.check_read(given, f"layers.{index}.{name}", source.prefix, [each + end for each in shapes for end in EXPERTS["fp8"]])
    quantized = read_experts(given, f"layers.{index}.{name}", source.method, shapes, transposed=transposed)
    for each in set(held) - set(shapes):
        bias = getattr(given, each, None)
        if not isinstance(bias, Tensor) or bias.shape != held[each].shape:
            raise ArgumentError(f"layers.{index}.{name} has no {each} {list(held[each].shape)}", hint="load the checkpoint as published")
        setattr(experts, each, nn.Parameter(bias.detach().to(base.dtype), False))
    around, mlp = plain.get_submodule(outer), layer.get_submodule(outer)
    if type(around) is type(mlp):
        return experts, None, quantized
    for child, kept in mlp.named_children():
        if child != name.rpartition(".")[2]:
            setattr(around, child, kept)
    return experts, around, quantized


def _check_grouped(dtype: torch.dtype, cut: Cut | OnFirst, name: str, world_size: int) -> None:
    """Rows of a grouped product are multiples of 16 bytes."""
    assert isinstance(cut, Cut)
    row = cut.size // world_size * dtype.itemsize
    if row % 16:
        raise ShapeError(
            f"{name}: {cut.size} features among {world_size} ranks are rows of {row} bytes, no multiple of 16, which grouped_mm needs",
            hint='use a smaller world size, or model.set_experts_implementation("batched_mm")',
        )


def _is_lora(linear: nn.Module) -> bool:
    """Whether it is peft's wrapper around a linear layer."""
    return f"{type(linear).__module__}.{type(linear).__qualname__}" == "peft.tuners.lora.layer.Linear"


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


def _head(model: Any, base: Any, world_size: int) -> Cut | None:
    """The output layer's cut, where it is a plain linear layer that divides; else every rank keeps it whole, which is as right."""
    head = getattr(model, "lm_head", None) if model is not base else None
    if isinstance(head, nn.Module) and is_quantized(head):
        raise ArgumentError("lm_head is quantized", hint="use a checkpoint whose list of layers to ignore has lm_head")
    try:
        check_linear(head, "lm_head")
        assert isinstance(head, nn.Linear)
        return Cut.even(head.weight.shape[0], 0, world_size, "lm_head")
    except ArgumentError:
        return None

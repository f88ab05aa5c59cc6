"""What a checkpoint's configuration says of its layers, where the tensors do not follow from it: it must not contradict them."""

from __future__ import annotations

import re
from collections.abc import Iterator
from fnmatch import fnmatchcase
from typing import Any

from collogue.contract.quant import MXFP4, NVFP4, FP8Static
from collogue.contract.weight import FP8Block
from collogue.errors import ArgumentError
from collogue.pytorch.checkpoints import QuantizedLinear, layer_of, quantization_of
from collogue.pytorch.origin import Origin

#: Where compressed-tensors applies a transform to a weight before it is stored. Anywhere else it is part of every forward pass.
_STORED = ("weight_input", "weight_output")


def check_transforms(config: Any, origin: Origin) -> None:
    """Raise :class:`ArgumentError` for what a forward pass would compute besides products, or codes of another type.

    transformers drops these keys: the configuration in the folder has them.
    """
    said = origin.quantization | quantization_of(config)
    transforms = said.get("transform_config") or {}
    for name, scheme in (transforms.get("config_groups") or {}).items():
        for applied in scheme.get("apply", ()):
            if applied.get("location") not in _STORED:
                raise ArgumentError(
                    f"transform_config of the checkpoint has {name}, a {scheme.get('type')} at the {applied.get('location')} of "
                    f"{', '.join(applied.get('targets', ()))}: transforms in forward passes are not known",
                    hint="use a checkpoint without them, or whose transforms are in its weights alone",
                )
    if said.get("fmt", "e4m3") != "e4m3":
        raise ArgumentError(f"the checkpoint's codes have fmt {said['fmt']!r}", hint="known is 'e4m3'; else dequantize")


def check_stated(config: Any, name: str, layer: QuantizedLinear) -> None:
    """Raise :class:`ArgumentError` where a ModelOpt checkpoint's configuration contradicts the tensors of the layer called ``name``."""
    said = next(_contradictions(quantization_of(config), name, layer), None)
    if said is not None:
        format, inputs = layer.weight.format, layer.activation
        size = _group_size(layer)
        have = f"weights of {type(format).__name__}{f' with scales of groups of {size}' * bool(size)}"
        raise ArgumentError(
            f"{name}: {said}; the tensors are {have}, and inputs are {'not quantized' if inputs is None else inputs.label}",
            hint="load the checkpoint with its own config.json and hf_quant_config.json",
        )


def _contradictions(said: dict[str, Any], name: str, layer: QuantizedLinear) -> Iterator[str]:
    """What the configuration says that the tensors are not, in words."""
    for key in ("exclude_modules", "ignore"):
        for pattern in said.get(key) or ():
            if _names(pattern, name):
                yield f"{key} of the configuration has {pattern!r}"
    entry = layer_of(said, name)
    if entry.get("quant_algo", "") is None:
        yield "the configuration says quant_algo None"
    if (size := entry.get("group_size")) and _group_size(layer) not in (None, size):
        yield f"the configuration says group_size {size}"
    groups = {key: group for key, group in (said.get("config_groups") or {}).items() if isinstance(group, dict)}
    for key, group in groups.items():
        if any(target.isidentifier() or _names(target, name) for target in group.get("targets", ("Linear",))):
            yield from (f"{key} of config_groups says {each}" for each in _of_group(group, layer))


def _of_group(group: dict[str, Any], layer: QuantizedLinear) -> Iterator[str]:
    four, size = isinstance(layer.weight.format, NVFP4 | MXFP4), _group_size(layer)
    for key in ("weights", "input_activations"):
        given = group.get(key)
        if given is None:
            if key == "input_activations" and "weights" in group and layer.activation is not None:
                yield "nothing of input_activations"
            continue
        kind, bits = given.get("type", "float"), given.get("num_bits", 4 if four else 8)
        if (kind, bits) != ("float", 4 if four else 8):
            yield f"that {key} are {bits}-bit {kind}"
        if given.get("group_size") and size not in (None, given["group_size"]):
            yield f"that {key} have group_size {given['group_size']}"
    inputs = group.get("input_activations") or {}
    if inputs.get("dynamic") is True and isinstance(layer.activation, FP8Static):
        yield "that input_activations are dynamic"
    if inputs and layer.activation is None and isinstance(layer.weight.format, NVFP4):
        yield "that input_activations are quantized"


def _group_size(layer: QuantizedLinear) -> int | None:
    """How many weights of a row share a scale; ``None`` where that is all of them."""
    format = layer.weight.format
    return (format.size if isinstance(format, FP8Block) else format.block) or None


def _names(pattern: str, name: str) -> bool:
    """Whether a pattern of a configuration names a layer, or what holds it: a name, one with wildcards, or an expression behind ``re:``."""
    if pattern.startswith("re:"):
        return re.match(pattern[3:], name) is not None
    return fnmatchcase(name, pattern) or f".{pattern}." in f".{name}."

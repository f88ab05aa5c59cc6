"""Quantized layers as checkpoints have them: which tensors a linear layer or experts hold, what they mean, how inputs are quantized."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from collogue.contract.quant import NVFP4, FP8PerToken, FP8Static, Quant
from collogue.contract.weight import QuantizedWeight, Slicer, check_scales
from collogue.errors import ArgumentError, CollogueError, ShapeError
from collogue.pytorch.cut import Cut
from collogue.pytorch.schemes import (
    NAMES,
    POWERS,
    block_size,
    check_algorithm,
    check_known,
    check_scheme,
    of_algorithm,
    of_fine_grained,
    of_scheme,
    per_channel,
    weight_of,
)


@contextmanager
def naming(name: str) -> Iterator[None]:
    """Errors inside are about the layer of this name, and say so."""
    try:
        yield
    except CollogueError as error:
        raise type(error)(f"{name}: {error.message}", hint=error.hint) from None


@dataclass(frozen=True)
class QuantizedLinear:
    """A layer of a checkpoint: its weight, and the format that its input is quantized to (``None``: it is not)."""

    weight: QuantizedWeight
    activation: Quant | None

    @property
    def label(self) -> str:
        """Its formats and static scales, in words."""
        return f"{self.weight.format} {self.activation}"

    def check_part(self, cut: Slicer, world_size: int, name: str) -> None:
        """Raise where a part of the weight, or of the input, does not end where a block of scales ends. Moves nothing."""
        scales = self.weight.scales
        shapes = replace(self.weight, codes=self.weight.codes.to("meta"), scales=None if scales is None else scales.to("meta"))
        part = shapes.part(cut, 0, world_size, name)
        if self.activation is not None:
            with naming(name):
                self.activation.check_hidden_size(part.shape[1])


@dataclass(frozen=True)
class QuantizedExperts:
    """One parameter of experts, ``[E, O, I]``, or ``[E, I, O]`` where ``transposed``: an ``[O, I]`` weight for each expert."""

    weights: tuple[QuantizedWeight, ...]
    transposed: bool

    @property
    def label(self) -> str:
        """The format, in words."""
        return type(self.weights[0].format).__name__

    @property
    def nbytes(self) -> int:
        """Bytes of codes and scales."""
        return sum(weight.nbytes for weight in self.weights)

    def _of_each(self, cut: Cut) -> Cut:
        """The cut of one expert's ``[O, I]``, from that of the parameter."""
        return replace(cut, dim=2 - cut.dim if self.transposed else cut.dim - 1)

    def check_part(self, cut: Cut, world_size: int, name: str) -> None:
        """Raise where a part does not end where a block of scales ends. Moves nothing."""
        QuantizedLinear(self.weights[0], None).check_part(self._of_each(cut), world_size, name)

    def decoded_part(self, cut: Cut, rank: int, world_size: int, dtype: torch.dtype, name: str) -> Tensor:
        """What ``rank`` holds of the parameter, decoded and rounded once to ``dtype``, expert by expert."""
        parts: Any = None
        for index, weight in enumerate(self.weights):
            matrix = weight.part(self._of_each(cut), rank, world_size, name).decode()
            matrix = matrix.t() if self.transposed else matrix
            if parts is None:
                parts = matrix.new_empty(len(self.weights), *matrix.shape, dtype=dtype)
            parts[index] = matrix
        result: Tensor = parts
        return result


def method_of(config: Any) -> str | None:
    """``quant_method`` of a model's configuration; ``None`` for a model that is not quantized."""
    found = getattr(config, "quantization_config", None)
    if found is None:
        return None
    method = found.get("quant_method") if isinstance(found, dict) else getattr(found, "quant_method", None)
    return str(getattr(method, "value", method))


def quantization_of(config: Any) -> dict[str, Any]:
    """The quantization of a model's configuration, written out; empty where it says nothing."""
    said = getattr(config, "quantization_config", None)
    return said if isinstance(said, dict) else getattr(said, "to_dict", dict[str, Any])()


def cache_of(config: Any) -> Any:
    """What the configuration says of the key-value cache, as compressed-tensors or ModelOpt call it; ``None`` where that is nothing."""
    return quantization_of(config).get("kv_cache_scheme") or quantization_of(config).get("kv_cache_quant_algo")


def quantizes_cache_alone(config: Any) -> bool:
    """Whether the configuration says how the key-value cache is quantized, and that no layer is."""
    said = quantization_of(config)
    return bool(cache_of(config)) and not any(said.get(key) for key in ("quant_algo", "config_groups", "quantized_layers"))


def layer_of(said: dict[str, Any], name: str) -> dict[str, Any]:
    """What ModelOpt's configuration says of the layer called ``name`` in the model, which has codes."""
    if said.get("quant_algo") != "MIXED_PRECISION":
        return said
    if not isinstance(layers := said.get("quantized_layers"), dict):
        raise ArgumentError(
            f"{name}: quant_algo is 'MIXED_PRECISION', but the configuration has no quantized_layers",
            hint="copy quantized_layers from hf_quant_config.json into config.quantization_config",
        )
    found = layers.get(name)
    if not isinstance(found, dict) or not found.get("quant_algo"):
        raise ArgumentError(
            f"{name}: quant_algo is 'MIXED_PRECISION', and quantized_layers does not have it, but its weight is codes",
            hint="load the checkpoint with its own config.json and hf_quant_config.json",
        )
    return found


def algorithm_of(config: Any, name: str) -> str | None:
    """ModelOpt's ``quant_algo`` of the layer called ``name`` in the model; ``None`` where the configuration does not say it."""
    algorithm = layer_of(quantization_of(config), name).get("quant_algo")
    return None if algorithm is None else str(algorithm)


def check_loaded(model: nn.Module, method: str | None) -> None:
    """Raise :class:`ArgumentError` where transformers has skipped the quantization that the configuration names: weights are codes then.

    A model that transformers has dequantized still names a method, one that transformers knows.
    """
    from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING

    if method is None or method in AUTO_QUANTIZATION_CONFIG_MAPPING or any(is_quantized(module) for module in model.modules()):
        return
    how = "by collogue.pytorch.modelopt.load(folder)" if method == "modelopt" else "by the package that wrote it"
    raise ArgumentError(
        f"the configuration says quantization method {method!r}, but no layer is quantized: transformers does not know the method, and "
        "has loaded codes without their scales",
        hint=f"load the checkpoint {how}; where weights are not codes, delete config.quantization_config",
    )


def check_compressed(module: nn.Module, name: str) -> None:
    """Raise :class:`ArgumentError` where a weight that compressed-tensors quantizes is not codes, or not any more."""
    scheme, weight = getattr(module, "quantization_scheme", None), module._parameters.get("weight")
    if getattr(scheme, "weights", None) is None or weight is None or weight.element_size() == 1 or not weight.is_floating_point():
        return
    status = getattr(module, "quantization_status", None)
    status = getattr(status, "value", status)
    hint = (
        "a forward pass of the model has decompressed it: load it again, and parallelize it before the first one"
        if status == "decompressed"
        else "where its file holds codes, set quantization_status in config.json to 'compressed' and load it again; else compress the model"
    )
    raise ArgumentError(f"{name}: quantization_status is {status!r}, so its weight is {weight.dtype}, not codes", hint=hint)


def is_quantized(module: nn.Module) -> bool:
    """Whether a layer holds codes: numbers of one byte under any name, or a weight of integers."""
    return any(
        tensor.dtype != torch.bool and (tensor.element_size() == 1 or (name.startswith("weight") and not tensor.is_floating_point()))
        for name, tensor in tensors_of(module).items()
    )


def read(linear: nn.Module, name: str, method: str | None, algorithm: str | None = None) -> QuantizedLinear:
    """What the tensors of a quantized layer mean.

    ==================  ==========================  ====================  =====================================
    codes               scales                      weight                input
    ==================  ==========================  ====================  =====================================
    E4M3 ``[O, I]``     one                         FP8Static             FP8Static, or FP8PerToken if dynamic
    E4M3 ``[O, I]``     ``[O]`` or ``[O, 1]``       FP8PerToken           FP8Static, or FP8PerToken if dynamic
    E4M3 ``[O, I]``     one per block of 128 x 128  FP8Block              FP8Group(128), or FP8Static
    E4M3 ``[O, I]``     E8M0 ``[O, I / 32]``        MXFP8                 MXFP8
    uint8 ``[O, I/2]``  E8M0 ``[O, I / 32]``        MXFP4                 MXFP4
    uint8 ``[O, I/2]``  E4M3 ``[O, I / 16]``        NVFP4                 NVFP4, with a global scale for inputs
    ==================  ==========================  ====================  =====================================

    What of these is right for the input, the checkpoint says: fine-grained FP8 by ``activation_scheme`` of the layer,
    compressed-tensors by its ``quantization_scheme``, ModelOpt by ``algorithm``
    (:data:`collogue.pytorch.schemes.ALGORITHMS`), else by the tensors.

    Raises:
        ArgumentError: a method or scheme that is not known, named; a layer whose tensors are not there. ShapeError, ScaleError.
    """
    if method not in NAMES:
        raise ArgumentError(f"{name}: quantization method {method!r} is not known", hint=f"known are {', '.join(NAMES)}")
    names, tensors = NAMES[method], tensors_of(linear)
    with naming(name):
        check_known(getattr(getattr(linear, "quantization_scheme", None), "weights", None))
    more = sorted(set(tensors) - names.known) + [f"a module {child}" for child, _ in linear.named_children()]
    if more:
        raise ArgumentError(
            f"{name} also has {', '.join(more)}, whose part in its product is not known",
            hint="use a checkpoint without zero points, permutations, transforms or smoothing factors inside its linear layers",
        )
    codes_name = names.packed if names.packed in tensors else "weight"
    codes = tensors.get(codes_name)
    scales = tensors.get(names.weight_scale)
    if codes is None or scales is None:
        missing = [names.packed] * (codes is None) + [names.weight_scale] * (scales is None)
        raise ArgumentError(
            f"{name} has {', '.join(tensors)}, but no {' and no '.join(missing)}",
            hint="load the checkpoint compressed (not dequantized), with the package that wrote it",
        )
    with naming(name):
        check_scheme(getattr(getattr(linear, "quantization_scheme", None), "weights", None), codes, scales)
        check_algorithm(algorithm, codes, scales)
        block = block_size(linear) or (128 if algorithm == "FP8_PB_WO" else None)
        weight = weight_of(codes, scales, tensors.get(names.weight_global), names, block)
        if weight.scales is not None and weight.scales.device.type != "cpu":
            check_scales(weight.scales)
        rows, columns = weight.shape
        whole = getattr(linear, "out_features", rows), getattr(linear, "in_features", columns)
        if whole != (rows, columns):
            raise ShapeError(
                f"{codes_name} is {[rows, columns]}, the model's {list(whole)}",
                hint="load the checkpoint with its own configuration",
            )
        if method == "modelopt":
            activation = of_algorithm(algorithm, weight.format, tensors, names)
        elif method == "compressed-tensors":
            activation = of_scheme(getattr(linear, "quantization_scheme", None), weight.format, tensors, names)
        else:
            activation = of_fine_grained(linear, weight.format, scales.dtype in POWERS, tensors, names)
        return QuantizedLinear(per_channel(weight) if isinstance(activation, FP8PerToken) else weight, activation)


#: How experts are stored, by ``quant_method``: what follows a parameter's name in that of its codes, and in that of its scales.
EXPERTS = {"fp8": ("", "_scale_inv"), "mxfp4": ("_blocks", "_scales")}


def read_experts(
    experts: nn.Module, name: str, method: str | None, whole: Mapping[str, torch.Size], *, transposed: bool
) -> dict[str, QuantizedExperts]:
    """What the tensors of quantized experts mean: a weight for each expert, by the parameter of the experts that are not quantized.

    =========  ===========================  ======================================  ==================================
    method     codes                        scales                                  each expert's weight
    =========  ===========================  ======================================  ==================================
    ``fp8``    ``P`` ``[E, O, I]`` E4M3     ``P_scale_inv``, per block              FP8Block
    ``fp8``    ``P`` ``[E, O, I]`` E4M3     ``P_scale_inv`` ``[E, 1 or 2, 1]``      FP8PerToken: one scale, or one for
                                                                                    gate and one for up, repeated
    ``mxfp4``  ``P_blocks``                 ``P_scales`` E8M0 ``[E, O, I / 32]``    MXFP4
               ``[E, O, I / 32, 16]``
    =========  ===========================  ======================================  ==================================

    Args:
        whole: the shapes of the parameters ``P`` that are weights, as the experts that are not quantized have them.
        transposed: whether those are ``[E, I, O]``.
    Raises:
        ArgumentError: a method or a layout that is not known. ShapeError, ScaleError, FormatError.
    """
    if method not in EXPERTS:
        raise ArgumentError(
            f"{name}: experts quantized by {method!r} are not known",
            hint=f"known are {', '.join(EXPERTS)}; else load the checkpoint dequantized",
        )
    codes_end, scales_end = EXPERTS[method]
    tensors = tensors_of(experts) | (_laid_out(experts, whole) if method == "mxfp4" else {})
    missing = [each + end for each in whole for end in (codes_end, scales_end) if each + end not in tensors]
    known = {each + end for each in whole for end in (codes_end, scales_end, "_bias", "_activation_scale")}
    more = sorted(set(tensors) - known)
    if missing or more:
        problem = f"no {', '.join(missing)}" if missing else f"also {', '.join(more)}"
        raise ArgumentError(
            f"{name} has {', '.join(tensors) or 'no tensors'}: {problem}",
            hint=f"known are experts with {codes_end or 'codes'} and {scales_end} beside each other; else load the checkpoint dequantized",
        )
    return {
        each: _experts(experts, f"{name}.{each}", tensors[each + codes_end], tensors[each + scales_end], shape, transposed)
        for each, shape in whole.items()
    }


def _experts(experts: Any, name: str, codes: Tensor, scales: Tensor, shape: torch.Size, transposed: bool) -> QuantizedExperts:
    codes = codes.flatten(2) if codes.ndim == 4 else codes
    count, rows, columns = (shape[0], shape[2], shape[1]) if transposed else shape
    if codes.ndim != 3 or scales.ndim != 3 or not len(codes) == len(scales) == count:
        raise ShapeError(
            f"{name}: codes {list(codes.shape)} and scales {list(scales.shape)} are not of {count} experts",
            hint="load the checkpoint as it was published",
        )
    if codes.dtype == torch.float8_e4m3fn and getattr(experts, "block_size", None) is None and scales.shape[1:] in ((1, 1), (2, 1)):
        scales = scales.repeat_interleave(rows // scales.shape[1], 1)
    with naming(name):
        if scales.device.type != "cpu":
            check_scales(scales.view(torch.float8_e8m0fnu) if scales.dtype == torch.uint8 else scales)
        weights = tuple(weight_of(*each, None, NAMES["modelopt"], block_size(experts)) for each in zip(codes, scales, strict=True))
    if weights[0].shape != (rows, columns):
        raise ShapeError(
            f"{name}: each expert's weight is {list(weights[0].shape)}, the model's {[rows, columns]}",
            hint="load the checkpoint with its own configuration",
        )
    return QuantizedExperts(weights, transposed)


def _laid_out(experts: Any, whole: Mapping[str, torch.Size]) -> dict[str, Tensor]:
    """Blocks and scales of experts whose tensors were laid out for a product, by transformers' own way back."""
    found: dict[str, Tensor] = {}
    for each in whole:
        if getattr(experts, f"{each}_precision_config", None) is not None:
            from transformers.integrations.mxfp4 import Mxfp4ReverseDeserialize

            found |= Mxfp4ReverseDeserialize(None).convert({}, model=experts, full_layer_name=f"{each}_blocks")
    return found


def tensors_of(linear: nn.Module) -> dict[str, Tensor]:
    """A module's own parameters and buffers, by name."""
    return {name: tensor.detach() for name, tensor in (*linear.named_parameters(recurse=False), *linear.named_buffers(recurse=False))}


def shared_input(layers: dict[str, QuantizedLinear | None]) -> Quant | None:
    """The one format for the input that several layers read. Static scales may differ: the widest range is taken, as nothing then clips.

    Args:
        layers: by name; ``None``: not quantized.
    Raises:
        ArgumentError: some are quantized, some are not, or to different formats.
    """
    formats = {name: None if layer is None else layer.activation for name, layer in layers.items()}
    labels = {name: "none" if format is None else format.label for name, format in formats.items()}
    if len(set(labels.values())) > 1:
        said = ", ".join(f"{name} {label}" for name, label in labels.items())
        raise ArgumentError(
            f"layers that read the same input quantize it to different formats: {said}",
            hint="quantize all of them alike, or put all of them into the checkpoint's list of layers to ignore",
        )
    static = [format for format in formats.values() if isinstance(format, FP8Static | NVFP4)]
    if not static:
        return next(iter(formats.values()), None)
    return max(static, key=lambda each: float(each.scale) if isinstance(each, FP8Static) else -float(each.global_scale))

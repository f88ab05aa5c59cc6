"""Quantized layers as checkpoints have them: which tensors a linear layer or experts hold, what they mean, how inputs are quantized."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from collogue.contract.formats import e8m0_decode
from collogue.contract.quant import MXFP4, MXFP8, NVFP4, FP8Group, FP8PerToken, FP8Static, Quant
from collogue.contract.weight import FP8Block, QuantizedWeight, Slicer, WeightFormat, check_scales
from collogue.errors import ArgumentError, CollogueError, FormatError, ScaleError, ShapeError
from collogue.pytorch.cut import Cut

#: Scales that a layer may have for a key-value cache in FP8. The cache is transformers' and stays as it is: they are not used.
CACHE_SCALES = ("k_scale", "v_scale")

#: Dtypes of scales that are powers of two (E8M0). Scales of any other are numbers, whatever they are stored in.
_POWERS = (torch.uint8, torch.float8_e8m0fnu)


@dataclass(frozen=True)
class Names:
    """What one kind of checkpoint calls the tensors of a layer. ``multipliers``: NVFP4's two global scales are, not divisors."""

    weight_scale: str
    weight_global: str
    input_scale: str
    input_global: str
    multipliers: bool
    packed: str = "weight"

    @property
    def known(self) -> set[str]:
        """All tensors that a layer may have."""
        return {"weight", "bias", self.packed, self.weight_scale, self.weight_global, self.input_scale, self.input_global, *CACHE_SCALES}


#: By ``quant_method`` of the model's configuration. Scales are divisors in all of them; NVFP4's global scales are not.
NAMES = {
    "fp8": Names("weight_scale_inv", "", "activation_scale", "", False),
    "compressed-tensors": Names("weight_scale", "weight_global_scale", "input_scale", "input_global_scale", True, "weight_packed"),
    "modelopt": Names("weight_scale", "weight_scale_2", "input_scale", "input_scale", False),
}


#: ModelOpt's ``quant_algo``: the format of weights, and that of inputs. ``None``: they are not quantized.
ALGORITHMS: dict[str, tuple[type, type | None]] = {
    "FP8": (FP8Static, FP8Static),
    "FP8_PER_CHANNEL_PER_TOKEN": (FP8PerToken, FP8PerToken),
    "FP8_PB_WO": (FP8Block, None),
    "NVFP4": (NVFP4, NVFP4),
    "MXFP8": (MXFP8, MXFP8),
}


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


def _said(config: Any) -> dict[str, Any]:
    """The quantization of a model's configuration, where it is written out."""
    said = getattr(config, "quantization_config", None)
    return said if isinstance(said, dict) else {}


def cache_of(config: Any) -> Any:
    """What the configuration says of the key-value cache, as compressed-tensors or ModelOpt call it; ``None`` where that is nothing."""
    return _said(config).get("kv_cache_scheme") or _said(config).get("kv_cache_quant_algo")


def algorithm_of(config: Any, name: str) -> str | None:
    """ModelOpt's ``quant_algo`` of the layer called ``name`` in the model; ``None`` where the configuration does not say it."""
    said = _said(config)
    if said.get("quant_algo") == "MIXED_PRECISION":
        if not isinstance(layers := said.get("quantized_layers"), dict):
            raise ArgumentError(
                f"{name}: quant_algo is 'MIXED_PRECISION', but the configuration has no quantized_layers",
                hint="copy quantized_layers from hf_quant_config.json into config.quantization_config",
            )
        said = layers.get(name, {})
    algorithm = said.get("quant_algo")
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
    compressed-tensors by its ``quantization_scheme``, ModelOpt by ``algorithm`` (:data:`ALGORITHMS`), else by the tensors.

    Raises:
        ArgumentError: a method or scheme that is not known, named; a layer whose tensors are not there. ShapeError, ScaleError.
    """
    if method not in NAMES:
        raise ArgumentError(f"{name}: quantization method {method!r} is not known", hint=f"known are {', '.join(NAMES)}")
    names, tensors = NAMES[method], tensors_of(linear)
    more = sorted(set(tensors) - names.known) + [f"a module {child}" for child, _ in linear.named_children()]
    if more:
        raise ArgumentError(
            f"{name} also has {', '.join(more)}, whose part in its product is not known",
            hint="use a checkpoint without zero points, permutations, transforms or smoothing factors inside its linear layers",
        )
    codes = tensors.get(names.packed, tensors.get("weight"))
    scales = tensors.get(names.weight_scale)
    if codes is None or scales is None:
        missing = [names.packed] * (codes is None) + [names.weight_scale] * (scales is None)
        raise ArgumentError(
            f"{name} has {', '.join(tensors)}, but no {' and no '.join(missing)}",
            hint="load the checkpoint compressed (not dequantized), with the package that wrote it",
        )
    with naming(name):
        _check_scheme(getattr(getattr(linear, "quantization_scheme", None), "weights", None), codes, scales)
        block = _block_size(linear) or (128 if algorithm == "FP8_PB_WO" else None)
        weight = weight_of(codes, scales, tensors.get(names.weight_global), names, block)
        if weight.scales is not None and weight.scales.device.type != "cpu":
            check_scales(weight.scales)
        if method == "modelopt":
            activation = _of_algorithm(algorithm, weight.format, tensors, names)
        elif method == "compressed-tensors":
            activation = _of_scheme(getattr(linear, "quantization_scheme", None), weight.format, tensors, names)
        else:
            activation = _of_fine_grained(linear, weight.format, scales.dtype in _POWERS, tensors, names)
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
        weights = tuple(weight_of(*each, None, NAMES["modelopt"], _block_size(experts)) for each in zip(codes, scales, strict=True))
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


def _block_size(linear: Any) -> int | None:
    """Rows and columns of a block of scales, where the layer says so."""
    structure = getattr(linear, "block_size", None) or getattr(
        getattr(getattr(linear, "quantization_scheme", None), "weights", None), "block_structure", None
    )
    if structure is None:
        return None
    if structure[0] != structure[1]:
        raise FormatError(f"blocks of {structure[0]} x {structure[1]} weights are not known", hint="known are square blocks, usually 128")
    return int(structure[0])


def weight_of(codes: Tensor, scales: Tensor, factor: Tensor | None, names: Names, block: int | None) -> QuantizedWeight:
    """Codes and scales in the form that :class:`QuantizedWeight` has: in blocks where the layer says so, else by dtypes and shapes."""
    if codes.dtype == torch.float8_e4m3fn:
        powers = scales.dtype in _POWERS
        if block is None and powers and scales.ndim == 2 and scales.shape[0] == codes.shape[0]:
            return QuantizedWeight(codes, scales.view(torch.float8_e8m0fnu), MXFP8("floor", "linear"))
        exact = e8m0_decode(scales) if scales.dtype == torch.uint8 else scales.float()
        if exact.ndim == 4 and exact.shape[1] == exact.shape[3] == 1:  # ModelOpt's blocks
            exact = exact[:, 0, :, 0]
        if block is None and exact.numel() == 1 and codes.numel() != 1:
            return QuantizedWeight(codes, None, FP8Static(float(exact)))
        if block is None and exact.numel() == codes.shape[0] and 0 < exact.ndim < 3 and exact.shape[0] == codes.shape[0]:
            return QuantizedWeight(codes, exact.reshape(-1, 1), FP8PerToken())
        return QuantizedWeight(codes, exact, FP8Block(block or 128))
    if codes.dtype == torch.uint8:
        if scales.dtype == torch.float8_e4m3fn:
            if factor is None:
                raise ArgumentError(f"there is no {names.weight_global}", hint="NVFP4 weights have a global scale")
            return QuantizedWeight(codes, scales, NVFP4(_global(factor, names.weight_global, names), "linear"))
        if scales.dtype in _POWERS:
            return QuantizedWeight(codes, scales.view(torch.float8_e8m0fnu), MXFP4("floor", "linear"))
        raise ArgumentError(
            f"weights of {codes.dtype} with scales of {scales.dtype} {list(scales.shape)} are not known",
            hint="known are NVFP4, with block scales of torch.float8_e4m3fn, and MXFP4, with E8M0 ones (bytes)",
        )
    raise ArgumentError(
        f"weights of {codes.dtype} are not known",
        hint="known are FP8 (per tensor, channel, block), MXFP8, MXFP4 and NVFP4; else dequantize",
    )


def _number(scale: Tensor, name: str) -> float:
    """A scale of a whole tensor. Raises :class:`ScaleError` where it is several, or none."""
    if scale.numel() != 1:
        raise ScaleError(f"{name} has {scale.numel()} elements", hint="a scale of a whole tensor has one; check the checkpoint")
    return float(scale)


def _global(scale: Tensor, name: str, names: Names) -> float:
    """The multiplier that a global scale is, or is the inverse of."""
    number = _number(scale, name)
    return number if names.multipliers else float(1.0 / torch.tensor(number, dtype=torch.float32))


def _one(given: Tensor | None, name: str) -> float:
    """The scale of an input whose scheme is static. Raises :class:`ArgumentError` where there is none."""
    if given is None:
        raise ArgumentError(
            f"inputs are quantized by a static scale, but there is no {name}", hint="calibrate the model before it is saved"
        )
    return _number(given, name)


def _of_fine_grained(linear: Any, format: WeightFormat, powers: bool, tensors: dict[str, Tensor], names: Names) -> Quant | None:
    """The input's format in fine-grained FP8: static as the layer says, or as there is a scale; else like the weight's."""
    given = tensors.get(names.input_scale)
    scheme = getattr(linear, "activation_scheme", "dynamic" if given is None else "static")
    if isinstance(format, NVFP4 | MXFP4):
        raise ArgumentError(
            f"weights of {type(format).__name__} are not known in fine-grained FP8", hint="use a checkpoint with FP8 weights, or dequantize"
        )
    if scheme == "static":
        return FP8Static(_one(given, names.input_scale))
    if scheme != "dynamic":
        raise ArgumentError(f"activation_scheme {scheme!r} is not known", hint="known are 'static' and 'dynamic'")
    if isinstance(format, MXFP8):
        return MXFP8("floor")
    if isinstance(format, FP8Block):
        return _groups(format.size, powers)
    return FP8PerToken()


def _groups(size: int, powers: bool) -> FP8Group:
    """Groups of the input. Scales in float32 lie column by column, as products on GPUs read them."""
    return FP8Group(size, "ue8m0") if powers else FP8Group(size, layout="column")


def _of_algorithm(algorithm: str | None, format: WeightFormat, tensors: dict[str, Tensor], names: Names) -> Quant | None:
    """The input's format in ModelOpt's checkpoints."""
    weights = type(format)
    if algorithm is not None and ALGORITHMS.get(algorithm, (None,))[0] is not weights:
        problem = f"has weights of {weights.__name__}" if algorithm in ALGORITHMS else "is not known"
        raise ArgumentError(f"quant_algo {algorithm!r} {problem}", hint=f"known are {', '.join(ALGORITHMS)}; else dequantize")
    if weights not in dict(ALGORITHMS.values()):
        raise ArgumentError(f"weights of {weights.__name__} are not known in ModelOpt's checkpoints", hint="dequantize the checkpoint")
    given = tensors.get(names.input_scale)
    if weights is NVFP4:
        if given is None and algorithm is None:
            return None
        _one(given, names.input_scale)
        assert given is not None
        return NVFP4(_global(given, names.input_scale, names))
    if weights is FP8Static:
        return FP8Static(_one(given, names.input_scale))
    return FP8PerToken() if weights is FP8PerToken else MXFP8("floor") if weights is MXFP8 else None


#: What compressed-tensors may do with weights: type, bits, strategy and, of groups, their size.
_SCHEMES = (
    ("float", 8, "tensor", None),
    ("float", 8, "channel", None),
    ("float", 8, "block", None),
    ("float", 8, "group", 32),
    ("float", 4, "group", 32),
    ("float", 4, "tensor_group", 16),
)


def _kind(given: Any) -> tuple[str, int, str]:
    """Type, bits and strategy of compressed-tensors' arguments."""
    return str(getattr(given.type, "value", given.type)), given.num_bits, str(getattr(given.strategy, "value", given.strategy))


def _check_scheme(weights: Any, codes: Tensor, scales: Tensor) -> None:
    """Raise :class:`ArgumentError` for weights that compressed-tensors quantizes in a way that is not known, or whose scales do not fit."""
    if weights is None:
        return
    kind = _kind(weights)
    size = weights.group_size if "group" in kind[2] else None
    if (*kind, size) in _SCHEMES and weights.symmetric and not (kind[2] == "group" and scales.element_size() > 1):
        if codes.dtype == torch.float8_e4m3fn and codes.ndim == 2:
            rows, columns = codes.shape
            expected = {"tensor": [1], "channel": [rows, 1], "group": [rows, columns // (size or 1)]}.get(kind[2], list(scales.shape))
            if scales.numel() != math.prod(expected) or (kind[2] != "tensor" and scales.shape[:1] != (expected[0],)):
                raise ShapeError(
                    f"weights {list(codes.shape)} quantized per {kind[2]} have scales {list(scales.shape)}, expected {expected}",
                    hint="load the checkpoint as it was published, each weight as [output features, input features]",
                )
        return
    groups = "" if size is None else f" of {size}"
    raise ArgumentError(
        f"weights quantized to {kind[1]}-bit {kind[0]} per {kind[2]}{groups}, with scales of {scales.dtype}, are not known",
        hint="known are FP8 (per tensor, channel, block), MXFP8, MXFP4 and NVFP4; else dequantize",
    )


def _of_scheme(scheme: Any, format: WeightFormat, tensors: dict[str, Tensor], names: Names) -> Quant | None:
    """The input's format that compressed-tensors' arguments describe."""
    if scheme is None:
        raise ArgumentError("there is no quantization_scheme", hint="load the checkpoint compressed, with compressed-tensors")
    if (outputs := getattr(scheme, "output_activations", None)) is not None:
        kind = _kind(outputs)
        raise ArgumentError(
            f"outputs quantized to {kind[1]}-bit {kind[0]} per {kind[2]} are not known",
            hint="use a checkpoint whose scheme has weights and input_activations alone, or dequantize",
        )
    given = scheme.input_activations
    if given is None:
        return None
    kind, size = _kind(given), given.group_size
    scale, factor = tensors.get(names.input_scale), tensors.get(names.input_global)
    said = getattr(given, "scale_dtype", None)
    powers = isinstance(format, MXFP8 | MXFP4) if said is None else said in _POWERS
    if not given.symmetric:
        kind = kind[0], kind[1], f"{kind[2]} with zero points"
    if kind == ("float", 8, "tensor") and not given.dynamic:
        return FP8Static(_one(scale, names.input_scale))
    if kind == ("float", 8, "token") and given.dynamic:
        return FP8PerToken()
    if kind == ("float", 8, "group") and given.dynamic:
        return MXFP8("floor") if powers and size == 32 else _groups(size, powers)
    if kind == ("float", 4, "tensor_group") and size == 16:
        if factor is None:
            raise ArgumentError(f"there is no {names.input_global}", hint="calibrate it before it is saved")
        return NVFP4(_global(factor, names.input_global, names))
    if kind == ("float", 4, "group") and size == 32 and given.dynamic and powers:
        return MXFP4("floor")
    how = "dynamic" if given.dynamic else "static"
    raise ArgumentError(
        f"inputs quantized to {kind[1]}-bit {kind[0]} per {kind[2]}, {how}, are not known",
        hint="known are FP8 static per tensor, per token, per group; MXFP8; MXFP4; NVFP4",
    )


def per_channel(weight: QuantizedWeight) -> QuantizedWeight:
    """The same weight with its one scale repeated for every output feature: what a product with per-token activations takes."""
    if not isinstance(weight.format, FP8Static):
        return weight
    scales = torch.full((weight.shape[0], 1), float(weight.format.scale), dtype=torch.float32, device=weight.codes.device)
    return replace(weight, scales=scales, format=FP8PerToken())


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

"""What the tensors of quantized weights mean, by the kind of checkpoint, and how its schemes quantize a layer's input."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from collogue.contract.formats import e8m0_decode
from collogue.contract.quant import MXFP4, MXFP8, NVFP4, FP8Group, FP8PerToken, FP8Static, Quant
from collogue.contract.weight import FP8Block, QuantizedWeight, WeightFormat
from collogue.errors import ArgumentError, FormatError, ScaleError, ShapeError

#: Scales that a layer may have for a key-value cache in FP8. The cache is transformers' and stays as it is: they are not used.
CACHE_SCALES = ("k_scale", "v_scale")

#: Where compressed-tensors has the hook that puts its own cache in the place of transformers', to use those scales.
CACHE_HOOKS = "compressed_tensors.modeling.kvcache"

#: Dtypes of scales that are powers of two (E8M0). Scales of any other are numbers, whatever they are stored in.
POWERS = (torch.uint8, torch.float8_e8m0fnu)


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
        return {"bias", *self.quantized, *CACHE_SCALES}

    @property
    def quantized(self) -> tuple[str, ...]:
        """Those that hold codes and scales."""
        found = "weight", self.packed, self.weight_scale, self.weight_global, self.input_scale, self.input_global
        return tuple(name for name in dict.fromkeys(found) if name)


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


def block_size(linear: Any) -> int | None:
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
        powers = scales.dtype in POWERS
        if block is None and powers and scales.ndim == 2 and scales.shape[0] == codes.shape[0]:
            return QuantizedWeight(codes, scales.view(torch.float8_e8m0fnu), MXFP8("ceil", "linear"))
        exact = e8m0_decode(scales) if scales.dtype == torch.uint8 else scales.float()
        if exact.ndim == 4 and exact.shape[1] == exact.shape[3] == 1:  # ModelOpt's blocks
            exact = exact[:, 0, :, 0]
        if block is None and exact.numel() == 1 and codes.numel() != 1:
            return QuantizedWeight(codes, None, FP8Static(_number(exact, names.weight_scale)))
        if block is None and exact.numel() == codes.shape[0] and 0 < exact.ndim < 3 and exact.shape[0] == codes.shape[0]:
            return QuantizedWeight(codes, exact.reshape(-1, 1), FP8PerToken())
        return QuantizedWeight(codes, exact, FP8Block(block or 128))
    if codes.dtype == torch.uint8:
        if scales.dtype == torch.float8_e4m3fn:
            if factor is None:
                raise ArgumentError(f"there is no {names.weight_global}", hint="NVFP4 weights have a global scale")
            return QuantizedWeight(codes, scales, NVFP4(_global(factor, names.weight_global, names), "linear"))
        if scales.dtype in POWERS and factor is not None:
            raise ArgumentError(
                f"{names.weight_scale} is {scales.dtype} beside {names.weight_global}: NVFP4's block scales are torch.float8_e4m3fn",
                hint="store the same bytes as torch.float8_e4m3fn; MXFP4 has E8M0 scales and no global one",
            )
        if scales.dtype in POWERS:
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
    """A scale of a whole tensor. Raises :class:`ScaleError` where it is several, or none, or not positive."""
    if scale.numel() != 1:
        raise ScaleError(f"{name} has {scale.numel()} elements", hint="a scale of a whole tensor has one; check the checkpoint")
    if not 0.0 < (number := float(scale)) < math.inf:
        raise ScaleError(f"{name} must be positive and finite, got {number}", hint="check the checkpoint")
    return number


def _global(scale: Tensor, name: str, names: Names) -> float:
    """The multiplier that a global scale is, or is the inverse of."""
    number = _number(scale, name)
    factor = number if names.multipliers else float(1.0 / torch.tensor(number, dtype=torch.float32))
    if not 0.0 < factor < math.inf:
        raise ScaleError(f"{name} is {number}, whose inverse is {factor} in float32", hint="check the checkpoint")
    return factor


def _one(given: Tensor | None, name: str) -> float:
    """The scale of an input whose scheme is static. Raises :class:`ArgumentError` where there is none."""
    if given is None:
        raise ArgumentError(
            f"inputs are quantized by a static scale, but there is no {name}", hint="calibrate the model before it is saved"
        )
    return _number(given, name)


def of_fine_grained(linear: Any, format: WeightFormat, powers: bool, tensors: dict[str, Tensor], names: Names) -> Quant | None:
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
        return MXFP8("ceil")
    if isinstance(format, FP8Block):
        return _groups(format.size, powers)
    return FP8PerToken()


def _groups(size: int, powers: bool) -> FP8Group:
    """Groups of the input. Scales in float32 lie column by column, as products on GPUs read them."""
    return FP8Group(size, "ue8m0") if powers else FP8Group(size, layout="column")


#: What of a weight has a scale, by ``quant_algo``: as compressed-tensors calls it, with the size of groups.
_STRATEGIES = {"FP8": ("tensor", None), "FP8_PER_CHANNEL_PER_TOKEN": ("channel", None), "MXFP8": ("group", 32)}


def check_algorithm(algorithm: str | None, codes: Tensor, scales: Tensor) -> None:
    """Raise :class:`ShapeError` for scales of a ModelOpt checkpoint that do not fit its ``quant_algo``."""
    if algorithm in _STRATEGIES:
        _check_shape(*_STRATEGIES[algorithm], codes, scales)


def of_algorithm(algorithm: str | None, format: WeightFormat, tensors: dict[str, Tensor], names: Names) -> Quant | None:
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
    return FP8PerToken() if weights is FP8PerToken else MXFP8("ceil") if weights is MXFP8 else None


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


def check_known(weights: Any, more: str = "") -> None:
    """Raise :class:`ArgumentError` for weights that compressed-tensors quantizes in a way that is not known, ``more`` of it or any."""
    if weights is None:
        return
    kind = _kind(weights)
    size = weights.group_size if "group" in kind[2] else None
    if (*kind, size) in _SCHEMES and weights.symmetric and not more:
        return
    groups = "" if size is None else f" of {size}"
    more += "" if weights.symmetric else ", with zero points,"
    raise ArgumentError(
        f"weights quantized to {kind[1]}-bit {kind[0]} per {kind[2]}{groups}{more} are not known",
        hint="known are FP8 (per tensor, channel, block), MXFP8, MXFP4 and NVFP4; else dequantize",
    )


def check_scheme(weights: Any, codes: Tensor, scales: Tensor) -> None:
    """Raise :class:`ArgumentError` for tensors that are not those of compressed-tensors' scheme for weights, :class:`ShapeError` too."""
    if weights is None:
        return
    _, _, strategy = _kind(weights)
    check_known(weights, f", with scales of {scales.dtype}," * (strategy == "group" and scales.element_size() > 1))
    _check_shape(strategy, weights.group_size if strategy == "group" else None, codes, scales)


def _check_shape(strategy: str, size: int | None, codes: Tensor, scales: Tensor) -> None:
    """Raise :class:`ShapeError` for scales of FP8 weights that are not as many as there are tensors, channels or groups."""
    if codes.dtype != torch.float8_e4m3fn or codes.ndim != 2:
        return
    rows, columns = codes.shape
    expected = {"tensor": [1], "channel": [rows, 1], "group": [rows, columns // (size or 1)]}.get(strategy, list(scales.shape))
    if scales.numel() != math.prod(expected) or (strategy != "tensor" and scales.shape[:1] != (expected[0],)):
        raise ShapeError(
            f"weights {list(codes.shape)} quantized per {strategy} have scales {list(scales.shape)}, expected {expected}",
            hint="load the checkpoint as it was published, each weight as [output features, input features]",
        )


def of_scheme(scheme: Any, format: WeightFormat, tensors: dict[str, Tensor], names: Names) -> Quant | None:
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
    powers = isinstance(format, MXFP8 | MXFP4) if said is None else said in POWERS
    if not given.symmetric:
        kind = kind[0], kind[1], f"{kind[2]} with zero points"
    if kind == ("float", 8, "tensor") and not given.dynamic:
        return FP8Static(_one(scale, names.input_scale))
    if kind == ("float", 8, "token") and given.dynamic:
        return FP8PerToken()
    if kind == ("float", 8, "group") and given.dynamic:
        return MXFP8("ceil") if powers and size == 32 else _groups(size, powers)
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

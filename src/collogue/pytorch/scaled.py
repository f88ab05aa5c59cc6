"""Linear layers that take what a fused call gives: quantized activations, quantized weights, and the product of both."""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from collogue.calls.call import check_device
from collogue.contract.quant import NVFP4, FP8Static, Quant, check_format
from collogue.contract.reference import dequantize
from collogue.contract.spec import VALUE_DTYPES, Output
from collogue.contract.weight import QuantizedWeight, WeightFormat, check_scales, decode
from collogue.errors import ArgumentError, DTypeError, FormatError, ScaleError, ShapeError
from collogue.functions import check_strided, quantize
from collogue.ops import is_traced
from collogue.pytorch.plain import check_linear
from collogue.pytorch.products import find_product, how

_log = logging.getLogger("collogue")
_CODES = (torch.float8_e4m3fn, torch.uint8)


class Handover:
    """Codes on their way from a norm to the linear layers that read them: inside a model's own code they are a tensor like any other.

    Args:
        quant: the format of the codes.
    """

    def __init__(self, quant: Quant) -> None:
        self.quant = quant
        self._given: tuple[Tensor, Tensor | None] | None = None

    def give(self, out: Output, leading: tuple[int, ...]) -> Tensor:
        """The codes of ``out`` as a tensor ``[*leading, ..]``, whose scales :meth:`take` finds."""
        assert out.codes is not None
        codes = out.codes.view(*leading, out.codes.shape[-1])
        self._given = codes, out.scales
        return codes

    def take(self, codes: Tensor) -> Output:
        """Codes and scales of a tensor of :meth:`give`.

        Raises:
            ArgumentError: another tensor: its scales are not known.
        """
        if self._given is None or self._given[0] is not codes:
            raise ArgumentError(
                f"codes {list(codes.shape)} are not those that the norm gave last",
                hint="pass what the norm returned to the layer, unchanged",
            )
        return Output(codes=codes.view(-1, codes.shape[-1]), scales=self._given[1])


class Linear(nn.Module):
    """``x W^T + b`` with a plain or a quantized ``W``; the base of this package's linear layers.

    Args:
        weight: ``[O, I]``, a tensor or a :class:`QuantizedWeight`. bias: ``[O]`` or ``None``.
        activation: the format of ``x``; ``None``: ``x`` is not quantized.
        dtype: of the result where ``x`` is an :class:`collogue.Output`; default: the weight's, or bfloat16 where that is quantized.
    State:
        Of a quantized weight the state dictionary also has the number that its format holds, a divisor of FP8Static or a multiplier of
        NVFP4, as ``weight_factor``, and that of ``activation`` as ``input_factor``. Loading takes the weight's over with the codes. The
        input's must be the layer's, as calls have that format too: else a :class:`ScaleError`. So are scales that are not positive and
        finite; codes, scales and numbers of another dtype or shape are a :class:`DTypeError` or :class:`ShapeError`.
    """

    weight: nn.Parameter
    weight_scale: nn.Parameter | None
    bias: nn.Parameter | None
    #: The numbers that formats hold (:attr:`collogue.Quant.given_scale`) as ``[1, 1]``, beside the weight: a product that made them would
    #: launch a kernel for each. In the state of a layer with a quantized weight.
    weight_factor: Tensor | None
    input_factor: Tensor | None

    def __init__(
        self, weight: Tensor | QuantizedWeight, bias: Tensor | None, activation: Quant | None = None, dtype: torch.dtype | None = None
    ) -> None:
        super().__init__()
        _check_arguments(weight, bias, activation)
        quantized = isinstance(weight, QuantizedWeight)
        self.format: WeightFormat | None = weight.format if isinstance(weight, QuantizedWeight) else None
        self.weight = nn.Parameter(weight.codes if isinstance(weight, QuantizedWeight) else weight, False)
        scales = weight.scales if isinstance(weight, QuantizedWeight) else None
        self.register_parameter("weight_scale", None if scales is None else nn.Parameter(scales, False))
        self.register_parameter("bias", None if bias is None else nn.Parameter(bias, False))
        self.activation = activation
        for name, format in (("weight_factor", self.format), ("input_factor", activation)):
            self.register_buffer(name, factor_of(format, self.weight.device), persistent=quantized)
        #: Where the scales of codes are, for codes that come as a tensor.
        self.handover: Handover | None = None
        self.dtype = dtype or (torch.bfloat16 if quantized else self.weight.dtype)
        if quantized and self.dtype not in VALUE_DTYPES:
            raise DTypeError(f"dtype is {self.dtype}; expected bfloat16, float16 or float32", hint="pass the dtype that results shall have")
        if activation is not None:
            activation.check_hidden_size(weight.shape[1])

    @property
    def quantized_weight(self) -> QuantizedWeight | None:
        """The weight, where it is quantized."""
        return None if self.format is None else QuantizedWeight(self.weight.detach(), self.weight_scale, self.format)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> nn.Module:
        """Codes and scales move with the module; ``.to(dtype)`` and ``.half()`` would change their meaning and leave them alone.

        Every tensor is converted before one is replaced: an error leaves the layer as it was.
        """
        if self.format is None:
            return super()._apply(fn, recurse)  # type: ignore[no-untyped-call, no-any-return]
        done: dict[int, Tensor] = {}
        with torch.no_grad():
            for name, tensor in (*self._parameters.items(), *self._buffers.items()):
                if tensor is not None:
                    done[id(tensor)] = fn(tensor) if name == "bias" else fn(tensor.detach().view(torch.uint8)).view(tensor.dtype)
        moved = super()._apply(lambda tensor: done[id(tensor)] if id(tensor) in done else fn(tensor), recurse)  # type: ignore[no-untyped-call]
        return moved  # type: ignore[no-any-return]

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        """Numbers of formats come with the codes that they belong to."""
        if self.format is not None and not hasattr(self, "checkpoint"):  # a parallel layer's: whole until its hook has checked and cut it
            self._check_state(state_dict, prefix)
        super()._load_from_state_dict(state_dict, prefix, *args)
        factor = self.weight_factor if f"{prefix}weight_factor" in state_dict else None
        if isinstance(self.format, FP8Static | NVFP4) and factor is not None and not factor.is_meta:
            number = factor if isinstance(self.format.given_scale, Tensor) else float(factor)
            if isinstance(self.format, FP8Static):
                self.format = replace(self.format, scale=number)
            else:
                self.format = replace(self.format, global_scale=number)

    def _check_state(self, state_dict: dict[str, Any], prefix: str) -> None:
        """Raise for tensors that PyTorch would convert to codes or scales, for scales that are none, and for another input's number."""
        for name in ("weight", "weight_scale", "weight_factor", "input_factor"):
            given, own = state_dict.get(prefix + name), getattr(self, name)
            if not isinstance(given, Tensor) or own is None:
                continue
            check_like(prefix + name, given, own, "the layer's", "load a state of the same quantization scheme, or make a layer of its")
            if name in ("weight_scale", "weight_factor") and not given.is_meta:
                try:
                    check_scales(given)
                except ScaleError as error:
                    raise ScaleError(f"{prefix}{name} of the state: {error.message}", hint=error.hint) from None
            if name == "input_factor" and self.activation is not None and _differ(given, self.activation):
                raise ScaleError(
                    f"{prefix}{name} of the state is {given.flatten().tolist()}; the layer's activation, {self.activation.name}, has "
                    f"{self.activation.given_scale}",
                    hint="make the layer with the activation of the layer whose state it is",
                )

    def explain(self) -> str:
        """How the product is computed on the device where the weight is, and why."""
        if self.format is None:
            if self.activation is None:
                return f"plain product in {self.weight.dtype}"
            compute = _dtype_of_product(self.weight.device)
            return f"activations quantized to {self.activation.label} and decoded, weights {self.weight.dtype}: multiplied in {compute}"
        product = find_product(self.activation, self.format, self.weight.device)
        activation = "none" if self.activation is None else self.activation.label
        what = f"weights {type(self.format).__name__}, activations {activation}"
        if isinstance(product, str):
            return f"{what}: decoded and multiplied in {_dtype_of_product(self.weight.device)}, because {product}"
        return f"{what}: {how(product, self.weight.shape[0])}"

    def product(self, x: Tensor | Output, bias: Tensor | None) -> Tensor:
        """``x W^T + bias``. ``x``: ``[.., I]`` of values, or an :class:`collogue.Output` with codes of ``activation``, ``[T, I]``."""
        if isinstance(x, Output):
            codes, scales, leading, dtype = *self._given(x), None, self.dtype
        elif self.handover is not None and isinstance(x, Tensor) and x.dtype in _CODES:
            codes, scales, leading, dtype = *self._given(self.handover.take(x)), x.shape[:-1], self.dtype
        elif self.activation is None:
            if self.format is None:
                return F.linear(x, self.weight, bias)
            self._check_x(x)
            codes, scales, leading, dtype = x, None, x.shape[:-1], x.dtype
        else:
            self._check_x(x)
            codes, scales = self.quantized(x.reshape(-1, x.shape[-1]), self.activation)
            leading, dtype = x.shape[:-1], x.dtype
        result = self._multiply(codes, scales, bias, dtype)
        return result if leading is None else result.view(*leading, result.shape[-1])

    def quantized(self, rows: Tensor, quant: Quant) -> tuple[Tensor, Tensor | None]:
        """Codes and scales of ``rows`` ``[T, I]``, by the contract."""
        return quantize(rows, quant)

    def _given(self, x: Output) -> tuple[Tensor, Tensor | None]:
        if self.activation is None or x.codes is None:
            missing = "the layer has no activation format" if self.activation is None else "the output has no codes"
            raise ArgumentError(missing, hint="pass out.norm, or give the call and the layer the same format")
        if (x.scales is None) != (self.activation.scale_dtype is None):
            found = "no scales" if x.scales is None else f"scales, {x.scales.dtype} {list(x.scales.shape)}"
            has = "none" if x.scales is not None else "some"
            raise FormatError(
                f"the output has {found}; {self.activation.name}, the layer's activation, has {has}",
                hint="give the call and the layer the same format: quant=layer.activation",
            )
        for name, tensor in (("codes", x.codes), ("scales", x.scales)):
            if tensor is not None:
                check_device(name, tensor, self.weight.device, "the layer")
        return x.codes, x.scales

    def _check_x(self, x: object) -> None:
        if not isinstance(x, Tensor) or x.ndim == 0:
            found = "a tensor without dimensions" if isinstance(x, Tensor) else f"a {type(x).__name__}"
            raise ShapeError(f"x is {found}; expected a tensor [.., I] or a collogue.Output", hint="pass values, or what a call returned")
        check_strided("x", x)
        check_device("x", x, self.weight.device, "the layer")

    def _multiply(self, codes: Tensor, scales: Tensor | None, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
        product = "" if self.format is None else find_product(self.activation, self.format, codes.device)
        if not isinstance(product, str):
            return product(codes, scales, self, bias, dtype)
        if product and not is_traced():  # a log line would break a graph
            _say_once(self.explain())
        return self._decode_and_multiply(codes, scales, bias, dtype)

    def _decode_and_multiply(self, codes: Tensor, scales: Tensor | None, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
        """In float32 on the CPU, in bfloat16 on GPUs, rounded once to ``dtype``."""
        compute = _dtype_of_product(codes.device)
        matrix = (self.weight if self.format is None else decode(self.weight.detach(), self.weight_scale, self.format)).to(compute)
        if self.activation is not None:
            codes = dequantize(codes, scales, self.activation, hidden_size=matrix.shape[1])
        elif codes.dtype not in VALUE_DTYPES:
            raise DTypeError(
                f"x has dtype {codes.dtype}, and the layer has no activation format; expected bfloat16, float16 or float32",
                hint="pass values, or make the layer with the format of the codes as its activation",
            )
        elif codes.shape[-1] != matrix.shape[1]:
            raise ShapeError(f"x is {list(codes.shape)}, the weight {list(matrix.shape)}", hint="pass [.., I]")
        with _no_autocast(codes.device):  # it would take another dtype
            return F.linear(codes.to(compute), matrix, None if bias is None else bias.to(compute)).to(dtype)

    def extra_repr(self) -> str:
        shape = self.weight.shape[0], self.weight.shape[1] * (2 if self.weight.dtype == torch.uint8 else 1)  # MXFP4 and NVFP4: two a byte
        kind = self.weight.dtype if self.format is None else self.format
        return f"[O, I]={list(shape)}, weight={kind}, activation={'none' if self.activation is None else self.activation.label}"


class ScaledLinear(Linear):
    """``y = decode(x) decode(W)^T + b`` for quantized weights, and for quantized activations where the format has them.

    Args:
        weight: ``[O, I]`` codes and scales. bias: ``[O]`` or ``None``.
        activation: the format of ``x``; ``None``: weights alone are quantized. An :class:`collogue.Output` must be of a call with this very
            format. Codes and scales say little about it: another static scale, another NVFP4 global scale, or scales in another layout of
            the same shape give wrong numbers without an error.
        dtype: of the result where ``x`` is an :class:`collogue.Output`.
    Product:
        ``torch.nn.functional.scaled_mm`` on GPUs that have it for this pair of formats: FP8Static with FP8Static (sm_89 and later),
        FP8PerToken with FP8PerToken (sm_90), FP8Group(128) with FP8Block(128) (sm_90). Few rows of FP8PerToken are multiplied with scales
        of 1 to a float32 result, which one kernel scales and rounds once. Elsewhere both are decoded and
        multiplied, in float32 on the CPU and in bfloat16 on GPUs; a log line says so once (not under ``torch.compile``), and
        :meth:`explain` at any time.
    State:
        ``state_dict`` has codes, scales, and the number that a format holds, a divisor of FP8Static or a multiplier of NVFP4, of the weight
        (``weight_factor``) and of the input (``input_factor``). Loading takes the weight's over; the input's must be the layer's.
    Graphs:
        May be captured in a CUDA graph once it was called with so many rows: a tensor ``x`` is quantized by :func:`collogue.quantize`, one
        kernel.
    Raises:
        ArgumentError: an output without codes, a weight that is not quantized. ShapeError: codes, features or a bias of another shape.
        DTypeError: codes where there is no activation format, another dtype for results. DeviceError, LayoutError: ``x`` lies on another
        device, or is not strided. FormatError: no format, a block that does not divide, scales that the
        activation format does not have. Loading a state also ScaleError: another static scale of the input, scales that are not positive
        and finite; ShapeError, DTypeError: tensors of another scheme.
    Examples:
        >>> linear = torch.nn.Linear(64, 128, dtype=torch.bfloat16)
        >>> layer = collogue.nn.ScaledLinear.of(linear, collogue.FP8PerToken(), activation=collogue.FP8PerToken())
        >>> out = comm.all_reduce(partial, residual=residual, norm=collogue.RMSNorm(weight), quant=layer.activation)
        >>> list(layer(out).shape)  # reads out.codes and out.scales: nothing is quantized twice
        [4, 128]
    """

    def __init__(
        self, weight: QuantizedWeight, bias: Tensor | None = None, *, activation: Quant | None = None, dtype: torch.dtype = torch.bfloat16
    ) -> None:
        if not isinstance(weight, QuantizedWeight):
            raise ArgumentError(
                f"weight is a {type(weight).__name__}; expected a QuantizedWeight",
                hint="pass collogue.nn.QuantizedWeight.of(weight, format), or use ScaledLinear.of(linear, format)",
            )
        super().__init__(weight, bias, activation, dtype)

    @classmethod
    def of(cls, linear: nn.Linear, format: WeightFormat, *, activation: Quant | None = None) -> ScaledLinear:
        """A layer with the weight of ``linear``, quantized here.

        Raises as :meth:`QuantizedWeight.of` does, and :class:`ArgumentError` where ``linear`` is not a plain ``nn.Linear``: a subclass with
        a forward of its own, a quantized layer, one with hooks.
        """
        check_linear(linear, "the layer", meta=True)
        bias = None if linear.bias is None else linear.bias.detach()
        return cls(QuantizedWeight.of(linear.weight, format), bias, activation=activation, dtype=linear.weight.dtype)

    def forward(self, x: Tensor | Output) -> Tensor:
        """``x``: ``[.., I]`` of values, which are quantized here, or an :class:`collogue.Output` of a call with ``quant=activation``.
        Returns ``[.., O]``; for an output ``[T, O]``.
        """
        return self.product(x, self.bias)


def _check_arguments(weight: object, bias: object, activation: object) -> None:
    if activation is not None:
        check_format("activation", activation)
    if not isinstance(weight, Tensor | QuantizedWeight) or len(weight.shape) != 2:
        found = list(weight.shape) if isinstance(weight, Tensor) else f"a {type(weight).__name__}"
        raise ShapeError(f"weight is {found}; expected [O, I]", hint="pass a matrix or a QuantizedWeight")
    if bias is not None and (not isinstance(bias, Tensor) or bias.shape != (weight.shape[0],)):
        found = list(bias.shape) if isinstance(bias, Tensor) else f"a {type(bias).__name__}"
        raise ShapeError(f"bias is {found}; expected [{weight.shape[0]}]", hint="pass one element for each output feature, or None")


def check_like(name: str, given: Tensor, own: Tensor, whose: str, hint: str) -> None:
    """Raise where a tensor of a state has another dtype or shape than a layer's ``own``."""
    if (given.dtype, given.shape) != (own.dtype, own.shape):
        raise (ShapeError if given.dtype == own.dtype else DTypeError)(
            f"{name} of the state is {given.dtype} {list(given.shape)}, {whose} {own.dtype} {list(own.shape)}", hint=hint
        )


def _differ(given: Tensor, activation: Quant) -> bool:
    """Whether a state's number is another than the activation's, where both are known."""
    if given.is_meta or (isinstance(activation.given_scale, Tensor) and activation.given_scale.is_meta):
        return False
    own = factor_of(activation, given.device)
    return own is not None and not torch.equal(given, own)


def _dtype_of_product(device: torch.device) -> torch.dtype:
    return torch.float32 if device.type == "cpu" else torch.bfloat16


def _no_autocast(device: torch.device) -> AbstractContextManager[Any]:
    on = torch.amp.is_autocast_available(device.type) and torch.is_autocast_enabled(device.type)
    return torch.autocast(device.type, enabled=False) if on else nullcontext()


@functools.cache
def _say_once(text: str) -> None:
    _log.info(text)


def factor_of(format: object, device: torch.device) -> Tensor | None:
    """The number that a format holds, as products take it; ``None`` for formats that hold none."""
    scale = getattr(format, "given_scale", None)
    if scale is None:
        return None
    if isinstance(scale, Tensor):
        return scale.to(device).reshape(1, 1)
    return torch.full((1, 1), scale, dtype=torch.float32, device=device)

"""Quantization formats: what a call asks for, and their labels.

Formats are plain data. They check themselves when they are made (kind, range, options) and know nothing of ranks, devices or kernels.
What needs a hidden size is checked by :meth:`Quant.check_hidden_size`.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass, fields
from itertools import product
from typing import Any, ClassVar, Literal, TypeAlias, get_args, get_origin, get_type_hints

import torch

from collogue.contract.number import check_local, is_number, is_scale, is_whole
from collogue.errors import FormatError, ScaleError

ScaleLayout = Literal["128x4", "8x4", "linear"]
GroupLayout = Literal["row", "column"]
Rounding = Literal["floor", "ceil"]

E4M3_MAX = 448.0
E2M1_MAX = 6.0
#: Smallest scale (a divisor) of the dynamic FP8 formats unless a consumer needs another.
SMALLEST_SCALE = 1.0 / (448.0 * 512.0)
#: A global scale of NVFP4 lies below ``2**GLOBAL_SCALE_BITS``: divided by the smallest block scale, ``2**-9``, it is finite in float32.
GLOBAL_SCALE_BITS = 119


def _check_choice(kind: str, name: str, value: object, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise FormatError(f"{kind}.{name} is {value!r}", hint=f"choose one of {', '.join(map(repr, choices))}")


def _check_scale(kind: str, name: str, value: object, *, validate: bool) -> None:
    """A scale is a Python number or a float32 tensor of one element; numbers and CPU tensors are read, CUDA tensors on request."""
    if isinstance(value, torch.Tensor):
        check_local(f"{kind}.{name}", value)
        if value.dtype != torch.float32 or value.numel() != 1:
            raise ScaleError(
                f"{kind}.{name} is a tensor of dtype {value.dtype} with {value.numel()} elements",
                hint="pass a Python float or a float32 tensor with one element",
            )
        if value.device.type != "cpu" and not validate:
            return
        number = float(value)
    elif is_number(value):
        number = float(value)
    else:
        raise ScaleError(
            f"{kind}.{name} must be a number or a tensor, got {type(value).__name__}",
            hint="pass a Python float or a float32 tensor with one element",
        )
    most = GLOBAL_SCALE_BITS if name == "global_scale" else 128
    if not is_scale(number, most):
        raise ScaleError(
            f"{kind}.{name} must be positive and finite, above 2**-128 and below 2**{most}, got {number}",
            hint=f"see help(collogue.{kind})",
        )


def _check_smallest(kind: str, value: float) -> None:
    _check_scale(kind, "smallest", value, validate=True)
    if isinstance(value, torch.Tensor) or not 2.0**-126 <= value <= 1.0:
        raise ScaleError(f"{kind}.smallest is {value!r}", hint="pass a Python float between 2**-126 and 1")


@dataclass(frozen=True, eq=False)
class Quant:
    """Base of the quantization formats. ``block`` elements of a row share one scale (0: the format has other scales).

    Examples:
        >>> quant = collogue.FP8Group(32)
        >>> (quant.block, quant.element, quant.scale_dtype)
        (32, 'e4m3', torch.float32)
    """

    #: ``"e4m3"`` (one byte an element) or ``"e2m1"`` (two codes a byte, lower nibble first).
    element: ClassVar[Literal["e4m3", "e2m1"]]
    name: ClassVar[str]

    @property
    def block(self) -> int:
        """Elements of a row that share one scale; 0 where a scale spans the row or the tensor."""
        return 0

    @property
    def given_scale(self) -> float | torch.Tensor | None:
        """The scale that the caller gives for the whole tensor, if the format has one."""
        return None

    @property
    def scale_dtype(self) -> torch.dtype | None:
        """dtype of one scale in ``out.scales``; ``None`` where the format returns none."""
        return None

    @functools.cached_property
    def label(self) -> str:
        """:func:`describe` of this format: what of it a kernel is compiled for."""
        return describe(self)

    def check_hidden_size(self, hidden_size: int) -> None:
        """Raise :class:`FormatError` unless ``hidden_size`` is a multiple of the block."""
        if self.block and hidden_size % self.block:
            raise FormatError(
                f"{self.name} has blocks of {self.block} elements; hidden size {hidden_size} is not a multiple",
                hint=f"use a hidden size that is a multiple of {self.block}, or another format",
            )


@dataclass(frozen=True, eq=False)
class NVFP4(Quant):
    """E2M1 codes, one E4M3 scale per 16 elements, one global scale.

    ``sf = e4m3(g * (amax * (1/6)))`` saturating, ``code = e2m1(n * (g / sf))`` or 0 where ``sf`` is 0. Decoded: ``code * sf / g``.

    Args:
        global_scale: ``g``, a **multiplier**: ``448 * 6 / amax`` of the tensor. Number or one-element float32 tensor.
            A tensor is read with the inputs: the kernel just before may write it.
        layout: of the scales: ``"128x4"``, ``"8x4"`` or ``"linear"``.
        validate: also read a CUDA tensor's value (synchronizes) and reject one that is not positive and finite.
    Examples:
        >>> amax = partial.abs().amax()
        >>> comm.all_reduce(partial, quant=collogue.NVFP4(448 * 6 / float(amax)))
        Output(reduced=bfloat16[4, 64], codes=uint8[4, 32], scales=float8_e4m3fn[128, 4] on cpu)
    """

    global_scale: float | torch.Tensor
    layout: ScaleLayout = "128x4"
    validate: bool = False
    element: ClassVar[Literal["e4m3", "e2m1"]] = "e2m1"
    name: ClassVar[str] = "NVFP4"

    def __post_init__(self) -> None:
        _check_choice(self.name, "layout", self.layout, ("128x4", "8x4", "linear"))
        _check_scale(self.name, "global_scale", self.global_scale, validate=self.validate)

    @property
    def given_scale(self) -> float | torch.Tensor:
        return self.global_scale

    @property
    def scale_dtype(self) -> torch.dtype:
        return torch.float8_e4m3fn

    @property
    def block(self) -> int:
        return 16


@dataclass(frozen=True, eq=False)
class _MX(Quant):
    rounding: Rounding
    layout: ScaleLayout = "128x4"

    def __post_init__(self) -> None:
        _check_choice(self.name, "rounding", self.rounding, ("floor", "ceil"))
        _check_choice(self.name, "layout", self.layout, ("128x4", "8x4", "linear"))

    @property
    def scale_dtype(self) -> torch.dtype:
        return torch.float8_e8m0fnu

    @property
    def block(self) -> int:
        return 32


@dataclass(frozen=True, eq=False)
class MXFP8(_MX):
    """E4M3 codes, one E8M0 scale ``2**k`` (a **divisor**) per 32 elements.

    Args:
        rounding: ``"floor"``: ``k = floor(log2 amax) - 8`` (OCP text); ``"ceil"``: smallest power of two not below ``amax / 448`` (RCEIL).
        layout: of the scales: ``"128x4"``, ``"8x4"`` or ``"linear"``.
    Examples:
        >>> comm.all_reduce(partial, quant=collogue.MXFP8("ceil", layout="linear"))
        Output(reduced=bfloat16[4, 64], codes=float8_e4m3fn[4, 64], scales=float8_e8m0fnu[4, 2] on cpu)
    """

    element: ClassVar[Literal["e4m3", "e2m1"]] = "e4m3"
    name: ClassVar[str] = "MXFP8"


@dataclass(frozen=True, eq=False)
class MXFP4(_MX):
    """E2M1 codes, one E8M0 scale ``2**k`` (a **divisor**) per 32 elements.

    Args:
        rounding: ``"floor"``: ``k = floor(log2 amax) - 2`` (OCP text); ``"ceil"``: smallest power of two not below ``amax / 6`` (RCEIL).
        layout: of the scales: ``"128x4"``, ``"8x4"`` or ``"linear"``.
    Examples:
        >>> codes, scales = collogue.quantize(partial, collogue.MXFP4("floor"))
        >>> (list(codes.shape), list(scales.shape))
        ([4, 32], [128, 4])
    """

    element: ClassVar[Literal["e4m3", "e2m1"]] = "e2m1"
    name: ClassVar[str] = "MXFP4"


@dataclass(frozen=True, eq=False)
class FP8Static(Quant):
    """E4M3 codes under one given scale: ``code = e4m3_sat(n * (1 / scale))``.

    Args:
        scale: a **divisor**. Number or one-element float32 tensor. ``out.scales`` is ``None``: the caller has it.
            A tensor is read with the inputs: the kernel just before may write it.
        validate: also read a CUDA tensor's value (synchronizes) and reject one that is not positive and finite.
    Examples:
        >>> comm.all_reduce(partial, quant=collogue.FP8Static(scale=0.5))
        Output(reduced=bfloat16[4, 64], codes=float8_e4m3fn[4, 64] on cpu)
    """

    scale: float | torch.Tensor
    validate: bool = False
    element: ClassVar[Literal["e4m3", "e2m1"]] = "e4m3"
    name: ClassVar[str] = "FP8Static"

    def __post_init__(self) -> None:
        _check_scale(self.name, "scale", self.scale, validate=self.validate)

    @property
    def given_scale(self) -> float | torch.Tensor:
        return self.scale


@dataclass(frozen=True, eq=False)
class FP8PerToken(Quant):
    """E4M3 codes, one float32 scale (a **divisor**) per token.

    ``scale = max(amax / 448, smallest)``, ``code = e4m3_sat(n / scale)``.

    Examples:
        >>> comm.all_reduce(partial, quant=collogue.FP8PerToken())
        Output(reduced=bfloat16[4, 64], codes=float8_e4m3fn[4, 64], scales=float32[4, 1] on cpu)
    """

    smallest: float = SMALLEST_SCALE
    element: ClassVar[Literal["e4m3", "e2m1"]] = "e4m3"
    name: ClassVar[str] = "FP8PerToken"

    def __post_init__(self) -> None:
        _check_smallest(self.name, self.smallest)

    @property
    def scale_dtype(self) -> torch.dtype:
        return torch.float32


@dataclass(frozen=True, eq=False)
class FP8Group(Quant):
    """E4M3 codes, one scale (a **divisor**) per ``group_size`` elements.

    ``scale = max(amax / 448, smallest)``, ``code = e4m3_sat(n / scale)``.

    Args:
        group_size: a multiple of 16 that divides the hidden size.
        scale_format: ``"float32"``, or ``"ue8m0"``: the scale rounded up to a power of two.
        layout: ``"row"``: ``[T, H / group_size]`` row-major. ``"column"``: column-major with the columns
            ``round_up(T, 4)`` apart (TMA-aligned); ``"ue8m0"`` then packs four exponents in an int32.
        smallest: lower bound of the scale, from ``2**-126`` to 1.
    Examples:
        >>> codes, scales = collogue.quantize(partial, collogue.FP8Group(32, layout="column"))
        >>> (list(scales.shape), scales.stride())
        ([4, 2], (1, 4))
    """

    group_size: int = 128
    scale_format: Literal["float32", "ue8m0"] = "float32"
    layout: GroupLayout = "row"
    smallest: float = SMALLEST_SCALE
    element: ClassVar[Literal["e4m3", "e2m1"]] = "e4m3"
    name: ClassVar[str] = "FP8Group"

    def __post_init__(self) -> None:
        if not is_whole(self.group_size) or self.group_size < 16 or self.group_size % 16:
            raise FormatError(f"FP8Group.group_size is {self.group_size!r}", hint="use a multiple of 16, usually 128")
        _check_choice(self.name, "scale_format", self.scale_format, ("float32", "ue8m0"))
        _check_choice(self.name, "layout", self.layout, ("row", "column"))
        _check_smallest(self.name, self.smallest)

    @property
    def scale_dtype(self) -> torch.dtype:
        return torch.float32 if self.scale_format == "float32" else torch.float8_e8m0fnu

    @property
    def block(self) -> int:
        return self.group_size


#: The formats that return scales.
Scaled: TypeAlias = NVFP4 | MXFP4 | MXFP8 | FP8PerToken | FP8Group

#: The formats by the first part of their label.
FAMILIES: dict[str, type[Quant]] = {
    "nvfp4": NVFP4,
    "mxfp4": MXFP4,
    "mxfp8": MXFP8,
    "fp8_static": FP8Static,
    "fp8_per_token": FP8PerToken,
    "fp8_group": FP8Group,
}

_NAMES = {kind: name for name, kind in FAMILIES.items()}


def _options(kind: type[Quant]) -> dict[str, tuple[str, ...]]:
    """The options of ``kind``: its fields in their order, and the choices of each."""
    hints = get_type_hints(kind)
    return {f.name: get_args(hints[f.name]) for f in fields(kind) if get_origin(hints[f.name]) is Literal}


#: What a label says after its first part, by kind: the options and their choices.
_OPTIONS = {kind: _options(kind) for kind in FAMILIES.values()}


def variants(family: str) -> tuple[str, ...]:
    """The labels of every choice of options of a family of :data:`FAMILIES`; of ``fp8_group`` those of the usual size."""
    kind = FAMILIES[family]
    head = f"{family}{FP8Group.group_size}" if kind is FP8Group else family
    return tuple("/".join((head, *choice)) for choice in product(*_OPTIONS[kind].values()))


def describe(value: Quant | None) -> str:
    """A quantization format or ``None`` as a short label: ``"nvfp4/128x4"``, ``"fp8_group64/ue8m0/column"``, ``"none"``.

    Scales and other numbers are not part of it. :func:`parse` is the inverse.
    """
    if value is None:
        return "none"
    family = _NAMES[type(value)]
    head = f"{family}{value.group_size}" if isinstance(value, FP8Group) else family
    return "/".join((head, *(getattr(value, name) for name in _OPTIONS[type(value)])))


def parse(
    label: str,
    *,
    global_scale: float | torch.Tensor = 1.0,
    static_scale: float | torch.Tensor = 1.0,
    smallest: float = SMALLEST_SCALE,
) -> Quant | None:
    """The format that :func:`describe` calls ``label``; options left out take their defaults (``"floor"`` for the rounding of MX).

    Args:
        label: ``"none"``, or a name of :data:`FAMILIES` and then options in any order, each after a ``/``. A number after
            ``fp8_group`` is the group size.
        global_scale: the multiplier of NVFP4.
        static_scale: the divisor of FP8Static.
        smallest: the least scale, where the format has one.
    """
    if label == "none":
        return None
    head, *suffixes = label.split("/")
    family = head.rstrip("0123456789") if head.startswith("fp8_group") else head
    options: dict[str, Any] = {}
    if family not in FAMILIES:
        raise FormatError(f"unknown format {label!r}", hint=f"choose one of none, {', '.join(FAMILIES)}")
    if head != family:
        options["group_size"] = int(head.removeprefix(family))
    kind = FAMILIES[family]
    choices = {choice: name for name, some in _OPTIONS[kind].items() for choice in some}
    for suffix in suffixes:
        option = choices.get(suffix)
        if option is None or option in options:
            raise FormatError(f"{family} has no option {suffix!r} here", hint=f"options are {', '.join(choices) or 'none at all'}")
        options[option] = suffix
    if kind is NVFP4:
        options["global_scale"] = global_scale
    if kind is FP8Static:
        options["scale"] = static_scale
    if hasattr(kind, "smallest"):
        options["smallest"] = smallest
    if issubclass(kind, _MX):
        options.setdefault("rounding", "floor")
    return kind(**options)


def check_format(name: str, quant: object) -> None:
    """Raise :class:`FormatError` unless the argument ``name`` is an object of a format."""
    if type(quant) not in FAMILIES.values():
        what = f"the class {quant.__name__}" if isinstance(quant, type) else f"a {type(quant).__name__}: {quant!r}"
        raise FormatError(
            f"{name} is {what}; expected an object of {', '.join(kind.__name__ for kind in FAMILIES.values())}",
            hint="pass a format such as collogue.FP8PerToken() or collogue.NVFP4(global_scale)",
        )


#: Formats that a term may travel in.
WIRE_FORMATS = (FP8Group, FP8PerToken, MXFP8)


def check_wire(wire: Quant | None, hidden_size: int) -> None:
    """Raise :class:`FormatError` unless terms of ``hidden_size`` can travel so."""
    if wire is None:
        return
    if type(wire) not in WIRE_FORMATS:
        raise FormatError(
            f"wire is {wire!r}; expected an object of {', '.join(kind.__name__ for kind in WIRE_FORMATS)}",
            hint="pass a format such as collogue.FP8Group(128), or leave wire out",
        )
    wire.check_hidden_size(hidden_size)

"""What a pattern code asks for: FlashInfer's integers as a norm, a format and the outputs to return."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch

from collogue.contract.quant import MXFP8, NVFP4, FP8Group, FP8PerToken, FP8Static, Quant, ScaleLayout
from collogue.errors import ArgumentError, FormatError, ScaleError


class AllReduceFusionPattern:
    """Codes of the fusion patterns, as ``flashinfer.comm`` numbers them.

    Examples:
        >>> collogue.flashinfer.AllReduceFusionPattern.kARResidualRMSNorm
        1
    """

    kAllReduce = 0
    kARResidualRMSNorm = 1
    kARResidualRMSNormFP8Quant = 2
    kARResidualRMSNormFP4Quant = 3
    kARResidualRMSNormOutFP8Quant = 4
    kARResidualRMSNormOutFP4Quant = 5
    kMoEReductionARResidualRMSNorm = 6
    kMoEFinalizeARResidualRMSNorm = 7
    kARResidualRMSNormPerTokenGroupFP8PackedQuant = 8
    kARResidualRMSNormOutPerTokenGroupFP8PackedQuant = 9
    kARResidualRMSNormDynamicFP8Quant = 10
    kARResidualRMSNormOutDynamicFP8Quant = 11
    kMoEFinalizeARResidualRMSNormFP8Quant = 12
    kARResidualRMSNormMXFP8Quant = 13
    kARResidualRMSNormOutMXFP8Quant = 14


class QuantizationSFLayout:
    """Codes of the layouts of NVFP4's block scales.

    Examples:
        >>> collogue.flashinfer.QuantizationSFLayout.SWIZZLED_128x4
        0
    """

    SWIZZLED_128x4 = 0
    SWIZZLED_8x4 = 1
    LINEAR = 2


Family = Literal["none", "fp8_static", "nvfp4", "fp8_group", "fp8_per_token", "mxfp8"]


@dataclass(frozen=True)
class Form:
    """A pattern taken apart: with residual and norm or without, the format, and whether the norm is returned beside its codes."""

    norm: bool
    family: Family = "none"
    keep_norm: bool = False


_FORMS = {
    0: Form(norm=False),
    1: Form(norm=True),
    2: Form(norm=True, family="fp8_static"),
    3: Form(norm=True, family="nvfp4"),
    4: Form(norm=True, family="fp8_static", keep_norm=True),
    5: Form(norm=True, family="nvfp4", keep_norm=True),
    8: Form(norm=True, family="fp8_group"),
    9: Form(norm=True, family="fp8_group", keep_norm=True),
    10: Form(norm=True, family="fp8_per_token"),
    11: Form(norm=True, family="fp8_per_token", keep_norm=True),
    13: Form(norm=True, family="mxfp8"),
    14: Form(norm=True, family="mxfp8", keep_norm=True),
}
#: Patterns whose term is computed from experts' outputs: ``experts.py``.
WITH_EXPERTS = (6, 7, 12)
_LAYOUTS: dict[int, ScaleLayout] = {0: "128x4", 1: "8x4", 2: "linear"}
#: Smallest scale of the packed group formats; FlashInfer's own bound, before it rounds up to a power of two.
_SMALLEST_GROUP_SCALE = 1e-10


def form_of(pattern: int) -> Form:
    """The form of a pattern code. Raises :class:`ArgumentError` for those with experts, which take other arguments."""
    if pattern in WITH_EXPERTS:
        raise ArgumentError(f"pattern {pattern} takes experts", hint="call allreduce_fusion, or one of the trtllm_moe_ functions")
    if pattern not in _FORMS:
        raise ArgumentError(f"unknown pattern {pattern!r}", hint="use a constant of AllReduceFusionPattern")
    return _FORMS[pattern]


def quant_of(form: Form, scale_factor: torch.Tensor | float | None, layout_code: int | None, group_size: int | None) -> Quant | None:
    """The format of a call. Arguments that the pattern does not use are not looked at, as in FlashInfer."""
    if form.family == "none":
        return None
    if form.family == "fp8_per_token":
        return FP8PerToken()
    if form.family == "fp8_group":
        if group_size is None:
            raise FormatError("block_quant_group_size is not given", hint="patterns 8 and 9 need it; usually 128")
        return FP8Group(group_size, "ue8m0", "column", smallest=_SMALLEST_GROUP_SCALE)
    if form.family == "mxfp8":
        layout = _layout(layout_code)
        if layout == "8x4":
            raise FormatError("MXFP8 scales in the 8x4 layout", hint="patterns 13 and 14 take SWIZZLED_128x4 or LINEAR")
        return MXFP8("ceil", layout)
    if scale_factor is None:
        raise ScaleError(
            "scale_factor is not given", hint="FP8 patterns take a divisor, FP4 patterns a multiplier: a float or a one-element tensor"
        )
    if isinstance(scale_factor, torch.Tensor) and scale_factor.dtype != torch.float32:
        scale_factor = scale_factor.float()
    if form.family == "fp8_static":
        return FP8Static(scale_factor)
    return NVFP4(scale_factor, _layout(layout_code))


def _layout(code: int | None) -> ScaleLayout:
    layout = _LAYOUTS.get(0 if code is None else code)
    if layout is None:
        raise FormatError(f"unknown layout code {code!r}", hint="use a constant of QuantizationSFLayout")
    return layout

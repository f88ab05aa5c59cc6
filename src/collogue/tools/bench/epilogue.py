"""The epilogue as PyTorch operations, for ``torch.compile``: what follows another library's all-reduce in the baselines.

``y = round(total + residual)``, ``n = round(y * rsqrt(mean(y**2) + eps) * weight)``, and one of a few formats. The same mathematics as the
numerical contract, but in the order in which the compiler adds, and with its division and root; so it is compared within bounds.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F

from collogue.contract.quant import E2M1_MAX, E4M3_MAX, NVFP4, SMALLEST_SCALE, FP8Group, FP8PerToken, FP8Static, Quant
from collogue.contract.reference import dequantize
from collogue.contract.spec import Output

#: (total, residual, weight, given scale) -> y, and n or codes and scales.
Epilogue = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor], tuple[torch.Tensor, ...]]
#: (values, given scale) -> codes and scales; values where there is no format.
Encoder = Callable[[torch.Tensor, torch.Tensor], tuple[torch.Tensor, ...]]

#: Formats that the compiled baselines have.
FORMATS = ("none", "fp8_static", "fp8_per_token", "nvfp4/128x4")
#: Bounds of the gate: relative root mean square error of the norm, and of the decoded codes, against the reference's own.
NORM_BOUND, CODES_BOUND = 2.0**-7, 2.0**-4


def epilogue(quant: Quant | None, eps: float) -> Epilogue:
    """The function for a format that :func:`encoder` knows."""
    encode = encoder(quant)

    def run(total: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor) -> tuple[torch.Tensor, ...]:
        y = (total.float() + residual.float()).to(total.dtype)
        wide = y.float()
        n = (wide * torch.rsqrt(wide.square().mean(dim=-1, keepdim=True) + eps) * weight.float()).to(total.dtype)
        return (y, *encode(n, scale))

    return run


def encoder(quant: Quant | None) -> Encoder:
    """The function for a format of :data:`FORMATS`, or FP8Group with float32 scales. Raises :class:`NotImplementedError` for others."""
    if quant is None:
        return lambda n, scale: (n,)
    if isinstance(quant, FP8Static):
        return lambda n, scale: (_e4m3(n.float() / scale),)
    if isinstance(quant, FP8PerToken):
        return _per_token
    if isinstance(quant, FP8Group) and quant.scale_format == "float32":
        return functools.partial(_groups, quant.group_size, quant.layout)
    if isinstance(quant, NVFP4) and quant.layout == "128x4":
        return _nvfp4
    raise NotImplementedError(f"no compiled epilogue for {quant.label}")


def _e4m3(x: torch.Tensor) -> torch.Tensor:
    return x.clamp(-E4M3_MAX, E4M3_MAX).to(torch.float8_e4m3fn)


def _per_token(n: torch.Tensor, scale: torch.Tensor) -> tuple[torch.Tensor, ...]:
    scales = (n.float().abs().amax(dim=-1, keepdim=True) / E4M3_MAX).clamp(min=SMALLEST_SCALE)
    return _e4m3(n.float() / scales), scales


def _groups(size: int, layout: str, n: torch.Tensor, scale: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Scales of layout ``"column"`` lie column by column, without padding."""
    groups = n.float().view(n.shape[0], -1, size)
    scales = (groups.abs().amax(dim=-1) / E4M3_MAX).clamp(min=SMALLEST_SCALE)
    codes = _e4m3(groups / scales[..., None]).view(n.shape)
    return codes, scales.t().contiguous().t() if layout == "column" else scales


def _nvfp4(n: torch.Tensor, scale: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """``scale`` is the multiplier. Codes two a byte, the lower nibble first; scales in layout 128x4, padding 0."""
    tokens, hidden = n.shape
    blocks = n.float().view(tokens, hidden // 16, 16)
    scales = _e4m3(scale * blocks.abs().amax(dim=-1) / E2M1_MAX)
    wide = scales.float()[..., None]
    x = torch.where(wide == 0, 0.0, blocks * (scale / wide))
    a = x.abs()
    # Ties go to the even code, so boundaries are open or closed by turns.
    code = (a > 0.25).to(torch.uint8) + (a >= 0.75) + (a > 1.25) + (a >= 1.75) + (a > 2.5) + (a >= 3.5) + (a > 5.0)
    code = (code + 8 * ((x < 0) & (code > 0))).to(torch.uint8).view(tokens, hidden // 2, 2)
    rows, columns = -(-tokens // 128), -(-(hidden // 16) // 4)
    raw = F.pad(scales.view(torch.uint8), (0, 4 * columns - hidden // 16, 0, 128 * rows - tokens))
    tiles = raw.view(rows, 4, 32, columns, 4).permute(0, 3, 2, 1, 4).reshape(128 * rows, 4 * columns)
    return code[..., 0] | (code[..., 1] << 4), tiles.view(torch.float8_e4m3fn)


def as_output(results: tuple[torch.Tensor, ...], quant: Quant | None) -> Output:
    """What :func:`epilogue` returned, by name."""
    if quant is None:
        return Output(residual=results[0], norm=results[1])
    return Output(residual=results[0], codes=results[1], scales=results[2] if len(results) > 2 else None)


def wrong(actual: Output, expected: Output, quant: Quant | None) -> str | None:
    """What is wrong with the outputs, if anything: y must be exact (its sum is), the rest within the bounds.

    Args:
        actual, expected: of the same call; ``expected`` by the reference.
    """
    assert actual.residual is not None
    assert expected.residual is not None
    if not torch.equal(actual.residual, expected.residual):
        return f"{int((actual.residual != expected.residual).sum())} elements of the residual differ from the exact sum"
    pair = (actual.norm, expected.norm)
    bound = NORM_BOUND
    if quant is not None:
        bound = CODES_BOUND
        pair = (_decoded(actual, quant), _decoded(expected, quant))
    mine, theirs = (x.double() for x in pair if x is not None)
    error = math.sqrt(float((mine - theirs).square().mean()) / max(float(theirs.square().mean()), 1e-30))
    return None if error <= bound else f"relative error {error:.3g} is above {bound:.3g}"


def _decoded(out: Output, quant: Quant) -> torch.Tensor:
    assert out.codes is not None
    assert out.residual is not None
    return dequantize(out.codes, out.scales, quant, hidden_size=out.residual.shape[1])


def compiled(quant: Quant | None, eps: float, example: tuple[Any, ...]) -> Epilogue:
    """:func:`epilogue`, compiled for the shapes of ``example`` and run once on them."""
    import torch._dynamo

    # All epilogues share their code, and each shape is a compilation of its own. Beyond the limit dynamo would run it uncompiled.
    torch._dynamo.config.recompile_limit = 1024
    torch._dynamo.config.fail_on_recompile_limit_hit = True
    function: Epilogue = torch.compile(epilogue(quant, eps), dynamic=False)
    function(*example)
    return function

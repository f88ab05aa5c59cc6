"""The rows of the demo's table: one quantization format each, with its scale calibrated where the format has one."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from collogue import Quant
from collogue.contract.quant import E2M1_MAX, E4M3_MAX, parse
from collogue.tools.demo.model import Cache, ShardedLlama

#: Rows of the table, as :func:`collogue.contract.quant.parse` reads them.
FORMATS = ("none", "fp8_static", "fp8_per_token", "fp8_group64", "mxfp8/ceil", "nvfp4", "mxfp4/ceil")


def calibrate(model: ShardedLlama, tokens: torch.Tensor) -> list[float]:
    """The largest absolute value of every fused call's norm over ``tokens``: the same on every rank, as the norms are."""
    amax = [0.0] * model.shape.fused_calls

    def observe(call: int, normed: torch.Tensor) -> None:
        amax[call] = float(normed.abs().max())

    model.forward(tokens, Cache(model, len(tokens)), [None] * model.shape.fused_calls, observe)
    return amax


def quants_for(name: str, amax: Sequence[float]) -> list[Quant | None]:
    """The format of every fused call. The last one feeds the vocabulary projection, which stays unquantized as in serving engines."""
    return [parse(name, static_scale=value / E4M3_MAX, global_scale=E4M3_MAX * E2M1_MAX / value) for value in amax[:-1]] + [None]

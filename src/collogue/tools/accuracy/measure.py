"""What is measured: logits of a sharded forward pass, their score against others, and the error of a format by layer."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from collogue.contract.calibration import Calibration
from collogue.contract.quant import Quant
from collogue.contract.reference import dequantize, quantize
from collogue.testing import VirtualGroup, run_virtual
from collogue.tools.accuracy.models import Model
from collogue.tools.accuracy.orders import Order, OrderedSum
from collogue.tools.demo.model import Cache, ShardedLlama


@dataclass(frozen=True)
class Score:
    """How far logits are from the expected ones, over T tokens.

    ``perplexity`` of the text; ``standard_error`` of its difference to the expected logits' perplexity; ``logit_rms`` and ``logit_max``:
    root mean square and largest difference of a logit, each row first shifted by its mean difference (which no probability sees);
    ``agreement``: share of positions where both have the same largest logit.
    """

    perplexity: float
    standard_error: float
    logit_rms: float
    logit_max: float
    agreement: float


@dataclass(frozen=True)
class Pass:
    """One forward pass: logits [T, V] float32 on the CPU, and the norm of every fused call if it was asked for."""

    logits: torch.Tensor
    norms: list[torch.Tensor]


def forward(
    model: Model,
    tokens: torch.Tensor,
    *,
    world_size: int,
    dtype: torch.dtype,
    order: Order,
    quants: Sequence[Quant | None] | None = None,
    keep_norms: bool = False,
    rows: Calibration | None = None,
    device: str = "cpu",
) -> Pass:
    """Run ``model`` on ``tokens`` [T] over virtual ranks. Matrix products are computed in float32 and rounded to ``dtype``.

    ``rows`` observes the inputs of row-parallel layers.
    """
    norms: list[torch.Tensor] = []
    parts = [Calibration() for _ in range(world_size)]

    def rank(group: VirtualGroup) -> torch.Tensor:
        llama = ShardedLlama(model.shape, model.weights, OrderedSum(group, dtype, order), gemm_dtype=torch.float32)
        if rows is not None:
            llama.observe_rows = parts[group.rank].observe

        def keep(call: int, normed: torch.Tensor) -> None:
            norms.append(normed.cpu())

        formats = quants or [None] * model.shape.fused_calls
        observe = keep if keep_norms and group.rank == 0 else None
        return llama.forward(tokens.to(group.device), Cache(llama, len(tokens)), formats, observe).float().cpu()

    logits = run_virtual(world_size, rank, device=device, timeout=600.0)
    if rows is not None:
        for part in parts:
            rows.merge(part)
    return Pass(torch.cat(logits, dim=1), norms)


def losses(logits: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    """The loss of token ``t + 1`` under ``logits[t]``: [T - 1] float64."""
    logits = logits[:-1]
    return (torch.logsumexp(logits, dim=-1) - logits.gather(1, tokens[1:, None])[:, 0]).double()


def score(logits: torch.Tensor, expected: torch.Tensor, tokens: torch.Tensor) -> Score:
    """Logits [T, V] against the expected ones."""
    mine, theirs = losses(logits, tokens), losses(expected, tokens)
    perplexity = math.exp(float(mine.mean()))
    difference = logits - expected
    difference -= difference.mean(dim=-1, keepdim=True)
    return Score(
        perplexity=perplexity,
        standard_error=perplexity * float((mine - theirs).std()) / len(mine) ** 0.5,
        logit_rms=float(difference.square().mean(dtype=torch.float64).sqrt()),
        logit_max=float(difference.abs().max()),
        agreement=float((logits.argmax(dim=-1) == expected.argmax(dim=-1)).double().mean()),
    )


def sqnr(n: torch.Tensor, quant: Quant) -> float:
    """Signal to quantization noise of ``n`` [T, H] in decibels: ``10 log10(sum n**2 / sum (n - decoded)**2)``, in float64."""
    codes, scales = quantize(n, quant)
    exact = n.double()
    noise = float((exact - dequantize(codes, scales, quant, hidden_size=n.shape[1]).double()).square().sum())
    signal = float(exact.square().sum())
    return 10 * math.log10(signal / noise) if noise and signal else math.inf if signal else 0.0


def clipped(n: torch.Tensor, limit: float) -> float:
    """Share of the elements whose absolute value is above ``limit``."""
    return float((n.float().abs() > limit).double().mean())

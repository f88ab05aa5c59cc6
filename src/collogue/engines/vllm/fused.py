"""The one fused call of both ways, and the communicators that serve it."""

from __future__ import annotations

from collections import Counter
from typing import Any

import torch
from torch import Tensor
from vllm.distributed import get_tp_group
from vllm.logger import init_logger

from collogue.communicator import Communicator
from collogue.contract.spec import VALUE_DTYPES, RMSNorm
from collogue.errors import CollogueError
from collogue.flashinfer.workspace import TIMEOUT, WATCH_INTERVAL, failed
from collogue.gpu.watch import Watch

logger = init_logger("vllm.collogue")

#: How many calls this process has made: ``fused``, and ``unfused`` where a call of the operator could not be.
counts: Counter[str] = Counter()

_communicators: dict[tuple[str, torch.dtype], tuple[Communicator | None, Watch | None]] = {}


def why_not() -> str:
    """Why this process's tensor-parallel group is not served; empty where it is. Needs vLLM's groups."""
    size = get_tp_group().world_size
    if size == 1:
        return "tensor-parallel size 1: there is nothing to reduce"
    return "" if size <= 8 else f"tensor-parallel size {size}: Collogue serves 2 to 8"


def communicator(group: str, like: Tensor, most: int) -> Communicator | None:
    """The communicator of vLLM's tensor-parallel group for rows like these. Collective at the first call. ``None`` where there is none."""
    key = (group, like.dtype)
    if key not in _communicators:
        _communicators[key] = _make(group, like, most)
    return _communicators[key][0]


def _make(group: str, like: Tensor, most: int) -> tuple[Communicator | None, Watch | None]:
    coordinator = get_tp_group()
    reason = f"{group} is not vLLM's tensor-parallel group" if coordinator.unique_name != group else why_not()
    if not reason:
        try:
            made = Communicator(
                coordinator.cpu_group, max_tokens=most, hidden_size=like.shape[-1], dtype=like.dtype, device=like.device, timeout=TIMEOUT
            )
        except CollogueError as error:
            reason = str(error).splitlines()[0]
        else:
            logger.info("served by Collogue: all-reduce + residual + RMSNorm in one call, %r", made)
            return made, made.watch(failed, WATCH_INTERVAL) if made.device.type == "cuda" else None
    logger.warning("not served by Collogue, all-reduce and norm stay apart: %s", reason)
    return None, None


def all_reduce_norm(
    partial: Tensor, residual: Tensor | None, weight: Tensor, eps: float, offset: float, group: str, most: int
) -> list[Tensor]:
    """``y = round(sum over ranks of partial + residual)`` and its RMSNorm: ``[norm, y]``, each ``[T, H]``.

    Args:
        partial: ``[T, H]``. residual: the same, or none. weight: ``[H]``; ``offset`` is added to it in float32.
        group: the unique name of vLLM's tensor-parallel group.
        most: tokens for which a communicator is made where there is none yet. A call of more, or one without a communicator, is
            vLLM's all-reduce and the same formula in PyTorch.
    Synchronization:
        Collective.
    """
    comm = communicator(group, partial, most)
    if comm is None or not comm.fits(*partial.shape):
        counts["unfused"] += 1
        return _apart(partial, residual, weight, eps, offset)
    counts["fused"] += 1
    rows = None if residual is None else residual.contiguous()
    made = comm.all_reduce(partial.contiguous(), residual=rows, norm=RMSNorm(weight.detach(), eps, offset))
    assert made.norm is not None
    assert made.residual is not None
    return [made.norm, made.residual]


def _apart(partial: Tensor, residual: Tensor | None, weight: Tensor, eps: float, offset: float) -> list[Tensor]:
    # vLLM's all-reduce on the CPU writes into its input, which is the caller's.
    summed: Tensor = get_tp_group().all_reduce(partial if partial.is_cuda else partial.clone())
    y = summed if residual is None else (summed.float() + residual.float()).to(partial.dtype)
    wide = y.float()
    rstd = torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    return [((wide * rstd) * (weight.float() + offset)).to(partial.dtype), y]


def _traced(partial: Tensor, *others: Any) -> list[Tensor]:
    return [partial.new_empty(partial.shape), partial.new_empty(partial.shape)]


def servable(rows: Tensor, weight: Tensor) -> bool:
    """Whether a norm of these rows (fake ones too) can be part of the call."""
    return rows.ndim == 2 and rows.dtype in VALUE_DTYPES and weight.dtype in (rows.dtype, torch.float32) and int(rows.shape[1]) % 8 == 0


_library: Any = torch.library.Library("collogue_vllm", "DEF")  # type: ignore[no-untyped-call]
_library.define(
    "all_reduce_norm(Tensor partial, Tensor? residual, Tensor weight, float eps, float offset, str group, int most) -> Tensor[]",
    tags=[torch.Tag.needs_contiguous_strides],
)
for _device in ("CPU", "CUDA"):
    _library.impl("all_reduce_norm", all_reduce_norm, _device)
torch.library.register_fake("collogue_vllm::all_reduce_norm", _traced, lib=_library)

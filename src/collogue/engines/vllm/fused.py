"""The one fused call of both ways, and the communicators that serve it."""

from __future__ import annotations

from collections import Counter
from typing import Any

import torch
from torch import Tensor

from collogue.communicator import Communicator
from collogue.contract import reference
from collogue.contract.formats import code_spec, scale_storage
from collogue.contract.quant import Quant
from collogue.contract.spec import VALUE_DTYPES, RMSNorm
from collogue.engines.pool import Pool
from collogue.engines.switch import logger_of
from collogue.engines.vllm.quantized import format_of, scale_form
from collogue.errors import GroupError

logger = logger_of("vllm.logger", "init_logger", "vllm.collogue")

#: How many calls this process has made: ``fused``, and ``unfused`` where a call of the operator could not be.
counts: Counter[str] = Counter()

_pool = Pool(logger)


def get_tp_group() -> Any:
    """vLLM's tensor-parallel group."""
    from vllm.distributed import get_tp_group

    return get_tp_group()


def why_not(config: Any) -> str:
    """Why an engine of this ``VllmConfig`` is not served; empty where it is. Needs vLLM's groups."""
    from vllm import envs

    size = get_tp_group().world_size
    if size == 1:
        return "tensor-parallel size 1: there is nothing to reduce"
    if size > 8:
        return f"tensor-parallel size {size}: Collogue serves 2 to 8"
    if envs.VLLM_BATCH_INVARIANT:
        return "VLLM_BATCH_INVARIANT is set"
    if getattr(config.parallel_config, "enable_dbo", False):
        return "dual-batch overlap runs layers on two streams at a time, a communicator works on one"
    return ""


def communicator(group: str, like: Tensor, most: int) -> Communicator | None:
    """The communicator of vLLM's tensor-parallel group for rows like these. Collective at the first call. ``None`` where there is none."""

    def of() -> Any:
        coordinator = get_tp_group()
        if coordinator.unique_name != group:
            raise GroupError(f"{group} is not vLLM's tensor-parallel group", hint="set COLLOGUE_VLLM=0")
        return coordinator.cpu_group

    return _pool.make(group, of, dtype=like.dtype, width=like.shape[-1], most=most, device=like.device)


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


def all_reduce_norm_quant(
    partial: Tensor,
    residual: Tensor | None,
    weight: Tensor,
    eps: float,
    offset: float,
    group: str,
    most: int,
    quant: str,
    scale: Tensor | None,
    smallest: float,
    keep_norm: bool,
) -> list[Tensor]:
    """:func:`all_reduce_norm` and the quantization of the norm: ``[y, codes, scales (but for FP8 static), norm (if kept)]``.

    ``quant`` is a format's label (:func:`collogue.contract.quant.describe`), ``scale`` the divisor of FP8 static or the multiplier of
    NVFP4, one element, and ``smallest`` the lower bound of scales. Scales have vLLM's shape (:func:`.scale_form`).
    """
    made = format_of(quant, scale, smallest)
    comm = communicator(group, partial, most)
    if comm is None or not comm.fits(*partial.shape):
        counts["unfused"] += 1
        norm, y = _apart(partial, residual, weight, eps, offset)
        codes, scales = reference.quantize(norm, made)
        return [y, codes, *_scales(scales, made, *norm.shape), *([norm] if keep_norm else [])]
    counts["fused"] += 1
    counts[quant] += 1
    rows = None if residual is None else residual.contiguous()
    done = comm.all_reduce(partial.contiguous(), residual=rows, norm=RMSNorm(weight.detach(), eps, offset), quant=made, keep_norm=keep_norm)
    assert done.residual is not None
    assert done.codes is not None
    return [done.residual, done.codes, *_scales(done.scales, made, *partial.shape), *([] if done.norm is None else [done.norm])]


def _scales(scales: Tensor | None, quant: Quant, tokens: int, hidden_size: int) -> list[Tensor]:
    """The scales in vLLM's form: the same memory."""
    form = scale_form(quant, tokens, hidden_size)
    if scales is None or form is None:
        return []
    shape, strides, dtype = form
    return [scale_storage(scales).view(dtype).as_strided(shape, strides)]


def _apart(partial: Tensor, residual: Tensor | None, weight: Tensor, eps: float, offset: float) -> list[Tensor]:
    # vLLM's all-reduce on the CPU writes into its input, which is the caller's.
    summed: Tensor = get_tp_group().all_reduce(partial if partial.is_cuda else partial.clone())
    y = summed if residual is None else (summed.float() + residual.float()).to(partial.dtype)
    wide = y.float()
    rstd = torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    return [((wide * rstd) * (weight.float() + offset)).to(partial.dtype), y]


def _traced(partial: Tensor, *others: Any) -> list[Tensor]:
    return [partial.new_empty(partial.shape), partial.new_empty(partial.shape)]


def _traced_quant(partial: Tensor, *others: Any) -> list[Tensor]:
    label, _, smallest, keep_norm = others[-4:]
    tokens, hidden_size = partial.shape
    quant = format_of(label, None, smallest)
    shape, dtype = code_spec(quant, tokens, hidden_size)
    form = scale_form(quant, tokens, hidden_size)
    rows = [partial.new_empty(partial.shape), partial.new_empty(shape, dtype=dtype)]
    if form is not None:
        rows.append(partial.new_empty_strided(form[0], form[1], dtype=form[2]))
    return [*rows, partial.new_empty(partial.shape)] if keep_norm else rows


def servable(rows: Tensor, weight: Tensor) -> bool:
    """Whether a norm of these rows (fake ones too) can be part of the call."""
    return rows.ndim == 2 and rows.dtype in VALUE_DTYPES and weight.dtype in (rows.dtype, torch.float32) and int(rows.shape[1]) % 8 == 0


_library: Any = torch.library.Library("collogue_vllm", "DEF")  # type: ignore[no-untyped-call]
_ARGUMENTS = "Tensor partial, Tensor? residual, Tensor weight, float eps, float offset, str group, int most"
_library.define(f"all_reduce_norm({_ARGUMENTS}) -> Tensor[]", tags=[torch.Tag.needs_contiguous_strides])
_library.define(
    f"all_reduce_norm_quant({_ARGUMENTS}, str quant, Tensor? scale, float smallest, bool keep_norm) -> Tensor[]",
    tags=[torch.Tag.needs_contiguous_strides],
)
for _device in ("CPU", "CUDA"):
    _library.impl("all_reduce_norm", all_reduce_norm, _device)
    _library.impl("all_reduce_norm_quant", all_reduce_norm_quant, _device)
torch.library.register_fake("collogue_vllm::all_reduce_norm", _traced, lib=_library)
torch.library.register_fake("collogue_vllm::all_reduce_norm_quant", _traced_quant, lib=_library)

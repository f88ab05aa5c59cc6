"""SGLang's hooks: Collogue in the place of its FlashInfer fusion layer, without FlashInfer.

Each hook is around a function of SGLang's and asks whether there is a communicator for the call; where there is none, SGLang's own
function runs. Communicators are made, and their kernels built, in SGLang's warm-up, which comes before every graph capture: until
then, and in processes that run no model, nothing is served.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from collogue.communicator import Communicator
from collogue.contract.quant import E4M3_MAX, FP8Group
from collogue.contract.spec import VALUE_DTYPES, Output, RMSNorm
from collogue.engines.pool import Pool
from collogue.engines.switch import Hook, logger_of, problems
from collogue.errors import PlatformError

_LAYER = "sglang.srt.layers.flashinfer_comm_fusion"
_APPLIES = "sglang.srt.layers.layer_boundary.residual.add_norm"
_NORMS = "sglang.srt.layers.layernorm"
_GROUPS = "sglang.srt.distributed.parallel_state"
_RUNNER = "sglang.srt.model_executor.runner.base_runner"
_REGISTRY = "sglang.srt.plugins.hook_registry"
_CONTEXT = "sglang.srt.runtime_context"
#: The lower bound of scales in SGLang's own quantization in groups: the bound of the largest magnitude, over E4M3's largest number.
_SMALLEST = 1e-10 / E4M3_MAX
#: Numbers of tokens up to which every one is prepared; beyond it, powers of two. Captured batches are padded to few sizes.
_EACH = 256

logger = logger_of("logging", "getLogger", "sglang.collogue")
pool = Pool(logger)


class _State:
    """Most rows that a fused call takes; 0 before the warm-up and where nothing is served."""

    most = 0


state = _State()


def why_not(model_runner: Any) -> str:
    """Why this model is not served; empty where it is."""
    from sglang.srt.runtime_context import get_disagg, get_exec, get_parallel

    parallel, options = get_parallel(), get_exec()
    if parallel.attn_dp_enabled:
        return "attention is data-parallel"
    if parallel.tp_size == 1:
        return "tensor-parallel size 1: there is nothing to reduce"
    if parallel.tp_size > 8:
        return f"tensor-parallel size {parallel.tp_size}: Collogue serves 2 to 8"
    if options.comm.flashinfer_allreduce_fusion_backend == "cutedsl":
        return "--flashinfer-allreduce-fusion-backend cutedsl was chosen"
    if options.deterministic.enable_deterministic_inference:
        return "deterministic inference is enabled"
    if options.overlap.enable_two_batch_overlap or get_disagg().enable_pdmux:
        return "batches overlap on two streams, a communicator works on one"
    if model_runner.dtype not in VALUE_DTYPES:
        return f"the model's dtype is {model_runner.dtype}"
    return ""


def warm_up(original: Callable[[Any], None], runner: Any) -> None:
    """Around ``BaseRunner._pre_initialize_flashinfer_allreduce_workspace``: the communicators and their kernels. Collective."""
    model = runner.model_runner
    reason = why_not(model)
    made = [] if reason else [comm for comm in map(_communicator, (True, False), (model, model)) if comm is not None]
    if not made:
        if reason:
            logger.warning("not served by Collogue: %s", reason)
        original(runner)
        return
    weight = torch.empty(made[0].hidden_size, dtype=model.dtype, device=made[0].device)
    for comm in dict.fromkeys(made):
        counts = [*range(1, min(comm.max_tokens, _EACH) + 1), *_doubled(_EACH, comm.max_tokens)]
        comm.prepare(counts, norm=RMSNorm(weight, 1e-6))
        comm.prepare(counts, residual=False)
    state.most = min(comm.max_tokens for comm in made)


def _doubled(first: int, last: int) -> list[int]:
    counts = []
    while first < last:
        first = min(2 * first, last)
        counts.append(first)
    return counts


def _communicator(attention: bool, model: Any) -> Communicator | None:
    """Of the attention layers' group or the experts', which may be one."""
    from sglang.srt.layers.flashinfer_comm_fusion import resolve_fusion_group
    from sglang.srt.runtime_context import get_schedule

    size, _, group = resolve_fusion_group(use_attn_tp_group=attention)
    if size == 1:
        return None
    schedule = get_schedule()
    chunk = schedule.chunked_prefill_size
    most = chunk if chunk is not None and chunk > 0 else schedule.max_prefill_tokens
    device = torch.device("cuda", torch.cuda.current_device()) if model.device == "cuda" else torch.device(model.device)
    width = model.model_config.hidden_size
    return pool.make(group.unique_name, lambda: group.cpu_group, dtype=model.dtype, width=width, most=most, device=device)


def applies(original: Callable[[int], bool], batch_size: int) -> bool:
    """Around ``flashinfer_ar_fusion_applies``: whether a layer leaves its sum of so many rows to the norm after it."""
    return 0 < batch_size <= state.most or original(batch_size)


def _of(group: Any, rows: Tensor) -> Communicator | None:
    """The communicator of SGLang's ``group`` for a call with these rows."""
    if rows.ndim != 2 or not rows.is_contiguous():
        return None
    comm = pool.get(group.unique_name, rows.dtype, rows.shape[1])
    return comm if comm is not None and 0 < rows.shape[0] <= comm.max_tokens else None


def _fused(
    x: Tensor, residual: Tensor, weight: Tensor, eps: float, attention: bool, quant: FP8Group | None = None, keep_norm: bool = False
) -> Output | None:
    from sglang.srt.layers.flashinfer_comm_fusion import resolve_fusion_group

    comm = _of(resolve_fusion_group(use_attn_tp_group=attention)[2], x)
    same = residual.shape == x.shape and residual.dtype == x.dtype and residual.is_contiguous()
    if comm is None or not same or weight.shape != x.shape[1:] or weight.dtype not in (x.dtype, torch.float32):
        return None
    return comm.all_reduce(x, residual=residual, norm=RMSNorm(weight.detach(), eps), quant=quant, keep_norm=keep_norm)


def all_reduce_norm(
    original: Callable[..., Any],
    input_tensor: Tensor,
    residual: Tensor,
    weight: Tensor,
    eps: float = 1e-6,
    *args: Any,
    use_attn_tp_group: bool = True,
    **kwargs: Any,
) -> Any:
    """Around ``flashinfer_allreduce_residual_rmsnorm``: ``(norm, y)`` of ``y = round(sum over ranks of input_tensor + residual)``."""
    made = None if args else _fused(input_tensor, residual, weight, eps, use_attn_tp_group)
    if made is None:
        return original(input_tensor, residual, weight, eps, *args, use_attn_tp_group=use_attn_tp_group, **kwargs)
    return made.norm, made.residual


def all_reduce_norm_quant(
    original: Callable[..., Any],
    norm_module: Any,
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor,
    group_size: int = 128,
    use_attn_tp_group: bool = True,
    keep_bf16: bool = False,
) -> Any:
    """Around ``_forward_with_allreduce_fusion_quant_per_group``: ``((codes, scales), y)``, or ``((norm, codes, scales), y)``.

    Codes and scales are those of :class:`FP8Group` in the layout of SGLang's matrix products: column-major, and packed UE8M0 where DeepGEMM
    takes it.
    """
    from sglang.srt.layers.deep_gemm_wrapper import DEEPGEMM_SCALE_UE8M0

    made = None
    if residual is not None and x.shape[-1] % group_size == 0:
        quant = FP8Group(group_size, "ue8m0" if DEEPGEMM_SCALE_UE8M0 else "float32", "column", smallest=_SMALLEST)
        made = _fused(x, residual, weight, norm_module.variance_epsilon, use_attn_tp_group, quant, keep_bf16)
    if made is None:
        return original(norm_module, x, residual, weight, group_size, use_attn_tp_group, keep_bf16)
    quantized = (made.codes, made.scales)
    return ((made.norm, *quantized) if keep_bf16 else quantized), made.residual


def can_all_reduce(original: Callable[..., bool], group: Any, input_: Tensor) -> bool:
    """Around ``GroupCoordinator._can_use_flashinfer_allreduce``: whether :func:`all_reduce` takes this sum."""
    return _of(group, input_) is not None or original(group, input_)


def all_reduce(original: Callable[..., Tensor], group: Any, input_: Tensor) -> Any:
    """Around ``GroupCoordinator._flashinfer_allreduce``: the sum over the ranks of a group, alone."""
    comm = _of(group, input_)
    return original(group, input_) if comm is None else comm.all_reduce(input_).reduced


def clean_up(original: Callable[[], None]) -> None:
    """Around ``cleanup_flashinfer_workspace``."""
    state.most = 0
    pool.close()
    original()


#: The functions of SGLang that are hooked, and what is around each.
_AROUND: tuple[tuple[Hook, Callable[..., Any]], ...] = (
    (Hook(_RUNNER, "BaseRunner._pre_initialize_flashinfer_allreduce_workspace"), warm_up),
    (Hook(_APPLIES, "flashinfer_ar_fusion_applies", ("batch_size",)), applies),
    (
        Hook(_LAYER, "flashinfer_allreduce_residual_rmsnorm", ("input_tensor", "residual", "weight", "eps", "use_attn_tp_group")),
        all_reduce_norm,
    ),
    (
        Hook(
            _NORMS,
            "_forward_with_allreduce_fusion_quant_per_group",
            ("norm_module", "x", "residual", "weight", "group_size", "use_attn_tp_group", "keep_bf16"),
        ),
        all_reduce_norm_quant,
    ),
    (Hook(_GROUPS, "GroupCoordinator._can_use_flashinfer_allreduce", ("input_",)), can_all_reduce),
    (Hook(_GROUPS, "GroupCoordinator._flashinfer_allreduce", ("input_",)), all_reduce),
    (Hook(_LAYER, "cleanup_flashinfer_workspace"), clean_up),
)
#: Everything of SGLang's that this file uses.
HOOKS = (
    *(hook for hook, _ in _AROUND),
    Hook(_LAYER, "resolve_fusion_group", ("use_attn_tp_group",)),
    Hook(_REGISTRY, "HookRegistry.register", ("target", "hook", "hook_type")),
    Hook(_REGISTRY, "HookType.AROUND"),
    *(Hook(_CONTEXT, name) for name in ("get_parallel", "get_exec", "get_schedule", "get_disagg")),
    Hook("sglang.srt.layers.deep_gemm_wrapper", "DEEPGEMM_SCALE_UE8M0"),
)


def install() -> str:
    """Register the hooks; SGLang applies them. Raises :class:`PlatformError` where this SGLang is not as we know it."""
    moved = problems(HOOKS)
    if moved:
        raise PlatformError(
            f"this SGLang has other hooks: {'; '.join(moved)}",
            hint="docs/engines.md names the version that was run",
        )
    registry = importlib.import_module(_REGISTRY)
    for hook, function in _AROUND:
        registry.HookRegistry.register(f"{hook.module}.{hook.name}", function, registry.HookType.AROUND)
    return "Collogue serves the fused all-reduce + residual + RMSNorm and the all-reduces of its groups, from the warm-up on"

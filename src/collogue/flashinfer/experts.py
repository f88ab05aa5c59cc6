"""FlashInfer's calls with experts (patterns 6, 7 and 12): the term of a rank is :class:`collogue.ExpertReduce` or ``ExpertCombine``."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, Literal

import torch

from collogue.contract.prologue import ExpertCombine, ExpertReduce
from collogue.contract.spec import Output
from collogue.errors import ArgumentError, ScaleError, ShapeError, UnsupportedError
from collogue.flashinfer.patterns import AllReduceFusionPattern, Form
from collogue.flashinfer.run import Epilogue, run, shaped, workspace_of_rank
from collogue.flashinfer.workspace import TRTLLMAllReduceFusionWorkspace

REDUCE = AllReduceFusionPattern.kMoEReductionARResidualRMSNorm
FINALIZE = AllReduceFusionPattern.kMoEFinalizeARResidualRMSNorm
FINALIZE_FP8 = AllReduceFusionPattern.kMoEFinalizeARResidualRMSNormFP8Quant

_NAMES = {
    REDUCE: (
        "moe_reduction_device_num_experts",
        "moe_reduction_scale_input",
        "moe_reduction_active_experts_token_input",
        "moe_reduction_token_input",
        "residual_in",
        "rms_gamma",
    ),
    FINALIZE: ("expanded_idx_to_permuted_idx", "residual_in", "rms_gamma"),
    FINALIZE_FP8: ("expanded_idx_to_permuted_idx", "residual_in", "rms_gamma", "scale_factor"),
}
_Buffers = dict[str, torch.Tensor | None]


def fused(workspace: TRTLLMAllReduceFusionWorkspace, pattern: int, buffers: _Buffers, given: dict[str, Any]) -> torch.Tensor:
    """Patterns 6, 7 and 12 of ``allreduce_fusion``, whose other arguments are ``given``. Returns what FlashInfer does."""
    for name in _NAMES[pattern]:
        if given[name] is None:
            raise ArgumentError(f"{name} is required for pattern {pattern}", hint=f"pattern {pattern} needs {', '.join(_NAMES[pattern])}")
    check_backend("moe_finalize_backend", given["moe_finalize_backend"])
    after = Epilogue(
        given["residual_in"],
        given["rms_gamma"],
        given["rms_eps"],
        given["weight_bias"],
        (given["scale_factor"], given["layout_code"], None),
        buffers,
        bool(given["launch_with_pdl"]),
    )
    if pattern == REDUCE:
        tokens, width = given["residual_in"].shape[0], given["residual_in"].shape[-1]
        experts, weights, expert_output, token_input = (given[name] for name in _NAMES[REDUCE][:4])
        return _first(buffers["norm_out"], reduce(workspace, tokens, width, experts, weights, expert_output, token_input, after).norm)
    index, weights, shared = (given[name] for name in ("expanded_idx_to_permuted_idx", "expert_scale_factor", "shared_expert_output"))
    made = finalize(workspace, pattern, given["input"], index, weights, shared, None, after)
    return _first(buffers["norm_out"], made.norm) if pattern == FINALIZE else _first(buffers["quant_out"], made.codes)


def reduce(
    workspace: TRTLLMAllReduceFusionWorkspace,
    tokens: int,
    width: int,
    experts: int,
    weights: torch.Tensor,
    expert_output: torch.Tensor,
    token_input: torch.Tensor,
    after: Epilogue,
) -> Output:
    """Pattern 6. Experts and weights are expert-major: ``[E, T, H]`` and ``[E, T]``, in any shape of as many elements."""
    if not isinstance(experts, int) or experts < 1:
        raise ArgumentError(f"moe_reduction_device_num_experts is {experts!r}", hint="pass the number of experts on this rank, an int")
    if after.buffers["norm_out"] is None:
        raise ArgumentError("norm_out is required for pattern 6", hint="the norm is always written: allocate it like residual_in")
    term = ExpertReduce(
        shaped("moe_reduction_active_experts_token_input", expert_output, experts, tokens, width),
        shaped("moe_reduction_scale_input", weights, experts, tokens),
        shaped("moe_reduction_token_input", token_input, tokens, width),
    )
    assert after.residual is not None
    scale, layout, _ = after.scaling
    form = Form(norm=True)
    if after.buffers["quant_out"] is not None:
        form = Form(norm=True, family="nvfp4", keep_norm=True)
        if isinstance(scale, torch.Tensor):
            raise ScaleError("scale_factor of pattern 6 is a tensor", hint="pass a float: FlashInfer itself puts 1.0 in a tensor's place")
    scaling = (1.0 if scale is None else scale, layout, None)
    after = replace(after, residual=shaped("residual_in", after.residual, tokens, width), scaling=scaling)
    return run(workspace, form, term, after, with_sum=after.buffers["output"] is not None)


def finalize(
    workspace: TRTLLMAllReduceFusionWorkspace,
    pattern: int,
    expert_output: torch.Tensor,
    index: torch.Tensor,
    weights: torch.Tensor | None,
    shared_expert: torch.Tensor | None,
    routed_scaling_factor: float | None,
    after: Epilogue,
) -> Output:
    """Patterns 7 and 12. T and H are those of the residual, K is the last dimension of ``index``."""
    form = Form(norm=True)
    if pattern == FINALIZE_FP8:
        form = Form(norm=True, family="fp8_static")
        if after.buffers["norm_out"] is not None:
            raise ArgumentError("norm_out is given to pattern 12", hint="it has codes alone; pattern 7 returns the norm")
    elif after.buffers["quant_out"] is not None or after.buffers["scale_out"] is not None:
        raise UnsupportedError(
            "quant_out or scale_out is given to pattern 7",
            hint="FlashInfer gives its codes no global scale: quantize the norm, or use 12",
        )
    assert after.residual is not None
    width = after.residual.shape[-1]
    tokens = after.residual.numel() // max(width, 1)
    if index.ndim < 1 or expert_output.shape[-1:] != (width,):
        raise ShapeError(
            f"index map {list(index.shape)}, expert output {list(expert_output.shape)}, residual_in {list(after.residual.shape)}",
            hint="pass an index map [T, K] and expert outputs [P, H] beside residual_in [T, H]",
        )
    slots = index.shape[-1]
    term = ExpertCombine(
        expert_output,
        shaped("expanded_idx_to_permuted_idx", index, tokens, slots),
        None if weights is None else shaped("expert_scale_factor", weights, tokens, slots),
        None if shared_expert is None else shaped("shared_expert_output", shared_expert, tokens, width),
        1.0 if routed_scaling_factor is None else routed_scaling_factor,
    )
    return run(workspace, form, term, replace(after, residual=shaped("residual_in", after.residual, tokens, width)))


def trtllm_moe_allreduce_fusion(
    world_size: int,
    world_rank: int,
    token_num: int,
    hidden_dim: int,
    workspace_ptrs: torch.Tensor,
    launch_with_pdl: bool,
    residual_in: torch.Tensor,
    rms_gamma: torch.Tensor,
    rms_eps: float,
    scale_factor: float,
    moe_reduction_device_num_experts: int,
    moe_reduction_scale_input: torch.Tensor,
    moe_reduction_active_experts_token_input: torch.Tensor,
    moe_reduction_token_input: torch.Tensor,
    layout_code: int | None,
    moe_allreduce_out: torch.Tensor | None,
    residual_out: torch.Tensor | None,
    norm_out: torch.Tensor | None,
    quant_out: torch.Tensor | None,
    scale_out: torch.Tensor | None,
    weight_bias: float | None = None,
    *,
    backend: Literal["trtllm", "cake"] = "trtllm",
) -> None:
    """Pattern 6 under its older name: every local expert's rows are weighted and added, then summed over the ranks.

    ``a_t = sum_e x[e, t] * w[e, t] + token_input[t]`` by :class:`collogue.ExpertReduce`; then residual and norm as in pattern 1.

    Args:
        moe_reduction_active_experts_token_input: E * T * H elements, expert-major ``[E, T, H]``; E from 1 to 64.
        moe_reduction_scale_input: E * T of float32, expert-major ``[E, T]``; 0 skips the expert's row.
        moe_reduction_token_input: T * H elements, added last.
        norm_out: required. ``moe_allreduce_out``: the sum, for which a second call is made.
        quant_out, scale_out: NVFP4 by ``scale_factor``, a multiplier and a float, in the layout of ``layout_code``.
    Raises:
        ArgumentError and its subclasses before anything is launched; CollectiveError.
    Examples:
        >>> handles, pointers = collogue.flashinfer.trtllm_create_ipc_workspace_for_all_reduce_fusion(0, 1, 16, 64, group=group)
        >>> experts = [2, torch.ones(2, 4), torch.ones(2, 4, 64).bfloat16(), partial]  # E, weights, outputs, shared expert
        >>> outputs = [None, None, None, torch.empty_like(partial), None, None]  # layout, sum, residual, norm, codes, scales
        >>> collogue.flashinfer.trtllm_moe_allreduce_fusion(1, 0, 4, 64, pointers, True, residual, weight, 1e-6, 1.0, *experts, *outputs)
        >>> collogue.flashinfer.trtllm_destroy_ipc_workspace_for_all_reduce_fusion(handles)
    """
    workspace = workspace_of_rank(workspace_ptrs, world_size, world_rank)
    check_backend("backend", backend)
    buffers = _buffers(moe_allreduce_out, residual_out, norm_out, quant_out, scale_out)
    reduce(
        workspace,
        token_num,
        hidden_dim,
        moe_reduction_device_num_experts,
        moe_reduction_scale_input,
        moe_reduction_active_experts_token_input,
        moe_reduction_token_input,
        Epilogue(residual_in, rms_gamma, rms_eps, weight_bias or 0.0, (scale_factor, layout_code, None), buffers, bool(launch_with_pdl)),
    )


def trtllm_moe_finalize_allreduce_fusion(
    allreduce_in: torch.Tensor,
    residual_in: torch.Tensor,
    norm_weight: torch.Tensor,
    expanded_idx_to_permuted_idx: torch.Tensor,
    norm_out: torch.Tensor | None,
    residual_out: torch.Tensor | None,
    quant_out: torch.Tensor | None,
    scale_out: torch.Tensor | None,
    workspace_ptrs: torch.Tensor,
    launch_with_pdl: bool,
    world_rank: int,
    world_size: int,
    eps: float,
    shared_expert_output: torch.Tensor | None,
    expert_scale_factor: torch.Tensor | None,
    routed_scaling_factor: float | None,
    weight_bias: float | None = None,
    *,
    backend: Literal["trtllm", "cake"] = "trtllm",
) -> None:
    """Pattern 7 under its older name: each token's rows are gathered, weighted and added, then summed over the ranks.

    ``a_t = scaling * sum_k x[index[t, k]] * w[t, k] + shared[t]`` by :class:`collogue.ExpertCombine`; then as in pattern 1.

    Args:
        allreduce_in: ``[P, H]``, permuted and unweighted. expanded_idx_to_permuted_idx: ``[T, K]`` int32, -1: no contribution.
        expert_scale_factor: ``[T, K]`` of the dtype of ``allreduce_in`` or float32; ``None``: 1.
        routed_scaling_factor: ``None`` is 1. shared_expert_output: ``[T, H]`` or ``None``.
        norm_out: required. quant_out, scale_out: must be ``None``, because FlashInfer gives its codes no global scale.
    Raises:
        UnsupportedError: ``quant_out`` or ``scale_out``. ArgumentError and its subclasses before anything is launched; CollectiveError.
    Examples:
        >>> handles, pointers = collogue.flashinfer.trtllm_create_ipc_workspace_for_all_reduce_fusion(0, 1, 16, 64, group=group)
        >>> index, norm = torch.tensor([[0, 1], [2, 3], [3, 0], [1, 2]], dtype=torch.int32), torch.empty_like(partial)
        >>> outputs = [norm, None, None, None]  # norm, residual, codes, scales
        >>> collogue.flashinfer.trtllm_moe_finalize_allreduce_fusion(
        ...     partial, residual, weight, index, *outputs, pointers, True, 0, 1, 1e-6, None, torch.ones(4, 2), None
        ... )
        >>> collogue.flashinfer.trtllm_destroy_ipc_workspace_for_all_reduce_fusion(handles)
    """
    workspace = workspace_of_rank(workspace_ptrs, world_size, world_rank)
    check_backend("backend", backend)
    if norm_out is None:
        raise ArgumentError("norm_out is required for pattern 7", hint="the norm is always written: allocate it like residual_in")
    buffers = _buffers(None, residual_out, norm_out, quant_out, scale_out)
    finalize(
        workspace,
        FINALIZE,
        allreduce_in,
        expanded_idx_to_permuted_idx,
        expert_scale_factor,
        shared_expert_output,
        routed_scaling_factor,
        Epilogue(residual_in, norm_weight, eps, weight_bias or 0.0, (None, None, None), buffers, bool(launch_with_pdl)),
    )


def check_backend(name: str, backend: str) -> None:
    """Raise :class:`ArgumentError` for a name that FlashInfer does not have. Collogue's kernels serve both."""
    if backend not in ("trtllm", "cake"):
        raise ArgumentError(f"{name} is {backend!r}", hint='pass "trtllm" or "cake"; one implementation serves both')


def _buffers(*given: torch.Tensor | None) -> _Buffers:
    return dict(zip(("output", "residual_out", "norm_out", "quant_out", "scale_out"), given, strict=True))


def _first(given: torch.Tensor | None, made: torch.Tensor | None) -> torch.Tensor:
    result = made if given is None else given
    assert result is not None
    return result

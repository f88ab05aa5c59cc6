"""The calls themselves: arguments as FlashInfer takes them, work by :meth:`collogue.Communicator.all_reduce`."""

from __future__ import annotations

from typing import Any, Literal

import torch

from collogue.contract.formats import round_up
from collogue.errors import ShapeError
from collogue.flashinfer.experts import fused
from collogue.flashinfer.outputs import ARGUMENTS
from collogue.flashinfer.patterns import WITH_EXPERTS, AllReduceFusionPattern, form_of
from collogue.flashinfer.run import Epilogue, run, shaped, workspace_of_rank
from collogue.flashinfer.workspace import AllReduceFusionWorkspace, NotOursError, TRTLLMAllReduceFusionWorkspace


def allreduce_fusion(
    input: torch.Tensor,
    workspace: AllReduceFusionWorkspace,
    pattern: int,
    launch_with_pdl: bool = False,
    trigger_completion_at_end: bool = True,
    output: torch.Tensor | None = None,
    residual_out: torch.Tensor | None = None,
    norm_out: torch.Tensor | None = None,
    quant_out: torch.Tensor | None = None,
    scale_out: torch.Tensor | None = None,
    residual_in: torch.Tensor | None = None,
    rms_gamma: torch.Tensor | None = None,
    rms_eps: float = 1e-6,
    scale_factor: torch.Tensor | float | None = None,
    layout_code: int | None = None,
    use_oneshot: bool | None = None,
    fp32_acc: bool = False,
    moe_reduction_device_num_experts: int | None = None,
    moe_reduction_scale_input: torch.Tensor | None = None,
    moe_reduction_active_experts_token_input: torch.Tensor | None = None,
    moe_reduction_token_input: torch.Tensor | None = None,
    expanded_idx_to_permuted_idx: torch.Tensor | None = None,
    expert_scale_factor: torch.Tensor | None = None,
    shared_expert_output: torch.Tensor | None = None,
    block_quant_group_size: int | None = None,
    weight_bias: float = 0.0,
    *,
    moe_finalize_backend: Literal["trtllm", "cake"] = "trtllm",
) -> torch.Tensor:
    """All-reduce, and with it residual, RMSNorm and quantization, as ``pattern`` says.

    ``s = x_0 + x_1 + ..; y = round(s + residual_in); n = norm(y); quant_out, scale_out = quant(n)`` by docs/contract.md

    Args:
        input: ``[T, H]``, this rank's term.
        workspace: from :func:`create_allreduce_fusion_workspace`.
        pattern: a constant of :class:`AllReduceFusionPattern`.
        output: ``[T, H]``, pattern 0. ``residual_out`` (y), ``norm_out`` (n): ``[T, H]``. May be ``input`` or ``residual_in`` themselves.
        quant_out: ``[T, H]`` E4M3 or ``[T, H / 2]`` E2M1, memory of any dtype.
        scale_out: required where the pattern has scales: NVFP4 and MXFP8 in the layout of ``layout_code``, padding included, memory of any
            dtype; patterns 8 and 9 int32 ``[T, ceil(G / 4)]``, strides ``(1, round_up(T, 4))``; 10 and 11 float32 ``[T, 1]``.
        residual_in: ``[T, H]``, rms_gamma ``[H]``: required but for pattern 0.
        scale_factor: FP8 (2, 4): a **divisor**. FP4 (3, 5): a **multiplier**. Float or one-element tensor.
        layout_code: of NVFP4's and MXFP8's scales, a constant of :class:`QuantizationSFLayout`; ``None`` is 128x4.
        block_quant_group_size: of patterns 8 and 9.
        weight_bias: added to ``rms_gamma`` in float32; 1 for Gemma-style norms.
        launch_with_pdl: ``False``: ``rms_gamma`` may be written by the preceding kernel (``RMSNorm(prefetch=False)``).
        trigger_completion_at_end, use_oneshot, fp32_acc: accepted; they change nothing (docs/engines.md).
        moe_reduction_...: of pattern 6, as of :func:`trtllm_moe_allreduce_fusion`; ``input`` is then not read, ``output`` is the sum.
        expanded_idx_to_permuted_idx, expert_scale_factor, shared_expert_output: of patterns 7 and 12, as of
            :func:`trtllm_moe_finalize_allreduce_fusion`; ``input`` is then ``[P, H]``. Pattern 12 writes FP8 codes and no norm.
        moe_finalize_backend: accepted; it changes nothing.
    Returns:
        Pattern 0 ``output``, patterns 1, 6 and 7 ``norm_out``, the others ``quant_out``; but, as FlashInfer's ``"trtllm"`` backend does,
        ``norm_out`` wherever the caller gave it, unless the workspace's backend is ``"mnnvl"`` or the pattern is 14.
        Outputs that were not given are allocated. Outputs that the pattern does not have are left as they are, and are returned so:
        ``norm_out`` of patterns 0, 2, 3, 8 and 10.
    Order and rounding:
        Collogue's: sums in float32, rounded once with the residual. FlashInfer rounds the sum before it adds the residual.
    Synchronization:
        As :meth:`collogue.Communicator.all_reduce`. For a CUDA graph, make each call once before the capture.
    Raises:
        UnsupportedError: codes of pattern 7. ArgumentError and its subclasses before anything is launched; CollectiveError.
    Examples:
        >>> workspace = collogue.flashinfer.create_allreduce_fusion_workspace("auto", 1, 0, 16, 64, torch.bfloat16, group=group)
        >>> pattern = collogue.flashinfer.AllReduceFusionPattern.kARResidualRMSNorm
        >>> norm = collogue.flashinfer.allreduce_fusion(partial, workspace, pattern, residual_in=residual, rms_gamma=weight)
        >>> workspace.destroy()
    """
    if not isinstance(workspace, TRTLLMAllReduceFusionWorkspace):
        raise NotOursError(
            f"the workspace is a {type(workspace).__name__}", hint="make it by collogue.flashinfer.create_allreduce_fusion_workspace"
        )
    buffers = {"output": output, "residual_out": residual_out, "norm_out": norm_out, "quant_out": quant_out, "scale_out": scale_out}
    if pattern in WITH_EXPERTS:
        more = {
            "input": input,
            "launch_with_pdl": launch_with_pdl,
            "residual_in": residual_in,
            "rms_gamma": rms_gamma,
            "rms_eps": rms_eps,
            "weight_bias": weight_bias,
            "scale_factor": scale_factor,
            "layout_code": layout_code,
            "moe_reduction_device_num_experts": moe_reduction_device_num_experts,
            "moe_reduction_scale_input": moe_reduction_scale_input,
            "moe_reduction_active_experts_token_input": moe_reduction_active_experts_token_input,
            "moe_reduction_token_input": moe_reduction_token_input,
            "expanded_idx_to_permuted_idx": expanded_idx_to_permuted_idx,
            "expert_scale_factor": expert_scale_factor,
            "shared_expert_output": shared_expert_output,
            "moe_finalize_backend": moe_finalize_backend,
        }
        return fused(workspace, pattern, buffers, more)
    form = form_of(pattern)
    if input.ndim != 2:
        raise ShapeError(f"input has shape {list(input.shape)}", hint="flatten leading dimensions: x.view(-1, H)")
    scaling = (scale_factor, layout_code, block_quant_group_size)
    made = run(
        workspace,
        form,
        input,
        Epilogue(residual_in, rms_gamma, rms_eps, weight_bias, scaling, buffers, bool(launch_with_pdl)),
    )
    name = "reduced" if not form.norm else "norm" if form.family == "none" else "codes"
    if norm_out is not None and workspace.backend != "mnnvl" and pattern != AllReduceFusionPattern.kARResidualRMSNormOutMXFP8Quant:
        return norm_out
    given, result = buffers[ARGUMENTS[name]], getattr(made, name)
    assert isinstance(result, torch.Tensor)
    return given if given is not None else result


def trtllm_allreduce_fusion(
    allreduce_in: torch.Tensor,
    world_size: int,
    world_rank: int,
    token_num: int,
    hidden_dim: int,
    workspace_ptrs: torch.Tensor,
    launch_with_pdl: bool,
    trigger_completion_at_end: bool,
    fp32_acc: bool,
    pattern_code: int,
    use_oneshot: bool | None,
    allreduce_out: torch.Tensor | None,
    residual_in: torch.Tensor | None,
    residual_out: torch.Tensor | None,
    norm_out: torch.Tensor | None,
    quant_out: torch.Tensor | None,
    scale_out: torch.Tensor | None,
    rms_gamma: torch.Tensor | None,
    rms_eps: float | None,
    scale_factor: torch.Tensor | float | None,
    layout_code: int | None,
    metadata: dict[str, Any] | None = None,
    block_quant_group_size: int | None = None,
    weight_bias: float | None = None,
) -> None:
    """The older form of :func:`allreduce_fusion`: tensors of any shape with ``token_num * hidden_dim`` elements.

    ``workspace_ptrs`` is the tensor of :func:`trtllm_create_ipc_workspace_for_all_reduce_fusion`; ``metadata`` is not needed, the
    capacity is checked without it. ``None`` for ``rms_eps`` and ``weight_bias`` is 0.

    Examples:
        >>> handles, pointers = collogue.flashinfer.trtllm_create_ipc_workspace_for_all_reduce_fusion(0, 1, 16, 64, group=group)
        >>> calls = [True, True, True, 1, None]  # pdl, trigger, fp32_acc, pattern, use_oneshot
        >>> outputs = [None, residual, torch.empty_like(partial), torch.empty_like(partial), None, None]  # all-reduce .. scales
        >>> collogue.flashinfer.trtllm_allreduce_fusion(partial, 1, 0, 4, 64, pointers, *calls, *outputs, weight, 1e-6, None, None)
        >>> collogue.flashinfer.trtllm_destroy_ipc_workspace_for_all_reduce_fusion(handles)
    """
    workspace = workspace_of_rank(workspace_ptrs, world_size, world_rank)
    form = form_of(pattern_code)
    buffers = {"output": allreduce_out, "residual_out": residual_out, "norm_out": norm_out, "quant_out": quant_out, "scale_out": scale_out}
    run(
        workspace,
        form,
        shaped("allreduce_in", allreduce_in, token_num, hidden_dim),
        Epilogue(
            None if residual_in is None else shaped("residual_in", residual_in, token_num, hidden_dim),
            rms_gamma,
            rms_eps or 0.0,
            weight_bias or 0.0,
            (scale_factor, layout_code, block_quant_group_size),
            buffers,
            bool(launch_with_pdl),
        ),
    )


def compute_fp4_swizzled_layout_sf_size(total_row: int, total_column: int) -> int:
    """Elements of a scale tensor in the 128x4 layout: rows padded to 128, columns to 4.

    Examples:
        >>> collogue.flashinfer.compute_fp4_swizzled_layout_sf_size(4, 64 // 16)
        512
    """
    return round_up(total_row, 128) * round_up(total_column, 4)

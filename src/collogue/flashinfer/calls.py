"""The calls themselves: arguments as FlashInfer takes them, work by :meth:`collogue.Communicator.all_reduce`."""

from __future__ import annotations

from typing import Any, Literal

import torch

from collogue.contract.formats import round_up
from collogue.contract.spec import Output, RMSNorm, Wanted
from collogue.errors import ArgumentError, ShapeError
from collogue.flashinfer.outputs import ARGUMENTS, place
from collogue.flashinfer.patterns import AllReduceFusionPattern, Form, form_of, quant_of, refuse_moe
from collogue.flashinfer.workspace import AllReduceFusionWorkspace, NotOursError, TRTLLMAllReduceFusionWorkspace, workspace_of


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
    """All-reduce, and with it residual, RMSNorm and quantisation, as ``pattern`` says.

    ``s = x_0 + x_1 + ..; y = round(s + residual_in); n = norm(y); quant_out, scale_out = quant(n)`` by docs/contract.md

    Args:
        input: ``[T, H]``, this rank's term.
        workspace: from :func:`create_allreduce_fusion_workspace`.
        pattern: a constant of :class:`AllReduceFusionPattern`: 0 to 5, 8 to 11, 13 and 14.
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
        moe_...: belong to patterns that are not served.
    Returns:
        Pattern 0 ``output``, pattern 1 ``norm_out``, the others ``quant_out``; but, as FlashInfer's ``"trtllm"`` backend does,
        ``norm_out`` wherever the caller gave it, unless the workspace's backend is ``"mnnvl"`` or the pattern is 14.
        Outputs that were not given are allocated. Outputs that the pattern does not have are left as they are, and are returned so:
        ``norm_out`` of patterns 0, 2, 3, 8 and 10.
    Order and rounding:
        Collogue's: sums in float32, rounded once with the residual. FlashInfer rounds the sum before it adds the residual.
    Synchronisation:
        As :meth:`collogue.Communicator.all_reduce`. For a CUDA graph, make each call once before the capture.
    Raises:
        UnsupportedError: MoE patterns. ArgumentError and its subclasses before anything is launched; CollectiveError.
    """
    if not isinstance(workspace, TRTLLMAllReduceFusionWorkspace):
        raise NotOursError(
            f"the workspace is a {type(workspace).__name__}", hint="make it by collogue.flashinfer.create_allreduce_fusion_workspace"
        )
    form = form_of(pattern)
    if input.ndim != 2:
        raise ShapeError(f"input has shape {list(input.shape)}", hint="flatten leading dimensions: x.view(-1, H)")
    buffers = {"output": output, "residual_out": residual_out, "norm_out": norm_out, "quant_out": quant_out, "scale_out": scale_out}
    made = _run(
        workspace,
        form,
        input,
        residual_in,
        rms_gamma,
        rms_eps,
        weight_bias,
        (scale_factor, layout_code, block_quant_group_size),
        buffers,
        prefetch=bool(launch_with_pdl),
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
    """
    workspace = workspace_of(workspace_ptrs)
    form = form_of(pattern_code)
    if (world_size, world_rank) != (workspace.world_size, workspace.rank):
        raise ArgumentError(
            f"rank {world_rank} of {world_size} calls with the workspace of rank {workspace.rank} of {workspace.world_size}",
            hint="pass the workspace that this rank made",
        )
    buffers = {"output": allreduce_out, "residual_out": residual_out, "norm_out": norm_out, "quant_out": quant_out, "scale_out": scale_out}
    _run(
        workspace,
        form,
        _rows("allreduce_in", allreduce_in, token_num, hidden_dim),
        None if residual_in is None else _rows("residual_in", residual_in, token_num, hidden_dim),
        rms_gamma,
        rms_eps or 0.0,
        weight_bias or 0.0,
        (scale_factor, layout_code, block_quant_group_size),
        buffers,
        prefetch=bool(launch_with_pdl),
    )


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
    """Not served: raises :class:`UnsupportedError`."""
    workspace_of(workspace_ptrs)
    refuse_moe(AllReduceFusionPattern.kMoEReductionARResidualRMSNorm)


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
    """Not served: raises :class:`UnsupportedError`."""
    workspace_of(workspace_ptrs)
    refuse_moe(AllReduceFusionPattern.kMoEFinalizeARResidualRMSNorm)


def compute_fp4_swizzled_layout_sf_size(total_row: int, total_column: int) -> int:
    """Elements of a scale tensor in the 128x4 layout: rows padded to 128, columns to 4."""
    return round_up(total_row, 128) * round_up(total_column, 4)


def _run(
    workspace: TRTLLMAllReduceFusionWorkspace,
    form: Form,
    partial: torch.Tensor,
    residual: torch.Tensor | None,
    weight: torch.Tensor | None,
    eps: float,
    weight_bias: float,
    scaling: tuple[torch.Tensor | float | None, int | None, int | None],
    buffers: dict[str, torch.Tensor | None],
    *,
    prefetch: bool,
) -> Output:
    """One call of the communicator. FlashInfer records no gradients and takes weights that require them.

    ``prefetch`` as of :class:`collogue.RMSNorm`.
    """
    with torch.no_grad():
        quant = quant_of(form, *scaling)
        norm = None
        if not form.norm:
            residual = None
        elif residual is None or weight is None:
            raise ArgumentError("residual_in and rms_gamma are required", hint="only pattern 0 (kAllReduce) goes without them")
        else:
            norm = RMSNorm(weight, eps, weight_bias, prefetch)
        tokens, width = partial.shape
        wanted = Wanted.of(has_residual=form.norm, has_norm=form.norm, quant=quant, keep_norm=form.keep_norm)
        comm = workspace.communicator(tokens, width, partial.dtype)
        placed = place(partial, residual, quant, wanted, buffers)
        comm.all_reduce(partial, residual=residual, norm=norm, quant=quant, keep_norm=form.keep_norm, out=placed.out)
        placed.finish()
        return placed.out


def _rows(name: str, tensor: torch.Tensor, tokens: int, width: int) -> torch.Tensor:
    if tensor.numel() != tokens * width or not tensor.is_contiguous():
        raise ShapeError(
            f"{name} has shape {list(tensor.shape)} and strides {tensor.stride()}",
            hint=f"pass a contiguous tensor of {tokens} * {width} elements",
        )
    return tensor.view(tokens, width)

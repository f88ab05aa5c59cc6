"""FlashInfer's communication calls, served by Collogue: the same names and arguments, Collogue's kernels and bits.

:func:`install` does the same for code that says ``import flashinfer.comm``. What differs from FlashInfer is in docs/engines.md.

Examples:
    >>> import collogue.flashinfer as comm  # was: import flashinfer.comm as comm
    >>> workspace = comm.create_allreduce_fusion_workspace(
    ...     backend="auto", world_size=1, rank=0, max_token_num=4096, hidden_dim=7168, dtype=torch.bfloat16, group=group
    ... )
    >>> norm = comm.allreduce_fusion(
    ...     input=partial, workspace=workspace, pattern=comm.AllReduceFusionPattern.kARResidualRMSNorm,
    ...     residual_in=residual, residual_out=residual, rms_gamma=weight,
    ... )
    >>> workspace.destroy()
"""

from __future__ import annotations

from collogue.flashinfer.calls import (
    allreduce_fusion,
    compute_fp4_swizzled_layout_sf_size,
    trtllm_allreduce_fusion,
)
from collogue.flashinfer.experts import trtllm_moe_allreduce_fusion, trtllm_moe_finalize_allreduce_fusion
from collogue.flashinfer.patterns import AllReduceFusionPattern, QuantizationSFLayout
from collogue.flashinfer.replace import Installation, flashinfer_present, replace
from collogue.flashinfer.workspace import (
    AllReduceFusionWorkspace,
    CommBackend,
    TorchDistBackend,
    TRTLLMAllReduceFusionWorkspace,
    create_allreduce_fusion_workspace,
    is_mnnvl_cutedsl_supported,
    trtllm_create_ipc_workspace_for_all_reduce_fusion,
    trtllm_destroy_ipc_workspace_for_all_reduce,
    trtllm_destroy_ipc_workspace_for_all_reduce_fusion,
)

SERVED = (
    "AllReduceFusionPattern",
    "AllReduceFusionWorkspace",
    "QuantizationSFLayout",
    "TRTLLMAllReduceFusionWorkspace",
    "allreduce_fusion",
    "compute_fp4_swizzled_layout_sf_size",
    "create_allreduce_fusion_workspace",
    "is_mnnvl_cutedsl_supported",
    "trtllm_allreduce_fusion",
    "trtllm_create_ipc_workspace_for_all_reduce_fusion",
    "trtllm_destroy_ipc_workspace_for_all_reduce",
    "trtllm_destroy_ipc_workspace_for_all_reduce_fusion",
    "trtllm_moe_allreduce_fusion",
    "trtllm_moe_finalize_allreduce_fusion",
)
"""The names of ``flashinfer.comm`` that are served."""

__all__ = [
    "SERVED",
    "AllReduceFusionPattern",
    "AllReduceFusionWorkspace",
    "CommBackend",
    "Installation",
    "QuantizationSFLayout",
    "TRTLLMAllReduceFusionWorkspace",
    "TorchDistBackend",
    "allreduce_fusion",
    "compute_fp4_swizzled_layout_sf_size",
    "create_allreduce_fusion_workspace",
    "flashinfer_present",
    "install",
    "is_mnnvl_cutedsl_supported",
    "trtllm_allreduce_fusion",
    "trtllm_create_ipc_workspace_for_all_reduce_fusion",
    "trtllm_destroy_ipc_workspace_for_all_reduce",
    "trtllm_destroy_ipc_workspace_for_all_reduce_fusion",
    "trtllm_moe_allreduce_fusion",
    "trtllm_moe_finalize_allreduce_fusion",
]


def install() -> Installation:
    """Give everyone who says ``import flashinfer.comm`` these functions, in this process. FlashInfer need not be installed.

    Where it is, workspaces that FlashInfer itself made, and ``backend="mnnvl-cutedsl"``, still go to FlashInfer. Where it is not, a
    stand-in takes its place that holds the served names, ``flashinfer.comm.mnnvl.TorchDistBackend`` and nothing else.

    Names that other modules have imported one by one (``from flashinfer.comm import allreduce_fusion``) before stay FlashInfer's.
    Installing twice changes nothing, and only the first one's :meth:`Installation.uninstall` takes it away.

    Examples:
        >>> installation = collogue.flashinfer.install()  # from now on; or, for a block, as a context manager
        >>> import flashinfer.comm
        >>> flashinfer.comm.allreduce_fusion is collogue.flashinfer.allreduce_fusion
        True
        >>> installation.uninstall()
    """
    return replace({name: globals()[name] for name in SERVED})

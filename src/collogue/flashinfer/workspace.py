"""Workspaces: what FlashInfer's callers make once and pass to every call. Each owns a :class:`collogue.Communicator`."""

from __future__ import annotations

import logging
import os
import weakref
from abc import ABC, abstractmethod
from typing import Any, Literal

import torch
import torch.distributed as dist

from collogue.calls.capacity import check_hidden_size
from collogue.communicator import Communicator
from collogue.contract.spec import VALUE_DTYPES
from collogue.errors import ArgumentError, CapacityError, ClosedError, CollogueError, GroupError, NotPrepared, UnsupportedError
from collogue.gpu.watch import Watch
from collogue.group import as_group
from collogue.planning.topology import Transport

#: Seconds that a call waits for a rank before it fails, as long as PyTorch waits for NCCL. FlashInfer waits for ever, and an engine's
#: ranks may be minutes apart while one of them compiles.
TIMEOUT = 600.0
#: The variable that sets other seconds.
TIMEOUT_VARIABLE = "COLLOGUE_TIMEOUT"
#: Seconds between two looks for failures that no call has told of: an engine may replay graphs for ever.
WATCH_INTERVAL = 1.0
#: ``abort`` ends the process at a failure, as PyTorch does where NCCL fails; anything else only logs it.
ON_FAILURE = "COLLOGUE_ON_FAILURE"

logger = logging.getLogger(__name__)


class NotOursError(UnsupportedError):
    """A workspace or a backend of FlashInfer's own. Where FlashInfer is installed, :func:`install` lets it serve the call."""


class CommBackend:
    """What carries objects between ranks while a workspace is made. Only its process group is used.

    Examples:
        >>> issubclass(collogue.flashinfer.TorchDistBackend, collogue.flashinfer.CommBackend)
        True
    """

    _group: Any = None


class TorchDistBackend(CommBackend):
    """The ranks of a ``torch.distributed`` process group; ``None`` is the default group.

    Examples:
        >>> backend = collogue.flashinfer.TorchDistBackend(group)
        >>> workspace = collogue.flashinfer.create_allreduce_fusion_workspace("auto", 1, 0, 16, 64, torch.bfloat16, comm_backend=backend)
        >>> workspace.destroy()
    """

    def __init__(self, group: Any | None = None) -> None:
        self._group = group


class AllReduceFusionWorkspace(ABC):
    """Base of all workspaces.

    Attributes:
        world_size, rank: of the tensor-parallel group.
        backend: the name of the FlashInfer backend that the caller asked for, ``"trtllm"`` for ``"auto"``. It chooses nothing here.
    Examples:
        >>> workspace = collogue.flashinfer.create_allreduce_fusion_workspace("auto", 1, 0, 16, 64, torch.bfloat16, group=group)
        >>> (workspace.world_size, workspace.rank, workspace.backend)
        (1, 0, 'trtllm')
        >>> workspace.destroy()
    """

    def __init__(self, world_size: int, rank: int) -> None:
        self.world_size = world_size
        self.rank = rank
        self._destroyed = False

    @property
    @abstractmethod
    def backend(self) -> str: ...

    @abstractmethod
    def destroy(self) -> None: ...

    @abstractmethod
    def is_buffer_size_sufficient(
        self, tp_size: int, num_tokens: int, hidden_dim: int, dtype: torch.dtype, use_oneshot: Any | None = None
    ) -> bool: ...


class TRTLLMAllReduceFusionWorkspace(AllReduceFusionWorkspace):
    """A workspace for calls of up to ``max_token_num * hidden_dim`` elements.

    Args:
        tp_size, tp_rank: world size and rank; they must be the group's.
        max_token_num, hidden_dim: the capacity is their product, as in FlashInfer.
        dtype: of the calls. float16 and bfloat16 may use one workspace; ``None`` leaves both to the first call.
        comm_backend: holds the process group if ``group`` is not given.
        group: the process group. Without one the default group, if it has ``tp_size`` ranks.
    Synchronization:
        Making one is collective. So is the first call with another dtype, or with more tokens or a wider row than was named
        here: it makes a communicator of its own, which takes memory and cannot be done while a CUDA graph is captured.
    Raises:
        GroupError, PlatformError, ArgumentError.
    Examples:
        >>> workspace = collogue.flashinfer.TRTLLMAllReduceFusionWorkspace(1, 0, 16, 64, torch.bfloat16, group=group)
        >>> workspace.is_buffer_size_sufficient(1, 32, 64, torch.bfloat16)
        False
        >>> workspace.destroy()
    """

    #: FlashInfer's ``"mnnvl"`` workspaces hold a multicast address here, and engines throw a workspace away that has none. Not an address.
    mc_ptr = 1
    #: What FlashInfer keeps here has no counterpart. ``workspace_tensor`` names this workspace in ``trtllm_allreduce_fusion``.
    ipc_handles: list[list[int]]
    mem_handles: list[Any]
    workspace_tensor: torch.Tensor
    metadata: dict[str, Any]

    def __init__(
        self,
        tp_size: int,
        tp_rank: int,
        max_token_num: int,
        hidden_dim: int,
        dtype: torch.dtype | None = torch.float16,
        comm_backend: Any | None = None,
        group: Any | None = None,
    ) -> None:
        super().__init__(tp_size, tp_rank)
        check_hidden_size(hidden_dim)
        self._backend = "trtllm"
        self._group, self._device = _resolve(tp_size, tp_rank, comm_backend, group)
        self._communicators: list[Communicator] = []
        self._watches: list[Watch] = []
        self.metadata = {
            "tp_rank": tp_rank,
            "tp_size": tp_size,
            "max_token_num": max_token_num,
            "hidden_dim": hidden_dim,
            "use_fp32_lamport": dtype == torch.float32,
        }
        self.ipc_handles, self.mem_handles = [[], [], []], []
        self.workspace_tensor = torch.zeros(3 * tp_size + 1, dtype=torch.int64, device=self._device)
        _of_tensor[self.workspace_tensor.data_ptr()] = self
        if dtype is not None:
            self._make(max_token_num, hidden_dim, dtype)

    @property
    def backend(self) -> str:
        return self._backend

    def is_buffer_size_sufficient(
        self, tp_size: int, num_tokens: int, hidden_dim: int, dtype: torch.dtype, use_oneshot: Any | None = None
    ) -> bool:
        """Whether a call of this shape will be served. Exact; ``use_oneshot`` has no meaning here."""
        of = self.metadata
        return (
            not self._destroyed
            and tp_size == self.world_size
            and 0 <= num_tokens * hidden_dim <= of["max_token_num"] * of["hidden_dim"]
            and hidden_dim > 0
            and hidden_dim % 8 == 0
            and dtype in VALUE_DTYPES
            and (dtype == torch.float32) == of["use_fp32_lamport"]
        )

    def communicator(self, tokens: int, hidden_dim: int, dtype: torch.dtype) -> Communicator:
        """The communicator that serves calls of this shape. Collective where it has to be made."""
        for made in self._communicators:
            if made.dtype is dtype and made.fits(tokens, hidden_dim):
                return made
        if self._destroyed:
            raise ClosedError("the workspace was destroyed", hint="make a new one: create_allreduce_fusion_workspace(...)")
        check_hidden_size(hidden_dim)
        of = self.metadata
        if not self.is_buffer_size_sufficient(self.world_size, tokens, hidden_dim, dtype):
            raise CapacityError(
                f"{tokens} tokens of hidden size {hidden_dim} in {dtype} do not fit a workspace made for {of}",
                hint="ask workspace.is_buffer_size_sufficient(...) first, or make a larger one",
            )
        if tokens <= of["max_token_num"] and hidden_dim <= of["hidden_dim"]:
            return self._make(of["max_token_num"], of["hidden_dim"], dtype)
        return self._make(of["max_token_num"] * of["hidden_dim"] // hidden_dim, hidden_dim, dtype)

    def _make(self, max_tokens: int, hidden_size: int, dtype: torch.dtype) -> Communicator:
        if torch.cuda.is_available() and torch.cuda.is_current_stream_capturing():
            raise NotPrepared(
                f"the workspace has nothing yet for rows of {hidden_size} in {dtype}, and a CUDA graph is being captured",
                hint="make such a call once before the capture",
            )
        way = peer_on(as_group(self._group).device)
        made = Communicator(self._group, max_tokens=max_tokens, hidden_size=hidden_size, dtype=dtype, timeout=timeout(), transport=way)
        self._communicators.append(made)
        if made.device.type == "cuda":
            self._watches.append(made.watch(failed, WATCH_INTERVAL))
        return made

    def destroy(self) -> None:
        """Free the memory. Waits for this rank's GPU; not collective, and harmless when repeated."""
        if self._destroyed:
            return
        self._destroyed = True
        for watch in self._watches:
            watch.stop()
        for made in self._communicators:
            made.close(collective=False)
        self._communicators.clear()

    def checkpoint_prepare(self) -> None:
        """Not served: the memory stays where it is. FlashInfer raises alike for workspaces in PyTorch's symmetric memory."""
        raise _no_checkpoint()

    def checkpoint_restore(self, comm_backend: Any) -> None:
        """Not served."""
        raise _no_checkpoint()


#: Workspaces by the address of their ``workspace_tensor``, which is all that ``trtllm_allreduce_fusion`` is given.
_of_tensor: weakref.WeakValueDictionary[int, TRTLLMAllReduceFusionWorkspace] = weakref.WeakValueDictionary()


def peer_on(device: torch.device) -> Transport | None:
    """The transport of engines: on GPUs peers or nothing, as where there are none an engine has its own all-reduce."""
    return "peer" if device.type == "cuda" else None


def timeout() -> float:
    """Seconds that a call of an engine waits for a rank: ``COLLOGUE_TIMEOUT``, else :data:`TIMEOUT`. The same on every rank."""
    text = os.environ.get(TIMEOUT_VARIABLE, "")
    try:
        seconds = float(text) if text else TIMEOUT
    except ValueError:
        seconds = 0.0
    if not 0 < seconds < float("inf"):
        raise ArgumentError(
            f"{TIMEOUT_VARIABLE} is {text!r}, expected seconds", hint=f"unset it ({TIMEOUT:g} s), or set it to a positive number"
        )
    return seconds


def failed(error: CollogueError) -> None:
    """What follows when a collective has failed, whether or not anybody calls: outputs are undefined from now on."""
    logger.critical("a collective has failed, its outputs and all later ones are undefined: %s", error)
    if os.environ.get(ON_FAILURE) == "abort":
        os.abort()


class _Handles(list[list[int]]):
    """What the older functions make and destroy a workspace by. It holds the workspace, and nothing of FlashInfer's."""

    workspace: TRTLLMAllReduceFusionWorkspace


#: Workspaces of the older function live until they are destroyed: its callers may keep nothing but the tensor.
_kept: set[TRTLLMAllReduceFusionWorkspace] = set()


def workspace_of(tensor: torch.Tensor) -> TRTLLMAllReduceFusionWorkspace:
    """The workspace that ``tensor`` names."""
    found = _of_tensor.get(tensor.data_ptr())
    if found is None:
        raise NotOursError(
            "workspace_ptrs names no workspace of Collogue's",
            hint="pass the tensor that collogue.flashinfer returned, before it was destroyed",
        )
    return found


def create_allreduce_fusion_workspace(
    backend: Literal["trtllm", "mnnvl", "mnnvl-cutedsl", "auto"] = "auto",
    world_size: int | None = None,
    rank: int | None = None,
    max_token_num: int | None = None,
    hidden_dim: int | None = None,
    dtype: torch.dtype | None = None,
    gpus_per_node: int | None = None,
    comm_backend: Any | None = None,
    force_oneshot_support: bool = False,
    group: Any | None = None,
    *,
    top_k: int | None = None,
    rms_eps: float | None = None,
    weight_bias: float | None = None,
    routed_scaling_factor: float | None = None,
    include_shared_expert: bool | None = None,
    add_residual: bool | None = None,
    write_residual_output: bool | None = None,
    apply_rms_norm: bool | None = None,
    output_dtype: torch.dtype | None = None,
    dynamic_fp8: bool | None = None,
    write_norm_output: bool | None = None,
    config: Any | None = None,
    use_fp32_lamport: bool | None = None,
) -> TRTLLMAllReduceFusionWorkspace:
    """Make a workspace on every rank of a group. See :class:`TRTLLMAllReduceFusionWorkspace`.

    Args:
        backend: ``"auto"``, ``"trtllm"`` or ``"mnnvl"``: one implementation serves all three.
        gpus_per_node, force_oneshot_support: accepted; they change nothing here.
        use_fp32_lamport: the same; SGLang passes it for float32, FlashInfer itself has no such argument.
    Raises:
        UnsupportedError: ``backend="mnnvl-cutedsl"``, and the keyword-only arguments, which belong to it.
    Examples:
        >>> workspace = collogue.flashinfer.create_allreduce_fusion_workspace(
        ...     world_size=1, rank=0, max_token_num=16, hidden_dim=64, dtype=torch.bfloat16, group=group
        ... )
        >>> workspace.destroy()
    """
    options = {
        "top_k": top_k,
        "rms_eps": rms_eps,
        "weight_bias": weight_bias,
        "routed_scaling_factor": routed_scaling_factor,
        "include_shared_expert": include_shared_expert,
        "add_residual": add_residual,
        "write_residual_output": write_residual_output,
        "apply_rms_norm": apply_rms_norm,
        "output_dtype": output_dtype,
        "dynamic_fp8": dynamic_fp8,
        "write_norm_output": write_norm_output,
        "config": config,
    }
    named = [name for name, value in options.items() if value is not None]
    if backend not in ("auto", "trtllm", "mnnvl"):
        raise NotOursError(f"backend {backend!r} is not served", hint="use backend='auto'")
    if named:
        raise UnsupportedError(
            f"{', '.join(named)}: only backend='mnnvl-cutedsl' takes them", hint="pass them to allreduce_fusion, as with the other backends"
        )
    if world_size is None or rank is None or max_token_num is None or hidden_dim is None:
        raise ArgumentError("world_size, rank, max_token_num and hidden_dim are required", hint="give the capacity of the largest call")
    made = TRTLLMAllReduceFusionWorkspace(world_size, rank, max_token_num, hidden_dim, dtype, comm_backend, group)
    made._backend = "trtllm" if backend == "auto" else backend
    return made


def is_mnnvl_cutedsl_supported(
    tp_size: int,
    hidden_dim: int,
    dtype: torch.dtype,
    *,
    max_token_num: int,
    top_k: int = 10,
    apply_rms_norm: bool = True,
    write_residual_output: bool = True,
    output_dtype: torch.dtype = torch.bfloat16,
    dynamic_fp8: bool = False,
    write_norm_output: bool = False,
    config: Any | None = None,
    device: torch.device | int | str | None = None,
) -> bool:
    """``False``: ``backend="mnnvl-cutedsl"`` is not served.

    Examples:
        >>> collogue.flashinfer.is_mnnvl_cutedsl_supported(8, 7168, torch.bfloat16, max_token_num=128)
        False
    """
    return False


def trtllm_create_ipc_workspace_for_all_reduce_fusion(
    tp_rank: int,
    tp_size: int,
    max_token_num: int,
    hidden_dim: int,
    use_fp32_lamport: bool = False,
    group: Any | None = None,
    create_metadata: bool = False,
    comm_backend: Any | None = None,
    use_symm_dev_mem: bool = False,
) -> tuple[Any, ...]:
    """Make a workspace for :func:`trtllm_allreduce_fusion`. Collective.

    Returns:
        ``(ipc_handles, workspace_tensor)``; with ``create_metadata`` also the metadata, and with ``use_symm_dev_mem`` an empty list of
        memory handles before it. The workspace lives until it is destroyed.
    Examples:
        >>> handles, pointers = collogue.flashinfer.trtllm_create_ipc_workspace_for_all_reduce_fusion(0, 1, 16, 64, group=group)
        >>> collogue.flashinfer.trtllm_destroy_ipc_workspace_for_all_reduce_fusion(handles)
    """
    if use_symm_dev_mem and not create_metadata:
        raise ArgumentError("use_symm_dev_mem without create_metadata", hint="pass create_metadata=True, as FlashInfer demands")
    dtype = torch.float32 if use_fp32_lamport else None
    made = TRTLLMAllReduceFusionWorkspace(tp_size, tp_rank, max_token_num, hidden_dim, dtype, comm_backend, group)
    handles = _Handles(made.ipc_handles)
    handles.workspace = made
    _kept.add(made)
    memory = (made.mem_handles,) if use_symm_dev_mem else ()
    metadata = (made.metadata,) if create_metadata else ()
    return handles, made.workspace_tensor, *memory, *metadata


def trtllm_destroy_ipc_workspace_for_all_reduce_fusion(workspace: list[list[int]], group: Any | None = None) -> None:
    """Destroy the workspace whose ``ipc_handles`` these are. ``group`` has no meaning. Not collective, harmless when repeated.

    Examples:
        >>> handles, pointers = collogue.flashinfer.trtllm_create_ipc_workspace_for_all_reduce_fusion(0, 1, 16, 64, group=group)
        >>> collogue.flashinfer.trtllm_destroy_ipc_workspace_for_all_reduce_fusion(handles)
    """
    if not isinstance(workspace, _Handles):
        raise NotOursError("not handles of a workspace of Collogue's", hint="pass the first thing that the creating function returned")
    workspace.workspace.destroy()
    _kept.discard(workspace.workspace)


def trtllm_destroy_ipc_workspace_for_all_reduce(workspace: list[list[int]], group: Any | None = None) -> None:
    """The same as :func:`trtllm_destroy_ipc_workspace_for_all_reduce_fusion`, under its older name.

    Examples:
        >>> handles, pointers = collogue.flashinfer.trtllm_create_ipc_workspace_for_all_reduce_fusion(0, 1, 16, 64, group=group)
        >>> collogue.flashinfer.trtllm_destroy_ipc_workspace_for_all_reduce(handles)
    """
    trtllm_destroy_ipc_workspace_for_all_reduce_fusion(workspace, group)


def _no_checkpoint() -> UnsupportedError:
    return UnsupportedError("workspaces cannot be detached from their memory", hint="destroy the workspace and make a new one")


def _resolve(world_size: int, rank: int, comm_backend: Any | None, group: Any | None) -> tuple[Any, torch.device | None]:
    """The group and the device of the ranks. A default group of another size is rejected, not taken for the one that was meant."""
    if group is None:
        group = getattr(comm_backend, "_group", None)
    if group is None:
        if not dist.is_initialized():
            raise GroupError("there is no process group", hint="pass group=, or call torch.distributed.init_process_group() first")
        group = dist.group.WORLD
    device = None
    if isinstance(group, dist.ProcessGroup) and torch.cuda.is_available():
        # FlashInfer works on the current CUDA device, whatever the group's backend: engines pass a gloo group of their GPU ranks.
        device = torch.device("cuda", torch.cuda.current_device())
    known = as_group(group, device)
    if (known.size, known.rank) != (world_size, rank):
        raise GroupError(
            f"rank {rank} of {world_size} was asked for; in the group (the default group, if none was given) "
            f"this is rank {known.rank} of {known.size}",
            hint="pass group=, the tensor-parallel group",
        )
    return known, known.device

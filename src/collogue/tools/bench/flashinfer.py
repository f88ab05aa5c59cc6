"""FlashInfer's all-reduces, alone and fused, on real ranks and on virtual ones: its ``trtllm`` kernels, never by multicast.

They add in float32, and get memory that the group has mapped, laid out as FlashInfer lays it out: a buffer of terms, flags, and three
buffers whose every element is -0 until a term has come. Its sum alone, the norm and FP8 static are timed.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from typing import Any

import torch

from collogue.contract.spec import Output, RMSNorm
from collogue.group import Group
from collogue.planning.extent import round_up
from collogue.planning.plan import LaunchShape
from collogue.planning.residency import Fitting
from collogue.tools.bench.cases import FLASHINFER, FLASHINFER_EARLY, FLASHINFER_TWO_SHOT
from collogue.tools.bench.fused import synchronize
from collogue.tools.check.case import STATIC_SCALE, Case

#: World sizes that its kernels are compiled for and a host of GPUs has.
WORLDS = (2, 4, 8)
#: Ways: whether it is one-shot, and whether it launches its dependents only at its end, which is its default.
WAYS = {FLASHINFER: (True, True), FLASHINFER_EARLY: (True, False), FLASHINFER_TWO_SHOT: (False, True)}
#: Its names of what is fused, by format; of the sum alone, where there is no norm.
_PATTERNS = {"none": "kARResidualRMSNorm", "fp8_static": "kARResidualRMSNormFP8Quant"}
_FLAGS = 256  # of each rank, on each
#: Registers of a thread of its one-shot and two-shot, at most, by world size: 0.7.2 by nvcc 13.0 for sm_90a, float32 sums of bfloat16.
REGISTERS = {2: (56, 56), 4: (54, 60), 8: (64, 74)}
_SM_REGISTERS, _SM_THREADS = 65536, 2048
#: Seconds between words, while it compiles.
_PATIENCE = 20.0


def has(way: str, case: Case) -> bool:
    """Whether ``way`` can do what ``case`` does: two-shot wants more tokens than ranks."""
    fused = case.residual and case.norm and case.format in _PATTERNS and not case.keeps_norm
    alone = not case.residual and not case.norm and case.format == "none"
    plain = case.operation == "all_reduce" and case.weight_dtype is None and not case.weight_offset and case.world_size in WORLDS
    return plain and (fused or alone) and (WAYS[way][0] or case.tokens > case.world_size)


def launch(way: str, case: Case, multiprocessors: int) -> LaunchShape:
    """The grid in which its launcher runs ``case``: a cluster of up to 8 CTAs does a token, in two-shot a token of one owner."""
    one_shot = WAYS[way][0]
    tokens = case.tokens if one_shot else -(-case.tokens // case.world_size)
    threads = case.hidden_size * case.value_dtype.itemsize // 16
    cluster = 8
    while threads % cluster:
        cluster //= 2
    threads //= cluster
    while threads < 128 and cluster > 1:
        threads, cluster = 2 * threads, cluster // 2
    widest = min(_SM_REGISTERS // _registers(way, case), 1024)
    while tokens * cluster > multiprocessors and cluster > 1 and threads <= widest // 2:
        threads, cluster = 2 * threads, cluster // 2
    return LaunchShape(threads, 1, cluster, min(multiprocessors, tokens * cluster) // cluster)


def _registers(way: str, case: Case) -> int:
    return REGISTERS[case.world_size][0 if WAYS[way][0] else 1]


def fits(way: str, case: Case, multiprocessors: int, fitting: Fitting, *, pdl: bool) -> bool:
    """Whether the grids of all ranks of ``case`` are on one GPU of so many SMs together: else they may wait for each other forever.

    A kernel that launches its dependents early, with PDL, has the next one of its rank beside it.
    """
    shape = launch(way, case, multiprocessors)
    threads = round_up(shape.threads, 32)
    ctas = min(_SM_REGISTERS // (round_up(_registers(way, case), 8) * threads), _SM_THREADS // threads, len(fitting))
    grids = case.world_size * (2 if pdl and not WAYS[way][1] else 1)
    return ctas > 0 and grids * shape.clusters <= fitting[ctas - 1][shape.cluster - 1]


def load(tell: Callable[[str], None] = lambda text: None) -> None:
    """Compile its kernels, unless they are there, and load them. That takes minutes, the first time: ``tell`` hears of it now and then."""
    from flashinfer.comm import trtllm_ar

    with ThreadPoolExecutor(1) as pool:
        loaded = pool.submit(trtllm_ar.get_trtllm_comm_module)
        while not wait([loaded], timeout=_PATIENCE).done:
            tell("compiling FlashInfer's kernels")
        loaded.result()


class FlashInfer:
    """Its calls on one rank, with or without PDL. Workspaces are kept, and each is for up to ``most_elements`` of a partial."""

    def __init__(self, group: Group, most_elements: int, *, pdl: bool) -> None:
        self._group, self._most, self._pdl = group, most_elements, pdl
        self._workspaces: dict[torch.dtype, Any] = {}

    def function(
        self, way: str, case: Case, tensors: Sequence[torch.Tensor], sets: Sequence[tuple[torch.Tensor, RMSNorm]] = ()
    ) -> Callable[[int], Any]:
        """The call on input set i: the sum of ``tensors[i]``, or the outputs behind residual and norm of ``sets[i]``. Collective.

        Raises :class:`NotImplementedError` for what ``way`` cannot do.
        """
        if not has(way, case):
            raise NotImplementedError(f"{way} is not timed for {case}")
        import flashinfer.comm as comm

        workspace, (one_shot, at_end) = self._workspace(case.value_dtype), WAYS[way]
        sums = [torch.empty_like(x) for x in tensors]
        fixed: dict[str, Any] = {
            "workspace": workspace,
            "launch_with_pdl": self._pdl,
            "trigger_completion_at_end": at_end,
            "use_oneshot": one_shot,
            "fp32_acc": case.value_dtype != torch.float32,
        }
        if not case.norm:

            def alone(i: int) -> torch.Tensor:
                comm.allreduce_fusion(input=tensors[i], output=sums[i], pattern=comm.AllReduceFusionPattern.kAllReduce, **fixed)
                return sums[i]

            return alone
        outs = [Output(residual=torch.empty_like(x), norm=torch.empty_like(x)) for x in tensors]
        scaling: list[dict[str, Any]] = [{} for _ in tensors]
        if case.format == "fp8_static":
            scale = torch.tensor([STATIC_SCALE], dtype=torch.float32, device=self._group.device)
            codes = [torch.empty_like(x, dtype=torch.float8_e4m3fn) for x in tensors]
            outs = [Output(residual=out.residual, codes=c) for out, c in zip(outs, codes, strict=True)]
            scaling = [{"quant_out": out.codes, "scale_factor": scale} for out in outs]
        pattern = getattr(comm.AllReduceFusionPattern, _PATTERNS[case.format])

        def fused(i: int) -> Output:
            residual, norm = sets[i]
            comm.allreduce_fusion(
                input=tensors[i],
                output=sums[i],
                pattern=pattern,
                residual_in=residual,
                residual_out=outs[i].residual,
                norm_out=outs[i].norm,
                rms_gamma=norm.weight,
                rms_eps=case.eps,
                **scaling[i],
                **fixed,
            )
            return outs[i]

        return fused

    def _workspace(self, dtype: torch.dtype) -> Any:
        """Memory as FlashInfer's kernels want it, of the group's own. Collective at the first use."""
        if dtype not in self._workspaces:
            self._workspaces[dtype] = _make_workspace(self._group, self._most, dtype)
        return self._workspaces[dtype]

    def close(self) -> None:
        """Let go of the workspaces."""
        for workspace in self._workspaces.values():
            workspace.destroy()
        self._workspaces.clear()


def _make_workspace(group: Group, most_elements: int, dtype: torch.dtype) -> Any:
    """``TRTLLMAllReduceFusionWorkspace`` around the group's symmetric memory; its own constructor asks the driver for memory of its own."""
    from flashinfer.comm import allreduce

    # Its kernels compute twice this size in 32 bits with a sign; larger calls raise its ValueError.
    most_elements = min(most_elements, (2**30 - 16) // (group.size * dtype.itemsize))
    step = round_up(group.size * most_elements * dtype.itemsize, 16)
    terms, flags, slots = (group.symmetric(size) for size in (step, group.size * _FLAGS * 4, 3 * step))
    # -0 means that nothing has come yet.
    slots.local.view(torch.int32 if dtype.itemsize == 4 else torch.int16).fill_(-(1 << (8 * dtype.itemsize - 1)))
    control = torch.tensor([0, 0, 0, step, 0], dtype=torch.int32, device=group.device)
    pointers = [pointer for buffer in (terms, flags, slots) for pointer in buffer.pointers] + [control.data_ptr()]

    class Workspace(allreduce.TRTLLMAllReduceFusionWorkspace):  # type: ignore[misc]
        def __init__(self) -> None:
            allreduce.AllReduceFusionWorkspace.__init__(self, group.size, group.rank)
            self.ipc_handles = [list(buffer.pointers) for buffer in (terms, flags, slots)]
            self.workspace_tensor = torch.tensor(pointers, dtype=torch.int64, device=group.device)
            self.mem_handles: list[Any] = []
            self.kept = (terms, flags, slots, control)
            shape = {"max_token_num": 1, "hidden_dim": most_elements, "tp_size": group.size, "tp_rank": group.rank}
            self.metadata = {**shape, "use_fp32_lamport": dtype == torch.float32}

    made = Workspace()
    synchronize(group.device)
    group.barrier()  # nobody's terms come before the -0 stand everywhere
    return made

"""What other libraries do: all-reduce alone, and the whole call as a chain of kernels or as a fused one. Never by multicast.

Alone: NCCL, torch's symmetric memory, vLLM's custom all-reduce: no residual, no norm, no quantization. Chains: one of these, then
residual, norm and format in one kernel that ``torch.compile`` made. Alone and fused: FlashInfer. vLLM and FlashInfer only where they are
installed.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any, TypeAlias

import torch
import torch.distributed as dist

from collogue.contract import reference
from collogue.contract.quant import FP8Static
from collogue.contract.spec import Output, RMSNorm
from collogue.group import as_group
from collogue.tools.bench import epilogue, flashinfer
from collogue.tools.bench.cases import COMPILED, FLASHINFER_WAYS, NCCL, ONE_SHOT, TWO_SHOT, VLLM, has_chain
from collogue.tools.bench.fused import synchronize
from collogue.tools.bench.timing import SETS
from collogue.tools.check.case import GLOBAL_SCALE, STATIC_SCALE, Case
from collogue.tools.check.rank import arguments

#: In place, or returning the sum.
Sum: TypeAlias = Callable[[torch.Tensor], Any]


def integers(case: Case, rank: int, device: torch.device) -> torch.Tensor:
    """[T, H] small integers, whose sum over ranks is exact in every dtype: every right all-reduce gives the same bits."""
    index = torch.arange(case.tokens * case.hidden_size, device=device)
    return ((index * 7 + rank * 3) % 17 - 8).view(case.tokens, case.hidden_size).to(case.value_dtype)


def can(name: str, case: Case) -> bool:
    """Whether the baseline ``name`` does what ``case`` does; of an all-reduce alone, whether it takes such a sum."""
    if name in FLASHINFER_WAYS:
        return flashinfer.has(name, case)
    return not name.endswith(COMPILED) or has_chain(case)


def alone(case: Case) -> Case:
    """The sum of ``case`` alone."""
    return replace(case, residual=False, norm=False, keep_norm=False, format="none", operation="all_reduce", weight_dtype=None)


class Baseline:
    """An all-reduce on :data:`SETS` tensors in turn: ``function(i)`` of ``tensors[i]``, in place or returning the sum.

    In place, sums would grow from call to call; so the gate runs on small integers once, and the timing on the zeros it leaves.
    """

    def __init__(self, case: Case, rank: int, tensors: list[torch.Tensor], function: Callable[[int], Any]) -> None:
        self._tensors, self._function = tensors, function
        device = tensors[0].device
        self._own = integers(case, rank, device)
        self._expected = torch.stack([integers(case, r, device).float() for r in range(case.world_size)]).sum(0).to(self._own.dtype)
        self._returned: dict[int, Any] = {}
        self.repeatable = False

    def call(self, turn: int) -> None:
        """One all-reduce; what it returns, if it is not in place, is kept for the gate."""
        self._returned[turn % SETS] = self._function(turn % SETS)

    def gate(self, run: Callable[[], None]) -> str | None:
        """The sum of integers is exact."""
        for tensor in self._tensors:
            tensor.copy_(self._own)
        synchronize(self._tensors[0].device)
        run()
        synchronize(self._tensors[0].device)
        results = [r if isinstance(r, torch.Tensor) else t for t, r in zip(self._tensors, self._returned.values(), strict=True)]
        wrong = sum(int((result != self._expected).sum()) for result in results)
        for tensor in self._tensors:
            tensor.zero_()
        self._returned.clear()
        return f"{wrong} elements differ from the exact sum" if wrong else None


class OtherCall:
    """Another library's way to the outputs of a whole call, on :data:`SETS` input sets in turn.

    As with :class:`Baseline`, the terms are small integers for the gate and zeros while it is timed; residual and weight are the case's.
    """

    repeatable = False

    def __init__(self, case: Case, rank: int, tensors: list[torch.Tensor], function: Callable[[int], Output]) -> None:
        self._case, self._tensors, self._function = case, tensors, function
        device = tensors[0].device
        self._own = integers(case, rank, device)
        self._quant = case.quant(device)
        terms = [integers(case, r, device) for r in range(case.world_size)]
        self._expected = []
        for residual, norm in input_sets(case, device):
            self._expected.append(reference.all_reduce(terms, residual=residual, norm=norm, quant=self._quant))
        self._returned: dict[int, Output] = {}

    def call(self, turn: int) -> None:
        """One call; its outputs are kept for the gate."""
        self._returned[turn % SETS] = self._function(turn % SETS)

    def gate(self, run: Callable[[], None]) -> str | None:
        """y is exact; the norm and the decoded codes are within the bounds of :mod:`collogue.tools.bench.epilogue`."""
        for tensor in self._tensors:
            tensor.copy_(self._own)
        synchronize(self._tensors[0].device)
        run()
        synchronize(self._tensors[0].device)
        found = [epilogue.wrong(self._returned[i], expected, self._quant) for i, expected in enumerate(self._expected)]
        for tensor in self._tensors:
            tensor.zero_()
        self._returned.clear()
        return next((text for text in found if text is not None), None)


def input_sets(case: Case, device: torch.device) -> list[tuple[torch.Tensor, RMSNorm]]:
    """Residual and norm of every input set."""
    found = []
    for seed in range(SETS):
        _, residual, norm = arguments(replace(case, seed=seed), 0, device)
        assert residual is not None
        assert norm is not None
        found.append((residual, norm))
    return found


class Baselines:
    """Makes baselines; symmetric tensors are allocated once, for the largest message. Collective."""

    def __init__(
        self, group: dist.ProcessGroup, device: torch.device, largest_bytes: int, tell: Callable[[str], None] = lambda text: None
    ) -> None:
        self._group, self._device, self._bytes, self._tell = group, device, largest_bytes, tell
        self._symmetric: list[torch.Tensor] = []
        self._vllm: Any = None
        self._flashinfer: flashinfer.FlashInfer | Exception | None = None
        self._epilogues: dict[tuple[int, int, str, str], epilogue.Epilogue] = {}

    def make(self, name: str, case: Case) -> Baseline | OtherCall:
        """The baseline ``name`` for the shape of ``case``, or its whole call. Raises what the library raises where it cannot do it."""
        if name in FLASHINFER_WAYS:
            return self._by_flashinfer(name, case)
        if name.endswith(COMPILED):
            return self._chain(name.removesuffix(COMPILED), case)
        tensors, reduce = self._sum(name, case)
        return Baseline(case, dist.get_rank(self._group), tensors, lambda i: reduce(tensors[i]))

    def _sum(self, name: str, case: Case) -> tuple[list[torch.Tensor], Sum]:
        """Tensors for the terms, and the all-reduce of one of them."""
        if name == NCCL:
            return self._tensors(case), lambda x: dist.all_reduce(x, group=self._group)
        if name == VLLM:
            reduce = self._custom_all_reduce()
            return self._tensors(case), lambda x: reduce.all_reduce(x, registered=False)
        group_name = self._group.group_name
        operations: dict[str, Sum] = {
            ONE_SHOT: lambda x: torch.ops.symm_mem.one_shot_all_reduce(x, "sum", group_name),
            TWO_SHOT: lambda x: torch.ops.symm_mem.two_shot_all_reduce_(x, "sum", group_name),
        }
        return self._views(case), operations[name]

    def _tensors(self, case: Case) -> list[torch.Tensor]:
        return [torch.zeros((case.tokens, case.hidden_size), dtype=case.value_dtype, device=self._device) for _ in range(SETS)]

    def _chain(self, name: str, case: Case) -> OtherCall:
        """An all-reduce, then one compiled kernel."""
        tensors, reduce = self._sum(name, case)
        quant, sets = case.quant(self._device), input_sets(case, self._device)
        value = STATIC_SCALE if isinstance(quant, FP8Static) else GLOBAL_SCALE
        scale = torch.tensor(value, dtype=torch.float32, device=self._device)
        key = (case.tokens, case.hidden_size, case.dtype, case.format)
        if key not in self._epilogues:
            self._epilogues[key] = epilogue.compiled(quant, case.eps, (tensors[0], sets[0][0], sets[0][1].weight, scale))
        finish = self._epilogues[key]
        # Ranks that compile for longer must not keep the others waiting in a kernel.
        dist.barrier(self._group)

        def call(i: int) -> Output:
            returned = reduce(tensors[i])
            total = returned if isinstance(returned, torch.Tensor) else tensors[i]
            return epilogue.as_output(finish(total, sets[i][0], sets[i][1].weight, scale), quant)

        return OtherCall(case, dist.get_rank(self._group), tensors, call)

    def _custom_all_reduce(self) -> Any:
        if self._vllm is None:
            from vllm.distributed.device_communicators.custom_all_reduce import CustomAllreduce

            made = CustomAllreduce(dist.new_group(backend="gloo"), self._device, max_size=self._bytes)
            # Later versions look at peer access, and come into being, only when asked to.
            getattr(made, "finalize_p2p", lambda: None)()
            if made.disabled:
                raise RuntimeError("vLLM's custom all-reduce is disabled on this machine")
            self._vllm = made
        return self._vllm

    def _by_flashinfer(self, way: str, case: Case) -> Baseline | OtherCall:
        """FlashInfer's kernel. What kept it from being loaded once is not tried again: compiling takes minutes."""
        if self._flashinfer is None:
            try:
                flashinfer.load(self._tell)
                self._flashinfer = flashinfer.FlashInfer(as_group(self._group), self._bytes // 4, pdl=True)
            except Exception as error:  # of any kind: it is another library
                self._flashinfer = error
        if isinstance(self._flashinfer, Exception):
            raise self._flashinfer
        return subject(self._flashinfer, way, case, dist.get_rank(self._group), self._device)

    def _views(self, case: Case) -> list[torch.Tensor]:
        import torch.distributed._symmetric_memory as symmetric_memory

        if not self._symmetric:
            for _ in range(SETS):
                buffer = symmetric_memory.empty(self._bytes // 4, dtype=torch.float32, device=self._device)
                symmetric_memory.rendezvous(buffer, self._group.group_name)
                self._symmetric.append(buffer)
        count = case.tokens * case.hidden_size
        return [buffer.view(case.value_dtype)[:count].view(case.tokens, case.hidden_size) for buffer in self._symmetric]


def subject(library: flashinfer.FlashInfer, way: str, case: Case, rank: int, device: torch.device) -> Baseline | OtherCall:
    """FlashInfer's call of ``case`` as a subject of timing. Collective."""
    tensors = [torch.zeros((case.tokens, case.hidden_size), dtype=case.value_dtype, device=device) for _ in range(SETS)]
    if not case.norm:
        return Baseline(case, rank, tensors, library.function(way, case, tensors))
    return OtherCall(case, rank, tensors, library.function(way, case, tensors, input_sets(case, device)))

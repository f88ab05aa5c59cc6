"""One rank's part of a check: make the inputs, call, work out the answer, compare.

Inputs are functions of the case and the rank, so every rank can make the partials of all ranks and nothing has to be gathered.
"""

from __future__ import annotations

import functools
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from collogue.communicator import Communicator
from collogue.contract import reference
from collogue.contract.formats import scale_storage
from collogue.contract.prologue import Prologue
from collogue.contract.spec import Output, RMSNorm, owned_rows
from collogue.errors import CollogueError, FormatError
from collogue.testing.compare import Difference, compare
from collogue.testing.covering import PROLOGUES
from collogue.testing.inputs import make_inputs, make_partials, make_prologue
from collogue.testing.oracle import by_rank, by_reference, by_scalar, scalar_term
from collogue.testing.virtual import VirtualGroup
from collogue.tools.check.case import Case, CaseResult, dtype_of
from collogue.tools.check.kernels import capacity_of

#: The byte that fills outputs before a call.
_POISON = 0xA5
#: Errors after which a group cannot go on.
_FATAL = ("CollectiveError", "CollectiveTimeout", "MismatchedCall", "AcceleratorError", "BrokenBarrierError")


class Answers:
    """What a case must return on each rank: by the scalar version on the CPU, by the reference elsewhere; once for a device's threads."""

    #: Cases that are kept: ranks are at most one case apart, and a case of ``all_gather`` begins with the answer to another.
    KEPT = 4

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._known: dict[tuple[torch.device, Case], list[Output]] = {}

    def __call__(self, case: Case, device: torch.device, rank: int = 0) -> Output:
        with self._lock:
            key = (device, case)
            if key not in self._known:
                mine = [known for known in self._known if known[0] == device]
                if len(mine) == self.KEPT:
                    del self._known[mine[0]]
                self._known[key] = self._work_out(case, device)
                if device.type == "cuda":  # other threads read it on streams of their own
                    torch.cuda.current_stream(device).synchronize()
            return self._known[key][rank]

    @staticmethod
    def _work_out(case: Case, device: torch.device) -> list[Output]:
        if case.prologue != "none":
            worked_out = scalar_term if device.type == "cpu" else reference.term_of
            partials = [worked_out(_prologue(case, rank, device)) for rank in range(case.world_size)]
        else:
            partials = make_partials(
                case.inputs,
                case.world_size,
                tokens=case.tokens,
                hidden_size=case.hidden_size,
                dtype=case.value_dtype,
                seed=case.seed,
                device=device,
            )
        _, residual, norm = arguments(replace(case, operation="all_reduce"), 0, device)
        all_reduce = by_scalar if device.type == "cpu" else by_reference
        all_reduce = functools.partial(all_reduce, branch_norm=branch_norm(case, device))
        return by_rank(all_reduce, case.operation, partials, residual, norm, case.quant(device), case.keeps_norm, case.rows)


def _prologue(case: Case, rank: int, device: torch.device) -> Prologue:
    """What ``rank`` passes in the place of a partial."""
    form = PROLOGUES[case.prologue]
    assert form is not None
    return make_prologue(
        form,
        case.inputs,
        rank=rank,
        tokens=case.tokens,
        hidden_size=case.hidden_size,
        dtype=case.value_dtype,
        count=case.slots,
        seed=case.seed,
        device=device,
    )


def arguments(case: Case, rank: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor | None, RMSNorm | None]:
    """What ``rank`` passes to the call: partial, residual (all rows, or its own) and norm. The last two may be ``None``."""
    made = make_inputs(
        case.inputs,
        rank=rank,
        tokens=case.tokens,
        hidden_size=case.hidden_size,
        dtype=case.value_dtype,
        weight_dtype=None if case.weight_dtype is None else dtype_of(case.weight_dtype),
        seed=case.seed,
        device=device,
    )
    norm = RMSNorm(made.weight, eps=case.eps, weight_offset=case.weight_offset) if case.norm else None
    residual = made.residual if case.residual else None
    if residual is not None and case.operation in ("sharded", "reduce_scatter"):
        rows = owned_rows(case.tokens, case.world_size, rank, case.rows)
        residual = residual[rows.start : rows.stop].clone()
    return made.partial, residual, norm


def branch_norm(case: Case, device: torch.device) -> RMSNorm | None:
    """The norm of the sum, where the case has one."""
    if not case.branch:
        return None
    dtype = case.value_dtype if case.weight_dtype is None else dtype_of(case.weight_dtype)
    made = make_inputs("normal", rank=0, tokens=1, hidden_size=case.hidden_size, dtype=dtype, seed=case.seed + 1, device=device)
    return RMSNorm(made.weight, eps=2 * case.eps, weight_offset=case.weight_offset)


@dataclass
class Given:
    """What one rank passes to the call of a case."""

    case: Case
    partial: torch.Tensor  # y of finish
    residual: torch.Tensor | None
    kwargs: dict[str, Any]  # norm, quant, keep_norm, what is seldom given
    shard: Output | None = None  # of all_gather
    prologue: Prologue | None = None

    @classmethod
    def of(cls, case: Case, rank: int, device: torch.device, answers: Answers) -> Given:
        """The shard of ``all_gather`` is the right answer to ``reduce_scatter``, or nothing that the format could have made."""
        partial, residual, norm = arguments(case, rank, device)
        shard = None
        if case.operation == "all_gather":
            shard = answers(replace(case, operation="reduce_scatter"), device, rank) if case.possible else Output(residual=partial)
        kwargs: dict[str, Any] = {"norm": norm, "quant": case.quant(device), "keep_norm": case.keeps_norm}
        if case.branch:
            kwargs["branch_norm"] = branch_norm(case, device)
        if case.rows is not None:
            kwargs["rows"] = case.rows
        return cls(case, partial, residual, kwargs, shard, None if case.prologue == "none" else _prologue(case, rank, device))

    @property
    def in_place(self) -> torch.Tensor | None:
        """The residual, where the call adds it and may update it in place."""
        return self.residual if self.case.operation not in ("all_gather", "finish") else None

    def prepare(self, comm: Communicator) -> None:
        """Build and load the kernels of the call. Collective."""
        norm = self.kwargs["norm"] if self.case.operation != "all_gather" or self.case.asked["norm"] else None
        comm.prepare(
            self.case.tokens,
            hidden_size=self.case.hidden_size,
            quant=self.kwargs["quant"],
            **{**self.case.asked, "norm": norm, "branch_norm": self.kwargs.get("branch_norm")},
        )

    def call(self, comm: Communicator, out: Output | None = None) -> Output:
        """Make the call. Collective."""
        operation, term = self.case.operation, self.partial if self.prologue is None else self.prologue
        if operation == "all_gather":
            assert self.shard is not None
            return comm.all_gather(self.shard, self.case.tokens, quant=self.kwargs["quant"], out=out, rows=self.case.rows)
        if operation == "finish":
            return comm.finish(self.partial, out=out, **self.kwargs)
        if operation == "reduce_scatter":
            return comm.reduce_scatter(term, residual=self.residual, out=out, **self.kwargs)
        if operation == "sharded":
            return comm.all_reduce(term, residual=self.residual, sharded=True, out=out, **self.kwargs)
        return comm.all_reduce(term, residual=self.residual, out=out, **self.kwargs)


def run_case(comm: Communicator, case: Case, answers: Answers, settle: Callable[[], None] | None = None) -> CaseResult:
    """Call the communicator twice and compare: once with outputs of its own, once with poisoned ``out=`` and the residual in place.

    Collective: every rank of ``comm``, with the same case. Where ranks share GPUs, ``settle`` waits for all of them: kernels are
    then prepared first, and nothing that might wait for a whole GPU comes between the launches of one call.
    """
    start = time.perf_counter()
    zero = dict.fromkeys(case.outputs, 0)
    expected_error = None if case.possible else FormatError.__name__
    try:
        given = Given.of(case, comm.rank, comm.device, answers)
        if settle is not None and case.tokens:
            given.prepare(comm)
            settle()
        fresh = given.call(comm)
        if settle is not None:
            settle()
        expected = answers(case, comm.device, comm.rank)
        out = poisoned(expected)
        if given.in_place is not None:
            out.residual = given.in_place
        if settle is not None:
            settle()
        written = given.call(comm, out)
        if settle is not None:
            settle()
        found = [compare(fresh, expected), compare(written, expected)]
        comm.check()
    except Exception as error:  # a case must not end the sweep; the error is its result
        return CaseResult(case, zero, _text(error), expected_error, None, time.perf_counter() - start)
    names = dict.fromkeys([*case.outputs, *(name for f in found for name in f)])
    differing = {name: sum(_count(f, name) for f in found) for name in names}
    first = next((d.first for f in found for d in f.values() if d.count), None)
    return CaseResult(case, differing, None, expected_error, first, time.perf_counter() - start)


def _count(found: dict[str, Difference], name: str) -> int:
    return found[name].count if name in found else 1


def poisoned(like: Output) -> Output:
    """Outputs of the same form, every byte (padding too) set to something that no call should leave."""
    result = Output()
    for name, tensor in like.items():
        elements = scale_storage(tensor).numel() // tensor.element_size() if name == "scales" else tensor.numel()
        memory = torch.empty(elements, dtype=tensor.dtype, device=tensor.device)
        setattr(result, name, memory.as_strided(tensor.shape, tensor.stride()))
    poison(result)
    return result


def poison(output: Output) -> None:
    """Spoil every byte of every tensor there is."""
    for name, tensor in output.items():
        memory = scale_storage(tensor) if name == "scales" else tensor.reshape(-1).view(torch.uint8)
        memory.fill_(_POISON)


def check_rank(group: Any, cases: Sequence[Case], answers: Answers, tell: Callable[[str], None]) -> list[CaseResult]:
    """Run all cases on this rank of ``group``. One communicator per dtype serves them all. ``tell`` hears of each case that starts.

    After a failed collective the remaining cases are not run, and say so.
    """
    comms: dict[str, Communicator] = {}
    results: list[CaseResult] = []
    virtual = isinstance(group, VirtualGroup) and group.device.type == "cuda"
    broken: str | None = None
    for case in cases:
        tell(str(case))
        if broken is not None:
            results.append(CaseResult(case, dict.fromkeys(case.outputs, 0), broken))
            continue
        try:
            if case.dtype not in comms:
                comms[case.dtype] = _communicator(group, [c for c in cases if c.dtype == case.dtype])
            result = run_case(comms[case.dtype], case, answers, group.settle if virtual else None)
        except CollogueError as error:
            result = CaseResult(case, dict.fromkeys(case.outputs, 0), _text(error))
            broken = f"{result.error}; not run after {case}"
        if result.error is not None and result.error.startswith(_FATAL):
            broken = f"not run after {case}"
            if virtual:
                group.abort()  # ranks that have not noticed must not wait for this one
        results.append(result)
    if broken is None:
        for comm in comms.values():
            comm.close()
    return results


def _communicator(group: Any, cases: Sequence[Case]) -> Communicator:
    """One that holds the largest of ``cases``, which share a dtype."""
    tokens, width = capacity_of(cases)
    return Communicator(group, max_tokens=tokens, hidden_size=width, dtype=cases[0].value_dtype)


def _text(error: Exception) -> str:
    """An error in one line: its class and what it says, without the hint."""
    return f"{type(error).__name__}: {error}".splitlines()[0]

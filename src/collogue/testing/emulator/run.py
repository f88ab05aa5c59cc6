"""Runs sequences of calls on all ranks at once and compares everything that is left with the contract."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass, fields

import torch

from collogue.call import Call, allocate
from collogue.cuda import fill_epilogue
from collogue.formats import scale_storage
from collogue.launch import Params
from collogue.plan import GENERATIONS, slot_bytes
from collogue.spec import Output, RMSNorm
from collogue.testing.compare import compare
from collogue.testing.emulator.build import Case, Library
from collogue.testing.inputs import make_inputs
from collogue.testing.oracle import by_reference
from collogue.workspace import CONTROL_BYTES, SENTINELS, FailureRecord

#: What the adversary does, in the order of ``Mode`` in `machine.hpp`: treats all alike; holds a rank up; lets a rank run ahead;
#: holds CTAs up; keeps a rank from launching one of its kernels until all others have ended.
MODES = ("fair", "late", "ahead", "slow_ctas", "absent")
_POISON = 0xEE
_STOP_WORD = 4  # of the control words (kernels/protocol.cuh)


class _Job(ctypes.Structure):
    """Mirrors ``Job`` in `driver.hpp`."""

    _fields_ = [
        *((name, ctypes.c_uint32) for name in ("ranks", "calls", "cluster", "threads", "mode", "victim", "absent_call", "bytes")),
        *((name, ctypes.c_uint64) for name in ("seed", "workspace_bytes", "failure_bytes")),
        *((name, ctypes.c_void_p) for name in ("params", "rows", "sent")),
        ("ticks", ctypes.c_uint64),
        ("error", ctypes.c_char * 256),
    ]


@dataclass(frozen=True)
class Run:
    """What came of it. ``sent``, by call and rank: 32-bit words stored in the slots of peers; ``stops``: every rank's stop word."""

    error: str
    outputs: list[list[Output]]
    expected: list[Output]
    failures: list[FailureRecord]
    stops: list[int]
    sent: list[list[int]]
    leftover: int
    ticks: int

    def problem(self) -> str:
        """The first thing that is not as it should be; empty after a good run."""
        if self.error:
            return self.error
        for record in self.failures:
            if record.kind:
                return f"rank {record.rank} failed at call {record.call}: kind {record.kind}, late rank {record.late_rank}"
        for call, (outputs, expected) in enumerate(zip(self.outputs, self.expected, strict=True)):
            for rank, actual in enumerate(outputs):
                for difference in compare(actual, expected).values():
                    if difference.count:
                        return f"call {call}, rank {rank}: {difference.first}"
        if self.leftover:
            return f"{self.leftover} words were left in slots that should be clean"
        return ""


def emulate(
    library: Library,
    tokens: Sequence[int],
    *,
    seed: int,
    mode: str = "fair",
    victim: int = 0,
    absent_call: int | None = None,
    kind: str = "normal",
    timeout: float = 1.0,
    generations: int = GENERATIONS,
) -> Run:
    """One call after the other on every rank, queued at once; call ``i`` has ``tokens[i]`` tokens.

    Args:
        seed: of the inputs and of the adversary.
        mode: a name of :data:`MODES`; ``victim`` is its rank, ``absent_call`` the call that it does not launch.
        kind: of inputs (:data:`collogue.testing.inputs.KINDS`). Words that look like the sentinel are sprinkled over the partials.
        timeout: in emulated seconds, of one million scheduling points each.
        generations: of slots that the library was compiled with; differs only in mutated twins, at most :data:`GENERATIONS`.
    """
    case = library.case
    partials, residuals, weights = zip(*(_inputs(case, t, kind, seed + i) for i, t in enumerate(tokens)), strict=True)
    norms = [RMSNorm(w, eps=1e-6, weight_offset=1.0) if case.norm else None for w in weights]
    expected = [by_reference(p, r, n, case.quant, case.keep_norm) for p, r, n in zip(partials, residuals, norms, strict=True)]
    # The local kernel reads all terms from the memory of one rank, so they lie behind each other.
    terms = [torch.stack(p) for p in partials]
    ranks = 1 if case.kernel == "local" else case.world
    calls = [
        [Call(term, residual, norm, case.quant, case.wanted) for term in stack[:ranks]]
        for stack, residual, norm in zip(terms, residuals, norms, strict=True)
    ]
    outputs = [[_poisoned(call) for call in of_ranks] for of_ranks in calls]
    memory = _Memory(case, ranks)
    params = (Params * (len(calls) * ranks))()
    for i, of_ranks in enumerate(calls):
        for rank, call in enumerate(of_ranks):
            _fill(params[i * ranks + rank], rank, call, outputs[i][rank], memory, int(timeout * 1e9))
    rows = (ctypes.c_uint32 * len(calls))(*(min(t, case.rows or t) for t in tokens))
    sent = (ctypes.c_uint64 * len(params))()
    never = len(calls)
    job = _Job(ranks, len(calls), case.cluster, case.threads, MODES.index(mode), victim, never if absent_call is None else absent_call)
    job.bytes = ctypes.sizeof(_Job)
    job.seed, job.workspace_bytes, job.failure_bytes = seed, memory.workspaces[0].nbytes, ctypes.sizeof(FailureRecord)
    job.params, job.rows, job.sent = ctypes.addressof(params), ctypes.addressof(rows), ctypes.addressof(sent)
    library.emulate(ctypes.byref(job))
    assert job.ticks > 0, "driver.hpp and run.py describe a job differently"
    return Run(
        error=job.error.decode(),
        outputs=outputs,
        expected=expected,
        failures=list(memory.failures),
        stops=[int(workspace[_STOP_WORD]) for workspace in memory.workspaces],
        sent=[list(sent[i * ranks : (i + 1) * ranks]) for i in range(len(calls))],
        leftover=memory.leftover((len(calls) - 1) % generations),
        ticks=job.ticks,
    )


class _Memory:
    """What lies in symmetric and pinned memory: as :class:`collogue.workspace.Workspace` makes it, workspaces as int32 words."""

    def __init__(self, case: Case, ranks: int) -> None:
        self.slot_bytes = slot_bytes(case.topology)
        self.sentinel = SENTINELS[case.dtype.itemsize] - (1 << 32)
        self.slots = (GENERATIONS, case.world, self.slot_bytes // 4)
        self.workspaces = [
            torch.full(((CONTROL_BYTES + GENERATIONS * case.world * self.slot_bytes) // 4,), self.sentinel, dtype=torch.int32)
            for _ in range(ranks)
        ]
        for workspace in self.workspaces:
            workspace[: CONTROL_BYTES // 4] = 0
        self.failures = (FailureRecord * ranks)()

    def leftover(self, last: int) -> int:
        """Words that are not sentinels where the next call expects them: other ranks' slots of generation ``last`` hold the last call."""
        total = 0
        for rank, workspace in enumerate(self.workspaces):
            dirty = (workspace[CONTROL_BYTES // 4 :].view(self.slots) != self.sentinel).sum(dim=2)
            dirty[last, torch.arange(self.slots[1]) != rank] = 0
            total += int(dirty.sum())
        return total


def _fill(p: Params, rank: int, call: Call, out: Output, memory: _Memory, timeout_ns: int) -> None:
    """The parameters of one launch."""
    p.partial, p.partial_stride = call.partial.data_ptr(), call.partial.nbytes
    if call.residual is not None:
        p.residual = call.residual.data_ptr()
    fill_epilogue(p, call.norm, call.quant, out)
    p.tokens, p.hidden, p.rank, p.slot_bytes = call.tokens, call.hidden_size, rank, memory.slot_bytes
    p.column_stride = -(-call.tokens // 4) * 4
    p.timeout_ns, p.failure = timeout_ns, ctypes.addressof(memory.failures[rank])
    for peer, workspace in enumerate(memory.workspaces):
        p.workspace[peer] = workspace.data_ptr()


def _inputs(case: Case, tokens: int, kind: str, seed: int) -> tuple[list[torch.Tensor], torch.Tensor | None, torch.Tensor]:
    """Partials by rank, with words of negative zeros here and there; residual; weight."""
    shape = {"tokens": tokens, "hidden_size": case.hidden_size, "dtype": case.dtype}
    inputs = [make_inputs(kind, rank=rank, seed=seed, **shape) for rank in range(case.world)]  # type: ignore[arg-type]
    generator = torch.Generator().manual_seed(seed)
    per_word = 4 // case.dtype.itemsize
    for one in inputs:
        hit = torch.rand(tokens, case.hidden_size // per_word, generator=generator) < 0.125
        one.partial[hit.repeat_interleave(per_word, dim=1)] = -0.0
    return [one.partial for one in inputs], inputs[0].residual if case.residual else None, inputs[0].weight


def _poisoned(call: Call) -> Output:
    out = allocate(call)
    for field in fields(Output):
        tensor = getattr(out, field.name)
        if tensor is not None:
            flat = scale_storage(tensor) if field.name == "scales" else tensor
            flat.view(torch.uint8).fill_(_POISON)
    return out

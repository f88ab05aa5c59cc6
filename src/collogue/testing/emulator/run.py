"""Runs sequences of calls on all ranks at once and compares everything that is left with the contract."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass, fields

import torch

from collogue import reference
from collogue.call import Call, allocate
from collogue.formats import scale_storage
from collogue.launch import Params, timeouts
from collogue.parameters import fill_epilogue, fill_shape, fill_shard, fill_workspace
from collogue.plan import CONTROL_BYTES, ONE_SHOT_GENERATIONS, Plan, workspace_extent
from collogue.spec import Output, RMSNorm, owned_rows
from collogue.testing.compare import compare
from collogue.testing.emulator.build import Case, Library
from collogue.testing.inputs import make_inputs
from collogue.workspace import SENTINELS, FailureRecord

#: What the adversary does, in the order of ``Mode`` in `machine.hpp`: treats all alike; holds a rank up; lets a rank run ahead;
#: holds CTAs up; keeps a rank from launching one of its kernels until all others have ended.
MODES = ("fair", "late", "ahead", "slow_ctas", "absent")
_POISON = 0xEE
_STOP_WORD = 2  # of the control words (kernels/protocol.cuh)


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
    expected: list[list[Output]]
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
            if record.fault:
                return f"rank {record.rank} failed at call {record.call}: fault {record.fault}, late rank {record.late_rank}"
        for call, (outputs, expected) in enumerate(zip(self.outputs, self.expected, strict=True)):
            for rank, actual in enumerate(outputs):
                for difference in compare(actual, expected[rank]).values():
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
) -> Run:
    """One call after the other on every rank, queued at once; call ``i`` has ``tokens[i]`` tokens.

    Args:
        seed: of the inputs and of the adversary.
        mode: a name of :data:`MODES`; ``victim`` is its rank, ``absent_call`` the call that it does not launch.
        kind: of inputs (:data:`collogue.testing.inputs.KINDS`). Words that look like the sentinel are sprinkled over the partials.
        timeout: in emulated seconds, of one million scheduling points each.
    """
    case = library.case
    ranks = case.world
    every = [_call(case, t, kind, seed + i) for i, t in enumerate(tokens)]
    calls, expected = [calls for calls, _ in every], [outputs for _, outputs in every]
    outputs = [[_poisoned(call) for call in of_ranks] for of_ranks in calls]
    memory = _Memory(case, ranks)
    params = (Params * (len(calls) * ranks))()
    for i, of_ranks in enumerate(calls):
        for rank, call in enumerate(of_ranks):
            _fill(params[i * ranks + rank], case, rank, call, outputs[i][rank], memory, timeout)
    rows = (ctypes.c_uint32 * len(calls))(*(min(case.rows_of(t), case.rows or t) for t in tokens))
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
        leftover=memory.leftover(len(calls) - 1),
        ticks=job.ticks,
    )


class _Memory:
    """What lies in symmetric and pinned memory: as :class:`collogue.workspace.Workspace` makes it, workspaces as int32 words."""

    def __init__(self, case: Case, ranks: int) -> None:
        self.extent = workspace_extent(case.topology)
        self.sentinel = SENTINELS[case.dtype.itemsize] - (1 << 32)
        words = self.extent.total // 4
        self.workspaces = [torch.full((words,), self.sentinel, dtype=torch.int32) for _ in range(ranks)]
        for workspace in self.workspaces:
            workspace[: CONTROL_BYTES // 4] = 0
        self.failures = (FailureRecord * ranks)()

    def leftover(self, last: int) -> int:
        """Words that are not sentinels although every kernel has ended; one-shot call ``last`` leaves its own for the next call."""
        total = 0
        for workspace in self.workspaces:
            dirty = workspace[CONTROL_BYTES // 4 :] != self.sentinel
            dirty[: self.extent.one_shot * ONE_SHOT_GENERATIONS // 4].view(ONE_SHOT_GENERATIONS, -1)[last % ONE_SHOT_GENERATIONS] = False
            total += int(dirty.sum())
        return total


def _fill(p: Params, case: Case, rank: int, call: Call, out: Output, memory: _Memory, timeout: float) -> None:
    """The parameters of one launch."""
    request = case.request(call.tokens)
    fill_shape(p, case.topology, request, Plan(case.algorithm, "", None, 0, 0.0, 0.0, case.rows_of(call.tokens)), rank)
    if call.shard is not None:
        fill_shard(p, call.shard, out)
    else:
        p.partial = call.partial.data_ptr()
        if call.residual is not None:
            p.residual = call.residual.data_ptr()
        fill_epilogue(p, call.norm, call.quant, out)
    fill_workspace(p, memory.extent, case.algorithm)
    p.failure = ctypes.addressof(memory.failures[rank])
    p.timeout, p.relay_timeout = timeouts(timeout)
    for peer, workspace in enumerate(memory.workspaces):
        p.workspace[peer] = workspace.data_ptr()


def _call(case: Case, tokens: int, kind: str, seed: int) -> tuple[list[Call], list[Output]]:
    """What every rank calls, and what every rank must get."""
    partials, residual, weight = _inputs(case, tokens, kind, seed)
    norm = RMSNorm(weight, eps=1e-6, weight_offset=1.0) if case.norm else None
    epilogue = {"residual": residual, "norm": norm, "quant": case.quant, "keep_norm": case.keep_norm}
    rows = [owned_rows(tokens, case.world, rank) for rank in range(case.world)]
    if case.operation == "all_reduce":
        expected = [reference.all_reduce(partials, **epilogue)] * case.world  # type: ignore[arg-type]
        return [Call(p, residual, norm, case.quant, case.wanted) for p in partials], expected
    scatter = reference.sharded if case.kernel == "sharded" else reference.reduce_scatter
    expected = scatter(partials, **epilogue)  # type: ignore[arg-type]
    if case.kernel == "all_gather":
        names = ("codes", "scales") if case.quant is not None else ("norm",)
        shards = [Output(**{name: getattr(one, name) for name in names}) for one in expected]
        whole = torch.empty(tokens, case.hidden_size, dtype=case.dtype, device="meta")
        calls = [Call(whole, None, None, case.quant, case.wanted, "all_gather", r, s) for r, s in zip(rows, shards, strict=True)]
        return calls, [reference.all_gather(shards, quant=case.quant)] * case.world
    own = [None if residual is None else residual[r.start : r.stop].clone() for r in rows]
    calls = [Call(p, mine, norm, case.quant, case.wanted, case.operation, r) for p, mine, r in zip(partials, own, rows, strict=True)]
    return calls, expected


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

"""Runs sequences of calls on all ranks at once and compares everything that is left with the contract."""

from __future__ import annotations

import ctypes
import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, TypeAlias

import torch

from collogue import kernels
from collogue.calls.call import Call
from collogue.calls.product import ProductForm, ScaledProduct
from collogue.calls.request import Signature
from collogue.calls.terms import Terms, TermsForm
from collogue.contract import reference
from collogue.contract.formats import place_scales, read_scales, scale_storage
from collogue.contract.prologue import Prologue
from collogue.contract.spec import Output, RMSNorm, owned_rows
from collogue.gpu.failure import FailureRecord
from collogue.gpu.launch import Params, timeouts
from collogue.gpu.parameters import fill_call, fill_shape, fill_shard, fill_workspace, later_launches
from collogue.gpu.workspace import JOURNAL_OFFSET, SENTINELS, Control, clean_control
from collogue.host.finish import ReferenceFinisher
from collogue.planning.algorithm import ALGORITHMS
from collogue.planning.extent import CONTROL_BYTES, ONE_SHOT_GENERATIONS, Extent
from collogue.testing.compare import compare
from collogue.testing.emulator.build import Case, Library
from collogue.testing.inputs import make_inputs, make_prologue

#: What the adversary does, in the order of ``Mode`` in `machine.hpp`: treats all alike; holds a rank up; lets a rank run ahead;
#: holds CTAs up; keeps a rank from launching one of its kernels until all others have ended.
MODES = ("fair", "late", "ahead", "slow_ctas", "absent")
#: Makes a rank's partial from the one that the kind of inputs has given it.
Change: TypeAlias = Callable[[int, torch.Tensor], torch.Tensor]
_POISON = 0xEE
_LEFT_UNIT = kernels.constants("protocol.cuh")["kLeftUnit"]  # what one-shot leaves to be cleaned is a multiple of this
_NEVER = (1 << 32) - 1
_UNBOUNDED = 1 << 30


class _Launch(ctypes.Structure):
    """Mirrors ``Launch`` in `driver.cpp`."""

    _fields_ = [
        ("params", ctypes.c_void_p),
        ("sent", ctypes.c_uint64),
        *((name, ctypes.c_uint32) for name in ("kernel", "rank", "number", "cluster", "rows", "threads")),
    ]


class _Job(ctypes.Structure):
    """Mirrors ``Job`` in `driver.cpp`."""

    _fields_ = [
        *((name, ctypes.c_uint32) for name in ("ranks", "launches", "mode", "victim", "absent_launch", "bytes")),
        *((name, ctypes.c_uint32) for name in ("gpus", "ctas", "in_order", "skew")),
        *((name, ctypes.c_uint64) for name in ("seed", "workspace_bytes", "failures", "failure_bytes", "ticks", "outputs")),
        ("output", ctypes.c_void_p),
        ("launch", ctypes.c_void_p),
        ("error", ctypes.c_char * 256),
    ]


@dataclass(frozen=True)
class Ask:
    """What a rank is called with: a number of tokens, which case of the library, and what is not compiled in.

    ``rows``: how many each rank owns, where the case is of uneven rows. ``write_padding`` as of the call; without it what kernels must
    leave as it was is in the expected outputs too.
    """

    tokens: int
    case: int = 0
    eps: float = 1e-6
    rows: tuple[int, ...] | None = None
    write_padding: bool = True


@dataclass(frozen=True)
class Run:
    """What came of it, by call and rank. ``sent``: 32-bit words stored in the slots of peers; ``controls``: by rank, after the last call.

    ``expected`` is empty for a call that the ranks were given differently.
    """

    error: str
    outputs: list[list[Output]]
    expected: list[list[Output]]
    failures: list[FailureRecord]
    controls: list[Control]
    sent: list[list[int]]
    leftover: int
    ticks: int

    @property
    def stops(self) -> list[int]:
        """Every rank's abort flag."""
        return [control.stop for control in self.controls]

    def problem(self) -> str:
        """The first thing that is not as it should be; empty after a good run."""
        if self.error:
            return self.error
        for record in self.failures:
            if record.fault:
                return f"rank {record.rank} failed at call {record.call}: fault {record.fault}, late rank {record.late_rank}"
        for call, (outputs, expected) in enumerate(zip(self.outputs, self.expected, strict=True)):
            for rank, (actual, right) in enumerate(zip(outputs, expected, strict=True)):
                for difference in compare(actual, right).values():
                    if difference.count:
                        return f"call {call}, rank {rank}: {difference.first}"
        if self.leftover:
            return f"{self.leftover} words were left in slots that should be clean"
        return ""


def emulate(
    library: Library,
    calls: Sequence[int | Ask | Sequence[Ask]],
    *,
    seed: int,
    mode: str = "fair",
    victim: int = 0,
    absent_call: int | None = None,
    kind: str = "normal",
    terms: Change | None = None,
    timeout: float = 1.0,
    before: Callable[[list[torch.Tensor]], None] = lambda workspaces: None,
    written_late: int | None = None,
    communicators: int = 1,
    ctas: int | None = None,
    in_order: bool = False,
    skew: int = 0,
) -> Run:
    """One call after the other on every rank, queued at once.

    Args:
        calls: of each its number of tokens, or what every rank, or each rank, is called with.
        seed: of the inputs and of the adversary.
        mode: a name of :data:`MODES`; ``victim`` is its rank, ``absent_call`` the call that it does not launch.
        kind: of inputs (:data:`collogue.testing.inputs.KINDS`). Words that look like the sentinel are sprinkled over the partials.
        terms: changes the partials.
        timeout: in emulated seconds, of one million scheduling points each.
        before: may spoil the ranks' workspaces, as words of 32 bits, before the first call.
        written_late: the weight and a scale that is a tensor are written just before each call, by a kernel that has let the next one
            start long before, with so many kernels between it and the call.
        communicators: so many on the same GPUs, each with its workspace and its stream, each making all the calls. What the run says
            by call and rank it says of one communicator behind the other.
        ctas: that a GPU holds at a time; ``None``: all.
        in_order: whether the clusters of a grid start in order, as GPUs are seen to do.
        skew: each stream starts within so many scheduling points.
    """
    world = library.world
    failures = (FailureRecord * (communicators * world))()
    memories = [_Memory(library, ctypes.addressof(failures[c * world])) for c in range(communicators)]
    before([workspace for memory in memories for workspace in memory.workspaces])
    every: list[object] = []  # keeps what kernels read
    outputs, expected = [], []
    written: list[tuple[int, int]] = []  # memory that other kernels write
    streams: list[list[tuple[int, _Launch, Params]]] = [[] for _ in range(communicators * world)]
    counted, absent_launch = [0] * len(streams), _NEVER
    for i, (c, call) in enumerate((c, call) for c in range(communicators) for call in calls):
        memory, asked = memories[c], _by_rank(call, world)
        made = {ask: _calls(library.cases[ask.case], ask, kind, seed + i, terms) for ask in set(asked)}
        made = {ask: (given, right if ask.write_padding else _unpadded(given, right)) for ask, (given, right) in made.items()}
        every.append(made)
        others: list[list[tuple[_Launch, Params]]] = [[] for _ in range(world)]
        if written_late is not None:
            late = [_written_late(library, made[ask][0][rank], c * world + rank, written_late, memory) for rank, ask in enumerate(asked)]
            made = {ask: ([call for call, *_ in late], right) for ask, (_, right) in made.items()}
            others = [launches for _, launches, _ in late]
            written += [r for *_, ranges in late for r in ranges]
            every.append(made)
        outputs.append([_poisoned(made[ask][0][rank]) for rank, ask in enumerate(asked)])
        expected.append(made[asked[0]][1] if len(made) == 1 else [])
        if i == absent_call:
            absent_launch = len(streams[victim])
        for rank, ask in enumerate(asked):
            case, stream = library.cases[ask.case], c * world + rank
            streams[stream] += [(i, launch, params) for launch, params in others[rank]]
            for params in _launches(case, ask, rank, made[ask][0][rank], outputs[i][rank], memory, timeout):
                shape = case.cluster, case.clusters_of(ask.tokens, ask.rows), case.threads
                streams[stream].append((i, _Launch(0, 0, ask.case, stream, counted[stream], *shape), params))
                facts = ALGORITHMS[case.algorithm]
                counted[stream] += not facts.alone
                memory.left = facts.one_hop or (memory.left and facts.alone)
    queued = [launch for stream in streams for launch in stream]
    array = (_Launch * len(queued))(*(launch for _, launch, _ in queued))
    for launch, (_, _, params) in zip(array, queued, strict=True):
        launch.params = ctypes.addressof(params)
    job = _Job(len(streams), len(queued), MODES.index(mode), victim, absent_launch, ctypes.sizeof(_Job))
    job.gpus, job.ctas, job.in_order, job.skew, job.seed = world, _UNBOUNDED if ctas is None else ctas, in_order, skew, seed
    job.workspace_bytes, job.launch = memories[0].workspaces[0].nbytes, ctypes.addressof(array)
    job.failures, job.failure_bytes = ctypes.addressof(failures), ctypes.sizeof(FailureRecord)
    ranges = sorted([*(r for of_call in outputs for out in of_call for r in _memory_of(out)), *written])
    flat = (ctypes.c_uint64 * (2 * len(ranges)))(*(end for r in ranges for end in r))
    job.outputs, job.output = len(ranges), ctypes.addressof(flat)
    library.emulate(ctypes.byref(job))
    assert job.ticks > 0, "driver.cpp and run.py describe a job differently"
    sent = [[0] * world for _ in outputs]
    for launch, (i, _, _) in zip(array, queued, strict=True):
        sent[i][launch.rank % world] += launch.sent
    controls = [control for memory in memories for control in memory.controls()]
    plausible = all(control.plausible for control in controls)
    return Run(
        error=job.error.decode() or ("" if plausible else "the control words are not as kernels write them"),
        outputs=outputs,
        expected=expected,
        failures=list(failures),
        controls=controls,
        sent=sent,
        leftover=sum(memory.leftover(counted[0] - 1) for memory in memories),
        ticks=job.ticks,
    )


def _memory_of(out: Output) -> Iterator[tuple[int, int]]:
    """First address, and the one behind the last, of each tensor."""
    for name, tensor in out.items():
        flat = scale_storage(tensor) if name == "scales" else tensor
        yield flat.data_ptr(), flat.data_ptr() + flat.nbytes


def _by_rank(call: int | Ask | Sequence[Ask], ranks: int) -> list[Ask]:
    if isinstance(call, int):
        call = Ask(call)
    return [call] * ranks if isinstance(call, Ask) else list(call)


class _Memory:
    """What lies in symmetric and pinned memory, workspaces as int32 words. A generation is what the largest call needs, no more."""

    def __init__(self, library: Library, failures: int) -> None:
        self.failures = failures  # address of the first rank's record
        needs = {case: case.memory_of(case.max_tokens) for case in library.cases}
        one_shot = max((n for case, n in needs.items() if ALGORITHMS[case.algorithm].one_hop), default=1)
        others = max((n for case, n in needs.items() if not ALGORITHMS[case.algorithm].one_hop), default=0)
        self.extent = Extent(-(-one_shot // _LEFT_UNIT) * _LEFT_UNIT, others)
        self.sentinel = SENTINELS[library.cases[0].dtype.itemsize] - (1 << 32)
        self.workspaces = [torch.full((self.extent.total // 4,), self.sentinel, dtype=torch.int32) for _ in range(library.world)]
        for workspace in self.workspaces:
            workspace[: CONTROL_BYTES // 4] = torch.frombuffer(clean_control(), dtype=torch.int32)
        self.generations = library.one_shot_generations
        self.left = False  # the last call has left its generation to the next one

    def controls(self) -> list[Control]:
        """The control words of every rank."""
        return [Control.of(workspace[: JOURNAL_OFFSET // 4].numpy().tobytes()) for workspace in self.workspaces]

    def leftover(self, last: int) -> int:
        """Words that are not sentinels although every kernel has ended; one-shot call ``last`` leaves its own for the next call."""
        total = 0
        for workspace in self.workspaces:
            dirty = workspace[CONTROL_BYTES // 4 :] != self.sentinel
            if self.left:
                generations = dirty[: self.extent.one_shot * ONE_SHOT_GENERATIONS // 4].view(ONE_SHOT_GENERATIONS, -1)
                generations[last % self.generations] = False
            total += int(dirty.sum())
        return total


def _launches(case: Case, ask: Ask, rank: int, call: Call, out: Output, memory: _Memory, timeout: float) -> Iterator[Params]:
    """The parameters of the launches of one call."""
    request, made = call.signature.request, case.plan_of(ask.tokens, ask.rows)
    for more in (None, *later_launches(case.topology, request, made, rank)):
        p = Params()
        fill_shape(p, case.topology, request, made, rank)
        if more is not None:
            p.first, p.count, p.scale_rows = more
        if call.shard is not None:
            fill_shard(p, call.shard, out, "norm" if call.quant is None else "codes")
        else:
            fill_call(p, call, out)
        fill_workspace(p, memory.extent, case.algorithm)
        p.failure = memory.failures + rank * ctypes.sizeof(FailureRecord)
        p.timeout, p.relay_timeout = timeouts(timeout)
        for peer, workspace in enumerate(memory.workspaces):
            p.workspace[peer] = workspace.data_ptr()
        yield p


def _written_late(
    library: Library, call: Call, rank: int, between: int, memory: _Memory
) -> tuple[Call, list[tuple[_Launch, Params]], list[tuple[int, int]]]:
    """``call`` with a weight and a scale that hold nothing yet, the launches that write them, and their memory."""
    launches: list[tuple[_Launch, Params]] = []
    ranges, norm, quant = [], call.norm, call.quant

    def late(tensor: torch.Tensor) -> torch.Tensor:
        empty = torch.full_like(tensor, 3.0)
        source = tensor.view(torch.int32) if tensor.dim() else tensor.reshape(1).view(torch.int32)
        writer = Params(partial=source.data_ptr(), stream=empty.data_ptr(), tokens=source.numel())
        launches.append((_Launch(0, 0, len(library.cases), rank, 0, 1, 1, 32), writer))
        ranges.append((empty.data_ptr(), empty.data_ptr() + empty.nbytes))
        return empty

    if norm is not None:
        norm = replace(norm, weight=late(norm.weight))
    if quant is not None and isinstance(quant.given_scale, torch.Tensor):
        quant = replace(quant, **{"global_scale" if hasattr(quant, "global_scale") else "scale": late(quant.given_scale)})
    launches += [(_Launch(0, 0, len(library.cases) + 1, rank, 0, 1, 1, 32), Params()) for _ in range(between)]
    for _, params in launches:
        params.rank = rank % library.world
        for peer, workspace in enumerate(memory.workspaces):
            params.workspace[peer] = workspace.data_ptr()
    return replace(call, norm=norm, quant=quant), launches, ranges


def _calls(case: Case, ask: Ask, kind: str, seed: int, terms: Change | None) -> tuple[list[Call], list[Output]]:
    """What every rank calls, and what every rank must get."""
    values, residual, weight = _inputs(case, ask.tokens, kind, seed)
    if terms is not None:
        values = [terms(rank, partial) for rank, partial in enumerate(values)]
    partials: list[torch.Tensor | Prologue] = [*values]
    if case.prologue is not None:
        partials = [
            make_prologue(
                case.prologue,
                kind,
                rank=rank,
                tokens=ask.tokens,
                hidden_size=case.hidden_size,
                dtype=case.dtype,
                count=case.slots,
                seed=seed,
                wild=True,
            )
            for rank in range(case.world)
        ]
    norm = RMSNorm(weight, eps=ask.eps, weight_offset=1.0, prefetch=case.prefetch) if case.norm else None
    branch = RMSNorm(_inputs(case, 1, kind, seed + 1)[2], eps=2 * ask.eps, weight_offset=0.5) if case.branch else None
    epilogue = {"residual": residual, "norm": norm, "quant": case.quant, "keep_norm": case.keep_norm, "branch_norm": branch}
    request, device = replace(case.request(ask.tokens, ask.rows), write_padding=ask.write_padding), torch.device("cpu")
    rows = [owned_rows(ask.tokens, case.world, rank, request.rows) for rank in range(case.world)]
    whole = Signature(request, None, device)
    if case.terms is not None:
        make: Any = _product if isinstance(case.terms, ProductForm) else _terms
        every = [make(case.terms, case, ask.tokens, kind, seed + 100 * rank) for rank in range(case.world)]
        calls = [Call(terms, residual, norm, case.quant, case.keep_norm, branch_norm=branch, signature=whole) for terms in every]
        return calls, [_finished(call) for call in calls]
    if case.operation == "finish":
        expected = [reference.finish(p, norm=norm, quant=case.quant, keep_norm=case.keep_norm) for p in partials]  # type: ignore[arg-type]
        return [Call(p, None, norm, case.quant, operation="finish", signature=whole) for p in partials], expected
    if ALGORITHMS[case.algorithm].alone:
        expected = [reference.all_reduce([p], **epilogue) for p in partials]  # type: ignore[arg-type]
        return [Call(p, residual, norm, case.quant, branch_norm=branch, signature=whole) for p in partials], expected
    if case.operation == "all_reduce":
        expected = [reference.all_reduce(partials, **epilogue)] * case.world  # type: ignore[arg-type]
        return [Call(p, residual, norm, case.quant, branch_norm=branch, signature=whole) for p in partials], expected
    scatter = reference.sharded if case.kernel == "sharded" else reference.reduce_scatter
    expected = scatter(partials, rows=request.rows, **epilogue)  # type: ignore[arg-type]
    if case.kernel == "all_gather":
        names = ("codes", "scales") if case.quant is not None else ("norm",)
        shards = [Output(**{name: getattr(one, name) for name in names}) for one in expected]
        shape = torch.empty(ask.tokens, case.hidden_size, dtype=case.dtype, device="meta")
        calls = [
            Call(shape, quant=case.quant, operation="all_gather", shard=s, signature=Signature(request, r, device))
            for r, s in zip(rows, shards, strict=True)
        ]
        return calls, [reference.all_gather(shards, quant=case.quant, rows=request.rows)] * case.world
    own = [None if residual is None else residual[r.start : r.stop].clone() for r in rows]
    parts = [Signature(request, r, device) for r in rows]
    calls = [
        Call(p, mine, norm, case.quant, operation=case.operation, branch_norm=branch, signature=part)
        for p, mine, part in zip(partials, own, parts, strict=True)
    ]
    return calls, expected


def _terms(form: TermsForm, case: Case, tokens: int, kind: str, seed: int) -> Terms:
    """Terms of ``form``: tensors of ``kind``, with words of negative zeros."""
    shape, values = {"tokens": tokens, "hidden_size": case.hidden_size, "seed": seed}, []
    for k in range(form.count):
        dtype = torch.float32 if form.wide >> k & 1 else form.dtype
        values.append(make_inputs(kind, rank=k, dtype=dtype, **shape).partial)  # type: ignore[arg-type]
        values[-1][:, k % 8 :: 8] = -0.0
    starts = [k for k in range(form.count) if form.starts >> k & 1]
    islands = tuple(tuple(range(a, b)) for a, b in itertools.pairwise([*starts, form.count])) if starts else None
    made = Terms(tuple(values), islands)
    assert made.form == form
    return made


def _product(form: ProductForm, case: Case, tokens: int, kind: str, seed: int) -> ScaledProduct:
    """A product of ``kind``, in part negative zeros, its scales and its bias."""
    shapes = (tokens, torch.float32), (1, torch.float32), (1, case.dtype)
    made = [
        make_inputs(kind, rank=k, tokens=rows, hidden_size=case.hidden_size, dtype=dtype, seed=seed).partial
        for k, (rows, dtype) in enumerate(shapes)
    ]
    product, columns, bias = made
    product[:, ::5] = -0.0
    rows = torch.linspace(0.3, 3.0, tokens).view(-1, 1)
    return ScaledProduct(product, rows, columns.abs().t().contiguous(), bias[0] if form.bias else None, case.dtype)


def _finished(call: Call) -> Output:
    """What the host path's finisher on the CPU gives for a step."""
    out = call.signature.empty()
    ReferenceFinisher().run(call, out)
    return out


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


def _unpadded(calls: list[Call], expected: list[Output]) -> list[Output]:
    """``expected``, with what :func:`_poisoned` has put there in the place of padding."""
    found = []
    for call, out in zip(calls, expected, strict=True):
        if out.scales is not None and call.quant is not None:
            rows, width = call.signature.finished_rows, call.hidden_size
            values = read_scales(out.scales, call.quant, rows, width)
            held = scale_storage(place_scales(torch.full_like(values.view(torch.uint8), 1).view(values.dtype), call.quant, rows, width))
            scales = place_scales(values, call.quant, rows, width)  # a copy, padding and all
            scale_storage(scales)[held == 0] = _POISON
            out = replace(out, scales=scales)
        found.append(out)
    return found


def _poisoned(call: Call) -> Output:
    out = call.signature.empty()
    for field in fields(Output):
        tensor = getattr(out, field.name)
        if tensor is not None:
            flat = scale_storage(tensor) if field.name == "scales" else tensor
            flat.view(torch.uint8).fill_(_POISON)
    return out

"""What ranks do in the GPU tests. Each scenario is called on every rank of a world and notes what is wrong."""

from __future__ import annotations

import math
import random
import traceback
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from gpu.cases import FEW, FIXED, MANY_ROWS, WIDTH, operation_cases, random_cases, sweep_of
from gpu.world import Prepared, World, answer_with, call_number, communicator, copy_output, regions, require_clean

from collogue import NVFP4, Communicator, FP8PerToken, FP8Static, Output, RMSNorm
from collogue import errors as e
from collogue.tools.check import Answers, Case, check_rank
from collogue.tools.check.rank import poison, poisoned

POISON = 0x5B5B5B5B


def sweep(world: World) -> None:
    """Every format, dtype and kind of input, many shapes, beyond capacity: own outputs, poisoned ``out=``, residual in place."""
    for result in check_rank(world.given, sweep_of(world.size, thorough=not world.virtual), world.answers, world.tell):
        world.require(result.passed, f"{result.case}: {result.error or result.first or 'no error, where there must be one'}")


def random_sequence(world: World) -> None:
    """100 calls in random order without a pause; every output is kept, compared afterwards, and old words are wiped."""
    _random_sequence(world, random_cases(world.size))


def one_shot_sequence(world: World) -> None:
    """One-shot wherever it fits, many rows for a CTA too."""
    _random_sequence(world, random_cases(world.size, FEW), **_fixed("one_shot_sequence"))


def two_shot_sequence(world: World) -> None:
    """The same where every all-reduce goes by two hops, those of one token too."""
    _random_sequence(world, random_cases(world.size, FEW), **_fixed("two_shot_sequence"))


def few_multiprocessors(world: World) -> None:
    """The same where a kernel may use eight multiprocessors: every CTA does many rows."""
    _random_sequence(world, random_cases(world.size, FEW), **_fixed("few_multiprocessors"))


def _fixed(scenario: str) -> dict[str, Any]:
    return {name: value for name, value in vars(FIXED[scenario]).items() if value is not None}


def _random_sequence(world: World, cases: list[Case], **options: Any) -> None:
    prepared = [Prepared.on(world, case) for case in cases]
    comm = communicator(world, cases, max_tokens=MANY_ROWS, hidden_size=WIDTH, **options)
    for p in prepared:
        p.prepare(comm)
    # Memory that the calls will allocate: virtual ranks had better not ask the driver for it while kernels wait for each other.
    warm = [torch.empty(64 << 20, dtype=torch.uint8, device=world.device), *(poisoned(p.expected) for p in prepared)]
    del warm
    used = regions(comm, cases) if world.size > 1 else ()
    for region in used:
        region.unused.fill_(POISON)  # no call reaches so far
    world.settle()
    kept = [p.call(comm, p.out if i % 2 else None) for i, p in enumerate(prepared)]
    world.settle()
    comm.check()
    for p, out in zip(prepared, kept, strict=True):
        world.same(p.case, out, p.expected)
    if world.size > 1:
        require_clean(world, comm, cases)
    for region in used:
        world.require(bool((region.unused == POISON).all()), "the workspace was written beyond what the calls need")
    world.settle()
    comm.close()


def operations(world: World) -> None:
    """Every operation, one after the other without a pause, and twice from a graph; the halves make the whole; mistakes launch nothing."""
    with torch.cuda.stream(torch.cuda.Stream(world.device)):
        _operations(world)


def _operations(world: World) -> None:
    prepared = [Prepared.on(world, case) for case in operation_cases(world.size)]
    comm = communicator(world, [p.case for p in prepared])
    for p in prepared:
        p.prepare(comm)
    warm = [torch.empty(64 << 20, dtype=torch.uint8, device=world.device), *(poisoned(p.expected) for p in prepared)]
    del warm
    world.settle()
    kept = [p.call(comm, p.out if i % 2 else None) for i, p in enumerate(prepared)]
    world.settle()
    comm.check()
    for p, out in zip(prepared, kept, strict=True):
        world.same(p.case, out, p.expected)
    graph = torch.cuda.CUDAGraph()

    def capture() -> None:
        with torch.cuda.graph(graph, stream=torch.cuda.current_stream(), capture_error_mode="thread_local"):
            for p in prepared:
                p.call(comm, p.out)

    world.in_turn(capture)
    for _ in range(2):
        for p in prepared:
            poison(p.out)
        world.settle()
        graph.replay()
        world.settle()
        comm.check()
        for p in prepared:
            world.same(f"from a graph: {p.case}", p.out, p.expected)
    world.in_turn(graph.reset)
    _halves(world, comm, next(p for p in prepared if p.case.operation == "all_reduce" and p.case.residual and p.case.tokens == 129))
    comm.close()


def _halves(world: World, comm: Communicator, p: Prepared) -> None:
    """What the halves and the sharded call return is cut from, or makes, what ``all_reduce`` returns."""
    tokens, quant = p.case.tokens, FP8PerToken()
    assert p.residual is not None
    given: dict[str, Any] = {"norm": p.kwargs["norm"], "quant": quant, "keep_norm": True}
    mine = comm.shard(p.residual)
    for operation in ("all_reduce", "sharded", "reduce_scatter", "finish"):
        comm.prepare(tokens, hidden_size=p.case.hidden_size, operation=operation, **given)
    comm.prepare(tokens, hidden_size=p.case.hidden_size, operation="all_gather", norm=given["norm"], quant=quant)
    comm.prepare(tokens, hidden_size=p.case.hidden_size, operation="all_gather")
    world.settle()
    whole = comm.all_reduce(p.partial, residual=p.residual, **given)
    sharded = comm.all_reduce(p.partial, residual=mine, sharded=True, **given)
    half = comm.reduce_scatter(p.partial, residual=mine, **given)
    gathered = comm.all_gather(half, tokens, quant=quant)
    assert whole.residual is not None
    assert sharded.residual is not None
    finished = comm.finish(whole.residual, **given)
    stream = comm.unshard(sharded.residual, tokens)
    world.settle()
    comm.check()
    own = Output(residual=comm.shard(whole.residual))
    world.same("the sharded stream", Output(residual=sharded.residual), own)
    world.same("the stream of a half", Output(residual=half.residual), own)
    world.same("gathered halves", gathered, whole)
    world.same("the gathered stream", Output(residual=stream), Output(residual=whole.residual))
    for what, out in ("sharded", sharded), ("finished", finished):
        world.same(what, replace(out, residual=None), replace(whole, residual=None))
    before = call_number(comm) if world.size > 1 else 0
    mistakes: list[tuple[str, type[Exception], Callable[[], object]]] = [
        ("nothing to finish", e.ArgumentError, lambda: comm.all_reduce(p.partial, residual=mine, sharded=True)),
        ("a shard on the CPU", e.DeviceError, lambda: comm.unshard(mine.cpu(), tokens)),
        ("codes without a format", e.FormatError, lambda: comm.all_gather(half, tokens)),
        ("into its own shard", e.OverlapError, lambda: comm.all_gather(own, tokens, out=Output(residual=whole.residual))),
    ]
    if world.size > 1:
        mistakes.append(("a whole residual", e.ShapeError, lambda: comm.reduce_scatter(p.partial, residual=p.residual)))
    for what, kind, action in mistakes:
        world.require("\nhint: " in world.raises(kind, action, what), f"{what}: no hint")
    world.settle()
    world.require(world.size == 1 or call_number(comm) == before, "a refused call was launched")
    world.settle()


def graphs(world: World) -> None:
    """Two graphs, replayed in another order than captured, between eager calls of other sizes, without a pause."""
    with torch.cuda.stream(torch.cuda.Stream(world.device)):
        _graphs(world)


def _graphs(world: World) -> None:
    def cases(seed: int, *shapes: tuple[int, str]) -> list[Case]:
        return [Case(t, 2880, format=label, world_size=world.size, seed=seed + i) for i, (t, label) in enumerate(shapes)]

    captured = {
        "a": cases(10, (1, "nvfp4/128x4"), (5, "none"), (2, "fp8_per_token")),
        "b": cases(20, (64, "none"), (1, "nvfp4/128x4")),
    }
    eager = cases(30, (3, "none"), (64, "nvfp4/128x4"), (1, "none"), (7, "fp8_per_token"))
    static = {name: [Prepared.on(world, case) for case in mine] for name, mine in captured.items()}
    comm = communicator(world, [*captured["a"], *captured["b"], *eager])
    steps = ["b", 0, "a", 1, "a", "b", "b", 2, "a", 3, "b", 0, 2, "a", "a"]
    work: list[tuple[str | int, list[Prepared]]] = []
    for n, step in enumerate(steps):  # each step with inputs of its own
        chosen = captured[step] if isinstance(step, str) else [eager[step]]
        again = [
            Case(c.tokens, c.hidden_size, format=c.format, world_size=c.world_size, seed=100 + 10 * n + i) for i, c in enumerate(chosen)
        ]
        work.append((step, [Prepared.on(world, case) for case in again]))
    for p in (q for _, mine in work for q in mine):
        p.prepare(comm)
    recorded: dict[str, torch.cuda.CUDAGraph] = {}

    def capture() -> None:
        for name, mine in static.items():
            recorded[name] = torch.cuda.CUDAGraph()
            with torch.cuda.graph(recorded[name], stream=torch.cuda.current_stream(), capture_error_mode="thread_local"):
                for p in mine:
                    p.call(comm, p.out)

    world.in_turn(capture)
    before = call_number(comm) if world.size > 1 else 0
    world.settle()
    for step, mine in work:
        if isinstance(step, int):
            mine[0].call(comm, mine[0].out)
            continue
        for p, now in zip(static[step], mine, strict=True):
            p.partial.copy_(now.partial)
            if p.residual is not None and now.residual is not None:
                p.residual.copy_(now.residual)
            if p.kwargs["norm"] is not None:
                p.kwargs["norm"].weight.copy_(now.kwargs["norm"].weight)
            copy_output(now.out, p.out)  # poison
        recorded[step].replay()
        for p, now in zip(static[step], mine, strict=True):
            copy_output(p.out, now.out)
    world.settle()
    comm.check()
    for n, (step, mine) in enumerate(work):
        for p in mine:
            world.same(f"step {n} ({step}) {p.case}", p.out, p.expected)
    if world.size > 1:
        calls = sum(len(mine) for _, mine in work)
        world.require(call_number(comm) == before + calls, f"{call_number(comm) - before} calls were counted, {calls} were made")
        require_clean(world, comm, [p.case for _, mine in work for p in mine])
    world.settle()
    world.in_turn(recorded.clear)
    comm.close()


def not_prepared(world: World) -> None:
    """A call under capture whose kernel is not loaded says so and captures nothing; after ``prepare`` it works."""
    with torch.cuda.stream(torch.cuda.Stream(world.device)):
        case = Case(2, 1152, format="fp8_static", world_size=world.size)
        p, comm = Prepared.on(world, case), communicator(world, [case])
        scratch = torch.ones(1, device=world.device)
        graph = torch.cuda.CUDAGraph()

        def attempt() -> None:
            other = torch.cuda.CUDAGraph()
            with torch.cuda.graph(other, stream=torch.cuda.current_stream(), capture_error_mode="thread_local"):
                scratch.zero_()  # an empty graph would be warned about
                p.call(comm, p.out)

        def capture() -> None:
            with torch.cuda.graph(graph, stream=torch.cuda.current_stream(), capture_error_mode="thread_local"):
                p.call(comm, p.out)

        world.in_turn(
            lambda: world.require("comm.prepare(" in world.raises(e.NotPrepared, attempt, "capture"), "the hint names no prepare")
        )
        p.prepare(comm)
        world.in_turn(capture)
        graph.replay()
        world.settle()
        comm.check()
        world.same(case, p.out, p.expected)
        world.in_turn(graph.reset)
        comm.close()


def scale_tensors(world: World) -> None:
    """Scales in GPU memory are not looked at by the host; the reference says what zero, negative, NaN and infinite ones give."""
    values = (0.0, -0.0, -1.5, math.nan, math.inf, -math.inf, 1e-40, 3e38, 448.0)
    case = Case(3, 576, world_size=world.size, inputs="outlier")
    comm = communicator(world, [case])
    p = Prepared.on(world, case)
    norm = p.kwargs["norm"]
    todo = []
    for value in values:
        scale = torch.full((1,), value, dtype=torch.float32, device=world.device)
        for quant in (NVFP4(scale), NVFP4(scale, "8x4"), FP8Static(scale)):
            expected = answer_with(case, world.device, quant=quant)
            todo.append((f"{quant.label} of scale {value}", quant, expected))
            comm.prepare(case.tokens, norm=norm, quant=quant)
    world.settle()
    found = [comm.all_reduce(p.partial, residual=p.residual, norm=norm, quant=quant) for _, quant, _ in todo]
    world.settle()
    comm.check()
    for (what, _, expected), out in zip(todo, found, strict=True):
        world.same(what, out, expected)
    world.settle()
    comm.close()


def two_communicators(world: World) -> None:
    """Two on one group, of different dtype and width, their calls interleaved on one stream."""
    cases = [Case(t, h, d, "nvfp4/8x4", world.size, seed=t) for h, d in ((576, "bfloat16"), (2880, "float32")) for t in (1, 4, 2)]
    comms = {d: communicator(world, [c for c in cases if c.dtype == d]) for d in ("bfloat16", "float32")}
    prepared = [Prepared.on(world, cases[i]) for i in (0, 3, 1, 4, 5, 2, 0, 0, 3)]
    for p in prepared:
        p.prepare(comms[p.case.dtype])
    world.settle()
    for p in prepared:
        p.call(comms[p.case.dtype], p.out)
    world.settle()
    for p in prepared:
        comms[p.case.dtype].check()
        world.same(p.case, p.out, p.expected)
    world.settle()
    for comm in comms.values():
        comm.close()


def concurrent_communicators(world: World) -> None:
    """Two on streams of their own, large calls, each behind a kernel that spins for a random time."""
    rng = random.Random(world.size)
    cases = [Case(t, 4096, "bfloat16", label, world.size, seed=t) for t in (512, 2048) for label in ("none", "fp8_static")]
    comms = [communicator(world, cases, concurrent=2) for _ in range(2)]
    streams = [torch.cuda.Stream(world.device) for _ in comms]  # type: ignore[no-untyped-call]
    prepared = [[Prepared.on(world, case) for case in cases] for _ in comms]
    for comm, mine in zip(comms, prepared, strict=True):
        for p in mine:
            p.prepare(comm)
    torch.cuda._sleep(1000)  # type: ignore[no-untyped-call]
    world.settle()
    for _ in range(20):
        for comm, stream, mine in zip(comms, streams, prepared, strict=True):
            p = mine[rng.randrange(len(cases))]
            with torch.cuda.stream(stream):
                torch.cuda._sleep((world.rank + 1) * 100_000 * (1 + world.rank))  # type: ignore[no-untyped-call]
                p.call(comm, p.out)
    for stream in streams:
        stream.synchronize()
    world.settle()
    for comm, mine in zip(comms, prepared, strict=True):
        comm.check()
        for p in mine:
            p.call(comm, p.out)
            world.settle()
            world.same(p.case, p.out, p.expected)
    world.settle()
    for comm in comms:
        comm.close()


def subgroups(world: World) -> None:
    """Even and odd ranks as two groups that work at the same time; virtual odd ranks in another order than the world's."""
    if world.size < 4:
        return
    odd = list(range(1, world.size, 2))
    groups = [world.subgroup(ranks) for ranks in (list(range(0, world.size, 2)), odd[::-1] if world.virtual else odd)]
    index, group = next((i, g) for i, g in enumerate(groups) if g is not None)
    mine = World(group, Answers(), findings=world.findings)
    cases = [Case(t, 2880, "bfloat16", "fp8_per_token", mine.size, seed=100 * index + t) for t in (1, 6, 3, 1)]
    prepared = [Prepared.on(mine, case) for case in cases]
    comm = communicator(mine, cases)
    for p in prepared:
        p.prepare(comm)
    world.settle()
    for p in prepared:
        p.call(comm, p.out)
    world.settle()
    comm.check()
    for p in prepared:
        mine.same(f"group {index} {p.case}", p.out, p.expected)
    world.settle()
    comm.close()


def late_rank(world: World) -> None:
    """The last rank leaves one call out: the others raise and name it, nobody dies, and ``reset`` makes all well."""
    if world.size < 2:
        return
    late = world.size - 1
    case = Case(1, 2880, world_size=world.size)
    p, comm = Prepared.on(world, case), communicator(world, [case], timeout=1.0)
    p.prepare(comm)
    world.settle()
    p.call(comm, p.out)
    world.settle()
    if world.rank != late:
        p.call(comm)
    world.settle()
    told = world.raises(e.CollectiveTimeout, comm.check, "waiting for a rank that does not come") if world.rank != late else ""
    texts = world.group.all_gather_object(told)
    named = [text for text in texts if f"of rank {late}, call 1, token 0" in text]
    world.require(bool(named) and "comm.reset()" in named[0], f"nobody names rank {late}, call 1, token 0: {texts}")
    if world.rank == late:  # too late: the group has been stopped, the call ends at once
        p.call(comm)
        torch.cuda.current_stream(world.device).synchronize()
        world.raises(e.CollectiveTimeout, comm.check, "a call of a stopped group")
    else:
        world.raises(e.CollectiveTimeout, lambda: p.call(comm), "a call after a failed one")
    world.settle()
    comm.reset()
    p.prepare(comm)
    world.settle()
    outs = [p.call(comm) for _ in range(5)]
    world.settle()
    comm.check()
    for out in outs:
        world.same("after the reset", out, p.expected)
    world.settle()
    comm.close()


def mismatched_calls(world: World) -> None:
    """The last rank calls with another eps, which hangs nobody, then with fewer tokens, which hangs the others: all raise and say how."""
    if world.size < 2:
        return
    odd = world.rank == world.size - 1
    case = Case(2, 2880, world_size=world.size)
    p, comm = Prepared.on(world, case), communicator(world, [case], timeout=10.0)
    weight = p.kwargs["norm"].weight
    p.prepare(comm)
    comm.prepare(1, norm=p.kwargs["norm"], residual=True)
    world.settle()
    p.call(comm, p.out)
    world.settle()
    comm.all_reduce(p.partial, residual=p.residual, norm=RMSNorm(weight, eps=1e-3) if odd else p.kwargs["norm"])
    p.call(comm, p.out)
    world.settle()
    text = world.raises(e.MismatchedCall, comm.check, "another eps")
    world.require("eps=0.001" in text and "eps=1e-06" in text, f"the values of eps are not named: {text}")
    world.settle()
    comm.reset()
    rows = slice(0, 1) if odd else slice(0, 2)
    residual = None if p.residual is None else p.residual[rows]
    comm.all_reduce(p.partial[rows], residual=residual, norm=p.kwargs["norm"])
    world.settle()
    text = world.raises(e.MismatchedCall, comm.check, "fewer tokens")
    world.require("tokens=1" in text and "tokens=2" in text, f"the numbers of tokens are not named: {text}")
    world.settle()
    comm.reset()
    out = p.call(comm)
    world.settle()
    comm.check()
    world.same("after the reset", out, p.expected)
    world.settle()
    comm.close()
    _another_order(world, p)


def _another_order(world: World, p: Prepared) -> None:
    """Two communicators of one stream; the last rank calls them in another order than the others."""
    first, second = (communicator(world, [p.case], timeout=2.0) for _ in range(2))
    for comm in (first, second):
        p.prepare(comm)
    world.settle()
    order = (second, first) if world.rank == world.size - 1 else (first, second)
    for comm in order:
        p.call(comm, p.out)
    world.settle()
    text = world.raises(e.MismatchedCall, order[0].check, "another order")
    world.require(repr(order[1].name) in text, f"the other communicator is not named: {text}")
    world.settle()
    for comm in (first, second):
        comm.reset()
    p.call(first, p.out)
    world.settle()
    world.same("after the reset", p.out, p.expected)
    world.settle()
    for comm in (first, second):
        comm.close()


def bad_input(world: World) -> None:
    """Each mistake has its error, nothing is launched, and the communicator still works."""
    case = Case(4, 576, world_size=world.size)
    p, comm = Prepared.on(world, case), communicator(world, [case])
    x, device = p.partial, world.device
    p.prepare(comm)
    weight = torch.ones(576, dtype=x.dtype, device=device)
    shifted = torch.zeros(4 * 576 + 1, dtype=x.dtype, device=device)[1:].view(4, 576)
    nan = torch.full((1,), math.nan, device=device)

    def call(partial: torch.Tensor = x, **kwargs: Any) -> Callable[[], object]:
        return lambda: comm.all_reduce(partial, **kwargs)

    mistakes: list[tuple[str, type[Exception], Callable[[], object]]] = [
        ("partial on the CPU", e.DeviceError, call(x.cpu())),
        ("partial not aligned", e.LayoutError, call(shifted)),
        ("partial not contiguous", e.LayoutError, call(torch.zeros(576, 4, dtype=x.dtype, device=device).t())),
        ("partial of another dtype", e.DTypeError, call(x.float())),
        ("partial of one dimension", e.ShapeError, call(x.view(-1))),
        ("too many tokens", e.CapacityError, call(torch.zeros(5, 576, dtype=x.dtype, device=device))),
        ("H not a multiple of 8", e.ShapeError, call(torch.zeros(4, 572, dtype=x.dtype, device=device))),
        ("H not a multiple of the block", e.FormatError, call(torch.zeros(4, 24, dtype=x.dtype, device=device), quant=NVFP4(1.0))),
        ("residual of other rows", e.ShapeError, call(residual=x[:2])),
        ("residual on the CPU", e.DeviceError, call(residual=x.cpu())),
        ("weight too short", e.ShapeError, call(norm=RMSNorm(weight[:568]))),
        ("weight on the CPU", e.DeviceError, call(norm=RMSNorm(weight.cpu()))),
        ("weight of another dtype", e.DTypeError, call(norm=RMSNorm(weight.half()))),
        ("scale on the CPU", e.DeviceError, call(quant=NVFP4(torch.ones(1)))),
        ("NaN scale with validate", e.ScaleError, lambda: NVFP4(nan, validate=True)),
        ("keep_norm without a norm", e.FormatError, call(quant=NVFP4(1.0), keep_norm=True)),
        ("out of other outputs", e.ShapeError, call(out=Output())),
        ("out on the CPU", e.DeviceError, call(out=Output(reduced=x.cpu()))),
        ("out not aligned", e.LayoutError, call(out=Output(reduced=shifted))),
        ("out is the partial", e.OverlapError, call(out=Output(reduced=x))),
        ("a partial that requires grad", e.GradError, call(x.clone().requires_grad_())),
    ]
    world.settle()
    before = call_number(comm) if world.size > 1 else 0
    for what, kind, action in mistakes:
        text = world.raises(kind, action, what)
        world.require("\nhint: " in text, f"{what}: no hint")
    world.settle()
    world.require(world.size == 1 or call_number(comm) == before, "a refused call was launched")
    world.settle()
    out = p.call(comm)
    world.settle()
    comm.check()
    world.same("after the mistakes", out, p.expected)
    empty = comm.all_reduce(x[:0], quant=NVFP4(1.0))
    world.require([tuple(t.shape) for _, t in empty.items()] == [(0, 576), (0, 288), (0, 36)], "no tokens: other shapes")
    world.settle()
    comm.close()
    world.raises(e.ClosedError, call(), "a closed communicator")


SCENARIOS: dict[str, Callable[[World], None]] = {
    f.__name__: f
    for f in (
        sweep,
        random_sequence,
        one_shot_sequence,
        two_shot_sequence,
        few_multiprocessors,
        operations,
        graphs,
        not_prepared,
        scale_tensors,
        two_communicators,
        concurrent_communicators,
        subgroups,
        late_rank,
        mismatched_calls,
        bad_input,
    )
}


def run_all(group: Any, tell: Callable[[str], None], names: list[str]) -> dict[str, list[str]]:
    """All scenarios on one rank of a set of processes: what each found, by its name."""
    found: dict[str, list[str]] = {}
    for name in names:
        tell(name)
        world = World(group, Answers(), tell)
        try:
            SCENARIOS[name](world)
        except Exception:
            world.findings.append(f"rank {world.rank}: {traceback.format_exc()}")
        found[name] = world.findings
    return found

"""Calls by the million, each checked on the device: graphs replayed in random order, eager calls between them, ranks delayed at random.

All ranks make the same calls in the same order, from one seed; which rank is delayed where, by spinning kernels before and inside the
sequence, is drawn on each rank for itself, so every rank captures graphs of its own.
"""

from __future__ import annotations

import contextlib
import random
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch

from collogue.communicator import Communicator
from collogue.errors import CollectiveError
from collogue.gpu import jit
from collogue.group import as_group
from collogue.planning.plan import make_kernels, make_plan
from collogue.planning.variant import Variant
from collogue.tools.ablation.build import Builder
from collogue.tools.ablation.rank import built_by
from collogue.tools.check.case import Case
from collogue.tools.check.kernels import capacity_of, request_of
from collogue.tools.check.rank import Answers, Given, poisoned
from collogue.tools.reliability.compare import Comparer, words_of
from collogue.tools.reliability.delays import DELAYS
from collogue.tools.reliability.parts import Part, Run

#: Seconds that a kernel waits for a peer.
TIMEOUT = 10.0
#: Calls in a row without a comparison between them, at most: back to back, as programmatic dependent launches.
BURST = 8
#: Cycles of a delay, and how often there is one: between bursts, inside a burst, between replays.
SHORT_DELAYS, LONG_DELAYS = (500, 2_000, 10_000, 40_000), (10_000, 100_000, 400_000)
BETWEEN, INSIDE, BEFORE = 0.15, 0.02, 0.2
#: Replays between two eager bursts, and between two looks at what has been found.
EAGER_EVERY, LOOK_EVERY = 8, 64


@dataclass
class Found:
    """What one rank found in one part. ``wrong_words``: of 32 bits; ``comparisons`` is ``calls`` if every call was checked."""

    calls: int = 0
    replays: int = 0
    eager_calls: int = 0
    comparisons: int = 0
    wrong_words: int = 0
    delays: int = 0
    error: str | None = None
    seconds: float = 0.0


class Track:
    """One communicator with its input sets, on a stream of its own."""

    def __init__(self, group: Any, run: Run, device: torch.device, comparer: Comparer, found: Found, seed: str) -> None:
        tokens, width = capacity_of(run.cases)
        self.device, self.comparer, self.found = device, comparer, found
        self.comm = Communicator(
            group,
            max_tokens=tokens,
            hidden_size=width,
            dtype=run.cases[0].value_dtype,
            device=device,
            timeout=TIMEOUT,
            algorithm=run.algorithm,
        )
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None  # type: ignore[no-untyped-call]
        self._own = random.Random(f"{seed} {as_group(group, device).rank}")
        answers = Answers()
        with self.on_stream(), kernels_of(self.comm, run):
            self.sets = []
            for case in run.cases:
                given = Given.of(case, self.comm.rank, device, answers)
                given.prepare(self.comm)
                expected = answers(case, device, self.comm.rank)
                out = poisoned(expected)
                self.sets.append((given, out, comparer.of(out, expected)))

    def on_stream(self) -> contextlib.AbstractContextManager[Any]:
        """Work inside goes to this track's stream."""
        return torch.cuda.stream(self._stream) if self._stream is not None else contextlib.nullcontext()

    def bursts(self, calls: int, shared: random.Random) -> list[list[int]]:
        """The sets of ``calls`` calls in bursts; no set twice in a burst, because its outputs are compared only after it."""
        result, most = [], min(BURST, len(self.sets))
        while calls:
            result.append(shared.sample(range(len(self.sets)), min(calls, shared.randint(1, most))))
            calls -= len(result[-1])
        return result

    def play(self, bursts: Sequence[Sequence[int]]) -> None:
        """The calls of each burst, then the comparison of their outputs; delays where this rank's dice say so."""
        for burst in bursts:
            self.delay(BETWEEN, SHORT_DELAYS)
            for i in burst:
                self.delay(INSIDE, SHORT_DELAYS)
                given, out, _ = self.sets[i]
                given.call(self.comm, out)
            for i in burst:
                self.sets[i][2]()

    def delay(self, chance: float, cycles: Sequence[int]) -> None:
        """Perhaps a kernel that spins, on this rank alone."""
        if self._own.random() < chance:
            self.found.delays += 1
            if self.device.type == "cuda":
                torch.cuda._sleep(self._own.choice(cycles))  # type: ignore[no-untyped-call]

    def record(self, bursts: Sequence[Sequence[int]]) -> Callable[[], None]:
        """What plays ``bursts`` again: a CUDA graph; on the CPU the calls themselves."""
        if self._stream is None:
            return lambda: self.play(bursts)
        graph = torch.cuda.CUDAGraph()
        torch.cuda.synchronize(self.device)
        with self.on_stream():
            graph.capture_begin(capture_error_mode="thread_local")  # NCCL's watchdog may call CUDA meanwhile
            try:
                self.play(bursts)
            finally:
                graph.capture_end()
        return graph.replay


@contextlib.contextmanager
def kernels_of(comm: Communicator, run: Run) -> Iterator[None]:
    """Inside, ``comm`` loads the kernels that ``run`` asks for. Collective."""
    architecture = comm.topology.architecture
    if architecture is None or not run.delays_inside:
        build(comm, run.cases)
        yield
        return
    with Builder(architecture) as builder:
        builder.compile_all([(DELAYS, variant) for variant in variants_of(comm, run.cases)])
        with built_by(builder, DELAYS):
            yield


def variants_of(comm: Communicator, cases: Sequence[Case]) -> list[Variant]:
    """The kernels of ``cases``."""
    requests = [request_of(case) for case in cases]
    return list(dict.fromkeys(k.variant for r in requests for k in make_kernels(comm.topology, r, make_plan(comm.topology, r))))


def build(comm: Communicator, cases: Sequence[Case]) -> None:
    """Compile the kernels of ``cases`` into the cache, on one rank, on all cores. Collective."""
    topology = comm.topology
    if topology.architecture is None:
        return
    if comm.rank == 0:
        jit.build(variants_of(comm, cases), topology.architecture)
    comm._group.barrier()


def soak(
    group: Any,
    part: Part,
    device: torch.device,
    tell: Callable[[str], None],
    *,
    seed: int = 0,
    meet: Callable[[], object] = lambda: None,
) -> dict[str, Any]:
    """Make the calls of ``part`` on this rank. Collective over ``group``; returns :class:`Found` as data.

    ``meet`` is called once, before the first call: groups that are to work at once wait for each other there.
    """
    found, comparer = Found(), Comparer(device)
    # What all ranks of a group draw alike.
    shared = random.Random(f"{seed} {part.name}")
    tell(f"{part.name}: kernels")
    tracks = [Track(group, run, device, comparer, found, f"{seed} {part.name} {n}") for n, run in enumerate(part.runs)]
    _control(tracks[0])
    found.delays = 0
    tell(f"{part.name}: graphs")
    graphs = [[track.record(track.bursts(part.graph_calls, shared)) for track in tracks] for _ in range(part.graphs)]
    meet()
    start = time.perf_counter()
    try:
        _make_calls(part, tracks, graphs, shared, found, tell)
    except CollectiveError as error:
        found.error = f"{type(error).__name__}: {error.message}".splitlines()[0]
    found.wrong_words, found.comparisons = comparer.read()
    found.seconds = round(time.perf_counter() - start, 3)
    graphs.clear()
    for track in tracks:
        track.comm.close(collective=found.error is None)
    return asdict(found)


def _control(track: Track) -> None:
    """One call whose output has one bit turned over: the comparison must see one word. Collective."""
    with track.on_stream():
        given, out, compare = track.sets[0]
        given.call(track.comm, out)
        words = next(words_of(tensor, name) for name, tensor in out.items() if tensor.numel())
        words[-1] ^= 1
        compare()
    if track.comparer.read() != (1, 1):
        raise RuntimeError(f"the comparison saw {track.comparer.read()[0]} wrong words where there was one")
    track.comparer.counts.zero_()


def _make_calls(
    part: Part,
    tracks: Sequence[Track],
    graphs: Sequence[Sequence[Callable[[], None]]],
    shared: random.Random,
    found: Found,
    tell: Callable[[str], None],
) -> None:
    while found.calls < part.calls:
        left = part.calls - found.calls
        if left >= part.graph_calls * len(tracks):
            for track, replay in zip(tracks, shared.choice(graphs), strict=True):
                with track.on_stream():
                    track.delay(BEFORE, LONG_DELAYS)
                    replay()
            found.replays += len(tracks)
            found.calls += part.graph_calls * len(tracks)
        if found.replays % EAGER_EVERY < len(tracks) or left < part.graph_calls * len(tracks):
            for track in tracks:
                bursts = track.bursts(min(max(0, part.calls - found.calls), shared.randint(1, BURST)), shared)
                with track.on_stream():
                    track.play(bursts)
                made = sum(map(len, bursts))
                found.eager_calls += made
                found.calls += made
        if found.replays % LOOK_EVERY < len(tracks):
            _look(part, tracks, found, tell)
    _look(part, tracks, found, tell)


def _look(part: Part, tracks: Sequence[Track], found: Found, tell: Callable[[str], None]) -> None:
    """Wait for what is queued, and raise what the communicators found."""
    wrong, _ = tracks[0].comparer.read()
    for track in tracks:
        track.comm.check()
    tell(f"{part.name}: {found.calls} of {part.calls} calls, {wrong} wrong words")

"""One rank's part of ``collogue bench``: make the subjects of each round, gate them, time them in turn, gate them again."""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict
from functools import cached_property, partial
from itertools import product
from typing import Any, TypeAlias

import torch
import torch.distributed as dist

from collogue.communicator import Communicator
from collogue.errors import CollectiveError, CollectiveTimeout, MismatchedCall
from collogue.gpu import jit
from collogue.group import as_group
from collogue.planning.plan import make_kernels, make_plan
from collogue.planning.topology import Overrides
from collogue.tools.bench.baselines import Baselines, alone, can
from collogue.tools.bench.cases import NCCL, Round
from collogue.tools.bench.floors import EMPTY, EXCHANGE, WIRE, Floors
from collogue.tools.bench.fused import FusedCall
from collogue.tools.bench.gate import call_each_set, each, time_gated
from collogue.tools.bench.names import Row, label
from collogue.tools.bench.timing import Chain, EagerCalls, Latency, Subject, measure, measure_eager, meet
from collogue.tools.check.case import Case
from collogue.tools.check.kernels import request_of
from collogue.tools.check.rank import Answers, arguments

Tell: TypeAlias = Callable[[str], None]

#: Errors after which a communicator has to be reset.
FATAL = (CollectiveError.__name__, CollectiveTimeout.__name__, MismatchedCall.__name__)
#: Seconds that a kernel waits for a peer.
TIMEOUT = 5.0
#: Eager calls whose host time is taken, at one token.
HOST_BATCHES, HOST_CALLS = 7, 200


class Bench:
    """What one rank keeps between rounds."""

    def __init__(self, group: dist.ProcessGroup, rounds: Sequence[Round], tell: Tell = lambda text: None) -> None:
        self.process_group, self.group = group, as_group(group)
        self.rounds = rounds
        self.stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        self.answer = Answers()
        self._comms: dict[tuple[int, str, Overrides], Communicator] = {}
        self.architecture = str(self.comm(rounds[0].shape, rounds[0].overrides).topology.architecture)
        largest = max(r.shape.tokens * r.shape.hidden_size for r in rounds)
        self.baselines = Baselines(group, self.group.device, 4 * largest, tell)

    @cached_property
    def floors(self) -> Floors:
        """The first use is collective. Not made before the compile time is taken: it loads NVRTC."""
        return Floors(self.group, self.architecture)

    def comm(self, case: Case, overrides: Overrides | None = None) -> Communicator:
        """The communicator of this width, dtype and overrides (default: the first round's), for the maximum number of tokens of any round.

        The first call is collective.
        """
        overrides = self.rounds[0].overrides if overrides is None else overrides
        key = (case.hidden_size, case.dtype, overrides)
        if key not in self._comms:
            tokens = max(r.shape.tokens for r in self.rounds if (r.shape.hidden_size, r.shape.dtype) == key[:2])
            comm = Communicator(
                self.process_group,
                max_tokens=tokens,
                hidden_size=case.hidden_size,
                dtype=case.value_dtype,
                timeout=TIMEOUT,
                **vars(overrides),
            )
            self._comms[key] = comm
        return self._comms[key]

    def close(self) -> None:
        for comm in self._comms.values():
            comm.close()
        self._comms.clear()

    def meet(self) -> None:
        """Every rank is here and every GPU is idle."""
        meet(self.process_group)

    # ---- kernels

    def prepare(self, cases: Iterable[Case]) -> list[float]:
        """Build and load the kernels of each case, one after the other; seconds for each."""
        taken = []
        for case in cases:
            _, residual, norm = arguments(case, 0, self.group.device)
            self.group.barrier()
            start = time.perf_counter()
            self.comm(case).prepare(
                case.tokens, residual=residual is not None, norm=norm, quant=case.quant(self.group.device), keep_norm=_keeps(case)
            )
            taken.append(time.perf_counter() - start)
        return taken

    def build_all(self) -> None:
        """Compile every kernel of every round into the cache, on all cores of the host."""
        variants = {}
        for case, overrides in dict.fromkeys((case, r.overrides) for r in self.rounds for case in r.cases if case.possible):
            topology, request = self.comm(case, overrides).topology, request_of(case)
            kernels = make_kernels(topology, request, make_plan(topology, request))
            variants.update(dict.fromkeys(kernel.variant for kernel in kernels))
        if self.group.rank == 0:
            jit.build(list(variants), self.architecture)
        self.group.barrier()

    # ---- rounds

    def run_round(self, round: Round) -> list[Row]:
        """Rows of everything that is timed in this round: with a latency or with an error."""
        gc.collect()
        makers: dict[str, Callable[[], Subject]] = {name: partial(self.floors.subjects.__getitem__, name) for name in (EMPTY, EXCHANGE)}
        rows: dict[str, Row] = {name: {"what": name, "section": round.section, **_shape(round.shape)} for name in makers}
        plain = alone(round.shape)
        for name in (name for name in round.baselines if can(name, plain)):
            makers[name] = partial(self.baselines.make, name, plain)
            rows[name] = {"what": name, "section": round.section, **_shape(round.shape)}
        for case in round.cases:
            makers[str(case)] = partial(self._fused, case, round.overrides)
            rows[str(case)] = {
                "what": "collogue",
                "section": round.section,
                **_shape(case),
                **_call(case),
                **self._plan(case, round.overrides),
            }
        for name, case in ((name, case) for name, case in product(round.chains, round.cases) if can(name, case)):
            makers[f"{name} {case}"] = partial(self.baselines.make, name, case)
            rows[f"{name} {case}"] = {"what": name, "section": round.section, **_shape(case), **_call(case)}
        latencies, errors = self.time(makers, round.replays, eager=round.timing == "eager")
        if any(error.startswith(FATAL) for error in errors.values()):
            self.comm(round.shape, round.overrides).reset()
        for name, row in rows.items():
            row |= result(latencies.get(name), errors.get(name), round.replays)
        return list(rows.values())

    def _fused(self, case: Case, overrides: Overrides | None = None) -> FusedCall:
        return FusedCall(self.comm(case, overrides), case, self.answer)

    def _plan(self, case: Case, overrides: Overrides) -> Row:
        if not case.possible:
            return {"algorithm": None, "bytes_sent": None}
        plan = self.comm(case, overrides).explain(case.tokens, quant=case.quant("cpu"), hidden_size=case.hidden_size, **case.asked)
        row = {"algorithm": plan.algorithm, "bytes_sent": plan.bytes_sent, "launches": plan.launches}
        fixed = {name: value for name, value in vars(overrides).items() if value is not None}
        return {**row, **fixed, "shape": str(plan.shape)} if fixed else row

    def time(
        self, makers: dict[str, Callable[[], Subject]], replays: int, *, eager: bool = False
    ) -> tuple[dict[str, Latency], dict[str, str]]:
        """Latencies of what passed its gates on every rank, and errors of the rest."""
        if eager:
            return time_gated(self.group, makers, capture=EagerCalls, measure=lambda calls: measure_eager(calls, replays, self.meet))
        return time_gated(
            self.group, makers, capture=lambda call: Chain(call, self.stream), measure=lambda chains: measure(chains, replays, self.meet)
        )

    def wire(self) -> Row:
        """Bytes per second that leave a rank, by 16-byte stores to every peer."""
        latencies, errors = self.time({WIRE: lambda: self.floors.subjects[WIRE]}, 9)
        row = {"what": WIRE, "world_size": self.group.size, "bytes_sent": self.floors.bytes_sent}
        return row | result(latencies.get(WIRE), errors.get(WIRE), 9)

    # ---- host

    def host(self, case: Case) -> list[Row]:
        """Microseconds of host time per eager call at one token: nothing is waited for between calls."""
        fused, nccl = self._fused(case), self.baselines.make(NCCL, case)
        calls: dict[str, tuple[Subject, Callable[[int], object]]] = {
            "comm.all_reduce(...)": (fused, fused.fresh),
            "comm.all_reduce(..., out=)": (fused, fused.call),
            "torch.ops.collogue.all_reduce(...)": (fused, fused.dispatched),
            "torch.distributed.all_reduce": (nccl, nccl.call),
        }
        errors: dict[str, str] = {}
        each(self.group, list(calls), lambda name: calls[name][0].gate(partial(call_each_set, calls[name][0])), errors)
        rows = []
        for name, (_, call) in calls.items():
            us = None
            if name not in errors:
                try:
                    us = max(self.group.all_gather_object(self._host_us(call)))
                except Exception as error:  # alike on every rank
                    errors[name] = f"{type(error).__name__}: {error}".splitlines()[0][:300]
            rows.append({"what": name, **_shape(case), "us": us, "error": errors.get(name)})
        return rows

    def _host_us(self, call: Callable[[int], object]) -> float:
        taken = []
        for _ in range(HOST_BATCHES):
            self.meet()
            start = time.perf_counter()
            for turn in range(HOST_CALLS):
                call(turn)
            taken.append((time.perf_counter() - start) / HOST_CALLS * 1e6)
        self.meet()
        return statistics.median(taken[1:])


def _keeps(case: Case) -> bool:
    return case.keep_norm and case.norm and case.format != "none"


def _shape(case: Case) -> Row:
    return {"world_size": case.world_size, "tokens": case.tokens, "hidden_size": case.hidden_size, "dtype": case.dtype}


def _call(case: Case) -> Row:
    row = {"format": case.format, "residual": case.residual, "norm": case.norm, "keep_norm": _keeps(case), **_weight(case)}
    return row if case.operation == "all_reduce" else {**row, "operation": case.operation}


def _weight(case: Case) -> Row:
    return {} if case.weight_dtype is None else {"weight_dtype": case.weight_dtype}


def result(latency: Latency | None, error: str | None, replays: int) -> Row:
    """The latency, or why there is none."""
    if latency is None:
        return {"us": None, "low_us": None, "high_us": None, "replays": 0, "error": error or "not timed"}
    return {**asdict(latency), "replays": replays, "error": None}


def bench_rank(group: dist.ProcessGroup, tell: Tell, rounds: Sequence[Round], compiled: Sequence[Case]) -> dict[str, Any]:
    """Everything this rank measures; the same rows on every rank. ``compiled``: cases whose compile time is taken first."""
    gc.disable()  # not in a capture, and not while host time is taken
    tell("making communicators")
    bench = Bench(group, rounds, tell)
    tell("compiling, one by one")
    cold = bench.prepare(compiled)
    tell("compiling the rest")
    bench.build_all()
    tell("wire")
    wire = bench.wire()
    tell(summary("wire", [wire]))
    tell("host time")  # before other libraries' chains are made
    host = bench.host(min((r.cases[0] for r in rounds), key=lambda c: c.tokens))
    rows: list[Row] = []
    for round in rounds:
        tell(str(round))
        new = bench.run_round(round)
        rows += new
        tell(summary(str(round), new))
    bench.close()
    return {"rows": rows, "wire": wire, "host": host, "cold": cold}


def start_again(group: dist.ProcessGroup, tell: Tell, rounds: Sequence[Round], compiled: Sequence[Case]) -> list[float]:
    """Seconds for each of ``compiled`` in a new process that finds them in the cache on disk."""
    tell("loading kernels from the cache")
    bench = Bench(group, rounds)
    taken = bench.prepare(compiled)
    bench.close()
    return taken


def summary(title: str, rows: Sequence[Row]) -> str:
    """One line of a round for people who wait; its parts are separated by bars."""
    parts = [title]
    for row in rows:
        parts.append(f"{label(row)} {row['us']:.2f}" if row["us"] is not None else f"{label(row)} FAILED: {row['error']}")
    return " | ".join(parts)

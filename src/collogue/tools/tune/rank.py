"""One rank's part of ``collogue tune``: a communicator for each candidate, the same inputs for all, gates, and timing in turn."""

from __future__ import annotations

import functools
import gc
from collections.abc import Callable, Iterable, Sequence
from itertools import groupby

import torch
import torch.distributed as dist

from collogue.communicator import Communicator
from collogue.gpu import jit
from collogue.group import Group, as_group
from collogue.planning.plan import make_kernels, make_plan
from collogue.planning.table import Candidate
from collogue.tools.bench.fused import FusedCall
from collogue.tools.bench.gate import time_gated
from collogue.tools.bench.names import Row
from collogue.tools.bench.rank import FATAL, TIMEOUT, result
from collogue.tools.bench.timing import Chain, measure, meet
from collogue.tools.check.case import Case
from collogue.tools.check.kernels import request_of
from collogue.tools.check.rank import Answers
from collogue.tools.tune.trials import Trial

#: Replays of each graph, of small calls and of those that take long.
REPLAYS, FEW_REPLAYS, LARGE = 11, 5, 2048


def tune_rank(process_group: dist.ProcessGroup, tell: Callable[[str], None], trials: Sequence[Trial]) -> list[Row]:
    """A row for each candidate of each trial, with a latency or with an error; the same rows on every rank."""
    gc.disable()  # not in a capture
    group = as_group(process_group)
    stream, answers = torch.cuda.Stream(), Answers()  # type: ignore[no-untyped-call]
    rows: list[Row] = []
    for _, together in groupby(trials, key=lambda trial: (trial.case.hidden_size, trial.case.dtype)):
        mine = list(together)
        tell(f"{mine[0]}: communicators and kernels")
        comms = _communicators(group, mine)
        _build(group, comms, mine)
        for trial in mine:
            tell(str(trial))
            rows += _run(group, comms, trial, answers, stream, lambda: meet(process_group))
        for comm in comms.values():
            comm.close()
        gc.collect()
    return rows


def _communicators(group: Group, trials: Sequence[Trial]) -> dict[Candidate, Communicator]:
    """One for each candidate of trials of one width and dtype. They look at no table: it would decide for them. Collective."""
    case, most = trials[0].case, max(trial.case.tokens for trial in trials)
    return {
        candidate: Communicator(
            group,
            max_tokens=most,
            hidden_size=case.hidden_size,
            dtype=case.value_dtype,
            timeout=TIMEOUT,
            algorithm=candidate.algorithm,
            cta_threads=candidate.cta_threads,
            table=False,
        )
        for candidate in dict.fromkeys(candidate for trial in trials for candidate in trial.candidates)
    }


def _build(group: Group, comms: dict[Candidate, Communicator], trials: Iterable[Trial]) -> None:
    """Compile what the trials launch, on all cores of the host. Collective."""
    variants = []
    for candidate, case in ((candidate, trial.case) for trial in trials for candidate in trial.candidates):
        topology, request = comms[candidate].topology, request_of(case)
        variants += [kernel.variant for kernel in make_kernels(topology, request, make_plan(topology, request))]
    if group.rank == 0:
        jit.build(variants, str(next(iter(comms.values())).topology.architecture))
    group.barrier()


def _run(
    group: Group,
    comms: dict[Candidate, Communicator],
    trial: Trial,
    answers: Answers,
    stream: torch.cuda.Stream,
    everyone: Callable[[], None],
) -> list[Row]:
    """Gate, time in turn, gate again. Collective."""
    case, replays = trial.case, REPLAYS if trial.case.tokens < LARGE else FEW_REPLAYS

    @functools.cache
    def call() -> FusedCall:
        return FusedCall(comms[trial.candidates[0]], case, answers)

    latencies, errors = time_gated(
        group,
        {str(candidate): functools.partial(lambda c: call().on(comms[c]), candidate) for candidate in trial.candidates},
        capture=lambda function: Chain(function, stream),
        measure=lambda chains: measure(chains, replays, everyone),
    )
    for candidate in trial.candidates:
        if errors.get(str(candidate), "").startswith(FATAL):
            comms[candidate].reset()
    return [
        {**_shape(case), "candidate": name, **_launch(comms[candidate], case), **result(latencies.get(name), errors.get(name), replays)}
        for candidate in trial.candidates
        for name in [str(candidate)]
    ]


def _shape(case: Case) -> Row:
    return {"tokens": case.tokens, "hidden_size": case.hidden_size, "dtype": case.dtype}


def _launch(comm: Communicator, case: Case) -> Row:
    """How the candidate is launched."""
    plan = make_plan(comm.topology, request_of(case))
    return {"shape": str(plan.shape), "launches": plan.launches, "predicted_us": round(plan.predicted_us, 3)}

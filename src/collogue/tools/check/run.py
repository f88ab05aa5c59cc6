"""Run cases: ranks are threads on the CPU, processes where every rank has a GPU, virtual ranks where they share GPUs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from collogue.errors import PlatformError
from collogue.group import check_gpus
from collogue.testing.processes import RanksFailed, run_processes
from collogue.testing.virtual import run_virtual
from collogue.tools.check.case import Case, CaseResult
from collogue.tools.check.emulated import Emulated
from collogue.tools.check.rank import Answers, check_rank

#: Seconds that a rank may be silent (a first case compiles its kernels), and virtual ranks may wait for each other.
SILENCE = 180.0


@dataclass(frozen=True)
class Report:
    """All results of one run, with what they were taken on."""

    results: list[CaseResult]
    circumstances: dict[str, Any] = field(default_factory=dict)
    emulated: list[Emulated] = field(default_factory=list)

    @property
    def passed(self) -> bool:
        """Whether there was a case, every case passed, and so did every program of the emulator."""
        return bool(self.results) and all(r.passed for r in self.results) and not any(e.problem for e in self.emulated)

    @property
    def impossible(self) -> str | None:
        """What the machine cannot do, if that is why a case failed."""
        return next((r.error for r in self.results if r.error and r.error.startswith(PlatformError.__name__)), None)

    def as_json(self) -> dict[str, Any]:
        emulator = {"emulator": [e.as_json() for e in self.emulated]} if self.emulated else {}
        return {"passed": self.passed, **self.circumstances, "cases": [r.as_json() for r in self.results], **emulator}


def run_cases(device: str, cases: Sequence[Case], *, started: Callable[[Case], None] = lambda case: None) -> list[CaseResult]:
    """Run ``cases`` on ``"cpu"`` or ``"cuda"``, one set of ranks for each world size among them. ``started`` hears of each case.

    Raises :class:`PlatformError` where ``device`` is ``"cuda"`` and there is no GPU.
    """
    if device == "cuda":
        check_gpus("use --device cpu")
    results: dict[Case, CaseResult] = {}
    for world_size in dict.fromkeys(case.world_size for case in cases):
        mine = [case for case in cases if case.world_size == world_size]
        kind = "threads" if device == "cpu" else "processes" if world_size <= torch.cuda.device_count() else "virtual"
        for result in _run_world(kind, world_size, mine, started):
            results[result.case] = replace(result, device=device, ranks=kind)
    return [results[case] for case in cases]


def _run_world(kind: str, world_size: int, cases: list[Case], started: Callable[[Case], None]) -> list[CaseResult]:
    queue = iter(cases)
    last: Case | None = None

    def heard(rank: int, stage: str) -> None:
        nonlocal last
        if rank == 0 and stage != "joining the group":
            last = next(queue)
            started(last)

    try:
        if kind == "processes":
            by_rank = run_processes(world_size, _process, cases, device="cuda", silence=SILENCE, heard=heard)
        else:
            answers = Answers()
            by_rank = run_virtual(
                world_size,
                lambda group: check_rank(group, cases, answers, lambda text: heard(group.rank, text)),
                device="cpu" if kind == "threads" else "cuda",
                timeout=SILENCE,
            )
    except (RanksFailed, RuntimeError) as error:  # a lost process; a thread whose meeting broke or whose GPU failed
        text = error.message if isinstance(error, RanksFailed) else str(error)
        return [
            CaseResult(case, dict.fromkeys(case.outputs, 0), f"{type(error).__name__}: {text} (rank 0 was at {last})") for case in cases
        ]
    return merge(by_rank)


def _process(group: Any, tell: Callable[[str], None], cases: list[Case]) -> list[CaseResult]:
    return check_rank(group, cases, Answers(), tell)


def merge(by_rank: Sequence[Sequence[CaseResult]]) -> list[CaseResult]:
    """One result a case from those of all ranks: counts are added, the first error and the first difference name their rank."""
    merged = []
    for ranks in zip(*by_rank, strict=True):
        wrong = next((i for i, r in enumerate(ranks) if not r.passed), None)
        shown = ranks[wrong or 0]
        names = dict.fromkeys(name for r in ranks for name in r.differing)
        merged.append(
            replace(
                shown,
                differing={name: sum(r.differing.get(name, 0) for r in ranks) for name in names},
                error=shown.error if wrong is None or shown.error is None else f"{shown.error} (rank {wrong})",
                first=None if shown.first is None else f"rank {wrong}: {shown.first}",
                seconds=max(r.seconds for r in ranks),
            )
        )
    return merged

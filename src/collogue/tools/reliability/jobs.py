"""Jobs, one after the other, on processes that are watched: a job that hangs or dies is reported, and the others still run."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeAlias

from collogue.testing.processes import RanksFailed, run_processes

#: ``run(name, group, state, tell, options)`` does one job on one rank and returns what can be JSON; ``state`` lives as long as the process.
Runner: TypeAlias = Callable[[str, Any, dict[str, Any], Callable[[str], None], Any], Any]
_DONE = "done "


@dataclass
class Outcome:
    """``results``: of each job, by rank, of the ranks that finished it. ``problems``: of each job that did not end as it should."""

    results: dict[str, dict[int, Any]] = field(default_factory=dict)
    problems: dict[str, str] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)

    def __or__(self, other: Outcome) -> Outcome:
        """Of two lists of jobs, that have none in common."""
        return Outcome(self.results | other.results, self.problems | other.problems, self.seconds | other.seconds)


def run_jobs(
    world_size: int,
    runner: Runner,
    names: Sequence[str],
    options: Any = None,
    *,
    device: str = "cpu",
    last: Sequence[str] = (),
    silence: float = 20.0,
    limit: float = 240.0,
    attempts: int = 4,
    heard: Callable[[str], None] = lambda text: None,
) -> Outcome:
    """Run jobs by name on ``world_size`` processes.

    A set of processes that falls silent, dies or raises is ended, its job noted, and a new set goes on with the next.

    Args:
        runner: importable; what does a job.
        last: jobs in which the last rank dies. They must be the last ones of ``names``.
        silence, limit: seconds without a word, and for everything; see :func:`collogue.testing.processes.run_processes`.
        attempts: most sets of processes.
        heard: hears what rank 0 is doing.
    """
    outcome, remaining = Outcome(), list(names)
    deadline = time.monotonic() + limit

    def missing(name: str) -> bool:
        return len(outcome.results.get(name, {})) < world_size - (name in last)

    for _ in range(attempts):
        began: dict[str, float] = {}

        def listen(rank: int, text: str, began: dict[str, float] = began) -> None:
            if text.startswith(_DONE):
                word = json.loads(text.removeprefix(_DONE))
                outcome.results.setdefault(word["job"], {})[rank] = word["result"]
                outcome.seconds[word["job"]] = round(time.monotonic() - began[word["job"]], 2)
                return
            began.setdefault(text, time.monotonic())
            if rank == 0:
                heard(text)

        mortal = [world_size - 1] if set(remaining) & set(last) else []
        left = deadline - time.monotonic()
        if not remaining or left <= 0:
            break
        try:
            run_processes(
                world_size, _rank, runner, remaining, options, device=device, silence=silence, limit=left, mortal=mortal, heard=listen
            )
            remaining = [name for name in remaining if missing(name)]
        except RanksFailed as error:
            remaining = [name for name in remaining if missing(name)] or remaining[-1:]
            lost = remaining.pop(0)
            outcome.problems[lost] = error.message
            heard(f"{lost}: {error.message.splitlines()[0]}")
    outcome.problems |= dict.fromkeys(remaining, f"not done in {limit:g} s and {attempts} sets of processes")
    return outcome


def _rank(group: Any, tell: Callable[[str], None], runner: Runner, names: Sequence[str], options: Any) -> None:
    """All jobs on this rank."""
    state: dict[str, Any] = {}
    for name in names:
        tell(name)
        tell(_DONE + json.dumps({"job": name, "result": runner(name, group, state, tell, options)}))

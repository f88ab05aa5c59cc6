"""``collogue bench``: the whole run, one process per GPU, and its results as JSON and as tables."""

from __future__ import annotations

import json as json_module
import os
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from collogue.errors import PlatformError
from collogue.testing import environment
from collogue.testing.processes import run_processes
from collogue.tools.bench import report
from collogue.tools.bench.cases import DEFAULT_SUITES, Round, chosen_rounds, suite, with_libraries, without_compiled
from collogue.tools.bench.rank import bench_rank, start_again
from collogue.tools.check.case import Case
from collogue.tools.record import circumstances

#: Seconds without a word from any rank, after which the run is ended.
SILENCE = 120.0
#: Formats whose compile time is reported.
_COMPILED = 3


def run(
    *,
    suites: Sequence[str] | None = None,
    world_size: Sequence[int] | None = None,
    tokens: Sequence[int] | None = None,
    hidden_size: Sequence[int] | None = None,
    dtype: Sequence[str] | None = None,
    format: Sequence[str] | None = None,
    chains: bool = True,
    baselines: Sequence[str] | None = None,
    cta_threads: int | None = None,
    json: str | None = None,
    commit: str | None = None,
) -> bool:
    """Measure, write the JSON, print the tables; whether everything of Collogue's has a number.

    Args:
        suites: names of :data:`collogue.tools.bench.cases.SUITES`; default: :data:`.cases.DEFAULT_SUITES`. Not with lists.
        world_size: default: the number of GPUs; the suite ``world``: 2 to that number. The other lists are those of
            :func:`collogue.tools.bench.cases.chosen_rounds`.
        chains: also time other libraries' ways to do the whole call; ``torch.compile`` takes seconds for each of their shapes.
        baselines: libraries of :data:`collogue.tools.bench.cases.LIBRARIES`, in the place of those that the suites have. What cannot be
            imported has no number.
        cta_threads: what every communicator fixes of its plans, to try other shapes.
        json: a file, or ``"-"`` for stdout (the tables then go to stderr).
        commit: recorded; default: what git says of the directory that this package is in.
    Raises:
        PlatformError: fewer GPUs than ranks, or than two.
    """
    lists = {"tokens": tokens, "hidden_size": hidden_size, "dtype": dtype, "format": format}
    environment.set_defaults()
    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    worlds = list(world_size or [min(8, gpus)])
    for world in worlds:
        if not 2 <= world <= gpus:
            raise PlatformError(f"{gpus} GPUs found; {max(2, world)} required, one for each rank", hint="use a machine with more GPUs")
    if any(lists.values()):
        rounds = {n: chosen_rounds(n, **lists) for n in worlds}  # type: ignore[arg-type]
    else:
        rounds = suite_rounds(suites or DEFAULT_SUITES, worlds, given=world_size is not None)
    if baselines is not None:
        rounds = {n: [with_libraries(r, baselines) for r in mine] for n, mine in rounds.items()}
    if not chains:
        rounds = {n: [without_compiled(r) for r in mine] for n, mine in rounds.items()}
    rounds = {n: [_fixed(r, cta_threads) for r in mine] for n, mine in rounds.items()}
    data = {
        "passed": False,
        **circumstances(commit),
        "method": report.METHOD,
        "cases": [],
        "wire": [],
        "host": [],
        "compile": [],
    }
    with _empty_kernel_cache(), _progress(sum(map(len, rounds.values()))) as progress:
        for world, mine in rounds.items():
            _run_world(world, mine, data, progress)
    data["passed"] = report.passed(data)
    _write(data, json)
    return bool(data["passed"])


def _fixed(round: Round, cta_threads: int | None) -> Round:
    """``round`` with plans that have so many threads in a CTA, where they are given."""
    if cta_threads is None:
        return round
    overrides = replace(round.overrides, cta_threads=cta_threads)
    overrides.check()
    return replace(round, overrides=overrides)


def suite_rounds(suites: Sequence[str], worlds: Sequence[int], *, given: bool = False) -> dict[int, list[Round]]:
    """The rounds of each world. The suite ``world`` is for every world size up to the largest, unless world sizes were ``given``."""
    found: dict[int, list[Round]] = {}
    for name in suites:
        for world in worlds if given or name != "world" else range(2, max(worlds) + 1):
            found.setdefault(world, []).extend(suite(name, world))
    return found


def _run_world(world: int, rounds: list[Round], data: dict[str, Any], progress: Progress) -> None:
    compiled = compiled_cases(rounds)
    names = {str(r) for r in rounds}
    task = progress.task_ids[0]

    def heard(rank: int, stage: str) -> None:
        if rank:
            return
        progress.update(task, now=stage[:60], advance=stage in names)
        if " | " in stage or not progress.console.is_terminal:
            progress.console.print(stage, highlight=False, markup=False, soft_wrap=True)

    ranks = run_processes(world, bench_rank, rounds, compiled, device="cuda", silence=SILENCE, heard=heard)
    again = run_processes(world, start_again, rounds, compiled, device="cuda", silence=SILENCE, heard=heard)
    data["cases"] += report.add_floors(ranks[0]["rows"], ranks[0]["wire"])
    data["wire"].append(ranks[0]["wire"])
    data["host"] += ranks[0]["host"]
    data["compile"].append(
        {
            "world_size": world,
            "formats": [case.format for case in compiled],
            "cold_seconds": [max(times) for times in zip(*(r["cold"] for r in ranks), strict=True)],
            "cached_seconds": [max(times) for times in zip(*again, strict=True)],
        }
    )


def compiled_cases(rounds: Sequence[Round]) -> list[Case]:
    """The first few cases that need kernels of their own: their compile time is taken one by one, in new processes."""
    first: dict[str, Case] = {}
    for case in rounds[0].cases:
        if case.possible:
            first.setdefault(case.format, case)
    return list(first.values())[:_COMPILED]


@contextmanager
def _empty_kernel_cache() -> Iterator[None]:
    """Ranks that start inside keep their kernels in a directory of their own, empty at first."""
    name = "COLLOGUE_CACHE_DIR"
    before = os.environ.get(name)
    with tempfile.TemporaryDirectory(prefix="collogue-bench-", ignore_cleanup_errors=True) as folder:
        os.environ[name] = folder
        try:
            yield
        finally:
            if before is None:
                del os.environ[name]
            else:
                os.environ[name] = before


@contextmanager
def _progress(total: int) -> Iterator[Progress]:
    columns = (TextColumn("bench"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TextColumn("{task.fields[now]}"))
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        progress.add_task("bench", total=total, now="starting the ranks")
        yield progress


def _write(data: dict[str, Any], target: str | None) -> None:
    text = json_module.dumps(data, indent=1, allow_nan=False) + "\n"
    if target == "-":
        sys.stdout.write(text)
    elif target is not None:
        Path(target).write_text(text)
    print(report.text(data), file=sys.stderr if target == "-" else sys.stdout)

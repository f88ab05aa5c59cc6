"""The whole of ``collogue reliability``: jobs on this machine's GPUs, and their results as one JSON."""

from __future__ import annotations

import gc
import os
import re
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from functools import partial
from typing import Any, TypeAlias

import torch
import torch.distributed as dist

from collogue.tools.ablation.rank import ablate_rank
from collogue.tools.ablation.switches import chosen
from collogue.tools.check.case import Case
from collogue.tools.reliability.faults import FAULTS, GRACE, Fault, commit, faults_of
from collogue.tools.reliability.jobs import Outcome, run_jobs
from collogue.tools.reliability.parts import Counts, Part, make_parts
from collogue.tools.reliability.scene import TIMEOUT, Scene
from collogue.tools.reliability.soak import soak

Row: TypeAlias = dict[str, Any]
SECTIONS = ("cost", "soak", "faults")
SWITCHES = ("base", "base again", "no bound", "no marks", "unguarded")
METHOD = (
    "Soak: every call's outputs are compared with the reference's on the device, word by word, by a kernel that then spoils them; ranks "
    "are delayed at random by spinning kernels, each in graphs of its own. Faults: the last rank does what must not be done; seconds are "
    "from the start of the fault until comm.check(), the next call or comm.watch() raised; afterwards the communicator is reset and "
    "calls are compared with the reference. Cost: switches of `collogue ablate`, all replayed in turn in one run, the median of "
    "rounds with memory of their own."
)


@dataclass(frozen=True)
class Options:
    """What every rank reports. ``hidden_size`` and ``rows`` are of the calls around faults."""

    counts: Counts = field(default_factory=Counts)
    device: str = "cuda"
    seed: int = 0
    replays: int = 31
    rounds: int = 5
    timeout: float = TIMEOUT
    hidden_size: int = 7168
    rows: int = 700


def names_of(world: int, sections: tuple[str, ...], options: Options) -> list[str]:
    """Jobs in the order they are done in; the fault that ends a process is the last."""
    names = ["cost"] if "cost" in sections else []
    if "soak" in sections:
        names += [f"soak: {part.name}" for part in make_parts(world, options.counts) if part.calls]
    if "faults" in sections:
        names += [f"fault: {fault.name}" for fault in faults_of(options.device)]
    return names


def run_job(name: str, group: Any, state: dict[str, Any], tell: Callable[[str], None], options: Options, *, world: int) -> Any:
    """One job on this rank; ``world``: the number of GPUs."""
    device = torch.device("cuda", torch.cuda.current_device()) if options.device == "cuda" else torch.device("cpu")
    kind, _, rest = name.partition(": ")
    if kind == "cost":
        rows = ablate_rank(group, tell, chosen(SWITCHES[1:]), cost_cases(world), options.replays, options.rounds)
        gc.enable()  # switched off there
        return rows
    if kind == "soak":
        part = next(part for part in make_parts(world, options.counts) if part.name == rest)
        mine = _half(group) if part.split else group
        return soak(mine, part, device, tell, seed=options.seed, meet=lambda: dist.barrier(group))
    if "scene" not in state:
        tell("faults: kernels")
        state["scene"] = Scene.make(group, device, options.timeout, options.hidden_size, options.rows)
    return commit(next(fault for fault in FAULTS if fault.name == rest), state["scene"])


def _half(group: Any) -> Any:
    """This rank's half of the group as a group. Collective."""
    half = dist.get_world_size(group) // 2
    groups = [dist.new_group(list(range(first, first + half))) for first in (0, half)]
    return groups[dist.get_rank(group) // half]


def cost_cases(world: int) -> list[Case]:
    """One row, and eight, with residual and norm."""
    formats = ("none", "nvfp4/128x4", "fp8_static")
    return [Case(tokens, 7168, format=label, world_size=world, keep_norm=False) for label in formats for tokens in (1, 8)]


def run(
    world: int,
    sections: tuple[str, ...] = SECTIONS,
    options: Options = Options(),
    *,
    silence: float = 60.0,
    limit: float = 300.0,
    heard: Callable[[str], None] = lambda text: None,
) -> Row:
    """Do all jobs of ``sections`` and put together what they gave. ``passed`` says whether all is as promised."""
    names = names_of(world, sections, options)
    last = [f"fault: {fault.name}" for fault in FAULTS if fault.last]
    ranks = {f"soak: {part.name}": part.ranks for part in make_parts(world, options.counts)}
    outcome, deadline = Outcome(), time.monotonic() + limit
    # Each set of processes has one size, and ends with a process that dies, if with any.
    sets: dict[tuple[int, str], list[str]] = {}
    deaths = [name for name in names if name in last]
    for name in names:
        sets.setdefault((ranks.get(name, world), name if name in deaths[1:] else ""), []).append(name)
    with _journals():
        for (size, _), some in sets.items():
            left = max(0.0, deadline - time.monotonic())
            runner = partial(run_job, world=world)
            outcome |= run_jobs(size, runner, some, options, device=options.device, last=last, silence=silence, limit=left, heard=heard)
    return report(world, names, options, outcome)


@contextmanager
def _journals() -> Iterator[None]:
    """Ranks that start inside write their journals into a directory that goes away."""
    name = "COLLOGUE_JOURNAL_DIR"
    before = os.environ.get(name)
    with tempfile.TemporaryDirectory(prefix="collogue-journals-", ignore_cleanup_errors=True) as folder:
        os.environ[name] = folder
        try:
            yield
        finally:
            os.environ.pop(name)
            if before is not None:
                os.environ[name] = before


def report(world: int, names: list[str], options: Options, outcome: Outcome) -> Row:
    """The results as data."""
    data: Row = {"passed": False, "method": METHOD, "world_size": world, "options": asdict(options), "soak": [], "faults": [], "cost": []}
    parts, faults = {part.name: part for part in make_parts(world, options.counts)}, {fault.name: fault for fault in FAULTS}
    for name in names:
        kind, _, rest = name.partition(": ")
        by_rank, problem = outcome.results.get(name, {}), _in_a_line(outcome.problems.get(name))
        ranks = [result for _, result in sorted(by_rank.items()) if result is not None]
        if kind == "cost":
            data["cost"] = ranks[0] if ranks else []
        elif kind == "soak":
            data["soak"].append(_soak_row(parts[rest], ranks, problem))
        else:
            data["faults"].append(_fault_row(faults[rest], world, options, ranks, problem))
    data["problems"], data["seconds"] = outcome.problems, outcome.seconds
    rows = [*data["soak"], *data["faults"]]
    data["passed"] = bool(names) and not outcome.problems and all(row["passed"] for row in rows) and all(r["us"] for r in data["cost"])
    return data


def _in_a_line(problem: str | None) -> str | None:
    """What a rank raised last, or what became of the processes."""
    if problem is None:
        return None
    lines = [line for line in problem.splitlines() if re.match(r"[\w.]+(Error|Exception|Timeout|Call)\b", line)]
    return lines[-1] if lines else problem.splitlines()[0]


def _soak_row(part: Part, ranks: list[Row], problem: str | None) -> Row:
    """Sums over the ranks, but of calls and time."""
    row: Row = {"part": part.name, "ranks": part.ranks, "asked": part.calls, "graph_calls": part.graph_calls, "graphs": part.graphs}
    for key in ("calls", "replays", "eager_calls"):
        row[key] = min((found[key] for found in ranks), default=0)
    for key in ("comparisons", "wrong_words", "delays"):
        row[key] = sum(found[key] for found in ranks)
    row["seconds"] = max((found["seconds"] for found in ranks), default=None)
    row["errors"] = [found["error"] for found in ranks if found["error"]] + ([problem] if problem else [])
    row["hung"] = bool(row["errors"]) or len(ranks) < part.ranks
    done = row["calls"] >= part.calls and row["comparisons"] == sum(found["calls"] for found in ranks)
    row["passed"] = done and not row["hung"] and row["wrong_words"] == 0
    return row


def _fault_row(fault: Fault, world: int, options: Options, ranks: list[Row], problem: str | None) -> Row:
    row: Row = {"fault": fault.name, "what": fault.what, "timeout_s": options.timeout, "limit_s": options.timeout + GRACE}
    row |= {"others_may_see": list(fault.others), "culprit_may_see": list(fault.culprit), "ranks": ranks, "problem": problem}
    complete = len(ranks) == world - fault.last and problem is None
    good = all(found["as_expected"] and found["afterwards"] is None and found["journal"] is not False for found in ranks)
    if fault.last:  # somebody names who has died
        good = good and any(f"of rank {world - 1}," in (found["text"] or "") for found in ranks)
    row["passed"] = complete and good
    return row


def once(start: Callable[[str], None]) -> Callable[[str], None]:
    """Passes on the names of jobs alone, of all that is heard."""

    def heard(text: str) -> None:
        if text == "cost" or re.fullmatch(r"(soak|fault): .*", text):
            start(text)

    return heard


def text(data: Row) -> str:
    """For people: the parts of the soak, what every rank saw, the cost."""
    lines = []
    for row in data["soak"]:
        lines.append(
            f"{'ok' if row['passed'] else 'FAILED':6} {row['part']}: {row['calls']} calls, {row['wrong_words']} wrong words, "
            f"{'hung' if row['hung'] else 'none hung'}, {row['delays']} delays, {row['seconds']} s"
        )
        lines += [f"       {error}" for error in row["errors"]]
    for row in data["faults"]:
        lines.append(f"{'ok' if row['passed'] else 'FAILED':6} {row['fault']}" + (f": {row['problem']}" if row["problem"] else ""))
        for found in row["ranks"]:
            saw = f"{found['saw']} by {found['by']} after {found['seconds']:.2f} s: {found['text']}" if found["saw"] else "nothing"
            lines.append(f"       rank {found['rank']} saw {saw}")
            lines += [f"       rank {found['rank']} afterwards: {found['afterwards']}"] if found["afterwards"] else []
    for row in data["cost"]:
        us = f"{row['us']:.3f} us" if row["us"] else f"FAILED: {row['error']}"
        lines.append(f"       {row['format']}, T = {row['tokens']}, {row['switch']}: {us}")
    return "\n".join(lines)

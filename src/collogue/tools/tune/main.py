"""The whole run of ``collogue tune``: a process for each GPU, then the table as JSON and as text."""

from __future__ import annotations

import json as json_module
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

from collogue.cache import write_whole
from collogue.errors import ArgumentError, PlatformError
from collogue.planning.explain import Machine
from collogue.planning.table import FORMAT, Candidate, Entry, Table, Time, own_path
from collogue.testing import environment
from collogue.testing.processes import run_processes
from collogue.tools.bench.names import Row
from collogue.tools.bench.report import aligned, number
from collogue.tools.record import circumstances
from collogue.tools.tune.rank import tune_rank
from collogue.tools.tune.steps import choose_steps
from collogue.tools.tune.trials import trials

#: Seconds without a word from any rank, after which the run is ended.
SILENCE = 120.0
METHOD = (
    "Microseconds per call of all_reduce with a residual and RMSNorm, without quantization: (CUDA graph of 100 back-to-back "
    "calls - graph of 20) / 80; median over replays, maximum over ranks. The candidates of one number of tokens are replayed in turn, on "
    "the same three input sets; before timing and after the timed graph the outputs of each equal the reference bit for bit, else it is "
    "rejected at every number of tokens."
)


def run(
    *,
    hidden_size: Sequence[int] | None = None,
    dtype: Sequence[str] | None = None,
    tokens: Sequence[int] | None = None,
    world_size: int | None = None,
    json: str | None = None,
    commit: str | None = None,
    begin: Callable[[int], Callable[[str], None]] = lambda steps: lambda stage: None,
) -> dict[str, Any]:
    """Measure, and write the table; returns it as it was written: this machine's own with what it had of other shapes.

    Args:
        hidden_size, dtype, tokens: what is measured; defaults: :mod:`collogue.tools.tune.trials`.
        world_size: default: the number of GPUs, at most 8.
        json: a file, or ``"-"`` for stdout; default: :func:`collogue.planning.table.own_path`, where communicators look.
        commit: recorded; default: what git says of the directory that this package is in.
        begin: takes the number of steps, and returns what to call with the name of each.
    Raises:
        PlatformError: fewer GPUs than ranks, or than two. ArgumentError (its subclasses): a shape or dtype that cannot be.
    """
    environment.set_defaults()
    machine = Machine.here()
    world = world_size or min(8, machine.gpus)
    if not 2 <= world <= machine.gpus:
        raise PlatformError(f"{machine.gpus} GPUs found; {max(2, world)} required, one for each rank", hint="use a machine with more GPUs")
    every = trials(machine, world, hidden_size=hidden_size, dtype=dtype, tokens=tokens)
    # Each trial, and the communicators and kernels of each width and dtype.
    heard = begin(len(every) + len({(trial.case.hidden_size, trial.case.dtype) for trial in every}))
    ranks = run_processes(world, tune_rank, every, device="cuda", silence=SILENCE, heard=lambda rank, stage: None if rank else heard(stage))
    entries = list(make_entries(ranks[0], machine, world))
    refused = [row for row in ranks[0] if row["error"]]
    own = own_path(str(machine.device), world)
    kept = kept_entries(own, machine, world, ranks[0]) if json is None else []
    data = {
        "format": FORMAT,
        "passed": bool(entries) and not refused,
        **circumstances(commit),
        "method": METHOD,
        "entries": entries + kept,
        "refused": refused,
    }
    content = (json_module.dumps(data, indent=1, allow_nan=False) + "\n").encode()
    if json == "-":
        sys.stdout.write(content.decode())
    elif json is not None:
        Path(json).write_bytes(content)
    elif entries or own.is_file():
        write_whole(own, content)
    return data


def kept_entries(path: Path, machine: Machine, world_size: int, measured: Iterable[Row]) -> list[dict[str, Any]]:
    """What stays of the table in ``path``: entries of this machine of other shapes than ``measured``, with date and commit of their own.

    What was measured again and rejected does not stay, nor does anything of a file that is not a table.
    """
    try:
        Table.read(path)
    except ArgumentError:
        return []
    earlier = json_module.loads(path.read_bytes())
    then = {name: earlier[name] for name in ("date", "commit") if name in earlier}
    here = (machine.architecture, machine.device, world_size)
    anew = {(row["hidden_size"], row["dtype"]) for row in measured}
    return [
        {**then, **entry}
        for entry in earlier["entries"]
        if (entry["architecture"], entry["device"], entry["world_size"]) == here and (entry["hidden_size"], entry["dtype"]) not in anew
    ]


def make_entries(rows: Iterable[Row], machine: Machine, world_size: int) -> Iterator[dict[str, Any]]:
    """An entry for each hidden size and dtype, of the candidates that passed everywhere; none where no two-shot did."""
    for (width, dtype), together in groupby(rows, key=lambda row: (row["hidden_size"], row["dtype"])):
        mine = list(together)
        refused = {row["candidate"] for row in mine if row["error"]}
        good = [row for row in mine if row["candidate"] not in refused]
        times = tuple(Time(row["tokens"], Candidate.parse(row["candidate"]), row["us"]) for row in good)
        steps = choose_steps(times)
        if steps:
            entry = Entry(str(machine.architecture), str(machine.device), world_size, dtype, width, steps, times)
            yield {
                **{name: getattr(entry, name) for name in ("architecture", "device", "world_size", "dtype", "hidden_size")},
                "one_shot_tokens": entry.one_shot_tokens,
                "steps": [{"up_to": step.up_to, "candidate": str(step.candidate)} for step in steps],
                "times": [{name: value for name, value in row.items() if name not in ("dtype", "hidden_size")} for row in good],
            }


def text(data: dict[str, Any]) -> str:
    """The table for people: what was measured, and the steps."""
    lines = []
    for entry in data["entries"]:
        names = list(dict.fromkeys(row["candidate"] for row in entry["times"]))
        table = [["T", *names]]
        for tokens in sorted({row["tokens"] for row in entry["times"]}):
            found = {row["candidate"]: row for row in entry["times"] if row["tokens"] == tokens}
            table.append([str(tokens), *(number(found.get(name)) for name in names)])
        lines += [f"H = {entry['hidden_size']}, {entry['dtype']}, {entry['world_size']} x {entry['device']}: us per call", *aligned(table)]
        steps = [f"{s['candidate']}" + ("" if s["up_to"] is None else f" up to {s['up_to']} tokens") for s in entry["steps"]]
        lines.append(", then ".join(steps))
        lines.append("")
    for row in data["refused"]:
        lines.append(f"REJECTED {row['candidate']} H={row['hidden_size']} {row['dtype']} T={row['tokens']}: {row['error']}")
    return "\n".join(lines)

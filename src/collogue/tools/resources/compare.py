"""Resources of two revisions side by side, and the limits that today's are held to."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from collogue.tools.resources.measure import Row, key

#: Registers a thread that a kernel may have above its record: what a compiler changes on its own.
SLACK = 4
COLUMNS = ("registers", "shared_bytes", "stack_bytes", "spilled_bytes", "occupancy", "code_bytes")


@dataclass(frozen=True)
class Difference:
    """What changed of one kernel: ``before`` and ``after`` by column; instructions as ``instructions.KIND``."""

    key: str
    changes: dict[str, tuple[Any, Any]]


@dataclass(frozen=True)
class Comparison:
    """``same`` counts kernels without a change; ``added`` and ``removed`` name those that only one side has."""

    differences: list[Difference]
    same: int
    added: list[str]
    removed: list[str]


def compare(before: Sequence[Row], after: Sequence[Row]) -> Comparison:
    """Kernels are matched by their choices."""
    old, new = ({key(row["choice"]): row for row in rows} for rows in (before, after))
    found = [Difference(k, dict(_changes(old[k], row))) for k, row in new.items() if k in old]
    changed = [d for d in found if d.changes]
    return Comparison(changed, len(found) - len(changed), [k for k in new if k not in old], [k for k in old if k not in new])


def _changes(before: Row, after: Row) -> Iterator[tuple[str, tuple[Any, Any]]]:
    for name in COLUMNS:
        if before[name] != after[name]:
            yield name, (before[name], after[name])
    if before["instructions"] and after["instructions"]:
        for kind, count in after["instructions"].items():
            if before["instructions"].get(kind) != count:
                yield f"instructions.{kind}", (before["instructions"].get(kind), count)


def violations(rows: Sequence[Row], record: Sequence[Row] | None) -> list[str]:
    """What breaks a limit: local memory; more than :data:`SLACK` registers above the record; a kernel that the record lacks.

    ``record``: ``None`` where there is none by the same compiler; then only local memory is looked at.
    """
    known = {key(row["choice"]): row["registers"] for row in record or ()}
    found = []
    for row in rows:
        name, registers = key(row["choice"]), row["registers"]
        if row["stack_bytes"] or row["spilled_bytes"]:
            found.append(f"{name}: {row['stack_bytes']} bytes of stack, {row['spilled_bytes']} spilled")
        if record is not None and name not in known:
            found.append(f"{name}: not in the record")
        elif record is not None and registers > known[name] + SLACK:
            found.append(f"{name}: {registers} registers, {known[name]} in the record")
    return found


def dumps(data: dict[str, Any]) -> str:
    """JSON with a line for each kernel, so that a change of a record can be read."""
    rest = {name: value for name, value in data.items() if name != "kernels"}
    rows = ",\n".join(json.dumps(row, allow_nan=False) for row in data["kernels"])
    return f'{json.dumps(rest, indent=1, allow_nan=False)[:-2]},\n "kernels": [\n{rows}\n ]\n}}\n'

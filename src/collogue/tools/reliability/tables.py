"""The tables of docs/reliability.md, row by row, from results as data. ``scripts/pages.py`` lays them out."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

Data = dict[str, Any]


def faults(data: Data) -> Iterator[Sequence[str]]:
    """What every rank saw, how it learnt of it, and after how many seconds; when the last rank's kernels had ended."""
    yield ["fault", "what was done", "the other ranks saw", "the rank that did it saw", "kernels over", "in time, and right afterwards"]
    for row in data["faults"]:
        others = [rank for rank in row["ranks"] if not rank["culprit"]]
        culprit = [rank for rank in row["ranks"] if rank["culprit"]]
        dead = "it is dead" if not culprit and others else "-"
        ends = [rank["kernels_over"] for rank in row["ranks"] if rank["kernels_over"] is not None]
        over = f"{max(ends):.2f} s" if ends else "-"
        yield [row["fault"], row["what"], _seen(others) or "-", _seen(culprit) or dead, over, "yes" if row["passed"] else "**no**"]


def _seen(ranks: Sequence[Data]) -> str:
    """Of several ranks each different thing, with the longest time."""
    longest: dict[tuple[str | None, str | None], float] = {}
    for rank in ranks:
        key = rank["saw"], rank["by"]
        longest[key] = max(longest.get(key, 0.0), rank["seconds"])
    return "; ".join(f"`{saw}` by {by}, {seconds:.2f} s" if saw else "nothing" for (saw, by), seconds in longest.items())


def soak(data: Data) -> Iterator[Sequence[str]]:
    """Calls of each part, and what was wrong."""
    yield ["part", "calls on each rank", "of them eager", "comparisons, all ranks", "delays put in", "wrong words", "hung", "seconds"]
    for row in data["soak"]:
        numbers = [f"{row[key]:,}" for key in ("calls", "eager_calls", "comparisons", "delays", "wrong_words")]
        yield [row["part"], *numbers, "**yes**" if row["hung"] else "none", "-" if row["seconds"] is None else f"{row['seconds']:.1f}"]


def mutants(data: Data) -> Iterator[Sequence[str]]:
    """Seeds until a mutant was caught, and by what."""
    yield ["mutant", "caught by seed", "seen first"]
    for row in data["mutants"]:
        yield [row["mutant"], f"{row['seeds']} of {row['of']}", " ".join(row["seen"].replace("|", "/").split())]


#: Switches of `collogue ablate`, as columns.
_COLUMNS = {
    "base": "as it is",
    "base again": "as it is, again",
    "no marks": "no signatures, no journal",
    "no bound": "no bound",
    "unguarded": "neither",
}


def cost(data: Data) -> Iterator[Sequence[str]]:
    """Microseconds per call with and without protection."""
    yield ["format", "tokens", *_COLUMNS.values(), "cost of the bound", "of both"]
    cells = {(row["format"], row["tokens"], row["switch"]): row["us"] for row in data["cost"]}
    for format, tokens in dict.fromkeys((row["format"], row["tokens"]) for row in data["cost"]):
        found = {name: cells.get((format, tokens, name)) for name in _COLUMNS}
        shares = [_percent(found["base"], found[without]) for without in ("no bound", "unguarded")]
        yield [format, str(tokens), *("-" if us is None else f"{us:.3f}" for us in found.values()), *shares]


def _percent(protected: float | None, without: float | None) -> str:
    return f"{100 * (protected / without - 1):+.1f} %" if protected and without else "-"

"""Two results side by side: which rows became faster or slower by more than their own noise."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from collogue.tools.bench.names import Row, label

Verdict = Literal["faster", "slower", "same", "no number"]
_KEY = ("section", "world_size", "tokens", "hidden_size", "dtype")


@dataclass(frozen=True)
class Change:
    """One row in both files. ``ratio`` is after over before; ``noise`` half the wider of both spreads (10th to 90th percentile), relative.

    ``faster`` and ``slower`` mean that the spreads of the two do not overlap.
    """

    key: tuple[Any, ...]
    name: str
    before: float | None
    after: float | None
    ratio: float | None
    noise: float | None
    verdict: Verdict


def compare(before: dict[str, Any], after: dict[str, Any]) -> list[Change]:
    """Every row that both files have, in the order of ``after``; slower ones come first."""
    old = {_identity(row): row for row in before["cases"]}
    changes = [_change(old[_identity(row)], row) for row in after["cases"] if _identity(row) in old]
    order = {"no number": 0, "slower": 1, "faster": 2, "same": 3}
    return sorted(changes, key=lambda c: order[c.verdict])


def _identity(row: Row) -> tuple[Any, ...]:
    return (*(row[name] for name in _KEY), label(row))


def _change(before: Row, after: Row) -> Change:
    key, name = tuple(after[k] for k in _KEY), label(after)
    if before["us"] is None or after["us"] is None:
        verdict: Verdict = "same" if before["us"] == after["us"] else "no number"
        return Change(key, name, before["us"], after["us"], None, None, verdict)
    noise = max((row["high_us"] - row["low_us"]) / 2 / row["us"] for row in (before, after))
    verdict = "slower" if after["low_us"] > before["high_us"] else "faster" if after["high_us"] < before["low_us"] else "same"
    return Change(key, name, before["us"], after["us"], after["us"] / before["us"], noise, verdict)


def counts(changes: list[Change]) -> str:
    """How many of each verdict, in words."""
    return ", ".join(f"{sum(c.verdict == v for c in changes)} {v}" for v in ("slower", "faster", "same", "no number"))

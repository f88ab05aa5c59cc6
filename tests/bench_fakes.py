"""What the tests of `collogue bench` use in the place of GPUs: subjects, and results of made-up numbers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from collogue.tools.bench import report
from collogue.tools.bench.cases import default_rounds
from collogue.tools.bench.floors import EMPTY, EXCHANGE
from collogue.tools.bench.rank import _call
from collogue.tools.bench.timing import SETS, SHORT


class Counter:
    """A subject: every call adds one to a number; the gate wants exactly ``wanted(calls)``."""

    repeatable = True

    def __init__(self, wrong_at: int | None = None) -> None:
        self.value, self.calls, self.wrong_at, self.turns = 0, 0, wrong_at, list[int]()

    def call(self, turn: int) -> None:
        self.calls += 1
        self.turns.append(turn % SETS)
        self.value += 1 if self.calls != self.wrong_at else 2

    def gate(self, run: Callable[[], None]) -> str | None:
        self.value, before = 0, self.calls
        run()
        return None if self.value == self.calls - before else f"{self.value} for {self.calls - before} calls"


class Recorded:
    def __init__(self, call: Callable[[int], object]) -> None:
        self.call = call

    def run(self) -> None:
        for turn in range(SHORT):
            self.call(turn)


def fake_rank(world: int) -> dict[str, Any]:
    """What a rank returns, with made-up latencies: T/10 + 1, or + 5, plus a bit for each row; the wire moves 300 bytes in a microsecond."""
    rows = []
    for r in default_rounds(world):
        shape = {"world_size": world, "tokens": r.shape.tokens, "hidden_size": r.shape.hidden_size, "dtype": r.shape.dtype}
        names = [{"what": w} for w in (EMPTY, EXCHANGE, *r.baselines)]
        names += [{"what": "collogue", **_call(c), "bytes_sent": 600} for c in r.cases]
        for i, name in enumerate(names):
            us = (5.0 if name["what"] == "collogue" else 1.0) + r.shape.tokens / 10 + i / 100
            result = {"us": us, "low_us": us - 0.1, "high_us": us + 0.1, "replays": 9, "error": None}
            rows.append({"section": r.section, **shape, **name, **result})
    wire = {"what": "wire", "world_size": world, "bytes_sent": 3000, "us": 10.0, "error": None}
    host = [{"what": "comm.all_reduce(...)", "world_size": world, "tokens": 1, "hidden_size": 7168, "us": 12.5, "error": None}]
    return {"rows": rows, "wire": wire, "host": host, "cold": [0.31, 0.2, 0.2]}


def made(world: int = 2) -> dict[str, Any]:
    ranks = fake_rank(world)
    cases = report.add_floors(ranks["rows"], ranks["wire"])
    compiled = {"formats": ["none"], "cold_seconds": [0.3], "cached_seconds": [0.02]}
    return {"machine": {"gpus": ["GPU X"]}, "cases": cases, "wire": [ranks["wire"]], "host": ranks["host"], "compile": [compiled]}

"""Latency and wire model: the floor of a call and the predicted time, in microseconds (docs/tuning.md).

A call takes an exchange of one word, the work on its rows, one more hop where there are two, and the bytes that leave a rank at the
rate of its algorithm. The constants are fitted to two H200 with NVLink; other machines and worlds differ. Plans compare predictions
of one-shot and two-shot.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from collogue.planning.algorithm import ALGORITHMS


@dataclass(frozen=True)
class Constants:
    """Microseconds, and bytes per microsecond.

    ``exchange_us``: one word to and from every peer, back to back. ``wire_rate``: payload per GPU and direction, 16-byte stores and
    nothing else. ``finish_us``: what one-shot adds to an exchange at one token: loads, row sum over the cluster, stores.
    ``one_shot_rate``: the rate as one-shot reaches it, whose receiver reads, adds and cleans as well. ``second_hop_us``, ``stream_rate``:
    what two-shot adds to that at one token, and its rate.
    """

    exchange_us: float
    wire_rate: float
    finish_us: float
    one_shot_rate: float
    second_hop_us: float
    stream_rate: float


#: From benchmarks/results/latency-2xh200.json by :func:`fit`; ``one_shot_rate`` so that one-shot goes as far as it is faster.
CONSTANTS = Constants(exchange_us=1.23, wire_rate=367e3, finish_us=0.7, one_shot_rate=317.5e3, second_hop_us=1.4, stream_rate=335e3)


def predict(algorithm: str, world_size: int, bytes_sent: int, constants: Constants = CONSTANTS) -> tuple[float, float]:
    """``(predicted, floor)`` of a call that sends ``bytes_sent`` from each rank."""
    c = constants
    if ALGORITHMS[algorithm].alone or world_size == 1:
        return c.finish_us, 0.0
    floor = c.exchange_us + bytes_sent / c.wire_rate
    if ALGORITHMS[algorithm].one_hop:
        return c.exchange_us + c.finish_us + bytes_sent / c.one_shot_rate, floor
    return c.exchange_us + c.finish_us + c.second_hop_us + bytes_sent / c.stream_rate, floor


def fit(results: Mapping[str, Any], before: Constants = CONSTANTS) -> Constants:
    """The constants of what ``collogue bench --json`` wrote. What it does not hold (two-shot, say) stays as it was ``before``.

    Exchange: the median. Wire: the rate measured. The rest: lines through ``us`` over ``bytes_sent`` of the calls with residual and
    norm and without quantization, by least squares of the relative error.
    """
    rows = [row for row in results["cases"] if row["us"] is not None]
    exchange = [row["us"] for row in rows if row["what"] == "one-word exchange"]
    wire = [row["bytes_sent"] / row["us"] for row in results["wire"] if row["us"] is not None]
    found = replace(
        before,
        exchange_us=statistics.median(exchange) if exchange else before.exchange_us,
        wire_rate=statistics.median(wire) if wire else before.wire_rate,
    )
    calls = [row for row in rows if row["what"] == "collogue" and row["residual"] and row["norm"] and row["format"] == "none"]
    one, two = (_points(calls, algorithm) for algorithm in ("one_shot", "two_shot"))
    if len({x for x, _ in one}) > 1:
        us, rate = _line(one)
        found = replace(found, finish_us=us - found.exchange_us, one_shot_rate=rate)
    if len({x for x, _ in two}) > 1:
        us, rate = _line(two)
        found = replace(found, second_hop_us=us - found.exchange_us - found.finish_us, stream_rate=rate)
    return found


def _points(rows: Iterable[Mapping[str, Any]], algorithm: str) -> list[tuple[float, float]]:
    return [(row["bytes_sent"], row["us"]) for row in rows if row["algorithm"] == algorithm]


def _line(points: Sequence[tuple[float, float]]) -> tuple[float, float]:
    """``us = start + bytes / rate`` through points ``(bytes, us)``, each weighted by ``1 / us**2``."""
    total = sum(1 / y**2 for _, y in points)
    x0, y0 = sum(x / y**2 for x, y in points) / total, sum(1 / y for _, y in points) / total
    slope = sum((x - x0) * (y - y0) / y**2 for x, y in points) / sum((x - x0) ** 2 / y**2 for x, y in points)
    return y0 - slope * x0, 1 / slope

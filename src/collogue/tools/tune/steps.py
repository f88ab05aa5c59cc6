"""From measured times to the steps of a table: where one-shot ends, and which CTAs are faster on either side. Pure."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from collogue.planning.table import Candidate, Step, Time

#: A candidate replaces another one of its algorithm only if it takes less than this part of the time.
MARGIN = 0.98

_Times = Mapping[int, Mapping[Candidate, float]]


def choose_steps(times: Sequence[Time]) -> tuple[Step, ...]:
    """The steps of an :class:`collogue.planning.table.Entry`; empty where two-shot has no times.

    One-shot ends where the sum of the logarithms of all times is smallest, so that no single measurement decides; between two
    numbers of tokens, where the line of the differences crosses zero. On either side each call takes the fastest shape, and a
    shape is kept as long as no other takes less than :data:`MARGIN` of its time.
    """
    by_tokens: dict[int, dict[Candidate, float]] = {}
    for time in sorted(times, key=lambda time: time.tokens):
        by_tokens.setdefault(time.tokens, {})[time.candidate] = time.us
    one = {t: us for t in by_tokens if (us := _of(by_tokens, t, "one_shot"))}
    two = {t: us for t in by_tokens if (us := _of(by_tokens, t, "two_shot"))}
    if not two:
        return ()
    both = [t for t in two if t in one]

    def total(ends: int) -> float:
        return sum(math.log(min((one if i < ends else two)[t].values())) for i, t in enumerate(both))

    ends = min(range(len(both), -1, -1), key=total)
    if ends == 0:
        return _walk(two, list(two), None)
    last = both[ends - 1]
    if ends < len(both):
        last = _boundary(last, both[ends], *((min(two[t].values()) - min(one[t].values())) for t in (last, both[ends])))
    beyond = [t for t in two if t > last] or [max(two)]
    return (*_walk(one, both[:ends], last), *_walk(two, beyond, None))


def _of(by_tokens: _Times, tokens: int, algorithm: str) -> dict[Candidate, float]:
    return {candidate: us for candidate, us in by_tokens[tokens].items() if candidate.algorithm == algorithm}


def _walk(times: _Times, tokens: Sequence[int], end: int | None) -> tuple[Step, ...]:
    """Steps over ``tokens``, which ascend; the last one ends at ``end``."""
    steps: list[Step] = []
    # The shape that the plan takes by itself has no threads: it comes first where it is about as fast as any.
    kept = min(times[tokens[0]], key=lambda c: c.cta_threads or 0)
    for before, here in zip([tokens[0], *tokens], tokens, strict=False):
        now = times[here]
        best = min(now, key=lambda c: now[c])
        if kept in now and now[best] >= MARGIN * now[kept]:
            continue
        if here != tokens[0]:
            old, new = times[before], now
            gain = (old[best] - old[kept], new[best] - new[kept]) if best in old and kept in new else (0.0, -1.0)
            steps.append(Step(_boundary(before, here, *gain), kept))
        kept = best
    return (*steps, Step(end, kept))


def _boundary(t0: int, t1: int, gain0: float, gain1: float) -> int:
    """The last number of tokens from ``t0`` to below ``t1`` where a line from ``gain0`` (not negative) to ``gain1`` is not below zero."""
    if gain0 <= 0 or gain1 >= 0:
        return t0
    return min(t1 - 1, t0 + int((t1 - t0) * gain0 / (gain0 - gain1)))

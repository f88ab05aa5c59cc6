"""Nothing is timed whose outputs are wrong, and no time is kept whose timed calls left wrong outputs."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import Protocol, TypeVar

from collogue.group import Group
from collogue.tools.bench.timing import SETS, Latency, Subject, slowest


class Timed(Protocol):
    """What a subject is captured into: something that can make its calls again."""

    def run(self) -> None: ...


T = TypeVar("T", bound=Timed)


def call_each_set(subject: Subject) -> None:
    """One eager call on every input set."""
    for turn in range(SETS):
        subject.call(turn)


def each(group: Group, names: Iterable[str], step: Callable[[str], str | None], errors: dict[str, str]) -> None:
    """Do ``step`` for each name; what it returns or raises, on any rank, is the error of that name on all ranks. Collective."""
    found: dict[str, str] = {}
    for name in names:
        try:
            wrong = step(name)
        except Exception as error:  # an error is a result; the other subjects are still timed
            wrong = f"{type(error).__name__}: {error}".splitlines()[0][:300]
        if wrong is not None:
            found[name] = wrong
    for rank, theirs in enumerate(group.all_gather_object(found)):
        for name, text in theirs.items():
            errors.setdefault(name, f"{text} (rank {rank})")


def time_gated(
    group: Group,
    makers: Mapping[str, Callable[[], Subject]],
    *,
    capture: Callable[[Callable[[int], object]], T],
    measure: Callable[[Mapping[str, T]], Mapping[str, Latency]],
) -> tuple[dict[str, Latency], dict[str, str]]:
    """Make, gate, capture, measure, and gate what the captured calls wrote. Collective.

    Returns the latency on the slowest rank of each subject that passed everywhere, and the errors of the others.
    """
    subjects: dict[str, Subject] = {}
    chains: dict[str, T] = {}
    errors: dict[str, str] = {}

    def gate_first(name: str) -> str | None:
        subjects[name] = makers[name]()
        return subjects[name].gate(partial(call_each_set, subjects[name]))

    def capture_calls(name: str) -> None:
        chains[name] = capture(subjects[name].call)

    def gate_again(name: str) -> str | None:
        return subjects[name].gate(chains[name].run) if subjects[name].repeatable else None

    each(group, makers, gate_first, errors)
    each(group, [name for name in makers if name not in errors], capture_calls, errors)
    good = {name: chain for name, chain in chains.items() if name not in errors}
    everyone = group.all_gather_object(dict(measure(good)))
    each(group, good, gate_again, errors)
    return {name: slowest([rank[name] for rank in everyone]) for name in good if name not in errors}, errors

"""Measured tables: which algorithm, in which launch shape, was faster on a machine. Made by ``collogue tune``, used by the plan.

A table decides where the time goes and never changes a bit. It is used only on the machine that it was made on: same GPU, number
of ranks and dtype; and for calls of a hidden size that it holds (docs/tuning.md).
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, TypeAlias, get_args

import torch

from collogue.cache import cache_directory
from collogue.contract.spec import Operation
from collogue.errors import ArgumentError
from collogue.planning.algorithm import AllReduceBy

#: What a file must say that it is.
FORMAT = "collogue table 1"
#: Names the table that communicators use; empty: none.
VARIABLE = "COLLOGUE_TABLE"

#: A file; ``None``: what :data:`VARIABLE` names, else this machine's own table if there is one; ``False``: none.
TableArgument: TypeAlias = "str | os.PathLike[str] | Literal[False] | None"


@dataclass(frozen=True)
class Candidate:
    """An implementation of ``all_reduce``: the algorithm, and the maximum number of threads of a CTA (``None``: the plan's own)."""

    algorithm: AllReduceBy
    cta_threads: int | None = None

    def __post_init__(self) -> None:
        if self.algorithm not in get_args(AllReduceBy):
            raise ValueError(f"unknown algorithm {self.algorithm!r}")
        if self.cta_threads is not None and (self.cta_threads not in range(32, 1025) or self.cta_threads % 32):
            raise ValueError(f"a CTA cannot have {self.cta_threads} threads")

    def __str__(self) -> str:
        return self.algorithm if self.cta_threads is None else f"{self.algorithm}/{self.cta_threads}"

    @classmethod
    def parse(cls, text: str) -> Candidate:
        """The inverse of ``str``."""
        algorithm, _, threads = text.partition("/")
        return cls(algorithm, int(threads) if threads else None)  # type: ignore[arg-type]


@dataclass(frozen=True)
class Step:
    """The candidate for calls of at most ``up_to`` tokens (``None``: of any number) that are too large for the step before."""

    up_to: int | None
    candidate: Candidate


@dataclass(frozen=True)
class Time:
    """Microseconds of a call with a residual and an RMSNorm, without quantization."""

    tokens: int
    candidate: Candidate
    us: float


@dataclass(frozen=True)
class Entry:
    """What was measured for one hidden size. The last step is two-shot and has no end: it does what one-shot's slots cannot hold."""

    architecture: str
    device: str
    world_size: int
    dtype: str
    hidden_size: int
    steps: tuple[Step, ...]
    times: tuple[Time, ...]

    def __post_init__(self) -> None:
        ends = [step.up_to for step in self.steps]
        kinds = [step.candidate.algorithm for step in self.steps]
        bounded = [end for end in ends[:-1] if end is not None]
        if not ends or ends[-1] is not None or len(bounded) != len(ends) - 1 or bounded != sorted(set(bounded)):
            raise ValueError(f"the steps of hidden size {self.hidden_size} end at {ends}")
        if kinds != sorted(kinds) or kinds[-1] != "two_shot":
            raise ValueError(f"the steps of hidden size {self.hidden_size} are {kinds}")

    @property
    def one_shot_tokens(self) -> int:
        """The crossover: calls of up to so many tokens are one-shot."""
        return max((step.up_to or 0 for step in self.steps if step.candidate.algorithm == "one_shot"), default=0)

    def candidate(self, tokens: int, *, fits: bool) -> Candidate:
        """For a call of ``tokens``; ``fits``: into the slots of one-shot."""
        usable = (step for step in self.steps if fits or step.candidate.algorithm == "two_shot")
        return next(step.candidate for step in usable if step.up_to is None or tokens <= step.up_to)

    def us(self, candidate: Candidate, tokens: int) -> float | None:
        """The measured time of ``candidate``, between two measured numbers of tokens on the line; ``None`` outside."""
        points = sorted((time.tokens, time.us) for time in self.times if time.candidate == candidate)
        for (t0, us0), (t1, us1) in zip(points, points[1:] or points, strict=False):
            if t0 <= tokens <= t1:
                return us0 + (us1 - us0) * (tokens - t0) / max(t1 - t0, 1)
        return None


@dataclass(frozen=True)
class Table:
    """Entries of a file, and the hash of its content. ``unused`` says why none of them is for the machine at hand."""

    digest: str
    entries: tuple[Entry, ...]
    unused: str = ""

    @classmethod
    def read(cls, path: str | os.PathLike[str]) -> Table:
        """The table in the file ``path``. Raises :class:`ArgumentError` where it cannot be read or is not a table."""
        try:
            content = Path(path).read_bytes()
            data = json.loads(content)
            if data["format"] != FORMAT:
                raise ValueError(f"its format is {data['format']!r}, not {FORMAT!r}")
            return cls(hashlib.sha256(content).hexdigest()[:12], tuple(_entry(one) for one in data["entries"]))
        except (OSError, ValueError, TypeError, KeyError) as error:
            message = f"{os.fspath(path)} is not a table: {type(error).__name__}: {error}"
            raise ArgumentError(message, hint=f"make one with `collogue tune`, or unset {VARIABLE}") from error

    def select(self, **facts: Any) -> Table:
        """What there is for ``facts`` (any of architecture, device, world_size, dtype), in that order; else why there is nothing."""
        entries = self.entries
        for name, here in facts.items():
            found = tuple(entry for entry in entries if getattr(entry, name) == here)
            if not found:
                there = ", ".join(sorted({str(getattr(entry, name)) for entry in entries})) or "nothing"
                return replace(self, entries=(), unused=f"made for {name.replace('_', ' ')} {there}, not {here}")
            entries = found
        return replace(self, entries=entries)

    def without(self, reason: str) -> Table:
        """This table, not to be used for ``reason``."""
        return replace(self, entries=(), unused=reason)

    def entry(self, hidden_size: int, operation: Operation = "all_reduce") -> Entry | None:
        """What was measured for such calls."""
        return next((e for e in self.entries if e.hidden_size == hidden_size), None) if operation == "all_reduce" else None

    def about(self, hidden_size: int, operation: Operation = "all_reduce") -> str:
        """Which table this is, and why it is of no use for such calls if it is not."""
        reason = self.unused
        if not reason and operation != "all_reduce":
            reason = "it is of all_reduce"
        elif not reason and self.entry(hidden_size) is None:
            reason = f"it has no hidden size {hidden_size}"
        return f"{self.digest}, not used: {reason}" if reason else self.digest


def _entry(data: dict[str, Any]) -> Entry:
    facts = {name: data[name] for name in ("architecture", "device", "world_size", "dtype", "hidden_size")}
    ends = ((None if step["up_to"] is None else int(step["up_to"]), step["candidate"]) for step in data["steps"])
    steps = tuple(Step(end, Candidate.parse(candidate)) for end, candidate in ends)
    rows = (row for row in data["times"] if row["us"] is not None)
    times = tuple(Time(int(row["tokens"]), Candidate.parse(row["candidate"]), float(row["us"])) for row in rows)
    return Entry(**facts, steps=steps, times=times)


def name_of(dtype: torch.dtype) -> str:
    """As tables and command lines write it."""
    return str(dtype).removeprefix("torch.")


def own_path(device: str, world_size: int) -> Path:
    """Where ``collogue tune`` writes by default: beside the compiled kernels, a file for each kind of machine."""
    return cache_directory() / f"table-{world_size}x{re.sub('[^a-z0-9]', '', device.lower().replace('nvidia', ''))}.json"


def find(argument: TableArgument, *, device: str | None, world_size: int) -> Table | None:
    """The table that ``argument`` asks for. ``device``: the GPU's name, ``None`` on CPU groups, which have no table of their own.

    Raises :class:`ArgumentError` for what names no file, and for a table that was named and cannot be read; the machine's own is then
    passed over.
    """
    if argument is False:
        return None
    if argument is not None and not isinstance(argument, str | os.PathLike):
        raise ArgumentError(f"table is {argument!r}", hint="give a file, False for no table, or nothing")
    named = os.environ.get(VARIABLE) if argument is None else argument
    if named is not None:
        return Table.read(named) if os.fspath(named) else None
    if device is None or not own_path(device, world_size).is_file():
        return None
    try:
        return Table.read(own_path(device, world_size))
    except ArgumentError as error:
        return Table("unreadable", (), error.message)


def check_alike(digests: Iterable[str]) -> None:
    """Raise :class:`ArgumentError` unless every rank has the same table. ``digests`` by rank."""
    for rank, digest in enumerate(digests := list(digests)):
        if digest != digests[0]:
            raise ArgumentError(
                f"rank 0 has table {digests[0]}, rank {rank} has table {digest}",
                hint=f"give every rank the same file (table=, {VARIABLE}), or table=False for none",
            )

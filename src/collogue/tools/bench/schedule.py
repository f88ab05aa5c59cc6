"""What a serving loop does, step by step: a pure function of the workload, so that all ranks and all ways do the same."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import pairwise

from collogue.errors import ArgumentError

#: Rows of a decode step's CUDA graph: the smallest that is not below the number of sequences; the limit of sequences is one, too.
SIZES = (1, 2, 4, 8, 16, 32, 48)


@dataclass(frozen=True)
class Workload:
    """``prompts`` of ``prompt_tokens`` each, for which ``new_tokens`` are made, the first of them by the prefill.

    ``concurrency``: sequences at a time. ``prefill_tokens``: maximum number of tokens of one prefill, which takes whole prompts.
    Raises :class:`ArgumentError` for a prompt that no prefill can take, or a number below 1.
    """

    prompts: int = 1000
    prompt_tokens: int = 1000
    new_tokens: int = 1000
    concurrency: int = 60
    prefill_tokens: int = 8192

    def __post_init__(self) -> None:
        if min(self.prompts, self.prompt_tokens, self.new_tokens, self.concurrency) < 1:
            raise ArgumentError("a serving workload without prompts, tokens or sequences", hint="every number must be 1 or more")
        if self.prefill_tokens < self.prompt_tokens:
            raise ArgumentError(
                f"a prompt of {self.prompt_tokens} tokens does not fit into a prefill of {self.prefill_tokens}",
                hint="prefills take whole prompts: raise --prefill-tokens",
            )

    @property
    def length(self) -> int:
        """Tokens of a sequence that the cache holds: all but the last one made."""
        return self.prompt_tokens + self.new_tokens - 1

    @property
    def admitted(self) -> int:
        """Most prompts of one prefill."""
        return min(self.prompts, self.concurrency, self.prefill_tokens // self.prompt_tokens)

    def chunks(self, count: int) -> list[Workload]:
        """The prompts in ``count`` parts, as even as can be."""
        bounds = [self.prompts * i // count for i in range(count + 1)]
        return [replace(self, prompts=b - a) for a, b in pairwise(bounds) if b > a]


@dataclass(frozen=True)
class Step:
    """One pass over the layers.

    A prefill takes the prompts ``sequences`` into the rows from ``first`` on. A decode step makes a token of every running sequence;
    row i holds ``sequences[i]``, whose newest token stands at ``positions[i]``. Before either, the cache row ``a`` moves to ``b`` for
    every ``(a, b)`` in ``moves``: rows of running sequences are always the first ones.
    """

    prefill: bool
    sequences: tuple[int, ...]
    positions: tuple[int, ...] = ()
    first: int = 0
    moves: tuple[tuple[int, int], ...] = ()


def rows(sequences: int, concurrency: int) -> int:
    """Rows of the graph that decodes so many sequences."""
    return min(size for size in (*SIZES, concurrency) if sequences <= size <= concurrency)


def schedule(work: Workload) -> Iterator[Step]:
    """In turn: a prefill of waiting prompts, where rows are free, and a decode step. A sequence leaves when it has its tokens."""
    running: list[tuple[int, int]] = []  # by row: sequence, tokens made
    moves: tuple[tuple[int, int], ...] = ()
    waiting = 0  # the next prompt
    while waiting < work.prompts or running:
        count = min(work.prompts - waiting, work.concurrency - len(running), work.admitted)
        if count:
            new = range(waiting, waiting + count)
            yield Step(True, tuple(new), first=len(running), moves=moves)
            running += [(sequence, 1) for sequence in new]
            waiting += count
            running, moves = _leave(running, work.new_tokens)
        if running:
            positions = tuple(work.prompt_tokens + made - 1 for _, made in running)
            yield Step(False, tuple(sequence for sequence, _ in running), positions, moves=moves)
            running, moves = _leave([(sequence, made + 1) for sequence, made in running], work.new_tokens)


def _leave(running: list[tuple[int, int]], new_tokens: int) -> tuple[list[tuple[int, int]], tuple[tuple[int, int], ...]]:
    """Without the sequences that are done; the last rows move into the holes."""
    left = sum(made < new_tokens for _, made in running)
    holes = [row for row, (_, made) in enumerate(running[:left]) if made >= new_tokens]
    last = [row for row, (_, made) in enumerate(running) if row >= left and made < new_tokens]
    moves = tuple(zip(last, holes, strict=True))
    stay = running[:left]
    for source, hole in moves:
        stay[hole] = running[source]
    return stay, moves


def decode_rows(works: list[Workload]) -> list[int]:
    """Sizes of the graphs that ``works`` need, the largest first."""
    steps = (step for work in dict.fromkeys(works) for step in schedule(work))
    return sorted({rows(len(step.sequences), works[0].concurrency) for step in steps if not step.prefill}, reverse=True)


def prefill_counts(works: list[Workload]) -> list[int]:
    """Numbers of prompts of a prefill in ``works``, the largest first."""
    steps = (step for work in dict.fromkeys(works) for step in schedule(work))
    return sorted({len(step.sequences) for step in steps if step.prefill}, reverse=True)

"""What ``collogue tune`` measures: for every number of tokens the candidates that differ, one-shot only where it fits."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import product

from collogue.planning.explain import Machine, dtype_named
from collogue.planning.plan import MAX_THREADS, make_plan, one_shot_tokens
from collogue.planning.table import Candidate
from collogue.planning.topology import Overrides, Topology
from collogue.tools.check.case import Case
from collogue.tools.check.kernels import request_of

HIDDEN_SIZES = (4096, 5120, 7168, 8192)
#: Each algorithm in the shape that the plan takes by itself, then with other CTAs.
CANDIDATES = (
    Candidate("one_shot"),
    Candidate("one_shot", 256),
    Candidate("two_shot"),
    Candidate("two_shot", 256),
    Candidate("two_shot", 1024),
)
#: Ranks beyond which a CTA of more than half of :data:`.plan.MAX_THREADS` has too few registers for a vector of every rank.
MOST_RANKS_OF_WIDE_CTAS = 4
#: Where the default numbers of tokens lie, as parts of the crossover that the model expects.
AROUND = (1 / 8, 1 / 4, 1 / 2, 0.7, 1.0, 1.4, 2.0, 4.0)
#: Numbers of tokens far beyond every crossover: which CTAs large calls take.
LARGE_TOKENS = (2048, 8192)


@dataclass(frozen=True)
class Trial:
    """Candidates for one call with a residual and an RMSNorm, measured in turn."""

    case: Case
    candidates: tuple[Candidate, ...]

    def __str__(self) -> str:
        return f"H={self.case.hidden_size} {self.case.dtype} T={self.case.tokens}"


def trials(
    machine: Machine,
    world_size: int,
    *,
    hidden_size: Sequence[int] | None = None,
    dtype: Sequence[str] | None = None,
    tokens: Sequence[int] | None = None,
) -> list[Trial]:
    """The product of the lists. Tokens that are not given lie around the crossover that the model expects."""
    found = []
    for name, width in product(dict.fromkeys(dtype or ("bfloat16",)), sorted(set(hidden_size or HIDDEN_SIZES))):
        most = max(tokens or LARGE_TOKENS)
        topology = machine.topology(world_size, most, width, dtype_named(name), table=False)
        for t in sorted(set(tokens or default_tokens(topology))):
            case = Case(t, width, name, world_size=world_size, keep_norm=False)
            found.append(Trial(case, candidates(topology, case)))
    return found


def default_tokens(topology: Topology) -> set[int]:
    """One token, the neighborhood of the expected crossover, the most that one-shot takes, and large calls."""
    width = topology.hidden_size
    crossover = max(1, one_shot_tokens(topology, width))
    most = one_shot_tokens(replace(topology, overrides=Overrides("one_shot")), width)
    near = {max(1, round(crossover * part)) for part in AROUND}
    return {1, most, *(t for t in near if t < 0.9 * most), *LARGE_TOKENS}


def candidates(topology: Topology, case: Case) -> tuple[Candidate, ...]:
    """Those of :data:`CANDIDATES` that this call can take, each shape of an algorithm once."""
    found: dict[tuple[str, int, int], Candidate] = {}
    for candidate in CANDIDATES:
        if (candidate.cta_threads or 0) > MAX_THREADS // 2 and topology.world_size > MOST_RANKS_OF_WIDE_CTAS:
            continue
        overrides = Overrides(candidate.algorithm, None, candidate.cta_threads)
        plan = make_plan(replace(topology, overrides=overrides), request_of(case))
        if plan.algorithm == candidate.algorithm and plan.shape is not None:
            found.setdefault((plan.algorithm, plan.shape.threads, plan.shape.cluster), candidate)
    return tuple(found.values())

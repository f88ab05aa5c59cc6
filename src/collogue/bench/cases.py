"""What ``collogue bench`` times: rounds of calls of one shape, timed in turn."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product

from collogue.check.case import Case
from collogue.check.sweep import DTYPES
from collogue.errors import FormatError
from collogue.spec import describe, parse

TOKENS = (1, 2, 4, 8, 16, 32, 64, 128)
LARGE_TOKENS = (256, 512, 1024, 2048, 4096)
HIDDEN_SIZE = 7168
OTHER_HIDDEN_SIZES = (2048, 2880, 4096, 5120, 8192, 12800, 16384)
FORMATS = ("none", "nvfp4", "fp8_static", "fp8_per_token", "fp8_group128", "mxfp8/ceil", "mxfp4/ceil")
#: Formats also timed with the norm kept beside the codes.
KEPT = ("nvfp4", "fp8_static", "fp8_group128")
#: Formats timed where the shape is the question.
FEW = ("none", "nvfp4", "fp8_static")

NCCL, ONE_SHOT, TWO_SHOT = "nccl all_reduce", "symm_mem one_shot_all_reduce", "symm_mem two_shot_all_reduce"
BASELINES = (NCCL, ONE_SHOT, TWO_SHOT)


@dataclass(frozen=True)
class Round:
    """Calls of one shape on one world. Floors and ``baselines`` are timed in turn with them."""

    section: str
    cases: tuple[Case, ...]
    baselines: tuple[str, ...] = BASELINES
    replays: int = 21

    @property
    def shape(self) -> Case:
        """Tokens, hidden size, dtype and world size are those of every case."""
        return self.cases[0]

    def __str__(self) -> str:
        c = self.shape
        return f"{self.section}: world {c.world_size} T={c.tokens} H={c.hidden_size} {c.dtype}"


def _case(world_size: int, tokens: int, hidden_size: int, format: str, *, dtype: str = "bfloat16", keep_norm: bool = False) -> Case:
    return Case(tokens, hidden_size, dtype, describe(parse(format)), world_size, keep_norm=keep_norm)


def _sum(world_size: int, tokens: int, hidden_size: int) -> Case:
    return Case(tokens, hidden_size, world_size=world_size, residual=False, norm=False, keep_norm=False)


def default_rounds(world_size: int) -> list[Round]:
    """Decode sizes in every format, other hidden sizes, and large calls, which go beyond one-shot."""
    rounds = []
    for t in TOKENS:
        cases = [_case(world_size, t, HIDDEN_SIZE, f) for f in FORMATS]
        cases += [_case(world_size, t, HIDDEN_SIZE, f, keep_norm=True) for f in KEPT]
        rounds.append(Round("decode", (*cases, _sum(world_size, t, HIDDEN_SIZE))))
    for h, t in product(OTHER_HIDDEN_SIZES, (1, 8, 32)):
        rounds.append(Round("hidden size", tuple(_case(world_size, t, h, f) for f in FEW), (NCCL,)))
    for t in LARGE_TOKENS:
        cases = [_case(world_size, t, HIDDEN_SIZE, f) for f in FEW]
        rounds.append(Round("large", (*cases, _sum(world_size, t, HIDDEN_SIZE)), replays=9))
    return rounds


def chosen_rounds(
    world_size: int,
    *,
    tokens: Sequence[int] | None = None,
    hidden_size: Sequence[int] | None = None,
    dtype: Sequence[str] | None = None,
    format: Sequence[str] | None = None,
) -> list[Round]:
    """The product of the lists; a list not given is that of the decode sizes."""
    for name in dtype or ():
        if name not in DTYPES:
            raise FormatError(f"there is no dtype {name!r} here", hint=f"choose from {', '.join(DTYPES)}")
    rounds = []
    for d, h, t in product(dtype or ("bfloat16",), hidden_size or (HIDDEN_SIZE,), tokens or TOKENS):
        cases = [_case(world_size, t, h, f, dtype=d) for f in format or FORMATS]
        rounds.append(Round("chosen", tuple(dict.fromkeys(cases)), replays=21 if t <= 128 else 9))
    return rounds

"""What ``collogue bench`` times: rounds of calls of one shape, timed in turn."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import product
from typing import Literal

from collogue.contract.quant import describe, parse
from collogue.errors import FormatError
from collogue.planning.topology import Overrides
from collogue.tools.bench import epilogue
from collogue.tools.check.case import Case
from collogue.tools.check.sweep import DTYPES

TOKENS = (1, 2, 4, 8, 16, 32, 64, 128)
LARGE_TOKENS = (192, 256, 384, 512, 1024, 2048, 4096, 8192, 16384)
HIDDEN_SIZE = 7168
LARGE_HIDDEN_SIZES = (4096, 8192, 16384)
OTHER_HIDDEN_SIZES = (2048, 2880, 4096, 5120, 8192, 12800, 16384)
FORMATS = ("none", "nvfp4", "fp8_static", "fp8_per_token", "fp8_group128", "mxfp8/ceil", "mxfp4/ceil")
#: Formats also timed with the norm kept beside the codes.
KEPT = ("nvfp4", "fp8_static", "fp8_group128")
#: Formats timed where the shape is the question.
FEW = ("none", "nvfp4", "fp8_static")

#: Layouts and options beyond the defaults of :data:`FORMATS`.
OTHER_LAYOUTS = ("nvfp4/linear", "nvfp4/8x4", "fp8_group128/float32/column", "fp8_group128/ue8m0/column")

NCCL, ONE_SHOT, TWO_SHOT = "nccl all_reduce", "symm_mem one_shot_all_reduce", "symm_mem two_shot_all_reduce"
VLLM = "vllm custom all_reduce"
#: FlashInfer's one-shot, the same that launches its dependents early, and its two-shot: alone, or one kernel for the whole call.
FLASHINFER, FLASHINFER_EARLY, FLASHINFER_TWO_SHOT = "flashinfer one-shot", "flashinfer one-shot, early", "flashinfer two-shot"
FLASHINFER_WAYS = (FLASHINFER, FLASHINFER_EARLY, FLASHINFER_TWO_SHOT)
#: All-reduce alone: no residual, no norm, no format.
BASELINES = (NCCL, ONE_SHOT, TWO_SHOT)
#: What can be named of other libraries, and their all-reduces.
LIBRARIES = {"nccl": (NCCL,), "symm_mem": (ONE_SHOT, TWO_SHOT), "vllm": (VLLM,), "flashinfer": FLASHINFER_WAYS}
#: Behind the name of an all-reduce: and then residual, norm and format in a kernel that torch.compile made.
COMPILED = " + compiled epilogue"
#: What other libraries do for the whole call; each is timed for the cases that it has.
DECODE_CHAINS = (NCCL + COMPILED, ONE_SHOT + COMPILED, VLLM + COMPILED, *FLASHINFER_WAYS)
LARGE_CHAINS = (NCCL + COMPILED, TWO_SHOT + COMPILED, *FLASHINFER_WAYS)
#: Tokens at which the chains are timed: every shape is compiled for itself, which takes seconds.
CHAIN_TOKENS = (1, 8, 64, 512, 4096)
SUITES = ("latency", "bandwidth", "epilogues", "hidden", "world", "eager", "sms")
#: Names of suites until 0.2.
_FORMER = {"multiprocessors": "sms"}
#: How many SMs the calls of the suite of that name may use.
LIMITS = (8, 16, 32, 64, None)
#: The suites of a run that names none: what README and docs/speed.md show.
DEFAULT_SUITES = ("latency", "hidden", "bandwidth")

#: What a communicator fixes of its plans that was not asked to.
_NONE = Overrides()


@dataclass(frozen=True)
class Round:
    """Calls of one shape on one world. Floors, ``baselines`` and, for the cases that have one, ``chains`` are timed in turn with them.

    ``timing``: ``"graph"``, the difference of two graph lengths; ``"eager"``, calls from Python, host included. ``overrides``: what the
    communicator fixes of its plans.
    """

    section: str
    cases: tuple[Case, ...]
    baselines: tuple[str, ...] = BASELINES
    replays: int = 21
    chains: tuple[str, ...] = ()
    timing: Literal["graph", "eager"] = "graph"
    overrides: Overrides = _NONE

    @property
    def shape(self) -> Case:
        """Tokens, hidden size, dtype and world size are those of every case."""
        return self.cases[0]

    def __str__(self) -> str:
        c = self.shape
        return f"{self.section}: world {c.world_size} T={c.tokens} H={c.hidden_size} {c.dtype}{self.overrides}"


def _case(world_size: int, tokens: int, hidden_size: int, format: str, *, dtype: str = "bfloat16", keep_norm: bool = False) -> Case:
    return Case(tokens, hidden_size, dtype, describe(parse(format)), world_size, keep_norm=keep_norm)


def _sum(world_size: int, tokens: int, hidden_size: int) -> Case:
    return Case(tokens, hidden_size, world_size=world_size, residual=False, norm=False, keep_norm=False)


def _sharded(world_size: int, tokens: int, hidden_size: int, format: str) -> Case:
    return replace(_case(world_size, tokens, hidden_size, format), operation="sharded")


def has_chain(case: Case) -> bool:
    """Whether the chains can do what ``case`` does."""
    plain = case.operation == "all_reduce" and case.residual and case.norm and case.weight_dtype is None and not case.weight_offset
    return plain and not (case.keep_norm and case.format != "none") and case.format in epilogue.FORMATS


def with_libraries(round: Round, names: Sequence[str]) -> Round:
    """``round`` beside the libraries ``names`` of :data:`LIBRARIES`: their sums alone, and the whole call, by a
    compiled epilogue only where the round has such."""
    sums = tuple(way for name in names for way in LIBRARIES[name])
    fused = tuple(way for way in sums if way in FLASHINFER_WAYS)
    compiled = tuple(way + COMPILED for way in sums if way not in fused) if round.chains else ()
    return replace(round, baselines=sums, chains=(*compiled, *fused))


def without_compiled(round: Round) -> Round:
    """``round`` without the chains that ``torch.compile`` makes."""
    return replace(round, chains=tuple(name for name in round.chains if not name.endswith(COMPILED)))


def suite(name: str, world_size: int) -> list[Round]:
    """The rounds of a suite of :data:`SUITES` on one world. Raises :class:`FormatError` for another name."""
    name = _FORMER.get(name, name)
    if name not in SUITES:
        raise FormatError(f"unknown suite {name!r}", hint=f"choose from {', '.join(SUITES)}")
    makers = {
        "latency": _latency,
        "bandwidth": _bandwidth,
        "epilogues": _epilogues,
        "hidden": _hidden,
        "world": _world,
        "eager": _eager,
        "sms": _few_sms,
    }
    return makers[name](world_size)


def default_rounds(world_size: int) -> list[Round]:
    """Decode sizes in every format, other hidden sizes, and large calls, which go beyond one-shot."""
    return [round for name in DEFAULT_SUITES for round in suite(name, world_size)]


def _latency(world_size: int) -> list[Round]:
    rounds = []
    for t in TOKENS:
        cases = [_case(world_size, t, HIDDEN_SIZE, f) for f in FORMATS]
        cases += [_case(world_size, t, HIDDEN_SIZE, f, keep_norm=True) for f in KEPT]
        chains = DECODE_CHAINS if t in CHAIN_TOKENS else ()
        rounds.append(Round("decode", (*cases, _sum(world_size, t, HIDDEN_SIZE)), chains=chains))
    return rounds


def _bandwidth(world_size: int) -> list[Round]:
    rounds = []
    for t in LARGE_TOKENS:
        cases = [_case(world_size, t, HIDDEN_SIZE, f) for f in FEW]
        cases += [_sharded(world_size, t, HIDDEN_SIZE, f) for f in ("nvfp4", "fp8_per_token", "none")]
        chains = LARGE_CHAINS if t in CHAIN_TOKENS else ()
        rounds.append(Round("large", (*cases, _sum(world_size, t, HIDDEN_SIZE)), replays=9 if t <= 4096 else 5, chains=chains))
    for h, t in product(LARGE_HIDDEN_SIZES, (512, 2048, 8192)):
        cases = [*(_case(world_size, t, h, f) for f in FEW), _sharded(world_size, t, h, "nvfp4")]
        rounds.append(Round("large, other hidden sizes", tuple(cases), (NCCL,), replays=5))
    return rounds


def _epilogues(world_size: int) -> list[Round]:
    """What each part of the epilogue costs: formats and their scale layouts, with and without residual, norm, kept norm, float32 weight."""
    rounds = []
    for t in (1, 16, 128):
        base = _case(world_size, t, HIDDEN_SIZE, "none")
        cases = [_case(world_size, t, HIDDEN_SIZE, f, keep_norm=kept) for f in (*FORMATS, *OTHER_LAYOUTS) for kept in (False, f != "none")]
        cases += [replace(base, residual=False), replace(base, norm=False), replace(base, weight_dtype="float32")]
        cases += [replace(c, norm=False, keep_norm=False) for c in cases if c.format in ("fp8_static", "nvfp4/128x4") and not c.keep_norm]
        rounds.append(Round("epilogues", tuple(dict.fromkeys((*cases, _sum(world_size, t, HIDDEN_SIZE)))), ()))
    return rounds


def _hidden(world_size: int) -> list[Round]:
    shapes = product(OTHER_HIDDEN_SIZES, (1, 8, 32))
    return [Round("hidden size", tuple(_case(world_size, t, h, f) for f in FEW), (NCCL,)) for h, t in shapes]


def _world(world_size: int) -> list[Round]:
    """The same calls on every world size; the run repeats it for each."""
    return [Round("world", tuple(_case(world_size, t, HIDDEN_SIZE, f) for f in FEW), (NCCL,)) for t in (1, 8, 64, 512)]


def _eager(world_size: int) -> list[Round]:
    """Calls from Python, one after the other, without a graph."""
    return [
        Round("eager", tuple(_case(world_size, t, HIDDEN_SIZE, f) for f in FEW), (NCCL,), 9, (NCCL + COMPILED, *FLASHINFER_WAYS), "eager")
        for t in (1, 8, 64, 512)
    ]


def _few_sms(world_size: int) -> list[Round]:
    """Large calls that leave SMs to others. A section for each limit: floors belong to their own round."""
    rounds = []
    for t, limit in product((256, 2048, 8192), LIMITS):
        cases = (_case(world_size, t, HIDDEN_SIZE, "none"), *(_sharded(world_size, t, HIDDEN_SIZE, f) for f in ("nvfp4", "fp8_per_token")))
        overrides = Overrides(max_sms=limit)
        rounds.append(Round(f"SMs, {limit or 'all'}", cases, (NCCL,), replays=9 if t <= 2048 else 5, overrides=overrides))
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
            raise FormatError(f"unknown dtype {name!r}", hint=f"choose from {', '.join(DTYPES)}")
    rounds = []
    for d, h, t in product(dtype or ("bfloat16",), hidden_size or (HIDDEN_SIZE,), tokens or TOKENS):
        cases = [_case(world_size, t, h, f, dtype=d) for f in format or FORMATS]
        rounds.append(Round("chosen", tuple(dict.fromkeys(cases)), replays=21 if t <= 128 else 9))
    return rounds

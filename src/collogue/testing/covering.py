"""A small set of kernels that meets every pair of choices: a pairwise covering array over what plans make.

Compiling every kernel would take hours. Faults of a compiler or of a template nearly always need two choices together (a
format and an architecture, a world size and a dtype), so each such pair is compiled at least once.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterator, Mapping
from dataclasses import asdict, replace
from typing import Any, TypeAlias

import torch

from collogue.calls.request import Request
from collogue.contract.prologue import PrologueForm
from collogue.contract.quant import FAMILIES, parse, variants
from collogue.contract.spec import VALUE_DTYPES, Operation, Wanted
from collogue.planning.architecture import ARCHITECTURES, COVERED
from collogue.planning.plan import launch_shape, make_variant
from collogue.planning.topology import Topology
from collogue.planning.variant import QuantVariant, Variant

#: One kernel as its choice of every factor, by the factor's name.
Choice: TypeAlias = Mapping[str, Any]
Pair: TypeAlias = tuple[tuple[str, Any], tuple[str, Any]]


def _labels() -> Iterator[str]:
    layouts = ("128x4", "8x4", "linear")
    every = [label for family in FAMILIES for label in variants(family)]
    yield "none"
    for layout in layouts:
        yield from (label for label in every if label.endswith(f"/{layout}"))
    yield from (label for label in every if not label.endswith(layouts))
    # The usual size, and one that a warp does not hold whole.
    yield from (label.replace("128", "48") for label in variants("fp8_group"))
    yield from ("fp8_group16/float32/row", "fp8_group32/ue8m0/column", "fp8_group64/float32/row", "fp8_group256/ue8m0/column")


#: The formats by label; ``None`` quantizes nothing.
FORMATS = {label: parse(label) for label in _labels()}

#: What stands in the place of a partial, by label.
PROLOGUES = {
    "none": None,
    "combine/float32/shared": PrologueForm("expert_combine", "float32", shared=True),
    "combine/value": PrologueForm("expert_combine", "value"),
    "combine/unweighted/shared": PrologueForm("expert_combine", "none", shared=True),
    "reduce/float32": PrologueForm("expert_reduce", "float32", shared=True),
    "reduce/value": PrologueForm("expert_reduce", "value", shared=True),
    "gated": PrologueForm("gated", "none"),
}

#: The factors and their levels. Hidden sizes stand for classes: below a block, one CTA, several, the largest cluster.
FACTORS: dict[str, tuple[Any, ...]] = {
    "format": tuple(FORMATS),
    "world": tuple(range(1, 9)),
    "hidden_size": (24, 576, 2880, 7168, 12800, 16384),
    "architecture": COVERED,
    "dtype": VALUE_DTYPES,
    "kernel": ("one_shot", "two_shot", "sharded", "reduce_scatter", "all_gather", "local"),
    "norm": (True, False),
    "keep_norm": (False, True),
    "wide_weight": (False, True),
    "residual": (True, False),
    "prologue": tuple(PROLOGUES),
    "branch": ("none", "value", "float32"),
    "rows": ("equal", "uneven"),
    # One row a cluster, and many.
    "tokens": (1, 4096),
}


_OPERATIONS: dict[str, Operation] = {
    "one_shot": "all_reduce",
    "two_shot": "all_reduce",
    "sharded": "sharded",
    "reduce_scatter": "reduce_scatter",
    "all_gather": "all_gather",
    "local": "all_reduce",
}


def possible(choice: Choice) -> bool:
    """Whether a plan may make such a kernel. Factors may be missing: then, whether nothing that is there forbids it."""
    quant = FORMATS[choice.get("format", "none")]
    if quant is not None and quant.block and choice.get("hidden_size", 0) % quant.block:
        return False
    if not choice.get("norm", True) and (choice.get("keep_norm", False) or choice.get("wide_weight", False)):
        return False
    if choice.get("wide_weight", False) and choice.get("dtype") is torch.float32:
        return False
    branch = choice.get("branch", "none")
    if branch != "none" and not choice.get("residual", True):
        return False
    if branch == "float32" and choice.get("dtype") is torch.float32:
        return False
    kernel = choice.get("kernel")
    if choice.get("rows") == "uneven" and (choice.get("world") == 1 or kernel in ("one_shot", "two_shot", "local")):
        return False
    if kernel is None:
        return True
    if (kernel == "local") != (choice.get("world", 1 if kernel == "local" else 2) == 1):
        return False
    if kernel == "sharded":
        return choice.get("norm", True) or quant is not None or "format" not in choice
    # Moves what is finished: nothing is added or normalized.
    adds = choice.get("residual", False) or choice.get("norm", False) or choice.get("prologue", "none") != "none"
    adds = adds or branch != "none"
    return kernel != "all_gather" or not adds


def variant_of(choice: Choice) -> Variant:
    """The kernel that a plan makes for ``choice``."""
    tokens, hidden_size, dtype, quant = choice["tokens"], choice["hidden_size"], choice["dtype"], FORMATS[choice["format"]]
    residual, norm = choice["residual"], choice["norm"]
    wanted = Wanted.of(has_residual=residual, has_norm=norm, quant=quant, keep_norm=choice["keep_norm"])
    request = Request(tokens, hidden_size, dtype, residual, norm, choice["wide_weight"], quant, wanted)
    topology = Topology(choice["world"], tokens, hidden_size, dtype, choice["architecture"], multiprocessors=132, ranks_per_gpu=1)
    algorithm = "sharded" if choice["kernel"] == "reduce_scatter" else choice["kernel"]
    if algorithm == "all_gather":
        request = replace(request, wanted=replace(wanted, norm=quant is None, residual=False, reduced=False))
    prologue = PROLOGUES[choice.get("prologue", "none")]
    if prologue is not None and prologue.weights == "float32" and dtype is torch.float32:
        prologue = replace(prologue, weights="value")
    request = replace(request, operation=_OPERATIONS[choice["kernel"]], prologue=prologue)
    branch = choice.get("branch", "none")
    split = (tokens, *[0] * (choice["world"] - 1)) if choice.get("rows") == "uneven" else None
    request = replace(request, rows=split, branch=branch != "none", wide_branch=branch == "float32")
    shape = launch_shape(
        topology, tokens, hidden_size, quant, algorithm, experts=request.adds_rows, branch=branch != "none", alone=request.sums_alone
    )
    return make_variant(topology, request, shape, algorithm)


def pairs_of(choice: Choice) -> set[Pair]:
    """Every pair of levels in a complete choice."""
    return set(itertools.combinations(((name, choice[name]) for name in FACTORS), 2))


def all_pairs() -> list[Pair]:
    """Every pair of levels of two factors, possible or not."""
    levels = ([(name, level) for level in choices] for name, choices in FACTORS.items())
    return [pair for a, b in itertools.combinations(levels, 2) for pair in itertools.product(a, b)]


def covering_set(seed: int = 0) -> tuple[list[Choice], set[Pair]]:
    """Choices that together hold every possible pair of levels, and the pairs that no kernel has. The same for a seed."""
    rng = random.Random(seed)
    open_pairs = dict.fromkeys(all_pairs())
    chosen: list[Choice] = []
    impossible: set[Pair] = set()
    while open_pairs:
        pair = next(iter(open_pairs))
        choice = _complete(dict(pair), open_pairs, rng)
        if choice is None:
            impossible.add(pair)
            del open_pairs[pair]
            continue
        chosen.append(choice)
        for covered in pairs_of(choice):
            open_pairs.pop(covered, None)
    return chosen, impossible


def dozen(architecture: str) -> list[Choice]:
    """A dozen kernels of the covering set, taken at random, for an architecture that it does not have.

    Those of the widest rows are left out: without clusters a thread holds many vectors, which takes seconds to compile.
    """
    chosen = [choice for choice in covering_set()[0] if choice["hidden_size"] <= 7168]
    return [{**choice, "architecture": architecture} for choice in random.Random(0).sample(chosen, 12)]


def everything() -> list[Choice]:
    """The covering set of every architecture."""
    return [{**choice, "architecture": name} for name in ARCHITECTURES for choice in covering_set()[0]]


def _complete(choice: dict[str, Any], open_pairs: Mapping[Pair, None], rng: random.Random) -> Choice | None:
    """Extend ``choice`` factor by factor by the level that closes most open pairs; step back where nothing is possible."""
    if not possible(choice):
        return None
    name = next((name for name in FACTORS if name not in choice), None)
    if name is None:
        return choice
    # Pairs name their factors in the order of FACTORS.
    before = list(FACTORS).index(name)
    others = [(other, choice[other], index < before) for index, other in enumerate(FACTORS) if other in choice]

    def closes(level: Any) -> int:
        new = (name, level)
        return sum((((other, value), new) if first else (new, (other, value))) in open_pairs for other, value, first in others)

    levels = list(FACTORS[name])
    rng.shuffle(levels)
    for level in sorted(levels, key=closes, reverse=True):
        complete = _complete({**choice, name: level}, open_pairs, rng)
        if complete is not None:
            return complete
    return None


def registers_allowed(variant: Variant) -> int:
    """Registers a thread that the launch bounds of ``variant`` leave it: of 65,536 on an SM, for four warps at a time, in
    steps of 8."""
    return min(255, 65536 // (-(-variant.threads * variant.ctas_per_multiprocessor // 128) * 128) // 8 * 8)


def to_json(variant: Variant) -> dict[str, Any]:
    """A variant as JSON holds it. :func:`from_json` is the inverse."""
    return {name: str(value).removeprefix("torch.") if isinstance(value, torch.dtype) else value for name, value in asdict(variant).items()}


def from_json(row: Mapping[str, Any]) -> Variant:
    """The variant that :func:`to_json` was given."""
    fields = {name: getattr(torch, value) if name.endswith("dtype") else value for name, value in row.items()}
    return Variant(**{**fields, "quant": QuantVariant(**row["quant"])})

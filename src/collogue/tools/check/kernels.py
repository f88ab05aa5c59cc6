"""The kernels that cases need, computed without ranks, so that they can be compiled together before any case runs."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Sequence

import torch

from collogue.calls.request import Request, make_request
from collogue.gpu import jit
from collogue.planning.architecture import architecture_of
from collogue.planning.plan import make_kernels, make_plan
from collogue.planning.topology import Overrides, Topology
from collogue.planning.variant import Variant
from collogue.tools.check.case import Case

#: What a communicator fixes of its plans that was not asked to.
_NONE = Overrides()


def capacity_of(cases: Iterable[Case]) -> tuple[int, int]:
    """``(max_tokens, hidden_size)`` of a communicator that holds ``cases``."""
    cases = list(cases)
    return max(1, *(c.tokens for c in cases)), max(c.hidden_size for c in cases)


def topology_on(
    cases: Sequence[Case], *, architecture: str | None, multiprocessors: int, gpus: int, overrides: Overrides = _NONE
) -> Topology:
    """What the ranks of ``cases`` (of one world size and dtype) will agree on, on a machine with ``gpus`` such GPUs."""
    world, dtype = cases[0].world_size, cases[0].value_dtype
    tokens, width = capacity_of(cases)
    return Topology(world, tokens, width, dtype, architecture, multiprocessors, -(-world // gpus), overrides)


def request_of(case: Case) -> Request:
    """What the communicator will plan for ``case``."""
    return make_request(
        case.tokens,
        case.hidden_size,
        case.value_dtype,
        wide_weight=case.norm and case.weight_dtype not in (None, case.dtype),
        quant=case.quant("cpu"),
        wide_branch=case.branch and case.weight_dtype not in (None, case.dtype),
        **{name: value for name, value in case.asked.items() if name != "branch_norm"},
        branch=case.branch,
    )


def variants_on(
    cases: Iterable[Case], *, architecture: str, multiprocessors: int, gpus: int, overrides: Overrides = _NONE
) -> list[Variant]:
    """Every kernel that ``cases`` launch on such a machine, once."""
    found: dict[Variant, None] = {}

    def world(case: Case) -> tuple[int, str]:
        return case.world_size, case.dtype

    for _, group in itertools.groupby(sorted(cases, key=world), key=world):
        mine = list(group)
        topology = topology_on(mine, architecture=architecture, multiprocessors=multiprocessors, gpus=gpus, overrides=overrides)
        for case in mine:
            if case.possible and case.tokens:
                request = request_of(case)
                kernels = make_kernels(topology, request, make_plan(topology, request))
                found.update(dict.fromkeys(kernel.variant for kernel in kernels))
    return list(found)


def build_kernels(
    cases: Iterable[Case],
    *,
    overrides: Overrides = _NONE,
    total: Callable[[int], Callable[[str], None]] = lambda count: lambda name: None,
) -> None:
    """Compile what ``cases`` launch on this machine's GPUs into the cache, on all cores.

    ``overrides``: what their communicator fixes. ``total`` hears how many kernels there are and returns what is to hear of each.
    """
    properties = torch.cuda.get_device_properties(0)
    architecture = architecture_of((properties.major, properties.minor))
    variants = variants_on(
        cases,
        architecture=architecture,
        multiprocessors=properties.multi_processor_count,
        gpus=torch.cuda.device_count(),
        overrides=overrides,
    )
    jit.build(variants, architecture, built=total(len(variants)))

"""Several communicators on the same GPUs, and GPUs that hold few CTAs at a time: nobody waits for ever (docs/design.md)."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from emulated import Build

from collogue.calls.capacity import Capacity
from collogue.contract.quant import NVFP4
from collogue.contract.spec import RMSNorm
from collogue.errors import ArgumentError
from collogue.planning.plan import make_kernels, make_plan
from collogue.planning.topology import MOST_CONCURRENT, Topology, agree, topology_of
from collogue.testing import VirtualGroup, run_virtual
from collogue.testing.emulator import Case, Edit, Library, emulate

pytestmark = pytest.mark.slow

KERNELS = ("one_shot", "two_shot", "sharded", "reduce_scatter", "all_gather")
#: Of a grid that takes nine tenths of a GPU, as plans make it. Owners have rows for every cluster too.
CTAS, ROWS, TOKENS = 10, 9, 18
#: Streams start within 20 ms of each other.
SKEW = 20_000


def case_of(kernel: str, rows: int = ROWS, concurrent: int = 1) -> Case:
    tokens = TOKENS if kernel in ("one_shot", "two_shot") else 2 * TOKENS
    return Case(2, 32, 32, kernel=kernel, rows=rows, max_tokens=tokens, concurrent=concurrent)


def hangs(library: Library, communicators: int, seeds: int, *, ctas: int = CTAS, in_order: bool = True) -> int:
    """How many runs of four calls end in a timeout; no run ends otherwise but well."""
    found = 0
    for seed in range(seeds):
        calls = [library.cases[0].max_tokens] * 4
        shared = {"communicators": communicators, "ctas": ctas, "in_order": in_order, "skew": SKEW}
        run = emulate(library, calls, seed=seed, timeout=0.2, **shared)  # type: ignore[arg-type]
        assert run.error == ""
        timed_out = any(record.fault == 1 for record in run.failures)
        assert timed_out or run.problem() == ""
        found += timed_out
    return found


@pytest.mark.parametrize("kernel", KERNELS)
def test_a_grid_that_does_not_fit_ends_where_clusters_start_in_order(build: Build, kernel: str) -> None:
    """Progress rests on dispatch in order, not on how many CTAs are resident."""
    library = build(case_of(kernel))
    assert hangs(library, 1, 6, ctas=4) == 0
    assert hangs(library, 1, 4, ctas=1) == 0


def test_progress_rests_on_dispatch_in_order(build: Build) -> None:
    assert hangs(build(case_of("two_shot")), 1, 16, ctas=4, in_order=False) > 0


@pytest.mark.parametrize("kernel", KERNELS)
def test_communicators_that_do_not_know_of_each_other_may_wait_for_ever(build: Build, kernel: str) -> None:
    """The kernels that are launched early take the room that the other communicator's need."""
    assert hangs(build(case_of(kernel)), 3, 12) > 0


@pytest.mark.parametrize("in_order", [True, False])
@pytest.mark.parametrize("communicators", [2, 3, 4])
@pytest.mark.parametrize("kernel", KERNELS)
def test_concurrent_communicators_do_not(build: Build, kernel: str, communicators: int, in_order: bool) -> None:
    library = build(case_of(kernel, ROWS // communicators, communicators))
    assert library.cases[0].variant.launch_late
    assert hangs(library, communicators, 8, in_order=in_order, ctas=communicators * (ROWS // communicators)) == 0


def test_both_halves_of_the_rule_are_needed(build: Build) -> None:
    """Late launches with grids that are not divided hang, and divided grids with early launches."""
    assert hangs(build(case_of("two_shot", ROWS, 4)), 4, 20) > 0
    early = Edit("opening.cuh", "    if constexpr (!C::kLaunchLate) launch_next_kernel();", "    launch_next_kernel();")
    assert hangs(build(case_of("two_shot", ROWS // 2, 2), edits=(early,)), 2, 20, ctas=2 * (ROWS // 2)) > 0


# Plans


def topology(concurrent: int) -> Topology:
    capacity = Capacity(4096, 7168, torch.bfloat16, torch.device("cpu"), 2, 0)
    return topology_of(2, capacity, architecture="sm_90a", multiprocessors=132, concurrent=concurrent)


@pytest.mark.parametrize("operation", ["all_reduce", "sharded", "reduce_scatter", "finish"])
def test_a_concurrent_communicator_takes_its_part(operation: str) -> None:
    norm, quant = RMSNorm(torch.ones(7168, dtype=torch.bfloat16)), NVFP4(37.5)
    capacity = Capacity(4096, 7168, torch.bfloat16, torch.device("cpu"), 2, 0)
    request = capacity.request(4096, operation != "finish", norm, quant, False, None, operation)  # type: ignore[arg-type]
    ctas, late = [], []
    for concurrent in (1, 2, 4):
        plan = make_plan(topology(concurrent), request)
        (kernel,) = make_kernels(topology(concurrent), request, plan)
        ctas.append(kernel.shape.clusters * kernel.shape.cluster)
        late.append(kernel.variant.launch_late)
    if operation == "finish":  # waits for nobody
        assert ctas == [ctas[0]] * 3
        assert late == [False] * 3
    else:
        assert late == [False, True, True]
        assert all(132 * 8 // n * 0.7 < found <= 132 * 8 // n for n, found in zip((1, 2, 4), ctas, strict=True))


def test_it_is_compared_between_ranks() -> None:
    def rank(group: VirtualGroup) -> Topology:
        capacity = Capacity(8, 64, torch.bfloat16, group.device, 2, group.rank)
        return agree(group, capacity, 1.0, concurrent=1 + group.rank)

    with pytest.raises(ArgumentError, match=r"rank 1 for .*concurrent=2"):
        run_virtual(2, rank)


@pytest.mark.parametrize("value", [0, -1, 1.5, True, "2", None, MOST_CONCURRENT + 1])
def test_values_that_cannot_be_meant(value: object) -> None:
    def rank(group: VirtualGroup) -> Topology:
        return agree(group, Capacity(8, 64, torch.bfloat16, group.device, 1, 0), 1.0, concurrent=value)  # type: ignore[arg-type]

    with pytest.raises(ArgumentError, match=r"concurrent is .*\nhint: give how many communicators"):
        run_virtual(1, rank)


def test_ranks_agree_on_it() -> None:
    assert replace(topology(2), concurrent=1) == topology(1)

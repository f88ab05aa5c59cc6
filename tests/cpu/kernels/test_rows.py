"""Kernels whose ranks own as many rows as a table says, on the CPU."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from emulated import PRESENT, PROTOCOL, Build

from collogue.contract.prologue import PrologueForm
from collogue.contract.quant import MXFP8, NVFP4, FP8Group, FP8PerToken, Quant
from collogue.gpu.failure import MISMATCH
from collogue.gpu.workspace import BOUNDS_OFFSET, MAX_RANKS
from collogue.planning.variant import FORMATS
from collogue.testing.covering import FORMATS as LABELS
from collogue.testing.emulator import Ask, Case, Edit, emulate
from collogue.testing.inputs import KINDS

pytestmark = pytest.mark.slow

CASES = {
    "sharded": Case(2, 24, 32, kernel="sharded"),
    "sharded-cluster": Case(3, 576, 64, kernel="sharded", quant=NVFP4(37.5), max_tokens=5),
    "sharded-loop": Case(4, 24, 32, kernel="sharded", rows=1, quant=FP8PerToken(), keep_norm=True, max_tokens=5),
    "sharded-vectors": Case(2, 576, 64, kernel="sharded", vectors=2, rows=2, quant=FP8Group(48), max_tokens=6),
    "sharded-launches": Case(3, 24, 32, kernel="sharded", launches=2, max_tokens=6),
    "sharded-branch": Case(2, 264, 32, kernel="sharded", rows=1, branch=True, max_tokens=4),
    "sharded-experts": Case(3, 264, 32, kernel="sharded", rows=1, max_tokens=4, prologue=PrologueForm("expert_combine", "none")),
    "sharded-float32": Case(2, 128, 32, kernel="sharded", residual=False, dtype=torch.float32, quant=MXFP8("floor"), max_tokens=4),
    "sharded-8": Case(8, 24, 32, kernel="sharded", residual=False, max_tokens=9),
    "reduce-scatter": Case(3, 264, 32, kernel="reduce_scatter", norm=False, max_tokens=5),
    "reduce-scatter-loop": Case(4, 24, 32, kernel="reduce_scatter", rows=1, launches=2, quant=FP8PerToken(), max_tokens=6),
    "reduce-scatter-5": Case(5, 24, 32, kernel="reduce_scatter", dtype=torch.float16, max_tokens=7),
    "all-gather": Case(3, 264, 32, kernel="all_gather", max_tokens=5),
    "all-gather-codes": Case(2, 512, 64, kernel="all_gather", quant=NVFP4(37.5), launches=2, max_tokens=6),
    "all-gather-loop": Case(4, 24, 32, kernel="all_gather", rows=1, max_tokens=6),
}
CASES = {name: replace(case, uneven=True) for name, case in CASES.items()}


def splits(world: int, most: int) -> list[tuple[int, ...]]:
    """Calls one after the other: all rows on one rank, on another, none on most, one on each, and lists that no block size makes."""
    lists = [
        (*[0] * (world - 1), most),
        (most, *[0] * (world - 1)),
        tuple(1 if rank == 1 else 0 for rank in range(world)),
        tuple(int(rank < most) for rank in range(world)),
        tuple(1 if rank == world - 1 else (most - 1) * (rank == 0) for rank in range(world)),
        (0, 2, *[0] * (world - 2)),
    ]
    return [rows for rows in lists if sum(rows) <= most]


def asks(case: Case) -> list[Ask]:
    return [Ask(sum(rows), rows=rows) for rows in splits(case.world, case.max_tokens)]


@pytest.mark.parametrize("name", CASES)
def test_every_call_equals_the_reference(build: Build, name: str) -> None:
    """One kernel for all of them."""
    library, kinds = build(CASES[name]), list(KINDS)
    for number, mode in enumerate(PRESENT):
        kind = kinds[(number + len(name)) % len(kinds)]
        run = emulate(library, asks(CASES[name]), seed=number, mode=mode, victim=number % library.world, kind=kind)
        assert run.problem() == "", (mode, number)


def _one_label_each() -> dict[str, Quant | None]:
    """A label of every row of the formats' table."""
    found = {row.name: next(quant for quant in LABELS.values() if row.holds(quant)) for row in FORMATS}
    return dict(found)


@pytest.mark.parametrize("name", [row.name for row in FORMATS])
def test_every_format(build: Build, name: str) -> None:
    quant = _one_label_each()[name]
    cases = [Case(3, 256, 32, kernel=k, quant=quant, max_tokens=5, uneven=True) for k in ("sharded", "reduce_scatter", "all_gather")]
    library = build(*cases)
    calls = [replace(ask, case=case) for case in range(3) for ask in asks(cases[case])[::2]]
    assert emulate(library, calls, seed=3, mode="late").problem() == ""


def test_even_and_uneven_calls_in_turn(build: Build) -> None:
    """The same bits, whatever came before: words that one kernel leaves would be taken for another's."""
    even = [Case(2, 24, 32, kernel=k, max_tokens=4) for k in ("one_shot", "two_shot", "sharded", "reduce_scatter", "all_gather")]
    uneven = [replace(case, uneven=True) for case in even[2:]]
    library = build(*even, *uneven)
    calls = [Ask(3, 0), Ask(4, 5, rows=(1, 3)), Ask(4, 1), Ask(3, 6, rows=(0, 3)), Ask(4, 2), Ask(2, 7, rows=(2, 0)), Ask(4, 4), Ask(1, 3)]
    for seed, mode in enumerate(PRESENT):
        assert emulate(library, calls, seed=seed, mode=mode, victim=seed % 2).problem() == ""


@pytest.mark.parametrize(("mine", "theirs"), [((1, 3), (3, 1)), ((4, 0), (0, 4)), ((2, 2), None)])
@pytest.mark.parametrize("kernel", ["sharded", "reduce_scatter", "all_gather"])
def test_ranks_with_other_lists_are_told(build: Build, kernel: str, mine: tuple[int, ...], theirs: tuple[int, ...] | None) -> None:
    """Within the call or in the next one; equal blocks are another call than a list of the same."""
    case = Case(2, 24, 32, kernel=kernel, max_tokens=4)
    library = build(replace(case, uneven=True), case)
    other = Ask(4, 1) if theirs is None else Ask(4, rows=theirs)
    last = Ask(4, rows=(2, 2))
    run = emulate(library, [last, (Ask(4, rows=mine), other), last], seed=1)
    assert run.error == ""
    assert {record.fault for record in run.failures} == {MISMATCH}
    assert any(record.call == 1 for record in run.failures)


_ROW, _OWNS = "p.bounds[rank] :", "p.bounds[rank + 1] :"
MUTANTS = {
    "rows of the rank before": Edit(PROTOCOL, _ROW, "p.bounds[rank ? rank - 1 : 0] :"),
    "equal blocks": Edit(PROTOCOL, _ROW, "rank * p.block :"),
    "one row too many": Edit(PROTOCOL, _OWNS, "p.bounds[rank + 1] + 1 :"),
    "one row too few": Edit(PROTOCOL, _OWNS, "p.bounds[rank + 1] - (p.bounds[rank + 1] > p.bounds[rank]) :"),
    "all rows up to the last": Edit(PROTOCOL, _OWNS, "p.tokens :"),
}


@pytest.mark.parametrize("kernel", ["sharded", "reduce_scatter", "all_gather"])
@pytest.mark.parametrize("name", MUTANTS)
def test_a_wrong_owner_is_caught(build: Build, name: str, kernel: str) -> None:
    """Every rank owns a row: what a wrong owner reads is memory then, if another's."""
    case = Case(3, 24, 32, kernel=kernel, max_tokens=6, residual=False, uneven=True)
    calls = [Ask(sum(rows), rows=rows) for rows in ((1, 1, 2), (3, 2, 1), (1, 3, 1))]
    assert emulate(build(case), calls, seed=0).problem() == ""
    assert emulate(build(case, edits=(MUTANTS[name],)), calls, seed=0, timeout=0.1).problem()


def test_a_mark_without_the_rows_is_caught(build: Build) -> None:
    """Lists that differ and hang nobody are found by the marks alone."""
    edit = Edit(PROTOCOL, "        hash = (hash ^ p.bounds[r + 1]) * 0x9e3779b1u;\n", "")
    case = Case(2, 24, 32, kernel="reduce_scatter", max_tokens=4, uneven=True, residual=False, norm=False)
    calls = [Ask(4, rows=(2, 2)), (Ask(4, rows=(1, 3)), Ask(4, rows=(3, 1))), Ask(4, rows=(2, 2))]
    for edits, told in (((), True), ((edit,), False)):
        run = emulate(build(case, edits=edits), calls, seed=2, timeout=0.1)
        assert (MISMATCH in {record.fault for record in run.failures}) == told


def test_the_table_is_kept_for_the_journal(build: Build) -> None:
    case = Case(3, 24, 32, kernel="sharded", max_tokens=4, uneven=True)
    kept: list[torch.Tensor] = []
    calls = [Ask(4, rows=(1, 0, 3)), Ask(3, rows=(0, 3, 0))]
    assert emulate(build(case), calls, seed=0, before=kept.extend).problem() == ""
    for workspace in kept:
        table = workspace[BOUNDS_OFFSET // 4 :][: 2 * MAX_RANKS].view(2, MAX_RANKS).tolist()
        assert table == [[1, 1, 4, 4, 4, 4, 4, 4], [0, 3, 3, 3, 3, 3, 3, 3]]

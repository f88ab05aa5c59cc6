"""The kernels on the CPU under an adversarial scheduler: results, failures, and mutated twins that must be caught."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from collogue.plan import GENERATIONS
from collogue.spec import MXFP8, NVFP4, FP8PerToken
from collogue.testing.emulator import MODES, Case, Edit, Library, compile_case, emulate
from collogue.testing.inputs import KINDS

#: Longer and shorter calls after each other: words that an earlier call left behind would be taken for those of a later one.
TOKENS = (3, 1, 2, 3, 1, 1, 3, 2)
_PROTOCOL, _KERNEL = "protocol.cuh", "one_shot.cuh"
PRESENT = [mode for mode in MODES if mode != "absent"]

CASES = {
    "sum": Case(2, 24, 32, dtype=torch.float32, residual=False, norm=False),
    "norm": Case(4, 24, 32),
    "cluster": Case(3, 576, 64, keep_norm=True, quant=NVFP4(37.5)),
    "cluster-float32": Case(2, 264, 32, dtype=torch.float32, quant=FP8PerToken()),
    "loop": Case(3, 264, 32, rows=2, quant=FP8PerToken(), keep_norm=True),
    "one-cta": Case(3, 576, 64, vectors=2, rows=1, dtype=torch.float16, quant=MXFP8(rounding="ceil")),
    "local": Case(3, 576, 96, kernel="local", quant=NVFP4(100.0)),
}

Build = Callable[..., Library]


@pytest.fixture(scope="module")
def build(tmp_path_factory: pytest.TempPathFactory) -> Build:
    """Compiles a case, once per process."""
    directory = tmp_path_factory.mktemp("emulator")
    return lambda case, edits=(): compile_case(case, directory, edits)


@pytest.mark.parametrize("name", CASES)
def test_every_call_equals_the_reference(build: Build, name: str) -> None:
    library, kinds = build(CASES[name]), list(KINDS)
    for number, mode in enumerate(mode for mode in PRESENT for _ in range(4)):
        victim = number % library.case.world
        run = emulate(library, TOKENS, seed=number, mode=mode, victim=victim, kind=kinds[number % len(kinds)])
        assert run.problem() == "", (mode, number)


def test_a_run_is_repeatable(build: Build) -> None:
    library = build(CASES["norm"])
    ticks = [emulate(library, TOKENS, seed=seed, mode="fair").ticks for seed in (1, 1, 2)]
    assert ticks[0] == ticks[1] != ticks[2]


@pytest.mark.parametrize("victim", [0, 2])
@pytest.mark.parametrize("name", ["cluster", "loop"])
def test_a_rank_that_never_comes(build: Build, name: str, victim: int) -> None:
    """The others give up, the record names it, every rank is told to stop, and what follows ends at once without sending."""
    late_call = 2
    run = emulate(build(CASES[name]), (2, 3, 1, 3, 2), seed=victim, mode="absent", victim=victim, absent_call=late_call)
    assert run.error == ""
    gave_up = [f for f in run.failures if f.kind == 1]
    assert gave_up
    for record in gave_up:
        assert record.rank != victim
        assert (record.late_rank, record.call, record.token, record.stage, record.waited_ms) == (victim, late_call, 0, 1, 1000)
    for rank, record in enumerate(run.failures):
        assert record.kind
        assert record.rank == rank
        assert record.kind == 1 or record.late_rank in {f.rank for f in gave_up}
    assert all(stop - 1 in {f.rank for f in gave_up} for stop in run.stops)
    assert all(sent > 0 for sent in run.sent[0] + run.sent[1])
    assert run.sent[late_call][victim] == 0
    assert not any(sent for call in run.sent[late_call + 1 :] for sent in call)
    assert run.ticks < 2_000_000  # one timeout, not one per call


def test_a_row_that_comes_in_part(build: Build) -> None:
    """In the last call the second warps' words of rank 1 stay away: whoever waits has a record, and a timeout names rank 1."""
    held_back = Edit(
        _PROTOCOL, "    if (stopped) return;", "    if (stopped || (p.rank == 1 && call == 1 && thread_index() >= 32)) return;"
    )
    library = build(Case(3, 576, 64, keep_norm=True), (held_back,))
    for seed in range(8):
        run = emulate(library, (2, 1), seed=seed, mode=PRESENT[seed % len(PRESENT)], victim=seed % 3)
        assert run.error == ""
        assert [run.failures[rank].kind for rank in (0, 2)] != [2, 2], seed
        for rank in (0, 2):
            record = run.failures[rank]
            assert record.kind, (seed, rank)
            assert (record.call, record.token) == (1, 0) if record.kind == 1 else record.call == 1
            assert record.late_rank == (1 if record.kind == 1 else 2 - rank), (seed, rank)


#: Case, edits and generations of each mutated twin, and where the adversary finds it.
_SMALL, _WIDE = Case(2, 24, 32), Case(2, 264, 32)
_UNITS = "units = call % 2 ? head.w[0] : head.w[1];"
_COUNT = "ranks.count_warp(thread, threads / 32, tokens * (p.hidden * D::kBytes / 16));"
_EARLY_COUNT = (
    "ranks.count_warp((grid_row() * blocks_in_row() + block_in_row()) * C::kThreads + thread_index(), "
    "grid_rows() * blocks_in_row() * C::kThreads / 32, p.tokens * (p.hidden * D::kBytes / 16));"
)
MUTANTS: dict[str, tuple[Case, tuple[Edit, ...], int]] = {
    "a wait dropped": (_SMALL, (Edit(_PROTOCOL, "missing = any_in_warp(any_missing(term));", "missing = any_in_warp(false);"),), 4),
    "two generations": (_SMALL, (Edit(_PROTOCOL, "kGenerations = 4;", "kGenerations = 2;"),), 2),
    "one generation": (_SMALL, (Edit(_PROTOCOL, "kGenerations = 4;", "kGenerations = 1;"),), 1),
    "wipe skipped": (_SMALL, (Edit(_PROTOCOL, _UNITS, "units = 0;"),), 4),
    "wipe of the wrong size": (_SMALL, (Edit(_PROTOCOL, _UNITS, "units = p.tokens * (p.hidden * D::kBytes / 16);"),), 4),
    "wipe of the next generation": (_SMALL, (Edit(_PROTOCOL, "before = (call - 1)", "before = (call + 1)"),), 4),
    "no disguise": (_SMALL, (Edit(_PROTOCOL, "v.part[i].w[j] == D::kSentinel ? 0u : v.part[i].w[j]", "v.part[i].w[j]"),), 4),
    "counter read before the previous kernel ended": (
        _SMALL,
        (
            Edit(_KERNEL, "  ranks.ask();\n", ""),
            Edit(_KERNEL, "  wait_for_previous_kernel();\n", "  ranks.ask();\n  wait_for_previous_kernel();\n"),
        ),
        4,
    ),
    "counter advanced before it is read": (
        _SMALL,
        (Edit(_KERNEL, _COUNT, ""), Edit(_KERNEL, "  ranks.ask();\n", f"  {_EARLY_COUNT}\n  ranks.ask();\n")),
        4,
    ),
    "previous kernel not waited for": (_SMALL, (Edit(_KERNEL, "  wait_for_previous_kernel();\n", ""),), 4),
    "row exchange not waited for": (
        _WIDE,
        (Edit("exchange.cuh", "barrier_wait(&buffer.barrier[odd], C::kLoop ? (turn >> 1) & 1u : 0u);", ""),),
        4,
    ),
    "barriers of the cluster not waited for": (
        Case(2, 264, 32, kernel="local"),
        (Edit("row.cuh", "if constexpr (kBarrierAtStart && C::kClustered) cluster_wait();", ""),),
        4,
    ),
}
MOST_SEEDS = 12


def seeds_needed(library: Library, generations: int) -> tuple[int, str]:
    """Runs until one is not as it should be: how many, and what was seen. Modes take turns. (0, "") if none was."""
    for seed in range(MOST_SEEDS):
        run = emulate(
            library, TOKENS, seed=seed, mode=PRESENT[-1 - seed % len(PRESENT)], victim=seed // 4 % 2, generations=generations, timeout=0.5
        )
        if run.problem():
            return seed + 1, run.problem()
    return 0, ""


@pytest.mark.parametrize("name", MUTANTS)
def test_a_mutated_twin_is_caught(build: Build, name: str, record_property: Callable[[str, object], None]) -> None:
    case, edits, generations = MUTANTS[name]
    seeds, seen = seeds_needed(build(case, edits), generations)
    assert seeds, f"{name}: {MOST_SEEDS} runs saw nothing"
    record_property("told", f"emulator: {name}: caught by seed {seeds} of {MOST_SEEDS}: {seen}")


@pytest.mark.parametrize("case", [_SMALL, _WIDE], ids=["small", "wide"])
def test_the_unmutated_kernel_is_not_caught(build: Build, case: Case) -> None:
    assert seeds_needed(build(case), GENERATIONS) == (0, "")


def test_an_edit_must_find_its_text(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="0 times"):
        compile_case(_SMALL, tmp_path, (Edit(_PROTOCOL, "no such text", ""),))

"""The kernels on the CPU under an adversarial scheduler: results, failures, and mutated twins that must be caught."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from collogue.failure import MISMATCH, TIMEOUT
from collogue.quant import MXFP4, MXFP8, NVFP4, FP8Group, FP8PerToken, FP8Static
from collogue.testing.emulator import MODES, Ask, Case, Edit, Library, compile_cases, emulate
from collogue.testing.inputs import KINDS

#: Longer and shorter calls after each other: words that an earlier call left behind would be taken for those of a later one.
TOKENS = (3, 1, 2, 1, 1, 3)
MANY_TOKENS = (5, 1, 2, 4, 1, 3)  # fewer than ranks, and more
PRESENT = [mode for mode in MODES if mode != "absent"]

CASES = {
    "one-shot": Case(4, 24, 32),
    "one-shot-sum": Case(2, 24, 32, dtype=torch.float32, residual=False, norm=False),
    "one-shot-cluster": Case(3, 576, 64, keep_norm=True, quant=NVFP4(37.5)),
    "one-shot-float32": Case(2, 264, 32, dtype=torch.float32, quant=FP8PerToken()),
    "one-shot-loop": Case(3, 264, 32, rows=2, quant=FP8PerToken(), keep_norm=True),
    "one-shot-vectors": Case(3, 576, 64, vectors=2, rows=1, dtype=torch.float16, quant=MXFP8(rounding="ceil")),
    "two-shot": Case(4, 24, 32, kernel="two_shot"),
    "two-shot-cluster": Case(2, 576, 64, kernel="two_shot", quant=NVFP4(37.5)),
    "two-shot-float32": Case(2, 264, 32, kernel="two_shot", dtype=torch.float32, rows=1),
    "two-shot-loop": Case(3, 264, 32, kernel="two_shot", rows=2, quant=FP8PerToken(), keep_norm=True),
    "two-shot-vectors": Case(3, 576, 64, kernel="two_shot", vectors=2, rows=1, dtype=torch.float16, quant=MXFP8(rounding="ceil")),
    "two-shot-no-norm": Case(2, 576, 64, kernel="two_shot", rows=1, norm=False, quant=NVFP4(37.5)),
    "two-shot-launches": Case(3, 288, 64, kernel="two_shot", quant=NVFP4(37.5, "8x4"), max_tokens=5, launches=3),
    "sharded": Case(4, 24, 32, kernel="sharded", max_tokens=5),
    "sharded-cluster": Case(2, 576, 96, kernel="sharded", quant=NVFP4(37.5), max_tokens=5, rows=2),
    "sharded-float32": Case(4, 288, 64, kernel="sharded", quant=MXFP4(rounding="floor"), keep_norm=True, max_tokens=6, dtype=torch.float32),
    "sharded-loop": Case(3, 264, 32, kernel="sharded", quant=FP8PerToken(), max_tokens=7, rows=2),
    "sharded-sum": Case(2, 576, 64, kernel="sharded", rows=1, residual=False, norm=False, max_tokens=5),
    "sharded-static": Case(2, 264, 64, kernel="sharded", quant=FP8Static(0.5), max_tokens=5, rows=1, keep_norm=True),
    "sharded-group": Case(
        2, 576, 64, kernel="sharded", vectors=2, rows=1, quant=FP8Group(48, scale_format="ue8m0", layout="column"), max_tokens=6
    ),
    "sharded-launches": Case(2, 288, 64, kernel="sharded", quant=FP8Group(16, layout="column"), max_tokens=7, launches=2, rows=1),
    "reduce-scatter": Case(3, 264, 32, kernel="reduce_scatter", quant=FP8PerToken(), max_tokens=5, rows=1),
    "reduce-scatter-sum": Case(4, 24, 32, kernel="reduce_scatter", residual=False, norm=False, max_tokens=5),
    "reduce-scatter-launches": Case(3, 64, 32, kernel="reduce_scatter", quant=NVFP4(37.5), max_tokens=7, launches=2),
    "all-gather": Case(3, 264, 32, kernel="all_gather", max_tokens=5, rows=1),
    "all-gather-float32": Case(4, 24, 32, kernel="all_gather", max_tokens=5, dtype=torch.float32),
    "all-gather-cluster": Case(2, 576, 96, kernel="all_gather", quant=NVFP4(37.5), max_tokens=5),
    "all-gather-mx": Case(3, 288, 64, kernel="all_gather", quant=MXFP8(rounding="floor"), max_tokens=7, launches=2),
    "local": Case(2, 576, 96, kernel="local", quant=NVFP4(100.0)),
}

#: Every kernel, for one sequence of calls.
MIXED = (
    Case(3, 64, 32, quant=NVFP4(37.5), keep_norm=True),
    Case(3, 288, 64, kernel="two_shot", quant=FP8PerToken()),
    Case(3, 64, 32, kernel="sharded", max_tokens=5, quant=MXFP4(rounding="ceil")),
    Case(3, 24, 32, kernel="reduce_scatter", max_tokens=5),
    Case(3, 64, 32, kernel="all_gather", max_tokens=5, quant=NVFP4(37.5)),
    Case(3, 64, 32, kernel="local"),
    Case(3, 264, 64, kernel="two_shot", launches=2),
    Case(3, 24, 32),
)

Build = Callable[..., Library]


@pytest.fixture(scope="module")
def build(tmp_path_factory: pytest.TempPathFactory) -> Build:
    """Compiles cases, once per session: test processes share a directory."""
    directory = tmp_path_factory.getbasetemp().parent / "emulator"
    return lambda *cases, edits=(): compile_cases(cases, directory, edits)


def tokens_of(case: Case) -> tuple[int, ...]:
    return TOKENS if case.max_tokens == 3 else tuple(min(2 * t if t == 5 else t, case.max_tokens) for t in MANY_TOKENS)


@pytest.mark.parametrize("name", CASES)
def test_every_call_equals_the_reference(build: Build, name: str) -> None:
    library, kinds = build(CASES[name]), list(KINDS)
    for number, mode in enumerate(mode for mode in PRESENT for _ in range(2)):
        victim = number % library.world
        run = emulate(library, tokens_of(CASES[name]), seed=number, mode=mode, victim=victim, kind=kinds[number % len(kinds)])
        assert run.problem() == "", (mode, number)


def test_kernels_in_any_order(build: Build) -> None:
    """Each uses the same memory, and cleans what the one before has left."""
    library = build(*MIXED)
    for seed in range(12):
        rng = random.Random(seed)
        chosen = [rng.randrange(len(MIXED)) for _ in range(12)]
        calls = [Ask(rng.randint(1, MIXED[case].max_tokens), case) for case in chosen]
        run = emulate(library, calls, seed=seed, mode=PRESENT[seed % 4], victim=seed % 3)
        assert run.problem() == "", (seed, calls)


def test_a_run_is_repeatable(build: Build) -> None:
    library = build(CASES["one-shot"])
    ticks = [emulate(library, TOKENS, seed=seed, mode="fair").ticks for seed in (1, 1, 2)]
    assert ticks[0] == ticks[1] != ticks[2]


# Words that look like the sentinel


def turning(*groups: int) -> Callable[[int, torch.Tensor], torch.Tensor]:
    """Partials whose sum is 512 in some of every four groups of 32 and zero in the others: E8M0 bytes 0x80 and 0."""

    def terms(rank: int, partial: torch.Tensor) -> torch.Tensor:
        partial = torch.zeros_like(partial)
        if rank == 0:
            partial.view(len(partial), -1, 4, 32)[:, :, list(groups), 5] = 512.0
        return partial

    return terms


#: The scale words of such a call are the sentinel, but that they travel turned.
TURNED = {
    torch.float32: (Case(2, 128, 32, kernel="sharded", residual=False, norm=False, quant=MXFP8("floor"), dtype=torch.float32), (3,)),
    torch.bfloat16: (Case(2, 128, 32, kernel="sharded", residual=False, norm=False, quant=MXFP8("floor")), (1, 3)),
}


@pytest.mark.parametrize("dtype", TURNED, ids=str)
def test_scale_bytes_that_look_like_the_sentinel(build: Build, dtype: torch.dtype) -> None:
    case, groups = TURNED[dtype]
    run = emulate(build(case), (3, 2), seed=0, terms=turning(*groups))
    assert run.problem() == ""
    scales = run.outputs[0][0].scales
    assert scales is not None
    assert {0x80, 0} == set(scales.view(torch.uint8)[:3].flatten().tolist())


#: As where a CTA has more than 512 threads: three rows on their way.
AHEAD = Edit("two_shot.cuh", "kAhead = C::kAhead;", "kAhead = C::kLoop;")


@pytest.mark.parametrize(
    "case",
    [
        Case(2, 264, 32, kernel="two_shot", rows=1, max_tokens=7),
        Case(3, 264, 64, kernel="two_shot", rows=2, quant=FP8PerToken(), max_tokens=7),
        Case(2, 128, 32, kernel="two_shot", rows=1, dtype=torch.float32, norm=False, max_tokens=5),
        Case(2, 512, 32, kernel="two_shot", rows=1, vectors=2, launches=2, max_tokens=7),
    ],
    ids=str,
)
@pytest.mark.parametrize("kind", ["normal", "nan", "inf"])
def test_three_rows_on_their_way(build: Build, case: Case, kind: str) -> None:
    library = build(case, edits=(AHEAD,))
    for seed in range(2):
        mode = PRESENT[-1 - seed]
        run = emulate(library, (case.max_tokens, 2 * case.launches, case.max_tokens - 1), seed=seed, mode=mode, victim=seed % 2, kind=kind)
        assert run.problem() == ""


@pytest.mark.parametrize("wiped", ["shot.wipe_terms(t, i);\n", "shot.wipe_terms(added, i);", "shot.wipe_y(t, i);"])
def test_rows_ahead_are_wiped(build: Build, wiped: str) -> None:
    case = Case(2, 264, 32, kernel="two_shot", rows=1, max_tokens=4)
    library = build(case, edits=(AHEAD, Edit("two_shot.cuh", wiped, ";\n")))
    assert any(emulate(library, (4, 3, 4), seed=seed, timeout=0.1).problem() for seed in range(4))


# Ranks that do not come


@pytest.mark.parametrize("victim", [0, 2])
@pytest.mark.parametrize("kernel", ["one_shot", "two_shot", "sharded", "reduce_scatter", "all_gather"])
@pytest.mark.parametrize("tokens", [(2, 3, 5, 3, 2), (2, 3, 1, 3, 2)], ids=["rows-for-all", "fewer-rows-than-ranks"])
def test_a_rank_that_never_comes(build: Build, kernel: str, tokens: tuple[int, ...], victim: int) -> None:
    """The others give up, the record names it, every rank is told to stop, and what follows ends at once without sending."""
    late_call, quant = 2, FP8PerToken() if kernel == "sharded" else None
    case = Case(3, 264, 32, kernel=kernel, rows=1, quant=quant, max_tokens=5)
    run = emulate(build(case), tokens, seed=victim, mode="absent", victim=victim, absent_call=late_call, timeout=0.25)
    assert run.error == ""
    finders = {f.rank: f for rank, f in enumerate(run.failures) if f.rank == rank}
    told = {rank for rank, (_, what) in enumerate(run.controls[victim].notes) if what}
    assert finders.keys() <= told
    assert finders
    assert victim not in told
    for rank, record in enumerate(run.failures):
        assert record.fault == TIMEOUT
        assert record.call == late_call if rank != victim else record.call >= late_call
        assert record.token < tokens[record.call]
        assert record.late_rank == (victim if rank in finders else 3)
        assert record.rank in told
    for stop in run.stops:
        assert stop >> 8 == TIMEOUT
        assert (stop & 0xFF) - 1 in told
    assert all(any(of_ranks) for of_ranks in run.sent[:late_call])
    assert run.sent[late_call][victim] == 0
    assert not any(sent for call in run.sent[late_call + 1 :] for sent in call)
    assert run.ticks < 500_000  # one timeout, not one per call


@pytest.mark.parametrize("rows", [None, 1])
def test_a_fault_that_one_warp_has_found_for_all(build: Build, rows: int | None) -> None:
    """In an all-gather one warp waits: the others, which have nothing to say, must not fill the record."""
    library = build(replace(_TWO_WARPS, rows=rows))
    for seed in range(8):
        run = emulate(library, (2, 3, 3), seed=seed, mode="absent", victim=seed % 2, absent_call=1, timeout=0.2)
        waiting = 1 - seed % 2
        assert [(f.fault, f.rank) for f in run.failures] == [(TIMEOUT, waiting)] * 2, seed
        assert run.failures[waiting].late_rank == seed % 2


def test_a_row_that_comes_in_part(build: Build) -> None:
    """In the last call the second warps' words of rank 1 stay away: whoever waits has a record, and a timeout names rank 1."""
    send = "if (!active || stopped || offset >= p.slot_bytes) return;"
    held_back = Edit(_PROTOCOL, send, f"if (p.rank == 1 && call == 1 && thread_index() >= 32) return;\n{send}")
    library = build(Case(3, 576, 64, keep_norm=True), edits=(held_back,))
    for seed in range(4):
        run = emulate(library, (2, 1), seed=seed, mode=PRESENT[seed], victim=seed % 3, timeout=0.25)
        assert run.error == ""
        finders = [rank for rank in (0, 2) if run.failures[rank].rank == rank]
        assert finders, seed
        for rank in (0, 2):
            record = run.failures[rank]
            assert (record.fault, record.call) == (TIMEOUT, 1), (seed, rank)
            assert record.rank in finders
            if rank in finders:
                assert (record.late_rank, record.token) == (1, 0), (seed, rank)


@pytest.mark.parametrize("world", [2, 3])
def test_rows_that_come_in_part_end_in_one_timeout(build: Build, world: int) -> None:
    """A CTA with several rows and warps, from whose last call warp w gets rows before row w alone: whoever gives up tells all at once."""
    send = "if (!active || stopped || offset >= p.slot_bytes) return;"
    held_back = Edit(
        _PROTOCOL, send, f"if (p.rank == 1 && call == 1 && thread_index() / 32 <= offset / (p.hidden * D::kBytes)) return;\n{send}"
    )
    library = build(Case(world, 1024, 128, rows=1, max_tokens=5), edits=(held_back,))
    for seed in range(3):
        run = emulate(library, (5, 5), seed=seed, mode=PRESENT[seed], victim=seed % 2, timeout=0.6)
        assert run.error == ""
        assert {(record.fault, record.call) for record in run.failures} == {(TIMEOUT, 1)}
        assert run.ticks < 2 * 600_000, "one timeout after the other"


# Control words of which a bit has been turned over


def spoil(rank: int, word: int, bit: int) -> Callable[[list[torch.Tensor]], None]:
    def before(workspaces: list[torch.Tensor]) -> None:
        mask = 1 << bit
        workspaces[rank][word] ^= mask - (1 << 32) if bit == 31 else mask

    return before


@pytest.mark.parametrize("bit", [0, 3, 15, 16, 20, 31])
def test_what_is_left_to_be_cleaned_is_guarded_by_parity(build: Build, bit: int) -> None:
    """All of the generation is cleaned then, and nothing behind it."""
    case = Case(3, 24, 32, max_tokens=3)
    assert emulate(build(case), (2, 2, 3, 1, 2), seed=bit, before=spoil(1, 3, bit)).problem() == ""
    trusting = Edit(_PROTOCOL, "smaller(units * kLeftUnit, p.one_shot_bytes)", "left * kLeftUnit")
    if bit == 31:
        assert (
            emulate(build(case, edits=(trusting,)), (2, 2, 3, 1, 2), seed=bit, before=spoil(1, 3, bit)).error == "a store left the outputs"
        )


@pytest.mark.parametrize("bit", [0, 8, 16, 31])
@pytest.mark.parametrize("rows", [None, 1])
def test_a_stop_word_that_no_kernel_writes_leaves_a_record(build: Build, bit: int, rows: int | None) -> None:
    """The host is to look at every next call of that rank, whatever the word holds; the others give up and name it."""
    library = build(Case(2, 264, 32, rows=rows, max_tokens=3))
    run = emulate(library, (3, 2), seed=bit, timeout=0.3, before=spoil(1, 2, bit))
    own, other = run.failures[1], run.failures[0]
    assert own.fault or own.late_rank
    assert (other.fault, other.rank, other.late_rank) == (TIMEOUT, 0, 1)


def test_a_failure_record_that_seems_to_be_taken_is_filled_all_the_same(build: Build) -> None:
    """Nobody near this call can have taken it."""
    library = build(Case(2, 264, 32, max_tokens=3))
    for bit in (7, 31):
        run = emulate(library, (1, 2, 3), seed=bit, mode="absent", victim=1, absent_call=1, timeout=0.1, before=spoil(0, 4, bit))
        assert [record.fault for record in run.failures] == [TIMEOUT, TIMEOUT]
        assert [(stop >> 8, stop & 0xFF) for stop in run.stops] == [(TIMEOUT, 1)] * 2
        notes = [control.notes[0] for control in run.controls]
        assert [(call, (what - 1) & 0xF) for call, what in notes] == [(1, 1)] * 2, "every rank knows whom rank 0 waited for"


@pytest.mark.parametrize("kernel", ["one_shot", "two_shot", "sharded", "reduce_scatter", "all_gather"])
def test_a_timeout_that_is_nearly_met(build: Build, kernel: str) -> None:
    """Either all is well, or a record says what is not."""
    library = build(Case(3, 24, 32, kernel=kernel, max_tokens=5))
    faults = 0
    for seed in range(16):
        timeout = 0.001 * 2 ** (seed // 2 % 6)
        run = emulate(library, (5, 2, 3, 1), seed=seed, mode=("late", "slow_ctas")[seed % 2], victim=seed % 3, timeout=timeout)
        assert run.error == "", seed
        told = any(record.fault for record in run.failures)
        faults += told
        assert told == any(run.stops), seed
        assert told or run.problem() == "", seed
    assert 0 < faults < 16


#: A warp whose wait is over its time looks once more whom it misses, 3 ms later.
_LOOK = "    const u32 rank = missing_rank();\n"
_SLOW_LOOK = Edit("protocol.cuh", _LOOK, "for (const u64 from = time_ns(); time_ns() - from < 3000000ull;) {\n}\n" + _LOOK)


def test_words_that_come_when_the_time_is_over(build: Build) -> None:
    """A wait that ends without anybody to name goes on: else it would leave wrong outputs and no record."""

    def silent(library: Library) -> int:
        wrong = 0
        for seed in (7, 19, 31, 41, 43):
            mode, timeout = ("late", "slow_ctas")[seed % 2], 0.001 * 2 ** (seed // 2 % 6)
            run = emulate(library, (5, 2, 3, 1), seed=seed, mode=mode, victim=seed % 3, timeout=timeout)
            wrong += run.problem() != "" and not any(record.fault and record.rank < 3 for record in run.failures)
        return wrong

    case, stop = Case(3, 24, 32, kernel="all_gather", max_tokens=5), "stop(kTimeout);"
    assert silent(build(case, edits=(_SLOW_LOOK,))) == 0
    assert silent(build(case, edits=(_SLOW_LOOK, Edit(_PROTOCOL, f"if (any_in_warp(rank != kNobody)) {stop}", stop)))) > 0


#: Rank 2 takes 0.4 s for each look around but the first: it sees that others have stopped it when its own time is over as well.
_NOW = "    const u32 now = static_cast<u32>(time_ns() >> 20);\n"
_SLOW_RANK = Edit(
    "protocol.cuh",
    _NOW,
    f"if (p.rank == 2 && started)\n  for (const u64 from = time_ns(); time_ns() - from < 400000000ull;) {{\n  }}\n{_NOW}",
)


@pytest.mark.parametrize("guard", ["stopped || ", "!stopped && "], ids=["time", "marks"])
def test_whoever_has_been_stopped_finds_nothing(build: Build, guard: str) -> None:
    """The failure stays that of the rank that found it first."""
    time_is_over = guard == "stopped || "
    where = f"if ({guard}!any_in_warp(now" if time_is_over else f"if ({guard}any_in_warp(now"

    def finder(library: Library, seed: int) -> int:
        if time_is_over:
            run = emulate(library, (2, 2), seed=seed, mode="absent", victim=0, absent_call=1, timeout=0.2)
        else:
            run = emulate(library, [[Ask(1), Ask(2), Ask(2)]], seed=seed)
        assert run.error == ""
        record = run.failures[2]
        assert record.fault == (TIMEOUT if time_is_over else MISMATCH)
        return record.rank

    library = build(Case(3, 24, 32), edits=(_SLOW_RANK,))
    assert [finder(library, seed) for seed in range(4)] == [1] * 4
    library = build(Case(3, 24, 32), edits=(_SLOW_RANK, Edit("protocol.cuh", where, where.replace(guard, ""))))
    assert [finder(library, seed) for seed in range(4)] == [2] * 4


# Calls that do not match


def different(kernel: str) -> tuple[Case, ...]:
    """A case; another width; another format; another kernel."""
    case = Case(3, 64, 32, kernel=kernel, quant=NVFP4(37.5))
    other = "two_shot" if kernel == "one_shot" else "one_shot"
    return case, replace(case, hidden_size=32), replace(case, quant=FP8PerToken()), replace(case, kernel=other)


#: What one rank is called with where the others are called as usual, in two calls.
MISMATCHES = {
    "tokens": (Ask(3), Ask(2)),
    "hidden-size": (Ask(2, 1), Ask(2)),
    "format": (Ask(2, 2), Ask(2)),
    "eps": (Ask(2, eps=1e-5), Ask(2)),
    "kernel-order": (Ask(2, 3), Ask(2)),
}


@pytest.mark.parametrize("odd", [0, 1])
@pytest.mark.parametrize("what", MISMATCHES)
@pytest.mark.parametrize("kernel", ["one_shot", "two_shot", "sharded"])
def test_calls_that_do_not_match(build: Build, kernel: str, what: str, odd: int) -> None:
    """A mismatch that hangs is found in the call itself, one that hangs nobody in the next one; all are stopped, nobody waits long."""
    library = build(*different(kernel))
    usual = (Ask(2), Ask(2, 3)) if what == "kernel-order" else (Ask(2), Ask(2))
    wrong = [[MISMATCHES[what][i] if rank == odd else usual[i] for rank in range(3)] for i in range(2)]
    calls = [2, *wrong, 1]
    adversary = {"seed": odd, "mode": PRESENT[(list(MISMATCHES).index(what) + odd) % len(PRESENT)], "victim": 1 - odd}
    run = emulate(library, calls[:3], **adversary)
    assert run.error == ""
    assert all(stop >> 8 == MISMATCH for stop in run.stops)
    finders = {f.rank: f for rank, f in enumerate(run.failures) if f.fault and f.rank == rank}
    assert finders
    for finder in finders.values():
        assert (finder.fault, finder.call) == (MISMATCH, 1)
        assert odd in (finder.rank, finder.late_rank)
        assert finder.rank != finder.late_rank
    # The host finds the call too, also where a kernel has recorded a later one.
    told = [control.differing(rank, 3) for rank, control in enumerate(run.controls)]
    assert set(told) <= {1, None}
    assert told[odd] == 1
    assert all(told[rank] == 1 for rank in finders)
    assert run.ticks < 400_000  # of a timeout of a million
    run = emulate(library, calls, **adversary)
    assert [record.fault for record in run.failures] == [MISMATCH] * 3


#: Rows of a call whose CTAs are held up for 0.15 s: the first of rank 0, which marks the call, and the second of rank 1.
_HELD = Edit(
    "one_shot.cuh",
    "  Pair seen = {{0, 0}};\n",
    "  Pair seen = {{0, 0}};\n"
    "  if (p.rank == grid_row())\n"
    "    for (const u64 from = time_ns(); time_ns() - from < 150000000ull;) {\n"
    "    }\n",
)


def test_a_mark_that_is_late_is_no_mismatch(build: Build) -> None:
    """A wait compares marks while this rank's own is not yet there."""
    case = Case(2, 24, 32, max_tokens=2)
    assert emulate(build(case, edits=(_HELD,)), (2, 2), seed=0).problem() == ""
    taken_for_one = Edit(_PROTOCOL, "marked == of_call + 1 && ", "")
    assert "fault 2" in emulate(build(case, edits=(_HELD, taken_for_one)), (2, 2), seed=0).problem()


# Mutated twins

_PROTOCOL, _GATHER, _ONE, _TWO, _SHARDED, _ALL_GATHER = (
    f"{name}.cuh" for name in ("protocol", "gather", "one_shot", "two_shot", "sharded", "all_gather")
)
#: Small cases: one warp to a row, and two CTAs to a row.
_SMALL = {
    kernel: Case(2, 24, 32, kernel=kernel, max_tokens=3) for kernel in ("one_shot", "two_shot", "sharded", "reduce_scatter", "all_gather")
}
_WIDE = {kernel: replace(case, hidden_size=264) for kernel, case in _SMALL.items()}
_CODES = Case(2, 32, 32, kernel="sharded", quant=NVFP4(37.5))
_TWO_WARPS = Case(2, 512, 64, kernel="all_gather")

_POLL = "waiting = any_in_warp(missing());"
_ARGUMENTS = (
    "(grid_row() * blocks_in_row() + block_in_row()) * C::kThreads + thread_index(), grid_rows() * blocks_in_row() * C::kThreads / 32"
)


def not_waited_for(stage: str) -> Edit:
    return Edit(_PROTOCOL, _POLL, f"waiting = any_in_warp(missing()) && stage != {stage};")


def read_early(file: str) -> tuple[Edit, Edit]:
    wait, ask = "  wait_for_previous_kernel();\n", "  ranks.ask();\n"
    return Edit(file, ask, ""), Edit(file, wait, ask + wait)


def advanced_early(file: str, announce: str, left: str = "") -> tuple[Edit, Edit]:
    return Edit(file, announce, ""), Edit(file, "  ranks.ask();\n", f"  ranks.announce({_ARGUMENTS}{left});\n  ranks.ask();\n")


_NO_DISGUISE = Edit(_PROTOCOL, "v.part[i].w[j] == D::kSentinel ? 0u : v.part[i].w[j]", "v.part[i].w[j]")
_ONE_GENERATION = Edit(_PROTOCOL, "kGenerations = 2,", "kGenerations = 1,")
_PREVIOUS = "  wait_for_previous_kernel();\n"
_CLEAN = "call % 2 ? head.w[3] & 0xffffu : head.w[3] >> 16"

MUTANTS: dict[str, tuple[Case, tuple[Edit, ...]]] = {
    "one_shot: partials not waited for": (_SMALL["one_shot"], (not_waited_for("kStagePartials"),)),
    "one_shot: one generation": (_SMALL["one_shot"], (Edit(_PROTOCOL, "kOneShotGenerations = 4;", "kOneShotGenerations = 1;"),)),
    "one_shot: two generations": (_SMALL["one_shot"], (Edit(_PROTOCOL, "kOneShotGenerations = 4;", "kOneShotGenerations = 2;"),)),
    "one_shot: not cleaned": (_SMALL["one_shot"], (Edit(_PROTOCOL, _CLEAN, "0"),)),
    "one_shot: as much cleaned as two calls ago": (
        _WIDE["one_shot"],
        (Edit(_PROTOCOL, _CLEAN, "call % 2 ? head.w[3] >> 16 : head.w[3] & 0xffffu"),),
    ),
    "one_shot: cleaned too early": (_SMALL["one_shot"], (Edit(_PROTOCOL, "(call - 1) % kOneShot", "call % kOneShot"),)),
    "one_shot: the next generation cleaned": (_SMALL["one_shot"], (Edit(_PROTOCOL, "(call - 1) % kOneShot", "(call + 1) % kOneShot"),)),
    "one_shot: no disguise": (_SMALL["one_shot"], (_NO_DISGUISE,)),
    "one_shot: counter read early": (_SMALL["one_shot"], read_early(_ONE)),
    "one_shot: counter advanced early": (
        _SMALL["one_shot"],
        advanced_early(_ONE, "ranks.announce(thread, threads / 32, Ranks<C>::kPeers * p.slot_bytes);", ", Ranks<C>::kPeers * p.slot_bytes"),
    ),
    "one_shot: previous kernel not waited for": (_SMALL["one_shot"], (Edit(_ONE, _PREVIOUS, ""),)),
    "one_shot: a vector too far": (
        _SMALL["one_shot"],
        (Edit(_PROTOCOL, "send_vector(place[k], v)", "send_vector(place[k] + 112, v)"),),
    ),
    "row exchange not waited for": (
        _WIDE["one_shot"],
        (Edit("exchange.cuh", "barrier_wait(&buffer.barrier[odd], C::kLoop ? (turn >> 1) & 1u : 0u);", ""),),
    ),
    "group maxima overwritten by the next row": (
        Case(2, 768, 96, kernel="local", rows=1, residual=False, norm=False, quant=FP8Group(48)),
        (Edit("row.cuh", "#endif\n    sync_block();\n  }\n", "#endif\n  }\n"),),
    ),
    "barriers of the cluster not waited for": (
        Case(2, 264, 32, kernel="local"),
        (Edit("row.cuh", "if constexpr (kBarrierAtStart && C::kClustered) cluster_wait();", ""),),
    ),
    "two_shot: partials not waited for": (_SMALL["two_shot"], (not_waited_for("kStagePartials"),)),
    "two_shot: y not waited for": (_SMALL["two_shot"], (not_waited_for("kStageRows"),)),
    "two_shot: one generation": (_SMALL["two_shot"], (_ONE_GENERATION,)),
    "two_shot: partials not wiped": (_SMALL["two_shot"], (Edit(_TWO, "if (owns(i)) ranks.wipe_terms(offset(t, i), true);", ""),)),
    "two_shot: y not wiped": (_SMALL["two_shot"], (Edit(_TWO, "if (gives(i) && !ranks.stopped)", "if (false)"),)),
    "two_shot: y wiped elsewhere": (
        _SMALL["two_shot"],
        (Edit(_TWO, "(ranks.arrivals(owner[i]) + y_offset(t, i))", "(ranks.arrivals(owner[i]) + offset(t, i))"),),
    ),
    "two_shot: wiped before the wait": (
        _SMALL["two_shot"],
        (Edit(_TWO, "      shot.await_y(y[i], t, i);", "      shot.wipe_y(t, i);\n      shot.await_y(y[i], t, i);"),),
    ),
    "two_shot: y sent to the place of partials": (
        _SMALL["two_shot"],
        (Edit(_TWO, "ranks.target(k) + y_offset(t, i)", "ranks.target(k) + offset(t, i)"),),
    ),
    "two_shot: no disguise": (_SMALL["two_shot"], (_NO_DISGUISE,)),
    "two_shot: counter read early": (replace(_TWO_WARPS, kernel="two_shot"), read_early(_TWO)),
    "two_shot: counter advanced early": (_SMALL["two_shot"], advanced_early(_TWO, "ranks.announce(thread, threads / 32);")),
    "two_shot: previous kernel not waited for": (_SMALL["two_shot"], (Edit(_TWO, _PREVIOUS, ""),)),
    "sharded: partials not waited for": (_SMALL["sharded"], (not_waited_for("kStagePartials"),)),
    "sharded: finished rows not waited for": (_CODES, (not_waited_for("kStageRows"),)),
    "sharded: one generation": (_SMALL["sharded"], (_ONE_GENERATION,)),
    "sharded: partials not wiped": (
        _SMALL["sharded"],
        (Edit(_SHARDED, "ranks.wipe_terms(offset + row.vector(i) * 8 * D::kBytes, row.active(i));", ";"),),
    ),
    "sharded: norms not wiped": (_SMALL["sharded"], (Edit(_GATHER, "Ranks<C>::wipe_vector(values_place);", ""),)),
    "sharded: codes not wiped": (_CODES, (Edit(_GATHER, "      store_word(codes_place, D::kSentinel);\n", ""),)),
    "sharded: scales not wiped": (_CODES, (Edit(_GATHER, "store_word(scale_place, D::kSentinel);", ";"),)),
    "sharded: no disguise": (_SMALL["sharded"], (_NO_DISGUISE,)),
    "sharded: E8M0 bytes as they are": (TURNED[torch.float32][0], (Edit(_GATHER, "Quant::kMX ? 0x7e7e7e7eu : 0u", "0u"),)),
    "sharded: previous kernel not waited for": (_SMALL["sharded"], (Edit(_SHARDED, _PREVIOUS, ""),)),
    "reduce_scatter: partials not waited for": (_SMALL["reduce_scatter"], (not_waited_for("kStagePartials"),)),
    "reduce_scatter: start of the others not waited for": (_SMALL["reduce_scatter"], (not_waited_for("kStageStart"),)),
    "reduce_scatter: one generation": (_SMALL["reduce_scatter"], (_ONE_GENERATION,)),
    "all_gather: flags not waited for": (_SMALL["all_gather"], (not_waited_for("kStageShard"),)),
    "all_gather: flag sent without a fence": (_SMALL["all_gather"], (Edit(_ALL_GATHER, "    if (peer) fence_system();\n", ""),)),
    "all_gather: flag sent before the other warps": (
        _TWO_WARPS,
        (Edit(_ALL_GATHER, "  sync_block();\n  if (warp == 0) {\n", "  if (warp == 0) {\n"),),
    ),
    "all_gather: one generation": (_SMALL["all_gather"], (_ONE_GENERATION,)),
    "all_gather: flag not wiped": (
        _SMALL["all_gather"],
        (Edit(_ALL_GATHER, "store_word(reinterpret_cast<u8*>(flag), D::kSentinel);", ";"),),
    ),
    "all_gather: previous kernel not waited for": (_SMALL["all_gather"], (Edit(_ALL_GATHER, _PREVIOUS, ""),)),
}
MOST_SEEDS = 8
#: One in use, one that a rank behind still reads, one that is being cleaned (docs/design.md).
THREE_GENERATIONS = Edit(_PROTOCOL, "kOneShotGenerations = 4;", "kOneShotGenerations = 3;")


def seeds_needed(library: Library) -> tuple[int, str]:
    """Runs until one is not as it should be: how many, and what was seen. Modes take turns. (0, "") if none was."""
    terms = turning(3) if library.cases[0] == TURNED[torch.float32][0] else None
    for seed in range(MOST_SEEDS):
        mode = PRESENT[-1 - seed % len(PRESENT)]
        run = emulate(library, TOKENS, seed=seed, mode=mode, victim=seed // 4 % 2, terms=terms, timeout=0.1)
        if run.problem():
            return seed + 1, run.problem()
    return 0, ""


@pytest.mark.parametrize("name", MUTANTS)
def test_a_mutated_twin_is_caught(build: Build, name: str, record_property: Callable[[str, object], None]) -> None:
    case, edits = MUTANTS[name]
    seeds, seen = seeds_needed(build(case, edits=edits))
    assert seeds, f"{name}: {MOST_SEEDS} runs saw nothing"
    record_property("told", f"emulator: {name}: caught by seed {seeds} of {MOST_SEEDS}: {seen}")


def test_three_generations_would_do(build: Build) -> None:
    """Of one-shot: so the twins with fewer are caught by what goes wrong, not by the count."""
    assert seeds_needed(build(_SMALL["one_shot"], edits=(THREE_GENERATIONS,))) == (0, "")


@pytest.mark.parametrize("case", dict.fromkeys(case for case, _ in MUTANTS.values()), ids=str)
def test_the_unmutated_kernel_is_not_caught(build: Build, case: Case) -> None:
    assert seeds_needed(build(case)) == (0, "")


def test_an_edit_must_find_its_text(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="0 times"):
        compile_cases((_SMALL["one_shot"],), tmp_path, (Edit(_PROTOCOL, "no such text", ""),))

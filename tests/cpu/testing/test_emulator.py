"""The kernels on the CPU under an adversarial scheduler: results and failures."""

from __future__ import annotations

import random
import re
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from emulated import PRESENT, PROTOCOL, TOKENS, TURNED, TWO_WARPS, Build, turning

from collogue.contract.formats import scale_storage
from collogue.contract.quant import MXFP4, MXFP8, NVFP4, FP8Group, FP8PerToken, FP8Static
from collogue.gpu.failure import MISMATCH, TIMEOUT
from collogue.testing.emulator import Ask, Case, Edit, Library, emulate
from collogue.testing.inputs import KINDS

pytestmark = pytest.mark.slow

MANY_TOKENS = (5, 1, 2, 4, 1, 3)  # fewer than ranks, and more
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
    "sharded-no-norm": Case(2, 576, 64, kernel="sharded", rows=1, residual=False, norm=False, quant=NVFP4(37.5), max_tokens=5),
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


# Padding that is there from an earlier call

PADDED = {
    "128x4": Case(2, 576, 64, quant=NVFP4(37.5)),  # padding of rows; below of columns too
    "128x4-columns": Case(2, 288, 64, quant=NVFP4(37.5), max_tokens=3, rows=2),
    "8x4-launches": Case(3, 288, 64, kernel="two_shot", quant=NVFP4(37.5, "8x4"), max_tokens=5, launches=3),
    "float-columns": Case(2, 288, 64, kernel="sharded", quant=FP8Group(16, layout="column"), max_tokens=7, launches=2, rows=1),
    "packed-columns": Case(
        2, 576, 64, kernel="reduce_scatter", vectors=2, quant=FP8Group(48, scale_format="ue8m0", layout="column"), max_tokens=6
    ),
    "all-gather": Case(2, 288, 64, kernel="all_gather", quant=MXFP8(rounding="floor"), max_tokens=7),
    "local": Case(2, 288, 64, kernel="local", quant=NVFP4(37.5)),
}


@pytest.mark.parametrize("name", PADDED)
def test_padding_that_is_not_asked_for_is_not_written(build: Build, name: str) -> None:
    """Not one byte of it, and all else as ever. Ranks need not agree: each speaks of its own memory."""
    case = PADDED[name]
    library = build(case)
    every, none = (Ask(case.max_tokens, write_padding=write) for write in (True, False))
    for seed, mode in enumerate(PRESENT):
        run = emulate(library, [none, every, none], seed=seed, mode=mode, victim=seed % 2)
        assert run.problem() == "", mode
        left = [scale_storage(run.outputs[call][0].scales) == 0xEE for call in (0, 1)]  # type: ignore[arg-type]
        assert left[0].sum() > left[1].sum()
    mixed = [[none, *[every] * (case.world - 1)], every]
    run = emulate(library, mixed, seed=7)
    assert (run.error, run.leftover, [record.fault for record in run.failures]) == ("", 0, [0] * case.world)


def test_padding_that_must_not_be_written_is_seen(build: Build) -> None:
    written = Edit("opening.cuh", "scale_rows = ranks.p.scale_rows;", "scale_rows = ranks.p.tokens;")
    run = emulate(build(PADDED["128x4"], edits=(written,)), [Ask(3, write_padding=False)], seed=0)
    assert re.search(r"scales\[.*: 0x00 \(0\), expected 0xee", run.problem())


# Words that look like the sentinel


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


# Weights and scales that the kernel before writes

SCALE = torch.tensor([37.5])
LATE = {
    "one-shot": Case(2, 288, 32, quant=NVFP4(SCALE), prefetch=False),
    "one-shot-loop": Case(2, 264, 32, rows=1, quant=FP8Static(SCALE), prefetch=False),
    "one-shot-vectors": Case(2, 576, 64, vectors=2, rows=1, quant=NVFP4(SCALE), prefetch=False),
    "two-shot": Case(2, 576, 64, kernel="two_shot", quant=FP8Static(SCALE), prefetch=False),
    "sharded": Case(2, 288, 64, kernel="sharded", quant=NVFP4(SCALE), keep_norm=True, max_tokens=5, prefetch=False),
    "reduce-scatter": Case(3, 64, 32, kernel="reduce_scatter", quant=FP8Static(SCALE), max_tokens=5, prefetch=False),
    "local": Case(2, 576, 96, kernel="local", quant=NVFP4(SCALE), prefetch=False),
    "local-loop": Case(2, 288, 64, kernel="local", rows=1, quant=FP8Static(SCALE), prefetch=False),
}


@pytest.mark.parametrize("between", [0, 1])
@pytest.mark.parametrize("name", LATE)
def test_a_weight_and_a_scale_that_are_written_late(build: Build, name: str, between: int) -> None:
    """By the kernel before the call, or the one before that, which have let the next kernel start long before."""
    library = build(LATE[name])
    for seed in range(2):
        run = emulate(library, tokens_of(LATE[name])[:3], seed=seed, mode=PRESENT[seed], victim=0, written_late=between)
        assert run.problem() == "", seed


#: Read before the wait for the kernel before.
_TABLE = (
    Edit("formats/nvfp4.cuh", "    if (!p.scale) fill<C>(shared);", "    if (p.scale) scale = *p.scale;\n    fill<C>(shared);"),
    Edit("formats/nvfp4.cuh", "    if (!p.scale) return;", "    return;"),
)
_SCALE = (
    Edit("opening.cuh", "    row.ask();\n", ""),
    Edit("opening.cuh", "    wait_for_previous_kernel();\n", "    row.ask();\n    wait_for_previous_kernel();\n"),
)


@pytest.mark.parametrize("between", [0, 1])
@pytest.mark.parametrize(
    ("case", "edits"),
    [(Case(2, 264, 32), ()), (replace(LATE["one-shot"], norm=False), _TABLE), (replace(LATE["two-shot"], norm=False), _SCALE)],
    ids=["weight", "table", "scale"],
)
def test_what_is_read_early_is_seen(build: Build, case: Case, edits: tuple[Edit, ...], between: int) -> None:
    """The emulator shows the fault that the tests above are there for."""
    library = build(case, edits=edits)
    assert any(emulate(library, (2, 3), seed=seed, written_late=between).problem() for seed in range(4))


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
    library = build(replace(TWO_WARPS, rows=rows))
    for seed in range(8):
        run = emulate(library, (2, 3, 3), seed=seed, mode="absent", victim=seed % 2, absent_call=1, timeout=0.2)
        waiting = 1 - seed % 2
        assert [(f.fault, f.rank) for f in run.failures] == [(TIMEOUT, waiting)] * 2, seed
        assert run.failures[waiting].late_rank == seed % 2


def test_a_row_that_comes_in_part(build: Build) -> None:
    """In the last call the second warps' words of rank 1 stay away: whoever waits has a record, and a timeout names rank 1."""
    send = "if (!active || stopped || offset >= p.slot_bytes) return;"
    held_back = Edit(PROTOCOL, send, f"if (p.rank == 1 && call == 1 && thread_index() >= 32) return;\n{send}")
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
        PROTOCOL, send, f"if (p.rank == 1 && call == 1 && thread_index() / 32 <= offset / (p.hidden * D::kBytes)) return;\n{send}"
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
    trusting = Edit(PROTOCOL, "smaller(units * kLeftUnit, p.one_shot_bytes)", "left * kLeftUnit")
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
    assert silent(build(case, edits=(_SLOW_LOOK, Edit(PROTOCOL, f"if (any_in_warp(rank != kNobody)) {stop}", stop)))) > 0


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


#: Every lane looks at the stop word at a time of its own.
_SLOWLY = """[&] {
      u32 word = 0;
      for (u32 i = 0; i <= thread_index() % 32 * 8; i++) word = load_peer_written_word(&control()->stop);
      return word;
    }()"""


def test_lanes_decide_alike(build: Build) -> None:
    """A stop word that arrives while the lanes of a warp look for it: one lane's answer counts for all."""
    look = "load_peer_written_word(&control()->stop)"

    def errors(library: Library) -> list[str]:
        timeouts = {"absent_call": 1, "timeout": 0.05}
        runs = [emulate(library, (2, 3, 3), seed=seed, mode="absent", victim=seed % 3, **timeouts) for seed in range(6)]  # type: ignore[arg-type]
        return [run.error for run in runs if run.error]

    case = Case(3, 264, 32, max_tokens=3)
    assert errors(build(case, edits=(Edit(PROTOCOL, look, _SLOWLY),))) == []
    assert errors(build(case, edits=(Edit(PROTOCOL, f"of_lane({look}, 0)", _SLOWLY),))) != []


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
    "opening.cuh",
    "    ranks.begin_call();\n",
    "    ranks.begin_call();\n"
    "    if (ranks.p.rank == grid_row())\n"
    "      for (const u64 from = time_ns(); time_ns() - from < 150000000ull;) {\n"
    "      }\n",
)


def test_a_mark_that_is_late_is_no_mismatch(build: Build) -> None:
    """A wait compares marks while this rank's own is not yet there."""
    case = Case(2, 24, 32, max_tokens=2)
    assert emulate(build(case, edits=(_HELD,)), (2, 2), seed=0).problem() == ""
    taken_for_one = Edit(PROTOCOL, "marked == of_call + 1 && ", "")
    assert "fault 2" in emulate(build(case, edits=(_HELD, taken_for_one)), (2, 2), seed=0).problem()

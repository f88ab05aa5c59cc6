"""Mutated twins: the kernel sources with one mistake in the protocol, each of which the emulator must catch."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from emulated import PRESENT, PROTOCOL, TOKENS, TURNED, TWO_WARPS, Build, turning

from collogue.contract.quant import NVFP4, FP8Group
from collogue.testing.emulator import Case, Edit, Library, compile_cases, emulate

pytestmark = pytest.mark.slow

_GATHER, _ONE, _TWO, _SHARDED, _ALL_GATHER = (f"{name}.cuh" for name in ("gather", "one_shot", "two_shot", "sharded", "all_gather"))
#: Small cases: one warp to a row, and two CTAs to a row.
_SMALL = {
    kernel: Case(2, 24, 32, kernel=kernel, max_tokens=3) for kernel in ("one_shot", "two_shot", "sharded", "reduce_scatter", "all_gather")
}
_WIDE = {kernel: replace(case, hidden_size=264) for kernel, case in _SMALL.items()}
_CODES = Case(2, 32, 32, kernel="sharded", quant=NVFP4(37.5))

_POLL = "waiting = any_in_warp(missing());"
_ARGUMENTS = (
    "(grid_row() * blocks_in_row() + block_in_row()) * C::kThreads + thread_index(), grid_rows() * blocks_in_row() * C::kThreads / 32"
)


def not_waited_for(stage: str) -> Edit:
    return Edit(PROTOCOL, _POLL, f"waiting = any_in_warp(missing()) && stage != {stage};")


_OPENING = "opening.cuh"
_PREVIOUS, _ASK = "    wait_for_previous_kernel();\n", "    ranks.ask();\n"
NOT_AWAITED = Edit(_OPENING, _PREVIOUS, "")
READ_EARLY = Edit(_OPENING, _PREVIOUS + _ASK, _ASK + _PREVIOUS)


def advanced_early(left: str = "0") -> tuple[Edit, Edit]:
    announce = "    ranks.announce(thread, threads / 32, left);\n"
    return Edit(_OPENING, announce, ""), Edit(_OPENING, _ASK, f"    ranks.announce({_ARGUMENTS}, {left});\n{_ASK}")


_NO_DISGUISE = Edit(PROTOCOL, "v.part[i].w[j] == D::kSentinel ? 0u : v.part[i].w[j]", "v.part[i].w[j]")
_ONE_GENERATION = Edit(PROTOCOL, "kGenerations = 2,", "kGenerations = 1,")
_CLEAN = "call % 2 ? head.w[3] & 0xffffu : head.w[3] >> 16"

MUTANTS: dict[str, tuple[Case, tuple[Edit, ...]]] = {
    "one_shot: partials not waited for": (_SMALL["one_shot"], (not_waited_for("kStagePartials"),)),
    "one_shot: one generation": (_SMALL["one_shot"], (Edit(PROTOCOL, "kOneShotGenerations = 4;", "kOneShotGenerations = 1;"),)),
    "one_shot: two generations": (_SMALL["one_shot"], (Edit(PROTOCOL, "kOneShotGenerations = 4;", "kOneShotGenerations = 2;"),)),
    "one_shot: not cleaned": (_SMALL["one_shot"], (Edit(PROTOCOL, _CLEAN, "0"),)),
    "one_shot: as much cleaned as two calls ago": (
        _WIDE["one_shot"],
        (Edit(PROTOCOL, _CLEAN, "call % 2 ? head.w[3] >> 16 : head.w[3] & 0xffffu"),),
    ),
    "one_shot: cleaned too early": (_SMALL["one_shot"], (Edit(PROTOCOL, "(call - 1) % kOneShot", "call % kOneShot"),)),
    "one_shot: the next generation cleaned": (_SMALL["one_shot"], (Edit(PROTOCOL, "(call - 1) % kOneShot", "(call + 1) % kOneShot"),)),
    "one_shot: no disguise": (_SMALL["one_shot"], (_NO_DISGUISE,)),
    "one_shot: counter read early": (_SMALL["one_shot"], (READ_EARLY,)),
    "one_shot: counter advanced early": (
        _SMALL["one_shot"],
        advanced_early("Ranks<C>::kPeers * ranks.p.slot_bytes"),
    ),
    "one_shot: previous kernel not waited for": (_SMALL["one_shot"], (NOT_AWAITED,)),
    "one_shot: a vector too far": (
        _SMALL["one_shot"],
        (Edit(PROTOCOL, "send_vector(place[k], v)", "send_vector(place[k] + 112, v)"),),
    ),
    "row exchange not waited for": (
        _WIDE["one_shot"],
        (Edit("exchange.cuh", "barrier_wait(&buffer.barrier[odd], C::kLoop ? (turn >> 1) & 1u : 0u);", ""),),
    ),
    "row exchange: blocks zeroed that others send": (
        _WIDE["one_shot"],
        (Edit("exchange.cuh", "for (u32 i = blocks + thread_index()", "for (u32 i = thread_index()"),),
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
    "two_shot: partials not cleared": (_SMALL["two_shot"], (Edit(_TWO, "if (owns(i)) ranks.wipe_terms(offset(t, i), true);", ""),)),
    "two_shot: y not cleared": (_SMALL["two_shot"], (Edit(_TWO, "if (gives(i) && !ranks.stopped)", "if (false)"),)),
    "two_shot: y cleared elsewhere": (
        _SMALL["two_shot"],
        (Edit(_TWO, "(ranks.arrivals(owner[i]) + y_offset(t, i))", "(ranks.arrivals(owner[i]) + offset(t, i))"),),
    ),
    "two_shot: cleared before the wait": (
        _SMALL["two_shot"],
        (Edit(_TWO, "      shot.await_y(y[i], t, i);", "      shot.wipe_y(t, i);\n      shot.await_y(y[i], t, i);"),),
    ),
    "two_shot: y sent to the place of partials": (
        _SMALL["two_shot"],
        (Edit(_TWO, "ranks.target(k) + y_offset(t, i)", "ranks.target(k) + offset(t, i)"),),
    ),
    "two_shot: no disguise": (_SMALL["two_shot"], (_NO_DISGUISE,)),
    "two_shot: counter read early": (replace(TWO_WARPS, kernel="two_shot"), (READ_EARLY,)),
    "two_shot: counter advanced early": (_SMALL["two_shot"], advanced_early()),
    "two_shot: previous kernel not waited for": (_SMALL["two_shot"], (NOT_AWAITED,)),
    "sharded: partials not waited for": (_SMALL["sharded"], (not_waited_for("kStagePartials"),)),
    "sharded: finished rows not waited for": (_CODES, (not_waited_for("kStageRows"),)),
    "sharded: one generation": (_SMALL["sharded"], (_ONE_GENERATION,)),
    "sharded: partials not cleared": (
        _SMALL["sharded"],
        (Edit(_SHARDED, "ranks.wipe_terms(offset + row.vector(i) * 8 * D::kBytes, row.active(i));", ";"),),
    ),
    "sharded: norms not cleared": (_SMALL["sharded"], (Edit(_GATHER, "Ranks<C>::wipe_vector(values_place);", ""),)),
    "sharded: codes not cleared": (_CODES, (Edit(_GATHER, "      store_word(codes_place, D::kSentinel);\n", ""),)),
    "sharded: scales not cleared": (_CODES, (Edit(_GATHER, "store_word(scale_place, D::kSentinel);", ";"),)),
    "sharded: no disguise": (_SMALL["sharded"], (_NO_DISGUISE,)),
    "sharded: E8M0 bytes as they are": (TURNED[torch.float32][0], (Edit("formats/mx.cuh", "kTurned = 0x7e7e7e7eu;", "kTurned = 0;"),)),
    "sharded: previous kernel not waited for": (_SMALL["sharded"], (NOT_AWAITED,)),
    "reduce_scatter: partials not waited for": (_SMALL["reduce_scatter"], (not_waited_for("kStagePartials"),)),
    "reduce_scatter: start of the others not waited for": (_SMALL["reduce_scatter"], (not_waited_for("kStageStart"),)),
    "reduce_scatter: one generation": (_SMALL["reduce_scatter"], (_ONE_GENERATION,)),
    "all_gather: flags not waited for": (_SMALL["all_gather"], (not_waited_for("kStageShard"),)),
    "all_gather: flag sent without a fence": (_SMALL["all_gather"], (Edit(_ALL_GATHER, "    if (peer) fence_system();\n", ""),)),
    "all_gather: flag sent before the other warps": (
        TWO_WARPS,
        (Edit(_ALL_GATHER, "  sync_block();\n  if (warp == 0) {\n", "  if (warp == 0) {\n"),),
    ),
    "all_gather: one generation": (_SMALL["all_gather"], (_ONE_GENERATION,)),
    "all_gather: flag not cleared": (
        _SMALL["all_gather"],
        (Edit(_ALL_GATHER, "store_word(reinterpret_cast<u8*>(flag), D::kSentinel);", ";"),),
    ),
    "all_gather: previous kernel not waited for": (_SMALL["all_gather"], (NOT_AWAITED,)),
}
MOST_SEEDS = 8
#: One in use, one that a rank behind still reads, one that is being cleaned (docs/design.md).
THREE_GENERATIONS = Edit(PROTOCOL, "kOneShotGenerations = 4;", "kOneShotGenerations = 3;")


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
        compile_cases((_SMALL["one_shot"],), tmp_path, (Edit(PROTOCOL, "no such text", ""),))

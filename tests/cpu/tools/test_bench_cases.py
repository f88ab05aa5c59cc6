"""What `collogue bench` times: suites, chosen shapes, and kernels of the floors, which compile."""

from __future__ import annotations

import pytest

from collogue.errors import FormatError
from collogue.gpu import jit
from collogue.planning.architecture import ARCHITECTURES
from collogue.tools.bench import latency
from collogue.tools.bench.baselines import alone, can
from collogue.tools.bench.cases import (
    CHAIN_TOKENS,
    COMPILED,
    DEFAULT_SUITES,
    FLASHINFER_TWO_SHOT,
    FLASHINFER_WAYS,
    FORMATS,
    KEPT,
    LARGE_TOKENS,
    NCCL,
    SUITES,
    TOKENS,
    VLLM,
    chosen_rounds,
    default_rounds,
    has_chain,
    suite,
    with_libraries,
    without_compiled,
)
from collogue.tools.bench.floors import source
from collogue.tools.bench.latency import suite_rounds
from collogue.tools.bench.names import label
from collogue.tools.bench.rank import _call
from collogue.tools.check import Case


def test_the_default_rounds_hold_what_is_promised() -> None:
    rounds = default_rounds(4)
    decode = [r for r in rounds if r.section == "decode"]
    assert [r.shape.tokens for r in decode] == list(TOKENS)
    for r in rounds:
        shapes = {(c.tokens, c.hidden_size, c.dtype, c.world_size) for c in r.cases}
        assert shapes == {(r.shape.tokens, r.shape.hidden_size, "bfloat16", 4)}
        assert NCCL in r.baselines
        assert len({str(c) for c in r.cases}) == len({label_of(c) for c in r.cases}) == len(r.cases)
    assert all(len(r.cases) == len(FORMATS) + len(KEPT) + 1 for r in decode)
    assert {r.shape.hidden_size for r in rounds} == {2048, 2880, 4096, 5120, 7168, 8192, 12800, 16384}
    assert [r.shape.tokens for r in rounds if r.section == "large"] == list(LARGE_TOKENS)
    assert all(c.possible for r in rounds for c in r.cases)


def label_of(case: Case) -> str:
    return label({"what": "collogue", **_call(case)})


def test_chosen_rounds_are_the_product_of_the_lists() -> None:
    rounds = chosen_rounds(2, tokens=[3, 300], hidden_size=[64], dtype=["float16", "float32"], format=["nvfp4/8x4", "none", "nvfp4/8x4"])
    assert [(r.shape.dtype, r.shape.tokens) for r in rounds] == [("float16", 3), ("float16", 300), ("float32", 3), ("float32", 300)]
    assert [c.format for c in rounds[0].cases] == ["nvfp4/8x4", "none"]
    assert [r.shape.tokens for r in chosen_rounds(2, format=["none"])] == list(TOKENS)
    with pytest.raises(FormatError, match="int8"):
        chosen_rounds(2, dtype=["int8"])
    with pytest.raises(FormatError, match="fp5"):
        chosen_rounds(2, format=["fp5"])


def test_compile_time_is_taken_of_different_kernels() -> None:
    assert [c.format for c in latency.compiled_cases(default_rounds(2))] == ["none", "nvfp4/128x4", "fp8_static"]


@pytest.mark.slow
@pytest.mark.parametrize("world_size", [2, 8])
def test_the_floors_compile(world_size: int) -> None:
    for architecture in ARCHITECTURES:
        code, log = jit.compile_source(source(world_size), architecture, "collogue_floors", verbose=True)
        assert len(code) > 1000
        for name in ("empty", "exchange", "wire"):
            assert f"collogue_floor_{name}" in log
        assert log.count("0 bytes spill stores, 0 bytes spill loads") == 3


@pytest.mark.parametrize("name", SUITES)
def test_every_suite_has_rounds_of_one_shape_each(name: str) -> None:
    rounds = suite(name, 4)
    assert len({r.section.split(",")[0] for r in rounds}) == 1
    for r in rounds:
        assert {(c.tokens, c.hidden_size, c.dtype, c.world_size) for c in r.cases} == {
            (r.shape.tokens, r.shape.hidden_size, r.shape.dtype, 4)
        }
        assert len(set(r.cases)) == len(r.cases)
        assert all(c.possible for c in r.cases)
        assert (r.timing == "eager") == (name == "eager")


def test_the_chains_are_timed_where_a_case_has_one() -> None:
    for name in ("latency", "bandwidth", "eager"):
        chained = [r for r in suite(name, 2) if r.chains]
        assert chained
        for r in chained:
            assert r.shape.tokens in CHAIN_TOKENS
            assert {c.format for c in r.cases if has_chain(c)} >= {"none", "nvfp4/128x4", "fp8_static"}
            assert any(name.startswith(NCCL) for name in r.chains)


def test_named_libraries_stand_in_the_place_of_the_suites() -> None:
    """Alone and for the whole call; a compiled epilogue only where the suite has one. Two hops want more tokens than ranks."""
    rounds = [with_libraries(round, ("flashinfer", "vllm")) for round in suite("latency", 2)]
    assert {round.baselines for round in rounds} == {(*FLASHINFER_WAYS, VLLM)}
    found = {round.shape.tokens: round.chains for round in rounds}
    assert (found[1], found[2]) == ((VLLM + COMPILED, *FLASHINFER_WAYS), FLASHINFER_WAYS)
    assert {without_compiled(round).chains for round in rounds} == {FLASHINFER_WAYS}
    for round in rounds[:3]:
        formats = {c.format for c in round.cases if can(FLASHINFER_TWO_SHOT, c)}
        assert formats == ({"none", "fp8_static"} if round.shape.tokens > 2 else set())
        assert can(FLASHINFER_TWO_SHOT, alone(round.shape)) == (round.shape.tokens > 2)
        assert all(can(VLLM + COMPILED, c) == has_chain(c) for c in round.cases)


def test_the_epilogue_suite_has_every_part_once() -> None:
    cases = suite("epilogues", 2)[0].cases
    assert {(c.residual, c.norm) for c in cases} == {(True, True), (False, True), (True, False), (False, False)}
    assert {c.keep_norm for c in cases} == {False, True}
    assert {c.weight_dtype for c in cases} == {None, "float32"}
    assert any(not c.norm and c.format != "none" for c in cases)


def test_the_suite_sms_has_a_section_for_each_limit() -> None:
    """Floors are taken from the round with the same section and shape."""
    rounds = suite("sms", 2)
    assert suite("multiprocessors", 2) == rounds  # its former name
    assert [r.overrides.max_sms for r in rounds if r.shape.tokens == 256] == [8, 16, 32, 64, None]
    assert len({(r.section, r.shape.tokens) for r in rounds}) == len(rounds) == 15
    assert all([(c.operation, c.family) for c in r.cases] == _LIMITED for r in rounds)


_LIMITED = [("all_reduce", "none"), ("sharded", "nvfp4"), ("sharded", "fp8_per_token")]


def test_a_suite_that_is_not_there() -> None:
    with pytest.raises(FormatError, match="unknown suite 'speed'"):
        suite("speed", 2)


def test_the_suite_world_runs_on_every_world_size() -> None:
    found = suite_rounds(("latency", "world"), [4])
    assert sorted(found) == [2, 3, 4]
    assert [r.section for r in found[2]] == ["world"] * 4
    assert {r.section for r in found[4]} == {"decode", "world"}
    assert sorted(suite_rounds(("world",), [4], given=True)) == [4]
    assert [str(r) for r in suite_rounds(DEFAULT_SUITES, [2])[2]] == [str(r) for r in default_rounds(2)]

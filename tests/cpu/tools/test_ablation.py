"""`collogue ablate`: every switch still fits the kernels, does what it says, and is compared with the kernels as they are."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from collogue import kernels
from collogue.errors import FormatError, PlatformError
from collogue.gpu import engine as cuda
from collogue.gpu import jit
from collogue.planning.architecture import COVERED
from collogue.planning.plan import LaunchShape, make_plan
from collogue.testing import VirtualGroup, emulator, run_virtual
from collogue.testing.emulator import Edit
from collogue.tools.ablation import facts, main, rank
from collogue.tools.ablation.build import Builder, edit_sources, planned_for, topology_of, variant_of
from collogue.tools.ablation.switches import HARDWARE, SWITCHES, Switch, chosen
from collogue.tools.bench.timing import Latency
from collogue.tools.check import Case
from collogue.tools.check.kernels import request_of
from collogue.tools.cli import app
from collogue.tools.commands.options import IMPOSSIBLE, OK, USAGE

pytestmark = pytest.mark.slow

BY_NAME = {switch.name: switch for switch in SWITCHES}
CASE = Case(1, 7168, format="nvfp4/128x4", keep_norm=False)


@pytest.mark.parametrize("switch", SWITCHES, ids=lambda s: s.name)
def test_every_edit_finds_its_text(switch: Switch, tmp_path: Path) -> None:
    edit_sources(tmp_path, switch.edits)
    changed = {name for name, text in kernels.sources().items() if (tmp_path / name).read_text() != text}
    assert changed == {edit.file for edit in switch.edits}


def test_a_text_that_is_not_there_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="0 times"):
        edit_sources(tmp_path, (Edit("row.cuh", "no such text", ""),))


def compiled(names: list[str], architecture: str) -> dict[str, dict[str, Any]]:
    return {row["switch"]: row for row in facts.compiled([BY_NAME[name] for name in names], [CASE], [architecture])}


def test_switches_change_the_instructions_they_are_about() -> None:
    hopper = compiled(["base", "base again", "software e4m3", "fast math", "wipe off", "pdl late"], "sm_90a")
    blackwell = compiled(["base", "software e2m1", "e2m1 whole"], "sm_100a")
    assert all(row["spilled_bytes"] == 0 for row in (*hopper.values(), *blackwell.values()))
    counts = {name: row["instructions"] for name, row in hopper.items()}
    assert {**hopper["base again"], "switch": "base"} == hopper["base"]
    assert counts["software e4m3"]["e4m3"] == 0 < counts["base"]["e4m3"]
    assert counts["fast math"]["total"] < counts["base"]["total"]
    assert counts["wipe off"]["store_128"] < counts["base"]["store_128"]
    assert blackwell["software e2m1"]["instructions"]["e2m1"] == 0
    assert blackwell["e2m1 whole"]["instructions"]["e2m1"] == blackwell["base"]["instructions"]["e2m1"] > 0


@pytest.mark.parametrize(
    "name",
    [
        "e2m1 pairs",
        "add by element",
        "together",
        "pdl early",
        "no first wait",
        "flag",
        "64 threads",
        "unguarded",
        "late addresses",
        "nothing kept",
    ],
)
def test_the_other_edits_compile(name: str) -> None:
    """With the rest of the edited switches, in the tests around this one: all are compiled."""
    rows = facts.compiled([BY_NAME[name]], [CASE], ["sm_90a"], disassemble=False)
    assert [(r["switch"], r["spilled_bytes"]) for r in rows] == [(name, 0)]


def test_the_launch_shapes() -> None:
    threads = {s.name: variant_of(s, topology_of(s, CASE, "sm_90a"), CASE).threads for s in SWITCHES if s.threads}
    # 896 vectors: 5 CTAs of 180, rounded up to whole warps, and so on.
    assert threads == {
        "64 threads": 64,
        "128 threads": 128,
        "160 threads": 160,
        "192 threads": 192,
        "256 threads": 224,
        "512 threads": 448,
        "whole row": 896,
    }
    assert make_plan(topology_of(BY_NAME["128 threads"], CASE, "sm_90a"), request_of(CASE)).shape == LaunchShape(128, 1, 7, 1)
    assert not variant_of(BY_NAME["whole row"], topology_of(BY_NAME["whole row"], CASE, "sm_90a"), CASE).clustered


def test_a_cluster_larger_than_plans_take(monkeypatch: pytest.MonkeyPatch) -> None:
    """Only under its switch; the kernel must be told, and a GPU that refuses is an error. Its bits are right."""
    switch, asked = BY_NAME["64 threads"], topology_of(BY_NAME["64 threads"], CASE, "sm_90a")
    with planned_for(switch):
        large = make_plan(asked, request_of(CASE)).shape
    assert large == LaunchShape(64, 1, 14, 1)
    assert make_plan(asked, request_of(CASE)).shape == LaunchShape(128, 1, 8, 1)
    told: list[int] = []
    made: list[LaunchShape] = []
    monkeypatch.setattr(rank, "Launcher", lambda kernel, shape, dependent: made.append(shape))
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(rank.driver, "cuKernelSetAttribute", lambda attribute, value, kernel, device: told.append(value) or (bool(made),))
    with Builder("sm_90a") as builder, rank.built_by(builder, switch):
        cuda.Launcher(SimpleNamespace(handle=1), large, dependent=True)  # type: ignore[attr-defined]
        assert (told, made) == ([1], [large])
        with pytest.raises(PlatformError, match="no clusters of more than 8"):
            cuda.Launcher(SimpleNamespace(handle=1), large, dependent=True)  # type: ignore[attr-defined]
        cuda.Launcher(SimpleNamespace(handle=1), LaunchShape(128, 1, 8, 1), dependent=True)  # type: ignore[attr-defined]
    assert len(told) == 2


def test_a_large_cluster_keeps_the_bits(tmp_path: Path) -> None:
    case = emulator.Case(2, 3584, 32)
    assert case.cluster == 14
    assert emulator.emulate(emulator.compile_cases([case], tmp_path), (2, 1), seed=1).problem() == ""


@pytest.mark.parametrize("without", ["", "      fence_system();\n", "    sync_block();\n"], ids=["whole", "no fence", "no barrier"])
def test_flags_hold_only_behind_a_barrier_and_a_fence(without: str, tmp_path: Path) -> None:
    """World sizes 2 and 3, one vector a thread and several, a grid that loops; with a part of the release left out, old words are read."""
    first, *rest = BY_NAME["flag"].edits
    assert without in first.new
    edits = (replace(first, new=first.new.replace(without, "", 1)), *rest)
    cases = [
        emulator.Case(2, 576, 64),
        emulator.Case(3, 576, 64),
        emulator.Case(2, 2880, 128, vectors=4),
        emulator.Case(3, 576, 64, rows=1),
    ]
    wrong = 0
    for case in cases[: 2 if without else None]:
        library = emulator.compile_cases([case], tmp_path, edits)
        for mode in ("fair", "late"):
            wrong += sum(bool(emulator.emulate(library, (3, 1, 2, 3, 1), seed=s, mode=mode).problem()) for s in range(6))
    assert bool(wrong) == bool(without)


@pytest.mark.parametrize("architecture", COVERED)
def test_flags_compile_everywhere(architecture: str) -> None:
    rows = facts.compiled([BY_NAME["flag"]], [CASE], [architecture], disassemble=False)
    assert [(r["switch"], r["spilled_bytes"]) for r in rows] == [("flag", 0)]


def test_switches_apply_where_they_change_something() -> None:
    assert BY_NAME["software e2m1"].applies("nvfp4/128x4", "sm_100a")
    assert not BY_NAME["software e2m1"].applies("nvfp4/128x4", "sm_90a")
    assert not BY_NAME["scale division"].applies("fp8_static", "sm_100a")
    assert BY_NAME["fma"].applies("none", "sm_80")
    assert set(HARDWARE) < set(COVERED)


@pytest.mark.parametrize(("name", "changed"), [("scale division", False), ("scale reciprocals", True), ("wipe off", True)])
def test_the_emulator_says_whether_bits_change(name: str, changed: bool) -> None:
    found = facts.changed_bits(BY_NAME[name], "nvfp4/128x4")
    assert found is not None
    assert bool(found) == changed


@pytest.mark.parametrize("name", ["base", "fma", "160 threads", "pdl off", "software e4m3"])
def test_what_the_emulator_cannot_say_is_left_open(name: str) -> None:
    assert facts.changed_bits(BY_NAME[name], "nvfp4/128x4") is None


def test_switches_by_name() -> None:
    assert [s.name for s in chosen(["fma", "fma", "base"])] == ["base", "fma"]
    assert chosen(None) == list(SWITCHES)
    with pytest.raises(FormatError, match="unknown switch 'turbo'"):
        chosen(["turbo"])


def test_engines_load_the_kernels_of_their_switch() -> None:
    case = Case(1, 64, keep_norm=False)
    switch = Switch("x", "x", dependent=False)
    made: list[Any] = []
    with Builder("sm_90a") as builder:
        variant = variant_of(switch, topology_of(switch, case, "sm_90a"), case)
        code, _ = builder.compile(switch, variant)
        assert builder.compile(switch, variant)[0] is code  # once
        assert builder.compile(BY_NAME["fma"], variant)[0] is not code
        before = jit.cubin
        with pytest.MonkeyPatch.context() as context:
            context.setattr(rank, "Launcher", lambda kernel, shape, dependent: made.append(dependent))
            with rank.built_by(builder, switch):
                assert jit.cubin(variant, "sm_90a") == code
                cuda.Launcher(None, LaunchShape(32, 1, 1, 1), dependent=True)  # type: ignore[attr-defined]
        assert jit.cubin is before
        assert made == [False]


def test_a_rank_with_graphs_of_paper(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two CPU ranks: times of every switch in turn, wrong outputs as changed bits, an error of one switch as that of one row."""
    switches = [BY_NAME["base"], BY_NAME["fma"], BY_NAME["160 threads"]]

    class Paper:
        def __init__(self, topology: Any) -> None:
            self.topology = topology

    def prepare(shape: Any, switch: Switch) -> None:
        if switch.threads:
            raise FormatError("too wide", hint="narrower")
        shape.calls[switch.name] = SimpleNamespace(call=len, comm=SimpleNamespace(close=lambda: None))
        shape.differs[switch.name] = "1 elements differ" if switch.options else None

    monkeypatch.setattr(rank._Shape, "prepare", prepare)
    monkeypatch.setattr(rank, "as_group", lambda group: group)
    monkeypatch.setattr(rank, "Chain", lambda call, stream: call)
    turns = iter([3.0, 3.0, 2.0, 2.0, 1.0, 1.0] * 2)  # of two ranks, in three rounds of two cases
    monkeypatch.setattr(rank, "measure", lambda chains, replays, meet: dict.fromkeys(chains, Latency(next(turns), 1.0, 3.0)))
    monkeypatch.setattr(rank.Builder, "compile_all", lambda builder, wanted: None)
    monkeypatch.setattr(rank.dist, "barrier", lambda group: None)
    monkeypatch.setattr(torch.cuda, "Stream", lambda: None)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    properties = SimpleNamespace(major=9, minor=0, multi_processor_count=132)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: properties)
    cases = main.cases(2, [1, 8], ["none"])

    def one(group: VirtualGroup) -> list[dict[str, Any]]:
        return rank.ablate_rank(group, lambda text: None, switches, cases, 5, 3)  # type: ignore[arg-type]

    first, second = run_virtual(2, one)
    assert first == second
    assert [(r["tokens"], r["switch"], r["us"], r["bits_changed"]) for r in first[:3]] == [
        (1, "base", 2.0, False),
        (1, "fma", 2.0, True),
        (1, "160 threads", None, None),
    ]
    assert (first[0]["rounds_us"], first[2]["rounds_us"]) == ([3.0, 2.0, 1.0], [])
    assert first[2]["error"].startswith("FormatError: too wide")
    assert first[3]["tokens"] == 8


def made_up() -> dict[str, Any]:
    times = []
    for name, us in (("base", 2.0), ("base again", 2.1), ("fma", 1.5)):
        for t in (1, 8):
            times.append({"switch": name, "format": "none", "tokens": t, "us": us * t, "bits_changed": name == "fma"})
    compiled = [{"switch": "base", "architecture": "sm_90a", "format": "none", "registers": 50, "code_bytes": 640, "spilled_bytes": 8}]
    bits = [{"switch": "base", "format": "none", "by_emulator": False, "first_difference": None}]
    return {"times": times, "compiled": compiled, "bits": bits}


def test_the_tables() -> None:
    text = main.text(made_up())
    assert "2.00 (+0.00)  16.00 (+0.00)     same" in text
    assert "1.50 (-0.50)  12.00 (-4.00)  changed" in text
    assert "50, 640 spills" in text
    assert main.noise(made_up()) == pytest.approx(0.45)
    assert main.noise({**made_up(), "times": []}) is None


@pytest.mark.parametrize(("norm", "waits"), [(False, True), (True, False)])
def test_the_ctas_of_a_row_wait_for_each_other_where_no_sum_makes_them(norm: bool, waits: bool) -> None:
    """Nothing would be wrong without that barrier, only slower: the machine code has it, or not."""
    case = Case(4096, 7168, residual=False, norm=norm, keep_norm=False)
    alone = Switch("x", "x", (Edit("row.cuh", "      cluster_arrive();\n      cluster_wait();\n      return;", "      return;"),))
    variant = variant_of(alone, topology_of(alone, case, "sm_90a"), case)
    assert (variant.clustered, variant.loop, variant.kernel) == (True, True, "two_shot")
    with Builder("sm_90a") as builder:
        codes = {builder.compile(switch, variant)[0] for switch in (BY_NAME["base"], alone)}
    assert (len(codes) == 2) == waits


def test_times_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(main, "run_processes", lambda *given, **named: [["a row"]])
    found = main.run([BY_NAME["base"]], [CASE], architectures=["sm_90a"], timing=True, measure_facts=False)
    assert (found["times"], found["bits"], found["compiled"]) == (["a row"], [], [])


def test_progress_has_a_total_that_is_reached(monkeypatch: pytest.MonkeyPatch) -> None:
    """As many steps as are announced, of switches that apply here and there."""
    monkeypatch.setattr(main.facts, "changed_bits", lambda switch, format: "")
    switches = [BY_NAME[name] for name in ("base", "scale division", "e2m1 pairs")]
    cases, architectures = [CASE, replace(CASE, format="none"), replace(CASE, tokens=CASE.tokens + 7)], ["sm_90a", "sm_100a"]
    done: list[str] = []
    main.run(switches, cases, architectures=architectures, timing=False, disassemble=False, done=done.append)
    assert len(done) == main.steps(switches, cases, architectures, timing=False, measure_facts=True) > 6


def call(*arguments: str) -> Any:
    return CliRunner().invoke(app, ["ablate", *arguments], env={"COLUMNS": "80", "NO_COLOR": "1", "TERM": "dumb"})


def test_the_command(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    result = call("--switch", "scale division", "--format", "nvfp4", "--architecture", "sm_100a", "--no-count", "--json", "-")
    assert result.exit_code == OK, result.stderr
    data = json.loads(result.stdout)
    assert [r["switch"] for r in data["compiled"]] == ["base", "scale division"]
    assert [b["by_emulator"] for b in data["bits"]] == [None, False]
    assert data["times"] == []
    assert "scale division" in call("--list").stdout
    assert call("--timing").exit_code == IMPOSSIBLE
    assert call("--no-facts").exit_code == IMPOSSIBLE
    assert call("--no-facts", "--no-timing").exit_code == USAGE
    assert call("--switch", "turbo").exit_code == USAGE
    assert call("--architecture", "sm_70").exit_code == USAGE
    assert call("--format", "nvfp5", "--no-timing").exit_code == USAGE

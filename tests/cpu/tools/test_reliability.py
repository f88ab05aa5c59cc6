"""`collogue reliability` without GPUs: its comparison, its soak and faults on CPU groups, its supervision, its report, its tables."""

from __future__ import annotations

import ast
import json
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import reliability_jobs
import torch
from typer.testing import CliRunner

from collogue.contract.spec import Output
from collogue.errors import CollectiveTimeout, ConcurrentUseError
from collogue.gpu import jit
from collogue.gpu.journal import Journal
from collogue.testing import VirtualGroup, run_virtual
from collogue.testing.emulator import Case as EmulatedCase
from collogue.testing.emulator import compile_cases, emulate
from collogue.testing.processes import RanksFailed
from collogue.tools.check.rank import poisoned
from collogue.tools.cli import app
from collogue.tools.commands.options import IMPOSSIBLE, USAGE
from collogue.tools.reliability import compare, faults, jobs, main, soak, tables
from collogue.tools.reliability.delays import DELAYS
from collogue.tools.reliability.jobs import Outcome, run_jobs
from collogue.tools.reliability.parts import Counts, Part, make_parts

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parents[3]
CPU = torch.device("cpu")
OPTIONS = main.Options(Counts(0, 0, 0, 0, 0, 0), device="cpu", hidden_size=64, rows=7)


# ---- comparing


def outputs() -> tuple[Output, Output]:
    expected = Output(norm=torch.arange(16, dtype=torch.float32).to(torch.bfloat16).view(2, 8), scales=torch.ones(2, 1))
    return poisoned(expected), expected


def test_the_comparison_counts_words_and_spoils_them() -> None:
    comparer = compare.Comparer(CPU)
    actual, expected = outputs()
    check = comparer.of(actual, expected)
    check()
    assert comparer.read() == (8 + 2, 1), "nothing was written"
    for name, tensor in expected.items():
        getattr(actual, name).copy_(tensor)
    check()
    assert comparer.read() == (10, 2)
    check()
    assert comparer.read() == (20, 3), "what was right once is not right again"
    for name, tensor in expected.items():
        getattr(actual, name).copy_(tensor)
    assert actual.norm is not None
    actual.norm[1, 7] = -1.0
    check()
    assert comparer.read() == (21, 4)


@pytest.mark.parametrize("architecture", ["sm_80", "sm_90a", "sm_100a"])
def test_the_comparing_kernel_compiles(architecture: str) -> None:
    assert jit.compile_source(compare.SOURCE, architecture, "collogue_compare")[0]


# ---- soak


def small(part: Part, calls: int = 40) -> Part:
    """The same on the CPU: narrow rows, few of them."""
    narrow = [replace(run, cases=tuple(replace(c, hidden_size=128, tokens=min(c.tokens, 5)) for c in run.cases[:8])) for run in part.runs]
    return replace(part, runs=tuple(narrow), calls=calls, graph_calls=7, graphs=3)


@pytest.mark.parametrize("part", make_parts(4), ids=lambda p: p.name)
def test_every_call_of_the_soak_is_made_and_compared(part: Part) -> None:
    def one(group: VirtualGroup) -> dict[str, Any]:
        halves = [group.subgroup(ranks) for ranks in ([0, 1], [2, 3])]
        return soak.soak((halves[0] or halves[1]) if part.split else group, small(part, calls), CPU, lambda text: None)

    calls = 40 * max(1, len(part.runs) // 2)
    found = run_virtual(part.ranks, one)
    for rank in found:
        assert (rank["calls"], rank["comparisons"], rank["wrong_words"], rank["error"]) == (calls, calls, 0, None)
        assert 0 < rank["eager_calls"] < calls
        assert rank["replays"] > 0
    assert len({(rank["calls"], rank["replays"], rank["eager_calls"]) for rank in found}) == 1
    assert len({rank["delays"] for rank in found}) > 1, "all ranks are delayed alike"


def soak_with(monkeypatch: pytest.MonkeyPatch, spoil: Callable[[int, Output], None]) -> list[dict[str, Any]]:
    """A soak in which ``spoil(n, output)`` follows the n-th call of rank 1."""
    made = [0]
    call = soak.Given.call

    def spoiled(self: Any, comm: Any, out: Output) -> Output:
        result = call(self, comm, out)
        if comm.rank == 1:
            made[0] += 1
            spoil(made[0], result)
        return result

    monkeypatch.setattr(soak.Given, "call", spoiled)
    part = small(make_parts(2)[0])
    return run_virtual(2, lambda group: soak.soak(group, part, CPU, lambda text: None))


def test_a_wrong_bit_is_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    def spoil(number: int, out: Output) -> None:
        if number == 20:
            compare.words_of(next(t for _, t in out.items()), "norm")[3] ^= 1 << 30

    found = soak_with(monkeypatch, spoil)
    assert [rank["wrong_words"] for rank in found] == [0, 1]
    row = main._soak_row(small(make_parts(2)[0]), found, None)
    assert (row["passed"], row["wrong_words"], row["hung"]) == (False, 1, False)


def test_two_groups_have_processes_of_their_own() -> None:
    """Of two GPUs four processes; the other parts two. On the CPU, by gloo."""
    options = replace(OPTIONS, counts=Counts(0, 0, 4, 0, 0, 6))
    data = main.run(2, ("soak",), options)
    assert data["passed"], main.text(data)
    assert [(row["part"], row["ranks"], row["calls"], row["comparisons"]) for row in data["soak"]] == [
        ("rows with owners", 2, 4, 8),
        ("two groups at once", 4, 6, 24),
    ]


@pytest.mark.parametrize("kernel", ["one_shot", "sharded"])
def test_kernels_whose_warps_dawdle_are_right(kernel: str, tmp_path: Path) -> None:
    library = compile_cases((EmulatedCase(2, 264, 32, kernel=kernel),), tmp_path, DELAYS.edits)
    assert emulate(library, (2, 3, 1), seed=1).problem() == ""


def test_the_soak_takes_every_case_it_can() -> None:
    for world in (2, 3, 4, 8):
        parts = make_parts(world)
        assert [p.name for p in parts][:2] == ["one-shot", "two-shot"]
        assert [p.calls for p in parts][:2] == [1_000_000, 100_000]
        halves = parts[-1]
        assert (halves.split, halves.ranks) == (True, {2: 4, 3: 6, 4: 4, 8: 8}[world]), "no rank is left out, and no group has one rank"
        assert {case.world_size for case in halves.runs[0].cases} == {halves.ranks // 2}
        assert {p.ranks for p in parts[:-1]} == {world}
        for run in (run for part in parts for run in part.runs):
            assert all(case.possible and len(case.outputs) <= compare.MOST for case in run.cases)
            assert len({case.dtype for case in run.cases}) == 1
        owned = next(p for p in parts if p.name == "rows with owners")
        assert {c.operation for c in owned.runs[0].cases} == {"sharded", "reduce_scatter", "all_gather"}
        assert len({c.format for c in parts[0].runs[0].cases}) == 8
        assert {p.runs[0].algorithm for p in parts[:2]} == {"one_shot", "two_shot"}


# ---- faults


def test_faults_that_the_cpu_sees_too() -> None:
    data = main.run(2, ("faults",), OPTIONS)
    assert data["passed"], main.text(data)
    assert [row["fault"] for row in data["faults"]] == [f.name for f in faults.FAULTS if f.on_cpu]
    assert len(data["faults"]) == 6
    for row in data["faults"]:
        assert [rank["saw"] for rank in row["ranks"]] == ["MismatchedCall"] * 2
        assert all(rank["by"] == "call" and rank["seconds"] < 1 and not rank["afterwards"] for rank in row["ranks"])
    assert len(list(tables.faults(data))) == 7
    json.dumps(data, allow_nan=False)


def see(fault: faults.Fault, **comm: Any) -> tuple[str | None, Any, float]:
    """What one rank of a made-up communicator sees."""

    class Comm:
        rank, world_size, timeout = 0, 2, 0.1
        check = staticmethod(comm.get("check", lambda: None))

    start = time.perf_counter()
    by, error = faults._see(fault, faults.Scene(None, CPU, Comm()))  # type: ignore[arg-type]
    return by, error, time.perf_counter() - start


def test_a_rank_sees_by_a_call_by_check_or_not_at_all() -> None:
    error = CollectiveTimeout("late", hint="h")

    def failing(*_: object) -> None:
        raise error

    assert see(faults.Fault("f", "", failing, ("CollectiveTimeout",)))[:2] == ("call", error)
    assert see(faults.Fault("f", "", lambda scene: None, ("CollectiveTimeout",)), check=failing)[:2] == ("check", error)
    by, seen, seconds = see(faults.Fault("f", "", lambda scene: None))
    assert (by, seen) == (None, None)
    assert 0.1 <= seconds < 1.0


def test_a_named_journal_is_read_back(tmp_path: Path) -> None:
    def error(path: Path) -> CollectiveTimeout:
        return CollectiveTimeout("late", hint=f"reset. Journal: collogue doctor --journal {path}")

    good, empty = tmp_path / "good.json", tmp_path / "empty.json"
    Journal(0, 2, 1, {0: (faults_entry(),), 1: ()}).save(good)
    Journal(0, 2, 1, {0: (), 1: ()}).save(empty)
    assert faults._journal_of(error(good)) is True
    assert faults._journal_of(error(empty)) is False
    assert faults._journal_of(error(tmp_path / "nowhere.json")) is False
    assert faults._journal_of(ConcurrentUseError("x", hint="y")) is None
    printed = CliRunner().invoke(app, ["doctor", "--journal", str(good)])
    assert printed.exit_code == 0
    assert printed.stdout.strip() == Journal.load(good).text()
    assert "call 7: all_reduce by one_shot" in printed.stdout


def faults_entry() -> Any:
    from collogue.gpu.header import Entry

    return Entry(7, "all_reduce by one_shot, tokens=1")


def test_every_fault_says_who_sees_what() -> None:
    from collogue import errors

    names = [fault.name for fault in faults.FAULTS]
    assert len(set(names)) == len(names) == 27
    for fault in faults.FAULTS:
        assert all(hasattr(errors, name) for name in (*fault.others, *fault.culprit))
        assert fault.others or fault.culprit
    assert [fault.last for fault in faults.FAULTS] == [False] * 25 + [True] * 2


# ---- supervision


def test_a_job_that_dies_is_reported_and_the_others_done() -> None:
    heard: list[str] = []
    outcome = run_jobs(2, reliability_jobs.runner, ["one", "dies", "two"], "o", silence=30.0, heard=heard.append)
    assert outcome.results["one"] == {0: ["o", 0, 1], 1: ["o", 1, 1]}
    assert outcome.results["two"] == {0: ["o", 0, 1], 1: ["o", 1, 1]}, "a new set of processes"
    assert set(outcome.problems) == {"dies"}
    assert "last stages: rank 0: dies; rank 1: dies" in outcome.problems["dies"]
    assert [text for text in heard if text in ("one", "dies", "two")] == ["one", "dies", "two"]


def test_each_lost_job_costs_one_set_of_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    sets: list[list[str]] = []

    def processes(world: int, fn: Any, runner: Any, names: list[str], options: Any, *, heard: Any, **limits: Any) -> None:
        sets.append(list(names))
        for name in names:
            for rank in range(world):
                heard(rank, name)
                if name.startswith("bad") and rank == world - 1:
                    raise RanksFailed(f"{name} is no good\nlast stages: ..", hint="h")
                heard(rank, "done " + json.dumps({"job": name, "result": rank}))

    monkeypatch.setattr(jobs, "run_processes", processes)
    outcome = run_jobs(3, reliability_jobs.runner, ["a", "bad b", "c", "bad d", "bad e", "f"], attempts=3)
    assert sets == [["a", "bad b", "c", "bad d", "bad e", "f"], ["c", "bad d", "bad e", "f"], ["bad e", "f"]]
    assert {name: len(ranks) for name, ranks in outcome.results.items()} == {"a": 3, "bad b": 2, "c": 3, "bad d": 2, "bad e": 2}
    assert outcome.problems["bad b"].startswith("bad b is no good")
    assert set(outcome.problems) == {"bad b", "bad d", "bad e", "f"}
    assert "3 sets of processes" in outcome.problems["f"]


def test_a_rank_that_is_to_die_ends_a_set_and_is_no_problem() -> None:
    outcome = run_jobs(2, reliability_jobs.runner, ["one", "is killed"], last=["is killed"], silence=30.0)
    assert outcome.problems == {}
    assert outcome.results == {"one": {0: [None, 0, 1], 1: [None, 1, 1]}, "is killed": {0: [None, 0, 2]}}


def test_time_and_attempts_are_limited() -> None:
    start = time.monotonic()
    outcome = run_jobs(2, reliability_jobs.runner, ["hangs", "one"], silence=60.0, limit=6.0)
    assert time.monotonic() - start < 20
    assert "not finished after" in outcome.problems["hangs"]
    assert "not done in 6 s" in outcome.problems["one"]


# ---- report


def rank_row(rank: int, culprit: bool = False, **changed: Any) -> dict[str, Any]:
    row = {
        "rank": rank,
        "culprit": culprit,
        "saw": "CollectiveTimeout",
        "by": "check",
        "seconds": 1.02,
        "kernels_over": 1.01,
        "journal": True,
    }
    return row | {"text": "waited for a row of rank 1, call 3", "hint": "", "as_expected": True, "afterwards": None} | changed


GOOD_SOAK = {"calls": 10, "replays": 1, "eager_calls": 2, "comparisons": 10, "wrong_words": 0, "delays": 3, "error": None, "seconds": 1.5}
NAMES = ["cost", "soak: one-shot", "fault: a late rank", "fault: a killed process"]


def outcome_with(changed: dict[str, Any] | None = None, problems: dict[str, str] | None = None) -> Outcome:
    cost = [
        {"format": "none", "tokens": 1, "switch": name, "us": us, "error": None}
        for name, us in zip(main.SWITCHES, (2.05, 2.06, 2.01, 2.03, 2.0), strict=True)
    ]
    results: dict[str, Any] = {
        "cost": {0: cost, 1: cost},
        "soak: one-shot": {0: GOOD_SOAK, 1: GOOD_SOAK},
        "fault: a late rank": {0: rank_row(0), 1: rank_row(1, True, seconds=1.7)},
        "fault: a killed process": {0: rank_row(0)},
    }
    return Outcome(results | (changed or {}), problems or {}, {})


def report_of(outcome: Outcome) -> dict[str, Any]:
    return main.report(2, NAMES, main.Options(Counts(one_shot=10)), outcome)


def test_a_good_report_and_its_tables() -> None:
    data = report_of(outcome_with())
    assert data["passed"]
    assert data["soak"][0]["comparisons"] == 20
    late, killed = list(tables.faults(data))[1:]
    assert late[2:] == ["`CollectiveTimeout` by check, 1.02 s", "`CollectiveTimeout` by check, 1.70 s", "1.01 s", "yes"]
    assert killed[3] == "it is dead"
    assert list(tables.soak(data))[1] == ["one-shot", "10", "2", "20", "6", "0", "none", "1.5"]
    assert list(tables.cost(data))[1] == ["none", "1", "2.050", "2.060", "2.030", "2.010", "2.000", "+2.0 %", "+2.5 %"]
    assert "ok     one-shot: 10 calls" in main.text(data)


@pytest.mark.parametrize(
    ("changed", "problems"),
    [
        ({"soak: one-shot": {0: GOOD_SOAK, 1: GOOD_SOAK | {"wrong_words": 1}}}, {}),
        ({"soak: one-shot": {0: GOOD_SOAK, 1: GOOD_SOAK | {"comparisons": 9}}}, {}),
        ({"soak: one-shot": {0: GOOD_SOAK, 1: GOOD_SOAK | {"calls": 9, "comparisons": 9}}}, {}),
        ({"soak: one-shot": {0: GOOD_SOAK, 1: GOOD_SOAK | {"error": "CollectiveTimeout: x"}}}, {}),
        ({"soak: one-shot": {0: GOOD_SOAK}}, {"soak: one-shot": "rank 1 ended with exit code -9"}),
        ({"fault: a late rank": {0: rank_row(0), 1: rank_row(1, True, as_expected=False)}}, {}),
        ({"fault: a late rank": {0: rank_row(0), 1: rank_row(1, True, afterwards="wrong")}}, {}),
        ({"fault: a late rank": {0: rank_row(0), 1: rank_row(1, True, journal=False)}}, {}),
        ({"fault: a late rank": {0: rank_row(0)}}, {}),
        ({"fault: a killed process": {0: rank_row(0, text="rank 0 gave up")}}, {}),
        ({"cost": {}}, {"cost": "rank 0 raised\nTraceback\ncollogue.errors.CompileError: no\nhint: h"}),
        ({"cost": {0: [{"format": "none", "tokens": 1, "switch": "base", "us": None, "error": "x"}]}}, {}),
    ],
)
def test_a_report_that_does_not_pass(changed: dict[str, Any], problems: dict[str, str]) -> None:
    data = report_of(outcome_with(changed, problems))
    assert not data["passed"]
    json.dumps(data, allow_nan=False)
    assert main.text(data)
    assert list(tables.faults(data))
    assert list(tables.soak(data))


def test_a_problem_in_a_line() -> None:
    assert main._in_a_line(None) is None
    assert main._in_a_line("no rank has said a word for 20 s\nlast stages: ..") == "no rank has said a word for 20 s"
    trace = "rank 1 raised\nTraceback\n  File x\ncollogue.errors.CapacityError: too many\nhint: fewer\n\nlast stages: rank 0: y"
    assert main._in_a_line(trace) == "collogue.errors.CapacityError: too many"


# ---- command line, scripts


def test_the_command_line() -> None:
    invoke = CliRunner().invoke
    assert invoke(app, ["reliability", "--only", "soak,nothing"]).exit_code == USAGE
    if not torch.cuda.is_available():
        result = invoke(app, ["reliability"])
        assert (result.exit_code, "required, one for each rank" in result.stderr) == (IMPOSSIBLE, True)
    started: list[str] = []
    for text in ("cost", "soak: one-shot", "one-shot: 5 of 9 calls, 0 wrong words", "fault: a late rank", "faults: kernels"):
        main.once(started.append)(text)
    assert started == ["cost", "soak: one-shot", "fault: a late rank"]
    assert main.names_of(2, ("soak",), main.Options(Counts(5, 0, 0, 0, 5, 0))) == [
        "soak: one-shot",
        "soak: two communicators on two streams",
        "soak: eight communicators on eight streams",
    ]


def test_what_the_mutants_told_is_read(tmp_path: Path) -> None:
    namespace: dict[str, Any] = {"__name__": "mutants", "__file__": str(ROOT / "scripts" / "mutants.py")}
    exec(compile(ast.parse((ROOT / "scripts" / "mutants.py").read_text()), "mutants.py", "exec"), namespace)
    told = '<property name="told" value="emulator: two_shot: a wait dropped: caught by seed 3 of 12: call 1: x | y"/>'
    (tmp_path / "report.xml").write_text(f'<testsuites><properties>{told}<property name="other" value="z"/></properties></testsuites>')
    rows = namespace["mutants"](tmp_path / "report.xml")
    assert rows == [{"mutant": "two_shot: a wait dropped", "seeds": 3, "of": 12, "seen": "call 1: x | y"}]
    assert list(tables.mutants({"mutants": rows}))[1] == ["two_shot: a wait dropped", "3 of 12", "call 1: x / y"]

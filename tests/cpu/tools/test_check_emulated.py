"""``collogue check --emulate``: every program passes, and fails where the protocol has a mistake."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from typer.testing import CliRunner

from collogue.errors import CompileError
from collogue.testing.emulator import Edit, compile_cases
from collogue.tools.check import PROGRAMS, Emulated, Report, emulated, run_programs
from collogue.tools.check.emulated import Program, run_program
from collogue.tools.cli import app

pytestmark = pytest.mark.slow


@pytest.fixture
def cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Test processes share what they compile."""
    folder = tmp_path_factory.getbasetemp().parent
    monkeypatch.setattr(emulated, "cache_directory", lambda: folder)
    return folder


def test_every_program_passes(cache: Path) -> None:
    results = run_programs()
    assert [r.program for r in results] == list(PROGRAMS)
    assert [(str(r.program), r.problem) for r in results if r.problem] == []


MISTAKES = {
    "calls": Edit("protocol.cuh", "waiting = any_in_warp(missing());", "waiting = any_in_warp(missing()) && stage != kStagePartials;"),
    "a rank that never comes": Edit("protocol.cuh", "late = token << 8 | stage << 4 | rank;", "late = token << 8 | stage << 4 | p.rank;"),
    "calls that differ": Edit("protocol.cuh", "seen.w[1] != mine;", "false;"),
}


@pytest.mark.parametrize("what", MISTAKES)
def test_a_mistake_is_seen(cache: Path, what: str, monkeypatch: pytest.MonkeyPatch) -> None:
    edits = (MISTAKES[what],)
    monkeypatch.setattr("collogue.testing.emulator.compile_cases", lambda cases, folder: compile_cases(cases, folder, edits))
    library = emulated._compile(2)
    assert run_program(Program("one_shot", 2, what), library)
    assert run_program(Program("two_shot", 2, what), library)


def test_a_compiler_that_refuses_is_an_error(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*arguments: object) -> None:
        raise RuntimeError("g++ ..\nerror: no")

    monkeypatch.setattr("collogue.testing.emulator.compile_cases", refuse)
    with pytest.raises(CompileError, match=r"failed to compile the kernels: g\+\+"):
        run_programs()


def test_no_compiler_ends_with_3_and_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "which", lambda name: None)
    ended = CliRunner().invoke(app, ["check", "--device", "cpu", "--tokens", "1", "--emulate"])
    assert ended.exit_code == 3
    assert "needs a C++ compiler, and there is no g++ here" in ended.stderr


@pytest.mark.parametrize("problem", ["", "call 0, rank 1: wrong"])
def test_the_report_holds_the_programs(monkeypatch: pytest.MonkeyPatch, problem: str) -> None:
    found = [Emulated(PROGRAMS[0], "", 0.1), Emulated(PROGRAMS[1], problem, 0.2)]
    monkeypatch.setattr("collogue.tools.check.run_programs", lambda started: found)
    lists = ["--device", "cpu", "--tokens", "1", "--hidden-size", "64", "--format", "none", "--dtype", "bfloat16"]
    ended = CliRunner().invoke(app, ["check", *lists, "--emulate"])
    assert ended.exit_code == (1 if problem else 0)
    assert f"{1 if problem else 2} of 2 programs of the emulator passed" in ended.stdout
    assert problem in ended.stdout
    assert (f"FAILED emulator: {PROGRAMS[1]}" in ended.stdout) == bool(problem)
    assert "emulator" not in Report([]).as_json()
    assert Report([], emulated=found).as_json()["emulator"][1]["problem"] == problem

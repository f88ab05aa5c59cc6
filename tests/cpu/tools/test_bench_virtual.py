"""`collogue bench --virtual`: which cells fit, what ranks do with them, tables and the command. FlashInfer is a fake on the CPU."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import bench_flashinfer
import pytest
import torch
from bench_fakes import Recorded
from typer.testing import CliRunner

from collogue.errors import PlatformError
from collogue.testing import VirtualGroup, run_virtual
from collogue.tools.bench import baselines, flashinfer, tables, virtual
from collogue.tools.bench.cases import FLASHINFER, FLASHINFER_EARLY, FLASHINFER_TWO_SHOT, FLASHINFER_WAYS
from collogue.tools.bench.flashinfer import fits, has, launch
from collogue.tools.bench.timing import Latency
from collogue.tools.bench.virtual import COLLOGUE, KINDS, cases, split, topologies
from collogue.tools.check import Case
from collogue.tools.check.rank import Answers
from collogue.tools.cli import app
from collogue.tools.commands.options import FAILED, OK, USAGE

#: An H200 as its driver might describe it: clusters of 8 lose a tenth of the SMs.
SMS = 132
FITTING = tuple(tuple(SMS * ctas * (9 if cluster > 1 else 10) // 10 // cluster for cluster in range(1, 9)) for ctas in range(1, 17))


def norm(tokens: int, hidden_size: int, world_size: int = 2) -> Case:
    return Case(tokens, hidden_size, world_size=world_size, keep_norm=False)


# ---- FlashInfer's grids


@pytest.mark.parametrize(
    ("hidden_size", "tokens", "expected"),
    [
        (7168, 1, (224, 4, 1)),  # 896 threads a token: 8 CTAs would have 112, fewer than 128
        (7168, 33, (448, 2, 33)),  # 33 x 4 CTAs are as many as there are SMs
        (7168, 34, (448, 2, 34)),
        (12800, 48, (800, 2, 48)),
        (5120, 48, (320, 2, 48)),
        (2880, 1, (180, 2, 1)),  # 360 threads: 8 x 45 would be too few
    ],
)
def test_the_grid_is_what_the_launcher_makes(hidden_size: int, tokens: int, expected: tuple[int, int, int]) -> None:
    shape = launch(FLASHINFER, norm(tokens, hidden_size), SMS)
    if (hidden_size, tokens) == (7168, 33):
        expected = (224, 4, 33)
    assert (shape.threads, shape.cluster, shape.clusters) == expected
    assert shape.threads * shape.cluster == hidden_size // 8


def test_two_hops_have_the_tokens_of_one_owner() -> None:
    assert launch(FLASHINFER_TWO_SHOT, norm(9, 7168, 4), SMS).clusters == 3
    assert [t for t in (1, 4, 5) if has(FLASHINFER_TWO_SHOT, norm(t, 7168, 4))] == [5]
    assert [t for t in (1, 4, 5) if has(FLASHINFER, norm(t, 7168, 4))] == [1, 4, 5]


def test_what_is_launched_early_needs_room_for_the_next_grid() -> None:
    case = norm(48, 7168)  # 96 CTAs of 448 threads on each rank, 56 registers: 2 on an SM
    assert fits(FLASHINFER, case, SMS, FITTING, pdl=True)
    assert not fits(FLASHINFER_EARLY, case, SMS, FITTING, pdl=True)
    assert fits(FLASHINFER_EARLY, case, SMS, FITTING, pdl=False)
    assert not fits(FLASHINFER, replace(case, world_size=8), SMS, FITTING, pdl=False)


def test_what_it_has_is_the_sum_the_norm_and_fp8_static() -> None:
    every = [norm(8, 64), replace(norm(8, 64), format="fp8_static"), baselines.alone(norm(8, 64))]
    others = [replace(norm(8, 64), format="nvfp4"), replace(norm(8, 64), residual=False), norm(8, 64, 3), replace(every[1], keep_norm=True)]
    assert [has(FLASHINFER, case) for case in (*every, *others)] == [True] * 3 + [False] * 4


# ---- cells


def split_on(world: int, **shape: Any) -> tuple[list[virtual.Cell], list[dict[str, Any]]]:
    every = cases(world, shape.get("hidden_size", (7168,)), shape.get("tokens", virtual.TOKENS))
    return split(every, topologies(every, architecture="sm_90a", multiprocessors=SMS, fits=FITTING), peer=shape.get("peer", True))


def test_cells_that_do_not_fit_are_listed_before_any_rank_runs() -> None:
    cells, left = split_on(2)
    assert len(cells) == 3 * len(virtual.TOKENS)
    assert {cell.pdl for cell in cells} == {True}
    assert {what for cell in cells for what in (*cell.plans, *cell.peers)} == {COLLOGUE, *FLASHINFER_WAYS}
    assert {(row["what"], row["tokens"]) for row in left} == {(FLASHINFER_EARLY, 48)}
    cells, left = split_on(8)
    assert {cell.pdl for cell in cells} == {False}
    assert not any(FLASHINFER_EARLY in cell.peers for cell in cells)  # it would be the same
    gone = {row["tokens"] for row in left if row["what"] == FLASHINFER}
    assert gone == set(virtual.TOKENS) - {cell.case.tokens for cell in cells}
    assert 48 in gone
    assert 8 not in gone
    assert all(row["why"] == virtual.NO_ROOM for row in left)
    assert {cell.whole(COLLOGUE) for cell in cells} == {True, False}
    assert {tuple(plan.algorithm for plan in cell.plans.values()) for cell in cells} == {("one_shot",), ("two_shot", "one_shot")}


def test_without_flashinfer_every_cell_is_collogues_alone() -> None:
    cells, left = split_on(8, peer=False)
    assert ({cell.peers for cell in cells}, len(cells), left) == ({()}, 3 * len(virtual.TOKENS), [])


# ---- ranks


def time_on_the_cpu(monkeypatch: pytest.MonkeyPatch, world: int, off_by: float = 0.0) -> tuple[list[dict[str, Any]], Any]:
    fake = bench_flashinfer.install(monkeypatch, world, off_by)
    monkeypatch.setattr(virtual, "capture", lambda group, call: Recorded(call))
    monkeypatch.setattr(virtual, "load", lambda group, call: None)
    monkeypatch.setattr(virtual, "measure", lambda chains, replays, meet: {name: Latency(2.0, 1.0, 3.0) for name in chains})
    every = cases(world, (64, 72), (5,))
    topology = topologies(every, architecture="sm_90a", multiprocessors=SMS, fits=FITTING)
    cells = split(every, {width: replace(here, ranks_per_gpu=4) for width, here in topology.items()}, peer=True)[0]
    answers = Answers()

    def rank(group: VirtualGroup) -> list[dict[str, Any]]:
        return virtual.time_cells(group, cells, 3, answers, lambda text: None)

    by_rank = run_virtual(world, rank)
    assert all(rows == by_rank[0] for rows in by_rank)
    return by_rank[0], fake


def test_both_libraries_pass_their_gates(monkeypatch: pytest.MonkeyPatch) -> None:
    rows, fake = time_on_the_cpu(monkeypatch, 4)
    assert len(rows) == 2 * 3 * 3
    assert [(row["us"], row["error"], row["replays"], row["pdl"]) for row in rows] == [(2.0, None, 3, False)] * len(rows)
    assert {row["what"] for row in rows if "whole" in row} == {COLLOGUE}
    assert {(a["use_oneshot"], a["launch_with_pdl"], a["fp32_acc"]) for a in fake.asked} == {(True, False, True), (False, False, True)}


def test_a_wrong_sum_has_no_number(monkeypatch: pytest.MonkeyPatch) -> None:
    rows, _ = time_on_the_cpu(monkeypatch, 2, off_by=1.0)
    found = {what: {row["us"] for row in rows if row["what"] == what} for what in (COLLOGUE, FLASHINFER, FLASHINFER_TWO_SHOT)}
    assert found == {COLLOGUE: {2.0}, FLASHINFER: {None}, FLASHINFER_TWO_SHOT: {None}}
    assert all("differ from the exact sum" in row["error"] for row in rows if row["what"] != COLLOGUE)


def test_on_real_ranks_too(monkeypatch: pytest.MonkeyPatch) -> None:
    """Baselines make the same subjects, with PDL; what kept FlashInfer from being loaded is said of every row, and tried once."""
    bench_flashinfer.install(monkeypatch, 2)
    monkeypatch.setattr(baselines.dist, "get_rank", lambda group: group.rank)
    monkeypatch.setattr(baselines, "as_group", lambda group: group)

    def rank(group: Any) -> list[str | None]:
        made = baselines.Baselines(group, torch.device("cpu"), 4 * 64 * 5)
        subjects = [made.make(way, case) for way in FLASHINFER_WAYS for case in cases(2, (64,), (5,))]
        return [subject.gate(lambda subject=subject: [subject.call(i) for i in range(3)]) for subject in subjects]  # type: ignore[misc]

    assert run_virtual(2, rank) == [[None] * 9] * 2
    tries = []
    monkeypatch.setattr(flashinfer, "load", lambda tell: tries.append(1) or 1 / 0)
    made = baselines.Baselines(None, torch.device("cpu"), 64)  # type: ignore[arg-type]
    for _ in range(2):
        with pytest.raises(ZeroDivisionError):
            made.make(FLASHINFER, norm(5, 64))
    assert len(tries) == 1


# ---- results


def made(world: int = 2) -> dict[str, Any]:
    """Results of made-up numbers: FlashInfer takes 1.5 times Collogue's time, its two-shot 2 times."""
    cells, left = split_on(world, hidden_size=(2880, 7168))
    rows = []
    for cell in cells:
        for way in (*cell.plans, *cell.peers):
            us = (1 + cell.case.tokens / 10) * {COLLOGUE: 1.0, FLASHINFER: 1.5}.get(way, 2.0)
            row = {"what": way, "section": "virtual", **virtual._named(cell.case), "pdl": cell.pdl, "us": us, "error": None}
            rows.append(row | ({"whole": cell.whole(way), "algorithm": cell.plans[way].algorithm} if way in cell.plans else {}))
    return {"meaning": virtual.MEANING, "baselines": {"flashinfer": "0.7.2"}, "cases": rows, "left_out": left, "problems": []}


def test_the_table_says_who_is_faster_and_what_it_means() -> None:
    data = made(8)
    slow = next(row for row in data["cases"] if row["what"] == COLLOGUE and row["tokens"] == 2 and row["format"] == "fp8_static")
    slow["us"] *= 1.25
    text = virtual.text(data)
    assert max(map(len, text.splitlines())) <= 80
    assert "They show no NVLink" in " ".join(text.split())
    assert "8 ranks, PDL off for both" in text
    assert "norm and FP8, 20 cells: least ratio 1.20 (8 ranks, H = 2880, T = 2, FP8)" in text
    assert "  10 without *: least ratio 1.20" in text
    assert "flashinfer one-shot, 8 ranks, H = 7168: T = 16, 32, 48" in text
    assert "1.50" in text
    assert "*" in text
    assert len(virtual.ratios(data)) == len([row for row in data["cases"] if row["what"] == COLLOGUE])
    lost = {
        **data,
        "cases": [{**row, "us": None, "error": "wrong"} if row is slow else row for row in data["cases"]],
        "problems": ["4 ranks: x"],
    }
    assert "NO NUMBER collogue FP8 8 ranks T=2 H=2880: wrong\n4 ranks: x" in virtual.text(lost)
    assert "FlashInfer is not installed" in virtual.text({**data, "baselines": {"flashinfer": None}})


@pytest.fixture
def one_gpu(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """A machine with a GPU, on which a process of ranks answers at once. Returns what the processes were asked."""
    asked: list[Any] = []

    def ranks(count: int, fn: Any, *arguments: Any, **named: Any) -> list[Any]:
        assert (count, fn, named["device"]) == (1, virtual.process, "cuda")
        asked.append(arguments)
        named["heard"](0, "2 ranks, H=2880 T=1 norm")
        if arguments[0] == 4:
            raise virtual.RanksFailed("silent")
        found = made(arguments[0])
        return [{"cases": found["cases"], "left_out": found["left_out"]}]

    monkeypatch.setattr(virtual, "run_processes", ranks)
    monkeypatch.setattr(virtual, "check_gpus", lambda: None)
    return asked


def call(*arguments: str) -> Any:
    return CliRunner().invoke(app, ["bench", *arguments], env={"COLUMNS": "80", "NO_COLOR": "1", "TERM": "dumb"})


def test_the_command(one_gpu: list[Any], tmp_path: Path) -> None:
    target = tmp_path / "virtual.json"
    found = call("--virtual", "2,8", "--tokens", "1,8", "--json", str(target), "--commit", "abc")
    assert found.exit_code == OK, found.output
    assert one_gpu == [(2, virtual.HIDDEN_SIZES, (1, 8), virtual.REPLAYS), (8, virtual.HIDDEN_SIZES, (1, 8), virtual.REPLAYS)]
    data = json.loads(target.read_text())
    assert (data["benchmark"], data["passed"], data["commit"]) == ("virtual", True, "abc")
    assert {"meaning", "method", "baselines", "cases", "left_out", "problems", "versions", "machine"} <= set(data)
    assert "2 ranks, PDL on for both" in found.stdout
    assert call("--virtual", "4").exit_code == FAILED
    for wrong in (("--virtual", "3"), ("--virtual", "6"), ("--virtual", "2", "--suite", "latency"), ("--baselines", "nvshmem")):
        assert call(*wrong).exit_code == USAGE, wrong


def test_what_was_measured_before_an_error_is_in_the_file(one_gpu: list[Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target, answer = tmp_path / "virtual.json", virtual.run_processes

    def broken(count: int, fn: Any, world: int, *arguments: Any, **named: Any) -> list[Any]:
        if world == 8:
            raise PlatformError("no GPU any more", hint="none")
        return answer(count, fn, world, *arguments, **named)

    monkeypatch.setattr(virtual, "run_processes", broken)
    assert call("--virtual", "2,8", "--json", str(target)).exit_code != OK
    assert {row["world_size"] for row in json.loads(target.read_text())["cases"]} == {2}


def test_the_table_of_the_docs() -> None:
    rows = list(tables.virtual(made(8)))
    assert rows[0] == ["ranks, H", *(f"T = {t}" for t in (1, 2, 4, 8, 16, 32))]
    assert rows[2] == ["8, 7168", *["1.50 / 1.50 / 1.50"] * 4, "", ""]


def test_ranks_do_it_in_turn() -> None:
    running: list[int] = []

    def rank(group: VirtualGroup) -> int:
        def step() -> int:
            running.append(group.rank)
            assert len(running) == 1
            running.pop()
            return group.rank

        return virtual.in_turn(group, step)

    assert run_virtual(3, rank) == [0, 1, 2]


def test_kinds_are_the_columns() -> None:
    assert [virtual._kind_of(virtual._named(case)) for case in cases(2, (64,), (1,))] == list(KINDS)

"""Predictions for GPUs that are not here: fitted to half of what was measured, held against the other half, scaled by rates."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from collogue.errors import ArgumentError
from collogue.planning.explain import Machine, explain
from collogue.planning.gpus import GPUS
from collogue.planning.model import MODEL
from collogue.tools.cli import app
from collogue.tools.terminal import OK, USAGE
from scripts.predictions import RESULT, compared, made, rows

RESULTS = Path(__file__).resolve().parents[3] / "benchmarks" / "results"
#: Of every row that the model was not fitted to.
WITHIN = 0.25


@pytest.fixture(scope="module")
def committed() -> dict[str, Any]:
    return json.loads((RESULTS / RESULT).read_text(encoding="utf-8"))  # type: ignore[no-any-return]


def test_the_committed_lists_are_those_of_the_committed_results(committed: dict[str, Any]) -> None:
    assert made(RESULTS) == committed
    assert asdict(MODEL) == committed["model"]


def test_both_halves_together_are_every_graph_latency(committed: dict[str, Any]) -> None:
    fitted, tested = committed["fit"], committed["test"]
    assert len(tested) - len(fitted) in (0, 1)
    assert len(rows(RESULTS)) == len(fitted) + len(tested) > 300
    for half in (fitted, tested):
        assert {row["algorithm"] for row in half} == {"one_shot", "two_shot", "sharded"}
        assert {row["source"] for row in half} == set(committed["sources"])
        assert "eager" not in {row["section"] for row in half}


def test_every_row_of_the_other_half_is_within_25_percent(committed: dict[str, Any]) -> None:
    far = [row for row in compared(MODEL, rows(RESULTS)[len(committed["fit"]) :]) if abs(row["error"]) > WITHIN]
    assert far == []


def test_a_model_that_is_wrong_is_seen(committed: dict[str, Any]) -> None:
    slower = replace(MODEL, stream_rate=MODEL.stream_rate / 1.4)
    assert any(abs(row["error"]) > WITHIN for row in compared(slower, committed["test"]))


def test_a_link_of_twice_the_rate_takes_half_the_time_for_its_part() -> None:
    here, there = (MODEL.us(GPUS[name], "two_shot", 1 << 30, norm=True, amax=False) for name in ("H200", "B200"))
    assert there[1] - MODEL.exchange_us == pytest.approx((here[1] - MODEL.exchange_us) / 2)
    assert here[0] / 2 < there[0] < here[0]
    assert all(floor < us for us, floor in (here, there))


def test_memory_matters_where_the_link_is_the_same() -> None:
    h100, h200 = (MODEL.us(GPUS[name], "one_shot", 1 << 22, norm=True, amax=True) for name in ("H100", "H200"))
    assert h100[0] > h200[0]
    assert h100[1] == h200[1]


def test_a_slow_link_has_longer_hops() -> None:
    small = [MODEL.us(GPUS[name], "one_shot", 16, norm=True, amax=False)[0] for name in ("H200", "L40S")]
    assert small[1] - small[0] == pytest.approx(MODEL.exchange_us, abs=0.01)


@pytest.mark.parametrize("gpu", GPUS)
@pytest.mark.parametrize("world", [2, 8])
def test_the_plan_is_the_machines_own_and_only_its_times_are_of_the_model(gpu: str, world: int) -> None:
    given: dict[str, Any] = {"hidden_size": 7168, "world_size": world, "format": "nvfp4/128x4", "operation": "sharded", "table": False}
    found = explain(Machine.with_gpu(gpu), 512, **given)
    facts = GPUS[gpu]
    own = explain(Machine(facts.architecture, facts.device, facts.multiprocessors), 512, **given).plan
    assert replace(found.plan, predicted_us=own.predicted_us, floor_us=own.floor_us, model=own.model) == own
    assert found.plan.model == f"{gpu} fitted to two H200 (docs/machines.md)"
    assert 0 < found.plan.floor_us < found.plan.predicted_us
    text = str(found)
    assert max(map(len, text.splitlines())) <= 80
    assert str(facts.link) in text
    assert found.as_json()["gpu"]["link_rate"] == facts.link_rate
    assert own.model == "two H200 without the format"


@pytest.mark.parametrize(
    "asked", [{"operation": "finish"}, {"operation": "reduce_scatter"}, {"operation": "all_gather"}, {"world_size": 1}]
)
def test_what_nothing_was_fitted_to_is_refused(asked: dict[str, Any]) -> None:
    with pytest.raises(ArgumentError, match="is not modeled for other GPUs"):
        explain(
            Machine.with_gpu("B200"), 8, **{"hidden_size": 64, "world_size": 2, "norm": asked.get("operation") != "all_gather", **asked}
        )


def call(*arguments: str) -> Any:
    return CliRunner().invoke(app, ["explain", *arguments], env={"COLUMNS": "80", "NO_COLOR": "1", "TERM": "dumb"})


def test_the_command() -> None:
    result = call("--gpu", "b200", "--world-size", "8", "--hosts", "1", "--tokens", "4096")
    assert result.exit_code == OK, result.output
    assert "us, by a model of B200 fitted to two H200" in result.stdout
    assert "NVLink 5, 900 GB/s each way" in result.stdout
    data = json.loads(call("--gpu", "b200", "--json", "-").stdout)
    assert (data["gpu"]["name"], data["architecture"], data["model"]) == ("B200", "sm_100a", "B200 fitted to two H200 (docs/machines.md)")


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["--gpu", "B200", "--hosts", "2"], "calls over 2 hosts are not modelled yet"),
        (["--gpu", "B200", "--architecture", "sm_90a"], "goes with neither --architecture nor --device"),
        (["--gpu", "B200", "--device", "cpu"], "goes with neither --architecture nor --device"),
        (["--gpu", "V100"], "there are no facts of a GPU 'V100'"),
    ],
)
def test_wrong_usage(arguments: list[str], told: str) -> None:
    result = call(*arguments)
    assert result.exit_code == USAGE
    assert told in " ".join(result.stderr.split())

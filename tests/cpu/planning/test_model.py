"""Predictions for GPUs that are not here: fitted to half of what was measured, held against the other half, scaled by rates."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from collogue.calls.capacity import Capacity
from collogue.calls.terms import TermsForm
from collogue.contract.quant import FP8PerToken
from collogue.errors import ArgumentError
from collogue.planning.explain import Machine, explain
from collogue.planning.gpus import GPUS
from collogue.planning.model import HOST_MODEL, MODEL, memory_bytes
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


# Several hosts, and the host path on one


def predicted(gpu: str = "B200", tokens: int = 4096, *, gbps: float | None = None, hosts: int = 2, **asked: Any) -> tuple[float, float]:
    given = {"hidden_size": 7168, "world_size": 16, "table": False, **asked}
    plan = explain(Machine.with_gpu(gpu, hosts, gbps), tokens, **given).plan
    return plan.predicted_us, plan.floor_us


def test_the_host_path_is_fitted_to_what_was_measured() -> None:
    """On two H200 over NCCL, 20 calls in a graph: 64 tokens were not fitted. And the kernels, alone on one H200."""
    data = json.loads((RESULTS / "host-path-2xh200.json").read_text(encoding="utf-8"))["20 calls, us"]
    for tokens, within in ((1, 0.01), (64, WITHIN), (1024, 0.01)):
        us, floor = predicted("H200", tokens, hosts=1, world_size=2, hidden_size=4096, transport="host")
        assert us == pytest.approx(data[f"{tokens} in a graph"]["host path"] / 20, rel=within)
        assert 0 < floor < us
    for row in json.loads((RESULTS / "host-path-h200.json").read_text(encoding="utf-8"))["kernels"]:
        capacity = Capacity(4096, 4096, torch.bfloat16, torch.device("cpu"))
        step = replace(
            capacity.request(4096, True, True, None, False, None, "all_reduce"), prologue=TermsForm(torch.bfloat16, row["terms"])
        )
        assert HOST_MODEL.kernel_us + memory_bytes(step) / HOST_MODEL.kernel_rate == pytest.approx(row["kernel us"], rel=0.06)


def test_kernels_read_terms_as_wide_as_they_are() -> None:
    capacity = Capacity(8, 1024, torch.bfloat16, torch.device("cpu"))
    plain = capacity.request(8, True, False, None, False, None, "all_reduce")
    narrow, wide = (memory_bytes(replace(plain, prologue=TermsForm(torch.bfloat16, 4, sums))) for sums in (0, 0b1010))
    assert narrow == 8 * 1024 * 2 * (4 + 2)
    assert wide - narrow == 8 * 1024 * 2 * 2
    codes = capacity.request(8, True, True, FP8PerToken(), False, None, "finish")
    assert memory_bytes(codes) == 8 * (1024 * 2 + 1024 + 16)


def test_over_hosts_a_call_takes_what_its_exchanges_and_kernels_take() -> None:
    """16 B200 on two hosts, 4096 tokens, by hand: rows within islands, float32 sums between them, y back; a kernel behind each."""
    size, row = 16, 7168 * 2
    block = 4096 // size
    near = [7 * 2 * block * row, 0, 7 * block * row]  # each rank adds for itself and for one owner elsewhere
    far = [0, block * 2 * row, 8 * block * row]
    link, host = 900 / 450, MODEL.wire_rate / 450 * 400 / 8
    moved = sum(max(a / HOST_MODEL.exchange_rate / link, b / host) for a, b in zip(near, far, strict=True))
    fixed = 3 * HOST_MODEL.exchange_us + 2 * GPUS["B200"].host_us + 3 * HOST_MODEL.kernel_us
    add = block * (8 * row + 2 * row), block * (8 * row + 2 * row + 2 * row)  # eight terms to a sum; eight, a sum and the residual to y
    memory = (sum(add) + 4096 * 2 * row) / HOST_MODEL.kernel_rate / (8000 / 4800)
    us, floor = predicted()
    assert us == pytest.approx(fixed + moved + memory)
    floors = sum(max(a / MODEL.wire_rate / link, b / host) for a, b in zip(near, far, strict=True))
    assert floor == pytest.approx(3 * MODEL.exchange_us + 2 * GPUS["B200"].host_us + floors)


def test_hosts_and_their_links_show() -> None:
    slow, usual, fast = (predicted(gbps=gbps) for gbps in (100, None, 800))
    assert slow[0] > usual[0] > fast[0]
    assert predicted(gbps=400) == usual
    assert predicted(order="rank")[0] > usual[0]  # more crosses
    assert predicted(world_size=8)[0] > predicted(world_size=8, hosts=1)[0]
    inside = predicted(world_size=8, hosts=1, transport="host")
    assert predicted(world_size=8, tokens=1)[0] - predicted(world_size=8, hosts=1, tokens=1, transport="host")[0] == pytest.approx(5, abs=2)
    assert predicted(world_size=8, hosts=1)[0] < inside[0] < predicted(world_size=8)[0]
    assert predicted("L40S", world_size=8)[0] > predicted("B200", world_size=8)[0]
    assert predicted(operation="sharded", format="nvfp4")[0] < predicted(operation="sharded")[0]


@pytest.mark.parametrize("gpu", GPUS)
def test_what_is_said_of_several_hosts(gpu: str) -> None:
    found = explain(Machine.with_gpu(gpu, 2), 4096, hidden_size=7168, world_size=16, table=False)
    text, data = str(found), found.as_json()
    assert max(map(len, text.splitlines())) <= 80
    words = " ".join(text.split())
    assert "the group moves all bytes, within islands too" in words
    assert f"us, by a model of 2 hosts of {gpu} fitted to two H200 (docs/machines.md)" in words
    assert f"Between hosts: {GPUS[gpu].host_gbps:g} Gb/s of a GPU each way ({GPUS[gpu].host_link})" in words
    assert "2 islands: ranks 0 1 2 3 4 5 6 7; 8 9" in words
    assert (data["hosts"], data["gpu"]["host_gbps"], data["islands"]) == (2, GPUS[gpu].host_gbps, found.topology.islands)
    assert (data["predicted_us"], data["floor_us"]) == (found.plan.predicted_us, found.plan.floor_us)
    assert 0 < data["floor_us"] < data["predicted_us"]


@pytest.mark.parametrize("gbps", [0.0, -1.0, float("nan"), float("inf")])
def test_rates_that_cannot_be(gbps: float) -> None:
    with pytest.raises(ArgumentError, match="host_gbps is"):
        Machine.with_gpu("B200", 2, gbps)


def call(*arguments: str) -> Any:
    return CliRunner().invoke(app, ["explain", *arguments], env={"COLUMNS": "80", "NO_COLOR": "1", "TERM": "dumb"})


def test_the_command() -> None:
    result = call("--gpu", "b200", "--world-size", "8", "--hosts", "1", "--tokens", "4096")
    assert result.exit_code == OK, result.output
    assert "us, by a model of B200 fitted to two H200" in result.stdout
    assert "NVLink 5, 900 GB/s each way" in result.stdout
    data = json.loads(call("--gpu", "b200", "--json", "-").stdout)
    assert data["hosts"] == 1
    assert (data["gpu"]["name"], data["architecture"], data["model"]) == ("B200", "sm_100a", "B200 fitted to two H200 (docs/machines.md)")


def test_the_command_over_hosts() -> None:
    result = call("--gpu", "B200", "--world-size", "8", "--hosts", "2", "--host-gbps", "100", "--json", "-")
    assert result.exit_code == OK, result.output
    data, text = json.loads(result.stdout), " ".join(result.stderr.split())
    assert f"predicted {data['predicted_us']:.2f} us, by a model of {data['model']} floor {data['floor_us']:.2f} us" in text
    assert "Between hosts: 100 Gb/s of a GPU each way (as given), 5 us an exchange (assumed)" in text
    assert (data["hosts"], data["gpu"]["host_gbps"], data["gpu"]["host_link"], data["gpu"]["host_us"]) == (2, 100, "as given", 5)
    assert data["islands"] == [[0, 1, 2, 3], [4, 5, 6, 7]]


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["--gpu", "B200", "--world-size", "4", "--hosts", "3"], "4 ranks are not the same number on each of 3 hosts"),
        (["--gpu", "B200", "--hosts", "2", "--transport", "peer"], "the group spans several hosts"),
        (["--gpu", "B200", "--hosts", "2", "--operation", "reduce_scatter"], "reduce_scatter is not modeled for other GPUs"),
        (["--gpu", "B200", "--host-gbps", "400"], "it goes with --gpu and with --hosts of 2 or more"),
        (["--hosts", "2", "--host-gbps", "400"], "it goes with --gpu and with --hosts of 2 or more"),
        (["--gpu", "B200", "--hosts", "2", "--host-gbps", "0"], "host_gbps is 0.0"),
        (["--gpu", "B200", "--architecture", "sm_90a"], "goes with neither --architecture nor --device"),
        (["--gpu", "B200", "--device", "cpu"], "goes with neither --architecture nor --device"),
        (["--gpu", "V100"], "there are no facts of a GPU 'V100'"),
    ],
)
def test_wrong_usage(arguments: list[str], told: str) -> None:
    result = call(*arguments)
    assert result.exit_code == USAGE
    assert told in " ".join(result.stderr.split())

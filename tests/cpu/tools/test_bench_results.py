"""Results of `collogue bench`: what a run writes, its tables."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from bench_fakes import fake_rank, made

from collogue.errors import PlatformError
from collogue.tools.bench import latency, report
from collogue.tools.bench.cases import FEW, HIDDEN_SIZE, NCCL
from collogue.tools.bench.floors import EXCHANGE
from collogue.tools.bench.rank import summary

ROOT = Path(__file__).resolve().parents[3]


@pytest.fixture
def two_gpus(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """A machine with two GPUs, whose ranks answer at once. Returns the functions that ranks were started with."""
    started: list[str] = []

    def ranks(world: int, fn: Any, *arguments: Any, heard: Callable[[int, str], None], **named: Any) -> list[Any]:
        assert named["device"] == "cuda"
        assert Path(latency.os.environ["COLLOGUE_CACHE_DIR"]).is_dir()
        started.append(fn.__name__)
        heard(0, "compiling")
        heard(0, "T=1 | norm 2.00")
        heard(1, "another rank | 9")
        return [fake_rank(world)] * world if fn is latency.bench_rank else [[0.02, 0.01, 0.01], [0.01, 0.03, 0.01]]

    monkeypatch.setattr(latency, "run_processes", ranks)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: "GPU X")
    monkeypatch.delenv("COLLOGUE_CACHE_DIR", raising=False)
    return started


def test_a_run_writes_all_it_promises(two_gpus: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    target = tmp_path / "latency.json"
    assert latency.run(json=str(target), commit="abc") is True
    assert two_gpus == ["bench_rank", "start_again"]
    assert "COLLOGUE_CACHE_DIR" not in latency.os.environ
    data = json.loads(target.read_text())
    assert data["passed"] is True
    assert data["commit"] == "abc"
    assert {"date", "versions", "machine", "topology", "environment", "method", "cases", "wire", "host", "compile"} <= set(data)
    assert {"torch", "nvrtc", "nccl", "driver"} <= set(data["versions"])
    case = report.find(data, what="collogue", tokens=8, section="decode", format="nvfp4/128x4", keep_norm=False)[0]
    assert {"us", "low_us", "high_us", "replays", "bytes_sent", "floor_us", "share", "error"} <= set(case)
    assert case["floor_us"] == pytest.approx(1.81 + 2.0)  # the exchange of this round; 600 bytes at 300 a microsecond
    assert case["share"] == pytest.approx(3.81 / case["us"])
    assert data["compile"] == [
        {
            "world_size": 2,
            "formats": ["none", "nvfp4/128x4", "fp8_static"],
            "cold_seconds": [0.31, 0.2, 0.2],
            "cached_seconds": [0.02, 0.03, 0.01],
        }
    ]
    said = capsys.readouterr()
    assert "decode, world 2" in said.out
    assert "T=1 | norm 2.00" in said.err
    assert "another rank" not in said.err


def test_json_to_stdout_is_alone_there(two_gpus: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert latency.run(json="-", tokens=[1])
    said = capsys.readouterr()
    assert json.loads(said.out)["passed"] is True
    assert "us per call" in said.err


@pytest.mark.parametrize(("gpus", "world"), [(0, None), (1, None), (2, 3), (4, 1)])
def test_a_machine_without_a_gpu_for_each_rank_is_refused(monkeypatch: pytest.MonkeyPatch, gpus: int, world: int | None) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpus > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    monkeypatch.setattr(latency, "run_processes", lambda *a, **k: pytest.fail("ranks were started"))
    with pytest.raises(PlatformError, match="GPUs"):
        latency.run(world_size=None if world is None else [world])


def test_a_run_passes_only_if_every_number_of_collogue_is_there() -> None:
    data = made()
    assert report.passed(data)
    row = report.find(data, what=NCCL)[0]
    row |= {"us": None, "error": "no NCCL"}
    assert report.passed(data)  # another library's failure is recorded, and is not ours
    for what in ("collogue", EXCHANGE):
        data = made()
        report.find(data, what=what)[0]["error"] = "1 elements differ"
        assert not report.passed(data)
    for part in ("wire", "host"):
        data = made()
        data[part][0]["error"] = "wrong"
        assert not report.passed(data)
    assert not report.passed({**made(), "cases": []})


def test_without_an_exchange_or_a_latency_there_is_no_floor_and_no_share() -> None:
    rows, wire = fake_rank(2)["rows"], {"us": None, "bytes_sent": 1}
    assert all(r["floor_us"] is None and r["share"] is None for r in report.add_floors(rows, wire))
    wire = {"us": 1.0, "bytes_sent": 300}
    for row in rows:
        if row["what"] == "collogue":
            row["us"] = None
    found = [r for r in report.add_floors(rows, wire) if r["what"] == "collogue"]
    assert all(r["floor_us"] is not None and r["share"] is None for r in found)
    assert all(r["floor_us"] is None for r in report.add_floors([r for r in rows if r["what"] != EXCHANGE], wire))


def test_the_table_of_the_readme() -> None:
    data = made()
    report.find(data, section="decode", what=NCCL, tokens=2)[0]["us"] = None
    report.find(data, section="decode", what="collogue", tokens=64, format="none", norm=True)[0]["us"] = 123.456
    lines = report.latency_table(data).splitlines()
    assert lines[0].startswith(f"2 x GPU X, H = {HIDDEN_SIZE}, bfloat16")
    assert (
        lines[4] == "| tokens | Collogue, norm | Collogue, NVFP4 | Collogue, FP8 static "
        "| NCCL or symm. mem., then a compiled norm | NCCL all-reduce alone | lower bound (norm) |"
    )
    assert lines[6] == "| 1 | 5.15 | 5.16 | 5.17 | - | 1.12 | 3.11 |"
    assert lines[12] == "| 512 | 56.25 | 56.26 | 56.27 | - | 52.22 | 54.21 |"
    assert lines[10].startswith("| 64 | 123 |")
    assert len(lines) == 6 + len(report.DECODE) + len(report.LARGE)
    with pytest.raises(ValueError, match="decode"):
        report.latency_table({"cases": [], "machine": {}})


def test_the_text_shows_every_case_or_its_error() -> None:
    data = made()
    row = report.find(data, section="large", what="collogue", tokens=256, format="nvfp4/128x4")[0]
    row |= {"us": None, "error": "CompileError: no"}
    text = report.text(data)
    assert "NO NUMBER nvfp4/128x4 T=256 H=7168: CompileError: no" in text
    assert "wire, world 2: 0 GB/s" in text
    assert "12.5 us per eager call" in text
    assert "cold: 0.300 s" in text
    assert re.search(rf"\n *{HIDDEN_SIZE} +256 ", text)
    assert len(FEW) == 3
    assert summary("T=256", [row]) == "T=256 | nvfp4/128x4 FAILED: CompileError: no"

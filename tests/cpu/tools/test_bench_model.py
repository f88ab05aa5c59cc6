"""``collogue bench model``: the same code on the CPU, and what it says of the results. Times taken here mean nothing."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from collogue.errors import ArgumentError
from collogue.pytorch.fusion import Fused, Missed, Report
from collogue.testing.processes import run_processes
from collogue.tools.bench import model, tables
from collogue.tools.bench.stack import ACTIVATIONS, SHAPES, rank_shape
from collogue.tools.bench.variants import ALL, BASELINES, COLLOGUE, LOCAL

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("scales", ACTIVATIONS)
def test_dry_run(scales: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Every way that needs no GPU has a number, and its output is NCCL's (here: gloo's)."""
    file, picture = tmp_path / "model.json", tmp_path / "model.png"
    assert model.run(
        model=["tiny"],
        tokens=[3],
        world_size=[2],
        layers=1,
        replays=1,
        scales=scales,
        device="cpu",
        json=str(file),
        plot=str(picture),
        commit="c",
    )
    data = json.loads(file.read_text())
    rows = {row["what"]: row for row in data["rows"]}
    assert list(rows) == list(ALL)
    assert (data["commit"], data["layers"], data["scales"]) == ("c", 1, scales)
    for what in (*COLLOGUE, "nccl", LOCAL):
        assert rows[what]["error"] is None
        assert rows[what]["tokens_per_second"] == pytest.approx(3e6 / rows[what]["us"])
    assert rows["nccl"]["difference"] == 0.0
    assert all(rows[what]["difference"] < model.TOLERANCE for what in COLLOGUE)
    assert rows[LOCAL]["difference"] > model.TOLERANCE, "the gate would not see a missing sum"
    assert all("SymmetricMemory" in rows[what]["error"] for what in BASELINES[1:])
    assert picture.stat().st_size > 0
    assert "| tiny | 2 | 3 |" in capsys.readouterr().out


def _unclamped(n: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    """What the fusion pass leaves alone: larger values would be NaN."""
    return (n.float() * (1.0 / scale)).to(torch.float8_e4m3fn), scale


def _unfused(group: Any, tell: Any) -> list[model.Row]:
    """The rows of a rank whose models do not clamp."""
    ACTIVATIONS["static"] = replace(ACTIVATIONS["static"], quantize=_unclamped)
    return model.model_rank(group, tell, ["tiny"], [3], 1, 1, "static")


def test_a_pass_that_has_not_fused_has_no_number() -> None:
    """Its output would be right, and its time that of something else."""
    for rows in run_processes(2, _unfused):
        found = {row["what"]: row for row in rows}
        assert "without a clamp" in (found["collogue pass"]["error"] or "")
        assert found["collogue pass"]["us"] is None
        assert found["collogue eager"]["error"] is None


def fused(**changed: Any) -> Fused:
    given = {"residual": True, "eps": 1e-6, "weight_offset": 0.0, "quant": "fp8_static", "keeps_norm": False, "roundings": ()}
    return Fused(where="x", comm="c", shape="[1]", **given | changed)


@pytest.mark.parametrize(
    ("report", "said"),
    [
        (Report([fused(), fused()]), None),
        (Report([fused()]), "fused 1 of 2"),
        (Report(), "fused 0 of 2"),
        (Report([fused(), fused(quant="none")]), "RMSNorm"),
        (Report([fused(), fused(keeps_norm=True)]), "and the norm"),
        (Report([fused(), fused(residual=False)]), "all_reduce + RMSNorm"),
        (Report([fused(), fused()], [Missed("x", "why")]), "missed"),
        (Report([fused(), fused()], [], ["outside"]), "outside"),
    ],
)
def test_what_a_pass_leaves_is_said(report: Report, said: str | None) -> None:
    found = model._left_out(report, 2)
    assert found is None if said is None else said in (found or "")


def row(what: str, us: float | None, **more: Any) -> dict[str, Any]:
    return {"model": "m", "world_size": 2, "tokens": 4, "what": what, "us": us, "error": None, "share_of_collectives": None, **more}


def test_speedups_are_against_the_better_baseline() -> None:
    times = dict(zip(ALL, (50.0, 40.0, None, 80.0, 60.0, 100.0, 20.0), strict=True))
    rows = [row(what, us) for what, us in times.items()]
    model._add_speedups(rows)
    found = {r["what"]: r for r in rows}
    assert (found["collogue pass"]["speedup_nccl"], found["collogue pass"]["speedup_symm_mem"]) == (2.0, 1.5)
    assert "speedup_nccl" not in found["collogue sharded"]
    assert model.table({"rows": rows}).splitlines()[2] == "| m | 2 | 4 | 50 | 40 | - | 80 | 60 | 100 | 20 | 2.00 | 1.50 | - |"


def test_layer_gains_are_over_the_faster_baseline() -> None:
    rows = [row(what, us) for what, us in zip(ALL, (50.0, 40.0, None, 80.0, 60.0, 100.0, 20.0), strict=True)]
    model._add_speedups(rows)
    assert tables.layer_gains({"rows": rows}) == {"m, 2 ranks": {"T = 4": 1.5}}


def test_unknown_models() -> None:
    with pytest.raises(ArgumentError, match="unknown model 'gpt'"):
        model.run(model=["gpt"], device="cpu")


@pytest.mark.parametrize("name", model.MODELS)
@pytest.mark.parametrize("world", [2, 4, 8])
def test_shapes_divide(name: str, world: int) -> None:
    whole, part = SHAPES[name], rank_shape(SHAPES[name], world)
    assert part.heads * world == whole.heads
    assert part.intermediate_size * world == whole.intermediate_size
    assert part.heads % part.kv_heads == 0
    # What torch._scaled_mm asks for.
    assert all(size % 16 == 0 for size in (part.heads * part.head_dim, part.intermediate_size, part.hidden_size))

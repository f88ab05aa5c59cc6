"""`collogue tune` on two or more GPUs, and tables that force each candidate: the same bits."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from collogue.communicator import Communicator
from collogue.planning.explain import Machine
from collogue.planning.table import FORMAT
from collogue.testing import VirtualGroup, run_virtual
from collogue.tools.check import Answers, Case, run_case
from collogue.tools.tune.main import run
from collogue.tools.tune.trials import CANDIDATES

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(torch.cuda.device_count() < 2, reason="fewer than two GPUs"), pytest.mark.timeout(300)]
TOKENS, WIDTH = (1, 5, 64, 300), 7168


def test_tune_measures_and_refuses_nothing(tmp_path: Path) -> None:
    target = tmp_path / "t.json"
    data = run(hidden_size=[576, WIDTH], tokens=[1, 64, 700], world_size=2, json=str(target))
    assert data["refused"] == []
    assert data["passed"] is True
    assert [entry["hidden_size"] for entry in data["entries"]] == [576, WIDTH]
    for entry in data["entries"]:
        assert all(row["us"] > 0.5 for row in entry["times"])
        assert entry["steps"][-1]["candidate"].startswith("two_shot")

    def rank(group: VirtualGroup) -> list[tuple[str, float | None]]:
        with Communicator(group, max_tokens=700, hidden_size=WIDTH, table=target) as comm:
            return [(plan.table, plan.measured_us) for plan in map(comm.explain, (1, 64, 700))]

    for told, us in run_virtual(2, rank, device="cuda")[0]:
        assert "not used" not in told
        assert us is not None


@pytest.mark.parametrize("candidate", CANDIDATES, ids=str)
def test_forced_tables_never_change_a_bit(candidate: Any, tmp_path: Path) -> None:
    one, path, here = candidate.algorithm == "one_shot", tmp_path / "t.json", Machine.here()
    steps = [{"up_to": 400, "candidate": str(candidate)}] * one + [{"up_to": None, "candidate": "two_shot" if one else str(candidate)}]
    entry = {"architecture": here.architecture, "device": here.device, "world_size": 2, "dtype": "bfloat16", "hidden_size": WIDTH}
    path.write_text(json.dumps({"format": FORMAT, "entries": [{**entry, "steps": steps, "times": []}]}))
    cases = [Case(t, WIDTH, format=f, seed=t) for t in TOKENS for f in ("none", "nvfp4/128x4", "fp8_per_token")]
    answers = Answers()

    def rank(group: VirtualGroup) -> list[str]:
        wrong = []
        with Communicator(group, max_tokens=max(TOKENS), hidden_size=WIDTH, table=path) as comm:
            for case in cases:
                plan = comm.explain(case.tokens, quant=case.quant("cpu"))
                assert plan.algorithm == candidate.algorithm, plan
                result = run_case(comm, case, answers, group.settle)
                if not result.passed:
                    wrong.append(f"{case}: {result.error or result.first}")
        return wrong

    assert run_virtual(2, rank, device="cuda") == [[], []]

"""The full sweep covers what it says, and the kernels that a check compiles beforehand are those that its calls launch."""

from __future__ import annotations

import itertools
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from collogue import Communicator, RMSNorm
from collogue.gpu import jit
from collogue.planning.plan import make_plan
from collogue.testing import run_virtual
from collogue.tools.check import Answers, Case, default_sweep, full_sweep, run_case
from collogue.tools.check.full import HIDDEN_SIZES, LABELS, MANY, OWNED_TOKENS, TOKENS, one_shot_tokens
from collogue.tools.check.kernels import capacity_of, request_of, topology_on, variants_on
from collogue.tools.check.sweep import DTYPES, OPERATIONS, VARIANTS
from collogue.tools.cli import app

MACHINE: dict[str, Any] = {"architecture": "sm_90a", "multiprocessors": 132}
EVERY = full_sweep()
FULL = [c for c in EVERY if c.operation == "all_reduce"]


def plan_of(case: Case, cases: list[Case]) -> str:
    same = [c for c in cases if (c.world_size, c.dtype) == (case.world_size, case.dtype)]
    return make_plan(topology_on(same, **MACHINE, gpus=2), request_of(case)).algorithm


def test_the_full_sweep_meets_every_pair_at_world_two() -> None:
    assert {label for labels in VARIANTS.values() for label in labels} <= set(LABELS)
    two = [c for c in FULL if c.world_size == 2 and c.possible]
    most = {d: one_shot_tokens(2, d) for d in DTYPES}

    def rows(case: Case) -> int:
        return 0 if case.tokens == most[case.dtype][case.hidden_size] else case.tokens

    possible = [(label, h) for label, h in itertools.product(LABELS, HIDDEN_SIZES) if Case(1, h, format=label).possible]
    assert {(c.format, c.dtype, c.hidden_size) for c in two} >= {(label, d, h) for (label, h), d in itertools.product(possible, DTYPES)}
    assert {(rows(c), c.format) for c in two} >= set(itertools.product(TOKENS, LABELS))
    assert {(rows(c), c.dtype) for c in two} >= set(itertools.product(TOKENS, DTYPES))
    assert {(rows(c), c.hidden_size) for c in two} >= set(itertools.product(TOKENS, HIDDEN_SIZES))
    refused = {(c.format, c.hidden_size) for c in FULL if not c.possible}
    assert refused == set(itertools.product(LABELS, HIDDEN_SIZES)) - set(possible)


def test_the_full_sweep_meets_every_world() -> None:
    for world in range(3, 9):
        mine = [c for c in FULL if c.world_size == world]
        assert {(c.format, c.dtype) for c in mine} == set(itertools.product(LABELS, DTYPES))
        assert {plan_of(c, mine) for c in mine} == {"one_shot", "two_shot"}
    larger = {(c.format, c.hidden_size) for c in FULL if c.world_size > 2}
    assert larger >= {(label, h) for label, h in itertools.product(LABELS, HIDDEN_SIZES) if Case(1, h, format=label).possible}
    assert len({(c.residual, c.norm, c.keep_norm) for c in FULL}) >= 5


def test_calls_beyond_one_shot_are_in_the_full_sweep() -> None:
    two = [c for c in FULL if c.world_size == 2 and c.possible]
    for dtype in DTYPES:
        for h, tokens in one_shot_tokens(2, dtype).items():
            plans = {c.tokens: plan_of(c, two) for c in two if (c.dtype, c.hidden_size) == (dtype, h)}
            assert plans[tokens] == "one_shot"
            assert plans[tokens + 1] == ("two_shot" if tokens < MANY else "one_shot")  # narrow rows never need a second hop
            assert tokens < MANY or h <= 24
    many = [c for c in two if c.tokens == MANY and c.hidden_size >= 576]
    assert {plan_of(c, two) for c in many} == {"two_shot"}
    assert {(c.format, c.dtype) for c in two if c.tokens == MANY} >= set(itertools.product(LABELS, DTYPES))


def test_the_full_sweep_meets_every_operation() -> None:
    cases = [c for c in EVERY if c.operation != "all_reduce"]
    assert all(c.possible for c in cases)
    assert {(c.operation, c.format) for c in cases if c.world_size == 2} == set(itertools.product(OPERATIONS[1:], LABELS))
    assert {(c.tokens, c.dtype) for c in cases if c.world_size == 2 and c.operation == "sharded"} == set(
        itertools.product((*OWNED_TOKENS, 16384), DTYPES)
    )
    for world in range(3, 9):
        mine = [c for c in cases if c.world_size == world]
        assert {c.format for c in mine if c.operation == "sharded"} == set(LABELS)
        assert {c.operation for c in mine} == set(OPERATIONS[1:])
        assert {c.tokens for c in mine} == set(OWNED_TOKENS)
    assert {(c.residual, c.norm, c.keep_norm) for c in cases} >= {(c.residual, c.norm, c.keep_norm) for c in FULL if c.norm}


def test_topology_and_request_are_those_of_the_communicator() -> None:
    cases = [c for c in default_sweep("cuda") if c.world_size == 3 and c.dtype == "bfloat16" and c.possible]
    tokens, width = capacity_of(cases)

    def rank(group: Any) -> None:
        comm = Communicator(group, max_tokens=tokens, hidden_size=width)
        facts = replace(comm.topology, transport="peer", islands=(), why="")  # of which no kernel of peers knows
        assert facts == topology_on(cases, architecture=None, multiprocessors=0, gpus=group.size)
        for case in cases:
            weight = torch.ones(case.hidden_size, dtype=torch.float32 if case.weight_dtype else torch.bfloat16)
            made = request_of(case)
            norms = {name: RMSNorm(weight) for name in ("norm", "branch_norm") if case.asked.get(name)}
            given = {name: norms.get(name) if name in ("norm", "branch_norm") else value for name, value in case.asked.items()}
            asked = comm._capacity.request(case.tokens, quant=case.quant("cpu"), hidden_size=case.hidden_size, **given)
            assert {**vars(asked), "quant": None} == {**vars(made), "quant": None}

    run_virtual(3, rank)


def test_kernels_are_compiled_once_and_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jit, "cache_directory", lambda: tmp_path)
    cases = [Case(2, 576, format="nvfp4"), Case(3, 576, format="nvfp4"), Case(2, 24, format="nvfp4"), Case(0, 576)]
    variants = variants_on(cases, **MACHINE, gpus=2)
    assert len(variants) == 1
    told: list[str] = []
    jit.build([*variants, *variants], "sm_90a", built=told.append)
    assert told == [variants[0].name]
    (file,) = tmp_path.glob("*.cubin")
    assert file.read_bytes()[:4] == b"\x7fELF"
    assert jit.cubin(variants[0], "sm_90a") == file.read_bytes()


def test_ranks_that_share_gpus_settle_around_every_call() -> None:
    case = Case(3, 64, format="nvfp4", world_size=3)
    met: list[int] = []

    def rank(group: Any) -> None:
        def settle() -> None:
            group.settle()
            met.append(group.rank)

        comm = Communicator(group, max_tokens=3, hidden_size=64)
        assert run_case(comm, case, Answers(), settle).passed

    run_virtual(3, rank)
    assert sorted(met) == [0] * 4 + [1] * 4 + [2] * 4


@pytest.mark.slow
@pytest.mark.parametrize(
    ("arguments", "code", "told"),
    [
        (["--sweep", "full"], 3, "there is no CUDA GPU"),
        (["--sweep", "full", "--tokens", "3"], 2, "takes no lists"),
        (["--sweep", "full", "--device", "cpu"], 2, "for --device cuda"),
        (["--sweep", "some"], 2, "'some' is not one of default, full"),
    ],
)
def test_the_full_sweep_on_the_command_line(arguments: list[str], code: int, told: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    result = CliRunner().invoke(app, ["check", *arguments], env={"COLUMNS": "200"})
    assert result.exit_code == code
    assert told in " ".join(result.output.split())

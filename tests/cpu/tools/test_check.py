"""The engine of ``collogue check``: it must find a single wrong bit, a wrong padding byte, a missing error and a lost rank."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from collogue import Communicator
from collogue.contract.quant import describe, parse
from collogue.contract.spec import Operation, Output
from collogue.errors import CollectiveTimeout, FormatError, PlatformError
from collogue.formats import scale_storage
from collogue.testing import run_virtual
from collogue.testing.compare import compare
from collogue.testing.inputs import KINDS, make_inputs, make_partials
from collogue.testing.processes import RanksFailed, run_processes
from collogue.tools.check import Answers, Case, CaseResult, Report, check_rank, default_sweep, expand, run_case, run_cases, sweep
from collogue.tools.check.run import _process, merge
from collogue.tools.check.sweep import DTYPES, OPERATIONS, VARIANTS


class Faulty:
    """A communicator whose every output passes through ``spoil``."""

    def __init__(self, comm: Communicator, spoil: Callable[[Output], Output]) -> None:
        self.rank, self.device, self.check = comm.rank, comm.device, comm.check
        self._comm, self._spoil = comm, spoil

    def all_reduce(self, *args: Any, **kwargs: Any) -> Output:
        return self._spoil(self._comm.all_reduce(*args, **kwargs))

    def reduce_scatter(self, *args: Any, **kwargs: Any) -> Output:
        return self._spoil(self._comm.reduce_scatter(*args, **kwargs))

    def all_gather(self, *args: Any, **kwargs: Any) -> Output:
        return self._spoil(self._comm.all_gather(*args, **kwargs))

    def finish(self, *args: Any, **kwargs: Any) -> Output:
        return self._spoil(self._comm.finish(*args, **kwargs))


def run_faulty(case: Case, spoil: Callable[[Output], Output], faulty_rank: int = 1) -> CaseResult:
    answers = Answers()

    def rank(group: Any) -> list[CaseResult]:
        comm = Communicator(group, max_tokens=max(1, case.tokens), hidden_size=case.hidden_size, dtype=getattr(torch, case.dtype))
        return [run_case(Faulty(comm, spoil) if group.rank == faulty_rank else comm, case, answers)]  # type: ignore[arg-type]

    return merge(run_virtual(case.world_size, rank))[0]


@pytest.mark.slow
def test_default_sweep_on_cpu_passes() -> None:
    started = []
    results = run_cases("cpu", default_sweep("cpu"), started=started.append)
    assert [(str(r.case), r.error, r.first) for r in results if not r.passed] == []
    assert sorted(map(str, started)) == sorted(str(r.case) for r in results)
    assert {r.ranks for r in results} == {"threads"}


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_default_sweep_covers_what_it_says(device: str) -> None:
    cases = default_sweep(device)
    assert len(cases) >= 20
    assert len(set(cases)) == len(cases)
    assert {c.dtype for c in cases} == set(DTYPES)
    assert {c.operation for c in cases} == set(OPERATIONS)
    assert {describe(parse(c.format)) for c in cases if c.possible} >= {label for labels in VARIANTS.values() for label in labels}
    assert {c.hidden_size for c in cases} >= {8, 24, 576, 2880}
    assert {c.tokens for c in cases} >= {0, 1, 3, 129}
    assert {c.inputs for c in cases} == set(KINDS)
    assert {c.world_size for c in cases} >= {2, 3}
    assert {(c.residual, c.norm) for c in cases} == {(a, b) for a in (True, False) for b in (True, False)}
    assert {c.scale_tensors for c in cases} == {c.possible for c in cases} == {True, False}


def test_sweep_is_the_product_of_the_lists() -> None:
    cases = sweep(world_size=[2, 3], tokens=[1, 5], hidden_size=[64], dtype=["float16"], format=["none", "nvfp4"])
    assert len(cases) == 2 * 2 * (1 + 3)
    assert {(c.world_size, c.tokens, c.format) for c in cases} >= {(3, 5, "nvfp4/8x4"), (2, 1, "none")}
    with pytest.raises(FormatError, match="float64"):
        sweep(dtype=["float64"])
    with pytest.raises(FormatError, match="nvfp5"):
        sweep(format=["nvfp5"])
    with pytest.raises(FormatError, match="'gather'"):
        sweep(operation=["gather"])
    cases = sweep(tokens=[1], dtype=["float16"], format=["none"], operation=["sharded", "finish"])
    assert [c.operation for c in cases] == ["sharded", "finish"]
    assert str(cases[0]).endswith("operation=sharded")


def test_a_bare_format_name_stands_for_its_variants() -> None:
    assert expand("none") == ["none"]
    assert expand("mxfp4/ceil") == ["mxfp4/ceil/128x4"]
    assert len(expand("mxfp8")) == 6
    assert expand("fp8_group64") == [label.replace("128", "64") for label in VARIANTS["fp8_group"]]
    assert {name: len(labels) for name, labels in VARIANTS.items()} == {
        "none": 1,
        "nvfp4": 3,
        "mxfp4": 6,
        "mxfp8": 6,
        "fp8_static": 1,
        "fp8_per_token": 1,
        "fp8_group": 4,
    }
    for labels in VARIANTS.values():
        assert [describe(parse(label)) for label in labels] == list(labels)


def flip(tensor: torch.Tensor, *index: int) -> None:
    """Turn over the lowest bit of one element."""
    bits = tensor.view({1: torch.uint8, 2: torch.int16, 4: torch.int32}[tensor.element_size()])
    bits[index] ^= 1


@pytest.mark.parametrize("name", ["residual", "norm", "codes", "scales"])
def test_one_wrong_bit_is_found(name: str) -> None:
    def spoil(out: Output) -> Output:
        flip(getattr(out, name), 2, 1)
        return out

    result = run_faulty(Case(3, 64, format="nvfp4/linear"), spoil)
    assert not result.passed
    # One element in each of the two calls of one rank.
    assert result.differing == {**dict.fromkeys(("residual", "norm", "codes", "scales"), 0), name: 2}
    assert result.first is not None
    assert result.first.startswith(f"rank 1: {name}[2, 1]: 0x")


@pytest.mark.parametrize("operation", ["sharded", "reduce_scatter", "all_gather", "finish"])
def test_one_wrong_bit_of_every_operation_is_found(operation: Operation) -> None:
    def spoil(out: Output) -> Output:
        flip(out.codes, 0, 1)  # type: ignore[arg-type]
        return out

    result = run_faulty(Case(5, 64, format="nvfp4/8x4", operation=operation), spoil)
    assert result.differing == {**dict.fromkeys(result.case.outputs, 0), "codes": 2}
    assert not result.passed


@pytest.mark.parametrize("operation", ["sharded", "all_gather", "finish"])
def test_operations_refuse_what_the_format_cannot_do(operation: Operation) -> None:
    (result,) = run_cases("cpu", [Case(3, 24, format="nvfp4", operation=operation)])
    assert result.passed, result.error
    assert result.expected_error == "FormatError"


@pytest.mark.parametrize("label", ["nvfp4/128x4", "nvfp4/8x4", "fp8_group32/float32/column", "fp8_group32/ue8m0/column"])
def test_a_wrong_padding_byte_is_found(label: str) -> None:
    def spoil(out: Output) -> Output:
        assert out.scales is not None
        scale_storage(out.scales)[-1] += 1
        return out

    result = run_faulty(Case(3, 160, format=label), spoil)
    assert result.differing["scales"] == 2
    assert not result.passed


def test_an_output_too_few_or_of_another_dtype_is_found() -> None:
    def lose(out: Output) -> Output:
        return Output(residual=out.residual, norm=None if out.norm is None else out.norm.float())

    result = run_faulty(Case(3, 64, format="fp8_static"), lose)
    assert not result.passed
    assert result.differing["codes"] == result.differing["norm"] == 2 * 3 * 64
    assert result.differing["residual"] == 0


def test_an_output_that_is_not_written_is_found() -> None:
    """Poison differs from zeros, which fresh memory often holds."""

    class Idle(Faulty):
        def all_reduce(self, *args: Any, out: Output | None = None, **kwargs: Any) -> Output:
            return out if out is not None else super().all_reduce(*args, **kwargs)

    case = Case(3, 96, format="nvfp4/8x4", world_size=1, residual=False, inputs="zeros")

    def rank(group: Any) -> CaseResult:
        comm = Communicator(group, max_tokens=3, hidden_size=96)
        return run_case(Idle(comm, lambda out: out), case, Answers())  # type: ignore[arg-type]

    (result,) = run_virtual(1, rank)
    assert result.differing == {"residual": 3 * 96, "norm": 3 * 96, "codes": 3 * 48, "scales": 8 * 8}


def test_a_call_that_must_be_refused_passes_only_if_it_is() -> None:
    case = Case(3, 24, format="nvfp4")
    (result,) = run_cases("cpu", [case])
    assert result.passed
    assert result.error is not None
    assert result.error.startswith("FormatError: NVFP4 has blocks of 16")
    assert not CaseResult(case, {}, None, "FormatError").passed
    assert not CaseResult(case, {}, "ShapeError: other", "FormatError").passed


def test_an_error_is_a_failure_and_is_told() -> None:
    def raise_once(out: Output) -> Output:
        raise RuntimeError("spoiled\nhint: none")

    result = run_faulty(Case(3, 64, world_size=1), raise_once, faulty_rank=0)
    assert not result.passed
    assert result.error == "RuntimeError: spoiled (rank 0)"
    assert set(result.differing.values()) == {0}


def test_after_a_failed_collective_nothing_else_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    def late(self: Communicator, *args: Any, **kwargs: Any) -> Output:
        raise CollectiveTimeout("rank 1 was late", hint="look at rank 1")

    monkeypatch.setattr(Communicator, "all_reduce", late)
    cases = [Case(1, 64, world_size=1), Case(3, 64, world_size=1)]
    (results,) = run_virtual(1, lambda group: check_rank(group, cases, Answers(), lambda text: None))
    assert results[0].error == "CollectiveTimeout: rank 1 was late"
    assert results[1].error is not None
    assert results[1].error.startswith("not run after")
    assert not any(r.passed for r in results)


def test_cuda_without_a_gpu_is_an_error_of_the_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(PlatformError, match="hint: run `collogue doctor`"):
        run_cases("cuda", [Case(1, 64)])


def test_report_as_json() -> None:
    report = Report(run_cases("cpu", [Case(3, 64, format="fp8_per_token"), Case(3, 24, format="mxfp8")]), {"versions": {"x": "1"}})
    data = json.loads(json.dumps(report.as_json(), allow_nan=False))
    assert data["passed"] is True
    assert data["versions"] == {"x": "1"}
    first, second = data["cases"]
    assert first["differing"] == {"residual": 0, "norm": 0, "codes": 0, "scales": 0}
    assert first["error"] is None
    assert (first["tokens"], first["hidden_size"], first["dtype"], first["format"], first["world_size"], first["device"]) == (
        3,
        64,
        "bfloat16",
        "fp8_per_token",
        2,
        "cpu",
    )
    assert second["passed"]
    assert second["expected_error"] == "FormatError"
    assert not Report([]).passed


def test_compare_says_where_and_what() -> None:
    left, right = torch.zeros(2, 3, dtype=torch.bfloat16), torch.zeros(2, 3, dtype=torch.bfloat16)
    right[1, 2] = -0.0
    found = compare(Output(norm=left), Output(norm=right))
    assert found["norm"].count == 1
    assert found["norm"].first == "norm[1, 2]: 0x0000 (0), expected 0x8000 (-0)"
    nan = torch.full((1, 1), torch.nan)
    assert compare(Output(norm=nan), Output(norm=nan.clone()))["norm"].count == 0
    assert compare(Output(), Output(norm=nan))["norm"].first == "norm: nothing, expected float32 [1, 1] strides [1, 1] on cpu"
    column = torch.zeros(8).as_strided((3, 2), (1, 4))
    wrong = torch.tensor([0, 0, 0, 0, 0, 0, 0, 5.0]).as_strided((3, 2), (1, 4))
    assert (
        compare(Output(scales=wrong), Output(scales=column))["scales"].first
        == "scales[3, 1] (padding): 0x40a00000 (5), expected 0x00000000 (0)"
    )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_inputs_are_what_their_names_say(dtype: torch.dtype) -> None:
    shape: dict[str, Any] = {"tokens": 6, "hidden_size": 96, "dtype": dtype}
    made = {kind: make_inputs(kind, rank=1, **shape).partial for kind in KINDS}
    tiny = torch.finfo(dtype).smallest_normal
    assert 0.9 < float(made["normal"].float().std()) < 1.1
    assert (made["subnormal"].abs() < tiny).all()
    assert (made["subnormal"] != 0).float().mean() > 0.9
    assert made["nan"].isnan()[0].any()
    assert not made["nan"][1].isnan().any()
    assert {float(v) for v in made["inf"][made["inf"].isinf()]} == {float("inf"), float("-inf")}
    assert float(made["outlier"].abs().max()) > 1000
    assert (made["zeros"] == 0).all()
    assert made["zeros"].signbit().any()
    assert not made["zeros"].signbit().all()
    assert len(made["order"].abs().unique()) >= 3


def test_inputs_are_the_same_on_every_rank_and_run() -> None:
    shape: dict[str, Any] = {"tokens": 3, "hidden_size": 64, "dtype": torch.float32}
    zero, one, other = (make_inputs("normal", rank=r, seed=s, **shape) for r, s in ((0, 0), (1, 0), (0, 1)))
    assert torch.equal(zero.residual, one.residual)
    assert torch.equal(zero.weight, one.weight)
    assert not torch.equal(zero.partial, one.partial)
    assert not torch.equal(zero.partial, other.partial)
    assert not torch.equal(zero.residual, other.residual)
    assert torch.equal(make_partials("normal", 2, **shape)[1], one.partial)
    assert int(zero.partial.view(torch.int32).long().sum()) == -30960545520


FAULTS = """
import os, time

def good(group, tell, factor):
    tell("working")
    return group.rank() * factor

def silent(group, tell):
    tell("waiting for ever" if group.rank() else "still fine")
    time.sleep(600)

def dying(group, tell):
    tell("about to die")
    os._exit(7) if group.rank() else time.sleep(600)

def raising(group, tell):
    raise ValueError("rank %d is wrong" % group.rank())
"""


@pytest.fixture
def faults(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    (tmp_path / "faults_of_ranks.py").write_text(FAULTS)
    monkeypatch.syspath_prepend(tmp_path)
    import faults_of_ranks  # type: ignore[import-not-found]

    return faults_of_ranks


@pytest.mark.slow
def test_processes_return_by_rank(faults: Any) -> None:
    heard: list[tuple[int, str]] = []
    assert run_processes(2, faults.good, 10, heard=lambda *word: heard.append(word)) == [0, 10]
    assert {(0, "working"), (1, "working")} <= set(heard)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("fault", "told"),
    [("silent", "no rank has said a word for 20 s"), ("dying", "rank 1 ended with exit code 7"), ("raising", "is wrong")],
)
def test_a_lost_rank_ends_all_and_every_stage_is_told(faults: Any, fault: str, told: str) -> None:
    with pytest.raises(RanksFailed) as caught:
        # Processes that start beside other work say nothing for a while.
        run_processes(2, getattr(faults, fault), silence=20.0 if fault == "silent" else 60.0)
    assert told in str(caught.value)
    assert "last stages: rank 0:" in str(caught.value)
    if fault == "silent":
        assert "rank 1: waiting for ever" in str(caught.value)


@pytest.mark.slow
def test_cases_in_processes_equal_those_in_threads() -> None:
    cases = sweep(tokens=[3], hidden_size=[64], dtype=["bfloat16"], format=["nvfp4/8x4", "none"])
    heard: list[str] = []
    results = merge(run_processes(2, _process, cases, heard=lambda rank, stage: heard.append(stage)))
    assert all(r.passed for r in results)
    assert str(cases[0]) in heard


@pytest.mark.parametrize("size", range(1, 9))
def test_a_case_in_another_world_has_all_its_rows(size: int) -> None:
    for case in default_sweep("cpu"):
        moved = case.in_world(size)
        assert (moved.world_size, moved.tokens) == (size, case.tokens)
        assert (moved.rows is None) == (case.rows is None)
        assert moved.rows is None or (len(moved.rows), sum(moved.rows)) == (size, case.tokens)

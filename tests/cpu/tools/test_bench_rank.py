"""One rank of `collogue bench` without GPUs: what it times, and what other libraries' ways must give."""

from __future__ import annotations

import gc
import sys
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from bench_fakes import Counter, Recorded

from collogue import reference
from collogue.contract.spec import Output
from collogue.planning.topology import Overrides
from collogue.testing import run_virtual
from collogue.tools.bench import baselines, epilogue, latency, report
from collogue.tools.bench import rank as rank_module
from collogue.tools.bench.baselines import Baseline, Baselines, OtherCall, integers
from collogue.tools.bench.cases import COMPILED, FLASHINFER, NCCL, VLLM, Round, chosen_rounds, has_chain
from collogue.tools.bench.floors import EMPTY, EXCHANGE, WIRE
from collogue.tools.bench.gate import call_each_set
from collogue.tools.bench.names import label
from collogue.tools.bench.timing import SETS, EagerLatency, Latency
from collogue.tools.check import Case
from collogue.tools.check.rank import arguments


class FakeFloors:
    bytes_sent = 1 << 20

    def __init__(self, *arguments: Any) -> None:
        self.subjects = {name: Counter() for name in (EMPTY, EXCHANGE, WIRE)}


class FakeBaselines:
    def __init__(self, *arguments: Any) -> None:
        pass

    def make(self, name: str, case: Case) -> Counter:
        if name != NCCL:
            raise AttributeError(f"there is no {name}")
        return Counter()


@pytest.mark.slow
def test_a_rank_on_the_cpu_with_floors_and_graphs_of_paper(monkeypatch: pytest.MonkeyPatch) -> None:
    """The whole of one rank's part, but for what needs a GPU: rows, errors, plans, host time, compile time."""
    for name, value in {"Floors": FakeFloors, "Baselines": FakeBaselines, "Chain": lambda call, stream: Recorded(call)}.items():
        monkeypatch.setattr(rank_module, name, value)
    monkeypatch.setattr(rank_module, "measure", lambda chains, replays, meet: {name: Latency(2.0, 1.0, 3.0) for name in chains})
    monkeypatch.setattr(rank_module.Bench, "build_all", lambda bench: None)
    monkeypatch.setattr(rank_module.Bench, "meet", lambda bench: None)
    monkeypatch.setattr(rank_module, "HOST_CALLS", 2)
    monkeypatch.setattr(torch.cuda, "Stream", lambda: None)
    rounds = chosen_rounds(2, tokens=[1, 3], hidden_size=[48], format=["none", "nvfp4", "mxfp8"])
    compiled = latency.compiled_cases(rounds)
    told: list[str] = []
    try:
        ranks = run_virtual(2, lambda group: rank_module.bench_rank(group, told.append if group.rank == 0 else len, rounds, compiled))  # type: ignore[arg-type]
        again = run_virtual(2, lambda group: rank_module.start_again(group, len, rounds, compiled))  # type: ignore[arg-type]
    finally:
        gc.enable()
    result = ranks[0]
    found = {(row["tokens"], label(row)): row for row in result["rows"]}
    assert len(found) == len(result["rows"]) == 2 * (2 + 3 + 3)
    for tokens in (1, 3):
        row = found[tokens, "nvfp4/128x4"]
        assert (row["us"], row["low_us"], row["high_us"], row["replays"], row["error"]) == (2.0, 1.0, 3.0, 21, None)
        assert (row["algorithm"], row["bytes_sent"]) == ("reference", tokens * 48 * 2)
        wrong = found[tokens, "mxfp8/floor/128x4"]  # 48 is no multiple of 32
        assert (wrong["us"], wrong["replays"]) == (None, 0)
        assert wrong["error"].startswith("FormatError")
        missing = found[tokens, "symm_mem one_shot_all_reduce"]
        assert missing["error"] == "AttributeError: there is no symm_mem one_shot_all_reduce (rank 0)"
    assert [row["what"] for row in result["host"] if row["us"] > 0] == [
        "comm.all_reduce(...)",
        "comm.all_reduce(..., out=)",
        "torch.ops.collogue.all_reduce(...)",
        "torch.distributed.all_reduce",
    ]
    assert result["wire"]["us"] == 2.0
    assert len(result["cold"]) == len(again[1]) == len(compiled) == 2
    assert [line for line in told if " | " in line][1].startswith("chosen: world 2 T=1 H=48 bfloat16 | empty kernel 2.00 | ")
    assert not report.passed({"cases": result["rows"], "wire": [result["wire"]], "host": result["host"]})  # for the FormatError


def test_integers_have_an_exact_sum_in_every_dtype() -> None:
    for dtype in ("bfloat16", "float16", "float32"):
        case = Case(5, 72, dtype, world_size=8)
        terms = [integers(case, r, torch.device("cpu")) for r in range(8)]
        low = terms[0]
        for term in terms[1:]:
            low = low + term
        assert low.dtype == case.value_dtype
        assert torch.equal(low.double(), sum(t.double() for t in terms))  # type: ignore[arg-type]
        assert not torch.equal(terms[0], terms[1])


@pytest.mark.parametrize("wrong", [False, True])
def test_a_baseline_must_give_the_exact_sum(wrong: bool) -> None:
    case = Case(2, 16, world_size=3)
    others = sum(integers(case, r, torch.device("cpu")) for r in (0, 2))
    tensors = [torch.ones(2, 16, dtype=torch.bfloat16) for _ in range(SETS)]

    def add(x: torch.Tensor) -> None:
        x += others
        x[0, 3] += wrong

    baseline = Baseline(case, 1, tensors, lambda i: add(tensors[i]))
    assert baseline.gate(lambda: call_each_set(baseline)) == ("3 elements differ from the exact sum" if wrong else None)
    assert not any(t.any() for t in tensors)


# ---- whole calls of other libraries


@pytest.mark.parametrize("format", epilogue.FORMATS)
@pytest.mark.parametrize("tokens", [1, 3, 130])
def test_the_epilogue_is_what_the_contract_means(format: str, tokens: int) -> None:
    """Uncompiled here. Only sums of squares are in another order, so nearly all codes, and every byte of the padding, are the same."""
    case = Case(tokens, 96, format=format, keep_norm=False)
    device = torch.device("cpu")
    total, residual, norm = arguments(case, 0, device)
    assert residual is not None
    assert norm is not None
    quant = case.quant(device)
    expected = reference.all_reduce([total], residual=residual, norm=norm, quant=quant)
    scale = torch.tensor(baselines.STATIC_SCALE if format == "fp8_static" else baselines.GLOBAL_SCALE)
    results = epilogue.epilogue(quant, case.eps)(total, residual, norm.weight, scale)
    actual = epilogue.as_output(results, quant)
    assert epilogue.wrong(actual, expected, quant) is None
    assert [name for name, _ in actual.items()] == [name for name, _ in expected.items()]
    for name, tensor in expected.items():
        mine = getattr(actual, name)
        assert (mine.shape, mine.dtype) == (tensor.shape, tensor.dtype)
        if name != "norm" and not (name == "scales" and tensor.dtype == torch.float32):
            same = (mine.view(torch.uint8) == tensor.view(torch.uint8)).double().mean()
            assert same > 0.98, name  # -0 is stored as +0 by the contract only; single codes differ where a norm does


def test_an_epilogue_that_is_wrong_is_seen() -> None:
    case = Case(4, 64, format="nvfp4/128x4", keep_norm=False)
    quant = case.quant("cpu")
    total, residual, norm = arguments(case, 0, torch.device("cpu"))
    expected = reference.all_reduce([total], residual=residual, norm=norm, quant=quant)
    assert epilogue.wrong(expected, expected, quant) is None
    residual_off = Output(residual=expected.residual.clone(), codes=expected.codes, scales=expected.scales)  # type: ignore[union-attr]
    residual_off.residual[1, 5] += 1  # type: ignore[index]
    assert epilogue.wrong(residual_off, expected, quant) == "1 elements of the residual differ from the exact sum"
    codes_off = Output(residual=expected.residual, codes=expected.codes ^ 0x88, scales=expected.scales)  # type: ignore[operator]
    assert str(epilogue.wrong(codes_off, expected, quant)).startswith("relative error")
    zeros = Output(residual=expected.residual, codes=torch.zeros_like(expected.codes), scales=expected.scales)  # type: ignore[arg-type]
    assert epilogue.wrong(zeros, expected, quant) is not None  # what a library gives that has no encoder for this GPU


def test_formats_without_a_compiled_epilogue_are_refused() -> None:
    for label_ in ("mxfp8/ceil/128x4", "nvfp4/linear", "fp8_group128/ue8m0/row"):
        assert not has_chain(Case(1, 128, format=label_, keep_norm=False))
        with pytest.raises(NotImplementedError, match=label_.split("/")[0]):
            epilogue.epilogue(Case(1, 128, format=label_).quant("cpu"), 1e-6)


@pytest.mark.slow
def test_the_epilogue_compiles() -> None:
    """By dynamo, in one graph; the code itself is made where the GPUs are."""
    case = Case(2, 64, format="nvfp4/128x4", keep_norm=False)
    total, residual, norm = arguments(case, 0, torch.device("cpu"))
    assert norm is not None
    given = (total, residual, norm.weight, torch.tensor(300.0))
    function = epilogue.epilogue(case.quant("cpu"), case.eps)
    compiled = torch.compile(function, backend="eager", fullgraph=True)
    for a, b in zip(compiled(*given), function(*given), strict=True):  # type: ignore[arg-type]
        assert torch.equal(a.view(torch.uint8), b.view(torch.uint8))


@pytest.mark.parametrize("name", [NCCL + COMPILED, VLLM + COMPILED])
@pytest.mark.parametrize("wrong", [False, True])
def test_a_chain_passes_its_gate_and_a_wrong_sum_does_not(name: str, wrong: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    case = Case(3, 64, world_size=3, format="fp8_per_token", keep_norm=False)
    device, group = torch.device("cpu"), None
    monkeypatch.setattr(baselines.dist, "get_rank", lambda group: 1)
    monkeypatch.setattr(baselines.dist, "barrier", lambda group: None)
    monkeypatch.setattr(epilogue, "compiled", lambda quant, eps, example: epilogue.epilogue(quant, eps))
    others = sum(integers(case, r, device) for r in (0, 2))

    def in_place(x: torch.Tensor, group: object) -> None:
        x += others
        x[0, 3] += wrong

    def custom(x: torch.Tensor, registered: bool) -> torch.Tensor:
        assert not registered
        total = x + others
        total[0, 3] += wrong
        return total

    monkeypatch.setattr(baselines.dist, "all_reduce", in_place)
    made = Baselines(group, device, 1 << 16)  # type: ignore[arg-type]
    monkeypatch.setattr(made, "_vllm", type("Fake", (), {"all_reduce": staticmethod(custom)}))
    chain = made.make(name, case)
    assert isinstance(chain, OtherCall)
    found = chain.gate(lambda: call_each_set(chain))
    assert found == ("1 elements of the residual differ from the exact sum" if wrong else None)


@pytest.mark.parametrize("late", [False, True])
def test_vllm_is_asked_to_finish_its_start(late: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Later versions are disabled until ``finalize_p2p``; earlier ones do not have it."""

    class Early:
        def __init__(self, group: object, device: object, max_size: int) -> None:
            self.disabled, self.max_size = late, max_size

    class Late(Early):
        def finalize_p2p(self) -> None:
            self.disabled = False

    module = SimpleNamespace(CustomAllreduce=Late if late else Early)
    monkeypatch.setitem(sys.modules, "vllm.distributed.device_communicators.custom_all_reduce", module)  # type: ignore[arg-type]
    for name in ("vllm", "vllm.distributed", "vllm.distributed.device_communicators"):
        monkeypatch.setitem(sys.modules, name, SimpleNamespace())  # type: ignore[arg-type]
    monkeypatch.setattr(baselines.dist, "new_group", lambda backend: None)
    made = Baselines(None, torch.device("cpu"), 1 << 16)  # type: ignore[arg-type]
    assert made._custom_all_reduce().max_size == 1 << 16


def test_libraries_that_are_not_installed_are_an_error_of_their_row_only() -> None:
    made = Baselines(None, torch.device("cpu"), 1 << 16)  # type: ignore[arg-type]
    for name in (FLASHINFER, VLLM + COMPILED):
        with pytest.raises(ImportError):
            made.make(name, Case(1, 64, keep_norm=False))


def test_chains_and_eager_rounds_have_rows_of_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"Floors": FakeFloors, "Baselines": FakeBaselines}.items():
        monkeypatch.setattr(rank_module, name, value)
    monkeypatch.setattr(
        rank_module, "measure_eager", lambda calls, replays, meet: {name: EagerLatency(2.0, 1.0, 3.0, 0.5) for name in calls}
    )
    monkeypatch.setattr(torch.cuda, "Stream", lambda: None)
    cases = tuple(Case(1, 64, format=f, keep_norm=False) for f in ("none", "mxfp8/ceil/128x4"))
    round = Round("eager", cases, (NCCL,), 9, (NCCL + COMPILED, FLASHINFER), "eager")

    def rank(group: Any) -> list[dict[str, Any]]:
        bench = rank_module.Bench(group, [round])
        rows = bench.run_round(round)
        bench.close()
        return rows

    rows = {label(row): row for row in run_virtual(2, rank)[0]}
    chain = rows[f"{NCCL}{COMPILED}, none"]
    assert (chain["us"], chain["format"], chain["norm"]) == (None, "none", True)
    assert "there is no" in chain["error"]
    assert f"{FLASHINFER}, none" in rows
    assert not any("mxfp8" in name and COMPILED in name for name in rows)
    assert (rows["none"]["us"], rows["none"]["host_us"]) == (2.0, 0.5)


@pytest.mark.slow
def test_rounds_have_communicators_of_their_overrides(monkeypatch: pytest.MonkeyPatch) -> None:
    """Their rows say what was fixed, others stay as they were."""
    for name, value in {"Floors": FakeFloors, "Baselines": FakeBaselines, "Chain": lambda call, stream: Recorded(call)}.items():
        monkeypatch.setattr(rank_module, name, value)
    monkeypatch.setattr(rank_module, "measure", lambda chains, replays, meet: {name: Latency(2.0, 1.0, 3.0) for name in chains})
    monkeypatch.setattr(rank_module.Bench, "meet", lambda bench: None)
    monkeypatch.setattr(torch.cuda, "Stream", lambda: None)
    case = Case(4, 64, keep_norm=False)
    every = (Overrides(), Overrides(max_sms=8), Overrides(max_sms=8, cta_threads=96))
    rounds = [Round(f"multiprocessors, {n}", (case,), (), overrides=overrides) for n, overrides in enumerate(every)]

    def rank(group: Any) -> tuple[list[dict[str, Any]], list[Overrides]]:
        bench = rank_module.Bench(group, rounds)
        rows = [bench.run_round(round)[-1] for round in rounds]
        found = [bench.comm(case, overrides).topology.overrides for overrides in every]
        bench.close()
        return rows, found

    rows, found = run_virtual(2, rank)[0]
    assert found == list(every)
    assert [row["error"] for row in rows] == [None] * 3
    fixed = [{name: row[name] for name in ("max_sms", "cta_threads", "shape") if name in row} for row in rows]
    assert fixed == [{}, {"max_sms": 8, "shape": "None"}, {"max_sms": 8, "cta_threads": 96, "shape": "None"}]


def test_labels_tell_rows_apart() -> None:
    cases = [
        Case(1, 64, format=f, residual=residual, norm=norm, keep_norm=keep, weight_dtype=weight)
        for f in ("none", "fp8_static")
        for residual in (False, True)
        for norm, keep, weight in ((False, False, None), (True, False, None), (True, True, None), (True, False, "float32"))
        if not (keep and f == "none")
    ]
    labels = {label({"what": "collogue", **rank_module._call(case)}) for case in cases}
    assert len(labels) == len(cases)
    assert {"sum", "residual", "none", "fp8_static, norm kept", "fp8_static, no norm, no residual", "none, float32 weight"} <= labels

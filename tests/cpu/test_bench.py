"""What of `collogue bench` needs no GPU: arithmetic of the slope, gates, lists of cases, data, tables, kernels that compile."""

import gc
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

from collogue import jit
from collogue.bench import latency, readme, report
from collogue.bench import rank as rank_module
from collogue.bench.baselines import Baseline, integers
from collogue.bench.cases import FEW, FORMATS, HIDDEN_SIZE, KEPT, LARGE_TOKENS, NCCL, TOKENS, chosen_rounds, default_rounds
from collogue.bench.floors import EMPTY, EXCHANGE, WIRE, source
from collogue.bench.fused import FusedCall
from collogue.bench.gate import call_each_set, time_gated
from collogue.bench.rank import label, summary
from collogue.bench.timing import LONG, SETS, SHORT, Latency, measure, slope, slowest
from collogue.check import Answers, Case
from collogue.communicator import Communicator
from collogue.errors import CapacityError, FormatError, PlatformError
from collogue.formats import scale_storage
from collogue.spec import Output
from collogue.testing import VirtualGroup, run_virtual

ROOT = Path(__file__).resolve().parents[2]


# ---- timing


def test_the_slope_leaves_out_what_does_not_grow_with_the_calls() -> None:
    launch = [7.0, 9.0, 8.0, 11.0, 10.0]
    found = slope([t + 2.5 * SHORT for t in launch], [t + 2.5 * LONG for t in launch])
    assert found == Latency(2.5, 2.5, 2.5)


def test_the_slope_takes_medians_and_tells_the_spread() -> None:
    long = [80.0 * n for n in (1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 1000)]
    assert slope([0.0] * 11, long) == Latency(6.0, 2.0, 10.0)
    with pytest.raises(ValueError, match="zip"):
        slope([1.0], [1.0, 2.0])


def test_the_slowest_rank_counts_with_its_own_spread() -> None:
    assert slowest([Latency(2.0, 1.0, 9.0), Latency(3.0, 2.9, 3.1), Latency(2.5, 0.0, 3.0)]) == Latency(3.0, 2.9, 3.1)


class FakeChain:
    """A chain on a clock of its own; notes who was replayed when."""

    def __init__(self, name: str, us: float, log: list[str]) -> None:
        self.name, self.us, self.log, self.short, self.long = name, us, log, SHORT, LONG

    def replay(self, graph: int) -> float:
        self.log.append(f"{self.name}{graph}")
        slow = len(self.log) <= 4 and graph == SHORT
        return 1e6 * slow + 10.0 + graph * self.us


def test_chains_are_replayed_in_turn_and_the_first_round_is_not_counted() -> None:
    log: list[str] = []
    met: list[int] = []
    chains: Any = {name: FakeChain(name, us, log) for name, us in (("a", 2.0), ("b", 3.0))}
    found = measure(chains, 3, lambda: met.append(len(log)))
    assert log == [f"a{SHORT}", f"a{LONG}", f"b{SHORT}", f"b{LONG}"] * 4
    assert met == list(range(16))  # before every replay
    assert found == {"a": Latency(2.0, 2.0, 2.0), "b": Latency(3.0, 3.0, 3.0)}


# ---- gates


class Counter:
    """A subject: every call adds one to a number; the gate wants exactly ``wanted(calls)``."""

    repeatable = True

    def __init__(self, wrong_at: int | None = None) -> None:
        self.value, self.calls, self.wrong_at, self.turns = 0, 0, wrong_at, list[int]()

    def call(self, turn: int) -> None:
        self.calls += 1
        self.turns.append(turn % SETS)
        self.value += 1 if self.calls != self.wrong_at else 2

    def gate(self, run: Callable[[], None]) -> str | None:
        self.value, before = 0, self.calls
        run()
        return None if self.value == self.calls - before else f"{self.value} for {self.calls - before} calls"


class Recorded:
    def __init__(self, call: Callable[[int], object]) -> None:
        self.call = call

    def run(self) -> None:
        for turn in range(SHORT):
            self.call(turn)


def timed(group: VirtualGroup, subjects: Mapping[str, Callable[[], Any]]) -> tuple[dict[str, Latency], dict[str, str], list[str]]:
    measured: list[str] = []

    def fake(chains: Mapping[str, Recorded]) -> dict[str, Latency]:
        measured.extend(chains)
        return {name: Latency(1.0 + group.rank, 1.0, 1.0) for name in chains}

    found, errors = time_gated(group, subjects, capture=Recorded, measure=fake)
    return found, errors, measured


def refuse() -> Counter:
    raise CapacityError("too many tokens", hint="fewer")


def test_what_fails_a_gate_on_one_rank_has_no_time_on_any() -> None:
    def rank(group: VirtualGroup) -> Any:
        bad = group.rank == 1
        return timed(
            group,
            {
                "good": Counter,
                "wrong before": lambda: Counter(2 if bad else None),
                "wrong in the timed calls": lambda: Counter(SETS + 5 if bad else None),
                "raises": refuse if bad else Counter,
            },
        )

    for found, errors, measured in run_virtual(3, rank):
        assert found == {"good": Latency(3.0, 1.0, 1.0)}
        assert measured == ["good", "wrong in the timed calls"]  # a wrong one is not even timed
        assert errors == {
            "wrong before": "4 for 3 calls (rank 1)",
            "raises": "CapacityError: too many tokens (rank 1)",
            "wrong in the timed calls": "21 for 20 calls (rank 1)",
        }


def test_the_gate_calls_every_input_set() -> None:
    subject = Counter()
    call_each_set(subject)
    assert subject.turns == list(range(SETS))


class Wrong:
    """A communicator that returns one wrong bit, in the output ``name`` of the last input set."""

    def __init__(self, comm: Communicator, name: str) -> None:
        self.comm, self.name, self.calls, self.rank, self.device = comm, name, 0, comm.rank, comm.device

    def all_reduce(self, *arguments: Any, **named: Any) -> Output:
        out = self.comm.all_reduce(*arguments, **named)
        self.calls += 1
        if self.calls == SETS:
            tensor = getattr(out, self.name)
            memory = scale_storage(tensor) if self.name == "scales" else tensor.view(torch.uint8).view(-1)
            memory[-1] ^= 1
        return out

    def check(self) -> None:
        self.comm.check()


@pytest.mark.parametrize("format", ["none", "nvfp4", "fp8_group16/ue8m0/column"])
def test_the_fused_call_passes_its_gate_and_one_wrong_bit_does_not(format: str) -> None:
    case = Case(3, 64, format=format, keep_norm=True)
    answers = Answers()

    def rank(group: VirtualGroup) -> list[str | None]:
        comm = Communicator(group, max_tokens=3, hidden_size=64)
        fused = FusedCall(comm, case, answers)
        found = [fused.gate(lambda: call_each_set(fused)), fused.gate(lambda: None)]
        for name in case.outputs:
            wrong: Any = Wrong(comm, name)
            broken = FusedCall(wrong, case, answers)
            found.append(broken.gate(lambda broken=broken: call_each_set(broken)))  # type: ignore[misc]
        assert [name for name, _ in fused.fresh(0).items()] == list(case.outputs)
        return found

    for right, not_called, *wrong in run_virtual(2, rank):
        assert right is None
        assert not_called is not None  # poisoned outputs that no call wrote
        assert len(wrong) == len(case.outputs)
        for name, text in zip(case.outputs, wrong, strict=True):
            assert str(text).startswith(f"1 elements differ: {name}[")


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
def test_a_baseline_must_give_the_exact_sum(wrong: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    case = Case(2, 16, world_size=3)
    monkeypatch.setattr("torch.distributed.get_rank", lambda group: 1)
    monkeypatch.setattr("torch.cuda.synchronize", lambda: None)
    others = sum(integers(case, r, torch.device("cpu")) for r in (0, 2))
    tensors = [torch.ones(2, 16, dtype=torch.bfloat16) for _ in range(SETS)]

    def add(x: torch.Tensor) -> None:
        x += others
        x[0, 3] += wrong

    group: Any = None
    baseline = Baseline(group, case, tensors, add)
    assert baseline.gate(lambda: call_each_set(baseline)) == ("3 elements differ from the exact sum" if wrong else None)
    assert not any(t.any() for t in tensors)


# ---- cases


def test_the_default_rounds_hold_what_is_promised() -> None:
    rounds = default_rounds(4)
    decode = [r for r in rounds if r.section == "decode"]
    assert [r.shape.tokens for r in decode] == list(TOKENS)
    for r in rounds:
        shapes = {(c.tokens, c.hidden_size, c.dtype, c.world_size) for c in r.cases}
        assert shapes == {(r.shape.tokens, r.shape.hidden_size, "bfloat16", 4)}
        assert NCCL in r.baselines
        assert len({str(c) for c in r.cases}) == len({label_of(c) for c in r.cases}) == len(r.cases)
    assert all(len(r.cases) == len(FORMATS) + len(KEPT) + 1 for r in decode)
    assert {r.shape.hidden_size for r in rounds} == {2048, 2880, 4096, 5120, 7168, 8192, 12800, 16384}
    assert [r.shape.tokens for r in rounds if r.section == "large"] == list(LARGE_TOKENS)
    assert all(c.possible for r in rounds for c in r.cases)


def label_of(case: Case) -> str:
    return label({"what": "collogue", "format": case.format, "residual": case.residual, "norm": case.norm, "keep_norm": case.keep_norm})


def test_chosen_rounds_are_the_product_of_the_lists() -> None:
    rounds = chosen_rounds(2, tokens=[3, 300], hidden_size=[64], dtype=["float16", "float32"], format=["nvfp4/8x4", "none", "nvfp4/8x4"])
    assert [(r.shape.dtype, r.shape.tokens) for r in rounds] == [("float16", 3), ("float16", 300), ("float32", 3), ("float32", 300)]
    assert [c.format for c in rounds[0].cases] == ["nvfp4/8x4", "none"]
    assert [r.shape.tokens for r in chosen_rounds(2, format=["none"])] == list(TOKENS)
    with pytest.raises(FormatError, match="int8"):
        chosen_rounds(2, dtype=["int8"])
    with pytest.raises(FormatError, match="fp5"):
        chosen_rounds(2, format=["fp5"])


def test_compile_time_is_taken_of_different_kernels() -> None:
    assert [c.format for c in latency.compiled_cases(default_rounds(2))] == ["none", "nvfp4/128x4", "fp8_static"]


# ---- data and tables


def fake_rank(world: int) -> dict[str, Any]:
    """What a rank returns, with made-up latencies: T/10 + 1 plus a bit for each row; the wire moves 300 bytes in a microsecond."""
    rows = []
    for r in default_rounds(world):
        shape = {"world_size": world, "tokens": r.shape.tokens, "hidden_size": r.shape.hidden_size, "dtype": r.shape.dtype}
        names = [{"what": w} for w in (EMPTY, EXCHANGE, *r.baselines)]
        names += [
            {"what": "collogue", "format": c.format, "residual": c.residual, "norm": c.norm, "keep_norm": c.keep_norm, "bytes_sent": 600}
            for c in r.cases
        ]
        for i, name in enumerate(names):
            us = 1.0 + r.shape.tokens / 10 + i / 100
            result = {"us": us, "low_us": us - 0.1, "high_us": us + 0.1, "replays": 9, "error": None}
            rows.append({"section": r.section, **shape, **name, **result})
    wire = {"what": "wire", "world_size": world, "bytes_sent": 3000, "us": 10.0, "error": None}
    host = [{"what": "comm.all_reduce(...)", "world_size": world, "tokens": 1, "hidden_size": 7168, "us": 12.5, "error": None}]
    return {"rows": rows, "wire": wire, "host": host, "cold": [0.31, 0.2, 0.2]}


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


def made(world: int = 2) -> dict[str, Any]:
    ranks = fake_rank(world)
    cases = report.add_floors(ranks["rows"], ranks["wire"])
    compiled = {"formats": ["none"], "cold_seconds": [0.3], "cached_seconds": [0.02]}
    return {"machine": {"gpus": ["GPU X"]}, "cases": cases, "wire": [ranks["wire"]], "host": ranks["host"], "compile": [compiled]}


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
        lines[3]
        == "| tokens | Collogue, norm | Collogue, NVFP4 | Collogue, FP8 static | NCCL all-reduce alone | floor: one-word exchange |"
    )
    assert lines[5] == "| 1 | 1.15 | 1.16 | 1.17 | 1.12 | 1.11 |"
    assert lines[6] == "| 2 | 1.25 | 1.26 | 1.27 | - | 1.21 |"
    assert lines[11].startswith("| 64 | 123 |")
    assert len(lines) == 5 + len(TOKENS)
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
    assert f"\n{HIDDEN_SIZE}   256  " in text
    assert len(FEW) == 3
    assert summary("T=256", [row]) == "T=256 | nvfp4/128x4 FAILED: CompileError: no"


PAGE = "# Title\n<!-- latency: none yet -->\n<!-- end of latency -->\nrest\n"


def test_the_readme_is_filled_and_checked(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    results, page = tmp_path / "results" / "a.json", tmp_path / "README.md"
    results.parent.mkdir()
    results.write_text(json.dumps(made()))
    page.write_text(PAGE)
    arguments = [str(results), str(page)]
    assert readme.main(["--check", *arguments]) == 1
    assert page.read_text() == PAGE
    assert "not that of" in capsys.readouterr().err
    assert readme.main(arguments) == 0
    filled = page.read_text()
    assert "| 1 | 1.15 |" in filled
    assert filled.startswith("# Title\n<!-- latency: results/a.json -->\n")
    assert filled.endswith("<!-- end of latency -->\nrest\n")
    assert readme.main(arguments) == 0
    assert page.read_text() == filled
    assert readme.main(["--check", *arguments]) == 0
    page.write_text(filled.replace("| 1 | 1.15 |", "| 1 | 1.05 |"))
    assert readme.main(["--check", *arguments]) == 1
    with pytest.raises(ValueError, match="exactly one"):
        readme.fill("no marks", "a.json", "table\n")


def test_the_project_readme_shows_the_committed_results() -> None:
    source = readme.source_of((ROOT / "README.md").read_text(encoding="utf-8"))
    if source is None:
        assert readme.fill((ROOT / "README.md").read_text(encoding="utf-8"), "a.json", "table\n")
        assert not list((ROOT / "benchmarks" / "results").glob("latency*.json")), "there are results, and README has no table of them"
        return
    assert readme.main(["--check", str(ROOT / source), str(ROOT / "README.md")]) == 0


# ---- kernels


@pytest.mark.parametrize("world_size", [2, 8])
def test_the_floors_compile(world_size: int) -> None:
    for architecture in jit.ARCHITECTURES:
        code, log = jit.compile_source(source(world_size), architecture, "collogue_floors", verbose=True)
        assert len(code) > 1000
        for name in ("empty", "exchange", "wire"):
            assert f"collogue_floor_{name}" in log
        assert log.count("0 bytes spill stores, 0 bytes spill loads") == 3

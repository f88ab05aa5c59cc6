"""Measured tables: made of times, read, agreed on, used by plans, explained; and the whole of `collogue tune` but for the GPUs."""

from __future__ import annotations

import gc
import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from collogue.calls.request import Request, make_request
from collogue.communicator import Communicator
from collogue.contract.quant import FP8PerToken
from collogue.errors import ArgumentError, PlatformError
from collogue.planning import table
from collogue.planning.architecture import ARCHITECTURES
from collogue.planning.explain import Machine, explain
from collogue.planning.plan import make_plan, one_shot_tokens
from collogue.planning.table import VARIABLE, Candidate, Entry, Step, Table, Time, find, own_path
from collogue.planning.topology import Overrides, Topology
from collogue.testing import VirtualGroup, run_virtual
from collogue.testing.emulator import Ask, compile_cases, emulate
from collogue.testing.emulator import Case as EmulatorCase
from collogue.tools.bench.gate import call_each_set
from collogue.tools.bench.timing import Latency
from collogue.tools.cli import app
from collogue.tools.commands.options import FAILED, IMPOSSIBLE, OK, USAGE
from collogue.tools.tune import main
from collogue.tools.tune import rank as rank_module
from collogue.tools.tune.steps import choose_steps
from collogue.tools.tune.trials import CANDIDATES, LARGE_TOKENS, Trial, candidates, default_tokens, trials

ONE, ONE_256, TWO, TWO_256, TWO_1024 = CANDIDATES
MACHINE = Machine("sm_90a", "NVIDIA H200", 132, gpus=2)
STEPS = (Step(40, ONE), Step(300, ONE_256), Step(1000, TWO), Step(None, TWO_1024))
TIMES = (Time(1, ONE, 2.0), Time(11, ONE, 3.0), Time(64, ONE_256, 5.0), Time(2048, TWO_1024, 90.0))


def entry(**changes: Any) -> Entry:
    facts = {"architecture": "sm_90a", "device": "NVIDIA H200", "world_size": 2, "dtype": "bfloat16", "hidden_size": 7168}
    return Entry(**{**facts, "steps": STEPS, "times": TIMES, **changes})  # type: ignore[arg-type]


def as_json(entries: Iterable[Entry]) -> dict[str, Any]:
    def one(e: Entry) -> dict[str, Any]:
        times = [{"tokens": t.tokens, "candidate": str(t.candidate), "us": t.us} for t in e.times]
        steps = [{"up_to": s.up_to, "candidate": str(s.candidate)} for s in e.steps]
        return {**vars(e), "steps": steps, "times": times}

    return {"format": table.FORMAT, "entries": [one(e) for e in entries]}


def write(path: Path, *entries: Entry) -> Path:
    path.write_text(json.dumps(as_json(entries)))
    return path


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return write(tmp_path / "a.json", entry())


@pytest.fixture(autouse=True)
def cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A user's cache directory of the test's own, and no table named by the environment."""
    folder = tmp_path / "cache"
    folder.mkdir()
    monkeypatch.setattr(table, "cache_directory", lambda: folder)
    monkeypatch.delenv(VARIABLE, raising=False)
    return folder


def topology(path: Path | None, **changes: Any) -> Topology:
    return replace(MACHINE.topology(2, 16384, 7168, torch.bfloat16, False if path is None else path), **changes)


def request(tokens: int, **changes: Any) -> Request:
    asked: dict[str, Any] = {"residual": True, "norm": True, "wide_weight": False, "quant": None, "keep_norm": False, **changes}
    return make_request(tokens, asked.pop("hidden_size", 7168), torch.bfloat16, operation=asked.pop("operation", "all_reduce"), **asked)


# Tables


def test_a_file_is_read_as_it_was_written(file: Path) -> None:
    read = Table.read(file)
    assert read.entries == (entry(),)
    assert read.digest == Table.read(file).digest
    assert read.digest != Table.read(write(file.parent / "b.json", entry(hidden_size=4096))).digest
    assert hash(read) == hash(Table.read(file))
    for candidate in CANDIDATES:
        assert Candidate.parse(str(candidate)) == candidate


def test_an_entry_has_a_candidate_for_every_number_of_tokens() -> None:
    found = {t: entry().candidate(t, fits=True) for t in (1, 40, 41, 300, 301, 1000, 1001, 99999)}
    assert list(found.values()) == [ONE, ONE, ONE_256, ONE_256, TWO, TWO, TWO_1024, TWO_1024]
    assert entry().candidate(41, fits=False) == TWO  # what one-shot's slots cannot hold
    assert entry().one_shot_tokens == 300
    assert entry(steps=(Step(None, TWO),)).one_shot_tokens == 0


def test_times_between_two_measured_ones_are_on_their_line() -> None:
    assert [entry().us(ONE, t) for t in (1, 6, 11, 12)] == [2.0, 2.5, 3.0, None]
    assert [entry().us(ONE_256, t) for t in (63, 64, 65)] == [None, 5.0, None]
    assert entry().us(TWO, 1) is None


@pytest.mark.parametrize(
    ("spoil", "told"),
    [
        (lambda data: data.update(format="another"), "'another'"),
        (lambda data: data.pop("entries"), "KeyError"),
        (lambda data: data["entries"][0].pop("device"), "'device'"),
        (lambda data: data["entries"][0].update(steps=[]), "end at []"),
        (lambda data: data["entries"][0]["steps"].pop(), "end at"),
        (lambda data: data["entries"][0]["steps"][1].update(up_to=30), "end at [40, 30,"),
        (lambda data: data["entries"][0]["steps"][3].update(candidate="one_shot"), "steps of hidden size 7168 are"),
        (lambda data: data["entries"][0]["steps"][0].update(candidate="two_shot"), "steps of hidden size 7168 are"),
        (lambda data: data["entries"][0]["steps"][0].update(candidate="three_shot"), "'three_shot'"),
        (lambda data: data["entries"][0]["steps"][0].update(candidate="one_shot/100"), "100 threads"),
        (lambda data: data["entries"][0]["times"][0].update(us="fast"), "'fast'"),
    ],
)
def test_what_is_no_table_is_refused(file: Path, spoil: Callable[[dict[str, Any]], Any], told: str) -> None:
    data = json.loads(file.read_text())
    spoil(data)
    file.write_text(json.dumps(data))
    with pytest.raises(ArgumentError, match="is not a table") as caught:
        Table.read(file)
    assert told in caught.value.message
    assert "hint: make one with `collogue tune`" in str(caught.value)


def test_files_that_cannot_be_read_are_refused(tmp_path: Path) -> None:
    (tmp_path / "x.json").write_text("{")
    for name in ("x.json", "absent.json", "."):
        with pytest.raises(ArgumentError, match="is not a table"):
            Table.read(tmp_path / name)


def test_which_file_is_used(file: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def found(argument: Any, device: str | None = "NVIDIA H200") -> str | None:
        table = find(argument, device=device, world_size=2)
        return None if table is None else table.unused or str(table.entries[0].hidden_size)

    assert own_path("NVIDIA H200", 2) == cache / "table-2xh200.json"
    assert found(None) is None
    write(own_path("NVIDIA H200", 2), entry(hidden_size=512))
    assert found(None) == "512"
    assert found(None, device=None) is None  # a CPU group has no table of its own
    monkeypatch.setenv(VARIABLE, str(write(file.parent / "b.json", entry(hidden_size=1024))))
    assert found(None) == found(None, device=None) == "1024"
    assert found(str(file)) == found(file) == "7168"
    assert found(False) is None
    monkeypatch.setenv(VARIABLE, "")
    assert found(None) is None
    monkeypatch.delenv(VARIABLE)
    own_path("NVIDIA H200", 2).write_text("{")
    assert "is not a table" in str(found(None))  # its own is passed over, and the plan says so; a named one is refused
    with pytest.raises(ArgumentError):
        found(own_path("NVIDIA H200", 2))


# Agreement


def refusals(group_size: int, argument: Callable[[int], Any]) -> list[str]:
    def rank(group: VirtualGroup) -> str:
        with pytest.raises(ArgumentError) as caught:
            Communicator(group, max_tokens=4, hidden_size=64, table=argument(group.rank))
        return str(caught.value)

    return run_virtual(group_size, rank)


def test_ranks_with_different_tables_are_told(file: Path) -> None:
    other = write(file.parent / "b.json", entry(hidden_size=4096))
    texts = refusals(3, lambda rank: other if rank == 2 else file)
    assert len(set(texts)) == 1
    digests = Table.read(file).digest, Table.read(other).digest
    assert texts[0].startswith(f"rank 0 has table {digests[0]}, rank 2 has table {digests[1]}\nhint: give every rank the same file")
    assert "rank 0 has table none, rank 1 has table" in refusals(2, lambda rank: file if rank else False)[0]


def test_a_table_that_one_rank_cannot_read_ends_all(file: Path) -> None:
    texts = refusals(2, lambda rank: file if rank == 0 else file.parent / "absent.json")
    assert all(text.startswith("rank 1: ") and "absent.json is not a table" in text and "\nhint: make one" in text for text in texts)


def test_the_same_content_in_other_places_is_agreed(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    copy = file.parent / "copy.json"
    copy.write_bytes(file.read_bytes())

    def rank(group: VirtualGroup) -> Any:
        comm = Communicator(group, max_tokens=4, hidden_size=64, table=copy if group.rank else file)
        x = torch.full((2, 64), group.rank + 1.0).bfloat16()
        assert comm.all_reduce(x).reduced.eq(3).all()  # type: ignore[union-attr]
        return comm.topology, comm.explain(2).table

    (first, told), (second, _) = run_virtual(2, rank)
    assert first == second
    assert told == f"{Table.read(file).digest}, not used: this group is on the CPU"
    monkeypatch.setenv(VARIABLE, str(file))
    assert run_virtual(1, lambda group: Communicator(group, max_tokens=4, hidden_size=64).topology.table.digest) == [
        Table.read(file).digest
    ]  # type: ignore[union-attr]


# Plans


def test_the_plan_takes_what_was_measured(file: Path) -> None:
    facts = topology(file)
    assert facts.table is not None
    for tokens, algorithm, threads in ((1, "one_shot", None), (41, "one_shot", 256), (301, "two_shot", None), (5000, "two_shot", 1024)):
        forced = replace(facts, table=None, overrides=Overrides(algorithm, None, threads))  # type: ignore[arg-type]
        plan, wanted = make_plan(facts, request(tokens)), make_plan(forced, request(tokens))
        assert (plan.algorithm, plan.shape, plan.rows) == (wanted.algorithm, wanted.shape, wanted.rows)
        assert plan.why.startswith("measured: one-shot is faster up to 300 tokens") or "slots" in plan.why
        assert plan.table == facts.table.digest
    assert one_shot_tokens(facts, 7168) == 300
    assert make_plan(facts, request(1)) == make_plan(replace(facts), request(1))


def test_a_table_cannot_make_a_call_one_shot_that_does_not_fit(tmp_path: Path) -> None:
    greedy = write(tmp_path / "g.json", entry(steps=(Step(10000, ONE), Step(None, TWO_256))))
    plan = make_plan(topology(greedy), request(5000))
    assert (plan.algorithm, plan.why) == ("two_shot", "larger than the one-shot slots")
    assert plan.shape is not None
    assert plan.shape.threads == 224


def test_the_measured_time_is_that_of_the_same_call(file: Path) -> None:
    facts = topology(file)
    assert make_plan(facts, request(6)).measured_us == 2.5
    assert "measured    2.50 us" in str(make_plan(facts, request(6)))
    other = [{"quant": FP8PerToken()}, {"norm": False}, {"residual": False}, {"wide_weight": True}, {"operation": "sharded"}]
    assert [make_plan(facts, request(6, **changes)).measured_us for changes in other] == [None] * 5
    assert make_plan(facts, request(30)).measured_us is None


@pytest.mark.parametrize(
    ("facts", "told"),
    [
        ({"machine": replace(MACHINE, device="NVIDIA H100")}, "made for device NVIDIA H200, not NVIDIA H100"),
        ({"machine": Machine("sm_100a", "NVIDIA B200", 148)}, "made for architecture sm_90a, not sm_100a"),
        ({"machine": replace(MACHINE, gpus=1)}, "ranks share GPUs"),
        ({"machine": Machine()}, "this group is on the CPU"),
        ({"machine": Machine.named("sm_90a"), "world_size": 4}, "made for world size 2, not 4"),
        ({"dtype": "float16"}, "made for dtype bfloat16, not float16"),
        ({"hidden_size": 4096}, "it has no hidden size 4096"),
        ({"operation": "sharded"}, "it is of all_reduce"),
    ],
)
def test_a_table_of_another_machine_or_call_is_not_used_and_the_plan_says_why(file: Path, facts: dict[str, Any], told: str) -> None:
    given: dict[str, Any] = {"machine": MACHINE, "hidden_size": 7168, "world_size": 2, **facts}
    machine = given.pop("machine")
    with_table, without = (explain(machine, 200, **given, table=t).plan for t in (file, False))
    assert with_table.table == f"{Table.read(file).digest}, not used: {told}"
    assert without.table == "none"
    assert replace(with_table, table="none") == without


def test_what_the_communicator_fixes_goes_before_the_table(file: Path) -> None:
    from collogue.calls.capacity import Capacity
    from collogue.planning.topology import topology_of

    capacity = Capacity(64, 7168, torch.bfloat16, torch.device("cpu"))
    for overrides in (Overrides("two_shot"), Overrides(max_sms=16), Overrides(cta_threads=64)):
        facts = topology_of(2, capacity, architecture="sm_90a", multiprocessors=132, overrides=overrides, table=Table.read(file))
        assert "the communicator fixes" in make_plan(facts, request(2)).table
        assert make_plan(facts, request(2)).measured_us is None


@pytest.mark.slow
def test_forced_tables_never_change_a_bit(tmp_path: Path) -> None:
    """Calls one after the other, in the kernels and shapes that tables make the plan take: the reference's bits, under the emulator."""
    cases = []
    for number, candidate in enumerate((Candidate("one_shot", 32), Candidate("two_shot", 64))):
        steps = (Step(9, candidate), Step(None, TWO)) if candidate.algorithm == "one_shot" else (Step(None, candidate),)
        path = write(tmp_path / f"{number}.json", entry(hidden_size=520, steps=steps, times=()))
        plan = make_plan(MACHINE.topology(2, 3, 520, torch.bfloat16, path), request(3, hidden_size=520))
        assert plan.algorithm == candidate.algorithm
        assert plan.shape is not None
        assert plan.shape.threads == candidate.cta_threads
        cases.append(EmulatorCase(2, 520, plan.shape.threads, kernel=plan.algorithm))
        assert cases[-1].cluster == plan.shape.cluster
    library = compile_cases(cases, tmp_path)
    assert emulate(library, [Ask(t, case=k) for t, k in ((3, 0), (3, 1), (1, 0), (2, 1))], seed=1, mode="late").problem() == ""


# Steps


def timed(points: Mapping[int, Mapping[Candidate, float]]) -> list[Time]:
    return [Time(tokens, candidate, us) for tokens, times in points.items() for candidate, us in times.items()]


def test_one_shot_ends_where_the_lines_cross() -> None:
    points = {t: {ONE: 2.0 + t / 10, TWO: 4.0 + t / 20} for t in (1, 10, 30, 50, 100)} | {1000: {TWO: 54.0}}
    assert choose_steps(timed(points)) == (Step(40, ONE), Step(None, TWO))
    assert choose_steps(list(reversed(timed(points)))) == (Step(40, ONE), Step(None, TWO))


def test_one_bad_measurement_does_not_move_the_crossover() -> None:
    points = {t: {ONE: 2.0 + t / 10, TWO: 4.0 + t / 20} for t in (1, 10, 30, 50, 100)}
    points[10][ONE] = 4.6  # slower than two-shot, this once
    assert choose_steps(timed(points))[0] == Step(40, ONE)


def test_an_algorithm_that_is_always_faster() -> None:
    fast, slow = {ONE: 1.0, TWO: 2.0}, {ONE: 2.0, TWO: 1.0}
    assert choose_steps(timed({1: fast, 8: fast, 64: {TWO: 3.0}})) == (Step(8, ONE), Step(None, TWO))
    assert choose_steps(timed({1: slow, 8: slow})) == (Step(None, TWO),)
    assert choose_steps(timed({8: {ONE: 1.0}})) == ()
    assert choose_steps(timed({8: {TWO: 1.0}})) == (Step(None, TWO),)


def test_other_ctas_only_where_they_are_clearly_faster() -> None:
    points = {
        1: {ONE: 2.00, ONE_256: 1.99, TWO: 9.0, TWO_256: 9.0},
        9: {ONE: 3.00, ONE_256: 2.50, TWO: 9.0, TWO_256: 9.0},
        100: {ONE: 9.0, ONE_256: 9.0, TWO: 5.0, TWO_256: 4.99},
        300: {TWO: 10.0, TWO_256: 12.0},
        500: {TWO: 20.0, TWO_256: 18.0},
    }
    steps = choose_steps(timed(points))
    assert [step.candidate for step in steps] == [ONE, ONE_256, TWO, TWO_256]
    assert steps[0].up_to == 1  # before the first number of tokens where the other was clearly faster
    assert 300 < int(steps[2].up_to or 0) < 500
    assert entry(steps=steps).candidate(100, fits=True) == TWO
    for tokens, times in points.items():  # what was measured decides at the measured numbers of tokens
        assert times[entry(steps=steps).candidate(tokens, fits=True)] <= min(times.values()) / 0.98


# What is measured


def test_default_trials_lie_around_the_crossover() -> None:
    for world in (2, 8):
        found = trials(Machine.named("sm_90a"), world)
        for width in (4096, 7168):
            mine = [t for t in found if t.case.hidden_size == width]
            facts = Machine.named("sm_90a").topology(world, max(LARGE_TOKENS), width, torch.bfloat16, False)
            crossover = one_shot_tokens(facts, width)
            tokens = [t.case.tokens for t in mine]
            assert tokens == sorted(set(tokens))
            assert {1, crossover, *LARGE_TOKENS} <= set(tokens)
            assert sum(t < crossover for t in tokens) >= 3
            one = [t.case.tokens for t in mine if ONE in t.candidates]
            assert max(one) == one_shot_tokens(replace(facts, overrides=Overrides("one_shot")), width)
            assert all(TWO in t.candidates for t in mine)
            assert {t.case.world_size for t in mine} == {world}
        assert len(found) <= 4 * 12  # each takes a part of a second


def test_trials_are_the_product_of_the_lists() -> None:
    found = trials(MACHINE, 2, hidden_size=[64, 32], dtype=["float16", "float32"], tokens=[3, 1])
    assert [(t.case.dtype, t.case.hidden_size, t.case.tokens) for t in found] == [
        (d, h, t) for d in ("float16", "float32") for h in (32, 64) for t in (1, 3)
    ]
    with pytest.raises(ArgumentError, match="'int8'"):
        trials(MACHINE, 2, dtype=["int8"])


def test_candidates_of_the_same_shape_are_measured_once() -> None:
    facts = MACHINE.topology(2, 8192, 64, torch.bfloat16, False)
    assert candidates(facts, trials(MACHINE, 2, hidden_size=[64], tokens=[3])[0].case) == (ONE, TWO)
    assert len(candidates(replace(facts, hidden_size=7168), trials(MACHINE, 2, hidden_size=[7168], tokens=[3])[0].case)) == 5
    wide = replace(facts, world_size=8, hidden_size=7168), trials(MACHINE, 8, hidden_size=[7168], tokens=[3])[0].case
    assert candidates(*wide) == (ONE, ONE_256, TWO, TWO_256)  # a wider CTA would spill
    assert default_tokens(replace(facts, hidden_size=7168)) > {1, *LARGE_TOKENS}


# The run


def rows_of(world: int, every: list[Trial], wrong: str | None = None) -> list[dict[str, Any]]:
    """What a rank returns: one-shot takes 1 + T/100, two-shot 2 + T/200, other CTAs a tenth more; ``wrong`` fails at the last T."""
    rows = []
    for trial in every:
        for candidate in trial.candidates:
            t, one = trial.case.tokens, candidate.algorithm == "one_shot"
            us = (1 + t / 100 if one else 2 + t / 200) * (1.1 if candidate.cta_threads else 1.0)
            bad = str(candidate) == wrong and trial is every[-1]
            latency = {"us": None, "error": "3 elements differ"} if bad else {"us": us, "error": None}
            rows.append(
                {"tokens": t, "hidden_size": trial.case.hidden_size, "dtype": trial.case.dtype, "candidate": str(candidate), **latency}
            )
    return rows


@pytest.fixture
def two_gpus(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """A machine with two GPUs, whose ranks answer at once."""
    made = SimpleNamespace(wrong=None, heard=[])

    def ranks(world: int, fn: Any, every: list[Trial], *, device: str, silence: float, heard: Callable[[int, str], None]) -> list[Any]:
        assert (world, fn, device) == (2, rank_module.tune_rank, "cuda")
        heard(0, "T=1")
        heard(1, "another rank")
        return [rows_of(world, every, made.wrong)] * world

    monkeypatch.setattr(main, "run_processes", ranks)
    monkeypatch.setattr(Machine, "here", classmethod(lambda cls: MACHINE))
    return made


def tune(*arguments: str) -> Any:
    return CliRunner().invoke(app, ["tune", *arguments], env={"COLUMNS": "80", "NO_COLOR": "1", "TERM": "dumb"})


def test_tune_leaves_a_table_that_communicators_find_and_use(two_gpus: SimpleNamespace, cache: Path) -> None:
    result = tune("--hidden-size", "7168", "--tokens", "1,100", "--tokens", "300,500", "--commit", "abc")
    assert result.exit_code == OK, result.output
    path = cache / "table-2xh200.json"
    data = json.loads(path.read_text())
    assert {"format", "passed", "commit", "date", "versions", "machine", "method", "entries", "refused"} <= set(data)
    assert (data["passed"], data["commit"], data["refused"]) == (True, "abc", [])
    (found,) = data["entries"]
    assert (found["architecture"], found["device"], found["world_size"], found["dtype"]) == ("sm_90a", "NVIDIA H200", 2, "bfloat16")
    assert found["one_shot_tokens"] == 200  # where 1 + T/100 and 2 + T/200 meet
    assert found["steps"] == [{"up_to": 200, "candidate": "one_shot"}, {"up_to": None, "candidate": "two_shot"}]
    assert len(found["times"]) == 4 * 5
    facts = MACHINE.topology(2, 500, 7168, torch.bfloat16)
    plans = [make_plan(facts, request(t)) for t in (100, 200, 201)]
    assert [(p.algorithm, p.measured_us) for p in plans] == [
        ("one_shot", 2.0),
        ("one_shot", pytest.approx(3.0)),
        ("two_shot", pytest.approx(3.005)),
    ]
    assert "H = 7168, bfloat16, 2 x NVIDIA H200: us per call" in result.stdout
    assert "one_shot up to 200 tokens, then two_shot" in result.stdout
    assert max(map(len, result.stdout.splitlines())) <= 80


def shapes(path: Path) -> dict[tuple[int, str], str]:
    """Hidden size and dtype of every entry of a table, with the commit that it was measured at."""
    data = json.loads(path.read_text())
    assert {entry.hidden_size for entry in Table.read(path).entries} == {entry["hidden_size"] for entry in data["entries"]}
    return {(entry["hidden_size"], entry["dtype"]): entry.get("commit", data["commit"]) for entry in data["entries"]}


def test_what_is_not_measured_anew_stays_in_the_table(two_gpus: SimpleNamespace, cache: Path, tmp_path: Path) -> None:
    path = cache / "table-2xh200.json"
    assert tune("--hidden-size", "4096,7168", "--tokens", "1,500", "--commit", "a").exit_code == OK
    before = {entry["hidden_size"]: entry for entry in json.loads(path.read_text())["entries"]}
    assert tune("--hidden-size", "7168", "--tokens", "1,300", "--dtype", "float16,bfloat16", "--commit", "b").exit_code == OK
    assert shapes(path) == {(7168, "float16"): "b", (7168, "bfloat16"): "b", (4096, "bfloat16"): "a"}
    after = {(entry["hidden_size"], entry["dtype"]): entry for entry in json.loads(path.read_text())["entries"]}
    assert before[4096].items() <= after[4096, "bfloat16"].items()
    assert {row["tokens"] for row in after[7168, "bfloat16"]["times"]} == {1, 300}
    assert tune("--hidden-size", "5120", "--tokens", "1", "--commit", "c").exit_code == OK
    assert shapes(path) == {(5120, "bfloat16"): "c", (7168, "float16"): "b", (7168, "bfloat16"): "b", (4096, "bfloat16"): "a"}
    assert tune("--hidden-size", "64", "--tokens", "3", "--commit", "d", "--json", str(tmp_path / "t.json")).exit_code == OK
    assert list(shapes(tmp_path / "t.json")) == [(64, "bfloat16")]  # a named file has what was measured, no more


def test_what_is_refused_now_does_not_stay_in_the_table(two_gpus: SimpleNamespace, cache: Path) -> None:
    path = cache / "table-2xh200.json"
    assert tune("--hidden-size", "32,64", "--tokens", "3", "--commit", "a").exit_code == OK
    two_gpus.wrong = "two_shot"
    for width, left in (("64", {(32, "bfloat16"): "a"}), ("32", {})):
        assert tune("--hidden-size", width, "--tokens", "3", "--commit", "b").exit_code == FAILED
        assert shapes(path) == left
    two_gpus.wrong = None
    assert tune("--hidden-size", "64", "--tokens", "3").exit_code == OK


@pytest.mark.parametrize("other", [{"architecture": "sm_100a"}, {"device": "NVIDIA H200 NVL"}, {"world_size": 4}, None])
def test_nothing_of_another_machine_or_of_no_table_is_kept(two_gpus: SimpleNamespace, cache: Path, other: dict[str, Any] | None) -> None:
    path = cache / "table-2xh200.json"
    write(path, entry(hidden_size=512), *([entry(**other)] if other else []))
    if other is None:
        path.write_text(path.read_text()[:-1])
    assert tune("--hidden-size", "64", "--tokens", "3").exit_code == OK
    assert [found["hidden_size"] for found in json.loads(path.read_text())["entries"]] == ([64] if other is None else [64, 512])


def test_a_candidate_that_fails_once_is_nowhere_in_the_table(two_gpus: SimpleNamespace, tmp_path: Path, cache: Path) -> None:
    two_gpus.wrong = "two_shot/256"
    target = tmp_path / "t.json"
    result = tune("--hidden-size", "7168", "--tokens", "1,100", "--json", str(target))
    assert result.exit_code == FAILED
    assert "REJECTED two_shot/256 H=7168 bfloat16 T=100: 3 elements differ" in result.stdout
    data = json.loads(target.read_text())
    assert data["passed"] is False
    assert [row["candidate"] for row in data["refused"]] == ["two_shot/256"]
    assert "two_shot/256" not in {row["candidate"] for row in data["entries"][0]["times"]}
    assert len(Table.read(target).entries) == 1
    assert list(cache.iterdir()) == []


def test_without_any_two_shot_there_is_no_table(two_gpus: SimpleNamespace, cache: Path) -> None:
    two_gpus.wrong = "two_shot"
    assert tune("--hidden-size", "64", "--tokens", "3").exit_code == FAILED
    assert list(cache.iterdir()) == []


def test_progress_has_a_total(two_gpus: SimpleNamespace, cache: Path) -> None:
    """Four numbers of tokens of one width, and its communicators and kernels."""
    totals: list[int] = []

    def begin(steps: int) -> Callable[[str], None]:
        totals.append(steps)
        return two_gpus.heard.append

    main.run(hidden_size=[7168], dtype=["bfloat16"], tokens=[1, 100, 300, 500], begin=begin)
    assert (totals, two_gpus.heard) == ([5], ["T=1"])


def test_json_to_stdout_is_alone_there(two_gpus: SimpleNamespace, cache: Path) -> None:
    result = tune("--hidden-size", "64", "--tokens", "3", "--json", "-")
    assert json.loads(result.stdout)["passed"] is True
    assert "us per call" in result.stderr
    assert list(cache.iterdir()) == []


def test_tune_without_gpus_or_with_too_few(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    result = tune()
    assert (result.exit_code, "hint: run `collogue doctor`\n" in result.stderr) == (IMPOSSIBLE, True)  # and no option of another command
    assert "hint: run `collogue doctor`, or name an --architecture\n" in call("--device", "cuda").stderr
    monkeypatch.setattr(Machine, "here", classmethod(lambda cls: replace(MACHINE, gpus=1)))
    with pytest.raises(PlatformError, match="1 GPUs found; 2 required"):
        main.run()
    assert tune("--dtype", "int8", "--hidden-size", "12").exit_code == USAGE


class Recorded:
    """A graph of paper: makes its calls again."""

    def __init__(self, call: Callable[[int], object]) -> None:
        self.call = call

    def run(self) -> None:
        call_each_set(self)  # type: ignore[arg-type]


@pytest.mark.slow
@pytest.mark.parametrize("broken", [None, "two_shot"])
def test_a_rank_on_the_cpu_with_graphs_of_paper(monkeypatch: pytest.MonkeyPatch, broken: str | None) -> None:
    """One rank's part, but for what needs a GPU: candidates share inputs, each is gated, errors refuse."""
    monkeypatch.setattr(rank_module, "Chain", lambda call, stream: Recorded(call))
    monkeypatch.setattr(rank_module, "measure", lambda chains, replays, meet: {name: Latency(2.0, 1.0, 3.0) for name in chains})
    monkeypatch.setattr(rank_module, "_build", lambda group, comms, trials: None)
    monkeypatch.setattr(torch.cuda, "Stream", lambda: None)
    made: list[Any] = []

    class Spoiled(Communicator):
        def __init__(self, group: VirtualGroup, **given: Any) -> None:
            super().__init__(group, **given)
            self.given = given
            made.append(given)

        def all_reduce(self, *arguments: Any, **named: Any) -> Any:
            out = super().all_reduce(*arguments, **named)
            if self.given["algorithm"] == broken and self.rank == 1:
                out.norm.view(torch.int16)[-1, -1] ^= 1  # type: ignore[union-attr]
            return out

    monkeypatch.setattr(rank_module, "Communicator", Spoiled)
    every = trials(MACHINE, 2, hidden_size=[64], tokens=[1, 3])
    told: list[str] = []
    try:
        ranks = run_virtual(2, lambda group: rank_module.tune_rank(group, told.append if group.rank == 0 else len, every))  # type: ignore[arg-type]
    finally:
        gc.enable()
    assert ranks[0] == ranks[1]
    assert [(row["tokens"], row["candidate"]) for row in ranks[0]] == [(t, c) for t in (1, 3) for c in ("one_shot", "two_shot")]
    for row in ranks[0]:
        if row["candidate"] == broken:
            assert row["us"] is None
            assert row["error"].startswith("1 elements differ: norm[")
        else:
            assert (row["us"], row["error"], row["replays"]) == (2.0, None, 11)
    assert all(given["table"] is False for given in made)  # a table would decide for the candidates
    assert {(given["algorithm"], given["max_tokens"]) for given in made} == {("one_shot", 3), ("two_shot", 3)}
    assert told == ["H=64 bfloat16 T=1: communicators and kernels", "H=64 bfloat16 T=1", "H=64 bfloat16 T=3"]


# Explain


def call(*arguments: str) -> Any:
    return CliRunner().invoke(app, ["explain", *arguments], env={"COLUMNS": "80", "NO_COLOR": "1", "TERM": "dumb"})


@pytest.mark.parametrize("architecture", [*ARCHITECTURES, None])
@pytest.mark.parametrize("operation", ["all_reduce", "sharded", "reduce_scatter", "all_gather", "finish"])
def test_explain_without_gpus(architecture: str | None, operation: str) -> None:
    where = ["--device", "cpu"] if architecture is None else ["--architecture", architecture]
    asked = ["--operation", operation, "--tokens", "700", "--world-size", "8", "--format", "nvfp4/8x4", "--max-tokens", "65536"]
    result = call(*where, *asked)
    assert result.exit_code == OK, result.output
    lines = result.stdout.splitlines()
    assert max(map(len, lines)) <= 80
    assert lines[0].startswith(f"{operation} + ")
    data = json.loads(call(*where, *asked, "--json", "-").stdout)
    assert (data["architecture"], data["max_tokens"], data["world_size"]) == (architecture, 65536, 8)
    assert (data["shape"] is None) == (architecture is None)
    assert {"algorithm", "why", "launches", "predicted_us", "floor_us", "measured_us", "table", "workspace_bytes"} <= set(data)


def test_explain_shows_the_table(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = ["--architecture", "sm_90a", "--tokens", "6"]
    assert "measured    2.50 us" in call(*asked, "--table", str(file)).stdout
    assert "measured    -" in call(*asked).stdout
    monkeypatch.setenv(VARIABLE, str(file))
    assert "measured    2.50 us" in call(*asked).stdout
    told = " ".join(call(*asked, "--world-size", "4").stdout.split())
    assert "not used: made for world size 2, not 4" in told
    result = call(*asked, "--table", str(file) + "x")
    assert (result.exit_code, "is not a table" in " ".join(result.stderr.split())) == (USAGE, True)


@pytest.mark.parametrize(
    "arguments",
    [
        ["--architecture", "sm_70"],
        ["--operation", "gather"],
        ["--device", "tpu"],
        ["--architecture", "sm_80", "--hidden-size", "16392"],
        ["--operation", "finish", "--no-norm"],
        ["--operation", "all_gather", "--no-norm", "--no-residual"],
        ["--hidden-size", "12"],
    ],
)
def test_explain_refuses_what_cannot_be(arguments: list[str]) -> None:
    result = call(*arguments)
    assert result.exit_code == USAGE
    assert "hint: " in result.stderr


def test_explain_on_this_machine_asks_its_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    properties = SimpleNamespace(major=9, minor=0, name="NVIDIA H200", multi_processor_count=132)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: properties)
    monkeypatch.setattr(torch.cuda, "can_device_access_peer", lambda a, b: True)
    assert Machine.of("auto", None) == MACHINE
    assert explain(MACHINE, 1, hidden_size=64, world_size=4).topology.ranks_per_gpu == 2
    assert Machine.of("cpu", None) == Machine()
    assert Machine.of("cuda", "sm_80") == Machine.named("sm_80")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    monkeypatch.setattr(torch.cuda, "can_device_access_peer", lambda a, b: (a < 2) == (b < 2))
    for hosts, islands in ((1, ((0, 1), (2, 3))), (2, ((0, 1), (2, 3), (4, 5), (6, 7)))):
        found = explain(Machine.of("auto", None, hosts), 1, hidden_size=64, world_size=4 * hosts)
        assert (found.topology.transport, found.topology.islands, found.topology.ranks_per_gpu) == ("host", islands, 1)
    assert (
        "rank 0 has no peer access to the GPU of rank 2"
        in explain(Machine.of("auto", None), 1, hidden_size=64, world_size=4).plan.transport
    )
    assert explain(Machine.of("auto", None), 1, hidden_size=64, world_size=2).topology.transport == "peer"

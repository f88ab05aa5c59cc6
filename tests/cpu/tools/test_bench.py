"""`collogue bench` without GPUs: arithmetic of the slope, and gates."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
from bench_fakes import Counter, Recorded

from collogue.communicator import Communicator
from collogue.contract.spec import Output
from collogue.errors import CapacityError
from collogue.formats import scale_storage
from collogue.testing import VirtualGroup, run_virtual
from collogue.tools.bench.fused import FusedCall
from collogue.tools.bench.gate import call_each_set, time_gated
from collogue.tools.bench.timing import LONG, SETS, SHORT, EagerCalls, Latency, measure, measure_eager, slope, slowest
from collogue.tools.check import Answers, Case

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


class Clock:
    """Seconds, moved by hand."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def test_eager_calls_have_a_time_until_they_return_and_one_until_the_gpu_is_done(monkeypatch: pytest.MonkeyPatch) -> None:
    clock, calls = Clock(), list[int]()

    def call(turn: int) -> None:
        calls.append(turn)
        clock.now += 3e-6

    def finish() -> None:
        clock.now += 200e-6

    monkeypatch.setattr(torch.cuda, "synchronize", finish)
    subject = EagerCalls(call)
    host, whole = subject.time(lambda: None, clock)
    assert (host, whole) == (pytest.approx(3.0), pytest.approx(4.0))
    assert len(calls) == EagerCalls.COUNT
    subject.run()
    assert calls[EagerCalls.COUNT :] == list(range(SETS))


def test_eager_measurements_are_medians_and_the_first_is_not_counted() -> None:
    class Fake:
        def __init__(self) -> None:
            self.taken = iter([(99.0, 999.0), (1.0, 5.0), (3.0, 4.0), (2.0, 6.0)])

        def time(self, meet: Callable[[], None]) -> tuple[float, float]:
            return next(self.taken)

    found = measure_eager({"a": Fake()}, 3, lambda: None)["a"]  # type: ignore[dict-item]
    assert (found.us, found.low_us, found.high_us, found.host_us) == (5.0, 4.0, 6.0, 2.0)

"""Bound calls: what the long way would do, or nothing at all. No GPU: tensors on the CPU, and a launch that copies the parameters."""

from __future__ import annotations

import ctypes
import dataclasses
import random
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from collogue import MXFP8, NVFP4, ExpertCombine, FP8Group, FP8PerToken, FP8Static, Gated, Output, Quant, RMSNorm
from collogue.calls.call import Call, check_call
from collogue.calls.capacity import Capacity
from collogue.calls.outputs import check_out
from collogue.contract.spec import Operation
from collogue.errors import ArgumentError
from collogue.gpu import bound
from collogue.gpu.exclusive import Exclusive
from collogue.gpu.launch import Params
from collogue.gpu.parameters import fill_call

T, H, BF16 = 6, 256, torch.bfloat16
CPU = torch.device("cpu")
QUANTS = [
    None,
    NVFP4(3.0),
    NVFP4(torch.tensor(2.0)),
    MXFP8("ceil", "8x4"),
    FP8Static(0.5),
    FP8PerToken(2.0**-9),
    FP8Group(32, "ue8m0", "column"),
]


class Bench:
    """One signature bound, a launch that keeps the parameters, and what the long way would fill in."""

    def __init__(self, operation: Operation = "all_reduce", *, rank: int = 1, **given: Any) -> None:
        self.capacity = Capacity(8, H, BF16, CPU, 2, rank)
        self.launcher: Any = SimpleNamespace(params=Params(), quant=None, stream=-1, launch=lambda: (self._launch(7),))
        self.launched: list[bytes] = []
        self.words = (ctypes.c_uint64 * 2)()
        words = ctypes.c_uint64.from_buffer(self.words, 0), ctypes.c_uint32.from_buffer(self.words, 8)
        self.engine: Any = SimpleNamespace(index=-1, workspace=object(), in_use=Exclusive(), stream=7, failure_words=words)
        self.first = check_call(self.capacity, self.call(operation, **given))
        self.fresh = self.bind(None)
        self.into = self.bind(self.first.signature.empty())

    def bind(self, out: Output | None) -> bound.Bound:
        made = bound.bind(self.engine, self.first, out, self.launcher, self._launch)
        assert made is not None
        return made

    def bound(self, call: Call, out: Output | None) -> Output | None:
        """The bound call that the key of such a call finds."""
        return self.run(self.fresh if out is None else self.into, call, out)

    @staticmethod
    def run(made: bound.Bound, call: Call, out: Output | None) -> Output | None:
        given = call.operation, call.partial, call.residual, call.norm, call.quant, call.keep_norm
        return made(*given, out, call.rows, call.write_padding)

    def call(self, operation: Operation = "all_reduce", **changes: Any) -> Call:
        """A call with fresh tensors."""
        given: dict[str, Any] = {
            "partial": torch.zeros(T, H, dtype=BF16),
            "residual": None if operation == "finish" else torch.zeros(T if operation == "all_reduce" else T // 2, H, dtype=BF16),
            "norm": RMSNorm(torch.ones(H), eps=1e-5, weight_offset=1.0),
        }
        return Call(**{**given, **changes}, operation=operation)

    def _launch(self, stream: int) -> None:
        assert stream == 7
        self.launched.append(bytes(self.launcher.params))

    def expected(self, call: Call, out: Output) -> bytes:
        """The parameters of the long way."""
        params = Params()
        fill_call(params, check_call(self.capacity, call), out)
        return bytes(params)

    def idle(self) -> bool:
        """Whether nothing was launched and the communicator is free."""
        with self.engine.in_use:
            return not self.launched


@pytest.fixture(autouse=True)
def machine(monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, Any]]:
    """A machine whose current device is the CPU, whose current stream is 7."""
    state = {"capturing": False, "stream": 7, "device": -1}
    monkeypatch.setattr(torch._C, "_cuda_isCurrentStreamCapturing", lambda: state["capturing"], raising=False)
    monkeypatch.setattr(torch._C, "_cuda_getCurrentRawStream", lambda index: state["stream"], raising=False)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch._C, "_cuda_getDevice", lambda: state["device"], raising=False)
    monkeypatch.setattr(torch._C._dynamo.guards, "_empty_strided_cuda", torch._C._dynamo.guards._empty_strided_cpu, raising=False)
    return state


@pytest.mark.parametrize("quant", QUANTS, ids=lambda q: "none" if q is None else q.label)
@pytest.mark.parametrize("operation", ["all_reduce", "sharded", "reduce_scatter", "finish"])
def test_parameters_are_those_of_the_long_way(operation: Operation, quant: Quant | None) -> None:
    keep_norm = quant is not None
    bench = Bench(operation, quant=quant, keep_norm=keep_norm)
    for turn in range(3):
        call = bench.call(operation, quant=quant, keep_norm=keep_norm)
        given = bench.first.signature.empty() if turn else None
        out = bench.bound(call, given)
        assert out is not None
        assert given is None or out is given
        check_out(check_call(bench.capacity, call), out)
        assert bench.launched.pop() == bench.expected(call, out)
    with bench.engine.in_use:
        pass


@pytest.mark.parametrize("quant", [quant for quant in QUANTS if quant is not None], ids=lambda q: q.label)
def test_a_call_without_a_format_is_not_taken_before_the_first_bound_call(quant: Quant) -> None:
    """The long way leaves no format at the launcher: a call without one must not pass for a call with the bound's."""
    bench = Bench(quant=quant)
    assert bench.launcher.quant is None
    plain = bench.call(quant=None)
    assert bench.run(bench.fresh, plain, None) is None
    assert bench.run(bench.into, plain, bench.first.signature.empty()) is None
    assert bench.idle()


@pytest.mark.parametrize("scales", [(3.0, torch.tensor(2.0)), (torch.tensor(2.0), 3.0)], ids=["number", "tensor"])
def test_a_scale_of_the_other_kind_is_not_taken_behind_a_bound_call_with_it(scales: tuple[Any, Any]) -> None:
    """Calls with a number and with a tensor have one launcher, so the quant of the last launch may be of either kind."""
    first, other = (NVFP4(scale) for scale in scales)
    bench = Bench(quant=first)
    bound_first, kept = bench.fresh, bench.first
    bench.first = check_call(bench.capacity, bench.call(quant=other))
    bound_other = bench.bind(bench.first.signature.empty())
    bench.first = kept
    call = bench.call(quant=other)
    assert bench.run(bound_other, call, kept.signature.empty()) is not None
    bench.launched.clear()
    assert bench.launcher.quant is other
    assert bench.run(bound_first, bench.call(quant=other), None) is None
    assert bench.idle()


def test_the_launch_of_the_last_stream_is_taken_as_it_is() -> None:
    bench, call = Bench(), None
    bench.launcher.stream = 7
    call = bench.call()
    out = bench.bound(call, None)
    assert out is not None
    assert bench.launched.pop() == bench.expected(call, out)
    bench.launcher.launch = lambda: (1,)
    assert bench.run(bench.into, bench.call(), bench.first.signature.empty()) is not None  # bound before
    failing = bench.bind(None)
    assert bench.run(failing, bench.call(), None) is not None
    assert bench.launched  # again, by the launch that says what is wrong


@pytest.mark.parametrize("scales", [(3.0, 5.0, 3.0), (torch.tensor(2.0), torch.tensor(4.0))], ids=["numbers", "tensors"])
def test_scalars_may_change_between_calls(scales: tuple[Any, ...]) -> None:
    bench = Bench(quant=NVFP4(scales[0]))
    for scale in scales:
        quant = NVFP4(scale)
        call = bench.call(quant=quant, norm=RMSNorm(torch.ones(H), eps=quant.block * 1e-6))
        out = bench.bound(call, None)
        assert out is not None
        got, expected = Params.from_buffer_copy(bench.launched.pop()), Params.from_buffer_copy(bench.expected(call, out))
        assert (got.scale, got.eps) == (expected.scale, expected.eps)
        assert got.scale or got.scale_value == expected.scale_value


def test_a_tensor_in_the_place_of_a_number_takes_the_long_way() -> None:
    for first, then in ((3.0, torch.tensor(3.0)), (torch.tensor(3.0), 3.0)):
        bench = Bench(quant=NVFP4(first))
        assert bench.bound(bench.call(quant=NVFP4(then)), None) is None
        assert bench.idle()


def test_the_residual_may_be_updated_in_place() -> None:
    bench = Bench()
    in_place = bench.bind(Output(residual=bench.first.residual, norm=torch.zeros(T, H, dtype=BF16)))
    for _ in range(2):
        call = bench.call()
        out = Output(residual=call.residual, norm=torch.zeros(T, H, dtype=BF16))
        assert bench.bound(call, out) is None
        assert bench.idle()
        assert bench.run(in_place, call, out) is out
        assert bench.launched.pop() == bench.expected(call, out)
        out.residual = torch.zeros(T, H, dtype=BF16)
        assert bench.run(in_place, call, out) is None


def test_calls_of_another_kind_take_the_long_way() -> None:
    bench = Bench(quant=NVFP4(3.0))
    right = bench.call(quant=NVFP4(3.0))
    assert bench.bound(right, None) is not None
    bench.launched.clear()
    for changes in (
        {"operation": "sharded"},
        {"keep_norm": True},
        {"residual": None},
        {"norm": None},
        {"norm": RMSNorm(torch.ones(H), prefetch=False)},
        {"quant": None},
        {"quant": NVFP4(3.0, "8x4")},
        {"quant": FP8PerToken()},
        {"quant": "fp8"},
    ):
        assert bench.run(bench.fresh, dataclasses.replace(right, **changes), None) is None, changes  # type: ignore[arg-type]
    assert bench.run(bench.fresh, right, bench.first.signature.empty()) is None
    assert bench.run(bench.into, right, None) is None
    assert bench.idle()


def strided() -> torch.Tensor:
    return torch.zeros(T, 2 * H, dtype=BF16)[:, :H]


def moved() -> torch.Tensor:
    """Off by two bytes."""
    return torch.zeros(T * H + 8, dtype=BF16)[1 : T * H + 1].view(T, H)


def learned() -> torch.Tensor:
    return torch.zeros(T, H, dtype=BF16, requires_grad=True)


class Wrapper(torch.Tensor):
    """A subclass whose values lie elsewhere, as DTensor's do."""

    @staticmethod
    def __new__(cls) -> Wrapper:
        return torch.Tensor._make_wrapper_subclass(cls, (T, H), dtype=BF16)  # type: ignore[attr-defined,no-any-return]

    @classmethod
    def __torch_dispatch__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        raise NotImplementedError


WRONG: dict[str, dict[str, Callable[[], Any]]] = {
    "dtype": {"partial": lambda: torch.zeros(T, H)},
    "shape": {"partial": lambda: torch.zeros(T + 1, H, dtype=BF16)},
    "meta": {"partial": lambda: torch.zeros(T, H, dtype=BF16, device="meta")},
    "strides": {"partial": strided},
    "alignment": {"partial": moved},
    "a lazy negation": {"partial": lambda: torch._neg_view(torch.ones(T, H, dtype=BF16))},
    "a wrapper": {"partial": Wrapper},
    "residual: a wrapper": {"residual": Wrapper},
    "no tensor": {"partial": lambda: [1.0]},
    "grad": {"partial": learned},
    "residual: dtype": {"residual": lambda: torch.zeros(T, H)},
    "residual: rows": {"residual": lambda: torch.zeros(T - 1, H, dtype=BF16)},
    "residual: strides": {"residual": strided},
    "residual: alignment": {"residual": moved},
    "residual: grad": {"residual": learned},
    "another norm": {"norm": lambda: torch.nn.RMSNorm(H)},
    "weight: dtype": {"norm": lambda: RMSNorm(torch.ones(H, dtype=torch.float16))},
    "weight: a lazy negation": {"norm": lambda: RMSNorm(torch._neg_view(torch.ones(H)))},
    "weight: length": {"norm": lambda: RMSNorm(torch.ones(H + 8))},
    "weight: strides": {"norm": lambda: RMSNorm(torch.ones(2 * H)[::2])},
    "weight: alignment": {"norm": lambda: RMSNorm(torch.ones(H + 1)[1:])},
    "weight: device": {"norm": lambda: RMSNorm(torch.ones(H, device="meta"))},
    "weight: grad": {"norm": lambda: RMSNorm(torch.ones(H, requires_grad=True))},
    "scale: device": {"quant": lambda: NVFP4(torch.ones(1, device="meta"))},
}


@pytest.mark.parametrize("case", WRONG)
def test_what_is_wrong_takes_the_long_way(case: str) -> None:
    bench = Bench(quant=NVFP4(3.0))
    changes = {name: make() for name, make in WRONG[case].items()}
    call = bench.call(**{"quant": NVFP4(3.0), **changes})
    assert bench.bound(call, None) is None
    assert bench.idle()
    with pytest.raises(ArgumentError):
        check_call(bench.capacity, call)


def outputs(bench: Bench, **changes: Any) -> Output:
    return dataclasses.replace(bench.first.signature.empty(), **changes)


WRONG_OUT: dict[str, Callable[[Bench, Call], dict[str, Any]]] = {
    "missing": lambda bench, call: {"norm": None},
    "too many": lambda bench, call: {"reduced": torch.zeros(T, H, dtype=BF16)},
    "dtype": lambda bench, call: {"norm": torch.zeros(T, H)},
    "shape": lambda bench, call: {"norm": torch.zeros(T + 1, H, dtype=BF16)},
    "strides": lambda bench, call: {"norm": strided()},
    "alignment": lambda bench, call: {"norm": moved()},
    "scales without padding": lambda bench, call: {"scales": torch.zeros(128 * 16, dtype=torch.uint8)[:1]},
    "another's memory": lambda bench, call: {"norm": call.partial},
    "the residual's memory": lambda bench, call: {"norm": call.residual},
    "the weight's memory": lambda bench, call: {"norm": call.norm.weight.new_zeros(0)},
    "two outputs": lambda bench, call: (lambda x: {"norm": x, "residual": x})(torch.zeros(T, H, dtype=BF16)),
    "a part of the residual": lambda bench, call: {"residual": torch.zeros(T + 1, H, dtype=BF16)[:T]},
}


@pytest.mark.parametrize("case", [c for c in WRONG_OUT if c != "a part of the residual"])
def test_wrong_outputs_take_the_long_way(case: str) -> None:
    bench = Bench(quant=NVFP4(3.0), keep_norm=True)
    call = bench.call(quant=NVFP4(3.0), keep_norm=True)
    out = outputs(bench, **WRONG_OUT[case](bench, call))
    for _ in range(2):
        assert bench.bound(call, out) is None
    assert bench.idle()
    with pytest.raises(ArgumentError):
        check_out(check_call(bench.capacity, call), out)


def test_an_overlap_with_the_residual_is_seen_where_it_is_not_in_place() -> None:
    bench, memory = Bench(), torch.zeros(T + 1, H, dtype=BF16)
    call = bench.call(residual=memory[:T])
    assert bench.bound(call, Output(residual=memory[1:], norm=torch.zeros(T, H, dtype=BF16))) is None
    assert bench.idle()


def test_outputs_that_overlap_only_later_are_seen() -> None:
    """The places of one call say nothing of the next."""
    bench, out = Bench(), None
    out = bench.first.signature.empty()
    assert bench.bound(bench.call(), out) is out
    bench.launched.clear()
    assert bench.bound(bench.call(partial=out.norm), out) is None
    out.norm = out.residual
    assert bench.bound(bench.call(), out) is None
    assert bench.idle()


@pytest.mark.parametrize(("name", "value"), [("capturing", True), ("stream", 8), ("device", 0)])
def test_unusual_circumstances_take_the_long_way(machine: dict[str, Any], name: str, value: Any) -> None:
    bench = Bench()
    machine[name] = value
    assert bench.bound(bench.call(), None) is None
    assert bench.idle()


@pytest.mark.parametrize("word", [0, 1])
def test_a_failure_takes_the_long_way(word: int) -> None:
    bench = Bench()
    bench.words[word] = 1
    assert bench.bound(bench.call(), None) is None
    assert bench.idle()


def test_another_thread_takes_the_long_way() -> None:
    bench = Bench()
    with bench.engine.in_use:
        assert bench.bound(bench.call(), None) is None
    assert bench.idle()


def test_transforms_take_the_long_way() -> None:
    bench, seen = Bench(), []

    def f(x: torch.Tensor) -> torch.Tensor:
        seen.append(bench.bound(bench.call(partial=x), None))
        return x

    torch.func.vmap(f)(torch.zeros(2, T, H, dtype=BF16))
    assert seen == [None]
    assert bench.idle()


def test_an_inference_tensor_outside_of_inference_mode_takes_the_long_way() -> None:
    bench = Bench()
    with torch.inference_mode():
        out = bench.first.signature.empty()
    assert bench.bound(bench.call(), out) is None
    assert bench.idle()


def test_a_launch_that_fails_leaves_the_communicator_free() -> None:
    bench = Bench()

    def fail(stream: int) -> None:
        raise RuntimeError("no")

    broken = bound.bind(bench.engine, bench.first, None, bench.launcher, fail)
    assert broken is not None
    with pytest.raises(RuntimeError):
        bench.run(broken, bench.call(), None)
    assert bench.idle()


def test_a_prologue_or_a_branch_norm_goes_the_long_way() -> None:
    """A bound call cannot mistake a prologue for a partial, and a call with a branch norm never asks one."""
    bench = Bench()
    term = ExpertCombine(torch.zeros(3, H, dtype=BF16), torch.zeros(T, 1, dtype=torch.int32))
    assert bench.bound(bench.call(partial=term), None) is None
    assert not bench.launched
    assert not bench.call(partial=term).bindable
    assert not bench.call(branch_norm=RMSNorm(torch.ones(H))).bindable
    assert bench.call().bindable


@pytest.mark.parametrize("seed", range(8))
def test_random_sequences_of_calls_run_with_the_parameters_of_the_long_way(seed: int) -> None:
    """Calls of several signatures in any order, the latest bound call tried first, as by the engine; launchers are shared by signature."""
    draw = random.Random(seed)
    bench = Bench()
    launchers: dict[Any, Any] = {}
    kept: dict[Any, bound.Bound] = {}
    latest: bound.Bound = bound.unbound
    launched: list[bytes] = []
    quants = [
        None,
        NVFP4(3.0),
        NVFP4(5.0),
        NVFP4(torch.tensor(2.0)),
        FP8PerToken(),
        FP8PerToken(2.0**-9),
        FP8Static(0.5),
        FP8Static(torch.tensor(4.0)),
    ]
    taken = 0

    def read(params: bytes) -> bytes:
        """What kernels read: ``scale_value`` only without a pointer to the scale."""
        found = Params.from_buffer_copy(params)
        if found.scale:
            found.scale_value = 0.0
        return bytes(found)

    for _ in range(600):
        quant = draw.choice(quants)
        norm: RMSNorm | None = RMSNorm(torch.ones(H), eps=draw.choice([1e-5, 1e-6]))
        operation = draw.choice(["all_reduce", "sharded", "reduce_scatter", "finish"])
        norm = norm if quant is not None or operation in ("finish", "sharded") or draw.random() < 0.5 else None
        call = bench.call(operation, quant=quant, norm=norm, keep_norm=quant is not None and draw.random() < 0.3)
        if operation == "all_reduce" and draw.random() < 0.3:
            call = dataclasses.replace(call, residual=None)
        checked = check_call(bench.capacity, call)
        given = checked.signature.empty() if draw.random() < 0.5 else None
        arguments = (call.operation, call.partial, call.residual, call.norm, call.quant, call.keep_norm, given)
        out = latest(*arguments)
        if out is None:
            found = kept.get(bound.key_of(call, given))
            if found is not None and found is not latest:
                latest = found
                out = found(*arguments)
        if out is None:
            out = checked.signature.empty() if given is None else given
            if checked.signature not in launchers:
                launchers[checked.signature] = SimpleNamespace(params=Params(), quant=None, stream=-1, launch=None)
            launcher = launchers[checked.signature]
            launcher.quant = None
            fill_call(launcher.params, checked, out)

            def launch(stream: int, params: Params = launcher.params) -> None:
                launched.append(bytes(params))

            launch(7)
            made = bound.bind(bench.engine, checked, given, launcher, launch)
            assert made is not None
            latest = kept[bound.key_of(call, given)] = made
        else:
            taken += 1
        assert given is None or out is given
        check_out(checked, out)
        assert read(launched.pop()) == read(bench.expected(call, out))
        assert not launched
    assert taken > 100


@pytest.mark.parametrize("operation", ["sharded", "reduce_scatter"])
def test_rows_are_part_of_what_is_bound(operation: Operation) -> None:
    """The same list is taken; another one, and none, go the long way even where every tensor is alike."""
    rows, alike = (3, 3), {"residual": torch.zeros(3, H, dtype=BF16)}
    bench = Bench(operation, rows=rows, **alike)
    call = bench.call(operation, rows=rows)
    out = bench.bound(call, None)
    assert out is not None
    assert bench.launched.pop() == bench.expected(call, out)
    plain = Bench(operation, **alike)
    for made, other in ((bench, None), (bench, (4, 2)), (plain, rows)):
        assert made.bound(made.call(operation, rows=other), None) is None
        assert made.idle()
    keys = {bound.key_of(bench.call(operation, rows=each), None) for each in (None, rows, (4, 2))}
    assert len(keys) == 3


@pytest.mark.parametrize("operation", ["finish", "all_reduce"])
def test_a_gated_unit(operation: Operation) -> None:
    """Two tensors, or the halves of one, whose calls share a launcher; what is unusual goes the long way."""
    bench, quant = Bench("finish"), FP8PerToken()

    def halves(tokens: int = T) -> Gated:
        return Gated.of(torch.randn(tokens, 2 * H).to(BF16))

    def pair() -> Gated:
        return Gated(*(torch.randn(T, H).to(BF16) for _ in range(2)))

    def call(term: Any, **changes: Any) -> Call:
        return bench.call(operation, **{"norm": None, "residual": None, "quant": quant, **changes}, partial=term)

    bounds = {}
    for make in (halves, pair):
        bench.first = check_call(bench.capacity, call(make()))
        bounds[make] = bench.bind(None)
        assert bound.bind(bench.engine, bench.first, bench.first.signature.empty(), bench.launcher, bench._launch) is None
    assert bound.key_of(call(halves()), None) != bound.key_of(call(pair()), None)
    assert bound.key_of(call(pair()), None) != bound.key_of(call(pair().gate), None)
    for make, other in ((halves, pair), (pair, halves), (halves, pair)):
        asked = call(make())
        out = bench.run(bounds[make], asked, None)
        assert out is not None
        assert bench.launched.pop() == bench.expected(asked, out)
        misaligned = Gated(*(torch.zeros(T * H + 1, dtype=BF16)[1:].view(T, H) for _ in range(2)))
        for term in (other(), halves(3), pair().gate, misaligned):
            assert bench.run(bounds[make], call(term), None) is None
        assert bench.run(bounds[make], call(make(), residual=torch.zeros(T, H, dtype=BF16)), None) is None
    plain = Bench("finish")
    assert plain.run(plain.fresh, call(pair(), norm=RMSNorm(torch.ones(H), eps=1e-5)), None) is None
    assert plain.idle()


@pytest.mark.parametrize("write", [True, False])
def test_whether_padding_is_written_is_part_of_what_is_bound(write: bool) -> None:
    """The parameters say it: a call of the other kind, or of neither, must not be launched with them."""
    bench = Bench(quant=NVFP4(3.0), write_padding=write)
    call, out = bench.call(quant=NVFP4(3.0), write_padding=write), bench.first.signature.empty()
    assert bench.bound(call, out) is out
    assert bench.launched.pop() == bench.expected(call, out)
    for other in (not write, int(write), None):
        assert bench.bound(bench.call(quant=NVFP4(3.0), write_padding=other), out) is None
        assert bench.idle()
    keys = {bound.key_of(bench.call(quant=NVFP4(3.0), write_padding=each), out) for each in (True, False)}
    assert len(keys) == 2

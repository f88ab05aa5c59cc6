"""``torch.ops.collogue``: schemas, fakes, tracing, and communicators found by name."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from ranks import HIDDEN_SIZE, arguments, check_works, communicator
from samples import every_format
from torch.utils.flop_counter import FlopCounterMode

import collogue
from collogue import NVFP4, FP8Group, FP8PerToken, FP8Static, Output, RMSNorm, ops, registry
from collogue.contract.quant import Quant, describe
from collogue.contract.spec import Operation
from collogue.errors import (
    ArgumentError,
    CaptureError,
    ClosedError,
    CollogueError,
    DeviceError,
    DTypeError,
    GradError,
    LayoutError,
    OverlapError,
    ShapeError,
)
from collogue.formats import scale_storage
from collogue.testing import VirtualGroup, run_virtual
from collogue.testing.compare import compare, differing

#: What is checked of an operator; gradients do not exist.
CHECKS = ("test_schema", "test_faketensor", "test_aot_dispatch_dynamic", "test_autograd_registration")


@pytest.fixture
def comm() -> Iterator[collogue.Communicator]:
    """Of a world of one, open during the test."""
    found: list[collogue.Communicator] = []
    run_virtual(1, lambda group: found.append(communicator(group, dtype=torch.bfloat16)))
    yield found[0]
    found[0].close()


def operands(
    comm: collogue.Communicator, quant: Quant | None, *, norm: bool = True, residual: bool = True, tokens: int = 4
) -> tuple[Any, ...]:
    """Arguments of an operator, of this rank."""
    given = arguments(comm.rank, tokens)
    scale = quant.given_scale if quant is not None else None
    return (
        given["partial"],
        given["residual"] if residual else None,
        given["norm"].weight if norm else None,
        1e-5,
        0.0,
        "none" if quant is None else quant.label,
        scale if isinstance(scale, torch.Tensor) else None,
        scale if isinstance(scale, float) else 1.0,
        getattr(quant, "smallest", 0.0),
        quant is not None and norm,
        comm.name,
    )


@pytest.mark.slow
@pytest.mark.parametrize("operation", ["all_reduce", "sharded", "reduce_scatter", "finish"])
@pytest.mark.parametrize("label", ["none", "static tensor", "column"])
def test_opcheck(comm: collogue.Communicator, operation: str, label: str) -> None:
    quants = {"none": None, "static tensor": FP8Static(torch.tensor(0.5)), "column": FP8Group(32, "ue8m0", "column")}
    given = operands(comm, quants[label], residual=operation != "finish")
    torch.library.opcheck(getattr(torch.ops.collogue, operation).default, given, test_utils=CHECKS)


def test_opcheck_of_gather(comm: collogue.Communicator) -> None:
    shard = comm.reduce_scatter(**arguments(0), quant=FP8PerToken(), keep_norm=True)
    values, codes = (None, shard.residual, shard.norm), (shard.codes, shard.scales)
    operator, smallest = torch.ops.collogue.all_gather.default, FP8PerToken().smallest
    torch.library.opcheck(operator, (*values, None, None, 4, "none", 0.0, comm.name), test_utils=CHECKS)
    # The schema check multiplies its inputs, which PyTorch does not do in FP8.
    torch.library.opcheck(operator, (*values, *codes, 4, "fp8_per_token", smallest, comm.name), test_utils=CHECKS[1:])


@pytest.mark.parametrize("quant", [None, *every_format()], ids=lambda q: "none" if q is None else q.label)
def test_fakes_have_the_form_of_the_outputs(quant: Quant | None) -> None:
    """Shape, strides and dtype, on every rank of a world of three, of every operation."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    def rank(group: VirtualGroup) -> None:
        comm = communicator(group)
        for operation in ("all_reduce", "sharded", "reduce_scatter", "finish"):
            given = list(operands(comm, quant, residual=operation == "all_reduce", tokens=5))
            operator = getattr(torch.ops.collogue, operation)
            real = operator(*given)
            with FakeTensorMode() as mode:
                fake = operator(*[mode.from_tensor(a) if isinstance(a, torch.Tensor) else a for a in given])
            forms = [[(tuple(t.shape), t.stride(), t.dtype) for t in tensors if t.numel()] for tensors in (real, fake)]
            assert forms[0] == forms[1], operation

    run_virtual(3, rank)


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_calls_are_traced_without_a_break(comm: collogue.Communicator, backend: str) -> None:
    """Formats and norms may be made inside what is compiled."""

    def step(partial: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor) -> Output:
        return comm.all_reduce(partial, residual=residual, norm=RMSNorm(weight, 1e-5), quant=collogue.NVFP4(400.0))

    given = arguments(0)
    with torch.no_grad():
        compiled = torch.compile(step, backend=backend, fullgraph=True)
        found, expected = (f(given["partial"], given["residual"], given["norm"].weight) for f in (compiled, step))
    assert not differing(compare(found, expected))


def test_the_sharded_calls_are_traced(comm: collogue.Communicator) -> None:
    def step(partial: torch.Tensor, shard: torch.Tensor, norm: RMSNorm) -> tuple[Output, Output, Output]:
        quant = FP8PerToken()
        whole = comm.all_reduce(partial, residual=shard, norm=norm, quant=quant, sharded=True)
        part = comm.reduce_scatter(partial, residual=shard, norm=norm, quant=quant)
        return whole, comm.all_gather(part, 4, quant=quant), comm.finish(partial, norm=norm)

    given = arguments(0)
    with torch.no_grad():
        compiled = torch.compile(step, backend="aot_eager", fullgraph=True)
        for found, expected in zip(compiled(*given.values()), step(*given.values()), strict=True):
            assert not differing(compare(found, expected))


def test_tokens_may_be_symbolic(comm: collogue.Communicator) -> None:
    """One graph for every number of tokens, also beyond the communicator's capacity."""
    compiled_for = []

    def backend(module: torch.fx.GraphModule, inputs: list[Any]) -> Any:
        compiled_for.append(module)
        return module.forward

    norm = arguments(0)["norm"]
    compiled = torch.compile(lambda x: comm.all_reduce(x, norm=norm, quant=FP8PerToken()), backend=backend, dynamic=True, fullgraph=True)
    with torch.no_grad():
        for tokens in (4, 7, 3, 5 * comm.max_tokens + 1):
            partial = arguments(0, tokens)["partial"]
            expected = collogue.reference.all_reduce([partial], norm=norm, quant=FP8PerToken())
            assert not differing(compare(compiled(partial), expected)), tokens
    assert len(compiled_for) == 1


# ---- outputs of the caller's


def traced(how: str, step: Callable[..., Any], *args: Any) -> Any:
    """``step(*args)`` under a dispatch mode, compiled whole, or compiled with breaks."""
    if how == "mode":
        with FlopCounterMode(display=False):
            return step(*args)
    torch._dynamo.reset()
    return torch.compile(step, backend=how.removesuffix(" in parts"), fullgraph=not how.endswith("in parts"))(*args)


def poisoned(out: Output) -> Output:
    for name, tensor in out.items():
        (scale_storage(tensor) if name == "scales" else tensor.view(torch.uint8)).fill_(0x5A)
    return out


HOW = pytest.mark.parametrize("how", ["mode", "aot_eager", "inductor"])


@pytest.mark.slow
@HOW
@pytest.mark.parametrize("quant", [None, FP8Static(0.5), NVFP4(400.0, "8x4"), FP8Group(32, layout="column")], ids=describe)
def test_traced_calls_write_out(comm: collogue.Communicator, quant: Quant | None, how: str) -> None:
    """With the residual in place, and what reads the outputs afterwards."""
    given = arguments(0)
    wanted = {"norm": given["norm"], "quant": quant, "keep_norm": quant is not None}
    out = poisoned(comm.empty(4, residual=True, **wanted))
    out.residual = given["residual"].clone()

    def step(partial: torch.Tensor, out: Output, weight: torch.Tensor) -> tuple[Output, torch.Tensor]:
        given = wanted | {"norm": RMSNorm(weight)}
        returned = comm.all_reduce(partial, residual=out.residual, **given, out=out, write_padding=False)
        return returned, returned.residual + out.norm

    with torch.no_grad():
        expected = comm.all_reduce(given["partial"], residual=given["residual"], **wanted)
        returned, read = traced(how, step, given["partial"], out, given["norm"].weight)
    assert returned is out
    assert not differing(compare(out, expected))
    assert torch.equal(read, expected.residual + expected.norm)


@pytest.mark.slow
@HOW
def test_the_other_traced_calls_write_out(comm: collogue.Communicator, how: str) -> None:
    given, quant = arguments(0), FP8PerToken()
    partial, shard, norm = given.values()

    def step(partial: torch.Tensor, shard: torch.Tensor, weight: torch.Tensor, *outs: Output) -> tuple[Output, ...]:
        wanted = {"norm": RMSNorm(weight), "quant": quant}
        whole = comm.all_reduce(partial, residual=shard, **wanted, sharded=True, out=outs[0])
        part = comm.reduce_scatter(partial, residual=shard, **wanted, out=outs[1])
        return whole, part, comm.all_gather(part, 4, quant=quant, out=outs[2]), comm.finish(partial, **wanted, out=outs[3])

    def fresh(operation: Operation) -> Output:
        return poisoned(comm.empty(4, residual=operation != "finish", norm=operation != "all_gather", quant=quant, operation=operation))

    operations: list[Operation] = ["sharded", "reduce_scatter", "all_gather", "finish"]
    outs, expected = (list(map(fresh, operations)) for _ in range(2))
    with torch.no_grad():
        step(partial, shard, norm.weight, *expected)
        returned = traced(how, step, partial, shard, norm.weight, *outs)
    for out, right, given_back in zip(outs, expected, returned, strict=True):
        assert given_back is out
        assert not differing(compare(out, right))


@pytest.mark.slow
@pytest.mark.parametrize("how", ["mode", "aot_eager in parts", "inductor in parts"])
@pytest.mark.parametrize("scale_format", ["float32", "ue8m0"])
def test_padding_of_scales_is_written_outside_of_graphs(comm: collogue.Communicator, scale_format: Any, how: str) -> None:
    given, quant = arguments(0, 5), FP8Group(32, scale_format, "column")
    out = poisoned(comm.empty(5, quant=quant))

    def step(partial: torch.Tensor, out: Output) -> Output:
        return comm.all_reduce(partial, quant=quant, out=out)

    with torch.no_grad():
        expected = step(given["partial"], poisoned(comm.empty(5, quant=quant)))
        assert traced(how, step, given["partial"], out) is out
        assert not differing(compare(out, expected))
        with pytest.raises(torch._dynamo.exc.Unsupported, match="disable"):
            traced("aot_eager", step, given["partial"], out)
        short = scale_storage(expected.scales)[:-4].clone().view(expected.scales.dtype)
        out.scales = short.as_strided(expected.scales.shape, expected.scales.stride())
        with pytest.raises(LayoutError, match=r"out\.scales needs .* bytes with its padding"):
            traced(how, step, given["partial"], out)


MALFORMED: dict[str, tuple[Callable[[dict[str, Any]], Any], type[CollogueError], str]] = {
    "no Output": (lambda given: given["partial"], ArgumentError, "out is a Tensor"),
    "a missing norm": (lambda given: Output(residual=torch.empty_like(given["residual"])), ShapeError, r"out holds \['residual'\]"),
    "too few rows": (lambda given: outputs(given, norm=given["partial"][1:].clone()), ShapeError, r"out\.norm has shape \[3, 64\]"),
    "a wide dtype": (lambda given: outputs(given, norm=given["partial"].float()), DTypeError, r"out\.norm has dtype torch\.float32"),
    "columns": (lambda given: outputs(given, norm=torch.empty(64, 4).bfloat16().t()), LayoutError, r"out\.norm has strides \(1, 4\)"),
    "no memory": (lambda given: outputs(given, norm=torch.empty_like(given["partial"], device="meta")), DeviceError, "out.norm is on meta"),
    "the partial": (lambda given: outputs(given, norm=given["partial"]), OverlapError, r"out\.norm shares memory with partial"),
    "one for two": (lambda given: outputs(given, norm=given["residual"]), OverlapError, r"out\.norm shares memory with residual"),
    "two in one": (
        lambda given: outputs(given, **dict.fromkeys(("residual", "norm"), given["partial"].clone())),
        OverlapError,
        "out.residual",
    ),
}


def outputs(given: dict[str, Any], **changed: torch.Tensor) -> Output:
    return Output(**({"residual": given["residual"], "norm": torch.empty_like(given["partial"])} | changed))


@pytest.mark.slow
@pytest.mark.parametrize("how", ["mode", "eager in parts"])
@pytest.mark.parametrize("case", MALFORMED)
def test_malformed_outputs_are_refused_when_traced(comm: collogue.Communicator, case: str, how: str) -> None:
    make, error, message = MALFORMED[case]
    given = arguments(0)
    with torch.no_grad(), pytest.raises(error, match=message):
        traced(how, lambda given, out: comm.all_reduce(**given, out=out), given, make(given))
    check_works(comm)


# ---- gradients


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["eager", "inductor"])
@pytest.mark.parametrize("name", ["partial", "residual", "RMSNorm.weight"])
def test_what_requires_grad_is_refused_when_compiled(comm: collogue.Communicator, name: str, backend: str) -> None:
    given = [t.clone().requires_grad_(n == name) for n, t in named(arguments(0)).items()]

    def step(partial: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor) -> Output:
        return comm.all_reduce(partial, residual=residual, norm=RMSNorm(weight))

    compiled = torch.compile(step, backend=backend)
    with pytest.raises((GradError, RuntimeError), match=rf"(?s){name} requires grad.*hint: call under torch.inference_mode"):
        compiled(*given)
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            out = compiled(*given)
            assert not differing(compare(out, step(*given)))
            assert not out.residual.requires_grad


def named(given: dict[str, Any]) -> dict[str, torch.Tensor]:
    """Tensors of a call, by the names that errors give them."""
    return {"partial": given["partial"], "residual": given["residual"], "RMSNorm.weight": given["norm"].weight}


def test_operators_refuse_what_requires_grad(comm: collogue.Communicator) -> None:
    given = list(operands(comm, None))
    for place, name in enumerate(named(arguments(0))):
        changed = [t.clone().requires_grad_() if i == place else t for i, t in enumerate(given)]
        with pytest.raises(GradError, match=f"{name} requires grad"):
            torch.ops.collogue.all_reduce(*changed)
        with torch.no_grad():
            assert not any(t.requires_grad for t in torch.ops.collogue.all_reduce(*changed))
    with pytest.raises(GradError, match=r"shard\.norm requires grad"):
        torch.ops.collogue.all_gather(None, given[1], given[0].clone().requires_grad_(), None, None, 4, "none", 0.0, comm.name)


def test_eager_calls_bypass_the_dispatcher(comm: collogue.Communicator, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ops, "call", None)
    check_works(comm)
    with pytest.raises(TypeError), torch._subclasses.fake_tensor.FakeTensorMode():
        check_works(comm)


def test_names() -> None:
    """Communicators of one group and dtype are numbered; a closed or forgotten one is not found."""

    def rank(group: VirtualGroup) -> None:
        first, second, third = communicator(group), communicator(group), communicator(group, dtype=torch.float32)
        base = f"{group.name}/bfloat16"
        assert (first.name, second.name, third.name) == (base, f"{base}/2", f"{group.name}/float32")
        assert registry.find(base) is first
        assert registry.of_group(group.name, torch.float32, HIDDEN_SIZE) is third
        assert registry.of_group(group.name, torch.float32, HIDDEN_SIZE + 8) is None
        assert registry.of_group(group.name, torch.bfloat16, HIDDEN_SIZE) is second, "the newest"
        given = operands(first, None)
        first.close()
        with pytest.raises(ClosedError, match=r"no open communicator 'virtual0/bfloat16'\n.*open ones: .*virtual0/bfloat16/2"):
            torch.ops.collogue.all_reduce(*given)
        again = communicator(group)
        assert again.name == base
        del again
        gc.collect()
        assert registry.of_group(group.name, torch.bfloat16, HIDDEN_SIZE) is second

    run_virtual(1, rank)


def test_what_meets_other_ranks_is_refused_under_capture(comm: collogue.Communicator, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(comm, "device", torch.device("cuda", 0))
        patch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
        for action in (lambda: comm.prepare(1), comm.reset, comm.close):
            with pytest.raises(CaptureError, match=r"under graph capture\nhint: call it before or after"):
                action()
    check_works(comm)

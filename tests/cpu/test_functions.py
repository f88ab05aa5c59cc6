"""``collogue.quantize``, ``collogue.nn.gated`` and calls with a gated unit, on the CPU: eager, as operators, compiled."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from samples import every_format

import collogue
from collogue import Gated, PrologueForm, reference
from collogue.contract.quant import NVFP4, FP8PerToken, FP8Static, Quant, describe
from collogue.contract.spec import Output, owned_rows
from collogue.errors import (
    ArgumentError,
    CollogueError,
    DeviceError,
    DTypeError,
    FormatError,
    GradError,
    LayoutError,
    MismatchedCall,
    OverlapError,
    ShapeError,
)
from collogue.nn import FP8Block, ScaledLinear, gated
from collogue.testing import VirtualGroup, run_virtual
from collogue.testing.compare import compare
from collogue.testing.inputs import make_prologue

T, WIDTH = 5, 64
FORM = PrologueForm("gated", "none")


def made(rank: int = 0, tokens: int = T, dtype: torch.dtype = torch.bfloat16) -> Gated:
    given = make_prologue(FORM, "normal", rank=rank, tokens=tokens, hidden_size=WIDTH, dtype=dtype, count=1)
    assert isinstance(given, Gated)
    return given


def equal(a: Output, b: Output) -> bool:
    return not any(d.count for d in compare(a, b).values())


@pytest.mark.parametrize("quant", every_format(), ids=lambda quant: quant.label)
def test_one_call_is_two(quant: Quant) -> None:
    x = torch.randn(3, 4, 2 * WIDTH, generator=torch.Generator().manual_seed(2)).bfloat16()
    values, out = gated(x), gated(x, quant)
    codes, scales = collogue.quantize(values.view(12, WIDTH), quant)
    assert values.shape == (3, 4, WIDTH)
    assert equal(out, Output(codes=codes, scales=scales))
    gate, up = x.chunk(2, -1)
    for pair in ((gate, up), (gate.contiguous(), up.contiguous()), (gate.contiguous(), up)):
        assert torch.equal(gated(pair), values)
        assert equal(gated(pair, quant), out)
    assert equal(reference.finish(Gated(gate.reshape(12, WIDTH), up.reshape(12, WIDTH)), quant=quant), out)
    near = torch.nn.functional.silu(gate.float()) * up.float()
    assert float((values.float() - near).norm() / near.norm()) < 2.0**-8


def test_a_layer_reads_it() -> None:
    layer = ScaledLinear.of(torch.nn.Linear(WIDTH, 32), FP8PerToken(), activation=FP8PerToken())
    x = torch.randn(3, 2 * WIDTH)
    assert torch.equal(layer(gated(x, layer.activation)), layer(gated(x)))  # type: ignore[arg-type]


@pytest.mark.parametrize("quant", [None, FP8PerToken(), FP8Static(torch.tensor(0.5)), NVFP4(3.0, "8x4")], ids=str)
def test_operators_and_compiled_functions(quant: Quant | None) -> None:
    given = made()
    scale = None if quant is None else quant.given_scale
    label, smallest = describe(quant), getattr(quant, "smallest", 0.0)
    args = given.gate, given.up, label, scale if isinstance(scale, torch.Tensor) else None, 3.0, smallest
    torch.library.opcheck(torch.ops.collogue.alone.default, args)

    def call(x: torch.Tensor) -> Any:
        return gated(x, quant), None if quant is None else collogue.quantize(x[:, :WIDTH], quant)

    x = torch.cat((given.gate, given.up), 1)
    expected, found = call(x), torch.compile(call, backend="aot_eager", fullgraph=True)(x)
    flat, right = torch.utils._pytree.tree_leaves(found), torch.utils._pytree.tree_leaves(expected)
    assert len(flat) == len(right)
    assert all(torch.equal(a.view(torch.uint8), b.view(torch.uint8)) for a, b in zip(flat, right, strict=True) if b is not None)


@pytest.mark.parametrize("world", [1, 3])
def test_every_operation(world: int) -> None:
    """A gated unit is a term like any other, and ``finish`` takes it without a sum."""
    terms, norm, quant = [made(rank) for rank in range(world)], collogue.RMSNorm(torch.ones(WIDTH)), FP8PerToken()
    residual = made(7).up.contiguous()
    arguments: dict[str, Any] = {"norm": norm, "quant": quant}
    whole = reference.all_reduce(terms, residual=residual, **arguments)
    parts = reference.sharded(terms, residual=residual, **arguments)

    def rank(group: VirtualGroup) -> None:
        comm, mine = collogue.Communicator(group, max_tokens=8, hidden_size=WIDTH), terms[group.rank]
        rows = owned_rows(T, world, group.rank)
        comm.prepare(T, residual=False, quant=quant, operation="finish", prologue=mine)
        assert equal(comm.all_reduce(mine, residual=residual, **arguments), whole)
        assert equal(comm.all_reduce(mine, residual=residual[rows.start : rows.stop].clone(), sharded=True, **arguments), parts[group.rank])
        out = comm.empty(T, quant=quant, operation="finish", prologue=FORM)
        assert equal(comm.finish(mine, quant=quant, out=out), reference.finish(mine, quant=quant))
        with torch.no_grad():
            compiled = torch.compile(lambda a, b: comm.finish(Gated(a, b), **arguments), backend="aot_eager", fullgraph=True)
            assert equal(compiled(mine.gate, mine.up), reference.finish(mine, **arguments))
        wider = Gated.of(torch.ones(2, 4 * WIDTH, dtype=torch.bfloat16))
        assert equal(comm.finish(wider, quant=quant), reference.finish(wider, quant=quant))
        comm.close()

    run_virtual(world, rank)


def test_ranks_that_differ() -> None:
    def rank(group: VirtualGroup) -> None:
        comm, mine = collogue.Communicator(group, max_tokens=8, hidden_size=WIDTH), made()
        with pytest.raises(MismatchedCall, match="gated"):
            comm.all_reduce(mine if group.rank else mine.up)

    run_virtual(2, rank)


def test_bad_calls() -> None:
    mine, quant = made(), FP8PerToken()

    def rank(group: VirtualGroup) -> None:
        comm = collogue.Communicator(group, max_tokens=8, hidden_size=WIDTH)
        narrow = torch.ones(3, 12, dtype=torch.bfloat16)
        apart = torch.ones(3, WIDTH + 4, dtype=torch.bfloat16)[:, :WIDTH]
        cases: list[tuple[type[CollogueError], str, Callable[[], Any]]] = [
            (ArgumentError, "without norm= and quant=", lambda: comm.finish(mine)),
            (DTypeError, "Gated.gate has dtype torch.float32", lambda: comm.finish(made(dtype=torch.float32), quant=quant)),
            (LayoutError, "68 elements apart", lambda: comm.finish(Gated(apart, apart), quant=quant)),
            (LayoutError, "Gated.gate starts at an address", lambda: comm.finish(Gated.of(unaligned()), quant=quant)),
            (ShapeError, "hidden size 12", lambda: comm.finish(Gated(narrow, narrow), quant=quant)),
            (FormatError, "not a multiple", lambda: comm.finish(mine, quant=collogue.FP8Group(48))),
            (OverlapError, "Gated.up", lambda: comm.all_reduce(mine, out=Output(reduced=mine.up))),
            (ArgumentError, "all_gather sums nothing", lambda: comm.prepare(3, operation="all_gather", prologue=mine)),
        ]
        for error, text, call in cases:
            with pytest.raises(error, match=text) as caught:
                call()
            assert caught.value.hint
        comm.close()

    def unaligned() -> torch.Tensor:
        return torch.ones(T * 2 * WIDTH + 1, dtype=torch.bfloat16)[1:].view(T, 2 * WIDTH)

    run_virtual(1, rank)


SPARSE = torch.ones(3, 16).to_sparse()


@pytest.mark.parametrize(
    ("error", "text", "given"),
    [
        (ArgumentError, "gate_up is a list", [1, 2, 3]),
        (ArgumentError, "gate_up is a NoneType", None),
        (ShapeError, r"gate_up has shape \[3, 9\]; expected \[.., 2 I\]", torch.ones(3, 9)),
        (ShapeError, r"gate_up has shape \[3, 0\]; expected \[.., 2 I\]", torch.ones(3, 0)),
        (ShapeError, r"gate has shape \[3, 0\]", (torch.ones(3, 0), torch.ones(3, 0))),
        (ShapeError, r"gate has shape \[3, 8\], up \[3, 16\]", (torch.ones(3, 8), torch.ones(3, 16))),
        (DTypeError, "float64", torch.ones(3, 16).double()),
        (DeviceError, "Gated.up is on meta, Gated.gate on cpu", (torch.ones(3, 16), torch.ones(3, 16, device="meta"))),
        (LayoutError, "gate_up has layout torch.sparse_coo", SPARSE),
        (LayoutError, "up has layout torch.sparse_coo", (torch.ones(3, 16), SPARSE)),
    ],
)
def test_bad_gates(error: type[CollogueError], text: str, given: Any) -> None:
    with pytest.raises(error, match=text) as caught:
        gated(given)
    assert caught.value.hint
    assert "use the communicator's" not in caught.value.hint


@pytest.mark.parametrize(
    ("error", "text", "given"),
    [
        (ShapeError, r"shape \[T, H\], got list", [[1.0]]),
        (ShapeError, r"got \[8\]", torch.ones(8)),
        (ShapeError, r"got \[2, 3, 8\]", torch.ones(2, 3, 8)),
        (ShapeError, r"\[2, 0\]: rows without elements", torch.ones(2, 0)),
        (LayoutError, "sparse_coo", SPARSE),
        (DTypeError, "torch.float64", torch.ones(2, 8).double()),
        (DTypeError, "torch.int64", torch.ones(2, 8).long()),
        (DTypeError, "torch.float8_e4m3fn", torch.ones(2, 8).to(torch.float8_e4m3fn)),
    ],
)
@pytest.mark.parametrize("quant", [FP8PerToken(), FP8Static(0.5)], ids=str)
def test_bad_rows(error: type[CollogueError], text: str, given: Any, quant: Quant) -> None:
    with pytest.raises(error, match=text) as caught:
        collogue.quantize(given, quant)
    assert caught.value.hint


@pytest.mark.parametrize(
    ("text", "quant"),
    [("a str: 'fp8'", "fp8"), ("the class FP8PerToken", FP8PerToken), ("a FP8Block", FP8Block(32)), ("quant is None", None)],
)
def test_what_is_no_format(text: str, quant: Any) -> None:
    x = torch.ones(2, 64)
    calls: list[Callable[[], Any]] = [lambda: collogue.quantize(x, quant), lambda: reference.quantize(x, quant)]
    if quant is not None:
        calls += [lambda: gated(x, quant), lambda: reference.finish(x, quant=quant)]
    for call in calls:
        with pytest.raises(FormatError, match=text if call is calls[0] or quant is not None else "NoneType") as caught:
            call()
        assert caught.value.hint


def test_tensors_that_require_grad() -> None:
    x = torch.ones(2, 64, requires_grad=True)
    for call in (
        lambda: collogue.quantize(x, FP8PerToken()),
        lambda: gated(x),
        lambda: gated(x, FP8PerToken()),
        lambda: gated((x.detach(), x)),
        lambda: torch.ops.collogue.alone(x, None, "fp8_per_token", None, 1.0, 2.0**-20),
    ):
        with pytest.raises(GradError, match="requires grad"):
            call()
        with torch.no_grad():
            call()


def test_any_strides() -> None:
    """What kernels cannot read is copied, as by :func:`collogue.quantize`."""
    x = torch.randn(2 * WIDTH, 6)
    expected = gated(x.t().contiguous(), FP8PerToken())
    assert equal(gated(x.t(), FP8PerToken()), expected)
    for a, b in ((x.t()[:, :WIDTH], x.t()[:, WIDTH:]), (torch.stack((x[:WIDTH].t(), x[WIDTH:].t()), 2).unbind(2))):
        assert a.stride(1) != 1
        assert equal(gated((a, b), FP8PerToken()), expected)
    values = torch.compile(gated, backend="aot_eager", fullgraph=True)(x.t())
    assert torch.equal(values, gated(x.t().contiguous()))


def test_what_cannot_be_decoded() -> None:
    quant, static = FP8PerToken(), FP8Static(0.5)
    codes, scales = collogue.quantize(torch.ones(2, 64), quant)
    cases: list[tuple[type[CollogueError], str, tuple[Any, ...]]] = [
        (FormatError, "a str", (codes, scales, "fp8")),
        (FormatError, "a NoneType", (codes, scales, None)),
        (FormatError, "the class FP8PerToken", (codes, scales, FP8PerToken)),
        (ShapeError, "codes are a list", ([[1]], scales, quant)),
        (ShapeError, "no dimensions", (codes[0, 0], scales, quant)),
        (ShapeError, "scales are a float", (codes, 1.0, quant)),
        (ShapeError, "FP8PerToken has scales", (codes, None, quant)),
        (ShapeError, "FP8Static has no scales beside its own", (codes, scales, static)),
    ]
    for error, text, given in cases:
        with pytest.raises(error, match=text) as caught:
            collogue.dequantize(*given, hidden_size=64)
        assert caught.value.hint


def test_what_the_reference_refuses() -> None:
    x = torch.ones(2, 64)
    cases: list[tuple[type[CollogueError], str, Callable[[], Any]]] = [
        (ShapeError, "partial 0 is a list", lambda: reference.all_reduce([[[1.0]]])),  # type: ignore[list-item]
        (ShapeError, "residual is a float", lambda: reference.all_reduce([x], residual=1.0)),  # type: ignore[arg-type]
        (ArgumentError, "norm is a str", lambda: reference.finish(x, norm="rms")),  # type: ignore[arg-type]
        (ArgumentError, "y is a list", lambda: reference.finish([x])),  # type: ignore[arg-type]
        (FormatError, "quant is a str", lambda: reference.all_gather([Output(codes=x, scales=x)], quant="fp8")),  # type: ignore[arg-type]
    ]
    for error, text, call in cases:
        with pytest.raises(error, match=text) as caught:
            call()
        assert caught.value.hint

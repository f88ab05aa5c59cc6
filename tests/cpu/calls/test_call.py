"""Wrong calls: the error class and its hint, nothing launched, and the communicator still works. Groups are in test_group.py."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from ranks import HIDDEN_SIZE, MAX_TOKENS, arguments, check_works, communicator

import collogue.calls.call
import collogue.calls.outputs
from collogue.contract.quant import MXFP4, MXFP8, NVFP4, FP8Group, FP8PerToken, FP8Static
from collogue.contract.spec import Output, RMSNorm
from collogue.errors import (
    ArgumentError,
    CapacityError,
    CollogueError,
    DeviceError,
    DTypeError,
    FormatError,
    GradError,
    LayoutError,
    OverlapError,
    ScaleError,
    ShapeError,
)
from collogue.formats import empty_scales
from collogue.host.engine import HostEngine
from collogue.testing import VirtualGroup, run_virtual

Call = Callable[[collogue.Communicator, dict[str, Any]], object]
T, H = 4, HIDDEN_SIZE
BF16 = torch.bfloat16


def refused(call: Call, error: type[CollogueError], message: str, hint: str) -> None:
    """``call`` on both ranks raises ``error``, whose last line is the hint, and no engine runs; then a right call gives the right bits.

    All of it twice: on a new communicator, and on one that knows right calls of the same kind.
    """
    launched: list[object] = []

    def rank(group: VirtualGroup) -> None:
        comm, quant = communicator(group), FP8Group(32, layout="column")
        attempt(comm, group)
        given = arguments(group.rank)
        comm.all_reduce(given["partial"], residual=given["residual"])
        for right in (NVFP4(torch.ones(1)), FP8Static(torch.ones(1))):
            comm.all_reduce(**given, quant=right)
        comm.all_reduce(**given, quant=quant, keep_norm=True, out=outputs(given))
        group.barrier()
        launched.clear()
        attempt(comm, group)

    def attempt(comm: collogue.Communicator, group: VirtualGroup) -> None:
        group.barrier()
        with pytest.raises(error, match=message) as raised:
            call(comm, arguments(group.rank))
        assert type(raised.value) is error
        assert isinstance(raised.value, ValueError)
        last = str(raised.value).splitlines()[-1]
        assert last == f"hint: {raised.value.hint}"
        assert hint in last
        assert not launched
        group.barrier()
        check_works(comm, quant=FP8PerToken())
        check_works(comm)

    run = HostEngine.run
    with pytest.MonkeyPatch.context() as patch:
        # The engine after a refused call is the one of `check_works`.
        patch.setattr(HostEngine, "run", lambda self, call, out: (launched.append(call), run(self, call, out))[1])
        run_virtual(2, rank)
    assert len(launched) == 4


def other(**changes: Any) -> Call:
    """A right call but for ``changes``."""
    return lambda comm, given: comm.all_reduce(**{**given, **changes})


def zeros(*shape: int, dtype: torch.dtype = BF16, device: str = "cpu") -> torch.Tensor:
    return torch.zeros(*shape, dtype=dtype, device=device)


def misaligned(*shape: int) -> torch.Tensor:
    """Contiguous, and one element past an aligned address."""
    return zeros(math.prod(shape) + 1)[1:].view(shape)


CALLS: dict[str, tuple[Call, type[CollogueError], str, str]] = {
    # Shape
    "partial is no tensor": (other(partial=[1.0]), ShapeError, "partial must be a tensor .* got list", "flatten"),
    "partial of one dimension": (other(partial=zeros(H)), ShapeError, r"got \[64\]", "x.view(-1, H)"),
    "partial of three dimensions": (other(partial=zeros(2, 2, H)), ShapeError, r"got \[2, 2, 64\]", "flatten leading dimensions"),
    "residual of other rows": (other(residual=zeros(T + 1, H)), ShapeError, r"residual has shape \[5, 64\]", "rows of the same tokens"),
    "residual of other width": (other(residual=zeros(T, H - 8)), ShapeError, r"\[4, 56\], partial \[4, 64\]", "same tokens"),
    "residual is no tensor": (other(residual=1.0), ShapeError, "residual must be a tensor", "flatten"),
    "H not a multiple of 8": (
        other(partial=zeros(T, 12), residual=None, norm=None),
        ShapeError,
        "12 is not a positive multiple of 8",
        "pad",
    ),
    "H is 0": (other(partial=zeros(T, 0), residual=None, norm=None), ShapeError, "hidden size 0", "pad"),
    "weight too long": (other(norm=RMSNorm(zeros(H + 8))), ShapeError, "72 elements, the hidden size is 64", "weight of the norm"),
    "weight too short": (other(norm=RMSNorm(zeros(H - 8))), ShapeError, "56 elements", "weight of the norm"),
    "weight of two dimensions": (lambda c, g: RMSNorm(zeros(1, H)), ShapeError, r"shape \[H\]", "weight vector"),
    # Capacity
    "too many tokens": (other(partial=zeros(MAX_TOKENS + 1, H), residual=None), CapacityError, "at most 8 tokens", "comm.fits(tokens)"),
    "too wide": (other(partial=zeros(T, H + 8), residual=None, norm=None), CapacityError, r"\[4, 72\]", "larger max_tokens or hidden_size"),
    # Formats
    "H not a multiple of 16": (
        other(partial=zeros(T, 24), residual=None, norm=None, quant=NVFP4(1.0)),
        FormatError,
        "blocks of 16",
        "multiple of 16",
    ),
    "H not a multiple of 32 (MXFP8)": (
        other(partial=zeros(T, 48), residual=None, norm=None, quant=MXFP8("floor")),
        FormatError,
        "blocks of 32 elements; hidden size 48",
        "multiple of 32",
    ),
    "H not a multiple of 32 (MXFP4)": (
        other(partial=zeros(T, 16), residual=None, norm=None, quant=MXFP4("ceil")),
        FormatError,
        "blocks of 32",
        "multiple of 32",
    ),
    "H not a multiple of the group": (other(quant=FP8Group(128)), FormatError, "blocks of 128", "multiple of 128, or another format"),
    "keep_norm without a norm": (
        other(norm=None, quant=FP8PerToken(), keep_norm=True),
        FormatError,
        "keep_norm=True without",
        "leave keep_norm out",
    ),
    "a format by name": (other(quant="nvfp4"), FormatError, "quant is a str", "collogue.NVFP4(global_scale)"),
    "a weight in the place of the norm": (
        other(norm=zeros(H)),
        ArgumentError,
        "norm: expected collogue.RMSNorm, got torch.Tensor",
        "collogue.RMSNorm(weight",
    ),
    "unknown layout": (lambda c, g: NVFP4(1.0, "64x4"), FormatError, "layout is '64x4'", "'128x4', '8x4', 'linear'"),  # type: ignore[arg-type]
    "unknown rounding": (lambda c, g: MXFP4("even"), FormatError, "rounding is 'even'", "'floor', 'ceil'"),  # type: ignore[arg-type]
    "odd group size": (lambda c, g: FP8Group(24), FormatError, "group_size is 24", "multiple of 16"),
    # Dtype
    "partial in float32": (
        other(partial=zeros(T, H, dtype=torch.float32)),
        DTypeError,
        "partial has dtype torch.float32",
        "one communicator per dtype",
    ),
    "residual in float16": (
        other(residual=zeros(T, H, dtype=torch.float16)),
        DTypeError,
        "residual has dtype torch.float16",
        "convert the tensor",
    ),
    "weight in float16": (
        other(norm=RMSNorm(zeros(H, dtype=torch.float16))),
        DTypeError,
        "RMSNorm.weight has dtype",
        "torch.bfloat16 or torch.float32",
    ),
    "weight in float64": (lambda c, g: RMSNorm(zeros(H, dtype=torch.float64)), DTypeError, "torch.float64", "torch.float32"),
    # Device
    "partial elsewhere": (
        other(partial=zeros(T, H, device="meta")),
        DeviceError,
        "partial is on meta, the communicator on cpu",
        "partial.to('cpu')",
    ),
    "residual elsewhere": (other(residual=zeros(T, H, device="meta")), DeviceError, "residual is on meta", "residual.to('cpu')"),
    "weight elsewhere": (other(norm=RMSNorm(zeros(H, device="meta"))), DeviceError, "RMSNorm.weight is on meta", "move it"),
    "global scale elsewhere": (
        other(quant=NVFP4(torch.ones(1, device="meta"))),
        DeviceError,
        "the scale of NVFP4 is on meta",
        "Python float",
    ),
    "static scale elsewhere": (
        other(quant=FP8Static(torch.ones(1, device="meta"))),
        DeviceError,
        "the scale of FP8Static is on meta",
        "Python float",
    ),
    # Strides and alignment
    "partial transposed": (other(partial=zeros(H, T).t()), LayoutError, r"partial has strides \(1, 4\)", "partial.contiguous()"),
    "partial with gaps between rows": (other(partial=zeros(T, 2 * H)[:, :H]), LayoutError, r"strides \(128, 1\)", "partial.contiguous()"),
    "residual with gaps in rows": (other(residual=zeros(T, 2 * H)[:, ::2]), LayoutError, r"strides \(128, 2\)", "residual.contiguous()"),
    "residual broadcast": (other(residual=zeros(1, H).expand(T, H)), LayoutError, r"strides \(0, 1\)", "residual.contiguous()"),
    "weight with gaps": (other(norm=RMSNorm(zeros(2 * H)[::2])), LayoutError, "RMSNorm.weight has strides", "RMSNorm.weight.contiguous()"),
    "partial not aligned": (other(partial=misaligned(T, H)), LayoutError, "partial starts at .* multiple of 16 bytes", "partial.clone()"),
    "residual not aligned": (other(residual=misaligned(T, H)), LayoutError, "residual starts", "residual.clone()"),
    "weight not aligned": (other(norm=RMSNorm(misaligned(H))), LayoutError, "RMSNorm.weight starts", "RMSNorm.weight.clone()"),
    # Grad
    "partial requires grad": (other(partial=zeros(T, H).requires_grad_()), GradError, "partial requires grad", "torch.inference_mode()"),
    "residual requires grad": (other(residual=zeros(T, H).requires_grad_()), GradError, "residual requires grad", "torch.no_grad()"),
    "weight requires grad": (other(norm=RMSNorm(torch.nn.Parameter(zeros(H)))), GradError, "RMSNorm.weight requires grad", "no_grad"),
    # Numbers of the norm
    "eps is NaN": (lambda c, g: RMSNorm(zeros(H), eps=math.nan), ScaleError, "eps must be a finite number", "Python float"),
    "eps is infinite in float32": (lambda c, g: RMSNorm(zeros(H), eps=1e300), ScaleError, "eps must be a finite number", "Python float"),
    "weight_offset is, too": (lambda c, g: RMSNorm(zeros(H), weight_offset=-1e39), ScaleError, "weight_offset must be a finite", "float"),
    "eps is negative": (lambda c, g: RMSNorm(zeros(H), eps=-1e-6), ScaleError, "eps must not be negative", "1e-5"),
    "offset is a flag": (lambda c, g: RMSNorm(zeros(H), weight_offset=True), ScaleError, "weight_offset must be", "Python float"),
}


@pytest.mark.parametrize("what", CALLS)
def test_wrong_calls_are_refused(what: str) -> None:
    refused(*CALLS[what])


# Scales


def test_a_weight_that_gets_other_memory_is_checked_again() -> None:
    """What was checked once is remembered, but a module may be converted or moved under the same description."""

    def rank(group: VirtualGroup) -> None:
        comm = communicator(group)
        weight = torch.nn.Parameter(zeros(H), requires_grad=False)
        norm = RMSNorm(weight)
        comm.all_reduce(zeros(T, H), norm=norm)
        weight.data = zeros(H, dtype=torch.float16)
        with pytest.raises(DTypeError, match=r"RMSNorm\.weight has dtype torch\.float16"):
            comm.all_reduce(zeros(T, H), norm=norm)

    run_virtual(2, rank)


WRONG_VALUES = [math.nan, math.inf, -math.inf, 0.0, -1.0, 1e-60, 1e60]
WRONG_KINDS = {
    "text": "1.0",
    "nothing": None,
    "flag": True,
    "complex": 1j,
    "float64": torch.ones(1, dtype=torch.float64),
    "integer tensor": torch.ones(1, dtype=torch.int32),
    "two elements": torch.ones(2),
    "no element": torch.ones(0),
}
WITH_SCALE = pytest.mark.parametrize(("kind", "name"), [(NVFP4, "global_scale"), (FP8Static, "scale")])


@WITH_SCALE
@pytest.mark.parametrize("value", WRONG_VALUES)
@pytest.mark.parametrize("as_tensor", [False, True])
def test_scales_that_are_not_positive_and_finite(kind: Any, name: str, value: float, as_tensor: bool) -> None:
    scale = torch.tensor([value], dtype=torch.float32) if as_tensor else value
    refused(
        lambda comm, given: comm.all_reduce(**given, quant=kind(scale)),
        ScaleError,
        f"{kind.name}.{name} must be positive and finite",
        f"help(collogue.{kind.name})",
    )


@WITH_SCALE
@pytest.mark.parametrize("what", WRONG_KINDS)
def test_scales_of_the_wrong_kind(kind: Any, name: str, what: str) -> None:
    scale = WRONG_KINDS[what]
    refused(
        lambda comm, given: comm.all_reduce(**given, quant=kind(scale)),
        ScaleError,
        f"{kind.name}.{name}",
        "Python float or a float32 tensor",
    )


@WITH_SCALE
def test_right_scales_of_every_kind(kind: Any, name: str) -> None:
    def rank(group: VirtualGroup) -> None:
        for scale in (2, 2.0, torch.tensor(2.0), torch.tensor([2.0]), torch.tensor([[2.0]])):
            check_works(communicator(group), quant=kind(scale))

    run_virtual(2, rank)


@pytest.mark.parametrize("smallest", [math.nan, 0.0, -1.0, 2.0, 1e-40, True, torch.tensor(0.5)])
@pytest.mark.parametrize("kind", [FP8PerToken, FP8Group])
def test_smallest_scale_out_of_range(kind: Any, smallest: Any) -> None:
    refused(lambda comm, given: comm.all_reduce(**given, quant=kind(smallest=smallest)), ScaleError, f"{kind.name}.smallest", "")


# Grad mode


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_parameters_are_fine_without_grad_mode(mode: Any) -> None:
    def rank(group: VirtualGroup) -> None:
        comm, given = communicator(group), arguments(group.rank)
        with mode():
            out = comm.all_reduce(given["partial"].clone().requires_grad_(), norm=RMSNorm(torch.nn.Parameter(given["norm"].weight.clone())))
        assert not any(tensor.requires_grad for _, tensor in out.items())

    run_virtual(2, rank)


# Given outputs


def outputs(given: dict[str, Any], **changes: Any) -> Output:
    """Right outputs of a call with residual, norm and FP8Group, but for ``changes``."""
    out = Output(
        residual=zeros(T, H),
        norm=zeros(T, H),
        codes=torch.empty(T, H, dtype=torch.float8_e4m3fn),
        scales=empty_scales(FP8Group(32, layout="column"), T, H, "cpu"),
    )
    for name, value in changes.items():
        setattr(out, name, value(given) if callable(value) else value)
    return out


def into(**changes: Any) -> Call:
    return lambda comm, given: comm.all_reduce(**given, quant=FP8Group(32, layout="column"), keep_norm=True, out=outputs(given, **changes))


F8 = torch.float8_e4m3fn
OUTPUTS: dict[str, tuple[Call, type[CollogueError], str, str]] = {
    "no Output": (lambda c, g: c.all_reduce(**g, out=g["residual"]), ArgumentError, "out is a Tensor", "collogue.Output"),
    "an output that is no tensor": (into(norm=[1]), ShapeError, "out.norm is a list, no tensor", "as a call without out= would"),
    "scales that are no tensor": (into(scales=1.0), ShapeError, "out.scales is a float, no tensor", "as a call without out= would"),
    "one missing": (into(norm=None), ShapeError, r"out holds \['codes', 'residual', 'scales'\]", "exactly those tensors"),
    "one too many": (into(reduced=zeros(T, H)), ShapeError, "this call has the outputs", "exactly those tensors"),
    "too few rows": (into(norm=zeros(T - 1, H)), ShapeError, r"out.norm has shape \[3, 64\]", "as a call without out= would"),
    "codes too wide": (into(codes=torch.empty(T, H + 8, dtype=F8)), ShapeError, "out.codes has shape", "as a call without out= would"),
    "scales in rows": (
        into(scales=torch.zeros(T, 2)),
        ShapeError,
        r"strides \(2, 1\).* with strides \(1, 4\)",
        "as a call without out= would",
    ),
    "norm in float32": (into(norm=zeros(T, H, dtype=torch.float32)), DTypeError, "out.norm has dtype torch.float32", "as a call without"),
    "codes as bytes": (into(codes=torch.empty(T, H, dtype=torch.uint8)), DTypeError, "needed: torch.float8_e4m3fn", "as a call without"),
    "scales in float64": (into(scales=torch.zeros(2, T, dtype=torch.float64).t()), DTypeError, "out.scales has dtype", "as a call without"),
    "norm elsewhere": (into(norm=zeros(T, H, device="meta")), DeviceError, "out.norm is on meta", "out.norm.to('cpu')"),
    "scales elsewhere": (into(scales=torch.zeros(2, T, device="meta").t()), DeviceError, "out.scales is on meta", "out.scales.to('cpu')"),
    "norm transposed": (into(norm=zeros(H, T).t()), LayoutError, "out.norm has strides", "contiguous()"),
    "norm not aligned": (into(norm=misaligned(T, H)), LayoutError, "out.norm starts", "slice at a row"),
    "scales not aligned": (into(scales=torch.zeros(2 * T + 1)[1:].view(2, T).t()), LayoutError, "out.scales starts", "slice at a row"),
    "norm is the partial": (into(norm=lambda g: g["partial"]), OverlapError, "out.norm shares memory with partial", "memory of their own"),
    "norm is the residual": (into(norm=lambda g: g["residual"]), OverlapError, "out.norm shares memory with residual", "in place"),
    "residual is the partial": (into(residual=lambda g: g["partial"]), OverlapError, "out.residual shares memory with partial", "in place"),
    "codes in the partial": (
        into(codes=lambda g: g["partial"].view(F8).view(-1)[: T * H].view(T, H)),
        OverlapError,
        "partial",
        "in place",
    ),
    "scales in the weight": (
        into(scales=lambda g: g["norm"].weight.view(torch.float32)[: 2 * T].view(2, T).t()),
        OverlapError,
        "out.scales shares memory with RMSNorm.weight",
        "in place",
    ),
}


@pytest.mark.parametrize("what", OUTPUTS)
def test_wrong_outputs_are_refused(what: str) -> None:
    refused(*OUTPUTS[what])


def test_right_outputs_are_taken() -> None:
    run_virtual(2, lambda group: into()(communicator(group), arguments(group.rank)))


def test_residual_a_row_further_is_no_update_in_place() -> None:
    def call(comm: collogue.Communicator, given: dict[str, Any]) -> None:
        memory = zeros(T + 1, H)
        comm.all_reduce(given["partial"], residual=memory[:T], out=Output(residual=memory[1:]))

    refused(call, OverlapError, "out.residual shares memory with residual", "in place")


def test_two_outputs_in_one_memory() -> None:
    def call(comm: collogue.Communicator, given: dict[str, Any]) -> None:
        memory = zeros(2 * T, H)
        comm.all_reduce(**given, out=Output(residual=memory[:T], norm=memory[T - 1 : 2 * T - 1]))

    refused(call, OverlapError, "out.norm shares memory with out.residual", "memory of their own")


def test_scale_tensor_is_an_input_too() -> None:
    def call(comm: collogue.Communicator, given: dict[str, Any]) -> None:
        memory = torch.ones(T * H // 4, dtype=torch.float32)
        comm.all_reduce(given["partial"], quant=FP8Static(memory[:1]), out=Output(reduced=zeros(T, H), codes=memory.view(F8).view(T, H)))

    refused(call, OverlapError, "out.codes shares memory with the scale", "in place")


def test_padding_of_given_scales_must_be_theirs() -> None:
    """Three tokens in columns of four: a call writes the fourth row too."""
    quant = FP8Group(32, layout="column")

    def short(comm: collogue.Communicator, given: dict[str, Any]) -> None:
        scales = torch.zeros(7).as_strided((3, 2), (1, 4))
        comm.all_reduce(
            given["partial"][:3], quant=quant, out=Output(reduced=zeros(3, H), codes=torch.empty(3, H, dtype=F8), scales=scales)
        )

    def shared(comm: collogue.Communicator, given: dict[str, Any]) -> None:
        memory = torch.zeros(4 + 3 * H // 2 + 8)
        scales, y = memory[:8].as_strided((3, 2), (1, 4)), memory[4:].view(BF16)[: 3 * H].view(3, H)
        comm.all_reduce(given["partial"][:3], quant=quant, out=Output(reduced=y, codes=torch.empty(3, H, dtype=F8), scales=scales))

    refused(short, LayoutError, "needs 32 bytes with its padding; its storage has 28", "as a call without out= would")
    refused(shared, OverlapError, "out.scales shares memory with out.reduced", "memory of their own")

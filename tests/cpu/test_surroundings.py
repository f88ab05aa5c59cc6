"""What a process may have set or be inside of when it calls: the same bits, or an error of ours before anything is sent."""

from __future__ import annotations

import contextlib
import copy
import pickle
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

import collogue
from collogue import MXFP4, MXFP8, NVFP4, Communicator, FP8Group, FP8PerToken, FP8Static, Output, Quant, RMSNorm
from collogue.errors import ArgumentError, FormatError, LayoutError
from collogue.testing import VirtualGroup, run_virtual
from collogue.testing.compare import compare

T, H, BF16 = 5, 256, torch.bfloat16
QUANTS: list[Quant | None] = [
    None,
    NVFP4(3.0),
    NVFP4(torch.tensor(2.5)),
    MXFP4("floor", "linear"),
    MXFP8("ceil", "8x4"),
    FP8Static(0.5),
    FP8PerToken(),
    FP8Group(32, layout="column"),
    FP8Group(128, "ue8m0"),
]
labels = pytest.mark.parametrize("quant", QUANTS, ids=lambda q: "none" if q is None else q.label)


def inputs(rank: int) -> tuple[torch.Tensor, torch.Tensor, RMSNorm]:
    draw = torch.Generator().manual_seed(rank)
    x, shared = torch.randn(T, H, generator=draw, dtype=torch.float32, device="cpu"), torch.Generator().manual_seed(9)
    residual = torch.randn(T, H, generator=shared, dtype=torch.float32, device="cpu")
    weight = torch.rand(H, generator=shared, dtype=torch.float32, device="cpu")
    return x.to(BF16), residual.to(BF16), RMSNorm(weight, eps=1e-5)


@contextlib.contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


SURROUNDINGS: dict[str, Callable[[], Any]] = {
    "default dtype float64": lambda: default_dtype(torch.float64),
    "default dtype float16": lambda: default_dtype(torch.float16),
    "default device meta": lambda: torch.device("meta"),
    "autocast": lambda: torch.autocast("cpu", dtype=torch.bfloat16),
    "inference mode": torch.inference_mode,
}


@labels
@pytest.mark.parametrize("name", SURROUNDINGS)
def test_the_same_bits(name: str, quant: Quant | None) -> None:
    def rank(group: VirtualGroup) -> None:
        comm, (x, residual, norm) = Communicator(group, max_tokens=8, hidden_size=H), inputs(group.rank)
        expected = comm.all_reduce(x, residual=residual, norm=norm, quant=quant)
        values = {}
        if quant is not None:
            values["quantize"] = collogue.quantize(x, quant)
            values["dequantize"] = collogue.dequantize(*values["quantize"], quant, hidden_size=H)
        group.barrier()  # the default dtype is the process's, and ranks are threads
        if group.rank == 0:
            surrounding = SURROUNDINGS[name]()
            surrounding.__enter__()
        group.barrier()
        try:
            with contextlib.nullcontext() if group.rank == 0 or name.startswith("default dtype") else SURROUNDINGS[name]():
                found = comm.all_reduce(x, residual=residual, norm=norm, quant=quant)
                for difference in compare(found, expected).values():
                    assert not difference.count
                out = comm.empty(T, residual=True, norm=norm, quant=quant)
                comm.all_reduce(x, residual=residual, norm=norm, quant=quant, out=out)
                if quant is not None:
                    codes, scales = collogue.quantize(x, quant)
                    assert torch.equal(codes.view(torch.uint8), values["quantize"][0].view(torch.uint8))
                    again = collogue.dequantize(codes, scales, quant, hidden_size=H)
                    assert torch.equal(again, values["dequantize"])
        finally:
            group.barrier()
            if group.rank == 0:
                surrounding.__exit__(None, None, None)
        for difference in compare(out, expected).values():
            assert not difference.count

    run_virtual(2, rank)


def refused(attempt: Callable[[Communicator, torch.Tensor], Any], error: type[Exception], message: str) -> None:
    """Every rank raises, and nothing has been sent: the next call is right."""

    def rank(group: VirtualGroup) -> None:
        comm, (x, *_) = Communicator(group, max_tokens=8, hidden_size=H), inputs(group.rank)
        if group.rank == 0:
            with pytest.raises(error, match=message) as raised:
                attempt(comm, x)
            assert "hint:" in str(raised.value)
        assert comm.all_reduce(x).reduced is not None

    run_virtual(2, rank)


def test_transforms_are_refused() -> None:
    def vmap(comm: Communicator, x: torch.Tensor) -> None:
        torch.func.vmap(lambda y: comm.all_reduce(y).reduced)(torch.stack([x, x]))

    def jvp(comm: Communicator, x: torch.Tensor) -> None:
        torch.func.jvp(lambda y: comm.all_reduce(y).reduced, (x,), (x,))

    for attempt in (vmap, jvp):
        refused(attempt, ArgumentError, "partial is inside torch.func.vmap, jvp or grad")


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
def test_the_old_tracer_is_refused() -> None:
    refused(lambda comm, x: torch.jit.trace(lambda y: comm.all_reduce(y).reduced, (x,)), ArgumentError, "traced by torch.jit.trace")


def test_forward_mode_is_refused() -> None:
    import torch.autograd.forward_ad as forward_ad

    def attempt(comm: Communicator, x: torch.Tensor) -> None:
        with forward_ad.dual_level():
            comm.all_reduce(forward_ad.make_dual(x, torch.ones_like(x)))  # type: ignore[no-untyped-call]

    refused(attempt, ArgumentError, "partial has a forward-mode tangent")


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors:UserWarning")
def test_tensors_that_are_not_their_memory_are_refused() -> None:
    def distributed(comm: Communicator, x: torch.Tensor) -> None:
        class DTensor(torch.Tensor):
            @staticmethod
            def __new__(cls) -> DTensor:
                return torch.Tensor._make_wrapper_subclass(cls, (T, H), dtype=BF16)  # type: ignore[attr-defined,no-any-return]

            @classmethod
            def __torch_dispatch__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
                raise NotImplementedError

            def to_local(self) -> None: ...

        comm.all_reduce(DTensor())

    refused(distributed, ArgumentError, r"partial is a DTensor(?s:.)*to_local")
    refused(lambda comm, x: comm.all_reduce(torch._neg_view(x)), LayoutError, "lazy negation")
    refused(lambda comm, x: comm.all_reduce(x, residual=torch._neg_view(x)), LayoutError, "residual is a lazy negation")
    weight = torch.ones(H, dtype=torch.float32)
    refused(lambda comm, x: comm.all_reduce(x, norm=RMSNorm(torch._neg_view(weight))), LayoutError, "RMSNorm.weight is a lazy negation")
    refused(lambda comm, x: comm.all_reduce(x.to_sparse()), LayoutError, "sparse")
    refused(lambda comm, x: comm.all_reduce(torch._nested_tensor_from_tensor_list([x, x])), LayoutError, "partial is a nested tensor")
    refused(lambda comm, x: comm.all_reduce(_freed(x)), LayoutError, "partial has no memory: its storage was freed")


def test_tensors_that_are_spread_over_ranks_are_refused_everywhere() -> None:
    class DTensor(torch.Tensor):
        def to_local(self) -> None: ...

    def spread(x: torch.Tensor) -> torch.Tensor:
        return x.as_subclass(DTensor)

    x, weight, scale = torch.ones(T, H, dtype=BF16), torch.ones(H, dtype=BF16), torch.ones(1)
    index = torch.zeros(T, 1, dtype=torch.int32)
    codes, scales = collogue.quantize(x, collogue.FP8PerToken())
    for attempt in (
        lambda: collogue.FP8Static(spread(scale)),
        lambda: collogue.NVFP4(spread(scale)),
        lambda: RMSNorm(spread(weight)),
        lambda: collogue.Calibration().observe("x", spread(x)),
        lambda: collogue.quantize(spread(x), collogue.FP8PerToken()),
        lambda: collogue.dequantize(spread(codes), scales, collogue.FP8PerToken(), hidden_size=H),
        lambda: collogue.dequantize(codes, spread(scales), collogue.FP8PerToken(), hidden_size=H),  # type: ignore[arg-type]
        lambda: collogue.reference.quantize(spread(x), collogue.FP8PerToken()),
        lambda: collogue.reference.rms_norm(spread(x), RMSNorm(weight)),
        lambda: collogue.reference.all_reduce([x, spread(x)]),
        lambda: collogue.ExpertCombine(spread(x), index),
        lambda: collogue.ExpertCombine(x, spread(index)),
        lambda: collogue.ExpertCombine(x, index, spread(torch.ones(T, 1))),
        lambda: collogue.ExpertCombine(x, index, None, spread(x)),
        lambda: collogue.ExpertReduce(spread(x[None]), torch.ones(1, T), x),
        lambda: collogue.Gated(spread(x), x),
        lambda: collogue.nn.QuantizedWeight.of(spread(x), collogue.FP8PerToken()),
    ):
        with pytest.raises(ArgumentError, match=r"is a DTensor, which is spread over ranks(?s:.)*to_local"):
            attempt()


def _freed(x: torch.Tensor) -> torch.Tensor:
    x = x.clone()
    x.untyped_storage().resize_(0)
    return x


def test_inference_tensors_are_no_outputs_outside_of_inference_mode() -> None:
    def attempt(comm: Communicator, x: torch.Tensor) -> None:
        with torch.inference_mode():
            out = comm.empty(T)
        comm.all_reduce(x, out=out)

    refused(attempt, ArgumentError, "out.reduced is an inference tensor")


def test_subclasses_of_formats_are_refused() -> None:
    class Mine(NVFP4):
        """May mean anything."""

    refused(lambda comm, x: comm.all_reduce(x, quant=Mine(1.0)), FormatError, "quant is a Mine")
    refused(lambda comm, x: comm.prepare(4, quant=Mine(1.0)), FormatError, "quant is a Mine")


def test_keep_norm_is_a_flag() -> None:
    refused(lambda comm, x: comm.all_reduce(x, norm=RMSNorm(torch.ones(H)), keep_norm="no"), ArgumentError, "keep_norm is 'no'")


def test_communicators_are_not_copied() -> None:
    for attempt in (copy.copy, copy.deepcopy, pickle.dumps):
        refused(lambda comm, x, attempt=attempt: attempt(comm), ArgumentError, "cannot be copied or pickled")  # type: ignore[misc]


# ---- outputs and communicators as values


def test_outputs_are_pytrees() -> None:
    from torch.utils import _pytree as pytree

    out = Output(residual=torch.ones(2, 8), codes=torch.zeros(2, 4, dtype=torch.uint8))
    leaves, spec = pytree.tree_flatten(out)
    assert [leaf for leaf in leaves if leaf is not None] == [out.residual, out.codes]
    again = pytree.tree_unflatten(leaves, spec)
    assert isinstance(again, Output)
    assert again.residual is out.residual
    assert pytree.tree_map_only(torch.Tensor, len, out) == Output(residual=2, codes=2)  # type: ignore[arg-type]


def test_export_returns_outputs() -> None:
    def rank(group: VirtualGroup) -> None:
        comm, (x, residual, norm) = Communicator(group, max_tokens=8, hidden_size=H), inputs(0)

        class Layer(torch.nn.Module):
            def forward(self, x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor) -> Output:
                return comm.all_reduce(x, residual=residual, norm=RMSNorm(weight), quant=FP8PerToken())

        with torch.no_grad():
            program = torch.export.export(Layer(), (x, residual, norm.weight))
            found, expected = program.module()(x, residual, norm.weight), Layer()(x, residual, norm.weight)
        assert isinstance(found, Output)
        for difference in compare(found, expected).values():
            assert not difference.count

    run_virtual(1, rank)


def test_what_is_printed() -> None:
    def rank(group: VirtualGroup) -> None:
        comm = Communicator(group, max_tokens=8, hidden_size=H)
        name = comm.name
        assert repr(comm) == f"Communicator({name!r}, rank 0 of 1 on cpu, at most 8 x 256 bfloat16)"
        out = comm.all_reduce(torch.ones(2, H, dtype=BF16), quant=FP8PerToken())
        assert repr(out) == "Output(reduced=bfloat16[2, 256], codes=float8_e4m3fn[2, 256], scales=float32[2, 1] on cpu)"
        comm.close()
        assert repr(comm).endswith(", closed)")

    run_virtual(1, rank)
    assert repr(Output()) == "Output()"

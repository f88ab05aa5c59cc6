"""The rewriting of vLLM's graphs, on graphs of stand-in operators: what is fused, what is left and why, and that the numbers stay."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.fx import Graph, GraphModule, Node

from collogue.contract import reference
from collogue.contract.formats import code_spec, scale_storage
from collogue.contract.quant import MXFP8, NVFP4, FP8Group, Quant
from collogue.engines.vllm.quantized import Operators, format_of, scale_form
from collogue.engines.vllm.rewrite import Names, Rewritten, rewrite

_library = torch.library.Library("collogue_test_vllm", "DEF")
_library.define("all_reduce(Tensor tensor, str group_name) -> Tensor")
_library.define("rms_norm(Tensor x, Tensor? weight, float epsilon, int? variance_size=None) -> Tensor")
_library.define("fused_add_rms_norm(Tensor x, Tensor r, Tensor? weight, float epsilon, int? variance_size=None) -> (Tensor, Tensor)")
_library.impl("all_reduce", lambda x, group: x * 2, "CPU")


def _norm(x: torch.Tensor, weight: torch.Tensor, eps: float, part: int | None = None) -> torch.Tensor:
    assert part is None
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps) * weight


_library.impl("rms_norm", _norm, "CPU")
_library.impl("fused_add_rms_norm", lambda x, r, w, eps, part=None: (_norm(x + r, w, eps), x + r), "CPU")
OPS = torch.ops.collogue_test_vllm
REDUCE, NORM, ADD = OPS.all_reduce.default, OPS.rms_norm.default, OPS.fused_add_rms_norm.default
FUSED = torch.library.Library("collogue_vllm", "FRAGMENT")
FUSED.define("all_reduce_norm(Tensor partial, Tensor? residual, Tensor weight, float eps, float offset, str group, int most) -> Tensor[]")


def _fused(
    x: torch.Tensor, r: torch.Tensor | None, w: torch.Tensor, eps: float, offset: float, group: str, most: int
) -> list[torch.Tensor]:
    y = x * 2 if r is None else x * 2 + r
    return [_norm(y, w + offset, eps), y]


FUSED.impl("all_reduce_norm", _fused, "CPU")
_library.define("static(Tensor! result, Tensor input, Tensor scale, int[]? group_shape=None) -> ()")
_library.define("token(Tensor! result, Tensor input, Tensor! scale, Tensor? scale_ub) -> ()")
FP8 = torch.float8_e4m3fn


def _static(result: torch.Tensor, x: torch.Tensor, scale: torch.Tensor, shape: Any = None) -> None:
    result.copy_((x / scale).to(FP8))


def _token(result: torch.Tensor, x: torch.Tensor, scale: torch.Tensor, most: Any = None) -> None:
    scale.copy_(x.abs().amax(-1, keepdim=True) / 448)
    result.copy_((x / scale).to(FP8))


def _formatted(norm: torch.Tensor, quant: Quant) -> tuple[torch.Tensor, torch.Tensor]:
    """The contract's codes and scales, in vLLM's form."""
    codes, scales = reference.quantize(norm, quant)
    assert scales is not None
    form = scale_form(quant, *norm.shape)
    assert form is not None
    return codes, scale_storage(scales).view(form[2]).as_strided(*form[:2])


def _group(x: torch.Tensor, codes: torch.Tensor, scales: torch.Tensor, size: int, eps: float, *rest: Any) -> None:
    column = len(rest) > 3 and rest[3]
    made = _formatted(x, FP8Group(size, "float32", "column" if column else "row", smallest=eps / 448))
    assert (scales.shape, scales.stride()) == (made[1].shape, made[1].stride())
    codes.copy_(made[0])
    scales.copy_(made[1])


def _nvfp4(x: torch.Tensor, scale: torch.Tensor, swizzled: bool, output: torch.Tensor, output_scale: torch.Tensor) -> None:
    codes, scales = _formatted(x, NVFP4(scale, "128x4" if swizzled else "linear"))
    output.copy_(codes)
    output_scale.copy_(scales)


_library.define(
    "group(Tensor input, Tensor! output_q, Tensor! output_s, int group_size, float eps, float fp8_min, float fp8_max, bool scale_ue8m0, "
    "bool dummy_is_scale_transposed=False, bool dummy_is_tma_aligned=False) -> ()"
)
_library.define("nvfp4(Tensor input, Tensor input_scale, bool is_sf_swizzled_layout, *, Tensor! output, Tensor! output_scale) -> ()")
_library.define("mxfp8(Tensor x, bool is_sf_swizzled_layout=False, int alignment=0) -> (Tensor, Tensor)")
_library.impl("group", _group, "CPU")
_library.impl("nvfp4", _nvfp4, "CPU")
_library.impl("mxfp8", lambda x, swizzled=False, to=0: _formatted(x, MXFP8("ceil", "128x4" if swizzled else "linear")), "CPU")
_library.impl("static", _static, "CPU")
_library.impl("token", _token, "CPU")
FUSED.define(
    "all_reduce_norm_quant(Tensor partial, Tensor? residual, Tensor weight, float eps, float offset, str group, int most, str quant, "
    "Tensor? scale, float smallest, bool keep_norm) -> Tensor[]"
)


def _fused_quant(x: torch.Tensor, *rest: Any) -> list[torch.Tensor]:
    norm, y = _fused(x, *rest[:-4])
    label, scale, smallest, keep = rest[-4:]
    kept = [norm] if keep else []
    if label == "fp8_static":
        return [y, (norm / scale).to(FP8), *kept]
    if label == "fp8_per_token":
        scales = norm.abs().amax(-1, keepdim=True) / 448
        return [y, (norm / scales).to(FP8), scales, *kept]
    return [y, *_formatted(norm, format_of(label, scale, smallest)), *kept]


FUSED.impl("all_reduce_norm_quant", _fused_quant, "CPU")
HIGHER = torch.ops.higher_order.auto_functionalized
QUANTS = Operators(OPS.static.default, OPS.token.default, OPS.group.default, OPS.nvfp4.default, OPS.mxfp8.default)
NAMES = Names(REDUCE, NORM, ADD, "tp:0", 64, QUANTS)
WIDTH = 64


class Builder:
    """A graph with x, r (both [3, 64]) and w [64] as inputs, and fake values where the pass looks for them."""

    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        self.graph = Graph()
        self.inputs = [*(torch.randn(*shape, dtype=dtype) for shape in ((3, WIDTH), (3, WIDTH), (WIDTH,))), torch.tensor([0.5])]
        self.x, self.r, self.w, self.s = (self._input(name, value) for name, value in zip("xrws", self.inputs, strict=True))

    def _input(self, name: str, value: torch.Tensor) -> Node:
        node = self.graph.placeholder(name)
        node.meta["val"] = value
        return node

    def call(self, target: Any, *args: Any, like: Node | None = None) -> Node:
        node = self.graph.call_function(target, args)
        node.meta["val"] = (like or self.x).meta["val"]
        return node

    def reduce(self, group: str = "tp:0") -> Node:
        return self.call(REDUCE, self.x, group)

    def add_norm(self, summed: Node, *more: Any, eps: float = 3e-5) -> tuple[Node, Node]:
        both = self.call(ADD, summed, self.r, self.w, eps, *more)
        return self.call(operator.getitem, both, 0), self.call(operator.getitem, both, 1)

    def quant(self, norm: Node, kind: str, **more: Any) -> list[Node]:
        """vLLM's quantization of a norm, as its functionalized graphs have it: the codes, and the scales where it makes them."""
        kind, *options = kind.split("/")
        if kind == "mxfp8":
            given = (True, more.get("alignment", 32)) if "128x4" in options else ()
            both = self.graph.call_function(OPS.mxfp8.default, (norm, *given))
            return [self.call(operator.getitem, both, i) for i in range(2)]
        if kind in ("group", "nvfp4"):
            return self._blocks(norm, kind, options, more)
        result = self.call(torch.ops.aten._to_copy.default, norm)
        result.kwargs = {"dtype": FP8}
        static = kind == "static"
        scale = self.s if static else self.call(torch.ops.aten.sum.dim_IntList, self.x, [1], True)
        given = {"result": result, "input": norm, "scale": scale} | ({"group_shape": None} if static else {"scale_ub": None}) | more
        both = self.graph.call_function(HIGHER, (QUANTS.static_fp8 if static else QUANTS.token_fp8,), given)
        return [self.call(operator.getitem, both, i) for i in ((1,) if static else (1, 2))]

    def _empty(self, shape: tuple[int, ...], strides: tuple[int, ...], dtype: torch.dtype) -> Node:
        node = self.graph.call_function(torch.ops.aten.empty_strided.default, (shape, strides), {"dtype": dtype})
        node.meta["val"] = torch.empty_strided(shape, strides, dtype=dtype)
        return node

    def _blocks(self, norm: Node, kind: str, options: list[str], more: dict[str, Any]) -> list[Node]:
        if kind == "group":
            column = "column" in options
            format: Quant = FP8Group(32, "float32", "column" if column else "row")
            given = {"group_size": 32, "eps": 1e-10, "fp8_min": -448.0, "fp8_max": 448.0, "scale_ue8m0": False}
            given |= {"dummy_is_scale_transposed": column, "dummy_is_tma_aligned": column}
            names, writes = ("output_q", "output_s"), QUANTS.group_fp8
        else:
            swizzled = "128x4" in options
            format = NVFP4(1.0, "128x4" if swizzled else "linear")
            given = {"input_scale": self.s, "is_sf_swizzled_layout": swizzled}
            names, writes = ("output", "output_scale"), QUANTS.nvfp4
        form = scale_form(format, 3, WIDTH)
        assert form is not None
        shape, dtype = code_spec(format, 3, WIDTH)
        buffers = self._empty(shape, (shape[1], 1), dtype), self._empty(*form)
        made = self.graph.call_function(HIGHER, (writes,), {"input": norm, **given, **dict(zip(names, buffers, strict=True)), **more})
        return [self.call(operator.getitem, made, i, like=buffers[i - 1]) for i in (1, 2)]

    def check(self, *outputs: Node, fused: int, why: str = "") -> Rewritten:
        """Rewrite; the graph must give the same numbers."""
        self.graph.output(outputs)
        module = GraphModule(torch.nn.Module(), self.graph)
        before = module(*self.inputs)
        done = rewrite(module.graph, NAMES, lambda rows, weight: rows.ndim == 2 and rows.dtype == weight.dtype)
        module.recompile()
        for a, b in zip(before, module(*self.inputs), strict=True):
            assert (a.dtype, a.shape, a.stride()) == (b.dtype, b.shape, b.stride())
            assert torch.equal(a.view(torch.uint8), b.view(torch.uint8)) if a.element_size() == 1 else torch.equal(a, b)
        assert done.fused == fused, str(done)
        ours = (torch.ops.collogue_vllm.all_reduce_norm.default, torch.ops.collogue_vllm.all_reduce_norm_quant.default)
        assert sum(node.target in ours for node in module.graph.nodes) == fused
        assert sum(node.target is REDUCE for node in module.graph.nodes) == done.of - fused
        assert why in str(done)
        return done


def test_with_a_residual_any_epsilon() -> None:
    b = Builder()
    b.check(*b.add_norm(b.reduce(), eps=9.999999747378752e-06), fused=1)


def test_an_output_that_nobody_reads() -> None:
    b = Builder()
    norm, _ = b.add_norm(b.reduce())
    b.check(norm, fused=1)


def test_without_a_residual_the_sum_goes_on() -> None:
    """The first layer: the norm's input is the stream, which the next layer adds."""
    b = Builder()
    summed = b.reduce()
    norm = b.call(NORM, summed, b.w, 1e-6)
    b.check(norm, b.call(torch.ops.aten.add.Tensor, summed, b.r), summed, fused=1)


def test_two_in_a_row() -> None:
    b = Builder()
    norm, stream = b.add_norm(b.reduce())
    second = b.call(REDUCE, norm, "tp:0")
    both = b.call(ADD, second, stream, b.w, 1e-5)
    done = b.check(b.call(operator.getitem, both, 0), b.call(operator.getitem, both, 1), fused=2)
    assert str(done) == "2 of 2 all-reduces fused with their norm"


def _read_twice(b: Builder) -> list[Node]:
    summed = b.reduce()
    return [*b.add_norm(summed), b.call(torch.ops.aten.relu.default, summed)]


def _late_weight(b: Builder) -> list[Node]:
    summed = b.reduce()
    early = b.call(torch.ops.aten.relu.default, summed)
    weight = b.call(torch.ops.aten.abs.default, b.w, like=b.w)
    return [early, b.call(NORM, summed, weight, 1e-6)]


def _wide_weight(b: Builder) -> list[Node]:
    wide = b.call(torch.ops.aten._to_copy.default, b.w, like=b.w)
    wide.meta["val"] = b.inputs[2].double()
    return [b.call(NORM, b.reduce(), wide, 1e-6)]


def _no_shape(b: Builder) -> list[Node]:
    del b.x.meta["val"]
    summed = b.graph.call_function(REDUCE, (b.x, "tp:0"))
    return [b.graph.call_function(NORM, (summed, b.w, 1e-6))]


def _own_residual(b: Builder) -> list[Node]:
    summed = b.reduce()
    return [b.call(operator.getitem, b.call(ADD, summed, summed, b.w, 1e-6), 0)]


LEFT: dict[str, tuple[Callable[[Builder], list[Node]], str]] = {
    "more than the norm reads it": (_read_twice, "more than the norm reads it"),
    "its own residual": (_own_residual, "more than the norm reads it"),
    "no norm": (lambda b: [b.call(torch.ops.aten.relu.default, b.reduce())], "no RMSNorm reads it"),
    "the weight comes later": (_late_weight, "before the norm's inputs are there"),
    "another dtype of the weight": (_wide_weight, "is not served"),
    "no shape": (_no_shape, "its shape is not known"),
}


@pytest.mark.parametrize("case", LEFT.values(), ids=LEFT.keys())
def test_what_does_not_match_is_left_as_it_is(case: tuple[Callable[[Builder], list[Node]], str]) -> None:
    build, why = case
    b = Builder()
    b.check(*build(b), fused=0, why=why)


def test_a_norm_over_a_part_of_the_row_is_left() -> None:
    b = Builder()
    summed = b.reduce()
    b.graph.output(b.graph.call_function(NORM, (summed, b.w, 1e-6, 4)))
    done = rewrite(b.graph, NAMES, lambda rows, weight: True)
    assert (done.fused, done.of) == (0, 1)
    assert "a part of the row" in str(done)


def test_a_norm_without_weight_is_left() -> None:
    b = Builder()
    b.graph.output(b.graph.call_function(NORM, (b.reduce(), None, 1e-6)))
    assert "no weight" in str(rewrite(b.graph, NAMES, lambda rows, weight: True))


def test_all_reduces_of_another_group_are_not_ours() -> None:
    b = Builder()
    b.graph.output(b.add_norm(b.reduce("ep:0")))
    done = rewrite(b.graph, NAMES, lambda rows, weight: True)
    assert (done.fused, done.of) == (0, 0)


KINDS = ["static", "token", "group", "group/column", "nvfp4", "nvfp4/128x4", "mxfp8", "mxfp8/128x4"]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("first", [False, True])
@pytest.mark.parametrize("kept", [False, True])
def test_quantization_goes_into_the_call(kind: str, first: bool, kept: bool) -> None:
    """Behind a norm with a residual or without one, and where others (a router, say) read the norm too."""
    b = Builder()
    summed = b.reduce()
    norm, stream = (b.call(NORM, summed, b.w, 1e-6), summed) if first else b.add_norm(summed)
    outputs = [*b.quant(norm, kind), stream, *([b.call(torch.ops.aten.relu.default, norm)] if kept else [])]
    done = b.check(*outputs, fused=1)
    assert done.quantized == 1
    assert "1 with quantization" in str(done)


@pytest.mark.parametrize(
    ("kind", "more"),
    [
        ("static", {"group_shape": [1, 4]}),
        ("token", {"scale_ub": "s"}),
        ("static", {"scale": "r"}),
        ("token", {"input": "r"}),
        ("group", {"scale_ue8m0": True}),
        ("group", {"fp8_max": 240.0}),
        ("group", {"dummy_is_scale_transposed": True, "dummy_is_tma_aligned": False}),
        ("group", {"group_size": 8}),
        ("group", {"group_size": 48}),
        ("nvfp4", {"input_scale": "w"}),
        ("nvfp4", {"input": "r"}),
        ("nvfp4", {"output": "r"}),
        ("mxfp8/128x4", {"alignment": 128}),
    ],
)
def test_other_quantizations_stay_behind_the_call(kind: str, more: dict[str, Any]) -> None:
    """Also those that no stand-in computes: what counts is that nothing is taken."""
    b = Builder()
    norm, stream = b.add_norm(b.reduce())
    more = {name: getattr(b, value) if isinstance(value, str) else value for name, value in more.items()}
    b.graph.output((*b.quant(norm, kind, **more), norm, stream))
    done = rewrite(b.graph, NAMES, lambda rows, weight: True)
    assert (done.fused, done.quantized) == (1, 0)


@pytest.mark.parametrize("kind", ["group", "group/column"])
def test_the_lower_bound_of_scales_is_vllms(kind: str) -> None:
    """It is the bound of the largest magnitude over 448: seen where a norm is zero."""
    b = Builder()
    b.inputs[2].zero_()
    norm, stream = b.add_norm(b.reduce())
    assert b.check(*b.quant(norm, kind), stream, fused=1).quantized == 1

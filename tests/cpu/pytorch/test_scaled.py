"""Linear layers of quantized weights: their products, what they take, and both ways of computing them."""

from __future__ import annotations

import logging
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from samples import PAIRS
from torch import nn

import collogue
from collogue.calls.product import ScaledProduct
from collogue.contract.weight import FP8Block, QuantizedWeight, WeightFormat
from collogue.errors import ArgumentError, CollogueError, DeviceError, DTypeError, FormatError, LayoutError, ScaleError, ShapeError
from collogue.gpu import alone
from collogue.nn import RowParallelLinear, ScaledLinear
from collogue.pytorch import products, scaled
from collogue.testing import VirtualGroup, run_virtual

pairs = pytest.mark.parametrize("pair", PAIRS.values(), ids=PAIRS)
TOKENS, IN, OUT = 5, 256, 160


def _layer(
    pair: tuple[WeightFormat, collogue.Quant | None], bias: bool = True, dtype: torch.dtype = torch.float32
) -> tuple[nn.Linear, ScaledLinear]:
    torch.manual_seed(5)
    linear = nn.Linear(IN, OUT, bias=bias, dtype=dtype)
    return linear, ScaledLinear.of(linear, pair[0], activation=pair[1])


def _x(dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(TOKENS, IN, generator=torch.Generator().manual_seed(7)).to(dtype)


def _exact(x: torch.Tensor, layer: ScaledLinear) -> tuple[torch.Tensor, torch.Tensor]:
    """The product of what is stored in float64, and a bound of what a float32 product errs, with its rounding to the result."""
    weight = layer.quantized_weight
    assert weight is not None
    values = x.double()
    if layer.activation is not None:
        codes, scales = collogue.quantize(x, layer.activation)
        values = collogue.dequantize(codes, scales, layer.activation, hidden_size=IN).double()
    matrix = weight.decode().double()
    bias = torch.zeros(OUT) if layer.bias is None else layer.bias
    size = values.abs() @ matrix.abs().t() + bias.abs()
    return values @ matrix.t() + bias.double(), size * (IN + 1) * 2.0**-24


@pairs
@pytest.mark.parametrize("bias", [True, False])
def test_the_product_is_that_of_the_decoded(pair: Any, bias: bool) -> None:
    _, layer = _layer(pair, bias)
    expected, bound = _exact(_x(), layer)
    assert bool(((layer(_x()).double() - expected).abs() <= bound).all())


@pairs
def test_it_is_near_the_plain_layer(pair: Any) -> None:
    linear, layer = _layer(pair)
    plain = linear(_x()).detach()
    assert float((layer(_x()) - plain).norm() / plain.norm()) < (0.3 if "FP4" in type(pair[0]).__name__ else 0.06)


@pairs
def test_an_inverted_scale_is_far_beyond_the_bound(pair: Any) -> None:
    """A multiplier taken for a divisor must not pass."""
    _, layer = _layer(pair)
    expected, bound = _exact(_x(), layer)
    weight = layer.quantized_weight
    assert weight is not None
    if isinstance(weight.format, collogue.FP8Static):
        layer.format = collogue.FP8Static(1.0 / weight.format.scale)
    elif isinstance(weight.format, collogue.NVFP4):
        layer.format = collogue.NVFP4(1.0 / weight.format.global_scale, layout="linear")
    else:
        assert layer.weight_scale is not None
        layer.weight_scale.data = (1.0 / layer.weight_scale.float()).to(layer.weight_scale.dtype)
    error = (layer(_x()).double() - expected).abs()
    assert bool((error > 10 * bound).float().mean() > 0.99)


@pytest.mark.parametrize("name", [name for name in PAIRS if name != "weights only"])
def test_an_output_is_read_and_not_quantized_again(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    _, layer = _layer(PAIRS[name])
    assert layer.activation is not None
    norm = collogue.RMSNorm(torch.ones(IN))
    out = collogue.reference.finish(_x(), norm=norm, quant=layer.activation, keep_norm=True)
    assert out.norm is not None
    expected = layer(out.norm)
    monkeypatch.setattr(scaled, "quantize", None)
    assert torch.equal(layer(out), expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_leading_dimensions_and_dtypes(dtype: torch.dtype) -> None:
    _, layer = _layer(PAIRS["channel"], dtype=dtype)
    x = _x(dtype)
    rows = layer(x)
    assert rows.dtype == dtype
    assert torch.equal(layer(x.view(TOKENS, 1, IN)), rows.view(TOKENS, 1, OUT))
    assert layer(x[:0]).shape == (0, OUT)


@pytest.mark.parametrize(("name", "recipe"), [("tensor", products._tensor_wise), ("channel", products._row_wise)])
@pytest.mark.parametrize("bias", [True, False])
def test_the_hardware_way_gets_its_arguments_right(name: str, recipe: Any, bias: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """PyTorch has these two products on the CPU as well, so their operands can be checked here."""
    _, layer = _layer(PAIRS[name], bias, torch.bfloat16)
    x = _x(torch.bfloat16)
    expected, bound = _exact(x, layer)
    monkeypatch.setattr(scaled, "find_product", lambda *_: recipe)
    monkeypatch.setattr(products, "FEW_ROWS", 0)
    found = layer(x)
    assert found.dtype == torch.bfloat16
    assert bool(((found.double() - expected).abs() <= bound + expected.abs() * 2.0**-8 + 2.0**-8 * float(bias)).all())


@pytest.fixture
def few(monkeypatch: pytest.MonkeyPatch) -> list[torch.dtype]:
    """Per-token products as GPUs have them, scaled by the reference. Returns the dtypes of the products that were scaled."""
    seen: list[torch.dtype] = []

    def scale(given: ScaledProduct) -> torch.Tensor:
        seen.append(given.product.dtype)
        return given.values()

    monkeypatch.setattr(scaled, "find_product", lambda *_: products._row_wise)
    monkeypatch.setattr(alone, "engine_of", lambda device, dtype: SimpleNamespace(one=torch.ones(1), scale=scale))
    return seen


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("bias", [True, False])
def test_few_rows_are_rounded_once(few: list[torch.dtype], bias: bool, dtype: torch.dtype) -> None:
    _, layer = _layer(PAIRS["channel"], bias, dtype)
    x = _x(dtype)
    expected, bound = _exact(x, layer)
    found = layer(x)
    assert found.dtype == dtype
    assert few == [torch.float32]
    assert bool(((found.double() - expected).abs() <= bound + expected.abs() * torch.finfo(dtype).eps / 2 + 2.0**-24).all())


@pytest.mark.parametrize("scales", [torch.ones(1, 1), torch.ones(3), torch.ones(3, 1, dtype=torch.bfloat16), torch.ones(4, 1)])
def test_scales_of_other_rows_are_not_read(few: list[torch.dtype], scales: torch.Tensor) -> None:
    """The kernel would read past the end of them, or take their bits for others."""
    _, layer = _layer(PAIRS["channel"], dtype=torch.bfloat16)
    codes = torch.ones(3, IN).to(torch.float8_e4m3fn)
    with pytest.raises(ShapeError, match="one for each row of the codes"):
        layer(collogue.Output(codes=codes, scales=scales))
    assert not few


def test_which_rows_are_few(few: list[torch.dtype], monkeypatch: pytest.MonkeyPatch) -> None:
    """The constant says it, and what one kernel does: not more."""
    _, layer = _layer(PAIRS["channel"], dtype=torch.bfloat16)
    x = torch.ones(1, IN, dtype=torch.bfloat16)
    for rows, there in ((0, 0), (1, 1), (products.FEW_ROWS, 2), (products.FEW_ROWS + 1, 2)):
        layer(x.expand(rows, IN))
        assert len(few) == there
    assert f"up to {products.FEW_ROWS} rows" in layer.explain()
    monkeypatch.setattr(products, "MAX_HIDDEN_SIZE", OUT - 8)
    layer(x)
    assert len(few) == 2
    assert "rows" not in layer.explain()


def test_a_traced_layer_decides_when_it_runs(few: list[torch.dtype], monkeypatch: pytest.MonkeyPatch) -> None:
    """One operator: no number of rows is written into the graph."""
    _, layer = _layer(PAIRS["channel"], dtype=torch.bfloat16)
    codes = [collogue.quantize(torch.randn(rows, IN).bfloat16(), collogue.FP8PerToken()) for rows in (3, products.FEW_ROWS + 1, 5)]
    outs = [collogue.Output(codes=each, scales=scales) for each, scales in codes]
    eager = [layer(out) for out in outs]
    few.clear()
    call = torch.compile(lambda c, s: layer(collogue.Output(codes=c, scales=s)), backend="aot_eager", fullgraph=True, dynamic=True)
    for out, expected in zip(outs, eager, strict=True):
        assert torch.equal(call(out.codes, out.scales), expected)
    assert len(few) == 2
    given = (*codes[0], layer.weight.data, layer.weight_scale.data, None, torch.bfloat16)  # type: ignore[union-attr]
    checks = ("test_faketensor", "test_aot_dispatch_dynamic")
    torch.library.opcheck(torch.ops.collogue.per_token_product.default, given, test_utils=checks)


def test_which_product_is_used(monkeypatch: pytest.MonkeyPatch) -> None:
    gpu = torch.device("cuda")
    table: dict[tuple[str, tuple[int, int]], bool] = {
        ("tensor", (8, 0)): False,
        ("tensor", (8, 9)): True,
        ("tensor", (10, 0)): True,
        ("channel", (8, 9)): False,
        ("channel", (9, 0)): True,
        ("block", (9, 0)): True,
        ("block", (10, 0)): False,
        ("nvfp4", (9, 0)): False,
        ("weights only", (9, 0)): False,
    }
    for (name, capability), fast in table.items():
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device, found=capability: found)
        weight, activation = PAIRS[name]
        assert callable(products.find_product(activation, weight, gpu)) == fast, (name, capability)
    wrong = collogue.FP8Group(64)
    assert "groups of 128" in str(products.find_product(wrong, FP8Block(128), gpu))


def test_what_is_done_instead_is_said_once(caplog: pytest.LogCaptureFixture) -> None:
    _, layer = _layer(PAIRS["nvfp4"])
    scaled._say_once.cache_clear()
    with caplog.at_level(logging.INFO, "collogue"):
        layer(_x())
        layer(_x())
    assert [record.message for record in caplog.records] == [layer.explain()]
    assert layer.explain() == (
        "weights NVFP4, activations nvfp4/128x4: decoded and multiplied in torch.float32, because a cpu has no such product"
    )


@pairs
@pytest.mark.parametrize("compiled", [False, True])
def test_autocast_changes_nothing(pair: Any, compiled: bool) -> None:
    _, layer = _layer(pair)
    torch.compiler.reset()
    with torch.no_grad():
        expected = layer(_x())
        with torch.autocast("cpu", torch.bfloat16):
            found = (torch.compile(layer, backend="aot_eager", fullgraph=True) if compiled else layer)(_x())
    assert found.dtype == expected.dtype
    assert torch.equal(found, expected)


def test_moving_changes_no_codes() -> None:
    _, layer = _layer(PAIRS["channel"])
    before = layer.quantized_weight
    assert before is not None
    moved = layer.to(torch.bfloat16).half().to("cpu").quantized_weight
    assert moved is not None
    assert torch.equal(moved.codes.view(torch.uint8), before.codes.view(torch.uint8))
    assert torch.equal(moved.scales, before.scales)  # type: ignore[arg-type]
    assert layer.bias is not None
    assert layer.bias.dtype == torch.float16


@pytest.mark.parametrize("fails_at", range(5))
def test_an_error_in_moving_changes_nothing(fails_at: int) -> None:
    """Such as too little memory for one of the tensors."""
    layer = _layer(_numbers("nvfp4", 0.5, 0.02))[1]
    before, expected, calls = dict(layer.state_dict(keep_vars=True)), layer(_x()), iter(range(9))

    def move(tensor: torch.Tensor) -> torch.Tensor:
        if next(calls) == fails_at:
            raise torch.OutOfMemoryError("full")
        return tensor.clone()

    with pytest.raises(torch.OutOfMemoryError):
        layer._apply(move)
    after = layer.state_dict(keep_vars=True)
    assert list(after) == list(before)
    assert all(after[name] is tensor for name, tensor in before.items())
    assert torch.equal(layer(_x()), expected)


def test_to_meta_and_back() -> None:
    """As nn.Linear does: without values, which a state brings."""
    layer = _layer(_numbers("nvfp4", 0.5, 0.02))[1]
    state, expected = {name: tensor.clone() for name, tensor in layer.state_dict().items()}, layer(_x())
    assert all(tensor.is_meta for tensor in layer.to("meta").state_dict().values())
    layer.to_empty(device="cpu")
    assert "NVFP4" in repr(layer)
    layer.load_state_dict(state)
    assert {name: tensor.dtype for name, tensor in layer.state_dict().items()} == {name: each.dtype for name, each in state.items()}
    assert isinstance(layer.weight, nn.Parameter)
    assert torch.equal(layer(_x()), expected)


def test_deep_copies_and_state_dictionaries() -> None:
    import copy

    _, layer = _layer(PAIRS["block"])
    _, other = _layer(PAIRS["block"])
    with torch.no_grad():
        other.weight.view(torch.uint8).zero_()
    other.load_state_dict(layer.state_dict())
    assert torch.equal(other(_x()), layer(_x()))
    assert torch.equal(copy.deepcopy(layer)(_x()), layer(_x()))


@pytest.mark.parametrize(
    ("made", "activation", "text"),
    [
        (collogue.FP8PerToken(), collogue.FP8Static(0.02), r"scales, torch.float32 \[5, 1\]; FP8Static, the layer's activation, has none"),
        (collogue.FP8Static(0.02), collogue.FP8PerToken(), "the output has no scales; FP8PerToken, the layer's activation, has some"),
    ],
)
def test_scales_that_the_activation_format_does_not_have(made: collogue.Quant, activation: collogue.Quant, text: str) -> None:
    layer = ScaledLinear.of(nn.Linear(IN, OUT), collogue.FP8Static(0.005), activation=activation)
    out = collogue.reference.finish(_x(), quant=made)
    with pytest.raises(FormatError, match=text) as caught:
        layer(out)
    assert caught.value.hint


NUMBERS = ("tensor", "nvfp4")


def _numbers(name: str, weight: Any, activation: Any) -> tuple[WeightFormat, collogue.Quant]:
    if name == "tensor":
        return collogue.FP8Static(weight), collogue.FP8Static(activation)
    return collogue.NVFP4(weight, layout="linear"), collogue.NVFP4(activation)


@pytest.mark.parametrize("name", NUMBERS)
@pytest.mark.parametrize("tensors", [False, True])
@pytest.mark.parametrize("assign", [False, True])
def test_the_state_has_the_numbers_of_formats(name: str, tensors: bool, assign: bool) -> None:
    """The weight's come with its codes; a layer made with others gives the same results afterwards."""
    layer = _layer(_numbers(name, 0.005, 0.02))[1]
    state = layer.state_dict()
    assert float(state["weight_factor"]) == torch.tensor(0.005).item()
    assert float(state["input_factor"]) == torch.tensor(0.02).item()
    other = _layer(_numbers(name, torch.tensor([0.25]) if tensors else 0.25, 0.02))[1]
    assert not torch.equal(other(_x()), layer(_x()))
    other.load_state_dict(state, assign=assign)
    assert torch.equal(other(_x()), layer(_x()))
    assert torch.equal(other.quantized_weight.decode(), layer.quantized_weight.decode())  # type: ignore[union-attr]
    assert other.weight_factor is not None
    assert torch.equal(other.weight_factor, layer.weight_factor)  # type: ignore[arg-type]


@pytest.mark.parametrize("name", NUMBERS)
def test_a_state_with_another_number_of_the_input_is_refused(name: str) -> None:
    layer, other = _layer(_numbers(name, 0.005, 0.02))[1], _layer(_numbers(name, 0.005, 0.5))[1]
    before = other(_x())
    with pytest.raises(ScaleError, match=r"inner\.input_factor of the state is \[0\.019.*has 0\.5") as caught:
        nn.ModuleDict({"inner": other}).load_state_dict(nn.ModuleDict({"inner": layer}).state_dict())
    assert caught.value.hint
    assert torch.equal(other(_x()), before)
    missing = {name: value for name, value in layer.state_dict().items() if name != "weight_factor"}
    with pytest.raises(RuntimeError, match="weight_factor"):
        layer.load_state_dict(missing)


@pytest.mark.parametrize("name", NUMBERS)
def test_a_layer_that_was_made_on_meta_takes_a_state(name: str) -> None:
    """Its input's number is known there too: the activation holds it."""
    layer = _layer(_numbers(name, 0.005, 0.02))[1]
    for activation in (0.02, 0.9):
        other = _layer(_numbers(name, 0.5, activation))[1].to("meta")
        if activation == 0.02:
            other.load_state_dict(layer.state_dict(), assign=True)
            assert torch.equal(other(_x()), layer(_x()))
        else:
            with pytest.raises(ScaleError, match=r"input_factor of the state is \[\[?0\.019.*has 0\.9"):
                other.load_state_dict(layer.state_dict(), assign=True)
            assert other.weight.is_meta


@pytest.mark.parametrize(
    ("name", "key", "change", "error"),
    [
        ("channel", "weight_scale", lambda scales: -scales, ScaleError),
        ("block", "weight_scale", lambda scales: scales * torch.nan, ScaleError),
        ("mxfp8", "weight_scale", lambda scales: torch.full_like(scales.view(torch.uint8), 0xFF).view(scales.dtype), ScaleError),
        ("tensor", "weight_factor", lambda factor: factor * torch.inf, ScaleError),
        ("tensor", "weight_factor", lambda factor: factor * 0, ScaleError),
        ("tensor", "weight_factor", lambda factor: factor.flatten(), ShapeError),
        ("channel", "weight", lambda codes: codes.float(), DTypeError),
        ("mxfp8", "weight_scale", lambda scales: scales.float(), DTypeError),
        ("mxfp4", "weight_scale", lambda scales: scales.view(torch.uint8), DTypeError),
        ("channel", "weight", lambda codes: codes[1:], ShapeError),
    ],
)
@pytest.mark.parametrize("assign", [False, True])
def test_a_state_that_is_none_of_the_layer_changes_nothing(name: str, key: str, change: Any, error: Any, assign: bool) -> None:
    layer = nn.ModuleDict({"inner": _layer(PAIRS[name])[1]})
    expected = layer["inner"](_x())
    state: dict[str, Any] = dict(layer.state_dict())
    state[f"inner.{key}"] = change(state[f"inner.{key}"])
    with pytest.raises(error, match=rf"inner\.{key} of the state") as caught:
        layer.load_state_dict(state, assign=assign)
    assert caught.value.hint
    assert torch.equal(layer["inner"](_x()), expected)


@pytest.mark.parametrize("name", ["channel", "block", "mxfp8", "mxfp4", "weights only"])
def test_a_state_without_such_numbers_is_codes_and_scales(name: str) -> None:
    assert sorted(_layer(PAIRS[name], bias=False)[1].state_dict()) == ["weight", "weight_scale"]
    assert sorted(scaled.Linear(torch.ones(8, 16), None, collogue.FP8Static(1.0)).state_dict()) == ["weight"]


@pairs
def test_a_layer_that_decodes_is_compiled_without_a_break(pair: Any) -> None:
    _, layer = _layer(pair)
    torch.compiler.reset()  # each format is a graph of its own, and PyTorch has a limit
    with torch.no_grad():
        expected = layer(_x())
        found = torch.compile(layer, backend="aot_eager", fullgraph=True)(_x())
    assert torch.equal(found, expected)


@pairs
def test_a_layer_that_decodes_is_exported(pair: Any) -> None:
    _, layer = _layer(pair)
    assert torch.equal(torch.export.export(layer, (_x(),)).module()(_x()), layer(_x()))


def test_how_plain_weights_are_multiplied_is_what_is_said() -> None:
    weight = torch.randn(OUT, IN, generator=torch.Generator().manual_seed(1)).bfloat16()
    layer, quant = scaled.Linear(weight, None, collogue.FP8PerToken()), collogue.FP8PerToken()
    assert scaled.Linear(weight, None).explain() == "plain product in torch.bfloat16"
    assert layer.explain() == "activations quantized to fp8_per_token and decoded, weights torch.bfloat16: multiplied in torch.float32"
    values = collogue.dequantize(*collogue.quantize(_x(), quant), quant, hidden_size=IN)
    assert torch.equal(layer.product(_x(), None), torch.nn.functional.linear(values, weight.float()))


def test_wrong_uses_are_named_errors() -> None:
    _, plain = _layer(PAIRS["weights only"])
    _, layer = _layer(PAIRS["channel"])
    norm = collogue.RMSNorm(torch.ones(IN))
    bare = collogue.reference.finish(_x(), norm=norm)
    other = collogue.reference.finish(_x(), norm=norm, quant=collogue.MXFP4("ceil"))
    codes, scales = collogue.quantize(_x(), collogue.FP8PerToken())
    cases: list[tuple[type[CollogueError], Any]] = [
        (ArgumentError, lambda: layer(bare)),
        (ArgumentError, lambda: plain(other)),
        (ShapeError, lambda: layer(other)),
        (ShapeError, lambda: plain(_x()[:, :64])),
        (ShapeError, lambda: layer(_x()[:, :64])),
        (DTypeError, lambda: plain(other.codes)),
        *((ShapeError, lambda each=each, x=x: each(x)) for each in (plain, layer) for x in (None, [[1.0]], torch.ones(()))),
        (DTypeError, lambda: plain(collogue.quantize(_x(), collogue.FP8PerToken())[0])),
        (DTypeError, lambda: plain(_x().double())),
        (DTypeError, lambda: layer(collogue.quantize(_x(), collogue.FP8PerToken())[0])),
        *((LayoutError, lambda each=each: each(_x().to_sparse())) for each in (plain, layer)),
        *((DeviceError, lambda each=each: each(_x().to("meta"))) for each in (plain, layer)),
        (DeviceError, lambda: layer(collogue.Output(codes=codes.to("meta"), scales=scales))),
        (DeviceError, lambda: layer(collogue.Output(codes=codes, scales=scales.to("meta")))),  # type: ignore[union-attr]
        *((DTypeError, lambda dtype=dtype: ScaledLinear(layer.quantized_weight, dtype=dtype)) for dtype in (torch.int32, torch.float64)),
        (ArgumentError, lambda: ScaledLinear(None)),  # type: ignore[arg-type]
        (ArgumentError, lambda: ScaledLinear(torch.ones(()))),  # type: ignore[arg-type]
        (ArgumentError, lambda: ScaledLinear(torch.ones(8, 16))),  # type: ignore[arg-type]
        (ShapeError, lambda: scaled.Linear(torch.ones(()), None)),
        (ShapeError, lambda: scaled.Linear(None, None)),  # type: ignore[arg-type]
        (ShapeError, lambda: ScaledLinear(plain.quantized_weight, torch.ones(OUT + 1))),  # type: ignore[arg-type]
        (ShapeError, lambda: ScaledLinear(plain.quantized_weight, [0.0] * OUT)),  # type: ignore[arg-type]
        (FormatError, lambda: ScaledLinear(plain.quantized_weight, activation="fp8")),  # type: ignore[arg-type]
        (FormatError, lambda: ScaledLinear(plain.quantized_weight, activation=collogue.FP8PerToken)),  # type: ignore[arg-type]
        (FormatError, lambda: ScaledLinear(plain.quantized_weight, activation=FP8Block(32))),  # type: ignore[arg-type]
        (FormatError, lambda: ScaledLinear.of(nn.Linear(32, 8), "fp8")),  # type: ignore[arg-type]
        (FormatError, lambda: ScaledLinear.of(nn.Linear(32, 8), None)),  # type: ignore[arg-type]
        (ArgumentError, lambda: ScaledLinear.of(torch.ones(8, 32), collogue.FP8PerToken())),  # type: ignore[arg-type]
        (FormatError, lambda: ScaledLinear.of(nn.Linear(24, 8), collogue.FP8PerToken(), activation=collogue.FP8Group(128))),
        (FormatError, lambda: ScaledLinear.of(nn.Linear(24, 8), collogue.MXFP8("ceil", layout="linear"))),
    ]
    for error, call in cases:
        with pytest.raises(error) as caught:
            call()
        assert caught.value.hint


def test_only_plain_layers_are_quantized() -> None:
    """Code of a subclass, of a hook or of an instance would be lost."""

    class Scaled(nn.Linear):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return super().forward(x) * 2

    hooked, patched = nn.Linear(IN, OUT), nn.Linear(IN, OUT)
    hooked.register_forward_hook(lambda _, __, y: y * 2)
    patched.forward = lambda x: x  # type: ignore[method-assign]
    for linear, text in ((Scaled(IN, OUT), "Scaled, not a plain"), (hooked, "a forward hook"), (patched, "a forward of its own")):
        with pytest.raises(ArgumentError, match=text) as caught:
            ScaledLinear.of(linear, collogue.FP8PerToken())
        assert caught.value.hint
    assert ScaledLinear.of(nn.Linear(IN, OUT, device="meta"), collogue.FP8PerToken()).weight.is_meta


def test_a_tensor_that_is_plain_goes_into_the_parallel_layers_as_before() -> None:
    linear = nn.Linear(IN, OUT)
    weight = QuantizedWeight.of(linear.weight, collogue.FP8PerToken())
    assert isinstance(weight.codes, torch.Tensor)
    layer = scaled.Linear(linear.weight.detach(), None)
    assert torch.equal(layer.product(_x(), None), torch.nn.functional.linear(_x(), linear.weight))


def test_parallel_layers_quantize_by_the_communicators_kernel_on_gpus() -> None:
    """Where rows fit: of its dtype, and no more than it was made for."""
    quant = collogue.FP8PerToken()

    def rank(group: VirtualGroup) -> None:
        with collogue.Communicator(group, max_tokens=TOKENS, hidden_size=64, dtype=torch.float32) as comm:
            layer = RowParallelLinear.of(nn.Linear(IN, OUT), comm, activation=quant)
            calls: list[tuple[int, ...]] = []
            finish = comm.finish
            comm.finish = lambda y, **named: calls.append(tuple(y.shape)) or finish(y, **named)  # type: ignore[assignment, method-assign]
            for rows in (_x(), _x().bfloat16(), torch.cat((_x(), _x()))):
                on_gpu: Any = SimpleNamespace(is_cuda=True, dtype=rows.dtype, shape=rows.shape, contiguous=lambda rows=rows: rows)
                if rows is not None and (rows.dtype, len(rows)) == (torch.float32, TOKENS):
                    codes, scales = layer.quantized(on_gpu, quant)
                    expected = collogue.quantize(rows, quant)
                    assert torch.equal(codes.view(torch.uint8), expected[0].view(torch.uint8))
                    assert scales is not None
                    assert torch.equal(scales, expected[1])  # type: ignore[arg-type]
                else:
                    with pytest.raises(ShapeError):  # collogue.quantize, which this stand-in is no tensor for
                        layer.quantized(on_gpu, quant)
            assert calls == [(TOKENS, IN)]
            layer.quantized(_x(), quant)
            assert len(calls) == 1

    run_virtual(1, rank)


@pytest.mark.parametrize("layout", ["row", "column"])
@pytest.mark.parametrize("tokens", [1, 3, 4, 8])
def test_blocks_in_fours(tokens: int, layout: Any) -> None:
    """What Hopper's product takes: rows in fours, scales column by column."""
    x = torch.randn(tokens, IN, generator=torch.Generator().manual_seed(7)).bfloat16()
    codes, scales = collogue.quantize(x, collogue.FP8Group(128, layout=layout))
    assert scales is not None
    padded, by_columns = products._in_fours(codes, scales)
    rows = -(-tokens // 4) * 4
    assert (padded.shape, by_columns.shape, by_columns.stride()) == ((rows, IN), (rows, IN // 128), (1, rows))
    assert torch.equal(padded[:tokens].view(torch.uint8), codes.view(torch.uint8))
    assert torch.equal(by_columns[:tokens], scales)
    assert (by_columns.data_ptr() == scales.data_ptr()) == (layout == "column")
    assert (padded.data_ptr() == codes.data_ptr()) == (tokens % 4 == 0)

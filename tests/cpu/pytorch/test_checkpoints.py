"""Quantized layers as libraries make them: what is read of them decodes as the library itself decodes it."""

from __future__ import annotations

import dataclasses
import re
from typing import Any

import pytest
import torch
from torch import nn

import collogue
from collogue.contract.weight import FP8Block, QuantizedWeight
from collogue.errors import ArgumentError, CollogueError, ScaleError, ShapeError
from collogue.pytorch import checkpoints
from collogue.pytorch.checkpoints import QuantizedLinear, read, shared_input

IN, OUT = 256, 128


def _linear() -> nn.Linear:
    torch.manual_seed(11)
    return nn.Linear(IN, OUT, bias=False)


def compressed(preset: str) -> tuple[nn.Linear, torch.Tensor]:
    """A layer that compressed-tensors has quantized and compressed, and the weight that it decompresses."""
    quantization = pytest.importorskip("compressed_tensors.quantization")
    compressors = pytest.importorskip("compressed_tensors.compressors")
    model = nn.Sequential(_linear())
    config = quantization.QuantizationConfig(config_groups={preset: ["Linear"]})
    quantization.apply_quantization_config(model, config, show_progress=False)
    linear: Any = model[0]
    with torch.no_grad():
        for name, tensor in linear.named_parameters():
            if name == "weight_global_scale":
                tensor.fill_(448 * 6 / linear.weight.abs().max())
            elif name == "input_global_scale":
                tensor.fill_(700.0)
            elif name == "input_scale":
                tensor.fill_(0.03)
        scale = linear.weight_scale
        blocks = (
            linear.weight.view(scale.shape[0], OUT // scale.shape[0], -1, IN // scale.shape[-1])
            if scale.ndim == 2
            else linear.weight[None, None]
        )
        amax = blocks.abs().amax((1, 3)) if scale.ndim == 2 else linear.weight.abs().max()
        if preset.startswith("NVFP4"):
            scale.copy_((amax / 6 * linear.weight_global_scale).to(torch.float8_e4m3fn).float())
        elif preset.startswith("MX"):
            scale.copy_(2.0 ** torch.floor(torch.log2(amax)) / (4 if "FP4" in preset else 256))
        else:
            scale.copy_(amax / 448)
    compressors.compress_module(linear)
    import copy

    whole = copy.deepcopy(linear)
    compressors.decompress_module(whole)
    return linear, whole.weight.detach()


EXPECTED: dict[str, tuple[type, str]] = {
    "FP8": (collogue.FP8Static, "fp8_static"),
    "FP8_DYNAMIC": (collogue.FP8PerToken, "fp8_per_token"),
    "FP8_BLOCK": (FP8Block, "fp8_group128/float32/column"),
    "NVFP4": (collogue.NVFP4, "nvfp4/128x4"),
    "NVFP4A16": (collogue.NVFP4, "none"),
    "MXFP8": (collogue.MXFP8, "mxfp8/ceil/128x4"),
    "MXFP4": (collogue.MXFP4, "mxfp4/floor/128x4"),
}


@pytest.mark.parametrize("preset", EXPECTED)
def test_compressed_tensors(preset: str) -> None:
    linear, decompressed = compressed(preset)
    assert checkpoints.is_quantized(linear)
    found = read(linear, "q_proj", "compressed-tensors")
    kind, label = EXPECTED[preset]
    assert isinstance(found.weight.format, kind)
    assert (found.activation.label if found.activation is not None else "none") == label
    assert found.weight.shape == (OUT, IN)
    # Of NVFP4 the library rounds the scale's quotient and the product to bfloat16.
    rtol = 2.0**-20 if decompressed.dtype == torch.float32 else 2.0**-7
    assert torch.allclose(found.weight.decode(), decompressed.float(), rtol=rtol, atol=0.0)
    if isinstance(found.activation, collogue.FP8Static):
        assert found.activation.scale == pytest.approx(0.03)
    if isinstance(found.activation, collogue.NVFP4):
        assert found.activation.global_scale == 700.0


@pytest.mark.parametrize("preset", ["W8A8", "MXFP4XFP8", "INT8"])
def test_schemes_that_are_not_known_are_named(preset: str) -> None:
    try:
        linear, _ = compressed(preset)
    except (ValueError, KeyError, RuntimeError) as error:
        pytest.skip(f"compressed-tensors makes no such layer here: {error}")
    if preset == "MXFP4XFP8":
        found = read(linear, "q_proj", "compressed-tensors")
        assert isinstance(found.weight.format, collogue.MXFP4)
        assert isinstance(found.activation, collogue.FP8Group)
        return
    with pytest.raises(ArgumentError, match=r"q_proj: .*(int8|8-bit int)") as caught:
        read(linear, "q_proj", "compressed-tensors")
    assert caught.value.hint


def _layer(**tensors: torch.Tensor) -> nn.Module:
    """A layer of the published layout: its tensors by name."""
    module = nn.Module()
    for name, tensor in tensors.items():
        module.register_parameter(name, nn.Parameter(tensor, False))
    return module


def test_fine_grained_fp8_of_transformers() -> None:
    fp8 = pytest.importorskip("transformers.integrations.finegrained_fp8")
    linear = fp8.FP8Linear(IN, OUT, block_size=(128, 128))
    weight = QuantizedWeight.of(_linear().weight, FP8Block(128))
    linear.weight.data, linear.weight_scale_inv.data = weight.codes, weight.scales
    found = read(linear, "q_proj", "fp8")
    assert torch.equal(found.weight.decode(), weight.decode())
    assert found.activation is not None
    assert found.activation.label == "fp8_group128/float32/column"


def test_fine_grained_fp8_with_one_scale() -> None:
    fp8 = pytest.importorskip("transformers.integrations.finegrained_fp8")
    weight = QuantizedWeight.of(_linear().weight, collogue.FP8Static(0.001))
    dynamic = fp8.FP8Linear(IN, OUT, block_size=None)
    dynamic.weight.data, dynamic.weight_scale_inv.data = weight.codes, torch.tensor(0.001)
    found = read(dynamic, "q_proj", "fp8")
    assert isinstance(found.activation, collogue.FP8PerToken)
    assert torch.equal(found.weight.decode(), weight.decode())
    static = fp8.FP8Linear(IN, OUT, block_size=None, activation_scheme="static")
    static.weight.data, static.weight_scale_inv.data, static.activation_scale.data = weight.codes, torch.tensor(0.001), torch.tensor(0.25)
    found = read(static, "q_proj", "fp8")
    assert isinstance(found.activation, collogue.FP8Static)
    assert found.activation.scale == 0.25


def test_fine_grained_fp8_with_power_of_two_scales() -> None:
    scales = torch.full((1, 2), 120, dtype=torch.uint8)
    codes = QuantizedWeight.of(_linear().weight, collogue.FP8Static(0.01)).codes
    for given in (scales, scales.view(torch.float8_e8m0fnu)):
        found = read(_layer(weight=codes, weight_scale_inv=given), "q_proj", "fp8")
        assert torch.equal(found.weight.decode(), codes.float() * 2.0 ** (120 - 127))
        assert found.activation is not None
        assert found.activation.label == "fp8_group128/ue8m0/row"


def test_modelopt_fp8() -> None:
    weight = QuantizedWeight.of(_linear().weight, collogue.FP8Static(0.001))
    found = read(_layer(weight=weight.codes, weight_scale=torch.tensor(0.001), input_scale=torch.tensor(0.5)), "q_proj", "modelopt")
    assert torch.equal(found.weight.decode(), weight.decode())
    assert isinstance(found.activation, collogue.FP8Static)
    assert found.activation.scale == 0.5


def test_modelopt_nvfp4_global_scales_are_divisors() -> None:
    weight = QuantizedWeight.of(_linear().weight, collogue.NVFP4(1024.0, "linear"))
    assert weight.scales is not None
    layer = _layer(
        weight=weight.codes, weight_scale=weight.scales, weight_scale_2=torch.tensor(1 / 1024), input_scale=torch.tensor(1 / 512)
    )
    found = read(layer, "q_proj", "modelopt")
    assert torch.equal(found.weight.decode(), weight.decode())
    assert isinstance(found.activation, collogue.NVFP4)
    assert found.activation.global_scale == 512.0


_CODES = torch.zeros(OUT, IN, dtype=torch.float8_e4m3fn)
_BYTES = torch.ones(OUT, IN // 32, dtype=torch.uint8)
_NVFP4 = {
    "weight": torch.zeros(OUT, IN // 2, dtype=torch.uint8),
    "weight_scale": torch.ones(OUT, IN // 16).to(torch.float8_e4m3fn),
    "weight_scale_2": torch.tensor(1.0),
}


@pytest.mark.parametrize(
    ("method", "tensors", "error", "match"),
    [
        ("gptq", {"weight": _CODES}, ArgumentError, "layer: quantization method 'gptq' is not known"),
        ("fp8", {"weight": _CODES}, ArgumentError, r"layer has weight, but no weight_scale_inv\n"),
        ("fp8", {"weight": _CODES, "weight_scale_inv": torch.zeros(1, 2)}, ScaleError, "layer: .*not positive"),
        ("fp8", {"weight": _CODES, "weight_scale_inv": torch.ones(3, 2)}, CollogueError, r"layer: .*\(3, 2\)"),
        ("fp8", {"weight": _CODES, "weight_scale_inv": torch.tensor(-1.0)}, ScaleError, "layer: .*positive"),
        (
            "modelopt",
            {"weight": _CODES, "weight_scale": torch.tensor(1.0), "input_scale": torch.tensor(0.0)},
            ScaleError,
            "layer: .*positive",
        ),
        (
            "modelopt",
            {"weight": torch.zeros(OUT, IN // 2, dtype=torch.uint8), "weight_scale": torch.ones(OUT, IN // 16).to(torch.float8_e4m3fn)},
            ArgumentError,
            "layer: there is no weight_scale_2",
        ),
        ("fp8", {"bias": torch.zeros(OUT)}, ArgumentError, "layer has bias, but no weight and no weight_scale_inv"),
        (
            "modelopt",
            {"weight": _CODES, "weight_scale": torch.tensor(1.0)},
            ArgumentError,
            "layer: .*static scale, but there is no input_scale",
        ),
        (
            "modelopt",
            {"weight": _CODES, "weight_scale": torch.tensor(1.0), "input_scale": torch.ones(2)},
            ScaleError,
            "layer: input_scale has 2 elements",
        ),
        ("modelopt", _NVFP4 | {"input_scale": torch.ones(0)}, ScaleError, "layer: input_scale has 0 elements"),
        ("modelopt", _NVFP4 | {"weight_scale_2": torch.ones(2)}, ScaleError, "layer: weight_scale_2 has 2 elements"),
        ("modelopt", _NVFP4 | {"input_scale": torch.tensor(0.0)}, ScaleError, r"layer: input_scale must be positive and finite, got 0\.0"),
        ("modelopt", _NVFP4 | {"weight_scale_2": torch.tensor(0.0)}, ScaleError, r"layer: weight_scale_2 must .*, got 0\.0"),
        ("modelopt", _NVFP4 | {"weight_scale_2": torch.tensor(1e-40)}, ScaleError, "layer: weight_scale_2 is .*, whose inverse is inf"),
        (
            "modelopt",
            _NVFP4 | {"weight_scale": torch.ones(OUT, IN // 16, dtype=torch.uint8)},
            ArgumentError,
            "layer: weight_scale is torch.uint8 beside weight_scale_2: NVFP4's",
        ),
        (
            "modelopt",
            _NVFP4 | {"weight_scale": torch.ones(OUT, IN // 16)},
            ArgumentError,
            r"torch.uint8 with scales of torch.float32 \[128, 16\]",
        ),
        ("fp8", {"weight": _CODES, "weight_scale_inv": torch.tensor(0xFF, dtype=torch.uint8)}, ScaleError, "layer: "),
        (
            "fp8",
            {"weight": _NVFP4["weight"], "weight_scale_inv": _BYTES},
            ArgumentError,
            "layer: .*MXFP4",
        ),
        ("compressed-tensors", {"weight": _CODES, "weight_scale": torch.tensor(1.0)}, ArgumentError, "there is no quantization_scheme"),
        ("modelopt", {"weight": torch.zeros(OUT, IN, dtype=torch.int8), "weight_scale": torch.ones(OUT, 1)}, ArgumentError, "torch.int8"),
        (
            "modelopt",
            {"weight": _CODES, "weight_scale": torch.tensor(1.0), "pre_quant_scale": torch.ones(IN)},
            ArgumentError,
            "layer also has pre_quant_scale",
        ),
    ],
)
def test_bad_layers_are_named_errors(method: str, tensors: dict[str, torch.Tensor], error: type[CollogueError], match: str) -> None:
    with pytest.raises(error, match=match) as caught:
        read(_layer(**tensors), "layer", method)
    assert caught.value.hint


# What the checkpoint says of inputs


def _static() -> dict[str, torch.Tensor]:
    return {"weight": _CODES, "weight_scale": torch.tensor(1.0), "input_scale": torch.tensor(0.5)}


@pytest.mark.parametrize(
    ("algorithm", "tensors", "expected"),
    [
        ("FP8", _static(), "fp8_static"),
        (None, _static(), "fp8_static"),
        ("FP8_PER_CHANNEL_PER_TOKEN", {"weight": _CODES, "weight_scale": torch.ones(OUT)}, "fp8_per_token"),
        ("FP8_PB_WO", {"weight": _CODES, "weight_scale": torch.ones(1, 2)}, "none"),
        (None, {"weight": _CODES, "weight_scale": torch.ones(1, 2)}, "none"),
        ("FP8_PB_WO", {"weight": _CODES, "weight_scale": torch.ones(1, 1, 2, 1)}, "none"),
        ("NVFP4", _NVFP4 | {"input_scale": torch.tensor(1.0)}, "nvfp4/128x4"),
        (None, _NVFP4, "none"),
        ("MXFP8", {"weight": _CODES, "weight_scale": torch.ones(OUT, IN // 32, dtype=torch.uint8)}, "mxfp8/ceil/128x4"),
    ],
)
def test_modelopts_algorithms(algorithm: str | None, tensors: dict[str, torch.Tensor], expected: str) -> None:
    activation = read(_layer(**tensors), "layer", "modelopt", algorithm).activation
    assert ("none" if activation is None else activation.label) == expected


@pytest.mark.parametrize(
    ("algorithm", "tensors", "match"),
    [
        ("W4A8_AWQ", _static(), "quant_algo 'W4A8_AWQ' is not known"),
        ("NVFP4", _static(), "quant_algo 'NVFP4' has weights of FP8Static"),
        ("FP8", {"weight": _CODES, "weight_scale": torch.tensor(1.0)}, "no input_scale"),
        ("NVFP4", _NVFP4, "no input_scale"),
        ("FP8_PER_CHANNEL_PER_TOKEN", {"weight": _CODES, "weight_scale": torch.ones(6, 3)}, r"scales \[6, 3\], expected \[128, 1\]"),
        ("FP8_PER_CHANNEL_PER_TOKEN", {"weight": _CODES, "weight_scale": torch.ones(64)}, r"scales \[64\], expected \[128, 1\]"),
        ("MXFP8", {"weight": _CODES, "weight_scale": _BYTES[:, :4]}, r"scales \[128, 4\], expected \[128, 8\]"),
    ],
)
def test_algorithms_that_do_not_fit(algorithm: str, tensors: dict[str, torch.Tensor], match: str) -> None:
    with pytest.raises((ArgumentError, ShapeError), match=f"layer: .*{match}") as caught:
        read(_layer(**tensors), "layer", "modelopt", algorithm)
    assert caught.value.hint


def test_the_algorithm_of_a_layer() -> None:
    class Config:
        quantization_config: Any = None

    config = Config()
    assert checkpoints.algorithm_of(config, "a") is None
    config.quantization_config = {"quant_algo": "FP8"}
    assert checkpoints.algorithm_of(config, "a") == "FP8"
    config.quantization_config = {"quant_algo": "MIXED_PRECISION", "quantized_layers": {"a": {"quant_algo": "NVFP4"}}}
    assert checkpoints.algorithm_of(config, "a") == "NVFP4"
    with pytest.raises(ArgumentError, match=r"b: .*quantized_layers does not have it, but its weight is codes"):
        checkpoints.algorithm_of(config, "b")
    config.quantization_config = {"quant_algo": "MIXED_PRECISION"}
    with pytest.raises(ArgumentError, match=r"a: .*'MIXED_PRECISION', but the configuration has no quantized_layers"):
        checkpoints.algorithm_of(config, "a")


def test_scales_of_a_cache_are_not_used() -> None:
    found = read(_layer(**_static(), k_scale=torch.tensor(3.0), v_scale=torch.tensor(3.0)), "layer", "modelopt")
    assert found.label == read(_layer(**_static()), "layer", "modelopt").label


def test_fine_grained_blocks_with_a_static_input() -> None:
    fp8 = pytest.importorskip("transformers.integrations.finegrained_fp8")
    linear = fp8.FP8Linear(IN, OUT, (128, 128), "static")
    linear.weight.data, linear.weight_scale_inv.data, linear.activation_scale.data = _CODES, torch.ones(1, 2), torch.tensor(0.25)
    found = read(linear, "layer", "fp8")
    assert isinstance(found.weight.format, FP8Block)
    assert isinstance(found.activation, collogue.FP8Static)
    assert found.activation.scale == 0.25
    linear.activation_scale = None
    with pytest.raises(ArgumentError, match=r"layer: .*no activation_scale"):
        read(linear, "layer", "fp8")


def test_a_layer_of_one_block() -> None:
    fp8 = pytest.importorskip("transformers.integrations.finegrained_fp8")
    linear = fp8.FP8Linear(128, 128, (128, 128))
    weight = QuantizedWeight.of(torch.randn(128, 128), FP8Block(128))
    linear.weight.data, linear.weight_scale_inv.data = weight.codes, weight.scales
    found = read(linear, "layer", "fp8")
    assert isinstance(found.weight.format, FP8Block)
    assert found.activation is not None
    assert found.activation.label == "fp8_group128/float32/column"
    assert torch.equal(found.weight.decode(), weight.decode())


def _scheme(weights: dict[str, Any], inputs: dict[str, Any] | None, outputs: dict[str, Any] | None = None) -> Any:
    quantization = pytest.importorskip("compressed_tensors.quantization")
    arguments = [
        each and quantization.QuantizationArgs(**{"num_bits": 8, "type": "float", "symmetric": True} | each)
        for each in (weights, inputs, outputs)
    ]
    named = dict(zip(("weights", "input_activations", "output_activations"), arguments, strict=True))
    return quantization.QuantizationScheme(targets=["Linear"], **named)


def test_quantized_outputs_are_named() -> None:
    layer: Any = _layer(weight=_CODES, weight_scale=torch.ones(OUT, 1))
    token = {"strategy": "token", "dynamic": True}
    layer.quantization_scheme = _scheme({"strategy": "channel"}, token, token)
    with pytest.raises(ArgumentError, match="layer: outputs quantized to 8-bit float per token are not known") as caught:
        read(layer, "layer", "compressed-tensors")
    assert "input_activations alone" in caught.value.hint


@pytest.mark.parametrize(
    ("weights", "codes", "scales", "expected"),
    [
        ({"strategy": "channel"}, _CODES, torch.ones(6, 3), "[128, 1]"),
        ({"strategy": "channel"}, _CODES.view(IN, OUT), torch.ones(OUT, 1), "[256, 1]"),
        ({"strategy": "channel"}, _CODES, torch.ones(1, OUT), "[128, 1]"),
        ({"strategy": "tensor"}, _CODES, torch.ones(3), "[1]"),
        ({"strategy": "group", "group_size": 32}, _CODES, _BYTES.t(), "[128, 8]"),
    ],
)
def test_scales_that_do_not_fit_the_scheme(weights: dict[str, Any], codes: torch.Tensor, scales: torch.Tensor, expected: str) -> None:
    layer: Any = _layer(weight=codes, weight_scale=scales)
    layer.quantization_scheme = _scheme(weights, None)
    with pytest.raises(ShapeError, match=re.escape(f"per {weights['strategy']} have scales {[*scales.shape]}, expected {expected}")):
        read(layer, "layer", "compressed-tensors")


def test_groups_of_32_with_float_scales_are_no_mxfp8() -> None:
    layer: Any = _layer(weight=_CODES, weight_scale=torch.ones(OUT, 1))
    layer.quantization_scheme = _scheme({"strategy": "channel"}, {"strategy": "group", "group_size": 32, "dynamic": True})
    activation = read(layer, "layer", "compressed-tensors").activation
    assert activation is not None
    assert activation.label == "fp8_group32/float32/column"


def test_nvfp4_inputs_without_a_global_scale() -> None:
    layer: Any = _layer(weight_packed=_NVFP4["weight"], weight_scale=_NVFP4["weight_scale"], weight_global_scale=torch.tensor(1.0))
    four = {"num_bits": 4, "strategy": "tensor_group", "group_size": 16}
    layer.quantization_scheme = _scheme(four, four | {"dynamic": "local"})
    with pytest.raises(ArgumentError, match="layer: there is no input_global_scale"):
        read(layer, "layer", "compressed-tensors")


@pytest.mark.parametrize(
    ("weights", "codes", "scales", "match"),
    [
        (
            {"num_bits": 6, "strategy": "group", "group_size": 32},
            torch.zeros(OUT, 192, dtype=torch.uint8),
            torch.uint8,
            "6-bit float per group of 32",
        ),
        ({"strategy": "group", "group_size": 128}, _CODES, torch.float32, "8-bit float per group of 128"),
        ({"strategy": "group", "group_size": 32}, _CODES, torch.float32, "8-bit float per group of 32, with scales of torch.float32"),
        (
            {"strategy": "tensor_group", "group_size": 16, "num_bits": 4},
            _NVFP4["weight"],
            torch.float32,
            "torch.uint8 with scales of torch.float32",
        ),
    ],
)
def test_weight_schemes_that_are_not_known_are_named(weights: dict[str, Any], codes: torch.Tensor, scales: torch.dtype, match: str) -> None:
    groups = IN // weights["group_size"]
    layer: Any = _layer(weight_packed=codes, weight_scale=torch.ones(OUT, groups, dtype=scales))
    layer.quantization_scheme = _scheme(weights, None)
    with pytest.raises(ArgumentError, match=f"layer: .*{match}") as caught:
        read(layer, "layer", "compressed-tensors")
    assert caught.value.hint


@pytest.mark.parametrize(
    ("weights", "tensors", "match"),
    [
        (
            {"num_bits": 4, "type": "int", "strategy": "group", "group_size": 128},
            {"weight_packed": torch.zeros(OUT, IN // 8, dtype=torch.int32), "weight_shape": torch.tensor([OUT, IN])},
            "4-bit int per group of 128 are",
        ),
        (
            {"type": "int", "strategy": "channel", "symmetric": False},
            {"weight": torch.zeros(OUT, IN, dtype=torch.int8), "weight_zero_point": torch.zeros(OUT, 1, dtype=torch.int8)},
            "8-bit int per channel, with zero points, are",
        ),
    ],
)
def test_schemes_are_named_before_tensors_are_looked_at(weights: dict[str, Any], tensors: dict[str, torch.Tensor], match: str) -> None:
    layer: Any = _layer(**tensors)
    layer.quantization_scheme = _scheme(weights, None)
    with pytest.raises(ArgumentError, match=f"layer: weights quantized to {match} not known") as caught:
        read(layer, "layer", "compressed-tensors")
    assert "known are FP8" in caught.value.hint


def test_the_method_of_a_configuration() -> None:
    class Config:
        quantization_config: Any = None

    config = Config()
    assert checkpoints.method_of(config) is None
    config.quantization_config = {"quant_method": "fp8"}
    assert checkpoints.method_of(config) == "fp8"
    transformers = pytest.importorskip("transformers")
    config.quantization_config = transformers.FineGrainedFP8Config()
    assert checkpoints.method_of(config) == "fp8"


def _quantized(activation: collogue.Quant | None) -> QuantizedLinear:
    return QuantizedLinear(QuantizedWeight.of(_linear().weight, collogue.FP8PerToken()), activation)


def test_layers_that_share_an_input_share_its_format() -> None:
    widest = collogue.FP8Static(0.3)
    assert shared_input({"q": _quantized(collogue.FP8Static(0.1)), "k": _quantized(widest)}) is widest
    widest4 = collogue.NVFP4(100.0)
    assert shared_input({"q": _quantized(widest4), "k": _quantized(collogue.NVFP4(200.0))}) is widest4
    assert shared_input({"q": None, "k": None}) is None
    assert shared_input({"q": None, "k": _quantized(None)}) is None
    with pytest.raises(ArgumentError, match="q fp8_per_token, k none"):
        shared_input({"q": _quantized(collogue.FP8PerToken()), "k": None})


def test_a_layer_with_a_transform_is_rejected() -> None:
    """compressed-tensors keeps Hadamard transforms as modules of the layer: its product is of other numbers."""
    layer = _layer(weight=_CODES, weight_scale=torch.ones(OUT, 1))
    layer.add_module("input_transform", nn.Linear(IN, IN))
    with pytest.raises(ArgumentError, match="also has a module input_transform"):
        read(layer, "layer", "compressed-tensors")


@pytest.mark.parametrize(
    ("name", "tensor", "quantized"),
    [
        ("weight", torch.zeros(2, 2), False),
        ("weight", torch.zeros(2, 2).bfloat16(), False),
        ("weight", torch.zeros(2, 2).to(torch.float8_e5m2), True),
        ("weight_packed", torch.zeros(2, 2, dtype=torch.int32), True),
        ("blocks", torch.zeros(2, 2).to(torch.float8_e4m3fn), True),
        ("position_ids", torch.zeros(2, 2, dtype=torch.int64), False),
        ("mask", torch.zeros(2, 2, dtype=torch.bool), False),
    ],
)
def test_what_a_quantized_layer_is(name: str, tensor: torch.Tensor, quantized: bool) -> None:
    assert checkpoints.is_quantized(_layer(**{name: tensor})) == quantized


def test_mxfp8_inputs_are_rounded_as_compressed_tensors_does() -> None:
    """But for rows whose amax is 448 times a power of two, where its scale is twice as large: here amax fits without clipping."""
    quantization = pytest.importorskip("compressed_tensors.quantization")
    helpers = pytest.importorskip("compressed_tensors.quantization.utils.helpers")
    arguments = quantization.QuantizationArgs(
        num_bits=8, type="float", strategy="group", group_size=32, dynamic=True, scale_dtype=torch.uint8, symmetric=True
    )
    amax = torch.cat([torch.linspace(1.0, 1.74, 50), torch.linspace(1.76, 1.99, 50)]) * 2.0 ** torch.arange(-50, 50)
    theirs, _ = helpers.calculate_qparams(-amax, amax, arguments)
    layer: Any = _layer(weight=_CODES, weight_scale=_BYTES)
    given = {"strategy": "group", "group_size": 32, "scale_dtype": torch.uint8}
    layer.quantization_scheme = _scheme(given, given | {"dynamic": True})
    activation = read(layer, "layer", "compressed-tensors").activation
    assert activation is not None
    _, ours = collogue.quantize(amax[:, None].expand(-1, 32).contiguous(), dataclasses.replace(activation, layout="linear"))
    assert torch.equal(ours.float().flatten(), theirs.float().flatten())

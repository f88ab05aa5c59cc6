"""What a checkpoint's configuration says of its layers must not contradict their tensors, or ask for more than products."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from quantized_models import compressed_checkpoint, linears, modelopt

import collogue
from collogue.contract.weight import FP8Block, QuantizedWeight
from collogue.errors import ArgumentError
from collogue.pytorch.checkpoints import QuantizedLinear
from collogue.pytorch.stated import check_stated
from collogue.testing import run_virtual

NAME = "model.layers.1.mlp.down_proj"
FLOAT8 = {"num_bits": 8, "type": "float", "dynamic": False}
FLOAT4 = {"num_bits": 4, "type": "float", "dynamic": False, "group_size": 16}


def _parallel(model: Any) -> Any:
    return run_virtual(1, lambda group: collogue.parallelize(model, group, max_tokens=8))


@pytest.mark.parametrize("location", ["input", "output", "weight_input"])
def test_transforms_of_a_forward_pass_are_named(location: str, tmp_path: Path) -> None:
    pytest.importorskip("compressed_tensors")
    compressed_checkpoint("FP8_DYNAMIC", tmp_path)
    path = tmp_path / "config.json"
    config = json.loads(path.read_text())
    applied = {"type": "hadamard", "apply": [{"targets": ["re:.*down_proj$"], "location": location}]}
    config["quantization_config"]["transform_config"] = {"config_groups": {"R4": applied}}
    path.write_text(json.dumps(config))
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    if location == "weight_input":
        _parallel(model)
        return
    with pytest.raises(ArgumentError, match=rf"transform_config .* has R4, a hadamard at the {location} of re:\.\*down_proj") as caught:
        _parallel(model)
    assert caught.value.hint


def test_codes_of_another_type_are_named() -> None:
    model = modelopt(fp4=False)
    model.config.quantization_config["fmt"] = "e5m2"
    with pytest.raises(ArgumentError, match="codes have fmt 'e5m2'"):
        _parallel(model)


def _linear(kind: str) -> QuantizedLinear:
    weight = torch.randn(128, 256, generator=torch.Generator().manual_seed(1))
    if kind == "FP8":
        return QuantizedLinear(QuantizedWeight.of(weight, collogue.FP8Static(0.1)), collogue.FP8Static(0.5))
    if kind == "FP8_PB_WO":
        return QuantizedLinear(QuantizedWeight.of(weight, FP8Block()), None)
    if kind == "FP8_PER_CHANNEL_PER_TOKEN":
        return QuantizedLinear(QuantizedWeight.of(weight, collogue.FP8PerToken()), collogue.FP8PerToken())
    if kind == "MXFP8":
        return QuantizedLinear(QuantizedWeight.of(weight, collogue.MXFP8("ceil", "linear")), collogue.MXFP8("ceil"))
    inputs = collogue.NVFP4(512.0) if kind == "NVFP4" else None
    return QuantizedLinear(QuantizedWeight.of(weight, collogue.NVFP4(512.0, "linear")), inputs)


def _config(**said: Any) -> Any:
    config = transformers.LlamaConfig()
    config.quantization_config = {"quant_method": "modelopt", **said}
    return config


def _groups(weights: dict[str, Any], inputs: dict[str, Any] | None, *targets: str) -> dict[str, Any]:
    group = {"weights": weights, "targets": list(targets or ("Linear",))} | ({} if inputs is None else {"input_activations": inputs})
    return {"config_groups": {"group_0": group}}


def _mixed(**said: Any) -> dict[str, Any]:
    return {"quant_algo": "MIXED_PRECISION", "quantized_layers": {NAME: said}}


@pytest.mark.parametrize(
    ("kind", "said", "match"),
    [
        ("NVFP4", {"quant_algo": "NVFP4", "group_size": 32}, "says group_size 32; .* NVFP4 with scales of groups of 16"),
        ("NVFP4", _mixed(quant_algo="NVFP4", group_size=32), "says group_size 32"),
        ("NVFP4", _groups(FLOAT4 | {"group_size": 32}, FLOAT4), "group_0 .* weights have group_size 32"),
        ("NVFP4", _groups(FLOAT4, FLOAT4 | {"group_size": 32}), "input_activations have group_size 32"),
        ("NVFP4", _groups(FLOAT8, FLOAT4), "weights are 8-bit float"),
        ("NVFP4", _groups(FLOAT4 | {"type": "int"}, FLOAT4), "weights are 4-bit int"),
        ("NVFP4", _groups(FLOAT4, None, NAME), "nothing of input_activations"),
        ("NVFP4A16", _groups(FLOAT4, FLOAT4), "input_activations are quantized; .* inputs are not quantized"),
        ("MXFP8", {"quant_algo": "MXFP8", "group_size": 16}, "says group_size 16"),
        ("FP8_PB_WO", {"quant_algo": "FP8_PB_WO", "group_size": 64}, "says group_size 64; .* groups of 128"),
        ("FP8", _groups(FLOAT8, FLOAT8 | {"dynamic": True}), "input_activations are dynamic; .* fp8_static"),
        ("FP8", {"quant_algo": "FP8", "exclude_modules": ["lm_head", "*down_proj"]}, r"exclude_modules .* has '\*down_proj'"),
        ("FP8", {"quant_algo": "FP8", "exclude_modules": ["model.layers.1*"]}, "exclude_modules"),
        ("FP8", {"quant_algo": "FP8", "ignore": ["layers.1.mlp"]}, "ignore"),
        ("FP8", {"quant_algo": "FP8", "ignore": ["re:.*mlp.*"]}, "ignore"),
        ("FP8", {"quant_algo": None}, "says quant_algo None"),
        ("FP8", {"quant_algo": "MIXED_PRECISION", "quantized_layers": {}}, "quantized_layers does not have it"),
        ("FP8", _mixed(quant_algo=None), "quantized_layers does not have it"),
    ],
)
def test_contradictions_are_named(kind: str, said: dict[str, Any], match: str) -> None:
    with pytest.raises(ArgumentError, match=rf"{NAME}: .*{match}") as caught:
        check_stated(_config(**said), NAME, _linear(kind))
    assert caught.value.hint


@pytest.mark.parametrize(
    ("kind", "said"),
    [
        ("NVFP4", {}),
        ("NVFP4", {"quant_algo": "NVFP4", "group_size": 16, "exclude_modules": ["lm_head", "model.layers.0*", "model.layers.11"]}),
        ("NVFP4", {"quant_algo": "NVFP4"} | _groups(FLOAT4, FLOAT4)),
        ("NVFP4", _groups(FLOAT8, FLOAT8, "model.layers.0.mlp.down_proj")),
        ("NVFP4", _mixed(quant_algo="NVFP4", group_size=16)),
        ("NVFP4A16", _groups(FLOAT4, None)),
        ("MXFP8", {"quant_algo": "MXFP8"} | _groups(FLOAT8 | {"group_size": 32}, FLOAT8 | {"group_size": 32})),
        ("FP8", {"quant_algo": "FP8", "group_size": 128} | _groups(FLOAT8, FLOAT8)),
        ("FP8_PER_CHANNEL_PER_TOKEN", _groups(FLOAT8 | {"strategy": "channel"}, FLOAT8)),
        ("FP8_PB_WO", {"quant_algo": "FP8_PB_WO", "config_groups": {"group_0": {"quant_algo": "FP8_PB_WO", "targets": [NAME]}}}),
        ("FP8_PB_WO", {"quant_algo": "FP8_PB_WO", "group_size": 128}),
    ],
)
def test_what_modelopt_writes_is_taken(kind: str, said: dict[str, Any]) -> None:
    check_stated(_config(**said), NAME, _linear(kind))


@pytest.mark.parametrize("whole", [True, False])
def test_layers_are_found_by_the_checkpoints_names(whole: bool) -> None:
    """Also where the base model alone is passed, whose names are shorter."""
    model = modelopt(fp4=False)
    layers = {name: {"quant_algo": "FP8"} for name in linears(model)}
    model.config.quantization_config |= {"quant_algo": "MIXED_PRECISION", "quantized_layers": layers}
    del layers[NAME]
    with pytest.raises(ArgumentError, match=rf"{NAME}: .*quantized_layers does not have it"):
        _parallel(model if whole else model.model)
    layers[NAME] = {"quant_algo": "FP8"}
    _parallel(model if whole else model.model)

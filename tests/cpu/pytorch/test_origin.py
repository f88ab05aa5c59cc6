"""The files that a model was loaded from: tensors that a checkpoint does not have are named, not taken from memory."""

from __future__ import annotations

import copy
import logging
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from models import small_model
from quantized_models import SIZES, compressed_checkpoint, publish
from safetensors.torch import load_file, save_file

import collogue
from collogue.errors import ArgumentError
from collogue.testing import run_virtual

pytest.importorskip("compressed_tensors")
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")
LAYER = "layers.1.self_attn.k_proj"


def _loaded(folder: Path, drop: str) -> Any:
    from transformers import AutoModelForCausalLM

    state = load_file(folder / "model.safetensors")
    for name in [name for name in state if name.endswith(drop)] if drop else ():
        del state[name]
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


def _parallel(model: Any) -> None:
    run_virtual(1, lambda group: collogue.parallelize(model, group, max_tokens=8))


@pytest.mark.parametrize(
    ("preset", "missing"),
    [
        ("FP8", "input_scale"),
        ("FP8_DYNAMIC", "weight_scale"),
        ("NVFP4", "input_global_scale"),
        ("NVFP4", "weight_global_scale"),
        ("NVFP4", "weight_packed"),
    ],
)
def test_tensors_that_the_checkpoint_does_not_have_are_named(preset: str, missing: str, tmp_path: Path) -> None:
    """Whatever numbers lie there: also such as a scale may be."""
    compressed_checkpoint(preset, tmp_path)
    model = _loaded(tmp_path, f"{LAYER}.{missing}")
    tensor = getattr(model.model.get_submodule(LAYER), missing)
    tensor.data.copy_(torch.ones(tensor.shape))
    for each in (model, model.model, copy.deepcopy(model)):  # a copy does not tell what was read: its files do
        with pytest.raises(ArgumentError, match=rf"{LAYER}: the checkpoint has no {missing}, and transformers") as caught:
            _parallel(each)
        assert caught.value.hint
    shutil.rmtree(tmp_path)
    with pytest.raises(ArgumentError, match=missing):
        _parallel(model)


def test_a_whole_checkpoint_and_its_copies_are_taken(tmp_path: Path) -> None:
    compressed_checkpoint("FP8", tmp_path)
    model = _loaded(tmp_path, "")
    other, gone = copy.deepcopy(model), copy.deepcopy(model)
    _parallel(other)
    shutil.rmtree(tmp_path)
    _parallel(gone)
    _parallel(model)


def test_a_model_that_was_quantized_after_it_was_loaded_is_taken(tmp_path: Path) -> None:
    """Its files have no codes, and no scales."""
    from compressed_tensors import quantization
    from compressed_tensors.compressors import compress_module
    from quantized_models import fill_scales, linears, save

    save(small_model("qwen2", **SIZES), tmp_path, None)
    model = _loaded(tmp_path, "")
    config = quantization.QuantizationConfig(config_groups={"FP8": ["Linear"]}, ignore=["lm_head"])
    quantization.apply_quantization_config(model, config, show_progress=False)
    for linear in linears(model).values():
        fill_scales(linear, "FP8", 448.0)
        compress_module(linear)
    model.config.quantization_config = {"quant_method": "compressed-tensors"}
    _parallel(copy.deepcopy(model))
    _parallel(model)


def test_experts_without_scales_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers.quantizers.quantizer_finegrained_fp8 import FineGrainedFP8HfQuantizer

    monkeypatch.setattr(FineGrainedFP8HfQuantizer, "validate_environment", lambda self, **options: None)
    publish(tmp_path, "fp8")
    model = _loaded(tmp_path, ".down_proj.weight_scale_inv")
    with pytest.raises(ArgumentError, match=r"layers\.0\.mlp\.experts: the checkpoint has no down_proj_scale_inv"):
        _parallel(model)


@pytest.mark.filterwarnings("ignore:You passed `quantization_config`:UserWarning")
@pytest.mark.parametrize("method", ["fp8", "compressed-tensors"])
def test_a_checkpoint_that_was_dequantized_on_load_is_said(method: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """By transformers, as there is no GPU here, or as the caller asks: the configuration that is left says nothing."""
    from transformers import AutoModelForCausalLM, CompressedTensorsConfig

    if method == "fp8":
        publish(tmp_path, method)
    else:
        compressed_checkpoint("FP8", tmp_path)
    options = {} if method == "fp8" else {"quantization_config": CompressedTensorsConfig(run_compressed=False)}
    model = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32, **options)
    assert getattr(model.config, "quantization_config", None) is None
    with caplog.at_level(logging.INFO, "collogue"):
        _parallel(model)
    how = "dynamic" if method == "fp8" else "static"
    (said,) = [record.message for record in caplog.records if "no layer of the model has codes" in record.message]
    assert said.startswith(f"the checkpoint's quantization method is '{method}' with {how} scales of inputs, but no layer")
    assert said.endswith(": weights and inputs are in torch.float32")


def test_experts_that_were_dequantized_on_load_are_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    publish(tmp_path, "compressed-tensors")
    model = _loaded(tmp_path, "")
    with caplog.at_level(logging.INFO, "collogue"):
        _parallel(model)
        _parallel(small_model("llama"))  # says nothing
    (said,) = [record.message for record in caplog.records if "have no codes" in record.message]
    assert said.startswith("experts of 1 layer have no codes in the model as it was loaded: weights and inputs are in torch.float32, ")

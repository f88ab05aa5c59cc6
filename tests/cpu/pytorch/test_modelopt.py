"""``collogue.pytorch.modelopt.load``: a checkpoint as ModelOpt writes it becomes a model that ``parallelize`` takes."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from models import small_model
from quantized_models import BOUND, SIZES, error, exact_logits, linears, logits, modelopt, save
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from collogue.errors import ArgumentError, CollogueError, ShapeError
from collogue.pytorch.modelopt import load

SAID = {"quant_method": "modelopt", "quant_algo": "FP8", "ignore": ["lm_head"]}


@pytest.mark.parametrize("fp4", [False, True])
def test_a_loaded_model_computes_what_is_stored(fp4: bool, tmp_path: Path) -> None:
    said = SAID | {"quant_algo": "NVFP4" if fp4 else "FP8"}
    save(modelopt(fp4), tmp_path, said)
    model = load(tmp_path, dtype=torch.float32)
    assert model.config.quantization_config == said
    for world_size in (1, 2):
        assert error(logits(model, world_size), exact_logits(modelopt(fp4), world_size)) < BOUND


def test_the_file_beside_the_configuration(tmp_path: Path) -> None:
    save(modelopt(fp4=False), tmp_path, None)
    (tmp_path / "hf_quant_config.json").write_text(json.dumps({"producer": {}, "quantization": {"quant_algo": "FP8"}}))
    model = load(tmp_path)
    assert model.config.quantization_config == {"quant_method": "modelopt", "quant_algo": "FP8"}
    assert model.model.norm.weight.dtype == torch.bfloat16
    assert linears(model)["model.layers.0.mlp.up_proj"].weight_scale.dtype == torch.float32
    assert torch.isfinite(logits(model, 1)).all()


@pytest.mark.parametrize("codes", [False, True])
def test_a_checkpoint_that_quantizes_the_cache_alone(codes: bool, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """``codes``: the files hold some after all, which transformers takes for weights."""
    plain = small_model("llama", **SIZES)
    save(modelopt(fp4=False) if codes else plain, tmp_path, {"quant_method": "modelopt", "quant_algo": None, "kv_cache_quant_algo": "FP8"})
    scales = {f"model__layers__{index}__self_attn__{each}_proj__{each}_scale": torch.tensor(0.1) for index in (0, 1) for each in "kv"}
    _tensors(tmp_path, **scales)
    for make in (load, AutoModelForCausalLM.from_pretrained):
        model: Any = make(tmp_path, dtype=torch.float32)
        if codes:
            with pytest.raises(ArgumentError, match="says quant_algo None; the tensors" if make is load else "no layer is quantized"):
                logits(model, 1)
            continue
        caplog.clear()
        with caplog.at_level(logging.INFO, "collogue"):
            assert torch.equal(logits(model, 2), logits(plain, 2))
        said = {record.message for record in caplog.records if "cache" in record.message or "codes" in record.message}
        assert said == {"the configuration says that the key-value cache is FP8, which is not done: the cache is not quantized"}


def test_a_tied_head_needs_no_tensor_of_its_own(tmp_path: Path) -> None:
    untied = modelopt(fp4=True)
    untied.lm_head.weight = untied.model.embed_tokens.weight
    save(untied, tmp_path, SAID | {"quant_algo": "NVFP4"})
    _config(tmp_path, tie_word_embeddings=True)
    _tensors(tmp_path, lm_head__weight=None)
    model = load(tmp_path, dtype=torch.float32)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert torch.equal(logits(model, 2), logits(untied, 2))


@pytest.mark.parametrize("equal", [True, False])
def test_a_tied_weight_under_both_names_counts_once(equal: bool, tmp_path: Path) -> None:
    save(modelopt(fp4=False), tmp_path, SAID)
    _config(tmp_path, tie_word_embeddings=True)
    embedding = load_file(tmp_path / "model.safetensors")["model.embed_tokens.weight"]
    _tensors(tmp_path, lm_head__weight=embedding.clone() if equal else embedding + 1)
    if equal:
        assert torch.equal(load(tmp_path, dtype=embedding.dtype).lm_head.weight, embedding)
        return
    with pytest.raises(ArgumentError, match="differ in the checkpoint, and the model ties them") as caught:
        load(tmp_path)
    assert "tie_word_embeddings" in str(caught.value.hint)


def _config(folder: Path, **said: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | said))


def _tensors(folder: Path, **said: Any) -> None:
    path = folder / "model.safetensors"
    state = load_file(path) | {name.replace("__", "."): tensor for name, tensor in said.items()}
    save_file({name: tensor for name, tensor in state.items() if tensor is not None}, path)


LAYER = "model__layers__1__self_attn__k_proj"


def _cut(folder: Path) -> None:
    """The first rows of a layer's codes."""
    state = load_file(folder / "model.safetensors")
    _tensors(
        folder,
        **{name.replace(".", "__"): tensor[:128].clone() for name, tensor in state.items() if name.endswith("1.self_attn.k_proj.weight")},
    )


@pytest.mark.parametrize("fp4", [False, True])
def test_codes_of_another_shape_are_named(fp4: bool, tmp_path: Path) -> None:
    """Of FP4 a byte holds two codes."""
    save(modelopt(fp4), tmp_path, SAID)
    _cut(tmp_path)
    columns = 192 if fp4 else 384
    match = rf"model\.layers\.1\.self_attn\.k_proj\.weight is \[128, {columns}\], the model's \[768, {columns}\]"
    with pytest.raises(ShapeError, match=match):
        load(tmp_path)


@pytest.mark.parametrize(
    ("change", "kind", "match"),
    [
        (lambda folder: (folder / "model.safetensors").unlink(), ArgumentError, "has no config.json"),
        (lambda folder: _config(folder, quantization_config={"quant_method": "gptq"}), ArgumentError, "method is 'gptq', not 'modelopt'"),
        (lambda folder: _config(folder, quantization_config=None), ArgumentError, "method is None, not 'modelopt'"),
        (lambda folder: _tensors(folder, model__norm__weight=None), ArgumentError, r"has no model\.norm\.weight"),
        (lambda folder: _tensors(folder, model__norm__weight=torch.ones(3)), ShapeError, r"model\.norm\.weight is \[3\]"),
        (
            lambda folder: _tensors(folder, model__embed_tokens__weight=torch.ones(128, 384).to(torch.float8_e4m3fn)),
            ArgumentError,
            r"model\.embed_tokens\.weight is torch\.float8_e4m3fn \(Embedding\)",
        ),
        (
            lambda folder: _tensors(folder, **{f"{LAYER}__bias": torch.ones(768)}),
            ShapeError,
            r"k_proj\.bias is \[768\], the model's none",
        ),
        (lambda folder: _tensors(folder, model__other__weight=torch.ones(3)), ArgumentError, r"the model has no model\.other"),
    ],
)
def test_bad_checkpoints_are_named_errors(change: Callable[[Path], Any], kind: type[CollogueError], match: str, tmp_path: Path) -> None:
    save(modelopt(fp4=False), tmp_path, SAID)
    change(tmp_path)
    with pytest.raises(kind, match=match) as caught:
        load(tmp_path)
    assert caught.value.hint

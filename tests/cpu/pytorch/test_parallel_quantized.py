"""``collogue.parallelize`` on quantized models: checkpoints of every scheme, and models quantized on load."""

from __future__ import annotations

import copy
import functools
import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from models import small_model
from quantized_models import (
    BOUND,
    SIZES,
    TOKENS,
    calibrated,
    compressed,
    compressed_checkpoint,
    error,
    exact_logits,
    fill,
    fine_grained,
    linears,
    logits,
    modelopt,
    save,
)

import collogue
from collogue.contract import calibration
from collogue.errors import ArgumentError, CollogueError, FormatError, ScaleError, ShapeError
from collogue.pytorch import products, recipes, schemes
from collogue.pytorch.checkpoints import is_quantized
from collogue.pytorch.recipes import RECIPES, Recipe
from collogue.pytorch.scaled import Linear
from collogue.testing import VirtualGroup, run_virtual

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")

CHECKPOINTS: dict[str, Callable[[], Any]] = {
    **{
        preset: functools.partial(compressed, preset)
        for preset in ("FP8", "FP8_DYNAMIC", "FP8_BLOCK", "NVFP4", "NVFP4A16", "MXFP8", "MXFP4")
    },
    "fine-grained block": fine_grained,
    "fine-grained static": functools.partial(fine_grained, dynamic=False),
    "modelopt FP8": functools.partial(modelopt, fp4=False),
    "modelopt NVFP4": functools.partial(modelopt, fp4=True),
}


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_checkpoints(name: str) -> None:
    model = CHECKPOINTS[name]()
    for world_size in (1, 2, 3):
        expected = exact_logits(model, world_size)
        packed = logits(model, world_size, keep_packed=True)
        assert error(packed, expected) < BOUND
        assert torch.equal(logits(model, world_size), packed)  # float32 holds every decoded weight


def test_scales_in_bfloat16_are_the_numbers_that_they_are() -> None:
    """Fine-grained FP8 whose scales a conversion has rounded: the input's stay float32, as its own product quantizes it."""
    narrow, wide = fine_grained(), fine_grained()
    for one, other in zip(linears(narrow).values(), linears(wide).values(), strict=True):
        rounded = one.weight_scale_inv.data.bfloat16()  # type: ignore[operator, union-attr]
        fill(one, weight_scale_inv=rounded)
        fill(other, weight_scale_inv=rounded.float())
    assert torch.equal(logits(narrow, 1), logits(wide, 1))


@pytest.mark.parametrize("options", [{}, {"quant": "fp8_per_token"}], ids=["as it is", "quantized"])
def test_codes_that_a_conversion_has_made_values(options: dict[str, Any]) -> None:
    model = fine_grained().to(torch.bfloat16)
    with pytest.raises(ArgumentError, match=r"q_proj has weight_scale_inv, but its weight is torch\.bfloat16: no longer codes") as caught:
        logits(model, 1, **options)
    assert ".to(dtype)" in caught.value.hint


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_an_inverted_scale_misses_the_bound_by_far(name: str) -> None:
    model = CHECKPOINTS[name]()
    expected = exact_logits(model, 1)
    layer: Any = linears(model)["model.layers.0.mlp.up_proj"]
    scale = layer.weight_scale_inv if hasattr(layer, "weight_scale_inv") else layer.weight_scale
    for tensor in (getattr(layer, "weight_global_scale", None), getattr(layer, "weight_scale_2", None), scale):
        if tensor is not None:
            break
    assert tensor is not None
    tensor.data = 254 - tensor.data if tensor.dtype == torch.uint8 else (1.0 / tensor.data.float()).to(tensor.dtype)
    assert error(logits(model, 1), expected) > 10 * BOUND


@pytest.mark.parametrize("name", RECIPES)
def test_quantized_on_load(name: str) -> None:
    model = small_model("llama", **SIZES)
    calibration = calibrated(model) if name in ("fp8_static", "nvfp4") else None
    for world_size in (1, 2, 3):
        found = logits(model, world_size, quant=name, calibration=calibration)
        assert error(found, exact_logits(model, world_size, Recipe.of(name, calibration))) < BOUND
    assert 0 < error(found, model(TOKENS).logits) < (0.5 if name == "nvfp4" else 0.15)


@pytest.mark.parametrize(
    "make", [fine_grained, functools.partial(compressed, "FP8_BLOCK"), None], ids=["fine-grained", "compressed", "load"]
)
def test_scales_of_groups_lie_as_products_read_them(make: Callable[[], Any] | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Column by column, for any number of rows, so that nothing copies them; the same bits as row by row."""
    model, options = (small_model("llama", **SIZES), {"quant": "fp8_block"}) if make is None else (make(), {"keep_packed": True})
    seen: list[bool] = []
    original = Linear._multiply

    def watching(self: Linear, codes: torch.Tensor, scales: torch.Tensor, *rest: Any) -> torch.Tensor:
        by_columns = products._in_fours(codes, scales)[1]
        seen.append(by_columns.data_ptr() == scales.data_ptr() and torch.equal(by_columns[: len(scales)], scales))
        return original(self, codes, scales, *rest)

    monkeypatch.setattr(Linear, "_multiply", watching)
    by_columns = [logits(model, 1, tokens, **options) for tokens in (TOKENS, TOKENS[:, :8], TOKENS[:1, :1])]
    assert len(seen) == 3 * 14
    assert all(seen)
    for module in (recipes, schemes):
        monkeypatch.setattr(module, "FP8Group", lambda size, layout: collogue.FP8Group(size))
    seen.clear()
    by_rows = [logits(model, 1, tokens, **options) for tokens in (TOKENS, TOKENS[:, :8], TOKENS[:1, :1])]
    assert len(seen) == 3 * 14
    assert not any(seen)
    assert all(torch.equal(*pair) for pair in zip(by_columns, by_rows, strict=True))


_CHANGED: dict[str, dict[str, Any]] = {"granite": {"residual_multiplier": 0.3}, "llama": {"attention_bias": True}}


@pytest.mark.parametrize(
    "kind", ["llama", "qwen2", "qwen3", "gemma", "gemma2", "gemma3_text", "granite", "phi3", "glm4", "olmo2", "smollm3"]
)
def test_other_models(kind: str) -> None:
    model = small_model(kind, **SIZES | {"num_key_value_heads": 2} | _CHANGED.get(kind, {}))
    for world_size in (1, 2):
        expected = exact_logits(model, world_size, Recipe.of("fp8_per_token", None))
        assert error(logits(model, world_size, quant="fp8_per_token"), expected) < BOUND


def test_a_factor_that_scales_cannot_hold() -> None:
    """Granite's factor on branches is no power of two, and MXFP8's scales are."""
    model = small_model("granite", **SIZES | {"residual_multiplier": 0.22, "attention_bias": True, "mlp_bias": True})
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            parameter.data.normal_(generator=torch.Generator().manual_seed(2))
    for world_size in (1, 2):
        expected = exact_logits(model, world_size, Recipe.of("mxfp8", None))
        for keep_packed in (False, True):
            assert error(logits(model, world_size, quant="mxfp8", keep_packed=keep_packed), expected) < BOUND


def test_experts_stay_as_they_are() -> None:
    model = small_model("qwen3_moe", **SIZES)
    assert error(logits(model, 2, quant="fp8_per_token"), exact_logits(model, 2, Recipe.of("fp8_per_token", None))) < BOUND


@pytest.mark.parametrize("name", ["fp8_per_token", "nvfp4"])
def test_nothing_is_quantized_twice(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The fused calls give the codes that q, k, v, gate and up read, and a gated unit those of down: only o quantizes its input."""
    from collogue.pytorch import scaled

    model = small_model("llama", **SIZES)
    calibration = calibrated(model) if name == "nvfp4" else None
    counted: list[tuple[int, ...]] = []
    original = scaled.quantize

    def counting(x: torch.Tensor, quant: collogue.Quant) -> Any:
        counted.append(tuple(x.shape))
        return original(x, quant)

    monkeypatch.setattr(scaled, "quantize", counting)
    logits(model, 1, quant=name, calibration=calibration)
    assert counted == [(18, 768)] * 2


@pytest.mark.parametrize(("kind", "count"), [("llama", 2), ("phi3", 2), ("glm4", 2), ("gemma", 0), ("qwen3_moe", 1)])
def test_which_mlps_are_gated_units(kind: str, count: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Those whose activation is silu and whose last layer has quantized inputs: never of models that are not quantized."""
    model = small_model(kind, **SIZES | {"num_key_value_heads": 2})
    seen: list[tuple[int, ...]] = []
    original = collogue.reference.gated
    monkeypatch.setattr(collogue.reference, "gated", lambda given: seen.append(tuple(given.gate.shape)) or original(given))
    logits(model, 1)
    assert seen == []
    logits(model, 1, quant="fp8_per_token")
    assert seen == [(18, 768)] * count


def test_an_mlp_that_was_given_another_activation_is_found() -> None:
    model = small_model("llama", **SIZES)

    def rank(group: VirtualGroup) -> None:
        mine = collogue.parallelize(copy.deepcopy(model), group, max_tokens=18, quant="fp8_per_token")
        mine.model.layers[0].mlp.act_fn = torch.nn.GELU()
        with pytest.raises(ArgumentError, match="act_fn of a decoder layer was replaced"):
            mine(TOKENS)

    run_virtual(1, rank)


def test_hooks_where_norms_return_codes() -> None:
    """A hook would see codes alone; one in front of the norm sees, and may change, the stream."""
    model = small_model("llama", **SIZES)

    def rank(group: VirtualGroup) -> None:
        mine = collogue.parallelize(copy.deepcopy(model), group, max_tokens=18, quant="fp8_per_token")
        plain, norm = mine(TOKENS).logits, mine.model.layers[1].input_layernorm
        for hook in (lambda module, given, normed: None, lambda module, given, normed: normed * 2):
            handle = norm.register_forward_hook(hook)
            with pytest.raises(ArgumentError, match="returns codes, without their scales") as caught:
                mine(TOKENS)
            assert "pre-hook" in caught.value.hint
            handle.remove()
        seen: list[torch.dtype] = []
        norm.register_forward_pre_hook(lambda module, given: seen.append(given[0].dtype))
        assert torch.equal(mine(TOKENS).logits, plain)
        assert seen == [torch.float32]
        norm.register_forward_pre_hook(lambda module, given: (given[0].flip(-1),))
        assert not torch.equal(mine(TOKENS).logits, plain)
        mine.model.norm.register_forward_hook(lambda module, given, normed: seen.append(normed.dtype))
        mine(TOKENS)
        assert seen[-1] == torch.float32

    for world_size in (1, 2):
        run_virtual(world_size, rank)


def test_generate() -> None:
    model = small_model("llama", **SIZES)

    def rank(group: VirtualGroup, cached: bool) -> torch.Tensor:
        mine = collogue.parallelize(copy.deepcopy(model), group, max_tokens=64, quant="fp8_per_token")
        found: torch.Tensor = mine.generate(TOKENS[:1], max_new_tokens=6, do_sample=False, use_cache=cached)
        return found

    cached, whole = (run_virtual(2, functools.partial(rank, cached=cached)) for cached in (True, False))
    assert torch.equal(cached[0], cached[1])
    assert torch.equal(cached[0], whole[0])


def test_without_fusion() -> None:
    """``fuse=False`` ends layers in functional collectives, which need a process group: world 1 has none to call."""
    model = small_model("llama", **SIZES)
    expected = exact_logits(model, 1, Recipe.of("fp8_per_token", None))
    assert error(logits(model, 1, quant="fp8_per_token"), expected) < BOUND


def test_memory() -> None:
    """Codes and scales of the layers inside decoder layers, in bytes of bfloat16."""
    for name, most in (("fp8_per_token", 0.51), ("fp8_block", 0.51), ("nvfp4", 0.29)):
        model = small_model("llama", **SIZES)
        calibration = calibrated(model) if name == "nvfp4" else None

        def rank(group: VirtualGroup, model: Any = model, name: str = name, calibration: Any = calibration) -> float:
            mine = collogue.parallelize(copy.deepcopy(model), group, max_tokens=8, quant=name, calibration=calibration, keep_packed=True)
            weights = [module.quantized_weight for module in mine.modules() if isinstance(module, Linear) and module.quantized_weight]
            assert len(weights) == 14
            return sum(weight.nbytes for weight in weights) / sum(2 * weight.shape[0] * weight.shape[1] for weight in weights)

        assert run_virtual(1, rank)[0] < most


def _layer(model: Any) -> Any:
    return linears(model)["model.layers.1.self_attn.k_proj"]


def _break_scale(model: Any) -> None:
    _layer(model).weight_scale.data[3] = 0.0


def _break_shape(model: Any) -> None:
    _layer(model).weight_scale.data = torch.ones(5, 1)


def _fewer_rows(model: Any) -> None:
    for name in ("weight", "weight_scale"):
        tensor = getattr(_layer(model), name)
        tensor.data = tensor.data[:128].clone()


def _dequantize_one(model: Any) -> None:
    from quantized_models import put

    put(model, "model.layers.1.self_attn.k_proj", torch.nn.Linear(384, 768, bias=False))


def _quantize_head(model: Any) -> None:
    model.lm_head.weight.data = model.lm_head.weight.data.to(torch.float8_e4m3fn)


@pytest.mark.parametrize(
    ("change", "error_type", "match"),
    [
        (_break_scale, ScaleError, "layers.1.self_attn.k_proj: .*not positive"),
        (_break_shape, CollogueError, "layers.1.self_attn.k_proj: "),
        (_fewer_rows, ShapeError, r"layers.1.self_attn.k_proj: weight is \[128, 384\], the model's \[768, 384\]"),
        (_dequantize_one, ArgumentError, "different formats: .*k_proj none"),
        (lambda model: model.config.quantization_config.update(quant_method="gptq"), ArgumentError, "'gptq' is not known"),
        (_quantize_head, ArgumentError, "lm_head is quantized"),
    ],
)
def test_bad_checkpoints_change_nothing(change: Callable[[Any], None], error_type: type[CollogueError], match: str) -> None:
    model = compressed("FP8_DYNAMIC")
    change(model)
    modules = dict(model.named_modules())
    for world_size in (1, 2):

        def rank(group: VirtualGroup) -> None:
            with pytest.raises(error_type, match=match) as caught:
                collogue.parallelize(model, group, max_tokens=8)
            assert caught.value.hint

        run_virtual(world_size, rank)
    assert dict(model.named_modules()) == modules


@pytest.mark.parametrize(("preset", "byte"), [("MXFP8", 0xFF), ("MXFP4", 0xFF), ("NVFP4", 0x7F), ("NVFP4", 0xFF), ("NVFP4", 0xA8)])
def test_block_scales_that_are_no_scales_are_named(preset: str, byte: int) -> None:
    model = compressed(preset)
    _layer(model).weight_scale.data.view(torch.uint8)[5, 3] = byte
    with pytest.raises(ScaleError, match=r"layers\.1\.self_attn\.k_proj: a weight has scales that are not"):
        run_virtual(1, lambda group: collogue.parallelize(model, group, max_tokens=8))


@pytest.mark.parametrize("break_one", ["scale", "calibration", "code"])
def test_an_error_of_one_rank_is_raised_on_all(break_one: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Errors that are not this library's too: the other ranks would wait until their timeout."""
    from collogue.pytorch import parallel

    model, original = compressed("FP8") if break_one == "scale" else small_model("llama", **SIZES), parallel.plan
    seen = None if break_one == "scale" else calibrated(model)

    def rank(group: VirtualGroup) -> str:
        mine, calibration = copy.deepcopy(model), copy.deepcopy(seen)
        if group.rank == 1 and break_one == "scale":
            _layer(mine).input_scale = torch.nn.Parameter(torch.ones(2), False)
        if group.rank == 1 and break_one == "calibration":
            assert calibration is not None
            calibration.amax["model.layers.0.mlp.up_proj"] = 0.0
        if group.rank == 1 and break_one == "code":
            mine.broken = True
        with pytest.raises(Exception, match=r"elements|amax 0|no room") as caught:
            collogue.parallelize(mine, group, max_tokens=8, quant=None if calibration is None else "fp8_static", calibration=calibration)
        return str(caught.value)

    def breaking(model: Any, *args: Any, **named: Any) -> Any:
        if hasattr(model, "broken"):
            raise RuntimeError("no room")
        return original(model, *args, **named)

    monkeypatch.setattr(parallel, "plan", breaking)
    first, second = run_virtual(2, rank)
    assert first.startswith("rank 1: ")
    assert not second.startswith("rank 1: ")


def test_a_line_says_what_was_decoded(caplog: pytest.LogCaptureFixture) -> None:
    """7 matrices of 384 x 768 in each of two layers: 15.8 MiB in float32, a quarter of that in FP8 with scales."""
    model = compressed("FP8_DYNAMIC")
    with caplog.at_level(logging.INFO, "collogue"):
        logits(small_model("llama"), 1)
        logits(model, 1, keep_packed=True)
        assert [record for record in caplog.records if "decoded once" in record.message] == []
        logits(model, 1)
        logits(small_model("llama", **SIZES), 1, quant="fp8_block")
    said = [record.message for record in caplog.records if "decoded once" in record.message]
    why = "because cpu has no product of their formats that is used here; keep_packed=True keeps them, and decodes them in every call"
    taken = "weights are decoded once to torch.float32, and take 15.8 MiB on this rank in place of"
    assert said == [
        f"linear layers of 2 layers: FP8PerToken {taken} 4.0 MiB, {why}",
        f"linear layers of 2 layers: FP8Block {taken} 3.9 MiB, {why}",
    ]


def test_scales_of_a_cache_are_not_used(caplog: pytest.LogCaptureFixture) -> None:
    model, expected = modelopt(fp4=False), logits(modelopt(fp4=False), 1)
    for name, layer in linears(model).items():
        if name.endswith(("k_proj", "v_proj")):
            layer.register_parameter("k_scale" if "k_proj" in name else "v_scale", torch.nn.Parameter(torch.tensor(0.5), False))
    with caplog.at_level(logging.INFO, "collogue"):
        assert torch.equal(logits(model, 1), expected)
    (said,) = [record.message for record in caplog.records if "cache" in record.message]
    assert said == "4 linear layers have scales for a key-value cache in FP8, which are not used: the cache is not quantized"


@pytest.mark.parametrize("said", [{"kv_cache_scheme": {"num_bits": 8, "type": "float"}}, {"kv_cache_quant_algo": "FP8"}])
def test_a_quantized_cache_without_scales_is_said(said: dict[str, Any], caplog: pytest.LogCaptureFixture) -> None:
    model = modelopt(fp4=False)
    model.config.quantization_config |= said
    with caplog.at_level(logging.INFO, "collogue"):
        logits(model, 1)
    (line,) = [record.message for record in caplog.records if "cache" in record.message]
    asked = next(iter(said.values()))
    assert line == f"the configuration says that the key-value cache is {asked}, which is not done: the cache is not quantized"


@pytest.mark.parametrize("scales", [True, False])
def test_a_quantized_cache_of_compressed_tensors_is_not_used(scales: bool, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Its hook would put a cache of its own in the place of transformers'. Scales that no file has, and nothing reads, may be anything."""
    from safetensors.torch import load_file, save_file
    from transformers import AutoModelForCausalLM

    compressed_checkpoint("FP8_DYNAMIC", tmp_path)
    file, path = tmp_path / "model.safetensors", tmp_path / "config.json"
    if scales:
        names = [f"model.layers.{index}.self_attn.{each}" for index in (0, 1) for each in ("k_scale", "v_scale")]
        save_file(load_file(file) | {name: torch.tensor([0.02]) for name in names}, file, metadata={"format": "pt"})
    config = json.loads(path.read_text())
    config["quantization_config"]["kv_cache_scheme"] = {"num_bits": 8, "type": "float", "strategy": "tensor", "dynamic": False}
    path.write_text(json.dumps(config))
    model = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    hooks = list(model.model.layers[1].self_attn._forward_pre_hooks.values())
    assert len(hooks) == 1

    def rank(group: VirtualGroup, model: Any) -> Any:
        mine = copy.deepcopy(model)
        for attention in (layer.self_attn for layer in mine.model.layers if not scales and hasattr(layer.self_attn, "k_scale")):
            attention.k_scale.data.fill_(group.rank)
        mine = collogue.parallelize(mine, group, max_tokens=32)
        return mine(TOKENS).logits, mine.generate(TOKENS[:1], max_new_tokens=2, do_sample=False)

    with caplog.at_level(logging.INFO, "collogue"):
        found = run_virtual(2, functools.partial(rank, model=model))
    for each, expected in zip(found, run_virtual(2, functools.partial(rank, model=compressed("FP8_DYNAMIC"))), strict=True):
        assert all(torch.equal(*pair) for pair in zip(each, expected, strict=True))
    said = {record.message for record in caplog.records if record.name == "collogue" and "cache" in record.message}
    assert len(said) == 1
    assert "which is not done: the cache is not quantized" in said.pop()


def test_a_calibration_from_a_file(tmp_path: Path) -> None:
    model = small_model("llama", **SIZES)
    seen = calibrated(model)
    calibration.write(calibration.document(seen, "fp8_static", "compressed-tensors"), tmp_path / "scales.safetensors")
    loaded = collogue.Calibration.load(tmp_path / "scales.safetensors")
    found, expected = (logits(model, 1, quant="fp8_static", calibration=each) for each in (loaded, seen))
    assert torch.equal(found, expected)
    with pytest.raises(ArgumentError, match="calibration is a PosixPath") as caught:
        run_virtual(1, lambda group: collogue.parallelize(model, group, quant="nvfp4", calibration=tmp_path))
    assert "Calibration.load" in caught.value.hint


def test_bad_arguments() -> None:
    model = small_model("llama", **SIZES)
    seen = calibrated(model)
    partial = collogue.Calibration({name: amax for name, amax in seen.amax.items() if "k_proj" not in name})
    cases: list[tuple[type[CollogueError], str, dict[str, Any]]] = [
        (ArgumentError, "unknown quant 'fp8'", {"quant": "fp8"}),
        (ArgumentError, "needs calibration", {"quant": "nvfp4"}),
        (ArgumentError, "takes no calibration", {"quant": "fp8_per_token", "calibration": seen}),
        (ArgumentError, "no amax of model.layers.0.self_attn.k_proj", {"quant": "fp8_static", "calibration": partial}),
        (ArgumentError, "calibration= is given without quant=", {"calibration": seen}),
        (ArgumentError, "calibration is a dict", {"quant": "nvfp4", "calibration": {}}),
    ]
    for kind, match, arguments in cases:
        with pytest.raises(kind, match=match):
            run_virtual(1, lambda group, arguments=arguments: collogue.parallelize(model, group, **arguments))
    with pytest.raises(ArgumentError, match="quantized already"):
        run_virtual(1, lambda group: collogue.parallelize(compressed("FP8_DYNAMIC"), group, quant="fp8_per_token"))
    match = r"no amax of layers\.0\.self_attn\.q_proj, but one of model\.layers\.0\.self_attn\.q_proj: .*prefix"
    with pytest.raises(ArgumentError, match=match):
        run_virtual(1, lambda group: collogue.parallelize(model.model, group, quant="fp8_static", calibration=seen))


def test_compiled() -> None:
    """Codes pass through the model's own code as tensors, and are found again, in a traced graph as well."""
    model = small_model("llama", **SIZES)

    def rank(group: VirtualGroup) -> tuple[torch.Tensor, torch.Tensor]:
        mine = collogue.parallelize(copy.deepcopy(model), group, max_tokens=TOKENS.numel(), quant="fp8_per_token")
        with torch.no_grad():
            eager = mine(TOKENS, use_cache=False).logits
            return eager, torch.compile(mine, backend="eager", fullgraph=True)(TOKENS, use_cache=False).logits

    [(eager, compiled)] = run_virtual(1, rank)
    assert torch.equal(eager, compiled)


@pytest.mark.parametrize("quant", ["fp8_static", "nvfp4"])
@pytest.mark.parametrize("value", [0.0, torch.nan, torch.inf])
def test_weights_without_a_scale_are_named(value: float, quant: str) -> None:
    model = small_model("llama", **SIZES)
    seen = calibrated(model)
    model.model.layers[1].mlp.up_proj.weight.data.fill_(value)
    with pytest.raises(ScaleError, match=rf"layers\.1\.mlp\.up_proj: the weight has amax {value}"):
        run_virtual(1, lambda group: collogue.parallelize(model, group, max_tokens=8, quant=quant, calibration=seen))


@pytest.mark.parametrize("status", ["decompressed", "frozen"])
def test_compressed_tensors_whose_weights_are_not_codes(status: str, tmp_path: Path) -> None:
    """A forward pass of the model has decompressed it; or its configuration says that it was never compressed."""
    compressed_checkpoint("FP8_DYNAMIC", tmp_path)
    path = tmp_path / "config.json"
    if status == "frozen":
        path.write_text(path.read_text().replace('"quantization_status": "compressed"', '"quantization_status": "frozen"'))
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    if status == "decompressed":
        model(TOKENS)
    match = rf"q_proj: quantization_status is '{status}', so its weight is torch.float32, not codes"
    with pytest.raises(ArgumentError, match=match) as caught:
        run_virtual(1, lambda group: collogue.parallelize(model, group, max_tokens=8))
    assert ("parallelize it before the first one" if status == "decompressed" else "to 'compressed' and load it again") in caught.value.hint


def test_models_that_quant_does_not_take() -> None:
    peft: Any = pytest.importorskip("peft")
    model = peft.get_peft_model(small_model("llama", **SIZES), peft.LoraConfig(target_modules=["v_proj"]))
    for match, given, arguments in (
        ("v_proj has an adapter, and quant= quantizes plain weights alone", model, {"quant": "fp8_per_token"}),
        ("the model is in torch.float64; known are bfloat16, float16 and float32", small_model("llama").double(), {}),
    ):
        with pytest.raises(CollogueError, match=match) as caught:
            run_virtual(1, lambda group, given=given, arguments=arguments: collogue.parallelize(given, group, max_tokens=8, **arguments))
        assert caught.value.hint


def test_a_forward_that_was_replaced_is_found() -> None:
    model = compressed("FP8_DYNAMIC")
    layer = _layer(model)
    layer.forward = lambda x: x
    with pytest.raises(ArgumentError, match=r"k_proj has a forward of its own"):
        run_virtual(1, lambda group: collogue.parallelize(model, group, max_tokens=8))


@pytest.mark.parametrize("preset", ["FP8", "FP8_DYNAMIC", "FP8_BLOCK", "NVFP4", "MXFP8", "MXFP4"])
def test_compressed_tensors_that_transformers_loads(preset: str, tmp_path: Path) -> None:
    """The library puts forward functions of its own on layers, and a hook on the model: neither is run here."""
    compressed_checkpoint(preset, tmp_path)
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    assert all(is_quantized(layer) for layer in linears(model).values())
    for world_size in (1, 2):
        assert error(logits(model, world_size), exact_logits(compressed(preset), world_size)) < BOUND


def test_a_checkpoint_whose_method_transformers_skips(tmp_path: Path) -> None:
    save(modelopt(fp4=False), tmp_path, {"quant_method": "modelopt", "quant_algo": "FP8"})
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    for world_size in (1, 2):
        with pytest.raises(ArgumentError, match="'modelopt', but no layer is quantized") as caught:
            run_virtual(world_size, lambda group: collogue.parallelize(copy.deepcopy(model), group, max_tokens=8))
        assert "collogue.pytorch.modelopt.load" in caught.value.hint


def test_weights_that_a_file_holds_off_a_boundary(tmp_path: Path) -> None:
    """On the CPU transformers leaves them where the file has them; calls take norm weights at multiples of 16 bytes."""
    save(small_model("llama"), tmp_path, None, shift=8)
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    assert model.model.norm.weight.data_ptr() % 16 != 0

    def rank(group: VirtualGroup) -> torch.Tensor:
        found: torch.Tensor = collogue.parallelize(model, group, max_tokens=18)(TOKENS).logits
        return found

    assert torch.equal(run_virtual(1, rank)[0], logits(small_model("llama"), 1))


def test_a_checkpoint_that_was_dequantized_on_load() -> None:
    """Its configuration still names the method."""
    model = small_model("llama", **SIZES)
    plain = logits(model, 1)
    model.config.quantization_config = {"quant_method": "gguf"}
    assert torch.equal(logits(model, 1), plain)
    assert error(logits(model, 1, quant="fp8_per_token"), plain) > 0


@pytest.mark.parametrize(("name", "kind"), [("fp8_block", ShapeError), ("mxfp8", (ShapeError, FormatError))])
def test_parts_that_end_inside_a_block(name: str, kind: Any) -> None:
    """96 features among 2 ranks are 48: neither a block of 128 nor one of 32."""
    model = small_model("llama")
    with pytest.raises(kind, match=r"layers\.0\..*_proj") as caught:
        run_virtual(2, lambda group: collogue.parallelize(copy.deepcopy(model), group, max_tokens=8, quant=name))
    assert caught.value.hint == "use a world size whose parts are whole blocks, or another quant="  # not: load it dequantized

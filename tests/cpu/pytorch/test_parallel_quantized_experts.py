"""``collogue.parallelize`` on models whose experts are quantized, or stay as they are beside quantized layers."""

from __future__ import annotations

import copy
import functools
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from models import small_model
from quantized_models import (
    BOUND,
    EXPERT_SIZES,
    SIZES,
    TOKENS,
    decoded_experts,
    error,
    exact_logits,
    experts,
    fill,
    fine_grained,
    linears,
    logits,
    mxfp4,
    publish,
)
from torch import Tensor

import collogue
from collogue.errors import ArgumentError, CollogueError, ScaleError, ShapeError
from collogue.pytorch import parallel
from collogue.pytorch.checkpoints import is_quantized, read_experts
from collogue.pytorch.nn import ScaledLinear
from collogue.pytorch.recipes import Recipe
from collogue.testing import VirtualGroup, run_virtual

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")

FINE_GRAINED = [kind for kind in EXPERT_SIZES if kind != "gpt_oss"]
CHECKPOINTS: dict[str, Callable[[], Any]] = {
    **{f"FP8 blocks, {kind}": functools.partial(fine_grained, kind=kind) for kind in FINE_GRAINED},
    "FP8 with one scale": functools.partial(fine_grained, dynamic=False, kind="qwen3_moe"),
    "MXFP4": mxfp4,
}


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_checkpoints(name: str) -> None:
    model = CHECKPOINTS[name]()
    for world_size in (1, 2, 3):
        found = logits(model, world_size)
        assert error(found, exact_logits(model, world_size)) < BOUND
    assert torch.equal(logits(model, 3, keep_packed=True), found)  # float32 holds every decoded weight


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_an_inverted_scale_misses_the_bound_by_far(name: str) -> None:
    """The scales of one expert."""
    model = CHECKPOINTS[name]()
    expected = exact_logits(model, 1)
    layer = next(iter(experts(model).values()))
    scales = layer.gate_up_proj_scales if hasattr(layer, "gate_up_proj_scales") else layer.gate_up_proj_scale_inv
    scales[1] = 254 - scales[1] if scales.dtype == torch.uint8 else 1.0 / scales[1]
    assert error(logits(model, 1), expected) > 10 * BOUND


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["FP8 blocks, mixtral", "FP8 with one scale", "MXFP4"])
def test_parts_are_those_of_the_decoded_whole(name: str, dtype: torch.dtype) -> None:
    """As transformers decodes it, rounded once to the model's dtype."""
    model = CHECKPOINTS[name]()
    for parameter in model.parameters():
        if parameter.dtype == torch.float32 and not any(parameter is each for module in model.modules() for each in _scales(module)):
            parameter.data = parameter.data.to(dtype)

    def rank(group: VirtualGroup) -> dict[str, Any]:
        mine = collogue.parallelize(copy.deepcopy(model), group, max_tokens=8)
        return {f"{name}.{each}": part for name, layer in experts(mine).items() for each, part in layer.named_parameters()}

    parts = run_virtual(3, rank)
    for name in experts(model):
        for each, whole in decoded_experts(model, name, model.config).named_parameters():
            mine = [part[f"{name}.{each}"] for part in parts]
            assert all(part.dtype == dtype for part in mine)
            if each == "down_proj_bias":
                assert torch.equal(mine[0], whole.to(dtype))
                assert not mine[1].any()
                continue
            (dim,) = [dim for dim in range(whole.ndim) if mine[0].shape[dim] != whole.shape[dim]]
            halves = 2 if each == "gate_up_proj" and model.config.model_type != "gpt_oss" else 1
            joined = [torch.cat(rows, dim) for rows in zip(*(part.chunk(halves, dim) for part in mine), strict=True)]
            assert torch.equal(torch.cat(joined, dim), whole.to(dtype))


def _scales(module: torch.nn.Module) -> list[Tensor]:
    return [parameter for name, parameter in module.named_parameters(recurse=False) if "scale" in name]


def test_experts_that_are_laid_out_for_a_product() -> None:
    """They are read by transformers' own way back; the layout itself is an imitation."""
    assert torch.equal(logits(mxfp4(laid_out=True), 2), logits(mxfp4(), 2))


def test_experts_with_power_of_two_scales() -> None:
    model = fine_grained(kind="qwen3_moe")
    for layer in experts(model).values():
        for each in ("gate_up_proj_scale_inv", "down_proj_scale_inv"):
            exponents = getattr(layer, each).log2().round()
            fill(layer, **{each: (2.0**exponents).to(torch.float8_e8m0fnu)})
    assert error(logits(model, 2), exact_logits(model, 2)) < BOUND


def test_gpt_oss_with_attention_quantized_on_load() -> None:
    model = mxfp4()
    expected = exact_logits(model, 1, Recipe.of("fp8_per_token", None))
    assert error(logits(model, 1, quant="fp8_per_token"), expected) < BOUND
    assert error(logits(model, 1), expected) > 0


@pytest.mark.parametrize("kind", EXPERT_SIZES)
def test_quantized_on_load(kind: str) -> None:
    model = small_model(kind, **SIZES | EXPERT_SIZES[kind])
    for name, world_size in (("fp8_block", 1), ("fp8_per_token", 2), ("mxfp8", 3)):
        if kind == "gpt_oss" and name == "fp8_block":
            continue
        expected = exact_logits(model, world_size, Recipe.of(name, None))
        assert error(logits(model, world_size, quant=name), expected) < BOUND


def test_latents_read_the_codes_of_the_norm(monkeypatch: pytest.MonkeyPatch) -> None:
    """Only what reads the latents, o_proj, and the shared expert of DeepSeek's layers quantize their inputs."""
    from collogue.pytorch import scaled

    model = small_model("deepseek_v3", **SIZES | EXPERT_SIZES["deepseek_v3"], num_hidden_layers=2)
    counted: list[int] = []
    original = scaled.quantize
    monkeypatch.setattr(scaled, "quantize", lambda x, quant: counted.append(x.shape[1]) or original(x, quant))

    def rank(group: VirtualGroup) -> None:
        mine = collogue.parallelize(copy.deepcopy(model), group, max_tokens=TOKENS.numel(), quant="fp8_per_token")
        attention = mine.model.layers[0].self_attn
        assert all(isinstance(getattr(attention, each), ScaledLinear.__mro__[1]) for each in ("q_a_proj", "kv_a_proj_with_mqa"))
        mine(TOKENS)

    run_virtual(1, rank)
    assert counted == [128, 128, 768, 128, 128, 768, 384, 384]


def test_latents_that_are_not_quantized_stay_as_they_are() -> None:
    model = small_model("deepseek_v3", **SIZES | EXPERT_SIZES["deepseek_v3"])

    def rank(group: VirtualGroup) -> None:
        mine = collogue.parallelize(copy.deepcopy(model), group, max_tokens=8)
        assert type(mine.model.layers[0].self_attn.q_a_proj) is torch.nn.Linear

    run_virtual(1, rank)


def test_compiled() -> None:
    model = fine_grained(kind="deepseek_v3")

    def rank(group: VirtualGroup) -> tuple[Tensor, Tensor]:
        mine = collogue.parallelize(copy.deepcopy(model), group, max_tokens=TOKENS.numel())
        with torch.no_grad():
            eager = mine(TOKENS, use_cache=False).logits
            return eager, torch.compile(mine, backend="eager", fullgraph=True)(TOKENS, use_cache=False).logits

    [(eager, compiled)] = run_virtual(1, rank)
    assert torch.equal(eager, compiled)


@pytest.mark.parametrize("name", ["FP8 blocks, deepseek_v3", "MXFP4"])
def test_generate(name: str) -> None:
    model = CHECKPOINTS[name]()

    def rank(group: VirtualGroup, cached: bool) -> Tensor:
        mine = collogue.parallelize(copy.deepcopy(model), group, max_tokens=64)
        found: Tensor = mine.generate(TOKENS[:1], max_new_tokens=4, do_sample=False, use_cache=cached)
        return found

    cached, whole = (run_virtual(2, functools.partial(rank, cached=cached)) for cached in (True, False))
    assert torch.equal(cached[0], cached[1])
    assert torch.equal(cached[0], whole[0])


def _lines(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.message for record in caplog.records if record.message.startswith("experts of ")]


def test_what_is_done_is_logged_in_one_line(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "collogue"):
        logits(small_model("qwen3_moe"), 1)
        assert _lines(caplog) == []
        logits(fine_grained(kind="qwen3_moe"), 1)
        logits(mxfp4(), 1)
        logits(small_model("qwen3_moe", **SIZES | EXPERT_SIZES["qwen3_moe"]), 1, quant="fp8_per_token")
    fp8, fp4, plain = _lines(caplog)
    # 4 experts of 3 * 384 * 768 weights are 13.5 MiB in float32; gpt-oss has them in 2 layers, and biases.
    assert fp8 == (
        "experts of 1 layer: FP8Block weights are decoded once, with keep_packed=True as well, and take 13.5 MiB on this rank in place of "
        "3.4 MiB; they are multiplied with inputs in torch.float32, which the checkpoint would quantize to FP8: no grouped product "
        "of codes is used here"
    )
    assert fp4 == (
        "experts of 2 layers: MXFP4 weights are decoded once, with keep_packed=True as well, and take 27.1 MiB on this rank in place of "
        "3.6 MiB; they are multiplied with inputs in torch.float32: no grouped product of codes is used here"
    )
    assert plain == "experts of 1 layer: quant='fp8_per_token' leaves weights and inputs in torch.float32, 13.5 MiB on this rank"


# Checkpoints that transformers loads


def _loaded(folder: Path, method: str) -> Any:
    import transformers

    publish(folder, method)
    return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval().requires_grad_(False)


def test_fine_grained_experts_that_transformers_loads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a machine with a GPU it keeps them as they are; here it is told so."""
    from transformers.quantizers.quantizer_finegrained_fp8 import FineGrainedFP8HfQuantizer

    monkeypatch.setattr(FineGrainedFP8HfQuantizer, "validate_environment", lambda self, **options: None)
    model = _loaded(tmp_path, "fp8")
    assert all(is_quantized(layer) for layer in (*experts(model).values(), *linears(model).values()))
    for world_size in (1, 2, 3):
        assert error(logits(model, world_size), exact_logits(model, world_size)) < BOUND
    assert torch.equal(logits(model, 3), logits(fine_grained(kind="qwen3_moe"), 3))


def test_fine_grained_experts_that_transformers_has_dequantized(tmp_path: Path) -> None:
    model = _loaded(tmp_path, "fp8")
    assert not any(is_quantized(module) for module in model.modules())
    assert error(logits(model, 2), model(TOKENS).logits) < 1e-5


def test_experts_of_compressed_tensors(tmp_path: Path) -> None:
    """transformers decodes them as it loads them, and keeps the other layers' codes, which it would decode in the first forward pass."""
    pytest.importorskip("compressed_tensors")
    model = _loaded(tmp_path, "compressed-tensors")
    assert not any(is_quantized(layer) for layer in experts(model).values())
    assert all(is_quantized(layer) for layer in linears(model).values())
    for world_size in (1, 2, 3):
        assert error(logits(model, world_size), exact_logits(model, world_size)) < BOUND


def test_the_hook_that_decompresses_is_back_after_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("compressed_tensors")
    model = _loaded(tmp_path, "compressed-tensors")
    hooks = list(model._forward_pre_hooks.values())
    assert len(hooks) == 1

    def failing(*args: Any, **kwargs: Any) -> Any:
        raise MemoryError

    monkeypatch.setattr(parallel, "Boundaries", failing)
    with pytest.raises(MemoryError):
        run_virtual(1, lambda group: collogue.parallelize(model, group, max_tokens=8))
    assert list(model._forward_pre_hooks.values()) == hooks


# Errors


def _last(model: Any) -> Any:
    return list(experts(model).values())[-1]


def _set(name: str, change: Callable[[Tensor], Tensor]) -> Callable[[Any], None]:
    return lambda model: fill(_last(model), **{name: change(getattr(_last(model), name).detach().clone())})


def _zero(scales: Tensor) -> Tensor:
    scales[2, 0, 0] = 0.0
    return scales


def _method(name: str) -> Callable[[Any], None]:
    return lambda model: model.config.quantization_config.update(quant_method=name)


def _smaller(model: Any) -> None:
    model.config.moe_intermediate_size = 384


FP8, FP4 = functools.partial(fine_grained, kind="qwen3_moe"), mxfp4
BAD: dict[str, tuple[Callable[[], Any], Callable[[Any], Any], type[CollogueError], str]] = {
    "a tensor more": (FP8, lambda m: fill(_last(m), zero_point=torch.ones(4)), ArgumentError, r"experts has .*: also zero_point"),
    "no scales": (FP8, lambda m: delattr(_last(m), "down_proj_scale_inv"), ArgumentError, "experts has .*: no down_proj_scale_inv"),
    "no blocks": (FP4, lambda m: delattr(_last(m), "gate_up_proj_blocks"), ArgumentError, "experts has .*: no gate_up_proj_blocks"),
    "no bias": (FP4, lambda m: delattr(_last(m), "down_proj_bias"), ArgumentError, r"experts has no down_proj_bias \[4, 384\]"),
    "other method": (FP4, _method("gptq"), ArgumentError, "experts: experts quantized by 'gptq' are not known"),
    "scales of another shape": (FP8, _set("gate_up_proj_scale_inv", lambda s: s[:, :5]), ShapeError, r"experts\.gate_up_proj: .*\(5, 3\)"),
    "scales of too few experts": (FP8, _set("down_proj_scale_inv", lambda s: s[:3]), ShapeError, r"down_proj: .*\[3, 3, 6\] are not of 4"),
    "blocks of another group": (FP4, _set("down_proj_scales", lambda s: s[:, :, ::2]), ShapeError, r"experts\.down_proj: .*\(384, 12\)"),
    "scales that are not positive": (FP8, _set("gate_up_proj_scale_inv", _zero), ScaleError, "experts.gate_up_proj: .*not positive"),
    "integers": (FP8, _set("down_proj", lambda w: w.view(torch.int8)), ArgumentError, "down_proj: weights of torch.int8 are not known"),
    "E4M3 scales": (
        FP4,
        _set("down_proj_scales", lambda s: s.view(torch.float8_e4m3fn)),
        ArgumentError,
        "down_proj: there is no weight_scale_2",
    ),
    "another size": (FP8, _smaller, ShapeError, r"gate_up_proj: each expert's weight is \[1536, 384\], the model's \[768, 384\]"),
    "parallel already": (FP8, lambda m: setattr(_last(m), "_is_expert_parallel", True), ArgumentError, "experts that are parallel"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_checkpoints_change_nothing(case: str) -> None:
    build, change, error_type, match = BAD[case]
    model = build()
    change(model)
    modules, tensors = dict(model.named_modules()), dict(model.named_parameters())
    for world_size in (1, 2):

        def rank(group: VirtualGroup) -> None:
            with pytest.raises(error_type, match=match) as caught:
                collogue.parallelize(model, group, max_tokens=8)
            assert caught.value.hint

        run_virtual(world_size, rank)
    assert dict(model.named_modules()) == modules
    assert {name: id(tensor) for name, tensor in model.named_parameters()} == {name: id(tensor) for name, tensor in tensors.items()}


def test_parts_that_end_inside_a_block(monkeypatch: pytest.MonkeyPatch) -> None:
    """Three blocks among two ranks: found before anything is changed."""
    monkeypatch.setattr(parallel, "_apply", lambda *given: pytest.fail("a model that does not divide was changed"))
    for kind, build, size, match in (
        (
            "qwen3_moe",
            FP8,
            {"moe_intermediate_size": 384},
            r"experts\.gate_up_proj: 384 features in 2 parts do not end at blocks of 128",
        ),
        ("gpt_oss", FP4, {"intermediate_size": 96}, r"experts\.down_proj: 96 features in 2 parts do not end at blocks of 32"),
    ):
        monkeypatch.setitem(EXPERT_SIZES, kind, size)
        model = build()
        with pytest.raises(ShapeError, match=match):
            run_virtual(2, lambda group, model=model: collogue.parallelize(copy.deepcopy(model), group, max_tokens=8))


def test_a_quantized_layer_that_stays_whole() -> None:
    model = fine_grained(kind="qwen2_moe")
    gate = model.model.layers[1].mlp.shared_expert_gate
    gate.weight.data = gate.weight.data.to(torch.float8_e4m3fn)
    with pytest.raises(ArgumentError, match=r"layers\.1\.mlp\.shared_expert_gate is quantized, and stays whole"):
        run_virtual(1, lambda group: collogue.parallelize(model, group, max_tokens=8))


def test_a_latent_that_is_not_quantized_beside_one_that_is() -> None:
    from quantized_models import put

    model = fine_grained(kind="deepseek_v3")
    put(model, "model.layers.1.self_attn.q_a_proj", torch.nn.Linear(384, 128, bias=False))
    with pytest.raises(ArgumentError, match=r"different formats: .*q_a_proj none"):
        run_virtual(1, lambda group: collogue.parallelize(model, group, max_tokens=8))


def test_quantized_experts_are_quantized_already() -> None:
    with pytest.raises(ArgumentError, match="quantized already"):
        run_virtual(1, lambda group: collogue.parallelize(FP8(), group, quant="fp8_per_token"))


@pytest.mark.parametrize("name", ["FP8 blocks, deepseek_v3", "MXFP4"])
def test_an_error_while_the_model_is_cut(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The experts that were replaced are back, and what is around them."""
    model = CHECKPOINTS[name]()
    modules = dict(model.named_modules())

    def failing(*args: Any, **kwargs: Any) -> Any:
        raise MemoryError

    monkeypatch.setattr(parallel, "Boundaries", failing)
    with pytest.raises(MemoryError):
        run_virtual(1, lambda group: collogue.parallelize(model, group, max_tokens=8))
    assert dict(model.named_modules()) == modules


def test_state_dictionaries_are_errors() -> None:
    def rank(group: VirtualGroup) -> None:
        mine = collogue.parallelize(mxfp4(), group, max_tokens=8)
        with pytest.raises(ArgumentError, match=r"state_dict\(\) of a parallel model|state dictionaries of a quantized parallel model"):
            mine.state_dict()
        with pytest.raises(ArgumentError, match="state dictionaries of a quantized parallel model"):
            collogue.full_state_dict(mine)

    for world_size in (1, 2):
        run_virtual(world_size, rank)


def test_experts_are_read_by_the_published_layout() -> None:
    layer = _last(mxfp4())
    shapes = {"gate_up_proj": torch.Size([4, 384, 1536]), "down_proj": torch.Size([4, 768, 384])}
    found = read_experts(layer, "experts", "mxfp4", shapes, transposed=True)
    assert [(each, weights.label, weights.weights[0].shape) for each, weights in found.items()] == [
        ("gate_up_proj", "MXFP4", (1536, 384)),
        ("down_proj", "MXFP4", (384, 768)),
    ]
    assert found["down_proj"].nbytes == 4 * 384 * (768 // 2 + 768 // 32)

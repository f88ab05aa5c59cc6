"""Quantized linear layers and models on GPUs: the hardware's products, kernels that quantize, CUDA graphs, generation."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from models import small_model
from quantized_models import SIZES, calibrated, exact_logits, experts, fine_grained, modelopt, mxfp4
from quantized_models import TOKENS as PROMPTS
from samples import PAIRS
from torch import nn

import collogue
from collogue.calls.product import ScaledProduct
from collogue.errors import ScaleError
from collogue.nn import QuantizedWeight, ScaledLinear
from collogue.pytorch import products
from collogue.pytorch.recipes import RECIPES, Recipe
from collogue.testing import VirtualGroup, run_virtual

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU"), pytest.mark.timeout(300)]

IN, OUT = 1024, 768
#: Of the sum of the terms' sizes: tensor cores add FP8 products with 13 bits or more, and decoded weights are multiplied in bfloat16.
SUM, RESULT = 2.0**-9, 2.0**-8


@pytest.mark.parametrize("tokens", [1, 3, 4, 64, 200])
@pytest.mark.parametrize("name", PAIRS)
def test_products(name: str, tokens: int) -> None:
    """Of the tensor that a call quantizes, and of the tensor that the layer quantizes: the same, and near float64's."""
    torch.manual_seed(tokens)
    weight, quant = PAIRS[name]
    linear = nn.Linear(IN, OUT, dtype=torch.bfloat16, device="cuda:0")
    layer = ScaledLinear.of(linear, weight, activation=quant)
    x = torch.randn(tokens, IN, device="cuda").bfloat16()
    values, found = x.double(), layer(x)
    if quant is not None:
        codes, scales = collogue.quantize(x, quant)
        values = collogue.dequantize(codes, scales, quant, hidden_size=IN).double()
        assert torch.equal(layer(collogue.Output(codes=codes, scales=scales)), found)
    assert layer.quantized_weight is not None
    matrix = layer.quantized_weight.decode().double()
    exact = values @ matrix.t() + layer.bias.double()
    bound = SUM * (values.abs() @ matrix.abs().t()) + RESULT * exact.abs()
    error = (found.double() - exact).abs()
    assert bool((error <= bound).all()), float((error / bound).max())


@pytest.mark.skipif(torch.cuda.is_available() and torch.cuda.get_device_capability() < (9, 0), reason="no such product")
def test_a_float32_bias_is_added_before_few_rows_are_rounded() -> None:
    linear = nn.Linear(IN, 4096, dtype=torch.float32, device="cuda:0")
    weight = QuantizedWeight.of(linear.weight, collogue.FP8PerToken())
    layer = ScaledLinear(weight, linear.bias.detach(), activation=collogue.FP8PerToken(), dtype=torch.bfloat16)
    exact = ScaledLinear(weight, linear.bias.detach(), activation=collogue.FP8PerToken(), dtype=torch.float32)
    quantized = collogue.Output(
        **dict(zip(("codes", "scales"), collogue.quantize(torch.randn(7, IN, device="cuda"), collogue.FP8PerToken()), strict=True))
    )
    assert torch.equal(layer(quantized), exact(quantized).bfloat16())


@pytest.mark.skipif(torch.cuda.is_available() and torch.cuda.get_device_capability() < (9, 0), reason="no such product")
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_few_rows_have_the_bits_of_a_scaled_float32_product(dtype: torch.dtype, bias: bool) -> None:
    """And are near PyTorch's row-wise product, which more rows take."""
    one, by_tensor = torch.ones(1, device="cuda"), torch.nn.functional.ScalingType.TensorWise
    for rows, width in ((1, 4096), (7, 6144), (64, 28672), (128, OUT)):
        linear = nn.Linear(IN, width, bias=bias, dtype=dtype, device="cuda:0")
        layer = ScaledLinear.of(linear, collogue.FP8PerToken(), activation=collogue.FP8PerToken())
        assert "float32 result" in layer.explain()
        x = torch.randn(128, IN, device="cuda").to(dtype)[:rows]
        codes, scales = collogue.quantize(x, collogue.FP8PerToken())
        product = torch.nn.functional.scaled_mm(codes, layer.weight.t(), one, by_tensor, one, by_tensor, output_dtype=torch.float32)
        found = layer(x)
        assert scales is not None
        assert layer.weight_scale is not None
        expected = ScaledProduct(product, scales, layer.weight_scale, layer.bias, dtype).values()
        assert torch.equal(found, expected), (rows, width)
        before, products.FEW_ROWS = products.FEW_ROWS, 0
        try:
            by_rows = layer(x)
        finally:
            products.FEW_ROWS = before
        assert float((by_rows.double() - expected.double()).norm() / expected.double().norm()) < 2.0**-6


@pytest.mark.parametrize("quant", [pair[1] for pair in PAIRS.values() if pair[1] is not None], ids=lambda quant: quant.label)
def test_quantize_has_the_bits_of_the_contract(quant: collogue.Quant) -> None:
    for tokens, width in ((1, 128), (7, 384), (64, 7168), (129, 1024)):
        x = torch.randn(tokens, width, generator=torch.Generator().manual_seed(tokens)).bfloat16()
        expected, found = collogue.quantize(x, quant), collogue.quantize(x.cuda(), quant)
        for a, b in zip(expected, found, strict=True):
            assert (a is None) == (b is None)
            assert a is None or torch.equal(a.view(torch.uint8), b.cpu().view(torch.uint8))  # type: ignore[union-attr]


def logits(model: Any, device: str, **options: Any) -> torch.Tensor:
    """Of a world of one, in bfloat16 but for codes and scales."""

    def rank(group: VirtualGroup) -> torch.Tensor:
        mine = copy.deepcopy(model)
        for name, tensor in mine.named_parameters():
            if tensor.dtype == torch.float32 and "scale" not in name:
                tensor.data = tensor.data.bfloat16()
        mine = collogue.parallelize(mine, group, max_tokens=PROMPTS.numel(), timeout=30.0, **options)
        with torch.inference_mode():
            found: torch.Tensor = mine(PROMPTS.to(device), use_cache=False).logits
        mine.comm.check()
        return found.double().cpu()

    return run_virtual(1, rank, device=device, timeout=120.0)[0]


def near(model: Any, recipe: Recipe | None = None, **options: Any) -> None:
    """A GPU is as far from float64 as the CPU is: bfloat16's roundings move inputs to other codes, on both."""
    exact = exact_logits(model, 1, recipe)
    on_cpu, on_gpu = ((logits(model, device, **options) - exact).norm() / exact.norm() for device in ("cpu", "cuda:0"))
    assert float(on_gpu) <= 1.5 * float(on_cpu) < 0.6


MODELS: dict[str, Callable[[], Any]] = {
    "fine-grained": fine_grained,
    "modelopt FP8": lambda: modelopt(False),
    "modelopt NVFP4": lambda: modelopt(True),
    "fine-grained, experts": lambda: fine_grained(kind="mixtral"),
    "MXFP4, experts": mxfp4,
}


@pytest.mark.parametrize("name", MODELS)
def test_checkpoints(name: str) -> None:
    near(MODELS[name]())


@pytest.mark.parametrize("name", ["fine-grained, experts", "MXFP4, experts"])
def test_experts_decode_to_the_same_bits(name: str) -> None:
    """On the CPU, and where the checkpoint lies on a GPU."""
    model = MODELS[name]()

    def rank(group: VirtualGroup) -> list[torch.Tensor]:
        found = []
        for given in (copy.deepcopy(model), copy.deepcopy(model).cuda()):
            mine = collogue.parallelize(given, group, max_tokens=PROMPTS.numel(), timeout=30.0)
            found.append([part.cpu() for layer in experts(mine).values() for part in layer.parameters()])
        assert len(found[0]) >= 4
        return [torch.tensor(torch.equal(*parts)) for parts in zip(*found, strict=True)]

    assert all(run_virtual(1, rank, device="cuda:0", timeout=120.0)[0])


def calibration(quant: str, model: Any) -> dict[str, Any]:
    return {"calibration": calibrated(model)} if quant in ("fp8_static", "nvfp4") else {}


@pytest.mark.parametrize("quant", RECIPES)
def test_quantized_on_load(quant: str) -> None:
    model = small_model("llama", **SIZES)
    options = calibration(quant, model)
    near(model, Recipe.of(quant, options.get("calibration")), quant=quant, **options)


@pytest.mark.parametrize("quant", RECIPES)
def test_graphs_and_text(quant: str) -> None:
    model = small_model("llama", **SIZES)
    options = calibration(quant, model)

    def rank(group: VirtualGroup) -> None:
        mine = collogue.parallelize(copy.deepcopy(model).cuda().bfloat16(), group, max_tokens=64, quant=quant, timeout=30.0, **options)
        tokens = PROMPTS.cuda()
        with torch.inference_mode():
            eager = mine(tokens, use_cache=False).logits
            stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
            with torch.cuda.stream(stream):
                mine(tokens, use_cache=False)
            stream.synchronize()
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, stream=stream):
                logits = mine(tokens, use_cache=False).logits
            logits.zero_()
            graph.replay()
            torch.cuda.synchronize()
            assert torch.equal(logits, eager)
            text = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False, "attention_mask": torch.ones_like(tokens)}
            dynamic = mine.generate(tokens, **text)
            assert torch.equal(dynamic, mine.generate(tokens, **text))
            assert mine.generate(tokens, cache_implementation="static", disable_compile=True, **text).shape == dynamic.shape

    run_virtual(1, rank, device="cuda:0", timeout=240.0)


def test_the_layer_names_its_product() -> None:
    linear = nn.Linear(IN, OUT, dtype=torch.bfloat16, device="cuda:0")
    by_hardware = torch.cuda.get_device_capability()[0] == 9
    for name in ("tensor", "channel", "block"):
        text = ScaledLinear.of(linear, PAIRS[name][0], activation=PAIRS[name][1]).explain()
        assert ("scaled_mm" in text) == by_hardware, text


def test_scales_on_a_gpu_are_read_on_load() -> None:
    """Where a layer is called they are not: that would wait for the GPU."""
    model = fine_grained().cuda()
    model.model.layers[1].self_attn.k_proj.weight_scale_inv.data[0, 1] = torch.nan
    with pytest.raises(ScaleError, match=r"layers\.1\.self_attn\.k_proj: .*not positive"):
        run_virtual(1, lambda group: collogue.parallelize(model, group, max_tokens=8), device="cuda:0", timeout=120.0)

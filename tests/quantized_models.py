"""Tiny quantized models, as libraries make them or by the published layout, and what they compute in float64."""

from __future__ import annotations

import copy
from typing import Any

import torch
from models import small_model
from torch import Tensor, nn

import collogue
from collogue.contract.weight import QuantizedWeight
from collogue.pytorch.checkpoints import QuantizedLinear, read, shared_input
from collogue.pytorch.recipes import Recipe

#: Heads, features and blocks of scales divide among 1, 2 and 3 ranks.
SIZES = {"hidden_size": 384, "intermediate_size": 768, "num_attention_heads": 6, "num_key_value_heads": 6, "head_dim": 128}
TOKENS = torch.randint(1, 128, (2, 9), generator=torch.Generator().manual_seed(1))
GROUPS = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))
ROWS = ("o_proj", "down_proj")


def linears(model: Any) -> dict[str, nn.Module]:
    """The linear layers inside decoder layers, by name."""
    last = (*ROWS, *GROUPS[0], *GROUPS[1], "qkv_proj", "gate_up_proj")
    return {name: module for name, module in model.named_modules() if name.rpartition(".")[2] in last}


def calibrated(model: Any) -> collogue.Calibration:
    """The amax of every input, over the tokens of the tests."""
    seen = collogue.Calibration()
    hooks = [
        module.register_forward_hook(lambda _, given, __, name=name: seen.observe(name, given[0]))
        for name, module in linears(model).items()
    ]
    model(TOKENS)
    for hook in hooks:
        hook.remove()
    return seen


def put(model: Any, name: str, module: nn.Module) -> None:
    """``module`` in the place of the one called ``name``."""
    owner, _, last = name.rpartition(".")
    setattr(model.get_submodule(owner), last, module)


def compressed(preset: str) -> Any:
    """A Llama that compressed-tensors has quantized and compressed."""
    import compressed_tensors.quantization as quantization
    from compressed_tensors.compressors import compress_module

    model = small_model("llama", **SIZES)
    seen = calibrated(model)
    config = quantization.QuantizationConfig(config_groups={preset: ["Linear"]}, ignore=["lm_head"])
    quantization.apply_quantization_config(model, config, show_progress=False)
    for name, linear in linears(model).items():
        fill_scales(linear, preset, seen.amax[name])
        compress_module(linear)
    model.config.quantization_config = {"quant_method": "compressed-tensors"}
    return model


@torch.no_grad()
def fill_scales(linear: Any, preset: str, input_amax: float) -> None:
    """What a calibration would put into compressed-tensors' parameters."""
    weight, scale = linear.weight, linear.weight_scale
    rows, columns = (scale.shape[0], scale.shape[1]) if scale.ndim == 2 else (1, 1)
    amax = weight.view(rows, weight.shape[0] // rows, columns, weight.shape[1] // columns).abs().amax((1, 3)).view(scale.shape)
    if preset.startswith("NVFP4"):
        linear.weight_global_scale.fill_(448 * 6 / weight.abs().max())
        scale.copy_((amax / 6 * linear.weight_global_scale).to(torch.float8_e4m3fn).float())
        if hasattr(linear, "input_global_scale"):
            linear.input_global_scale.fill_(448 * 6 / input_amax)
    elif preset.startswith("MX"):
        scale.copy_(2.0 ** torch.floor(torch.log2(amax)) / (4 if "FP4" in preset else 256))
    else:
        scale.copy_(amax / 448)
        if getattr(linear, "input_scale", None) is not None:
            linear.input_scale.fill_(input_amax / 448)


def fine_grained(dynamic: bool = True) -> Any:
    """A Llama with transformers' own FP8 layers: blocks, or one scale and a static input scale."""
    from transformers.integrations.finegrained_fp8 import FP8Linear

    model = small_model("llama", **SIZES)
    seen = calibrated(model)
    recipe = Recipe.of("fp8_block", None) if dynamic else Recipe.of("fp8_static", seen)
    for name, linear in linears(model).items():
        quantized = recipe.quantize(linear.weight, name)
        layer = FP8Linear(*linear.weight.shape[::-1], (128, 128) if dynamic else None, "dynamic" if dynamic else "static")
        layer.weight.data = quantized.weight.codes
        layer.weight_scale_inv.data = _scale(quantized.weight)
        if not dynamic:
            layer.activation_scale.data = torch.tensor(quantized.activation.scale)  # type: ignore[union-attr]
        put(model, name, layer)
    model.config.quantization_config = {"quant_method": "fp8"}
    return model


def _scale(weight: QuantizedWeight) -> Tensor:
    return torch.tensor(float(weight.format.scale)) if weight.scales is None else weight.scales  # type: ignore[union-attr]


def modelopt(fp4: bool) -> Any:
    """A Llama in ModelOpt's published layout."""
    model = small_model("llama", **SIZES)
    recipe = Recipe.of("nvfp4" if fp4 else "fp8_static", calibrated(model))
    for name, linear in linears(model).items():
        quantized: Any = recipe.quantize(linear.weight, name)
        tensors = {"weight": quantized.weight.codes, "weight_scale": _scale(quantized.weight)}
        if fp4:
            tensors["weight_scale_2"] = torch.tensor(1 / quantized.weight.format.global_scale)
            tensors["input_scale"] = torch.tensor(1 / quantized.activation.global_scale)
        else:
            tensors["input_scale"] = torch.tensor(quantized.activation.scale)
        layer = nn.Module()
        for each, tensor in tensors.items():
            layer.register_parameter(each, nn.Parameter(tensor, False))
        put(model, name, layer)
    model.config.quantization_config = {"quant_method": "modelopt"}
    return model


class _Exact(nn.Module):
    """The product of what is stored, in float64; a row-parallel layer quantizes each rank's part of its input."""

    def __init__(self, quantized: QuantizedLinear, parts: int, bias: Tensor | None) -> None:
        super().__init__()
        self.activation, self.parts = quantized.activation, parts
        self.weight = quantized.weight.decode().double()
        self.bias = None if bias is None else bias.double()

    def forward(self, x: Tensor) -> Tensor:
        total: Any = 0.0 if self.bias is None else self.bias
        for values, weight in zip(x.chunk(self.parts, -1), self.weight.chunk(self.parts, -1), strict=True):
            rows = values.reshape(-1, values.shape[-1])
            if self.activation is not None:
                codes = collogue.quantize(rows.float(), self.activation)
                rows = collogue.dequantize(*codes, self.activation, hidden_size=rows.shape[1]).double()
            total = total + (rows @ weight.t()).view(*x.shape[:-1], -1)
        return total


def exact_logits(model: Any, parts: int, recipe: Recipe | None = None) -> Tensor:
    """The unsharded model's logits in float64, with every quantized layer decoded and multiplied."""
    method = None if recipe is not None else model.config.quantization_config["quant_method"]
    found = {
        name: read(linear, name, method) if recipe is None else recipe.quantize(linear.weight, name)
        for name, linear in linears(model).items()
    }
    plain = copy.deepcopy(model)
    for name, quantized in found.items():
        owner, _, last = name.rpartition(".")
        group = next(({f"{owner}.{each}": found[f"{owner}.{each}"] for each in group} for group in GROUPS if last in group), {})
        shared = quantized if not group else QuantizedLinear(quantized.weight, shared_input(group))
        bias = getattr(model.get_submodule(name), "bias", None)
        put(plain, name, _Exact(shared, parts if last in ROWS else 1, bias))
    if hasattr(plain.config, "num_experts"):
        plain.set_experts_implementation("batched_mm")  # transformers' default has no float64
    return plain.double()(TOKENS).logits

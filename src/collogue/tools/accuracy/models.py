"""The models that accuracy is measured on: SmolLM2-135M, and random weights with outlier channels."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from collogue.tools.demo import text
from collogue.tools.demo.weights import ModelShape, Weights, read_model


@dataclass(frozen=True)
class Model:
    """Weights by their transformers names (float32), tokens ``[T]`` to evaluate, and other tokens ``[C]`` to calibrate with."""

    name: str
    shape: ModelShape
    weights: Weights
    tokens: torch.Tensor
    calibration: torch.Tensor


def smollm2(tokens: int, calibration: int) -> Model:
    """SmolLM2-135M on the demo's texts (Python's language reference; docstrings). Raises ``PlatformError`` without the package."""
    model, tokenizer = read_model()

    def encode(string: str, limit: int) -> torch.Tensor:
        ids: torch.Tensor = tokenizer(string[: 16 * limit + 1024], return_tensors="pt").input_ids[0, :limit]
        return ids

    weights = {name: tensor.detach() for name, tensor in model.state_dict().items()}
    return Model(
        "SmolLM2-135M",
        ModelShape.of(model.config),
        weights,
        encode(text.evaluation_text(), tokens),
        encode(text.calibration_text(), calibration),
    )


def random_shape(layers: int, hidden_size: int) -> ModelShape:
    """A Llama whose sharded sizes divide by 1, 2, 3, 4, 6 and 12."""
    intermediate = -(-hidden_size * 8 // 3 // 96) * 96
    return ModelShape(layers, hidden_size, intermediate, 12, 12, 64, 12 * 256, 1e-5, 10000.0)


def random_model(shape: ModelShape, tokens: int, calibration: int, *, outliers: int = 4, outlier: float = 30.0, seed: int = 0) -> Model:
    """Weights of variance ``1 / fan-in``; ``outliers`` channels of every norm's weight are ``outlier`` times as large.

    Outlier channels are what makes activations of large models hard to quantize. Tokens are random, so the perplexity says nothing,
    but logit errors and agreement do.
    """
    generator = torch.Generator().manual_seed(seed)

    def normal(*size: int, scale: float) -> torch.Tensor:
        return torch.randn(*size, generator=generator) * scale

    h, i, heads = shape.hidden_size, shape.intermediate_size, shape.heads * shape.head_dim
    kv = shape.kv_heads * shape.head_dim
    weights = {"model.embed_tokens.weight": normal(shape.vocab_size, h, scale=1.0)}
    channels = torch.randperm(h, generator=generator)[:outliers]

    def norm() -> torch.Tensor:
        weight = 1.0 + normal(h, scale=0.1)
        weight[channels] *= outlier
        return weight

    for layer in range(shape.layers):
        prefix = f"model.layers.{layer}."
        for name, rows, columns in (("q", heads, h), ("k", kv, h), ("v", kv, h), ("o", h, heads)):
            weights[f"{prefix}self_attn.{name}_proj.weight"] = normal(rows, columns, scale=columns**-0.5)
        for name, rows, columns in (("gate", i, h), ("up", i, h), ("down", h, i)):
            weights[f"{prefix}mlp.{name}_proj.weight"] = normal(rows, columns, scale=columns**-0.5)
        weights |= {f"{prefix}{name}_layernorm.weight": norm() for name in ("input", "post_attention")}
    weights["model.norm.weight"] = last = norm()
    # Logits of about the size that a trained model's have.
    weights["lm_head.weight"] = normal(shape.vocab_size, h, scale=3.0 / float(last.norm()))
    ids = torch.randint(shape.vocab_size, (tokens + calibration,), generator=generator)
    title = f"random, {shape.layers} layers of {h}, {outliers} outlier channels x {outlier:g}"
    return Model(title, shape, weights, ids[:tokens], ids[tokens:])

"""Stacks of decoder layers with published shapes and random FP8 weights: what ``collogue bench model`` runs.

A layer is two blocks, attention and MLP. A block takes FP8 codes with their scale, and gives this rank's partial sum; what lies between
two blocks (all-reduce, residual, RMSNorm, quantization) is the benchmark's subject and stands in ``variants``. Scales are divisors:
one static scale, as FP8 checkpoints mostly have it, or one for each token.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from collogue.contract.quant import E4M3_MAX, SMALLEST_SCALE, FP8PerToken, FP8Static, Quant

EPS = 1e-6
#: Cached tokens of every sequence in a decode step.
CONTEXT = 1024
#: Divisor of every activation's codes: values up to 8 fit.
ACTIVATION_SCALE = 8.0 / E4M3_MAX


@dataclass(frozen=True)
class Shape:
    """A model's published widths. ``low_rank``: DeepSeek's query and key-value ranks (with the rotary part) instead of one projection.

    ``vocabulary``: where the model is run from tokens to tokens (:mod:`collogue.tools.bench.decoder`). ``head_norms``: of queries and keys.
    """

    name: str
    layers: int
    hidden_size: int
    intermediate_size: int
    heads: int
    kv_heads: int
    head_dim: int
    low_rank: tuple[int, int] | None = None
    vocabulary: int = 0
    head_norms: bool = False


SHAPES = {
    s.name: s
    for s in (
        Shape("llama-3.1-8b", 32, 4096, 14336, 32, 8, 128, vocabulary=128256),
        Shape("qwen3-8b", 36, 4096, 12288, 32, 8, 128, vocabulary=151936, head_norms=True),
        Shape("llama-3.1-70b", 80, 8192, 28672, 64, 8, 128),
        Shape("qwen3-32b", 64, 5120, 25600, 64, 8, 128),
        # 128 heads of 128 + 64; queries through 1536, keys and values through 512 + 64. Projections only: no attention core.
        Shape("deepseek-v3-dense", 61, 7168, 18432, 128, 128, 192, (1536, 576)),
        Shape("deepseek-v3-shared", 61, 7168, 2048, 128, 128, 192, (1536, 576)),
        Shape("tiny", 2, 64, 96, 4, 4, 16),
        Shape("small", 2, 128, 256, 4, 2, 64, vocabulary=256, head_norms=True),
    )
}


@dataclass(frozen=True)
class Linear:
    """``[O, I]`` E4M3 codes and their scale: ``[1]``, or ``[1, O]`` where activations have scales of their own."""

    codes: Tensor
    scale: Tensor

    @classmethod
    def random(cls, outputs: int, inputs: int, generator: torch.Generator, *, rowwise: bool = False) -> Linear:
        """Weights of variance ``1 / I``, as far as E4M3 holds them."""
        codes = torch.randn(outputs, inputs, device=generator.device, generator=generator, dtype=torch.bfloat16)
        scale = torch.full((1, outputs) if rowwise else (1,), inputs**-0.5, device=generator.device)
        return cls(codes.to(torch.float8_e4m3fn), scale)


def activation_scale(device: torch.device) -> Tensor:
    """The static scale of all activations, ``[1]`` float32."""
    return torch.full((1,), ACTIVATION_SCALE, device=device)


def matmul(codes: Tensor, scale: Tensor, weight: Tensor, weight_scale: Tensor) -> Tensor:
    """``[T, I]`` codes with scales ``[1]`` or ``[T, 1]`` times a :class:`Linear`: ``[T, O]`` bfloat16."""
    if codes.device.type == "cpu":  # the tests' way: right, not fast
        return ((codes.float() * scale) @ (weight.float() * weight_scale.t()).t()).bfloat16()
    return torch._scaled_mm(codes, weight.t(), scale, weight_scale, out_dtype=torch.bfloat16, use_fast_accum=True)


#: ``quantize(n, static scale) -> codes, their scale``, in FP8 as models write it.
Quantize = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]


def static(n: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    """One scale for all, which is given."""
    return (n.float() * (1.0 / scale)).clamp(-E4M3_MAX, E4M3_MAX).to(torch.float8_e4m3fn), scale


def per_token(n: Tensor, _: Tensor) -> tuple[Tensor, Tensor]:
    """A scale for each row."""
    wide = n.float()
    scale = (wide.abs().amax(-1, keepdim=True) / E4M3_MAX).clamp(min=SMALLEST_SCALE)
    return (wide / scale).clamp(-E4M3_MAX, E4M3_MAX).to(torch.float8_e4m3fn), scale


@dataclass(frozen=True)
class Activations:
    """How activations become FP8: as models write it, and as the communicator is asked, both with the static scale in hand.

    ``rowwise``: weights then have a scale for each output, as torch's GEMM asks.
    """

    quantize: Quantize
    quant: Callable[[Tensor], Quant]
    rowwise: bool


STATIC = Activations(static, FP8Static, rowwise=False)
#: By name.
ACTIVATIONS = {"static": STATIC, "token": Activations(per_token, lambda scale: FP8PerToken(), rowwise=True)}


@dataclass(frozen=True)
class Block:
    """One rank's attention or MLP of one layer: ``forward(codes, scale, *tensors)`` with the weights among ``tensors``."""

    kind: str
    norm: Tensor
    tensors: tuple[Tensor, ...]


def attention(shape: Shape, prefill: bool, quantize: Quantize, codes: Tensor, scale: Tensor, *tensors: Tensor) -> Tensor:
    """``[T, H]`` partial. ``shape`` is this rank's. In a decode step every row is a sequence with :data:`CONTEXT` cached tokens."""
    tokens = codes.shape[0]
    if shape.low_rank is not None:
        down, down_s, query, query_s, both, both_s, out, out_s = tensors
        low = matmul(codes, scale, down, down_s)
        q = matmul(*quantize(low[:, : shape.low_rank[0]], scale), query, query_s)
        kv = matmul(*quantize(low[:, shape.low_rank[0] : shape.low_rank[0] + 512], scale), both, both_s)
        width = shape.heads * 128
        return matmul(*quantize(q[:, :width] + kv[:, :width], scale), out, out_s)
    qkv_w, qkv_s, out, out_s, keys, values = tensors
    q, k, v = torch.split(
        matmul(codes, scale, qkv_w, qkv_s), [n * shape.head_dim for n in (shape.heads, shape.kv_heads, shape.kv_heads)], dim=-1
    )
    if prefill:
        q, k, v = (x.view(1, tokens, -1, shape.head_dim).transpose(1, 2) for x in (q, k, v))
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True).transpose(1, 2)
    else:  # the new token's own key and value are computed by the projection, and not written to the cache
        mixed = F.scaled_dot_product_attention(q.reshape(tokens, -1, 1, shape.head_dim), keys, values, enable_gqa=True)
    return matmul(*quantize(mixed.reshape(tokens, -1), scale), out, out_s)


def mlp(quantize: Quantize, codes: Tensor, scale: Tensor, *tensors: Tensor) -> Tensor:
    """``[T, H]`` partial: ``down(silu(gate) * up)``."""
    up, up_s, down, down_s = tensors
    gate, value = matmul(codes, scale, up, up_s).chunk(2, -1)
    return matmul(*quantize(F.silu(gate) * value, scale), down, down_s)


def functions_of(shape: Shape, prefill: bool, quantize: Quantize = static) -> dict[str, Callable[..., Tensor]]:
    """What this rank's blocks do, by kind."""
    return {"attention": functools.partial(attention, shape, prefill, quantize), "mlp": functools.partial(mlp, quantize)}


def rank_shape(shape: Shape, world: int) -> Shape:
    """What one rank has of it."""
    kv_heads = max(1, shape.kv_heads // world)
    return replace(shape, heads=shape.heads // world, kv_heads=kv_heads, intermediate_size=shape.intermediate_size // world)


def make_blocks(
    shape: Shape, layers: int, tokens: int, *, prefill: bool, device: torch.device, seed: int, rowwise: bool = False
) -> list[Block]:
    """``2 * layers`` blocks of this rank's ``shape``. ``rowwise``: weights have a scale for each output."""
    generator = torch.Generator(device).manual_seed(seed)
    hidden, width = shape.hidden_size, shape.heads * shape.head_dim

    def linear(outputs: int, inputs: int) -> tuple[Tensor, Tensor]:
        made = Linear.random(outputs, inputs, generator, rowwise=rowwise)
        return made.codes, made.scale

    blocks = []
    for _ in range(layers):
        norm = torch.ones(hidden, device=device, dtype=torch.bfloat16)
        if shape.low_rank is not None:
            query, both = shape.low_rank
            low = (*linear(query + both, hidden), *linear(width, query), *linear(shape.heads * 256, 512))
            blocks.append(Block("attention", norm, (*low, *linear(hidden, shape.heads * 128))))
        else:
            cached = (tokens, shape.kv_heads, CONTEXT if device.type == "cuda" else 8, shape.head_dim)
            cache = torch.randn(1 if prefill else 2, *(1,) * 4 if prefill else cached, device=device, generator=generator).bfloat16()
            made = (*linear(width + 2 * shape.kv_heads * shape.head_dim, hidden), *linear(hidden, width))
            blocks.append(Block("attention", norm, (*made, cache[0], cache[-1])))
        inter = shape.intermediate_size
        blocks.append(Block("mlp", norm, (*linear(2 * inter, hidden), *linear(hidden, inter))))
    return blocks

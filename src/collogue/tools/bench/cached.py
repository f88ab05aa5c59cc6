"""Attention with a cache that grows: what ``collogue bench serving`` puts into the stack's attention blocks.

``keys`` and ``values`` are ``[rows, kv heads, length, head dim]``, one row for each running sequence. Models with low-rank projections
have no attention core in the stack, and so no cache.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from collogue.tools.bench.stack import Shape, matmul, static


def _heads(shape: Shape, codes: Tensor, scale: Tensor, weight: Tensor, weight_scale: Tensor) -> list[Tensor]:
    """Queries, keys and values, each ``[T, heads, head dim]``."""
    sizes = [n * shape.head_dim for n in (shape.heads, shape.kv_heads, shape.kv_heads)]
    parts = torch.split(matmul(codes, scale, weight, weight_scale), sizes, dim=-1)
    return [part.reshape(codes.shape[0], -1, shape.head_dim) for part in parts]


def prefill(shape: Shape, prompt_tokens: int, codes: Tensor, scale: Tensor, *tensors: Tensor) -> Tensor:
    """``[T, H]`` partial of whole prompts one behind the other; their keys and values go into the cache rows ``tensors[-1]``."""
    qkv, qkv_s, out, out_s, keys, values, into = tensors
    q, k, v = (x.view(-1, prompt_tokens, *x.shape[1:]).transpose(1, 2) for x in _heads(shape, codes, scale, qkv, qkv_s))
    into = into[: q.shape[0]]
    keys[into, :, :prompt_tokens] = k
    values[into, :, :prompt_tokens] = v
    mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True).transpose(1, 2)
    return matmul(*static(mixed.reshape(codes.shape[0], -1), scale), out, out_s)


def decode(shape: Shape, codes: Tensor, scale: Tensor, *tensors: Tensor) -> Tensor:
    """``[T, H]`` partial of one token for each of the first T cache rows, at the positions ``tensors[-1]``; it sees all up to there."""
    qkv, qkv_s, out, out_s, keys, values, positions = tensors
    tokens = codes.shape[0]
    q, k, v = _heads(shape, codes, scale, qkv, qkv_s)
    row, positions = torch.arange(tokens, device=codes.device), positions[:tokens]
    keys[row, :, positions] = k
    values[row, :, positions] = v
    seen = torch.arange(keys.shape[2], device=codes.device) <= positions[:, None]
    # The query heads of one key-value head stand where queries stand: all of them see the same.
    grouped = q.view(tokens, shape.kv_heads, -1, shape.head_dim)
    mixed = F.scaled_dot_product_attention(grouped, keys[:tokens], values[:tokens], attn_mask=seen[:, None, None, :])
    return matmul(*static(mixed.reshape(tokens, -1), scale), out, out_s)

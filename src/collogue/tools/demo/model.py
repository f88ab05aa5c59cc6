"""A Llama forward pass on one rank's shard, without a norm, a residual addition or a quantization of its own.

Column-parallel projections read the whole hidden state and give this rank's features; row-parallel projections read
those and give this rank's *term* of the hidden state. Between the two stands one fused call:

    partial -> comm.all_reduce(partial, residual=stream, norm=next norm, quant=format) -> what the next projection reads

The embedding is split by vocabulary, so its lookup is a partial too, and the first norm is fused like all others.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
import torch.nn.functional as F

from collogue import Output, Quant, RMSNorm, dequantize
from collogue.tools.demo.weights import ModelShape, Weights, columns, rows

#: Sees the index of a fused call and the norm that came out of it.
Observer = Callable[[int, torch.Tensor], None]
#: Gets the name of every row-parallel layer and this rank's part of its input.
RowObserver = Callable[[str, torch.Tensor], None]


class Sum(Protocol):
    """What the model asks of a :class:`collogue.Communicator`; `collogue.tools.accuracy` has others, which add in another order."""

    @property
    def rank(self) -> int: ...
    @property
    def world_size(self) -> int: ...
    @property
    def device(self) -> torch.device: ...
    @property
    def dtype(self) -> torch.dtype: ...

    def all_reduce(
        self, partial: torch.Tensor, *, residual: torch.Tensor | None = None, norm: RMSNorm | None = None, quant: Quant | None = None
    ) -> Output: ...


@dataclass(frozen=True)
class Layer:
    """One decoder layer's shard. Heads and intermediate features are split; both outputs are partial sums."""

    query: torch.Tensor  # [heads / N * D, H]
    key: torch.Tensor  # [kv_heads / N * D, H]
    value: torch.Tensor  # [kv_heads / N * D, H]
    output: torch.Tensor  # [H, heads / N * D]
    gate: torch.Tensor  # [I / N, H]
    up: torch.Tensor  # [I / N, H]
    down: torch.Tensor  # [H, I / N]


class Cache:
    """Keys and values of this rank's heads for the tokens so far."""

    def __init__(self, model: ShardedLlama, capacity: int) -> None:
        shape = (model.shape.layers, 2, model.kv_heads, capacity, model.shape.head_dim)
        self.data = torch.zeros(shape, dtype=model.comm.dtype, device=model.comm.device)
        self.length = 0

    def append(self, layer: int, key: torch.Tensor, value: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Store ``[kv_heads, T, D]`` behind the tokens so far; return all keys and values of the layer."""
        end = self.length + key.shape[1]
        self.data[layer, 0, :, self.length : end] = key
        self.data[layer, 1, :, self.length : end] = value
        return self.data[layer, 0, :, :end], self.data[layer, 1, :, :end]


class ShardedLlama:
    """One rank of a tensor-parallel Llama. On the CPU in float32 the shards are views of the shared weights.

    Args:
        gemm_dtype: what weights, rounded to the communicator's dtype, are kept in, and what matrix products are computed in; their
            results are rounded to the communicator's dtype, but for the logits. Default: that dtype. float32 is what a bfloat16 GEMM
            does that accumulates in float32, and on CPUs without bfloat16 units it is much faster.
    """

    def __init__(self, shape: ModelShape, weights: Weights, comm: Sum, gemm_dtype: torch.dtype | None = None) -> None:
        shape.check_world_size(comm.world_size)
        self.shape, self.comm = shape, comm
        self.heads = shape.heads // comm.world_size
        self.kv_heads = shape.kv_heads // comm.world_size

        def own(name: str, cut: Callable[[torch.Tensor, int, int], torch.Tensor]) -> torch.Tensor:
            return cut(weights[name], comm.rank, comm.world_size).to(comm.device, comm.dtype).to(gemm_dtype or comm.dtype)

        self.embedding = own("model.embed_tokens.weight", rows)  # [V / N, H]
        self.head = own("lm_head.weight", rows) if "lm_head.weight" in weights else self.embedding
        self.layers = [
            Layer(
                query=own(f"model.layers.{i}.self_attn.q_proj.weight", rows),
                key=own(f"model.layers.{i}.self_attn.k_proj.weight", rows),
                value=own(f"model.layers.{i}.self_attn.v_proj.weight", rows),
                output=own(f"model.layers.{i}.self_attn.o_proj.weight", columns),
                gate=own(f"model.layers.{i}.mlp.gate_proj.weight", rows),
                up=own(f"model.layers.{i}.mlp.up_proj.weight", rows),
                down=own(f"model.layers.{i}.mlp.down_proj.weight", columns),
            )
            for i in range(shape.layers)
        ]
        norms = [f"model.layers.{i}.{kind}_layernorm.weight" for i in range(shape.layers) for kind in ("input", "post_attention")]
        # Norm j is what fused call j computes: call 0 follows the embedding, the last call computes the final norm.
        self.norms = [RMSNorm(weights[name].to(comm.device, comm.dtype), shape.eps) for name in [*norms, "model.norm.weight"]]
        self.vocab_start = comm.rank * self.embedding.shape[0]
        steps = torch.arange(0, shape.head_dim, 2, dtype=torch.float32, device=comm.device)
        self.observe_rows: RowObserver = lambda name, part: None
        self.frequencies = 1.0 / (shape.rope_theta ** (steps / shape.head_dim))  # [D / 2]

    @torch.inference_mode()
    def forward(self, tokens: torch.Tensor, cache: Cache, quants: Sequence[Quant | None], observe: Observer | None = None) -> torch.Tensor:
        """Logits of this rank's part of the vocabulary, ``[T, V / N]``, for ``tokens`` ``[T]`` behind those in ``cache``.

        ``quants[j]`` is the format of fused call ``j``.
        """
        turn = self._rotation(cache.length, tokens.shape[0])
        normed, stream = self._finish(0, self._embed(tokens), None, quants, observe)
        for i, layer in enumerate(self.layers):
            partial = self._attention(i, layer, normed, turn, cache)
            normed, stream = self._finish(2 * i + 1, partial, stream, quants, observe)
            gated = F.silu(_linear(normed, layer.gate)) * _linear(normed, layer.up)
            self.observe_rows(f"model.layers.{i}.mlp.down_proj", gated)
            partial = _linear(gated, layer.down)
            normed, stream = self._finish(2 * i + 2, partial, stream, quants, observe)
        cache.length += tokens.shape[0]
        return F.linear(normed.to(self.head.dtype), self.head)

    def _finish(
        self, call: int, partial: torch.Tensor, stream: torch.Tensor | None, quants: Sequence[Quant | None], observe: Observer | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Fused call ``call``: what the next projection reads, ``[T, H]``, and the new residual stream."""
        quant = quants[call]
        out = self._fused(partial, stream, self.norms[call], quant)
        assert out.residual is not None
        if quant is None:
            assert out.norm is not None
            normed = out.norm
        else:
            # A GEMM that takes the codes would go here; decoding them first gives the same numbers on every machine.
            assert out.codes is not None
            normed = dequantize(out.codes, out.scales, quant, hidden_size=self.shape.hidden_size).to(self.comm.dtype)
        if observe is not None:
            observe(call, normed)
        return normed, out.residual

    def _fused(self, partial: torch.Tensor, stream: torch.Tensor | None, norm: RMSNorm, quant: Quant | None) -> Output:
        """The call itself: the norm or its codes, ``[T, H]``, and the new residual stream as this model keeps it."""
        return self.comm.all_reduce(partial, residual=stream, norm=norm, quant=quant)

    def _embed(self, tokens: torch.Tensor) -> torch.Tensor:
        """The rows of the tokens that this rank holds, zeros for the others: ``[T, H]``, a partial sum."""
        local = tokens - self.vocab_start
        mine = (local >= 0) & (local < self.embedding.shape[0])
        return (F.embedding(torch.where(mine, local, 0), self.embedding) * mine[:, None]).to(self.comm.dtype)

    def _attention(self, i: int, layer: Layer, normed: torch.Tensor, turn: torch.Tensor, cache: Cache) -> torch.Tensor:
        tokens = normed.shape[0]

        def heads(weight: torch.Tensor, count: int) -> torch.Tensor:
            return _linear(normed, weight).view(tokens, count, self.shape.head_dim).transpose(0, 1)  # [heads, T, D]

        query = _rotate(heads(layer.query, self.heads), turn)
        key, value = cache.append(i, _rotate(heads(layer.key, self.kv_heads), turn), heads(layer.value, self.kv_heads))
        share = self.heads // self.kv_heads
        key, value = key.repeat_interleave(share, dim=0), value.repeat_interleave(share, dim=0)
        seen = torch.ones(tokens, key.shape[1], dtype=torch.bool, device=normed.device).tril(key.shape[1] - tokens)
        query, key, value = (x[None].to(layer.query.dtype) for x in (query, key, value))
        mixed = F.scaled_dot_product_attention(query, key, value, attn_mask=seen)[0].to(self.comm.dtype)  # [heads, T, D]
        mixed = mixed.transpose(0, 1).reshape(tokens, -1)
        self.observe_rows(f"model.layers.{i}.self_attn.o_proj", mixed)
        return _linear(mixed, layer.output)

    def _rotation(self, start: int, tokens: int) -> torch.Tensor:
        """Cosine and sine of the rotary embedding for positions from ``start``: ``[2, T, D]``."""
        positions = torch.arange(start, start + tokens, dtype=torch.float32, device=self.frequencies.device)
        angles = (positions[:, None] * self.frequencies[None, :]).repeat(1, 2)
        return torch.stack((angles.cos(), angles.sin())).to(self.comm.dtype)


def _linear(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """``x @ weight.T`` in the dtype of the weight, rounded to that of ``x``."""
    return F.linear(x.to(weight.dtype), weight).to(x.dtype)


def _rotate(x: torch.Tensor, turn: torch.Tensor) -> torch.Tensor:
    first, second = x.chunk(2, dim=-1)
    return x * turn[0] + torch.cat((-second, first), dim=-1) * turn[1]

"""Decoders with published shapes and random weights on the layers of ``collogue.nn``, from tokens to tokens: what ``collogue bench
generate`` runs.

The weights are made once and quantized to every scheme; embedding, norms, output head and cache are shared and stay in bfloat16. What lies
between two products stands in ``between``, and is the benchmark's subject.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from collogue.communicator import Communicator
from collogue.contract.quant import Quant
from collogue.contract.spec import RMSNorm
from collogue.contract.weight import QuantizedWeight
from collogue.nn import ColumnParallelLinear, RowParallelLinear
from collogue.pytorch.recipes import Recipe
from collogue.tools.bench.between import Rows, Way
from collogue.tools.bench.stack import ACTIVATION_SCALE, EPS, Shape

#: The scheme without quantization.
BFLOAT16 = "bfloat16"
#: Of the rotary embedding.
ROTARY_BASE = 500_000.0
#: Static scales: values up to 8 fit in both formats that have them.
_STATIC = {"x.scale": ACTIVATION_SCALE, "x.global_scale": 448.0 * 6.0 / 8.0}


@dataclass(frozen=True)
class Layer:
    """The four linear layers of a decoder layer, this rank's parts."""

    qkv: ColumnParallelLinear
    out: RowParallelLinear
    gate_up: ColumnParallelLinear
    down: RowParallelLinear

    @property
    def all(self) -> tuple[ColumnParallelLinear | RowParallelLinear, ...]:
        """In the order of the data."""
        return self.qkv, self.out, self.gate_up, self.down


class Decoder:
    """One rank's part of a decoder, in every scheme.

    Args:
        shape: this rank's (:func:`collogue.tools.bench.stack.rank_shape`). layers: of the model that is run.
        schemes: :data:`BFLOAT16` and names of :data:`collogue.pytorch.recipes.RECIPES`.
        batch, length: rows and tokens of the cache.
    """

    def __init__(self, shape: Shape, layers: int, schemes: Sequence[str], comm: Communicator, *, batch: int, length: int) -> None:
        self.shape, self.comm, self.length = shape, comm, length
        device, hidden, width = comm.device, shape.hidden_size, shape.heads * shape.head_dim
        of_all = torch.Generator(device).manual_seed(100)
        mine = torch.Generator(device).manual_seed(comm.rank)

        def ones(size: int) -> Tensor:
            return torch.ones(size, device=device, dtype=torch.bfloat16)

        self.embedding = torch.randn(shape.vocabulary, hidden, device=device, dtype=torch.bfloat16, generator=of_all)
        self.head = ColumnParallelLinear(_random(shape.vocabulary // comm.world_size, hidden, 1, mine), None, comm, gather=True)
        #: In front of every layer's attention and MLP, and of the output head.
        self.norms = [RMSNorm(ones(hidden), EPS) for _ in range(2 * layers + 1)]
        self.head_norms = (ones(shape.head_dim), ones(shape.head_dim)) if shape.head_norms else None
        frequencies = ROTARY_BASE ** -(torch.arange(0, shape.head_dim, 2, device=device) / shape.head_dim)
        angles = torch.arange(length, device=device)[:, None] * frequencies
        self.cosine, self.sine = angles.cos(), angles.sin()
        cache = torch.zeros(batch, shape.kv_heads, length, shape.head_dim, device=device, dtype=torch.bfloat16)
        #: Keys and values of each layer.
        self.caches = [(torch.zeros_like(cache), torch.zeros_like(cache)) for _ in range(layers)]
        self.layers: dict[str, list[Layer]] = {scheme: [] for scheme in schemes}
        sizes = (
            (width + 2 * shape.kv_heads * shape.head_dim, hidden),
            (hidden, width),
            (2 * shape.intermediate_size, hidden),
            (hidden, shape.intermediate_size),
        )
        for _ in range(layers):
            weights = [_random(rows, columns, (1, comm.world_size)[i % 2], mine) for i, (rows, columns) in enumerate(sizes)]
            for scheme, made in self.layers.items():
                made.append(_layer(scheme, weights, comm))

    def quant(self, scheme: str) -> Quant | None:
        """The format of the activations."""
        return self.layers[scheme][0].qkv.activation

    def prefill(self, scheme: str, way: Way, state: State) -> Tensor:
        """Logits ``[B, V]`` of each prompt's next token, which becomes the state's."""
        batch, prompt = state.prompt.shape

        def attend(layer: int, qkv: Tensor) -> Tensor:
            q, k, v = way.units.heads(self.shape, qkv, self.cosine[:prompt], self.sine[:prompt], self.head_norms)
            keys, values = self.caches[layer]
            keys[:batch, :, :prompt].copy_(k)
            values[:batch, :, :prompt].copy_(v)
            return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)

        x = self._run(scheme, way, F.embedding(state.prompt.view(-1), self.embedding), attend)
        state.positions.fill_(prompt)
        return self._sample(x.view(batch, prompt, -1)[:, -1], state)

    def decode(self, scheme: str, way: Way, state: State) -> Tensor:
        """One step: logits ``[B, V]``; the state's tokens become the next ones, and its positions go on.

        Attention reads the whole cache, also what no token has written yet: the same work in every step.
        """
        batch = state.tokens.shape[0]

        def attend(layer: int, qkv: Tensor) -> Tensor:
            keys, values = (half[:batch] for half in self.caches[layer])
            q = way.units.append(self.shape, qkv, self.cosine, self.sine, self.head_norms, state.positions, keys, values)
            return F.scaled_dot_product_attention(q, keys, values, enable_gqa=True)

        x = self._run(scheme, way, F.embedding(state.tokens, self.embedding), attend)
        state.positions.add_(1)
        return self._sample(x, state)

    def _run(self, scheme: str, way: Way, hidden: Tensor, attend: Callable[[int, Tensor], Tensor]) -> Tensor:
        """All layers: ``[T, H]`` of tokens to the last norm, ``[T, H]``."""
        layers, quant = self.layers[scheme], self.quant(scheme)
        x, stream = way.first(hidden, self.norms[0], quant)
        for number, layer in enumerate(layers):
            mixed = attend(number, layer.qkv(x)).transpose(1, 2).reshape(hidden.shape[0], -1)
            x, stream = way.join(layer.out, way.pack(mixed, quant), stream, self.norms[2 * number + 1], quant)
            last = number + 1 == len(layers)
            gated = way.gate(layer.gate_up(x), quant)
            x, stream = way.join(layer.down, gated, stream, self.norms[2 * number + 2], None if last else quant)
        assert isinstance(x, Tensor)
        return x

    def _sample(self, x: Tensor, state: State) -> Tensor:
        logits: Tensor = self.head(x)
        state.tokens.copy_(logits.argmax(-1))
        return logits

    def products(self, scheme: str, batch: int) -> Callable[[], object]:
        """The bare products of a decode step, of inputs that are there already."""

        def given(linear: ColumnParallelLinear | RowParallelLinear, width: int) -> Rows:
            rows = torch.randn(batch, width, device=self.comm.device, dtype=torch.bfloat16)
            return rows if linear.activation is None else self.comm.finish(rows, quant=linear.activation)

        layers, hidden = self.layers[scheme], self.shape.hidden_size
        widths = (hidden, self.shape.heads * self.shape.head_dim, hidden, self.shape.intermediate_size)
        inputs = [given(linear, width) for linear, width in zip(layers[0].all, widths, strict=True)]
        last = given(self.head, hidden)

        def run() -> None:
            for layer in layers:
                for linear, x in zip(layer.all, inputs, strict=True):
                    linear.product(x, None)
            self.head.product(last, None)

        return run

    def quantized_bytes(self, scheme: str) -> int:
        """Codes and scales of all decoder layers' linear layers, static scales too."""
        total = 0
        for layer in self.layers[scheme]:
            for linear in layer.all:
                weight = linear.quantized_weight
                total += linear.weight.nbytes if weight is None else weight.nbytes
                formats = (linear.activation, None if weight is None else weight.format)
                total += sum(4 for format in formats if getattr(format, "given_scale", None) is not None)
        return total

    def model_bytes(self, scheme: str) -> int:
        """The same with embedding, norms and output head."""
        return self.quantized_bytes(scheme) + self.embedding.nbytes + self._shared_bytes()

    def step_bytes(self, scheme: str, batch: int) -> int:
        """What a decode step cannot do without reading: weights, and the cache of ``batch`` sequences. One row of the embedding each."""
        caches = sum(half[:batch].nbytes for cache in self.caches for half in cache)
        return self.quantized_bytes(scheme) + self._shared_bytes() + caches + batch * self.embedding[0].nbytes

    def _shared_bytes(self) -> int:
        head_norms = sum(weight.nbytes for weight in self.head_norms or ())
        return self.head.weight.nbytes + head_norms + sum(norm.weight.nbytes for norm in self.norms)


class State:
    """Where a batch stands. Graphs read and write these tensors.

    Attributes:
        prompt: ``[B, S]``. tokens: ``[B]``, the next to be read. positions: ``[B]``, where it goes in the cache.
    """

    def __init__(self, decoder: Decoder, batch: int, prompt_tokens: int) -> None:
        device, generator = decoder.comm.device, torch.Generator(decoder.comm.device).manual_seed(8)
        self._caches = decoder.caches
        self.prompt = torch.randint(decoder.shape.vocabulary, (batch, prompt_tokens), device=device, generator=generator)
        self.tokens, self.positions = self.prompt[:, 0].clone(), torch.full((batch,), prompt_tokens, device=device)

    def reset(self) -> None:
        """As after a prefill, with the prompts' first tokens as the next ones, and zeros in the cache behind the prompts."""
        for half in itertools.chain(*self._caches):
            half[:, :, self.prompt.shape[1] :].zero_()
        self.tokens.copy_(self.prompt[:, 0])
        self.positions.fill_(self.prompt.shape[1])


def _random(rows: int, columns: int, ranks: int, generator: torch.Generator) -> Tensor:
    """A weight whose product with ``ranks`` times as many columns has variance 1."""
    weight = torch.randn(rows, columns, device=generator.device, dtype=torch.bfloat16, generator=generator)
    return weight.mul_((columns * ranks) ** -0.5)


def _layer(scheme: str, weights: Sequence[Tensor], comm: Communicator) -> Layer:
    made: list[tuple[Tensor | QuantizedWeight, Quant | None]] = [(weight, None) for weight in weights]
    if scheme != BFLOAT16:
        made = [_quantized(scheme, weight) for weight in weights]
    qkv, out, gate_up, down = made
    return Layer(
        ColumnParallelLinear(qkv[0], None, comm, activation=qkv[1]),
        RowParallelLinear(out[0], None, comm, activation=out[1]),
        ColumnParallelLinear(gate_up[0], None, comm, activation=gate_up[1]),
        RowParallelLinear(down[0], None, comm, activation=down[1]),
    )


def _quantized(scheme: str, weight: Tensor) -> tuple[QuantizedWeight, Quant | None]:
    """As ``collogue.parallelize(quant=scheme)`` does it."""
    made = Recipe(scheme, _STATIC).quantize(weight, "x")
    return made.weight, made.activation

"""What stands between two products of a decoder, in both ways that ``collogue bench generate`` compares: Collogue's kernels, and the same
by ``torch.compile``. What is neither's subject (rotary embedding, cache) is compiled for both.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, Protocol

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from collogue.communicator import Communicator
from collogue.contract.quant import Quant
from collogue.contract.spec import Output, RMSNorm
from collogue.nn import RowParallelLinear, gated
from collogue.tools.bench.epilogue import Encoder, encoder, epilogue
from collogue.tools.bench.stack import EPS, Shape
from collogue.tools.bench.variants import with_own_code

COLLOGUE, COMPILED = "collogue", "torch.compile"
#: By name; both are run in every scheme.
WAYS = (COLLOGUE, COMPILED)

#: What a linear layer takes: values, or codes and scales.
Rows = Tensor | Output
_HeadNorms = tuple[Tensor, Tensor] | None


class Way(Protocol):
    """``quant`` is the format of what is returned; ``None``: values."""

    units: Units

    def first(self, hidden: Tensor, norm: RMSNorm, quant: Quant | None) -> tuple[Rows, Tensor]:
        """The norm of the embedded tokens ``[T, H]``, and the residual stream."""

    def join(self, layer: RowParallelLinear, x: Rows, stream: Tensor, norm: RMSNorm, quant: Quant | None) -> tuple[Rows, Tensor]:
        """The layer's product, summed over the ranks, added to the stream, and the norm; and the new stream."""

    def gate(self, both: Tensor, quant: Quant | None) -> Rows:
        """``silu(gate) * up`` of ``[T, 2 I]``: ``[T, I]``."""

    def pack(self, rows: Tensor, quant: Quant | None) -> Rows:
        """``[T, I]`` as the next layer takes it."""


class Units:
    """Functions by ``torch.compile``, each compiled once for all ways, schemes and models that use it at the same shape.

    ``prefill``: a unit is compiled once for all numbers of rows, as they are many; else once for each. Without a GPU nothing is
    generated: only the graphs are made.
    """

    def __init__(self, device: torch.device, *, prefill: bool) -> None:
        import torch._dynamo

        # Shapes and formats share code. Beyond the limit dynamo would run it uncompiled.
        torch._dynamo.config.recompile_limit = 1024
        torch._dynamo.config.fail_on_recompile_limit_hit = True
        self._backend, self._prefill = "inductor" if device.type == "cuda" else "aot_eager", prefill
        self._made: dict[Any, Callable[..., Any]] = {}

    def compiled(self, key: Any, function: Callable[..., Any], rows: int = 1) -> Callable[..., Any]:
        """``function``; its first ``rows`` arguments are ``[T, ..]``. ``key``: the same for the same function."""
        found = self._made.get(key)
        if found is None:
            unit = torch.compile(with_own_code(function), backend=self._backend, fullgraph=True, dynamic=False)
            found = self._made[key] = functools.partial(_of_any_length, unit, rows) if self._prefill else unit
        return found

    def epilogue(self, quant: Quant | None, *args: Tensor) -> tuple[Tensor, ...]:
        """:func:`collogue.tools.bench.epilogue.epilogue`."""
        result: tuple[Tensor, ...] = self.compiled(("epilogue", _label(quant)), epilogue(quant, EPS), rows=2)(*args)
        return result

    def silu_mul(self, both: Tensor) -> Tensor:
        """``silu(gate) * up``, rounded once."""
        result: Tensor = self.compiled(("silu", both.shape[1]), _silu_mul)(both)
        return result

    def gated(self, quant: Quant | None, both: Tensor, scale: Tensor) -> tuple[Tensor, ...]:
        """:meth:`silu_mul`, quantized."""
        unit = self.compiled(("gated", _label(quant), both.shape[1]), functools.partial(_gated, encoder(quant)))
        result: tuple[Tensor, ...] = unit(both, scale)
        return result

    def encode(self, quant: Quant, rows: Tensor, scale: Tensor) -> tuple[Tensor, ...]:
        """Codes and scales."""
        result: tuple[Tensor, ...] = self.compiled(("encode", _label(quant), rows.shape[1]), encoder(quant))(rows, scale)
        return result

    def heads(self, shape: Shape, qkv: Tensor, cosine: Tensor, sine: Tensor, norms: _HeadNorms) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values ``[B, heads, S, D]`` of ``[B S, ..]`` rows, at the positions 0 to S - 1."""
        result: tuple[Tensor, Tensor, Tensor] = self.compiled(("heads", shape), functools.partial(_heads, shape))(qkv, cosine, sine, norms)
        return result

    def append(
        self, shape: Shape, qkv: Tensor, cosine: Tensor, sine: Tensor, norms: _HeadNorms, positions: Tensor, keys: Tensor, values: Tensor
    ) -> Tensor:
        """Queries ``[B, heads, 1, D]`` of ``[B, ..]`` rows at ``positions``; keys and values go into the cache there."""
        unit = self.compiled(("append", shape, keys.shape), functools.partial(_append, shape))
        result: Tensor = unit(qkv, cosine, sine, norms, positions, keys, values)
        return result


class Collogue:
    """The communicator's calls."""

    def __init__(self, comm: Communicator, units: Units) -> None:
        self.comm, self.units = comm, units

    def first(self, hidden: Tensor, norm: RMSNorm, quant: Quant | None) -> tuple[Rows, Tensor]:
        return _taken(self.comm.finish(hidden, norm=norm, quant=quant)), hidden

    def join(self, layer: RowParallelLinear, x: Rows, stream: Tensor, norm: RMSNorm, quant: Quant | None) -> tuple[Rows, Tensor]:
        out = layer(x, residual=stream, norm=norm, quant=quant)
        assert out.residual is not None
        return _taken(out), out.residual

    def gate(self, both: Tensor, quant: Quant | None) -> Rows:
        return gated(both) if quant is None else gated(both, quant)

    def pack(self, rows: Tensor, quant: Quant | None) -> Rows:
        return rows if quant is None else self.comm.finish(rows.contiguous(), quant=quant)


class Compiled:
    """PyTorch's all-reduce where there are ranks to add, and everything else compiled.

    ``scale``: of static formats, ``[1]``.
    """

    def __init__(self, group: dist.ProcessGroup, units: Units, scale: Tensor) -> None:
        self.group, self.units, self.scale = group, units, scale

    def first(self, hidden: Tensor, norm: RMSNorm, quant: Quant | None) -> tuple[Rows, Tensor]:
        return self._finish(hidden, torch.zeros_like(hidden), norm, quant)

    def join(self, layer: RowParallelLinear, x: Rows, stream: Tensor, norm: RMSNorm, quant: Quant | None) -> tuple[Rows, Tensor]:
        partial = layer.partial(x)
        if dist.get_world_size(self.group) > 1:
            dist.all_reduce(partial, group=self.group)
        return self._finish(partial, stream, norm, quant)

    def _finish(self, total: Tensor, stream: Tensor, norm: RMSNorm, quant: Quant | None) -> tuple[Rows, Tensor]:
        y, *rest = self.units.epilogue(quant, total, stream, norm.weight, self.scale)
        return _rows(rest, quant), y

    def gate(self, both: Tensor, quant: Quant | None) -> Rows:
        if quant is None:
            return self.units.silu_mul(both)
        return _rows(self.units.gated(quant, both, self.scale), quant)

    def pack(self, rows: Tensor, quant: Quant | None) -> Rows:
        return rows if quant is None else _rows(self.units.encode(quant, rows, self.scale), quant)


def _label(quant: Quant | None) -> str:
    return "none" if quant is None else quant.label


def _taken(out: Output) -> Rows:
    return out if out.norm is None else out.norm


def _rows(results: Any, quant: Quant | None) -> Rows:
    if quant is None:
        value: Tensor = results[0]
        return value
    return Output(codes=results[0], scales=results[1] if len(results) > 1 else None)


def _of_any_length(unit: Callable[..., Any], rows: int, *args: Any) -> Any:
    for tensor in args[:rows]:
        torch._dynamo.maybe_mark_dynamic(tensor, 0)
    return unit(*args)


def _silu_mul(both: Tensor) -> Tensor:
    gate, up = both.float().chunk(2, -1)
    return (F.silu(gate) * up).to(both.dtype)


def _gated(encode: Encoder, both: Tensor, scale: Tensor) -> tuple[Tensor, ...]:
    return encode(_silu_mul(both), scale)


def _heads(shape: Shape, qkv: Tensor, cosine: Tensor, sine: Tensor, norms: _HeadNorms) -> tuple[Tensor, Tensor, Tensor]:
    rows = qkv.view(-1, cosine.shape[0], shape.heads + 2 * shape.kv_heads, shape.head_dim)
    q, k, v = torch.split(rows, [shape.heads, shape.kv_heads, shape.kv_heads], 2)
    if norms is not None:
        q, k = (F.rms_norm(x, (shape.head_dim,), weight, EPS) for x, weight in zip((q, k), norms, strict=True))
    q, k = (_rotated(x, cosine[:, None], sine[:, None]) for x in (q, k))
    return q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)


def _append(
    shape: Shape, qkv: Tensor, cosine: Tensor, sine: Tensor, norms: _HeadNorms, positions: Tensor, keys: Tensor, values: Tensor
) -> Tensor:
    q, k, v = _heads(shape, qkv, cosine[positions[:1]], sine[positions[:1]], norms)
    rows = torch.arange(keys.shape[0], device=keys.device)
    keys[rows, :, positions] = k[:, :, 0]
    values[rows, :, positions] = v[:, :, 0]
    return q


def _rotated(x: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
    a, b = x.float().chunk(2, -1)
    return torch.cat([a * cosine - b * sine, b * cosine + a * sine], -1).to(x.dtype)

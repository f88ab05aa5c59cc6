"""What a call asks for and what comes back: the norm, the operation, the outputs. Formats are in :mod:`collogue.contract.quant`.

Plain data that checks itself when it is made, and knows nothing of devices or kernels.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, fields
from typing import Generic, Literal, TypeAlias

import torch
from torch.utils._pytree import GetAttrKey, register_pytree_node
from typing_extensions import TypeVar

from collogue.contract.number import FLOAT32_END, check_local, is_finite, is_number, is_whole
from collogue.contract.quant import FP8Static, Quant
from collogue.errors import ArgumentError, DTypeError, FormatError, ScaleError, ShapeError

#: Value dtypes of partials, residual and norm.
VALUE_DTYPES = (torch.bfloat16, torch.float16, torch.float32)


@dataclass(frozen=True, eq=False)
class RMSNorm:
    """``n = round_D((y * rstd) * (weight + weight_offset))``, ``rstd = 1 / sqrt(mean(y**2) + eps)``.

    Args:
        weight: ``[H]``, the communicator's dtype or float32, contiguous.
        eps: rounded to float32 before use.
        weight_offset: 0, or 1 for Gemma-style norms; added to the weight in float32.
        prefetch: read the weight before the preceding kernel of the stream has ended, where that saves time. With ``True`` the weight
            must have been written by a kernel that another kernel *between* it and this call has waited for (or long before, as
            weights are). ``False``: the weight is read with the inputs, so the preceding kernel may have written it. Never changes a
            bit of a result, and may differ between ranks.
    Examples:
        >>> norm = collogue.RMSNorm(weight, eps=1e-5)
        >>> comm.all_reduce(partial, norm=norm)
        Output(residual=bfloat16[4, 64], norm=bfloat16[4, 64] on cpu)
    """

    weight: torch.Tensor
    eps: float = 1e-6
    weight_offset: float = 0.0
    prefetch: bool = True

    def __post_init__(self) -> None:
        if not isinstance(self.weight, torch.Tensor) or self.weight.ndim != 1:
            raise ShapeError("RMSNorm.weight must be a tensor of shape [H]", hint="pass the layer's weight vector")
        check_local("RMSNorm.weight", self.weight)
        if self.weight.dtype not in VALUE_DTYPES:
            raise DTypeError(f"RMSNorm.weight has dtype {self.weight.dtype}", hint="use the communicator's dtype or torch.float32")
        if not isinstance(self.prefetch, bool):
            raise ArgumentError(
                f"RMSNorm.prefetch is {self.prefetch!r}; expected True or False", hint="pass prefetch=False or leave it out"
            )
        if (
            type(self.eps) is float
            and type(self.weight_offset) is float
            and 0.0 <= self.eps < FLOAT32_END
            and abs(self.weight_offset) < FLOAT32_END
        ):
            return  # the usual case, in one go
        for name in ("eps", "weight_offset"):
            value = getattr(self, name)
            if not is_number(value) or not is_finite(value):
                raise ScaleError(f"RMSNorm.{name} must be a finite number in float32, got {value!r}", hint="pass a Python float")
        if self.eps < 0:
            raise ScaleError(f"RMSNorm.eps must not be negative, got {self.eps}", hint="usual values: 1e-5, 1e-6")


_Reduced = TypeVar("_Reduced", bound="torch.Tensor | None", covariant=True, default=torch.Tensor | None)
_Residual = TypeVar("_Residual", bound="torch.Tensor | None", covariant=True, default=torch.Tensor | None)
_Norm = TypeVar("_Norm", bound="torch.Tensor | None", covariant=True, default=torch.Tensor | None)
_Codes = TypeVar("_Codes", bound="torch.Tensor | None", covariant=True, default=torch.Tensor | None)
_Scales = TypeVar("_Scales", bound="torch.Tensor | None", covariant=True, default=torch.Tensor | None)


@dataclass(slots=True, repr=False)
class Output(Generic[_Reduced, _Residual, _Norm, _Codes, _Scales]):
    """What a call returns; ``None`` where it was not asked for. A pytree: ``torch.export`` and ``torch.utils._pytree`` know it.

    ``reduced``: the sum, when neither residual nor norm is given. ``residual``: the new residual stream ``y``.
    ``norm``: the norm in the communicator's dtype. ``codes``, ``scales``: the quantized norm (or ``y``).
    Each holds all T rows or, as a shard, the rows that this rank owns.

    Examples:
        >>> out = comm.all_reduce(partial, residual=residual)
        >>> out
        Output(residual=bfloat16[4, 64] on cpu)
        >>> [name for name, tensor in out.items()]
        ['residual']
    """

    reduced: _Reduced = None  # type: ignore[assignment]
    residual: _Residual = None  # type: ignore[assignment]
    norm: _Norm = None  # type: ignore[assignment]
    codes: _Codes = None  # type: ignore[assignment]
    scales: _Scales = None  # type: ignore[assignment]

    def items(self) -> Iterator[tuple[str, torch.Tensor]]:
        """The outputs that are there, by name."""
        for name in OUTPUTS:
            value = getattr(self, name)
            if value is not None:
                yield name, value

    def __repr__(self) -> str:
        """``Output(residual=bfloat16[4, 7168], codes=float8_e4m3fn[4, 7168] on cuda:0)``: forms, no values."""
        there = dict(self.items())
        parts = [f"{name}={str(x.dtype).removeprefix('torch.')}{list(x.shape)}" for name, x in there.items()]
        where = sorted({str(x.device) for x in there.values()})
        return f"Output({', '.join(parts)}{' on ' * bool(where)}{' and '.join(where)})"


#: The names of a call's outputs, in order.
OUTPUTS = ("reduced", "residual", "norm", "codes", "scales")

register_pytree_node(
    Output,
    lambda out: ([getattr(out, name) for name in OUTPUTS], None),
    lambda values, _: Output(*values),
    serialized_type_name="collogue.Output",
    flatten_with_keys_fn=lambda out: ([(GetAttrKey(name), getattr(out, name)) for name in OUTPUTS], None),
    to_dumpable_context=lambda _: None,
    from_dumpable_context=lambda _: None,
)

#: What a call does. ``all_reduce``: sum, finish, the same on every rank. ``sharded``: the residual stays with the owners of its
#: rows, the finished rows go to every rank. ``reduce_scatter`` and ``all_gather``: the two halves of ``sharded``. ``finish``: no sum.
Operation = Literal["all_reduce", "sharded", "reduce_scatter", "all_gather", "finish"]


#: Operations in which rows have owners.
OWNING: tuple[Operation, ...] = ("sharded", "reduce_scatter", "all_gather")


def owned_rows(tokens: int, world_size: int, rank: int, rows: Sequence[int] | None = None) -> range:
    """The rows of ``tokens`` that ``rank`` owns, blocks in rank order: of ``rows[rank]`` rows, or of ``ceil(tokens / world_size)``, the
    last ones shorter or empty.
    """
    if rows is not None:
        first = sum(rows[:rank])
        return range(first, first + rows[rank])
    block = -(-tokens // world_size)
    return range(min(rank * block, tokens), min((rank + 1) * block, tokens))


def largest_block(tokens: int, world_size: int, rows: Sequence[int] | None = None) -> int:
    """The most rows that a rank owns."""
    return -(-tokens // world_size) if rows is None else max(rows)


#: Ranks by island: who is summed with whom first.
Islands: TypeAlias = tuple[tuple[int, ...], ...]


def as_islands(islands: Sequence[Sequence[int]] | None, world_size: int) -> Islands | None:
    """``islands=`` as sums take it; ``None`` for one sum in rank order, which one island and islands of one rank come to as well.

    Raises :class:`ArgumentError` unless every rank is in one island, ranks are in order, and so are the islands, by their first ranks.
    """
    if islands is None:
        return None
    split = tuple(tuple(island) if isinstance(island, list | tuple | range) else () for island in islands)
    ranks = [rank for island in split for rank in island]
    well = all(is_whole(rank) for rank in ranks) and sorted(ranks) == list(range(world_size)) and all(split)
    if not well or any(list(island) != sorted(island) for island in split) or [i[0] for i in split] != sorted(i[0] for i in split):
        raise ArgumentError(
            f"islands is {islands!r}; expected the {world_size} ranks, each in one island",
            hint="give lists of ranks in order, by their first ranks: islands=[[0, 1], [2, 3]]",
        )
    return None if len(split) == 1 or list(map(len, split)) == [1] * world_size else split


def as_rows(rows: Sequence[int] | None, world_size: int) -> tuple[int, ...] | None:
    """``rows=`` as calls keep it.

    Raises :class:`ArgumentError` for what are not Python ints, :class:`ShapeError` for what is not a number of rows for each rank.
    """
    if rows is None:
        return None
    if not isinstance(rows, list | tuple) or not all(is_whole(each) for each in rows):
        raise ArgumentError(
            f"rows is {rows if isinstance(rows, list | tuple) else type(rows).__name__}; expected a list of Python ints",
            hint="give how many rows each rank owns, the same list on every rank: rows=[3, 0, 5]",
        )
    if len(rows) != world_size:
        raise ShapeError(f"rows has {len(rows)} entries: {list(rows)}", hint=f"give one number for each of the {world_size} ranks")
    if any(each < 0 for each in rows):
        raise ShapeError(f"rows is {list(rows)}; expected numbers from 0", hint="give 0 for a rank that owns no rows")
    return tuple(int(each) for each in rows)


def check_split(operation: Operation, tokens: int, rows: Sequence[int] | None) -> None:
    """Raise :class:`ArgumentError` for ``rows`` of an operation in which rows have no owners, :class:`ShapeError` where they are not
    ``tokens`` rows in all.
    """
    if rows is None:
        return
    if operation not in OWNING:
        raise ArgumentError(
            f"{operation} leaves no rows to owners and takes no rows=",
            hint="pass it to all_reduce(sharded=True), reduce_scatter or all_gather",
        )
    if sum(rows) != tokens:
        raise ShapeError(f"rows {list(rows)} add up to {sum(rows)}; the call has {tokens} tokens", hint="their sum is T, on every rank")


@dataclass(frozen=True)
class Wanted:
    """Which outputs a call has, from which arguments were given. The one place where that rule lives."""

    reduced: bool
    residual: bool
    norm: bool
    codes: bool
    scales: bool = field(default=False)

    @classmethod
    def of(cls, *, has_residual: bool, has_norm: bool, quant: Quant | None, keep_norm: bool, operation: Operation = "all_reduce") -> Wanted:
        """The outputs of ``operation``. For ``all_gather`` the arguments say what the shard holds, and all of it is gathered.

        Raises :class:`FormatError` for ``keep_norm`` without a norm (there is nothing to keep), :class:`ArgumentError` for an operation
        that would have nothing to finish.
        """
        scales = quant is not None and not isinstance(quant, FP8Static)
        if operation == "all_gather":
            if not (has_residual or has_norm or quant is not None):
                raise ArgumentError("the shard holds nothing", hint="say that it has a residual, a norm or codes")
            return cls(reduced=False, residual=has_residual, norm=has_norm, codes=quant is not None, scales=scales)
        if keep_norm and not has_norm:
            raise FormatError("keep_norm=True without norm=", hint="pass norm=collogue.RMSNorm(weight), or leave keep_norm out")
        if not has_norm and quant is None and operation in _FINISHING:
            raise ArgumentError(f"{_FINISHING[operation]} without norm= and quant= has nothing to finish", hint=_INSTEAD[operation])
        # torch.compile does not trace through a cache.
        make = _wanted if torch.compiler.is_compiling() else _cached_wanted
        return make(operation != "finish", has_residual or has_norm, has_norm and (quant is None or keep_norm), quant is not None, scales)

    @classmethod
    def held(cls, shard: Output) -> Wanted:
        """What ``shard`` holds."""
        return cls(**{f.name: getattr(shard, f.name) is not None for f in fields(cls)})


#: Operations that need a norm or a format: how they are called, and what to do without either.
_FINISHING: dict[Operation, str] = {"sharded": "all_reduce(sharded=True)", "finish": "finish"}
_INSTEAD: dict[Operation, str] = {
    "sharded": "pass norm= or quant=, or call comm.reduce_scatter, which returns the new shard alone",
    "finish": "pass norm=collogue.RMSNorm(weight) or a format, such as quant=collogue.FP8PerToken()",
}


def _wanted(summed: bool, stream: bool, norm: bool, codes: bool, scales: bool) -> Wanted:
    return Wanted(reduced=summed and not stream, residual=summed and stream, norm=norm, codes=codes, scales=scales)


_cached_wanted = functools.cache(_wanted)

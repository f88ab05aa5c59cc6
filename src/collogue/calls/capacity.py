"""What a communicator was made for, and which calls it has seen."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import NoReturn, get_args

import torch

from collogue.calls.request import Request, Signature, keep, make_request
from collogue.contract.number import is_whole
from collogue.contract.prologue import Prologue, PrologueForm, form_of
from collogue.contract.quant import Quant, check_format, check_wire, parse
from collogue.contract.spec import OWNING, VALUE_DTYPES, Operation, RMSNorm, as_rows, owned_rows
from collogue.errors import ArgumentError, CapacityError, DTypeError, FormatError, ShapeError


@dataclass(frozen=True, eq=False)
class Capacity:
    """What a communicator was made for, and for which rank; every call is checked against it."""

    max_tokens: int
    hidden_size: int
    dtype: torch.dtype
    device: torch.device
    world_size: int = 1
    rank: int = 0
    wire: Quant | None = None
    _signatures: dict[object, Signature] = field(default_factory=dict, repr=False)

    def check(self) -> None:
        """Raise :class:`ArgumentError` (its subclasses) where no communicator can be made for it."""
        check_hidden_size(self.hidden_size)
        if not is_whole(self.max_tokens) or self.max_tokens < 1:
            raise CapacityError(f"max_tokens is {self.max_tokens!r}", hint="give the largest number of rows of one call")
        if self.dtype not in VALUE_DTYPES:
            raise DTypeError(f"dtype {self.dtype} is not supported", hint="use torch.bfloat16, torch.float16 or torch.float32")
        check_wire(self.wire, self.hidden_size)

    def fits(self, tokens: int, hidden_size: int | None) -> bool:
        """Whether a call of this shape is within the capacity. Raises :class:`ShapeError` for what is not a shape."""
        width = self.hidden_size if hidden_size is None else hidden_size
        for name, value in (("tokens", tokens), ("hidden_size", width)):
            if not is_whole(value):
                raise ShapeError(f"{name} is {value!r}, which is not a whole number", hint="give rows and their elements as ints")
        return 0 <= tokens <= self.max_tokens and 0 < width <= self.hidden_size and width % 8 == 0

    def holds(self, operation: Operation, tokens: int, width: int) -> bool:
        """Whether a call is within the capacity. ``finish`` uses no workspace: its rows may be wider than the communicator's."""
        return tokens <= self.max_tokens and (width <= self.hidden_size or operation == "finish")

    def request(
        self,
        tokens: int | None,
        residual: bool,
        norm: RMSNorm | bool | None,
        quant: Quant | None,
        keep_norm: bool,
        hidden_size: int | None,
        operation: Operation,
        prologue: Prologue | PrologueForm | None = None,
        branch_norm: RMSNorm | bool | None = None,
        rows: Sequence[int] | None = None,
    ) -> Request:
        """What is planned for such a call. Raises :class:`ArgumentError` (its subclasses) for calls that cannot be."""
        if operation not in get_args(Operation):
            raise ArgumentError(f"unknown operation {operation!r}", hint=f"choose one of {', '.join(get_args(Operation))}")
        split = as_rows(rows, self.world_size)
        tokens = count_tokens(tokens, split)
        check_kinds(norm if not isinstance(norm, bool) else None, quant)
        check_norm_kind("branch_norm", branch_norm if not isinstance(branch_norm, bool) else None)
        width = self.hidden_size if hidden_size is None else hidden_size
        if not self.fits(tokens, width) and (operation != "finish" or width % 8 or not self.holds(operation, tokens, width)):
            raise CapacityError(
                f"{tokens} tokens of hidden size {width} do not fit",
                hint=f"the communicator was made for {self.max_tokens} tokens of hidden size {self.hidden_size}",
            )
        if quant is not None:
            quant.check_hidden_size(width)
        self._check_wire(operation, width)
        return make_request(
            tokens,
            width,
            self.dtype,
            residual=residual,
            norm=norm if isinstance(norm, bool) else norm is not None,
            wide_weight=isinstance(norm, RMSNorm) and norm.weight.dtype != self.dtype,
            quant=quant,
            keep_norm=keep_norm,
            operation=operation,
            late_weight=isinstance(norm, RMSNorm) and not norm.prefetch,
            prologue=form_of(prologue),
            branch=branch_norm if isinstance(branch_norm, bool) else branch_norm is not None,
            wide_branch=isinstance(branch_norm, RMSNorm) and branch_norm.weight.dtype != self.dtype,
            rows=split,
        )

    def _check_wire(self, operation: Operation, width: int) -> None:
        """Raise :class:`FormatError` where terms of ``width`` cannot travel in the communicator's format."""
        if self.wire is None or operation in ("finish", "all_gather"):
            return
        try:
            check_wire(self.wire, width)
        except FormatError as error:
            raise FormatError(f"the communicator's wire={self.wire!r}: {error.message}", hint=error.hint) from None

    def signature(self, request: Request) -> Signature:
        """The one signature of all calls with this request, regardless of the scales of its format."""
        label = None if request.quant is None else request.quant.label
        key = request if label is None else replace(request, quant=None), label
        found = self._signatures.get(key)
        if found is None:
            self._check_wire(request.operation, request.hidden_size)
            owned = None
            if request.operation in OWNING:
                owned = owned_rows(request.tokens, self.world_size, self.rank, request.rows)
            plain = request if label is None else replace(request, quant=parse(label))  # without tensors, which it would keep alive
            found = keep(self._signatures, key, Signature(plain, owned, self.device))
        return found


def check_hidden_size(hidden_size: int) -> None:
    """Raise :class:`ShapeError` unless ``hidden_size`` is a positive multiple of 8."""
    if not is_whole(hidden_size) or hidden_size <= 0 or hidden_size % 8:
        raise ShapeError(f"hidden size {hidden_size!r} is not a positive multiple of 8", hint="pad the hidden size to a multiple of 8")


def count_tokens(tokens: int | None, rows: tuple[int, ...] | None = None) -> int:
    """T: ``tokens``, or, where that is left out, all ``rows``. Raises :class:`ShapeError` unless it is a number of rows."""
    if tokens is None and rows is not None:
        return sum(rows)
    if not is_whole(tokens) or tokens < 0:
        raise ShapeError(f"tokens is {tokens!r}", hint="give the number of rows of the whole tensor")
    return tokens


def check_kinds(norm: RMSNorm | None, quant: Quant | None) -> None:
    """Raise :class:`ArgumentError` unless ``norm`` is a norm, :class:`FormatError` unless ``quant`` is a format."""
    check_norm_kind("norm", norm)
    if quant is not None:
        check_format("quant", quant)


def check_norm_kind(name: str, norm: RMSNorm | None) -> None:
    """Raise :class:`ArgumentError` unless ``norm`` is a norm, or none."""
    if norm is not None and not isinstance(norm, RMSNorm):
        kind = f"{type(norm).__module__}.{type(norm).__name__}".removeprefix("builtins.")
        raise ArgumentError(
            f"{name}: expected collogue.RMSNorm, got {kind}",
            hint="pass collogue.RMSNorm(weight, eps=...)",
        )


def raise_capacity(name: str, tokens: int, hidden_size: int, capacity: Capacity) -> NoReturn:
    """Raise :class:`CapacityError` for a tensor that is larger than the communicator was made for."""
    raise CapacityError(
        f"{name} has shape {[tokens, hidden_size]}; the communicator was made for at most "
        f"{capacity.max_tokens} tokens of hidden size {capacity.hidden_size}",
        hint="ask comm.fits(tokens) first, or make the communicator with a larger max_tokens or hidden_size",
    )

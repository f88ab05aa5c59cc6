"""What is asked of a communicator, without the tensors: what plans are made for, and what the outputs look like."""

from __future__ import annotations

import contextlib
import functools
import math
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import torch

from collogue.calls.product import ProductForm
from collogue.calls.terms import TermsForm
from collogue.contract.formats import code_spec, scale_spec
from collogue.contract.prologue import PrologueForm
from collogue.contract.quant import Quant
from collogue.contract.spec import Operation, Output, Wanted, check_split
from collogue.errors import ArgumentError

#: Entries of each cache of a communicator: every number of tokens is an entry, and a prefill may have any.
MOST_KEPT = 512

K = TypeVar("K")
V = TypeVar("V")


def keep(cache: dict[K, V], key: K, value: V) -> V:
    """Put ``value`` into ``cache``; where that is full, what has been in it longest goes."""
    if len(cache) >= MOST_KEPT and key not in cache:
        with contextlib.suppress(KeyError, StopIteration, RuntimeError):  # another thread is at it
            del cache[next(iter(cache))]
    cache[key] = value
    return value


@dataclass(frozen=True)
class Request:
    """What a plan is made for: the shape of a call, not its tensors.

    ``late_weight``: the kernel before may write the weight. It makes another kernel, and no difference between ranks. ``rows``: of each
    rank; ``None``: equal blocks, or no owners. ``write_padding``: of scales; each rank for itself, and no other kernel.
    """

    tokens: int
    hidden_size: int
    dtype: torch.dtype
    residual: bool
    norm: bool
    wide_weight: bool
    quant: Quant | None
    wanted: Wanted
    operation: Operation = "all_reduce"
    late_weight: bool = False
    prologue: PrologueForm | TermsForm | ProductForm | None = None
    branch: bool = False
    wide_branch: bool = False
    rows: tuple[int, ...] | None = None
    write_padding: bool = True

    @property
    def sums_alone(self) -> bool:
        """Whether nothing is made of the sum: as in a kernel that computes this rank's terms, in front of the one that sums them."""
        return self.operation == "all_reduce" and not (self.residual or self.norm or self.branch) and self.quant is None

    @property
    def adds_rows(self) -> bool:
        """Whether a term is computed from several rows at a time, which takes registers."""
        return self.prologue is not None and self.prologue.kind != "gated" and not isinstance(self.prologue, ProductForm)


def make_request(
    tokens: int,
    hidden_size: int,
    dtype: torch.dtype,
    *,
    residual: bool,
    norm: bool,
    wide_weight: bool,
    quant: Quant | None,
    keep_norm: bool,
    operation: Operation,
    late_weight: bool = False,
    prologue: PrologueForm | TermsForm | ProductForm | None = None,
    branch: bool = False,
    wide_branch: bool = False,
    rows: tuple[int, ...] | None = None,
    write_padding: bool = True,
) -> Request:
    """What is planned for such a call. For ``all_gather`` residual, norm and quant say what the shard holds."""
    wanted = Wanted.of(has_residual=residual, has_norm=norm, quant=quant, keep_norm=keep_norm, operation=operation)
    check_split(operation, tokens, rows)
    if prologue is not None and (operation == "all_gather" or (operation == "finish" and prologue.kind != "gated")):
        raise ArgumentError(f"{operation} sums nothing and takes no prologue", hint="pass it to all_reduce or reduce_scatter")
    if branch and operation in ("finish", "all_gather"):
        raise ArgumentError(f"{operation} sums nothing and takes no branch_norm", hint="pass it to all_reduce or reduce_scatter")
    if branch and not residual:
        raise ArgumentError("branch_norm without residual=", hint="pass the residual that the normed sum is added to, or use norm=")
    if operation == "all_gather":  # adds and finishes nothing
        residual = norm = wide_weight = late_weight = False
    residual = residual and operation != "finish"
    if isinstance(prologue, PrologueForm) and prologue.weights == "float32" and dtype == torch.float32:
        prologue = replace(prologue, weights="value")
    shape = tokens, hidden_size, dtype, residual, norm, wide_weight, quant, wanted, operation, late_weight, prologue, branch, wide_branch
    return Request(*shape, rows, write_padding)


def sum_alone(request: Request) -> Request:
    """What a kernel is asked for that only adds what ``request`` sums, on one rank."""
    wanted = replace(request.wanted, reduced=True, residual=False, norm=False, codes=False, scales=False)
    plain: dict[str, Any] = {"residual": False, "norm": False, "wide_weight": False, "quant": None, "late_weight": False}
    return replace(request, operation="all_reduce", rows=None, branch=False, wide_branch=False, wanted=wanted, **plain)


@dataclass(frozen=True)
class Form:
    """What a tensor of a call looks like.

    ``elements`` counts padding too; ``stride``: of scales, other tensors are row-contiguous; ``whole``: values of all rows, like a partial.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype
    elements: int
    stride: tuple[int, ...] | None = None
    whole: bool = False

    @functools.cached_property
    def nbytes(self) -> int:
        """Of its memory."""
        return self.elements * self.dtype.itemsize

    @functools.cached_property
    def padded(self) -> bool:
        """Whether the memory has padding that the shape does not show."""
        return self.elements > math.prod(self.shape)

    def empty(self, device: torch.device) -> torch.Tensor:
        """A tensor of this form, uninitialized."""
        if self.stride is None or (self.stride[-1] == 1 and not self.padded):
            return torch.empty(self.shape, dtype=self.dtype, device=device)
        return torch.empty(self.elements, dtype=self.dtype, device=device).as_strided(self.shape, self.stride)


def forms_of(request: Request, stream_rows: int, finished_rows: int) -> dict[str, Form]:
    """The forms of the tensors of ``request.wanted``, by name, in so many rows."""
    forms: dict[str, Form] = {}
    wanted, width, quant = request.wanted, request.hidden_size, request.quant
    for name, rows in ("reduced", stream_rows), ("residual", stream_rows), ("norm", finished_rows):
        if getattr(wanted, name):
            forms[name] = Form((rows, width), request.dtype, rows * width, whole=rows == request.tokens)
    if quant is not None:
        shape, dtype = code_spec(quant, finished_rows, width)
        forms["codes"] = Form(shape, dtype, math.prod(shape))
        scales = scale_spec(quant, finished_rows, width)
        if scales is not None:
            forms["scales"] = Form(scales.shape, scales.dtype, scales.storage, scales.stride)
    return forms


@dataclass(frozen=True, eq=False)
class Signature:
    """What calls have in common that differ in their tensors and scalars alone. Two are equal if they are one object.

    ``owned``: which of the T rows this rank owns, where it gives or gets a shard. ``device``: of every tensor.
    """

    request: Request
    owned: range | None
    device: torch.device

    @property
    def stream_rows(self) -> int:
        """Rows of ``reduced`` or ``residual``, out and in."""
        return self.request.tokens if self.owned is None or self.request.operation == "all_gather" else len(self.owned)

    @property
    def finished_rows(self) -> int:
        """Rows of ``norm``, ``codes`` and ``scales``."""
        return len(self.owned) if self.owned is not None and self.request.operation == "reduce_scatter" else self.request.tokens

    @functools.cached_property
    def input_bytes(self) -> tuple[int, int, int]:
        """Of partial, residual and weight, where the call has them."""
        request = self.request
        row = request.hidden_size * request.dtype.itemsize
        return request.tokens * row, self.stream_rows * row, request.hidden_size * 4 if request.wide_weight else row

    @functools.cached_property
    def forms(self) -> dict[str, Form]:
        """Of the outputs, by name."""
        return forms_of(self.request, self.stream_rows, self.finished_rows)

    def empty(self) -> Output:
        """Fresh tensors for every output, uninitialized."""
        return Output(**{name: form.empty(self.device) for name, form in self.forms.items()})

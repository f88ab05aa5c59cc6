"""The caller's buffers as the outputs of a call.

FlashInfer takes outputs as memory: of any shape, codes and scales of any dtype, and often the same memory as an input. Collogue
writes tensors of one exact form that overlap no input but the residual. What differs is viewed where it can be, and otherwise
written to a fresh tensor and copied.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from collogue.contract.formats import code_spec, empty_scales, scale_spec, scale_storage
from collogue.contract.quant import Quant
from collogue.contract.spec import Output, Wanted
from collogue.errors import DTypeError, LayoutError, OverlapError, ShapeError

#: What FlashInfer calls the outputs of :class:`collogue.Output`.
ARGUMENTS = {"reduced": "output", "residual": "residual_out", "norm": "norm_out", "codes": "quant_out", "scales": "scale_out"}


@dataclass
class Placed:
    """Where a call writes, and what is to be copied into the caller's memory afterwards: ``(target, source)``."""

    out: Output
    copies: list[tuple[torch.Tensor, torch.Tensor]]

    def finish(self) -> None:
        """Copy what could not be written in place. On the current stream, after the call."""
        for target, source in self.copies:
            target.copy_(source)


def place(
    like: torch.Tensor,
    read: Sequence[torch.Tensor],
    residual: torch.Tensor | None,
    quant: Quant | None,
    wanted: Wanted,
    given: Mapping[str, torch.Tensor | None],
) -> Placed:
    """Outputs for a call on rows ``like`` these, in the buffers that are ``given`` by FlashInfer's names, else fresh.

    ``read``: the tensors of this rank's term.
    """
    placed = Placed(Output(), [])
    targets: list[tuple[str, torch.Tensor]] = []
    tokens, width = like.shape
    for name, argument in ARGUMENTS.items():
        if not getattr(wanted, name):
            continue
        buffer = given[argument]
        if name == "scales":
            assert quant is not None
            view, whole = _scales(buffer, quant, tokens, width, like.device)
        elif name == "codes":
            assert quant is not None
            view, whole = _bytes(argument, buffer, *code_spec(quant, tokens, width), like.device), True
        else:
            view, whole = _values(argument, buffer, like), True
        if buffer is not None:
            targets.append((argument, view))
        inputs = read if name == "residual" else (*read, residual)
        if not whole:
            assert quant is not None
            staged = empty_scales(quant, tokens, width, like.device)
            placed.copies.append((view, scale_storage(staged).view(staged.dtype)[: view.numel()]))
            view = staged
        elif any(other is not None and _overlap(view, other) for other in inputs):
            staged = torch.empty_like(view)
            placed.copies.append((view, staged))
            view = staged
        setattr(placed.out, name, view)
    _check_apart(targets)
    return placed


def _values(name: str, buffer: torch.Tensor | None, like: torch.Tensor) -> torch.Tensor:
    """``buffer`` as ``[T, H]``: the first rows of it, if it is larger."""
    if buffer is None:
        return torch.empty_like(like)
    if buffer.dtype != like.dtype:
        raise DTypeError(f"{name} has dtype {buffer.dtype}, the input {like.dtype}", hint="allocate it like the input")
    return _first(name, buffer, like.shape)


def _bytes(name: str, buffer: torch.Tensor | None, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """The first bytes of ``buffer``, of any dtype, as a tensor of this shape and dtype."""
    if buffer is None:
        return torch.empty(shape, dtype=dtype, device=device)
    if buffer.dtype != dtype:
        _check_contiguous(name, buffer)
        raw: torch.Tensor = buffer.view(-1).view(torch.uint8)
        needed = math.prod(shape) * dtype.itemsize
        _check_size(name, raw.numel(), needed, "bytes")
        buffer = raw[:needed].view(dtype)
    return _first(name, buffer, shape)


def _first(name: str, buffer: torch.Tensor, shape: tuple[int, ...]) -> torch.Tensor:
    if buffer.shape == shape:
        return buffer
    _check_contiguous(name, buffer)
    _check_size(name, buffer.numel(), math.prod(shape), "elements")
    return buffer.view(-1)[: math.prod(shape)].view(shape)


def _scales(buffer: torch.Tensor | None, quant: Quant, tokens: int, width: int, device: torch.device) -> tuple[torch.Tensor, bool]:
    """The scales' memory, and whether it is all there: column-major callers may leave out the last column's padding."""
    spec = scale_spec(quant, tokens, width)
    assert spec is not None
    if buffer is None:
        raise ShapeError("scale_out is not given", hint="allocate it: without the scales the codes cannot be read")
    if spec.stride[1] == 1:
        return _bytes("scale_out", buffer, spec.shape, spec.dtype, device), True
    if tuple(buffer.shape) != spec.shape or buffer.stride() != spec.stride or buffer.dtype != spec.dtype:
        raise ShapeError(
            f"scale_out is {buffer.dtype} {list(buffer.shape)} with strides {buffer.stride()}",
            hint=f"needed: torch.empty_strided({spec.shape}, {spec.stride}, dtype={spec.dtype})",
        )
    held = buffer.untyped_storage().nbytes() // buffer.element_size() - buffer.storage_offset()
    if held >= spec.storage:
        return buffer, True
    return buffer.as_strided((held,), (1,)), False


def _overlap(a: torch.Tensor, b: torch.Tensor) -> bool:
    first, second = a.data_ptr(), b.data_ptr()
    return first < second + b.numel() * b.element_size() and second < first + a.numel() * a.element_size()


def _check_apart(targets: list[tuple[str, torch.Tensor]]) -> None:
    for i, (name, tensor) in enumerate(targets):
        for other, memory in targets[:i]:
            if _overlap(tensor, memory):
                raise OverlapError(f"the outputs {other} and {name} share memory", hint="give each output memory of its own")


def _check_contiguous(name: str, buffer: torch.Tensor) -> None:
    if not buffer.is_contiguous():
        raise LayoutError(f"{name} has strides {buffer.stride()}, not contiguous", hint="allocate it contiguous")


def _check_size(name: str, held: int, needed: int, unit: str) -> None:
    if held < needed:
        raise ShapeError(f"{name} holds {held} {unit}; the call writes {needed}", hint="allocate it with its padding (docs/contract.md)")

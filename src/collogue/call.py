"""One call, checked: what the user gave, and that it can be right. Nothing here launches anything."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NoReturn, TypeAlias

import torch

from collogue.errors import (
    ArgumentError,
    CapacityError,
    DeviceError,
    DTypeError,
    FormatError,
    GradError,
    LayoutError,
    OverlapError,
    ShapeError,
)
from collogue.formats import code_spec, empty_scales, scale_elements, scale_spec
from collogue.spec import Operation, Output, Quant, RMSNorm, Wanted, owned_rows

#: Bytes to which rows and tensors must be aligned: kernels move 16 bytes at a time.
ALIGNMENT = 16


@dataclass(slots=True, eq=False)
class Call:
    """The checked arguments of one call.

    ``partial``: this rank's term [T, H]; of ``finish``, y; of ``all_gather``, a tensor without memory (meta) that only says the shape and
    dtype of gathered values. ``rows``: which of the T rows this rank owns, where it gives or gets a shard. ``shard``: what is gathered.
    """

    partial: torch.Tensor
    residual: torch.Tensor | None
    norm: RMSNorm | None
    quant: Quant | None
    wanted: Wanted
    operation: Operation = "all_reduce"
    rows: range | None = None
    shard: Output | None = None

    @property
    def tokens(self) -> int:
        """T: the rows of the whole, on every rank."""
        return self.partial.shape[0]

    @property
    def hidden_size(self) -> int:
        return self.partial.shape[1]

    @property
    def device(self) -> torch.device:
        return self.partial.device if self.shard is None else next(tensor for _, tensor in self.shard.items()).device

    @property
    def stream_rows(self) -> int:
        """Rows of ``reduced`` or ``residual``, out and in."""
        return self.tokens if self.rows is None or self.operation == "all_gather" else len(self.rows)

    @property
    def finished_rows(self) -> int:
        """Rows of ``norm``, ``codes`` and ``scales``."""
        return len(self.rows) if self.rows is not None and self.operation == "reduce_scatter" else self.tokens


@dataclass(frozen=True, eq=False)
class Capacity:
    """What a communicator was made for, and for which rank; every call is checked against it."""

    max_tokens: int
    hidden_size: int
    dtype: torch.dtype
    device: torch.device
    world_size: int = 1
    rank: int = 0

    @functools.cached_property
    def index(self) -> int:
        """As ``Tensor.get_device()`` gives it: -1 for the CPU."""
        return -1 if self.device.type == "cpu" else int(self.device.index)


def check_call(
    capacity: Capacity,
    partial: torch.Tensor,
    residual: torch.Tensor | None,
    norm: RMSNorm | None,
    quant: Quant | None,
    keep_norm: bool,
    *,
    operation: Operation = "all_reduce",
) -> Call:
    """Check the arguments of one call, other than an ``all_gather``, against ``capacity`` and against each other."""
    if not _is_plain(partial, capacity):
        check_values("partial" if operation != "finish" else "y", partial, capacity)
    tokens, hidden_size = partial.shape
    if hidden_size > capacity.hidden_size or tokens > capacity.max_tokens:
        raise_capacity("partial" if operation != "finish" else "y", tokens, hidden_size, capacity)
    check_hidden_size(hidden_size)
    rows = None
    if operation == "sharded" or operation == "reduce_scatter":
        rows = owned_rows(tokens, capacity.world_size, capacity.rank)
    if residual is not None:
        if not _is_plain(residual, capacity):
            check_values("residual", residual, capacity)
        if residual.shape != (partial.shape if rows is None else (len(rows), hidden_size)):
            _raise_residual(residual, partial, rows, capacity)
    if norm is not None:
        _check_norm(norm, hidden_size, capacity)
    if quant is not None:
        _check_quant(quant, hidden_size, capacity)
    if torch.is_grad_enabled():
        check_no_grad(("partial", partial), ("residual", residual), ("RMSNorm.weight", None if norm is None else norm.weight))
    wanted = Wanted.of(has_residual=residual is not None, has_norm=norm is not None, quant=quant, keep_norm=keep_norm, operation=operation)
    return Call(partial, residual, norm, quant, wanted, operation, rows)


def raise_capacity(name: str, tokens: int, hidden_size: int, capacity: Capacity) -> NoReturn:
    """Raise :class:`CapacityError` for a tensor that is larger than the communicator was made for."""
    raise CapacityError(
        f"{name} has shape {[tokens, hidden_size]}; the communicator was made for at most "
        f"{capacity.max_tokens} tokens of hidden size {capacity.hidden_size}",
        hint="ask comm.fits(tokens) first, or make the communicator with a larger max_tokens or hidden_size",
    )


def _raise_residual(residual: torch.Tensor, partial: torch.Tensor, rows: range | None, capacity: Capacity) -> NoReturn:
    if rows is None:
        raise ShapeError(
            f"residual has shape {list(residual.shape)}, partial {list(partial.shape)}",
            hint="give the residual rows of the same tokens as the partial",
        )
    raise ShapeError(
        f"residual has shape {list(residual.shape)}; rank {capacity.rank} of {capacity.world_size} owns {len(rows)} rows of "
        f"partial {list(partial.shape)}",
        hint="give the rows that this rank owns: comm.shard(residual)",
    )


def _is_plain(tensor: torch.Tensor, capacity: Capacity) -> bool:
    """Whether nothing is wrong with a ``[T, H]`` tensor: the usual case, asked in one go. What is wrong is found out later."""
    return (
        isinstance(tensor, torch.Tensor)
        and tensor.dtype is capacity.dtype
        and tensor.ndim == 2
        and tensor.get_device() == capacity.index
        and tensor.device.type == capacity.device.type
        and tensor.is_contiguous()
        and tensor.data_ptr() % ALIGNMENT == 0
    )


def check_hidden_size(hidden_size: int) -> None:
    """Raise :class:`ShapeError` unless ``hidden_size`` is a positive multiple of 8."""
    if hidden_size <= 0 or hidden_size % 8:
        raise ShapeError(f"hidden size {hidden_size} is not a positive multiple of 8", hint="pad the hidden size to a multiple of 8")


def check_values(name: str, tensor: torch.Tensor, capacity: Capacity) -> None:
    """Raise unless ``tensor`` is ``[T, H]`` in the communicator's dtype, on its device, row-contiguous and aligned."""
    if not isinstance(tensor, torch.Tensor) or tensor.ndim != 2:
        shape = list(tensor.shape) if isinstance(tensor, torch.Tensor) else type(tensor).__name__
        raise ShapeError(f"{name} must be a tensor of shape [T, H], got {shape}", hint="flatten leading dimensions: x.view(-1, H)")
    if tensor.dtype != capacity.dtype:
        raise DTypeError(
            f"{name} has dtype {tensor.dtype}; the communicator was made for {capacity.dtype}",
            hint="make one communicator per dtype, or convert the tensor",
        )
    check_memory(name, tensor, capacity.device)


def check_memory(name: str, tensor: torch.Tensor, device: torch.device) -> None:
    """Raise unless ``tensor`` lies on ``device``, row-contiguous and aligned."""
    _check_device(name, tensor, device)
    if not tensor.is_contiguous():
        raise LayoutError(f"{name} has strides {tensor.stride()}, not row-contiguous", hint=f"pass {name}.contiguous()")
    _check_alignment(name, tensor)


def _check_device(name: str, tensor: torch.Tensor, device: torch.device) -> None:
    if tensor.device != device:
        raise DeviceError(f"{name} is on {tensor.device}, the communicator on {device}", hint=f"move it: {name}.to('{device}')")


def _check_alignment(name: str, tensor: torch.Tensor) -> None:
    if tensor.data_ptr() % ALIGNMENT:
        raise LayoutError(
            f"{name} starts at an address that is not a multiple of {ALIGNMENT} bytes", hint=f"pass {name}.clone(), or slice at a row"
        )


# Descriptions do not change: what was checked once need not be checked again, unless the tensor in one has other memory
# (`module.to(...)` gives a parameter new memory under the same description).


def _check_norm(norm: RMSNorm, hidden_size: int, capacity: Capacity) -> None:
    if not isinstance(norm, RMSNorm):
        raise ArgumentError(f"norm is a {type(norm).__name__}", hint="pass collogue.RMSNorm(weight, eps=...)")
    fits = (capacity, hidden_size, norm.weight.data_ptr())
    if norm.__dict__.get("_fits") == fits:
        return
    if norm.weight.shape[0] != hidden_size:
        raise ShapeError(
            f"RMSNorm.weight has {norm.weight.shape[0]} elements, the hidden size is {hidden_size}",
            hint="pass the weight of the norm that follows this projection",
        )
    if norm.weight.dtype not in (capacity.dtype, torch.float32):
        raise DTypeError(
            f"RMSNorm.weight has dtype {norm.weight.dtype}, the communicator {capacity.dtype}",
            hint=f"convert the weight to {capacity.dtype} or torch.float32",
        )
    check_memory("RMSNorm.weight", norm.weight, capacity.device)
    norm.__dict__["_fits"] = fits


def _check_quant(quant: Quant, hidden_size: int, capacity: Capacity) -> None:
    if not isinstance(quant, Quant):
        raise FormatError(f"quant is a {type(quant).__name__}", hint="pass a format, such as collogue.NVFP4(global_scale)")
    scale = quant.given_scale
    fits = (capacity, hidden_size, scale.data_ptr() if isinstance(scale, torch.Tensor) else None)
    if quant.__dict__.get("_fits") == fits:
        return
    quant.check_hidden_size(hidden_size)
    if isinstance(scale, torch.Tensor) and scale.device != capacity.device:
        raise DeviceError(
            f"the scale of {quant.name} is on {scale.device}, the communicator on {capacity.device}",
            hint="pass a Python float, or move the tensor once when the model is loaded",
        )
    quant.__dict__["_fits"] = fits


def check_no_grad(*named: tuple[str, torch.Tensor | None]) -> None:
    """Raise :class:`GradError` for the first tensor that requires grad. For grad mode only."""
    for name, tensor in named:
        if tensor is not None and tensor.requires_grad:
            raise GradError(f"{name} requires grad", hint="call under torch.inference_mode() or torch.no_grad()")


def allocate(call: Call) -> Output:
    """Fresh tensors for every output the call asks for, uninitialised."""
    wanted, partial, quant = call.wanted, call.partial, call.quant
    whole = call.rows is None  # the usual case, and the one that has to be quick
    out = Output()
    if wanted.reduced:
        out.reduced = torch.empty_like(partial) if whole else _empty_rows(call, call.stream_rows)
    if wanted.residual:
        out.residual = torch.empty_like(partial) if whole else _empty_rows(call, call.stream_rows)
    if wanted.norm:
        out.norm = torch.empty_like(partial) if whole else _empty_rows(call, call.finished_rows)
    if quant is not None:
        rows, hidden_size = partial.shape
        if not whole:
            rows = call.finished_rows
        device = call.device
        shape, dtype = code_spec(quant, rows, hidden_size)
        out.codes = torch.empty(shape, dtype=dtype, device=device)
        if wanted.scales:
            out.scales = empty_scales(quant, rows, hidden_size, device)
    return out


def _empty_rows(call: Call, rows: int) -> torch.Tensor:
    return torch.empty(rows, call.hidden_size, dtype=call.partial.dtype, device=call.device)


#: Shape, dtype and (of scales) strides of a tensor.
Form: TypeAlias = tuple[tuple[int, ...], torch.dtype, tuple[int, ...] | None]


def forms_of(call: Call, stream_rows: int, finished_rows: int) -> dict[str, Form]:
    """What the tensors of ``call.wanted`` look like, by name, in so many rows."""
    forms: dict[str, Form] = {}
    for name, rows in ("reduced", stream_rows), ("residual", stream_rows), ("norm", finished_rows):
        if getattr(call.wanted, name):
            forms[name] = (rows, call.hidden_size), call.partial.dtype, None
    if call.quant is not None:
        forms["codes"] = (*code_spec(call.quant, finished_rows, call.hidden_size), None)
        scales = scale_spec(call.quant, finished_rows, call.hidden_size)
        if scales is not None:
            forms["scales"] = scales.shape, scales.dtype, scales.stride
    return forms


def check_out(call: Call, out: Output) -> None:
    """Raise unless ``out`` holds exactly the outputs of ``call``, well-shaped, and overlaps nothing but the residual in place."""
    if not isinstance(out, Output):
        raise ArgumentError(f"out is a {type(out).__name__}", hint="pass collogue.Output(...) with the tensors to write")
    forms, given = forms_of(call, call.stream_rows, call.finished_rows), dict(out.items())
    if given.keys() != forms.keys():
        raise ShapeError(
            f"out holds {sorted(given) or 'nothing'}; this call has the outputs {sorted(forms)}",
            hint="give exactly those tensors in collogue.Output(...)",
        )
    check_forms("out", given, forms, call.device, hint="allocate it as a call without out= would")
    _check_overlap(call, given)


def check_forms(owner: str, given: dict[str, torch.Tensor], forms: dict[str, Form], device: torch.device, *, hint: str) -> None:
    """Raise unless each tensor of ``given`` has its form and lies on ``device``, contiguous (scales: with their padding) and aligned."""
    for name, tensor in given.items():
        shape, dtype, stride = forms[name]
        if tuple(tensor.shape) != shape or (stride is not None and tensor.numel() and tensor.stride() != stride):
            raise ShapeError(
                f"{owner}.{name} has shape {list(tensor.shape)} and strides {tensor.stride()}; needed: {list(shape)}"
                + (f" with strides {stride}" if stride is not None else ""),
                hint=hint,
            )
        if tensor.dtype != dtype:
            raise DTypeError(f"{owner}.{name} has dtype {tensor.dtype}, needed: {dtype}", hint=hint)
        if stride is None:
            check_memory(f"{owner}.{name}", tensor, device)
        else:
            _check_scales_memory(f"{owner}.{name}", tensor, device)


def _check_scales_memory(name: str, scales: torch.Tensor, device: torch.device) -> None:
    """Every byte that a call writes, the padding of column-major layouts included, must lie in the tensor's storage."""
    _check_device(name, scales, device)
    _check_alignment(name, scales)
    needed = _extent("scales", scales)[1] - scales.data_ptr()
    held = scales.untyped_storage().nbytes() - scales.storage_offset() * scales.element_size()
    if needed > held:
        raise LayoutError(
            f"{name} needs {needed} bytes with its padding; its storage has {held}", hint="allocate it as a call without out= would"
        )


def _check_overlap(call: Call, outputs: dict[str, torch.Tensor]) -> None:
    placed = [(name, *_extent(name, tensor)) for name, tensor in _inputs(call)]
    for name, tensor in outputs.items():
        first, last = _extent(name, tensor)
        for other, low, high in placed:
            in_place = name == "residual" and other == "residual" and (first, last) == (low, high)
            if first < high and low < last and not in_place:
                raise OverlapError(
                    f"out.{name} shares memory with {other}",
                    hint="only the residual may be updated in place; give the others memory of their own",
                )
        placed.append((f"out.{name}", first, last))


def _inputs(call: Call) -> Iterator[tuple[str, torch.Tensor]]:
    """Every tensor that the call reads."""
    if call.shard is not None:
        yield from ((f"shard.{name}", tensor) for name, tensor in call.shard.items())
        return
    yield "partial" if call.operation != "finish" else "y", call.partial
    if call.residual is not None:
        yield "residual", call.residual
    if call.norm is not None:
        yield "RMSNorm.weight", call.norm.weight
    if call.quant is not None and isinstance(call.quant.given_scale, torch.Tensor):
        yield "the scale", call.quant.given_scale


def _extent(name: str, tensor: torch.Tensor) -> tuple[int, int]:
    """First byte and one past the last byte of the tensor; of scales, with their padding."""
    elements = scale_elements(tensor) if name.endswith("scales") else tensor.numel()
    return tensor.data_ptr(), tensor.data_ptr() + elements * tensor.element_size()

"""One call, checked: what the user gave, and that it can be right. Nothing here launches anything."""

from __future__ import annotations

import functools
from dataclasses import dataclass

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
from collogue.spec import Operation, Output, Quant, RMSNorm, Wanted

#: Bytes to which rows and tensors must be aligned: kernels move 16 bytes at a time.
ALIGNMENT = 16


@dataclass(slots=True, eq=False)
class Call:
    """The checked arguments of one call."""

    partial: torch.Tensor
    residual: torch.Tensor | None
    norm: RMSNorm | None
    quant: Quant | None
    wanted: Wanted
    operation: Operation = "all_reduce"

    @property
    def tokens(self) -> int:
        return self.partial.shape[0]

    @property
    def hidden_size(self) -> int:
        return self.partial.shape[1]


@dataclass(frozen=True, eq=False)
class Capacity:
    """What a communicator was made for; every call is checked against it."""

    max_tokens: int
    hidden_size: int
    dtype: torch.dtype
    device: torch.device

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
) -> Call:
    """Check the arguments of one call against ``capacity`` and against each other."""
    if not _is_plain(partial, capacity):
        _check_values("partial", partial, capacity)
    tokens, hidden_size = partial.shape
    if hidden_size > capacity.hidden_size or tokens > capacity.max_tokens:
        raise CapacityError(
            f"partial has shape {[tokens, hidden_size]}; the communicator was made for at most "
            f"{capacity.max_tokens} tokens of hidden size {capacity.hidden_size}",
            hint="ask comm.fits(tokens) first, or make the communicator with a larger max_tokens or hidden_size",
        )
    check_hidden_size(hidden_size)
    if residual is not None:
        if not _is_plain(residual, capacity):
            _check_values("residual", residual, capacity)
        if residual.shape != partial.shape:
            raise ShapeError(
                f"residual has shape {list(residual.shape)}, partial {list(partial.shape)}",
                hint="give the residual rows of the same tokens as the partial",
            )
    if norm is not None:
        _check_norm(norm, hidden_size, capacity)
    if quant is not None:
        _check_quant(quant, hidden_size, capacity)
    if torch.is_grad_enabled():
        _check_no_grad(partial, residual, norm)
    wanted = Wanted.of(has_residual=residual is not None, has_norm=norm is not None, quant=quant, keep_norm=keep_norm)
    return Call(partial, residual, norm, quant, wanted)


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


def _check_values(name: str, tensor: torch.Tensor, capacity: Capacity) -> None:
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


def _check_no_grad(partial: torch.Tensor, residual: torch.Tensor | None, norm: RMSNorm | None) -> None:
    for name, tensor in ("partial", partial), ("residual", residual), ("RMSNorm.weight", None if norm is None else norm.weight):
        if tensor is not None and tensor.requires_grad:
            raise GradError(f"{name} requires grad", hint="call under torch.inference_mode() or torch.no_grad()")


def allocate(call: Call) -> Output:
    """Fresh tensors for every output the call asks for, uninitialised."""
    tokens, hidden_size = call.tokens, call.hidden_size
    wanted, partial = call.wanted, call.partial
    out = Output()
    if wanted.reduced:
        out.reduced = torch.empty_like(partial)
    if wanted.residual:
        out.residual = torch.empty_like(partial)
    if wanted.norm:
        out.norm = torch.empty_like(partial)
    if call.quant is not None:
        shape, dtype = code_spec(call.quant, tokens, hidden_size)
        out.codes = torch.empty(shape, dtype=dtype, device=partial.device)
        if wanted.scales:
            out.scales = empty_scales(call.quant, tokens, hidden_size, partial.device)
    return out


def check_out(call: Call, out: Output) -> None:
    """Raise unless ``out`` holds exactly the outputs of ``call``, well-shaped, and overlaps nothing but the residual in place."""
    expected: dict[str, tuple[tuple[int, ...], torch.dtype, tuple[int, ...] | None]] = {}
    shape = tuple(call.partial.shape)
    for name in ("reduced", "residual", "norm"):
        if getattr(call.wanted, name):
            expected[name] = (shape, call.partial.dtype, None)
    if call.quant is not None:
        codes_shape, codes_dtype = code_spec(call.quant, call.tokens, call.hidden_size)
        expected["codes"] = (codes_shape, codes_dtype, None)
        scales = scale_spec(call.quant, call.tokens, call.hidden_size)
        if scales is not None:
            expected["scales"] = (scales.shape, scales.dtype, scales.stride)
    if not isinstance(out, Output):
        raise ArgumentError(f"out is a {type(out).__name__}", hint="pass collogue.Output(...) with the tensors to write")
    given = dict(out.items())
    if given.keys() != expected.keys():
        raise ShapeError(
            f"out holds {sorted(given) or 'nothing'}; this call has the outputs {sorted(expected)}",
            hint="give exactly those tensors in collogue.Output(...)",
        )
    for name, tensor in given.items():
        shape, dtype, stride = expected[name]
        if tuple(tensor.shape) != shape or (stride is not None and tensor.numel() and tensor.stride() != stride):
            raise ShapeError(
                f"out.{name} has shape {list(tensor.shape)} and strides {tensor.stride()}; needed: {list(shape)}"
                + (f" with strides {stride}" if stride is not None else ""),
                hint="allocate it as a call without out= would",
            )
        if tensor.dtype != dtype:
            raise DTypeError(f"out.{name} has dtype {tensor.dtype}, needed: {dtype}", hint="allocate it as a call without out= would")
        if stride is None:
            check_memory(f"out.{name}", tensor, call.partial.device)
        else:
            _check_scales_memory(tensor, call.partial.device)
    _check_overlap(call, given)


def _check_scales_memory(scales: torch.Tensor, device: torch.device) -> None:
    """Every byte that a call writes, the padding of column-major layouts included, must lie in the tensor's storage."""
    _check_device("out.scales", scales, device)
    _check_alignment("out.scales", scales)
    needed = _extent("scales", scales)[1] - scales.data_ptr()
    held = scales.untyped_storage().nbytes() - scales.storage_offset() * scales.element_size()
    if needed > held:
        raise LayoutError(
            f"out.scales needs {needed} bytes with its padding; its storage has {held}", hint="allocate it as a call without out= would"
        )


def _check_overlap(call: Call, outputs: dict[str, torch.Tensor]) -> None:
    inputs = {"partial": call.partial, "residual": call.residual, "RMSNorm.weight": call.norm.weight if call.norm is not None else None}
    if call.quant is not None and isinstance(call.quant.given_scale, torch.Tensor):
        inputs["the scale"] = call.quant.given_scale
    placed = [(name, *_extent(name, t)) for name, t in inputs.items() if t is not None]
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


def _extent(name: str, tensor: torch.Tensor) -> tuple[int, int]:
    """First byte and one past the last byte of the tensor; of scales, with their padding."""
    elements = scale_elements(tensor) if name == "scales" else tensor.numel()
    return tensor.data_ptr(), tensor.data_ptr() + elements * tensor.element_size()

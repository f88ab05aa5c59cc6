"""One call, checked: what the user gave, and that it can be right. Nothing here launches anything."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from collogue.calls.capacity import Capacity, check_hidden_size, check_kinds, raise_capacity
from collogue.calls.request import Signature, make_request
from collogue.contract.quant import Quant
from collogue.contract.spec import Operation, Output, RMSNorm, Wanted, owned_rows
from collogue.errors import DeviceError, DTypeError, GradError, LayoutError, ShapeError

#: Bytes to which rows and tensors must be aligned: kernels move 16 bytes at a time.
ALIGNMENT = 16


@dataclass(slots=True, eq=False)
class Call:
    """The checked arguments of one call.

    ``partial``: this rank's term [T, H]; of ``finish``, y; of ``all_gather``, a tensor without memory (meta) that only says the shape and
    dtype of gathered values. ``shard``: what is gathered.
    """

    partial: torch.Tensor
    residual: torch.Tensor | None
    norm: RMSNorm | None
    quant: Quant | None
    signature: Signature
    shard: Output | None = None

    @property
    def tokens(self) -> int:
        """T: the rows of the whole, on every rank."""
        return self.signature.request.tokens

    @property
    def hidden_size(self) -> int:
        return self.signature.request.hidden_size

    @property
    def operation(self) -> Operation:
        return self.signature.request.operation

    @property
    def wanted(self) -> Wanted:
        return self.signature.request.wanted

    @property
    def rows(self) -> range | None:
        """Which of the T rows this rank owns, where it gives or gets a shard."""
        return self.signature.rows


def check_call(
    capacity: Capacity,
    partial: torch.Tensor,
    residual: torch.Tensor | None,
    norm: RMSNorm | None,
    quant: Quant | None,
    keep_norm: bool,
    operation: Operation = "all_reduce",
) -> Call:
    """Check the arguments of one call, other than an ``all_gather``, against ``capacity`` and against each other."""
    signature = _known(capacity, partial, residual, norm, quant, keep_norm, operation)
    if signature is None:
        signature = _check(capacity, partial, residual, norm, quant, keep_norm, operation)
        capacity.known[_key(partial, residual, norm, quant, keep_norm, operation)] = signature
    return Call(partial, residual, norm, quant, signature)


def _known(
    capacity: Capacity,
    partial: torch.Tensor,
    residual: torch.Tensor | None,
    norm: RMSNorm | None,
    quant: Quant | None,
    keep_norm: bool,
    operation: Operation,
) -> Signature | None:
    """The signature of a call in which nothing is wrong, like one before: the usual case, asked in one go. What is wrong is found later."""
    device, dtype = capacity.device, capacity.dtype
    for tensor in (partial,) if residual is None else (partial, residual):
        if (
            not isinstance(tensor, torch.Tensor)
            or tensor.dtype is not dtype
            or tensor.device != device
            or not tensor.is_contiguous()
            or tensor.data_ptr() % ALIGNMENT
        ):
            return None
    if norm is not None:
        if not isinstance(norm, RMSNorm):
            return None
        weight = norm.weight
        if weight.device != device or not weight.is_contiguous() or weight.data_ptr() % ALIGNMENT:
            return None
    if quant is not None:
        if not isinstance(quant, Quant):
            return None
        scale = quant.given_scale
        if isinstance(scale, torch.Tensor) and scale.device != device:
            return None
    if torch.is_grad_enabled() and (
        partial.requires_grad or (residual is not None and residual.requires_grad) or (norm is not None and norm.weight.requires_grad)
    ):
        return None
    return capacity.known.get(_key(partial, residual, norm, quant, keep_norm, operation))


def _key(
    partial: torch.Tensor, residual: torch.Tensor | None, norm: RMSNorm | None, quant: Quant | None, keep_norm: bool, operation: Operation
) -> tuple[object, ...]:
    """Everything that :func:`_known` leaves to be checked."""
    return (
        partial.shape,
        None if residual is None else residual.shape,
        None if norm is None else (norm.weight.shape, norm.weight.dtype),
        None if quant is None else quant.label,
        keep_norm,
        operation,
    )


def _check(
    capacity: Capacity,
    partial: torch.Tensor,
    residual: torch.Tensor | None,
    norm: RMSNorm | None,
    quant: Quant | None,
    keep_norm: bool,
    operation: Operation,
) -> Signature:
    """Raise for what is wrong with the call; if nothing is, its signature."""
    name = "partial" if operation != "finish" else "y"
    check_values(name, partial, capacity)
    tokens, hidden_size = partial.shape
    if hidden_size > capacity.hidden_size or tokens > capacity.max_tokens:
        raise_capacity(name, tokens, hidden_size, capacity)
    check_hidden_size(hidden_size)
    if residual is not None:
        check_values("residual", residual, capacity)
        _check_residual(residual, partial, capacity, operation)
    check_kinds(norm, quant)
    if norm is not None:
        _check_norm(norm, hidden_size, capacity)
    if quant is not None:
        _check_quant(quant, hidden_size, capacity)
    if torch.is_grad_enabled():
        check_no_grad(("partial", partial), ("residual", residual), ("RMSNorm.weight", None if norm is None else norm.weight))
    request = make_request(
        tokens,
        hidden_size,
        capacity.dtype,
        residual=residual is not None,
        norm=norm is not None,
        wide_weight=norm is not None and norm.weight.dtype != capacity.dtype,
        quant=quant,
        keep_norm=keep_norm,
        operation=operation,
    )
    return capacity.signature(request)


def _check_residual(residual: torch.Tensor, partial: torch.Tensor, capacity: Capacity, operation: Operation) -> None:
    tokens, hidden_size = partial.shape
    if operation in ("sharded", "reduce_scatter"):
        rows = owned_rows(tokens, capacity.world_size, capacity.rank)
        if residual.shape != (len(rows), hidden_size):
            raise ShapeError(
                f"residual has shape {list(residual.shape)}; rank {capacity.rank} of {capacity.world_size} owns {len(rows)} rows of "
                f"partial {list(partial.shape)}",
                hint="give the rows that this rank owns: comm.shard(residual)",
            )
    elif residual.shape != partial.shape:
        raise ShapeError(
            f"residual has shape {list(residual.shape)}, partial {list(partial.shape)}",
            hint="give the residual rows of the same tokens as the partial",
        )


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
    check_rows(name, tensor, device)
    check_alignment(name, tensor)


def check_rows(name: str, tensor: torch.Tensor, device: torch.device) -> None:
    """Raise unless ``tensor`` lies on ``device``, row-contiguous."""
    check_device(name, tensor, device)
    if not tensor.is_contiguous():
        raise LayoutError(f"{name} has strides {tensor.stride()}, not row-contiguous", hint=f"pass {name}.contiguous()")


def check_device(name: str, tensor: torch.Tensor, device: torch.device) -> None:
    """Raise :class:`DeviceError` unless ``tensor`` is on ``device``."""
    if tensor.device != device:
        raise DeviceError(f"{name} is on {tensor.device}, the communicator on {device}", hint=f"move it: {name}.to('{device}')")


def check_alignment(name: str, tensor: torch.Tensor) -> None:
    """Raise :class:`LayoutError` unless ``tensor`` starts where kernels can read and write."""
    if tensor.data_ptr() % ALIGNMENT:
        raise LayoutError(
            f"{name} starts at an address that is not a multiple of {ALIGNMENT} bytes", hint=f"pass {name}.clone(), or slice at a row"
        )


def _check_norm(norm: RMSNorm, hidden_size: int, capacity: Capacity) -> None:
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


def _check_quant(quant: Quant, hidden_size: int, capacity: Capacity) -> None:
    scale = quant.given_scale
    quant.check_hidden_size(hidden_size)
    if isinstance(scale, torch.Tensor) and scale.device != capacity.device:
        raise DeviceError(
            f"the scale of {quant.name} is on {scale.device}, the communicator on {capacity.device}",
            hint="pass a Python float, or move the tensor once when the model is loaded",
        )


def check_no_grad(*named: tuple[str, torch.Tensor | None]) -> None:
    """Raise :class:`GradError` for the first tensor that requires grad. For grad mode only."""
    for name, tensor in named:
        if tensor is not None and tensor.requires_grad:
            raise GradError(f"{name} requires grad", hint="call under torch.inference_mode() or torch.no_grad()")

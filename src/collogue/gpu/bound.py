"""Eager calls in as little host time as possible: everything that is the same in every call of a signature is looked up once.

A bound call makes all the checks of :func:`collogue.calls.call.check_call` and :func:`collogue.calls.outputs.check_out` in their
cheapest form. It never raises: where anything is unusual it returns ``None`` and has done nothing, and the caller takes the long way,
which finds the same and says what it is.
"""

from __future__ import annotations

import ctypes
import itertools
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch.autograd import forward_ad
from torch.nn import Parameter

from collogue.calls.call import ALIGNMENT, Call
from collogue.calls.request import Form, Signature
from collogue.contract.spec import OUTPUTS, Output, RMSNorm
from collogue.gpu import header
from collogue.gpu.launch import Launcher, Params

if TYPE_CHECKING:
    from collogue.gpu.engine import KernelEngine

#: Sets of addresses in which the outputs are known to overlap nothing, for each signature.
_MOST_PLACES = 64
_POINTER = ctypes.sizeof(ctypes.c_void_p)
_MISALIGNED = ALIGNMENT - 1
_ORDINARY = frozenset({torch.Tensor, Parameter})

Bound = Callable[[Call, "Output | None"], "Output | None"]


def key_of(call: Call) -> tuple[Any, ...]:
    """What a bound call is found by. Raises :class:`AttributeError` where the arguments are not what they should be."""
    quant = call.quant
    return (
        call.operation,
        call.partial.shape,
        call.residual is None,
        call.norm is None,
        None if quant is None else quant.label,
        call.keep_norm,
    )


def bind(engine: KernelEngine, signature: Signature, launcher: Launcher, launch: Callable[[int], None]) -> Bound:
    """The bound call of ``signature``: ``launch(stream)`` launches what ``launcher`` and its parameters say.

    The checks of the weight's width, the format's block and the like were made by the first call of the signature.
    """
    request, forms, index = signature.request, signature.forms, engine.index
    dtype, rows = request.dtype, signature.stream_rows
    shape, residual_shape = torch.Size((request.tokens, request.hidden_size)), torch.Size((rows, request.hidden_size))
    weight_shape, weight_dtype = torch.Size((request.hidden_size,)), torch.float32 if request.wide_weight else dtype
    has_residual, has_norm, has_quant = request.residual, request.norm, request.quant is not None
    partial_bytes, residual_bytes, weight_bytes = signature.input_bytes
    params = launcher.params
    pointers = (ctypes.c_uint64 * (ctypes.sizeof(Params) // _POINTER)).from_buffer(params)

    def place(name: str) -> int:
        return int(getattr(Params, name).offset) // _POINTER

    partial_at, residual_at, weight_at, scale_at = map(place, ("partial", "residual", "weight", "scale"))
    out_at = {"reduced": "stream", "residual": "stream", "norm": "norm", "codes": "codes", "scales": "scales"}
    wanted = [(slot, forms[name], place(out_at[name]), name) for slot, name in enumerate(OUTPUTS) if name in forms]
    allocators = [_allocator(form, signature.device) for _, form, _, _ in wanted]
    absent = [name for name in OUTPUTS if name not in forms]
    apart: set[tuple[int, ...]] = set()
    group_word = params.header[1]
    fault, late_rank = engine.failure_words
    acquire, release = engine.in_use.acquire_now, engine.in_use.release
    grad_enabled, inference = torch.is_grad_enabled, torch.is_inference_mode_enabled
    plain = torch.Tensor.__torch_dispatch__
    capturing, current_device = torch._C._cuda_isCurrentStreamCapturing, torch._C._cuda_getDevice
    current_stream, transformed = torch._C._cuda_getCurrentRawStream, torch._C._functorch.maybe_current_level

    def checked(tensor: torch.Tensor, of: torch.Size) -> int:
        """The address of an input, 0 where it is not as it should be."""
        if (
            tensor.__class__ not in _ORDINARY
            or tensor.dtype is not dtype
            or tensor.shape != of
            or tensor.get_device() != index
            or not tensor.is_contiguous()
            or tensor.is_neg()
        ):
            return 0
        address = tensor.data_ptr()
        return 0 if address & _MISALIGNED else address

    def given(out: Output) -> list[torch.Tensor] | None:
        """The tensors of ``out``, where they are exactly those of the call and may be written."""
        for name in absent:
            if getattr(out, name) is not None:
                return None
        found: list[torch.Tensor] = []
        for _, form, _, name in wanted:
            tensor = getattr(out, name)
            if (
                tensor.__class__ not in _ORDINARY
                or tensor.dtype is not form.dtype
                or tensor.shape != form.shape
                or tensor.get_device() != index
                or (not tensor.is_contiguous() if form.stride is None else tensor.stride() != form.stride)
                or tensor.data_ptr() & _MISALIGNED
                or (form.padded and tensor.untyped_storage().nbytes() - tensor.storage_offset() * tensor.element_size() < form.nbytes)
                or (tensor.requires_grad and grad_enabled())
                or (tensor.is_inference() and not inference())
            ):
                return None
            found.append(tensor)
        return found

    def overlap(addresses: tuple[int, ...]) -> bool:
        """Whether an output shares memory with another tensor of the call, but for a residual in place."""
        partial, residual, weight, scale, *outs = addresses
        spans = [(partial, partial + partial_bytes), (weight, weight + weight_bytes), (scale, scale + 4)]
        for (_, form, _, name), first in zip(wanted, outs, strict=True):
            spans.append((first, first + form.nbytes))
            if name == "residual" and first == residual:
                residual = 0  # in place
        spans.append((residual, residual + residual_bytes))
        spans = sorted(span for span in spans if span[0])
        if any(last > first for (_, last), (first, _) in itertools.pairwise(spans)):
            return True
        if len(apart) >= _MOST_PLACES:
            apart.clear()
        apart.add(addresses)
        return False

    def call(call: Call, out: Output | None) -> Output | None:
        if (
            fault.value
            or late_rank.value
            or transformed() is not None
            or forward_ad._current_level >= 0
            or capturing()
            or current_device() != index
        ):
            return None
        partial = checked(call.partial, shape)
        residual = weight = scale = 0
        if not partial:
            return None
        grad = grad_enabled() and call.partial.requires_grad
        if has_residual:
            residual = checked(call.residual, residual_shape)  # type: ignore[arg-type]
            if not residual:
                return None
            grad = grad or (call.residual.requires_grad and grad_enabled())  # type: ignore[union-attr]
        norm, quant = call.norm, call.quant
        if has_norm:
            if norm.__class__ is not RMSNorm:
                return None
            vector = norm.weight
            weight = vector.data_ptr()
            if (
                not weight
                or vector.__class__.__torch_dispatch__ is not plain
                or vector.dtype is not weight_dtype
                or vector.shape != weight_shape
                or vector.get_device() != index
                or not vector.is_contiguous()
                or vector.is_neg()
                or weight & _MISALIGNED
                or (vector.requires_grad and grad_enabled())
            ):
                return None
        given_scale = None
        if has_quant:
            given_scale = quant.given_scale  # type: ignore[union-attr]
            if given_scale.__class__ in _ORDINARY:
                if given_scale.get_device() != index:
                    return None
                scale = given_scale.data_ptr()
                if not scale or given_scale.is_neg():
                    return None
        if grad or not acquire():
            return None
        try:
            stream = current_stream(index)
            if stream != engine.stream:
                return None
            if out is None:
                tensors = [allocate() for allocate in allocators]
                result = Output()
                for (_, _, at, name), tensor in zip(wanted, tensors, strict=True):
                    setattr(result, name, tensor)
                    pointers[at] = tensor.data_ptr()
            else:
                held = given(out)
                if held is None:
                    return None
                places = [tensor.data_ptr() for tensor in held]
                addresses = (partial, residual, weight, scale, *places)
                if addresses not in apart and overlap(addresses):
                    return None
                for (_, _, at, _), address in zip(wanted, places, strict=True):
                    pointers[at] = address
                result = out
            pointers[partial_at] = partial
            if has_residual:
                pointers[residual_at] = residual
            if has_norm:
                pointers[weight_at] = weight
                params.eps, params.weight_offset = norm.eps, norm.weight_offset  # type: ignore[union-attr]
            if has_quant:
                pointers[scale_at] = scale
                if given_scale is not None and not scale:
                    params.scale_value = given_scale
                smallest = getattr(quant, "smallest", None)
                if smallest is not None:
                    params.smallest = smallest
                    params.header[1] = header.bounded(group_word, smallest)
            launch(stream)
            return result
        finally:
            release()

    return call


def _allocator(form: Form, device: torch.device) -> Callable[[], torch.Tensor]:
    """Makes a tensor of ``form`` on the current device."""
    quick = getattr(torch._C._dynamo.guards, "_empty_strided_cuda", None)  # what compiled graphs allocate by; a third of torch.empty
    if quick is None or form.padded:
        return lambda: form.empty(device)
    shape, dtype = tuple(form.shape), form.dtype
    stride = form.stride if form.stride is not None else tuple(torch.empty(shape, device="meta").stride())
    return lambda: quick(shape, stride, dtype)

"""Eager calls in as little host time as possible: everything that is the same in every call of a kind is looked up once.

A bound call makes all the checks of :func:`collogue.calls.call.check_call` and :func:`collogue.calls.outputs.check_out` in their
cheapest form: its tensors must be like those of the call that was checked, by the guard that ``torch.compile`` uses (type, dtype,
device, dispatch keys, whether a gradient is asked for, sizes and strides); addresses and scalars it looks at itself. Where anything is
unusual it returns ``None`` and has done nothing, and the caller takes the long way, which finds the same and says what it is.
"""

from __future__ import annotations

import ctypes
import itertools
import operator
import sys
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch.autograd import forward_ad

from collogue.calls.call import ALIGNMENT, Call
from collogue.calls.request import Form
from collogue.contract.prologue import Gated
from collogue.contract.quant import Quant
from collogue.contract.spec import OUTPUTS, Operation, Output, RMSNorm
from collogue.gpu import header
from collogue.gpu.launch import Launcher, Params

if TYPE_CHECKING:
    from collogue.gpu.engine import KernelEngine

#: Sets of addresses in which the outputs are known to overlap nothing, for each bound call.
_MOST_PLACES = 64
_MISALIGNED = ALIGNMENT - 1
#: Fields of :class:`Params` that hold the address of an output.
_FIELDS = {"reduced": "stream", "residual": "stream", "norm": "norm", "codes": "codes", "scales": "scales"}

#: Fields of :class:`Params` that hold addresses of a call's tensors: the first ones, 64 bits each.
_ADDRESSES = [name for name, *_ in Params._fields_[:8]]
assert all(getattr(Params, name).offset == 8 * place for place, name in enumerate(_ADDRESSES))

#: Takes operation, partial, residual, norm, quant, keep_norm, out, rows and write_padding.
Bound = Callable[..., "Output | None"]


def key_of(call: Call, out: Output | None) -> tuple[Any, ...]:
    """What a bound call is found by. Raises :class:`AttributeError` where the arguments are not what they should be."""
    quant = call.quant
    return (
        call.operation,
        _shape_of(call.partial),
        call.residual is None,
        None if call.norm is None else call.norm.prefetch,
        None if quant is None else quant.label,
        call.keep_norm,
        out is None,
        torch.is_inference_mode_enabled(),
        call.rows,
        call.write_padding,
    )


def _shape_of(partial: Any) -> object:
    """Raises :class:`AttributeError` for prologues that go the long way."""
    return (partial.gate.shape, partial.row_stride) if partial.__class__ is Gated else partial.shape


def unbound(*arguments: object) -> None:
    """What stands in the place of a bound call where there is none yet."""


def bind(
    engine: KernelEngine, call: Call, out: Output | None, launcher: Launcher, launch: Callable[[int], None], *, more: bool = False
) -> Bound | None:
    """Calls like ``call`` with ``out``, which have been checked. ``launch(stream)`` launches what ``launcher`` and its parameters say;
    ``more``: it launches several kernels.

    ``None`` where this PyTorch has no such guard.
    """
    forms, index, quant = call.signature.forms, engine.index, call.quant
    named = [name for name in OUTPUTS if name in forms]
    absent = [name for name in OUTPUTS if name not in forms]
    split, padding = call.rows, call.write_padding
    operation, keep_norm, kind, label = call.operation, call.keep_norm, type(quant), None if quant is None else quant.label
    prefetch = None if call.norm is None else call.norm.prefetch
    in_place = out is not None and out.residual is not None and out.residual is call.residual
    has_residual, has_norm, has_out = call.residual is not None, call.norm is not None, out is not None
    has_scale = quant is not None and quant.given_scale is not None
    has_scale_tensor = has_scale and isinstance(quant.given_scale, torch.Tensor)  # type: ignore[union-attr]
    has_smallest = hasattr(quant, "smallest")
    gated, row_stride = isinstance(call.partial, Gated), call.partial.row_stride if isinstance(call.partial, Gated) else 0
    if gated and has_out:
        return None  # what may overlap is worked out for tensors without gaps
    fields = ["partial"] + ["up"] * gated + ["residual"] * has_residual + ["weight"] * has_norm + ["scale"] * has_scale_tensor
    fields += [_FIELDS[name] for name in named] * has_out
    outputs, others = _together(named), _together(absent)
    nothing = (None,) * len(absent)
    looked_at = _together([name for name in named if not (in_place and name == "residual")])
    inputs = [tensor for name, tensor in call.inputs() if has_scale_tensor or name != "the scale"]
    fits = _guard((*inputs, *(looked_at(out) if has_out else ())))
    if fits is None:
        return None
    params = launcher.params
    words = memoryview((ctypes.c_ubyte * ctypes.sizeof(params)).from_buffer(params)).cast("B")[: 8 * len(_ADDRESSES)]
    pointers = (ctypes.c_uint64 * len(_ADDRESSES)).from_buffer(params)
    places = [_ADDRESSES.index(field) if field in _ADDRESSES else -1 for field in fields]
    spans = call.signature.input_bytes, tuple(forms[name].nbytes for name in named)
    padded = [(name, forms[name].nbytes) for name in named if forms[name].padded] if has_out else []
    allocators = [(OUTPUTS.index(name), _ADDRESSES.index(_FIELDS[name]), _allocator(forms[name], call.signature.device)) for name in named]
    group_word = params.header[1]
    fault, late_rank = engine.failure_words
    alone, one_gpu = engine.workspace is None, torch.cuda.device_count() < 2
    launch_now = launcher.launch if not more else None
    acquire, release = engine.in_use.acquire_now, engine.in_use.release
    capturing, current_device = torch._C._cuda_isCurrentStreamCapturing, torch._C._cuda_getDevice
    current_stream, address_of = torch._C._cuda_getCurrentRawStream, torch.Tensor.data_ptr
    known: dict[tuple[int, ...], bytes] = {}  # what words hold, by the addresses of tensors that were found to be right

    def packed(addresses: tuple[int, ...]) -> bytes | None:
        """The words of tensors at ``addresses``; ``None`` where one is misaligned, or an output overlaps another tensor."""
        row = [0] * (len(_ADDRESSES) + 1)  # the last one for what lies elsewhere among the parameters
        for place, address in zip(places, addresses, strict=True):
            row[place] = address
        partial, residual, weight, *_ = row
        scale = row[_ADDRESSES.index("scale")]
        if any(address & _MISALIGNED for address in row if address != scale) or not all(addresses):
            return None
        if has_out and overlap(spans, (partial, residual, weight, scale), [row[_ADDRESSES.index(_FIELDS[name])] for name in named], named):
            return None
        if len(known) >= _MOST_PLACES:
            known.clear()
        known[addresses] = found = b"".join(address.to_bytes(8, sys.byteorder) for address in row[:-1])
        return found

    def bound(
        asked: Operation,
        partial: Any,
        residual: torch.Tensor | None,
        norm: RMSNorm | None,
        quant: Quant | None,
        keeps: bool,
        out: Output | None,
        rows: tuple[int, ...] | None = None,
        write_padding: bool = True,
    ) -> Output | None:
        if asked != operation or keeps is not keep_norm or rows != split or write_padding is not padding:
            return None
        tensors: tuple[Any, ...] = (partial,)
        if gated:
            if partial.__class__ is not Gated:
                return None
            tensors = (partial.gate, partial.up)
        if has_residual:
            tensors += (residual,)
        elif residual is not None:
            return None
        if has_norm:
            if norm.__class__ is not RMSNorm or norm.prefetch is not prefetch:
                return None
            tensors += (norm.weight,)
        elif norm is not None:
            return None
        if (quant is None or quant is not launcher.quant) and (  # launcher.quant is also None after a call that went the long way
            quant.__class__ is not kind or (quant is not None and quant.label != label)
        ):
            return None
        # Not only for a new quant: calls with a scale as a number and as a tensor share the launcher.
        if has_scale and isinstance(quant.given_scale, torch.Tensor) is not has_scale_tensor:  # type: ignore[union-attr]
            return None
        if has_scale_tensor:
            tensors += (quant.given_scale,)  # type: ignore[union-attr]
        if has_out:
            if out.__class__ is not Output or others(out) != nothing:
                return None
            if in_place:
                if out.residual is not residual or not fits(*tensors, *looked_at(out)):
                    return None
                tensors += outputs(out)
            else:
                tensors += outputs(out)
                if not fits(*tensors):
                    return None
        elif out is not None or not fits(*tensors):
            return None
        if forward_ad._current_level >= 0 or not (alone or (fault.value == 0 and late_rank.value == 0)):
            return None
        # The default stream cannot be captured.
        stream = current_stream(index)
        if stream != engine.stream or (stream and capturing()) or not (one_gpu or current_device() == index):
            return None
        addresses = tuple(map(address_of, tensors))
        row = known.get(addresses) or packed(addresses)
        if row is None:
            return None
        for name, nbytes in padded:
            tensor = getattr(out, name)
            if tensor.untyped_storage().nbytes() - tensor.storage_offset() * tensor.element_size() < nbytes:
                return None
        if not acquire():
            return None
        try:
            words[:] = row
            if gated:
                params.up, params.row_stride = addresses[1], row_stride
            if not has_out:
                values: list[Any] = [None] * len(OUTPUTS)
                for slot, place, allocate in allocators:
                    values[slot] = tensor = allocate()
                    pointers[place] = tensor.data_ptr()
                out = Output(*values)
            if has_norm:
                params.eps, params.weight_offset = norm.eps, norm.weight_offset  # type: ignore[union-attr]
            if quant is not launcher.quant:
                launcher.quant = quant
                if has_scale and not has_scale_tensor:
                    params.scale_value = quant.given_scale  # type: ignore[union-attr]
                if has_smallest:
                    smallest = quant.smallest  # type: ignore[union-attr]
                    params.smallest = smallest
                    params.header[1] = header.bounded(group_word, smallest)
            if launch_now is None or stream != launcher.stream:
                launch(stream)
            elif launch_now()[0]:
                launch(stream)  # again, in a way that says what is wrong
            return out
        finally:
            release()

    return bound


def overlap(
    spans: tuple[tuple[int, ...], tuple[int, ...]], inputs: tuple[int, int, int, int], outs: Sequence[int], names: Sequence[str]
) -> bool:
    """Whether an output shares memory with another tensor of the call, but for a residual in place.

    Args:
        spans: bytes of partial, residual and weight, and of each output.
        inputs: addresses of partial, residual, weight and scale, 0 where there is none.
        outs: addresses of the outputs, which are called ``names``.
    """
    partial, residual, weight, scale = inputs
    if "residual" in names and outs[names.index("residual")] == residual:
        residual = 0  # in place
    (partial_bytes, residual_bytes, weight_bytes), out_bytes = spans
    taken = [(partial, partial + partial_bytes), (residual, residual + residual_bytes), (weight, weight + weight_bytes), (scale, scale + 4)]
    taken += [(first, first + nbytes) for first, nbytes in zip(outs, out_bytes, strict=True)]
    taken = sorted(span for span in taken if span[0])
    return any(last > first for (_, last), (first, _) in itertools.pairwise(taken))


def _together(names: Sequence[str]) -> Callable[[object], tuple[Any, ...]]:
    """Reads these attributes, always as a tuple."""
    if not names:
        return lambda of: ()
    read = operator.attrgetter(*names)
    return read if len(names) > 1 else lambda of: (read(of),)


def _guard(tensors: Sequence[torch.Tensor]) -> Callable[..., bool] | None:
    """A function that says whether tensors are like ``tensors``, and no two of them the same object."""
    kind = getattr(torch._C._dynamo.guards, "TensorGuards", None)
    if kind is None:
        return None
    sizes, strides = [list(tensor.shape) for tensor in tensors], [list(tensor.stride()) for tensor in tensors]
    made: Callable[..., bool] = kind(*tensors, dynamic_dims_sizes=sizes, dynamic_dims_strides=strides).check
    return made


def _allocator(form: Form, device: torch.device) -> Callable[[], torch.Tensor]:
    """Makes a tensor of ``form`` on the current device."""
    quick = getattr(torch._C._dynamo.guards, "_empty_strided_cuda", None)  # what compiled graphs allocate by; a third of torch.empty
    if quick is None or form.padded:
        return lambda: form.empty(device)
    shape, dtype = tuple(form.shape), form.dtype
    stride = form.stride if form.stride is not None else tuple(torch.empty(shape, device="meta").stride())
    return lambda: quick(shape, stride, dtype)

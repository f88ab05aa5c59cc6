"""The outputs of a call: fresh tensors, or checked ones of the caller's."""

from __future__ import annotations

from collections.abc import Iterable

import torch

from collogue.calls.call import Call, check_alignment, check_device, check_no_grad, check_ordinary, check_rows
from collogue.calls.request import Form
from collogue.contract.formats import scale_elements, scale_storage
from collogue.contract.spec import Output
from collogue.errors import ArgumentError, DTypeError, LayoutError, OverlapError, ShapeError

_HINT = "allocate it as a call without out= would"


def check_out(call: Call, out: Output) -> None:
    """Raise unless ``out`` holds exactly the outputs of ``call``, well-shaped, and overlaps nothing but the residual in place."""
    forms = call.signature.forms
    given = _held_by(out, forms)
    check_forms("out", given, forms, call.signature.device, hint=_HINT)
    if torch.is_grad_enabled():
        check_no_grad(*((f"out.{name}", tensor) for name, tensor in given.items()))
    _check_overlap(call, given)


def check_padding(write_padding: bool, out: Output | None) -> None:
    """Raise :class:`ArgumentError` where padding is not to be written and no earlier call can have done it."""
    if not isinstance(write_padding, bool):
        hint = "pass write_padding=False to leave the padding of out.scales as an earlier call has written it"
        raise ArgumentError(f"write_padding is {write_padding!r}; expected True or False", hint=hint)
    if not write_padding and out is None:
        hint = "pass the out= of an earlier call of as many tokens, or leave write_padding out"
        raise ArgumentError("write_padding=False without out=: the padding of fresh scales would hold anything", hint=hint)


def write(result: Output, out: Output) -> None:
    """Copy ``result`` into the tensors of ``out``, scales with the padding that lies under a strided view."""
    for name, source in result.items():
        target = getattr(out, name)
        if name == "scales":
            target, source = scale_storage(target), scale_storage(source)
        target.copy_(source)


def write_traced(result: Output, out: Output, inputs: Iterable[tuple[str, torch.Tensor]]) -> None:
    """:func:`write` the result of a traced call with these inputs, after what :func:`check_out` can see of tensors without addresses.

    Scales with padding stay outside of compiled graphs: a graph writes what a tensor shows and no more.
    """
    forms = {name: Form(tuple(t.shape), t.dtype, 0, t.stride() if name == "scales" else None) for name, t in result.items()}
    given, placed = _held_by(out, forms), list(inputs)
    for name, tensor in given.items():
        check_forms("out", {name: tensor}, forms, getattr(result, name).device, hint=_HINT, traced=True)
        for other, memory in placed:
            if tensor is memory and (name, other) != ("residual", "residual"):
                raise _overlap(name, other)
        placed.append((f"out.{name}", tensor))
    if out.scales is not None and scale_elements(out.scales) > out.scales.numel():
        reason = "no graph can write the padding of out.scales"
        torch.compiler.disable(_write_padded, reason=reason)(result, out, out.scales)  # type: ignore[no-untyped-call]
    else:
        write(result, out)


def _write_padded(result: Output, out: Output, scales: torch.Tensor) -> None:
    _check_padding("out.scales", scales)
    write(result, out)


def _held_by(out: Output, forms: dict[str, Form]) -> dict[str, torch.Tensor]:
    """The tensors of ``out``, which must be those that a call with the outputs ``forms`` returns."""
    if not isinstance(out, Output):
        raise ArgumentError(f"out is a {type(out).__name__}", hint="pass collogue.Output(...) with the tensors to write")
    given = dict(out.items())
    if given.keys() != forms.keys():
        raise ShapeError(
            f"out holds {sorted(given) or 'nothing'}; this call has the outputs {sorted(forms)}",
            hint="give exactly those tensors in collogue.Output(...)",
        )
    return given


def check_forms(
    owner: str, given: dict[str, torch.Tensor], forms: dict[str, Form], device: torch.device, *, hint: str, traced: bool = False
) -> None:
    """Raise unless each tensor of ``given`` has its form and lies on ``device``, contiguous (scales: with their padding) and aligned.

    ``traced``: without a look at addresses and storage.
    """
    for name, tensor in given.items():
        if not isinstance(tensor, torch.Tensor):
            raise ShapeError(f"{owner}.{name} is a {type(tensor).__name__}, no tensor", hint=hint)
        form = forms[name]
        shape, dtype, stride = form.shape, form.dtype, form.stride
        if tuple(tensor.shape) != shape or (stride is not None and tensor.numel() and tensor.stride() != stride):
            raise ShapeError(
                f"{owner}.{name} has shape {list(tensor.shape)} and strides {tensor.stride()}; needed: {list(shape)}"
                + (f" with strides {stride}" if stride is not None else ""),
                hint=hint,
            )
        if tensor.dtype != dtype:
            raise DTypeError(f"{owner}.{name} has dtype {tensor.dtype}, needed: {dtype}", hint=hint)
        check = check_rows if stride is None else check_device
        check(f"{owner}.{name}", tensor, device)
        if not traced:
            check_ordinary(f"{owner}.{name}", tensor)
        if owner == "out" and not traced and tensor.is_inference() and not torch.is_inference_mode_enabled():
            raise ArgumentError(
                f"out.{name} is an inference tensor, and this is not inference mode",
                hint="make the call under torch.inference_mode(), or allocate out outside of it",
            )
        if not traced:
            check_alignment(f"{owner}.{name}", tensor)
        if not traced and stride is not None:
            _check_padding(f"{owner}.{name}", tensor)


def _check_padding(name: str, scales: torch.Tensor) -> None:
    """Every byte that a call writes, the padding of column-major layouts included, must lie in the tensor's storage."""
    needed, held = scale_elements(scales) * scales.element_size(), _held(scales)
    if needed > held:
        raise LayoutError(f"{name} needs {needed} bytes with its padding; its storage has {held}", hint=_HINT)


def _held(tensor: torch.Tensor) -> int:
    """Bytes of the tensor's storage from its first element on."""
    return int(tensor.untyped_storage().nbytes() - tensor.storage_offset() * tensor.element_size())


def _check_overlap(call: Call, outputs: dict[str, torch.Tensor]) -> None:
    placed = [(name, *_extent(name, tensor)) for name, tensor in call.inputs()]
    for name, tensor in outputs.items():
        first, last = _extent(name, tensor)
        for other, low, high in placed:
            in_place = name == "residual" and other == "residual" and (first, last) == (low, high)
            if first < high and low < last and not in_place:
                raise _overlap(name, other)
        placed.append((f"out.{name}", first, last))


def _overlap(name: str, other: str) -> OverlapError:
    return OverlapError(
        f"out.{name} shares memory with {other}", hint="only the residual may be updated in place; give the others memory of their own"
    )


def _extent(name: str, tensor: torch.Tensor) -> tuple[int, int]:
    """First byte and one past the last byte of the tensor; of scales, with their padding."""
    spanned = 1 + sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True)) if tensor.numel() else 0
    elements = scale_elements(tensor) if name.endswith("scales") else spanned
    return tensor.data_ptr(), tensor.data_ptr() + elements * tensor.element_size()

"""Bitwise comparison of two outputs, padding of the scales included. There is no tolerance anywhere."""

from __future__ import annotations

from dataclasses import dataclass, fields

import torch

from collogue.contract.formats import scale_storage
from collogue.contract.spec import Output

_INTEGER = {1: torch.uint8, 2: torch.int16, 4: torch.int32}


@dataclass(frozen=True)
class Difference:
    """How one output compares: ``count`` elements differ; ``first`` says where and how, and is empty where none does."""

    count: int
    first: str = ""


def compare(actual: Output, expected: Output) -> dict[str, Difference]:
    """Compare every output that either of them has, by name.

    An output that one of them lacks, or that has another shape, stride, dtype or device, differs in all its elements.
    Padding elements of the scales count like all others.
    """
    result = {}
    for name in (f.name for f in fields(Output)):
        left, right = getattr(actual, name), getattr(expected, name)
        if left is not None and right is not None:
            result[name] = compare_tensors(name, left, right)
        elif left is not None or right is not None:
            present = left if left is not None else right
            result[name] = Difference(max(present.numel(), 1), f"{name}: {_form(left)}, expected {_form(right)}")
    return result


def differing(differences: dict[str, Difference]) -> int:
    """The number of differing elements of all outputs together."""
    return sum(d.count for d in differences.values())


def compare_tensors(name: str, actual: torch.Tensor, expected: torch.Tensor) -> Difference:
    """Compare two tensors bit by bit. A tensor named ``scales`` is compared as the whole memory under it."""
    if _form(actual) != _form(expected):
        return Difference(max(actual.numel(), expected.numel(), 1), f"{name}: {_form(actual)}, expected {_form(expected)}")
    integer = _INTEGER[actual.element_size()]
    if name == "scales":
        left, right = (scale_storage(t).view(integer) for t in (actual, expected))
    else:
        left, right = (t.contiguous().reshape(-1).view(integer) for t in (actual, expected))
    unequal = left != right
    count = int(unequal.count_nonzero())
    if not count:
        return Difference(0)
    index = int(unequal.to(torch.uint8).argmax())
    values = (_value(bits[index], actual.dtype) for bits in (left, right))
    return Difference(count, f"{name}{_coordinate(actual, index)}: {next(values)}, expected {next(values)}")


def _form(tensor: torch.Tensor | None) -> str:
    if tensor is None:
        return "nothing"
    stride = f" strides {list(tensor.stride())}" if tensor.numel() else ""
    return f"{str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)}{stride} on {tensor.device}"


def _coordinate(tensor: torch.Tensor, index: int) -> str:
    """Where element ``index`` of the memory lies in the tensor: by its strides, so swizzled scales read as memory rows."""
    if tensor.stride(0) == 1 and tensor.stride(1) > 1:
        column, row = divmod(index, tensor.stride(1))
    else:
        row, column = divmod(index, tensor.shape[1])
    return f"[{row}, {column}]" + (" (padding)" if row >= tensor.shape[0] else "")


def _value(bits: torch.Tensor, dtype: torch.dtype) -> str:
    digits = 2 * bits.element_size()
    text = f"0x{int(bits) & ((1 << 4 * digits) - 1):0{digits}x}"
    return f"{text} ({float(bits.reshape(1).view(dtype).float()):g})" if dtype.is_floating_point else text

"""What a call must return, worked out without a communicator: by the scalar version, or by the reference."""

from __future__ import annotations

from typing import Any, cast

import numpy as np
import torch

from collogue import reference
from collogue.spec import Output, Quant, RMSNorm
from collogue.testing import scalar

_INTEGER = {2: (torch.int16, np.uint16), 4: (torch.int32, np.uint32)}


def by_reference(
    partials: list[torch.Tensor], residual: torch.Tensor | None, norm: RMSNorm | None, quant: Quant | None, keep_norm: bool
) -> Output:
    """:func:`collogue.reference.all_reduce`, on the device of the partials."""
    return reference.all_reduce(partials, residual=residual, norm=norm, quant=quant, keep_norm=keep_norm)


def by_scalar(
    partials: list[torch.Tensor], residual: torch.Tensor | None, norm: RMSNorm | None, quant: Quant | None, keep_norm: bool
) -> Output:
    """:func:`collogue.testing.scalar.all_reduce` of CPU tensors, its bits as tensors."""
    dtype = partials[0].dtype
    result = scalar.all_reduce(
        [_bits(p) for p in partials],
        dtype=cast(scalar.DType, str(dtype).removeprefix("torch.")),
        residual=None if residual is None else _bits(residual),
        weight=None if norm is None else norm.weight.float().numpy(),
        eps=1e-6 if norm is None else norm.eps,
        weight_offset=0.0 if norm is None else norm.weight_offset,
        quant=quant,
        keep_norm=keep_norm,
    )
    codes = None
    if result.codes is not None and quant is not None:
        codes = torch.from_numpy(result.codes)
        codes = codes.view(torch.float8_e4m3fn) if quant.element == "e4m3" else codes
    return Output(
        reduced=_values(result.reduced, dtype),
        residual=_values(result.residual, dtype),
        norm=_values(result.norm, dtype),
        codes=codes,
        scales=None if result.scales is None else _scales(result.scales),
    )


def _bits(tensor: torch.Tensor) -> scalar.Array:
    torch_integer, numpy_integer = _INTEGER[tensor.element_size()]
    return cast(scalar.Array, tensor.view(torch_integer).numpy().view(numpy_integer))


def _values(bits: scalar.Array | None, dtype: torch.dtype) -> torch.Tensor | None:
    if bits is None:
        return None
    signed: Any = np.int16 if bits.itemsize == 2 else np.int32
    return torch.from_numpy(bits.view(signed)).view(dtype)


def _scales(scales: scalar.Scales) -> torch.Tensor:
    storage = torch.empty(scales.storage.size, dtype=torch.uint8)
    storage.copy_(torch.from_numpy(scales.storage))
    return storage.view(getattr(torch, scales.dtype)).as_strided(scales.shape, scales.stride)

"""Whether ranks hold the same bits: a number for each tensor, exact, at the speed of memory."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

_WORD, _CHUNK, _MODULUS = 8, 1 << 20, 1 << 64
#: Odd, so that no change of a single word goes unseen.
_STEP, _BASE = 0x9E3779B97F4A7C15 - _MODULUS, 0xD6E8FEB86659FD93


def checksums(tensors: Mapping[str, Tensor]) -> dict[str, str]:
    """Of the bits of each tensor, computed where it is. Tensors of other types than Tensor are left out."""
    sums, tails = dict[str, Tensor](), dict[str, bytes]()
    for name, tensor in tensors.items():
        if type(tensor.data) is Tensor and tensor.layout is torch.strided and not tensor.is_meta:
            sums[name], tails[name] = _sums(tensor.detach())
    return {name: _combined(each.tolist(), tails[name]) for name, each in sums.items()}


def _sums(tensor: Tensor) -> tuple[Tensor, bytes]:
    """One sum for each chunk of words, each word with its own factor, modulo 2**64; and the bytes behind the last whole word."""
    flat = tensor.contiguous().reshape(-1).view(torch.uint8)
    flat = flat.clone() if flat.storage_offset() % _WORD else flat
    end = len(flat) // _WORD * _WORD
    words = flat[:end].view(torch.int64)
    factors = torch.arange(min(_CHUNK, len(words)), device=flat.device).mul_(_STEP).bitwise_or_(1)
    parts = [(chunk * factors[: len(chunk)]).sum() for chunk in torch.split(words, _CHUNK)] if end else []
    return torch.stack(parts) if parts else factors, bytes(flat[end:].tolist())


def _combined(parts: list[int], tail: bytes) -> str:
    total = int.from_bytes(tail, "little")
    for part in parts:
        total = (total * _BASE + part) % _MODULUS
    return f"{total:016x}"

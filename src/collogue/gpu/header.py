"""What a call was, in a few words of memory: for the ranks to compare and for a journal to keep (kernels/protocol.cuh)."""

from __future__ import annotations

import contextlib
import struct
from dataclasses import dataclass
from functools import lru_cache
from typing import get_args

import torch

from collogue import kernels
from collogue.calls.request import Request
from collogue.contract.prologue import Kind
from collogue.contract.spec import Operation
from collogue.planning.algorithm import ALGORITHMS
from collogue.planning.variant import FORMATS, LAYOUTS, QuantVariant

#: Of one call in a journal (``collogue::Entry``).
ENTRY_BYTES = kernels.size_of("protocol.cuh", "Entry")
_OPERATIONS = get_args(Operation)
_DTYPES = (torch.bfloat16, torch.float16, torch.float32)
_LAYOUTS = tuple(LAYOUTS)
_ALGORITHMS = tuple(ALGORITHMS)


_PROLOGUES = (None, *get_args(Kind))
#: Behind that bit, the kind of a prologue, and the number of a token's slots less one.
_PROLOGUE_SHIFT, _SLOTS_SHIFT = 26, 28

#: What an all-gather moves at a time, a bit each, in front of which the options of every call lie. Of other calls: whether there is a
#: branch norm, and whether its weight is float32.
_MOVED, _MOVED_SHIFT = ("reduced", "residual", "norm", "codes"), 22


def pack(algorithm: str, request: Request) -> tuple[int, int]:
    """The two words of options, without what :func:`moving` and :func:`bounded` put in for one call."""
    q = QuantVariant.of(request.quant)
    fields = (
        (_ALGORITHMS.index(algorithm), 4),
        (_OPERATIONS.index(request.operation), 3),
        (request.rows is not None, 1),
        (_DTYPES.index(request.dtype), 2),
        (request.residual, 1),
        (request.norm, 1),
        (request.wanted.norm, 1),
        (FORMATS.index(q.row), 4),
        (_LAYOUTS.index(q.layout), 3),
        (q.ceil, 1),
        (request.wide_weight, 1),
    )
    word = shift = 0
    for value, bits in fields:
        word |= int(value) << shift
        shift += bits
    assert shift == _MOVED_SHIFT
    word |= (int(request.branch) | int(request.wide_branch) << 1) << _MOVED_SHIFT
    return word | _PROLOGUES.index(request.prologue and request.prologue.kind) << _PROLOGUE_SHIFT, q.group


def moving(word: int, name: str) -> int:
    """The first word of an all-gather of ``name``."""
    return word & ((1 << _MOVED_SHIFT) - 1) | 1 << _MOVED_SHIFT + _MOVED.index(name)


def combining(word: int, slots: int) -> int:
    """The first word of an ``expert_combine`` of so many slots for each token."""
    return word & ((1 << _SLOTS_SHIFT) - 1) | (slots - 1) << _SLOTS_SHIFT


@lru_cache
def bounded(word: int, smallest: float) -> int:
    """The second word where scales have a lower bound: the upper half of its float32 goes into the upper half."""
    return word & 0xFFFF | int.from_bytes(struct.pack("<f", smallest)[2:], "little") << 16


@dataclass(frozen=True)
class Entry:
    """One call as a journal keeps it. ``stage``: how far it has come, as far as that is known (:func:`.failure.with_stages`)."""

    call: int
    text: str
    stage: str = ""

    @classmethod
    def of(cls, entry: bytes, rows: tuple[int, ...] | None = None) -> Entry | None:
        """``None`` where nothing has been written yet, or something that no kernel writes. ``rows``: of each rank, where they are known
        and the call's were uneven.
        """
        (number,) = struct.unpack_from("<I", entry)
        if number:
            with contextlib.suppress(IndexError):
                return cls(number - 1, _text(entry, rows))
        return None


def _text(entry: bytes, rows: tuple[int, ...] | None) -> str:
    """The arguments in an entry. Raises :class:`IndexError` for options that there are not."""
    _, tokens, hidden, first, options, group, eps, offset = struct.unpack("<6I2f", entry)
    word = int(options)

    def take(bits: int) -> int:
        nonlocal word
        value, word = word & ((1 << bits) - 1), word >> bits
        return value

    algorithm, operation, uneven, dtype = _ALGORITHMS[take(4)], _OPERATIONS[take(3)], take(1), _DTYPES[take(2)]
    residual, norm, keep_norm, quant, layout, ceil, wide = take(1), take(1), take(1), take(4), take(3), take(1), take(1)
    moved = [name for name in _MOVED if take(1)]
    branch, wide_branch = operation != "all_gather" and "reduced" in moved, "residual" in moved
    moved = moved if operation == "all_gather" else []
    prologue, slots = _PROLOGUES[take(2)], take(4) + 1
    group, smallest = group & 0xFFFF, struct.unpack("<f", struct.pack("<I", group & 0xFFFF0000))[0]
    parts = [
        f"{operation}{' of ' * bool(moved)}{'+'.join(moved)} by {algorithm}",
        f"tokens={tokens}",
        f"hidden_size={hidden}",
        f"dtype={str(dtype).removeprefix('torch.')}",
    ]
    parts += [f"rows={'uneven' if rows is None else list(rows)}"] * uneven
    parts += [f"{prologue}(top_k={slots})" if prologue == "expert_combine" else str(prologue)] * (prologue is not None)
    parts += [f"branch_norm{' in float32' * wide_branch}"] * branch
    parts += ["residual"] * residual + [f"norm(eps={_shortest(eps)}, weight_offset={_shortest(offset)})"] * norm
    parts += ["weight in float32"] * (wide and norm)
    if quant:
        extra = [_LAYOUTS[layout]] + [f"group {group}"] * (group > 0) + ["ceil"] * ceil
        extra += [f"smallest {smallest:.4g}"] * (smallest > 0)
        parts.append(f"quant={FORMATS[quant].name} ({', '.join(extra)})")
    parts += ["keep_norm"] * (keep_norm and quant > 0) + [f"from row {first}"] * (first > 0)
    return ", ".join(parts)


def _shortest(value: float) -> str:
    """The fewest digits that name this float32: values that differ have texts that differ."""
    texts = (f"{value:.{digits}g}" for digits in range(1, 10))
    return next((text for text in texts if struct.pack("<f", float(text)) == struct.pack("<f", value)), f"{value:g}")

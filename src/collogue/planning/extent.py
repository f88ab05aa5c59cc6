"""What lies in a rank's workspace, and how large it is: a pure function of what all ranks share (docs/tuning.md)."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from collogue import kernels
from collogue.contract.quant import Quant
from collogue.planning.algorithm import ALGORITHMS
from collogue.planning.topology import Topology
from collogue.planning.variant import QuantVariant

_PROTOCOL = kernels.constants("protocol.cuh")
#: Generations of memory that peers write: of one-shot, of the other kernels.
ONE_SHOT_GENERATIONS, GENERATIONS = _PROTOCOL["kOneShotGenerations"], _PROTOCOL["kGenerations"]
#: Bytes of one generation, unless a single row needs more; calls that need more are not one-shot, or are done in several launches.
ONE_SHOT_BYTES, GENERATION_BYTES = 8 << 20, 128 << 20
#: What a workspace may have beyond three times the largest message.
WORKSPACE_BYTES = 64 << 20
#: Control words, marks and the journal at the start of every workspace.
CONTROL_BYTES = _PROTOCOL["kDataOffset"]
#: More CTAs than any launch has.
MAX_CTAS = 4096
#: Every part of a workspace is a multiple of so many bytes.
_PAGE = 4096


@dataclass(frozen=True)
class Memory:
    """Bytes that one launch uses in a generation. ``slot``: from one rank to another in the first step, ``gather``: in the second.

    All are of one row: of the call, or, where rows have owners, of every owner.
    """

    slot: int
    gather: int
    wire: int
    width: int
    flags: int = 0

    def generation(self, world_size: int, rows: int) -> int:
        """Of ``rows`` rows, with the flags that follow them."""
        return (world_size - 1) * (rows * (self.slot + self.gather) + self.flags)


def memory_of(algorithm: str, world_size: int, hidden_size: int, dtype: torch.dtype, quant: Quant | None, *, values: bool) -> Memory:
    """What a row needs. ``values``: norms and codes travel in ``dtype`` as well (or alone, where ``quant`` is ``None``)."""
    row, width = hidden_size * dtype.itemsize, -(-hidden_size // 8 // world_size)
    if ALGORITHMS[algorithm].one_hop:
        return Memory(row, 0, 0, width)
    if algorithm == "two_shot":
        part = width * 8 * dtype.itemsize
        return Memory(part, part, 0, width)
    wire = wire_bytes(hidden_size, dtype, quant, values)
    if algorithm == "all_gather":
        return Memory(wire, 0, wire, width, flags=4 * MAX_CTAS)
    return Memory(row, wire, wire, width)


def wire_bytes(hidden_size: int, dtype: torch.dtype, quant: Quant | None, values: bool) -> int:
    """Of a row of norms or codes on its way to another rank: values, codes, words of scales (kernels/gather.cuh)."""
    total = (hidden_size * dtype.itemsize if values else 0) + QuantVariant.of(quant).wire_bytes(hidden_size)
    return round_up(total, 16)


@dataclass(frozen=True)
class Extent:
    """A rank's workspace: control words, then the generations of one-shot, then those of the other kernels. Bytes."""

    one_shot: int
    generation: int

    @property
    def offset(self) -> int:
        """Of the other kernels' generations."""
        return CONTROL_BYTES + ONE_SHOT_GENERATIONS * self.one_shot

    @property
    def total(self) -> int:
        return self.offset + GENERATIONS * self.generation


def workspace_extent(topology: Topology) -> Extent:
    """As much as the largest call that does not quantize needs in one launch by any algorithm, at most :data:`GENERATION_BYTES`, at
    least one row of every call; for one-shot at most :data:`ONE_SHOT_BYTES`. In all at most three times the largest message plus
    :data:`WORKSPACE_BYTES`: calls that need more are done in several launches.
    """
    world, tokens = topology.world_size, topology.max_tokens
    row = topology.hidden_size * topology.dtype.itemsize

    def needs(algorithm: str, rows: int) -> int:
        return memory_of(algorithm, world, topology.hidden_size, topology.dtype, None, values=True).generation(world, rows)

    one_shot = max(needs("one_shot", 1), min(needs("one_shot", tokens), ONE_SHOT_BYTES // row // (world - 1) * (world - 1) * row))
    one_shot = round_up(one_shot, _PAGE)
    left = (3 * tokens * row + WORKSPACE_BYTES - Extent(one_shot, 0).total) // GENERATIONS // _PAGE * _PAGE
    most = round_up(min(max(needs("two_shot", tokens), needs("sharded", -(-tokens // world))), GENERATION_BYTES), _PAGE)
    # A row of a call that quantizes and keeps the norm as well is the widest that has to travel.
    least = round_up(max(needs("two_shot", 1), (world - 1) * (4 * row + 4 * MAX_CTAS + 4096)), _PAGE)
    return Extent(one_shot, max(least, min(most, left)))


def round_up(value: int, multiple: int) -> int:
    """The smallest multiple of ``multiple`` that is not below ``value``."""
    return -(-value // multiple) * multiple

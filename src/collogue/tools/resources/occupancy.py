"""Theoretical occupancy: warps of a kernel that one SM holds at once, as a share of the warps it has room for."""

from __future__ import annotations

from collogue.planning.architecture import ARCHITECTURES

#: Registers of an SM of every architecture.
_REGISTERS = 65536
#: Shared memory that the system takes for itself in every CTA, and the unit in which shared memory is given out.
_RESERVED, _SHARED_UNIT = 1024, 128
#: Registers are given to warps in units of this many; warps are spread over four schedulers, each with a quarter of the registers.
_REGISTER_UNIT, _SCHEDULERS = 256, 4


def resident_ctas(architecture: str, *, threads: int, registers: int, shared_bytes: int) -> int:
    """CTAs of ``threads`` threads on one SM, regardless of the size of their clusters."""
    limit = ARCHITECTURES[architecture]
    warps = -(-threads // 32)
    per_warp = _round_up(registers * 32, _REGISTER_UNIT)
    by_registers = _REGISTERS // _SCHEDULERS // per_warp * _SCHEDULERS
    shared = _round_up(shared_bytes + _RESERVED, _SHARED_UNIT)
    return min(limit.ctas, limit.warps // warps, by_registers // warps, limit.shared_bytes // shared)


def occupancy(architecture: str, *, threads: int, registers: int, shared_bytes: int) -> float:
    """Resident warps over the warps an SM has room for."""
    ctas = resident_ctas(architecture, threads=threads, registers=registers, shared_bytes=shared_bytes)
    return ctas * -(-threads // 32) / ARCHITECTURES[architecture].warps


def _round_up(value: int, unit: int) -> int:
    return -(-value // unit) * unit

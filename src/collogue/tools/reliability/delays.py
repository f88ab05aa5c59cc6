"""Delays inside kernels: a switch, as those of `collogue ablate`, that delays warps at random where others might overtake them."""

from __future__ import annotations

from collogue.testing.emulator import Edit
from collogue.tools.ablation.switches import Switch

#: One warp in 16 at each place, up to 8192 cycles: several times as long as a small call.
_DAWDLE = """  // ---- waiting

  // One warp in 16, another one in every call and at every `place`.
  COLLOGUE_DEVICE void dawdle(u32 place) const {
    const u32 cta = grid_row() * 64 + block_in_row() * 8;
    u32 h = (call * 31 + p.rank) * 0x9e3779b1u ^ (cta + place) * 0x85ebca6bu ^ thread_index() / 32 * 0xc2b2ae35u;
    h = (h ^ h >> 15) * 0x2c1b3c6du;
    h = (h ^ h >> 12) * 0x297a2d39u;
    if (h >> 28) return;
    for (const u32 from = clock_cycles(); clock_cycles() - from < (h & 0x1fffu);) {
    }
  }
"""
_START = "    generation = call % (C::kOneShot ? kOneShotGenerations : kGenerations) * p.generation_bytes;\n"
DELAYS = Switch(
    "delays inside",
    "warps are delayed before they send, announce, clean and wait",
    (
        Edit("protocol.cuh", "  // ---- waiting\n", _DAWDLE),
        Edit("protocol.cuh", _START, f"{_START}    dawdle(0);\n"),
        Edit("protocol.cuh", "    if (thread % 32) return;\n", "    dawdle(1);\n    if (thread % 32) return;\n"),
        Edit("protocol.cuh", "    u32 started = 0, look", "    dawdle(2);\n    u32 started = 0, look"),
        Edit("protocol.cuh", "    const u32 left = call % 2", "    dawdle(3);\n    const u32 left = call % 2"),
    ),
)

"""What the tests of the emulator share: sequences of calls, words that look like the sentinel, small cases."""

from __future__ import annotations

from collections.abc import Callable

import torch

from collogue.contract.quant import MXFP8
from collogue.testing.emulator import MODES, Case, Library

Build = Callable[..., Library]

PROTOCOL = "protocol.cuh"
#: Longer and shorter calls after each other: words that an earlier call left behind would be taken for those of a later one.
TOKENS = (3, 1, 2, 1, 1, 3)
PRESENT = [mode for mode in MODES if mode != "absent"]
#: An all-gather in which a CTA has warps that do not wait.
TWO_WARPS = Case(2, 512, 64, kernel="all_gather")


def turning(*groups: int) -> Callable[[int, torch.Tensor], torch.Tensor]:
    """Partials whose sum is 512 in some of every four groups of 32 and zero in the others: E8M0 bytes 0x80 and 0."""

    def terms(rank: int, partial: torch.Tensor) -> torch.Tensor:
        partial = torch.zeros_like(partial)
        if rank == 0:
            partial.view(len(partial), -1, 4, 32)[:, :, list(groups), 5] = 512.0
        return partial

    return terms


#: The scale words of such a call are the sentinel, but that they travel turned.
TURNED = {
    torch.float32: (Case(2, 128, 32, kernel="sharded", residual=False, norm=False, quant=MXFP8("floor"), dtype=torch.float32), (3,)),
    torch.bfloat16: (Case(2, 128, 32, kernel="sharded", residual=False, norm=False, quant=MXFP8("floor")), (1, 3)),
}

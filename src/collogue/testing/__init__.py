"""For tests, here and in projects that use Collogue: virtual ranks and an independent version of the contract."""

from collogue.testing.virtual import VirtualGroup, run_virtual

__all__ = ["VirtualGroup", "run_virtual"]

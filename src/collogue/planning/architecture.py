"""GPU architectures: their names, and what a plan assumes of one that is not at hand."""

from __future__ import annotations

from collogue.errors import PlatformError

#: Architectures that kernels are compiled for. sm_80: one CTA per row, no PDL, E4M3 by integers.
ARCHITECTURES = ("sm_80", "sm_90a", "sm_100a", "sm_103a", "sm_120a")
#: Multiprocessors of a GPU of each architecture, where none is at hand to ask: A100, H100 and H200, B200, B300, RTX PRO 6000.
MULTIPROCESSORS = {"sm_80": 108, "sm_90a": 132, "sm_100a": 148, "sm_103a": 148, "sm_120a": 188}


def architecture_of(capability: tuple[int, int]) -> str:
    """The compile target of a compute capability: ``(9, 0)`` -> ``"sm_90a"``. Raises :class:`PlatformError` below 8.0."""
    major, minor = capability
    if major < 8:
        raise PlatformError(f"compute capability {major}.{minor} is too old", hint="Collogue needs sm_80 or later")
    return f"sm_{major}{minor}" + ("a" if major >= 9 else "")

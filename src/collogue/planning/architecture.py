"""GPU architectures: what Collogue knows of each, and what NVRTC compiles for one that it does not know."""

from __future__ import annotations

import re
import warnings
from collections.abc import Collection
from dataclasses import dataclass
from typing import Literal

from collogue.errors import PlatformError


@dataclass(frozen=True)
class Architecture:
    """GPUs of one compute capability.

    ``multiprocessors``: of the first of ``gpus``, for plans where none is at hand to ask. ``warps``, ``ctas`` and ``shared_bytes``:
    limits of one SM (CUDA C++ Programming Guide, table of technical specifications per compute capability).
    ``status``: ``"measured"`` and checked on such a GPU, or only ``"compiled"`` in the tests.
    """

    capability: tuple[int, int]
    gpus: str
    multiprocessors: int
    warps: int
    ctas: int
    shared_bytes: int
    status: Literal["measured", "compiled"] = "compiled"

    @property
    def name(self) -> str:
        """The compile target. From sm_90 on with what only this architecture has (``a``): E2M1 conversions are of that kind."""
        return _plain(self.capability) + ("a" if self.capability >= (9, 0) else "")

    @property
    def has_clusters(self) -> bool:
        """Thread-block clusters, PDL and mbarrier transactions."""
        return has_clusters(self.name)

    @property
    def has_e4m3(self) -> bool:
        """Conversions to E4M3 in hardware; else by integers, with the same bits."""
        return self.capability >= (8, 9)

    @property
    def has_e2m1(self) -> bool:
        """Conversions to E2M1 in hardware; else by integers, with the same bits."""
        return self.capability >= (10, 0)


def _plain(capability: tuple[int, int]) -> str:
    return f"sm_{capability[0]}{capability[1]}"


_ALL = (
    Architecture((8, 0), "A100", 108, 64, 32, 164 << 10),
    Architecture((8, 6), "A40, A10, RTX 30", 84, 48, 16, 100 << 10),
    Architecture((8, 7), "Jetson Orin", 16, 48, 16, 164 << 10),
    Architecture((8, 9), "L40S, L4, RTX 40", 142, 48, 24, 100 << 10),
    Architecture((9, 0), "H200, H100", 132, 64, 32, 228 << 10, "measured"),
    Architecture((10, 0), "B200, GB200", 148, 64, 32, 228 << 10),
    Architecture((10, 3), "B300, GB300", 148, 64, 32, 228 << 10),
    Architecture((11, 0), "Jetson Thor", 20, 48, 24, 228 << 10),
    Architecture((12, 0), "RTX PRO 6000, RTX 50", 188, 48, 24, 100 << 10),
    Architecture((12, 1), "GB10", 48, 48, 24, 100 << 10),
)
#: Of Jetson modules: machine code is not exchanged between these and other GPUs. (CUDA 12 calls sm_110 sm_101.)
_JETSON = (87, 101, 110)
#: By name.
ARCHITECTURES = {one.name: one for one in _ALL}
#: Those for which the tests compile every pair of choices; for the others they compile a dozen kernels, and all in `make test-compile`.
COVERED = ("sm_80", "sm_90a", "sm_100a", "sm_103a", "sm_120a")


def architecture_of(capability: tuple[int, int]) -> str:
    """The architecture of a compute capability: ``(9, 0)`` -> ``"sm_90a"``.

    One that is not known, ``(10, 7)``, is ``"sm_107"`` with a warning: it gets the code of its family without what only one
    architecture has. Raises :class:`PlatformError` below 8.0.
    """
    if capability < (8, 0):
        raise PlatformError(f"compute capability {_dotted(capability)} is too old", hint="Collogue needs sm_80 or later")
    known = next((one for one in _ALL if one.capability == capability), None)
    if known is not None:
        return known.name
    warnings.warn(
        f"compute capability {_dotted(capability)} is unknown to this version of Collogue: it gets the code of the family of "
        f"{nearest(capability).name}, which was never tried there",
        RuntimeWarning,
        stacklevel=2,
    )
    return _plain(capability)


def nearest(capability: tuple[int, int]) -> Architecture:
    """The known architecture whose family an unknown ``capability`` belongs to: the last one before it, but for Jetsons."""
    older = [one for one in _ALL if one.capability <= capability and _number(one.name) not in _JETSON]
    return max(older, key=lambda one: one.capability)


def has_clusters(architecture: str) -> bool:
    """Whether ``architecture`` has thread-block clusters, PDL and mbarrier transactions: sm_90 and later."""
    return _number(architecture) >= 90


def target(architecture: str, supported: Collection[int]) -> str:
    """What a compiler that knows the architectures ``supported`` compiles for GPUs of ``architecture``.

    That architecture; else the last before it in its major version, whose machine code runs there; else PTX of the last before it
    (``"compute_..."``), from which the driver makes machine code. The last two have nothing that only one architecture has: E2M1 is
    then encoded by integers. The bits are the same. Raises :class:`PlatformError` where none is older.
    """
    number = _number(architecture)
    if number in supported:
        return architecture
    older = [one for one in supported if 80 <= one < number and one not in _JETSON]
    if not older:
        raise PlatformError(f"NVRTC cannot compile for {architecture}", hint="install a newer NVRTC: pip install -U nvidia-cuda-nvrtc")
    same = [one for one in older if one // 10 == number // 10 and number not in _JETSON]
    return f"sm_{max(same)}" if same else f"compute_{max(older)}"


def _number(architecture: str) -> int:
    return int(re.sub(r"\D", "", architecture))


def _dotted(capability: tuple[int, int]) -> str:
    return f"{capability[0]}.{capability[1]}"

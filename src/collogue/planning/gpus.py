"""GPUs that predictions are made for: link and memory, as their vendor publishes them, and an assumed link to other hosts
(docs/machines.md).
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from collogue.errors import ArgumentError


@dataclass(frozen=True)
class Gpu:
    """One kind of GPU.

    ``device``: its name as torch says it. ``link_rate``: gigabytes per second of one GPU in one direction, half of what the vendor
    prints for both. ``memory_rate``: gigabytes per second. ``latency``: of a hop over ``link``, as a multiple of the H200's; no vendor
    publishes one, so all but 1 of the H200 are assumed. ``host_gbps``: gigabits per second of one GPU in one direction to other hosts, over
    ``host_link``; ``host_us``: what an exchange with another host takes more. All three are assumed.
    """

    name: str
    device: str
    architecture: str
    multiprocessors: int
    link: str
    link_rate: float
    memory_rate: float
    latency: float
    source: str
    host_link: str = "InfiniBand NDR, assumed"
    host_gbps: float = 400
    host_us: float = 5

    @property
    def between_hosts(self) -> str:
        """The link to other hosts in a line."""
        return f"Between hosts: {self.host_gbps:g} Gb/s of a GPU each way ({self.host_link}), {self.host_us:g} us an exchange (assumed)"

    def __str__(self) -> str:
        """The facts in a line."""
        return f"{self.name}: {self.link}, {self.link_rate:g} GB/s each way; memory {self.memory_rate:g} GB/s ({self.source})"


#: What PCIe 4.0 x16 can carry; what a workstation may have.
_HDR, _ETHERNET = ("InfiniBand HDR, assumed", 200), ("Ethernet, assumed", 100)
_ALL = (
    Gpu("A100", "NVIDIA A100-SXM4-80GB", "sm_80", 108, "NVLink 3", 300, 2039, 1, "A100 datasheet: 600 GB/s, 2039 GB/s", *_HDR),
    Gpu("H100", "NVIDIA H100 80GB HBM3", "sm_90a", 132, "NVLink 4", 450, 3350, 1, "H100 SXM datasheet: 900 GB/s, 3.35 TB/s"),
    Gpu("H200", "NVIDIA H200", "sm_90a", 132, "NVLink 4", 450, 4800, 1, "H200 SXM datasheet: 900 GB/s, 4.8 TB/s"),
    Gpu("B200", "NVIDIA B200", "sm_100a", 148, "NVLink 5", 900, 8000, 1, "HGX B200 datasheet: 1.8 TB/s, 8 TB/s"),
    Gpu("GB200", "NVIDIA GB200", "sm_100a", 148, "NVLink 5", 900, 8000, 1, "GB200 NVL72 datasheet: 1.8 TB/s, 8 TB/s"),
    Gpu("L40S", "NVIDIA L40S", "sm_89", 142, "PCIe 4.0 x16", 32, 864, 2, "L40S datasheet: 64 GB/s, 864 GB/s", *_HDR),
    Gpu(
        "RTX PRO 6000",
        "NVIDIA RTX PRO 6000 Blackwell Workstation Edition",
        "sm_120a",
        188,
        "PCIe 5.0 x16",
        64,
        1792,
        2,
        "RTX PRO 6000 Blackwell datasheet: PCIe 5.0 x16, 1792 GB/s",
        *_ETHERNET,
    ),
)
#: By name.
GPUS = {gpu.name: gpu for gpu in _ALL}


def gpu_named(name: str) -> Gpu:
    """The GPU called ``name``; case, spaces, dashes and underscores do not matter. Raises :class:`ArgumentError`."""
    wanted = _letters(name)
    found = next((gpu for gpu in _ALL if _letters(gpu.name) == wanted), None)
    if found is None:
        raise ArgumentError(f"there are no facts of a GPU {name!r}", hint=f"choose one of {', '.join(GPUS)}")
    return found


def _letters(name: str) -> str:
    return re.sub(r"[\s_-]", "", name).lower()

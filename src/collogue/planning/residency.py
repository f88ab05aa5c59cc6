"""How many thread-block clusters a GPU holds at a time, as its driver says: clusters do not fill a GPC, and GPCs differ."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Sequence
from typing import Any, TypeAlias

import torch

#: Clusters that fit, by CTAs that an SM holds (1 and on), then by CTAs of a cluster (1 and on).
Fitting: TypeAlias = "tuple[tuple[int, ...], ...]"

MOST_CTAS, MOST_CLUSTER = 16, 8
_ASKING = threading.Lock()
_KNOWN: dict[torch.device, Fitting | None] = {}
#: Does nothing; the driver compiles it.
_PROBE = b".version 7.8\n.target sm_90\n.address_size 64\n.visible .entry probe() { ret; }\n\0"
#: Of an SM's shared memory, what the system takes of every CTA, and what sizes are multiples of.
_RESERVED, _UNIT = 1024, 128


def fitting(device: torch.device) -> Fitting | None:
    """What ``device`` holds; ``None`` where its driver does not say. CTAs of so much shared memory that exactly so many fit on an SM."""
    with _ASKING:
        if device not in _KNOWN:
            _KNOWN[device] = None
            with contextlib.suppress(ImportError, AttributeError, RuntimeError), torch.cuda.device(device):
                torch.empty(1, device=device)  # there is a context now
                _KNOWN[device] = _ask(torch.cuda.get_device_properties(device).shared_memory_per_multiprocessor)
        return _KNOWN[device]


def agreed(every: list[Fitting | None]) -> Fitting | None:
    """The fewest of all ranks; ``None`` where one does not know."""
    known = [one for one in every if one is not None]
    if len(known) < len(every):
        return None
    return tuple(tuple(map(min, zip(*rows, strict=True))) for rows in zip(*known, strict=True))


def _ask(shared_bytes: int) -> Fitting:
    from cuda.bindings import driver

    def checked(result: tuple[Any, ...]) -> Any:
        if result[0]:
            raise RuntimeError(f"the driver answers {result[0]!r}")
        return result[1] if len(result) > 1 else None

    # It stays loaded: to unload it would wait for the GPU, where kernels may wait for this process.
    module = checked(driver.cuModuleLoadData(_PROBE))
    function = checked(driver.cuModuleGetFunction(module, b"probe"))
    rows = []
    for ctas in range(1, MOST_CTAS + 1):
        dynamic = (shared_bytes // ctas - _RESERVED) // _UNIT * _UNIT
        attribute = driver.CUfunction_attribute.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
        checked(driver.cuFuncSetAttribute(function, attribute, dynamic))
        row = []
        for cluster in range(1, MOST_CLUSTER + 1):
            wish = driver.CUlaunchAttribute()
            wish.id = driver.CUlaunchAttributeID.CU_LAUNCH_ATTRIBUTE_CLUSTER_DIMENSION
            wish.value.clusterDim.x, wish.value.clusterDim.y, wish.value.clusterDim.z = cluster, 1, 1
            config = driver.CUlaunchConfig()
            config.gridDimX, config.gridDimY, config.gridDimZ = cluster, 1, 1
            config.blockDimX, config.blockDimY, config.blockDimZ = 32, 1, 1
            config.sharedMemBytes, config.attrs, config.numAttrs = dynamic, [wish], 1
            row.append(int(checked(driver.cuOccupancyMaxActiveClusters(function, config))))
        rows.append(tuple(row))
    if not all(min(row) > 0 for row in rows):
        raise RuntimeError("the driver says that no cluster fits")
    return scaled(rows)


def scaled(rows: Sequence[tuple[int, ...]]) -> Fitting:
    """``rows``, with rows of the last full one in the place of those in which the driver's answer stops short of so many CTAs.

    By its default split of an SM's memory the probe stops at 8 CTAs, also where registers and threads would hold 16.
    """
    full = max(ctas for ctas, row in enumerate(rows, 1) if row[0] >= ctas * rows[0][0])
    beyond = range(full + 1, len(rows) + 1)
    return (*rows[:full], *(tuple(clusters * ctas // full for clusters in rows[full - 1]) for ctas in beyond))

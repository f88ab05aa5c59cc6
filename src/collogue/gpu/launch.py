"""Launching one kernel: parameters by value, cluster and PDL attributes, as little host time as possible."""

from __future__ import annotations

import ctypes
import functools
from typing import Any

import torch
from cuda.bindings import driver

from collogue import kernels
from collogue.contract.quant import Quant
from collogue.errors import PlatformError
from collogue.gpu.device import use_device
from collogue.planning.plan import LaunchShape


class Params(ctypes.Structure):
    """``collogue::Params`` (kernels/params.cuh)."""

    _fields_ = kernels.fields("params.cuh", "Params")


def timeouts(seconds: float) -> tuple[int, int]:
    """``Params.timeout`` and ``Params.relay_timeout``: a wait for what others relay ends an eighth later, at most 0.25 s."""

    def units(t: float) -> int:
        return max(1, round(t * 1e9 / (1 << 20)))

    return units(seconds), units(seconds + min(seconds / 8, 0.25)) + 1


class Launcher:
    """A loaded kernel in a launch shape, with parameters that stay between calls."""

    def __init__(self, kernel: Any, shape: LaunchShape, *, dependent: bool) -> None:
        self.params = Params()
        self._arguments = (ctypes.c_void_p * 1)(ctypes.addressof(self.params))
        self._address = ctypes.addressof(self._arguments)
        self._function = driver.CUfunction(int(kernel.handle))
        attributes = []
        if shape.cluster > 1:
            cluster = driver.CUlaunchAttribute()
            cluster.id = driver.CUlaunchAttributeID.CU_LAUNCH_ATTRIBUTE_CLUSTER_DIMENSION
            cluster.value.clusterDim.x, cluster.value.clusterDim.y, cluster.value.clusterDim.z = shape.cluster, 1, 1
            attributes.append(cluster)
        if dependent:
            pdl = driver.CUlaunchAttribute()
            pdl.id = driver.CUlaunchAttributeID.CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION
            pdl.value.programmaticStreamSerializationAllowed = 1
            attributes.append(pdl)
        config = driver.CUlaunchConfig()
        config.gridDimX, config.gridDimY, config.gridDimZ = shape.cluster, shape.clusters, 1
        config.blockDimX, config.blockDimY, config.blockDimZ = shape.threads, 1, 1
        config.attrs, config.numAttrs = attributes, len(attributes)
        self._config = config
        #: The stream of the last launch.
        self.stream = -1
        #: Launches on it, and returns the driver's error in a tuple.
        self.launch = functools.partial(driver.cuLaunchKernelEx, config, self._function, self._address, 0)
        #: The format whose numbers the parameters hold, where a bound call has put them there.
        self.quant: Quant | None = None

    def __call__(self, stream: int) -> None:
        """Launch with the current parameters on a raw stream of the current device."""
        if stream != self.stream:
            self._config.hStream = driver.CUstream(stream)
            self.stream = stream
        (error,) = self.launch()
        if error:
            self._launch_again(error)

    def _launch_again(self, error: Any) -> None:
        """In a thread that has used no GPU before, now that it has a context. Raises :class:`PlatformError` where that was not it."""
        if error == driver.CUresult.CUDA_ERROR_INVALID_CONTEXT:
            use_device(torch.cuda.current_device())
            (error,) = self.launch()
        if error:
            raise PlatformError(
                f"a kernel could not be launched: {error!r}", hint="run with CUDA_LAUNCH_BLOCKING=1 to find the failing call"
            )

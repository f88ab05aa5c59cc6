"""How many clusters a GPU holds, as its driver says: agreed between ranks, used by plans."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from collogue.calls.capacity import Capacity
from collogue.contract.spec import RMSNorm
from collogue.planning import residency
from collogue.planning.plan import make_plan
from collogue.planning.topology import topology_of

pytestmark = pytest.mark.slow

SMS, GPCS = 132, (16, 16, 16, 16, 16, 18, 18, 16)


def table(gpcs: tuple[int, ...] = GPCS) -> residency.Fitting:
    """Of a GPU whose GPCs have so many SMs."""
    return tuple(
        tuple(sum(sms * ctas // cluster for sms in gpcs) for cluster in range(1, residency.MOST_CLUSTER + 1))
        for ctas in range(1, residency.MOST_CTAS + 1)
    )


def test_the_fewest_of_all_ranks_count() -> None:
    whole, less = table(), table((14, *GPCS[1:]))
    assert residency.agreed([whole, whole]) == whole
    assert residency.agreed([whole, less]) == less
    assert residency.agreed([whole, None]) is None


@pytest.mark.parametrize("operation", ["all_reduce", "sharded"])
def test_plans_use_it(operation: str) -> None:
    assert sum(GPCS) == SMS
    capacity = Capacity(4096, 7168, torch.bfloat16, torch.device("cpu"), 2, 0)
    norm = RMSNorm(torch.ones(7168, dtype=torch.bfloat16))
    request = capacity.request(4096, True, norm, None, False, None, operation)  # type: ignore[arg-type]
    guessed = topology_of(2, capacity, architecture="sm_90a", multiprocessors=SMS)
    known = replace(guessed, fitting=table())
    at_guess, at_known = (make_plan(topology, request).shape for topology in (guessed, known))
    assert at_guess is not None
    assert at_known is not None
    fits = table()[8 - 1][7 - 1]  # eight CTAs of 128 threads, seven to a row
    assert fits > 132 * 8 * 9 // 10 // 7 >= at_guess.clusters
    assert at_guess.clusters < at_known.clusters <= fits
    few = replace(guessed, fitting=tuple(tuple(n // 2 for n in row) for row in table()))
    shape = make_plan(few, request).shape
    assert shape is not None
    assert shape.clusters <= fits // 2


class Driver:
    """Answers as a GPU with :data:`GPCS` would."""

    CUfunction_attribute = SimpleNamespace(CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES=8)
    CUlaunchAttributeID = SimpleNamespace(CU_LAUNCH_ATTRIBUTE_CLUSTER_DIMENSION=4)

    def __init__(self, error: int = 0) -> None:
        self.error, self.allowed = error, 0

    CUlaunchConfig = SimpleNamespace

    @staticmethod
    def CUlaunchAttribute() -> Any:
        return SimpleNamespace(value=SimpleNamespace(clusterDim=SimpleNamespace()))

    def cuModuleLoadData(self, image: bytes) -> tuple[Any, ...]:
        assert image.endswith(b"\0")
        return 0, "module"

    def cuModuleGetFunction(self, module: str, name: bytes) -> tuple[Any, ...]:
        return 0, "function"

    def cuFuncSetAttribute(self, function: str, attribute: int, value: int) -> tuple[Any, ...]:
        self.allowed = value
        return (0,)

    def cuOccupancyMaxActiveClusters(self, function: str, config: Any) -> tuple[Any, ...]:
        assert 0 < config.sharedMemBytes <= self.allowed <= 227 << 10
        ctas = (228 << 10) // (config.sharedMemBytes + 1024)
        cluster = config.attrs[0].value.clusterDim.x
        return self.error, sum(sms * ctas // cluster for sms in GPCS)


def test_the_driver_is_asked_for_every_number_of_ctas(monkeypatch: pytest.MonkeyPatch) -> None:
    cuda = pytest.importorskip("cuda.bindings")
    monkeypatch.setattr(cuda, "driver", Driver(), raising=False)
    assert residency._ask(228 << 10) == table()
    monkeypatch.setattr(cuda, "driver", Driver(error=3), raising=False)
    with pytest.raises(RuntimeError, match="the driver answers 3"):
        residency._ask(228 << 10)

"""A short soak and every fault, a process for each GPU. `collogue reliability` is the long one."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from collogue.tools.reliability import main
from collogue.tools.reliability.parts import Counts

GPUS = torch.cuda.device_count()
pytestmark = [pytest.mark.gpu, pytest.mark.skipif(GPUS < 2, reason="takes two GPUs"), pytest.mark.timeout(300)]
OPTIONS = main.Options(Counts(3000, 1000, 1000, 10_000, 1000, 1000))
WORLD = min(8, GPUS)


@pytest.fixture(scope="module")
def found() -> dict[str, Any]:
    return main.run(WORLD, ("soak", "faults"), OPTIONS, limit=240.0)


@pytest.mark.parametrize("name", main.names_of(max(2, WORLD), ("soak", "faults"), OPTIONS))
def test_as_promised(name: str, found: dict[str, Any]) -> None:
    rows = {f"soak: {row['part']}": row for row in found["soak"]} | {f"fault: {row['fault']}": row for row in found["faults"]}
    assert rows[name]["passed"], (rows[name], found["problems"].get(name))

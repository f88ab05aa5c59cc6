"""``collogue bench --virtual`` on one GPU: every cell has a number of Collogue's; of FlashInfer's, where it is installed."""

from __future__ import annotations

import json
from importlib.util import find_spec

import pytest
import torch

from collogue.tools.bench import virtual

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU"), pytest.mark.timeout(600)]


@pytest.mark.parametrize("world", virtual.WORLDS)
def test_every_cell_has_a_number(world: int) -> None:
    data = virtual.run([world], tokens=[1, 8], hidden_size=[2880, 7168], replays=2)
    print(virtual.text(data))
    assert data["problems"] == []
    assert [row for row in data["cases"] if row["error"] is not None] == []
    assert data["passed"]
    assert json.loads(json.dumps(data, allow_nan=False)) == data
    assert {row["pdl"] for row in data["cases"]} == {world == 2}
    if find_spec("flashinfer") is not None:
        assert len(virtual.ratios(data)) == 2 * 2 * 3 - len({str(row) for row in data["left_out"] if row["what"] == "flashinfer one-shot"})

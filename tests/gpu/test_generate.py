"""``collogue bench generate`` on a GPU: every scheme and way in CUDA graphs, with logits that are bfloat16's within the gate's bound."""

from __future__ import annotations

import pytest
import torch

from collogue.tools.bench import generate

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU"), pytest.mark.timeout(300)]


def test_every_scheme_has_a_number() -> None:
    """Batch 1 and 3 are no multiples of 4, and 128 features one block of scales: what the product of blocks has to fill up."""
    data = generate.run(model=["small"], batch=[1, 3, 8], prompt_tokens=16, new_tokens=4, rounds=1)
    assert [(row["batch"], row["scheme"], row["way"], row["error"], row["gemms_error"]) for row in data["rows"]] == [
        (batch, scheme, way, None, None)
        for batch in (1, 3, 8)
        for scheme in ("bfloat16", *generate.SCHEMES)
        for way in ("torch.compile", "collogue")
    ]
    if torch.cuda.get_device_capability()[0] == 9:
        assert all("scaled_mm" in size["product"] for size in data["sizes"][1:])

"""``validate=True`` reads the value of a CUDA tensor; without it a format is made without touching the GPU."""

from __future__ import annotations

import pytest
import torch

from collogue import NVFP4, FP8Static
from collogue.errors import ScaleError

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 0.0, -1.0])
@pytest.mark.parametrize("kind", [NVFP4, FP8Static])
def test_cuda_scale_is_read_on_request(kind: type[NVFP4 | FP8Static], value: float) -> None:
    scale = torch.tensor(value, device="cuda")
    assert kind(scale).given_scale is scale
    with pytest.raises(ScaleError, match="must be positive and finite"):
        kind(scale, validate=True)


@pytest.mark.parametrize("kind", [NVFP4, FP8Static])
def test_good_cuda_scale_is_accepted(kind: type[NVFP4 | FP8Static]) -> None:
    scale = torch.tensor([0.5], device="cuda")
    assert kind(scale, validate=True).given_scale is scale

"""Facts of GPUs that are not here."""

from __future__ import annotations

import pytest

from collogue.errors import ArgumentError
from collogue.planning.architecture import ARCHITECTURES
from collogue.planning.gpus import GPUS, gpu_named


def test_every_gpu_has_a_known_architecture_and_a_source() -> None:
    assert list(GPUS) == ["A100", "H100", "H200", "B200", "GB200", "L40S", "RTX PRO 6000"]
    for gpu in GPUS.values():
        assert gpu.architecture in ARCHITECTURES
        assert "datasheet" in gpu.source
        assert gpu.multiprocessors > 0
        assert (gpu.latency == 1) == gpu.link.startswith("NVLink")
    rates = [gpu.link_rate for gpu in GPUS.values()]
    assert rates == [300, 450, 450, 900, 900, 32, 64]  # half of what is printed for both directions


@pytest.mark.parametrize("name", ["RTX PRO 6000", "rtx-pro-6000", "RTX_PRO_6000", "rtxpro6000"])
def test_names_as_people_type_them(name: str) -> None:
    assert gpu_named(name) is GPUS["RTX PRO 6000"]


def test_a_gpu_without_facts() -> None:
    with pytest.raises(ArgumentError, match="no facts of a GPU 'V100'") as raised:
        gpu_named("V100")
    assert raised.value.hint.startswith("choose one of A100, H100, H200")

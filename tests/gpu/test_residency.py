"""What the driver says of clusters that fit."""

from __future__ import annotations

import pytest
import torch

from collogue.planning.residency import MOST_CLUSTER, MOST_CTAS, fitting

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available() or torch.cuda.get_device_capability()[0] < 9, reason="no GPU with clusters"),
]


def test_the_driver_says_how_many_clusters_fit() -> None:
    device = torch.device("cuda", 0)
    found = fitting(device)
    assert found is not None
    assert [len(row) for row in found] == [MOST_CLUSTER] * MOST_CTAS
    sms = torch.cuda.get_device_properties(device).multi_processor_count
    for ctas, row in enumerate(found, 1):
        for cluster, clusters in enumerate(row, 1):
            assert 0.5 * sms * ctas < clusters * cluster <= sms * ctas, (ctas, cluster)

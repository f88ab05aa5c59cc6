"""Latency and wire model: the floor of a call and the predicted time, in microseconds.

The constants are measured on H200 with NVLink (benchmarks/results); other machines differ, plans do not depend on them.
"""

from __future__ import annotations

#: One word exchanged with every peer, one kernel per exchange, back to back.
EXCHANGE_US = 1.46
#: What one-shot adds at one token: loads, row sum over the cluster, stores.
FINISH_US = 0.6
#: Payload per GPU and direction, 16-byte stores.
STORE_BYTES_PER_US = 333e3
#: Three launches of kernels and two of NCCL in the transport path.
TRANSPORT_US = 40.0


def predict(algorithm: str, world_size: int, bytes_sent: int) -> tuple[float, float]:
    """``(predicted, floor)`` of a call that sends ``bytes_sent`` from each rank."""
    wire = bytes_sent / STORE_BYTES_PER_US
    if algorithm == "local" or world_size == 1:
        return FINISH_US, 0.0
    floor = max(EXCHANGE_US, wire)
    if algorithm == "one_shot":
        return EXCHANGE_US + FINISH_US + wire, floor
    return TRANSPORT_US + wire, floor

"""Latency and wire model: the floor of a call and the predicted time, in microseconds.

The constants are read off two H200 with NVLink (benchmarks/results/latency-2xh200.json); other machines and worlds differ.
Plans compare predictions of one-shot and two-shot.
"""

from __future__ import annotations

#: One word exchanged with every peer, one kernel per exchange, back to back.
EXCHANGE_US = 1.23
#: What one-shot adds at one token: loads, row sum over the cluster, stores.
FINISH_US = 0.7
#: Payload per GPU and direction: 16-byte stores and nothing else.
WIRE_BYTES_PER_US = 367e3
#: The same as one-shot reaches it: the receiver reads, adds and cleans as well.
ONE_SHOT_BYTES_PER_US = 300e3
#: What the second hop of the other kernels adds, and the rate that they reach.
SECOND_HOP_US = 1.4
STREAM_BYTES_PER_US = 335e3


def predict(algorithm: str, world_size: int, bytes_sent: int) -> tuple[float, float]:
    """``(predicted, floor)`` of a call that sends ``bytes_sent`` from each rank."""
    if algorithm == "local" or world_size == 1:
        return FINISH_US, 0.0
    floor = EXCHANGE_US + bytes_sent / WIRE_BYTES_PER_US
    if algorithm == "one_shot":
        return EXCHANGE_US + FINISH_US + bytes_sent / ONE_SHOT_BYTES_PER_US, floor
    return EXCHANGE_US + SECOND_HOP_US + FINISH_US + bytes_sent / STREAM_BYTES_PER_US, floor

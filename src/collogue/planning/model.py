"""Predicted time of a call on other machines: lines fitted to two H200, scaled by the vendor's rates (docs/machines.md).

It never decides anything: plans choose by :mod:`collogue.planning.cost` on every machine.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from collogue.calls.request import Request
from collogue.calls.terms import TermsForm
from collogue.contract.quant import FP8Static, Quant, parse
from collogue.errors import ArgumentError
from collogue.planning.algorithm import ALGORITHMS
from collogue.planning.extent import wire_bytes
from collogue.planning.gpus import GPUS, Gpu
from collogue.planning.host import exchanges, steps
from collogue.planning.plan import Plan
from collogue.planning.topology import Topology


@dataclass(frozen=True)
class Model:
    """Microseconds and bytes per microsecond, of two H200.

    ``exchange_us`` and ``wire_rate`` are measured floors: one word to a peer and back, payload per GPU and direction. Of a call:
    ``start_us`` beside the exchange; ``second_hop_us`` where rows have owners; ``norm_us`` where there is a norm; ``amax_us`` where
    scales are of the values at hand; ``one_shot_rate`` and ``stream_rate`` as the algorithms reach them.
    """

    exchange_us: float
    wire_rate: float
    start_us: float
    second_hop_us: float
    norm_us: float
    amax_us: float
    one_shot_rate: float
    stream_rate: float

    def us(self, gpu: Gpu, algorithm: str, bytes_sent: int, *, norm: bool, amax: bool) -> tuple[float, float]:
        """``(predicted, floor)`` of a call that sends ``bytes_sent`` from each rank.

        Hops take ``gpu.latency`` times as long. The wire's part of a byte goes with the rate of the link, the rest of it, which the
        kernels need to read, add and write, with that of the memory.
        """
        here = GPUS["H200"]
        one_hop = ALGORITHMS[algorithm].one_hop
        wire = bytes_sent / self.wire_rate * here.link_rate / gpu.link_rate
        whole = bytes_sent / (self.one_shot_rate if one_hop else self.stream_rate)
        rest = (whole - bytes_sent / self.wire_rate) * here.memory_rate / gpu.memory_rate
        hops = (self.exchange_us + (0 if one_hop else self.second_hop_us)) * gpu.latency
        fixed = self.start_us + norm * self.norm_us + amax * self.amax_us
        return hops + fixed + wire + rest, self.exchange_us * gpu.latency + wire


#: From benchmarks/results/predictions-2xh200.json.
MODEL = Model(
    exchange_us=1.232,
    wire_rate=367200,
    start_us=0.2621,
    second_hop_us=0.9289,
    norm_us=0.4515,
    amax_us=0.2684,
    one_shot_rate=325300,
    stream_rate=345900,
)


@dataclass(frozen=True)
class HostModel:
    """The same of the host path over NCCL, in a CUDA graph: exchanges of the group, and kernels that add and finish.

    ``exchange_us`` and ``exchange_rate`` (bytes per microsecond and direction, over NVLink) of an exchange; ``kernel_us`` and
    ``kernel_rate`` (bytes that it reads and writes) of a kernel.
    """

    exchange_us: float
    exchange_rate: float
    kernel_us: float
    kernel_rate: float

    def us(self, gpu: Gpu, topology: Topology, request: Request, algorithm: str) -> tuple[float, float]:
        """``(predicted, floor)`` of a call on ranks each of which has a ``gpu``. Islands are on hosts of their own.

        An exchange ends when the slower of its two parts has: bytes within islands, by NCCL as well, and bytes between them. Links between
        hosts give the share of their rate that NVLink gives. Rates within go with the link's, those of kernels with the memory's.
        """
        here, home = GPUS["H200"], {rank: number for number, island in enumerate(topology.islands) for rank in island}
        link, latency = gpu.link_rate / here.link_rate, MODEL.exchange_us * gpu.latency
        host_rate = MODEL.wire_rate / here.link_rate * gpu.host_gbps / 8
        us = floor = 0.0
        for each in exchanges(topology, request, algorithm):
            near = each.busiest(lambda a, b: home[a] == home[b])
            far = each.busiest(lambda a, b: home[a] != home[b])
            beyond = each.parts * gpu.host_us if far else 0.0
            us += each.parts * (self.exchange_us - MODEL.exchange_us + latency) + beyond
            us += max(near / self.exchange_rate / link, far / host_rate)
            floor += each.parts * latency + beyond + max(near / MODEL.wire_rate / link, far / host_rate)
        kernel_rate = self.kernel_rate * gpu.memory_rate / here.memory_rate
        kernels = (steps(topology, request, rank) for rank in home)
        return us + max(sum(self.kernel_us + memory_bytes(step) / kernel_rate for step in each) for each in kernels), floor


def memory_bytes(step: Request) -> int:
    """What a kernel of the host path reads and writes."""
    value, terms = step.dtype.itemsize, [step.dtype.itemsize]
    if isinstance(step.prologue, TermsForm):
        narrow = step.prologue.dtype.itemsize
        terms = [4 if step.prologue.wide >> k & 1 else narrow for k in range(step.prologue.count)]
    values = step.residual + step.wanted.reduced + step.wanted.residual + step.wanted.norm
    row = (sum(terms) + values * value) * step.hidden_size + wire_bytes(step.hidden_size, step.dtype, step.quant, values=False)
    return step.tokens * row


#: Exchanges from benchmarks/results/host-path-2xh200.json, at 1 and 1024 tokens; kernels from host-path-h200.json.
HOST_MODEL = HostModel(exchange_us=8.95, exchange_rate=204000, kernel_us=0.7, kernel_rate=3370000)


def predict(gpu: Gpu, plan: Plan, request: Request, topology: Topology) -> tuple[float, float]:
    """``(predicted, floor)`` of a planned call on ``gpu``. Raises :class:`ArgumentError` for what nothing was fitted to."""
    alone = plan.algorithm == "local"
    if request.operation not in ("all_reduce", "sharded") or alone or request.prologue is not None:
        what: str = request.operation if request.prologue is None else "a prologue"
        if alone and request.operation != "finish":
            what = "a world of one"
        hint = "all_reduce and sharded of two ranks or more are; --architecture shows the plan of any call"
        raise ArgumentError(f"{what} is not modeled for other GPUs", hint=hint)
    if topology.transport == "host":
        return HOST_MODEL.us(gpu, topology, request, plan.algorithm)
    return MODEL.us(gpu, plan.algorithm, plan.bytes_sent, norm=request.norm, amax=has_amax(request.quant))


def has_amax(quant: Quant | None) -> bool:
    """Whether scales are of the values at hand, so that their amax must be found first."""
    return quant is not None and not isinstance(quant, FP8Static)


def fit(rows: Sequence[Mapping[str, Any]], exchange_us: float, wire_rate: float) -> Model:
    """The model of least relative error, by least squares, of rows of ``collogue bench --json``, and its two measured floors."""
    columns = []
    for row in rows:
        one_hop, sent = ALGORITHMS[row["algorithm"]].one_hop, row["bytes_sent"] / 1e6
        columns.append([1, not one_hop, row["norm"], has_amax(parse(row["format"])), sent * one_hop, sent * (not one_hop)])
    us = np.array([row["us"] for row in rows])
    start, hop, norm, amax, one, stream = np.linalg.lstsq(np.array(columns, float) / us[:, None], np.ones(len(us)), rcond=None)[0]
    values = (exchange_us, wire_rate, start - exchange_us, hop, norm, amax, 1e6 / one, 1e6 / stream)
    return Model(*(float(f"{value:.4g}") for value in values))

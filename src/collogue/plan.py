"""Which algorithm a call takes and in which launch shape: a pure function of facts that all ranks share.

The plan never changes a bit of any output (docs/contract.md); it only decides where the time goes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch

from collogue import cost
from collogue.errors import FormatError
from collogue.spec import Quant, Wanted
from collogue.topology import Topology
from collogue.variant import QuantVariant, Variant, block_class

Algorithm = Literal["reference", "local", "one_shot", "transport"]

#: Bytes that the one-shot slots of all generations may take on each rank.
ONE_SHOT_BYTES = 32 << 20
#: Generations of slots: one in use, one being wiped, the next ones clean (kernels/protocol.cuh).
GENERATIONS = 4
#: Cycles between a rank's last send and its first poll: about one NVLink hop.
FIRST_POLL_CYCLES = 900
#: Largest cluster that every GPU with clusters accepts.
MAX_CLUSTER = 8
#: Threads a multiprocessor is sure to hold of any kernel here (its launch bounds ask for that many registers at most).
RESIDENT_THREADS = 512


@dataclass(frozen=True)
class Request:
    """What a plan is made for: the shape of a call, not its tensors."""

    tokens: int
    hidden_size: int
    dtype: torch.dtype
    residual: bool
    norm: bool
    wide_weight: bool
    quant: Quant | None
    wanted: Wanted


@dataclass(frozen=True)
class LaunchShape:
    """``clusters`` clusters of ``cluster`` CTAs of ``threads`` threads; a thread holds ``vectors`` times 8 elements of a row."""

    threads: int
    vectors: int
    cluster: int
    clusters: int


@dataclass(frozen=True)
class Plan:
    """What a call will do, and why. ``bytes_sent`` leave each rank per call; times are microseconds."""

    algorithm: Algorithm
    why: str
    shape: LaunchShape | None
    bytes_sent: int
    predicted_us: float
    floor_us: float


def slot_bytes(topology: Topology) -> int:
    """Bytes of one one-shot slot: whole rows of the full hidden size, at most ``max_tokens`` of them."""
    row = topology.hidden_size * topology.dtype.itemsize
    rows = min(topology.max_tokens, max(1, ONE_SHOT_BYTES // (GENERATIONS * topology.world_size * row)))
    return rows * row


def make_plan(topology: Topology, request: Request) -> Plan:
    """The plan of one call."""
    message = request.tokens * request.hidden_size * request.dtype.itemsize
    world = topology.world_size
    algorithm: Algorithm
    if world == 1 or request.tokens == 0:
        algorithm, sent, why = "local", 0, "a world of one communicates nothing" if world == 1 else "no tokens"
    elif message <= slot_bytes(topology):
        algorithm, sent, why = "one_shot", (world - 1) * message, "the message fits the one-shot slots: one hop"
    else:
        rows = -(-request.tokens // world)
        sent = 2 * (world - 1) * rows * request.hidden_size * request.dtype.itemsize
        algorithm, why = "transport", "larger than the one-shot slots: NCCL moves row blocks, kernels add and finish"
    predicted, floor = cost.predict(algorithm, world, sent)
    if topology.architecture is None:
        return Plan("reference", f"a CPU group works out the reference; on GPUs: {algorithm}, {why}", None, sent, predicted, floor)
    if not topology.has_clusters:
        why += f"; {topology.architecture} has no clusters: one CTA per row, no PDL"
    shape = launch_shape(topology, request.tokens, request.hidden_size, request.quant)
    return Plan(algorithm, why, shape, sent, predicted, floor)


def launch_shape(topology: Topology, tokens: int, hidden_size: int, quant: Quant | None) -> LaunchShape:
    """Threads, vectors and clusters for rows of this width.

    With clusters a thread holds one vector and a row is spread over up to 8 CTAs: the fewest cycles between the first
    load and the last store. In one CTA (no clusters, or groups that only one CTA can reduce) threads hold several.
    """
    vectors_in_row = hidden_size // 8
    if topology.has_clusters and not QuantVariant.of(quant).needs_one_cta:
        threads = 64 if hidden_size <= 2048 else 128
        if vectors_in_row <= 64:
            threads = _round_up(vectors_in_row, 32)
        cluster = -(-vectors_in_row // threads)
        if cluster > MAX_CLUSTER:
            cluster, threads = MAX_CLUSTER, _round_up(-(-vectors_in_row // MAX_CLUSTER), 32)
        if threads > 512:
            raise FormatError(f"hidden size {hidden_size} is too large", hint="the largest is 32768")
        vectors = 1
    else:
        cluster = 1
        threads = min(512, _round_up(vectors_in_row, 32))
        vectors = 1 << (-(-vectors_in_row // threads) - 1).bit_length()
        if vectors > 8:
            raise FormatError(f"hidden size {hidden_size} is too large for one CTA per row", hint="the largest is 32768")
        threads = _round_up(-(-vectors_in_row // vectors), 32)
    resident = topology.multiprocessors * max(1, RESIDENT_THREADS // threads) // (2 * topology.ranks_per_gpu if topology.ranks_per_gpu > 1 else 1)
    clusters = max(1, min(max(tokens, 1), resident * 9 // 10 // cluster))
    return LaunchShape(threads, vectors, cluster, clusters)


def make_variant(topology: Topology, request: Request, shape: LaunchShape, kernel: str, world: int) -> Variant:
    """The kernel that runs ``request`` in ``shape``."""
    clustered = shape.cluster > 1
    return Variant(
        kernel=kernel,
        world=world,
        dtype=request.dtype,
        weight_dtype=torch.float32 if request.wide_weight and request.norm else request.dtype,
        residual=request.residual,
        norm=request.norm,
        keep_norm=request.wanted.norm,
        quant=QuantVariant.of(request.quant),
        threads=shape.threads,
        vectors=shape.vectors,
        clustered=clustered,
        blocks=block_class(request.hidden_size),
        first_poll=FIRST_POLL_CYCLES if kernel == "one_shot" else 0,
    )


def _round_up(value: int, multiple: int) -> int:
    return -(-value // multiple) * multiple

"""Which algorithm a call takes and in which launch shape: a pure function of facts that all ranks share.

The plan never changes a bit of any output (docs/contract.md); it only decides where the time goes.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

import torch

from collogue import cost
from collogue.errors import FormatError
from collogue.spec import Operation, Quant, Wanted
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
#: Threads of the widest CTA whose threads hold several vectors.
MAX_THREADS_OF_VECTORS = 256


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
    operation: Operation = "all_reduce"


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


@dataclass(frozen=True)
class Kernel:
    """One kernel of a planned call: the part of the request that it does, its launch shape, and what is compiled."""

    request: Request
    shape: LaunchShape
    variant: Variant


@dataclass(frozen=True)
class Kernels:
    """The kernels of a call: ``main`` alone; with a transport, ``add`` before its gather and, if anything is left, ``main`` after it."""

    main: Kernel | None
    add: Kernel | None = None

    @property
    def variants(self) -> tuple[Variant, ...]:
        """What has to be compiled."""
        return tuple(kernel.variant for kernel in (self.add, self.main) if kernel is not None)


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
        vectors = 1 << (-(-vectors_in_row // MAX_THREADS_OF_VECTORS) - 1).bit_length()
        if vectors > 8:
            raise FormatError(f"hidden size {hidden_size} is too large for one CTA per row", hint="the largest is 16384")
        threads = _round_up(-(-vectors_in_row // vectors), 32)
    clusters = max(tokens, 1)
    limit = _resident_clusters(topology, LaunchShape(threads, vectors, cluster, clusters))
    if clusters > limit:
        rounds = -(-tokens // _resident_clusters(topology, LaunchShape(threads, vectors, cluster, clusters), loop=True))
        clusters = -(-tokens // rounds)  # the same number of rows for all, as far as it goes
    return LaunchShape(threads, vectors, cluster, clusters)


def _resident_clusters(topology: Topology, shape: LaunchShape, *, loop: bool = False) -> int:
    """Clusters that are sure to be on the GPU together, so that ranks cannot wait for rows that have not started."""
    ctas = topology.multiprocessors * ctas_per_multiprocessor(topology, shape, loop=loop)
    if topology.ranks_per_gpu > 1:
        ctas //= 2 * topology.ranks_per_gpu  # this kernel and the next of every rank are resident together
    return max(1, ctas * 9 // 10 // shape.cluster)  # a tenth is lost where clusters do not fill a GPC


def ctas_per_multiprocessor(topology: Topology, shape: LaunchShape, *, loop: bool) -> int:
    """CTAs that a multiprocessor is sure to hold: launch bounds ask for no more registers than that leaves to each thread.

    Few registers make a small kernel start sooner (docs/speed.md), as long as nothing spills: a thread holds a vector of
    every rank. With more than two CTAs to a multiprocessor, or several rows to a CTA, more registers are faster.
    """
    crowded = loop or shape.clusters * shape.cluster > 2 * topology.multiprocessors
    if shape.vectors > 1:
        resident_threads = 256
    elif topology.world_size <= 4 and topology.dtype.itemsize == 2 and not crowded:
        resident_threads = 1024
    else:
        resident_threads = 512 if topology.world_size <= 6 else 384
    # 16: as many CTAs as every architecture holds.
    return max(1, min(16, resident_threads // shape.threads))


def make_kernels(topology: Topology, request: Request, plan: Plan) -> Kernels:
    """The kernels of ``plan``, which was made for ``request`` on GPUs."""
    assert plan.shape is not None
    world = topology.world_size
    if plan.algorithm != "transport":
        return Kernels(Kernel(request, plan.shape, make_variant(topology, request, plan.shape, plan.algorithm, world)))
    wanted = Wanted.of(has_residual=request.residual, has_norm=False, quant=None, keep_norm=False)
    rows = replace(request, tokens=-(-request.tokens // world), norm=False, quant=None, wanted=wanted)
    shape = launch_shape(topology, rows.tokens, rows.hidden_size, None)
    add = Kernel(rows, shape, make_variant(topology, rows, shape, "local", world))
    if not request.norm and request.quant is None:
        return Kernels(None, add)
    rest = replace(request, residual=False)
    return Kernels(Kernel(rest, plan.shape, make_variant(topology, rest, plan.shape, "local", 1)), add)


def make_variant(topology: Topology, request: Request, shape: LaunchShape, kernel: str, world: int) -> Variant:
    """The kernel that runs ``request`` in ``shape``."""
    clustered, loop = shape.cluster > 1, request.tokens > shape.clusters
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
        loop=loop,
        ctas_per_multiprocessor=ctas_per_multiprocessor(topology, shape, loop=loop),
        first_poll=FIRST_POLL_CYCLES if kernel == "one_shot" else 0,
    )


def _round_up(value: int, multiple: int) -> int:
    return -(-value // multiple) * multiple

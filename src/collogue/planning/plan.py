"""Which algorithm a call takes and in which launch shape: a pure function of facts that all ranks share.

The plan never changes a bit of any output (docs/contract.md); it only decides where the time goes.
"""

from __future__ import annotations

import textwrap
from dataclasses import dataclass, replace

import torch

from collogue.calls.request import Request, sum_alone
from collogue.contract.prologue import PrologueForm
from collogue.contract.quant import Quant
from collogue.contract.spec import Wanted, largest_block
from collogue.errors import CapacityError, FormatError
from collogue.planning import cost
from collogue.planning.algorithm import ALGORITHMS, Algorithm
from collogue.planning.extent import MAX_CTAS, Memory, memory_of, round_up, wire_bytes, workspace_extent
from collogue.planning.table import Candidate, Entry
from collogue.planning.topology import Topology
from collogue.planning.variant import QuantVariant, Variant, block_class, source_type

#: Cycles between a rank's last send and its first poll: about one NVLink hop.
FIRST_POLL_CYCLES = 1000
#: Largest cluster that every GPU with clusters accepts.
MAX_CLUSTER = 8
#: Threads of the widest CTA whose threads hold several vectors, and of the widest that large calls use.
MAX_THREADS_OF_VECTORS = 256
MAX_THREADS = 1024
#: Two-shot: wider CTAs are few, and have another row on its way before they finish one.
MAX_THREADS_OF_ROWS_IN_TURN = 512
#: Tokens of the largest call whose kernel computes the terms of experts itself: each of its threads has few rows on their way.
MOST_TOKENS_OF_EXPERTS = 512
#: Largest hidden size where a cluster does a row, and where one CTA does.
MAX_HIDDEN_SIZE, MAX_HIDDEN_SIZE_OF_A_CTA = 32768, 16384


@dataclass(frozen=True)
class LaunchShape:
    """``clusters`` clusters of ``cluster`` CTAs of ``threads`` threads; a thread holds ``vectors`` times 8 elements of a row."""

    threads: int
    vectors: int
    cluster: int
    clusters: int

    def __str__(self) -> str:
        """``128 x 7 CTAs of 128 threads, 8 elements of a row each``."""
        return f"{self.clusters} x {self.cluster} CTAs of {self.threads} threads, {8 * self.vectors} elements of a row each"


@dataclass(frozen=True)
class Plan:
    """What a call will do, and why. ``bytes_sent`` leave each rank per call, or, where rows are uneven, the rank that sends most; times
    are microseconds.

    ``rows`` of the call are done by one launch (with the sharded residual and its halves: rows of each owner), ``launches`` in all;
    a launch uses ``workspace_bytes`` of each rank's workspace. ``measured_us`` is read off ``table``, the measured table that was
    looked at, if it holds this call. ``model``: what ``predicted_us`` and ``floor_us`` are a model of. ``term``: of the kernel in front
    that computes this rank's terms, where the one that sums them does not.

    Examples:
        >>> plan = comm.explain(4)
        >>> (plan.algorithm, plan.bytes_sent)
        ('reference', 0)
    """

    algorithm: Algorithm
    why: str
    shape: LaunchShape | None
    bytes_sent: int
    predicted_us: float
    floor_us: float
    rows: int = 0
    launches: int = 1
    workspace_bytes: int = 0
    measured_us: float | None = None
    table: str = "none"
    model: str = "two H200 without the format"
    transport: str = "peer"
    term: Plan | None = None

    @property
    def modeled(self) -> bool:
        """Whether a model says how long it takes."""
        return self.algorithm in ALGORITHMS or (self.algorithm != "reference" and self.predicted_us > 0)

    def __str__(self) -> str:
        """For people: a line for each fact, at most 80 columns wide."""
        measured, modeled = "-" if self.measured_us is None else f"{self.measured_us:.2f} us", self.modeled
        facts = {
            "algorithm": self.algorithm,
            "why": self.why,
            "transport": self.transport,
            "shape": "-" if self.shape is None else str(self.shape),
            **({} if self.term is None else {"terms": f"a kernel in front, {self.term.shape}"}),
            "launches": f"{self.launches}, of up to {self.rows} rows" if self.shape is not None else "-",
            "predicted": "-" if not modeled else f"{self.predicted_us:.2f} us, by a model of {self.model}",
            "floor": "-" if not modeled else f"{self.floor_us:.2f} us, likewise",
            "measured": measured,
            "table": self.table,
            "bytes sent": f"at most {self.bytes_sent:,} from each rank",
            "workspace": f"{self.workspace_bytes:,} bytes in use",
        }
        width = max(map(len, facts)) + 2
        lines = (textwrap.fill(text, 80, initial_indent=name.ljust(width), subsequent_indent=" " * width) for name, text in facts.items())
        return "\n".join(lines)


@dataclass(frozen=True)
class Kernel:
    """One kernel of a planned call: the part of the request that it does, its launch shape, and what is compiled."""

    request: Request
    shape: LaunchShape
    variant: Variant


def make_plan(topology: Topology, request: Request) -> Plan:
    """The plan of one call."""
    world, row = topology.world_size, request.hidden_size * request.dtype.itemsize
    tokens, rows = request.tokens, request.tokens
    algorithm: Algorithm
    sent, busiest, candidate, measured = 0, None, None, None
    if world == 1 or tokens == 0 or request.operation == "finish":
        algorithm = "local"
        why = "a world of one communicates nothing" if world == 1 else "no tokens" if tokens == 0 else "nothing is summed"
    elif request.operation == "all_reduce":
        candidate, why = _choose(topology, request)
        algorithm, measured = candidate.algorithm, _measured(topology, request, candidate)
        width = memory_of("two_shot", world, request.hidden_size, request.dtype, None, values=False).slot
        sent = (world - 1) * tokens * (row if ALGORITHMS[algorithm].one_hop else 2 * width)
    else:
        rows = largest_block(tokens, world, request.rows)
        wire = wire_bytes(request.hidden_size, request.dtype, request.quant, sends_values(request))
        if request.operation == "all_gather":
            algorithm, why, term, finished = "all_gather", "rows go to every rank as they are", 0, wire
        else:
            algorithm, why, term = "sharded", "rows have owners who add and finish them", row
            finished = wire if request.operation == "sharded" else 0
        sent, busiest = _owners_bytes(request, world, term, finished)
        if request.rows is not None:
            why += f"; {min(request.rows)} to {rows} rows each"
    launches, used, least = 1, 0, rows
    if algorithm != "local":
        memory = launch_memory(topology, request, algorithm)
        if not ALGORITHMS[algorithm].one_hop:
            fits = max(1, (workspace_extent(topology).generation // (world - 1) - memory.flags) // (memory.slot + memory.gather))
            total, rows = rows, -(-rows // -(-rows // fits))
            launches = -(-total // rows)
            least = total - (launches - 1) * rows
        if launches > 1:
            why += f"; {launches} launches of {rows} rows, as many as the workspace holds"
        used = memory.generation(world, rows)
    predicted, floor = cost.predict(algorithm, world, sent if busiest is None else busiest)
    table = "none" if topology.table is None else topology.table.about(request.hidden_size, request.operation)
    if topology.architecture is None:
        why = f"a CPU group computes the reference; on GPUs: {algorithm}, {why}"
        return Plan("reference", why, None, sent, predicted, floor, table=table)
    if not topology.has_clusters:
        why += f"; {topology.architecture} has no clusters: one CTA per row, no PDL"
    threads = candidate.cta_threads if candidate is not None else None
    front = None
    if isinstance(request.prologue, PrologueForm) and request.adds_rows and algorithm != "local" and tokens > MOST_TOKENS_OF_EXPERTS:
        front = make_plan(_alone(topology), sum_alone(request))
        why += "; a kernel in front computes the terms"
    # All launches have the grid of the last one, which may be shorter: every cluster has a row in each of them.
    experts = request.adds_rows and front is None
    width, quant = request.hidden_size, request.quant
    kind = {"experts": experts, "branch": request.branch, "alone": request.sums_alone}
    shape = launch_shape(topology, least, width, quant, algorithm, cta_threads=threads, **kind)
    return Plan(algorithm, why, shape, sent, predicted, floor, rows, launches, used, measured, table, term=front)


def _alone(topology: Topology) -> Topology:
    """Of a kernel that computes this rank's terms: it has the GPU to itself, as it does not start before the kernel in front has ended
    where other ranks' kernels share the GPU.
    """
    return replace(topology, world_size=1, ranks_per_gpu=1)


def _owners_bytes(request: Request, world: int, term: int, finished: int) -> tuple[int, int]:
    """Bytes that leave the rank that sends most, and those on the busiest way from or to a rank. ``term`` and ``finished``: bytes of a row
    on its way to its owner and from it.
    """
    if request.rows is None:
        sent = (world - 1) * largest_block(request.tokens, world) * (term + finished)
        return sent, sent
    shares = [(own * (world - 1), request.tokens - own) for own in request.rows]
    sent = max(others * term + own * finished for own, others in shares)
    return sent, max(sent, *(own * term + others * finished for own, others in shares))


def sends_values(request: Request) -> bool:
    """Whether rows travel in the communicator's dtype on their way from their owners."""
    wanted = request.wanted
    return wanted.norm or (request.operation == "all_gather" and (wanted.reduced or wanted.residual))


def launch_memory(topology: Topology, request: Request, algorithm: str) -> Memory:
    """What a row of ``request`` needs in the workspace."""
    gathers = request.operation != "reduce_scatter"
    memory = memory_of(algorithm, topology.world_size, request.hidden_size, request.dtype, request.quant, values=sends_values(request))
    return memory if gathers else replace(memory, gather=0, wire=0)


def one_shot_tokens(topology: Topology, hidden_size: int) -> int:
    """The largest number of tokens, up to the capacity, for which an ``all_reduce`` is planned as one-shot."""
    plain = Wanted.of(has_residual=True, has_norm=False, quant=None, keep_norm=False)
    least, most = 0, topology.max_tokens
    while least < most:
        middle = (least + most + 1) // 2
        request = Request(middle, hidden_size, topology.dtype, True, False, False, None, plain)
        one_shot = _choose(topology, request)[0].algorithm == "one_shot"
        least, most = (middle, most) if one_shot else (least, middle - 1)
    return least


def _choose(topology: Topology, request: Request) -> tuple[Candidate, str]:
    """One-shot or two-shot, in which shape: as asked for, as measured, or as the model expects."""
    message = request.tokens * request.hidden_size * request.dtype.itemsize
    world, asked = topology.world_size, topology.overrides
    fits = (world - 1) * message <= workspace_extent(topology).one_shot
    if asked.algorithm is not None and (fits or not ALGORITHMS[asked.algorithm].one_hop):
        return Candidate(asked.algorithm, asked.cta_threads), "asked for"
    entry = _entry(topology, request)
    if entry is not None:
        why = f"measured: one-shot is faster up to {entry.one_shot_tokens} tokens" if fits else "larger than the one-shot slots"
        return entry.candidate(request.tokens, fits=fits), why
    one, _ = cost.predict("one_shot", world, (world - 1) * message)
    two, _ = cost.predict("two_shot", world, 2 * (world - 1) * -(-message // world))
    if fits and one <= two:
        return Candidate("one_shot", asked.cta_threads), f"one-shot: {one:.1f} us against {two:.1f} us by two-shot"
    why = f"two-shot, fewer bytes: {two:.1f} us against {one:.1f} us by one-shot" if fits else "larger than the one-shot slots"
    return Candidate("two_shot", asked.cta_threads), why


def _entry(topology: Topology, request: Request) -> Entry | None:
    """What the table says of such calls."""
    return None if topology.table is None else topology.table.entry(request.hidden_size, request.operation)


def _measured(topology: Topology, request: Request, candidate: Candidate) -> float | None:
    """The time in the table, if this is the call that was measured: residual and norm, no quantization."""
    entry = _entry(topology, request)
    plain = request.residual and request.norm and not request.wide_weight and request.quant is None and request.prologue is None
    plain = plain and not request.branch
    return entry.us(candidate, request.tokens) if entry is not None and plain else None


def max_hidden_size(topology: Topology) -> int | None:
    """Of a communicator; ``None`` where nothing limits it."""
    if topology.architecture is None:
        return None
    return MAX_HIDDEN_SIZE if topology.has_clusters else MAX_HIDDEN_SIZE_OF_A_CTA


def check_width(topology: Topology, hidden_size: int) -> None:
    """Raise :class:`CapacityError` where no communicator can be made for rows of ``hidden_size``."""
    largest = max_hidden_size(topology)
    if largest is not None and hidden_size > largest:
        raise CapacityError(f"hidden size {hidden_size} is too large for {topology.architecture}", hint=f"the largest is {largest}")


def launch_shape(
    topology: Topology,
    tokens: int,
    hidden_size: int,
    quant: Quant | None,
    algorithm: str = "one_shot",
    *,
    cta_threads: int | None = None,
    experts: bool = False,
    branch: bool = False,
    alone: bool = False,
) -> LaunchShape:
    """Threads, vectors and clusters for ``tokens`` rows of this width.

    With clusters a thread holds one vector and a row is spread over up to 8 CTAs: the fewest cycles between the first load and the
    last store, and at large sizes the most CTAs whose waits overlap. Where few SMs may be used, a row takes as few
    CTAs as it can; ``cta_threads`` is the most threads that a CTA may then have. In one CTA (no clusters, or groups that only one
    CTA can reduce) threads hold several vectors. Local calls of more rows than SMs (of experts: than half of them) are bound by memory: a
    CTA does a row, with two (or four) vectors a thread, and asks for its next row before it finishes this one.
    """
    vectors_in_row = hidden_size // 8
    limit = topology.overrides.max_sms
    many = topology.multiprocessors // 2 if experts else topology.multiprocessors
    streams = algorithm == "local" and tokens > many and hidden_size <= MAX_HIDDEN_SIZE_OF_A_CTA
    if topology.has_clusters and not QuantVariant.of(quant).needs_one_cta and streams:
        most = resident_threads(topology, algorithm, vectors=2, experts=experts or branch, alone=alone)
        cluster, vectors = 1, 2 if vectors_in_row <= 2 * most else 4
        threads = round_up(-(-vectors_in_row // vectors), 32)
    elif topology.has_clusters and not QuantVariant.of(quant).needs_one_cta:
        threads = 64 if hidden_size <= 2048 else 128
        wide = cta_threads or topology.overrides.cta_threads or (MAX_THREADS if limit else 0)
        if wide:
            wide = min(wide, widest_cta(topology, algorithm, experts=experts, branch=branch))
            threads = round_up(-(-vectors_in_row // -(-vectors_in_row // wide)), 32)
        elif vectors_in_row <= 64:
            threads = round_up(vectors_in_row, 32)
        cluster = -(-vectors_in_row // threads)
        if cluster > MAX_CLUSTER:
            cluster, threads = MAX_CLUSTER, round_up(-(-vectors_in_row // MAX_CLUSTER), 32)
        if hidden_size > MAX_HIDDEN_SIZE:
            raise FormatError(f"hidden size {hidden_size} is too large", hint=f"the largest is {MAX_HIDDEN_SIZE}")
        vectors = 1
    else:
        cluster = 1
        vectors = 1 << (-(-vectors_in_row // MAX_THREADS_OF_VECTORS) - 1).bit_length()
        if hidden_size > MAX_HIDDEN_SIZE_OF_A_CTA:
            hint = f"the largest is {MAX_HIDDEN_SIZE_OF_A_CTA}"
            raise FormatError(f"hidden size {hidden_size} is too large for one CTA per row", hint=hint)
        threads = round_up(-(-vectors_in_row // vectors), 32)
    clusters = max(tokens, 1)
    resident = _resident_clusters(topology, LaunchShape(threads, vectors, cluster, clusters), algorithm, experts=experts, alone=alone)
    if limit:
        resident = max(1, min(resident, limit // cluster))
    if clusters > resident:
        # Where rows have owners, all that can be resident; else the same number of rows for all, as far as it goes.
        clusters = resident if ALGORITHMS[algorithm].owned else -(-tokens // -(-tokens // resident))
    return LaunchShape(threads, vectors, cluster, clusters)


def _resident_clusters(topology: Topology, shape: LaunchShape, algorithm: str, *, experts: bool, alone: bool) -> int:
    """Clusters that are expected to be on the GPU together: more would cost time (docs/design.md)."""
    ctas = ctas_per_multiprocessor(topology, shape, algorithm, experts=experts, alone=alone)
    if topology.fitting is not None:
        clusters = topology.fitting[ctas - 1][shape.cluster - 1]
    else:
        # Clusters do not fill a GPC, which costs about a tenth.
        clusters = topology.multiprocessors * ctas * (9 if shape.cluster > 1 else 10) // 10 // shape.cluster
    if topology.ranks_per_gpu > 1:
        clusters //= 2 * topology.ranks_per_gpu  # this kernel and, where it starts early, the next of every rank are resident together
    if algorithm != "local":  # which waits for nobody
        clusters //= topology.concurrent  # the kernels of every communicator that may wait at a time are resident together
    return max(1, min(clusters, MAX_CTAS // shape.cluster))


def resident_threads(topology: Topology, algorithm: str, *, vectors: int = 1, experts: bool = False, alone: bool = False) -> int:
    """Threads that an SM can hold, by the registers that each needs: a thread holds a vector of every rank.

    ``experts``: terms are computed, from four rows at a time. ``alone``: nothing is made of the sum (:attr:`Request.sums_alone`).
    """
    world, narrow, streams = topology.world_size, topology.dtype.itemsize == 2, ALGORITHMS[algorithm].streams
    if algorithm == "local" and vectors in (2, 4) and topology.has_clusters:
        return (448 if experts and not alone else 896) // (1 if narrow else 2)
    if vectors > 1 or (streams and world > 4 and not narrow):
        return 256
    if narrow and world <= 2:
        return 1024 if not experts else 640 if streams else 896
    if narrow and world <= 4 and not streams:
        return 768
    if not narrow and streams and world >= 4:
        return 384
    return 512 if world <= 6 else 384


def widest_cta(topology: Topology, algorithm: str, *, experts: bool = False, branch: bool = False) -> int:
    """Threads of the widest CTA in which nothing spills: alone on an SM, and no compiler could give its threads more."""
    threads = min(resident_threads(topology, algorithm, experts=experts), 896 if branch else MAX_THREADS)
    return min(threads, 384) if topology.world_size > 4 and ALGORITHMS[algorithm].streams else threads


def ctas_per_multiprocessor(topology: Topology, shape: LaunchShape, algorithm: str, *, experts: bool = False, alone: bool = False) -> int:
    """CTAs that an SM is sure to hold: launch bounds ask for no more registers than that leaves to each thread.

    Few registers let the next kernel start beside this one and more rows be on their way at a time (docs/speed.md), as long as
    nothing spills. Where something does, the compiler is asked again with fewer CTAs (:func:`collogue.gpu.jit.compile_variant`).
    """
    threads = resident_threads(topology, algorithm, vectors=shape.vectors, experts=experts, alone=alone)
    # 16: as many CTAs as every architecture holds.
    return max(1, min(16, threads // shape.threads))


def make_kernels(topology: Topology, request: Request, plan: Plan) -> tuple[Kernel, ...]:
    """The kernels of ``plan``, which was made for ``request`` on GPUs, in their order: one, or in an all-gather one for values and one for
    codes. Where the terms have a kernel in front, that one and what sums them.
    """
    assert plan.shape is not None
    if plan.term is not None:
        before = make_kernels(_alone(topology), sum_alone(request), plan.term)
        return (*before, *make_kernels(topology, replace(request, prologue=None), replace(plan, term=None)))
    if plan.algorithm != "all_gather":
        return (Kernel(request, plan.shape, make_variant(topology, request, plan.shape, plan.algorithm)),)
    parts = []
    if sends_values(request):
        parts.append(replace(request, quant=None, wanted=replace(request.wanted, norm=True, codes=False, scales=False)))
    if request.quant is not None:
        parts.append(replace(request, wanted=replace(request.wanted, norm=False)))
    shapes = [launch_shape(topology, plan.rows, part.hidden_size, part.quant, "all_gather") for part in parts]
    return tuple(Kernel(part, shape, make_variant(topology, part, shape, "all_gather")) for part, shape in zip(parts, shapes, strict=True))


def make_variant(topology: Topology, request: Request, shape: LaunchShape, algorithm: str) -> Variant:
    """The kernel that runs ``request`` in ``shape``."""
    owned = ALGORITHMS[algorithm].owned
    rows = largest_block(request.tokens, topology.world_size, request.rows) if owned else request.tokens
    loop = rows > shape.clusters
    return Variant(
        kernel=algorithm,
        world=1 if algorithm == "local" else topology.world_size,
        dtype=request.dtype,
        weight_dtype=torch.float32 if request.wide_weight and request.norm else request.dtype,
        residual=request.residual,
        norm=request.norm,
        keep_norm=request.wanted.norm,
        quant=QuantVariant.of(request.quant),
        threads=shape.threads,
        vectors=shape.vectors,
        clustered=shape.cluster > 1,
        blocks=block_class(request.hidden_size),
        loop=loop,
        ctas_per_multiprocessor=ctas_per_multiprocessor(topology, shape, algorithm, experts=request.adds_rows, alone=request.sums_alone),
        first_poll=FIRST_POLL_CYCLES if ALGORITHMS[algorithm].one_hop else 0,
        ahead=int(
            loop
            and (shape.vectors <= 2 if algorithm == "local" else algorithm == "two_shot" and shape.threads > MAX_THREADS_OF_ROWS_IN_TURN)
        ),
        stream=request.wanted.reduced or request.wanted.residual,
        gather=request.operation == "sharded",
        late_weight=request.late_weight and request.norm and shape.vectors <= 2,  # more are read in their turn
        launch_late=topology.concurrent > 1 and algorithm != "local",  # which waits for nobody
        source_type=source_type(request.prologue, request.dtype),
        branch=request.branch,
        branch_weight_dtype=torch.float32 if request.branch and request.wide_branch else None,
        uneven=owned and request.rows is not None,
    )

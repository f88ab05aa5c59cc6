"""``collogue bench --virtual``: ranks that are threads of one process on one GPU, Collogue and FlashInfer in turn.

A process for each number of ranks. What would not fit on the GPU together is found before any rank runs, as FlashInfer's kernels would
wait forever, and is listed.
"""

from __future__ import annotations

import gc
import textwrap
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from importlib.util import find_spec
from itertools import product
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from collogue.communicator import Communicator
from collogue.errors import PlatformError
from collogue.gpu import jit
from collogue.group import check_gpus
from collogue.planning.architecture import architecture_of
from collogue.planning.plan import Plan, make_kernels, make_plan
from collogue.planning.residency import Fitting, fitting
from collogue.planning.topology import Overrides, Topology
from collogue.planning.variant import Variant
from collogue.testing import VirtualGroup, environment, run_virtual
from collogue.testing.processes import RanksFailed, run_processes
from collogue.tools.bench import baselines, flashinfer
from collogue.tools.bench.cases import FLASHINFER, FLASHINFER_EARLY, FLASHINFER_WAYS
from collogue.tools.bench.fused import FusedCall
from collogue.tools.bench.gate import time_gated
from collogue.tools.bench.names import Row
from collogue.tools.bench.rank import result
from collogue.tools.bench.timing import Chain, Subject, measure
from collogue.tools.check.case import Case
from collogue.tools.check.kernels import request_of, topology_on
from collogue.tools.check.rank import Answers, Given
from collogue.tools.record import circumstances, package_version

T = TypeVar("T")

WORLDS, HIDDEN_SIZES, TOKENS = (2, 4, 8), (2880, 5120, 7168, 12800), (1, 2, 4, 8, 16, 32, 48)
REPLAYS = 9
#: Seconds without a word from the process of the ranks, after which it is ended; and that a rank waits for the others.
SILENCE, PATIENCE = 60.0, 50.0
#: The plan's call, and one-shot where the plan takes two-shot, because of a wire that is not here.
COLLOGUE, ONE_SHOT_ALSO = "collogue", "collogue one-shot"
OWN = (COLLOGUE, ONE_SHOT_ALSO)
NO_ROOM = "the ranks do not fit on the GPU together"
_OVERRIDES = {COLLOGUE: Overrides(), ONE_SHOT_ALSO: Overrides(algorithm="one_shot")}
#: Columns of the table: what is fused.
KINDS = ("norm", "FP8", "sum")
MEANING = (
    "Ranks are threads of one process on one GPU, a stream each. Both libraries' calls lie in CUDA graphs that all ranks start together. "
    "The times show what the kernels' instructions and this GPU's memory take while the ranks share its SMs. They show no NVLink: no hop "
    "and no bandwidth between GPUs. Compare the two libraries in one cell, not these times with those of ranks on GPUs of their own. "
    "Each library stands with its fastest way: one-shot or two-shot."
)
METHOD = (
    "Microseconds per call: (CUDA graph of 100 back-to-back calls - graph of 20) / 80; median over replays, maximum over ranks. The ways "
    "of a cell are replayed in turn, and before each replay the GPU is idle. bfloat16. Collogue's outputs equal the reference bit for bit "
    "before timing and after the timed graph. FlashInfer adds in float32; it gives the exact residual, and a norm or decoded values within "
    "bounds, of small integers before it is timed on zeros. PDL is on for both or off for both, as the rows say."
)


@dataclass(frozen=True)
class Cell:
    """A call and the ways in which it is timed. ``plans``: of Collogue's ways."""

    case: Case
    plans: Mapping[str, Plan]
    peers: tuple[str, ...]
    pdl: bool

    def whole(self, way: str) -> bool:
        """Whether Collogue's grid has a cluster for each row, as on a GPU of its own."""
        shape = self.plans[way].shape
        return shape is None or shape.clusters >= self.case.tokens

    def __str__(self) -> str:
        return f"{self.case.world_size} ranks, H={self.case.hidden_size} T={self.case.tokens} {_kind_of(_named(self.case))}"


def cases(world_size: int, hidden_sizes: Iterable[int], tokens: Iterable[int]) -> list[Case]:
    """Norm, FP8 static and the sum alone of every shape."""
    norms = [Case(t, h, world_size=world_size, keep_norm=False) for h, t in product(hidden_sizes, tokens)]
    return [case for norm in norms for case in (norm, replace(norm, format="fp8_static"), baselines.alone(norm))]


def topologies(every: Sequence[Case], *, architecture: str, multiprocessors: int, fits: Fitting) -> dict[int, Topology]:
    """By hidden size, what the ranks of a communicator for ``every`` case of that size agree on."""
    found = {}
    for width in dict.fromkeys(case.hidden_size for case in every):
        mine = [case for case in every if case.hidden_size == width]
        found[width] = replace(topology_on(mine, architecture=architecture, multiprocessors=multiprocessors, gpus=1), fitting=fits)
    return found


def split(every: Sequence[Case], topology: Mapping[int, Topology], *, peer: bool) -> tuple[list[Cell], list[Row]]:
    """The cells that can be timed on one GPU, and rows of what is left out and why. ``peer``: beside FlashInfer.

    A cell whose ranks do not fit on the GPU in FlashInfer's one-shot is left out whole.
    """
    cells: list[Cell] = []
    left: list[Row] = []
    for case in every:
        here = topology[case.hidden_size]
        assert here.fitting is not None
        asked = [way for way in FLASHINFER_WAYS if peer and flashinfer.has(way, case)]
        if not here.starts_early:  # then nothing is launched early
            asked = [way for way in asked if way != FLASHINFER_EARLY]
        sms, pdl = here.multiprocessors, here.starts_early
        ways = [way for way in asked if flashinfer.fits(way, case, sms, here.fitting, pdl=pdl)]
        left += [{"what": way, **_named(case), "why": NO_ROOM} for way in asked if way not in ways]
        if FLASHINFER in ways or not asked:
            cells.append(Cell(case, plans(case, here), tuple(ways), pdl))
    return cells, left


def plans(case: Case, topology: Topology) -> dict[str, Plan]:
    """Collogue's ways of a case, and what they do."""
    found = {COLLOGUE: make_plan(topology, request_of(case))}
    if found[COLLOGUE].algorithm == "two_shot":
        found[ONE_SHOT_ALSO] = make_plan(replace(topology, overrides=_OVERRIDES[ONE_SHOT_ALSO]), request_of(case))
    return found


def variants(cells: Sequence[Cell], topology: Mapping[int, Topology]) -> list[Variant]:
    """The kernels of Collogue's ways of all cells."""
    found: dict[Variant, None] = {}
    for cell in cells:
        request, here = request_of(cell.case), topology[cell.case.hidden_size]
        for way, plan in cell.plans.items():
            made = make_kernels(replace(here, overrides=_OVERRIDES[way]), request, plan)
            found.update(dict.fromkeys(kernel.variant for kernel in made))
    return list(found)


def _named(case: Case) -> Row:
    names = ("world_size", "tokens", "hidden_size", "dtype", "format", "residual", "norm", "keep_norm")
    return {name: getattr(case, name) for name in names}


# ---- ranks


class Settled:
    """A subject on a rank that shares its GPU: nothing of any rank runs before or behind the calls of its gates."""

    def __init__(self, subject: Subject, group: VirtualGroup) -> None:
        self._subject, self._group = subject, group
        self.call, self.repeatable = subject.call, subject.repeatable

    def gate(self, run: Callable[[], None]) -> str | None:
        def alone() -> None:
            self._group.settle()
            try:
                run()
            finally:
                self._group.settle()

        return self._subject.gate(alone)


def in_turn(group: VirtualGroup, step: Callable[[], T]) -> T:
    """``step()`` of one rank at a time, between which nothing runs: a capture waits for the GPU."""
    results = []
    for turn in range(group.size):
        if turn == group.rank:
            results.append(step())
        group.settle()
    return results[0]


def capture(group: VirtualGroup, call: Callable[[int], object]) -> Chain:
    """The graphs of ``call`` on this rank."""
    return in_turn(group, lambda: Chain(call, torch.cuda.current_stream(group.device)))


def load(group: VirtualGroup, call: Callable[[int], object]) -> None:
    """Capture a call that is never run: what another library loads and asks at its first call would wait for a GPU where ranks wait."""

    def one() -> None:
        with torch.cuda.graph(torch.cuda.CUDAGraph(), stream=torch.cuda.current_stream(group.device), capture_error_mode="thread_local"):
            call(0)

    in_turn(group, one)


def time_cells(group: VirtualGroup, cells: Sequence[Cell], replays: int, answers: Answers, tell: Callable[[str], None]) -> list[Row]:
    """Rows of all ways of all cells, the same on every rank. The cells of a hidden size stand together."""
    rows: list[Row] = []
    for width in dict.fromkeys(cell.case.hidden_size for cell in cells):
        mine = [cell for cell in cells if cell.case.hidden_size == width]
        most = max(cell.case.tokens for cell in mine)
        shape: dict[str, Any] = {"max_tokens": most, "hidden_size": width, "table": False}
        comms = {way: Communicator(group, **shape, **vars(_OVERRIDES[way])) for way in OWN}
        peer = flashinfer.FlashInfer(group, most * width, pdl=mine[0].pdl)
        with torch.inference_mode():
            for cell in mine:
                tell(str(cell))
                rows += _time_cell(group, cell, comms, peer, replays, answers)
        group.settle()
        peer.close()
        for comm in comms.values():
            comm.close()
    return rows


def _time_cell(
    group: VirtualGroup, cell: Cell, comms: Mapping[str, Communicator], peer: flashinfer.FlashInfer, replays: int, answers: Answers
) -> list[Row]:
    case = cell.case
    for way in cell.plans:
        Given.of(case, group.rank, group.device, answers).prepare(comms[way])

    def make(way: str) -> Subject:
        if way in cell.plans:
            return Settled(FusedCall(comms[way], case, answers), group)
        subject = baselines.subject(peer, way, case, group.rank, group.device)
        load(group, subject.call)
        return Settled(subject, group)

    group.settle()
    latencies, errors = time_gated(
        group,
        {way: partial(make, way) for way in (*cell.plans, *cell.peers)},
        capture=partial(capture, group),
        measure=lambda chains: measure(chains, replays, group.settle),
    )
    group.settle()
    rows = []
    for way in (*cell.plans, *cell.peers):
        row = {"what": way, "section": "virtual", **_named(case), "pdl": cell.pdl}
        if way in cell.plans:
            row |= {"algorithm": cell.plans[way].algorithm, "whole": cell.whole(way)}
        rows.append(row | result(latencies.get(way), errors.get(way), replays))
    return rows


def process(
    group: dist.ProcessGroup, tell: Callable[[str], None], world_size: int, hidden_sizes: Sequence[int], tokens: Sequence[int], replays: int
) -> dict[str, Any]:
    """What the process of ``world_size`` virtual ranks does: compile, find out what fits, time. ``group``: of one process."""
    device = torch.device("cuda", torch.cuda.current_device())
    properties = torch.cuda.get_device_properties(device)
    fits = fitting(device)
    if fits is None:
        raise PlatformError("the driver does not say how many clusters fit on the GPU", hint="use a GPU of Hopper or later")
    peer = find_spec("flashinfer") is not None
    every = cases(world_size, hidden_sizes, tokens)
    architecture = architecture_of((properties.major, properties.minor))
    topology = topologies(every, architecture=architecture, multiprocessors=properties.multi_processor_count, fits=fits)
    cells, left = split(every, topology, peer=peer)
    tell(f"{world_size} ranks: {len(cells)} of {len(every)} cells fit")
    with ThreadPoolExecutor(1) as pool:
        built = pool.submit(jit.build, variants(cells, topology), architecture)
        if peer:
            flashinfer.load(tell)
        built.result()
    gc.disable()  # not in a capture
    answers = Answers()

    def rank(mine: VirtualGroup) -> list[Row]:
        return time_cells(mine, cells, replays, answers, tell if mine.rank == 0 else lambda text: None)

    return {"cases": run_virtual(world_size, rank, device=device, timeout=PATIENCE)[0], "left_out": left}


# ---- the run


def run(
    world_size: Sequence[int] = WORLDS,
    *,
    tokens: Sequence[int] | None = None,
    hidden_size: Sequence[int] | None = None,
    replays: int = REPLAYS,
    started: Callable[[str], None] = lambda name: None,
    commit: str | None = None,
    partly: Callable[[dict[str, Any]], None] = lambda data: None,
) -> dict[str, Any]:
    """Measure; the results as data.

    Args:
        world_size: numbers of ranks, of 2, 4 and 8; a process for each.
        tokens, hidden_size: of the cells; default :data:`TOKENS` and :data:`HIDDEN_SIZES`.
        replays: of each graph.
        started: hears of each cell.
        commit: recorded; default: what git says.
        partly: gets the results so far after each number of ranks.
    Raises:
        PlatformError: no GPU, or one without clusters.
    """
    environment.set_defaults()
    check_gpus()
    data: dict[str, Any] = {
        "benchmark": "virtual",
        "passed": False,
        **circumstances(commit),
        "method": METHOD,
        "meaning": MEANING,
        "baselines": {"flashinfer": package_version("flashinfer-python")},
        "cases": [],
        "left_out": [],
        "problems": [],
    }
    for world in world_size:
        shape = (world, tuple(hidden_size or HIDDEN_SIZES), tuple(tokens or TOKENS), replays)
        try:
            (found,) = run_processes(1, process, *shape, device="cuda", silence=SILENCE, heard=lambda rank, text: started(text))
        except RanksFailed as error:
            data["problems"].append(f"{world} ranks: {error}")
            continue
        data["cases"] += found["cases"]
        data["left_out"] += found["left_out"]
        partly(data)
    own = [row for row in data["cases"] if row["what"] in OWN]
    data["passed"] = bool(own) and not data["problems"] and all(row["error"] is None for row in own)
    return data


# ---- tables


def ratios(data: Mapping[str, Any]) -> list[Row]:
    """Of each cell in which both have a time: each library's fastest way, and the ratio, FlashInfer over Collogue."""
    found = []
    for key, ways in _by_cell(data["cases"]).items():
        own, peer = _fastest(ways, own=True), _fastest(ways, own=False)
        if own is not None and peer is not None:
            found.append({"cell": key, "own": own, "peer": peer, "ratio": peer["us"] / own["us"]})
    return found


def _fastest(ways: Mapping[str, Row], *, own: bool) -> Row | None:
    timed = [row for what, row in ways.items() if (what in OWN) == own and row["us"] is not None]
    return min(timed, key=lambda row: float(row["us"]), default=None)


def _by_cell(rows: Iterable[Row]) -> dict[tuple[int, int, int, str], dict[str, Row]]:
    """Rows by way, by ranks, hidden size, tokens and kind."""
    found: dict[tuple[int, int, int, str], dict[str, Row]] = {}
    for row in rows:
        found.setdefault((row["world_size"], row["hidden_size"], row["tokens"], _kind_of(row)), {})[row["what"]] = row
    return found


def _kind_of(row: Row) -> str:
    return "sum" if not row["norm"] else "norm" if row["format"] == "none" else "FP8"


def text(data: Mapping[str, Any]) -> str:
    """What was measured and what it means, at most 80 columns wide but for errors."""
    lines = textwrap.wrap(data["meaning"], 80)
    version = data["baselines"]["flashinfer"]
    if version is None:
        lines += ["", "FlashInfer is not installed: Collogue alone. See docs/guides/offline.md."]
    cells = _by_cell(data["cases"])
    for world in dict.fromkeys(key[0] for key in cells):
        pdl = next(row["pdl"] for row in data["cases"] if row["world_size"] == world)
        lines += ["", f"{world} ranks, PDL {'on' if pdl else 'off'} for both: us per call, FlashInfer {version or '-'} (FI), FI / ours"]
        lines.append(("    H   T " + "".join(f"  {kind:>7} {'FI':>6} {'ratio':>6}" for kind in KINDS)).rstrip())
        for shape in dict.fromkeys(key[1:3] for key in cells if key[0] == world):
            parts = (_cell(cells.get((world, *shape, kind), {})) for kind in KINDS)
            lines.append((f"{shape[0]:5} {shape[1]:3} " + "".join(parts)).rstrip())
    return "\n".join([*lines, "", *_summary(data)]) + "\n"


def _cell(ways: Mapping[str, Row]) -> str:
    """Both times and the ratio; a star: Collogue's grid does not have a cluster for each row."""
    own, peer = _fastest(ways, own=True), _fastest(ways, own=False)
    us = "-" if own is None else f"{own['us']:.2f}" + "*" * (not own["whole"])
    ratio = "-" if own is None or peer is None else f"{peer['us'] / own['us']:.2f}"
    return f"  {us:>7} {'-' if peer is None else format(peer['us'], '.2f'):>6} {ratio:>6}"


def _summary(data: Mapping[str, Any]) -> list[str]:
    """The least ratios, what is left out, and what failed."""
    compared = ratios(data)
    lines = []
    for title, kinds in (("norm and FP8", ("norm", "FP8")), ("sum", ("sum",))):
        mine = [row for row in compared if row["cell"][3] in kinds]
        lines += _least(f"{title}, {len(mine)} cells", mine)
        whole = [row for row in mine if row["own"]["whole"]]
        if len(whole) < len(mine):
            lines += _least(f"  {len(whole)} without *", whole)
    if any(not row.get("whole", True) for row in data["cases"]):
        lines.append("*: more rows than clusters that fit beside the other ranks'; some do several")
    shapes: dict[tuple[str, int, int], set[int]] = {}
    for row in data["left_out"]:
        shapes.setdefault((row["what"], row["world_size"], row["hidden_size"]), set()).add(row["tokens"])
    lines += [f"left out, {NO_ROOM}:"] * bool(shapes)
    for (what, world, width), tokens in shapes.items():
        lines.append(f"  {what}, {world} ranks, H = {width}: T = {', '.join(map(str, sorted(tokens)))}")
    for row in (row for row in data["cases"] if row["error"] is not None):
        call = f"{row['what']} {_kind_of(row)} {row['world_size']} ranks T={row['tokens']} H={row['hidden_size']}"
        lines.append(f"NO NUMBER {call}: {row['error']}")
    return [*lines, *data["problems"]]


def _least(title: str, compared: Sequence[Row]) -> list[str]:
    if not compared:
        return []
    least = min(compared, key=lambda row: float(row["ratio"]))
    world, width, tokens, kind = least["cell"]
    return [f"{title}: least ratio {least['ratio']:.2f} ({world} ranks, H = {width}, T = {tokens}, {kind})"]

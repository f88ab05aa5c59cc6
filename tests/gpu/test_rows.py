"""Rows that ranks do not own evenly, on virtual ranks: every operation and format, graphs, lists that differ, bit for bit."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch

import collogue
from collogue import FP8PerToken, Output, PrologueForm, RMSNorm, reference
from collogue.contract.prologue import Prologue
from collogue.contract.quant import Quant, parse
from collogue.contract.spec import OWNING, Operation, owned_rows
from collogue.errors import MismatchedCall
from collogue.gpu import jit
from collogue.planning.architecture import architecture_of
from collogue.testing import VirtualGroup, run_virtual
from collogue.testing.compare import compare
from collogue.testing.covering import FORMATS
from collogue.testing.inputs import KINDS, make_inputs, make_partials, make_prologue
from collogue.tools.check.case import GLOBAL_SCALE, STATIC_SCALE
from collogue.tools.check.rank import poisoned

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU"), pytest.mark.timeout(300)]

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
COMBINE = PrologueForm("expert_combine", "float32", shared=True)
#: A communicator's capacity: all rows of the largest call on one rank are several launches of its workspace.
MOST, WIDEST = 4096, 7168


@dataclass(frozen=True)
class Case:
    """One call."""

    rows: tuple[int, ...]
    width: int = 1152
    dtype: torch.dtype = torch.bfloat16
    label: str = "none"
    operation: Operation = "sharded"
    kind: str = "normal"
    residual: bool = True
    norm: bool = True
    branch: bool = False
    form: PrologueForm | None = None

    @property
    def tokens(self) -> int:
        return sum(self.rows)

    @property
    def world(self) -> int:
        return len(self.rows)

    @property
    def quant(self) -> Quant | None:
        return parse(self.label, global_scale=GLOBAL_SCALE, static_scale=STATIC_SCALE)

    def epilogue(self, device: torch.device) -> dict[str, Any]:
        weight = make_inputs("normal", rank=0, tokens=1, hidden_size=self.width, dtype=self.dtype, device=device).weight
        epilogue: dict[str, Any] = {"norm": RMSNorm(weight) if self.norm else None, "quant": self.quant, "keep_norm": False}
        return {**epilogue, "branch_norm": RMSNorm(weight.float() + 0.5, eps=1e-5)} if self.branch else epilogue

    def terms(self, device: torch.device) -> list[torch.Tensor | Prologue]:
        shape: dict[str, Any] = {"tokens": self.tokens, "hidden_size": self.width, "dtype": self.dtype, "device": device}
        if self.form is None:
            return [*make_partials(self.kind, self.world, **shape)]
        return [make_prologue(self.form, self.kind, rank=rank, count=4, wild=True, **shape) for rank in range(self.world)]

    def stream(self, device: torch.device) -> torch.Tensor | None:
        if not self.residual:
            return None
        return make_inputs(self.kind, rank=0, tokens=self.tokens, hidden_size=self.width, dtype=self.dtype, device=device).residual


@dataclass
class Made:
    """Of one case, for all ranks."""

    terms: list[torch.Tensor | Prologue]
    stream: torch.Tensor | None
    epilogue: dict[str, Any]
    expected: list[Output]
    shards: list[Output]

    @classmethod
    def of(cls, case: Case, device: torch.device) -> Made:
        terms, stream, epilogue = case.terms(device), case.stream(device), case.epilogue(device)
        given = {**epilogue, "residual": stream, "rows": case.rows}
        if case.operation == "all_gather":
            shards = reference.reduce_scatter(terms, **given)
            return cls(terms, stream, epilogue, [reference.all_gather(shards, quant=case.quant, rows=case.rows)] * case.world, shards)
        by_rank = reference.sharded if case.operation == "sharded" else reference.reduce_scatter
        return cls(terms, stream, epilogue, by_rank(terms, **given), [])


def splits(world: int, most: int) -> list[tuple[int, ...]]:
    """All rows on one rank, none on one, one row, a stair, and one block that is far larger than the others."""
    return [
        tuple(most if rank == world // 2 else 0 for rank in range(world)),
        tuple(0 if rank == 0 else most // world for rank in range(world)),
        tuple(int(rank == world - 1) for rank in range(world)),
        tuple(range(world)),
        (most - world + 1, *[1] * (world - 1)),
    ]


def own_stream(comm: collogue.Communicator, case: Case, made: Made) -> torch.Tensor | None:
    """The rows of the residual that this rank owns."""
    own = owned_rows(case.tokens, case.world, comm.rank, case.rows)
    return None if made.stream is None else made.stream[own.start : own.stop].clone()


def call(comm: collogue.Communicator, case: Case, made: Made, residual: torch.Tensor | None, out: Output | None = None) -> Output:
    """This rank's call. Nothing but the call: what might wait for a GPU that other ranks' kernels wait on comes before."""
    if case.operation == "all_gather":
        return comm.all_gather(made.shards[comm.rank], quant=case.quant, rows=case.rows, out=out)
    given = {**made.epilogue, "residual": residual, "rows": case.rows, "out": out}
    if case.operation == "reduce_scatter":
        return comm.reduce_scatter(made.terms[comm.rank], **given)
    return comm.all_reduce(made.terms[comm.rank], sharded=True, **given)


def in_turn(group: VirtualGroup, action: Callable[[], object]) -> None:
    """What waits for a whole GPU, rank by rank while nothing runs."""
    for rank in range(group.size):
        group.settle()
        if rank == group.rank:
            action()
    group.settle()


def check(cases: list[Case], **options: Any) -> list[str]:
    """Make the calls in one communicator for each world and dtype: what differs."""
    found = []
    for world, dtype in sorted({(case.world, case.dtype) for case in cases}, key=str):
        mine, shared = [case for case in cases if (case.world, case.dtype) == (world, dtype)], {}

        def rank(group: VirtualGroup, mine: list[Case] = mine, shared: dict[Case, Made] = shared) -> list[str]:
            comm = collogue.Communicator(
                group, max_tokens=MOST, hidden_size=WIDEST, dtype=mine[0].dtype, timeout=20.0, table=False, **options
            )
            texts = []
            for case in mine:
                if group.rank == 0:
                    shared.clear()
                    shared[case] = Made.of(case, group.device)
                group.settle()
                made, shape = shared[case], {"hidden_size": case.width, "operation": case.operation, "rows": case.rows}
                asked = {**made.epilogue, "residual": case.residual, "prologue": case.form, **shape}
                if case.operation == "all_gather":
                    asked |= {"residual": True, "keep_norm": False, "norm": made.epilogue["norm"] if case.quant is None else None}
                    asked |= {"prologue": None, "branch_norm": None}
                comm.prepare(**asked)
                residual, spoiled = own_stream(comm, case, made), poisoned(made.expected[group.rank])
                for out in (None, spoiled):
                    group.settle()
                    result = call(comm, case, made, residual, out)
                    group.settle()
                    comm.check()
                    differences = compare(result, made.expected[group.rank])
                    texts += [f"{case}, rank {group.rank}: {d.count}, {d.first}" for d in differences.values() if d.count]
            group.settle()
            comm.close()
            return texts

        found += [text for texts in run_virtual(world, rank, device="cuda", timeout=120.0) for text in texts]
    return found


@pytest.mark.parametrize("world", range(2, 9))
def test_every_operation(world: int) -> None:
    cases = []
    for (i, operation), (j, rows) in itertools.product(enumerate(OWNING), enumerate(splits(world, 65))):
        n = i + j
        options: dict[str, Any] = {
            "residual": n % 3 > 0,
            "branch": operation != "all_gather" and n % 3 == 1,
            "kind": list(KINDS)[n % len(KINDS)],
        }
        form = COMBINE if operation != "all_gather" and n % 4 == 2 else None
        cases.append(Case(rows, (576, 7168, 2880)[n % 3], DTYPES[j % 3], ("none", "fp8_per_token")[n % 2], operation, form=form, **options))
    assert check(cases) == []


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_format(dtype: torch.dtype) -> None:
    """Each in one dtype."""
    labels = [label for i, label in enumerate(FORMATS) if i % 3 == DTYPES.index(dtype) or label == "none"]
    cases = []
    for i, label in enumerate(labels):
        quant = FORMATS[label]
        width = 1152 if quant is None or not quant.block or 1152 % quant.block == 0 else 2304
        rows = splits(2 + i % 3, 130)[i % 5]
        cases += [Case(rows, width, dtype, label, operation, norm=i % 4 > 0 or label == "none") for operation in OWNING]
    assert check(cases) == []


@pytest.mark.parametrize("world", [2, 8])
def test_large_calls(world: int) -> None:
    """Several launches where one rank owns all rows."""
    cases = [Case(rows, 7168, label=label, operation=o) for rows in splits(world, MOST)[::2] for o in OWNING for label in ("none", "nvfp4")]
    assert check(cases) == []


def test_few_multiprocessors() -> None:
    assert check([Case(rows, 7168, operation=o) for rows in splits(4, 64) for o in OWNING], max_sms=8) == []


def test_a_graph_keeps_its_list_and_other_lists_go_on_beside_it() -> None:
    """Two graphs with two lists, replayed in turn with an eager call of a third: one kernel, no bit changes."""
    lists = ((5, 0, 1), (0, 3, 3), (2, 2, 2))
    shared: list[Made] = []

    def rank(group: VirtualGroup) -> list[str]:
        comm = collogue.Communicator(group, max_tokens=16, hidden_size=1152, timeout=20.0, table=False)
        cases = [Case(rows, label="fp8_per_token", operation="reduce_scatter") for rows in lists]
        if group.rank == 0:
            shared.extend(Made.of(case, group.device) for case in cases)
        group.settle()
        for case, made in zip(cases, shared, strict=True):
            comm.prepare(rows=case.rows, operation=case.operation, hidden_size=1152, **made.epilogue)
        group.settle()
        streams = [own_stream(comm, case, made) for case, made in zip(cases, shared, strict=True)]
        captured: list[tuple[torch.cuda.CUDAGraph, Output]] = []

        def capture() -> None:
            for case, made, residual in zip(cases[:2], shared, streams, strict=False):
                asked = {**made.epilogue, "residual": True, "rows": case.rows, "operation": case.operation, "hidden_size": 1152}
                out, graph = comm.empty(**asked), torch.cuda.CUDAGraph()
                with torch.cuda.graph(graph, stream=torch.cuda.current_stream(), capture_error_mode="thread_local"):
                    call(comm, case, made, residual, out)
                captured.append((graph, out))

        in_turn(group, capture)
        texts = []
        for _ in range(3):
            results = []
            for graph, out in captured:
                graph.replay()
                results.append(out)
            results.append(call(comm, cases[2], shared[2], streams[2]))
            group.settle()
            for case, made, result in zip(cases, shared, results, strict=True):
                texts += [f"{case}: {d.first}" for d in compare(result, made.expected[group.rank]).values() if d.count]
        in_turn(group, lambda: [graph.reset() for graph, _ in captured])
        comm.close()
        return texts

    assert run_virtual(3, rank, device="cuda", timeout=60.0) == [[]] * 3


@pytest.mark.parametrize("operation", OWNING)
def test_lists_that_differ_are_told_with_both(operation: Operation) -> None:
    def rank(group: VirtualGroup) -> str:
        comm = collogue.Communicator(group, max_tokens=8, hidden_size=512, timeout=5.0, table=False)
        rows = (1, 3) if group.rank == 0 else (3, 1)
        norm = RMSNorm(torch.ones(512, dtype=torch.bfloat16, device=group.device))
        x = torch.ones(4, 512, dtype=torch.bfloat16, device=group.device)
        asked: dict[str, Any] = {"residual": operation == "all_gather", "norm": None if operation == "all_gather" else norm}
        comm.prepare(rows=rows, operation=operation, **asked)
        group.settle()
        if operation == "all_gather":
            comm.unshard(comm.shard(x, rows=rows), rows=rows)
        elif operation == "reduce_scatter":
            comm.reduce_scatter(x, norm=norm, rows=rows)
        else:
            comm.all_reduce(x, norm=norm, sharded=True, rows=rows)
        group.settle()
        with pytest.raises(MismatchedCall) as raised:
            comm.check()
        group.settle()  # each rank reads the others' journals
        comm.close(collective=False)
        return str(raised.value)

    for text in run_virtual(2, rank, device="cuda", timeout=60.0):
        assert "rows=[1, 3]" in text
        assert "rows=[3, 1]" in text


def test_no_rows_at_all_and_a_world_of_one() -> None:
    def rank(group: VirtualGroup) -> bool:
        comm = collogue.Communicator(group, max_tokens=8, hidden_size=512, table=False)
        x = torch.ones(4, 512, dtype=torch.bfloat16, device=group.device)
        rows = (4, *[0] * (group.size - 1))
        empty = comm.reduce_scatter(x[:0], rows=[0] * group.size, quant=FP8PerToken())
        comm.prepare(rows=rows, operation="all_gather")
        group.settle()
        whole = comm.unshard(comm.shard(x, rows=rows), rows=rows)
        group.settle()
        right = torch.equal(whole, x) and empty.codes is not None and empty.codes.shape == (0, 512)
        comm.close()
        return right

    for world in (1, 2, 3):
        assert all(run_virtual(world, rank, device="cuda", timeout=60.0))


def test_kernels_are_built_beforehand() -> None:
    """What the cases above launch compiles for this GPU without local memory."""
    architecture = architecture_of(torch.cuda.get_device_capability(0))
    assert architecture is not None
    from collogue.tools.check import Case as Checked
    from collogue.tools.check.kernels import variants_on

    properties = torch.cuda.get_device_properties(0)
    cases = [Checked(8, 7168, format=label, world_size=4, operation=o, rows=(5, 0, 1, 2)) for o in OWNING for label in ("none", "nvfp4")]
    for variant in variants_on(cases, architecture=architecture, multiprocessors=properties.multi_processor_count, gpus=1):
        assert variant.uneven
        assert not jit.local_bytes(jit.cubin(variant, architecture))

"""Rows that ranks do not own evenly, on CPU groups: ownership, bits, operators, plans, the journal. Mistakes are at the end."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from ranks import HIDDEN_SIZE, communicator
from samples import every_format, same
from torch._subclasses.fake_tensor import FakeTensorMode

import collogue
from collogue import FP8PerToken, Output, PrologueForm, RMSNorm, reference
from collogue.contract.quant import NVFP4, Quant
from collogue.contract.spec import OWNING, Operation, owned_rows
from collogue.errors import ArgumentError, CapacityError, CollogueError, MismatchedCall, ShapeError
from collogue.host.engine import HostEngine
from collogue.testing import VirtualGroup, run_virtual
from collogue.testing.compare import compare, differing
from collogue.testing.inputs import make_inputs, make_partials, make_prologue
from collogue.testing.oracle import by_rank, by_scalar
from collogue.testing.processes import run_processes

H, BF16 = HIDDEN_SIZE, torch.bfloat16
MOST = 8


def splits(world: int) -> list[list[int]]:
    """No rows, all rows on one rank, none on some, and lists that no block size makes."""
    one, last = [0] * world, [0] * world
    one[world // 2], last[-1] = 5, 3
    return [[0] * world, one, last, [rank % 2 for rank in range(world)], [3, *[0] * (world - 2), 2][-world:], [1] * world]


def given(tokens: int, world: int, dtype: torch.dtype = BF16, width: int = H) -> tuple[list[torch.Tensor], torch.Tensor, RMSNorm]:
    """Every rank's partial, the whole residual, a norm."""
    shape: dict[str, Any] = {"tokens": tokens, "hidden_size": width, "dtype": dtype}
    made = make_inputs("order", rank=0, **shape)
    return make_partials("order", world, **shape), made.residual, RMSNorm(made.weight)


def equal(actual: Output, expected: Output) -> None:
    differences = compare(actual, expected)
    assert not differing(differences), differences


# Ownership


@pytest.mark.parametrize("world", range(1, 9))
def test_every_row_has_one_owner_in_rank_order(world: int) -> None:
    for rows in splits(world):
        blocks = [owned_rows(sum(rows), world, rank, rows) for rank in range(world)]
        assert [len(block) for block in blocks] == rows
        assert [row for block in blocks for row in block] == list(range(sum(rows)))


def test_shard_is_a_view_and_unshard_its_inverse() -> None:
    def rank(group: VirtualGroup) -> None:
        comm = communicator(group)
        for rows in splits(3):
            x = given(sum(rows), 1)[0][0]
            x.view(torch.int16)[:, ::3] = -0x8000  # negative zeros travel too
            mine = comm.shard(x, rows=rows)
            own = comm.owned_rows(rows=tuple(rows))
            assert same(mine, x[own.start : own.stop])
            assert not mine.numel() or mine.data_ptr() == x[own.start :].data_ptr()
            assert own == comm.owned_rows(sum(rows), group.rank, rows=rows)
            assert same(comm.unshard(mine, rows=rows), x)
            assert same(comm.unshard(mine, len(x), rows=rows), x)
        assert [len(comm.owned_rows(4, other, rows=[1, 0, 3])) for other in range(3)] == [1, 0, 3]

    run_virtual(3, rank)


# Bits


@pytest.mark.parametrize("world", range(1, 9))
def test_every_operation_against_the_scalar_version(world: int) -> None:
    """Residual or none, fresh outputs or ``out=``, in place; the rows of a call that shares them out are those of any other."""
    quants = [None, NVFP4(2.0), FP8PerToken()]

    def rank(group: VirtualGroup) -> None:
        comm = communicator(group, max_tokens=MOST)
        for number, rows in enumerate(splits(world)):
            tokens, quant, has_residual = sum(rows), quants[number % 3], number % 2 == 0
            partials, residual, norm = given(tokens, world)
            whole = residual if has_residual else None
            mine = comm.shard(residual, rows=rows).clone() if has_residual else None
            epilogue: dict[str, Any] = {"norm": norm, "quant": quant, "keep_norm": quant is not None}
            partial = partials[group.rank]

            def right(
                operation: Operation, whole: Any = whole, partials: Any = partials, rows: Any = rows, epilogue: Any = epilogue
            ) -> Output:
                return by_rank(by_scalar, operation, partials, whole, *epilogue.values(), rows)[group.rank]

            for sharded in (True, False):
                call: Callable[..., Output] = comm.all_reduce if sharded else comm.reduce_scatter
                more: dict[str, Any] = {"sharded": True} if sharded else {}
                operation: Operation = "sharded" if sharded else "reduce_scatter"
                expected = right(operation)
                equal(call(partial, residual=mine, rows=rows, **epilogue, **more), expected)
                out = comm.empty(residual=has_residual, operation=operation, rows=rows, **epilogue)
                equal(call(partial, residual=mine, rows=tuple(rows), out=out, **epilogue, **more), expected)
            half = comm.reduce_scatter(partial, residual=mine, rows=rows, **epilogue)
            equal(comm.all_gather(half, rows=rows, quant=quant), right("all_gather"))
            equal(comm.all_gather(half, tokens, rows=rows, quant=quant), right("all_gather"))
            if mine is not None and tokens:
                out = comm.reduce_scatter(partial, residual=mine, rows=rows, **epilogue, out=replace(half, residual=mine))
                assert out.residual is mine
                equal(out, right("reduce_scatter"))

    run_virtual(world, rank)


@pytest.mark.parametrize("quant", every_format(), ids=lambda quant: quant.label)
def test_the_reference_of_every_format(quant: Quant) -> None:
    """Rank for rank what the scalar version gives, and the halves make the whole. Scales of a shard are in the layout of its rows."""
    for rows in ([0, 5, 2], [6, 0, 1], [0, 0, 3]):
        partials, residual, norm = given(sum(rows), 3)
        epilogue: dict[str, Any] = {"norm": norm, "quant": quant, "keep_norm": True}
        for operation in ("sharded", "reduce_scatter"):
            found = getattr(reference, operation)(partials, residual=residual, rows=rows, **epilogue)
            for one, right in zip(found, by_rank(by_scalar, operation, partials, residual, norm, quant, True, rows), strict=True):  # type: ignore[arg-type]
                equal(one, right)
        halves = reference.reduce_scatter(partials, residual=residual, rows=rows, **epilogue)
        equal(reference.all_gather(halves, quant=quant, rows=rows), reference.all_reduce(partials, residual=residual, **epilogue))


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
def test_a_prologue_and_a_norm_of_the_sum(dtype: torch.dtype) -> None:
    """With what else a call may have."""
    rows, form = [4, 0, 1], PrologueForm("expert_combine", "float32", shared=True)
    terms = [make_prologue(form, "normal", rank=r, tokens=5, hidden_size=H, dtype=dtype, count=2, seed=1) for r in range(3)]
    _, residual, norm = given(5, 3, dtype)
    epilogue: dict[str, Any] = {"norm": norm, "quant": FP8PerToken(), "branch_norm": RMSNorm(norm.weight, eps=1e-3)}
    expected = reference.sharded(terms, residual=residual, rows=rows, **epilogue)

    def rank(group: VirtualGroup) -> None:
        comm = communicator(group, dtype=dtype)
        mine = comm.shard(residual, rows=rows)
        equal(comm.all_reduce(terms[group.rank], residual=mine, sharded=True, rows=rows, **epilogue), expected[group.rank])

    run_virtual(3, rank)


def processes_rank(group: Any, tell: Any) -> list[str]:
    """One rank of two real processes."""
    wrong = []
    with communicator(group) as comm:
        for rows in ([3, 0], [1, 4], [0, 0]):
            partials, residual, norm = given(sum(rows), 2)
            mine = comm.shard(residual, rows=rows)
            found = comm.all_reduce(partials[comm.rank], residual=mine, norm=norm, quant=FP8PerToken(), sharded=True, rows=rows)
            right = reference.sharded(partials, residual=residual, norm=norm, quant=FP8PerToken(), rows=rows)[comm.rank]
            wrong += [f"{rows}: {d.first}" for d in compare(found, right).values() if d.count]
            if not same(comm.unshard(mine, rows=rows), residual):
                wrong.append(f"{rows}: unshard")
        tell("lists that differ")
        try:
            comm.reduce_scatter(given(4, 2)[0][comm.rank], rows=[1, 3] if comm.rank else [3, 1])
        except MismatchedCall as error:
            if "rows=[3, 1]" not in str(error) or "rows=[1, 3]" not in str(error):
                wrong.append(str(error))
        else:
            wrong.append("no MismatchedCall")
    return wrong


def test_real_processes() -> None:
    assert run_processes(2, processes_rank) == [[], []]


@pytest.mark.parametrize("theirs", [[3, 1], None, [2, 2]], ids=str)
@pytest.mark.parametrize("operation", OWNING)
def test_ranks_with_other_lists_are_told(operation: Operation, theirs: list[int] | None) -> None:
    """Equal blocks and a list of the same blocks are two calls as well."""
    mine = [1, 3] if theirs is not None else [2, 2]

    def rank(group: VirtualGroup) -> None:
        comm, rows = communicator(group), mine if group.rank == 0 else theirs
        partial, norm = given(4, 2)[0][group.rank], RMSNorm(torch.ones(H))
        calls: dict[Operation, Callable[[], object]] = {
            "sharded": lambda: comm.all_reduce(partial, norm=norm, sharded=True, rows=rows),
            "reduce_scatter": lambda: comm.reduce_scatter(partial, rows=rows),
            "all_gather": lambda: comm.unshard(comm.shard(partial, rows=rows), 4, rows=rows),
        }
        with pytest.raises(MismatchedCall, match="rows="):
            calls[operation]()

    run_virtual(2, rank)


# Operators


def test_compiled_calls() -> None:
    """The list is a constant of the graph; another one compiles again, and has its own bits."""
    lists = ([1, 0, 4], [0, 3, 2])

    def rank(group: VirtualGroup) -> None:
        comm = communicator(group)

        def body(partial: torch.Tensor, residual: torch.Tensor, rows: list[int]) -> tuple[Output, Output]:
            half = comm.reduce_scatter(partial, residual=residual, norm=norm, quant=FP8PerToken(), rows=rows)
            return comm.all_reduce(partial, residual=residual, norm=norm, sharded=True, rows=rows), comm.all_gather(
                half, quant=FP8PerToken(), rows=rows
            )

        compiled = torch.compile(body, backend="aot_eager", fullgraph=True)
        for rows in lists:
            partials, residual, norm = given(5, 3)
            mine = comm.shard(residual, rows=rows).clone()
            with torch.no_grad():
                for found, right in zip(compiled(partials[group.rank], mine, rows), body(partials[group.rank], mine, rows), strict=True):
                    equal(found, right)

    torch._dynamo.reset()
    run_virtual(3, rank, timeout=120)


@pytest.mark.parametrize("operation", OWNING)
def test_fakes_have_this_ranks_shape(operation: Operation) -> None:
    rows = [3, 0, 2]

    def rank(group: VirtualGroup) -> None:
        comm = communicator(group)
        with FakeTensorMode():
            partial, own = torch.empty(5, H, dtype=BF16), torch.empty(rows[group.rank], H, dtype=BF16)
            norm = RMSNorm(torch.empty(H))
            if operation == "all_gather":
                assert comm.unshard(own, rows=rows).shape == (5, H)
                return
            call = comm.reduce_scatter if operation == "reduce_scatter" else comm.all_reduce
            more: dict[str, Any] = {} if operation == "reduce_scatter" else {"sharded": True}
            out = call(partial, residual=own, norm=norm, rows=rows, **more)
            finished = rows[group.rank] if operation == "reduce_scatter" else 5
            assert (out.residual.shape, out.norm.shape) == ((rows[group.rank], H), (finished, H))

    run_virtual(3, rank)


def test_operators_take_the_list_and_refuse_what_calls_refuse() -> None:
    def rank(group: VirtualGroup) -> None:
        comm = communicator(group)
        partial, weight = given(4, 1)[0][0], torch.ones(H)
        rest = (weight, 1e-6, 0.0, "none", None, 1.0, 0.0, False, comm.name)
        y, norm = torch.ops.collogue.sharded(partial, None, *rest, rows=[4])
        expected = comm.all_reduce(partial, norm=RMSNorm(weight))
        assert same(y, expected.residual)  # type: ignore[arg-type]
        assert same(norm, expected.norm)  # type: ignore[arg-type]
        assert same(torch.ops.collogue.all_gather(None, partial, None, None, None, 4, "none", 0.0, comm.name, rows=[4])[0], partial)
        for mode in (contextlib.nullcontext(), FakeTensorMode(allow_non_fake_inputs=True)):
            for operator, rows, error in (
                ("sharded", [3], ShapeError),
                ("sharded", [4, 0], ShapeError),
                ("all_reduce", [4], ArgumentError),
            ):
                with mode, pytest.raises(error, match="rows"):
                    getattr(torch.ops.collogue, operator)(partial, None, *rest, rows=rows)

    run_virtual(1, rank)


def test_opcheck() -> None:
    checks = ("test_schema", "test_faketensor", "test_aot_dispatch_dynamic", "test_autograd_registration")

    def rank(group: VirtualGroup) -> None:
        comm = communicator(group)
        partial, rest = given(4, 1)[0][0], (torch.ones(H), 1e-6, 0.0, "none", None, 1.0, 0.0, False, comm.name)
        for operator in (torch.ops.collogue.sharded.default, torch.ops.collogue.reduce_scatter.default):
            torch.library.opcheck(operator, (partial, None, *rest), {"rows": [4]}, test_utils=checks)

    run_virtual(1, rank)


# Without a call


def test_prepare_and_explain() -> None:
    def rank(group: VirtualGroup) -> None:
        comm = communicator(group)
        comm.prepare(rows=[3, 1], operation="reduce_scatter")
        comm.prepare([4, 4], rows=[3, 1], operation="sharded", norm=RMSNorm(torch.ones(H)))
        assert "1 to 3 rows each" in comm.explain(rows=[3, 1], operation="sharded").why
        assert comm.explain(4, rows=(3, 1), operation="all_gather").bytes_sent == 3 * H * 2
        out = comm.empty(rows=[3, 1], operation="sharded", residual=True, norm=True)
        assert out.residual is not None
        assert out.norm is not None
        assert (len(out.residual), len(out.norm)) == ((3, 1)[group.rank], 4)

    run_virtual(2, rank)


# Mistakes

Use = Callable[[collogue.Communicator, torch.Tensor], object]
BAD: dict[str, tuple[Any, type[CollogueError], str, str]] = {
    "negative": ([5, -1], ShapeError, r"rows is \[5, -1\]; expected numbers from 0", "give 0 for a rank"),
    "too short": ([4], ShapeError, r"rows has 1 entries: \[4\]", "each of the 2 ranks"),
    "too long": ([4, 0, 0], ShapeError, "rows has 3 entries", "each of the 2 ranks"),
    "another sum": ([4, 1], ShapeError, r"rows \[4, 1\] add up to 5; the call has 4 tokens", "their sum is T"),
    "bools": ([True, 3], ArgumentError, r"rows is \[True, 3\]; expected a list of Python ints", "same list on every rank"),
    "floats": ([1.0, 3.0], ArgumentError, "expected a list of Python ints", "rows="),
    "a tensor": (torch.tensor([1, 3]), ArgumentError, "rows is Tensor; expected a list of Python ints", "rows="),
    "tensors": ([torch.tensor(1), torch.tensor(3)], ArgumentError, "expected a list of Python ints", "rows="),
    "a number": (4, ArgumentError, "rows is int; expected a list", "rows="),
    "a word": ("13", ArgumentError, "rows is str; expected a list", "rows="),
}
USES: dict[str, Callable[[Any], Use]] = {
    "sharded": lambda rows: lambda c, x: c.all_reduce(x, norm=RMSNorm(torch.ones(H)), sharded=True, rows=rows),
    "reduce_scatter": lambda rows: lambda c, x: c.reduce_scatter(x, rows=rows),
    "all_gather": lambda rows: lambda c, x: c.all_gather(Output(residual=x[:2]), 4, rows=rows),
    "unshard": lambda rows: lambda c, x: c.unshard(x[:2], 4, rows=rows),
    "shard": lambda rows: lambda c, x: c.shard(x, rows=rows),
    "owned_rows": lambda rows: lambda c, x: c.owned_rows(4, rows=rows),
    "prepare": lambda rows: lambda c, x: c.prepare(4, operation="sharded", norm=RMSNorm(torch.ones(H)), rows=rows),
    "empty": lambda rows: lambda c, x: c.empty(4, operation="reduce_scatter", rows=rows),
    "explain": lambda rows: lambda c, x: c.explain(4, operation="all_gather", rows=rows),
    "reference": lambda rows: lambda c, x: reference.sharded([x, x], norm=RMSNorm(torch.ones(H)), rows=rows),
    "reference of a half": lambda rows: lambda c, x: reference.reduce_scatter([x, x], rows=rows),
}
MISTAKES: dict[str, tuple[Use, type[CollogueError], str, str]] = {
    **{f"{use}: {bad}": (USES[use](BAD[bad][0]), *BAD[bad][1:]) for use, bad in itertools.product(USES, BAD)},
    "all_reduce": (lambda c, x: c.all_reduce(x, rows=[1, 3]), ArgumentError, "all_reduce leaves no rows to owners", "sharded=True"),
    **{
        f"{method} of {operation}": (
            lambda c, x, method=method, operation=operation: getattr(c, method)(  # type: ignore[misc]
                4, operation=operation, norm=RMSNorm(torch.ones(H)), rows=[1, 3]
            ),
            ArgumentError,
            f"{operation} leaves no rows to owners",
            "reduce_scatter or all_gather",
        )
        for method, operation in itertools.product(("prepare", "empty", "explain"), ("all_reduce", "finish"))
    },
    "a residual of equal blocks": (
        lambda c, x: c.reduce_scatter(x, residual=x[:2].clone(), rows=[1, 3]),
        ShapeError,
        r"residual has shape \[2, 64\]; rank 0 of 2 owns 1 rows",
        "comm.shard(residual, rows=rows)",
    ),
    "a shard of equal blocks": (lambda c, x: c.unshard(x[:2], rows=[1, 3]), ShapeError, r"needed: \[1, 64\]", "owns 1 of 4 rows"),
    "neither tokens nor rows": (lambda c, x: c.unshard(x[:2]), ShapeError, "tokens is None", "number of rows"),
    "neither, prepared": (lambda c, x: c.prepare(), ShapeError, "tokens is None", "number of rows"),
    "too many": (lambda c, x: c.empty(rows=[9, 0], operation="reduce_scatter"), CapacityError, "9 tokens", "made for 8 tokens"),
    "out of equal blocks": (
        lambda c, x: c.reduce_scatter(x, rows=[1, 3], out=Output(reduced=torch.zeros(2, H, dtype=BF16))),
        ShapeError,
        r"needed: \[1, 64\]",
        "without out=",
    ),
    "a gather of other rows": (
        lambda c, x: reference.all_gather([Output(norm=x[:1]), Output(norm=x[1:])], rows=[2, 2]),
        ShapeError,
        r"norm have \[1, 3\] rows",
        "rows=",
    ),
}


def test_wrong_calls_are_refused() -> None:
    """On one rank alone, where a call that communicated would wait for ever; the engine hears of none of them."""
    launched: list[object] = []

    def rank(group: VirtualGroup) -> None:
        comm, x = communicator(group), torch.ones(4, H, dtype=BF16)
        if group.rank == 0:
            for what, (use, error, message, hint) in MISTAKES.items():
                with pytest.raises(error, match=message) as raised:
                    use(comm, x)
                assert type(raised.value) is error, what
                assert hint in str(raised.value).splitlines()[-1], what
            assert not launched
        group.barrier()
        assert same(comm.unshard(comm.shard(x, rows=[1, 3]), rows=[1, 3]), x)

    with pytest.MonkeyPatch.context() as patch:
        run = HostEngine.run
        patch.setattr(HostEngine, "run", lambda self, call, out: (launched.append(call), run(self, call, out))[1])
        run_virtual(2, rank, timeout=20)
    assert len(launched) == 2

"""Sharded, reduce_scatter, all_gather and finish on CPU groups: bits, identities, ownership, real processes. Mistakes are at the end."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any, get_args

import pytest
import torch
from ranks import HIDDEN_SIZE, MAX_TOKENS, arguments, check_works, communicator
from samples import bits, every_format, formats_by_label, same

import collogue
from collogue import reference
from collogue.calls.call import Call, check_call
from collogue.calls.capacity import Capacity
from collogue.calls.gather import check_gather
from collogue.calls.outputs import check_out
from collogue.contract.quant import NVFP4, FP8Group, FP8PerToken, FP8Static, Quant
from collogue.contract.spec import Operation, Output, RMSNorm, owned_rows
from collogue.errors import (
    ArgumentError,
    CapacityError,
    ClosedError,
    CollogueError,
    DeviceError,
    DTypeError,
    FormatError,
    GradError,
    LayoutError,
    MismatchedCall,
    OverlapError,
    ShapeError,
)
from collogue.formats import empty_scales
from collogue.gpu.launch import Params
from collogue.gpu.parameters import fill_shape, later_launches
from collogue.host.engine import HostEngine
from collogue.planning.plan import make_kernels, make_plan
from collogue.planning.topology import topology_of
from collogue.testing import VirtualGroup, run_virtual
from collogue.testing.compare import compare, differing
from collogue.testing.inputs import make_partials
from collogue.testing.oracle import by_rank, by_reference, by_scalar
from collogue.testing.processes import run_processes
from collogue.tools.check import Answers, Case, check_rank, default_sweep

BF16, F8 = torch.bfloat16, torch.float8_e4m3fn
OPERATIONS: tuple[Operation, ...] = get_args(Operation)
T, H = 4, HIDDEN_SIZE


def equal(actual: Output, expected: Output) -> None:
    differences = compare(actual, expected)
    assert not differing(differences), differences


def partials_of(world_size: int, tokens: int) -> list[torch.Tensor]:
    return make_partials("order", world_size, tokens=tokens, hidden_size=H, dtype=BF16)


# Ownership


@pytest.mark.parametrize("world_size", range(1, 9))
def test_every_row_has_one_owner_and_blocks_are_in_rank_order(world_size: int) -> None:
    for tokens in (*range(20), 127, 128, 129, 1000, 4097):
        blocks = [owned_rows(tokens, world_size, rank) for rank in range(world_size)]
        assert [row for block in blocks for row in block] == list(range(tokens))
        block = -(-tokens // world_size)
        assert all(len(b) == block for b in blocks[: tokens // block if block else world_size])
        assert all(row // block == rank for rank, rows in enumerate(blocks) for row in rows)


def test_shard_is_a_view_and_unshard_its_inverse() -> None:
    def rank(group: VirtualGroup) -> None:
        comm = communicator(group)
        for tokens in (0, 1, 2, 3, 5, 7):
            x = partials_of(1, tokens)[0]
            x.view(torch.int16)[:, ::3] = -0x8000  # negative zeros travel too
            mine = comm.shard(x)
            assert mine.shape == (len(comm.owned_rows(tokens)), H)
            assert same(mine, x[list(comm.owned_rows(tokens))])
            whole = comm.unshard(mine, tokens)
            assert same(whole, x)
            assert not tokens or whole.data_ptr() != x.data_ptr()
        x = torch.zeros(7, H, dtype=BF16)
        comm.shard(x).fill_(1.0)
        assert x[list(comm.owned_rows(7))].eq(1).all()
        assert int(x.eq(1).all(dim=1).sum()) == len(comm.owned_rows(7))
        assert comm.shard(torch.arange(7)).tolist() == list(comm.owned_rows(7))  # positions, token ids
        assert [comm.owned_rows(7, other) for other in range(3)] == [range(3), range(3, 6), range(6, 7)]

    run_virtual(3, rank)


# Bits


@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
def test_every_operation_at_every_small_number_of_tokens(world_size: int) -> None:
    """Against the scalar version: own outputs, poisoned ``out=``, residual in place. With 1, 2 and 3 tokens some ranks own nothing."""
    labels = ("fp8_group32/ue8m0/column", "nvfp4/128x4", "none", "fp8_static")
    cases = [
        Case(t, 64, "bfloat16", labels[(i + j) % 4], world_size, keep_norm=j % 2 == 0, inputs="order", seed=j, operation=operation)
        for i, operation in enumerate(OPERATIONS)
        for j, t in enumerate((0, 1, 2, 3, 5, 7))
    ]
    answers = Answers()
    for results in run_virtual(world_size, lambda group: check_rank(group, cases, answers, lambda text: None)):
        assert [(str(r.case), r.error, r.first) for r in results if not r.passed] == []


@formats_by_label
def test_every_format_and_the_identities_of_its_halves(quant: Quant) -> None:
    """``all_gather(reduce_scatter(x))`` is the sharded call, and both are the rows of the replicated one."""

    def rank(group: VirtualGroup) -> None:
        comm = communicator(group)
        for tokens in (2, 7):
            given = {**arguments(group.rank, tokens), "quant": quant, "keep_norm": True}
            full = given.pop("residual")
            mine = comm.shard(full)
            replicated = comm.all_reduce(**given, residual=full)
            sharded = comm.all_reduce(**given, residual=mine, sharded=True)
            half = comm.reduce_scatter(**given, residual=mine)
            assert same(sharded.residual, comm.shard(replicated.residual))  # type: ignore[arg-type]
            equal(replace(sharded, residual=None), replace(replicated, residual=None))
            assert same(half.residual, sharded.residual)
            equal(comm.all_gather(half, tokens, quant=quant), replicated)
            equal(comm.finish(replicated.residual, norm=given["norm"], quant=quant, keep_norm=True), replace(replicated, residual=None))  # type: ignore[arg-type]
            # The layout of a shard is that of a tensor with its rows.
            equal(comm.finish(half.residual, norm=given["norm"], quant=quant, keep_norm=True), replace(half, residual=None))  # type: ignore[arg-type]

    run_virtual(3, rank)


@pytest.mark.parametrize("tokens", [1, 2, 5, 7])
def test_the_reference_of_every_operation_is_made_of_its_all_reduce(tokens: int) -> None:
    """Both oracles agree with :mod:`collogue.reference`, which rank for rank says what the communicator returns."""
    partials, given = partials_of(3, tokens), arguments(0, tokens)
    quants: list[Quant] = [FP8Group(32, layout="column"), NVFP4(2.0)]
    for quant in quants:
        keywords: dict[str, Any] = {"norm": given["norm"], "quant": quant, "keep_norm": True}
        scattered = reference.reduce_scatter(partials, residual=given["residual"], **keywords)
        answers: dict[Operation, list[Output]] = {
            "sharded": reference.sharded(partials, residual=given["residual"], **keywords),
            "reduce_scatter": scattered,
            "all_gather": [reference.all_gather(scattered, quant=quant)] * 3,
            "finish": [reference.finish(y, **keywords) for y in partials],
        }
        for operation, expected in answers.items():
            for all_reduce in (by_reference, by_scalar):
                for found, right in zip(
                    by_rank(all_reduce, operation, partials, given["residual"], given["norm"], quant, True), expected, strict=True
                ):
                    equal(found, right)


def test_outputs_follow_the_arguments() -> None:
    def rank(group: VirtualGroup) -> None:
        comm, given = communicator(group), arguments(group.rank)
        x, norm, residual = given["partial"], given["norm"], comm.shard(given["residual"])

        def names(out: Output) -> list[tuple[str, int]]:
            return [(name, len(tensor)) for name, tensor in out.items()]

        assert names(comm.all_reduce(x, norm=norm, sharded=True)) == [("residual", 2), ("norm", 4)]
        assert names(comm.all_reduce(x, quant=FP8Static(1.0), sharded=True)) == [("reduced", 2), ("codes", 4)]
        assert names(comm.all_reduce(x, residual=residual, quant=FP8PerToken(), sharded=True)) == [
            ("residual", 2),
            ("codes", 4),
            ("scales", 4),
        ]
        assert names(comm.reduce_scatter(x)) == [("reduced", 2)]
        assert names(comm.reduce_scatter(x, residual=residual)) == [("residual", 2)]
        assert names(comm.reduce_scatter(x, norm=norm, quant=FP8PerToken())) == [("residual", 2), ("codes", 2), ("scales", 2)]
        assert names(comm.finish(x, norm=norm)) == [("norm", 4)]
        assert names(comm.finish(x, quant=FP8Static(1.0))) == [("codes", 4)]
        assert names(comm.finish(x, norm=norm, quant=FP8PerToken(), keep_norm=True)) == [("norm", 4), ("codes", 4), ("scales", 4)]
        half = comm.reduce_scatter(x, norm=norm, quant=FP8PerToken(), keep_norm=True)
        for held in (("residual",), ("norm", "residual"), ("codes", "scales"), ("norm", "codes", "scales")):
            shard = Output(**{name: getattr(half, name) for name in held})
            out = comm.all_gather(shard, T, quant=FP8PerToken() if "codes" in held else None)
            assert {name for name, _ in out.items()} == set(held)
            assert {len(tensor) for _, tensor in out.items()} == {T}

    run_virtual(2, rank)


@pytest.mark.parametrize("world_size", [1, 3])
@pytest.mark.parametrize("quant", [None, NVFP4(1.0, "8x4"), FP8Group(32, "ue8m0", "column"), FP8Group(32, layout="column"), FP8Static(1.0)])
def test_all_gather_moves_any_bits(world_size: int, quant: Quant | None) -> None:
    """Random bytes in every tensor: negative zeros, NaN with payloads, codes and scales that no call makes."""
    tokens = 5
    asked = Call(*partials_of(1, tokens), None, RMSNorm(torch.ones(H)), quant, quant is not None)
    whole = check_call(Capacity(8, H, BF16, torch.device("cpu")), asked).signature.empty()
    draw = torch.Generator().manual_seed(3)
    rows: dict[str, torch.Tensor] = {}
    for name, tensor in whole.items():
        if name != "scales":
            bits(tensor).view(torch.uint8).random_(generator=draw)
            rows[name] = tensor
    if whole.scales is not None:
        assert quant is not None
        sample = reference.read_scales(whole.scales, quant, tokens, H)
        rows["scales"] = torch.randint(0, 256, (tokens, sample.shape[1] * sample.element_size()), dtype=torch.uint8, generator=draw).view(
            sample.dtype
        )
        whole.scales = reference.place_scales(rows["scales"], quant, tokens, H)

    def rank(group: VirtualGroup) -> None:
        comm = communicator(group)
        shard = Output(**{name: comm.shard(tensor).clone() for name, tensor in rows.items() if name != "scales"})
        if quant is not None and "scales" in rows:
            mine = comm.shard(rows["scales"])
            shard.scales = reference.place_scales(mine, quant, len(mine), H)
        out = comm.all_gather(shard, tokens, quant=quant)
        equal(out, whole)
        assert not {t.data_ptr() for _, t in out.items()} & {t.data_ptr() for _, t in shard.items()}

    run_virtual(world_size, rank)


def test_the_residual_shard_may_be_updated_in_place() -> None:
    def rank(group: VirtualGroup) -> None:
        comm, given = communicator(group), arguments(group.rank, 5)
        full, norm = given["residual"], given["norm"]
        expected = comm.all_reduce(given["partial"], residual=full, norm=norm)
        for operation in ("sharded", "reduce_scatter"):
            mine = comm.shard(full).clone()
            rows = 5 if operation == "sharded" else len(mine)
            out = Output(residual=mine, norm=torch.empty(rows, H, dtype=BF16))
            if operation == "sharded":
                assert comm.all_reduce(given["partial"], residual=mine, norm=norm, sharded=True, out=out) is out
            else:
                assert comm.reduce_scatter(given["partial"], residual=mine, norm=norm, out=out) is out
            assert out.residual is mine
            assert same(mine, comm.shard(expected.residual))  # type: ignore[arg-type]
            assert same(out.norm, expected.norm if rows == 5 else comm.shard(expected.norm))  # type: ignore[arg-type]

    run_virtual(3, rank)


def test_a_world_of_one_and_no_tokens_communicate_nothing() -> None:
    def every(comm: collogue.Communicator, tokens: int) -> None:
        given, quant = arguments(0, tokens), NVFP4(1.0)
        comm.all_reduce(**given, sharded=True, quant=quant)
        half = comm.reduce_scatter(**given, quant=quant, keep_norm=True)
        comm.all_gather(half, tokens, quant=quant)
        comm.unshard(half.residual, tokens)  # type: ignore[arg-type]

    def alone(group: VirtualGroup) -> None:
        comm = communicator(group)
        for name in ("all_gather", "all_gather_object", "barrier"):
            setattr(group, name, None)  # calling it would raise
        every(comm, T)

    run_virtual(1, alone)

    def empty(group: VirtualGroup) -> None:
        comm = communicator(group)
        if group.rank == 0:  # alone: a call that communicated would wait for ever
            every(comm, 0)
            comm.finish(arguments(0)["partial"], norm=RMSNorm(torch.ones(H)))
        group.barrier()

    run_virtual(2, empty, timeout=20)


# Real processes, and ranks that disagree


def gloo_operations(group: Any, tell: Any, cases: list[Case]) -> list[str]:
    """Every case on one rank of a gloo group, then calls that do not match: what went wrong."""
    wrong = [f"{r.case}: {r.error or r.first}" for r in check_rank(group, cases, Answers(), tell) if not r.passed]
    with communicator(group) as comm:
        x = arguments(comm.rank)["partial"]
        try:
            comm.reduce_scatter(x) if comm.rank else comm.all_reduce(x)
            wrong.append("no MismatchedCall")
        except MismatchedCall as error:
            if "rank 0 called with (all_reduce, tokens=4" not in str(error) or "with (reduce_scatter, tokens=4" not in str(error):
                wrong.append(str(error))
        comm.reset()
        check_works(comm)
    return wrong


@pytest.mark.slow
def test_processes_over_gloo() -> None:
    cases = [c.in_world(3) for c in default_sweep("cpu") if c.operation != "all_reduce"][::2]
    assert {c.operation for c in cases} == set(OPERATIONS) - {"all_reduce"}
    assert run_processes(3, gloo_operations, list(dict.fromkeys(cases))) == [[]] * 3


def _half(comm: collogue.Communicator, quant: Quant) -> Output:
    return comm.reduce_scatter(arguments(comm.rank)["partial"], quant=quant)


DISAGREE: dict[str, Callable[[collogue.Communicator, bool], object]] = {
    "sharded": lambda c, odd: c.all_reduce(arguments(c.rank)["partial"], residual=None, norm=RMSNorm(torch.ones(H)), sharded=odd),
    "tokens of a gather": lambda c, odd: c.unshard(torch.zeros(2, H, dtype=BF16), 3 if odd else 4),
    "what a shard holds": lambda c, odd: c.all_gather(Output(**{"norm" if odd else "residual": torch.zeros(2, H, dtype=BF16)}), T),
    "format of a gather": lambda c, odd: c.all_gather(
        Output(codes=torch.empty(2, H, dtype=F8), scales=torch.zeros(2, 1 if odd else 2)),
        T,
        quant=FP8PerToken() if odd else FP8Group(32),
    ),
}


@pytest.mark.parametrize("what", DISAGREE)
def test_mismatched_calls_raise_on_every_rank(what: str) -> None:
    def rank(group: VirtualGroup) -> str:
        comm = communicator(group)
        with pytest.raises(MismatchedCall) as raised:
            DISAGREE[what](comm, group.rank == 0)
        comm.reset()
        check_works(comm)
        return str(raised.value)

    texts = run_virtual(2, rank)
    assert texts[0] == texts[1]
    assert "same operation" in texts[0].splitlines()[-1]


# Plans and life cycle


def test_plans_of_every_operation() -> None:
    def rank(group: VirtualGroup) -> None:
        comm = communicator(group)
        norm = RMSNorm(torch.ones(H))
        for operation in OPERATIONS:
            comm.prepare([1, MAX_TOKENS], norm=norm, quant=FP8PerToken(), operation=operation)
            assert comm.explain(T, norm=norm, quant=FP8PerToken(), operation=operation).algorithm == "reference"
        assert comm.explain(T, operation="finish").bytes_sent == 0
        fused, moved = (comm.explain(T, quant=FP8PerToken(), operation=o).bytes_sent for o in ("sharded", "reduce_scatter"))
        assert fused > moved > 0
        with pytest.raises(ArgumentError, match=r"unknown operation 'scatter'\nhint: choose one of all_reduce, sharded, reduce_scatter"):
            comm.prepare(1, operation="scatter")  # type: ignore[arg-type]
        with pytest.raises(ArgumentError, match="nothing to finish"):
            comm.explain(1, norm=False, operation="finish")

    run_virtual(2, rank)


def test_a_request_is_that_of_the_call() -> None:
    """What ``prepare`` plans is what a call later looks up."""
    capacity = Capacity(MAX_TOKENS, H, BF16, torch.device("cpu"), 2, 0)

    def rank(group: VirtualGroup) -> None:
        comm, x, norm = communicator(group), torch.zeros(T, H, dtype=BF16), RMSNorm(torch.ones(H))
        quant = FP8PerToken()
        for operation in ("sharded", "reduce_scatter", "finish"):
            call = check_call(capacity, Call(x, None, norm, quant, True, operation))
            request = comm._capacity.request(T, False, norm, quant, True, None, operation)
            assert (request.wanted, request.residual, request.norm) == (call.wanted, False, True)
            assert request.wide_weight
            assert capacity.signature(request) is call.signature
        half = Output(residual=x[:2], norm=x[:2], codes=torch.empty(2, H, dtype=F8), scales=torch.zeros(2, 1))
        call = check_gather(capacity, half, T, quant)
        request = comm._capacity.request(T, True, True, quant, False, None, "all_gather")
        assert (request.wanted, request.residual, request.norm, request.wide_weight) == (call.wanted, False, False, False)
        assert capacity.signature(request) is call.signature
        assert (call.tokens, call.hidden_size, call.partial.dtype, call.signature.device) == (T, H, BF16, torch.device("cpu"))

    run_virtual(2, rank)


@formats_by_label
def test_what_is_allocated_is_what_a_call_needs(quant: Quant) -> None:
    """Engines of GPUs write into :meth:`Signature.empty`'s tensors: those that the reference returns, and that ``out=`` must be."""
    x, norm = torch.zeros(7, H, dtype=BF16), RMSNorm(torch.ones(H))
    rows: dict[Operation, Any] = {
        "all_reduce": (None, 7, 7),
        "sharded": (range(3, 6), 3, 7),
        "reduce_scatter": (range(3, 6), 3, 3),
        "finish": (None, 7, 7),
    }
    for operation in OPERATIONS:
        capacity = Capacity(MAX_TOKENS, H, BF16, torch.device("cpu"), 3, 1)
        expected = by_rank(by_reference, operation, [x] * 3, None, norm, quant, True)[1]
        if operation == "all_gather":
            half = by_rank(by_reference, "reduce_scatter", [x] * 3, None, norm, quant, True)[1]
            call = check_gather(capacity, half, 7, quant)
            assert (call.owned, call.signature.stream_rows, call.signature.finished_rows) == (range(3, 6), 7, 7)
        else:
            call = check_call(capacity, Call(x, None, norm, quant, True, operation))
            assert (call.owned, call.signature.stream_rows, call.signature.finished_rows) == rows[operation]
        assert call.tokens == 7
        out = call.signature.empty()
        check_out(call, out)
        forms = [{name: (t.shape, t.stride(), t.dtype) for name, t in o.items()} for o in (out, expected)]
        assert forms[0] == forms[1]


@formats_by_label
@pytest.mark.parametrize("tokens", [0, 1, 4, 7])
def test_empty_outputs_are_those_of_the_call(quant: Quant, tokens: int) -> None:
    """Allocated by themselves they have the form of a fresh call's, on every rank, and the call takes them."""

    def rank(group: VirtualGroup) -> None:
        comm, given = communicator(group), arguments(group.rank, tokens)
        for operation in OPERATIONS:
            residual = comm.shard(given["residual"]).clone() if operation in ("sharded", "reduce_scatter") else given["residual"]
            asked: dict[str, Any] = {"residual": residual, "norm": given["norm"], "quant": quant, "keep_norm": True}
            fresh, out = (
                make_call(comm, operation, given["partial"], asked, out) for out in (None, comm.empty(tokens, operation=operation, **asked))
            )
            forms = [{name: (t.shape, t.stride(), t.dtype) for name, t in o.items()} for o in (out, fresh)]
            assert forms[0] == forms[1]
            assert not differing(compare(out, fresh))

    run_virtual(3, rank)


def make_call(
    comm: collogue.Communicator, operation: Operation, partial: torch.Tensor, asked: dict[str, Any], out: Output | None
) -> Output:
    """The call of any operation; a gather takes the shard that these arguments make."""
    if operation == "all_gather":
        rows = {**asked, "residual": comm.shard(asked["residual"]).clone()}
        return comm.all_gather(comm.reduce_scatter(partial, **rows), len(partial), quant=asked["quant"], out=out)
    if operation == "reduce_scatter":
        return comm.reduce_scatter(partial, **asked, out=out)
    if operation == "finish":
        return comm.finish(partial, norm=asked["norm"], quant=asked["quant"], keep_norm=True, out=out)
    return comm.all_reduce(partial, **asked, sharded=operation == "sharded", out=out)


def test_empty_refuses_what_cannot_be_called() -> None:
    def rank(group: VirtualGroup) -> None:
        comm = communicator(group)
        assert [name for name, _ in comm.empty(1, residual=True, norm=True).items()] == ["residual", "norm"]
        assert comm.empty(3, hidden_size=24).reduced.shape == (3, 24)  # type: ignore[union-attr]
        for use, error in (
            (lambda: comm.empty(MAX_TOKENS + 1), CapacityError),
            (lambda: comm.empty(1, keep_norm=True), FormatError),
            (lambda: comm.empty(1, quant=FP8Group(48)), FormatError),
            (lambda: comm.empty(1, operation="finish"), ArgumentError),
            (lambda: comm.empty(1, operation="sum"), ArgumentError),  # type: ignore[arg-type]
        ):
            with pytest.raises(error):
                use()
        comm.close()
        with pytest.raises(ClosedError):
            comm.empty(1)

    run_virtual(2, rank)


def test_a_closed_communicator_says_so() -> None:
    def rank(group: VirtualGroup) -> None:
        comm = communicator(group)
        comm.close()
        x = arguments(group.rank)["partial"]
        for use in (
            lambda: comm.reduce_scatter(x),
            lambda: comm.all_gather(Output(residual=x), T),
            lambda: comm.finish(x, quant=FP8PerToken()),
            lambda: comm.unshard(x, T),
        ):
            with pytest.raises(ClosedError):
                use()

    run_virtual(2, rank)


# Padding that an earlier call has written


@pytest.mark.parametrize("quant", [NVFP4(400.0), NVFP4(400.0, "8x4"), FP8Group(32, layout="column"), FP8PerToken()])
def test_padding_of_an_earlier_call_need_not_be_written(quant: Quant) -> None:
    """Each byte of it is 0 afterwards, or what it was; everything else is as ever. Ranks need not agree."""

    def rank(group: VirtualGroup) -> None:
        comm, given = communicator(group), arguments(group.rank)
        partial, norm = given["partial"], given["norm"]
        shard = comm.shard(given["residual"])
        whole = {"residual": given["residual"], "norm": norm, "quant": quant}
        part = {**whole, "residual": shard}
        gathered = comm.reduce_scatter(partial, **part)
        calls: list[Callable[..., Output]] = [
            lambda **more: comm.all_reduce(partial, **whole, **more),
            lambda **more: comm.all_reduce(partial, **part, sharded=True, **more),
            lambda **more: comm.reduce_scatter(partial, **part, **more),
            lambda **more: comm.all_gather(gathered, T, quant=quant, **more),
            lambda **more: comm.finish(partial, norm=norm, quant=quant, **more),
        ]
        for call in calls:
            right = call()
            padded = call()
            equal(call(out=padded, write_padding=group.rank == 0), right)

    run_virtual(2, rank)


def test_padding_is_written_by_the_last_launch_unless_it_is_not_asked_for() -> None:
    """The same kernel is told of no rows of scales; the words that ranks compare are the same."""
    capacity = Capacity(MAX_TOKENS, H, BF16, torch.device("cpu"), 2, 0)
    topology = topology_of(2, capacity, architecture="sm_90a", multiprocessors=132)
    given = {"residual": True, "norm": RMSNorm(zeros(H)), "quant": NVFP4(1.0), "keep_norm": False, "hidden_size": None}
    asked = capacity.request(5, **given, operation="all_reduce")  # type: ignore[arg-type]
    filled = []
    for request in (asked, replace(asked, write_padding=False)):
        plan, params = make_plan(topology, request), Params()
        fill_shape(params, topology, request, plan, 0)
        several = replace(plan, rows=2, launches=3)
        filled.append((params.scale_rows, [pad for *_, pad in later_launches(topology, request, several, 0)], tuple(params.header)))
        assert make_kernels(topology, request, plan)[0].variant == make_kernels(topology, asked, plan)[0].variant
    assert [filled[0][:2], filled[1][:2]] == [(5, [0, 5]), (0, [0, 0])]
    assert filled[0][2] == filled[1][2]
    assert capacity.signature(asked) is not capacity.signature(replace(asked, write_padding=False))


# Mistakes


def zeros(*shape: int, dtype: torch.dtype = BF16, device: str = "cpu") -> torch.Tensor:
    return torch.zeros(*shape, dtype=dtype, device=device)


Use = Callable[[collogue.Communicator, dict[str, Any]], object]


def sharded(**changes: Any) -> Use:
    """A right sharded call but for ``changes``."""
    return lambda c, g: c.all_reduce(**{**g, "residual": c.shard(g["residual"]), "sharded": True, **changes})


def scatter(**changes: Any) -> Use:
    return lambda c, g: c.reduce_scatter(**{**g, "residual": c.shard(g["residual"]), **changes})


def gather(tokens: Any = T, quant: Any = None, out: Output | None = None, **held: Any) -> Use:
    return lambda c, g: c.all_gather(Output(**held), tokens, quant=quant, out=out)


def finish(**changes: Any) -> Use:
    return lambda c, g: c.finish(**{"y": g["partial"], "norm": g["norm"], **changes})


def _gather_in_place(c: collogue.Communicator, g: dict[str, Any]) -> None:
    whole = g["partial"].clone()
    c.all_gather(Output(norm=c.shard(whole)), T, out=Output(norm=whole))


def _finish_in_place(c: collogue.Communicator, g: dict[str, Any]) -> None:
    c.finish(g["partial"], norm=g["norm"], out=Output(norm=g["partial"]))


CODES = {"codes": torch.empty(2, H, dtype=F8), "scales": torch.zeros(2, 1)}
MISTAKES: dict[str, tuple[Use, type[CollogueError], str, str]] = {
    "sharded: nothing to finish": (
        sharded(norm=None),
        ArgumentError,
        r"all_reduce\(sharded=True\) without norm= and quant=",
        "comm.reduce_scatter",
    ),
    "sharded: whole residual": (sharded(residual=zeros(T, H)), ShapeError, r"\[4, 64\]; rank \d of 2 owns 2 rows", "comm.shard(residual)"),
    "sharded: narrow residual": (sharded(residual=zeros(2, H - 8)), ShapeError, r"residual has shape \[2, 56\]", "comm.shard(residual)"),
    "sharded: residual in float32": (sharded(residual=zeros(2, H, dtype=torch.float32)), DTypeError, "residual has dtype", "convert"),
    "sharded: too many tokens": (sharded(partial=zeros(MAX_TOKENS + 1, H)), CapacityError, "at most 8 tokens", "comm.fits"),
    "sharded: keep_norm alone": (sharded(norm=None, quant=FP8PerToken(), keep_norm=True), FormatError, "keep_norm=True without", "leave"),
    "sharded: a norm of shard rows": (
        sharded(out=Output(residual=zeros(2, H), norm=zeros(2, H))),
        ShapeError,
        r"out.norm has shape \[2, 64\]",
        "without out=",
    ),
    "sharded: y of all rows": (
        sharded(out=Output(residual=zeros(T, H), norm=zeros(T, H))),
        ShapeError,
        r"needed: \[2, 64\]",
        "without out=",
    ),
    "scatter: whole residual": (scatter(residual=zeros(T, H)), ShapeError, "owns 2 rows of partial", "comm.shard(residual)"),
    "scatter: partial transposed": (scatter(partial=zeros(H, T).t()), LayoutError, "partial has strides", "contiguous"),
    "scatter: H not a multiple": (scatter(norm=None, quant=FP8Group(128)), FormatError, "blocks of 128", "multiple of 128"),
    "scatter: scales of all rows": (
        scatter(quant=FP8PerToken(), out=Output(residual=zeros(2, H), codes=CODES["codes"], scales=torch.zeros(T, 1))),
        ShapeError,
        r"out.scales has shape \[4, 1\]",
        "without out=",
    ),
    "scatter: norm is the residual": (
        lambda c, g: c.reduce_scatter(
            g["partial"], residual=g["residual"][:2], norm=g["norm"], out=Output(residual=zeros(2, H), norm=g["residual"][:2])
        ),
        OverlapError,
        "out.norm shares memory with residual",
        "in place",
    ),
    "scatter: requires grad": (scatter(partial=zeros(T, H).requires_grad_()), GradError, "partial requires grad", "no_grad"),
    "gather: no Output": (lambda c, g: c.all_gather(g["partial"], T), ArgumentError, "shard is a Tensor", "comm.reduce_scatter"),
    "gather: nothing": (gather(), ShapeError, "the shard holds nothing", "at least one"),
    "gather: tokens is no number": (gather("4", norm=zeros(2, H)), ShapeError, "tokens is '4'", "number of rows"),
    "gather: tokens is negative": (gather(-1, norm=zeros(2, H)), ShapeError, "tokens is -1", "number of rows"),
    "gather: tokens is a flag": (gather(True, norm=zeros(1, H)), ShapeError, "tokens is True", "number of rows"),
    "gather: other rows": (
        gather(6, norm=zeros(2, H)),
        ShapeError,
        r"shard.norm has shape \[2, 64\].*needed: \[3, 64\]",
        "owns 3 of 6 rows",
    ),
    "gather: whole tensor": (gather(norm=zeros(T, H)), ShapeError, r"needed: \[2, 64\]", "comm.shard"),
    "gather: two widths": (
        gather(norm=zeros(2, H - 8), residual=zeros(2, H)),
        ShapeError,
        r"shard.norm has shape \[2, 56\]",
        "owns 2 of 4",
    ),
    "gather: too many tokens": (gather(2 * MAX_TOKENS, norm=zeros(MAX_TOKENS, H)), CapacityError, r"\[16, 64\]", "comm.fits"),
    "gather: too wide": (gather(norm=zeros(2, H + 8)), CapacityError, r"\[4, 72\]", "larger max_tokens"),
    "gather: H not a multiple of 8": (gather(norm=zeros(2, 12)), ShapeError, "12 is not a positive multiple", "pad"),
    "gather: norm in float32": (
        gather(norm=zeros(2, H, dtype=torch.float32)),
        DTypeError,
        "shard.norm has dtype",
        "one communicator per dtype",
    ),
    "gather: norm elsewhere": (gather(norm=zeros(2, H, device="meta")), DeviceError, "shard.norm is on meta", "shard.norm.to('cpu')"),
    "gather: norm with gaps": (gather(norm=zeros(2, 2 * H)[:, :H]), LayoutError, "shard.norm has strides", "contiguous"),
    "gather: norm is no tensor": (gather(norm=[1.0]), ShapeError, "shard.norm must be a tensor", "flatten"),
    "gather: codes are no tensor": (gather(quant=FP8Static(1.0), codes=[1]), ShapeError, "shard.codes is not a tensor", "returned it"),
    "gather: codes without a format": (gather(**CODES), FormatError, r"holds \['codes', 'scales'\]; quant is none", "quant="),
    "gather: a format without codes": (gather(quant=FP8PerToken(), norm=zeros(2, H)), FormatError, "holds no codes", "quant="),
    "gather: codes without scales": (
        gather(quant=FP8PerToken(), codes=CODES["codes"]),
        FormatError,
        r"holds \['codes'\]",
        "scales with their codes",
    ),
    "gather: scales of a static format": (gather(quant=FP8Static(1.0), **CODES), FormatError, "quant is fp8_static", "quant="),
    "gather: a format by name": (gather(quant="fp8_per_token", **CODES), FormatError, "quant is a str", "format of the shard's codes"),
    "gather: scales of another layout": (
        gather(quant=FP8Group(32, layout="column"), codes=CODES["codes"], scales=torch.zeros(2, 2)),
        ShapeError,
        "shard.scales has shape",
        "owns 2 of 4",
    ),
    "gather: codes as bytes": (
        gather(quant=FP8Static(1.0), codes=zeros(2, H, dtype=torch.uint8)),
        DTypeError,
        "shard.codes has dtype",
        "as comm.reduce_scatter",
    ),
    "gather: scales without padding": (
        gather(quant=FP8Group(32, layout="column"), codes=CODES["codes"], scales=torch.zeros(6).as_strided((2, 2), (1, 4))),
        LayoutError,
        "shard.scales needs 32 bytes with its padding",
        "",
    ),
    "gather: requires grad": (gather(norm=zeros(2, H).requires_grad_()), GradError, "shard.norm requires grad", "no_grad"),
    "gather: out of another name": (
        gather(norm=zeros(2, H), out=Output(residual=zeros(T, H))),
        ShapeError,
        "this call has the outputs",
        "exactly",
    ),
    "gather: out of shard rows": (gather(norm=zeros(2, H), out=Output(norm=zeros(2, H))), ShapeError, r"needed: \[4, 64\]", "without out="),
    "gather: into what the shard lies in": (
        _gather_in_place,
        OverlapError,
        "out.norm shares memory with shard.norm",
        "memory of their own",
    ),
    "unshard: wrong rows": (lambda c, g: c.unshard(g["partial"], T), ShapeError, "shard.residual has shape", "comm.shard"),
    "finish: padding of fresh scales": (
        finish(quant=NVFP4(1.0), write_padding=False),
        ArgumentError,
        "write_padding=False without out=",
        "out= of an earlier call",
    ),
    "scatter: padding of fresh scales": (scatter(write_padding=False), ArgumentError, "write_padding=False without out=", "earlier call"),
    "gather: padding of fresh scales": (
        lambda c, g: c.all_gather(Output(norm=zeros(2, H)), T, write_padding=False),
        ArgumentError,
        "write_padding=False without out=",
        "earlier call",
    ),
    "sharded: padding by number": (
        sharded(write_padding=0),
        ArgumentError,
        "write_padding is 0; expected True or False",
        "out.scales",
    ),
    "finish: nothing to do": (finish(norm=None), ArgumentError, "finish without norm= and quant=", "FP8PerToken"),
    "finish: y of one dimension": (finish(y=zeros(H)), ShapeError, "y must be a tensor of shape", "x.view(-1, H)"),
    "finish: too many rows": (finish(y=zeros(MAX_TOKENS + 1, H)), CapacityError, "y has shape", "comm.fits"),
    "finish: y in float32": (finish(y=zeros(T, H, dtype=torch.float32)), DTypeError, "y has dtype", "convert"),
    "finish: y in out": (finish(out=Output(residual=zeros(T, H), norm=zeros(T, H))), ShapeError, r"has the outputs \['norm'\]", "exactly"),
    "finish: in place": (_finish_in_place, OverlapError, "out.norm shares memory with y", "memory of their own"),
    "finish: weight too short": (finish(norm=RMSNorm(zeros(H - 8))), ShapeError, "56 elements", "weight of the norm"),
    "owned_rows: no such rank": (lambda c, g: c.owned_rows(T, 2), ArgumentError, "there is no rank 2", "0 to 1"),
    "owned_rows: no number": (lambda c, g: c.owned_rows(2.0), ShapeError, "tokens is 2.0", "number of rows"),  # type: ignore[arg-type]
    "shard: no rows": (lambda c, g: c.shard(torch.tensor(1.0)), ShapeError, "takes a tensor of rows", "[T, H]"),
}


@pytest.mark.parametrize("what", MISTAKES)
def test_wrong_calls_are_refused(what: str) -> None:
    """The error and its hint on both ranks, no engine, no communication; then a right call gives the right bits."""
    use, error, message, hint = MISTAKES[what]
    launched: list[object] = []

    def rank(group: VirtualGroup) -> None:
        comm = communicator(group)
        if group.rank == 0:  # alone: a call that communicated would wait for ever
            with pytest.raises(error, match=message) as raised:
                use(comm, arguments(group.rank))
            assert type(raised.value) is error
            assert hint in str(raised.value).splitlines()[-1]
            assert not launched
        group.barrier()
        check_works(comm, quant=FP8PerToken())

    run = HostEngine.run
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(HostEngine, "run", lambda self, call, out: (launched.append(call), run(self, call, out))[1])
        run_virtual(2, rank, timeout=20)
    assert len(launched) == 2


def test_mistakes_of_the_reference() -> None:
    x = torch.zeros(T, H)
    halves = reference.reduce_scatter([x, x], quant=FP8PerToken())
    for call, error, text in (
        (lambda: reference.all_gather([]), ShapeError, "one shard per rank"),
        (lambda: reference.all_gather([Output(norm=x), Output(residual=x)]), ShapeError, "same tensors"),
        (lambda: reference.all_gather([Output(norm=x[:1]), Output(norm=x)]), ShapeError, r"norm have \[1, 4\] rows"),
        (lambda: reference.all_gather(halves), FormatError, "name the format"),
        (lambda: reference.all_gather([Output(scales=s.scales) for s in halves], quant=FP8PerToken()), ShapeError, "with their scales"),
        (lambda: reference.reduce_scatter([x, x], residual=x[:2]), ShapeError, "residual is"),
        (lambda: reference.reduce_scatter([]), ShapeError, "no partials"),
        (lambda: reference.finish(x), ArgumentError, "nothing to finish"),
        (lambda: reference.finish(x[0], quant=FP8PerToken()), DTypeError, "y is"),
    ):
        with pytest.raises(error, match=text):
            call()


def test_scales_of_no_rows_have_every_form() -> None:
    """What a rank that owns nothing passes on."""
    for quant in every_format():
        if not isinstance(quant, FP8Static):
            empty = empty_scales(quant, 0, H, "cpu")
            assert empty.numel() == 0
            assert reference.read_scales(empty, quant, 0, H).shape[0] == 0


def test_rows_that_are_only_finished_may_be_wider_than_the_communicator() -> None:
    """No workspace is used; the number of rows stays bounded."""

    def rank(group: VirtualGroup) -> None:
        with collogue.Communicator(group, max_tokens=4, hidden_size=64, dtype=torch.float32) as comm:
            y = torch.randn(4, 1000)
            quant = collogue.FP8PerToken()
            out = comm.finish(y, quant=quant)
            codes, scales = collogue.quantize(y, quant)
            assert torch.equal(out.codes.view(torch.uint8), codes.view(torch.uint8))
            assert torch.equal(out.scales, scales)  # type: ignore[arg-type]
            comm.prepare([4], operation="finish", norm=None, quant=quant, hidden_size=1000)
            with pytest.raises(CapacityError, match="at most 4 tokens"):
                comm.finish(torch.randn(5, 64), quant=quant)
            with pytest.raises(CapacityError, match=r"\[4, 128\]"):
                comm.all_reduce(torch.randn(4, 128))

    run_virtual(2, rank)

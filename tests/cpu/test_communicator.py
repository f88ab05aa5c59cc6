"""The communicator on CPU groups: outputs, ownership of tensors, plans, life cycle, real processes."""

from __future__ import annotations

import copy
import dataclasses
import gc
import random
import weakref
from typing import Any

import pytest
import torch
from ranks import HIDDEN_SIZE, MAX_TOKENS, arguments, check_works, communicator, expected, gloo_rank
from samples import every_format, formats_by_label, same

from collogue import Communicator
from collogue.contract.quant import MXFP4, NVFP4, FP8Group, FP8PerToken, FP8Static, Quant
from collogue.contract.spec import Output, RMSNorm
from collogue.errors import ArgumentError, CapacityError, ClosedError, FormatError, GradError, MismatchedCall, ShapeError
from collogue.formats import empty_scales, scale_storage
from collogue.testing import VirtualGroup, run_virtual
from collogue.testing.compare import compare, differing
from collogue.testing.processes import run_processes

# Outputs


def test_an_output_that_requires_grad_is_found_before_anything_is_sent() -> None:
    def rank(group: VirtualGroup) -> None:
        comm, given = communicator(group), arguments(group.rank, 2)
        fresh = comm.all_reduce(**given)
        with torch.enable_grad(), pytest.raises(GradError, match=r"out\.residual requires grad"):
            comm.all_reduce(**given, out=dataclasses.replace(fresh, residual=torch.nn.Parameter(torch.empty_like(fresh.residual))))  # type: ignore[arg-type]
        comm.all_reduce(**given)

    run_virtual(2, rank)


@pytest.mark.parametrize("world_size", range(1, 9))
def test_every_world_size_gives_the_reference_on_every_rank(world_size: int) -> None:
    run_virtual(world_size, lambda group: check_works(communicator(group), quant=NVFP4(3.0)))


@formats_by_label
@pytest.mark.parametrize("keep_norm", [False, True])
def test_every_format(quant: Quant, keep_norm: bool) -> None:
    def rank(group: VirtualGroup) -> None:
        given = {**arguments(group.rank), "quant": quant, "keep_norm": keep_norm}
        differences = compare(communicator(group).all_reduce(**given), expected(2, given))
        assert set(differences) == {"residual", "codes"} | ({"norm"} if keep_norm else set()) | (
            set() if isinstance(quant, FP8Static) else {"scales"}
        )
        assert not differing(differences), differences

    run_virtual(2, rank)


def test_outputs_follow_the_arguments() -> None:
    def rank(group: VirtualGroup) -> None:
        comm, given = communicator(group), arguments(group.rank)
        partial, residual, norm = given["partial"], given["residual"], given["norm"]
        assert [name for name, _ in comm.all_reduce(partial).items()] == ["reduced"]
        assert [name for name, _ in comm.all_reduce(partial, residual=residual).items()] == ["residual"]
        assert [name for name, _ in comm.all_reduce(partial, norm=norm).items()] == ["residual", "norm"]
        assert [name for name, _ in comm.all_reduce(partial, quant=FP8Static(1.0)).items()] == ["reduced", "codes"]

    run_virtual(2, rank)


def test_calls_may_be_narrower_and_shorter() -> None:
    def rank(group: VirtualGroup) -> None:
        comm = communicator(group)
        for tokens, hidden_size in ((1, 8), (MAX_TOKENS, 8), (3, 24), (MAX_TOKENS, HIDDEN_SIZE)):
            given = arguments(group.rank, tokens, hidden_size=hidden_size)
            assert not differing(compare(comm.all_reduce(**given), expected(2, given)))

    run_virtual(2, rank)


def test_no_tokens_return_empty_outputs_without_communication() -> None:
    def rank(group: VirtualGroup) -> None:
        comm = communicator(group)
        if group.rank == 0:  # alone: a call that communicated would wait for ever
            for quant in (None, *every_format()):
                out = comm.all_reduce(**arguments(0, 0), quant=quant, keep_norm=quant is not None)
                assert tuple(out.norm.shape) == (0, HIDDEN_SIZE)  # type: ignore[union-attr]
                assert all(tensor.numel() == 0 for _, tensor in out.items())
                assert not differing(compare(out, expected(2, {**arguments(0, 0), "quant": quant, "keep_norm": quant is not None})))
            given = Output(reduced=torch.empty(0, HIDDEN_SIZE, dtype=torch.bfloat16))
            assert comm.all_reduce(arguments(0, 0)["partial"], out=given) is given
        group.barrier()
        check_works(comm)

    run_virtual(2, rank, timeout=20)


def test_a_world_of_one_communicates_nothing() -> None:
    def rank(group: VirtualGroup) -> None:
        comm = communicator(group)
        assert comm.explain(4).bytes_sent == 0
        for name in ("all_gather", "all_gather_object", "barrier", "exchange_rows"):
            setattr(group, name, None)  # calling it would raise
        check_works(comm, quant=MXFP4("ceil"))

    run_virtual(1, rank)


def test_inputs_are_not_modified_and_outputs_are_the_callers() -> None:
    """The outputs of 100 calls of many shapes, kept and compared afterwards."""

    def rank(group: VirtualGroup) -> None:
        comm, rng = communicator(group), random.Random(0)
        formats: list[Quant | None] = [None, *every_format()]
        kept: list[tuple[Output, dict[str, Any], int]] = []
        for seed in range(100):
            given = {**arguments(group.rank, rng.randint(1, MAX_TOKENS), seed=seed), "quant": rng.choice(formats)}
            kept.append((comm.all_reduce(**given), given, seed))
        for out, given, seed in kept:
            differences = compare(out, expected(2, given, seed=seed))
            assert not differing(differences), (seed, differences)
            fresh = arguments(group.rank, given["partial"].shape[0], seed=seed)
            assert same(given["partial"], fresh["partial"])
            assert same(given["residual"], fresh["residual"])
        addresses = {tensor.data_ptr() for out, _, _ in kept for _, tensor in out.items()}
        assert len(addresses) == sum(len(list(out.items())) for out, _, _ in kept)

    run_virtual(2, rank)


# Preallocated outputs


def poisoned(out: Output) -> Output:
    """Tensors of the same form, every byte 0x5A, the padding of the scales too."""
    result = Output()
    for name, tensor in out.items():
        copy = torch.empty_like(tensor) if name != "scales" else _empty_like_scales(tensor)
        (scale_storage(copy) if name == "scales" else copy.view(torch.uint8)).fill_(0x5A)
        setattr(result, name, copy)
    return result


def _empty_like_scales(scales: torch.Tensor) -> torch.Tensor:
    elements = scale_storage(scales).numel() // scales.element_size()
    return torch.empty(elements, dtype=scales.dtype).as_strided(scales.shape, scales.stride())


@pytest.mark.parametrize("tokens", [1, 3, 8])
@pytest.mark.parametrize("group_size", [32, 64])
def test_given_outputs_are_written_with_all_padding(tokens: int, group_size: int) -> None:
    """``group_size`` 64 is the whole row: a column-major scale tensor of one column, which counts as contiguous."""

    def rank(group: VirtualGroup) -> None:
        comm = communicator(group)
        for quant in every_format(group_size):
            given = {**arguments(group.rank, tokens), "quant": quant, "keep_norm": True}
            fresh = comm.all_reduce(**given)
            out = poisoned(fresh)
            assert comm.all_reduce(**given, out=out) is out
            differences = compare(out, fresh)
            assert not differing(differences), (quant.label, differences)

    run_virtual(2, rank)


def test_the_residual_may_be_updated_in_place() -> None:
    def rank(group: VirtualGroup) -> None:
        comm, given = communicator(group), arguments(group.rank)
        wanted = expected(2, given)
        residual = given["residual"]
        out = comm.all_reduce(**given, out=Output(residual=residual, norm=torch.empty_like(residual)))
        assert out.residual is residual
        assert not differing(compare(out, wanted))

    run_virtual(2, rank)


# Capacity and plans


def test_fits_is_exact() -> None:
    def rank(group: VirtualGroup) -> None:
        comm = communicator(group, max_tokens=3, hidden_size=16)
        for tokens in range(6):
            for hidden_size in (8, 16, 24):
                partial = torch.zeros(tokens, hidden_size, dtype=torch.bfloat16)
                if comm.fits(tokens, hidden_size):
                    comm.all_reduce(partial)
                else:
                    with pytest.raises(CapacityError):
                        comm.all_reduce(partial)
        assert [t for t in range(-2, 6) if comm.fits(t)] == [0, 1, 2, 3]
        assert [h for h in range(-8, 32) if comm.fits(1, h)] == [8, 16]
        for shape in ((1.5,), ("1",), (None,), (True,), (1, 8.0), (1, "8"), (1, True)):
            with pytest.raises(ShapeError, match="is not a whole number"):
                comm.fits(*shape)  # type: ignore[arg-type]

    run_virtual(2, rank)


def test_explain_is_frozen_and_the_same_on_every_rank() -> None:
    def rank(group: VirtualGroup) -> Any:
        comm = communicator(group)
        plan = comm.explain(4)
        assert plan.algorithm == "reference"
        assert plan.bytes_sent == 2 * 4 * HIDDEN_SIZE * 2
        assert plan.predicted_us >= plan.floor_us > 0
        assert "CPU" in plan.why
        for field in dataclasses.fields(plan):
            with pytest.raises(dataclasses.FrozenInstanceError):
                setattr(plan, field.name, None)
        with pytest.raises(CapacityError, match="hint: the communicator was made for 8 tokens"):
            comm.explain(MAX_TOKENS + 1)
        with pytest.raises(FormatError):
            comm.explain(1, quant=FP8Group(48))
        return plan

    plans = run_virtual(3, rank)
    assert plans[0] == plans[1] == plans[2]


def test_prepare_checks_what_it_is_asked_for() -> None:
    def rank(group: VirtualGroup) -> None:
        comm = communicator(group)
        norm = RMSNorm(torch.ones(HIDDEN_SIZE))
        comm.prepare(4, norm=norm, quant=FP8PerToken(), keep_norm=True)
        comm.prepare(tokens=[1, 2, MAX_TOKENS], residual=False)
        comm.prepare(range(1, 4), hidden_size=24)
        with pytest.raises(CapacityError, match="9 tokens"):
            comm.prepare([1, MAX_TOKENS + 1])
        with pytest.raises(FormatError, match="multiple of 48"):
            comm.prepare(1, quant=FP8Group(48))
        with pytest.raises(FormatError, match="keep_norm"):
            comm.prepare(1, keep_norm=True)
        check_works(comm)

    run_virtual(2, rank)


@pytest.mark.parametrize("what", ["prepare", "empty", "explain"])
def test_shapes_that_are_none_are_refused(what: str) -> None:
    """Without tensors too, a mistake has the class that it has in a call."""

    def rank(group: VirtualGroup) -> None:
        ask: Any = getattr(communicator(group), what)
        for given, error, message in (
            ({"tokens": True}, ShapeError, "tokens is True"),
            ({"tokens": -1}, ShapeError, "tokens is -1"),
            ({"tokens": 1.5}, ShapeError, "tokens is 1.5"),
            ({"tokens": 1, "hidden_size": 8.0}, ShapeError, "hidden_size is 8.0, which is not a whole"),
            ({"tokens": 1, "norm": "rms"}, ArgumentError, "norm: expected collogue.RMSNorm, got str"),
            ({"tokens": 1, "quant": "nvfp4"}, FormatError, "quant is a str"),
            ({"tokens": 1, "quant": NVFP4}, FormatError, "quant is the class NVFP4"),
        ):
            with pytest.raises(error, match=message):
                ask(**given)

    run_virtual(1, rank)


# Life cycle


def test_a_closed_communicator_says_so() -> None:
    def rank(group: VirtualGroup) -> None:
        with communicator(group) as comm:
            check_works(comm)
        comm.close()  # again: nothing happens
        partial = arguments(group.rank)["partial"]
        for use in (lambda: comm.all_reduce(partial), lambda: comm.prepare(1), lambda: comm.explain(1), comm.check, comm.reset):
            with pytest.raises(ClosedError) as raised:
                use()
            assert str(raised.value).splitlines()[-1] == "hint: make a new collogue.Communicator"
        check_works(communicator(group))

    run_virtual(2, rank)


def test_communicators_of_one_group_do_not_disturb_each_other() -> None:
    def rank(group: VirtualGroup) -> None:
        first, second = communicator(group), communicator(group, max_tokens=4)
        for seed in range(3):
            check_works(first, seed=seed)
            check_works(second, seed=seed)
        first.close()
        check_works(second)

    run_virtual(2, rank)


def test_sub_groups() -> None:
    def rank(group: VirtualGroup) -> tuple[int, int] | None:
        halves = [group.subgroup([0, 1]), group.subgroup([3, 2])]
        mine = next(half for half in halves if half is not None)
        comm = communicator(mine)
        check_works(comm, quant=FP8PerToken())
        whole = communicator(group)
        check_works(whole)
        check_works(comm, seed=1)
        return comm.rank, comm.world_size

    assert run_virtual(4, rank) == [(0, 2), (1, 2), (1, 2), (0, 2)]


# Ranks that disagree

OTHER_CALLS: dict[str, dict[str, Any]] = {
    "tokens": {"partial": torch.zeros(2, HIDDEN_SIZE, dtype=torch.bfloat16), "residual": torch.zeros(2, HIDDEN_SIZE, dtype=torch.bfloat16)},
    "hidden_size": {
        "partial": torch.zeros(4, 32, dtype=torch.bfloat16),
        "residual": torch.zeros(4, 32, dtype=torch.bfloat16),
        "norm": RMSNorm(torch.ones(32)),
    },
    "residual": {"residual": None},
    "norm": {"norm": None, "keep_norm": False},
    "eps": {"norm": RMSNorm(torch.ones(HIDDEN_SIZE), eps=1e-5)},
    "weight_offset": {"norm": RMSNorm(torch.ones(HIDDEN_SIZE), weight_offset=1.0)},
    "quant": {"quant": FP8Static(1.0)},
    "layout": {"quant": NVFP4(1.0, "linear")},
    "number": {"quant": NVFP4(2.0)},
    "no quant": {"quant": None, "keep_norm": False},
    "keep_norm": {"keep_norm": False},
}


@pytest.mark.parametrize("what", OTHER_CALLS)
def test_mismatched_calls_raise_on_every_rank_with_both_sides(what: str) -> None:
    def rank(group: VirtualGroup) -> str:
        comm = communicator(group)
        given = {**arguments(group.rank), "quant": NVFP4(1.0), "keep_norm": True}
        if group.rank == 1:
            given.update(OTHER_CALLS[what])
        with pytest.raises(MismatchedCall) as raised:
            comm.all_reduce(**given)
        for again in (comm.check, lambda: comm.all_reduce(**arguments(group.rank))):
            with pytest.raises(MismatchedCall, match="rank 0 called with"):
                again()
        comm.reset()
        comm.check()
        check_works(comm)
        return str(raised.value)

    texts = run_virtual(3, rank)
    assert len(set(texts)) == 1
    message, hint = texts[0].splitlines()
    left, right = message.removeprefix("rank 0 called with (").split("), rank 1 with (")
    assert left != right.removesuffix(")")
    assert hint == "hint: every rank of the group must make the same call: same operation, tokens, hidden size and epilogue"


# Real processes


@pytest.mark.slow
def test_three_processes_over_gloo() -> None:
    results = run_processes(3, gloo_rank)
    assert [r["mismatch"] for r in results] == [results[0]["mismatch"]] * 3
    assert "tokens=1" in results[0]["mismatch"]
    assert "rank 1 with (all_reduce, tokens=2" in results[0]["mismatch"]
    assert (results[0]["pair"], results[2]["pair"]) == ((0, 2), (1, 2))
    assert results[1]["outside"] == (
        "GroupError",
        "this rank is not in the group\nhint: make the communicator only on the ranks of the group",
    )
    assert all(r["gathered"] for r in results)


def test_scales_keep_their_padding() -> None:
    """What :func:`poisoned` relies on."""
    scales = empty_scales(FP8Group(64, layout="column"), 3, 64, "cpu")
    assert tuple(scales.shape) == (3, 1)
    assert scale_storage(scales).numel() == 4 * 4


def test_a_closed_communicator_lets_go_of_its_group() -> None:
    """A gloo group that is alive after ``destroy_process_group`` aborts its process at the interpreter's end, one time in ten."""

    def rank(group: VirtualGroup) -> bool:
        own = copy.copy(group)
        comm = Communicator(own, max_tokens=4, hidden_size=16)
        comm.all_reduce(torch.ones(1, 16, dtype=torch.bfloat16))
        left = weakref.ref(own)
        del own
        assert left() is not None
        comm.close()
        gc.collect()
        return left() is None

    assert run_virtual(2, rank) == [True, True]

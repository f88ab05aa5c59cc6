"""FlashInfer's calls with experts: patterns 6, 7 and 12 give what the communicator gives, and their bounds hold."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import pytest
import torch
from samples import same

import collogue.flashinfer as comm
from collogue import ExpertCombine, ExpertReduce, reference
from collogue.contract.quant import NVFP4, FP8Static, Quant
from collogue.contract.spec import Output, RMSNorm
from collogue.errors import ArgumentError, CollogueError, DTypeError, OverlapError, ScaleError, ShapeError, UnsupportedError
from collogue.formats import empty_scales, scale_storage
from collogue.operations import Operations
from collogue.testing import VirtualGroup, run_virtual

TOKENS, WIDTH, EXPERTS, SLOTS, ROWS = 5, 64, 3, 4, 23
MULTIPLIER, DIVISOR = 53.7, 0.0112


def make(group: Any, dtype: torch.dtype = torch.bfloat16) -> comm.TRTLLMAllReduceFusionWorkspace:
    return comm.create_allreduce_fusion_workspace(
        world_size=group.size, rank=group.rank, max_token_num=8, hidden_dim=WIDTH, dtype=dtype, group=group
    )


def normal(seed: int, *shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def common(dtype: torch.dtype = torch.bfloat16) -> dict[str, torch.Tensor]:
    return {"residual_in": normal(90, TOKENS, WIDTH, dtype=dtype), "rms_gamma": normal(91, WIDTH, dtype=dtype)}


def reduction(rank: int, dtype: torch.dtype = torch.bfloat16) -> dict[str, Any]:
    """Pattern 6's own arguments; an expert that a token does not use has NaN there."""
    weights = normal(100 + rank, EXPERTS, TOKENS, dtype=torch.float32)
    weights[1, 2] = 0.0
    rows = normal(110 + rank, EXPERTS, TOKENS, WIDTH, dtype=dtype)
    rows[1, 2] = torch.nan
    return {
        "moe_reduction_device_num_experts": EXPERTS,
        "moe_reduction_scale_input": weights,
        "moe_reduction_active_experts_token_input": rows,
        "moe_reduction_token_input": normal(120 + rank, TOKENS, WIDTH, dtype=dtype),
    }


def reduced(given: dict[str, Any]) -> ExpertReduce:
    rows, weights = given["moe_reduction_active_experts_token_input"], given["moe_reduction_scale_input"]
    return ExpertReduce(rows, weights, given["moe_reduction_token_input"])


def finalization(rank: int, dtype: torch.dtype = torch.bfloat16) -> dict[str, Any]:
    """Pattern 7's: more rows than any index names, which hold NaN, duplicates, and slots without a contribution."""
    index = torch.randint(-1, ROWS - 3, (TOKENS, SLOTS), generator=torch.Generator().manual_seed(rank), dtype=torch.int32)
    index[0], index[1, :2] = -1, 5
    rows = normal(130 + rank, ROWS, WIDTH, dtype=dtype)
    rows[ROWS - 3 :] = torch.nan
    return {
        "input": rows,
        "expanded_idx_to_permuted_idx": index,
        "expert_scale_factor": normal(140 + rank, TOKENS, SLOTS, dtype=dtype),
        "shared_expert_output": normal(150 + rank, TOKENS, WIDTH, dtype=dtype),
    }


def combined(given: dict[str, Any], scaling: float = 1.0) -> ExpertCombine:
    return ExpertCombine(
        given["input"], given["expanded_idx_to_permuted_idx"], given["expert_scale_factor"], given["shared_expert_output"], scaling
    )


def buffers(*names: str, quant: Quant | None = None) -> dict[str, torch.Tensor]:
    """What a FlashInfer user allocates, every byte poisoned."""
    made = {name: torch.empty(TOKENS, WIDTH, dtype=torch.bfloat16) for name in names}
    if isinstance(quant, NVFP4):
        made["quant_out"] = torch.empty(TOKENS, WIDTH // 2, dtype=torch.uint8)
        made["scale_out"] = empty_scales(quant, TOKENS, WIDTH, "cpu")
    for name, tensor in made.items():
        (scale_storage(tensor) if name == "scale_out" else tensor.view(torch.uint8)).fill_(0x5A)
    return made


def expected(terms: list[Any], given: dict[str, torch.Tensor], quant: Quant | None = None, **options: Any) -> Output:
    norm = RMSNorm(given["rms_gamma"], **options)
    return reference.all_reduce(terms, residual=given["residual_in"], norm=norm, quant=quant, keep_norm=quant is not None)


# Results


@pytest.mark.parametrize("world", [2, 3])
@pytest.mark.parametrize(
    "quant", [None, NVFP4(MULTIPLIER), NVFP4(MULTIPLIER, "8x4"), NVFP4(MULTIPLIER, "linear")], ids=lambda q: q.label if q else "none"
)
def test_pattern_6(quant: NVFP4 | None, world: int) -> None:
    terms = [reduced(reduction(r)) for r in range(world)]
    layout = {} if quant is None else {"layout_code": ["128x4", "8x4", "linear"].index(quant.layout), "scale_factor": MULTIPLIER}

    def rank(group: VirtualGroup) -> None:
        given, out = common(), buffers("output", "residual_out", "norm_out", quant=quant)
        right = expected(terms, given, quant)
        unread = torch.full((1,), torch.nan)
        asked = {"input": unread, "workspace": make(group), "pattern": 6, **layout}
        assert comm.allreduce_fusion(**asked, **given, **reduction(group.rank), **out) is out["norm_out"]
        check(out, right)
        assert same(out["output"], reference.all_reduce(terms).reduced)

    run_virtual(world, rank)


def check(out: dict[str, torch.Tensor], right: Output) -> None:
    for name, tensor in (("residual_out", right.residual), ("norm_out", right.norm), ("quant_out", right.codes)):
        assert name not in out or same(out[name], tensor), name
    if "scale_out" in out:
        assert torch.equal(scale_storage(out["scale_out"]), scale_storage(right.scales))  # type: ignore[arg-type]


@pytest.mark.parametrize("world", [2, 3])
@pytest.mark.parametrize("lacking", [(), ("expert_scale_factor",), ("shared_expert_output",), ("residual_out", "norm_out")])
def test_pattern_7(lacking: tuple[str, ...], world: int) -> None:
    every = [finalization(r) | dict.fromkeys(lacking) for r in range(world)]
    terms = [combined(each) for each in every]

    def rank(group: VirtualGroup) -> None:
        given = common()
        out = {name: tensor for name, tensor in buffers("residual_out", "norm_out").items() if name not in lacking}
        own = {name: every[group.rank][name] for name in finalization(0)}
        found = comm.allreduce_fusion(workspace=make(group), pattern=7, weight_bias=1.0, rms_eps=1e-3, **own, **given, **out)
        right = expected(terms, given, eps=1e-3, weight_offset=1.0)
        assert same(found, right.norm)
        assert not out or found is out["norm_out"]
        check(out, right)

    run_virtual(world, rank)


@pytest.mark.parametrize("factor", [DIVISOR, torch.tensor([DIVISOR])])
def test_pattern_12(factor: Any) -> None:
    terms = [combined(finalization(r)) for r in range(2)]

    def rank(group: VirtualGroup) -> None:
        given, out = common(), buffers("residual_out")
        right = expected(terms, given, FP8Static(DIVISOR))
        for codes in (torch.empty(TOKENS, WIDTH, dtype=torch.float8_e4m3fn), None):
            more = {} if codes is None else {"quant_out": codes}
            found = comm.allreduce_fusion(
                workspace=make(group), pattern=12, scale_factor=factor, **finalization(group.rank), **given, **out, **more
            )
            assert same(found, right.codes)
            assert codes is None or found is codes
            check(out, right)

    run_virtual(2, rank)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_older_reduction(dtype: torch.dtype) -> None:
    """One-dimensional tensors, as FlashInfer's tests pass them."""
    terms = [reduced(reduction(r, dtype)) for r in range(2)]

    def rank(group: VirtualGroup) -> None:
        given, own = common(dtype), reduction(group.rank, dtype)
        out = {name: torch.empty(TOKENS * WIDTH, dtype=dtype) for name in ("moe_allreduce_out", "residual_out", "norm_out")}
        flat = {name: tensor.view(-1) for name, tensor in (own | given).items() if isinstance(tensor, torch.Tensor)}
        older(make(group, dtype), **flat, **out)
        right = expected(terms, given)
        for name, tensor in (("moe_allreduce_out", reference.all_reduce(terms).reduced), *right.items()):
            found = out[name if name in out else f"{name}_out"]
            assert same(found.view(TOKENS, WIDTH), tensor), name

    run_virtual(2, rank)


def older(workspace: comm.TRTLLMAllReduceFusionWorkspace, **changed: Any) -> None:
    arguments: dict[str, Any] = {
        "world_size": workspace.world_size,
        "world_rank": workspace.rank,
        "token_num": TOKENS,
        "hidden_dim": WIDTH,
        "workspace_ptrs": workspace.workspace_tensor,
        "launch_with_pdl": True,
        "rms_eps": 1e-6,
        "scale_factor": 1.0,
        "moe_reduction_device_num_experts": EXPERTS,
        "layout_code": None,
        "moe_allreduce_out": None,
        "residual_out": None,
        "quant_out": None,
        "scale_out": None,
    }
    comm.trtllm_moe_allreduce_fusion(**arguments | changed)


@pytest.mark.parametrize("weights", [torch.bfloat16, torch.float32, None])
@pytest.mark.parametrize("factor", [None, 1.0, 2.5])
def test_the_older_finalization(factor: float | None, weights: torch.dtype | None) -> None:
    def own(rank: int) -> dict[str, Any]:
        given = finalization(rank)
        return given | {"expert_scale_factor": None if weights is None else given["expert_scale_factor"].to(weights)}

    terms = [combined(own(r), 1.0 if factor is None else factor) for r in range(2)]

    def rank(group: VirtualGroup) -> None:
        given, out = common(), buffers("residual_out", "norm_out")
        finalize(make(group), own(group.rank), given, **out, routed_scaling_factor=factor, weight_bias=1.0)
        check(out, expected(terms, given, weight_offset=1.0))

    run_virtual(2, rank)


def finalize(workspace: comm.TRTLLMAllReduceFusionWorkspace, own: dict[str, Any], given: dict[str, Any], **changed: Any) -> None:
    arguments: dict[str, Any] = {
        "allreduce_in": own["input"],
        "residual_in": given["residual_in"],
        "norm_weight": given["rms_gamma"],
        "residual_out": None,
        "quant_out": None,
        "scale_out": None,
        "workspace_ptrs": workspace.workspace_tensor,
        "launch_with_pdl": False,
        "world_rank": workspace.rank,
        "world_size": workspace.world_size,
        "eps": 1e-6,
        "routed_scaling_factor": None,
    }
    arguments |= {name: tensor for name, tensor in own.items() if name != "input"}
    comm.trtllm_moe_finalize_allreduce_fusion(**arguments | changed)


def test_a_rank_without_local_experts() -> None:
    def own(rank: int) -> dict[str, Any]:
        given = finalization(rank)
        if rank == 1:
            given |= {"input": given["input"][:0], "shared_expert_output": None}
            given["expanded_idx_to_permuted_idx"].fill_(-1)
        return given

    terms = [combined(own(r)) for r in range(2)]

    def rank(group: VirtualGroup) -> None:
        given = common()
        found = comm.allreduce_fusion(workspace=make(group), pattern=7, **own(group.rank), **given)
        assert same(found, expected(terms, given).norm)

    run_virtual(2, rank)


@pytest.mark.parametrize("pdl", [False, True])
def test_launch_with_pdl_says_when_the_weight_is_read(pdl: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[bool] = []
    all_reduce = Operations.all_reduce

    def look(self: Operations, *given: Any, norm: RMSNorm, **named: Any) -> Output:
        seen.append(norm.prefetch)
        return all_reduce(self, *given, norm=norm, **named)

    monkeypatch.setattr(Operations, "all_reduce", look)

    def rank(group: VirtualGroup) -> None:
        for pattern, own in ((6, {"input": torch.empty(0)} | reduction(0)), (7, finalization(0))):
            out = buffers("norm_out")
            comm.allreduce_fusion(workspace=make(group), pattern=pattern, launch_with_pdl=pdl, **own, **common(), **out)

    run_virtual(1, rank)
    assert seen == [pdl, pdl]


def test_outputs_over_the_inputs() -> None:
    """Whatever the call reads may be written, once it has been read."""

    def rank(group: VirtualGroup) -> None:
        given, own = common(), finalization(group.rank)
        right = expected([combined(finalization(r)) for r in range(2)], given)
        comm.allreduce_fusion(
            workspace=make(group), pattern=7, **own, **given, norm_out=own["shared_expert_output"], residual_out=given["residual_in"]
        )
        assert same(own["shared_expert_output"], right.norm)
        assert same(given["residual_in"], right.residual)
        given, own = common(), reduction(group.rank)
        terms = [reduced(reduction(r)) for r in range(2)]
        right, rows = expected(terms, given), own["moe_reduction_active_experts_token_input"]
        over = {"norm_out": own["moe_reduction_token_input"], "output": rows[0], "residual_out": rows[1]}
        comm.allreduce_fusion(input=rows, workspace=make(group), pattern=6, **own, **given, **over)
        assert same(over["norm_out"], right.norm)
        assert same(over["residual_out"], right.residual)
        assert same(over["output"], reference.all_reduce(terms).reduced)

    run_virtual(2, rank)


# Errors


def _without(pattern: int, *names: str) -> list[Any]:
    return [pytest.param(pattern, {name: None}, ArgumentError, f"{name} is required for pattern {pattern}") for name in names]


@pytest.mark.parametrize(
    ("pattern", "change", "error", "says"),
    [
        *_without(6, *reduction(0), "residual_in", "rms_gamma", "norm_out"),
        *_without(7, "expanded_idx_to_permuted_idx", "residual_in", "rms_gamma"),
        *_without(12, "expanded_idx_to_permuted_idx", "residual_in", "rms_gamma", "scale_factor"),
        (6, {"moe_reduction_device_num_experts": 4}, ShapeError, "active_experts_token_input has shape"),
        (6, {"moe_reduction_device_num_experts": 0}, ArgumentError, "moe_reduction_device_num_experts is 0"),
        (6, {"moe_reduction_device_num_experts": torch.tensor(EXPERTS)}, ArgumentError, "an int"),
        (6, {"moe_reduction_scale_input": torch.ones(EXPERTS, TOKENS, dtype=torch.float16)}, DTypeError, "weights has dtype"),
        (6, {"quant_out": torch.empty(TOKENS, WIDTH // 2, dtype=torch.uint8)}, ShapeError, "scale_out"),
        (6, {"quant_out": torch.empty(0), "scale_factor": torch.tensor(2.0)}, ScaleError, "pattern 6 is a tensor"),
        (7, {"expanded_idx_to_permuted_idx": torch.zeros(TOKENS, SLOTS, dtype=torch.int64)}, DTypeError, "int32"),
        (7, {"expanded_idx_to_permuted_idx": torch.zeros(TOKENS + 1, SLOTS, dtype=torch.int32)}, ShapeError, "expanded_idx"),
        (7, {"expanded_idx_to_permuted_idx": torch.zeros(TOKENS, 17, dtype=torch.int32)}, ShapeError, "expert_scale_factor"),
        (7, {"expert_scale_factor": torch.ones(TOKENS, SLOTS, dtype=torch.float16)}, DTypeError, "weights has dtype"),
        (7, {"shared_expert_output": torch.ones(TOKENS, WIDTH)}, DTypeError, "shared_expert has dtype"),
        (7, {"input": torch.ones(ROWS, WIDTH + 8, dtype=torch.bfloat16)}, ShapeError, "expert outputs"),
        (7, {"quant_out": torch.empty(0)}, UnsupportedError, "pattern 7"),
        (7, {"scale_out": torch.empty(0)}, UnsupportedError, "pattern 7"),
        (7, {"moe_finalize_backend": "nccl"}, ArgumentError, "moe_finalize_backend is 'nccl'"),
        (12, {"norm_out": torch.empty(TOKENS, WIDTH, dtype=torch.bfloat16)}, ArgumentError, "pattern 12"),
        (12, {"scale_factor": 0.0}, ScaleError, "positive"),
    ],
)
def test_wrong_calls_raise_before_anything_is_sent(pattern: int, change: dict[str, Any], error: type[CollogueError], says: str) -> None:
    def rank(group: VirtualGroup) -> None:
        workspace = make(group)
        if group.rank == 0:  # alone: a call that communicated would wait for ever
            own = {"input": torch.empty(0), **reduction(0), **buffers("norm_out")} if pattern == 6 else finalization(0)
            scale = {"scale_factor": DIVISOR} if pattern == 12 else {}
            with pytest.raises(error, match=says) as raised:
                comm.allreduce_fusion(**{"workspace": workspace, "pattern": pattern, **own, **common(), **scale} | change)
            assert "hint:" in str(raised.value)
        group.barrier()

    run_virtual(2, rank, timeout=20)


def test_wrong_older_calls() -> None:
    def rank(group: VirtualGroup) -> None:
        workspace, given, out = make(group), common(), buffers("norm_out")
        first: Callable[..., None] = lambda **more: older(workspace, **(reduction(0) | given | out | more))  # noqa: E731
        second: Callable[..., None] = lambda **more: finalize(workspace, finalization(0), given, **(out | more))  # noqa: E731
        for call in (first, second):
            with pytest.raises(ArgumentError, match="norm_out is required"):
                call(norm_out=None)
            with pytest.raises(ArgumentError, match="backend is 'nccl'"):
                call(backend="nccl")
            with pytest.raises(ArgumentError, match="rank 1 of 1 calls with the workspace of rank 0"):
                call(world_rank=1)
            with pytest.raises(UnsupportedError, match="workspace_ptrs"):
                call(workspace_ptrs=torch.zeros(4))
            with pytest.raises(OverlapError):
                call(residual_out=out["norm_out"])
            call(backend="cake")
        names = [n for n, p in inspect.signature(comm.trtllm_allreduce_fusion).parameters.items() if p.default is inspect.Parameter.empty]
        asked = dict.fromkeys(names) | {"workspace_ptrs": workspace.workspace_tensor, "world_size": 1, "world_rank": 0, "pattern_code": 6}
        with pytest.raises(ArgumentError, match="pattern 6 takes experts"):
            comm.trtllm_allreduce_fusion(**asked)

    run_virtual(1, rank)


# How far FlashInfer's roundings lead away


class Rounded:
    """A value as FlashInfer's ``trtllm`` kernels hold it, rounded after every operation, and how far it may be from the exact one."""

    def __init__(self, dtype: torch.dtype) -> None:
        self.dtype, self.unit = dtype, torch.finfo(dtype).eps / 2
        self.value, self.bound = torch.zeros(TOKENS, WIDTH), torch.zeros(TOKENS, WIDTH, dtype=torch.float64)

    def _round(self, exact: torch.Tensor) -> torch.Tensor:
        self.bound += exact.abs().double() * self.unit + torch.finfo(self.dtype).smallest_normal
        return exact.to(self.dtype).float()

    def add(self, rows: torch.Tensor, weight: torch.Tensor | None = None) -> None:
        term = rows.float() if weight is None else self._round(rows.float() * weight.float()[:, None])
        self.value = self._round(self.value + term)

    def scale(self, factor: float) -> None:
        self.bound *= abs(factor)
        self.value = self._round(self.value * factor)


def theirs(term: ExpertCombine | ExpertReduce, dtype: torch.dtype) -> tuple[Rounded, torch.Tensor]:
    """FlashInfer's term of a rank, and the sum of the magnitudes that are added, for the error of float32 in Collogue's."""
    held, magnitudes = Rounded(dtype), torch.zeros(TOKENS, WIDTH, dtype=torch.float64)
    if isinstance(term, ExpertReduce):
        for rows, weight in zip(term.expert_output, term.weights, strict=True):
            held.add(rows.nan_to_num(0.0), weight)
            magnitudes += (rows.nan_to_num(0.0).double() * weight.double()[:, None]).abs()
        held.add(term.token_input)
        return held, magnitudes + term.token_input.double().abs()
    assert term.weights is not None
    assert term.shared_expert is not None
    for index, weight in zip(term.index.T, term.weights.T, strict=True):
        rows = torch.where(index[:, None] < 0, 0.0, term.expert_output[index.clamp(min=0)].float())
        held.add(rows, weight)
        magnitudes += (rows.double() * weight.double()[:, None]).abs()
    held.scale(term.scaling)
    held.add(term.shared_expert)
    return held, magnitudes * abs(term.scaling) + term.shared_expert.double().abs()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("world", [2, 4])
@pytest.mark.parametrize("pattern", [6, 7])
def test_the_distance_from_flashinfers_rounding_is_bounded(pattern: int, world: int, dtype: torch.dtype) -> None:
    """FlashInfer rounds every product and every sum to the data's dtype; Collogue rounds each rank's term once, and y once.

    Each rounding is off by at most half a unit in the last place of what it rounds. Collogue's float32 operations, fewer than 16 a
    term, are off by ``2**-24`` of the magnitudes each.
    """
    terms: list[Any] = [reduced(reduction(r, dtype)) if pattern == 6 else combined(finalization(r, dtype), 2.5) for r in range(world)]
    given = common(dtype)
    mine = reference.all_reduce(terms, residual=given["residual_in"]).residual
    assert mine is not None
    unit, total, bound = torch.finfo(dtype).eps / 2, Rounded(dtype), torch.zeros(TOKENS, WIDTH, dtype=torch.float64)
    for term in terms:
        held, magnitudes = theirs(term, dtype)
        own = reference.all_reduce([term]).reduced
        assert own is not None
        bound += held.bound + own.double().abs() * unit + magnitudes * 16 * 2.0**-24
        assert ((held.value.double() - own.double()).abs() <= held.bound + own.double().abs() * unit + magnitudes * 2.0**-20).all()
        total.add(held.value)
    total.add(given["residual_in"])
    bound += total.bound + mine.double().abs() * unit
    difference = (total.value.double() - mine.double()).abs()
    assert (difference <= bound).all()
    assert difference.any(), "the two never differ: the bound shows nothing"

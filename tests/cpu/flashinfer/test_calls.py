"""FlashInfer's calls: every pattern gives what the communicator gives, into whatever memory its callers pass."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from samples import same
from torch.utils.flop_counter import FlopCounterMode

import collogue.flashinfer as comm
from collogue import reference
from collogue.contract.quant import MXFP8, NVFP4, FP8Group, FP8PerToken, FP8Static, Quant
from collogue.contract.spec import Output, RMSNorm
from collogue.errors import (
    ArgumentError,
    CapacityError,
    ClosedError,
    DTypeError,
    FormatError,
    GroupError,
    LayoutError,
    NotPrepared,
    OverlapError,
    ScaleError,
    ShapeError,
    UnsupportedError,
)
from collogue.flashinfer.workspace import workspace_of
from collogue.formats import empty_scales, scale_storage
from collogue.operations import Operations
from collogue.testing import VirtualGroup, run_virtual
from collogue.testing.inputs import make_inputs, make_partials

P, LAYOUT = comm.AllReduceFusionPattern, comm.QuantizationSFLayout
TOKENS, WIDTH = 5, 256
MULTIPLIER, DIVISOR = 537.6, 0.0112

#: Pattern, the format it stands for, and further arguments of the call.
FORMATS: list[tuple[int, Quant | None, dict[str, Any]]] = [
    (P.kARResidualRMSNorm, None, {}),
    (P.kARResidualRMSNormFP8Quant, FP8Static(DIVISOR), {"scale_factor": DIVISOR}),
    (P.kARResidualRMSNormOutFP8Quant, FP8Static(DIVISOR), {"scale_factor": torch.tensor([[DIVISOR]])}),
    (P.kARResidualRMSNormFP4Quant, NVFP4(MULTIPLIER), {"scale_factor": MULTIPLIER}),
    (P.kARResidualRMSNormFP4Quant, NVFP4(MULTIPLIER, "linear"), {"scale_factor": MULTIPLIER, "layout_code": LAYOUT.LINEAR}),
    (
        P.kARResidualRMSNormOutFP4Quant,
        NVFP4(MULTIPLIER, "8x4"),
        {"scale_factor": torch.tensor(MULTIPLIER, dtype=torch.float64), "layout_code": LAYOUT.SWIZZLED_8x4},
    ),
    (P.kARResidualRMSNormPerTokenGroupFP8PackedQuant, FP8Group(128, "ue8m0", "column", 1e-10), {"block_quant_group_size": 128}),
    (P.kARResidualRMSNormOutPerTokenGroupFP8PackedQuant, FP8Group(32, "ue8m0", "column", 1e-10), {"block_quant_group_size": 32}),
    (P.kARResidualRMSNormDynamicFP8Quant, FP8PerToken(), {}),
    (P.kARResidualRMSNormOutDynamicFP8Quant, FP8PerToken(), {}),
    (P.kARResidualRMSNormMXFP8Quant, MXFP8("ceil"), {}),
    (P.kARResidualRMSNormOutMXFP8Quant, MXFP8("ceil", "linear"), {"layout_code": LAYOUT.LINEAR}),
]
KEEPS_NORM = {1, 4, 5, 9, 11, 14}
by_pattern = pytest.mark.parametrize(("pattern", "quant", "more"), FORMATS, ids=[f"{p}-{q.label if q else 'none'}" for p, q, _ in FORMATS])


def make(group: Any, **options: Any) -> comm.TRTLLMAllReduceFusionWorkspace:
    options = {"max_token_num": 8, "hidden_dim": WIDTH, "dtype": torch.bfloat16} | options
    return comm.create_allreduce_fusion_workspace(world_size=group.size, rank=group.rank, group=group, **options)


def inputs(rank: int, tokens: int = TOKENS, dtype: torch.dtype = torch.bfloat16, kind: str = "order") -> dict[str, torch.Tensor]:
    given = make_inputs(kind, rank=rank, tokens=tokens, hidden_size=WIDTH, dtype=dtype)
    return {"input": given.partial, "residual_in": given.residual, "rms_gamma": given.weight}


def buffers(quant: Quant | None, tokens: int = TOKENS, dtype: torch.dtype = torch.bfloat16) -> dict[str, torch.Tensor]:
    """What a FlashInfer user allocates, every byte poisoned."""
    made = {name: torch.empty(tokens, WIDTH, dtype=dtype) for name in ("output", "residual_out", "norm_out")}
    if quant is not None:
        shape = (tokens, WIDTH // 2) if isinstance(quant, NVFP4) else (tokens, WIDTH)
        made["quant_out"] = torch.empty(shape, dtype=torch.uint8 if isinstance(quant, NVFP4) else torch.float8_e4m3fn)
        if not isinstance(quant, FP8Static):
            made["scale_out"] = empty_scales(quant, tokens, WIDTH, "cpu")
    for name, tensor in made.items():
        (scale_storage(tensor) if name == "scale_out" else tensor.view(torch.uint8)).fill_(0x5A)
    return made


def expected(world: int, given: dict[str, torch.Tensor], quant: Quant | None, norm: bool = True, **options: Any) -> Output:
    tokens, dtype = given["input"].shape[0], given["input"].dtype
    partials = make_partials("order", world, tokens=tokens, hidden_size=WIDTH, dtype=dtype)
    if not norm:
        return reference.all_reduce(partials)
    weight = RMSNorm(given["rms_gamma"], **options)
    return reference.all_reduce(partials, residual=given["residual_in"], norm=weight, quant=quant, keep_norm=quant is not None)


def untouched(tensor: torch.Tensor) -> bool:
    return bool((tensor.view(torch.uint8) == 0x5A).all())


def returned(pattern: int) -> str:
    """What a call returns that was given every output: as FlashInfer does, written or not."""
    return "quant_out" if pattern == 14 else "norm_out"


def check(out: dict[str, torch.Tensor], right: Output, pattern: int) -> None:
    assert untouched(out["output"])
    assert same(out["residual_out"], right.residual)
    assert same(out["norm_out"], right.norm) if pattern in KEEPS_NORM else untouched(out["norm_out"])
    if "quant_out" in out:
        assert same(out["quant_out"], right.codes)
    if "scale_out" in out:
        assert right.scales is not None
        assert torch.equal(scale_storage(out["scale_out"]), scale_storage(right.scales))


# Results


@pytest.mark.parametrize("pdl", [False, True])
def test_launch_with_pdl_says_when_the_weight_is_read(pdl: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[bool] = []
    all_reduce = Operations.all_reduce

    def look(self: Operations, *given: Any, norm: RMSNorm, **named: Any) -> Output:
        seen.append(norm.prefetch)
        return all_reduce(self, *given, norm=norm, **named)

    monkeypatch.setattr(Operations, "all_reduce", look)
    run_virtual(
        1,
        lambda group: comm.allreduce_fusion(
            workspace=make(group), pattern=P.kARResidualRMSNorm, launch_with_pdl=pdl, **inputs(group.rank), **buffers(None)
        ),
    )
    assert seen == [pdl]


@by_pattern
@pytest.mark.parametrize("world", [2, 3])
def test_every_pattern_gives_the_contract(pattern: int, quant: Quant | None, more: dict[str, Any], world: int) -> None:
    def rank(group: VirtualGroup) -> None:
        workspace, given, out = make(group), inputs(group.rank), buffers(quant)
        result = comm.allreduce_fusion(workspace=workspace, pattern=pattern, **given, **out, **more)
        check(out, expected(world, given, quant), pattern)
        assert result is out[returned(pattern)]

    run_virtual(world, rank)


@pytest.mark.slow
@by_pattern
def test_traced_calls_write_the_callers_memory(pattern: int, quant: Quant | None, more: dict[str, Any]) -> None:
    """Compiled or under a dispatch mode, into memory of its own and over the inputs."""

    def rank(group: VirtualGroup) -> None:
        workspace, given = make(group), inputs(group.rank)
        right = expected(2, given, quant)

        def call(out: dict[str, torch.Tensor]) -> torch.Tensor:
            return comm.allreduce_fusion(workspace=workspace, pattern=pattern, **given, **out, **more)

        def over_inputs(given: dict[str, torch.Tensor], out: dict[str, torch.Tensor]) -> None:
            over = {"residual_out": given["residual_in"], "norm_out": given["input"]}
            comm.allreduce_fusion(workspace=workspace, pattern=pattern, **given, **(out | over), **more)

        # To compile takes long: a pattern without a format, and one with scales whose padding is written too.
        for wrap in (_in_a_mode, _compiled) if pattern in (1, 5, 9) else (_in_a_mode,):
            out, again = buffers(quant), {name: tensor.clone() for name, tensor in given.items()}
            assert wrap(call)(out) is out[returned(pattern)]
            check(out, right, pattern)
            wrap(over_inputs)(again, buffers(quant))
            assert same(again["residual_in"], right.residual)
            assert same(again["input"], right.norm if pattern in KEEPS_NORM else given["input"])

    torch._dynamo.reset()
    run_virtual(2, rank)


def _in_a_mode(call: Callable[..., Any]) -> Callable[..., Any]:
    def inside(*args: Any) -> Any:
        with FlopCounterMode(display=False):
            return call(*args)

    return inside


def _compiled(call: Callable[..., Any]) -> Callable[..., Any]:
    return torch.compile(call, backend="aot_eager")


@by_pattern
def test_the_older_calls_give_the_same(pattern: int, quant: Quant | None, more: dict[str, Any]) -> None:
    def rank(group: VirtualGroup) -> None:
        handles, pointers, metadata = comm.trtllm_create_ipc_workspace_for_all_reduce_fusion(
            group.rank, group.size, 8, WIDTH, group=group, create_metadata=True
        )
        for dtype in (torch.bfloat16, torch.float16):
            given, out = inputs(group.rank, dtype=dtype), buffers(quant, dtype=dtype)
            flat = {name: tensor.view(-1) for name, tensor in out.items() if name not in ("output", "scale_out")}
            comm.trtllm_allreduce_fusion(
                allreduce_in=given["input"].view(-1),
                world_size=group.size,
                world_rank=group.rank,
                token_num=TOKENS,
                hidden_dim=WIDTH,
                workspace_ptrs=pointers,
                launch_with_pdl=True,
                trigger_completion_at_end=False,
                fp32_acc=False,
                pattern_code=pattern,
                use_oneshot=None,
                allreduce_out=out["output"].view(-1),
                residual_in=given["residual_in"].view(-1),
                rms_gamma=given["rms_gamma"],
                rms_eps=1e-6,
                metadata=metadata,
                **({"quant_out": None, "scale_out": out.get("scale_out"), "scale_factor": None, "layout_code": None} | flat | more),
            )
            check(out, expected(2, given, quant), pattern)
        comm.trtllm_destroy_ipc_workspace_for_all_reduce_fusion(handles)
        comm.trtllm_destroy_ipc_workspace_for_all_reduce(handles)
        with pytest.raises(ClosedError):
            workspace_of(pointers).communicator(1, 8, torch.bfloat16)

    run_virtual(2, rank)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_all_reduce_alone(dtype: torch.dtype) -> None:
    def rank(group: VirtualGroup) -> None:
        workspace, given = make(group, dtype=dtype), inputs(group.rank, dtype=dtype)
        right = expected(2, given, None, norm=False).reduced
        returned = comm.allreduce_fusion(given["input"], workspace, P.kAllReduce)
        assert same(returned, right)
        in_place = given["input"].clone()
        assert comm.allreduce_fusion(in_place, workspace, P.kAllReduce, output=in_place, **without_input(given)) is in_place
        assert same(in_place, right)

    run_virtual(2, rank)


def without_input(given: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """A residual and a weight change nothing in pattern 0."""
    return {name: tensor for name, tensor in given.items() if name != "input"}


def test_weight_bias_and_eps() -> None:
    def rank(group: VirtualGroup) -> None:
        given, out = inputs(group.rank), buffers(None)
        comm.allreduce_fusion(workspace=make(group), pattern=1, **given, **out, rms_eps=1e-3, weight_bias=1.0)
        check(out, expected(2, given, None, eps=1e-3, weight_offset=1.0), 1)
        assert not same(out["norm_out"], expected(2, given, None, eps=1e-6, weight_offset=1.0).norm)
        assert not same(out["norm_out"], expected(2, given, None, eps=1e-3).norm)

    run_virtual(2, rank)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("world", [2, 4, 8])
@pytest.mark.parametrize("fp32_acc", [True, False])
def test_the_distance_from_flashinfers_rounding_is_bounded(dtype: torch.dtype, world: int, fp32_acc: bool) -> None:
    """FlashInfer rounds the sum (without ``fp32_acc`` after every term) before it adds the residual; Collogue rounds once, at the end.

    Each rounding of a value v is off by at most half a unit in its last place, ``2**-(mantissa + 1) * |v|`` (and half the smallest
    subnormal). So the two streams differ by no more than the roundings that only one of them has, and their last ones.
    """
    tokens, shape = 64, {"tokens": 64, "hidden_size": WIDTH, "dtype": dtype}
    partials = make_partials("normal", world, **shape)  # type: ignore[arg-type]
    residual = make_inputs("normal", rank=0, **shape).residual  # type: ignore[arg-type]
    mine = reference.all_reduce(partials, residual=residual).residual
    assert mine is not None
    unit, smallest = torch.finfo(dtype).eps / 2, torch.finfo(dtype).smallest_normal
    total, bound = partials[0].float(), torch.zeros(tokens, WIDTH)
    for i, term in enumerate(partials[1:], 2):
        total = total + term.float()
        if not fp32_acc or i == world:
            bound += total.abs() * unit
            total = total.to(dtype).float()
    theirs = (total + residual.float()).to(dtype)
    bound += (theirs.float().abs() + mine.float().abs()) * unit + smallest
    difference = (theirs.float() - mine.float()).abs()
    assert (difference <= bound).all()
    assert difference.any(), "the two never differ: the bound shows nothing"
    zero = reference.all_reduce(partials, residual=torch.zeros_like(residual)).residual
    if fp32_acc:
        assert torch.equal(zero, total.to(dtype)), "without a residual there is one rounding in both"  # type: ignore[arg-type]


# The callers' memory


def test_outputs_over_the_inputs() -> None:
    """What vLLM does: the norm over the input and the stream over the residual, or the stream over the input."""

    def rank(group: VirtualGroup) -> None:
        workspace, given = make(group), inputs(group.rank)
        right = expected(2, given, None)
        a, b = given["input"].clone(), given["residual_in"].clone()
        comm.allreduce_fusion(a, workspace, 1, norm_out=a, residual_out=b, residual_in=b, rms_gamma=given["rms_gamma"])
        assert same(a, right.norm)
        assert same(b, right.residual)
        a, norm = given["input"].clone(), torch.empty_like(a)
        comm.allreduce_fusion(
            a, workspace, 1, norm_out=norm, residual_out=a, residual_in=given["residual_in"], rms_gamma=given["rms_gamma"]
        )
        assert same(a, right.residual)
        assert same(norm, right.norm)
        a, b = given["input"].clone(), given["residual_in"].clone()
        comm.allreduce_fusion(a, workspace, 1, norm_out=b, residual_out=a, residual_in=b, rms_gamma=given["rms_gamma"])
        assert same(a, right.residual)
        assert same(b, right.norm)

    run_virtual(2, rank)


def test_an_output_that_the_pattern_lacks_may_be_an_input() -> None:
    """vLLM's FP8 call names the input as ``norm_out`` of a pattern without one: it stays as it is."""

    def rank(group: VirtualGroup) -> None:
        given, out = inputs(group.rank), buffers(FP8Static(DIVISOR))
        before = given["input"].clone()
        out["norm_out"] = given["input"]
        returned = comm.allreduce_fusion(workspace=make(group), pattern=2, scale_factor=DIVISOR, **given, **out)
        assert same(given["input"], before)
        assert returned is given["input"]

    run_virtual(2, rank)


def test_memory_of_another_form() -> None:
    """Codes and scales in buffers of any dtype and size, values in the first rows of a larger buffer."""

    def rank(group: VirtualGroup) -> None:
        workspace, given = make(group), inputs(group.rank)
        quant = NVFP4(MULTIPLIER)
        right = expected(2, given, quant)
        assert right.scales is not None
        scales = comm.compute_fp4_swizzled_layout_sf_size(TOKENS, WIDTH // 16)
        assert scales == right.scales.numel()
        quant_out = torch.full((TOKENS * WIDTH,), 7.0, dtype=torch.bfloat16)
        scale_out = torch.full((scales // 4 + 3,), -1, dtype=torch.int32)
        large = torch.full((8, WIDTH), 7.0, dtype=torch.bfloat16)
        out = {"quant_out": quant_out, "scale_out": scale_out, "norm_out": large}
        comm.allreduce_fusion(workspace=workspace, pattern=5, scale_factor=MULTIPLIER, **given, **out)
        needed = TOKENS * WIDTH // 2
        assert torch.equal(quant_out.view(torch.uint8)[:needed].view(TOKENS, -1), right.codes)  # type: ignore[arg-type]
        assert (quant_out[needed // 2 :] == 7).all()
        assert torch.equal(scale_out.view(torch.uint8)[:scales], scale_storage(right.scales))
        assert (scale_out[scales // 4 :] == -1).all()
        assert same(large[:TOKENS], right.norm)
        assert (large[TOKENS:] == 7).all()

    run_virtual(2, rank)


@pytest.mark.parametrize("tokens", [1, 3, 4, 5])
@pytest.mark.parametrize("spare", [0, 1, 2])
def test_packed_group_scales_without_room_for_the_last_padding(tokens: int, spare: int) -> None:
    """``torch.empty_strided`` holds nothing after the last token of the last column. What it holds is written, padding too."""

    def rank(group: VirtualGroup) -> None:
        quant = FP8Group(16, "ue8m0", "column", 1e-10)
        given, out = inputs(group.rank, tokens), buffers(quant, tokens)
        right = scale_storage(expected(2, given, quant).scales)  # type: ignore[arg-type]
        aligned = -(-tokens // 4) * 4
        memory = torch.full((tokens + 3 * aligned + spare + 1,), 0x5A5A5A5A, dtype=torch.int32)
        holder = memory[: tokens + 3 * aligned + min(spare, aligned - tokens)].clone()
        out["scale_out"] = holder.as_strided((tokens, 4), (1, aligned))
        comm.allreduce_fusion(workspace=make(group), pattern=8, block_quant_group_size=16, **given, **out)
        assert torch.equal(holder.view(torch.uint8), right[: holder.numel() * 4])

    run_virtual(2, rank)


def test_outputs_that_are_not_given() -> None:
    def rank(group: VirtualGroup) -> None:
        workspace, given = make(group), inputs(group.rank)
        assert same(comm.allreduce_fusion(workspace=workspace, pattern=1, **given), expected(2, given, None).norm)
        codes = comm.allreduce_fusion(workspace=workspace, pattern=4, scale_factor=DIVISOR, **given)
        assert same(codes, expected(2, given, FP8Static(DIVISOR)).codes)

    run_virtual(2, rank)


def test_what_is_returned_follows_the_backend() -> None:
    """FlashInfer's two backends differ where a pattern has both a norm and codes."""

    def rank(group: VirtualGroup) -> None:
        given = inputs(group.rank)
        for backend, name in (("auto", "norm_out"), ("trtllm", "norm_out"), ("mnnvl", "quant_out")):
            workspace, out = make(group, backend=backend), buffers(FP8Static(DIVISOR))
            assert workspace.backend == ("trtllm" if backend == "auto" else backend)
            assert comm.allreduce_fusion(workspace=workspace, pattern=4, scale_factor=DIVISOR, **given, **out) is out[name]

    run_virtual(2, rank)


def test_arguments_that_have_no_meaning_change_nothing() -> None:
    def rank(group: VirtualGroup) -> None:
        workspace = make(group, gpus_per_node=1, force_oneshot_support=True)
        given = inputs(group.rank)
        for ignored in (
            {"use_oneshot": True},
            {"use_oneshot": False},
            {"fp32_acc": True, "launch_with_pdl": True, "trigger_completion_at_end": False},
            {"layout_code": LAYOUT.LINEAR, "scale_factor": 3.0, "moe_finalize_backend": "cake"},
        ):
            out = buffers(None)
            comm.allreduce_fusion(workspace=workspace, pattern=1, **given, **out, **ignored)  # type: ignore[arg-type]
            check(out, expected(2, given, None), 1)

    run_virtual(2, rank)


def test_weights_that_require_grad() -> None:
    def rank(group: VirtualGroup) -> None:
        given = inputs(group.rank)
        right = expected(2, given, None).norm
        given["rms_gamma"] = torch.nn.Parameter(given["rms_gamma"])
        norm = comm.allreduce_fusion(workspace=make(group), pattern=1, **given)
        assert same(norm, right)
        assert not norm.requires_grad

    run_virtual(2, rank)


# Workspaces


def test_capacity_is_the_product_and_is_exact() -> None:
    def rank(group: VirtualGroup) -> None:
        workspace = make(group)
        bf16, f16, f32 = torch.bfloat16, torch.float16, torch.float32
        for tokens, width, dtype in (
            (8, 256, bf16),
            (16, 128, bf16),
            (4, 512, bf16),
            (1, 8, f16),
            (8, 256, f16),
            (9, 256, bf16),
            (1, 2056, bf16),
            (1, 12, bf16),
            (1, 8, f32),
        ):
            fits = workspace.is_buffer_size_sufficient(group.size, tokens, width, dtype)
            assert fits == (tokens * width <= 8 * 256 and width % 8 == 0 and dtype != f32)
            x = torch.ones(tokens, width, dtype=dtype)
            if fits:
                assert (comm.allreduce_fusion(x, workspace, 0) == 2).all()
            else:
                with pytest.raises(ArgumentError):
                    comm.allreduce_fusion(x, workspace, 0)
        assert not workspace.is_buffer_size_sufficient(3, 1, 256, bf16)
        assert workspace.is_buffer_size_sufficient(2, 8, 256, bf16, use_oneshot=True)

    run_virtual(2, rank)


def test_communicators_are_made_once() -> None:
    def rank(group: VirtualGroup) -> None:
        workspace = make(group)
        assert len(workspace._communicators) == 1
        for tokens, width, made in ((1, 8, 1), (8, 256, 1), (2, 1024, 2), (1, 1024, 2), (16, 128, 3)):
            comm.allreduce_fusion(torch.ones(tokens, width, dtype=torch.bfloat16), workspace, 0)
            assert len(workspace._communicators) == made

    run_virtual(2, rank)


def test_nothing_is_made_under_graph_capture(monkeypatch: pytest.MonkeyPatch) -> None:
    def rank(group: VirtualGroup) -> None:
        workspace, x = make(group), torch.ones(1, 512, dtype=torch.bfloat16)
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
        comm.allreduce_fusion(x[:, :256].contiguous(), workspace, 0)
        with pytest.raises(NotPrepared, match="before the capture"):
            comm.allreduce_fusion(x, workspace, 0)

    run_virtual(1, rank)


def test_destroyed_workspaces_refuse_calls() -> None:
    def rank(group: VirtualGroup) -> None:
        workspace = make(group)
        assert isinstance(workspace, comm.AllReduceFusionWorkspace)
        assert workspace.metadata["use_fp32_lamport"] is False
        workspace.destroy()
        workspace.destroy()
        assert not workspace.is_buffer_size_sufficient(2, 1, 8, torch.bfloat16)
        with pytest.raises(ClosedError, match="create_allreduce_fusion_workspace"):
            comm.allreduce_fusion(torch.ones(1, 8, dtype=torch.bfloat16), workspace, 0)

    run_virtual(2, rank)


def test_a_rank_may_destroy_its_workspace_alone() -> None:
    def rank(group: VirtualGroup) -> None:
        workspace = make(group)
        if group.rank == 0:
            workspace.destroy()  # one that waited for rank 1 would wait for ever
        group.barrier()

    run_virtual(2, rank, timeout=20)


# What is refused


@pytest.mark.parametrize(
    ("change", "error", "says"),
    [
        ({"pattern": 13, "layout_code": LAYOUT.SWIZZLED_8x4}, FormatError, "8x4"),
        ({"pattern": 15}, ArgumentError, "AllReduceFusionPattern"),
        ({"residual_in": None}, ArgumentError, "residual_in"),
        ({"rms_gamma": None}, ArgumentError, "rms_gamma"),
        ({"scale_factor": None}, ScaleError, "divisor"),
        ({"scale_factor": torch.ones(2)}, ScaleError, "one element"),
        ({"scale_factor": 0.0}, ScaleError, "positive"),
        ({"scale_out": None}, ShapeError, "scale_out"),
        ({"scale_out": torch.empty(TOKENS, WIDTH // 16, dtype=torch.uint8)}, ShapeError, "padding"),
        ({"layout_code": 3}, FormatError, "QuantizationSFLayout"),
        ({"pattern": 8}, FormatError, "block_quant_group_size"),
        ({"pattern": 8, "block_quant_group_size": 8}, FormatError, "multiple of 16"),
        ({"pattern": 8, "block_quant_group_size": 96}, FormatError, "multiple"),
        ({"pattern": 8, "block_quant_group_size": 128, "quant_out": None}, ShapeError, "empty_strided"),
        ({"quant_out": torch.empty(TOKENS, WIDTH // 4, dtype=torch.uint8)}, ShapeError, "quant_out holds 320 elements"),
        ({"norm_out": torch.empty(TOKENS, WIDTH)}, DTypeError, "norm"),
        ({"norm_out": torch.empty(WIDTH, TOKENS, dtype=torch.bfloat16).t()}, LayoutError, "address|contiguous"),
        ({"input": torch.empty(TOKENS, 1, WIDTH, dtype=torch.bfloat16)}, ShapeError, "view"),
        ({"input": torch.empty(9, WIDTH, dtype=torch.bfloat16)}, CapacityError, "is_buffer_size_sufficient"),
        ({"workspace": object()}, UnsupportedError, "create_allreduce_fusion_workspace"),
    ],
)
def test_wrong_calls_raise_before_anything_is_sent(change: dict[str, Any], error: type[Exception], says: str) -> None:
    def rank(group: VirtualGroup) -> None:
        workspace = make(group)
        if group.rank == 0:  # alone: a call that communicated would wait for ever
            quant = NVFP4(MULTIPLIER)
            arguments = {"workspace": workspace, "pattern": 5, "scale_factor": MULTIPLIER, **inputs(0), **buffers(quant)} | change
            with pytest.raises(error, match=says) as raised:
                comm.allreduce_fusion(**arguments)
            assert "hint:" in str(raised.value)
        group.barrier()

    run_virtual(2, rank, timeout=20)


def test_outputs_that_share_memory_are_refused() -> None:
    def rank(group: VirtualGroup) -> None:
        given = inputs(group.rank)
        shared = torch.empty_like(given["input"])
        for both in (shared, given["input"], given["residual_in"]):
            with pytest.raises(OverlapError):
                comm.allreduce_fusion(workspace=make(group), pattern=1, **given, norm_out=both, residual_out=both)

    run_virtual(2, rank, timeout=20)


@pytest.mark.parametrize(
    ("change", "error"),
    [
        ({"backend": "mnnvl-cutedsl"}, UnsupportedError),
        ({"backend": "nccl"}, UnsupportedError),
        ({"rms_eps": 1e-6}, UnsupportedError),
        ({"top_k": 8, "config": object()}, UnsupportedError),
        ({"hidden_dim": None}, ArgumentError),
        ({"hidden_dim": 12}, ShapeError),
        ({"max_token_num": 0}, CapacityError),
        ({"world_size": 3}, GroupError),
        ({"rank": 1}, GroupError),
        ({"group": None}, GroupError),
        ({"group": "tp"}, GroupError),
    ],
)
def test_workspaces_that_cannot_be(change: dict[str, Any], error: type[Exception]) -> None:
    def rank(group: VirtualGroup) -> None:
        arguments = {"world_size": 1, "rank": 0, "max_token_num": 8, "hidden_dim": WIDTH, "dtype": torch.bfloat16, "group": group}
        comm.create_allreduce_fusion_workspace(**arguments).destroy()  # type: ignore[arg-type]
        with pytest.raises(error, match="hint:"):
            comm.create_allreduce_fusion_workspace(**arguments | change)  # type: ignore[arg-type]

    run_virtual(1, rank)


def test_what_else_is_not_served() -> None:
    def rank(group: VirtualGroup) -> None:
        workspace = make(group)
        for call in (workspace.checkpoint_prepare, lambda: workspace.checkpoint_restore(None)):
            with pytest.raises(NotImplementedError):
                call()
        with pytest.raises(UnsupportedError):
            comm.trtllm_destroy_ipc_workspace_for_all_reduce_fusion([[0]])
        with pytest.raises(ArgumentError, match="create_metadata"):
            comm.trtllm_create_ipc_workspace_for_all_reduce_fusion(0, 1, 8, 64, group=group, use_symm_dev_mem=True)
        assert not comm.is_mnnvl_cutedsl_supported(2, 7168, torch.bfloat16, max_token_num=8)
        *_, memory, metadata = comm.trtllm_create_ipc_workspace_for_all_reduce_fusion(
            0, 1, 8, 64, group=group, use_symm_dev_mem=True, create_metadata=True
        )
        assert memory == []
        assert metadata["max_token_num"] == 8

    run_virtual(1, rank)


def test_names() -> None:
    assert set(comm.SERVED) <= set(comm.__all__)
    for name in comm.__all__:
        assert getattr(comm, name).__doc__, name

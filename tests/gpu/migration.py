"""A user's code that called FlashInfer, moved to Collogue by one line, and what it must give.

Everything that knows Collogue is below `Answers`; what is above it is written to FlashInfer's interface.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

import collogue.flashinfer as comm  # was: import flashinfer.comm as comm
import collogue.flashinfer.workspace
from collogue import reference
from collogue.contract.quant import NVFP4, FP8Group, FP8PerToken, FP8Static, Quant
from collogue.contract.spec import Output, RMSNorm
from collogue.formats import scale_storage
from collogue.group import as_group
from collogue.testing import VirtualGroup
from collogue.testing.inputs import make_inputs, make_partials
from collogue.tools.check import Case

os.environ.setdefault(collogue.flashinfer.workspace.TIMEOUT_VARIABLE, "20")  # a test does not wait for minutes

P = comm.AllReduceFusionPattern
DTYPES = (torch.bfloat16, torch.float16)
HIDDEN = (2880, 4096, 5120, 7168, 8192, 12800)
TOKENS = (1, 2, 3, 8, 17, 64, 127, 256, 1024, 4096)
#: Fewer for worlds of virtual ranks, which share GPUs.
TOKENS_VIRTUAL = (1, 3, 16, 130, 1024, 4096)
#: Pattern, layout code of NVFP4's scales, weight bias.
FORMS = [
    (P.kAllReduce, None, 0.0),
    (P.kARResidualRMSNorm, None, 0.0),
    (P.kARResidualRMSNorm, None, 1.0),
    (P.kARResidualRMSNormFP8Quant, None, 0.0),
    (P.kARResidualRMSNormFP4Quant, None, 0.0),
    (P.kARResidualRMSNormFP4Quant, comm.QuantizationSFLayout.SWIZZLED_8x4, 0.0),
    (P.kARResidualRMSNormFP4Quant, comm.QuantizationSFLayout.LINEAR, 1.0),
    (P.kARResidualRMSNormOutFP8Quant, None, 1.0),
    (P.kARResidualRMSNormOutFP4Quant, comm.QuantizationSFLayout.SWIZZLED_128x4, 0.0),
    (P.kARResidualRMSNormOutFP4Quant, comm.QuantizationSFLayout.LINEAR, 0.0),
    (P.kARResidualRMSNormPerTokenGroupFP8PackedQuant, None, 0.0),
    (P.kARResidualRMSNormOutPerTokenGroupFP8PackedQuant, None, 0.0),
    (P.kARResidualRMSNormDynamicFP8Quant, None, 0.0),
    (P.kARResidualRMSNormOutDynamicFP8Quant, None, 1.0),
]
FP8 = (P.kARResidualRMSNormFP8Quant, P.kARResidualRMSNormOutFP8Quant)
FP4 = (P.kARResidualRMSNormFP4Quant, P.kARResidualRMSNormOutFP4Quant)
GROUPS = (P.kARResidualRMSNormPerTokenGroupFP8PackedQuant, P.kARResidualRMSNormOutPerTokenGroupFP8PackedQuant)
DYNAMIC = (P.kARResidualRMSNormDynamicFP8Quant, P.kARResidualRMSNormOutDynamicFP8Quant)
WITH_NORM = (P.kARResidualRMSNorm, FP8[1], FP4[1], GROUPS[1], DYNAMIC[1])
DIVISOR, MULTIPLIER, EPS = 0.0112, 537.6, 1e-5


@dataclass(frozen=True)
class Call:
    """One call of the user's."""

    tokens: int
    hidden: int
    dtype: torch.dtype
    pattern: int
    layout: int | None = None
    bias: float = 0.0

    @property
    def group_size(self) -> int:
        return 128 if self.hidden % 128 == 0 else 64

    @property
    def scale_factor(self) -> float | None:
        return DIVISOR if self.pattern in FP8 else MULTIPLIER if self.pattern in FP4 else None


def calls(tokens: tuple[int, ...], hidden: tuple[int, ...] = HIDDEN) -> list[Call]:
    """Every form with every number of tokens; hidden sizes and dtypes in turn, so that every pair of choices is met."""
    found = []
    for i, (pattern, layout, bias) in enumerate(FORMS):
        for j, count in enumerate(tokens):
            k = i + j
            found.append(Call(count, hidden[k % len(hidden)], DTYPES[(k // len(hidden) + j) % 2], pattern, layout, bias))
    return found


def buffers(call: Call, device: torch.device, roomy: bool) -> dict[str, torch.Tensor]:
    """Outputs as a user allocates them. ``roomy``: packed group scales whose last column has its padding too."""
    values = {"dtype": call.dtype, "device": device}
    shape = (call.tokens, call.hidden)
    if call.pattern == P.kAllReduce:
        return {"output": torch.empty(shape, **values)}
    made = {"residual_out": torch.empty(shape, **values)}
    if call.pattern in WITH_NORM:
        made["norm_out"] = torch.empty(shape, **values)
    if call.pattern in FP4:
        made["quant_out"] = torch.empty(call.tokens, call.hidden // 2, dtype=torch.uint8, device=device)
        rows = call.tokens if call.layout == comm.QuantizationSFLayout.LINEAR else -(-call.tokens // 8) * 8
        size = rows * (call.hidden // 16)
        if call.layout in (None, comm.QuantizationSFLayout.SWIZZLED_128x4):
            size = comm.compute_fp4_swizzled_layout_sf_size(call.tokens, call.hidden // 16)
        made["scale_out"] = torch.empty(size, dtype=torch.uint8, device=device)
    elif call.pattern != P.kARResidualRMSNorm:
        made["quant_out"] = torch.empty(shape, dtype=torch.float8_e4m3fn, device=device)
    if call.pattern in DYNAMIC:
        made["scale_out"] = torch.empty(call.tokens, 1, dtype=torch.float32, device=device)
    if call.pattern in GROUPS:
        packs, rows = -(-call.hidden // call.group_size // 4), -(-call.tokens // 4) * 4
        memory = torch.empty(packs * rows if roomy else (packs - 1) * rows + call.tokens, dtype=torch.int32, device=device)
        made["scale_out"] = memory.as_strided((call.tokens, packs), (1, rows))
    return made


def unified(workspace: Any, call: Call, inputs: dict[str, torch.Tensor], out: dict[str, torch.Tensor]) -> None:
    comm.allreduce_fusion(
        workspace=workspace,
        pattern=call.pattern,
        launch_with_pdl=True,
        trigger_completion_at_end=call.tokens > 16,
        rms_eps=EPS,
        scale_factor=inputs.get("scale_factor"),
        layout_code=call.layout,
        use_oneshot=call.tokens <= 64,
        fp32_acc=True,
        block_quant_group_size=call.group_size if call.pattern in GROUPS else None,
        weight_bias=call.bias,
        **{name: tensor for name, tensor in inputs.items() if name != "scale_factor"},
        **out,
    )


def older(workspace: Any, call: Call, inputs: dict[str, torch.Tensor], out: dict[str, torch.Tensor]) -> None:
    """The same call by ``trtllm_allreduce_fusion``; ``workspace`` is what its own function returned."""
    _, pointers, metadata = workspace
    flat = {name: tensor if name == "scale_out" else tensor.view(-1) for name, tensor in out.items()}
    comm.trtllm_allreduce_fusion(
        allreduce_in=inputs["input"].view(-1),
        world_size=metadata["tp_size"],
        world_rank=metadata["tp_rank"],
        token_num=call.tokens,
        hidden_dim=call.hidden,
        workspace_ptrs=pointers,
        launch_with_pdl=True,
        trigger_completion_at_end=call.tokens > 16,
        fp32_acc=False,
        pattern_code=call.pattern,
        use_oneshot=None,
        allreduce_out=flat.get("output"),
        residual_in=inputs["residual_in"].view(-1),
        residual_out=flat.get("residual_out"),
        norm_out=flat.get("norm_out"),
        quant_out=flat.get("quant_out"),
        scale_out=flat.get("scale_out"),
        rms_gamma=inputs["rms_gamma"],
        rms_eps=EPS,
        scale_factor=inputs.get("scale_factor"),
        layout_code=call.layout,
        metadata=metadata,
        block_quant_group_size=call.group_size if call.pattern in GROUPS else None,
        weight_bias=call.bias,
    )


class Answers:
    """What the calls of one rank must give: the reference on the rank's own device."""

    def __init__(self, group: Any, device: torch.device) -> None:
        self.group, self.device = group, device
        self.virtual = isinstance(group, VirtualGroup)

    def inputs(self, call: Call) -> dict[str, torch.Tensor]:
        shape = {"tokens": call.tokens, "hidden_size": call.hidden, "dtype": call.dtype, "device": self.device}
        made = make_inputs("normal", rank=self.group.rank, **shape)  # type: ignore[arg-type]
        inputs = {"input": made.partial, "residual_in": made.residual, "rms_gamma": made.weight}
        if call.scale_factor is not None:
            inputs["scale_factor"] = torch.tensor([call.scale_factor], device=self.device)
        return inputs

    def expected(self, call: Call, inputs: dict[str, torch.Tensor]) -> Output:
        """Where ranks are threads, rank 0 works it out for all, from their own inputs."""
        shape = {"tokens": call.tokens, "hidden_size": call.hidden, "dtype": call.dtype, "device": self.device}
        if not self.virtual:
            return self._work_out(call, make_partials("normal", self.group.size, **shape), inputs)  # type: ignore[arg-type]
        self.settle()
        partials = self.group.all_gather_object(inputs["input"])
        mine = self._work_out(call, [x.to(self.device) for x in partials], inputs) if self.group.rank == 0 else None
        self.settle()
        return self.group.all_gather_object(mine)[0]  # type: ignore[no-any-return]

    def _work_out(self, call: Call, partials: list[torch.Tensor], inputs: dict[str, torch.Tensor]) -> Output:
        if call.pattern == P.kAllReduce:
            return reference.all_reduce(partials)
        norm = RMSNorm(inputs["rms_gamma"], EPS, call.bias)
        keep = call.pattern in WITH_NORM and call.pattern != P.kARResidualRMSNorm
        return reference.all_reduce(partials, residual=inputs["residual_in"], norm=norm, quant=quant_of(call), keep_norm=keep)

    def settle(self) -> None:
        """Nothing of any rank runs afterwards, where ranks share GPUs."""
        if self.virtual:
            self.group.settle()

    def prepare(self, workspace: comm.TRTLLMAllReduceFusionWorkspace, call: Call, inputs: dict[str, torch.Tensor]) -> None:
        """Where ranks share GPUs no kernel may be loaded while others run: what a first call does is done before."""
        if self.virtual and self.device.type == "cuda":
            norm = None if call.pattern == P.kAllReduce else RMSNorm(inputs["rms_gamma"], EPS, call.bias)
            keep = call.pattern in WITH_NORM and call.pattern != P.kARResidualRMSNorm
            made = workspace.communicator(call.tokens, call.hidden, call.dtype)
            made.prepare(call.tokens, residual=norm is not None, norm=norm, quant=quant_of(call), keep_norm=keep, hidden_size=call.hidden)
        self.settle()


def quant_of(call: Call) -> Quant | None:
    """The format that the call's pattern stands for."""
    if call.pattern in FP8:
        return FP8Static(DIVISOR)
    if call.pattern in FP4:
        layouts: dict[int | None, Any] = {None: "128x4", 0: "128x4", 1: "8x4", 2: "linear"}
        return NVFP4(MULTIPLIER, layouts[call.layout])
    if call.pattern in GROUPS:
        return FP8Group(call.group_size, "ue8m0", "column", smallest=1e-10)
    return FP8PerToken() if call.pattern in DYNAMIC else None


def case_of(call: Call, world: int) -> Case:
    """The same call for :func:`collogue.tools.check.build_kernels`."""
    quant, plain = quant_of(call), call.pattern == P.kAllReduce
    return Case(
        call.tokens,
        call.hidden,
        str(call.dtype).removeprefix("torch."),
        "none" if quant is None else quant.label,
        world,
        residual=not plain,
        norm=not plain,
        keep_norm=call.pattern in WITH_NORM,
    )


def differences(call: Call, out: dict[str, torch.Tensor], expected: Output) -> Iterator[str]:
    """The outputs that are not the reference's, byte by byte; packed group scales as far as the caller's memory goes."""
    names = {"output": "reduced", "residual_out": "residual", "norm_out": "norm", "quant_out": "codes", "scale_out": "scales"}
    for name, tensor in out.items():
        right = getattr(expected, names[name])
        if name == "scale_out":
            held = tensor.untyped_storage().nbytes()
            left, right = tensor.as_strided((held // tensor.element_size(),), (1,)), scale_storage(right)[:held]
        else:
            left = tensor.reshape(-1)
        left, right = left.view(torch.uint8), right.reshape(-1).view(torch.uint8).to(tensor.device)
        if left.numel() != right.numel() or not torch.equal(left, right):
            yield f"{call}: {name}"
    if missing := {names[name] for name in out} ^ {name for name, _ in expected.items()}:
        yield f"{call}: {missing} on one side only"


def poison(out: dict[str, torch.Tensor]) -> None:
    for tensor in out.values():
        tensor.as_strided((tensor.untyped_storage().nbytes() // tensor.element_size(),), (1,)).view(torch.uint8).fill_(0x5A)


def migrate(group: Any, todo: list[Call], *, tell: Any = lambda text: None, old: bool = False) -> list[str]:
    """Make the calls on this rank, by the unified function or by the ``old`` one. What differs."""
    known = as_group(group)
    answers, found = Answers(known, known.device), []
    capacity = {"max_token_num": max(c.tokens for c in todo), "hidden_dim": max(c.hidden for c in todo)}
    workspace: Any
    if old:
        workspace = comm.trtllm_create_ipc_workspace_for_all_reduce_fusion(
            known.rank, known.size, **capacity, group=group, create_metadata=True
        )
    else:
        workspace = comm.create_allreduce_fusion_workspace("auto", known.size, known.rank, **capacity, dtype=DTYPES[0], group=group)
    for call in todo:
        tell(str(call))
        inputs, out = answers.inputs(call), buffers(call, known.device, roomy=answers.virtual)
        expected = answers.expected(call, inputs)
        poison(out)
        if not old:
            answers.prepare(workspace, call, inputs)
        (older if old else unified)(workspace, call, inputs, out)
        answers.settle()
        found += differences(call, out, expected)
        answers.settle()
    answers.settle()
    if old:
        comm.trtllm_destroy_ipc_workspace_for_all_reduce_fusion(workspace[0])
    else:
        workspace.destroy()
    known.barrier()
    return found


def in_a_graph(group: Any, call: Call) -> list[str]:
    """Warm up, capture three calls, replay twice: as FlashInfer's users do."""
    known = as_group(group)
    answers = Answers(known, known.device)
    workspace = comm.create_allreduce_fusion_workspace("auto", known.size, known.rank, call.tokens, call.hidden, call.dtype, group=group)
    inputs, out = answers.inputs(call), buffers(call, known.device, roomy=False)
    expected = answers.expected(call, inputs)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        unified(workspace, call, inputs, out)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(3):
            unified(workspace, call, inputs, out)
    for _ in range(2):
        poison(out)
        graph.replay()
    found = [f"in a graph: {text}" for text in differences(call, out, expected)]
    del graph
    workspace.destroy()
    return found


def in_place(group: Any, call: Call) -> list[str]:
    """The norm over the input and the stream over the residual, as vLLM calls; ``group`` may be one without NCCL."""
    known = as_group(group)
    on_gpu = torch.cuda.is_available() and not isinstance(group, VirtualGroup)
    answers = Answers(known, torch.device("cuda", torch.cuda.current_device()) if on_gpu else known.device)
    workspace = comm.create_allreduce_fusion_workspace(
        "trtllm", known.size, known.rank, call.tokens, call.hidden, call.dtype, comm_backend=comm.TorchDistBackend(group), group=None
    )
    inputs = answers.inputs(call)
    expected = answers.expected(call, answers.inputs(call))
    out = {"norm_out": inputs["input"], "residual_out": inputs["residual_in"]}
    unified(workspace, call, inputs, out)
    found = [f"in place: {text}" for text in differences(call, out, expected)]
    workspace.destroy()
    return found


IN_A_GRAPH = [Call(8, 7168, DTYPES[0], pattern) for pattern in (P.kAllReduce, P.kARResidualRMSNorm, P.kARResidualRMSNormOutFP4Quant)]
IN_A_GRAPH.append(Call(5, 4096, DTYPES[1], P.kARResidualRMSNormPerTokenGroupFP8PackedQuant))
IN_PLACE = [Call(tokens, 7168, DTYPES[0], P.kARResidualRMSNorm) for tokens in (1, 4096)]


def user(group: dist.ProcessGroup, tell: Any) -> list[str]:
    """One process of the user's."""
    todo = calls(TOKENS)
    found = migrate(group, todo, tell=tell)
    tell("the older calls")
    found += migrate(group, [call for call in todo if call.tokens <= 256][::3], tell=tell, old=True)
    tell("graphs")
    for call in IN_A_GRAPH:
        found += in_a_graph(group, call)
    tell("a group without NCCL")
    for call in IN_PLACE:
        found += in_place(dist.new_group(backend="gloo"), call)
    return found

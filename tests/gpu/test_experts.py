"""Experts in the place of partials on virtual ranks: the shapes of models, every format, bit for bit."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import torch

import collogue
from collogue import ExpertCombine, Output, PrologueForm, RMSNorm, reference
from collogue.calls.request import make_request
from collogue.contract.prologue import Prologue
from collogue.contract.quant import Quant, parse
from collogue.contract.spec import Operation, owned_rows
from collogue.gpu import jit
from collogue.planning.architecture import architecture_of
from collogue.planning.plan import make_kernels, make_plan
from collogue.planning.topology import Overrides, Topology
from collogue.planning.variant import Variant
from collogue.testing import VirtualGroup, run_virtual
from collogue.testing.compare import compare
from collogue.testing.inputs import KINDS, make_inputs, make_prologue
from collogue.tools.check.case import GLOBAL_SCALE, STATIC_SCALE

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU"), pytest.mark.timeout(300)]

SHARED = PrologueForm("expert_combine", "value", shared=True)
FLOAT = PrologueForm("expert_combine", "float32")
PLAIN = PrologueForm("expert_combine", "none", shared=True)
REDUCE = PrologueForm("expert_reduce", "float32", shared=True)
#: DeepSeek-V3, Qwen3-MoE (two sizes), gpt-oss, Mixtral: hidden size, slots, prologue.
MODELS = ((7168, 8, SHARED), (2048, 8, FLOAT), (4096, 8, FLOAT), (2880, 4, FLOAT), (4096, 2, FLOAT))
FORMATS = (
    "none",
    *(f"nvfp4/{layout}" for layout in ("128x4", "8x4", "linear")),
    *(f"{family}/{rounding}/linear" for family in ("mxfp4", "mxfp8") for rounding in ("floor", "ceil")),
    "fp8_static",
    "fp8_per_token",
    *(f"fp8_group{size}/{scale}/{layout}" for size, scale, layout in itertools.product((128, 48), ("float32", "ue8m0"), ("row", "column"))),
)
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
OPERATIONS: tuple[Operation, ...] = ("all_reduce", "sharded", "reduce_scatter")
TOKENS = (1, 8, 65, 512, 4096)


@dataclass
class Made:
    """Of one call: terms and results by rank, and what else all ranks pass, with the residual of all rows."""

    terms: list[Prologue | torch.Tensor]
    arguments: dict[str, Any]
    expected: list[Output]


@dataclass(frozen=True)
class Case:
    """One call. ``width``, ``slots`` and ``form`` are a model's."""

    world: int
    tokens: int
    width: int
    slots: int
    form: PrologueForm | None
    dtype: torch.dtype = torch.bfloat16
    label: str = "none"
    operation: Operation = "all_reduce"
    kind: str = "normal"
    norm: bool = True
    branch: bool = False

    @property
    def quant(self) -> Quant | None:
        return parse(self.label, global_scale=GLOBAL_SCALE, static_scale=STATIC_SCALE)

    def term(self, rank: int, device: torch.device) -> Prologue | torch.Tensor:
        if self.form is None:
            shape = {"tokens": self.tokens, "hidden_size": self.width, "dtype": self.dtype}
            return make_inputs(self.kind, rank=rank, device=device, **shape).partial  # type: ignore[arg-type]
        shape = {"tokens": self.tokens, "hidden_size": self.width, "dtype": self.dtype, "count": self.slots}
        return make_prologue(self.form, self.kind, rank=rank, device=device, wild=True, **shape)  # type: ignore[arg-type]

    def arguments(self, device: torch.device) -> dict[str, Any]:
        made = make_inputs("normal", rank=0, tokens=self.tokens, hidden_size=self.width, dtype=self.dtype, device=device)
        norm = RMSNorm(made.weight) if self.norm else None
        branch = RMSNorm(made.weight.float() + 0.5, eps=1e-5) if self.branch else None
        return {
            "residual": made.residual,
            "norm": norm,
            "branch_norm": branch,
            "quant": self.quant,
            "keep_norm": self.norm and self.label != "none",
        }

    def make(self, device: torch.device) -> Made:
        """What all ranks give, and what each must get."""
        terms, arguments = [self.term(rank, device) for rank in range(self.world)], self.arguments(device)
        if self.operation == "all_reduce":
            return Made(terms, arguments, [reference.all_reduce(terms, **arguments)] * self.world)
        by_rank = reference.sharded if self.operation == "sharded" else reference.reduce_scatter
        return Made(terms, arguments, by_rank(terms, **arguments))

    def variants(self, most: int, widest: int, overrides: Overrides) -> Iterator[Variant]:
        """What a communicator for ``most`` rows of ``widest`` on this GPU compiles."""
        properties = torch.cuda.get_device_properties(0)
        architecture = architecture_of((properties.major, properties.minor))
        topology = Topology(self.world, most, widest, self.dtype, architecture, properties.multi_processor_count, self.world, overrides)
        request = make_request(
            self.tokens,
            self.width,
            self.dtype,
            residual=True,
            norm=self.norm,
            wide_weight=False,
            quant=self.quant,
            keep_norm=self.norm and self.label != "none",
            operation=self.operation,
            prologue=self.form,
            branch=self.branch,
            wide_branch=self.branch and self.dtype != torch.float32,
        )
        yield from (kernel.variant for kernel in make_kernels(topology, request, make_plan(topology, request)))


def models(world: int) -> list[Case]:
    """Every model at every number of tokens; operations in turn. Large calls for the largest model and two worlds only."""
    cases = []
    for (i, (width, slots, form)), (j, tokens) in itertools.product(enumerate(MODELS), enumerate(TOKENS)):
        if tokens > 512 and (i % 3 or world not in (2, 8)):
            continue
        cases.append(Case(world, tokens, width, slots, form, operation=OPERATIONS[(i + j + world) % 3]))
    return cases


def formats(dtype: torch.dtype) -> list[Case]:
    """Every format once with each prologue; worlds, rows, operations, kinds of input and slots in turn."""
    kinds, cases = list(KINDS), []
    for (i, form), (j, label) in itertools.product(enumerate((SHARED, FLOAT, PLAIN, REDUCE)), enumerate(FORMATS)):
        n = 2 * i + j
        if n % 3 != DTYPES.index(dtype) and label != "none":  # each pair in one dtype
            continue
        tokens, slots = (3, 1, 130, 17)[n % 4], (1, 5, 16, 8, 64 if form is REDUCE else 2)[j % 5]
        norm = label == "none" or n % 4 > 0
        cases.append(Case(2 + n % 5, tokens, 1152, slots, form, dtype, label, OPERATIONS[j % 3], kinds[n % len(kinds)], norm))
    return cases


def branches(world: int) -> list[Case]:
    """A norm of the sum: every format with and without the norm behind it, now and then of experts; operations in turn."""
    cases = []
    for (i, norm), (j, label) in itertools.product(enumerate((True, False)), enumerate(FORMATS)):
        tokens, operation = (1, 65, 3, 600)[(i + j) % 4], "all_reduce" if label == "none" else OPERATIONS[(i + j) % 3]
        form, dtype, kind = (None, None, SHARED, REDUCE)[j % 4], DTYPES[(i + j + world) % 3], list(KINDS)[j % len(KINDS)]
        cases.append(Case(world, tokens, (1152, 6912)[j % 2], 4, form, dtype, label, operation, kind, norm, branch=True))
    return cases


def check(cases: list[Case], **options: Any) -> list[str]:
    """Build every kernel, then make the calls in one communicator for each world: what differs."""
    most, widest = max(case.tokens for case in cases), max(case.width for case in cases)
    architecture = architecture_of(torch.cuda.get_device_capability(0))
    assert architecture is not None
    jit.build([variant for case in cases for variant in case.variants(most, widest, Overrides(**options))], architecture)
    found = []
    for world in sorted({case.world for case in cases}):
        mine, made = [case for case in cases if case.world == world], {}

        def rank(group: VirtualGroup, mine: list[Case] = mine, made: dict[Case, Made] = made) -> list[str]:
            comm = collogue.Communicator(
                group, max_tokens=most, hidden_size=widest, dtype=mine[0].dtype, timeout=20.0, table=False, **options
            )
            texts = []
            for case in mine:
                if group.rank == 0:
                    made.clear()
                    made[case] = case.make(group.device)
                group.settle()
                term, right = made[case].terms[group.rank], made[case].expected[group.rank]
                arguments = dict(made[case].arguments)
                if case.operation != "all_reduce":
                    rows = owned_rows(case.tokens, case.world, group.rank)
                    arguments["residual"] = arguments["residual"][rows.start : rows.stop].clone()
                epilogue = {name: arguments[name] for name in ("norm", "quant", "keep_norm", "branch_norm")}
                shape = {"hidden_size": case.width, "operation": case.operation, "prologue": case.form}
                comm.prepare(case.tokens, **epilogue, **shape)  # type: ignore[arg-type]
                out = comm.empty(case.tokens, residual=True, **epilogue, **shape)  # type: ignore[arg-type]
                group.settle()
                if case.operation == "reduce_scatter":
                    comm.reduce_scatter(term, out=out, **arguments)
                else:
                    comm.all_reduce(term, sharded=case.operation == "sharded", out=out, **arguments)
                group.settle()
                comm.check()
                texts += [f"{case}, rank {group.rank}: {d.count}, {d.first}" for d in compare(out, right).values() if d.count]
            group.settle()
            comm.close()
            return texts

        found += [text for texts in run_virtual(world, rank, device="cuda", timeout=120.0) for text in texts]
    return found


@pytest.mark.parametrize("world", range(2, 9))
def test_models(world: int) -> None:
    assert check(models(world)) == []


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_format_with_each_prologue(dtype: torch.dtype) -> None:
    assert check(formats(dtype)) == []


@pytest.mark.parametrize("options", [{"algorithm": "two_shot"}, {"max_sms": 8}], ids=str)
def test_other_plans(options: dict[str, Any]) -> None:
    assert check([case for case in models(4) if case.tokens <= 512][::2], **options) == []


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("world", [1, 2, 3, 8])
def test_a_norm_of_the_sum(world: int, dtype: torch.dtype) -> None:
    assert check([case for case in branches(world) if case.dtype is dtype]) == []


def test_a_rank_without_local_experts_and_a_world_of_one() -> None:
    def rank(group: VirtualGroup) -> list[bool]:
        comm = collogue.Communicator(group, max_tokens=8, hidden_size=512, table=False)
        rows = torch.full((4 if group.rank == 0 else 0, 512), 2.0, dtype=torch.bfloat16, device=group.device)
        index = torch.full((8, 3), 0 if group.rank == 0 else -1, dtype=torch.int32, device=group.device)
        term = ExpertCombine(rows, index)
        comm.prepare(8, residual=False, prologue=term)
        group.settle()
        found = comm.all_reduce(term).reduced
        group.settle()
        assert found is not None
        answers = [torch.equal(found, torch.full_like(found, 6.0))]
        comm.close()
        return answers

    for world in (1, 2, 3):
        assert all(all(found) for found in run_virtual(world, rank, device="cuda", timeout=60.0))

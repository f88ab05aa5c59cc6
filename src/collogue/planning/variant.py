"""What a kernel is compiled for: one frozen description, and the few lines of CUDA C++ that name it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from collogue.calls.product import ProductForm
from collogue.calls.terms import TermsForm
from collogue.contract.prologue import PrologueForm
from collogue.contract.quant import MXFP4, MXFP8, NVFP4, FP8Group, FP8PerToken, FP8Static, Quant
from collogue.planning.algorithm import ALGORITHMS

_DTYPES = {torch.bfloat16: "BFloat16", torch.float16: "Float16", torch.float32: "Float32"}
#: Compiled upper bounds of ``ceil(H / 256)``: the hidden size itself is a run-time value.
BLOCK_CLASSES = (4, 8, 12, 16, 20, 24, 28, 32, 40, 48, 56, 64, 96, 128)


@dataclass(frozen=True)
class FormatRow:
    """A format as kernels, journals and the way between ranks know it.

    ``struct`` in ``kernels/formats/<file>.cuh``, with the variant's fields in braces. ``scale_bytes`` of a stored scale, 0 where none
    is; ``scales_in_word`` of them share a word on their way. ``when``: options that make it this row's.
    """

    name: str
    kind: type[Quant] | None
    file: str
    struct: str
    scale_bytes: int = 0
    scales_in_word: int = 1
    when: Mapping[str, Any] = field(default_factory=dict)

    @property
    def code_bytes(self) -> int:
        """Of the codes of eight elements."""
        return 0 if self.kind is None else 4 if self.kind.element == "e2m1" else 8

    def holds(self, quant: Quant | None) -> bool:
        """Whether ``quant`` is of this format."""
        kind: type = type(None) if self.kind is None else self.kind
        return type(quant) is kind and all(getattr(quant, name) == value for name, value in self.when.items())


#: Every format. Its place is its number in a journal.
FORMATS = (
    FormatRow("none", None, "none", "NoFormat"),
    FormatRow("NVFP4", NVFP4, "nvfp4", "NVFP4", 1, 4),
    FormatRow("MXFP4", MXFP4, "mx", "MXFP4<{ceil}>", 1, 4),
    FormatRow("MXFP8", MXFP8, "mx", "MXFP8<{ceil}>", 1, 4),
    FormatRow("FP8Static", FP8Static, "fp8_static", "FP8Static"),
    FormatRow("FP8PerToken", FP8PerToken, "fp8_dynamic", "FP8PerToken", 4),
    FormatRow("FP8Group", FP8Group, "fp8_dynamic", "FP8Group<{group}>", 4, when={"scale_format": "float32"}),
    FormatRow("FP8Group(ue8m0)", FP8Group, "fp8_dynamic", "FP8GroupE8M0<{group}>", 1, when={"scale_format": "ue8m0"}),
)
#: Every layout of scales, by name: its struct in ``kernels/layouts.cuh``, by bytes of a scale. Its place is its number in a journal.
LAYOUTS: dict[str, dict[int, str]] = {
    "linear": {0: "Linear<4>", 1: "Linear<1>", 4: "Linear<4>"},
    "128x4": {1: "Tiles128x4"},
    "8x4": {1: "Tiles8x4"},
    "column": {1: "PackedColumn", 4: "Column"},
}


@dataclass(frozen=True)
class QuantVariant:
    """The part of a quantization that is compiled in; scales and bounds are run-time values. ``format`` and ``layout`` by name."""

    format: str = "none"
    layout: str = "linear"
    group: int = 0
    ceil: bool = False

    @classmethod
    def of(cls, quant: Quant | None) -> QuantVariant:
        row = next((row for row in FORMATS if row.holds(quant)), None)
        if row is None:
            raise TypeError(f"no kernel for {type(quant).__name__}")
        if quant is None:
            return cls()
        layout = getattr(quant, "layout", "linear")
        return cls(row.name, "linear" if layout == "row" else layout, quant.block, getattr(quant, "rounding", "") == "ceil")

    @property
    def row(self) -> FormatRow:
        """What the table says of the format."""
        return next(row for row in FORMATS if row.name == self.format)

    @property
    def struct(self) -> str:
        """The type of the format."""
        return self.row.struct.format(group=self.group, ceil=_flag(self.ceil))

    @property
    def needs_one_cta(self) -> bool:
        """A group that is not a power of two within 256 elements is reduced in one CTA's shared memory."""
        return self.group > 0 and 256 % self.group != 0

    @property
    def row_as_asserted(self) -> str:
        """The table and the type of the format must agree."""
        row = self.row
        facts = {"CodeBytes": row.code_bytes, "ScaleBytes": row.scale_bytes, "ScalesInWord": row.scales_in_word, "Group": self.group}
        return "".join(f'static_assert(Config::Format::k{name} == {value}, "");\n' for name, value in facts.items())

    def wire_bytes(self, hidden_size: int) -> int:
        """Of the codes and the words of scales of a row on its way to another rank (kernels/gather.cuh)."""
        row = self.row
        scales = 0 if not row.scale_bytes else -(-hidden_size // self.group // row.scales_in_word) if self.group else 1
        return hidden_size // 8 * row.code_bytes + 4 * scales


def source_type(prologue: PrologueForm | TermsForm | ProductForm | None, dtype: torch.dtype) -> str:
    """Where this rank's terms come from: a template of kernels/source.cuh, and its arguments behind the first."""
    if prologue is None:
        return "DirectSource"
    if isinstance(prologue, TermsForm):
        return f"TermsSource, {_DTYPES[prologue.dtype]}, {prologue.count}, {prologue.wide:#x}u, {prologue.starts:#x}u"
    if isinstance(prologue, ProductForm):
        return f"ProductSource, {_flag(prologue.bias)}"
    if prologue.kind == "gated":
        return "GatedSource"
    weights = {"none": "NoWeight", "value": _DTYPES[dtype], "float32": "Float32"}[prologue.weights]
    if prologue.kind == "expert_reduce":
        return f"ExpertReduceSource, {weights}"
    return f"ExpertCombineSource, {weights}, {_flag(prologue.shared)}"


@dataclass(frozen=True)
class Variant:
    """One kernel: ``kernel`` names its file in ``kernels/``. ``stream``: y is stored; ``gather``: norms and codes go to every rank.

    ``uneven``: how many rows each rank owns is a parameter.
    """

    kernel: str
    world: int
    dtype: torch.dtype
    weight_dtype: torch.dtype
    residual: bool
    norm: bool
    keep_norm: bool
    quant: QuantVariant
    threads: int
    vectors: int
    clustered: bool
    blocks: int
    loop: bool
    ctas_per_multiprocessor: int
    first_poll: int = 0
    ahead: int = 0
    stream: bool = True
    gather: bool = False
    late_weight: bool = False
    launch_late: bool = False
    source_type: str = "DirectSource"
    branch: bool = False
    branch_weight_dtype: torch.dtype | None = None
    uneven: bool = False

    @property
    def name(self) -> str:
        """Short and unique enough for a profiler's list."""
        source = self.source_type.partition("Source")[0]
        before = {"Direct": "", "Terms": "terms_", "Gated": "gated_", "Product": "product_"}.get(source, "experts_")
        before += "uneven_" * self.uneven
        parts = ["branch"] * self.branch + ["residual"] * self.residual + ["norm"] * self.norm
        if self.quant.row.kind is not None:
            parts.append("".join(filter(str.isalnum, self.quant.format)).lower())
        epilogue = "_".join(parts)
        kernel = "reduce_scatter" if self.kernel == "sharded" and not self.gather else self.kernel
        return f"collogue_{before}{kernel}_{self.world}_{epilogue or 'sum'}"

    def source(self) -> str:
        """The translation unit."""
        q = self.quant
        source, *more = self.source_type.split(", ")
        arguments = ", ".join(["C", *more])
        constants = {
            "int kWorld": self.world,
            "bool kOneShot": _flag(ALGORITHMS[self.kernel].one_hop),
            "bool kResidual": _flag(self.residual),
            "bool kStream": _flag(self.stream),
            "bool kNorm": _flag(self.norm),
            "bool kKeepNorm": _flag(self.keep_norm),
            "int kThreads": self.threads,
            "int kVectors": self.vectors,
            "bool kClustered": _flag(self.clustered),
            "int kBlocks": self.blocks,
            "bool kLoop": _flag(self.loop),
            "unsigned kFirstPoll": self.first_poll,
            "unsigned kAhead": self.ahead,
            "bool kGather": _flag(self.gather),
            "bool kLateWeight": _flag(self.late_weight),
            "bool kLaunchLate": _flag(self.launch_late),
            "bool kBranch": _flag(self.branch),
            "bool kUneven": _flag(self.uneven),
        }
        body = "\n".join(f"  static constexpr {name} = {value};" for name, value in constants.items())
        return (
            f'#include "{self.kernel}.cuh"\n'
            f'#include "formats/{q.row.file}.cuh"\n'
            "namespace collogue {\n"
            "struct Config {\n"
            f"  using D = {_DTYPES[self.dtype]};\n"
            f"  using WeightD = {_DTYPES[self.weight_dtype]};\n"
            f"  using BranchWeightD = {_DTYPES[self.branch_weight_dtype or self.dtype]};\n"
            f"  using Format = collogue::{q.struct};\n"
            f"  using Layout = collogue::{LAYOUTS[q.layout][q.row.scale_bytes]};\n"
            "  template <class C>\n"
            f"  using Source = collogue::{source}<{arguments}>;\n"
            f"{body}\n"
            "};\n"
            f"{q.row_as_asserted}"
            "}  // namespace collogue\n"
            f'extern "C" __global__ void __launch_bounds__({self.threads}, {self.ctas_per_multiprocessor})\n'
            f"{self.name}(const __grid_constant__ collogue::Params p) {{\n"
            f"  collogue::{self.kernel}<collogue::Config>(p);\n"
            "}\n"
        )


def _flag(value: bool) -> str:
    return "true" if value else "false"


def block_class(hidden_size: int) -> int:
    """The smallest compiled bound of the number of 256-element blocks."""
    blocks = -(-hidden_size // 256)
    return next(c for c in BLOCK_CLASSES if c >= blocks)

"""What a kernel is compiled for: one frozen description, and the few lines of CUDA C++ that name it."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from collogue.contract.quant import MXFP4, MXFP8, NVFP4, FP8Group, FP8PerToken, FP8Static, Quant

_DTYPES = {torch.bfloat16: "BFloat16", torch.float16: "Float16", torch.float32: "Float32"}
_LAYOUTS = {"linear": "kLinear", "row": "kLinear", "128x4": "k128x4", "8x4": "k8x4", "column": "kColumn"}
#: Compiled upper bounds of ``ceil(H / 256)``: the hidden size itself is a run-time value.
BLOCK_CLASSES = (4, 8, 12, 16, 20, 24, 28, 32, 40, 48, 56, 64, 96, 128)


@dataclass(frozen=True)
class QuantVariant:
    """The part of a quantisation that is compiled in; scales and bounds are run-time values."""

    format: str = "kNone"
    layout: str = "kLinear"
    group: int = 0
    ceil: bool = False

    @classmethod
    def of(cls, quant: Quant | None) -> QuantVariant:
        if quant is None:
            return cls()
        if isinstance(quant, NVFP4):
            return cls("kNVFP4", _LAYOUTS[quant.layout], 16)
        if isinstance(quant, MXFP4 | MXFP8):
            return cls(f"k{quant.name}", _LAYOUTS[quant.layout], 32, quant.rounding == "ceil")
        if isinstance(quant, FP8Group):
            name = "kFP8GroupE8M0" if quant.scale_format == "ue8m0" else "kFP8Group"
            return cls(name, _LAYOUTS[quant.layout], quant.group_size)
        if isinstance(quant, FP8Static | FP8PerToken):
            return cls(f"k{quant.name}")
        raise TypeError(f"no kernel for {type(quant).__name__}")

    @property
    def needs_one_cta(self) -> bool:
        """A group that is not a power of two within 256 elements is reduced in one CTA's shared memory."""
        return self.group > 0 and 256 % self.group != 0


@dataclass(frozen=True)
class Variant:
    """One kernel: ``kernel`` names its file in ``kernels/``. ``stream``: y is stored; ``gather``: finished rows go to every rank."""

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

    @property
    def name(self) -> str:
        """Short and unique enough for a profiler's list."""
        parts = ["residual"] * self.residual + ["norm"] * self.norm
        if self.quant.format != "kNone":
            parts.append(self.quant.format[1:].lower())
        epilogue = "_".join(parts)
        kernel = "reduce_scatter" if self.kernel == "sharded" and not self.gather else self.kernel
        return f"collogue_{kernel}_{self.world}_{epilogue or 'sum'}"

    def source(self) -> str:
        """The translation unit."""
        q = self.quant
        constants = {
            "int kWorld": self.world,
            "bool kOneShot": _flag(self.kernel == "one_shot"),
            "bool kResidual": _flag(self.residual),
            "bool kStream": _flag(self.stream),
            "bool kNorm": _flag(self.norm),
            "bool kKeepNorm": _flag(self.keep_norm),
            "Format kFormat": f"Format::{q.format}",
            "Layout kLayout": f"Layout::{q.layout}",
            "int kGroup": q.group,
            "bool kCeil": _flag(q.ceil),
            "int kThreads": self.threads,
            "int kVectors": self.vectors,
            "bool kClustered": _flag(self.clustered),
            "int kBlocks": self.blocks,
            "bool kLoop": _flag(self.loop),
            "unsigned kFirstPoll": self.first_poll,
            "unsigned kAhead": self.ahead,
            "bool kGather": _flag(self.gather),
        }
        body = "\n".join(f"  static constexpr {name} = {value};" for name, value in constants.items())
        return (
            f'#include "{self.kernel}.cuh"\n'
            "namespace collogue {\n"
            "struct Config {\n"
            f"  using D = {_DTYPES[self.dtype]};\n"
            f"  using WeightD = {_DTYPES[self.weight_dtype]};\n"
            f"{body}\n"
            "};\n"
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

"""A case of ``collogue check`` and its result: plain data, the same on every rank."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import Any

import torch

from collogue.contract.quant import Quant, parse
from collogue.contract.spec import Operation
from collogue.testing.covering import PROLOGUES

#: A multiplier and a divisor that suit values of deviation 1; neither is a power of two.
GLOBAL_SCALE = 448.0 * 6.0 / 5.0
STATIC_SCALE = 5.0 / 448.0


def dtype_of(name: str) -> torch.dtype:
    """The dtype that PyTorch calls ``name``."""
    dtype = getattr(torch, name)
    assert isinstance(dtype, torch.dtype)
    return dtype


@dataclass(frozen=True)
class Case:
    """One call to check: everything that decides its bits. ``format`` is a label as :func:`collogue.contract.quant.parse` takes.

    ``branch``: the sum is normed before the residual is added. ``prologue``: a label of
    :data:`collogue.testing.covering.PROLOGUES`; ``slots`` of each token, or experts. ``rows``: how many each rank owns.
    """

    tokens: int
    hidden_size: int
    dtype: str = "bfloat16"
    format: str = "none"
    world_size: int = 2
    residual: bool = True
    norm: bool = True
    keep_norm: bool = True
    inputs: str = "normal"
    weight_dtype: str | None = None
    weight_offset: float = 0.0
    eps: float = 1e-6
    scale_tensors: bool = False
    seed: int = 0
    operation: Operation = "all_reduce"
    prologue: str = "none"
    slots: int = 4
    branch: bool = False
    rows: tuple[int, ...] | None = None

    def quant(self, device: torch.device | str) -> Quant | None:
        """The format with the check's own scales: numbers, or tensors on ``device``."""
        if not self.scale_tensors:
            return parse(self.format, global_scale=GLOBAL_SCALE, static_scale=STATIC_SCALE)
        tensors = (torch.tensor(value, dtype=torch.float32, device=device) for value in (GLOBAL_SCALE, STATIC_SCALE))
        return parse(self.format, global_scale=next(tensors), static_scale=next(tensors))

    @property
    def value_dtype(self) -> torch.dtype:
        """``dtype`` itself."""
        return dtype_of(self.dtype)

    def in_world(self, size: int) -> Case:
        """The same call of so many ranks. Of uneven rows those of rank 0 stay, and the last rank has all others."""
        if self.rows is None:
            return replace(self, world_size=size)
        first = self.rows[0] if size > 1 else 0
        return replace(self, world_size=size, rows=(first, *[0] * (size - 2), self.tokens - first)[-size:])

    @property
    def family(self) -> str:
        """The name of the format without options and group size."""
        head = self.format.split("/")[0]
        return "fp8_group" if head.startswith("fp8_group") else head

    @property
    def possible(self) -> bool:
        """Whether the format's block divides the hidden size. Where it does not, the right answer is :class:`FormatError`."""
        quant = self.quant("cpu")
        return quant is None or not quant.block or self.hidden_size % quant.block == 0

    @property
    def keeps_norm(self) -> bool:
        """The ``keep_norm`` of the call: only where there is a norm and something else is made of it."""
        return self.keep_norm and self.norm and self.format != "none"

    @property
    def asked(self) -> dict[str, Any]:
        """Operation, rows, residual, norm and keep_norm as ``comm.explain`` takes them; of ``all_gather``, what the shard holds."""
        if self.operation == "all_gather":
            return {"residual": True, "norm": "norm" in self.outputs, "keep_norm": False, "operation": self.operation, "rows": self.rows}
        asked = {"residual": self.residual, "norm": self.norm, "keep_norm": self.keeps_norm, "operation": self.operation}
        return {**asked, "prologue": PROLOGUES[self.prologue], "branch_norm": self.branch, "rows": self.rows}

    @property
    def outputs(self) -> tuple[str, ...]:
        """Names of the outputs of this call."""
        quant = self.quant("cpu")
        names = [] if self.operation == "finish" else ["residual" if self.residual or self.norm else "reduced"]
        if self.norm and (quant is None or self.keep_norm):
            names.append("norm")
        if quant is not None:
            names += ["codes"] if quant.scale_dtype is None else ["codes", "scales"]
        return tuple(names)

    def __str__(self) -> str:
        default = {f.name: f.default for f in fields(self)}
        shown = ("tokens", "hidden_size", "dtype", "format", "world_size")
        rest = [f"{k}={v}" for k, v in vars(self).items() if k not in shown and v != default[k]]
        head = f"world {self.world_size} T={self.tokens} H={self.hidden_size} {self.dtype} {self.format}"
        return " ".join([head, *rest])


@dataclass(frozen=True)
class CaseResult:
    """What a case showed: the differing elements of each output (added over both calls and the ranks), and the first error.

    ``ranks`` says what the ranks were: ``"threads"`` (CPU), ``"processes"`` (one a GPU) or ``"virtual"`` (threads that share GPUs).
    """

    case: Case
    differing: dict[str, int]
    error: str | None = None
    expected_error: str | None = None
    first: str | None = None
    seconds: float = 0.0
    device: str = "cpu"
    ranks: str = "threads"

    @property
    def passed(self) -> bool:
        """No element differs, and there is no error; or there is exactly the error that must be."""
        if self.expected_error is not None:
            return self.error is not None and self.error.startswith(self.expected_error)
        return self.error is None and not any(self.differing.values())

    def as_json(self) -> dict[str, Any]:
        return {
            "device": self.device,
            "ranks": self.ranks,
            **vars(self.case),
            "passed": self.passed,
            "differing": self.differing,
            "error": self.error,
            "expected_error": self.expected_error,
            "first_difference": self.first,
            "seconds": round(self.seconds, 4),
        }

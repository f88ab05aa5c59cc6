"""What the fusion pass did and did not do."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True)
class Fused:
    """One all-reduce that became ``collogue::all_reduce`` with what follows it.

    ``roundings``: intermediate roundings of the model that the fused call does not have (or has in another place), and one that it adds
    where the graph quantizes a norm that is left in float32. ``eps``: ``None`` where no norm follows. ``branch_eps`` and
    ``branch_offset``: of a norm before the residual.
    """

    where: str
    comm: str
    shape: str
    residual: bool
    eps: float | None
    weight_offset: float
    quant: str
    keeps_norm: bool
    roundings: tuple[str, ...]
    branch_eps: float | None = None
    branch_offset: float = 0.0

    def __str__(self) -> str:
        norm, branch = _norm(self.eps, self.weight_offset), _norm(self.branch_eps, self.branch_offset)
        parts = ["all_reduce", *branch, *(["residual"] if self.residual else []), *norm]
        if self.quant != "none":
            parts.append(self.quant + (" and the norm" if self.keeps_norm else ""))
        rounded = f"; roundings that differ: {', '.join(self.roundings)}" if self.roundings else ""
        return f"fused   {self.where} {self.shape} on {self.comm}: {' + '.join(parts)}{rounded}"


def _norm(eps: float | None, offset: float) -> list[str]:
    return [] if eps is None else [f"RMSNorm(eps={eps:g}" + (f", weight_offset={offset:g})" if offset else ")")]


@dataclass(frozen=True)
class Missed:
    """One all-reduce that stayed as it was, and why."""

    where: str
    reason: str

    def __str__(self) -> str:
        return f"missed  {self.where}: {self.reason}"


@dataclass
class Report:
    """Every all-reduce that the pass saw since the last :meth:`clear`, in order, and remarks about parts that stayed outside."""

    fused: list[Fused] = field(default_factory=list)
    missed: list[Missed] = field(default_factory=list)
    remarks: list[str] = field(default_factory=list)

    def clear(self) -> None:
        """Forget everything."""
        self.fused.clear()
        self.missed.clear()
        self.remarks.clear()

    def __str__(self) -> str:
        lines = [*map(str, self.fused), *map(str, self.missed), *(f"remark  {text}" for text in self.remarks)]
        return "\n".join([*lines, f"{len(self.fused)} fused, {len(self.missed)} missed"])

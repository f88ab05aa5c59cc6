"""The terms of one sum, in this rank's memory: what the host path brings together and one kernel adds."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import torch

from collogue.contract.spec import Islands
from collogue.kernels import constants

#: Most terms of one sum of a kernel.
MAX_TERMS = constants("params.cuh")["kMaxTerms"]


@dataclass(frozen=True)
class TermsForm:
    """What kernels are compiled for: so many terms of ``dtype``. Bits: which of them are float32 sums of islands, and where an island
    begins (none: one sum).
    """

    dtype: torch.dtype
    count: int
    wide: int = 0
    starts: int = 0
    #: As of :class:`collogue.PrologueForm`, in whose place it stands: no journal holds it.
    kind: None = None
    weights: Literal["none"] = "none"


@dataclass(frozen=True, eq=False)
class Terms:
    """``s = +0; s = s + values[0]; ..``, or, with ``islands`` of places in ``values``, their sums added in order. All are [R, H]."""

    values: tuple[torch.Tensor, ...]
    islands: Islands | None = None

    @property
    def form(self) -> TermsForm:
        narrow = [value.dtype for value in self.values if value.dtype != torch.float32]
        wide = sum(1 << k for k, value in enumerate(self.values) if narrow and value.dtype == torch.float32)
        starts = sum(1 << island[0] for island in self.islands or ())
        return TermsForm(narrow[0] if narrow else torch.float32, len(self.values), wide, starts)

    @property
    def tokens(self) -> int:
        """R."""
        return len(self.values[0])

    @property
    def hidden_size(self) -> int:
        return self.values[0].shape[1]

    def tensors(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Every tensor, by name."""
        yield from ((f"term {k}", value) for k, value in enumerate(self.values))

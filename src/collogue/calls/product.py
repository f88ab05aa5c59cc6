"""A product of codes before its scales: what a kernel of a world of one scales and rounds."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import torch

from collogue.contract.formats import round_value


@dataclass(frozen=True)
class ProductForm:
    """What kernels are compiled for: a product with or without a bias."""

    bias: bool
    #: As of :class:`collogue.PrologueForm`, in whose place it stands: no journal holds it.
    kind: None = None
    weights: Literal["none"] = "none"


@dataclass(frozen=True, eq=False)
class ScaledProduct:
    """``round_D(product * rows * columns + bias)``; each operation is rounded to float32, -0 becomes +0 and NaN one NaN.

    Args:
        product: ``[T, H]`` float32. rows: ``[T, 1]`` float32. columns: ``[H, 1]`` float32.
        dtype: D, of the result. bias: ``[H]`` of D, or ``None``.
    """

    product: torch.Tensor
    rows: torch.Tensor
    columns: torch.Tensor
    bias: torch.Tensor | None
    dtype: torch.dtype

    @property
    def form(self) -> ProductForm:
        return ProductForm(self.bias is not None)

    @property
    def tokens(self) -> int:
        """T."""
        return self.product.shape[0]

    @property
    def hidden_size(self) -> int:
        return self.product.shape[1]

    def tensors(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Every tensor, by name."""
        yield from (("product", self.product), ("rows", self.rows), ("columns", self.columns))
        if self.bias is not None:
            yield "bias", self.bias

    def values(self) -> torch.Tensor:
        """``[T, H]``, by PyTorch operations: the bits that the kernel has."""
        scaled = self.product * self.rows * self.columns.t()
        return round_value(scaled if self.bias is None else scaled + self.bias, self.dtype)

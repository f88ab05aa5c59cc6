"""Ways to add the ranks' terms: the contract's, and those of other implementations. Everything after the sum is the contract's.

=============== =========================================================================
contract        ``y = round(((0 + x_0) + x_1) + .. + residual)``: float32, rounded once
two roundings   ``y = round(round(x_0 + x_1 + ..) + residual)``: an all-reduce, then the addition of a separate kernel
each addition   ``s = round(s + x_r)`` for each rank, then ``y = round(s + residual)``: accumulation in the dtype itself
terms as F      the contract's, of terms that were quantized to F and decoded: ``Communicator(.., wire=F)``
=============== =========================================================================
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import torch

from collogue.contract.formats import round_value
from collogue.contract.quant import Quant, parse
from collogue.contract.reference import all_reduce, sum_partials
from collogue.contract.spec import Output, RMSNorm
from collogue.testing import VirtualGroup

#: From all partials [T, H] in rank order and the residual to y, in their dtype.
Order = Callable[[Sequence[torch.Tensor], torch.Tensor | None], torch.Tensor]


def contract(partials: Sequence[torch.Tensor], residual: torch.Tensor | None) -> torch.Tensor:
    """One rounding."""
    total = sum_partials(partials)
    return round_value(total if residual is None else total + residual.float(), partials[0].dtype)


def two_roundings(partials: Sequence[torch.Tensor], residual: torch.Tensor | None) -> torch.Tensor:
    """The sum is rounded before the residual is added."""
    total = round_value(sum_partials(partials), partials[0].dtype)
    return total if residual is None else round_value(total.float() + residual.float(), total.dtype)


def each_addition(partials: Sequence[torch.Tensor], residual: torch.Tensor | None) -> torch.Tensor:
    """Every addition is rounded."""
    dtype = partials[0].dtype
    total = partials[0]
    for term in (*partials[1:], *(() if residual is None else (residual,))):
        total = round_value(total.float() + term.float(), dtype)
    return round_value(total.float(), dtype)


def terms_as(wire: Quant) -> Order:
    """The contract's sum where terms travel in this format."""

    def add(partials: Sequence[torch.Tensor], residual: torch.Tensor | None) -> torch.Tensor:
        out = all_reduce(partials, residual=residual, wire=wire)
        y = out.reduced if residual is None else out.residual
        assert y is not None
        return y

    return add


ORDERS: dict[str, Order] = {"contract": contract, "two roundings": two_roundings, "each addition": each_addition}
#: Of those, for sums without a format behind them.
WIRES: dict[str, Order] = {
    f"terms as {label}": terms_as(wire)
    for label in ("fp8_per_token", "fp8_group32/float32/row", "mxfp8/ceil/linear")
    if (wire := parse(label))
}


class OrderedSum:
    """Stands for a communicator in :class:`collogue.tools.demo.model.ShardedLlama`, on virtual ranks: adds in ``order``."""

    def __init__(self, group: VirtualGroup, dtype: torch.dtype, order: Order) -> None:
        self.rank, self.world_size, self.device, self.dtype = group.rank, group.size, group.device, dtype
        self._group, self._order = group, order

    def all_reduce(
        self, partial: torch.Tensor, *, residual: torch.Tensor | None = None, norm: RMSNorm | None = None, quant: Quant | None = None
    ) -> Output:
        """As :meth:`collogue.Communicator.all_reduce`; y is always ``residual``. All ranks get the same tensors: none may write them."""
        if self.device.type == "cuda":
            self._group.stream().synchronize()
        partials = [x.to(self.device) for x in self._group.all_gather_object(partial)] if self.rank == 0 else self._sent(partial)
        out = None
        if partials:
            y = self._order(partials, residual)
            # A sum of one term is that term.
            out = replace(all_reduce([y], norm=norm, quant=quant), reduced=None, residual=y)
            if self.device.type == "cuda":
                self._group.stream().synchronize()
        shared: Output = self._group.all_gather_object(out)[0]
        return shared if self.rank == 0 else Output(**{name: tensor.to(self.device) for name, tensor in shared.items()})

    def _sent(self, partial: torch.Tensor) -> list[torch.Tensor]:
        self._group.all_gather_object(partial)
        return []

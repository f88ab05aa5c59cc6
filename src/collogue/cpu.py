"""The engine of CPU groups: the ranks exchange their partials and each works out the reference."""

from __future__ import annotations

from collections.abc import Iterable

import torch

from collogue import reference
from collogue.call import Call, Capacity
from collogue.errors import MismatchedCall
from collogue.formats import scale_storage
from collogue.group import Group
from collogue.plan import Request
from collogue.spec import Output, describe

_HEADER_BYTES = 256


class ReferenceEngine:
    """Runs calls through :mod:`collogue.reference`. Ranks that call with different arguments all raise :class:`MismatchedCall`."""

    def __init__(self, group: Group, capacity: Capacity) -> None:
        self.group = group
        self.capacity = capacity

    def run(self, call: Call, out: Output | None) -> Output:
        partials = self._gather(call)
        result = reference.all_reduce(
            partials,
            residual=call.residual,
            norm=call.norm,
            quant=call.quant,
            keep_norm=call.wanted.norm and call.quant is not None,
        )
        if out is None:
            return result
        for name, tensor in result.items():
            target = getattr(out, name)
            if name == "scales":  # with the padding that lies under a strided view
                target, tensor = scale_storage(target), scale_storage(tensor)
            target.copy_(tensor)
        return out

    def _gather(self, call: Call) -> list[torch.Tensor]:
        if self.group.size == 1:
            return [call.partial]
        header = torch.frombuffer(bytearray(_header(call)), dtype=torch.uint8)
        headers = header.new_empty(self.group.size, _HEADER_BYTES)
        self.group.all_gather(headers, header)
        texts = [bytes(h.tolist()).rstrip(b"\0").decode() for h in headers]
        for rank, text in enumerate(texts):
            if text != texts[0]:
                raise MismatchedCall(
                    f"rank 0 called with ({texts[0]}), rank {rank} with ({text})",
                    hint="every rank of the group must make the same call: same tokens, hidden size and epilogue",
                )
        partials = call.partial.new_empty(self.group.size, *call.partial.shape)
        self.group.all_gather(partials, call.partial)
        return list(partials.unbind(0))

    def prepare(self, requests: Iterable[Request]) -> None:
        """Nothing to build."""

    def check(self) -> None:
        """Nothing can be pending."""

    def reset(self) -> None:
        """Nothing to clean; the ranks meet, as on GPUs."""
        self.group.barrier()

    def close(self) -> None:
        """Nothing to free."""


def _header(call: Call) -> bytes:
    """The arguments that must agree between ranks, as text of fixed length."""
    parts = [f"tokens={call.tokens}", f"hidden_size={call.hidden_size}", f"dtype={str(call.partial.dtype).removeprefix('torch.')}"]
    parts.append(f"residual={'yes' if call.residual is not None else 'no'}")
    if call.norm is not None:
        parts.append(f"norm(eps={call.norm.eps:g}, weight_offset={call.norm.weight_offset:g})")
    parts.append(f"quant={describe(call.quant)}")
    if call.wanted.norm and call.quant is not None:
        parts.append("keep_norm")
    return ", ".join(parts).encode()[:_HEADER_BYTES].ljust(_HEADER_BYTES, b"\0")

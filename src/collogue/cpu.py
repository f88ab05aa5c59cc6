"""The engine of CPU groups: the ranks exchange their partials or rows, and each works out the reference."""

from __future__ import annotations

import copy
import os
import weakref
from collections.abc import Iterable
from dataclasses import replace

import torch

from collogue.calls.call import Call, check_indices
from collogue.calls.outputs import write
from collogue.calls.request import Signature
from collogue.contract import reference
from collogue.contract.formats import place_scales, read_scales
from collogue.contract.prologue import ExpertCombine, ExpertReduce
from collogue.contract.quant import describe
from collogue.contract.spec import Output, largest_block, owned_rows
from collogue.errors import CollectiveError
from collogue.gpu.exclusive import Exclusive
from collogue.gpu.journal import Journal
from collogue.group import Group, TorchGroup

#: How many communicators each group object has carried: what ranks compare, as calls of another communicator are other calls.
_carried: weakref.WeakKeyDictionary[Group, int] = weakref.WeakKeyDictionary()


class ReferenceEngine:
    """Runs calls through :mod:`collogue.reference`. Ranks that call with different arguments all raise :class:`MismatchedCall`."""

    def __init__(self, group: Group, timeout: float) -> None:
        self.group = group
        self._link = group.connect(timeout) if isinstance(group, TorchGroup) else None
        self._number = _carried[group] = _carried.get(group, 0) + 1
        self._failure: CollectiveError | None = None
        self._in_use = Exclusive()
        self._debug = os.environ.get("COLLOGUE_DEBUG", "0") not in ("", "0")

    def quick(self, call: Call, out: Output | None) -> None:
        """The reference is not quick."""

    def latest(self, *arguments: object) -> None:
        """Nothing is bound."""

    def run(self, call: Call, out: Output | None) -> Output:
        if self._debug:
            check_indices(call.partial)
        with self._in_use:
            alone = call.operation == "finish" or self.group.size == 1
            result = self._result(call) if alone else self._together(call)
        if out is None:
            return result
        write(result, out)
        return out

    def _together(self, call: Call) -> Output:
        """The result of a call that ranks make together. A failure stays until :meth:`reset`."""
        if self._failure is not None:
            raise copy.copy(self._failure)
        try:
            self.group.agree(_describe(call, self._number))
            return self._result(call)
        except CollectiveError as error:
            self._failure = error
            raise
        except BaseException as error:
            if self._link is not None:
                self._link.abandon(f"left a call by {type(error).__name__}")
            raise

    def _result(self, call: Call) -> Output:
        if call.shard is not None:
            return self._gather(call.shard, call)
        keep_norm = call.wanted.norm and call.quant is not None
        own_term = reference.term_of(call.partial)
        if call.operation == "finish":
            return reference.finish(own_term, norm=call.norm, quant=call.quant, keep_norm=keep_norm)
        partials = self._exchange(own_term).unbind(0)
        if (owned := call.owned) is not None:
            partials = tuple(partial[owned.start : owned.stop] for partial in partials)
        epilogue = {"norm": call.norm, "quant": call.quant, "keep_norm": keep_norm, "branch_norm": call.branch_norm}
        own = reference.all_reduce(partials, residual=call.residual, **epilogue)  # type: ignore[arg-type]
        if call.operation != "sharded":
            return own
        finished = self._gather(replace(own, reduced=None, residual=None), call)
        return replace(finished, reduced=own.reduced, residual=own.residual)

    def _gather(self, shard: Output, call: Call) -> Output:
        """What the shards of all ranks hold, concatenated. Scales go from the layout of a shard into that of all rows."""
        whole = Output()
        for name, tensor in shard.items():
            if name == "scales":
                assert call.quant is not None
                assert call.owned is not None
                rows = self._gather_rows(read_scales(tensor, call.quant, len(call.owned), call.hidden_size), call)
                whole.scales = place_scales(rows, call.quant, call.tokens, call.hidden_size)
            else:
                setattr(whole, name, self._gather_rows(tensor, call))
        return whole

    def _gather_rows(self, own: torch.Tensor, call: Call) -> torch.Tensor:
        """The rows that each rank owns, in one new tensor: blocks of one size travel, short ones padded at the end."""
        world = self.group.size
        block = own.new_zeros(largest_block(call.tokens, world, call.rows), own.shape[1])
        block[: len(own)] = own
        every = self._exchange(block)
        return torch.cat([every[rank, : len(owned_rows(call.tokens, world, rank, call.rows))] for rank in range(world)])

    def _exchange(self, own: torch.Tensor) -> torch.Tensor:
        """Every rank's tensor: ``[N, *own.shape]``."""
        if self.group.size == 1:
            return own[None]
        every = own.new_empty(self.group.size, *own.shape)
        self.group.all_gather(every, own)
        return every

    def prepare(self, signatures: Iterable[Signature]) -> None:
        """Nothing to build."""

    def check(self) -> None:
        if self._failure is not None:
            raise copy.copy(self._failure)
        if self._link is not None:
            self._link.check()

    def reset(self) -> None:
        with self._in_use:
            if self._link is not None:
                self._link.reset()
            else:
                self.group.barrier()
            self._failure = None

    def close(self, collective: bool) -> None:
        """The others need not wait: what they call later raises."""
        if self._link is not None:
            self._link.close()

    def journal(self) -> Journal:
        """Kept by GPUs."""
        return Journal(self.group.rank, self.group.size, 0, dict.fromkeys(range(self.group.size), ()))


def _describe(call: Call, number: int) -> str:
    """What must agree between ranks, as text. ``number``: of the communicator among those of the group object."""
    parts = [call.operation, f"tokens={call.tokens}", f"hidden_size={call.hidden_size}"]
    parts.append(f"dtype={str(call.signature.request.dtype).removeprefix('torch.')}")
    if call.rows is not None:
        parts.append(f"rows={list(call.rows)}")
    if isinstance(call.partial, ExpertCombine):
        parts.append(f"expert_combine(top_k={call.partial.count})")
    elif isinstance(call.partial, ExpertReduce):
        parts.append("expert_reduce")
    if call.shard is not None:
        parts.append(f"shard={'+'.join(name for name, _ in call.shard.items())}")
    else:
        parts.append(f"residual={'yes' if call.residual is not None else 'no'}")
    for name, norm in (("norm", call.norm), ("branch_norm", call.branch_norm)):
        if norm is not None:
            parts.append(f"{name}(eps={norm.eps:.9g}, weight_offset={norm.weight_offset:.9g}, weight={norm.weight.dtype})")
    parts.append(f"quant={describe(call.quant)}")
    if (smallest := getattr(call.quant, "smallest", None)) is not None:
        parts.append(f"smallest={smallest:.9g}")
    if call.norm is not None and call.wanted.norm and call.quant is not None:
        parts.append("keep_norm")
    if number > 1:
        parts.append(f"communicator {number} of the group")
    return ", ".join(parts)

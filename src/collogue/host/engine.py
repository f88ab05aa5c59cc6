"""The engine of groups that move the bytes of calls themselves. The reference adds and applies the epilogue on the CPU, kernels on GPUs.

Small calls: every rank gets every term, adds all of them and finishes all rows. Others: the terms of a row go to the rank that owns it,
which adds them and the residual; what it has made goes to every rank.
"""

from __future__ import annotations

import copy
import os
import weakref
from collections.abc import Iterable

import torch

from collogue.calls.call import Call, check_indices
from collogue.calls.request import Signature, keep
from collogue.calls.terms import Terms
from collogue.contract.formats import place_scales, read_scales, scale_storage
from collogue.contract.prologue import PROLOGUES, ExpertCombine, Prologue
from collogue.contract.quant import Quant, describe
from collogue.contract.spec import Output, owned_rows
from collogue.contract.wire import pack
from collogue.errors import CollectiveError
from collogue.gpu.exclusive import Exclusive
from collogue.gpu.journal import Journal
from collogue.group import Group, TorchGroup
from collogue.host.finish import Finisher, KernelFinisher, ReferenceFinisher, Steps
from collogue.host.rows import Rows
from collogue.planning.host import by_gather, steps
from collogue.planning.topology import Topology

#: How many communicators each group object has carried: what ranks compare, as calls of another communicator are other calls.
_carried: weakref.WeakKeyDictionary[Group, int] = weakref.WeakKeyDictionary()


class HostEngine:
    """Runs checked calls. Ranks that call with different arguments all raise :class:`MismatchedCall`."""

    def __init__(self, group: Group, topology: Topology, timeout: float, wire: Quant | None = None) -> None:
        self.group, self.topology, self._wire = group, topology, wire
        self._link = group.connect(timeout) if isinstance(group, TorchGroup) else None
        self._number = _carried[group] = _carried.get(group, 0) + 1
        self._rows, self._steps = Rows(group, topology, wire), Steps(topology, group.device)
        self._descriptions: dict[object, str] = {}
        self.timeout = timeout
        self._finisher: Finisher = self.make_finisher()
        self._failure: CollectiveError | None = None
        self._in_use = Exclusive()
        self._debug = os.environ.get("COLLOGUE_DEBUG", "0") not in ("", "0")

    def make_finisher(self) -> Finisher:
        """The reference on CPU groups, else kernels."""
        if self.group.device.type == "cpu":
            return ReferenceFinisher()
        return KernelFinisher(self.topology, self.group.device, self.timeout)

    def quick(self, call: Call, out: Output | None) -> None:
        """No call is quick."""

    def latest(self, *arguments: object) -> None:
        """Nothing is bound."""

    def run(self, call: Call, out: Output | None) -> Output:
        if self._debug and not (call.signature.device.type == "cuda" and torch.cuda.is_current_stream_capturing()):
            check_indices(call.partial)
        with self._in_use:
            given = call.signature.empty() if out is None else out
            if call.operation == "finish":
                self._finisher.run(call, given)
            elif self.group.size == 1:
                self._result(call, given)
            else:
                self._together(call, given)
        return given

    def _together(self, call: Call, out: Output) -> None:
        """A call that ranks make together. A failure stays until :meth:`reset`."""
        if self._failure is not None:
            raise copy.copy(self._failure)
        try:
            self._result(call, out)
        except CollectiveError as error:
            self._failure = error
            raise
        except BaseException as error:
            if self._link is not None:
                self._link.abandon(f"left a call by {type(error).__name__}")
            raise

    def _result(self, call: Call, out: Output) -> None:
        what, request = self._description(call), call.signature.request
        blocks = [owned_rows(call.tokens, self.group.size, rank, call.rows) for rank in range(self.group.size)]
        if call.shard is not None:
            self._gather(call.shard, call, out, blocks, what)
            return
        term = self._term(call)
        whole = call.operation == "all_reduce"
        epilogue = {"norm": call.norm, "quant": call.quant, "keep_norm": call.wanted.norm and call.quant is not None}
        if whole and by_gather(self.topology, request):
            terms = self._rows.everywhere(self._packed(term), what)
            step = self._steps.add(terms, term.dtype, residual=call.residual, branch_norm=call.branch_norm, **epilogue)  # type: ignore[arg-type]
            self._finisher.run(step, out)
            return
        terms = self._rows.to_owners(self._packed(term), blocks, what, self._total)
        if whole:
            self._add_and_return(terms, call, out, blocks, what)
            if call.norm is not None or call.quant is not None:
                y = out.reduced if out.residual is None else out.residual
                assert y is not None
                finished = Output(norm=out.norm, codes=out.codes, scales=out.scales)
                self._finisher.run(self._steps.finish(y, **epilogue), finished)  # type: ignore[arg-type]
            return
        step = self._steps.add(terms, term.dtype, residual=call.residual, branch_norm=call.branch_norm, **epilogue)  # type: ignore[arg-type]
        if call.operation == "reduce_scatter":
            self._finisher.run(step, out)
            return
        own = step.signature.empty()
        own.reduced, own.residual = out.reduced, out.residual
        self._finisher.run(step, own)
        own.reduced = own.residual = None
        self._gather(own, call, out, blocks, what)

    def _description(self, call: Call) -> str:
        """As :func:`_describe`, kept where it does not depend on a format's or a shard's tensors."""
        if call.quant is not None or call.shard is not None or isinstance(call.partial, PROLOGUES):
            return _describe(call, self._number)
        norms = [norm and (norm.eps, norm.weight_offset, norm.weight.dtype) for norm in (call.norm, call.branch_norm)]
        key = call.signature, *norms
        return self._descriptions.get(key) or keep(self._descriptions, key, _describe(call, self._number))

    def _add_and_return(self, terms: Terms, call: Call, out: Output, blocks: list[range], what: str) -> None:
        """y of the rows that this rank owns, into its place in ``out``, and the others' rows beside it."""
        name, mine = "residual" if out.residual is not None else "reduced", blocks[self.group.rank]
        y: torch.Tensor = getattr(out, name)
        residual = None if call.residual is None else call.residual[mine.start : mine.stop]
        step = self._steps.add(terms, y.dtype, residual=residual, branch_norm=call.branch_norm)
        place = {"reduced" if residual is None else "residual": y[mine.start : mine.stop]}
        self._finisher.run(step, Output(**place))
        self._rows.gather(y, blocks, f"{what}, rows back")

    def _term(self, call: Call) -> torch.Tensor:
        """This rank's term [T, H]: a partial as it is, a prologue computed."""
        if not isinstance(call.partial, PROLOGUES):
            return call.partial  # type: ignore[return-value]
        return self._run_alone(call.partial, call.signature.request.dtype)

    def _packed(self, term: torch.Tensor) -> torch.Tensor:
        """``term`` as it travels: its rows, or those of its codes and scales. This rank's own too, so that no bit depends on the owner."""
        self._rows.width = term.shape[1]
        if self._wire is None:
            return term
        step = self._steps.finish(term, None, self._wire, keep_norm=False)
        out = step.signature.empty()
        self._finisher.run(step, out)
        assert out.codes is not None
        assert out.scales is not None
        return pack(out.codes, out.scales, self._wire)

    def _total(self, terms: Terms) -> torch.Tensor:
        """The float32 sum of an island's terms."""
        return self._run_alone(terms, torch.float32)

    def _run_alone(self, given: Terms | Prologue, dtype: torch.dtype) -> torch.Tensor:
        step = self._steps.add(given, dtype)
        out = step.signature.empty()
        self._finisher.run(step, out)
        assert out.reduced is not None
        return out.reduced

    def _gather(self, shard: Output, call: Call, out: Output, blocks: list[range], what: str) -> None:
        """What the shards of all ranks hold, concatenated. Scales go from the layout of a shard into that of all rows."""
        mine = blocks[self.group.rank]
        for name, tensor in shard.items():
            whole, own = getattr(out, name), tensor
            if name == "scales":
                assert call.quant is not None
                own = read_scales(tensor, call.quant, len(mine), call.hidden_size)
                whole = own.new_empty(call.tokens, own.shape[1])
            whole[mine.start : mine.stop] = own
            self._rows.gather(whole, blocks, f"{what}, {name}")
            if name == "scales":
                assert call.quant is not None
                placed = place_scales(whole, call.quant, call.tokens, call.hidden_size)
                scale_storage(getattr(out, name)).copy_(scale_storage(placed))

    def prepare(self, signatures: Iterable[Signature]) -> None:
        with self._in_use:
            for signature in signatures:
                self._steps.prepare(self._finisher, steps(self.topology, signature.request, self.group.rank))

    def check(self) -> None:
        if self._failure is not None:
            raise copy.copy(self._failure)
        if self._link is not None:
            self._link.check()

    def reset(self) -> None:
        with self._in_use:
            self._finisher.synchronize()
            if self._link is not None:
                self._link.reset()
            else:
                self.group.barrier()
            self._failure = None

    def close(self, collective: bool) -> None:
        """The others need not wait: what they call later raises."""
        self._finisher.close()
        if self._link is not None:
            self._link.close()

    def journal(self) -> Journal:
        """Kept by kernels that send."""
        return Journal(self.group.rank, self.group.size, 0, dict.fromkeys(range(self.group.size), ()))


def _describe(call: Call, number: int) -> str:
    """What must agree between ranks, as text. ``number``: of the communicator among those of the group object."""
    parts = [call.operation, f"tokens={call.tokens}", f"hidden_size={call.hidden_size}"]
    parts.append(f"dtype={str(call.signature.request.dtype).removeprefix('torch.')}")
    if call.rows is not None:
        parts.append(f"rows={list(call.rows)}")
    if isinstance(call.partial, ExpertCombine):
        parts.append(f"expert_combine(top_k={call.partial.count})")
    elif isinstance(call.partial, PROLOGUES):
        parts.append(call.partial.form.kind)
    if call.shard is not None:
        parts.append(f"shard={'+'.join(name for name, _ in call.shard.items())}")
    else:
        parts.append(f"residual={'yes' if call.residual is not None else 'no'}")
    for name, norm in (("norm", call.norm), ("branch_norm", call.branch_norm)):
        if norm is not None:
            parts.append(f"{name}(eps={norm.eps:.9g}, weight_offset={norm.weight_offset:.9g}, weight={norm.weight.dtype})")
    parts.append(f"quant={describe(call.quant)}")
    number_of_format = None if call.quant is None else call.quant.given_scale
    if isinstance(number_of_format, int | float):
        parts.append(f"scale={number_of_format:.9g}")
    if (smallest := getattr(call.quant, "smallest", None)) is not None:
        parts.append(f"smallest={smallest:.9g}")
    if call.norm is not None and call.wanted.norm and call.quant is not None:
        parts.append("keep_norm")
    if number > 1:
        parts.append(f"communicator {number} of the group")
    return ", ".join(parts)

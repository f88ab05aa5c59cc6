"""``collogue.compile``: ``torch.compile`` with a pass that turns all-reduce, residual, RMSNorm and FP8 quantisation into one call.

The pass works on Inductor's post-grad graph (``post_grad_custom_pre_pass``, a public configuration that is part of the key of
PyTorch's compile caches), where functional collectives, ``dist.all_reduce`` and DTensor's redistribution all are
``_c10d_functional.all_reduce``. It matches operators by structure (``norm``, ``quant``) and puts ``torch.ops.collogue.all_reduce``
in their place (``rewrite``); everything else is left as it is. Passes own nothing: the communicator is the caller's, found by the
group's name.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch._inductor.custom_graph_pass import CustomGraphPass

from collogue import registry
from collogue.errors import ArgumentError
from collogue.pytorch.fusion.report import Fused, Missed, Report
from collogue.pytorch.fusion.rewrite import fuse
from collogue.pytorch.fusion.sharding import shard_streams

__all__ = ["Compile", "Fused", "FusionPass", "Missed", "Report", "compile"]

_OPTION = "post_grad_custom_pre_pass"


class FusionPass(CustomGraphPass):
    """The pass by itself, for those who call ``torch.compile`` their own way: ``options={"post_grad_custom_pre_pass": FusionPass()}``."""

    def __init__(self, report: Report | None = None, *, sharded: bool = False) -> None:
        self.report, self.sharded = Report() if report is None else report, sharded

    def __call__(self, graph: torch.fx.Graph) -> None:
        fuse(graph, self.report)
        if self.sharded:
            shard_streams(graph, self.report)

    def uuid(self) -> str:
        """What the rewriting depends on: its sources and the open communicators."""
        digest = hashlib.sha256(repr((self.sharded, registry.fingerprint())).encode())
        for file in sorted(Path(__file__).parent.glob("*.py")):
            digest.update(file.read_bytes())
        return digest.hexdigest()


class Compile:
    """The type of :data:`collogue.compile`."""

    def __init__(self) -> None:
        self._report = Report()

    def __call__(
        self,
        model: Callable[..., Any],
        *,
        backend: str = "inductor",
        mode: str | None = None,
        options: dict[str, Any] | None = None,
        fullgraph: bool = False,
        dynamic: bool | None = None,
        sharded: bool = False,
    ) -> Any:
        """``torch.compile(model)`` that does every all-reduce with the norm behind it in one call.

        Args:
            model: a module or function with tensor-parallel all-reduces, on groups that have a :class:`collogue.Communicator`.
            backend: ``"inductor"``, or ``"eager"``: the rewritten graph runs operator by operator, without code generation.
            mode: as in ``torch.compile``, ``"reduce-overhead"`` among them. Inductor only.
            options: of Inductor, besides ``mode``. A ``post_grad_custom_pre_pass`` of your own runs after this one.
            fullgraph, dynamic: as in ``torch.compile``.
            sharded: let every rank keep only its own rows of the residual stream (sequence parallelism). The same bits; numbers
                of tokens must be fixed in the graph.
        Order and rounding:
            The fused call follows docs/contract.md. Roundings that the model has between the all-reduce and the norm's
            result go away; :meth:`report` names them.
        Synchronisation:
            As :meth:`collogue.Communicator.all_reduce`: every rank runs the same compiled calls in the same order.
        Raises:
            ArgumentError: an unknown backend, or a mode for ``"eager"``.
        """
        if backend == "eager" and mode is None and options is None:
            return torch.compile(model, backend=self._eager(sharded), fullgraph=fullgraph, dynamic=dynamic)
        if backend != "inductor":
            raise ArgumentError(
                f"backend={backend!r} with mode={mode!r}, options={options!r}",
                hint="use backend='inductor', or backend='eager' without mode and options",
            )
        chosen = {**(torch._inductor.list_mode_options(mode, dynamic) if mode else {}), **(options or {})}
        own = FusionPass(self._report, sharded=sharded)
        chosen[_OPTION] = own if _OPTION not in chosen else _Both(own, chosen[_OPTION])
        return torch.compile(model, options=chosen, fullgraph=fullgraph, dynamic=dynamic)

    def _eager(self, sharded: bool) -> Callable[..., Any]:
        from functorch.compile import make_boxed_func  # type: ignore[import-untyped]
        from torch._dynamo.backends.common import aot_autograd

        def compiler(module: torch.fx.GraphModule, inputs: list[Any]) -> Any:
            FusionPass(self._report, sharded=sharded)(module.graph)
            module.recompile()
            return make_boxed_func(module.forward)

        backend: Callable[..., Any] = aot_autograd(fw_compiler=compiler)
        return backend

    def report(self) -> Report:
        """What was fused and what was not, in every graph compiled since the last ``report().clear()``.

        A graph that comes out of PyTorch's compile cache was rewritten when it was put there, and is not listed.
        """
        return self._report


class _Both(CustomGraphPass):
    """One pass after the other."""

    def __init__(self, first: FusionPass, second: Any) -> None:
        self._passes = (first, second)

    def __call__(self, graph: torch.fx.Graph) -> None:
        for each in self._passes:
            each(graph)

    def uuid(self) -> Any:
        """``None``, which switches the cache off, where the second pass has no uuid."""
        second = self._passes[1].uuid() if isinstance(self._passes[1], CustomGraphPass) else None
        return None if second is None else (self._passes[0].uuid(), second)


compile = Compile()

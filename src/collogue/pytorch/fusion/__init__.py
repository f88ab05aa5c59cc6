"""``collogue.compile``: ``torch.compile`` with a pass that turns all-reduce, residual, RMSNorm and FP8 quantization into one call.

The pass works on Inductor's post-grad graph (``post_grad_custom_pre_pass``, a public configuration that is part of the key of
PyTorch's compile caches), where functional collectives, ``dist.all_reduce`` and DTensor's redistribution all are
``_c10d_functional.all_reduce``. It matches operators by structure (``norm``, ``quant``) and puts ``torch.ops.collogue.all_reduce``
in their place (``rewrite``); everything else is left as it is. Passes own nothing: the communicator is the caller's, found by the
group's name.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch

from collogue.errors import ArgumentError
from collogue.pytorch.fusion.report import Fused, Missed, Report

if TYPE_CHECKING:
    from collogue.pytorch.fusion.inductor import FusionPass

__all__ = ["Compile", "Fused", "FusionPass", "Missed", "Report", "compile"]

_OPTION = "post_grad_custom_pre_pass"


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
        Synchronization:
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
        from collogue.pytorch.fusion.inductor import Both, FusionPass

        chosen = {**(torch._inductor.list_mode_options(mode, dynamic) if mode else {}), **(options or {})}
        own = FusionPass(self._report, sharded=sharded)
        chosen[_OPTION] = own if _OPTION not in chosen else Both(own, chosen[_OPTION])
        return torch.compile(model, options=chosen, fullgraph=fullgraph, dynamic=dynamic)

    def _eager(self, sharded: bool) -> Callable[..., Any]:
        from functorch.compile import make_boxed_func  # type: ignore[import-untyped]
        from torch._dynamo.backends.common import aot_autograd

        from collogue.pytorch.fusion.inductor import FusionPass

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


compile = Compile()


def __getattr__(name: str) -> Any:
    if name == "FusionPass":
        from collogue.pytorch.fusion.inductor import FusionPass

        return FusionPass
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

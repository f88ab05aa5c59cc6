"""Models that vLLM does not compile: the all-reduce of a layer waits for the norm after it, and both are one call.

vLLM's layers call ``tensor_model_parallel_all_reduce``, a name of their module, which here returns a :class:`.Deferred` sum; and its
norms, which are ours (out of tree), take the term out of it. Everything else that reads a deferred sum has vLLM's own all-reduce first.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from collogue.contract.spec import VALUE_DTYPES
from collogue.engines.switch import Hook, problems
from collogue.engines.vllm.deferred import Deferred, owns_its_memory
from collogue.errors import PlatformError

_ALL_REDUCE = "tensor_model_parallel_all_reduce"
_NORMS = "vllm.model_executor.layers.layernorm"
#: Modules whose layers end in an all-reduce.
_LAYERS = (
    "vllm.model_executor.layers.linear",
    "vllm.model_executor.layers.vocab_parallel_embedding",
    "vllm.model_executor.layers.fused_moe.runner.moe_runner",
)
HOOKS = (
    *(Hook(module, _ALL_REDUCE, ("input_",)) for module in _LAYERS),
    Hook("vllm.model_executor.custom_op", "op_registry_oot"),
    Hook("vllm.model_executor.custom_op", "CustomOp.register_oot", ("name",)),
    Hook(_NORMS, "RMSNorm", ("hidden_size", "eps", "var_hidden_size", "has_weight")),
    Hook(_NORMS, "RMSNorm.forward_native", ("x", "residual")),
    Hook(_NORMS, "GemmaRMSNorm", ("hidden_size", "eps")),
    Hook(_NORMS, "GemmaRMSNorm.forward_native", ("x", "residual")),
    Hook("vllm.config", "get_current_vllm_config"),
    Hook("vllm.config", "CompilationMode.NONE"),
    Hook("vllm.distributed", "get_tp_group"),
    Hook("vllm.distributed.parallel_state", "GroupCoordinator.all_reduce", ("input_",)),
    Hook("vllm.envs", "VLLM_BATCH_INVARIANT"),
)


class _State:
    """What the process's models allow. Sums are deferred only if every norm so far belongs to a model that is not compiled."""

    def __init__(self) -> None:
        self.widths: set[int] = set()
        self.most = 0
        self.group = ""
        self.closed = ""

    def add(self, width: int) -> None:
        """A norm of ``width`` is being made."""
        from vllm.config import CompilationMode, get_current_vllm_config
        from vllm.distributed import get_tp_group

        from collogue.engines.vllm.fused import logger, why_not

        config = get_current_vllm_config()
        mode = config.compilation_config.mode
        reason = why_not(config)
        if mode not in (None, CompilationMode.NONE):
            reason = f"vLLM compiles (mode {mode.name}): this way is for enforce_eager"
        if reason and not self.closed:
            self.closed = reason
            # Where vLLM compiles by itself, the pass speaks.
            say = logger.debug if mode == CompilationMode.VLLM_COMPILE else logger.warning
            say("eager layers are not served by Collogue: %s", reason)
        self.widths.add(width)
        self.most = max(self.most, config.scheduler_config.max_num_batched_tokens)
        self.group = get_tp_group().unique_name

    def takes(self, term: Tensor) -> bool:
        return (
            not self.closed
            and not torch.compiler.is_compiling()
            and owns_its_memory(term)
            and term.ndim == 2
            and term.is_contiguous()
            and term.dtype in VALUE_DTYPES
            and term.shape[1] in self.widths
            and term.shape[1] % 8 == 0
            and 0 < term.shape[0] <= self.most
        )


state = _State()


def install() -> str:
    """Put our norms and the deferred all-reduce into vLLM. Raises :class:`PlatformError` where this vLLM is not as we know it."""
    moved = problems(HOOKS)
    if moved:
        raise PlatformError(f"this vLLM has other hooks: {'; '.join(moved)}", hint="see docs/engines.md for the versions that were run")
    norms, registry = importlib.import_module(_NORMS), importlib.import_module("vllm.model_executor.custom_op").op_registry_oot
    ours = {"RMSNorm": _fused(norms.RMSNorm, 0.0), "GemmaRMSNorm": _fused(norms.GemmaRMSNorm, 1.0)}
    taken = [name for name in ours if name in registry]
    if taken:
        raise PlatformError(f"another plugin has replaced {', '.join(taken)}", hint="switch one of the two off")
    for name, fused in ours.items():
        getattr(norms, name).register_oot(fused, name=name)
    for module in map(importlib.import_module, _LAYERS):
        setattr(module, _ALL_REDUCE, _deferring(getattr(module, _ALL_REDUCE)))
    return "Collogue serves RMSNorm and GemmaRMSNorm behind an all-reduce where vLLM does not compile"


def _deferring(reduce: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    @functools.wraps(reduce)
    def all_reduce(input_: Tensor) -> Tensor:
        return Deferred(input_, _counted(reduce)) if state.takes(input_) else reduce(input_)

    return all_reduce


def _counted(reduce: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    def late(term: Tensor) -> Tensor:
        from collogue.engines.vllm import fused

        fused.counts["read before a norm"] += 1
        return reduce(term)

    return late


def _fused(base: Any, offset: float) -> Any:
    """vLLM's norm ``base`` that takes a deferred sum; ``offset`` is what it adds to its weight."""

    class Fused(base):  # type: ignore[misc]
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)
            state.add(self.weight.shape[0])

        def forward(self, x: Tensor, residual: Tensor | None = None) -> Any:
            if isinstance(residual, Deferred):
                residual = residual.sum_now()
            if not isinstance(x, Deferred):
                return super().forward(x, residual)
            if not x.pending or not self._takes(x, residual):
                return super().forward(x.sum_now(), residual)
            from collogue.engines.vllm.fused import all_reduce_norm

            norm, stream = all_reduce_norm(x.term, residual, self.weight, self.variance_epsilon, offset, state.group, state.most)
            if residual is None:
                x.keep(stream)
                return norm
            return norm, stream

        def _takes(self, x: Tensor, residual: Tensor | None) -> bool:
            same = residual is None or (residual.shape == x.shape and residual.dtype == x.dtype)
            whole = getattr(self, "variance_size_override", None) is None and getattr(self, "has_weight", True)
            return same and whole and self.weight.shape[0] == x.shape[1] and self.weight.dtype in (x.dtype, torch.float32)

    Fused.__name__ = Fused.__qualname__ = base.__name__
    return Fused

"""Models that vLLM compiles: our pass in the place of its all-reduce fusion pass, before norms are fused with anything else.

It needs no FlashInfer, takes any epsilon and any number of tokens up to vLLM's own limit, and world sizes from 2 to 8.
"""

from __future__ import annotations

import hashlib
import importlib
from pathlib import Path
from typing import Any

import torch
from torch.fx import Graph

from collogue.engines.switch import Hook, problems
from collogue.errors import PlatformError

_MANAGER = "vllm.compilation.passes.pass_manager"
_PASS = "AllReduceFusionPass"
_BASE = "vllm.compilation.passes.vllm_inductor_pass"
_CONFIG = "vllm.config.vllm"
_OPTION = "fuse_allreduce_rms"
_THEIRS = "vllm.compilation.passes.fusion.allreduce_rms_fusion"
HOOKS = (
    Hook(_MANAGER, "PostGradPassManager.configure", ("config",)),
    Hook(_BASE, "VllmInductorPass.__init__", ("config",)),
    Hook(_BASE, "VllmInductorPass.time_and_log", ("call_fn",)),
    Hook("vllm.compilation.passes.inductor_pass", "InductorPass.is_applicable_for_range", ("compile_range",)),
    Hook("vllm.compilation.passes.inductor_pass", "InductorPass.uuid"),
    Hook("vllm.ir.ops", "rms_norm.torch_op"),
    Hook("vllm.ir.ops", "fused_add_rms_norm.torch_op"),
    Hook("vllm.distributed.parallel_state", "all_reduce", ("tensor", "group_name")),
    Hook("vllm.distributed", "get_tp_group"),
    Hook("vllm.config", "CompilationMode.VLLM_COMPILE"),
    Hook(_CONFIG, "OPTIMIZATION_LEVEL_TO_CONFIG"),
    Hook("vllm.envs", "VLLM_BATCH_INVARIANT"),
)


def install() -> str:
    """Put our pass in the pass manager. Raises :class:`PlatformError` where this vLLM is not as we know it."""
    moved = problems(HOOKS)
    manager = importlib.import_module(_MANAGER) if not moved else None
    if manager is not None and _PASS not in manager.PostGradPassManager.configure.__code__.co_names:
        moved.append(f"{_MANAGER}.PostGradPassManager.configure does not make an {_PASS}")
    if moved:
        raise PlatformError(f"this vLLM has other hooks: {'; '.join(moved)}", hint="see docs/engines.md for the versions that were run")
    _switch_on()
    setattr(manager, _PASS, _maker(getattr(manager, _PASS, None)))
    return "Collogue's pass is in the place of vLLM's AllReduceFusionPass where vLLM compiles"


def _switch_on() -> None:
    """Where the user leaves the option open, vLLM asks for FlashInfer; we need none."""
    for level in importlib.import_module(_CONFIG).OPTIMIZATION_LEVEL_TO_CONFIG.values():
        options = level["compilation_config"]["pass_config"]
        if callable(options[_OPTION]):
            options[_OPTION] = _wanted


def _wanted(config: Any) -> bool:
    from vllm import envs
    from vllm.platforms import current_platform

    size: int = config.parallel_config.tensor_parallel_size
    return 2 <= size <= 8 and not envs.VLLM_BATCH_INVARIANT and not current_platform.is_rocm() and _theirs_can_be_imported()


def _theirs_can_be_imported() -> bool:
    """Where the option is on, vLLM imports its own pass, whose module needs operators that not every build of vLLM has."""
    try:
        importlib.import_module(_THEIRS)
    except Exception:  # an operator that is not there
        return False
    return True


def _maker(theirs: Any) -> Any:
    """What the manager calls in the place of the pass's class: ours, or theirs where ours has nothing to serve."""

    def make(config: Any) -> Any:
        from collogue.engines.vllm.fused import logger, why_not

        reason = why_not(config)
        if reason:
            logger.warning("compiled graphs are not served by Collogue: %s", reason)
            return theirs(config) if theirs is not None else _pass()(config, 0)
        return _pass()(config, config.scheduler_config.max_num_batched_tokens)

    return make


#: vLLM's quantizations, in the order of :class:`.Operators`. Not every build and version has all.
_QUANTS = (
    "_C.static_scaled_fp8_quant.default",
    "_C.dynamic_per_token_scaled_fp8_quant.default",
    "_C.per_token_group_fp8_quant.default",
    "_C.scaled_fp4_quant.out",
    "vllm.mxfp8_quantize.default",
)


def _operator(name: str) -> Any:
    found: Any = torch.ops
    for part in name.split("."):
        found = getattr(found, part, None)
    return found


def _pass() -> Any:
    import vllm.ir.ops
    from vllm.compilation.passes.vllm_inductor_pass import VllmInductorPass
    from vllm.distributed import get_tp_group

    from collogue.engines.vllm import fused
    from collogue.engines.vllm.quantized import Operators
    from collogue.engines.vllm.rewrite import Names, rewrite

    class AllReducePass(VllmInductorPass):  # type: ignore[misc]
        """Fuses in ranges of up to ``most`` tokens."""

        def __init__(self, config: Any, most: int) -> None:
            super().__init__(config)
            self.most = most
            add_norm, norm = (getattr(vllm.ir.ops, name).torch_op for name in ("fused_add_rms_norm", "rms_norm"))
            group = get_tp_group().unique_name
            self.names = Names(torch.ops.vllm.all_reduce.default, norm, add_norm, group, most, Operators(*map(_operator, _QUANTS)))
            self.range = ""

        def is_applicable_for_range(self, compile_range: Any) -> bool:
            self.range = f"{compile_range.start} to {compile_range.end} tokens"
            return bool(compile_range.end <= self.most)

        @VllmInductorPass.time_and_log  # type: ignore[untyped-decorator]
        def __call__(self, graph: Graph) -> None:
            done = rewrite(graph, self.names, fused.servable)
            self.matched_count = done.fused
            fused.counts["pieces"] += 1
            fused.counts["in graphs"] += done.fused
            if done.of:
                fused.logger.info("Collogue, %s: %s", self.range, done)

        def uuid(self) -> str:
            """What the rewriting depends on: the sources of this folder, and the names that graphs hold."""
            digest = hashlib.sha256(repr((self.names.group, self.most)).encode())
            for file in sorted(Path(__file__).parent.glob("*.py")):
                digest.update(file.read_bytes())
            return digest.hexdigest()

    return AllReducePass

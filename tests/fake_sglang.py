"""A package with the names of SGLang that the plugin hooks, whose functions only say that they were called: for tests of the hooks."""

from __future__ import annotations

from pathlib import Path

_FILES = {
    "srt/plugins/hook_registry.py": """
import functools
import importlib
from enum import Enum


class HookType(Enum):
    AROUND = "around"


class HookRegistry:
    hooks = {}

    @classmethod
    def register(cls, target, hook, hook_type):
        assert hook_type is HookType.AROUND and target not in cls.hooks
        cls.hooks[target] = hook

    @classmethod
    def apply_hooks(cls):
        for target, hook in cls.hooks.items():
            path, name = target.rsplit(".", 1)
            try:
                owner = importlib.import_module(path)
            except ImportError:
                module, of = path.rsplit(".", 1)
                owner = getattr(importlib.import_module(module), of)
            setattr(owner, name, cls.around(getattr(owner, name), hook))

    @staticmethod
    def around(original, hook):
        @functools.wraps(original)
        def wrapper(*args, **kwargs):
            return hook(original, *args, **kwargs)

        return wrapper
""",
    "srt/runtime_context.py": """
from types import SimpleNamespace as Bag

parallel = Bag(attn_dp_enabled=False, tp_size=2)
options = Bag(
    comm=Bag(flashinfer_allreduce_fusion_backend=None),
    deterministic=Bag(enable_deterministic_inference=False),
    overlap=Bag(enable_two_batch_overlap=False),
)
disagg = Bag(enable_pdmux=False)
schedule = Bag(chunked_prefill_size=16, max_prefill_tokens=32)
get_parallel, get_exec = lambda: parallel, lambda: options
get_disagg, get_schedule = lambda: disagg, lambda: schedule
""",
    "srt/layers/flashinfer_comm_fusion.py": """
from sglang.srt.runtime_context import parallel


def resolve_fusion_group(*, use_attn_tp_group):
    group = parallel.attention if use_attn_tp_group else parallel.experts
    return group.size, None, group


def flashinfer_allreduce_residual_rmsnorm(
    input_tensor, residual, weight, eps=1e-6, max_token_num=2048, use_oneshot=None, trigger_completion_at_end=False, fp32_acc=True,
    use_attn_tp_group=True,
):
    return None, None


def cleanup_flashinfer_workspace():
    parallel.cleaned = True
""",
    "srt/layers/layer_boundary/residual/add_norm.py": """
def flashinfer_ar_fusion_applies(batch_size):
    return False
""",
    "srt/layers/layernorm.py": """
def _forward_with_allreduce_fusion_quant_per_group(
    norm_module, x, residual, weight, group_size=128, use_attn_tp_group=True, keep_bf16=False
):
    return None
""",
    "srt/layers/deep_gemm_wrapper.py": "DEEPGEMM_SCALE_UE8M0 = False",
    "srt/distributed/parallel_state.py": """
class GroupCoordinator:
    def _can_use_flashinfer_allreduce(self, input_):
        return False

    def _flashinfer_allreduce(self, input_):
        return "SGLang"
""",
    "srt/model_executor/runner/base_runner.py": """
class BaseRunner:
    def _pre_initialize_flashinfer_allreduce_workspace(self):
        self.warmed_up = "SGLang"
""",
}


def write_sglang(folder: Path) -> None:
    """Write the package ``sglang`` into ``folder``."""
    for name, text in _FILES.items():
        file = folder / "sglang" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
        for above in file.relative_to(folder).parents:
            if above.name:
                (folder / above / "__init__.py").touch()

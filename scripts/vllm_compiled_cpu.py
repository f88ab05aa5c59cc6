"""vLLM's CPU platform, but compiling as on a GPU, with vLLM's passes: for tests of the pass. Not for use.

`install()` before anything of vLLM but `vllm.platforms` is imported.
"""

from __future__ import annotations

from typing import Any

import torch

#: Operators of vLLM's CUDA build whose names its passes look up. They are never called.
_ABSENT = (
    "fused_add_rms_norm_static_fp8_quant",
    "rms_norm_dynamic_per_token_quant",
    "rms_norm_static_fp8_quant",
    "silu_and_mul_quant",
    "silu_and_mul_nvfp4_quant",
    "fused_qk_norm_rope",
    "fused_add_rms_norm",
    "rms_norm",
    "rotary_embedding",
    "silu_and_mul",
)
_library: Any = torch.library.Library("_C", "FRAGMENT")  # type: ignore[no-untyped-call]


def install() -> None:
    """Make it the platform of this process."""
    import vllm.platforms
    from vllm.platforms.cpu import CpuPlatform

    class CompiledCpu(CpuPlatform):  # type: ignore[misc]
        @classmethod
        def check_and_update_config(cls, vllm_config: Any) -> None:
            from vllm.config import CompilationMode, CUDAGraphMode

            options = vllm_config.compilation_config
            asked = options.mode
            super().check_and_update_config(vllm_config)
            if asked == CompilationMode.VLLM_COMPILE:
                options.mode = asked
                options.cudagraph_mode = CUDAGraphMode.NONE
                options.backend = "inductor"
                options.ir_enable_torch_wrap = True
                options.compile_sizes = options.compile_sizes or []

        @classmethod
        def use_custom_op_collectives(cls) -> bool:
            return True

    vllm.platforms._current_platform = CompiledCpu()
    import vllm._custom_ops
    from vllm.distributed.device_communicators.cpu_communicator import CpuCommunicator

    # In a graph an all-reduce leaves its input alone. The CPU's writes into it, which is right only where nothing is compiled.
    in_place = CpuCommunicator.all_reduce
    CpuCommunicator.all_reduce = lambda self, input_: in_place(self, input_.clone())

    for name in _ABSENT:
        if not hasattr(torch.ops._C, name):
            _library.define(f"{name}(Tensor! result) -> ()")

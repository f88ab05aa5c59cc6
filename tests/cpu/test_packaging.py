"""What a user meets first: the import, the public names, the README; and the rules of the source tree."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import re
import socket
import subprocess
import sys
import tomllib
from pathlib import Path
from types import ModuleType

import pytest

import collogue

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = Path(collogue.__file__).parent


def run_python(*arguments: str, timeout: float = 120) -> str:
    done = subprocess.run([sys.executable, *arguments], capture_output=True, text=True, timeout=timeout)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_import_is_quick_and_touches_no_gpu() -> None:
    code = """
import time, sys, torch
before = set(sys.modules)
start = time.perf_counter()
import collogue
print(time.perf_counter() - start)
assert not torch.cuda.is_initialized()
heavy = {"cuda", "typer", "rich", "transformers", "matplotlib", "torch._inductor", "torch._dynamo"} & set(sys.modules)
assert not heavy - before, heavy
"""
    assert min(float(run_python("-c", code)) for _ in range(3)) < 0.3


def test_public_names() -> None:
    assert len(set(collogue.__all__)) == len(collogue.__all__)
    for name in collogue.__all__:
        value = getattr(collogue, name)
        if isinstance(value, type) or callable(value):
            assert value.__doc__, f"{name} has no docstring"
    for name in ("Communicator", "RMSNorm", "Output", "NVFP4", "MXFP4", "MXFP8", "FP8Static", "FP8PerToken", "FP8Group", "CollogueError"):
        assert name in collogue.__all__
    assert collogue.quantize is collogue.reference.quantize
    assert not [name for name in collogue.__all__ if name.startswith("_") and name != "__version__"]


def test_version_is_the_packages() -> None:
    assert importlib.metadata.version("collogue") == collogue.__version__
    assert collogue.__version__ in (ROOT / "CHANGELOG.md").read_text()


def test_kernels_and_type_marker_are_package_data() -> None:
    data = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["package-data"]["collogue"]
    shipped = {file for pattern in data for file in PACKAGE.glob(pattern)}
    assert PACKAGE / "py.typed" in shipped
    assert {file for file in PACKAGE.rglob("*") if file.suffix in (".cu", ".cuh")} <= shipped


def test_constraints_pin_exact_versions() -> None:
    lines = [line for line in (ROOT / "constraints-cpu.txt").read_text().splitlines() if not line.startswith("#")]
    assert all(re.fullmatch(r"[a-z0-9-]+==[0-9][0-9.]*", line) for line in lines)
    pinned = {line.split("==")[0] for line in lines}
    assert {"torch", "numpy", "transformers", "gguf", "pytest", "cuda-core"} <= pinned


def test_readme_example_runs(tmp_path: Path) -> None:
    [code] = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    example = tmp_path / "example.py"
    example.write_text(code)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    output = run_python(
        "-m", "torch.distributed.run", "--nproc-per-node=2", "--master-addr=127.0.0.1", f"--master-port={port}", str(example)
    )
    # Two ranks print at once: their words may be mixed.
    assert (output.count("torch.Size([8, 7168])"), output.count("torch.Size([8, 1])")) == (4, 2)


@pytest.fixture(scope="module")
def rules() -> ModuleType:
    spec = importlib.util.spec_from_file_location("check_source", ROOT / "scripts" / "check_source.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_source_rules_hold(rules: ModuleType) -> None:
    assert list(rules.inline_ptx(PACKAGE)) == []
    assert list(rules.wrong_imports(PACKAGE)) == []


@pytest.mark.parametrize(
    ("module", "line"),
    [
        ("errors", "import collogue.formats"),
        ("contract", "def f():\n    from collogue.communicator import Communicator"),
        ("group", "from collogue import communicator"),
        ("communicator", "from collogue import NVFP4"),
        ("nowhere", ""),
    ],
)
def test_import_rule_finds_violations(rules: ModuleType, tmp_path: Path, module: str, line: str) -> None:
    (tmp_path / "communicator.py").touch()
    (tmp_path / f"{module}.py").write_text(line)
    assert len(list(rules.wrong_imports(tmp_path))) == 1


def test_ptx_rule_finds_violations(rules: ModuleType, tmp_path: Path) -> None:
    (tmp_path / "ptx.cuh").write_text('asm volatile("nanosleep.u32 1;");')
    (tmp_path / "row.cuh").write_text('// asm("")\n  asm volatile ("nanosleep.u32 1;");\n__asm__("");')
    assert len(list(rules.inline_ptx(tmp_path))) == 2

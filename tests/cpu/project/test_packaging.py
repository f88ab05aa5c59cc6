"""What a user meets first: the import, the public names, the README; and the rules of the source tree."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import re
import subprocess
import sys
import tomllib
from pathlib import Path
from types import ModuleType

import pytest

import collogue

ROOT = Path(__file__).resolve().parents[3]
PACKAGE = Path(collogue.__file__).parent


def run_python(*arguments: str, timeout: float = 120) -> str:
    done = subprocess.run([sys.executable, *arguments], capture_output=True, text=True, timeout=timeout)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.slow
def test_import_is_quick_and_touches_no_gpu() -> None:
    """With every public name."""
    code = """
import time, sys, torch
before = set(sys.modules)
start = time.process_time()  # whatever else the machine does
import collogue
for name in collogue.__all__:
    getattr(collogue, name)
print(time.process_time() - start)
assert not torch.cuda.is_initialized()
heavy = {"cuda", "typer", "rich", "transformers", "matplotlib", "torch._inductor", "torch._dynamo", "collogue.tools"} & set(sys.modules)
assert not heavy - before, heavy
"""
    assert min(float(run_python("-c", code)) for _ in range(3)) < 0.3


@pytest.mark.slow
def test_the_library_does_without_its_tools() -> None:
    """Every module outside `collogue.tools` can be imported where neither the tools nor their packages are there."""
    code = """
import importlib, pkgutil, sys
sys.modules |= dict.fromkeys(("typer", "rich", "collogue.tools"))
import collogue
names = [m.name for m in pkgutil.walk_packages(collogue.__path__, "collogue.") if not m.name.startswith("collogue.tools")]
for name in names:
    if name not in ("collogue.__main__", "collogue.engines.vllm", "collogue.engines.sglang"):
        importlib.import_module(name)
print(len(names))
"""
    assert int(run_python("-c", code)) > 50


@pytest.mark.slow
def test_import_alone_imports_nothing() -> None:
    run_python("-c", "import sys, collogue; assert 'torch' not in sys.modules; collogue.__version__; assert 'torch' not in sys.modules")


@pytest.mark.slow
def test_every_public_name_is_listed_and_no_other() -> None:
    code = """
import collogue, types
assert set(collogue.__all__) <= set(dir(collogue))
assert all(name.startswith("__") for name in set(dir(collogue)) - set(collogue.__all__))
from collogue import *
others = {name: value for name, value in vars(collogue).items() if not name.startswith("_") and name not in collogue.__all__}
assert all(isinstance(value, types.ModuleType) and value.__name__.startswith("collogue.") for value in others.values()), others
for name in ("nonsense", "importlib", "TYPE_CHECKING", "Any", "torch", "as_group"):
    assert not hasattr(collogue, name), name
"""
    run_python("-c", code)


EXPORTED = """
import torch, torch.distributed as dist, collogue
dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
comm = collogue.Communicator(dist.group.WORLD, max_tokens=4, hidden_size=16, dtype=torch.float32)
class Model(torch.nn.Module):
    def forward(self, x):
        return comm.all_reduce(x).reduced
program = torch.export.export(Model(), (torch.ones(2, 16),))
assert "collogue.all_reduce" in str(program.graph)
torch.export.save(program, {path!r})
comm.close()
dist.destroy_process_group()
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    "imports",
    ["import torch, collogue", "import collogue, torch; collogue.Communicator", "import collogue, torch; collogue.NVFP4"],
)
def test_a_saved_program_can_be_loaded(imports: str, tmp_path: Path) -> None:
    path = str(tmp_path / "model.pt2")
    run_python("-c", EXPORTED.format(path=path))
    assert "collogue.all_reduce" in run_python("-c", f"{imports}\nprint(torch.export.load({path!r}).graph)")


def test_public_names() -> None:
    assert len(set(collogue.__all__)) == len(collogue.__all__)
    for name in collogue.__all__:
        value = getattr(collogue, name)
        if isinstance(value, type) or callable(value):
            assert value.__doc__, f"{name} has no docstring"
    for name in ("Communicator", "RMSNorm", "Output", "NVFP4", "MXFP4", "MXFP8", "FP8Static", "FP8PerToken", "FP8Group", "CollogueError"):
        assert name in collogue.__all__
    assert collogue.dequantize is collogue.reference.dequantize
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

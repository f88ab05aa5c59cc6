"""A user's type checker accepts the README's blocks and the examples. Part of the extra `dev`: mypy and pyright."""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parents[3]
#: What the README's reader has.
GIVEN = """
from types import SimpleNamespace
from typing import Any

import torch

AutoModelForCausalLM: Any  # its own types do not let generate() be called

my_model: torch.nn.Module
mlp: SimpleNamespace
hidden_states: torch.Tensor
residual: torch.Tensor
next_norm: torch.nn.RMSNorm
"""
#: Lines that every checker must refuse: names and outputs that are not there.
WRONG = """
import torch, collogue
def call(comm: collogue.Communicator, x: torch.Tensor) -> None:
    collogue.nonsense
    comm.all_reduce(x, quant=collogue.FP8Static(1.0)).norm.shape
"""
#: An output is a tensor where there is one.
REVEALED = """
from torch import Tensor
from typing_extensions import assert_type
import collogue
from collogue import Communicator, FP8PerToken, FP8Static, NVFP4, Output, RMSNorm

def f(comm: Communicator, x: Tensor, norm: RMSNorm, flag: bool) -> None:
    assert_type(comm.all_reduce(x).reduced, Tensor)
    assert_type(comm.all_reduce(x).residual, None)
    assert_type(comm.all_reduce(x, residual=x).residual, Tensor)
    assert_type(comm.all_reduce(x, norm=norm).norm, Tensor)
    assert_type(comm.all_reduce(x, residual=x if flag else None, norm=norm, sharded=True).residual, Tensor)
    assert_type(comm.all_reduce(x, norm=norm, quant=NVFP4(1.0)), Output[None, Tensor, None, Tensor, Tensor])
    assert_type(comm.all_reduce(x, norm=norm, quant=FP8Static(1.0), keep_norm=True), Output[None, Tensor, Tensor, Tensor, None])
    assert_type(comm.reduce_scatter(x, quant=FP8PerToken()), Output[Tensor, None, None, Tensor, Tensor])
    assert_type(comm.finish(x, norm=norm, quant=FP8PerToken()).scales, Tensor)
    assert_type(comm.all_reduce(x, norm=norm if flag else None).norm, Tensor | None)

def g(out: Output) -> None:
    assert_type(out.norm, Tensor | None)
"""
CHECKERS = {
    "mypy": ["-m", "mypy", "--strict", "--no-error-summary", "--hide-error-context"],
    "pyright": ["-m", "pyright", "--pythonpath", sys.executable],
}


@pytest.fixture(scope="module", params=CHECKERS)
def complaints(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """What a checker says of all files, with a user's settings: they lie outside of the checkout. One run, as it reads torch."""
    checker = request.param
    if importlib.util.find_spec(checker) is None:
        pytest.skip(f"{checker} is not installed")
    folder = tmp_path_factory.mktemp("types")
    files = [_readme(folder), folder / "revealed.py", folder / "wrong.py"]
    files[1].write_text(REVEALED)
    files[2].write_text(WRONG)
    for example in sorted((ROOT / "examples").glob("*.py")):
        files.append(folder / example.name)
        files[-1].write_text(example.read_text())
    environment = {**os.environ, "MYPYPATH": str(ROOT / "src"), "PYTHONPATH": str(ROOT / "src")}
    command = [sys.executable, *CHECKERS[checker], *map(str, files)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment, cwd=folder, check=False)
    return [line.strip() for line in done.stdout.splitlines() if re.search(r"\berror\b.*[:(\[]", line)]


def _readme(folder: Path) -> Path:
    """The README's Python, as one file."""
    text = (ROOT / "README.md").read_text(encoding="utf-8").replace("from transformers import AutoModelForCausalLM\n", "")
    (folder / "given.pyi").write_text(GIVEN)
    names = ", ".join(re.findall(r"^(\w+):", GIVEN, re.MULTILINE))
    file = folder / "from_readme.py"
    file.write_text("\n".join([f"from given import {names}", *re.findall(r"```python\n(.*?)```", text, re.DOTALL)]) + "\n")
    return file


@pytest.mark.timeout(300)
def test_readme_examples_and_outputs(complaints: list[str]) -> None:
    assert [line for line in complaints if "wrong.py" not in line] == []


@pytest.mark.timeout(300)
def test_mistakes_are_seen(complaints: list[str]) -> None:
    found = [line for line in complaints if "wrong.py" in line]
    assert any("nonsense" in line for line in found), found
    assert any("shape" in line for line in found), found

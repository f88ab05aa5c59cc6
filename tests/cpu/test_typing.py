"""What type checkers make of the calls: examples pass strictly, and an output is a tensor where there is one."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
EXAMPLES = sorted((ROOT / "examples").glob("*.py"))

pytest.importorskip("mypy", reason="mypy is not installed (pip install '.[dev]')")

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
    assert_type(collogue.Output(residual=x).norm, Tensor | None)
"""


def mypy(*arguments: str) -> None:
    command = [sys.executable, "-m", "mypy", "--strict", *arguments]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=170, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def test_outputs_are_tensors_where_there_are_some(tmp_path: Path) -> None:
    program = tmp_path / "program.py"
    program.write_text(REVEALED)
    mypy(str(program))


def test_examples_pass_strictly() -> None:
    mypy(*map(str, EXAMPLES))

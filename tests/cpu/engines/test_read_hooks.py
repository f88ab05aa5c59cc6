"""Reading hooks out of an engine's sources: what is found, and that what moved is named."""

from __future__ import annotations

import importlib.util
import sys
import zipfile
from pathlib import Path
from typing import Any

import pytest
from fake_sglang import write_sglang

from collogue.engines.switch import Hook

SCRIPT = Path(__file__).parents[3] / "scripts" / "read_hooks.py"


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> Any:
    spec = importlib.util.spec_from_file_location("read_hooks", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "read_hooks", module)
    spec.loader.exec_module(module)
    return module


def _run(script: Any, place: Path, monkeypatch: pytest.MonkeyPatch) -> int:
    monkeypatch.setattr(sys, "argv", ["read_hooks.py", "sglang", str(place)])
    code: int = script.main()
    return code


def test_all_are_there(script: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """In a folder and in a wheel."""
    write_sglang(tmp_path)
    assert _run(script, tmp_path, monkeypatch) == 0
    with zipfile.ZipFile(tmp_path / "some.whl", "w") as wheel:
        for file in tmp_path.rglob("*.py"):
            wheel.write(file, file.relative_to(tmp_path))
    assert _run(script, tmp_path / "some.whl", monkeypatch) == 0
    assert "sglang.hooks: 15 of 15 hooks are there" in capsys.readouterr().out


def test_what_moved_is_named(script: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    write_sglang(tmp_path)
    norms = tmp_path / "sglang/srt/layers/layernorm.py"
    norms.write_text(norms.read_text().replace("keep_bf16", "keep"))
    (tmp_path / "sglang/srt/layers/deep_gemm_wrapper.py").unlink()
    assert _run(script, tmp_path, monkeypatch) == 1
    said = capsys.readouterr().out
    assert "sglang.hooks: 13 of 15 hooks are there" in said
    assert "_forward_with_allreduce_fusion_quant_per_group takes no keep_bf16, but norm_module, x," in said
    assert "sglang.srt.layers.deep_gemm_wrapper is not there" in said


_ENGINE = {
    "a.py": """
if 1:
    from .b import f as g
else:
    g = None
from .b import *
from . import c

def inner():
    from .c import hidden
""",
    "b.py": "class Base:\n    def m(self, x): ...\n\nclass Below(Base):\n    n: int = 0\n\ndef f(p, *, q): ...\nthing, other = 1, 2\n",
    "c.py": "names = {'lazy': 1}\ndef __getattr__(name): ...\n",
    "__init__.py": "",
}


@pytest.mark.parametrize(
    ("module", "name", "parameters", "problem"),
    [
        ("e.a", "g", ("p", "q"), ""),
        ("e.a", "g", ("r",), "e.a.g takes no r, but p, q"),
        ("e.a", "Below.m", ("x",), ""),
        ("e.a", "Below.n", (), ""),
        ("e.a", "Below.o", (), "e.a.Below.o is not there"),
        ("e.a", "thing.whatever", (), ""),
        ("e.a", "c", (), ""),
        ("e.a", "inner", (), ""),
        ("e.a", "other", (), ""),
        ("e.a", "hidden", (), "e.a.hidden is not there"),
        ("e.c", "lazy", (), ""),
        ("e.c", "absent", (), "e.c.absent is not there"),
        ("e.d", "x", (), "e.d is not there"),
        ("e.b", "x", (), "e.b.x is not there"),
    ],
)
def test_names(module: str, name: str, parameters: tuple[str, ...], problem: str, script: Any, tmp_path: Path) -> None:
    """Through imports, branches, stars and bases; not into functions."""
    (tmp_path / "e").mkdir()
    for file, text in _ENGINE.items():
        (tmp_path / "e" / file).write_text(text)
    assert script.Sources(tmp_path).problem(Hook(module, name, parameters)) == problem

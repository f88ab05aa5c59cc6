"""Names, arguments, defaults and constants of the installed FlashInfer against Collogue's. Its sources are read, not imported."""

from __future__ import annotations

import ast
import importlib.util
import inspect
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from fake_flashinfer import write_flashinfer

import collogue.flashinfer as ours

#: A default that is not a literal, such as ``torch.float16``: compared as text.
Signature = list[tuple[str, str, str]]
CLASSES = [name for name in ours.SERVED if isinstance(getattr(ours, name), type)]
#: What engines pass and FlashInfer itself does not take.
MORE = {"create_allreduce_fusion_workspace": ("use_fp32_lamport",)}
FUNCTIONS = [name for name in ours.SERVED if name not in CLASSES]


def package() -> Path:
    """The folder of FlashInfer's ``comm``."""
    spec = importlib.util.find_spec("flashinfer")
    if spec is None or not spec.submodule_search_locations:
        pytest.skip("flashinfer-python is not installed (pip install '.[flashinfer]')")
    return Path(next(iter(spec.submodule_search_locations))) / "comm"


def definition(comm: Path, name: str) -> ast.FunctionDef | ast.ClassDef:
    """Where ``flashinfer.comm``'s ``name`` is defined: in the module from which ``comm`` imports it, under the name it has there."""
    for node in ast.walk(ast.parse((comm / "__init__.py").read_text(encoding="utf-8"))):
        for alias in node.names if isinstance(node, ast.ImportFrom) else ():
            if (alias.asname or alias.name) == name:
                assert isinstance(node, ast.ImportFrom)
                return _defined(comm / f"{node.module}.py", alias.name)
    return _defined(comm / "__init__.py", name)


def _defined(file: Path, name: str) -> ast.FunctionDef | ast.ClassDef:
    for node in ast.parse(file.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef) and node.name == name:
            return node
        if isinstance(node, ast.ImportFrom) and node.level and name in [alias.asname or alias.name for alias in node.names]:
            return _defined(file.parent / f"{node.module}.py", name)
    raise AssertionError(f"{name} is not defined in {file}")


def their_signature(function: ast.FunctionDef) -> Signature:
    """``(name, kind, default)`` of every parameter but ``self``."""
    arguments = function.args
    positional = [*arguments.posonlyargs, *arguments.args]
    defaults = [None] * (len(positional) - len(arguments.defaults)) + [ast.unparse(d) for d in arguments.defaults]
    found = [(a.arg, "positional", d or "") for a, d in zip(positional, defaults, strict=True)]
    found += [
        (a.arg, "keyword", "" if d is None else ast.unparse(d)) for a, d in zip(arguments.kwonlyargs, arguments.kw_defaults, strict=True)
    ]
    assert arguments.vararg is None
    assert arguments.kwarg is None
    return [parameter for parameter in found if parameter[0] != "self"]


def our_signature(function: Callable[..., Any]) -> Signature:
    found = []
    for p in inspect.signature(function).parameters.values():
        kind = {p.POSITIONAL_OR_KEYWORD: "positional", p.KEYWORD_ONLY: "keyword"}[p.kind]
        found.append((p.name, kind, "" if p.default is p.empty else _text(p.default)))
    return [parameter for parameter in found if parameter[0] != "self"]


def _text(value: object) -> str:
    return ast.unparse(ast.parse(repr(value), mode="eval"))


def differences(comm: Path, name: str, mine: Any) -> list[str]:
    """What of ``name`` is not as in FlashInfer: a function's signature; a class's constants, constructor and methods."""
    theirs = definition(comm, name)
    if isinstance(theirs, ast.FunctionDef):
        served = [parameter for parameter in our_signature(mine) if parameter[0] not in MORE.get(name, ())]
        pairs = [(name, their_signature(theirs), served)]
    else:
        methods = {node.name: node for node in theirs.body if isinstance(node, ast.FunctionDef)}
        public = [m for m in methods if m == "__init__" or not m.startswith("_")]
        absent = [(f"{name}.{m}", "defined", None) for m in public if not hasattr(mine, m)]
        present = [m for m in public if callable(getattr(mine, m, None))]
        pairs = [*absent, *((f"{name}.{m}", their_signature(methods[m]), our_signature(getattr(mine, m))) for m in present)]  # type: ignore[list-item]
        constants = {n.targets[0].id: n.value.value for n in theirs.body if isinstance(n, ast.Assign)}  # type: ignore[attr-defined]
        if constants:
            # An older FlashInfer has fewer than a newer one, and the newest is served.
            pairs.append((name, constants, {k: v for k, v in vars(mine).items() if k in constants}))  # type: ignore[arg-type]
    return [f"{what}: FlashInfer has {a}, Collogue {b}" for what, a, b in pairs if a != b]


@pytest.mark.parametrize("name", ours.SERVED)
def test_signatures_are_flashinfers(name: str) -> None:
    assert differences(package(), name, getattr(ours, name)) == []


@pytest.mark.parametrize("name", ["CommBackend", "TorchDistBackend"])
def test_the_stand_ins_names_are_flashinfers(name: str) -> None:
    source = (package() / "mnnvl.py").read_text(encoding="utf-8")
    assert name in source


def test_drift_is_seen(tmp_path: Path) -> None:
    write_flashinfer(tmp_path)
    comm = tmp_path / "flashinfer" / "comm"
    (comm / "__init__.py").write_text("from .calls import go as run\nfrom .calls import Codes, Workspace")
    (comm / "calls.py").write_text("from .home import Workspace\ndef go(a, b=1.0, *, c=None): ...\nclass Codes:\n    one = 1\n    two = 2")
    (comm / "home.py").write_text(
        "class Workspace:\n    def __init__(self, size): ...\n    def destroy(self): ...\n    def _inner(self): ..."
    )

    def same(a: int, b: float = 1.0, *, c: int | None = None) -> None: ...
    def renamed(a: int, d: float = 1.0, *, c: int | None = None) -> None: ...
    def other_default(a: int, b: float = 2.0, *, c: int | None = None) -> None: ...
    def positional(a: int, b: float = 1.0, c: int | None = None) -> None: ...

    assert differences(comm, "run", same) == []
    for wrong in (renamed, other_default, positional):
        assert differences(comm, "run", wrong)
    assert differences(comm, "Codes", SimpleNamespace(one=1, two=2)) == []
    assert differences(comm, "Codes", SimpleNamespace(one=1, two=3))
    assert differences(comm, "Codes", SimpleNamespace(one=1))

    class Right:
        def __init__(self, size: int) -> None: ...
        def destroy(self) -> None: ...

    class Without:
        def __init__(self, size: int) -> None: ...

    assert differences(comm, "Workspace", Right) == []
    assert differences(comm, "Workspace", Without)

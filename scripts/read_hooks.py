"""Whether the hooks of Collogue's plugins are in an engine's sources: read, not imported, so any version can be looked at on any machine.

    pip download --no-deps vllm==0.33.0 && python scripts/read_hooks.py vllm vllm-0.33.0-*.whl

For each hook: its name, through imports and base classes, and its parameters. What lies behind a name that is not a class or a module (an
attribute of an object) cannot be read and is not. Ends with 1 where something is not there, and names it.
"""

from __future__ import annotations

import argparse
import ast
import importlib
import sys
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from collogue.engines.switch import Hook

#: The modules that hold the hooks of each engine.
WAYS = {"vllm": ("vllm.compiled", "vllm.eager"), "sglang": ("sglang.hooks",)}
Found = ast.stmt | ast.Module | None


@dataclass
class Sources:
    """The Python files of a wheel or a folder."""

    place: Path
    _parsed: dict[str, ast.Module | None] = field(default_factory=dict)

    def module(self, name: str) -> ast.Module | None:
        """The module ``name``, parsed."""
        if name not in self._parsed:
            paths = (f"{name.replace('.', '/')}.py", f"{name.replace('.', '/')}/__init__.py")
            texts = [text for path in paths if (text := self._text(path)) is not None]
            self._parsed[name] = ast.parse(texts[0]) if texts else None
        return self._parsed[name]

    def _text(self, path: str) -> str | None:
        if self.place.is_dir():
            file = self.place / path
            return file.read_text() if file.is_file() else None
        with zipfile.ZipFile(self.place) as wheel:
            return wheel.read(path).decode() if path in wheel.namelist() else None

    def find(self, module: str, name: str) -> Found:
        """What defines ``name`` in a module, or an imported module of that name."""
        tree = self.module(module)
        if tree is None:
            return None
        for node in _statements(tree):
            if not isinstance(node, ast.ImportFrom):
                continue
            base = module.split(".")
            of = ".".join(base[: len(base) - node.level + self._is_package(module)]) if node.level else ""
            whole = ".".join(part for part in (of, node.module) if part)
            for each in node.names:
                if (each.asname or each.name) == name:
                    return self.find(whole, each.name) or self.module(f"{whole}.{each.name}") or node
                if each.name == "*" and (found := self.find(whole, name)) is not None:
                    return found
        return _defined(tree, name) or self.module(f"{module}.{name}") or _made_when_asked(tree, name)

    def _is_package(self, module: str) -> int:
        return int(self._text(f"{module.replace('.', '/')}/__init__.py") is not None)

    def member(self, module: str, owner: ast.ClassDef, name: str) -> Found:
        """What defines ``name`` in a class or its bases."""
        found = _defined(owner, name)
        for base in owner.bases if found is None else ():
            if isinstance(base, ast.Name) and isinstance(above := self.find(module, base.id), ast.ClassDef):
                found = found or self.member(module, above, name)
        return found

    def problem(self, hook: Hook) -> str:
        """What is not as expected; empty where all is."""
        if self.module(hook.module) is None:
            return f"{hook.module} is not there"
        first, *rest = hook.name.split(".")
        found = self.find(hook.module, first)
        for part in rest:
            if not isinstance(found, ast.ClassDef):
                break
            found = self.member(hook.module, found, part)
        if found is None:
            return f"{hook.module}.{hook.name} is not there"
        taken = list(self._parameters(hook.module, found))
        absent = [name for name in hook.parameters if name not in taken]
        return f"{hook.module}.{hook.name} takes no {', '.join(absent)}, but {', '.join(taken)}" if absent else ""

    def _parameters(self, module: str, found: Found) -> Iterator[str]:
        if isinstance(found, ast.ClassDef):
            found = self.member(module, found, "__init__")
        if isinstance(found, ast.FunctionDef):
            yield from (each.arg for each in (*found.args.posonlyargs, *found.args.args, *found.args.kwonlyargs))


def _statements(owner: ast.Module | ast.ClassDef) -> Iterator[ast.stmt]:
    """Of a module or a class, with those in branches and blocks, without those in functions."""
    waiting: list[ast.stmt] = list(owner.body)
    while waiting:
        node = waiting.pop(0)
        yield node
        if isinstance(node, ast.If | ast.Try | ast.With):
            waiting += [*node.body, *getattr(node, "orelse", []), *getattr(node, "finalbody", [])]


def _defined(owner: ast.Module | ast.ClassDef, name: str) -> Found:
    for node in _statements(owner):
        if isinstance(node, ast.FunctionDef | ast.ClassDef) and node.name == name:
            return node
        targets = node.targets if isinstance(node, ast.Assign) else [node.target] if isinstance(node, ast.AnnAssign) else []
        if any(isinstance(part, ast.Name) and part.id == name for target in targets for part in ast.walk(target)):
            return node
    return None


def _made_when_asked(tree: ast.Module, name: str) -> Found:
    """The module's ``__getattr__``, if the module has such a function and the name as a string."""
    known = any(isinstance(node, ast.Constant) and node.value == name for node in ast.walk(tree))
    return _defined(tree, "__getattr__") if known else None


def main() -> int:
    """All hooks of an engine."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("engine", choices=tuple(WAYS))
    parser.add_argument("sources", type=Path, nargs="+", help="wheels or folders")
    asked = parser.parse_args()
    moved = 0
    for place in asked.sources:
        sources = Sources(place)
        for way in WAYS[asked.engine]:
            hooks = importlib.import_module(f"collogue.engines.{way}").HOOKS
            wrong = [text for hook in hooks if (text := sources.problem(hook))]
            moved += len(wrong)
            print(f"{place.name}, {way}: {len(hooks) - len(wrong)} of {len(hooks)} hooks are there")
            print("".join(f"  {text}\n" for text in wrong), end="")
    return 1 if moved else 0


if __name__ == "__main__":
    sys.exit(main())

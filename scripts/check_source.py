"""Two rules of the source tree that no general linter knows.

1. Inline PTX stands in `kernels/ptx.cuh` only.
2. Imports point one way: a module imports only what stands above it in :data:`ORDER`.

Prints every violation and exits with 1 if there is one.
"""

from __future__ import annotations

import ast
import re
import sys
from collections.abc import Iterator
from pathlib import Path

PACKAGE = Path(__file__).resolve().parent.parent / "src" / "collogue"

#: Folders and modules of the package from the ground up: one imports itself and what stands above it in this list.
#: ``__init__`` stands for ``import collogue``.
ORDER = (
    "errors",
    "cache",
    "kernels",
    "contract",
    "link",
    "group",
    "calls",
    "planning",
    "gpu",
    "host",
    "engine",
    "registry",
    "ops",
    "functions",
    "operations",
    "communicator",
    "__init__",
    "formats",
    "reference",
    "pytorch",
    "nn",
    "flashinfer",
    "engines",
    "testing",
    "tools",
    "__main__",
)

_INLINE_PTX = re.compile(r"\b(asm|__asm__|__asm)\b\s*(volatile|__volatile__)?\s*\(")


def inline_ptx(package: Path) -> Iterator[str]:
    """Inline assembly outside `kernels/ptx.cuh`."""
    for file in sorted(package.rglob("*.cu*")):
        if file.suffix in (".cu", ".cuh") and file.name != "ptx.cuh":
            for number, line in enumerate(file.read_text(encoding="utf-8").splitlines(), 1):
                if _INLINE_PTX.search(line.split("//")[0]):
                    yield f"{file}:{number}: inline PTX outside kernels/ptx.cuh"


def wrong_imports(package: Path, order: tuple[str, ...] = ORDER) -> Iterator[str]:
    """Imports of modules that do not stand below the importing one in ``order``."""
    for file in sorted(package.rglob("*.py")):
        module = file.relative_to(package).with_suffix("").parts[0]
        if module not in order:
            yield f"{file}:1: module {module!r} has no place in ORDER"
            continue
        for number, imported in _imports(ast.parse(file.read_text(encoding="utf-8")), package):
            if imported != module and (imported not in order or order.index(imported) > order.index(module)):
                yield f"{file}:{number}: {module} imports {imported}, which stands above it"


def _imports(tree: ast.AST, package: Path) -> Iterator[tuple[int, str]]:
    """Line and top-level module of every import of the package, except those for type checkers only."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.If) and ast.unparse(node.test).endswith("TYPE_CHECKING"):
            continue
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module == "collogue":
            # `from collogue import formats` is the module; `from collogue import NVFP4` is the package.
            names = [f"collogue.{alias.name}" if _is_module(package, alias.name) else "collogue" for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = [node.module or ""]
        else:
            yield from _imports(node, package)
            continue
        for name in names:
            parts = name.split(".")
            if parts[0] == "collogue":
                yield node.lineno, parts[1] if len(parts) > 1 else "__init__"


def _is_module(package: Path, name: str) -> bool:
    return (package / f"{name}.py").exists() or (package / name).is_dir()


def main() -> int:
    """Check the package beside this script."""
    violations = [*inline_ptx(PACKAGE), *wrong_imports(PACKAGE)]
    print(*violations, sep="\n", end="\n" if violations else "")
    return 1 if violations else 0


if __name__ == "__main__":
    sys.exit(main())

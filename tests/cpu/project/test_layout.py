"""A contributor finds the tests of a module: by its name, or in the table of tests/README.md."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[3]
PACKAGE, TESTS = ROOT / "src" / "collogue", ROOT / "tests" / "cpu"
#: The command line is tested by command, not by module.
BY_COMMAND = "tools"


def listed() -> dict[str, list[str]]:
    """Module -> files of tests, of the table."""
    rows = re.findall(r"^\| (`.*?`) \| (`.*?`) \|$", (ROOT / "tests" / "README.md").read_text(encoding="utf-8"), re.MULTILINE)
    return {module: re.findall(r"`(.*?)`", files) for modules, files in rows for module in re.findall(r"`(.*?)`", modules)}


def test_every_module_has_a_file_of_its_name_or_a_row() -> None:
    table = listed()
    modules = [file.relative_to(PACKAGE) for file in PACKAGE.rglob("*.py") if file.name != "__init__.py"]
    without = {m.as_posix() for m in modules if m.parts[0] != BY_COMMAND and not (TESTS / m.parent / f"test_{m.name}").exists()}
    assert without == set(table)
    assert [name for names in table.values() for name in names if not (TESTS / name).exists()] == []


def test_folders_are_those_of_the_library() -> None:
    folders = {path.name for path in TESTS.iterdir() if path.is_dir() and path.name != "__pycache__"}
    assert folders - {"project"} <= {path.name for path in PACKAGE.iterdir() if path.is_dir()}

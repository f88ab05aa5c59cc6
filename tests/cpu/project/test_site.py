"""The documentation site: it builds strictly, and nothing public is missing from its reference."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import subprocess
import sys
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

import collogue
import collogue.flashinfer
from collogue import errors
from collogue.tools import terminal

ROOT = Path(__file__).resolve().parents[3]
REFERENCE = ROOT / "docs" / "reference"
RESULTS = ROOT / "benchmarks" / "results"
#: Which command wrote a committed result, by the beginning of its name. Others were put together by scripts.
WRITTEN_BY = {
    "check-": "check",
    "latency-": "bench",
    "suites-": "bench",
    "model-": "bench model",
    "generate-": "bench generate",
    "serving-": "bench serving",
    "tune-": "tune",
    "resources.": "resources",
    "ablation-": "ablate",
    "accuracy-": "accuracy",
    "reliability-": "reliability",
}


def sections() -> dict[str, set[str]]:
    """Command -> the names in code in its section of the page of JSON results; ``""``: those of every result."""
    found: dict[str, set[str]] = {}
    for part in re.split(r"^## ", (REFERENCE / "json.md").read_text(encoding="utf-8"), flags=re.MULTILINE):
        heading = part.partition("\n")[0]
        found["" if heading.startswith("Every") else heading] = set(re.findall(r"`(\w+)`", part))
    return found


def fields(data: dict[str, Any]) -> Iterator[str]:
    """Names of the top level, and of the objects in its lists."""
    yield from data
    for value in data.values():
        if isinstance(value, list):
            for row in value:
                yield from row if isinstance(row, dict) else ()


def undocumented(command: str, data: dict[str, Any]) -> set[str]:
    """Fields of a command's result that its section does not have."""
    known = sections()
    return set(fields(data)) - known[""] - known[command]


@pytest.fixture(scope="module")
def names(tmp_path_factory: pytest.TempPathFactory) -> set[str]:
    """Everything with an entry in the built reference."""
    if importlib.util.find_spec("mkdocs") is None:
        pytest.skip("mkdocs is not installed: the site is not built (make lint installs it)")
    site = tmp_path_factory.mktemp("site")
    environment = {**os.environ, "NO_MKDOCS_2_WARNING": "1"}
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(site)]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    inventory = (site / "objects.inv").read_bytes()
    return {line.split()[0] for line in zlib.decompress(inventory.split(b"\n", 4)[4]).decode().splitlines()}


@pytest.mark.slow
def test_every_public_name_has_an_entry(names: set[str]) -> None:
    modules = {"errors", "formats", "nn", "reference"}
    public = {f"collogue.{name}" for name in collogue.__all__ if name not in modules | {"compile"}}
    public |= {f"collogue.pytorch.nn.{name}" for name in collogue.nn.__all__}
    public |= {f"collogue.flashinfer.{name}" for name in collogue.flashinfer.__all__}
    public |= {f"collogue.errors.{name}" for name, kind in vars(errors).items() if isinstance(kind, type)}
    public |= {f"collogue.contract.reference.{name}" for name in ("all_reduce", "quantize", "finish", "all_gather", "reduce_scatter")}
    public |= {"collogue.pytorch.fusion.Compile", "collogue.pytorch.fusion.Compile.report"}
    methods = [name for name in dir(collogue.Communicator) if not name.startswith("_") and callable(getattr(collogue.Communicator, name))]
    public |= {f"collogue.Communicator.{name}" for name in methods}
    assert public - names == set()
    assert len(public) > 80


def test_every_page_is_in_the_navigation() -> None:
    """The build says the same; this needs no mkdocs."""

    def pages(entry: Any) -> Iterator[str]:
        if isinstance(entry, str):
            yield entry
        else:
            for value in entry.values() if isinstance(entry, dict) else entry:
                yield from pages(value)

    text = (ROOT / "mkdocs.yml").read_text(encoding="utf-8")
    assert set(pages(yaml.safe_load(text)["nav"])) == {p.relative_to(ROOT / "docs").as_posix() for p in (ROOT / "docs").rglob("*.md")}


def test_every_environment_variable_is_listed() -> None:
    read = {
        name
        for file in (ROOT / "src").rglob("*.py")
        for name in re.findall(r"\bCOLLOGUE_[A-Z_]*[A-Z]\b", file.read_text(encoding="utf-8"))
        if not re.search(rf"#define {name}|{name} (?:void|u32)", file.read_text(encoding="utf-8"))
    }
    text = (REFERENCE / "environment.md").read_text(encoding="utf-8")
    assert set(re.findall(r"^\| `(COLLOGUE_\w+)`", text, re.MULTILINE)) == read


def test_every_exit_code_is_in_the_text_that_the_page_shows() -> None:
    codes = {terminal.OK, terminal.FAILED, terminal.USAGE, terminal.IMPOSSIBLE, terminal.INTERRUPTED, terminal.CLOSED_PIPE}
    assert {int(code) for code in re.findall(r"\d+", terminal.EXIT_CODES)} == codes
    assert "<!-- generated: exit codes -->" in (REFERENCE / "command_line.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("file", sorted(RESULTS.glob("*.json")), ids=lambda file: file.stem)
def test_every_field_of_a_committed_result_is_described(file: Path) -> None:
    for beginning, command in WRITTEN_BY.items():
        if file.name.startswith(beginning):
            assert undocumented(command, json.loads(file.read_text(encoding="utf-8"))) == set()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("command", "arguments"),
    [
        ("explain", ["--architecture", "sm_90a"]),
        ("doctor", []),
        ("check", ["--device", "cpu", "--format", "none", "--dtype", "bfloat16"]),
    ],
)
def test_every_field_of_a_run_is_described(command: str, arguments: list[str]) -> None:
    done = subprocess.run([sys.executable, "-m", "collogue", command, *arguments, "--json", "-"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert undocumented(command, json.loads(done.stdout)) == set()


def test_the_demos_fields_are_described() -> None:
    from dataclasses import fields as fields_of

    from collogue.tools.demo.result import Result

    assert {field.name for field in fields_of(Result)} | {"difference", "passed"} <= sections()["demo"] | sections()[""]


def test_a_field_that_is_not_described_is_seen() -> None:
    assert undocumented("doctor", {"usable": True, "findings": [{"name": "torch", "color": 1}]}) == {"color"}
    assert undocumented("doctor", {"speed": 1}) == {"speed"}

"""What the documents name is there, and what they quote is what was measured."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from collogue import errors
from scripts.figure import figure, joined

ROOT = Path(__file__).resolve().parents[3]
DOCUMENTS = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md")])
RESULTS = ROOT / "benchmarks" / "results"
#: Where a file that a document names without a link may lie.
PLACES = (ROOT, ROOT / "src" / "collogue", ROOT / "src" / "collogue" / "kernels", ROOT / "docs", ROOT / "tests" / "cpu", ROOT / "examples")
#: Files that a user makes, and those of the toys of docs/adding.md.
MADE = {"example.py", "RESULTS.json", "src/collogue/kernels/wide_shot.cuh", "src/collogue/kernels/formats/fp8_pow2.cuh"}


def missing(document: Path) -> list[str]:
    """Relative links and named files of a document that do not exist."""
    # Results that a table is to be made of may not be there yet.
    text = re.sub(r"<!-- table .*? -->", "", document.read_text(encoding="utf-8"))
    links = [link for link in re.findall(r"\]\(([^)#\s]+)", text) if not re.match(r"[a-z]+:", link)]
    names = set(re.findall(r"[\w./-]*\w\.(?:py|cuh|sh|md|json|txt|toml)\b", re.sub(r"\]\([^)]*\)", "]", text))) - MADE
    absent = [link for link in links if not (document.parent / link).exists()]
    return absent + [
        name for name in names if not any((place / name).exists() or any(place.glob(f"*/{name}")) for place in (*PLACES, RESULTS))
    ]


def cells(text: str) -> Iterator[tuple[int, str, str, str]]:
    """``(step, variant, column, cell)`` of every cell with a number in the tables of docs/speed.md."""
    header: list[str] = []
    for line in text.splitlines():
        row = [cell.strip() for cell in line.strip("|").split("|")] if line.startswith("|") else []
        if row and row[0] == "step":
            header = row
        elif row and row[0].isdigit():
            found = dict(zip(header, row, strict=True))
            for column, cell in found.items():
                if re.match(r"\d+ \w", column) and cell:
                    yield int(row[0]), found["variant"], column, cell


def wrong_cells(text: str, steps: list[dict[str, Any]]) -> list[str]:
    """Cells that are not the measured value, rounded."""
    wrong = []
    for step, variant, column, cell in cells(text):
        measured = steps[step - 1]["us"].get(f"{column.replace(' ', '/', 1)}/{variant}")
        if measured is None or abs(float(cell) - measured) > 0.00501 or not re.fullmatch(r"\d+\.\d\d", cell):
            wrong.append(f"step {step}, {variant}, {column}: {cell}, measured {measured}")
    return wrong


@pytest.fixture(scope="module")
def steps() -> list[dict[str, Any]]:
    data: dict[str, Any] = json.loads((RESULTS / "one-shot-steps-2xh200.json").read_text())
    return list(data["steps"])


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda d: d.name)
def test_links_and_named_files_exist(document: Path) -> None:
    assert missing(document) == []


def test_a_missing_file_is_seen(tmp_path: Path) -> None:
    document = tmp_path / "page.md"
    document.write_text("[a](nowhere.md), `nowhere.cuh`, [b](https://example.org), `reference.py`, RESULTS.json")
    assert sorted(missing(document)) == ["nowhere.cuh", "nowhere.md"]


def test_nobody_is_told_to_install_from_an_index() -> None:
    """Collogue is on none."""
    files = [*DOCUMENTS, *(file for folder in ("src", "examples", "tests") for file in (ROOT / folder).rglob("*.py"))]
    wrong = re.compile(r"install\s+['\"]?collogue\b")
    assert [file.name for file in files if wrong.search(file.read_text(encoding="utf-8"))] == []


def test_the_tree_of_errors_is_that_of_the_classes() -> None:
    above: list[str] = []
    tree: dict[str, str] = {}
    for line in str(errors.__doc__).splitlines():
        found = re.match(r"([ │├└─]*)(\w+Error|CollectiveTimeout|MismatchedCall|NotPrepared|CorruptedWorkspace)\b", line)
        if found:
            above[len(found[1]) // 4 :] = [found[2]]
            tree[found[2]] = above[-2] if above[1:] else "Exception"
    assert tree == {
        name: kind.__base__.__name__ for name, kind in vars(errors).items() if isinstance(kind, type) and issubclass(kind, Exception)
    }


def test_numbers_of_speed_are_the_measured_ones(steps: list[dict[str, Any]]) -> None:
    text = (ROOT / "docs" / "speed.md").read_text(encoding="utf-8")
    assert len(list(cells(text))) > 100
    assert wrong_cells(text, steps) == []
    prose = "\n".join(line for line in text.splitlines() if not line.startswith("|"))
    assert re.findall(r"\d+\.\d+", prose) == [], "a measured number belongs in a table, where it is checked"


def test_a_wrong_number_is_seen(steps: list[dict[str, Any]]) -> None:
    table = "| step | variant | 1 none | 1 mxfp8/ceil |\n|---|---|---|---|\n| 6 | base | 2.18 | {} |\n"
    assert wrong_cells(table.format("2.22"), steps) == []
    assert wrong_cells(table.format("2.23"), steps)
    assert wrong_cells(table.format("2.218"), steps)
    assert wrong_cells(table.replace("base", "nothing").format("2.22"), steps)


def test_the_readme_counts_the_cases_of_the_check() -> None:
    data = json.loads((RESULTS / "check-2xh200.json").read_text())
    cases = data["cases"]
    assert data["passed"]
    assert not any(count for case in cases for count in (case["differing"] or {}).values())
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    virtual = sum(case["ranks"] == "virtual" for case in cases)
    expected = sum(case["expected_error"] is not None for case in cases)
    assert f"ran {len(cases)} cases" in text
    assert f"in {expected} of the cases" in text
    assert f"{len(cases) - virtual} of those cases are world 2" in text
    assert f"The other {virtual} are world 3 to 8" in text


def test_the_figure_is_that_of_the_results() -> None:
    data = json.loads((RESULTS / "latency-2xh200.json").read_text())
    models = joined([RESULTS / f"model-{name}2xh200.json" for name in ("", "sizes-", "more-")])
    text = (ROOT / "docs" / "figures" / "latency-2xh200.svg").read_text(encoding="utf-8")
    assert text == figure(data, models)
    assert text.count("<svg ") == 1 + 4
    assert figure(data).count("<svg ") == 1 + 3
    row = next(row for row in data["cases"] if row.get("share") and row["section"] == "decode")
    row["us"] *= 2
    assert text != figure(data, models)
    row["share"] = 1.01
    with pytest.raises(ValueError, match="a lower bound is wrong"):
        figure(data)

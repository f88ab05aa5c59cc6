"""Tables in documents are those of the committed results."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from scripts import pages

ROOT = Path(__file__).resolve().parents[3]
DOCUMENTS = [d for d in sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md")]) if "<!-- table " in d.read_text(encoding="utf-8")]

PAGE = "a\n<!-- table resources: r.json -->\nold\n<!-- end of table -->\nb\n"
KERNELS = [
    {"choice": {"architecture": a}, "registers": n, "stack_bytes": 0, "spilled_bytes": s}
    for a, n, s in (("sm_80", 30, 0), ("sm_80", 50, 4), ("sm_80", 40, 0), ("sm_90a", 60, 0))
]
FILLED = """a
<!-- table resources: r.json -->
| architecture | kernels | registers, least | median | most | with local memory |
|---|---|---|---|---|---|
| sm_80 | 3 | 30 | 40 | 50 | 1 |
| sm_90a | 1 | 60 | 60 | 60 | 0 |
<!-- end of table -->
b
"""


def test_a_page_is_filled_and_checked(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    page = tmp_path / "page.md"
    (tmp_path / "r.json").write_text(json.dumps({"kernels": KERNELS}))
    page.write_text(PAGE)
    assert pages.main(["--check", str(page)]) == 1
    assert page.read_text() == PAGE
    assert "not that of its results" in capsys.readouterr().err
    assert pages.main([str(page)]) == 0
    assert page.read_text() == FILLED
    assert pages.main(["--check", str(page)]) == 0
    page.write_text(FILLED.replace("| 40 |", "| 41 |"))
    assert pages.main(["--check", str(page)]) == 1
    with pytest.raises(ValueError, match="no table 'other'"):
        pages.filled(PAGE.replace("resources", "other"), tmp_path)


def test_a_table_of_several_files(tmp_path: Path) -> None:
    (tmp_path / "r.json").write_text(json.dumps({"kernels": KERNELS[:2]}))
    (tmp_path / "s.json").write_text(json.dumps({"kernels": KERNELS[2:]}))
    assert pages.filled(PAGE.replace("r.json", "r.json s.json"), tmp_path) == FILLED.replace("r.json", "r.json s.json")
    rows = [{"model": "m", "world_size": 2, "tokens": 4, "what": "nccl", "us": 1.0}]
    for name in "rs":
        (tmp_path / f"{name}.json").write_text(json.dumps({"rows": rows}))
    with pytest.raises(ValueError, match="two results of m"):
        pages.filled(PAGE.replace("resources: r.json", "bench-speedups: r.json s.json"), tmp_path)


def test_results_that_are_not_there_yet(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text(PAGE)
    assert pages.main([str(page)]) == 0
    assert page.read_text() == PAGE.replace("old\n", "Not measured yet.\n")
    assert pages.main(["--check", str(page)]) == 0
    (tmp_path / "r.json").write_text(json.dumps({"kernels": KERNELS}))
    assert pages.main(["--check", str(page)]) == 1


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda d: d.name)
def test_the_tables_of_the_documents_are_those_of_the_results(document: Path) -> None:
    assert pages.main(["--check", str(document)]) == 0


def test_there_are_such_documents() -> None:
    assert {d.name for d in DOCUMENTS} >= {"README.md", "evidence.md", "ablation.md", "reliability.md"}

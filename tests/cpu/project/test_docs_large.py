"""Every number in the tables of docs/large.md stands in its JSON."""

from __future__ import annotations

import json
import re
from pathlib import Path

ROOT = Path(__file__).parents[3]


def prose(name: str) -> str:
    """A document without the ends of its lines."""
    return " ".join((ROOT / "docs" / name).read_text(encoding="utf-8").split())


def test_tables_equal_the_json() -> None:
    runs = json.loads((ROOT / "benchmarks/results/large-steps-2xh200.json").read_text())["runs"]
    text = (ROOT / "docs/large.md").read_text()
    tables = re.findall(r"<!-- (.+?) -->\n((?:\|.*\n)+)", text)
    assert len(tables) == 15
    for run, table in tables:
        for row in table.splitlines()[2:]:
            tokens, *cells = (cell.strip() for cell in row.strip("|").split("|"))
            known = {f"{us:.2f}" for us in runs[run]["us"][tokens].values()}
            assert {cell for cell in cells if cell} <= known, (run, tokens)


def test_registers_and_instructions_equal_the_json() -> None:
    kernel = json.loads((ROOT / "benchmarks/results/large-steps-2xh200.json").read_text())["runs"]["who cleans"]["one_token_kernel"]
    before, reader = kernel["next-call-before"], kernel["reader"]
    text = f"{reader['registers']} registers and {reader['instructions']} instructions, where the first had "
    assert text + f"{before['registers']} and {before['instructions']}" in prose("large.md")
    owners = json.loads((ROOT / "benchmarks/results/large-steps-2xh200.json").read_text())["runs"]["worked out once"]["instructions"]
    text = prose("large.md")
    assert f"kernel's {owners['before']} instructions" in text
    assert f"once ({owners['after']} instructions)" in text


def test_what_protection_cost_on_the_way() -> None:
    runs = json.loads((ROOT / "benchmarks/results/cost-steps-2xh200.json").read_text())["runs"]
    before, told = runs["before"]["us"], runs["told in every wait"]["us"]
    design, reliability = prose("design.md"), prose("reliability.md")
    assert f"from {before['none, base']:.3f} to {told['none, base']:.3f} µs" in design
    assert f"{before['nvfp4/128x4, base']:.3f} µs against {before['nvfp4/128x4, no bound']:.3f} without the bound" in reliability

"""Runs the mutated twins of tests/cpu/kernels/test_mutants.py and keeps how many seeds each needed: `scripts/mutants.py [OUT.json]`.

Without a name the results go to benchmarks/results/emulator-mutants.json. Exits with 1 if a twin was not caught.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import tempfile
import xml.etree.ElementTree
from pathlib import Path
from typing import Any

from collogue.tools.record import circumstances

ROOT = Path(__file__).resolve().parent.parent
TEST = ROOT / "tests" / "cpu" / "kernels" / "test_mutants.py"
OUT = ROOT / "benchmarks" / "results" / "emulator-mutants.json"
_TOLD = re.compile(r"emulator: (?P<mutant>.*?): caught by seed (?P<seeds>\d+) of (?P<most>\d+): (?P<seen>.*)", re.DOTALL)


def mutants(report: Path) -> list[dict[str, Any]]:
    """What the tests told, from pytest's JUnit file: each twin, the seeds it needed, and what was seen."""
    found = []
    for told in xml.etree.ElementTree.parse(report).iter("property"):
        match = _TOLD.fullmatch(told.get("value", ""))
        if told.get("name") == "told" and match:
            row = match.groupdict()
            found.append({"mutant": row["mutant"], "seeds": int(row["seeds"]), "of": int(row["most"]), "seen": row["seen"]})
    return found


def main(arguments: list[str]) -> int:
    """Run, collect, write."""
    parser = argparse.ArgumentParser(
        description="Run the mutated twins of tests/cpu/kernels/test_mutants.py; keep how many seeds each needed."
    )
    parser.add_argument("out", type=Path, nargs="?", default=OUT)
    out: Path = parser.parse_args(arguments).out
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        command = [sys.executable, "-m", "pytest", str(TEST), "-q", "-k", "mutated_twin", "-p", "no:cacheprovider"]
        command += [f"--junitxml={report}", "-o", "junit_family=xunit1"]  # the family that has properties
        code = subprocess.run(command, cwd=ROOT, check=False).returncode
        rows = mutants(report)
    data = {"passed": code == 0 and bool(rows), **circumstances(), "mutants": rows}
    out.write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8")
    return 0 if data["passed"] else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

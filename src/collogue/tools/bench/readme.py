"""The latency table in README.md, made from committed results: ``python -m collogue.tools.bench.readme [--check] RESULTS.json README.md``.

The table stands between two comments, and the first names the results it is of.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import sys
from collections.abc import Sequence
from pathlib import Path

from collogue.tools.bench.report import latency_table

_BLOCK = re.compile(r"<!-- latency: (?P<source>[^\n]*?) -->\n(?P<table>.*?)<!-- end of latency -->\n", re.DOTALL)


def fill(readme: str, source: str, table: str) -> str:
    """``readme`` with ``table`` between its comments. Raises :class:`ValueError` where there is not exactly one such place."""
    if len(_BLOCK.findall(readme)) != 1:
        raise ValueError("README needs exactly one '<!-- latency: .. -->' followed by '<!-- end of latency -->'")
    note = f"Median over replays, maximum over ranks; made by `collogue bench`, all results in [{source}]({source}).\n"
    block = f"<!-- latency: {source} -->\n{table}\n{note}<!-- end of latency -->\n"
    return _BLOCK.sub(lambda match: block, readme)


def source_of(readme: str) -> str | None:
    """The results that the table says it is of; ``None`` where there is no table yet."""
    found = _BLOCK.search(readme)
    return found["source"] if found and found["table"].strip() else None


def main(arguments: Sequence[str] | None = None) -> int:
    """Fill the table, or with ``--check`` say whether it is up to date (exit code 1 if not)."""
    parser = argparse.ArgumentParser(prog="python -m collogue.tools.bench.readme", description="Fill the latency table of README.md.")
    parser.add_argument("--check", action="store_true", help="change nothing; fail if the table is not that of the results")
    parser.add_argument("results", type=Path)
    parser.add_argument("readme", type=Path)
    given = parser.parse_args(arguments)
    data = json.loads(given.results.read_text(encoding="utf-8"))
    before = given.readme.read_text(encoding="utf-8")
    source = Path(os.path.relpath(given.results, given.readme.parent)).as_posix()
    after = fill(before, source, latency_table(data))
    if given.check and after != before:
        print(f"{given.readme}: the latency table is not that of {given.results}", file=sys.stderr)
        return 1
    if not given.check:
        given.readme.write_text(after, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())

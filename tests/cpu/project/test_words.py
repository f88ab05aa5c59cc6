"""The project speaks the field's language: phrases that readers had to read twice, each with its reason, are in no text for people.

Looked at: README and the other documents (but for code, comments and tables made from results), every docstring and other string of the
package, messages and `--help` among them.
"""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import typer.main

ROOT = Path(__file__).resolve().parents[3]
DOCUMENTS = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md"), *ROOT.glob(".github/**/*.md")])
MODULES = sorted([*(ROOT / "src").rglob("*.py"), *(ROOT / "examples").glob("*.py")])

#: Phrase (a regular expression, any case) -> why it is avoided, and what is said instead.
BANNED = {
    # Another word is the usual one.
    r"(?<!max_)\bmultiprocessors?\b": "SMs",
    r"\bmagnitudes?\b": "amax, absolute value",
    r"\b(one|two|second) hops?\b": "one-shot, two-shot; a second name for one thing",
    r"\bstop words?\b": "abort flag",
    r"\b(the|no|a|its) marks?\b|\bmarks (and|are|hold|of)\b": "call signature",
    r"\bwip(e|ed|es|ing)\b": "clear",
    r"\btwins?\b": "mutant",
    r"\bplanted\b|\bmistakes? on purpose\b|\bfaults? on purpose\b": "fault injection",
    r"\bon purpose\b": "injected, deliberately",
    r"\bdawdles?\b": "delay",
    r"\bheld weakly\b": "weak reference",
    r"\bby slope\b": "difference of two graph lengths",
    r"\bone below the other\b|\bkeeps? company\b": "concatenated",
    r"\bworked out\b": "computed",
    r"\bg(i|a)ves? (it |them |the \w+ )?back\b": "free, release",
    r"\brefus(e|es|ed|al|ing)\b": "reject, raise; NVRTC fails to compile",
    r"\bfinish(es|ed|ing)? (rows?|layers?|the layers?|a layer|transformer)\b|\bfinished rows?\b": "applies the epilogue",
    r"\b(byte|place|room) to spare\b|\bspare (byte|cluster)\b": "exact-size allocation; extra",
    r"\bwhat (it|they) (was|were) called with\b": "call arguments",
    r"\bmeets? the other ranks\b": "synchronizes with the other ranks",
    r"\b(is|are) not here\b": "not found",
    r"\bmost (rows|threads|tokens|ranks|CTAs) of\b": "maximum number of",
    # Riddles: the subject or the meaning comes too late.
    r"\bfor ever\b": "forever; without a bound",
    r"\banew\b": "again",
    r"\bwhatever\b": "regardless of; any",
    r"\bwhoever\b": "name who: the rank, the kernel",
    r"(?<!there\s)\b(is|are|was|were) no (?!longer|more\b|less\b|faster)[a-z]+": "is not a",
    r"\bis none of\b": "must be one of",
    r"\bthere (is|are) no (format|operation|dtype|device|architecture|model|algorithm|pattern|layout|prologue|scales) ": "unknown ..",
    r"\b(is|are|was|were|be) told\b": "raises, reports",
    r"\bEnds? with [0-9]\b": "exits with status",
    r"\bcannot work here\b": "required components are missing",
    r"\bwhich names it\b": "identifies the rank",
    r"\bWhat people call\b": "public API",
    r"\btakes? another way\b|\btake another way\b": "uses an algebraic shortcut",
    r"\bwords? (that were )?written over\b": "corrupted memory",
    r"\bright,? (and|not) (slow|fast)\b": "a slow reference implementation",
    r"\bmade otherwise\b": "changed one at a time",
    r"\bwhether all is there\b": "checks the installation",
    r"\bdoes that ahead\b": "compiles ahead of time",
    r"\bhas become faster since\b": "no news about tables: update the table",
    r"\bcuts? and gathers? rows\b": "slices and gathers",
    r"\bmakes `.venv` by\b": "with",
    r"\btakes the results that a machine\b": "runs all GPU benchmarks",
    r"\bLate, dead and disagreeing\b": "late, crashed or mismatched",
    # The API is American.
    r"\b\w*(quanti|normali|synchroni|initiali|optimi|seriali|speciali|generali|organi|recogni)s(e|ed|es|ing|ation|able)\b": "-ize",
    r"\b(colou|behaviou|neighbou|favou)r\w*": "-or",
}
#: A phrase may go over the end of a line.
_ALL = re.compile("|".join(f"(?:{phrase})" for phrase in BANNED).replace(" ", r"\s+"), re.IGNORECASE)


def spoken(document: str) -> str:
    """A document without what nobody wrote by hand, or what is code; line numbers stay."""

    def blank(match: re.Match[str]) -> str:
        return "_" + "\n" * match[0].count("\n")

    for pattern in (r"<!-- table .*?<!-- end of table -->", r"<!--.*?-->", r"```.*?```", r"`[^`\n]*`", r"\]\([^)]*\)"):
        document = re.sub(pattern, blank, document, flags=re.DOTALL)
    return document


def _names() -> frozenset[str]:
    """What committed results call things: they keep their names."""

    def texts(value: Any) -> Iterator[str]:
        if isinstance(value, str):
            yield value
        elif isinstance(value, list | dict):
            for each in value if isinstance(value, list) else value.values():
                yield from texts(each)

    return frozenset(name for file in (ROOT / "benchmarks").rglob("*.json") for name in texts(json.loads(file.read_text())))


NAMES = _names()


def strings(source: str) -> Iterator[tuple[int, str]]:
    """Every string of a module with its line, without code in quotes, keys, names of results and C++."""
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, ast.Constant) or not isinstance(node.value, str):
            continue
        if node.value not in NAMES and not re.search(r"^\w+$|[;{]\s*\n|^\s*#|;$", node.value):
            yield node.lineno, re.sub(r"``.*?``|`[^`\n]*`", "_", node.value, flags=re.DOTALL)


def banned(text: str) -> Iterator[tuple[int, str]]:
    """Line (from 0) and words of each banned phrase in ``text``."""
    for match in _ALL.finditer(text):
        yield text.count("\n", 0, match.start()), match[0]


def found(texts: Iterator[tuple[int, str]], name: str) -> list[str]:
    return [f"{name}:{start + line}: {words!r}" for start, text in texts for line, words in banned(text)]


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda d: d.relative_to(ROOT).as_posix())
def test_documents(document: Path) -> None:
    assert found(iter([(1, spoken(document.read_text(encoding="utf-8")))]), document.name) == []


def test_docstrings_and_messages() -> None:
    wrong = [line for module in MODULES for line in found(strings(module.read_text(encoding="utf-8")), str(module.relative_to(ROOT)))]
    assert wrong == []


def helps(path: str, command: Any) -> Iterator[tuple[int, str]]:
    yield 0, command.help or ""
    for option in command.params:
        yield 0, getattr(option, "help", None) or ""
    for name, child in getattr(command, "commands", {}).items():
        yield from helps(f"{path} {name}", child)


def test_help() -> None:
    from collogue.tools.cli import app

    said = list(helps("collogue", typer.main.get_command(app)))
    assert len(said) > 100
    assert found(iter(said), "--help") == []


@pytest.mark.parametrize(
    "text", ["It waits for\never.", "a quantised norm", "NVRTC refused a kernel", "it is no\n    tensor", "all multiprocessors"]
)
def test_a_phrase_is_seen(text: str) -> None:
    assert len(list(banned(text))) == 1
    assert len(list(strings(f'def f():\n    """{text}"""'))) == 1


@pytest.mark.parametrize("text", ["max_multiprocessors", "there is no rank 3", "it is no longer so", "`wipe off`", "<!-- for ever -->"])
def test_what_is_allowed(text: str) -> None:
    assert list(banned(spoken(text))) == []

"""Hooks of the documentation site (mkdocs.yml): addresses, links that leave docs/, and the pages that the program itself writes.

`python scripts/site_hooks.py commands` prints the reference of the command line, as the page has it.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import griffe

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "src")]

from scripts.links import absolute_links, urls  # noqa: E402

#: A file of the repository that a page shows.
_FILE = re.compile(r"<!-- file: (\S+) -->")
#: ``:func:`~collogue.errors.ShapeError` `` of a docstring.
_ROLE = re.compile(r":(?:class|func|meth|mod|data|attr):`(~?)([^`]+)`")
#: The end of a line before the heading of a section.
_SECTION = re.compile(r"(?<=[^\n])\n(?=[A-Z][\w ]*:\n {4})")
#: The errors of a docstring, to its end or a blank line.
_RAISES = re.compile(r"^Raises:\n((?: {4}.*(?:\n|\Z))+)", re.MULTILINE)


def _as_prose(section: re.Match[str]) -> str:
    """``Raises:`` as a paragraph, unless each of its entries is ``Error: when``."""
    lines = [line[4:] for line in section[1].splitlines()]
    listed = all(re.match(r"\w+(, \w+)*: |\s", line) for line in lines)
    return section[0] if listed else f"**Raises:** {' '.join(line.strip() for line in lines)}\n"


def on_config(config: Any) -> Any:
    """The addresses."""
    config["repo_url"] = urls()["Source"]
    config["repo_name"] = "GitHub"
    config["site_url"] = urls()["Documentation"]
    return config


def on_page_markdown(markdown: str, page: Any, config: Any, files: Any) -> str:
    """One page: generated parts and files filled in, comments set apart from tables, links out of docs/ made absolute."""
    for name, write in GENERATED.items():
        mark = f"<!-- generated: {name} -->"
        if mark in markdown:
            markdown = markdown.replace(mark, "\n".join(write()))
    markdown = _FILE.sub(_contents, markdown)
    markdown = re.sub(r"^(<!-- .*? -->)\n", r"\n\1\n\n", markdown, flags=re.MULTILINE)
    return absolute_links(markdown, (ROOT / "docs" / page.file.src_path).parent, inside=ROOT / "docs")


def _contents(match: re.Match[str]) -> str:
    text = (ROOT / match[1]).read_text(encoding="utf-8")
    return f"```python\n{text}```" if match[1].endswith(".py") else absolute_links(text, ROOT)


def commands() -> Iterator[str]:
    """Every command with its options, from the command line itself."""
    import typer.main

    from collogue.tools.cli import app

    yield from _command("collogue", typer.main.get_command(app))


def _command(path: str, command: Any) -> Iterator[str]:
    children = getattr(command, "commands", {})
    options = [option for option in command.params if option.name != "help"]
    yield f"## {path}\n"
    yield (command.help or "") + "\n"
    if options:
        yield "| option | default | what it does |\n|---|---|---|"
        yield from map(_option, options)
        yield ""
    for name, child in children.items():
        yield from _command(f"{path} {name}", child)


def _option(option: Any) -> str:
    is_option = option.param_type_name == "option"
    names = ", ".join(f"`{name}`" for name in [*option.opts, *option.secondary_opts]) if is_option else f"`{option.name.upper()}`"
    metavar = (option.metavar or "").replace("\n", "")
    choices = metavar[1:-1].split("|") if metavar.startswith("[") else []
    default = "" if option.default in (None, False) or callable(option.default) else f"`{option.default}`"
    text = f"{getattr(option, 'help', '') or ''} {'One of ' + ', '.join(f'`{c}`' for c in choices) + '.' if choices else ''}"
    return f"| {names} | {default} | {text.strip().replace('|', '/')} |"


def exit_codes() -> Iterator[str]:
    """The exit codes, from the command line's own text."""
    from collogue.tools.terminal import EXIT_CODES

    yield "| code | meaning |\n|---|---|"
    for code, meaning in re.findall(r"(\d+) ([^;.]+)", EXIT_CODES):
        yield f"| {code} | {meaning} |"
    yield ""


def errors() -> Iterator[str]:
    """The tree of errors, as the module's docstring draws it."""
    from collogue import errors as module

    tree = [line for line in str(module.__doc__).splitlines() if line.startswith(("CollogueError", "├", "│", "└", " "))]
    yield "\n".join(["```text", *tree, "```", ""])


def error_classes() -> Iterator[str]:
    """An entry for each class of errors, in the order of the module."""
    from collogue import errors as module

    for name, kind in vars(module).items():
        if isinstance(kind, type):
            yield f"::: collogue.errors.{name}\n    options: {{heading_level: 2, inherited_members: false, merge_init_into_class: false}}\n"


GENERATED = {"commands": commands, "exit codes": exit_codes, "errors": errors, "error classes": error_classes}


class Roles(griffe.Extension):  # type: ignore[misc]  # griffe is not there where only the types are checked
    """Docstrings as Markdown: roles as code, pages as links, and the blank line before each section that the parser needs."""

    def on_instance(self, *, obj: Any, **_: Any) -> None:
        """Rewrite one docstring."""
        if obj.docstring is not None:
            text = _ROLE.sub(lambda match: f"`{match[2].rpartition('.')[2] if match[1] else match[2]}`", obj.docstring.value)
            text = re.sub(r"\bdocs/(\w+)\.md", r"[\1](../\1.md)", text)
            obj.docstring.value = _RAISES.sub(_as_prose, _SECTION.sub("\n\n", text))


if __name__ == "__main__":
    print(*GENERATED[sys.argv[1]](), sep="\n")

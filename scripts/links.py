"""The project's addresses, and relative links made absolute with them: for the documentation site and the package's long description."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent

#: A link or an image of Markdown: what stands before the address, the address, the rest.
_LINK = re.compile(r"(\]\()([^)\s]+)(\))")


def urls() -> dict[str, str]:
    """The project's addresses by name, from pyproject.toml."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    return dict(project["urls"])


def absolute_links(markdown: str, folder: Path, *, inside: Path | None = None) -> str:
    """``markdown`` of a page in ``folder`` with its relative links to files outside of ``inside`` as addresses of the repository."""
    source = urls()["Source"]

    def absolute(match: re.Match[str]) -> str:
        path, _, anchor = match[2].partition("#")
        target = (folder / path).resolve()
        if re.match(r"[a-z]+:", match[2]) or not path or (inside and target.is_relative_to(inside)):
            return match[0]
        kind = "tree" if target.is_dir() else "raw" if target.suffix in (".svg", ".png") else "blob"
        return f"{match[1]}{source}/{kind}/main/{target.relative_to(ROOT).as_posix()}{'#' + anchor if anchor else ''}{match[3]}"

    return _LINK.sub(absolute, markdown)

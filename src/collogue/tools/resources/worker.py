"""Compiles kernels named by their choices. Also a program: another revision's package is measured by running this file on it.

Imports nothing of :mod:`collogue.tools.resources`, so that it runs with a package that does not have it yet.
"""

from __future__ import annotations

import base64
import json
import sys
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import torch

from collogue.gpu import jit
from collogue.testing.covering import variant_of


@dataclass(frozen=True)
class Compiled:
    """One kernel's cubin, the assembler's report, and how it is launched."""

    name: str
    code: bytes
    log: str
    threads: int


def as_json(choice: Mapping[str, Any]) -> dict[str, Any]:
    """A choice of :mod:`collogue.testing.covering` as JSON can hold it: dtypes by name."""
    return {name: str(value).removeprefix("torch.") if isinstance(value, torch.dtype) else value for name, value in choice.items()}


def from_json(row: Mapping[str, Any]) -> dict[str, Any]:
    """The inverse of :func:`as_json`."""
    return {name: getattr(torch, value) if name == "dtype" else value for name, value in row.items()}


def compile_choice(choice: Mapping[str, Any]) -> Compiled:
    """The kernel that a plan makes for ``choice``, compiled again. Raises ``CompileError``."""
    variant = variant_of(choice)
    code, log = jit.compile_variant(variant, choice["architecture"], verbose=True)
    return Compiled(variant.name, code, log, variant.threads)


def main() -> None:
    """Choices as a JSON list on stdin; one line of JSON for each on stdout, in order: the kernel, or null where there is no such kernel."""

    def work(row: Mapping[str, Any]) -> str:
        try:
            kernel = compile_choice(from_json(row))
        except Exception as error:  # this revision does not know the choice, or cannot compile it
            print(f"{row}: {error}", file=sys.stderr)
            return "null"
        return json.dumps([kernel.name, base64.b64encode(kernel.code).decode(), kernel.log, kernel.threads])

    with ThreadPoolExecutor(int(sys.argv[1])) as pool:
        for line in pool.map(work, json.load(sys.stdin)):
            print(line, flush=True)


if __name__ == "__main__":
    main()

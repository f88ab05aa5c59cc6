"""The device code, and what Python has to know of it: constants and structures are read from the sources, so that none stands twice."""

from __future__ import annotations

import ctypes
import functools
import re
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent
_TYPES: dict[str, Any] = {"u16": ctypes.c_uint16, "u32": ctypes.c_uint32, "u64": ctypes.c_uint64, "float": ctypes.c_float}
_CONSTANT = re.compile(r"\b(k\w+) = ((?:0x)?[\da-fA-F]+)u?(?=[,;])")


def sources() -> dict[str, str]:
    """Every kernel source, by its path as others include it."""
    return {path.relative_to(ROOT).as_posix(): path.read_text(encoding="utf-8") for path in sorted(ROOT.rglob("*.cuh"))}


@functools.cache
def _text(file: str) -> str:
    """A source without its comments."""
    return re.sub(r"//.*", "", (ROOT / file).read_text(encoding="utf-8"))


def _body(file: str, kind: str, name: str) -> str:
    found = re.search(rf"\b{kind} {name}(?: : \w+)? {{(.*?)}};", _text(file), re.DOTALL)
    if found is None:
        raise LookupError(f"{file} has no {kind} {name}")
    return found[1]


@functools.cache
def constants(file: str) -> dict[str, int]:
    """``constexpr`` whole numbers of a source by name, but for those inside of structures."""
    lines = re.findall(r"^constexpr .*?;", _text(file), re.MULTILINE)
    return {name: int(value, 0) for line in lines for name, value in _CONSTANT.findall(line)}


@functools.cache
def enumerators(file: str, name: str) -> dict[str, int]:
    """The names and values of an ``enum``."""
    return {name: int(value, 0) for name, value in _CONSTANT.findall(_body(file, "enum", name).strip() + ",")}


@functools.cache
def constant_of(file: str, structure: str, name: str) -> int:
    """A ``static constexpr`` number of a structure."""
    return {found: int(value, 0) for found, value in _CONSTANT.findall(_body(file, "struct", structure))}[name]


@functools.cache
def fields(file: str, structure: str) -> tuple[tuple[str, Any], ...]:
    """The members of a structure of numbers and pointers, as ``ctypes.Structure._fields_``."""
    found: list[tuple[str, Any]] = []
    for declaration in _body(file, "struct", structure).split(";"):
        if not (words := declaration.split()):
            continue
        pointer, kind = "*" in declaration, next(word for word in words if word != "const").rstrip("*")
        for name, count in re.findall(r"(\w+)(?:\[(\w+)\])?(?=,|$)", declaration.strip()):
            one = ctypes.c_void_p if pointer else _TYPES[kind]
            number = int(count) if count.isdigit() else constants(file)[count] if count else 0
            found.append((name, one * number if count else one))
    return tuple(found)


def size_of(file: str, structure: str) -> int:
    """Bytes of a structure, without what is missing to a multiple of its alignment."""
    return sum(ctypes.sizeof(kind) for _, kind in fields(file, structure))

"""What the commands share: options, lists, exit codes, progress, and where data goes."""

from __future__ import annotations

import errno
import json as json_module
import os
import re
import stat
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

import typer
from rich.console import Console

from collogue.tools.terminal import EXIT_CODES, FAILED, IMPOSSIBLE, OK, UNWRITABLE, USAGE, report_error

__all__ = ["EXIT_CODES", "FAILED", "IMPOSSIBLE", "OK", "USAGE"]  # for the commands, beside what is defined here

#: What a plot may be saved as.
PICTURES = (".png", ".svg", ".pdf")
#: Of progress, where stderr is no terminal.
SECONDS_BETWEEN_LINES = 10.0
#: Of a line of choices in ``--help``: a word and its stroke, and both brackets.
CHOICES_WIDTH = 20

Many = list[str] | None
Commit = Annotated[str | None, typer.Option(help="The commit to record; default: what git says.")]
Json = Annotated[str | None, typer.Option("--json", metavar="FILE", help="Write the results as JSON to FILE; - is stdout.")]


#: Choices of one word, which shells complete.
DeviceName = Literal["cpu", "cuda"]
DeviceOrAuto = Literal["auto", "cpu", "cuda"]
DTypeName = Literal["bfloat16", "float16", "float32"]
OperationName = Literal["all_reduce", "sharded", "reduce_scatter", "all_gather", "finish"]
TransportName = Literal["peer", "host"]
OrderName = Literal["islands", "rank"]
DTYPE_NAMES, OPERATION_NAMES = get_args(DTypeName), get_args(OperationName)


def completed(*words: str) -> Callable[[str], list[str]]:
    """What a shell offers for the beginning of a word, or of the last word of a comma-separated list."""

    def offered(incomplete: str) -> list[str]:
        before, comma, begun = incomplete.rpartition(",")
        return [before + comma + word for word in words if word.startswith(begun)]

    return offered


def choices(*words: str) -> str:
    """``[a|b|c]``, what ``--help`` shows of an option; in lines of :data:`CHOICES_WIDTH`, so that a terminal breaks no word."""
    lines = [""]
    for word in (*(f"{word}|" for word in words[:-1]), words[-1]):
        if len(lines[-1]) + len(word) > CHOICES_WIDTH - 2:
            lines.append("")
        lines[-1] += word
    return "[" + "\n".join(lines) + "]"


def many(flag: str, what: str, *words: str, metavar: str = "N") -> Any:
    """An option that takes a list; ``words``: what may be in it, where that is known."""
    text = f"{what} May be repeated, or comma-separated.".strip()
    shown = choices(*words) if words else metavar
    return typer.Option(flag, metavar=shown, help=text, show_default=False, autocompletion=completed(*words))


Device = Annotated[DeviceName, typer.Option(metavar=choices(*get_args(DeviceName)), help="Where the ranks are.")]
Devices = Annotated[Many, many("--device", "", *get_args(DeviceName))]
WorldSizes = Annotated[Many, many("--world-size", "Ranks, 1 to 8.")]
Tokens = Annotated[Many, many("--tokens", "Rows T.")]
HiddenSizes = Annotated[Many, many("--hidden-size", "Row length H, a multiple of 8.")]
DTypes = Annotated[Many, many("--dtype", "", *DTYPE_NAMES)]
WIRES = ("fp8_group", "fp8_per_token", "mxfp8")
PROLOGUES = ("gated", "expert_combine", "expert_reduce")
FAMILIES = ("none", "nvfp4", "mxfp4", "mxfp8", "fp8_static", "fp8_per_token", "fp8_group")
FORMAT_OPTIONS = "Options follow, as in nvfp4/8x4 or fp8_group64/column."
Formats = Annotated[Many, many("--format", FORMAT_OPTIONS, *FAMILIES)]
Operations = Annotated[Many, many("--operation", "", *OPERATION_NAMES)]
_FORMAT_NAME = re.compile("|".join(FAMILIES) + "[0-9]*")


def words(values: Many) -> list[str]:
    """Repeated and comma-separated values as one list."""
    return [word.strip() for value in values or [] for word in value.split(",") if word.strip()]


def numbers(flag: str, values: Many, *, low: int, high: int | None = None, step: int = 1) -> list[int]:
    """The words of ``flag`` as whole numbers within the bounds; anything else is wrong usage."""
    found = []
    for word in words(values):
        if not word.isdigit() or int(word) < low or (high is not None and int(word) > high) or int(word) % step:
            bounds = f"at least {low}" if high is None else f"from {low} to {high}"
            multiple = f", a multiple of {step}" if step > 1 else ""
            raise typer.BadParameter(f"{word!r} is not a number {bounds}{multiple}", param_hint=flag)
        found.append(int(word))
    return found


def check_word(flag: str, word: str, *known: str) -> None:
    """A word that is not known is wrong usage."""
    if word not in known:
        raise typer.BadParameter(f"{word!r} is not one of {', '.join(known)}", param_hint=flag)


def format_words(values: Many, flag: str = "--format") -> list[str]:
    """The words of ``flag``. One that names no format is wrong usage at once; options are checked where torch is imported."""
    found = words(values)
    for word in found:
        if not _FORMAT_NAME.fullmatch(word.partition("/")[0]):
            raise typer.BadParameter(f"unknown format {word!r}; expected {', '.join(FAMILIES)}; {FORMAT_OPTIONS.lower()}", param_hint=flag)
    return found


def dtype_words(values: Many) -> list[str]:
    """The words of ``--dtype``; an unknown one is wrong usage."""
    for word in words(values):
        check_word("--dtype", word, *DTYPE_NAMES)
    return words(values)


def lists(world_size: Many, tokens: Many, hidden_size: Many, dtype: Many, format: Many) -> dict[str, list[Any]]:
    """The lists that were given, checked, by the name of :func:`collogue.tools.check.sweep`'s arguments."""
    given: dict[str, list[Any]] = {
        "world_size": numbers("--world-size", world_size, low=1, high=8),
        "tokens": numbers("--tokens", tokens, low=0),
        "hidden_size": numbers("--hidden-size", hidden_size, low=8, step=8),
        "dtype": dtype_words(dtype),
        "format": format_words(format),
    }
    return {name: values for name, values in given.items() if values}


@contextmanager
def exit_codes() -> Iterator[None]:
    """Turn Collogue's errors, missing packages and files that cannot be written into a message on stderr and an exit code."""
    from collogue.errors import ArgumentError, CollogueError, PlatformError
    from collogue.tools.packages import how_to_install, package_of

    try:
        yield
    except ModuleNotFoundError as error:
        package = package_of(error.name or "")
        if package == "collogue":
            raise
        report_error(f"not installed: {package}", how_to_install(package))
        raise typer.Exit(IMPOSSIBLE) from error
    except CollogueError as error:
        report_error(str(error))
        code = USAGE if isinstance(error, ArgumentError) else IMPOSSIBLE if isinstance(error, PlatformError) else FAILED
        raise typer.Exit(code) from error
    except OSError as error:
        if error.errno not in UNWRITABLE:
            raise
        report_error(f"cannot write {error.filename or 'the results'}: {error.strerror}")
        raise typer.Exit(USAGE) from error


@contextmanager
def progress(total: int | None, what: str) -> Iterator[Callable[[str], None]]:
    """A bar on stderr, or a line every :data:`SECONDS_BETWEEN_LINES` where that is not a terminal.

    The function it yields says what starts next; what came before then counts as done.
    """
    if not sys.stderr.isatty():
        yield _lines(total, what)
        return
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TextColumn("{task.fields[now]}"))
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task(what, total=total, now="")
        begun = 0

        def start(name: str) -> None:
            nonlocal begun
            progress.update(task, completed=begun, now=name[:40])
            begun += 1

        yield start
        progress.update(task, completed=begun)


def _lines(total: int | None, what: str) -> Callable[[str], None]:
    first = last = time.monotonic()
    begun = 0

    def start(name: str) -> None:
        nonlocal begun, last
        now = time.monotonic()
        if now - last >= SECONDS_BETWEEN_LINES:
            last = now
            print(f"{what}: {begun} of {total or '?'} after {now - first:.0f} s, now {name}", file=sys.stderr, flush=True)
        begun += 1

    return start


def check_target(target: str | Path | None, flag: str = "--json", endings: Sequence[str] = ()) -> None:
    """A file to write must be in a directory that is there, be none itself, can be written, and have one of ``endings`` if any are given.

    Without endings ``-`` is stdout. Asked before the work is done. What the file holds is not changed.
    """
    if target is None or (str(target) == "-" and not endings):
        return
    path = Path(target)
    if path.is_dir():
        problem = f"{path} is a directory"
    elif not path.resolve().parent.is_dir():
        problem = f"there is no directory {path.parent}"
    elif endings and path.suffix not in endings:
        problem = f"{path} does not end in {' or '.join(endings)}"
    else:
        try:
            _try_to_write(path)
        except OSError as error:
            problem = f"{path} cannot be written: {error.strerror}"
        else:
            return
    raise typer.BadParameter(problem, param_hint=flag)


def _try_to_write(path: Path) -> None:
    """Raise what writing ``path`` would raise. A device gets a line end, which JSON and HTML may begin with; a terminal gets nothing."""
    kind = path.stat().st_mode if path.exists() else 0
    if not kind:
        with tempfile.TemporaryFile(dir=path.resolve().parent) as file:
            file.write(b"\n")
    elif stat.S_ISREG(kind):
        path.open("ab").close()
    elif not os.access(path, os.W_OK):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
    elif stat.S_ISCHR(kind):
        with path.open("wb") as file:
            if not file.isatty():
                file.write(b"\n")


def write_json(data: dict[str, Any], target: str | None) -> None:
    """``data`` to where ``--json`` says, if it says so."""
    write_text(json_module.dumps(data, indent=2, allow_nan=False) + "\n", target)


def write_text(text: str, target: str | None) -> None:
    """``text`` to a file, to stdout for ``-``, or nowhere."""
    if target == "-":
        sys.stdout.write(text)
    elif target is not None:
        Path(target).write_text(text, encoding="utf-8")


def console(json: str | None) -> Console:
    """For people: stdout, unless that carries the JSON."""
    return Console(stderr=json == "-")

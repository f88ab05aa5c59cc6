"""What the commands share: options, lists, exit codes, progress, and where data goes."""

from __future__ import annotations

import json as json_module
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

OK, FAILED, USAGE, IMPOSSIBLE = 0, 1, 2, 3
#: What a plot may be saved as.
PICTURES = (".png", ".svg", ".pdf")
EXIT_CODES = "Exit codes: 0 all is well; 1 a check failed; 2 wrong usage; 3 this machine cannot do it."
#: Of progress, where stderr is no terminal.
SECONDS_BETWEEN_LINES = 10.0

Many = list[str] | None
Commit = Annotated[str | None, typer.Option(help="The commit to record; default: what git says.")]
Json = Annotated[str | None, typer.Option("--json", metavar="FILE", help="Write the results as JSON to FILE; - is stdout.")]


def many(flag: str, what: str) -> Any:
    """An option that takes a list."""
    return typer.Option(flag, help=f"{what} May be repeated, or comma-separated.", show_default=False)


Devices = Annotated[Many, many("--device", "cpu, cuda.")]
WorldSizes = Annotated[Many, many("--world-size", "Ranks, 1 to 8.")]
Tokens = Annotated[Many, many("--tokens", "Rows T.")]
HiddenSizes = Annotated[Many, many("--hidden-size", "Row length H, a multiple of 8.")]
DTypes = Annotated[Many, many("--dtype", "bfloat16, float16, float32.")]
FORMAT_NAMES = (
    "none, nvfp4, mxfp4, mxfp8, fp8_static, fp8_per_token, fp8_group; options follow, as in nvfp4/8x4 or fp8_group64/ue8m0/column."
)
Formats = Annotated[Many, many("--format", FORMAT_NAMES)]
Operations = Annotated[Many, many("--operation", "all_reduce, sharded, reduce_scatter, all_gather, finish.")]


def words(values: Many) -> list[str]:
    """Repeated and comma-separated values as one list."""
    return [word.strip() for value in values or [] for word in value.split(",") if word.strip()]


def numbers(flag: str, values: Many, *, low: int, high: int | None = None, step: int = 1) -> list[int]:
    """The words of ``flag`` as whole numbers within the bounds; anything else is wrong usage."""
    found = []
    for word in words(values):
        if not word.isdigit() or int(word) < low or (high is not None and int(word) > high) or int(word) % step:
            bounds = f"from {low}" + (f" to {high}" if high is not None else "") + (f", a multiple of {step}" if step > 1 else "")
            raise typer.BadParameter(f"{word!r} is not a number {bounds}", param_hint=flag)
        found.append(int(word))
    return found


def check_word(flag: str, word: str, *known: str) -> None:
    """A word that is not known is wrong usage."""
    if word not in known:
        raise typer.BadParameter(f"{word!r} is none of {', '.join(known)}", param_hint=flag)


def lists(world_size: Many, tokens: Many, hidden_size: Many, dtype: Many, format: Many) -> dict[str, list[Any]]:
    """The lists that were given, checked, by the name of :func:`collogue.tools.check.sweep`'s arguments."""
    given: dict[str, list[Any]] = {
        "world_size": numbers("--world-size", world_size, low=1, high=8),
        "tokens": numbers("--tokens", tokens, low=0),
        "hidden_size": numbers("--hidden-size", hidden_size, low=8, step=8),
        "dtype": words(dtype),
        "format": words(format),
    }
    return {name: values for name, values in given.items() if values}


@contextmanager
def exit_codes(extra: str | None = None, needs: str | None = None) -> Iterator[None]:
    """Turn Collogue's errors, and packages of ``extra`` that are not installed, into a message on stderr and an exit code.

    ``needs``: a package without which the work need not begin.
    """
    from collogue.errors import ArgumentError, CollogueError, PlatformError

    try:
        if needs is not None:
            import_module(needs)
        yield
    except ModuleNotFoundError as error:
        if extra is None:
            raise
        hint = f"hint: in Collogue's checkout: pip install '.[{extra}]'"
        typer.echo(f"error: this needs {error.name}, which is not installed\n{hint}", err=True)
        raise typer.Exit(IMPOSSIBLE) from error
    except CollogueError as error:
        typer.echo(f"error: {error}", err=True)
        code = USAGE if isinstance(error, ArgumentError) else IMPOSSIBLE if isinstance(error, PlatformError) else FAILED
        raise typer.Exit(code) from error


@contextmanager
def progress(total: int | None, what: str) -> Iterator[Callable[[str], None]]:
    """A bar on stderr, or a line every :data:`SECONDS_BETWEEN_LINES` where that is no terminal.

    The function it yields says what starts next; what came before then counts as done.
    """
    if not sys.stderr.isatty():
        yield _lines(total, what)
        return
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
    """A file to write must be in a directory that is there, be none itself, and have one of ``endings`` if any are given.

    Without endings ``-`` is stdout. Asked before the work is done.
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
        return
    raise typer.BadParameter(problem, param_hint=flag)


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

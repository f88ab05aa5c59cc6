"""``collogue bench`` and ``collogue bench report``."""

from __future__ import annotations

import json as json_module
from pathlib import Path
from typing import Annotated, Any

import typer

from collogue.commands.options import (
    EXIT_CODES,
    FAILED,
    OK,
    Commit,
    DTypes,
    Formats,
    HiddenSizes,
    Json,
    Many,
    Tokens,
    WorldSizes,
    check_target,
    console,
    exit_codes,
    lists,
    many,
    words,
)

app = typer.Typer(invoke_without_command=True)
Suites = Annotated[Many, many("--suite", "latency, bandwidth, epilogues, hidden, world, eager; default: latency, hidden, bandwidth.")]
_Existing = typer.Argument(exists=True, dir_okay=False, readable=True)


@app.callback(epilog=EXIT_CODES)
def bench(
    context: typer.Context,
    suite: Suites = None,
    world_size: WorldSizes = None,
    tokens: Tokens = None,
    hidden_size: HiddenSizes = None,
    dtype: DTypes = None,
    format: Formats = None,
    commit: Commit = None,
    json: Json = None,
) -> None:
    """Measure latency on this machine's GPUs, floors and other libraries in the same run. A number is shown only if its output is right.

    Suites say what is measured; or lists of shapes and formats. `collogue bench report` makes a page of the results.
    """
    if context.invoked_subcommand is not None:
        return
    check_target(json)
    given: dict[str, Any] = lists(world_size, tokens, hidden_size, dtype, format)
    if suite and set(given) - {"world_size"}:
        raise typer.BadParameter("suites have shapes and formats of their own", param_hint="--suite")
    if suite:
        given["suites"] = words(suite)
    if commit is not None:
        given["commit"] = commit
    with exit_codes(extra="bench"):
        from collogue.bench.latency import run

        passed = run(**given, json=json)
        raise typer.Exit(OK if passed else FAILED)


@app.command(epilog=EXIT_CODES)
def report(
    results: Annotated[Path, _Existing],
    later: Annotated[Path | None, _Existing] = None,
    output: Annotated[Path, typer.Option(help="The page to write.")] = Path("report.html"),
) -> None:
    """Make one static HTML page, with plots and tables, from a file of `collogue bench --json`; of two files, also what changed."""
    check_target(str(output))
    with exit_codes():
        from collogue.bench import page, regression

        read = [json_module.loads(file.read_text(encoding="utf-8")) for file in (results, later) if file is not None]
        if any("cases" not in data or "machine" not in data for data in read):
            raise typer.BadParameter("this is no file of `collogue bench --json`", param_hint="RESULTS")
        out = console(None)
        if len(read) == 1:
            text = page.page(read[0])
        else:
            text = page.page(read[1], read[0], names=(results.name, str(later and later.name)))
            out.print(regression.counts(regression.compare(read[0], read[1])), highlight=False)
        output.write_text(text, encoding="utf-8")
        out.print(f"wrote {output}", highlight=False, markup=False, soft_wrap=True)

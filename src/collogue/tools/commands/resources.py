"""``collogue resources``."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table

from collogue.tools.commands.options import (
    FAILED,
    OK,
    Commit,
    DTypes,
    Formats,
    HiddenSizes,
    Json,
    Many,
    WorldSizes,
    check_target,
    console,
    exit_codes,
    lists,
    many,
    progress,
    words,
    write_text,
)
from collogue.tools.packages import require_compiler

if TYPE_CHECKING:
    from collogue.tools.resources.compare import Comparison
    from collogue.tools.resources.measure import Row

Architectures = Annotated[Many, many("--architecture", "", "sm_80", "sm_90a", "sm_100a", "sm_103a", "sm_120a")]
#: Rows that a terminal shows; the JSON has all.
_SHOWN = 40


def resources(
    everything: Annotated[bool, typer.Option("--all", help="Every kernel that a plan may make, not the covering set: hours.")] = False,
    architecture: Architectures = None,
    world_size: WorldSizes = None,
    hidden_size: HiddenSizes = None,
    dtype: DTypes = None,
    format: Formats = None,
    diff: Annotated[str | None, typer.Option(metavar="REV", help="Compare with the kernels of another commit.")] = None,
    count: Annotated[bool, typer.Option(help="Count instructions (needs nvdisasm; half the time of a run).")] = True,
    commit: Commit = None,
    json: Json = None,
) -> None:
    """Compile the kernels, without a GPU, and say what each takes: registers, memory, occupancy, code, instructions.

    The default is a set of kernels that has every pair of choices (format, world size, hidden size, architecture, dtype, ..) at least once.
    Lists keep those that have one of the levels. Exit status 1 if a kernel uses local memory (stack or spills).
    """
    check_target(json)
    given = lists(world_size, None, hidden_size, dtype, format)
    with exit_codes():
        check_architectures(words(architecture))
        require_compiler(count=count)
        from collogue.tools.record import circumstances
        from collogue.tools.resources import compare
        from collogue.tools.resources.measure import chosen, measure, measure_revision

        levels = {"world" if name == "world_size" else name: values for name, values in _levels(given, words(architecture)).items()}
        choices = chosen(everything=everything, **levels)
        if not choices:
            raise typer.BadParameter("no kernel of the covering set has these choices; try --all", param_hint="the lists")
        with progress(len(choices), "compile") as start:
            rows = measure(choices, disassemble=count, done=start)
        data: dict[str, Any] = {**circumstances(commit), "kernels": rows}
        out = console(json)
        if diff is not None:
            with progress(len(choices), f"compile {diff}") as start:
                before = measure_revision(diff, choices, disassemble=count, done=start)
            comparison = compare.compare(before, rows)
            data |= {"compared_with": diff, "before": before}
            _show_comparison(out, comparison)
        else:
            _show(out, rows)
        wrong = compare.violations(rows, None)
        for line in wrong:
            out.print(f"LOCAL MEMORY {line}", highlight=False, markup=False, soft_wrap=True)
        write_text(compare.dumps(data), json)
        raise typer.Exit(FAILED if wrong else OK)


def check_architectures(names: list[str]) -> list[str]:
    """``names`` themselves. Raises for one that kernels are not compiled for."""
    from collogue.errors import FormatError
    from collogue.planning.architecture import COVERED

    for name in names:
        if name not in COVERED:
            raise FormatError(f"unknown architecture {name!r}", hint=f"choose from {', '.join(COVERED)}")
    return names


def _levels(given: dict[str, list[Any]], architectures: list[str]) -> dict[str, list[Any]]:
    """The lists as levels of the covering set's factors. Raises for what does not exist."""
    import torch

    from collogue.contract.quant import describe, parse
    from collogue.contract.spec import VALUE_DTYPES
    from collogue.errors import DTypeError

    dtypes = {str(d).removeprefix("torch."): d for d in VALUE_DTYPES}
    for name in given.get("dtype", ()):
        if name not in dtypes:
            raise DTypeError(f"unknown dtype {name!r}", hint=f"choose from {', '.join(dtypes)}")
    levels: dict[str, list[Any]] = {**given, "architecture": check_architectures(architectures)}
    levels["dtype"] = [dtypes[name] for name in given.get("dtype", ())]
    levels["format"] = [describe(parse(name)) for name in given.get("format", ())]
    assert all(isinstance(d, torch.dtype) for d in levels["dtype"])
    return {name: values for name, values in levels.items() if values}


def _show(out: Any, rows: Sequence[Row]) -> None:
    """The kernels with the most registers, then a line for each architecture."""
    names = ["load_128", "store_128", "e2m1", "reciprocal", "shuffle", "barrier"]
    lines = [["kernel", "arch", "H", "dtype", "threads", "reg", "shared", "stack", "spill", "occ %", "code", *names]]
    for row in sorted(rows, key=lambda r: -r["registers"])[:_SHOWN]:
        choice, counts = row["choice"], row["instructions"] or {}
        cells = [row["name"].removeprefix("collogue_"), choice["architecture"], choice["hidden_size"], choice["dtype"], row["threads"]]
        cells += [row[name] for name in ("registers", "shared_bytes", "stack_bytes", "spilled_bytes")]
        cells += [f"{100 * row['occupancy']:.0f}", row["code_bytes"], *(counts.get(name, "-") for name in names)]
        lines.append([str(cell) for cell in cells])
    # A file or a pipe gets the whole table, whatever the width of the terminal that is not there.
    if not out.is_terminal:
        out.width = 180
    _print_columns(out, lines)
    if len(rows) > _SHOWN:
        out.print(f"and {len(rows) - _SHOWN} with fewer registers; --json FILE has all", highlight=False)
    for architecture in dict.fromkeys(row["choice"]["architecture"] for row in rows):
        mine = sorted(row["registers"] for row in rows if row["choice"]["architecture"] == architecture)
        out.print(f"{architecture}: {len(mine)} kernels, registers {mine[0]} to {mine[-1]}, median {mine[len(mine) // 2]}", highlight=False)


def _print_columns(out: Any, lines: Sequence[Sequence[str]]) -> None:
    """A table of as many columns as the console has room for. The first line has the headings."""
    columns = list(zip(*lines, strict=True))
    ends = list(accumulate(max(map(len, column)) + 2 for column in columns))
    shown = max(1, sum(end <= out.width for end in ends))
    table = Table(box=None, header_style="bold")
    for heading in lines[0][:shown]:
        table.add_column(heading, justify="left" if heading in ("kernel", "arch", "dtype") else "right", no_wrap=True)
    for line in lines[1:]:
        table.add_row(*line[:shown])
    out.print(table)
    if shown < len(columns):
        out.print(f"not shown, for want of width: {', '.join(lines[0][shown:])}", highlight=False)


def _show_comparison(out: Any, comparison: Comparison) -> None:
    """Every kernel that changed, and how."""
    for difference in comparison.differences:
        changes = ", ".join(f"{name} {a} -> {b}" for name, (a, b) in difference.changes.items())
        out.print(f"{difference.key}: {changes}", highlight=False, markup=False, soft_wrap=True)
    out.print(
        f"{comparison.same} kernels the same, {len(comparison.differences)} changed, {len(comparison.added)} that the other commit has not",
        highlight=False,
    )

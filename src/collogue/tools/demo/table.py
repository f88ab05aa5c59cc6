"""What the demo shows: progress on stderr, the table on stdout, the table as JSON, the table as a plot."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from rich.text import Text

from collogue.tools.demo.result import Result
from collogue.tools.demo.worker import Row


@contextmanager
def progress(steps: int) -> Iterator[Callable[[str], None]]:
    """A progress bar on stderr. The yielded function names the step that begins, and counts the one before as done."""
    columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.completed}/{task.total}"), TimeElapsedColumn())
    with Progress(*columns, console=Console(file=sys.stderr)) as bar:  # stderr as it is now, wherever a library's is sent.
        task = bar.add_task("starting", total=steps)
        begun = False

        def advance(step: str) -> None:
            nonlocal begun
            bar.update(task, description=step, advance=1 if begun else 0)
            begun = True

        yield advance
        bar.update(task, description="done", completed=steps)


def show(result: Result, *, quiet: bool = False) -> None:
    """Print the text, the table and what it means. ``quiet`` prints to stderr, where stdout is for JSON."""
    # A file or a pipe gets the whole table, whatever the width of the terminal that is not there.
    stream = sys.stderr if quiet else sys.stdout
    console = Console(file=stream, highlight=False, width=None if stream.isatty() else 120)
    same = {True: "the same as", False: "not the same as", None: "not compared with"}[result.same_text]
    console.print(Text.assemble("\n", (result.prompt, "bold"), result.generated))
    console.print(f"({same} the unsharded model's greedy text)\n")
    console.print(as_table(result))
    for row in result.rows:
        if row.error is not None:
            console.print(Text.assemble((f"{row.format}: ", "red"), row.error))
    if result.logits_difference is not None:
        console.print(
            f"Logits of the row none: largest difference to the unsharded model {result.logits_difference:.1e}"
            f" (accepted: {result.logits_bound:.0e})."
        )
    if result.error:
        console.print(Text.assemble(("error: ", "red"), result.error))
    console.print(f"{result.seconds:.0f} s in all.")


def as_table(result: Result) -> Table:
    """One line a format: its result, or that there was an error."""
    how = f"{result.device}, {result.dtype}" + (", sharded residual" if result.sharded else "")
    table = Table(
        title=f"SmolLM2-135M on {result.world_size} ranks ({how}), perplexity on {result.tokens:,} tokens; "
        f"unsharded {result.unsharded_perplexity:.4f}",
        caption="Bytes: what one rank sends in one fused call, by the plan. Time: of one fused call, measured here, "
        + ("host included." if result.device == "cuda" else "of the CPU reference: says nothing about GPUs."),
    )
    table.add_column("format")
    for name in (
        "perplexity",
        "difference",
        "std.\nerror",
        "bytes,\n1 token",
        f"bytes,\n{result.tokens:,} tokens",
        "us,\n1 token",
        "us, all\ntokens",
    ):
        table.add_column(name, justify="right")
    for row in result.rows:
        if row.error is not None:
            table.add_row(row.format, "error", style="red")
            continue
        table.add_row(
            row.format,
            _number(row.perplexity, "{:.4f}"),
            _number(difference(row, result), "{:+.4f}"),
            _number(row.standard_error, "{:.4f}"),
            _number(row.bytes_one_token, "{:,}"),
            _number(row.bytes_all_tokens, "{:,}"),
            _number(row.us_one_token, "{:,.0f}"),
            _number(row.us_all_tokens, "{:,.0f}"),
        )
    return table


def _number(value: float | None, form: str) -> str:
    return "-" if value is None else form.format(value)


def difference(row: Row, result: Result) -> float | None:
    """Perplexity above that of the unsharded, unquantised model."""
    return None if row.perplexity is None else row.perplexity - result.unsharded_perplexity


def as_json(result: Result) -> dict[str, Any]:
    """The result as plain data; ``rows`` has one object a format, its ``error`` null where it has a result."""
    data = asdict(result)
    data["passed"] = result.passed
    for plain, row in zip(data["rows"], result.rows, strict=True):
        plain["difference"] = difference(row, result)
    return data


def save_json(result: Result, path: str | Path) -> None:
    """Write the result to a file, or to stdout for ``"-"``."""
    string = json.dumps(as_json(result), indent=2) + "\n"
    if str(path) == "-":
        sys.stdout.write(string)
    else:
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        Path(path).write_text(string, encoding="utf-8")


def save_plot(result: Result, path: Path) -> None:
    """Draw what each format costs: perplexity on the left, time of a fused call on the right."""
    import matplotlib

    matplotlib.use("agg")
    import matplotlib.pyplot as plt

    names = [row.format for row in result.rows]
    places = range(len(names))
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 0.45 * len(names) + 1.9), sharey=True, layout="constrained")
    costs = [difference(row, result) or 0.0 for row in result.rows]
    times = [(row.us_all_tokens or 0.0) / 1000 for row in result.rows]
    spread = [row.standard_error or 0.0 for row in result.rows]
    panels = ((left, costs, spread, "{:+.3f}", "#3b6ea5"), (right, times, None, "{:.1f}", "#8a8a8a"))
    for axis, values, errors, form, colour in panels:
        axis.barh(places, values, xerr=errors, color=colour, ecolor="#999999", height=0.65)
        for place, row in enumerate(result.rows):
            label = "error" if row.error else form.format(values[place])
            axis.annotate(
                label,
                (max(values[place], 0.0) + (errors[place] if errors else 0.0), place),
                xytext=(4, 0),
                textcoords="offset points",
                va="center",
                fontsize=9,
            )
        axis.margins(x=0.18)
        if min(values, default=0.0) >= 0.0:
            axis.set_xlim(left=0.0)
        axis.spines[["top", "right"]].set_visible(False)
    left.set_yticks(places, names)
    left.invert_yaxis()
    left.axvline(0.0, color="black", linewidth=0.8)
    left.set_xlabel(f"perplexity above the unsharded model's {result.unsharded_perplexity:.2f}, with standard error")
    right.set_xlabel(f"ms a fused call of {result.tokens:,} tokens ({result.device})")
    figure.suptitle(f"SmolLM2-135M, tensor-parallel on {result.world_size} ranks: what the fused call's output format costs", fontsize=11)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)
    plt.close(figure)

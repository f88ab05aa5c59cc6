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

#: Columns of the text where it goes to no terminal, and the most that the table takes.
WIDTH = 80


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
    stream = sys.stderr if quiet else sys.stdout
    console = Console(file=stream, highlight=False, width=None if stream.isatty() else WIDTH)
    same = {True: "the same as", False: "not the same as", None: "not compared with"}[result.same_text]
    console.print(Text.assemble("\n", (result.prompt, "bold"), result.generated))
    console.print(f"({same} the unsharded model's greedy text)\n")
    if result.generated_in_fp8:
        console.print(Text.assemble((result.prompt, "bold"), result.generated_in_fp8))
        console.print("(through linear layers with FP8 weights and inputs: parallelize(quant=))\n")
    how = f"{result.device}, {result.dtype}" + (", sharded residual" if result.sharded else "")
    console.print(f"SmolLM2-135M on {result.world_size} ranks ({how}), {result.tokens:,} tokens")
    console.print(f"Perplexity of the unsharded, unquantized model: {result.unsharded_perplexity:.4f}")
    console.print(as_table(result))
    console.print("MB sent: by each rank in one fused call of all tokens, by the plan of GPUs;\nresidual on every rank, or sharded.")
    if _timed(result):
        console.print("µs: of one fused call, host included.")
    for row in result.rows:
        if row.error is not None:
            console.print(Text.assemble((f"{row.format}: ", "red"), row.error))
    if result.logits_difference is not None:
        console.print(
            f"Logits without quantization: at most {result.logits_difference:.1e} from the unsharded model's\n"
            f"(accepted: {result.logits_bound:.0e})."
        )
    if result.error:
        console.print(Text.assemble(("error: ", "red"), result.error))
    console.print(f"{result.seconds:.0f} s in all.")


def as_table(result: Result) -> Table:
    """One line a format: its result, or that there was an error. At most :data:`WIDTH` columns, with no name or number cut."""
    table = Table(box=None, header_style="bold", padding=(0, 1 if _timed(result) else 2, 0, 0))
    table.add_column("format", overflow="fold")  # a long name goes on two lines
    times = ("µs,\n1 token", "µs,\nall") if _timed(result) else ()
    for name in ("\nperplexity", "\ndifference", "std.\nerror", "MB sent,\nreplicated", "\nsharded", *times):
        table.add_column(name, justify="right", no_wrap=True)
    for row in result.rows:
        if row.error is not None:
            table.add_row(row.format, "error", style="red")
            continue
        measured = [_number(us, "{:,.0f}") for us in (row.us_one_token, row.us_all_tokens)] if times else []
        table.add_row(
            row.format,
            _number(row.perplexity, "{:.4f}"),
            _number(difference(row, result), "{:+.4f}"),
            _number(row.standard_error, "{:.4f}"),
            *(_number(None if sent is None else sent / 1e6, "{:,.3f}") for sent in (row.bytes_replicated, row.bytes_sharded)),
            *measured,
        )
    return table


def _timed(result: Result) -> bool:
    return any(row.us_all_tokens is not None for row in result.rows)


def _number(value: float | None, form: str) -> str:
    return "-" if value is None else form.format(value)


def difference(row: Row, result: Result) -> float | None:
    """Perplexity above that of the unsharded, unquantized model."""
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
    """Draw what each format costs and saves: perplexity on the left, what a rank sends on the right."""
    import matplotlib

    matplotlib.use("agg")
    import matplotlib.pyplot as plt

    names = [row.format for row in result.rows]
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 0.5 * len(names) + 1.9), sharey=True, layout="constrained")
    costs = [difference(row, result) or 0.0 for row in result.rows]
    spread = [row.standard_error or 0.0 for row in result.rows]
    left.barh(range(len(names)), costs, xerr=spread, color="#3b6ea5", ecolor="#999999", height=0.65)
    for place, row in enumerate(result.rows):
        label = "error" if row.error else f"{costs[place]:+.3f}"
        _annotate(left, label, max(costs[place], 0.0) + spread[place], place)
    halves = (
        ("replicated residual", [row.bytes_replicated for row in result.rows], "#8a8a8a", -0.18),
        ("sharded residual", [row.bytes_sharded for row in result.rows], "#3b6ea5", 0.18),
    )
    for name, counts, color, offset in halves:
        values = [(count or 0) / 1e6 for count in counts]
        right.barh([place + offset for place in range(len(names))], values, color=color, height=0.34, label=name)
        for place, row in enumerate(result.rows):
            _annotate(right, "error" if row.error else f"{values[place]:.2f}", values[place], place + offset)
    for axis in (left, right):
        axis.margins(x=0.18)
        axis.spines[["top", "right"]].set_visible(False)
    if min(costs, default=0.0) >= 0.0:
        left.set_xlim(left=0.0)
    left.set_yticks(range(len(names)), names)
    left.invert_yaxis()
    left.axvline(0.0, color="black", linewidth=0.8)
    left.set_xlabel(f"perplexity above the unsharded {result.unsharded_perplexity:.2f}, with standard error")
    right.set_xlabel(f"MB sent by a rank in one fused call of {result.tokens:,} tokens")
    right.legend(loc="upper center", bbox_to_anchor=(0.5, 1.12), ncols=2, frameon=False, fontsize=9)
    figure.suptitle(f"SmolLM2-135M, tensor-parallel on {result.world_size} ranks: what the fused call's output format costs", fontsize=11)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)
    plt.close(figure)


def _annotate(axis: Any, label: str, x: float, y: float) -> None:
    axis.annotate(label, (x, y), xytext=(4, 0), textcoords="offset points", va="center", fontsize=9)

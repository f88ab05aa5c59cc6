"""The command line: ``collogue demo | check | bench | tune | explain | doctor | resources | ablate | accuracy | calibrate | reliability``.

Data goes to stdout, progress and logs go to stderr. Exit codes are in :mod:`collogue.tools.terminal`. torch is imported by the commands
that need it, so ``--version``, ``--help`` and wrong usage answer at once.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, NoReturn, get_args

import typer
from rich.console import Console
from rich.table import Table
from typer.core import TyperGroup

from collogue.tools.commands.ablate import ablate
from collogue.tools.commands.accuracy import accuracy, calibrate
from collogue.tools.commands.bench import app as bench_app
from collogue.tools.commands.options import (
    EXIT_CODES,
    FAILED,
    IMPOSSIBLE,
    OK,
    OPERATION_NAMES,
    PICTURES,
    Commit,
    DeviceOrAuto,
    Devices,
    DTypes,
    Formats,
    HiddenSizes,
    Json,
    Many,
    Operations,
    Tokens,
    WorldSizes,
    check_target,
    check_word,
    choices,
    console,
    exit_codes,
    format_words,
    lists,
    progress,
    words,
    write_json,
)
from collogue.tools.commands.plans import explain, tune
from collogue.tools.commands.reliability import reliability
from collogue.tools.commands.resources import resources
from collogue.tools.packages import SMOLLM2, require
from collogue.tools.terminal import report_error

if TYPE_CHECKING:
    from collogue.tools.check import Case, Emulated, Report
    from collogue.tools.doctor import Examination

#: Of every error of usage. Which click it comes from, typer's own or the package, depends on typer's version.
_ClickException: Any = typer.BadParameter.__mro__[2]


class _Commands(TyperGroup):
    """The commands, with one look for every error: ``error:``, then ``hint:``."""

    def main(self, args: Sequence[str] | None = None, *_: Any, **__: Any) -> NoReturn:
        """Run the command of ``args`` and end the process with its exit code."""
        code = OK
        self._main_shell_completion({}, "collogue")
        try:
            with self.make_context("collogue", list(sys.argv[1:] if args is None else args)) as context:
                self.invoke(context)
        except typer.Exit as ended:
            code = ended.exit_code
        except _ClickException as error:
            code = error.exit_code
            if type(error).__name__ == "NoArgsIsHelpError":
                error.show()
            else:
                message = re.sub(r"^(Invalid value for|Missing \w+) '([^']+)'", r"\1 \2", error.format_message())
                # Of a choice of words some versions say "Value error, 'a' is not one of 'b', 'c'".
                message = message.replace("Value error, ", "")
                message = re.sub(r"(?<= is not one of ).*", lambda words: words[0].replace("'", ""), message)
                where = error.ctx.command_path if getattr(error, "ctx", None) else "collogue"
                report_error(message[:1].lower() + message[1:].rstrip("."), f"run `{where} --help`")
        sys.exit(code)


app = typer.Typer(
    name="collogue",
    cls=_Commands,
    help="All-reduce + residual + RMSNorm + quantization in one GPU kernel, for tensor-parallel LLM inference.",
    epilog=EXIT_CODES,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",  # paragraphs of docstrings are wrapped to the terminal, not twice
)


def _devices(values: Many) -> list[str]:
    for word in words(values):
        check_word("--device", word, "cpu", "cuda")
    return words(values)


def _print_version(asked: bool) -> None:
    if asked:
        from collogue import __version__

        typer.echo(__version__)
        raise typer.Exit(OK)


@app.callback()
def _options(
    version: Annotated[bool, typer.Option("--version", is_eager=True, callback=_print_version, help="Print the version and exit.")] = False,
) -> None: ...


@app.command(epilog=EXIT_CODES)
def demo(
    device: Annotated[DeviceOrAuto, typer.Option(metavar=choices(*get_args(DeviceOrAuto)), help="cuda: one GPU per rank.")] = "auto",
    world_size: Annotated[int, typer.Option(min=1, max=8, help="Ranks.")] = 3,
    tokens: Annotated[int, typer.Option(min=2, help="Tokens of the text that the perplexity is of.")] = 1024,
    format: Formats = None,
    sharded: Annotated[bool, typer.Option(help="Each rank keeps only its rows of the residual; the same logits.")] = False,
    json: Json = None,
    plot: Annotated[Path | None, typer.Option(help="Save the plot here: .png, .svg or .pdf (needs matplotlib).")] = None,
) -> None:
    """Run a real language model tensor-parallel and compare the formats."""
    check_target(json)
    check_target(plot, "--plot", PICTURES)
    chosen: dict[str, Any] = {"formats": tuple(format_words(format))} if format else {}
    if sharded:
        chosen["sharded"] = True
    with exit_codes():
        require(*SMOLLM2, *(["matplotlib"] if plot else []))
        from collogue.tools.demo.main import run

        result = run(device, world_size, tokens, json=json, plot=plot, **chosen)
        raise typer.Exit(OK if result.passed else FAILED)


@app.command(epilog=EXIT_CODES)
def check(
    device: Devices = None,
    world_size: WorldSizes = None,
    tokens: Tokens = None,
    hidden_size: HiddenSizes = None,
    dtype: DTypes = None,
    format: Formats = None,
    operation: Operations = None,
    sweep: Annotated[
        Literal["default", "full"], typer.Option(metavar=choices("default", "full"), help="Only where no list is given.")
    ] = "default",
    every: Annotated[int, typer.Option(min=1, help="Take every n-th case only.")] = 1,
    emulate: Annotated[bool, typer.Option("--emulate", help="Also run the kernels' sources on the CPU; needs g++, takes seconds.")] = False,
    commit: Commit = None,
    json: Json = None,
) -> None:
    """Compare every output of calls bit for bit with an independent answer.

    With no list given: a sweep over every dtype, format and layout, odd shapes and special values, on every device there is.

    --sweep full is for GPUs: also hidden sizes up to 16384, calls up to what one kernel takes and beyond, world sizes 2 to 8; minutes.

    With any list given: the product of the lists; the others are all_reduce, world size 2, 7 tokens, hidden size 2880, all dtypes, all
    formats. A bare format name stands for all its layouts and options.

    CPU: the communicator runs the reference; the answer is a separate version in scalar numpy. CUDA: kernels against the reference;
    a process for each GPU, or virtual ranks where the world is larger than the machine.

    --emulate compiles the kernels with g++ and runs every one of them under a scheduler that delays and reorders what ranks send, with a
    late rank, a rank that never comes and calls that differ.
    """
    check_target(json)
    devices, given = _devices(device), lists(world_size, tokens, hidden_size, dtype, format)
    if operation:
        given["operation"] = words(operation)
        for word in given["operation"]:
            check_word("--operation", word, *OPERATION_NAMES)
    if sweep == "full" and (given or "cpu" in devices):
        raise typer.BadParameter("the full sweep is for --device cuda and takes no lists", param_hint="--sweep")
    with exit_codes():
        emulated = _emulate() if emulate else []
        report = _run_checks(devices, given, full=sweep == "full", every=every, commit=commit)
        report.emulated.extend(emulated)
        write_json(report.as_json(), json)
        _show_report(console(json), report)
        if report.impossible:
            raise typer.Exit(IMPOSSIBLE)
        raise typer.Exit(OK if report.passed else FAILED)


def _run_checks(devices: list[str], given: dict[str, list[Any]], *, full: bool, every: int, commit: str | None) -> Report:
    from collogue.testing import environment

    environment.set_defaults()
    import torch

    from collogue.tools import check as checks
    from collogue.tools.record import circumstances

    if not devices:
        devices = ["cuda"] if full else ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]

    def cases_on(device: str) -> list[Case]:
        return (checks.full_sweep() if full else checks.sweep(**given) if given else checks.default_sweep(device))[::every]

    cases: dict[str, list[Case]] = {d: cases_on(d) for d in devices}
    if "cuda" in cases and torch.cuda.is_available():
        _compile(cases["cuda"])
    results = []
    with progress(sum(map(len, cases.values())), "check") as start:
        for name, mine in cases.items():
            results += checks.run_cases(name, mine, started=lambda case: start(str(case)))
    return checks.Report(results, circumstances(commit))


def _emulate() -> list[Emulated]:
    """Every program of the emulator, with a bar."""
    from collogue.tools.check import PROGRAMS, run_programs

    with progress(len(PROGRAMS), "emulate") as start:
        return run_programs(started=lambda program: start(str(program)))


def _compile(cases: list[Case]) -> None:
    """Every kernel of ``cases`` into the cache, with a bar."""
    from contextlib import ExitStack

    from collogue.tools.check import build_kernels

    with ExitStack() as stack:
        build_kernels(cases, total=lambda count: stack.enter_context(progress(count, "compile")))


def _show_report(console: Console, report: Report, shown: int = 20) -> None:
    table = Table("device", "ranks", "format", "cases", "failed", box=None, header_style="bold")
    groups: dict[tuple[str, str, str], list[bool]] = {}
    for r in report.results:
        groups.setdefault((r.device, r.ranks, r.case.family), []).append(r.passed)
    for key, passed in groups.items():
        table.add_row(*key, str(len(passed)), str(passed.count(False) or "-"))
    console.print(table)
    failures = [r for r in report.results if not r.passed]
    for r in failures[:shown]:
        console.print(
            f"FAILED {r.case}\n  {r.error or r.first or 'no error, where there must be one'}", highlight=False, markup=False, soft_wrap=True
        )
    if len(failures) > shown:
        console.print(f"and {len(failures) - shown} more; --json FILE has all")
    expected = sum(r.passed and r.expected_error is not None for r in report.results)
    rejected = f" ({expected} of them expected errors)" if expected else ""
    console.print(f"{len(report.results) - len(failures)} of {len(report.results)} cases passed{rejected}")
    for e in report.emulated:
        if e.problem:
            console.print(f"FAILED emulator: {e.program}\n  {e.problem}", highlight=False, markup=False, soft_wrap=True)
    if report.emulated:
        good = sum(not e.problem for e in report.emulated)
        console.print(f"{good} of {len(report.emulated)} programs of the emulator passed")


@app.command(epilog=EXIT_CODES)
def doctor(
    json: Json = None,
    journal: Annotated[
        Path | None, typer.Option(help="Print a journal that a failed call wrote, no more.", exists=True, dir_okay=False)
    ] = None,
    svg: Annotated[Path | None, typer.Option(help="Draw the ranks, their links and islands here, as .svg.")] = None,
    group: Annotated[bool, typer.Option("--group", help="Only draw the ranks of a job: torchrun .. -m collogue doctor --group.")] = False,
    engine: Annotated[
        Literal["vllm", "sglang"] | None,
        typer.Option(metavar=choices("vllm", "sglang"), help="Say instead what of this engine will be served, and what stands in the way."),
    ] = None,
) -> None:
    """Say what this machine has, what Collogue will use, and what to do about what is missing; draw how the GPUs are linked.

    Exit status 3 if something is missing that Collogue needs on this machine; a machine without GPUs is not that.
    """
    if journal is not None:
        from collogue.gpu.journal import Journal

        with exit_codes():
            typer.echo(Journal.load(journal).text())
        return
    from collogue.tools import wiring
    from collogue.tools.doctor import PROBES, Examination, examine

    if group and engine is not None:
        raise typer.BadParameter("it does not go with --engine", param_hint="--group")
    check_target(json)
    check_target(svg, "--svg", (".svg",))
    if group:
        with exit_codes():
            rank, drawn = wiring.of_job()
            if rank == 0:
                drawing = Examination([], drawn)
                write_json(drawing.as_json(), json)
                _show_findings(console(json), drawing, closing=False)
                if svg is not None:
                    svg.write_text(wiring.svg(drawn), encoding="utf-8")
        return
    if engine is not None:
        from collogue.tools.doctor_engines import examine_engine

        served = Examination(list(examine_engine(engine)))
        write_json(served.as_json(), json)
        _show_findings(console(json), served, closing=False)
        raise typer.Exit(OK if served.findings[0].status != "missing" else IMPOSSIBLE)
    with progress(len(PROBES), "doctor") as start:
        report = examine(started=start)
    write_json(report.as_json(), json)
    _show_findings(console(json), report)
    if svg is not None:
        with exit_codes():
            from collogue.errors import PlatformError

            if report.wiring is None:
                raise PlatformError("there are no GPUs to draw", hint="leave --svg out")
            svg.write_text(wiring.svg(report.wiring), encoding="utf-8")
    raise typer.Exit(OK if report.usable else IMPOSSIBLE)


def _show_findings(console: Console, report: Examination, *, closing: bool = True) -> None:
    style = {"ok": ("green", "ok"), "warn": ("yellow", "warn"), "missing": ("red", "missing"), "unneeded": ("dim", "-")}
    table = Table.grid(padding=(0, 1))
    for _ in range(3):
        table.add_column(overflow="fold")
    # What is not needed comes last, without hints.
    for f in sorted(report.findings, key=lambda f: f.status == "unneeded"):
        color, word = style[f.status]
        if f.status == "unneeded":
            table.add_row(f"[{color}]{word}[/]", f"[{color}]{f.name}[/]", f"[{color}]not needed here: {_escape(f.detail)}[/]")
            continue
        table.add_row(f"[{color}]{word}[/]", f.name, _escape(f.detail) + (f"\n[dim]hint: {_escape(f.hint)}[/]" if f.hint else ""))
    console.print(table, highlight=False)
    if report.wiring is not None:
        from collogue.tools import wiring

        console.print(wiring.text(report.wiring), highlight=False, markup=False, soft_wrap=True)
    if not closing:
        return
    where = "" if report.gpus else " On the CPU only, with the slow reference implementation."
    console.print(f"Collogue can work here.{where}" if report.usable else "Required components are missing.")


def _escape(text: str) -> str:
    from rich.markup import escape

    return escape(text)


# In the order of --help, after those above.
for command in (explain, tune, resources, ablate, accuracy, calibrate, reliability):
    app.command(epilog=EXIT_CODES)(command)
app.add_typer(bench_app, name="bench")

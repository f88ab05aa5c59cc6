"""``collogue ablate``."""

from __future__ import annotations

from typing import Annotated, Any

import typer
from rich.table import Table

from collogue.tools.commands.options import (
    Commit,
    Formats,
    Json,
    Many,
    Tokens,
    check_target,
    console,
    exit_codes,
    format_words,
    many,
    numbers,
    progress,
    words,
    write_json,
)
from collogue.tools.commands.resources import Architectures
from collogue.tools.packages import require_compiler

Switches = Annotated[Many, many("--switch", "Which ones; default: all. `collogue ablate --list` names them.", metavar="NAME")]


def ablate(
    switch: Switches = None,
    tokens: Tokens = None,
    format: Formats = None,
    architecture: Architectures = None,
    timing: Annotated[bool | None, typer.Option(help="Measure on this machine's GPUs; default: if there are two or more.")] = None,
    facts: Annotated[bool, typer.Option(help="Registers, code and bits, which need no GPU.")] = True,
    count: Annotated[bool, typer.Option(help="Count instructions (needs nvdisasm).")] = True,
    list_: Annotated[bool, typer.Option("--list", help="Name the switches and exit.")] = False,
    commit: Commit = None,
    json: Json = None,
) -> None:
    """Say what single choices in the kernels are worth: microseconds, registers, code, and whether bits change.

    Times need a GPU for each of two ranks or more; registers and bits need none. H = 7168, bfloat16, with residual and norm.
    """
    check_target(json)
    with exit_codes():
        from collogue.testing import environment
        from collogue.tools.ablation import main
        from collogue.tools.ablation.switches import chosen
        from collogue.tools.commands.resources import check_architectures

        switches = chosen(words(switch) or None)
        if list_:
            table = Table.grid(padding=(0, 2))
            for one in switches:
                table.add_row(one.name, one.what)
            console(None).print(table, highlight=False, markup=False)
            return
        if facts:
            require_compiler(count=count)
        environment.set_defaults()
        import torch

        from collogue.errors import PlatformError
        from collogue.planning.architecture import COVERED
        from collogue.tools.record import circumstances

        architectures = check_architectures(words(architecture)) or list(COVERED)
        gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
        measured = gpus >= 2 if timing is None else timing
        if not measured and not facts and timing is not None:
            raise typer.BadParameter("without times there is nothing left to say", param_hint="--no-facts")
        if (timing or not facts) and gpus < 2:
            raise PlatformError(f"{gpus} GPUs found; timings need at least 2", hint="--no-timing gives the rest")
        world = min(8, gpus) if gpus >= 2 else 2
        cases = main.cases(world, numbers("--tokens", tokens, low=1) or main.TOKENS, format_words(format) or main.FORMATS)
        total = main.steps(switches, cases, architectures, timing=measured, measure_facts=facts)
        with progress(total, "ablate") as start:
            found = main.run(
                switches,
                cases,
                architectures=architectures,
                timing=measured,
                measure_facts=facts,
                disassemble=count,
                done=start,
            )
        data: dict[str, Any] = {**circumstances(commit), **found}
        write_json(data, json)
        console(json).print(main.text(data), highlight=False, markup=False, soft_wrap=True)

"""``collogue reliability``."""

from __future__ import annotations

from typing import Annotated

import typer

from collogue.tools.commands.options import (
    FAILED,
    OK,
    Commit,
    Json,
    Many,
    check_target,
    check_word,
    console,
    exit_codes,
    many,
    progress,
    words,
    write_json,
)

SECTIONS = ("cost", "soak", "faults")
Sections = Annotated[Many, many("--only", "Default: all.", *SECTIONS)]
Calls = Annotated[int, typer.Option("--soak", min=0, help="One-shot calls of the soak.")]
LargeCalls = Annotated[int, typer.Option("--soak-large", min=0, help="Two-shot calls of the soak.")]
OtherCalls = Annotated[int, typer.Option("--soak-other", min=0, help="Calls of each other part of the soak.")]


def reliability(
    only: Sections = None,
    soak: Calls = 1_000_000,
    soak_large: LargeCalls = 100_000,
    soak_other: OtherCalls = 100_000,
    world_size: Annotated[int | None, typer.Option(min=2, max=8, help="Ranks, a GPU each; default: the number of GPUs.")] = None,
    seed: Annotated[int, typer.Option(help="Of the order of calls and of the delays.")] = 0,
    limit: Annotated[float, typer.Option(min=1, help="Seconds, after which everything is ended.")] = 300.0,
    commit: Commit = None,
    json: Json = None,
) -> None:
    """Check a million calls on the device, inject every fault, and measure what the protection costs. Needs two GPUs.

    Processes are watched: one that hangs or dies is ended and reported, and the rest goes on. docs/reliability.md says what is promised.
    """
    check_target(json)
    for word in words(only):
        check_word("--only", word, *SECTIONS)
    with exit_codes():
        from collogue.testing import environment

        environment.set_defaults()
        import torch

        from collogue.errors import PlatformError
        from collogue.tools.record import circumstances

        gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
        world = world_size or min(8, gpus)
        if not 2 <= world <= gpus:
            raise PlatformError(f"{gpus} GPUs found; {max(2, world)} required, one for each rank", hint="use a machine with more GPUs")
        from collogue.tools.reliability import main
        from collogue.tools.reliability.parts import Counts

        options = main.Options(Counts(soak, soak_large, soak_other, soak_other, soak_other, soak_other), seed=seed)
        sections = tuple(section for section in main.SECTIONS if section in (words(only) or main.SECTIONS))
        with progress(len(main.names_of(world, sections, options)), "reliability") as start:
            found = main.run(world, sections, options, limit=limit, heard=main.once(start))
        data = {**circumstances(commit), **found}
        write_json(data, json)
        console(json).print(main.text(data), highlight=False, markup=False, soft_wrap=True)
        raise typer.Exit(OK if data["passed"] else FAILED)

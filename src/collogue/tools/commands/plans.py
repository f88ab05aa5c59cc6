"""``collogue tune`` and ``collogue explain``."""

from __future__ import annotations

from contextlib import ExitStack
from typing import Annotated, get_args

import typer

from collogue.tools.commands.options import (
    DTYPE_NAMES,
    FAILED,
    FAMILIES,
    FORMAT_OPTIONS,
    OK,
    OPERATION_NAMES,
    PROLOGUES,
    WIRES,
    Commit,
    DeviceOrAuto,
    DTypeName,
    DTypes,
    HiddenSizes,
    Json,
    Many,
    OperationName,
    OrderName,
    Tokens,
    TransportName,
    check_target,
    choices,
    completed,
    console,
    exit_codes,
    format_words,
    lists,
    many,
    numbers,
    progress,
    write_json,
)


def tune(
    hidden_size: HiddenSizes = None,
    dtype: DTypes = None,
    tokens: Tokens = None,
    world_size: Annotated[int | None, typer.Option(min=2, max=8, help="Ranks; default: the GPUs of this machine.")] = None,
    commit: Commit = None,
    json: Annotated[
        str | None, typer.Option("--json", metavar="FILE", help="Where to write the table; - is stdout; default: for this user.")
    ] = None,
) -> None:
    """Measure one-shot and two-shot around their crossover on this machine's GPUs, and write the table that plans use from then on.

    By default the table lies beside the compiled kernels, where communicators on this machine find it; COLLOGUE_TABLE, or table= of a
    communicator, names another. What it holds of other hidden sizes and dtypes stays; a file of --json has what was measured alone.
    What does not equal the reference bit for bit is in neither.
    """
    check_target(json)
    given = lists(None, tokens, hidden_size, dtype, None)
    with exit_codes():
        from collogue.tools.tune.main import run, text

        with ExitStack() as stack:
            data = run(
                **given,
                world_size=world_size,
                json=json,
                commit=commit,
                begin=lambda steps: stack.enter_context(progress(steps, "tune")),
            )
        console(json).print(text(data), highlight=False, markup=False, soft_wrap=True)
        raise typer.Exit(OK if data["passed"] else FAILED)


def explain(
    tokens: Annotated[int | None, typer.Option(min=1, help="Rows T of the call; default: 1, or all --rows.")] = None,
    hidden_size: Annotated[int, typer.Option(min=8, help="Row length H, a multiple of 8.")] = 7168,
    world_size: Annotated[int, typer.Option(min=1, max=64, help="Ranks, those of all hosts together.")] = 2,
    dtype: Annotated[DTypeName, typer.Option(metavar=choices(*DTYPE_NAMES), help="Of the terms.")] = "bfloat16",
    format: Annotated[str, typer.Option(metavar=choices(*FAMILIES), help=FORMAT_OPTIONS, autocompletion=completed(*FAMILIES))] = "none",
    operation: Annotated[OperationName, typer.Option(metavar=choices(*OPERATION_NAMES), help="The call.")] = "all_reduce",
    residual: Annotated[bool, typer.Option(help="Whether the call adds a residual.")] = True,
    norm: Annotated[bool, typer.Option(help="Whether the call has an RMSNorm.")] = True,
    keep_norm: Annotated[bool, typer.Option(help="Whether the norm is also returned beside its codes.")] = False,
    prologue: Annotated[
        str | None,
        typer.Option(
            metavar=choices(*PROLOGUES), help="The term; options follow.", autocompletion=completed(*PROLOGUES), show_default=False
        ),
    ] = None,
    branch_norm: Annotated[bool, typer.Option("--branch-norm", help="The sum is normed before the residual is added.")] = False,
    rows: Annotated[Many, many("--rows", "Rows that each rank owns, in place of equal blocks, as in 3,0,5.")] = None,
    max_tokens: Annotated[int | None, typer.Option(min=1, help="Capacity of the communicator; default: this call.")] = None,
    device: Annotated[DeviceOrAuto, typer.Option(metavar=choices(*get_args(DeviceOrAuto)), help="Of this machine.")] = "auto",
    architecture: Annotated[str | None, typer.Option(help="Plan for GPUs that need not be here, such as sm_90a.")] = None,
    gpu: Annotated[str | None, typer.Option(help="Predict for GPUs that need not be here: A100, H100, H200, B200, GB200, L40S ...")] = None,
    hosts: Annotated[int, typer.Option(min=1, help="Hosts that the ranks are on, as many on each, in rank order.")] = 1,
    host_gbps: Annotated[
        float | None,
        typer.Option(help="With --gpu: Gb/s of a GPU to other hosts, each way; default: docs/machines.md.", show_default=False),
    ] = None,
    transport: Annotated[
        TransportName | None,
        typer.Option(metavar=choices(*get_args(TransportName)), help="Default: that of a communicator.", show_default=False),
    ] = None,
    order: Annotated[OrderName, typer.Option(metavar=choices(*get_args(OrderName)), help="How terms are added.")] = "islands",
    wire: Annotated[
        str | None,
        typer.Option(
            metavar=choices(*WIRES),
            help="Terms travel in this format; options follow, as in fp8_group64. On GPUs: transport host.",
            autocompletion=completed(*WIRES),
            show_default=False,
        ),
    ] = None,
    table: Annotated[str | None, typer.Option(metavar="FILE", help="A measured table; default: that of a communicator.")] = None,
    json: Json = None,
) -> None:
    """Show the plan of a call: algorithm, why, launch shape and launches, predicted, least and measured time, bytes.

    Without --architecture and --gpu: on this machine. With --gpu the times are of a model of that machine (docs/machines.md).

    Options of --prologue follow its name, as in expert_combine/float32/shared.
    """
    check_target(json)
    format_words([format])
    format_words(None if wire is None else [wire], "--wire")
    split = numbers("--rows", rows, low=0) or None
    if gpu is not None and (architecture is not None or device != "auto"):
        raise typer.BadParameter("it goes with neither --architecture nor --device", param_hint="--gpu")
    if host_gbps is not None and (gpu is None or hosts == 1):
        raise typer.BadParameter("it goes with --gpu and with --hosts of 2 or more", param_hint="--host-gbps")
    with exit_codes():
        from collogue.contract.prologue import PrologueForm
        from collogue.planning import explain as plans

        found = plans.explain(
            plans.Machine.of(device, architecture, hosts) if gpu is None else plans.Machine.with_gpu(gpu, hosts, host_gbps),
            1 if tokens is None and split is None else tokens,
            hidden_size=hidden_size,
            world_size=world_size,
            dtype=dtype,
            format=format,
            operation=operation,
            residual=residual,
            norm=norm,
            keep_norm=keep_norm,
            prologue=None if prologue is None else PrologueForm.parse(prologue),
            branch_norm=branch_norm,
            max_tokens=max_tokens,
            table=table,
            rows=split,
            transport=transport,
            order=order,
            wire=wire or "none",
        )
        write_json(found.as_json(), json)
        console(json).print(str(found), highlight=False, markup=False, soft_wrap=True)

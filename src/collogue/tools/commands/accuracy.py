"""``collogue accuracy`` and ``collogue calibrate``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, get_args

import typer

from collogue.tools.commands.options import (
    DTYPE_NAMES,
    Commit,
    Device,
    DTypeName,
    Formats,
    Json,
    check_target,
    choices,
    console,
    exit_codes,
    format_words,
    progress,
    write_json,
)
from collogue.tools.packages import SMOLLM2, require

if TYPE_CHECKING:
    import torch

    from collogue.tools.accuracy.models import Model

Convention = Literal["collogue", "modelopt", "compressed-tensors", "torchao"]
ModelName = Annotated[
    Literal["smollm2", "random"],
    typer.Option("--model", metavar=choices("smollm2", "random"), help="random: weights with outlier channels."),
]
Layers = Annotated[int, typer.Option(min=1, help="Layers of --model random.")]
Width = Annotated[int, typer.Option("--hidden-size", min=32, help="Hidden size of --model random, a multiple of 32.")]
DType = Annotated[DTypeName, typer.Option("--dtype", metavar=choices(*DTYPE_NAMES), help="Of activations and partial sums.")]


def accuracy(
    model: ModelName = "smollm2",
    world_size: Annotated[int, typer.Option(min=1, max=8, help="Ranks (threads of this process).")] = 3,
    tokens: Annotated[int, typer.Option(min=8, help="Tokens of the text.")] = 384,
    format: Formats = None,
    dtype: DType = "bfloat16",
    layers: Layers = 8,
    hidden_size: Width = 1536,
    device: Device = "cpu",
    commit: Commit = None,
    json: Json = None,
) -> None:
    """Say what formats, static scales and the order of accumulation cost a model: perplexity, logits, greedy choices, error by layer.

    Needs no GPU: on two cores SmolLM2-135M takes about two minutes.
    """
    check_target(json)
    asked = format_words(format)
    with exit_codes():
        _check_model(model)
        from collogue.tools.accuracy import main
        from collogue.tools.demo.formats import FORMATS
        from collogue.tools.record import circumstances

        chosen, value_dtype = asked or list(FORMATS), _dtype(dtype)
        subject = _model(model, tokens, layers, hidden_size)
        static = [name for name in main.STATIC if name in chosen]
        with progress(main.passes(chosen, static), "accuracy") as start:
            found = main.run(subject, world_size=world_size, dtype=value_dtype, formats=chosen, static=static, device=device, started=start)
        data = {**circumstances(commit), **found}
        write_json(data, json)
        console(json).print(main.text(data), highlight=False, markup=False, soft_wrap=True)


def calibrate(
    output: Annotated[Path, typer.Argument(help="Where to: .json or .safetensors.")],
    format: Annotated[
        Literal["fp8_static", "nvfp4"], typer.Option(metavar=choices("fp8_static", "nvfp4"), help="Of the scales.")
    ] = "nvfp4",
    convention: Annotated[Convention, typer.Option(metavar=choices(*get_args(Convention)), help="Whose names.")] = "collogue",
    model: ModelName = "smollm2",
    world_size: Annotated[int, typer.Option(min=1, max=8, help="Ranks (threads of this process).")] = 1,
    tokens: Annotated[int, typer.Option(min=1, help="Tokens of the calibration text.")] = 512,
    dtype: DType = "bfloat16",
    layers: Layers = 8,
    hidden_size: Width = 1536,
    device: Device = "cpu",
) -> None:
    """Collect the amax of every quantized activation over a text, and write static scales under the names that checkpoints use.

    The file says whether a scale is a divisor or a multiplier. For a model of your own: `collogue.Calibration`.
    """
    check_target(output, "OUTPUT", (".json", ".safetensors"))
    with exit_codes():
        _check_model(model)
        from collogue.contract import calibration
        from collogue.tools.accuracy.calibrate import calibrate as collect

        calibration.convention_of(format, convention)  # wrong names are reported before the model is read
        value_dtype = _dtype(dtype)
        subject = _model(model, 8, layers, hidden_size, calibration=tokens)
        found = collect(subject, world_size=world_size, dtype=value_dtype, device=device)
        data = calibration.document(found, format, convention, model=subject.name, tokens=len(subject.calibration), dtype=dtype)
        calibration.write(data, output)
        what = f"{len(data['scales'])} scales ({data['suffix']}, a {data['direction']})"
        console(None).print(f"{what} of {subject.name} in {output}", highlight=False, markup=False, soft_wrap=True)


def _check_model(name: str) -> None:
    """Wrong names and missing packages are reported before torch is imported."""
    if name == "smollm2":
        require(*SMOLLM2)


def _model(name: str, tokens: int, layers: int, hidden_size: int, calibration: int | None = None) -> Model:
    from collogue.tools.accuracy.models import random_model, random_shape, smollm2

    extra: dict[str, Any] = {"tokens": tokens, "calibration": min(tokens, 512) if calibration is None else calibration}
    if name == "smollm2":
        return smollm2(**extra)
    if hidden_size % 32:
        raise typer.BadParameter(f"{hidden_size} is not a multiple of 32", param_hint="--hidden-size")
    return random_model(random_shape(layers, hidden_size), **extra)


def _dtype(name: str) -> torch.dtype:
    import torch

    found: torch.dtype = getattr(torch, name)
    return found

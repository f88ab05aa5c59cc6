"""``collogue bench`` and its parts: ``model``, ``generate``, ``serving``, ``report``."""

from __future__ import annotations

import json as json_module
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

import typer

from collogue.tools.commands.options import (
    EXIT_CODES,
    FAILED,
    OK,
    PICTURES,
    Commit,
    DeviceName,
    DTypes,
    Formats,
    HiddenSizes,
    Json,
    Many,
    Tokens,
    WorldSizes,
    check_target,
    check_word,
    choices,
    completed,
    console,
    exit_codes,
    lists,
    many,
    numbers,
    progress,
    words,
    write_json,
)
from collogue.tools.packages import require

app = typer.Typer(invoke_without_command=True, rich_markup_mode="markdown")
_SCHEMES = ("fp8_static", "fp8_per_token", "fp8_block", "mxfp8", "nvfp4")
_LIBRARIES = ("nccl", "symm_mem", "vllm", "flashinfer")
_SUITES = ("latency", "bandwidth", "epilogues", "hidden", "world", "eager", "sms")
_MODELS = ("llama-3.1-8b", "llama-3.1-70b", "qwen3-32b", "deepseek-v3-dense", "deepseek-v3-shared")
_DECODERS = ("llama-3.1-8b", "qwen3-8b")
_WITHOUT_GPU = "cpu tries it without a GPU; its times mean nothing."
Suites = Annotated[Many, many("--suite", "Default: latency, hidden, bandwidth.", *_SUITES)]
DeviceOfBench = Annotated[DeviceName, typer.Option(metavar=choices(*get_args(DeviceName)), help=_WITHOUT_GPU)]
_Results = typer.Argument(metavar="RESULTS", exists=True, dir_okay=False, readable=True)
_Later = typer.Argument(metavar="LATER", exists=True, dir_okay=False, readable=True)


@app.callback(epilog=EXIT_CODES)
def bench(
    context: typer.Context,
    suite: Suites = None,
    world_size: WorldSizes = None,
    tokens: Tokens = None,
    hidden_size: HiddenSizes = None,
    dtype: DTypes = None,
    format: Formats = None,
    chains: Annotated[bool, typer.Option(help="Also time other libraries' chains; compiling them takes most of a minute.")] = True,
    baselines: Annotated[Many, many("--baselines", "Other libraries.", *_LIBRARIES)] = None,
    virtual: Annotated[Many, many("--virtual", "Ranks of one process on one GPU, beside FlashInfer.", "2", "4", "8")] = None,
    cta_threads: Annotated[int | None, typer.Option(help="Maximum number of threads of a CTA, in every call.")] = None,
    commit: Commit = None,
    json: Json = None,
) -> None:
    """Measure latency on this machine's GPUs, floors and other libraries in the same run. A number is shown only if its output is right.

    Suites say what is measured; or lists of shapes and formats. `collogue bench report` makes a page of the results. With --virtual, the
    ranks share one GPU: norm, FP8 static and sum of --tokens and --hidden-size, and no NVLink in the times.
    """
    if context.invoked_subcommand is not None:
        return
    check_target(json)
    given: dict[str, Any] = lists(world_size, tokens, hidden_size, dtype, format)
    if virtual:
        if suite or baselines or cta_threads or set(given) - {"tokens", "hidden_size"}:
            raise typer.BadParameter("takes --tokens and --hidden-size alone", param_hint="--virtual")
        _virtual(numbers("--virtual", virtual, low=2, high=8, step=2), given, commit, json)
        return
    for word in words(baselines):
        check_word("--baselines", word, *_LIBRARIES)
    if suite and set(given) - {"world_size"}:
        raise typer.BadParameter("suites have shapes and formats of their own", param_hint="--suite")
    if suite:
        given["suites"] = words(suite)
    if baselines:
        given["baselines"] = words(baselines)
    fixed = {"commit": commit, "cta_threads": cta_threads}
    given |= {name: value for name, value in fixed.items() if value is not None}
    with exit_codes():
        from collogue.tools.bench.latency import run

        passed = run(**given, chains=chains, json=json)
        raise typer.Exit(OK if passed else FAILED)


def _virtual(worlds: list[int], given: dict[str, Any], commit: str | None, json: str | None) -> None:
    """``collogue bench --virtual``."""
    for world in worlds:
        check_word("--virtual", str(world), "2", "4", "8")
    with exit_codes():
        from collogue.tools.bench.virtual import HIDDEN_SIZES, TOKENS, run, text

        count = 3 * len(worlds) * len(given.get("hidden_size", HIDDEN_SIZES)) * len(given.get("tokens", TOKENS))
        with progress(count, "bench --virtual") as start:
            # Where a later number of ranks hangs, or somebody interrupts, what was measured is in the file.
            data = run(worlds, **given, started=start, commit=commit, partly=lambda found: None if json == "-" else write_json(found, json))
        write_json(data, json)
        console(json).print(text(data), highlight=False, markup=False, soft_wrap=True)
    raise typer.Exit(OK if data["passed"] else FAILED)


@app.command(epilog=EXIT_CODES)
def model(
    name: Annotated[Many, many("--model", "Default: all.", *_MODELS)] = None,
    world_size: WorldSizes = None,
    tokens: Tokens = None,
    layers: Annotated[int, typer.Option(min=1, help="Layers of the stack that is timed.")] = 4,
    replays: Annotated[int, typer.Option(min=1, help="Replays of each graph.")] = 20,
    scales: Annotated[
        Literal["static", "token"],
        typer.Option(metavar=choices("static", "token"), help="Of FP8 activations: static (one), or token (one for each)."),
    ] = "static",
    plot: Annotated[Path | None, typer.Option(help="Write a plot of the speed-ups: .png, .svg or .pdf.")] = None,
    commit: Commit = None,
    json: Json = None,
) -> None:
    """Measure decode steps and prefills of layer stacks with published shapes, with every implementation of the epilogue.

    Collogue eager, by the fusion pass and sharded, against NCCL and torch's symmetric memory with torch.compile. From 512 tokens on
    a size is a prefill.
    """
    check_target(json)
    check_target(plot, "--plot", PICTURES)
    given: dict[str, Any] = lists(world_size, tokens, None, None, None)
    with exit_codes():
        require(*(["matplotlib"] if plot else []))
        from collogue.tools.bench.model import run

        picture = None if plot is None else str(plot)
        given |= {"layers": layers, "replays": replays, "scales": scales}
        passed = run(**given, model=words(name), json=json, plot=picture, commit=commit)
        raise typer.Exit(OK if passed else FAILED)


@app.command(epilog=EXIT_CODES)
def generate(
    model: Annotated[Many, many("--model", "Default: both.", *_DECODERS)] = None,
    scheme: Annotated[Many, many("--scheme", "Default: the first three. bfloat16 always.", *_SCHEMES)] = None,
    batch: Annotated[Many, many("--batch", "Sequences of a decode step; default: 1, 8, 64.")] = None,
    layers: Annotated[int | None, typer.Option(min=1, help="Layers of each model; default: all.")] = None,
    prompt_tokens: Annotated[int, typer.Option(min=1, help="Tokens of a prompt.")] = 128,
    new_tokens: Annotated[int, typer.Option(min=3, help="Decode steps that are timed in a row.")] = 16,
    rounds: Annotated[int, typer.Option(min=1, help="Rounds in which the ways take turns.")] = 5,
    world_size: Annotated[int, typer.Option(min=1, max=8, help="Ranks, one per GPU.")] = 1,
    device: DeviceOfBench = "cuda",
    commit: Commit = None,
    json: Json = None,
) -> None:
    """Tokens per second and time to the first token of decoders with random weights, in FP8 and in bfloat16.

    Collogue's kernels between the products against the same by torch.compile, in turn, CUDA graphs in all; bytes of the weights, the
    products alone, and the bytes that a step must read.
    """
    check_target(json)
    batches = numbers("--batch", batch, low=1)
    with exit_codes():
        from collogue.tools.bench.generate import run, steps, text

        names, schemes = words(model), words(scheme)
        sizes: dict[str, Any] = {"layers": layers, "prompt_tokens": prompt_tokens, "new_tokens": new_tokens, "rounds": rounds}
        where: dict[str, Any] = {"world_size": world_size, "device": device, "commit": commit}
        with progress(steps(names, schemes, batches), "bench generate") as start:
            data = run(model=names, scheme=schemes, batch=batches, started=start, **sizes, **where)
        write_json(data, json)
        console(json).print(text(data), highlight=False, markup=False, soft_wrap=True)
    raise typer.Exit(OK if data["passed"] else FAILED)


@app.command(epilog=EXIT_CODES)
def serving(
    prompts: Annotated[int, typer.Option(min=1, help="Prompts.")] = 1000,
    prompt_tokens: Annotated[int, typer.Option(min=1, help="Tokens of a prompt.")] = 1000,
    new_tokens: Annotated[int, typer.Option(min=1, help="Tokens made for each prompt.")] = 1000,
    concurrency: Annotated[int, typer.Option(min=1, help="Sequences at a time.")] = 60,
    prefill_tokens: Annotated[int, typer.Option(min=1, help="Maximum number of tokens of one prefill.")] = 8192,
    model: Annotated[
        str, typer.Option(metavar=choices(*_MODELS), help="The shapes.", autocompletion=completed(*_MODELS))
    ] = "deepseek-v3-dense",
    layers: Annotated[int | None, typer.Option(min=1, help="Layers that are held and run; default: all, as far as memory allows.")] = None,
    ways: Annotated[
        Many, many("--ways", "collogue eager, collogue sharded, nccl (the default); and the others of bench model.", metavar="NAME")
    ] = None,
    chunks: Annotated[int | None, typer.Option(min=1, help="Parts of the prompts, between which the ways take turns.")] = None,
    world_size: Annotated[int | None, typer.Option(min=2, max=8, help="Ranks; default: 8, 4 or 2, as GPUs allow.")] = None,
    device: DeviceOfBench = "cuda",
    commit: Commit = None,
    json: Json = None,
) -> None:
    """Serve random prompts with a small continuous-batching loop, Collogue's ways and the NCCL chain taking turns.

    Output tokens per second, time per token, time to the first token; the headline is the ratio to NCCL + torch.compile.
    For a short run: --prompts 120 --layers 8. An estimate of the time is on stderr before serving starts.
    """
    check_target(json)
    with exit_codes():
        from collogue.tools.bench.schedule import Workload
        from collogue.tools.bench.serving import WAYS, run

        work = Workload(prompts, prompt_tokens, new_tokens, concurrency, prefill_tokens)
        given = {"model": model, "layers": layers, "world_size": world_size, "chunks": chunks}
        passed = run(work, **given, ways=words(ways) or WAYS, device=device, json=json, commit=commit)  # type: ignore[arg-type]
        raise typer.Exit(OK if passed else FAILED)


@app.command(epilog=EXIT_CODES)
def report(
    results: Annotated[Path, _Results],
    later: Annotated[Path | None, _Later] = None,
    output: Annotated[Path, typer.Option(help="The page to write.")] = Path("report.html"),
) -> None:
    """Make one static HTML page, with plots and tables, from a file of `collogue bench --json`; of two files, also what changed.

    A file of `collogue bench model --json` or of `collogue bench serving --json` has a page, too; other results have none.
    """
    check_target(output, "--output")
    with exit_codes():
        from collogue.tools.bench import page, regression

        read = [_results(file, alone=later is None) for file in (results, later) if file is not None]
        out = console(None)
        try:
            changes = regression.compare(*read) if later else []
            text = page.page(read[1], read[0], names=(results.name, later.name)) if later else page.page(read[0])
        except (LookupError, TypeError, AttributeError, ValueError) as error:
            names = " or ".join(file.name for file in (results, later) if file is not None)
            problem = f"{names} is damaged inside ({type(error).__name__}: {error}): write it again with `collogue bench --json`"
            raise typer.BadParameter(problem, param_hint="RESULTS") from None
        if later and not changes:
            raise typer.BadParameter(f"{later.name} and {results.name} have no call in common", param_hint="LATER")
        if later:
            out.print(regression.counts(changes), highlight=False)
        output.write_text(text, encoding="utf-8")
        out.print(f"wrote {output}", highlight=False, markup=False, soft_wrap=True)


def _results(file: Path, *, alone: bool) -> dict[str, Any]:
    """What ``file`` holds, if a page can be made of it; anything else is wrong usage."""
    try:
        data = json_module.loads(file.read_text(encoding="utf-8"))
    except ValueError:
        data = None
    if isinstance(data, dict) and "machine" in data:
        cases = data.get("cases")
        from collogue.tools.bench.page import is_model

        whole = data.get("benchmark") == "serving" or is_model(data)
        latencies = data.get("benchmark") != "virtual" and cases is not None and all("section" in case for case in cases)
        if (alone and whole) or latencies:
            return data
    raise typer.BadParameter(
        f"{file.name} is not a result of `collogue bench --json` nor, alone, of `collogue bench model` or `serving`", param_hint="RESULTS"
    )

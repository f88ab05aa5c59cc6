"""The demo's parent process: read the model once, start the ranks, collect their rows.

Progress goes to stderr; the text and the table go to stdout.
"""

from __future__ import annotations

import math
import multiprocessing
import os
import platform
import queue
import sys
import tempfile
import time
import traceback
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import timedelta
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import torch

from collogue.contract.quant import parse
from collogue.errors import ArgumentError, PlatformError
from collogue.testing.processes import start_ranks
from collogue.tools.demo import text
from collogue.tools.demo.formats import FORMATS
from collogue.tools.demo.result import Result
from collogue.tools.demo.weights import ModelShape, Weights, attach, read_model, share
from collogue.tools.demo.worker import Row, Task, work

_TIMEOUT = timedelta(seconds=120)


@dataclass(frozen=True)
class Unsharded:
    """What the transformers model says, on the same tokens."""

    perplexity: float
    generated: list[int]
    logits: torch.Tensor  # [T, V] float32


def run(
    device: str = "cpu",
    world_size: int = 3,
    tokens: int = 1024,
    *,
    formats: tuple[str, ...] = FORMATS,
    new_tokens: int = 32,
    sharded: bool = False,
    json: str | Path | None = None,
    plot: str | Path | None = None,
) -> Result:
    """Run SmolLM2-135M on ``world_size`` ranks; print a text and a table; save the table.

    Args:
        device: ``"cpu"`` (processes, gloo), ``"cuda"`` (a GPU each, NCCL), or ``"auto"``: GPUs where there are enough.
        tokens: how many tokens of the evaluation text are read.
        formats: rows of the table, in order, as :func:`collogue.contract.quant.parse` reads them.
        new_tokens: how many tokens are generated.
        sharded: each rank keeps only the rows of the residual stream that it owns (:mod:`collogue.tools.demo.sequence`).
        json: where to save the table; ``"-"`` is stdout, which then holds nothing else.
        plot: where to save the plot (needs matplotlib).
    """
    from collogue.tools.demo import table

    start = time.perf_counter()
    for name in formats:
        parse(name)
    device = choose_device(device, world_size)
    print(f"SmolLM2-135M on {world_size} ranks in {len(formats)} formats: {_duration(device)}", file=sys.stderr)
    with table.progress(steps=len(formats) + 4) as advance:
        advance("reading SmolLM2-135M")
        model, tokenizer = read_model()
        shape = ModelShape.of(model.config)
        shape.check_world_size(world_size)

        def encode(string: str, limit: int) -> torch.Tensor:
            ids: torch.Tensor = tokenizer(string, return_tensors="pt").input_ids[0, :limit]
            return ids

        task = Task(
            shape=shape,
            formats=formats,
            prompt=encode(text.PROMPT, tokens),
            new_tokens=new_tokens,
            tokens=encode(text.evaluation_text()[: 16 * tokens + 1024], tokens),
            calibration=encode(text.calibration_text(), min(tokens, 512)),
            sharded=sharded,
        )
        advance("running it unsharded")
        unsharded = run_unsharded(model, task)
        result = Result(
            device=device,
            world_size=world_size,
            tokens=len(task.tokens),
            dtype=str(task.dtype).removeprefix("torch."),
            machine=machine(device),
            unsharded_perplexity=unsharded.perplexity,
            prompt=text.PROMPT,
            sharded=sharded,
        )
        advance("starting the ranks")
        generated, in_fp8 = measure(result, task, model.state_dict(), unsharded, advance)
    result.generated, result.generated_in_fp8 = tokenizer.decode(generated), tokenizer.decode(in_fp8)
    result.same_text = generated == unsharded.generated
    result.seconds = time.perf_counter() - start
    table.show(result, quiet=str(json) == "-")
    if json is not None:
        table.save_json(result, json)
    if plot is not None:
        table.save_plot(result, Path(plot))
    return result


def choose_device(device: str, world_size: int) -> str:
    """``"cpu"`` or ``"cuda"``; a GPU for every rank, or an error."""
    if device not in ("auto", "cpu", "cuda"):
        raise ArgumentError(f"unknown device {device!r}", hint="choose one of auto, cpu, cuda")
    gpus = torch.cuda.device_count() if device != "cpu" else 0
    if device == "auto":
        return "cuda" if gpus >= world_size else "cpu"
    if device == "cuda" and gpus < world_size:
        raise PlatformError(f"{world_size} ranks need {world_size} GPUs; this machine has {gpus}", hint="use --device cpu")
    return device


@torch.inference_mode()
def run_unsharded(model: Any, task: Task) -> Unsharded:
    """Perplexity, logits and generated text of the transformers model itself, in float32 on the CPU."""
    logits = model(task.tokens[None]).logits[0].float()
    losses = torch.log_softmax(logits[:-1].double(), dim=-1).gather(1, task.tokens[1:, None])
    prompt = task.prompt[None]
    output = model.generate(
        prompt, attention_mask=torch.ones_like(prompt), do_sample=False, max_new_tokens=task.new_tokens, min_new_tokens=task.new_tokens
    )
    return Unsharded(math.exp(-float(losses.mean())), output[0, prompt.shape[1] :].tolist(), logits)


def measure(result: Result, task: Task, weights: Weights, unsharded: Unsharded, advance: Any) -> tuple[list[int], list[int]]:
    """Start the ranks, fill ``result`` with what they report, and return the tokens they generated: unquantized, and in FP8.

    Where ranks end early, every missing row gets the error that ended them.
    """
    context = multiprocessing.get_context("spawn")
    reports = context.Queue()
    generated: list[int] = []
    in_fp8: list[int] = []
    with tempfile.TemporaryDirectory(prefix="collogue-demo-") as name:
        folder = Path(name)
        share({**weights, "unsharded_logits": unsharded.logits}, folder)
        ranks = [
            context.Process(target=_rank, args=(rank, result.world_size, result.device, name, task, reports), daemon=True)
            for rank in range(result.world_size)
        ]
        try:
            start_ranks(ranks)
            for kind, value in _listen(ranks, reports):
                if kind == "row":
                    result.rows.append(value)
                    following = task.formats[len(result.rows) : len(result.rows) + 1]
                    advance(f"measuring {following[0]}" if following else "generating in FP8")
                elif kind == "FP8 text":
                    in_fp8 = value
                    advance("ending the ranks")
                elif kind == "text":
                    generated = value
                    advance(f"measuring {task.formats[0]}" if task.formats else "generating in FP8")
                elif kind == "logits":
                    result.logits_difference = value
                elif kind == "error" and result.error is None:
                    result.error = value
        finally:
            for process in ranks:
                if process.pid is not None:
                    process.terminate()
                    process.join()
    result.rows += [Row(name, error=result.error or "the ranks ended early") for name in task.formats[len(result.rows) :]]
    return generated, in_fp8


def _listen(ranks: Sequence[BaseProcess], reports: Any) -> Any:
    """What the ranks report, until all have ended well or the first has not."""
    while True:
        # Looked at before the queue: what a rank reported before it ended is then still read.
        codes = [process.exitcode for process in ranks]
        try:
            while True:
                yield reports.get(timeout=0.2)
        except queue.Empty:
            failed = [rank for rank, code in enumerate(codes) if code not in (None, 0)]
            if failed:
                yield "error", f"rank {failed[0]} ended with exit code {codes[failed[0]]}"
            if failed or all(code == 0 for code in codes):
                return


def _rank(rank: int, world_size: int, device: str, folder: str, task: Task, reports: Any) -> None:
    """Body of a rank's process."""
    import torch.distributed as dist

    torch.set_num_threads(max(1, _cores() // world_size))
    if sys.platform == "linux":
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")  # All ranks are on this machine; its host name may not resolve.
    from collogue.group import as_group

    try:
        if device == "cuda":
            torch.cuda.set_device(rank)
        backend = "nccl" if device == "cuda" else "gloo"
        dist.init_process_group(
            backend, init_method=(Path(folder) / "rendezvous").as_uri(), rank=rank, world_size=world_size, timeout=_TIMEOUT
        )
        weights = attach(Path(folder))
        logits = weights.pop("unsharded_logits")
        work(as_group(dist.group.WORLD), task, weights, logits, lambda kind, value: reports.put((kind, value)))
        dist.destroy_process_group()
    except Exception as error:
        traceback.print_exc()
        reports.put(("error", f"rank {rank}: {type(error).__name__}: {str(error).splitlines()[0]}"))
        reports.close()
        reports.join_thread()
        raise SystemExit(1) from error


def _duration(device: str) -> str:
    """What to expect, before it starts."""
    return "about a minute" if device == "cuda" else "two to three minutes on two cores"


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def machine(device: str) -> dict[str, str]:
    """What the figures were measured with."""
    from collogue import __version__

    name = platform.processor() or platform.machine()
    with suppress(OSError):
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        name = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), name)
    found = {"python": platform.python_version(), "torch": torch.__version__, "collogue": __version__, "cpu": name, "cores": str(_cores())}
    if device == "cuda":
        found["gpu"] = torch.cuda.get_device_name(0)
    return found

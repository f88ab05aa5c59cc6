"""``collogue bench serving``: prompts served by a small continuous-batching loop, with several epilogues taking turns.

The layers are those of ``collogue bench model``, without embedding of a vocabulary, output head and sampling. The headline is the ratio
of output tokens per second to NCCL + torch.compile, of the same layers in the same run; no time is scaled to more layers than were run.
"""

from __future__ import annotations

import json as json_module
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from collogue.errors import ArgumentError, PlatformError
from collogue.testing import environment
from collogue.testing.processes import run_processes
from collogue.tools.bench import tables
from collogue.tools.bench.schedule import Workload
from collogue.tools.bench.serving_rank import serving_rank
from collogue.tools.bench.stack import SHAPES
from collogue.tools.bench.variants import BASELINES, COLLOGUE
from collogue.tools.record import circumstances

NCCL = "nccl"
WAYS = ("collogue eager", "collogue sharded", NCCL)
SILENCE = 180.0
METHOD = (
    "Each way serves every chunk of the prompts from start to end, the ways one after the other, chunk by chunk. Loop: a prefill of "
    "waiting prompts where rows are free (whole prompts, up to prefill_tokens; not in a graph), then a decode step of all running "
    "sequences (a CUDA graph of the next larger size), and so on; the host waits for every step. A sequence leaves with its last token, "
    "and the next prompt is sent then. ms_to_first_token: from sending to the end of the prefill; ms_per_token: from the first token to "
    "the last, over new_tokens - 1; means over prompts. Seconds are of the slowest rank. Layers only: no vocabulary, no output head, no "
    "sampling; tokens are random. With an attention core, decode reads whole cache rows, masked to what each sequence has. Before "
    "timing, a prefill and a decode step of every way equal NCCL's within the tolerance of bench model."
)

Row = dict[str, Any]


def run(
    work: Workload,
    *,
    model: str = "deepseek-v3-dense",
    layers: int | None = None,
    world_size: int | None = None,
    ways: Sequence[str] = WAYS,
    chunks: int | None = None,
    device: str = "cuda",
    json: str | None = None,
    commit: str | None = None,
) -> bool:
    """Serve, write the JSON, print the table; whether everything of Collogue's has a number.

    Args:
        model: of :data:`collogue.tools.bench.stack.SHAPES`. layers: held and run; default the model's, as far as memory allows.
        world_size: default: 8, 4 or 2, as far as there are GPUs. ways: of COLLOGUE and BASELINES; NCCL is always one of them.
        chunks: parts of the prompts, between which the ways take turns; default: up to 4, each enough for all rows.
        device: ``"cpu"`` runs the same code without graphs; its times mean nothing.
        json: a file, or ``"-"`` for stdout (the table then goes to stderr).
    Raises:
        ArgumentError: an unknown model or way, or fewer prompts than chunks. PlatformError: fewer GPUs than ranks.
    """
    chosen, parts = list(dict.fromkeys((*ways, NCCL))), chunks or max(1, min(4, work.prompts // work.concurrency))
    _check(work, model, chosen, parts)
    world = _world(world_size, device)
    found = run_processes(world, serving_rank, model, layers, work.chunks(parts), chosen, device=device, silence=SILENCE, heard=_heard)[0]
    data = {
        "benchmark": "serving",
        "passed": not any(row["error"] for row in found["rows"] if row["way"] in COLLOGUE),
        **circumstances(commit),
        "method": METHOD,
        "model": model,
        "world_size": world,
        "layers": found["layers"],
        "model_layers": SHAPES[model].layers,
        "attention_core": SHAPES[model].low_rank is None,
        "workload": asdict(work),
        "chunks": parts,
        "totals": totals(found["rows"]),
        "rows": found["rows"],
    }
    text = json_module.dumps(data, indent=1, allow_nan=False) + "\n"
    if json == "-":
        sys.stdout.write(text)
    elif json is not None:
        Path(json).write_text(text)
    print(table(data), file=sys.stderr if json == "-" else sys.stdout)
    return bool(data["passed"])


def _check(work: Workload, model: str, ways: Sequence[str], parts: int) -> None:
    for word, known in ((model, SHAPES), *((way, (*COLLOGUE, *BASELINES)) for way in ways)):
        if word not in known:
            raise ArgumentError(f"there is no {word!r} here", hint=f"choose from {', '.join(known)}")
    if parts > work.prompts:
        raise ArgumentError(f"{work.prompts} prompts in {parts} chunks", hint="every chunk needs a prompt")


def _world(asked: int | None, device: str) -> int:
    if device == "cuda":
        environment.set_defaults()
    gpus = torch.cuda.device_count() if device == "cuda" else 8
    world = asked or next((n for n in (8, 4, 2) if n <= gpus), 2)
    if world > gpus:
        raise PlatformError(f"{gpus} GPUs found; {max(2, world)} required, one for each rank", hint="use a machine with more GPUs")
    return world


def _heard(rank: int, stage: str) -> None:
    if rank == 0:
        print(stage, file=sys.stderr, flush=True)


def totals(rows: Sequence[Row]) -> list[Row]:
    """One row for each way, over its chunks; ``speedup_nccl`` with the least and the largest of a chunk beside it."""
    seconds = {(row["way"], row["chunk"]): row["seconds"] for row in rows}
    found = []
    for way in dict.fromkeys(row["way"] for row in rows):
        mine = [row for row in rows if row["way"] == way]
        total: Row = {"way": way, "error": next((row["error"] for row in mine if row["error"]), None)}
        if total["error"] is None:
            prompts = sum(row["prompts"] for row in mine)
            total |= {name: sum(row[name] for row in mine) for name in ("prompts", "output_tokens", "seconds", "prefill_seconds")}
            total["tokens_per_second"] = total["output_tokens"] / total["seconds"]
            for name in ("ms_per_token", "ms_to_first_token"):
                total[name] = None if mine[0][name] is None else sum(row[name] * row["prompts"] for row in mine) / prompts
            nccl = [there for row in mine if (there := seconds.get((NCCL, row["chunk"]))) is not None]
            if len(nccl) == len(mine):
                ratios = sorted(theirs / row["seconds"] for theirs, row in zip(nccl, mine, strict=True))
                total |= {"speedup_nccl": sum(nccl) / total["seconds"], "speedup_low": ratios[0], "speedup_high": ratios[-1]}
        found.append(total)
    return found


def table(data: Row) -> str:
    """One line for each way, under a heading that says what was run."""
    work, core = data["workload"], "" if data["attention_core"] else " (projections only: no attention core, no cache)"
    heading = (
        f"{data['model']}, {data['layers']} of {data['model_layers']} layers{core}, world {data['world_size']}: "
        f"{work['prompts']} prompts of {work['prompt_tokens']} tokens, "
        f"{work['new_tokens']} new tokens each, at most {work['concurrency']} at once"
    )
    return "\n".join([heading, "", *tables.lines(tables.serving(data))])

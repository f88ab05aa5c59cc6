"""One rank of ``collogue bench serving``: engines for all ways over one stack, gated, then serving chunk by chunk in turn."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist

from collogue.communicator import Communicator
from collogue.errors import PlatformError
from collogue.tools.bench.engine import Engine, Stack, layer_bytes
from collogue.tools.bench.fused import synchronize
from collogue.tools.bench.model import TOLERANCE
from collogue.tools.bench.schedule import Step, Workload, decode_rows, prefill_counts, schedule
from collogue.tools.bench.stack import SHAPES, Shape, rank_shape
from collogue.tools.bench.timing import everywhere

#: Share of the free memory that layers may take; the rest is for activations, workspace and graphs.
SHARE = 0.8
#: Seconds between words of a rank that is serving.
_WORDS = 20.0

Row = dict[str, Any]


def serving_rank(
    group: dist.ProcessGroup, tell: Callable[[str], None], model: str, layers: int | None, works: Sequence[Workload], ways: Sequence[str]
) -> Row:
    """Layers that were run and the rows of every chunk and way; the same on every rank."""
    import torch._dynamo

    # Every size of a step may be a compilation of its own; beyond the limit dynamo would run it uncompiled.
    torch._dynamo.config.recompile_limit = 256
    torch._dynamo.config.fail_on_recompile_limit_hit = True
    work, whole = works[0], SHAPES[model]
    shape = rank_shape(whole, dist.get_world_size(group))
    most = max(work.admitted * work.prompt_tokens, work.concurrency)
    with torch.no_grad(), Communicator(group, max_tokens=most, hidden_size=whole.hidden_size, timeout=60.0) as comm:
        held = _layers(group, shape, whole.layers, layers, work, comm.device)
        tell(f"{model}: {held} of {whole.layers} layers, {held * layer_bytes(shape, work) / 2**30:.1f} GiB on each rank")
        stack = Stack(shape, held, work, comm.device, comm.rank)
        engines, errors = _engines(group, tell, stack, comm, list(works), ways)
        if engines:
            tell(_estimate(group, stack, engines, list(works)))
        gc.collect()
        gc.disable()
        rows = []
        for chunk, part in enumerate(works):
            for way in ways:
                row: Row = {"way": way, "chunk": chunk, "prompts": part.prompts, "error": errors.get(way), "seconds": None}
                if way in engines:
                    row |= _slowest(everywhere(group, serve(engines[way], part, group, stack.device, tell)))
                    tell(f"chunk {chunk + 1} of {len(works)}, {way}: {row['tokens_per_second']:.0f} tokens/s, {row['seconds']:.1f} s")
                rows.append(row)
    return {"layers": held, "rows": rows}


def _layers(group: dist.ProcessGroup, shape: Shape, whole: int, asked: int | None, work: Workload, device: torch.device) -> int:
    """``asked``, or as many as the model has and memory of every rank allows. Raises :class:`PlatformError` where they do not fit."""
    free = torch.cuda.mem_get_info()[0] if device.type == "cuda" else 2**62
    fit = min(everywhere(group, int(SHARE * free / layer_bytes(shape, work))))
    if fit < (asked or 1):
        gibibytes = layer_bytes(shape, work) / 2**30
        raise PlatformError(f"{asked or 1} layers of {gibibytes:.2f} GiB do not fit", hint=f"{fit} would: --layers {fit}, or more ranks")
    return asked or min(whole, fit)


def _engines(
    group: dist.ProcessGroup, tell: Callable[[str], None], stack: Stack, comm: Communicator, works: list[Workload], ways: Sequence[str]
) -> tuple[dict[str, Engine], dict[str, str]]:
    """By way: engines whose outputs are NCCL's, and what is wrong with the others."""
    engines: dict[str, Engine] = {}
    errors: dict[str, str] = {}
    expected: list[torch.Tensor] = []
    for way in ("nccl", *(w for w in ways if w != "nccl")):
        tell(f"preparing {way}")
        error = None
        try:
            engine = Engine(way, stack, comm, group)
            engine.prepare(decode_rows(works))
            for count in prefill_counts(works):
                engine.run(Step(True, tuple(range(count))))
            found = [engine.run(step).float().clone() for step in _trial(works)]
            expected = found if way == "nccl" else expected
            error = None if expected else "there is no output of NCCL's to compare with"
            for a, b in zip(found, expected, strict=False):
                difference = float((a - b).norm() / b.norm())
                if not difference < TOLERANCE:
                    error = f"relative difference {difference:.3g} to NCCL's output"
        except Exception as failure:  # an error is a result; the other ways are still timed
            error = f"{type(failure).__name__}: {failure}".splitlines()[0][:300]
        error = next((text for text in everywhere(group, error) if text), None)
        if error is None:
            engines[way] = engine
        else:
            errors[way] = error
            tell(f"{way}: {error}")
    return engines, errors


def _trial(works: list[Workload]) -> list[Step]:
    """The largest prefill and, if there are any, the largest decode step behind it."""
    count, sizes = prefill_counts(works)[0], decode_rows(works)
    steps = [Step(True, tuple(range(count)))]
    if sizes:
        positions = tuple(works[0].prompt_tokens if row < count else 0 for row in range(sizes[0]))
        steps.append(Step(False, tuple(range(sizes[0])), positions))
    return steps


def _estimate(group: dist.ProcessGroup, stack: Stack, engines: dict[str, Engine], works: list[Workload]) -> str:
    """How long serving will take, from a few steps of the largest sizes."""
    kinds = [step.prefill for work in works for step in schedule(work)]
    seconds = 0.0
    for engine in engines.values():
        for step in _trial(works):
            taken = []
            for _ in range(3):
                synchronize(stack.device)
                dist.barrier(group)
                start = time.perf_counter()
                engine.run(step)
                synchronize(stack.device)
                taken.append(time.perf_counter() - start)
            seconds += sorted(taken)[1] * kinds.count(step.prefill)
    return f"estimate: {seconds:.0f} s for {len(kinds)} steps of each of {len(engines)} ways"


def serve(engine: Engine, work: Workload, group: dist.ProcessGroup, device: torch.device, tell: Callable[[str], None]) -> Row:
    """All prompts of ``work`` from start to end, on this rank. Collective."""
    made = [0] * work.prompts
    sent, first, last = [0.0] * min(work.prompts, work.concurrency), [0.0] * work.prompts, [0.0] * work.prompts
    counts, prefilling, now, told = {True: 0, False: 0}, 0.0, 0.0, 0.0
    synchronize(device)
    dist.barrier(group)
    start = time.perf_counter()
    for step in schedule(work):
        engine.run(step)
        synchronize(device)
        before, now = now, time.perf_counter() - start
        counts[step.prefill] += 1
        prefilling += now - before if step.prefill else 0.0
        for sequence in step.sequences:
            made[sequence] += 1
            last[sequence] = now
            if step.prefill:
                first[sequence] = now
            if made[sequence] == work.new_tokens and len(sent) < work.prompts:
                sent.append(now)
        if now - told > _WORDS:
            told = now
            tell(f"{sum(made)} of {work.prompts * work.new_tokens} tokens")
    waits = sum(a - b for a, b in zip(first, sent, strict=True)) / work.prompts
    pace = sum(a - b for a, b in zip(last, first, strict=True)) / work.prompts
    return {
        "prefill_steps": counts[True],
        "decode_steps": counts[False],
        "output_tokens": sum(made),
        "seconds": now,
        "prefill_seconds": prefilling,
        "tokens_per_second": sum(made) / now,
        "ms_per_token": pace / (work.new_tokens - 1) * 1e3 if work.new_tokens > 1 else None,
        "ms_to_first_token": waits * 1e3,
    }


def _slowest(ranks: list[Row]) -> Row:
    """What the rank that took longest says; ranks whose steps differ would be no measurement."""
    steps = {(row["prefill_steps"], row["decode_steps"], row["output_tokens"]) for row in ranks}
    if len(steps) != 1:
        raise RuntimeError(f"ranks took different steps: {sorted(steps)}")
    return max(ranks, key=lambda row: float(row["seconds"]))

"""One process per rank, with a watchdog: ranks that fall silent or take too long are ended, and every rank's last stage is reported."""

from __future__ import annotations

import os
import queue
import signal
import tempfile
import time
import traceback
from collections.abc import Callable, Collection, Sequence
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from collogue.errors import CollogueError
from collogue.testing import environment

Tell = Callable[[str], None]


class RanksFailed(CollogueError):
    """A rank raised, died, or fell silent; the others were ended."""


def run_processes(
    world_size: int,
    fn: Callable[..., Any],
    *args: Any,
    device: str = "cpu",
    silence: float = 120.0,
    limit: float = 3600.0,
    mortal: Collection[int] = (),
    heard: Callable[[int, str], None] = lambda rank, stage: None,
) -> list[Any]:
    """Call ``fn(group, tell, *args)`` in one process per rank and return the results by rank.

    Args:
        fn: importable (it is pickled). ``group`` is the world's process group; ``tell("text")`` names the stage the rank is in.
        device: ``"cpu"`` (gloo) or ``"cuda"``: NCCL, rank r on GPU r. Where there are more ranks than GPUs, GPUs are given out in turn
            and the group is gloo's, as NCCL rejects two ranks of one GPU.
        silence: seconds without a word from any rank, after which all are ended.
        limit: seconds for everything, after which all are ended.
        mortal: ranks that may die; the result of one that does is ``None``. The others then do not meet at the end.
        heard: called here with each stage that a rank tells.
    Raises:
        RanksFailed: with every rank's last stage.
    """
    context = mp.get_context("spawn")
    inbox: Any = context.Queue()
    results: dict[int, Any] = {}
    stages = dict.fromkeys(range(world_size), "starting")
    with tempfile.TemporaryDirectory(prefix="collogue-ranks-") as folder:
        rendezvous = (Path(folder) / "rendezvous").as_uri()
        ranks = [
            context.Process(
                target=_rank,
                args=(rank, world_size, device, rendezvous, inbox, not mortal, fn, args),
                name=f"rank{rank}",
                daemon=True,
            )
            for rank in range(world_size)
        ]
        try:
            start_ranks(ranks)
            _listen(ranks, inbox, results, stages, silence, limit, mortal, heard)
            _end(ranks, patience=5.0)
        finally:
            _end(ranks, patience=0.0)
    return [results[rank] for rank in range(world_size)]


def start_ranks(processes: Sequence[BaseProcess]) -> None:
    """Start them without Ctrl-C: a terminal sends it to every process, and the one that started them ends them."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        for process in processes:
            process.start()
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _listen(
    ranks: list[Any],
    inbox: Any,
    results: dict[int, Any],
    stages: dict[int, str],
    silence: float,
    limit: float,
    mortal: Collection[int],
    heard: Callable[[int, str], None],
) -> None:
    started = last_word = time.monotonic()
    gone: set[int] = set()
    while len(results) < len(ranks):
        if time.monotonic() - started > limit:
            raise _failure(f"not finished after {limit:g} s", stages)
        try:
            rank, kind, value = inbox.get(timeout=0.5)
        except queue.Empty:
            # A process that ended without a result gets one more round for words still in the pipe.
            dead = {r for r, p in enumerate(ranks) if not p.is_alive() and r not in results}
            for r in dead & gone & set(mortal):
                results[r], stages[r] = None, f"died with exit code {ranks[r].exitcode}"
            if dead & gone - set(mortal):
                codes = ", ".join(f"rank {r} ended with exit code {ranks[r].exitcode}" for r in sorted(dead))
                raise _failure(codes, stages) from None
            gone = dead
            if time.monotonic() - last_word > silence:
                raise _failure(f"no rank has said a word for {silence:g} s", stages) from None
            continue
        last_word = time.monotonic()
        if kind == "result":
            results[rank], stages[rank] = value, "finished"
        elif kind == "stage":
            stages[rank] = value
            heard(rank, value)
        else:
            raise _failure(f"rank {rank} raised\n{value}", stages)


def _failure(what: str, stages: dict[int, str]) -> RanksFailed:
    told = "; ".join(f"rank {rank}: {stage}" for rank, stage in stages.items())
    return RanksFailed(f"{what}\nlast stages: {told}", hint="all ranks were ended; the first rank's failure above is the cause")


def _end(ranks: list[Any], patience: float) -> None:
    """Give the processes ``patience`` seconds to leave by themselves; kill what is left."""
    deadline = time.monotonic() + patience
    started = [process for process in ranks if process.pid is not None]
    for process in started:
        process.join(timeout=max(0.0, deadline - time.monotonic()))
    for process in started:
        if process.is_alive():
            process.kill()
            process.join(timeout=10)


def _rank(
    rank: int,
    world_size: int,
    device: str,
    rendezvous: str,
    inbox: Any,
    all_meet: bool,
    fn: Callable[..., Any],
    args: tuple[Any, ...],
) -> None:
    try:
        where: dict[str, Any] = {}
        backend = "gloo"
        if device == "cuda":
            environment.set_defaults()
            gpu = torch.device("cuda", rank % torch.cuda.device_count())
            torch.cuda.set_device(gpu)
            if world_size <= torch.cuda.device_count():
                backend, where = "nccl", {"device_id": gpu}
        else:
            torch.set_num_threads(1)
        inbox.put((rank, "stage", "joining the group"))
        dist.init_process_group(backend, init_method=rendezvous, rank=rank, world_size=world_size, **where)
        # Whoever is early, at the start or at the end, must not tear down connections that others still make or use.
        dist.barrier()
        result = fn(dist.group.WORLD, lambda stage: inbox.put((rank, "stage", stage)), *args)
        inbox.put((rank, "result", result))
        if not all_meet:  # a group that has lost a rank can neither meet nor be taken down
            inbox.close()
            inbox.join_thread()
            os._exit(0)
        dist.barrier()
        dist.destroy_process_group()
    except BaseException:  # told to the parent, which raises it
        inbox.put((rank, "error", traceback.format_exc()))

"""``generate`` of a parallel model: rank 0's choices count for all."""

from __future__ import annotations

import hashlib
import threading
from typing import Any

import torch
from torch import Tensor

from collogue.communicator import Communicator
from collogue.errors import ArgumentError, CollectiveError

_running = threading.local()
#: What transformers' ``generate`` takes by place; more follow.
_POSITIONAL = ("inputs", "generation_config", "logits_processor", "stopping_criteria")


def generate(model: Any, comm: Communicator, *args: Any, **kwargs: Any) -> Any:
    """``generate`` of the model's class, with the random numbers of rank 0 on every rank.

    The other ranks' generators are afterwards where they were before: after the outermost call, where a model is another's assistant.
    Collective.

    Raises:
        ArgumentError: ranks have different tensors among the arguments, or a limit of time is given. CollectiveError: ranks chose
        different tokens, which takes a source of random numbers other than PyTorch's default generators.
    """
    if getattr(_running, "now", False):
        return type(model).generate(model, *args, **kwargs)
    _check_clock(model, {**dict(zip(_POSITIONAL, args, strict=False)), **kwargs})
    state = _random_state(comm.device) if comm.rank == 0 else None
    every = comm._group.all_gather_object((state, _digest(*args, *kwargs.values())))
    _compare(every, ArgumentError, "ranks 0 and {} call generate with different tensors", "pass the same tokens on every rank")
    devices = [comm.device.index] if comm.device.type == "cuda" else []
    with torch.random.fork_rng(devices, enabled=comm.rank != 0):
        if comm.rank != 0:
            _set_random_state(comm.device, every[0][0])
        _running.now = True
        try:
            chosen = type(model).generate(model, *args, **kwargs)
        finally:
            _running.now = False
    tokens = getattr(chosen, "sequences", chosen)
    every = comm._group.all_gather_object((None, _digest(tokens)))
    hint = "use PyTorch's default generators for everything that samples, and one process for each rank"
    _compare(every, CollectiveError, "ranks 0 and {} chose different tokens", hint)
    return chosen


def _check_clock(model: Any, given: dict[str, Any]) -> None:
    """Raise :class:`ArgumentError` for what would end the text of each rank by its own clock."""
    config = given.get("generation_config") or getattr(model, "generation_config", None)
    limit = given["max_time"] if "max_time" in given else getattr(config, "max_time", None)
    timed = [type(each).__name__ for each in given.get("stopping_criteria") or () if hasattr(each, "max_time")]
    if limit is not None or timed:
        raise ArgumentError(
            f"generate of a parallel model with {timed[0] if timed else f'max_time={limit}'}: each rank would stop by its own clock",
            hint="use max_new_tokens=, or stop where all ranks agree to",
        )


def _compare(every: list[Any], error: type[ArgumentError | CollectiveError], message: str, hint: str) -> None:
    for rank, (_, digest) in enumerate(every):
        if digest != every[0][1]:
            raise error(message.format(rank), hint=hint)


def _random_state(device: torch.device) -> tuple[Tensor, Tensor | None]:
    return torch.get_rng_state(), torch.cuda.get_rng_state(device) if device.type == "cuda" else None


def _set_random_state(device: torch.device, state: tuple[Tensor, Tensor | None]) -> None:
    torch.set_rng_state(state[0])
    if state[1] is not None:
        torch.cuda.set_rng_state(state[1], device)


def _digest(*values: Any) -> str:
    """Of the tensors among ``values``."""
    digest = hashlib.sha256()
    for value in values:
        if isinstance(value, Tensor):
            digest.update(f"{value.dtype}{tuple(value.shape)}".encode())
            digest.update(bytes(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).tolist()))
    return digest.hexdigest()

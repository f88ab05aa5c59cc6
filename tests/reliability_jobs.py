"""Jobs for `cpu/test_reliability.py`, importable by the processes that do them."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from typing import Any

import torch.distributed as dist


def runner(name: str, group: Any, state: dict[str, Any], tell: Callable[[str], None], options: Any) -> Any:
    """A job by name. Counts the jobs that this process has done."""
    rank = dist.get_rank(group)
    state["done"] = state.get("done", 0) + 1
    if rank == 1 and name == "hangs":
        time.sleep(60)
    if rank == 1 and name in ("dies", "is killed"):
        time.sleep(0.3)
        os.kill(os.getpid(), signal.SIGKILL)
    if name != "is killed":
        dist.barrier(group)
    return [options, rank, state["done"]]

"""A vLLM engine in each of several forks, one a rank: vLLM is imported once, and what a rank does can be counted. For run_vllm.py."""

from __future__ import annotations

import json
import os
import socket
import sys
import tempfile
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

#: Of the processes and the caches: small, quiet, and nothing outside.
ENVIRONMENT = {
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "OMP_NUM_THREADS": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_LOGGING_STREAM": "ext://sys.stderr",
    "HF_HUB_OFFLINE": "1",
    "VLLM_DISABLE_COMPILE_CACHE": "1",
    "TORCHINDUCTOR_COMPILE_THREADS": "1",
}


def quiet() -> None:
    """Set :data:`ENVIRONMENT` for this process and those that it starts, and vLLM's warnings unless more is asked for."""
    os.environ.update(ENVIRONMENT)
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")


def engine(model: Path, world: int, dtype: str, **options: Any) -> Any:
    """An ``LLM`` of this rank, in this process."""
    import torch
    from vllm import LLM

    torch.set_num_threads(1)
    return LLM(str(model), tensor_parallel_size=world, distributed_executor_backend="external_launcher", dtype=dtype, seed=0, **options)


def model_runner(llm: Any) -> Any:
    """What holds the model and runs it."""
    return llm.llm_engine.model_executor.driver_worker.worker.model_runner


def calls() -> Any:
    """The plugin's counts of its calls in this process; an empty dictionary where it is not loaded."""
    fused = sys.modules.get("collogue.engines.vllm.fused")
    return {} if fused is None else fused.counts


def run_ranks(world: int, switch: str, job: Callable[[int], dict[str, Any]]) -> list[dict[str, Any]]:
    """What ``job(rank)`` returns in a fork for each rank, with ``COLLOGUE_VLLM=switch``. Raises :class:`SystemExit` where one failed."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        own = {"WORLD_SIZE": world, "LOCAL_WORLD_SIZE": world, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free.getsockname()[1]}
    own |= {"COLLOGUE_VLLM": switch, "VLLM_ENABLE_V1_MULTIPROCESSING": 0}
    with tempfile.TemporaryDirectory() as folder:
        _forget_shared_memory()
        children = []
        for rank in range(world):
            child = os.fork()
            if child == 0:
                code = 1
                try:
                    os.environ.update({key: str(value) for key, value in (own | {"RANK": rank, "LOCAL_RANK": rank}).items()})
                    Path(folder, f"{rank}.json").write_text(json.dumps(job(rank)))
                    code = 0
                except BaseException:
                    traceback.print_exc()
                sys.stdout.flush()
                sys.stderr.flush()
                os._exit(code)
            children.append(child)
        failed = False
        while children:
            child, status = os.wait()
            children.remove(child)
            if status and not failed:
                failed = True
                for other in children:
                    os.kill(other, 15)
        _forget_shared_memory()
        if failed:
            raise SystemExit(f"a rank failed with COLLOGUE_VLLM={switch!r}")
        return [json.loads(Path(folder, f"{rank}.json").read_text()) for rank in range(world)]


def _forget_shared_memory() -> None:
    """Remove what ranks of an earlier run, which end without ceremony, have left: vLLM names it by nothing but the group and the rank."""
    for file in Path("/dev/shm").glob("-tp:0-*-cpushm_*"):
        file.unlink()

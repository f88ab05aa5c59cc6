"""Run a real vLLM on CPU ranks, stock and with Collogue, and compare: tokens, log-probabilities, ranks, and the number of fused calls.

`python scripts/run_vllm.py MODEL --world 2 --switch eager --fused-a-forward 61`, in the environment of scripts/setup_engines.sh

vLLM is imported once; each rank is a fork that runs the engine in its own process (vLLM's external launcher), so that its calls can be
counted. The plugin comes in by vLLM's own loader. Ends with 1 where something differs, and says what.
"""

from __future__ import annotations

import argparse
import json
import os
import socket
import sys
import tempfile
import time
import traceback
from pathlib import Path
from typing import Any

#: Of the processes and the caches: small, quiet, and nothing outside.
ENVIRONMENT = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "OMP_NUM_THREADS": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_LOGGING_STREAM": "ext://sys.stderr",
    "HF_HUB_OFFLINE": "1",
    "MASTER_ADDR": "127.0.0.1",
    "VLLM_DISABLE_COMPILE_CACHE": "1",
    "TORCHINDUCTOR_COMPILE_THREADS": "1",
}
#: What vLLM compiles with on a GPU, as far as it concerns the pass.
COMPILED: dict[str, Any] = {"mode": 3, "pass_config": {"fuse_norm_quant": False, "fuse_act_quant": False}}
PROMPTS = ("The capital of France is", "Water is made of", "Once upon a time there was")


def rank_run(rank: int, port: int, asked: argparse.Namespace, switch: str) -> dict[str, Any]:
    """One rank: an engine, the prompts, and what was counted."""
    own = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": asked.world, "LOCAL_WORLD_SIZE": asked.world, "MASTER_PORT": port}
    os.environ.update({key: str(value) for key, value in own.items()})
    os.environ["COLLOGUE_VLLM"] = switch
    import torch
    from vllm import LLM, SamplingParams

    torch.set_num_threads(1)
    forwards = 0
    llm = LLM(
        str(asked.model),
        tensor_parallel_size=asked.world,
        distributed_executor_backend="external_launcher",
        dtype=asked.dtype,
        max_model_len=64,
        max_num_seqs=4,
        max_num_batched_tokens=64,
        enforce_eager=not asked.compiled,
        seed=0,
        **({"compilation_config": COMPILED} if asked.compiled else {}),
    )
    counts: Any = {}
    if "collogue.engines.vllm.fused" in sys.modules:
        counts = sys.modules["collogue.engines.vllm.fused"].counts
        counts.clear()
    runner = llm.llm_engine.model_executor.driver_worker.worker.model_runner
    whole = runner.model.forward

    def forward(*args: Any, **kwargs: Any) -> Any:
        nonlocal forwards
        forwards += 1
        return whole(*args, **kwargs)

    runner.model.forward = forward
    began = time.perf_counter()
    done = llm.generate(list(PROMPTS), SamplingParams(temperature=0, max_tokens=asked.tokens, logprobs=1), use_tqdm=False)
    outputs = [each.outputs[0] for each in done]
    return {
        "tokens": [list(output.token_ids) for output in outputs],
        "text": [output.text for output in outputs],
        "logprobs": [[next(iter(step.values())).logprob for step in output.logprobs] for output in outputs],
        "counts": dict(counts),
        "forwards": forwards,
        "seconds": round(time.perf_counter() - began, 2),
    }


def forget_shared_memory() -> None:
    """Remove what ranks of an earlier run, which end without ceremony, have left: vLLM names it by nothing but the group and the rank."""
    for file in Path("/dev/shm").glob("-tp:0-*-cpushm_*"):
        file.unlink()


def group_run(asked: argparse.Namespace, switch: str) -> list[dict[str, Any]]:
    """All ranks, as forks of this process; what each returned. Raises where one failed."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with tempfile.TemporaryDirectory() as folder:
        forget_shared_memory()
        children = []
        for rank in range(asked.world):
            child = os.fork()
            if child == 0:
                code = 1
                try:
                    Path(folder, f"{rank}.json").write_text(json.dumps(rank_run(rank, port, asked, switch)))
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
        forget_shared_memory()
        if failed:
            raise SystemExit(f"a rank failed with COLLOGUE_VLLM={switch!r}")
        return [json.loads(Path(folder, f"{rank}.json").read_text()) for rank in range(asked.world)]


def differences(stock: list[dict[str, Any]], ours: list[dict[str, Any]], a_forward: int) -> list[str]:
    """What is not as it must be."""
    wrong = []
    for name, ranks in (("stock", stock), ("Collogue", ours)):
        wrong += [f"{name}: rank {i} has other tokens than rank 0" for i, rank in enumerate(ranks) if rank["tokens"] != ranks[0]["tokens"]]
    wrong += [f"rank {i} has other log-probabilities than rank 0" for i, rank in enumerate(ours) if rank["logprobs"] != ours[0]["logprobs"]]
    if stock[0]["tokens"] != ours[0]["tokens"]:
        wrong.append(f"tokens differ: stock {stock[0]['text']}, Collogue {ours[0]['text']}")
    for i, rank in enumerate(ours):
        fused, wanted = rank["counts"].get("fused", 0), a_forward * rank["forwards"]
        if fused != wanted or not rank["forwards"]:
            wrong.append(f"rank {i}: {fused} fused calls in {rank['forwards']} forwards, expected {wanted}; counts {rank['counts']}")
    if any(rank["counts"] for rank in stock):
        wrong.append("stock vLLM made calls of Collogue")
    return wrong


def main() -> int:
    """Both runs."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--world", type=int, default=2)
    parser.add_argument("--switch", default="eager", help="value of COLLOGUE_VLLM")
    parser.add_argument("--tokens", type=int, default=8)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--fused-a-forward", type=int, required=True, help="fused calls that a forward pass must make")
    parser.add_argument("--compiled", action="store_true", help="compile as on a GPU, on a test platform")
    parser.add_argument("--commit", default="", help="goes into the result")
    parser.add_argument("--json", type=Path)
    asked = parser.parse_args()
    began = time.perf_counter()
    os.environ.update(ENVIRONMENT)
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
    if asked.compiled:
        from vllm_compiled_cpu import install  # type: ignore[import-not-found]  # beside this file

        install()
    import vllm
    import vllm.v1.worker.cpu_worker

    imported = time.perf_counter() - began
    stock, ours = group_run(asked, ""), group_run(asked, asked.switch)
    wrong = differences(stock, ours, asked.fused_a_forward)
    near = max(abs(a - b) for s, o in zip(stock[0]["logprobs"], ours[0]["logprobs"], strict=True) for a, b in zip(s, o, strict=True))
    way = "compiled" if asked.compiled else "eager"
    result = {
        "commit": asked.commit,
        "vllm": vllm.__version__,
        "case": f"{asked.model.name}, world {asked.world}, {asked.dtype}, {way}, COLLOGUE_VLLM={asked.switch}",
        "text": ours[0]["text"],
        "fused": ours[0]["counts"],
        "forwards": ours[0]["forwards"],
        "largest difference of a log-probability": near,
        "seconds": {
            "import": round(imported, 1),
            "stock": stock[0]["seconds"],
            "Collogue": ours[0]["seconds"],
            "all": round(time.perf_counter() - began, 1),
        },
        "wrong": wrong,
    }
    print(json.dumps(result, indent=1))
    if asked.json:
        asked.json.write_text(json.dumps(result, indent=1) + "\n")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())

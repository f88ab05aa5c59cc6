"""Run a real vLLM on one GPU, stock and with Collogue, in a world of one whose collectives are forced: ``scripts/vllm_gpu.py OUT.json``.

A world of one reduces nothing. Here ``RowParallelLinear`` believes in two ranks once its weights are made, and the all-reduce of a group is
vLLM's operator, which copies: stock and Collogue see the calls and the graphs of two ranks and must give the tokens of one. Each case is a
process; the model is a small Llama with random weights, greedy. Needs vLLM with its extension for norms and caches; attention by Triton.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from collogue.tools.record import circumstances

#: By name: the value of COLLOGUE_VLLM, whether vLLM compiles, whether the collectives are forced.
WAYS = {
    "plain-eager": ("0", False, False),
    "stock-eager": ("0", False, True),
    "stock-compiled": ("0", True, True),
    "collogue-eager": ("eager", False, True),
    "collogue-compile": ("compile", True, True),
}
PAIRS = (
    ("plain-eager", "stock-eager"),
    ("stock-eager", "stock-compiled"),
    ("stock-eager", "collogue-eager"),
    ("stock-compiled", "collogue-compile"),
    ("collogue-eager", "collogue-compile"),
)
DTYPES = ("bfloat16", "float32")
ENVIRONMENT = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_USE_FLASHINFER_SAMPLER": "0",
    "VLLM_DISABLE_COMPILE_CACHE": "1",
    "VLLM_USE_AOT_COMPILE": "0",
    "VLLM_USE_DEEP_GEMM": "0",
    "VLLM_NO_USAGE_STATS": "1",
    "HF_HUB_OFFLINE": "1",
    "OMP_NUM_THREADS": "2",
    "COLLOGUE_TIMEOUT": "20",
}
VOCABULARY, STEPS = 4096, 24
MODEL = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 1024,
    "intermediate_size": 2816,
    "num_hidden_layers": 8,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "head_dim": 128,
    "vocab_size": VOCABULARY,
    "max_position_embeddings": 512,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "hidden_act": "silu",
    "tie_word_embeddings": False,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


def force(collogue: bool) -> None:
    """Let layers and groups of one rank make the calls of two."""
    import torch
    import vllm.distributed.parallel_state as state
    from vllm.model_executor.layers.linear import RowParallelLinear

    def all_reduce(self: Any, given: torch.Tensor) -> Any:
        return torch.ops.vllm.all_reduce(given, group_name=self.unique_name) if self.unique_name.startswith("tp") else given

    whole = RowParallelLinear.__init__

    def init(self: Any, *args: Any, **kwargs: Any) -> None:
        whole(self, *args, **kwargs)
        self.tp_size = 2

    state.GroupCoordinator.all_reduce = all_reduce
    state.GroupCoordinator._all_reduce_out_place = lambda self, given: given.clone()
    RowParallelLinear.__init__ = init
    if collogue:
        from collogue.engines.vllm import fused

        fused.why_not = lambda config: ""


def make_engine(dtype: str, *, compiled: bool, fused: bool) -> Any:
    """vLLM's engine in this process, with random weights."""
    import torch
    from vllm import LLM

    options: dict[str, Any] = {}
    if compiled:
        passes = {"fuse_norm_quant": False, "fuse_act_quant": False, "fuse_allreduce_rms": fused}
        options["compilation_config"] = {"mode": 3, "cudagraph_capture_sizes": [1, 2, 4, 8], "pass_config": passes}
    folder = Path(tempfile.mkdtemp())
    (folder / "config.json").write_text(json.dumps(MODEL | {"torch_dtype": dtype}), encoding="utf-8")
    engine = LLM(
        str(folder),
        skip_tokenizer_init=True,
        load_format="dummy",
        dtype=dtype,
        seed=0,
        max_model_len=256,
        max_num_seqs=8,
        max_num_batched_tokens=256,
        gpu_memory_utilization=0.05,
        kv_cache_memory_bytes=1 << 30,
        enable_prefix_caching=False,
        enforce_eager=not compiled,
        attention_backend="TRITON_ATTN",
        disable_log_stats=True,
        **options,
    )
    model = engine.llm_engine.model_executor.driver_worker.worker.model_runner.model
    generator = torch.Generator(device="cuda").manual_seed(1)
    with torch.no_grad():
        for name, weight in sorted(getattr(model, "runnable", model).named_parameters()):
            noise = torch.randn(weight.shape, generator=generator, device="cuda")
            weight.copy_(1 + 0.1 * noise if "norm" in name else 0.04 * noise)
    torch.cuda.synchronize()
    return engine


def kernels(engine: Any, prompt: Any) -> dict[str, int]:
    """How often Collogue's kernels ran in four steps, by name: counts in Python see captures, and no replays."""
    from torch.profiler import ProfilerActivity, profile
    from vllm import SamplingParams

    with profile(activities=[ProfilerActivity.CUDA]) as seen:
        engine.generate([prompt], SamplingParams(temperature=0, max_tokens=4, ignore_eos=True, detokenize=False), use_tqdm=False)
    return {event.key: event.count for event in seen.key_averages() if event.key.startswith("collogue")}


def run_case(name: str, dtype: str, result: Path) -> None:
    """One case, in this process."""
    switch, compiled, forced = WAYS[name]
    from vllm import SamplingParams

    if forced:
        force(switch != "0")
    engine = make_engine(dtype, compiled=compiled, fused=switch == "compile")
    counts = getattr(sys.modules.get("collogue.engines.vllm.fused"), "counts", {})
    start = dict(counts)
    prompts = [{"prompt_token_ids": [(7 * i + 13 * j) % VOCABULARY for j in range(5 + 9 * i)]} for i in range(6)]
    asked = SamplingParams(temperature=0, max_tokens=STEPS, ignore_eos=True, logprobs=2, detokenize=False)
    outputs = [each.outputs[0] for given in (prompts, prompts[:1]) for each in engine.generate(given, asked, use_tqdm=False)]
    best = [[sorted((each.logprob for each in step.values()), reverse=True)[:2] for step in output.logprobs] for output in outputs]
    found: dict[str, Any] = {
        "tokens": [list(output.token_ids) for output in outputs],
        "gaps": [[first - second for first, second in of_output] for of_output in best],
        "counts at start": start,
        "counts": dict(counts),
    }
    again = [list(each.outputs[0].token_ids) for each in engine.generate(prompts, asked, use_tqdm=False)]
    found["same twice"] = again == found["tokens"][:6]
    found["kernels of 4 steps"] = kernels(engine, prompts[0])
    result.write_text(json.dumps(found), encoding="utf-8")
    os._exit(0)  # not through the engine's own shutdown


def start_case(name: str, dtype: str, timeout: float) -> dict[str, Any]:
    """One case, in a process that is ended after ``timeout`` seconds."""
    own = tempfile.mkdtemp()
    result, log = Path(own) / "result.json", Path(own) / "log"
    caches = {"VLLM_CACHE_ROOT": own, "TRITON_CACHE_DIR": f"{own}/triton", "TORCHINDUCTOR_CACHE_DIR": f"{own}/inductor"}
    command = [sys.executable, __file__, "--case", name, "--dtype", dtype, str(result)]
    environment = os.environ | ENVIRONMENT | caches | {"COLLOGUE_VLLM": WAYS[name][0]}
    with log.open("w") as out:
        process = subprocess.Popen(command, stdout=out, stderr=subprocess.STDOUT, env=environment, start_new_session=True)
        try:
            code = process.wait(timeout)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            code = process.wait()
    print(f"{name} {dtype}: exit {code}", flush=True)
    if code:
        print("\n".join(log.read_text(errors="replace").splitlines()[-40:]), flush=True)
    return {"exit": code, **(json.loads(result.read_text(encoding="utf-8")) if result.exists() else {})}


def compare(one: dict[str, Any], two: dict[str, Any]) -> dict[str, Any]:
    """Where tokens part, and how far the two best log-probabilities of ``one`` are from each other there."""
    parted = []
    for i, (a, b) in enumerate(zip(one["tokens"], two["tokens"], strict=True)):
        at = next((j for j, (x, y) in enumerate(zip(a, b, strict=True)) if x != y), None)
        if at is not None:
            parted.append({"sequence": i, "token": at, "gap": round(one["gaps"][i][at], 5)})
    return {"sequences": len(one["tokens"]), "parted": parted}


def main() -> int:
    """Run every case, compare, write. Ends with 1 where a case fails, or float32 tokens differ."""
    parser = argparse.ArgumentParser(description="vLLM on one GPU, stock and with Collogue, its collectives forced.")
    parser.add_argument("out", type=Path)
    parser.add_argument("--jobs", type=int, default=4, help="cases at a time")
    parser.add_argument("--timeout", type=float, default=120.0, help="seconds of a case")
    parser.add_argument("--case", choices=list(WAYS), help=argparse.SUPPRESS)
    parser.add_argument("--dtype", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.case:
        run_case(given.case, given.dtype, given.out)
    keys = sorted(((name, dtype) for dtype in DTYPES for name in WAYS), key=lambda key: not WAYS[key[0]][1])  # the longest first
    with ThreadPoolExecutor(given.jobs) as pool:
        cases = dict(zip(keys, pool.map(lambda key: start_case(key[0], key[1], given.timeout), keys), strict=True))
    compared = {
        f"{a} and {b}, {dtype}": compare(cases[a, dtype], cases[b, dtype])
        for dtype in DTYPES
        for a, b in PAIRS
        if "tokens" in cases[a, dtype] and "tokens" in cases[b, dtype]
    }
    kept = {f"{name} {dtype}": {k: v for k, v in case.items() if k not in ("tokens", "gaps")} for (name, dtype), case in cases.items()}
    facts = {"model": MODEL, "cases": kept, "comparisons": compared, **circumstances()}
    given.out.write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(compared, indent=1))
    wrong = any(found["parted"] for key, found in compared.items() if key.endswith("float32"))
    return int(wrong or len(compared) < len(PAIRS) * len(DTYPES) or any(case["exit"] for case in cases.values()))


if __name__ == "__main__":
    sys.exit(main())

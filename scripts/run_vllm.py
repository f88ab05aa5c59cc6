"""Run a real vLLM on CPU ranks, stock and with Collogue, and compare: tokens, log-probabilities, ranks, and the number of fused calls.

`python scripts/run_vllm.py MODEL --world 2 --switch eager --fused-a-forward 61`, in the environment of scripts/setup_engines.sh

vLLM is imported once; each rank is a fork that runs the engine in its own process (vLLM's external launcher), so that its calls can be
counted. The plugin comes in by vLLM's own loader. Ends with 1 where something differs, and says what.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path
from typing import Any

from vllm_ranks import calls, engine, model_runner, quiet, run_ranks  # type: ignore[import-not-found]  # beside this file

#: What vLLM compiles with on a GPU, as far as it concerns the pass.
COMPILED: dict[str, Any] = {"mode": 3, "pass_config": {"fuse_norm_quant": False, "fuse_act_quant": False}}
PROMPTS = ("The capital of France is", "Water is made of", "Once upon a time there was")


def rank_run(asked: argparse.Namespace) -> dict[str, Any]:
    """One rank: an engine, the prompts, and what was counted."""
    from vllm import SamplingParams

    llm = engine(
        asked.model,
        asked.world,
        asked.dtype,
        max_model_len=64,
        max_num_seqs=4,
        max_num_batched_tokens=64,
        enforce_eager=not asked.compiled,
        **({"compilation_config": COMPILED} if asked.compiled else {}),
    )
    counts = calls()
    counts.clear()
    model = model_runner(llm).model
    if asked.read_between:
        for name, module in model.named_modules():
            if name.endswith("o_proj"):
                module.register_forward_hook(lambda module, inputs, output: (output[0] * 1.0, *output[1:]))
    forwards, whole = 0, model.forward

    def forward(*args: Any, **kwargs: Any) -> Any:
        nonlocal forwards
        forwards += 1
        return whole(*args, **kwargs)

    model.forward = forward
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
    parser.add_argument("--switch", default="auto", help="value of COLLOGUE_VLLM")
    parser.add_argument("--tokens", type=int, default=8)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--fused-a-forward", type=int, required=True, help="fused calls that a forward pass must make")
    parser.add_argument("--compiled", action="store_true", help="compile as on a GPU, on a test platform")
    parser.add_argument("--read-between", action="store_true", help="a model that reads each attention's sum before the norm does")
    parser.add_argument("--commit", default="", help="goes into the result")
    parser.add_argument("--json", type=Path)
    asked = parser.parse_args()
    began = time.perf_counter()
    quiet()
    if asked.compiled:
        from vllm_compiled_cpu import install  # type: ignore[import-not-found]  # beside this file

        install()
    import vllm
    import vllm.v1.worker.cpu_worker

    imported = time.perf_counter() - began
    stock, ours = (run_ranks(asked.world, switch, lambda rank: rank_run(asked)) for switch in ("", asked.switch))
    wrong = differences(stock, ours, asked.fused_a_forward)
    near = max(abs(a - b) for s, o in zip(stock[0]["logprobs"], ours[0]["logprobs"], strict=True) for a, b in zip(s, o, strict=True))
    way = ("compiled" if asked.compiled else "eager") + ", read between" * asked.read_between
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

"""A stream of requests through a real vLLM on CPU ranks, stock and with Collogue: the same text, the same twice, and no leak.

`python scripts/stream_vllm.py MODEL --world 2`, in the environment of scripts/setup_engines.sh

Requests arrive while others run (continuous batching), prompts longer than a step's tokens are cut (chunked prefill), and prompts share
beginnings (prefix caching). Greedy, in float32. Collogue adds in rank order and rounds once, stock vLLM does not: a token may differ
where stock's two best log-probabilities lie closer than `--near`, and then the rest of that text. Such requests are listed; more than
`--differ` of them, or any other difference, are an error.
With `--steps N` requests never end, and memory and open files are looked at on the way: for a leak.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from vllm_ranks import calls, engine, quiet, run_ranks  # type: ignore[import-not-found]  # beside this file

from collogue.tools.demo.text import evaluation_text

#: Small enough that 50 requests are cut, wait and share.
LIMITS: dict[str, Any] = {
    "max_model_len": 256,
    "max_num_seqs": 8,
    "max_num_batched_tokens": 48,
    "enable_chunked_prefill": True,
    "enable_prefix_caching": True,
    "block_size": 32,
    "enforce_eager": True,
}
#: Tokens of the beginnings that prompts share, and of the largest rest.
SHARED, REST = 40, 60
#: Where memory and files are looked at: after this many steps everything that is made once is there.
SETTLED = 200


def prompts(tokenizer: Any, count: int) -> list[list[int]]:
    """Token numbers: one of five beginnings, and a rest of its own, out of the demo's text."""
    text = tokenizer.encode(evaluation_text()[: 40 * count * REST])
    starts = [text[i * SHARED : (i + 1) * SHARED] for i in range(5)]
    rests = (text[1000 + i * REST : 1000 + i * REST + 3 + i * 7 % REST] for i in range(count))
    return [starts[i % 5] + rest for i, rest in enumerate(rests)]


def requests(asked: argparse.Namespace, llm: Any) -> Iterator[tuple[str, list[int], int]]:
    """Names, prompts and tokens to make, in order; without an end where steps are counted."""
    made = prompts(llm.get_tokenizer(), asked.requests)
    i = 0
    while i < len(made) or asked.steps:
        yield str(i), made[i % len(made)], asked.tokens - i % 3
        i += 1


def state() -> dict[str, float]:
    """Resident memory in MB, open files, and live Python objects."""
    gc.collect()
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return {
        "MB": round(pages * os.sysconf("SC_PAGE_SIZE") / 1e6, 1),
        "files": len(os.listdir("/proc/self/fd")),
        "objects": len(gc.get_objects()),
    }


def rank_run(asked: argparse.Namespace) -> dict[str, Any]:
    """One rank: two requests arrive every third step, and the engine makes steps until all are done."""
    from vllm import SamplingParams

    llm = engine(asked.model, asked.world, "float32", **LIMITS)
    inside = llm.llm_engine
    calls().clear()
    waiting, done = requests(asked, llm), {}
    upcoming = next(waiting, None)
    step, most, states, began = 0, 0, {}, time.perf_counter()
    while (upcoming or inside.has_unfinished_requests()) and not 0 < asked.steps <= step:
        for _ in range(2 if step % 3 == 0 and inside.get_num_unfinished_requests() < 12 else 0):
            if upcoming:
                name, prompt, tokens = upcoming
                wanted = SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True, logprobs=None if asked.steps else 2)
                inside.add_request(name, {"prompt_token_ids": prompt}, wanted)
                upcoming = next(waiting, None)
        most = max(most, inside.get_num_unfinished_requests())
        for output in inside.step():
            if output.finished and not asked.steps:
                done[int(output.request_id.split("-")[0])] = output
        step += 1
        if asked.steps and step in (SETTLED, asked.steps // 2, asked.steps):
            states[step] = state()
    texts = [done[i].outputs[0] for i in sorted(done)]
    return {
        "tokens": [list(text.token_ids) for text in texts],
        "best": [[sorted((entry.logprob for entry in at.values()), reverse=True)[:2] for at in text.logprobs] for text in texts],
        "cached": sum(done[i].num_cached_tokens or 0 for i in done),
        "prompt tokens": sum(len(done[i].prompt_token_ids) for i in done),
        "longest prompt": max((len(done[i].prompt_token_ids) for i in done), default=0),
        "at a time": most,
        "steps": step,
        "states": states,
        "counts": dict(calls()),
        "seconds": round(time.perf_counter() - began, 1),
    }


def compare(stock: dict[str, Any], ours: dict[str, Any], near: float) -> tuple[list[dict[str, Any]], list[str]]:
    """The requests whose texts part where stock's two best are near, and what else is wrong."""
    parted: list[dict[str, Any]] = []
    wrong: list[str] = []
    for i, (a, b) in enumerate(zip(stock["tokens"], ours["tokens"], strict=True)):
        if a == b:
            continue
        at = next(j for j, pair in enumerate(zip(a, b, strict=True)) if pair[0] != pair[1])
        first, second = stock["best"][i][at]
        parted.append({"request": i, "token": at, "stock's best two differ by": first - second})
        if first - second >= near:
            wrong.append(f"request {i} differs from token {at} on, where stock's best two differ by {first - second:.2g}")
    return parted, wrong


def stream(asked: argparse.Namespace) -> tuple[dict[str, Any], list[str]]:
    """Stock once and Collogue twice."""
    stock, ours, again = (run_ranks(asked.world, switch, lambda rank: rank_run(asked)) for switch in ("", "eager", "eager"))
    parted, wrong = compare(stock[0], ours[0], asked.near)
    if len(parted) > asked.differ:
        wrong.append(f"{len(parted)} of {asked.requests} texts differ, expected at most {asked.differ}")
    if len(stock[0]["tokens"]) != asked.requests:
        wrong.append(f"{len(stock[0]['tokens'])} of {asked.requests} requests were finished")
    if any(rank["tokens"] != ours[0]["tokens"] for rank in ours):
        wrong.append("ranks have other tokens than rank 0")
    if [(run["tokens"], run["best"]) for run in ours] != [(run["tokens"], run["best"]) for run in again]:
        wrong.append("two runs with Collogue differ")
    if not ours[0]["counts"].get("fused") or stock[0]["counts"]:
        wrong.append(f"calls: {ours[0]['counts']} with Collogue, {stock[0]['counts']} without")
    if not ours[0]["cached"] or ours[0]["longest prompt"] <= LIMITS["max_num_batched_tokens"] or ours[0]["at a time"] < 2:
        wrong.append("no prefix was cached, no prompt was cut, or no two requests ran at a time: this run shows nothing")
    shown = ("steps", "at a time", "cached", "prompt tokens", "longest prompt", "counts", "seconds")
    return {
        "requests": asked.requests,
        "tokens made": sum(map(len, ours[0]["tokens"])),
        "Collogue": {name: ours[0][name] for name in shown},
        "stock": {name: stock[0][name] for name in shown},
        "same text": asked.requests - len(parted),
        "parted": parted,
        "near": asked.near,
    }, wrong


def leak(asked: argparse.Namespace) -> tuple[dict[str, Any], list[str]]:
    """Memory and files between a settled step and the last one, for each rank, beside stock vLLM's."""
    stock, ours = (run_ranks(asked.world, switch, lambda rank: rank_run(asked)) for switch in ("", "eager"))
    wrong = []
    grown = {}
    for name, ranks in (("stock", stock), ("Collogue", ours)):
        first, last = ([rank["states"][str(step)] for rank in ranks] for step in (SETTLED, asked.steps))
        grown[name] = [{key: round(b[key] - a[key], 1) for key in a} for a, b in zip(first, last, strict=True)]
    for rank, (theirs, own) in enumerate(zip(grown["stock"], grown["Collogue"], strict=True)):
        if own["MB"] > max(theirs["MB"], 0) + asked.mb or own["files"] > max(theirs["files"], 0):
            wrong.append(f"rank {rank} has grown by {own} from step {SETTLED} to {asked.steps}; stock vLLM by {theirs}")
    if any(not rank["counts"].get("fused") or rank["steps"] != asked.steps for rank in ours):
        wrong.append(f"{ours[0]['counts']} in {ours[0]['steps']} steps")
    return {
        "steps": asked.steps,
        f"grown since step {SETTLED}": grown,
        "Collogue": {"states": ours[0]["states"], "counts": ours[0]["counts"], "seconds": ours[0]["seconds"]},
        "stock": {"states": stock[0]["states"], "seconds": stock[0]["seconds"]},
    }, wrong


def main() -> int:
    """The stream, or the look for a leak."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--world", type=int, default=2)
    parser.add_argument("--requests", type=int, default=50)
    parser.add_argument("--tokens", type=int, default=16, help="most tokens of a request")
    parser.add_argument("--near", type=float, default=1e-3)
    parser.add_argument("--differ", type=int, default=3, help="most texts that may differ")
    parser.add_argument("--steps", type=int, default=0, help="make so many steps and look for a leak instead")
    parser.add_argument("--mb", type=float, default=8.0, help="by how much more than stock vLLM's a rank's memory may grow")
    parser.add_argument("--commit", default="", help="goes into the result")
    parser.add_argument("--json", type=Path)
    asked = parser.parse_args()
    quiet()
    import vllm
    import vllm.v1.worker.cpu_worker

    result, wrong = leak(asked) if asked.steps else stream(asked)
    case = f"{asked.model.name}, world {asked.world}, float32, eager"
    result = {"commit": asked.commit, "vllm": vllm.__version__, "case": case, "limits": LIMITS} | result | {"wrong": wrong}
    print(json.dumps(result, indent=1))
    if asked.json:
        asked.json.write_text(json.dumps(result, indent=1) + "\n")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())

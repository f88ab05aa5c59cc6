"""Ranks as processes and as threads, and Ctrl-C: the process that started them ends them."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from typing import Any

import pytest

from collogue.testing.processes import run_processes

pytestmark = [pytest.mark.slow, pytest.mark.skipif(sys.platform != "linux", reason="signals")]


def interrupted_rank(group: Any, tell: Any) -> int:
    """As a terminal does it at Ctrl-C."""
    os.kill(os.getpid(), signal.SIGINT)
    time.sleep(0.2)
    return int(group.rank())


def test_a_rank_hears_no_interrupt() -> None:
    assert run_processes(2, interrupted_rank) == [0, 1]


def test_an_interrupted_program_with_virtual_ranks_does_not_abort() -> None:
    """A thread that is still in PyTorch when the interpreter ends would (SIGABRT)."""
    code = """
import os, signal, torch
from collogue.testing import run_virtual
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs inherit that it is ignored
def rank(group):
    group.barrier()
    if group.rank == 0:
        os.write(1, b"started\\n")
    while True:
        torch.ones(300, 300) @ torch.ones(300, 300)
        group.barrier()
run_virtual(3, rank)
"""
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as child:
        try:
            assert child.stdout is not None
            assert child.stdout.readline() == "started\n"
            time.sleep(0.5)
            child.send_signal(signal.SIGINT)
            _, said = child.communicate(timeout=60)
        finally:
            child.kill()
    assert child.returncode == -signal.SIGINT, said
    assert "KeyboardInterrupt" in said

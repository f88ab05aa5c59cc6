"""Two hosts for real: networks, names and addresses of their own, by Linux namespaces. Skipped, with the reason, where not permitted."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

pytestmark = [pytest.mark.slow, pytest.mark.timeout(120)]

_RANK = """
import os, sys, torch.distributed as dist
sys.path[:0] = sys.argv[3:]
from islands import check
from ranks import communicator
from collogue.contract.quant import NVFP4
dist.init_process_group("gloo", init_method=sys.argv[2], rank=int(sys.argv[1]), world_size=3)
with communicator(dist.group.WORLD, algorithm="two_shot", timeout=20) as comm:
    assert comm.islands == ((0,), (1, 2)), comm.topology
    found = check(comm, comm.islands, 5, quant=NVFP4(3.0)) + check(comm, comm.islands, 2, kind="normal")
print(found)
dist.destroy_process_group()
"""
_UNSHARE = ["unshare", "--net", "--uts", "--mount"]


def run(*command: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run([str(each) for each in command], capture_output=True, text=True, timeout=20, check=False)


@pytest.fixture
def hosts(tmp_path: Path) -> Iterator[list[int]]:
    """Processes that hold the namespaces of two hosts, with a cable between them."""
    if any(shutil.which(tool) is None for tool in ("unshare", "nsenter", "ip")):
        pytest.skip("there is no unshare, nsenter or ip here")
    tried = run(*_UNSHARE, "mount", "--bind", tmp_path, tmp_path)
    if tried.returncode:
        pytest.skip(f"namespaces are not permitted: {tried.stderr.strip()}")
    names = tmp_path / "hosts"
    names.write_text("127.0.0.1 localhost\n10.77.0.1 alpha\n10.77.0.2 beta\n")
    ready = [tmp_path / name for name in ("alpha", "beta")]
    holders = [
        subprocess.Popen(
            [*_UNSHARE, "sh", "-c", f"hostname {file.name} && mount --bind {names} /etc/hosts && touch {file} && exec sleep 100"]
        )
        for file in ready
    ]
    try:
        end = time.monotonic() + 10
        while not all(file.exists() for file in ready) and time.monotonic() < end:
            time.sleep(0.05)
        one, two = (holder.pid for holder in holders)
        cable = run("nsenter", "-t", one, "-n", "ip", "link", "add", "cable", "type", "veth", "peer", "name", "cable", "netns", two)
        if cable.returncode:
            pytest.skip(f"no network between namespaces is permitted: {cable.stderr.strip()}")
        for number, pid in enumerate((one, two), 1):
            for what in (f"addr add 10.77.0.{number}/24 dev cable", "link set cable up", "link set lo up"):
                done = run("nsenter", "-t", pid, "-n", "ip", *what.split())
                assert done.returncode == 0, done.stderr
        yield [one, two]
    finally:
        for holder in holders:
            holder.kill()
            holder.wait()


def test_ranks_on_two_hosts(hosts: list[int], tmp_path: Path) -> None:
    """One rank on one, two on the other: found by name and address, bits of the scalar version."""
    store, tests = (tmp_path / "store").as_uri(), Path(__file__).resolve().parents[1]
    environment = {**os.environ, "GLOO_SOCKET_IFNAME": "cable", "OMP_NUM_THREADS": "1"}
    environment.pop("COLLOGUE_HOST", None)
    ranks = [
        subprocess.Popen(
            ["nsenter", "-t", str(hosts[host]), "-n", "-u", "-m", sys.executable, "-c", _RANK, str(rank), store, str(tests)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=environment,
        )
        for rank, host in enumerate((0, 1, 1))
    ]
    try:
        told = [rank.communicate(timeout=90) for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
    for out, error in told:
        assert out.strip() == "[]", error

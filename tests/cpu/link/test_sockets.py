"""CPU groups keep the promises of GPU groups: bounded waits, named ranks, no hang and no abort, usable after ``reset``."""

from __future__ import annotations

import socket
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest
from links import SCENES, TIMEOUT, dying_rank, scenes_rank

from collogue.errors import CollectiveTimeout
from collogue.link import Link
from collogue.testing.processes import run_processes

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def found() -> list[dict[str, Any]]:
    return run_processes(3, scenes_rank, silence=60)


#: Per scene, per rank: the error and words of its text.
EXPECTED = {
    "late": [("CollectiveTimeout", "for rank 1")] * 3,
    # The late rank has everybody's bytes, and hears of it afterwards.
    "late_in_the_middle": [("CollectiveTimeout", "for rank 1"), ("", ""), ("CollectiveTimeout", "for rank 1")],
    "without_tokens": [("CollectiveTimeout", "rank 1")] * 3,
    "other_tokens_and_late": [("MismatchedCall", "rank 2 with (all_reduce, tokens=3")] * 3,
    "in_prepare": [("MismatchedCall", "rank 1 with (a barrier)")] * 3,
    "interrupted": [("CollectiveError", "rank 1 left"), ("KeyboardInterrupt", ""), ("CollectiveError", "rank 1 left")],
    "interrupted_between": [
        ("CollectiveError", "rank 1 left a call by KeyboardInterrupt"),
        ("KeyboardInterrupt", ""),
        ("CollectiveError", "rank 1 left"),
    ],
    "one_resets": [
        ("CollectiveError", "rank 1 called reset()"),
        ("CollectiveTimeout", "in reset() for "),
        ("CollectiveError", "rank 1 called reset()"),
    ],
    "one_resets_while_others_wait": [
        ("CollectiveError", "rank 1 called reset()"),
        ("CollectiveTimeout", "in reset() for "),
        ("CollectiveError", "rank 1 called reset()"),
    ],
    "reset_twice": [("CollectiveTimeout", "in reset() for rank"), ("CollectiveError", "rank 0 "), ("CollectiveError", "rank 0 ")],
    "order": [("MismatchedCall", "call the communicators of a group in the same order on every rank")] * 3,
}


@pytest.mark.parametrize("scene", EXPECTED)
def test_scenes(found: list[dict[str, Any]], scene: str) -> None:
    for rank, (told, (name, words)) in enumerate(zip((each[scene] for each in found), EXPECTED[scene], strict=True)):
        kind, text, seconds, checked = told
        assert kind == name, (rank, told)
        assert words in text, (rank, told)
        assert "hint: " in text or kind in ("KeyboardInterrupt", ""), (rank, told)
        assert seconds < TIMEOUT + 1.0 or "late" in scene, (rank, told)
        assert checked == {"KeyboardInterrupt": "CollectiveError", "": "CollectiveTimeout"}.get(kind, kind), (rank, told)


def test_late_ranks_are_named_in_time(found: list[dict[str, Any]]) -> None:
    for scene in ("late", "late_in_the_middle"):
        for rank in (0, 2):
            assert found[rank][scene][2] < TIMEOUT + 1.0
    assert found[1]["late"][2] < 0.5
    for rank in (0, 2):
        assert found[rank]["other_tokens_and_late"][2] < 1.4


def test_every_scene_is_looked_at() -> None:
    assert {*SCENES} | {"order"} == {*EXPECTED}


def test_threads(found: list[dict[str, Any]]) -> None:
    for rank in found:
        assert rank["threads"] == [[], []]
        assert rank["watched"] == []
    assert found[0]["shared"] == ["ConcurrentUseError"] * 3


def test_a_forked_child(found: list[dict[str, Any]]) -> None:
    for rank in found:
        assert rank["fork"] == ["ClosedError"] * 4 + [""]


def test_large_calls_and_closed_peers(found: list[dict[str, Any]]) -> None:
    for number, rank in enumerate(found):
        assert rank["large"]
        if number != 1:
            assert rank["closed"][0] == "CollectiveError"
            assert "rank 1 has closed the communicator" in rank["closed"][1] or number == 2


@pytest.mark.parametrize("when", ["at once", "later", "in the middle", "unheard"])
def test_a_dead_rank(when: str) -> None:
    told = run_processes(3, dying_rank, when, mortal=[2], silence=60)
    assert told[2] is None
    for kind, text, seconds, checked in told[:2]:
        assert (kind, checked) == ("CollectiveError", "CollectiveError")
        assert "rank 2" in text
        assert seconds < 6.0


_LEAVE = """
import os, sys, time, torch, torch.distributed as dist, collogue
rank, how = int(sys.argv[1]), sys.argv[3]
dist.init_process_group("gloo", init_method=sys.argv[2], rank=rank, world_size=2)
comm = collogue.Communicator(dist.group.WORLD, max_tokens=8, hidden_size=64, timeout=2)
x = torch.ones(4, 64, dtype=torch.bfloat16)
comm.all_reduce(x)
if how == "raise" and rank == 1:
    raise SystemExit(7)
if how == "destroy":
    dist.destroy_process_group()
if how == "call":
    try:
        if rank == 0:
            comm.all_reduce(x)
    except collogue.CollectiveError:
        sys.exit(5)
"""


@pytest.mark.parametrize(("how", "codes"), [("end", (0, 0)), ("raise", (0, 7)), ("destroy", (0, 0)), ("call", (5, 0))])
def test_the_end_of_the_interpreter(how: str, codes: tuple[int, int], tmp_path: Path) -> None:
    """Without ``close``, by an error, after the group is gone, while another rank calls: no abort, nothing on stderr."""
    store = (tmp_path / "store").as_uri()
    ranks = [
        subprocess.Popen(
            [sys.executable, "-X", "dev", "-W", "error::ResourceWarning", "-c", _LEAVE, str(rank), store, how],
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    texts = [rank.communicate(timeout=60)[1] for rank in ranks]
    assert tuple(rank.returncode for rank in ranks) == codes, texts
    for text in texts:
        assert "terminate" not in text
        assert "ResourceWarning" not in text
        assert "Traceback" not in text


# In threads, without a process group


def _pair(make: Any) -> list[Any]:
    """``make(rank, gather)`` in two threads; ``gather`` exchanges objects."""
    barrier, values, results = threading.Barrier(2, timeout=20), [None, None], [None, None]

    def work(rank: int) -> None:
        def gather(value: Any) -> list[Any]:
            values[rank] = value
            barrier.wait()
            every = list(values)
            barrier.wait()
            return every

        try:
            results[rank] = make(rank, gather)
        except BaseException as error:
            results[rank] = error

    threads = [threading.Thread(target=work, args=(rank,)) for rank in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return results


def test_strangers_are_not_let_in() -> None:
    """Whoever connects to the port without the token is dropped; nothing that it sends is read as a frame."""

    def make(rank: int, gather: Any) -> list[Any]:
        link = Link("group", "communicator 1", rank, 2, gather, 5.0)
        address = link._sockets.addresses[0]
        gather(None)
        if rank == 1:
            strangers = [socket.create_connection(address) for _ in range(3)]
            strangers[0].sendall(b"GET / HTTP/1.1\r\n\r\n" * 10)
            strangers[1].sendall(b"x")
        gather(None)
        begin = time.monotonic()
        if rank == 1:
            strangers[1].close()
            strangers[2].close()
        link.reset()
        got = link.exchange("numbers", bytes([rank]))
        if rank == 1:
            strangers[0].close()
        link.close()
        assert time.monotonic() - begin < 5.0
        return [bytes(each) for each in got]

    assert _pair(make) == [[b"\0", b"\1"]] * 2


def test_a_rank_that_never_comes_to_the_constructor() -> None:
    def make(rank: int, gather: Any) -> Any:
        if rank == 1:
            gather(("here", "localhost"))
            gather((1, "", b""))
            return None
        return Link("group", "communicator 1", rank, 2, gather, 0.5)

    first, second = _pair(make)
    assert second is None
    assert isinstance(first, CollectiveTimeout)
    assert "waited 0.5 s in the constructor of the communicator for rank 1" in str(first)


def test_a_closed_link() -> None:
    def make(rank: int, gather: Any) -> Any:
        link = Link("group", "communicator 1", rank, 2, gather, 5.0)
        gather(None)
        link.close()
        link.close()
        return "closed"

    assert _pair(make) == ["closed"] * 2

"""The control words, marks and canaries of a workspace, and what a failure says: without a GPU."""

from __future__ import annotations

import ctypes
import struct
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from collogue.errors import ArgumentError, CollectiveTimeout, CorruptedWorkspace, MismatchedCall
from collogue.extent import CONTROL_BYTES
from collogue.header import Entry, pack
from collogue.journal import Journal
from collogue.topology import Topology
from collogue.workspace import JOURNAL_OFFSET, MARKS_OFFSET, Control, FailureRecord, Workspace, clean_control


class Fake(Workspace):
    """A workspace whose pages lie in host memory, by rank."""

    def __init__(self, rank: int, world: int) -> None:
        self.group: Any = SimpleNamespace(rank=rank, size=world)
        self.topology = Topology(world, 8, 64, torch.bfloat16, "sm_90a", 132, 1)
        self.timeout = 1.5
        self.pages = [clean_control() for _ in range(world)]
        self.buffer: Any = SimpleNamespace(pointers=tuple(r << 20 for r in range(world)))
        self.failure = FailureRecord()

    def _read(self, pointer: int, nbytes: int) -> bytes:
        rank, first = pointer >> 20, pointer & 0xFFFFF
        return bytes(self.pages[rank][first : first + nbytes])

    def call(self, number: int, tokens: dict[int, int]) -> None:
        """Every rank of ``tokens`` has made call ``number`` with so many; its mark is everywhere."""
        options = pack("one_shot", "all_reduce", torch.bfloat16, True, True, False, None)
        for rank, count in tokens.items():
            entry = struct.pack("<6I2f", number + 1, count, 64, 0, *options, 1e-6, 0.0)
            at = JOURNAL_OFFSET + number % 64 * 32
            self.pages[rank][at : at + 32] = entry
            for page in self.pages:
                at = MARKS_OFFSET + (number % 4 * 8 + rank) * 8
                page[at : at + 8] = struct.pack("<2I", number + 1, count * 77)
            self.pages[rank][0:8] = struct.pack("<Q", (number + 1) << 32)


@pytest.fixture(autouse=True)
def journals(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("COLLOGUE_JOURNAL_DIR", str(tmp_path))
    return tmp_path


def test_a_clean_page_has_whole_canaries() -> None:
    work = Fake(0, 2)
    assert len(work.pages[0]) == CONTROL_BYTES
    control = work.control()
    assert (control.calls, control.stop) == (0, 0)
    work.check_canaries(control)
    work.raise_failure(control)


@pytest.mark.parametrize("at", [32, MARKS_OFFSET - 1, MARKS_OFFSET + 256, JOURNAL_OFFSET - 1])
def test_a_flipped_canary_is_seen(at: int) -> None:
    work = Fake(1, 2)
    work.pages[1][at] ^= 4
    with pytest.raises(CorruptedWorkspace, match="rank 1"):
        work.check_canaries(work.control())


def test_calls_that_agree_are_no_failure() -> None:
    work = Fake(0, 3)
    for number in range(6):
        work.call(number, {0: 4, 1: 4, 2: 4})
        work.raise_failure(work.control())
        work.check_canaries(work.control())
    assert work.control().calls == 6


def test_marks_that_differ_name_both_calls() -> None:
    work = Fake(0, 2)
    work.call(0, {0: 4, 1: 4})
    work.call(1, {0: 4, 1: 5})
    with pytest.raises(MismatchedCall, match=r"number 1 differ.*rank 0 made all_reduce by one_shot, tokens=4.*rank 1 made .*tokens=5"):
        work.raise_failure(work.control())


def test_a_rank_that_has_not_come_is_no_mismatch() -> None:
    work = Fake(0, 2)
    work.call(0, {0: 4, 1: 4})
    work.call(1, {0: 5})
    work.raise_failure(work.control())


def test_a_stop_word_of_another_rank_is_found() -> None:
    work = Fake(0, 2)
    work.call(0, {0: 4, 1: 4})
    work.pages[0][8:12] = struct.pack("<I", 1 << 8 | 2)
    with pytest.raises(CollectiveTimeout, match="rank 1 gave up waiting and stopped the group at call 0"):
        work.raise_failure(work.control())


def test_a_timeout_names_who_when_and_what(journals: Path) -> None:
    work = Fake(0, 2)
    work.call(0, {0: 4, 1: 4})
    work.call(1, {0: 6})
    for name, value in {"fault": 1, "rank": 0, "late_rank": 1, "call": 1, "token": 3, "stage": 1}.items():
        setattr(work.failure, name, value)
    with pytest.raises(CollectiveTimeout) as caught:
        work.raise_failure()
    text = str(caught.value)
    assert "rank 0 waited 1.5 s for the reduced rows of rank 1, call 1, token 3" in text
    assert "tokens=6" in text
    assert "rank 1 made no such call" in text
    (file,) = journals.iterdir()
    assert str(file) in text
    journal = Journal.load(file)
    assert journal.failure == {name: int(getattr(work.failure, name)) for name, *_ in FailureRecord._fields_}
    assert [entry.call for entry in journal.calls[0]] == [0, 1]
    assert "call 1: all_reduce by one_shot, tokens=6" in journal.text()


def test_only_journals_are_loaded(tmp_path: Path) -> None:
    (tmp_path / "x.json").write_text("{}")
    with pytest.raises(ArgumentError, match="is no journal"):
        Journal.load(tmp_path / "x.json")


def test_entries_name_every_argument() -> None:
    from collogue.spec import MXFP8

    options = pack("sharded", "reduce_scatter", torch.float16, False, True, True, MXFP8(rounding="ceil", layout="8x4"))
    entry = Entry.of(struct.pack("<6I2f", 8, 5, 64, 3, *options, 1e-5, 1.0))
    assert entry is not None
    assert entry.call == 7
    for part in (
        "reduce_scatter by sharded",
        "float16",
        "eps=1e-05, weight_offset=1",
        "MXFP8 (8x4, group 32, ceil)",
        "keep_norm",
        "from row 3",
    ):
        assert part in entry.text
    assert Entry.of(bytes(32)) is None


def test_control_words_have_the_size_that_python_skips() -> None:
    assert ctypes.sizeof(ctypes.c_uint64) + 3 * 4 + 4 <= 32
    assert Control.of(bytes(clean_control()[:JOURNAL_OFFSET])).marks[3][7] == (0, 0)

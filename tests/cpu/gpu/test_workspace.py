"""The control words, marks and canaries of a workspace, and what a failure says: without a GPU."""

from __future__ import annotations

import ctypes
import json
import struct
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from collogue.calls.request import Request, make_request
from collogue.contract.prologue import PrologueForm
from collogue.contract.quant import MXFP8, FP8PerToken, Quant
from collogue.contract.spec import Operation
from collogue.errors import ArgumentError, CollectiveTimeout, CorruptedWorkspace, MismatchedCall, PlatformError
from collogue.gpu.failure import MISMATCH, TIMEOUT, FailureRecord
from collogue.gpu.header import Entry, bounded, combining, moving, pack
from collogue.gpu.journal import Journal, default_path
from collogue.gpu.workspace import (
    BOUNDS_OFFSET,
    CONTROL_WORDS,
    JOURNAL_OFFSET,
    MARKS_OFFSET,
    NOTES_END,
    NOTES_OFFSET,
    Control,
    Workspace,
    clean_control,
)
from collogue.planning.extent import CONTROL_BYTES
from collogue.planning.topology import Topology


def request(quant: Quant | None = None, operation: Operation = "all_reduce", dtype: torch.dtype = torch.bfloat16, **flags: Any) -> Request:
    options = {"residual": True, "norm": True, "wide_weight": False, "keep_norm": False} | flags
    return make_request(4, 64, dtype, quant=quant, operation=operation, **options)


class Fake(Workspace):
    """A workspace whose pages lie in host memory, by rank."""

    def __init__(self, rank: int, world: int) -> None:
        self.group: Any = SimpleNamespace(rank=rank, size=world, name="g")
        self.topology = Topology(world, 8, 64, torch.bfloat16, "sm_90a", 132, 1)
        self.timeout = 1.5
        self.pages = [clean_control() for _ in range(world)]
        self.buffer: Any = SimpleNamespace(pointers=tuple(r << 20 for r in range(world)))
        self.failure = FailureRecord()
        self._saved = None

    def _read(self, pointer: int, nbytes: int) -> bytes:
        rank, first = pointer >> 20, pointer & 0xFFFFF
        return bytes(self.pages[rank][first : first + nbytes])

    def fail(self, **fields: int) -> None:
        """A kernel of this rank has filled the failure record."""
        for name, value in fields.items():
            setattr(self.failure, name, value)

    def stop(self, rank: int, word: int) -> None:
        """A rank's abort flag."""
        self.pages[rank][8:12] = struct.pack("<I", word)

    def note(self, finder: int, *, call: int, late_rank: int, token: int = 0, stage: int = 0) -> None:
        """What ``finder`` has found, on every rank."""
        for page in self.pages:
            at = NOTES_OFFSET + 8 * finder
            page[at : at + 8] = struct.pack("<2I", call, 1 + (token << 8 | stage << 4 | late_rank))

    def stages(self, rank: int) -> list[str]:
        return [entry.stage for entry in self.journal().calls[rank]]

    def call(self, number: int, tokens: dict[int, int]) -> None:
        """Every rank of ``tokens`` has made call ``number`` with so many; its mark is everywhere."""
        options = pack("one_shot", request())
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
    work.raise_failure(control)


@pytest.mark.parametrize("at", [CONTROL_WORDS, MARKS_OFFSET - 1, NOTES_END, BOUNDS_OFFSET - 1])
def test_a_flipped_canary_is_seen(at: int, journals: Path) -> None:
    work = Fake(1, 2)
    work.pages[1][at] ^= 4
    with pytest.raises(CorruptedWorkspace, match="rank 1's control words have been written over"):
        work.check()
    assert len(list(journals.iterdir())) == 1


@pytest.mark.parametrize("at", [12, 13, 14, 15, 16, 19])
def test_a_flipped_control_word_is_seen(at: int) -> None:
    """What is left to be cleaned, and who fills the failure record."""
    work = Fake(1, 2)
    work.call(0, {0: 4, 1: 4})
    work.check()
    work.pages[1][at] ^= 4
    with pytest.raises(CorruptedWorkspace, match="rank 1's control words have been written over"):
        work.check()


def test_a_record_that_is_being_filled_is_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    work = Fake(0, 2)
    work.call(0, {0: 4})
    work.pages[0][16:20] = struct.pack("<I", 1)
    monkeypatch.setattr("collogue.gpu.workspace.time.sleep", lambda seconds: work.fail(fault=TIMEOUT, rank=0, late_rank=1))
    assert work._plausible(work.control())


def test_marks_that_differ_where_calls_do_not_are_written_over() -> None:
    work = Fake(0, 2)
    work.call(0, {0: 4, 1: 4})
    work.pages[0][MARKS_OFFSET + 8 + 5] ^= 1
    with pytest.raises(CorruptedWorkspace, match="the signatures of call 0 differ, and the ranks' calls do not"):
        work.check()


def test_calls_that_agree_are_no_failure() -> None:
    work = Fake(0, 3)
    for number in range(6):
        work.call(number, {0: 4, 1: 4, 2: 4})
        work.raise_failure(work.control())
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
    work.stop(0, TIMEOUT << 8 | 2)
    with pytest.raises(CollectiveTimeout, match="rank 1 gave up waiting and stopped the group"):
        work.raise_failure(work.control())


@pytest.mark.parametrize("recorded", [False, True])
def test_every_rank_is_told_what_the_one_that_stopped_it_has_found(recorded: bool) -> None:
    work = Fake(0, 3)
    work.call(0, {0: 4, 1: 4, 2: 4})
    work.call(1, {1: 5})
    work.stop(0, TIMEOUT << 8 | 2)
    work.note(1, call=1, late_rank=2, token=3, stage=1)
    if recorded:
        work.fail(fault=TIMEOUT, rank=1, late_rank=3, call=0)
    with pytest.raises(CollectiveTimeout) as caught:
        work.check()
    assert caught.value.message.startswith("rank 1 waited 1.5 s for the reduced rows of rank 2, call 1, token 3 (all_reduce")
    assert caught.value.message.endswith("rank 2 made no such call")


@pytest.mark.parametrize("rank", [0xFFFFFFFF, 4])
def test_a_record_made_from_a_spoilt_stop_word_is_no_timeout(rank: int) -> None:
    """A kernel was stopped by a word that no kernel writes: a fault of nobody."""
    work = Fake(0, 2)
    work.call(0, {0: 4, 1: 4})
    work.stop(0, TIMEOUT << 8 | (rank + 1 & 0xFF))
    work.fail(fault=TIMEOUT, rank=rank, late_rank=2, call=0)
    with pytest.raises(CorruptedWorkspace, match="rank 0's abort flag has been written over"):
        work.check()


def test_the_least_difference_of_eps_is_a_difference() -> None:
    texts = set()
    for bits in (0x358637BD, 0x358637BE):
        (eps,) = struct.unpack("<f", struct.pack("<I", bits))
        entry = Entry.of(struct.pack("<6I2f", 1, 4, 64, 0, *pack("one_shot", request()), eps, 0.5))
        assert entry is not None
        texts.add(entry.text.split("norm(")[1])
    assert len(texts) == 2
    assert any(text.startswith("eps=1e-06, weight_offset=0.5)") for text in texts)


def test_what_cannot_be_read_is_not_called_absent(monkeypatch: pytest.MonkeyPatch) -> None:
    work = Fake(0, 2)
    work.call(0, {0: 4, 1: 4})
    read = work._read
    monkeypatch.setattr(work, "_read", lambda pointer, nbytes: b"" if pointer >> 20 else read(pointer, nbytes))
    work.fail(fault=TIMEOUT, rank=0, late_rank=1, call=0)
    with pytest.raises(CollectiveTimeout, match="rank 1 cannot be read"):
        work.check()
    assert work.journal().text().endswith("rank 1: could not be read")


def test_one_failure_writes_one_journal_and_says_if_it_cannot(journals: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    work = Fake(0, 2)
    work.call(0, {0: 4})
    work.fail(fault=TIMEOUT, rank=0, late_rank=1, call=0)
    hints = set()
    for _ in range(3):
        with pytest.raises(CollectiveTimeout) as caught:
            work.check()
        hints.add(caught.value.hint)
    assert len(hints) == len(list(journals.iterdir())) == 1
    (journals / "file").touch()
    monkeypatch.setenv("COLLOGUE_JOURNAL_DIR", str(journals / "file" / "x"))
    work._saved = None
    with pytest.raises(CollectiveTimeout) as caught:
        work.check()
    assert "The journal could not be written" in caught.value.hint


def test_a_timeout_names_who_when_and_what(journals: Path) -> None:
    work = Fake(0, 2)
    work.call(0, {0: 4, 1: 4})
    work.call(1, {0: 6})
    work.fail(fault=TIMEOUT, rank=0, late_rank=1, call=1, token=3, stage=1)
    with pytest.raises(CollectiveTimeout) as caught:
        work.check()
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
    assert "[waiting for the reduced rows of token 3 from rank 1]" in journal.text()


# Calls before the one that waits


@pytest.mark.parametrize(("stream", "kind"), [(7, MismatchedCall), (8, CollectiveTimeout)], ids=["one stream", "two streams"])
def test_a_timeout_says_where_the_late_rank_is(monkeypatch: pytest.MonkeyPatch, stream: int, kind: type[Exception]) -> None:
    """Two communicators that one rank calls in another order: each rank waits in another one."""
    first, second, third = (Fake(0, 2) for _ in range(3))
    for fake, name in ((first, "g/first"), (second, "g/second"), (third, "h/third")):
        fake.name, fake.stream = name, 7
    second.stream = stream
    third.group.name = "h"
    monkeypatch.setattr("collogue.gpu.workspace._OPEN", {first, second, third})
    for rank, calls in ((0, 3), (1, 4)):
        second.pages[rank][4:8] = struct.pack("<I", calls)
        third.pages[rank][4:8] = struct.pack("<I", 9 * rank)
    first.fail(fault=TIMEOUT, rank=0, late_rank=1, call=5, token=2, stage=0)
    with pytest.raises(kind, match="rank 1 is in call 3 of communicator 'g/second', which rank 0 has not made"):
        first.check()
    second.pages[0][4:8] = struct.pack("<I", 4)
    with pytest.raises(CollectiveTimeout) as raised:
        first.check()
    assert "of communicator" not in str(raised.value)
    second.stop(0, TIMEOUT << 8 | 2)
    second.note(1, call=3, late_rank=0)
    with pytest.raises(kind, match="rank 1 waited for rank 0 in call 3 of communicator 'g/second'"):
        first.check()


def test_a_timeout_after_calls_that_differ_is_a_mismatch() -> None:
    """Call 1 differs and hangs nobody; the next one does."""
    work = Fake(0, 3)
    work.call(0, {0: 4, 1: 4, 2: 4})
    work.call(1, {0: 4, 1: 4, 2: 7})
    work.call(2, {0: 4})
    work.fail(fault=TIMEOUT, rank=0, late_rank=2, call=2, token=1, stage=0)
    with pytest.raises(MismatchedCall) as caught:
        work.check()
    text = caught.value.message
    assert "calls number 1 differ, rank 0 found: rank 0 made all_reduce by one_shot, tokens=4" in text
    assert "rank 2 made all_reduce by one_shot, tokens=7" in text
    assert "then rank 0 waited 1.5 s for the partial sums of rank 2, call 2, token 1" in text


def test_who_is_stopped_after_calls_that_differ_sees_the_mismatch_too() -> None:
    work = Fake(2, 3)
    work.call(1, {0: 4, 1: 4, 2: 7})
    work.call(2, {2: 4})
    work.stop(2, TIMEOUT << 8 | 1)
    with pytest.raises(MismatchedCall, match=r"number 1 differ.*; then rank 0 gave up waiting and stopped the group"):
        work.check()


def test_a_timeout_after_calls_that_agree_is_a_timeout() -> None:
    """Marks of a call as many calls ago as there are places say nothing about it."""
    work = Fake(0, 2)
    for number in range(4):
        work.call(number, {0: 4, 1: 4})
    work.call(4, {0: 9})  # the place of call 0
    work.fail(fault=TIMEOUT, rank=0, late_rank=1, call=4, token=0, stage=0)
    with pytest.raises(CollectiveTimeout, match="call 4, token 0"):
        work.check()


def test_a_mismatch_that_a_kernel_found_is_of_the_first_call_that_differs() -> None:
    work = Fake(1, 2)
    work.call(1, {0: 4, 1: 5})
    work.call(2, {0: 4, 1: 5})
    work.fail(fault=MISMATCH, rank=0, late_rank=2, call=2, token=0, stage=0)
    with pytest.raises(MismatchedCall, match="number 1 differ, rank 0 found"):
        work.check()


# A stop word that no kernel has written


@pytest.mark.parametrize("word", [1, 3, TIMEOUT << 8, TIMEOUT << 8 | 3, 3 << 8 | 1, 1 << 20])
def test_a_stop_word_that_is_none_is_corruption(word: int) -> None:
    work = Fake(1, 2)
    work.call(0, {0: 4, 1: 4})
    work.stop(1, word)
    assert not work.failed
    assert work.stages(1) == ["started"]
    with pytest.raises(CorruptedWorkspace, match="rank 1's abort flag"):
        work.check()


def test_a_kernel_stopped_without_a_fault_makes_the_next_call_look() -> None:
    work = Fake(0, 2)
    work.call(0, {0: 4, 1: 4})
    work.stop(0, 1)
    work.fail(fault=0, rank=0, late_rank=2, call=1)
    assert work.failed
    with pytest.raises(CorruptedWorkspace):
        work.check()


@pytest.mark.parametrize("byte", [0x55, 0x80, 0xFF])
def test_a_page_written_over_is_corruption(byte: int) -> None:
    """Its journal makes no sense either."""
    work = Fake(1, 2)
    work.call(0, {0: 4, 1: 4})
    work.pages[1][:] = bytes([byte]) * CONTROL_BYTES
    with pytest.raises(CorruptedWorkspace, match="rank 1's abort flag"):
        work.check()


def test_a_journal_written_over_hides_no_failure() -> None:
    work = Fake(0, 2)
    work.call(0, {0: 4, 1: 4})
    work.pages[1][JOURNAL_OFFSET:] = bytes([0xFF]) * (CONTROL_BYTES - JOURNAL_OFFSET)
    work.fail(fault=TIMEOUT, rank=0, late_rank=1, call=1, token=0, stage=0)
    with pytest.raises(CollectiveTimeout, match="rank 1 made no such call"):
        work.check()


def test_an_unreadable_workspace_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    work = Fake(0, 2)
    monkeypatch.setattr(work, "_read", lambda pointer, nbytes: b"")
    with pytest.raises(PlatformError, match="cannot be read"):
        work.check()
    work.fail(fault=TIMEOUT, rank=0, late_rank=1, call=3)
    with pytest.raises(CollectiveTimeout, match="call 3"):
        work.check()


# Stages


def test_a_call_has_finished_if_a_later_one_has_started() -> None:
    work = Fake(0, 2)
    work.call(0, {0: 4, 1: 4})
    work.call(1, {0: 4})
    assert work.stages(0) == ["finished", "started"]
    assert work.stages(1) == ["started"]


def test_stages_of_a_rank_that_waited() -> None:
    work = Fake(0, 3)
    work.call(0, {0: 4, 1: 4, 2: 4})
    work.call(1, {0: 4, 1: 4})
    for rank in range(3):
        work.stop(rank, TIMEOUT << 8 | 1)
    work.fail(fault=TIMEOUT, rank=0, late_rank=2, call=1, token=3, stage=2)
    assert work.stages(0) == ["finished", "waiting for the start of token 3 from rank 2"]
    assert work.stages(1) == ["finished", "stopped by rank 0 unless it had finished"]
    assert work.stages(2) == ["stopped by rank 0 unless it had finished"]


def test_stages_of_a_rank_that_was_stopped() -> None:
    work = Fake(1, 2)
    work.call(0, {0: 4, 1: 4})
    work.call(1, {0: 4, 1: 4})
    work.stop(0, TIMEOUT << 8 | 1)
    work.fail(fault=TIMEOUT, rank=0, late_rank=2, call=1)
    assert work.stages(1) == ["finished", "stopped by rank 0"]
    assert work.stages(0) == ["finished", "started; it stopped the group"]
    work.note(0, call=1, late_rank=1, token=2)
    assert work.stages(0) == ["finished", "waiting for the partial sums of token 2 from rank 1"]
    work.fail(call=2)  # stopped before it began: not in the journal
    assert work.stages(1) == ["finished", "finished"]


def test_stages_of_a_mismatch() -> None:
    work = Fake(0, 2)
    work.call(0, {0: 4, 1: 4})
    work.call(1, {0: 4, 1: 5})
    work.fail(fault=MISMATCH, rank=0, late_rank=1, call=1)
    assert work.stages(0) == ["finished", "waiting for the partial sums; the arguments of rank 1 differ"]
    work.call(2, {0: 4, 1: 4})
    work.fail(stage=3)  # found in call 2: other warps may have been stopped
    assert work.stages(0) == ["finished", "finished", "started; it stopped the group"]


def test_a_journal_without_stages_is_read(tmp_path: Path) -> None:
    journal = Journal(0, 1, 1, {0: (Entry(0, "a call"),)})
    journal.save(tmp_path / "x.json")
    data = json.loads((tmp_path / "x.json").read_text())
    assert data["calls"]["0"][0].pop("stage") == ""
    (tmp_path / "x.json").write_text(json.dumps(data))
    assert Journal.load(tmp_path / "x.json") == journal
    assert journal.text().endswith("call 0: a call")


def test_no_two_journals_have_one_name(journals: Path) -> None:
    assert default_path(1) != default_path(1)
    assert default_path(1).parent == journals


def test_only_journals_are_loaded(tmp_path: Path) -> None:
    (tmp_path / "x.json").write_text("{}")
    with pytest.raises(ArgumentError, match="is not a journal"):
        Journal.load(tmp_path / "x.json")


def test_entries_name_every_argument() -> None:
    quant = MXFP8(rounding="ceil", layout="8x4")
    options = pack("sharded", request(quant, "reduce_scatter", torch.float16, residual=False, keep_norm=True, wide_weight=True))
    entry = Entry.of(struct.pack("<6I2f", 8, 5, 64, 3, *options, 1e-5, 1.0))
    assert entry is not None
    assert entry.call == 7
    for part in (
        "reduce_scatter by sharded",
        "float16",
        "eps=1e-05, weight_offset=1",
        "MXFP8 (8x4, group 32, ceil)",
        "keep_norm",
        "weight in float32",
        "from row 3",
    ):
        assert part in entry.text
    assert Entry.of(bytes(32)) is None


def test_entries_tell_what_an_all_gather_moves_and_what_bounds_scales() -> None:
    """Arguments of one call, put in when it is made."""
    first, second = pack("all_gather", request(FP8PerToken(), "all_gather", norm=False))

    def text(first: int, second: int) -> str:
        entry = Entry.of(struct.pack("<6I2f", 1, 5, 64, 0, first, second, 0.0, 0.0))
        assert entry is not None
        return entry.text

    moved = [text(moving(moving(first, "codes"), name), second) for name in ("reduced", "residual", "norm", "codes")]
    assert [one.split(" by ")[0] for one in moved] == [f"all_gather of {name}" for name in ("reduced", "residual", "norm", "codes")]
    assert "smallest 0.00195" in text(first, bounded(second, 2**-9))
    assert bounded(bounded(second, 0.01), 2**-9) == bounded(second, 2**-9)
    assert text(first, bounded(second, 1e-5)) != text(first, bounded(second, 1e-6))


def test_control_words_have_the_size_that_python_skips() -> None:
    assert ctypes.sizeof(ctypes.c_uint64) + 3 * 4 == CONTROL_WORDS
    assert Control.of(bytes(clean_control()[:JOURNAL_OFFSET])).marks[3][7] == (0, 0)


def test_an_entry_names_the_prologue() -> None:
    """Kind and K, which ranks must agree about; not what is each rank's own."""

    def text(form: PrologueForm | None, slots: int = 0) -> str:
        first, second = pack("two_shot", request(prologue=form))
        entry = Entry.of(struct.pack("<6I2f", 1, 5, 64, 0, combining(first, slots) if slots else first, second, 0.0, 0.0))
        assert entry is not None
        return entry.text

    assert "expert" not in text(None)
    combine = PrologueForm("expert_combine", "float32", shared=True)
    for slots in range(1, 17):
        assert f", expert_combine(top_k={slots}), " in text(combine, slots)
    assert text(combine, 3) == text(PrologueForm("expert_combine", "none"), 3)
    assert ", expert_reduce, " in text(PrologueForm("expert_reduce", "value", shared=True))

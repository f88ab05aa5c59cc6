"""Groups whose exchanges are only queued: late, dead and different ranks are found and named, and nothing compares on the host twice."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
from queued import SCENES, TIMEOUT, dying_rank, scenes_rank

from collogue.errors import CollectiveTimeout, MismatchedCall
from collogue.link.history import KEPT, History, Record, text_digest
from collogue.link.watchdog import explain
from collogue.testing.processes import run_processes


@pytest.fixture(scope="module")
def found() -> list[dict[str, Any]]:
    return run_processes(3, scenes_rank, silence=60)


#: Per scene: the error, words of its text, and seconds until it is there.
EXPECTED = {
    "late": ("CollectiveTimeout", "s in communicator 1 of group", "for rank 1, which has not called", TIMEOUT + 1.0),
    "late_gpu": ("CollectiveTimeout", "waited 1.5 s in", "for rank 1, whose GPU is late", TIMEOUT + 1.0),
    "other_order": ("MismatchedCall", "rank 0 called communicator 1 of", "eps=9.99999997e-07|eps=1e-06", 1.0),
    "other_size": ("MismatchedCall", "rank 0 called communicator 1", "tokens=2", 1.0),
    "one_is_new": ("MismatchedCall", "rank 1 communicator 1", "tokens=3", 1.0),
    "one_more": ("MismatchedCall", "", "rank 1", 1.0),
    "closed": ("CollectiveError", "has made a call for which rank 1 has closed", "", 1.0),
    "two": ("MismatchedCall", "rank 0 called communicator 1 of", "rank 1 communicator 2 of", 1.0),
}


@pytest.mark.slow
@pytest.mark.parametrize("scene", EXPECTED)
def test_scenes(found: list[dict[str, Any]], scene: str) -> None:
    name, first, second, seconds = EXPECTED[scene]
    texts = set()
    for rank, each in enumerate(found):
        kind, text, took, reset = each[scene]
        if (scene, rank) == ("closed", 1):
            continue
        assert kind == name, (rank, each[scene])
        assert first in text, (rank, each[scene])
        assert any(words in text for words in second.split("|")), (rank, each[scene])
        assert text.splitlines()[-1].startswith("hint: "), (rank, each[scene])
        assert "make a new one" in text, (rank, each[scene])
        assert took < seconds or (rank == 1 and scene == "late"), (rank, each[scene])
        assert reset == "PlatformError", (rank, each[scene])
        texts.add(text)
        assert each.get(f"{scene}, aborts", 1) == 1
    assert len(texts) == 1  # all ranks say the same


def test_every_scene_is_looked_at() -> None:
    assert {*SCENES} | {"two"} == {*EXPECTED}


@pytest.mark.slow
def test_calls_like_one_before_are_not_compared_on_the_host(found: list[dict[str, Any]]) -> None:
    for each in found:
        first, second = each["links"].index(""), each["links"][each["links"].index("") + 1 :]
        assert first >= 2
        assert second == [""]


@pytest.mark.slow
def test_what_is_found_before_anything_is_queued_leaves_the_group_usable(found: list[dict[str, Any]]) -> None:
    for each in found:
        assert each["new"][0] == "MismatchedCall"
        assert "rank 0 called with (all_reduce, tokens=5" in each["new"][1]
        assert each["aborts"] == 0


@pytest.mark.slow
def test_a_forked_child_and_threads(found: list[dict[str, Any]]) -> None:
    for each in found:
        assert each["fork"] == ["ClosedError"] * 3 + [""]
        assert each["threads"] == []


@pytest.mark.slow
@pytest.mark.parametrize("when", ["at once", "later"])
def test_a_dead_rank(when: str) -> None:
    told = run_processes(3, dying_rank, when, mortal=[2], silence=60)
    assert told[2] is None
    for kind, text, seconds, reset in told[:2]:
        assert kind == "CollectiveError"
        assert "rank 2" in text
        assert seconds < 2.5
        assert reset == "PlatformError"


# Without ranks


def history(*texts: str) -> History:
    made = History()
    for text in texts:
        made.add(text, text_digest(text))
    return made


def record(made: History, **values: Any) -> Record:
    return Record(made.count, made.digest, state="stopping", **values).of(made)


def test_digests_depend_on_the_order() -> None:
    one, other = history("a", "b", "c"), history("b", "a", "c")
    assert one.digest != other.digest
    assert one.digest == history("a", "b", "c").digest
    assert one.at(2) != other.at(2)


def test_histories_forget() -> None:
    made = History()
    for number in range(1, KEPT + 3):
        assert made.add(str(number), number) == number
    assert made.at(2) is None
    assert made.at(KEPT + 3) is None
    assert made.at(3) is not None
    assert [number for number, *_ in made.calls()] == list(range(3, KEPT + 3))


def test_records_travel() -> None:
    made = record(history("a", "b", "a"), waited=2, seconds=0.5, asking="c")
    assert dataclasses.replace(Record.unpack(made.pack()), calls=()) == dataclasses.replace(made, calls=())
    assert [tuple(each) for each in Record.unpack(made.pack()).calls] == made.calls


def test_what_ranks_say() -> None:
    same = history("a", "b")
    late = explain([record(same, waited=2, seconds=3.0), record(history("a")), record(same, reached=2)], [0, 1, 2])
    assert isinstance(late, CollectiveTimeout)
    assert late.message == "rank 0 waited 3 s in b for rank 1, which has not called"
    silent = explain([record(same, waited=2, seconds=3.0, reached=2), None, record(same, reached=2)], [0, 2])
    assert silent.message == "rank 0 waited 3 s in b for rank 1, which is silent"
    gpu = explain([record(same, reached=1), record(same, waited=2, seconds=3.0, reached=2)], [0, 1])
    assert gpu.message == "rank 1 waited 3 s in b for rank 0, whose GPU is late"
    stuck = explain([record(same, reached=2), record(same, waited=2, seconds=3.0, reached=2)], [0, 1])
    assert stuck.message.endswith("for rank 0, although all ranks have called and their GPUs have begun")
    differ = explain([record(same, waited=2, seconds=3.0), record(history("a"), asking="c")], [0, 1])
    assert isinstance(differ, MismatchedCall)
    assert differ.message == "call 2 of the group: rank 0 called b, rank 1 c"

"""Every error keeps its hint, and whatever else it carries, where it is pickled or copied."""

from __future__ import annotations

import copy
import pickle
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from typing import Any

import pytest

from collogue import errors
from collogue.errors import CollectiveTimeout, CollogueError, ShapeError
from collogue.testing.processes import RanksFailed

KINDS = [kind for kind in vars(errors).values() if isinstance(kind, type) and issubclass(kind, CollogueError)]


class Own(CollogueError):
    """An error of somebody else, made with other arguments."""

    def __init__(self, rank: int) -> None:
        super().__init__(f"rank {rank} is wrong", hint="look")
        self.rank = rank


@pytest.mark.parametrize("kind", [*KINDS, RanksFailed, Own], ids=lambda kind: kind.__name__)
@pytest.mark.parametrize(
    "again", [lambda e: pickle.loads(pickle.dumps(e)), lambda e: pickle.loads(pickle.dumps(e, 0)), copy.copy, copy.deepcopy]
)
def test_errors_again(kind: Any, again: Any) -> None:
    error = kind(3) if kind is Own else kind("x is y", hint="do z")
    error.extra = {"rank": [1, 2]}
    error.add_note("a note")
    found = again(error)
    assert type(found) is kind
    assert found is not error
    assert (str(found), found.args, vars(found)) == (str(error), error.args, vars(error))
    assert found.hint == error.hint
    assert again(found).hint == error.hint


def fail(name: str) -> None:
    raise getattr(errors, name)("x is y", hint="do z")


@pytest.mark.slow
def test_errors_out_of_processes() -> None:
    context = get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=context) as pool:
        with pytest.raises(ShapeError) as raised:
            pool.submit(fail, "ShapeError").result(60)
        assert raised.value.hint == "do z"
    with context.Pool(1) as workers, pytest.raises(CollectiveTimeout) as raised_there:
        workers.apply_async(fail, ("CollectiveTimeout",)).get(60)
    assert str(raised_there.value) == "x is y\nhint: do z"

"""Every entry of the reference has an example in its docstring, and it gives what it says. Names: docs/reference/index.md."""

from __future__ import annotations

import doctest
import inspect
import re
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
import torch.distributed as dist
from models import small_model

import collogue
import collogue.flashinfer
from collogue import errors
from collogue.contract import formats, reference

DOCS = Path(__file__).resolve().parents[3] / "docs"


def own(module: ModuleType) -> dict[str, Any]:
    """The public classes and functions that a module defines."""
    return {
        f"{module.__name__}.{name}": thing
        for name, thing in vars(module).items()
        if not name.startswith("_") and (inspect.isclass(thing) or inspect.isfunction(thing)) and thing.__module__ == module.__name__
    }


def entries() -> dict[str, Any]:
    """What the reference has an entry for, by name."""
    found = {f"collogue.{name}": getattr(collogue, name) for name in collogue.__all__}
    found |= {f"collogue.nn.{name}": getattr(collogue.nn, name) for name in collogue.nn.__all__}
    found |= {f"collogue.flashinfer.{name}": getattr(collogue.flashinfer, name) for name in collogue.flashinfer.__all__}
    found |= own(errors) | own(reference) | own(formats)
    methods = inspect.getmembers(collogue.Communicator, inspect.isfunction)
    found |= {f"collogue.Communicator.{name}": method for name, method in methods if not name.startswith("_")}
    return {name: thing for name, thing in found.items() if not isinstance(thing, ModuleType | tuple)}


#: Not a function but an object that is called: its example is a block of README.
COMPILE = "collogue.compile"
ENTRIES = {name: thing for name, thing in entries().items() if name != COMPILE}
ENTRIES |= {"collogue": collogue, "collogue.flashinfer": collogue.flashinfer}


@pytest.fixture(scope="module")
def group() -> Iterator[Any]:
    """One rank, in this process."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield dist.group.WORLD
    dist.destroy_process_group()


def run(name: str, text: str, group: Any) -> str:
    """What is wrong with the examples in ``text``."""
    with collogue.Communicator(group, max_tokens=16, hidden_size=64) as comm:
        names = {
            "torch": torch,
            "collogue": collogue,
            "group": group,
            "comm": comm,
            "partial": torch.ones(4, 64).bfloat16(),
            "residual": torch.zeros(4, 64).bfloat16(),
            "weight": torch.ones(64).bfloat16(),
            "model": small_model("llama") if "model" in text else None,
        }
        test = doctest.DocTestParser().get_doctest(text, names, name, None, None)
        assert test.examples, f"{name} has no example"
        said: list[str] = []
        doctest.DocTestRunner(verbose=False).run(test, out=said.append)
    return "".join(said)


@pytest.mark.parametrize("name", sorted(ENTRIES))
def test_an_entry_has_an_example_that_gives_what_it_says(name: str, group: Any) -> None:
    assert run(name, inspect.getdoc(ENTRIES[name]) or "", group) == ""


def test_an_example_that_gives_something_else_is_seen(group: Any) -> None:
    assert "Expected:" in run("wrong", ">>> comm.fits(17)\nTrue", group)
    assert "NameError" in run("wrong", ">>> com.fits(17)\nTrue", group)
    with pytest.raises(AssertionError, match="has no example"):
        run("none", "Whether a call fits.", group)


def test_what_has_no_docstring_is_in_a_block_of_a_page() -> None:
    pages = [*DOCS.rglob("*.md"), DOCS.parent / "README.md"]
    blocks = [block for page in pages for block in re.findall(r"```python\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL)]
    assert COMPILE in entries()
    assert f"{COMPILE}(" in "\n".join(blocks)
    assert f"{COMPILE}.report()" in "\n".join(blocks)

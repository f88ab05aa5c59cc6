"""Whether ``collogue.parallelize`` gives the unsharded model's logits, or an error and no change."""

from __future__ import annotations

import copy
import importlib
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from models import own
from torch import nn

import collogue
from collogue.errors import ArgumentError, CollogueError
from collogue.testing import VirtualGroup, run_virtual

TOKENS = torch.tensor([[1, 5, 9, 100], [3, 3, 7, 2]])

PEFT_FOLDER = next((f for f in sys.path if (Path(f) / "peft").is_dir()), None)
peft: Any = None if PEFT_FOLDER is None else importlib.import_module("peft")
with_peft = pytest.mark.skipif(PEFT_FOLDER is None, reason="peft is not installed")


def with_lora(model: Any, **options: Any) -> Any:
    torch.manual_seed(1)
    config = peft.LoraConfig(**{"target_modules": "all-linear", "r": 4, "init_lora_weights": False, **options})
    return peft.get_peft_model(model, config).eval()


def parallel_logits(model: Any, world_size: int = 2, **options: Any) -> torch.Tensor:
    """Of the sharded model, the same on every rank."""

    def rank(group: VirtualGroup) -> torch.Tensor:
        mine = collogue.parallelize(own(model), group, max_tokens=TOKENS.numel(), **options)
        with torch.no_grad():
            logits: torch.Tensor = mine(TOKENS).logits
        return logits

    found = run_virtual(world_size, rank)
    assert all(torch.equal(found[0], other) for other in found)
    return found[0]


def check_right(model: Any, world_size: int = 2) -> None:
    torch.testing.assert_close(parallel_logits(model, world_size), model(TOKENS).logits, rtol=1e-5, atol=1e-5)


def check_refused(model: Any, message: str, world_size: int = 2, error: type[CollogueError] = ArgumentError, **options: Any) -> None:
    """Every rank raises, and its model is unsharded, bit for bit."""
    expected = model(TOKENS).logits
    names = [name for name, _ in model.named_modules()]

    def rank(group: VirtualGroup) -> None:
        mine = own(model)
        with pytest.raises(error, match=message) as raised:
            collogue.parallelize(mine, group, max_tokens=TOKENS.numel(), **options)
        assert raised.value.hint
        assert torch.equal(mine(TOKENS).logits, expected)
        assert [name for name, _ in mine.named_modules()] == names
        assert not hasattr(mine, "comm")
        assert mine.state_dict()

    run_virtual(world_size, rank)


def parallel(model: Any, then: Callable[[Any], Any], world_size: int = 2, **options: Any) -> list[Any]:
    """What ``then`` returns of the parallel model, on every rank."""

    def rank(group: VirtualGroup) -> Any:
        return then(collogue.parallelize(copy.deepcopy(model), group, **{"max_tokens": TOKENS.numel()} | options))

    return run_virtual(world_size, rank)


def check_same(model: Any, change: Callable[[Any], Any], mode: Any = torch.no_grad) -> None:
    """The same change to the unsharded model gives the same logits. ``mode``: a thread's own, so every rank enters it."""

    def then(mine: Any) -> torch.Tensor:
        change(mine)
        with mode():
            logits: torch.Tensor = mine(TOKENS).logits
        return logits.clone()

    found = parallel(model, then)
    change(model)
    with mode():
        expected = model(TOKENS).logits
    for logits in found:
        torch.testing.assert_close(logits, expected, rtol=1e-5, atol=1e-5)


def replace(model: Any, wrap: Callable[[Any], nn.Module], *names: str) -> Any:
    """``wrap(module)`` in the place of every module whose name ends in one of ``names``."""
    for name, module in list(model.named_modules()):
        if name.endswith(names):
            model.set_submodule(name, wrap(module))
    return model

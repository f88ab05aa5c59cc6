"""When the compiled way asks for vLLM's option, on a stand-in of vLLM's modules."""

from __future__ import annotations

import sys
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from collogue.engines.vllm import compiled


@pytest.mark.parametrize(
    ("size", "invariant", "rocm", "there", "wanted"),
    [
        (2, False, False, True, True),
        (8, False, False, True, True),
        (1, False, False, True, False),
        (9, False, False, True, False),
        (2, True, False, True, False),
        (2, False, True, True, False),
        (2, False, False, False, False),
    ],
)
def test_the_option_is_asked_for_only_where_vllm_can_follow(
    size: int, invariant: bool, rocm: bool, there: bool, wanted: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """vLLM for CPUs lacks operators that its own pass names: with the option on, it would end at its start."""
    vllm: Any = ModuleType("vllm")
    vllm.envs = SimpleNamespace(VLLM_BATCH_INVARIANT=invariant)
    platforms: Any = ModuleType("vllm.platforms")
    platforms.current_platform = SimpleNamespace(is_rocm=lambda: rocm)
    monkeypatch.setitem(sys.modules, "vllm", vllm)
    monkeypatch.setitem(sys.modules, "vllm.platforms", platforms)
    monkeypatch.setattr(compiled, "_THEIRS", "json" if there else "collogue.not_there")
    assert compiled._wanted(SimpleNamespace(parallel_config=SimpleNamespace(tensor_parallel_size=size))) is wanted

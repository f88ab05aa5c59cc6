"""The GPU tests' migration, on the CPU: that its calls cover what they should, and that it runs and can fail."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from gpu import migration
from gpu.migration import DTYPES, FORMS, HIDDEN, TOKENS, TOKENS_VIRTUAL, WITH_NORM, Call, calls, case_of, in_place, migrate, quant_of

from collogue.testing import VirtualGroup, run_virtual
from collogue.tools.check.kernels import request_of

pytestmark = pytest.mark.slow

SMALL = calls((1, 3, 8, 17), (64, 128, 192))


@pytest.mark.parametrize("tokens", [TOKENS, TOKENS_VIRTUAL])
def test_every_pair_of_choices_is_called(tokens: tuple[int, ...]) -> None:
    made = calls(tokens)
    axes: dict[str, Sequence[Any]] = {"form": FORMS, "tokens": tokens, "hidden": HIDDEN, "dtype": DTYPES}
    chosen = [{"form": (c.pattern, c.layout, c.bias), "tokens": c.tokens, "hidden": c.hidden, "dtype": c.dtype} for c in made]
    for a, b in itertools.combinations(axes, 2):
        missed = set(itertools.product(axes[a], axes[b])) - {(c[a], c[b]) for c in chosen}
        assert not missed, (a, b, missed)
    assert {c.pattern for c in made} == {0, 1, 2, 3, 4, 5, 8, 9, 10, 11}


def test_kernels_are_built_for_what_is_called() -> None:
    """:func:`build_kernels` sees the calls as cases of the check; ``wanted`` and format must be those of the calls."""
    for call in calls(TOKENS_VIRTUAL):
        request, quant = request_of(case_of(call, 2)), quant_of(call)
        assert (request.quant.label if request.quant else None) == (quant.label if quant else None)
        assert request.wanted.norm == (call.pattern in WITH_NORM)
        assert request.residual == request.norm == (call.pattern != 0)


@pytest.mark.parametrize("world", [2, 3])
@pytest.mark.parametrize("old", [False, True])
def test_on_virtual_ranks(world: int, old: bool) -> None:
    assert run_virtual(world, lambda group: migrate(group, SMALL, old=old)) == [[]] * world


def test_in_place() -> None:
    def rank(group: VirtualGroup) -> list[str]:
        return in_place(group, Call(5, 64, DTYPES[0], 1))

    assert run_virtual(2, rank) == [[], []]


@pytest.mark.parametrize("name", ["norm_out", "residual_out", "quant_out", "scale_out"])
def test_a_wrong_output_is_seen(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    right = migration.unified

    def wrong(workspace: Any, call: Call, inputs: dict[str, torch.Tensor], out: dict[str, torch.Tensor]) -> None:
        right(workspace, call, inputs, out)
        out[name][-1:].view(torch.uint8).bitwise_xor_(1)

    monkeypatch.setattr(migration, "unified", wrong)
    call = Call(5, 64, DTYPES[0], 5)
    assert run_virtual(2, lambda group: migrate(group, [call])) == [[f"{call}: {name}"]] * 2

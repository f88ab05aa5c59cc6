"""A deferred sum: whatever reads it gets the sum, taken once and at that moment; nothing reads the term."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from collogue.engines.vllm.deferred import Deferred, owns_its_memory


class Reduce:
    """An all-reduce that counts, of two ranks with equal terms."""

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self, term: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        return term * 2


def deferred() -> tuple[Deferred, torch.Tensor, Reduce]:
    term, reduce = torch.arange(12.0).view(3, 4), Reduce()
    return Deferred(term, reduce), term * 2, reduce


READS: dict[str, Callable[[torch.Tensor], Any]] = {
    "sum": lambda x: x + 1,
    "right operand": lambda x: torch.ones(3, 4) + x,
    "function": torch.nn.functional.silu,
    "copy": lambda x: torch.zeros(3, 4).copy_(x),
    "into": lambda x: torch.zeros(3, 4).add_(x),
    "out": lambda x: torch.add(x, x, out=torch.empty(3, 4)),
    "list": lambda x: torch.cat([x, x]),
    "index": lambda x: x[1:],
    "assignment": lambda x: torch.zeros(3, 4).index_put_((torch.tensor([0, 1, 2]),), x),
    "view": lambda x: x.view(12),
    "transpose": lambda x: x.t(),
    "clone": lambda x: x.clone(),
    "detach": lambda x: x.detach(),
    "data": lambda x: x.data,
    "conversion": lambda x: x.to(torch.float64),
    "contiguous": lambda x: x.clone(memory_format=torch.contiguous_format),
    "linear": lambda x: torch.nn.functional.linear(x, torch.ones(2, 4)),
    "einsum": lambda x: torch.einsum("ij,kj->ik", x, torch.ones(2, 4)),
    "vmap": lambda x: torch.vmap(lambda row: row * 2)(x),
    "numpy": lambda x: torch.from_numpy(np.array(x.numpy())),
    "array": lambda x: torch.from_numpy(np.array(np.asarray(x))),
    "tolist": lambda x: torch.tensor(x.tolist()),
    "dlpack": lambda x: torch.from_dlpack(x).clone(),
    "deepcopy": copy.deepcopy,
    "pointer": lambda x: torch.tensor(x.data_ptr() != 0),
}


@pytest.mark.parametrize("read", READS.values(), ids=READS.keys())
@pytest.mark.parametrize("inference", [False, True])
def test_every_reader_gets_the_sum(read: Callable[[torch.Tensor], Any], inference: bool) -> None:
    with torch.inference_mode(inference):
        x, summed, reduce = deferred()
        found = read(x)
        assert reduce.calls == 1
        assert not isinstance(found, Deferred)
        assert torch.equal(found, read(summed))
        assert torch.equal(read(x), read(summed))
        assert reduce.calls == 1


def test_scalars_and_control_flow_read_the_sum() -> None:
    x, summed, _ = deferred()
    assert bool((x > 21).any())
    assert float(x.sum()) == float(summed.sum())
    assert x[2, 3].item() == 22


def test_in_place_operators_change_the_sum_and_every_name_of_it() -> None:
    x, summed, reduce = deferred()
    alias = x.view(3, 4)
    x.mul_(3)
    x += 1
    assert torch.equal(x + 0, summed * 3 + 1)
    assert torch.equal(alias + 0, summed * 3 + 1)
    row = x[0]
    row.zero_()
    assert torch.equal(x[0] + 0, torch.zeros(4))
    assert reduce.calls == 1


def test_changing_the_shape_in_place_is_refused() -> None:
    x, _, _ = deferred()
    with pytest.raises(RuntimeError, match="shape of a deferred sum"):
        x.t_()


def test_operators_in_cpp_get_the_sum() -> None:
    """Custom operators, also those written without PyTorch's Python bindings, come through the dispatcher."""
    library = torch.library.Library("collogue_test_deferred", "DEF")
    library.define("twice(Tensor x) -> Tensor")
    library.impl("twice", lambda x: torch.from_numpy(x.numpy() * 2), "CPU")
    x, summed, _ = deferred()
    assert torch.equal(torch.ops.collogue_test_deferred.twice(x), summed * 2)


@torch.inference_mode()
def test_what_asks_only_for_the_form_takes_no_sum() -> None:
    x, summed, reduce = deferred()
    assert (x.shape, x.dtype, x.device, x.stride(), x.is_contiguous()) == (summed.shape, summed.dtype, summed.device, summed.stride(), True)
    assert "not yet taken" in f"{x!r} {x}"
    views = [x.view(3, 4), x.view(-1, 4), x.view(torch.float32)]
    assert all(isinstance(view, Deferred) and view.pending for view in views)
    assert reduce.calls == 0
    assert torch.equal(views[0] + 0, summed)
    assert not x.pending
    assert torch.equal(views[1] + x, summed * 2)
    assert reduce.calls == 1


def test_a_sum_that_was_made_by_the_way_is_kept() -> None:
    x, _, reduce = deferred()
    x.keep(torch.ones(3, 4))
    assert not x.pending
    assert torch.equal(x + 0, torch.ones(3, 4))
    assert reduce.calls == 0


def test_memory_that_others_have_is_seen() -> None:
    buffer = torch.empty(8, 4)
    assert owns_its_memory(buffer)
    assert not owns_its_memory(buffer[:3])
    part = buffer[:3]
    assert not owns_its_memory(buffer)
    del part
    assert owns_its_memory(buffer)
    assert not owns_its_memory(torch.nn.Parameter(torch.empty(2)))
    with torch.inference_mode():
        assert owns_its_memory(torch.nn.functional.linear(torch.ones(2, 4), torch.ones(3, 4)))

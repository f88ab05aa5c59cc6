"""Quantization without a group, as a GPU runs it: an engine for each thread, whose launches run in the emulator."""

from __future__ import annotations

import threading
from typing import Any

import pytest
import torch
from emulated import emulate_launches
from samples import DTYPES, every_format, wild

from collogue.calls.product import ScaledProduct
from collogue.contract import reference
from collogue.contract.prologue import Gated
from collogue.contract.quant import MXFP8, NVFP4, FP8Group, FP8PerToken, Quant
from collogue.errors import DTypeError, FormatError, GradError, NotPrepared, ShapeError
from collogue.gpu import alone
from collogue.gpu.order import AnyOrder
from collogue.planning import topology
from collogue.testing.compare import compare

CPU = torch.device("cpu")


@pytest.fixture
def facts(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """The CPU is taken for a GPU, and no engine was made yet. Whether a graph is being captured is the list's last entry."""
    capturing = [False]
    known = {"architecture": "sm_90a", "device": "NVIDIA H200", "multiprocessors": 132, "fitting": None}
    monkeypatch.setattr(topology, "_gpu", lambda device: known)
    monkeypatch.setattr(alone, "_shared", {})
    monkeypatch.setattr(alone, "_engines", alone._Engines())
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: capturing[-1])
    return capturing


@pytest.fixture
def gpu(facts: list[bool], monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Its kernels run in the emulator. Returns the names of those that are built."""
    return emulate_launches(monkeypatch, tmp_path_factory.getbasetemp().parent / "emulator")


def check(y: torch.Tensor | Gated, quant: Quant | None) -> None:
    for name, difference in compare(alone.finish(y, quant), reference.finish_alone(y, quant)).items():
        assert not difference.count, (name, difference.first)


@pytest.mark.slow
@pytest.mark.parametrize("quant", every_format(64), ids=lambda quant: quant.label)
def test_the_bits_are_the_references(quant: Quant, gpu: list[str]) -> None:
    for seed, dtype in enumerate(DTYPES):
        check(wild(3, 576, seed=seed, dtype=dtype), quant)
        check(Gated.of(wild(2, 1152, seed=seed, dtype=dtype)), quant)
    assert len(gpu) == 6
    assert sum("gated" in name for name in gpu) == 3


@pytest.mark.slow
def test_values_without_a_format(gpu: list[str]) -> None:
    check(Gated.of(wild(3, 528)), None)
    check(Gated(wild(1, 264), wild(1, 264, seed=1)), None)
    assert gpu == ["collogue_gated_local_1_sum"]


@pytest.mark.slow
def test_products_are_scaled(gpu: list[str]) -> None:
    """The same bits, also where scales and a bias start at an address that kernels cannot read, and where scales lie apart."""
    for seed, dtype in enumerate(DTYPES):
        engine, (scales, bias) = alone.engine_of(CPU, dtype), wild(2, 584, seed=seed, dtype=torch.float32).abs()
        columns = scales[1:577].view(-1, 1)
        for given in (None, bias[1:577].to(dtype), bias.to(dtype)[3:579]):
            product = ScaledProduct(wild(3, 576, seed=seed, dtype=torch.float32), bias[5:11:2].view(-1, 1), columns, given, dtype)
            found = engine.scale(product)
            assert found.dtype == dtype
            assert torch.equal(found.view(torch.uint8), product.values().view(torch.uint8))
        assert torch.equal(engine.one, torch.ones(1))
    assert gpu == ["collogue_product_local_1_sum"] * 6


@pytest.mark.slow
def test_rows_that_kernels_cannot_read_are_copied_first(gpu: list[str]) -> None:
    quant, x = FP8PerToken(), wild(4, 1160)
    check(x[:, 4:580], quant)  # an address between two vectors, and rows apart
    check(wild(576, 4).t(), quant)
    learned = x[:, :576].float().requires_grad_()
    with torch.no_grad():
        check(learned, quant)
    with pytest.raises(GradError, match="n requires grad"):  # though the call before was like it
        alone.finish(learned, quant)
    check(Gated(x[:, 4:580], x[:, 580:1156]), quant)
    check(Gated(x[:, :576].contiguous(), wild(4, 1154)[:, :576].contiguous()), quant)
    check(Gated(wild(4, 1156)[:, :576], wild(4, 1156, seed=1)[:, :576]), quant)  # rows that lie 1156 elements apart
    assert gpu


def test_what_has_no_kernel_is_left_to_the_reference(gpu: list[str]) -> None:
    """Odd widths, wide rows, no rows, a scale on another device; and what cannot be right is the reference's error."""
    check(wild(2, 36), FP8PerToken())
    check(Gated.of(wild(2, 72)), None)
    check(wild(1, 32776), FP8PerToken())
    check(wild(1, 16416), FP8Group(48))
    check(wild(0, 64), MXFP8("ceil"))
    elsewhere = NVFP4(torch.empty((), device="meta"))
    with pytest.raises(NotImplementedError):  # the reference, which moves it
        alone.finish(wild(2, 64), elsewhere)
    for error, x in ((FormatError, wild(2, 40)), (ShapeError, wild(64)), (DTypeError, wild(2, 64).double())):
        with pytest.raises(error):
            alone.finish(x, MXFP8("ceil"))
    assert gpu == []


def test_every_thread_has_its_engine_and_shares_what_is_loaded(facts: list[bool]) -> None:
    mine = alone.engine_of(CPU, torch.float32)
    assert alone.engine_of(CPU, torch.float32) is mine
    assert alone.engine_of(CPU, torch.float16) is not mine
    found: list[Any] = []
    thread = threading.Thread(target=lambda: found.append(alone.engine_of(CPU, torch.float32)))
    thread.start()
    thread.join()
    assert found[0] is not mine
    assert found[0]._kernels is mine._kernels
    assert found[0].topology is mine.topology
    assert isinstance(mine._order, AnyOrder)


def test_under_capture(facts: list[bool], monkeypatch: pytest.MonkeyPatch) -> None:
    """The first call of a GPU and dtype, and a kernel that is not loaded; another thread's engine may be made."""
    facts.append(True)
    with pytest.raises(NotPrepared, match=r"no rows of torch.float32 have been quantized") as caught:
        alone.finish(torch.ones(1, 64), FP8PerToken())
    assert "once before the capture" in caught.value.hint
    facts.append(False)
    alone.engine_of(CPU, torch.float32)
    facts.append(True)
    monkeypatch.setattr(alone, "_engines", alone._Engines())
    monkeypatch.setattr(torch._C, "_cuda_getDevice", lambda: None, raising=False)
    with pytest.raises(NotPrepared, match="is not loaded") as caught:
        alone.finish(torch.ones(1, 64), FP8PerToken())
    assert caught.value.hint == "make such a call once before the capture"

"""Terms in a low-precision format on the wire: bits, bytes, engines of CPU groups. Mistakes are at the end."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from islands import check_wire, wrong
from ranks import HIDDEN_SIZE, communicator
from samples import DTYPES, same, wild

import collogue
from collogue import MXFP4, MXFP8, NVFP4, FP8Group, FP8PerToken, FP8Static, Quant, reference
from collogue.contract.formats import read_scales
from collogue.contract.wire import pack, row_bytes, unpack
from collogue.errors import ArgumentError, FormatError, UnsupportedError
from collogue.planning.topology import choose
from collogue.testing import VirtualGroup, run_virtual
from collogue.testing.oracle import by_reference

WIRES: list[Quant] = [
    FP8Group(32),
    FP8Group(32, "ue8m0", "column"),
    FP8Group(64, layout="column"),
    FP8PerToken(),
    FP8PerToken(2.0**-9),
    MXFP8("ceil"),
    MXFP8("floor", "8x4"),
]
by_wire = pytest.mark.parametrize("wire", WIRES, ids=str)


def decoded(term: torch.Tensor, wire: Quant) -> np.ndarray[Any, Any]:
    """Codes times scales, by PyTorch's casts and numpy."""
    codes, scales = collogue.quantize(term, wire)
    assert scales is not None
    values = codes.float().numpy()
    stored = read_scales(scales, wire, *term.shape).contiguous()
    factors = stored.view(torch.float8_e8m0fnu).float().numpy() if stored.element_size() == 1 else stored.numpy()
    result: np.ndarray[Any, Any] = values * np.repeat(factors, term.shape[1] // factors.shape[1], axis=1)
    return result


@by_wire
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("islands", [None, [[0, 1], [2]]], ids=["rank order", "islands"])
def test_every_term_is_quantized_and_decoded(wire: Quant, dtype: torch.dtype, islands: Any) -> None:
    partials, residual = [wild(5, 128, seed=s, dtype=dtype) for s in range(3)], wild(5, 128, seed=7, dtype=dtype)
    terms = [decoded(partial, wire) for partial in partials]
    zero = np.zeros_like(terms[0])
    total = zero + terms[0] + terms[1] + terms[2] if islands is None else zero + (zero + terms[0] + terms[1]) + (zero + terms[2])
    y = (torch.from_numpy(total) + residual.float()).to(dtype) + 0.0
    out = reference.all_reduce(partials, residual=residual, wire=wire, islands=islands)
    assert same(out.residual, y)
    assert not same(out.residual, reference.all_reduce(partials, residual=residual, islands=islands).residual)


@by_wire
def test_bytes_are_codes_and_scales_and_nothing_else(wire: Quant) -> None:
    term = wild(5, 128)
    codes, scales = collogue.quantize(term, wire)
    assert scales is not None
    packed = pack(codes, scales, wire)
    assert packed.shape == (5, row_bytes(wire, 128))
    assert packed.dtype == torch.uint8
    assert same(unpack(packed, wire, 128), collogue.dequantize(*collogue.quantize(term, wire), wire, hidden_size=128))
    assert same(unpack(packed[2:4], wire, 128), unpack(packed, wire, 128)[2:4])


def test_special_values() -> None:
    """NaN stays NaN, infinity saturates as the format says, -0 adds nothing."""
    term = torch.zeros(1, 64)
    term[0, :4] = torch.tensor([torch.nan, torch.inf, -torch.inf, -0.0])
    got = reference.all_reduce([term, torch.zeros(1, 64)], wire=MXFP8("ceil")).reduced
    assert got is not None
    assert torch.isnan(got[0, 0])
    assert got[0, 1] == -got[0, 2] > 0
    assert same(got[0, 3:], torch.zeros(61))


@by_wire
@pytest.mark.parametrize("algorithm", ["one_shot", "two_shot"])
@pytest.mark.parametrize("hosts", ["aaa", "aab", "abab"])
def test_groups_equal_the_reference(wire: Quant, algorithm: Any, hosts: str) -> None:
    def rank(group: VirtualGroup) -> list[str]:
        return check_wire(communicator(group, algorithm=algorithm, wire=wire), 5)

    assert [text for found in run_virtual(len(hosts), rank, hosts=list(hosts)) for text in found] == []


def test_explain_says_what_it_saves() -> None:
    def rank(group: VirtualGroup) -> tuple[int, int, str]:
        plain, less = communicator(group, algorithm="one_shot"), communicator(group, algorithm="one_shot", wire=FP8Group(64))
        return plain.explain(8).bytes_sent, less.explain(8).bytes_sent, str(less.explain(8))

    for plain, less, text in run_virtual(3, rank):
        assert (plain, less) == (2 * 8 * 2 * HIDDEN_SIZE, 2 * 8 * (HIDDEN_SIZE + 4))
        assert "terms travel as fp8_group64" in " ".join(text.split())


# ---- mistakes


@pytest.mark.parametrize("wire", [NVFP4(1.0), MXFP4("ceil"), FP8Static(1.0), FP8Group, "fp8"], ids=str)
def test_what_no_term_travels_in(wire: Any) -> None:
    def rank(group: VirtualGroup) -> None:
        with pytest.raises(FormatError, match="expected an object of FP8Group, FP8PerToken, MXFP8"):
            reference.all_reduce([torch.zeros(1, 64)], wire=wire)
        with pytest.raises(FormatError, match="expected an object of FP8Group, FP8PerToken, MXFP8\nhint: pass a format"):
            communicator(group, wire=wire)

    run_virtual(2, rank)


def test_a_width_that_is_no_multiple_and_ranks_that_differ() -> None:
    def rank(group: VirtualGroup) -> None:
        with pytest.raises(FormatError, match="hidden size 64 is not a multiple"):
            communicator(group, wire=FP8Group(128))
        comm = communicator(group, wire=FP8Group(32), hidden_size=96)
        calls = lambda: comm.all_reduce(wild(2, 80)), lambda: comm.all_reduce(wild(0, 80)), lambda: comm.prepare(2, hidden_size=80)
        for call in (*calls, lambda: comm.empty(2, hidden_size=80), lambda: comm.explain(2, hidden_size=80)):
            with pytest.raises(FormatError, match=r"the communicator's wire=.*hidden size 80 is not a multiple"):
                call()
        comm.all_reduce(wild(2, 96))
        with pytest.raises(ArgumentError, match="wire=FP8PerToken"):
            communicator(group, wire=FP8PerToken() if group.rank else None)

    run_virtual(2, rank)


def test_kernels_that_write_to_peers_send_terms_as_they_are() -> None:
    reached = [{0, 1}, {0, 1}]
    way, why = choose(None, ["a", "a"], reached, gpus=True, wire=FP8PerToken())
    assert (way, why) == ("host", "terms travel as fp8_per_token, which peer kernels do not send")
    assert choose("host", ["a", "a"], reached, gpus=True, wire=FP8PerToken()) == ("host", "asked for")
    with pytest.raises(UnsupportedError, match='with transport="peer": kernels that write to peers send terms as they are'):
        choose("peer", ["a", "a"], reached, gpus=True, wire=FP8PerToken())


def test_without_a_wire_nothing_changes() -> None:
    partials = [wild(3, 64, seed=s) for s in range(2)]
    assert wrong(reference.all_reduce(partials, wire=None), by_reference(partials, None, None, None, False)) == []

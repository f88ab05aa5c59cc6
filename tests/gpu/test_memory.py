"""Memory: the program that `scripts/sanitize.sh` watches gives right outputs, and tensors may be larger than 4 GiB."""

from __future__ import annotations

import pytest
import torch
from gpu import sanitized

from collogue import Communicator, FP8PerToken, RMSNorm, reference
from collogue.contract.spec import Output
from collogue.testing import VirtualGroup, run_virtual
from collogue.testing.compare import compare_tensors
from collogue.testing.inputs import make_inputs, make_partials

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU"), pytest.mark.timeout(300)]

#: Values of 4.9 GB: offsets in bytes pass 2**32 at row 131072, offsets in elements pass 2**31 there.
TOKENS, WIDTH = 150_000, 16384
#: First and last rows, rows on both sides of 2**31 and 2**32 bytes, and where the second owner's rows begin.
ROWS = (0, 1, 65535, 65536, 74999, 75000, 131071, 131072, TOKENS - 1)
NEEDED = 48 << 30


@pytest.mark.parametrize("world", [2, 3])
def test_the_program_for_the_sanitizer(world: int) -> None:
    assert sanitized.run(world, "cuda:0") == [[]] * world


@pytest.mark.skipif(torch.cuda.is_available() and torch.cuda.mem_get_info(0)[0] < NEEDED, reason="needs 48 GiB of free GPU memory")
def test_tensors_beyond_four_gigabytes() -> None:
    assert TOKENS * WIDTH * 2 > 2**32
    try:
        assert run_virtual(2, large, device="cuda:0", timeout=120.0) == [[], []]
    finally:
        torch.cuda.empty_cache()


def large(group: VirtualGroup) -> list[str]:
    """Zeros but for :data:`ROWS`; every operation, whose rows are compared and whose other rows must be zeros."""
    device, wrong = group.device, list[str]()
    quant, rows = FP8PerToken(), torch.tensor(ROWS, device=device)
    shape = {"tokens": len(ROWS), "hidden_size": WIDTH, "dtype": torch.bfloat16, "seed": 1, "device": device}
    partials = make_partials("normal", 2, **shape)  # type: ignore[arg-type]
    norm = RMSNorm(make_inputs("normal", rank=0, **shape).weight)  # type: ignore[arg-type]
    expected = reference.all_reduce(partials, norm=norm, quant=quant, keep_norm=True)
    partial = torch.zeros(TOKENS, WIDTH, dtype=torch.bfloat16, device=device)
    partial[rows] = partials[group.rank]
    out = Output(
        residual=torch.empty_like(partial),
        norm=torch.empty_like(partial),
        codes=torch.empty(TOKENS, WIDTH, dtype=torch.float8_e4m3fn, device=device),
        scales=torch.empty(TOKENS, 1, dtype=torch.float32, device=device),
    )
    comm = Communicator(group, max_tokens=TOKENS, hidden_size=WIDTH, timeout=60.0)
    for operation in ("all_reduce", "sharded", "reduce_scatter"):
        comm.prepare(TOKENS, residual=False, norm=norm, quant=quant, keep_norm=True, operation=operation)  # type: ignore[arg-type]
    comm.prepare(TOKENS, operation="all_gather")
    assert out.residual is not None
    assert out.norm is not None
    assert out.codes is not None
    assert out.scales is not None
    owned = comm.owned_rows(TOKENS)
    mine, whole = len(owned), Output(**dict(out.items()))
    sharded = Output(residual=out.residual[:mine], norm=out.norm, codes=out.codes, scales=out.scales)
    half = Output(residual=out.residual[:mine], norm=out.norm[:mine], codes=out.codes[:mine], scales=out.scales[:mine])

    def compare(what: str, name: str, found: torch.Tensor, first: int = 0) -> None:
        """``found`` holds rows ``first`` and on."""
        of_interest = [(i, row - first) for i, row in enumerate(ROWS) if 0 <= row - first < len(found)]
        index = torch.tensor([row for _, row in of_interest], device=device)
        right = getattr(expected, name)[[i for i, _ in of_interest]]
        difference = compare_tensors(name, found.view(torch.uint8)[index].view(found.dtype), right)
        if difference.count:
            wrong.append(f"rank {group.rank}, {what}: {difference.count} differ, first {difference.first}")
        if name != "scales":
            least = int(right.float().count_nonzero())
            nonzero = sum(int(part.view(torch.uint8).any(dim=1).sum()) for part in found.split(16384))
            if least and nonzero != len(of_interest):
                wrong.append(f"rank {group.rank}, {what}, {name}: {nonzero} rows are not zeros, {len(of_interest)} should not be")

    def spoil() -> None:
        for _, tensor in out.items():
            tensor.view(torch.uint8).fill_(0xA5)
        group.settle()

    spoil()
    comm.all_reduce(partial, norm=norm, quant=quant, keep_norm=True, out=whole)
    group.settle()
    for name, tensor in whole.items():
        compare("all_reduce", name, tensor)
    spoil()
    comm.all_reduce(partial, norm=norm, quant=quant, keep_norm=True, sharded=True, out=sharded)
    group.settle()
    for name, tensor in sharded.items():
        compare("sharded", name, tensor, owned.start if name == "residual" else 0)
    spoil()
    comm.reduce_scatter(partial, norm=norm, quant=quant, keep_norm=True, out=half)
    group.settle()
    for name, tensor in half.items():
        compare("reduce_scatter", name, tensor, owned.start)
    group.settle()
    comm.all_gather(Output(residual=half.residual), TOKENS, out=Output(residual=out.norm))
    group.settle()
    compare("all_gather", "residual", out.norm)
    comm.check()
    group.settle()
    comm.close()
    return wrong

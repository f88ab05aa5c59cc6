"""The numbers by which ranks compare their weights."""

from __future__ import annotations

import pytest
import torch

from collogue.pytorch import checksum
from collogue.pytorch.checksum import checksums


@pytest.mark.parametrize("size", [1, 7, 8, 9, 64, 1000])
def test_every_byte_counts(size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checksum, "_CHUNK", 16)
    given = torch.randint(0, 256, (size,), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    changed = {"as it is": given}
    for at in {0, 5 % size, size // 2, size - 1}:
        changed[f"byte {at}"] = given.clone()
        changed[f"byte {at}"][at] ^= 128
    if size > 8:
        changed["turned"] = given.flip(0)
    assert len(set(checksums(changed).values())) == len(changed)


def test_only_bits_count() -> None:
    values = torch.randn(6, 33, generator=torch.Generator().manual_seed(0))
    same = {"values": values, "view": torch.cat((values[:1], values))[1:], "strided": values.t().contiguous().t()}
    assert len(set(checksums(same).values())) == 1
    found = checksums({"bfloat16": values.bfloat16(), "codes": values.to(torch.float8_e4m3fn), "flags": values > 0, "one": values[0, 0]})
    assert len(set(found.values())) == 4
    assert checksums({"none": values[:0], "meta": values.to("meta")}).keys() == {"none"}

"""Plans, parameters and journals of rows that ranks do not own evenly."""

from __future__ import annotations

import math
import struct
from dataclasses import replace

import pytest
import torch

from collogue.calls.capacity import Capacity
from collogue.calls.request import Request
from collogue.contract.quant import NVFP4, Quant
from collogue.contract.spec import OWNING, Operation
from collogue.gpu.header import Entry, pack
from collogue.gpu.launch import Params
from collogue.gpu.parameters import fill_shape, later_launches
from collogue.gpu.workspace import BOUNDS, BOUNDS_OFFSET, JOURNAL_OFFSET, clean_control
from collogue.gpu.workspace import _entries as entries
from collogue.planning import explain as plans
from collogue.planning.plan import make_kernels, make_plan
from collogue.planning.topology import Topology


def request(rows: tuple[int, ...] | None, operation: Operation = "sharded", quant: Quant | None = None) -> Request:
    world = 4 if rows is None else len(rows)
    tokens = 8 if rows is None else sum(rows)
    capacity = Capacity(4096, 7168, torch.bfloat16, torch.device("cpu"), world)
    return capacity.request(tokens, True, True, quant, False, None, operation, rows=rows)


def topology(world: int) -> Topology:
    return Topology(world, 4096, 7168, torch.bfloat16, "sm_90a", 132, 1)


@pytest.mark.parametrize("operation", OWNING)
def test_one_kernel_does_all_counts(operation: Operation) -> None:
    """And not the kernel of equal blocks."""
    made = []
    for rows in ((2, 2, 2, 2), (8, 0, 0, 0), (0, 1, 3, 0), None):
        asked = request(rows, operation)
        made.append([kernel.variant for kernel in make_kernels(topology(4), asked, make_plan(topology(4), asked))])
    assert made[0] == made[1] == made[2] != made[3]
    assert [replace(variant, uneven=False) for variant in made[0]] == made[3]
    assert all("uneven" in variant.name and "bool kUneven = true" in variant.source() for variant in made[0])


@pytest.mark.parametrize("operation", OWNING)
def test_the_largest_block_decides(operation: Operation) -> None:
    """How many launches, and how many clusters in each; every launch has a row of some rank, and the last writes the padding."""
    for rows in ((1024, 1024, 1024, 1024), (4096, 0, 0, 0), (0, 2000, 96, 2000)):
        asked = request(rows, operation, NVFP4(2.0))
        plan = make_plan(topology(4), asked)
        assert plan.shape is not None
        assert (plan.launches - 1) * plan.rows < max(rows) <= plan.launches * plan.rows
        later = later_launches(topology(4), asked, plan, 1)
        counts = [plan.rows, *(count for _, count, _ in later)][: plan.launches]
        assert sum(counts[:-1]) + min(counts[-1], max(rows) - sum(counts[:-1])) == max(rows)
        assert all(count >= plan.shape.clusters for count in counts if plan.launches > 1)
        assert plan.workspace_bytes <= make_plan(topology(4), request((1024,) * 4, operation, NVFP4(2.0))).workspace_bytes * 4


def test_bytes_are_those_of_the_rank_that_sends_most() -> None:
    row = 2 * 7168
    for rows in ((3, 0, 5, 1), (9, 0, 0, 0), (2, 2, 2, 2)):
        tokens = sum(rows)
        scatter, gather, both = (
            make_plan(topology(4), request(rows, operation)) for operation in ("reduce_scatter", "all_gather", "sharded")
        )
        assert scatter.bytes_sent == (tokens - min(rows)) * row
        assert gather.bytes_sent == 3 * max(rows) * row
        assert both.bytes_sent == max(tokens - own + 3 * own for own in rows) * row
        # What arrives at one rank is waited for as well.
        received = max(scatter.bytes_sent, 3 * max(rows) * row)
        assert math.isclose(scatter.floor_us, 1.23 + received / 367e3)
        assert f"; {min(rows)} to {max(rows)} rows each" in both.why
    even = make_plan(topology(4), request(None))
    assert even.bytes_sent == make_plan(topology(4), request((2, 2, 2, 2))).bytes_sent
    assert "rows each" not in even.why


@pytest.mark.parametrize("rank", range(3))
def test_the_table_in_the_parameters(rank: int) -> None:
    rows = (3, 0, 6)
    asked = request(rows, "reduce_scatter")
    params = Params()
    fill_shape(params, topology(3), asked, make_plan(topology(3), asked), rank)
    assert list(params.bounds) == [0, 3, 3, 9, 9, 9, 9, 9, 9]
    assert (params.tokens, params.count, params.scale_rows) == (9, 6, rows[rank])
    assert (params.column_stride, params.shard_column_stride) == (-(-rows[rank] // 4) * 4,) * 2


def test_journals_name_the_rows() -> None:
    """Those of the last calls, which lie in a table of their own; of older calls only that they were uneven."""
    first, second = pack("sharded", request((3, 0, 5)))
    even, _ = pack("sharded", request(None))
    assert first != even
    page = clean_control()
    numbers = (0, BOUNDS, BOUNDS + 1)
    for number in numbers:
        at, table = JOURNAL_OFFSET + number % 64 * 32, BOUNDS_OFFSET + number % BOUNDS * 32
        page[at : at + 32] = struct.pack("<6I2f", number + 1, 8, 64, 0, first, second, 1e-6, 0.0)
        page[table : table + 32] = struct.pack("<8I", 3, 3, 8, 8, 8, 8, 8, 8) if number % 2 == 0 else struct.pack("<8I", 0, 7, *[8] * 6)
    texts = {entry.call: entry.text for entry in entries(bytes(page), 3)}
    assert "sharded by sharded, tokens=8, hidden_size=64, dtype=bfloat16, rows=uneven, residual" in texts[0]
    assert "rows=[3, 0, 5], residual" in texts[BOUNDS]
    assert "rows=[0, 7, 1], residual" in texts[BOUNDS + 1]
    plain = Entry.of(struct.pack("<6I2f", 1, 8, 64, 0, even, second, 1e-6, 0.0), (3, 0, 5))
    assert plain is not None
    assert "rows" not in plain.text
    for operation in OWNING:
        told = Entry.of(struct.pack("<6I2f", 1, 8, 64, 0, *pack("sharded", request((8, 0), operation)), 1e-6, 0.0))
        assert told is not None
        assert f"{operation} " in told.text


def test_explain_without_a_communicator() -> None:
    found = plans.explain(plans.Machine.named("sm_90a"), None, hidden_size=7168, world_size=3, operation="sharded", rows=[3, 0, 5])
    assert "8 x 7168 bfloat16, 3 ranks with 3, 0, 5 rows on sm_90a" in found.call
    assert "0 to 5 rows each" in found.plan.why

"""``collogue bench serving``: its schedule, its cache, and the whole loop on the CPU. Times taken here mean nothing."""

from __future__ import annotations

import json
import re
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

from collogue.errors import ArgumentError
from collogue.tools.bench import cached, page, serving
from collogue.tools.bench.engine import cache_length, layer_bytes
from collogue.tools.bench.schedule import Workload, decode_rows, prefill_counts, rows, schedule
from collogue.tools.bench.serving_rank import _slowest
from collogue.tools.bench.stack import SHAPES, activation_scale, attention, make_blocks, rank_shape, static
from collogue.tools.bench.variants import COLLOGUE
from collogue.tools.cli import app

pytestmark = pytest.mark.slow

SMALL = Workload(prompts=7, prompt_tokens=5, new_tokens=4, concurrency=3, prefill_tokens=12)
workloads = st.builds(
    Workload, st.integers(1, 40), st.integers(1, 5), st.integers(1, 9), st.integers(1, 12), prefill_tokens=st.integers(5, 30)
)


@given(workloads)
@settings(max_examples=200, deadline=None)
def test_schedule(work: Workload) -> None:
    """Every prompt gets its tokens, once each and in order; never more sequences than allowed; rows keep what is theirs."""
    made: Counter[int] = Counter()
    row_of: dict[int, int] = {}
    admitted = []
    for step in schedule(work):
        for source, target in step.moves:
            (moved,) = [s for s, row in row_of.items() if row == source]
            assert target not in row_of.values()
            row_of[moved] = target
        if step.prefill:
            assert len(step.sequences) * work.prompt_tokens <= work.prefill_tokens
            assert step.first == len(row_of)
            row_of |= {sequence: step.first + i for i, sequence in enumerate(step.sequences)}
            admitted += step.sequences
        else:
            assert row_of == {sequence: row for row, sequence in enumerate(step.sequences)}
            assert step.positions == tuple(work.prompt_tokens + made[s] - 1 for s in step.sequences)
            assert max(step.positions) < work.length
        assert len(row_of) <= work.concurrency
        made.update(step.sequences)
        row_of = {sequence: row for sequence, row in row_of.items() if made[sequence] < work.new_tokens}
    assert admitted == list(range(work.prompts))
    assert made == dict.fromkeys(range(work.prompts), work.new_tokens)


def test_schedule_of_the_default_workload() -> None:
    """60 at once are reached and kept: a free row is filled in the next step."""
    steps = list(schedule(Workload()))
    assert sum(len(step.sequences) for step in steps) == 1000 * 1000
    decoded = [len(step.sequences) for step in steps if not step.prefill]
    assert max(decoded) == 60
    assert sum(count >= 52 for count in decoded) > 0.9 * len(decoded)
    assert {len(step.sequences) for step in steps if step.prefill} <= set(range(1, 9))


def test_sizes_and_chunks() -> None:
    assert [rows(n, 60) for n in (1, 3, 33, 49, 60)] == [1, 4, 48, 60, 60]
    assert rows(5, 7) == 7
    chunks = Workload(prompts=10).chunks(4)
    assert [part.prompts for part in chunks] == [2, 3, 2, 3]
    assert (decode_rows([SMALL]), prefill_counts([SMALL])) == ([3, 2, 1], [2, 1])
    with pytest.raises(ArgumentError, match="1000 tokens does not fit"):
        Workload(prefill_tokens=999)
    with pytest.raises(ArgumentError, match="without prompts"):
        Workload(prompts=0)


def test_cached_attention() -> None:
    """A prompt and then token by token gives the last rows of the whole sequence at once; another row's cache does not matter."""
    shape, length, device = replace(SHAPES["tiny"], kv_heads=2), 6, torch.device("cpu")
    (block, _) = make_blocks(shape, 1, 1, prefill=True, device=device, seed=0)
    x = torch.randn(length, 64, generator=torch.Generator().manual_seed(1)).bfloat16()
    scale = activation_scale(torch.device("cpu"))
    whole = attention(shape, True, static, *static(x, scale), *block.tensors)
    weights, cache = block.tensors[:-2], torch.full((2, 4, 2, 16, 16), 5.0).bfloat16()
    prompts = torch.cat([x[:4].flip(0), x[:4]])  # two of four tokens; ours goes into row 2
    first = cached.prefill(shape, 4, *static(prompts, scale), *weights, *cache, torch.tensor([0, 2, 1]))
    assert torch.allclose(first[4:], whole[:4], rtol=0.05, atol=0.02)
    for position in (4, 5):
        three = x[position].expand(3, -1)
        made = cached.decode(shape, *static(three, scale), *weights, *cache, torch.tensor([1, 0, position, 3]))
        assert torch.allclose(made[2], whole[position], rtol=0.05, atol=0.02)
        assert not torch.allclose(made[0], whole[position], rtol=0.05, atol=0.02), "the positions make no difference"
    assert (cache[:, 3] == 5).all()
    assert (cache[:, 2, :, length:] == 5).all()


@pytest.mark.parametrize("name", ["tiny", "qwen3-32b", "deepseek-v3-shared"])
def test_layer_bytes(name: str) -> None:
    """What layers are said to need is what they take, but for scales and norms."""
    shape = rank_shape(SHAPES[name], 2) if name == "tiny" else replace(rank_shape(SHAPES[name], 8), hidden_size=256, intermediate_size=64)
    blocks = make_blocks(shape, 1, 1, prefill=True, device=torch.device("cpu"), seed=0)
    weights = sum(t.numel() for block in blocks for t in block.tensors if t.dtype == torch.float8_e4m3fn)
    cache = 0 if shape.low_rank else 2 * 2 * 3 * shape.kv_heads * cache_length(SMALL) * shape.head_dim
    assert layer_bytes(shape, SMALL) == weights + cache


def test_ranks_must_take_the_same_steps() -> None:
    row = {"prefill_steps": 1, "decode_steps": 2, "output_tokens": 3, "seconds": 1.0}
    assert _slowest([row, {**row, "seconds": 2.0}])["seconds"] == 2.0
    with pytest.raises(RuntimeError, match="different steps"):
        _slowest([row, {**row, "decode_steps": 3}])


def test_dry_run(tmp_path: Path) -> None:
    """All of it on two ranks: every way serves every chunk in the same steps, with outputs that are NCCL's (here: gloo's)."""
    file = tmp_path / "serving.json"
    where = "bench serving --device cpu --model tiny --layers 1 --world-size 2 --chunks 2"
    what = "--prompts 7 --prompt-tokens 5 --new-tokens 4 --concurrency 3 --prefill-tokens 12"
    result = CliRunner().invoke(app, [*where.split(), *what.split(), "--json", str(file)])
    assert result.exit_code == 0, result.output
    data = json.loads(file.read_text())
    assert [(row["way"], row["chunk"]) for row in data["rows"]] == [(way, chunk) for chunk in (0, 1) for way in serving.WAYS]
    for row in data["rows"]:
        steps = list(schedule(replace(SMALL, prompts=row["prompts"])))
        assert row["error"] is None
        assert row["output_tokens"] == row["prompts"] * 4
        assert (row["prefill_steps"], row["decode_steps"]) == tuple(sum(s.prefill == kind for s in steps) for kind in (True, False))
    assert [total["output_tokens"] for total in data["totals"]] == [28] * 3
    assert (data["layers"], data["model_layers"], data["chunks"], data["attention_core"]) == (1, 2, 2, True)
    assert re.search(r"estimate: \d+ s for \d+ steps of each of 3 ways", result.stderr)
    assert "tiny, 1 of 2 layers, world 2: 7 prompts of 5 tokens" in result.stdout
    text = page.page(data)
    assert all(way in text for way in serving.WAYS)


def made(way: str, chunk: int, seconds: float, prompts: int = 10) -> dict[str, Any]:
    return {
        "way": way,
        "chunk": chunk,
        "prompts": prompts,
        "error": None,
        "seconds": seconds,
        "prefill_seconds": 1.0,
        "output_tokens": 100 * prompts,
        "ms_per_token": seconds,
        "ms_to_first_token": 2 * seconds,
    }


def test_totals() -> None:
    """The ratio is of whole times; a way without a number has none."""
    rows = [made("collogue eager", 0, 4.0), made("nccl", 0, 8.0), made("collogue eager", 1, 5.0, 30), made("nccl", 1, 5.0, 30)]
    rows.append({**made("collogue sharded", 0, 1.0), "error": "no", "seconds": None})
    eager, nccl, sharded = serving.totals(rows)
    assert eager["tokens_per_second"] == pytest.approx(4000 / 9)
    assert eager["speedup_nccl"] == pytest.approx(13 / 9)
    assert (eager["speedup_low"], eager["speedup_high"], nccl["speedup_nccl"]) == (1.0, 2.0, 1.0)
    assert eager["ms_per_token"] == pytest.approx((4 * 10 + 5 * 30) / 40)
    assert sharded == {"way": "collogue sharded", "error": "no"}


def test_wrong_calls() -> None:
    for wrong, text in (({"model": "gpt"}, "no 'gpt'"), ({"ways": ["fast"]}, "no 'fast'"), ({"chunks": 8}, "7 prompts in 8 chunks")):
        with pytest.raises(ArgumentError, match=text):
            serving.run(SMALL, device="cpu", **wrong)  # type: ignore[arg-type]
    assert set(serving.WAYS) <= {*COLLOGUE, "nccl"}

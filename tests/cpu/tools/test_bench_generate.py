"""``collogue bench generate``: the same code on the CPU, and what it says of the results. Times taken here mean nothing."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from typer.testing import CliRunner

import collogue
from collogue.communicator import Communicator
from collogue.contract.spec import Output
from collogue.errors import ArgumentError
from collogue.testing.processes import run_processes
from collogue.tools.bench import generate
from collogue.tools.bench.between import COLLOGUE, COMPILED, WAYS, Collogue, Compiled, Units
from collogue.tools.bench.decoder import BFLOAT16, ROTARY_BASE, Decoder, State
from collogue.tools.bench.epilogue import encoder
from collogue.tools.bench.stack import EPS, SHAPES, rank_shape
from collogue.tools.cli import app

SHAPE, CPU = SHAPES["small"], torch.device("cpu")
SCHEMES = (BFLOAT16, "fp8_static", "fp8_per_token", "fp8_block")
TIMES = ("tokens_per_second", "ms_to_first_token", "us_per_step", "us_per_step_low", "us_per_step_high", "gemms_us")


@pytest.mark.slow
def test_the_command(tmp_path: Path) -> None:
    """Every scheme and way has a number; bytes and their bound are those of the shapes; no line is longer than 80 columns."""
    file = tmp_path / "generate.json"
    small = ["--device", "cpu", "--model", "small", "--batch", "1,3", "--prompt-tokens", "5", "--new-tokens", "4", "--rounds", "1"]
    result = CliRunner().invoke(app, ["bench", "generate", *small, "--commit", "c", "--json", str(file)])
    assert result.exit_code == 0, result.output
    data = json.loads(file.read_text())
    assert (data["benchmark"], data["passed"], data["commit"], data["cache_tokens"]) == ("generate", True, "c", 9)
    assert "whole cache" in data["method"]
    rows = data["rows"]
    assert [(r["batch"], r["scheme"], r["way"]) for r in rows] == [(b, s, w) for b in (1, 3) for s in SCHEMES for w in reversed(WAYS)]
    for row in rows:
        assert row["error"] is row["gemms_error"] is None
        assert all(row[name] > 0 for name in TIMES)
        assert row["tokens_per_second"] == pytest.approx(row["batch"] / row["us_per_step"] * 1e6)
        assert row["difference"] < 0.1
        assert row["bound_us"] == pytest.approx(row["step_bytes"] / 4.3e6)
    sizes = {row["scheme"]: row for row in data["sizes"]}
    weights = 2 * (128 * (8 * 64) + 256 * 128 + 128 * 512 + 256 * 128)
    # Per layer: two static scales of each linear layer; a scale of each output; a scale of each 128 x 128.
    scales = {"fp8_static": 2 * 4 * 2, "fp8_per_token": 2 * (512 + 128 + 512 + 128), "fp8_block": 2 * (4 + 2 + 4 + 2)}
    assert sizes[BFLOAT16]["quantized_bytes"] == 2 * weights
    assert {name: sizes[name]["quantized_bytes"] - weights for name in scales} == {name: 4 * count for name, count in scales.items()}
    others = 2 * (2 * 256 * 128 + 5 * 128 + 2 * 64)  # embedding, head, norms
    assert sizes["fp8_static"]["model_ratio"] == pytest.approx((weights + 64 + others) / (2 * weights + others))
    cache = 2 * 2 * 2 * 2 * 9 * 64  # bytes, layers, keys and values, heads, tokens
    step = {row["batch"]: row["step_bytes"] for row in rows if row["scheme"] == BFLOAT16}
    assert {batch: found - 2 * weights - others + 2 * 256 * 128 for batch, found in step.items()} == {b: b * (cache + 256) for b in (1, 3)}
    text = result.stdout.splitlines()
    assert max(map(len, text)) <= 80
    assert any(line.split()[:3] == ["3", "fp8_block", "collogue"] for line in text)


def test_a_table_of_the_largest_numbers_fits() -> None:
    numbers = {"tokens_per_second": 123456.0, "over_bfloat16": 1.87, "over_compiled": 1.01, "ms_to_first_token": 1234.5}
    times = {"us_per_step": 12345.0, "gemms_us": 12345.0, "bound_us": 12345.0, "error": None}
    row = {"model": "m", "batch": 64, "scheme": "fp8_per_token", "way": COMPILED, **numbers, **times}
    size = {"model": "m", "layers": 32, "model_layers": 32, "scheme": "fp8_per_token", "quantized_bytes": 14e9, "quantized_ratio": 1.0}
    size |= {"model_bytes": 16e9, "model_ratio": 1.0}
    data = {"world_size": 8, "prompt_tokens": 1024, "cache_tokens": 1040, "cuda_graphs": True, "rows": [row], "sizes": [size]}
    assert max(map(len, generate.text(data).splitlines())) <= 80


@pytest.fixture
def group(tmp_path: Path) -> Iterator[Any]:
    dist.init_process_group("gloo", init_method=(tmp_path / "rendezvous").as_uri(), rank=0, world_size=1)
    yield dist.group.WORLD
    dist.destroy_process_group()


@pytest.fixture
def decoder(group: Any) -> Iterator[Decoder]:
    with torch.inference_mode(), Communicator(group, max_tokens=64, hidden_size=SHAPE.hidden_size) as comm:
        yield Decoder(SHAPE, SHAPE.layers, SCHEMES, comm, batch=3, length=8)


def expected_logits(decoder: Decoder, tokens: Tensor) -> Tensor:
    """Of the last of whole sequences ``[B, S]``, without a cache, in float32 and by the book."""
    batch, length = tokens.shape
    h = F.embedding(tokens, decoder.embedding).float()

    def rotated(x: Tensor) -> Tensor:
        half = SHAPE.head_dim // 2
        angle = torch.arange(length)[:, None] / ROTARY_BASE ** (torch.arange(half) / half)
        a, b = x[..., :half], x[..., half:]
        return torch.cat([a * angle.cos() - b * angle.sin(), b * angle.cos() + a * angle.sin()], -1)

    def norm(x: Tensor) -> Tensor:
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + EPS)

    for layer in decoder.layers[BFLOAT16]:
        rows = (norm(h) @ layer.qkv.weight.float().t()).view(batch, length, -1, SHAPE.head_dim).transpose(1, 2)
        q, k, v = rows.split([SHAPE.heads, SHAPE.kv_heads, SHAPE.kv_heads], 1)
        q, k = rotated(norm(q)), rotated(norm(k))
        k, v = (x.repeat_interleave(SHAPE.heads // SHAPE.kv_heads, 1) for x in (k, v))
        seen = torch.ones(length, length).tril().bool()
        weights = (q @ k.transpose(2, 3) / SHAPE.head_dim**0.5).masked_fill(~seen, -torch.inf).softmax(-1)
        h = h + (weights @ v).transpose(1, 2).reshape(batch, length, -1) @ layer.out.weight.float().t()
        gate, up = (norm(h) @ layer.gate_up.weight.float().t()).chunk(2, -1)
        h = h + (F.silu(gate) * up) @ layer.down.weight.float().t()
    return norm(h[:, -1]) @ decoder.head.weight.float().t()


def test_it_is_a_decoder(decoder: Decoder, group: Any) -> None:
    """A prefill of 7 tokens, and one step behind it, are whole sequences of 7 and 8; so the cache is full, and the whole of it counts."""
    for name in WAYS:
        ways = [Collogue(decoder.comm, Units(CPU, prefill=p)) if name == COLLOGUE else plain(group, prefill=p) for p in (True, False)]
        state = State(decoder, 3, 7)
        logits = decoder.prefill(BFLOAT16, ways[0], state)
        assert error(logits, expected_logits(decoder, state.prompt)) < 0.02
        assert torch.equal(state.tokens, logits.argmax(-1))
        whole = torch.cat([state.prompt, state.tokens[:, None]], 1)
        assert error(decoder.decode(BFLOAT16, ways[1], state), expected_logits(decoder, whole)) < 0.02
        assert state.positions.tolist() == [8, 8, 8]


def plain(group: Any, *, prefill: bool) -> Compiled:
    return Compiled(group, Units(CPU, prefill=prefill), torch.ones(1))


def error(found: Tensor, expected: Tensor) -> float:
    return float((found.float() - expected).norm() / expected.norm())


@pytest.mark.parametrize("wrong", [1.0, 16.0])
def test_the_gate_sees_a_wrong_scale(decoder: Decoder, group: Any, wrong: float) -> None:
    batch = generate._Batch(decoder, {p: Units(CPU, prefill=p) for p in (False, True)}, group, 2, 5, lambda text: None)
    expected: dict[str, Tensor] = {}
    batch._gate({"scheme": BFLOAT16}, batch._made(BFLOAT16, COMPILED)[2], expected)
    scale = decoder.layers["fp8_per_token"][1].down.weight_scale
    assert scale is not None
    scale.mul_(wrong)
    row: dict[str, Any] = {"scheme": "fp8_per_token"}
    found = batch._gate(row, batch._made("fp8_per_token", COLLOGUE)[2], expected)
    assert (found is None) == (wrong == 1.0)
    assert found is None or "difference_to_bfloat16 of the logits" in found


def test_prefills_are_compiled_once_and_steps_for_each_size() -> None:
    import torch._dynamo.testing

    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    for prefill, most in ((True, 2), (False, 3)):  # a prefill of one row would be another
        counter.clear()
        units = Units(CPU, prefill=prefill)
        units._backend = counter  # type: ignore[assignment]
        for tokens in (4, 8, 32):
            units.epilogue(None, torch.ones(tokens, 16).bfloat16(), torch.ones(tokens, 16).bfloat16(), torch.ones(16), torch.ones(1))
        assert counter.frame_count == (1 if prefill else most)


def test_groups_are_quantized_as_the_contract_does() -> None:
    x = torch.randn(5, 256, generator=torch.Generator().manual_seed(1)).bfloat16()
    for layout, strides in (("row", (2, 1)), ("column", (1, 5))):
        quant = collogue.FP8Group(128, layout=layout)  # type: ignore[arg-type]
        codes, scales = encoder(quant)(x, torch.ones(1))
        right, right_scales = collogue.quantize(x, quant)
        assert right_scales is not None
        assert scales.stride() == strides
        assert torch.equal(scales, right_scales)
        assert torch.equal(codes.view(torch.uint8), right.view(torch.uint8))


def _two(group: Any, tell: Any) -> Any:
    return generate.generate_rank(group, tell, "cpu", ["small"], [BFLOAT16, "fp8_block"], [2], 1, 4, 3, 1)


@pytest.mark.slow
def test_two_ranks() -> None:
    """The same rows on both, with numbers, of one of the model's two layers."""
    first, second = run_processes(2, _two)
    assert first == second
    assert all(row["error"] is None and row["layers"] == 1 and row["model_layers"] == 2 for row in first["rows"])
    assert first["sizes"][1]["quantized_ratio"] == pytest.approx(0.5, abs=1e-3)


def row(scheme: str, way: str, speed: float | None) -> dict[str, Any]:
    return {"model": "m", "batch": 1, "scheme": scheme, "way": way, "tokens_per_second": speed}


def test_ratios_are_against_the_faster_bfloat16_and_the_same_scheme() -> None:
    rows = [row(BFLOAT16, COMPILED, 100.0), row(BFLOAT16, COLLOGUE, 110.0), row("s", COMPILED, 165.0), row("s", COLLOGUE, 176.0)]
    rows.append(row("t", COLLOGUE, None))
    generate.add_ratios(rows)
    assert (rows[3]["over_bfloat16"], rows[3]["over_compiled"]) == (pytest.approx(1.6), pytest.approx(176 / 165))
    assert (rows[4]["over_bfloat16"], rows[4]["over_compiled"]) == (None, None)


def test_one_failure_leaves_the_rest(decoder: Decoder, group: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*args: Any, **kwargs: Any) -> Output:
        raise RuntimeError("no such kernel\nmore")

    batch = generate._Batch(decoder, {p: Units(CPU, prefill=p) for p in (False, True)}, group, 1, 4, lambda text: None)
    monkeypatch.setattr(Collogue, "gate", broken)
    rows = batch.measure([BFLOAT16], 3, 1)
    assert [(r["way"], r["error"]) for r in rows] == [(COMPILED, None), (COLLOGUE, "RuntimeError: no such kernel")]
    assert rows[0]["tokens_per_second"] > 0


def test_unknown_names() -> None:
    with pytest.raises(ArgumentError, match="unknown model 'tiny'"):
        generate.run(model=["tiny"], device="cpu")
    with pytest.raises(ArgumentError, match="unknown scheme 'fp7'"):
        generate.run(model=["small"], scheme=["fp7"], device="cpu")


@pytest.mark.parametrize("name", generate.MODELS)
@pytest.mark.parametrize("world", [1, 2, 4, 8])
def test_shapes_divide(name: str, world: int) -> None:
    part = rank_shape(SHAPES[name], world)
    assert SHAPES[name].vocabulary % world == 0
    assert all(size % 128 == 0 for size in (part.heads * part.head_dim, part.intermediate_size, part.hidden_size))

"""`collogue accuracy` and `collogue calibrate`: orders of accumulation, scores, errors by layer, scales in named conventions."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

import collogue
from collogue import FP8Static, reference
from collogue.communicator import Communicator
from collogue.contract.quant import NVFP4, FP8PerToken, parse
from collogue.contract.spec import RMSNorm
from collogue.errors import FormatError
from collogue.pytorch.recipes import RECIPES
from collogue.testing import VirtualGroup, run_virtual
from collogue.testing.compare import compare, differing
from collogue.tools.accuracy import calibrate, main
from collogue.tools.accuracy.measure import clipped, forward, losses, score, sqnr
from collogue.tools.accuracy.models import Model, random_model, random_shape
from collogue.tools.accuracy.orders import ORDERS, WIRES, OrderedSum, contract
from collogue.tools.cli import app
from collogue.tools.commands import accuracy as command
from collogue.tools.commands.options import IMPOSSIBLE, OK, USAGE
from collogue.tools.demo.model import Cache, ShardedLlama
from collogue.tools.demo.weights import as_transformers

BF16 = torch.bfloat16


@pytest.fixture(scope="module")
def model() -> Model:
    return random_model(random_shape(1, 96), tokens=10, calibration=6)


# ---- orders


def numbers(*values: float) -> torch.Tensor:
    return torch.tensor([values], dtype=BF16)


def test_orders_round_where_they_say() -> None:
    """256 + 1 is lost in bfloat16 (8 bits); three terms and a residual show each rounding."""
    partials, residual = [numbers(256.0), numbers(1.0), numbers(1.0)], numbers(1.0)
    found = {name: order(partials, residual).item() for name, order in ORDERS.items()}
    # 259 is a tie between 258 and 260: to even; 258 + 1 the same; (256 + 1 -> 256) three times.
    assert found == {"contract": 260.0, "two roundings": 260.0, "each addition": 256.0}
    partials, residual = [numbers(256.0), numbers(1.0)], numbers(1.0)
    found = {name: order(partials, residual).item() for name, order in ORDERS.items()}
    assert found == {"contract": 258.0, "two roundings": 256.0, "each addition": 256.0}


def test_terms_in_fewer_bits_are_what_a_communicator_with_that_wire_adds() -> None:
    torch.manual_seed(0)
    partials, residual = [torch.randn(3, 64, dtype=BF16) for _ in range(3)], torch.randn(3, 64, dtype=BF16)
    for name, order in WIRES.items():
        wire = parse(name.removeprefix("terms as "))

        def rank(group: VirtualGroup, wire: Any = wire) -> torch.Tensor:
            comm = collogue.Communicator(group, max_tokens=3, hidden_size=64, wire=wire)
            out = comm.all_reduce(partials[group.rank], residual=residual).residual
            assert out is not None
            return out

        for found in run_virtual(3, rank):
            assert torch.equal(order(partials, residual), found)
        assert not torch.equal(order(partials, residual), contract(partials, residual))


def test_the_contract_is_the_references() -> None:
    generator = torch.Generator().manual_seed(0)
    partials = [torch.randn(3, 40, generator=generator).to(BF16) for _ in range(3)]
    residual = torch.randn(3, 40, generator=generator).to(BF16)
    expected = reference.all_reduce(partials, residual=residual).residual
    assert torch.equal(contract(partials, residual), expected)  # type: ignore[arg-type]
    assert torch.equal(contract(partials, None), reference.all_reduce(partials).reduced)  # type: ignore[arg-type]
    assert not torch.equal(ORDERS["each addition"](partials, residual), expected)  # type: ignore[arg-type]


def test_an_ordered_sum_is_what_a_communicator_gives() -> None:
    """Also that all ranks get it, and that the sum is in rank order."""

    def rank(group: VirtualGroup) -> Any:
        generator = torch.Generator().manual_seed(group.rank)
        partial, residual = torch.randn(3, 64, generator=generator).to(BF16), torch.ones(3, 64, dtype=BF16)
        given: dict[str, Any] = {"residual": residual, "norm": RMSNorm(torch.full((64,), 0.5, dtype=BF16)), "quant": FP8PerToken()}
        ordered = OrderedSum(group, BF16, contract).all_reduce(partial, **given)
        with Communicator(group, max_tokens=3, hidden_size=64) as comm:
            return differing(compare(ordered, comm.all_reduce(partial, **given)))

    assert run_virtual(3, rank) == [0, 0, 0]


def test_float32_products_of_a_bfloat16_model_are_rounded_once(model: Model) -> None:
    """What a bfloat16 GEMM gives that accumulates in float32; the logits stay float32."""

    def rank(group: VirtualGroup) -> torch.Tensor:
        llama = ShardedLlama(model.shape, model.weights, OrderedSum(group, BF16, contract), gemm_dtype=torch.float32)
        assert llama.layers[0].query.dtype == llama.head.dtype == torch.float32
        assert torch.equal(llama.head, llama.head.to(BF16).float())  # rounded as the model's dtype asks
        assert llama.norms[0].weight.dtype == BF16
        return llama.forward(model.tokens, Cache(llama, 10), [None] * 3)

    logits = run_virtual(1, rank)[0]
    assert logits.dtype == torch.float32
    assert not torch.equal(logits, logits.to(BF16).float())


# ---- measures


def test_a_score_is_what_it_says() -> None:
    tokens = torch.tensor([0, 1, 1, 0])
    expected = torch.log(torch.tensor([[0.1, 0.9], [0.5, 0.5 - 1e-6], [0.75, 0.25], [0.3, 0.7]]))
    found = score(expected.clone(), expected, tokens)
    assert found.perplexity == pytest.approx((1 / (0.9 * 0.5 * 0.75)) ** (1 / 3), rel=1e-5)
    assert (found.standard_error, found.logit_rms, found.logit_max, found.agreement) == (0.0, 0.0, 0.0, 1.0)
    other = expected + torch.tensor([[5.0, 5.0], [0.0, 0.0], [0.0, 0.0], [2.0, 0.0]])  # a shift of a whole row changes nothing
    found = score(other, expected, tokens)
    assert found.agreement == 0.75
    assert found.logit_max == pytest.approx(1.0)
    assert found.logit_rms == pytest.approx(0.5)
    assert found.perplexity == pytest.approx(score(expected, expected, tokens).perplexity, rel=1e-5)  # the last row predicts nothing
    assert losses(expected, tokens)[0].item() == pytest.approx(-math.log(0.9))


def test_sqnr_of_known_errors() -> None:
    n = torch.tensor([[1.0, 448.0, 17.0, 0.0]], dtype=torch.float32).repeat(1, 4)
    # E4M3 holds 16 and 18: 17 is off by 1, all else is exact.
    assert sqnr(n, FP8Static(1.0)) == pytest.approx(10 * math.log10((1 + 448**2 + 17**2) / 1))
    assert sqnr(n[:, :1].repeat(1, 8), FP8Static(1.0)) == math.inf
    assert clipped(n, 17.0) == 0.25


def test_a_better_format_has_less_noise(model: Model) -> None:
    norms = forward(model, model.tokens, world_size=3, dtype=BF16, order=contract, keep_norms=True).norms
    assert len(norms) == model.shape.fused_calls
    for norm in norms:
        assert sqnr(norm, FP8PerToken()) > 30 > 24 > sqnr(norm, NVFP4(2688.0 / float(norm.abs().max()))) > 15


def test_sharding_changes_little_and_quantization_more(model: Model) -> None:
    expected = forward(model, model.tokens, world_size=1, dtype=torch.float32, order=contract).logits
    assert expected.shape == (10, model.shape.vocab_size)
    sharded = forward(model, model.tokens, world_size=3, dtype=torch.float32, order=contract).logits
    assert score(sharded, expected, model.tokens).logit_max < 1e-3
    rounded = score(forward(model, model.tokens, world_size=3, dtype=BF16, order=contract).logits, expected, model.tokens)
    quants = [NVFP4(100.0), NVFP4(100.0), None]
    four = score(forward(model, model.tokens, world_size=3, dtype=BF16, order=contract, quants=quants).logits, expected, model.tokens)
    assert 1e-3 < rounded.logit_rms < four.logit_rms


# ---- the whole run


@pytest.fixture(scope="module")
def result(model: Model) -> dict[str, Any]:
    started: list[str] = []
    formats, static = ["none", "fp8_static", "nvfp4", "fp8_per_token"], ["fp8_static"]
    found = main.run(model, world_size=3, formats=formats, static=static, started=started.append)
    assert len(started) == main.passes(formats, static), started
    return found


def test_a_run_holds_what_is_promised(result: dict[str, Any]) -> None:
    assert json.loads(json.dumps(result, allow_nan=False)) == result
    assert [(r["order"], r["world_size"], r["format"]) for r in result["orders"]] == [
        ("contract", 1, "none"),
        *((order, 3, format) for format in ("none", "nvfp4") for order in ORDERS),
        *((order, 3, "none") for order in WIRES),
    ]
    assert [r["format"] for r in result["formats"]] == ["none", "fp8_static", "nvfp4", "fp8_per_token"]
    assert result["formats"][0]["logit_rms"] == result["orders"][1]["logit_rms"]  # made once
    assert {(r["format"], r["call"]) for r in result["layers"]} == {
        (f, c) for f in ("fp8_static", "nvfp4", "fp8_per_token") for c in (0, 1)
    }
    assert [r["factor"] for r in result["static_scales"]] == list(main.FACTORS)
    measured = {r["quant"]: r for r in result["quantized_layers"]}
    assert list(measured) == ["none", *RECIPES]
    assert measured["none"]["logit_rms"] == pytest.approx(result["formats"][0]["logit_rms"], rel=1.0)
    assert measured["none"]["logit_rms"] < measured["fp8_per_token"]["logit_rms"] < measured["nvfp4"]["logit_rms"]


def test_a_static_scale_that_is_too_small_saturates(result: dict[str, Any]) -> None:
    by_factor = {r["factor"]: r for r in result["static_scales"]}
    assert by_factor[0.25]["clipped"] > by_factor[0.5]["clipped"] > by_factor[16.0]["clipped"] == 0.0
    assert by_factor[0.25]["sqnr_worst_db"] < by_factor[0.5]["sqnr_worst_db"] < by_factor[2.0]["sqnr_worst_db"]


def test_the_text_shows_every_row(result: dict[str, Any]) -> None:
    text = main.text(result)
    for row in (*result["orders"], *result["formats"], *result["static_scales"]):
        assert f"{row['perplexity']:.4f}" in text
    assert text.count("\nfp8_static ") == 2 + len(main.FACTORS)
    assert "\nfp8_block: layers.0.self_attn.q_proj: FP8Group has blocks of 128" in text
    assert "SQNR (dB)" in text


def test_a_format_without_a_static_scale_cannot_be_swept(model: Model) -> None:
    with pytest.raises(FormatError, match="static scale"):
        main.run(model, static=["fp8_per_token"])
    with pytest.raises(FormatError, match="nvfp5"):
        main.run(model, formats=["nvfp5"])


# ---- calibration


def test_every_reader_of_a_norm_gets_its_scale(model: Model) -> None:
    found = calibrate.calibrate(model)
    assert set(found.amax) == {
        *(f"model.layers.0.self_attn.{name}_proj" for name in "qkv"),
        "model.layers.0.mlp.gate_proj",
        "model.layers.0.mlp.up_proj",
        "model.layers.0.self_attn.o_proj",
        "model.layers.0.mlp.down_proj",
    }
    norms = forward(model, model.calibration, world_size=1, dtype=BF16, order=contract, keep_norms=True).norms
    assert found.amax["model.layers.0.self_attn.q_proj"] == float(norms[0].abs().max())
    assert found.amax["model.layers.0.mlp.up_proj"] == float(norms[1].abs().max())
    assert calibrate.readers(model.shape, 2) == ("lm_head",)
    # Ranks see parts of what row-parallel layers read: the amax is that of the whole but for roundings.
    assert calibrate.calibrate(model, world_size=3).amax == pytest.approx(found.amax, rel=0.05)


def test_the_model_in_transformers_is_the_same(model: Model) -> None:
    """Its inputs have the amax that the sharded pass sees, but for roundings to bfloat16 in other places."""
    seen = collogue.Calibration()
    plain = as_transformers(model.shape, model.weights).to(BF16)
    with seen.observing(plain), torch.no_grad():
        plain(model.calibration[None])
    expected = calibrate.calibrate(model).amax
    assert {name: seen.amax[name] for name in expected} == pytest.approx(expected, rel=0.05)
    assert not any(module._forward_pre_hooks for module in plain.modules())


# ---- commands


def call(*arguments: str) -> Any:
    return CliRunner().invoke(app, list(arguments), env={"COLUMNS": "80", "NO_COLOR": "1", "TERM": "dumb"})


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch, model: Model) -> None:
    monkeypatch.setattr(command, "_model", lambda *args, **named: model)


def test_accuracy_as_a_command(small: None) -> None:
    result = call("accuracy", "--format", "none,fp8_per_token", "--json", "-")
    assert result.exit_code == OK, result.stderr
    data = json.loads(result.stdout)
    assert {"commit", "versions", "machine", "method", "orders", "formats", "layers"} <= set(data)
    assert data["static_scales"] == []
    assert "order of accumulation" in result.stderr


@pytest.mark.parametrize("suffix", [".json", ".safetensors"])
def test_calibrate_as_a_command(small: None, tmp_path: Path, suffix: str) -> None:
    target = tmp_path / f"scales{suffix}"
    result = call("calibrate", str(target), "--convention", "modelopt")
    assert result.exit_code == OK, result.stderr
    assert "7 scales (input_scale, a divisor)" in result.stdout
    if suffix == ".json":
        data = json.loads(target.read_text())
        assert (data["direction"], data["divisor"], data["convention"]) == ("divisor", "amax / 2688", "modelopt")
        assert data["scales"].keys() == {f"{name}.input_scale" for name in calibrate.readers(random_shape(1, 96), 0)} | {
            f"{name}.input_scale" for name in calibrate.readers(random_shape(1, 96), 1)
        } | {f"model.layers.0.{name}_proj.input_scale" for name in ("self_attn.o", "mlp.down")}
    else:
        from safetensors import safe_open

        with safe_open(str(target), "pt") as file:
            assert file.metadata()["direction"] == "divisor"
            assert file.get_tensor("model.layers.0.mlp.up_proj.input_scale").dtype == torch.float32


def test_cuda_without_a_gpu_ends_with_3(small: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for arguments in (("accuracy", "--model", "random"), ("calibrate", str(tmp_path / "x.json"), "--model", "random")):
        result = call(*arguments, "--device", "cuda")
        assert result.exit_code == IMPOSSIBLE, arguments
        assert "there is no CUDA GPU that PyTorch can use\nhint: run `collogue doctor`" in result.stderr
    assert not (tmp_path / "x.json").exists()


def test_wrong_usage(tmp_path: Path) -> None:
    target = str(tmp_path / "x.json")
    for arguments in (
        ("accuracy", "--model", "gpt"),
        ("accuracy", "--model", "random", "--hidden-size", "100"),
        ("accuracy", "--dtype", "int8"),
        ("accuracy", "--model", "random", "--layers", "1", "--hidden-size", "96", "--tokens", "8", "--world-size", "5"),
        ("calibrate", target, "--convention", "mine"),
        ("calibrate", target, "--format", "mxfp8"),
    ):
        assert call(*arguments).exit_code == USAGE, arguments
    assert not (tmp_path / "x.json").exists()

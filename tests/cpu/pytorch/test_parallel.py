"""``collogue.nn`` and ``collogue.parallelize``: sharded models say what the unsharded ones say."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from models import own, parallel_rank, small_model
from ranks import HIDDEN_SIZE, MAX_TOKENS, arguments, communicator
from torch import nn

import collogue
from collogue import FP8PerToken, reference
from collogue.errors import ArgumentError, ShapeError
from collogue.nn import ColumnParallelLinear, FusedRMSNorm, RowParallelLinear, finish
from collogue.pytorch.forms import FORMS
from collogue.testing import VirtualGroup, run_virtual
from collogue.testing.processes import run_processes
from collogue.tools.demo.weights import read_model

pytestmark = pytest.mark.slow

#: Largest difference of a float32 logit (they reach 42) that sums in another order may cost over 30 layers.
LOGITS_BOUND = 1e-3


@pytest.mark.parametrize("kind", FORMS)
def test_a_parallel_model_says_the_same(kind: str) -> None:
    model = small_model(kind, attention_bias=True)
    tokens = torch.randint(1, 128, (2, 4))
    mask = torch.ones_like(tokens)
    expected = model(tokens).logits
    text = model.generate(tokens, attention_mask=mask, max_new_tokens=4, do_sample=False)

    def rank(group: VirtualGroup) -> torch.Tensor:
        mine = collogue.parallelize(own(model), group, max_tokens=tokens.numel())
        with torch.no_grad():
            logits: torch.Tensor = mine(tokens).logits
            assert torch.equal(mine.generate(tokens, attention_mask=mask, max_new_tokens=4, do_sample=False), text)
        return logits

    found = run_virtual(2, rank)
    assert torch.equal(found[0], found[1])
    torch.testing.assert_close(found[0], expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", FORMS)
def test_every_boundary_is_one_call(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the norms before and behind the residual, and with the shared experts."""
    model, calls = small_model(kind), list[str]()

    def counted(name: str, call: Any) -> Any:
        return lambda *args, **kwargs: (calls.append(name), call(*args, **kwargs))[1]

    def rank(group: VirtualGroup) -> None:
        mine = collogue.parallelize(own(model), group, max_tokens=4)
        for name in ("all_reduce", "finish", "reduce_scatter", "all_gather"):
            monkeypatch.setattr(mine.comm, name, counted(name, getattr(mine.comm, name)))
        mine(torch.tensor([[1, 2, 3]]))

    run_virtual(1, rank)
    assert calls == ["finish"] * (kind != "olmo2") + ["all_reduce"] * (2 * len(model.model.layers))


def test_what_cannot_be_parallelized() -> None:
    def rank(group: VirtualGroup) -> None:
        with pytest.raises(ArgumentError, match=r"type 'gpt2' are not known to parallelize\nhint: use one of llama, "):
            collogue.parallelize(
                transformers.AutoModelForCausalLM.from_config(transformers.GPT2Config(n_layer=1, n_embd=8, n_head=1)), group
            )
        with pytest.raises(ArgumentError, match="4 heads and 2 key-value heads do not divide among 3 ranks"):
            collogue.parallelize(small_model("llama"), group)
        three = {"hidden_size": 96, "num_attention_heads": 3, "num_key_value_heads": 3}
        odd = small_model("llama", **three, intermediate_size=64)
        with pytest.raises(ShapeError, match="64 features do not divide among 3 ranks"):
            collogue.parallelize(odd, group)
        other = small_model("llama", **three)
        other.model.norm = nn.LayerNorm(96)
        with pytest.raises(ArgumentError, match="LayerNorm is not an RMSNorm"):
            collogue.parallelize(other, group)

    run_virtual(3, rank)


def test_linear_layers() -> None:
    """Column, then row: each rank holds its part of the weights; the bias is added once."""
    torch.manual_seed(0)
    up, down = nn.Linear(HIDDEN_SIZE, 48).bfloat16(), nn.Linear(48, HIDDEN_SIZE).bfloat16()
    x, given = torch.randn(2, 2, HIDDEN_SIZE).bfloat16(), arguments(0)
    residual = given["residual"].view(2, 2, HIDDEN_SIZE)

    def rank(group: VirtualGroup) -> tuple[Any, ...]:
        comm = communicator(group)
        first, second = ColumnParallelLinear.of(up, comm), RowParallelLinear.of(down, comm)
        assert (first.weight.shape, second.weight.shape) == ((16, HIDDEN_SIZE), (HIDDEN_SIZE, 16))
        middle = first(x)
        out = second(middle, residual=residual, norm=given["norm"], quant=FP8PerToken(), keep_norm=True)
        return second.partial(middle), out, ColumnParallelLinear.of(up, comm, gather=True)(x)

    with torch.no_grad():
        results = run_virtual(3, rank)
        partials = [partial.view(4, HIDDEN_SIZE) for partial, _, _ in results]
        torch.testing.assert_close(sum(p.float() for p in partials), down(up(x)).float().view(4, -1), rtol=2e-2, atol=2e-2)
        expected = reference.all_reduce(partials, residual=given["residual"], norm=given["norm"], quant=FP8PerToken(), keep_norm=True)
        for _, out, whole in results:
            assert (out.residual.shape, out.norm.shape, out.codes.shape) == ((2, 2, HIDDEN_SIZE),) * 2 + ((4, HIDDEN_SIZE),)
            for name, tensor in expected.items():
                assert torch.equal(getattr(out, name).reshape(tensor.shape).view(torch.uint8), tensor.view(torch.uint8)), name
            torch.testing.assert_close(whole, up(x))


def test_a_norm_is_handed_over_once_and_to_its_stream() -> None:
    def rank(group: VirtualGroup) -> None:
        comm = communicator(group, max_tokens=MAX_TOKENS)
        norm = FusedRMSNorm(torch.rand(HIDDEN_SIZE).bfloat16(), comm, 1e-5, 1.0)
        stream, other, normed = (torch.randn(4, HIDDEN_SIZE).bfloat16() for _ in range(3))
        expected = reference.rms_norm(stream, norm.description)
        norm.hand_over(stream, normed)
        assert norm(stream) is normed
        assert torch.equal(norm(stream), expected)
        norm.hand_over(stream, normed)
        assert torch.equal(norm(other), reference.rms_norm(other, norm.description))
        assert torch.equal(norm(stream), expected)

    run_virtual(1, rank)


def test_a_stream_that_was_changed_in_place_is_normed_again() -> None:
    """As by a forward hook between the layers. In inference mode PyTorch counts no changes, and the result is handed over."""

    def rank(group: VirtualGroup) -> None:
        comm = communicator(group)
        norm = FusedRMSNorm(torch.rand(HIDDEN_SIZE).bfloat16(), comm)
        given = arguments(0)
        partial, residual = given["partial"].view(2, 2, HIDDEN_SIZE), given["residual"].view(2, 2, HIDDEN_SIZE)
        for mode in (torch.no_grad(), torch.inference_mode()):
            with mode:
                out = finish(comm, partial, residual=residual, norm=norm, hand_over=True)
                assert norm(out.residual) is out.norm
        with torch.no_grad():
            out = finish(comm, partial, residual=residual, norm=norm, hand_over=True)
            out.residual += 1.0
            expected = reference.rms_norm(out.residual.view(4, HIDDEN_SIZE), norm.description)
            assert torch.equal(norm(out.residual).view(4, HIDDEN_SIZE), expected)

    run_virtual(1, rank)


def test_what_is_handed_over_must_be_there() -> None:
    def rank(group: VirtualGroup) -> None:
        comm, given = communicator(group), arguments(0)
        norm = FusedRMSNorm(given["norm"].weight, comm)
        with pytest.raises(ArgumentError, match=r"no norm to hand over\nhint: pass keep_norm=True"):
            finish(comm, given["partial"], norm=norm, quant=FP8PerToken(), hand_over=True)
        out = finish(comm, given["partial"], norm=norm, quant=FP8PerToken(), keep_norm=True, hand_over=True)
        assert norm(out.residual) is out.norm

    run_virtual(1, rank)


@pytest.mark.timeout(400)
def test_smollm2_on_three_processes(tmp_path: Path) -> None:
    """The real model: fused logits, and its first layers by the fusion pass, bit for bit the same as the fused calls."""
    model, tokenizer = read_model()
    tokens = tokenizer("Tensor parallelism splits every layer of a model among several GPUs.", return_tensors="pt").input_ids
    with torch.no_grad():
        expected = model(tokens).logits
    torch.save(model, tmp_path / "model.pt")
    layers = 2
    ranks = run_processes(3, parallel_rank, tmp_path / "model.pt", tokens, layers)
    for told in ranks:
        assert (told["logits"] == ranks[0]["logits"]).all()
        assert told["same bits"]
        report = told["report"]
        assert (len(report.fused), report.missed) == (2 * layers, []), str(report)
        assert [fused.where.split(".", 2)[2] for fused in report.fused[:2]] == ["0.self_attn.o_proj", "0.mlp.down_proj"]
        # The last call's norm is all that is read: the stream is never put together again.
        assert told["sharded"] == (True, ["residual sharded in 2 calls, gathered whole 0 times"])
        same, text = told["dtensor"]
        assert same
        assert text.endswith("1 fused, 0 missed")
    assert float((torch.from_numpy(ranks[0]["logits"]) - expected).abs().max()) < LOGITS_BOUND

"""``collogue.parallelize`` on models with experts: the unsharded logits, checkpoints, and errors before anything changes."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers
from models import EXPERTS, own, small_model
from parallel_checks import TOKENS, check_refused, check_right, parallel_logits, replace, with_lora, with_peft
from torch import nn

import collogue
from collogue.errors import ShapeError
from collogue.pytorch import parallel
from collogue.testing import VirtualGroup, run_virtual

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")

#: Three ranks, with heads and key-value heads that divide.
THREE = {"hidden_size": 96, "num_attention_heads": 6, "num_key_value_heads": 3}
#: Keys and values of all heads come out of one latent.
THREE_LATENT = THREE | {"num_key_value_heads": 6}


def of_three(kind: str, **changed: Any) -> Any:
    return small_model(kind, **(THREE_LATENT if kind.startswith("deepseek") else THREE) | {"attention_bias": True} | changed)


@pytest.mark.parametrize("kind", EXPERTS)
def test_three_ranks(kind: str) -> None:
    model = of_three(kind)
    mask = torch.ones_like(TOKENS)
    text = model.generate(TOKENS, attention_mask=mask, max_new_tokens=4, do_sample=False)
    check_right(model, 3)

    def rank(group: VirtualGroup) -> None:
        mine = collogue.parallelize(own(model), group, max_tokens=TOKENS.numel())
        assert torch.equal(mine.generate(TOKENS, attention_mask=mask, max_new_tokens=4, do_sample=False), text)

    run_virtual(3, rank)


@pytest.mark.parametrize("implementation", ["eager", "batched_mm"])
@pytest.mark.parametrize("kind", EXPERTS)
def test_how_experts_are_multiplied(kind: str, implementation: str) -> None:
    model = small_model(kind)
    model.set_experts_implementation(implementation)
    check_right(model)


@pytest.mark.parametrize(("kind", "rank"), [("deepseek_v2", 40), ("deepseek_v3", None)])
def test_latent_queries_or_not(kind: str, rank: int | None) -> None:
    check_right(small_model(kind, q_lora_rank=rank, attention_bias=True))


def test_more_ranks_than_key_value_heads() -> None:
    for kind in ("mixtral", "olmoe", "gpt_oss"):
        check_right(small_model(kind, attention_bias=True), 4)


@pytest.mark.parametrize("kind", EXPERTS)
def test_checkpoints(kind: str) -> None:
    model = small_model(kind, attention_bias=True)
    expected = model.state_dict()

    def rank(group: VirtualGroup) -> dict[str, torch.Tensor]:
        mine = collogue.parallelize(copy.deepcopy(model), group, max_tokens=8)
        state = collogue.full_state_dict(mine)
        logits = mine(TOKENS).logits
        for parameter in mine.parameters():
            parameter.data = torch.zeros_like(parameter)
        mine.load_state_dict(expected, assign=group.rank == 1)
        assert torch.equal(mine(TOKENS).logits, logits)
        with pytest.raises(RuntimeError, match=r"size mismatch for model\.layers\.\d\.mlp\.experts\.down_proj"):
            mine.load_state_dict({name: tensor[:1] if name.endswith("experts.down_proj") else tensor for name, tensor in expected.items()})
        return state

    for state in run_virtual(2, rank):
        assert list(state) == list(expected)
        assert all(torch.equal(state[name], tensor) for name, tensor in expected.items())


def test_a_bias_behind_experts_is_rank_0s() -> None:
    model = small_model("gpt_oss")

    def rank(group: VirtualGroup) -> torch.Tensor:
        mine = collogue.parallelize(own(model), group, max_tokens=8)
        experts = mine.model.layers[0].mlp.experts
        assert experts.gate_up_proj.shape == (4, 64, 96)
        assert experts.intermediate_size == 48
        bias: torch.Tensor = experts.down_proj_bias
        return bias

    first, second = run_virtual(2, rank)
    assert torch.equal(first, model.model.layers[0].mlp.experts.down_proj_bias)
    assert not second.any()


def test_router_logits_are_whole() -> None:
    model = small_model("mixtral")
    expected = model(TOKENS, output_router_logits=True)

    def rank(group: VirtualGroup) -> None:
        found = collogue.parallelize(own(model), group, max_tokens=8)(TOKENS, output_router_logits=True)
        torch.testing.assert_close(found.router_logits, expected.router_logits, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(found.aux_loss, expected.aux_loss, rtol=1e-5, atol=1e-5)

    run_virtual(2, rank)


@pytest.mark.parametrize("kind", EXPERTS)
def test_bfloat16(kind: str) -> None:
    """As far from the float32 model as the unsharded one is, or less than half as far again."""
    exact, model = small_model(kind)(TOKENS).logits, small_model(kind).to(torch.bfloat16)
    far = (model(TOKENS).logits.float() - exact).abs().max()
    assert (parallel_logits(model).float() - exact).abs().max() <= 1.5 * far


@with_peft
@pytest.mark.parametrize("kind", ["mixtral", "deepseek_v3", "gpt_oss"])
def test_lora(kind: str) -> None:
    """Of attention, with DeepSeek's whole latents; adapters of experts are rejected."""
    names = ["q_proj", "v_proj", "o_proj", "q_a_proj", "kv_a_proj_with_mqa", "kv_b_proj"]
    check_right(with_lora(small_model(kind), target_modules=names))
    model = with_lora(small_model(kind), target_modules=names, target_parameters=["mlp.experts.down_proj"])
    check_refused(model, r"mlp\.experts is a peft\.\S+ParamWrapper with a forward that is not transformers'")


# Errors


def test_features_that_do_not_divide() -> None:
    eager = {"experts_implementation": "eager"}
    for kind, changed, message in (
        ("qwen3_moe", {"moe_intermediate_size": 49}, r"mlp\.experts\.gate_up_proj: 98 features"),
        ("qwen2_moe", {"shared_expert_intermediate_size": 49}, r"mlp\.shared_expert\.gate_proj: 49 features"),
        ("deepseek_v3", {"intermediate_size": 49}, r"layers\.0\.mlp\.gate_proj: 49 features"),
        ("gpt_oss", {"intermediate_size": 49}, r"mlp\.experts\.gate_up_proj: 98 features"),
    ):
        check_refused(small_model(kind, **eager | changed), message + " do not divide among 2 ranks", error=ShapeError)


def test_rows_that_a_grouped_product_cannot_take() -> None:
    sizes = {"moe_intermediate_size": 12}
    check_refused(small_model("qwen3_moe", **sizes), "12 features among 2 ranks are rows of 24 bytes", error=ShapeError)
    model = small_model("qwen3_moe", **sizes)
    model.set_experts_implementation("batched_mm")
    check_right(model)


class OwnExperts(transformers.models.mixtral.modeling_mixtral.MixtralExperts):
    def forward(self, *args: Any) -> torch.Tensor:
        result: torch.Tensor = super().forward(*args) * 3.0
        return result


def _own_class(experts: Any) -> nn.Module:
    experts.__class__ = OwnExperts
    return experts


def _other_parameters(experts: Any) -> nn.Module:
    experts.scale = nn.Parameter(torch.ones(4))
    return experts


def _integers(experts: Any) -> nn.Module:
    experts.down_proj = nn.Parameter(experts.down_proj.detach(), False)
    experts.down_proj.__class__ = type("Quantized", (nn.Parameter,), {})
    return experts


def _own_way(experts: Any) -> nn.Module:
    experts.config._experts_implementation_internal = "own"
    return experts


def _hooked(experts: Any) -> nn.Module:
    experts.register_forward_hook(lambda module, args, out: out * 3.0)
    return experts


def _set(name: str) -> Callable[[Any], nn.Module]:
    def change(experts: Any) -> nn.Module:
        setattr(experts, name, True)
        return experts

    return change


class OwnGate(transformers.models.mixtral.modeling_mixtral.MixtralExperts):
    def _apply_gate(self, gate_up: torch.Tensor) -> torch.Tensor:
        gate, up = gate_up.chunk(2, dim=-1)
        return gate.softmax(-1) * up


def _own_gate(experts: Any) -> nn.Module:
    experts.__class__ = OwnGate
    return experts


ODD = {
    "own gate": (_own_gate, "OwnGate with a _apply_gate that is not transformers'"),
    "own class": (_own_class, r"OwnExperts with a forward that is not transformers'"),
    "other parameters": (_other_parameters, "has parameters gate_up_proj, down_proj, scale, not gate_up_proj, down_proj"),
    "of another type": (_integers, "has down_proj of another type than Tensor"),
    "own implementation": (_own_way, "experts_implementation 'own' that is not transformers'"),
    "hook": (_hooked, "has a forward hook"),
    "parallel already": (_set("_is_expert_parallel"), "experts that are parallel already"),
}


@pytest.mark.parametrize("kind", ODD)
def test_odd_experts(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers.integrations import moe

    change, message = ODD[kind]
    monkeypatch.setitem(moe.ALL_EXPERTS_FUNCTIONS._global_mapping, "own", moe.batched_mm_experts_forward)
    for options in ({}, {"fuse": False}):
        model = replace(small_model("mixtral"), change, "layers.1.mlp.experts")
        check_refused(model, r"layers\.\d\.mlp\.experts .*" + message, **options)


def test_experts_that_are_not_there() -> None:
    model = small_model("mixtral")
    model.model.layers[1].mlp = small_model("llama").model.layers[1].mlp
    check_refused(model, r"layers\.1\.mlp is a .*LlamaMLP with a forward that is not transformers'")


@pytest.mark.parametrize("step", ["FusedRMSNorm", "Boundaries", "Untouched", "ColumnParallelLinear"])
@pytest.mark.parametrize("kind", ["gpt_oss", "qwen2_moe"])
def test_an_error_while_the_model_is_cut(kind: str, step: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The experts and the attention that were replaced are back."""
    model = small_model(kind)
    expected = model(TOKENS).logits

    def failing(*args: Any, **kwargs: Any) -> Any:
        raise MemoryError

    monkeypatch.setattr(parallel, step, failing)

    def rank(group: VirtualGroup) -> None:
        mine = own(model)
        before = dict(mine.named_modules())
        with pytest.raises(MemoryError):
            collogue.parallelize(mine, group, max_tokens=8)
        assert torch.equal(mine(TOKENS).logits, expected)
        assert all(before[name] is module for name, module in mine.named_modules())
        assert mine.state_dict().keys() == model.state_dict().keys()

    run_virtual(2, rank)

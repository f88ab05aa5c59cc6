"""What users do to a parallel model afterwards: right numbers, or an error that says what to do."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from models import small_model
from parallel_checks import TOKENS, check_same, parallel, with_lora, with_peft
from torch import nn
from transformers import AttentionInterface
from transformers.models.llama.modeling_llama import eager_attention_forward

import collogue
from collogue.errors import ArgumentError, CapacityError, DTypeError
from collogue.testing import VirtualGroup, run_virtual

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")


# ---- an output layer that is the embedding


def _another(model: Any) -> Any:
    """A tied model's checkpoint as files have it: without the output layer."""
    state = small_model("llama", tie_word_embeddings=True).state_dict()
    return {name: 2 * tensor for name, tensor in state.items() if name != "lm_head.weight"}


def _doubled(model: Any) -> None:
    model.get_input_embeddings().weight.data.mul_(2)


@pytest.mark.parametrize("how", ["loaded", "tied again", "changed in place"])
def test_tied_embeddings(how: str) -> None:
    changes: dict[str, Callable[[Any], Any]] = {
        "loaded": lambda model: model.load_state_dict(_another(model), strict=False),
        "tied again": lambda model: model.tie_weights(),
        "changed in place": _doubled,
    }
    check_same(small_model("llama", tie_word_embeddings=True), changes[how])


def test_a_layer_under_two_names_is_whole_under_both() -> None:
    model = small_model("llama")
    model.model.layers[1].mlp = model.model.layers[0].mlp
    for found in parallel(model, collogue.full_state_dict):
        for name, tensor in model.state_dict().items():
            assert torch.equal(found[name], tensor), name


# ---- hooks


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_hooks_that_write_through_data(mode: Any) -> None:
    def hook(module: nn.Module, given: Any, out: torch.Tensor) -> None:
        out.data.add_(1.0)

    check_same(small_model("llama"), lambda model: model.model.layers[0].register_forward_hook(hook), mode)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("name", ["norm", "layers.1.input_layernorm"])
def test_pre_hooks_of_norms_that_change_in_place(name: str, mode: Any) -> None:
    def hook(module: nn.Module, given: tuple[torch.Tensor]) -> None:
        given[0].add_(1.0)

    check_same(small_model("llama"), lambda model: model.model.get_submodule(name).register_forward_pre_hook(hook), mode)


def test_another_eps() -> None:
    def change(model: Any) -> None:
        for norm in (model.model.norm, model.model.layers[0].post_attention_layernorm):
            norm.variance_epsilon = 0.5

    check_same(small_model("llama"), change)


# ---- what is refused


def _mixing(module: Any, *args: Any, **kwargs: Any) -> Any:
    out, weights = eager_attention_forward(module, *args, **{**kwargs, "dropout": 0.0})
    return out - out.mean(2, keepdim=True), weights


@pytest.mark.parametrize("when", ["before", "afterwards"])
def test_an_attention_function_of_ones_own(when: str) -> None:
    AttentionInterface.register("of_ones_own", _mixing)
    model = small_model("llama")

    def then(mine: Any) -> None:
        mine.set_attn_implementation("of_ones_own")
        mine(TOKENS)

    if when == "before":
        model.set_attn_implementation("of_ones_own")
    with pytest.raises(ArgumentError, match=r"'of_ones_own' is a function of .*: it would see the heads of one rank alone"):
        parallel(model, then)


def _other(group: VirtualGroup, what: str) -> Any:
    changed = {"activation": {"hidden_act": "gelu"}, "rope": {"rope_parameters": {"rope_type": "default", "rope_theta": 77.0}}}
    model = small_model("llama", **(changed.get(what, {}) if group.rank else {}))
    if what == "scaling" and group.rank:
        model.model.layers[1].self_attn.scaling *= 2
    if what == "weights" and group.rank:
        model.model.layers[1].mlp.up_proj.weight[5, 3] *= 2
    return model


@pytest.mark.parametrize(
    ("what", "named"),
    [("activation", "config.hidden_act"), ("rope", "config.rope"), ("scaling", "layers.1.self_attn"), ("weights", "up_proj")],
)
def test_ranks_with_different_models(what: str, named: str) -> None:
    def rank(group: VirtualGroup) -> None:
        with pytest.raises(ArgumentError, match=f"ranks 0 and 1 have different models: .*{named}"):
            collogue.parallelize(_other(group, what), group, max_tokens=TOKENS.numel())

    run_virtual(2, rank)


def test_more_tokens_than_it_was_made_for() -> None:
    with pytest.raises(CapacityError, match="pass parallelize a larger max_tokens="):
        parallel(small_model("llama"), lambda mine: mine(TOKENS), max_tokens=TOKENS.numel() - 1)


@pytest.mark.parametrize("how", ["autocast", "converted"])
def test_another_dtype(how: str) -> None:
    def then(mine: Any) -> None:
        with torch.autocast("cpu", torch.bfloat16, enabled=how == "autocast"):
            (mine if how == "autocast" else mine.bfloat16())(TOKENS)

    with pytest.raises(DTypeError, match=r"the model was parallelized in torch\.float32"):
        parallel(small_model("llama"), then)


def test_a_new_size() -> None:
    with pytest.raises(ArgumentError, match="resize the embeddings before parallelize"):
        parallel(small_model("llama"), lambda mine: mine.resize_token_embeddings(256))


@with_peft
def test_a_new_adapter() -> None:
    def then(mine: Any) -> None:
        layer = mine.get_base_model().model.layers[0].self_attn.q_proj
        layer.lora_A["another"], layer.lora_B["another"] = nn.Linear(64, 4, False), nn.Linear(4, 64, False)
        mine(TOKENS)

    with pytest.raises(ArgumentError, match="add adapters before parallelize"):
        parallel(with_lora(small_model("llama")), then)


@pytest.mark.parametrize("option", [{"wire": collogue.FP8Group(64)}, {"transport": "host"}], ids=["wire", "transport"])
def test_what_plain_sums_cannot_do(option: Any) -> None:
    with pytest.raises(ArgumentError, match=r"fuse=False with .*: PyTorch's all-reduce makes the sums"):
        parallel(small_model("llama"), lambda mine: None, fuse=False, **option)
    with pytest.raises(ArgumentError, match="fuse=False with a VirtualGroup"):
        parallel(small_model("llama"), lambda mine: None, fuse=False)


def test_a_tensor_of_another_shape_is_told_once() -> None:
    def then(mine: Any) -> str:
        state = small_model("llama").state_dict() | {"model.layers.0.mlp.up_proj.weight": torch.zeros(3, 3)}
        with pytest.raises(RuntimeError) as raised:
            mine.load_state_dict(state)
        return str(raised.value)

    for message in parallel(small_model("llama"), then):
        assert "size mismatch for model.layers.0.mlp.up_proj.weight: [3, 3] in the checkpoint" in message
        assert "Missing" not in message

"""Changes of a parallel model that its layers would not see, or would see a part of: the unsharded model's numbers, or an error."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from models import small_model
from parallel_checks import TOKENS, check_same, parallel
from torch import nn
from torch.nn.utils import parametrizations
from transformers.generation.stopping_criteria import MaxTimeCriteria
from transformers.models.llama import modeling_llama

import collogue
from collogue.errors import ArgumentError
from collogue.testing import VirtualGroup, run_virtual


def _refused(model: Any, change: Callable[[Any], Any], message: str, error: type[ArgumentError] = ArgumentError, **options: Any) -> None:
    """On every rank, before anything is computed."""

    def then(mine: Any) -> None:
        mine(TOKENS)
        change(mine)
        with pytest.raises(error, match=message) as raised:
            mine(TOKENS)
        assert raised.value.hint

    parallel(model, then, **options)


# ---- attention


@pytest.mark.parametrize(("first", "then"), [("eager", "sdpa"), ("sdpa", "eager")])
def test_another_attention_where_q_k_and_v_are_one_product(first: str, then: str) -> None:
    """The mask is made for one of them: the layers must use the same one."""
    model = small_model("phi3")
    model.set_attn_implementation(first)
    check_same(model, lambda mine: mine.set_attn_implementation(then))


# ---- streams that are changed in place


def _patched(model: Any) -> None:
    layer = model.model.layers[0]
    forward = layer.forward
    layer.forward = lambda *args, **kwargs: forward(*args, **kwargs).add_(1.0)


class Around(nn.Module):
    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer, self.attention_type = layer, "full_attention"

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.layer(*args, **kwargs).add_(1.0)


def _wrapped(model: Any) -> None:
    model.model.layers[0] = Around(model.model.layers[0])


@pytest.mark.parametrize("change", [_patched, _wrapped])
def test_a_layer_that_changes_its_result_in_inference_mode(change: Any) -> None:
    check_same(small_model("llama"), change, torch.inference_mode)


# ---- what is refused


@pytest.mark.parametrize(("kind", "name"), [("LlamaMLP", "forward"), ("LlamaDecoderLayer", "forward"), ("LlamaMLP", "__call__")])
def test_a_class_that_is_patched(kind: str, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    cls = getattr(modeling_llama, kind)
    original = getattr(cls, name)

    def then(mine: Any) -> None:
        mine(TOKENS)
        monkeypatch.setattr(cls, name, lambda *args, **kwargs: original(*args, **kwargs))
        with pytest.raises(ArgumentError, match=rf"{kind}\.{name} was patched after parallelize"):
            mine(TOKENS)

    parallel(small_model("llama"), then, 1)


def _parametrized(model: Any) -> None:
    parametrizations.weight_norm(model.model.layers[0].mlp.down_proj)


def _whole_head(model: Any) -> None:
    model.lm_head.weight = nn.Parameter(torch.zeros(128, 64))


def _tied(model: Any) -> None:
    model.config.tie_word_embeddings = True
    model.tie_weights()


def _whole_layer(model: Any) -> None:
    model.model.layers[0].mlp.down_proj.weight = nn.Parameter(torch.zeros(64, 96))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_parametrized, r"mlp\.down_proj of a decoder layer was made a Parametrized_Row"),
        (_whole_head, r"weight of lm_head is \[128, 64\] after parallelize; this rank's part is \[64, 64\]"),
        (_tied, r"weight of lm_head is \[128, 64\] after parallelize"),
        (_whole_layer, r"weight of mlp\.down_proj of a decoder layer is \[64, 96\]"),
    ],
)
def test_other_weights(change: Any, message: str) -> None:
    _refused(small_model("llama"), change, message)


def test_another_factor() -> None:
    _refused(
        small_model("granite", residual_multiplier=0.3),
        lambda mine: setattr(mine.model.layers[1], "residual_multiplier", 0.9),
        r"residual_multiplier of a decoder layer was 0\.3 and is now 0\.9",
    )


@pytest.mark.parametrize("dropped", ["resid_pdrop", "attention_dropout"])
def test_dropout(dropped: str) -> None:
    _refused(small_model("phi3", **{dropped: 0.9}), lambda mine: mine.train(), r"would drop 0\.9 of its elements")


def test_what_is_of_all_heads() -> None:
    model = small_model("llama")
    cache = model(TOKENS, use_cache=True).past_key_values

    def then(mine: Any) -> None:
        with pytest.raises(ArgumentError, match="past_key_values has 2 heads, this rank 1"):
            mine(TOKENS[:, :1], past_key_values=cache)
        with pytest.raises(ArgumentError, match="a plane for each head"):
            mine(TOKENS, attention_mask=torch.zeros(2, 4, 4, 4))
        for name in ("generate_batch", "add_adapter"):
            with pytest.raises(ArgumentError, match=f"{name} of a parallel model"):
                getattr(mine, name)([[1, 2]])

    parallel(model, then)


def test_generate_of_a_model_whose_base_alone_is_parallel() -> None:
    def rank(group: VirtualGroup) -> None:
        model = copy.deepcopy(small_model("llama"))
        collogue.parallelize(model.model, group, max_tokens=TOKENS.numel())
        model(TOKENS)
        with pytest.raises(ArgumentError, match="generate of a LlamaForCausalLM whose base model alone is parallel"):
            model.generate(TOKENS, max_new_tokens=2, do_sample=True)
        assert torch.equal(model.generate(TOKENS, max_new_tokens=2, do_sample=False), expected)

    expected = small_model("llama").generate(TOKENS, max_new_tokens=2, do_sample=False)
    run_virtual(2, rank)


def test_a_text_that_the_clock_ends() -> None:
    def then(mine: Any) -> None:
        limited = transformers.GenerationConfig(max_time=9.0)
        criteria = [MaxTimeCriteria(9.0)]  # type: ignore[no-untyped-call]
        for given in ({"max_time": 9.0}, {"generation_config": limited}, {"stopping_criteria": criteria}):
            with pytest.raises(ArgumentError, match=r"with (max_time=9\.0|MaxTimeCriteria): each rank would stop by its own clock"):
                mine.generate(TOKENS, **given)
        with pytest.raises(ArgumentError, match="by its own clock"):
            mine.generate(TOKENS, limited)
        mine.generate(TOKENS, generation_config=limited, max_time=None, max_new_tokens=1)

    parallel(small_model("llama"), then)


def test_saving_without_a_state_writes_nothing(tmp_path: Path) -> None:
    def then(mine: Any) -> None:
        with pytest.raises(ArgumentError, match="each rank holds a part"):
            mine.save_pretrained(tmp_path)

    parallel(small_model("llama"), then)
    assert not any(tmp_path.iterdir())

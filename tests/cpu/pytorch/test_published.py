"""State dictionaries of quantized parallel models: the checkpoint's own names and bits, out and in, at any number of ranks."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from models import small_model
from quantized_models import SIZES, TOKENS, calibrated, compressed, fine_grained, linears, logits, modelopt
from torch import Tensor

import collogue
from collogue.errors import ArgumentError, ScaleError
from collogue.pytorch.recipes import RECIPES
from collogue.testing import VirtualGroup, run_virtual

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")

PRESETS = ("FP8", "FP8_DYNAMIC", "FP8_BLOCK", "NVFP4", "NVFP4A16", "MXFP8", "MXFP4")
CHECKPOINTS: dict[str, Callable[[], Any]] = {
    **{preset: functools.partial(compressed, preset) for preset in PRESETS},
    "fine-grained block": fine_grained,
    "fine-grained static": functools.partial(fine_grained, dynamic=False),
    "modelopt FP8": functools.partial(modelopt, fp4=False),
    "modelopt NVFP4": functools.partial(modelopt, fp4=True),
}
INPUTS = ("input_scale", "input_global_scale", "activation_scale")
#: Checkpoints with the names that models quantized on load have.
LIKE = {"fp8_per_token": "FP8_DYNAMIC", "fp8_block": "fine-grained block", "fp8_static": "FP8", "mxfp8": "MXFP8", "nvfp4": "NVFP4"}


def raw(tensor: Tensor) -> Tensor:
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8)


def check_same(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert list(found) == list(expected)
    for name, tensor in expected.items():
        assert (found[name].shape, found[name].dtype) == (tensor.shape, tensor.dtype), name
        assert torch.equal(raw(found[name]), raw(tensor)), name


def other(model: Any) -> Any:
    """The same model with other codes, scales and biases, and the same static scales of inputs."""
    model = copy.deepcopy(model)
    for layer in linears(model).values():
        for name, tensor in (*layer.named_parameters(recurse=False), *layer.named_buffers(recurse=False)):
            if name not in INPUTS:
                tensor.data = tensor.data * 2 if tensor.numel() == 1 else tensor.data.view(*tensor.shape).flip(0)
    return model


def state_of(model: Any, world_size: int, loaded: dict[str, Tensor] | None = None, **options: Any) -> tuple[dict[str, Tensor], Tensor]:
    """Of the parallel model, after ``loaded``: the same on every rank; and logits."""

    def rank(group: VirtualGroup) -> tuple[dict[str, Tensor], Tensor]:
        mine = collogue.parallelize(copy.deepcopy(model), group, max_tokens=TOKENS.numel(), **options)
        if loaded is not None:
            mine.load_state_dict(loaded)
        with torch.no_grad():
            found: Tensor = mine(TOKENS).logits
        return ({} if options.get("keep_packed") is False else collogue.full_state_dict(mine)), found

    first, *others = run_virtual(world_size, rank)
    for each in others:
        check_same(each[0], first[0])
    return first


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_what_was_loaded_comes_out(name: str) -> None:
    model = CHECKPOINTS[name]()
    expected = model.state_dict()
    for world_size in (1, 2, 3):
        check_same(state_of(model, world_size, keep_packed=True)[0], expected)


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_a_whole_state_is_loaded(name: str) -> None:
    """As if the model had been made of it; also where weights are decoded once."""
    model = CHECKPOINTS[name]()
    changed = other(model)
    expected = changed.state_dict()
    for world_size in (1, 2, 3):
        found, mine = state_of(model, world_size, expected, keep_packed=True)
        check_same(found, expected)
        assert torch.equal(mine, logits(changed, world_size, keep_packed=True))
        assert not torch.equal(mine, logits(model, world_size, keep_packed=True))
    assert torch.equal(state_of(model, 2, expected, keep_packed=False)[1], logits(changed, 2))


@pytest.mark.parametrize("name", RECIPES)
def test_models_that_are_quantized_on_load(name: str) -> None:
    """The names are those of a checkpoint of that scheme, which takes the state; so does another number of ranks."""
    model = small_model("llama", **SIZES)
    options: dict[str, Any] = {"quant": name, "keep_packed": True}
    if name in ("fp8_static", "nvfp4"):
        options["calibration"] = calibrated(model)
    state, expected = state_of(model, 1, **options)
    for world_size in (2, 3):
        check_same(state_of(model, world_size, **options)[0], state)
    unsharded = CHECKPOINTS[LIKE[name]]()
    assert {key: (tensor.shape, tensor.dtype) for key, tensor in unsharded.state_dict().items()} == {
        key: (tensor.shape, tensor.dtype) for key, tensor in state.items()
    }
    unsharded.load_state_dict(state)
    loaded = unsharded.state_dict()
    check_same({key: loaded[key] for key in state}, state)
    if name != "mxfp8":  # checkpoints round the powers of two of inputs down, the recipe rounds up
        assert torch.equal(logits(unsharded, 1, keep_packed=True), expected)
    blank = copy.deepcopy(model)
    for key, parameter in blank.named_parameters():
        if key.endswith("_proj.weight"):
            parameter.data = parameter.data.flip(0)
    found, mine = state_of(blank, 2, state, **options)
    check_same(found, state)
    assert torch.equal(mine, state_of(model, 2, **options)[1])


def test_biases() -> None:
    model = small_model("llama", **SIZES, attention_bias=True, mlp_bias=True)
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            parameter.data.normal_(generator=torch.Generator().manual_seed(2))
    options: dict[str, Any] = {"quant": "fp8_per_token", "keep_packed": True}
    state, _ = state_of(model, 1, **options)
    assert torch.equal(state["model.layers.0.mlp.down_proj.bias"], model.model.layers[0].mlp.down_proj.bias)
    changed = {name: tensor * 2 if name.endswith("bias") else tensor for name, tensor in state.items()}
    for world_size in (2, 3):
        check_same(state_of(model, world_size, **options)[0], state)
        check_same(state_of(model, world_size, changed, **options)[0], changed)


def test_what_cannot_be_given_or_loaded_is_a_named_error() -> None:
    model = small_model("llama", **SIZES)
    name = "model.layers.1.mlp.up_proj"
    packed: dict[str, Any] = {"max_tokens": 8, "quant": "fp8_static", "calibration": calibrated(model), "keep_packed": True}
    granite = small_model("granite", **SIZES, residual_multiplier=0.3)

    def rank(group: VirtualGroup) -> None:
        mine = collogue.parallelize(copy.deepcopy(model), group, **packed)
        with pytest.raises(ArgumentError, match=r"state_dict\(\) of a parallel model") as caught:
            mine.state_dict()
        assert "full_state_dict" in caught.value.hint
        state = collogue.full_state_dict(mine)
        for error, text, change in (
            (ArgumentError, rf"has {name}.weight, but no {name}.weight_scale", {name + ".weight_scale": None}),
            (ArgumentError, r"q_proj.weight of the state is torch.float32 \[768, 384\]", model.state_dict()),
            (ArgumentError, rf"{name}.weight_scale of the state is torch.float32 \[768, 1\]", {name + ".weight_scale": torch.ones(768, 1)}),
            (ScaleError, rf"{name}.input_scale of the state is 3.0, the layer's 0.0", {name + ".input_scale": torch.tensor([3.0])}),
        ):
            with pytest.raises(error, match=text):
                mine.load_state_dict({key: tensor for key, tensor in (state | change).items() if tensor is not None})
        bad = {key: tensor * 2 if key.startswith("model.layers.0.input_layernorm") else tensor for key, tensor in state.items()}
        for scale in (-1.0, float("nan")):
            with pytest.raises(ScaleError, match=rf"^{name}: .*positive"):
                mine.load_state_dict(bad | {f"{name}.weight_scale": torch.tensor([scale])})
        check_same(collogue.full_state_dict(mine), state)  # nothing was loaded
        mine.load_state_dict({key: tensor for key, tensor in state.items() if name not in key}, strict=False)
        check_same(collogue.full_state_dict(mine), state)
        part = collogue.full_state_dict(mine.model.layers[1].mlp.up_proj)
        check_same(part, {key: state[f"{name}.{key}"] for key in ("weight", "weight_scale", "input_scale")})
        decoded = collogue.parallelize(copy.deepcopy(model), group, **packed | {"keep_packed": False})
        with pytest.raises(ArgumentError, match=r"q_proj was decoded when the model was cut") as caught:
            collogue.full_state_dict(decoded)
        assert "keep_packed=True" in caught.value.hint
        scaled = collogue.parallelize(copy.deepcopy(granite), group, max_tokens=8, quant="fp8_per_token", keep_packed=True)
        embedding = scaled.model.embed_tokens.weight.clone()
        state = {"model.embed_tokens.weight": embedding * 2}
        for call in (lambda: collogue.full_state_dict(scaled), lambda: scaled.load_state_dict(state)):
            with pytest.raises(ArgumentError, match=r"not known where it has weights that hold the model's factor 0\.3"):
                call()
        assert torch.equal(scaled.model.embed_tokens.weight, embedding)

    for world_size in (1, 2):
        run_virtual(world_size, rank)

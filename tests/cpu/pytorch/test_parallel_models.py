"""``collogue.parallelize`` on models that are not as transformers made them: the unsharded logits, or an error, and then no change."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import parallel_checks
import pytest
import torch
import transformers
from models import own, small_model, state_rank
from parallel_checks import PEFT_FOLDER, TOKENS, check_refused, check_right, parallel_logits, peft, replace, with_lora, with_peft
from torch import nn

import collogue
from collogue.errors import ArgumentError, CollectiveError, ShapeError
from collogue.nn import ColumnParallelLinear, RowParallelLinear
from collogue.pytorch import parallel
from collogue.testing import VirtualGroup, run_virtual
from collogue.testing.processes import run_processes

pytestmark = [
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning"),
    pytest.mark.filterwarnings("ignore:torch.ao.quantization is deprecated:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:torch.quantize_per_tensor:UserWarning"),
]


# What is not a plain linear layer

ATTENTION, MLP = ("q_proj", "k_proj", "v_proj", "o_proj"), ("gate_proj", "up_proj", "down_proj")


class Wrapped(nn.Module):
    """Holds a linear layer and adds to it."""

    def __init__(self, base_layer: nn.Linear) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.extra = nn.Linear(base_layer.in_features, base_layer.out_features, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.base_layer(x) + self.extra(x)


class Scaled(nn.Linear):
    """A linear layer with a forward pass of its own."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return nn.functional.linear(x, self.weight * 3.0, self.bias)

    @classmethod
    def of(cls, linear: nn.Linear) -> Scaled:
        made = cls(linear.in_features, linear.out_features, linear.bias is not None)
        made.load_state_dict(linear.state_dict())
        return made


class Called(nn.Linear):
    """As :class:`Scaled`, by ``__call__``."""

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return super().__call__(x) * 3.0


def _parametrized(linear: nn.Linear) -> nn.Module:
    return nn.utils.parametrizations.weight_norm(linear)


def _hooked(linear: nn.Linear) -> nn.Module:
    linear.register_forward_hook(lambda module, args, out: out * 3.0)
    return linear


def _pre_hooked(linear: nn.Linear) -> nn.Module:
    linear.register_forward_pre_hook(lambda module, args: (args[0] * 3.0,))
    return linear


def _patched(linear: nn.Linear) -> nn.Module:
    forward = linear.forward
    linear.forward = lambda x: forward(x) * 3.0  # type: ignore[method-assign]
    return linear


ODD = {
    "wrapped": (Wrapped, "Wrapped, not a plain nn.Linear"),
    "subclass": (Scaled.of, "Scaled, not a plain nn.Linear"),
    "own call": (lambda linear: Called(linear.in_features, linear.out_features), "Called, not a plain nn.Linear"),
    "parametrized": (_parametrized, "computes its weight or bias"),
    "hook": (_hooked, "has a forward hook"),
    "pre hook": (_pre_hooked, "has a forward hook"),
    "patched": (_patched, "has a forward of its own"),
}


@pytest.mark.parametrize("names", [ATTENTION + MLP, MLP, ("layers.1.mlp.down_proj",), ("layers.0.self_attn.k_proj",)])
@pytest.mark.parametrize("kind", ODD)
def test_odd_linear_layers(kind: str, names: tuple[str, ...]) -> None:
    wrap, message = ODD[kind]
    for options in ({}, {"fuse": False}):
        check_refused(replace(small_model("llama"), wrap, *names), rf"layers\.\d\.\S* .*{message}", **options)


@pytest.mark.parametrize("kind", ODD)
@pytest.mark.parametrize("part", [RowParallelLinear, ColumnParallelLinear])
def test_odd_linear_layers_by_hand(kind: str, part: Any) -> None:
    wrap, message = ODD[kind]

    def rank(group: VirtualGroup) -> None:
        comm = collogue.Communicator(group, max_tokens=4, hidden_size=64, dtype=torch.float32)
        with pytest.raises(ArgumentError, match=f"the layer .*{message}"):
            part.of(wrap(nn.Linear(64, 64)), comm)
        with pytest.raises(ArgumentError, match=r"has a weight of torch\.int8"):
            part.of(_with_integers(nn.Linear(64, 64)), comm)

    run_virtual(2, rank)


def _with_integers(linear: nn.Linear) -> nn.Linear:
    linear.weight = nn.Parameter(torch.ones(64, 64, dtype=torch.int8), False)
    return linear


def test_quantized_layers() -> None:
    model = torch.ao.quantization.quantize_dynamic(small_model("llama"), {nn.Linear}, torch.qint8)
    check_refused(model, r"layers\.0\.self_attn\.q_proj is a torch\.ao\.nn\.quantized\.dynamic.*not a plain nn\.Linear")


@pytest.mark.parametrize("plan", [{"layers.*.mlp.*_proj": "colwise"}, {"layers.*.mlp.down_proj": "rowwise"}, {}])
def test_a_plan_that_names_only_some_layers(plan: dict[str, str]) -> None:
    """What is cut follows from the type of the model."""
    model = small_model("llama")
    model.config.base_model_tp_plan = plan
    check_right(model)


@pytest.mark.parametrize("wrap", [Scaled.of, _hooked, _patched])
def test_an_odd_output_layer_stays_whole(wrap: Any) -> None:
    check_right(replace(small_model("llama"), wrap, "lm_head"))


# What is not transformers' own


class OwnAttention(transformers.models.llama.modeling_llama.LlamaAttention):
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        out, weights = super().forward(*args, **kwargs)
        return out * 3.0, weights


class OwnMLP(transformers.models.llama.modeling_llama.LlamaMLP):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x) * 3.0


class OwnLayer(transformers.models.llama.modeling_llama.LlamaDecoderLayer):
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return super().forward(*args, **kwargs) * 3.0


@pytest.mark.parametrize("name", ["self_attn", "mlp", ""])
def test_layers_with_code_of_their_own(name: str) -> None:
    model = small_model("llama")
    for layer in model.model.layers:
        target = getattr(layer, name) if name else layer
        target.__class__ = {"self_attn": OwnAttention, "mlp": OwnMLP, "": OwnLayer}[name]
    check_refused(model, r"layers\.0\S* is a .*Own.* with a forward that is not transformers'")


@pytest.mark.parametrize("name", ["self_attn", "mlp", "mlp.act_fn", "input_layernorm", "post_attention_layernorm", ""])
def test_patched_before(name: str) -> None:
    model = small_model("llama")
    layer = model.model.layers[1]
    target = layer.get_submodule(name)
    forward = target.forward
    target.forward = lambda *args, **kwargs: forward(*args, **kwargs)
    check_refused(model, r"layers\.1\S* has a forward of its own")


@pytest.mark.parametrize("fuse", [True, False])
@pytest.mark.parametrize("kind", [nn.Softmax, nn.Flatten])
def test_activations_that_may_mix_features(kind: Any, fuse: bool) -> None:
    """Each rank has a part of the features only."""
    model = replace(small_model("llama"), lambda _: kind(-1), "model.layers.1.mlp.act_fn")
    check_refused(model, r"layers\.1\.mlp\.act_fn is a .* not an activation known to act on each element alone", fuse=fuse)


def test_not_a_transformers_model() -> None:
    class Config:
        model_type = "llama"

    class Pretender(nn.Module):
        config = Config()

    def rank(group: VirtualGroup) -> None:
        for model in (nn.Linear(4, 4), nn.Sequential(), None, "llama", lambda x: x):
            with pytest.raises(ArgumentError, match=r"expected a transformers decoder, got \S+\nhint: pass AutoModelForCausalLM"):
                collogue.parallelize(model, group)
        with pytest.raises(ArgumentError, match="has no layers and norm"):
            collogue.parallelize(Pretender(), group)

    run_virtual(2, rank)


# Errors half way


def test_features_that_do_not_divide() -> None:
    check_refused(small_model("llama", intermediate_size=191), "191 features do not divide among 2 ranks", error=ShapeError)


def test_an_unknown_norm_in_the_last_layer() -> None:
    for name in ("layers.1.post_attention_layernorm", "model.norm"):
        check_refused(replace(small_model("llama"), lambda norm: nn.LayerNorm(64), name), "LayerNorm is not an RMSNorm that Collogue knows")


def test_a_model_that_is_parallel_already() -> None:
    model = small_model("llama")
    model._tp_size = 2
    check_refused(model, "transformers has made the model tensor-parallel")

    def rank(group: VirtualGroup) -> None:
        mine = collogue.parallelize(own(small_model("llama")), group, max_tokens=8)
        logits = mine(TOKENS).logits
        with pytest.raises(ArgumentError, match="the model is parallel already"):
            collogue.parallelize(mine, group)
        assert torch.equal(mine(TOKENS).logits, logits)

    run_virtual(2, rank)


@pytest.mark.parametrize("error", [torch.cuda.OutOfMemoryError("no memory"), KeyboardInterrupt()])
@pytest.mark.parametrize("step", ["FusedRMSNorm", "Boundaries", "Untouched", "ColumnParallelLinear"])
def test_an_error_while_the_model_is_cut(step: str, error: BaseException, monkeypatch: pytest.MonkeyPatch) -> None:
    original, model = getattr(parallel, step), small_model("llama").train()
    model.lm_head.requires_grad_(True)
    expected, grads = model(TOKENS).logits, [p.requires_grad for p in model.parameters()]
    calls: list[int] = []

    def failing(*args: Any, **kwargs: Any) -> Any:
        calls.append(1)
        if len(calls) == 2:
            raise error
        return original(*args, **kwargs)

    monkeypatch.setattr(parallel, step, failing)

    def rank(group: VirtualGroup) -> None:
        with pytest.raises(type(error)):
            collogue.parallelize(model, group, max_tokens=8)

    run_virtual(1, rank)
    assert "generate" not in vars(model)
    assert [p.requires_grad for p in model.parameters()] == grads
    assert model.training
    assert torch.equal(model(TOKENS).logits, expected)
    monkeypatch.setattr(parallel, step, original)
    check_right(model.requires_grad_(False).eval())


def test_an_error_of_one_rank_is_an_error_of_all() -> None:
    sizes = {"hidden_size": 96, "num_attention_heads": 6, "num_key_value_heads": 3}

    def rank(group: VirtualGroup) -> None:
        model = small_model("llama", **sizes)
        if group.rank == 1:
            model.model.norm = nn.LayerNorm(96)
        with pytest.raises(ArgumentError, match=("rank 1: " if group.rank != 1 else "") + "norm: LayerNorm is not an RMSNorm"):
            collogue.parallelize(model, group)
        with pytest.raises(ArgumentError, match="ranks 0 and 1 have different models"):
            collogue.parallelize(small_model("llama", **sizes, intermediate_size=96 + 48 * (group.rank == 1)), group)

    run_virtual(3, rank, timeout=20)


# Hooks


@pytest.mark.parametrize(
    "name", ["mlp", "self_attn", "mlp.down_proj", "self_attn.o_proj", "mlp.gate_proj", "mlp.act_fn", "post_attention_layernorm"]
)
@pytest.mark.parametrize("how", ["hook", "pre hook", "patch", "replace"])
def test_hooks_inside_a_layer_are_found(name: str, how: str) -> None:
    def rank(group: VirtualGroup) -> None:
        mine = collogue.parallelize(own(small_model("llama")), group, max_tokens=8)
        mine(TOKENS)
        layer = mine.model.layers[1]
        target, undo = layer.get_submodule(name), None
        if how == "hook":
            undo = target.register_forward_hook(lambda module, args, out: None)
        elif how == "pre hook":
            undo = target.register_forward_pre_hook(lambda module, args: None)
        elif how == "patch":
            target.forward = lambda *args, **kwargs: type(target).forward(target, *args, **kwargs)
        else:
            layer.set_submodule(name, nn.Identity())
        with pytest.raises(ArgumentError, match=rf"{name} of a decoder layer .* after parallelize\nhint: put hooks on"):
            mine(TOKENS)
        if undo is not None:
            undo.remove()
            mine(TOKENS)

    run_virtual(2, rank)


@pytest.mark.parametrize("name", ["input_layernorm", "post_attention_layernorm"])
def test_norms_that_are_replaced_later(name: str) -> None:
    """The layer before has finished what the first one reads."""

    def rank(group: VirtualGroup) -> None:
        mine = collogue.parallelize(own(small_model("llama")), group, max_tokens=8)
        mine.model.layers[1].set_submodule(name, small_model("llama").model.layers[0].get_submodule(name))
        with pytest.raises(ArgumentError, match=f"{name} of a decoder layer was replaced after parallelize"):
            mine(TOKENS)

    run_virtual(2, rank)


def test_a_parallel_model_cannot_be_pickled() -> None:
    def rank(group: VirtualGroup) -> None:
        mine = collogue.parallelize(own(small_model("llama")), group, max_tokens=8)
        with pytest.raises(ArgumentError, match="a communicator cannot be copied or pickled"):
            pickle.dumps(mine)

    run_virtual(2, rank)


def test_hooks_on_all_modules_are_found() -> None:
    def rank(group: VirtualGroup) -> None:
        mine = collogue.parallelize(small_model("llama"), group, max_tokens=8)
        hook = nn.modules.module.register_module_forward_hook(lambda module, args, out: None)
        with pytest.raises(ArgumentError, match="on all modules after parallelize"):
            mine(TOKENS)
        hook.remove()
        mine(TOKENS)

    run_virtual(1, rank)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("kind", ["llama", "gemma2", "glm4", "granite"])
def test_hooks_that_see_whole_tensors(kind: str, mode: Any) -> None:
    """On layers, the first norm and the last: they see, and may change, what they would in the unsharded model."""
    names = ("model.layers.0", "model.layers.1", "model.layers.1.input_layernorm", "model.norm", "lm_head")

    def told(model: Any) -> list[torch.Tensor]:
        seen: list[torch.Tensor] = []

        def hook(module: nn.Module, args: Any, out: torch.Tensor) -> torch.Tensor:
            seen.extend((args[0].clone(), out.clone()))
            if module is model.model.layers[1]:
                return out * 1.5
            return out.mul_(1.5)

        def before(module: nn.Module, args: Any) -> None:
            args[0].add_(0.25)

        for name in names:
            model.get_submodule(name).register_forward_hook(hook)
        model.model.layers[1].register_forward_pre_hook(before)
        with mode():
            seen.append(model(TOKENS).logits)
        return seen

    model = small_model(kind)

    def rank(group: VirtualGroup) -> list[torch.Tensor]:
        return told(collogue.parallelize(own(model), group, max_tokens=8))

    for found in run_virtual(2, rank):
        torch.testing.assert_close(found, told(own(model)), rtol=1e-4, atol=1e-4)


def test_what_transformers_records() -> None:
    """Hidden states, by hooks of its own on layers and attention, before and after; attention weights are one rank's."""
    model, fresh = (small_model("llama", attn_implementation="eager") for _ in range(2))
    expected = model(TOKENS, output_hidden_states=True).hidden_states

    def rank(group: VirtualGroup) -> None:
        for each in (model, fresh):
            mine = collogue.parallelize(own(each), group, max_tokens=8)
            found = mine(TOKENS, output_hidden_states=True).hidden_states
            torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
            with pytest.raises(ArgumentError, match="output_attentions=True: each rank has"):
                mine(TOKENS, output_attentions=True)
            mine.config.output_attentions = True
            with pytest.raises(ArgumentError, match="output_attentions=True: each rank has"):
                mine(TOKENS)

    run_virtual(2, rank)


# Heads


@pytest.mark.parametrize("kind", ["llama", "gemma2", "qwen3", "phi3", "glm4", "olmo2"])
@pytest.mark.parametrize(("heads", "keys", "world_size"), [(4, 1, 2), (4, 2, 4), (4, 1, 4), (8, 2, 4), (6, 3, 6), (6, 2, 6), (8, 4, 2)])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_key_value_heads(kind: str, heads: int, keys: int, world_size: int, attention: str) -> None:
    if kind == "gemma2" and attention == "sdpa":
        pytest.skip("transformers has no such attention for Gemma 2")
    sizes = {"num_attention_heads": heads, "num_key_value_heads": keys, "attention_bias": True, "attn_implementation": attention}
    sizes["hidden_size"] = 16 * heads
    check_right(small_model(kind, **sizes), world_size)


GRANITE = {"residual_multiplier": 0.22, "embedding_multiplier": 12.0, "attention_multiplier": 0.07, "logits_scaling": 8.0}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bias", [False, True])
def test_granite(bias: bool, dtype: torch.dtype) -> None:
    """Its factors: that of the residual is taken by the row-parallel layers, whose weights stay what they are."""
    model = small_model("granite", attention_bias=bias, mlp_bias=bias, **GRANITE).to(dtype)
    if dtype == torch.float32:
        check_right(model)
        check_right(model, 4)
    else:
        exact = small_model("granite", attention_bias=bias, mlp_bias=bias, **GRANITE)(TOKENS).logits
        far = (model(TOKENS).logits.float() - exact).abs().max()
        assert (parallel_logits(model).float() - exact).abs().max() <= 1.5 * far

    def rank(group: VirtualGroup) -> dict[str, torch.Tensor]:
        return collogue.full_state_dict(collogue.parallelize(own(model), group, max_tokens=8))

    for state in run_virtual(2, rank):
        assert all(torch.equal(state[name], tensor) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize("kind", ["phi3", "glm4", "olmo2", "granite"])
def test_checkpoints_of_other_forms(kind: str) -> None:
    """Products of several parts are cut part by part, and put together again."""
    model = small_model(kind, num_key_value_heads=2)
    expected = model.state_dict()

    def rank(group: VirtualGroup) -> dict[str, torch.Tensor]:
        mine = collogue.parallelize(copy.deepcopy(model), group, max_tokens=8)
        state = collogue.full_state_dict(mine)
        logits = mine(TOKENS).logits
        for parameter in mine.parameters():
            parameter.data = torch.zeros_like(parameter)
        mine.load_state_dict(expected, assign=group.rank == 1)
        assert torch.equal(mine(TOKENS).logits, logits)
        return state

    for world_size in (2, 4):
        for state in run_virtual(world_size, rank):
            assert list(state) == list(expected)
            assert all(torch.equal(state[name], tensor) for name, tensor in expected.items())


@with_peft
@pytest.mark.parametrize("kind", ["phi3", "glm4", "olmo2", "granite"])
def test_lora_of_other_forms(kind: str) -> None:
    check_right(with_lora(small_model(kind, **GRANITE if kind == "granite" else {})))


def test_products_of_several_parts_that_do_not_divide() -> None:
    check_refused(small_model("phi3", intermediate_size=191), "382 features do not divide among 2 ranks", error=ShapeError)
    model = small_model("phi3")
    model.model.layers[1].self_attn.qkv_proj = nn.Linear(64, 130, bias=False)
    with pytest.raises(ShapeError, match="130 features do not divide"):
        parallel_logits(model)


def test_heads_that_do_not_divide() -> None:
    for heads, keys in ((6, 3), (3, 1), (5, 5)):
        model = small_model("llama", num_attention_heads=heads, num_key_value_heads=keys, hidden_size=16 * heads)
        check_refused(model, f"{heads} heads and {keys} key-value heads do not divide among 2 ranks")


# Generation


def test_sampling_without_a_common_generator_is_an_error() -> None:
    """Virtual ranks share one generator: what each draws is its own."""

    def rank(group: VirtualGroup) -> None:
        mine = collogue.parallelize(own(small_model("llama")), group, max_tokens=8)
        other = TOKENS + (group.rank == 1)
        with pytest.raises(ArgumentError, match="ranks 0 and 1 call generate with different tensors"):
            mine.generate(other, max_new_tokens=2)

        def prefer(batch: int, ids: torch.Tensor) -> list[int]:
            return [4 + group.rank]

        with pytest.raises(CollectiveError, match="ranks 0 and 1 chose different tokens"):
            mine.generate(TOKENS, max_new_tokens=1, prefix_allowed_tokens_fn=prefer)

    run_virtual(2, rank)


# Processes: checkpoints, sampling, and LoRA without fusion


@pytest.fixture(scope="module")
def told(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    return run_processes(2, state_rank, str(tmp_path_factory.mktemp("saved")), PEFT_FOLDER)


@pytest.mark.slow
@pytest.mark.parametrize(
    "what", ["sampled", "beams", "assisted", "own generators", "whole", "saved", "refused", "loaded", "unfused", "compiled"]
)
def test_in_processes(told: list[dict[str, Any]], what: str) -> None:
    for rank in told:
        assert rank[what] is True, rank[what]


# LoRA


@with_peft
def test_an_adapter_for_each_row() -> None:
    model = with_lora(small_model("llama"))
    model.add_adapter("other", with_lora(small_model("llama")).peft_config["default"])
    names = ["other", "__base__"]
    expected = model(TOKENS, adapter_names=names).logits
    for logits in parallel_checks.parallel(model, lambda mine: mine(TOKENS, adapter_names=names).logits):
        torch.testing.assert_close(logits, expected, rtol=1e-5, atol=1e-5)


@with_peft
def test_layers_that_share_an_adapter_are_refused() -> None:
    model = small_model("llama")
    model.model.layers[1].mlp = model.model.layers[0].mlp
    parallel_checks.check_refused(with_lora(model, target_modules=list(MLP)), "are one layer with adapters")


def test_layers_that_share_what_is_quantized_are_refused() -> None:
    model = small_model("llama")
    model.model.layers[1].mlp = model.model.layers[0].mlp
    check_refused(model, "layers.0.mlp.gate_proj and layers.1.mlp.gate_proj are one layer that is quantized", quant="fp8_per_token")
    check_right(model)


def test_a_model_without_layers_is_refused() -> None:
    check_refused(small_model("llama", num_hidden_layers=0), "LlamaModel has no decoder layers")


@with_peft
@pytest.mark.parametrize("targets", ["all-linear", list(MLP), ["o_proj"], ["q_proj", "v_proj"], [*ATTENTION, "lm_head"]])
def test_lora(targets: Any) -> None:
    model = with_lora(small_model("llama", attention_bias=True, mlp_bias=True), target_modules=targets)
    assert not torch.allclose(model(TOKENS).logits, small_model("llama", attention_bias=True, mlp_bias=True)(TOKENS).logits, atol=0.1)
    check_right(model)
    check_right(model.get_base_model())


@with_peft
def test_lora_adapters_are_switched_and_merged() -> None:
    model = with_lora(small_model("llama"))
    model.add_adapter("other", peft.LoraConfig(target_modules="all-linear", r=2, lora_alpha=16, init_lora_weights=False))

    @torch.no_grad()
    def steps(mine: Any) -> list[torch.Tensor]:
        seen = [mine(TOKENS).logits]
        mine.set_adapter("other")
        seen.append(mine(TOKENS).logits)
        with mine.disable_adapter():
            seen.append(mine(TOKENS).logits)
        mine.merge_adapter()
        seen.append(mine(TOKENS).logits)
        mine.unmerge_adapter()
        seen.append(mine(TOKENS).logits)
        return seen

    def rank(group: VirtualGroup) -> list[torch.Tensor]:
        return steps(collogue.parallelize(copy.deepcopy(model), group, max_tokens=8))

    found = run_virtual(2, rank)
    for mine in found:
        torch.testing.assert_close(mine, steps(copy.deepcopy(model)), rtol=1e-4, atol=1e-4)


@with_peft
def test_other_adapters_are_refused() -> None:
    check_refused(with_lora(small_model("llama"), use_dora=True), r"q_proj is peft's LoRA, but adapter 'default' is Dora")
    check_refused(
        with_lora(small_model("llama", attention_bias=True, mlp_bias=True), lora_bias=True),
        r"q_proj is peft's LoRA, but adapter 'default' has a bias",
    )
    for config in (peft.IA3Config(target_modules=list(MLP), feedforward_modules=list(MLP)), peft.LoHaConfig(target_modules=list(MLP))):
        check_refused(peft.get_peft_model(small_model("llama"), config).eval(), r"gate_proj is a peft\.\S+, not a plain nn\.Linear")
    prompt = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4)
    check_refused(peft.get_peft_model(small_model("llama"), prompt).eval(), "the model has a PromptTuningConfig")


# Checkpoints in threads


def test_checkpoints_at_several_world_sizes() -> None:
    """What one world gives loads unsharded and in every other world."""
    sizes = {"num_attention_heads": 4, "num_key_value_heads": 2, "attention_bias": True, "hidden_size": 64}
    model, empty = small_model("llama", **sizes), small_model("llama", **sizes)
    expected = model.state_dict()
    for parameter in empty.parameters():
        parameter.zero_()

    def save(group: VirtualGroup) -> dict[str, torch.Tensor]:
        mine = collogue.parallelize(own(model), group, max_tokens=8)
        part = collogue.full_state_dict(mine.model)
        assert all(torch.equal(part[name.removeprefix("model.")], expected[name]) for name in expected if "lm_head" not in name)
        with pytest.raises(ArgumentError, match="expected a module, got dict"):
            collogue.full_state_dict({})  # type: ignore[arg-type]
        return collogue.full_state_dict(mine)

    for world_size in (1, 2, 4):
        for state in run_virtual(world_size, save):
            assert list(state) == list(expected)
            assert all(torch.equal(state[name], tensor) for name, tensor in expected.items())

    def load(group: VirtualGroup) -> torch.Tensor:
        mine = collogue.parallelize(copy.deepcopy(empty), group, max_tokens=8)
        mine.load_state_dict(expected)
        logits: torch.Tensor = mine(TOKENS).logits
        return logits

    for world_size in (1, 2, 4):
        for logits in run_virtual(world_size, load):
            torch.testing.assert_close(logits, model(TOKENS).logits, rtol=1e-5, atol=1e-5)
    assert all(torch.equal(collogue.full_state_dict(model)[name], tensor) for name, tensor in expected.items())


def test_terms_that_travel_in_fewer_bytes() -> None:
    """Near the whole model's logits, and not the bits that they are without."""
    model = small_model("llama")
    whole, plain = model(TOKENS).logits, parallel_logits(model)
    less = parallel_logits(model, wire=collogue.FP8Group(16))
    assert not torch.equal(less, plain)
    assert (less - whole).norm() < 0.1 * whole.norm()

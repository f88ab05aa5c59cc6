"""What a process of a gloo group does with a transformers model and with DTensor."""

from __future__ import annotations

import copy
import sys
import threading
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import transformers

import collogue
from collogue import RMSNorm

SMALL = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "vocab_size": 128,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
}


#: Types whose layers have other parts than Llama's.
OTHER_FORMS = ("gemma2", "phi3", "glm4", "olmo2", "granite")

#: What models with experts have more. Those that may have dense layers as well have one.
_EXPERTS = {"num_experts": 4, "num_local_experts": 4, "num_experts_per_tok": 2}
_LATENT = {
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 8,
    "v_head_dim": 16,
    "kv_lora_rank": 24,
    "head_dim": 8,
    "num_key_value_heads": 4,
    "n_group": 2,
    "topk_group": 1,
    "n_routed_experts": 4,
    "n_shared_experts": 1,
    "moe_intermediate_size": 48,
    "first_k_dense_replace": 1,
    "num_hidden_layers": 3,
    "routed_scaling_factor": 1.5,
}
EXPERTS: dict[str, dict[str, Any]] = {
    "mixtral": _EXPERTS,
    "qwen2_moe": _EXPERTS | {"moe_intermediate_size": 48, "shared_expert_intermediate_size": 96, "mlp_only_layers": [0]},
    "qwen3_moe": _EXPERTS | {"moe_intermediate_size": 48, "mlp_only_layers": [1], "norm_topk_prob": True},
    "olmoe": _EXPERTS | {"clip_qkv": 0.5},
    "deepseek_v2": _EXPERTS | _LATENT | {"q_lora_rank": None, "topk_method": "greedy"},
    "deepseek_v3": _EXPERTS | _LATENT | {"q_lora_rank": 40},
    "gpt_oss": _EXPERTS,
}


_seeded = threading.Lock()


def small_model(kind: str, **changed: Any) -> Any:
    """A tiny decoder with random weights, the same at every call, in every thread."""
    config = transformers.AutoConfig.for_model(kind, **SMALL | EXPERTS.get(kind, {}) | changed)
    with _seeded:
        torch.manual_seed(0)
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval().requires_grad_(False)
        for parameter in model.parameters():  # norms and biases that are not all the same
            parameter.add_(torch.randn_like(parameter) * 0.05)
    return model


def own(model: Any) -> Any:
    """The model's modules again, with the same weights."""
    return copy.deepcopy(model, {id(p): p for p in model.parameters()})


def parallel_rank(group: dist.ProcessGroup, tell: Any, file: Path, tokens: torch.Tensor, layers: int) -> dict[str, Any]:
    """The model's logits, fused; the first layers once more, by the pass on plain collectives; DTensor's all-reduce."""
    told: dict[str, Any] = {}
    model = torch.load(file, mmap=True, weights_only=False)

    def part(fuse: bool) -> Any:
        mine = copy.deepcopy(model, {id(p): p for p in model.parameters()})
        return collogue.parallelize(mine, group, max_tokens=tokens.numel(), fuse=fuse)

    with torch.no_grad():
        tell("all layers")
        told["logits"] = part(True)(tokens).logits.numpy()  # a tensor would be shared memory of a process that ends
        model.model.layers = model.model.layers[:layers]
        model.config.num_hidden_layers = layers
        tell("first layers")
        fused, plain = part(True), part(False)
        # The first norm follows no all-reduce: the pass leaves it to the model, which here gets the fused model's.
        plain.model.layers[0].input_layernorm = fused.model.layers[0].input_layernorm
        eager = fused(tokens, use_cache=False).logits
        tell("compiled")
        step = collogue.compile(plain, backend="eager", fullgraph=True)
        told["same bits"] = torch.equal(step(tokens, use_cache=False).logits, eager)
        told["report"] = copy.deepcopy(collogue.compile.report())
        tell("small graphs")
        told["dtensor"], told["sharded"] = _dtensor(group), _sharded(group)
    return told


def _sharded(group: dist.ProcessGroup) -> tuple[bool, list[str]]:
    """Whether two layers' ends with a sharded stream have the bits of two whole calls."""
    from torch.distributed._functional_collectives import all_reduce

    rank, world = dist.get_rank(group), dist.get_world_size(group)
    partials = [torch.randn(7, 64, generator=torch.Generator().manual_seed(r)).bfloat16() for r in range(world)]
    stream, weight = torch.randn(7, 64, generator=torch.Generator().manual_seed(99)).bfloat16(), torch.ones(64).bfloat16()

    def model(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        for _ in range(2):
            y = y + all_reduce(x * 1, "sum", group)
            x = torch.nn.functional.rms_norm(y, (64,), weight, 1e-5)
        return x

    collogue.compile.report().clear()
    with collogue.Communicator(group, max_tokens=7, hidden_size=64) as comm:
        found = collogue.compile(model, backend="eager", fullgraph=True, sharded=True)(partials[rank], stream)
        norm = RMSNorm(weight, 1e-5)
        first = comm.all_reduce(partials[rank], residual=stream, norm=norm)
        assert first.norm is not None
        expected = comm.all_reduce(first.norm, residual=first.residual, norm=norm).norm
    assert expected is not None
    return torch.equal(found, expected), list(collogue.compile.report().remarks)


def _dtensor(group: dist.ProcessGroup) -> tuple[bool, str]:
    """Whether Partial to Replicate and a norm are fused with the contract's bits."""
    from torch.distributed.device_mesh import DeviceMesh
    from torch.distributed.tensor import DTensor, Partial, Replicate

    mesh, world = DeviceMesh.from_group(group, "cpu"), dist.get_world_size(group)
    partials = [torch.randn(4, 64, generator=torch.Generator().manual_seed(r)).bfloat16() for r in range(world)]
    weight = torch.rand(64).bfloat16()

    def model(x: torch.Tensor) -> torch.Tensor:
        y = DTensor.from_local(x * 1, mesh, [Partial()]).redistribute(mesh, [Replicate()]).to_local()
        return torch.nn.functional.rms_norm(y, (64,), weight, 1e-5)

    collogue.compile.report().clear()
    with collogue.Communicator(group, max_tokens=4, hidden_size=64):
        found = collogue.compile(model, backend="eager", fullgraph=True)(partials[dist.get_rank(group)])
    expected = collogue.reference.all_reduce(partials, norm=RMSNorm(weight, 1e-5)).norm
    assert expected is not None
    return torch.equal(found, expected), str(collogue.compile.report())


def state_rank(group: dist.ProcessGroup, tell: Any, folder: str, peft_folder: str | None) -> dict[str, Any]:
    """Checkpoints of a parallel model, and sampling: ``True`` for all that is right."""
    told: dict[str, Any] = {}
    tokens, rank = torch.tensor([[1, 5, 9, 100], [3, 3, 7, 2]]), dist.get_rank(group)
    for tied in (False, True):
        for what, right in _checkpoints(group, f"{folder}/{tied}", tied, tokens).items():
            told[what] = told.get(what, True) and right
    tell("sampling")
    model, unsharded = collogue.parallelize(small_model("llama"), group, max_tokens=16), small_model("llama")
    assistant = collogue.parallelize(small_model("llama", num_hidden_layers=1), group, max_tokens=16)
    for name, options in ("sampled", {}), ("beams", {"num_beams": 2}), ("assisted", {"assistant_model": assistant}):
        options |= {"do_sample": True, "max_new_tokens": 6, "min_new_tokens": 6, "attention_mask": torch.ones_like(tokens)}
        if name == "assisted":  # of one row at a time
            tokens, options["attention_mask"] = tokens[:1], torch.ones_like(tokens[:1])
        alone = {"assistant_model": small_model("llama", num_hidden_layers=1)} if name == "assisted" else {}
        torch.manual_seed(7)
        expected = unsharded.generate(tokens, **options | alone)
        torch.manual_seed(7 + 50 * rank)
        before = torch.get_rng_state()
        told[name] = torch.equal(model.generate(tokens, **options), expected)
    told["own generators"] = rank == 0 or torch.equal(torch.get_rng_state(), before)
    tell("unfused")
    told["unfused"] = _unfused(group, tokens, peft_folder)
    with torch.no_grad():
        told["compiled"] = True
        for kind in ("llama", *OTHER_FORMS, *EXPERTS):
            tell(f"compiled: {kind}")
            torch.compiler.reset()
            model = collogue.parallelize(small_model(kind), group, max_tokens=16)
            step = torch.compile(model, backend="eager", fullgraph=True)
            told["compiled"] &= torch.equal(step(tokens, use_cache=False).logits, model(tokens, use_cache=False).logits)
    return told


def _checkpoints(group: dist.ProcessGroup, folder: str, tied: bool, tokens: torch.Tensor) -> dict[str, bool]:
    told = {}
    sizes = {"num_key_value_heads": 1, "attention_bias": True, "mlp_bias": True, "tie_word_embeddings": tied}
    whole = small_model("llama", **sizes)
    logits, expected = whole(tokens).logits, whole.state_dict()
    mine = collogue.parallelize(small_model("llama", **sizes), group, max_tokens=16)
    if dist.get_rank(group) == 0:  # without the other rank
        refused = [mine.state_dict, mine.model.state_dict, lambda: mine.save_pretrained(folder)]
        refused += [] if tied else [mine.lm_head.state_dict]  # a tied one is whole
        told["refused"] = all("hint: call collogue.full_state_dict" in _error(call) for call in refused)
        told["refused"] &= not Path(folder).exists()
    else:
        told["refused"] = True
    found = collogue.full_state_dict(mine)
    told["whole"] = list(found) == list(expected) and all(torch.equal(found[name], tensor) for name, tensor in expected.items())
    if dist.get_rank(group) == 0:
        mine.save_pretrained(folder, state_dict=dict(found))  # it takes the tensors out
    dist.barrier()
    loaded = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    told["saved"] = torch.equal(loaded(tokens).logits, logits)
    other = small_model("llama", **sizes)
    for parameter in other.parameters():
        parameter.zero_()
    other = collogue.parallelize(other, group, max_tokens=16)
    if dist.get_rank(group) == 0:  # cutting communicates nothing
        other.load_state_dict(found)
    dist.barrier()
    if dist.get_rank(group) == 1:
        other.load_state_dict(found, assign=True)
    told["loaded"] = torch.equal(other(tokens).logits, mine(tokens).logits)
    told["loaded"] &= "size mismatch for " in _error(lambda: other.load_state_dict(dict(mine.named_parameters())))
    return told


def _error(call: Any) -> str:
    try:
        call()
    except (RuntimeError, ValueError) as error:
        return str(error)
    return "no error"


def _unfused(group: dist.ProcessGroup, tokens: torch.Tensor, peft_folder: str | None) -> bool:
    """Whether ``fuse=False`` gives the unsharded logits, with hooks on whole tensors, and with LoRA."""
    model, whole = collogue.parallelize(small_model("llama"), group, max_tokens=16, fuse=False), small_model("llama")
    seen: list[list[torch.Tensor]] = [[], []]
    for each, found in zip((model, whole), seen, strict=True):
        for name in ("mlp", "post_attention_layernorm"):
            each.model.layers[0].get_submodule(name).register_forward_hook(lambda m, a, out, found=found: found.append(out) or out * 2)
        found.append(each(tokens).logits)
    right = all(torch.allclose(a, b, rtol=1e-5, atol=1e-5) for a, b in zip(*seen, strict=True))
    model.model.layers[0].mlp.down_proj.register_forward_hook(lambda m, a, out: None)
    right &= "mlp.down_proj of a decoder layer has a forward hook" in _error(lambda: model(tokens))
    trained = collogue.parallelize(small_model("llama"), group, max_tokens=16, fuse=False)
    with torch.enable_grad():
        right &= "the partial requires grad" in _error(lambda: trained(inputs_embeds=torch.zeros(1, 4, 64, requires_grad=True)))
    for kind in (*OTHER_FORMS, *EXPERTS):
        options = {"residual_multiplier": 0.22} if kind == "granite" else {}
        model, whole = collogue.parallelize(small_model(kind, **options), group, max_tokens=16, fuse=False), small_model(kind, **options)
        right &= torch.allclose(model(tokens).logits, whole(tokens).logits, rtol=1e-5, atol=1e-5)
    shared = [small_model("mixtral") for _ in range(2)]
    for each in shared:
        each.model.layers[1].mlp = each.model.layers[0].mlp
    right &= torch.allclose(
        collogue.parallelize(shared[0], group, max_tokens=16, fuse=False)(tokens).logits, shared[1](tokens).logits, rtol=1e-5, atol=1e-5
    )
    if peft_folder is None:
        return right
    sys.path.insert(0, peft_folder)
    import peft

    torch.manual_seed(1)
    config = peft.LoraConfig(target_modules="all-linear", r=4, init_lora_weights=False)
    lora = peft.get_peft_model(small_model("llama", mlp_bias=True), config).eval()
    expected, state = lora(tokens).logits, lora.state_dict()
    lora = collogue.parallelize(lora, group, max_tokens=16, fuse=False)
    found = collogue.full_state_dict(lora)
    right &= list(found) == list(state) and all(torch.equal(found[name], tensor) for name, tensor in state.items())
    return right and torch.allclose(lora(tokens).logits, expected, rtol=1e-5, atol=1e-5)

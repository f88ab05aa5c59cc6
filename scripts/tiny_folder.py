"""A tiny random model as a Hugging Face folder, with another's tokenizer. `python scripts/tiny_folder.py qwen3 FOLDER TOKENIZER`."""

from __future__ import annotations

import argparse
import shutil
from pathlib import Path
from typing import Any

import torch
import transformers

SIZES = {
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 3,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 32,
    "max_position_embeddings": 256,
}


def make(kind: str, vocabulary: int) -> Any:
    """The model; its norms' weights are random too, so that a wrong one is seen."""
    torch.manual_seed(1)
    sizes = SIZES | {"vocab_size": vocabulary, "initializer_range": 0.15}
    if kind == "qwen3":
        model: Any = transformers.Qwen3ForCausalLM(transformers.Qwen3Config(**sizes))
    else:
        model = transformers.Gemma3ForCausalLM(transformers.Gemma3TextConfig(**sizes, query_pre_attn_scalar=32, sliding_window=64))
    for name, parameter in model.named_parameters():
        if "norm" in name:
            parameter.data.add_(torch.randn_like(parameter) * 0.2)
    return model


def main() -> None:
    """Write the folder."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("kind", choices=("qwen3", "gemma3"))
    parser.add_argument("folder", type=Path)
    parser.add_argument("tokenizer", type=Path)
    asked = parser.parse_args()
    tokenizer = transformers.AutoTokenizer.from_pretrained(asked.tokenizer)
    make(asked.kind, len(tokenizer)).save_pretrained(asked.folder)
    for file in asked.tokenizer.glob("*token*"):
        shutil.copy(file, asked.folder)


if __name__ == "__main__":
    main()

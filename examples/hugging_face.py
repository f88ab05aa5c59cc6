"""A Hugging Face model on several ranks: `collogue.parallelize` cuts it and fuses the end of every attention and MLP block.

torchrun --nproc-per-node 3 examples/hugging_face.py        (SmolLM2-135M: docs/tutorials/hugging_face.md)
"""

from typing import Any

import torch
import torch.distributed as dist

import collogue


def main(model: Any = None, tokenizer: Any = None) -> None:
    device = "cuda" if torch.cuda.device_count() >= 3 else "cpu"
    if not dist.is_initialized():
        dist.init_process_group("nccl" if device == "cuda" else "gloo")
    if device == "cuda":
        torch.cuda.set_device(dist.get_rank())
    if model is None:  # any Llama, Mistral, Qwen or Gemma of AutoModelForCausalLM.from_pretrained
        from collogue.tools.demo.weights import read_model

        model, tokenizer = read_model()
    collogue.parallelize(model, dist.group.WORLD, max_tokens=256)
    prompt = torch.tensor([[1, 2, 3]]) if tokenizer is None else tokenizer("The capital of France is", return_tensors="pt").input_ids
    prompt = prompt.to(model.comm.device)
    with torch.inference_mode():
        tokens = model.generate(prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=8, do_sample=False)[0]
    if dist.get_rank() == 0:
        print("rank 0:", tokens.tolist() if tokenizer is None else tokenizer.decode(tokens))
    model.comm.close()


if __name__ == "__main__":
    main()
    dist.destroy_process_group()

"""Tensor-parallel inference of a real model, where every row-parallel projection ends in one fused call.

`weights` reads SmolLM2-135M and cuts it into shards, `model` is the forward pass, `sequence` the same with a sharded residual,
`text` chooses what is read, `formats` calibrates the quantization formats, `worker` measures on one rank, `main` starts the ranks and
`table` shows what came back.
"""

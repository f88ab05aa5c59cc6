"""What a process of a gloo group does with a transformers model and with DTensor."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

import collogue
from collogue import RMSNorm


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
        # The first norm follows no all-reduce: the pass leaves it to the model.
        fused.model.layers[0].input_layernorm = plain.model.layers[0].input_layernorm
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

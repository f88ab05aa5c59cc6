"""A serving engine without a tokenizer: layers, cache, prefills and decode steps in CUDA graphs, with one epilogue."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from collogue.communicator import Communicator
from collogue.tools.bench import cached
from collogue.tools.bench.schedule import Step, Workload, rows
from collogue.tools.bench.stack import Block, Shape, functions_of, make_blocks, mlp, static
from collogue.tools.bench.variants import Blocks, Functions, make_step

#: Rows of the table of embeddings.
VOCABULARY = 4096
_ALIGN = 16  # tokens: what the attention kernels like of a mask


def cache_length(work: Workload) -> int:
    """Tokens of a cache row."""
    return -(-work.length // _ALIGN) * _ALIGN


def layer_bytes(shape: Shape, work: Workload) -> int:
    """Bytes of one layer on one rank: weights and, where the model has an attention core here, the cache. ``shape`` is the rank's."""
    hidden, width = shape.hidden_size, shape.heads * shape.head_dim
    weights = 3 * hidden * shape.intermediate_size
    if shape.low_rank is not None:
        query, both = shape.low_rank
        return weights + (query + both) * hidden + width * query + shape.heads * 256 * 512 + hidden * shape.heads * 128
    keys = work.concurrency * shape.kv_heads * cache_length(work) * shape.head_dim
    return weights + hidden * (2 * width + 2 * shape.kv_heads * shape.head_dim) + 2 * 2 * keys


class Stack:
    """What all ways share on a rank: weights, embeddings, cache, and the tensors that say which rows and positions a step is of."""

    def __init__(self, shape: Shape, layers: int, work: Workload, device: torch.device, rank: int) -> None:
        self.work, self.device = work, device
        blocks = make_blocks(shape, layers, 1, prefill=True, device=device, seed=rank)
        generator = torch.Generator(device).manual_seed(100)
        self.table = torch.randn(VOCABULARY, shape.hidden_size, device=device, generator=generator).bfloat16()
        #: Of a decode step: sequence and position of every row. Of a prefill: sequence and row of every prompt.
        self.decoded = torch.zeros(2, work.concurrency, dtype=torch.int64, device=device)
        self.prefilled = torch.zeros(2, work.admitted, dtype=torch.int64, device=device)
        self.cache: Tensor | None = None
        self.decode = self.prefill = Blocks(functions_of(shape, True), blocks, device)
        if shape.low_rank is None:
            cache = (layers, 2, work.concurrency, shape.kv_heads, cache_length(work), shape.head_dim)
            self.cache = torch.zeros(cache, dtype=torch.bfloat16, device=device)
            decode: Functions = {"attention": functools.partial(cached.decode, shape), "mlp": functools.partial(mlp, static)}
            prefill: Functions = {
                "attention": functools.partial(cached.prefill, shape, work.prompt_tokens),
                "mlp": functools.partial(mlp, static),
            }
            pairs = list(enumerate(blocks))
            self.decode = Blocks(decode, [self._with_cache(i, block, self.decoded[1]) for i, block in pairs], device)
            self.prefill = Blocks(prefill, [self._with_cache(i, block, self.prefilled[1]) for i, block in pairs], device)

    def _with_cache(self, index: int, block: Block, where: Tensor) -> Block:
        """The block, with this stack's cache in place of its own."""
        if block.kind != "attention" or self.cache is None:
            return block
        keys, values = self.cache[index // 2]
        return replace(block, tensors=(*block.tensors[:-2], keys, values, where))

    def embed(self, sequences: Tensor, positions: Tensor) -> Tensor:
        """``[T, H]``: tokens of a prompt, or made; both are random, and follow from where they stand."""
        return self.table[(sequences * 7919 + positions * 104729) % VOCABULARY]


class Engine:
    """One implementation of the epilogue: warmed up, with a graph for every size of a decode step. Collective."""

    def __init__(self, name: str, stack: Stack, comm: Communicator, group: dist.ProcessGroup) -> None:
        self._stack, self._world = stack, comm.world_size
        self._decode = make_step(name, stack.decode, comm, group)
        same = stack.prefill is stack.decode
        self._prefill = self._decode if same else make_step(name, stack.prefill, comm, group)
        self._graphs: dict[int, Callable[[], Tensor]] = {}

    def prepare(self, sizes: list[int]) -> None:
        """Compile and capture decode steps of ``sizes`` rows, the first of which is compiled for itself."""
        pool = torch.cuda.graph_pool_handle() if self._stack.device.type == "cuda" else None
        for size in sizes:
            self._graphs[size] = _captured(functools.partial(self._pass, size), pool)

    def _pass(self, size: int) -> Tensor:
        sequences, positions = self._stack.decoded[:, :size]
        x = self._stack.embed(sequences, positions)
        return self._decode(x / self._world, x)

    def run(self, step: Step) -> Tensor:
        """One step, enqueued; the last residual stream."""
        stack, work = self._stack, self._stack.work
        if stack.cache is not None:
            for source, target in step.moves:
                stack.cache[:, :, target] = stack.cache[:, :, source]
        count = len(step.sequences)
        if not step.prefill:
            size = rows(count, work.concurrency)
            idle = (0,) * (size - count)
            stack.decoded[:, :size] = torch.tensor([step.sequences + idle, step.positions + idle])
            return self._graphs[size]()
        stack.prefilled[:, :count] = torch.tensor([step.sequences, range(step.first, step.first + count)])
        sequences, positions = stack.prefilled[0, :count, None], torch.arange(work.prompt_tokens, device=stack.device)
        x = stack.embed(sequences, positions).flatten(0, 1)
        return self._prefill(x / self._world, x)


def _captured(run: Callable[[], Tensor], pool: Any) -> Callable[[], Tensor]:
    """``run`` as a CUDA graph; without a GPU, as it is, but warm."""
    if pool is None:
        run()
        return run
    stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    with torch.cuda.stream(stream):
        for _ in range(2):
            run()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, pool=pool, stream=stream, capture_error_mode="thread_local"):
        result = run()

    def replay() -> Tensor:
        graph.replay()
        return result

    return replay

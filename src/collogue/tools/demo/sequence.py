"""The model of the demo with a sharded residual: each rank keeps only the rows of the residual stream that it owns.

The embedding is whole on every rank, so no sum comes before the first norm: ``comm.finish`` takes it, and ``comm.shard`` starts the stream.
Every later call is ``comm.all_reduce(.., sharded=True)``; the last one gives the final norm, all rows of it on every rank. No bit of any
norm changes, so neither does a logit. (A model that wants the stream itself at the end calls ``comm.unshard``.)
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from collogue import Communicator, Output, Quant, RMSNorm
from collogue.tools.demo.model import ShardedLlama
from collogue.tools.demo.weights import ModelShape, Weights


class SequenceParallelLlama(ShardedLlama):
    """:class:`ShardedLlama`, with the residual stream sharded by rows as well."""

    comm: Communicator

    def __init__(self, shape: ModelShape, weights: Weights, comm: Communicator) -> None:
        super().__init__(shape, weights, comm)
        self.whole_embedding = weights["model.embed_tokens.weight"].to(comm.device, comm.dtype)  # [V, H]

    def _embed(self, tokens: torch.Tensor) -> torch.Tensor:
        """The rows of all tokens: ``[T, H]``, no partial sum."""
        return F.embedding(tokens, self.whole_embedding)

    def _fused(self, partial: torch.Tensor, stream: torch.Tensor | None, norm: RMSNorm, quant: Quant | None) -> Output:
        if stream is not None:
            return self.comm.all_reduce(partial, residual=stream, norm=norm, quant=quant, sharded=True)
        out = self.comm.finish(partial, norm=norm, quant=quant)
        out.residual = self.comm.shard(partial)
        return out

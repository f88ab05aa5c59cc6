"""The pass as Inductor takes it. Importing it imports Inductor, which takes a second: ``import collogue`` does without."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import torch
from torch._inductor.custom_graph_pass import CustomGraphPass

from collogue import registry
from collogue.pytorch.fusion.report import Report
from collogue.pytorch.fusion.rewrite import fuse
from collogue.pytorch.fusion.sharding import shard_streams


class FusionPass(CustomGraphPass):
    """The pass by itself, for those who call ``torch.compile`` their own way: ``options={"post_grad_custom_pre_pass": FusionPass()}``."""

    def __init__(self, report: Report | None = None, *, sharded: bool = False) -> None:
        self.report, self.sharded = Report() if report is None else report, sharded

    def __call__(self, graph: torch.fx.Graph) -> None:
        fuse(graph, self.report)
        if self.sharded:
            shard_streams(graph, self.report)

    def uuid(self) -> str:
        """What the rewriting depends on: its sources and the open communicators."""
        digest = hashlib.sha256(repr((self.sharded, registry.fingerprint())).encode())
        for file in sorted(Path(__file__).parent.glob("*.py")):
            digest.update(file.read_bytes())
        return digest.hexdigest()


class Both(CustomGraphPass):
    """One pass after the other."""

    def __init__(self, first: FusionPass, second: Any) -> None:
        self._passes = (first, second)

    def __call__(self, graph: torch.fx.Graph) -> None:
        for each in self._passes:
            each(graph)

    def uuid(self) -> Any:
        """``None``, which switches the cache off, where the second pass has no uuid."""
        second = self._passes[1].uuid() if isinstance(self._passes[1], CustomGraphPass) else None
        return None if second is None else (self._passes[0].uuid(), second)

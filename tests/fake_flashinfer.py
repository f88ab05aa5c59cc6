"""A package in the shape of FlashInfer whose functions only say that they were called: for tests of what replaces them."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

_COMM = """
class AllReduceFusionPattern:
    kAllReduce = 0


class Workspace:
    def __init__(self, backend):
        self.backend = backend


def create_allreduce_fusion_workspace(backend="auto", *arguments, **options):
    return Workspace(backend)


def trtllm_create_ipc_workspace_for_all_reduce_fusion(*arguments, **options):
    import torch

    return [[0]], torch.zeros(4, dtype=torch.int64)


def _say(*arguments, **options):
    return "flashinfer"


allreduce_fusion = trtllm_allreduce_fusion = trtllm_destroy_ipc_workspace_for_all_reduce_fusion = _say
is_mnnvl_cutedsl_supported = vllm_all_reduce = _say
"""

_MNNVL = """
class TorchDistBackend:
    def __init__(self, group=None):
        self._group = group
"""


def write_flashinfer(folder: Path) -> None:
    """Write the package ``flashinfer`` into ``folder``."""
    comm = folder / "flashinfer" / "comm"
    comm.mkdir(parents=True)
    (folder / "flashinfer" / "__init__.py").write_text("")
    (comm / "__init__.py").write_text(_COMM)
    (comm / "mnnvl.py").write_text(_MNNVL)


@contextmanager
def forgotten(package: str) -> Iterator[None]:
    """``package`` is not imported at the start of the block; what the block imports of it is forgotten at its end."""
    kept = {name: sys.modules.pop(name) for name in list(sys.modules) if name.split(".")[0] == package}
    try:
        yield
    finally:
        for name in [name for name in sys.modules if name.split(".")[0] == package]:
            del sys.modules[name]
        sys.modules.update(kept)

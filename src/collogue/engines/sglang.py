"""SGLang: a general plugin that serves its FlashInfer fusion layer with Collogue.

SGLang calls :func:`register` in every process (entry point ``sglang.srt.plugins``).
"""

from __future__ import annotations

import logging
import os
import sys

from collogue import flashinfer
from collogue.flashinfer.workspace import ON_FAILURE

logger = logging.getLogger(__name__)

#: Imported before the plugins are loaded, and keeps the function that makes workspaces under a name of its own.
_LAYER = "sglang.srt.layers.flashinfer_comm_fusion"
_KEPT = "_create_allreduce_fusion_workspace"


def register() -> None:
    """Install :mod:`collogue.flashinfer` if ``COLLOGUE_SGLANG=1``. May be called again.

    Without FlashInfer nothing is installed: SGLang would take a stand-in for the whole of it.
    """
    if os.environ.get("COLLOGUE_SGLANG") != "1":
        return
    if not flashinfer.flashinfer_present():
        logger.warning("COLLOGUE_SGLANG=1 has no effect: SGLang fuses all-reduces only if flashinfer-python is installed")
        return
    os.environ.setdefault(ON_FAILURE, "abort")  # nobody looks while the engine replays graphs
    flashinfer.install()
    layer = sys.modules.get(_LAYER)
    if getattr(layer, _KEPT, None) is not None:
        setattr(layer, _KEPT, sys.modules["flashinfer.comm"].create_allreduce_fusion_workspace)
    logger.info("flashinfer.comm's all-reduce calls are served by Collogue")

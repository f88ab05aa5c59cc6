"""vLLM: a general plugin that serves its all-reduce fusion pass and its FlashInfer all-reduce with Collogue.

vLLM calls :func:`register` in every process (entry point ``vllm.general_plugins``). It looks names up in ``flashinfer.comm`` at
each call, so it does not matter which of its modules are already imported.
"""

from __future__ import annotations

import logging
import os

from collogue import flashinfer
from collogue.flashinfer.workspace import ON_FAILURE

logger = logging.getLogger(__name__)


def register() -> None:
    """Install :mod:`collogue.flashinfer` if ``COLLOGUE_VLLM=1``. May be called again.

    Without FlashInfer nothing is installed: vLLM would take a stand-in for the whole of it.
    """
    if os.environ.get("COLLOGUE_VLLM") != "1":
        return
    if not flashinfer.flashinfer_present():
        logger.warning("COLLOGUE_VLLM=1 has no effect: vLLM fuses all-reduces only if flashinfer-python is installed")
        return
    os.environ.setdefault(ON_FAILURE, "abort")  # nobody looks while the engine replays graphs
    flashinfer.install()
    logger.info("flashinfer.comm's all-reduce calls are served by Collogue")

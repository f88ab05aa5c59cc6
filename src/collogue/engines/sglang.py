"""SGLang: a general plugin that serves its FlashInfer fusion layer with Collogue.

SGLang calls :func:`register` in every process (entry point ``sglang.srt.plugins``).
"""

from __future__ import annotations

import os
import sys

from collogue import flashinfer
from collogue.engines.switch import guarded, logger_of
from collogue.errors import PlatformError

SWITCH = "COLLOGUE_SGLANG"
#: Imported before the plugins are loaded, and keeps the function that makes workspaces under a name of its own.
_LAYER = "sglang.srt.layers.flashinfer_comm_fusion"
_KEPT = "_create_allreduce_fusion_workspace"


def register() -> None:
    """Install :mod:`collogue.flashinfer` if ``COLLOGUE_SGLANG=1``. May be called again, and never raises: what goes wrong is logged.

    Without FlashInfer nothing is installed: SGLang would take a stand-in for the whole of it.
    """
    value = os.environ.get(SWITCH, "").strip()
    if value in ("", "0"):
        return
    logger = logger_of("logging", "getLogger", "sglang.collogue")
    if value != "1":
        logger.warning("%s=%s has no effect: choose 1 or 0", SWITCH, value)
        return
    guarded(_install, logger, SWITCH)


def _install() -> str:
    if not flashinfer.flashinfer_present():
        raise PlatformError("flashinfer-python is not installed", hint="SGLang fuses all-reduces only with it")
    flashinfer.install()
    layer = sys.modules.get(_LAYER)
    if getattr(layer, _KEPT, None) is not None:
        setattr(layer, _KEPT, sys.modules["flashinfer.comm"].create_allreduce_fusion_workspace)
    return "Collogue serves the all-reduce calls of flashinfer.comm"

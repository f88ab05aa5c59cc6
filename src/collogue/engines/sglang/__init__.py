"""SGLang: a general plugin that finishes its layers inside their all-reduce.

SGLang calls :func:`register` in every process (entry point ``sglang.srt.plugins``). ``COLLOGUE_SGLANG`` chooses the way:

* ``1``: SGLang's own hooks around its norms with all-reduce and its all-reduces (:mod:`.hooks`);
* ``flashinfer``: its FlashInfer fusion layer, whose calls of ``flashinfer.comm`` Collogue serves (:mod:`collogue.flashinfer`);
* unset, empty or ``0``: nothing is imported or changed.
"""

from __future__ import annotations

import os
import sys

SWITCH = "COLLOGUE_SGLANG"
#: Imported before the plugins are loaded, and keeps the function that makes workspaces under a name of its own.
_LAYER = "sglang.srt.layers.flashinfer_comm_fusion"
_KEPT = "_create_allreduce_fusion_workspace"

_registered = False


def register() -> None:
    """Do what ``COLLOGUE_SGLANG`` says. May be called again, and never raises: what goes wrong is logged once, SGLang runs as it was."""
    global _registered
    value = os.environ.get(SWITCH, "").strip().lower()
    if value in ("", "0") or _registered:
        return
    _registered = True
    from collogue.engines.switch import choose, logger_of

    choose(SWITCH, {"1": _hooks, "flashinfer": _flashinfer}, logger_of("logging", "getLogger", "sglang.collogue"))


def _hooks() -> str:
    from collogue.engines.sglang import hooks

    return hooks.install()


def _flashinfer() -> str:
    from collogue.engines.switch import serve_flashinfer

    said = serve_flashinfer(f"{SWITCH}=1")
    layer = sys.modules.get(_LAYER)
    if getattr(layer, _KEPT, None) is not None:
        setattr(layer, _KEPT, sys.modules["flashinfer.comm"].create_allreduce_fusion_workspace)
    return said

"""vLLM: a general plugin that finishes its layers inside their all-reduce.

vLLM calls :func:`register` in every process (entry point ``vllm.general_plugins``). ``COLLOGUE_VLLM`` chooses the way:

* ``compile``: our pass in the place of vLLM's own all-reduce fusion pass (:mod:`.compiled`);
* ``eager``: layers of our own for models that are not compiled (:mod:`.eager`);
* ``flashinfer``: vLLM's own pass and communicator, whose calls of ``flashinfer.comm`` Collogue serves (:mod:`collogue.flashinfer`);
* ``auto`` or ``1``: ``compile`` where vLLM compiles, else ``eager``;
* unset, empty or ``0``: nothing is imported or changed.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable

SWITCH = "COLLOGUE_VLLM"

_registered = False


def register() -> None:
    """Do what ``COLLOGUE_VLLM`` says. May be called again, and never raises: what goes wrong is logged once, and vLLM runs as it was."""
    global _registered
    value = os.environ.get(SWITCH, "").strip().lower()
    if value in ("", "0") or _registered:
        return
    _registered = True
    from collogue.engines.switch import choose, logger_of, serve_flashinfer

    served = functools.partial(serve_flashinfer, f"{SWITCH}=auto")
    ways: dict[str, Callable[[], str]] = {"1": _auto, "auto": _auto, "compile": _compile, "eager": _eager, "flashinfer": served}
    choose(SWITCH, ways, logger_of("vllm.logger", "init_logger", "vllm.collogue"))


def _auto() -> str:
    """Both, of which at most one acts: the pass only where vLLM compiles by itself, the layers only where it does not compile."""
    said = []
    failed: list[Exception] = []
    for each in (_compile, _eager):
        try:
            said.append(each())
        except Exception as error:  # one way may be closed where the other is open
            failed.append(error)
    if not said:
        raise failed[0]
    return "; ".join([*said, *(f"not available: {error}" for error in failed)])


def _compile() -> str:
    from collogue.engines.vllm import compiled

    return compiled.install()


def _eager() -> str:
    from collogue.engines.vllm import eager

    return eager.install()

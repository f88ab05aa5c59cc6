"""What the plugins of all engines share: how they read their switch, and that nothing they do can end the engine."""

from __future__ import annotations

import importlib
import inspect
import logging
import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from collogue.flashinfer.workspace import ON_FAILURE


@dataclass(frozen=True)
class Hook:
    """A name of an engine that a plugin uses: ``module`` and the dotted ``name`` in it, and the parameters it must take."""

    module: str
    name: str
    parameters: tuple[str, ...] = ()

    def problem(self) -> str:
        """What is not as expected, in words; empty where all is."""
        try:
            found: Any = importlib.import_module(self.module)
        except Exception as error:  # whatever the import of an engine's module raises
            return f"{self.module} cannot be imported: {type(error).__name__}: {error}"
        for part in self.name.split("."):
            if not hasattr(found, part):
                return f"{self.module}.{self.name} is not there"
            found = getattr(found, part)
        if not self.parameters:
            return ""
        taken = inspect.signature(found).parameters
        absent = [name for name in self.parameters if name not in taken]
        return f"{self.module}.{self.name} takes no {', '.join(absent)}, but {', '.join(taken)}" if absent else ""


def problems(hooks: Iterable[Hook]) -> list[str]:
    """What of these hooks has moved."""
    return [text for text in (hook.problem() for hook in hooks) if text]


def logger_of(module: str, maker: str, name: str) -> Any:
    """An engine's own logger, whose lines are shown; a plain one where the engine has no such function."""
    try:
        return getattr(importlib.import_module(module), maker)(name)
    except Exception:  # an engine that we do not know
        return logging.getLogger(name)


def choose(switch: str, ways: Mapping[str, Callable[[], str]], logger: Any) -> None:
    """Go the way that the environment variable ``switch`` names, guarded; an unknown name is logged and changes nothing."""
    value = os.environ[switch]
    way = ways.get(value.strip().lower())
    if way is None:
        logger.warning("%s=%s has no effect: choose one of %s, or 0", switch, value, ", ".join(ways))
    else:
        guarded(way, logger, switch)


def serve_flashinfer(instead: str) -> str:
    """Put Collogue behind ``flashinfer.comm``. An engine would take a stand-in for the whole of FlashInfer, so it must be installed."""
    from collogue import flashinfer
    from collogue.errors import PlatformError

    if not flashinfer.flashinfer_present():
        raise PlatformError("flashinfer-python is not installed", hint=f"install it, or set {instead}, which needs none")
    flashinfer.install()
    return "Collogue serves the all-reduce calls of flashinfer.comm"


def guarded(install: Callable[[], str], logger: Any, switch: str) -> bool:
    """Run ``install`` and log what it says. What it raises is logged, once, and the engine goes on as it was.

    Sets what happens where a collective fails (``COLLOGUE_ON_FAILURE``) to ``abort`` unless it is set: nobody looks while an engine
    replays graphs.
    """
    os.environ.setdefault(ON_FAILURE, "abort")
    try:
        logger.info("%s", install())
    except Exception as error:  # the engine must run, whatever the reason
        text = f"{type(error).__name__}: {error}".splitlines()[0]
        logger.warning("%s=%s has no effect, the engine runs without Collogue: %s", switch, os.environ.get(switch), text)
        return False
    return True

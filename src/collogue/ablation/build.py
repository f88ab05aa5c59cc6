"""Kernels of a switch: sources with its edits, its compiler options, its launch shape."""

from __future__ import annotations

import functools
import hashlib
import shutil
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from collogue import jit
from collogue.ablation.switches import Switch
from collogue.check.case import Case
from collogue.check.kernels import request_of
from collogue.plan import make_kernels, make_plan
from collogue.testing.emulator import Edit
from collogue.topology import Overrides, Topology
from collogue.variant import Variant


def edit_sources(folder: Path, edits: Sequence[Edit]) -> None:
    """The kernels in ``folder``, edited. Raises :class:`ValueError` for a text that does not stand exactly once in its file."""
    folder.mkdir(parents=True, exist_ok=True)
    for file in jit.KERNELS.glob("*.cuh"):
        shutil.copy(file, folder / file.name)
    for edit in edits:
        text = (folder / edit.file).read_text(encoding="utf-8")
        if text.count(edit.old) != 1:
            raise ValueError(f"{edit.file} holds {edit.old!r} {text.count(edit.old)} times")
        (folder / edit.file).write_text(text.replace(edit.old, edit.new), encoding="utf-8")


class Builder:
    """Compiles variants under switches, each once. Use as a context manager: sources lie in a temporary directory."""

    def __init__(self, architecture: str) -> None:
        self.architecture = architecture
        self._folder = tempfile.TemporaryDirectory(prefix="collogue-ablate-")
        self._made: dict[tuple[str, Variant], tuple[bytes, str]] = {}

    def __enter__(self) -> Builder:
        return self

    def __exit__(self, *error: object) -> None:
        self._folder.cleanup()

    @functools.cache  # noqa: B019  (a builder lives as long as its folder)
    def sources(self, edits: tuple[Edit, ...]) -> Path:
        """Where the edited sources lie."""
        folder = Path(self._folder.name) / hashlib.sha256(repr(edits).encode()).hexdigest()[:12]
        edit_sources(folder, edits)
        return folder

    def compile(self, switch: Switch, variant: Variant) -> tuple[bytes, str]:
        """Machine code and the assembler's report."""
        key = (switch.name, variant)
        if key not in self._made:
            self._made[key] = jit.compile_source(
                variant.source(),
                self.architecture,
                variant.name,
                verbose=True,
                kernels=self.sources(switch.edits),
                changes=switch.options,
            )
        return self._made[key]

    def compile_all(self, wanted: Sequence[tuple[Switch, Variant]]) -> None:
        """Many at a time."""
        for switch, _ in wanted:
            self.sources(switch.edits)
        with ThreadPoolExecutor(jit.cores()) as pool:
            list(pool.map(lambda pair: self.compile(*pair), wanted))


def topology_of(switch: Switch, case: Case, architecture: str, multiprocessors: int = 132) -> Topology:
    """What ranks of ``case`` agree on, with the launch shape that the switch asks for."""
    overrides = Overrides(cta_threads=switch.threads)
    return Topology(case.world_size, case.tokens, case.hidden_size, case.value_dtype, architecture, multiprocessors, 1, overrides)


def variant_of(switch: Switch, topology: Topology, case: Case) -> Variant:
    """The kernel that does ``case``."""
    request = request_of(case)
    return make_kernels(topology, request, make_plan(topology, request))[0].variant

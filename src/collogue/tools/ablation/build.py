"""Kernels of a switch: sources with its edits, its compiler options, its launch shape."""

from __future__ import annotations

import functools
import hashlib
import tempfile
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from unittest.mock import patch

from collogue import kernels
from collogue.gpu import jit
from collogue.planning import plan
from collogue.planning.plan import make_kernels, make_plan
from collogue.planning.topology import Overrides, Topology
from collogue.planning.variant import Variant
from collogue.testing.emulator import Edit, edited
from collogue.tools.ablation.switches import Switch
from collogue.tools.check.case import Case
from collogue.tools.check.kernels import request_of

#: CTAs of the largest cluster that every GPU with clusters accepts.
PORTABLE_CLUSTER = plan.MAX_CLUSTER


def edit_sources(folder: Path, edits: Sequence[Edit]) -> None:
    """The kernels in ``folder``, edited. Raises :class:`ValueError` for a text that does not stand exactly once in its file."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in edited(kernels.sources(), edits).items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text, encoding="utf-8")


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
                folder=self.sources(switch.edits),
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
    with planned_for(switch):
        return make_kernels(topology, request, make_plan(topology, request))[0].variant


@contextmanager
def planned_for(switch: Switch) -> Iterator[None]:
    """Inside, plans of this process may have clusters as large as the switch says."""
    with patch.object(plan, "MAX_CLUSTER", max(switch.cluster, PORTABLE_CLUSTER)):
        yield

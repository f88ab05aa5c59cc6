"""`make test-compile`: the covering set of every architecture, without warnings and without local memory."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import pytest

from collogue.gpu import jit
from collogue.planning.architecture import ARCHITECTURES
from collogue.testing.covering import Choice, everything
from collogue.tools.resources.worker import compile_choice


@pytest.mark.timeout(0)
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_every_kernel_of_the_covering_set_compiles(architecture: str) -> None:
    def problem(choice: Choice) -> str:
        """What is wrong with one kernel, in a line."""
        kernel = compile_choice(choice)
        used = jit.resources(kernel.log)
        return f"{kernel.name}: {kernel.log}" if "warning" in kernel.log or used.stack or used.spilled else ""

    choices = [choice for choice in everything() if choice["architecture"] == architecture]
    with ThreadPoolExecutor(jit.cores()) as pool:
        broken = [line for line in pool.map(problem, choices) if line]
    assert len(choices) > 100
    assert not broken, "\n".join(broken)

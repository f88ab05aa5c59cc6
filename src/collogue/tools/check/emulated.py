"""``collogue check --emulate``: the kernels' own sources on the CPU, under a scheduler that is against the protocol.

A bounded set of programs for every kernel and two world sizes: calls in every mode of the scheduler, a rank that never comes, and calls
that differ.
"""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any

from collogue.cache import cache_directory
from collogue.contract.quant import NVFP4
from collogue.errors import CompileError, PlatformError
from collogue.gpu.failure import MISMATCH, TIMEOUT

if TYPE_CHECKING:
    from collogue.testing.emulator import Library, Run

KERNELS = ("one_shot", "two_shot", "sharded", "reduce_scatter", "all_gather", "local")
WORLD_SIZES = (2, 3)
#: Tokens of consecutive calls: more and fewer than before, and than ranks.
TOKENS = (5, 1, 2, 4, 1, 3)
_MODES = {"calls": "fair", "calls, a late rank": "late", "calls, a rank ahead": "ahead", "calls, slow CTAs": "slow_ctas"}
_UNEVEN, _ABSENT, _DIFFER = "calls, uneven rows", "a rank that never comes", "calls that differ"
#: Kernels whose rows have owners; their cases of uneven rows stand behind those of :data:`KERNELS`.
_OWNING = ("sharded", "reduce_scatter", "all_gather")


@dataclass(frozen=True)
class Program:
    """What one kernel is put through."""

    kernel: str
    world_size: int
    what: str

    def __str__(self) -> str:
        return f"{self.kernel} world={self.world_size}: {self.what}"


@dataclass(frozen=True)
class Emulated:
    """How a program ended; ``problem`` is empty where all was as it should be."""

    program: Program
    problem: str
    seconds: float

    def as_json(self) -> dict[str, Any]:
        return {**asdict(self.program), "problem": self.problem, "seconds": round(self.seconds, 3)}


#: A kernel that sends nothing waits for nobody.
PROGRAMS = tuple(
    Program(kernel, world, what)
    for world in WORLD_SIZES
    for kernel in KERNELS
    for what in (*_MODES, *((_UNEVEN,) if kernel in _OWNING else ()), *(() if kernel == "local" else (_ABSENT, _DIFFER)))
)


def run_programs(*, started: Callable[[Program], None] = lambda program: None) -> list[Emulated]:
    """Compile the kernels for the CPU and run all of :data:`PROGRAMS`. ``started`` hears of each.

    Raises :class:`PlatformError` where there is no C++ compiler, :class:`CompileError` where it rejects the kernels.
    """
    if os.name != "posix" or shutil.which("g++") is None:
        raise PlatformError("the emulator needs a C++ compiler, and there is no g++ here", hint="install g++, or leave out --emulate")
    libraries: dict[int, Library] = {}
    results = []
    for program in PROGRAMS:
        started(program)
        start = time.perf_counter()
        if program.world_size not in libraries:
            libraries[program.world_size] = _compile(program.world_size)
        problem = run_program(program, libraries[program.world_size])
        results.append(Emulated(program, problem, time.perf_counter() - start))
    return results


def _compile(world_size: int) -> Library:
    """Every kernel for small rows of two CTAs, in one library."""
    from collogue.testing.emulator import Case, compile_cases

    cases = [Case(world_size, 288, 32, kernel, quant=NVFP4(37.5), max_tokens=max(TOKENS)) for kernel in KERNELS]
    cases += [replace(cases[KERNELS.index(kernel)], uneven=True) for kernel in _OWNING]
    try:
        return compile_cases(cases, cache_directory() / "emulator")
    except RuntimeError as error:
        raise CompileError(f"g++ failed to compile the kernels: {error}", hint="please report this with the text above") from error


def run_program(program: Program, library: Library) -> str:
    """What is not as it should be; empty where there is nothing."""
    from collogue.testing.emulator import Ask, emulate

    case, world = KERNELS.index(program.kernel), program.world_size
    victim = world - 1
    if program.what in _MODES:
        calls = [Ask(tokens, case) for tokens in TOKENS]
        return emulate(library, calls, seed=case, mode=_MODES[program.what], victim=victim).problem()
    if program.what == _UNEVEN:
        place, rest = len(KERNELS) + _OWNING.index(program.kernel), [0] * (world - 2)
        lists = ((0, *rest, 5), (1, *rest, 0), (3, *rest, 1), (0, *rest, 2))
        return emulate(library, [Ask(sum(rows), place, rows=rows) for rows in lists], seed=case, mode="late", victim=victim).problem()
    if program.what == _ABSENT:
        run = emulate(library, [Ask(3, case)] * 3, seed=case, mode="absent", victim=victim, absent_call=1, timeout=0.1)
        return run.error or _not_told(run, TIMEOUT, victim, set(range(world)) - {victim})
    differing = [Ask(2 if rank == victim else 3, case) for rank in range(world)]
    run = emulate(library, [Ask(2, case), differing, Ask(2, case)], seed=case)
    return run.error or _not_told(run, MISMATCH, victim, set(range(world)))


def _not_told(run: Run, fault: int, culprit: int, ranks: set[int]) -> str:
    """What is wrong with the failure records after the second call has failed because of ``culprit``."""
    found = [record for rank, record in enumerate(run.failures) if record.fault == fault and record.rank == rank and record.call == 1]
    untold = [rank for rank in sorted(ranks) if run.failures[rank].fault != fault]
    if untold:
        return f"rank {untold[0]} was not told of fault {fault}"
    if not any(culprit in (record.rank, record.late_rank) for record in found):
        return f"nobody named rank {culprit} at call 1"
    return ""

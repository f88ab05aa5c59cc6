"""From :class:`Case` to a shared library for the CPU."""

from __future__ import annotations

import ctypes
import fcntl
import hashlib
import subprocess
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from collogue import kernels
from collogue.calls.product import ProductForm
from collogue.calls.request import Request
from collogue.calls.terms import TermsForm
from collogue.contract.prologue import PrologueForm
from collogue.contract.quant import Quant
from collogue.contract.spec import Operation, Wanted, largest_block
from collogue.planning import plan
from collogue.planning.algorithm import ALGORITHMS, Algorithm
from collogue.planning.topology import Topology
from collogue.planning.variant import Variant

HERE = Path(__file__).parent
COMPILER = "g++"
#: As the kernels' contract asks: IEEE float32, no contraction, no fast-math, no instructions beyond the baseline's.
OPTIONS = (
    "-std=c++17",
    "-ffp-contract=off",
    "-fPIC",
    "-Wall",
    "-Wextra",
    "-Wno-unknown-pragmas",
    "-Wno-unused-parameter",
)


#: Of operations that have no kernel of their name.
_ALGORITHM_OF = {"reduce_scatter": "sharded", "finish": "local"}


@dataclass(frozen=True)
class Case:
    """What is emulated: one kernel in one launch shape, for calls of up to ``max_tokens`` tokens, in up to ``launches`` launches each.

    ``kernel``: ``one_shot``, ``two_shot``, ``local``, or an operation: ``sharded``, ``reduce_scatter``, ``all_gather`` (of the norm, or
    of codes where ``quant`` is given), ``finish``.

    ``branch``: the sum is normed before the residual is added. ``prologue``: what stands in the place of partials, ``slots`` of each
    token, or experts.

    ``prefetch`` as of :class:`collogue.RMSNorm`, ``concurrent`` as of :class:`collogue.Communicator`.

    ``rows`` clusters of CTAs do all rows of a call in turns; ``None``: one cluster a row. Each thread holds ``vectors`` times 8 elements.

    ``uneven``: calls say how many rows each rank owns; where they do not, rank 0 owns all.

    ``terms``: ``local`` adds so many tensors, as the host path gives them to it, or scales a product.
    """

    world: int
    hidden_size: int
    threads: int
    kernel: str = "one_shot"
    dtype: torch.dtype = torch.bfloat16
    residual: bool = True
    norm: bool = True
    quant: Quant | None = None
    keep_norm: bool = False
    max_tokens: int = 3
    rows: int | None = None
    vectors: int = 1
    launches: int = 1
    prefetch: bool = True
    concurrent: int = 1
    prologue: PrologueForm | None = None
    slots: int = 3
    branch: bool = False
    uneven: bool = False
    terms: TermsForm | ProductForm | None = None

    @property
    def cluster(self) -> int:
        """CTAs of a row."""
        return -(-self.hidden_size // (8 * self.vectors * self.threads))

    @property
    def wanted(self) -> Wanted:
        asked: dict[str, Any] = {"has_norm": self.norm, "quant": self.quant, "keep_norm": self.keep_norm}
        asked["operation"] = "finish" if self.kernel == "finish" else "all_reduce"
        wanted = Wanted.of(has_residual=self.residual, **asked)
        return replace(wanted, residual=False, reduced=False) if self.kernel == "all_gather" else wanted

    @property
    def operation(self) -> Operation:
        return self.kernel if ALGORITHMS[self.algorithm].owned or self.kernel == "finish" else "all_reduce"  # type: ignore[return-value]

    @property
    def algorithm(self) -> Algorithm:
        return _ALGORITHM_OF.get(self.kernel, self.kernel)  # type: ignore[return-value]

    def split(self, tokens: int, split: tuple[int, ...] | None = None) -> tuple[int, ...] | None:
        """How many rows each rank owns in a call of so many tokens, ``split`` if given; ``None``: equal blocks."""
        return (tokens, *[0] * (self.world - 1)) if self.uneven and split is None else split

    def request(self, tokens: int, split: tuple[int, ...] | None = None) -> Request:
        """Of one call."""
        moves = self.kernel == "all_gather"
        residual, norm = self.residual and not moves and self.operation != "finish", self.norm and not moves
        late = norm and not self.prefetch
        shape = tokens, self.hidden_size, self.dtype
        term = self.prologue or self.terms
        plain = Request(*shape, residual, norm, False, self.quant, self.wanted, self.operation, late, term, self.branch)
        return replace(plain, rows=self.split(tokens, split))

    def _rows(self, tokens: int, split: tuple[int, ...] | None) -> int:
        """Of one call, or of its largest owner."""
        owned = ALGORITHMS[self.algorithm].owned
        return largest_block(tokens, self.world, self.split(tokens, split)) if owned else tokens

    def plan_of(self, tokens: int, split: tuple[int, ...] | None = None) -> plan.Plan:
        """Of one call: as many rows to a launch as in every other, of the call or of each owner."""
        rows = self._rows(tokens, split)
        rows_of_launch = -(-rows // self.launches)
        return plan.Plan(self.algorithm, "", None, 0, 0.0, 0.0, rows_of_launch, -(-rows // rows_of_launch))

    def clusters_of(self, tokens: int, split: tuple[int, ...] | None = None) -> int:
        """Of every launch of a call: as plans make it, no more than the last one has rows."""
        made, rows = self.plan_of(tokens, split), self._rows(tokens, split)
        return min(rows - (made.launches - 1) * made.rows, self.rows or rows)

    def memory_of(self, tokens: int) -> int:
        """Bytes of a generation that a call uses, and not one more."""
        if ALGORITHMS[self.algorithm].alone:
            return 0
        request, made = self.request(tokens), self.plan_of(tokens)
        memory = plan.launch_memory(self.topology, request, self.algorithm)
        flags = 4 * self.cluster * self.clusters_of(tokens) if memory.flags else 0
        return replace(memory, flags=flags).generation(self.world, made.rows)

    @property
    def topology(self) -> Topology:
        return Topology(self.world, self.max_tokens, self.hidden_size, self.dtype, "sm_90a", 132, 1, concurrent=self.concurrent)

    @property
    def variant(self) -> Variant:
        """What a GPU would run in this shape, by the plan's own rules."""
        shape = plan.LaunchShape(self.threads, self.vectors, self.cluster, self.clusters_of(self.max_tokens))
        request = self.request(self.max_tokens)
        return plan.make_variant(self.topology, request, shape, self.algorithm)


@dataclass(frozen=True)
class Edit:
    """A change to a kernel source that makes a mutant: ``old``, which must stand there once, becomes ``new``."""

    file: str
    old: str
    new: str


@dataclass(frozen=True)
class Library:
    """Compiled cases, of one world size and dtype."""

    cases: tuple[Case, ...]
    emulate: Callable[..., None]
    one_shot_generations: int

    @property
    def world(self) -> int:
        return self.cases[0].world


def compile_cases(cases: Sequence[Case], directory: Path, edits: tuple[Edit, ...] = ()) -> Library:
    """Compile ``cases`` in ``directory``, unless the same sources have been. ``edits`` are made in a copy of them."""
    sources = kernels.sources()
    machine = _compile_machine(sources, directory)
    names = ", ".join((*(f"kernel{i}" for i in range(len(cases))), *OTHERS))
    units = [_unit(case.variant, i) for i, case in enumerate(cases)]
    files = edited(sources, edits)
    for name in _STAND_INS:
        del files[name]
    files["kernels.cpp"] = "".join((*units, _OTHERS, f"void (*collogue_kernels[])(collogue::Params) = {{{names}}};\n", _GENERATIONS))
    # Functions that both define are the machine's: what runs most is optimized.
    command = ["-O1", "-shared", "-I.", f"-I{machine}", "-include", "ptx.cuh", "-o", "kernels.so", str(machine / "driver.o"), "kernels.cpp"]
    library = ctypes.CDLL(str(_compile(files, (machine.name, *command), directory, [command]) / "kernels.so"))
    library.collogue_emulate.restype = None
    return Library(tuple(cases), library.collogue_emulate, ctypes.c_uint.in_dll(library, "collogue_one_shot_generations").value)


#: Kernels of other people, behind those of the cases: one writes ``tokens`` words from ``partial`` to ``stream``, late; one does nothing.
#: Both let the next kernel start before they wait for the one before them, as many do.
OTHERS = ("late_writer", "passer_by")
_OTHERS = """
void late_writer(collogue::Params p) {
  using namespace collogue;
  launch_next_kernel();
  wait_for_previous_kernel();
  for (const u64 from = time_ns(); time_ns() - from < 3000000;) {
  }
  for (u32 i = thread_index(); i < p.tokens; i += 32) store_word(p.stream + 4 * i, reinterpret_cast<const u32*>(p.partial)[i]);
}
void passer_by(collogue::Params) {
  collogue::launch_next_kernel();
  collogue::wait_for_previous_kernel();
}
"""

#: What the machine has to know of a twin's protocol, so that it is the protocol that fails.
_GENERATIONS = """
#include "protocol.cuh"
extern const unsigned collogue_generations = collogue::kGenerations;
extern const unsigned collogue_one_shot_generations = collogue::kOneShotGenerations;
"""

#: What the kernels include and the emulator has its own version of, or shares with them.
_STAND_INS = ("ptx.cuh", "types.cuh")


def _compile_machine(sources: dict[str, str], directory: Path) -> Path:
    """What is the same for all kernels: the emulator as an object, and its stand-in for the file that holds PTX, compiled beforehand."""
    files = sources | {file.name: file.read_text() for file in (*HERE.glob("*.hpp"), *HERE.glob("*.cpp"))}
    files["ptx.cuh"] = (HERE / "host_ptx.cuh").read_text()
    commands = [
        ["-O2", "-c", "-o", "driver.o", "driver.cpp"],
        ["-O1", "-w", "-x", "c++-header", "-o", "ptx.cuh.gch", "ptx.cuh"],
    ]
    return _compile(files, (), directory, commands)


def _compile(files: dict[str, str], key: tuple[str, ...], directory: Path, commands: Sequence[Sequence[str]]) -> Path:
    """The folder in which ``commands`` have run beside ``files``. Several processes may want it at a time; one makes it."""
    folder = directory / hashlib.sha256(repr((OPTIONS, files, key, commands)).encode()).hexdigest()[:16]
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if (folder / "done").exists():
            return folder
        for name, text in files.items():
            (folder / name).parent.mkdir(exist_ok=True)
            (folder / name).write_text(text)
        for command in commands:
            done = subprocess.run([COMPILER, *OPTIONS, *command], cwd=folder, capture_output=True, text=True, timeout=120)
            if done.returncode:
                raise RuntimeError(f"{' '.join(done.args)}\n{done.stderr}")
        (folder / "done").touch()
    return folder


def _unit(variant: Variant, number: int) -> str:
    """The translation unit of a variant, with names that several can have beside each other."""
    return variant.source().replace("Config", f"Config{number}").replace(variant.name, f"kernel{number}")


def edited(sources: Mapping[str, str], edits: Iterable[Edit]) -> dict[str, str]:
    """``sources`` by file name, edited. Raises :class:`ValueError` for a text that does not stand exactly once in its file."""
    files = dict(sources)
    for edit in edits:
        text = files[edit.file]
        if text.count(edit.old) != 1:
            raise ValueError(f"{edit.file} holds {edit.old!r} {text.count(edit.old)} times")
        files[edit.file] = text.replace(edit.old, edit.new)
    return files

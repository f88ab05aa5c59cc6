"""Rows of resources: one for each kernel and architecture, of this revision or of another."""

from __future__ import annotations

import base64
import itertools
import json
import os
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from io import BytesIO
from pathlib import Path
from typing import Any, TypeAlias

from collogue.errors import PlatformError
from collogue.gpu import jit
from collogue.testing.covering import FACTORS, Choice, covering_set, possible, variant_of
from collogue.tools.resources import worker
from collogue.tools.resources.machine_code import code_bytes, count_instructions
from collogue.tools.resources.occupancy import occupancy
from collogue.tools.resources.worker import Compiled, as_json, compile_choice

Row: TypeAlias = dict[str, Any]
_PACKAGE = "src/collogue"


def chosen(*, everything: bool = False, **levels: Sequence[Any]) -> list[Choice]:
    """The covering set, or every kernel that a plan may make; ``levels`` of factors keep only what has one of them."""
    if not everything:
        choices: Iterable[Choice] = covering_set()[0]
    else:
        factors = {**FACTORS, **levels}
        product = (dict(zip(factors, values, strict=True)) for values in itertools.product(*factors.values()))
        choices = (choice for choice in product if possible(choice))
    kernels: dict[Any, Choice] = {}
    for choice in choices:
        if all(choice[name] in wanted for name, wanted in levels.items()):
            kernels.setdefault((variant_of(choice), choice["architecture"]), choice)
    return list(kernels.values())


def key(row: Mapping[str, Any]) -> str:
    """What names a kernel in tables and in the record: its choices, as JSON holds them."""
    return " ".join(f"{name}={value}" for name, value in as_json(row).items())


def compile_key(choice: Choice) -> str:
    """The same where the kernel's sources and its compiler are the same, so that it need not be compiled again."""
    return jit.key(variant_of(choice).source(), choice["architecture"])


def describe(choice: Choice, kernel: Compiled, *, disassemble: bool) -> Row:
    """One row. Sizes are bytes; ``occupancy`` is theoretical; ``instructions`` are static counts, ``None`` if not disassembled."""
    used = jit.resources(kernel.log)
    launch = {"threads": kernel.threads, "registers": used.registers, "shared_bytes": used.shared}
    return {
        "choice": as_json(choice),
        "name": kernel.name,
        **launch,
        "stack_bytes": used.stack,
        "spilled_bytes": used.spilled,
        "occupancy": round(occupancy(choice["architecture"], **launch), 4),
        "code_bytes": code_bytes(kernel.code),
        "instructions": count_instructions(kernel.code) if disassemble else None,
    }


def measure(choices: Sequence[Choice], *, disassemble: bool = True, done: Callable[[str], None] = lambda key: None) -> list[Row]:
    """Compile this revision's kernels, on all cores. ``done`` hears of each. Raises :class:`CompileError`."""

    def work(choice: Choice) -> Row:
        return {**describe(choice, compile_choice(choice), disassemble=disassemble), "key": compile_key(choice)}

    rows = []
    with ThreadPoolExecutor(jit.cores()) as pool:
        try:
            for row in pool.map(work, choices):
                rows.append(row)
                done(key(row["choice"]))
        finally:
            pool.shutdown(cancel_futures=True)
    return rows


def measure_revision(
    revision: str, choices: Sequence[Choice], *, disassemble: bool = True, done: Callable[[str], None] = lambda key: None
) -> list[Row]:
    """The same of another commit's kernels and plans; choices that it does not know are left out.

    Args:
        revision: a commit, as git names it, of the repository that this package lies in.
    Raises:
        PlatformError: this is not a repository, or it has no such commit.
    """
    rows = []
    with tempfile.TemporaryDirectory(prefix="collogue-resources-") as folder:
        _unpack(revision, Path(folder))
        for choice, kernel in zip(choices, _compile_there(Path(folder), choices), strict=True):
            if kernel is not None:
                rows.append(describe(choice, kernel, disassemble=disassemble))
            done(key(choice))
    return rows


def _unpack(revision: str, folder: Path) -> None:
    """The package as it was at ``revision``, under ``folder``."""
    here = Path(__file__).parent
    top = subprocess.run(["git", "-C", str(here), "rev-parse", "--show-toplevel"], capture_output=True, text=True, check=False)
    archive = ["git", "-C", top.stdout.strip() or str(here), "archive", "--format=tar", revision, "--", _PACKAGE]
    packed = subprocess.run(archive, capture_output=True, check=False)
    if top.returncode or packed.returncode:
        said = (top.stderr or packed.stderr.decode()).strip()
        raise PlatformError(f"git cannot give revision {revision!r}: {said}", hint="run this in a clone of Collogue's repository")
    with tarfile.open(fileobj=BytesIO(packed.stdout)) as tar:
        tar.extractall(folder, filter="data")


def _compile_there(folder: Path, choices: Sequence[Choice]) -> Iterator[Compiled | None]:
    """What ``worker`` compiles with the package in ``folder``, in the order of ``choices``."""
    command = [sys.executable, "-P", str(worker.__file__), str(jit.cores())]
    environment = {**os.environ, "PYTHONPATH": str(folder / "src")}
    with tempfile.TemporaryFile("w+") as given, tempfile.TemporaryFile("w+") as said:
        json.dump([as_json(choice) for choice in choices], given)
        given.seek(0)
        with subprocess.Popen(command, stdin=given, stdout=subprocess.PIPE, stderr=said, text=True, env=environment) as process:
            assert process.stdout is not None
            for line in process.stdout:
                found = json.loads(line)
                yield None if found is None else Compiled(found[0], base64.b64decode(found[1]), found[2], found[3])
        if process.returncode:
            said.seek(0)
            raise PlatformError(
                f"the other revision's package cannot be run: {said.read()[-500:].strip()}", hint="compare with a later commit"
            )

"""Structures that Python fills and CUDA C++ reads have the same layout on both sides."""

from __future__ import annotations

import contextlib
import ctypes
from typing import Any

import pytest

from collogue import kernels
from collogue.calls.terms import MAX_TERMS
from collogue.errors import CompileError, PlatformError
from collogue.gpu import failure, jit, workspace
from collogue.gpu.engine import _launch_more
from collogue.gpu.failure import FailureRecord
from collogue.gpu.header import ENTRY_BYTES
from collogue.gpu.launch import Params
from collogue.gpu.workspace import CONTROL_BYTES, SENTINELS
from collogue.group import MAX_PEERS
from collogue.planning.extent import GENERATIONS, ONE_SHOT_GENERATIONS

pytestmark = pytest.mark.slow


def sizes(name: str, structure: type[ctypes.Structure]) -> list[str]:
    """The sizes that C++ must see. NVRTC has no ``offsetof``: the same members in the same order and sizes have the same offsets."""
    found = [f"sizeof({name}) == {ctypes.sizeof(structure)}", f"alignof({name}) == {ctypes.alignment(structure)}"]
    return found + [f"sizeof({name}::{field}) == {ctypes.sizeof(kind)}" for field, kind, *_ in structure._fields_]


def check(*conditions: str) -> None:
    """Compile static assertions with the kernels' own headers."""
    asserts = "\n".join(f'static_assert({condition}, "");' for condition in conditions)
    source = f'#include "protocol.cuh"\nnamespace collogue {{\n{asserts}\n}}\nextern "C" __global__ void nothing() {{}}\n'
    jit.compile_source(source, "sm_90a", "nothing")


structures = pytest.mark.parametrize(("name", "structure"), [("Params", Params), ("Failure", FailureRecord)])


@structures
def test_members_have_the_same_size(name: str, structure: type[ctypes.Structure]) -> None:
    check(*sizes(name, structure))


@structures
def test_another_size_is_seen(name: str, structure: type[ctypes.Structure]) -> None:
    for condition in sizes(name, structure):
        with pytest.raises(CompileError, match="static assertion failed"):
            check(condition.replace("==", "!="))


def test_what_python_reads_is_what_the_compiler_reads() -> None:
    check(
        f"kMaxWorld == {workspace.MAX_RANKS} && kMaxWorld == {MAX_PEERS} && kMaxTerms == {MAX_TERMS}",
        f"kGenerations == {GENERATIONS} && kOneShotGenerations == {ONE_SHOT_GENERATIONS}",
        f"kDataOffset == {CONTROL_BYTES}",
        "sizeof(Control) <= kMarksOffset && kMarksOffset + kMarks * kMaxWorld * sizeof(Mark) <= kNotesOffset",
        f"kJournalOffset + kJournal * sizeof(Entry) <= {CONTROL_BYTES}",
        f"kJournalOffset == {workspace.JOURNAL_OFFSET} && kJournal == {workspace.JOURNAL} && sizeof(Entry) == {ENTRY_BYTES}",
        f"kMarksOffset == {workspace.MARKS_OFFSET} && kMarks == {workspace.MARKS}",
        f"sizeof(Control) - 4 == {workspace.CONTROL_WORDS}",
        f"kNotesOffset == {workspace.NOTES_OFFSET} && kNotesOffset + kMaxWorld * sizeof(Note) == {workspace.NOTES_END}",
        f"kTimeout == {failure.TIMEOUT} && kMismatch == {failure.MISMATCH}",
        *(f"{name} == {value}" for name, value in kernels.enumerators("protocol.cuh", "Stage").items()),
        *(f"{name} == {value}u" for name, value in kernels.constants("protocol.cuh").items()),
        f"BFloat16::kSentinel == {SENTINELS[2]}u && Float16::kSentinel == {SENTINELS[2]}u",
        f"Float32::kSentinel == {SENTINELS[4]}u",
    )
    assert kernels.constants("protocol.cuh")["kFoundHere"] == 0x10000
    assert len(failure.STAGES) == len(kernels.enumerators("protocol.cuh", "Stage"))


def test_a_name_that_is_not_there() -> None:
    with pytest.raises(LookupError, match=r"protocol\.cuh has no struct Nothing"):
        kernels.fields("protocol.cuh", "Nothing")


# Several launches


@pytest.mark.parametrize("refused", [False, True])
def test_the_parameters_are_the_first_launchs_again(refused: bool) -> None:
    """Also where a later launch is refused: the next call starts with the first rows."""
    launched = []

    class Launcher:
        params = Params(first=0, count=4, scale_rows=0)

        def __call__(self, stream: int) -> None:
            launched.append((self.params.first, self.params.count, self.params.scale_rows, stream))
            if refused and len(launched) == 2:
                raise PlatformError("x", hint="y")

    launcher: Any = Launcher()
    with pytest.raises(PlatformError) if refused else contextlib.nullcontext():
        _launch_more(launcher, ((4, 4, 0), (8, 2, 10)), 7)
    assert launched == [(4, 4, 0, 7), (8, 2, 10, 7)]
    assert (launcher.params.first, launcher.params.count, launcher.params.scale_rows) == (0, 4, 0)

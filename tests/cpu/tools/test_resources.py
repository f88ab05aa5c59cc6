"""`collogue resources`: the cubin is read right, occupancy is what NVIDIA's tables give, differences and limits are seen."""

from __future__ import annotations

import copy
import io
import json
import re
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from typer.testing import CliRunner

from collogue.errors import CompileError, PlatformError
from collogue.gpu import jit
from collogue.planning.architecture import ARCHITECTURES
from collogue.testing.covering import FACTORS, Choice, covering_set, possible, variant_of
from collogue.tools import packages
from collogue.tools.cli import app
from collogue.tools.commands.options import FAILED, IMPOSSIBLE, OK, USAGE
from collogue.tools.commands.resources import _print_columns
from collogue.tools.resources import compare, machine_code, measure, worker
from collogue.tools.resources.occupancy import occupancy, resident_ctas

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parents[3]
RECORD = ROOT / "benchmarks" / "results" / "resources.json"
SMALL: Choice = {
    "format": "none",
    "world": 2,
    "hidden_size": 24,
    "architecture": "sm_90a",
    "dtype": torch.bfloat16,
    "kernel": "one_shot",
    "norm": True,
    "keep_norm": False,
    "wide_weight": False,
    "residual": True,
    "tokens": 1,
}

LISTING = """
        .section .text.k
        /*0000*/                   LDC R1, c[0x0][0x28] ;
        /*0010*/              @!P0 LDG.E.128.STRONG.SYS R4, desc[UR4][R2.64] ;
        /*0020*/               @P1 LDG.E R4, desc[UR4][R2.64] ;
        /*0030*/                   LDS.128 R8, [R3] ;
        /*0040*/              @UP0 STG.E.128 desc[UR4][R2.64], R4 ;
        /*0050*/                   F2FP.SATFINITE.E2M1.F32.PACK_AB_MERGE_C R0, R1, R2, RZ ;
        /*0060*/                   MUFU.RCP R5, R6 ;
        /*0070*/                   SHFL.BFLY PT, R1, R2, 0x1, 0x1f ;
        /*0080*/                   BAR.SYNC.DEFER_BLOCKING 0x0 ;
        /*0090*/                   UCGABAR_ARV ;
        /*00a0*/                   EXIT ;
        /*00b0*/                   NOP;
"""


def test_instructions_are_counted_by_kind() -> None:
    found = machine_code.count(LISTING)
    wanted = {"load_128": 1, "load": 2, "store_128": 1, "store": 1, "e2m1": 1, "reciprocal": 1, "shuffle": 1, "barrier": 2, "total": 11}
    assert {kind: n for kind, n in found.items() if n} == wanted


def test_the_cubin_is_read() -> None:
    """A kernel whose every instruction is known; the size of its code is what the disassembler shows, 16 bytes an instruction."""
    source = 'extern "C" __global__ void k(const float4* x, float4* y) { y[threadIdx.x] = x[threadIdx.x]; __syncthreads(); }\n'
    code, _ = jit.compile_source(source, "sm_90a", "k")
    found = machine_code.count_instructions(code)
    assert (found["load_128"], found["store_128"], found["barrier"], found["reciprocal"]) == (1, 1, 1, 0)
    assert machine_code.code_bytes(code) >= 16 * found["total"]
    assert machine_code.code_bytes(code) % 128 == 0
    with pytest.raises(CompileError, match="no 64-bit ELF"):
        machine_code.code_bytes(b"not a cubin at all")


@pytest.mark.parametrize("format", ["none", "nvfp4/128x4"])
def test_nothing_stands_between_a_wait_and_what_it_is_for(format: str) -> None:
    """What the assembler likes to move there, it must not: each costs every call of one token tens of cycles (docs/speed.md)."""
    variant = variant_of({**SMALL, "format": format, "hidden_size": 7168})
    code = machine_code.disassemble(jit.compile_source(variant.source(), "sm_90a", variant.name)[0])
    names = re.findall(r"^\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?(.*?);", code, re.MULTILINE)
    started = next(i for i, name in enumerate(names) if name.startswith("ACQBULK"))
    assert [name.split(".")[0] for name in names[started + 1 : started + 4]] == ["LDG"] * 3
    sent = next(i for i, name in enumerate(names) if name.startswith("STG.E.128.STRONG.SYS"))
    for i, name in enumerate(names[started:sent], started):
        assert not name.startswith("BRA")
        if name.startswith(("LDC", "ULDC")):  # may be there, but not for what is sent
            register = re.escape(name.split()[1].rstrip(","))
            assert not [user for user in names[i + 1 : sent + 1] if re.search(rf"\b{register}\b", user)], name
    assert not [name for name in names[:sent] if name.startswith("FADD")], "weights are worked out before the sends"
    polls = max(i for i, name in enumerate(names) if "SR_CLOCKLO" in name)
    assert any(name.startswith("LDG.E.128.STRONG.SYS") for name in names[polls : polls + 12])
    assert max(i for i, name in enumerate(names) if "SR_GLOBALTIMERLO" in name) < polls
    summed = next(i for i, name in enumerate(names) if name.startswith("SYNCS.PHASECHK"))
    assert any(name.startswith("LDS.128") for name in names[summed : summed + 5])  # the retry's branch and where it joins


def test_without_the_disassembler_there_is_a_hint(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packages.shutil, "which", lambda name: None)
    monkeypatch.setattr(packages, "find_spec", lambda name: None)
    machine_code.nvdisasm.cache_clear()
    try:
        with pytest.raises(PlatformError, match="hint: pip install nvidia-cuda-nvdisasm"):
            machine_code.nvdisasm()
    finally:
        machine_code.nvdisasm.cache_clear()


@pytest.mark.parametrize(
    ("architecture", "threads", "registers", "shared", "ctas"),
    [
        ("sm_90a", 1024, 32, 0, 2),  # all 64 warps
        ("sm_90a", 1024, 33, 0, 1),  # 40 registers: 48 warps have room, a second CTA has not
        ("sm_90a", 128, 64, 0, 8),
        ("sm_90a", 128, 65, 0, 7),  # 72 registers: 7 warps on each scheduler
        ("sm_90a", 32, 16, 0, 32),  # CTAs
        ("sm_90a", 64, 32, 47 << 10, 4),  # 48 KiB each with the system's
        ("sm_80", 64, 32, 47 << 10, 3),
        ("sm_120a", 1024, 32, 0, 1),
        ("sm_120a", 32, 16, 0, 24),
    ],
)
def test_occupancy(architecture: str, threads: int, registers: int, shared: int, ctas: int) -> None:
    assert resident_ctas(architecture, threads=threads, registers=registers, shared_bytes=shared) == ctas
    share = occupancy(architecture, threads=threads, registers=registers, shared_bytes=shared)
    assert share == ctas * threads / 32 / ARCHITECTURES[architecture].warps


def test_the_default_is_the_covering_set_and_all_is_every_possible_kernel() -> None:
    kernels = [(variant_of(c), c["architecture"]) for c in covering_set()[0]]
    assert [(variant_of(c), c["architecture"]) for c in measure.chosen()] == list(dict.fromkeys(kernels))
    some = measure.chosen(format=["nvfp4/128x4"], architecture=["sm_90a", "sm_80"])
    assert some
    assert all(c["format"] == "nvfp4/128x4" and c["architecture"] in ("sm_90a", "sm_80") for c in some)
    levels: dict[str, Any] = {"format": ["fp8_static"], "dtype": [torch.bfloat16], "architecture": ["sm_100a"], "world": [1, 2]}
    every = measure.chosen(everything=True, hidden_size=[4096], **levels)  # 4096 is no level of the covering set
    assert {(c["kernel"], c["world"]) for c in every} >= {("one_shot", 2), ("local", 1)}
    assert all(possible(c) and c["hidden_size"] == 4096 and set(c) == set(FACTORS) for c in every)
    assert len(every) > 20


def test_a_choice_survives_json() -> None:
    assert worker.from_json(json.loads(json.dumps(worker.as_json(SMALL)))) == SMALL


@pytest.fixture(scope="module")
def row() -> measure.Row:
    return measure.measure([SMALL])[0]


def test_a_row_holds_what_is_promised(row: measure.Row) -> None:
    assert row["name"] == "collogue_one_shot_2_residual_norm"
    assert 16 < row["registers"] <= 64
    assert (row["stack_bytes"], row["spilled_bytes"]) == (0, 0)
    assert row["code_bytes"] > 1000
    assert row["instructions"]["load_128"] >= 4  # partial, residual, weight, the peer's slot
    assert row["instructions"]["store_128"] >= 4  # the peer's slot, the wipe, y, n
    assert 0 < row["occupancy"] <= 1


def test_differences_are_seen(row: measure.Row) -> None:
    other, third = copy.deepcopy(row), copy.deepcopy(row)
    other["registers"] += 2
    other["instructions"]["shuffle"] += 1
    third["choice"]["world"] = 3
    found = compare.compare([row], [other, third])
    (difference,) = found.differences
    n = row["instructions"]["shuffle"]
    assert difference.changes == {"registers": (row["registers"], row["registers"] + 2), "instructions.shuffle": (n, n + 1)}
    assert (found.same, found.added, found.removed) == (0, [measure.key(third["choice"])], [])
    assert compare.compare([row, third], [row]).removed == found.added
    assert compare.compare([row], [row]).same == 1


def test_limits_are_held(row: measure.Row) -> None:
    assert compare.violations([row], [row]) == []
    assert "not in the record" in compare.violations([row], [])[0]
    assert compare.violations([row], None) == []
    more = {**row, "registers": row["registers"] + compare.SLACK}
    assert compare.violations([more], [row]) == []
    more["registers"] += 1
    assert f"{more['registers']} registers, {row['registers']} in the record" in compare.violations([more], [row])[0]
    for name in ("stack_bytes", "spilled_bytes"):
        assert len(compare.violations([{**row, name: 8}], None)) == 1


def test_the_record_holds_the_covering_set_and_every_instruction() -> None:
    """That its registers are those of today's kernels is tested where the set is compiled (`test_covering.py`)."""
    rows = json.loads(RECORD.read_text())["kernels"]
    assert {measure.key(r["choice"]) for r in rows} == {measure.key(c) for c in measure.chosen()}
    for r in rows:
        assert set(r["instructions"]) == {*machine_code.KINDS, "total"}
        choice = r["choice"]
        encodes = choice["format"].startswith(("nvfp4", "mxfp4")) and choice["kernel"] != "all_gather"
        hardware = choice["architecture"] not in ("sm_80", "sm_90a")
        assert (r["instructions"]["e2m1"] > 0) == (encodes and hardware), measure.key(choice)


def test_another_commit_is_compiled_with_its_own_sources(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, row: measure.Row) -> None:
    """A repository of two commits; the second adds an instruction to the kernel and does not know world 3."""

    def git(*command: str) -> None:
        subprocess.run(["git", "-C", str(tmp_path), "-c", "user.name=n", "-c", "user.email=e", *command], check=True, capture_output=True)

    package = tmp_path / "src" / "collogue"
    package.parent.mkdir()
    subprocess.run(["cp", "-r", str(ROOT / "src" / "collogue"), str(package)], check=True)
    git("init", "-q")
    git("add", "-A")
    git("commit", "-qm", "first")
    kernel, covering = package / "kernels" / "one_shot.cuh", package / "testing" / "covering.py"
    text = kernel.read_text()
    kernel.write_text(text.replace("  Opening<C> opening(ranks);\n", "  Opening<C> opening(ranks);\n" + "  __nanosleep(20);\n" * 9, 1))
    assert kernel.read_text() != text
    text = covering.read_text()
    covering.write_text(
        text.replace("def variant_of(choice: Choice) -> Variant:\n", "def variant_of(choice):\n    assert choice['world'] != 3\n")
    )
    assert covering.read_text() != text
    git("commit", "-qam", "second")
    monkeypatch.setattr(measure, "__file__", str(package / "tools" / "resources" / "measure.py"))
    # The key is of this revision's sources, where the other's were compiled.
    assert measure.measure_revision("HEAD~1", [SMALL]) == [{name: value for name, value in row.items() if name != "key"}]
    (second,) = measure.measure_revision("HEAD", [{**SMALL, "world": 3}, SMALL])
    assert second["choice"] == row["choice"]
    assert second["code_bytes"] != row["code_bytes"] or second["instructions"] != row["instructions"]
    with pytest.raises(PlatformError, match="no-such-commit"):
        measure.measure_revision("no-such-commit", [SMALL])


def call(*arguments: str) -> Any:
    return CliRunner().invoke(app, ["resources", *arguments], env={"COLUMNS": "80", "NO_COLOR": "1", "TERM": "dumb"})


def test_the_command(monkeypatch: pytest.MonkeyPatch, row: measure.Row) -> None:
    monkeypatch.setattr(measure, "chosen", lambda **given: [SMALL])
    monkeypatch.setattr(measure, "measure", lambda choices, disassemble, done: [row])
    result = call("--json", "-", "--architecture", "sm_90a")
    assert result.exit_code == OK
    assert json.loads(result.stdout)["kernels"] == [row]
    assert "sm_90a: 1 kernels" in result.stderr
    worse = {**row, "registers": row["registers"] + 1, "spilled_bytes": 4}
    monkeypatch.setattr(measure, "measure_revision", lambda revision, choices, disassemble, done: [worse])
    said = call("--diff", "HEAD").stdout
    assert f"registers {worse['registers']} -> {row['registers']}" in said
    assert "spilled_bytes 4 -> 0" in said
    monkeypatch.setattr(measure, "measure", lambda choices, disassemble, done: [worse])
    assert call().exit_code == FAILED


def test_wrong_usage() -> None:
    assert call("--architecture", "sm_70").exit_code == USAGE
    assert call("--dtype", "int8").exit_code == USAGE
    assert call("--format", "nvfp5").exit_code == USAGE
    assert call("--hidden-size", "4096").exit_code == USAGE  # not of the covering set


def test_without_the_disassembler_the_command_ends_with_3(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packages, "nvdisasm", lambda: None)
    monkeypatch.setattr(measure, "chosen", lambda **given: [SMALL])
    assert call().exit_code == IMPOSSIBLE
    assert call("--no-count").exit_code == OK


@pytest.mark.parametrize(("width", "expected"), [(70, "not shown, for want of width: three"), (200, "a third column")])
def test_a_table_has_the_columns_that_the_terminal_has_room_for(width: int, expected: str) -> None:
    written = io.StringIO()
    out = Console(file=written, width=width, force_terminal=True, no_color=True)
    _print_columns(out, [["kernel", "two", "three"], ["a" * 30, "b" * 30, "a third column"]])
    shown = written.getvalue()
    assert "a" * 30 in shown
    assert "b" * 30 in shown
    assert expected in shown


def test_a_pipe_gets_every_column(monkeypatch: pytest.MonkeyPatch, row: measure.Row) -> None:
    monkeypatch.setattr(measure, "chosen", lambda **given: [SMALL])
    monkeypatch.setattr(measure, "measure", lambda choices, disassemble, done: [row])
    shown = call().stdout
    assert re.search(r"kernel +arch +H +dtype .* barrier *\n", shown)
    assert "…" not in shown

"""Every pair of choices compiles for every architecture: no local memory, and the hardware's conversions where there are any."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from collogue.contract.quant import parse
from collogue.gpu import jit
from collogue.planning.architecture import ARCHITECTURES, COVERED
from collogue.planning.variant import Variant
from collogue.testing.covering import FACTORS, FORMATS, Choice, all_pairs, covering_set, dozen, from_json, pairs_of, variant_of
from collogue.tools.resources.compare import violations
from collogue.tools.resources.measure import Row, chosen, compile_key, describe
from collogue.tools.resources.worker import compile_choice

pytestmark = pytest.mark.slow

RESULTS = Path(__file__).resolve().parents[3] / "benchmarks" / "results"
SPILLS, RECORD = RESULTS / "spills.json", RESULTS / "resources.json"
AT_LEAST_89 = ("sm_89", "sm_90a", "sm_100a", "sm_103a", "sm_110a", "sm_120a", "sm_121a")
AT_LEAST_100 = AT_LEAST_89[2:]
E2M1_INSTRUCTION = "cvt.rn.satfinite.e2m1x2.f32"


def test_every_possible_pair_is_covered() -> None:
    chosen, impossible = covering_set()
    covered = set().union(*map(pairs_of, chosen))
    assert covered.isdisjoint(impossible)
    assert covered | impossible == set(all_pairs())


def test_impossible_pairs_are_those_that_no_plan_makes() -> None:
    _, impossible = covering_set()
    blocks = set()
    for label, quant in FORMATS.items():
        block = quant.block if quant is not None else 0
        blocks |= {(("format", label), ("hidden_size", h)) for h in (24, 576, 2880, 7168, 12800, 16384) if block and h % block}
    alone = {(("world", 1), ("kernel", kernel)) for kernel in FACTORS["kernel"] if kernel != "local"}
    together = {(("world", world), ("kernel", "local")) for world in range(2, 9)}
    moves = {(("kernel", "all_gather"), (name, True)) for name in ("norm", "keep_norm", "wide_weight", "residual")}
    moves |= {(("kernel", "all_gather"), ("prologue", label)) for label in FACTORS["prologue"] if label != "none"}
    moves |= {(("kernel", "all_gather"), ("branch", label)) for label in ("value", "float32")}
    even = {(("kernel", kernel), ("rows", "uneven")) for kernel in ("one_shot", "two_shot", "local")} | {(("world", 1), ("rows", "uneven"))}
    branches = {(("residual", False), ("branch", label)) for label in ("value", "float32")}
    assert impossible == (
        blocks
        | alone
        | together
        | moves
        | branches
        | even
        | {
            (("dtype", torch.float32), ("branch", "float32")),
            (("dtype", torch.float32), ("wide_weight", True)),
            (("norm", False), ("keep_norm", True)),
            (("norm", False), ("wide_weight", True)),
        }
    )


def test_the_set_is_the_same_every_time() -> None:
    assert covering_set() == covering_set()


@pytest.mark.timeout(600)
def test_covering_set_compiles_within_its_limits(record_property: Callable[[str, object], None]) -> None:
    """No warnings, no local memory, and no more registers than the committed record says, if the same compiler made it.

    Kernels that the record has by the same sources and compiler are not compiled again, but for every eighth.
    """
    start = time.perf_counter()
    known = {row["key"] for row in json.loads(RECORD.read_text(encoding="utf-8"))["kernels"]}
    rows = _compiled([choice for number, choice in enumerate(chosen()) if number % 8 == 0 or compile_key(choice) not in known])
    seconds = time.perf_counter() - start
    most = max(row["registers"] for row in rows)
    record_property("told", f"covering set: {len(rows)} kernels compiled in {seconds:.0f} s, at most {most} registers")
    record = json.loads(RECORD.read_text(encoding="utf-8"))
    same_compiler = record["versions"]["nvrtc"] == ".".join(map(str, jit.nvrtc_version()))
    broken = violations(rows, record["kernels"] if same_compiler else None)
    assert not broken, f"{len(broken)} limits are broken; if that is meant: collogue resources --json {RECORD}\n" + "\n".join(broken)


def _compiled(choices: list[Choice]) -> list[Row]:
    """A row for each kernel, none of which the compiler warns of."""
    # NVRTC works outside Python's lock.
    with ThreadPoolExecutor(jit.cores()) as pool:
        kernels = list(pool.map(compile_choice, choices))
    warnings = {line for kernel in kernels for line in kernel.log.splitlines() if "warning" in line}
    assert not warnings, "the compiler warns:\n" + "\n".join(sorted(warnings))
    return [describe(choice, kernel, disassemble=False) for choice, kernel in zip(choices, kernels, strict=True)]


@pytest.mark.parametrize("architecture", [name for name in ARCHITECTURES if name not in COVERED])
def test_a_dozen_kernels_compile_for_every_other_architecture(architecture: str) -> None:
    """All of them compile in `make test-compile`."""
    choices = dozen(architecture)
    assert len(choices) == 12
    assert not violations(_compiled(choices), None)


#: Of the kernels with few registers to spare, so many are compiled here, spread over all of them.
MOST_TIGHT = 300


@pytest.mark.timeout(600)
def test_kernels_with_few_registers_to_spare_do_not_spill(record_property: Callable[[str, object], None]) -> None:
    """Those that `scripts/spills.py` has found, and those that it has seen spill with the launch bounds of the plan."""
    record = json.loads(SPILLS.read_text(encoding="utf-8"))
    tight = [from_json(row) for row in record["tight"]]
    spilled = [from_json(row["variant"]) for row in record["spilled"]]
    variants = [*spilled, *tight[:: -(-len(tight) // MOST_TIGHT) or 1]]
    architecture = record["architecture"]
    with ThreadPoolExecutor(jit.cores()) as pool:
        codes = list(pool.map(lambda variant: jit.compile_variant(variant, architecture)[0], variants))
    broken = [variant for variant, code in zip(variants, codes, strict=True) if jit.local_bytes(code)]
    record_property("told", f"few registers to spare: {len(variants)} of {len(tight) + len(spilled)} kernels compiled again")
    assert not broken, f"{len(broken)} kernels spill: {broken[0]}"


@pytest.mark.parametrize("label", ["nvfp4/128x4", "mxfp4/ceil/linear", "mxfp8/ceil/128x4"])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_e2m1_is_the_hardware_instruction_from_sm_100a_on(architecture: str, label: str) -> None:
    choice = next(c for c in covering_set()[0] if c["format"] == label and c["norm"])
    variant = variant_of({**choice, "architecture": architecture})
    has_instruction = E2M1_INSTRUCTION in _ptx(variant, architecture)
    assert has_instruction == (parse(label).element == "e2m1" and architecture in AT_LEAST_100)  # type: ignore[union-attr]


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_e4m3_is_the_hardware_instruction_from_sm_89_on(architecture: str) -> None:
    choice = next(c for c in covering_set()[0] if c["format"] == "fp8_per_token")
    ptx = _ptx(variant_of({**choice, "architecture": architecture}), architecture)
    assert ("cvt.rn.satfinite.e4m3x2.f32" in ptx) == (architecture in AT_LEAST_89)


@pytest.mark.parametrize("architecture", ["sm_80", "sm_90a"])
@pytest.mark.parametrize("prologue", ["none", "combine/float32/shared", "reduce/value"])
def test_no_contraction_and_nothing_approximate(architecture: str, prologue: str) -> None:
    """Every float operation is rounded by itself: no ``fma`` but the named ones, no ``approx``, no flush to zero."""
    choice = next(c for c in covering_set()[0] if c["norm"] and c["kernel"] == "one_shot" and c["dtype"] is torch.bfloat16)
    ptx = _ptx(variant_of({**choice, "format": "none", "prologue": prologue, "architecture": architecture}), architecture)
    assert "fma.rn.f32" not in ptx
    assert ".approx" not in ptx
    assert ".ftz" not in ptx


def _ptx(variant: Variant, architecture: str) -> str:
    return jit.ptx(variant.source(), variant.name, jit.options(variant.name, architecture)).decode()

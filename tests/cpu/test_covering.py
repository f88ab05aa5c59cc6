"""Every pair of choices compiles for every architecture: no local memory, and the hardware's conversions where there are any."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from cuda.bindings import nvrtc

from collogue import jit
from collogue.spec import parse
from collogue.testing.covering import FACTORS, FORMATS, Choice, all_pairs, covering_set, pairs_of, variant_of
from collogue.variant import Variant

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
    assert impossible == (
        blocks
        | alone
        | together
        | moves
        | {
            (("dtype", torch.float32), ("wide_weight", True)),
            (("norm", False), ("keep_norm", True)),
            (("norm", False), ("wide_weight", True)),
        }
    )


def test_the_set_is_the_same_every_time() -> None:
    assert covering_set() == covering_set()


@pytest.mark.timeout(600)
def test_covering_set_compiles_without_spills(record_property: Callable[[str, object], None]) -> None:
    chosen, _ = covering_set()
    kernels = {(variant_of(choice), choice["architecture"]): choice for choice in chosen}
    start = time.perf_counter()
    # NVRTC works outside Python's lock.
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        reports = list(pool.map(_compile, kernels))
    seconds, registers = time.perf_counter() - start, max(report.registers for report, _ in reports)
    record_property("told", f"covering set: {len(kernels)} kernels compiled in {seconds:.0f} s, at most {registers} registers")
    spills = [f"{_short(c)}: {report}" for c, (report, _) in zip(kernels.values(), reports, strict=True) if report.stack or report.spilled]
    assert not spills, f"{len(spills)} of {len(kernels)} kernels use local memory:\n" + "\n".join(spills)
    warnings = {line for _, lines in reports for line in lines}
    assert not warnings, "the compiler warns:\n" + "\n".join(sorted(warnings))


def _compile(kernel: tuple[Variant, str]) -> tuple[jit.Resources, list[str]]:
    """The resource report and the warnings."""
    variant, architecture = kernel
    _, log = jit.compile_source(variant.source(), architecture, variant.name, verbose=True)
    return jit.resources(log), [line for line in log.splitlines() if "warning" in line]


def _short(choice: Choice) -> str:
    return " ".join(f"{name}={str(value).removeprefix('torch.')}" for name, value in choice.items())


@pytest.mark.parametrize("label", ["nvfp4/128x4", "mxfp4/ceil/linear", "mxfp8/ceil/128x4"])
@pytest.mark.parametrize("architecture", jit.ARCHITECTURES)
def test_e2m1_is_the_hardware_instruction_from_sm_100a_on(architecture: str, label: str) -> None:
    choice = next(c for c in covering_set()[0] if c["format"] == label and c["norm"])
    variant = variant_of({**choice, "architecture": architecture})
    has_instruction = E2M1_INSTRUCTION in _ptx(variant, architecture)
    assert has_instruction == (parse(label).element == "e2m1" and architecture not in ("sm_80", "sm_90a"))  # type: ignore[union-attr]


@pytest.mark.parametrize("architecture", jit.ARCHITECTURES)
def test_e4m3_is_the_hardware_instruction_but_on_sm_80(architecture: str) -> None:
    choice = next(c for c in covering_set()[0] if c["format"] == "fp8_per_token")
    ptx = _ptx(variant_of({**choice, "architecture": architecture}), architecture)
    assert ("cvt.rn.satfinite.e4m3x2.f32" in ptx) == (architecture != "sm_80")


@pytest.mark.parametrize("architecture", ["sm_80", "sm_90a"])
def test_no_contraction_and_nothing_approximate(architecture: str) -> None:
    """Every float operation is rounded by itself: no ``fma`` but the named ones, no ``approx``, no flush to zero."""
    choice = next(c for c in covering_set()[0] if c["format"] == "none" and c["norm"] and c["kernel"] == "one_shot")
    ptx = _ptx(variant_of({**choice, "architecture": architecture}), architecture)
    assert "fma.rn.f32" not in ptx
    assert ".approx" not in ptx
    assert ".ftz" not in ptx


def _ptx(variant: Variant, architecture: str) -> str:
    """The kernel's PTX. ``cuda.core`` gives it only where there is a driver, so this asks NVRTC itself, with the same options."""
    # A real architecture would give machine code and no PTX.
    options = [o.replace(b"-arch=sm_", b"-arch=compute_") for o in jit.options(variant.name, architecture).as_bytes("nvrtc")]
    error, program = nvrtc.nvrtcCreateProgram(variant.source().encode(), b"kernel.cu", 0, [], [])
    assert not error
    (error,) = nvrtc.nvrtcCompileProgram(program, len(options), options)
    assert not error
    error, size = nvrtc.nvrtcGetPTXSize(program)
    assert not error
    ptx = bytes(size)
    (error,) = nvrtc.nvrtcGetPTX(program, ptx)
    assert not error
    return ptx.decode()

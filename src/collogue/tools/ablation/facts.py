"""What of a switch needs no GPU: registers, memory, code and instructions on every architecture, and whether it changes bits."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeAlias

from collogue.contract.quant import parse
from collogue.gpu import jit
from collogue.testing import emulator
from collogue.tools.ablation.build import Builder, topology_of, variant_of
from collogue.tools.ablation.switches import Switch
from collogue.tools.check.case import Case
from collogue.tools.resources.machine_code import code_bytes, count_instructions

Row: TypeAlias = dict[str, Any]

#: Calls, seeds and global scales of the emulator's comparison with the reference: enough elements that a change of rounding shows.
_TOKENS, _SEEDS = (3, 1, 2, 3, 1), 6
_GLOBAL_SCALE, _STATIC_SCALE = 448.0 * 6.0 / 5.0, 5.0 / 448.0


def compiled(
    switches: Sequence[Switch],
    cases: Sequence[Case],
    architectures: Sequence[str],
    *,
    disassemble: bool = True,
    done: Callable[[str], None] = lambda name: None,
) -> list[Row]:
    """One row for each switch, case and architecture where it applies."""
    rows = []
    for architecture in architectures:
        with Builder(architecture) as builder:
            pairs = [(s, c) for s in switches for c in cases if s.applies(c.format, architecture)]
            variants = [variant_of(s, topology_of(s, c, architecture), c) for s, c in pairs]
            builder.compile_all([(s, v) for (s, _), v in zip(pairs, variants, strict=True)])
            for (switch, case), variant in zip(pairs, variants, strict=True):
                code, log = builder.compile(switch, variant)
                used = jit.resources(log)
                rows.append(
                    {
                        "switch": switch.name,
                        "architecture": architecture,
                        "format": case.format,
                        "tokens": case.tokens,
                        "threads": variant.threads,
                        "registers": used.registers,
                        "spilled_bytes": used.stack + used.spilled,
                        "code_bytes": code_bytes(code),
                        "instructions": count_instructions(code) if disassemble else None,
                    }
                )
                done(f"{switch.name} {architecture}")
    return rows


def changed_bits(switch: Switch, format: str) -> str | None:
    """What the emulated kernel with these edits gives that the contract does not; ``""`` if nothing differs.

    ``None``: the emulator cannot say, because the switch is one of compiler options, of the launch or of instructions.
    """
    if switch.options or not switch.edits or any(edit.file == "ptx.cuh" for edit in switch.edits):
        return None
    quant = parse(format, global_scale=_GLOBAL_SCALE, static_scale=_STATIC_SCALE)
    case = emulator.Case(3, 576, 64, quant=quant)
    with tempfile.TemporaryDirectory(prefix="collogue-ablate-") as folder:
        library = emulator.compile_cases([case], Path(folder), switch.edits)
        for seed in range(_SEEDS):
            problem = emulator.emulate(library, _TOKENS, seed=seed).problem()
            if problem:
                return problem
    return ""

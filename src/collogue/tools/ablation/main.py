"""The whole of ``collogue ablate``: facts without a GPU, times with GPUs, as data and as tables."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

from collogue.contract.quant import describe, parse
from collogue.testing.processes import run_processes
from collogue.tools.ablation import facts
from collogue.tools.ablation.rank import ablate_rank
from collogue.tools.ablation.switches import Switch
from collogue.tools.accuracy.main import aligned
from collogue.tools.check.case import Case

Row: TypeAlias = dict[str, Any]

TOKENS, FORMATS, HIDDEN_SIZE = (1, 8, 32), ("none", "nvfp4", "fp8_static"), 7168
METHOD = (
    "Every switch is one change of the kernels as they are (base), alone; together has several. Times: as in `collogue bench`, "
    "all switches of one shape replayed in turn in one run, median over replays, maximum over ranks, and median over rounds, each with "
    "memory of its own; base again is base once more, so its difference from base is what means nothing. bits_changed: outputs compared "
    "with the reference on the GPU; by_emulator: the same kernel sources with the same edits on the CPU. Registers, code and "
    "instructions: of the cubin, by NVRTC and nvdisasm."
)


def cases(world_size: int, tokens: Sequence[int] = TOKENS, formats: Sequence[str] = FORMATS, hidden_size: int = HIDDEN_SIZE) -> list[Case]:
    """The product of tokens and formats, with residual and norm."""
    labels = [describe(parse(name)) for name in formats]
    return [Case(t, hidden_size, format=label, world_size=world_size, keep_norm=False) for label in labels for t in tokens]


def run(
    switches: Sequence[Switch],
    chosen: Sequence[Case],
    *,
    architectures: Sequence[str],
    timing: bool,
    measure_facts: bool = True,
    disassemble: bool = True,
    replays: int = 15,
    rounds: int = 3,
    done: Callable[[str], None] = lambda name: None,
) -> Row:
    """With ``timing`` times of every switch on this machine's GPUs, a process for each rank, and with ``measure_facts`` the rest."""
    times: list[Row] = []
    if timing:
        given, world = (list(switches), list(chosen), replays, rounds), chosen[0].world_size
        times = run_processes(world, ablate_rank, *given, device="cuda", silence=120.0, heard=_heard(done))[0]
    bits, rows = list[Row](), list[Row]()
    if measure_facts:
        bits = _bits(switches, list(dict.fromkeys(case.format for case in chosen)), done)
        smallest = [case for case in chosen if case.tokens == min(c.tokens for c in chosen)]
        rows = facts.compiled(switches, smallest, architectures, disassemble=disassemble, done=done)
    described = [{"name": s.name, "what": s.what, "valid": s.valid, "architectures": list(s.architectures)} for s in switches]
    return {"method": METHOD, "switches": described, "bits": bits, "compiled": rows, "times": times}


def steps(switches: Sequence[Switch], chosen: Sequence[Case], architectures: Sequence[str], *, timing: bool, measure_facts: bool) -> int:
    """How often :func:`run` says what is being done."""
    timed = 1 + 2 * len(chosen) if timing else 0
    formats = list(dict.fromkeys(case.format for case in chosen))
    bits = sum(not s.formats or format.split("/")[0] in s.formats for s in switches for format in formats)
    compiled = sum(s.applies(format, a) for s in switches for format in formats for a in architectures)
    return timed + (bits + compiled if measure_facts else 0)


def _bits(switches: Sequence[Switch], formats: Sequence[str], done: Callable[[str], None]) -> list[Row]:
    """Whether the emulated kernel with a switch gives other bits, for each switch and format where it applies."""
    rows = []
    for switch in switches:
        for format in formats:
            if not switch.formats or format.split("/")[0] in switch.formats:
                done(f"{switch.name}, {format}: bits")
                found = facts.changed_bits(switch, format)
                changed = None if found is None else bool(found)
                rows.append({"switch": switch.name, "format": format, "by_emulator": changed, "first_difference": found or None})
    return rows


def _heard(done: Callable[[str], None]) -> Callable[[int, str], None]:
    def heard(rank: int, stage: str) -> None:
        if rank == 0:
            done(stage)

    return heard


def text(data: Row) -> str:
    """Tables: microseconds with the difference from base; registers with theirs; bits."""
    lines: list[str] = []
    if data["times"]:
        columns = list(dict.fromkeys((r["format"], r["tokens"]) for r in data["times"]))
        found = {(r["switch"], r["format"], r["tokens"]): r for r in data["times"]}
        table = [["microseconds (minus base)", *(f"{f} T={t}" for f, t in columns), "bits"]]
        for name in dict.fromkeys(r["switch"] for r in data["times"]):
            mine = [found.get((name, *column)) for column in columns]
            bases = [found.get(("base", *column)) for column in columns]
            known = {r["bits_changed"] for r in mine if r is not None} - {None}
            word = "changed" if True in known else "same" if known else "-"
            table.append([name, *(_time(row, base) for row, base in zip(mine, bases, strict=True)), word])
        lines += [*aligned(table), ""]
    architectures = list(dict.fromkeys(r["architecture"] for r in data["compiled"]))
    for format in dict.fromkeys(r["format"] for r in data["compiled"]):
        cells = {(r["switch"], r["architecture"]): r for r in data["compiled"] if r["format"] == format}
        table = [[f"{format}: registers, bytes of code", *architectures, "bits (emulator)"]]
        words = {r["switch"]: {True: "changed", False: "same", None: "-"}[r["by_emulator"]] for r in data["bits"] if r["format"] == format}
        for name in dict.fromkeys(name for name, _ in cells):
            table.append([name, *(_resources(cells.get((name, a))) for a in architectures), words.get(name, "-")])
        lines += [*aligned(table), ""]
    return "\n".join(lines)


def _time(row: Row | None, base: Row | None) -> str:
    if row is None or row["us"] is None:
        return "-"
    return f"{row['us']:.2f} ({row['us'] - base['us']:+.2f})" if base is not None and base["us"] else f"{row['us']:.2f}"


def _resources(row: Row | None) -> str:
    return "-" if row is None else f"{row['registers']}, {row['code_bytes']}" + (" spills" if row["spilled_bytes"] else "")


def noise(data: Row) -> float | None:
    """The median difference between base and base again, in microseconds, over all shapes; ``None`` without both."""
    found = {(r["switch"], r["format"], r["tokens"]): r["us"] for r in data["times"]}
    pairs = [(us, found.get(("base again", *rest))) for (name, *rest), us in found.items() if name == "base"]
    differences = [abs(b - a) for a, b in pairs if a is not None and b is not None]
    return statistics.median(differences) if differences else None

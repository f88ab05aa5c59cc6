"""Compiles the kernels that plans can ask for, and records registers and spills: `benchmarks/results/spills.json`.

    python scripts/spills.py --raw spills.jsonl [--seconds 3600] [--world 2 ...]

Every distinct kernel (by :class:`collogue.planning.variant.Variant`) of one architecture is listed: world sizes 1 to 8, the hidden
sizes, dtypes and formats of the covering set, every operation and epilogue, token counts to 16,384, with the algorithm that the plan
takes, with each that a user may ask for, and with few SMs. That is some four hundred thousand. Kernels that share algorithm, world size,
width of the dtype, launch bounds and loop are a *family*: first some of every family are compiled, then whole families, those with
the fewest registers to spare first. A run goes on where the one before has stopped: `--raw` has a line for each kernel that has been
compiled, and is restarted when a kernel source has changed. The result says of each family how many kernels it has and how many were
compiled.

A kernel counts as spilling if it does with the launch bounds that the plan asks for. What runs is then compiled with others
(:func:`collogue.gpu.jit.compile_variant`); `finally_spilled` says whether that helped.
"""

from __future__ import annotations

import argparse
import hashlib
import itertools
import json
import time
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from collogue.calls.request import Request
from collogue.contract.quant import Quant
from collogue.contract.spec import VALUE_DTYPES, Operation, Wanted
from collogue.errors import ArgumentError, FormatError
from collogue.gpu import jit
from collogue.planning.plan import make_kernels, make_plan, one_shot_tokens
from collogue.planning.topology import Overrides, Topology
from collogue.planning.variant import Variant
from collogue.testing.covering import FACTORS, FORMATS, registers_allowed, to_json

ARCHITECTURE, MULTIPROCESSORS, MOST_TOKENS = "sm_90a", 132, 16384
RESULT = Path(__file__).resolve().parent.parent / "benchmarks" / "results" / "spills.json"
#: How many of each family are compiled first, and how few registers to spare make a kernel one that CI compiles.
FIRST, TIGHT = 3, 2
OPERATIONS: tuple[Operation, ...] = ("all_reduce", "sharded", "reduce_scatter", "all_gather", "finish")
#: (norm, keep_norm, wide_weight)
NORMS = ((False, False, False), (True, False, False), (True, True, False), (True, False, True), (True, True, True))


def token_counts(topology: Topology) -> list[int]:
    """Numbers of tokens that between them give every kernel of an all-reduce: a plan asks of T which algorithm, and whether a CTA does
    several rows. Up to a number it does not, and beyond it does; with other operations one token and very many show both."""
    most = one_shot_tokens(topology, topology.hidden_size) if topology.world_size > 1 else 0
    return sorted({1, 512, max(most, 1), min(most + 1, MOST_TOKENS), MOST_TOKENS})


def requests(hidden_size: int, dtype: torch.dtype, quant: Quant | None) -> Iterator[Request]:
    """Every call of one row, but for its number of tokens."""
    for residual, (norm, keep, wide), operation in itertools.product((False, True), NORMS, OPERATIONS):
        if (keep and quant is None) or (wide and dtype is torch.float32):
            continue
        try:
            wanted = Wanted.of(has_residual=residual, has_norm=norm, quant=quant, keep_norm=keep, operation=operation)
        except (ArgumentError, FormatError):
            continue
        moves = operation == "all_gather"
        adds = residual and operation not in ("all_gather", "finish")
        yield Request(1, hidden_size, dtype, adds, norm and not moves, wide and not moves, quant, wanted, operation)


def variants(world: int) -> Iterator[Variant]:
    """The kernels of a world, each as often as plans name it."""
    for hidden_size, dtype, asked in itertools.product(FACTORS["hidden_size"], VALUE_DTYPES, ("plan", "one_shot", "two_shot", "few SMs")):
        overrides = Overrides(**{"plan": {}, "few SMs": {"max_sms": 16}}.get(asked, {"algorithm": asked}))
        topology = Topology(world, MOST_TOKENS, hidden_size, dtype, ARCHITECTURE, MULTIPROCESSORS, 1, overrides)
        counts = token_counts(topology)
        for quant in FORMATS.values():
            if quant is not None and quant.block and hidden_size % quant.block:
                continue
            for request in requests(hidden_size, dtype, quant):
                if asked in ("one_shot", "two_shot") and (world == 1 or request.operation != "all_reduce"):
                    continue
                for tokens in counts if request.operation == "all_reduce" else (1, MOST_TOKENS):
                    made = replace(request, tokens=tokens)
                    for kernel in make_kernels(topology, made, make_plan(topology, made)):
                        yield kernel.variant


def family(v: Variant) -> str:
    """What kernels share whose registers are alike."""
    shape = f"{v.threads}x{v.ctas_per_multiprocessor} threads, {v.vectors} vectors"
    return f"{v.kernel}{'+gather' * v.gather} world {v.world}, {8 * v.dtype.itemsize} bits, {shape}{', loop' * v.loop}"


def order(every: Sequence[Variant], raw: dict[str, dict[str, Any]]) -> Iterator[Variant]:
    """What has not been compiled: some of every family, then families by registers to spare, which is asked again after each."""
    families: dict[str, list[Variant]] = defaultdict(list)
    for variant in sorted(every, key=key):
        families[family(variant)].append(variant)
    for members in families.values():
        yield from (v for v in members[:FIRST] if key(v) not in raw)

    def spare(name: str) -> int:
        return min(int(row["allowed"] - row["registers"] - row["spilled"]) for v in families[name] if (row := raw.get(key(v))))

    left = {name for name, members in families.items() if any(key(v) not in raw for v in members)}
    while left:
        name = min(left, key=lambda name: (spare(name), name))
        left.remove(name)
        yield from (v for v in families[name] if key(v) not in raw)


def key(variant: Variant) -> str:
    return hashlib.sha256(variant.source().encode()).hexdigest()[:16]


def compile_one(variant: Variant) -> dict[str, Any]:
    _, log = jit.compile_source(variant.source(), ARCHITECTURE, variant.name, verbose=True)
    used = jit.resources(log)
    row = {"registers": used.registers, "spilled": used.spilled, "stack": used.stack, "allowed": registers_allowed(variant)}
    if used.stack:
        code, _ = jit.compile_variant(variant, ARCHITECTURE)
        row["finally_spilled"] = jit.local_bytes(code)
    return row


def summary(every: Sequence[Variant], raw: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """What is committed."""
    total: Counter[str] = Counter(family(v) for v in every)
    done: dict[str, list[dict[str, Any]]] = defaultdict(list)
    tight, spilled = [], []
    for v in every:
        row = raw.get(key(v))
        if row is None:
            continue
        done[family(v)].append(row)
        if row["spilled"] or row["stack"]:
            spilled.append({"variant": to_json(v), **row})
        elif row["allowed"] - row["registers"] <= TIGHT:
            tight.append(to_json(v))
    families = {
        name: {
            "kernels": total[name],
            "compiled": len(rows),
            "allowed": rows[0]["allowed"],
            "most": max(row["registers"] for row in rows),
            "spilled": sum(bool(row["spilled"]) for row in rows),
        }
        for name, rows in sorted(done.items())
    }
    compiled = sum(map(len, done.values()))
    facts = {"architecture": ARCHITECTURE, "nvrtc": list(jit.nvrtc_version()), "kernels": len(every), "compiled": compiled}
    whole = sum(n["compiled"] == n["kernels"] for n in families.values())
    return {**facts, "families": len(total), "whole_families": whole, "spilled": spilled, "tight": tight, "by_family": families}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--raw", type=Path, required=True, help="a line for each kernel; restarted when the sources change")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="stop after so many")
    parser.add_argument("--world", type=int, nargs="*", default=list(range(1, 9)))
    asked = parser.parse_args()
    raw: dict[str, dict[str, Any]] = {}
    if asked.raw.exists():
        lines = asked.raw.read_text().splitlines()
        if lines and json.loads(lines[0]) == {"sources": jit.sources_hash()}:
            raw = dict(json.loads(line) for line in lines[1:])
    if not raw:
        asked.raw.write_text(json.dumps({"sources": jit.sources_hash()}) + "\n")
    every = list(dict.fromkeys(v for world in asked.world for v in variants(world)))
    print(f"{len(every)} kernels, {len(raw)} compiled before", flush=True)
    end = time.monotonic() + asked.seconds
    with asked.raw.open("a") as file:
        for number, variant in enumerate(order(every, raw)):
            if time.monotonic() > end:
                break
            row = raw[key(variant)] = compile_one(variant)
            file.write(json.dumps([key(variant), row]) + "\n")
            file.flush()
            if row["spilled"]:
                print(f"{row} {family(variant)} {variant.quant} {variant.dtype} weight {variant.weight_dtype}", flush=True)
            if number % 500 == 499:
                print(f"{len(raw)} of {len(every)}", flush=True)
    RESULT.write_text(json.dumps(summary(every, raw), indent=1) + "\n")


if __name__ == "__main__":
    main()

"""What stands in a cubin: the size of its code, and how often each kind of instruction occurs (by ``nvdisasm``)."""

from __future__ import annotations

import functools
import re
import subprocess
import tempfile
from collections import Counter
from pathlib import Path

from collogue.errors import CompileError
from collogue.gpu.jit import sections
from collogue.tools import packages

#: The instructions that are counted, by what they are. Static counts: how often one stands in the code, not how often it runs.
#: A division in line is one MUFU.RCP and its corrections; a subroutine for operands near the ends of the range holds one more.
KINDS: dict[str, str] = {
    "load_128": r"LDG?\.(?=.*\b128\b)",
    "store_128": r"STG?\.(?=.*\b128\b)",
    "load": r"LDG?\.",
    "store": r"STG?\.",
    "e2m1": r"F2FP\..*E2M1",
    "e4m3": r"F2FP\..*E4M3",
    "reciprocal": r"MUFU\.RCP",
    "root": r"MUFU\.(RSQ|SQRT)",
    "shuffle": r"SHFL",
    "barrier": r"BAR\.|UCGABAR",
    "mbarrier": r"SYNCS",
    "fence": r"MEMBAR|FENCE",
    "call": r"CALL",
}
_KINDS = {kind: re.compile(pattern) for kind, pattern in KINDS.items()}
_INSTRUCTION = re.compile(r"^\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)", re.MULTILINE)


def code_bytes(cubin: bytes) -> int:
    """Bytes of machine code in an ELF file: its sections called ``.text.*``."""
    return sum(len(code) for name, code in sections(cubin) if name.startswith(".text."))


@functools.cache
def nvdisasm() -> Path:
    """NVIDIA's disassembler. Raises :class:`PlatformError`."""
    found = packages.nvdisasm()
    if found is None:
        packages.require(missing=["nvidia-cuda-nvdisasm"])
    assert found is not None
    return found


def count_instructions(cubin: bytes) -> dict[str, int]:
    """How often each of :data:`KINDS` stands in the code, and ``total``, which leaves out the padding."""
    return count(disassemble(cubin))


def disassemble(cubin: bytes) -> str:
    """What nvdisasm prints of a cubin."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        done = subprocess.run([str(nvdisasm()), file.name], capture_output=True, text=True, timeout=120, check=False)
    if done.returncode:
        raise CompileError(f"nvdisasm failed to read the cubin: {done.stderr.strip()}", hint="use an nvdisasm as new as NVRTC")
    return done.stdout


def count(listing: str) -> dict[str, int]:
    """The counts of a listing by ``nvdisasm``."""
    opcodes = Counter(opcode for opcode in _INSTRUCTION.findall(listing) if opcode != "NOP")
    found = {kind: sum(n for opcode, n in opcodes.items() if pattern.match(opcode)) for kind, pattern in _KINDS.items()}
    return {**found, "total": sum(opcodes.values())}

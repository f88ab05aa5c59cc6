"""What stands in a cubin: the size of its code, and how often each kind of instruction occurs (by ``nvdisasm``)."""

from __future__ import annotations

import functools
import importlib.util
import re
import shutil
import subprocess
import tempfile
from collections import Counter
from pathlib import Path

from collogue.errors import CompileError, PlatformError
from collogue.gpu.jit import sections

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
    """NVIDIA's disassembler, on the path or in the package ``nvidia-cuda-nvdisasm``. Raises :class:`PlatformError`."""
    found = shutil.which("nvdisasm")
    if found:
        return Path(found)
    spec = importlib.util.find_spec("nvidia")
    for folder in spec.submodule_search_locations or [] if spec else []:
        for file in sorted(Path(folder).glob("*/bin/nvdisasm*")):
            return file
    raise PlatformError("nvdisasm is not here, so instructions cannot be counted", hint="pip install nvidia-cuda-nvdisasm")


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
        raise CompileError(f"nvdisasm refused the cubin: {done.stderr.strip()}", hint="use an nvdisasm as new as NVRTC")
    return done.stdout


def count(listing: str) -> dict[str, int]:
    """The counts of a listing by ``nvdisasm``."""
    opcodes = Counter(opcode for opcode in _INSTRUCTION.findall(listing) if opcode != "NOP")
    found = {kind: sum(n for opcode, n in opcodes.items() if pattern.match(opcode)) for kind, pattern in _KINDS.items()}
    return {**found, "total": sum(opcodes.values())}

"""From a :class:`Variant` to machine code: NVRTC through ``cuda.core``, and a cache of cubins on disk.

The cache key is a hash of every kernel source, the generated translation unit, the options, NVRTC's version and the
architecture; the kernels include no header but their own. Files appear by atomic rename, one process per key compiles,
and a home directory that cannot be written sends the cache to the temporary directory.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import io
import os
import re
import struct
import threading
import warnings
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from collogue import kernels
from collogue.cache import cache_directory, write_whole
from collogue.errors import CompileError, PlatformError
from collogue.planning.architecture import target
from collogue.planning.variant import Variant

_IMPORTING = threading.Lock()
#: By GPU: a kernel that waits there to be loaded must not keep others from being loaded elsewhere.
_LOADING: defaultdict[int, threading.Lock] = defaultdict(threading.Lock)
#: Kernels on GPUs, by device, name and machine code.
_LOADED: dict[tuple[int, str, bytes], Any] = {}
_OPTIONS = {"std": "c++17", "fma": False, "ftz": False, "prec_div": True, "prec_sqrt": True}


def cubin(variant: Variant, architecture: str) -> bytes:
    """Machine code of ``variant``, from the cache if it is there."""
    source = variant.source()
    path = cache_directory() / f"{key(source, architecture)}.cubin"
    with contextlib.suppress(OSError):
        return path.read_bytes()
    with _one_compiler(path):
        with contextlib.suppress(OSError):
            return path.read_bytes()
        code, _ = compile_variant(variant, architecture)
        write_whole(path, code)
    return code


def compile_variant(variant: Variant, architecture: str, *, verbose: bool = False) -> tuple[bytes, str]:
    """:func:`compile_source` of ``variant``; where it would spill, with launch bounds that leave more registers to a thread.

    Fewer of its CTAs are then resident than the plan has counted on, which costs time and not progress (docs/design.md).
    """
    while True:
        code, log = compile_source(variant.source(), architecture, variant.name, verbose=verbose)
        if not code.startswith(_ELF) or not local_bytes(code) or variant.ctas_per_multiprocessor == 1:
            return code, log
        variant = replace(variant, ctas_per_multiprocessor=variant.ctas_per_multiprocessor - 1)


def build(variants: Iterable[Variant], architecture: str, *, built: Callable[[str], None] = lambda name: None) -> None:
    """Put the machine code of ``variants`` into the cache, as many at a time as there are cores: NVRTC lets go of Python's lock.

    ``built`` hears of each, in this thread. Raises the first :class:`CompileError`.
    """
    with ThreadPoolExecutor(cores()) as pool:
        work = {pool.submit(cubin, variant, architecture): variant.name for variant in dict.fromkeys(variants)}
        try:
            for done in as_completed(work):
                done.result()
                built(work.pop(done))
        finally:
            pool.shutdown(cancel_futures=True)


def cores() -> int:
    """Cores that this process may use, at most 64: how many kernels are compiled at a time."""
    affinity = getattr(os, "sched_getaffinity", None)
    return min(64, len(affinity(0)) if affinity is not None else os.cpu_count() or 1)


def compile_source(
    source: str,
    architecture: str,
    name: str,
    *,
    verbose: bool = False,
    folder: Path | None = None,
    changes: Mapping[str, bool] | None = None,
) -> tuple[bytes, str]:
    """Compile one translation unit; returns the cubin and the compiler's log (the resource report with ``verbose``).

    Where NVRTC does not know ``architecture``: for what :func:`compile_target` says, which may be PTX.

    ``folder`` of sources and ``changes``: other sources and other options than the contract's, for comparison.
    """
    nvrtc_version()  # where there is no NVRTC, this says so
    core = _cuda_core()
    log = io.StringIO()
    chosen = options(name, architecture, verbose=verbose, folder=folder, changes=changes)
    if chosen.arch.startswith("compute_"):
        return ptx(source, name, chosen), ""
    try:
        code = core.Program(source, "c++", chosen).compile("cubin", logs=log)
    except Exception as error:
        raise _refused(name, architecture, f"{error}\n{log.getvalue()}") from error
    return bytes(code.code), log.getvalue()


def ptx(source: str, name: str, chosen: Any) -> bytes:
    """PTX of one translation unit, by the :func:`options` ``chosen``. ``cuda.core`` gives it only where there is a driver."""
    from cuda.bindings import nvrtc

    # A real architecture would give machine code and no PTX.
    flags = [option.replace(b"-arch=sm_", b"-arch=compute_") for option in chosen.as_bytes("nvrtc")]
    _, program = nvrtc.nvrtcCreateProgram(source.encode(), name.encode(), 0, [], [])
    try:
        (error,) = nvrtc.nvrtcCompileProgram(program, len(flags), flags)
        if int(error) != 0:
            log = bytes(nvrtc.nvrtcGetProgramLogSize(program)[1])
            nvrtc.nvrtcGetProgramLog(program, log)
            raise _refused(name, chosen.arch, log.decode(errors="replace"))
        text = bytes(nvrtc.nvrtcGetPTXSize(program)[1])
        nvrtc.nvrtcGetPTX(program, text)
        return text
    finally:
        nvrtc.nvrtcDestroyProgram(program)


def _refused(name: str, architecture: str, why: str) -> CompileError:
    hint = "run `collogue doctor`; if NVRTC is 12.8 or later, please report this with the text above"
    return CompileError(f"NVRTC failed to compile {name} for {architecture}: {why}", hint=hint)


def options(
    name: str, architecture: str, *, verbose: bool = False, folder: Path | None = None, changes: Mapping[str, bool] | None = None
) -> Any:
    """The ``cuda.core.ProgramOptions`` that every kernel is compiled with, but for ``folder`` and ``changes``."""
    chosen: dict[str, Any] = {**_OPTIONS, **(changes or {})}
    if verbose:  # NVRTC has a cache of its own (CUDA 12.9), and what comes from it may have no report
        chosen |= {"ptxas_options": ["-v"], "no_cache": True}
    arch = compile_target(architecture)
    return _cuda_core().ProgramOptions(name=name, arch=arch, include_path=str(folder or kernels.ROOT), **chosen)


@dataclass(frozen=True)
class Resources:
    """What the assembler reports of one kernel: registers a thread, bytes in local memory, which should be none, and in shared memory."""

    registers: int
    stack: int
    spilled: int
    shared: int = 0


def resources(log: str) -> Resources:
    """Read the log of :func:`compile_source` with ``verbose``."""
    frame = re.search(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", log)
    used = re.search(r"Used (\d+) registers(?:.*?, (\d+) bytes smem)?", log)
    if frame is None or used is None:
        raise CompileError(f"the compiler gave no resource report:\n{log}", hint="compile with verbose=True")
    return Resources(int(used[1]), int(frame[1]), int(frame[2]) + int(frame[3]), int(used[2] or 0))


#: How a 64-bit little-endian ELF file begins.
_ELF = b"\x7fELF\x02\x01"
#: Of a kernel in a cubin, in its section ``.nv.info``: type and size, then its symbol and how much local memory a thread has.
_FRAME_SIZE = struct.pack("<BBH", 4, 0x11, 8)


def sections(elf: bytes) -> Iterator[tuple[str, bytes]]:
    """Name and contents of every section of a 64-bit little-endian ELF file, such as a cubin."""
    if elf[:6] != _ELF:
        raise CompileError("this is not a cubin: no 64-bit ELF file", hint="pass what jit.compile_source returns")
    (start,) = struct.unpack_from("<Q", elf, 0x28)
    step, count, names = struct.unpack_from("<HHH", elf, 0x3A)
    headers = [struct.unpack_from("<IIQQQQ", elf, start + i * step) for i in range(count)]
    base = headers[names][4]
    for name, _, _, _, offset, size in headers:
        yield elf[base + name : elf.index(b"\0", base + name)].decode(), elf[offset : offset + size]


def local_bytes(cubin: bytes) -> int:
    """Bytes of local memory that a thread has in a kernel of ``cubin``: 0 unless something spills."""
    info = next(content for name, content in sections(cubin) if name == ".nv.info")
    return max(int(struct.unpack_from("<I", info, at.end() + 4)[0]) for at in re.finditer(re.escape(_FRAME_SIZE), info))


def load(code: bytes, name: str) -> Any:
    """The kernel ``name`` of a cubin or of PTX, loaded on the current device (a ``cuda.core`` kernel). Its first launch may be captured.

    It is loaded once on each GPU and stays: to unload it would wait for the GPU, where other kernels may wait for this process.
    """
    import torch

    key = (torch.cuda.current_device(), name, code)
    with _LOADING[key[0]]:
        if key not in _LOADED:
            made = _cuda_core().ObjectCode
            kernel = (made.from_cubin if code.startswith(_ELF) else made.from_ptx)(code).get_kernel(name)
            _load_now(int(kernel.handle), key[0])
            _LOADED[key] = kernel
        return _LOADED[key]


def _load_now(kernel: int, device: int) -> None:
    """By default the driver puts a kernel on the GPU at its first launch (``CUDA_MODULE_LOADING=LAZY``), which a capture may forbid."""
    from cuda.bindings import driver

    from collogue.gpu.device import checked, on_device

    with on_device(device):
        function = checked(driver.cuKernelGetFunction(driver.CUkernel(kernel)))
        with contextlib.suppress(AttributeError, RuntimeError):  # before CUDA 12.4 there is no such function, and the one above loads
            checked(driver.cuFuncLoad(function))


def _cuda_core() -> Any:
    """``cuda.core``, imported by one thread at a time: it is not whole while it chooses its CUDA version."""
    with _IMPORTING:
        import cuda.core
    return cuda.core


@functools.cache
def nvrtc_version() -> tuple[int, int]:
    """NVRTC's version. Raises :class:`PlatformError` where it cannot be loaded."""
    try:
        from cuda.bindings import nvrtc

        error, major, minor = nvrtc.nvrtcVersion()
    except (ImportError, RuntimeError, OSError) as cause:
        raise PlatformError(f"NVRTC could not be loaded: {cause}", hint="pip install nvidia-cuda-nvrtc") from cause
    if int(error) != 0:
        raise PlatformError(f"NVRTC does not answer: {error}", hint="pip install nvidia-cuda-nvrtc")
    return int(major), int(minor)


@functools.cache
def supported() -> tuple[int, ...]:
    """The architectures that NVRTC compiles for, as ``90`` for sm_90."""
    from cuda.bindings import nvrtc

    error, *rest = nvrtc.nvrtcGetSupportedArchs()
    if int(error) != 0:
        raise PlatformError(f"NVRTC does not answer: {error}", hint="pip install nvidia-cuda-nvrtc")
    return tuple(sorted(map(int, rest[-1])))


@functools.cache
def compile_target(architecture: str) -> str:
    """What this NVRTC compiles for ``architecture``, with one warning if it does not know it (docs/machines.md)."""
    found = target(architecture, supported())
    if found != architecture:
        version = ".".join(map(str, nvrtc_version()))
        message = f"NVRTC {version} does not know {architecture}: kernels are compiled as {found}, without E2M1 conversions in hardware"
        warnings.warn(message, RuntimeWarning, stacklevel=2)
    return found


@functools.cache
def sources_hash() -> str:
    """Of every kernel source."""
    digest = hashlib.sha256()
    for name, text in kernels.sources().items():
        digest.update(name.encode() + b"\0" + text.encode() + b"\0")
    return digest.hexdigest()


def key(source: str, architecture: str) -> str:
    """The same where a kernel and its compiler are the same: sources, options, NVRTC, architecture."""
    parts = (sources_hash(), source, repr(sorted(_OPTIONS.items())), repr(nvrtc_version()), architecture)
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:40]


@contextlib.contextmanager
def _one_compiler(path: Path) -> Iterator[None]:
    """Hold this key's lock: the processes of one host compile a kernel once."""
    try:
        import fcntl
    except ImportError:  # Windows: compiling twice is harmless, the rename is atomic
        yield
        return
    with open(path.with_suffix(".lock"), "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield

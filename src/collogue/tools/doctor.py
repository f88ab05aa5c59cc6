"""``collogue doctor``: what this machine has, what Collogue will use of it, and what to do about what is missing.

Every probe is guarded: on a machine without a GPU, a driver or the CUDA packages, the report says so and goes on.
"""

from __future__ import annotations

import ctypes
import os
import platform
import shutil
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

from collogue.tools import wiring
from collogue.tools.record import package_version

Status = Literal["ok", "warn", "missing", "unneeded"]

MIN_PYTHON = (3, 11)
MIN_TORCH = (2, 11)
MIN_CUDA_CORE = (1, 2)
MIN_SHM_BYTES = 1 << 30
_DRIVER = Path("/proc/driver/nvidia/version")

_SYS_PIDFD_OPEN, _SYS_PIDFD_GETFD = 434, 438
_PTRACE_HINT = "start the container with --cap-add=SYS_PTRACE (Docker) or capabilities.add: [SYS_PTRACE] (Kubernetes)"
_IPC_HINT = "start the container with --ipc=host, or with --shm-size=8g"


@dataclass(frozen=True)
class Finding:
    """One line of the report. ``required``: without it Collogue cannot run here at all, or not on the GPUs that are here."""

    name: str
    status: Status
    detail: str
    hint: str = ""
    required: bool = False


@dataclass(frozen=True)
class Examination:
    """The whole report. ``usable``: nothing that is required is missing. ``wiring``: of the GPUs, where there are any."""

    findings: list[Finding]
    wiring: wiring.Wiring | None = None

    @property
    def usable(self) -> bool:
        return not any(f.required and f.status == "missing" for f in self.findings)

    @property
    def gpus(self) -> bool:
        """Whether torch sees a GPU."""
        return not any(f.name == "GPUs" and f.status != "ok" for f in self.findings)

    def as_json(self) -> dict[str, Any]:
        drawn = None if self.wiring is None else self.wiring.as_json()
        return {"usable": self.usable, "findings": [asdict(f) for f in self.findings], "topology": drawn}


def examine(*, started: Callable[[str], None] = lambda name: None) -> Examination:
    """Run every probe. ``started`` hears the name of each before it runs. The slow one (ranks on two GPUs) takes seconds."""
    findings: list[Finding] = []
    for name, probe in PROBES.items():
        started(name)
        try:
            findings += probe()
        except Exception as error:  # a probe must not end the report
            findings.append(_failed(name, error))
    drawn = None
    try:
        drawn = wiring.here()
    except Exception as error:
        findings.append(_failed("topology", error))
    return Examination(findings if _is_for_gpus() else list(map(_unneeded, findings)), drawn)


def _is_for_gpus() -> bool:
    """Whether there are GPUs, or signs of GPUs that torch does not see."""
    return bool(_gpu_count() or _DRIVER.exists() or shutil.which("nvidia-smi"))


def _unneeded(finding: Finding) -> Finding:
    """On a machine without GPUs what only they need is not missing."""
    return finding if finding.required or finding.status != "missing" else replace(finding, status="unneeded")


def _failed(name: str, error: Exception) -> Finding:
    return Finding(name, "warn", f"the probe failed: {type(error).__name__}: {error}".splitlines()[0], "please report this")


def _at_least(found: str, wanted: tuple[int, ...]) -> bool:
    numbers = []
    for part in found.split("+")[0].split(".")[: len(wanted)]:
        digits = "".join(c for c in part if c.isdigit())
        numbers.append(int(digits or 0))
    return tuple(numbers) >= wanted


def _dotted(numbers: Iterable[int]) -> str:
    return ".".join(map(str, numbers))


def _gpu_count() -> int:
    import torch

    return torch.cuda.device_count() if torch.cuda.is_available() else 0


# Probes, in the order of the report


def _python() -> Iterator[Finding]:
    ok = sys.version_info >= MIN_PYTHON
    yield Finding(
        "Python",
        "ok" if ok else "missing",
        f"{platform.python_version()} ({sys.executable})",
        "" if ok else f"Collogue needs Python {_dotted(MIN_PYTHON)} or later",
        required=True,
    )


def _torch() -> Iterator[Finding]:
    try:
        import torch
    except ImportError as error:
        yield Finding("torch", "missing", str(error), f"pip install 'torch>={_dotted(MIN_TORCH)}'", required=True)
        return
    ok = _at_least(torch.__version__, MIN_TORCH)
    build = f"built for CUDA {torch.version.cuda}" if torch.version.cuda else "CPU build"
    hint = "" if ok else f"pip install 'torch>={_dotted(MIN_TORCH)}'"
    yield Finding("torch", "ok" if ok else "missing", f"{torch.__version__}, {build}", hint, required=True)
    if not torch.version.cuda and shutil.which("nvidia-smi"):
        yield Finding("torch for CUDA", "missing", "there is an NVIDIA driver, but torch is a CPU build", "install a CUDA build of torch")


def _cuda_packages() -> Iterator[Finding]:
    needed = _gpu_count() > 0
    for package, module in (("cuda-core", "cuda.core"), ("cuda-bindings", "cuda.bindings")):
        found = package_version(package)
        good = found is not None and (package != "cuda-core" or _at_least(found, MIN_CUDA_CORE))
        if good:
            try:
                __import__(module)
            except Exception as error:  # an installed package that cannot be loaded
                found, good = f"{found}, but it cannot be imported: {error}", False
        wanted = f"{package}>={_dotted(MIN_CUDA_CORE)}" if package == "cuda-core" else package
        why = "" if needed else " (only needed where there are GPUs)"
        yield Finding(
            package, "ok" if good else "missing", found or "not installed" + why, "" if good else f"pip install '{wanted}'", needed
        )


def _nvrtc() -> Iterator[Finding]:
    needed = _gpu_count() > 0
    try:
        from cuda.pathfinder import load_nvidia_dynamic_lib

        from collogue.gpu.jit import nvrtc_version

        detail = f"{_dotted(nvrtc_version())} ({load_nvidia_dynamic_lib('nvrtc').abs_path})"
        yield Finding("NVRTC", "ok", detail, required=needed)
    except Exception as error:  # not installed, or not loadable: each library says it in its own way
        why = "" if needed else " (only needed where there are GPUs)"
        yield Finding(
            "NVRTC",
            "missing",
            f"{error}".splitlines()[0].partition(": No such file")[0] + why,
            "pip install nvidia-cuda-nvrtc",
            required=needed,
        )


def _headers() -> Iterator[Finding]:
    try:
        from cuda.pathfinder import find_nvidia_header_directory

        found = find_nvidia_header_directory("cudart")
    except Exception:  # no pathfinder, or a version without this function
        found = None
    if found:
        yield Finding("CUDA headers", "ok", f"{found} (used by tests only)")
    else:
        yield Finding("CUDA headers", "warn", "not found; used by tests only", "pip install nvidia-cuda-runtime")


def _driver() -> Iterator[Finding]:
    module = _DRIVER.read_text().splitlines()[0].split(":", 1)[-1].strip() if _DRIVER.exists() else ""
    if _gpu_count():
        yield Finding("driver", "ok", module or "loaded", required=True)
    elif module or shutil.which("nvidia-smi"):
        hint = "in a container: start it with --gpus=all; else see nvidia-smi, and CUDA_VISIBLE_DEVICES"
        yield Finding("driver", "missing", f"{module or 'nvidia-smi is there'}, but torch sees no GPU", hint)
    else:
        yield Finding("driver", "missing", "no NVIDIA driver", "CPU groups work without one")


def _gpus() -> Iterator[Finding]:
    import torch

    if not _gpu_count():
        yield Finding("GPUs", "missing", "none", "CPU groups work, through the reference")
    for i in range(_gpu_count()):
        p = torch.cuda.get_device_properties(i)
        status, told, hint = _code((p.major, p.minor))
        text = f"{p.name}, sm_{p.major}{p.minor}, {p.total_memory / 2**30:.0f} GiB: {told}"
        yield Finding(f"GPU {i}", status, text, hint, required=status == "missing")


def _code(capability: tuple[int, int]) -> tuple[Status, str, str]:
    """Status, words and hint of the code that such a GPU gets: measured, compiled, or another architecture's."""
    from collogue.gpu import jit
    from collogue.planning.architecture import ARCHITECTURES, architecture_of, nearest

    if capability < (8, 0):
        return "missing", "too old", "Collogue needs compute capability 8.0 or later"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)
        name = architecture_of(capability)
        try:
            compiled = jit.compile_target(name)
        except Exception:  # there is no NVRTC, as another line of the report says
            compiled = name
    if name not in ARCHITECTURES:
        told = f"falls back to code of the family of {nearest(capability).name} ({compiled}), which was never tried"
        return "warn", told, "look for a newer version of Collogue"
    one = ARCHITECTURES[name]
    ways = "hardware" if one.has_e2m1 and compiled == name else "software"
    offers = f"clusters, PDL, E2M1 in {ways}" if one.has_clusters else "one CTA per row, no PDL"
    if compiled != name:
        return "warn", f"{offers}; falls back to {compiled}: NVRTC does not know {name}", "install a newer NVRTC (docs/machines.md)"
    known = {"measured": "measured on such a GPU", "compiled": "compiled in the tests, not measured"}
    return "ok", f"{offers}; {known[one.status]}", ""


def _peers() -> Iterator[Finding]:
    import torch

    n = _gpu_count()
    if n < 2:
        return
    refused = [f"{i}-{j}" for i in range(n) for j in range(n) if i != j and not torch.cuda.can_device_access_peer(i, j)]
    if refused:
        hint = "groups with such a pair take the host path, which is slower; virtual machines may hide peer access"
        yield Finding("peer access", "missing", f"not between {', '.join(refused)}", hint)
    else:
        yield Finding("peer access", "ok", f"all {n} GPUs reach each other")


def _nvlink() -> Iterator[Finding]:
    if _gpu_count() < 2:
        return
    tool = shutil.which("nvidia-smi")
    if tool is None:
        yield Finding("NVLink", "warn", "nvidia-smi is not there to ask", "install nvidia-smi to see the links")
        return
    text = subprocess.run([tool, "nvlink", "--status", "-i", "0"], capture_output=True, text=True, timeout=30, check=False).stdout
    speeds = [line.split(":", 1)[1].strip() for line in text.splitlines() if line.strip().startswith("Link") and "GB/s" in line]
    if speeds:
        yield Finding("NVLink", "ok", f"{len(speeds)} links of {speeds[0]} at GPU 0")
    else:
        yield Finding("NVLink", "warn", "no active link at GPU 0", "calls go over PCIe: right, but slower")


def _symmetric_memory() -> Iterator[Finding]:
    if _gpu_count() < 2:
        yield Finding(
            "symmetric memory",
            "warn" if _gpu_count() else "missing",
            "not tried: it takes two GPUs",
            "virtual ranks work on one GPU" if _gpu_count() else "only GPU groups need it",
        )
        return
    from collogue.testing.processes import RanksFailed, run_processes

    try:
        run_processes(2, probe_symmetric_memory, device="cuda", silence=60)
        yield Finding("symmetric memory", "ok", "two processes map each other's memory", required=True)
    except RanksFailed as error:
        lines = [line for line in error.message.splitlines() if "Error" in line] or error.message.splitlines()
        yield Finding("symmetric memory", "missing", lines[-1].strip(), f"{_PTRACE_HINT}; {_IPC_HINT}", required=True)


def probe_symmetric_memory(group: Any, tell: Callable[[str], None]) -> bool:
    """One rank's part of the probe: map a peer's memory, write it, and see the peer's word in one's own."""
    import torch

    from collogue.group import TorchGroup

    ranks = TorchGroup(group)
    tell("mapping memory")
    buffer = ranks.symmetric(4096)
    ranks.barrier()
    tell("writing to the peer")
    peer = 1 - ranks.rank
    theirs = buffer.keep.get_buffer(peer, (1,), torch.int32)
    theirs.fill_(ranks.rank + 1)
    torch.cuda.synchronize()
    ranks.barrier()
    if int(buffer.local[:4].view(torch.int32)) != peer + 1:
        raise RuntimeError("what the peer wrote did not arrive")
    return True


def _container() -> Iterator[Finding]:
    if not sys.platform.startswith("linux"):
        yield Finding("system", "warn", f"{platform.system()}: CPU groups only", "GPU groups need Linux")
        return
    error = pidfd_getfd_error()
    if error is None:
        yield Finding("pidfd_getfd", "ok", "processes may share file descriptors")
    else:
        yield Finding("pidfd_getfd", "warn", f"{os.strerror(error)}; symmetric memory may need it", _PTRACE_HINT)
    shm = Path("/dev/shm")
    if not shm.is_dir():
        yield Finding("/dev/shm", "warn", "not there; NCCL and torch.multiprocessing use it", _IPC_HINT)
        return
    size = shutil.disk_usage(shm).total
    small = size < MIN_SHM_BYTES
    yield Finding("/dev/shm", "warn" if small else "ok", f"{size / 2**30:.1f} GiB", _IPC_HINT if small else "")


def pidfd_getfd_error() -> int | None:
    """``errno`` of taking a file descriptor from a child process, or ``None`` if that works."""
    libc = ctypes.CDLL(None, use_errno=True)
    child = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    opened: list[int] = []
    try:
        for number, first, second in ((_SYS_PIDFD_OPEN, child.pid, 0), (_SYS_PIDFD_GETFD, None, 0)):
            result = libc.syscall(number, opened[-1] if first is None else first, second, 0)
            if result < 0:
                return ctypes.get_errno()
            opened.append(result)
        return None
    finally:
        for descriptor in opened:
            os.close(descriptor)
        child.kill()
        child.wait()
        if child.stdin is not None:
            child.stdin.close()


def _cache() -> Iterator[Finding]:
    from collogue.errors import PlatformError

    try:
        from collogue.cache import cache_directory

        path = cache_directory()
        kernels = sum(1 for _ in path.glob("*.cubin"))
        yield Finding("kernel cache", "ok", f"{path} (writable, {kernels} kernels)")
    except PlatformError as error:
        yield Finding("kernel cache", "missing", error.message, error.hint, required=_gpu_count() > 0)


def _summary() -> Iterator[Finding]:
    n = _gpu_count()
    yield Finding("CPU groups", "ok", "gloo, any world size from 1 to 64, through the reference")
    if n >= 2:
        yield Finding("GPU groups", "ok", f"kernels, one process per GPU, world size up to {min(n, 8)}; more as virtual ranks")
    elif n == 1:
        yield Finding("GPU groups", "warn", "kernels with virtual ranks only", "a group of processes takes two GPUs or more")
    else:
        yield Finding("GPU groups", "missing", "there is no GPU", "`collogue check --device cpu` and `collogue demo` work here")


PROBES: dict[str, Callable[[], Iterable[Finding]]] = {
    "Python": _python,
    "torch": _torch,
    "CUDA packages": _cuda_packages,
    "NVRTC": _nvrtc,
    "CUDA headers": _headers,
    "driver": _driver,
    "GPUs": _gpus,
    "peer access": _peers,
    "NVLink": _nvlink,
    "symmetric memory": _symmetric_memory,
    "container": _container,
    "kernel cache": _cache,
    "what Collogue will use": _summary,
}

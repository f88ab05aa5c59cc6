"""``collogue doctor`` on this machine, and on machines that it must tell apart."""

import builtins
import errno
import io
import os
import shutil
import subprocess
import types
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

from collogue.errors import PlatformError
from collogue.gpu import jit
from collogue.tools import doctor, doctor_engines
from collogue.tools.cli import _show_findings
from collogue.tools.doctor import Examination, Finding, examine


def by_name(findings: Iterable[Finding]) -> dict[str, Finding]:
    return {f.name: f for f in findings}


def with_gpus(monkeypatch: pytest.MonkeyPatch, count: int, *, major: int = 9, peers: bool = True) -> None:
    properties = types.SimpleNamespace(name="NVIDIA Test", major=major, minor=0, total_memory=80 << 30)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: count > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda i: properties)
    monkeypatch.setattr(torch.cuda, "can_device_access_peer", lambda i, j: peers or i + j != 3)


def test_this_machine_is_usable_and_every_shortcoming_has_a_hint() -> None:
    started: list[str] = []
    report = examine(started=started.append)
    assert report.usable
    assert started == list(doctor.PROBES)
    found = by_name(report.findings)
    assert found["Python"].status == found["torch"].status == found["CPU groups"].status == "ok"
    assert torch.__version__ in found["torch"].detail
    assert all(f.hint for f in report.findings if f.status != "ok")
    assert not any("probe failed" in f.detail for f in report.findings)
    assert report.as_json()["usable"] is True
    assert len(report.as_json()["findings"]) == len(report.findings)


def test_a_probe_that_fails_does_not_end_the_report(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken() -> Iterable[Finding]:
        raise OSError("no such thing\nsecond line")

    monkeypatch.setattr(doctor, "PROBES", {"broken": broken, "Python": doctor._python})
    first, second = examine().findings
    assert (first.name, first.status, first.detail) == ("broken", "warn", "the probe failed: OSError: no such thing")
    assert second.name == "Python"


def test_without_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    with_gpus(monkeypatch, 0)
    findings = [f for probe in (doctor._gpus, doctor._peers, doctor._nvlink, doctor._symmetric_memory, doctor._summary) for f in probe()]
    found = by_name(findings)
    assert found["GPUs"].status == "missing"
    assert found["symmetric memory"].status == "missing"
    assert Examination(findings).usable


def test_without_the_cuda_packages(monkeypatch: pytest.MonkeyPatch) -> None:
    """They are needed only where there are GPUs."""
    real = builtins.__import__

    def without_cuda(name: str, *args: Any, **kwargs: Any) -> Any:
        if name.split(".")[0] == "cuda":
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(doctor, "package_version", lambda package: None)
    monkeypatch.setattr(builtins, "__import__", without_cuda)
    for gpus in (0, 2):
        with_gpus(monkeypatch, gpus)
        findings = [f for probe in (doctor._cuda_packages, doctor._nvrtc, doctor._headers) for f in probe()]
        found = by_name(findings)
        assert found["cuda-core"].status == found["cuda-bindings"].status == found["NVRTC"].status == "missing"
        assert found["cuda-core"].hint == "pip install 'cuda-core>=1.2'"
        assert found["NVRTC"].hint == "pip install nvidia-cuda-nvrtc"
        assert found["CUDA headers"].status == "warn"
        assert Examination(findings).usable == (gpus == 0)


def test_a_package_that_is_too_old(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "package_version", lambda package: "1.1.9")
    assert by_name(doctor._cuda_packages())["cuda-core"].status == "missing"
    monkeypatch.setattr(torch, "__version__", "2.10.1+cu126")
    (finding,) = [f for f in doctor._torch() if f.name == "torch"]
    assert finding.status == "missing"
    assert finding.required


@pytest.mark.parametrize(
    ("major", "status", "told"),
    [
        (7, "missing", "too old"),
        (8, "ok", "no PDL; compiled in the tests, not measured"),
        (9, "ok", "E2M1 in software; measured on such a GPU"),
        (10, "ok", "E2M1 in hardware; compiled in the tests, not measured"),
        (14, "warn", "falls back to code of the family of sm_121a (compute_121), which was never tried"),
    ],
)
def test_gpus_by_architecture(monkeypatch: pytest.MonkeyPatch, major: int, status: str, told: str) -> None:
    with_gpus(monkeypatch, 1, major=major)
    (finding,) = doctor._gpus()
    assert finding.status == status
    assert told in finding.detail
    assert "sm_" in finding.detail
    assert "80 GiB" in finding.detail


def test_a_gpu_that_nvrtc_does_not_know_falls_back(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jit, "compile_target", lambda name: "sm_100")
    with_gpus(monkeypatch, 1, major=10)
    (finding,) = doctor._gpus()
    assert finding.status == "warn"
    assert "E2M1 in software; falls back to sm_100: NVRTC does not know sm_100a" in finding.detail
    assert "newer NVRTC" in finding.hint


def test_peer_access_names_the_pairs(monkeypatch: pytest.MonkeyPatch) -> None:
    with_gpus(monkeypatch, 3, peers=False)
    (finding,) = doctor._peers()
    assert finding.status == "missing"
    assert "1-2, 2-1" in finding.detail
    with_gpus(monkeypatch, 3)
    (finding,) = doctor._peers()
    assert finding.status == "ok"


@pytest.mark.parametrize(
    ("lines", "status"),
    [("GPU 0: X\n\t Link 0: 26.562 GB/s\n\t Link 1: 26.562 GB/s\n", "ok"), ("GPU 0: X\n\t Link 0: <inactive>\n", "warn")],
)
def test_nvlink_reads_the_links(monkeypatch: pytest.MonkeyPatch, lines: str, status: str) -> None:
    with_gpus(monkeypatch, 2)
    monkeypatch.setattr(shutil, "which", lambda name: name)
    monkeypatch.setattr(subprocess, "run", lambda *args, **kwargs: types.SimpleNamespace(stdout=lines))
    (finding,) = doctor._nvlink()
    assert finding.status == status
    assert finding.detail == ("2 links of 26.562 GB/s at GPU 0" if status == "ok" else "no active link at GPU 0")


def test_refused_symmetric_memory_says_which_permission(monkeypatch: pytest.MonkeyPatch) -> None:
    from collogue.testing import processes

    def refused(*args: Any, **kwargs: Any) -> None:
        trace = "Traceback\ncollogue.errors.PlatformError: symmetric memory was refused: Operation not permitted\nhint: x"
        raise processes.RanksFailed(f"rank 0 raised\n{trace}\nlast stages: rank 0: mapping memory", hint="y")

    with_gpus(monkeypatch, 2)
    monkeypatch.setattr(processes, "run_processes", refused)
    (finding,) = doctor._symmetric_memory()
    assert finding.status == "missing"
    assert finding.required
    assert finding.detail == "collogue.errors.PlatformError: symmetric memory was refused: Operation not permitted"
    assert "SYS_PTRACE" in finding.hint
    assert "--ipc=host" in finding.hint


@pytest.mark.skipif(not Path("/proc/self").exists(), reason="Linux only")
def test_container_limits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "pidfd_getfd_error", lambda: errno.EPERM)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: types.SimpleNamespace(total=64 << 20))
    found = by_name(doctor._container())
    assert found["pidfd_getfd"].status == "warn"
    assert os.strerror(errno.EPERM) in found["pidfd_getfd"].detail
    assert "SYS_PTRACE" in found["pidfd_getfd"].hint
    assert found["/dev/shm"].status == "warn"
    assert "--ipc=host" in found["/dev/shm"].hint


@pytest.mark.skipif(not Path("/proc/self").exists(), reason="Linux only")
def test_pidfd_getfd_leaves_no_descriptor_and_no_child() -> None:
    before = set(os.listdir("/proc/self/fd"))
    assert doctor.pidfd_getfd_error() in (None, errno.EPERM, errno.ENOSYS, errno.EACCES)
    assert set(os.listdir("/proc/self/fd")) == before


def test_no_place_for_the_kernel_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    def nowhere() -> Path:
        raise PlatformError("no directory for compiled kernels can be written", hint="set COLLOGUE_CACHE_DIR")

    monkeypatch.setattr("collogue.cache.cache_directory", nowhere)
    for gpus in (0, 1):
        with_gpus(monkeypatch, gpus)
        (finding,) = doctor._cache()
        assert (finding.status, finding.hint, finding.required) == ("missing", "set COLLOGUE_CACHE_DIR", gpus > 0)


def test_the_report_fits_80_columns() -> None:
    findings = [Finding("a" * 16, "missing", "word " * 40, "hint " * 30), Finding("b", "ok", "/a/path/without/spaces" * 8)]
    text = io.StringIO()
    _show_findings(Console(file=text, width=80), Examination(findings))
    lines = text.getvalue().splitlines()
    assert max(map(len, lines)) <= 80
    assert "hint:" in text.getvalue()
    assert lines[-1] == "Collogue can work here."


def _engine(monkeypatch: pytest.MonkeyPatch, *, version: str = "0.32.0", seen: bool = True) -> None:
    """An environment that holds vLLM, of which nothing can be imported."""
    monkeypatch.setattr(doctor_engines, "package_version", lambda name: version if name == "vllm" else None)
    monkeypatch.setattr(doctor_engines, "entry_points", lambda group: [types.SimpleNamespace(name="collogue")] if seen else [])
    for name in ("VLLM_PLUGINS", "COLLOGUE_VLLM"):
        monkeypatch.delenv(name, raising=False)


def test_an_engine_that_is_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor_engines, "package_version", lambda name: None)
    for engine in ("vllm", "sglang"):
        (only,) = doctor_engines.examine_engine(engine)  # type: ignore[arg-type]
        assert (only.name, only.status) == (engine, "missing")


def test_an_engine_whose_hooks_have_moved_is_told_what_moved(monkeypatch: pytest.MonkeyPatch) -> None:
    _engine(monkeypatch, version="9.9")
    monkeypatch.setenv("COLLOGUE_VLLM", "1")
    found = by_name(doctor_engines.examine_engine("vllm"))
    assert found["vllm"].status == "warn"
    assert found["vllm plugin"].status == "ok"
    for way in ("vllm compile", "vllm eager"):
        assert found[way].status == "missing"
        assert "vllm" in found[way].detail
        assert "step aside" in found[way].hint


def test_what_keeps_the_plugin_out_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    _engine(monkeypatch)
    assert "COLLOGUE_VLLM=1" in by_name(doctor_engines.examine_engine("vllm"))["vllm plugin"].hint
    monkeypatch.setenv("VLLM_PLUGINS", "other")
    assert "VLLM_PLUGINS=other" in by_name(doctor_engines.examine_engine("vllm"))["vllm plugin"].detail
    _engine(monkeypatch, seen=False)
    assert "entry point" in by_name(doctor_engines.examine_engine("vllm"))["vllm plugin"].detail


@pytest.mark.parametrize("signs", [False, True])
def test_what_only_gpus_need_is_not_missing_without_signs_of_one(signs: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    with_gpus(monkeypatch, 0)
    monkeypatch.setattr(doctor.shutil, "which", lambda name: "nvidia-smi" if signs else None)
    monkeypatch.setattr(doctor, "_DRIVER", Path("nowhere"))
    monkeypatch.setattr(doctor, "PROBES", {name: doctor.PROBES[name] for name in ("Python", "driver", "GPUs", "symmetric memory")})
    found = by_name(examine().findings)
    assert {found[name].status for name in ("driver", "GPUs", "symmetric memory")} == {"missing" if signs else "unneeded"}
    assert found["Python"].status == "ok"
    assert not examine().gpus

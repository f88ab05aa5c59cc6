"""Compiling and the cache of machine code: what its key holds, who writes it and where."""

from __future__ import annotations

import multiprocessing
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from collogue import kernels
from collogue.cache import cache_directory
from collogue.calls.request import Request
from collogue.contract.quant import parse
from collogue.contract.spec import Wanted
from collogue.errors import CompileError, PlatformError
from collogue.gpu import jit
from collogue.planning.plan import make_kernels, make_plan
from collogue.planning.topology import Overrides, Topology
from collogue.planning.variant import Variant
from collogue.testing.covering import variant_of

pytestmark = pytest.mark.slow

ELF = b"\x7fELF"
#: A one-shot kernel of one row, with a residual and a norm.
ONE_SHOT: dict[str, Any] = {"format": "none", "world": 2, "hidden_size": 7168, "dtype": torch.bfloat16, "kernel": "one_shot", "norm": True}
ONE_SHOT |= {"architecture": "sm_90a", "keep_norm": False, "wide_weight": False, "residual": True, "tokens": 1}


@pytest.fixture
def variant() -> Variant:
    """Small and quick to compile."""
    choice = {"format": "none", "world": 1, "hidden_size": 24, "architecture": "sm_90a", "dtype": torch.float32, "kernel": "local"}
    return variant_of({**choice, "norm": False, "keep_norm": False, "wide_weight": False, "residual": True, "tokens": 1})


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """An empty cache directory of this test's own."""
    monkeypatch.setenv("COLLOGUE_CACHE_DIR", str(tmp_path / "cache"))
    cache_directory.cache_clear()
    yield tmp_path / "cache"
    cache_directory.cache_clear()


@pytest.fixture
def compilations(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The name of every kernel that is compiled, not read."""
    names: list[str] = []
    compile_source = jit.compile_source

    def counted(source: str, architecture: str, name: str, *, verbose: bool = False) -> tuple[bytes, str]:
        names.append(name)
        return compile_source(source, architecture, name, verbose=verbose)

    monkeypatch.setattr(jit, "compile_source", counted)
    return names


# Compiling


def test_a_cubin_is_compiled_once_and_then_read(cache: Path, compilations: list[str], variant: Variant) -> None:
    first = jit.cubin(variant, "sm_90a")
    assert first.startswith(ELF)
    assert jit.cubin(variant, "sm_90a") == first
    assert compilations == [variant.name]
    assert [f.read_bytes() for f in cache.glob("*.cubin")] == [first]


def test_compile_error_says_what_nvrtc_said() -> None:
    with pytest.raises(CompileError) as raised:
        jit.compile_source("this is not C++", "sm_90a", "broken")
    text = str(raised.value)
    assert "NVRTC failed to compile broken for sm_90a" in text
    assert "error" in raised.value.message.split("\n", 1)[1]
    assert text.splitlines()[-1].startswith("hint: run `collogue doctor`")


def test_a_kernel_that_does_not_compile_leaves_nothing_behind(
    cache: Path, monkeypatch: pytest.MonkeyPatch, compilations: list[str], variant: Variant
) -> None:
    monkeypatch.setattr(Variant, "source", lambda self: "#error on purpose\n")
    for _ in range(2):
        with pytest.raises(CompileError, match="on purpose"):
            jit.cubin(variant, "sm_90a")
    assert len(compilations) == 2
    assert not list(cache.glob("*.cubin"))


def test_a_compiler_older_than_the_gpu_makes_machine_code_of_its_family(variant: Variant, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jit, "supported", lambda: (80, 90, 100, 120))
    jit.compile_target.cache_clear()
    try:
        with pytest.warns(RuntimeWarning, match="does not know sm_103a: kernels are compiled as sm_100, without E2M1"):
            code, _ = jit.compile_variant(variant, "sm_103a")
        assert code.startswith(ELF)
        assert jit.compile_target("sm_90a") == "sm_90a"
    finally:
        jit.compile_target.cache_clear()


def test_a_gpu_newer_than_the_compiler_gets_ptx(cache: Path, variant: Variant, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jit, "supported", lambda: (80, 90, 100, 120))
    jit.compile_target.cache_clear()
    try:
        with pytest.warns(RuntimeWarning, match="does not know sm_130: kernels are compiled as compute_120"):
            code = jit.cubin(variant, "sm_130")
        assert jit.cubin(variant, "sm_130") == code
        with pytest.raises(CompileError, match=r"NVRTC failed to compile broken for compute_120: .*error"):
            jit.compile_source("this is not C++", "sm_130", "broken")
    finally:
        jit.compile_target.cache_clear()
    assert b".target sm_120\n" in code
    assert variant.name.encode() in code
    loaded: list[str] = []

    def maker(kind: str) -> Any:
        return lambda given: loaded.append(kind) or SimpleNamespace(get_kernel=lambda name: SimpleNamespace(handle=0))

    made = SimpleNamespace(from_cubin=maker("cubin"), from_ptx=maker("ptx"))
    monkeypatch.setattr(jit, "_cuda_core", lambda: SimpleNamespace(ObjectCode=made))
    monkeypatch.setattr(jit, "_load_now", lambda kernel, device: None)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(jit, "_LOADED", {})
    jit.load(code, variant.name)
    jit.load(ELF + b"\x02\x01", variant.name)
    assert loaded == ["ptx", "cubin"]


def test_the_resource_report_is_read() -> None:
    log = (
        "ptxas info    : Function properties for k\n"
        "ptxas         .     128 bytes stack frame, 480 bytes spill stores, 432 bytes spill loads\n"
        "ptxas info    : Used 96 registers, used 1 barriers, 1072 bytes smem\n"
    )
    assert jit.resources(log) == jit.Resources(registers=96, stack=128, spilled=912, shared=1072)
    assert jit.resources(log.replace(", 1072 bytes smem", "")).shared == 0
    with pytest.raises(CompileError, match="no resource report"):
        jit.resources("")


def test_a_spilling_kernel_is_seen() -> None:
    """The report of a kernel that cannot but spill: the covering set's test can fail."""
    loads = "".join(f"float a{i} = p[{i} * n];\n" for i in range(96))
    stores = "".join(f"q[{i}] = a{i};\n" for i in range(96))
    body = f"{loads}__syncthreads();\n{stores}"
    source = f'extern "C" __global__ void __launch_bounds__(1024, 2) k(const float* p, float* q, int n) {{\n{body}}}\n'
    _, log = jit.compile_source(source, "sm_90a", "k", verbose=True)
    assert jit.resources(log).spilled > 0


# The key


def test_the_key_holds_sources_options_version_and_architecture(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    keys = [jit.key("source", "sm_90a")]
    keys += [jit.key("other source", "sm_90a"), jit.key("source", "sm_100a")]
    with monkeypatch.context() as patch:
        patch.setattr(jit, "nvrtc_version", lambda: (99, 0))
        keys.append(jit.key("source", "sm_90a"))
    with monkeypatch.context() as patch:
        patch.setitem(jit._OPTIONS, "fma", True)
        keys.append(jit.key("source", "sm_90a"))
    try:
        for name, text in kernels.sources().items():
            (tmp_path / name).parent.mkdir(exist_ok=True)
            (tmp_path / name).write_text(text)
        with monkeypatch.context() as patch:
            patch.setattr(kernels, "ROOT", tmp_path)
            jit.sources_hash.cache_clear()
            assert jit.key("source", "sm_90a") == keys[0]  # where the sources lie does not matter
            for name in ("row.cuh", "formats/nvfp4.cuh"):
                with open(tmp_path / name, "a") as file:
                    file.write("// changed\n")
                jit.sources_hash.cache_clear()
                keys.append(jit.key("source", "sm_90a"))
    finally:
        jit.sources_hash.cache_clear()
    assert len(set(keys)) == len(keys) == 7
    assert jit.key("source", "sm_90a") == keys[0]


def test_kernels_include_no_header_but_their_own() -> None:
    """No other header is part of the key."""
    sources = kernels.sources()
    for name, text in sources.items():
        for line in text.splitlines():
            if line.lstrip().startswith("#include"):
                assert line.split('"')[1] in sources, f"{name}: {line}"


# Files


def test_files_appear_whole(cache: Path, monkeypatch: pytest.MonkeyPatch, variant: Variant) -> None:
    """While it is written, a kernel has another name; a reader sees all of it or nothing."""
    seen: list[tuple[list[bytes], list[Path]]] = []
    replace = os.replace

    def watched(source: str, target: Path) -> None:
        seen.append(([Path(source).read_bytes()], list(cache.glob("*.cubin"))))
        replace(source, target)

    monkeypatch.setattr(os, "replace", watched)
    code = jit.cubin(variant, "sm_90a")
    assert seen == [([code], [])]
    assert [f.suffix for f in sorted(cache.iterdir())] == [".cubin", ".lock"]


def _compile_and_tell(directory: str, inbox: multiprocessing.Queue, variant: Variant) -> None:  # type: ignore[type-arg]
    os.environ["COLLOGUE_CACHE_DIR"] = directory
    compile_source = jit.compile_source

    def told(*args: str, **options: bool) -> tuple[bytes, str]:
        inbox.put("compiled")
        return compile_source(*args, **options)

    jit.compile_source = told  # type: ignore[assignment]
    inbox.put(len(jit.cubin(variant, "sm_90a")))


def test_two_processes_compile_a_kernel_once(cache: Path, variant: Variant) -> None:
    context = multiprocessing.get_context("fork")
    inbox = context.Queue()
    workers = [context.Process(target=_compile_and_tell, args=(str(cache), inbox, variant)) for _ in range(2)]
    for worker in workers:
        worker.start()
    told = [inbox.get(timeout=60) for _ in range(3)]
    for worker in workers:
        worker.join(timeout=60)
    assert inbox.empty()
    assert told.count("compiled") == 1
    sizes = [size for size in told if size != "compiled"]
    assert sizes == [len(next(cache.glob("*.cubin")).read_bytes())] * 2


def test_threads_may_compile_together() -> None:
    """The first use of the compiler in a process, from four threads: virtual ranks do that."""
    code = (
        "import sys, threading; sys.path.insert(0, sys.argv[1]); sys.setswitchinterval(1e-6)\n"
        "from collogue.gpu import jit\n"
        "from collogue.errors import CompileError\n"
        "failed = []\n"
        "def work(i):\n"
        "    source = f'extern \"C\" __global__ void k{i}() {{}}'\n"
        "    try: jit.compile_source(source, 'sm_90a', f'k{i}')\n"
        "    except BaseException as error: failed.append(error)\n"
        "threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]\n"
        "[t.start() for t in threads]; [t.join() for t in threads]\n"
        "assert not failed, failed\n"
    )
    subprocess.run([sys.executable, "-c", code, str(kernels.ROOT.parents[1])], check=True, timeout=120)


# Where


def test_a_home_that_cannot_be_written_is_passed_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, variant: Variant) -> None:
    # A file in the place of a directory refuses even the superuser.
    blocked = tmp_path / "blocked"
    blocked.write_text("")
    monkeypatch.delenv("COLLOGUE_CACHE_DIR", raising=False)
    monkeypatch.setenv("HOME", str(blocked))
    monkeypatch.setenv("XDG_CACHE_HOME", str(blocked / "cache"))
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    cache_directory.cache_clear()
    try:
        assert cache_directory() == tmp_path / f"collogue-{os.getuid()}"
        assert jit.cubin(variant, "sm_90a").startswith(ELF)
        monkeypatch.delenv("XDG_CACHE_HOME")
        cache_directory.cache_clear()
        assert cache_directory() == tmp_path / f"collogue-{os.getuid()}"
        monkeypatch.setattr(tempfile, "tempdir", str(blocked))
        cache_directory.cache_clear()
        with pytest.raises(PlatformError, match="hint: set COLLOGUE_CACHE_DIR"):
            cache_directory()
    finally:
        cache_directory.cache_clear()


def test_the_cache_is_where_the_user_says(cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert cache_directory() == cache
    monkeypatch.delenv("COLLOGUE_CACHE_DIR")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    cache_directory.cache_clear()
    assert cache_directory() == tmp_path / "xdg" / "collogue"


def test_the_name_of_a_kernel_says_what_it_does(variant: Variant) -> None:
    assert variant.name == "collogue_local_1_residual"
    choice = {"format": "fp8_per_token", "world": 4, "hidden_size": 7168, "architecture": "sm_90a", "dtype": torch.bfloat16}
    choice |= {"kernel": "one_shot", "norm": True, "keep_norm": True, "wide_weight": False, "residual": True, "tokens": 1}
    assert variant_of(choice).name == "collogue_one_shot_4_residual_norm_fp8pertoken"


# Registers


@pytest.mark.parametrize("architecture", ["sm_80", "sm_90a"])
def test_a_kernel_that_would_spill_gets_more_registers(architecture: str) -> None:
    """Launch bounds that ask for too many CTAs: the compiler is asked again, and only then."""
    asked = replace(variant_of({**ONE_SHOT, "architecture": architecture}), ctas_per_multiprocessor=1)
    many = replace(asked, ctas_per_multiprocessor=2048 // asked.threads)
    code, log = jit.compile_source(many.source(), architecture, many.name, verbose=True)
    assert jit.local_bytes(code) == jit.resources(log).stack > 0
    assert jit.local_bytes(jit.compile_variant(many, architecture)[0]) == 0
    code, _ = jit.compile_source(asked.source(), architecture, asked.name)
    assert jit.compile_variant(asked, architecture)[0] == code


@pytest.mark.parametrize(
    "choice",
    [{"format": "fp8_per_token", "tokens": 4096}, {"kernel": "sharded", "format": "nvfp4/128x4", "keep_norm": True, "wide_weight": True}],
    ids=["one-shot rows in turn", "sharded"],
)
def test_two_kernels_that_once_spilled(choice: dict[str, Any]) -> None:
    """With the launch bounds that the plan asks for."""
    variant = variant_of({**ONE_SHOT, **choice})
    code, _ = jit.compile_source(variant.source(), "sm_90a", variant.name)
    assert jit.local_bytes(code) == 0


def test_a_wide_cta_for_few_multiprocessors_does_not_spill() -> None:
    """Where launch bounds cannot give more registers the plan takes narrower CTAs. With 448 threads this one spilled 64 bytes."""
    quant = parse("mxfp4/ceil/128x4")
    topology = Topology(6, 4096, 7168, torch.bfloat16, "sm_90a", 132, 1, Overrides(max_sms=16))
    wanted = Wanted.of(has_residual=True, has_norm=True, quant=quant, keep_norm=False, operation="sharded")
    request = Request(1, 7168, torch.bfloat16, True, True, False, quant, wanted, "sharded")
    (kernel,) = make_kernels(topology, request, make_plan(topology, request))
    code, _ = jit.compile_variant(kernel.variant, "sm_90a")
    assert jit.local_bytes(code) == 0

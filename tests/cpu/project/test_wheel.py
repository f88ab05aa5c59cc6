"""A source distribution and a wheel are built, and the wheel is used in an environment that has torch and no checkout."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from pathlib import Path

import pytest

import collogue
from scripts.links import absolute_links, urls

ROOT = Path(__file__).resolve().parents[3]
#: Of the repository, not of the package.
WORKSHOP = ("pages.py", "figure.py", "readme.py", "site_hooks.py", "links.py")


def run(*command: str | Path, cwd: Path) -> str:
    """What ``command`` prints. No variable of this process shows it the checkout."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    done = subprocess.run([str(word) for word in command], cwd=cwd, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def build(kind: str, source: Path, target: Path) -> Path:
    """The distribution of ``source``, as an installer makes it, by the setuptools that is here."""
    code = f"import os, sys; from setuptools import build_meta; print(build_meta.build_{kind}(sys.argv[1]))"
    return target / run(sys.executable, "-c", code, target, cwd=source).splitlines()[-1]


@pytest.fixture(scope="module")
def sdist(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Made of a copy: a build writes beside its sources."""
    folder = tmp_path_factory.mktemp("sdist")
    ignored = shutil.ignore_patterns(".*_cache", ".venv", ".git", ".hypothesis", "build", "dist", "shared", "*.egg-info", "__pycache__")
    shutil.copytree(ROOT, folder / "source", ignore=ignored)
    return build("sdist", folder / "source", folder)


@pytest.fixture(scope="module")
def wheel(sdist: Path) -> Path:
    """Made of the source distribution, so that nothing is missing there."""
    with tarfile.open(sdist) as archive:
        archive.extractall(sdist.parent, filter="data")
    return build("wheel", sdist.parent / sdist.name.removesuffix(".tar.gz"), sdist.parent)


@pytest.fixture(scope="module")
def python(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An environment with the wheel, and torch and the rest from where this process has them."""
    folder = tmp_path_factory.mktemp("environment")
    run(sys.executable, "-m", "venv", "--without-pip", folder, cwd=folder)
    made = folder / "bin" / "python"
    run(sys.executable, "-m", "pip", "--python", made, "install", "--quiet", "--no-deps", "--no-index", wheel, cwd=folder)
    site = Path(run(made, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))", cwd=folder).strip())
    # Paths of this process, but for checkouts; a path file in them is not followed.
    paths = dict.fromkeys(p for p in [*sys.path, sysconfig.get_path("purelib")] if p.endswith(("site-packages", "dist-packages")))
    (site / "of_parent.pth").write_text("\n".join(paths) + "\n")
    return made


def metadata(wheel: Path) -> str:
    with zipfile.ZipFile(wheel) as archive:
        (name,) = [name for name in archive.namelist() if name.endswith(".dist-info/METADATA")]
        return archive.read(name).decode()


@pytest.mark.slow
def test_the_source_distribution_can_be_tested(sdist: Path) -> None:
    with tarfile.open(sdist) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    tracked = [
        file for folder in ("src", "tests", "docs", "examples", "scripts", "benchmarks/results") for file in (ROOT / folder).rglob("*")
    ]
    wanted = {f.relative_to(ROOT).as_posix() for f in tracked if f.is_file() and "__pycache__" not in f.parts and ".egg-info" not in str(f)}
    wanted |= {"CHANGELOG.md", "CONTRIBUTING.md", "LICENSE", "README.md", "Makefile", "mkdocs.yml", "pyproject.toml", "setup.py"}
    assert wanted - names == set()


@pytest.mark.slow
def test_the_wheel_holds_the_package_and_no_workshop(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = {name for name in archive.namelist() if ".dist-info/" not in name}
    assert all(name.startswith("collogue/") for name in names)
    assert [name for name in names if name.rpartition("/")[2] in WORKSHOP] == []
    package = ROOT / "src" / "collogue"
    kernels = {f"collogue/{file.relative_to(package).as_posix()}" for file in package.rglob("*.cuh")}
    assert kernels | {"collogue/py.typed", "collogue/testing/emulator/driver.cpp"} <= names


@pytest.mark.slow
def test_the_long_description_has_absolute_links(wheel: Path) -> None:
    head, _, description = metadata(wheel).partition("\n\n")
    links = re.findall(r"\]\(([^)\s]+)\)", description)
    assert len(links) > 15
    assert [link for link in links if not re.match(r"https://|#", link)] == []
    assert f"]({urls()['Source']}/raw/main/docs/figures/latency-2xh200.svg)" in description
    assert set(re.findall(r"^Project-URL: (\w+)", head, re.MULTILINE)) == {"Homepage", "Source", "Documentation", "Issues", "Changelog"}
    assert {"cli", "hf", "bench", "resources", "docs", "test", "dev"} <= set(re.findall(r"^Provides-Extra: (\S+)", head, re.MULTILINE))
    assert "Author: " in head
    assert "Classifier: Programming Language :: Python :: 3.13" in head


USED = """
import torch, torch.distributed as dist, collogue
assert "of_parent" not in collogue.__file__
dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
with collogue.Communicator(dist.group.WORLD, max_tokens=4, hidden_size=64, dtype=torch.float32) as comm:
    x = torch.ones(2, 64)
    out = comm.all_reduce(x, residual=x, norm=collogue.RMSNorm(torch.ones(64)), quant=collogue.FP8PerToken())
    print(collogue.__file__, out.residual.sum().item(), out.codes.dtype)
dist.destroy_process_group()
"""


@pytest.mark.slow
def test_the_wheel_works_without_the_checkout(python: Path, tmp_path: Path) -> None:
    place, total, dtype = run(python, "-c", USED, cwd=tmp_path).split()
    assert Path(place).is_relative_to(python.parent.parent)
    assert (total, dtype) == ("256.0", "torch.float8_e4m3fn")


@pytest.mark.slow
def test_the_wheels_command_line_works(python: Path, tmp_path: Path) -> None:
    command = python.parent / "collogue"
    assert run(command, "--version", cwd=tmp_path).strip() == collogue.__version__
    assert "one_shot" in run(command, "explain", "--architecture", "sm_90a", "--tokens", "8", cwd=tmp_path)
    assert "1 of 1 cases passed" in run(
        command, "check", "--device", "cpu", "--format", "none", "--dtype", "bfloat16", "--tokens", "3", cwd=tmp_path
    )


def test_relative_links_become_absolute(tmp_path: Path) -> None:
    source = urls()["Source"]
    page = "[a](docs/contract.md#zeros) ![b](docs/figures/latency-2xh200.svg) [c](examples) [d](https://x.org) [e](#here)"
    expected = f"[a]({source}/blob/main/docs/contract.md#zeros) ![b]({source}/raw/main/docs/figures/latency-2xh200.svg) "
    assert absolute_links(page, ROOT) == expected + f"[c]({source}/tree/main/examples) [d](https://x.org) [e](#here)"
    assert absolute_links("[a](contract.md) [b](../README.md)", ROOT / "docs", inside=ROOT / "docs") == (
        f"[a](contract.md) [b]({source}/blob/main/README.md)"
    )


def test_addresses_are_those_of_pyproject() -> None:
    """Other files name only what pyproject.toml does."""
    known = {urls()["Source"], urls()["Documentation"].rstrip("/")}
    files = [ROOT / "mkdocs.yml", *ROOT.glob("*.md"), *ROOT.glob("*.cff"), *ROOT.glob("docs/**/*.md"), *ROOT.glob(".github/**/*.*")]
    for file in files:
        for address in re.findall(r"https://(?:github\.com/collogue|collogue\.)[\w./-]*", file.read_text(encoding="utf-8")):
            assert any(address.startswith(base) for base in known), f"{file.name}: {address}"

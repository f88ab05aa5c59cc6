"""Every shell block of README, CONTRIBUTING and the documents: commands that need no GPU, network or minutes run, the others are parsed."""

from __future__ import annotations

import json
import os
import re
import shlex
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import typer
from typer.testing import CliRunner

from collogue.tools.cli import app
from collogue.tools.terminal import IMPOSSIBLE, OK

ROOT = Path(__file__).resolve().parents[3]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
#: Python blocks have tests of their own: test_readme.py and test_blocks.py.
KINDS = {"python", "sh"}
#: Files that the reader has: a result, a journal, the program of the page.
OF_THE_READER = ("RESULTS.json", "FILE", "example.py")
#: Variables of other projects.
FOREIGN = {"FLASHINFER_EXTRA_CUDAFLAGS"}
#: Modules that `python -m` runs.
MODULES = {"venv", "json.tool", "sglang.launch_server", "collogue"}


def kinds(text: str) -> list[str]:
    """The word behind each opening fence."""
    return re.findall(r"^ *```+(.*)$", text, re.MULTILINE)[::2]


def blocks(text: str) -> list[str]:
    return re.findall(r"```sh\n(.*?)```", text, re.DOTALL)


def commands(block: str) -> Iterator[list[str]]:
    """The words of each command, without comments; a pipe and ``&&`` begin another one."""
    for line in block.replace("\\\n", " ").splitlines():
        command: list[str] = []
        for word in [*shlex.split(line, comments=True), "&&"]:
            if word not in ("&&", "|"):
                command.append(word)
            elif command:
                yield command
                command = []


def parser() -> Any:
    """The command line, whose commands do nothing."""
    command = typer.main.get_command(app)

    def silence(one: Any) -> None:
        one.callback = None
        for child in getattr(one, "commands", {}).values():
            silence(child)

    silence(command)
    return command


def collogue_problem(arguments: list[str]) -> str | None:
    """Run ``collogue ARGUMENTS`` or, where that takes a GPU or minutes, parse it."""
    given = set(arguments)
    quick = {
        "explain": bool(given & {"--architecture", "--gpu"}) or "cpu" in given,
        "ablate": "--list" in given,
        "doctor": not given & {"--group", "--journal"},
    }
    if quick.get(arguments[0], False):
        done = CliRunner().invoke(app, arguments)
        fine = done.exit_code in ((OK, IMPOSSIBLE) if "--engine" in given else (OK,))
        if fine and arguments[-2:] == ["--json", "-"]:
            json.loads(done.stdout)
        return None if fine else done.output
    try:
        parser().main(arguments)
    except SystemExit as ended:
        return None if ended.code == OK else f"exit status {ended.code}"
    raise AssertionError("a command ends with its exit code")


def python_problem(words: list[str]) -> str | None:
    """``-m MODULE``, ``-c CODE`` or a script with its options."""
    if words[0] == "-c":
        compile(words[1], "block", "exec")
        return None
    if words[0] == "-m":
        if words[1] == "collogue":
            return collogue_problem(words[2:])
        return None if words[1] in MODULES else f"unknown module {words[1]}"
    if words[0] in OF_THE_READER:
        return None
    if not (ROOT / words[0]).is_file():
        return f"there is no {words[0]}"
    script = (ROOT / words[0]).read_text(encoding="utf-8")
    return next((f"{words[0]} has no {word}" for word in words if word.startswith("--") and f'"{word}"' not in script), None)


def pip_problem(words: list[str]) -> str | None:
    """Of a checkout, only the extras that it has."""
    of_ours = [re.fullmatch(r"(?:\.|(?:\./)?collogue)\[(.+)\]", word) for word in words]
    extras = {extra for match in of_ours if match for extra in match[1].split(",")}
    return ", ".join(sorted(extras - set(PROJECT["optional-dependencies"]))) or None


def problem(command: list[str]) -> str | None:
    """What is wrong with a command, if anything is."""
    while re.match(r"[A-Z_]+=", command[0]):
        name, command = command[0].partition("=")[0], command[1:]
        if name not in FOREIGN and f"| `{name}` |" not in (ROOT / "docs/reference/environment.md").read_text(encoding="utf-8"):
            return f"unknown variable {name}"
    program, words = Path(command[0]).name, command[1:]
    if program == "collogue":
        return collogue_problem(words)
    if program == "torchrun":
        assert words[0] == "--nproc-per-node"
        return python_problem(words[2:])
    if program == "python":
        return python_problem(words)
    if program == "pip":
        return pip_problem(words)
    if program == "make":
        return None if re.search(rf"^{words[0]}:", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE) else "no such target"
    if program == "git":
        return None if words == ["clone", PROJECT["urls"]["Source"]] else "another address"
    return None if program in ("cd", "mkdir", "vllm", "pre-commit") else f"unknown program {program}"


@pytest.fixture
def readers_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in OF_THE_READER:
        (tmp_path / name).write_text("{}")
    for name in [name for name in os.environ if name.startswith("COLLOGUE_")]:
        monkeypatch.delenv(name)


def test_every_block_is_of_a_kind_that_is_run() -> None:
    found = {(page.name, kind) for page in PAGES for kind in kinds(page.read_text(encoding="utf-8"))}
    assert {(page, kind) for page, kind in found if kind not in KINDS} == set()
    assert ("CONTRIBUTING.md", "python") not in found
    assert kinds("```sh\nls\n```\ntext\n   ```toml title\n   a = 1\n   ```\n```\n\n```") == ["sh", "toml title", ""]


@pytest.mark.slow
@pytest.mark.usefixtures("readers_folder")
def test_every_shell_block_runs_or_is_parsed(capsys: pytest.CaptureFixture[str]) -> None:
    found = [(page.name, command) for page in PAGES for block in blocks(page.read_text(encoding="utf-8")) for command in commands(block)]
    assert len(found) > 60
    wrong = {(page, shlex.join(command)): said for page, command in found if (said := problem(command)) is not None}
    assert wrong == {}, capsys.readouterr().err


@pytest.mark.usefixtures("readers_folder")
@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("collogue bench --sweet latency", "exit status 2"),
        ("collogue bench report NONE.json", "exit status 2"),
        ("collogue explain --architecture sm_90a --format nvfp5", "unknown format"),
        ("mkdir a && torchrun --nproc-per-node 2 examples/none.py", "there is no examples/none.py"),
        ("python scripts/serve_vllm.py MODEL --word 8   # 8 GPUs", "scripts/serve_vllm.py has no --word"),
        ("pip install './collogue[cli,benches]'", "benches"),
        ("COLLOGUE_TABEL=x \\\n  torchrun --nproc-per-node 2 example.py", "unknown variable COLLOGUE_TABEL"),
        ("make tests", "no such target"),
        ("brew upgrade x", "unknown program brew"),
    ],
)
def test_a_line_that_does_not_work_is_seen(line: str, said: str) -> None:
    assert said in " ".join(filter(None, map(problem, commands(line))))

"""The command line as a process: how fast it answers, and how it ends, whatever happens."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import tempfile
import textwrap
import time
from pathlib import Path
from typing import Any

import pytest

from collogue.tools import terminal
from collogue.tools.terminal import CLOSED_PIPE, IMPOSSIBLE, INTERRUPTED, OK, USAGE

pytestmark = pytest.mark.slow

COLLOGUE = [sys.executable, "-m", "collogue"]


def run(*arguments: str, **options: Any) -> subprocess.CompletedProcess[str]:
    given = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, "timeout": 120, **options}
    return subprocess.run([*COLLOGUE, *arguments], check=False, **given)


@pytest.mark.parametrize(
    ("arguments", "code"),
    [
        (["--version"], OK),
        (["--help"], OK),
        (["check", "--help"], OK),
        (["bench", "report", "--help"], OK),
        (["bnech"], USAGE),
        (["check", "--nothing"], USAGE),
        (["check", "--dtype", "float64"], USAGE),
        (["check", "--format", "fp7"], USAGE),
        (["check", "--operation", "gather"], USAGE),
        (["explain", "--operation", "gather"], USAGE),
        (["demo", "--device", "tpu"], USAGE),
        (["demo", "--plot", "x.txt"], USAGE),
        (["accuracy", "--dtype", "int8"], USAGE),
        (["calibrate", "x.txt"], USAGE),
        (["resources", "--json", "."], USAGE),
        (["resources", "--architecture", "sm_70"], USAGE),
        (["tune", "--dtype", "int8"], USAGE),
        (["reliability", "--only", "x"], USAGE),
    ],
    ids=str,
)
def test_help_and_wrong_usage_answer_without_torch(arguments: list[str], code: int) -> None:
    blocked = "import sys; sys.modules['torch'] = None; from collogue.tools.entry import main; main()"
    done = subprocess.run([sys.executable, "-c", blocked, *arguments], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == code, done.stderr
    if code:
        assert re.match(r"error: .*\nhint: run `collogue( \w+)*(?: --help)?`|error: ", done.stderr), done.stderr
        assert max(map(len, done.stderr.splitlines())) <= 80


@pytest.mark.parametrize("arguments", [["--version"], ["--help"], ["check", "--dtype", "float64"]], ids=" ".join)
def test_they_answer_at_once(arguments: list[str]) -> None:
    """Processor time: how long it takes also depends on what else the machine does."""

    def seconds() -> float:
        child = subprocess.Popen([*COLLOGUE, *arguments], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        _, _, used = os.wait4(child.pid, 0)
        child.returncode = 0
        return used.ru_utime + used.ru_stime

    assert min(seconds() for _ in range(3)) < 0.4


def test_without_its_packages_the_command_line_says_what_to_install() -> None:
    for name in ("typer", "rich"):
        code = f"import sys; sys.modules[{name!r}] = None; from collogue.tools.entry import main; main()"
        done = subprocess.run([sys.executable, "-c", code, "--version"], capture_output=True, text=True, timeout=60, check=False)
        assert done.returncode == IMPOSSIBLE
        assert done.stderr == f"error: the command line needs {name}, which is not installed\nhint: pip install typer rich\n"


# Ctrl-C


@pytest.mark.skipif(sys.platform != "linux", reason="signals to a group of processes")
@pytest.mark.parametrize("seconds", [0.1, 0.2, 0.5, 1.0, 2.0, 3.5])
@pytest.mark.parametrize("command", ["check --device cpu", "accuracy --model random", "demo --tokens 64"])
def test_an_interrupt_at_any_moment(command: str, seconds: float) -> None:
    """Also while torch is imported, and in the processes of ranks: a terminal sends it to all of them."""
    child = subprocess.Popen(
        [*COLLOGUE, *command.split()], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    time.sleep(seconds)
    os.killpg(child.pid, signal.SIGINT)
    _, said = child.communicate(timeout=60)
    if child.returncode == OK:
        pytest.skip("it had ended before")
    assert child.returncode == INTERRUPTED, said
    lines = [
        line
        for line in said.splitlines()
        if line.strip() and not re.match(r"(SmolLM2|starting|reading|running|measuring|check|accuracy)\b", line)
    ]
    assert lines == ["interrupted"]


INTERRUPTED_PROGRAMS = {
    "ranks in threads": """
        from collogue.testing import run_virtual
        started()
        run_virtual(3, lambda group: [group.barrier() or torch.ones(400, 400) @ torch.ones(400, 400) for _ in range(10**9)])
    """,
    "ranks in processes": """
        from collogue.testing.processes import run_processes
        import torch.multiprocessing
        started()
        run_processes(2, time.sleep, 1000)
    """,
    "clean-up that hangs": """
        started()
        try:
            time.sleep(100)
        finally:
            time.sleep(100)
    """,
    "turned into another error": """
        started()
        try:
            time.sleep(100)
        except BaseException:
            raise ValueError("something else")
    """,
    "in a destructor": """
        class Slow:
            def __del__(self):
                started()
                time.sleep(100)
        Slow()
        time.sleep(100)
    """,
}


@pytest.mark.skipif(sys.platform != "linux", reason="signals to a group of processes")
@pytest.mark.parametrize("what", INTERRUPTED_PROGRAMS)
def test_what_an_interrupt_meets(what: str, tmp_path: Path) -> None:
    program = tmp_path / "program.py"
    body = textwrap.indent(textwrap.dedent(INTERRUPTED_PROGRAMS[what]), "    ")
    program.write_text(
        "import os, sys, time, torch\nfrom collogue.tools import entry\n"
        "def started():\n    os.write(1, b'started\\n')\n"
        f"def work():\n{body}\n    return 0\n"
        "if __name__ == '__main__':\n    entry._run = work\n    entry.main()\n"
    )
    with subprocess.Popen(
        [sys.executable, program], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    ) as child:
        try:
            assert child.stdout is not None
            assert child.stdout.readline() == "started\n"
            time.sleep(1.0)
            os.killpg(child.pid, signal.SIGINT)
            _, said = child.communicate(timeout=30)
        finally:
            child.kill()
    assert (child.returncode, said) == (INTERRUPTED, "interrupted\n")


def test_an_interrupt_after_the_work_changes_nothing() -> None:
    """While the interpreter ends, no handler of Python's runs any more: here a global object goes then, with a signal."""
    code = (
        "import os\nclass Last:\n    def __del__(self, kill=os.kill, pid=os.getpid()): kill(pid, 2)\nlast = Last()\n"
        "from collogue.tools import terminal\nterminal.Interrupt().install()\nterminal.finish(1)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stderr) == (1, "")


# What cannot be written


@pytest.mark.parametrize("arguments", [["check", "--help"], ["ablate", "--list"], ["explain", "--json", "-"], ["--version"]], ids=" ".join)
def test_a_closed_pipe_ends_as_its_signal_would(arguments: list[str]) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    try:
        done = run(*arguments, stdout=writer)
    finally:
        os.close(writer)
    assert done.returncode == CLOSED_PIPE
    assert "Error" not in done.stderr


needs_full = pytest.mark.skipif(not Path("/dev/full").exists(), reason="there is no /dev/full")


@needs_full
@pytest.mark.parametrize("arguments", [["--version"], ["explain"], ["explain", "--json", "-"], ["ablate", "--list"]], ids=" ".join)
def test_a_full_disk_behind_stdout(arguments: list[str]) -> None:
    with open("/dev/full", "w") as full:
        done = run(*arguments, stdout=full)
    assert done.returncode == USAGE
    assert done.stderr.splitlines()[-1].startswith("error: cannot write")
    assert "Traceback" not in done.stderr


@needs_full
@pytest.mark.parametrize("target", ["/dev/full", "/proc/x.json"])
@pytest.mark.parametrize(
    "command", ["explain", "check", "resources", "tune", "doctor", "accuracy", "demo", "bench", "ablate", "reliability"]
)
def test_a_file_that_cannot_be_written_is_wrong_usage_before_the_work(command: str, target: str) -> None:
    done = run(command, "--json", target)
    assert done.returncode == USAGE
    assert done.stdout == ""
    assert " ".join(done.stderr.split()).startswith(f"error: invalid value for --json: {target} cannot be written")


@pytest.mark.skipif(not hasattr(os, "seteuid"), reason="no users")
def test_a_directory_without_permission() -> None:
    """As another user where this one may write everywhere."""
    with tempfile.TemporaryDirectory(dir="/tmp") as name:
        folder = Path(name)
        folder.chmod(0o555)
        code = (
            "import os, tempfile, typer\nfrom collogue.tools.commands.options import check_target\nos.getuid() or os.seteuid(65534)\n"
            f"try: check_target({str(folder / 'x.json')!r})\nexcept typer.BadParameter as error: print(error.message)"
        )
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False)
        assert done.stdout == f"{folder / 'x.json'} cannot be written: Permission denied\n", done.stderr


def test_what_a_file_holds_stays_until_it_is_written(tmp_path: Path) -> None:
    from collogue.tools.commands.options import check_target

    file = tmp_path / "x.json"
    file.write_text("kept")
    check_target(file)
    check_target(tmp_path / "new.json")
    assert file.read_text() == "kept"
    assert [each.name for each in tmp_path.iterdir()] == ["x.json"]


# The look of errors


def test_lines_are_wrapped_between_words(capsys: pytest.CaptureFixture[str]) -> None:
    terminal.report_error("word " * 30 + "\n" + "x" * 100, "pip install " + "a" * 40 + " && pip install --no-deps " + "b" * 20)
    lines = capsys.readouterr().err.splitlines()
    assert lines[0].startswith("error: word word")
    assert lines[1].startswith("  word")
    assert "  " + "x" * 100 not in lines
    assert "x" * 100 in lines
    assert lines[-2:] == [f"hint: pip install {'a' * 40} &&", f"  pip install --no-deps {'b' * 20}"]
    assert all(len(line) <= 80 for line in lines if line != "x" * 100)

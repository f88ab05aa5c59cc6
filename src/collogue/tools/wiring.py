"""Which ranks reach each other's memory, and over which link: read from this machine or from the ranks of a group, drawn as text and as
SVG (``collogue doctor``).
"""

from __future__ import annotations

import html
import itertools
import math
import os
import re
import socket
import textwrap
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from datetime import timedelta
from typing import TYPE_CHECKING, Any

from collogue.tools.record import output

if TYPE_CHECKING:
    from collogue.group import Group

#: Links as `nvidia-smi topo -m` names them, from the closest on. RAM is between ranks without GPUs on one host, NET between hosts.
LINKS = {
    "NV#": "# bonded NVLinks",
    "PIX": "one PCIe bridge at most",
    "PXB": "several PCIe bridges",
    "PHB": "a PCIe host bridge",
    "NODE": "PCIe host bridges of one NUMA node",
    "SYS": "the interconnect between NUMA nodes",
    "RAM": "the memory of one host",
    "NET": "the network between hosts",
    "?": "unknown: nvidia-smi does not say",
}
#: What moves bytes between two ranks.
TRANSPORTS = {
    "peer": "kernels store into the other's memory",
    "none": "no peer access: such a group takes the host path, which is slower",
    "host": "the group's own collectives",
}
#: In the place of a GPU's name.
CPU = "CPU"
#: Seconds in which the ranks of a group must meet.
SECONDS_TO_MEET = 60.0
#: Columns of a matrix on a line of 80.
_COLUMNS = 12


@dataclass(frozen=True)
class Wiring:
    """Ranks with their ``hosts`` and ``gpus``; ``links`` of pairs ``(lower, higher)``; ``refused``: ordered pairs without peer access.

    Of a group: whether its own collectives move all bytes (``by_group``), and its transport, islands and order in words (``reach``).
    """

    hosts: tuple[str, ...]
    gpus: tuple[str, ...]
    links: Mapping[tuple[int, int], str] = field(default_factory=dict)
    refused: frozenset[tuple[int, int]] = frozenset()
    by_group: bool = False
    reach: str = ""

    @property
    def on_cpu(self) -> bool:
        """Whether the ranks have no GPUs."""
        return set(self.gpus) == {CPU}

    @property
    def pairs(self) -> Iterator[tuple[int, int]]:
        """All, lower rank first."""
        return itertools.combinations(range(len(self.gpus)), 2)

    def link(self, a: int, b: int) -> str:
        """A key of :data:`LINKS`, with the number of NVLinks for ``#``."""
        if self.hosts[a] != self.hosts[b]:
            return "NET"
        return "RAM" if self.on_cpu else self.links.get((min(a, b), max(a, b)), "?")

    def transport(self, a: int, b: int) -> str:
        """A key of :data:`TRANSPORTS`: both must reach the other."""
        if self.by_group:
            return "host"
        return "none" if self.hosts[a] != self.hosts[b] or {(a, b), (b, a)} & self.refused else "peer"

    @property
    def islands(self) -> list[list[int]]:
        """Those of a group of all ranks."""
        from collogue.planning.islands import split

        return list(map(list, split(self.hosts, lambda a, b: (a, b) not in self.refused)))

    def as_json(self) -> dict[str, Any]:
        """As plain data."""
        ranks = [{"rank": rank, "host": host, "gpu": gpu} for rank, (host, gpu) in enumerate(zip(self.hosts, self.gpus, strict=True))]
        pairs = [{"ranks": [a, b], "link": self.link(a, b), "transport": self.transport(a, b)} for a, b in self.pairs]
        return {"ranks": ranks, "pairs": pairs, "islands": self.islands, "reach": self.reach or None}


# Reading


def here() -> Wiring | None:
    """The GPUs that torch sees, a rank each; ``None`` where there is none."""
    import torch

    from collogue.planning.topology import refused_here

    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if not count:
        return None
    properties = [torch.cuda.get_device_properties(i) for i in range(count)]
    numbers = _smi_numbers()
    places = [numbers.get(str(getattr(p, "uuid", "")).removeprefix("GPU-")) for p in properties]
    seen = parse(output("nvidia-smi", "topo", "-m") or "")
    every = list(itertools.permutations(range(count), 2))
    links = {(a, b): seen[places[a], places[b]] for a, b in every if a < b and (places[a], places[b]) in seen}
    host = os.environ.get("COLLOGUE_HOST") or socket.gethostname()
    return Wiring((host,) * count, tuple(p.name for p in properties), links, refused_here())


def of_job() -> tuple[int, Wiring]:
    """This process's rank and what :func:`of_group` says of all ranks that ``torchrun`` has started. Collective.

    Raises :class:`ArgumentError` where this is not such a process, :class:`PlatformError` where the ranks do not meet.
    """
    import torch
    import torch.distributed as dist

    from collogue.errors import ArgumentError, PlatformError
    from collogue.group import as_group

    missing = [name for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT") if name not in os.environ]
    if missing:
        hint = "start it on every rank, as torchrun does: torchrun --nproc-per-node 4 -m collogue doctor --group"
        raise ArgumentError(f"this process is not a rank of a job: {', '.join(missing)} not set", hint=hint)
    try:
        dist.init_process_group("gloo", timeout=timedelta(seconds=SECONDS_TO_MEET))
    except (RuntimeError, ValueError) as error:
        hint = "start `collogue doctor --group` on every rank of the job"
        raise PlatformError(f"the ranks did not meet within {SECONDS_TO_MEET:.0f} s: {str(error).splitlines()[0]}", hint=hint) from error
    try:
        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
        on_gpus = all(as_group(dist.group.WORLD, "cpu").all_gather_object(count > 0))
        if on_gpus:
            torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")) % count)
        return dist.get_rank(), of_group(as_group(dist.group.WORLD, "cuda" if on_gpus else "cpu"))
    finally:
        dist.destroy_process_group()


def of_group(group: Group) -> Wiring:
    """The ranks of ``group``, with the transport and the islands that a communicator on it would have. Collective."""
    import torch

    from collogue.calls.capacity import Capacity
    from collogue.link.sockets import machine
    from collogue.planning.topology import agree, reach

    own: dict[str, Any] = {"host": group.host, "label": socket.gethostname() if group.host == machine() else group.host}
    if group.device.type == "cuda":
        properties = torch.cuda.get_device_properties(group.device.index)
        links = parse(output("nvidia-smi", "topo", "-m") or "")
        place = _smi_numbers().get(str(properties.uuid).removeprefix("GPU-"))
        own |= {"name": properties.name, "gpu": str(properties.uuid), "place": place, "links": links}
    every = group.all_gather_object(own)
    reached = reach(group, every)
    ranks = range(group.size)
    near = [(a, b) for a, b in itertools.permutations(ranks, 2) if every[a]["host"] == every[b]["host"]]
    found = {(a, b): every[a].get("links", {}).get((every[a].get("place"), every[b].get("place"))) for a, b in near if a < b}
    topology = agree(group, Capacity(1, 8, torch.bfloat16, group.device, group.size), SECONDS_TO_MEET)
    return Wiring(
        _labels([(one["host"], one["label"]) for one in every]),
        tuple(one.get("name", CPU) for one in every),
        {pair: link for pair, link in found.items() if link is not None},
        frozenset((a, b) for a, b in near if b not in reached[a]),
        topology.transport == "host",
        topology.reach,
    )


def _labels(hosts: list[tuple[str, str]]) -> tuple[str, ...]:
    """What each rank's host is called, of its identity and its name: hosts of one name are numbered."""
    numbers: dict[str, int] = {}
    called: dict[str, str] = {}
    for host, name in hosts:
        if host not in called:
            numbers[name] = numbers.get(name, 0) + 1
            called[host] = name if numbers[name] == 1 else f"{name} ({numbers[name]})"
    return tuple(called[host] for host, _ in hosts)


def _smi_numbers() -> dict[str, int]:
    """UUID -> number that nvidia-smi counts by, which ``CUDA_VISIBLE_DEVICES`` does not change."""
    lines = (output("nvidia-smi", "--query-gpu=index,uuid", "--format=csv,noheader") or "").splitlines()
    rows = (line.split(",") for line in lines if line.count(",") == 1)
    return {uuid.strip().removeprefix("GPU-"): int(index) for index, uuid in rows}


def parse(text: str) -> dict[tuple[int | None, int | None], str]:
    """Links of ordered pairs, by the numbers of ``nvidia-smi topo -m``, whose output ``text`` is."""
    lines = [[cell.strip() for cell in line.split("\t")] for line in re.sub(r"\x1b\[\d*m", "", text).splitlines()]
    header = next((line for line in lines if any(cell == "GPU0" for cell in line) and line[0] != "GPU0"), None)
    # The heading of the first column may be empty, or cut off with the spaces at the start.
    header = header or next((["", *line] for line in lines if line[0] == "GPU0" and line[1:2] != ["X"]), [])
    columns = {place: int(cell[3:]) for place, cell in enumerate(header) if re.fullmatch(r"GPU\d+", cell)}
    found: dict[tuple[int | None, int | None], str] = {}
    for line in lines:
        if re.fullmatch(r"GPU\d+", line[0]) and any(cell == "X" for cell in line):
            mine = int(line[0][3:])
            found |= {(mine, other): line[place] for place, other in columns.items() if other != mine and place < len(line)}
    return found


# Text


def text(wiring: Wiring) -> str:
    """Ranks, links, transports and islands, at most 80 columns wide."""
    ranks = range(len(wiring.gpus))
    lines = ["ranks"]
    for rank in ranks:
        lines.append(f"{rank:4}  {wiring.gpus[rank][:40]} on {wiring.hosts[rank]}"[:80])
    if len(wiring.gpus) > 1:
        lines += ["links", *_matrix(wiring, "link"), "transport", *_matrix(wiring, "transport")]
        kinds = {re.sub(r"^NV\d+$", "NV#", wiring.link(a, b)) for a, b in wiring.pairs}
        words = {wiring.transport(a, b) for a, b in wiring.pairs}
        legend = [(k, v) for k, v in LINKS.items() if k in kinds] + [(k, v) for k, v in TRANSPORTS.items() if k in words]
        lines += [f"{name:>6}  {meaning}" for name, meaning in legend]
    spans = [_spans(island) for island in wiring.islands]
    lines += _filled("islands: " + "; ".join(spans) if wiring.on_cpu else "peer access among: " + "; or ".join(spans))
    if wiring.reach:
        lines += _filled("a communicator's transport: " + wiring.reach)
    return "\n".join(lines)


def _filled(line: str) -> list[str]:
    return textwrap.wrap(line, 80, subsequent_indent="  ")


def _matrix(wiring: Wiring, of: str) -> Iterator[str]:
    ranks = range(len(wiring.gpus))
    for first in range(0, len(ranks), _COLUMNS):
        columns = ranks[first : first + _COLUMNS]
        yield "    " + "".join(f"{column:6}" for column in columns)
        for row in ranks:
            yield f"{row:4}" + "".join(f"{'-' if row == column else getattr(wiring, of)(row, column):>6}" for column in columns)


def _spans(island: list[int]) -> str:
    """``[0, 1, 2, 5]`` -> ``ranks 0-2, 5``."""
    runs: list[list[int]] = []
    for rank in island:
        if runs and rank == runs[-1][-1] + 1:
            runs[-1].append(rank)
        else:
            runs.append([rank])
    return ("ranks " if len(island) > 1 else "rank ") + ", ".join(f"{run[0]}-{run[-1]}" if len(run) > 1 else str(run[0]) for run in runs)


# SVG

_BOX, _GAP, _RING, _NODE = 380, 90, 130, 24
#: Pairs of a host that each have a label of their own; more are read off the colors.
_LABELLED = 6
#: Of the ranks of each island; after the last one the first again.
_FILLS = ("#ffffff", "#ffe9b8", "#d5ecd4", "#d6e4f5", "#f3d6e4", "#e2dcf3", "#f6dccb", "#dfe3e8")


def svg(wiring: Wiring) -> str:
    """The same as a picture: a box for each host, a circle for each rank, a line for each pair; between hosts one line for all pairs."""
    hosts = list(dict.fromkeys(wiring.hosts))
    homes = {host: 20 + (_BOX + _GAP) * number for number, host in enumerate(hosts)}
    members = {host: [rank for rank, its in enumerate(wiring.hosts) if its == host] for host in hosts}
    places = {rank: spot for host in hosts for rank, spot in _ring(members[host], homes[host] + _BOX / 2, 20 + _BOX / 2)}
    kinds = Counter((wiring.link(a, b), wiring.transport(a, b)) for a, b in wiring.pairs)
    width = max(20 + (_BOX + _GAP) * len(hosts) - _GAP + 20, 480)
    height = _BOX + 60 + 22 * (len(kinds) + len(set(wiring.gpus)) + len(wiring.islands))
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" viewBox="0 0 {width} {height}" '
        'font-family="sans-serif" font-size="13">',
        f'<rect width="{width}" height="{height}" fill="white"/>',
    ]
    for host in hosts:
        parts.append(f'<rect x="{homes[host]}" y="20" width="{_BOX}" height="{_BOX}" rx="10" fill="#f6f7f9" stroke="#8a8f98"/>')
        parts.append(f'<text x="{homes[host] + 12}" y="42" fill="#333">{html.escape(host[:48])}</text>')
    parts += _bridges(wiring, hosts, homes)
    inside = [(a, b) for a, b in wiring.pairs if wiring.hosts[a] == wiring.hosts[b]]
    parts += [_line(wiring, a, b, places[a], places[b]) for a, b in inside]
    if max(len(ranks) * (len(ranks) - 1) // 2 for ranks in members.values()) <= _LABELLED:
        parts += [_label(wiring.link(a, b), places[a], places[b]) for a, b in inside]
    fills = {rank: _FILLS[number % len(_FILLS)] for number, island in enumerate(wiring.islands) for rank in island}
    for rank, (x, y) in places.items():
        parts.append(f'<circle cx="{x:.0f}" cy="{y:.0f}" r="{_NODE}" fill="{fills[rank]}" stroke="#333" stroke-width="1.5"/>')
        parts.append(f'<text x="{x:.0f}" y="{y + 5:.0f}" text-anchor="middle" font-weight="bold" fill="#222">{rank}</text>')
    return "\n".join([*parts, *_legend(wiring, kinds), "</svg>"]) + "\n"


def _ring(ranks: list[int], x: float, y: float) -> Iterator[tuple[int, tuple[float, float]]]:
    """A place on a circle for each rank, the first at the top; in the middle where there is one."""
    for number, rank in enumerate(ranks):
        angle = 2 * math.pi * number / len(ranks) - math.pi / 2
        radius = _RING if len(ranks) > 1 else 0
        yield rank, (x + radius * math.cos(angle), y + 8 + radius * math.sin(angle))


def _stroke(link: str, transport: str) -> str:
    """Green by NVLink, blue by PCIe, red and dashed where there is no peer access, gray where the group moves the bytes."""
    if transport == "host":
        return 'stroke="#6b7280" stroke-width="1.5"' + ' stroke-dasharray="5 4"' * (link == "NET")
    if transport == "none":
        return 'stroke="#c0392b" stroke-width="1.5" stroke-dasharray="5 4"'
    return 'stroke="#2e8b45" stroke-width="3"' if link.startswith("NV") else 'stroke="#2f6fb0" stroke-width="2"'


def _line(wiring: Wiring, a: int, b: int, start: tuple[float, float], end: tuple[float, float]) -> str:
    link, transport = wiring.link(a, b), wiring.transport(a, b)
    ends = f'x1="{start[0]:.0f}" y1="{start[1]:.0f}" x2="{end[0]:.0f}" y2="{end[1]:.0f}"'
    return f"<line {ends} {_stroke(link, transport)}><title>{a} - {b}: {html.escape(link)}, {transport}</title></line>"


def _label(words: str, start: tuple[float, float], end: tuple[float, float]) -> str:
    """A third of the way, where lines that cross in the middle leave room."""
    x, y = start[0] + (end[0] - start[0]) * 0.36, start[1] + (end[1] - start[1]) * 0.36
    halo = 'paint-order="stroke" stroke="#f6f7f9" stroke-width="5"'
    return f'<text x="{x:.0f}" y="{y + 4:.0f}" text-anchor="middle" font-size="12" fill="#333" {halo}>{html.escape(words)}</text>'


def _bridges(wiring: Wiring, hosts: list[str], homes: Mapping[str, int]) -> Iterator[str]:
    """Between each host and the next: what the pairs of all hosts have in common."""
    across = Counter(wiring.transport(a, b) for a, b in wiring.pairs if wiring.hosts[a] != wiring.hosts[b])
    words = ", ".join(f"NET, {transport}" for transport in across)
    for host in hosts[:-1]:
        x, y = homes[host] + _BOX, 20 + _BOX // 2
        yield f'<line x1="{x}" y1="{y}" x2="{x + _GAP}" y2="{y}" {_stroke("NET", min(across))}><title>{words}</title></line>'
        yield f'<text x="{x + _GAP / 2:.0f}" y="{y - 8}" text-anchor="middle" font-size="12" fill="#333">{words}</text>'


def _legend(wiring: Wiring, kinds: Mapping[tuple[str, str], int]) -> Iterator[str]:
    y = _BOX + 48
    for (link, transport), count in kinds.items():
        meaning = LINKS.get(re.sub(r"^NV\d+$", "NV#", link), "").replace("#", link[2:])
        yield f'<line x1="20" y1="{y - 5}" x2="60" y2="{y - 5}" {_stroke(link, transport)}/>'
        pairs = "1 pair" if count == 1 else f"{count} pairs"
        yield f'<text x="70" y="{y}" fill="#222">{html.escape(f"{link}, {transport}: {pairs} ({meaning})")}</text>'
        y += 22
    for gpu in dict.fromkeys(wiring.gpus):
        ranks = _spans([rank for rank, its in enumerate(wiring.gpus) if its == gpu])
        yield f'<text x="20" y="{y}" fill="#222">{html.escape(f"{ranks}: {gpu[:48]}")}</text>'
        y += 22
    for number, island in enumerate(wiring.islands):
        yield f'<rect x="20" y="{y - 12}" width="14" height="14" fill="{_FILLS[number % len(_FILLS)]}" stroke="#333"/>'
        yield f'<text x="42" y="{y}" fill="#222">island {number}: {_spans(island)}</text>'
        y += 22

"""`collogue bench report`: plots, the page, and the comparison of two results."""

from __future__ import annotations

import copy
import json
import re
import xml.etree.ElementTree as ET
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from bench_fakes import fake_rank, made
from typer.testing import CliRunner

from collogue.errors import CollogueError
from collogue.tools.bench import page, regression, report, tables
from collogue.tools.bench.cases import COMPILED, FLASHINFER_EARLY, NCCL
from collogue.tools.bench.plot import Point, bar_chart, line_chart
from collogue.tools.cli import app
from collogue.tools.commands.options import OK, USAGE

ROOT = Path(__file__).resolve().parents[3]


def points(*values: tuple[float, float]) -> list[Point]:
    return [Point(x, y, y, y) for x, y in values]


def circles(svg: str) -> list[tuple[float, float]]:
    return [(float(c.attrib["cx"]), float(c.attrib["cy"])) for c in ET.fromstring(svg).iter("circle")]


def test_a_chart_puts_points_where_their_values_are() -> None:
    svg = line_chart("t", "x", "y", {"a": points((1, 1), (10, 10), (100, 100))})
    (x1, y1), (x2, y2), (x3, y3) = circles(svg)
    assert x2 - x1 == pytest.approx(x3 - x2, abs=0.2)  # logarithmic in x
    assert y1 - y2 == pytest.approx(y2 - y3, abs=0.2)  # and in y
    assert x1 < x2 < x3
    assert y1 > y2 > y3
    linear = [y for _, y in circles(line_chart("t", "x", "y", {"a": points((1, 0.25), (2, 0.5), (4, 1.0))}, logarithmic=False))]
    assert 2 * (linear[0] - linear[1]) == pytest.approx(linear[1] - linear[2], abs=0.3)


def test_a_chart_draws_spreads_and_escapes_names() -> None:
    svg = line_chart("a < b", "x", "y", {"<one> & 'two'": [Point(1, 2, 1, 4), Point(2, 3, 3, 3)]})
    root = ET.fromstring(svg)
    assert any(text.text == "<one> & 'two'" for text in root.iter("text"))
    vertical = [e for e in root.iter("line") if e.attrib["x1"] == e.attrib["x2"] and "stroke" in e.attrib]
    assert len(vertical) == 1
    assert line_chart("t", "x", "y", {}) == ""


def test_a_name_keeps_its_color() -> None:
    order = ["a", "b", "c"]
    first, second = (line_chart("t", "x", "y", {name: points((1, 1))}, order=order) for name in ("b", "c"))
    both = line_chart("t", "x", "y", {"c": points((1, 1)), "b": points((1, 2))}, order=order)
    fill = [ET.fromstring(svg).find("circle").attrib["fill"] for svg in (first, second)]  # type: ignore[union-attr]
    assert [c.attrib["fill"] for c in ET.fromstring(both).iter("circle")] == fill[::-1]
    assert fill[0] != fill[1]


def test_a_lower_bound_is_dashed_and_has_the_color_of_its_line() -> None:
    lines = {"a": points((1, 4), (8, 8)), "b": points((1, 3), (8, 9))}
    root = ET.fromstring(line_chart("t", "x", "y", lines, bounds={"b": points((1, 2), (8, 2)), "c": points((1, 1))}))
    a, b = (e.attrib["stroke"] for e in root.iter("polyline") if "stroke-dasharray" not in e.attrib)
    dashed = [e for e in root.iter("polyline") if "stroke-dasharray" in e.attrib]
    assert a != b
    assert [e.attrib["stroke"] for e in dashed] == [b]  # c is no line of this chart
    (at,) = {point.split(",")[1] for point in dashed[0].attrib["points"].split()}
    assert float(at) > max(float(c.attrib["cy"]) for c in root.iter("circle"))  # below every time, and within the axis
    assert any((text.text or "").startswith("dashed: lower bound") for text in root.iter("text"))
    alike = line_chart("t", "x", "y", lines, bounds={"b": points((1, 2), (8, 2)), "a": points((1, 2), (8, 2))})
    assert [e.attrib["stroke"] for e in ET.fromstring(alike).iter("polyline") if "stroke-dasharray" in e.attrib] == [a]


def test_bars_stand_on_zero_and_one_is_marked() -> None:
    svg = bar_chart("t", "y", {"m, 2 ranks": {"T = 1": 1.5, "T = 8": 0.75}, "n, 2 ranks": {"T = 8": 3.0}})
    root = ET.fromstring(svg)
    bars = {b.find("title").text: b.attrib for b in root.iter("rect") if b.find("title") is not None}  # type: ignore[union-attr]
    heights = {name: float(b["height"]) for name, b in bars.items()}
    assert heights["m, 2 ranks, T = 1: 1.5"] == pytest.approx(2 * heights["m, 2 ranks, T = 8: 0.75"], abs=0.2)
    assert heights["n, 2 ranks, T = 8: 3"] == pytest.approx(2 * heights["m, 2 ranks, T = 1: 1.5"], abs=0.2)
    assert bars["m, 2 ranks, T = 8: 0.75"]["fill"] == bars["n, 2 ranks, T = 8: 3"]["fill"] != bars["m, 2 ranks, T = 1: 1.5"]["fill"]
    assert len({round(float(b["y"]) + float(b["height"])) for b in bars.values()}) == 1
    assert bar_chart("t", "y", {}) == ""


class Balanced(HTMLParser):
    """Every tag that is opened is closed, in order."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []

    def handle_starttag(self, tag: str, attrs: object) -> None:
        if tag != "meta":
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: object) -> None:
        pass

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def test_the_page_shows_every_number_and_needs_nothing_else() -> None:
    data = made()
    row = report.find(data, section="decode", what="collogue", format="none", norm=True, tokens=8)[0]
    row |= {"us": 3.21, "low_us": 3.0, "high_us": 3.4}
    lost = report.find(data, section="large", what="collogue", tokens=256, format="nvfp4/128x4")[0]
    lost |= {"us": None, "share": None, "error": "CompileError: <no>"}
    text = page.page({**data, "commit": "abc", "method": "slope < all"})
    parser = Balanced()
    parser.feed(text)
    assert parser.open == []
    assert "<td>3.21</td>" in text
    assert "CompileError: &lt;no&gt;" in text
    assert "Collogue, norm: 3.21 at 8 (3 to 3.4)" in text
    assert text.count("<svg") == 2 * (1 + 3 + 1 + 3)  # times and shares: decode; hidden sizes at three T; large, and at three hidden sizes
    assert not re.search(r"(src|href)=|@import|url\(", text)  # one file
    assert all(svg.count('stroke-width="1.8"') <= 6 for svg in re.findall(r"<svg.*?</svg>", text, re.DOTALL))
    assert "prefers-color-scheme: dark" in text
    for section in ("decode, world 2, bfloat16", "hidden size, world 2, bfloat16", "large, world 2, bfloat16", "Wire, host, compiler"):
        assert f"<h2>{section}</h2>" in text


def test_every_kind_of_call_has_its_own_lower_bound() -> None:
    data = made()
    for row in report.find(data, section="large", operation="sharded", tokens=256):
        row |= {"floor_us": 1.0, "share": 0.5}
    text = page.page(data)
    large = text[text.index("<h2>large, world 2") :]
    assert "Collogue, sharded, nvfp4/128x4: 0.5 at 256" in large
    assert "Collogue, norm: 0.5 at 256" not in large


def test_a_call_below_its_lower_bound_is_a_bug_of_the_bound() -> None:
    """The run fails, says so, and has no page."""
    data = made()
    assert report.passed(data)
    row = next(row for row in data["cases"] if row["what"] == "collogue")
    row |= {"us": row["floor_us"] / 1.01, "share": 1.01}
    assert not report.passed(data)
    assert "BELOW ITS LOWER BOUND none T=1 H=7168 world 2" in report.text(data)
    with pytest.raises(CollogueError, match="1 calls took less than their lower bound: none T=1"):
        page.page(data)


def test_eager_calls_have_no_lower_bound() -> None:
    """Their exchange is called from Python, too."""
    rows = [{**row, "host_us": 1.0} for row in fake_rank(2)["rows"]]
    wire = fake_rank(2)["wire"]
    assert {row["floor_us"] for row in report.add_floors(rows, wire)} == {None}
    assert {row["share"] is None for row in report.add_floors(fake_rank(2)["rows"], wire) if row["what"] == "collogue"} == {False}


def test_the_page_opens_with_the_speed_up() -> None:
    data = made()
    assert "headline" not in page.page(data).split("<body>")[1]  # nothing to compare with
    for tokens, us in ((1, 9.0), (64, 30.0)):
        (own,) = report.find(data, section="decode", what="collogue", format="none", norm=True, keep_norm=False, tokens=tokens)
        own["us"] = 3.0
        data["cases"].append({**own, "what": NCCL + COMPILED, "us": us})
    text = page.page(data)
    headline = text.index('<p class="headline">')
    assert headline < text.index("<table>") < text.index("<svg") < text.index("<h2>This run</h2>")
    assert "<b>3.0x as fast at 1 token and 10.0x at 64 tokens</b>" in text
    assert "<td>over NCCL + compiled norm</td><td>3.00x</td><td>10.00x</td>" in text
    assert "over NCCL + compiled norm: 10 at 64 (10 to 10)" in text
    (first,) = report.find(data, what=NCCL + COMPILED, tokens=1)
    data["cases"].append({**first, "what": FLASHINFER_EARLY, "us": 4.5})
    text = page.page(data)
    assert "<td>over FlashInfer</td><td>1.50x</td><td>-</td>" in text
    assert "<b>1.5x as fast at 1 token and 10.0x at 64 tokens</b> as the fastest of the other libraries" in text


def test_libraries_that_are_not_installed_are_one_line() -> None:
    data = made()
    row = report.find(data, section="decode", what=NCCL)[0]
    row |= {"us": None, "error": "ModuleNotFoundError: No module named 'nccl'"}
    text = page.page(data)
    assert f"Not measured, because not installed: {NCCL}." in text
    assert 'class="no">no number' not in text


def test_changes_beyond_the_noise_are_told() -> None:
    before, after = made(), made()
    rows = [report.find(after, section="decode", what="collogue", format="none", norm=True, tokens=t)[0] for t in (1, 2, 4, 8)]
    for r, factor in zip(rows[:3], (1.5, 0.5, 1.01), strict=True):
        for name in ("us", "low_us", "high_us"):
            r[name] *= factor
    rows[3] |= {"us": None, "error": "wrong"}
    changes = regression.compare(before, after)
    assert len(changes) == len(after["cases"])
    found = {c.key[2]: c for c in changes if c.name == "none" and c.key[0] == "decode"}
    assert [found[t].verdict for t in (1, 2, 4, 8, 16)] == ["slower", "faster", "same", "no number", "same"]
    assert found[1].ratio == pytest.approx(1.5)
    assert found[1].noise == pytest.approx(0.1 / 5.15, rel=0.01)
    assert [c.verdict for c in changes[:3]] == ["no number", "slower", "faster"]
    assert regression.counts(changes) == f"1 slower, 1 faster, {len(changes) - 3} same, 1 no number"
    text = page.page(after, before, names=("a.json", "b.json"))
    assert '<td class="slower">slower</td>' in text
    assert '<td class="no">no number</td>' in text


def test_rows_of_one_file_only_are_left_out() -> None:
    before, after = made(), made()
    del before["cases"][3]
    assert len(regression.compare(before, after)) == len(after["cases"]) - 1


def call(*arguments: str) -> Any:
    return CliRunner().invoke(app, ["bench", "report", *arguments], env={"COLUMNS": "80", "NO_COLOR": "1", "TERM": "dumb"})


def test_the_command(tmp_path: Path) -> None:
    first, second, output = tmp_path / "a.json", tmp_path / "b.json", tmp_path / "page.html"
    first.write_text(json.dumps(made()))
    slower = copy.deepcopy(made())
    for row in slower["cases"]:
        row |= {name: row[name] * 2 for name in ("us", "low_us", "high_us")}
    second.write_text(json.dumps(slower))
    assert call(str(first), "--output", str(output)).exit_code == OK
    assert "What changed" not in output.read_text()
    result = call(str(first), str(second), "--output", str(output))
    assert f"{len(slower['cases'])} slower, 0 faster" in result.stdout
    assert "before: a.json" in output.read_text()
    other = made()
    other["cases"] = [{**row, "hidden_size": 8} for row in other["cases"]]
    (tmp_path / "d.json").write_text(json.dumps(other))
    result = call(str(first), str(tmp_path / "d.json"), "--output", str(output))
    assert (result.exit_code, "have no call in common" in " ".join(result.stderr.split())) == (USAGE, True)
    (tmp_path / "c.json").write_text("{}")
    assert call(str(tmp_path / "c.json")).exit_code == USAGE
    assert call("no-such-file.json").exit_code == USAGE
    assert call(str(first), "--output", "no/such/folder/page.html").exit_code == USAGE


@pytest.mark.parametrize("file", sorted((ROOT / "benchmarks" / "results").glob("*.json")), ids=lambda f: f.name)
def test_every_committed_file_has_a_page_or_is_refused(file: Path, tmp_path: Path) -> None:
    result = call(str(file), "--output", str(tmp_path / "page.html"))
    with_pages = ("latency", "model", "serving", "suites", "flashinfer-2x")
    assert result.exit_code == (OK if file.name.startswith(with_pages) else USAGE)


@pytest.mark.parametrize("file", sorted((ROOT / "benchmarks" / "results").glob("model*.json")), ids=lambda f: f.name)
def test_layer_stacks_have_bars(file: Path) -> None:
    data = json.loads(file.read_text())
    text = page.page(data)
    gains = tables.layer_gains(data)
    assert text.count("<rect") == sum(map(len, gains.values())) + len({size for sizes in gains.values() for size in sizes})
    assert all(f"<title>{name}, {size}: {gain:.3g}" in text for name, sizes in gains.items() for size, gain in sizes.items())


@pytest.mark.parametrize("text", ["{", "[]", "", '{"machine": {}, "cases": [{}]}'])
def test_what_holds_no_results_is_refused(text: str, tmp_path: Path) -> None:
    (tmp_path / "bad.json").write_text(text)
    result = call(str(tmp_path / "bad.json"))
    assert result.exit_code == USAGE
    assert "bad.json is not a result of" in result.stderr


@pytest.mark.parametrize("lost", ["versions", "machine", "host"])
def test_a_file_that_is_damaged_inside_is_refused(lost: str, tmp_path: Path) -> None:
    data = json.loads((ROOT / "benchmarks" / "results" / "latency-2xh200.json").read_text())
    (tmp_path / "bad.json").write_text(json.dumps(data | {lost: None}))
    for rest in ((), (str(tmp_path / "bad.json"),)):
        result = call(str(tmp_path / "bad.json"), *rest, "--output", str(tmp_path / "page.html"))
        assert result.exit_code == USAGE, result.output
        assert "is damaged inside" in result.stderr


@pytest.mark.parametrize("file", sorted((ROOT / "benchmarks" / "results").glob("latency*.json")), ids=lambda f: f.name)
def test_committed_results_make_a_page(file: Path) -> None:
    data = json.loads(file.read_text())
    text = page.page(data, data, names=("a", "b"))
    assert regression.counts(regression.compare(data, data)).startswith("0 slower, 0 faster")
    assert text.count("<svg") > 6

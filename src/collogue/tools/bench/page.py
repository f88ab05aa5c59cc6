"""``collogue bench report``: one static HTML page from results, with plots, tables and, for two files, a table of regressions."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from html import escape
from typing import Any

from collogue.tools.bench import serving
from collogue.tools.bench.floors import EMPTY
from collogue.tools.bench.names import Row, call_name, label
from collogue.tools.bench.plot import Point, line_chart
from collogue.tools.bench.regression import Change, compare, counts
from collogue.tools.bench.report import number

_STYLE = """
body { font: 15px/1.45 system-ui, sans-serif; color: #1c1c1c; background: #fff; max-width: 1000px; margin: 24px auto; padding: 0 16px; }
h1 { font-size: 24px; } h2 { font-size: 19px; margin-top: 36px; border-bottom: 1px solid #ddd; padding-bottom: 4px; }
svg { width: 100%; height: auto; margin: 8px 0; font: 12px system-ui, sans-serif; }
svg .title { font-weight: 600; font-size: 14px; } svg .grid { stroke: #e4e4e4; } svg .axis { stroke: #555; }
div.table { overflow-x: auto; } table { border-collapse: collapse; font-size: 13px; font-variant-numeric: tabular-nums; }
td, th { padding: 3px 9px; text-align: right; border-bottom: 1px solid #eee; white-space: nowrap; }
th { white-space: normal; vertical-align: bottom; } td:first-child, th:first-child { text-align: left; }
.slower, .no { color: #b00020; font-weight: 600; } .faster { color: #006d3c; font-weight: 600; }
.note { color: #555; font-size: 13px; } dt { font-weight: 600; float: left; clear: left; width: 130px; } dd { margin-left: 140px; }
"""
_FLOOR = "floor"


def page(data: dict[str, Any], before: dict[str, Any] | None = None, *, names: tuple[str, str] = ("", "")) -> str:
    """The page of ``data``; with ``before``, it starts with what changed. ``names`` of the two files: of ``before``, then of ``data``."""
    gpus = data["machine"]["gpus"]
    title = f"Collogue on {len(gpus)} x {gpus[0]}" if gpus else "Collogue"
    body = [f"<h1>{escape(title)}</h1>", _about(data)]
    if before is not None:
        body += _regressions(compare(before, data), names, before)
    if data.get("benchmark") == "serving":
        body += _serving(data)
    cases = data.get("cases", ())
    for section, world, dtype in dict.fromkeys((r["section"], r["world_size"], r["dtype"]) for r in cases):
        rows = [r for r in cases if (r["section"], r["world_size"], r["dtype"]) == (section, world, dtype)]
        body += _section(f"{section}, world {world}, {dtype}", rows)
    body += _others(data)
    if data.get("method"):
        body.append(f'<h2>Method</h2>\n<p class="note">{escape(data["method"])}</p>')
    head = f'<meta charset="utf-8"><meta name="viewport" content="width=device-width">\n<title>{escape(title)}</title>'
    return (
        f"<!doctype html>\n<html lang='en'>\n<head>{head}\n<style>{_STYLE}</style></head>\n<body>\n"
        + "\n".join(body)
        + "\n</body></html>\n"
    )


def _about(data: dict[str, Any]) -> str:
    versions = data.get("versions", {})
    facts = {
        "commit": data.get("commit"),
        "date": data.get("date"),
        "versions": ", ".join(f"{name} {version}" for name, version in versions.items() if version),
        "passed": "every number of Collogue's is there, and its outputs are right" if data.get("passed") else "no: something has no number",
    }
    return "<dl>" + "".join(f"<dt>{name}</dt><dd>{escape(str(value))}</dd>" for name, value in facts.items() if value) + "</dl>"


def _section(title: str, rows: Sequence[Row]) -> list[str]:
    """Plots and a table; plots for each value of the axis that is not drawn."""
    parts = [f"<h2>{escape(title)}</h2>"]
    hidden, tokens = ({r[name] for r in rows} for name in ("hidden_size", "tokens"))
    x, other = ("tokens", "hidden_size") if len(tokens) >= len(hidden) else ("hidden_size", "tokens")
    words = {"tokens": "tokens T", "hidden_size": "hidden size H"}
    if len({r[x] for r in rows}) > 1:
        order = [_FLOOR, *dict.fromkeys(map(call_name, sorted(rows, key=lambda r: (r["what"] != "collogue", not _is_headline(r)))))]
        for value in sorted({r[other] for r in rows}):
            few = [r for r in rows if r[other] == value and r["us"] and _is_headline(r)]
            at = f"{words[other]} = {value}"
            parts.append(line_chart(f"Latency, {at}", words[x], "microseconds per call", _latencies(few, x), order=order))
            shares = _shares(few, x)
            parts.append(line_chart(f"Share of the floor, {at}", words[x], "floor / latency", shares, order=order, logarithmic=False))
    return [*parts, _table(rows)]


def _is_headline(row: Row) -> bool:
    """Whether the row is in the plots: other libraries, the exchange, and Collogue in a few formats. Tables have all."""
    if row["what"] != "collogue":
        return bool(row["what"] != EMPTY)
    return label(row) in ("none", "nvfp4/128x4", "fp8_static", "sharded, nvfp4/128x4", "sharded, fp8_per_token")


def _latencies(rows: Iterable[Row], x: str) -> dict[str, list[Point]]:
    """Lines by name with their spreads (a slope may come out near zero: no spread reaches below a third), and the floor of the calls that
    send most."""
    found: dict[str, list[Point]] = {}
    floors: dict[float, float] = {}
    for row in rows:
        found.setdefault(call_name(row), []).append(Point(row[x], row["us"], max(row["low_us"], row["us"] / 3), row["high_us"]))
        if row.get("floor_us"):
            floors[row[x]] = max(floors.get(row[x], 0.0), row["floor_us"])
    if floors:
        found[_FLOOR] = [Point(at, us, us, us) for at, us in floors.items()]
    return found


def _shares(rows: Iterable[Row], x: str) -> dict[str, list[Point]]:
    """The floor over the latency of every row that has a floor."""
    found: dict[str, list[Point]] = {}
    for row in rows:
        if row.get("share"):
            found.setdefault(call_name(row), []).append(Point(row[x], row["share"], row["share"], row["share"]))
    return found


def _table(rows: Sequence[Row]) -> str:
    names = list(dict.fromkeys(call_name(r) for r in rows))
    lines = [["H", "T", *names]]
    for hidden, tokens in dict.fromkeys((r["hidden_size"], r["tokens"]) for r in rows):
        found = {call_name(r): r for r in rows if (r["hidden_size"], r["tokens"]) == (hidden, tokens)}
        lines.append([str(hidden), str(tokens), *(number(found.get(name)) for name in names)])
    missing: dict[tuple[str, str], list[str]] = {}
    for r in rows:
        if r["error"]:
            name = call_name(r) if r["what"] == "collogue" else r["what"]
            missing.setdefault((name, r["error"]), []).append(f"T = {r['tokens']}, H = {r['hidden_size']}")
    errors = [f"{name} ({at[0] if len(at) == 1 else f'{len(at)} cases'}): {error}" for (name, error), at in missing.items()]
    notes = "".join(f'<p class="note"><span class="no">no number</span> {escape(text)}</p>' for text in errors)
    return _html_table(lines) + notes


def _serving(data: dict[str, Any]) -> list[str]:
    """The totals and the chunks of ``collogue bench serving``."""
    title, _, head, _, *lines = serving.table(data).splitlines()
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in (head, *lines)]
    chunks = [["chunk", "way", "prompts", "prefills", "decode steps", "output tokens/s"]]
    for r in data["rows"]:
        if r["seconds"] is not None:
            numbers = [str(r[name]) for name in ("prompts", "prefill_steps", "decode_steps")]
            chunks.append([str(r["chunk"]), r["way"], *numbers, f"{r['tokens_per_second']:.0f}"])
    return ["<h2>Serving</h2>", f"<p>{escape(title)}</p>", _html_table(cells), _html_table(chunks)]


def _others(data: dict[str, Any]) -> list[str]:
    """The wire, the host and the compiler."""
    lines = [["what", "value"]]
    for wire in data.get("wire", ()):
        if wire["us"]:
            lines.append([f"wire, world {wire['world_size']}", f"{wire['bytes_sent'] / wire['us'] / 1e3:.0f} GB/s leave each rank"])
    for host in data.get("host", ()):
        if host["us"]:
            lines.append([f"host, world {host['world_size']}, {host['what']}", f"{host['us']:.1f} us per eager call"])
    for compiler in data.get("compile", ()):
        for name in ("cold", "cached"):
            seconds = ", ".join(f"{s:.3f}" for s in compiler[f"{name}_seconds"])
            lines.append([f"kernels ({', '.join(compiler['formats'])}), {name}", f"{seconds} s"])
    return ["<h2>Wire, host, compiler</h2>", _html_table(lines)] if len(lines) > 1 else []


def _regressions(changes: Sequence[Change], names: tuple[str, str], before: dict[str, Any]) -> list[str]:
    lines = [["what", "section", "world", "T", "H", "dtype", "before, us", "after, us", "after / before", "noise", "verdict"]]
    for c in changes:
        section, world, tokens, hidden, dtype = c.key
        numbers = ["-" if us is None else f"{us:.2f}" for us in (c.before, c.after)]
        ratio = ["-" if c.ratio is None else f"{c.ratio:.3f}", "-" if c.noise is None else f"{100 * c.noise:.1f} %"]
        lines.append([c.name, section, str(world), str(tokens), str(hidden), dtype, *numbers, *ratio, c.verdict])
    what = f"before: {names[0]} (commit {before.get('commit')}); after: {names[1]}. {counts(list(changes))}."
    note = "Slower, faster: the two spreads (10th to 90th percentile of the replays) do not overlap. Noise: half the wider spread."
    return ["<h2>What changed</h2>", f"<p>{escape(what)}</p>", f'<p class="note">{note}</p>', _html_table(lines, mark=True)]


def _html_table(lines: Sequence[Sequence[str]], *, mark: bool = False) -> str:
    """``mark``: the last cell names the style of itself."""

    def cells(row: Sequence[str], tag: str) -> str:
        last = f' class="{escape(row[-1].split()[0])}"' if mark and tag == "td" else ""
        return "".join(f"<{tag}{last if i == len(row) - 1 else ''}>{escape(cell)}</{tag}>" for i, cell in enumerate(row))

    head, *rest = lines
    body = "\n".join(f"<tr>{cells(row, 'td')}</tr>" for row in rest)
    return f'<div class="table"><table>\n<thead><tr>{cells(head, "th")}</tr></thead>\n<tbody>\n{body}\n</tbody></table></div>'

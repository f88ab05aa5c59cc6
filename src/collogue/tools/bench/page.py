"""``collogue bench report``: one static HTML page from results, with plots, tables and, for two files, a table of regressions."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from html import escape
from typing import Any

from collogue.errors import CollogueError
from collogue.tools.bench import report, serving, tables
from collogue.tools.bench.cases import COMPILED, FLASHINFER, NCCL, ONE_SHOT, TWO_SHOT
from collogue.tools.bench.floors import EXCHANGE
from collogue.tools.bench.names import Row, call_name, label
from collogue.tools.bench.plot import Point, bar_chart, line_chart
from collogue.tools.bench.regression import Change, compare, counts
from collogue.tools.bench.report import number

_STYLE = """
:root { color-scheme: light dark; --ink: #1c1c1c; --paper: #fff; --faint: #595959; --rule: #e2e2e2; --bad: #b00020; --good: #006d3c; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e8e8e8; --paper: #16181c; --faint: #a4a4a4; --rule: #3a3d44; --bad: #ff7a85; --good: #5fd39a; }
}
body { font: 15px/1.45 system-ui, sans-serif; max-width: 1120px; margin: 24px auto; padding: 0 16px; }
body { color: var(--ink); background: var(--paper); }
h1 { font-size: 24px; } h2 { font-size: 19px; margin-top: 36px; border-bottom: 1px solid var(--rule); padding-bottom: 4px; }
.headline { font-size: 18px; }
.plots { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 460px), 1fr)); gap: 16px; }
svg { width: 100%; max-width: 620px; height: auto; font: 12px system-ui, sans-serif; fill: var(--ink); }
svg .title { font-weight: 600; font-size: 14px; } svg .grid { stroke: var(--rule); } svg .axis { stroke: var(--faint); }
svg .value { font-size: 9px; } svg .bound { stroke-width: 1.2; }
div.table { overflow-x: auto; } table { border-collapse: collapse; font-size: 13px; font-variant-numeric: tabular-nums; }
td, th { padding: 3px 7px; text-align: right; border-bottom: 1px solid var(--rule); white-space: nowrap; }
th { white-space: normal; vertical-align: bottom; }
td:first-child, th:first-child { text-align: left; white-space: normal; min-width: 9em; }
td:first-child, th:first-child { position: sticky; left: 0; background: var(--paper); }
.slower, .no { color: var(--bad); font-weight: 600; } .faster { color: var(--good); font-weight: 600; }
.note { color: var(--faint); font-size: 13px; } .note, dd { overflow-wrap: anywhere; }
dt { font-weight: 600; } dd { margin: 0 0 8px; }
"""
#: Lines of a plot.
_LINES = 6


def page(data: dict[str, Any], before: dict[str, Any] | None = None, *, names: tuple[str, str] = ("", "")) -> str:
    """The page of ``data``; with ``before``, it starts with what changed. ``names`` of the two files: of ``before``, then of ``data``.

    Raises :class:`CollogueError` where a call took less than its lower bound.
    """
    below = report.below_floor(data)
    if below:
        hint = "measure the wire and the exchange again: no share of a wrong bound is drawn"
        raise CollogueError(f"{len(below)} calls took less than their lower bound: {below[0]}", hint=hint)
    gpus = data["machine"]["gpus"]
    title = f"Collogue on {len(gpus)} x {gpus[0]}" if gpus else "Collogue"
    body = [f"<h1>{escape(title)}</h1>", *_headline(data)]
    if before is not None:
        body += _regressions(compare(before, data), names, before)
    if data.get("benchmark") == "serving":
        body += _serving(data)
    if is_model(data):
        body += _layers(data)
    cases = data.get("cases", ())
    for section, world, dtype in dict.fromkeys((r["section"], r["world_size"], r["dtype"]) for r in cases):
        rows = [r for r in cases if (r["section"], r["world_size"], r["dtype"]) == (section, world, dtype)]
        body += _section(f"{section}, world {world}, {dtype}", rows)
    body += _others(data)
    if data.get("method"):
        body.append(f'<h2>Method</h2>\n<p class="note">{escape(data["method"])}</p>')
    body += ["<h2>This run</h2>", _about(data)]
    head = f'<meta charset="utf-8"><meta name="viewport" content="width=device-width">\n<title>{escape(title)}</title>'
    return (
        f"<!doctype html>\n<html lang='en'>\n<head>{head}\n<style>{_STYLE}</style></head>\n<body>\n"
        + "\n".join(body)
        + "\n</body></html>\n"
    )


def _headline(data: dict[str, Any]) -> list[str]:
    """One sentence of ratios, and the table behind it."""
    ratios = report.speedups(data) if data.get("cases") else {}
    if not ratios:
        return []
    best = list(ratios.values())[-1]
    gains = {f"over {name}": exact(row) for name, row in ratios.items() if name != report.FASTEST}
    chart = line_chart("Speed-up of Collogue, norm", "tokens T", "times as fast", gains, logarithmic=False)
    least, most = min(best), max(best)
    tokens = sorted({at for row in ratios.values() for at in row})
    lines = [["speed-up at T =", *map(str, tokens)]]
    lines += [[f"over {name}", *(f"{row[at]:.2f}x" if at in row else "-" for at in tokens)] for name, row in ratios.items()]
    said = f"{best[least]:.1f}x as fast at {least} token{'s' if least > 1 else ''} and {best[most]:.1f}x at {most} tokens"
    what = "as the fastest of the other libraries measured here."
    return [f'<p class="headline">All-reduce + residual + RMSNorm is <b>{said}</b> {what}</p>', _html_table(lines), _plots(chart)]


def exact(values: Mapping[int, float]) -> list[Point]:
    """Points without a spread."""
    return [Point(x, y, y, y) for x, y in sorted(values.items())]


def _plots(*charts: str) -> str:
    return '<div class="plots">' + "\n".join(charts) + "</div>"


def is_model(data: dict[str, Any]) -> bool:
    """Whether these are results of ``collogue bench model``."""
    return {"rows", "layers", "replays"} <= set(data)


def _layers(data: dict[str, Any]) -> list[str]:
    """Whole layers: bars, and all ways of all sizes."""
    gains = tables.layer_gains(data)
    chart = bar_chart("Whole layers: speed-up of Collogue's best way", "over the faster of NCCL and symm. mem.", gains)
    return ["<h2>Layer stacks</h2>", _plots(chart), _html_table([list(row) for row in tables.model(data)])]


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
        order = sorted({call_name(r) for r in rows if _rank(r) < len(_PLOTTED)})
        plots = []
        for value in sorted({r[other] for r in rows}):
            shown = sorted((r for r in rows if r[other] == value and r["us"] and _rank(r) < len(_PLOTTED)), key=_rank)
            names = list(dict.fromkeys(map(call_name, shown)))[:_LINES]
            drawn = [r for r in shown if call_name(r) in names]
            title = f"Latency, {words[other]} = {value}"
            bounds = _by_name(drawn, x, "floor_us")
            plots.append(line_chart(title, words[x], "microseconds per call", _latencies(drawn, x), order=order, bounds=bounds))
            title, shares = f"Share of the lower bound, {words[other]} = {value}", _by_name(drawn, x, "share")
            plots.append(line_chart(title, words[x], "lower bound / time", shares, order=order, logarithmic=False))
        parts.append(_plots(*plots))
    return [*parts, _table(rows)]


#: What plots show, the most important first; a plot has the first of them that were measured. Tables have all.
_PLOTTED = (
    "none",
    f"{NCCL}{COMPILED}, none",
    f"{ONE_SHOT}{COMPILED}, none",
    f"{TWO_SHOT}{COMPILED}, none",
    f"{FLASHINFER}, none",
    "sharded, nvfp4/128x4",
    "nvfp4/128x4",
    NCCL,
    "sharded, fp8_per_token",
    "fp8_static",
    EXCHANGE,
)


def _rank(row: Row) -> int:
    name = label(row)
    return _PLOTTED.index(name) if name in _PLOTTED else len(_PLOTTED)


def _latencies(rows: Iterable[Row], x: str) -> dict[str, list[Point]]:
    """Lines by name with their spreads (a slope may come out near zero: no spread reaches below a third)."""
    found: dict[str, list[Point]] = {}
    for row in rows:
        found.setdefault(call_name(row), []).append(Point(row[x], row["us"], max(row["low_us"], row["us"] / 3), row["high_us"]))
    return found


def _by_name(rows: Iterable[Row], x: str, key: str) -> dict[str, list[Point]]:
    """``key`` of the rows that have it, by name."""
    found: dict[str, dict[int, float]] = {}
    for row in rows:
        if row.get(key):
            found.setdefault(call_name(row), {})[row[x]] = row[key]
    return {name: exact(values) for name, values in found.items()}


def _table(rows: Sequence[Row]) -> str:
    """A table for each hidden size, or for each number of tokens where there are more hidden sizes: a line for each call."""
    sizes = {name: sorted({r[name] for r in rows}) for name in ("hidden_size", "tokens")}
    across, by = ("tokens", "hidden_size") if len(sizes["tokens"]) >= len(sizes["hidden_size"]) else ("hidden_size", "tokens")
    letters = {"hidden_size": "H", "tokens": "T"}
    tables = []
    for value in sizes[by]:
        mine = [r for r in rows if r[by] == value]
        columns = sorted({r[across] for r in mine})
        found = {(call_name(r), r[across]): r for r in mine}
        lines = [[f"microseconds at {letters[by]} = {value}, {letters[across]} =", *map(str, columns)]]
        names = dict.fromkeys(call_name(r) for r in mine if r["us"] or r["what"] == "collogue")
        lines += [[name, *(number(found.get((name, at))) for at in columns)] for name in names]
        tables.append(_html_table(lines))
    missing: dict[tuple[str, str], list[str]] = {}
    for r in rows:
        if r["error"]:
            name = call_name(r) if r["what"] == "collogue" else r["what"]
            missing.setdefault((name, r["error"]), []).append(f"T = {r['tokens']}, H = {r['hidden_size']}")
    absent = [(name, at) for name, at in missing if at.startswith("ModuleNotFoundError")]
    not_there = ", ".join(sorted({name for name, _ in absent}))
    missing = {key: at for key, at in missing.items() if key not in absent}
    errors = [f"{name} ({at[0] if len(at) == 1 else f'{len(at)} cases'}): {error}" for (name, error), at in missing.items()]
    notes = "".join(f'<p class="note"><span class="no">no number</span> {escape(text)}</p>' for text in errors)
    if not_there:
        notes += f'<p class="note">Not measured, because not installed: {escape(not_there)}.</p>'
    return "\n".join(tables) + notes


def _serving(data: dict[str, Any]) -> list[str]:
    """The totals and the chunks of ``collogue bench serving``."""
    title, _, head, _, *lines = serving.table(data).splitlines()
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in (head, *lines)]
    chunks = [["chunk", "way", "prompts", "prefills", "decode steps", "output tokens/s"]]
    for r in data["rows"]:
        if r["seconds"] is not None:
            numbers = [str(r[name]) for name in ("prompts", "prefill_steps", "decode_steps")]
            chunks.append([str(r["chunk"]), r["way"], *numbers, f"{r['tokens_per_second']:.0f}"])
    return ["<h2>Serving</h2>", f"<p>{escape(title)}</p>", _html_table(cells), "<h3>Chunk by chunk</h3>", _html_table(chunks)]


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

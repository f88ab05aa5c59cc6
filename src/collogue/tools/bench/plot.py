"""Line and bar charts as SVG, without a plotting library: what ``collogue bench report`` puts into its page."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape

#: Distinguishable also by people who see few colors; lines beyond them are dashed.
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#56b4e9", "#e69f00", "#4d4d4d", "#8c510a")
#: Pixels: the axes, their margins, and a line of the legend, which stands below. Narrow, so that letters stay legible on a phone.
HEIGHT, WIDTH = 380, 560
_LEFT, _RIGHT, _TOP, _BOTTOM, _LINE = 60, WIDTH - 16, 34, 48, 19
#: Pixels of a bar that has room for its value.
_VALUE = 16


@dataclass(frozen=True)
class Point:
    """One measured point with its spread; ``low`` and ``high`` equal ``y`` where there is none."""

    x: float
    y: float
    low: float
    high: float


@dataclass(frozen=True)
class _Axis:
    """A scale from values to pixels, and where its ticks are."""

    low: float
    high: float
    start: float
    end: float
    logarithmic: bool

    def at(self, value: float) -> float:
        a, b, v = (math.log(x) for x in (self.low, self.high, value)) if self.logarithmic else (self.low, self.high, value)
        return self.start + (v - a) / (b - a) * (self.end - self.start)


def line_chart(
    title: str,
    x_label: str,
    y_label: str,
    series: Mapping[str, Sequence[Point]],
    *,
    order: Sequence[str] | None = None,
    bounds: Mapping[str, Sequence[Point]] | None = None,
    logarithmic: bool = True,
) -> str:
    """An ``<svg>`` of one line for each series, in order, with markers, spreads and a legend. ``""`` if there is no point.

    Args:
        series: points by name; values must be positive on a logarithmic axis.
        order: names in the order of their colors, so that a name has one color in several charts. Default: those of ``series``.
        bounds: lower bounds of series, by their name: thin dashed lines of the same color. Of bounds that are alike one is drawn.
        logarithmic: the y axis; the x axis always is, with a tick at every x that occurs. A linear y axis begins at 0 and marks 1.
    """
    bounds = _unlike({name: bounds[name] for name in series if bounds is not None and name in bounds})
    points = [p for line in (*series.values(), *bounds.values()) for p in line]
    if not points:
        return ""
    xs = sorted({p.x for p in points})
    x = _Axis(xs[0] / 1.15, xs[-1] * 1.15, _LEFT, _RIGHT, True)
    low, high = (min(p.low for p in points), max(p.high for p in points)) if logarithmic else (0.0, max(1.0, max(p.high for p in points)))
    y = _Axis(low / 1.2 if logarithmic else low, high * 1.1, HEIGHT - _BOTTOM, _TOP, logarithmic)
    parts = [
        *_opening(title, HEIGHT + _LINE * (len(series) + bool(bounds))),
        *_frame(x, y, y_label),
        *(part for value in _spaced(xs, x) for part in _tick(x.at(value), y, f"{value:g}")),
        f'<text x="{(x.start + x.end) / 2:.0f}" y="{HEIGHT - 8}" text-anchor="middle">{escape(x_label)}</text>',
        *([] if logarithmic else [_one(y)]),
    ]
    colors = list(order or series)
    for name, line in bounds.items():
        path = _path(sorted(line, key=lambda p: p.x), x, y)
        parts.append(f'<polyline points="{path}" fill="none" stroke="{_color(colors.index(name))}" stroke-dasharray="4 3" class="bound"/>')
    for i, (name, line) in enumerate(series.items()):
        parts += _line(name, sorted(line, key=lambda p: p.x), x, y, HEIGHT + _LINE * i + 6, colors.index(name))
    if bounds:
        top = HEIGHT + _LINE * len(series) + 6
        parts.append(f'<line x1="{_LEFT}" x2="{_LEFT + 22}" y1="{top}" y2="{top}" stroke-dasharray="4 3" class="axis"/>')
        parts.append(
            f'<text x="{_LEFT + 28}" y="{top + 4}">dashed: lower bound of that color&#x27;s call, and of those that send as much</text>'
        )
    return "\n".join([*parts, "</svg>"])


def bar_chart(title: str, y_label: str, groups: Mapping[str, Mapping[str, float]]) -> str:
    """An ``<svg>`` of a group of bars for each name, with a line at 1; their names are the legend. ``""`` if there is no bar."""
    series = list(dict.fromkeys(name for bars in groups.values() for name in bars))
    if not series:
        return ""
    high = max(1.0, *(value for bars in groups.values() for value in bars.values()))
    y = _Axis(0.0, high * 1.1, HEIGHT - _BOTTOM, _TOP, False)
    width = (_RIGHT - _LEFT) / len(groups)
    bar = 0.86 * width / len(series)
    names = [[line for part in name.split(", ") for line in textwrap.wrap(part, int(width / 7))] for name in groups]
    bottom = HEIGHT + 15 * max(0, max(map(len, names)) - 2)
    parts = [*_opening(title, bottom + _LINE * len(series)), *_frame(_Axis(0.0, 1.0, _LEFT, _RIGHT, False), y, y_label)]
    for i, (name, bars) in enumerate(groups.items()):
        left = _LEFT + (i + 0.07) * width
        parts += _tick(_LEFT + (i + 0.5) * width, y, *names[i])
        for j, (label, value) in ((series.index(label), (label, value)) for label, value in bars.items()):
            x, top, said = left + j * bar, y.at(value), f"{name}, {label}: {value:.3g}"
            parts.append(
                f'<rect x="{x:.1f}" y="{top:.1f}" width="{bar - 1:.1f}" height="{y.start - top:.1f}" fill="{_color(j)}">'
                f"<title>{escape(said)}</title></rect>"
            )
            if bar > _VALUE:
                parts.append(f'<text x="{x + bar / 2:.1f}" y="{top - 4:.1f}" text-anchor="middle" class="value">{value:.2f}</text>')
    parts.append(_one(y))
    for j, label in enumerate(series):
        top = bottom + _LINE * j + 6
        parts.append(f'<rect x="{_LEFT}" y="{top - 5}" width="22" height="10" fill="{_color(j)}"/>')
        parts.append(f'<text x="{_LEFT + 28}" y="{top + 4}">{escape(label)}</text>')
    return "\n".join([*parts, "</svg>"])


def _unlike(lines: Mapping[str, Sequence[Point]]) -> dict[str, Sequence[Point]]:
    """The first of those lines that are alike wherever both have a point."""
    kept: dict[str, Sequence[Point]] = {}
    for name, line in lines.items():
        known = [{p.x: p.y for p in other} for other in kept.values()]
        if not any(all(other.get(p.x) == p.y for p in line) for other in known):
            kept[name] = line
    return kept


def _opening(title: str, height: int) -> list[str]:
    """The beginning of a chart that is so high, legend and all."""
    return [
        f'<svg viewBox="0 0 {WIDTH} {height + 6}" role="img" aria-label="{escape(title)}">',
        f'<text x="{_LEFT}" y="18" class="title">{escape(title)}</text>',
    ]


def _color(number: int) -> str:
    return COLOURS[number % len(COLOURS)]


def _one(y: _Axis) -> str:
    """A line at 1."""
    return f'<line x1="{_LEFT}" x2="{_RIGHT}" y1="{y.at(1.0):.1f}" y2="{y.at(1.0):.1f}" class="axis"/>'


def _tick(at: float, y: _Axis, *texts: str) -> list[str]:
    """A tick of the x axis and what stands below it, a line for each text."""
    lines = [f'<text x="{at:.1f}" y="{y.start + 18 + 15 * i}" text-anchor="middle">{escape(text)}</text>' for i, text in enumerate(texts)]
    return [f'<line x1="{at:.1f}" x2="{at:.1f}" y1="{y.start}" y2="{y.start + 4}" class="axis"/>', *lines]


def _frame(x: _Axis, y: _Axis, y_label: str) -> list[str]:
    """Grid, ticks and name of the y axis, and the line of the x axis."""
    parts = []
    for value in _ticks(y):
        at = y.at(value)
        parts.append(f'<line x1="{x.start}" x2="{x.end}" y1="{at:.1f}" y2="{at:.1f}" class="grid"/>')
        parts.append(f'<text x="{x.start - 6}" y="{at + 4:.1f}" text-anchor="end">{value:g}</text>')
    parts.append(f'<line x1="{x.start}" x2="{x.end}" y1="{y.start}" y2="{y.start}" class="axis"/>')
    middle = (y.start + y.end) / 2
    parts.append(f'<text x="14" y="{middle:.0f}" text-anchor="middle" transform="rotate(-90 14 {middle:.0f})">{escape(y_label)}</text>')
    return parts


def _ticks(axis: _Axis) -> list[float]:
    """Round numbers within the axis, a handful of them."""
    if not axis.logarithmic:
        step = 10 ** math.floor(math.log10(axis.high / 2))
        step *= next(m for m in (1, 2, 5, 10) if axis.high / (step * m) <= 7)
        return [step * i for i in range(int(axis.high / step) + 1)]
    decades = range(math.floor(math.log10(axis.low)), math.ceil(math.log10(axis.high)) + 1)
    for steps in ((1, 2, 3, 5, 7), (1, 2, 5), (1,)):
        found = [m * 10.0**d for d in decades for m in steps if axis.low <= m * 10.0**d <= axis.high]
        if len(found) <= 9:
            break
    return found


def _spaced(xs: Sequence[float], axis: _Axis) -> list[float]:
    """The values whose labels do not run into the one before."""
    kept: list[float] = []
    for value in xs:
        if not kept or axis.at(value) - axis.at(kept[-1]) > 40:
            kept.append(value)
    return kept


def _path(points: Sequence[Point], x: _Axis, y: _Axis) -> str:
    return " ".join(f"{x.at(p.x):.1f},{y.at(p.y):.1f}" for p in points)


def _line(name: str, points: Sequence[Point], x: _Axis, y: _Axis, top: int, number: int) -> list[str]:
    """One line, its markers and spreads, and its entry in the legend at ``top``. ``number``: of its color and dashes."""
    color = _color(number)
    dash = ("", "7 4", "2 3")[number // len(COLOURS) % 3]
    style = f'stroke="{color}"' + (f' stroke-dasharray="{dash}"' if dash else "")
    parts = [f'<polyline points="{_path(points, x, y)}" fill="none" {style} stroke-width="1.8"/>'] if points else []
    for p in points:
        at, value = x.at(p.x), f"{name}: {p.y:.3g} at {p.x:g} ({p.low:.3g} to {p.high:.3g})"
        if p.high > p.low:
            parts.append(f'<line x1="{at:.1f}" x2="{at:.1f}" y1="{y.at(p.low):.1f}" y2="{y.at(p.high):.1f}" stroke="{color}"/>')
        parts.append(f'<circle cx="{at:.1f}" cy="{y.at(p.y):.1f}" r="3" fill="{color}"><title>{escape(value)}</title></circle>')
    left = _LEFT
    parts.append(f'<line x1="{left}" x2="{left + 22}" y1="{top}" y2="{top}" {style} stroke-width="2.2"/>')
    parts.append(f'<text x="{left + 28}" y="{top + 4}">{escape(name)}</text>')
    return parts

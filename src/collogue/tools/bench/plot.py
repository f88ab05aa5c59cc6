"""Line charts as SVG, without a plotting library: what ``collogue bench report`` puts into its page."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape

#: Distinguishable also by people who see few colors; lines beyond them are dashed.
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#56b4e9", "#e69f00", "#4d4d4d", "#8c510a")
#: Pixels: the axes, their margins, and a line of the legend, which stands below. Narrow, so that letters stay legible on a phone.
HEIGHT, WIDTH = 380, 560
_LEFT, _RIGHT, _TOP, _BOTTOM, _LINE = 60, WIDTH - 16, 34, 48, 19


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
    logarithmic: bool = True,
) -> str:
    """An ``<svg>`` of one line for each series, in order, with markers, spreads and a legend. ``""`` if there is no point.

    Args:
        series: points by name; values must be positive on a logarithmic axis.
        order: names in the order of their colors, so that a name has one color in several charts. Default: those of ``series``.
        logarithmic: the y axis; the x axis always is, with a tick at every x that occurs.
    """
    points = [p for line in series.values() for p in line]
    if not points:
        return ""
    xs = sorted({p.x for p in points})
    height = HEIGHT
    x = _Axis(xs[0] / 1.15, xs[-1] * 1.15, _LEFT, _RIGHT, True)
    low, high = (min(p.low for p in points), max(p.high for p in points)) if logarithmic else (0.0, max(1.0, max(p.high for p in points)))
    y = _Axis(low / 1.2 if logarithmic else low, high * 1.1, height - _BOTTOM, _TOP, logarithmic)
    parts = [
        f'<svg viewBox="0 0 {WIDTH} {height + _LINE * len(series) + 6}" role="img" aria-label="{escape(title)}">',
        f'<text x="{_LEFT}" y="18" class="title">{escape(title)}</text>',
        *_frame(x, y, xs, x_label, y_label, height),
    ]
    colors = list(order or series)
    for i, (name, line) in enumerate(series.items()):
        parts += _line(name, sorted(line, key=lambda p: p.x), x, y, height + _LINE * i + 6, colors.index(name))
    return "\n".join([*parts, "</svg>"])


def _frame(x: _Axis, y: _Axis, xs: Sequence[float], x_label: str, y_label: str, height: int) -> list[str]:
    """Grid, ticks and names of the axes."""
    parts = []
    for value in _ticks(y):
        at = y.at(value)
        parts.append(f'<line x1="{x.start}" x2="{x.end}" y1="{at:.1f}" y2="{at:.1f}" class="grid"/>')
        parts.append(f'<text x="{x.start - 6}" y="{at + 4:.1f}" text-anchor="end">{value:g}</text>')
    for value in _spaced(xs, x):
        at = x.at(value)
        parts.append(f'<line x1="{at:.1f}" x2="{at:.1f}" y1="{y.start}" y2="{y.start + 4}" class="axis"/>')
        parts.append(f'<text x="{at:.1f}" y="{y.start + 18}" text-anchor="middle">{value:g}</text>')
    parts.append(f'<line x1="{x.start}" x2="{x.end}" y1="{y.start}" y2="{y.start}" class="axis"/>')
    parts.append(f'<text x="{(x.start + x.end) / 2:.0f}" y="{height - 8}" text-anchor="middle">{escape(x_label)}</text>')
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


def _line(name: str, points: Sequence[Point], x: _Axis, y: _Axis, top: int, number: int) -> list[str]:
    """One line, its markers and spreads, and its entry in the legend at ``top``. ``number``: of its color and dashes."""
    color = COLOURS[number % len(COLOURS)]
    dash = ("", "7 4", "2 3")[number // len(COLOURS) % 3]
    style = f'stroke="{color}"' + (f' stroke-dasharray="{dash}"' if dash else "")
    path = " ".join(f"{x.at(p.x):.1f},{y.at(p.y):.1f}" for p in points)
    parts = [f'<polyline points="{path}" fill="none" {style} stroke-width="1.8"/>'] if points else []
    for p in points:
        at, value = x.at(p.x), f"{name}: {p.y:.3g} at {p.x:g} ({p.low:.3g} to {p.high:.3g})"
        if p.high > p.low:
            parts.append(f'<line x1="{at:.1f}" x2="{at:.1f}" y1="{y.at(p.low):.1f}" y2="{y.at(p.high):.1f}" stroke="{color}"/>')
        parts.append(f'<circle cx="{at:.1f}" cy="{y.at(p.y):.1f}" r="3" fill="{color}"><title>{escape(value)}</title></circle>')
    left = _LEFT
    parts.append(f'<line x1="{left}" x2="{left + 22}" y1="{top}" y2="{top}" {style} stroke-width="2.2"/>')
    parts.append(f'<text x="{left + 28}" y="{top + 4}">{escape(name)}</text>')
    return parts

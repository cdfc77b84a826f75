"""Pictures of a part, as SVG: they need no library and stay sharp."""

from __future__ import annotations

import math
from collections.abc import Sequence
from html import escape

from magsd_runtime.benchmarking.plot import COLOURS, FAINT, INK
from magsd_runtime.errors import RESEARCH_USE

from .report import Bars, Curve, number

WIDTH, LEFT, RIGHT, BAR = 820, 290, 120, 18
PANEL, PANEL_WIDTH, PANEL_LEFT, COLUMNS = 250, 410, 62, 2
GRID = "#e3e7eb"
_STEPS = ((1,), (1, 2, 5), (1, 1.5, 2, 3, 4, 5, 7), tuple(step / 10 for step in range(10, 100)))


def bars(title: str, subtitle: str, groups: Sequence[Bars]) -> str:
    """Horizontal bars from 0, each group on an axis of its own: the median, and a line to the end of the middle half.

    Raises
    ------
    ValueError
        If there is no bar.
    """
    if not any(group.values for group in groups):
        raise ValueError("nothing to draw")
    parts: list[str] = []
    y = 66
    for group in groups:
        if not group.values:
            continue
        parts.append(_text(16, y + 4, f"{group.title} ({group.unit})", INK, 13))
        y += 14
        longest = max(max(value, high) for _, value, high in group.values) or 1.0
        for place, (name, value, high) in enumerate(group.values):
            end, tail = (LEFT + amount / longest * (WIDTH - LEFT - RIGHT) for amount in (value, max(value, high)))
            parts.append(_text(LEFT - 10, y + 13, name, INK, anchor="end"))
            parts.append(
                f'<rect x="{LEFT}" y="{y}" width="{max(1.0, end - LEFT):.1f}" height="{BAR}" '
                f'fill="{COLOURS[place % len(COLOURS)]}"/>'
                f'<line x1="{end:.1f}" y1="{y + BAR / 2}" x2="{tail:.1f}" y2="{y + BAR / 2}" stroke="{INK}"/>'
            )
            parts.append(_text(tail + 6, y + 13, number(value), INK))
            y += BAR + 4
        y += 26
    return _page(title, subtitle, WIDTH, y + 20, parts, "bar: median, line: to the end of the middle half of the runs")


def curves(title: str, subtitle: str, drawn: Sequence[Curve]) -> str:
    """A log-log panel a curve: its points with the middle half of the runs, and dashed the growth that is expected.

    Raises
    ------
    ValueError
        If there is no curve.
    """
    if not drawn:
        raise ValueError("nothing to draw")
    parts: list[str] = []
    for place, curve in enumerate(drawn):
        parts += _panel(curve, (place % COLUMNS) * PANEL_WIDTH, 60 + (place // COLUMNS) * PANEL)
    height = 60 + math.ceil(len(drawn) / COLUMNS) * PANEL + 24
    return _page(title, subtitle, WIDTH, height, parts, "dashed: the growth that the work itself asks for")


def _panel(curve: Curve, left: float, top: float) -> list[str]:
    colour = COLOURS[1] if curve.growth.bends else COLOURS[0]
    x0, x1, y0, y1 = left + PANEL_LEFT, left + PANEL_WIDTH - 16, top + 34, top + PANEL - 46
    lows, highs = curve.low or curve.y, curve.high or curve.y
    expected = [curve.y[-1] * (value / curve.x[-1]) ** curve.growth.expected for value in curve.x]
    xs, ys = _Axis(curve.x, x0, x1), _Axis([*curve.y, *lows, *highs], y1, y0)
    parts = [
        _text(left + 14, top + 14, f"{curve.y_label} by {curve.x_label}", INK, 12),
        _text(left + 14, top + 28, f"{curve.name}; x^{curve.growth.whole:.2f}, {curve.growth.verdict}", FAINT, 10),
    ]
    for tick in ys.ticks:
        parts.append(f'<line x1="{x0}" y1="{ys(tick):.1f}" x2="{x1}" y2="{ys(tick):.1f}" stroke="{GRID}"/>')
        parts.append(_text(x0 - 5, ys(tick) + 3, _short(tick), FAINT, 9, anchor="end"))
    for tick in xs.ticks:
        parts.append(f'<line x1="{xs(tick):.1f}" y1="{y0}" x2="{xs(tick):.1f}" y2="{y1}" stroke="{GRID}"/>')
        parts.append(_text(xs(tick), y1 + 13, _short(tick), FAINT, 9, anchor="middle"))
    clipped = [(xs(a), ys(b)) for a, b in zip(curve.x, expected) if ys.low <= b <= ys.high]
    parts.append(_line(clipped, FAINT, ' stroke-dasharray="4 4"'))
    parts.append(_line([(xs(a), ys(b)) for a, b in zip(curve.x, curve.y)], colour, ' stroke-width="2"'))
    for a, b, low, high in zip(curve.x, curve.y, lows, highs):
        parts.append(
            f'<line x1="{xs(a):.1f}" y1="{ys(low):.1f}" x2="{xs(a):.1f}" y2="{ys(high):.1f}" stroke="{INK}"/>'
            f'<circle cx="{xs(a):.1f}" cy="{ys(b):.1f}" r="3" fill="{colour}"/>'
        )
    return parts


class _Axis:
    """A logarithmic axis that holds ``values`` (above 0), from ``start`` to ``end`` in the picture."""

    def __init__(self, values: Sequence[float], start: float, end: float) -> None:
        low, high = math.log10(min(values)), math.log10(max(values))
        room = max(0.08 * (high - low), 0.15)
        self._low, self._high, self._start, self._end = low - room, high + room, start, end
        self.low, self.high = 10**self._low, 10**self._high
        decades = range(math.floor(self._low), math.ceil(self._high) + 1)
        for steps in _STEPS:  # the fewest round values that are enough to read it by
            found = [10.0**decade * step for decade in decades for step in steps]
            self.ticks = [tick for tick in found if self.low <= tick <= self.high]
            if len(self.ticks) >= 3:
                break

    def __call__(self, value: float) -> float:
        share = (math.log10(value) - self._low) / (self._high - self._low)
        return self._start + share * (self._end - self._start)


def _page(title: str, subtitle: str, width: int, height: int, parts: Sequence[str], foot: str) -> str:
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" viewBox="0 0 {width} {height}" '
        'font-family="sans-serif" font-size="12">',
        f'<rect width="{width}" height="{height}" fill="#ffffff"/>',
        _text(16, 22, title, INK, 15),
        _text(16, 40, subtitle, FAINT, 11),
        *parts,
        _text(16, height - 8, f"{foot}. {RESEARCH_USE}", FAINT, 10),
    ]
    return "\n".join([*lines, "</svg>", ""])


def _line(points: Sequence[tuple[float, float]], colour: str, style: str) -> str:
    where = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
    return f'<polyline points="{where}" fill="none" stroke="{colour}"{style}/>'


def _short(value: float) -> str:
    return f"{value:g}" if value < 10_000 else f"{value / 1000:g}k"


def _text(x: float, y: float, text: str, colour: str, size: int = 12, anchor: str = "start") -> str:
    return (
        f'<text x="{x:.1f}" y="{y:.1f}" fill="{colour}" font-size="{size}" text-anchor="{anchor}">{escape(text)}</text>'
    )

"""The benchmark as one picture: milliseconds an image on a logarithmic axis, a bar for the median, a line to the
90th percentile. SVG, so that it needs no library and stays sharp."""

from __future__ import annotations

import math
from html import escape
from typing import Any

from ..errors import RESEARCH_USE

WIDTH, LEFT, RIGHT, BAR, GAP, TOP = 760, 190, 120, 18, 10, 64
# Told apart in print and by most colour-blind readers (Okabe and Ito)
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9")
INK, FAINT = "#1b2733", "#8793a0"


def plot(facts: dict[str, Any]) -> str:
    """The SVG text of a record of ``summary.record``."""
    groups: list[tuple[str, list[tuple[int, dict[str, Any]]]]] = []
    kinds = ["file to prediction", *(f"network, batch {entry['batch']}" for entry in facts["backends"][0]["network"])]
    for place, kind in enumerate(kinds):
        entries = [
            (number, backend["file_to_prediction"] if place == 0 else backend["network"][place - 1])
            for number, backend in enumerate(facts["backends"])
        ]
        groups.append((kind, entries))
    values = [
        entry[key] / (entry["batch"] or 1)
        for _, entries in groups for _, entry in entries for key in ("p50_ms", "p90_ms")
    ]  # fmt: skip
    low, high = 10 ** math.floor(math.log10(min(values))), 10 ** math.ceil(math.log10(max(values) * 1.0001))
    height = TOP + sum(len(entries) * (BAR + 4) + GAP for _, entries in groups) + 46

    def x(milliseconds: float) -> float:
        share = (math.log10(milliseconds) - math.log10(low)) / (math.log10(high) - math.log10(low))
        return LEFT + share * (WIDTH - LEFT - RIGHT)

    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{WIDTH}" height="{height}" viewBox="0 0 {WIDTH} {height}" '
        'font-family="sans-serif" font-size="12">',
        f'<rect width="{WIDTH}" height="{height}" fill="#ffffff"/>',
        _text(16, 22, f"{facts['bundle']['name']} {facts['bundle']['version']}: milliseconds an image", INK, 15),
        _text(16, 40, f"{facts['machine']['processor']}, {facts['machine']['cores']} cores", FAINT),
    ]
    y = TOP
    for tick in _ticks(low, high):
        parts.append(
            f'<line x1="{x(tick):.1f}" y1="{TOP - 8}" x2="{x(tick):.1f}" y2="{height - 40}" stroke="#e3e7eb"/>'
        )
        parts.append(_text(x(tick), height - 24, f"{tick:g} ms", FAINT, anchor="middle"))
    for kind, entries in groups:
        middle = y + (len(entries) * (BAR + 4)) / 2 + 2
        parts.append(_text(LEFT - 12, middle, kind, INK, anchor="end"))
        for number, entry in entries:
            backend, batch = facts["backends"][number], entry["batch"] or 1
            colour = COLOURS[number % len(COLOURS)]
            end, tail = x(entry["p50_ms"] / batch), x(entry["p90_ms"] / batch)
            parts.append(
                f'<rect x="{LEFT}" y="{y}" width="{max(1.0, end - LEFT):.1f}" height="{BAR}" fill="{colour}"/>'
                f'<line x1="{end:.1f}" y1="{y + BAR / 2}" x2="{tail:.1f}" y2="{y + BAR / 2}" stroke="{INK}"/>'
            )
            label = f"{backend['name']}  {entry['p50_ms'] / batch:.3g}"
            parts.append(_text(max(end, tail) + 6, y + 13, label, INK))
            y += BAR + 4
        y += GAP
    parts.append(_text(16, height - 6, f"bar: median, line: to the 90th percentile. {RESEARCH_USE}", FAINT, 10))
    return "\n".join([*parts, "</svg>", ""])


def _ticks(low: float, high: float) -> list[float]:
    decades = round(math.log10(high / low))
    steps = (1, 2, 5) if decades <= 2 else (1,)
    found = [low * 10**decade * step for decade in range(decades) for step in steps]
    return [*found, high]


def _text(x: float, y: float, text: str, colour: str, size: int = 12, anchor: str = "start") -> str:
    return (
        f'<text x="{x:.1f}" y="{y:.1f}" fill="{colour}" font-size="{size}" text-anchor="{anchor}">{escape(text)}</text>'
    )

"""What a part found: as a record for programs, and as text for people."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from .figures import Growth

SCHEMA = "magsd.benchmarks/1"
QUICK = "--quick: one or two runs of everything, to see that it runs. No figure here means anything."


@dataclass(frozen=True)
class Table:
    """``rows``: one text or number for each of ``columns``; None is a cell without a value."""

    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str | float | None, ...], ...]


@dataclass(frozen=True)
class Goal:
    """``measured`` shall be at most ``limit``; ``unit`` is x, s, ms or MB."""

    name: str
    limit: float
    unit: str
    measured: float

    @property
    def met(self) -> bool:
        return self.measured <= self.limit

    def to_dict(self) -> dict[str, Any]:
        return {
            "name": self.name, "at_most": self.limit, "unit": self.unit, "measured": self.measured, "met": self.met,
        }  # fmt: skip


@dataclass(frozen=True)
class Bars:
    """One group of bars: by name the median, and the end of the middle half."""

    title: str
    unit: str
    values: tuple[tuple[str, float, float], ...]


@dataclass(frozen=True)
class Curve:
    """A cost ``y`` against ``x``; ``low`` and ``high``: the middle half of the runs at each x."""

    name: str
    x_label: str
    y_label: str
    x: tuple[float, ...]
    y: tuple[float, ...]
    growth: Growth
    low: tuple[float, ...] = ()
    high: tuple[float, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        found = self.growth
        return {
            "name": self.name, "x": self.x_label, "y": self.y_label,
            "points": [list(point) for point in zip(self.x, self.y)],
            "exponent": found.whole, "exponent_start": found.start, "exponent_end": found.end,
            "expected": found.expected, "verdict": found.verdict,
        }  # fmt: skip


@dataclass(frozen=True)
class Report:
    """``data``: all that was measured, for JSON. ``skipped``: by name, why something was not measured."""

    tables: tuple[Table, ...] = ()
    goals: tuple[Goal, ...] = ()
    bars: tuple[Bars, ...] = ()
    curves: tuple[Curve, ...] = ()
    skipped: Mapping[str, str] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    data: Mapping[str, Any] = field(default_factory=dict)


def record(name: str, report: Report, machine: Mapping[str, Any], *, quick: bool) -> dict[str, Any]:
    """The part as JSON; a quick run judges no goal."""
    return {
        "schema": SCHEMA,
        "part": name,
        "quick": quick,
        "machine": dict(machine),
        "goals": [] if quick else [goal.to_dict() for goal in report.goals],
        "curves": [curve.to_dict() for curve in report.curves],
        "skipped": dict(report.skipped),
        "notes": list(report.notes),
        "data": dict(report.data),
        "research_use_only": True,
    }


def text(title: str, report: Report, machine: str, *, quick: bool) -> str:
    """The part as Markdown, ending with a newline."""
    parts = [f"## {title}", *([QUICK] if quick else []), machine]
    parts += [f"{table.title}\n\n{markdown(table.columns, table.rows)}" for table in report.tables]
    if report.curves:
        parts.append(markdown(CURVE_COLUMNS, [curve_row(curve) for curve in report.curves]))
    if report.goals and not quick:
        parts.append(goals_table(report.goals))
    parts += [f"Not measured: {name}: {reason}" for name, reason in report.skipped.items()]
    return "\n\n".join([*parts, *report.notes]) + "\n"


CURVE_COLUMNS = ("curve", "points", "exponent", "first third", "last third", "expected", "verdict")


def curve_row(curve: Curve) -> tuple[str | float | None, ...]:
    found = curve.growth
    points = f"{number(min(curve.x))} to {number(max(curve.x))}"
    exponents = (f"{value:.2f}" for value in (found.whole, found.start, found.end))
    return (
        f"{curve.y_label} by {curve.x_label}: {curve.name}",
        points,
        *exponents,
        f"{found.expected:g}",
        found.verdict,
    )


def goals_table(goals: Sequence[Goal]) -> str:
    rows = [
        (
            goal.name,
            *(f"{number(value)} {goal.unit}" for value in (goal.limit, goal.measured)),
            "yes" if goal.met else "no",
        )
        for goal in goals
    ]
    return markdown(("goal", "at most", "measured", "met"), rows)


def markdown(columns: Sequence[str], rows: Sequence[Sequence[str | float | None]]) -> str:
    """A table of aligned columns; ``|`` in a cell is escaped, None is ``-``.

    Raises
    ------
    ValueError
        If a row has not one cell for each column.
    """
    cells = [[cell(value) for value in row] for row in rows]
    if any(len(row) != len(columns) for row in cells):
        raise ValueError(f"a row has not {len(columns)} cells: {list(columns)}")
    widths = [max(3, *(len(row[place]) for row in [list(columns), *cells])) for place in range(len(columns))]
    lines = [[name.ljust(width) for name, width in zip(columns, widths)], ["-" * width for width in widths]]
    lines += [[value.ljust(width) for value, width in zip(row, widths)] for row in cells]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def cell(value: str | float | None) -> str:
    if value is None:
        return "-"
    return value.replace("|", "\\|").replace("\n", " ") if isinstance(value, str) else number(value)


def number(value: float) -> str:
    """Three significant digits, whole numbers from 100 on, thousands apart."""
    return f"{value:,.0f}" if abs(value) >= 100 or float(value).is_integer() else f"{value:.3g}"

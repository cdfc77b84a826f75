"""Figures from what was measured. Pure: no clock, no process."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean, quantiles

TOLERANCE = 0.15
"""By how much an exponent may exceed the expected one, for each unit of that, before a curve counts as steep."""
FEWEST = 4
"""Points without which no verdict is given."""


@dataclass(frozen=True)
class Spread:
    """The middle of several runs, and where the middle half of them lies."""

    median: float
    low: float
    high: float
    count: int

    def to_dict(self) -> dict[str, float]:
        return {"median": self.median, "low": self.low, "high": self.high, "count": self.count}


def spread(values: Sequence[float]) -> Spread:
    """Median and quartiles of one value or more."""
    if len(values) == 1:
        return Spread(values[0], values[0], values[0], 1)
    low, middle, high = quantiles(values, n=4, method="inclusive")
    return Spread(middle, low, high, len(values))


def ratio(over: Sequence[float], under: Sequence[float]) -> Spread:
    """``over`` / ``under`` in the same round: what slows a whole round down is in both."""
    return spread([one / other for one, other in zip(over, under, strict=True)])


def exponent(x: Sequence[float], y: Sequence[float]) -> float:
    """The power p of the y = c x^p that fits best: the slope of log y over log x by least squares.

    Raises
    ------
    ValueError
        If there are fewer than two points or different x, or a value is not above 0.
    """
    if len(x) != len(y) or len(set(x)) < 2 or min(*x, *y) <= 0:
        raise ValueError(f"x is {list(x)} and y {list(y)}: expected pairs above 0, with two different x or more")
    u, v = [math.log(value) for value in x], [math.log(value) for value in y]
    centre, level = fmean(u), fmean(v)
    return sum((a - centre) * (b - level) for a, b in zip(u, v)) / sum((a - centre) ** 2 for a in u)


@dataclass(frozen=True)
class Growth:
    """``whole``, ``start``, ``end``: exponents of all points, of the first third and of the last (at least three).
    ``verdict``: one of the texts of :func:`growth`; ``bends``: whether it is the first of them."""

    whole: float
    start: float
    end: float
    expected: float
    verdict: str

    @property
    def bends(self) -> bool:
        return self.verdict == BENDS


BENDS, STEEP, FINE, TOO_FEW = (
    "bends upward",
    "steeper than expected throughout",
    "does not bend upward",
    "too few points",
)


def growth(x: Sequence[float], y: Sequence[float], *, expected: float) -> Growth:
    """How a cost y grows with x, where x^``expected`` is what the work itself asks for.

    The rule: a curve *bends upward* if the exponent of its last third exceeds both ``expected`` and the exponent of
    its first third by more than the tolerance, :data:`TOLERANCE` times ``expected`` (at least 1). A fixed cost that a
    growing one leaves behind (a + b x) turns upward on a log-log plot too, but never beyond ``expected``; so it does
    not count. One that exceeds ``expected`` from the first point on is steep, and does not bend. What is still small
    beside the rest at the last point is not seen: measure far enough.

    Raises
    ------
    ValueError
        As :func:`exponent`.
    """
    points = sorted(zip(x, y, strict=True))
    xs, ys = [point[0] for point in points], [point[1] for point in points]
    whole = exponent(xs, ys)
    if len(points) < FEWEST:
        return Growth(whole, whole, whole, expected, TOO_FEW)
    third = max(3, math.ceil(len(points) / 3))
    start, end = exponent(xs[:third], ys[:third]), exponent(xs[-third:], ys[-third:])
    tolerance = TOLERANCE * max(1.0, expected)
    steep = end > expected + tolerance
    verdict = FINE if not steep else BENDS if end > start + tolerance else STEEP
    return Growth(whole, start, end, expected, verdict)

"""The figures that compare two sides, film by film and in all, against slow and obvious ones."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from magsd_runtime.decision_parity import (
    ALLOWED,
    Seen,
    Totals,
    allowed_between,
    box_overlap,
    compare_film,
    rank_correlation,
)
from magsd_runtime.prediction import Box, Decision, Finding, Prediction


def slow_ranks(values: list[float]) -> list[float]:
    """1 for the smallest; equal values share the mean of the places that they take."""
    return [
        sum(other < value for other in values) + (sum(other == value for other in values) + 1) / 2 for value in values
    ]


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.integers(-3, 3), st.integers(-3, 3)), min_size=2, max_size=12))
def test_rank_correlation_is_that_of_the_ranks(pairs: list[tuple[int, int]]) -> None:
    first, second = [float(a) for a, _ in pairs], [float(b) for _, b in pairs]
    found = rank_correlation(np.array([first]), np.array([second]))
    if len(set(first)) == 1 and len(set(second)) == 1:
        assert found is None
        return
    if len(set(first)) == 1 or len(set(second)) == 1:
        assert found == 0.0
        return
    one, other = slow_ranks(first), slow_ranks(second)
    mean = (len(pairs) + 1) / 2
    above = sum((a - mean) * (b - mean) for a, b in zip(one, other))
    below = math.sqrt(sum((a - mean) ** 2 for a in one) * sum((b - mean) ** 2 for b in other))
    assert found == pytest.approx(above / below, abs=1e-12)


def test_rank_correlation_ignores_scale_and_sees_order() -> None:
    heat = np.random.default_rng(0).random((7, 7))
    assert rank_correlation(heat, np.exp(5 * heat)) == pytest.approx(1.0)
    assert rank_correlation(heat, -heat) == pytest.approx(-1.0)
    with pytest.raises(ValueError, match="expected one shape"):
        rank_correlation(heat, heat[:3])


boxes = st.lists(
    st.tuples(st.integers(0, 8), st.integers(0, 8), st.integers(1, 6), st.integers(1, 6)), min_size=0, max_size=3
)


def as_findings(found: list[tuple[int, int, int, int]]) -> tuple[Finding, ...]:
    return tuple(Finding(Box(x, y, x + w, y + h), 1.0, 0.1) for x, y, w, h in found)


def slow_overlap(first: list[tuple[int, int, int, int]], second: list[tuple[int, int, int, int]]) -> float:
    """Pixel by pixel; pairs are taken off the lists, the one with the largest overlap first."""
    if not first and not second:
        return 1.0

    def pixels(box: tuple[int, int, int, int]) -> set[tuple[int, int]]:
        x, y, w, h = box
        return {(column, row) for column in range(x, x + w) for row in range(y, y + h)}

    left, right, total = list(enumerate(first)), list(enumerate(second)), 0.0
    while left and right:
        best = None
        for a in left:
            for b in right:
                overlap = len(pixels(a[1]) & pixels(b[1])) / len(pixels(a[1]) | pixels(b[1]))
                if best is None or overlap > best[0]:
                    best = (overlap, a, b)
        assert best is not None
        total += best[0]
        left.remove(best[1])
        right.remove(best[2])
    return total / max(len(first), len(second))


@settings(max_examples=80, deadline=None)
@given(boxes, boxes)
def test_box_overlap_is_that_of_the_pixels(first: Any, second: Any) -> None:
    assert box_overlap(as_findings(first), as_findings(second)) == pytest.approx(slow_overlap(first, second))


def prediction(label: str, share: float, positive: bool = True, status: Any = "ok") -> Prediction:
    other = {"a": "b", "b": "a"}[label]
    decision = Decision("a", share if label == "a" else 1 - share, "point", 0.5, positive)
    return Prediction(
        "x", status, label=label, probability=share, probabilities={label: share, other: 1 - share}, decision=decision
    )


def test_the_means_of_a_few_films_decide_only_in_float32() -> None:
    def film(number: int, box: Box) -> Any:
        one, other = (
            replace(prediction("a", 0.6), findings=(Finding(found, 1.0, 0.1),)) for found in (Box(0, 0, 10, 10), box)
        )
        return compare_film(f"film {number}", Seen(one), Seen(other), ALLOWED["fp16"])

    totals = Totals()
    for number in range(19):
        totals.add(film(number, Box(0, 0, 10, 5)))
    assert totals.boxes.mean == pytest.approx(0.5)
    assert totals.failures(ALLOWED["fp16"]) == totals.failures(ALLOWED["int8"]) == []
    assert totals.failures(ALLOWED["fp32"]) == ["the findings' overlap is 0.5000 in the mean, 0.995 is needed"]
    totals.add(film(19, Box(0, 0, 10, 10)))
    assert totals.failures(ALLOWED["fp16"]) == ["the findings' overlap is 0.5250 in the mean, 0.95 is needed"]


def test_a_flip_between_equal_classes_is_a_tie_and_no_flip() -> None:
    allowed, totals = ALLOWED["fp32"], Totals()
    near = compare_film("near", Seen(prediction("a", 0.5005)), Seen(prediction("b", 0.5001)), allowed)
    far = compare_film("far", Seen(prediction("a", 0.52)), Seen(prediction("b", 0.5001)), allowed)
    crossed = compare_film("crossed", Seen(prediction("a", 0.6)), Seen(prediction("a", 0.6, positive=False)), allowed)
    assert (near.tie, far.tie, crossed.tie) == (True, False, False)
    for film in (near, far, crossed):
        totals.add(film)
    assert (totals.flips, totals.ties, totals.crossings) == (1, 1, 1)
    assert totals.labels == pytest.approx(2 / 3)
    assert totals.probability.worst == pytest.approx(0.52 - (1 - 0.5001))
    failures = totals.failures(allowed)
    assert any(line.startswith("labels agree on 0.6667 of 3 films") for line in failures)
    assert any(line.startswith("decisions at the operating point agree on 0.6667") for line in failures)


def test_the_coarser_precision_decides() -> None:
    assert allowed_between("fp16", "fp32") is allowed_between("fp32", "fp16") is ALLOWED["fp16"]
    assert allowed_between("int8", "fp16") is ALLOWED["int8"]
    for strict, loose in (("fp32", "fp16"), ("fp16", "int8")):
        a, b = ALLOWED[strict], ALLOWED[loose]
        assert a.probability < b.probability
        assert all(getattr(a, name) >= getattr(b, name) for name in ("labels", "decisions", "statuses", "boxes"))


def test_films_that_both_refuse_do_not_dilute_a_flip() -> None:
    allowed, totals = ALLOWED["int8"], Totals()
    refused = Seen(Prediction("x", "rejected"))
    for number in range(200):
        totals.add(compare_film(f"no film {number}", refused, refused, allowed))
    assert totals.failures(allowed) == []
    totals.add(compare_film("flipped", Seen(prediction("a", 0.6)), Seen(prediction("b", 0.6, positive=False)), allowed))
    one_sided = compare_film("one-sided", Seen(prediction("a", 0.6)), refused, allowed)
    assert one_sided.crossing
    totals.add(one_sided)
    for number in range(2):
        totals.add(compare_film(f"like {number}", Seen(prediction("a", 0.6)), Seen(prediction("a", 0.6)), allowed))
    assert (totals.films, totals.judged, totals.labelled, totals.decided) == (204, 3, 4, 4)
    assert (totals.labels, totals.decisions) == (0.5, 0.5)
    assert totals.same_statuses == pytest.approx(203 / 204)
    failures = totals.failures(allowed)
    assert [line.partition(" agree")[0] for line in failures[:2]] == ["labels", "decisions at the operating point"]
    assert "0.5000 of 4 films" in failures[0]

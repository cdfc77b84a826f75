"""Temperature, calibration error, intervals and operating points, each against a slow and obvious way to the same."""

from __future__ import annotations

import itertools
import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from magsd_runtime.calibration import (
    MAX_TEMPERATURE,
    MIN_TEMPERATURE,
    effective_patients,
    fit_temperature,
    negative_log_likelihood,
    operating_points,
    probabilities,
    reliability,
    temperature_interval,
    wilson_interval,
)

SHAPES = st.tuples(st.integers(1, 4), st.integers(2, 5))


@given(
    hnp.arrays(np.float32, SHAPES, elements=st.floats(-50, 50, width=32)),
    st.floats(0.1, 10),
)
def test_softmax_equals_the_definition(logits: np.ndarray, temperature: float) -> None:
    result = probabilities(logits, temperature)
    for row, values in zip(result, logits):
        exponents = [math.exp(float(value) / temperature) for value in values]
        for value, exponent in zip(row, exponents):
            assert value == pytest.approx(exponent / math.fsum(exponents), rel=1e-9, abs=1e-300)


@given(
    hnp.arrays(np.float32, SHAPES, elements=st.floats(-(2.0**127), 2.0**127, width=32)),
    st.floats(1e-6, 1e6),
)
def test_any_finite_logits_give_probabilities_in_the_same_order(logits: np.ndarray, temperature: float) -> None:
    result = probabilities(logits, temperature)
    assert np.isfinite(result).all()
    assert result.sum(axis=1) == pytest.approx(np.ones(len(logits)))
    for row, values in zip(result, logits):
        assert row[values.argmax()] == row.max()


@pytest.mark.parametrize("temperature", [0.0, -1.0, float("nan"), float("inf")])
def test_a_senseless_temperature_is_refused(temperature: float) -> None:
    with pytest.raises(ValueError, match="finite number above 0"):
        probabilities(np.zeros((1, 2)), temperature)


# Temperature.


@st.composite
def cases(draw: st.DrawFn) -> tuple[np.ndarray, np.ndarray]:
    """Logits float64 (N, C) and labels (N,), noisy enough that most have a best temperature."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    count, classes = draw(st.integers(6, 40)), draw(st.integers(2, 4))
    labels = rng.integers(0, classes, count)
    logits = rng.normal(0, 1, (count, classes))
    logits[np.arange(count), labels] += draw(st.floats(0, 3))
    return logits * draw(st.sampled_from([0.3, 1.0, 5.0])), labels


def slow_likelihood(logits: np.ndarray, labels: np.ndarray, temperature: float) -> float:
    total = 0.0
    for row, label in zip(logits, labels):
        highest = max(float(value) for value in row)
        log_sum = math.log(math.fsum(math.exp((float(value) - highest) / temperature) for value in row))
        total += log_sum - (float(row[label]) - highest) / temperature
    return total / len(labels)


@given(cases(), st.floats(0.05, 20))
def test_likelihood_equals_its_definition(data: tuple, temperature: float) -> None:
    assert negative_log_likelihood(*data, temperature) == pytest.approx(slow_likelihood(*data, temperature), rel=1e-9)


@settings(max_examples=40, deadline=None)
@given(cases())
def test_no_temperature_of_a_grid_is_better(data: tuple) -> None:
    fit = fit_temperature(*data)
    grid = np.geomspace(MIN_TEMPERATURE, MAX_TEMPERATURE, 2001)
    values = np.array([negative_log_likelihood(*data, float(temperature)) for temperature in grid])
    assert fit.nll_after <= values.min() + 1e-12
    best = int(values.argmin())
    if fit.at_bound:
        assert fit.temperature in (MIN_TEMPERATURE, MAX_TEMPERATURE)
        assert values[best] == pytest.approx(fit.nll_after, abs=1e-9)
    else:
        assert grid[max(best - 1, 0)] <= fit.temperature <= grid[min(best + 1, 2000)]
    assert fit.nll_before == pytest.approx(slow_likelihood(*data, 1.0), rel=1e-9)
    assert fit.nll_after <= fit.nll_before + 1e-12


@given(cases(), st.floats(0.2, 5), st.integers(0, 2**32 - 1))
def test_temperature_follows_the_scale_and_ignores_shifts_and_order(data: tuple, scale: float, seed: int) -> None:
    logits, labels = data
    fit = fit_temperature(logits, labels)
    rng = np.random.default_rng(seed)
    order = rng.permutation(len(labels))
    shifted = (logits + rng.normal(0, 3, (len(labels), 1)))[order] * scale
    other = fit_temperature(shifted, labels[order])
    if not fit.at_bound and MIN_TEMPERATURE < fit.temperature * scale < MAX_TEMPERATURE:
        assert other.temperature == pytest.approx(fit.temperature * scale, rel=1e-6)
        assert other.nll_after == pytest.approx(fit.nll_after, rel=1e-9, abs=1e-12)


@given(cases())
def test_a_fitted_temperature_changes_no_label(data: tuple) -> None:
    logits, labels = data
    result = probabilities(logits, fit_temperature(logits, labels).temperature)
    assert (result.argmax(axis=1) == logits.argmax(axis=1)).all()


def test_a_known_temperature_is_found() -> None:
    rng = np.random.default_rng(3)
    logits = rng.normal(0, 2, (20_000, 3))
    truth = probabilities(logits, 2.5)
    labels = (rng.random((20_000, 1)) > truth.cumsum(axis=1)).sum(axis=1).clip(0, 2)
    assert fit_temperature(logits, labels).temperature == pytest.approx(2.5, rel=0.05)


def test_without_a_best_temperature_the_bound_is_said() -> None:
    logits = np.array([[2.0, 0.0], [0.0, 1.0], [3.0, 1.0]])
    right = fit_temperature(logits, np.array([0, 1, 0]))
    assert (right.temperature, right.at_bound) == (MIN_TEMPERATURE, True)
    wrong = fit_temperature(logits, np.array([1, 0, 1]))
    assert (wrong.temperature, wrong.at_bound) == (MAX_TEMPERATURE, True)
    assert fit_temperature(np.zeros((4, 3)), np.array([0, 1, 2, 0])).at_bound
    huge = fit_temperature(np.array([[1e38, -1e38], [3e38, 0.0]]), np.array([0, 0]))
    assert math.isfinite(huge.nll_after)


@pytest.mark.parametrize(
    ("logits", "labels", "message"),
    [
        (np.zeros((0, 2)), np.zeros(0, int), "expected"),
        (np.zeros((2, 1)), np.zeros(2, int), "expected"),
        (np.zeros((2, 2)), np.zeros(3, int), "expected"),
        (np.zeros((2, 2)), np.array([0, 2]), "not class indices"),
        (np.zeros((2, 2)), np.array([0, -1]), "not class indices"),
        (np.zeros((2, 2)), np.array([0.0, 1.0]), "not class indices"),
        (np.array([[0, np.nan]]), np.array([0]), "not finite"),
    ],
)
def test_senseless_cases_are_refused(logits: np.ndarray, labels: np.ndarray, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        fit_temperature(logits, labels)


def noisy(count: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, 3, count)
    logits = rng.normal(0, 1, (count, 3))
    logits[np.arange(count), labels] += 1
    return logits * 2, labels


def test_temperature_interval_is_about_that_of_leaving_out_each_patient() -> None:
    logits, labels = noisy(300, 5)
    patients = [f"p{number // 2}" for number in range(300)]
    best = fit_temperature(logits, labels).temperature
    low, high = temperature_interval(logits, labels, patients, best)
    assert low < best < high
    names = np.array(patients)
    left_out = np.array([
        math.log(fit_temperature(logits[names != name], labels[names != name]).temperature)
        for name in sorted(set(patients))
    ])  # fmt: skip
    count = len(left_out)
    spread = math.sqrt((count - 1) / count * ((left_out - left_out.mean()) ** 2).sum())
    assert math.log(high / best) == pytest.approx(1.96 * spread, rel=0.1)
    assert math.log(best / low) == pytest.approx(math.log(high / best))


def test_the_same_images_again_are_news_of_another_patient_only() -> None:
    logits, labels = noisy(100, 6)
    names = [f"p{number}" for number in range(100)]
    best = fit_temperature(logits, labels).temperature
    once = temperature_interval(logits, labels, names, best)
    twice, labels_twice = np.concatenate([logits, logits]), np.concatenate([labels, labels])
    assert temperature_interval(twice, labels_twice, names * 2, best) == pytest.approx(once)
    others = temperature_interval(twice, labels_twice, [*names, *(f"q{name}" for name in names)], best)
    assert math.log(others[1] / best) == pytest.approx(math.log(once[1] / best) / math.sqrt(2))


# Calibration error.


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_calibration_error_is_the_weighted_gap_of_the_bins(data: st.DataObject) -> None:
    bins, classes, count = data.draw(st.integers(1, 15)), data.draw(st.integers(2, 4)), data.draw(st.integers(1, 30))
    labels = np.array(data.draw(st.lists(st.integers(0, classes - 1), min_size=count, max_size=count)))
    # whole tenths, so that probabilities fall on the edges of bins and on each other
    cells = st.lists(st.integers(0, 4), min_size=classes, max_size=classes).filter(any)
    values = np.array(data.draw(st.lists(cells, min_size=count, max_size=count)), np.float64)
    values /= values.sum(axis=1, keepdims=True)
    found = reliability(labels=labels, probabilities=values, bins=bins)
    members: list[list[tuple[float, bool]]] = [[] for _ in range(bins)]
    for label, row in zip(labels, values):
        for number in range(bins):
            if np.linspace(0, 1, bins + 1)[number] < row.max() <= np.linspace(0, 1, bins + 1)[number + 1]:
                members[number].append((row.max(), row.argmax() == label))
    error = 0.0
    for row, inside in zip(found["bins"], members):
        assert row["images"] == len(inside)
        if inside:
            confidence = sum(c for c, _ in inside) / len(inside)
            accuracy = sum(right for _, right in inside) / len(inside)
            assert (row["confidence"], row["accuracy"]) == (pytest.approx(confidence), pytest.approx(accuracy))
            error += len(inside) / len(labels) * abs(accuracy - confidence)
    assert found["ece"] == pytest.approx(error, abs=1e-12)


def test_calibration_error_of_nothing_and_of_certainty() -> None:
    assert reliability(labels=np.zeros(0, int), probabilities=np.zeros((0, 2)))["ece"] is None
    sure = np.array([[1.0, 0.0], [0.0, 1.0]])
    assert reliability(labels=np.array([0, 1]), probabilities=sure)["ece"] == 0
    assert reliability(labels=np.array([1, 0]), probabilities=sure)["ece"] == 1


# Operating points.


@given(st.integers(1, 400), st.data())
def test_wilson_interval_is_where_the_score_test_ends(trials: int, data: st.DataObject) -> None:
    """Both ends solve |rate - p| = z sqrt(p (1 - p) / n), found here by halving."""
    successes = data.draw(st.integers(0, trials))
    rate = successes / trials

    def score(p: float) -> float:
        return abs(rate - p) - 1.959963984540054 * math.sqrt(p * (1 - p) / trials)

    def root(inside: float, outside: float) -> float:
        for _ in range(80):
            middle = (inside + outside) / 2
            inside, outside = (inside, middle) if score(middle) > 0 else (middle, outside)
        return inside

    low, high = wilson_interval(rate, trials)
    assert 0 <= low <= rate <= high <= 1
    assert low == pytest.approx(0.0 if successes == 0 else root(rate, 0.0), abs=1e-9)
    assert high == pytest.approx(1.0 if successes == trials else root(rate, 1.0), abs=1e-9)


def test_effective_patients_are_the_patients_where_all_have_as_many_images() -> None:
    assert effective_patients(["a", "b", "c"]) == 3
    assert effective_patients(["a", "a", "b", "b"]) == 2
    assert effective_patients(["a", "a", "a", "b"]) == 16 / 10
    assert effective_patients(["a"] * 50) == 1


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_operating_points_against_every_threshold(data: st.DataObject) -> None:
    count = data.draw(st.integers(2, 25))
    positive = np.array(data.draw(st.lists(st.booleans(), min_size=count, max_size=count)))
    positive[:2] = [True, False]
    # few values, so that many are equal
    scores = np.array(data.draw(st.lists(st.integers(0, 6), min_size=count, max_size=count))) / 6
    patients = [f"p{number}" for number in data.draw(st.lists(st.integers(0, 9), min_size=count, max_size=count))]
    targets = data.draw(st.lists(st.sampled_from([0.1, 0.5, 0.75, 0.9, 0.95, 1.0]), min_size=1, max_size=3))
    points = operating_points(positive=positive, probability=scores, patients=patients, sensitivities=targets)
    assert [point.target for point in points] == targets
    for point in points:
        reached = []
        # every threshold that tells any two sets of images apart
        for threshold in sorted({*scores.tolist(), *((scores + 1e-9).tolist()), 0.0}):
            found = sum(score >= threshold for score, own in zip(scores, positive) if own)
            if found / sum(positive) >= point.target:
                reached.append(threshold)
        assert point.threshold == max(reached)
        called = [score >= point.threshold for score in scores]
        hits = sum(a and b for a, b in zip(called, positive))
        passed = sum(not a and not b for a, b in zip(called, positive))
        assert point.sensitivity == pytest.approx(hits / sum(positive))
        assert point.sensitivity >= point.target
        assert point.specificity == pytest.approx(passed / (count - sum(positive)))
        assert (point.positives, point.negatives) == (sum(positive), count - sum(positive))
        own = [name for name, inside in zip(patients, positive) if inside]
        other = [name for name, inside in zip(patients, positive) if not inside]
        assert (point.positive_patients, point.negative_patients) == (len(set(own)), len(set(other)))
        assert point.sensitivity_ci95 == wilson_interval(point.sensitivity, effective_patients(own))
        assert point.specificity_ci95 == wilson_interval(point.specificity, effective_patients(other))
        assert point.specificity_ci95[0] <= point.specificity <= point.specificity_ci95[1]


@given(st.integers(0, 2**32 - 1))
def test_more_sensitivity_costs_specificity_and_never_raises_the_threshold(seed: int) -> None:
    rng = np.random.default_rng(seed)
    positive = rng.random(60) < 0.5
    positive[:2] = [True, False]
    points = operating_points(
        positive=positive, probability=rng.random(60), patients=[str(n) for n in range(60)],
        sensitivities=(0.5, 0.8, 0.9, 0.95, 1.0),
    )  # fmt: skip
    for one, more in itertools.pairwise(points):
        assert more.threshold <= one.threshold
        assert more.sensitivity >= one.sensitivity
        assert more.specificity <= one.specificity


def test_exact_shares_need_no_case_more() -> None:
    """0.9 of 30 is 27, although 0.9 * 30 in floating point is not."""
    arguments: dict[str, Any] = {
        "positive": np.arange(60) < 30, "probability": np.linspace(1, 0, 60), "patients": [str(n) for n in range(60)],
    }  # fmt: skip
    (point,) = operating_points(**arguments, sensitivities=(0.9,))
    assert point.sensitivity == 27 / 30
    assert point.name == "sensitivity_90"
    (point,) = operating_points(**arguments, sensitivities=(0.975,))
    assert (point.name, point.sensitivity) == ("sensitivity_97.5", 1.0)


def test_operating_points_need_both_kinds_and_a_sensitivity() -> None:
    for positive in (np.ones(3, bool), np.zeros(3, bool)):
        with pytest.raises(ValueError, match="images that are not"):
            operating_points(positive=positive, probability=np.ones(3), patients=["a", "b", "c"])
    for target in (0.0, 1.1, float("nan")):
        with pytest.raises(ValueError, match="more than 0 and at most 1"):
            operating_points(
                positive=np.array([True, False]), probability=np.ones(2), patients=["a", "b"], sensitivities=(target,)
            )

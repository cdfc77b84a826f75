"""Minimums of prediction sets against a slow reference in fractions, and their coverage on exchangeable patients."""

from __future__ import annotations

import math
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from magsd_runtime.calibrating import Cases, calibrate
from magsd_runtime.calibration import probabilities
from magsd_runtime.conformal import members, minimum_probabilities, minimum_probability, patients_for

COVERAGES = ("0.5", "0.8", "0.9", "0.95", "0.99")


def slow(values: list[float], patients: list[str], coverage: str) -> float | None:
    """The largest value that films of enough weight reach, every patient weighing 1 and one more being to come."""
    best = None
    for candidate in values:
        reached = Fraction(0)
        for patient in set(patients):
            own = [value for value, name in zip(values, patients) if name == patient]
            reached += Fraction(sum(value >= candidate for value in own), len(own))
        if reached >= Fraction(coverage) * (len(set(patients)) + 1) and (best is None or candidate > best):
            best = candidate
    return best


@given(
    st.lists(st.tuples(st.integers(0, 12), st.integers(0, 25)), max_size=60),
    st.sampled_from(COVERAGES),
)
def test_as_the_slow_reference_with_ties_and_unequal_patients(films: list[tuple[int, int]], coverage: str) -> None:
    values, patients = [value / 12 for value, _ in films], [str(patient) for _, patient in films]
    assert minimum_probability(np.array(values), patients, float(coverage)) == slow(values, patients, coverage)


@given(st.lists(st.floats(0, 1), min_size=1, max_size=80, unique=True), st.sampled_from(COVERAGES))
def test_one_film_each_is_the_quantile_of_split_conformal(values: list[float], coverage: str) -> None:
    """Rank ceil((n + 1) (1 - alpha)) of the scores 1 - p, smallest first: Angelopoulos and Bates 2021, section 1."""
    rank = math.ceil((len(values) + 1) * Fraction(coverage))
    expected = None if rank > len(values) else sorted(values, reverse=True)[rank - 1]
    names = [str(number) for number in range(len(values))]
    assert minimum_probability(np.array(values), names, float(coverage)) == expected


@pytest.mark.parametrize("coverage", COVERAGES)
def test_the_number_of_patients_from_which_on_there_is_a_minimum(coverage: str) -> None:
    needed = patients_for(float(coverage))
    assert needed == math.ceil(1 / (1 - Fraction(coverage))) - 1
    for count, there in ((needed - 1, False), (needed, True)):
        names = [str(number) for number in range(count)] * 3
        values = np.linspace(0.2, 0.9, len(names))
        assert (minimum_probability(values, names, float(coverage)) is not None) == there
    exactly = [str(number) for number in range(needed)]
    if needed > 1:  # then none of them may be missed
        assert minimum_probability(np.linspace(0.3, 1, needed), exactly, float(coverage)) == 0.3


def test_many_films_of_a_patient_count_one() -> None:
    values = np.array([0.1] * 50 + [0.5 + number / 100 for number in range(19)])
    names = ["one"] * 50 + [f"other {number}" for number in range(19)]
    assert minimum_probability(values, names, 0.9) == 0.5
    assert minimum_probability(values, list(map(str, range(69))), 0.9) == 0.1


def test_coverage_holds_where_films_of_a_patient_are_copies_and_counting_films_would_not() -> None:
    """Exact in each draw: half of the patients have one film, uniform in 0 to 1, half ten copies, in 0.4 to 1."""
    rng = np.random.default_rng(5)
    found: dict[str, list[float]] = {"patients": [], "films": []}
    for _ in range(400):
        sizes = rng.choice([1, 10], 40)
        values = np.repeat(np.where(sizes == 10, rng.uniform(0.4, 1, 40), rng.uniform(0, 1, 40)), sizes)
        patients = [str(number) for number in np.repeat(np.arange(40), sizes)]
        for rule, names in (("patients", patients), ("films", list(map(str, range(len(values)))))):
            least = minimum_probability(values, names, 0.9)
            assert least is not None
            found[rule].append(0.5 * (1 - least) + 0.5 * min(1, (1 - least) / 0.6))
    standard_error = np.std(found["patients"]) / 20
    assert 0.9 - 3 * standard_error <= np.mean(found["patients"]) <= 0.9 + 1 / 41 + 3 * standard_error
    assert np.mean(found["films"]) < 0.8


def test_each_class_is_covered_though_temperature_and_minimums_share_its_cases() -> None:
    """At the smallest number of patients that a temperature is fitted to."""
    rng = np.random.default_rng(2)
    fixed = rng.normal(0, 2, (6000, 3))
    truth = (rng.random((6000, 1)) > probabilities(fixed).cumsum(axis=1)[:, :-1]).sum(axis=1)
    covered = []
    for draw in range(60):
        rows = np.concatenate([rng.choice(np.flatnonzero(truth == index), 20, replace=False) for index in range(3)])
        patients = tuple(f"{draw} {row}" for row in rows)
        cases = Cases(("a", "b", "c"), 3 * fixed[rows], truth[rows], patients, "d" * 64)
        found, _ = calibrate(cases, model_sha256="a" * 64, source="drawn")
        assert found.sets is not None
        others = np.setdiff1d(np.arange(6000), rows)
        inside = members(
            probabilities(3 * fixed[others], found.temperature),
            np.array([found.sets.minimum_probability[name] for name in "abc"]),
        )
        right = inside[np.arange(len(others)), truth[others]]
        covered.append([right[truth[others] == index].mean() for index in range(3)])
    mean = np.mean(covered, axis=0)
    assert (mean > 0.88).all()
    assert (mean < 0.9 + 1 / 21 + 0.02).all()


def test_every_class_has_its_own_minimum_and_one_too_few_leaves_none() -> None:
    rng = np.random.default_rng(0)
    values = rng.dirichlet([1, 1, 1], 90)
    labels = np.repeat([0, 1, 2], 30)
    names = [str(number // 2) for number in range(90)]
    found = minimum_probabilities(values, labels, names, 0.9)
    assert found is not None
    for index in range(3):
        of = labels == index
        assert found[index] == slow(list(values[of, index]), [name for name, one in zip(names, of) if one], "0.9")
    assert minimum_probabilities(values, labels, names, 0.95) is None  # 15 patients of each class, 19 needed
    assert minimum_probabilities(values, np.minimum(labels, 1), names, 0.9) is None  # none of the last class


def test_a_probability_at_the_minimum_is_in_the_set() -> None:
    inside = members(np.array([[0.2, 0.5, 0.3], [0.1, 0.8, 0.1]]), np.array([0.2, 0.6, 0.3]))
    assert inside.tolist() == [[True, False, True], [False, True, False]]

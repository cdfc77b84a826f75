"""Paired tests over folds, against scipy and against slow reference implementations."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import integrate, stats

from reproduction.statistics import MOST_FLIPPED, compare, sign_flip

DIFFERENCES = st.lists(
    st.floats(-1, 1).map(lambda value: round(value, 4)).filter(lambda value: abs(value) > 1e-3), min_size=2, max_size=7
)  # fmt: skip


@settings(max_examples=60, deadline=None)
@given(DIFFERENCES)
def test_the_paired_t_test_is_scipys(differences: list[float]) -> None:
    found = compare(differences, test_to_train=0.25)
    if len(set(differences)) == 1:
        assert (found.p_paired_t, found.p_corrected_t, found.ci95_corrected) == (None, None, None)
        return
    rng = np.random.default_rng(0)
    one = rng.normal(size=len(differences))
    assert found.p_paired_t == pytest.approx(stats.ttest_rel(one + differences, one).pvalue, rel=1e-6, abs=1e-12)
    assert found.mean == pytest.approx(np.mean(differences))
    assert found.std == pytest.approx(np.std(differences, ddof=1))


@pytest.mark.parametrize(
    ("differences", "ratio"), [([0.02, -0.01, 0.03, 0.0, 0.04], 0.3), ([0.5, 0.4], 1.0), ([-0.1, -0.2, -0.3], 0.25)]
)
def test_the_corrected_t_test_is_nadeau_and_bengios(differences: list[float], ratio: float) -> None:
    """Written from Nadeau and Bengio 2003, section 4.1, with the t distribution integrated numerically."""
    n = len(differences)
    mean = sum(differences) / n
    variance = sum((value - mean) ** 2 for value in differences) / (n - 1)
    t = mean / math.sqrt((1 / n + ratio) * variance)
    scale = math.gamma(n / 2) / (math.sqrt((n - 1) * math.pi) * math.gamma((n - 1) / 2))
    inside = integrate.quad(lambda x: scale * (1 + x * x / (n - 1)) ** (-n / 2), -abs(t), abs(t))[0]
    found = compare(differences, test_to_train=ratio)
    assert found.p_corrected_t == pytest.approx(1 - inside, abs=1e-7)
    assert found.p_paired_t is not None
    assert found.p_corrected_t is not None
    assert found.p_corrected_t > found.p_paired_t
    # the interval ends where the test has p = 0.05
    assert found.ci95_corrected is not None
    low, high = found.ci95_corrected
    assert (low + high) / 2 == pytest.approx(mean)
    shifted = compare([value - low for value in differences], test_to_train=ratio)
    assert shifted.p_corrected_t == pytest.approx(0.05)


@settings(max_examples=80, deadline=None)
@given(st.lists(st.integers(-4, 4), min_size=1, max_size=8))
def test_sign_flips_are_all_tried(whole: list[int]) -> None:
    # whole numbers have exact sums, so ties are ties
    patterns = list(itertools.product((1, -1), repeat=len(whole)))
    sums = [abs(sum(s * abs(value) for s, value in zip(signs, whole))) for signs in patterns]
    expected = sum(each >= abs(sum(whole)) for each in sums) / len(patterns)
    assert sign_flip([float(value) for value in whole]) == expected
    # in other units the sums are rounded: the ties must stay
    assert sign_flip([value * 0.1 for value in whole]) == expected


def test_five_folds_cannot_show_what_they_are_asked() -> None:
    found = compare([0.1, 0.2, 0.3, 0.4, 0.5], test_to_train=0.25)
    assert found.p_sign_flip == found.least_p_sign_flip == 0.0625
    assert compare([-value for value in (0.1, 0.2, 0.3, 0.4, 0.5)], test_to_train=0.25).p_sign_flip == 0.0625


def test_too_few_and_too_many() -> None:
    nothing = compare([], test_to_train=0.25)
    assert (nothing.n, nothing.mean, nothing.p_sign_flip) == (0, None, None)
    one = compare([0.1], test_to_train=0.25)
    assert (one.mean, one.std, one.p_paired_t, one.ci95_corrected, one.p_sign_flip) == (0.1, None, None, None, 1.0)
    same = compare([0.0] * 5, test_to_train=0.25)
    assert (same.p_paired_t, same.p_corrected_t, same.p_sign_flip) == (None, None, 1.0)
    # two folds in which two films more were right: no proof of anything
    equal = compare([-2 / 51, 40 / 51 - 42 / 51], test_to_train=0.25)
    assert (equal.p_corrected_t, equal.ci95_corrected, equal.p_sign_flip) == (None, None, 0.5)
    assert sign_flip([0.1] * (MOST_FLIPPED + 1)) is None
    assert sign_flip([1.0] * MOST_FLIPPED) == 2 / 2**MOST_FLIPPED

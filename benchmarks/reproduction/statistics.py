"""Paired comparisons of two models over the folds of a cross-validation, and what few folds can show.

The folds of a cross-validation share most of their training images, so their differences are not independent: the
paired t test takes them as if they were and finds too much. Nadeau and Bengio (Inference for the Generalization Error,
Machine Learning 52, 2003) replace the variance's factor 1/n by 1/n + test/train. The sign-flip test asks only that a
difference and its negative are equally likely; of n folds it cannot give less than 2/2**n.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

MOST_FLIPPED = 20
"""Differences beyond which 2**n sign patterns are too many."""


@dataclass(frozen=True)
class Paired:
    """Differences of ``n`` folds: mean, sample deviation, p values (two-sided), corrected 95 % interval of the mean.

    None where there are too few folds. Without a deviation there is no t test either: a few folds of few films, whose
    scores are multiples of one film, may have equal differences by chance.
    """

    n: int
    mean: float | None
    std: float | None
    p_paired_t: float | None
    p_corrected_t: float | None
    ci95_corrected: tuple[float, float] | None
    p_sign_flip: float | None
    least_p_sign_flip: float | None


def compare(differences: Sequence[float], *, test_to_train: float) -> Paired:
    """All tests of one row of differences; ``test_to_train``: images tested per image trained on, above 0."""
    n = len(differences)
    if not n:
        return Paired(0, None, None, None, None, None, None, None)
    values = np.asarray(differences, np.float64)
    mean, flips = float(values.mean()), sign_flip(differences)
    least = 2.0 / 2**n if n <= MOST_FLIPPED else None
    if n < 2:
        return Paired(n, mean, None, None, None, None, flips, least)
    std = float(values.std(ddof=1))
    if std <= 1e-12:
        return Paired(n, mean, std, None, None, None, flips, least)
    plain, corrected = (std * math.sqrt(factor) for factor in (1 / n, 1 / n + test_to_train))
    half = _quantile(n - 1) * corrected
    return Paired(
        n, mean, std, _two_sided(mean, plain, n - 1), _two_sided(mean, corrected, n - 1),
        (mean - half, mean + half), flips, least,
    )  # fmt: skip


def sign_flip(differences: Sequence[float]) -> float | None:
    """Share of all 2**n sign patterns whose mean is at least as far from 0 as the one found; None for too many."""
    n = len(differences)
    if not 0 < n <= MOST_FLIPPED:
        return None
    magnitudes = np.abs(np.asarray(differences, np.float64))
    sums = np.zeros(1)
    for magnitude in magnitudes:
        sums = np.concatenate([sums + magnitude, sums - magnitude])
    # equal sums may differ in their last bits, by the order of summation
    found = abs(math.fsum(differences)) - 1e-9 * float(magnitudes.sum())
    return float(np.mean(np.abs(sums) >= found))


def _two_sided(mean: float, error: float, degrees: int) -> float:
    from scipy import stats

    return float(2 * stats.t.sf(abs(mean) / error, degrees))


def _quantile(degrees: int) -> float:
    from scipy import stats

    return float(stats.t.ppf(0.975, degrees))

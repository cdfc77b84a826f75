"""Sets of classes that hold the right one at a stated rate: how probable a class must at least be to be in the set.

The set of an image holds each class whose calibrated probability is at least that class's minimum ("least ambiguous
sets", Sadinle, Lei and Wasserman 2019, JASA 114). Each class has a minimum of its own, found on the cases of that
class (Vovk 2012, "Conditional validity of inductive conformal predictors"), so that the coverage holds for the rare
class as for the common one. Measured against other scores in docs/calibration.md.

Films of one patient are alike, so they are not exchangeable, and counting each would promise too much. What is
exchangeable are the patients: each counts 1, its n films of the class 1 / n each, and the patient to come counts 1
beyond all others (Lee, Barber and Willett 2023, "Distribution-free inference with hierarchical data", arXiv
2306.06342). With one film of each patient this is the quantile of rank ceil((n + 1) * coverage) of split conformal
prediction. It says that a film of a new patient is covered, every patient counting once.

How the minimums are kept in a bundle: :mod:`magsd_runtime.prediction_sets`.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

_ROUNDING = 1e-9  # of a patient, for each patient: sums of 1 / n are not exact


def patients_for(coverage: float) -> int:
    """Patients of a class from which on its minimum can be had: coverage / (1 - coverage), rounded up.

    With fewer even a minimum that none of them misses promises too little: a new patient is the least typical of
    n + 1 with a chance of 1 / (n + 1).
    """
    return math.ceil(coverage / (1 - coverage) - _ROUNDING)


def minimum_probability(probability: NDArray[np.floating], patients: Sequence[str], coverage: float) -> float | None:
    """The largest value that enough films reach: None if there are too few patients (:func:`patients_for`).

    ``probability`` (N,) is the calibrated one of the right class, for films of one class; ``patients`` N names;
    0 < ``coverage`` < 1. Enough: their weights sum to coverage * (patients + 1). Equal values fall on the same side.
    """
    films = Counter(patients)
    needed = coverage * (len(films) + 1)
    slack = _ROUNDING * (len(films) + 1)
    values = np.asarray(probability, np.float64)
    order = np.argsort(-values, kind="stable")
    reached = np.cumsum(np.array([1 / films[name] for name in patients])[order])
    enough = np.flatnonzero(reached >= needed - slack)
    return float(values[order[enough[0]]]) if len(enough) else None


def minimum_probabilities(
    probabilities: NDArray[np.floating], labels: NDArray[np.integer], patients: Sequence[str], coverage: float
) -> NDArray[np.float64] | None:
    """The minimum of each class, (C,), from (N, C), (N,) and N names; None if a class has too few patients."""
    minimums = np.empty(probabilities.shape[1])
    for index in range(len(minimums)):
        rows = np.flatnonzero(labels == index)
        of_class = [name for name, label in zip(patients, labels) if label == index]
        found = minimum_probability(probabilities[rows, index], of_class, coverage)
        if found is None:
            return None
        minimums[index] = found
    return minimums


def members(probabilities: NDArray[np.floating], minimums: NDArray[np.floating]) -> NDArray[np.bool_]:
    """Which classes are in the set of each image: (N, C), (C,) -> bool (N, C)."""
    return np.asarray(probabilities) >= np.asarray(minimums)

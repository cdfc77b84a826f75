"""Logits become probabilities that mean what they say: temperature, calibration error, operating points.

Functions of arrays. What a bundle keeps of them: :mod:`magsd_runtime.calibration_record`; which cases they are
given, and when they are refused: :mod:`magsd_runtime.calibrating`.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .calibration_record import RELIABILITY_BINS, OperatingPoint

MIN_TEMPERATURE, MAX_TEMPERATURE = 0.01, 100.0

_NORMAL_95 = 1.959963984540054  # the standard normal's 97.5 percentile
_HALVINGS = 60  # of a range of 9 in the logarithm: to the last bit


def probabilities(logits: NDArray[np.floating], temperature: float = 1.0) -> NDArray[np.float64]:
    """Softmax of ``logits / temperature``: (N, C) -> float64 (N, C), rows sum to 1.

    Finite logits of any size give finite probabilities; the order of classes never depends on the
    temperature. Source: Guo et al. 2017, temperature scaling.

    Raises
    ------
    ValueError
        If the temperature is not a finite positive number.
    """
    if not (temperature > 0 and math.isfinite(temperature)):
        raise ValueError(f"temperature is {temperature}: expected a finite number above 0")
    values = np.asarray(logits, np.float64)
    # The maximum goes first: dividing first could overflow, and inf - inf is not a number
    with np.errstate(over="ignore"):
        exponents = np.exp((values - values.max(axis=-1, keepdims=True)) / temperature)
    return exponents / exponents.sum(axis=-1, keepdims=True)


def negative_log_likelihood(
    logits: NDArray[np.floating], labels: NDArray[np.integer], temperature: float = 1.0
) -> float:
    """Mean of -log p(label) over (N, C) logits and labels (N,), in nats."""
    distance = _from_label(logits, labels) / temperature  # (N, C)
    highest = distance.max(axis=1)
    return float((highest + np.log(np.exp(distance - highest[:, np.newaxis]).sum(axis=1))).mean())


@dataclass(frozen=True)
class TemperatureFit:
    """The temperature of the least negative log likelihood, and that likelihood before (at ``start``) and after.

    ``at_bound``: the likelihood would still improve beyond the range, so the cases do not determine a
    temperature. At the lower bound every case is classified right; at the upper one the logits say nothing.
    """

    temperature: float
    nll_before: float
    nll_after: float
    at_bound: bool


def fit_temperature(logits: NDArray[np.floating], labels: NDArray[np.integer], *, start: float = 1.0) -> TemperatureFit:
    """Fit one temperature, 0.01 to 100, to logits (N, C) and class indices (N,).

    The mean negative log likelihood is convex in 1 / T, so its slope, which grows with 1 / T, is bisected:
    there is no step size, and no start that could be a bad one. Source: Guo et al. 2017, section 4.2.

    Raises
    ------
    ValueError
        If there are no cases, shapes do not fit, a logit is not finite, or a label is no class index.
    """
    distance = _from_label(logits, labels)
    low, high = -math.log(MAX_TEMPERATURE), -math.log(MIN_TEMPERATURE)  # of log(1 / T)
    at_bound = _slope(distance, math.exp(low)) >= 0 or _slope(distance, math.exp(high)) <= 0
    if at_bound:
        temperature = MAX_TEMPERATURE if _slope(distance, math.exp(low)) >= 0 else MIN_TEMPERATURE
    else:
        for _ in range(_HALVINGS):
            middle = (low + high) / 2
            low, high = (low, middle) if _slope(distance, math.exp(middle)) > 0 else (middle, high)
        temperature = math.exp(-(low + high) / 2)
    before, after = (negative_log_likelihood(logits, labels, value) for value in (start, temperature))
    return TemperatureFit(temperature, before, after, at_bound)


def temperature_interval(
    logits: NDArray[np.floating], labels: NDArray[np.integer], patients: Sequence[str], temperature: float
) -> tuple[float, float]:
    """95 % interval of a fitted temperature, in which the images of one patient count as one observation.

    The sandwich variance of the slope's root, summed by patient, on the logarithm of T. It holds for many
    patients; with few it is too narrow.
    """
    distance = _from_label(logits, labels)
    weights = probabilities(distance, temperature)
    means = (weights * distance).sum(axis=1)  # each case's slope
    curvature = float((weights * (distance - means[:, np.newaxis]) ** 2).sum())
    patient = np.unique(np.asarray(patients, dtype=object).astype(str), return_inverse=True)[1]
    spread = math.sqrt(float((np.bincount(patient, weights=means) ** 2).sum()))
    half = _NORMAL_95 * spread / max(curvature, 1e-300) * temperature  # d log(1/T) = T d(1/T)
    half = min(half, 700.0)
    return temperature * math.exp(-half), temperature * math.exp(half)


def reliability(
    *, labels: NDArray[np.integer], probabilities: NDArray[np.floating], bins: int = RELIABILITY_BINS
) -> dict[str, Any]:
    """Expected calibration error of the predicted class, and its reliability bins: ``{"ece", "bins"}``.

    This is the top-label form with equal-width bins (low, high] of the largest probability of each image. The
    error is the mean over images of |accuracy - mean confidence| of their bin, 0 to 1; None without images.
    Source: Guo et al., 2017, Eq. (3).
    """
    confidence = probabilities.max(axis=1) if len(labels) else np.zeros(0)
    correct = probabilities.argmax(axis=1) == labels if len(labels) else np.zeros(0, bool)
    edges = np.linspace(0.0, 1.0, bins + 1)
    index = np.clip(np.searchsorted(edges, confidence, side="left") - 1, 0, bins - 1)
    rows, error = [], 0.0
    for position in range(bins):
        inside = index == position
        row: dict[str, Any] = {"low": float(edges[position]), "high": float(edges[position + 1])}
        row |= {"images": int(inside.sum()), "confidence": None, "accuracy": None}
        if row["images"]:
            row["confidence"], row["accuracy"] = (
                float(confidence[inside].mean()),
                float(correct[inside].mean()),
            )
            error += row["images"] / len(labels) * abs(row["accuracy"] - row["confidence"])
        rows.append(row)
    return {"ece": error if len(labels) else None, "bins": rows}


def wilson_interval(rate: float, trials: float) -> tuple[float, float]:
    """95 % score interval of a rate (0 to 1) seen in ``trials`` (above 0) trials. Source: Wilson 1927."""
    square = _NORMAL_95**2
    centre = (rate + square / (2 * trials)) / (1 + square / trials)
    half = _NORMAL_95 / (1 + square / trials) * math.sqrt(rate * (1 - rate) / trials + square / (4 * trials**2))
    # exact at the ends, which rounding would miss by a hair
    return (0.0 if rate == 0 else max(0.0, centre - half)), (1.0 if rate == 1 else min(1.0, centre + half))


def effective_patients(patients: Sequence[str]) -> float:
    """How many independent cases the images of these patients are at least worth: (sum n)^2 / sum n^2.

    The number of patients where all have equally many images. Source: Kish 1965, for images of one patient
    that are all alike.
    """
    sizes = Counter(patients).values()
    return sum(sizes) ** 2 / sum(size**2 for size in sizes)


def operating_points(
    *,
    positive: NDArray[np.bool_],
    probability: NDArray[np.floating],
    patients: Sequence[str],
    sensitivities: Sequence[float] = (0.90, 0.95),
) -> tuple[OperatingPoint, ...]:
    """For each sensitivity the highest threshold that reaches it: positive where ``probability >= threshold``.

    ``positive`` (N,) says which images are of the class, ``probability`` (N,) is the calibrated one of that class.
    Equal probabilities fall on the same side.

    The intervals are Wilson's, for the share of images but with :func:`effective_patients` as the number of
    trials: the images of one patient are alike, and counting each would promise too much. A bootstrap by patient
    would give [1, 1] where no case is missed, and few positives are what these intervals are for. They take the
    threshold as given; since it was chosen on the same cases, a new case is missed slightly more often.

    ``threshold_ci95`` is what the interval of the sensitivity means for the threshold: the thresholds that reach its
    two ends among these cases. Source: Woodruff 1952, JASA 47, intervals of quantiles in samples of clusters.

    Raises
    ------
    ValueError
        If there is no positive or no negative image, or a sensitivity is not above 0 and at most 1.
    """
    positive = np.asarray(positive, np.bool_)
    values = np.asarray(probability, np.float64)
    if not positive.any() or positive.all():
        raise ValueError("operating points need images that are of the class, and images that are not")
    descending = np.sort(values[positive])[::-1]
    negative = values[~positive]
    names = np.asarray(patients, dtype=object)
    of_positive, of_negative = list(names[positive]), list(names[~positive])
    points = []
    for target in sensitivities:
        if not 0 < target <= 1:
            raise ValueError(f"sensitivity is {target}: expected more than 0 and at most 1")
        total = len(descending)
        threshold = _reaching(descending, target)
        sensitivity = float((descending >= threshold).mean())
        within = wilson_interval(sensitivity, effective_patients(of_positive))
        specificity = float((negative < threshold).mean())
        points.append(
            OperatingPoint(
                name=point_name(target),
                target=float(target),
                threshold=threshold,
                sensitivity=sensitivity,
                sensitivity_ci95=within,
                specificity=specificity,
                specificity_ci95=wilson_interval(specificity, effective_patients(of_negative)),
                positives=total,
                negatives=len(negative),
                positive_patients=len(set(of_positive)),
                negative_patients=len(set(of_negative)),
                threshold_ci95=(_reaching(descending, within[1]), _reaching(descending, within[0])),
            )
        )
    return tuple(points)


def _reaching(descending: NDArray[np.float64], target: float) -> float:
    """The highest of the values that at least the share ``target`` (0 to 1) of them reach."""
    total = len(descending)
    found = next(number for number in range(1, total + 1) if number / total >= target)
    return float(descending[found - 1])


def point_name(target: float) -> str:
    """``sensitivity_90`` for 0.9."""
    return f"sensitivity_{100 * target:g}"


def _from_label(logits: NDArray[np.floating], labels: NDArray[np.integer]) -> NDArray[np.float64]:
    """Each logit minus that of the label: float64 (N, C)."""
    values, index = np.asarray(logits, np.float64), np.asarray(labels)
    if values.ndim != 2 or values.shape[0] == 0 or values.shape[1] < 2 or index.shape != values.shape[:1]:
        raise ValueError(f"logits {values.shape} and labels {index.shape}: expected (N, C) and (N,), N > 0, C > 1")
    if not np.isfinite(values).all():
        raise ValueError("a logit is not finite")
    if index.dtype.kind not in "iu" or index.min() < 0 or index.max() >= values.shape[1]:
        raise ValueError(f"labels are not class indices below {values.shape[1]}")
    return values - values[np.arange(len(values)), index][:, np.newaxis]


def _slope(distance: NDArray[np.float64], inverse: float) -> float:
    """Derivative of the mean negative log likelihood by 1 / T, at 1 / T = ``inverse``."""
    return float((probabilities(distance, 1 / inverse) * distance).sum(axis=1).mean())

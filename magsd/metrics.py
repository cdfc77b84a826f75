"""Classification metrics of section 4.3, their intervals by patient, and ROC curves.

Every function takes its arrays by name: labels and predictions cannot change places.

A class without images has no sensitivity, F1 or ROC AUC, and where all images are of one class it has no
specificity: such values are None (NaN inside arrays), never 0 or 1. Macro means run over the classes that
have images.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

SCORES = ("accuracy", "sensitivity", "specificity", "f1", "auc")

# rows of weights times images that the bootstrap holds at once
_BOOTSTRAP_CELLS = 2_000_000


def confusion_matrix(*, labels: NDArray[np.int64], predicted: NDArray[np.int64], num_classes: int) -> NDArray[np.int64]:
    """Counts int64 (C, C): rows are true classes, columns predicted ones."""
    cells = np.bincount(labels * num_classes + predicted, minlength=num_classes**2)
    return cells.reshape(num_classes, num_classes)


def class_scores(
    *, labels: NDArray[np.int64], predicted: NDArray[np.int64], probabilities: NDArray[np.float64]
) -> list[dict[str, Any]]:
    """One dict a class, that class against the rest: images, accuracy, sensitivity, specificity, f1, auc.

    Shapes: labels (N,), predicted (N,), probabilities (N, C). Equations (8) to (11); None where undefined.
    """
    num_classes = probabilities.shape[1]
    confusion = confusion_matrix(labels=labels, predicted=predicted, num_classes=num_classes)
    one_against_rest = _one_against_rest(confusion)
    rows = []
    for index in range(num_classes):
        row: dict[str, Any] = {"images": int((labels == index).sum())}
        row |= {name: _number(values[index]) for name, values in one_against_rest.items()}
        row["auc"] = roc_auc(positive=labels == index, scores=probabilities[:, index])
        rows.append(row)
    return rows


def classification_scores(
    *, labels: NDArray[np.int64], predicted: NDArray[np.int64], probabilities: NDArray[np.float64]
) -> dict[str, float | None]:
    """Accuracy and the macro means over classes of sensitivity, specificity, F1 and ROC AUC, each 0 to 1.

    Accuracy is the share of images that got their own class, Eq. (8) for two classes. Shapes as in
    :func:`class_scores`. Source: section 4.3.
    """
    if not len(labels):
        return dict.fromkeys(SCORES)
    confusion = confusion_matrix(labels=labels, predicted=predicted, num_classes=probabilities.shape[1])
    scores = {name: _number(value) for name, value in _macro(confusion, confusion.sum(axis=1) > 0).items()}
    return {**scores, "auc": roc_auc_macro(labels=labels, probabilities=probabilities)}


def roc_auc(*, positive: NDArray[np.bool_], scores: NDArray[np.float64]) -> float | None:
    """Area under the ROC curve, 0 to 1; None without both kinds of images or with a score not finite."""
    from sklearn.metrics import roc_auc_score

    if positive.all() or not positive.any() or not np.isfinite(scores).all():
        return None
    return float(roc_auc_score(positive, scores))


def roc_auc_macro(*, labels: NDArray[np.int64], probabilities: NDArray[np.float64]) -> float | None:
    """Mean over the classes that have images of the AUC of each against the rest; None if there is none."""
    areas = [
        roc_auc(positive=labels == index, scores=probabilities[:, index]) for index in range(probabilities.shape[1])
    ]
    defined = [area for area in areas if area is not None]
    return float(np.mean(defined)) if defined else None


@dataclass(frozen=True)
class RocCurve:
    """False and true positive rates (K,) from (0, 0) to (1, 1); ``auc`` is that of the data."""

    name: str
    false_positive_rate: NDArray[np.float64]
    true_positive_rate: NDArray[np.float64]
    auc: float


def roc_curves(
    *, labels: NDArray[np.int64], probabilities: NDArray[np.float64], classes: Sequence[str]
) -> list[RocCurve]:
    """The curve of each class against the rest, then their macro mean (true positive rates averaged)."""
    from sklearn.metrics import roc_curve

    curves: list[RocCurve] = []
    for index, name in enumerate(classes):
        area = roc_auc(positive=labels == index, scores=probabilities[:, index])
        if area is not None:
            false_rate, true_rate, _ = roc_curve(labels == index, probabilities[:, index])
            curves.append(RocCurve(name, false_rate, true_rate, area))
    if not curves:
        return []
    # Where a curve rises vertically both its ends count, so the mean keeps the steps
    grid = np.unique(np.concatenate([curve.false_positive_rate for curve in curves]))
    grid = np.repeat(grid, 2)
    rates = np.mean([_both_sides(curve, grid) for curve in curves], axis=0)
    curves.append(RocCurve("macro mean", grid, rates, float(np.mean([curve.auc for curve in curves]))))
    return curves


def fold_summary(values: Sequence[float | None]) -> dict[str, float | None]:
    """Mean and sample standard deviation (n - 1) of the folds' defined values; None without enough."""
    defined = [value for value in values if value is not None]
    return {
        "value": float(np.mean(defined)) if defined else None,
        "std": float(np.std(defined, ddof=1)) if len(defined) > 1 else None,
    }


def bootstrap_intervals(
    *,
    labels: NDArray[np.int64],
    predicted: NDArray[np.int64],
    probabilities: NDArray[np.float64],
    patients: Sequence[str],
    folds: NDArray[np.int64],
    resamples: int = 1000,
    seed: int = 0,
) -> dict[str, list[float] | None]:
    """95 % percentile intervals of the mean over folds of every score in ``SCORES``.

    Patients, not images, are drawn with replacement, since the images of one patient are alike. A patient
    predicted in several folds is drawn for all of them at once. A resample that leaves a fold's score
    undefined, because a class has lost all its images, is left out of that score. All arrays have N rows;
    None where there are fewer than two patients or no resample has a value.
    """
    names, patient = np.unique(np.asarray(patients, dtype=object).astype(str), return_inverse=True)
    if len(names) < 2 or resamples < 1:
        return dict.fromkeys(SCORES)
    parts = [
        _FoldPart(labels[rows], predicted[rows], probabilities[rows], patient[rows], len(names))
        for rows in (np.flatnonzero(folds == fold) for fold in np.unique(folds))
    ]
    values: dict[str, list[NDArray[np.float64]]] = {name: [] for name in SCORES}
    for weights in patient_weights(len(names), len(labels), resamples=resamples, seed=seed):
        of_folds = [part.scores(weights) for part in parts]
        for name in SCORES:
            values[name].append(_mean_of_defined(np.stack([scores[name] for scores in of_folds])))
    return {name: percentile_interval(np.concatenate(chunks)) for name, chunks in values.items()}


def patient_weights(patients: int, images: int, *, resamples: int, seed: int) -> Iterator[NDArray[np.float64]]:
    """How often each patient is drawn in each resample: float64 (R, P), in chunks that bound memory."""
    rng = np.random.default_rng(seed)
    size = max(1, _BOOTSTRAP_CELLS // max(images, patients))
    shares = np.full(patients, 1 / patients)
    for start in range(0, resamples, size):
        yield rng.multinomial(patients, shares, size=min(size, resamples - start)).astype(np.float64)


def percentile_interval(values: NDArray[np.float64]) -> list[float] | None:
    """The 2.5 and 97.5 percentiles of the defined values; None if there is none."""
    defined = values[np.isfinite(values)]
    return [float(bound) for bound in np.percentile(defined, [2.5, 97.5])] if len(defined) else None


class _FoldPart:
    """One fold's predictions, arranged so that a resample is a product with the patients' weights."""

    def __init__(
        self,
        labels: NDArray[np.int64],
        predicted: NDArray[np.int64],
        probabilities: NDArray[np.float64],
        patient: NDArray[np.int64],
        num_patients: int,
    ) -> None:
        classes = probabilities.shape[1]
        self.num_classes = classes
        # patients (P, C * C): the confusion matrix of each patient's images
        cells = patient * classes**2 + labels * classes + predicted
        self.cells = np.bincount(cells, minlength=num_patients * classes**2).reshape(num_patients, -1)
        self.present = np.bincount(labels, minlength=classes) > 0
        self.ranked = [
            Ranked(labels == index, probabilities[:, index], patient) for index in np.flatnonzero(self.present)
        ]

    def scores(self, weights: NDArray[np.float64]) -> dict[str, NDArray[np.float64]]:
        """Weights (R, P) -> every score (R,), NaN where a resample does not define it."""
        confusion = (weights @ self.cells).reshape(-1, self.num_classes, self.num_classes)
        areas = np.stack([ranked.auc(weights) for ranked in self.ranked])
        return {**_macro(confusion, self.present), "auc": areas.mean(axis=0)}


class Ranked:
    """The images of a fold in the order of one class's scores: weighted ROC AUC by cumulative sums.

    ``positive`` bool (N,), ``scores`` (N,), ``patient`` int64 (N,): a column of the weights.
    """

    def __init__(self, positive: NDArray[np.bool_], scores: NDArray[np.float64], patient: NDArray[np.int64]) -> None:
        order = np.argsort(scores, kind="stable")
        self.patient, self.positive = patient[order], positive[order]
        ordered = scores[order]
        # where a new score begins: equal scores count one half
        self.starts = np.flatnonzero(np.concatenate([[True], ordered[1:] != ordered[:-1]]))

    def counts(self, weights: NDArray[np.float64]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """Weights (R, P) -> pairs of a positive and a negative image in the right order, and all pairs, each (R,)."""
        drawn = weights[:, self.patient]  # (R, n)
        positive = np.add.reduceat(drawn * self.positive, self.starts, axis=1)  # (R, distinct scores)
        negative = np.add.reduceat(drawn * ~self.positive, self.starts, axis=1)
        below = np.cumsum(negative, axis=1) - negative
        wins = (positive * (below + 0.5 * negative)).sum(axis=1)
        return wins, positive.sum(axis=1) * negative.sum(axis=1)

    def auc(self, weights: NDArray[np.float64]) -> NDArray[np.float64]:
        return _ratio(*self.counts(weights))


def _one_against_rest(confusion: NDArray[Any]) -> dict[str, NDArray[np.float64]]:
    """Confusion (..., C, C) -> equations (8) to (11) of each class (..., C), NaN where undefined."""
    true_positive = np.diagonal(confusion, axis1=-2, axis2=-1).astype(np.float64)
    false_negative = confusion.sum(axis=-1) - true_positive
    false_positive = confusion.sum(axis=-2) - true_positive
    total = confusion.sum(axis=(-2, -1))[..., np.newaxis]
    true_negative = total - true_positive - false_negative - false_positive
    f1 = _ratio(2 * true_positive, 2 * true_positive + false_positive + false_negative)
    return {
        "accuracy": _ratio(true_positive + true_negative, np.broadcast_to(total, true_positive.shape)),
        "sensitivity": _ratio(true_positive, true_positive + false_negative),
        "specificity": _ratio(true_negative, true_negative + false_positive),
        # Eq. (11) gives 0 to a class without images once it is predicted, which says nothing about the class
        "f1": np.where(true_positive + false_negative > 0, f1, np.nan),
    }


def _macro(confusion: NDArray[Any], present: NDArray[np.bool_]) -> dict[str, NDArray[np.float64]]:
    """Confusion (..., C, C) -> accuracy and macro means over the ``present`` classes, shape (...)."""
    of_classes = _one_against_rest(confusion)
    correct = np.trace(confusion, axis1=-2, axis2=-1).astype(np.float64)
    means = {name: of_classes[name][..., present].mean(axis=-1) for name in ("sensitivity", "specificity", "f1")}
    return {"accuracy": _ratio(correct, confusion.sum(axis=(-2, -1))), **means}


def _ratio(numerator: NDArray[Any], denominator: NDArray[Any]) -> NDArray[np.float64]:
    """Quotient, NaN where the denominator is 0."""
    numerator, denominator = np.asarray(numerator, np.float64), np.asarray(denominator, np.float64)
    return np.divide(numerator, denominator, out=np.full(numerator.shape, np.nan), where=denominator > 0)


def _mean_of_defined(values: NDArray[np.float64]) -> NDArray[np.float64]:
    """Mean over the first axis of what is not NaN; NaN where nothing is."""
    defined = np.isfinite(values)
    return _ratio(np.where(defined, values, 0.0).sum(axis=0), defined.sum(axis=0))


def _both_sides(curve: RocCurve, grid: NDArray[np.float64]) -> NDArray[np.float64]:
    """True positive rates at ``grid``, where each rate comes twice: the curve's lowest and highest there."""
    rates = np.empty(len(grid))
    false_rate, true_rate = curve.false_positive_rate, curve.true_positive_rate
    first = np.searchsorted(false_rate, grid[::2], side="left")
    last = np.searchsorted(false_rate, grid[::2], side="right") - 1
    on_curve = first <= last
    between = np.interp(grid[::2], false_rate, true_rate)
    rates[::2] = np.where(on_curve, true_rate[np.minimum(first, len(true_rate) - 1)], between)
    rates[1::2] = np.where(on_curve, true_rate[last], between)
    return rates


def _number(value: Any) -> float | None:
    return float(value) if np.isfinite(value) else None

"""Which cases probabilities are calibrated on, and when they are too few to.

    cases = Cases(classes, logits, labels, patients, digest)
    calibration, notes = calibrate(cases, model_sha256=..., source="...", positive="covid19")

The cases must be new to the model: on images that it was trained on it is surer than it should be, and its
calibration would say so of new ones too.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime, timezone

import numpy as np
from numpy.typing import NDArray

from .calibration import (
    fit_temperature,
    negative_log_likelihood,
    operating_points,
    point_name,
    probabilities,
    reliability,
    temperature_interval,
)
from .calibration_record import Calibration, CaseFacts, OperatingPoint, Scores
from .conformal import members, minimum_probabilities, patients_for
from .errors import CalibrationError, UsageError
from .prediction_sets import COVERAGE, MIN_COVERAGE, PredictionSets, SetScores

MIN_PATIENTS = 20
"""Patients of each class from which on a temperature is fitted.

Fewer leave the temperature open by a factor of two and more, and a model that errs less says less about it:
benchmarks/temperature_cases.py, figures in docs/calibration.md. The interval is always given beside the temperature.
"""

MIN_DECISION_PATIENTS = 30
"""Patients with, and patients without, the positive class from which on operating points are chosen.

27 of 30 found is a sensitivity of 0.90 with a 95 % interval of 0.74 to 0.97. With fewer than 20 no case may be
missed for 0.95, and the threshold would hang on the single least typical case.
"""

SENSITIVITIES = (0.90, 0.95)
FOLDS = 5


@dataclass(frozen=True, eq=False)
class Cases:
    """Labelled logits of N images that the model was not trained on.

    ``logits`` (N, C) in the order of ``classes``, ``labels`` int64 (N,) class indices, ``patients`` N names,
    ``digest`` SHA-256 of the manifest that named them.
    """

    classes: tuple[str, ...]
    logits: NDArray[np.floating]
    labels: NDArray[np.int64]
    patients: tuple[str, ...]
    digest: str

    def facts(self) -> CaseFacts:
        return CaseFacts(
            digest=self.digest,
            images=len(self.labels),
            patients=len(set(self.patients)),
            images_per_class={name: int((self.labels == at).sum()) for at, name in enumerate(self.classes)},
            patients_per_class=patients_per_class(
                self.classes, [self.classes[label] for label in self.labels], self.patients
            ),
        )


def patients_per_class(classes: Sequence[str], labels: Sequence[str], patients: Sequence[str]) -> dict[str, int]:
    """How many patients have an image of each class; labels that are no class are left out."""
    found: dict[str, set[str]] = {name: set() for name in classes}
    for label, patient in zip(labels, patients):
        if label in found:
            found[label].add(patient)
    return {name: len(names) for name, names in found.items()}


def require_enough(patients: dict[str, int]) -> None:
    """Refuse cases with fewer than :data:`MIN_PATIENTS` patients of a class, or none of it.

    A temperature is one number for all classes. How sure the model should be of a class that is not among the
    cases they cannot say, so a temperature is fitted to all classes or not at all.

    Raises
    ------
    CalibrationError
        Naming the classes, how many patients each has, and how many are needed.
    """
    few = [f"{name} has {number or 'none'}" for name, number in patients.items() if number < MIN_PATIENTS]
    if few:
        raise CalibrationError(
            f"too few cases to calibrate on: {MIN_PATIENTS} patients of every class of the model are needed, "
            f"and {', '.join(few)}"
        )


def calibrate(
    cases: Cases,
    *,
    model_sha256: str,
    source: str,
    start: float = 1.0,
    positive: str | None = None,
    sensitivities: Sequence[float] = SENSITIVITIES,
    coverage: float = COVERAGE,
) -> tuple[Calibration, list[str]]:
    """Fit a temperature, choose operating points and minimums of prediction sets; also what is to be said about
    them, a line each.

    ``start`` is the temperature before, ``source`` says in words where the cases are from. Operating points are
    for class ``positive`` against the rest; the first of ``sensitivities`` that can be had is the default.
    Without ``positive``, or with too few patients for them, there are none, and a line says so. Likewise for the sets,
    which hold the right class at the rate ``coverage``.

    Raises
    ------
    CalibrationError
        If there are too few cases, or no temperature is the best for them.
    UsageError
        If ``positive`` is no class of the model, or a sensitivity or the coverage is out of range.
    """
    check_wanted(cases.classes, positive, sensitivities, coverage)
    facts = cases.facts()
    require_enough(dict(facts.patients_per_class))
    fit = fit_temperature(cases.logits, cases.labels, start=start)
    if fit.at_bound:
        raise CalibrationError(f"no temperature can be fitted to these {facts.images} images: {_why_none(cases)}")

    calibrated = probabilities(cases.logits, fit.temperature)
    honest, scores, notes = _cross_validated(cases, coverage)
    points, why_not = _points(cases, calibrated, positive, sensitivities)
    sets, why_no_sets = _sets(cases, calibrated, coverage, scores)
    calibration = Calibration(
        temperature=fit.temperature,
        fitted=True,
        source=source,
        created=datetime.now(timezone.utc).isoformat(timespec="seconds"),
        model_sha256=model_sha256,
        data=facts,
        before=_scores(cases, start),
        after=_scores(cases, fit.temperature),
        temperature_ci95=temperature_interval(cases.logits, cases.labels, cases.patients, fit.temperature),
        ece_cross_validated=honest,
        positive_class=positive if points else None,
        operating_points=points,
        default=points[0].name if points else None,
        sets=sets,
    )
    return calibration, notes + why_not + why_no_sets


def check_wanted(
    classes: Sequence[str], positive: str | None, sensitivities: Sequence[float], coverage: float = COVERAGE
) -> None:
    """Refuse a positive class that the model has not, and sensitivities or a coverage that are none.

    Raises
    ------
    UsageError
        Naming the option.
    """
    if positive is not None and positive not in classes:
        raise UsageError(f"--positive is {positive!r}: the model's classes are {', '.join(classes)}")
    for target in sensitivities:
        # at 1 the threshold would be the least typical case ever met, and the next one lies beyond it
        if not 0 < target < 1:
            raise UsageError(f"--sensitivity is {target:g}: expected more than 0 and less than 1")
    if not sensitivities or len({point_name(target) for target in sensitivities}) < len(sensitivities):
        raise UsageError("--sensitivity names none, or one twice: expected for example 0.9,0.95")
    if not MIN_COVERAGE <= coverage < 1:
        raise UsageError(f"--coverage is {coverage:g}: expected {MIN_COVERAGE} or more and less than 1")


def patients_needed(target: float) -> int:
    """Positive patients from which on an operating point of this sensitivity is chosen: one may be missed."""
    return max(MIN_DECISION_PATIENTS, math.ceil(1 / (1 - target) - 1e-9))


def _points(
    cases: Cases, calibrated: NDArray[np.float64], positive: str | None, sensitivities: Sequence[float]
) -> tuple[tuple[OperatingPoint, ...], list[str]]:
    if positive is None:
        return (), [f"no operating points: no class was named by --positive ({', '.join(cases.classes)})"]
    index = cases.classes.index(positive)
    is_positive = cases.labels == index
    names = np.asarray(cases.patients, dtype=object)
    with_it, without_it = len(set(names[is_positive])), len(set(names[~is_positive]))
    if without_it < MIN_DECISION_PATIENTS:
        line = f"no operating points: {without_it} patients have images without {positive}, "
        return (), [line + f"and {MIN_DECISION_PATIENTS} are needed"]
    possible = [target for target in sensitivities if with_it >= patients_needed(target)]
    notes = [
        f"no operating point at sensitivity {target:g}: {with_it} patients have images of {positive}, "
        f"and {patients_needed(target)} are needed"
        for target in sensitivities
        if target not in possible
    ]
    points = operating_points(
        positive=is_positive, probability=calibrated[:, index], patients=cases.patients, sensitivities=possible
    )
    return points, notes


def _sets(
    cases: Cases, calibrated: NDArray[np.float64], coverage: float, scores: SetScores | None
) -> tuple[PredictionSets | None, list[str]]:
    found = minimum_probabilities(calibrated, cases.labels, cases.patients, coverage)
    if found is None:
        needed = patients_for(coverage)
        few = [f"{name} has {count}" for name, count in cases.facts().patients_per_class.items() if count < needed]
        return None, [
            f"no prediction sets at coverage {coverage:g}: {needed} patients of every class are needed, "
            f"and {', '.join(few)}"
        ]
    minimums = {name: float(value) for name, value in zip(cases.classes, found)}
    notes = [] if scores else ["no cross-validated coverage of the prediction sets: too few patients for folds"]
    return PredictionSets(coverage, minimums, scores), notes


def _cross_validated(cases: Cases, coverage: float) -> tuple[float | None, SetScores | None, list[str]]:
    """Calibration error where each patient's images get the temperature of the other folds' patients, and how the
    prediction sets do likewise."""
    folds = np.array([fold_of(patient) for patient in cases.patients])
    calibrated = np.empty(cases.logits.shape)
    inside: NDArray[np.bool_] | None = np.empty(cases.logits.shape, bool)
    for fold in np.unique(folds):
        rest = folds != fold
        # a class that the rest lacks, or a rest that is all right, leaves that fold without a temperature
        if len(np.unique(cases.labels[rest])) < len(cases.classes):
            return None, None, ["no cross-validated calibration error: too few patients for folds"]
        fit = fit_temperature(cases.logits[rest], cases.labels[rest])
        if fit.at_bound:
            return None, None, ["no cross-validated calibration error: a fold's rest determines no temperature"]
        calibrated[~rest] = probabilities(cases.logits[~rest], fit.temperature)
        minimums = minimum_probabilities(
            probabilities(cases.logits[rest], fit.temperature),
            cases.labels[rest],
            [patient for patient, there in zip(cases.patients, rest) if there],
            coverage,
        )
        inside = None if minimums is None or inside is None else inside
        if minimums is not None and inside is not None:
            inside[~rest] = members(calibrated[~rest], minimums)
    scores = None if inside is None else set_scores(cases.classes, cases.labels, calibrated, inside)
    return reliability(labels=cases.labels, probabilities=calibrated)["ece"], scores, []


def set_scores(
    classes: Sequence[str],
    labels: NDArray[np.integer],
    calibrated: NDArray[np.floating],
    inside: NDArray[np.bool_],
) -> SetScores:
    """How sets (N, C) do on images with these class indices (N,), of all classes, and probabilities (N, C)."""
    rows, predicted = np.arange(len(labels)), calibrated.argmax(axis=1)
    right, covered = predicted == labels, inside[rows, labels]
    alone = (inside.sum(axis=1) == 1) & inside[rows, predicted]
    return SetScores(
        images=len(labels),
        coverage=float(covered.mean()),
        coverage_per_class={name: float(covered[labels == at].mean()) for at, name in enumerate(classes)},
        alone=float(alone.mean()),
        accuracy_alone=float(right[alone].mean()) if alone.any() else None,
        accuracy_others=float(right[~alone].mean()) if not alone.all() else None,
    )


def fold_of(patient: str) -> int:
    """Fold 0 to 4 by a hash of the name: it does not depend on who else is among the cases."""
    digest = hashlib.sha256(b"calibration fold\0" + patient.encode("utf-8", "surrogateescape")).digest()
    return int.from_bytes(digest[:8], "big") % FOLDS


def _scores(cases: Cases, temperature: float) -> Scores:
    error = reliability(labels=cases.labels, probabilities=probabilities(cases.logits, temperature))["ece"]
    return Scores(temperature, negative_log_likelihood(cases.logits, cases.labels, temperature), float(error))


def _why_none(cases: Cases) -> str:
    if (cases.logits.argmax(axis=1) == cases.labels).all():
        return "all are classified right, so the surer the better; cases that the model gets wrong are needed"
    return "the model's outputs on them say too little about their labels; are the labels those of its classes?"

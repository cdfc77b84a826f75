"""What a bundle knows of its prediction sets: the field ``prediction_sets`` of its calibration.

How the numbers are found: :mod:`magsd_runtime.conformal`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from .fields import Unusable, count, field, fraction
from .prediction import PredictionSet

METHOD = "least ambiguous, by class, patients weigh the same"
COVERAGE = 0.9
MIN_COVERAGE = 0.5
"""Below one half most sets would be empty."""

_FIELDS = {"method", "coverage", "minimum_probability", "cross_validated"}


@dataclass(frozen=True)
class SetScores:
    """How the sets do on cases whose patients took no part in fitting them; shares of images, 0 to 1.

    ``coverage``: the set holds the right class. ``alone``: it is the label and nothing else; ``accuracy_alone`` is
    how often the label of these is right, ``accuracy_others`` that of the others, None where there are none.
    """

    images: int
    coverage: float
    coverage_per_class: Mapping[str, float]
    alone: float
    accuracy_alone: float | None
    accuracy_others: float | None


@dataclass(frozen=True)
class PredictionSets:
    """A class is in the set of an image if its calibrated probability is at least ``minimum_probability``.

    Of films like those of the calibration the share ``coverage`` have a set that holds the right class: of each
    class, every patient counting once. ``cross_validated``: None where it could not be had.
    """

    coverage: float
    minimum_probability: Mapping[str, float]
    cross_validated: SetScores | None = None

    def of(self, probabilities: Mapping[str, float]) -> PredictionSet:
        """The set of one image from its calibrated probabilities, the most probable class first."""
        inside = [name for name, value in probabilities.items() if value >= self.minimum_probability[name]]
        return PredictionSet(self.coverage, tuple(sorted(inside, key=lambda name: -probabilities[name])))

    def to_dict(self) -> dict[str, Any]:
        scores = self.cross_validated
        return {
            "method": METHOD,
            "coverage": self.coverage,
            "minimum_probability": dict(self.minimum_probability),
            "cross_validated": None
            if scores is None
            else {**asdict(scores), "coverage_per_class": dict(scores.coverage_per_class)},
        }

    @classmethod
    def from_dict(cls, value: Any, classes: Sequence[str]) -> PredictionSets:
        """The inverse of :meth:`to_dict`.

        Raises
        ------
        Unusable
            If a field is missing, senseless or unknown: one that is not understood may change what a set means.
        """
        where = "calibration.prediction_sets."
        if not isinstance(value, dict):
            raise Unusable(f"{where[:-1]} is a {type(value).__name__}")
        if unknown := set(value) - _FIELDS:
            raise Unusable(f"{where}{min(unknown):.40} is unknown to this version: a newer magsd is needed")
        if (method := field(value, "method", str, where)) != METHOD:
            raise Unusable(f"{where}method is {method!r:.60}, expected {METHOD!r}: a newer magsd is needed")
        coverage = fraction(value, "coverage", where)
        if not MIN_COVERAGE <= coverage < 1:
            raise Unusable(f"{where}coverage is {coverage:g}, expected {MIN_COVERAGE} or more and less than 1")
        minimums = _by_class(value, "minimum_probability", classes, where)
        if "cross_validated" not in value or value["cross_validated"] is None:
            return cls(coverage, minimums)
        scores = field(value, "cross_validated", dict, where)
        inside = f"{where}cross_validated."
        return cls(
            coverage,
            minimums,
            SetScores(
                count(scores, "images", inside),
                fraction(scores, "coverage", inside),
                _by_class(scores, "coverage_per_class", classes, inside),
                fraction(scores, "alone", inside),
                *(
                    None if scores.get(name) is None else fraction(scores, name, inside)
                    for name in ("accuracy_alone", "accuracy_others")
                ),
            ),
        )


def _by_class(holder: dict[str, Any], name: str, classes: Sequence[str], where: str) -> dict[str, float]:
    values = field(holder, name, dict, where)
    if set(values) != set(classes):
        raise Unusable(f"{where}{name} names other classes than the bundle")
    return {key: fraction(values, key, f"{where}{name}.") for key in classes}

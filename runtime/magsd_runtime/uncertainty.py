"""When an answer needs a second look: the probability lies near the threshold, or more than one class is possible.

What the calibration knows decides, not a margin that somebody chose: ``near_threshold`` is the interval in which the
threshold itself is uncertain (:func:`magsd_runtime.calibration.operating_points`), ``unsure`` is a prediction set
other than the label alone (:mod:`magsd_runtime.conformal`). A bundle whose calibration has neither flags nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

from .acceptance import Judgement
from .calibration_record import Calibration
from .prediction import Decision, PredictionSet, Reason
from .rule_choices import read_choices

Severity = Literal["ok", "review"]
CODES = ("near_threshold", "unsure")


@dataclass(frozen=True)
class UncertaintyRules:
    """What each code makes of an image: ``review``, or ``ok``, which leaves it out. The record of the prediction has
    the set, the probability and the threshold in any case."""

    near_threshold: Severity = "review"
    unsure: Severity = "review"

    @classmethod
    def from_dict(cls, record: Any) -> UncertaintyRules:
        """From the part ``uncertainty`` of a rules file; what is left out keeps its default.

        Raises
        ------
        UsageError
            One line: which code or severity is unknown.
        """
        return cls(**read_choices(record, dict.fromkeys(CODES, get_args(Severity)), "uncertainty"))

    def to_dict(self) -> dict[str, str]:
        return {code: getattr(self, code) for code in CODES}


def judge(
    calibration: Calibration,
    rules: UncertaintyRules,
    *,
    label: str,
    decision: Decision | None,
    prediction_set: PredictionSet | None,
) -> Judgement:
    """Whether an answer is sure enough to stand alone: ok or review, with a reason for each code."""
    found = (
        _unsure(label, prediction_set) if rules.unsure == "review" else None,
        _near(calibration, decision) if rules.near_threshold == "review" else None,
    )
    reasons = tuple(reason for reason in found if reason is not None)
    return Judgement("review" if reasons else "ok", {}, reasons)


def _near(calibration: Calibration, decision: Decision | None) -> Reason | None:
    """The decision would be another one at another threshold that the cases of the calibration allow as well."""
    point = calibration.point()
    if decision is None or point is None or point.threshold_ci95 is None:
        return None
    low, high = point.threshold_ci95
    if not low <= decision.probability < high:  # positive, or negative, at every threshold of the interval
        return None
    answer = "positive" if decision.positive else "negative"
    return Reason(
        "near_threshold",
        f"close call: {answer} for {decision.positive_class} with probability {decision.probability:.3f}, and the "
        f"threshold, {decision.threshold:.3f}, may as well be anywhere from {low:.3f} to {high:.3f}",
    )


def _unsure(label: str, prediction_set: PredictionSet | None) -> Reason | None:
    if prediction_set is None or prediction_set.classes == (label,):
        return None
    classes, rate = prediction_set.classes, f"{100 * prediction_set.coverage:g} %"
    if not classes:
        text = f"not sure: no class is as probable as it is in {rate} of the films that have it"
    elif len(classes) == 1:
        text = f"not sure: {label} is less probable than in {rate} of the films that have it, {classes[0]} is not"
    else:
        text = f"not sure: {_or(classes)} (such a set is right for {rate} of films like the calibration's)"
    return Reason("unsure", text)


def _or(names: Sequence[str]) -> str:
    return f"{', '.join(names[:-1])} or {names[-1]}"

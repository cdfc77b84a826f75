"""One prediction: the same record as Python object, JSON line and file.

A finding is a region the network attended to, not a finding of a radiologist.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Literal, get_args

PREDICTION_SCHEMA = "magsd.prediction/1"

Status = Literal["ok", "review", "rejected", "error"]


@dataclass(frozen=True)
class Box:
    """A half-open rectangle in pixels of the original image: ``x0 <= x < x1``, ``y0 <= y < y1``.

    Edges lie at integers: the box of the single pixel in column 3, row 5 is ``Box(3, 5, 4, 6)``.
    """

    x0: float
    y0: float
    x1: float
    y1: float

    def __post_init__(self) -> None:
        # Written so that NaN fails as well
        if not (self.x0 < self.x1 and self.y0 < self.y1):
            raise ValueError(f"box {self.to_list()} is empty: expected x0 < x1 and y0 < y1")

    @property
    def width(self) -> float:
        return self.x1 - self.x0

    @property
    def height(self) -> float:
        return self.y1 - self.y0

    @property
    def area(self) -> float:
        return self.width * self.height

    def overlap(self, other: Box) -> float:
        """Intersection over union, 0 to 1. Paper, Eq. 12."""
        width = min(self.x1, other.x1) - max(self.x0, other.x0)
        height = min(self.y1, other.y1) - max(self.y0, other.y0)
        shared = max(width, 0.0) * max(height, 0.0)
        return shared / (self.area + other.area - shared)

    def to_list(self) -> list[float]:
        """``[x0, y0, x1, y1]``, as in the JSON record."""
        return [self.x0, self.y0, self.x1, self.y1]


@dataclass(frozen=True)
class Finding:
    """One region: its enclosing box, the largest heat in it (0 to 1), its share of the image (0 to 1)."""

    box: Box
    score: float
    area_fraction: float

    def to_dict(self) -> dict[str, Any]:
        return {"box": self.box.to_list(), "score": self.score, "area_fraction": self.area_fraction}


@dataclass(frozen=True)
class Reason:
    """Why the status is what it is: ``code`` for programs, ``message`` (one line) for people."""

    code: str
    message: str

    def to_dict(self) -> dict[str, str]:
        return {"code": self.code, "message": self.message}


@dataclass(frozen=True)
class Decision:
    """Positive or not for one class, by an operating point of the bundle's calibration.

    ``positive`` is ``probability >= threshold``; ``probability`` is the calibrated one of ``positive_class``.
    """

    positive_class: str
    probability: float
    operating_point: str
    threshold: float
    positive: bool

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class PredictionSet:
    """The classes that cannot be ruled out, the most probable first; perhaps all of them, or none.

    Of films like those of the bundle's calibration the share ``coverage`` get a set that holds the right class.
    """

    coverage: float
    classes: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        return {"coverage": self.coverage, "classes": list(self.classes)}


@dataclass(frozen=True)
class Prediction:
    """What the model says about one file.

    ``label``, ``probability`` (of the label) and ``probabilities`` (class to probability, in the
    model's order, sum 1) are None when the status is ``rejected`` or ``error``; ``image`` is empty when
    the file could not be read. ``decision`` and ``prediction_set`` are None too where the bundle has no operating
    points, or no prediction sets; neither changes the label, which is the class of the largest probability.
    ``timings_ms``: decode, preprocess, rules, inference, acceptance, localize, total, those that took place, in
    milliseconds. ``files``: what was written for this image, by kind. ``acceptance``: ``scores`` and ``thresholds`` of
    how much the image looks like the training films (:mod:`magsd_runtime.acceptance`); None where the bundle has no
    statistics, or they were not reached.
    """

    path: str
    status: Status
    reasons: tuple[Reason, ...] = ()
    label: str | None = None
    probability: float | None = None
    probabilities: Mapping[str, float] | None = None
    findings: tuple[Finding, ...] = ()
    image: Mapping[str, Any] = field(default_factory=dict)
    model: Mapping[str, Any] = field(default_factory=dict)
    preprocessing_sha256: str = ""
    rules_sha256: str = ""
    backend: Mapping[str, Any] = field(default_factory=dict)
    timings_ms: Mapping[str, float] = field(default_factory=dict)
    files: Mapping[str, str] = field(default_factory=dict)
    decision: Decision | None = None
    acceptance: Mapping[str, Any] | None = None
    prediction_set: PredictionSet | None = None

    def __post_init__(self) -> None:
        if self.status not in get_args(Status):
            raise ValueError(f"status is {self.status!r}: expected one of {', '.join(get_args(Status))}")
        judged = self.status in ("ok", "review")
        if any((value is not None) != judged for value in (self.label, self.probability, self.probabilities)):
            raise ValueError(
                f"status {self.status!r} needs label, probability and probabilities "
                + ("all set" if judged else "all None")
            )
        if self.decision is not None and not judged:
            raise ValueError(f"status {self.status!r} allows no decision")
        if self.prediction_set is not None and not judged:
            raise ValueError(f"status {self.status!r} allows no prediction set")

    def to_dict(self) -> dict[str, Any]:
        """The record ``magsd.prediction/1``: only plain dicts, lists, strings, numbers, None."""
        return {
            "schema": PREDICTION_SCHEMA,
            "path": self.path,
            "status": self.status,
            "reasons": [reason.to_dict() for reason in self.reasons],
            "label": self.label,
            "probability": self.probability,
            "probabilities": None if self.probabilities is None else dict(self.probabilities),
            "decision": None if self.decision is None else self.decision.to_dict(),
            "prediction_set": None if self.prediction_set is None else self.prediction_set.to_dict(),
            "acceptance": None if self.acceptance is None else dict(self.acceptance),
            "findings": [finding.to_dict() for finding in self.findings],
            "image": dict(self.image),
            "model": dict(self.model),
            "preprocessing_sha256": self.preprocessing_sha256,
            "rules_sha256": self.rules_sha256,
            "backend": dict(self.backend),
            "timings_ms": dict(self.timings_ms),
            "files": dict(self.files),
            "research_use_only": True,
        }

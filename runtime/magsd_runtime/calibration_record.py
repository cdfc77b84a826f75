"""What a bundle knows of its probabilities: a temperature and operating points, bound to one model's hash.

How they are found: :mod:`magsd_runtime.calibration`; on which cases: :mod:`magsd_runtime.calibrating`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from .errors import ArtefactError
from .fields import Unusable, count, field, fraction, interval, number, sha256
from .prediction import Decision, PredictionSet
from .prediction_sets import PredictionSets

RELIABILITY_BINS = 15


@dataclass(frozen=True)
class OperatingPoint:
    """From ``threshold`` on, a calibrated probability of the positive class counts as positive.

    ``sensitivity`` and ``specificity`` are shares of the images that the threshold was chosen on, with 95 %
    intervals; ``target`` is the sensitivity asked for. ``threshold_ci95``: in which other cases would have put the
    threshold, None in records older than that.
    """

    name: str
    target: float
    threshold: float
    sensitivity: float
    sensitivity_ci95: tuple[float, float]
    specificity: float
    specificity_ci95: tuple[float, float]
    positives: int
    negatives: int
    positive_patients: int
    negative_patients: int
    threshold_ci95: tuple[float, float] | None = None

    def to_dict(self) -> dict[str, Any]:
        values = {name: value for name, value in asdict(self).items() if name != "name" and value is not None}
        return {name: list(value) if isinstance(value, tuple) else value for name, value in values.items()}

    @classmethod
    def from_dict(cls, name: str, value: Any) -> OperatingPoint:
        where = f"calibration.operating_points.{name}."
        if not isinstance(value, dict):
            raise Unusable(f"{where[:-1]} is a {type(value).__name__}")
        rates = {key: fraction(value, key, where) for key in ("target", "threshold", "sensitivity", "specificity")}
        intervals = {key: interval(value, key, where) for key in ("sensitivity_ci95", "specificity_ci95")}
        counts = {
            key: count(value, key, where)
            for key in ("positives", "negatives", "positive_patients", "negative_patients")
        }
        within = None if value.get("threshold_ci95") is None else interval(value, "threshold_ci95", where)
        if within is not None and not 0 <= within[0] <= rates["threshold"] <= within[1] <= 1:
            raise Unusable(f"{where}threshold_ci95 is {within[0]:g} to {within[1]:g}, without the threshold in it")
        return cls(name, **rates, **intervals, **counts, threshold_ci95=within)  # type: ignore[arg-type]


@dataclass(frozen=True)
class Scores:
    """How well one temperature fits the cases: mean negative log likelihood in nats, calibration error 0 to 1."""

    temperature: float
    nll: float
    ece: float


@dataclass(frozen=True)
class CaseFacts:
    """What is kept of the cases: no names of files or patients. ``digest``: SHA-256 of their manifest."""

    digest: str
    images: int
    patients: int
    images_per_class: Mapping[str, int]
    patients_per_class: Mapping[str, int]


@dataclass(frozen=True)
class Calibration:
    """What a bundle knows of its probabilities; without ``fitted`` nothing, and the temperature is as given.

    ``source`` says in words where it comes from. ``before`` and ``after`` are both scores on the cases of the fit;
    ``ece_cross_validated`` is that of cases whose patients did not take part in the fit, None where it could not
    be had. ``default`` names the operating point that decides; without operating points nothing does. ``sets``: None
    where there are too few patients for them, or the record is older than they are.
    """

    temperature: float = 1.0
    fitted: bool = False
    source: str = ""
    created: str = ""
    model_sha256: str = ""
    data: CaseFacts | None = None
    before: Scores | None = None
    after: Scores | None = None
    temperature_ci95: tuple[float, float] | None = None
    ece_cross_validated: float | None = None
    positive_class: str | None = None
    operating_points: tuple[OperatingPoint, ...] = ()
    default: str | None = None
    sets: PredictionSets | None = None

    def point(self) -> OperatingPoint | None:
        """The default operating point."""
        return next((point for point in self.operating_points if point.name == self.default), None)

    def decide(self, probabilities: Mapping[str, float]) -> Decision | None:
        """Positive or not at the default operating point, from calibrated probabilities by class."""
        point = self.point()
        if point is None or self.positive_class is None:
            return None
        value = float(probabilities[self.positive_class])
        return Decision(self.positive_class, value, point.name, point.threshold, value >= point.threshold)

    def set_of(self, probabilities: Mapping[str, float]) -> PredictionSet | None:
        """The classes that cannot be ruled out, from calibrated probabilities by class."""
        return None if self.sets is None else self.sets.of(probabilities)

    def to_dict(self) -> dict[str, Any]:
        """The field ``calibration`` of ``bundle.json``, as docs/bundle.md describes it."""
        points = {point.name: point.to_dict() for point in self.operating_points}
        record: dict[str, Any] = {"temperature": self.temperature, "fitted": self.fitted, "operating_points": points}
        if not self.fitted:
            return {**record, "source": self.source} if self.source else record
        assert self.data is not None
        assert self.before is not None
        assert self.after is not None
        return {
            **record,
            "model_sha256": self.model_sha256,
            "source": self.source,
            "created": self.created,
            "data": {name: dict(v) if isinstance(v, Mapping) else v for name, v in asdict(self.data).items()},
            "before": asdict(self.before),
            "after": asdict(self.after),
            "temperature_ci95": None if self.temperature_ci95 is None else list(self.temperature_ci95),
            "ece_cross_validated": self.ece_cross_validated,
            "ece_form": f"top label, {RELIABILITY_BINS} bins of equal width",
            "positive_class": self.positive_class,
            "default_operating_point": self.default,
            **({} if self.sets is None else {"prediction_sets": self.sets.to_dict()}),
        }

    @classmethod
    def from_dict(cls, value: Any, *, classes: Sequence[str], model_sha256: str) -> Calibration:
        """The inverse of :meth:`to_dict`, for a model with these classes and this hash.

        Unknown fields are ignored; known ones must make sense, and all must be there once ``fitted`` is true.

        Raises
        ------
        ArtefactError
            If a field is missing or senseless, or the calibration is another model's.
        """
        if not isinstance(value, dict):
            raise Unusable(f"calibration is a {type(value).__name__}")
        where = "calibration."
        temperature = _temperature(value, where)
        fitted = field(value, "fitted", bool, where) if "fitted" in value else False
        points = field(value, "operating_points", dict, where) if "operating_points" in value else {}
        source = field(value, "source", str, where) if fitted or "source" in value else ""
        if fitted or "model_sha256" in value:
            bound = sha256(value, "model_sha256", where)
            if bound != model_sha256:
                raise ArtefactError(
                    f"calibration is that of model {bound[:12]}..., and this model is {model_sha256[:12]}...: "
                    "a calibration is never carried over to another model, export the bundle again"
                )
        if not fitted:
            if points:
                raise Unusable("calibration.operating_points are there without a fitted temperature")
            if value.get("prediction_sets") is not None:
                raise Unusable("calibration.prediction_sets are there without a fitted temperature")
            return cls(temperature, source=source)
        data = _case_facts(field(value, "data", dict, where), classes)
        before, after = (_scores(field(value, name, dict, where), f"{where}{name}.") for name in ("before", "after"))
        return cls(
            temperature, True, source, field(value, "created", str, where), model_sha256, data, before, after,
            None if value.get("temperature_ci95") is None else interval(value, "temperature_ci95", where),
            None if value.get("ece_cross_validated") is None else fraction(value, "ece_cross_validated", where),
            *_decision_fields(value, points, classes),
            _sets(value, classes),
        )  # fmt: skip


def _sets(holder: dict[str, Any], classes: Sequence[str]) -> PredictionSets | None:
    value = holder.get("prediction_sets")
    return None if value is None else PredictionSets.from_dict(value, classes)


def _temperature(holder: Any, where: str) -> float:
    value = number(holder, "temperature", where)
    if value <= 0:
        raise Unusable(f"{where}temperature is {value}, expected a number above 0")
    return value


def _scores(value: dict[str, Any], where: str) -> Scores:
    return Scores(_temperature(value, where), number(value, "nll", where), fraction(value, "ece", where))


def _case_facts(value: dict[str, Any], classes: Sequence[str]) -> CaseFacts:
    where = "calibration.data."
    per_class = []
    for name in ("images_per_class", "patients_per_class"):
        holder = field(value, name, dict, where)
        if set(holder) != set(classes):
            raise Unusable(f"{where}{name} names other classes than the bundle")
        per_class.append({key: count(holder, key, f"{where}{name}.") for key in holder})
    images, patients = (count(value, name, where) for name in ("images", "patients"))
    return CaseFacts(sha256(value, "digest", where), images, patients, *per_class)


def _decision_fields(
    value: dict[str, Any], points: dict[str, Any], classes: Sequence[str]
) -> tuple[str | None, tuple[OperatingPoint, ...], str | None]:
    """Positive class, operating points, and the name of the default one; all or none."""
    named = {name: value.get(name) for name in ("positive_class", "default_operating_point")}
    if not points:
        if any(name is not None for name in named.values()):
            raise Unusable("calibration names a positive class or a default without operating points")
        return None, (), None
    positive, default = named.values()
    if positive not in classes:
        raise Unusable(f"calibration.positive_class is {positive!r:.40}, expected one of {', '.join(classes)}")
    if not isinstance(default, str) or default not in points:
        raise Unusable(f"calibration.default_operating_point is {default!r:.40}, expected one of {', '.join(points)}")
    return positive, tuple(OperatingPoint.from_dict(name, facts) for name, facts in points.items()), default

"""Does an image look like the films that the model was trained on? Statistics that a bundle may carry.

Two scores, each 1 on average over the films that the statistics are of, and larger the further an image is from them:

    image      the standardized image as a thumbnail of 16 x 16, z-scored, and beside it the lung fields, likewise
               16 x 16, if the preprocessing looks for them: upside down, turned or inverted films stand out here
    embedding  the network's embedding, square roots, length 1: what holds other things than a chest stands out here

Each is measured in a subspace (principal components of the films): the mean of the squared deviation along the
components, in units of their variance, and of the squared rest outside them, in units of the films' mean rest.
Above its ``review`` limit an image is labelled, but flagged; above ``rejected`` it gets no label.

Source: the Mahalanobis distance and the reconstruction error of principal components are both classic (Jackson and
Mudholkar 1979, "Control Procedures for Residuals Associated With Principal Component Analysis"); the square root of a
non-negative descriptor at length 1 is the Hellinger map. Which descriptor, how many components: docs/acceptance.md.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import cv2
import numpy as np
from numpy.typing import NDArray

from .fields import Unusable, field, fraction, number
from .fields import count as whole
from .files import replacing
from .prediction import Reason

ACCEPTANCE_NAME = "acceptance.npz"
ACCEPTANCE_VERSION = 1
SCORES = ("image", "embedding")
Severity = Literal["ok", "review", "rejected"]
THUMBNAIL = 16
"""Side of both thumbnails in pixels."""

LUNG_WEIGHT = 4.0
"""What a step from no lung to lung counts beside one standard deviation of the greys."""

_ARRAYS = ("mean", "components", "variances", "rest")
_IS_IT = "is it a frontal chest film, upright and not inverted?"


@dataclass(frozen=True, eq=False)
class Subspace:
    """Where descriptors of films lie: float32 ``mean`` (D,), orthonormal ``components`` (K, D), their ``variances``
    (K,), all above 0, and ``rest``, the films' mean squared distance from the subspace, above 0."""

    mean: NDArray[np.float32]
    components: NDArray[np.float32]
    variances: NDArray[np.float32]
    rest: float

    def score(self, descriptor: NDArray[np.floating]) -> float:
        """How far a descriptor (D,) is out: 1 on average over the films, 0 or more."""
        deviation = descriptor.astype(np.float64) - self.mean
        along = self.components.astype(np.float64) @ deviation
        outside = max(float(deviation @ deviation - along @ along), 0.0)
        return 0.5 * (float(np.mean(along * along / self.variances)) + outside / self.rest)


@dataclass(frozen=True)
class Limits:
    """An image whose score exceeds ``review`` is flagged, above ``rejected`` (not below ``review``) refused."""

    review: float
    rejected: float


@dataclass(frozen=True)
class Chosen:
    """How the limits were chosen: ``accepted`` of ``films`` films of ``patients`` patients were below all review
    limits while statistics of other patients' films judged them, in ``groups`` groups; ``target`` is the share that
    was wanted. ``without_lungs`` of the films had no lungs that could be found, and are not accepted.
    ``digest``: of the manifest. ``rule``: the same in words."""

    target: float
    films: int
    patients: int
    accepted: int
    without_lungs: int
    groups: int
    digest: str
    rule: str


@dataclass(frozen=True)
class Judgement:
    """What :meth:`Acceptance.judge` says. ``scores`` by name; ``reasons`` is empty where the status is ok."""

    status: Severity
    scores: Mapping[str, float]
    reasons: tuple[Reason, ...] = ()


def worst(severities: Iterable[Severity]) -> Severity:
    """The gravest of ok < review < rejected; ok where there is none."""
    order: tuple[Severity, ...] = get_args(Severity)
    return order[max(map(order.index, severities), default=0)]


def unlike_training(severity: Severity) -> Reason:
    """The reason of a film that the scores flag (``review``) or refuse (``rejected``)."""
    if severity == "rejected":
        text = f"the image is far from all films that the model was trained on, so it is not judged: {_IS_IT}"
    else:
        text = f"the image looks unlike the films that the model was trained on, the label may mean nothing: {_IS_IT}"
    return Reason("unlike_training", text)


def combined(*judgements: Judgement) -> Judgement:
    """Several judgements of one image as one: the gravest status, all scores and reasons in their order."""
    return Judgement(
        worst(one.status for one in judgements),
        {name: score for one in judgements for name, score in one.scores.items()},
        tuple(reason for one in judgements for reason in one.reasons),
    )


@dataclass(frozen=True, eq=False)
class Acceptance:
    """The statistics of a bundle, by the names of :data:`SCORES`; they belong to the model with ``model_sha256``."""

    subspaces: Mapping[str, Subspace]
    limits: Mapping[str, Limits]
    chosen: Chosen
    model_sha256: str

    def judge(
        self, standardized: NDArray[np.uint8], lungs: NDArray[np.bool_] | None, embedding: NDArray[np.floating]
    ) -> Judgement:
        """Judge one image: ``standardized`` uint8 (S, S), ``lungs`` as in its framing, ``embedding`` finite (D,).

        Raises
        ------
        ValueError
            If a descriptor has another length than those of the statistics.
        """
        descriptors = {"image": image_descriptor(standardized, lungs), "embedding": embedding_descriptor(embedding)}
        scores = {}
        for name in SCORES:
            if descriptors[name].shape != self.subspaces[name].mean.shape:
                expected = self.subspaces[name].mean.size
                raise ValueError(f"the {name} has {descriptors[name].size} values, its statistics {expected}")
            scores[name] = self.subspaces[name].score(descriptors[name])
        # not "above": a score that is no number must not pass
        if not all(scores[name] <= self.limits[name].rejected for name in SCORES):
            return Judgement("rejected", scores, (unlike_training("rejected"),))
        if not all(scores[name] <= self.limits[name].review for name in SCORES):
            return Judgement("review", scores, (unlike_training("review"),))
        return Judgement("ok", scores)

    def record(self, judgement: Judgement) -> dict[str, Any]:
        """The field ``acceptance`` of a prediction: scores and thresholds, plain values."""
        return {
            "scores": {name: round(value, 6) for name, value in judgement.scores.items()},
            "thresholds": {name: _limits_dict(self.limits[name]) for name in SCORES},
        }

    def to_dict(self) -> dict[str, Any]:
        """The section ``acceptance`` of bundle.json."""
        return {
            "version": ACCEPTANCE_VERSION,
            "model_sha256": self.model_sha256,
            "thresholds": {name: _limits_dict(self.limits[name]) for name in SCORES},
            "chosen": {**self.chosen.__dict__},
        }

    def save(self, folder: Path) -> None:
        """Write :data:`ACCEPTANCE_NAME`, the numbers that do not fit into bundle.json. Equal numbers, equal bytes."""
        arrays: dict[str, Any] = {
            f"{name}/{key}": np.asarray(getattr(self.subspaces[name], key), np.float32)
            for name in SCORES
            for key in _ARRAYS
        }
        with replacing(folder / ACCEPTANCE_NAME) as temporary:
            np.savez(temporary, **arrays)


def image_descriptor(standardized: NDArray[np.uint8], lungs: NDArray[np.bool_] | None) -> NDArray[np.float32]:
    """uint8 (S, S), and the lung fields bool (h, w) of the film or None -> float32 (256,), with lungs (512,).

    The second half shows the box around the lung fields, without a margin; it is 0 where there are none.
    """
    small = cv2.resize(standardized.astype(np.float32), (THUMBNAIL, THUMBNAIL), interpolation=cv2.INTER_AREA)
    greys = ((small - small.mean()) / max(float(small.std()), 1e-6)).ravel()
    if lungs is None:
        return greys
    rows, columns = np.flatnonzero(lungs.any(axis=1)), np.flatnonzero(lungs.any(axis=0))
    fields = np.zeros((THUMBNAIL, THUMBNAIL), np.float32)
    if rows.size:
        box = lungs[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1].astype(np.float32)
        fields = cv2.resize(box, (THUMBNAIL, THUMBNAIL), interpolation=cv2.INTER_AREA)
    return np.concatenate([greys, LUNG_WEIGHT * fields.ravel()])


def embedding_descriptor(embedding: NDArray[np.floating]) -> NDArray[np.float32]:
    """float (D,) -> float32 (D,) of length 1: the square root of each value, with its sign. Zeros stay zeros."""
    root = np.sign(embedding) * np.sqrt(np.abs(embedding.astype(np.float64)))
    return np.asarray(root / max(float(np.linalg.norm(root)), 1e-12), np.float32)


def read_acceptance(
    section: Any, path: str | os.PathLike[str], *, model_sha256: str, embedding: int | None, with_lungs: bool
) -> Acceptance:
    """The statistics in a bundle: ``section`` is bundle.json's, ``path`` its file :data:`ACCEPTANCE_NAME`.

    ``embedding``: length of the network's, where it is known; ``with_lungs``: whether its preprocessing finds lungs.

    Raises
    ------
    Unusable
        If a field or array is missing, unknown or senseless, or the statistics are of another model.
    """
    if not isinstance(section, dict):
        raise Unusable(f"acceptance is a {type(section).__name__}")
    if set(section) != {"version", "model_sha256", "thresholds", "chosen"}:
        raise Unusable(f"acceptance has the fields {sorted(section)}")
    if section["version"] != ACCEPTANCE_VERSION or isinstance(section["version"], bool):
        raise Unusable(f"acceptance.version is {section['version']!r}, this magsd reads {ACCEPTANCE_VERSION}")
    if section["model_sha256"] != model_sha256:
        raise Unusable("acceptance.model_sha256 is not the model's: the statistics are of another model")
    thresholds = field(section, "thresholds", dict, "acceptance.")
    if set(thresholds) != set(SCORES):
        raise Unusable(f"acceptance.thresholds are of {sorted(thresholds)}, expected {sorted(SCORES)}")
    limits = {name: _read_limits(field(thresholds, name, dict, "acceptance.thresholds."), name) for name in SCORES}
    chosen = _read_chosen(field(section, "chosen", dict, "acceptance."))
    lengths = {"image": THUMBNAIL**2 * (2 if with_lungs else 1), "embedding": embedding}
    return Acceptance(_read_subspaces(Path(path), lengths), limits, chosen, model_sha256)


def _read_limits(value: Any, name: str) -> Limits:
    prefix = f"acceptance.thresholds.{name}."
    if set(value) != {"review", "rejected"}:
        raise Unusable(f"{prefix[:-1]} has the fields {sorted(value)}, expected rejected and review")
    limits = Limits(number(value, "review", prefix), number(value, "rejected", prefix))
    if not 0 < limits.review <= limits.rejected:
        raise Unusable(f"{prefix[:-1]} is {limits.review:g} and {limits.rejected:g}: expected 0 < review <= rejected")
    return limits


def _read_chosen(value: Any) -> Chosen:
    prefix = "acceptance.chosen."
    if unknown := set(value) - set(Chosen.__dataclass_fields__):
        raise Unusable(f"{prefix}{min(unknown)} is unknown")
    counts = {name: whole(value, name, prefix) for name in ("films", "patients", "accepted", "without_lungs", "groups")}
    chosen = Chosen(
        target=fraction(value, "target", prefix),
        digest=field(value, "digest", str, prefix),
        rule=field(value, "rule", str, prefix),
        **counts,
    )
    if chosen.accepted + chosen.without_lungs > chosen.films or chosen.patients > chosen.films:
        raise Unusable(f"{prefix[:-1]}: more films accepted, or more patients, than films")
    return chosen


def _read_subspaces(path: Path, lengths: Mapping[str, int | None]) -> dict[str, Subspace]:
    try:
        with np.load(path, allow_pickle=False) as file:
            arrays = {name: file[name] for name in file.files}
    except Exception as error:  # zip, numpy and the file system each have their own
        raise Unusable(f"{path.name} cannot be read ({type(error).__name__})") from error
    if set(arrays) != {f"{name}/{key}" for name in SCORES for key in _ARRAYS}:
        raise Unusable(f"{path.name} has the arrays {sorted(arrays)}")
    for name, array in arrays.items():
        if array.dtype != np.float32 or not np.isfinite(array).all():
            raise Unusable(f"{path.name}: {name} is not finite float32")
    return {name: _subspace(path, name, arrays, lengths[name]) for name in SCORES}


def _subspace(path: Path, name: str, arrays: Mapping[str, NDArray[Any]], length: int | None) -> Subspace:
    mean, components, variances, rest = (arrays[f"{name}/{key}"] for key in _ARRAYS)
    if mean.ndim != 1 or components.ndim != 2 or rest.ndim != 0 or len(components) < 1:
        raise Unusable(f"{path.name}: the arrays of {name} have other dimensions than they must")
    if components.shape != (variances.size, mean.size) or variances.ndim != 1:
        raise Unusable(f"{path.name}: the arrays of {name} do not fit each other")
    if length is not None and mean.size != length:
        raise Unusable(f"{path.name}: {name} has {mean.size} values, expected {length}")
    if not (variances > 0).all() or not rest > 0:
        raise Unusable(f"{path.name}: a variance of {name} is not above 0")
    products = components.astype(np.float64) @ components.astype(np.float64).T
    if np.abs(products - np.eye(len(components))).max() > 1e-4:
        raise Unusable(f"{path.name}: the components of {name} are not orthonormal")
    return Subspace(mean, components, variances, float(rest))


def _limits_dict(limits: Limits) -> dict[str, float]:
    return {"review": limits.review, "rejected": limits.rejected}

"""Two networks behind one pipeline: how what they make of a film differs, and how much of that is allowed.

Parity (:mod:`magsd_runtime.parity`) compares the four outputs of two networks. This compares what people act on: the
status, the label, the side of the operating point, the heat and the boxes, each from the file of a film on, and says
of the four outputs how far they are apart.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .bundle import OUTPUT_NAMES
from .parity import FP16_TOLERANCES, TOLERANCES, Tolerance
from .prediction import Finding, Prediction

Outputs = dict[str, NDArray[np.floating]]

TIE = 2e-3
"""Two classes whose probabilities in the first network are no further apart decide nothing between them."""


@dataclass(frozen=True)
class Allowed:
    """What two networks may differ by over a set of films.

    ``probability``: the largest difference of one probability. ``labels``, ``decisions``, ``statuses``: the share of
    films on which both agree, at least (see :class:`Totals`). ``correlation``: the mean rank correlation of the heat
    maps, ``boxes``: the mean overlap of the findings, both at least; the means of fewer than ``means_from`` films are
    reported and decide nothing. ``outputs``: of each output of each film; None: by their effect alone.
    """

    probability: float
    labels: float
    decisions: float
    statuses: float
    correlation: float
    boxes: float
    means_from: int
    outputs: dict[str, Tolerance] | None


# The precision of the coarser of the two networks decides. FP32 in another order of summation moves a probability by
# some 1e-5 and no decision; a half-precision trunk by some 1e-2 (docs/engines.md); 8-bit integers by up to 0.1, and
# what must stay is 99 of 100 labels, and heat that correlates by 0.97 (docs/int8.md). A box ends where the heat crosses
# a threshold, and places of like heat change ranks: rounding by 1e-3 may cut a finding in two, and turn the ranks of a
# flat map about. Of a film that proves nothing, of many the mean does.
ALLOWED = {
    "fp32": Allowed(1e-3, 1.0, 1.0, 0.999, 0.9999, 0.995, 1, TOLERANCES),
    "fp16": Allowed(5e-2, 0.99, 0.99, 0.98, 0.99, 0.95, 20, FP16_TOLERANCES),
    "int8": Allowed(1.5e-1, 0.99, 0.99, 0.97, 0.97, 0.9, 20, None),
}
_COARSENESS = tuple(ALLOWED)


def allowed_between(first: str, second: str) -> Allowed:
    """The limits for two precisions (fp32, fp16, int8): those of the coarser one."""
    return ALLOWED[max(first, second, key=_COARSENESS.index)]


@dataclass(frozen=True, eq=False)
class Seen:
    """What one side made of a film. ``outputs`` without the batch axis, ``heat`` float (h, w): None where the film was
    refused before the network, or its answer was not finite."""

    prediction: Prediction
    outputs: Outputs | None = None
    heat: NDArray[np.floating] | None = None


@dataclass(frozen=True)
class FilmDifference:
    """How the two sides differ on the film ``name``.

    ``outputs``: by output, the largest and the mean absolute difference, the share of the tolerance that the largest
    one used (0 where there is none), infinite where only one side is finite. ``probability``, ``correlation`` (see
    :func:`rank_correlation`) and ``boxes`` (see :func:`box_overlap`) are None where they cannot be told: one side
    refused the film, or both heat maps are the same everywhere. ``decided``: whether a side has a decision at the
    operating point, and ``crossing`` whether the other one has another, or none.
    """

    name: str
    status: tuple[str, str]
    label: tuple[str | None, str | None]
    tie: bool
    decided: bool
    crossing: bool
    outputs: dict[str, tuple[float, float, float]]
    probability: float | None = None
    correlation: float | None = None
    boxes: float | None = None

    @property
    def same_status(self) -> bool:
        return self.status[0] == self.status[1]

    @property
    def same_label(self) -> bool:
        return self.label[0] == self.label[1]


def compare_film(name: str, first: Seen, second: Seen, allowed: Allowed) -> FilmDifference:
    """What of the film ``name`` differs between two sides.

    Raises
    ------
    ValueError
        If the two networks have other shapes, or other classes.
    """
    one, other = first.prediction, second.prediction
    labels = (one.label, other.label)
    both = one.probabilities is not None and other.probabilities is not None
    return FilmDifference(
        name=name,
        status=(_status(one), _status(other)),
        label=labels,
        tie=both and labels[0] != labels[1] and _margin(one, labels[1]) <= TIE,
        decided=one.decision is not None or other.decision is not None,
        crossing=_positive(one) != _positive(other),
        outputs=_output_differences(first.outputs, second.outputs, allowed),
        probability=_probability_difference(one, other) if both else None,
        correlation=(
            rank_correlation(first.heat, second.heat) if first.heat is not None and second.heat is not None else None
        ),
        boxes=box_overlap(one.findings, other.findings) if both else None,
    )


def rank_correlation(first: NDArray[np.floating], second: NDArray[np.floating]) -> float | None:
    """Spearman's correlation of two maps of one shape, equal values sharing their mean rank; -1 to 1.

    None where both are constant: there is nothing to agree or disagree on. 0 where one of them is.
    """
    if first.shape != second.shape:
        raise ValueError(f"the heat maps are {first.shape} and {second.shape}: expected one shape")
    ranks = [_ranks(np.asarray(values, np.float64).ravel()) for values in (first, second)]
    spread = [float(rank.std()) for rank in ranks]
    if not any(spread):
        return None
    if not all(spread):
        return 0.0
    centred = [rank - rank.mean() for rank in ranks]
    return float(np.mean(centred[0] * centred[1]) / (spread[0] * spread[1]))


def _ranks(values: NDArray[np.float64]) -> NDArray[np.float64]:
    _, place, counts = np.unique(values, return_inverse=True, return_counts=True)
    ends = np.cumsum(counts)
    return (ends - (counts - 1) / 2)[place]


def box_overlap(first: Sequence[Finding], second: Sequence[Finding]) -> float:
    """Mean intersection over union of the findings, paired one to one, the best pair first; 0 for one without a
    partner, 1 where neither side has a finding."""
    if not first and not second:
        return 1.0
    pairs = sorted(
        ((a.box.overlap(b.box), i, j) for i, a in enumerate(first) for j, b in enumerate(second)),
        key=lambda pair: (-pair[0], pair[1], pair[2]),
    )
    left, right, total = set(range(len(first))), set(range(len(second))), 0.0
    for overlap, i, j in pairs:
        if i in left and j in right:
            left.remove(i)
            right.remove(j)
            total += overlap
    return total / max(len(first), len(second))


def _status(prediction: Prediction) -> str:
    """The status and the codes of its reasons, without their words: those quote figures."""
    codes = ", ".join(reason.code for reason in prediction.reasons)
    return f"{prediction.status} ({codes})" if codes else prediction.status


def _positive(prediction: Prediction) -> bool | None:
    return None if prediction.decision is None else prediction.decision.positive


def _margin(prediction: Prediction, other: str | None) -> float:
    assert prediction.probabilities is not None
    assert prediction.probability is not None
    return prediction.probability - prediction.probabilities[str(other)]


def _probability_difference(first: Prediction, second: Prediction) -> float:
    assert first.probabilities is not None
    assert second.probabilities is not None
    if first.probabilities.keys() != second.probabilities.keys():
        raise ValueError(f"the classes are {list(first.probabilities)} and {list(second.probabilities)}")
    return max(abs(value - second.probabilities[name]) for name, value in first.probabilities.items())


def _output_differences(
    first: Outputs | None, second: Outputs | None, allowed: Allowed
) -> dict[str, tuple[float, float, float]]:
    if first is None and second is None:
        return {}
    if first is None or second is None:
        return dict.fromkeys(OUTPUT_NAMES, (math.inf, math.inf, math.inf))
    return {name: output_difference(name, first[name], second[name], allowed) for name in OUTPUT_NAMES}


def output_difference(
    name: str, first: NDArray[np.floating], second: NDArray[np.floating], allowed: Allowed
) -> tuple[float, float, float]:
    """Largest and mean absolute difference of one output, and the share of its tolerance that the largest one is."""
    if first.shape != second.shape:
        raise ValueError(f"{name} is {first.shape} and {second.shape}: expected one shape")
    wanted = first.astype(np.float64)
    with np.errstate(invalid="ignore"):
        difference = np.abs(second.astype(np.float64) - wanted)
    finite = [bool(np.isfinite(values).all()) for values in (first, second)]
    if not all(finite):
        worst = math.inf if any(finite) else 0.0  # both fail alike: judged by their statuses
        return worst, worst, worst
    worst = float(difference.max())
    if allowed.outputs is None:
        return worst, float(difference.mean()), 0.0
    limit = allowed.outputs[name].absolute + allowed.outputs[name].relative * float(np.abs(wanted).max())
    return worst, float(difference.mean()), worst / limit


@dataclass
class Mean:
    """A running mean, the worst value and the film that it was found on; ``low``: whether small values are bad."""

    low: bool
    count: int = 0
    total: float = 0.0
    worst: float | None = None
    at: str = ""

    def add(self, value: float | None, name: str) -> None:
        if value is None:
            return
        self.count += 1
        self.total += value
        if self.worst is None or (value < self.worst if self.low else value > self.worst):
            self.worst, self.at = value, name

    @property
    def mean(self) -> float | None:
        return self.total / self.count if self.count else None

    def to_dict(self) -> dict[str, Any]:
        return {"mean": _finite(self.mean), "worst": _finite(self.worst), "at": self.at}


MOST_NAMED = 20


@dataclass
class Totals:
    """What was found over all films so far; memory does not grow with their number.

    ``judged``: films that got a label from both sides, ``labelled``: from one of them at least, ``decided``: a decision
    at the operating point from one of them at least. Labels and decisions are shares of these: films that both sides
    refuse say nothing about either network, and must not dilute its flips.
    """

    films: int = 0
    judged: int = 0
    labelled: int = 0
    decided: int = 0
    flips: int = 0
    ties: int = 0
    crossings: int = 0
    statuses: int = 0
    named: list[str] = field(default_factory=list)
    probability: Mean = field(default_factory=lambda: Mean(low=False))
    correlation: Mean = field(default_factory=lambda: Mean(low=True))
    boxes: Mean = field(default_factory=lambda: Mean(low=True))
    outputs: dict[str, Mean] = field(default_factory=lambda: {name: Mean(low=False) for name in OUTPUT_NAMES})
    means: dict[str, Mean] = field(default_factory=lambda: {name: Mean(low=False) for name in OUTPUT_NAMES})
    shares: dict[str, Mean] = field(default_factory=lambda: {name: Mean(low=False) for name in OUTPUT_NAMES})

    def add(self, film: FilmDifference) -> None:
        self.films += 1
        self.judged += film.label[0] is not None and film.label[1] is not None
        self.labelled += film.label != (None, None)
        self.decided += film.decided
        self.flips += not film.same_label and not film.tie
        self.ties += film.tie
        self.crossings += film.crossing
        self.statuses += not film.same_status
        self.probability.add(film.probability, film.name)
        self.correlation.add(film.correlation, film.name)
        self.boxes.add(film.boxes, film.name)
        for name, (worst, mean, share) in film.outputs.items():
            self.outputs[name].add(worst, film.name)
            self.means[name].add(mean, film.name)
            self.shares[name].add(share, film.name)
        if (what := _in_words(film)) and len(self.named) < MOST_NAMED:
            self.named.append(what)

    @property
    def labels(self) -> float:
        """Share of the films with a label on which both sides agree; 1 of none."""
        return _share(self.flips, self.labelled)

    @property
    def decisions(self) -> float:
        """The same of the films with a decision at the operating point."""
        return _share(self.crossings, self.decided)

    @property
    def same_statuses(self) -> float:
        """Share of all films whose status and reasons are the same."""
        return _share(self.statuses, self.films)

    def failures(self, allowed: Allowed) -> list[str]:
        """What is outside ``allowed``, a line each; empty when all is well."""
        found = []
        for what, share, films, least in (
            ("labels", self.labels, self.labelled, allowed.labels),
            ("decisions at the operating point", self.decisions, self.decided, allowed.decisions),
            ("statuses", self.same_statuses, self.films, allowed.statuses),
        ):
            if share < least:
                found.append(f"{what} agree on {share:.4f} of {films} films, {least:g} is needed")
        worst = self.probability.worst
        if worst is not None and not worst <= allowed.probability:
            found.append(
                f"a probability differs by {worst:.3g} ({self.probability.at}), {allowed.probability:g} is allowed"
            )
        for what, values, least in (
            ("the heat maps' rank correlation", self.correlation, allowed.correlation),
            ("the findings' overlap", self.boxes, allowed.boxes),
        ):
            if values.mean is not None and values.count >= allowed.means_from and not values.mean >= least:
                found.append(f"{what} is {values.mean:.4f} in the mean, {least:g} is needed")
        for name, share in self.shares.items():
            if share.worst is not None and not share.worst <= 1:
                worst = self.outputs[name].worst
                found.append(f"{name} differs by up to {worst:.3g}, {share.worst:.3g} x what is allowed ({share.at})")
        return found

    def to_dict(self) -> dict[str, Any]:
        return {
            "films": self.films,
            "judged_by_both": self.judged,
            "judged_by_one_or_both": self.labelled,
            "label_flips": self.flips,
            "label_ties": self.ties,
            "label_agreement": self.labels,
            "with_operating_point": self.decided,
            "operating_point_crossings": self.crossings,
            "decision_agreement": self.decisions,
            "status_changes": self.statuses,
            "status_agreement": self.same_statuses,
            "probability_difference": self.probability.to_dict(),
            "heat_rank_correlation": self.correlation.to_dict(),
            "finding_overlap": self.boxes.to_dict(),
            "outputs": {
                name: {
                    "worst_difference": _finite(self.outputs[name].worst),
                    "at": self.outputs[name].at,
                    "mean_difference": _finite(self.means[name].mean),
                    "share_of_tolerance": _finite(self.shares[name].worst),
                }
                for name in OUTPUT_NAMES
            },
            "films_that_differ": list(self.named),
        }


def _share(different: int, of: int) -> float:
    return 1.0 - different / of if of else 1.0


def _in_words(film: FilmDifference) -> str:
    parts = []
    if not film.same_label:
        parts.append(f"label {film.label[0] or 'none'} / {film.label[1] or 'none'}{' (a tie)' if film.tie else ''}")
    if film.crossing:
        parts.append("other side of the operating point")
    if not film.same_status:
        parts.append(f"status {film.status[0]} / {film.status[1]}")
    return f"{film.name}: {', '.join(parts)}" if parts else ""


def _finite(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None

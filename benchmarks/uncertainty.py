"""How far "not sure" can be trusted: coverage of prediction sets, what review catches, on known and on new sources.

    python benchmarks/uncertainty.py EVAL [--positive covid19] [--coverage 0.8,0.85,0.9,0.95] [--json FILE]
    python benchmarks/uncertainty.py EVAL --elsewhere TEST [TEST ...]           films of sources not in the training
    python benchmarks/uncertainty.py --simulate [--draws 400]                   films of one patient alike, few patients

EVAL and TEST: what `magsd evaluate` wrote, with predictions.csv. EVAL is of a cross-validation: each film was judged
by the model that saw no film of its patient. Here too each patient is judged by temperature, minimums and threshold
that were fitted without them, in the five folds of patients that `magsd calibrate` uses.

`--elsewhere` fits all of these on the patients of EVAL that are not in TEST, and judges TEST by them: a calibration
carried to other hospitals, which is what nobody should do and everybody will. TEST may be of other models of the
recipe (benchmarks/steps.py, benchmarks/elsewhere.py).

alone: the set is the label and nothing else. review: it is not, or the probability of the positive class lies
where the threshold itself is uncertain. Intervals are 95 %, Wilson's, with patients and not films as trials.
"""

from __future__ import annotations

import argparse
import csv
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from magsd_runtime.calibrating import fold_of
from magsd_runtime.calibration import (
    effective_patients,
    fit_temperature,
    operating_points,
    probabilities,
    wilson_interval,
)
from magsd_runtime.conformal import members, minimum_probabilities, minimum_probability
from magsd_runtime.errors import RESEARCH_USE, DataError, MagsdError
from timing import save

COVERAGES = (0.8, 0.85, 0.9, 0.95)
SCORES = ("LAC", "APS", "RAPS")
PENALTY = 0.1  # of RAPS, for each class beyond the first
SENSITIVITY = 0.9


@dataclass(frozen=True, eq=False)
class Films:
    """N films: ``logits`` (N, C), ``labels`` (N,) class indices, ``patients`` and ``sources`` (N,) of str."""

    classes: tuple[str, ...]
    logits: NDArray[np.float64]
    labels: NDArray[np.int64]
    patients: NDArray[Any]
    sources: NDArray[Any]

    def select(self, rows: NDArray[np.bool_]) -> Films:
        return Films(self.classes, self.logits[rows], self.labels[rows], self.patients[rows], self.sources[rows])


@dataclass(frozen=True, eq=False)
class Judged:
    """``probabilities`` (N, C) calibrated, ``inside`` bool (N, C), ``near`` and ``positive`` bool (N,)."""

    probabilities: NDArray[np.float64]
    inside: NDArray[np.bool_]
    near: NDArray[np.bool_]
    positive: NDArray[np.bool_]


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("evaluation", nargs="?", type=Path, metavar="EVAL")
    parser.add_argument("--elsewhere", nargs="+", default=[], type=Path, metavar="TEST")
    parser.add_argument("--positive", default="covid19", metavar="CLASS", help="class of the threshold")
    parser.add_argument("--coverage", default=",".join(map(str, COVERAGES)), metavar="C,C")
    parser.add_argument("--simulate", action="store_true", help="drawn films instead of an evaluation")
    parser.add_argument("--draws", type=int, default=400, metavar="N", help="of --simulate (default: 400)")
    parser.add_argument("--json", type=Path, metavar="FILE")
    options = parser.parse_args(argv)
    if options.simulate == (options.evaluation is not None):
        parser.error("give EVAL, or --simulate")
    coverages = [float(text) for text in options.coverage.split(",")]
    try:
        if options.simulate:
            result: dict[str, Any] = {"simulated": simulate(options.draws)}
            print(simulation_table(result["simulated"]))
        else:
            films = read_films(options.evaluation)
            result = {"films": len(films.labels), "patients": len(set(films.patients)), "positive": options.positive}
            if options.elsewhere:
                tests = [read_films(path) for path in options.elsewhere]
                result["elsewhere"] = [elsewhere(films, tests, c, options.positive) for c in coverages]
            else:
                result["scores"] = [compare(films, score, by_class, 0.9) for score in SCORES for by_class in (0, 1)]
                result["coverages"] = [summary(films, held_out(films, c, options.positive), c) for c in coverages]
                result["curve"] = curve(films, held_out(films, 0.9, options.positive))
                print(scores_table(result["scores"]), end="\n\n")
                print(curve_table(result["curve"]), end="\n\n")
            print(summary_table(result.get("elsewhere") or result["coverages"], films.classes))
    except MagsdError as error:
        print(f"uncertainty: {error}", file=sys.stderr)
        return error.exit_code
    print(RESEARCH_USE)
    save(options.json, result)
    return 0


def read_films(path: Path) -> Films:
    """The labelled logits of a folder's predictions.csv.

    Raises
    ------
    DataError
        If there are none.
    """
    file = path / "predictions.csv" if path.is_dir() else path
    try:
        with open(file, newline="", encoding="utf-8") as text:
            table = csv.DictReader(text)
            columns = [name for name in table.fieldnames or () if name.startswith("logit_")]
            rows = list(table)
        classes = tuple(name.removeprefix("logit_") for name in columns)
        return Films(
            classes,
            np.array([[float(row[name]) for name in columns] for row in rows]).reshape(-1, len(classes)),
            np.array([classes.index(row["label"]) for row in rows], np.int64),
            np.array([row["patient"] for row in rows], dtype=object),
            np.array([row["source"] for row in rows], dtype=object),
        )
    except (OSError, ValueError, KeyError, TypeError, csv.Error) as error:
        raise DataError(f"{file}: no predictions with label, patient, source and logits ({error})") from error


def judge(fit: Films, films: Films, coverage: float, positive: str) -> Judged:
    """``films`` by what was fitted on ``fit``."""
    temperature = fit_temperature(fit.logits, fit.labels).temperature
    known, asked = (probabilities(one.logits, temperature) for one in (fit, films))
    minimums = minimum_probabilities(known, fit.labels, list(fit.patients), coverage)
    if minimums is None:
        raise DataError(f"too few patients of a class for coverage {coverage:g}")
    index = fit.classes.index(positive)
    point = operating_points(
        positive=fit.labels == index, probability=known[:, index], patients=list(fit.patients),
        sensitivities=[SENSITIVITY],
    )[0]  # fmt: skip
    assert point.threshold_ci95 is not None
    low, high = point.threshold_ci95
    value = asked[:, index]
    return Judged(asked, members(asked, minimums), (value >= low) & (value < high), value >= point.threshold)


def held_out(films: Films, coverage: float, positive: str) -> Judged:
    """Each patient by what was fitted on the patients of the other folds."""
    parts = [(test, judge(films.select(rest), films.select(test), coverage, positive)) for rest, test in _folds(films)]
    names = ("probabilities", "inside", "near", "positive")
    whole = {name: np.zeros((len(films.labels), *getattr(parts[0][1], name).shape[1:])) for name in names}
    for rows, judged in parts:
        for name in names:
            whole[name][rows] = getattr(judged, name)
    return Judged(whole["probabilities"], *(whole[name].astype(bool) for name in names[1:]))


def elsewhere(films: Films, tests: Sequence[Films], coverage: float, positive: str) -> dict[str, Any]:
    """The films of each of ``tests`` by what was fitted on the patients of ``films`` that are not in it; together."""
    fits = []
    for test in tests:
        new = set(test.patients)
        fits.append(films.select(np.array([patient not in new for patient in films.patients])))
    judged = [judge(fit, test, coverage, positive) for fit, test in zip(fits, tests)]
    arrays = ("logits", "labels", "patients", "sources")
    every = Films(films.classes, *(np.concatenate([getattr(test, name) for test in tests]) for name in arrays))
    names = ("probabilities", "inside", "near", "positive")
    joined = Judged(*(np.concatenate([getattr(one, name) for one in judged]) for name in names))
    return {**summary(every, joined, coverage, positive), "fitted_on": [len(fit.labels) for fit in fits]}


def summary(films: Films, judged: Judged, coverage: float, positive: str = "covid19") -> dict[str, Any]:
    """Figures of one coverage: of the sets, of the label and of the decision, for what stays ok and for review."""
    rows, label = np.arange(len(films.labels)), judged.probabilities.argmax(axis=1)
    covered, right = judged.inside[rows, films.labels], label == films.labels
    size = judged.inside.sum(axis=1)
    unsure = (size != 1) | ~judged.inside[rows, label]
    review = unsure | judged.near
    decided = judged.positive == (films.labels == films.classes.index(positive))
    by_source = {str(name): films.sources == name for name in sorted(set(films.sources))}
    return {
        "asked": coverage,
        "films": len(rows),
        "coverage": _share(covered, films.patients),
        "per_class": {name: _share(covered[at], films.patients[at]) for name, at in _by_class(films)},
        "per_source": {name: _share(covered[at], films.patients[at]) for name, at in by_source.items()},
        "sizes": [float((size == number).mean()) for number in range(len(films.classes) + 1)],
        "unsure": float(unsure.mean()),
        "near": float(judged.near.mean()),
        "review": float(review.mean()),
        "review_per_source": {name: float(review[at].mean()) for name, at in by_source.items()},
        "label_right": {name: _mean(right[at]) for name, at in _parts(unsure, judged.near, review)},
        "decision_right": {name: _mean(decided[at]) for name, at in _parts(unsure, judged.near, review)},
        "wrong_labels_in_review": _mean(review[~right]),
    }


def compare(films: Films, score: str, by_class: int, coverage: float) -> dict[str, Any]:
    """Sets by another score, or with one limit for all classes, cross-validated by patient."""
    inside = np.zeros(films.logits.shape, bool)
    right = films.logits.argmax(axis=1) == films.labels
    for rest, test in _folds(films):
        fit = films.select(rest)
        temperature = fit_temperature(fit.logits, fit.labels).temperature
        known, asked = (conformity(probabilities(films.logits[at], temperature), score) for at in (rest, test))
        own = known[np.arange(len(known)), fit.labels]
        limits = []
        for index in range(len(films.classes)):
            of = fit.labels == index if by_class else np.ones(len(own), bool)
            limits.append(minimum_probability(own[of], list(fit.patients[of]), coverage))
        inside[test] = members(asked, np.array(limits, np.float64))
    covered, alone = inside[np.arange(len(inside)), films.labels], inside.sum(axis=1) == 1
    return {
        "score": score,
        "by_class": bool(by_class),
        "coverage": float(covered.mean()),
        "per_class": {name: float(covered[at].mean()) for name, at in _by_class(films)},
        "size": float(inside.sum(axis=1).mean()),
        "alone": float(alone.mean()),
        "accuracy_alone": _mean(right[alone]),
        "accuracy_others": _mean(right[~alone]),
    }


def conformity(values: NDArray[np.float64], score: str) -> NDArray[np.float64]:
    """How well each class fits, larger is better: (N, C) -> (N, C). LAC: its probability. APS: minus the sum of
    probabilities down to it (Romano, Sesia and Candes 2020, without their randomization); RAPS: and a penalty
    for each class before it (Angelopoulos et al. 2021)."""
    if score == "LAC":
        return values
    order = np.argsort(-values, axis=1, kind="stable")
    sums = np.cumsum(np.take_along_axis(values, order, axis=1), axis=1)
    if score == "RAPS":
        sums = sums + PENALTY * np.arange(values.shape[1])
    result = np.empty_like(values)
    np.put_along_axis(result, order, -sums, axis=1)
    return result


def curve(films: Films, judged: Judged) -> list[dict[str, float]]:
    """Accuracy of the surest share of films, by the largest probability: risk against coverage."""
    right = judged.probabilities.argmax(axis=1) == films.labels
    order = np.argsort(-judged.probabilities.max(axis=1), kind="stable")
    counts = [round(share * len(order)) for share in (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0)]
    return [{"kept": count / len(order), "accuracy": float(right[order[:count]].mean())} for count in counts]


def simulate(draws: int) -> list[dict[str, Any]]:
    """Coverage of a new patient's film where the films of a patient are copies; one class.

    Half of the patients have 1 film, with a probability between 0 and 1, the others 10, between 0.4 and 1. ``films``:
    each film counts 1, as if films were independent. ``patients``: the rule of this package. The coverage of each
    draw is exact: the probabilities are uniform.
    """
    rng = np.random.default_rng(0)
    result = []
    for count in (20, 50, 200):
        found: dict[str, list[float]] = {"films": [], "patients": []}
        for _ in range(draws):
            sizes = rng.choice([1, 10], count)
            own = np.where(sizes == 10, rng.uniform(0.4, 1, count), rng.uniform(0, 1, count))
            scores = np.repeat(own, sizes)
            names = [str(number) for number in np.repeat(np.arange(count), sizes)]
            for rule, patients in (("films", list(map(str, range(len(names))))), ("patients", names)):
                least = minimum_probability(scores, patients, 0.9)
                assert least is not None
                found[rule].append(0.5 * (1 - least) + 0.5 * min(1.0, (1 - least) / 0.6))
        for rule, values in found.items():
            result.append(
                {"patients": count, "rule": rule, "mean": float(np.mean(values)), "sd": float(np.std(values))}
            )
    return result


def scores_table(rows: Sequence[dict[str, Any]]) -> str:
    titles = ("score at 90 %", "limits", "coverage", "per class", "classes in a set", "one class")
    lines = [f"| {' | '.join(titles)} | label right, of these / of others |", "|---" * (len(titles) + 1) + "|"]
    for row in rows:
        each = ", ".join(f"{value:.3f}" for value in row["per_class"].values())
        lines.append(
            f"| {row['score']} | {'by class' if row['by_class'] else 'one'} | {row['coverage']:.3f} | {each} "
            f"| {row['size']:.2f} | {100 * row['alone']:.1f} % | {_rate(row['accuracy_alone'])} / "
            f"{_rate(row['accuracy_others'])} |"
        )
    return "\n".join(lines)


def curve_table(rows: Sequence[dict[str, float]]) -> str:
    lines = [["surest films kept"], ["label right"]]
    for row in rows:
        lines[0].append(f"{100 * row['kept']:.0f} %")
        lines[1].append(f"{row['accuracy']:.3f}")
    first, second = (f"| {' | '.join(line)} |" for line in lines)
    return "\n".join([first, "|---" * len(lines[0]) + "|", second])


def summary_table(columns: Sequence[dict[str, Any]], classes: Sequence[str]) -> str:
    """One column a coverage."""
    rows: list[tuple[str, list[str]]] = [("coverage asked for", [f"{100 * one['asked']:g} %" for one in columns])]
    rows.append(("coverage", [_with_interval(one["coverage"]) for one in columns]))
    for group in ("per_class", "per_source"):
        rows += [(f"... {name}", [_with_interval(one[group][name]) for one in columns]) for name in columns[0][group]]
    numbers = ["none", *map(str, range(1, len(classes) + 1))]
    rows += [
        (f"sets of {number}", [f"{100 * one['sizes'][at]:.1f} %" for one in columns])
        for at, number in enumerate(numbers)
    ]
    for name in ("unsure", "near", "review"):
        rows.append((name, [f"{100 * one[name]:.1f} %" for one in columns]))
    for name in columns[0]["review_per_source"]:
        rows.append((f"review, {name}", [f"{100 * one['review_per_source'][name]:.1f} %" for one in columns]))
    for what in ("label", "decision"):
        for part in columns[0][f"{what}_right"]:
            rows.append((f"{what} right, {part}", [_rate(one[f"{what}_right"][part]) for one in columns]))
    rows.append(("wrong labels that are in review", [_rate(one["wrong_labels_in_review"]) for one in columns]))
    lines = [f"| {name} | {' | '.join(cells)} |" for name, cells in rows]
    return "\n".join([lines[0], "|---" * (len(columns) + 1) + "|", *lines[1:]])


def simulation_table(rows: Sequence[dict[str, Any]]) -> str:
    lines = ["| patients | each counts 1 | coverage of a new patient, 0.9 asked | sd over draws |", "|---|---|---|---|"]
    lines += [f"| {row['patients']} | {row['rule']} | {row['mean']:.3f} | {row['sd']:.3f} |" for row in rows]
    return "\n".join(lines)


def _folds(films: Films) -> Iterator[tuple[NDArray[np.bool_], NDArray[np.bool_]]]:
    """The other patients, and those judged, as bool (N,): fold after fold."""
    fold = np.array([fold_of(str(patient)) for patient in films.patients])
    for number in np.unique(fold):
        yield fold != number, fold == number


def _by_class(films: Films) -> Iterator[tuple[str, NDArray[np.bool_]]]:
    return ((name, films.labels == at) for at, name in enumerate(films.classes))


def _parts(*flags: NDArray[np.bool_]) -> list[tuple[str, NDArray[np.bool_]]]:
    unsure, near, review = flags
    return [("all", np.ones_like(review)), ("ok", ~review), ("review", review), ("unsure", unsure), ("near", near)]


def _share(flags: NDArray[np.bool_], patients: NDArray[Any]) -> dict[str, Any] | None:
    if not len(flags):
        return None
    rate = float(flags.mean())
    return {"value": rate, "ci95": wilson_interval(rate, effective_patients(list(patients))), "films": len(flags)}


def _mean(flags: NDArray[np.bool_]) -> float | None:
    return float(flags.mean()) if len(flags) else None


def _rate(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"


def _with_interval(share: dict[str, Any] | None) -> str:
    return "-" if share is None else "{:.3f} ({:.3f} to {:.3f})".format(share["value"], *share["ci95"])


if __name__ == "__main__":
    raise SystemExit(main())

"""How a network does on parts of its test films: by source, view, age group and sex; and over its folds, as Table 3.

    magsd evaluate RUN --data M.csv --out EVAL
    python benchmarks/subgroups.py EVAL [EVAL ...] --data M.csv                         seconds
    python benchmarks/subgroups.py EVAL --data M.csv --folds [--paper-data A] [--source cohen --source nih]

M.csv has the columns path,label,patient and, where known, view,age,sex; sources are those of the evaluation. Several
evaluations are taken together; each fold of each is one model. Every prediction counts once.

accuracy      share of predictions that are right, at argmax, of all classes
AUC           share of the pairs of a positive and a negative film in which the positive one has the higher score. Only
              pairs judged by the same model count; the macro AUC is the mean over all classes, each against the rest
sensitivity   share of the positive class's predictions that name it, at argmax; specificity: of the others' that do not

Intervals (95 %) resample patients. A figure is given only for groups of at least 20 films and 10 patients, and only
where both kinds of films that it compares come from at least 10 patients each; else it is "too few".
"""

from __future__ import annotations

import argparse
import csv
import os
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from magsd.metrics import Ranked, patient_weights, percentile_interval
from magsd.predictors import Predictions
from magsd_runtime.errors import RESEARCH_USE, DataError, MagsdError, UsageError
from scores import COVID, log_odds, read_predictions, shown
from table_3 import DATA_DIFFER, TABLE_3, folds_table, markdown, over_folds
from timing import save

MIN_FILMS = 20
MIN_PATIENTS = 10
TOO_FEW = "too few"
UNKNOWN = "unknown"
FIGURES = ("accuracy", "macro_auc", "auc", "sensitivity", "specificity")
GROUPS: Mapping[str, tuple[str, ...]] = {
    "view": ("PA", "AP", "other", UNKNOWN),
    "age": ("under 18", "18-39", "40-64", "65 and over", UNKNOWN),
    "sex": ("female", "male", UNKNOWN),
}
OLDEST = 120.0
"""Years; a greater age is a mistake of the table (ChestX-ray14 is known for some)."""

AGE = re.compile(r"(\d{1,4}(?:\.\d+)?)\s*([YMWD]?)", re.IGNORECASE)
YEARS = {"": 1.0, "Y": 1.0, "M": 1 / 12, "W": 7 / 365.25, "D": 1 / 365.25}
"""Years in a unit of an age: a plain number is years, letters as in DICOM's age strings (PS3.5, Table 6.2-1, AS)."""


def main(argv: Sequence[str] | None = None) -> int:
    arguments = _arguments(argv)
    try:
        predictions = read_evaluations(arguments.evaluations)
        groups = group_names(predictions, read_facts(arguments.data))
        if arguments.source:
            there = sorted(set(groups["source"]))
            absent = [name for name in arguments.source if name not in there]
            if absent:
                raise UsageError(f"--source is {absent[0]}: there are {', '.join(there)}")
            rows = np.array([name in arguments.source for name in groups["source"]], np.bool_)
            predictions = predictions.select(rows)
            groups = {dimension: _at(names, rows) for dimension, names in groups.items()}
        results: dict[str, Any] = {
            "data": str(arguments.data),
            "evaluations": [str(path) for path in arguments.evaluations],
            "source": arguments.source,
            "positive": arguments.positive,
            "rule": {"min_films": MIN_FILMS, "min_patients": MIN_PATIENTS},
            "bootstrap": {"resamples": arguments.bootstrap, "seed": arguments.seed, "unit": "patient"},
            "research_use_only": True,
        }
        known = predictions.labels >= 0
        if not known.all():
            unknown = sorted({record.label for record in predictions.select(~known).records})
            print(f"{int((~known).sum())} predictions left out: the model does not know {', '.join(unknown)}\n")
            predictions = predictions.select(known)
            groups = {dimension: _at(names, known) for dimension, names in groups.items()}
        how = {"resamples": arguments.bootstrap, "seed": arguments.seed}
        results["groups"] = subgroups(predictions, groups, arguments.positive, **how)
        print(groups_table(results["groups"], arguments.positive))
        if arguments.folds:
            results["folds"] = over_folds(predictions, **how)
            results["paper"] = {"source": "Table 3", "data_set": arguments.paper_data, "note": DATA_DIFFER,
                                "rows": TABLE_3[arguments.paper_data]}  # fmt: skip
            print(f"\n{folds_table(results['folds'], arguments.paper_data)}")
        save(arguments.json, results)
    except MagsdError as error:
        print(f"subgroups: {error}", file=sys.stderr)
        return error.exit_code
    print(f"\n{RESEARCH_USE}")
    return 0


@dataclass(frozen=True)
class Facts:
    """What a manifest says of one film; ``view``, ``age`` and ``sex`` are names of ``GROUPS``."""

    label: str
    patient: str
    view: str
    age: str
    sex: str


def view_group(text: str) -> str:
    """``PA`` and ``AP`` (also "AP Supine" and the like); any other word is ``other``, nothing is ``unknown``."""
    words = text.upper().split()
    if not words:
        return UNKNOWN
    return words[0] if words[0] in ("PA", "AP") else "other"


def age_group(text: str) -> str:
    """The group of an age in years, or of a DICOM age string such as 013Y or 006M; else ``unknown``."""
    found = AGE.fullmatch(text.strip())
    if found is None:
        return UNKNOWN
    years = float(found[1]) * YEARS[found[2].upper()]
    if years > OLDEST:
        return UNKNOWN
    return next(name for name, end in zip(GROUPS["age"], (18, 40, 65, np.inf)) if years < end)


def sex_group(text: str) -> str:
    return {"f": "female", "female": "female", "m": "male", "male": "male"}.get(text.strip().lower(), UNKNOWN)


def read_facts(manifest: Path) -> dict[str, Facts]:
    """The films of a manifest by absolute path; a column of view, age or sex that is not there is unknown for all.

    Raises
    ------
    DataError
        If the table cannot be read, or has no path, label and patient.
    """
    try:
        with open(manifest, newline="", encoding="utf-8-sig") as file:
            lines = list(csv.reader(file, strict=True))
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise DataError(f"{manifest}: cannot be read ({error}), expected a manifest CSV in UTF-8") from error
    columns = [name.strip().lower() for name in lines[0]] if lines else []
    missing = [name for name in ("path", "label", "patient") if name not in columns]
    if missing:
        raise DataError(f"{manifest}: the header lacks {', '.join(missing)}")
    facts: dict[str, Facts] = {}
    for cells in lines[1:]:
        row = dict(zip(columns, (cell.strip() for cell in cells)))
        if row.get("path"):
            # several lines of one film are its boxes, and agree in all else
            facts.setdefault(
                os.path.abspath(manifest.parent / row["path"]),
                Facts(row.get("label", ""), row.get("patient", ""), view_group(row.get("view", "")),
                      age_group(row.get("age", "")), sex_group(row.get("sex", ""))),
            )  # fmt: skip
    return facts


def read_evaluations(paths: Sequence[Path]) -> Predictions:
    """All predictions of several evaluations; ``folds`` numbers the models: each fold of each evaluation.

    Raises
    ------
    DataError
        If there are no predictions in a folder, or the evaluations differ in their classes.
    """
    parts = [read_predictions(path) for path in paths]
    classes = parts[0].classes
    models, first = [], 0
    for path, part in zip(paths, parts):
        if part.classes != classes:
            raise DataError(f"{path}: classes {', '.join(part.classes)}; those of {paths[0]}: {', '.join(classes)}")
        numbers, index = np.unique(part.folds, return_inverse=True)
        models.append(index.astype(np.int64) + first)
        first += len(numbers)
    return Predictions(
        classes,
        tuple(record for part in parts for record in part.records),
        np.concatenate(models),
        np.concatenate([part.probabilities for part in parts]),
    )


def group_names(predictions: Predictions, facts: Mapping[str, Facts]) -> dict[str, tuple[str, ...]]:
    """For source, view, age and sex, the group of each prediction.

    Raises
    ------
    DataError
        If the manifest lacks a film of the predictions, or names another label or patient for it.
    """
    found: list[Facts] = []
    missing: list[Path] = []
    for record in predictions.records:
        entry = facts.get(os.path.abspath(record.path))
        if entry is None:
            missing.append(record.path)
        elif (entry.label, entry.patient) != (record.label, record.patient):
            raise DataError(f"{record.path}: label or patient differ between --data and the predictions")
        else:
            found.append(entry)
    if missing:
        raise DataError(
            f"--data lacks {len(missing)} of {len(predictions.records)} predicted films, the first {missing[0]}: name "
            "the manifest that was evaluated (paths are compared as absolute ones)"
        )
    source = tuple(record.source or UNKNOWN for record in predictions.records)
    return {"source": source, **{name: tuple(getattr(entry, name) for entry in found) for name in GROUPS}}


def subgroups(
    predictions: Predictions,
    groups: Mapping[str, Sequence[str]],
    positive: str = COVID,
    *,
    resamples: int = 1000,
    seed: int = 0,
) -> list[dict[str, Any]]:
    """One dict a group, "overall" first: dimension, group, films, patients, positive_films, predictions, figures.

    ``figures`` has ``value`` and ``ci95`` of each of ``FIGURES``, None where there are too few films.

    Raises
    ------
    UsageError
        If the models do not know the class ``positive``.
    """
    if positive not in predictions.classes:
        raise UsageError(f"--positive is {positive}: the models know {', '.join(predictions.classes)}")
    wanted = [("overall", "all")]
    for dimension, names in groups.items():
        wanted += [(dimension, name) for name in GROUPS.get(dimension, tuple(sorted(set(names))))]
    rows = []
    for dimension, name in wanted:
        inside = [dimension == "overall" or group == name for group in groups.get(dimension, predictions.records)]
        part = predictions.select(np.array(inside, np.bool_))
        films = {record.path: record for record in part.records}
        rows.append(
            {
                "dimension": dimension,
                "group": name,
                "films": len(films),
                "patients": len({record.patient for record in part.records}),
                "positive_films": sum(record.label == positive for record in films.values()),
                "predictions": len(part.records),
                "figures": group_figures(part, positive, resamples=resamples, seed=seed),
            }
        )
    return rows


def group_figures(part: Predictions, positive: str, *, resamples: int, seed: int) -> dict[str, dict[str, Any] | None]:
    """Every figure of one group with its interval; None for those that the rule refuses."""
    refused: dict[str, dict[str, Any] | None] = dict.fromkeys(FIGURES)
    names, patient = np.unique(np.array([record.patient for record in part.records], np.str_), return_inverse=True)
    if len({record.path for record in part.records}) < MIN_FILMS or len(names) < MIN_PATIENTS:
        return refused
    labels, predicted, index = part.labels, part.predicted, part.classes.index(positive)
    with_it, called = labels == index, predicted == index

    def enough(rows: NDArray[np.bool_]) -> bool:
        return len(np.unique(patient[rows])) >= MIN_PATIENTS

    def share(right: NDArray[np.bool_], of: NDArray[np.bool_]) -> Figure:
        hits, all_of = (np.bincount(patient[rows], minlength=len(names)) for rows in (right & of, of))
        return lambda weights: _ratio(weights @ hits, weights @ all_of)

    asked: dict[str, Figure] = {"accuracy": share(predicted == labels, np.ones(len(labels), np.bool_))}
    if enough(with_it):
        asked["sensitivity"] = share(called, with_it)
    if enough(~with_it):
        asked["specificity"] = share(~called, ~with_it)
    classes = range(len(part.classes))
    told_apart = [number for number in classes if enough(labels == number) and enough(labels != number)]
    areas = {number: _auc(part, number, patient) for number in told_apart}
    if index in areas:
        asked["auc"] = areas[index]
    if len(areas) == len(part.classes):
        asked["macro_auc"] = lambda weights: np.mean([area(weights) for area in areas.values()], axis=0)
    everybody = np.ones((1, len(names)))
    drawn = list(patient_weights(len(names), len(labels), resamples=resamples, seed=seed))
    for name, figure in asked.items():
        value = float(figure(everybody)[0])
        if np.isfinite(value):  # no pair of films was judged by the same model
            values = np.concatenate([figure(weights) for weights in drawn]) if drawn else np.zeros(0)
            refused[name] = {"value": value, "ci95": percentile_interval(values)}
    return refused


Figure = Callable[[NDArray[np.float64]], NDArray[np.float64]]
"""How often each patient counts (R, P) -> the figure (R,), NaN where it is not defined."""


def groups_table(rows: Sequence[Mapping[str, Any]], positive: str) -> str:
    """The groups as a Markdown table, and how to read it."""
    head = ["group", "films", "patients", positive, "accuracy", "macro AUC", f"AUC {positive}", "sensitivity",
            "specificity"]  # fmt: skip
    lines = []
    for row in rows:
        name = row["group"] if row["dimension"] == "overall" else f"{row['dimension']}: {row['group']}"
        figures = [TOO_FEW if row["figures"][figure] is None else shown(row["figures"][figure]) for figure in FIGURES]
        lines.append([name, str(row["films"]), str(row["patients"]), str(row["positive_films"]), *figures])
    notes = [
        f'"{TOO_FEW}": fewer than {MIN_FILMS} films or {MIN_PATIENTS} patients in the group, or fewer than '
        f"{MIN_PATIENTS} patients with (or without) the class that a figure is about.",
        f"In brackets: 95 % intervals, patients resampled. Sensitivity and specificity: {positive}, at argmax.",
        "Groups differ in their sources and classes too: a difference between two rows need not be due to their names.",
    ]
    if rows and rows[0]["predictions"] > rows[0]["films"]:
        notes.append(f"Some films were judged by several models: {rows[0]['predictions']} predictions in all.")
    if any(figure and figure["ci95"] and figure["ci95"][0] == figure["ci95"][1] for row in rows
           for figure in row["figures"].values()):  # fmt: skip
        notes.append("An interval of one number means that no film was wrong (or none right), not that none can be.")
    return "\n".join([markdown(head, lines), "", *(f"- {text}" for text in notes)])


def _auc(part: Predictions, index: int, patient: NDArray[np.int64]) -> Figure:
    """Class ``index`` against the rest, over the pairs of films that the same model judged."""
    scores = log_odds(part.probabilities, index)
    ranked = [
        Ranked(part.labels[rows] == index, scores[rows], patient[rows])
        for rows in (part.folds == model for model in np.unique(part.folds))
    ]

    def area(weights: NDArray[np.float64]) -> NDArray[np.float64]:
        wins, pairs = np.sum([model.counts(weights) for model in ranked], axis=0)
        return _ratio(wins, pairs)

    return area


def _ratio(numerator: NDArray[np.float64], denominator: NDArray[np.float64]) -> NDArray[np.float64]:
    return np.divide(numerator, denominator, out=np.full(numerator.shape, np.nan), where=denominator > 0)


def _at(names: Sequence[str], rows: NDArray[np.bool_]) -> tuple[str, ...]:
    return tuple(name for name, inside in zip(names, rows) if inside)


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("evaluations", nargs="+", type=Path, metavar="EVALUATION_DIR")
    parser.add_argument("--data", required=True, type=Path, metavar="MANIFEST.csv",
                        help="path,label,patient and view,age,sex of the films")  # fmt: skip
    parser.add_argument("--folds", action="store_true", help="also mean and deviation over folds, beside the paper's")
    parser.add_argument("--paper-data", choices=sorted(TABLE_3), default="B", help="the paper's data set (default: B)")
    parser.add_argument("--source", action="append", metavar="NAME",
                        help="films of this source only; may be repeated")  # fmt: skip
    parser.add_argument("--positive", default=COVID, metavar="CLASS", help=f"default: {COVID}")
    parser.add_argument("--bootstrap", type=int, default=1000, metavar="N", help="resamples (default: 1000)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, metavar="FILE")
    return parser.parse_args(argv)


if __name__ == "__main__":
    sys.exit(main())

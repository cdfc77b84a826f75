"""What the shortcut benchmarks share: AUC with its interval by patient, predictions.csv read back, tables.

A network that is sure of itself writes many probabilities of 1 into predictions.csv, whose six digits would make
them equal. The log odds, computed from both sides, keep their order.
"""

from __future__ import annotations

import csv
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from magsd.data import Record
from magsd.metrics import bootstrap_intervals, fold_summary, roc_auc
from magsd.predictors import BUNDLE_FOLD, Predictions
from magsd_runtime.errors import DataError

COVID = "covid19"
HEALTHY = "healthy"
CLASS_COLUMN = "probability_"


@dataclass(frozen=True, eq=False)
class Task:
    """One yes-or-no question put to N predictions: which are ``positive`` bool (N,), ``scores`` (N,) for yes.

    ``models`` int64 (N,) tells which predictions may be ranked together: an AUC is the mean over the models.
    """

    positive: NDArray[np.bool_]
    scores: NDArray[np.float64]
    patients: tuple[str, ...]
    models: NDArray[np.int64]


def join(tasks: Sequence[Task]) -> Task:
    """Several tasks as one, whose AUC is the mean over the models of all; a patient in several is one patient."""
    models, first = [], 0
    for task in tasks:
        numbers = np.unique(task.models, return_inverse=True)[1].astype(np.int64)
        models.append(numbers + first)
        first += int(numbers.max(initial=-1)) + 1
    return Task(
        np.concatenate([task.positive for task in tasks]),
        np.concatenate([task.scores for task in tasks]),
        tuple(name for task in tasks for name in task.patients),
        np.concatenate(models),
    )


def auc(task: Task, *, resamples: int = 1000, seed: int = 0) -> dict[str, Any]:
    """``value`` and ``std`` over the models, None if one has no AUC; ``ci95``, patients resampled; what was counted."""
    areas = [
        roc_auc(positive=task.positive[rows], scores=task.scores[rows])
        for rows in (task.models == model for model in np.unique(task.models))
    ]
    result: dict[str, Any] = {
        "value": None,
        "std": None,
        "ci95": None,
        "positive": int(task.positive.sum()),
        "negative": int((~task.positive).sum()),
        "patients": len(set(task.patients)),
    }
    if not areas or None in areas:
        return result
    labels = task.positive.astype(np.int64)
    intervals = bootstrap_intervals(
        labels=labels,
        predicted=labels,
        # the AUC of one class is that of the other: their macro mean is the AUC asked for
        probabilities=np.stack([-task.scores, task.scores], axis=1),
        patients=task.patients,
        folds=task.models,
        resamples=resamples,
        seed=seed,
    )
    return {**result, **fold_summary(areas), "ci95": intervals["auc"]}


def log_odds(probabilities: NDArray[np.float64], index: int) -> NDArray[np.float64]:
    """log(p / (1 - p)) of class ``index``, (N, C) -> (N,), finite; 1 - p is the sum of the other columns."""
    tiny = np.finfo(np.float64).tiny
    others = np.delete(probabilities, index, axis=1).sum(axis=1)
    return np.log(np.maximum(probabilities[:, index], tiny)) - np.log(np.maximum(others, tiny))


def class_task(predictions: Predictions, name: str, rows: NDArray[np.bool_] | None = None) -> Task | None:
    """Class ``name`` against all others, by its log odds, on the given rows; None if the model lacks the class."""
    if name not in predictions.classes:
        return None
    part = predictions if rows is None else predictions.select(rows)
    return Task(
        np.array([record.label == name for record in part.records], np.bool_),
        log_odds(part.probabilities, part.classes.index(name)),
        tuple(record.patient for record in part.records),
        part.folds,
    )


def read_predictions(path: Path) -> Predictions:
    """What ``magsd evaluate`` wrote: its folder, or a predictions.csv.

    Raises
    ------
    DataError
        If there is no such table.
    """
    file = path / "predictions.csv" if path.is_dir() else path
    try:
        with open(file, newline="", encoding="utf-8") as text:
            table = csv.DictReader(text)
            columns = [name for name in table.fieldnames or () if name.startswith(CLASS_COLUMN)]
            lines = list(table)
        records = tuple(Record(Path(line["path"]), line["label"], line["patient"], line["source"]) for line in lines)
        folds = np.array([int(line["fold"]) if line["fold"] else BUNDLE_FOLD for line in lines], np.int64)
        probabilities = np.array([[float(line[name]) for name in columns] for line in lines], np.float64)
    except OSError as error:
        raise DataError(f"{file}: cannot be read ({error.strerror}), expected what `magsd evaluate` wrote") from error
    except (KeyError, ValueError, TypeError) as error:
        raise DataError(
            f"{file}: is no predictions.csv of `magsd evaluate` ({type(error).__name__}: {error})"
        ) from error
    if not lines or not columns:
        raise DataError(f"{file}: holds no predictions")
    return Predictions(tuple(name.removeprefix(CLASS_COLUMN) for name in columns), records, folds, probabilities)


def default_data_root() -> Path:
    """$MAGSD_DATA, or shared/data/cxr beside the checkout."""
    beside = Path(__file__).resolve().parents[2] / "shared" / "data" / "cxr"
    return Path(os.environ.get("MAGSD_DATA", beside))


def shown(score: Mapping[str, Any] | None) -> str:
    """``0.912 (0.870 to 0.950)`` of a dict with value and ci95; a dash where there is none."""
    if score is None or score["value"] is None:
        return "-"
    low_high = f" ({score['ci95'][0]:.3f} to {score['ci95'][1]:.3f})" if score["ci95"] else ""
    return f"{score['value']:.3f}{low_high}"

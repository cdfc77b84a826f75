"""Folds and scores of made-up rows, as a program of its own, for its time and memory: no image is read.

    python rows_worker.py folds ROWS FOLDS      deal the patients to the folds, and split for each of them
    python rows_worker.py scores ROWS FOLDS     all that magsd evaluate computes of predictions, 200 resamples

It prints {"seconds": wall, "processor": seconds}, without the imports and without making the rows.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

import numpy as np

from magsd.data import Manifest, Record
from magsd.folds import make_folds

CLASSES = ("covid19", "healthy", "pneumonia")
IMAGES_A_PATIENT = 1.25


def manifest(rows: int) -> Manifest:
    """Three classes in turn; every fifth image is a patient's second one."""
    records = [
        Record(
            Path(f"{row:07}.png"),
            CLASSES[int(row / IMAGES_A_PATIENT) % len(CLASSES)],
            f"patient {int(row / IMAGES_A_PATIENT)}",
        )
        for row in range(rows)
    ]
    return Manifest(Path(), tuple(records))


def main(arguments: list[str]) -> int:
    what, rows, folds = arguments[0], int(arguments[1]), int(arguments[2])
    given = manifest(rows)
    if what == "folds":
        began, used = time.perf_counter(), time.process_time()
        made = make_folds(given, folds)
        for fold in range(folds):
            made.split(given, fold)
    else:
        from magsd.evaluation import evaluate_predictions
        from magsd.predictors import Predictions

        rng = np.random.default_rng(0)
        logits = rng.normal(size=(rows, len(CLASSES))) + 1.5 * np.eye(len(CLASSES))[given.label_indices()]
        probabilities = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
        of_fold = make_folds(given, folds).assignment
        numbers = np.array([of_fold[record.patient] for record in given.records], np.int64)
        predictions = Predictions(CLASSES, given.records, numbers, probabilities, logits)
        began, used = time.perf_counter(), time.process_time()
        evaluate_predictions(predictions, resamples=200)
    print(json.dumps({"seconds": time.perf_counter() - began, "processor": time.process_time() - used}))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

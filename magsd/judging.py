"""The models of a run or a bundle judge a manifest: who may predict what, and what came out.

A patient whose images trained a fold's model, or chose its epoch, is never predicted by it. Where the
manifest has boxes or masks the heat maps are kept, also those of training-side images, which choose the
localization threshold.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from magsd_runtime.bundle import Bundle
from magsd_runtime.errors import DataError, UsageError
from magsd_runtime.preprocessing import PreprocessingSpec

from .config import unfinished
from .data import Manifest, Record, load_standardized, read_manifest
from .ground_truth import Truth, read_truth
from .localization_metrics import Case
from .predictors import BUNDLE_FOLD, Network, Outputs, Predictions, Run, bundle_network, predict, run_network

TUNING_IMAGES = 5
"""Boxed validation images from which on they alone choose a fold's localization threshold."""

Progress = Callable[[str], Callable[[int, int], None] | None]


@dataclass(frozen=True, eq=False)
class Judged:
    """What the models said: all predictions, the localized images, those that may choose thresholds."""

    predictions: Predictions
    cases: list[Case]
    tuning: dict[int, list[Case]]
    tuning_part: str | None
    device: str
    notes: list[dict[str, str]]


def judge_bundle(bundle: Bundle, manifest: Manifest, device: str, batch: int, progress: Progress) -> Judged:
    notes = []
    training = bundle.manifest.get("training")
    if manifest.digest() in _strings(training):
        notes.append(
            note(
                "warning",
                "This bundle was trained on this very manifest. A bundle does not know its folds, so "
                "images that the "
                "model was trained on are among those evaluated: evaluate the run instead.",
            )
        )
    images = _Images(bundle.preprocessing, progress)
    images.load(manifest.records)
    records = manifest.records
    truths: dict[Path, Truth] = {}
    with bundle_network(bundle, device) as (network, name):
        outputs = _predict(network, records, images, bundle.classes, batch, progress("predicting"), bundle.temperature)
    predictions = Predictions(
        bundle.classes, records, np.full(len(records), BUNDLE_FOLD, np.int64), outputs.probabilities, outputs.logits
    )
    return Judged(
        predictions, _cases(records, outputs, BUNDLE_FOLD, truths, bundle.preprocessing), {}, None, name, notes
    )


def judge_run(run: Run, manifest: Manifest, fold: int | None, device: str, batch: int, progress: Progress) -> Judged:
    if fold is not None and fold not in run.trained:
        raise UsageError(f"--fold is {fold}: {run.path} has models of folds {', '.join(map(str, run.trained))}")
    numbers = run.trained if fold is None else (fold,)
    own = manifest.digest() == run.data_facts.get("digest")
    seen_in = run.folds.assignment
    rows = {
        number: [record for record in manifest.records if seen_in.get(record.patient, number) == number]
        for number in numbers
    }
    if not any(rows.values()):
        raise DataError(
            "every patient of the manifest was in the training of the models of folds "
            f"{', '.join(map(str, numbers))}: "
            "nothing is left to judge them on"
        )
    tuning_records, tuning_part = _tuning_records(run, manifest if own else None, numbers)
    images = _Images(run.preprocessing, progress)
    images.load([record for part in (*rows.values(), *tuning_records.values()) for record in part])
    truths: dict[Path, Truth] = {}
    predictions, cases, tuning, devices = [], [], {}, set()
    for number in numbers:
        with run_network(run, number, device) as (network, used):
            devices.add(used)
            if rows[number]:
                shown = progress(f"fold {number}")
                outputs = _predict(network, rows[number], images, run.classes, batch, shown)
                predictions.append((number, rows[number], outputs))
                cases += _cases(rows[number], outputs, number, truths, run.preprocessing)
            if tuning_records[number]:
                outputs = _predict(network, tuning_records[number], images, run.classes, batch, None)
                tuning[number] = _cases(tuning_records[number], outputs, number, truths, run.preprocessing)
    joined = Predictions(
        run.classes,
        tuple(record for _, part, _ in predictions for record in part),
        np.concatenate([np.full(len(part), number, np.int64) for number, part, _ in predictions]),
        np.concatenate([outputs.probabilities for _, _, outputs in predictions]),
        np.concatenate([outputs.logits for _, _, outputs in predictions]),
    )
    notes = _run_notes(run, manifest, own, numbers, rows)
    return Judged(joined, cases, tuning, tuning_part if tuning else None, ", ".join(sorted(devices)), notes)


def _tuning_records(
    run: Run, own: Manifest | None, numbers: Sequence[int]
) -> tuple[dict[int, list[Record]], str | None]:
    """Each fold's training-side records with boxes: of its validation part; with too few, of both parts."""
    empty: dict[int, list[Record]] = {number: [] for number in numbers}
    if own is None:
        try:
            own = read_manifest(Path(run.config.data))
        except DataError:
            return (
                empty,
                None,
            )  # the run's data are elsewhere: the evaluated images choose, patient by patient
        if own.digest() != run.data_facts.get("digest"):
            return empty, None
    whole: dict[int, list[Record]] = {}
    validation: dict[int, list[Record]] = {}
    for number in numbers:
        split = run.folds.split(own, number, validation_fraction=run.config.validation_fraction, seed=run.config.seed)
        validation[number] = [own.records[index] for index in split.validation if _is_localized(own.records[index])]
        training = [own.records[index] for index in split.train if _is_localized(own.records[index])]
        whole[number] = training + validation[number]
    if all(len(part) >= TUNING_IMAGES for part in validation.values()):
        return validation, "validation"
    return whole, "training and validation"


class _Images:
    """Standardized images uint8 (S, S) by file, each decoded once."""

    def __init__(self, spec: PreprocessingSpec, progress: Progress) -> None:
        self._spec, self._progress = spec, progress
        self._images: dict[Path, NDArray[np.uint8]] = {}

    def load(self, records: Sequence[Record]) -> None:
        wanted = list({record.path: record for record in records}.values())
        loaded = load_standardized(wanted, self._spec, progress=self._progress("reading"))
        self._images.update((record.path, image) for record, image in zip(wanted, loaded))

    def of(self, records: Sequence[Record]) -> list[NDArray[np.uint8]]:
        return [self._images[record.path] for record in records]


def _predict(
    network: Network, records: Sequence[Record], images: _Images, classes: Sequence[str], batch: int,
    progress: Callable[[int, int], None] | None, temperature: float = 1.0,
) -> Outputs:  # fmt: skip
    index = {name: number for number, name in enumerate(classes)}
    # the evidence map is that of the class the record says, where the model knows it
    heat_classes = {
        position: index.get(record.label) for position, record in enumerate(records) if _is_localized(record)
    }
    return predict(
        network,
        images.of(records),
        temperature=temperature,
        heat_classes=heat_classes,
        batch=batch,
        progress=progress,
    )


def _cases(
    records: Sequence[Record], outputs: Outputs, fold: int, truths: dict[Path, Truth], spec: PreprocessingSpec
) -> list[Case]:
    cases = []
    for position, heats in sorted(outputs.heats.items()):
        record = records[position]
        if record.path not in truths:
            truths[record.path] = read_truth(record, spec)
        cases.append(Case(record, fold, truths[record.path], heats))
    return cases


def _is_localized(record: Record) -> bool:
    return bool(record.boxes) or record.mask is not None


def note(level: str, text: str) -> dict[str, str]:
    """One line of the report's notes; ``level`` is note or warning."""
    return {"level": level, "text": text}


def _run_notes(
    run: Run, manifest: Manifest, own: bool, numbers: Sequence[int], rows: dict[int, list[Record]]
) -> list[dict[str, str]]:
    """Who predicted what, and what was left out, in words."""
    notes = []
    for number in numbers:
        if at := unfinished(run.path / f"fold{number}", run.config.epochs):
            notes.append(note("warning", f"The training of fold {number} is not finished: {at}."))
    judged = {record.path for part in rows.values() for record in part}
    left_out = len(manifest.records) - len(judged)
    if own:
        notes.append(
            note(
                "note",
                "Cross-validation: each fold's model predicts its test fold. Folds are grouped by patient, "
                "and the epoch was chosen on a validation part of the training folds.",
            )
        )
        if left_out:
            notes.append(
                note(
                    "warning" if len(numbers) < run.config.folds else "note",
                    f"{left_out} of {len(manifest.records)} images are not evaluated: they belong to folds "
                    "without "
                    f"a model here ({len(numbers)} of {run.config.folds} folds are evaluated).",
                )
            )
        return notes
    met = [record for record in manifest.records if record.patient in run.folds.assignment]
    notes.append(
        note(
            "note",
            "The manifest is not the one of the training: each fold's model predicts every image of "
            "patients that "
            "the run has never met, and a score is the mean over the models.",
        )
    )
    if met:
        patients = len({record.patient for record in met})
        notes.append(
            note(
                "warning",
                f"{len(met)} images are of {patients} patients who are in the training data too (by "
                "patient name). "
                f"Models that had seen them did not predict them; {left_out} images are left out altogether.",
            )
        )
    return notes


def _strings(value: Any) -> set[str]:
    """Every string anywhere in a JSON value, but for what it says about evaluations."""
    if isinstance(value, dict):
        value = [item for name, item in value.items() if "evaluat" not in name]
    if isinstance(value, list):
        return set().union(*(_strings(item) for item in value)) if value else set()
    return {value} if isinstance(value, str) else set()

"""A model's calibration from the held-out folds of its cross-validation, as ``magsd evaluate`` left them.

Each prediction is by the one model of the run that was not trained on the image's patient. The exported model is
another fold's, or that of all folds: its calibration is taken to be that of its recipe, which is what can be had
without keeping images from training. An image that the model itself was trained on is never judged by it here.
"""

from __future__ import annotations

import csv
import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from magsd_runtime.calibrating import SENSITIVITIES, Cases, calibrate, check_wanted
from magsd_runtime.calibration_record import Calibration
from magsd_runtime.errors import CalibrationError, DataError, UsageError
from magsd_runtime.prediction_sets import COVERAGE

from .sources import Source, read_json

if TYPE_CHECKING:
    from magsd.checkpoint import CheckpointInfo

_RECIPE = ("model", "backbone", "pooling", "loss", "attention_augmentation", "epochs")


def held_out_calibration(
    info: CheckpointInfo,
    source: Source,
    *,
    evaluation: Path | None,
    calibration: Path | None,
    positive: str | None = None,
    sensitivities: Sequence[float] = SENSITIVITIES,
    coverage: float = COVERAGE,
) -> tuple[Calibration, list[str]]:
    """The calibration, not yet bound to a model's hash, and what is to be said about it, a line each.

    ``calibration`` names the evaluation folder (or its predictions.csv) of a cross-validation of the same recipe;
    what makes it unusable is an error. Without it the run's own ``evaluation`` serves if it can: an old one without
    logits, or one with too few cases, leaves the model uncalibrated, and a line says why.

    Raises
    ------
    UsageError, CalibrationError
        If the predictions are not held-out ones of this recipe and these data, or ``calibration`` is not enough.
    """
    check_wanted(info.classes, positive, sensitivities, coverage)
    folder = calibration or evaluation
    if folder is None:
        if positive is not None:
            raise UsageError("--positive needs held-out predictions: add --evaluation DIR or --calibration DIR")
        return Calibration(), []
    what = f"--evaluation {folder}" if calibration is None else f"--calibration {folder}"
    try:
        cases, text = read_held_out(folder, info, source, what, own=calibration is None)
        return calibrate(
            cases, model_sha256="", source=text, positive=positive, sensitivities=sensitivities, coverage=coverage
        )
    except CalibrationError as error:
        if calibration is not None:
            raise CalibrationError(f"{what}: {error}") from error
        # the text goes into the bundle: it names no file
        return Calibration(source=f"not fitted: {error}"), [f"probabilities are not calibrated: {what}: {error}"]


def read_held_out(folder: Path, info: CheckpointInfo, source: Source, what: str, *, own: bool) -> tuple[Cases, str]:
    """The labelled logits in an evaluation's predictions.csv, and in words what they are.

    ``own``: it is of the run that ``source`` lies in. ``what`` begins the line of an error.

    Raises
    ------
    CalibrationError
        If it is sound, but holds nothing to calibrate on: it is of other data, or older than logits in it.
    UsageError
        If it is none, of a bundle or of another recipe, or an image was judged by a model that was trained on its
        patient.
    """
    folder = folder if folder.is_dir() else folder.parent
    if not (folder / "metrics.json").is_file():
        raise UsageError(f"{what}: no metrics.json there (magsd evaluate RUN writes one)")
    metrics = read_json(folder / "metrics.json")
    target = metrics.get("target")
    if not isinstance(target, dict):
        raise UsageError(f"{what}: its metrics.json is not that of magsd evaluate")
    if target.get("kind") != "run":
        raise UsageError(
            f"{what} is of a {target.get('kind')}, which does not know the images that it was trained on: "
            "give the evaluation of a run"
        )
    _require_recipe(target, info, what)
    data = metrics.get("data")
    if not isinstance(data, dict) or data.get("digest") != info.data.get("digest"):
        raise CalibrationError(
            "the evaluation is of another manifest than the training: give one of its held-out folds"
        )
    cases, folds = _read_cases(folder / "predictions.csv", info.classes, str(data.get("digest")))
    run = source.run if own else Path(str(target.get("path")))
    own = own or (run is not None and source.run is not None and run.resolve() == source.run.resolve())
    _require_held_out(cases, folds, run, what)
    return cases, _in_words(sorted(set(folds)), info, own)


def _require_recipe(target: dict[str, Any], info: CheckpointInfo, what: str) -> None:
    config = info.config.to_dict()
    wanted = {
        "classes": list(info.classes),
        "preprocessing_sha256": info.preprocessing.sha256(),
        **{name: config[name] for name in _RECIPE},
    }
    for name, value in wanted.items():
        found = target.get(name)
        if name in target and (list(value) if isinstance(value, tuple) else value) != found:
            raise UsageError(f"{what} is of another recipe: its {name} is {found}, the model's {value}")
        if name not in target and name in ("classes", "preprocessing_sha256"):
            raise UsageError(f"{what} does not say its {name}: evaluate the run again")


def _read_cases(path: Path, classes: tuple[str, ...], digest: str) -> tuple[Cases, list[int]]:
    """The rows of predictions.csv, and the number of the fold whose model made each."""
    try:
        with open(path, newline="", encoding="utf-8") as file:
            table = csv.DictReader(file)
            columns = table.fieldnames or []
            rows = list(table)
    except FileNotFoundError as error:
        raise CalibrationError("the evaluation holds no predictions.csv") from error
    except (OSError, ValueError, csv.Error) as error:
        raise UsageError(f"{path} cannot be read as CSV: {error}") from error
    wanted = [f"logit_{name}" for name in classes]
    if missing := [name for name in wanted if name not in columns]:
        raise CalibrationError(f"predictions.csv has no {missing[0]}: evaluate the run again with this magsd")
    index = {name: at for at, name in enumerate(classes)}
    logits, labels, folds, patients = np.empty((len(rows), len(classes))), [], [], []
    seen: set[str] = set()
    for number, row in enumerate(rows):
        try:
            logits[number] = [float(row[name]) for name in wanted]
            labels.append(index[row["label"]])
            folds.append(int(row["fold"]))
            patients.append(row["patient"])
            if not all(map(math.isfinite, logits[number])) or folds[-1] < 0 or row["path"] in seen:
                raise ValueError("a logit is not finite, a fold is none, or an image is there twice")
            seen.add(row["path"])
        except (KeyError, TypeError, ValueError) as error:
            raise UsageError(
                f"{path} line {number + 2} is no prediction of a cross-validation ({type(error).__name__}: {error}): "
                "evaluate the run again"
            ) from error
    return Cases(classes, logits, np.array(labels, np.int64), tuple(patients), digest), folds


def _require_held_out(cases: Cases, folds: list[int], run: Path | None, what: str) -> None:
    """No patient was judged by a model that had been trained on an image of them.

    A patient whose images were judged by several models was in the training of all but one. Where the run that was
    evaluated is still there, its folds must agree too.
    """
    from magsd.folds import load_folds

    of_patient: dict[str, set[int]] = {}
    for patient, fold in zip(cases.patients, folds):
        of_patient.setdefault(patient, set()).add(fold)
    wrong = {patient for patient, numbers in of_patient.items() if len(numbers) > 1}
    if run is not None and (run / "folds.json").is_file():
        try:
            assignment = load_folds(run / "folds.json").assignment
        except DataError as error:
            raise UsageError(f"{what}: the folds of its run cannot be read ({error})") from error
        wrong |= {patient for patient, numbers in of_patient.items() if numbers != {assignment.get(patient)}}
    if wrong:
        images = sum(patient in wrong for patient in cases.patients)
        raise UsageError(
            f"{what}: {images} images were judged by a model that was trained on images of the same patients "
            f"({len(wrong)}): on such images no model can be calibrated"
        )


def _in_words(folds: Sequence[int], info: CheckpointInfo, own: bool) -> str:
    from magsd.folds import FINAL

    numbers = f"test fold{'s' if len(folds) > 1 else ''} {', '.join(map(str, folds))}"
    if own and info.fold != FINAL:
        return f"held-out predictions of {numbers} of the run that this model is fold {info.fold} of"
    trained = "; this model was trained on all folds" if info.fold == FINAL else ""
    return f"held-out folds of the same recipe: cross-validation, {numbers}{trained}"

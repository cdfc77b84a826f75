"""``magsd evaluate``: a run or a bundle and a manifest become metrics.json, predictions.csv and a report.

The value of a score is the mean over folds, as in section 4.4 of the paper, its interval resamples patients.
Which model may predict which image is decided in :mod:`magsd.judging`.
"""

from __future__ import annotations

import platform
from collections import Counter
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from magsd_runtime._version import __version__
from magsd_runtime.bundle import Bundle
from magsd_runtime.calibration import reliability
from magsd_runtime.errors import DataError, UsageError
from magsd_runtime.localization import IN_LUNGS

from .config import MA_NETS
from .confounds import source_confound
from .data import Manifest, read_manifest
from .evaluation_output import check_out, write_evaluation
from .judging import Judged, Progress, judge_bundle, judge_run, note
from .localization_evaluation import evaluate_localization
from .metrics import (
    SCORES,
    bootstrap_intervals,
    class_scores,
    classification_scores,
    confusion_matrix,
    fold_summary,
)
from .predictors import BUNDLE_FOLD, Predictions, Run, open_target

SCHEMA = "magsd.metrics/1"
WORST_SHOWN = 20
"""Misclassified images that are listed, the most confident first."""


def evaluate_predictions(predictions: Predictions, *, resamples: int = 1000, seed: int = 0) -> dict[str, Any]:
    """The classification part of metrics.json; needs no network. Images of unknown classes are left out.

    Raises
    ------
    DataError
        If no image has a class that the model knows.
    """
    known = predictions.select(predictions.labels >= 0)
    if not known.records:
        found = ", ".join(sorted({record.label for record in predictions.records})[:8])
        raise DataError(
            f"no image has a class that the model knows: the manifest has {found}; the model {', '.join(known.classes)}"
        )
    numbers = sorted(set(known.folds.tolist()))
    parts = [known.select(known.folds == fold) for fold in numbers]
    folds, of_classes = [], []
    for fold, part in zip(numbers, parts):
        arrays = {"labels": part.labels, "predicted": part.predicted, "probabilities": part.probabilities}
        of_classes.append(class_scores(**arrays))
        folds.append(
            {
                "fold": None if fold == BUNDLE_FOLD else fold,
                "images": len(part.records),
                "patients": len({record.patient for record in part.records}),
                **classification_scores(**arrays),
                "ece": reliability(labels=part.labels, probabilities=part.probabilities)["ece"],
                "confusion": _confusion(part).tolist(),
            }
        )
    intervals = bootstrap_intervals(
        labels=known.labels,
        predicted=known.predicted,
        probabilities=known.probabilities,
        patients=[record.patient for record in known.records],
        folds=known.folds,
        resamples=resamples,
        seed=seed,
    )
    per_class: dict[str, Any] = {}
    for index, name in enumerate(known.classes):
        rows = [scores[index] for scores in of_classes]
        per_class[name] = {
            "images": len({record.path for record in known.records if record.label == name}),
            "predictions": sum(row["images"] for row in rows),
            **{score: fold_summary([row[score] for row in rows]) for score in SCORES},
        }
    confusion = _confusion(known)
    totals = confusion.sum(axis=1, keepdims=True)
    shares = np.divide(confusion, totals, out=np.zeros(confusion.shape), where=totals > 0)
    return {
        "classification": {
            name: {**fold_summary([fold[name] for fold in folds]), "ci95": intervals[name]} for name in SCORES
        },
        "per_class": per_class,
        "confusion": {
            "classes": list(known.classes),
            "counts": confusion.tolist(),
            "share_of_true_class": shares.tolist(),
        },
        "calibration": reliability(labels=known.labels, probabilities=known.probabilities),
        "folds": folds,
        "by_source": _by_source(known),
        "worst": _worst(known),
        "bootstrap": {"resamples": resamples, "seed": seed, "unit": "patient"},
    }


def evaluate(
    target_path: Path,
    data: Path,
    out: Path,
    *,
    device: str = "auto",
    batch: int = 32,
    resamples: int = 1000,
    map_name: str | None = None,
    minimum_score: float | None = None,
    fold: int | None = None,
    seed: int = 0,
    force: bool = False,
    progress: Progress = lambda text: None,
) -> dict[str, Any]:
    """Evaluate the run or bundle ``target_path`` on the manifest ``data``; fill ``out``, return metrics.json.

    ``map_name`` (attention or evidence) is the map of the headline localization numbers; by default the
    bundle's, or attention. ``minimum_score`` (0 to 1) is the heat that a region must reach somewhere to count, in
    all maps; by default the bundle's, or 0. ``fold`` restricts a run to one fold. ``force`` replaces an earlier
    evaluation.

    Raises
    ------
    UsageError
        If ``out`` exists and may not be replaced, or the target or the fold is none.
    DataError
        If the manifest cannot be used, or holds nothing that the models may be judged on.
    ArtefactError, BackendUnavailableError
        If the target is damaged, or the device is not there.
    """
    check_out(out, force)
    if batch < 1 or resamples < 0:
        raise UsageError(f"--batch is {batch} and --bootstrap {resamples}: expected 1 or more, and 0 or more")
    if minimum_score is not None and not 0 <= minimum_score <= 1:
        raise UsageError(f"--minimum-score is {minimum_score:g}: expected 0 to 1")
    target = open_target(target_path)
    manifest = read_manifest(data)
    if isinstance(target, Bundle):
        if fold is not None:
            raise UsageError("--fold is for a run: a bundle holds one model")
        judged = judge_bundle(target, manifest, device, batch, progress)
        chosen_map = map_name or str(target.localization["map"])
        fixed = float(target.localization["threshold"]) if chosen_map == target.localization["map"] else None
    else:
        judged = judge_run(target, manifest, fold, device, batch, progress)
        chosen_map, fixed = map_name or "attention", None
    own_minimum = target.minimum_score if isinstance(target, Bundle) else 0.0
    minimum = own_minimum if minimum_score is None else minimum_score
    if chosen_map.endswith(IN_LUNGS) and target.preprocessing.crop != "lungs":
        raise UsageError(f"--map {chosen_map}: the model's preprocessing does not look for lung fields")
    scores = evaluate_predictions(judged.predictions, resamples=resamples, seed=seed)
    localization, found = None, None
    if judged.cases:
        found = evaluate_localization(
            judged.cases, judged.tuning, target.preprocessing, map_name=chosen_map, fixed_threshold=fixed,
            minimum_score=minimum, resamples=resamples, seed=seed, progress=progress("localization"),
        )  # fmt: skip
        localization = found.summary
        localization["tuning_part"] = judged.tuning_part
        if fixed is not None and isinstance(target, Bundle):
            localization["chosen_on"] += f" ({target.localization.get('chosen_on', 'its origin is not recorded')})"
            if minimum != own_minimum:
                localization["chosen_on"] += f"; its own minimum score is {own_minimum:g}"
    facts = _data_facts(manifest, data, judged)
    metrics = {
        "schema": SCHEMA,
        "magsd_version": __version__,
        "created": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "research_use_only": True,
        "target": {**_target_facts(target, target_path), "device": judged.device},
        "data": facts,
        **scores,
        "localization": localization,
        "notes": [*judged.notes, *_data_notes(facts, judged.predictions), *_model_notes(target, scores)],
        "versions": _versions(target),
    }
    logs = target.logs() if isinstance(target, Run) else {}
    write_evaluation(out, metrics, judged.predictions, found, logs, target.preprocessing)
    return metrics


def _confusion(predictions: Predictions) -> NDArray[np.int64]:
    return confusion_matrix(
        labels=predictions.labels, predicted=predictions.predicted, num_classes=len(predictions.classes)
    )


def _by_source(predictions: Predictions) -> dict[str, Any]:
    """Scores of each source's images by themselves, all folds together; empty with a single source."""
    sources = np.array([record.source for record in predictions.records], dtype=object)
    names = sorted(set(sources.tolist()))
    if len(names) < 2:
        return {}
    result = {}
    for name in names[:50]:
        part = predictions.select(sources == name)
        result[name] = {
            "images": len(part.records),
            "images_per_class": dict(sorted(Counter(record.label for record in part.records).items())),
            **classification_scores(labels=part.labels, predicted=part.predicted, probabilities=part.probabilities),
        }
    return result


def _worst(predictions: Predictions) -> list[dict[str, Any]]:
    wrong = np.flatnonzero(predictions.predicted != predictions.labels)
    confidence = predictions.probabilities.max(axis=1)
    rows = sorted(wrong.tolist(), key=lambda row: (-confidence[row], str(predictions.records[row].path)))
    return [
        {
            "path": str(predictions.records[row].path),
            "patient": predictions.records[row].patient,
            "fold": None if predictions.folds[row] == BUNDLE_FOLD else int(predictions.folds[row]),
            "label": predictions.records[row].label,
            "predicted": predictions.classes[int(predictions.predicted[row])],
            "probability": float(confidence[row]),
            "probability_of_label": float(predictions.probabilities[row, predictions.labels[row]]),
        }
        for row in rows[:WORST_SHOWN]
    ]


def _target_facts(target: Run | Bundle, path: Path) -> dict[str, Any]:
    facts: dict[str, Any] = {
        "path": str(path),
        "classes": list(target.classes),
        "preprocessing_sha256": target.preprocessing.sha256(),
        "size": target.preprocessing.size,
    }
    if isinstance(target, Bundle):
        return {
            "kind": "bundle", "name": target.name, "version": target.version,
            "model_sha256": target.model_sha256, "temperature": target.temperature, **facts,
        }  # fmt: skip
    config = target.config
    return {
        "kind": "run", "name": path.resolve().name, "model": config.model, "backbone": config.backbone,
        "pooling": config.pooling, "loss": config.loss,
        "attention_augmentation": list(config.attention_augmentation), "epochs": config.epochs,
        "folds": config.folds, "trained_folds": list(target.trained), **facts,
    }  # fmt: skip


def _data_facts(manifest: Manifest, path: Path, judged: Judged) -> dict[str, Any]:
    records, predictions = manifest.records, judged.predictions
    evaluated = {record.path: record for record in predictions.records if record.label in predictions.classes}
    return {
        "manifest": str(path),
        "digest": manifest.digest(),
        "images": len(records),
        "patients": len({record.patient for record in records}),
        "images_per_class": dict(sorted(Counter(record.label for record in records).items())),
        "images_per_source": dict(Counter(record.source for record in records).most_common(20)),
        "evaluated_images": len(evaluated),
        "evaluated_patients": len({record.patient for record in evaluated.values()}),
        "predictions": len(predictions.records),
        "unknown_label_images": sum(record.label not in predictions.classes for record in records),
        "source_confound": source_confound(list(evaluated.values())),
    }


def _data_notes(facts: dict[str, Any], predictions: Predictions) -> list[dict[str, str]]:
    """What limits the meaning of the numbers, as far as the data show it."""
    notes = []
    confound = facts["source_confound"]
    if confound is not None and confound["suspicious"]:
        told = ", ".join(f"{label} {accuracy:.3f}" for label, accuracy in confound["told"].items())
        notes.append(
            note(
                "warning",
                f"The source alone predicts the class with accuracy {confound['accuracy']:.3f} and mean sensitivity "
                f"{confound['sensitivity']:.3f} (chance {confound['chance']:.3f}), and tells each class from the "
                f"others with a balanced accuracy of {told} (chance 0.500), without any look at the film. A "
                "network can reach as much by recognising the source; these scores do not show how it does on "
                "other sources.",
            )
        )
    unknown = sorted(set(facts["images_per_class"]) - set(predictions.classes))
    if unknown:
        notes.append(
            note(
                "warning",
                f"{facts['unknown_label_images']} images are of classes that the model does not know "
                f"({', '.join(unknown)}): they are in predictions.csv and in no score.",
            )
        )
    missing = [name for name in predictions.classes if name not in facts["images_per_class"]]
    if missing:
        notes.append(
            note(
                "warning",
                f"The manifest has no image of {', '.join(missing)}: sensitivity, F1 and AUC of such a "
                "class have no value, "
                "and the macro means run over the other classes.",
            )
        )
    if facts["evaluated_patients"] < 100:
        notes.append(
            note("note", f"Only {facts['evaluated_patients']} patients: read the intervals before the values.")
        )
    return notes


def _model_notes(target: Run | Bundle, scores: dict[str, Any]) -> list[dict[str, str]]:
    notes = []
    undefined = [str(fold["fold"]) for fold in scores["folds"] if fold["fold"] is not None and fold["auc"] is None]
    if undefined:
        notes.append(note("note", f"No ROC AUC for fold {', '.join(undefined)}: images of one class only."))
    if isinstance(target, Run) and target.config.pooling != "attention":
        notes.append(
            note(
                "warning",
                f"The run pools by {target.config.pooling}, which trains no attention: its maps are "
                "random, and its "
                "evidence map is their mean."
                if target.config.model in MA_NETS
                else f"{target.config.model} has no attention: its map is the mean of its last features, the same "
                "for every class.",
            )
        )
    return notes


def _versions(target: Run | Bundle) -> dict[str, str]:
    import cv2
    import sklearn

    versions = {
        "magsd": __version__, "python": platform.python_version(), "numpy": np.__version__,
        "opencv": cv2.__version__, "scikit-learn": sklearn.__version__, "platform": platform.platform(),
    }  # fmt: skip
    if isinstance(target, Run):
        import torch

        return {**versions, "torch": str(torch.__version__)}
    import onnxruntime

    return {**versions, "onnxruntime": onnxruntime.__version__}

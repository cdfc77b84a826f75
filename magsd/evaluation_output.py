"""The folder that an evaluation leaves: complete and consistent, or not there at all.

metrics.json  predictions.csv  localization.csv  report.html
figures/      confusion.png  roc.png  reliability.png  localization.png  localization_curves.png  training.png
"""

from __future__ import annotations

import csv
import io
import os
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import cv2
import numpy as np

from magsd_runtime.errors import UsageError
from magsd_runtime.files import replacing_directory, write_json, write_text
from magsd_runtime.images import read_radiograph
from magsd_runtime.localization import IN_LUNGS, enclosing_box, heat_mask
from magsd_runtime.prediction import Box
from magsd_runtime.preprocessing import PreprocessingSpec

from .figures import (
    PanelItem,
    confusion_figure,
    localization_curves_figure,
    localization_figure,
    reliability_figure,
    roc_figure,
    training_figure,
)
from .localization_evaluation import Localization
from .localization_metrics import Case, unit_heat
from .metrics import SCORES, roc_curves
from .predictors import BUNDLE_FOLD, Predictions
from .report import render_report

FILES = {"metrics.json", "predictions.csv", "localization.csv", "report.html", "figures"}
FIGURES = {
    "confusion.png", "roc.png", "reliability.png", "localization.png", "localization_curves.png", "training.png"
}  # fmt: skip
COLUMNS = {
    "iou": "iou_mean", "mask_iou": "mask_iou_mean", "box_iou": "box_iou_mean", "regions_iou": "regions_iou_mean",
    "peak_inside": "pointing", "energy_inside": "energy_inside",
}  # fmt: skip
"""Columns of localization.csv: the scores of one film, whose means are in metrics.json."""
PANEL_IMAGES = 8
PANEL_SIDE = 480
"""Longest side in pixels of an image in the localization panel."""


def check_out(out: Path, force: bool) -> None:
    """Refuse an output folder that must not be written to, before any work is done.

    Raises
    ------
    UsageError
        If ``out`` is a file, holds anything that is not an evaluation, or holds one and ``force`` is False.
    """
    if not out.exists():
        return
    if not out.is_dir():
        raise UsageError(f"--out {out} is a file: name a folder")
    names = {path.name for path in out.iterdir()}
    if not names:
        return
    figures = out / "figures"
    foreign = sorted(names - FILES) + sorted(
        f"figures/{path.name}" for path in (figures.iterdir() if figures.is_dir() else ()) if path.name not in FIGURES
    )
    if foreign or "metrics.json" not in names:
        what = f"holds {', '.join(foreign[:3])}" if foreign else "holds no metrics.json"
        raise UsageError(f"--out {out} {what}, so it is no earlier evaluation: choose another --out")
    if not force:
        raise UsageError(f"--out {out} holds an earlier evaluation: add --force to replace it, or choose another --out")


def write_evaluation(
    out: Path,
    metrics: Mapping[str, Any],
    predictions: Predictions,
    localization: Localization | None,
    logs: Mapping[int, Sequence[Mapping[str, float | None]]],
    spec: PreprocessingSpec,
) -> None:
    """Write everything beside ``out`` and put it in its place in the last step."""
    out.parent.mkdir(parents=True, exist_ok=True)
    staging = Path(tempfile.mkdtemp(prefix=f".{out.name}.", dir=out.parent))
    try:
        with replacing_directory(staging / "new") as folder:
            panel = [] if localization is None else localization.panel()
            figures = _write_figures(folder / "figures", metrics, predictions, panel, logs, spec)
            write_text(folder / "predictions.csv", predictions_csv(predictions))
            if localization is not None:
                write_text(folder / "localization.csv", localization_csv(localization))
            write_text(folder / "report.html", render_report(metrics, figures))
            write_json(folder / "metrics.json", metrics)
        if out.exists():
            os.rename(out, staging / "old")
        os.rename(staging / "new", out)
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def predictions_csv(predictions: Predictions) -> str:
    """One line a prediction; the fold is empty for a bundle. Logits, where there are any, are exact (float32)."""
    text = io.StringIO()
    table = csv.writer(text, lineterminator="\n")
    logits = predictions.logits
    if logits is None:
        logits = np.empty((len(predictions.records), 0))
    table.writerow(
        ["path", "patient", "source", "fold", "label", "predicted"]
        + [f"probability_{name}" for name in predictions.classes]
        + [f"logit_{name}" for name in predictions.classes if logits.shape[1]]
    )
    for record, fold, guess, row, exact in zip(
        predictions.records, predictions.folds, predictions.predicted, predictions.probabilities, logits
    ):
        number = "" if fold == BUNDLE_FOLD else fold
        shown = [f"{value:.6g}" for value in row] + [f"{value:.9g}" for value in exact]
        table.writerow(
            [
                record.path,
                record.patient,
                record.source,
                number,
                record.label,
                predictions.classes[guess],
                *shown,
            ]
        )
    return text.getvalue()


def localization_csv(localization: Localization) -> str:
    """One line a film, model and method (map or baseline), at the threshold chosen for it on other patients."""
    text = io.StringIO()
    table = csv.writer(text, lineterminator="\n")
    table.writerow(["path", "patient", "fold", "label", "ground_truth", "drawn_share", "method", "threshold", *COLUMNS])
    for film in localization.films:
        case, threshold = film.case, film.threshold
        table.writerow(
            [
                case.record.path,
                case.record.patient,
                "" if case.fold == BUNDLE_FOLD else case.fold,
                case.record.label,
                case.truth.kind,
                f"{case.truth.mask.mean():.6g}",
                film.method,
                "" if threshold is None else f"{threshold:.6g}",
                *(f"{film.scores[name]:.6g}" for name in COLUMNS.values()),
            ]
        )
    return text.getvalue()


def summary(metrics: dict[str, Any], out: Path) -> dict[str, Any]:
    """The main numbers of ``metrics``, for one JSON line."""
    names = (
        "map", "images", "iou_mean", "iou_mean_ci95", "iou_at_25", "pointing", "threshold", "minimum_score",
        "chosen_on",
    )  # fmt: skip
    localization = metrics["localization"]
    return {
        "out": str(out),
        "target": metrics["target"]["name"],
        "evaluated_images": metrics["data"]["evaluated_images"],
        "classification": metrics["classification"],
        "ece": metrics["calibration"]["ece"],
        "localization": localization and {name: localization[name] for name in names},
        "warnings": [entry["text"] for entry in metrics["notes"] if entry["level"] == "warning"],
        "research_use_only": True,
    }


def summary_table(metrics: dict[str, Any]) -> str:
    """The main numbers of ``metrics`` as lines for a terminal."""
    facts, folds = metrics["data"], [fold for fold in metrics["folds"] if fold["fold"] is not None]
    over = f", {len(folds)} fold{'s' if len(folds) > 1 else ''}" if folds else ""
    lines = [
        f"{metrics['target']['name']}: {facts['evaluated_images']} images, "
        f"{facts['evaluated_patients']} patients{over}",
        f"{'':<14}{'value':>7}{'std':>8}   95 % interval",
    ]
    for name in SCORES:
        score = metrics["classification"][name]
        low_high = " to ".join(map(_shown, score["ci95"])) if score["ci95"] else "-"
        lines.append(f"{name:<14}{_shown(score['value']):>7}{_shown(score['std']):>8}   {low_high}")
    lines.append(f"{'ece':<14}{_shown(metrics['calibration']['ece']):>7}")
    localization = metrics["localization"]
    if localization is not None:
        least = f", regions that reach {localization['minimum_score']:g}" if localization["minimum_score"] else ""
        lines.append(f"localization ({localization['map']} map, {localization['images']} images{least})")
        rows = {"network": localization, **localization["baselines"]}
        for name, row in rows.items():
            lines.append(
                f"  {name.replace('_', ' '):<20} mean IoU {row['iou_mean']:.3f}   "
                f"IoU >= 0.25 {row['iou_at_25']:.3f}   peak inside {row['pointing']:.3f}"
            )
    return "\n".join(lines)


def _shown(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"


def _write_figures(
    folder: Path,
    metrics: Mapping[str, Any],
    predictions: Predictions,
    panel: Sequence[tuple[Case, float, float]],
    logs: Mapping[int, Sequence[Mapping[str, float | None]]],
    spec: PreprocessingSpec,
) -> dict[str, Path]:
    """The figures that the data allow: name -> file."""
    figures = {"confusion": folder / "confusion.png"}
    confusion = metrics["confusion"]
    confusion_figure(figures["confusion"], confusion=np.array(confusion["counts"]), classes=confusion["classes"])
    known = predictions.select(predictions.labels >= 0)
    curves = roc_curves(labels=known.labels, probabilities=known.probabilities, classes=known.classes)
    if curves:
        figures["roc"] = folder / "roc.png"
        roc_figure(figures["roc"], curves)
    figures["reliability"] = folder / "reliability.png"
    reliability_figure(figures["reliability"], bins=metrics["calibration"]["bins"], ece=metrics["calibration"]["ece"])
    if panel:
        figures["localization"] = folder / "localization.png"
        localization_figure(figures["localization"], [_panel_item(*entry, spec, metrics) for entry in _spread(panel)])
        found = metrics["localization"]
        figures["localization_curves"] = folder / "localization_curves.png"
        localization_curves_figure(figures["localization_curves"], found["maps"], found["baselines"])
    if any(logs.values()):
        figures["training"] = folder / "training.png"
        training_figure(figures["training"], logs)
    return figures


def _spread(panel: Sequence[tuple[Case, float, float]]) -> list[tuple[Case, float, float]]:
    """Up to ``PANEL_IMAGES`` images, evenly from the best to the worst IoU: nothing is picked by eye."""
    first: dict[Path, tuple[Case, float, float]] = {}
    for entry in panel:
        first.setdefault(entry[0].record.path, entry)
    ordered = sorted(first.values(), key=lambda entry: (-entry[1], str(entry[0].record.path)))
    if len(ordered) <= PANEL_IMAGES:
        return ordered
    return [ordered[round(at)] for at in np.linspace(0, len(ordered) - 1, PANEL_IMAGES)]


def _panel_item(
    case: Case, iou: float, threshold: float, spec: PreprocessingSpec, metrics: Mapping[str, Any]
) -> PanelItem:
    truth, record = case.truth, case.record
    shown, minimum = metrics["localization"]["map"], metrics["localization"]["minimum_score"]
    heat = unit_heat(case.heats[shown.removesuffix(IN_LUNGS)], truth, spec, shown)
    counted = heat_mask(heat, threshold, minimum)
    predicted = enclosing_box(counted)
    factor = min(1.0, PANEL_SIDE / max(truth.width, truth.height))
    size = (max(1, round(truth.width * factor)), max(1, round(truth.height * factor)))
    pixels = cv2.resize(read_radiograph(record.path).pixels, size, interpolation=cv2.INTER_AREA)
    mask = cv2.resize(truth.mask.astype(np.uint8), size, interpolation=cv2.INTER_NEAREST) > 0
    fold = "" if case.fold == BUNDLE_FOLD else f", fold {case.fold}"
    return PanelItem(
        title=f"{_tail(record.path.name)}\n{_tail(record.label)}{fold}",
        pixels=np.asarray(pixels, np.uint8),
        heat=np.asarray(cv2.resize(heat, size, interpolation=cv2.INTER_AREA), np.float32),
        threshold=threshold,
        predicted=None if predicted is None else _scaled(predicted, factor),
        boxes=[_scaled(Box(x, y, x + w, y + h), factor) for x, y, w, h in record.boxes],
        mask=mask if truth.kind == "mask" else None,
        iou=iou,
        minimum_score=minimum,
        region=np.asarray(cv2.resize(counted.astype(np.uint8), size, interpolation=cv2.INTER_NEAREST)) > 0,
    )


def _scaled(box: Box, factor: float) -> Box:
    return Box(box.x0 * factor, box.y0 * factor, box.x1 * factor, box.y1 * factor)


def _tail(text: str, limit: int = 30) -> str:
    # matplotlib would read $...$ as mathematics
    return (text if len(text) <= limit else "…" + text[1 - limit :]).replace("$", r"\$")

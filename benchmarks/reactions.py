"""What a trained network does when films change, and how much of its attention lies in the lungs.

Changed films are written as PNG into a temporary folder and judged from there, by the way of `magsd evaluate`: who
may predict whom is decided there. Nothing is kept of them.
"""

from __future__ import annotations

import csv
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from controls import write_film
from magsd.data import Manifest, Record
from magsd.judging import Judged, judge_bundle, judge_run
from magsd.localization_metrics import Case, mean_interval, score_heat, unit_heat
from magsd.predictors import Predictions, Run
from magsd.progress import bar, no_bar
from magsd_runtime.bundle import Bundle
from magsd_runtime.errors import DataError
from magsd_runtime.images import read_radiograph
from magsd_runtime.localization import to_original, upsample
from magsd_runtime.preprocessing import PreprocessingSpec
from perturbations import CHANGES, Change, Film, blank, enlarged
from scores import Task, auc, class_task

LUNGS_BLANKED = "lungs blanked"
LungFinder = Callable[[Film], NDArray[np.bool_] | None]
"""Film uint8 (H, W) -> its lung fields bool (H, W), or None where it finds none."""


def found_lungs(film: Film) -> NDArray[np.bool_] | None:
    """The lung fields that magsd's own network finds."""
    from magsd_runtime.lungs import find_lungs, packaged_sha256

    fields = find_lungs(film, packaged_sha256())
    return enlarged(fields, film.shape[1], film.shape[0]) if fields.any() else None


def reactions(
    target: Run | Bundle,
    manifest: Manifest,
    positive: str,
    *,
    fold: int | None = None,
    device: str = "auto",
    resamples: int = 1000,
    changes: Mapping[str, Change] = CHANGES,
    lungs: LungFinder = found_lungs,
) -> dict[str, Any]:
    """AUC of ``positive`` on the films as they are, and for each change against the same films unchanged:

    ``equal_labels`` (share), ``mean_change`` (mean absolute change of the probability of ``positive``), ``auc`` and
    ``auc_before``. Films in which ``lungs`` finds none are left out of "lungs blanked".
    """

    def without_lungs(film: Film) -> Film | None:
        mask = lungs(film)
        return None if mask is None else blank(film, mask)

    whole = judge(target, manifest, fold, device).predictions
    task = class_task(whole, positive)
    assert task is not None
    rows: dict[str, Any] = {}
    for name, change in {LUNGS_BLANKED: without_lungs, **changes}.items():
        with tempfile.TemporaryDirectory() as folder:
            copies, origin = _changed(manifest, change, Path(folder), name)
            if not copies.records:
                rows[name] = {"films": 0}
                continue
            changed = judge(target, copies, fold, device).predictions
        rows[name] = compare(whole, changed, origin, positive, resamples=resamples)
    return {"films": len({record.path for record in whole.records}), "auc": auc(task, resamples=resamples),
            "changes": rows}  # fmt: skip


def compare(
    whole: Predictions, changed: Predictions, origin: Mapping[Path, Path], positive: str, *, resamples: int = 1000
) -> dict[str, Any]:
    """One change's row; ``origin`` gives the film that each changed one was made of."""
    at = {(record.path, int(model)): row for row, (record, model) in enumerate(zip(whole.records, whole.folds))}
    rows = [at[origin[record.path], int(model)] for record, model in zip(changed.records, changed.folds)]
    before = whole.select(np.array(rows, np.int64))
    tasks: list[Task | None] = [class_task(predictions, positive) for predictions in (before, changed)]
    index = whole.classes.index(positive)
    change = np.abs(changed.probabilities[:, index] - before.probabilities[:, index])
    areas = [auc(task, resamples=resamples) for task in tasks if task is not None]
    return {
        "films": len({record.path for record in before.records}),
        "equal_labels": float((changed.predicted == before.predicted).mean()),
        "mean_change": float(change.mean()),
        "auc_before": areas[0],
        "auc": areas[1],
    }


def judge(target: Run | Bundle, manifest: Manifest, fold: int | None, device: str) -> Judged:
    """As `magsd evaluate` does."""
    if isinstance(target, Bundle):
        return judge_bundle(target, manifest, device, 32, no_bar)
    return judge_run(target, manifest, fold, device, 32, no_bar)


def attention_in_lungs(
    target: Run | Bundle,
    manifest: Manifest,
    masks: Mapping[Path, Path],
    *,
    fold: int | None = None,
    device: str = "auto",
    resamples: int = 1000,
    lungs: LungFinder = found_lungs,
) -> dict[str, dict[str, Any]]:
    """Means over films, for the films that have a mask file in ``masks``, and for those in which lungs are found.

    ``attention``: share of the mean attention map inside the lungs; ``heat``: the same of the map scaled from its
    minimum, 0, to its maximum, 1, as it is shown; both with ``value`` and ``ci95``. ``chance``: the lungs' share of
    what the network sees, which even attention would have. ``area``: the lungs' share of the film.
    """
    drawn = [replace(r, mask=masks[key]) for r in manifest.records if (key := r.path.resolve()) in masks]
    result = {"lungs of the mask files": _lung_shares(target, drawn, manifest, fold, device, resamples)}
    with tempfile.TemporaryDirectory() as folder:
        records = []
        for number, record in enumerate(manifest.records):
            mask = lungs(read_radiograph(record.path).pixels)
            if mask is not None:
                file = Path(folder) / f"{number:05d}.png"
                write_film(file, mask.astype(np.uint8) * 255)
                records.append(replace(record, mask=file))
        result["lungs found by the lung network"] = _lung_shares(target, records, manifest, fold, device, resamples)
    return result


def lung_shares(case: Case, spec: PreprocessingSpec) -> tuple[float, float, float, float]:
    """Of one film whose truth is its lungs: ``attention``, ``heat``, ``chance`` and ``area``, 0 to 1."""
    truth, coarse = case.truth, case.heats["attention"]
    size, region = (truth.width, truth.height), truth.framing.region
    attention = to_original(upsample(coarse, spec.size), *size, spec, region)
    seen = to_original(np.ones((spec.size, spec.size), np.float32), *size, spec, region) > 0
    total = float(attention.sum(dtype=np.float64))
    return (
        float(attention[truth.mask].sum(dtype=np.float64)) / total if total > 0 else 0.0,
        score_heat(unit_heat(coarse, truth, spec), truth).energy,
        float((truth.mask & seen).sum() / seen.sum()),
        float(truth.mask.mean()),
    )


def read_lung_masks(path: Path) -> dict[Path, Path]:
    """Film to mask, from a CSV with the columns path and mask, both relative to it.

    Raises
    ------
    DataError
        If the table cannot be read, or lacks a column.
    """
    try:
        with open(path, newline="", encoding="utf-8-sig") as text:
            rows = [(row["path"], row["mask"]) for row in csv.DictReader(text)]
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror}), expected a table with path,mask") from error
    except KeyError as error:
        raise DataError(f"{path}: lacks the column {error}: expected path,mask") from error
    return {(path.parent / film).resolve(): path.parent / mask for film, mask in rows}


def _lung_shares(
    target: Run | Bundle, records: list[Record], manifest: Manifest, fold: int | None, device: str, resamples: int
) -> dict[str, Any]:
    if not records:
        return {"films": 0}
    judged = judge(target, Manifest(manifest.root, tuple(records), manifest.path), fold, device)
    shares = np.array([lung_shares(case, target.preprocessing) for case in judged.cases])
    patients = [case.record.patient for case in judged.cases]
    attention, heat = (_mean(shares[:, column], patients, resamples) for column in (0, 1))
    return {
        "films": len({case.record.path for case in judged.cases}),
        "attention": attention,
        "heat": heat,
        "chance": float(shares[:, 2].mean()),
        "area": float(shares[:, 3].mean()),
    }


def _mean(values: NDArray[np.float64], patients: list[str], resamples: int) -> dict[str, Any]:
    return {"value": float(values.mean()), "ci95": mean_interval(values, patients, resamples, 0)}


def _changed(
    manifest: Manifest, change: Callable[[Film], Film | None], folder: Path, name: str
) -> tuple[Manifest, dict[Path, Path]]:
    """The changed films in ``folder`` as a manifest, and the film of each; those that give None are left out."""
    update = bar(name)
    records, origin = [], {}
    for number, record in enumerate(manifest.records):
        film = change(read_radiograph(record.path).pixels)
        if film is not None:
            path = folder / f"{number:05d}.png"
            write_film(path, film)
            records.append(replace(record, path=path, boxes=(), mask=None))
            origin[path] = record.path
        update(number + 1, len(manifest.records))
    return Manifest(folder, tuple(records)), origin

"""What a class can be told from without the lungs: networks on the border or on a thumbnail, and a table of facts.

Each gives the COVID-19 AUC and the macro AUC on patients that were not trained on.
"""

from __future__ import annotations

import csv
import hashlib
import io
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

from magsd.config import overridden, read_config, resolve, unfinished
from magsd.data import Manifest, Record, read_manifest
from magsd.evaluation import evaluate, evaluate_predictions
from magsd.folds import Folds, fold_name
from magsd.predictors import Predictions
from magsd.progress import Progress, bar, say, terminal_bar
from magsd_runtime.errors import UsageError
from magsd_runtime.files import replacing, write_text
from magsd_runtime.images import read_radiograph
from perturbations import Change, Film
from scores import auc, class_task, read_predictions

HISTOGRAM_BINS = 16
FACTS = ("aspect ratio", "width", "height", *(f"grey {number}" for number in range(HISTOGRAM_BINS)))


def film_facts(film: Film) -> NDArray[np.float64]:
    """What is no picture: width / height, width, height, share of pixels in each of 16 equal ranges of grey, (19,)."""
    height, width = film.shape
    shares = np.bincount(film.ravel() // (256 // HISTOGRAM_BINS), minlength=HISTOGRAM_BINS) / film.size
    return np.array([width / height, width, height, *shares])


def facts_of(manifest: Manifest, progress: Progress = bar) -> NDArray[np.float64]:
    """:func:`film_facts` of each film, (N, 19)."""
    update = progress("reading")
    facts = np.empty((len(manifest.records), len(FACTS)))
    for row, record in enumerate(manifest.records):
        facts[row] = film_facts(read_radiograph(record.path).pixels)
        if update is not None:
            update(row + 1, len(facts))
    return facts


def classifiers() -> dict[str, Callable[[], Any]]:
    """What makes an unfitted classifier of scikit-learn for such facts, by name."""
    from sklearn.ensemble import HistGradientBoostingClassifier
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    return {
        "logistic regression": lambda: make_pipeline(StandardScaler(), LogisticRegression(max_iter=5000)),
        "gradient boosting": lambda: HistGradientBoostingClassifier(random_state=0),
    }


def tabular_control(
    manifest: Manifest, folds: Folds, positive: str, *, resamples: int = 1000, progress: Progress = bar
) -> dict[str, Any]:
    """Cross-validated scores of the classifiers that see only :func:`film_facts`, by name."""
    facts = facts_of(manifest, progress)
    return {
        name: prediction_scores(cross_validated(manifest, facts, folds, make), positive, resamples=resamples)
        for name, make in classifiers().items()
    }


def cross_validated(
    manifest: Manifest, facts: NDArray[np.float64], folds: Folds, make: Callable[[], Any]
) -> Predictions:
    """Every film predicted by the classifier that was fitted on the patients of the other folds.

    ``facts`` (N, F) in the order of the records; ``make`` gives an unfitted classifier of scikit-learn.
    """
    folds.require_patients(manifest)
    fold = np.array([folds.assignment[record.patient] for record in manifest.records], np.int64)
    labels = manifest.label_indices()
    probabilities = np.zeros((len(labels), len(manifest.classes)))
    for number in np.unique(fold):
        inside = fold == number
        model = make().fit(facts[~inside], labels[~inside])
        probabilities[np.ix_(inside, model.classes_)] = model.predict_proba(facts[inside])
    return Predictions(manifest.classes, manifest.records, fold, probabilities)


def prediction_scores(predictions: Predictions, positive: str, *, resamples: int = 1000) -> dict[str, Any]:
    """``auc`` (macro) and ``positive_auc``, each with ``value`` and ``ci95``; images and patients."""
    task = class_task(predictions, positive)
    assert task is not None
    return {
        "auc": evaluate_predictions(predictions, resamples=resamples)["classification"]["auc"],
        "positive_auc": auc(task, resamples=resamples),
        "images": len(predictions.records),
        "patients": len({record.patient for record in predictions.records}),
    }


def changed_copies(manifest: Manifest, change: Change | None, folder: Path, progress: Progress = bar) -> Path:
    """Write the changed films as PNG and their manifest.csv, last, into ``folder``; kept if it is there.

    The manifest holds path, label, patient and source. ``change`` None leaves the films as they are.
    """
    done = folder / "manifest.csv"
    if done.is_file():
        return done
    update = progress(f"writing {folder.name}")
    lines = []
    for number, record in enumerate(manifest.records):
        film = read_radiograph(record.path).pixels
        name = f"{number:05d}.png"
        write_film(folder / name, film if change is None else change(film))
        lines.append([name, record.label, record.patient, record.source])
        if update is not None:
            update(number + 1, len(manifest.records))
    text = io.StringIO()
    table = csv.writer(text, lineterminator="\n")
    table.writerows([["path", "label", "patient", "source"], *lines])
    write_text(done, text.getvalue())
    return done


def write_film(path: Path, film: Film) -> None:
    with replacing(path) as temporary:
        done, encoded = cv2.imencode(".png", film, [cv2.IMWRITE_PNG_COMPRESSION, 1])
        assert done
        temporary.write_bytes(encoded.tobytes())


def recipe(config: Path | None, typed: Mapping[str, Any]) -> dict[str, Any]:
    """Settings of `magsd train`: those of a file, and those typed beside it, which win; unchecked."""
    return overridden(read_config(config), typed) if config else dict(typed)


def trained_control(
    manifest: Manifest, change: Change | None, name: str, work: Path, settings: Mapping[str, Any], folds: Folds,
    positive: str, *, fold: int = 0, device: str = "auto", resamples: int = 1000,
) -> dict[str, Any]:  # fmt: skip
    """Scores on the test patients of ``fold`` of a network that is trained on changed films alone.

    Films go into ``work/films``, the training into a folder of ``work/runs`` that is named by a hash of films, folds
    and settings. What is finished there is not done again; a training that was stopped goes on.

    Raises
    ------
    UsageError
        If ``work`` lies in the project, or a setting is impossible.
    """
    forbid_project(work)
    films = hashlib.sha256(f"{manifest.digest()} {manifest.root.absolute()}".encode()).hexdigest()[:12]
    copies = changed_copies(manifest, change, work / "films" / f"{name}-{films}")
    wanted = {**settings, "data": str(copies.absolute()), "folds": folds.n_folds}
    kind = hashlib.sha256(json.dumps([wanted, folds.assignment], sort_keys=True).encode()).hexdigest()[:12]
    place = work / "runs" / f"{name}-{kind}"
    folds.save(place / "folds.json")
    wanted["folds_file"] = str((place / "folds.json").absolute())
    run, out = place / "run", place / f"evaluation-{fold}"
    if not is_finished(run, out, fold, wanted):
        _train(run, fold, wanted, device)
        evaluate(run, copies, out, device=device, fold=fold, resamples=resamples, force=out.exists(), progress=bar)
    metrics = json.loads((out / "metrics.json").read_text(encoding="utf-8"))
    task = class_task(read_predictions(out), positive)
    assert task is not None
    return {
        "auc": metrics["classification"]["auc"],
        "positive_auc": auc(task, resamples=resamples),
        "images": metrics["data"]["evaluated_images"],
        "patients": metrics["data"]["evaluated_patients"],
        "run": str(run),
    }


def is_finished(run: Path, out: Path, fold: int, wanted: Mapping[str, Any]) -> bool:
    """Whether ``fold`` of the run was trained with these settings to its end and evaluated.

    Raises
    ------
    UsageError
        If the run has other settings.
    """
    from magsd.run_folder import is_set_up, resumed_config

    if not is_set_up(run):
        return False
    config = resumed_config(run, dict(wanted))
    trained = (run / fold_name(fold) / "best.pt").is_file() and not unfinished(run / fold_name(fold), config.epochs)
    return trained and (out / "metrics.json").is_file()


def forbid_project(work: Path) -> None:
    """Copies of films never get into the project.

    Raises
    ------
    UsageError
        If ``work`` lies in the checkout.
    """
    project = Path(__file__).resolve().parents[1]
    if work.resolve().is_relative_to(project):
        raise UsageError(f"--work {work} lies in the project, where no film belongs: name a folder elsewhere")


def spread(manifest: Manifest, limit: int | None) -> Manifest:
    """At most ``limit`` records, spread evenly over the manifest."""
    count = len(manifest.records)
    if limit is None or limit >= count:
        return manifest
    chosen = sorted({int(index) for index in np.linspace(0, count - 1, limit)})
    return Manifest(manifest.root, tuple(manifest.records[index] for index in chosen), manifest.path)


def plain_manifest(path: Path, limit: int | None) -> Manifest:
    """The manifest without boxes and masks, which none of the controls needs."""
    manifest = read_manifest(path)
    records = tuple(Record(r.path, r.label, r.patient, r.source) for r in manifest.records)
    return spread(Manifest(manifest.root, records, manifest.path), limit)


def _train(run: Path, fold: int, wanted: Mapping[str, Any], device: str) -> None:
    from magsd.allocator import keep_freed_memory
    from magsd.distributed import processes
    from magsd.run_folder import is_set_up, resumed_config
    from magsd.training import train

    config = resumed_config(run, dict(wanted)) if is_set_up(run) else resolve(wanted)
    with processes(device) as group:
        if group.device.type == "cpu":
            keep_freed_memory()
        train(config, run, group, fold=fold, resume=True, report=say, progress=terminal_bar)

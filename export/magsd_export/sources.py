"""What goes into a bundle beside the network: which fold, which images to compare on, what is known of the run."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from magsd.folds import FINAL, fold_name
from magsd_runtime.bundle import LOCALIZATION_MAPS
from magsd_runtime.errors import DataError, ImageError, UsageError
from magsd_runtime.images import has_contrast, read_radiograph
from magsd_runtime.preprocessing import PreprocessingSpec, preprocess

if TYPE_CHECKING:
    from magsd.checkpoint import CheckpointInfo
    from magsd.data import Record

BEST = "best.pt"
DEFAULT_LOCALIZATION: dict[str, Any] = {
    "map": "attention",
    "threshold": 0.5,
    "chosen_on": "default, not chosen on data",
}


@dataclass(frozen=True)
class Source:
    """The checkpoint to export; ``run`` is its run folder if it lies in one; ``reason``: why this one."""

    checkpoint: Path
    run: Path | None
    reason: str


def find_checkpoint(path: Path, fold: int | None = None) -> Source:
    """The checkpoint that ``path`` (a run folder, a fold's folder or a file) and ``fold`` name.

    Without ``fold``, of a run's folds the one with the best validation score: test images choose nothing.
    ``FINAL`` is the model of all folds, also taken where a run has no other.

    Raises
    ------
    UsageError
        If there is none, or ``fold`` does not fit; the message says what is there.
    CheckpointError
        If a checkpoint is damaged.
    """
    if path.is_file():
        if path.suffix == ".safetensors":
            raise UsageError(f"{path} holds weights only: export the {BEST} beside it")
        if fold is not None:
            raise UsageError(f"{_typed(fold)} goes with a run folder, and {path} is one checkpoint")
        return Source(path, _run_of(path), "the checkpoint given")
    if not path.is_dir():
        raise UsageError(f"{path}: no such run or checkpoint (magsd train makes one)")
    if (path / BEST).is_file():
        if fold is not None and path.name != fold_name(fold):
            raise UsageError(f"{_typed(fold)} goes with a run folder, and {path} is one fold")
        return Source(path / BEST, _run_of(path / BEST), "the fold given")
    found = {
        int(folder.name[4:]): folder / BEST
        for folder in sorted(path.glob("fold*"))
        if folder.name[4:].isdecimal() and (folder / BEST).is_file()
    }
    final = path / fold_name(FINAL) / BEST
    if final.is_file() and (fold == FINAL or (fold is None and not found)):
        return Source(final, path, "the model of all folds")
    if fold == FINAL:
        raise UsageError(f"{path} has no final model: magsd train --final makes one")
    if not found:
        what = (
            f"has no fold with a {BEST} yet: train it to the end of an epoch first"
            if (path / "config.yaml").is_file()
            else "is not a run of magsd train (no config.yaml, no fold0/best.pt)"
        )
        raise UsageError(f"{path} {what}")
    if fold is not None:
        if fold not in found:
            raise UsageError(f"--fold {fold}: {path} has {', '.join(f'fold {number}' for number in sorted(found))}")
        return Source(found[fold], path, f"fold {fold}, as asked for")
    if len(found) == 1:
        (number,) = found
        return Source(found[number], path, f"fold {number}, the only one trained")
    return _best_fold(found, path)


def _typed(fold: int) -> str:
    return "--final" if fold == FINAL else f"--fold {fold}"


def _best_fold(found: dict[int, Path], run: Path) -> Source:
    from magsd.checkpoint import load_checkpoint

    infos = {number: load_checkpoint(path)[1] for number, path in sorted(found.items())}
    select = next(iter(infos.values())).config.select
    # one score for all folds: without an AUC in one of them, accuracy stands in, as in training
    if select == "auc" and any(info.validation.get("auc") is None for info in infos.values()):
        select = "accuracy"

    def score(number: int) -> tuple[float, float]:
        validation = infos[number].validation
        loss = -_number(validation.get("loss"), math.inf)
        return (loss if select == "loss" else _number(validation.get(select), -math.inf), loss)

    best = max(infos, key=lambda number: (score(number), -number))
    shown = abs(score(best)[0])
    return Source(
        found[best],
        run,
        f"fold {best}, best validation {select} of {len(found)} folds ({shown:.4f}); no test score was looked at",
    )


def _run_of(checkpoint: Path) -> Path | None:
    run = checkpoint.absolute().parent.parent
    return run if (run / "config.yaml").is_file() and (run / "folds.json").is_file() else None


def _number(value: Any, default: float) -> float:
    return float(value) if isinstance(value, int | float) and math.isfinite(value) else default


@dataclass
class RealImages:
    """Radiographs for the parity check, read and preprocessed one after the other as the runtime does it.

    Named by their number: a file's name can be a patient's. ``skipped`` counts, once iterated, those
    that could not be read or hold one grey value only.
    """

    records: tuple[Record, ...]
    spec: PreprocessingSpec
    facts: dict[str, Any]
    skipped: int = field(default=0, init=False)

    def __iter__(self) -> Iterator[tuple[str, NDArray[np.float32]]]:
        self.skipped = 0
        for number, record in enumerate(self.records, start=1):
            try:
                radiograph = read_radiograph(record.path)
            except ImageError:
                self.skipped += 1
                continue
            if not has_contrast(radiograph):
                self.skipped += 1
                continue
            yield f"radiograph {number}", preprocess(radiograph.pixels, self.spec)


def real_images(source: Source, info: CheckpointInfo, data: Path | None, limit: int) -> RealImages:
    """At most ``limit`` images of ``data``, or else of the run's own test and validation parts, if still there.

    Raises
    ------
    DataError
        If ``data`` was given and cannot be used.
    """
    from magsd.data import read_manifest

    if data is not None:
        manifest = read_manifest(data, lenient=True)
        if not manifest.records:
            raise DataError(f"--data {data} names no images to compare on")
        facts = {"source": "the manifest given (--data)", "digest": manifest.digest()}
        return RealImages(spread(manifest.records, limit), info.preprocessing, facts)
    records, what = _own_records(source, info)
    return RealImages(spread(records, limit), info.preprocessing, {"source": what})


def _own_records(source: Source, info: CheckpointInfo) -> tuple[tuple[Record, ...], str]:
    from magsd.data import read_manifest
    from magsd.folds import load_folds

    if source.run is None or not info.config.data:
        return (), "none: the checkpoint lies in no run folder"
    try:
        manifest = read_manifest(Path(info.config.data), lenient=True)
        if manifest.digest() != info.data.get("digest"):
            return (), "none: the run's manifest has changed"
        split = load_folds(source.run / "folds.json").split(
            manifest, info.fold, validation_fraction=info.config.validation_fraction, seed=info.config.seed
        )
    except DataError:
        return (), "none: the run's manifest or folds are not there"
    if info.fold == FINAL:
        return manifest.records, "images of the run, which the model was trained on"
    chosen = sorted({*split.test.tolist(), *split.validation.tolist()})
    return tuple(manifest.records[index] for index in chosen), (
        f"test and validation images of the run, fold {info.fold}"
    )


def spread(records: tuple[Record, ...], limit: int) -> tuple[Record, ...]:
    """``limit`` records, classes in turn, in an order that depends on the file names alone."""

    def key(record: Record) -> bytes:
        return hashlib.sha256(record.path.name.encode("utf-8", "surrogateescape")).digest()

    by_label: dict[str, list[Record]] = {}
    for record in sorted(records, key=key):
        by_label.setdefault(record.label, []).append(record)
    queues = [by_label[label] for label in sorted(by_label)]
    longest = max(map(len, queues), default=0)
    in_turn = [queue[turn] for turn in range(longest) for queue in queues if turn < len(queue)]
    return tuple(in_turn[:limit])


def localization(source: Source, info: CheckpointInfo, metrics: dict[str, Any] | None) -> dict[str, Any]:
    """Which heat map and threshold the bundle uses, and what they were chosen on.

    From RUN/localization.json, else from the evaluation, else the default.

    Raises
    ------
    UsageError
        If localization.json is not as described in docs/bundle.md.
    """
    if info.config.pooling != "attention":
        why = f"not chosen: pooling {info.config.pooling} trains no attention, heat maps say nothing"
        return {**DEFAULT_LOCALIZATION, "chosen_on": why}
    if source.run is not None and (path := source.run / "localization.json").is_file():
        value = read_json(path)
        chosen = _usable(value, value.get("chosen_on"))
        if chosen is None:
            maps = ", ".join(LOCALIZATION_MAPS)
            raise UsageError(
                f"{path} is not usable: expected map ({maps}), threshold 0 to 1, chosen_on, "
                "and where faint regions are no findings minimum_score 0 to 1"
            )
        return chosen
    found = (metrics or {}).get("localization")
    if isinstance(found, dict):
        return _usable(found, f"{found.get('chosen_on')}, magsd evaluate") or dict(DEFAULT_LOCALIZATION)
    return dict(DEFAULT_LOCALIZATION)


def _usable(value: dict[str, Any], chosen_on: Any) -> dict[str, Any] | None:
    threshold = _number(value.get("threshold"), -1.0)
    minimum = _number(value.get("minimum_score", 0.0), -1.0)
    if value.get("map") not in LOCALIZATION_MAPS or not isinstance(chosen_on, str):
        return None
    if not 0 <= threshold <= 1 or not 0 <= minimum <= 1:
        return None
    # 0 is what a reader takes where the field is not there
    return {
        "map": value["map"], "threshold": threshold, **({"minimum_score": minimum} if minimum else {}),
        "chosen_on": chosen_on,
    }  # fmt: skip


def read_evaluation(folder: Path, info: CheckpointInfo, source: Source) -> dict[str, Any]:
    """The metrics.json that ``magsd evaluate`` wrote for this run.

    Raises
    ------
    UsageError
        If there is none, or it is of another model: numbers must not be printed on the wrong card.
    """
    path = folder / "metrics.json" if folder.is_dir() else folder
    if not path.is_file():
        raise UsageError(f"--evaluation {folder}: no metrics.json there (magsd evaluate RUN writes one)")
    metrics = read_json(path)
    target = metrics.get("target")
    if not str(metrics.get("schema")).startswith("magsd.metrics/") or not isinstance(target, dict):
        raise UsageError(f"--evaluation {path} is not the metrics.json of magsd evaluate")
    run = source.run.resolve().name if source.run is not None else None
    expected = {
        "kind": "run",
        "name": run,
        "classes": list(info.classes),
        "preprocessing_sha256": info.preprocessing.sha256(),
    }
    for key, wanted in expected.items():
        if target.get(key) != wanted:
            raise UsageError(
                f"--evaluation {path} is of another model: its {key} is {target.get(key)}, expected {wanted}"
            )
    return metrics


def evaluation_facts(metrics: dict[str, Any], info: CheckpointInfo) -> dict[str, Any]:
    """The part of metrics.json that a bundle carries: no file names, no patients."""
    rows = [row for row in metrics.get("folds") or [] if row.get("fold") == info.fold]
    where = metrics.get("localization")
    data = metrics.get("data") or {}
    return {
        "created": metrics.get("created"),
        "data_digest": data.get("digest"),
        "same_manifest_as_training": data.get("digest") == info.data.get("digest"),
        "images": data.get("evaluated_images"),
        "patients": data.get("evaluated_patients"),
        "folds": (metrics.get("target") or {}).get("trained_folds"),
        "classification": metrics.get("classification"),
        "this_fold": rows[0] if rows else None,
        "localization": None
        if not isinstance(where, dict)
        else {
            **{key: where.get(key) for key in ("map", "threshold")},
            "minimum_score": where.get("minimum_score", 0.0),
            **{key: where.get(key) for key in ("iou_mean", "iou_mean_ci95", "iou_at_25", "images")},
        },
    }


def read_json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise UsageError(f"{path} cannot be read as JSON: {error}") from error
    if not isinstance(value, dict):
        raise UsageError(f"{path} holds a {type(value).__name__}: expected an object")
    return value

"""What can be evaluated, a run or a bundle, as a set of models that predict standardized images.

A run has one model a fold, and knows which patients each of them has seen. A bundle has one model, runs
without torch, and knows only the digest of the manifest it was trained on.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from magsd_runtime.bundle import Bundle, load_bundle
from magsd_runtime.calibration import probabilities
from magsd_runtime.errors import CheckpointError, UsageError, require
from magsd_runtime.localization import class_evidence_map, mean_attention_map
from magsd_runtime.preprocessing import PreprocessingSpec, normalize

from .data import Record

if TYPE_CHECKING:
    from .config import TrainingConfig
    from .folds import Folds

BUNDLE_FOLD = -1
"""The fold number of a bundle's predictions."""

Network = Callable[[NDArray[np.float32]], dict[str, NDArray[np.float32]]]


@dataclass(frozen=True)
class Run:
    """A training run: its folder, configuration, folds and the numbers of the folds with a model."""

    path: Path
    config: TrainingConfig
    folds: Folds
    trained: tuple[int, ...]
    classes: tuple[str, ...]
    data_facts: dict[str, Any]

    @property
    def preprocessing(self) -> PreprocessingSpec:
        return self.config.preprocessing()

    def checkpoint(self, fold: int) -> Path:
        return _checkpoint(self.path, fold)

    def logs(self) -> dict[int, list[dict[str, float | None]]]:
        """The rows of each trained fold's log.csv, numbers or None."""
        return {
            fold: read_log(path) for fold in self.trained if (path := self.path / f"fold{fold}" / "log.csv").is_file()
        }


@dataclass(frozen=True, eq=False)
class Outputs:
    """Probabilities and logits (N, C) of N images; of the marked ones, by position, heat maps (h, w) by name."""

    probabilities: NDArray[np.float64]
    logits: NDArray[np.floating]
    heats: dict[int, dict[str, NDArray[np.float32]]]


def open_target(path: Path) -> Run | Bundle:
    """The run or bundle in folder ``path``.

    Raises
    ------
    UsageError
        If the folder is neither, or no fold of the run has a model yet.
    BundleError, CheckpointError
        If it is damaged.
    """
    if (path / "bundle.json").is_file():
        return load_bundle(path)
    if not (path / "config.yaml").is_file():
        what = "holds neither a run nor a bundle" if path.is_dir() else "is no folder"
        raise UsageError(f"{path} {what}: expected what `magsd train` or `magsd export` wrote")
    require("torch", feature="evaluating a run", extra="train")
    from .config import read_config, resolve
    from .folds import load_folds

    config = resolve(read_config(path / "config.yaml"))
    trained = tuple(fold for fold in range(config.folds) if _checkpoint(path, fold).is_file())
    if not trained:
        raise UsageError(f"no fold of {path} has a model yet (fold<k>/best.pt): run `magsd train` first")
    try:
        facts = json.loads((path / "manifest.json").read_text(encoding="utf-8"))
        classes = tuple(facts["classes"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{path / 'manifest.json'} cannot be used ({error}): the run is damaged") from error
    return Run(path, config, load_folds(path / "folds.json"), trained, classes, facts)


def read_log(path: Path) -> list[dict[str, float | None]]:
    """The rows of a log.csv; what is not a number is None."""
    with open(path, newline="", encoding="utf-8") as file:
        return [{name: _float(text) for name, text in row.items() if name} for row in csv.DictReader(file)]


@dataclass(frozen=True, eq=False)
class Predictions:
    """One row an image and model: ``folds`` int64 (N,) names the model, ``probabilities`` float64 (N, C).

    ``logits`` (N, C), where they are known, are what the probabilities were made of.
    ``classes`` is the model's order. A record whose label the model does not know has label -1.
    """

    classes: tuple[str, ...]
    records: tuple[Record, ...]
    folds: NDArray[np.int64]
    probabilities: NDArray[np.float64]
    logits: NDArray[np.floating] | None = None

    @property
    def labels(self) -> NDArray[np.int64]:
        index = {name: number for number, name in enumerate(self.classes)}
        return np.array([index.get(record.label, -1) for record in self.records], np.int64)

    @property
    def predicted(self) -> NDArray[np.int64]:
        return self.probabilities.argmax(axis=1).astype(np.int64)

    def select(self, rows: NDArray[Any]) -> Predictions:
        """The given rows: int indices or a bool mask (N,)."""
        rows = np.arange(len(self.records))[rows]
        records = tuple(self.records[row] for row in rows)
        logits = None if self.logits is None else self.logits[rows]
        return Predictions(self.classes, records, self.folds[rows], self.probabilities[rows], logits)


@contextmanager
def run_network(run: Run, fold: int, device_name: str) -> Iterator[tuple[Network, str]]:
    """The network of ``fold``'s best epoch, as a function of arrays, and the device it runs on.

    Raises
    ------
    BackendUnavailableError
        If CUDA was asked for and is not there.
    CheckpointError
        If the checkpoint is damaged, or differs from the run in classes or preprocessing.
    """
    import torch

    from .checkpoint import load_model
    from .distributed import choose_device

    device = choose_device(device_name)
    model, info = load_model(run.checkpoint(fold), device)
    if info.classes != run.classes or info.preprocessing != run.preprocessing:
        raise CheckpointError(f"{run.checkpoint(fold)} has other classes or preprocessing than {run.path}")

    def network(images: NDArray[np.float32]) -> dict[str, NDArray[np.float32]]:
        with torch.inference_mode():
            outputs = model(torch.from_numpy(images).to(device))
        return {name: getattr(outputs, name).float().cpu().numpy() for name in ("logits", "attention", "evidence")}

    yield network, str(device)


@contextmanager
def bundle_network(bundle: Bundle, device_name: str) -> Iterator[tuple[Network, str]]:
    """The bundle's network on the runtime's backend for ``device_name``, and that backend's name."""
    from magsd_runtime.backends import open_backend

    with open_backend(bundle, device_name) as backend:
        yield backend.run, f"{backend.name} ({backend.device})"


def predict(
    network: Network,
    images: Sequence[NDArray[np.uint8]],
    *,
    temperature: float = 1.0,
    heat_classes: dict[int, int | None] | None = None,
    batch: int = 32,
    progress: Callable[[int, int], None] | None = None,
) -> Outputs:
    """Probabilities of standardized images uint8 (S, S), normalized here as in the runtime, batch by batch.

    ``heat_classes`` marks the positions whose heat maps are kept, with the class that the evidence map is
    for; None stands for the predicted class.
    """
    marked = heat_classes or {}
    parts: list[NDArray[np.float64]] = []
    logits: list[NDArray[np.floating]] = []
    heats: dict[int, dict[str, NDArray[np.float32]]] = {}
    for start in range(0, len(images), batch):
        stop = min(start + batch, len(images))
        outputs = network(np.stack([normalize(images[index]) for index in range(start, stop)]))
        logits.append(outputs["logits"])
        parts.append(probabilities(outputs["logits"], temperature))
        for index in range(start, stop):
            if index in marked:
                attention, evidence = outputs["attention"][index - start], outputs["evidence"][index - start]
                wanted = marked[index]
                if wanted is None:
                    wanted = int(parts[-1][index - start].argmax())
                heats[index] = {
                    "attention": mean_attention_map(attention),
                    "evidence": class_evidence_map(attention, evidence, wanted),
                }
        if progress is not None:
            progress(stop, len(images))
    return Outputs(np.concatenate(parts), np.concatenate(logits), heats)


def _checkpoint(path: Path, fold: int) -> Path:
    return path / f"fold{fold}" / "best.pt"


def _float(text: str | None) -> float | None:
    try:
        value = float(text or "")
    except ValueError:
        return None
    return value if np.isfinite(value) else None

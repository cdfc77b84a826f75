"""The cells of a plan: one data set, variant, seed and fold each; their keys, folders, locks and results.

    OUT/folds/A-<data>-5-0.json              who is in which fold: the same for every cell of the data set
    OUT/cells/A-magsd-fold0-seed0-<key>/     .lock  log.txt  run/  evaluation/  result.json (last) or failed.json

The key is a digest of the settings, the manifest's text, the folds and the fold. A cell of another plan, or of an
earlier state of this one, has another key, so nothing stale is taken. Settings that have magsd's default are not in
the digest, so that a later magsd with one more option finds its cells again; result.json has them all, and
:func:`check_settings` holds them against today's.
"""

from __future__ import annotations

import dataclasses
import fcntl
import hashlib
import json
import os
import platform
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from magsd.config import MA_NETS, TrainingConfig
from magsd.data import Manifest, read_manifest
from magsd_runtime.errors import DataError, UsageError
from magsd_runtime.files import sha256_file, write_json

from .plan import Plan

SCHEMA = "magsd.reproduction-cell/1"
SCORES = ("accuracy", "sensitivity", "specificity", "f1", "auc", "ece")
_PLACES = ("data", "folds_file")
_DEFAULTS = TrainingConfig().to_dict()


@dataclass(frozen=True)
class Cell:
    """One training and its evaluation on the patients of ``fold``; ``config`` names no data and no folds file."""

    data: str
    manifest: Path
    digest: str
    images: int
    classes: int
    variant: str
    fold: int
    fold_seed: int
    config: TrainingConfig

    @property
    def key(self) -> str:
        """12 hexadecimal digits that change with anything that changes the result."""
        facts = {
            "schema": SCHEMA, "settings": digested(self.config), "manifest": self.digest,
            "folds": [self.config.folds, self.fold_seed], "fold": self.fold,
        }  # fmt: skip
        return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:12]

    @property
    def title(self) -> str:
        return f"{self.data} {self.variant} fold {self.fold} seed {self.config.seed}"

    @property
    def name(self) -> str:
        return f"{self.data}-{self.variant}-fold{self.fold}-seed{self.config.seed}-{self.key}"

    def folder(self, out: Path) -> Path:
        """Where it is, under whatever name its key was first seen (variants may be the same run), or is to be."""
        found = sorted((out / "cells").glob(f"*-{self.key}"))
        return found[0] if found else out / "cells" / self.name

    def folds_file(self, out: Path) -> Path:
        return out / "folds" / f"{self.data}-{self.digest[:8]}-{self.config.folds}-{self.fold_seed}.json"


def digested(config: TrainingConfig) -> dict[str, Any]:
    """The settings that are not magsd's defaults, without places; MA-Net's names for sets of choices do not count."""
    settings = {k: v for k, v in settings_of(config).items() if v != _DEFAULTS[k]}
    if config.model in MA_NETS:
        settings.pop("model", None)
    return settings


def settings_of(config: TrainingConfig) -> dict[str, Any]:
    """All settings as plain values, without the places of data and folds file; files by what is in them.

    Raises
    ------
    UsageError
        If a file of weights, or a lung network, is not there.
    """
    settings = {name: value for name, value in config.to_dict().items() if name not in _PLACES}
    if config.weights not in ("imagenet", "none"):
        settings["weights"] = _content(config.weights)
    if config.lungs:
        settings["lungs"] = _content(config.lungs)
    return settings


@cache
def _content(path: str) -> str:
    try:
        return f"sha256 {sha256_file(path)[:16]}"
    except OSError as error:
        raise UsageError(f"{path} cannot be read ({error.strerror}): the plan's settings name it") from error


def read_data(plan: Plan, root: Path) -> dict[str, Manifest]:
    """The manifests of the plan's data sets, as text; ``root`` is what relative paths are relative to.

    Raises
    ------
    DataError
        If one cannot be read, or a positive class is not one of its two.
    """
    manifests = {}
    for name, path in plan.data.items():
        try:
            manifests[name] = read_manifest(root / path)
        except DataError as error:
            raise DataError(
                f"data set {name}: {error} (the data root is {root}: --data-root or $MAGSD_DATA)"
            ) from error
        label = (plan.positive or {}).get(name)
        if label is not None and (label not in manifests[name].classes or len(manifests[name].classes) != 2):
            found = ", ".join(manifests[name].classes)
            raise DataError(f"positive.{name} is {label}: expected one of two classes, data set {name} has {found}")
    return manifests


def expand(plan: Plan, manifests: Mapping[str, Manifest]) -> list[Cell]:
    """All cells in the order in which they are done.

    Stage by stage; within a stage seed by seed, fold by fold, data set by data set, and the variants innermost, the
    full model first. So every comparison has one pair before any has two, and a run that is stopped has the same
    folds of all. A cell that several tables need is there once for each stage; its key is the same.
    """
    cells: list[Cell] = []
    configs: dict[tuple[str, str, int], TrainingConfig] = {}
    facts = {
        name: (manifest.digest(), len(manifest.records), len(manifest.classes)) for name, manifest in manifests.items()
    }
    for stage in plan.stages:
        for seed in plan.seeds:
            for fold in range(plan.folds):
                for data in stage.data:
                    for variant in stage.variants:
                        what = data, variant, seed
                        if what not in configs:
                            configs[what] = plan.config(*what)
                        cells.append(
                            Cell(
                                data, manifests[data].path, *facts[data], variant, fold, plan.fold_seed,
                                configs[what],
                            )
                        )  # fmt: skip
    return cells


def unique(cells: list[Cell]) -> list[Cell]:
    """The first cell of each key, in order."""
    first: dict[str, Cell] = {}
    for cell in cells:
        first.setdefault(cell.key, cell)
    return list(first.values())


def read_result(folder: Path) -> dict[str, Any] | None:
    """What a finished cell found; None if it is not finished.

    Raises
    ------
    DataError
        If result.json is damaged.
    """
    path = folder / "result.json"
    try:
        result = json.loads(path.read_text(encoding="utf-8"))
        if result["schema"] != SCHEMA:
            raise ValueError(f"schema is {result['schema']!r}, expected {SCHEMA!r}")
        if not folder.name.endswith(f"-{result['key']}") or set(SCORES) - set(result["scores"]):
            raise ValueError("it is of another cell, or lacks scores")
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(f"{path} is damaged ({error}): remove the folder, and its cell is done again") from error
    return result


def result_of(cell: Cell, out: Path) -> dict[str, Any] | None:
    """:func:`read_result` of a cell, whose settings are today's.

    Raises
    ------
    UsageError
        If the cell was made with another default of a setting than this magsd has.
    """
    folder = cell.folder(out)
    result = read_result(folder)
    if result is not None:
        check_settings(cell, result["settings"], folder)
    return result


def check_settings(cell: Cell, saved: Mapping[str, Any], folder: Path) -> None:
    """Refuse settings ``saved`` in ``folder`` that differ from the cell's, as after a change of a default.

    Raises
    ------
    UsageError
        Naming the first setting.
    """
    ours = settings_of(cell.config)
    for name, value in saved.items():
        if name in ours and ours[name] != value and not (name == "model" and {value, ours[name]} <= set(MA_NETS)):
            raise UsageError(
                f"{folder} was made with {name} {value!r} and this plan has {ours[name]!r}: "
                "remove it, or use another --out"
            )


def collect(cells: list[Cell], out: Path) -> dict[str, dict[str, Any]]:
    """The results that are there, by key.

    Raises
    ------
    DataError
        If one is damaged, or two of one data set were made with different folds.
    """
    results = {cell.key: result for cell in unique(cells) if (result := result_of(cell, out)) is not None}
    check_folds(results)
    return results


def check_folds(results: Mapping[str, Mapping[str, Any]]) -> None:
    """Refuse results of one data set whose patients were dealt differently: their pairs would be none.

    Raises
    ------
    DataError
        Naming two such cells.
    """
    seen: dict[Any, tuple[str, str]] = {}
    for result in results.values():
        place = (result["manifest_sha256"], *result["folds"])
        sha256, title = seen.setdefault(place, (result["folds_sha256"], result["title"]))
        if sha256 != result["folds_sha256"]:
            raise DataError(f"{title} and {result['title']} have different folds of the same data: they are no pairs")


def write_result(folder: Path, result: Mapping[str, Any]) -> None:
    """Write result.json, which makes the cell finished."""
    write_json(folder / "result.json", dict(result))
    (folder / "failed.json").unlink(missing_ok=True)


@contextmanager
def held(folder: Path) -> Iterator[int | None]:
    """The cell's lock, as an open file to be passed on to children, or None if another process holds it.

    A flock ends with the last process that has the file open: the lock file of a machine that lost power is no lock,
    and a training whose parent was killed holds its cell until it ends.
    """
    folder.mkdir(parents=True, exist_ok=True)
    handle = os.open(folder / ".lock", os.O_RDWR | os.O_CREAT, 0o644)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield None
            return
        os.ftruncate(handle, 0)
        os.pwrite(handle, f"{platform.node()} {os.getpid()}\n".encode(), 0)
        yield handle
    finally:
        os.close(handle)


def holder(folder: Path) -> str:
    """Machine and process number of who holds, or last held, the cell."""
    try:
        return " ".join((folder / ".lock").read_text(encoding="utf-8").split()) or "another process"
    except OSError:
        return "another process"


def with_places(cell: Cell, out: Path) -> TrainingConfig:
    """The configuration to train with."""
    return dataclasses.replace(
        cell.config, data=str(cell.manifest.absolute()), folds_file=str(cell.folds_file(out).absolute())
    )

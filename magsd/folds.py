"""Cross-validation folds: stratified by class, grouped by patient, seeded, saved and reusable.

All choices are made by the SHA-256 of seed and patient name, so that they are the same in every process,
on every machine and with every version of every library, in whatever order a manifest names the images.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from magsd_runtime.errors import DataError, UsageError
from magsd_runtime.files import write_json

from .data import Manifest
from .data_checks import counted, too_few_patients

SCHEMA = "magsd.folds/1"


@dataclass(frozen=True, eq=False)
class Split:
    """Record indices int64 of the three parts, ascending; no patient is in two of them."""

    train: NDArray[np.int64]
    validation: NDArray[np.int64]
    test: NDArray[np.int64]


FINAL = -1
"""The fold number of the model that is trained on all folds, and tested on none."""


def fold_name(fold: int) -> str:
    """The name of the fold's folder in a run: ``fold0``, ``fold1``, ..., ``final``."""
    return "final" if fold == FINAL else f"fold{fold}"


def fold_in_words(fold: int) -> str:
    """``fold 0``, ``fold 1``, ..., ``final``, for people."""
    return fold_name(fold).replace("fold", "fold ")


@dataclass(frozen=True)
class Folds:
    """Fold number 0 to ``n_folds`` - 1 of each patient; also patients that a manifest does not have."""

    seed: int
    n_folds: int
    assignment: dict[str, int]

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write a JSON file that :func:`load_folds` reads."""
        patients = dict(sorted(self.assignment.items()))
        write_json(path, {"schema": SCHEMA, "seed": self.seed, "n_folds": self.n_folds, "patients": patients})

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Folds:
        """:func:`load_folds`."""
        return load_folds(path)

    def require_patients(self, manifest: Manifest) -> None:
        """Raise unless every patient of the manifest has a fold.

        Raises
        ------
        DataError
            Naming the number of patients without a fold, and the first.
        """
        unknown = sorted({record.patient for record in manifest.records} - self.assignment.keys())
        if unknown:
            raise DataError(
                f"{counted(len(unknown), 'patient')} of the manifest in no fold (first: {unknown[0]}): "
                "the folds were made for other data"
            )

    def split(self, manifest: Manifest, fold: int, *, validation_fraction: float = 0.2, seed: int = 0) -> Split:
        """Test on ``fold``, validate on ``validation_fraction`` of the other folds' patients, train on the rest.

        The validation part is grouped by patient and stratified: of each class that fraction of its patients,
        at least one, and at least one stays for training. ``FINAL`` trains on everything.

        Raises
        ------
        DataError
            If a patient of the manifest has no fold.
        UsageError
            If ``fold`` or ``validation_fraction`` is out of range.
        """
        if fold == FINAL:
            self.require_patients(manifest)
            none = np.empty(0, np.int64)
            return Split(np.arange(len(manifest.records)), none, none)
        if not 0 <= fold < self.n_folds:
            raise UsageError(f"fold is {fold}: expected 0 to {self.n_folds - 1}")
        if not 0 < validation_fraction < 1:
            raise UsageError(f"validation_fraction is {validation_fraction}: expected more than 0 and less than 1")
        self.require_patients(manifest)
        of_patient = np.array([self.assignment[record.patient] for record in manifest.records], np.int64)
        test = of_patient == fold
        labels = _labels_of_patients(record for record, out in zip(manifest.records, test) if not out)
        chosen = _validation_patients(labels, validation_fraction, f"validation {seed} {fold}")
        validation = np.array([record.patient in chosen for record in manifest.records], np.bool_)
        return Split(np.flatnonzero(~test & ~validation), np.flatnonzero(validation), np.flatnonzero(test))


def make_folds(
    manifest: Manifest, n_folds: int = 5, seed: int = 0, *, together: Iterable[tuple[str, str]] = ()
) -> Folds:
    """Deal the patients of each class to ``n_folds`` folds, so that patients and images are near equal in each.

    The patients of a class go round the folds, those with most images first, each to the fold that has
    fewest patients of its class, then fewest of its images. Patients with several classes go first, so that
    the others even out what they leave. ``together`` are pairs of patients (near duplicates) for one fold.

    Raises
    ------
    DataError
        If a class has fewer patients than there are folds, or there is one class only.
    UsageError
        If ``n_folds`` is less than 2.
    """
    if n_folds < 2:
        raise UsageError(f"n_folds is {n_folds}: expected 2 or more")
    if len(manifest.classes) < 2:
        raise DataError(f"{manifest.path}: has one class only ({', '.join(manifest.classes)}), expected two or more")
    if few := too_few_patients(manifest, n_folds):
        raise DataError(
            f"{manifest.path}: too few patients for {n_folds} folds ({'; '.join(few)}): "
            "every class needs one or more in each fold, use fewer folds"
        )
    names = sorted({record.patient for record in manifest.records})
    group_of = _grouped(names, together)
    images: dict[str, Counter[str]] = defaultdict(Counter)
    for record in manifest.records:
        images[group_of[record.patient]][record.label] += 1
    rarity = Counter(label for counts in images.values() for label in counts)

    def by_turn(group: str) -> tuple[Any, ...]:
        rarest = sorted(images[group], key=lambda label: (rarity[label], label))
        return len(rarest) == 1, rarest, -images[group].total(), _key(f"fold {seed}", group)

    patients_in = [Counter[str]() for _ in range(n_folds)]
    images_in = [Counter[str]() for _ in range(n_folds)]
    fold_of: dict[str, int] = {}
    for group in sorted(images, key=by_turn):
        labels = sorted(images[group], key=lambda label: (rarity[label], label))
        fold_of[group] = chosen = min(
            range(n_folds),
            key=lambda fold: (
                [patients_in[fold][label] for label in labels],
                [images_in[fold][label] for label in labels],
                images_in[fold].total(),
                _key(f"fold {seed} {labels}", str(fold)),
            ),
        )
        patients_in[chosen].update(labels)
        images_in[chosen].update(images[group])
    return Folds(seed, n_folds, {name: fold_of[group_of[name]] for name in names})


def load_folds(path: str | os.PathLike[str], manifest: Manifest | None = None) -> Folds:
    """Read what :meth:`Folds.save` wrote; with ``manifest``, all of its patients must have a fold.

    Raises
    ------
    DataError
        If the file cannot be read, is no fold file, has a patient in two folds, or lacks a patient.
    """
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8"), object_pairs_hook=_unique)
        if content["schema"] != SCHEMA:
            raise DataError(f"schema is {content['schema']!r}, expected {SCHEMA!r}")
        folds = Folds(content["seed"], content["n_folds"], content["patients"])
        numbers = {folds.seed, folds.n_folds, *folds.assignment.values()}
        if any(type(number) is not int for number in numbers) or folds.n_folds < 2:
            raise DataError("seed, n_folds and folds are not whole numbers, or n_folds is less than 2")
        if outside := [name for name, fold in folds.assignment.items() if not 0 <= fold < folds.n_folds]:
            raise DataError(f"{counted(len(outside), 'patient')} beyond fold {folds.n_folds - 1} (first: {outside[0]})")
    except DataError as error:
        raise DataError(f"{path}: {error}") from None
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror}), expected a folds.json") from error
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise DataError(f"{path}: is no folds.json as magsd writes it ({type(error).__name__}: {error})") from error
    if manifest is not None:
        folds.require_patients(manifest)
    return folds


def _unique(pairs: Sequence[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) < len(pairs):
        twice = [name for name, number in Counter(name for name, _ in pairs).items() if number > 1]
        raise DataError(f"{counted(len(twice), 'name')} given twice (first: {twice[0]}): a patient has one fold")
    return result


def _key(salt: str, name: str) -> bytes:
    return hashlib.sha256(f"{salt}\0{name}".encode("utf-8", "surrogateescape")).digest()


def _labels_of_patients(records: Iterable[Any]) -> dict[str, set[str]]:
    labels: dict[str, set[str]] = defaultdict(set)
    for record in records:
        labels[record.patient].add(record.label)
    return labels


def _grouped(names: Sequence[str], together: Iterable[tuple[str, str]]) -> dict[str, str]:
    """The first name of each patient's group: patients joined by a chain of pairs are one group."""
    parent = {name: name for name in names}

    def first(name: str) -> str:
        while parent[name] != name:
            name = parent[name]
        return name

    for one, other in together:
        low, high = sorted((first(one), first(other)))
        parent[high] = low
    return {name: first(name) for name in names}


def _validation_patients(labels: dict[str, set[str]], fraction: float, salt: str) -> set[str]:
    """A seeded choice of ``fraction`` of each class's patients; rarest class first, two-class patients with it."""
    of_class: dict[str, list[str]] = defaultdict(list)
    for name in sorted(labels, key=lambda name: _key(salt, name)):
        for label in labels[name]:
            of_class[label].append(name)
    left = {label: len(patients) for label, patients in of_class.items()}  # those that stay for training
    decided: set[str] = set()
    chosen: set[str] = set()
    for label in sorted(of_class, key=lambda label: (len(of_class[label]), label)):
        patients = of_class[label]
        # halves are rounded up, so that small classes are not starved
        wanted = min(max(1, int(fraction * len(patients) + 0.5)), len(patients) - 1)
        wanted -= len(patients) - left[label]
        for name in patients:
            if wanted > 0 and name not in decided and all(left[own] > 1 for own in labels[name]):
                chosen.add(name)
                wanted -= 1
                for own in labels[name]:
                    left[own] -= 1
        decided.update(patients)
    return chosen

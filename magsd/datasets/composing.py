"""Data sets A, B and C of the paper's Table 1 out of manifests: so many images a class, chosen by patient."""

from __future__ import annotations

import hashlib
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from magsd_runtime.errors import DataError
from magsd_runtime.files import sha256_file

from .rows import Row

_ANY = ("pneumonia", "viral_pneumonia", "bacterial_pneumonia")

TABLE_1: dict[str, dict[str, tuple[int, tuple[str, ...]]]] = {
    "A": {"covid19": (90, ("covid19",)), "pneumonia": (168, _ANY)},
    "B": {"covid19": (462, ("covid19",)), "pneumonia": (1567, _ANY), "healthy": (1602, ("healthy",))},
    "C": {
        "covid19": (462, ("covid19",)), "viral_pneumonia": (1449, ("viral_pneumonia",)),
        "bacterial_pneumonia": (2816, ("bacterial_pneumonia",)), "healthy": (1602, ("healthy",)),
    },
}  # fmt: skip
"""By data set and class: images in the paper's Table 1, and the labels of a manifest that count as the class."""


@dataclass(frozen=True)
class Composed:
    """``rows`` with the data set's labels; ``found``: images there were of each class; ``same``: identical files
    that were left out."""

    rows: tuple[Row, ...]
    found: dict[str, int]
    wanted: dict[str, int]
    same: int

    @property
    def warnings(self) -> list[str]:
        """What a reader of any score on it has to know."""
        said = [
            f"{label}: {count} of {self.wanted[label]} images, there are no more"
            for label, count in self.counts().items()
            if count < self.wanted[label]
        ]
        sources = defaultdict(set)
        for row in self.rows:
            sources[row.label].add(row.source)
        seen = [source for each in sources.values() for source in each]
        if len(seen) == len(set(seen)):
            said.append("the source of a film gives its class away: no score on this data set shows that a network "
                        "sees a disease (docs/shortcuts.md)")  # fmt: skip
        both = [patient for patient, labels in self._labels_of_patients().items() if len(labels) > 1]
        if both:
            said.append(f"{len(both)} patients are in two classes or more; all images of one stay in one fold")
        return said

    def counts(self) -> dict[str, int]:
        taken = Counter(row.label for row in self.rows)
        return {label: taken[label] for label in self.wanted}

    def _labels_of_patients(self) -> dict[str, set[str]]:
        labels: dict[str, set[str]] = defaultdict(set)
        for row in self.rows:
            labels[row.patient].add(row.label)
        return labels


def compose(name: str, rows: Iterable[Row], *, seed: int = 0, limit: int | None = None) -> Composed:
    """Data set ``name``: of each class as many images as Table 1 has, or as there are.

    Patients come in an order that ``seed`` draws, the same on every machine, and give all their images until the class
    is full; the last one only as many as fit. Of identical files the first by path stays. ``limit``: at most so many
    images a class, for a small one.

    Raises
    ------
    DataError
        If a class has no image at all.
    """
    asked = {label: (count if limit is None else min(count, limit), of) for label, (count, of) in TABLE_1[name].items()}
    unique, same = _without_copies(sorted(rows, key=lambda row: str(row.path)))
    chosen: list[Row] = []
    found: dict[str, int] = {}
    for label, (count, of) in asked.items():
        of_class = [row for row in unique if row.label in of]
        found[label] = len(of_class)
        if not of_class:
            raise DataError(f"data set {name}: none of the manifests has an image of {' or '.join(of)}")
        patients: dict[str, list[Row]] = defaultdict(list)
        for row in of_class:
            patients[row.patient].append(row)
        order = sorted(patients, key=lambda patient: hashlib.sha256(f"{seed}\n{patient}".encode()).digest())
        taken = [row for patient in order for row in patients[patient]][:count]
        chosen += [
            Row(row.path, label, row.patient, row.source, row.boxes, row.view, row.age, row.sex, row.finding)
            for row in taken
        ]
    return Composed(tuple(chosen), found, {label: count for label, (count, _) in asked.items()}, same)


def _without_copies(rows: Sequence[Row]) -> tuple[list[Row], int]:
    """Each file's content once. Only files of one size are read."""
    sizes: dict[int, list[Path]] = defaultdict(list)
    for row in rows:
        try:
            sizes[row.path.stat().st_size].append(row.path)
        except OSError as error:
            raise DataError(f"{row.path}: is named by a manifest and cannot be read ({error.strerror})") from error
    digests = {path: sha256_file(path) for paths in sizes.values() if len(paths) > 1 for path in paths}
    seen: set[str] = set()
    kept = []
    for row in rows:
        digest = digests.get(row.path)
        if digest is not None and digest in seen:
            continue
        seen |= {digest} if digest is not None else set()
        kept.append(row)
    return kept, len(rows) - len(kept)

"""The data sets of the paper's Table 1 out of manifests: so many images a class, chosen by patient."""

from __future__ import annotations

import hashlib
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from magsd_runtime.errors import DataError
from magsd_runtime.files import sha256_file

from ..confounds import SUSPICIOUS, told_by_source
from .rows import Row

_ANY = ("pneumonia", "viral_pneumonia", "bacterial_pneumonia")

TABLE_1: dict[str, dict[str, tuple[int, tuple[str, ...]]]] = {
    "A": {"covid19": (90, ("covid19",)), "pneumonia": (168, _ANY)},
    "B": {"covid19": (462, ("covid19",)), "pneumonia": (1567, _ANY), "healthy": (1602, ("healthy",))},
    "C": {
        "covid19": (462, ("covid19",)), "viral_pneumonia": (1449, ("viral_pneumonia",)),
        "bacterial_pneumonia": (2816, ("bacterial_pneumonia",)), "healthy": (1602, ("healthy",)),
    },
    "localization": {"covid19": (13, ("covid19",)), "pneumonia": (118, _ANY)},
}  # fmt: skip
"""By data set and class: images in the paper's Table 1, and the labels of a manifest that count as the class."""

PAPER_SOURCES: dict[str, dict[str, tuple[str, ...]]] = {
    "A": {"covid19": ("cohen",), "pneumonia": ("nih",)},
    "B": dict.fromkeys(TABLE_1["B"], ("v7-cohen", "v7-kermany", "nih")),
    "localization": {"covid19": ("bimcv",), "pneumonia": ("nih",)},
}
"""By data set and class: the sources that section 4.1 of the paper names. For B it names two for all classes
together, for C none."""


@dataclass(frozen=True)
class Composed:
    """``rows`` with the data set's labels; ``found``: images there were of each class; ``same``: identical files that
    were left out; ``contradicting``: those of them that had two classes; ``joined``: patients that are one because a
    film of both is the same file."""

    rows: tuple[Row, ...]
    found: dict[str, int]
    wanted: dict[str, int]
    same: int
    contradicting: int = 0
    joined: int = 0

    @property
    def warnings(self) -> list[str]:
        """What a reader of any score on it has to know."""
        said = [
            f"{label}: {count} of {self.wanted[label]} images, there are no more"
            for label, count in self.counts().items()
            if count < self.wanted[label]
        ]
        if self.same:
            said.append(f"{self.same} identical files left out")
        if self.contradicting:
            said.append(f"{self.contradicting} of them because the same film had two classes: none of its copies stays")
        if self.joined:
            said.append(f"{self.joined} patients had the same film as another one and count as that one")
        said += self._by_source()
        both = [patient for patient, labels in self._labels_of_patients().items() if len(labels) > 1]
        if both:
            said.append(f"{len(both)} patients are in two classes or more; all images of one stay in one fold")
        return said

    def counts(self) -> dict[str, int]:
        taken = Counter(row.label for row in self.rows)
        return {label: taken[label] for label in self.wanted}

    def _by_source(self) -> list[str]:
        """Whether the class can be told from where a film is from."""
        sources = defaultdict(set)
        for row in self.rows:
            sources[row.label].add(row.source)
        seen = [source for each in sources.values() for source in each]
        if len(sources) > 1 and len(seen) == len(set(seen)):
            return ["the source of a film gives its class away: no score on this data set shows that a network sees a "
                    "disease (docs/shortcuts.md)"]  # fmt: skip
        told = {label: accuracy for label, accuracy in told_by_source(self.rows).items() if accuracy > 0.5 + SUSPICIOUS}
        if not told:
            return []
        figures = ", ".join(f"{label} {accuracy:.2f}" for label, accuracy in told.items())
        return [f"the source alone tells a class from the others, with a balanced accuracy of: {figures} (guessing: "
                "0.50); a network that does no better need not see a disease (docs/shortcuts.md)"]  # fmt: skip

    def _labels_of_patients(self) -> dict[str, set[str]]:
        labels: dict[str, set[str]] = defaultdict(set)
        for row in self.rows:
            labels[row.patient].add(row.label)
        return labels


def compose(
    name: str, rows: Iterable[Row], *, seed: int = 0, limit: int | None = None, paper_sources: bool = False
) -> Composed:
    """Data set ``name``: of each class as many images as Table 1 has, or as there are.

    Patients come in an order that ``seed`` draws, the same on every machine, and give all their images until the class
    is full; the last one only as many as fit. Identical files count once, and their patients as one person.
    ``limit``: at most so many images a class, for a small one. ``paper_sources``: only from :data:`PAPER_SOURCES`.
    Of the localization set are only films that somebody drew on.

    Raises
    ------
    DataError
        If a class has no image at all (of the localization set: if none has one), or the paper names no source.
    """
    if paper_sources and name not in PAPER_SOURCES:
        raise DataError(f"data set {name}: the paper names no source of its classes, leave --paper-sources out")
    asked = {label: (count if limit is None else min(count, limit), of) for label, (count, of) in TABLE_1[name].items()}
    class_of = {label: asked_for for asked_for, (_, labels) in asked.items() for label in labels}
    usable = [row for row in rows if name != "localization" or row.drawn]
    if paper_sources:
        allowed = PAPER_SOURCES[name]
        usable = [row for row in usable if row.source in allowed.get(class_of.get(row.label, ""), ())]
    unique, same, contradicting, joined = _without_copies(usable, class_of)
    chosen: list[Row] = []
    found: dict[str, int] = {}
    for label, (count, of) in asked.items():
        of_class = [row for row in unique if row.label in of]
        found[label] = len(of_class)
        if not of_class and name != "localization":
            where = f" from {' or '.join(PAPER_SOURCES[name][label])}" if paper_sources else ""
            raise DataError(f"data set {name}: none of the manifests has an image of {' or '.join(of)}{where}")
        patients: dict[str, list[Row]] = defaultdict(list)
        for row in of_class:
            patients[row.patient].append(row)
        order = sorted(patients, key=lambda patient: hashlib.sha256(f"{seed}\n{patient}".encode()).digest())
        taken = [row for patient in order for row in patients[patient]][:count]
        chosen += [replace(row, label=label) for row in taken]
    if not chosen:
        raise DataError(f"data set {name}: none of the manifests has an image with a box or a mask")
    wanted = {label: count for label, (count, _) in asked.items()}
    return Composed(tuple(chosen), found, wanted, same, contradicting, joined)


def _without_copies(rows: Sequence[Row], class_of: dict[str, str]) -> tuple[list[Row], int, int, int]:
    """Each file's content once, with one patient for those of all its copies; how many rows went, how many of them
    because of two classes, and how many patients turned out to be another one. Only files of one size are read.

    Of copies stays one that is drawn on, with the most exact label, the first by path.
    """
    digests = _digests({row.path for row in rows})
    copies: dict[str, list[Row]] = defaultdict(list)
    for row in sorted(rows, key=lambda row: (not row.drawn, row.label == "pneumonia", str(row.path))):
        copies[digests[row.path]].append(row)
    whose = _Joined()
    kept, contradicting = [], 0
    for same in copies.values():
        for row in same:
            whose.join(same[0].patient, row.patient)
        exact = {row.label for row in same if row.label != "pneumonia"}
        if len({class_of.get(label, label) for label in exact}) > 1:
            contradicting += len(same)
            continue
        kept.append(next((replace(same[0], label=row.label) for row in same if row.label in exact), same[0]))
    kept = [replace(row, patient=whose.one(row.patient)) for row in sorted(kept, key=lambda row: str(row.path))]
    return kept, len(rows) - len(kept), contradicting, whose.count()


def _digests(paths: Iterable[Path]) -> dict[Path, str]:
    """A name for each file's content; of a file whose size no other one has, its path."""
    sizes: dict[int, list[Path]] = defaultdict(list)
    for path in paths:
        try:
            sizes[path.stat().st_size].append(path)
        except OSError as error:
            raise DataError(f"{path}: is named by a manifest and cannot be read ({error.strerror})") from error
    return {
        path: sha256_file(path) if len(alike) > 1 else str(path) for alike in sizes.values() for path in alike
    }  # fmt: skip


class _Joined:
    """Patients that are one person, under the name that comes first in the alphabet."""

    def __init__(self) -> None:
        self._other: dict[str, str] = {}

    def one(self, patient: str) -> str:
        while patient in self._other:
            patient = self._other[patient]
        return patient

    def join(self, one: str, other: str) -> None:
        first, second = sorted((self.one(one), self.one(other)))
        if first != second:
            self._other[second] = first

    def count(self) -> int:
        return len(self._other)

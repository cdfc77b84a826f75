"""What can be wrong with a manifest's images, found before anything starts and told in one report.

Near duplicates are pairs whose difference hashes differ in at most ``NEAR`` of 256 bits, plain or with one
of the two mirrored. What a finding is depends on where the two images stand:

    different patients, different labels      error: one film cannot be both
    different patients, different folds       error: the test fold has been seen in training
    different patients, otherwise             warning: probably one patient under two names
    one patient                               warning: follow-up films, or copies
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import cv2
import numpy as np
from numpy.typing import NDArray

from magsd_runtime.errors import DataError

if TYPE_CHECKING:
    from .data import Manifest
    from .folds import Folds

NEAR = 6
"""Hamming distance of two 256-bit difference hashes up to which two images count as near duplicates."""

MAX_ITEMS = 1000
"""Places that one issue lists at most; its message counts all of them."""

Severity = Literal["error", "warning"]


@dataclass(frozen=True)
class Issue:
    """One kind of finding: ``message`` with its count, ``items`` the places (the first ``MAX_ITEMS``)."""

    code: str
    severity: Severity
    message: str
    items: tuple[str, ...] = ()


@dataclass(frozen=True)
class DataReport:
    """All findings about one manifest; ``subject`` says which."""

    subject: str
    errors: tuple[Issue, ...]
    warnings: tuple[Issue, ...]

    def format(self, limit: int = 5) -> str:
        """The report as text of several lines, with at most ``limit`` places a finding."""
        lines = [
            f"{self.subject}: {counted(len(self.errors), 'kind')} of error, "
            f"{counted(len(self.warnings), 'kind')} of warning"
        ]
        for issue in (*self.errors, *self.warnings):
            lines.append(f"{issue.severity}: {issue.message} [{issue.code}]")
            lines += [f"    {item}" for item in issue.items[:limit]]
            if len(issue.items) > limit:
                lines.append("    ...")
        return "\n".join(lines)

    def raise_if_errors(self) -> None:
        """Raise what is wrong as one line.

        Raises
        ------
        DataError
            If there are errors; the message has each kind with its count and first place.
        """
        if self.errors:
            kinds = "; ".join(
                issue.message + (f", first: {issue.items[0]}" if issue.items else "") for issue in self.errors
            )
            raise DataError(f"{self.subject} cannot be used: {kinds}")


@dataclass(frozen=True)
class Problem:
    """What is wrong with one image: ``text`` names it."""

    code: str
    text: str


@dataclass(frozen=True, eq=False)
class Inspection:
    """What reading each of N images once has told.

    ``hashes`` and ``mirrored`` uint64 (N, 4): difference hash of the image and of its mirror image;
    ``comparable`` bool (N,): read, and with contrast, so that the hashes mean something.
    """

    hashes: NDArray[np.uint64]
    mirrored: NDArray[np.uint64]
    comparable: NDArray[np.bool_]
    problems: tuple[Problem, ...]


@dataclass(frozen=True, eq=False)
class Pairs:
    """P near duplicates: indices ``first`` < ``second``, ``distance`` in bits, ``mirrored``; each (P,)."""

    first: NDArray[np.int64]
    second: NDArray[np.int64]
    distance: NDArray[np.int64]
    mirrored: NDArray[np.bool_]


# code: (severity, what is said of n places)
_PROBLEMS: dict[str, tuple[Severity, str]] = {
    "missing": ("error", "{n} missing: there is no such file"),
    "unreadable": ("error", "{n} that cannot be read"),
    "mask": ("error", "{n} with a mask that cannot be used"),
    "box-outside": ("error", "{n} with a box outside the image"),
    "box-partly-outside": ("warning", "{n} with a box that reaches beyond the image: it is clipped"),
    "blank": ("warning", "{n} without any contrast"),
}


def counted(number: int, noun: str) -> str:
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def make_issue(code: str, severity: Severity, message: str, items: Iterable[str]) -> Issue:
    return Issue(code, severity, message, tuple(item for item, _ in zip(items, range(MAX_ITEMS))))


def difference_hash(pixels: NDArray[np.uint8]) -> tuple[NDArray[np.uint64], NDArray[np.uint64]]:
    """dHash of 16 x 16 bits: uint8 (H, W) -> uint64 (4,) of the image, uint64 (4,) of its mirror image.

    The image is shrunk to 17 x 16 pixels by area averaging; a bit says that a pixel is brighter than
    its left neighbour. Rows follow each other from the first, highest bit on.
    """
    small = np.asarray(cv2.resize(pixels, (17, 16), interpolation=cv2.INTER_AREA))
    flipped = small[:, ::-1]
    return _packed(small[:, 1:] > small[:, :-1]), _packed(flipped[:, 1:] > flipped[:, :-1])


def _packed(bits: NDArray[np.bool_]) -> NDArray[np.uint64]:
    return np.packbits(bits).view(">u8").astype(np.uint64)


def near_duplicates(
    hashes: NDArray[np.uint64], mirrored: NDArray[np.uint64], *, distance: int = NEAR, block: int = 1024
) -> Pairs:
    """All pairs of N images at most ``distance`` bits apart; the nearer way where both ways are near.

    ``hashes`` and ``mirrored`` uint64 (N, 4), from :func:`difference_hash`. With bits as signs -1 and +1 a
    dot product is 256 minus twice the Hamming distance, exact in float32, and a matrix product is the
    quickest way to all pairs that every numpy has.
    """
    signs, mirror_signs = _signs(hashes), _signs(mirrored)
    least = 256 - 2 * distance
    found: list[tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64], NDArray[np.bool_]]] = []
    for start in range(0, len(signs), block):
        rows = signs[start : start + block]
        plain = rows @ signs[start:].T
        other = rows @ mirror_signs[start:].T
        best = np.maximum(plain, other)
        first, second = np.nonzero(best >= least)
        later = second > first
        first, second = first[later], second[later]
        near = (256 - best[first, second].astype(np.int64)) // 2
        found.append((first + start, second + start, near, other[first, second] > plain[first, second]))
    if not found:
        none = np.zeros(0, np.int64)
        return Pairs(none, none, none, none.astype(bool))
    return Pairs(*(np.concatenate(part) for part in zip(*found)))


def _signs(hashes: NDArray[np.uint64]) -> NDArray[np.float32]:
    octets = np.ascontiguousarray(hashes.astype(">u8")).view(np.uint8)
    return np.unpackbits(octets.reshape(len(hashes), 32), axis=1).astype(np.float32) * 2 - 1


def comparable_pairs(inspection: Inspection) -> Pairs:
    """The near duplicates among the images that have a meaningful hash, with indices into all images."""
    index = np.flatnonzero(inspection.comparable)
    pairs = near_duplicates(inspection.hashes[index], inspection.mirrored[index])
    return Pairs(index[pairs.first], index[pairs.second], pairs.distance, pairs.mirrored)


def report_on(
    manifest: Manifest,
    inspection: Inspection,
    pairs: Pairs,
    *,
    folds: Folds | None = None,
    n_folds: int | None = None,
    strict: bool = False,
) -> DataReport:
    """Everything that is wrong with ``manifest``; with ``strict`` warnings are errors."""
    issues = [
        *manifest.issues,
        *_image_issues(inspection.problems),
        *_class_issues(manifest, folds, n_folds),
        *_fold_issues(manifest, folds),
        *_near_issues(manifest, pairs, folds),
    ]
    patients = len({record.patient for record in manifest.records})
    subject = (
        f"{manifest.path} ({counted(len(manifest.records), 'image')}, {counted(patients, 'patient')}, "
        f"{len(manifest.classes)} class{'es' if len(manifest.classes) != 1 else ''})"
    )
    return DataReport(
        subject,
        tuple(issue for issue in issues if strict or issue.severity == "error"),
        tuple(issue for issue in issues if not strict and issue.severity == "warning"),
    )


def _image_issues(problems: Sequence[Problem]) -> list[Issue]:
    texts: dict[str, list[str]] = defaultdict(list)
    for problem in problems:
        texts[problem.code].append(problem.text)
    return [
        make_issue(code, severity, message.format(n=counted(len(texts[code]), "image")), texts[code])
        for code, (severity, message) in _PROBLEMS.items()
        if code in texts
    ]


def too_few_patients(manifest: Manifest, n_folds: int) -> list[str]:
    """The classes with fewer patients than folds, each as a phrase."""
    patients: dict[str, set[str]] = defaultdict(set)
    for record in manifest.records:
        patients[record.label].add(record.patient)
    return [
        f"{label} has {counted(len(patients[label]), 'patient')}"
        for label in manifest.classes
        if len(patients[label]) < n_folds
    ]


def _class_issues(manifest: Manifest, folds: Folds | None, n_folds: int | None) -> list[Issue]:
    issues = []
    if len(manifest.classes) < 2:
        message = f"there is one class only ({', '.join(manifest.classes)}): training needs two or more"
        issues.append(Issue("one-class", "error", message))
    if folds is None and n_folds is not None and (few := too_few_patients(manifest, n_folds)):
        message = f"too few patients for {n_folds} folds: every class needs at least {n_folds}"
        issues.append(make_issue("too-few-patients", "error", message, few))
    spellings: dict[str, list[str]] = defaultdict(list)
    for label in manifest.classes:
        spellings["".join(character for character in label.casefold() if character.isalnum())].append(label)
    alike = [" and ".join(names) for names in spellings.values() if len(names) > 1]
    if alike:
        message = "labels that differ only in case, spaces or punctuation are taken as different classes"
        issues.append(make_issue("similar-labels", "warning", message, alike))
    labels: dict[str, Counter[str]] = defaultdict(Counter)
    for record in manifest.records:
        labels[record.patient][record.label] += 1
    two = [name for name in sorted(labels) if len(labels[name]) > 1]
    if two:
        message = f"{counted(len(two), 'patient')} with more than one label: each stays whole in one fold"
        texts = (f"{name}: " + ", ".join(f"{n} {label}" for label, n in sorted(labels[name].items())) for name in two)
        issues.append(make_issue("patient-with-two-labels", "warning", message, texts))
    return issues


def _fold_issues(manifest: Manifest, folds: Folds | None) -> list[Issue]:
    if folds is None:
        return []
    issues = []
    unknown = sorted({record.patient for record in manifest.records} - folds.assignment.keys())
    if unknown:
        message = f"{counted(len(unknown), 'patient')} in no fold of the given folds"
        issues.append(make_issue("patient-in-no-fold", "error", message, unknown))
    present = {(folds.assignment.get(record.patient), record.label) for record in manifest.records}
    lacking = [
        f"fold {fold} has no {label}"
        for fold in range(folds.n_folds)
        for label in manifest.classes
        if (fold, label) not in present
    ]
    if lacking:
        message = f"{counted(len(lacking), 'time')} a fold lacks a class: it has no complete scores"
        issues.append(make_issue("class-not-in-fold", "warning", message, lacking))
    return issues


def _near_issues(manifest: Manifest, pairs: Pairs, folds: Folds | None) -> list[Issue]:
    if not len(pairs.first):
        return []
    records = manifest.records
    labels = _numbers([record.label for record in records])
    patients = _numbers([record.patient for record in records])
    one_patient = patients[pairs.first] == patients[pairs.second]
    one_label = labels[pairs.first] == labels[pairs.second]
    one_fold = np.ones_like(one_patient)
    if folds is not None:
        fold = np.array([folds.assignment.get(record.patient, -1) for record in records])
        one_fold = fold[pairs.first] == fold[pairs.second]
    kinds: list[tuple[str, Severity, NDArray[np.bool_], str]] = [
        ("near-duplicates-two-labels", "error", ~one_patient & ~one_label,
         "of different patients with different labels: correct the label or the patient, or leave one out"),
        ("near-duplicates-two-folds", "error", ~one_patient & one_label & ~one_fold,
         "of different patients in different folds: name the patient alike, or leave one out"),
        ("near-duplicates-two-patients", "warning", ~one_patient & one_label & one_fold,
         "of different patients: is it one patient under two names?"),
        ("near-duplicates-one-patient-two-labels", "warning", one_patient & ~one_label,
         "of one patient with different labels"),
        ("near-duplicates", "warning", one_patient & one_label, "of one patient"),
    ]  # fmt: skip
    issues = []
    for code, severity, chosen, message in kinds:
        rows = np.flatnonzero(chosen)
        if len(rows):
            texts = (_pair_text(manifest, pairs, row) for row in rows[:MAX_ITEMS].tolist())
            text = f"{counted(len(rows), 'pair')} of near duplicates {message}"
            issues.append(make_issue(code, severity, text, texts))
    return issues


def _numbers(names: Sequence[str]) -> NDArray[np.int64]:
    index: dict[str, int] = {}
    return np.array([index.setdefault(name, len(index)) for name in names], np.int64)


def _pair_text(manifest: Manifest, pairs: Pairs, row: int) -> str:
    one, other = (manifest.records[int(index[row])] for index in (pairs.first, pairs.second))
    how = f"{counted(int(pairs.distance[row]), 'bit')} of 256{', mirrored' if pairs.mirrored[row] else ''}"
    names = [f"{manifest.name_of(record)} ({record.label}, {record.patient})" for record in (one, other)]
    return f"{names[0]} and {names[1]}: {how}"

"""Manifests and class folders: which images, of which class, of which patient; read once, kept as uint8.

    manifest = read_manifest(path, lenient=True)      text only; no image is opened
    prepared = prepare(manifest, spec)                every image decoded once: standardized, hashed, judged
    prepared.check(n_folds=5).raise_if_errors()       one report of all that is wrong, text and images

A manifest is CSV (UTF-8) with ``path,label,patient`` and optional ``source,x,y,w,h,mask``.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

import numpy as np
from numpy.typing import NDArray

from magsd_runtime.errors import DataError, ImageError
from magsd_runtime.images import find_images, has_contrast, read_radiograph
from magsd_runtime.manifest_csv import Box, read_lines
from magsd_runtime.preprocessing import PreprocessingSpec, frame, lungs_in_square, standardize

from .data_checks import (
    DataReport,
    Inspection,
    Issue,
    Pairs,
    Problem,
    comparable_pairs,
    counted,
    difference_hash,
    make_issue,
    report_on,
)

if TYPE_CHECKING:
    from .folds import Folds

_T = TypeVar("_T")

Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Record:
    """One image; ``boxes`` are (x, y, w, h) in pixels of the file: left, top, width, height."""

    path: Path
    label: str
    patient: str
    source: str = ""
    boxes: tuple[Box, ...] = ()
    mask: Path | None = None


@dataclass(frozen=True)
class Manifest:
    """The images of one CSV file or class folder ``path``, sorted by file name.

    Names in it are relative to ``root``; ``issues`` is what reading the text has found.
    """

    root: Path
    records: tuple[Record, ...]
    path: Path = Path()
    issues: tuple[Issue, ...] = ()

    @cached_property
    def classes(self) -> tuple[str, ...]:
        """The labels, sorted; their order is that of the class indices."""
        return tuple(sorted({record.label for record in self.records}))

    def label_indices(self) -> NDArray[np.int64]:
        """Class index of each record, int64 (N,)."""
        index = {name: number for number, name in enumerate(self.classes)}
        return np.array([index[record.label] for record in self.records], np.int64)

    def name_of(self, record: Record) -> str:
        """The record's path relative to the manifest, with forward slashes."""
        return Path(os.path.relpath(record.path, self.root)).as_posix()

    def digest(self) -> str:
        """SHA-256 of all records, with paths relative to the manifest: the same wherever the folder lies.

        It covers the manifest's text, not the images' pixels.
        """
        rows = [
            [
                self.name_of(record), record.label, record.patient, record.source, record.boxes,
                record.mask and Path(os.path.relpath(record.mask, self.root)).as_posix(),
            ]
            for record in self.records
        ]  # fmt: skip
        return hashlib.sha256(json.dumps(sorted(rows, key=json.dumps)).encode()).hexdigest()


@dataclass(frozen=True, eq=False)
class Prepared:
    """The images of a manifest, uint8 (N, S, S) in the order of its records, and what reading them told.

    An image that could not be read is black here and an error in :meth:`check`. ``lungs``, where asked for, is how
    much of each pixel is lung, uint8 (N, S, S), 255 all of it; 0 everywhere if no lungs were found.
    """

    manifest: Manifest
    images: NDArray[np.uint8]
    inspection: Inspection
    lungs: NDArray[np.uint8] | None = None

    @cached_property
    def pairs(self) -> Pairs:
        """The near duplicates, searched for once."""
        return comparable_pairs(self.inspection)

    def check(self, *, folds: Folds | None = None, n_folds: int | None = None, strict: bool = False) -> DataReport:
        """:func:`check_manifest` without reading an image again."""
        return report_on(self.manifest, self.inspection, self.pairs, folds=folds, n_folds=n_folds, strict=strict)


def read_manifest(path: str | os.PathLike[str], *, lenient: bool = False) -> Manifest:
    """Read a manifest CSV, or a folder with one subfolder a class; no image is opened.

    Lines that agree in path, label and patient are one record with several boxes. In a folder every image
    counts as a patient of its own, named by its path, since a folder knows no patients.

    Raises
    ------
    DataError
        If there is no usable table. Also if single lines cannot be used or contradict each other, all of
        them in one message, unless ``lenient``: then those lines are left out and are errors of the report.
    """
    path = Path(path)
    manifest = _read_folder(path) if path.is_dir() else _read_csv(path)
    if not lenient:
        report = DataReport(str(path), tuple(i for i in manifest.issues if i.severity == "error"), ())
        report.raise_if_errors()
    return manifest


def prepare(
    manifest: Manifest,
    spec: PreprocessingSpec,
    *,
    with_lungs: bool = False,
    workers: int | None = None,
    progress: Progress | None = None,
) -> Prepared:
    """Decode every image once, in ``workers`` threads: standardize it, hash it, judge it. Raises nothing.

    ``progress`` is called with (done, total) from the calling thread. ``with_lungs`` needs a ``spec`` that
    looks for them.
    """
    images = np.zeros((len(manifest.records), spec.size, spec.size), np.uint8)
    lungs = np.zeros_like(images) if with_lungs else None
    return Prepared(manifest, images, _inspect(manifest, workers, progress, (spec, images, lungs)), lungs)


def check_manifest(
    manifest: Manifest,
    *,
    folds: Folds | None = None,
    n_folds: int | None = 5,
    strict: bool = False,
    workers: int | None = None,
    progress: Progress | None = None,
) -> DataReport:
    """Read every image and report all that is wrong; kinds and severities: :mod:`magsd.data_checks`.

    With ``folds`` leaks across them are looked for; without, whether ``n_folds`` could be made. With
    ``strict`` every warning is an error. Raises nothing: see :meth:`DataReport.raise_if_errors`.
    """
    inspection = _inspect(manifest, workers, progress, None)
    pairs = comparable_pairs(inspection)
    return report_on(manifest, inspection, pairs, folds=folds, n_folds=n_folds, strict=strict)


def load_standardized(
    records: Sequence[Record],
    spec: PreprocessingSpec,
    *,
    workers: int | None = None,
    progress: Progress | None = None,
) -> NDArray[np.uint8]:
    """Standardized images of ``records``, in their order: uint8 (N, S, S), 0 black to 255 white.

    Raises
    ------
    DataError
        If images cannot be read: how many, and why the first ones.
    """
    images = np.zeros((len(records), spec.size, spec.size), np.uint8)

    def read(index: int) -> str | None:
        try:
            images[index] = standardize(read_radiograph(records[index].path).pixels, spec)
        except ImageError as error:
            return str(error)
        return None

    failed = [text for text in _in_threads(read, len(records), workers, progress) if text is not None]
    if failed:
        raise DataError(f"{counted(len(failed), 'image')} cannot be read: {'; '.join(failed[:3])}")
    return images


def _inspect(
    manifest: Manifest,
    workers: int | None,
    progress: Progress | None,
    wanted: tuple[PreprocessingSpec, NDArray[np.uint8], NDArray[np.uint8] | None] | None,
) -> Inspection:
    """Read all images; fill the arrays of ``wanted``, images and lungs uint8 (N, S, S), where they are given."""
    count = len(manifest.records)
    hashes, mirrored = np.zeros((count, 4), np.uint64), np.zeros((count, 4), np.uint64)
    comparable = np.zeros(count, np.bool_)

    def read(index: int) -> list[Problem]:
        record = manifest.records[index]
        name = manifest.name_of(record)
        try:
            radiograph = read_radiograph(record.path)
        except ImageError as error:
            there = os.path.lexists(record.path)
            return [Problem("unreadable", str(error)) if there else Problem("missing", name)]
        hashes[index], mirrored[index] = difference_hash(radiograph.pixels)
        comparable[index] = has_contrast(radiograph)
        if wanted is not None:
            spec, images, lungs = wanted
            framing = frame(radiograph.pixels, spec)
            images[index] = standardize(radiograph.pixels, spec, framing)
            if lungs is not None:
                lungs[index] = np.rint(255 * lungs_in_square(framing, spec))
        problems = [] if comparable[index] else [Problem("blank", name)]
        problems += _box_problems(name, record.boxes, radiograph.width, radiograph.height)
        if record.mask is not None:
            problems += _mask_problems(name, record.mask, radiograph.width, radiograph.height)
        return problems

    problems = [problem for part in _in_threads(read, count, workers, progress) for problem in part]
    return Inspection(hashes, mirrored, comparable, tuple(problems))


def _in_threads(function: Callable[[int], _T], count: int, workers: int | None, progress: Progress | None) -> list[_T]:
    """``[function(0), ..., function(count - 1)]``; decoding and OpenCV release the interpreter's lock."""
    results: dict[int, _T] = {}
    pool = ThreadPoolExecutor(workers or min(32, os.cpu_count() or 1))
    try:
        index_of = {pool.submit(function, index): index for index in range(count)}
        for done, future in enumerate(as_completed(index_of), start=1):
            results[index_of[future]] = future.result()
            if progress is not None:
                progress(done, count)
    finally:
        pool.shutdown(cancel_futures=True)  # on an interrupt, nothing more is begun
    return [results[index] for index in range(count)]


def _box_problems(name: str, boxes: tuple[Box, ...], width: int, height: int) -> Iterator[Problem]:
    for x, y, w, h in boxes:
        text = f"{name}: box {x:g},{y:g},{w:g},{h:g} in {width} x {height} pixels"
        if min(x + w, width) - max(x, 0) < 1 or min(y + h, height) - max(y, 0) < 1:
            yield Problem("box-outside", text)
        elif x < 0 or y < 0 or x + w > width or y + h > height:
            yield Problem("box-partly-outside", text)


def _mask_problems(name: str, mask: Path, width: int, height: int) -> list[Problem]:
    try:
        drawn = read_radiograph(mask)
    except ImageError as error:
        return [Problem("mask", f"{name}: {error}")]
    if (drawn.width, drawn.height) != (width, height):
        sizes = f"{drawn.width} x {drawn.height}, the image {width} x {height} pixels"
        return [Problem("mask", f"{name}: mask {mask.name} is {sizes}")]
    return [] if drawn.pixels.any() else [Problem("mask", f"{name}: mask {mask.name} is empty")]


def _read_folder(folder: Path) -> Manifest:
    """One subfolder a class; images lie at any depth below it."""
    try:
        classes = sorted(child for child in folder.iterdir() if child.is_dir() and child.name[0] != ".")
    except OSError as error:
        raise DataError(f"{folder}: cannot be listed ({error.strerror})") from error
    found = {child: find_images([str(child)]) for child in classes}
    records = [
        Record(path, child.name, path.relative_to(folder).as_posix()) for child in classes for path in found[child]
    ]
    if not records:
        raise DataError(f"{folder}: has no subfolder with images, expected one subfolder a class")
    message = "a folder knows no patients: every image counts as one (a manifest CSV can name them)"
    issues = [Issue("no-patients", "warning", message)]
    if empty := [child.name for child in classes if not found[child]]:
        message = f"{counted(len(empty), 'subfolder')} without images"
        issues.append(make_issue("empty-class", "warning", message, empty))
    records.sort(key=lambda record: record.path.as_posix())
    return Manifest(folder, tuple(records), folder, tuple(issues))


def _read_csv(path: Path) -> Manifest:
    issues: dict[str, list[str]] = defaultdict(list)
    merged: dict[str, tuple[int, Record]] = {}
    for line in read_lines(path):
        if isinstance(line, str):
            issues["line"].append(line)
            continue
        record = Record(
            path.parent / line.path, line.label, line.patient, line.source,
            (line.box,) if line.box else (), path.parent / line.mask if line.mask else None,
        )  # fmt: skip
        key = os.path.abspath(record.path)
        if key not in merged:
            merged[key] = (line.number, record)
            continue
        first_line, first = merged[key]
        place = f"line {line.number}: {line.path}"
        if record.label != first.label:
            issues["two-labels"].append(f"{place} is {record.label}, line {first_line} said {first.label}")
        elif different := _disagreement(first, record):
            issues["contradiction"].append(f"{place}: line {first_line} has another {different}")
        elif record == first or (record.boxes and set(record.boxes) <= set(first.boxes)):
            issues["duplicate-line"].append(f"{place} as in line {first_line}")
        else:
            whole = replace(
                first,
                source=first.source or record.source,
                mask=first.mask or record.mask,
                boxes=first.boxes + record.boxes,
            )
            merged[key] = (first_line, whole)
    found = tuple(
        make_issue(code, "error", message.format(n=counted(len(issues[code]), "line")), issues[code])
        for code, message in _LINE_ISSUES.items()
        if code in issues
    )
    if not merged:
        DataReport(str(path), found, ()).raise_if_errors()
        raise DataError(f"{path}: has a header and no line of data")
    records = sorted((record for _, record in merged.values()), key=lambda record: record.path.as_posix())
    return Manifest(path.parent, tuple(records), path, found)


_LINE_ISSUES = {
    "line": "{n} that cannot be used",
    "two-labels": "{n} giving an image a second label",
    "contradiction": "{n} contradicting an earlier one",
    "duplicate-line": "{n} given twice",
}


def _disagreement(one: Record, other: Record) -> str | None:
    """The first column, path and label aside, in which two lines of one image contradict each other."""
    if one.patient != other.patient:
        return f"patient, {one.patient} instead of {other.patient}"
    if one.source and other.source and one.source != other.source:
        return f"source, {one.source} instead of {other.source}"
    return "mask" if one.mask and other.mask and one.mask != other.mask else None

"""What the builders share: one row of a manifest, tables whose columns are checked, images found by name."""

from __future__ import annotations

import csv
import io
import os
from collections import Counter, defaultdict
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, field, replace
from itertools import zip_longest
from pathlib import Path

from magsd_runtime.errors import DataError
from magsd_runtime.files import sha256_file, write_text

COLUMNS = ("path", "label", "patient", "source", "x", "y", "w", "h", "mask", "view", "age", "sex", "finding")
LABELS = ("covid19", "viral_pneumonia", "bacterial_pneumonia", "pneumonia", "healthy")
IMAGES = frozenset({".png", ".jpg", ".jpeg", ".dcm", ".tif", ".tiff"})

Box = tuple[float, float, float, float]


@dataclass(frozen=True)
class Row:
    """One image: ``boxes`` (x, y, w, h) in pixels of its file; ``finding`` in the collection's own words."""

    path: Path
    label: str
    patient: str
    source: str
    boxes: tuple[Box, ...] = ()
    view: str = ""
    age: str = ""
    sex: str = ""
    finding: str = ""
    mask: Path | None = None

    @property
    def drawn(self) -> bool:
        """Whether somebody drew on it where the disease is."""
        return bool(self.boxes) or self.mask is not None


@dataclass
class Collected:
    """``rows``, how many entries were left out for which reason, and which label names were not known."""

    rows: list[Row] = field(default_factory=list)
    left_out: Counter[str] = field(default_factory=Counter)
    unknown: Counter[str] = field(default_factory=Counter)
    notes: list[str] = field(default_factory=list)

    def once(self) -> Collected:
        """The same with every image in one row: entries that say the same are one, entries that do not are none."""
        by_path: dict[Path, list[Row]] = defaultdict(list)
        for row in self.rows:
            by_path[row.path].append(row)
        left_out, rows = Counter(self.left_out), []
        for same in by_path.values():
            if len({(row.label, row.patient) for row in same}) > 1:
                left_out["named twice, with two labels or patients"] += len(same)
                continue
            rows.append(same[0])
            if len(same) > 1:
                left_out["named twice"] += len(same) - 1
        return replace(self, rows=rows, left_out=left_out)


def read_table(path: Path, columns: Sequence[str], *, encoding: str = "utf-8-sig") -> list[dict[str, str]]:
    """The lines of a CSV table, values stripped, keys as in its header but for case and blanks around them.

    A line that ends early has empty values. ``encoding``: what the collection's table is written in.

    Raises
    ------
    DataError
        If there is no such file, it is no CSV in ``encoding``, or one of ``columns`` is not in its header.
    """
    try:
        text = path.read_bytes().decode(encoding)
    except FileNotFoundError as error:
        raise DataError(f"{path}: no such file; the collection's own table belongs there") from error
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror})") from error
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: cannot be read as UTF-8 text ({error})") from error
    try:
        reader = csv.reader(io.StringIO(text, newline=""))
        header = [name.strip().lower() for name in next((cells for cells in reader if any(cells)), [])]
        missing = [name for name in columns if name.lower() not in header]
        if missing:
            hint = ", it was saved with semicolons for commas" if len(header) == 1 and ";" in header[0] else ""
            raise DataError(
                f"{path}: has no column {missing[0]!r}; its columns are {', '.join(header) or 'none'}{hint}"
            )
        return [
            dict(zip_longest(header, (cell.strip() for cell in cells[: len(header)]), fillvalue=""))
            for cells in reader
            if any(map(str.strip, cells))
        ]
    except csv.Error as error:
        raise DataError(f"{path}: is no CSV table ({error})") from error


def list_images(folder: Path, *, but: Collection[str] = ()) -> list[Path]:
    """Every image under ``folder``, sorted; hidden folders, and those named in ``but`` (lower case), are passed by.

    Raises
    ------
    DataError
        If there is no such folder, or no image in it.
    """
    if not folder.is_dir():
        raise DataError(f"{folder}: no such folder")
    found, entered = [], set[str]()
    # linked folders too, as large collections are often put elsewhere; each once
    for place, folders, names in os.walk(folder, followlinks=True):
        real = os.path.realpath(place)
        folders[:] = [] if real in entered else [n for n in folders if n[0] != "." and n.lower() not in but]
        if real not in entered:
            found += [Path(place, name) for name in names if name[0] != "." and Path(name).suffix.lower() in IMAGES]
        entered.add(real)
    found.sort()
    if not found:
        raise DataError(f"{folder}: holds no PNG, JPEG, TIFF or DICOM image")
    return found


def find_images(folder: Path, *, but: Collection[str] = ()) -> dict[str, Path]:
    """The images of :func:`list_images` by file name; of several copies of one file the first.

    Raises
    ------
    DataError
        As :func:`list_images`, and if two different files have one name: a table that calls its images by name
        does not say which is meant.
    """
    found: dict[str, Path] = {}
    for path in list_images(folder, but=but):
        first = found.setdefault(path.name, path)
        if first is not path and not same_content(first, path):
            raise DataError(
                f"{first} and {path} are different images of one name, and the collection calls images by name: "
                "leave only one of them in the folder"
            )
    return found


def same_content(one: Path, other: Path) -> bool:
    """Whether two files hold the same bytes."""
    return one.stat().st_size == other.stat().st_size and sha256_file(one) == sha256_file(other)


def write_manifest(path: Path, rows: Iterable[Row]) -> None:
    """Write ``rows`` sorted by path, a line a box; paths relative to the manifest, with forward slashes."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(COLUMNS)
    named = ((relative(row.path, path.parent), row) for row in rows)
    for name, row in sorted(named, key=lambda each: each[0]):
        mask = "" if row.mask is None else relative(row.mask, path.parent)
        for box in row.boxes or (None,):
            place = [""] * 4 if box is None else [f"{value:g}" for value in box]
            facts = (row.view, row.age, row.sex, row.finding)
            writer.writerow([name, row.label, row.patient, row.source, *place, mask, *facts])
    write_text(path, out.getvalue())


def relative(path: Path, folder: Path) -> str:
    return Path(os.path.relpath(path.resolve(), folder.resolve())).as_posix()


def read_rows(path: Path) -> list[Row]:
    """A manifest that :func:`write_manifest` wrote, or any other that ``magsd train`` reads.

    Raises
    ------
    DataError
        If it is none, or a label is none of :data:`LABELS`.
    """
    from ..data import read_manifest

    if path.is_dir():
        raise DataError(f"{path}: is a folder; a manifest is wanted, which says of which patient an image is")
    records = read_manifest(path).records
    if unknown := sorted({record.label for record in records} - set(LABELS)):
        raise DataError(f"{path}: label {unknown[0]!r} is not known here; known are {', '.join(LABELS)}")
    kept = ("view", "age", "sex", "finding")
    lines = {os.path.abspath(path.parent / line["path"]): line for line in read_table(path, ("path",))}
    return [
        Row(
            record.path, record.label, record.patient, record.source, record.boxes, mask=record.mask,
            **{name: lines[os.path.abspath(record.path)].get(name, "") for name in kept},
        )
        for record in records
    ]  # fmt: skip

"""What the builders share: one row of a manifest, tables whose columns are checked, images found by name."""

from __future__ import annotations

import csv
import io
import os
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from magsd_runtime.errors import DataError
from magsd_runtime.files import write_text

COLUMNS = ("path", "label", "patient", "source", "x", "y", "w", "h", "mask", "view", "age", "sex", "finding")
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


@dataclass
class Collected:
    """``rows``, and how many entries were left out for which reason."""

    rows: list[Row] = field(default_factory=list)
    left_out: Counter[str] = field(default_factory=Counter)
    notes: list[str] = field(default_factory=list)


def read_table(path: Path, columns: Sequence[str]) -> list[dict[str, str]]:
    """The lines of a CSV table, values stripped, keys as in its header but for case and blanks around them.

    Raises
    ------
    DataError
        If there is no such file, it is no UTF-8 CSV, or one of ``columns`` is not in its header.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")
    except FileNotFoundError as error:
        raise DataError(f"{path}: no such file; the collection's own table belongs there") from error
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: cannot be read as UTF-8 text ({error})") from error
    try:
        reader = csv.reader(io.StringIO(text, newline=""))
        header = [name.strip().lower() for name in next(reader, [])]
        missing = [name for name in columns if name.lower() not in header]
        if missing:
            raise DataError(f"{path}: has no column {missing[0]!r}; its columns are {', '.join(header) or 'none'}")
        return [dict(zip(header, (cell.strip() for cell in cells))) for cells in reader if any(map(str.strip, cells))]
    except csv.Error as error:
        raise DataError(f"{path}: is no CSV table ({error})") from error


def find_images(folder: Path) -> dict[str, Path]:
    """Every image under ``folder`` by its file name; of two with one name the first in the order of paths.

    Raises
    ------
    DataError
        If there is no such folder, or no image in it.
    """
    if not folder.is_dir():
        raise DataError(f"{folder}: no such folder")
    found: dict[str, Path] = {}
    for path in sorted(folder.rglob("*")):
        if path.suffix.lower() in IMAGES and not path.name.startswith("."):
            found.setdefault(path.name, path)
    if not found:
        raise DataError(f"{folder}: holds no PNG, JPEG, TIFF or DICOM image")
    return found


def write_manifest(path: Path, rows: Iterable[Row]) -> None:
    """Write ``rows`` sorted by path, a line a box; paths relative to the manifest, with forward slashes."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(COLUMNS)
    for name, row in sorted((relative(row.path, path.parent), row) for row in rows):
        for box in row.boxes or (None,):
            place = [""] * 4 if box is None else [f"{value:g}" for value in box]
            facts = (row.view, row.age, row.sex, row.finding)
            writer.writerow([name, row.label, row.patient, row.source, *place, "", *facts])
    write_text(path, out.getvalue())


def relative(path: Path, folder: Path) -> str:
    return Path(os.path.relpath(path.resolve(), folder.resolve())).as_posix()


def read_rows(path: Path) -> list[Row]:
    """A manifest that :func:`write_manifest` wrote, or any other with path, label and patient.

    Raises
    ------
    DataError
        If it is none, or a box in it is none.
    """
    found: dict[Path, Row] = {}
    for number, line in enumerate(read_table(path, ("path", "label", "patient")), 2):
        image = path.parent / line["path"]
        place = [line.get(name, "") for name in "xywh"]
        boxes = () if image not in found else found[image].boxes
        if any(place):
            try:
                x, y, w, h = (float(value) for value in place)
            except ValueError as error:
                raise DataError(f"{path}: line {number}: {','.join(place)} is no box of four numbers") from error
            boxes = (*boxes, (x, y, w, h))
        facts = {name: line.get(name, "") for name in ("source", "view", "age", "sex", "finding")}
        found[image] = Row(image, line["label"], line["patient"], boxes=boxes, **facts)
    return list(found.values())

"""The lines of a manifest CSV, as text only: which can be used, and what is wrong with the others.

Byte order mark, CRLF, quoted commas, blank lines, blanks around values, other columns, any order of columns
and any case of their names are fine. The encoding is UTF-8.
"""

from __future__ import annotations

import csv
import hashlib
import io
import json
import math
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from .errors import DataError

REQUIRED = ("path", "label", "patient")
OPTIONAL = ("source", "x", "y", "w", "h", "mask")

Box = tuple[float, float, float, float]


@dataclass(frozen=True)
class Line:
    """One line of the table; ``path`` and ``mask`` as written, ``box`` (x, y, w, h) or None."""

    number: int
    path: str
    label: str
    patient: str
    source: str
    box: Box | None
    mask: str


def read_lines(path: Path) -> Iterator[Line | str]:
    """Each line of the table ``path`` that is not blank; for one that cannot be used, what is wrong with it.

    Raises
    ------
    DataError
        If the file is no UTF-8 CSV table, or its header lacks a column.
    """
    table = csv.reader(io.StringIO(_text(path), newline=""), strict=True)
    try:
        header = next((cells for cells in table if any(cell.strip() for cell in cells)), None)
        if header is None:
            example = ",".join(REQUIRED)
            raise DataError(f"{path}: is empty, expected a header {example} and a line for each image")
        columns = _columns(path, [name.strip().lower() for name in header])
        for cells in table:
            if not any(cell.strip() for cell in cells):
                continue
            try:
                line = _line(table.line_num, columns, cells, len(header))
            except ValueError as error:
                yield f"line {table.line_num}: {error}"
            else:
                yield line
    except csv.Error as error:
        raise DataError(f"{path}: line {table.line_num} is no CSV ({error}): check its quotes") from error


def digest(root: Path, images: Iterable[Sequence[Line]]) -> str:
    """SHA-256 of a manifest's text, whatever the order of its lines and the place of its folder ``root``.

    ``images`` holds the lines of each image. The images' pixels take no part.
    """

    def name(text: str) -> str:
        return Path(os.path.relpath(root / text, root)).as_posix()

    rows = [
        [
            name(lines[0].path), lines[0].label, lines[0].patient,
            next((line.source for line in lines if line.source), ""),
            [line.box for line in lines if line.box],
            next((name(line.mask) for line in lines if line.mask), None),
        ]
        for lines in images
    ]  # fmt: skip
    return hashlib.sha256(json.dumps(sorted(rows, key=json.dumps)).encode()).hexdigest()


def _text(path: Path) -> str:
    try:
        content = path.read_bytes()
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else str(error)
        raise DataError(f"{path}: cannot be read ({reason}), expected a manifest CSV or a folder of classes") from error
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise DataError(
            f"{path}: not UTF-8 text (byte 0x{content[error.start]:02x} in line {line}): save it as CSV UTF-8"
        ) from error


def _columns(path: Path, header: list[str]) -> dict[str, int]:
    """Position of each known column."""
    known = [name for name in header if name in REQUIRED or name in OPTIONAL]
    missing = [name for name in REQUIRED if name not in header]
    boxes = [name for name in "xywh" if name in header]
    problem = None
    if missing:
        problem = f"lacks {', '.join(missing)}"
    elif len(set(known)) < len(known):
        problem = f"names {', '.join(sorted({name for name in known if known.count(name) > 1}))} twice"
    elif boxes and len(boxes) < 4:
        problem = f"has {', '.join(boxes)} of the box only"
    if problem:
        shown = ", ".join(header)[:200]
        if not shown.isprintable():
            shown = ascii(shown)
        raise DataError(
            f"{path}: the header {problem}: found {shown}; expected {', '.join(REQUIRED)} and optionally "
            f"{', '.join(OPTIONAL)}, with commas between them"
        )
    return {name: header.index(name) for name in known}


def _line(number: int, columns: dict[str, int], cells: list[str], width: int) -> Line:
    """One line's values. Raises ValueError with what is wrong."""
    if any(cell.strip() for cell in cells[width:]):
        raise ValueError(f"{len(cells)} cells, the header has {width}: quote cells that contain a comma")
    values = {name: cells[at].strip() if at < len(cells) else "" for name, at in columns.items()}
    for name in REQUIRED:
        if not values[name]:
            raise ValueError(f"no {name}")
    for name, value in values.items():
        if any(ord(character) < 32 or ord(character) == 127 for character in value):
            raise ValueError(f"{name} has a control character: {value[:60]!r}")
    text = {name: values.get(name, "") for name in ("source", "mask")}
    box = _box([values.get(name, "") for name in "xywh"])
    return Line(number, values["path"], values["label"], values["patient"], text["source"], box, text["mask"])


def _box(texts: list[str]) -> Box | None:
    if not any(texts):
        return None
    shown = ",".join(texts)[:60]
    try:
        x, y, w, h = (float(text) for text in texts)
    except ValueError:
        raise ValueError(f"box {shown} is not four numbers") from None
    if not all(map(math.isfinite, (x, y, w, h))) or w <= 0 or h <= 0:
        raise ValueError(f"box {shown} has no area")
    return x, y, w, h

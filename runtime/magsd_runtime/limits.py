"""What reading a file may cost, whatever it declares: checked on its structure before a decoder believes it.

Sizes of pictures are bounded in :mod:`images` and :mod:`dicom.pixels`. Here is the rest of what lets a small file take
minutes or gigabytes: millions of empty chunks or elements, notes of hundreds of megabytes, a tile far larger than its
picture, a progressive JPEG that goes over the whole picture again and again. docs/hostile-files.md has the list.
"""

from __future__ import annotations

import io
import os
import struct
from typing import IO, Any

from .errors import ImageError

MAX_READS = 200_000
"""Pieces that a file may be read in: chunks, segments, elements. The largest file has 32,768 PNG chunks of 8 KiB."""

MAX_NOTES = 4 << 20
"""Bytes of a picture file beside the picture: colour profiles, EXIF, texts, offsets of strips and tiles."""

MAX_PASSES = 1_000_000_000
"""Pixels times scans of a progressive JPEG: 12 scans of the largest picture, 100 of 10 million pixels. A usual encoder
makes 6 to 10; each takes a decoder about 1 ns a pixel."""

MAX_TIFF_ENTRIES = 4096
# Bytes of a value of each type that is a whole number: TIFF 6.0, section 2, and BigTIFF
_TIFF_SIZES = {1: 1, 2: 1, 3: 2, 4: 4, 6: 1, 7: 1, 8: 2, 9: 4, 13: 4, 16: 8, 17: 8, 18: 8}
_TIFF_NUMBERS = (3, 4, 13, 16)
_OTHER_VALUES = 1000


class Meter:
    """Counts ``read`` calls, and the bytes of the header; mixed into a file class.

    Raises ImageError, which begins with ``name``, beyond :data:`MAX_READS` reads, or beyond :data:`MAX_NOTES` bytes
    while ``in_header``.
    """

    name_in_messages = ""
    in_header = False
    size = 0
    _reads = 0
    _header_bytes = 0

    def read(self, size: int | None = -1, /) -> bytes:
        self._reads += 1
        if self._reads > MAX_READS:
            raise ImageError(
                f"{self.name_in_messages}: is made of more than {MAX_READS:,} pieces, which no film is: export it again"
            )
        reader: Any = super()
        if size is not None:
            size = min(size, self.size)  # room is taken for all that is asked for, and a length may say 4 GB
        if not self.in_header:
            return reader.read(size)
        left = MAX_NOTES - self._header_bytes
        found = reader.read(left + 1 if size is None or size < 0 else min(size, left + 1))
        self._header_bytes += len(found)
        if len(found) > left:
            raise too_many_notes(self.name_in_messages)
        return found


class MeteredFile(Meter, io.BufferedReader):
    """A file on the disk."""

    def __init__(self, path: str | os.PathLike[str], name: str) -> None:
        super().__init__(io.FileIO(path))
        self.name_in_messages, self.size = name, os.fstat(self.fileno()).st_size


class MeteredBytes(Meter, io.BytesIO):
    """Bytes in memory."""

    def __init__(self, content: bytes, name: str) -> None:
        super().__init__(content)
        self.name_in_messages, self.size = name, len(content)


def too_many_notes(name: str) -> ImageError:
    return ImageError(
        f"{name}: holds more than {MAX_NOTES >> 20} MiB beside its picture (profiles, texts, layers): "
        "save the picture alone"
    )


def check_png(file: IO[bytes], name: str) -> None:
    """Chunks other than pixels (W3C PNG, 5.3) must stay below :data:`MAX_NOTES` in all. Rewinds."""
    end, at, notes = file.seek(0, os.SEEK_END), 8, 0
    while at + 8 <= end:
        file.seek(at)
        head = file.read(8)
        length = int.from_bytes(head[:4], "big")
        if head[4:] not in (b"IDAT", b"fdAT"):
            notes += min(length, end - at)
            if notes > MAX_NOTES:
                raise too_many_notes(name)
        at += 12 + length
    file.seek(0)


def count_scans(file: IO[bytes]) -> int:
    """Start-of-scan markers (T.81, B.2.3), those of thumbnails included. Rewinds."""
    file.seek(0)
    found, last = 0, b""
    while block := file.read(1 << 20):
        found += (last + block).count(b"\xff\xda")
        last = block[-1:]  # a marker may lie across two blocks; one byte of it is never a whole one
    file.seek(0)
    return found


def check_passes(scans: int, width: int, height: int, name: str) -> None:
    """Raises ImageError if a JPEG goes over its pixels more often than :data:`MAX_PASSES` allows."""
    if scans * width * height > MAX_PASSES:
        raise ImageError(
            f"{name}: is a JPEG of {width:,} x {height:,} pixels in {scans:,} scans, at most "
            f"{max(1, MAX_PASSES // (width * height)):,} are read for this size: save it as a usual JPEG or as PNG"
        )


def check_tiff(file: IO[bytes], name: str) -> None:
    """The first directory (TIFF 6.0, section 2): entries, values of an entry, and the size of a tile. Rewinds.

    A tile may be larger than its picture, for writers have a fixed size, but not without bounds: it is decoded whole.
    """
    entries = _tiff_entries(file, name)
    file.seek(0)
    for tag, kind, count, _ in entries:
        if kind in _TIFF_NUMBERS:
            too_many = count * _TIFF_SIZES[kind] > MAX_NOTES
        else:
            too_many = count > (MAX_NOTES if _TIFF_SIZES.get(kind) == 1 else _OTHER_VALUES)
        if too_many:
            raise ImageError(f"{name}: its TIFF entry {tag} has {count:,} values, which no film has: export it again")

    def values(wanted: int) -> list[int]:
        return [value for tag, _, _, value in entries if tag == wanted] or [0]

    # Of several entries of one tag a library may take any
    width, height, tile_width, tile_height = min(values(256)), min(values(257)), max(values(322)), max(values(323))
    if tile_width * tile_height > max(width, 2048) * max(height, 2048):
        raise ImageError(
            f"{name}: has tiles of {tile_width:,} x {tile_height:,} pixels for {width:,} x {height:,}, "
            "which no film has: export it again"
        )


def _tiff_entries(file: IO[bytes], name: str) -> list[tuple[int, int, int, int]]:
    """Tag, type, number of values, and the first value (2**63 where it lies elsewhere); without what is cut short."""
    size_of_file = file.seek(0, os.SEEK_END)
    file.seek(0)
    head = file.read(16).ljust(16, b"\0")
    order = "<" if head[:2] == b"II" else ">"
    big = 43 in head[2:4]
    start = struct.unpack(order + ("Q" if big else "I"), head[8:16] if big else head[4:8])[0]
    if start >= size_of_file:  # far beyond it, seeking itself fails
        return []
    file.seek(start)
    counted = file.read(8 if big else 2)
    if len(counted) < (8 if big else 2):
        return []
    (number,) = struct.unpack(order + ("Q" if big else "H"), counted)
    if number > MAX_TIFF_ENTRIES:
        raise ImageError(f"{name}: its TIFF directory declares {number:,} entries, which no film has: export it again")
    layout = struct.Struct(order + ("HHQ8s" if big else "HHI4s"))
    table = file.read(number * layout.size)
    found = []
    for at in range(0, len(table) - layout.size + 1, layout.size):
        tag, kind, count, field = layout.unpack_from(table, at)
        size = _TIFF_SIZES.get(kind, 0)
        value = int.from_bytes(field[:size], "little" if order == "<" else "big")
        found.append((tag, kind, count, value if size * count <= len(field) else 1 << 63))
    return found

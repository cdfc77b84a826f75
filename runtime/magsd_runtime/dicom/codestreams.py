"""What a compressed picture says of its own size, read before anything is decoded.

A decoder believes the codestream and not the DICOM header, and takes memory for what is declared there.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

# Start of frame: JPEG without the hierarchical and arithmetic ones of other uses, and JPEG-LS (T.81, B.1; T.87, C.1)
_FRAMES = frozenset({*range(0xC0, 0xD0), 0xF7} - {0xC4, 0xC8, 0xCC})
_STANDALONE = frozenset({0x01, *range(0xD0, 0xD9)})
MAX_RUNS = 6_000_000
"""Runs of RLE data: pydicom unpacks them one by one, some million in a second. A film of 40 million pixels may have
runs of 13 bytes on average; noise has longer ones, for what does not repeat is one run of up to 128 bytes."""

MAX_FRAGMENTS = 20_000
"""Pieces that a compressed picture may be cut into: 13 KiB each in the largest file; usual are one or 64 KiB each."""

_END = b"\xff\xd9"  # both of JPEG and of JPEG 2000


@dataclass(frozen=True)
class Codestream:
    """Size in pixels, components of a pixel, bits of the first component."""

    width: int
    height: int
    components: int
    precision: int


def read_jpeg(frame: bytes) -> Codestream | None:
    """The first frame header of a JPEG or JPEG-LS codestream (ISO/IEC 10918-1, B.2.2); None where there is none."""
    if frame[:2] != b"\xff\xd8":
        return None
    at = 2
    while at + 10 <= len(frame):
        if frame[at] != 0xFF:
            return None
        marker = frame[at + 1]
        if marker == 0xFF:  # fill bytes may come before any marker
            at += 1
        elif marker in _STANDALONE:
            at += 2
        elif marker in _FRAMES:
            height, width = int.from_bytes(frame[at + 5 : at + 7], "big"), int.from_bytes(frame[at + 7 : at + 9], "big")
            return Codestream(width, height, frame[at + 9], frame[at + 4])
        else:
            at += 2 + max(2, int.from_bytes(frame[at + 2 : at + 4], "big"))
    return None


def read_jpeg_2000(frame: bytes) -> Codestream | None:
    """The SIZ segment of a JPEG 2000 codestream (ISO/IEC 15444-1, A.5.1); None where it does not begin with one.

    PS3.5, A.4.4, wants the bare codestream: a JP2 file in its place is not looked into.
    """
    if frame[:4] != b"\xff\x4f\xff\x51" or len(frame) < 43:
        return None
    right, bottom, left, top = (int.from_bytes(frame[at : at + 4], "big") for at in (8, 12, 16, 20))
    components = int.from_bytes(frame[40:42], "big")
    return Codestream(right - left, bottom - top, components, (frame[42] & 0x7F) + 1)


def is_complete(frame: bytes) -> bool:
    """Whether the end marker is there: some decoders fill what is missing with grey and say nothing."""
    return _END in frame[-64:]


def fragments(data: bytes, enough: int) -> int:
    """Items of encapsulated pixel data (PS3.5, A.4), the offset table included; counted to ``enough``."""
    at = count = 0
    while at + 8 <= len(data) and count < enough:
        at += 8 + int.from_bytes(data[at + 4 : at + 8], "little")
        count += 1
    return count


def rle_is_bounded(frame: bytes, segment_bytes: int) -> bool:
    """Whether each segment of an RLE frame (PS3.5, annex G) unpacks to about ``segment_bytes``, not to far more, and
    all of them from no more than :data:`MAX_RUNS` runs."""
    count = int.from_bytes(frame[:4], "little")
    if not 1 <= count <= 15 or len(frame) < 64:
        return False
    starts = [int.from_bytes(frame[at : at + 4], "little") for at in range(4, 4 + 4 * count, 4)]
    runs = 0
    for start, end in pairwise([*starts, len(frame)]):
        total, more = _unpacked(frame[start:end], 2 * segment_bytes, MAX_RUNS - runs)
        runs += more
        if total > 2 * segment_bytes or runs >= MAX_RUNS:
            return False
    return True


def _unpacked(segment: bytes, enough: int, most_runs: int) -> tuple[int, int]:
    """Bytes that a segment unpacks to, and its runs; counted to ``enough`` or ``most_runs``."""
    at = total = runs = 0
    while at < len(segment) and total <= enough and runs < most_runs:
        runs += 1
        header = segment[at]
        if header < 128:  # header + 1 literal bytes
            total, at = total + header + 1, at + header + 2
        elif header > 128:  # the next byte 257 - header times
            total, at = total + 257 - header, at + 2
        else:
            at += 1
    return total, runs

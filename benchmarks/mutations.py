"""Changes to a file's bytes: blind ones, and ones that know PNG chunks, JPEG segments, TIFF entries and DICOM elements.

Each is a function (bytes, generator) -> bytes, and the same generator gives the same bytes. :func:`mutated` draws one
to four of them, mostly of the file's own kind.
"""

from __future__ import annotations

import io
import struct
import zlib
from collections.abc import Callable
from typing import Any

import numpy as np

from mutation_seeds import chunk, item

Rng = np.random.Generator
Mutation = Callable[[bytes, Rng], bytes]

EXTREMES = (0, 1, 2, 3, 7, 8, 9, 12, 15, 16, 17, 32, 63, 64, 127, 128, 255, 256, 4095, 8191, 32767, 32768, 65534, 65535)
LARGE = (65536, 1 << 20, (1 << 28) - 1, 1 << 28, (1 << 31) - 1, 1 << 31, (1 << 32) - 2, (1 << 32) - 1)


def pick(rng: Rng, choices: Any) -> Any:
    return choices[int(rng.integers(len(choices)))]


def extreme(rng: Rng, size: int) -> int:
    """A number that programmers forget, below ``256**size``."""
    number = pick(rng, EXTREMES if size < 4 or rng.random() < 0.5 else LARGE)
    return number % 256**size


def place(rng: Rng, length: int, head: float = 0.5) -> int:
    """An offset below ``length``, with probability ``head`` within the first 600: headers steer the decoders."""
    return int(rng.integers(max(1, min(length, 600) if rng.random() < head else length)))


# --- blind ---


def flip_bits(data: bytes, rng: Rng) -> bytes:
    changed = bytearray(data)
    for _ in range(int(rng.integers(1, 9)) if data else 0):
        changed[place(rng, len(data))] ^= 1 << int(rng.integers(8))
    return bytes(changed)


def fill_run(data: bytes, rng: Rng) -> bytes:
    at, length = place(rng, len(data)), int(rng.integers(1, 65))
    run = pick(rng, (bytes(length), b"\xff" * length, rng.bytes(length)))
    return data[:at] + run + data[at + length :]


def truncate(data: bytes, rng: Rng) -> bytes:
    return data[: place(rng, len(data), 0.3)]


def insert(data: bytes, rng: Rng) -> bytes:
    at = place(rng, len(data))
    return data[:at] + rng.bytes(int(rng.integers(1, 200))) + data[at:]


def duplicate(data: bytes, rng: Rng) -> bytes:
    at, length = place(rng, len(data)), int(rng.integers(1, 2000))
    return data[:at] + data[at : at + length] * int(rng.integers(2, 20)) + data[at + length :]


def remove(data: bytes, rng: Rng) -> bytes:
    at = place(rng, len(data))
    return data[:at] + data[at + int(rng.integers(1, 300)) :]


def overwrite_number(data: bytes, rng: Rng) -> bytes:
    size, at = pick(rng, (1, 2, 4, 8)), place(rng, len(data), 0.7)
    return data[:at] + extreme(rng, size).to_bytes(size, pick(rng, ("little", "big"))) + data[at + size :]


BLIND: tuple[Mutation, ...] = (flip_bits, fill_run, truncate, insert, duplicate, remove, overwrite_number)


def blind(data: bytes, rng: Rng) -> bytes:
    return pick(rng, BLIND)(data, rng)


# --- PNG: chunks, their CRC made right again ---


def png(data: bytes, rng: Rng) -> bytes:
    chunks, at = [], 8
    while at + 8 <= len(data):
        length = int.from_bytes(data[at : at + 4], "big")
        chunks.append((data[at + 4 : at + 8], data[at + 8 : at + 8 + length]))
        at += 12 + length
    if not chunks:
        return blind(data, rng)
    which = int(rng.integers(len(chunks)))
    kind, body = chunks[which]
    way = pick(rng, ("header", "header", "body", "pixels", "pixels", "bomb", "add", "drop", "twice", "swap", "length"))
    if way == "header":
        offset, size = pick(rng, ((0, 4), (4, 4), (8, 1), (9, 1), (10, 1), (11, 1), (12, 1)))
        values = {8: (1, 2, 4, 8, 16, 3, 32), 9: (0, 2, 3, 4, 6, 1, 5, 7), 12: (0, 1, 2)}.get(offset)
        number = pick(rng, values) if values else extreme(rng, size)
        head = chunks[0][1]
        chunks[0] = (chunks[0][0], head[:offset] + number.to_bytes(size, "big") + head[offset + size :])
    elif way == "body":
        chunks[which] = (kind, blind(body, rng))
    elif way == "pixels":  # filter types and samples, behind a sound deflate stream
        packed = b"".join(one for name, one in chunks if name == b"IDAT")
        try:
            rows = zlib.decompress(packed)
        except zlib.error:
            rows = packed
        place_of = next((number for number, one in enumerate(chunks) if one[0] == b"IDAT"), 0)
        chunks = [one for one in chunks if one[0] != b"IDAT"]
        chunks.insert(place_of, (b"IDAT", zlib.compress(blind(rows, rng), 1)))
    elif way == "bomb":
        packed = zlib.compress(bytes(int(rng.integers(1, 40)) << 20), 1)
        name, prefix = pick(
            rng,
            ((b"zTXt", b"k\0\0"), (b"iCCP", b"k\0\0"), (b"iTXt", b"k\0\1\0\0\0"), (b"IDAT", b""), (b"fdAT", b"\0" * 4)),
        )
        chunks.insert(pick(rng, (1, which)), (name, prefix + packed))
    elif way == "add":
        name = pick(
            rng, (b"tRNS", b"PLTE", b"gAMA", b"cHRM", b"pHYs", b"eXIf", b"acTL", b"fcTL", b"sRGB", b"tIME", b"bKGD")
        )
        chunks.insert(pick(rng, (0, 1, 1, which)), (name, rng.bytes(pick(rng, (0, 1, 2, 4, 6, 8, 9, 26, 256, 768)))))
    elif way == "drop":
        del chunks[which]
    elif way == "twice":
        chunks[which:which] = [chunks[which]] * int(rng.integers(1, 5))
    elif way == "swap":
        other = int(rng.integers(len(chunks)))
        chunks[which], chunks[other] = chunks[other], chunks[which]
    made = [chunk(*one) for one in chunks]
    if way == "length":
        made[which % len(made)] = extreme(rng, 4).to_bytes(4, "big") + made[which % len(made)][4:]
    return data[:8] + b"".join(made)


# --- JPEG and JPEG-LS: segments ---


def jpeg(data: bytes, rng: Rng) -> bytes:
    segments, at = [], 2
    while at + 4 <= len(data) and data[at] == 0xFF and data[at + 1] != 0xDA:
        length = 2 + int.from_bytes(data[at + 2 : at + 4], "big")
        segments.append(data[at : at + length])
        at += length
    rest = data[at:]
    frames = [n for n, one in enumerate(segments) if 0xC0 <= one[1] <= 0xCF and one[1] not in (0xC4, 0xC8, 0xCC)]
    frames += [n for n, one in enumerate(segments) if one[1] == 0xF7]
    way = pick(
        rng, ("frame", "frame", "tables", "tables", "scan", "scans", "add", "drop", "twice", "swap", "length", "coded")
    )
    if not segments or (way == "frame" and not frames):
        return blind(data, rng)
    which = int(rng.integers(len(segments)))
    if way == "frame":
        which = frames[0]
        segment = bytearray(segments[which].ljust(20, b"\0"))
        offset = int(rng.integers(1, 14))
        if offset in (5, 7):  # height, width
            segment[offset : offset + 2] = extreme(rng, 2).to_bytes(2, "big")
        elif offset == 1:
            segment[1] = 0xC0 + pick(rng, (0, 1, 2, 3, 5, 6, 7, 9, 10, 11, 13, 14, 15))
        elif offset == 11:  # sampling factors
            segment[11] = pick(rng, (0x11, 0x21, 0x12, 0x22, 0x44, 0x14, 0x41, 0x00, 0xFF))
        else:
            segment[offset] = extreme(rng, 1)
        segments[which] = bytes(segment[: len(segments[which])])
    elif way == "tables":
        tables = [n for n, one in enumerate(segments) if one[1] in (0xC4, 0xDB, 0xDD, 0xF8)] or [which]
        which = pick(rng, tables)
        segments[which] = segments[which][:4] + blind(segments[which][4:], rng)[: len(segments[which]) - 4]
    elif way == "scan":
        head = 2 + int.from_bytes(rest[2:4], "big")
        rest = rest[:4] + blind(rest[4:head], rng)[: head - 4] + rest[head:]
    elif way == "scans":
        rest = rest[:-2] * int(rng.integers(2, 200)) + rest[-2:]
    elif way == "coded":
        head = 2 + int.from_bytes(rest[2:4], "big")
        rest = rest[:head] + blind(rest[head:], rng)
    elif way == "add":
        orientation = b"Exif\0\0MM\0*\0\0\0\x08\0\1\1\x12\0\3\0\0\0\1" + bytes(
            [0, int(rng.integers(12)), 0, 0, 0, 0, 0, 0]
        )
        marker, body = pick(
            rng,
            (
                (0xE1, blind(orientation, rng)), (0xE1, orientation), (0xEE, b"Adobe\0\x64\0\0\0\0" + rng.bytes(1)),
                (0xE2, b"ICC_PROFILE\0\1\1" + rng.bytes(100)), (0xE2, b"MPF\0" + rng.bytes(60)), (0xDD, rng.bytes(2)),
                (0xDC, rng.bytes(2)), (0xFE, rng.bytes(300)), (0xED, b"Photoshop 3.0\0008BIM" + rng.bytes(40)),
                (0xF8, bytes([pick(rng, (1, 2, 3, 4))]) + rng.bytes(12)),
            ),
        )  # fmt: skip
        segments.insert(which, struct.pack(">BBH", 0xFF, marker, len(body) + 2) + body)
    elif way == "drop":
        del segments[which]
    elif way == "twice":
        segments[which:which] = [segments[which]] * int(rng.integers(1, 400))
    elif way == "swap":
        other = int(rng.integers(len(segments)))
        segments[which], segments[other] = segments[other], segments[which]
    elif way == "length":
        segments[which] = segments[which][:2] + extreme(rng, 2).to_bytes(2, "big") + segments[which][4:]
    return data[:2] + b"".join(segments) + rest


def jpeg_2000(data: bytes, rng: Rng) -> bytes:
    """SIZ and COD fields, tile parts, the coded data."""
    changed = bytearray(data)
    way = pick(rng, ("size", "size", "style", "tile", "blind"))
    if way == "size" and len(changed) > 45:
        offset, size = pick(rng, (*((n, 4) for n in range(8, 40, 4)), (6, 2), (40, 2), (42, 1), (43, 1), (44, 1)))
        changed[offset : offset + size] = extreme(rng, size).to_bytes(size, "big")
    elif way in ("style", "tile") and (start := data.find(b"\xff\x52" if way == "style" else b"\xff\x90")) > 0:
        changed[min(len(data) - 1, start + int(rng.integers(2, 14)))] = extreme(rng, 1)
    else:
        return blind(data, rng)
    return bytes(changed)


# --- TIFF: entries of the directories ---


def tiff(data: bytes, rng: Rng) -> bytes:
    order = "<" if data[:2] == b"II" else ">"
    start = int.from_bytes(data[4:8], "little" if order == "<" else "big")
    if len(data) < start + 2 or data[2:4] not in (b"*\0", b"\0*"):
        return blind(data, rng)
    changed = bytearray(data)
    count = struct.unpack_from(order + "H", data, start)[0]
    at = start + 2 + 12 * int(rng.integers(max(1, min(count, 40))))
    if at + 12 > len(data):
        return blind(data, rng)
    way = pick(rng, ("tag", "type", "count", "value", "value", "tiles", "next", "entries"))
    if way == "tag":
        tags = (
            256,
            257,
            258,
            259,
            262,
            266,
            273,
            274,
            277,
            278,
            279,
            284,
            317,
            320,
            322,
            323,
            324,
            338,
            339,
            34665,
            700,
        )
        struct.pack_into(order + "H", changed, at, pick(rng, tags))
    elif way == "type":
        struct.pack_into(order + "H", changed, at + 2, int(rng.integers(20)))
    elif way == "count":
        struct.pack_into(order + "I", changed, at + 4, extreme(rng, 4))
    elif way == "value":
        struct.pack_into(order + "I", changed, at + 8, extreme(rng, 4))
    elif way == "tiles":
        tile = struct.pack(order + "HHII", pick(rng, (322, 323, 278, 284)), 4, 1, extreme(rng, 4))
        changed[at : at + 12] = tile
    elif way == "next" and start + 6 + 12 * count <= len(data):
        struct.pack_into(
            order + "I", changed, start + 2 + 12 * count, pick(rng, (start, 8, 0, len(data), extreme(rng, 4)))
        )
    else:
        struct.pack_into(order + "H", changed, start, extreme(rng, 2))
    return bytes(changed)


# --- DICOM: elements ---

TEXTS = (
    "",
    "0",
    "1",
    "-1",
    "2",
    "1e308",
    "-1e308",
    "1e-300",
    "nan",
    "inf",
    "99999999999",
    "0x10",
    "1\\2\\3",
    "\0",
    "ÿ" * 9,
)
WORDS = ("Rows", "Columns", "BitsAllocated", "BitsStored", "HighBit", "SamplesPerPixel", "PixelRepresentation",
         "PlanarConfiguration", "PixelPaddingValue", "PixelPaddingRangeLimit")  # fmt: skip
DECIMALS = ("WindowCenter", "WindowWidth", "RescaleSlope", "RescaleIntercept", "NumberOfFrames", "PatientAge",
            "PatientBirthDate", "StudyDate", "PixelSpacing", "ImagerPixelSpacing", "SpecificCharacterSet")  # fmt: skip
CODES = {
    "PhotometricInterpretation": ("MONOCHROME1", "MONOCHROME2", "RGB", "YBR_FULL", "YBR_FULL_422", "YBR_RCT", "YBR_ICT",
                                  "PALETTE COLOR", "", "HSV"),
    "VOILUTFunction": ("LINEAR", "LINEAR_EXACT", "SIGMOID", "", "X"),
    "SpecificCharacterSet": ("ISO_IR 100", "ISO_IR 192", "\\ISO 2022 IR 87", "GB18030", "nonsense", ""),
    "SOPClassUID": ("1.2.840.10008.5.1.4.1.1.1", "1.2.840.10008.5.1.4.1.1.2", "1.2.840.10008.1.3.10", "1.2.3", ""),
}  # fmt: skip
SYNTAXES = ("1.2.840.10008.1.2", *(f"1.2.840.10008.1.2.{end}" for end in (
    "1", "1.99", "2", "5", "4.50", "4.51", "4.57", "4.70", "4.80", "4.81", "4.90", "4.91", "4.201", "4.203",
    "4.100", "7",
)))  # fmt: skip


def deep(rng: Rng, *, implicit: bool, levels: int) -> bytes:
    """Sequences within sequences, of undefined length, closed or not."""
    head = b"\x08\0\x40\x11" + (b"\xff\xff\xff\xff" if implicit else b"SQ\0\0\xff\xff\xff\xff")
    ends = b"\xfe\xff\x0d\xe0\0\0\0\0\xfe\xff\xdd\xe0\0\0\0\0"
    opened = (head + b"\xfe\xff\0\xe0\xff\xff\xff\xff") * levels
    return opened + (ends * levels if rng.random() < 0.7 else b"")


def elements(data: bytes) -> list[tuple[int, int, int]]:
    """(start, start of the value, its end) of the top level elements of an explicit little endian file."""
    found, at = [], 132 if data[128:132] == b"DICM" else 0
    while at + 8 <= len(data):
        long = data[at + 4 : at + 6] in (b"OB", b"OW", b"SQ", b"UN", b"UT", b"OF", b"UC", b"UR", b"OD", b"OL", b"OV")
        value = at + (12 if long else 8)
        length = int.from_bytes(data[value - 4 : value] if long else data[at + 6 : value], "little")
        end = len(data) if length == 0xFFFFFFFF else value + length
        found.append((at, value, min(end, len(data))))
        at = end
    return found


def dicom_bytes(data: bytes, rng: Rng) -> bytes:
    """Tags, VRs, lengths, whole elements; sequences too deep and private elements that claim too much."""
    found = elements(data)
    if not found:
        return blind(data, rng)
    start, value, end = pick(rng, found)
    way = pick(rng, ("vr", "length", "undefined", "drop", "twice", "value", "deep", "private", "tag", "many"))
    if way == "vr":
        kinds = (
            b"US",
            b"SS",
            b"UL",
            b"DS",
            b"IS",
            b"CS",
            b"LO",
            b"UI",
            b"OW",
            b"OB",
            b"SQ",
            b"UN",
            b"PN",
            b"AT",
            b"FD",
            b"ZZ",
        )
        return data[: start + 4] + pick(rng, kinds) + data[start + 6 :]
    if way == "length":
        size = 4 if value - start == 12 else 2
        return data[: value - size] + extreme(rng, size).to_bytes(size, "little") + data[value:]
    if way == "undefined":
        kind = pick(rng, (b"SQ", b"UN", b"OB", b"OW"))
        return data[: start + 4] + kind + b"\0\0\xff\xff\xff\xff" + data[value:]
    if way == "drop":
        return data[:start] + data[end:]
    if way == "twice":
        return data[:start] + data[start:end] * int(rng.integers(2, 6)) + data[end:]
    if way == "value":
        return data[:value] + blind(data[value:end], rng)[: end - value].ljust(end - value, b"\0") + data[end:]
    if way == "deep":
        return (
            data[:start]
            + deep(rng, implicit=rng.random() < 0.2, levels=pick(rng, (3, 30, 300, 900, 3000, 20_000)))
            + data[start:]
        )
    if way == "private":
        claimed = extreme(rng, 4).to_bytes(4, "little")
        return data[:start] + b"\x29\0\x10\x10" + pick(rng, (b"UN", b"OB", b"SQ")) + b"\0\0" + claimed + data[start:]
    if way == "tag":
        return data[:start] + rng.bytes(4) + data[start + 4 :]
    one = b"\x29\0\x10\x10SH\2\0ab"
    return data[:start] + one * int(rng.integers(100, 30_000)) + data[start:]


def dicom_values(data: bytes, rng: Rng) -> bytes:
    """Attributes that steer the reading, replaced by values that make no sense; lookup tables; the pixel data."""
    import pydicom
    from pydicom.dataset import FileMetaDataset

    dataset: Any = pydicom.dcmread(io.BytesIO(data), force=True)
    if not hasattr(dataset, "file_meta"):
        dataset.file_meta = FileMetaDataset()
    way = pick(rng, ("word", "word", "decimal", "decimal", "code", "table", "pixels", "pixels", "syntax", "fragments"))
    if way == "word":
        dataset.add_new(pick(rng, WORDS), "US", extreme(rng, 2))
    elif way == "decimal":
        dataset.add_new(pick(rng, DECIMALS), "LO", pick(rng, TEXTS))
    elif way == "code":
        keyword = pick(rng, tuple(CODES))
        dataset.add_new(keyword, "LO", pick(rng, CODES[keyword]))
    elif way == "table":
        table = item()
        table.add_new("LUTDescriptor", "US", [extreme(rng, 2) for _ in range(pick(rng, (3, 3, 3, 2, 1, 0)))])
        table.add_new("LUTData", "OW", rng.bytes(pick(rng, (0, 2, 256, 512, 8192))))
        dataset.add_new(
            pick(rng, ("ModalityLUTSequence", "VOILUTSequence")), "SQ", [table] * pick(rng, (0, 1, 1, 1, 5))
        )
    elif way == "syntax":
        dataset.file_meta.TransferSyntaxUID = pick(rng, SYNTAXES)
    elif "PixelData" in dataset:
        repackaged(dataset, rng, way)
    out = io.BytesIO()
    pydicom.dcmwrite(
        out, dataset, enforce_file_format=False, implicit_vr=implicit(dataset), little_endian=little(dataset)
    )
    return out.getvalue()


def implicit(dataset: Any) -> bool:
    return bool(dataset.original_encoding[0])


def little(dataset: Any) -> bool:
    return bool(dataset.original_encoding[1])


def repackaged(dataset: Any, rng: Rng, way: str) -> None:
    """The pixel data changed by what knows their kind."""
    from pydicom.encaps import encapsulate, get_frame

    data = dataset.PixelData
    if not dataset["PixelData"].is_undefined_length:
        dataset.PixelData = blind(data, rng)
        return
    frame = get_frame(data, 0, number_of_frames=1)
    if frame[:2] == b"\xff\xd8":
        frame = jpeg(frame, rng)
    elif frame[:2] == b"\xff\x4f":
        frame = jpeg_2000(frame, rng)
    elif way == "pixels":  # RLE: the header of 16 numbers
        at = 4 * int(rng.integers(16))
        frame = frame[:at] + extreme(rng, 4).to_bytes(4, "little") + frame[at + 4 :]
    else:
        frame = blind(frame, rng)
    pieces = int(rng.integers(1, 9)) if way == "fragments" and len(frame) > 100 else 1
    made = encapsulate([frame], fragments_per_frame=pieces, has_bot=bool(rng.random() < 0.5))
    dataset.PixelData = blind(made, rng) if way == "fragments" else made


def dicom(data: bytes, rng: Rng) -> bytes:
    """One of both ways; a deflated dataset is inflated before and deflated after."""
    start = 144 + int.from_bytes(data[140:144], "little")
    if b"1.2.840.10008.1.2.1.99" in data[:start] and rng.random() < 0.7:
        try:
            inner = zlib.decompress(data[start:], -15)
        except zlib.error:
            return blind(data, rng)
        packer = zlib.compressobj(1, wbits=-15)
        return data[:start] + packer.compress(dicom_bytes(inner, rng)) + packer.flush()
    if rng.random() < 0.5:
        return dicom_bytes(data, rng)
    try:
        return dicom_values(data, rng)
    except Exception:  # what was changed before cannot be read or written as a dataset any more
        return blind(data, rng)


KNOWING: dict[str, Mutation] = {"png": png, "jpeg": jpeg, "tiff": tiff, "dicom": dicom}


def mutated(data: bytes, kind: str, rng: Rng) -> bytes:
    """One to four changes, two in three of them by what knows the ``kind`` (png, jpeg, tiff, dicom; else blind)."""
    for _ in range(int(rng.choice([1, 2, 3, 4], p=[0.5, 0.3, 0.15, 0.05]))):
        knows = rng.random() < 0.67
        data = KNOWING.get(kind, blind)(data, rng) if knows and data else blind(data, rng)
    return data[: 8 << 20]

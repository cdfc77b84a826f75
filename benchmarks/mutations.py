"""Changes to a file's bytes: blind ones, and ones that know PNG chunks, JPEG segments, TIFF entries and, here, DICOM.

Each is a function (bytes, generator) -> bytes, and the same generator gives the same bytes. :func:`mutated` draws one
to four of them, mostly of the file's own kind.
"""

from __future__ import annotations

import io
import zlib
from typing import Any

from mutation_blind import Mutation, Rng, blind, extreme, pick
from mutation_pictures import jpeg, jpeg_2000, png, tiff
from mutation_seeds import item

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

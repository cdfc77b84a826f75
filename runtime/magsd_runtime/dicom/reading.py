"""A DICOM file becomes a radiograph: 8 bits, as the film was meant to be shown.

Where the 8 bits begin: the preprocessing was made for films as they are published, PNG and JPEG of what a viewer
shows. So the whole pipeline of the standard comes first, window and inversion included, and what leaves here is the
picture that an export of the film as PNG holds.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

import numpy as np

from ..colour import coloured_share
from ..errors import ImageError
from ..images import EXTENSIONS, MAX_PIXELS, MAX_SIDE, MIN_SIDE, Radiograph
from . import codecs
from .grayscale import Function, GrayscaleTransform, LookupTable, Rescale, Window, render
from .parsing import integer, items, numbers, parse, quiet, text, value
from .pixels import PixelHeader, decode, read_header
from .tags import FILM_CLASSES, facts

if TYPE_CHECKING:
    from pydicom import Dataset

_FOREIGN_SUFFIXES = frozenset(suffix for known in EXTENSIONS.values() for suffix in known)
_DICOMDIR = "1.2.840.10008.1.3.10"


def read_dicom(
    content: bytes, path: str | os.PathLike[str] = "", *, name: str | None = None, max_pixels: int = MAX_PIXELS
) -> Radiograph:
    """Read one film from the ``content`` of a DICOM file; ``path`` is for the messages and ``extension_mismatch``.

    ``source`` has the fields of every radiograph (``mode``: the photometric interpretation), and in ``dicom`` what
    :func:`tags.facts` gives, ``transfer_syntax``, ``window``, ``modality_lut`` and ``padded``.

    Raises
    ------
    ImageError
        One line: ``name`` (default: the path), what is wrong, what to do. It quotes nothing of the patient.
    """
    name = os.fspath(path) if name is None else name
    dataset, syntax = parse(content, name)
    with quiet():
        _check_class(dataset, name)
        header = read_header(
            dataset, syntax, name, min_side=MIN_SIDE, max_side=MAX_SIDE, max_pixels=min(max_pixels, MAX_PIXELS)
        )
        transform = grayscale_transform(dataset, header, name) if header.is_grey else None
        found = facts(dataset)
    array = decode(dataset, header, name)
    del dataset
    if transform is None:
        from PIL import Image

        picture = Image.fromarray(array)
        pixels = np.asarray(picture.convert("L"))  # luma, as of any colour picture
        colour = {"colour": coloured_share(picture)}
        window: dict[str, Any] = {"kind": "colour"}
        padded, modality = 0.0, None
    else:
        pixels, shown = render(array, transform)
        window, padded = _window_facts(transform, shown.kind, shown.low, shown.high), shown.padded
        modality = "lut" if isinstance(transform.modality, LookupTable) else "rescale"
        modality = None if transform.modality == Rescale() else modality
        colour = {}
    source: dict[str, Any] = {
        "format": "DICOM",
        "mode": header.photometric,
        "width": header.columns,
        "height": header.rows,
        "bits_stored": header.bits_stored,
        "alpha": False,
        "inverted": transform is not None and transform.inverted,
        **colour,
        "exif_orientation": 1,
        "extension_mismatch": Path(path).suffix.lower() in _FOREIGN_SUFFIXES,
        "dicom": {
            **found,
            "transfer_syntax": syntax,
            "window": window,
            "modality_lut": modality,
            "padded": round(padded, 6),
        },
    }
    return Radiograph(np.ascontiguousarray(pixels), source)


def grayscale_transform(dataset: Dataset, header: PixelHeader, name: str) -> GrayscaleTransform:
    """The grayscale pipeline that the header describes; to be called under ``quiet()``.

    A modality LUT comes before a rescale, a VOI LUT before a window, the first of several is taken. A window that
    cannot be one (no width, not finite) is left out. The polarity is that of the photometric interpretation:
    Presentation LUT Shape must not contradict it (PS3.3, C.8.11.3.1.2), and if it does, a rule says so.

    Raises
    ------
    ImageError
        If the rescale slope is 0, or a lookup table is damaged.
    """
    sign, big_endian = header.signed, header.syntax == codecs.BIG_ENDIAN
    modality: Rescale | LookupTable = Rescale()
    if tables := items(dataset, "ModalityLUTSequence"):
        modality = _lookup_table(tables[0], sign, big_endian, name)
        lowest = 0.0
    else:
        slope, intercept = numbers(dataset, "RescaleSlope") or [1.0], numbers(dataset, "RescaleIntercept") or [0.0]
        if slope[0] == 0:
            raise ImageError(f"{name}: has a Rescale Slope of 0, which leaves no picture")
        modality = Rescale(slope[0], intercept[0])
        top = 2**header.bits_stored - 1
        ends = (-(top + 1) // 2, top // 2) if sign else (0, top)
        lowest = min(slope[0] * end + intercept[0] for end in ends)
    voi: Window | LookupTable | None = None
    if tables := items(dataset, "VOILUTSequence"):
        voi = _lookup_table(tables[0], lowest < 0, big_endian, name)
    elif window := _window(dataset):
        voi = window
    return GrayscaleTransform(
        bits_stored=header.bits_stored,
        signed=sign,
        padding=_padding(dataset, header),
        modality=modality,
        voi=voi,
        inverted=header.photometric == "MONOCHROME1",
    )


def _check_class(dataset: Dataset, name: str) -> None:
    uid = text(dataset, "SOPClassUID")
    if uid in FILM_CLASSES or not uid:  # without one it is a film if its pixels are
        return
    if uid == _DICOMDIR:
        raise ImageError(f"{name}: is a DICOMDIR, a table of contents: name the films it lists")
    from pydicom.uid import UID

    known = UID(uid).name
    what = known.removesuffix(" Storage") if known != uid else "private or unknown"
    raise ImageError(f"{name}: is a DICOM object of the kind {what}, expected a film: CR, DX or secondary capture")


def _window(dataset: Dataset) -> Window | None:
    centers, widths = numbers(dataset, "WindowCenter"), numbers(dataset, "WindowWidth")
    function = (text(dataset, "VOILUTFunction") or "LINEAR").upper()
    if not centers or not widths or function not in get_args(Function):
        return None
    if widths[0] <= 0 or (function == "LINEAR" and widths[0] < 1):
        return None
    return Window(centers[0], widths[0], function)  # type: ignore[arg-type]


def _padding(dataset: Dataset, header: PixelHeader) -> tuple[int, int] | None:
    ends = [integer(dataset, keyword) for keyword in ("PixelPaddingValue", "PixelPaddingRangeLimit")]
    if ends[0] is None:
        return None
    found = [_with_sign(end, header.signed) for end in ends if end is not None]
    return min(found), max(found)


def _with_sign(number: int, signed: bool) -> int:
    """A value of VR US or SS, whichever of both it was read as."""
    return number - 65_536 if signed and number > 32_767 else number


def _lookup_table(item: Dataset, signed_input: bool, big_endian: bool, name: str) -> LookupTable:
    """An item of a Modality or VOI LUT sequence (PS3.3, C.11.1.1.1 and C.11.2.1.1)."""
    descriptor = numbers(item, "LUTDescriptor")
    data = value(item, "LUTData")
    if len(descriptor) != 3 or data is None:
        raise ImageError(f"{name}: has a lookup table without its descriptor or data: export the film again")
    count, first, bits = (int(number) for number in descriptor)
    count = count % 65_536 or 65_536  # 0 stands for 65,536, which has no room
    if isinstance(data, bytes):
        # Entries of 8 bits are packed, or each in a word: only the length tells (C.11.1.1.1)
        packed = len(data) in (count, count + 1) and bits <= 8 and count > 1
        order = ">" if big_endian else "<"
        entries = np.frombuffer(data[: len(data) // 2 * 2] if not packed else data, "u1" if packed else f"{order}u2")
    else:
        listed = data if hasattr(data, "__len__") else [data]
        entries = np.array([int(entry) % 65_536 for entry in listed], np.uint16)
    if entries.size < count:
        raise ImageError(f"{name}: has a lookup table of {entries.size} entries, {count} are declared")
    table = np.asarray(entries[:count], np.uint16)
    needed = max(1, int(table.max()).bit_length())
    # Some descriptors name fewer bits than the entries use; PS3.3 knows 8 to 16
    bits = bits if needed <= bits <= 16 else max(8, needed)
    return LookupTable(_with_sign(first, signed_input), bits, table)


def _window_facts(transform: GrayscaleTransform, kind: str, low: float | None, high: float | None) -> dict[str, Any]:
    """Which window the film was shown with, JSON-able."""
    if isinstance(transform.voi, Window):
        voi = transform.voi
        return {"kind": kind, "center": voi.center, "width": voi.width, "function": voi.function}
    if kind == "percentile":
        return {"kind": kind, "low": low, "high": high}
    return {"kind": kind}

"""What the header says of the pixels, held against limits before anything is decoded; then decoding.

Sources: PS3.3, C.7.6.3 (Image Pixel); PS3.5, chapter 8 and annex A (encoding).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from ..errors import ImageError
from ..limits import check_passes
from . import codecs, codestreams
from .parsing import integer, quiet, text, value

if TYPE_CHECKING:
    from pydicom import Dataset

MONOCHROME = ("MONOCHROME1", "MONOCHROME2")
_COLOUR = ("RGB", "YBR_FULL", "YBR_FULL_422", "YBR_RCT", "YBR_ICT")


MAX_COLOUR_PIXELS = 20_000_000
"""Of a colour picture: pydicom converts colours in floating point, at 50 bytes a pixel and more."""

MAX_SLOW_PIXELS = 40_000_000
"""Of a picture in :data:`codecs.SLOW`: twice the largest films, and what is decoded in some seconds."""


@dataclass(frozen=True)
class PixelHeader:
    """The Image Pixel module of a single frame; ``photometric`` is one of :data:`MONOCHROME` or a colour kind.

    Grey: ``bits_stored`` 8 to 16 of ``bits_allocated`` 8 or 16, the highest of them ``high_bit``. Colour: 8 bits.
    """

    rows: int
    columns: int
    photometric: str
    bits_allocated: int
    bits_stored: int
    high_bit: int
    signed: bool
    syntax: str

    @property
    def is_grey(self) -> bool:
        return self.photometric in MONOCHROME


def read_header(
    dataset: Dataset, syntax: str, name: str, *, min_side: int, max_side: int, max_pixels: int
) -> PixelHeader:
    """Check what is declared. Raises ImageError, which begins with ``name``; to be called under ``quiet()``."""
    if value(dataset, "FloatPixelData") is not None or value(dataset, "DoubleFloatPixelData") is not None:
        raise ImageError(f"{name}: has floating point pixels, which no X-ray film has")
    if "Rows" not in dataset and "PixelData" not in dataset:
        raise ImageError(f"{name}: is a DICOM file without an image in it (or cut short before it)")
    frames = text(dataset, "NumberOfFrames") or "1"
    if frames != "1":
        raise ImageError(f"{name}: is a multi-frame image, expected one: export the one to judge as its own file")
    rows, columns = integer(dataset, "Rows") or 0, integer(dataset, "Columns") or 0
    if rows < 1 or columns < 1:
        raise ImageError(f"{name}: the DICOM header has no Rows and Columns")
    if rows * columns > max_pixels or max(rows, columns) > max_side:
        raise ImageError(
            f"{name}: declares {columns:,} x {rows:,} pixels, "
            f"at most {max_pixels:,} in all and {max_side:,} on a side are read"
        )
    if min(rows, columns) < min_side:
        raise ImageError(f"{name}: is {columns} x {rows} pixels, at least {min_side} on each side are needed")
    header = PixelHeader(
        rows=rows,
        columns=columns,
        photometric=_photometric(dataset, name),
        bits_allocated=integer(dataset, "BitsAllocated") or 0,
        bits_stored=(stored := integer(dataset, "BitsStored") or integer(dataset, "BitsAllocated") or 0),
        high_bit=stored - 1 if (high := integer(dataset, "HighBit")) is None else high,
        signed=integer(dataset, "PixelRepresentation") == 1,
        syntax=syntax,
    )
    _check_bits(header, name)
    _check_size(header, name)
    if "PixelData" not in dataset:
        raise ImageError(f"{name}: the file ends before its pixel data, or has none: send or export it again")
    _check_syntax(header, name)
    return header


def _check_size(header: PixelHeader, name: str) -> None:
    """The stricter limits of what takes a decoder long; the general ones were checked before."""
    limits = []
    if not header.is_grey:
        limits.append((MAX_COLOUR_PIXELS, "of colour"))
    if header.syntax in codecs.SLOW:
        limits.append((MAX_SLOW_PIXELS, "compressed as " + codecs.FAMILY_NAMES[header.syntax]))
    for most, what in limits:
        if header.rows * header.columns > most:
            raise ImageError(
                f"{name}: declares {header.columns:,} x {header.rows:,} pixels {what}, at most {most:,} are read: "
                "export it uncompressed and as greyscale"
            )


def _photometric(dataset: Dataset, name: str) -> str:
    found = text(dataset, "PhotometricInterpretation").upper()
    samples = integer(dataset, "SamplesPerPixel") or 1
    if found == "PALETTE COLOR":
        raise ImageError(f"{name}: is a palette colour image, which no X-ray film is: save it as greyscale")
    expected = 1 if found in MONOCHROME else 3 if found in _COLOUR else None
    if expected is None or samples != expected:
        known = found if found in (*MONOCHROME, *_COLOUR) else "of another kind than greyscale and RGB"
        raise ImageError(f"{name}: has pixels {known} with {samples} samples: save it as greyscale")
    return found


def _check_bits(header: PixelHeader, name: str) -> None:
    allocated, stored = header.bits_allocated, header.bits_stored
    if header.is_grey:
        possible = allocated in (8, 16) and 8 <= stored <= allocated and stored - 1 <= header.high_bit < allocated
    else:
        possible = (allocated, stored, header.signed) == (8, 8, False)
    if not possible:
        kind = "greyscale of 8 to 16" if header.is_grey else "colour of 8"
        sign = " with sign" if header.signed else ""
        raise ImageError(
            f"{name}: has {stored} bits{sign} stored in {allocated} (highest {header.high_bit}), "
            f"only {kind} bits is read"
        )


def _check_syntax(header: PixelHeader, name: str) -> None:
    family = codecs.family_of(header.syntax)
    if family is None:
        from pydicom.uid import UID

        known = UID(header.syntax)
        called = known.name if known.name != header.syntax else "in a private or unknown way"
        raise ImageError(f"{name}: its pixels are encoded {called}, which is not read: export it uncompressed")
    if header.syntax in codecs.NATIVE:
        return
    from pydicom.pixels.decoders.base import get_decoder

    decoder = get_decoder(header.syntax)
    # Pillow registers for 12 bits too, and cannot
    only_pillow = header.syntax == codecs.JPEG_12_BIT and decoder.available_plugins == ("pillow",)
    if not decoder.is_available or (only_pillow and header.bits_stored > 8):
        raise ImageError(f"{name}: {codecs.missing_codec(family)}")
    if header.high_bit != header.bits_stored - 1 and header.syntax != codecs.RLE:
        raise ImageError(f"{name}: its highest bit is {header.high_bit}, expected {header.bits_stored - 1}")


def decode(dataset: Dataset, header: PixelHeader, name: str) -> NDArray[Any]:
    """Grey: the stored bits as unsigned integers (H, W), uint8 or uint16, two's complement where signed, and 0 in the
    bits above. Colour: RGB uint8 (H, W, 3).

    Raises
    ------
    ImageError
        If the data are damaged, cut short, or declare another size than the header; it begins with ``name``.
    """
    try:
        with quiet():
            _check_data(dataset, header, name)
            array = _decoded(dataset, header)
    except (ImageError, MemoryError):
        raise
    except Exception as error:  # codecs raise nearly anything, and quote what they like
        raise ImageError(
            f"{name}: the pixel data are damaged, cut short or of an unsupported kind "
            f"({type(error).__name__} while decoding): send or export the file again"
        ) from None
    shape = (header.rows, header.columns) if header.is_grey else (header.rows, header.columns, 3)
    if array.shape != shape:
        raise ImageError(f"{name}: the decoded picture has another shape than the DICOM header says")
    if not header.is_grey:
        return array.astype(np.uint8, copy=False)
    array = array.astype(array.dtype.newbyteorder("="), copy=False)
    patterns = array.view(f"u{array.itemsize}")
    if shift := header.high_bit + 1 - header.bits_stored:
        patterns = patterns >> shift
    # PS3.5, 8.1.1: what the bits above hold is not for us
    if header.bits_stored < 8 * patterns.itemsize:
        patterns = patterns & patterns.dtype.type(2**header.bits_stored - 1)
    return patterns


def _check_data(dataset: Dataset, header: PixelHeader, name: str) -> None:
    data = dataset.PixelData
    samples = 1 if header.is_grey else 3
    raw = header.rows * header.columns * samples * header.bits_allocated // 8
    if header.syntax in codecs.NATIVE:
        if header.photometric == "YBR_FULL_422":
            raw = raw * 2 // 3
        if len(data) < raw:
            raise ImageError(f"{name}: the pixel data are cut short: {len(data):,} of {raw:,} bytes")
        return
    from pydicom.encaps import get_frame

    if codestreams.fragments(data, codestreams.MAX_FRAGMENTS) >= codestreams.MAX_FRAGMENTS:
        most = codestreams.MAX_FRAGMENTS
        raise ImageError(f"{name}: its compressed picture is in more than {most:,} pieces: export it again")
    frame = get_frame(data, 0, number_of_frames=1)
    if header.syntax == codecs.RLE:
        if not codestreams.rle_is_bounded(frame, header.rows * header.columns):
            raise ImageError(
                f"{name}: the RLE data are damaged, or unpack to more than the picture, or from too many runs"
            )
        return
    read = codestreams.read_jpeg_2000 if header.syntax in codecs.JPEG_2000 else codestreams.read_jpeg
    stream = read(frame)
    if stream is None:
        raise ImageError(f"{name}: the compressed pixel data are damaged: they have no picture header")
    if (stream.width, stream.height, stream.components) != (header.columns, header.rows, samples):
        raise ImageError(
            f"{name}: the compressed picture is {stream.width:,} x {stream.height:,} pixels of {stream.components} "
            f"samples, the DICOM header says {header.columns:,} x {header.rows:,} of {samples}"
        )
    if stream.precision > header.bits_allocated:
        raise ImageError(
            f"{name}: the compressed picture has {stream.precision} bits, more than the header has room for"
        )
    if not codestreams.is_complete(frame):
        raise ImageError(f"{name}: the compressed pixel data are cut short: their end is missing")
    if header.syntax in codecs.JPEG:
        check_passes(frame.count(b"\xff\xda"), header.columns, header.rows, name)


def _decoded(dataset: Dataset, header: PixelHeader) -> NDArray[Any]:
    from pydicom.pixels.decoders.base import get_decoder

    decoder = get_decoder(header.syntax)
    options: dict[str, Any] = {}
    if header.syntax in codecs.NATIVE or header.syntax == codecs.RLE:
        options["correct_unused_bits"] = False  # it takes the lowest bits, wherever the highest one is
        options["view_only"] = True  # nothing is written into it, and a copy is 160 MB for the largest film
    plugin = codecs.PREFERRED.get(family.name if (family := codecs.family_of(header.syntax)) else "")
    if plugin in decoder.available_plugins:
        options["decoding_plugin"] = plugin
    if "NumberOfFrames" not in dataset:
        options["number_of_frames"] = 1
    return decoder.as_array(dataset, index=0, **options)[0]

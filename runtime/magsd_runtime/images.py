"""A file becomes a radiograph: DICOM; PNG, JPEG and TIFF, 8 and 16 bit, grey or colour.

The header is judged before any pixel is decoded, so that memory stays bounded whatever a file
declares. What is not a single, complete, grey-convertible picture of a sane size is refused with
one line that says what it is. Decoding is Pillow's; its global settings are left alone. DICOM: :mod:`dicom.reading`.

    stored as                     grey value, 0 black to 255 white
    8 bit and less                as decoded (1, 2 and 4 bits spread over 0 to 255)
    16 bit grey                   linear: 255 / (2**bits_stored - 1), rounded; see ``_to_8_bits``
    colour, palette               luma, 0.299 R + 0.587 G + 0.114 B (ITU-R BT.601), as Pillow's "L"
    alpha                         composed over black: what is transparent is not film
    TIFF WhiteIsZero              inverted, so that more is brighter
"""

from __future__ import annotations

import glob
import importlib
import os
import stat
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .colour import coloured_share
from .dicom.parsing import looks_like_dicom
from .errors import ImageError
from .limits import Meter, MeteredFile, check_passes, check_png, check_tiff, count_scans

MIN_SIDE = 64
MAX_SIDE = 32_000  # OpenCV's warps end at 32,767
MAX_PIXELS = 80_000_000  # four times the largest flat detectors; below the size at which Pillow warns
MAX_FILE_BYTES = 256 << 20  # 80 million pixels of uncompressed 24-bit colour

EXTENSIONS = {
    "PNG": (".png",),
    "JPEG": (".jpg", ".jpeg", ".jpe", ".jfif"),
    "TIFF": (".tif", ".tiff"),
}
DICOM_EXTENSIONS = (".dcm", ".dicom", ".dic", ".ima")
_ALL_EXTENSIONS = frozenset(extension for known in EXTENSIONS.values() for extension in known) | {*DICOM_EXTENSIONS}
_ACCEPTED = "DICOM, PNG, JPEG and TIFF are read"

# Opening by class, not by Image.open: that would import five plugins, and emits its own size warning.
_PLUGINS = {
    "PNG": ("PIL.PngImagePlugin", "PngImageFile"),
    "JPEG": ("PIL.JpegImagePlugin", "JpegImageFile"),
    "TIFF": ("PIL.TiffImagePlugin", "TiffImageFile"),
}
_FORMATS = (
    (b"\x89PNG\r\n\x1a\n", "PNG"),
    (b"\xff\xd8\xff", "JPEG"),
    (b"II*\0", "TIFF"),
    (b"MM\0*", "TIFF"),
    (b"II+\0", "TIFF"),
    (b"MM\0+", "TIFF"),
)
_REFUSED = (
    (0, b"GIF8", "a GIF image"),
    (0, b"BM", "a BMP image"),
    (8, b"WEBP", "a WebP image"),
    (0, b"%PDF", "a PDF document"),
    (0, b"\0\0\0\x0cjP  ", "a JPEG 2000 image"),
    (0, b"\xff\x4f\xff\x51", "a JPEG 2000 image"),
    (0, b"\0\0\0\x0cJXL ", "a JPEG XL image"),
    (0, b"\xff\x0a", "a JPEG XL image"),
    (4, b"ftyp", "a HEIC, AVIF or video file"),
    (0, b"8BPS", "a Photoshop document"),
    (0, b"\0\0\1\0", "an icon"),
    (0, b"P5", "a PGM image"),
    (0, b"P6", "a PPM image"),
    (0, b"\x93NUMPY", "a NumPy array"),
    (0, b"PK\3\4", "a ZIP archive"),
    (0, b"\x1f\x8b", "a gzip file (NIfTI?)"),
    (0, b"<", "a text file (HTML, SVG or XML)"),
)


@dataclass(frozen=True, eq=False)
class Radiograph:
    """One film: ``pixels`` uint8 (H, W), 0 black to 255 white, upright; ``source``: facts of the file.

    ``source`` is JSON-able: format, mode (Pillow's), width, height (of ``pixels``), bits_stored,
    exif_orientation (1 to 8; 1 when absent; already applied), alpha, inverted, extension_mismatch. Of a picture with
    colours also ``colour``, its :func:`coloured_share`; of a DICOM file ``dicom``, of :func:`dicom.reading.read_dicom`.
    """

    pixels: NDArray[np.uint8]
    source: dict[str, Any]

    @property
    def width(self) -> int:
        return self.pixels.shape[1]

    @property
    def height(self) -> int:
        return self.pixels.shape[0]


def has_contrast(radiograph: Radiograph) -> bool:
    """Whether the pixels hold more than one grey value; without contrast there is nothing to judge."""
    return bool(radiograph.pixels.min() != radiograph.pixels.max())


def read_radiograph(path: str | os.PathLike[str], *, max_pixels: int = MAX_PIXELS) -> Radiograph:
    """Read one DICOM, PNG, JPEG or TIFF file; a wrong extension is accepted and recorded in ``source``.

    Sides from 64 to 32,000 pixels and at most ``max_pixels`` pixels, checked before decoding. A
    constant image is read: see :func:`has_contrast`.

    Raises
    ------
    ImageError
        One line: the path, what is wrong, what to do. Nothing else is raised for any content.
    """
    name = _printable(path)
    with _open_file(path, name) as file:
        head = file.read(256)
        file.seek(0)
        if looks_like_dicom(head) and not head.startswith(tuple(magic for magic, _ in _FORMATS[:2])):
            from .dicom.reading import read_dicom

            return read_dicom(file.read(), path, name=name, max_pixels=max_pixels)
        format_name = _recognize(head, name)
        if format_name == "PNG":
            check_png(file, name)
        elif format_name == "TIFF":
            check_tiff(file, name)
        image = _open_image(file, format_name, name)
        _check_header(image, format_name, name, max_pixels)
        if format_name == "JPEG":
            position = file.tell()  # Pillow goes on from there
            width, height = image.size
            check_passes(count_scans(file), width, height, name)
            file.seek(position)
        # Pillow turns a TIFF upright while it loads, and then forgets how it lay
        orientation = _orientation(image) if format_name == "TIFF" else None
        try:
            image.load()
            pixels, facts = _to_grey(image, _sample_bits(image, format_name, head), name)
        except ImageError:
            raise
        except Exception as error:  # damaged data make Pillow's decoders raise nearly anything
            raise _damaged(name, format_name, error) from error
    if orientation is None:
        orientation = _orientation(image)
        pixels = _upright(pixels, orientation)
    suffix = Path(path).suffix.lower()
    source: dict[str, Any] = {
        "format": format_name,
        "mode": image.mode,
        "width": pixels.shape[1],
        "height": pixels.shape[0],
        **facts,
        "exif_orientation": orientation,
        "extension_mismatch": bool(suffix) and suffix not in EXTENSIONS[format_name],
    }
    return Radiograph(np.ascontiguousarray(pixels), source)


def find_images(paths: Sequence[str], *, stdin: Iterable[str] | None = None) -> list[Path]:
    """The files that the arguments of a command name, each once, in the order named.

    A folder gives the images below it, sorted, without hidden ones, by extension; a DICOM file needs none. A
    pattern (``*``, ``?``, ``[...]``, ``**``) gives its matches, sorted; ``-`` the lines of ``stdin``
    (default: the process's), each of them a file, folder or pattern. A name that matches nothing
    stays in the list: reading it gives an error of its own and stops no other.
    """
    return [Path(name) for name in find_names(paths, stdin=stdin)]


def find_names(paths: Sequence[str], *, stdin: Iterable[str] | None = None) -> list[str]:
    """:func:`find_images` as text, which is a third of the memory where there are a hundred thousand."""
    found: dict[str, None] = {}
    for path in paths:
        for argument in _lines(stdin) if path == "-" else (path,):
            found.update(dict.fromkeys(str(Path(name)) for name in _expand(argument)))
    return list(found)


def _lines(stdin: Iterable[str] | None) -> list[str]:
    if stdin is None:
        # Bytes, so that a name in another encoding than the locale's survives
        stdin = map(os.fsdecode, sys.stdin.buffer)
    return [line for line in (line.rstrip("\r\n") for line in stdin) if line.strip()]


def _expand(argument: str) -> list[str]:
    if os.path.isdir(argument):
        return _images_below(argument)
    if os.path.lexists(argument) or not glob.has_magic(argument):
        return [argument]
    matches = sorted(glob.glob(argument, recursive=True))
    if not matches:
        return [argument]
    return [name for match in matches for name in (_expand(match) if os.path.isdir(match) else [match])]


def _images_below(folder: str) -> list[str]:
    found: list[str] = []

    def keep(error: OSError) -> None:
        found.append(error.filename)  # a folder that cannot be listed stays, so that it is reported

    for parent, folders, files in os.walk(folder, onerror=keep):
        folders[:] = [name for name in folders if not name.startswith(".")]
        found += [
            os.path.join(parent, name)
            for name in files
            if not name.startswith(".") and _may_be_image(os.path.join(parent, name))
        ]
    return sorted(found)


def _may_be_image(path: str) -> bool:
    """By its extension; and a file without one, or with a number in its place (a UID as the name), by its beginning."""
    extension = os.path.splitext(path)[1].lower()
    if extension and not extension[1:].isdecimal():
        return extension in _ALL_EXTENSIONS
    try:
        if os.path.basename(path) == "DICOMDIR" or not stat.S_ISREG(os.stat(path).st_mode):
            return False
        with open(path, "rb") as file:
            return looks_like_dicom(file.read(132))
    except OSError:
        return False


def _printable(path: str | os.PathLike[str]) -> str:
    # A line break or an undecodable byte in a file name must not break the one line of the message
    text = os.fspath(path)
    return text if text.isprintable() else ascii(text)


def _open_file(path: str | os.PathLike[str], name: str) -> MeteredFile:
    try:
        # Before opening: opening a pipe would wait for its writer
        status = os.stat(path)
        if stat.S_ISDIR(status.st_mode):
            raise ImageError(f"{name}: is a folder, expected an image file")
        if not stat.S_ISREG(status.st_mode):
            raise ImageError(f"{name}: is not a regular file")
        if status.st_size == 0:
            raise ImageError(f"{name}: is empty (0 bytes)")
        if status.st_size > MAX_FILE_BYTES:
            raise ImageError(
                f"{name}: is {status.st_size >> 20} MiB large, at most {MAX_FILE_BYTES >> 20} MiB are read"
            )
        return MeteredFile(path, name)
    except FileNotFoundError as error:
        raise ImageError(f"{name}: no such file") from error
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise ImageError(f"{name}: cannot be opened ({reason})") from error


def _recognize(head: bytes, name: str) -> str:
    for magic, format_name in _FORMATS:
        if head.startswith(magic):
            return format_name
    for offset, magic, description in _REFUSED:
        if head[offset : offset + len(magic)] == magic:
            raise ImageError(f"{name}: is {description}, only {_ACCEPTED}")
    raise ImageError(f"{name}: is not an image, or of an unknown kind (only {_ACCEPTED})")


def _open_image(file: Meter, format_name: str, name: str) -> Any:
    """A Pillow image with its header parsed and no pixel decoded."""
    module, class_name = _PLUGINS[format_name]
    plugin = getattr(importlib.import_module(module), class_name)
    file.in_header = True
    try:
        return plugin(file, None)
    except ImageError:
        raise
    except Exception as error:  # as above: nearly anything
        raise _damaged(name, format_name, error) from error
    finally:
        file.in_header = False


def _damaged(name: str, format_name: str, error: Exception) -> ImageError:
    reason = " ".join(str(error).split())[:160] or type(error).__name__
    return ImageError(
        f"{name}: the {format_name} data are damaged, cut short or of an unsupported kind ({reason}): "
        "copy or export the file again"
    )


def _check_header(image: Any, format_name: str, name: str, max_pixels: int) -> None:
    width, height = image.size
    if width * height > max_pixels or max(width, height) > MAX_SIDE:
        raise ImageError(
            f"{name}: declares {width:,} x {height:,} pixels, "
            f"at most {max_pixels:,} in all and {MAX_SIDE:,} on a side are read"
        )
    if min(width, height) < MIN_SIDE:
        raise ImageError(f"{name}: is {width} x {height} pixels, at least {MIN_SIDE} on each side are needed")
    # A JPEG with further pictures inside (MPO) is read: every viewer shows its main picture
    if getattr(image, "is_animated", False) and format_name != "JPEG":
        what = "several pages" if format_name == "TIFF" else "animation frames"
        raise ImageError(f"{name}: holds {what}, expected one image: save the one to judge as its own file")
    if image.mode == "CMYK":
        raise ImageError(f"{name}: is a CMYK (print colour) image: save it as greyscale or RGB")
    if image.mode not in ("1", "L", "LA", "La", "I", "I;16", "I;16B", "P", "PA", "RGB", "RGBA", "YCbCr"):
        raise ImageError(f"{name}: has pixels of kind {image.mode}, save it as 8- or 16-bit greyscale or RGB")


def _sample_bits(image: Any, format_name: str, head: bytes) -> int:
    """Bits of a sample as stored in the file; Pillow's mode no longer tells."""
    if format_name == "PNG":
        return head[24]
    if format_name == "TIFF":
        bits = image.tag_v2.get(258, 1)
        return max(bits) if isinstance(bits, tuple) else int(bits)
    return 8


def _to_grey(image: Any, sample_bits: int, name: str) -> tuple[NDArray[np.uint8], dict[str, Any]]:
    """Grey pixels uint8 (H, W) of a loaded image, and the facts about how they came about."""
    transparent = image.info.get("transparency")
    alpha: NDArray[np.uint8] | None = None
    colour: dict[str, Any] = {}
    inverted = image.format == "TIFF" and image.tag_v2.get(262) == 0
    if image.mode.startswith("I"):
        values = np.asarray(image)
        pixels, bits_stored = _to_8_bits(values, name)
        if inverted:  # Pillow does it for 8 bits, not for 16
            pixels = 255 - pixels
        if isinstance(transparent, int):
            alpha = (values != transparent).astype(np.uint8) * np.uint8(255)  # no array of wider numbers between
        return _over_black(pixels, alpha), _facts(bits_stored, alpha is not None, inverted)
    if image.mode in ("1", "L"):
        pixels = np.asarray(image.convert("L"))
        if isinstance(transparent, int):
            # the PNG gives the level in bits of the file; for 1 bit, some Pillows already spread it
            spread = 255 // (2 ** min(sample_bits, 8) - 1)
            level = 255 * min(transparent, 1) if sample_bits == 1 else transparent * spread
            alpha = (pixels != level).astype(np.uint8) * np.uint8(255)
    else:
        if image.mode in ("P", "PA", "YCbCr") or (image.mode == "RGB" and transparent is not None):
            # 16-bit colours lost their low bytes, so their transparent colour cannot be found again
            has_alpha = image.mode == "PA" or (transparent is not None and sample_bits <= 8)
            image = image.convert("RGBA" if has_alpha else "RGB")
        elif image.mode == "La":
            image = image.convert("LA")
        if image.mode in ("LA", "RGBA"):
            alpha = np.asarray(image.getchannel("A"))
        if image.mode in ("RGB", "RGBA"):
            colour = {"colour": coloured_share(image)}
        pixels = np.asarray(image.convert("L"))
    if sample_bits > 8 and pixels.max() < 64:
        # Pillow keeps the high byte of 16-bit colour; what is left of 14 bits or fewer is too coarse
        raise ImageError(f"{name}: is 16-bit colour that uses 14 bits or fewer: save it as 16-bit greyscale")
    return _over_black(pixels, alpha), {**_facts(sample_bits, alpha is not None, inverted), **colour}


def _facts(bits_stored: int, alpha: bool, inverted: bool) -> dict[str, Any]:
    return {"bits_stored": bits_stored, "alpha": alpha, "inverted": inverted}


def _over_black(pixels: NDArray[np.uint8], alpha: NDArray[np.uint8] | None) -> NDArray[np.uint8]:
    if alpha is None or alpha.min() == 255:
        return pixels
    product = pixels.astype(np.uint16)
    product *= alpha
    product += 127
    product //= 255
    return product.astype(np.uint8)


def _to_8_bits(values: NDArray[Any], name: str) -> tuple[NDArray[np.uint8], int]:
    """Scale integers (H, W) linearly to uint8; also the bits that they use.

    Detectors store 10, 12 or 14 bits in 16-bit files that do not say so; the smallest of 8, 10,
    12, 14 and 16 bits that holds the largest value is taken. No window is guessed: black stays 0.
    """
    if int(values.min()) < 0 or int(values.max()) > 65_535:
        raise ImageError(f"{name}: has pixels outside 0 to 65,535: save it as unsigned 16-bit greyscale")
    bits = next(bits for bits in (8, 10, 12, 14, 16) if int(values.max()) < 2**bits)
    top = 2**bits - 1
    # top is odd, so no value lies halfway and the rounding is the same everywhere
    table = ((np.arange(2**bits, dtype=np.int64) * 510 + top) // (2 * top)).astype(np.uint8)
    return table[values], bits


def _orientation(image: Any) -> int:
    """EXIF orientation 1 to 8; 1 where it is absent, unknown or its block damaged."""
    try:
        value = image.tag_v2.get(274, 1) if image.format == "TIFF" else image.getexif().get(274, 1)
        return int(value) if value in range(1, 9) else 1
    except Exception:  # the pixels are sound; a broken note about them is no reason to refuse them
        return 1


def _upright(pixels: NDArray[np.uint8], orientation: int) -> NDArray[np.uint8]:
    """Undo the EXIF orientation: (H, W) -> (H, W), or (W, H) for 5 to 8. EXIF 2.32, tag 0x0112."""
    if orientation >= 5:
        pixels = pixels.T
    if orientation in (3, 4, 7, 8):
        pixels = pixels[::-1]
    if orientation in (2, 3, 6, 7):
        pixels = pixels[:, ::-1]
    return pixels

"""From bytes to the attributes that are used. Names, identifiers and dates of the patient are not even parsed, but
for what an age is reckoned from.

pydicom says what is wrong with a value by quoting it, so none of its messages, warnings and log lines gets out.
"""

from __future__ import annotations

import math
import re
import threading
import warnings
import zlib
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any

from ..errors import ImageError
from ..limits import MeteredBytes

if TYPE_CHECKING:
    from pydicom import Dataset

MAX_INFLATED = 256 << 20
"""Bytes that a deflated file may grow to: as much as any other file may have."""

MAX_VALUE = 64 << 10
"""Bytes of an attribute that is used. The longest one without pixels is a list of windows with a few hundred bytes."""

MAX_SEQUENCE = 1 << 20
"""Bytes of a sequence that is used: a lookup table has 128 KiB at most."""

DEFLATED = "1.2.840.10008.1.2.1.99"
_NATIVE = {
    (True, True): "1.2.840.10008.1.2",
    (False, True): "1.2.840.10008.1.2.1",
    (False, False): "1.2.840.10008.1.2.2",
}

KEYWORDS = (
    "SpecificCharacterSet", "ImageType", "SOPClassUID", "StudyDate", "AcquisitionDate", "ContentDate", "Modality",
    "PresentationIntentType", "Manufacturer", "ManufacturerModelName", "AnatomicRegionSequence",
    "PatientBirthDate", "PatientSex", "PatientAge", "BodyPartExamined", "ViewPosition", "ImagerPixelSpacing",
    "PatientOrientation", "Laterality", "ImageLaterality",
    "SamplesPerPixel", "PhotometricInterpretation", "PlanarConfiguration", "NumberOfFrames", "Rows", "Columns",
    "PixelSpacing", "BitsAllocated", "BitsStored", "HighBit", "PixelRepresentation", "PixelPaddingValue",
    "PixelPaddingRangeLimit", "BurnedInAnnotation", "WindowCenter", "WindowWidth", "RescaleIntercept",
    "RescaleSlope", "VOILUTFunction", "LossyImageCompression", "ModalityLUTSequence", "VOILUTSequence",
    "ViewCodeSequence", "PresentationLUTShape", "FloatPixelData", "DoubleFloatPixelData", "PixelData",
)  # fmt: skip

_EXPLICIT_VR = re.compile(rb"[A-Z]{2}")


def looks_like_dicom(head: bytes) -> bool:
    """Whether a file that begins with ``head`` (132 bytes or more) is DICOM, with the preamble of PS3.10 or without.

    Without: the first element is one of group 0002 or 0008, with a VR, or with a length as the first ones have.
    """
    if head[128:132] == b"DICM":
        return True
    for order in ("little", "big"):
        group, element = int.from_bytes(head[:2], order), int.from_bytes(head[2:4], order)
        if group in (0x0002, 0x0008) and element < 0x0100:
            implicit = order == "little" and int.from_bytes(head[4:8], order) <= 1024
            return implicit or _EXPLICIT_VR.fullmatch(head[4:6]) is not None
    return False


def parse(content: bytes, name: str) -> tuple[Dataset, str]:
    """The attributes of :data:`KEYWORDS`, and the transfer syntax UID, of a DICOM file's ``content``.

    Where the file names no transfer syntax, the one that its first elements are written in.

    Raises
    ------
    ImageError
        If nothing can be parsed, or a deflated file grows beyond :data:`MAX_INFLATED`; it begins with ``name``.
    """
    try:
        import pydicom
    except ModuleNotFoundError as error:
        raise ImageError(f"{name}: is a DICOM file, which needs pydicom: pip install pydicom") from error
    from pydicom.datadict import tag_for_keyword
    from pydicom.filereader import read_dataset

    tags: list[Any] = [tag_for_keyword(keyword) for keyword in KEYWORDS]
    try:
        with quiet():
            file = MeteredBytes(content, name)
            file.seek(132 if content[128:132] == b"DICM" else 0)
            meta = read_dataset(file, False, True, stop_when=lambda tag, *_: tag >> 16 != 2)
            syntax = text(meta, "TransferSyntaxUID")
            if syntax == DEFLATED:
                # pydicom would inflate without a limit
                inflated = _inflate(content[file.tell() :], name)
                dataset: Any = read_dataset(MeteredBytes(inflated, name), False, True, specific_tags=tags)
            else:
                dataset = pydicom.dcmread(MeteredBytes(content, name), force=True, specific_tags=tags)
                if not syntax:
                    syntax = _NATIVE.get(dataset.original_encoding, "")
    except ImageError:
        raise
    except Exception as error:  # pydicom raises nearly anything; RecursionError of sequences in sequences too
        raise ImageError(
            f"{name}: the DICOM data are damaged or cut short ({type(error).__name__}): send or export the file again"
        ) from None
    if not len(dataset):
        raise ImageError(f"{name}: is a DICOM file without an image in it, or damaged")
    with quiet():
        _check_lengths(dataset, name)
    return dataset, syntax


def _check_lengths(dataset: Dataset, name: str) -> None:
    """Values are converted when they are looked at, and a window of 60 MB would be 30 million numbers."""
    from pydicom.datadict import keyword_for_tag

    for tag, element in dataset.items():  # as they were read: other ways to them convert, and some values cannot be
        found = element.value
        keyword = keyword_for_tag(tag)
        if not isinstance(found, bytes) or keyword.endswith("PixelData"):
            continue
        allowed = MAX_SEQUENCE if keyword.endswith("Sequence") else MAX_VALUE
        if len(found) > allowed:
            raise ImageError(
                f"{name}: its {keyword or 'header'} has {len(found):,} bytes, at most {allowed:,} are read"
            )


def _inflate(compressed: bytes, name: str) -> bytes:
    inflater = zlib.decompressobj(-zlib.MAX_WBITS)
    inflated = inflater.decompress(compressed, MAX_INFLATED)
    if not inflater.eof and inflater.unconsumed_tail:
        raise ImageError(f"{name}: grows beyond {MAX_INFLATED >> 20} MiB when inflated, which no film does")
    return inflated


@contextmanager
def quiet() -> Iterator[None]:
    """No warning and no log line of pydicom or highdicom: theirs quote the header's values.

    What is turned off is the process's, so the first thread that comes turns it off, and the last one on again.
    """
    with _quiet.lock:
        if _quiet.inside == 0:
            _quiet.turn_off()
        _quiet.inside += 1
    try:
        yield
    finally:
        with _quiet.lock:
            _quiet.inside -= 1
            if _quiet.inside == 0:
                _quiet.before.close()


class _Quiet:
    def __init__(self) -> None:
        self.lock, self.inside, self.before = threading.Lock(), 0, ExitStack()

    def turn_off(self) -> None:
        import logging

        self.before.enter_context(warnings.catch_warnings())
        warnings.simplefilter("ignore")
        self.before.callback(logging.disable, logging.root.manager.disable)
        logging.disable(logging.CRITICAL)


_quiet = _Quiet()


# --- one attribute, whatever somebody wrote into it; to be called under quiet() ---


def value(dataset: Dataset, keyword: str) -> Any:
    """The value, None where it is absent, empty or senseless."""
    try:
        found = dataset.get(keyword)
    except Exception:  # converting it failed
        return None
    return None if found is None or (isinstance(found, (str, bytes, list)) and not found) else found


def texts(dataset: Dataset, keyword: str) -> list[str]:
    """All values as text, stripped."""
    found = value(dataset, keyword)
    if found is None:
        return []
    several: Any = found if not isinstance(found, (str, bytes, int, float)) and hasattr(found, "__iter__") else [found]
    return [str(item).strip(" \0") for item in several]


def text(dataset: Dataset, keyword: str) -> str:
    """The first value as text; empty where there is none."""
    return next(iter(texts(dataset, keyword)), "")


def numbers(dataset: Dataset, keyword: str) -> list[float]:
    """All values as finite numbers; none at all where one of them is not."""
    try:
        found = [float(item) for item in texts(dataset, keyword)]
    except ValueError:
        return []
    return found if all(map(math.isfinite, found)) else []


def integer(dataset: Dataset, keyword: str) -> int | None:
    """The first value as a whole number; None where it is not one."""
    found = numbers(dataset, keyword)
    return int(found[0]) if found and found[0].is_integer() else None


def items(dataset: Dataset, keyword: str) -> list[Dataset]:
    """The items of a sequence."""
    found = value(dataset, keyword)
    return (
        list(found) if found is not None and hasattr(found, "__iter__") and not isinstance(found, (str, bytes)) else []
    )

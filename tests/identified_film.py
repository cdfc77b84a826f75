"""A film whose header says who the patient is in every place that a header has, and where to look for it afterwards.

Every attribute of the data dictionary that holds text, a name, a date, a time, a number as text or a UID gets a value
that is found nowhere else: that includes all of the Basic Application Level Confidentiality Profile (PS3.15, table
E.1-1), whatever its edition. Left as they are: what the film needs to be a chest film, which ``facts`` names.
"""

from __future__ import annotations

import base64
import hashlib
import html
import io
import json
import logging
import urllib.parse
import warnings
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import dicom_film
from magsd_runtime.dicom.parsing import KEYWORDS

CHARSETS: dict[str, tuple[Any, str]] = {
    "utf-8": ("ISO_IR 192", "Żółć^Łukasz=山田^太郎"),
    "latin-1": ("ISO_IR 100", "Müßigbrod^Jörg"),
    "iso-2022": (["", "ISO 2022 IR 87"], "Yamada^Tarou=山田^太郎"),
}
# What the test sets itself, or what would make another film of it
_KEPT = {*KEYWORDS, "PatientAge", "PixelAspectRatio", "TimezoneOffsetFromUTC", "LossyImageCompressionRatio",
         "LossyImageCompressionMethod", "NumberOfFrames", "RescaleType"}  # fmt: skip
_DATES = ("PatientBirthDate", "StudyDate", "AcquisitionDate", "ContentDate")


@dataclass(frozen=True)
class Person:
    """The values of one patient: a word in every text, a root of every UID, one date, one time, one number."""

    word: str
    root: str
    date: str
    time: str
    number: str

    def value(self, vr: str, tag: int) -> str | None:
        """A legal value of that VR; None where it can hold none that could be told again."""
        text = f"{self.word}{tag:08X}"
        return {
            "AE": text, "CS": text, "LO": text, "SH": text, "ST": text, "LT": text, "UC": text, "UT": text,
            "UR": f"https://{self.word}.example/{tag:08X}", "PN": f"{text}^Given", "DA": self.date, "TM": self.time,
            "DT": self.date + self.time, "UI": f"{self.root}.{tag}", "IS": self.number, "DS": self.number,
        }.get(vr)  # fmt: skip


ANNA = Person("QZXJVB", "1.2.826.0.1.3680043.10.471147", "19470311", "031415.926535", "1147114711")
BERT = Person("VKWYQH", "1.2.826.0.1.3680043.10.829282", "19480229", "170644.713713", "1829382938")


@contextmanager
def silent() -> Iterator[None]:
    """For what a test does itself."""
    before = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)


@silent()
def film(person: Person, charset: str = "utf-8", **attributes: Any) -> Any:
    """A DX film of ``person`` with everything in it; ``attributes`` replace, None removes."""
    from pydicom import Dataset
    from pydicom._dicom_dict import DicomDictionary
    from pydicom.datadict import dictionary_VR
    from pydicom.tag import Tag

    encoding, name = CHARSETS[charset]
    dataset = dicom_film.film(SpecificCharacterSet=encoding, PatientAge="055Y")
    for tag, (vr, *_, keyword) in DicomDictionary.items():
        value = person.value(vr, tag)
        usable = keyword and keyword not in _KEPT and Tag(tag).group > 0x0007 and Tag(tag).group < 0x5000
        if usable and value is not None:
            dataset.add_new(tag, vr, value)
    for keyword in _DATES:
        setattr(dataset, keyword, person.date)
    dataset.PatientName = f"{person.word}{name}"
    request, inner = Dataset(), Dataset()
    for keyword in ("RequestedProcedureID", "ScheduledProcedureStepDescription", "RequestingPhysician",
                    "AccessionNumber", "StudyInstanceUID", "ReasonForTheRequestedProcedure"):  # fmt: skip
        value = person.value(dictionary_VR(keyword), int(Tag(keyword)))
        setattr(request, keyword, value)
        setattr(inner, keyword, value)
    request.OriginalAttributesSequence = [inner]
    dataset.RequestAttributesSequence = [request]
    dataset.OtherPatientIDsSequence = [inner]
    block = dataset.private_block(0x0009, f"{person.word} PRIVATE", create=True)
    block.add_new(0x01, "LO", f"{person.word}private")
    block.add_new(0x02, "UN", f"{person.word}unknown".encode())
    dataset.file_meta.MediaStorageSOPInstanceUID = dataset.SOPInstanceUID
    dataset.file_meta.SourceApplicationEntityTitle = f"{person.word}SOURCE"
    dataset.file_meta.PrivateInformationCreatorUID = f"{person.root}.2"
    dataset.file_meta.PrivateInformation = f"{person.word}meta".encode()
    dataset.preamble = f"{person.word} in the preamble".encode().ljust(128, b"\0")
    for keyword, value in attributes.items():
        if value is None:
            del dataset[keyword]
        else:
            setattr(dataset, keyword, value)
    return dataset


@silent()
def save(path: Path, dataset: Any) -> Path:
    """Write it as it is, without a word about what is wrong with it."""
    dataset.save_as(path, enforce_file_format=True)
    return path


# --- and is it found again? -----------------------------------------------------------------------


@cache
def spellings(person: Person) -> dict[bytes, str]:
    """Lower-case byte strings that must be in no artefact: what each is of."""
    date, time = person.date, person.time
    texts = {
        "the word": [person.word, f"{person.word}00100020", f"{person.word}{CHARSETS['utf-8'][1]}"],
        "a UID": [person.root],
        "a date": [date, *(f"{date[:4]}{sign}{date[4:6]}{sign}{date[6:]}" for sign in "-./"),
                   f"{date[6:]}.{date[4:6]}.{date[:4]}", f"{date[4:6]}/{date[6:]}/{date[:4]}"],
        "a time": [time, f"{time[:2]}:{time[2:4]}:{time[4:6]}"],
        "a number": [person.number, f"{int(person.number):,}"],
        "the name": ["Müßig", "MÜSSIG", "Żółć", "山田", "太郎", "Łukasz", "Yamada"],
    }  # fmt: skip
    found: dict[bytes, str] = {}
    for what, values in texts.items():
        for value in values:
            for spelling in _encoded(value):
                found[spelling.lower()] = f"{what} ({value})"
    for tag in (0x00100020, 0x00080050, 0x00100010):  # a plain hash of so little is no secret
        for vr in ("LO", "SH", "PN"):
            for value in (person.value(vr, tag), f"{person.word}{CHARSETS['utf-8'][1]}"):
                assert value is not None
                for kind in ("md5", "sha1", "sha256"):
                    found[hashlib.new(kind, value.encode()).hexdigest().encode()] = f"a plain {kind} ({value})"
    return found


def _encoded(value: str) -> Iterator[bytes]:
    for codec in ("utf-8", "latin-1", "utf-16-le", "utf-16-be", "utf-32-le", "iso2022_jp", "shift_jis", "utf-7",
                  "punycode", "unicode_escape"):  # fmt: skip
        try:
            data = value.encode(codec)
        except UnicodeEncodeError:
            continue
        yield data
        if codec in ("utf-8", "latin-1", "utf-16-le"):
            yield data.hex().encode()
            yield urllib.parse.quote_from_bytes(data).encode()
            for start in range(3):  # wherever it lies in what was encoded, less the letters shared with neighbours
                letters = base64.b64encode(bytes(start) + data)[4 if start else 0 : (start + len(data)) // 3 * 4]
                if len(letters) >= 8:  # fewer are there by chance
                    yield letters
    yield json.dumps(value)[1:-1].encode()
    yield html.escape(value).encode("ascii", "xmlcharrefreplace")
    yield ascii(value)[1:-1].encode()


def traces(person: Person, where: str, data: bytes) -> list[str]:
    """What of ``person`` is in ``data``, packed or not."""
    wanted = spellings(person)
    return [
        f"{where}{layer}: {what}"
        for layer, plain in _layers(data)
        for spelling, what in wanted.items()
        if len(spelling) >= 4 and spelling in plain
    ]


def _layers(data: bytes) -> Iterator[tuple[str, bytes]]:
    """``data`` in lower case, and the members of a ZIP (npz); of a PNG all but the pixels, which no search can read:
    what they show is compared between two patients."""
    if data.startswith(b"PK\x03\x04"):
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            for name in archive.namelist():
                yield f" ({name})", name.encode().lower() + b" " + archive.read(name).lower()
    if not data.startswith(b"\x89PNG\r\n\x1a\n"):
        yield "", data.lower()
        return
    at, rest = 8, b""
    while at + 8 <= len(data):
        length, kind = int.from_bytes(data[at : at + 4], "big"), data[at + 4 : at + 8].decode("latin-1")
        assert kind in ("IHDR", "IDAT", "IEND", "PLTE", "pHYs", "tEXt"), f"a {kind} chunk may hold anything"
        rest += b"" if kind == "IDAT" else data[at + 8 : at + 8 + length] + b" "
        at += 12 + length
    yield " (all but pixels)", (rest + data[at:]).lower()


def traces_in_folder(person: Person, folder: Path, *, but: tuple[str, ...] = ()) -> list[str]:
    """Names and contents of everything below ``folder``; of files called ``but`` (globs) the names alone."""
    paths = sorted(folder.rglob("*"))
    names = "\n".join(path.relative_to(folder).as_posix() for path in paths)
    found = traces(person, "a name", names.encode("utf-8", "surrogateescape"))
    for path in paths:
        if path.is_file() and not any(path.match(pattern) for pattern in but):
            found += traces(person, path.relative_to(folder).as_posix(), path.read_bytes())
    return found

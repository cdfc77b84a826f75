"""The film's own header, and what of it a result must repeat to be filed with it.

Patient and study values are copied element by element, after the result was built with placeholders: what a
hospital wrote there is repeated as it is, odd or not, and no library gets to put it into a log or a message.
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from datetime import datetime, timedelta, timezone
from typing import TYPE_CHECKING, Any

from ..dicom.parsing import looks_like_dicom, quiet
from ..errors import UsageError, require

if TYPE_CHECKING:
    from pydicom import Dataset

_UID = re.compile(r"[0-9]+(\.[0-9]+)+")
_ZONE = re.compile(r"([+-])(\d\d)(\d\d)")

# Type 1 and 2 of PS3.3, C.7.1.1 and C.7.2.1: present in every result, empty if the film has none
_REQUIRED = (
    "PatientName", "PatientID", "PatientBirthDate", "PatientSex",
    "StudyInstanceUID", "StudyDate", "StudyTime", "ReferringPhysicianName", "StudyID", "AccessionNumber",
)  # fmt: skip
# Type 3: what tells patients and studies apart, and whether they were de-identified
_OPTIONAL = (
    "IssuerOfPatientID", "IssuerOfPatientIDQualifiersSequence", "TypeOfPatientID", "OtherPatientIDsSequence",
    "PatientBirthTime", "PatientIdentityRemoved", "DeidentificationMethod", "DeidentificationMethodCodeSequence",
    "IssuerOfAccessionNumberSequence", "StudyDescription", "ProcedureCodeSequence",
    "PatientAge", "PatientSize", "PatientWeight",
    "ClinicalTrialSponsorName", "ClinicalTrialProtocolID", "ClinicalTrialProtocolName", "ClinicalTrialSiteID",
    "ClinicalTrialSiteName", "ClinicalTrialSubjectID", "ClinicalTrialSubjectReadingID",
    "ClinicalTrialTimePointID", "ClinicalTrialTimePointDescription",
    "TimezoneOffsetFromUTC",
)  # fmt: skip

_LOSSY = {  # PS3.3, C.7.6.1.1.5.1: the method's name by transfer syntax
    "1.2.840.10008.1.2.4.50": "ISO_10918_1",
    "1.2.840.10008.1.2.4.51": "ISO_10918_1",
    "1.2.840.10008.1.2.4.81": "ISO_14495_1",
    "1.2.840.10008.1.2.4.91": "ISO_15444_1",
}


@dataclass(frozen=True, eq=False)
class Source:
    """The header of one film, without its pixels, its text decoded.

    ``file_bytes`` is the file's size. ``transfer_syntax`` is empty where the file does not name one.
    """

    header: Dataset
    file_bytes: int
    transfer_syntax: str

    def text(self, keyword: str) -> str:
        """One attribute's value as text; empty where it is absent or empty."""
        value = self.header.get(keyword)
        return "" if value is None else str(value)

    @property
    def sop_class_uid(self) -> str:
        return self.text("SOPClassUID")

    @property
    def sop_instance_uid(self) -> str:
        return self.text("SOPInstanceUID")

    @property
    def rows(self) -> int:
        return int(self.header.Rows)

    @property
    def columns(self) -> int:
        return int(self.header.Columns)

    def is_monochrome(self) -> bool:
        return self.text("PhotometricInterpretation") in ("MONOCHROME1", "MONOCHROME2")


def is_dicom(path: str | os.PathLike[str]) -> bool:
    """Whether the file begins as DICOM does: with the preamble of PS3.10, or with group 0002 or 0008."""
    with open(path, "rb") as file:
        return looks_like_dicom(file.read(132))


def read_source(path: str | os.PathLike[str]) -> Source:
    """Read the header of the film at ``path``.

    Raises
    ------
    UsageError
        If the file is not DICOM, or lacks the UIDs by which a result says which film it is about.
    """
    pydicom = require("pydicom", feature="--dicom-out", extra="dicom")
    try:
        if not is_dicom(path):
            raise UsageError("the image is not a DICOM file: DICOM results belong to the study of a DICOM image")
        with quiet():
            header = pydicom.dcmread(path, stop_before_pixels=True, force=True)
            header.decode()
        size = os.path.getsize(path)
    except UsageError:
        raise
    except Exception as error:  # pydicom raises nearly anything, with values of the header in its messages
        raise UsageError(f"the DICOM header cannot be read again ({type(error).__name__})") from error
    for keyword in ("SOPClassUID", "SOPInstanceUID", "StudyInstanceUID", "SeriesInstanceUID"):
        value = str(header.get(keyword) or "")
        if not _UID.fullmatch(value) or len(value) > 64:
            raise UsageError(f"the DICOM header has no valid {keyword}: a result could not be filed with its film")
    if not header.get("Rows") or not header.get("Columns"):
        raise UsageError("the DICOM header has no Rows and Columns")
    syntax = getattr(header, "file_meta", {}).get("TransferSyntaxUID", "")
    return Source(header, size, str(syntax))


def stand_in(source: Source) -> Dataset:
    """The film as highdicom needs it: its own UIDs and size, and empty placeholders for everything personal."""
    from pydicom import Dataset

    dataset = Dataset()
    for keyword in ("SOPClassUID", "SOPInstanceUID", "StudyInstanceUID", "SeriesInstanceUID"):
        setattr(dataset, keyword, source.text(keyword))
    dataset.Rows, dataset.Columns, dataset.SamplesPerPixel = source.rows, source.columns, 1
    for keyword in ("PatientName", "PatientID", "PatientBirthDate", "PatientSex", "StudyID", "AccessionNumber"):
        setattr(dataset, keyword, "")
    dataset.StudyDate = dataset.StudyTime = None
    dataset.Modality = source.text("Modality") or "OT"
    return dataset


def adopt(source: Source, result: Dataset) -> None:
    """Give ``result`` the film's patient and study, in UTF-8, so that any name can be written."""
    from pydicom import DataElement
    from pydicom.config import RAISE
    from pydicom.datadict import dictionary_VR, tag_for_keyword
    from pydicom.valuerep import validate_value

    result.SpecificCharacterSet = "ISO_IR 192"
    for keyword in _REQUIRED + _OPTIONAL:
        tag = tag_for_keyword(keyword)
        assert tag is not None
        if tag in source.header:
            element = source.header[tag]
            try:
                if keyword in _OPTIONAL and element.VR != "SQ":
                    for value in [element.value] if element.VM < 2 else element.value:
                        validate_value(element.VR, str(value), RAISE)
            except ValueError:
                continue  # an age of "62" is not one: it may be left out, so it is
            result[tag] = element
        elif keyword in _REQUIRED:
            result[tag] = DataElement(tag, dictionary_VR(tag), None)


def now(source: Source) -> datetime:
    """The time, in the zone that the film's times are in; the machine's where the film names none."""
    zone = _ZONE.fullmatch(source.text("TimezoneOffsetFromUTC"))
    if zone is None:
        return datetime.now()
    offset = timedelta(hours=int(zone[2]), minutes=int(zone[3]))
    try:
        return datetime.now(timezone(-offset if zone[1] == "-" else offset))
    except ValueError:  # a day or more
        return datetime.now()


def copy_lossy_compression(source: Source, result: Dataset) -> None:
    """Once lossy, always lossy: what was derived from such a film says so (PS3.3, C.7.6.1.1.5).

    The ratio is the film's own value; where that is missing, its pixels' bytes by the file's.
    """
    method = _LOSSY.get(source.transfer_syntax)
    if source.text("LossyImageCompression") != "01" and method is None:
        result.LossyImageCompression = "00"
        return
    header = source.header
    result.LossyImageCompression = "01"
    ratios = header.get("LossyImageCompressionRatio")
    methods = header.get("LossyImageCompressionMethod") or method
    if not ratios:
        raw = source.rows * source.columns * int(header.get("SamplesPerPixel") or 1)
        raw *= max(1, int(header.get("BitsAllocated") or 8) // 8)
        ratios = f"{max(1.0, raw / max(1, source.file_bytes)):.2f}"
    result.LossyImageCompressionRatio = ratios
    if methods:
        result.LossyImageCompressionMethod = methods


def numbers(value: Any) -> list[float]:
    """An attribute's numbers, or none where one of them is missing, no number or not positive."""
    try:
        values = [float(item) for item in ([value] if isinstance(value, (str, int, float)) else list(value or ()))]
    except (TypeError, ValueError):
        return []
    return values if all(0 < item < float("inf") for item in values) else []

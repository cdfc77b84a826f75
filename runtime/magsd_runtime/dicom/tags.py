"""The facts about a film that a prediction records, and none that say who the patient is.

No name, identifier, date or UID of an instance, and no free text but the maker's and the device's. An age of 90 and
above is given as 90: beyond it ages are so rare that they identify.
"""

from __future__ import annotations

import re
from datetime import date
from typing import TYPE_CHECKING, Any

from .parsing import items, numbers, text, texts, value

if TYPE_CHECKING:
    from pydicom import Dataset

OLDEST = 90

# PS3.4, table B.5-1: projection X-ray films, and captures, which digitized films are stored as
FILM_CLASSES = {
    "1.2.840.10008.5.1.4.1.1.1": "CR",
    "1.2.840.10008.5.1.4.1.1.1.1": "DX",
    "1.2.840.10008.5.1.4.1.1.1.1.1": "DX for processing",
    "1.2.840.10008.5.1.4.1.1.7": "secondary capture",
    "1.2.840.10008.5.1.4.1.1.7.2": "secondary capture",
    "1.2.840.10008.5.1.4.1.1.7.3": "secondary capture",
    "1.2.840.10008.5.1.4.1.1.7.4": "secondary capture",
    "1.2.840.10008.5.1.4.1.1.12.1": "XA",
    "1.2.840.10008.5.1.4.1.1.12.2": "XRF",
}

_CODE_STRING = re.compile(r"[A-Z0-9 _]{1,16}")  # VR CS: PS3.5, 6.2
_AGE = re.compile(r"([0-9]{1,3})([DWMY])")
_YEARS = {"D": 1 / 365.25, "W": 7 / 365.25, "M": 1 / 12, "Y": 1.0}


def facts(dataset: Dataset) -> dict[str, Any]:
    """Plain values, None (or an empty list) where the film says nothing; to be called under ``quiet()``.

    sop_class (as in :data:`FILM_CLASSES`), modality, presentation_intent, image_type, view_position, view_codes,
    patient_orientation, laterality, body_part, region_codes, age_years (whole, from 2 years on), sex (M, F, O),
    burned_in_annotation, lossy, photometric_interpretation, presentation_lut_shape, manufacturer, device,
    pixel_spacing_mm (row, column) and spacing_at (detector or patient).
    """
    at_patient, at_detector = numbers(dataset, "PixelSpacing"), numbers(dataset, "ImagerPixelSpacing")
    spacing = at_patient or at_detector
    usable = len(spacing) == 2 and min(spacing) > 0
    return {
        "sop_class": FILM_CLASSES.get(text(dataset, "SOPClassUID")),
        "modality": _code(dataset, "Modality"),
        "presentation_intent": _code(dataset, "PresentationIntentType"),
        "image_type": [part for part in map(str.upper, texts(dataset, "ImageType")) if _CODE_STRING.fullmatch(part)],
        "view_position": _code(dataset, "ViewPosition"),
        "view_codes": _codes(dataset, "ViewCodeSequence"),
        "patient_orientation": [
            part for part in map(str.upper, texts(dataset, "PatientOrientation")) if re.fullmatch("[APRLHF]{1,3}", part)
        ],
        "laterality": _code(dataset, "ImageLaterality") or _code(dataset, "Laterality"),
        "body_part": _code(dataset, "BodyPartExamined"),
        "region_codes": _codes(dataset, "AnatomicRegionSequence"),
        "age_years": age_years(dataset),
        "sex": sex if (sex := _code(dataset, "PatientSex")) in ("M", "F", "O") else None,
        "burned_in_annotation": _code(dataset, "BurnedInAnnotation"),
        "lossy": {"00": False, "01": True}.get(text(dataset, "LossyImageCompression")),
        "photometric_interpretation": _code(dataset, "PhotometricInterpretation"),
        "presentation_lut_shape": _code(dataset, "PresentationLUTShape"),
        "manufacturer": _words(dataset, "Manufacturer"),
        "device": _words(dataset, "ManufacturerModelName"),
        "pixel_spacing_mm": spacing if usable else None,
        "spacing_at": ("patient" if at_patient else "detector") if usable else None,
    }


def age_years(dataset: Dataset) -> float | int | None:
    """The age at the examination, :data:`OLDEST` at most; from the birth date where the film gives none."""
    years = None
    if match := _AGE.fullmatch(text(dataset, "PatientAge").upper()):
        years = int(match[1]) * _YEARS[match[2]]
    elif born := _date(dataset, "PatientBirthDate"):
        days = [_date(dataset, keyword) for keyword in ("StudyDate", "AcquisitionDate", "ContentDate")]
        if taken := next(filter(None, days), None):
            years = (taken - born).days / 365.25
    if years is None or not 0 <= years <= 150:
        return None
    return min(int(years + 1e-9), OLDEST) if years >= 2 else round(years, 2)


def _date(dataset: Dataset, keyword: str) -> date | None:
    found = value(dataset, keyword)
    digits = re.fullmatch(r"([0-9]{4})\.?([0-9]{2})\.?([0-9]{2})", str(found or "").strip())
    if digits is None or digits[1] <= "1902":  # 1900 and 1901 stand for "removed" in de-identified films
        return None
    try:
        return date(int(digits[1]), int(digits[2]), int(digits[3]))
    except ValueError:
        return None


def _code(dataset: Dataset, keyword: str) -> str | None:
    """A code string; what is none of them may be anything, and is left out."""
    found = text(dataset, keyword).upper()
    return found if _CODE_STRING.fullmatch(found) else None


def _codes(dataset: Dataset, keyword: str) -> list[str]:
    """``SCHEME:value`` of each item of a code sequence."""
    found = [(text(item, "CodingSchemeDesignator"), text(item, "CodeValue")) for item in items(dataset, keyword)]
    pattern = re.compile(r"[A-Za-z0-9.-]{1,16}")
    return [f"{scheme}:{code}" for scheme, code in found if pattern.fullmatch(scheme) and pattern.fullmatch(code)]


def _words(dataset: Dataset, keyword: str) -> str | None:
    found = " ".join("".join(letter if letter.isprintable() else " " for letter in text(dataset, keyword)).split())
    return found[:64] or None

"""The overlay as a colour picture in the film's study: what any viewer can show (PS3.3, A.8.1)."""

from __future__ import annotations

from typing import Any

import numpy as np

from ..overlay import draw_overlay
from .case import Case, finish, identity, source_image_item
from .source import copy_lossy_compression, stand_in


def secondary_capture(case: Case) -> Any:
    """Draw the overlay and wrap it: RGB, uncompressed, Secondary Capture Image Storage.

    Burned In Annotation says whether the picture tells who the patient is and when the film was taken (PS3.3,
    C.7.6.1). The panel tells neither, so the flag is the film's own: YES or NO where the film says so, absent
    where it is silent, because nobody looked.
    """
    from highdicom.sc import SCImage
    from pydicom.uid import ExplicitVRLittleEndian

    pixels = np.ascontiguousarray(draw_overlay(case.radiograph, case.heat, case.prediction))
    film = stand_in(case.source)
    dataset: Any = SCImage(
        pixel_array=pixels,
        photometric_interpretation="RGB",
        bits_allocated=8,
        coordinate_system="PATIENT",
        patient_orientation=("L", "F"),  # a placeholder, see below
        study_instance_uid=film.StudyInstanceUID,
        transfer_syntax_uid=ExplicitVRLittleEndian,
        **identity(case, "secondary-capture"),
    )
    # The panel beside the film has no orientation, so the picture as a whole has none (type 2C: may be empty)
    dataset.PatientOrientation = None
    dataset.ConversionType = "WSD"
    dataset.ImageType = ["DERIVED", "SECONDARY", "OTHER"]
    dataset.DerivationDescription = (
        "Film windowed to 8 bits and resized, heat and boxes drawn by magsd where the network attended. "
        "Research use only. Not for clinical use."
    )
    dataset.SourceImageSequence = [source_image_item(case, locations_preserved=False)]
    dataset.BodyPartExamined = case.source.text("BodyPartExamined") or "CHEST"
    annotation = case.source.text("BurnedInAnnotation")
    if annotation in ("YES", "NO"):
        dataset.BurnedInAnnotation = annotation
    copy_lossy_compression(case.source, dataset)
    dataset.DateOfSecondaryCapture = case.when.strftime("%Y%m%d")
    dataset.TimeOfSecondaryCapture = case.when.strftime("%H%M%S")
    return finish(case, dataset)

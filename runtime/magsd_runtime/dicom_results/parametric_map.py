"""The attention as numbers, pixel by pixel of the film: Parametric Map (PS3.3, A.75).

A projection has no place in the patient's coordinates, so neither has the map: no plane position and no
orientation (table A.75-2 asks for them only in a patient-relative frame of reference). What ties the two is
the reference to the film with Spatial Locations Preserved, and equal rows and columns.

The functional groups are put together here: highdicom 0.28's ParametricMap takes no source without coordinates.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..localization import IN_LUNGS
from . import concepts
from .case import Case, coding_schemes, finish, identity, source_image_item
from .concepts import code, private
from .source import copy_lossy_compression, numbers

LEVELS = 255
"""Stored values are 0 to this, and stand for heat of 0 to 1. The map comes from a few hundred cells: more steps
would only make the file larger."""

_SOP_CLASS = "1.2.840.10008.5.1.4.1.1.30"
_IMAGE_TYPE = ["DERIVED", "PRIMARY", "STATIC", "QUANTITY"]  # C.8.32.2.1; STATIC: acquired at one time


def parametric_map(case: Case) -> Any:
    """The heat, as Parametric Map Storage: 16 bits allocated, RLE, one frame as large as the film.

    Raises
    ------
    ValueError
        If the film was not judged: there is no heat.
    """
    if case.heat is None:
        raise ValueError("a film that was not judged has no attention map")
    from highdicom.base import SOPClass
    from pydicom.uid import RLELossless

    dataset: Any = SOPClass(
        study_instance_uid=case.source.text("StudyInstanceUID"),
        sop_class_uid=_SOP_CLASS,
        modality="OT",
        transfer_syntax_uid=RLELossless,
        coding_schemes=coding_schemes(),
        content_qualification="RESEARCH",
        **identity(case, "parametric-map"),
    )
    dataset.ContentLabel = "ATTENTION"
    dataset.ContentDescription = "Where the network attended. Research use only."
    dataset.ContentCreatorName = None
    # A coordinate system of its own: the film has none, or one that says nothing about the patient
    dataset.FrameOfReferenceUID = case.source.text("FrameOfReferenceUID") or case.origin.uid("frame-of-reference")
    dataset.PositionReferenceIndicator = None
    dataset.BodyPartExamined = case.source.text("BodyPartExamined") or "CHEST"
    dataset.AcquisitionContextSequence = []
    _set_pixels(dataset, np.rint(np.nan_to_num(np.clip(case.heat, 0, 1)) * LEVELS).astype(np.uint16))
    copy_lossy_compression(case.source, dataset)
    _set_groups(dataset, case)
    _set_dimension(dataset, case)
    _set_reference(dataset, case)
    return finish(case, dataset)


def _set_pixels(dataset: Any, stored: NDArray[np.uint16]) -> None:
    """Image Pixel (C.7.6.3) and Parametric Map Image (C.8.32.2); ``stored`` is (H, W)."""
    from highdicom.frame import encode_frame
    from pydicom.encaps import encapsulate

    dataset.ImageType = _IMAGE_TYPE
    dataset.Rows, dataset.Columns = stored.shape
    dataset.SamplesPerPixel = 1
    dataset.PhotometricInterpretation = "MONOCHROME2"
    dataset.BitsAllocated = dataset.BitsStored = 16
    dataset.HighBit = 15
    dataset.PixelRepresentation = 0
    dataset.PixelPresentation = "MONOCHROME"
    dataset.PresentationLUTShape = "IDENTITY"
    dataset.BurnedInAnnotation = "NO"  # the map has no text, and nothing of the film
    dataset.RecognizableVisualFeatures = "NO"
    dataset.NumberOfFrames = 1
    frame = encode_frame(
        stored,
        transfer_syntax_uid=dataset.file_meta.TransferSyntaxUID,
        bits_allocated=16,
        bits_stored=16,
        photometric_interpretation="MONOCHROME2",
        pixel_representation=0,
    )
    dataset.PixelData = encapsulate([frame])
    dataset["PixelData"].VR = "OB"  # PS3.5, A.4: encapsulated


def _set_groups(dataset: Any, case: Case) -> None:
    """Functional groups of table A.75-2."""
    from highdicom.pm import RealWorldValueMapping
    from highdicom.sr import CodedConcept
    from pydicom import Dataset

    spacing = numbers(case.source.header.get("PixelSpacing"))
    measures, anatomy, identical, window, frame_type = (Dataset() for _ in range(5))
    if len(spacing) == 2:  # spacing at the detector is another quantity, and would be wrong here
        measures.PixelSpacing = spacing
    anatomy.AnatomicRegionSequence = [CodedConcept.from_code(code(concepts.CHEST))]
    anatomy.FrameLaterality = "U"
    identical.RescaleIntercept, identical.RescaleSlope, identical.RescaleType = "0", "1", "US"
    window.WindowCenter, window.WindowWidth = str((LEVELS + 1) / 2), str(LEVELS + 1)
    frame_type.FrameType = _IMAGE_TYPE
    mapping = RealWorldValueMapping(
        lut_label="ATTENTION",
        lut_explanation=f"{case.map_name}: 0 the lowest, 1 the highest of this film",
        unit=code(concepts.NO_UNITS),
        value_range=(0, LEVELS),
        slope=1 / LEVELS,
        intercept=0.0,
        quantity_definition=private(case.map_name.removesuffix(IN_LUNGS)),
    )
    shared = Dataset()
    shared.PixelMeasuresSequence = [measures]
    shared.FrameAnatomySequence = [anatomy]
    shared.PixelValueTransformationSequence = [identical]
    shared.FrameVOILUTSequence = [window]
    shared.RealWorldValueMappingSequence = [mapping]
    shared.ParametricMapFrameTypeSequence = [frame_type]
    dataset.SharedFunctionalGroupsSequence = [shared]

    content, derivation, frame = Dataset(), Dataset(), Dataset()
    content.DimensionIndexValues = 1
    content.FrameLabel = case.map_name
    derivation.DerivationDescription = "Attention of the network, enlarged to the film's pixels"
    derivation.DerivationCodeSequence = [CodedConcept.from_code(private(case.map_name.removesuffix(IN_LUNGS)))]
    derivation.SourceImageSequence = [source_image_item(case, locations_preserved=True)]
    frame.FrameContentSequence = [content]
    frame.DerivationImageSequence = [derivation]
    dataset.PerFrameFunctionalGroupsSequence = [frame]


def _set_dimension(dataset: Any, case: Case) -> None:
    """Multi-frame Dimension (C.7.6.17): mandatory even for one frame, which the label then indexes."""
    from pydicom import Dataset
    from pydicom.datadict import tag_for_keyword

    organization, index = Dataset(), Dataset()
    organization.DimensionOrganizationUID = index.DimensionOrganizationUID = case.origin.uid("dimension")
    index.DimensionIndexPointer = tag_for_keyword("FrameLabel")
    index.FunctionalGroupPointer = tag_for_keyword("FrameContentSequence")
    index.DimensionDescriptionLabel = "Frame Label"
    dataset.DimensionOrganizationSequence = [organization]
    dataset.DimensionIndexSequence = [index]


def _set_reference(dataset: Any, case: Case) -> None:
    """Common Instance Reference (C.12.2)."""
    from pydicom import Dataset

    instance, series = Dataset(), Dataset()
    instance.ReferencedSOPClassUID = case.source.sop_class_uid
    instance.ReferencedSOPInstanceUID = case.source.sop_instance_uid
    series.SeriesInstanceUID = case.source.text("SeriesInstanceUID")
    series.ReferencedInstanceSequence = [instance]
    dataset.ReferencedSeriesSequence = [series]

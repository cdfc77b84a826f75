"""DICOM results against the standard: attributes that PS3.3 demands.

The lists are from the module tables of PS3.3 (2024e), written down here and not taken from the library that
the results are made with. What other people's tools say is in test_dicom_validator.py.
"""

from __future__ import annotations

from typing import Any

import pytest

import dicom_film
from magsd_runtime.bundle import Bundle
from magsd_runtime.dicom_results import writing
from magsd_runtime.prediction import Decision, Reason

pydicom = pytest.importorskip("pydicom")
pytest.importorskip("highdicom")

# Type 1 attributes must have a value, those of type 2 must be there. Path parts lead into the first item.
_COMMON_1 = (
    "SOPClassUID SOPInstanceUID StudyInstanceUID SeriesInstanceUID Modality "  # C.12.1, C.7.2.1, C.7.3.1
    "SpecificCharacterSet "  # type 1C: the results are in UTF-8
)
_COMMON_2 = (
    "PatientName PatientID PatientBirthDate PatientSex "  # C.7.1.1
    "StudyDate StudyTime ReferringPhysicianName StudyID AccessionNumber "  # C.7.2.1
    "SeriesNumber InstanceNumber Manufacturer "  # C.7.3.1, C.7.5.1
)
_PIXELS_1 = (  # C.7.6.3
    "SamplesPerPixel PhotometricInterpretation Rows Columns BitsAllocated BitsStored HighBit PixelRepresentation "
    "PixelData "
)
_CODE = ("CodeValue", "CodingSchemeDesignator", "CodeMeaning")  # table 8.8-1
_REFERENCE = ("ReferencedSOPClassUID", "ReferencedSOPInstanceUID")  # table 10-11


def _under(prefix: str, *names: str) -> str:
    return "".join(f"{prefix}.{name} " for name in names)


_SHARED, _FRAME = "SharedFunctionalGroupsSequence", "PerFrameFunctionalGroupsSequence"
TYPE_1 = {
    "secondary-capture": _COMMON_1 + _PIXELS_1 + "ConversionType ImageType PlanarConfiguration LossyImageCompression "
    + _under("SourceImageSequence", *_REFERENCE) + _under("SourceImageSequence.PurposeOfReferenceCodeSequence", *_CODE),
    # C.17.1, C.17.2, C.17.3, C.18.8
    "structured-report": _COMMON_1 + "SeriesNumber InstanceNumber CompletionFlag VerificationFlag ContentDate "
    "ContentTime CurrentRequestedProcedureEvidenceSequence ValueType ContinuityOfContent ContentSequence "
    + _under("ConceptNameCodeSequence", *_CODE)
    + _under("ContentTemplateSequence", "MappingResource", "TemplateIdentifier")
    + _under("CodingSchemeIdentificationSequence", "CodingSchemeDesignator"),
    # C.11.10, C.11.11, C.10.4, C.10.5, C.10.7, C.11.6, C.11.8
    "presentation-state": _COMMON_1 + "InstanceNumber ContentLabel PresentationCreationDate PresentationCreationTime "
    "PresentationLUTShape RescaleIntercept RescaleSlope RescaleType "
    + _under("ReferencedSeriesSequence", "SeriesInstanceUID")
    + _under("ReferencedSeriesSequence.ReferencedImageSequence", *_REFERENCE)
    + _under("DisplayedAreaSelectionSequence", "DisplayedAreaTopLeftHandCorner", "DisplayedAreaBottomRightHandCorner",
             "PresentationSizeMode", "PresentationPixelSpacing")
    + _under("GraphicAnnotationSequence", "GraphicLayer")
    + _under("GraphicAnnotationSequence.ReferencedImageSequence", *_REFERENCE)
    + _under("GraphicAnnotationSequence.GraphicObjectSequence", "GraphicAnnotationUnits", "GraphicDimensions",
             "NumberOfGraphicPoints", "GraphicData", "GraphicType", "GraphicFilled")
    + _under("GraphicAnnotationSequence.TextObjectSequence", "AnchorPointAnnotationUnits", "UnformattedTextValue",
             "AnchorPoint", "AnchorPointVisibility")
    + _under("GraphicLayerSequence", "GraphicLayer", "GraphicLayerOrder")
    + _under("SoftcopyVOILUTSequence", "WindowCenter", "WindowWidth"),
    # C.7.4.1, C.7.5.2, C.8.32.2, C.7.6.16, C.7.6.17, C.12.2 and table A.75-2
    "parametric-map": _COMMON_1 + _PIXELS_1 + "FrameOfReferenceUID Manufacturer ManufacturerModelName "
    "DeviceSerialNumber SoftwareVersions ImageType InstanceNumber ContentLabel PixelPresentation ContentQualification "
    "BurnedInAnnotation RecognizableVisualFeatures LossyImageCompression PresentationLUTShape NumberOfFrames "
    "ContentDate ContentTime "
    + _under("DimensionOrganizationSequence", "DimensionOrganizationUID")
    + _under("DimensionIndexSequence", "DimensionOrganizationUID", "DimensionIndexPointer", "FunctionalGroupPointer")
    + _under(f"{_SHARED}.FrameAnatomySequence", "FrameLaterality")
    + _under(f"{_SHARED}.FrameAnatomySequence.AnatomicRegionSequence", *_CODE)
    + _under(f"{_SHARED}.PixelValueTransformationSequence", "RescaleIntercept", "RescaleSlope", "RescaleType")
    + _under(f"{_SHARED}.FrameVOILUTSequence", "WindowCenter", "WindowWidth")
    + _under(f"{_SHARED}.ParametricMapFrameTypeSequence", "FrameType")
    + _under(f"{_SHARED}.RealWorldValueMappingSequence", "RealWorldValueFirstValueMapped", "LUTExplanation",
             "RealWorldValueLastValueMapped", "RealWorldValueIntercept", "RealWorldValueSlope", "LUTLabel")
    + _under(f"{_SHARED}.RealWorldValueMappingSequence.MeasurementUnitsCodeSequence", *_CODE)
    + _under(f"{_FRAME}.FrameContentSequence", "DimensionIndexValues")
    + _under(f"{_FRAME}.DerivationImageSequence.DerivationCodeSequence", *_CODE)
    + _under(f"{_FRAME}.DerivationImageSequence.SourceImageSequence", *_REFERENCE)
    + _under("ReferencedSeriesSequence", "SeriesInstanceUID")
    + _under("ReferencedSeriesSequence.ReferencedInstanceSequence", *_REFERENCE),
}  # fmt: skip
TYPE_2 = {
    "secondary-capture": _COMMON_2 + "PatientOrientation ",
    "structured-report": _COMMON_2 + "ReferencedPerformedProcedureStepSequence PerformedProcedureCodeSequence ",
    "presentation-state": _COMMON_2 + "ContentDescription ContentCreatorName ",
    "parametric-map": _COMMON_2 + "PositionReferenceIndicator ContentDescription ContentCreatorName "
    f"AcquisitionContextSequence {_SHARED}.PixelMeasuresSequence ",
}  # fmt: skip
ENUMERATED = {
    "VerificationFlag": {"UNVERIFIED"},
    "CompletionFlag": {"PARTIAL", "COMPLETE"},
    "PreliminaryFlag": {"PRELIMINARY"},
    "BurnedInAnnotation": {"YES", "NO"},
    "LossyImageCompression": {"00", "01"},
    "ConversionType": {"WSD"},
    "PresentationLUTShape": {"IDENTITY", "INVERSE"},
    "PresentationSizeMode": {"SCALE TO FIT"},
    "GraphicAnnotationUnits": {"PIXEL"},
    "SpatialLocationsPreserved": {"YES", "NO"},
    "ContentQualification": {"RESEARCH"},
    "PixelPresentation": {"MONOCHROME"},
    "FrameLaterality": {"U"},
}


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return dicom_film.bundle(tmp_path_factory.mktemp("bundle") / "b")


FILMS: dict[str, dict[str, Any]] = {
    "dx": {},
    "cr": {
        "SOPClassUID": "1.2.840.10008.5.1.4.1.1.1", "Modality": "CR", "ImagerPixelSpacing": None,
        "PixelSpacing": [0.168, 0.168], "PatientOrientation": None, "BurnedInAnnotation": None,
        "PhotometricInterpretation": "MONOCHROME1",
    },
    "sc": {
        "SOPClassUID": "1.2.840.10008.5.1.4.1.1.7", "Modality": "OT", "BodyPartExamined": None,
        "LossyImageCompression": "01", "PixelSpacing": [1, 1],
    },
}  # fmt: skip


@pytest.fixture(scope="module", params=sorted(FILMS))
def written(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, bundle: Bundle) -> dict[str, Any]:
    """The film's path and its results', for a doubtful film with all that a prediction can have."""
    folder = tmp_path_factory.mktemp("film")
    path = dicom_film.save(folder, **FILMS[request.param])
    result = dicom_film.result(
        bundle,
        status="review",
        reasons=(Reason("unlike_training", "unlike the training films"),),
        decision=Decision("pneumonia", 0.87, "default", 0.5, True),
    )
    return {"film": path, **writing.write_results(folder / "out", path, result, bundle, when=dicom_film.WHEN)}


def find(dataset: Any, path: str) -> Any:
    """The element at ``Sequence.Sequence.Keyword``, through first items; None where it is absent."""
    *sequences, keyword = path.split(".")
    for name in sequences:
        if not dataset.get(name):
            return None
        dataset = dataset[name][0]
    return dataset[keyword] if keyword in dataset else None  # noqa: SIM401 -- get() gives the value


@pytest.mark.parametrize("kind", sorted(TYPE_1))
def test_attributes_that_the_standard_demands_are_there(written: dict[str, Any], kind: str) -> None:
    dataset = pydicom.dcmread(written[kind])
    missing = [path for path in TYPE_1[kind].split() if (e := find(dataset, path)) is None or e.is_empty]
    assert missing == []
    assert [path for path in TYPE_2[kind].split() if find(dataset, path) is None] == []
    checked = 0
    for element in dicom_film.items(dataset):
        if element.keyword in ENUMERATED:
            assert element.value in ENUMERATED[element.keyword], element.keyword
            checked += 1
        assert not element.tag.is_private
    assert checked > 1


@pytest.mark.parametrize("kind", sorted(TYPE_1))
def test_every_value_fits_its_value_representation(written: dict[str, Any], kind: str) -> None:
    from pydicom.config import RAISE
    from pydicom.valuerep import validate_value

    for element in dicom_film.items(pydicom.dcmread(written[kind])):
        if element.VR not in ("SQ", "OB", "OW", "UN"):
            for value in [element.value] if element.VM < 2 else element.value:
                validate_value(element.VR, str(value) if element.VR in ("DS", "IS") else value, RAISE)

"""All that one film's DICOM results are made from, and what they have in common."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, replace
from datetime import datetime
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import NDArray

from .._version import __version__
from ..errors import UsageError
from .concepts import PRIVATE_SCHEME, SOURCE_FOR_PROCESSING, code, long_string
from .identifiers import Origin, canonical_json, device_uid, implementation_class_uid
from .source import Source, adopt

if TYPE_CHECKING:
    from pydicom import Dataset

    from ..bundle import Bundle
    from ..images import Radiograph
    from ..pipeline import Result
    from ..prediction import Prediction

Kind = Literal["secondary-capture", "structured-report", "presentation-state", "parametric-map"]

MANUFACTURER = "magsd"
# Far above what a modality uses, so that viewers list the results after the films
_SERIES_NUMBERS: dict[Kind, int] = {
    "secondary-capture": 9701,
    "structured-report": 9702,
    "presentation-state": 9703,
    "parametric-map": 9704,
}
_DESCRIPTIONS: dict[Kind, str] = {
    "secondary-capture": "magsd overlay. RESEARCH USE ONLY, not for clinical use",
    "structured-report": "magsd report, unverified. RESEARCH USE ONLY",
    "presentation-state": "magsd attended regions. RESEARCH USE ONLY",
    "parametric-map": "magsd attention map. RESEARCH USE ONLY",
}
KINDS: tuple[Kind, ...] = tuple(_SERIES_NUMBERS)


@dataclass(frozen=True, eq=False)
class Case:
    """One judged film.

    ``prediction`` has no path: a file's name may tell who the patient is, and the overlay shows it.
    ``heat`` is float32 (H, W), 0 to 1, in the film's pixels; None where the film was not judged. Heat above
    ``threshold`` makes a region, if somewhere it reaches ``minimum_score``. ``map_name``: which map the heat is
    (``Bundle.localization``). ``when``: the time that the objects say they were made.
    """

    source: Source
    origin: Origin
    prediction: Prediction
    radiograph: Radiograph
    heat: NDArray[np.float32] | None
    threshold: float
    minimum_score: float
    map_name: str
    when: datetime


def make_case(source: Source, result: Result, bundle: Bundle, when: datetime) -> Case:
    """Put a pipeline's result and the film's header together.

    Raises
    ------
    UsageError
        If the header describes an image of another size: the regions would not lie where they belong.
    ValueError
        If the result has no radiograph, or was judged and has no heat.
    """
    radiograph, prediction = result.radiograph, result.prediction
    if radiograph is None or (prediction.label is not None and result.heat is None):
        raise ValueError("DICOM results need a radiograph, and heat where it was judged")
    if (radiograph.height, radiograph.width) != (source.rows, source.columns):
        raise UsageError(
            f"the DICOM header says {source.columns} x {source.rows} pixels, "
            f"{radiograph.width} x {radiograph.height} were judged: the regions would be misplaced"
        )
    settings = {
        "localization": {name: bundle.localization[name] for name in ("map", "threshold")}
        | ({"minimum_score": bundle.minimum_score} if bundle.minimum_score else {}),
        "calibration": bundle.manifest.get("calibration"),
        "acceptance": bundle.manifest.get("acceptance"),
        "classes": list(bundle.classes),
        "name": [bundle.name, bundle.version],
        "precision": prediction.backend.get("precision"),
    }
    origin = Origin(
        source_uid=source.sop_instance_uid,
        pixels_sha256=hashlib.sha256(np.ascontiguousarray(radiograph.pixels).tobytes()).hexdigest(),
        model_sha256=bundle.model_sha256,
        preprocessing_sha256=prediction.preprocessing_sha256,
        parameters=canonical_json(settings),
    )
    return Case(
        source=source,
        origin=origin,
        prediction=replace(prediction, path=""),
        radiograph=radiograph,
        heat=result.heat,
        threshold=float(bundle.localization["threshold"]),
        minimum_score=bundle.minimum_score,
        map_name=str(bundle.localization["map"]),
        when=when,
    )


def identity(case: Case, kind: Kind) -> dict[str, Any]:
    """What every highdicom constructor is told: UIDs, series, equipment."""
    model = case.prediction.model
    return {
        "series_instance_uid": case.origin.uid("series", kind),
        "sop_instance_uid": case.origin.uid("instance", kind),
        "series_number": _SERIES_NUMBERS[kind],
        "instance_number": 1,
        "series_description": _DESCRIPTIONS[kind],
        "manufacturer": MANUFACTURER,
        "manufacturer_model_name": long_string(str(model.get("name") or "magsd")),
        "software_versions": [f"magsd {__version__}", long_string(f"model {model.get('version')}")],
        # The model's identity; 64 hexadecimal digits are exactly what VR LO holds
        "device_serial_number": case.origin.model_sha256[:64],
    }


def observer_uid(case: Case) -> str:
    return device_uid(case.origin.model_sha256, case.origin.preprocessing_sha256)


def region_uid(case: Case, number: int) -> str:
    """One region's tracking UID: the same in the report and in the presentation state."""
    return case.origin.uid("region", str(number))


def region_name(number: int) -> str:
    return f"magsd region {number}"


def coding_schemes() -> list[Any]:
    """Who is responsible for the private codes (PS3.3, C.12.1, Coding Scheme Identification Sequence)."""
    from highdicom.coding_schemes import CodingSchemeIdentificationItem

    return [
        CodingSchemeIdentificationItem(
            designator=PRIVATE_SCHEME, name="Private codes of magsd", responsible_organization="magsd"
        )
    ]


def source_image_item(case: Case, *, locations_preserved: bool) -> Dataset:
    """An item of Source Image Sequence (PS3.3, C.7.6.1)."""
    from highdicom.sr import CodedConcept
    from pydicom import Dataset

    item = Dataset()
    item.ReferencedSOPClassUID = case.source.sop_class_uid
    item.ReferencedSOPInstanceUID = case.source.sop_instance_uid
    item.SpatialLocationsPreserved = "YES" if locations_preserved else "NO"
    item.PurposeOfReferenceCodeSequence = [CodedConcept.from_code(code(SOURCE_FOR_PROCESSING))]
    return item


def finish(case: Case, dataset: Any) -> Any:
    """Patient, study, times and the file's meta information: the same for every kind of object."""
    from pydicom.uid import UID

    adopt(case.source, dataset)
    date, time = case.when.strftime("%Y%m%d"), case.when.strftime("%H%M%S")
    for keyword in ("InstanceCreation", "Content", "PresentationCreation"):
        if keyword == "InstanceCreation" or f"{keyword}Date" in dataset:
            setattr(dataset, f"{keyword}Date", date)
            setattr(dataset, f"{keyword}Time", time)
    for item in dataset.get("ContributingEquipmentSequence", ()):
        item.ContributionDateTime = date + time
    dataset.file_meta.ImplementationClassUID = UID(implementation_class_uid())
    dataset.file_meta.ImplementationVersionName = f"MAGSD {__version__}"[:16]
    return dataset

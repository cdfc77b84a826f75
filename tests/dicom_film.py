"""A chest film as a DICOM file, made up, and a prediction about it."""

from __future__ import annotations

import warnings
from dataclasses import replace
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np

from magsd_runtime.bundle import Bundle, load_bundle
from magsd_runtime.images import Radiograph
from magsd_runtime.pipeline import Result
from magsd_runtime.prediction import Box, Finding, Prediction

DX = "1.2.840.10008.5.1.4.1.1.1.1"
WHEN = datetime(2026, 2, 3, 4, 5, 6)
ROWS, COLUMNS = 150, 130
NAME = "Müller^Jürgen"


def stored_pixels(bits: int = 12) -> np.ndarray:
    """uint16 (150, 130): a bright ground and two dark ellipses, all values within ``bits``."""
    y, x = np.mgrid[0:ROWS, 0:COLUMNS].astype(np.float64)
    grey = 0.8 - 0.5 * np.exp(-((x - 40) ** 2 / 500 + (y - 75) ** 2 / 2500))
    grey -= 0.5 * np.exp(-((x - 92) ** 2 / 500 + (y - 75) ** 2 / 2500))
    return np.rint((2**bits - 1) * np.clip(grey + 0.1 * x / COLUMNS, 0, 1)).astype(np.uint16)


def film(**attributes: Any) -> Any:
    """A DX image for presentation, 12 bits; ``attributes`` are added or replaced, None removes one."""
    from pydicom import Dataset
    from pydicom.dataset import FileMetaDataset

    dataset = Dataset()
    values: dict[str, Any] = {
        "SpecificCharacterSet": "ISO_IR 100",
        "SOPClassUID": DX,
        "SOPInstanceUID": "1.2.3.4.5.6.7",
        "StudyInstanceUID": "1.2.3.4.5",
        "SeriesInstanceUID": "1.2.3.4.5.6",
        "StudyDate": "20250102",
        "StudyTime": "101112",
        "AccessionNumber": "ACC77",
        "Modality": "DX",
        "Manufacturer": "Maker",
        "PresentationIntentType": "FOR PRESENTATION",
        "ReferringPhysicianName": "Doe^Refer",
        "PatientName": NAME,
        "PatientID": "PID-4711",
        "PatientBirthDate": "19610203",
        "PatientSex": "M",
        "PatientAge": "063Y",
        "BodyPartExamined": "CHEST",
        "ImagerPixelSpacing": [0.2, 0.2],
        "StudyID": "S9",
        "SeriesNumber": 3,
        "InstanceNumber": 1,
        "PatientOrientation": ["L", "F"],
        "SamplesPerPixel": 1,
        "PhotometricInterpretation": "MONOCHROME2",
        "Rows": ROWS,
        "Columns": COLUMNS,
        "BitsAllocated": 16,
        "BitsStored": 12,
        "HighBit": 11,
        "PixelRepresentation": 0,
        "RescaleIntercept": "0",
        "RescaleSlope": "1",
        "RescaleType": "US",
        "WindowCenter": "2048",
        "WindowWidth": "4096",
        "BurnedInAnnotation": "NO",
        "LossyImageCompression": "00",
        "PresentationLUTShape": "IDENTITY",
    } | attributes
    for keyword, value in values.items():
        if value is not None:
            setattr(dataset, keyword, value)
    dataset.PixelData = stored_pixels().tobytes()
    dataset["PixelData"].VR = "OW"
    dataset.file_meta = FileMetaDataset()
    dataset.file_meta.TransferSyntaxUID = "1.2.840.10008.1.2.1"
    dataset.file_meta.MediaStorageSOPClassUID = dataset.SOPClassUID
    dataset.file_meta.MediaStorageSOPInstanceUID = values["SOPInstanceUID"] or "1.2"
    return dataset


def save(folder: Path, **attributes: Any) -> Path:
    """The film of :func:`film` as a file whose name tells who the patient is."""
    path = folder / "Muller_Jurgen_PID-4711.dcm"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of values that are wrong on purpose
        film(**attributes).save_as(path, enforce_file_format=True)
    return path


def heat() -> np.ndarray:
    """float32 (150, 130): a hot disc of radius 25 at x 40, y 75, and a cooler one of radius 12 at 95, 100."""
    y, x = np.mgrid[0:ROWS, 0:COLUMNS].astype(np.float64)
    first = np.clip(1 - 0.5 * np.hypot(x - 40, y - 75) / 25, 0, 1)
    second = np.clip(0.8 - 0.3 * np.hypot(x - 95, y - 100) / 12, 0, 1)
    return np.maximum(first, second).astype(np.float32)


def bundle(folder: Path) -> Bundle:
    import tiny_bundle

    if not folder.exists():
        tiny_bundle.build(folder)
    return load_bundle(folder)


def result(bundle: Bundle, path: str = "Muller_Jurgen.dcm", **changes: Any) -> Result:
    """A judged film: pneumonia, two regions where :func:`heat` exceeds 0.5; ``changes`` of the prediction."""
    pixels = (stored_pixels() >> 4).astype(np.uint8)
    prediction = Prediction(
        path=path,
        status="ok",
        label="pneumonia",
        probability=0.87654321,
        probabilities={"covid-19": 0.1, "normal": 0.02345679, "pneumonia": 0.87654321},
        findings=(
            Finding(Box(16, 51, 65, 100), 1.0, 0.1),
            Finding(Box(84, 89, 107, 112), 0.8, 0.02),
        ),
        image={"width": COLUMNS, "height": ROWS},
        model={"name": bundle.name, "version": bundle.version, "sha256": bundle.model_sha256},
        preprocessing_sha256=bundle.preprocessing.sha256(),
        backend={"name": "cpu", "device": "cpu", "precision": "fp32"},
    )
    prediction = replace(prediction, **changes)
    return Result(prediction, None if prediction.label is None else heat(), Radiograph(pixels, {}))


def not_judged(bundle: Bundle, status: Any, *reasons: Any) -> Result:
    """The film refused."""
    return result(bundle, status=status, label=None, probability=None, probabilities=None, findings=(), reasons=reasons)


def items(dataset: Any) -> Any:
    """Every element of a dataset, those of its sequences included."""
    for element in dataset:
        yield element
        if element.VR == "SQ":
            for item in element.value:
                yield from items(item)

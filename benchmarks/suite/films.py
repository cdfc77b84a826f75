"""Drawn films for the benchmarks, of no patient: any size, as PNG, JPEG, 16-bit PNG or DICOM."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import cv2
import numpy as np
from numpy.typing import NDArray

from magsd.phantoms import write_phantoms

Format = Literal["png", "jpg", "png16", "dcm"]
FORMATS: tuple[Format, ...] = ("png", "jpg", "png16", "dcm")
_DRAWN = 1024


def chest(folder: Path, side: int) -> NDArray[np.uint8]:
    """A phantom of ``side`` x ``side`` pixels, uint8, with grain in every pixel: as hard to decode as a film."""
    manifest = folder / "drawn" / "manifest.csv"
    if not manifest.exists():
        write_phantoms(manifest.parent, n_per_class=1, size=_DRAWN, classes=("healthy",))
    drawn = cv2.imread(str(min((manifest.parent / "images").glob("*.png"))), cv2.IMREAD_GRAYSCALE)
    assert drawn is not None
    way = cv2.INTER_AREA if side < _DRAWN else cv2.INTER_CUBIC
    film = np.asarray(cv2.resize(drawn, (side, side), interpolation=way), np.uint8)
    grain = np.random.default_rng(side).integers(-3, 4, (side, side), np.int8)
    return np.asarray(cv2.add(film, grain, dtype=cv2.CV_8U), np.uint8)


def film(folder: Path, side: int, kind: Format = "png") -> Path:
    """The file of that film in ``folder``; written if it is not there yet."""
    path = folder / f"film-{side}{'-16' if kind == 'png16' else ''}.{'png' if kind == 'png16' else kind}"
    if not path.exists():
        folder.mkdir(parents=True, exist_ok=True)
        pixels = chest(folder, side)
        if kind == "dcm":
            write_dicom(path, pixels)
        else:
            # 8 bits as 16: the lower 8 are grain, as in a film of 12 bits or more
            grain = np.random.default_rng(1).integers(0, 256, pixels.shape, np.uint16)
            stored = pixels.astype(np.uint16) * 256 + grain if kind == "png16" else pixels
            if not cv2.imwrite(str(path), stored):
                raise OSError(f"{path}: cannot be written")
    return path


def folder_of(folder: Path, count: int, side: int) -> Path:
    """A folder of ``count`` links to eight different films; made if it is not there yet."""
    links = folder / f"films-{side}-{count}"
    if not links.exists():
        kinds = [film_number(folder, side, number) for number in range(min(8, count))]
        links.mkdir(parents=True)
        for number in range(count):
            (links / f"{number:06}.png").hardlink_to(kinds[number % len(kinds)])
    return links


def film_number(folder: Path, side: int, number: int) -> Path:
    """The film of that size, brighter by ``number`` grey levels: another file, as hard to decode."""
    path = folder / f"film-{side}-number-{number}.png"
    if not path.exists():
        folder.mkdir(parents=True, exist_ok=True)
        if not cv2.imwrite(str(path), cv2.add(chest(folder, side), number)):  # type: ignore[call-overload]
            raise OSError(f"{path}: cannot be written")
    return path


def write_dicom(path: Path, pixels: NDArray[np.uint8]) -> None:
    """An uncompressed DX image for presentation, 12 of 16 bits, of nobody."""
    from pydicom import Dataset
    from pydicom.dataset import FileMetaDataset
    from pydicom.uid import ExplicitVRLittleEndian

    dataset = Dataset()
    values = {
        "SOPClassUID": "1.2.840.10008.5.1.4.1.1.1.1", "SOPInstanceUID": "2.25.1", "StudyInstanceUID": "2.25.2",
        "SeriesInstanceUID": "2.25.3", "Modality": "DX", "PresentationIntentType": "FOR PRESENTATION",
        "PatientName": "", "PatientID": "", "PatientBirthDate": "", "PatientSex": "", "StudyDate": "", "StudyTime": "",
        "StudyID": "", "AccessionNumber": "", "ReferringPhysicianName": "", "SeriesNumber": 1, "InstanceNumber": 1,
        "BodyPartExamined": "CHEST", "ViewPosition": "PA", "ImagerPixelSpacing": [0.2, 0.2],
        "PatientOrientation": ["L", "F"], "SamplesPerPixel": 1, "PhotometricInterpretation": "MONOCHROME2",
        "Rows": pixels.shape[0], "Columns": pixels.shape[1], "BitsAllocated": 16, "BitsStored": 12, "HighBit": 11,
        "PixelRepresentation": 0, "RescaleIntercept": "0", "RescaleSlope": "1", "RescaleType": "US",
        "WindowCenter": "2048", "WindowWidth": "4096", "BurnedInAnnotation": "NO", "LossyImageCompression": "00",
        "PresentationLUTShape": "IDENTITY",
    }  # fmt: skip
    for keyword, value in values.items():
        setattr(dataset, keyword, value)
    dataset.PixelData = (pixels.astype(np.uint16) << 4).tobytes()
    dataset["PixelData"].VR = "OW"
    dataset.file_meta = FileMetaDataset()
    dataset.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    dataset.file_meta.MediaStorageSOPClassUID = dataset.SOPClassUID
    dataset.file_meta.MediaStorageSOPInstanceUID = dataset.SOPInstanceUID
    dataset.save_as(path, enforce_file_format=True)

"""The regions drawn over the untouched film: Grayscale Softcopy Presentation State (PS3.3, A.33.1).

Coordinates count from the top left corner of the first pixel, which is 0, 0 (PS3.3, C.10.5.1.2).
"""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any

import cv2
import numpy as np
from numpy.typing import NDArray

from ..errors import RESEARCH_USE
from ..localization import heat_mask
from ..prediction import Box
from .case import Case, finish, identity, region_name, region_uid
from .concepts import long_string
from .source import numbers, stand_in

if TYPE_CHECKING:
    from pydicom import Dataset

_LAYER = "MAGSD REGIONS"
_MOST_POINTS = 500  # of one contour; its explicit length field ends at 8,191
_CYAN_LAB = (83.0, -39.0, -27.0)  # the boxes' colour in the overlay
_MODALITY_LUT = ("ModalityLUTSequence", "RescaleSlope", "RescaleIntercept", "RescaleType")


def presentation_state(case: Case) -> Any:
    """The film as its modality meant it to look, with box, contour and number of each region, and the result.

    Raises
    ------
    ValueError
        If the film is not grey, was not judged, or has no regions: there is nothing to draw.
    """
    prediction = case.prediction
    if not case.source.is_monochrome() or prediction.label is None or not prediction.findings:
        raise ValueError("a presentation state needs a grey film that was judged, with regions")
    from highdicom import pr
    from highdicom.color import CIELabColor
    from pydicom.uid import ExplicitVRLittleEndian

    film = stand_in(case.source)
    annotation = pr.GraphicAnnotation(
        referenced_images=[film],
        graphic_layer=(layer := _layer(pr, CIELabColor)),
        graphic_objects=_graphics(pr, case),
        text_objects=_texts(pr, case),
    )
    dataset = pr.GrayscaleSoftcopyPresentationState(
        referenced_images=[film],
        content_label="MAGSD",
        content_description="Regions the network attended to. Research use only.",
        graphic_layers=[layer],
        graphic_annotations=[annotation],
        transfer_syntax_uid=ExplicitVRLittleEndian,
        **identity(case, "presentation-state"),
    )
    dataset.BodyPartExamined = case.source.text("BodyPartExamined") or "CHEST"
    for area in dataset.DisplayedAreaSelectionSequence:
        del area.PixelOriginInterpretation  # for tiled images only
        _set_aspect_ratio(area, case.source.header)
    _set_greys(dataset, case.source.header)
    return finish(case, dataset)


def _layer(pr: Any, colour: Any) -> Any:
    return pr.GraphicLayer(
        _LAYER, order=1, description="Where the network attended. Research use only.", display_color=colour(*_CYAN_LAB)
    )


def _graphics(pr: Any, case: Case) -> list[Any]:
    """Of each region its box, and inside it the outline of what exceeds the threshold."""
    objects = []
    shown = None if case.heat is None else heat_mask(case.heat, case.threshold, case.minimum_score)
    for number, finding in enumerate(case.prediction.findings, 1):
        box = finding.box
        corners = [(box.x0, box.y0), (box.x1, box.y0), (box.x1, box.y1), (box.x0, box.y1), (box.x0, box.y0)]
        outlines = [] if shown is None else region_outlines(shown, box)
        for points in (np.array(corners, np.float64), *outlines):
            objects.append(
                pr.GraphicObject(
                    graphic_type="POLYLINE",
                    graphic_data=points,
                    units="PIXEL",
                    tracking_id=region_name(number),
                    tracking_uid=region_uid(case, number),
                )
            )
    return objects


def _texts(pr: Any, case: Case) -> list[Any]:
    prediction = case.prediction
    assert prediction.label is not None
    texts = [
        pr.TextObject(
            str(number),
            units="PIXEL",
            anchor_point=(finding.box.x0, finding.box.y0),
            anchor_point_visible=False,
            tracking_id=region_name(number),
            tracking_uid=region_uid(case, number),
        )
        for number, finding in enumerate(prediction.findings, 1)
    ]
    review = "\r\nNEEDS REVIEW" if prediction.status == "review" else ""
    result = f"{long_string(prediction.label)} {100 * (prediction.probability or 0):.1f} %, by a network{review}"
    texts.append(
        pr.TextObject(
            f"{result}\r\nBoxes: where it attended, not findings\r\n{RESEARCH_USE}",
            units="DISPLAY",
            bounding_box=(0.01, 0.01, 0.6, 0.12),
            text_justification="LEFT",
        )
    )
    return texts


def region_outlines(shown: NDArray[np.bool_], box: Box) -> list[NDArray[np.float64]]:
    """Closed outlines, float64 (N, 2) as x, y, of the regions inside ``box``.

    ``shown`` is (H, W), what belongs to a region. They run through the centres of the outermost pixels, so that half
    a pixel is lost on each side, and are simplified until they deviate by a pixel at most, or by more where they
    have over 500 points.
    """
    x0, y0 = max(0, int(box.x0)), max(0, int(box.y0))
    x1, y1 = min(shown.shape[1], int(np.ceil(box.x1))), min(shown.shape[0], int(np.ceil(box.y1)))
    mask = shown[y0:y1, x0:x1].astype(np.uint8)
    found, _ = cv2.findContours(mask, cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_SIMPLE, offset=(x0, y0))
    outlines = []
    for contour in found:
        tolerance, points = 1.0, cv2.approxPolyDP(contour, 1.0, True)
        while len(points) > _MOST_POINTS:
            tolerance *= 2
            points = cv2.approxPolyDP(contour, tolerance, True)
        if len(points) > 2:
            closed = np.concatenate([points, points[:1]]).reshape(-1, 2)
            outlines.append(closed.astype(np.float64) + 0.5)
    return outlines


def _set_aspect_ratio(area: Dataset, header: Dataset) -> None:
    """Pixels that are not square stay what they are: vertical and horizontal spacing, or their ratio."""
    spacing = numbers(header.get("PixelSpacing") or header.get("ImagerPixelSpacing"))
    ratio = numbers(header.get("PixelAspectRatio"))
    if len(spacing) == 2:
        del area.PresentationPixelAspectRatio
        area.PresentationPixelSpacing = spacing
    elif len(ratio) == 2:
        area.PresentationPixelAspectRatio = [int(value) for value in ratio]


def _set_greys(dataset: Dataset, header: Dataset) -> None:
    """Modality LUT, VOI LUT and polarity of the film itself, so that it looks as it did (PS3.4, N.2)."""
    from pydicom import Dataset

    parts = Dataset()
    for keyword in (*_MODALITY_LUT, "VOILUTSequence", "WindowCenter", "WindowWidth"):
        if header.get(keyword) not in (None, "", []):
            parts[keyword] = copy.deepcopy(header[keyword])
    if "ModalityLUTSequence" in parts:
        dataset.ModalityLUTSequence = parts.ModalityLUTSequence[:1]
    elif "RescaleSlope" in parts and "RescaleIntercept" in parts:
        dataset.RescaleSlope, dataset.RescaleIntercept = parts.RescaleSlope, parts.RescaleIntercept
        dataset.RescaleType = parts.get("RescaleType", "US")  # unspecified units
    item = Dataset()
    if "VOILUTSequence" in parts:
        item.VOILUTSequence = parts.VOILUTSequence[:1]
    elif "WindowCenter" in parts and "WindowWidth" in parts:
        item.WindowCenter, item.WindowWidth = _first(parts.WindowCenter), _first(parts.WindowWidth)
        if header.get("VOILUTFunction"):
            item.VOILUTFunction = header.VOILUTFunction
    if len(item):
        dataset.SoftcopyVOILUTSequence = [item]
    dataset.PresentationLUTShape = "INVERSE" if header.PhotometricInterpretation == "MONOCHROME1" else "IDENTITY"


def _first(value: Any) -> Any:
    return value[0] if isinstance(value, (list, tuple)) or hasattr(value, "append") else value

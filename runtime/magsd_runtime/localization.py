"""Attention becomes a heat map, a mask and boxes, in the original image's pixels.

Runtime and evaluation call these same functions:

    attention (M, h, w), evidence (C, M)
      -> mean_attention_map or class_evidence_map    float32 (h, w)
      -> square_heat                                 float32 (S, S), 0 to 1: the network's square
      -> findings(...), to_original(...)             boxes, heat (H, W): the original image

Source: paper, section 4.4.6 (mean of the maps, upsampled, thresholded, boxes enclose the mask).
"""

from __future__ import annotations

import math

import cv2
import numpy as np
from numpy.typing import NDArray

from .prediction import Box, Finding
from .preprocessing import Framing, PreprocessingSpec, Region, lungs_in_square, placement

# All boundaries that standardize() makes are multiples of 1 / 2048 pixel or coarser; a floating-point
# error below this must not move a box by a whole pixel.
_ROUNDING = 1e-6

IN_LUNGS = "-lungs"
"""Ending of the name of a map of which only the part inside the lung fields counts."""


def mean_attention_map(attention: NDArray[np.floating]) -> NDArray[np.float32]:
    """Mean of the M attention maps: (M, h, w) -> float32 (h, w), at least 0. Paper, section 4.4.6."""
    return attention.mean(axis=0, dtype=np.float64).astype(np.float32)


def class_evidence_map(
    attention: NDArray[np.floating], evidence: NDArray[np.floating], class_index: int
) -> NDArray[np.float32]:
    """Where the evidence for one class comes from: (M, h, w), (C, M) -> float32 (h, w), at least 0.

    The logit of class k is the sum of ``evidence[k]`` over the M maps, so each map, divided by its
    maximum, is weighted by its contribution; contributions against the class are left out.
    A map that is 0 everywhere adds nothing.
    """
    peaks = attention.max(axis=(1, 2)).astype(np.float64)
    positive = np.maximum(evidence[class_index].astype(np.float64), 0.0)
    weights = np.divide(positive, peaks, out=np.zeros_like(positive), where=peaks > 0)
    return np.tensordot(weights, attention.astype(np.float64), axes=1).astype(np.float32)


def localization_map(
    name: str, attention: NDArray[np.floating], evidence: NDArray[np.floating], class_index: int
) -> NDArray[np.float32]:
    """The map that a bundle names: ``attention`` (mean of all) or ``evidence`` (for one class).

    The ending ``-lungs`` of a name is for :func:`square_heat`.

    Raises
    ------
    ValueError
        If ``name`` is neither.
    """
    match name.removesuffix(IN_LUNGS):
        case "attention":
            return mean_attention_map(attention)
        case "evidence":
            return class_evidence_map(attention, evidence, class_index)
    raise ValueError(f"localization map is {name!r}: expected attention or evidence")


def square_heat(
    name: str, coarse: NDArray[np.floating], framing: Framing, spec: PreprocessingSpec
) -> NDArray[np.float32]:
    """A map (h, w) as heat of the network's square: float32 (S, S), 0 to 1.

    With a ``name`` that ends in ``-lungs`` the heat is multiplied by the lung fields, where some were found.
    """
    heat = scale_to_unit(upsample(coarse, spec.size))
    if name.endswith(IN_LUNGS) and framing.lungs_found:
        heat = scale_to_unit(heat * lungs_in_square(framing, spec))
    return heat


def upsample(heat: NDArray[np.floating], size: int) -> NDArray[np.float32]:
    """Bilinear with half-pixel centres, border values repeated: (h, w) -> float32 (size, size)."""
    return _bilinear(heat, size, size)


def scale_to_unit(heat: NDArray[np.floating]) -> NDArray[np.float32]:
    """Minimum to 0, maximum to 1: (h, w) -> float32 (h, w); a constant map has no regions, all 0."""
    values = heat.astype(np.float64)
    low, high = float(values.min()), float(values.max())
    if low == high:
        return np.zeros(heat.shape, np.float32)
    return ((values - low) / (high - low)).astype(np.float32)


def to_original(
    heat_square: NDArray[np.floating], width: int, height: int, spec: PreprocessingSpec, region: Region | None = None
) -> NDArray[np.float32]:
    """Heat of the network's square in the original's pixels: (S, S) -> float32 (height, width).

    Bilinear with half-pixel centres within the part of the square that shows the image. What the
    network never saw (outside the ``region`` of the framing, or the central square of fit ``crop``) is 0.
    """
    (u0, v0, u1, v1), (x0, y0, x1, y1) = _visible(_whole(width, height, spec, region), spec)
    seen = _bilinear(heat_square[v0:v1, u0:u1], x1 - x0, y1 - y0)
    if seen.shape == (height, width):
        return seen
    heat = np.zeros((height, width), np.float32)
    heat[y0:y1, x0:x1] = seen
    return heat


def heat_mask(unit_heat: NDArray[np.floating], threshold: float, minimum_score: float = 0.0) -> NDArray[np.bool_]:
    """Where the heat exceeds ``threshold`` (all 0 to 1): (h, w) -> bool (h, w). As in paper, Eq. 2.

    Of the 8-connected regions only those count whose largest heat reaches ``minimum_score``, and the
    strongest always (hysteresis). A ``minimum_score`` not above the threshold leaves nothing out.
    """
    above = unit_heat > threshold
    if minimum_score <= threshold or not above.any():
        return above
    # Interpolation can leave the largest heat below 1, and so below the minimum
    strong = above & (unit_heat >= min(minimum_score, float(unit_heat.max())))
    count, found = cv2.connectedComponents(above.astype(np.uint8), connectivity=8)
    labels = np.asarray(found, np.int32)
    kept = np.zeros(count, np.bool_)
    kept[labels[strong]] = True
    return kept[labels]


def enclosing_box(mask: NDArray[np.bool_]) -> Box | None:
    """Smallest box around all true pixels of (h, w), in the mask's pixels; None where there is none."""
    rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
    if rows.size == 0:
        return None
    return Box(int(columns[0]), int(rows[0]), int(columns[-1]) + 1, int(rows[-1]) + 1)


def findings(
    unit_heat: NDArray[np.floating],
    threshold: float,
    width: int,
    height: int,
    spec: PreprocessingSpec,
    region: Region | None = None,
    minimum_score: float = 0.0,
) -> tuple[Finding, ...]:
    """Connected regions of ``heat_mask``, largest score first: unit heat (S, S) -> findings.

    Pixels that touch at a corner belong together (8-connected). ``score`` is the region's largest
    heat, at least ``minimum_score`` but for the strongest region's; of equal scores the larger region
    comes first. ``box`` is the smallest box of whole pixels of the original, ``width`` x ``height``, that
    holds the region. A letterbox's padding shows no image and belongs to no region. ``area_fraction`` is the
    region's share of the whole original. ``region``: the part of the film that the network saw, from its framing.
    """
    framed = _whole(width, height, spec, region)
    (u0, v0, u1, v1), _ = _visible(framed, spec)
    where = placement(framed, spec)
    seen = unit_heat[v0:v1, u0:u1]
    mask = heat_mask(seen, threshold, minimum_score).astype(np.uint8)
    count, labels, statistics, _ = cv2.connectedComponentsWithStats(mask, connectivity=8)
    scores = np.zeros(count, np.float64)
    np.maximum.at(scores, np.asarray(labels, np.intp).ravel(), seen.ravel())
    regions: list[tuple[Finding, tuple[int, int]]] = []
    for index in range(1, count):  # 0 is the background
        left, top, columns, rows, area = (int(value) for value in statistics[index])
        box = Box(
            max(framed.x0, math.floor(where.left + (u0 + left) * where.scale_x + _ROUNDING)),
            max(framed.y0, math.floor(where.top + (v0 + top) * where.scale_y + _ROUNDING)),
            min(framed.x1, math.ceil(where.left + (u0 + left + columns) * where.scale_x - _ROUNDING)),
            min(framed.y1, math.ceil(where.top + (v0 + top + rows) * where.scale_y - _ROUNDING)),
        )
        fraction = area * where.scale_x * where.scale_y / (width * height)
        regions.append((Finding(box, float(scores[index]), min(1.0, fraction)), (top, left)))
    regions.sort(key=lambda region: (-region[0].score, -region[0].area_fraction, region[1]))
    return tuple(finding for finding, _ in regions)


def _whole(width: int, height: int, spec: PreprocessingSpec, region: Region | None) -> Region:
    if region is None and spec.crop != "none":
        raise ValueError(f"crop {spec.crop} needs the region that frame() gave")
    return region or Region(0, 0, width, height)


def _visible(region: Region, spec: PreprocessingSpec) -> tuple[tuple[int, int, int, int], tuple[int, int, int, int]]:
    """The part of the square that shows the image, and the part of the original it shows (x0, y0, x1, y1).

    Both have integer edges: standardize() crops, resizes and pads in whole pixels.
    """
    where = placement(region, spec)
    square = (
        max(0, round((region.x0 - where.left) / where.scale_x)),
        max(0, round((region.y0 - where.top) / where.scale_y)),
        min(spec.size, round((region.x1 - where.left) / where.scale_x)),
        min(spec.size, round((region.y1 - where.top) / where.scale_y)),
    )
    image = (
        max(region.x0, round(where.left)),
        max(region.y0, round(where.top)),
        min(region.x1, round(where.left + spec.size * where.scale_x)),
        min(region.y1, round(where.top + spec.size * where.scale_y)),
    )
    return square, image


def _bilinear(heat: NDArray[np.floating], width: int, height: int) -> NDArray[np.float32]:
    source = np.ascontiguousarray(heat, np.float32)
    return np.asarray(cv2.resize(source, (width, height), interpolation=cv2.INTER_LINEAR), np.float32)

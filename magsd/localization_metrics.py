"""How well a heat map lies on boxes or masks drawn by people: IoU, pointing, energy, and two baselines.

Maps, masks and boxes come from :mod:`magsd_runtime.localization`, so what is measured is what the point of
care shows; all of it in pixels of the original image. The IoU of an image (Eq. 12) is, as in section 4.4.6,
that of the thresholded heat with the mask where a mask was drawn, and that of the boxes which enclose
the heat and the ground truth where boxes were drawn.

A threshold is never chosen on the image that it is applied to: see :func:`choose_thresholds`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import cv2
import numpy as np
from numpy.typing import NDArray

from magsd_runtime.localization import enclosing_box, heat_mask, square_heat, to_original
from magsd_runtime.prediction import Box
from magsd_runtime.preprocessing import PreprocessingSpec

from .data import Record
from .ground_truth import Truth, boxes_mask
from .metrics import patient_weights, percentile_interval

THRESHOLDS = np.arange(1, 20) / 20
DEFAULT_THRESHOLD = 0.5
IOU_AT = 0.25
CENTRAL_SHARE = 0.5
"""Side of the fixed central box as a share of the image's: about where the lungs are in a chest film."""


@dataclass(frozen=True, eq=False)
class Case:
    """One localized image and the heat maps (h, w) that one model gave it, by name: attention, evidence."""

    record: Record
    fold: int
    truth: Truth
    heats: Mapping[str, NDArray[np.float32]]


@dataclass(frozen=True, eq=False)
class HeatScores:
    """One heat map against the truth. ``iou``, ``mask_iou``, ``box_iou``: one value a threshold, (T,).

    ``pointing``: whether the hottest pixel lies inside; ``energy``: share of the heat inside, 0 to 1.
    """

    iou: NDArray[np.float64]
    mask_iou: NDArray[np.float64]
    box_iou: NDArray[np.float64]
    pointing: bool
    energy: float


def box_iou(first: Box | None, second: Box | None) -> float:
    """Area of overlap over area of union, 0 to 1 (Eq. 12); 0 where a box is missing."""
    return 0.0 if first is None or second is None else first.overlap(second)


def mask_iou(first: NDArray[np.bool_], second: NDArray[np.bool_]) -> float:
    """Pixels in both over pixels in either, 0 to 1 (Eq. 12); 0 where both are empty."""
    union = int((first | second).sum())
    return int((first & second).sum()) / union if union else 0.0


def unit_heat(heat: NDArray[np.floating], truth: Truth, spec: PreprocessingSpec, name: str = "") -> NDArray[np.float32]:
    """A network's map (h, w) as heat 0 to 1 in the original's pixels (H, W), as the runtime shows map ``name``."""
    square = square_heat(name, heat, truth.framing, spec)
    return to_original(square, truth.width, truth.height, spec, truth.framing.region)


def score_heat(
    heat: NDArray[np.floating],
    truth: Truth,
    thresholds: NDArray[np.float64] = THRESHOLDS,
    minimum_score: float = 0.0,
) -> HeatScores:
    """Heat 0 to 1 (H, W) against the truth, at all ``thresholds`` at once.

    Equal to ``heat_mask`` and ``enclosing_box`` at each threshold, in one pass over the pixels and one more for
    each threshold below ``minimum_score``. The box encloses all regions that count.
    ``pointing`` and ``energy`` are those of the heat, whatever counts.
    """
    count = len(thresholds)
    limits = thresholds.astype(np.float32)  # heat_mask compares in the heat's type
    # level: how many thresholds the heat exceeds; the mask of threshold t are the levels above its index
    level = np.searchsorted(limits, heat.ravel(), side="left")
    inside = truth.mask.ravel()
    predicted = _above(np.bincount(level, minlength=count + 1))
    overlap = _above(np.bincount(level[inside], minlength=count + 1))
    of_masks = overlap / np.maximum(predicted + int(inside.sum()) - overlap, 1)
    rows, columns = heat.max(axis=1), heat.max(axis=0)
    of_boxes = np.array([box_iou(_box_above(rows, columns, value), truth.box) for value in limits])
    for index in np.flatnonzero(thresholds < minimum_score):  # elsewhere every region reaches it
        counted = heat_mask(heat, float(limits[index]), minimum_score)
        of_masks[index] = mask_iou(counted, truth.mask)
        of_boxes[index] = box_iou(enclosing_box(counted), truth.box)
    total = float(heat.sum(dtype=np.float64))
    return HeatScores(
        iou=of_masks if truth.kind == "mask" else of_boxes,
        mask_iou=of_masks,
        box_iou=of_boxes,
        pointing=bool(total > 0 and inside[int(heat.argmax())]),
        energy=float(heat[truth.mask].sum(dtype=np.float64)) / total if total > 0 else 0.0,
    )


def choose_thresholds(
    cases: Sequence[Case],
    scores: Sequence[HeatScores],
    tuning: Mapping[int, Sequence[HeatScores]],
    thresholds: NDArray[np.float64] = THRESHOLDS,
) -> tuple[NDArray[np.int64], str]:
    """The index of the threshold of each case, and how it was chosen: the best mean IoU elsewhere.

    Where ``tuning`` has images for the case's fold, on these: they are from the fold's training side.
    Otherwise on the other patients' images of the evaluated ones, by the same fold's model
    (leave one patient out). With one patient there is nothing to choose on: ``DEFAULT_THRESHOLD``.
    """
    chosen = np.zeros(len(cases), np.int64)
    ways: dict[str, None] = {}
    evaluated = np.stack([score.iou for score in scores])  # (cases, T)
    of_tuning = {fold: np.stack([score.iou for score in part]) for fold, part in tuning.items() if part}
    folds = np.array([case.fold for case in cases])
    patients = np.array([case.record.patient for case in cases], dtype=object)
    for index, case in enumerate(cases):
        basis = of_tuning.get(case.fold)
        way = "chosen on training-side images of each fold"
        if basis is None:
            way = (
                "chosen on the other patients of the evaluated images (leave one patient out), "
                "since no training-side image has a box or mask"
            )
            basis = evaluated[(folds == case.fold) & (patients != case.record.patient)]
        if len(basis):
            chosen[index] = int(basis.mean(axis=0).argmax())
        else:
            way = f"not chosen, {DEFAULT_THRESHOLD}: only one patient has a box or mask"
            chosen[index] = int(np.abs(thresholds - DEFAULT_THRESHOLD).argmin())
        ways[way] = None
    return chosen, "; ".join(ways)


def central_box_scores(case: Case, thresholds: NDArray[np.float64] = THRESHOLDS) -> HeatScores:
    """The fixed central box, ``CENTRAL_SHARE`` of each side; the same at every threshold."""
    truth = case.truth
    margin = (1 - CENTRAL_SHARE) / 2
    x, y = truth.width * margin, truth.height * margin
    box = (x, y, truth.width * CENTRAL_SHARE, truth.height * CENTRAL_SHARE)
    inside = boxes_mask([box], truth.width, truth.height)
    of_boxes = box_iou(Box(x, y, x + box[2], y + box[3]), truth.box)
    of_masks = mask_iou(inside, truth.mask)
    same = np.ones(len(thresholds))
    return HeatScores(
        iou=same * (of_masks if truth.kind == "mask" else of_boxes),
        mask_iou=same * of_masks,
        box_iou=same * of_boxes,
        pointing=bool(truth.mask[truth.height // 2, truth.width // 2]),
        energy=float((inside & truth.mask).sum() / inside.sum()),
    )


def fitted_box_scores(case: Case, thresholds: NDArray[np.float64] = THRESHOLDS) -> HeatScores:
    """A central box whose size is chosen as a map's threshold is: heat that falls linearly from the centre.

    At threshold t the box has 1 - t of each side. The harder baseline: it, too, has seen other boxes.
    """
    return score_heat(fitted_heat(case.truth), case.truth, thresholds)


def fitted_heat(truth: Truth) -> NDArray[np.float32]:
    """Heat of :func:`fitted_box_scores`: 1 at the centre, 0 at the edges, (H, W)."""
    x = np.abs((np.arange(truth.width) + 0.5) / truth.width * 2 - 1)
    y = np.abs((np.arange(truth.height) + 0.5) / truth.height * 2 - 1)
    return (1 - np.maximum(x[np.newaxis], y[:, np.newaxis])).astype(np.float32)


def random_heat(case: Case, spec: PreprocessingSpec, seed: Sequence[int]) -> NDArray[np.float32]:
    """Uniform random values on the network's grid, through the same path as the network's map: heat (H, W)."""
    shape = next(iter(case.heats.values())).shape
    heat = np.random.default_rng(list(seed)).random(shape).astype(np.float32)
    return unit_heat(heat, case.truth, spec)


def regions_iou(counted: NDArray[np.bool_], truth: Truth) -> float:
    """The boxes around each 8-connected region of ``counted`` (H, W), all together, against all drawn boxes.

    :func:`box_iou` holds one box around everything against another, which says little of a film with a box in either
    lung. Against a mask it is :func:`mask_iou`. 0 to 1.
    """
    if truth.kind == "mask":
        return mask_iou(counted, truth.mask)
    count, _, statistics, _ = cv2.connectedComponentsWithStats(counted.astype(np.uint8), connectivity=8)
    boxed = np.zeros_like(counted)
    for left, top, columns, rows in statistics[1:count, :4].tolist():  # 0 is the background
        boxed[top : top + rows, left : left + columns] = True
    return mask_iou(boxed, truth.mask)


def _above(counts: NDArray[np.int64]) -> NDArray[np.int64]:
    """Counts of the levels 0..T -> for each threshold i, how many levels exceed it: sum of counts[i + 1:]."""
    return np.cumsum(counts[::-1])[::-1][1:]


def _box_above(rows: NDArray[np.floating], columns: NDArray[np.floating], threshold: float) -> Box | None:
    vertical, horizontal = np.flatnonzero(rows > threshold), np.flatnonzero(columns > threshold)
    if not len(vertical):
        return None
    return Box(int(horizontal[0]), int(vertical[0]), int(horizontal[-1]) + 1, int(vertical[-1]) + 1)


def mean_interval(
    values: NDArray[np.float64], patients: Sequence[str], resamples: int, seed: int
) -> list[float] | None:
    """95 % interval of the mean, patients drawn with replacement."""
    names, patient = np.unique(np.asarray(patients, dtype=object).astype(str), return_inverse=True)
    if len(names) < 2 or resamples < 1:
        return None
    sums = np.bincount(patient, weights=values, minlength=len(names))
    counts = np.bincount(patient, minlength=len(names))
    means = [
        (weights @ sums) / (weights @ counts)
        for weights in patient_weights(len(names), len(values), resamples=resamples, seed=seed)
    ]
    return percentile_interval(np.concatenate(means))

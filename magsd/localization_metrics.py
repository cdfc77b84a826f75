"""How well a heat map lies on boxes or masks drawn by people: IoU, pointing, energy, and two baselines.

Maps, masks and boxes come from :mod:`magsd_runtime.localization`, so what is measured is what the point of
care shows; all of it in pixels of the original image. The IoU of an image (Eq. 12) is, as in section 4.4.6,
that of the thresholded heat with the mask where a mask was drawn, and that of the boxes which enclose
the heat and the ground truth where boxes were drawn.

A threshold is never chosen on the image that it is applied to: see :func:`choose_thresholds`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from magsd_runtime.localization import IN_LUNGS, enclosing_box, heat_mask, square_heat, to_original
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
RANDOM_DRAWS = 10

Method = Callable[["Case"], "HeatScores"]


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


def summarize(
    cases: Sequence[Case],
    scores: Sequence[HeatScores],
    chosen: NDArray[np.int64],
    *,
    resamples: int = 1000,
    seed: int = 0,
) -> dict[str, Any]:
    """Means over the cases at their chosen thresholds, 0 to 1; ``iou_mean_ci95`` by resampling patients."""
    iou = np.array([score.iou[at] for score, at in zip(scores, chosen)])
    return {
        "iou_mean": float(iou.mean()),
        "iou_mean_ci95": mean_interval(iou, [case.record.patient for case in cases], resamples, seed),
        "iou_at_25": float((iou >= IOU_AT).mean()),
        "mask_iou_mean": float(np.mean([score.mask_iou[at] for score, at in zip(scores, chosen)])),
        "box_iou_mean": float(np.mean([score.box_iou[at] for score, at in zip(scores, chosen)])),
        "pointing": float(np.mean([score.pointing for score in scores])),
        "energy_inside": float(np.mean([score.energy for score in scores])),
    }


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
    truth = case.truth
    x = np.abs((np.arange(truth.width) + 0.5) / truth.width * 2 - 1)
    y = np.abs((np.arange(truth.height) + 0.5) / truth.height * 2 - 1)
    return score_heat((1 - np.maximum(x[np.newaxis], y[:, np.newaxis])).astype(np.float32), truth, thresholds)


def random_map_scores(
    case: Case,
    spec: PreprocessingSpec,
    seed: Sequence[int],
    thresholds: NDArray[np.float64] = THRESHOLDS,
    minimum_score: float = 0.0,
) -> HeatScores:
    """Uniform random values on the network's grid, through the same path as the network's map."""
    shape = next(iter(case.heats.values())).shape
    heat = np.random.default_rng(list(seed)).random(shape).astype(np.float32)
    return score_heat(unit_heat(heat, case.truth, spec), case.truth, thresholds, minimum_score)


def evaluate_localization(
    cases: Sequence[Case],
    tuning: Mapping[int, Sequence[Case]],
    spec: PreprocessingSpec,
    *,
    map_name: str = "attention",
    fixed_threshold: float | None = None,
    minimum_score: float = 0.0,
    resamples: int = 1000,
    seed: int = 0,
    progress: Callable[[int, int], None] | None = None,
) -> tuple[dict[str, Any], list[tuple[Case, float, float]]]:
    """The ``localization`` part of metrics.json, and (case, IoU, threshold) of every image for the panel.

    ``map_name`` is the map of the headline numbers. ``tuning`` holds training-side cases of each fold.
    ``fixed_threshold``, from a bundle, applies to ``map_name`` alone; ``minimum_score`` to all maps, the random ones
    too. Baselines: the fixed central box; a central box with fitted size; random maps, the mean over
    ``RANDOM_DRAWS`` draws.
    """
    grid = THRESHOLDS if fixed_threshold is None else np.unique(np.append(THRESHOLDS, fixed_threshold))
    names = sorted(cases[0].heats)
    if spec.crop == "lungs":
        names += [name + IN_LUNGS for name in names]
    total = len(names) + 2 + RANDOM_DRAWS
    done = 0

    def measure(method: Method) -> tuple[list[HeatScores], NDArray[np.int64], str, dict[str, Any]]:
        nonlocal done
        scores = [method(case) for case in cases]
        basis = {fold: [method(case) for case in part] for fold, part in tuning.items()}
        chosen, way = choose_thresholds(cases, scores, basis, grid)
        done += 1
        if progress is not None:
            progress(done, total)
        return scores, chosen, way, summarize(cases, scores, chosen, resamples=resamples, seed=seed)

    maps: dict[str, dict[str, Any]] = {}
    panel: list[tuple[Case, float, float]] = []
    for name in names:
        scores, chosen, way, summary = measure(_map_method(name, spec, grid, minimum_score))
        if fixed_threshold is not None and name == map_name:
            chosen = np.full(len(cases), int(np.searchsorted(grid, fixed_threshold)), np.int64)
            way = "the bundle's threshold"
            summary = summarize(cases, scores, chosen, resamples=resamples, seed=seed)
        used = grid[chosen]
        maps[name] = {
            **summary, "threshold": float(np.median(used)),
            "threshold_range": [float(used.min()), float(used.max())], "chosen_on": way,
        }  # fmt: skip
        if name == map_name:
            panel = [(case, float(score.iou[at]), float(grid[at])) for case, score, at in zip(cases, scores, chosen)]
    central = measure(lambda case: central_box_scores(case, grid))[3]
    fitted = measure(lambda case: fitted_box_scores(case, grid))[3]
    number = {id(case): index for index, case in enumerate(_all_cases(cases, tuning))}

    def random_method(draw: int) -> Method:
        return lambda case: random_map_scores(case, spec, (seed, draw, number[id(case)]), grid, minimum_score)

    draws = [measure(random_method(draw))[3] for draw in range(RANDOM_DRAWS)]
    random = {
        name: float(np.mean([summary[name] for summary in draws]))
        for name in ("iou_mean", "iou_at_25", "mask_iou_mean", "box_iou_mean", "pointing", "energy_inside")
    }
    kinds = [case.truth.kind for case in cases]
    result = {
        **maps[map_name],
        "map": map_name,
        "minimum_score": minimum_score,
        "images": len({case.record.path for case in cases}),
        "predictions": len(cases),
        "patients": len({case.record.patient for case in cases}),
        "ground_truth": {kind: kinds.count(kind) for kind in sorted(set(kinds))},
        "tuning_images": {str(fold): len(part) for fold, part in sorted(tuning.items())},
        "maps": maps,
        "baselines": {
            "central_box": {**central, "side": CENTRAL_SHARE},
            "central_box_fitted": fitted,
            "random_map": {**random, "draws": RANDOM_DRAWS},
        },
    }
    return result, panel


def _map_method(name: str, spec: PreprocessingSpec, thresholds: NDArray[np.float64], minimum_score: float) -> Method:
    heats = name.removesuffix(IN_LUNGS)

    def method(case: Case) -> HeatScores:
        heat = unit_heat(case.heats[heats], case.truth, spec, name)
        return score_heat(heat, case.truth, thresholds, minimum_score)

    return method


def _all_cases(cases: Sequence[Case], tuning: Mapping[int, Sequence[Case]]) -> list[Case]:
    return [*cases, *(case for fold in sorted(tuning) for case in tuning[fold])]


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

"""Heat maps and baselines over all films with a box or a mask: the ``localization`` part of metrics.json.

Every method (two maps of the network, two central boxes, a random map) is measured alike: its threshold chosen on
other patients, its scores film by film (localization.csv), their means with intervals by patient, the IoU at every
threshold, the distribution of the IoU, and its difference to each baseline, film by film.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from magsd_runtime.localization import IN_LUNGS, heat_mask, to_original
from magsd_runtime.preprocessing import PreprocessingSpec

from .localization_metrics import (
    CENTRAL_SHARE,
    IOU_AT,
    THRESHOLDS,
    Case,
    HeatScores,
    central_box_scores,
    choose_thresholds,
    fitted_box_scores,
    mean_interval,
    random_heat,
    regions_iou,
    score_heat,
    unit_heat,
)

RANDOM_DRAWS = 10
IOU_BINS = 20
MEANS = ("iou_mean", "iou_at_25", "mask_iou_mean", "box_iou_mean", "regions_iou_mean", "pointing", "energy_inside")
"""Scores of a film at its threshold, whose means over films are reported; all 0 to 1."""
WITH_INTERVAL = ("iou_mean", "iou_at_25", "pointing", "energy_inside")
BASELINES = ("central_box", "central_box_fitted", "random_map")

Method = Callable[[Case], HeatScores]


@dataclass(frozen=True, eq=False)
class FilmScores:
    """What localization.csv has a line of: one method on one case, at the threshold chosen for it.

    ``scores``: ``MEANS`` by name. Of the random map they are means over the draws, and there is no ``threshold``.
    """

    case: Case
    method: str
    threshold: float | None
    scores: Mapping[str, float]


@dataclass(frozen=True, eq=False)
class Localization:
    """``summary``: for metrics.json. ``films``: every method on every case, method by method."""

    summary: dict[str, Any]
    films: tuple[FilmScores, ...]

    def panel(self) -> list[tuple[Case, float, float]]:
        """(case, IoU, threshold) of the headline map."""
        return [
            (film.case, film.scores["iou_mean"], film.threshold)
            for film in self.films
            if film.method == self.summary["map"] and film.threshold is not None
        ]


@dataclass(frozen=True, eq=False)
class _Measured:
    """One method on N cases: ``values``: (N,) for each score; ``sweep``: IoU (draws, N, T); ``ious``: (draws * N,)."""

    values: dict[str, NDArray[np.float64]]
    sweep: NDArray[np.float64]
    ious: NDArray[np.float64]
    used: NDArray[np.float64]
    way: str


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
) -> Localization:
    """All maps and baselines on ``cases``.

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

    def measure(
        method: Method, heat_of: Callable[[Case], NDArray[np.float32]] | None, fixed: float | None = None
    ) -> _Measured:
        nonlocal done
        scores = [method(case) for case in cases]
        if fixed is None:
            basis = {fold: [method(case) for case in part] for fold, part in tuning.items()}
            chosen, way = choose_thresholds(cases, scores, basis, grid)
        else:
            chosen = np.full(len(cases), int(np.searchsorted(grid, fixed)), np.int64)
            way = "the bundle's threshold"
        done += 1
        if progress is not None:
            progress(done, total)
        # a single box, as of the baselines, is its own region, so that its mask's IoU is the regions'
        regions = None if heat_of is None else [
            regions_iou(heat_mask(heat_of(case), float(grid[at]), minimum_score), case.truth)
            for case, at in zip(cases, chosen)
        ]  # fmt: skip
        return _at_chosen(scores, chosen, grid, way, regions)

    def of_map(name: str) -> _Measured:
        def heat_of(case: Case) -> NDArray[np.float32]:
            return unit_heat(case.heats[name.removesuffix(IN_LUNGS)], case.truth, spec, name)

        fixed = fixed_threshold if name == map_name else None
        return measure(lambda case: score_heat(heat_of(case), case.truth, grid, minimum_score), heat_of, fixed)

    number = {id(case): index for index, case in enumerate(_all_cases(cases, tuning))}

    def of_draw(draw: int) -> _Measured:
        def heat_of(case: Case) -> NDArray[np.float32]:
            return random_heat(case, spec, (seed, draw, number[id(case)]))

        return measure(lambda case: score_heat(heat_of(case), case.truth, grid, minimum_score), heat_of)

    measured = {name: of_map(name) for name in names}
    measured["central_box"] = measure(lambda case: central_box_scores(case, grid), None)
    measured["central_box_fitted"] = measure(lambda case: fitted_box_scores(case, grid), None)
    measured["random_map"] = _mean_of([of_draw(draw) for draw in range(RANDOM_DRAWS)])

    patients = [case.record.patient for case in cases]

    def interval(values: NDArray[np.float64]) -> list[float] | None:
        return mean_interval(values, patients, resamples, seed)

    maps: dict[str, Any] = {}
    for name in names:
        found = measured[name]
        maps[name] = {
            **_means(found.values, interval),
            **_curves(found, grid),
            "threshold": float(np.median(found.used)),
            "threshold_range": [float(found.used.min()), float(found.used.max())],
            "chosen_on": found.way,
            "beyond": {other: _differences(found, measured[other], interval) for other in BASELINES},
        }
    baselines = {
        name: {**_means(measured[name].values, interval), **_curves(measured[name], grid)} for name in BASELINES
    }
    baselines["central_box"]["side"] = CENTRAL_SHARE
    baselines["random_map"]["draws"] = RANDOM_DRAWS
    kinds = [case.truth.kind for case in cases]
    summary = {
        **maps[map_name],
        "map": map_name,
        "minimum_score": minimum_score,
        "images": len({case.record.path for case in cases}),
        "predictions": len(cases),
        "patients": len(set(patients)),
        "ground_truth": {kind: kinds.count(kind) for kind in sorted(set(kinds))},
        "drawn_share": float(np.mean([case.truth.mask.mean() for case in cases])),
        "drawn_and_seen": float(np.mean([seen_share(case, spec) for case in cases])),
        "tuning_images": {str(fold): len(part) for fold, part in sorted(tuning.items())},
        "maps": maps,
        "baselines": baselines,
        "groups": _groups(cases, measured, resamples, seed),
    }  # fmt: skip
    films = tuple(
        FilmScores(
            case, name, None if name == "random_map" else float(found.used[index]),
            {score: float(values[index]) for score, values in found.values.items()},
        )
        for name, found in measured.items()
        for index, case in enumerate(cases)
    )  # fmt: skip
    return Localization(summary, films)


def seen_share(case: Case, spec: PreprocessingSpec) -> float:
    """The share of what was drawn that lies in the part of the film which the network sees, 0 to 1."""
    truth = case.truth
    everywhere = np.ones((spec.size, spec.size), np.float32)
    seen = to_original(everywhere, truth.width, truth.height, spec, truth.framing.region) > 0
    return float((seen & truth.mask).sum() / truth.mask.sum())


def _at_chosen(
    scores: Sequence[HeatScores], chosen: NDArray[np.int64], grid: NDArray[np.float64], way: str,
    regions: Sequence[float] | None,
) -> _Measured:  # fmt: skip
    def of(name: str) -> NDArray[np.float64]:
        return np.array([getattr(score, name)[at] for score, at in zip(scores, chosen)])

    iou = of("iou")
    values = {
        "iou_mean": iou,
        "iou_at_25": (iou >= IOU_AT).astype(np.float64),
        "mask_iou_mean": of("mask_iou"),
        "box_iou_mean": of("box_iou"),
        "regions_iou_mean": of("mask_iou") if regions is None else np.array(regions, np.float64),
        "pointing": np.array([score.pointing for score in scores], np.float64),
        "energy_inside": np.array([score.energy for score in scores], np.float64),
    }
    return _Measured(values, np.stack([score.iou for score in scores])[np.newaxis], iou, grid[chosen], way)


def _mean_of(draws: Sequence[_Measured]) -> _Measured:
    """Film by film the mean over draws; the distribution is that of all draws."""
    first = draws[0]
    return _Measured(
        {name: np.mean([draw.values[name] for draw in draws], axis=0) for name in first.values},
        np.concatenate([draw.sweep for draw in draws]),
        np.concatenate([draw.ious for draw in draws]),
        first.used,
        first.way,
    )


def _means(
    values: Mapping[str, NDArray[np.float64]], interval: Callable[[NDArray[np.float64]], list[float] | None]
) -> dict[str, Any]:
    result: dict[str, Any] = {}
    for name in MEANS:
        result[name] = float(values[name].mean())
        if name in WITH_INTERVAL:
            result[f"{name}_ci95"] = interval(values[name])
    return result


def _curves(found: _Measured, grid: NDArray[np.float64]) -> dict[str, Any]:
    """Means at every threshold, whose best is known in hindsight only, and counts of IoU in bins over 0 to 1."""
    counts, _ = np.histogram(found.ious, bins=IOU_BINS, range=(0.0, 1.0))
    return {
        "sweep": {
            "threshold": grid.tolist(),
            "iou_mean": found.sweep.mean(axis=(0, 1)).tolist(),
            "iou_at_25": (found.sweep >= IOU_AT).mean(axis=(0, 1)).tolist(),
        },
        "iou_distribution": counts.tolist(),
    }


def _differences(
    found: _Measured, other: _Measured, interval: Callable[[NDArray[np.float64]], list[float] | None]
) -> dict[str, Any]:
    """The map minus a baseline, film by film."""
    result: dict[str, Any] = {}
    for name in WITH_INTERVAL:
        difference = found.values[name] - other.values[name]
        result[name] = float(difference.mean())
        result[f"{name}_ci95"] = interval(difference)
    return result


def _groups(
    cases: Sequence[Case], measured: Mapping[str, _Measured], resamples: int, seed: int
) -> dict[str, dict[str, Any]]:
    """The means of the films with a mask and of those with boxes, and of each class; where there is more than one."""
    keys = {"ground_truth": [case.truth.kind for case in cases], "label": [case.record.label for case in cases]}
    result: dict[str, dict[str, Any]] = {}
    for by, found in keys.items():
        for value in sorted(set(found)) if len(set(found)) > 1 else ():
            rows = [row for row, one in enumerate(found) if one == value]
            patients = [cases[row].record.patient for row in rows]

            def interval(values: NDArray[np.float64], patients: Sequence[str] = patients) -> list[float] | None:
                return mean_interval(values, patients, resamples, seed)

            result.setdefault(by, {})[value] = {
                "images": len({cases[row].record.path for row in rows}),
                "patients": len(set(patients)),
                "predictions": len(rows),
                "methods": {
                    name: _means({score: values[rows] for score, values in one.values.items()}, interval)
                    for name, one in measured.items()
                },
            }
    return result


def _all_cases(cases: Sequence[Case], tuning: Mapping[int, Sequence[Case]]) -> list[Case]:
    return [*cases, *(case for fold in sorted(tuning) for case in tuning[fold])]

"""Means, sweeps, distributions, intervals and groups against loops over films; masks through the geometry and back."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from magsd.data import Record
from magsd.ground_truth import Truth, boxes_mask, read_truth
from magsd.localization_evaluation import (
    BASELINES,
    IOU_BINS,
    RANDOM_DRAWS,
    WITH_INTERVAL,
    Localization,
    evaluate_localization,
    seen_share,
)
from magsd.localization_metrics import (
    THRESHOLDS,
    Case,
    central_box_scores,
    mean_interval,
    random_heat,
    regions_iou,
    score_heat,
    unit_heat,
)
from magsd.metrics import patient_weights
from magsd_runtime.localization import enclosing_box
from magsd_runtime.lungs import packaged_sha256
from magsd_runtime.preprocessing import Framing, PreprocessingSpec, Region, standardize

SPEC = PreprocessingSpec(size=64)
SIDE = 70


def framing_of(spec: PreprocessingSpec, width: int, height: int) -> Framing:
    """All of the film, or as if lungs had been found in its middle."""
    if spec.crop == "none":
        return Framing(width, height, Region(0, 0, width, height))
    region = Region(width // 8, height // 5, width - width // 6, height - height // 9)
    return Framing(width, height, region, np.ones((128, 128), np.bool_))


def drawn(record: Record, mask: np.ndarray, kind: str, spec: PreprocessingSpec = SPEC) -> Truth:
    box = enclosing_box(mask)
    assert box is not None
    return Truth(mask, box, kind, framing_of(spec, mask.shape[1], mask.shape[0]))


def films(seed: int, folds: int = 2) -> list[Case]:
    """Ten films of seven patients, two boxes or a mask each, judged by ``folds`` models with maps of their own."""
    rng = np.random.default_rng(seed)
    cases = []
    for number in range(10):
        x, y = rng.integers(0, 35, 2)
        boxes = ((float(x), float(y), 14.0, 18.0), (float(x) + 18, float(y) + 10, 12.0, 9.0))
        label, patient = ("covid19", "pneumonia")[number % 2], f"p{min(number, 6)}"
        record = Record(Path(f"{number}.png"), label, patient, boxes=boxes)
        mask = boxes_mask(boxes, SIDE, SIDE)
        if label == "covid19":
            mask &= rng.random(mask.shape) < 0.7
        truth = drawn(record, mask, "mask" if label == "covid19" else "box")
        for fold in range(folds):
            heats = {
                name: rng.random((4, 4)).astype(np.float32) + cv2.resize(truth.mask.astype(np.float32), (4, 4))
                for name in ("attention", "evidence")
            }
            cases.append(Case(record, fold, truth, heats))
    return cases


@pytest.fixture(scope="module")
def found() -> tuple[list[Case], Localization]:
    cases = films(3)
    return cases, evaluate_localization(cases, {}, SPEC, resamples=200, seed=5)


def slow_regions(counted: np.ndarray, truth: Truth) -> float:
    """The union of the boxes around the regions, pixel by pixel."""
    left = {(int(row), int(column)) for row, column in zip(*np.nonzero(counted))}
    boxed: set[tuple[int, int]] = set()
    while left:
        region, frontier = set(), [left.pop()]
        while frontier:
            row, column = frontier.pop()
            region.add((row, column))
            near = {(row + dy, column + dx) for dy in (-1, 0, 1) for dx in (-1, 0, 1)} & left
            left -= near
            frontier += near
        rows, columns = [row for row, _ in region], [column for _, column in region]
        boxed |= {
            (row, column)
            for row in range(min(rows), max(rows) + 1)
            for column in range(min(columns), max(columns) + 1)
        }  # fmt: skip
    people = {(int(row), int(column)) for row, column in zip(*np.nonzero(truth.mask))}
    return len(boxed & people) / len(boxed | people)


@settings(max_examples=80, deadline=None)
@given(hnp.arrays(np.bool_, (9, 11)), hnp.arrays(np.bool_, (9, 11)))
def test_regions_are_boxed_one_by_one(counted: np.ndarray, mask: np.ndarray) -> None:
    mask[4, 4] = True
    truth = drawn(Record(Path("a"), "x", "p"), mask, "box")
    assert regions_iou(counted, truth) == pytest.approx(slow_regions(counted, truth))
    as_mask = drawn(Record(Path("a"), "x", "p"), mask, "mask")
    assert regions_iou(counted, as_mask) == pytest.approx((counted & mask).sum() / (counted | mask).sum())


def test_two_boxes_of_a_film_are_not_one_around_both() -> None:
    mask = boxes_mask([(5, 20, 10, 20), (50, 20, 10, 20)], SIDE, SIDE)
    truth = drawn(Record(Path("a"), "x", "p"), mask, "box")
    assert regions_iou(mask, truth) == 1
    assert score_heat(mask.astype(np.float32), truth).box_iou[0] == 1
    between = boxes_mask([(5, 20, 55, 20)], SIDE, SIDE)
    assert score_heat(between.astype(np.float32), truth).box_iou[0] == 1  # as the paper's enclosing box cannot tell
    assert regions_iou(between, truth) == pytest.approx(400 / 1100)


def chosen_slowly(cases: list[Case], ious: list[list[float]], index: int) -> int:
    """The threshold that is best on the other patients' films of the same model; of equal ones the lowest."""
    others = [
        other
        for other, case in enumerate(cases)
        if case.fold == cases[index].fold and case.record.patient != cases[index].record.patient
    ]
    means = [math.fsum(ious[other][at] for other in others) / len(others) for at in range(len(THRESHOLDS))]
    best = max(means)
    return next(at for at, mean in enumerate(means) if mean >= best - 1e-12)


def test_means_sweep_and_distribution_are_those_of_a_loop(found: tuple[list[Case], Localization]) -> None:
    cases, localization = found
    summary = localization.summary
    for name in ("attention", "evidence"):
        heats = [unit_heat(case.heats[name], case.truth, SPEC) for case in cases]
        ious = [score_heat(heat, case.truth).iou.tolist() for heat, case in zip(heats, cases)]
        at = [chosen_slowly(cases, ious, index) for index in range(len(cases))]
        own = [ious[index][at[index]] for index in range(len(cases))]
        row = summary["maps"][name]
        assert row["iou_mean"] == pytest.approx(sum(own) / len(own))
        assert row["iou_at_25"] == pytest.approx(sum(iou >= 0.25 for iou in own) / len(own))
        for index in range(len(THRESHOLDS)):
            column = [one[index] for one in ious]
            assert row["sweep"]["iou_mean"][index] == pytest.approx(sum(column) / len(column))
            assert row["sweep"]["iou_at_25"][index] == pytest.approx(sum(iou >= 0.25 for iou in column) / len(column))
        counts = [sum(k / IOU_BINS <= iou < (k + 1) / IOU_BINS for iou in own) for k in range(IOU_BINS)]
        assert row["iou_distribution"] == counts
        regions = [
            regions_iou(heat > np.float32(THRESHOLDS[where]), case.truth) for heat, where, case in zip(heats, at, cases)
        ]
        assert row["regions_iou_mean"] == pytest.approx(sum(regions) / len(regions))
        lines = [film for film in localization.films if film.method == name]
        assert [film.scores["iou_mean"] for film in lines] == pytest.approx(own)
        assert [film.threshold for film in lines] == pytest.approx([float(THRESHOLDS[where]) for where in at])
    assert sum(summary["baselines"]["random_map"]["iou_distribution"]) == RANDOM_DRAWS * len(cases)
    assert summary["drawn_share"] == pytest.approx(sum(case.truth.mask.mean() for case in cases) / len(cases))
    assert summary["drawn_and_seen"] == 1


def test_the_random_map_is_the_mean_over_its_draws(found: tuple[list[Case], Localization]) -> None:
    cases, localization = found
    energy, hits = [], []
    for draw in range(RANDOM_DRAWS):
        for number, case in enumerate(cases):
            heat = random_heat(case, SPEC, (5, draw, number))
            energy.append(float(heat[case.truth.mask].sum() / heat.sum()))
            hits.append(bool(case.truth.mask.ravel()[heat.argmax()]))
    row = localization.summary["baselines"]["random_map"]
    assert row["energy_inside"] == pytest.approx(np.mean(energy), rel=1e-5)
    assert row["pointing"] == pytest.approx(np.mean(hits))


def slow_interval(values: list[float], patients: list[str], resamples: int, seed: int) -> list[float]:
    """Each resample as a list of films: those of a patient as often as the patient was drawn."""
    names = sorted(set(patients))
    means = []
    for weights in np.concatenate(list(patient_weights(len(names), len(values), resamples=resamples, seed=seed))):
        films = [
            value
            for name, times in zip(names, weights)
            for _ in range(int(times))
            for value, patient in zip(values, patients)
            if patient == name
        ]
        means.append(math.fsum(films) / len(films))
    return [float(np.percentile(means, at)) for at in (2.5, 97.5)]


@settings(max_examples=15, deadline=None)
@given(st.lists(st.tuples(st.floats(0, 1), st.sampled_from("abcde")), min_size=2, max_size=12), st.integers(0, 99))
def test_intervals_draw_patients_with_all_their_films(rows: list[tuple[float, str]], seed: int) -> None:
    values, patients = [value for value, _ in rows], [name for _, name in rows]
    result = mean_interval(np.array(values), patients, 60, seed)
    if len(set(patients)) < 2:
        assert result is None
    else:
        assert result == pytest.approx(slow_interval(values, patients, 60, seed))


def test_intervals_of_every_score_and_of_differences(found: tuple[list[Case], Localization]) -> None:
    cases, localization = found
    patients = [case.record.patient for case in cases]
    by_method: dict[str, dict[str, list[float]]] = {}
    for film in localization.films:
        scores = by_method.setdefault(film.method, {name: [] for name in WITH_INTERVAL})
        for name in WITH_INTERVAL:
            scores[name].append(film.scores[name])
    summary = localization.summary
    for method, row in {**summary["maps"], **summary["baselines"]}.items():
        for name in WITH_INTERVAL:
            assert row[f"{name}_ci95"] == pytest.approx(slow_interval(by_method[method][name], patients, 200, 5))
    for other in BASELINES:
        difference = [a - b for a, b in zip(by_method["attention"]["iou_mean"], by_method[other]["iou_mean"])]
        row = summary["maps"]["attention"]["beyond"][other]
        assert row["iou_mean"] == pytest.approx(math.fsum(difference) / len(difference))
        assert row["iou_mean_ci95"] == pytest.approx(slow_interval(difference, patients, 200, 5))


def test_masks_and_boxes_and_classes_are_also_told_apart(found: tuple[list[Case], Localization]) -> None:
    _, localization = found
    groups = localization.summary["groups"]
    assert {by: set(values) for by, values in groups.items()} == {
        "ground_truth": {"box", "mask"}, "label": {"covid19", "pneumonia"},
    }  # fmt: skip
    for method in ("evidence", "central_box", "random_map"):
        own = [
            film.scores["pointing"]
            for film in localization.films
            if film.method == method and film.case.truth.kind == "mask"
        ]
        row: dict[str, Any] = groups["ground_truth"]["mask"]
        assert (row["images"], row["predictions"], len(own)) == (5, 10, 10)
        assert row["methods"][method]["pointing"] == pytest.approx(sum(own) / len(own))
    alone = [case for case in films(3) if case.record.label == "covid19"]
    assert evaluate_localization(alone, {}, SPEC, resamples=10).summary["groups"] == {}


def bilinear(grid: np.ndarray, x: float, y: float) -> float:
    """The value at (x, y), with pixel centres at halves and border values repeated."""
    height, width = grid.shape
    x, y = min(max(x - 0.5, 0), width - 1), min(max(y - 0.5, 0), height - 1)
    x0, y0 = int(x), int(y)
    x1, y1 = min(x0 + 1, width - 1), min(y0 + 1, height - 1)
    upper = grid[y0, x0] * (1 - x + x0) + grid[y0, x1] * (x - x0)
    lower = grid[y1, x0] * (1 - x + x0) + grid[y1, x1] * (x - x0)
    return float(upper * (1 - y + y0) + lower * (y - y0))


SPECS = [
    SPEC,
    PreprocessingSpec(size=64, fit="letterbox"),
    PreprocessingSpec(size=64, fit="crop"),
    PreprocessingSpec(size=64, crop="lungs", lungs_sha256=packaged_sha256()),
    PreprocessingSpec(size=64, crop="lungs", fit="letterbox", lungs_sha256=packaged_sha256()),
]


@pytest.mark.parametrize("spec", SPECS, ids=lambda spec: f"{spec.crop}-{spec.fit}")
@pytest.mark.parametrize(("width", "height"), [(150, 110), (97, 160)])
def test_a_mask_seen_by_the_network_comes_back_onto_itself(spec: PreprocessingSpec, width: int, height: int) -> None:
    """What is drawn goes through the preprocessing's own resize; a map hot exactly there must lie on the drawn mask."""
    y, x = np.mgrid[0:height, 0:width]
    mask = ((x - 0.45 * width) / (0.14 * width)) ** 2 + ((y - 0.55 * height) / (0.17 * height)) ** 2 < 1
    truth = drawn(Record(Path("a"), "x", "p"), mask, "mask", spec)
    plain = PreprocessingSpec(**{**spec.to_dict(), "clahe_clip": 0.0})
    seen = standardize(np.where(mask, 255, 0).astype(np.uint8), plain, truth.framing).astype(np.float32)
    heat = unit_heat(seen, truth, spec)
    scores = score_heat(heat, truth)
    assert scores.mask_iou[9] > 0.93  # half of the heat: the edge
    assert scores.energy > 0.93
    assert scores.pointing
    assert seen_share(Case(Record(Path("a"), "x", "p"), 0, truth, {}), spec) == 1
    shifted = np.roll(seen, 5, axis=1)
    assert score_heat(unit_heat(shifted, truth, spec), truth).mask_iou[9] < 0.85


@pytest.mark.parametrize("spec", SPECS, ids=lambda spec: f"{spec.crop}-{spec.fit}")
def test_heat_at_a_pixel_is_that_of_its_place_in_the_square(spec: PreprocessingSpec) -> None:
    """Pixel by pixel from the formulas: where a centre of the film lies in the square, and the square's heat there."""
    width, height = 90, 130
    truth = drawn(Record(Path("a"), "x", "p"), np.ones((height, width), np.bool_), "mask", spec)
    coarse = np.random.default_rng(2).random((4, 4)).astype(np.float32)
    square = np.array([[bilinear(coarse, (u + 0.5) / 16, (v + 0.5) / 16) for u in range(64)] for v in range(64)])
    square = (square - square.min()) / (square.max() - square.min())
    heat = unit_heat(coarse, truth, spec)
    x0, y0, x1, y1 = truth.framing.region
    w, h = x1 - x0, y1 - y0
    if spec.fit == "stretch":
        scale_x, scale_y, left, top = w / 64, h / 64, float(x0), float(y0)
    else:
        side = max(w, h) if spec.fit == "letterbox" else min(w, h)
        scale_x = scale_y = side / 64
        left, top = x0 + (w - side) / 2, y0 + (h - side) / 2
    rng = np.random.default_rng(1)
    differences = []
    for _ in range(400):
        column, row = int(rng.integers(0, width)), int(rng.integers(0, height))
        u, v = (column + 0.5 - left) / scale_x, (row + 0.5 - top) / scale_y
        inside = x0 <= column < x1 and y0 <= row < y1 and 0 < u < 64 and 0 < v < 64
        near = min(abs(u), abs(v), abs(64 - u), abs(64 - v)) < 1  # whole pixels of padding or crop are rounded there
        if inside and not near:
            differences.append(abs(heat[row, column] - bilinear(square, u, v)))
        elif not inside and not near:
            assert heat[row, column] == 0
    assert len(differences) > 100
    assert max(differences) < 0.03  # half a pixel of the square, where letterbox and crop round theirs


def test_what_lies_outside_of_what_the_network_sees_counts_as_missed() -> None:
    spec = SPECS[3]
    width, height = 150, 110
    mask = np.zeros((height, width), np.bool_)
    mask[:, :] = True
    case = Case(Record(Path("a"), "x", "p"), 0, drawn(Record(Path("a"), "x", "p"), mask, "mask", spec), {})
    x0, y0, x1, y1 = case.truth.framing.region
    assert seen_share(case, spec) == pytest.approx((x1 - x0) * (y1 - y0) / (width * height))
    ramp = np.tile(np.arange(1, 5, dtype=np.float32), (4, 1))
    assert score_heat(unit_heat(ramp, case.truth, spec), case.truth).mask_iou.max() < seen_share(case, spec)


@pytest.mark.parametrize("kind", ["8 bit", "0 and 1", "1 bit", "16 bit", "colour", "labels", "jpeg"])
def test_masks_of_every_usual_kind_are_the_same_pixels(tmp_path: Path, kind: str) -> None:
    from PIL import Image

    expected = np.zeros((80, 100), np.bool_)
    expected[19:42, 27:66] = True  # beside the edges of JPEG's blocks
    expected[42:57, 27:44] = True
    film, file = tmp_path / "film.png", tmp_path / ("mask.jpg" if kind == "jpeg" else "mask.png")
    cv2.imwrite(str(film), np.random.default_rng(0).integers(0, 255, (80, 100)).astype(np.uint8))
    eight = np.where(expected, 255, 0).astype(np.uint8)
    match kind:
        case "1 bit":
            Image.fromarray(eight).convert("1").save(file)
        case "16 bit":
            cv2.imwrite(str(file), expected.astype(np.uint16))
        case "0 and 1":
            cv2.imwrite(str(file), expected.astype(np.uint8))
        case "colour":
            cv2.imwrite(str(file), np.stack([eight * 0, eight * 0, eight], axis=2))
        case "labels":
            labelled = expected.astype(np.uint8)
            labelled[42:57] *= 2
            cv2.imwrite(str(file), labelled)
        case "jpeg":
            cv2.imwrite(str(file), eight, [cv2.IMWRITE_JPEG_QUALITY, 60])
        case _:
            cv2.imwrite(str(file), eight)
    truth = read_truth(Record(film, "sick", "p", mask=file), PreprocessingSpec())
    if kind == "jpeg":  # its edge may move, its surroundings are not drawn
        assert (truth.mask ^ expected).sum() <= 0.02 * expected.sum()
    else:
        np.testing.assert_array_equal(truth.mask, expected)


def test_the_central_box_against_a_mask_is_counted_pixel_by_pixel() -> None:
    mask = np.random.default_rng(4).random((40, 60)) < 0.3
    case = Case(Record(Path("a"), "x", "p"), 0, drawn(Record(Path("a"), "x", "p"), mask, "mask"), {})
    inside = {(row, column) for row in range(10, 30) for column in range(15, 45)}
    people = {(int(row), int(column)) for row, column in zip(*np.nonzero(mask))}
    scores = central_box_scores(case)
    assert scores.iou.tolist() == pytest.approx([len(inside & people) / len(inside | people)] * len(THRESHOLDS))
    assert scores.energy == pytest.approx(len(inside & people) / len(inside))
    assert scores.pointing == mask[20, 30]

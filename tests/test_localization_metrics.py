"""IoU against sets of pixels, one-pass scores against the runtime's masks and boxes, fair thresholds."""

from __future__ import annotations

import json
from pathlib import Path

import cv2
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from magsd.data import Record
from magsd.ground_truth import Truth, boxes_mask, read_truth
from magsd.localization_evaluation import RANDOM_DRAWS, evaluate_localization
from magsd.localization_metrics import (
    THRESHOLDS,
    Case,
    HeatScores,
    box_iou,
    central_box_scores,
    choose_thresholds,
    fitted_box_scores,
    mask_iou,
    score_heat,
    unit_heat,
)
from magsd_runtime.errors import DataError
from magsd_runtime.localization import IN_LUNGS, enclosing_box, findings, heat_mask, square_heat
from magsd_runtime.lungs import packaged_sha256
from magsd_runtime.prediction import Box
from magsd_runtime.preprocessing import Framing, PreprocessingSpec, Region

SPEC = PreprocessingSpec(size=64)


def pixels_of(box: Box) -> set[tuple[int, int]]:
    return {(x, y) for x in range(int(box.x0), int(box.x1)) for y in range(int(box.y0), int(box.y1))}


def boxes() -> st.SearchStrategy[Box]:
    side = st.integers(0, 12)
    return st.builds(lambda x, y, w, h: Box(x, y, x + w + 1, y + h + 1), side, side, side, side)


def truth_of(mask: np.ndarray, kind: str) -> Truth:
    box = enclosing_box(mask)
    assert box is not None
    height, width = mask.shape
    return Truth(mask, box, kind, Framing(width, height, Region(0, 0, width, height)))


def case(patient: str, box: tuple[int, int, int, int], heat: np.ndarray, fold: int = 0, side: int = 70) -> Case:
    record = Record(Path(f"{patient}.png"), "sick", patient, boxes=(box,))
    mask = boxes_mask(record.boxes, side, side)
    return Case(record, fold, truth_of(mask, "box"), {"attention": heat, "evidence": heat})


@given(boxes(), boxes())
def test_box_iou_is_that_of_the_pixel_sets(first: Box, second: Box) -> None:
    a, b = pixels_of(first), pixels_of(second)
    assert box_iou(first, second) == pytest.approx(len(a & b) / len(a | b))
    assert box_iou(first, None) == 0


@given(boxes(), boxes())
def test_mask_iou_is_that_of_the_pixel_sets(first: Box, second: Box) -> None:
    masks = [np.zeros((30, 30), bool) for _ in range(2)]
    for mask, box in zip(masks, (first, second)):
        for x, y in pixels_of(box):
            mask[y, x] = True
    a, b = pixels_of(first), pixels_of(second)
    assert mask_iou(*masks) == pytest.approx(len(a & b) / len(a | b))


def test_iou_of_two_empty_masks_is_zero() -> None:
    assert mask_iou(np.zeros((2, 2), bool), np.zeros((2, 2), bool)) == 0


@given(st.lists(st.tuples(*[st.floats(-3, 9, width=16)] * 2, *[st.floats(0, 9, width=16)] * 2), max_size=3))
def test_a_box_covers_the_pixels_whose_centres_it_holds(
    drawn: list[tuple[float, float, float, float]],
) -> None:
    mask = boxes_mask(drawn, 8, 6)
    assert mask.shape == (6, 8)
    for row in range(6):
        for column in range(8):
            inside = any(x <= column + 0.5 < x + w and y <= row + 0.5 < y + h for x, y, w, h in drawn)
            assert mask[row, column] == inside


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 2**32 - 1), st.booleans(), st.sampled_from(["box", "mask"]))
def test_scores_at_every_threshold_are_those_of_the_runtimes_mask_and_box(seed: int, coarse: bool, kind: str) -> None:
    rng = np.random.default_rng(seed)
    height, width = rng.integers(5, 30, 2)
    heat = rng.random((height, width)).astype(np.float32)
    if coarse:  # values that fall exactly on thresholds
        heat = np.round(heat * 20).astype(np.float32) / np.float32(20)
    mask = rng.random((height, width)) < 0.3
    mask[height // 2, width // 2] = True
    truth = truth_of(mask, kind)
    scores = score_heat(heat, truth)
    for index, threshold in enumerate(THRESHOLDS):
        predicted = heat_mask(heat, float(threshold))
        assert scores.mask_iou[index] == pytest.approx(mask_iou(predicted, mask))
        assert scores.box_iou[index] == pytest.approx(box_iou(enclosing_box(predicted), truth.box))
    np.testing.assert_array_equal(scores.iou, scores.mask_iou if kind == "mask" else scores.box_iou)
    inside = outside = 0.0
    for row in range(height):
        for column in range(width):
            if mask[row, column]:
                inside += float(heat[row, column])
            else:
                outside += float(heat[row, column])
    assert scores.energy == pytest.approx(inside / (inside + outside))
    peak = np.unravel_index(int(heat.argmax()), heat.shape)
    assert scores.pointing == mask[peak]


def counting(heat: np.ndarray, threshold: np.float32, minimum: np.float32) -> set[tuple[int, int]]:
    """(row, column) of every pixel of a region that counts: spread from the pixels that make it count."""
    above = {(int(row), int(column)) for row, column in zip(*np.nonzero(heat > threshold))}
    peak = heat.max()
    frontier = [at for at in above if heat[at] >= minimum or heat[at] == peak]
    reached = set(frontier)
    while frontier:
        row, column = frontier.pop()
        for at in [(row + dy, column + dx) for dy in (-1, 0, 1) for dx in (-1, 0, 1)]:
            if at in above and at not in reached:
                reached.add(at)
                frontier.append(at)
    return reached


@settings(max_examples=60, deadline=None)
@given(
    hnp.arrays(np.float32, (7, 8), elements=st.integers(0, 20).map(lambda level: level / 20)),
    st.just(0.0) | st.integers(0, 40).map(lambda level: level / 40) | st.floats(0, 1),
    st.integers(0, 2**32 - 1),
    st.sampled_from(["box", "mask"]),
)
def test_scores_with_a_minimum_are_those_of_the_regions_that_reach_it(
    heat: np.ndarray, minimum: float, seed: int, kind: str
) -> None:
    mask = np.random.default_rng(seed).random(heat.shape) < 0.3
    mask[3, 4] = True
    truth, drawn = truth_of(mask, kind), {(int(row), int(column)) for row, column in zip(*np.nonzero(mask))}
    scores, plain = score_heat(heat, truth, THRESHOLDS, minimum), score_heat(heat, truth)
    for index, threshold in enumerate(THRESHOLDS.astype(np.float32)):
        kept = counting(heat, threshold, np.float32(minimum))
        rows, columns = [row for row, _ in kept], [column for _, column in kept]
        box = Box(min(columns), min(rows), max(columns) + 1, max(rows) + 1) if kept else None
        assert scores.mask_iou[index] == pytest.approx(len(kept & drawn) / len(kept | drawn))
        assert scores.box_iou[index] == pytest.approx(box_iou(box, truth.box))
    np.testing.assert_array_equal(scores.iou, scores.mask_iou if kind == "mask" else scores.box_iou)
    assert (scores.pointing, scores.energy) == (plain.pointing, plain.energy)
    if minimum == 0:
        for name in ("iou", "mask_iou", "box_iou"):
            np.testing.assert_array_equal(getattr(scores, name), getattr(plain, name))


def around(boxes: list[Box]) -> Box | None:
    if not boxes:
        return None
    return Box(
        min(box.x0 for box in boxes), min(box.y0 for box in boxes),
        max(box.x1 for box in boxes), max(box.y1 for box in boxes),
    )  # fmt: skip


def film_of(crop: str, width: int, height: int, seed: int) -> tuple[PreprocessingSpec, Truth]:
    """A film of which the network sees ``width`` x ``height``: all of it, or the part around its lungs."""
    if crop == "none":
        return SPEC, truth_of(np.ones((height, width), bool), "box")
    lungs = np.random.default_rng(seed).random((128, 128)) < 0.7
    framing = Framing(width + 50, height + 60, Region(20, 35, 20 + width, 35 + height), lungs)
    spec = PreprocessingSpec(size=64, crop="lungs", lungs_sha256=packaged_sha256())
    mask = np.ones((framing.height, framing.width), bool)
    return spec, Truth(mask, Box(0, 0, framing.width, framing.height), "box", framing)


@settings(max_examples=60, deadline=None)
@given(
    hnp.arrays(np.float32, (5, 5), elements=st.integers(0, 10).map(lambda level: level / 10)),
    st.sampled_from([("none", "attention"), ("lungs", "attention"), ("lungs", "attention" + IN_LUNGS)]),
    st.sampled_from(THRESHOLDS.tolist()),
    st.just(0.0) | st.floats(0, 1),
    st.integers(0, 9),
)
def test_the_enclosing_box_is_that_of_the_findings(
    coarse: np.ndarray, shown: tuple[str, str], threshold: float, minimum: float, seed: int
) -> None:
    """Where the network's square shows pixel for pixel what it sees, the boxes are equal."""
    spec, truth = film_of(shown[0], 64, 64, seed)
    square = square_heat(shown[1], coarse, truth.framing, spec)
    found = findings(square, threshold, truth.width, truth.height, spec, truth.framing.region, minimum)
    box = around([one.box for one in found])
    heat = unit_heat(coarse, truth, spec, shown[1])
    assert enclosing_box(heat_mask(heat, threshold, minimum)) == box
    at = int(np.flatnonzero(np.isclose(THRESHOLDS, threshold))[0])
    assert score_heat(heat, truth, THRESHOLDS, minimum).box_iou[at] == pytest.approx(box_iou(box, truth.box))


@pytest.mark.parametrize("crop", ["none", "lungs"])
@pytest.mark.parametrize(("width", "height"), [(64, 64), (90, 150), (333, 200), (640, 512)])
@pytest.mark.parametrize("minimum", [0.0, 0.8])
def test_on_films_of_any_size_they_agree_within_a_pixel_of_the_square(
    crop: str, width: int, height: int, minimum: float
) -> None:
    coarse = np.zeros((8, 8), np.float32)
    coarse[2:5, 1], coarse[3, 1] = 0.7, 1.0  # one lung
    coarse[2:4, 6] = 0.6  # the other, fainter
    spec, truth = film_of(crop, width, height, 0)
    found = findings(
        square_heat("attention", coarse, truth.framing, spec), 0.3, truth.width, truth.height, spec,
        truth.framing.region, minimum,
    )  # fmt: skip
    assert len(found) == (1 if minimum else 2)
    expected = around([one.box for one in found])
    box = enclosing_box(heat_mask(unit_heat(coarse, truth, spec), 0.3, minimum))
    assert expected is not None
    assert box is not None
    assert [box.x0, box.x1] == pytest.approx([expected.x0, expected.x1], abs=max(1, width / 64))
    assert [box.y0, box.y1] == pytest.approx([expected.y0, expected.y1], abs=max(1, height / 64))
    assert (box.width > width / 2) == (not minimum)  # one lung, or both


def test_no_heat_scores_nothing() -> None:
    mask = np.ones((8, 8), bool)
    scores = score_heat(np.zeros((8, 8), np.float32), truth_of(mask, "mask"))
    assert (scores.iou.max(), scores.pointing, scores.energy) == (0.0, False, 0.0)


def test_central_box_is_half_of_each_side() -> None:
    scores = central_box_scores(case("p", (0, 0, 40, 20), np.zeros((2, 2), np.float32), side=40))
    # the box is (10, 10)-(30, 30): it shares 20 x 10 pixels with (0, 0)-(40, 20)
    assert scores.iou[0] == pytest.approx(200 / (400 + 800 - 200))
    assert scores.energy == pytest.approx(0.5)
    assert not scores.pointing


@pytest.mark.parametrize("side", [40, 41])
def test_fitted_box_at_threshold_t_has_one_minus_t_of_each_side(side: int) -> None:
    one = case("p", (0, 0, side, side), np.zeros((2, 2), np.float32), side=side)
    for threshold, iou in zip(THRESHOLDS, fitted_box_scores(one).box_iou):
        assert (iou * side**2) ** 0.5 == pytest.approx((1 - threshold) * side, abs=2)


def scores_with_best(index: int) -> HeatScores:
    iou = np.zeros(len(THRESHOLDS))
    iou[index] = 1.0
    return HeatScores(iou, iou, iou, True, 1.0)


def test_a_threshold_never_comes_from_the_patient_it_is_applied_to() -> None:
    heat = np.zeros((2, 2), np.float32)
    cases = [case(name, (0, 0, 9, 9), heat) for name in ("a", "a", "b", "b", "b")]
    scores = [scores_with_best(index) for index in (3, 3, 8, 8, 8)]
    chosen, way = choose_thresholds(cases, scores, {})
    assert chosen.tolist() == [8, 8, 3, 3, 3]
    assert "leave one patient out" in way
    chosen, way = choose_thresholds(cases, scores, {0: [scores_with_best(5)]})
    assert chosen.tolist() == [5] * 5
    assert "training-side" in way
    chosen, way = choose_thresholds(cases[:2], scores[:2], {})
    assert THRESHOLDS[chosen].tolist() == pytest.approx([0.5, 0.5])
    assert "only one patient" in way


def test_folds_keep_their_thresholds_apart() -> None:
    heat = np.zeros((2, 2), np.float32)
    cases = [case(name, (0, 0, 9, 9), heat, fold) for fold in (0, 1) for name in ("a", "b")]
    chosen, _ = choose_thresholds(
        cases, [scores_with_best(index) for index in (1, 2, 3, 4)], {1: [scores_with_best(9)]}
    )
    assert chosen.tolist() == [2, 1, 9, 9]


def test_a_perfect_map_beats_the_baselines_and_everything_is_json() -> None:
    rng = np.random.default_rng(0)
    cases, tuning = [], []
    for number in range(16):
        row, column = rng.integers(0, 6, 2)
        heat = np.zeros((7, 7), np.float32)
        heat[row : row + 2, column : column + 2] = 1
        (cases if number < 10 else tuning).append(case(f"p{number}", (column * 10, row * 10, 20, 20), heat))
    found = evaluate_localization(cases, {0: tuning}, SPEC, resamples=200, seed=1)
    result, panel = found.summary, found.panel()
    assert result["iou_mean"] > 0.7
    assert result["iou_at_25"] == result["pointing"] == 1.0
    assert result["iou_mean"] == pytest.approx(np.mean([iou for _, iou, _ in panel]))
    assert result["maps"]["attention"]["iou_mean"] == result["iou_mean"]
    low, high = result["iou_mean_ci95"]
    assert low <= result["iou_mean"] <= high
    for name in ("central_box", "central_box_fitted", "random_map"):
        assert result["baselines"][name]["iou_mean"] < 0.4, name
    assert result["baselines"]["random_map"]["draws"] == RANDOM_DRAWS
    assert (result["images"], result["ground_truth"], result["tuning_images"]) == (10, {"box": 10}, {"0": 6})
    again = evaluate_localization(cases, {0: tuning}, SPEC, resamples=200, seed=1)
    assert again.summary == result
    assert json.loads(json.dumps(result)) == result


def test_a_bundles_threshold_is_used_as_it_is() -> None:
    heat = np.eye(4, dtype=np.float32)
    cases = [case("a", (0, 0, 30, 30), heat), case("b", (10, 10, 30, 30), heat)]
    found = evaluate_localization(cases, {}, SPEC, map_name="evidence", fixed_threshold=0.333, resamples=10)
    result, panel = found.summary, found.panel()
    assert (result["map"], result["threshold"]) == ("evidence", pytest.approx(0.333))
    assert result["chosen_on"] == "the bundle's threshold"
    assert "leave one patient out" in result["maps"]["attention"]["chosen_on"]
    for one, iou, threshold in panel:
        predicted = enclosing_box(heat_mask(unit_heat(heat, one.truth, SPEC), 0.333))
        assert threshold == pytest.approx(0.333)
        assert iou == pytest.approx(box_iou(predicted, one.truth.box))


def test_a_minimum_score_applies_to_all_maps_and_not_to_the_central_boxes() -> None:
    cases = []
    for row in range(5):  # what was drawn has a hot core and a faint rest; far from it lies what is a little less faint
        heat = np.zeros((7, 7), np.float32)
        heat[row : row + 3, :3], heat[row + 1, 1], heat[6 - row, 6] = 0.5, 1.0, 0.6
        cases.append(case(f"p{row}", (0, row * 10, 30, 30), heat))
    plain = evaluate_localization(cases, {}, SPEC, resamples=10).summary
    zero = evaluate_localization(cases, {}, SPEC, minimum_score=0.0, resamples=10).summary
    found = evaluate_localization(cases, {}, SPEC, minimum_score=0.9, fixed_threshold=0.3, resamples=10)
    result, panel = found.summary, found.panel()
    assert plain == zero
    assert (plain["minimum_score"], result["minimum_score"]) == (0.0, 0.9)
    for one, iou, threshold in panel:
        counted = heat_mask(unit_heat(one.heats["attention"], one.truth, SPEC), threshold, 0.9)
        assert iou == pytest.approx(box_iou(enclosing_box(counted), one.truth.box))
    for name in ("attention", "evidence"):
        assert result["maps"][name]["iou_mean"] > plain["maps"][name]["iou_mean"]
    assert result["baselines"]["central_box"] == plain["baselines"]["central_box"]
    assert result["baselines"]["central_box_fitted"] == plain["baselines"]["central_box_fitted"]
    assert result["baselines"]["random_map"]["iou_mean"] != plain["baselines"]["random_map"]["iou_mean"]


def test_truth_is_read_in_the_files_pixels(tmp_path: Path) -> None:
    image = np.full((80, 100), 90, np.uint8)
    cv2.imwrite(str(tmp_path / "film.png"), image)
    drawn = np.zeros((80, 100), np.uint8)
    drawn[10:20, 30:50] = 255
    cv2.imwrite(str(tmp_path / "mask.png"), drawn)
    cv2.imwrite(str(tmp_path / "empty.png"), drawn * 0)
    cv2.imwrite(str(tmp_path / "small.png"), drawn[:70, :90])
    film = tmp_path / "film.png"
    boxes = ((5.5, 10.0, 10.0, 20.0), (90.0, 60.0, 30.0, 5.0))
    truth = read_truth(Record(film, "sick", "p", boxes=boxes), PreprocessingSpec())
    assert (truth.kind, truth.box) == ("box", Box(5.5, 10.0, 100, 65.0))  # clipped to the image
    assert truth.mask.sum() == 10 * 20 + 10 * 5
    truth = read_truth(Record(film, "sick", "p", boxes=boxes, mask=tmp_path / "mask.png"), PreprocessingSpec())
    assert (truth.kind, truth.box, truth.mask.sum()) == ("mask", Box(30, 10, 50, 20), 200)
    for name, message in (("empty", "is empty"), ("small", "must agree")):
        with pytest.raises(DataError, match=message):
            read_truth(Record(film, "sick", "p", mask=tmp_path / f"{name}.png"), PreprocessingSpec())
    with pytest.raises(DataError, match="no box of"):
        read_truth(Record(film, "sick", "p", boxes=((200.0, 10.0, 5.0, 5.0),)), PreprocessingSpec())

"""Localization against flood fill, loops and exact fractions."""

from __future__ import annotations

from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from magsd_runtime.localization import (
    class_evidence_map,
    enclosing_box,
    findings,
    heat_mask,
    localization_map,
    mean_attention_map,
    scale_to_unit,
    to_original,
    upsample,
)
from magsd_runtime.prediction import Box
from magsd_runtime.preprocessing import PreprocessingSpec, standardize

UNIT = st.floats(0, 1, width=32)
FITS = st.sampled_from(["stretch", "letterbox", "crop"])
SIDES = st.integers(64, 150)


def spec_of(fit: str, size: int = 32) -> PreprocessingSpec:
    return PreprocessingSpec(size=size, fit=fit, clahe_clip=0.0)  # type: ignore[arg-type]


# --- the maps -----------------------------------------------------------------------------------


@given(hnp.arrays(np.float32, st.tuples(st.integers(1, 5), st.integers(1, 4), st.integers(1, 4)), elements=UNIT))
def test_mean_attention_map_equals_loops(attention: np.ndarray) -> None:
    count, height, width = attention.shape
    result = mean_attention_map(attention)
    assert result.dtype == np.float32
    for y in range(height):
        for x in range(width):
            mean = sum(float(attention[m, y, x]) for m in range(count)) / count
            assert result[y, x] == pytest.approx(mean, abs=1e-6)


@given(st.data())
def test_class_evidence_map_equals_loops(data: st.DataObject) -> None:
    count, classes = data.draw(st.integers(1, 5)), data.draw(st.integers(1, 3))
    attention = data.draw(hnp.arrays(np.float32, (count, 3, 4), elements=st.just(0.0) | st.floats(0, 1e4, width=32)))
    evidence = data.draw(hnp.arrays(np.float32, (classes, count), elements=st.floats(-100, 100, width=32)))
    k = data.draw(st.integers(0, classes - 1))
    expected = np.zeros((3, 4))
    for m in range(count):
        peak = max(float(value) for value in attention[m].ravel())
        if peak == 0 or evidence[k, m] <= 0:
            continue
        for y in range(3):
            for x in range(4):
                expected[y, x] += float(evidence[k, m]) * float(attention[m, y, x]) / peak
    result = class_evidence_map(attention, evidence, k)
    assert result.dtype == np.float32
    np.testing.assert_allclose(result, expected, rtol=1e-5, atol=1e-30)
    np.testing.assert_array_equal(localization_map("evidence", attention, evidence, k), result)


def test_a_map_of_an_unknown_name_is_refused() -> None:
    with pytest.raises(ValueError, match="expected attention or evidence"):
        localization_map("gradient", np.zeros((1, 2, 2)), np.zeros((2, 1)), 0)


def bilinear_at(heat: np.ndarray, u: Fraction, v: Fraction) -> float:
    """Value at the point (u, v), pixel edges at integers, border values repeated."""
    height, width = heat.shape
    a, b = u - Fraction(1, 2), v - Fraction(1, 2)
    x, y = a.numerator // a.denominator, b.numerator // b.denominator
    p, q = float(a - x), float(b - y)

    def at(column: int, row: int) -> float:
        return float(heat[min(max(row, 0), height - 1), min(max(column, 0), width - 1)])

    top = (1 - p) * at(x, y) + p * at(x + 1, y)
    bottom = (1 - p) * at(x, y + 1) + p * at(x + 1, y + 1)
    return (1 - q) * top + q * bottom


@settings(max_examples=30, deadline=None)
@given(hnp.arrays(np.float32, st.tuples(st.integers(1, 8), st.integers(1, 8)), elements=UNIT), st.integers(1, 24))
def test_upsample_is_bilinear_with_half_pixel_centres(heat: np.ndarray, size: int) -> None:
    result = upsample(heat, size)
    assert result.dtype == np.float32
    assert result.shape == (size, size)
    for y in range(size):
        for x in range(size):
            u = Fraction(2 * x + 1, 2) * heat.shape[1] / size
            v = Fraction(2 * y + 1, 2) * heat.shape[0] / size
            assert result[y, x] == pytest.approx(bilinear_at(heat, u, v), abs=2e-6)


@given(hnp.arrays(np.float32, (3, 4), elements=st.floats(-(2.0**127), 2.0**127, width=32)))
def test_scale_to_unit_runs_from_0_to_1_or_is_0(heat: np.ndarray) -> None:
    unit = scale_to_unit(heat)
    assert unit.dtype == np.float32
    if (heat == heat[0, 0]).all():
        assert not unit.any()
        return
    assert unit[heat == heat.min()].max() == 0
    assert unit[heat == heat.max()].min() == 1
    order = np.argsort(heat, axis=None)
    assert (np.diff(unit.ravel()[order]) >= 0).all()


# --- back to the original -------------------------------------------------------------------------


def naive_where(fit: str, width: int, height: int, size: int) -> tuple[Fraction, Fraction, Fraction, Fraction]:
    """left, top, scale_x, scale_y of the square, from the words of PreprocessingSpec.fit alone."""
    if fit == "stretch":
        return Fraction(0), Fraction(0), Fraction(width, size), Fraction(height, size)
    if fit == "crop":
        side = min(width, height)
        scale = Fraction(side, size)
        return Fraction((width - side) // 2), Fraction((height - side) // 2), scale, scale
    longest = max(width, height)
    new_width, new_height = max(1, round(width * (size / longest))), max(1, round(height * (size / longest)))
    scale_x, scale_y = Fraction(width, new_width), Fraction(height, new_height)
    return -((size - new_width) // 2) * scale_x, -((size - new_height) // 2) * scale_y, scale_x, scale_y


@settings(max_examples=25, deadline=None)
@given(FITS, SIDES, SIDES, st.integers(0, 10_000))
def test_to_original_equals_a_mapping_pixel_by_pixel(fit: str, width: int, height: int, seed: int) -> None:
    size = 32
    square = np.random.default_rng(seed).random((size, size), dtype=np.float32)
    result = to_original(square, width, height, spec_of(fit))
    assert result.dtype == np.float32
    assert result.shape == (height, width)
    left, top, scale_x, scale_y = naive_where(fit, width, height, size)
    # the rows and columns of the square that show the image; the padding has no say
    columns = [u for u in range(size) if 0 <= left + (u + Fraction(1, 2)) * scale_x <= width]
    rows = [v for v in range(size) if 0 <= top + (v + Fraction(1, 2)) * scale_y <= height]
    seen = square[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
    for y in range(0, height, 7):
        for x in range(0, width, 5):
            u = (x + Fraction(1, 2) - left) / scale_x - columns[0]
            v = (y + Fraction(1, 2) - top) / scale_y - rows[0]
            inside = 0 <= u <= len(columns) and 0 <= v <= len(rows)
            expected = bilinear_at(seen, u, v) if inside else 0.0
            assert result[y, x] == pytest.approx(expected, abs=2e-5), (x, y)


@pytest.mark.parametrize("fit", ["stretch", "letterbox", "crop"])
@pytest.mark.parametrize(("width", "height"), [(200, 120), (120, 200), (64, 64)])
def test_a_bright_spot_comes_back_where_it_was(fit: str, width: int, height: int) -> None:
    """Through standardize() itself: the way back is the inverse of the way in."""
    spec = spec_of(fit, size=64)
    pixels = np.zeros((height, width), np.uint8)
    pixels[70 * height // 128 : 82 * height // 128, 50 * width // 128 : 62 * width // 128] = 255
    seen = standardize(pixels, spec).astype(np.float32)
    heat = to_original(scale_to_unit(seen), width, height, spec)
    for axis in (0, 1):
        weights, truth = heat.sum(axis=axis), (pixels > 0).sum(axis=axis)
        centre = (weights @ np.arange(len(weights))) / weights.sum()
        expected = (truth @ np.arange(len(truth))) / truth.sum()
        assert centre == pytest.approx(expected, abs=1.0)


# --- mask, regions, boxes ------------------------------------------------------------------------


def flood_fill(mask: np.ndarray) -> list[set[tuple[int, int]]]:
    """8-connected regions as sets of (row, column), the slow and obvious way."""
    left = {(int(y), int(x)) for y, x in zip(*np.nonzero(mask))}
    regions = []
    while left:
        region, frontier = set(), [left.pop()]
        while frontier:
            y, x = frontier.pop()
            region.add((y, x))
            for neighbour in [(y + dy, x + dx) for dy in (-1, 0, 1) for dx in (-1, 0, 1)]:
                if neighbour in left:
                    left.remove(neighbour)
                    frontier.append(neighbour)
        regions.append(region)
    return regions


def naive_findings(
    heat: np.ndarray, threshold: float, width: int, height: int, fit: str, minimum_score: float = 0.0
) -> list[tuple[list[int], float, float]]:
    size = heat.shape[0]
    left, top, scale_x, scale_y = naive_where(fit, width, height, size)

    def shows_image(v: int, u: int) -> bool:
        centre_x, centre_y = left + (u + Fraction(1, 2)) * scale_x, top + (v + Fraction(1, 2)) * scale_y
        return 0 < centre_x < width and 0 < centre_y < height

    mask = np.zeros(heat.shape, bool)
    for v in range(size):
        for u in range(size):
            mask[v, u] = heat[v, u] > threshold and shows_image(v, u)
    found = []
    for region in flood_fill(mask):
        # every pixel of the original whose area a pixel of the region overlaps
        columns, rows = set(), set()
        for v, u in region:
            a, b = left + u * scale_x, left + (u + 1) * scale_x
            columns |= {x for x in range(width) if x < b and x + 1 > a}
            a, b = top + v * scale_y, top + (v + 1) * scale_y
            rows |= {y for y in range(height) if y < b and y + 1 > a}
        box = [min(columns), min(rows), max(columns) + 1, max(rows) + 1]
        share = float(len(region) * scale_x * scale_y / (width * height))
        found.append((box, max(float(heat[v, u]) for v, u in region), share))
    strongest = max((score for _, score, _ in found), default=0.0)
    return [one for one in found if one[1] >= np.float32(minimum_score) or one[1] == strongest]


@settings(max_examples=60, deadline=None)
@given(FITS, SIDES, SIDES, st.floats(0, 1), st.just(0.0) | st.floats(0, 1), st.integers(0, 10_000))
def test_findings_equal_a_flood_fill_pixel_by_pixel(
    fit: str, width: int, height: int, threshold: float, minimum: float, seed: int
) -> None:
    rng = np.random.default_rng(seed)
    heat = scale_to_unit(upsample(rng.random((9, 9)), 32))
    heat = np.round(heat * 8).astype(np.float32) / 8  # equal scores must occur
    result = findings(heat, threshold, width, height, spec_of(fit), minimum_score=minimum)
    expected = naive_findings(heat, threshold, width, height, fit, minimum)
    assert [finding.score for finding in result] == sorted((score for _, score, _ in expected), reverse=True)
    assert sorted((finding.box.to_list(), finding.score) for finding in result) == sorted(
        (box, score) for box, score, _ in expected
    )
    assert sorted(finding.area_fraction for finding in result) == pytest.approx(
        sorted(share for _, _, share in expected)
    )
    for finding in result:
        assert 0 <= finding.box.x0 < finding.box.x1 <= width
        assert 0 <= finding.box.y0 < finding.box.y1 <= height


def test_no_heat_no_findings_and_all_heat_one() -> None:
    assert findings(np.zeros((32, 32), np.float32), 0.5, 100, 80, spec_of("stretch")) == ()
    (whole,) = findings(np.ones((32, 32), np.float32), 0.5, 100, 80, spec_of("stretch"))
    assert whole.box == Box(0, 0, 100, 80)
    assert whole.area_fraction == pytest.approx(1)


def test_corners_that_touch_are_one_region() -> None:
    heat = np.zeros((32, 32), np.float32)
    heat[3, 3] = heat[4, 4] = 1.0
    (region,) = findings(heat, 0.5, 64, 64, spec_of("stretch"))
    assert region.box == Box(6, 6, 10, 10)


@given(hnp.arrays(np.bool_, hnp.array_shapes(min_dims=2, max_dims=2, max_side=8)))
def test_enclosing_box_equals_loops(mask: np.ndarray) -> None:
    points = [(x, y) for y in range(mask.shape[0]) for x in range(mask.shape[1]) if mask[y, x]]
    box = enclosing_box(mask)
    if not points:
        assert box is None
        return
    assert box is not None
    xs, ys = [x for x, _ in points], [y for _, y in points]
    assert box == Box(min(xs), min(ys), max(xs) + 1, max(ys) + 1)


def test_the_mask_holds_what_exceeds_the_threshold() -> None:
    heat = np.array([[0.0, 0.5], [0.500001, 1.0]], np.float64)
    np.testing.assert_array_equal(heat_mask(heat, 0.5), [[False, False], [True, True]])


LEVELS = st.integers(0, 8).map(lambda level: level / 8)
GRIDS = hnp.arrays(np.float32, hnp.array_shapes(min_dims=2, max_dims=2, max_side=9), elements=LEVELS)
SCATTERED = st.integers(0, 2**32 - 1).map(lambda seed: scattered(np.random.default_rng(seed)))


def scattered(rng: np.random.Generator) -> np.ndarray:
    """Several regions of sixteenths, float32 (9, 9)."""
    return (rng.integers(1, 17, (9, 9)) / 16 * (rng.random((9, 9)) < 0.35)).astype(np.float32)


@settings(deadline=None)
@given(GRIDS | SCATTERED, LEVELS | st.floats(0, 0.9), LEVELS | st.floats(0, 0.3), st.booleans())
def test_a_region_counts_that_reaches_the_minimum_or_is_the_strongest(
    heat: np.ndarray, threshold: float, value: float, added: bool
) -> None:
    minimum = min(1.0, threshold + value) if added else value
    expected = np.zeros(heat.shape, bool)
    regions = flood_fill(heat > threshold)
    peaks = [max(heat[at] for at in region) for region in regions]
    for region, peak in zip(regions, peaks):
        if peak >= np.float32(minimum) or peak == max(peaks):
            for at in region:
                expected[at] = True
    np.testing.assert_array_equal(heat_mask(heat, threshold, minimum), expected)
    assert heat_mask(heat, threshold, minimum).dtype == bool


@given(GRIDS, LEVELS | st.floats(0, 1))
def test_without_a_minimum_the_mask_is_what_exceeds_the_threshold(heat: np.ndarray, threshold: float) -> None:
    for result in (heat_mask(heat, threshold), heat_mask(heat, threshold, 0.0), heat_mask(heat, threshold, threshold)):
        np.testing.assert_array_equal(result, heat > threshold)


def test_a_minimum_above_the_largest_heat_keeps_the_strongest_region() -> None:
    heat = np.array([[0.9, 0.4, 0, 0.8, 0, 0.9]], np.float32)
    np.testing.assert_array_equal(heat_mask(heat, 0.3, 1.0), [[True, True, False, False, False, True]])
    assert not heat_mask(np.zeros((4, 4), np.float32), 0.0, 1.0).any()


def test_a_faint_region_is_no_finding() -> None:
    heat = np.zeros((32, 32), np.float32)
    heat[4:20, 3:9], heat[10, 5] = 0.4, 1.0
    heat[6:18, 22:30], heat[10, 25] = 0.4, 0.6
    spec = spec_of("stretch")
    strong, faint = findings(heat, 0.3, 64, 64, spec)
    assert findings(heat, 0.3, 64, 64, spec, None, 0.6) == (strong, faint)
    assert findings(heat, 0.3, 64, 64, spec, None, 0.61) == (strong,)
    assert strong.box == Box(6, 8, 18, 40)

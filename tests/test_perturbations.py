"""Changes of a film's pixels, each against an obvious slow version."""

from __future__ import annotations

import io
import math

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from PIL import Image

import perturbations

FILMS = st.integers(7, 40).flatmap(
    lambda height: st.integers(7, 40).flatmap(lambda width: arrays(np.uint8, (height, width)))
)
QUICK = settings(max_examples=40, deadline=None)


@QUICK
@given(FILMS)
def test_the_centre_is_blanked_and_the_border_stays(film: np.ndarray) -> None:
    height, width = film.shape
    found = perturbations.blank_centre(film)
    for y in range(height):
        for x in range(width):
            # how far the pixel's centre lies inside the central 70 %, as a share of the sides
            depth = 0.35 - max(abs((x + 0.5) / width - 0.5), abs((y + 0.5) / height - 0.5))
            if depth < -1e-9:
                assert found[y, x] == film[y, x]
            elif depth > 1e-9:
                assert found[y, x] == found[height // 2, width // 2]


def test_the_centre_gets_the_mean_of_the_border() -> None:
    film = np.arange(400, dtype=np.float64).reshape(20, 20) % 251
    film = film.astype(np.uint8)
    border = [int(film[y, x]) for y in range(20) for x in range(20) if not (3 <= x < 17 and 3 <= y < 17)]
    found = perturbations.blank_centre(film)
    assert (found[3:17, 3:17] == round(sum(border) / len(border))).all()
    assert len(border) + 14 * 14 == 400


@QUICK
@given(FILMS, st.integers(0, 2**32 - 1))
def test_masked_pixels_get_the_mean_of_the_others(film: np.ndarray, seed: int) -> None:
    mask = np.random.default_rng(seed).random(film.shape) < 0.4
    before = film.copy()
    found = perturbations.blank(film, mask)
    rest = [int(value) for value, hidden in zip(film.ravel(), mask.ravel()) if not hidden]
    grey = round(sum(rest) / len(rest)) if rest else 0
    expected = [grey if hidden else int(value) for value, hidden in zip(film.ravel(), mask.ravel())]
    assert found.ravel().tolist() == expected
    np.testing.assert_array_equal(film, before)


def test_four_corners_are_black() -> None:
    film = np.full((100, 60), 9, np.uint8)
    found = perturbations.blank_corners(film)
    for y in range(100):
        for x in range(60):
            corner = (y < 15 or y >= 85) and (x < 9 or x >= 51)
            assert found[y, x] == (0 if corner else 9), (y, x)


@QUICK
@given(FILMS, st.floats(0.5, 12))
def test_the_contrast_curve(film: np.ndarray, strength: float) -> None:
    found = perturbations.window(film, strength)

    def logistic(t: float) -> float:
        return 1 / (1 + math.exp(strength * (0.5 - t)))

    for grey, value in zip(film.ravel()[:60], found.ravel()[:60]):
        share = (logistic(int(grey) / 255) - logistic(0)) / (logistic(1) - logistic(0))
        assert abs(255 * share - int(value)) <= 0.5 + 1e-9
    both = np.arange(256, dtype=np.uint8)[np.newaxis]
    curve = perturbations.window(both, strength)[0].astype(int)
    assert (curve[0], curve[255]) == (0, 255)
    assert (np.diff(curve) >= 0).all()


@QUICK
@given(FILMS, st.sampled_from([0.6, 1.6]))
def test_gamma(film: np.ndarray, exponent: float) -> None:
    found = perturbations.gamma(film, exponent)
    for grey, value in zip(film.ravel()[:60], found.ravel()[:60]):
        assert abs(255 * (int(grey) / 255) ** exponent - int(value)) <= 0.5 + 1e-9


def test_reencoding_is_that_of_a_jpeg_file(radiograph_pixels: np.ndarray) -> None:
    found = perturbations.reencode(radiograph_pixels, 30)
    file = io.BytesIO()
    Image.fromarray(radiograph_pixels).save(file, "JPEG", quality=30)
    other = np.asarray(Image.open(file))
    # two JPEG libraries: the same tables, roundings of their own
    assert np.abs(found.astype(int) - other).max() <= 3
    assert np.abs(found.astype(int) - radiograph_pixels).mean() > 2


@QUICK
@given(FILMS)
def test_letterbox_mirror_and_half(film: np.ndarray) -> None:
    height, width = film.shape
    side = max(height, width)
    square = perturbations.letterbox(film)
    assert square.shape == (side, side)
    top, left = (side - height) // 2, (side - width) // 2
    for y in range(side):
        for x in range(side):
            inside = 0 <= y - top < height and 0 <= x - left < width
            assert square[y, x] == (film[y - top, x - left] if inside else 0)
    mirrored = perturbations.mirror(film)
    assert all(mirrored[y, x] == film[y, width - 1 - x] for y in range(height) for x in range(width))
    half = perturbations.halve(film)
    assert half.shape == (-(-height // 2), -(-width // 2))
    if height % 2 == 0 and width % 2 == 0:
        for y in range(height // 2):
            for x in range(width // 2):
                block = film[2 * y : 2 * y + 2, 2 * x : 2 * x + 2]
                assert abs(float(half[y, x]) - block.mean()) <= 0.5


def slow_thumbnail(film: np.ndarray, side: int) -> np.ndarray:
    """Area average of each cell, then bilinear between the cells' centres."""
    height, width = film.shape
    small = np.zeros((side, side))
    for v in range(side):
        for u in range(side):
            total = area = 0.0
            y0, y1, x0, x1 = v * height / side, (v + 1) * height / side, u * width / side, (u + 1) * width / side
            for y in range(math.floor(y0), math.ceil(y1)):
                for x in range(math.floor(x0), math.ceil(x1)):
                    share = (min(y + 1, y1) - max(y, y0)) * (min(x + 1, x1) - max(x, x0))
                    total += share * film[y, x]
                    area += share
            small[v, u] = total / area
    found = np.zeros(film.shape)
    for y in range(height):
        for x in range(width):
            v = min(max((y + 0.5) * side / height - 0.5, 0), side - 1)
            u = min(max((x + 0.5) * side / width - 0.5, 0), side - 1)
            v0, u0 = min(int(v), side - 2), min(int(u), side - 2)
            a, b = v - v0, u - u0
            cell = small[v0 : v0 + 2, u0 : u0 + 2]
            found[y, x] = np.array([1 - a, a]) @ cell @ np.array([1 - b, b])
    return found


def test_thumbnail_equals_the_slow_one() -> None:
    film = np.random.default_rng(0).integers(0, 256, (70, 52)).astype(np.uint8)
    found = perturbations.thumbnail(film, 8)
    assert np.abs(found - slow_thumbnail(film, 8)).max() <= 2  # rounded twice
    assert perturbations.thumbnail(np.zeros((300, 90), np.uint8)).shape == (300, 90)


@QUICK
@given(arrays(np.bool_, (4, 6)), st.integers(1, 30), st.integers(1, 30))
def test_a_mask_is_enlarged_by_the_cells_of_the_centres(mask: np.ndarray, width: int, height: int) -> None:
    found = perturbations.enlarged(mask, width, height)
    for y in range(height):
        for x in range(width):
            assert found[y, x] == mask[int((2 * y + 1) * 4 / (2 * height)), int((2 * x + 1) * 6 / (2 * width))]

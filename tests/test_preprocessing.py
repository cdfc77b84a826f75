"""preprocessing.py: frozen in every bit, and equal to slow implementations of what it says it does.

The golden values hold for OpenCV 4.9.0, 4.10.0 and 5.0.0 on x86-64 (checked with each; also with
OpenCV's vector code and IPP switched off, and with NumPy 1.26, 2.2 and 2.4). If another version
gives other bits, that version needs a new version of the spec, not new golden values.
"""

from __future__ import annotations

import hashlib
from dataclasses import replace

import cv2
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from magsd_runtime.errors import ArtefactError, UsageError
from magsd_runtime.preprocessing import (
    Fit,
    PreprocessingSpec,
    Region,
    normalize,
    placement,
    preprocess,
    standardize,
)

DEFAULT = PreprocessingSpec()
PLAIN = PreprocessingSpec(clahe_clip=0.0)  # what CLAHE adds is tested apart


def pattern(name: str, height: int, width: int) -> np.ndarray:
    """A deterministic uint8 (height, width) image from integer arithmetic alone."""
    y, x = np.mgrid[0:height, 0:width].astype(np.int64)
    if name == "noise":
        values = ((x * 7919 + y * 104729 + x * y * 31) >> 3) % 256
    elif name == "waves":
        values = (x * x // (width + 1) + y * y // (height + 1) + x * y // 37) % 256
    else:  # film: smooth, brightest in the middle, a little texture
        values = 40 + x * (width - 1 - x) * 400 // width**2 + y * (height - 1 - y) * 400 // height**2
        values += (x * 13 + y * 7) % 9
    return values.astype(np.uint8)


# ---------------------------------------------------------------- frozen

GOLDEN_SPECS = {
    "default": DEFAULT,
    "no-clahe": PLAIN,
    "letterbox": PreprocessingSpec(fit="letterbox"),
    "crop-320": PreprocessingSpec(fit="crop", size=320, clahe_grid=8, clahe_clip=2.0),
}
# (pattern, height, width, spec): SHA-256, first 16 digits, of standardize() and of normalize() of that
GOLDEN: dict[tuple[str, int, int, str], tuple[str, str]] = {
    ("noise", 300, 260, "default"): ("144296a9adabc148", "0839e71cd9e8c189"),
    ("noise", 300, 260, "no-clahe"): ("a9e716c731874c5a", "549dc0ced00b2d00"),
    ("noise", 300, 260, "letterbox"): ("068d110f1a16e186", "2ce3a995acc3c661"),
    ("noise", 300, 260, "crop-320"): ("931da551a077e28a", "70aa8d04c6025567"),
    ("noise", 64, 100, "default"): ("56cfc577f67e9c83", "cbe742c503a13039"),
    ("noise", 500, 120, "default"): ("ad3e2dc9bc946101", "3ab72f185d456711"),
    ("noise", 500, 120, "letterbox"): ("0398f1641869b941", "64054f055673e839"),
    ("noise", 224, 224, "default"): ("76bda074e21a1531", "cdb1f5e41877e655"),
    ("noise", 1024, 1024, "default"): ("90cc822fea093675", "da46e6838fb6ba4c"),
    ("waves", 300, 260, "default"): ("b2fdfc9265c535f3", "3334573ea6537973"),
    ("waves", 300, 260, "no-clahe"): ("e95856f6d59ff3c8", "6d5054530012f050"),
    ("waves", 300, 260, "letterbox"): ("37ae39b185be4b6e", "977284d8a1e07763"),
    ("waves", 300, 260, "crop-320"): ("d539d2dab34db9f2", "935bf0b0aedd56d0"),
    ("waves", 64, 100, "default"): ("b58cbe659c8d65e1", "50ac742ce7399245"),
    ("waves", 500, 120, "default"): ("2b826e785a03a852", "59d694001ca9d658"),
    ("waves", 500, 120, "letterbox"): ("2b0d287de61c3e37", "38f3456f04b561aa"),
    ("waves", 224, 224, "default"): ("43b19e5ff66fcf7f", "dc9d18da214fe872"),
    ("waves", 1024, 1024, "default"): ("7677dcef9dd08729", "c0b0aeb690b20d5f"),
    ("film", 300, 260, "default"): ("bada5b6de770f2bf", "398f2ae35b9c77a8"),
    ("film", 300, 260, "no-clahe"): ("1ba5ae842570c38a", "a9bf819af2ccc91a"),
    ("film", 300, 260, "letterbox"): ("909ab758815435b2", "e96c471b1fb933a9"),
    ("film", 300, 260, "crop-320"): ("e81a99b0c58eab08", "f8c0442c6017ccc4"),
    ("film", 64, 100, "default"): ("3576ca9b1454157f", "a12d78982c40a7b3"),
    ("film", 500, 120, "default"): ("9978d74959494601", "0f15babae271feb3"),
    ("film", 500, 120, "letterbox"): ("edd874eeefc1f51f", "25ab09c89e8112aa"),
    ("film", 224, 224, "default"): ("07a9c76d03c5ada2", "b8262a150850b96a"),
    ("film", 1024, 1024, "default"): ("15258f624eb881e9", "00a1c9cb90c781a4"),
}


@pytest.mark.parametrize("case", list(GOLDEN), ids=lambda case: "-".join(map(str, case)))
def test_golden(case: tuple[str, int, int, str]) -> None:
    name, height, width, spec_name = case
    standardized = standardize(pattern(name, height, width), GOLDEN_SPECS[spec_name])
    found = (
        hashlib.sha256(standardized.tobytes()).hexdigest()[:16],
        hashlib.sha256(normalize(standardized).tobytes()).hexdigest()[:16],
    )
    assert found == GOLDEN[case], f"other bits with OpenCV {cv2.__version__} and NumPy {np.__version__}"


def test_golden_sample() -> None:
    """Some frozen pixels in the clear, for the day that a hash differs: is it one grey level, or all?"""
    standardized = standardize(pattern("film", 300, 260), DEFAULT)
    np.testing.assert_array_equal(
        standardized[16::32, 16::32],
        [
            [48, 107, 91, 110, 87, 106, 48],
            [106, 172, 180, 195, 174, 172, 106],
            [87, 180, 191, 214, 188, 180, 88],
            [103, 197, 210, 249, 223, 194, 99],
            [89, 172, 187, 226, 183, 174, 85],
            [104, 170, 183, 194, 177, 167, 104],
            [42, 110, 84, 102, 81, 106, 40],
        ],
    )


def test_spec_json_and_hash_are_frozen() -> None:
    assert DEFAULT.canonical_json() == (
        '{"clahe_clip":4.0,"clahe_grid":4,"fit":"stretch","normalization":"image-zscore",'
        '"resize":"area-then-linear","size":224,"version":1}'
    )
    assert DEFAULT.sha256() == "2d880c3e62b43e65e692acb29e84c6d684e8bf6a627bde28346cee130cd7387f"


# ---------------------------------------------------------------- resize, against matrices in float64


def area_matrix(source: int, target: int) -> np.ndarray:
    """(target, source) weights: the share of each source pixel in each target pixel, rows sum to 1."""
    scale = source / target
    matrix = np.zeros((target, source))
    for i in range(target):
        for j in range(source):
            matrix[i, j] = max(0.0, min((i + 1) * scale, j + 1) - max(i * scale, j)) / scale
    return matrix


def linear_matrix(source: int, target: int) -> np.ndarray:
    """(target, source) weights of bilinear interpolation, half-pixel centres, edges repeated."""
    matrix = np.zeros((target, source))
    for i in range(target):
        position = (i + 0.5) * source / target - 0.5
        low = int(np.floor(position))
        for j, weight in ((low, 1 - (position - low)), (low + 1, position - low)):
            matrix[i, min(max(j, 0), source - 1)] += weight
    return matrix


def slow_resize(pixels: np.ndarray, width: int, height: int) -> np.ndarray:
    """Each axis shrinks by area averaging, is rounded to grey levels, then grows bilinearly; float64."""
    small_height, small_width = min(height, pixels.shape[0]), min(width, pixels.shape[1])
    small = area_matrix(pixels.shape[0], small_height) @ pixels @ area_matrix(pixels.shape[1], small_width).T
    if (small_height, small_width) == (height, width):
        return small
    return linear_matrix(small_height, height) @ np.rint(small) @ linear_matrix(small_width, width).T


@settings(max_examples=80, deadline=None)
@given(
    height=st.integers(1, 200),
    width=st.integers(1, 200),
    size=st.sampled_from([32, 64, 96]),
    seed=st.integers(0, 99),
)
def test_stretch_equals_the_slow_resize(height: int, width: int, size: int, seed: int) -> None:
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width)).astype(np.uint8)
    found = standardize(pixels, replace(PLAIN, size=size))
    expected = slow_resize(pixels, size, size)
    # Rounding, half a grey level; growing adds OpenCV's weights of 11 bits; where both steps act,
    # a tie of the first may fall the other way
    grows = min(height, width) < size
    both = grows and size < max(height, width)
    assert np.abs(found - expected).max() <= (2.0 if both else 1.0 if grows else 0.51)


@pytest.mark.parametrize("factor", [2, 3, 4, 7])
def test_a_whole_shrink_is_the_mean_of_blocks(factor: int) -> None:
    pixels = pattern("noise", 32 * factor, 32 * factor)
    blocks = pixels.reshape(32, factor, 32, factor).mean(axis=(1, 3))
    assert np.abs(standardize(pixels, replace(PLAIN, size=32)) - blocks).max() <= 0.5


@settings(max_examples=60, deadline=None)
@given(height=st.integers(1, 200), width=st.integers(1, 200), size=st.sampled_from([32, 64, 96]))
def test_letterbox_and_crop_place_the_slow_resize(height: int, width: int, size: int) -> None:
    pixels = pattern("waves", height, width)
    box = replace(PLAIN, size=size, fit="letterbox")
    found = standardize(pixels, box).astype(float)
    where = placement(Region(0, 0, width, height), box)
    left, top = -where.left / where.scale_x, -where.top / where.scale_y
    inner_width, inner_height = width / where.scale_x, height / where.scale_y
    for value in (left, top, inner_width, inner_height):
        assert value == pytest.approx(round(value), abs=1e-6)
    rows = slice(round(top), round(top + inner_height))
    columns = slice(round(left), round(left + inner_width))
    expected = np.zeros((size, size))
    expected[rows, columns] = slow_resize(pixels, round(inner_width), round(inner_height))
    assert np.abs(found - expected).max() <= 2.0
    assert max(inner_width, inner_height) == pytest.approx(size)
    assert abs((size - inner_width) / 2 - left) <= 0.5 + 1e-6, "the image is not in the middle"

    crop = replace(PLAIN, size=size, fit="crop")
    side = min(width, height)
    top, left = (height - side) // 2, (width - side) // 2
    expected = slow_resize(pixels[top : top + side, left : left + side], size, size)
    assert np.abs(standardize(pixels, crop) - expected).max() <= 2.0


# ---------------------------------------------------------------- CLAHE, pixel by pixel


def slow_clahe(pixels: np.ndarray, clip: float, grid: int) -> np.ndarray:
    """Contrast limited adaptive histogram equalization, as OpenCV defines its details.

    K. Zuiderveld, Graphics Gems IV, 1994: equalize each tile with a clipped histogram, then
    interpolate bilinearly between the four nearest tiles' tables.
    """
    size = pixels.shape[0]
    tile = size // grid
    limit = max(1, int(clip * tile * tile / 256))
    tables = np.zeros((grid, grid, 256))
    for row in range(grid):
        for column in range(grid):
            block = pixels[row * tile : (row + 1) * tile, column * tile : (column + 1) * tile]
            counts = [int((block == level).sum()) for level in range(256)]
            excess = sum(max(0, count - limit) for count in counts)
            counts = [min(count, limit) + excess // 256 for count in counts]
            left_over = excess % 256
            if left_over:
                step = max(256 // left_over, 1)
                for level in range(0, 256, step)[:left_over]:
                    counts[level] += 1
            tables[row, column] = np.rint(np.cumsum(counts) * 255 / (tile * tile))
    result = np.zeros(pixels.shape)
    for y in range(size):
        for x in range(size):
            fy, fx = y / tile - 0.5, x / tile - 0.5
            y0, x0 = int(np.floor(fy)), int(np.floor(fx))
            total = 0.0
            for ty, wy in ((y0, 1 - (fy - y0)), (y0 + 1, fy - y0)):
                for tx, wx in ((x0, 1 - (fx - x0)), (x0 + 1, fx - x0)):
                    table = tables[min(max(ty, 0), grid - 1), min(max(tx, 0), grid - 1)]
                    total += wy * wx * table[pixels[y, x]]
            result[y, x] = total
    return result


@pytest.mark.parametrize(("clip", "grid"), [(4.0, 4), (2.0, 8), (1.0, 1), (40.0, 2)])
@pytest.mark.parametrize("name", ["noise", "waves", "film"])
def test_clahe_equals_the_slow_one(name: str, clip: float, grid: int) -> None:
    pixels = pattern(name, 64, 64)
    found = standardize(pixels, PreprocessingSpec(size=64, clahe_clip=clip, clahe_grid=grid))
    # Rounding, and ties of a table's entries between single and double precision
    assert np.abs(found - slow_clahe(pixels, clip, grid)).max() <= 1.01


def test_clahe_raises_the_contrast_of_a_flat_film() -> None:
    pixels = (100 + pattern("film", 224, 224) // 32).astype(np.uint8)
    assert standardize(pixels, DEFAULT).std() > 2 * pixels.std()


# ---------------------------------------------------------------- normalize


@settings(max_examples=60, deadline=None)
@given(size=st.sampled_from([32, 96]), seed=st.integers(0, 99), low=st.integers(0, 250), span=st.integers(1, 256))
def test_normalize_is_the_z_score(size: int, seed: int, low: int, span: int) -> None:
    high = min(low + span, 256)
    image = np.random.default_rng(seed).integers(low, max(high, low + 1), (size, size)).astype(np.uint8)
    found = normalize(image)
    exact = image.astype(np.float64)
    expected = np.zeros_like(exact) if exact.std() == 0 else (exact - exact.mean()) / exact.std()
    assert found.shape == (1, size, size)
    assert found.dtype == np.float32
    np.testing.assert_allclose(found[0], expected, rtol=3e-6, atol=3e-5)


@pytest.mark.parametrize("level", [0, 1, 127, 255])
def test_normalize_of_a_constant_is_zero(level: int) -> None:
    assert not normalize(np.full((32, 32), level, np.uint8)).any()


def test_normalize_of_one_differing_pixel_is_finite() -> None:
    image = np.full((2048, 2048), 254, np.uint8)
    image[7, 9] = 255
    found = normalize(image)
    assert np.isfinite(found).all()
    assert found[0, 7, 9] == pytest.approx(np.sqrt(image.size - 1), rel=1e-3)


def test_normalize_does_not_depend_on_the_order_of_pixels() -> None:
    image = pattern("film", 96, 96)
    order = np.random.default_rng(3).permutation(image.size)
    shuffled = normalize(image.ravel()[order].reshape(96, 96))
    np.testing.assert_array_equal(shuffled.ravel(), normalize(image).ravel()[order])


def test_preprocess_is_the_composition() -> None:
    pixels = pattern("waves", 150, 130)
    np.testing.assert_array_equal(preprocess(pixels, DEFAULT), normalize(standardize(pixels, DEFAULT)))


# ---------------------------------------------------------------- geometry


@settings(max_examples=200, deadline=None)
@given(
    shape=st.tuples(st.integers(1, 200), st.integers(1, 200)),
    fit=st.sampled_from(["stretch", "letterbox", "crop"]),
    size=st.sampled_from([32, 64, 224]),
    data=st.data(),
)
def test_a_bright_region_maps_back_to_its_place(
    shape: tuple[int, int], fit: Fit, size: int, data: st.DataObject
) -> None:
    height, width = shape
    spec = replace(PLAIN, fit=fit, size=size)
    side = min(height, width)
    top, left = ((height - side) // 2, (width - side) // 2) if fit == "crop" else (0, 0)
    bottom, right = (top + side, left + side) if fit == "crop" else (height, width)
    y0, x0 = data.draw(st.integers(top, bottom - 1)), data.draw(st.integers(left, right - 1))
    y1, x1 = data.draw(st.integers(y0 + 1, bottom)), data.draw(st.integers(x0 + 1, right))
    pixels = np.zeros(shape, np.uint8)
    pixels[y0:y1, x0:x1] = 255
    square = standardize(pixels, spec).astype(np.float64)
    where = placement(Region(0, 0, width, height), spec)
    if square.sum() < 100:
        # A sliver that the shrink averages away has no place left to compare
        assert (y1 - y0) * (x1 - x0) / (where.scale_x * where.scale_y) < 1
        return
    centres = np.arange(size) + 0.5
    x = where.left + (square.sum(axis=0) @ centres) / square.sum() * where.scale_x
    y = where.top + (square.sum(axis=1) @ centres) / square.sum() * where.scale_y
    # Within half a pixel of the coarser of the two grids
    assert abs(x - (x0 + x1) / 2) <= 0.5 * max(where.scale_x, 1) + 0.1
    assert abs(y - (y0 + y1) / 2) <= 0.5 * max(where.scale_y, 1) + 0.1


@settings(max_examples=100, deadline=None)
@given(
    shape=st.tuples(st.integers(1, 200), st.integers(1, 200)),
    fit=st.sampled_from(["stretch", "letterbox", "crop"]),
    level=st.integers(0, 255),
)
def test_any_shape_becomes_a_square(shape: tuple[int, int], fit: Fit, level: int) -> None:
    pixels = np.full(shape, level, np.uint8)
    square = standardize(pixels, replace(PLAIN, size=64, fit=fit))
    assert square.shape == (64, 64)
    assert square.dtype == np.uint8
    assert set(np.unique(square)) <= {level, 0 if fit == "letterbox" else level}
    assert np.isfinite(preprocess(pixels, replace(DEFAULT, size=64, fit=fit))).all()


def test_views_and_their_copies_give_the_same() -> None:
    pixels = pattern("noise", 300, 260)
    for view in (pixels.T, pixels[::-1, ::2], pixels[5:200, 7:150]):
        np.testing.assert_array_equal(standardize(view, DEFAULT), standardize(view.copy(), DEFAULT))


# ---------------------------------------------------------------- refusals and the spec


@pytest.mark.parametrize(
    "pixels",
    [
        np.zeros((4, 4)),
        np.zeros((4, 4, 3), np.uint8),
        np.zeros((0, 4), np.uint8),
        np.zeros((4, 4), np.uint16),
    ],
)
def test_standardize_refuses_other_arrays(pixels: np.ndarray) -> None:
    with pytest.raises(ValueError, match="expected uint8"):
        standardize(pixels, DEFAULT)


def test_normalize_refuses_other_arrays() -> None:
    with pytest.raises(ValueError, match="expected uint8"):
        normalize(np.zeros((1, 8, 8), np.uint8))


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"size": 225}, "size is 225: expected a multiple of 32"),
        ({"size": 0}, "expected a multiple of 32"),
        ({"size": 224.0}, "size is 224.0: expected a whole number"),
        ({"clahe_grid": True}, "clahe_grid is True: expected a whole number"),
        ({"clahe_grid": 5}, "clahe_grid 5 does not divide size 224"),
        ({"clahe_clip": float("nan")}, "clahe_clip must be"),
        ({"clahe_clip": "4"}, "clahe_clip is '4': expected a number"),
        ({"fit": "pad"}, "fit is 'pad': expected stretch, letterbox or crop"),
    ],
)
def test_spec_names_what_is_wrong(change: dict[str, object], match: str) -> None:
    with pytest.raises(UsageError, match=match):
        PreprocessingSpec(**change)  # pyright: ignore[reportArgumentType]
    with pytest.raises(ArtefactError, match=match):
        PreprocessingSpec.from_dict({**DEFAULT.to_dict(), **change})


def test_spec_of_another_version_is_refused() -> None:
    for version in (2, 3):
        with pytest.raises(ArtefactError, match=r"(version 3|expected exactly)"):
            PreprocessingSpec.from_dict({**DEFAULT.to_dict(), "version": version})
    with pytest.raises(ArtefactError, match="version 3 with crop none is not one of this magsd"):
        PreprocessingSpec(version=3)
    for change in ({"resize": "nearest"}, {"normalization": "minmax"}):
        with pytest.raises(ArtefactError, match="is unknown"):
            PreprocessingSpec.from_dict({**DEFAULT.to_dict(), **change})


@pytest.mark.parametrize("value", [{}, None, [], {**DEFAULT.to_dict(), "sharpen": 1}])
def test_spec_that_is_not_understood_whole_is_refused(value: object) -> None:
    with pytest.raises(ArtefactError, match="expected exactly"):
        PreprocessingSpec.from_dict(value)  # pyright: ignore[reportArgumentType]


@given(
    size=st.sampled_from([32, 224, 320]),
    fit=st.sampled_from(["stretch", "letterbox", "crop"]),
    clip=st.one_of(st.integers(0, 100), st.floats(0, 100)),
    grid=st.sampled_from([1, 2, 4, 8]),
)
def test_spec_survives_its_dictionary(size: int, fit: Fit, clip: float, grid: int) -> None:
    spec = PreprocessingSpec(size=size, fit=fit, clahe_clip=clip, clahe_grid=grid)
    again = PreprocessingSpec.from_dict(spec.to_dict())
    assert again == spec
    assert again.sha256() == spec.sha256()


def test_4_and_4_point_0_are_one_spec() -> None:
    assert PreprocessingSpec(clahe_clip=4).sha256() == DEFAULT.sha256()

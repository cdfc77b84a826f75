"""The grayscale pipeline against a slow reading of the standard, one pixel at a time, and against real files.

The reference below is written from PS3.3, C.7.5.1.1.2, C.7.6.3, C.11.1, C.11.2 and C.8.11.3.1.2, and PS3.4, N.2;
it shares nothing with the code under test.
"""

from __future__ import annotations

import itertools
import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from magsd_runtime.dicom.grayscale import (
    GrayscaleTransform,
    LookupTable,
    Rescale,
    Window,
    percentile_window,
    render,
    stored_values,
)

# ---------------------------------------------------------------- the slow reading


def slow_stored(pattern: int, bits: int, signed: bool) -> int:
    """PS3.5, 8.1.1: two's complement in the bits stored."""
    return pattern - (1 << bits) if signed and pattern >> (bits - 1) else pattern


def slow_table(value: float, first: int, entries: list[int]) -> int:
    """C.11.1.1.1: the first entry for anything below, the last for anything above."""
    at = math.floor(value - first + 0.5)
    if at < 0:
        return entries[0]
    return entries[at] if at < len(entries) else entries[-1]


def slow_window(x: float, c: float, w: float, function: str, y_min: float, y_max: float) -> float:
    """C.11.2.1.2.1, C.11.2.1.3.1 (sigmoid), C.11.2.1.3.2 (linear exact)."""
    if function == "SIGMOID":
        exponent = -4 * (x - c) / w
        return y_min if exponent > 700 else (y_max - y_min) / (1 + math.exp(exponent)) + y_min
    if function == "LINEAR_EXACT":
        if x <= c - w / 2:
            return y_min
        if x > c + w / 2:
            return y_max
        return ((x - c) / w + 0.5) * (y_max - y_min) + y_min
    if x <= c - 0.5 - (w - 1) / 2:
        return y_min
    if x > c - 0.5 + (w - 1) / 2:
        return y_max
    return ((x - (c - 0.5)) / (w - 1) + 0.5) * (y_max - y_min) + y_min


def slow_percentiles(values: list[float]) -> tuple[float, float]:
    """The nearest rank of 0.5 and 99.5 percent; the extremes where they coincide."""
    ordered = sorted(values)
    if not ordered:
        return 0.0, 0.0
    low, high = (ordered[max(1, math.ceil(percent * len(ordered) / 100)) - 1] for percent in (0.5, 99.5))
    return (ordered[0], ordered[-1]) if low == high else (low, high)


def slow_render(patterns: np.ndarray, how: dict[str, Any]) -> np.ndarray:
    """Exact greys, float (H, W), 0 to 255."""
    bits, signed = how["bits"], how.get("signed", False)
    stored = [slow_stored(int(pattern), bits, signed) for pattern in patterns.ravel()]
    low, high = how.get("padding") or (1, 0)
    padded = [low <= value <= high for value in stored]
    if "modality_lut" in how:
        values: list[float] = [slow_table(value, *how["modality_lut"]) for value in stored]
    else:
        slope, intercept = how.get("rescale", (1, 0))
        values = [slope * value + intercept for value in stored]
    if "voi_lut" in how:
        first, entry_bits, entries = how["voi_lut"]
        greys = [slow_table(value, first, entries) * 255 / (2**entry_bits - 1) for value in values]
    elif "window" in how:
        greys = [slow_window(value, *how["window"], 0, 255) for value in values]
    elif bits == 8 and not signed and "modality_lut" not in how and how.get("rescale", (1, 0)) == (1, 0):
        greys = values
    else:
        ends = slow_percentiles([value for value, out in zip(values, padded) if not out])
        spread = (ends[1] - ends[0]) or math.inf
        greys = [255 * min(1.0, max(0.0, (value - ends[0]) / spread)) for value in values]
    if how["photometric"] == "MONOCHROME1":
        greys = [255 - grey for grey in greys]
    return np.array([0 if out else grey for grey, out in zip(greys, padded)], float).reshape(patterns.shape)


def transform_of(how: dict[str, Any]) -> GrayscaleTransform:
    modality: Any = Rescale(*map(float, how.get("rescale", (1, 0))))
    if "modality_lut" in how:
        modality = LookupTable(how["modality_lut"][0], 16, np.array(how["modality_lut"][1], np.uint16))
    voi: Any = None
    if "voi_lut" in how:
        voi = LookupTable(how["voi_lut"][0], how["voi_lut"][1], np.array(how["voi_lut"][2], np.uint16))
    elif "window" in how:
        voi = Window(*how["window"])
    return GrayscaleTransform(
        how["bits"],
        how.get("signed", False),
        how.get("padding"),
        modality,
        voi,
        how["photometric"] == "MONOCHROME1",
    )


def film_patterns(bits: int, seed: int = 0) -> np.ndarray:
    """Unsigned patterns (24, 20) that use all bits, with both ends and the sign bit's sides among them."""
    rng = np.random.default_rng(seed)
    patterns = rng.integers(0, 2**bits, (24, 20))
    patterns[0, :6] = [0, 1, 2 ** (bits - 1) - 1, 2 ** (bits - 1), 2**bits - 2, 2**bits - 1]
    return patterns.astype(np.uint8 if bits == 8 else np.uint16)


def assert_equal(patterns: np.ndarray, how: dict[str, Any]) -> None:
    pixels, _ = render(patterns, transform_of(how))
    assert pixels.dtype == np.uint8
    assert pixels.shape == patterns.shape
    # Half a level of rounding, and what two orders of the same sum differ by
    assert np.abs(pixels - slow_render(patterns, how)).max() <= 0.5 + 1e-6


# ---------------------------------------------------------------- the matrix

MODALITIES: dict[str, dict[str, Any]] = {
    "as it is": {},
    "rescale": {"rescale": (2.5, -300)},
    "falling": {"rescale": (-1, 100)},
    "table": {"modality_lut": (10, [900 + 7 * n for n in range(300)])},
}
WINDOWS: dict[str, dict[str, Any]] = {
    "none": {},
    "linear": {"window": (120.0, 300.0, "LINEAR")},
    "narrow": {"window": (127.5, 1.0, "LINEAR")},
    "exact": {"window": (100.25, 77.5, "LINEAR_EXACT")},
    "tiny": {"window": (100.25, 0.125, "LINEAR_EXACT")},
    "sigmoid": {"window": (90.0, 400.0, "SIGMOID")},
    "table": {"voi_lut": (-20, 12, [min(4095, 13 * n) for n in range(400)])},
    "table of 8 bits": {"voi_lut": (5, 8, [255 - n for n in range(256)])},
}


@pytest.mark.parametrize("bits", range(8, 17))
@pytest.mark.parametrize("signed", [False, True], ids=["unsigned", "signed"])
def test_the_matrix(bits: int, signed: bool) -> None:
    patterns = film_patterns(bits)
    kinds = itertools.product(("MONOCHROME1", "MONOCHROME2"), MODALITIES.values(), WINDOWS.values(), (None, (3, 40)))
    for photometric, modality, window, padding in kinds:
        how = {"bits": bits, "signed": signed, "photometric": photometric, "padding": padding, **modality, **window}
        try:
            assert_equal(patterns, how)
        except AssertionError as error:
            raise AssertionError(f"{how}") from error


NUMBERS = st.floats(-1e5, 1e5, allow_nan=False)


@settings(max_examples=150, deadline=None)
@given(
    bits=st.integers(8, 16),
    signed=st.booleans(),
    inverted=st.booleans(),
    rescale=st.tuples(NUMBERS.filter(bool), NUMBERS),
    window=st.tuples(NUMBERS, st.floats(1, 1e6), st.sampled_from(["LINEAR", "LINEAR_EXACT", "SIGMOID"])),
    seed=st.integers(0, 1000),
)
def test_any_rescale_and_window(
    bits: int, signed: bool, inverted: bool, rescale: tuple[float, float], window: tuple[Any, ...], seed: int
) -> None:
    how = {
        "bits": bits, "signed": signed, "photometric": f"MONOCHROME{1 if inverted else 2}",
        "rescale": rescale, "window": window,
    }  # fmt: skip
    pixels, _ = render(film_patterns(bits, seed), transform_of(how))
    exact = slow_render(film_patterns(bits, seed), how)
    far = np.abs(pixels - exact) > 0.5 + 1e-6
    # A window narrower than the spacing of floats at these values jumps; nowhere else may they differ
    assert not far.any() or (window[1] <= 1 + 1e-6 and set(pixels[far]) <= {0, 255})


# ---------------------------------------------------------------- single rules


def test_padding_is_black_whatever_the_polarity_and_moves_no_percentile() -> None:
    patterns = np.arange(1000, 1400, dtype=np.uint16).reshape(20, 20)
    patterns[:5] = 4000
    for photometric in ("MONOCHROME1", "MONOCHROME2"):
        how = {"bits": 12, "photometric": photometric, "padding": (4000, 4095)}
        pixels, shown = render(patterns, transform_of(how))
        assert (pixels[:5] == 0).all()
        assert shown.padded == 0.25
        assert (shown.kind, shown.low, shown.high) == ("percentile", 1101.0, 1398.0)
        assert_equal(patterns, how)


def test_eight_bits_without_a_window_are_left_alone() -> None:
    patterns = np.arange(256, dtype=np.uint8).reshape(16, 16)
    pixels, shown = render(patterns, GrayscaleTransform(8))
    np.testing.assert_array_equal(pixels, patterns)
    assert shown.kind == "full"
    inverted, _ = render(patterns, GrayscaleTransform(8, inverted=True))
    np.testing.assert_array_equal(inverted, 255 - patterns)


def test_eight_bits_with_a_rescale_are_not() -> None:
    patterns = np.arange(100, 164, dtype=np.uint8).reshape(8, 8)
    pixels, shown = render(patterns, GrayscaleTransform(8, modality=Rescale(2.0, 0.0)))
    assert shown.kind == "percentile"
    assert (pixels.min(), pixels.max()) == (0, 255)


@given(st.lists(st.integers(-50, 50), min_size=0, max_size=400), st.booleans())
def test_percentiles_are_those_of_numpy(values: list[int], falling: bool) -> None:
    levels = np.arange(-50, 51, dtype=np.float64)
    counts = np.bincount(np.array(values, int) + 50, minlength=101)
    found = percentile_window(-levels if falling else levels, counts)
    expected = slow_percentiles([-value if falling else value for value in values])
    assert found == expected
    if values and expected[0] != min(-v if falling else v for v in values):
        numpy = np.percentile([-v if falling else v for v in values], (0.5, 99.5), method="inverted_cdf")
        assert found == tuple(numpy)


def test_a_film_of_one_value_has_no_window() -> None:
    pixels, shown = render(np.full((8, 8), 700, np.uint16), GrayscaleTransform(12))
    assert (shown.low, shown.high) == (700, 700)
    assert (pixels == 0).all()
    pixels, shown = render(np.full((8, 8), 700, np.uint16), GrayscaleTransform(12, padding=(700, 700)))
    assert (shown.padded, shown.low, pixels.max()) == (1.0, 0.0, 0)


def test_a_marker_in_a_corner_does_not_set_the_window() -> None:
    patterns = film_patterns(10).astype(np.uint16)
    patterns = np.tile(patterns, (10, 10))
    marked = patterns.copy()
    marked[:5, :20] = 65_535  # 0.2 % of the pixels
    _, plain = render(patterns, GrayscaleTransform(16))
    _, shown = render(marked, GrayscaleTransform(16))
    assert shown.high is not None
    assert plain.high is not None
    assert abs(shown.high - plain.high) <= 8


@pytest.mark.parametrize("bits", [8, 12, 16])
def test_stored_values(bits: int) -> None:
    for signed in (False, True):
        expected = [slow_stored(pattern, bits, signed) for pattern in range(2**bits)]
        assert stored_values(bits, signed).tolist() == expected


def test_pydicom_agrees_on_a_plain_window() -> None:
    pydicom = pytest.importorskip("pydicom")
    from pydicom.pixels import apply_rescale, apply_voi_lut

    patterns = film_patterns(12)
    dataset = pydicom.Dataset()
    dataset.BitsStored, dataset.BitsAllocated, dataset.PixelRepresentation = 12, 16, 0
    dataset.PhotometricInterpretation = "MONOCHROME2"
    dataset.RescaleSlope, dataset.RescaleIntercept = 2, -1024
    for function in ("LINEAR", "LINEAR_EXACT", "SIGMOID"):
        dataset.WindowCenter, dataset.WindowWidth, dataset.VOILUTFunction = 900, 3000, function
        theirs = apply_voi_lut(apply_rescale(patterns, dataset), dataset)  # in units of the rescaled range
        low, high = -1024.0, 2 * 4095 - 1024.0
        expected = 255 * (theirs - low) / (high - low)
        pixels, _ = render(
            patterns,
            GrayscaleTransform(12, modality=Rescale(2, -1024), voi=Window(900, 3000, function)),  # type: ignore[arg-type]
        )
        assert np.abs(pixels - expected).max() <= 0.5 + 1e-6

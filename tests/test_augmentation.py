"""Data augmentation against torchvision and a slow inverse mapping, and the z-score against the runtime's."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from torchvision.transforms import InterpolationMode
from torchvision.transforms.v2 import functional as vision

from magsd.augmentation import (
    AugmentationDraws,
    AugmentationRanges,
    augment,
    draw_augmentation,
    normalize_batch,
)
from magsd_runtime.errors import UsageError
from magsd_runtime.preprocessing import normalize

IDENTITY = {
    "brightness": 1.0, "contrast": 1.0, "crop": (0.0, 0.0, 1.0, 1.0),
    "rotation": 0.0, "horizontal_flip": False, "vertical_flip": False,
}  # fmt: skip


def draws_of(*images):
    """Draws of one dict of differences from the identity an image."""
    rows = [{**IDENTITY, **image} for image in images]
    return AugmentationDraws(**{name: torch.tensor([row[name] for row in rows]) for name in IDENTITY})


def slow_warp(image, *, crop, rotation, horizontal_flip, vertical_flip):
    """Trace every pixel of the result back, in float64: (S, S) -> (S, S), bilinear, zeros outside."""
    size = len(image)
    left, top, width, height = crop
    angle = math.radians(rotation)
    result = np.zeros((size, size))
    for row in range(size):
        for column in range(size):
            # pixel centres; the image spans 0 to size
            x, y = column + 0.5, row + 0.5
            if horizontal_flip:
                x = size - x
            if vertical_flip:
                y = size - y
            # the content turned counter-clockwise as seen, so the source lies clockwise; y points down
            dx, dy = x - size / 2, y - size / 2
            x = size / 2 + math.cos(angle) * dx - math.sin(angle) * dy
            y = size / 2 + math.sin(angle) * dx + math.cos(angle) * dy
            x, y = left * size + width * x - 0.5, top * size + height * y - 0.5
            x0, y0 = math.floor(x), math.floor(y)
            for v, weight_y in ((y0, 1 - (y - y0)), (y0 + 1, y - y0)):
                for u, weight_x in ((x0, 1 - (x - x0)), (x0 + 1, x - x0)):
                    if 0 <= u < size and 0 <= v < size:
                        result[row, column] += weight_x * weight_y * image[v, u]
    return result


@st.composite
def geometry(draw):
    width, height = draw(st.floats(0.3, 1)), draw(st.floats(0.3, 1))
    return {
        "crop": (draw(st.floats(0, 1)) * (1 - width), draw(st.floats(0, 1)) * (1 - height), width, height),
        "rotation": draw(st.floats(-120, 120)),
        "horizontal_flip": draw(st.booleans()),
        "vertical_flip": draw(st.booleans()),
    }


@given(geometry(), st.integers(3, 24), st.integers(0, 2**31))
@settings(max_examples=80, deadline=None)
def test_the_warp_is_crop_then_rotation_then_flips(parameters, size, seed):
    image = np.random.default_rng(seed).integers(0, 256, (size, size)).astype(np.uint8)
    result = augment(torch.from_numpy(image)[None, None], draws_of(parameters))
    np.testing.assert_allclose(result[0, 0].numpy(), slow_warp(image, **parameters), atol=0.05)


@given(hnp.arrays(np.uint8, (2, 1, 12, 12)))
@settings(max_examples=30, deadline=None)
def test_an_image_for_which_nothing_was_drawn_comes_back_exactly(pixels):
    images = torch.from_numpy(pixels)
    result = augment(images, draws_of({}, {"rotation": 45.0}))
    assert result.dtype == torch.float32
    assert torch.equal(result[0], images[0].float())
    fractions = images / 3
    assert torch.equal(augment(fractions, draws_of({}, {}))[0], fractions[0])


@pytest.fixture(scope="module")
def photograph() -> torch.Tensor:
    """Smooth with noise, float32 (1, 1, 64, 64), 0 to 255."""
    rng = np.random.default_rng(0)
    y, x = np.mgrid[0:64, 0:64]
    image = 128 + 60 * np.sin(x / 9) * np.cos(y / 7) + rng.normal(0, 8, (64, 64))
    return torch.from_numpy(np.clip(image, 0, 255).astype(np.float32))[None, None]


def test_intensities_are_torchvisions(photograph):
    for factor in (0.5, 0.83, 1.7):
        result = augment(photograph, draws_of({"brightness": factor}))
        expected = vision.adjust_brightness(photograph / 255, factor) * 255
        torch.testing.assert_close(result, expected, atol=1e-3, rtol=0)
        result = augment(photograph, draws_of({"contrast": factor}))
        expected = vision.adjust_contrast(photograph / 255, factor) * 255
        torch.testing.assert_close(result, expected, atol=1e-3, rtol=0)
    both = augment(photograph, draws_of({"brightness": 0.6, "contrast": 0.8}))
    expected = vision.adjust_contrast(vision.adjust_brightness(photograph / 255, 0.6), 0.8) * 255
    torch.testing.assert_close(both, expected, atol=1e-3, rtol=0)


def test_flips_and_rotations_are_torchvisions(photograph):
    flipped = augment(photograph, draws_of({"horizontal_flip": True}))
    torch.testing.assert_close(flipped, vision.horizontal_flip(photograph), atol=0.02, rtol=0)
    flipped = augment(photograph, draws_of({"vertical_flip": True}))
    torch.testing.assert_close(flipped, vision.vertical_flip(photograph), atol=0.02, rtol=0)
    for angle in (-120.0, -37.5, 10.0, 90.0):
        rotated = augment(photograph, draws_of({"rotation": angle}))
        expected = vision.rotate(photograph, angle, interpolation=InterpolationMode.BILINEAR)
        torch.testing.assert_close(rotated, expected, atol=0.05, rtol=0)


def test_the_resized_crop_is_torchvisions_within_its_edges(photograph):
    left, top, width, height = 8, 20, 48, 40
    crop = (left / 64, top / 64, width / 64, height / 64)
    result = augment(photograph, draws_of({"crop": crop}))
    expected = vision.resized_crop(photograph, top, left, height, width, [64, 64], antialias=False)
    # at its edges torchvision repeats the crop's last pixel, the warp sees the image's next one
    torch.testing.assert_close(result[..., 2:-2, 2:-2], expected[..., 2:-2, 2:-2], atol=0.02, rtol=0)


def test_draws_are_independent_and_fill_their_ranges():
    n = 20_000
    ranges = AugmentationRanges()
    draws = draw_augmentation(ranges, n, torch.Generator().manual_seed(0))
    left, top, width, height = draws.crop.double().unbind(1)
    chosen = torch.stack(
        [draws.brightness != 1, draws.contrast != 1, width * height < 1 - 1e-6, draws.rotation != 0,
         draws.horizontal_flip, draws.vertical_flip]
    ).double()  # fmt: skip
    np.testing.assert_allclose(chosen.mean(1), 0.5, atol=0.02)
    np.testing.assert_allclose(torch.corrcoef(chosen).fill_diagonal_(0), 0, atol=0.03)
    for values, (low, high) in (
        (draws.brightness[chosen[0].bool()], ranges.brightness),
        (draws.contrast[chosen[1].bool()], ranges.contrast),
        ((width * height)[chosen[2].bool()], ranges.crop_scale),
        ((width / height)[chosen[2].bool()], ranges.crop_ratio),
        (draws.rotation[chosen[3].bool()], (-120.0, 120.0)),
    ):
        span = high - low
        assert low - 1e-5 <= values.min() < low + 0.02 * span
        assert high - 0.02 * span < values.max() <= high + 1e-5
    assert min(left.min(), top.min()) >= 0
    assert max((left + width).max(), (top + height).max()) <= 1 + 1e-6
    # neither side of the ratio is preferred
    assert abs(float((width / height).log().mean())) < 0.01


def test_probability_zero_is_the_identity_and_one_is_all():
    generator = torch.Generator().manual_seed(1)
    none = draw_augmentation(AugmentationRanges(probability=0), 50, generator)
    for name, value in IDENTITY.items():
        assert torch.equal(getattr(none, name), getattr(draws_of(*[{}] * 50), name)), name
        assert value == getattr(none, name)[0].tolist() or list(value) == getattr(none, name)[0].tolist()
    everything = draw_augmentation(AugmentationRanges(probability=1, vertical_flip=False), 50, generator)
    assert bool(everything.horizontal_flip.all())
    assert not bool(everything.vertical_flip.any())
    assert bool((everything.rotation != 0).all())
    assert bool((everything.brightness < 1).all())


def test_the_same_generator_gives_the_same_draws():
    first = draw_augmentation(AugmentationRanges(), 8, torch.Generator().manual_seed(2))
    second = draw_augmentation(AugmentationRanges(), 8, torch.Generator().manual_seed(2))
    for name in IDENTITY:
        assert torch.equal(getattr(first, name), getattr(second, name))


def test_a_crop_ratio_that_never_fits_stays_inside_the_image():
    ranges = AugmentationRanges(probability=1, crop_scale=(0.9, 1.0), crop_ratio=(3.0, 4.0))
    draws = draw_augmentation(ranges, 200, torch.Generator().manual_seed(3))
    left, top, width, height = draws.crop.unbind(1)
    assert width.max() == 1
    assert (left + width).max() <= 1
    assert (top + height).max() <= 1 + 1e-6
    assert height.min() > 0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"probability": 1.5}, "probability is 1.5"),
        ({"brightness": (1.0, 0.5)}, "brightness is 1.0, 0.5"),
        ({"crop_scale": (0.5, 1.5)}, "crop_scale ends at 1.5"),
        ({"rotation": -1.0}, "at least 0"),
    ],
)
def test_impossible_ranges_are_refused(change, message):
    with pytest.raises(UsageError, match=message):
        dataclasses.replace(AugmentationRanges(), **change)


@given(
    st.sampled_from([32, 64, 96, 224]),
    st.integers(0, 2**31),
    st.sampled_from(["noise", "dark", "one pixel", "constant", "extremes"]),
)
@settings(max_examples=60, deadline=None)
def test_the_z_score_has_the_bits_of_the_runtime(size, seed, kind):
    rng = np.random.default_rng(seed)
    images = rng.integers(0, 256, (3, 1, size, size)).astype(np.uint8)
    if kind == "dark":
        images //= 50
    elif kind in ("one pixel", "constant"):
        images[:] = images[:, :, :1, :1]
        if kind == "one pixel":
            images[:, 0, size // 2, 3] ^= 1
    elif kind == "extremes":
        images = (images > 127).astype(np.uint8) * np.uint8(255)
    expected = np.stack([normalize(image[0]) for image in images])
    # equal bit by bit, but for the sign of zero
    assert np.array_equal(normalize_batch(torch.from_numpy(images)).numpy(), expected)
    assert np.array_equal(normalize_batch(torch.from_numpy(images).float()).numpy(), expected)


def test_the_z_score_of_a_large_image_has_the_bits_of_the_runtime():
    image = np.random.default_rng(9).integers(200, 256, (1024, 1024)).astype(np.uint8)
    result = normalize_batch(torch.from_numpy(image)[None, None])
    assert np.array_equal(result[0].numpy(), normalize(image))


@pytest.mark.parametrize("value", [0.1, 77.7, 254.9])
def test_a_constant_image_of_fractions_becomes_zeros(value):
    assert not normalize_batch(torch.full((2, 1, 224, 224), value)).any()


def test_the_z_score_cancels_brightness_and_contrast(photograph):
    plain = normalize_batch(photograph)
    changed = augment(photograph, draws_of({"brightness": 0.5, "contrast": 0.7}))
    assert (changed - photograph).abs().max() > 50
    torch.testing.assert_close(normalize_batch(changed), plain, atol=1e-4, rtol=0)


def test_autocast_does_not_blur_the_warp(photograph):
    draws = draws_of({"rotation": 33.0, "crop": (0.1, 0.0, 0.8, 0.9)})
    expected = normalize_batch(augment(photograph, draws))
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(normalize_batch(augment(photograph, draws)), expected)


def test_nothing_is_read_back_from_the_device():
    # the meta device has no values: .item(), nonzero and boolean indexing would raise
    draws = draws_of({}, {})
    fields = {f.name: getattr(draws, f.name).to("meta") for f in dataclasses.fields(draws)}
    result = normalize_batch(augment(torch.empty(2, 1, 32, 32, device="meta"), AugmentationDraws(**fields)))
    assert result.shape == (2, 1, 32, 32)


@pytest.mark.gpu
def test_no_synchronisation_on_the_gpu():
    if not torch.cuda.is_available():
        pytest.skip("no CUDA GPU")
    images = torch.randint(0, 256, (4, 1, 64, 64), device="cuda", dtype=torch.uint8)
    generator = torch.Generator("cuda").manual_seed(0)
    torch.cuda.set_sync_debug_mode("error")
    try:
        normalize_batch(augment(images, draw_augmentation(AugmentationRanges(), 4, generator)))
    finally:
        torch.cuda.set_sync_debug_mode("default")

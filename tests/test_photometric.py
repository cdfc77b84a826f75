"""Random looks, each against a slow version that follows its description."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from magsd.photometric import PhotometricRanges, disturb, erase, gaussian_blur, rectangles, take_spectrum, tone_curve

ALL = PhotometricRanges(probability=0.5, tone=0.5, blur=1.5, noise=20.0, erasing=0.4, spectrum=1.0)


def films(count: int = 6, size: int = 24, seed: int = 0) -> torch.Tensor:
    return torch.randint(0, 256, (count, 1, size, size), generator=torch.Generator().manual_seed(seed)).float()


def test_tone_curve_is_interpolation_between_knots() -> None:
    images = films()
    slopes = torch.exp(torch.randn((6, 8), generator=torch.Generator().manual_seed(1)) * 0.5)
    found = tone_curve(images, slopes).numpy()
    for image, slope, result in zip(images.numpy(), slopes.numpy().astype(np.float64), found):
        knots = np.concatenate([[0.0], np.cumsum(slope)]) / slope.sum() * 255
        expected = np.interp(image, np.linspace(0, 255, 9), knots)
        np.testing.assert_allclose(result, expected, atol=1e-3)


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 2**20), tone=st.floats(0, 2))
def test_tone_curve_keeps_the_order_of_grey_levels_and_both_ends(seed: int, tone: float) -> None:
    slopes = torch.exp(torch.randn((1, 8), generator=torch.Generator().manual_seed(seed)) * tone)
    ramp = torch.arange(256.0)[None, None, None]  # (1, 1, 1, 256)
    curve = tone_curve(ramp, slopes)[0, 0, 0]
    assert (curve.diff() >= 0).all()
    assert float(curve[0]) == 0
    assert float(curve[-1]) == pytest.approx(255, abs=1e-3)


def test_equal_slopes_change_nothing() -> None:
    torch.testing.assert_close(tone_curve(films(), torch.full((6, 8), 3.0)), films(), atol=1e-3, rtol=0)


def test_blur_is_a_weighted_mean_of_neighbours() -> None:
    images, sigma = films(3, 12), torch.tensor([0.0, 0.7, 1.5])
    found = gaussian_blur(images, sigma, 1.5).numpy()[:, 0]
    radius = round(3 * 1.5)
    for image, deviation, result in zip(images.numpy()[:, 0], sigma.tolist(), found):
        expected = np.zeros((12, 12))
        for row in range(12):
            for column in range(12):
                total = weights = 0.0
                for dy in range(-radius, radius + 1):
                    for dx in range(-radius, radius + 1):
                        near = 1.0 if dx == dy == 0 else 0.0
                        weight = math.exp(-(dx * dx + dy * dy) / (2 * deviation**2)) if deviation else near
                        y, x = min(max(row + dy, 0), 11), min(max(column + dx, 0), 11)
                        total, weights = total + weight * image[y, x], weights + weight
                expected[row, column] = total / weights
        np.testing.assert_allclose(result, expected, atol=1e-2)


def test_erased_boxes_have_their_grey_and_the_rest_is_untouched() -> None:
    images = films(2, 20)
    boxes = torch.tensor([[[0.1, 0.2, 0.4, 0.5], [0.5, 0.5, 0.5, 0.5]]] * 2)
    found = erase(images, boxes, torch.tensor([[7.0, 9.0]] * 2), torch.tensor([1.0, 0.0]))
    expected = images.clone()
    for row in range(20):
        for column in range(20):
            if 0.2 <= (row + 0.5) / 20 < 0.5 and 0.1 <= (column + 0.5) / 20 < 0.4:
                expected[0, 0, row, column] = 7.0
    torch.testing.assert_close(found, expected, atol=0, rtol=0)


def test_rectangles_lie_in_the_image_and_are_at_most_so_large() -> None:
    boxes = rectangles(torch.rand((500, 4, 6), generator=torch.Generator().manual_seed(3)), 0.3)
    left, top, right, bottom = boxes.unbind(-1)
    assert float(boxes.min()) >= 0
    assert float(boxes.max()) <= 1
    assert float((right - left).max()) <= 0.3 + 1e-6
    assert float((bottom - top).max()) <= 0.3 + 1e-6
    drawn = float((right > left).float().mean())
    assert 0.45 < drawn < 0.55


def test_disturb_is_decided_by_the_generator_and_stays_in_range() -> None:
    images = films(16, 32).to(torch.uint8)
    one, two = (disturb(images, ALL, torch.Generator().manual_seed(5)) for _ in range(2))
    torch.testing.assert_close(one, two, atol=0, rtol=0)
    assert one.dtype == torch.float32
    assert float(one.min()) > -255
    assert float(one.max()) < 510
    other = disturb(images, ALL, torch.Generator().manual_seed(6))
    assert not torch.equal(one, other)


def test_nothing_is_changed_where_nothing_is_asked_for() -> None:
    images = films()
    for ranges in (PhotometricRanges(), PhotometricRanges(0.0, 0.5, 1.5, 20.0, 0.4)):
        assert not ranges.any
        torch.testing.assert_close(disturb(images, ranges, torch.Generator()), images, atol=2e-3, rtol=0)


def test_about_the_asked_share_of_images_is_changed() -> None:
    images = films(400, 8)
    changed = disturb(images, PhotometricRanges(0.25, noise=20.0), torch.Generator().manual_seed(2)) != images
    assert 0.18 < float(changed.any(3).any(2).float().mean()) < 0.32


def test_spectrum_is_taken_ring_by_ring_and_phases_stay() -> None:
    images, others = films(3, 32, seed=1), films(3, 32, seed=2)
    others[1] = gaussian_blur(others[1:2], torch.tensor([1.5]), 1.5)[0]
    strength = torch.tensor([1.0, 1.0, 0.0])
    found = take_spectrum(images, others, strength)
    torch.testing.assert_close(found.mean((1, 2, 3)), images.mean((1, 2, 3)), atol=1e-2, rtol=0)
    torch.testing.assert_close(found[2], images[2], atol=1e-2, rtol=0)
    frequency = np.fft.fftfreq(32)
    for image, other, result in zip(images[:2].numpy()[:, 0], others[:2].numpy()[:, 0], found[:2].numpy()[:, 0]):
        before, wanted, after = (np.fft.fft2(one - one.mean()) for one in (image, other, result))
        # the half that a real transform keeps is what the rings are averaged over
        rings: dict[int, list[tuple[int, int]]] = {}
        for y in range(32):
            for x in range(17):
                radius = math.hypot(frequency[y], x / 32) * 48
                rings.setdefault(min(int(radius), 23), []).append((y, x))
        profile = [
            np.mean([math.log(abs(wanted[at]) + 1e-3) - math.log(abs(before[at]) + 1e-3) for at in rings[ring]])
            for ring in range(24)
        ]
        gains = [*np.clip(profile, -2, 2), np.clip(profile[-1], -2, 2)]
        for y in range(32):
            for x in range(1, 16):  # the edges of the half are their own mirror images
                radius = math.hypot(frequency[y], x / 32) * 48
                ring = min(int(radius), 23)
                share = min(radius - ring, 1.0)
                gain = gains[ring] * (1 - share) + gains[ring + 1] * share
                assert abs(after[y, x] - before[y, x] * math.exp(gain)) < 2e-2 * abs(before[y, x]) + 0.5

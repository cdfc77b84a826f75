"""Attention guided augmentation against an implementation that takes one image after the other."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional

from magsd import attention_augmentation as aga
from magsd.attention_augmentation import AttentionDraws
from magsd_runtime.errors import UsageError


def slow_map(attention, position):
    """Walk through the maps until their weights add up to more than position times all."""
    weights = [float(single.double().sum()) ** 0.5 for single in attention]
    walked = 0.0
    for single, weight in zip(attention, weights):
        walked += weight
        if walked > position * sum(weights):
            return single
    return attention[-1]


def slow_region(attention, position, threshold, size):
    single = slow_map(attention, position)
    upsampled = functional.interpolate(single[None, None], (size, size), mode="bilinear", align_corners=False)
    return upsampled[0, 0] > threshold * single.max()


def slow_box(region):
    size = len(region)
    points = region.nonzero()
    if len(points) == 0:
        return 0, 0, size, size
    padding = int(0.1 * size + 0.5)
    (y0, x0), (y1, x1) = points.min(0).values.tolist(), points.max(0).values.tolist()
    return (
        max(x0 - padding, 0),
        max(y0 - padding, 0),
        min(x1 + 1 + padding, size),
        min(y1 + 1 + padding, size),
    )


def slow_augment(name, image, attention, position, threshold, place, *, gamma=0.6, factor=0.1):
    """One image (1, S, S), one attention (M, h, w): Eqs. (2) to (4) with slicing and F.interpolate."""
    size = image.shape[1]
    region = slow_region(attention, position, threshold, size)
    if name == "dimming":
        return image * torch.where(region, factor, 1.0)
    x0, y0, x1, y1 = slow_box(region)
    crop = image[:, y0:y1, x0:x1]
    if name == "mixup":
        enlarged = functional.interpolate(crop[None], (size, size), mode="bilinear", align_corners=False)
        return gamma * image + (1 - gamma) * enlarged[0]
    left = min(int(place[0] * np.float32(size - (x1 - x0) + 1)), size - (x1 - x0))
    top = min(int(place[1] * np.float32(size - (y1 - y0) + 1)), size - (y1 - y0))
    result = image.clone()
    result[:, top : top + (y1 - y0), left : left + (x1 - x0)] = crop
    return result


def slow_batch(name, images, attention, draws, **options):
    rows = zip(images, attention, draws.position, draws.threshold, draws.place)
    return torch.stack(
        [
            slow_augment(name, image, maps, float(position), threshold, place.numpy(), **options)
            for image, maps, position, threshold, place in rows
        ]
    )


@st.composite
def batches(draw):
    n, m = draw(st.integers(1, 4)), draw(st.integers(1, 5))
    grid = draw(st.integers(1, 4))
    size = grid * draw(st.sampled_from([4, 7, 16]))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    images = torch.randn((n, 1, size, size), generator=generator)
    attention = torch.rand((n, m, grid, grid), generator=generator) ** draw(st.sampled_from([1, 8]))
    # after a ReLU many values, and whole maps, are zero
    attention = attention * (torch.rand(attention.shape, generator=generator) < draw(st.floats(0, 1)))
    attention = attention * (torch.rand((n, m, 1, 1), generator=generator) < 0.8)
    draws = aga.draw_attention(["mixup", "patching", "dimming"], n, generator)
    return images, attention, draws


@given(batches())
@settings(max_examples=120, deadline=None)
def test_equal_to_the_loop_over_images(batch):
    images, attention, draws = batch
    results = aga.apply_draws(images, attention, draws)
    for name, result in zip(draws, results):
        expected = slow_batch(name, images, attention, draws[name])
        assert result.shape == images.shape
        if name == "patching":
            assert torch.equal(result, expected)
        else:
            torch.testing.assert_close(result, expected, atol=2e-5, rtol=1e-5)


def test_equal_to_the_loop_at_the_papers_sizes():
    generator = torch.Generator().manual_seed(3)
    images = torch.randn((8, 1, 224, 224), generator=generator)
    attention = torch.rand((8, 32, 7, 7), generator=generator) ** 6
    draws = aga.draw_attention(["mixup", "patching", "dimming"], 8, generator)
    results = aga.apply_draws(images, attention, draws, gamma=0.3, dimming_factor=0.5)
    for (name, draw), result in zip(draws.items(), results):
        expected = slow_batch(name, images, attention, draw, gamma=0.3, factor=0.5)
        torch.testing.assert_close(result, expected, atol=1e-4, rtol=0)
        assert not torch.equal(result, images)


@given(st.integers(0, 2**31), st.integers(2, 40))
@settings(max_examples=60, deadline=None)
def test_enlarge_is_interpolate_of_each_crop(seed, size):
    rng = np.random.default_rng(seed)
    images = torch.from_numpy(rng.normal(size=(3, 2, size, size)).astype(np.float32))
    corners = np.sort(np.stack([rng.choice(size + 1, 4, replace=False) for _ in range(3)]) if size > 3
                      else np.tile([0, 0, 1, 2], (3, 1)), axis=1)  # fmt: skip
    x, y = corners[:, [0, 2]], corners[:, [1, 3]]
    boxes = torch.from_numpy(np.stack([x[:, 0], y[:, 0], x[:, 1], y[:, 1]], axis=1))
    result = aga.enlarge(images, boxes)
    for image, (x0, y0, x1, y1), single in zip(images, boxes.tolist(), result):
        crop = image[None, :, y0:y1, x0:x1]
        expected = functional.interpolate(crop, (size, size), mode="bilinear", align_corners=False)[0]
        torch.testing.assert_close(single, expected, atol=2e-5, rtol=1e-5)


def test_maps_are_drawn_with_probability_proportional_to_the_square_root_of_their_sum():
    sums = torch.tensor([0.0, 1.0, 4.0, 0.0, 9.0, 0.0])
    attention = (sums / 4)[None, :, None, None].expand(60_000, -1, 2, 2)
    position = torch.rand(60_000, generator=torch.Generator().manual_seed(0))
    chosen = aga.choose_maps(attention, position).sum((1, 2))
    for total, probability in ((1.0, 1 / 6), (4.0, 2 / 6), (9.0, 3 / 6)):
        share = float((chosen == total).double().mean())
        assert share == pytest.approx(probability, abs=0.01)  # five standard deviations
    # the ends of the unit interval: never a map that is zero
    ends = aga.choose_maps(attention[:2], torch.tensor([0.0, 1 - 2**-24])).sum((1, 2))
    assert ends.tolist() == [1.0, 9.0]


def test_attention_that_is_zero_leaves_the_images_alone():
    images = torch.randn(3, 1, 32, 32)
    draws = aga.draw_attention(["mixup", "patching", "dimming"], 3, torch.Generator().manual_seed(1))
    mixup, patching, dimming = aga.apply_draws(images, torch.zeros(3, 4, 2, 2), draws)
    torch.testing.assert_close(mixup, images, atol=1e-6, rtol=1e-6)
    assert torch.equal(patching, images)
    assert torch.equal(dimming, images)


def test_the_patch_reaches_every_place_and_stays_inside():
    size = 10
    region = torch.zeros(1, size, size, dtype=torch.bool)
    region[0, 4:6, 4:6] = True
    assert aga.enclosing_boxes(region).tolist() == [[3, 3, 7, 7]]  # padded by a tenth
    images = torch.arange(100.0).reshape(1, 1, 10, 10)
    attention = torch.zeros(1, 1, 10, 10)
    attention[0, 0, 4:6, 4:6] = 1
    corners = set()
    for u in np.linspace(0, 1 - 2**-24, 50, dtype=np.float32):
        place = torch.tensor([[u, 1 - 2**-24 - u]], dtype=torch.float32).clamp(min=0)
        draws = AttentionDraws(torch.zeros(1), torch.full((1,), 0.5), place)
        result = aga.attention_patching(images, attention, draws)[0, 0]
        (y, x), *others = (result == images[0, 0, 3, 3]).nonzero().tolist()
        if [y, x] == [3, 3] and others:
            y, x = others[0]
        assert torch.equal(result[y : y + 4, x : x + 4], images[0, 0, 3:7, 3:7])
        corners.add(x)
    assert corners == set(range(7))


def test_draws_stay_in_their_ranges_and_follow_the_generator():
    draws = aga.draw_attention(["dimming", "mixup"], 5000, torch.Generator().manual_seed(5))
    assert list(draws) == ["dimming", "mixup"]
    for name, (low, high) in {"mixup": (0.4, 0.6), "dimming": (0.2, 0.5)}.items():
        threshold = draws[name].threshold
        assert low <= threshold.min() < low + 0.01
        assert high - 0.01 < threshold.max() <= high
    again = aga.draw_attention(["dimming", "mixup"], 5000, torch.Generator().manual_seed(5))
    assert torch.equal(draws["mixup"].place, again["mixup"].place)
    with pytest.raises(UsageError, match="'drop'"):
        aga.draw_attention(["drop"], 1, torch.Generator())


def test_augment_draws_and_applies():
    images, attention = torch.randn(2, 1, 32, 32), torch.rand(2, 3, 2, 2)
    names = ("patching", "mixup")
    results = aga.augment(images, attention, names, torch.Generator().manual_seed(2), gamma=0.5)
    draws = aga.draw_attention(names, 2, torch.Generator().manual_seed(2))
    torch.testing.assert_close(results[0], slow_batch("patching", images, attention, draws["patching"]))
    torch.testing.assert_close(results[1], slow_batch("mixup", images, attention, draws["mixup"], gamma=0.5))


def test_autocast_and_half_attention_change_nothing_and_attention_gets_no_gradient():
    images = torch.randn(2, 1, 64, 64)
    attention = torch.rand(2, 4, 2, 2).half()
    draws = aga.draw_attention(["mixup", "patching", "dimming"], 2, torch.Generator().manual_seed(4))
    expected = aga.apply_draws(images, attention.float(), draws)
    with torch.autocast("cpu", torch.bfloat16):
        results = aga.apply_draws(images, attention.requires_grad_(), draws)
    for a, b in zip(results, expected):
        assert a.dtype == torch.float32
        assert not a.requires_grad
        assert torch.equal(a, b)


def test_nothing_is_read_back_from_the_device():
    # the meta device has no values: .item(), nonzero and boolean indexing would raise
    images = torch.empty(4, 1, 64, 64, device="meta")
    attention = torch.empty(4, 32, 2, 2, device="meta")
    draw = AttentionDraws(*(torch.empty(shape, device="meta") for shape in [(4,), (4,), (4, 2)]))
    results = aga.apply_draws(images, attention, dict.fromkeys(["mixup", "patching", "dimming"], draw))
    assert [tuple(result.shape) for result in results] == [(4, 1, 64, 64)] * 3


@pytest.mark.gpu
def test_no_synchronisation_on_the_gpu():
    if not torch.cuda.is_available():
        pytest.skip("no CUDA GPU")
    images = torch.randn(4, 1, 64, 64, device="cuda")
    attention = torch.rand(4, 32, 2, 2, device="cuda")
    generator = torch.Generator("cuda").manual_seed(0)
    torch.cuda.set_sync_debug_mode("error")
    try:
        aga.augment(images, attention, ("mixup", "patching", "dimming"), generator)
    finally:
        torch.cuda.set_sync_debug_mode("default")

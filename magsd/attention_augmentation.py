"""Attention guided augmentation: mix-up, patching and dimming (paper, section 3.3, Eqs. 2-4).

Draws are separated from their application, so that both can be tested and repeated. All images of a
batch are handled at once, and nothing waits for the device: no loop over images, no value read back.
All computation is float32, also under autocast; attention is detached.

As in the authors' released code: a map is drawn with probability proportional to the square root of
its sum; thresholds are drawn once an image and multiply the map's maximum; the box is padded by 10 %
of the image size. As in the paper, dimming multiplies by 0.1 inside the region and 1 outside.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from magsd_runtime.errors import UsageError

# threshold ranges, as fractions of the map's maximum
THRESHOLDS = {"mixup": (0.4, 0.6), "patching": (0.4, 0.6), "dimming": (0.2, 0.5)}


@dataclass(frozen=True)
class AttentionDraws:
    """What chance decides for one augmentation of N images, float32 on the device.

    ``position`` (N,) in [0, 1): where in the cumulative map weights the chosen map lies;
    ``threshold`` (N,): fraction of the map's maximum;
    ``place`` (N, 2) in [0, 1): x and y of the pasted patch, 0 leftmost / topmost (patching only).
    """

    position: Tensor
    threshold: Tensor
    place: Tensor


def draw_attention(names: Iterable[str], count: int, generator: torch.Generator) -> dict[str, AttentionDraws]:
    """Draws of the augmentations ``names`` (mixup, patching, dimming) for ``count`` images, in that order.

    The draws lie on the generator's device.

    Raises
    ------
    UsageError
        For an unknown name.
    """
    draws = {}
    for name in names:
        if name not in THRESHOLDS:
            raise UsageError(f"attention augmentation is {name!r}: expected one of {', '.join(THRESHOLDS)}")
        low, high = THRESHOLDS[name]
        uniform = torch.rand((count, 4), generator=generator, device=generator.device)
        draws[name] = AttentionDraws(uniform[:, 0], low + (high - low) * uniform[:, 1], uniform[:, 2:])
    return draws


def augment(
    images: Tensor,
    attention: Tensor,
    names: Iterable[str],
    generator: torch.Generator,
    *,
    gamma: float = 0.6,
    dimming_factor: float = 0.1,
) -> tuple[Tensor, ...]:
    """Draw and apply each of ``names``: the auxiliary images I1, I2, I3 of section 3.3, in that order.

    Arguments, result and ``Raises`` as in :func:`draw_attention` and :func:`apply_draws`.
    """
    draws = draw_attention(names, len(images), generator)
    return apply_draws(images, attention, draws, gamma=gamma, dimming_factor=dimming_factor)


def apply_draws(
    images: Tensor,
    attention: Tensor,
    draws: Mapping[str, AttentionDraws],
    *,
    gamma: float = 0.6,
    dimming_factor: float = 0.1,
) -> tuple[Tensor, ...]:
    """One augmented batch for each entry of ``draws``, in its order.

    ``images`` float (N, 1, S, S), the preprocessed input; ``attention`` (N, M, h, w), 0 or more ->
    float32 (N, 1, S, S) each.
    """
    apply: dict[str, Callable[[AttentionDraws], Tensor]] = {
        "mixup": lambda draw: attention_mixup(images, attention, draw, gamma=gamma),
        "patching": lambda draw: attention_patching(images, attention, draw),
        "dimming": lambda draw: attention_dimming(images, attention, draw, factor=dimming_factor),
    }
    return tuple(apply[name](draw) for name, draw in draws.items())


@torch.no_grad()
def attention_mixup(images: Tensor, attention: Tensor, draws: AttentionDraws, *, gamma: float = 0.6) -> Tensor:
    """Eq. (3): gamma times the image plus 1 - gamma times its attended box enlarged to the whole size."""
    images = images.float()
    boxes = enclosing_boxes(attended_region(attention, draws, images.shape[2]))  # (N, 4)
    return gamma * images + (1 - gamma) * enlarge(images, boxes)


@torch.no_grad()
def attention_patching(images: Tensor, attention: Tensor, draws: AttentionDraws) -> Tensor:
    """The attended box, copied to a uniformly random place of the same image."""
    images = images.float()
    n, channels, size, _ = images.shape
    boxes = enclosing_boxes(attended_region(attention, draws, size))
    corner, extent = boxes[:, :2], boxes[:, 2:] - boxes[:, :2]  # (N, 2) each: x, y
    free = size - extent
    # the product can round up to free + 1
    place = torch.minimum((draws.place * (free + 1)).long(), free)
    pixel = torch.arange(size, device=images.device)
    offset = pixel - place[:, :, None]  # (N, 2, S): position within the patch
    inside = (offset >= 0) & (offset < extent[:, :, None])
    source = torch.where(inside, offset + corner[:, :, None], pixel)
    # a pixel of the result comes from the patch where both its column and its row lie inside
    both = inside[:, 1, :, None] & inside[:, 0, None, :]  # (N, S, S)
    copied = source[:, 1, :, None] * size + source[:, 0, None, :]
    index = torch.where(both, copied, pixel[:, None] * size + pixel)  # (N, S, S)
    index = index.reshape(n, 1, size * size).expand(-1, channels, -1)
    return images.reshape(n, channels, size * size).gather(2, index).reshape(images.shape)


@torch.no_grad()
def attention_dimming(images: Tensor, attention: Tensor, draws: AttentionDraws, *, factor: float = 0.1) -> Tensor:
    """Eq. (4): the image times ``factor`` in the attended region, times 1 elsewhere.

    On z-scored images this pulls the region towards the image's mean grey.
    """
    region = attended_region(attention, draws, images.shape[2])[:, None]  # (N, 1, S, S)
    images = images.float()
    return torch.where(region, images * factor, images)


@torch.no_grad()
def choose_maps(attention: Tensor, position: Tensor) -> Tensor:
    """One map an image, drawn with probability proportional to the square root of its sum.

    ``attention`` (N, M, h, w), ``position`` (N,) in [0, 1) -> (N, h, w) float32. A map that is zero
    everywhere is chosen only where all are.
    """
    attention = attention.detach().float()
    # float64: position * total stays below the total, and the last map that is not zero is the last chosen
    cumulative = attention.sum((2, 3), dtype=torch.float64).clamp(min=0).sqrt().cumsum(1)  # (N, M)
    chosen = (cumulative <= position.double()[:, None] * cumulative[:, -1:]).sum(1)  # (N,)
    chosen = chosen.clamp(max=attention.shape[1] - 1)
    index = chosen[:, None, None, None].expand(-1, 1, *attention.shape[2:])  # (N, 1, h, w)
    return attention.gather(1, index).squeeze(1)


@torch.no_grad()
def attended_region(attention: Tensor, draws: AttentionDraws, size: int) -> Tensor:
    """Eq. (2): bool (N, S, S), where the chosen map, upsampled bilinearly, exceeds its threshold."""
    maps = choose_maps(attention, draws.position)
    threshold = draws.threshold * maps.amax((1, 2))  # (N,)
    upsampled = functional.interpolate(maps[:, None], size=(size, size), mode="bilinear", align_corners=False)
    return upsampled.squeeze(1) > threshold[:, None, None]


def enclosing_boxes(region: Tensor) -> Tensor:
    """bool (N, S, S) -> int64 (N, 4): x0, y0, x1, y1, half-open, padded by S / 10 and clipped to the image.

    An empty region gives the whole image.
    """
    size = region.shape[2]
    padding = (size + 5) // 10
    pixel = torch.arange(size, device=region.device)
    occupied = torch.stack([region.any(1), region.any(2)], dim=1)  # (N, 2, S): columns, rows
    first = torch.where(occupied, pixel, size).amin(2)  # (N, 2); empty: S
    last = torch.where(occupied, pixel, -1).amax(2)  # empty: -1
    empty = last < 0
    low = torch.where(empty, 0, (first - padding).clamp(min=0))
    high = torch.where(empty, size, (last + 1 + padding).clamp(max=size))
    return torch.cat([low, high], dim=1)


def enlarge(images: Tensor, boxes: Tensor) -> Tensor:
    """The content of each box, resized bilinearly to the whole image; both (N, channels, S, S).

    Equal to ``interpolate(crop, (S, S), mode="bilinear", align_corners=False)`` of each crop by itself.
    """
    n, channels, size, _ = images.shape
    extent = (boxes[:, 2:] - boxes[:, :2]).float()  # (N, 2): width, height
    pixel = torch.arange(size, device=images.device, dtype=torch.float32)
    position = (pixel + 0.5) * (extent / size)[:, :, None] - 0.5  # (N, 2, S), within the crop
    position = position.clamp(min=0).minimum(extent[:, :, None] - 1)
    low = position.floor()
    weight = position - low
    before = low.long() + boxes[:, :2, None]
    after = (before + 1).minimum(boxes[:, 2:, None] - 1)
    shape = (n, channels, size, size)

    def rows(index: Tensor) -> Tensor:
        return images.gather(2, index[:, None, :, None].expand(shape))

    def columns(source: Tensor, index: Tensor) -> Tensor:
        return source.gather(3, index[:, None, None, :].expand(shape))

    # one axis after the other
    tall = torch.lerp(rows(before[:, 1]), rows(after[:, 1]), weight[:, 1][:, None, :, None])
    return torch.lerp(columns(tall, before[:, 0]), columns(tall, after[:, 0]), weight[:, 0][:, None, None, :])

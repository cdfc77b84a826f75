"""Random changes of a film's looks, on whole batches: what differs between hospitals and is no disease.

    tone      a random monotone curve of the grey levels: gamma, contrast, windowing, film response
    blur      Gaussian: detector, scaling, photographs of a screen
    noise     Gaussian
    erasing   rectangles of one random grey: markers, collimation, text, and any single place relied upon

Not part of the paper. The z-score that follows cancels affine changes of intensity (Table 2's brightness and
contrast), not these. All draws come from the generator, nothing waits for the device.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

_KNOTS = 8
_ERASED = 4  # rectangles drawn for an image; each is used with one half


@dataclass(frozen=True)
class PhotometricRanges:
    """Largest strength of each change; 0 switches it off.

    ``probability`` of each change. ``tone``: standard deviation of the logarithm of the curve's slopes.
    ``blur``: largest standard deviation, pixels. ``noise``: largest standard deviation, grey levels of 255.
    ``erasing``: largest side of a rectangle as a fraction of the image's.
    """

    probability: float = 0.5
    tone: float = 0.0
    blur: float = 0.0
    noise: float = 0.0
    erasing: float = 0.0

    @property
    def any(self) -> bool:
        return self.probability > 0 and max(self.tone, self.blur, self.noise, self.erasing) > 0


@torch.no_grad()
def disturb(images: Tensor, ranges: PhotometricRanges, generator: torch.Generator) -> Tensor:
    """uint8 or float (N, 1, S, S), 0 to 255 -> float32 (N, 1, S, S), 0 to 255.

    Draws the same random numbers whatever is switched off, so that one change does not shift another's draws.
    """
    count, device = len(images), images.device
    images = images.float()
    drawn = (torch.rand((4, count), generator=generator, device=device) < ranges.probability).float()
    curves = torch.randn((count, _KNOTS), generator=generator, device=device)
    sigma = torch.rand((2, count), generator=generator, device=device)
    seeds = torch.rand((count, _ERASED, 6), generator=generator, device=device)
    if ranges.tone > 0:
        images = tone_curve(images, torch.exp(curves * ranges.tone * drawn[0, :, None]))
    if ranges.blur > 0:
        images = gaussian_blur(images, sigma[0] * ranges.blur * drawn[1], ranges.blur)
    if ranges.noise > 0:
        noise = torch.randn(images.shape, generator=generator, device=device)
        images = (images + noise * (sigma[1] * ranges.noise * drawn[2])[:, None, None, None]).clamp(0, 255)
    if ranges.erasing > 0:
        images = erase(images, rectangles(seeds, ranges.erasing), seeds[..., 5] * 255, drawn[3])
    return images


def tone_curve(images: Tensor, slopes: Tensor) -> Tensor:
    """Monotone piecewise linear curve through 0 and 255 with K equal steps: (N, 1, S, S), (N, K) -> (N, 1, S, S).

    ``slopes`` above 0 are relative; equal slopes are the identity.
    """
    knots = slopes.shape[1]
    steps = slopes / slopes.sum(1, keepdim=True) * 255
    ends = functional.pad(steps.cumsum(1), (1, 0))  # (N, K + 1), from 0 to 255
    position = (images / 255 * knots).clamp(0, knots)
    index = position.floor().clamp(max=knots - 1)
    flat = index.long().flatten(1)
    low, step = ends.gather(1, flat), steps.gather(1, flat)
    return (low + (position - index).flatten(1) * step).view(images.shape)


def gaussian_blur(images: Tensor, sigma: Tensor, largest: float) -> Tensor:
    """Gaussian of standard deviation ``sigma`` (N,) pixels, 0 leaves an image as it is; edges are repeated."""
    radius = max(1, round(3 * largest))
    offsets = torch.arange(-radius, radius + 1, device=images.device, dtype=torch.float32)
    # a deviation of 1e-3 is a unit impulse
    kernel = torch.exp(-(offsets**2) / (2 * sigma.clamp(min=1e-3)[:, None] ** 2))
    kernel = kernel / kernel.sum(1, keepdim=True)  # (N, 2 radius + 1)
    count = len(images)
    rows = functional.pad(images.transpose(0, 1), (radius, radius, radius, radius), mode="replicate")  # (1, N, ., .)
    rows = functional.conv2d(rows, kernel[:, None, :, None], groups=count)
    rows = functional.conv2d(rows, kernel[:, None, None, :], groups=count)
    return rows.transpose(0, 1)


def rectangles(seeds: Tensor, largest: float) -> Tensor:
    """Left, top, right, bottom as fractions of the image: uniform (N, K, 6) -> (N, K, 4); empty with one half."""
    size = seeds[..., 2:4] * largest * (seeds[..., 4:5] < 0.5)
    start = seeds[..., 0:2] * (1 - size)
    return torch.cat([start, start + size], dim=-1)


def erase(images: Tensor, boxes: Tensor, greys: Tensor, chosen: Tensor) -> Tensor:
    """Fill boxes (N, K, 4), fractions of the image, with ``greys`` (N, K) where ``chosen`` (N,) is 1."""
    size = images.shape[-1]
    centre = (torch.arange(size, device=images.device) + 0.5) / size
    left, top, right, bottom = (boxes * chosen[:, None, None]).unbind(-1)
    for k in range(boxes.shape[1]):
        across = (centre >= left[:, k, None]) & (centre < right[:, k, None])  # (N, S)
        down = (centre >= top[:, k, None]) & (centre < bottom[:, k, None])
        inside = (down[:, :, None] & across[:, None, :])[:, None]
        images = torch.where(inside, greys[:, k, None, None, None], images)
    return images

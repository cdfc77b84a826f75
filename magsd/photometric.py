"""Random changes of a film's looks, on whole batches: what differs between hospitals and is no disease.

    tone      a random monotone curve of the grey levels: gamma, contrast, windowing, film response
    blur      Gaussian: detector, scaling, photographs of a screen
    noise     Gaussian
    spectrum  the radial power spectrum of another film of the batch: its sharpness, grain and scale of contrast
    erasing   rectangles of one random grey: markers, collimation, text, and any single place relied upon

Not part of the paper. The z-score that follows cancels affine changes of intensity (Table 2's brightness and
contrast), not these. All draws come from the generator, nothing waits for the device.

Source of the spectrum: Yang and Soatto 2020 (FDA) swap low frequencies between domains; here whole radial profiles
are taken over, between films of one batch, so that no film keeps what gives its source away.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

_KNOTS = 8
_RINGS = 24  # of the spectrum, from the centre to the highest frequency along an axis
_LARGEST_GAIN = 2.0  # natural logarithm
_ERASED = 4  # rectangles drawn for an image; each is used with one half


@dataclass(frozen=True)
class PhotometricRanges:
    """Largest strength of each change; 0 switches it off.

    ``probability`` of each change. ``tone``: standard deviation of the logarithm of the curve's slopes.
    ``blur``: largest standard deviation, pixels. ``noise``: largest standard deviation, grey levels of 255.
    ``erasing``: largest side of a rectangle as a fraction of the image's. ``spectrum``: 0 to 1, how far the
    logarithm of the spectrum goes towards the other film's.
    """

    probability: float = 0.5
    tone: float = 0.0
    blur: float = 0.0
    noise: float = 0.0
    erasing: float = 0.0
    spectrum: float = 0.0

    @property
    def any(self) -> bool:
        return self.probability > 0 and max(self.tone, self.blur, self.noise, self.erasing, self.spectrum) > 0


@torch.no_grad()
def disturb(images: Tensor, ranges: PhotometricRanges, generator: torch.Generator) -> Tensor:
    """uint8 or float (N, 1, S, S), 0 to 255 -> float32 (N, 1, S, S), about 0 to 255 (a new spectrum can leave it).

    Draws the same random numbers whatever is switched off, so that one change does not shift another's draws.
    """
    count, device = len(images), images.device
    images = images.float()
    drawn = (torch.rand((5, count), generator=generator, device=device) < ranges.probability).float()
    curves = torch.randn((count, _KNOTS), generator=generator, device=device)
    sigma = torch.rand((2, count), generator=generator, device=device)
    seeds = torch.rand((count, _ERASED, 6), generator=generator, device=device)
    others = torch.rand((count,), generator=generator, device=device).argsort()
    if ranges.tone > 0:
        images = tone_curve(images, torch.exp(curves * ranges.tone * drawn[0, :, None]))
    if ranges.blur > 0:
        images = gaussian_blur(images, sigma[0] * ranges.blur * drawn[1], ranges.blur)
    if ranges.noise > 0:
        noise = torch.randn(images.shape, generator=generator, device=device)
        images = (images + noise * (sigma[1] * ranges.noise * drawn[2])[:, None, None, None]).clamp(0, 255)
    if ranges.spectrum > 0:
        images = take_spectrum(images, images[others], ranges.spectrum * drawn[4])
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


def take_spectrum(images: Tensor, others: Tensor, strength: Tensor) -> Tensor:
    """Give each film (N, 1, S, S) the radial spectrum of another: float32 (N, 1, S, S), its mean is kept.

    The gain of a frequency is the ratio of the two films' geometric mean amplitudes on its ring, linear between
    rings, at most e^2 either way, to the power ``strength`` (N,), 0 to 1. Phases, the structure, stay.
    """
    count, _, height, width = images.shape
    device = images.device
    vertical = torch.fft.fftfreq(height, device=device)[:, None]
    horizontal = torch.fft.rfftfreq(width, device=device)[None]
    radius = ((vertical**2 + horizontal**2).sqrt() * 2 * _RINGS).flatten()
    ring = radius.floor().clamp(max=_RINGS - 1).long()
    members = functional.one_hot(ring, _RINGS).float()  # (frequencies, rings)
    members = members / members.sum(0)
    mean = images.mean((2, 3), keepdim=True)
    spectrum = torch.fft.rfft2(images - mean)
    profiles = [
        (one.abs() + 1e-3).log().flatten(1) @ members
        for one in (spectrum, torch.fft.rfft2(others - others.mean((2, 3), keepdim=True)))
    ]
    gain = (profiles[1] - profiles[0]).clamp(-_LARGEST_GAIN, _LARGEST_GAIN) * strength[:, None]
    gain = functional.pad(gain, (0, 1), mode="replicate")
    share = (radius - ring).clamp(0, 1)
    gain = gain[:, ring] * (1 - share) + gain[:, ring + 1] * share
    return torch.fft.irfft2(spectrum * gain.exp().view(count, *spectrum.shape[1:]), s=(height, width)) + mean


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

"""Data augmentation of Table 2 on whole batches, and the z-score that follows it.

Each transform is drawn independently of the others. Draws are separated from their application; all
geometry of an image is composed into one affine warp, so that it is resampled once. Nothing waits for
the device.

The z-score of each image comes afterwards and cancels every affine change of intensity: brightness and
contrast as Table 2 has them change the network's input only where the warp fills with zeros (their
ratio to the rest changes) or a factor above 1 clips. They are here because the paper lists them.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from magsd_runtime.errors import UsageError


@dataclass(frozen=True)
class AugmentationRanges:
    """Table 2; what it leaves open (crop and its ratio, rotation either way) as in the released code.

    ``probability`` of each transform; ``brightness`` and ``contrast`` factors; ``crop_scale`` area fraction
    and ``crop_ratio`` width / height of the resized crop; ``rotation`` largest angle either way, degrees.
    """

    probability: float = 0.5
    brightness: tuple[float, float] = (0.5, 1.0)
    contrast: tuple[float, float] = (0.7, 1.0)
    crop_scale: tuple[float, float] = (0.6, 1.0)
    crop_ratio: tuple[float, float] = (0.75, 4 / 3)
    rotation: float = 120.0
    horizontal_flip: bool = True
    vertical_flip: bool = True

    def __post_init__(self) -> None:
        if not 0 <= self.probability <= 1:
            raise UsageError(f"augmentation probability is {self.probability}: expected 0 to 1")
        for name in ("brightness", "contrast", "crop_scale", "crop_ratio"):
            low, high = getattr(self, name)
            if not 0 < low <= high:
                raise UsageError(f"{name} is {low}, {high}: expected two numbers above 0, the smaller first")
        if self.crop_scale[1] > 1 or self.rotation < 0:
            raise UsageError(
                f"crop_scale ends at {self.crop_scale[1]} and rotation is {self.rotation}: "
                "expected at most 1 and at least 0"
            )


@dataclass(frozen=True)
class AugmentationDraws:
    """What chance decides for N images; a transform that was not drawn has its identity value.

    ``brightness`` (N,) and ``contrast`` (N,) factors, identity 1;
    ``crop`` (N, 4): left, top, width, height as fractions of the image, identity 0, 0, 1, 1;
    ``rotation`` (N,) degrees, counter-clockwise, identity 0;
    ``horizontal_flip`` and ``vertical_flip`` bool (N,).
    """

    brightness: Tensor
    contrast: Tensor
    crop: Tensor
    rotation: Tensor
    horizontal_flip: Tensor
    vertical_flip: Tensor


def draw_augmentation(ranges: AugmentationRanges, count: int, generator: torch.Generator) -> AugmentationDraws:
    """Draws for ``count`` images, on the generator's device.

    The crop's area is uniform in ``crop_scale``; its ratio is log-uniform in that part of ``crop_ratio``
    with which such an area fits into the square; its place is uniform.
    """
    device = generator.device
    drawn = torch.rand((6, count), generator=generator, device=device) < ranges.probability
    uniform = torch.rand((7, count), generator=generator, device=device)

    def between(low: float, high: float, value: Tensor, chosen: Tensor, identity: float) -> Tensor:
        return torch.where(chosen, low + (high - low) * value, identity)

    area = ranges.crop_scale[0] + (ranges.crop_scale[1] - ranges.crop_scale[0]) * uniform[2]
    lowest = area.log().clamp(min=math.log(ranges.crop_ratio[0]))
    highest = torch.maximum((-area.log()).clamp(max=math.log(ranges.crop_ratio[1])), lowest)
    ratio = torch.exp(lowest + (highest - lowest) * uniform[3])
    width = (area * ratio).sqrt().clamp(max=1)
    height = (area / ratio).sqrt().clamp(max=1)
    # left, top, width, height; where no crop was drawn, the whole image
    box = [uniform[4] * (1 - width), uniform[5] * (1 - height), width, height]
    crop = [torch.where(drawn[2], value, whole) for value, whole in zip(box, (0.0, 0.0, 1.0, 1.0))]
    return AugmentationDraws(
        brightness=between(*ranges.brightness, uniform[0], drawn[0], 1.0),
        contrast=between(*ranges.contrast, uniform[1], drawn[1], 1.0),
        crop=torch.stack(crop, dim=1),
        rotation=between(-ranges.rotation, ranges.rotation, uniform[6], drawn[3], 0.0),
        horizontal_flip=drawn[4] & ranges.horizontal_flip,
        vertical_flip=drawn[5] & ranges.vertical_flip,
    )


@torch.no_grad()
def augment(images: Tensor, draws: AugmentationDraws) -> Tensor:
    """Brightness, contrast, then crop, rotation and flips as one bilinear warp with zeros outside.

    ``images`` uint8 or float (N, 1, S, S), 0 to 255 -> float32 (N, 1, S, S), 0 to 255. An image for which
    nothing was drawn comes back exactly. What the crop cut away returns where the rotation uncovers it:
    zeros fill only what lies outside the image.
    """
    images = images.float()
    images = (images * draws.brightness[:, None, None, None]).clamp(0, 255)
    contrast = draws.contrast[:, None, None, None]
    # a blend with the image's mean, as torchvision's adjust_contrast
    mean = images.mean((1, 2, 3), keepdim=True)
    images = (contrast * images + (1 - contrast) * mean).clamp(0, 255)
    return warp(images, draws)


@torch.no_grad()
def warp(images: Tensor, draws: AugmentationDraws) -> Tensor:
    """The geometry of :func:`augment` alone: float32 (N, 1, S, S) -> float32 (N, 1, S, S)."""
    grid = sampling_grid(warp_matrices(draws), images.shape[2])
    warped = functional.grid_sample(images, grid, mode="bilinear", padding_mode="zeros", align_corners=False)
    return torch.where(_moved(draws)[:, None, None, None], warped, images)


def warp_matrices(draws: AugmentationDraws) -> Tensor:
    """float32 (N, 2, 3): where each point of the result comes from, in coordinates of -1 to 1 edge to edge.

    The result is the image cropped, then rotated about its centre, then flipped; a point is traced back
    through the three in the opposite order.
    """
    left, top, width, height = draws.crop.unbind(1)
    angle = torch.deg2rad(draws.rotation)
    cosine, sine = torch.cos(angle), torch.sin(angle)
    flip_x = 1 - 2 * draws.horizontal_flip.float()
    flip_y = 1 - 2 * draws.vertical_flip.float()
    row_x = torch.stack([width * cosine * flip_x, -width * sine * flip_y, 2 * left + width - 1], dim=1)
    row_y = torch.stack([height * sine * flip_x, height * cosine * flip_y, 2 * top + height - 1], dim=1)
    return torch.stack([row_x, row_y], dim=1)


def sampling_grid(matrices: Tensor, size: int) -> Tensor:
    """(N, 2, 3) -> (N, S, S, 2). affine_grid without its matrix product, which autocast and TF32 round."""
    centre = (2 * torch.arange(size, device=matrices.device, dtype=torch.float32) + 1) / size - 1  # (S,)
    a = matrices[:, :, :, None, None]  # (N, 2, 3, 1, 1)
    grid = a[:, :, 0] * centre + a[:, :, 1] * centre[:, None] + a[:, :, 2]  # (N, 2, S, S): rows, columns
    return grid.permute(0, 2, 3, 1)


def _moved(draws: AugmentationDraws) -> Tensor:
    left, top, width, height = draws.crop.unbind(1)
    cropped = (left != 0) | (top != 0) | (width != 1) | (height != 1)
    return cropped | (draws.rotation != 0) | draws.horizontal_flip | draws.vertical_flip


@torch.no_grad()
def normalize_batch(images: Tensor) -> Tensor:
    """Z-score of each image over all its pixels: (N, 1, S, S), 0 to 255 -> float32 (N, 1, S, S).

    uint8 input gives the bits of :func:`magsd_runtime.preprocessing.normalize`, float input of whole
    numbers too up to S = 608. A constant image becomes zeros.
    """
    count = images[0].numel()
    exact = not images.is_floating_point()
    values = images.to(torch.int64 if exact else torch.float64)
    total = values.sum((1, 2, 3), keepdim=True)  # (N, 1, 1, 1)
    total_squares = (values * values).sum((1, 2, 3), keepdim=True)
    mean = (total.double() / count).float()
    spread = (count * total_squares - total * total).double().clamp(min=0)  # count^2 times the variance
    deviation = (spread.sqrt() / count).float()
    # rounding of sums of fractions leaves up to 1e-5 for a constant image; one grey level in one pixel of
    # 2048 x 2048 is 5e-4
    constant = deviation == 0 if exact else deviation < 1e-4
    scores = (images.float() - mean) / torch.where(constant, 1.0, deviation)
    return torch.where(constant, 0.0, scores)

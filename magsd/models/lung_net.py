"""LungNet: a very small U-Net that finds the lung fields. 124,177 parameters, 128 x 128 pixels.

    image      (N, 1, 128, 128)   z-scored film, stretched to a square
    level 0    (N, 8, 128, 128)
    level 1    (N, 16, 64, 64)
    level 2    (N, 24, 32, 32)
    level 3    (N, 32, 16, 16)
    level 4    (N, 48, 8, 8)
    lungs      (N, 1, 128, 128)   logits; above 0: lung

Source: Ronneberger et al. 2015 (U-Net), with batch norm and nearest-neighbour upsampling, which every
inference library runs the same way.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

WIDTHS = (8, 16, 24, 32, 48)


class LungNet(nn.Module):
    """float32 (N, 1, S, S), S a multiple of 16 -> logits (N, 1, S, S)."""

    def __init__(self, widths: tuple[int, ...] = WIDTHS) -> None:
        super().__init__()
        below = (1, *widths[:-1])
        self.down = nn.ModuleList(_block(a, b) for a, b in zip(below, widths))
        self.up = nn.ModuleList(_block(a + b, b) for a, b in zip(widths[:0:-1], widths[-2::-1]))
        self.head = nn.Conv2d(widths[0], 1, 1)

    def forward(self, image: Tensor) -> Tensor:
        x, skips = image, []
        for level, block in enumerate(self.down):
            x = block(x if level == 0 else nn.functional.max_pool2d(x, 2))
            skips.append(x)
        for block, skip in zip(self.up, skips[-2::-1]):
            x = nn.functional.interpolate(x, scale_factor=2.0, mode="nearest")
            x = block(torch.cat([x, skip], dim=1))
        return self.head(x)


def _block(inputs: int, outputs: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, 3, padding=1, bias=False),
        nn.BatchNorm2d(outputs),
        nn.ReLU(inplace=True),
        nn.Conv2d(outputs, outputs, 3, padding=1, bias=False),
        nn.BatchNorm2d(outputs),
        nn.ReLU(inplace=True),
    )

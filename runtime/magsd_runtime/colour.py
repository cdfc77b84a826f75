"""How much of a picture is coloured: a film is grey, even where it was saved as RGB."""

from __future__ import annotations

from typing import Any

import numpy as np

COLOURED = 32
"""A pixel is coloured if its largest channel exceeds its smallest by more than this, of 255. JPEG stays below."""

_SIDE = 512


def coloured_share(image: Any) -> float:
    """Share of coloured pixels of a loaded Pillow image of mode RGB or RGBA: 0 to 1, from a grid of at most 512 x 512.

    Transparency dims: what cannot be seen has no colour.
    """
    # picks pixels without a copy of all of them
    grid = np.asarray(image.resize((min(image.width, _SIDE), min(image.height, _SIDE)), 0)).astype(np.int32)
    spread = grid[..., :3].max(axis=-1) - grid[..., :3].min(axis=-1)
    if grid.shape[-1] == 4:
        spread = spread * grid[..., 3] // 255
    return round(float((spread > COLOURED).mean()), 6)

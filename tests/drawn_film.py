"""A film drawn in a moment that no rule of acceptance has anything against: dark lungs in a bright chest, and grain."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray


def drawn_film(seed: int = 0, height: int = 168, width: int = 150) -> NDArray[np.uint8]:
    """uint8 (H, W); another seed is another film."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[-1 : 1 : height * 1j, -1 : 1 : width * 1j]
    film = 150 + 40 * y - 70 * (np.abs(x) > 0.93)  # brighter below, dark beside the body
    for side, tall in ((-1, 0.62), (1, 0.56)):
        middle, wide = side * rng.uniform(0.4, 0.46), rng.uniform(0.24, 0.3)
        film -= rng.uniform(80, 100) * np.exp(-((((x - middle) / wide) ** 2 + ((y + 0.1) / tall) ** 2) ** 2))
    film += 25 * np.exp(-(((x - 0.15) / 0.25) ** 2 + ((y - 0.35) / 0.3) ** 2))  # heart
    return np.clip(film + rng.normal(0, 6, film.shape), 0, 255).astype(np.uint8)

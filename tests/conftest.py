"""Fixtures that several test modules share."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).resolve().parents[1]
# scripts, not a package: their tests import them by name
sys.path.append(str(ROOT / "benchmarks"))
# no test writes to the user's cache, or depends on what is in it; subprocesses inherit this
os.environ["MAGSD_CACHE"] = "off"


@pytest.fixture(scope="session")
def cxr() -> Path:
    """Folder of real chest X-rays: $MAGSD_DATA, or shared/data/cxr beside the checkout."""
    folder = Path(os.environ.get("MAGSD_DATA", ROOT.parent / "shared" / "data" / "cxr"))
    if not (folder / "dataset_a.csv").is_file():
        pytest.skip(f"no chest X-rays at {folder} (set MAGSD_DATA)")
    return folder


@pytest.fixture
def radiograph_pixels() -> np.ndarray:
    """A smooth 8-bit image with structure, uint8 (300, 260): dark lungs on a bright ground, and noise."""
    rng = np.random.default_rng(7)
    y, x = np.mgrid[0:300, 0:260].astype(np.float64)
    image = 180.0 - 110.0 * np.exp(-((x - 80) ** 2 / 1800 + (y - 150) ** 2 / 9000))
    image -= 110.0 * np.exp(-((x - 180) ** 2 / 1800 + (y - 150) ** 2 / 9000))
    return np.clip(image + rng.normal(0, 6, image.shape), 0, 255).astype(np.uint8)

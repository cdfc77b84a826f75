"""Small synthetic data and settings that train in seconds, for tests of training and what follows it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import cv2
import numpy as np

# timm's own test network: 0.3 million parameters, features at strides 8, 16 and 32
TINY: dict[str, Any] = {
    "backbone": "test_efficientnet",
    "weights": "none",
    "size": 64,
    "num_attention_maps": 4,
    "epochs": 3,
    "batch_size": 8,
    "folds": 3,
    "learning_rate": 0.002,
}


def write_tiny_manifest(folder: Path, *, patients: int = 24, classes: tuple[str, ...] = ("blob", "plain")) -> Path:
    """A manifest of noisy 80 x 72 images; those of the first class have a bright square at a random place."""
    rng = np.random.default_rng(11)
    folder.mkdir(parents=True, exist_ok=True)
    lines = ["path,label,patient,x,y,w,h"]
    for index in range(patients):
        image = rng.normal(90, 25, (80, 72))
        label, box = classes[index % len(classes)], ",,,"
        if label == classes[0]:
            x, y = int(rng.integers(4, 44)), int(rng.integers(4, 52))
            image[y : y + 24, x : x + 24] += 90
            box = f"{x},{y},24,24"
        cv2.imwrite(str(folder / f"{index:02d}.png"), np.clip(image, 0, 255).astype(np.uint8))
        lines.append(f"{index:02d}.png,{label},p{index:02d},{box}")
    manifest = folder / "manifest.csv"
    manifest.write_text("\n".join(lines) + "\n")
    return manifest

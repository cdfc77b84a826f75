"""The golden inputs of a bundle: synthetic films that every device can compute again, and what came out here.

Drawn with whole numbers only, so that they are the same on every machine; they come from no data set.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

from magsd_runtime.backends import Backend
from magsd_runtime.bundle import OUTPUT_NAMES, Bundle
from magsd_runtime.errors import MagsdError
from magsd_runtime.files import write_json
from magsd_runtime.images import read_radiograph
from magsd_runtime.preprocessing import preprocess
from magsd_runtime.verification import TOLERANCE, preprocessed_sha256


def golden_images() -> dict[str, NDArray[np.uint8]]:
    """The candidates by name, uint8 (H, W): portrait, landscape and small ones, so that every resize takes part."""
    return {"chest": _chest(640, 512), "gradient": _gradient(300, 420), "noise": _noise(260, 200)}


def write_golden(folder: Path, bundle: Bundle, backend: Backend) -> dict[str, NDArray[np.floating]]:
    """Fill ``folder`` with golden inputs and expected outputs; return those of one image, by output.

    An image whose two best logits are closer than other machines may round is left out: its label would
    prove nothing. If all are, the one with the clearest label stays.
    """
    candidates = {}
    for name, pixels in golden_images().items():
        path = folder / f"{name}.png"
        folder.mkdir(exist_ok=True)
        if not cv2.imwrite(str(path), pixels):
            raise MagsdError(f"the golden input {path} cannot be written")
        # through the file and the runtime's own reading, as a device will do it
        image = preprocess(read_radiograph(path).pixels, bundle.preprocessing)
        outputs = {key: value[0] for key, value in backend.run(image[np.newaxis]).items()}
        candidates[name] = (_clearness(outputs["logits"]), preprocessed_sha256(image), outputs)
    clear = [name for name, (clearness, _, _) in candidates.items() if clearness > 2.0]
    kept = clear or [max(candidates, key=lambda name: candidates[name][0])]
    for name in candidates.keys() - set(kept):
        (folder / f"{name}.png").unlink()
    arrays: dict[str, NDArray[np.floating]] = {}
    expected = {}
    for name in kept:
        _, digest, outputs = candidates[name]
        arrays.update({f"{name}/{key}": outputs[key] for key in OUTPUT_NAMES})
        label = bundle.classes[int(outputs["logits"].argmax())]
        expected[name] = {"preprocessed_sha256": digest, "label": label}
    keywords: dict[str, Any] = dict(arrays)
    np.savez(folder / "expected.npz", **keywords)
    write_json(folder / "expected.json", expected)
    return candidates[kept[0]][2]


def _clearness(logits: NDArray[np.floating]) -> float:
    """Margin of the best logit over the second, in units of what verification allows each to differ."""
    second, best = np.sort(logits.astype(np.float64))[-2:]
    return float(best - second) / (TOLERANCE * max(1.0, float(np.abs(logits).max())))


def _chest(height: int, width: int) -> NDArray[np.uint8]:
    """A bright body, two dark lungs with ribs across, a bright heart and one opacity."""
    y, x = np.mgrid[0:height, 0:width].astype(np.int64)
    image = 60 + 120 * _bump(x, y, width // 2, height // 2, width * 5 // 9, height * 3 // 4) // 1000
    for centre in (width * 3 // 10, width * 7 // 10):
        lung = _bump(x, y, centre, height * 9 // 20, width // 6, height * 3 // 10)
        ribs = 20 * (((y + abs(x - centre) // 3) * 1000 // height) % 90 < 25)
        image += lung * (ribs - 110) // 1000
    image += 70 * _bump(x, y, width * 11 // 20, height * 12 // 20, width // 6, height // 6) // 1000
    image += 60 * _bump(x, y, width * 7 // 25, height * 13 // 25, width // 14, height // 16) // 1000
    image += (_hash(height, width) % 13) - 6
    return np.clip(image, 0, 255).astype(np.uint8)


def _gradient(height: int, width: int) -> NDArray[np.uint8]:
    y, x = np.mgrid[0:height, 0:width].astype(np.int64)
    return (127 * x // (width - 1) + 128 * y // (height - 1)).astype(np.uint8)


def _noise(height: int, width: int) -> NDArray[np.uint8]:
    return (_hash(height, width) & 255).astype(np.uint8)


def _bump(
    x: NDArray[np.int64], y: NDArray[np.int64], centre_x: int, centre_y: int, radius_x: int, radius_y: int
) -> NDArray[np.int64]:
    """1000 at the centre of an ellipse, falling to 0 at its edge and beyond."""
    across = 1000 * (x - centre_x) ** 2 // radius_x**2
    down = 1000 * (y - centre_y) ** 2 // radius_y**2
    return np.maximum(1000 - across - down, 0)


def _hash(height: int, width: int) -> NDArray[np.int64]:
    """Pseudo-random whole numbers 0 to 65535, by position (a multiply-xorshift hash, modulo 2**64)."""
    value = np.arange(height * width, dtype=np.uint64).reshape(height, width)
    value = (value + np.uint64(0x9E3779B97F4A7C15)) * np.uint64(0xBF58476D1CE4E5B9)
    value = (value ^ (value >> np.uint64(29))) * np.uint64(0x94D049BB133111EB)
    return (value >> np.uint64(48)).astype(np.int64)

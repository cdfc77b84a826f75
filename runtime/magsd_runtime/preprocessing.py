"""THE preprocessing: the only path from a radiograph's pixels to what the network sees.

Training, evaluation, export's parity check and the runtime all call these functions.

    standardize(pixels, spec)  uint8 (H, W) -> uint8 (S, S)        fit, resize, CLAHE
    normalize(standardized)    uint8 (S, S) -> float32 (1, S, S)   z-score of the image
    preprocess = normalize . standardize

Training puts its random transforms between the two steps. The result is bit-exact wherever
the same OpenCV version is installed; the golden values in ``tests/test_preprocessing.py``
freeze it (OpenCV 4.9, 4.10 and 5.0 agree in every bit). A changed golden value means a new
``SPEC_VERSION``.

Source: paper, section 4.2 (z-score and CLAHE); the authors' released code for what the paper
leaves open (CLAHE after the resize, clip limit 4, tiles 4 x 4).
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass, fields
from typing import Any, Literal

import cv2
import numpy as np
from numpy.typing import NDArray

from .errors import ArtefactError, UsageError

SPEC_VERSION = 1

Fit = Literal["stretch", "letterbox", "crop"]


@dataclass(frozen=True)
class PreprocessingSpec:
    """All that determines the network's input, given a radiograph's pixels.

    ``fit`` says how a rectangle becomes a square: ``stretch`` (the paper's, changes the aspect
    ratio), ``letterbox`` (padded with 0) or ``crop`` (the central square).
    ``resize`` has one value: each axis shrinks by area averaging, then grows bilinearly.
    ``clahe_clip`` 0 switches CLAHE off. ``clahe_grid`` is the number of tiles along each axis.
    ``normalization`` has one value: z-score over all pixels of the image.
    """

    version: int = SPEC_VERSION
    size: int = 224
    fit: Fit = "stretch"
    resize: Literal["area-then-linear"] = "area-then-linear"
    clahe_clip: float = 4.0
    clahe_grid: int = 4
    normalization: Literal["image-zscore"] = "image-zscore"

    def __post_init__(self) -> None:
        for name in ("version", "size", "clahe_grid"):
            if type(getattr(self, name)) is not int:
                raise UsageError(f"preprocessing {name} is {getattr(self, name)!r}: expected a whole number")
        if type(self.clahe_clip) not in (int, float):
            raise UsageError(f"preprocessing clahe_clip is {self.clahe_clip!r}: expected a number")
        # 4 and 4.0 are one spec and must have one hash
        object.__setattr__(self, "clahe_clip", float(self.clahe_clip))
        if self.version != SPEC_VERSION:
            raise ArtefactError(
                f"preprocessing version {self.version} is not the version {SPEC_VERSION} of this magsd: "
                "install the magsd that made the artefact, or export it again"
            )
        if not 32 <= self.size <= 2048 or self.size % 32:
            raise UsageError(f"preprocessing size is {self.size}: expected a multiple of 32 from 32 to 2048")
        if self.fit not in ("stretch", "letterbox", "crop"):
            raise UsageError(f"preprocessing fit is {self.fit!r}: expected stretch, letterbox or crop")
        if self.resize != "area-then-linear" or self.normalization != "image-zscore":
            raise ArtefactError(
                f"preprocessing resize {self.resize!r} or normalization {self.normalization!r} is unknown"
            )
        if not 0 <= self.clahe_clip <= 100 or not 1 <= self.clahe_grid <= 64:
            raise UsageError("preprocessing clahe_clip must be 0 to 100 and clahe_grid 1 to 64")
        if self.size % self.clahe_grid:
            raise UsageError(f"preprocessing clahe_grid {self.clahe_grid} does not divide size {self.size}")

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, value: dict[str, Any]) -> PreprocessingSpec:
        """The spec written by :meth:`to_dict`.

        Raises
        ------
        ArtefactError
            If a field is missing or unknown: a spec that is not understood whole is not reproduced.
        """
        expected = {field.name for field in fields(cls)}
        if not isinstance(value, dict) or set(value) != expected:
            found = sorted(value) if isinstance(value, dict) else type(value).__name__
            raise ArtefactError(f"preprocessing spec has {found}: expected exactly {sorted(expected)}")
        try:
            return cls(**value)
        except UsageError as error:
            raise ArtefactError(f"preprocessing spec is not usable: {error}") from error

    def canonical_json(self) -> str:
        """Keys sorted, no spaces: equal specs give equal bytes."""
        return json.dumps(self.to_dict(), sort_keys=True, separators=(",", ":"))

    def sha256(self) -> str:
        """Hash of the canonical JSON; checkpoint, ONNX metadata and bundle carry it."""
        return hashlib.sha256(self.canonical_json().encode()).hexdigest()


@dataclass(frozen=True)
class Placement:
    """Where the standardized square lies in the original image.

    A point (u, v) of the square, in its pixels with edges at integers, lies at
    ``(left + u * scale_x, top + v * scale_y)`` of the original; in a letterbox this can be outside.
    """

    left: float
    top: float
    scale_x: float
    scale_y: float


def placement(width: int, height: int, spec: PreprocessingSpec) -> Placement:
    """The placement that :func:`standardize` uses for an image of ``width`` x ``height`` pixels."""
    size = spec.size
    if spec.fit == "crop":
        side = min(width, height)
        return Placement((width - side) // 2, (height - side) // 2, side / size, side / size)
    if spec.fit == "letterbox":
        new_width, new_height, left, top = _letterbox(width, height, size)
        scale_x, scale_y = width / new_width, height / new_height
        return Placement(-left * scale_x, -top * scale_y, scale_x, scale_y)
    return Placement(0.0, 0.0, width / size, height / size)


def standardize(pixels: NDArray[np.uint8], spec: PreprocessingSpec) -> NDArray[np.uint8]:
    """Fit, resize and CLAHE: uint8 (H, W), 0 black to 255 white, any H, W >= 1 -> uint8 (S, S).

    Raises
    ------
    ValueError
        If ``pixels`` is not a two-dimensional uint8 array with at least one pixel.
    """
    if pixels.dtype != np.uint8 or pixels.ndim != 2 or pixels.size == 0:
        raise ValueError(f"pixels are {pixels.dtype} {pixels.shape}: expected uint8 (H, W)")
    size = spec.size
    height, width = pixels.shape
    if spec.fit == "crop":
        side = min(width, height)
        left, top = (width - side) // 2, (height - side) // 2
        square = _resize(pixels[top : top + side, left : left + side], size, size)
    elif spec.fit == "letterbox":
        new_width, new_height, left, top = _letterbox(width, height, size)
        square = np.zeros((size, size), np.uint8)
        square[top : top + new_height, left : left + new_width] = _resize(pixels, new_width, new_height)
    else:
        square = _resize(pixels, size, size)
    if spec.clahe_clip > 0:
        grid = (spec.clahe_grid, spec.clahe_grid)
        square = cv2.createCLAHE(clipLimit=spec.clahe_clip, tileGridSize=grid).apply(square)
    return np.asarray(square, np.uint8)


def normalize(standardized: NDArray[np.uint8]) -> NDArray[np.float32]:
    """Z-score over all pixels of one image: uint8 (S, S) -> float32 (1, S, S), mean 0, variance 1.

    A constant image has no variance and becomes all zeros. Mean and variance come from exact
    integer sums, so the result does not depend on the order of summation.
    """
    if standardized.dtype != np.uint8 or standardized.ndim != 2:
        raise ValueError(f"standardized is {standardized.dtype} {standardized.shape}: expected uint8 (S, S)")
    counts = np.bincount(standardized.ravel(), minlength=256)
    levels = np.arange(256, dtype=np.int64)
    count = standardized.size
    total, total_squares = int(counts @ levels), int(counts @ (levels * levels))
    mean = np.float32(total / count)
    # count * sum(x^2) - sum(x)^2 is an exact integer, and 0 exactly when the image is constant
    deviation = np.float32(np.sqrt(float(count * total_squares - total * total)) / count)
    if deviation == 0:
        return np.zeros((1, *standardized.shape), np.float32)
    table = (levels.astype(np.float32) - mean) / deviation
    return np.asarray(table[standardized][np.newaxis], np.float32)


def preprocess(pixels: NDArray[np.uint8], spec: PreprocessingSpec) -> NDArray[np.float32]:
    """``normalize(standardize(pixels))``: uint8 (H, W) -> float32 (1, S, S), the network's input."""
    return normalize(standardize(pixels, spec))


def _resize(pixels: NDArray[np.uint8], width: int, height: int) -> NDArray[np.uint8]:
    """Each axis shrinks by area averaging, then grows bilinearly (OpenCV's area filter only shrinks)."""
    small = (min(width, pixels.shape[1]), min(height, pixels.shape[0]))
    if small != (pixels.shape[1], pixels.shape[0]):
        pixels = np.asarray(cv2.resize(pixels, small, interpolation=cv2.INTER_AREA), np.uint8)
    if small != (width, height):
        pixels = np.asarray(cv2.resize(pixels, (width, height), interpolation=cv2.INTER_LINEAR), np.uint8)
    return pixels


def _letterbox(width: int, height: int, size: int) -> tuple[int, int, int, int]:
    """Width, height, left and top of the image within the square."""
    scale = size / max(width, height)
    new_width, new_height = max(1, round(width * scale)), max(1, round(height * scale))
    return new_width, new_height, (size - new_width) // 2, (size - new_height) // 2

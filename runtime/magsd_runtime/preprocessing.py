"""THE preprocessing: the only path from a radiograph's pixels to what the network sees.

Training, evaluation, export's parity check and the runtime all call these functions.

    frame(pixels, spec)        uint8 (H, W) -> Framing             which part of the film (version 2: the lungs)
    standardize(pixels, spec)  uint8 (H, W) -> uint8 (S, S)        crop, fit, resize, CLAHE
    normalize(standardized)    uint8 (S, S) -> float32 (1, S, S)   z-score of the image
    preprocess = normalize . standardize

Training puts its random transforms between the two steps. The result is bit-exact wherever
the same OpenCV version is installed; the golden values in ``tests/test_preprocessing.py``
freeze it (OpenCV 4.9, 4.10 and 5.0 agree in every bit). A changed golden value means a new version.

Version 1 sees the whole film. Version 2 first crops it to the lung fields, which a network finds
(:mod:`magsd_runtime.lungs`); that network's hash is part of the specification. Its arithmetic may differ
in the last bits between versions of OpenCV, which can move an edge of the crop by one cell of 128.

Source: paper, section 4.2 (z-score and CLAHE); the authors' released code for what the paper
leaves open (CLAHE after the resize, clip limit 4, tiles 4 x 4).
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from dataclasses import asdict, dataclass, fields
from typing import Any, Literal, NamedTuple

import cv2
import numpy as np
from numpy.typing import NDArray

from .errors import ArtefactError, UsageError

Fit = Literal["stretch", "letterbox", "crop"]
Crop = Literal["none", "lungs"]


INCEPTION_SIZE = 299
"""Inception v3's input, no multiple of 32 and of few CLAHE grids. OpenCV then mirrors pixels at the right and lower
edges until its tiles are whole, so that the tiles at those edges count some pixels twice."""

_CROP_FIELDS = {"crop", "crop_margin", "lungs_sha256"}
_SHA256 = re.compile("[0-9a-f]{64}")


@dataclass(frozen=True)
class PreprocessingSpec:
    """All that determines the network's input, given a radiograph's pixels.

    ``fit`` says how a rectangle becomes a square: ``stretch`` (the paper's, changes the aspect
    ratio), ``letterbox`` (padded with 0) or ``crop`` (the central square).
    ``resize`` has one value: each axis shrinks by area averaging, then grows bilinearly.
    ``clahe_clip`` 0 switches CLAHE off. ``clahe_grid`` is the number of tiles along each axis.
    ``normalization`` has one value: z-score over all pixels of the image.
    ``crop`` ``lungs``: only the box around the lung fields is seen, enlarged on each side by ``crop_margin``
    of its own width and height; the whole film where none are found. ``lungs_sha256`` names their network.

    ``version`` follows from the rest: 2 with a crop, else 1. A version 1 has no fields of the crop, so that its
    canonical JSON and hash are those it always had.
    """

    version: int = 0
    size: int = 224
    fit: Fit = "stretch"
    resize: Literal["area-then-linear"] = "area-then-linear"
    clahe_clip: float = 4.0
    clahe_grid: int = 4
    normalization: Literal["image-zscore"] = "image-zscore"
    crop: Crop = "none"
    crop_margin: float = 0.0
    lungs_sha256: str = ""

    def __post_init__(self) -> None:
        for name in ("version", "size", "clahe_grid"):
            if type(getattr(self, name)) is not int:
                raise UsageError(f"preprocessing {name} is {getattr(self, name)!r}: expected a whole number")
        for name in ("clahe_clip", "crop_margin"):
            if type(getattr(self, name)) not in (int, float):
                raise UsageError(f"preprocessing {name} is {getattr(self, name)!r}: expected a number")
            # 4 and 4.0 are one spec and must have one hash
            object.__setattr__(self, name, float(getattr(self, name)))
        if self.crop not in ("none", "lungs"):
            raise UsageError(f"preprocessing crop is {self.crop!r}: expected none or lungs")
        version = 1 if self.crop == "none" else 2
        if self.version not in (0, version):
            raise ArtefactError(
                f"preprocessing version {self.version} with crop {self.crop} is not one of this magsd: "
                "install the magsd that made the artefact, or export it again"
            )
        object.__setattr__(self, "version", version)
        if self.crop == "none" and (self.crop_margin or self.lungs_sha256):
            raise UsageError("preprocessing crop_margin and lungs_sha256 need crop lungs")
        if self.crop == "lungs" and not _SHA256.fullmatch(str(self.lungs_sha256)):
            raise UsageError("preprocessing lungs_sha256 is not a SHA-256: 64 hexadecimal digits")
        if not 0 <= self.crop_margin <= 1:
            raise UsageError(f"preprocessing crop_margin is {self.crop_margin}: expected 0 to 1")
        if self.size != INCEPTION_SIZE and (not 32 <= self.size <= 2048 or self.size % 32):
            raise UsageError(
                f"preprocessing size is {self.size}: expected a multiple of 32 from 32 to 2048, or {INCEPTION_SIZE}"
            )
        if self.fit not in ("stretch", "letterbox", "crop"):
            raise UsageError(f"preprocessing fit is {self.fit!r}: expected stretch, letterbox or crop")
        if self.resize != "area-then-linear" or self.normalization != "image-zscore":
            raise ArtefactError(
                f"preprocessing resize {self.resize!r} or normalization {self.normalization!r} is unknown"
            )
        if not 0 <= self.clahe_clip <= 100 or not 1 <= self.clahe_grid <= 64:
            raise UsageError("preprocessing clahe_clip must be 0 to 100 and clahe_grid 1 to 64")
        if self.size % self.clahe_grid and self.size != INCEPTION_SIZE:
            raise UsageError(f"preprocessing clahe_grid {self.clahe_grid} does not divide size {self.size}")

    def to_dict(self) -> dict[str, Any]:
        values = asdict(self)
        return values if self.version > 1 else {k: v for k, v in values.items() if k not in _CROP_FIELDS}

    @classmethod
    def from_dict(cls, value: dict[str, Any]) -> PreprocessingSpec:
        """The spec written by :meth:`to_dict`.

        Raises
        ------
        ArtefactError
            If a field is missing or unknown: a spec that is not understood whole is not reproduced.
        """
        expected = {field.name for field in fields(cls)}
        if isinstance(value, dict) and value.get("version") == 1:
            expected -= _CROP_FIELDS
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


class Region(NamedTuple):
    """Half-open rectangle of whole pixels of the film: ``x0 <= x < x1``, ``y0 <= y < y1``."""

    x0: int
    y0: int
    x1: int
    y1: int

    @property
    def width(self) -> int:
        return self.x1 - self.x0

    @property
    def height(self) -> int:
        return self.y1 - self.y0


@dataclass(frozen=True, eq=False)
class Framing:
    """The part of a film that the network sees, and the lung fields that decided it.

    ``width`` and ``height`` of the film in pixels. ``lungs`` is bool (128, 128) over the whole film stretched to
    a square, all False where none were found, and None where the specification does not look for them.
    """

    width: int
    height: int
    region: Region
    lungs: NDArray[np.bool_] | None = None

    @property
    def lungs_found(self) -> bool | None:
        """None where nobody looked."""
        return None if self.lungs is None else bool(self.lungs.any())


def frame(pixels: NDArray[np.uint8], spec: PreprocessingSpec) -> Framing:
    """Which part of a film uint8 (H, W) the network sees: all of it, or the box around the lungs.

    Raises
    ------
    ArtefactError
        If the lung network that ``spec`` names is not known here.
    """
    height, width = pixels.shape
    if spec.crop == "none":
        return Framing(width, height, Region(0, 0, width, height))
    from .lungs import find_lungs

    lungs = find_lungs(pixels, spec.lungs_sha256)
    return Framing(width, height, lung_region(lungs, width, height, spec.crop_margin), lungs)


def lung_region(lungs: NDArray[np.bool_], width: int, height: int, margin: float) -> Region:
    """The box around the lung fields bool (h, w), in pixels of the film ``width`` x ``height``.

    ``margin`` is a fraction of the box's own width and height, added on each side and cut at the film's edge;
    edges go outwards to whole pixels. Without lung fields it is the whole film.
    """
    rows, columns = np.flatnonzero(lungs.any(axis=1)), np.flatnonzero(lungs.any(axis=0))
    if rows.size == 0:
        return Region(0, 0, width, height)

    def outwards(first: int, last: int, cells: int, length: int) -> tuple[int, int]:
        extra = margin * (last + 1 - first)
        low, high = (first - extra) * length / cells, (last + 1 + extra) * length / cells
        return max(0, math.floor(low)), min(length, math.ceil(high))

    x0, x1 = outwards(int(columns[0]), int(columns[-1]), lungs.shape[1], width)
    y0, y1 = outwards(int(rows[0]), int(rows[-1]), lungs.shape[0], height)
    return Region(x0, y0, x1, y1)


def lungs_in_square(framing: Framing, spec: PreprocessingSpec) -> NDArray[np.float32]:
    """How much of each pixel of the network's square is lung: float32 (S, S), 0 to 1, bilinear; 0 off the film.

    Raises
    ------
    ValueError
        If the framing has no lung fields to speak of: ``spec`` does not look for them.
    """
    if framing.lungs is None:
        raise ValueError("the preprocessing does not look for lung fields")
    where = placement(framing.region, spec)
    rows = _bilinear_weights(where.top, where.scale_y, spec.size, framing.lungs.shape[0], framing.height)
    columns = _bilinear_weights(where.left, where.scale_x, spec.size, framing.lungs.shape[1], framing.width)
    return rows @ framing.lungs.astype(np.float32) @ columns.T


def _bilinear_weights(start: float, scale: float, size: int, cells: int, length: int) -> NDArray[np.float32]:
    """float32 (size, cells): what each cell of a film's axis of ``length`` pixels gives to each pixel of the square."""
    film = start + (np.arange(size) + 0.5) * scale
    position = np.clip(film * cells / length - 0.5, 0, cells - 1)
    weights = np.maximum(0, 1 - np.abs(position[:, np.newaxis] - np.arange(cells)))
    weights[(film < 0) | (film > length)] = 0
    return weights.astype(np.float32)


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


def placement(region: Region, spec: PreprocessingSpec) -> Placement:
    """The placement that :func:`standardize` uses for the part ``region`` of a film."""
    size, width, height = spec.size, region.width, region.height
    if spec.fit == "crop":
        side = min(width, height)
        left, top = (width - side) // 2, (height - side) // 2
        return Placement(region.x0 + left, region.y0 + top, side / size, side / size)
    if spec.fit == "letterbox":
        new_width, new_height, left, top = _letterbox(width, height, size)
        scale_x, scale_y = width / new_width, height / new_height
        return Placement(region.x0 - left * scale_x, region.y0 - top * scale_y, scale_x, scale_y)
    return Placement(region.x0, region.y0, width / size, height / size)


def standardize(
    pixels: NDArray[np.uint8], spec: PreprocessingSpec, framing: Framing | None = None
) -> NDArray[np.uint8]:
    """Crop, fit, resize and CLAHE: uint8 (H, W), 0 black to 255 white, any H, W >= 1 -> uint8 (S, S).

    ``framing`` is what :func:`frame` gave for these pixels, where the caller needs it too.

    Raises
    ------
    ValueError
        If ``pixels`` is not a two-dimensional uint8 array with at least one pixel.
    ArtefactError
        As :func:`frame`.
    """
    if pixels.dtype != np.uint8 or pixels.ndim != 2 or pixels.size == 0:
        raise ValueError(f"pixels are {pixels.dtype} {pixels.shape}: expected uint8 (H, W)")
    size = spec.size
    x0, y0, x1, y1 = (framing or frame(pixels, spec)).region
    pixels = pixels[y0:y1, x0:x1]
    height, width = pixels.shape
    if spec.fit == "crop":
        side = min(width, height)
        left, top = (width - side) // 2, (height - side) // 2
        square = resize_area_then_linear(pixels[top : top + side, left : left + side], size, size)
    elif spec.fit == "letterbox":
        new_width, new_height, left, top = _letterbox(width, height, size)
        square = np.zeros((size, size), np.uint8)
        shown = resize_area_then_linear(pixels, new_width, new_height)
        square[top : top + new_height, left : left + new_width] = shown
    else:
        square = resize_area_then_linear(pixels, size, size)
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


def resize_area_then_linear(pixels: NDArray[np.uint8], width: int, height: int) -> NDArray[np.uint8]:
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

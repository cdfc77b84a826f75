"""From stored values to 8 bits: the grayscale pipeline of PS3.4, N.2, in its order.

    pixel padding -> modality LUT or rescale -> VOI LUT or window -> presentation LUT shape -> 8 bits
    PS3.3, C.7.5.1.1.2   C.11.1                   C.11.2               C.8.11.3.1.2, C.7.6.3.1.2

Every step maps one value to another, so it is computed once for each possible stored value (65,536 at most) and then
looked up. Values of interest are 0 to 1 here; 8 bits are made of them last, after the inversion.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Function = Literal["LINEAR", "LINEAR_EXACT", "SIGMOID"]

PERCENTILES = (0.5, 99.5)
"""Of the film's pixels without padding: the window of a film that brings none."""


@dataclass(frozen=True)
class Rescale:
    """``slope * stored + intercept``; slope is not 0."""

    slope: float = 1.0
    intercept: float = 0.0


@dataclass(frozen=True, eq=False)
class LookupTable:
    """``data[value - first]``, the ends repeated outside; an entry's largest value is ``2**bits - 1``."""

    first: int
    bits: int
    data: NDArray[np.uint16]


@dataclass(frozen=True)
class Window:
    """PS3.3, C.11.2.1.2: ``width`` at least 1 for LINEAR, above 0 for the others."""

    center: float
    width: float
    function: Function = "LINEAR"


@dataclass(frozen=True, eq=False)
class GrayscaleTransform:
    """All that makes 8 bits of a film's ``bits_stored``.

    ``padding``: lowest and highest stored value, both inclusive, that is no film. ``voi`` None: see :func:`render`.
    """

    bits_stored: int
    signed: bool = False
    padding: tuple[int, int] | None = None
    modality: Rescale | LookupTable = Rescale()
    voi: Window | LookupTable | None = None
    inverted: bool = False


@dataclass(frozen=True)
class Shown:
    """What :func:`render` did: which window, and the share of the pixels that are padding (0 to 1).

    ``kind``: ``window``, ``lut``, ``full`` (8 bits as they are) or ``percentile``, then ``low`` and ``high`` are its
    ends in units of the modality LUT's output.
    """

    kind: Literal["window", "lut", "full", "percentile"]
    padded: float
    low: float | None = None
    high: float | None = None


def render(patterns: NDArray[np.integer], transform: GrayscaleTransform) -> tuple[NDArray[np.uint8], Shown]:
    """Stored bits (H, W), unsigned and below ``2**bits_stored``, -> uint8 (H, W), 0 black; padding is black.

    Without a VOI transform, 8 unsigned bits without a rescale are taken as they are, because they are already what a
    screen shows; anything else gets a linear window between two percentiles of the film (:data:`PERCENTILES`).
    """
    levels = stored_values(transform.bits_stored, transform.signed)
    padding = is_padding(levels, transform.padding)
    counts = sum(
        (np.bincount(block.ravel(), minlength=levels.size) for block in _blocks(patterns)),
        start=np.zeros(levels.size, np.int64),
    )
    padded = float(counts[padding].sum() / max(1, patterns.size))
    values = apply_modality(levels, transform.modality)
    if isinstance(transform.voi, Window):
        shown, interest = Shown("window", padded), apply_window(values, transform.voi)
    elif transform.voi is not None:
        shown, interest = Shown("lut", padded), look_up(values, transform.voi) / (2**transform.voi.bits - 1)
    elif transform.bits_stored == 8 and not transform.signed and transform.modality == Rescale():
        shown, interest = Shown("full", padded), values / 255
    else:
        low, high = percentile_window(values, np.where(padding, 0, counts))
        shown, interest = Shown("percentile", padded, low, high), between(values, low, high)
    if transform.inverted:
        interest = 1 - interest
    table = np.floor(255 * np.clip(interest, 0, 1) + 0.5).astype(np.uint8)
    table[padding] = 0
    pixels = np.empty(patterns.shape, np.uint8)
    for stored, block in zip(_blocks(patterns), _blocks(pixels)):
        block[:] = table[stored]
    return pixels, shown


def _blocks(pixels: NDArray[np.integer], pixels_each: int = 1 << 20) -> list[NDArray[np.integer]]:
    """Views of some rows each: counting and looking up make an int64 of every index, 640 MB for the largest film."""
    rows = max(1, pixels_each // max(1, pixels.shape[1]))
    return [pixels[start : start + rows] for start in range(0, pixels.shape[0], rows)]


def stored_values(bits: int, signed: bool) -> Floats:
    """The value of each bit pattern 0 to 2**bits - 1; two's complement where signed."""
    levels = np.arange(2**bits, dtype=np.float64)
    if signed:
        levels[2 ** (bits - 1) :] -= 2**bits
    return levels


def is_padding(levels: Floats, padding: tuple[int, int] | None) -> NDArray[np.bool_]:
    """Which stored values are padding."""
    if padding is None:
        return np.zeros(levels.shape, bool)
    return (levels >= padding[0]) & (levels <= padding[1])


def apply_modality(levels: Floats, modality: Rescale | LookupTable) -> Floats:
    """Stored values -> modality values (PS3.3, C.11.1.1)."""
    if isinstance(modality, LookupTable):
        return look_up(levels, modality)
    return modality.slope * levels + modality.intercept


def look_up(values: Floats, table: LookupTable) -> Floats:
    """Entries of a table (PS3.3, C.11.1.1.1, C.11.2.1.1); values between two of its inputs go to the nearer one."""
    index = np.floor(values - table.first + 0.5)
    return table.data[np.clip(index, 0, table.data.size - 1).astype(np.intp)].astype(np.float64)


def apply_window(values: Floats, window: Window) -> Floats:
    """Modality values -> 0 to 1 (PS3.3, C.11.2.1.2.1, C.11.2.1.3.1, C.11.2.1.3.2)."""
    center, width = window.center, window.width
    if window.function == "SIGMOID":
        # at 700 exp is still finite, and 1 / (1 + it) long 0
        return 1 / (1 + np.exp(np.clip(-4 * (values - center) / width, -700, 700)))
    if window.function == "LINEAR_EXACT":
        return np.clip((values - center) / width + 0.5, 0, 1)
    if width <= 1:
        return (values > center - 0.5).astype(np.float64)
    return np.clip((values - (center - 0.5)) / (width - 1) + 0.5, 0, 1)


def percentile_window(values: Floats, counts: NDArray[np.integer]) -> tuple[float, float]:
    """The values below or at which the :data:`PERCENTILES` of the pixels lie; ``counts`` pixels have ``values``.

    Where both are the same, the smallest and largest value; 0 and 0 where there is no pixel.
    """
    order = np.argsort(values, kind="stable")
    ordered, cumulated = values[order], np.cumsum(counts[order])
    total = int(cumulated[-1])
    if total == 0:
        return 0.0, 0.0
    ranks = [max(1, int(np.ceil(percent / 100 * total))) for percent in PERCENTILES]
    low, high = (float(ordered[np.searchsorted(cumulated, rank)]) for rank in ranks)
    if low == high:
        low, high = (float(ordered[np.searchsorted(cumulated, rank)]) for rank in (1, total))
    return low, high


def between(values: Floats, low: float, high: float) -> Floats:
    """Linear, 0 at ``low`` and 1 at ``high``; 0 everywhere where they are the same."""
    if low == high:
        return np.zeros(values.shape)
    return np.clip((values - low) / (high - low), 0, 1)

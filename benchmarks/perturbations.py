"""Changes of a film's pixels that leave the disease in it, or take it out: uint8 (H, W) -> uint8 (h, w).

All of them act before the pipeline, on the pixels that a file decodes to. The film given is never written to.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import cv2
import numpy as np
from numpy.typing import NDArray

from magsd.ground_truth import boxes_mask
from magsd_runtime.preprocessing import resize_area_then_linear

Film = NDArray[np.uint8]
Change = Callable[[Film], Film]

CENTRE = 0.7
CORNER = 0.15
THUMBNAIL = 32


def blank_centre(film: Film, share: float = CENTRE) -> Film:
    """Only the border is left: the central ``share`` of width and height gets the border's mean grey.

    Not black: with one constant for all films, borders that are black too would make films near duplicates.
    """
    height, width = film.shape
    box = (width * (1 - share) / 2, height * (1 - share) / 2, width * share, height * share)
    return blank(film, boxes_mask([box], width, height))


def thumbnail(film: Film, side: int = THUMBNAIL) -> Film:
    """Reduced to ``side`` x ``side`` by area averaging and enlarged again bilinearly to the film's size."""
    height, width = film.shape
    return resize_area_then_linear(resize_area_then_linear(film, side, side), width, height)


def blank_corners(film: Film, share: float = CORNER) -> Film:
    """Four black rectangles in the corners, ``share`` of width and height each."""
    height, width = film.shape
    w, h = width * share, height * share
    corners = [(x, y, w, h) for x in (0, width - w) for y in (0, height - h)]
    return np.where(boxes_mask(corners, width, height), 0, film).astype(np.uint8)


def blank(film: Film, mask: NDArray[np.bool_]) -> Film:
    """The masked pixels, bool (H, W), get the mean grey of the others, rounded: it tells nothing that is not left."""
    rest = film[~mask]
    return np.where(mask, round(float(rest.mean())) if rest.size else 0, film).astype(np.uint8)


def window(film: Film, strength: float) -> Film:
    """Another window: a logistic contrast curve through 0 and 255, steeper in the middle as ``strength`` grows.

    grey g = 255 * t -> 255 * (s(t) - s(0)) / (s(1) - s(0)), where s(t) = 1 / (1 + exp(strength * (1/2 - t))).
    """
    curve = 1 / (1 + np.exp(strength * (0.5 - np.arange(256) / 255)))
    return _table((curve - curve[0]) / (curve[-1] - curve[0]))[film]


def gamma(film: Film, exponent: float) -> Film:
    """grey g -> 255 * (g / 255) ** exponent, rounded: below 1 brighter."""
    return _table((np.arange(256) / 255) ** exponent)[film]


def reencode(film: Film, quality: int) -> Film:
    """Written as JPEG of this quality, 1 to 100, and read again."""
    done, encoded = cv2.imencode(".jpg", film, [cv2.IMWRITE_JPEG_QUALITY, quality])
    assert done
    return np.asarray(cv2.imdecode(encoded, cv2.IMREAD_GRAYSCALE), np.uint8)


def letterbox(film: Film) -> Film:
    """A square with black bars beside or above and below the film; a square film stays as it is."""
    height, width = film.shape
    side = max(height, width)
    square = np.zeros((side, side), np.uint8)
    top, left = (side - height) // 2, (side - width) // 2
    square[top : top + height, left : left + width] = film
    return square


def mirror(film: Film) -> Film:
    """Left and right change places."""
    return np.ascontiguousarray(film[:, ::-1])


def halve(film: Film) -> Film:
    """Half the width and height, rounded up, by area averaging."""
    height, width = film.shape
    return resize_area_then_linear(film, (width + 1) // 2, (height + 1) // 2)


def enlarged(mask: NDArray[np.bool_], width: int, height: int) -> NDArray[np.bool_]:
    """A mask over the whole film, bool (h, w), in the film's pixels: that of the cell each pixel's centre lies in."""
    rows = (2 * np.arange(height) + 1) * mask.shape[0] // (2 * height)
    columns = (2 * np.arange(width) + 1) * mask.shape[1] // (2 * width)
    return mask[rows[:, np.newaxis], columns]


CHANGES: Mapping[str, Change] = {
    "corners blanked": blank_corners,
    "re-windowed, mild": lambda film: window(film, 4.0),
    "re-windowed, strong": lambda film: window(film, 8.0),
    "gamma 0.6": lambda film: gamma(film, 0.6),
    "gamma 1.6": lambda film: gamma(film, 1.6),
    "JPEG quality 30": lambda film: reencode(film, 30),
    "letterboxed": letterbox,
    "mirrored": mirror,
    "half the size": halve,
}
"""What a trained network is tried on; "lungs blanked" needs to know where they are."""


def _table(values: NDArray[np.float64]) -> NDArray[np.uint8]:
    """256 values, 0 to 1, as grey levels."""
    return np.rint(255 * values).astype(np.uint8)

"""What people drew on an image, boxes or a mask, as pixels of the original."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from magsd_runtime.errors import DataError
from magsd_runtime.images import read_radiograph
from magsd_runtime.localization import enclosing_box
from magsd_runtime.prediction import Box
from magsd_runtime.preprocessing import Framing, PreprocessingSpec, frame

from .data import Record


@dataclass(frozen=True, eq=False)
class Truth:
    """What was drawn on one image: ``mask`` bool (H, W), ``box`` around all of it; ``kind`` box or mask.

    ``framing`` is the part of the image that the network sees.
    """

    mask: NDArray[np.bool_]
    box: Box
    kind: str
    framing: Framing

    @property
    def width(self) -> int:
        return self.mask.shape[1]

    @property
    def height(self) -> int:
        return self.mask.shape[0]


def read_truth(record: Record, spec: PreprocessingSpec) -> Truth:
    """The boxes or the mask of ``record``, in pixels of its file. A mask wins over boxes.

    Raises
    ------
    DataError
        If the mask has another size than the image or is empty, or no box meets the image.
    """
    image = read_radiograph(record.path)
    framing = frame(image.pixels, spec)
    if record.mask is not None:
        drawn = read_radiograph(record.mask)
        if (drawn.width, drawn.height) != (image.width, image.height):
            raise DataError(
                f"mask {record.mask} is {drawn.width} x {drawn.height}, "
                f"its image {record.path} {image.width} x {image.height} pixels: they must agree"
            )
        # what a lossy file shows beside an edge is not drawn
        mask = drawn.pixels > (drawn.pixels.max() // 2 if drawn.source.get("format") == "JPEG" else 0)
        box = enclosing_box(mask)
        if box is None:
            raise DataError(f"mask {record.mask} is empty: leave it out of the manifest")
        return Truth(mask, box, "mask", framing)
    mask = boxes_mask(record.boxes, image.width, image.height)
    if not mask.any():
        raise DataError(f"no box of {record.path} covers a pixel of its {image.width} x {image.height}")
    x0, y0 = min(box[0] for box in record.boxes), min(box[1] for box in record.boxes)
    x1, y1 = max(box[0] + box[2] for box in record.boxes), max(box[1] + box[3] for box in record.boxes)
    return Truth(mask, Box(max(x0, 0), max(y0, 0), min(x1, image.width), min(y1, image.height)), "box", framing)


def boxes_mask(boxes: Sequence[tuple[float, float, float, float]], width: int, height: int) -> NDArray[np.bool_]:
    """The pixels whose centres lie in any box (x, y, w, h): bool (height, width)."""
    columns, rows = np.arange(width) + 0.5, np.arange(height) + 0.5
    mask = np.zeros((height, width), bool)
    for x, y, w, h in boxes:
        mask |= np.outer((rows >= y) & (rows < y + h), (columns >= x) & (columns < x + w))
    return mask

"""Where the lungs are: a U-Net of 124,000 parameters, run by OpenCV, that every film can be cropped to.

    film uint8 (H, W) -> stretched to 128 x 128, z-scored -> LungNet -> above 0: lung -> at most two fields

The network (``magsd train-lungs`` makes one) is part of the preprocessing contract: the specification names
its SHA-256, and only the network with that hash is used. One lies in this package; a bundle brings its own.
OpenCV runs it because the preprocessing needs OpenCV anyway: no other library has to be there.
"""

from __future__ import annotations

import hashlib
import threading
from pathlib import Path

import cv2
import numpy as np
from numpy.typing import NDArray

from .errors import ArtefactError

LUNG_SIZE = 128
"""Side of the network's square in pixels."""

SMALLEST_SHARE = 0.05
"""Lung fields that cover less of the film than this count as none found."""

PACKAGED_LUNGS = Path(__file__).parent / "assets" / "lungs.onnx"
"""The network that new specifications name."""

_known: dict[str, bytes] = {}
_local = threading.local()


def packaged_sha256() -> str:
    """SHA-256 of the network in this package."""
    return register(PACKAGED_LUNGS)


def register(path: Path) -> str:
    """Make the network in file ``path`` known by its SHA-256, which is returned.

    Raises
    ------
    ArtefactError
        If the file cannot be read.
    """
    try:
        content = path.read_bytes()
    except OSError as error:
        raise ArtefactError(
            f"{path}: the lung network cannot be read ({error.strerror}): install magsd again"
        ) from error
    # not the path: a bundle's folder may move or go, and what runs is then what was hashed
    digest = hashlib.sha256(content).hexdigest()
    _known[digest] = content
    return digest


def network_bytes(sha256: str) -> bytes:
    """The network with this hash, an ONNX file's content.

    Raises
    ------
    ArtefactError
        If none is known.
    """
    if sha256 not in _known and packaged_sha256() != sha256:
        raise ArtefactError(
            f"the lung network {sha256[:12]}... of the preprocessing is not here: "
            "open it with the bundle that brings it, or install the magsd that made it"
        )
    return _known[sha256]


def find_lungs(pixels: NDArray[np.uint8], sha256: str) -> NDArray[np.bool_]:
    """The lung fields of a film: uint8 (H, W) -> bool (128, 128), the film stretched to a square.

    The two largest connected fields are kept, the second if it has a quarter of the first's area; all
    False if together they cover less than :data:`SMALLEST_SHARE`: no lungs were found.

    Raises
    ------
    ArtefactError
        If no network with this hash is known, or OpenCV cannot run it.
    """
    from .preprocessing import normalize, resize_area_then_linear

    square = normalize(resize_area_then_linear(pixels, LUNG_SIZE, LUNG_SIZE))
    network = _network(sha256)
    network.setInput(square[np.newaxis])
    return largest_fields(np.asarray(network.forward())[0, 0] > 0)


def largest_fields(mask: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """What :func:`find_lungs` keeps of the network's mask: bool (h, w) -> bool (h, w). 8-connected."""
    _, labels, statistics, _ = cv2.connectedComponentsWithStats(mask.astype(np.uint8), connectivity=8)
    areas = statistics[1:, cv2.CC_STAT_AREA]
    kept = np.argsort(-areas, kind="stable")[:2] + 1
    kept = [label for label in kept if areas[label - 1] >= 0.25 * areas.max()]
    fields = np.isin(labels, kept)
    return fields if fields.sum() >= SMALLEST_SHARE * mask.size else np.zeros_like(fields)


def _network(sha256: str) -> cv2.dnn.Net:
    """One network a thread: OpenCV's hold the input between two calls."""
    networks: dict[str, cv2.dnn.Net] = _local.__dict__.setdefault("networks", {})
    if sha256 not in networks:
        content = np.frombuffer(network_bytes(sha256), np.uint8)
        try:
            networks[sha256] = cv2.dnn.readNetFromONNX(content)
        except cv2.error as error:
            raise ArtefactError(
                f"OpenCV {cv2.__version__} cannot load the lung network {sha256[:12]}...: install a newer one"
            ) from error
    return networks[sha256]

"""One film through torchxrayvision's DenseNet121, as a program of its own: python peer_torchxrayvision.py IMAGE

As in its scripts/process_image.py, with random weights: nothing is downloaded, and the time is that of trained ones.
"""

from __future__ import annotations

import sys
from typing import Any


def main(image: str) -> None:
    import torch
    import torchxrayvision as xrv  # type: ignore[import-not-found]  # pyright: ignore[reportMissingImports]
    from skimage.io import imread

    film: Any = imread(image)
    film = film if film.ndim == 2 else film[:, :, 0]
    film = xrv.datasets.normalize(film, 255)[None]
    film = xrv.datasets.XRayResizer(224)(xrv.datasets.XRayCenterCrop()(film))
    model = xrv.models.DenseNet(num_classes=18, in_channels=1, weights=None).eval()
    with torch.inference_mode():
        found = model(torch.from_numpy(film).float()[None])[0]
    print(int(found.argmax()))


if __name__ == "__main__":
    main(sys.argv[1])

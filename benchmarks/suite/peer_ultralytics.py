"""One film through ultralytics' classification predict, as a program of its own: python peer_ultralytics.py IMAGE

The network is built from the description in their package, with random weights: nothing is downloaded, and the time is
that of a trained one.
"""

from __future__ import annotations

import os
import sys

MODEL = "yolo11n-cls.yaml"
"""Their smallest classifier, 1.6 million parameters; magsd's in the box has 3.0."""


def main(image: str) -> None:
    # no report home, no packages installed on the way
    os.environ.update({"YOLO_OFFLINE": "true", "YOLO_AUTOINSTALL": "false", "YOLO_VERBOSE": "false"})
    from ultralytics import YOLO  # type: ignore[import-not-found]  # pyright: ignore[reportMissingImports]

    model = YOLO(MODEL, task="classify")
    (result,) = model.predict(source=image, imgsz=224, device="cpu", verbose=False, save=False)
    print(int(result.probs.top1))


if __name__ == "__main__":
    main(sys.argv[1])

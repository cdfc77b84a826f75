"""What a bundle says of drawings with opacities at known places: an answer to look at, not a measure of accuracy.

    python benchmarks/phantom_answers.py [BUNDLE] [--count 20] [--seed 7] [--json FILE]

BUNDLE: by default the one that comes with magsd. ``--count`` phantoms without and as many with an opacity, at 512
pixels, as `magsd phantoms` draws them, and each of them changed. No network of magsd's was trained on a phantom: who
expects a film's answer of it is wrong, but a bright round opacity that it calls healthy tells what it does not see.

labels    how many got which label (refused ones none); sure: of the healthy, how many with a probability above 0.9
flagged   review or rejected
box       of those with an opacity and a label, how many have the middle of the first finding inside an opacity's box
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

from magsd.phantoms import Phantom, draw_phantom
from magsd_runtime.errors import RESEARCH_USE, MagsdError
from magsd_runtime.pipeline import Pipeline
from magsd_runtime.prediction import Prediction
from magsd_runtime.shipped import choose_bundle
from perturbations import mirror
from timing import describe, machine, save

SIZE = 512
SURE = 0.9
Pixels = NDArray[np.uint8]


def noisy(film: Pixels, strength: float = 40.0) -> Pixels:
    """Normal noise of ``strength`` grey levels."""
    noise = np.random.default_rng(0).normal(0, strength, film.shape)
    return np.clip(film + noise, 0, 255).round().astype(np.uint8)


def turned(film: Pixels, degrees: float = 20.0) -> Pixels:
    """Turned anticlockwise about the middle, black where nothing was."""
    height, width = film.shape
    matrix = cv2.getRotationMatrix2D((width / 2 - 0.5, height / 2 - 0.5), degrees, 1.0)
    return np.asarray(cv2.warpAffine(film, matrix, (width, height)), np.uint8)


CHANGES: Mapping[str, Callable[[Pixels], Pixels]] = {
    "as drawn": lambda film: film,
    "noise of 40 grey levels": noisy,
    "turned by 20 degrees": turned,
    "mirrored": mirror,
    "left half only": lambda film: np.ascontiguousarray(film[:, : film.shape[1] // 2]),
}


def main(argv: Sequence[str] | None = None) -> int:
    arguments = _arguments(argv)
    try:
        with (
            Pipeline.open(choose_bundle(arguments.bundle), "cpu", threads=arguments.threads) as pipeline,
            tempfile.TemporaryDirectory() as folder,
        ):
            results: dict[str, Any] = {
                "machine": machine("numpy", "opencv-python-headless", "onnxruntime"),
                "bundle": {"name": pipeline.bundle.name, "model_sha256": pipeline.bundle.model_sha256},
                "rows": {},
            }
            path = Path(folder) / "phantom.png"
            for change, altered in CHANGES.items():
                for kind in ("healthy", "focal"):
                    rows = []
                    for patient in range(arguments.count):
                        phantom = draw_phantom(kind, seed=arguments.seed, patient=patient, size=SIZE)
                        cv2.imwrite(str(path), altered(phantom.pixels))
                        rows.append((phantom, pipeline.predict(path, with_heat=False).prediction))
                    name = f"{'an opacity' if kind == 'focal' else 'no opacity'}, {change}"
                    results["rows"][name] = counts(rows, with_boxes=change == "as drawn" and kind == "focal")
    except MagsdError as error:
        print(f"phantom_answers: {error}", file=sys.stderr)
        return error.exit_code
    print(f"{describe(results['machine'])}\n{results['bundle']['name']}\n\n{table(results['rows'])}")
    print(RESEARCH_USE)
    save(arguments.json, results)
    return 0


def counts(rows: Sequence[tuple[Phantom, Prediction]], *, with_boxes: bool) -> dict[str, Any]:
    """``box`` is None without ``with_boxes``: a changed phantom's opacities need not lie where they were drawn."""
    labels: dict[str, int] = {}
    for _, prediction in rows:
        if prediction.label is not None:
            labels[prediction.label] = labels.get(prediction.label, 0) + 1
    return {
        "phantoms": len(rows),
        "labels": dict(sorted(labels.items())),
        "sure": sum(one.label == "healthy" and (one.probability or 0) > SURE for _, one in rows),
        "flagged": sum(one.status in ("review", "rejected") for _, one in rows),
        "box": sum(hits(phantom, one) for phantom, one in rows) if with_boxes else None,
    }


def hits(phantom: Phantom, prediction: Prediction) -> bool:
    """Whether the middle of the first finding lies in one of the phantom's boxes."""
    if not prediction.findings:
        return False
    box = prediction.findings[0].box
    x, y = (box.x0 + box.x1) / 2, (box.y0 + box.y1) / 2
    return any(left <= x < left + width and top <= y < top + height for left, top, width, height in phantom.boxes)


def table(rows: Mapping[str, Mapping[str, Any]]) -> str:
    lines = ["| phantoms with | of | labels | sure | flagged | box |", "|---" * 6 + "|"]
    for name, row in rows.items():
        labels = ", ".join(f"{label} {count}" for label, count in row["labels"].items()) or "none"
        box = "" if row["box"] is None else row["box"]
        lines.append(f"| {name} | {row['phantoms']} | {labels} | {row['sure']} | {row['flagged']} | {box} |")
    return "\n".join(lines)


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0], epilog=RESEARCH_USE)
    parser.add_argument("bundle", nargs="?", metavar="BUNDLE", help="default: the bundle that comes with magsd")
    parser.add_argument("--count", type=int, default=20, metavar="N", help="phantoms of each kind (default: 20)")
    parser.add_argument("--seed", type=int, default=7)
    parser.add_argument("--threads", type=int, default=1, metavar="N")
    parser.add_argument("--json", type=Path, metavar="FILE")
    return parser.parse_args(argv)


if __name__ == "__main__":
    sys.exit(main())

"""Export parity: MA-Net on three backbones as ONNX against PyTorch, with file sizes and export times.

    python benchmarks/export_parity.py [--weights auto|imagenet|none] [--data M.csv] [--images 32] [--json FILE]

Every network goes through the exporter, the comparison and the tolerances of `magsd export`, on the
backend that `magsd infer` uses. Its head is random. With random weights the batch norms get statistics
from noise first: without, activations would grow from layer to layer as they do in no trained network.
`--weights auto` takes ImageNet weights where they are at hand and says which were used.
"""

from __future__ import annotations

import argparse
import platform
import sys
import tempfile
import time
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from magsd.data import read_manifest
from magsd.models import MANet, load_imagenet_weights
from magsd_export.to_onnx import export_onnx, model_metadata
from magsd_export.verification import ParityReport, compare, torch_network
from magsd_runtime.backends import open_backend
from magsd_runtime.bundle import MODEL_NAME, Bundle
from magsd_runtime.calibration_record import Calibration
from magsd_runtime.errors import ImageError, UsageError
from magsd_runtime.files import sha256_file, write_json
from magsd_runtime.images import read_radiograph
from magsd_runtime.preprocessing import PreprocessingSpec, preprocess

BACKBONES = ("resnet50", "resnet18", "tf_efficientnet_lite0")
CLASSES = ("covid-19", "normal", "pneumonia")


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--backbones", nargs="+", default=list(BACKBONES))
    parser.add_argument("--weights", choices=("auto", "imagenet", "none"), default="auto")
    parser.add_argument("--data", type=Path, metavar="M.csv", help="radiographs to compare on as well")
    parser.add_argument("--images", type=int, default=32, help="at most so many of them")
    parser.add_argument("--size", type=int, default=224)
    parser.add_argument("--json", type=Path, metavar="FILE")
    options = parser.parse_args()

    spec = PreprocessingSpec(size=options.size)
    real = list(radiographs(options.data, options.images, spec)) if options.data else []
    rows = []
    for backbone in options.backbones:
        row, report = measure(backbone, options.weights, spec, real)
        rows.append(row)
        print(
            f"\n{backbone}: {row['weights']}; model.onnx {row['megabytes']:.1f} MB, exported in "
            f"{row['export_seconds']:.1f} s\n{report.format()}\n{'passed' if report.passed else 'FAILED'}"
        )
    result = {
        "benchmark": "export_parity",
        "machine": {"cpu": platform.processor() or platform.machine(), "threads": torch.get_num_threads()},
        "versions": {name: version(name) for name in ("torch", "timm", "onnx", "onnxscript", "onnxruntime")},
        "networks": rows,
    }
    if options.json:
        write_json(options.json, result)
    return 0 if all(row["parity"]["passed"] for row in rows) else 5


def measure(
    backbone: str, weights: str, spec: PreprocessingSpec, real: list[tuple[str, NDArray[np.float32]]]
) -> tuple[dict[str, Any], ParityReport]:
    """Export one network and compare it."""
    torch.manual_seed(0)
    model = MANet(backbone, num_classes=len(CLASSES))
    loaded = _load(model, weights)
    if loaded == "random weights":
        _settle(model, spec.size)
    model.eval()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / MODEL_NAME
        started = time.perf_counter()
        export_onnx(model, spec, path, model_metadata(CLASSES, spec, name=backbone, version="benchmark"))
        seconds = time.perf_counter() - started
        digest = sha256_file(path)
        bundle = Bundle(
            Path(folder), {}, backbone, "benchmark", CLASSES, spec, Calibration(),
            {"map": "attention", "threshold": 0.5}, digest,
        )  # fmt: skip
        with open_backend(bundle, "cpu") as backend:
            report = compare(torch_network(model), backend.run, size=spec.size, real=real)
        row = {
            "backbone": backbone,
            "weights": loaded,
            "megabytes": path.stat().st_size / 1e6,
            "export_seconds": seconds,
            "parity": report.to_dict(),
        }
    return row, report


def _load(model: MANet, weights: str) -> str:
    try:
        return load_imagenet_weights(model, "none" if weights == "none" else "imagenet")
    except UsageError as error:
        if weights == "imagenet":
            raise
        print(f"{model.backbone_name}: random weights, since {error}", file=sys.stderr)
        return "random weights"


@torch.no_grad()
def _settle(model: MANet, size: int) -> None:
    """Batch-norm statistics from eight batches of noise, as a short training would leave them."""
    model.train()
    for _ in range(8):
        model(torch.randn(4, 1, size, size))


def radiographs(manifest: Path, limit: int, spec: PreprocessingSpec) -> Iterator[tuple[str, NDArray[np.float32]]]:
    """At most ``limit`` network inputs from the manifest, spread evenly over its records."""
    records = read_manifest(manifest, lenient=True).records
    chosen = sorted({int(index) for index in np.linspace(0, len(records) - 1, min(limit, len(records)))})
    for number, index in enumerate(chosen, start=1):
        try:
            pixels = read_radiograph(records[index].path).pixels
        except ImageError as error:
            print(error, file=sys.stderr)
            continue
        yield f"radiograph {number}", preprocess(pixels, spec)


if __name__ == "__main__":
    sys.exit(main())

"""LungNet becomes the ONNX file that OpenCV runs at the beginning of the preprocessing."""

from __future__ import annotations

import contextlib
import io
import logging
import warnings
from collections.abc import Callable
from pathlib import Path

import cv2
import numpy as np
import torch

from magsd.lung_training import LungScores, read_lung_films, train_lungs
from magsd.models.lung_net import LungNet
from magsd_runtime.errors import UsageError, VerificationError
from magsd_runtime.files import replacing, sha256_file
from magsd_runtime.lungs import LUNG_SIZE

TOLERANCE = 1e-3
"""Largest difference of the logits between OpenCV and PyTorch; Winograd convolutions of OpenCV 4 reach 1e-4."""


def build_lungs(
    data: Path,
    out: Path,
    *,
    patients: Path | None = None,
    epochs: int = 200,
    seed: int = 0,
    force: bool = False,
    report: Callable[[str], None] = lambda line: None,
) -> tuple[LungScores, str]:
    """Train on ``data``, write the network to ``out``; its scores on held-out patients, and its SHA-256.

    Raises
    ------
    UsageError
        If ``out`` exists and ``force`` is not given.
    DataError
        If the films cannot be read or are too few.
    VerificationError
        If OpenCV does not compute what PyTorch does; nothing is written then.
    """
    if out.exists() and not force:
        raise UsageError(f"{out} exists: choose another --out, or add --force")
    if epochs < 1:
        raise UsageError(f"--epochs is {epochs}: expected 1 or more")
    model, scores = train_lungs(read_lung_films(data, patients), epochs=epochs, seed=seed, report=report)
    export_lungs(model, out)
    return scores, sha256_file(out)


def export_lungs(model: LungNet, path: Path) -> None:
    """Write LungNet as ONNX, opset 13, after OpenCV has been compared with PyTorch. Raises as ``build_lungs``."""
    model = model.eval().to(memory_format=torch.contiguous_format)  # pyright: ignore[reportCallIssue]
    example = torch.from_numpy(np.random.default_rng(0).standard_normal((1, 1, LUNG_SIZE, LUNG_SIZE), np.float32))
    with replacing(path) as temporary:
        _silent_export(model, example, temporary)
        network = cv2.dnn.readNetFromONNX(str(temporary))
        network.setInput(example.numpy())
        with torch.inference_mode():
            difference = float(np.abs(network.forward() - model(example).numpy()).max())
        if not difference <= TOLERANCE:
            raise VerificationError(
                f"OpenCV {cv2.__version__} differs from PyTorch by {difference:.2g} on the lung network "
                f"(at most {TOLERANCE:g}): use another version of OpenCV"
            )


def _silent_export(model: LungNet, example: torch.Tensor, path: Path) -> None:
    # The tracing exporter writes the plainest graph, which OpenCV 4.9 reads as well. It is deprecated, not gone.
    level = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            torch.onnx.export(
                model, (example,), str(path), opset_version=13, dynamo=False, input_names=["image"],
                output_names=["lungs"],
            )  # fmt: skip
    finally:
        logging.disable(level)

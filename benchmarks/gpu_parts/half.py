"""Networks as PyTorch runs them beside an engine: the same trunk in float16, the same head in float32."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from magsd.checkpoint import load_model
from magsd.data import read_manifest
from magsd.models.classifiers import ImageNetClassifier
from magsd.models.ma_net import MANet
from magsd_export.sources import find_checkpoint
from magsd_export.verification import compare, torch_network
from magsd_runtime.bundle import load_bundle
from magsd_runtime.images import read_radiograph
from magsd_runtime.parity import FP16_TOLERANCES, TOLERANCES
from magsd_runtime.preprocessing import preprocess

from .context import Context

Call = Callable[[NDArray[np.float32]], object]


class HalfPlain(nn.Module):
    """``plain`` with its trunk in half precision; the four outputs that an engine of ours has."""

    def __init__(self, plain: ImageNetClassifier) -> None:
        super().__init__()
        self.plain = copy.deepcopy(plain)
        self.plain.backbone.half()

    def forward(self, image: Tensor) -> tuple[Tensor, ...]:
        features = self.plain.backbone.forward_features(image.half())
        embedding = self.plain.backbone.forward_head(features, pre_logits=True).flatten(1).float()
        logits = self.plain.classifier(embedding)
        attention = features.float().mean(dim=1, keepdim=True).relu()
        return logits, attention, logits.unsqueeze(-1), embedding


class _HalfTrunk(nn.Module):
    def __init__(self, trunk: nn.Module) -> None:
        super().__init__()
        self.trunk = trunk

    def forward(self, image: Tensor) -> list[Tensor]:
        return [features.float() for features in self.trunk(image.half())]


def half_trunk(model: MANet) -> MANet:
    """A copy whose backbone computes in float16, all after it in float32: what ``model.fp16.onnx`` says."""
    half = copy.deepcopy(model)
    half.backbone = _HalfTrunk(half.backbone.half())
    return half


def trained(context: Context, folder: Path) -> MANet:
    """The network that ``folder``'s bundle was exported from, on the CPU, in evaluation mode."""
    model, _ = load_model(find_checkpoint(context.run or folder / "run").checkpoint)
    if not isinstance(model, MANet):
        raise TypeError(f"the run holds a {type(model).__name__}: expected a MANet")
    return model.eval()


def films(context: Context, bundle: Path, most: int) -> list[tuple[str, NDArray[np.float32]]]:
    """The first ``most`` of the films as the bundle's network gets them, float32 (1, S, S); a bundle without lungs."""
    spec = load_bundle(bundle).preprocessing
    records = read_manifest(context.data, lenient=True).records[:most]
    return [(record.path.name, preprocess(read_radiograph(record.path).pixels, spec)) for record in records]


def on_device(context: Context, folder: Path) -> dict[str, Any]:
    """The trunk in float16 on this device, and all in float32, against float32 on the CPU: films and hostile inputs.

    TF32 is off for the float32 side: it is not the precision that was verified.
    """
    model = trained(context, folder)
    reference, real = torch_network(model), films(context, folder / "bundle", 8 if context.dry else 64)
    found: dict[str, Any] = {}
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False
    for name, network, tolerances in (
        ("float32", copy.deepcopy(model), TOLERANCES), ("float16 trunk", half_trunk(model), FP16_TOLERANCES),
    ):  # fmt: skip
        moved = torch_network(network.to(context.device).eval())
        report = compare(reference, moved, size=load_bundle(folder / "bundle").preprocessing.size, real=real,
                         tolerances=tolerances)  # fmt: skip
        found[name] = {
            "passed": report.passed, "films": report.real_images, "hostile": len(report.hostile),
            "flips": list(report.flips), "ties": list(report.ties),
            "probability": report.probability[0], "attention_correlation": report.correlation[0],
            "worst_of_tolerance": {name: round(value.share, 4) for name, value in report.differences.items()},
        }  # fmt: skip
    return found


def on_torch(context: Context, model: Any) -> Call:
    """A network on the device as a function of host arrays, pinned on both ways like an engine's."""
    pinned: dict[tuple[int, ...], Tensor] = {}

    def call(images: NDArray[np.float32]) -> list[Tensor]:
        if images.shape not in pinned:
            pinned[images.shape] = torch.empty(images.shape, pin_memory=context.cuda)
        held = pinned[images.shape]
        held.copy_(torch.from_numpy(images))
        with torch.inference_mode():
            given = held.to(context.device, non_blocking=True).contiguous(memory_format=torch.channels_last)
            return [output.float().to("cpu", non_blocking=False) for output in model(given)]

    return call

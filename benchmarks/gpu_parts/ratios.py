"""Part 2: the engine against PyTorch, ONNX Runtime and what the device allows; what the attention head costs."""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from magsd.checkpoint import load_model
from magsd.models.classifiers import ImageNetClassifier
from magsd_export.sources import find_checkpoint
from magsd_export.to_onnx import OPSET, export_onnx
from magsd_runtime.backends import open_backend
from magsd_runtime.backends.tensorrt_engine import TensorRTBackend, open_engine
from magsd_runtime.bundle import INPUT_NAME, OUTPUT_NAMES, load_bundle
from magsd_runtime.engines.building import Profile, build_plan
from magsd_runtime.engines.library import find_library
from magsd_runtime.engines.passport import FOLDER, read_passports
from magsd_runtime.errors import MagsdError

from .context import NOT_MEASURED, Context, milliseconds
from .engine import bundle_of

Call = Callable[[NDArray[np.float32]], object]
MULTIPLY_ADDS = {"resnet50": 4.11e9}
"""Of one image of 224 pixels (torchvision's table of models); MA-Net's are in docs/models.md."""


class HalfPlain(nn.Module):
    """A plain classifier whose trunk is in half precision, with the four outputs that an engine of ours has."""

    def __init__(self, backbone: str) -> None:
        super().__init__()
        self.plain = ImageNetClassifier(backbone, num_classes=3)
        self.plain.backbone.half()

    def forward(self, image: Tensor) -> tuple[Tensor, ...]:
        features = self.plain.backbone.forward_features(image.half())
        embedding = self.plain.backbone.forward_head(features, pre_logits=True).flatten(1).float()
        logits = self.plain.classifier(embedding)
        attention = features.float().mean(dim=1, keepdim=True).relu()
        return logits, attention, logits.unsqueeze(-1), embedding


def ratios(context: Context) -> dict[str, Any]:
    """Milliseconds of a call from host memory to host memory, in turns; ratios to the FP16 engine."""
    backbone = context.backbones()[0]
    folder = bundle_of(context, backbone)
    bundle = load_bundle(folder)
    found: dict[str, Any] = {"left_out": {}}
    calls: dict[str, Call] = {}
    opened: list[Any] = []

    def add(name: str, make: Callable[[], Call]) -> None:
        try:
            calls[name] = make()
            calls[name](np.zeros((1, 1, context.size, context.size), np.float32))
        except Exception as error:  # the others are worth their figures all the same
            calls.pop(name, None)
            found["left_out"][name] = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"

    def of_bundle(precision: str) -> Call:
        passports = [one for one in read_passports(folder / FOLDER)[0] if one.precision == precision]
        if not passports:
            raise MagsdError("part 1 built no such engine")
        opened.append(open_engine(bundle, passports[0]))
        return opened[-1].run

    def plain_engine(precision: str) -> Call:
        opened.append(plain(context, backbone, precision, folder.parent))
        return opened[-1].run

    def onnx_runtime_cuda() -> Call:
        opened.append(open_backend(bundle, "cuda"))
        return opened[-1].run

    model, _ = load_model(find_checkpoint(folder.parent / "run").checkpoint, context.device)
    model.eval()
    for precision in ("fp16", "fp32"):
        add(f"MA-Net, engine {precision}", lambda precision=precision: of_bundle(precision))
        add(f"plain {backbone}, engine {precision}", lambda precision=precision: plain_engine(precision))
    add("MA-Net, eager fp32", lambda: on_torch(context, model, half=False))
    add("MA-Net, eager fp16", lambda: on_torch(context, model, half=True))
    add("MA-Net, torch.compile fp16", lambda: on_torch(context, torch.compile(model), half=True))
    add("MA-Net, ONNX Runtime CUDA", onnx_runtime_cuda)
    try:
        for batch in (1, 32):
            images = np.zeros((batch if not context.dry else 2, 1, context.size, context.size), np.float32)
            found[f"batch {batch}"] = milliseconds(
                context, {name: partial(call, images) for name, call in calls.items()}
            )
    finally:
        for one in opened:
            one.close()
    found["device"] = floors(context, folder / "model.fp16.onnx")
    return found


def on_torch(context: Context, model: Any, *, half: bool) -> Call:
    """A model of ours as a function of host arrays; ``half``: autocast to float16 but for the head, as in training."""
    enabled = half and not context.dry

    def call(images: NDArray[np.float32]) -> list[Tensor]:
        with torch.inference_mode(), torch.autocast(context.device.type, torch.float16, enabled=enabled):
            outputs = model(torch.from_numpy(images).to(context.device, non_blocking=True))
        return [output.float().cpu() for output in outputs]

    return call


def plain(context: Context, backbone: str, precision: str, folder: Path) -> TensorRTBackend:
    """An engine of the plain classifier, random weights: what there would be without attention."""
    path = folder / f"plain.{precision}.onnx"
    spec = load_bundle(folder / "bundle").preprocessing
    if precision == "fp16":
        _export_half(HalfPlain(backbone).eval(), spec.size, path)
    else:
        export_onnx(ImageNetClassifier(backbone, num_classes=3), spec, path, {"magsd.model": "random weights"})
    library = find_library(context.library, gpu=not context.dry)
    profile = Profile(1, 8, 32)
    plan = build_plan(
        library, path, precision=precision, profile=profile, size=spec.size,
        compute_capability="8.6" if context.dry else None,
    )  # fmt: skip
    if context.dry:
        raise MagsdError(f"built ({len(plan.content) / 1e6:.1f} MB), {NOT_MEASURED}: there is no GPU")
    return TensorRTBackend(plan.content, library, precision=precision, size=spec.size, profile=profile)


def _export_half(model: nn.Module, size: int, path: Path) -> None:
    """``export_onnx`` refuses a network that is not float32 throughout."""
    program = torch.onnx.export(
        model, (torch.zeros(2, 1, size, size),), dynamo=True, opset_version=OPSET, optimize=True, verbose=False,
        dynamic_shapes=({0: torch.export.Dim("batch", min=1, max=1024)},), input_names=[INPUT_NAME],
        output_names=list(OUTPUT_NAMES), external_data=False,
    )  # fmt: skip
    if program is None:
        raise MagsdError("the exporter of this torch gave no program")
    path.write_bytes(program.model_proto.SerializeToString())


def floors(context: Context, onnx_file: Path) -> dict[str, Any]:
    """The device's measured rates, and the least time that they allow for a plain ResNet50's sums and weights."""
    if context.dry:
        return {"result": NOT_MEASURED}
    rates: dict[str, Any] = {}
    for name, kind in (("fp16", torch.float16), ("fp32", torch.float32)):
        a, b = (torch.randn(8192, 8192, device=context.device, dtype=kind) for _ in range(2))
        rates[f"{name}_tflops"] = round(2 * 8192**3 / _seconds(lambda a=a, b=b: a @ b) / 1e12, 1)
    source = torch.empty(1 << 28, dtype=torch.float32, device=context.device)
    target = torch.empty_like(source)
    rates["copy_gb_per_s"] = round(2 * 4 * (1 << 28) / _seconds(lambda: target.copy_(source)) / 1e9, 1)
    sums = 2 * MULTIPLY_ADDS["resnet50"]
    rates["resnet50_fp16_floor_ms"] = {
        "sums, an image": round(1e3 * sums / (rates["fp16_tflops"] * 1e12), 4),
        "weights, a call": round(1e3 * onnx_file.stat().st_size / (rates["copy_gb_per_s"] * 1e9 / 2), 4),
    }
    return rates


def _seconds(call: Callable[[], object], repeats: int = 20) -> float:
    for _ in range(3):
        call()
    torch.cuda.synchronize()
    started = time.perf_counter()
    for _ in range(repeats):
        call()
    torch.cuda.synchronize()
    return (time.perf_counter() - started) / repeats

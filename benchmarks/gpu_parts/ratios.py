"""Part 2: the engine against PyTorch, ONNX Runtime and what the device allows; what the attention head costs."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from magsd.models.classifiers import ImageNetClassifier
from magsd_export.to_onnx import OPSET, export_onnx
from magsd_runtime.backends import open_backend
from magsd_runtime.backends.tensorrt_engine import TensorRTBackend, open_engine
from magsd_runtime.bundle import INPUT_NAME, OUTPUT_NAMES, load_bundle
from magsd_runtime.engines.building import Profile, build_plan
from magsd_runtime.engines.library import find_library
from magsd_runtime.errors import MagsdError

from .context import NOT_MEASURED, Context, in_a_line, milliseconds
from .engine import bundle_of, folder_of, noise, passport_of, prepare
from .floors import floors, rates
from .half import Call, HalfPlain, half_trunk, on_torch, trained

BATCHES = (1, 8, 32)
BASELINE = "MA-Net, eager fp32"
PAIRS = {
    f"MA-Net over plain, {how}": (f"MA-Net, {how}", f"plain, {how}")
    for how in ("engine fp16", "engine fp32", "eager fp16", "eager fp32")
}
"""What the attention head costs: the same precision and the same way of running it, in the same rounds."""


def ratios(context: Context) -> None:
    """Milliseconds of a call from host memory to host memory, in turns; ratios to eager PyTorch in float32.

    torch.compile takes minutes on some machines, so it comes last, in rounds of its own beside what it is held against.
    """
    name, found = context.backbone, context.found
    if not prepare(context, name):
        return
    opened: list[Any] = []
    try:
        made = _calls(context, name, opened)
        for tf32 in (False, True):
            torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = tf32
            calls = made if not tf32 else {key: made[key] for key in made if "eager fp32" in key}
            title = "eager fp32 with TF32" if tf32 else "in turns"
            context.attempt(found, title, partial(_measure, context, calls))
        torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False
        context.attempt(found, "rates", partial(rates, context))
        context.attempt(found, "floors", partial(floors, context, folder_of(context, name), BATCHES))
        half = half_trunk(trained(context, folder_of(context, name))).to(context.device)
        compiled = {
            "MA-Net, torch.compile fp16": torch.compile(half, dynamic=False),
            "MA-Net, torch.compile fp16, reduce-overhead": torch.compile(half, dynamic=False, mode="reduce-overhead"),
        }
        beside = {key: made[key] for key in (BASELINE, "MA-Net, engine fp16") if key in made}
        for key, network in compiled.items():
            calls = {**beside, key: on_torch(context, network)}
            context.attempt(found, key, partial(_measure, context, calls))
    finally:
        for one in opened:
            one.close()


def _calls(context: Context, name: str, opened: list[Any]) -> dict[str, Call]:
    """Each way to run a network that is here; why another is not goes to ``found``."""
    folder, bundle = folder_of(context, name), load_bundle(bundle_of(context, name))
    calls: dict[str, Call] = {}
    missing = context.found.setdefault("left_out", {})

    def add(what: str, make: Callable[[], Call]) -> None:
        try:
            call = make()
            call(noise(1, bundle))
            calls[what] = call
        except Exception as error:  # the others are worth their figures all the same
            missing[what] = in_a_line(error)
        context.save()

    def keep(backend: Any) -> Call:
        opened.append(backend)
        return backend.run

    model = trained(context, folder)
    alone = ImageNetClassifier(model.backbone_name, num_classes=3).eval()
    add(BASELINE, lambda: on_torch(context, _ready(context, model)))
    add("plain, eager fp32", lambda: on_torch(context, _ready(context, alone)))
    add("MA-Net, eager fp16", lambda: on_torch(context, _ready(context, half_trunk(model))))
    add("plain, eager fp16", lambda: on_torch(context, _ready(context, HalfPlain(alone))))
    for precision in ("fp16", "fp32"):
        add(f"MA-Net, engine {precision}",
            lambda precision=precision: keep(open_engine(bundle, passport_of(bundle, precision))))  # fmt: skip
        add(f"plain, engine {precision}", lambda precision=precision: keep(plain(context, alone, precision, folder)))
    if context.dry:
        missing["MA-Net, ONNX Runtime CUDA"] = NOT_MEASURED
    else:
        add("MA-Net, ONNX Runtime CUDA", lambda: keep(open_backend(bundle, "cuda")))
    return calls


def _ready(context: Context, network: nn.Module) -> nn.Module:
    return network.eval().to(context.device, memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]


def _measure(context: Context, calls: dict[str, Call]) -> dict[str, Any]:
    pairs = {name: pair for name, pair in PAIRS.items() if set(pair) <= set(calls)}
    found = {}
    for batch in BATCHES if not context.dry else (2,):
        images: NDArray[np.float32] = np.random.default_rng(batch).standard_normal(
            (batch, 1, context.size, context.size), np.float32
        )
        found[f"batch {batch}"] = milliseconds(
            context, {name: partial(call, images) for name, call in calls.items()}, seconds=0.5, pairs=pairs
        )
    return found


def plain(context: Context, network: ImageNetClassifier, precision: str, folder: Path) -> TensorRTBackend:
    """An engine of the plain classifier, random weights: what there would be without attention."""
    path = folder / f"plain.{precision}.onnx"
    spec = load_bundle(folder / "bundle").preprocessing
    if precision == "fp16":
        _export_half(HalfPlain(network).eval(), spec.size, path)
    else:
        export_onnx(network, spec, path, {"magsd.model": "random weights"})
    library = find_library(context.library, gpu=not context.dry)
    profile = Profile(1, 8, 32)
    plan = build_plan(
        library, path, precision=precision, profile=profile, size=spec.size,
        compute_capability="8.6" if context.dry else None,
    )  # fmt: skip
    if context.dry:
        raise MagsdError(f"built ({len(plan.content) / 1e6:.1f} MB), {NOT_MEASURED}")
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

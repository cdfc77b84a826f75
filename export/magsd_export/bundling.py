"""A checkpoint becomes a bundle: exported, compared with PyTorch, proven by the runtime, then given its name.

Everything is written to a temporary folder beside the target. What fails leaves nothing behind, and
what is there was verified by the same code that a device runs.
"""

from __future__ import annotations

import os
import platform
import re
import subprocess
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from datetime import datetime, timezone
from importlib import metadata
from pathlib import Path
from typing import Any

from torch import nn

from magsd.checkpoint import CheckpointInfo, load_model
from magsd.config import MA_NETS, unfinished
from magsd_runtime._version import __version__
from magsd_runtime.backends import open_backend
from magsd_runtime.bundle import (
    BUNDLE_SCHEMA,
    INPUT_NAME,
    LUNGS_NAME,
    MANIFEST_NAME,
    MODEL_NAME,
    MODEL_NAMES,
    OUTPUT_NAMES,
    Bundle,
    load_bundle,
)
from magsd_runtime.bundle_writing import check_out, list_files, publishing
from magsd_runtime.calibrating import SENSITIVITIES
from magsd_runtime.calibration_record import Calibration
from magsd_runtime.errors import CheckpointError, DataError, UsageError, VerificationError
from magsd_runtime.files import replacing, sha256_file, write_json, write_text
from magsd_runtime.lungs import network_bytes
from magsd_runtime.prediction_sets import COVERAGE
from magsd_runtime.verification import VerificationReport, verify_bundle

from .acceptance_statistics import acceptance_of_run
from .golden import write_golden
from .held_out import held_out_calibration
from .model_card import INTENDED_USE, LICENCE, model_card
from .precision import HalfParity, compare_half, write_half
from .sources import Source, evaluation_facts, find_checkpoint, localization, read_evaluation, real_images
from .to_onnx import export_onnx, model_metadata
from .verification import Network, ParityReport, compare, torch_network

DEFAULT_IMAGES = 64
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._+-]{0,63}")
_PACKAGES = ("torch", "timm", "onnx", "onnxscript", "onnxruntime", "numpy")


@dataclass(frozen=True)
class Built:
    """A finished bundle: what it was made of, and what was found on the way."""

    bundle: Bundle
    source: Source
    info: CheckpointInfo
    parity: ParityReport
    verification: VerificationReport
    acceptance: str
    notes: tuple[str, ...] = ()
    half: HalfParity | None = None


def build_bundle(
    checkpoint: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    fold: int | None = None,
    name: str | None = None,
    version: str = "1",
    data: str | os.PathLike[str] | None = None,
    images: int = DEFAULT_IMAGES,
    evaluation: str | os.PathLike[str] | None = None,
    calibration: str | os.PathLike[str] | None = None,
    positive: str | None = None,
    sensitivities: Sequence[float] = SENSITIVITIES,
    coverage: float = COVERAGE,
    acceptance: bool = True,
    precision: str = "fp32",
    force: bool = False,
    verbose: bool = False,
    report: Callable[[str], None] = lambda line: None,
) -> Built:
    """Export ``checkpoint`` (a file, or a run folder with ``fold``) to the new bundle ``out``.

    ``name``: by default the model's and its backbone's. ``data``: a manifest whose images parity is judged
    on, at most ``images`` of them; by default the run's own test and validation parts. ``evaluation``: a
    folder of ``magsd evaluate``, whose results and localization threshold the bundle takes over; on its held-out
    predictions the temperature is fitted, and operating points for class ``positive`` are chosen, or on those of
    ``calibration``, the evaluation of a cross-validation of the same recipe (:mod:`magsd_export.held_out`).
    ``acceptance``: whether statistics of the run's own films, where they can be read, go into the bundle
    (:mod:`magsd_export.acceptance_statistics`). ``precision``: with ``fp16``, a second network whose trunk is in
    half precision goes into the bundle (:mod:`magsd_export.precision`). ``force`` replaces a bundle that is at
    ``out``, and nothing else.

    Raises
    ------
    UsageError, DataError
        If an argument cannot be used, or ``out`` exists.
    CheckpointError
        If the checkpoint is damaged.
    VerificationError
        If the exported network differs from PyTorch, or the runtime's own check fails. There is no bundle then.
    MagsdError
        If the network cannot be exported.
    """
    out = Path(out)
    _check_names(name, version, images)
    check_out(out, force)
    source = find_checkpoint(Path(checkpoint), fold)
    model, info = load_model(source.checkpoint)
    if precision != "fp32" and not _has_attention(info):
        raise UsageError(
            f"--precision {precision} needs a network with attention, where its float32 part begins, and "
            f"{info.config.model} has none: leave --precision out"
        )
    if at := unfinished(source.checkpoint.parent, info.config.epochs):
        # console, bundle and model card all give the reason
        source = replace(source, reason=f"{source.reason}; its training is not finished: {at}")
    report(f"checkpoint  {source.checkpoint} ({source.reason})")
    metrics = None if evaluation is None else read_evaluation(Path(evaluation), info, source)
    calibrated, notes = held_out_calibration(
        info,
        source,
        evaluation=None if evaluation is None else Path(evaluation),
        calibration=None if calibration is None else Path(calibration),
        positive=positive,
        sensitivities=sensitivities,
        coverage=coverage,
    )
    real = real_images(source, info, None if data is None else Path(data), images)
    name = name or f"{info.config.model}-{info.config.backbone}"
    _check_names(name, version, images)

    with publishing(out, force) as folder:
        described = model_metadata(info.classes, info.preprocessing, name=name, version=version)
        report("exporting   ONNX, opset 18, float32")
        export_onnx(model, info.preprocessing, folder / MODEL_NAME, described, verbose=verbose)
        _copy_lungs(info, folder)
        draft = _draft(folder, info, name, version, localization(source, info, metrics), calibrated)
        with open_backend(draft, "cpu") as backend:
            report(f"comparing   with PyTorch, {len(real.records)} radiographs and synthetic inputs")
            parity = compare(torch_network(model), backend.run, size=info.preprocessing.size, real=real)
            if data is not None and not parity.real_images:
                raise DataError(f"--data {data}: none of its {len(real.records)} images could be read")
            parity = replace(parity, facts={**real.facts, "skipped": real.skipped})
            parity.raise_if_failed()
            outputs = write_golden(folder / "golden", draft, backend)
            statistics, said = None, "none: left out"
            half = None
            if precision == "fp16":
                report("halving     the trunk's precision, and comparing with float32")
                half = add_half(folder, backend.run, info.preprocessing.size, real, parity.facts)
            if acceptance:
                statistics, said = acceptance_of_run(source, info, backend.run, draft.model_sha256, report)
        shapes = {key: list(outputs[key].shape) for key in OUTPUT_NAMES}
        facts = _describe(draft, info, source, _architecture(model, info), parity, shapes)
        facts["training"]["evaluation"] = None if metrics is None else evaluation_facts(metrics, info)
        if half is not None:
            facts["precisions"] = {"fp16": describe_half(folder, draft.model_sha256, half)}
        if statistics is not None:
            statistics.save(folder)
            facts["acceptance"] = statistics.to_dict()
        write_text(folder / "MODEL_CARD.md", model_card(facts))
        write_json(folder / MANIFEST_NAME, {**facts, "files": list_files(folder)})
        report("verifying   the bundle with the runtime")
        verification = prove(folder)
    return Built(load_bundle(out), source, info, parity, verification, said, tuple(notes), half)


def add_half(folder: Path, reference: Network, size: int, real: Any, facts: dict[str, Any]) -> HalfParity:
    """Write ``model.fp16.onnx`` beside the ``model.onnx`` in ``folder``, proven against ``reference``, the latter.

    Raises
    ------
    VerificationError
        If their outputs differ by more than half precision may.
    MagsdError
        If the network cannot be put in half precision.
    """
    written = write_half(folder / MODEL_NAME, folder / MODEL_NAMES["fp16"])
    half = compare_half(reference, written, size=size, real=real, facts=facts)
    half.report.raise_if_failed()
    return half


def describe_half(folder: Path, model_sha256: str, half: HalfParity) -> dict[str, Any]:
    """The entry of ``precisions`` in ``bundle.json``."""
    name = MODEL_NAMES["fp16"]
    return {
        "file": name,
        "sha256": sha256_file(folder / name),
        "model_sha256": model_sha256,
        "float32": "inputs, outputs, and all after the last feature map",
        "verification": half.to_dict(),
    }


def _copy_lungs(info: CheckpointInfo, folder: Path) -> None:
    """The network that crops, where the preprocessing has one."""
    wanted = info.preprocessing.lungs_sha256
    if not wanted:
        return
    if info.config.preprocessing() != info.preprocessing:  # also makes a network of the run's own known
        raise CheckpointError("the run's lung network is another one than that of its training: train again")
    with replacing(folder / LUNGS_NAME) as temporary:
        temporary.write_bytes(network_bytes(wanted))


def prove(folder: Path) -> VerificationReport:
    """The runtime's own check of a bundle that is about to be published; a failure is an exception."""
    bundle = load_bundle(folder)
    with open_backend(bundle, "cpu") as backend:
        report = verify_bundle(bundle, backend)
    if not report.passed:
        failed = ", ".join(check.name for check in report.checks if not check.passed)
        raise VerificationError(f"the new bundle fails its own golden inputs ({failed}): nothing was written")
    return report


def _draft(
    folder: Path, info: CheckpointInfo, name: str, version: str, where: dict[str, Any], calibration: Calibration
) -> Bundle:
    """The bundle as far as a backend needs it, before there is a bundle.json; binds the calibration to the model."""
    model_sha256 = sha256_file(folder / MODEL_NAME)
    return Bundle(
        path=folder,
        manifest={},
        name=name,
        version=version,
        classes=info.classes,
        preprocessing=info.preprocessing,
        calibration=replace(calibration, model_sha256=model_sha256),
        localization=where,
        model_sha256=model_sha256,
    )


def _describe(
    draft: Bundle,
    info: CheckpointInfo,
    source: Source,
    architecture: dict[str, Any],
    parity: ParityReport,
    shapes: dict[str, list[int]],
) -> dict[str, Any]:
    """``bundle.json`` but for ``files``; its fields are described in docs/bundle.md."""
    size = draft.preprocessing.size
    return {
        "schema": BUNDLE_SCHEMA,
        "magsd_version": __version__,
        "created": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "model": {
            "name": draft.name,
            "version": draft.version,
            "architecture": architecture,
            "sha256": draft.model_sha256,
        },
        "classes": list(draft.classes),
        "preprocessing": draft.preprocessing.to_dict(),
        "preprocessing_sha256": draft.preprocessing.sha256(),
        "inputs": [{"name": INPUT_NAME, "dtype": "float32", "shape": ["N", 1, size, size]}],
        "outputs": [{"name": key, "dtype": "float32", "shape": ["N", *shapes[key]]} for key in OUTPUT_NAMES],
        "calibration": draft.calibration.to_dict(),
        "localization": draft.localization,
        "training": {
            "data": info.data,
            "fold": info.fold,
            "chosen": source.reason,
            "epoch": info.epoch,
            "validation": info.validation,
            "settings": _settings(info),
        },
        "intended_use": INTENDED_USE,
        "licence": LICENCE,
        "versions": _versions(),
        "git_commit": git_commit(),
        "verification": parity.to_dict(),
    }


def _architecture(model: nn.Module, info: CheckpointInfo) -> dict[str, Any]:
    ma_net, attends = info.config.model in MA_NETS, _has_attention(info)
    return {
        "network": "MA-Net" if ma_net else info.config.model,
        "backbone": info.config.backbone,
        "attention_scales": info.config.attention_scales if attends else 0,
        "num_attention_maps": info.config.num_attention_maps if attends else 0,
        "pooling": info.config.pooling,
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
    }


def _has_attention(info: CheckpointInfo) -> bool:
    """Whether the network has attention maps, trained or not."""
    return info.config.model in MA_NETS or info.config.pooling == "attention"


def _settings(info: CheckpointInfo) -> dict[str, Any]:
    """The training configuration without the places of files on the machine that trained."""
    settings = {key: value for key, value in info.config.to_dict().items() if key not in ("data", "folds_file")}
    return {**settings, "weights": Path(info.config.weights).name}


def _versions() -> dict[str, str]:
    import cv2

    found = {"python": platform.python_version(), "opencv": cv2.__version__}
    for package in _PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:  # onnxruntime-gpu is the same library under another name
            module = __import__(package)
            found[package] = str(getattr(module, "__version__", "unknown"))
    return found


def git_commit() -> str | None:
    """The commit of the checkout that magsd runs from, ``-dirty`` if changed; None where it is installed."""
    root = Path(__file__).resolve().parents[2]
    if not (root / ".git").exists() or not (root / "pyproject.toml").is_file():
        return None

    def git(*arguments: str) -> str:
        return subprocess.run(
            ["git", "-C", str(root), *arguments],
            stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=20, check=True,
        ).stdout.strip()  # fmt: skip

    try:
        commit = git("rev-parse", "HEAD")
        return f"{commit}-dirty" if git("status", "--porcelain", "--untracked-files=no") else commit
    except (OSError, subprocess.SubprocessError):
        return None


def _check_names(name: str | None, version: str, images: int) -> None:
    for option, value in (("--name", name), ("--model-version", version)):
        if value is not None and not _NAME.fullmatch(value):
            raise UsageError(f"{option} is {value!r}: expected up to 64 letters, digits and . _ + -")
    if images < 0:
        raise UsageError(f"--images is {images}: expected 0 or more")

"""Part 1: from training to an engine that was compared on this GPU, by the commands that a user types."""

from __future__ import annotations

import dataclasses
import shutil
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from magsd_runtime.backends import CheckedBackend, tensorrt_engine
from magsd_runtime.backends.tensorrt_engine import open_engine
from magsd_runtime.bundle import Bundle, load_bundle
from magsd_runtime.engines.passport import FOLDER, Passport, read_passports
from magsd_runtime.errors import MagsdError

from .context import NOT_MEASURED, Context, command, milliseconds, record

BATCHES = (1, 8, 32)


def engine(context: Context) -> dict[str, Any]:
    """For each backbone: train, export, build, compare, refuse, time."""
    return {backbone: _of(context, backbone) for backbone in context.backbones()}


def bundle_of(context: Context, backbone: str) -> Path:
    """A bundle of ``backbone`` in float32 and float16, made once. Weights: one epoch from random ones."""
    folder = context.out / backbone
    bundle = folder / "bundle"
    if not (bundle / "bundle.json").is_file():
        shutil.rmtree(bundle, ignore_errors=True)
        command(
            "train", "--data", context.data, "--out", folder / "run", "--backbone", backbone, "--weights", "none",
            "--size", context.size, "--epochs", 1, "--folds", 3, "--fold", 0, "--batch-size", 8, "--select", "last",
            "--device", context.device.type, "--quiet", "--resume",
        )  # fmt: skip
        command("export", folder / "run", "--out", bundle, "--precision", "fp16", "--images", 8)
    return bundle


def _of(context: Context, backbone: str) -> dict[str, Any]:
    bundle = bundle_of(context, backbone)
    found: dict[str, Any] = {}
    for precision in ("fp16", "fp32"):
        arguments = ["engine", bundle, "--precision", precision, "--batch", "1:8:32", "--trt", context.library]
        if context.dry:
            arguments += ["--compute-capability", "8.6"]
        passport = record(*arguments)
        found[precision] = {
            key: passport[key] for key in ("library", "library_version", "plan_size", "build_seconds", "layers", "gpu")
        }
        found[precision]["parity"] = passport["parity"].get("worst_differences", passport["parity"]["status"])
    found["fp16_size_of_fp32"] = round(found["fp16"]["plan_size"] / found["fp32"]["plan_size"], 3)
    for sides in ("torch,fp32", "fp32,fp16", *(() if context.dry else ("torch,engine", "fp32,engine"))):
        run = ["--run", bundle.parent / "run"] if "torch" in sides else []
        report = record(
            "verify", bundle, "--compare", sides, "--data", context.data, "--limit", 8 if context.dry else 100, *run,
            expected=(0, 5),
        )  # fmt: skip
        films = report["films"]
        found[sides] = {
            "passed": report["passed"], "failures": report["failures"], "films": films["films"],
            "label_agreement": films["label_agreement"], "probability": films["probability_difference"]["worst"],
            "heat": films["heat_rank_correlation"]["mean"],
        }  # fmt: skip
    loaded = load_bundle(bundle)
    found["refusals"] = refusals(loaded)
    if context.dry:
        found["run"] = found["latency"] = NOT_MEASURED
    else:
        found["run"] = command("verify", bundle, "--backend", "tensorrt").splitlines()[-2]
        found["latency"] = latency(context, loaded)
    return found


def refusals(bundle: Bundle) -> dict[str, str]:
    """What is said of an engine of another GPU, with another driver, and with a damaged plan; none may be opened."""
    passports, _ = read_passports(bundle.path / FOLDER)
    original = passports[0]
    plan = bundle.path / FOLDER / original.plan
    changes: dict[str, Passport] = {
        "another GPU": dataclasses.replace(original, gpu="NVIDIA Another GPU", compute_capability="5.2"),
        "another driver": dataclasses.replace(original, driver="1.0"),
        "a damaged plan": dataclasses.replace(original, plan_sha256="0" * 64),
    }
    said = {}
    try:
        for what, passport in changes.items():
            passport.save(plan.parent)
            try:
                open_engine(bundle, passport).close()
            except MagsdError as error:
                said[what] = f"{type(error).__name__}: {error}"[:200]
            else:
                raise RuntimeError(f"an engine with {what} was opened")
    finally:
        original.save(plan.parent)
    return said


def latency(context: Context, bundle: Bundle) -> dict[str, Any]:
    """Milliseconds of a call from host memory to host memory, with and without CUDA graphs, by batch."""
    passports, _ = read_passports(bundle.path / FOLDER)
    rows: dict[str, Any] = {}
    for passport in passports:
        most = tensorrt_engine.MOST_GRAPHS
        backends = {"graph": CheckedBackend(open_engine(bundle, passport), bundle, "a benchmark")}
        try:
            tensorrt_engine.MOST_GRAPHS = 0
            backends["no graph"] = CheckedBackend(open_engine(bundle, passport), bundle, "a benchmark")
            for batch in BATCHES:
                images = np.zeros((batch, 1, bundle.preprocessing.size, bundle.preprocessing.size), np.float32)
                tensorrt_engine.MOST_GRAPHS = most
                backends["graph"].run(images)  # captured here
                tensorrt_engine.MOST_GRAPHS = 0
                rows[f"{passport.precision}, batch {batch}"] = milliseconds(
                    context, {name: partial(backend.run, images) for name, backend in backends.items()}, seconds=1.0
                )
        finally:
            tensorrt_engine.MOST_GRAPHS = most
            for backend in backends.values():
                backend.close()
    return rows

"""Part 1: from training to an engine that was compared on this GPU, by the commands that a user types."""

from __future__ import annotations

import dataclasses
import shutil
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from magsd_runtime.backends import CheckedBackend
from magsd_runtime.backends.tensorrt_engine import open_engine
from magsd_runtime.bundle import Bundle, load_bundle
from magsd_runtime.engines.passport import FOLDER, Machine, Passport, check_engine, read_passports, this_machine
from magsd_runtime.errors import EngineError
from magsd_runtime.shipped import choose_bundle

from .context import NOT_MEASURED, Context, command, milliseconds, record
from .half import on_device

BATCHES = (1, 8, 32)


def engine(context: Context) -> None:
    """FP16 of every network before FP32 of any: build, time, compare, refuse."""
    made = [name for name in context.networks if prepare(context, name)]
    for precision in ("fp16", "fp32"):
        for name in made:
            found, bundle = context.found[name], bundle_of(context, name)
            built = context.attempt(found, precision, partial(build, context, bundle, precision))
            if built and precision == "fp16":
                context.attempt(found, "latency fp16", partial(latency, context, bundle, "fp16"))
                for sides in compared(context, name):
                    context.attempt(found, sides, partial(decisions, context, name, sides))
            if built and precision == "fp32":
                half = found["fp16"].get("plan_size")
                found["fp16_size_of_fp32"] = round(half / found["fp32"]["plan_size"], 3) if half else None
                context.attempt(found, "latency fp32", partial(latency, context, bundle, "fp32"))
    for name in made:
        found = context.found[name]
        if name != "shipped":
            context.attempt(found, "PyTorch on this device", partial(on_device, context, folder_of(context, name)))
        if "plan_size" in found["fp16"]:
            context.attempt(found, "refusals", partial(refusals, context, bundle_of(context, name)))
            context.attempt(found, "magsd verify", partial(verify, context, bundle_of(context, name)))


def folder_of(context: Context, name: str) -> Path:
    return context.out / name


def bundle_of(context: Context, name: str) -> Path:
    return folder_of(context, name) / "bundle"


def prepare(context: Context, name: str) -> bool:
    """A bundle of the network in float32 and float16, made once; whether there is one.

    ``shipped``: the model in the box, whose weights were trained on films. A backbone: weights of ``--run``, or of one
    epoch from random ones, which gives the batch norms statistics of their own.
    """
    found = context.found.setdefault(name, {})
    bundle, run = bundle_of(context, name), context.run or folder_of(context, name) / "run"
    images = 8 if context.dry else 16

    def make() -> str:
        if (bundle / "bundle.json").is_file():
            return "made before"
        shutil.rmtree(bundle, ignore_errors=True)
        source: Path | str = choose_bundle(None) if name == "shipped" else run
        if source == run and context.run is None:
            command(
                "train", "--data", context.data, "--out", run, "--backbone", name, "--weights", "none",
                "--size", context.size, "--epochs", 1, "--folds", 3, "--fold", 0, "--batch-size", 8, "--select", "last",
                "--device", context.device.type, "--quiet", "--resume",
            )  # fmt: skip
        data = ["--data", context.data] if name == "shipped" else []
        command("export", source, "--out", bundle, "--precision", "fp16", "--images", images, *data)
        return f"from {source}"

    return context.attempt(found, "bundle", make)


def build(context: Context, bundle: Path, precision: str) -> dict[str, Any]:
    """``magsd engine``: with a GPU it compares the engine with ONNX Runtime before it keeps it."""
    target = ["--compute-capability", "8.6"] if context.dry else []
    passport = record(
        "engine", bundle, "--precision", precision, "--batch", "1:8:32", "--trt", context.library, *target
    )
    keys = ["library", "library_version", "plan_size", "layers", "gpu", *([] if context.dry else ["build_seconds"])]
    parity = passport["parity"]
    return {
        **{key: passport[key] for key in keys},
        "parity": NOT_MEASURED if context.dry else {"status": parity["status"], **parity.get("worst_differences", {})},
    }


def compared(context: Context, name: str) -> tuple[str, ...]:
    """Sides of ``magsd verify --compare``: on a GPU the engine's, in a dry run what there is without."""
    pairs = ("torch,fp32", "fp32,fp16") if context.dry else ("torch,engine", "fp32,engine")
    return pairs[1:] if name == "shipped" else pairs  # of which there is no checkpoint in the box


def decisions(context: Context, name: str, sides: str) -> dict[str, Any]:
    """Films from the file to the boxes, hostile files and hostile inputs, on both sides."""
    run = ["--run", context.run or folder_of(context, name) / "run"] if "torch" in sides else []
    report = record(
        "verify", bundle_of(context, name), "--compare", sides, "--data", context.data,
        "--limit", 8 if context.dry else 100, *run, expected=(0, 5),
    )  # fmt: skip
    films = report["films"]
    hostile = [made for made in report["hostile_inputs"] if made["judged"]]
    return {
        "passed": report["passed"], "failures": report["failures"], "films": films["films"],
        "label_agreement": films["label_agreement"], "probability": films["probability_difference"]["worst"],
        "heat_rank_correlation": films["heat_rank_correlation"]["mean"], "outputs": films.get("outputs"),
        "hostile_inputs": f"{sum(made['passed'] for made in hostile)} of {len(hostile)} within their limits",
    }  # fmt: skip


def refusals(context: Context, bundle: Path) -> dict[str, str]:
    """What is said of an engine of another GPU, another driver, and of a damaged plan; none may be opened.

    A dry run pretends to be the machine that the engine was built for, as far as can be asked before it is opened.
    """
    loaded = load_bundle(bundle)
    original = read_passports(loaded.path / FOLDER)[0][0]
    here = (
        Machine(original.system, "NVIDIA Imagined", original.compute_capability, "2.0", None)
        if context.dry
        else this_machine()
    )
    changes: dict[str, Passport] = {
        "another GPU": dataclasses.replace(original, gpu="NVIDIA Another GPU", compute_capability="5.2"),
        "another driver": dataclasses.replace(original, driver="1.0"),
        "a damaged plan": dataclasses.replace(original, plan_sha256="0" * 64),
    }
    check_engine(loaded, original, here)
    said = {}
    for what, passport in changes.items():
        try:
            check_engine(loaded, passport, here)
        except EngineError as error:
            said[what] = f"{type(error).__name__}: {str(error).replace(str(loaded.path), 'BUNDLE')}"[:300]
        else:
            raise RuntimeError(f"an engine with {what} was not refused")
    return said


def verify(context: Context, bundle: Path) -> str:
    if context.dry:
        return NOT_MEASURED
    return command("verify", bundle, "--backend", "tensorrt").splitlines()[-2]


def latency(context: Context, bundle: Path, precision: str) -> Any:
    """Milliseconds of a call from host memory to host memory, with and without CUDA graphs, by batch."""
    if context.dry:
        return {f"batch {batch}": NOT_MEASURED for batch in BATCHES}
    loaded = load_bundle(bundle)
    passport = passport_of(loaded, precision)
    backends: dict[str, CheckedBackend] = {}
    try:
        for name, graphs in (("graph", True), ("no graph", False)):
            backends[name] = CheckedBackend(open_engine(loaded, passport, graphs=graphs), loaded, "a benchmark")
        return {
            f"batch {batch}": milliseconds(
                context, {name: partial(one.run, noise(batch, loaded)) for name, one in backends.items()}
            )
            for batch in BATCHES
        }
    finally:
        for one in backends.values():
            one.close()


def passport_of(bundle: Bundle, precision: str) -> Passport:
    """Of the engine in ``precision`` that part 1 built."""
    for passport in read_passports(bundle.path / FOLDER)[0]:
        if passport.precision == precision:
            return passport
    raise EngineError(f"there is no {precision} engine: part 1 built none")


def noise(batch: int, bundle: Bundle) -> Any:
    """Inputs of the size and spread of a film's: devices are faster on zeros."""
    size = bundle.preprocessing.size
    return np.random.default_rng(batch).standard_normal((batch, 1, size, size), np.float32)

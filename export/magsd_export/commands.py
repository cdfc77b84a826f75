"""The verbs of the bridge: export and train-lungs. Parse, call one function, print."""

from __future__ import annotations

import argparse
import json
import sys
from contextlib import nullcontext
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from magsd_runtime.bundle_writing import check_out
from magsd_runtime.calibration_text import format_calibration
from magsd_runtime.commands import fractions
from magsd_runtime.engines.commands import add_options, build, record, text
from magsd_runtime.errors import RESEARCH_USE, UsageError, require

if TYPE_CHECKING:
    from magsd_runtime.bundle import Bundle

    from .bundling import Built
    from .halving import Halved


def export(argv: list[str]) -> int:
    """``magsd export``: a trained run becomes a verified bundle."""
    parser = argparse.ArgumentParser(
        prog="magsd export",
        description="Turn a trained run into a bundle: ONNX compared with PyTorch, golden inputs, model card. "
        + RESEARCH_USE,
        epilog="Exit code 5: the exported network differs from PyTorch, or INT8 costs more than --max-drop; no bundle "
        "is left then.",
    )
    parser.add_argument(
        "run", type=Path, metavar="RUN|CHECKPOINT|BUNDLE",
        help="run folder of magsd train, or a best.pt; or, with --precision fp16 or int8, a bundle to copy",
    )  # fmt: skip
    parser.add_argument("--out", required=True, type=Path, metavar="BUNDLE", help="folder to create")
    parser.add_argument(
        "--fold", type=int, metavar="K", help="fold of the run (default: the one with the best validation score)"
    )
    parser.add_argument("--final", action="store_true", help="the model that magsd train --final made of all folds")
    parser.add_argument("--name", metavar="N", help="name of the model (default: model and backbone)")
    parser.add_argument("--model-version", default="1", metavar="V", help="version of the model (default: 1)")
    parser.add_argument(
        "--data",
        type=Path,
        metavar="M.csv",
        help="compare with PyTorch on these images (default: the run's test and validation images)",
    )
    parser.add_argument("--images", type=int, default=64, metavar="N", help="at most so many images (default: 64)")
    parser.add_argument(
        "--evaluation",
        type=Path,
        metavar="DIR",
        help="what magsd evaluate wrote for this run: its results and localization threshold go into the bundle, "
        "and its held-out predictions calibrate it",
    )
    parser.add_argument(
        "--calibration",
        type=Path,
        metavar="DIR",
        help="calibrate on the held-out folds of another run of the same recipe: its evaluation (or predictions.csv)",
    )
    parser.add_argument("--positive", metavar="CLASS", help="choose operating points for this class")
    parser.add_argument(
        "--sensitivity", type=fractions, default=(0.9, 0.95), metavar="S,S",
        help="an operating point for each, the first is the default one (default: 0.9,0.95)",
    )  # fmt: skip
    parser.add_argument(
        "--coverage", type=float, default=0.9, metavar="C",
        help="share of films whose set of possible classes shall hold the right one (default: 0.9)",
    )  # fmt: skip
    parser.add_argument(
        "--no-acceptance", action="store_true",
        help="leave out the statistics of the run's films, by which infer flags images that are unlike them",
    )  # fmt: skip
    parser.add_argument(
        "--precision", choices=("fp32", "fp16", "int8"),
        help="fp16: add the network with its trunk in half precision, for TensorRT engines; int8: in 8-bit integers, "
        "for CPUs (default: fp32 alone, with --trt fp16)",
    )  # fmt: skip
    parser.add_argument(
        "--calibration-data", type=Path, metavar="M.csv",
        help="with --precision int8: films to calibrate, choose and check on (default: the run's own)",
    )  # fmt: skip
    parser.add_argument(
        "--max-drop", type=float, metavar="D",
        help="with --precision int8: at most this share of labels and, on average, this much of a probability may "
        "change (default: 0.01)",
    )  # fmt: skip
    parser.add_argument(
        "--trt", nargs="?", const="auto", choices=("auto", "tensorrt", "rtx"),
        help="also build an engine of --precision, as magsd engine does on the device that will run it",
    )  # fmt: skip
    add_options(parser)
    parser.add_argument("--force", action="store_true", help="replace the bundle in --out")
    parser.add_argument("--verbose", action="store_true", help="show the exporter's own messages on stderr")
    parser.add_argument("--json", action="store_true", help="print the result as one JSON object")
    options = parser.parse_args(argv)

    if options.precision is None:
        options.precision = "fp32" if options.trt is None else "fp16"
    if options.precision == "int8":
        if options.trt is not None:
            raise UsageError("--precision int8 is for CPUs: engines of --trt are fp16 or fp32")
    elif options.calibration_data is not None or options.max_drop is not None:
        raise UsageError("--calibration-data and --max-drop go with --precision int8")
    if (options.run / "bundle.json").is_file():
        return _export_bundle(options)
    for module in ("torch", "timm", "yaml", "onnx", "onnxscript", "onnxruntime"):
        require(module, feature="magsd export", extra="train")
    if options.final and options.fold is not None:
        raise UsageError("--final is the model of all folds: leave --fold out")

    int8 = options.precision == "int8"
    if int8:
        check_out(options.out, options.force)
    # INT8 is made from a finished bundle, which is no result by itself
    with TemporaryDirectory(prefix=".int8-", dir=options.out.absolute().parent) if int8 else nullcontext() as folder:
        target = options.out if folder is None else Path(folder) / "bundle"
        built = _build(options, target)
        if int8:
            return _add_int8(options, target, _own_films(built))
    _print(_record(built), _text(built, options.run), built.bundle, options)
    return 0


def _build(options: argparse.Namespace, out: Path) -> Built:
    """The bundle of a run, as the options say."""
    from magsd.folds import FINAL

    from .bundling import build_bundle

    return build_bundle(
        options.run,
        out,
        fold=FINAL if options.final else options.fold,
        name=options.name,
        version=options.model_version,
        data=options.data,
        images=options.images,
        evaluation=options.evaluation,
        calibration=options.calibration,
        positive=options.positive,
        sensitivities=options.sensitivity,
        coverage=options.coverage,
        acceptance=not options.no_acceptance,
        precision="fp32" if options.precision == "int8" else options.precision,
        force=options.force,
        verbose=options.verbose,
        report=_say,
    )


def _own_films(built: Built) -> tuple[str, Any] | None:
    """Path and digest of the manifest that the run was trained on."""
    data = built.info.config.data
    return (data, built.info.data.get("digest")) if data else None


def _add_int8(options: argparse.Namespace, bundle: Path, own: tuple[str, Any] | None) -> int:
    """A copy of ``bundle`` with its network in 8-bit integers."""
    from .int8_bundle import MAX_DROP, manifest_of, quantize_bundle

    max_drop = MAX_DROP if options.max_drop is None else options.max_drop
    manifest = manifest_of(options.calibration_data, own)
    done = quantize_bundle(bundle, options.out, manifest, max_drop=max_drop, force=options.force, report=_say)
    if options.json:
        print(json.dumps(done.to_dict(), allow_nan=False))
    else:
        print(f"{options.run} -> {done.bundle.path}\n{done.format()}\n{RESEARCH_USE}")
    return 0


def _export_bundle(options: argparse.Namespace) -> int:
    """A bundle in, a copy with a network in half precision or in integers out."""
    if options.precision == "fp32":
        raise UsageError(f"{options.run} is a bundle already: --precision fp16 or int8 adds a network to it")
    given = {
        "--fold": options.fold, "--final": options.final, "--name": options.name, "--evaluation": options.evaluation,
        "--calibration": options.calibration, "--positive": options.positive,
    }  # fmt: skip
    for name, value in given.items():
        if value not in (None, False):
            raise UsageError(f"{name} goes with a run, and {options.run} is a bundle")
    for module in ("onnx", "onnxruntime"):
        require(module, feature="magsd export", extra="train")
    if options.precision == "int8":
        return _add_int8(options, options.run, None)
    from .halving import halve_bundle

    done = halve_bundle(
        options.run, options.out, data=options.data, images=options.images, force=options.force, report=_say
    )
    _print(done.to_dict(), _halved_text(done, options.run), done.bundle, options)
    return 0


def _print(facts: dict[str, Any], lines: str, bundle: Bundle, options: argparse.Namespace) -> None:
    """The result, after an engine was built if one was asked for: the bundle stays if that fails."""
    engine = None if options.trt is None else build(bundle, options, options.precision)
    if options.json:
        print(json.dumps({**facts, **({} if engine is None else {"engine": record(engine)})}, allow_nan=False))
    else:
        print(lines if engine is None else f"{lines}\n\n{text(engine)}")


def train_lungs(argv: list[str]) -> int:
    """``magsd train-lungs``: the network that finds the lung fields, from films with masks."""
    parser = argparse.ArgumentParser(
        prog="magsd train-lungs",
        description="Train the small network that finds the lung fields, for --crop lungs and --lung-attention. "
        "magsd brings one already. " + RESEARCH_USE,
    )
    parser.add_argument("--data", required=True, type=Path, metavar="M.csv", help="CSV with path,mask[,patient]")
    parser.add_argument("--patients", type=Path, metavar="P.csv", help="CSV with path,patient, if M.csv has none")
    parser.add_argument("--out", required=True, type=Path, metavar="FILE.onnx", help="file to create")
    parser.add_argument("--epochs", type=int, default=200, metavar="N", help="passes over the films (default: 200)")
    parser.add_argument("--seed", type=int, default=0, metavar="S", help="seed of everything random (default: 0)")
    parser.add_argument("--force", action="store_true", help="replace --out")
    parser.add_argument("--json", action="store_true", help="print the result as one JSON object")
    options = parser.parse_args(argv)

    for module in ("torch", "onnx"):
        require(module, feature="magsd train-lungs", extra="train")
    from .lung_network import build_lungs

    scores, sha256 = build_lungs(
        options.data, options.out, patients=options.patients, epochs=options.epochs, seed=options.seed,
        force=options.force, report=_say,
    )  # fmt: skip
    if options.json:
        print(json.dumps({"out": str(options.out), "sha256": sha256, **scores.to_dict(), "research_use_only": True}))
    else:
        print(
            f"{options.out}  sha256 {sha256[:12]}...  Dice {scores.mean:.3f}, lowest {scores.lowest:.3f} "
            f"on {scores.films} films of {scores.patients} held-out patients\n{RESEARCH_USE}"
        )
    return 0


def _record(built: Built) -> dict[str, Any]:
    bundle, verification = built.bundle, built.verification
    return {
        "bundle": str(bundle.path),
        "model": {"name": bundle.name, "version": bundle.version, "sha256": bundle.model_sha256},
        "model_bytes": bundle.manifest["files"]["model.onnx"]["size"],
        "classes": list(bundle.classes),
        "checkpoint": str(built.source.checkpoint),
        "fold": built.info.fold,
        "chosen": built.source.reason,
        "localization": bundle.localization,
        "calibration": bundle.calibration.to_dict(),
        "acceptance": {"text": built.acceptance, **(bundle.manifest.get("acceptance") or {})},
        "notes": list(built.notes),
        "parity": built.parity.to_dict(),
        "precisions": bundle.manifest.get("precisions", {}),
        "golden": {"inputs": [check.name for check in verification.checks], "passed": verification.passed},
        "research_use_only": True,
    }


def _text(built: Built, run: Path) -> str:
    bundle = built.bundle
    size = bundle.manifest["files"]["model.onnx"]["size"] / 1e6
    where = bundle.localization
    source = built.parity.facts["source"]
    skipped = built.parity.facts["skipped"]
    return "\n".join(
        [
            f"{run} -> {bundle.path}",
            f"model       {bundle.name} {bundle.version}, {len(bundle.classes)} classes, model.onnx {size:.1f} MB",
            f"from        {built.source.reason}",
            f"acceptance  {built.acceptance}",
            f"heat map    {where['map']}, threshold {where['threshold']:g}"
            + (f", minimum score {bundle.minimum_score:g}" if bundle.minimum_score else "")
            + f" ({where['chosen_on']})",
            "",
            format_calibration(bundle.calibration),
            *(built.notes if bundle.calibration.fitted else ()),  # else the line above has said it
            "",
            "parity with PyTorch",
            built.parity.format(),
            f"radiographs: {source}" + (f"; {skipped} unreadable or without contrast left out" if skipped else ""),
            "",
            *([] if built.half is None else [*_half_lines(bundle, built.half.report.format()), ""]),
            f"verified by the runtime on {len(built.verification.checks)} golden inputs",
            RESEARCH_USE,
        ]
    )


def _halved_text(done: Halved, source: Path) -> str:
    lines = _half_lines(done.bundle, done.half.report.format())
    return "\n".join([f"{source} -> {done.bundle.path}", *lines, RESEARCH_USE])


def _half_lines(bundle: Bundle, table: str) -> list[str]:
    size = bundle.manifest["files"]["model.fp16.onnx"]["size"] / 1e6
    return [f"model.fp16.onnx {size:.1f} MB, trunk in half precision: against float32", table]


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)

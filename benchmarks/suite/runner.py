"""The command line of ``python -m benchmarks``: each part in a process of its own, then tables, pictures, records."""

from __future__ import annotations

import argparse
import importlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from magsd_runtime.errors import MagsdError, UsageError
from magsd_runtime.files import write_json, write_text
from magsd_runtime.shipped import choose_bundle
from timing import describe, machine

from .processes import ROOT
from .report import Report, record, text

PARTS = {
    "cold": "from the command to the answer, as whole processes",
    "warm": "from the file to the prediction, against the bare library calls",
    "network": "the network alone: ONNX Runtime, PyTorch, torch.compile, OpenVINO",
    "growth": "time and memory against image size, files, batch, threads, folds, rows",
    "memory": "peak of memory of every command",
    "peers": "whole tools on the same film: ultralytics, torchxrayvision",
}
REPEATS = 15
_LIBRARIES = ("numpy", "opencv-python-headless", "pillow", "onnxruntime", "torch", "timm", "openvino")


def main(argv: Sequence[str] | None = None) -> int:
    """Exit code 0: every part ran, whatever it found; 1: a part failed."""
    options = parse(argv)
    if options.list:
        for name, what in PARTS.items():
            print(f"{name:8}  {what}")
        return 0
    try:
        if options.part:
            return child(options)
        if options.out is not None:
            options.out.mkdir(parents=True, exist_ok=True)
        # as Ctrl-C does, so that the part at hand ends too and its folder goes
        signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
        with TemporaryDirectory(prefix="magsd-benchmarks-") as folder:
            return parent(options, Path(folder))
    except MagsdError as error:
        print(f"python -m benchmarks: {options.part or ''}: {error}", file=sys.stderr)
        return 1


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks",
        description="How fast magsd is here, how that grows, and how much memory it takes, in one run whose variants "
        "take turns. Read the ratios. docs/benchmarks.md says what each part means. Research use only.",
    )
    parser.add_argument("--list", action="store_true", help="name the parts, and stop")
    parser.add_argument("--only", type=names, default=tuple(PARTS), metavar="A,B", help=f"of {', '.join(PARTS)}")
    parser.add_argument("--quick", action="store_true", help="two minutes in all: does it run? Measures nothing")
    parser.add_argument("--out", type=Path, metavar="FOLDER", help="write NAME.json, NAME.md and NAME.svg of each part")
    parser.add_argument("--bundle", type=Path, action="append", default=[], metavar="DIR",
                        help="a bundle beside the one in the box; may be given again")  # fmt: skip
    parser.add_argument("--backbone", action="append", default=[], metavar="NAME",
                        help="as --bundle, but made here, of random weights: resnet50 (needs torch)")  # fmt: skip
    parser.add_argument("--repeats", type=int, metavar="N", help=f"rounds that count (default: {REPEATS})")
    parser.add_argument("--threads", type=int, metavar="N", help="CPU threads (default: all cores)")
    parser.add_argument("--processor-time", action="store_true",
                        help="in a process, count processor time: for a busy machine, with --threads 1")  # fmt: skip
    parser.add_argument("--part", choices=tuple(PARTS), help=argparse.SUPPRESS)
    parser.add_argument("--work", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args(argv)
    for name in ("repeats", "threads"):
        if getattr(options, name) is not None and getattr(options, name) < 1:
            parser.error(f"--{name} is {getattr(options, name)}: expected 1 or more")
    for bundle in options.bundle:
        if not (bundle / "bundle.json").is_file():
            parser.error(f"--bundle {bundle}: is no bundle")
    if options.processor_time and options.threads != 1:
        parser.error("--processor-time needs --threads 1: else it counts all threads together")
    options.repeats = options.repeats or (1 if options.quick else REPEATS)
    return options


def names(value: str) -> tuple[str, ...]:
    """``cold,warm`` -> the parts in the order of the suite, each once; for argparse."""
    chosen = value.split(",")
    if unknown := [name for name in chosen if name not in PARTS]:
        raise argparse.ArgumentTypeError(f"names {', '.join(map(repr, unknown))}, expected some of {', '.join(PARTS)}")
    return tuple(name for name in PARTS if name in chosen)


def parent(options: argparse.Namespace, work: Path) -> int:
    from .context import one_epoch_bundle

    bundles = [bundle.resolve() for bundle in options.bundle]
    for backbone in options.backbone:
        print(f"making a bundle of {backbone}", file=sys.stderr, flush=True)
        bundles.append(one_epoch_bundle(work, backbone))
    command = [sys.executable, "-m", "benchmarks", "--work", str(work), "--repeats", str(options.repeats)]
    command += [word for bundle in bundles for word in ("--bundle", str(bundle))]
    command += ["--quick"] if options.quick else []
    command += ["--processor-time"] if options.processor_time else []
    command += ["--threads", str(options.threads)] if options.threads else []
    command += ["--out", str(options.out.resolve())] if options.out else []
    failed = []
    for name in options.only:
        began = time.monotonic()
        # the user's kept graphs would make some variants faster than their names say
        environment = {**os.environ, "MAGSD_CACHE": "off", "MAGSD_BUNDLE": ""}
        code = subprocess.run([*command, "--part", name], cwd=ROOT, env=environment).returncode
        print(f"{name}: {time.monotonic() - began:.0f} s", file=sys.stderr, flush=True)
        if code:
            failed.append(name)
    if failed:
        print(f"python -m benchmarks: failed: {', '.join(failed)}", file=sys.stderr)
    return 1 if failed else 0


def child(options: argparse.Namespace) -> int:
    """One part, in this process."""
    from .context import Context

    bundles = {"in the box": Path(choose_bundle(None))}
    for bundle in options.bundle:
        if bundle.name in bundles:
            raise UsageError(f"--bundle {bundle}: two bundles are called {bundle.name}")
        bundles[bundle.name] = bundle
    context = Context(
        options.work, bundles, options.repeats, quick=options.quick, threads=options.threads,
        processor_time=options.processor_time,
    )  # fmt: skip
    facts = machine(*(name for name in _LIBRARIES if _installed(name)))
    facts["threads"] = context.used_threads
    if options.processor_time:
        facts["clock within a process"] = "processor time"
    report: Report = importlib.import_module(f"suite.{options.part}").run_part(context)
    found = text(PARTS[options.part], report, describe(facts), quick=options.quick)
    print(found, flush=True)
    if options.out is not None:
        write_json(options.out / f"{options.part}.json", record(options.part, report, facts, quick=options.quick))
        write_text(options.out / f"{options.part}.md", found)
        if (picture := draw(options.part, report, facts)) is not None:
            write_text(options.out / f"{options.part}.svg", picture)
    return 0


def draw(name: str, report: Report, facts: dict[str, Any]) -> str | None:
    """The picture of a part; None of one that has nothing to draw."""
    from .charts import bars, curves

    subtitle = f"{facts['processor']}, {facts['cores']} cores, {facts['time']}"
    if report.curves:
        return curves(PARTS[name], subtitle, report.curves)
    return bars(PARTS[name], subtitle, report.bars) if any(group.values for group in report.bars) else None


def _installed(name: str) -> bool:
    try:
        metadata.version(name)
    except metadata.PackageNotFoundError:
        return False
    return True

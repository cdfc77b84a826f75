"""``magsd benchmark``. Parse, measure, print."""

from __future__ import annotations

import argparse
import json
import os
import sys
from pathlib import Path
from typing import Any

from ..backend_names import BACKENDS
from ..commands import positive_int
from ..errors import RESEARCH_USE, UsageError
from ..shipped import choose_bundle


def benchmark(argv: list[str]) -> int:
    """``magsd benchmark``: how fast a bundle answers here, on each backend."""
    parser = argparse.ArgumentParser(
        prog="magsd benchmark",
        description="How fast a bundle answers on this machine: latency, throughput, memory and the time to the first "
        "answer of each backend, which take turns. Read the ratios. " + RESEARCH_USE,
        epilog="Exit code 6: a backend that was named cannot run here; 3: the film cannot be read, or is rejected.",
    )
    parser.add_argument(
        "bundle", nargs="?", metavar="BUNDLE", help="default: $MAGSD_BUNDLE, or the one in the box"
    )  # fmt: skip
    named = ",".join(name for name in BACKENDS if name != "auto")
    parser.add_argument(
        "--backend",
        type=_names,
        metavar="A,B",
        help=f"of {named}; ratios are to the first (default: all that run here)",
    )
    parser.add_argument(
        "--batch", type=_batches, default=(1, 8, 32), metavar="N,N", help="batch sizes of the network (default: 1,8,32)"
    )
    parser.add_argument("--rounds", type=positive_int, default=15, metavar="N", help="turns of each (default: 15)")
    parser.add_argument("--starts", type=positive_int, default=3, metavar="N", help="processes started (default: 3)")
    parser.add_argument("--image", type=Path, metavar="FILE", help="a film (default: the bundle's first golden input)")
    parser.add_argument("--threads", type=positive_int, metavar="N", help="CPU threads (default: all cores)")
    parser.add_argument("--plot", type=Path, metavar="FILE.svg", help="draw it")
    parser.add_argument("--out", type=Path, metavar="FILE.json", help="write the record")
    parser.add_argument("--json", action="store_true", help="print the record, one JSON object")
    options = parser.parse_args(argv)
    if options.plot is not None and options.plot.suffix != ".svg":
        raise UsageError(f"--plot {options.plot}: an SVG is written, name it .svg")
    for path in (options.plot, options.out):
        if path is not None and not path.parent.is_dir():
            raise UsageError(f"{path}: there is no folder {path.parent}")

    from ..bundle import load_bundle
    from ..files import write_json, write_text
    from .measuring import measure
    from .plot import plot
    from .summary import format_record, record

    bundle = load_bundle(choose_bundle(options.bundle))
    image = options.image or _golden(bundle.path)
    if not image.is_file():
        raise UsageError(f"--image {image}: no such file")
    measured, left_out = measure(
        bundle.path, options.backend or [name for name in BACKENDS if name != "auto"], image, batches=options.batch,
        rounds=options.rounds, starts=options.starts, threads=options.threads, required=options.backend is not None,
        report=lambda line: print(line, file=sys.stderr, flush=True),
    )  # fmt: skip
    described = {
        "path": str(bundle.path), "name": bundle.name, "version": bundle.version, "model_sha256": bundle.model_sha256,
    }  # fmt: skip
    facts = record(described, _machine(options.threads), measured, left_out)
    if options.out is not None:
        write_json(options.out, facts)
    if options.plot is not None:
        write_text(options.plot, plot(facts))
    print(json.dumps(facts, allow_nan=False) if options.json else format_record(facts), flush=True)
    return 0


def _golden(bundle: Path) -> Path:
    found = sorted((bundle / "golden").glob("*.png"))
    if not found:
        raise UsageError(f"{bundle}: has no golden input: name a film by --image")
    return found[0]


def _machine(threads: int | None) -> dict[str, Any]:
    from datetime import datetime, timezone

    from .. import hardware

    cpu, gpu = hardware.cpu(), hardware.cuda_driver()
    return {
        "processor": cpu["model"] or cpu["architecture"],
        "cores": cpu["usable_cores"],
        "threads": "all cores" if threads is None else "1 thread" if threads == 1 else f"{threads} threads",
        "load": round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None,
        "gpu": gpu["devices"][0] if gpu["devices"] else None,
        "python": sys.version.partition(" ")[0],
        "time": datetime.now(timezone.utc).isoformat(timespec="seconds"),
    }


def _names(text: str) -> list[str]:
    names = text.split(",")
    for name in names:
        if name not in BACKENDS:
            raise argparse.ArgumentTypeError(f"names {name!r}, expected some of {', '.join(BACKENDS)}")
    if len(set(names)) != len(names):
        raise argparse.ArgumentTypeError(f"{text} names one twice")
    return names


def _batches(text: str) -> tuple[int, ...]:
    return tuple(dict.fromkeys(positive_int(part) for part in text.split(",")))

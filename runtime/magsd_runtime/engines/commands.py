"""``magsd engine``, and the options that ``magsd export --trt`` has in common with it."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import RESEARCH_USE, EngineBuildError, UsageError
from ..shipped import choose_bundle

if TYPE_CHECKING:
    from ..bundle import Bundle
    from .making import Engine

_LIBRARIES = ("auto", "tensorrt", "rtx")  # as library.LIBRARIES, which --help need not import


def engine(argv: list[str]) -> int:
    """``magsd engine``: a TensorRT engine of a bundle's network, for the GPU that will run it."""
    parser = argparse.ArgumentParser(
        prog="magsd engine",
        description="Build a TensorRT engine of a bundle's network on the machine that will run it, compare its "
        "outputs there, and put it into the bundle's folder engines. Needs no PyTorch. " + RESEARCH_USE,
        epilog="Exit code 4: no engine can be built of the network; 5: its outputs differ by more than is allowed; "
        "6: TensorRT or its GPU is not there.",
    )
    parser.add_argument(
        "bundle", nargs="?", metavar="BUNDLE", help="folder of a bundle (default: $MAGSD_BUNDLE, or the one in the box)"
    )
    parser.add_argument(
        "--precision", choices=("fp16", "fp32"), default="fp16",
        help="fp16 needs a bundle with a network in half precision (default: fp16)",
    )  # fmt: skip
    parser.add_argument(
        "--trt", choices=_LIBRARIES, default="auto", help="TensorRT or TensorRT-RTX (default: the one that is here)"
    )
    add_options(parser)
    parser.add_argument("--json", action="store_true", help="print the passport as one JSON object")
    options = parser.parse_args(argv)

    from ..bundle import load_bundle

    built = build(load_bundle(choose_bundle(options.bundle)), options, options.precision)
    print(json.dumps(record(built), allow_nan=False) if options.json else text(built))
    return 0


def add_options(parser: argparse.ArgumentParser) -> None:
    """The options of a build: --batch, --compute-capability, --workspace, --log."""
    parser.add_argument(
        "--batch", default="1:1:8", metavar="MIN:OPT:MAX", help="batch sizes of the engine (default: 1:1:8)"
    )
    parser.add_argument(
        "--compute-capability", metavar="X.Y", help="with TensorRT-RTX: build for such a GPU (default: the one here)"
    )
    parser.add_argument("--workspace", type=int, metavar="MIB", help="most scratch memory, in MiB (default: no limit)")
    parser.add_argument("--log", type=Path, metavar="FILE", help="write all that the library says to this file")


def build(bundle: Bundle, options: argparse.Namespace, precision: str) -> Engine:
    """Build with the options of :func:`add_options` and ``--trt``; a failure's messages go to stderr."""
    from ..files import write_text
    from .building import Profile
    from .making import make_engine

    if options.workspace is not None and options.workspace < 1:
        raise UsageError(f"--workspace is {options.workspace}: expected 1 or more")
    try:
        built = make_engine(
            bundle,
            precision=precision,
            profile=Profile.parse(options.batch),
            library=options.trt,
            compute_capability=options.compute_capability,
            workspace=None if options.workspace is None else options.workspace << 20,
            report=lambda line: print(line, file=sys.stderr, flush=True),
        )
    except EngineBuildError as error:
        for line in error.log:
            print(line, file=sys.stderr)
        if options.log is not None:
            write_text(options.log, "\n".join(error.log) + "\n")
        raise
    if options.log is not None:
        write_text(options.log, "\n".join(built.plan.messages.lines(verbose=True)) + "\n")
    return built


def record(built: Engine) -> dict[str, Any]:
    """The passport and the plan's path, for --json."""
    return {"engine": str(built.path), **built.passport.to_dict(), "research_use_only": True}


def text(built: Engine) -> str:
    """The passport for people, several lines."""
    passport = built.passport
    layers = ", ".join(f"{count} {name}" for name, count in passport.layers.items())
    gpu = passport.gpu or "any GPU"
    parity = passport.parity["status"]
    if not passport.proven:
        parity += f" ({passport.parity['reason']}): --backend auto will not choose this engine"
    return "\n".join(
        [
            f"engine      {built.path}, {passport.plan_size / 1e6:.1f} MB",
            f"for         {gpu}, compute capability {passport.compute_capability}, {passport.title}, {passport.system}",
            f"precision   {passport.precision}; types of the network's layers before fusion: {layers}",
            f"batches     {passport.profile}, built in {passport.build_seconds:.1f} s",
            f"parity      {parity}",
            *(f"warning     {line}" for line in passport.warnings),
            RESEARCH_USE,
        ]
    )

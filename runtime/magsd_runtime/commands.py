"""The verbs calibrate and doctor, and what the runtime's verbs share. Parse, call, print, return the exit code."""

from __future__ import annotations

import argparse
import json
import sys
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .backend_names import BACKENDS
from .errors import RESEARCH_USE
from .rules_option import add_rules, chosen_rules

if TYPE_CHECKING:
    pass


def calibrate(argv: list[str]) -> int:
    """``magsd calibrate``: a bundle's temperature and operating points from a site's own cases."""
    parser = argparse.ArgumentParser(
        prog="magsd calibrate",
        description="Fit a bundle's temperature, and choose its operating points, on cases that the model has not "
        "seen; write a new bundle. " + RESEARCH_USE,
        epilog="Exit code 2: too few cases, nothing is written; 3: some images could not be judged, the others were.",
    )
    parser.add_argument("bundle", metavar="BUNDLE", help="folder that magsd export wrote; it stays as it is")
    parser.add_argument("--data", required=True, type=Path, metavar="M.csv", help="CSV with path,label,patient")
    parser.add_argument("--out", type=Path, metavar="NEW", help="bundle to create (default: BUNDLE-calibrated)")
    parser.add_argument("--force", action="store_true", help="replace the bundle in --out; it may be BUNDLE itself")
    parser.add_argument(
        "--positive", metavar="CLASS", help="class of the operating points (default: the bundle's, if it has one)"
    )
    parser.add_argument(
        "--sensitivity", type=fractions, default=(0.9, 0.95), metavar="S,S",
        help="an operating point for each, the first is the default one (default: 0.9,0.95)",
    )  # fmt: skip
    parser.add_argument(
        "--coverage", type=float, default=0.9, metavar="C",
        help="share of films whose set of possible classes shall hold the right one (default: 0.9)",
    )  # fmt: skip
    parser.add_argument("--note", default="", metavar="TEXT", help="where the cases are from, kept in the bundle")
    parser.add_argument("--dry-run", action="store_true", help="show the figures, write nothing")
    parser.add_argument("--json", action="store_true", help="one JSON object on stdout")
    add_rules(parser)
    add_backend(parser)
    options = parser.parse_args(argv)
    rules = chosen_rules(options)

    from .pipeline import Pipeline
    from .site_calibration import calibrate_site, default_out, read_site

    site = read_site(options.data)
    out = None if options.dry_run else options.out or default_out(Path(options.bundle))
    with (
        Pipeline.open(options.bundle, options.backend, threads=options.threads, rules=rules) as pipeline,
        closing(Progress(len(site.images))) as progress,
    ):
        done = calibrate_site(
            pipeline, site, out, positive=options.positive, sensitivities=options.sensitivity, note=options.note,
            coverage=options.coverage, force=options.force, step=progress.step,
        )  # fmt: skip
    for line in done.notes:
        print(f"magsd calibrate: {printable(line)}", file=sys.stderr)
    print(json.dumps(done.to_dict(), allow_nan=False) if options.json else done.format(), flush=True)
    return 3 if done.judged.refused else 0


def doctor(argv: list[str]) -> int:
    """``magsd doctor``: what this machine has, what would run, what is missing."""
    parser = argparse.ArgumentParser(
        prog="magsd doctor", description="What this machine has, what would run and why, what is missing."
    )
    parser.add_argument("--json", action="store_true", help="one JSON object on stdout")
    options = parser.parse_args(argv)

    from .doctor import examine, format_report

    report = examine()
    print(json.dumps(report, allow_nan=False) if options.json else format_report(report), flush=True)
    return 0


def add_backend(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--backend", choices=BACKENDS, default="auto", help="auto (default) takes the fastest that is here"
    )
    parser.add_argument("--threads", type=positive_int, metavar="N", help="CPU threads (default: all cores)")


def positive_int(text: str) -> int:
    """For argparse."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"is {value}, expected 1 or more")
    return value


def fractions(text: str) -> tuple[float, ...]:
    """``0.9,0.95`` -> (0.9, 0.95), for argparse."""
    return tuple(float(part) for part in text.split(","))


def printable(text: str) -> str:
    return text if text.isprintable() else ascii(text)


class Progress:
    """Lines on stdout, and with ``least`` images or more and a terminal, a bar on stderr."""

    def __init__(self, count: int, least: int = 2) -> None:
        self._bar: Any = None
        if count >= least and sys.stderr.isatty():
            from tqdm import tqdm

            self._bar = tqdm(total=count, unit="image", file=sys.stderr, leave=False, dynamic_ncols=True)

    def print(self, line: str) -> None:
        if self._bar is not None and sys.stdout.isatty():
            self._bar.write(line, file=sys.stdout)  # clears the bar first
            sys.stdout.flush()
        else:
            print(line, flush=True)

    def step(self) -> None:
        if self._bar is not None:
            self._bar.update()

    def close(self) -> None:
        if self._bar is not None:
            self._bar.close()

"""``magsd verify``: golden inputs on this machine, or two networks against each other. Parse, call, print."""

from __future__ import annotations

import argparse
import contextlib
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from .commands import Progress, add_backend
from .errors import RESEARCH_USE, UsageError, VerificationError
from .rules_option import add_rules, chosen_rules
from .shipped import choose_bundle

if TYPE_CHECKING:
    from .bundle import Bundle
    from .deciding import DecisionReport
    from .verification import VerificationReport


def verify(argv: list[str]) -> int:
    """``magsd verify``: prove on this machine that a bundle computes what it should."""
    parser = argparse.ArgumentParser(
        prog="magsd verify",
        description="Prove on this machine that a bundle computes what it computed where it was made; with --compare, "
        "that two of its networks come to the same decisions. " + RESEARCH_USE,
        epilog="Exit code 4: a file is damaged; 5: the outputs or decisions differ by more than is "
        "allowed; 6: a backend or network that was named cannot run here.",
    )
    parser.add_argument(
        "bundle", nargs="?", metavar="BUNDLE",
        help="folder that magsd export wrote (default: $MAGSD_BUNDLE, or the one in the box)",
    )  # fmt: skip
    parser.add_argument(
        "--compare", metavar="A,B",
        help="two of torch, fp32, fp16, fp16-rounded, int8, cuda, engine: from the file of a film to its boxes",
    )  # fmt: skip
    parser.add_argument(
        "--data", type=Path, metavar="M.csv", help="with --compare: these films (default: the bundle's golden inputs)"
    )
    parser.add_argument("--limit", type=int, metavar="N", help="with --data: N films, evenly from the whole")
    parser.add_argument(
        "--run", type=Path, metavar="RUN", help="with --compare torch: the run, fold or checkpoint of the bundle"
    )
    parser.add_argument("--json", action="store_true", help="one JSON object on stdout")
    add_rules(parser)
    add_backend(parser)
    options = parser.parse_args(argv)
    if options.compare is not None:
        return _compare(options)
    for name in ("data", "limit", "run", "rules"):
        if getattr(options, name) is not None:
            raise UsageError(f"--{name} goes with --compare")

    from .backends import open_backend
    from .bundle import load_bundle
    from .verification import verify_bundle

    bundle = load_bundle(choose_bundle(options.bundle))
    with open_backend(bundle, options.backend, threads=options.threads) as backend:
        report = verify_bundle(bundle, backend)
    if report.passed:
        _prepare(bundle, backend.name, report)
    return _show(report, as_json=options.json)


def _prepare(bundle: Bundle, name: str, report: VerificationReport) -> None:
    """Keep what makes the next start faster, for a network that computes here what it should."""
    import numpy as np

    from .backends.onnx_runtime import prepare
    from .verification import golden_input

    prepare(bundle, name, lambda: np.stack([golden_input(bundle, check.name) for check in report.checks]))


def _compare(options: argparse.Namespace) -> int:
    names = options.compare.split(",")
    if len(names) != 2 or names[0] == names[1]:
        raise UsageError(f"--compare is {options.compare!r}: expected two, such as fp32,engine")
    if options.backend != "auto":
        raise UsageError("--backend goes without --compare, which names what is run")
    if options.run is not None and "torch" not in names:
        raise UsageError("--run goes with --compare torch")
    if options.limit is not None and (options.data is None or options.limit < 1):
        raise UsageError("--limit goes with --data, and is 1 or more")

    from .bundle import load_bundle
    from .deciding import compare_sides, golden_films, manifest_films, open_side

    rules = chosen_rules(options)
    bundle = load_bundle(choose_bundle(options.bundle))
    films, source = golden_films(bundle), "golden inputs"
    if options.data is not None:
        films, source = manifest_films(options.data), options.data.name
        if options.limit is not None and options.limit < len(films):
            films = [films[number * len(films) // options.limit] for number in range(options.limit)]
    with contextlib.ExitStack() as stack:
        opened = [
            stack.enter_context(open_side(name, bundle, run=options.run, threads=options.threads, rules=rules))
            for name in names
        ]
        progress = stack.enter_context(contextlib.closing(Progress(len(films), least=20)))
        report = compare_sides(bundle, opened[0][0], opened[1][0], films, source=source, step=progress.step)
    code = _show(report, as_json=options.json)
    for _, passport in opened:
        if passport is not None:
            from .engines.outcome import record_outcome

            if (note := record_outcome(bundle, passport, report)) is not None:
                print(f"magsd verify: {note}", file=sys.stderr)
    return code


def _show(report: VerificationReport | DecisionReport, *, as_json: bool) -> int:
    if hasattr(sys.stdout, "reconfigure"):  # names that the terminal cannot show must not cost the report
        sys.stdout.reconfigure(errors="backslashreplace")  # type: ignore[union-attr]
    print(json.dumps(report.to_dict(), allow_nan=False) if as_json else report.format(), flush=True)
    return 0 if report.passed else VerificationError.exit_code

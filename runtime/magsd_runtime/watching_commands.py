"""The verb watch. Parse, open the model, run until SIGTERM."""

from __future__ import annotations

import argparse
import signal
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from .commands import add_backend, positive_int
from .errors import RESEARCH_USE, UsageError
from .rules_option import add_rules, chosen_rules
from .shipped import choose_bundle


def watch(argv: list[str]) -> int:
    """``magsd watch``: judge each file that is put into a folder, once."""
    parser = argparse.ArgumentParser(
        prog="magsd watch",
        description="Judge each finished file that is put into a folder, once, with a model that stays loaded. "
        + RESEARCH_USE,
        epilog="SIGTERM or Ctrl-C finishes the film at hand and stops. docs/watch.md has a systemd unit.",
    )
    parser.add_argument("inbox", metavar="IN", type=Path, help="folder that senders write to, with its subfolders")
    parser.add_argument("--out", required=True, type=Path, metavar="OUT", help="results, quarantine and status")
    parser.add_argument("--bundle", metavar="DIR", help="the model (default: $MAGSD_BUNDLE, or the one in the box)")
    parser.add_argument("--audit", metavar="FILE", type=Path, help="append a record of each result to this log")
    add_rules(parser)
    parser.add_argument("--no-overlay", action="store_true", help="no picture beside each prediction")
    parser.add_argument("--dicom-out", metavar="DIR", type=Path, help="write DICOM results of DICOM films here")
    parser.add_argument("--delete-done", action="store_true", help="delete an input when its result is on the disk")
    parser.add_argument("--keep-names", action="store_true", help="predictions name the input file (patient data?)")
    parser.add_argument("--once", action="store_true", help="stop when nothing is left to be done")
    parser.add_argument("--settle", type=_seconds, default=2.0, metavar="S",
                        help="a file unchanged for S seconds is finished (default: 2)")  # fmt: skip
    parser.add_argument("--patience", type=_seconds, default=30.0, metavar="S",
                        help="one that cannot be read is given S seconds to change (default: 30)")  # fmt: skip
    parser.add_argument("--poll", type=_seconds, default=0.5, metavar="S", help="seconds between looks (default: 0.5)")
    parser.add_argument(
        "--queue", type=positive_int, default=100, metavar="N", help="files taken at once (default: 100)"
    )
    add_backend(parser)
    options = parser.parse_args(argv)
    rules = chosen_rules(options)
    _check_folders(options.inbox, options.out, options.dicom_out)
    bundle = choose_bundle(options.bundle)
    with _stop_flag() as stop:
        return _watch(options, bundle, rules, stop)


def _watch(options: Any, bundle: str, rules: Any, stop: Callable[[], bool]) -> int:
    from .inbox import Inbox
    from .outbox import Outbox
    from .pipeline import Pipeline
    from .watch_status import WatchStatus
    from .watching import Watcher, WatchSettings

    if options.dicom_out is not None:
        from .dicom_results.writing import require_parts

        require_parts()
    if options.threads is not None:
        import cv2

        cv2.setNumThreads(options.threads)
    settings = WatchSettings(
        settle=options.settle, patience=max(options.patience, options.settle), poll=options.poll, queue=options.queue,
        overlay=not options.no_overlay, delete_done=options.delete_done, keep_names=options.keep_names,
    )  # fmt: skip
    outbox = Outbox(options.out, dicom_out=options.dicom_out)
    with Pipeline.open(bundle, options.backend, threads=options.threads, rules=rules) as pipeline:
        if options.audit is not None:
            pipeline = _audited(pipeline, options)
        inbox = Inbox(options.inbox, settle=options.settle, clock=time.monotonic)
        backend = {"name": pipeline.backend.name, "device": pipeline.backend.device}
        model = {"name": pipeline.bundle.name, "version": pipeline.bundle.version}
        model["sha256"] = pipeline.bundle.model_sha256
        status = WatchStatus(model, backend, options.queue, dicom=None if options.dicom_out is None else Counter())
        watcher = Watcher(pipeline, inbox, outbox, settings, status)
        print(
            f"magsd watch: {model['name']} {model['version']} on {backend['device']}. {RESEARCH_USE}", file=sys.stderr
        )
        before = outbox.ledger.counts["quarantined"], outbox.ledger.statuses["rejected"]
        watcher.run(stop, once=options.once)
    outbox.close()
    after = outbox.ledger.counts["quarantined"], outbox.ledger.statuses["rejected"]
    return 3 if options.once and after != before else 0


def _audited(pipeline: Any, options: Any) -> Any:
    from .audit import repair
    from .audit_record import AuditedPipeline

    if options.audit.exists():
        # Nobody is there to do it by hand; the log says that it was done, and so do we
        record = repair(options.audit)
        if record is not None:
            print(
                f"magsd watch: {options.audit}: record {record['seq']} notes a write that was cut off", file=sys.stderr
            )
    return AuditedPipeline(pipeline, options.audit, threads=options.threads)


def _check_folders(inbox: Path, out: Path, dicom_out: Path | None) -> None:
    if not inbox.is_dir():
        raise UsageError(f"{inbox}: is no folder")
    one, other = inbox.resolve(), out.resolve()
    if one == other or one in other.parents or other in one.parents:
        raise UsageError(f"{inbox} and --out {out}: neither may lie in the other, results would be taken for inputs")
    if dicom_out is None:
        return
    third = dicom_out.resolve()
    if third == one or third in one.parents or one in third.parents:
        raise UsageError(
            f"{inbox} and --dicom-out {dicom_out}: neither may lie in the other, results would be taken for inputs"
        )
    own = {other / name for name in ("results", "quarantine", "state")}
    if third == other or own & {third, *third.parents}:
        raise UsageError(f"--dicom-out {dicom_out} is for the use of --out {out}: choose another folder")


@contextmanager
def _stop_flag() -> Iterator[Callable[[], bool]]:
    """A function that says whether SIGTERM or SIGINT has come."""
    came: list[int] = []
    signals = (signal.SIGTERM, signal.SIGINT)
    before = [signal.signal(number, lambda number, _: came.append(number)) for number in signals]
    try:
        yield lambda: bool(came)
    finally:
        for number, handler in zip(signals, before):
            signal.signal(number, handler)


def _seconds(text: str) -> float:
    value = float(text)
    if not 0 <= value <= 86_400:
        raise argparse.ArgumentTypeError(f"is {text}, expected 0 to 86400 seconds")
    return value

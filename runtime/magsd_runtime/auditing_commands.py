"""The verbs audit and replay. Parse, call the library, print, return the exit code."""

from __future__ import annotations

import argparse
import json
import re
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .backend_names import BACKENDS
from .errors import (
    RESEARCH_USE,
    ArtefactError,
    BackendUnavailableError,
    EngineError,
    UsageError,
    VerificationError,
)
from .rules_option import add_rules, chosen_rules
from .shipped import choose_bundle

if TYPE_CHECKING:
    from .audit import Verdict
    from .pipeline import Pipeline

_LIMITS = (
    "A chain cannot show records missing at its end, nor a log written anew by somebody who computes the hashes. "
    "Keep the head elsewhere, and give it to --head next time."
)


def audit(argv: list[str]) -> int:
    """``magsd audit verify|repair|replay``: the log that ``--audit`` writes."""
    parser = argparse.ArgumentParser(
        prog="magsd audit", description="Check, repair or repeat what magsd infer --audit logged. " + RESEARCH_USE
    )
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="VERB")
    check = verbs.add_parser("verify", help="find any edit, deletion, insertion or exchange of records")
    check.add_argument("log", metavar="FILE", type=Path)
    check.add_argument("--head", metavar="HASH", type=_head, help="hash of the last record when it was last noted")
    check.add_argument("--json", action="store_true", help="one JSON object on stdout")
    mend = verbs.add_parser("repair", help="note a write that was cut off in a record of its own")
    mend.add_argument("log", metavar="FILE", type=Path)
    _add_replay(verbs.add_parser("replay", help="repeat a result: as magsd replay"))
    options = parser.parse_args(argv)
    return {"verify": _verify, "repair": _repair, "replay": _replay}[options.verb](options)


def replay(argv: list[str]) -> int:
    """``magsd replay``: repeat a logged result and say what differs and why."""
    parser = argparse.ArgumentParser(
        prog="magsd replay",
        description="Repeat a result that magsd infer --audit logged; say what differs and why. " + RESEARCH_USE,
        epilog="Exit code 5: the result differs.",
    )
    _add_replay(parser)
    return _replay(parser.parse_args(argv))


def _add_replay(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "record", metavar="RECORD", help="LOG#NUMBER; or LOG: the last record of this input, also in an excerpt"
    )
    parser.add_argument("--input", required=True, metavar="FILE", help="the file that was judged")
    parser.add_argument("--bundle", metavar="DIR", help="the model (default: $MAGSD_BUNDLE, or the one in the box)")
    parser.add_argument(
        "--backend", choices=("same", *BACKENDS), default="same",
        help="same (default): the record's, or where it cannot run here auto, which is then named as a difference",
    )  # fmt: skip
    parser.add_argument("--threads", type=int, metavar="N", help="CPU threads (default: the record's)")
    add_rules(parser)
    parser.add_argument("--json", action="store_true", help="one JSON object on stdout")


def _verify(options: Any) -> int:
    from .audit import verify

    verdict = verify(options.log, head=options.head)
    if options.json:
        print(json.dumps(_as_dict(verdict), allow_nan=False), flush=True)
    else:
        print("\n".join(_lines(options, verdict)), flush=True)
    return 0 if verdict.problem is None else ArtefactError.exit_code


def _lines(options: Any, verdict: Verdict) -> list[str]:
    count = f"{verdict.records} records" if verdict.records != 1 else "1 record"
    span = f", {verdict.first_time} to {verdict.last_time}" if verdict.records else ""
    if verdict.problem is None:
        lines = [f"{options.log}: {count}{span}: each as it was written"]
    else:
        lines = [f"{options.log}: BROKEN: {verdict.problem}", f"before that {count}{span}, each as it was written"]
        if verdict.problem.torn:
            lines.append("magsd audit repair FILE notes that in the log, then it can go on")
    if verdict.repairs:
        lines.append(f"noted in the log: a write was cut off before record {_numbers(verdict.repairs)}")
    if verdict.backwards:
        lines.append(f"the clock was set back before record {_numbers(verdict.backwards)}")
    if verdict.after_head is not None:
        lines.append(f"the head that was noted is in the log, {verdict.after_head} records before its end")
    lines.append(f"head {verdict.head}")
    return lines if options.head else [*lines, _LIMITS]


def _as_dict(verdict: Verdict) -> dict[str, Any]:
    problem = verdict.problem
    return {
        "schema": "magsd.audit-verdict/1",
        "intact": problem is None,
        "records": verdict.records,
        "head": verdict.head,
        "problem": None if problem is None else {"record": problem.seq, "message": str(problem), "torn": problem.torn},
        "repairs": list(verdict.repairs),
        "clock_set_back": list(verdict.backwards),
        "first_time": verdict.first_time,
        "last_time": verdict.last_time,
        "records_after_head": verdict.after_head,
    }


def _repair(options: Any) -> int:
    from .audit import repair

    if not options.log.is_file():
        raise UsageError(f"{options.log}: no such file")
    record = repair(options.log)
    if record is None:
        print(f"{options.log}: is not torn, nothing was written")
    else:
        print(f"{options.log}: record {record['seq']} notes a write that was cut off ({record['torn']['bytes']} bytes)")
        print(f"head {record['hash']}")
    return 0


def _replay(options: Any) -> int:
    from .audit_record import hash_input
    from .replaying import find_record, replay

    digest = hash_input(options.input)["sha256"]
    if digest is None:
        raise UsageError(f"--input {options.input}: cannot be read")
    record, trouble = find_record(options.record, digest)
    if trouble is not None:
        print(f"magsd replay: as a whole, the log is an excerpt or damaged: {trouble}", file=sys.stderr)
    threads = options.threads or record["backend"]["threads"]
    with _open(options, record, threads) as pipeline:
        done = replay(record, options.input, pipeline, threads)
    print(json.dumps(done.to_dict(), allow_nan=False) if options.json else done.format(), flush=True)
    return 0 if done.same else VerificationError.exit_code


def _open(options: Any, record: dict[str, Any], threads: int) -> Pipeline:
    import cv2

    from .pipeline import Pipeline

    cv2.setNumThreads(threads)
    bundle, rules = choose_bundle(options.bundle), chosen_rules(options)
    if options.backend != "same":
        return Pipeline.open(bundle, options.backend, threads=threads, rules=rules)
    try:
        return Pipeline.open(bundle, record["backend"]["name"], threads=threads, rules=rules)
    except (BackendUnavailableError, EngineError, UsageError) as error:
        print(f"magsd replay: not on the record's backend: {error}", file=sys.stderr)
        return Pipeline.open(bundle, "auto", threads=threads, rules=rules)


def _numbers(values: tuple[int, ...]) -> str:
    return ", ".join(map(str, values[:20])) + (" and others" if len(values) > 20 else "")


def _head(text: str) -> str:
    if not re.fullmatch(r"[0-9a-f]{64}", text.lower()):
        raise argparse.ArgumentTypeError(
            "is no hash: expected the 64 hexadecimal digits that magsd audit verify prints"
        )
    return text.lower()

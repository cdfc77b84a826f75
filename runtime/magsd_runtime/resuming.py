"""Which films of a folder an earlier run of ``magsd infer --out OUT --resume`` has done: their records are there.

OUT/NAME.json      a record is written last of a film's files and in one step: a run that was killed left it or not
OUT/.resume.json   what made the records that are newer than it: bundle, rules, backend

For the file of --lines: :mod:`lines_file`.
"""

from __future__ import annotations

import contextlib
import json
import os
from pathlib import Path
from typing import Any

from .files import path_text, write_json
from .naming import OutputName

MARK = ".resume.json"
OF_THE_MACHINE = frozenset({"fault", "out_of_memory", "not_finite", "overlay_failed", "dicom_failed"})
"""Reasons that may be gone the next time."""


def settle(mark: Path, facts: dict[str, Any], *, resume: bool) -> int | None:
    """The time (of ``st_mtime_ns``) from which on records beside ``mark`` were made by what ``facts`` name.

    Where others made them, nothing there counts, and the mark is made anew. Without ``resume``: None, and a mark of
    others is removed, as what is written now is none of theirs.

    Raises
    ------
    OSError
        If the mark cannot be written.
    """
    same = made_by(mark, facts)
    if not resume:
        if not same:
            with contextlib.suppress(FileNotFoundError):
                mark.unlink()
        return None
    if not same:
        write_json(mark, facts)
    return os.stat(mark).st_mtime_ns


def made_by(mark: Path, facts: dict[str, Any]) -> bool:
    """Whether ``mark`` says that what lies beside it was made by what ``facts`` name."""
    try:
        return json.loads(mark.read_text(encoding="utf-8")) == facts
    except (OSError, ValueError):
        return False


def earlier_status(
    folder: Path, path: str | Path, name: OutputName, since: int, *, overlay: bool = False, dicom: bool = False
) -> str | None:
    """The status in the record of the film at ``path``; None where the film has to be judged.

    A record stands where it is of this film, no older than its file and than ``since``, speaks of no fault of the
    machine, and every file that it names is there; ``overlay``, ``dicom``: and it names those.
    """
    try:
        record_path = folder / f"{name.stem}.json"
        if os.stat(record_path).st_mtime_ns < max(since, os.stat(path).st_mtime_ns):
            return None
        record = json.loads(record_path.read_text(encoding="utf-8"))
        shown = name.shown or path_text(path)
        reasons, files = {reason["code"] for reason in record["reasons"]}, record["files"]
        if record["path"] != shown or reasons & OF_THE_MACHINE or not all(map(os.path.isfile, files.values())):
            return None
        status = record["status"]
        drawn = not overlay or "overlay" in files
        told = not dicom or "no_dicom_results" in reasons or bool(files.keys() - {"json", "overlay"})
        return str(status) if status == "error" or (drawn and told) else None
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None

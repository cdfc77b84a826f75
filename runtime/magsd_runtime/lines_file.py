"""The file of ``magsd infer --lines FILE``: the JSON lines of a run, gone on with after a stop by ``--resume``.

FILE                 a line a film, written whole and at once: a run that was killed left it or not
.FILE.resume.json    what made the lines: bundle, rules, backend

While a run goes on lines are only added, and the last line of a film is the one that counts. What is torn, out of order
or superseded is put right at the start and at the end of a run, in one step each. Where the system itself stops, the
last lines may be missing or torn: their films are judged again.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from .errors import UsageError
from .files import path_text, replacing
from .prediction import PREDICTION_SCHEMA
from .resuming import OF_THE_MACHINE, made_by, settle


@dataclass(frozen=True)
class _Line:
    """``start`` and ``end``: its bytes in the file, with the line break."""

    start: int
    end: int
    status: str


class LinesFile:
    """Opened for this process alone; see the module. ``add`` and ``finish`` by one thread."""

    def __init__(self, file: Path, facts: dict[str, Any], *, resume: bool) -> None:
        """``facts``: of what makes the lines. ``resume``: keep the lines that are there.

        Raises
        ------
        UsageError
            If there are lines and they are not to be kept, or others made them; if another process is at it; if it
            cannot be written.
        """
        self._file, self._superseded = file, False
        mark = file.with_name(f".{file.name}.resume.json")
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            self._lock = _lock(file)
            begun = os.path.exists(file) and os.path.getsize(file) > 0
            if begun and not resume:
                raise UsageError(f"--lines {file}: is there already: --resume goes on with it; or choose another file")
            before = os.stat(file).st_mtime_ns if begun else 0
            if begun and not made_by(mark, facts):
                raise UsageError(
                    f"--lines {file}: holds results of another bundle, calibration, backend or rules: choose another "
                    "file, or remove it"
                )
            settle(mark, facts, resume=True)
            lines = self._tidy(None, faults=False) if begun else {}
            self._since = before
            self._earlier = {path: line.status for path, line in lines.items()}
            self._out = open(file, "ab", buffering=0)  # noqa: SIM115 - closed by finish, or by the end of the process
        except OSError as error:
            raise UsageError(f"--lines {file}: cannot be written ({error.strerror or error})") from error

    def earlier_status(self, path: str) -> str | None:
        """The status in an earlier line of the film at ``path``; None where the film has to be judged: it has none, or
        its file is newer than the lines."""
        status = self._earlier.get(path_text(path))
        with suppress(OSError, ValueError):
            if status is not None and os.stat(path).st_mtime_ns > self._since:
                return None
        return status

    def add(self, line: str, path: str) -> None:
        """``line``: a prediction as JSON, ASCII; ``path``: as it names the film."""
        self._superseded |= path in self._earlier
        try:
            self._write(f"{line}\n".encode("ascii"))
        except OSError as error:
            raise UsageError(f"--lines {self._file}: cannot be written ({error.strerror or error})") from error

    def finish(self, order: Sequence[str] | None) -> None:
        """Once no more is added. ``order``: the films' paths in the order in which their lines shall be."""
        try:
            os.fsync(self._out.fileno())
            if self._superseded or (self._earlier and order is not None):
                self._tidy(None if order is None else map(path_text, order), faults=True)
            self._out.close()
        except OSError as error:
            raise UsageError(f"--lines {self._file}: cannot be written ({error.strerror or error})") from error

    def _write(self, data: bytes) -> None:
        view = memoryview(data)
        while view:
            view = view[self._out.write(view) :]

    def _tidy(self, order: Iterable[str] | None, *, faults: bool) -> dict[str, _Line]:
        """The last good line of each film, and the file rewritten if it is anything else: films that ``order`` does not
        name first, the others in that order. ``faults``: keep lines that speak of a fault of the machine."""
        with open(self._file, "rb") as file:
            lines = _read(file, faults=faults)
            places = {} if order is None else {path: place for place, path in enumerate(order)}
            kept = sorted(lines, key=lambda path: (places.get(path, -1), lines[path].start))
            end = 0
            for path in kept:
                if lines[path].start != end:
                    break
                end = lines[path].end
            else:
                if end < os.fstat(file.fileno()).st_size:
                    os.truncate(self._file, end)  # needs no room for a second file: the disk may be full
                return lines
            with replacing(self._file) as temporary, open(temporary, "wb") as out:
                for path in kept:
                    file.seek(lines[path].start)
                    out.write(file.read(lines[path].end - lines[path].start))
            return {path: lines[path] for path in kept}


def _read(file: BinaryIO, *, faults: bool) -> dict[str, _Line]:
    """By path: the last good line of each film; none where that speaks of a fault of the machine, unless ``faults``."""
    found: dict[str, _Line] = {}
    end = 0
    for raw in file:
        start, end = end, end + len(raw)
        try:
            value = json.loads(raw)
            path, status = value["path"], value["status"]
            faulty = not OF_THE_MACHINE.isdisjoint(reason["code"] for reason in value["reasons"])
            good = raw.endswith(b"\n") and value["schema"] == PREDICTION_SCHEMA and isinstance(status, str)
        except (ValueError, KeyError, TypeError):
            continue
        if isinstance(path, str) and good:
            found.pop(path, None)
            if faults or not faulty:
                found[path] = _Line(start, end, status)
    return found


def _lock(file: Path) -> BinaryIO | None:
    """Held until the process ends; None where the system has no locks."""
    try:
        import fcntl
    except ImportError:  # Windows
        return None
    lock = open(file.with_name(f".{file.name}.lock"), "ab")  # noqa: SIM115
    try:
        fcntl.flock(lock.fileno(), fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        lock.close()
        raise UsageError(f"--lines {file}: another magsd infer writes it") from error
    except OSError:  # a file system without locks
        pass
    return lock

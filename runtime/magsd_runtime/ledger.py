"""What the watcher has dealt with: one line for each outcome, only ever appended.

A line that is here is true for ever: its result was complete on the disk before the line was written. Nothing in it
names a file: contents by SHA-256, DICOM instances by the SHA-256 of their UID, files by what ``stat`` says of them.
"""

from __future__ import annotations

import json
import os
from collections import Counter
from contextlib import suppress
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import NamedTuple

from .audit import utc_now
from .files import sync_folder

DONE, QUARANTINED, DUPLICATE, AGAIN, RETRY = "done", "quarantined", "duplicate", "again", "retry"


class Identity(NamedTuple):
    """What tells that a file has not been touched, over restarts too; the device's number is not stable over them."""

    inode: int
    size: int
    mtime_ns: int
    ctime_ns: int


@dataclass(frozen=True)
class Entry:
    """``kind``: ``done`` (there is a result), ``quarantined``, ``duplicate`` (the DICOM instance and the pixels of
    another content), ``again`` (a further file with a known content), ``retry`` (its quarantine was lifted).

    ``content``: SHA-256 of the file. ``status``: of the result. ``instance``: SHA-256 of the SOP Instance UID and
    ``pixels`` that of the decoded pixels, for DICOM. ``identity``: of the file that brought the content.
    """

    kind: str
    content: str
    status: str = ""
    instance: str | None = None
    pixels: str | None = None
    identity: Identity | None = None
    time: str = ""


_FIELDS = frozenset(field.name for field in fields(Entry))  # a later magsd may write more


class Ledger:
    """The lines of ``path``, and what they say together. One process writes; see ``outbox``'s lock.

    ``damaged``: lines that could not be read (a disk fault, or a write that was cut off); they are passed over.
    ``counts``: lines by kind, and results by ``status``.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        """Read the ledger, or begin one. Raises OSError."""
        self._path = Path(path)
        self._states: dict[str, str] = {}
        self._identities: dict[Identity, str] = {}
        self._instances: dict[tuple[str, str], str] = {}
        self.damaged = 0
        self.counts: Counter[str] = Counter()
        self.statuses: Counter[str] = Counter()
        self._ends_clean = True
        if self._path.exists():
            with open(self._path, "rb") as file:
                for line in file:
                    self._read(line)
        else:
            self._path.touch()
            sync_folder(self._path.parent)

    def state(self, content: str) -> str | None:
        """``done``, ``quarantined`` or ``duplicate``; None for a content that is not dealt with."""
        return self._states.get(content)

    def content_of(self, identity: Identity) -> str | None:
        """The content of a file that was dealt with and has not been touched since."""
        return self._identities.get(identity)

    def twin(self, instance: str, pixels: str) -> str | None:
        """The content that was judged for this DICOM instance with these pixels."""
        return self._instances.get((instance, pixels))

    def append(self, entry: Entry) -> None:
        """Write one line; when this returns it is on the disk. Raises OSError, and then the line is not there."""
        entry = replace(entry, time=entry.time or utc_now())
        values = {name: value for name, value in vars(entry).items() if value not in (None, "")}
        line = json.dumps(values, separators=(",", ":")).encode() + b"\n"
        descriptor = os.open(self._path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o666)
        try:
            size = os.fstat(descriptor).st_size
            try:
                # A line that a kill cut off ends here, and is passed over when the ledger is read
                _write_all(descriptor, line if self._ends_clean else b"\n" + line)
                os.fsync(descriptor)
            except OSError:
                with suppress(OSError):
                    os.ftruncate(descriptor, size)
                self._ends_clean = size == 0 or self._last_byte() == b"\n"
                raise
        finally:
            os.close(descriptor)
        self._ends_clean = True
        self._take(entry)

    def _last_byte(self) -> bytes:
        try:
            with open(self._path, "rb") as file:
                file.seek(-1, os.SEEK_END)
                return file.read(1)
        except OSError:
            return b""

    def _read(self, line: bytes) -> None:
        self._ends_clean = line.endswith(b"\n")
        if line == b"\n":
            return
        try:
            values = json.loads(line)
            if values.get("identity") is not None:
                values["identity"] = Identity(*values["identity"])
            entry = Entry(**{name: value for name, value in values.items() if name in _FIELDS})
            if not isinstance(entry.content, str) or not isinstance(entry.kind, str):
                raise TypeError
        except (ValueError, TypeError, AttributeError, RecursionError):
            self.damaged += 1
            return
        self._take(entry)

    def _take(self, entry: Entry) -> None:
        self.counts[entry.kind] += 1
        if entry.kind == DONE:
            self.statuses[entry.status] += 1
        if entry.kind == RETRY:
            self._states.pop(entry.content, None)
            self._identities = {key: value for key, value in self._identities.items() if value != entry.content}
            return
        if entry.identity is not None:
            self._identities[entry.identity] = entry.content
        if entry.kind != AGAIN:
            self._states[entry.content] = entry.kind
        if entry.kind == DONE and entry.instance and entry.pixels:
            self._instances[entry.instance, entry.pixels] = entry.content


def _write_all(descriptor: int, data: bytes) -> None:
    rest = memoryview(data)
    while rest:
        rest = rest[os.write(descriptor, rest) :]

"""A folder into which others put files, looked at again and again: which of them are finished?

A file is finished when its size, its times and its inode have stayed the same for the settle time, by our own clock:
the times of a copied file may be years old, and the clock of a file server may be wrong. Polling sees what comes over
a network share too, where notifications do not.
"""

from __future__ import annotations

import hashlib
import heapq
import os
import stat
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from .ledger import Identity

# What senders call a file until it is complete: rsync and most others hide it, browsers and scp clients add these
_UNFINISHED = (
    ".tmp", ".temp", ".part", ".partial", ".filepart", ".crdownload", ".download", ".upload", ".uploading",
    ".incomplete", ".writing", ".lock", ".swp", "~",
)  # fmt: skip
_NEVER = float("inf")


@dataclass(frozen=True)
class Candidate:
    """A file that seems finished; ``unchanged_for`` in seconds."""

    path: Path
    identity: Identity
    unchanged_for: float


@dataclass
class _Seen:
    identity: Identity
    since: float
    not_before: float = 0.0


class Inbox:
    """``folder`` and what is below it, without hidden files and folders, unfinished names and links.

    After :meth:`scan`: ``waiting`` counts files that are not finished or were put off, ``ready`` those that are.
    """

    def __init__(self, folder: str | os.PathLike[str], *, settle: float, clock: Callable[[], float]) -> None:
        self.folder = Path(folder)
        self.waiting = self.ready = 0
        self._settle = settle
        self._clock = clock
        self._files: dict[Path, _Seen] = {}

    def scan(self, limit: int) -> list[Candidate]:
        """The finished files that nobody has dealt with, at most ``limit``, the oldest first.

        Raises
        ------
        OSError
            If the folder itself cannot be listed.
        """
        now = self._clock()
        files: dict[Path, _Seen] = {}
        for path, found in _regular_files(self.folder):
            seen = self._files.get(path)
            files[path] = seen if seen is not None and seen.identity == found else _Seen(found, now)
        self._files = files
        ready = [
            Candidate(path, seen.identity, now - seen.since)
            for path, seen in files.items()
            if now - seen.since >= self._settle and now >= seen.not_before
        ]
        self.ready = len(ready)
        self.waiting = sum(seen.not_before != _NEVER for seen in files.values()) - len(ready)
        return heapq.nsmallest(limit, ready, key=lambda one: (one.identity.mtime_ns, one.path))

    def settle(self, candidate: Candidate) -> None:
        """It has been dealt with: not a candidate again until it changes."""
        self.put_off(candidate, _NEVER)

    def put_off(self, candidate: Candidate, seconds: float) -> None:
        """Not a candidate for ``seconds``, unless it changes."""
        seen = self._files.get(candidate.path)
        if seen is not None and seen.identity == candidate.identity:
            seen.not_before = self._clock() + seconds


def identity(path: str | os.PathLike[str]) -> Identity:
    """What ``stat`` says of a file itself, not of what a link leads to. Raises OSError."""
    return _identity(os.stat(path, follow_symlinks=False))


def _identity(status: os.stat_result) -> Identity:
    return Identity(status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns)


def instance_key(path: str | os.PathLike[str]) -> str | None:
    """SHA-256 of a DICOM file's SOP Instance UID; None for any other file, and where there is none to be read."""
    try:
        from .dicom_results.source import is_dicom, quiet

        if not is_dicom(path):
            return None
        from pydicom.filereader import read_partial

        with open(path, "rb") as file, quiet():
            # (0008,0018) comes before anything that can be nested or large
            header = read_partial(file, lambda tag, *_: tag > 0x00080018, force=True)
            uid = str(header.get("SOPInstanceUID") or "").strip(" \0")
    except Exception:  # no pydicom, or one of the many errors of a damaged header: it has no UID that counts
        return None
    return hashlib.sha256(uid.encode()).hexdigest() if uid else None


def _regular_files(folder: Path) -> Iterator[tuple[Path, Identity]]:
    folders = [folder]
    while folders:
        here = folders.pop()
        try:
            entries = os.scandir(here)
        except OSError:
            if here == folder:
                raise
            continue  # removed or closed to us: its files come back when it does
        with entries:
            for entry in entries:
                name = entry.name
                if name.startswith((".", "~")) or name.lower().endswith(_UNFINISHED):
                    continue
                try:
                    status = entry.stat(follow_symlinks=False)
                except OSError:
                    continue  # gone meanwhile
                if stat.S_ISDIR(status.st_mode):
                    folders.append(Path(entry.path))
                elif stat.S_ISREG(status.st_mode):
                    yield Path(entry.path), _identity(status)

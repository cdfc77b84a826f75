"""Where the watcher's results go, one folder each, and how none is lost or doubled.

    OUT/results/HASH/      prediction.json, overlay.jpg     HASH: SHA-256 of the input file
    OUT/quarantine/HASH/   reason.json, input
    OUT/state/             ledger.jsonl, lock, staging/HASH/, attempts/HASH, work/

A result is written to ``staging`` and waits there until every byte is on the disk; then the ledger gets its line;
then one rename makes it visible. Cut off before the line, the input is judged again; after it, the next start does
the rename. The line comes before the rename so that a result that somebody takes away at once is not made twice.

DICOM results wait in ``staging/HASH/dicom`` and are moved into their own folder one by one, before the rest is shown.
"""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any

from .errors import UsageError
from .files import sync_folder, write_json
from .images import EXTENSIONS
from .ledger import DONE, QUARANTINED, Entry, Ledger

_KNOWN_SUFFIXES = frozenset(suffix for known in EXTENSIONS.values() for suffix in known) | {".dcm"}
_HEX = frozenset("0123456789abcdef")


class Outbox:
    """The folder ``OUT``. Methods raise OSError when the disk is full or gone; each can be called again."""

    def __init__(self, folder: str | os.PathLike[str], *, dicom_out: str | os.PathLike[str] | None = None) -> None:
        """Make the folders and take the lock. ``dicom_out``: where DICOM results go; None where none are made.

        Raises
        ------
        UsageError
            If the folders cannot be made, or another watcher works here.
        """
        self.folder = Path(folder)
        self.dicom_out = None if dicom_out is None else Path(dicom_out)
        self.results, self.quarantine = self.folder / "results", self.folder / "quarantine"
        state = self.folder / "state"
        self._staging, self._attempts, self._work = state / "staging", state / "attempts", state / "work"
        try:
            for path in (self.results, self.quarantine, self._staging, self._attempts, self._work):
                path.mkdir(parents=True, exist_ok=True)
            self._lock = _lock(state / "lock", self.folder)
            self.ledger = Ledger(state / "ledger.jsonl")
        except OSError as error:
            raise UsageError(f"--out {self.folder}: cannot write there ({error.strerror or error})") from error
        try:
            if self.dicom_out is not None:
                self.dicom_out.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            self.close()
            raise UsageError(f"--dicom-out {self.dicom_out}: no folder can be made there ({error.strerror})") from error

    def close(self) -> None:
        """Give the lock back."""
        self._lock.close()

    # --- after a kill, and after an error ---

    def recover(self) -> int:
        """Put right what was cut off: publish what has its line, remove what has none. Returns how many there were.

        A result without a line, from a ledger that was lost, gets its line; it is not made again.
        """
        count = 0
        # Half-written status files: those in staging go with it
        for path in (*self._work.iterdir(), *self.folder.glob(".status.json.*"), *self.folder.glob(".metrics.prom.*")):
            path.unlink()
        for path in list(self._staging.iterdir()):
            if self.ledger.state(path.name) in (DONE, QUARANTINED):
                self._publish(path.name)
            else:
                shutil.rmtree(path)
            count += 1
        for folder, kind, name in (
            (self.results, DONE, "prediction.json"),
            (self.quarantine, QUARANTINED, "reason.json"),
        ):
            for path in folder.iterdir():
                if _is_hash(path.name) and self.ledger.state(path.name) is None and (path / name).is_file():
                    self.ledger.append(Entry(kind, path.name, _status(path / name)))
                    count += 1
        for path in self._attempts.iterdir():
            if self.ledger.state(path.name) is not None:
                path.unlink()
        return count

    # --- one input ---

    def begin(self, content: str) -> None:
        """Note that ``content`` is being judged: an input that brings the process down must not do so for ever."""
        with open(self._attempts / content, "ab") as file:
            file.write(b".")

    def attempts(self, content: str) -> int:
        """How often ``content`` was begun and not ended."""
        try:
            return (self._attempts / content).stat().st_size
        except FileNotFoundError:
            return 0

    def end(self, content: str) -> None:
        """The process has survived ``content``."""
        (self._attempts / content).unlink(missing_ok=True)

    @contextmanager
    def private_name(self, path: Path, content: str) -> Iterator[Path]:
        """A name for the input that holds no more than its hash, for nothing that is made of it may hold another."""
        suffix = path.suffix.lower()
        name = self._work / (content + (suffix if suffix in _KNOWN_SUFFIXES else ""))
        name.unlink(missing_ok=True)
        try:
            try:
                name.symlink_to(path.absolute())
            except OSError:  # a file system without links
                shutil.copyfile(path, name)
            yield name
        finally:
            name.unlink(missing_ok=True)

    def commit(self, entry: Entry, write: Callable[[Path], None]) -> None:
        """Make the folder of ``entry.content`` by ``write(folder)``, then its line, then show it."""
        staged = self._staging / entry.content
        if staged.exists():
            shutil.rmtree(staged)
        staged.mkdir()
        try:
            write(staged)
            _sync_tree(staged)
            sync_folder(self._staging)
        except BaseException:
            shutil.rmtree(staged, ignore_errors=True)
            raise
        # Should this fail, the folder stays: a failing disk may have kept the line that it says it has not
        self.ledger.append(entry)
        self._publish(entry.content)

    def _publish(self, content: str) -> None:
        folder = self.results if self.ledger.state(content) == DONE else self.quarantine
        staged, target = self._staging / content, folder / content
        if staged.exists():
            if self.dicom_out is not None and (staged / "dicom").exists():
                _hand_out(staged / "dicom", self.dicom_out)
            if target.exists():  # put back by hand, or left by a ledger that was lost: the newer one counts
                shutil.rmtree(target)
            os.rename(staged, target)
            sync_folder(folder)
            sync_folder(self._staging)

    # --- quarantine ---

    def is_lifted(self, content: str) -> bool:
        """Whether somebody removed a content's folder from the quarantine, so that it may be tried again."""
        return not (self.quarantine / content).exists()

    def take_in(self, path: Path, content: str) -> None:
        """Move an input beside the reason why it is in quarantine; where it cannot be moved, it stays."""
        folder = self.quarantine / content
        if any(folder.glob("input*")):
            return
        suffix = path.suffix.lower()
        target = folder / ("input" + (suffix if suffix in _KNOWN_SUFFIXES else ""))
        try:
            os.rename(path, target)
        except OSError:  # another file system, or a folder that we may not change
            temporary = folder / ".input"
            try:
                shutil.copyfile(path, temporary)
                with open(temporary, "rb") as file:
                    os.fsync(file.fileno())
                os.rename(temporary, target)
            finally:
                temporary.unlink(missing_ok=True)
            sync_folder(folder)
            with suppress(OSError):
                path.unlink()
        else:
            sync_folder(folder)


def write_reason(folder: Path, content: str, code: str, message: str, size: int, time: str) -> None:
    """``reason.json`` of a quarantined input."""
    write_json(
        folder / "reason.json",
        {
            "schema": "magsd.quarantine/1",
            "sha256": content,
            "bytes": size,
            "time": time,
            "code": code,
            "message": message,
            "research_use_only": True,
        },
    )


def _hand_out(staged: Path, target: Path) -> None:
    """Move the files of ``staged`` into ``target``, each whole and by one rename, and remove the empty folder.

    Between two file systems a file is copied first. A kill before the original is gone makes the next start copy it
    again: the same bytes under the same name.
    """
    try:
        for path in sorted(staged.iterdir()):
            try:
                os.rename(path, target / path.name)
            except OSError as error:
                if error.errno != errno.EXDEV:
                    raise
                temporary = target / f".{path.name}"
                try:
                    shutil.copyfile(path, temporary)
                    with open(temporary, "rb") as file:
                        os.fsync(file.fileno())
                    os.rename(temporary, target / path.name)
                finally:
                    temporary.unlink(missing_ok=True)
                sync_folder(target)
                path.unlink()
        sync_folder(target)
        staged.rmdir()
    except OSError as error:
        raise OSError(
            error.errno, f"--dicom-out cannot be written: {error.strerror or type(error).__name__}"
        ) from error


def _sync_tree(folder: Path) -> None:
    for parent, _, names in os.walk(folder):
        for name in names:
            descriptor = os.open(os.path.join(parent, name), os.O_RDONLY)
            try:
                os.fsync(descriptor)
            finally:
                os.close(descriptor)
        sync_folder(parent)


def _status(path: Path) -> str:
    try:
        value: Any = json.loads(path.read_text(encoding="utf-8"))
        return str(value.get("status", "")) if isinstance(value, dict) else ""
    except (OSError, ValueError):
        return ""


def _is_hash(name: str) -> bool:
    return len(name) == 64 and set(name) <= _HEX


def _lock(path: Path, folder: Path) -> IO[bytes]:
    try:
        import fcntl
    except ImportError as error:  # Windows
        raise UsageError("magsd watch needs the file locks of POSIX, which this system does not have") from error
    file = open(path, "ab")  # noqa: SIM115 - held for as long as we run
    try:
        fcntl.flock(file.fileno(), fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        file.close()
        raise UsageError(f"--out {folder}: another magsd watch works there") from error
    return file

"""An append-only log of what was computed: one JSON line a record, each with the hash of the record before.

    line = canonical JSON of {schema, kind, seq, time, previous, ..., hash}      ASCII, keys sorted, no spaces

``seq`` counts from 1. ``hash`` is the SHA-256 of the record's canonical JSON without ``hash``, ``previous`` the
``hash`` of the record before (64 zeros in the first). An edit breaks a record's own hash, a deletion, insertion or
exchange the count or the chain.

What a chain cannot show: records missing at the end, or a log written anew from some record on by somebody who
computes the hashes as we do. Both show where the last hash, the *head*, is kept elsewhere.

A write that was cut off (a kill, a power cut) leaves a torn end. Nothing is appended after it until a record says so:
``repair`` closes the torn bytes by ``#torn`` and appends a record with their number and hash. No byte is ever removed.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import IO, Any

from .errors import ArtefactError, UsageError
from .files import sync_folder

AUDIT_SCHEMA = "magsd.audit/1"
NO_RECORD = "0" * 64
LONGEST_LINE = 1 << 20  # bytes; records of predictions have about 2,000
_TORN = b"#torn\n"  # closes torn bytes; no canonical JSON ends so
_RESERVED = ("schema", "kind", "seq", "time", "previous", "hash")


class BrokenChainError(ArtefactError):
    """The log is not as it was written, from record ``seq`` on, at byte ``offset`` of the file.

    ``torn``: it only ends in the middle of a write, which :func:`repair` can note.
    """

    def __init__(self, message: str, seq: int, offset: int, *, torn: bool = False) -> None:
        super().__init__(message)
        self.seq, self.offset, self.torn = seq, offset, torn


@dataclass(frozen=True)
class Verdict:
    """What :func:`verify` found. ``records`` and ``head`` (hash of the last one) are of the unbroken part.

    ``problem`` is None when every record is as it was written. ``repairs``: numbers of the records that note a
    torn write. ``backwards``: numbers of records dated before the one before them, which is a clock that was set.
    ``after_head``: records since the head that was asked for, None when none was.
    """

    records: int
    head: str
    problem: BrokenChainError | None = None
    repairs: tuple[int, ...] = ()
    backwards: tuple[int, ...] = ()
    first_time: str | None = None
    last_time: str | None = None
    after_head: int | None = None


def canonical(value: object) -> bytes:
    """One spelling for one value: sorted keys, no spaces, ASCII. Raises ValueError for NaN and infinities."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False).encode("ascii")


def sha256_of(value: object) -> str:
    """SHA-256 of the canonical JSON."""
    return hashlib.sha256(canonical(value)).hexdigest()


def utc_now() -> str:
    """``2026-11-23T11:47:51.123Z``."""
    return datetime.now(timezone.utc).isoformat(timespec="milliseconds").replace("+00:00", "Z")


def append(path: str | os.PathLike[str], kind: str, facts: Mapping[str, Any]) -> dict[str, Any]:
    """Append one record and return it when it is on the disk. Any number of processes may append at once.

    Raises
    ------
    BrokenChainError
        If the log's end is torn or damaged: nothing is written after it.
    UsageError
        If the file cannot be locked or written; a part that was written is taken back.
    """
    path = Path(path)
    with _locked(path) as file:
        line = _sealed(kind, facts, _last_record(file, path))
        _write(file, line, path)
    return json.loads(line)


def check_appendable(path: str | os.PathLike[str]) -> None:
    """Raise now what :func:`append` would raise later. Makes an empty log where there is none."""
    with _locked(Path(path)) as file:
        _last_record(file, Path(path))


def repair(path: str | os.PathLike[str]) -> dict[str, Any] | None:
    """Note a torn end in a record of its own and return that; None when the log is whole.

    Raises
    ------
    BrokenChainError
        If the log is damaged otherwise: a repair must not cover an edit.
    """
    path = Path(path)
    with _locked(path) as file:
        last = None
        try:
            file.seek(0)
            for record in walk(file):
                last = record
        except BrokenChainError as error:
            if not error.torn:
                raise BrokenChainError(
                    f"{path}: {error}; this is no torn end, it cannot be repaired: keep the file, begin a new log",
                    error.seq,
                    error.offset,
                ) from error
            file.seek(error.offset)
            torn = file.read() + _TORN
            note = {"torn": {"bytes": len(torn), "sha256": hashlib.sha256(torn).hexdigest()}}
            line = _sealed("repair", note, last)
            _write(file, _TORN + line, path)
            return json.loads(line)
    return None


def verify(path: str | os.PathLike[str], *, head: str | None = None) -> Verdict:
    """Check every record. With ``head``, also that the log still holds the record of that hash.

    Raises
    ------
    UsageError
        If the file cannot be read.
    """
    records, last_hash, first_time, last_time = 0, NO_RECORD, None, None
    repairs: list[int] = []
    backwards: list[int] = []
    head_at = 0 if head == NO_RECORD else None
    problem = None
    try:
        with open(path, "rb") as file, _shared(file):
            for record in walk(file):
                records, last_hash = record["seq"], record["hash"]
                if record["kind"] == "repair":
                    repairs.append(records)
                if last_time is not None and record["time"] < last_time:
                    backwards.append(records)
                first_time, last_time = first_time or record["time"], record["time"]
                head_at = records if last_hash == head else head_at
    except BrokenChainError as error:
        problem = error
    except OSError as error:
        raise UsageError(f"{path}: cannot be read ({error.strerror or error})") from error
    if problem is None and head is not None and head_at is None:
        message = f"no record has the head {head}: the log was cut off, written anew, or is another one"
        problem = BrokenChainError(message, records + 1, 0)
    after_head = None if head_at is None else records - head_at
    return Verdict(records, last_hash, problem, tuple(repairs), tuple(backwards), first_time, last_time, after_head)


def walk(file: IO[bytes]) -> Iterator[dict[str, Any]]:
    """Yield the records from the start as long as the chain holds.

    Raises
    ------
    BrokenChainError
        At the first record that is not as it was written.
    """
    seq, previous, offset = 0, NO_RECORD, file.tell()
    torn, torn_bytes, reason = hashlib.sha256(), 0, ""
    while line := file.readline(LONGEST_LINE):
        try:
            record = read_record(line)
            if torn_bytes and not _notes(record, torn_bytes, torn.hexdigest()):
                raise BrokenChainError(f"record {seq + 1} {reason}", seq + 1, offset)
            _check_place(record, seq + 1, previous, offset)
        except _UnreadableError as error:
            # It may be a write that was cut off: closed and noted by a repair, or the last bytes of the file
            reason = reason or str(error)
            at_end = not line.endswith(b"\n") and len(line) < LONGEST_LINE
            if not (line.endswith(_TORN) or at_end):
                raise BrokenChainError(f"record {seq + 1} {reason}", seq + 1, offset) from error
            torn.update(line)
            torn_bytes += len(line)
            continue
        yield record
        seq, previous, offset = seq + 1, record["hash"], file.tell()
        torn, torn_bytes, reason = hashlib.sha256(), 0, ""
    if torn_bytes:
        message = f"record {seq + 1} is torn: {torn_bytes} bytes of a write that was cut off end the file"
        raise BrokenChainError(message, seq + 1, offset, torn=True)


class _UnreadableError(ArtefactError):
    """A line that is no record as we write them."""


def read_record(line: bytes) -> dict[str, Any]:
    """The record in one line, whose own hash holds; its place in the chain is not looked at.

    Raises
    ------
    ArtefactError
        With words that go on after "record 7 ".
    """
    if not line.endswith(b"\n"):
        raise _UnreadableError("does not end: its line has no line break")
    text = line[:-1]
    try:
        record = json.loads(text.decode("ascii"))
        as_written = isinstance(record, dict) and canonical(record) == text
    except (ValueError, RecursionError):
        raise _UnreadableError("was edited: it is not JSON") from None
    if not as_written:
        raise _UnreadableError("was edited: it is not in the form in which records are written")
    schema = record.get("schema")
    if schema != AUDIT_SCHEMA:
        raise _UnreadableError(f"has the schema {schema!a}: this magsd reads {AUDIT_SCHEMA}")
    if record.get("hash") != sha256_of({name: value for name, value in record.items() if name != "hash"}):
        raise _UnreadableError("was edited: its hash is not that of its content")
    if not all(isinstance(record.get(name), str) for name in ("kind", "time", "previous")):
        raise _UnreadableError("has no kind, time or hash of the record before")
    if type(record.get("seq")) is not int or record["seq"] < 1:
        raise _UnreadableError("has no number")
    return record


def _check_place(record: dict[str, Any], seq: int, previous: str, offset: int) -> None:
    found = record["seq"]
    if found == seq and record["previous"] == previous:
        return
    if found > seq:
        missing = f"record {seq} is" if found == seq + 1 else f"records {seq} to {found - 1} are"
        message = f"{missing} missing: record {found} stands in its place"
    elif found < seq:
        message = f"record {seq} is not there: another record {found} stands in its place"
    else:
        message = f"record {seq} does not continue the record before it: one of the two was replaced"
    raise BrokenChainError(message, seq, offset)


def _notes(record: dict[str, Any], size: int, digest: str) -> bool:
    return record["kind"] == "repair" and record.get("torn") == {"bytes": size, "sha256": digest}


def _sealed(kind: str, facts: Mapping[str, Any], last: dict[str, Any] | None) -> bytes:
    if clash := set(facts) & set(_RESERVED):
        raise ValueError(f"facts hold {sorted(clash)}, which the log sets itself")
    record = {
        "schema": AUDIT_SCHEMA,
        "kind": kind,
        "seq": 1 if last is None else last["seq"] + 1,
        "time": utc_now(),
        "previous": NO_RECORD if last is None else last["hash"],
        **facts,
    }
    line = canonical({**record, "hash": sha256_of(record)}) + b"\n"
    if len(line) > LONGEST_LINE:
        raise ValueError(f"a record of {len(line)} bytes: at most {LONGEST_LINE}")
    return line


def _last_record(file: IO[bytes], path: Path) -> dict[str, Any] | None:
    """The last record, by itself: checking the whole chain for each append would make long logs slow."""
    size = file.seek(0, os.SEEK_END)
    if size == 0:
        return None
    file.seek(max(0, size - LONGEST_LINE - 1))
    line = file.read().removesuffix(b"\n").rpartition(b"\n")[2] + b"\n"
    file.seek(size - 1)
    if file.read(1) != b"\n" or line.endswith(_TORN):
        raise BrokenChainError(
            f"{path}: ends in the middle of a record, a write was cut off: "
            "magsd audit repair FILE notes that in the log, then it can go on",
            0,
            size,
            torn=True,
        )
    try:
        return read_record(line)
    except _UnreadableError as error:
        raise BrokenChainError(
            f"{path}: the last record {error}: nothing is appended to a damaged log, see magsd audit verify FILE",
            0,
            size,
        ) from error


def _write(file: IO[bytes], data: bytes, path: Path) -> None:
    """Append ``data`` and wait until it is on the disk, or take back what was written of it."""
    size = os.fstat(file.fileno()).st_size
    try:
        rest = memoryview(data)
        while rest:  # a full disk takes a part first
            rest = rest[os.write(file.fileno(), rest) :]
        os.fsync(file.fileno())
    except OSError as error:
        # Nobody has seen it, the lock is ours. Where the file may only grow, the end stays torn, and shows.
        with suppress(OSError):
            os.ftruncate(file.fileno(), size)
        raise UsageError(f"{path}: the audit log cannot be written ({error.strerror or error})") from error
    if size == 0:
        sync_folder(path.parent)


@contextmanager
def _locked(path: Path) -> Iterator[IO[bytes]]:
    """The log, opened to append, for this process alone."""
    try:
        import fcntl
    except ImportError as error:  # Windows
        raise UsageError("an audit log needs the file locks of POSIX, which this system does not have") from error
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o666)
    except OSError as error:
        raise UsageError(f"{path}: the audit log cannot be opened ({error.strerror or error})") from error
    with open(descriptor, "rb") as file:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX)  # released when the file is closed, also by a kill
        except OSError as error:
            raise UsageError(f"{path}: the audit log cannot be locked ({error.strerror or error})") from error
        yield file


@contextmanager
def _shared(file: IO[bytes]) -> Iterator[None]:
    """No record is half written while we read, if the file system has locks."""
    with suppress(ImportError, OSError):
        import fcntl

        fcntl.flock(file.fileno(), fcntl.LOCK_SH)
    yield

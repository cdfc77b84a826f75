"""Writing files so that a reader never meets half of one, and hashing them."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO


@contextmanager
def replacing(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Yield a temporary name beside ``path``; rename it to ``path`` when the block succeeds.

    The rename is atomic (POSIX ``rename``), so ``path`` holds the old content, or the new,
    never a part. On an exception the temporary file is removed and ``path`` is untouched.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = _temporary_name(path)
    # Not mkstemp: its files are 0600, and others must be able to read ours as the umask allows
    os.close(os.open(temporary, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666))
    try:
        yield temporary
        with open(temporary, "rb") as written:
            os.fsync(written.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def replacing_directory(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Yield an empty temporary directory beside ``path``; rename it to ``path`` on success.

    Raises
    ------
    FileExistsError
        If ``path`` exists: a finished directory is never overwritten.
    """
    path = Path(path)
    if path.exists():
        raise FileExistsError(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = _temporary_name(path)
    temporary.mkdir()
    try:
        yield temporary
        os.rename(temporary, path)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def write_text(path: str | os.PathLike[str], text: str) -> None:
    """Replace ``path`` by ``text`` (UTF-8) in one step."""
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: str | os.PathLike[str], value: Any) -> None:
    """Replace ``path`` by ``value`` as indented JSON in one step. NaN is refused: it is not JSON."""
    text = json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False)
    try:
        text.encode()
    except UnicodeEncodeError:  # a file name that is not UTF-8, as Python decodes it
        text = json.dumps(value, indent=2, ensure_ascii=True, allow_nan=False)
    write_text(path, text + "\n")


def sync_folder(path: str | os.PathLike[str]) -> None:
    """Wait until the names in folder ``path`` are on the disk: a rename alone does not survive a power cut."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def path_text(path: str | os.PathLike[str]) -> str:
    """The path as text that every JSON reader takes: bytes that are no UTF-8 become ``\\udcXX``."""
    return os.fspath(path).encode("utf-8", "backslashreplace").decode("utf-8")


def sha256_file(path: str | os.PathLike[str]) -> str:
    """SHA-256 of a file's bytes, as 64 hexadecimal digits."""
    with open(path, "rb") as file:
        ahead = _AHEAD.pop(_identity(file), None) if _AHEAD else None
        return (ahead.wait() if ahead is not None else None) or _digest(file, bytearray(1 << 20))


def hash_ahead(paths: Iterable[str | os.PathLike[str]]) -> None:
    """Begin to hash files in a thread, one after the other; :func:`sha256_file` of each then waits for that, once.

    For a start that has else to do: hashing lets other threads run. A file that was changed or replaced meanwhile is
    hashed anew; one that cannot be read is left to whoever asks for it.
    """
    begun = []
    for path in paths:
        with contextlib.suppress(OSError, ValueError):
            if os.path.isfile(path):  # opening a pipe would wait for its writer
                file = open(path, "rb")  # noqa: SIM115  the thread closes it
                ahead = _AHEAD[_identity(file)] = _Ahead(file)
                begun.append(ahead)
    if begun:
        threading.Thread(target=_work, args=(begun,), daemon=True).start()


def _work(begun: list[_Ahead]) -> None:
    # Few and large blocks: after each the thread waits for Python's lock, up to 5 ms (sys.getswitchinterval)
    buffer = bytearray(8 << 20)
    for ahead in begun:
        ahead.work(buffer)


class _Ahead:
    """A file that is being hashed."""

    def __init__(self, file: BinaryIO) -> None:
        self._file, self._done, self._digest = file, threading.Event(), ""

    def work(self, buffer: bytearray) -> None:
        try:
            with self._file:
                self._digest = _digest(self._file, buffer)
        except OSError:
            pass
        finally:
            self._done.set()

    def wait(self) -> str:
        """The digest; empty if the file could not be read."""
        self._done.wait()
        return self._digest


_AHEAD: dict[tuple[int, ...], _Ahead] = {}
"""By the file's identity: a name may have become another file's."""


def _identity(file: BinaryIO) -> tuple[int, ...]:
    status = os.fstat(file.fileno())
    return (status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns)


def _digest(file: BinaryIO, buffer: bytearray) -> str:
    digest, view = hashlib.sha256(), memoryview(buffer)
    while count := file.readinto(buffer):  # type: ignore[attr-defined]
        digest.update(view[:count])
    return digest.hexdigest()


def _temporary_name(path: Path) -> Path:
    # Hidden and random, with the suffix that writers look at, and never longer than a name may be
    return path.with_name(f".{path.name[:32]}.{os.urandom(6).hex()}{path.suffix[:16]}")

"""files.py: a reader meets the old content or the new, never a part."""

from __future__ import annotations

import hashlib
import json
import os
import signal
import stat
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest

from magsd_runtime import files
from magsd_runtime.files import hash_ahead, replacing, replacing_directory, sha256_file, write_json, write_text


class Interrupted(Exception):
    pass


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_replacing_makes_parents_and_keeps_the_suffix(tmp_path: Path) -> None:
    path = tmp_path / "a" / "b" / "model.onnx"
    with replacing(path) as temporary:
        assert temporary.suffix == ".onnx"
        assert temporary.parent == path.parent
        assert not path.exists()
        temporary.write_bytes(b"new")
    assert path.read_bytes() == b"new"
    assert names(path.parent) == ["model.onnx"]


@pytest.mark.parametrize("error", [Interrupted, KeyboardInterrupt])
def test_replacing_leaves_the_old_content_on_an_exception(tmp_path: Path, error: type[BaseException]) -> None:
    path = tmp_path / "a.txt"
    path.write_text("old")

    def write_half() -> None:
        with replacing(path) as temporary:
            temporary.write_text("half of the n")
            raise error

    with pytest.raises(error):
        write_half()
    assert path.read_text() == "old"
    assert names(tmp_path) == ["a.txt"]


def test_a_kill_leaves_the_old_content(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text("old")
    code = (
        "import os, signal, sys\n"
        "from magsd_runtime.files import replacing\n"
        "with replacing(sys.argv[1]) as temporary:\n"
        "    temporary.write_text('half of the n')\n"
        "    os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(Path(files.__file__).parents[1])}
    done = subprocess.run([sys.executable, "-c", code, str(path)], env=environment)
    assert done.returncode == -signal.SIGKILL
    assert path.read_text() == "old"


def test_a_reader_never_meets_a_part(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    contents = ["a" * 200_000, "b" * 200_000]
    write_text(path, contents[0])
    stop = threading.Event()
    seen: set[str] = set()

    def read() -> None:
        while not stop.is_set():
            seen.add(path.read_text())

    reader = threading.Thread(target=read)
    reader.start()
    for i in range(100):
        write_text(path, contents[i % 2])
    stop.set()
    reader.join()
    assert seen <= set(contents)


@pytest.mark.parametrize("mask", [0o022, 0o077, 0o002])
def test_permissions_follow_the_umask(tmp_path: Path, mask: int) -> None:
    before = os.umask(mask)
    try:
        write_text(tmp_path / "a.txt", "x")
        with replacing_directory(tmp_path / "bundle") as temporary:
            (temporary / "x").write_text("x")
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "a.txt").stat().st_mode) == 0o666 & ~mask
    assert stat.S_IMODE((tmp_path / "bundle").stat().st_mode) == 0o777 & ~mask


@pytest.mark.parametrize("name", ["x" * 255, "ü" * 127, "a." + "x" * 253, "x" * 251 + ".png"])
def test_the_longest_names_work(tmp_path: Path, name: str) -> None:
    write_text(tmp_path / name, "x")
    assert names(tmp_path) == [name]


def test_replacing_directory(tmp_path: Path) -> None:
    path = tmp_path / "runs" / "bundle"
    with replacing_directory(path) as temporary:
        (temporary / "model").write_text("x")
        assert not path.exists()
    assert names(path) == ["model"]
    assert names(path.parent) == ["bundle"]


def test_replacing_directory_never_overwrites(tmp_path: Path) -> None:
    path = tmp_path / "bundle"
    path.mkdir()
    with pytest.raises(FileExistsError), replacing_directory(path):
        raise AssertionError("the block must not run")
    # One that appeared meanwhile is kept too
    other = tmp_path / "other"

    def meet_another() -> None:
        with replacing_directory(other) as temporary:
            (temporary / "model").write_text("ours")
            other.mkdir()
            (other / "model").write_text("theirs")

    with pytest.raises(OSError):
        meet_another()
    assert (other / "model").read_text() == "theirs"
    assert names(tmp_path) == ["bundle", "other"]


def test_replacing_directory_removes_what_failed(tmp_path: Path) -> None:
    def write_half() -> None:
        with replacing_directory(tmp_path / "bundle") as temporary:
            (temporary / "deep").mkdir()
            (temporary / "deep" / "model").write_text("x")
            raise Interrupted

    with pytest.raises(Interrupted):
        write_half()
    assert names(tmp_path) == []


def test_write_json(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    value = {"b": [1, 2.5, None], "a": "Füße", "path": "\udcff.png"}
    write_json(path, {"a": "Füße"})
    assert path.read_text(encoding="utf-8") == '{\n  "a": "Füße"\n}\n'
    write_json(path, value)
    assert json.loads(path.read_bytes()) == value, "a name that is not UTF-8 survives"


@pytest.mark.parametrize("value", [float("nan"), float("inf"), {"a": [float("-inf")]}, {1, 2}])
def test_write_json_refuses_what_is_not_json(tmp_path: Path, value: object) -> None:
    path = tmp_path / "a.json"
    path.write_text("old")
    with pytest.raises((ValueError, TypeError)):
        write_json(path, value)
    assert path.read_text() == "old"
    assert names(tmp_path) == ["a.json"]


@pytest.mark.parametrize("size", [0, 1, (1 << 20) - 1, 1 << 20, (1 << 20) + 1])
def test_sha256_file(tmp_path: Path, size: int) -> None:
    content = bytes(i % 251 for i in range(size))
    (tmp_path / "a").write_bytes(content)
    assert sha256_file(tmp_path / "a") == hashlib.sha256(content).hexdigest()


def test_a_file_hashed_ahead_is_read_once_and_its_digest_given_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read: list[tuple[str, str]] = []
    digest = files._digest

    def counted(file: Any, buffer: bytearray) -> str:
        read.append((Path(file.name).name, threading.current_thread().name))
        return digest(file, buffer)

    monkeypatch.setattr(files, "_digest", counted)
    contents = {"a": b"one" * (3 << 20), "b": b"", "c": b"other"}
    for name, content in contents.items():
        (tmp_path / name).write_bytes(content)
    hash_ahead([*(tmp_path / name for name in contents), tmp_path / "missing", tmp_path, tmp_path / "\0"])
    for name, content in contents.items():
        assert sha256_file(tmp_path / name) == hashlib.sha256(content).hexdigest()
    assert [name for name, _ in read] == list(contents)
    assert {thread for _, thread in read} & {threading.main_thread().name} == set()
    assert not files._AHEAD
    assert sha256_file(tmp_path / "a") == hashlib.sha256(contents["a"]).hexdigest()
    assert read[-1] == ("a", threading.main_thread().name)


@pytest.mark.parametrize("replaced", [True, False])
def test_a_file_that_changed_since_is_hashed_anew(tmp_path: Path, replaced: bool) -> None:
    path = tmp_path / "model.onnx"
    path.write_bytes(b"old" * 1000)
    os.utime(path, ns=(1, 1))
    hash_ahead([path])
    if replaced:
        (tmp_path / "new").write_bytes(b"new" * 1000)
        os.utime(tmp_path / "new", ns=(1, 1))
        (tmp_path / "new").rename(path)
    else:
        path.write_bytes(b"new" * 1000)
    assert sha256_file(path) == hashlib.sha256(b"new" * 1000).hexdigest()
    files._AHEAD.clear()


def test_a_file_that_cannot_be_read_ahead_is_left_to_whoever_asks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "a").write_bytes(b"x")
    digest = files._digest

    def broken(file: Any, buffer: bytearray) -> str:
        if threading.current_thread() is not threading.main_thread():
            raise OSError("the disk")
        return digest(file, buffer)

    monkeypatch.setattr(files, "_digest", broken)
    hash_ahead([tmp_path / "a"])
    assert sha256_file(tmp_path / "a") == hashlib.sha256(b"x").hexdigest()

"""magsd watch cut off at any call to the file system, on a full disk, and killed under load."""

from __future__ import annotations

import errno
import hashlib
import os
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import watch_kills
from magsd_runtime import audit, audit_record, overlay
from magsd_runtime.files import write_text
from magsd_runtime.pipeline import Pipeline
from magsd_runtime.watching import MOST_ATTEMPTS
from watch_trial import NAME, Clock, assert_once, bundle, lines, pipeline, place, put, results, settle, watcher_of

__all__ = ["bundle", "pipeline", "place"]  # fixtures


_CALLS = ("open", "write", "fsync", "rename", "replace", "unlink", "mkdir", "rmdir", "symlink", "ftruncate")


class Killed(BaseException):
    """Nothing of ours runs after a kill: from then on every call to the file system fails too."""


def at_call(monkeypatch: pytest.MonkeyPatch, number: int, error: Callable[[], BaseException], once: bool) -> list[str]:
    """Make the ``number``-th call to the file system fail, and unless ``once`` all that follow."""
    made: list[str] = []

    def wrap(name: str, call: Callable[..., Any]) -> Callable[..., Any]:
        def failing(*arguments: Any, **options: Any) -> Any:
            made.append(name)
            if len(made) == number or (len(made) > number and not once):
                raise error()
            return call(*arguments, **options)

        return failing

    for name in _CALLS:
        monkeypatch.setattr(os, name, wrap(name, getattr(os, name)))
    return made


@pytest.fixture
def memory() -> Iterator[Path]:
    """A folder in main memory, where waiting for the disk costs nothing."""
    shared = Path("/dev/shm")
    with tempfile.TemporaryDirectory(dir=shared if os.access(shared, os.W_OK) else None) as folder:
        yield Path(folder)


@pytest.fixture
def quick_overlay(monkeypatch: pytest.MonkeyPatch) -> None:
    """Drawing takes most of the time, and its calls to the file system are those of write_text."""
    monkeypatch.setattr(overlay, "save_overlay", lambda path, *_: write_text(path, "picture"))


def trial(memory: Path, number: int) -> Path:
    place = memory / str(number)
    (place / "in").mkdir(parents=True)
    return place


@pytest.mark.usefixtures("quick_overlay")
def test_a_kill_at_any_call_loses_and_doubles_nothing(
    memory: Path, pipeline: Pipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    number = 0
    while True:
        number += 1
        place = trial(memory, number)
        good = put(place, f"{NAME}.png", 1)
        (place / "in/bad.png").write_bytes(b"no image")
        bad = hashlib.sha256(b"no image").hexdigest()
        watcher = watcher_of(place, pipeline)
        with monkeypatch.context() as patch:
            made = at_call(patch, number, Killed, once=False)
            try:
                settle(watcher)
                killed = False
            except Killed:
                killed = True
        watcher.outbox.close()
        shown = set(results(place))  # whoever takes results away does so at once
        for content in shown:
            shutil.rmtree(place / "out/results" / content)
        again = watcher_of(place, pipeline)
        settle(again)
        again.outbox.close()
        later = set(results(place))
        assert shown | later == {good}, made[-1]
        assert not shown & later, made[-1]
        assert lines(place, "done") == [good]
        assert lines(place, "quarantined") == [bad]
        [held] = (place / "out/quarantine" / bad).glob("input*")
        assert held.read_bytes() == b"no image"
        assert [path.name for path in (place / "in").iterdir()] == [f"{NAME}.png"]
        assert not list((place / "out").rglob(".*"))
        state = place / "out/state"
        assert [list((state / name).iterdir()) for name in ("staging", "attempts", "work")] == [[], [], []]
        shutil.rmtree(place)
        if not killed:
            break
    assert number > 40  # as many calls were tried


@pytest.mark.usefixtures("quick_overlay")
def test_a_full_disk_at_any_call_loses_and_doubles_nothing(
    memory: Path, pipeline: Pipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    number, blocked = 0, 0
    while True:
        number += 1
        place = trial(memory, number)
        good = put(place, "film.png", 1)
        (place / "in/bad.png").write_bytes(b"no image")
        watcher = watcher_of(place, pipeline)
        with monkeypatch.context() as patch:
            made = at_call(patch, number, lambda: OSError(errno.ENOSPC, "No space left on device"), once=True)
            for _ in range(3):
                assert isinstance(watcher.clock, Clock)
                watcher.clock.now += 61
                watcher.round()
                blocked += watcher.status.state == "blocked"
            settle(watcher)
        calls = len(made)
        watcher.outbox.close()
        assert_once(place, [good], spare=False)
        assert len(lines(place, "quarantined")) == 1
        assert len(list((place / "out/quarantine").glob("*/input*"))) == 1
        shutil.rmtree(place)
        if calls < number:
            break
    assert number > 40
    assert blocked > 10


def test_a_disk_that_is_really_full(place: Path, pipeline: Pipeline) -> None:
    disk = place / "out"
    disk.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=300k", "tmpfs", str(disk)], capture_output=True)
    if mounted.returncode:
        pytest.skip("no right to mount a small disk")
    try:
        contents = [put(place, f"{number}.png", number) for number in range(6)]
        watcher = watcher_of(place, pipeline)
        collected: list[str] = []
        blocked = 0
        for _ in range(100):
            watcher.clock.now += 61  # type: ignore[attr-defined]
            watcher.round()
            if watcher.status.state != "blocked":
                continue
            blocked += 1
            assert "No space left" in str(watcher.status.problem)
            for content in results(place):  # somebody makes room
                assert (disk / "results" / content / "overlay.jpg").stat().st_size > 0
                collected.append(content)
                shutil.rmtree(disk / "results" / content)
        watcher.outbox.close()
        assert blocked > 1
        assert sorted(collected + list(results(place))) == sorted(contents)
        assert sorted(lines(place, "done")) == sorted(contents)
    finally:
        subprocess.run(["umount", "--lazy", str(disk)], check=True)


def test_kills_under_load(place: Path, bundle: Path) -> None:
    count = watch_kills.run(place / "trial", bundle, kills=10, seed=1, longest=0.8, pause=0.15)
    assert count.kills == 10
    assert count.good, count


@pytest.mark.slow
def test_many_kills_under_load(place: Path, bundle: Path) -> None:
    count = watch_kills.run(place / "trial", bundle, kills=120, seed=2)
    assert count.good, count


def test_a_disk_that_stays_full_is_not_the_films_fault(
    place: Path, pipeline: Pipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    content = put(place, "a.png")
    watcher = watcher_of(place, pipeline)

    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        for _ in range(2 * MOST_ATTEMPTS):
            watcher.clock.now += 61  # type: ignore[attr-defined]
            assert not watcher.round()
            assert watcher.status.state == "blocked"
        assert watcher.status.judged == 2 * MOST_ATTEMPTS
        assert not results(place)
    settle(watcher)
    watcher.outbox.close()
    assert_once(place, [content])
    assert not lines(place, "quarantined")


def test_what_cannot_be_logged_is_not_handed_out(
    place: Path, pipeline: Pipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    content = put(place, "a.png")
    audited = audit_record.AuditedPipeline(pipeline, place / "log")
    watcher = watcher_of(place, audited)
    (place / "log").write_bytes(b"torn")
    for _ in range(2 * MOST_ATTEMPTS):
        watcher.clock.now += 61  # type: ignore[attr-defined]
        watcher.round()
        assert "audit repair" in str(watcher.status.problem)
    assert not results(place)
    audit.repair(place / "log")
    settle(watcher)
    watcher.outbox.close()
    assert_once(place, [content])


def test_an_inbox_that_goes_away_and_comes_back(place: Path, pipeline: Pipeline) -> None:
    watcher = watcher_of(place, pipeline)
    content = put(place, "a.png")
    os.rename(place / "in", place / "unmounted")
    watcher.round()
    assert "the inbox cannot be listed" in str(watcher.status.problem)
    os.rename(place / "unmounted", place / "in")
    settle(watcher)
    assert watcher.status.problem is None
    watcher.outbox.close()
    assert_once(place, [content])

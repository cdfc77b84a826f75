"""What the tests of magsd watch share: a clock, films, a watcher of a folder, and what is on the disk afterwards."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import cv2
import pytest

import tiny_bundle
from drawn_film import drawn_film
from magsd_runtime.inbox import Inbox
from magsd_runtime.outbox import Outbox
from magsd_runtime.pipeline import Pipeline
from magsd_runtime.watch_status import WatchStatus
from magsd_runtime.watching import Watcher, WatchSettings

NAME = "MÜLLER^ANNA_1950-03-07"


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_bundle.build(tmp_path_factory.mktemp("bundle") / "b")


@pytest.fixture(scope="module")
def pipeline(bundle: Path) -> Iterator[Pipeline]:
    with Pipeline.open(bundle, "cpu", threads=1) as opened:
        yield opened


@pytest.fixture
def place(tmp_path: Path) -> Path:
    (tmp_path / "in").mkdir()
    return tmp_path


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def put(place: Path, name: str, seed: int = 0) -> str:
    """Write a film; returns its content's hash."""
    data = cv2.imencode(".png", drawn_film(seed))[1].tobytes()
    (place / "in" / name).write_bytes(data)
    return hashlib.sha256(data).hexdigest()


def settle(watcher: Watcher, rounds: int = 30) -> None:
    """Rounds, a minute apart, until there is nothing left to be done."""
    for _ in range(rounds):
        assert isinstance(watcher.clock, Clock)
        watcher.clock.now += 61
        if not watcher.round() and watcher.status.problem is None and not watcher._anything_left():
            return
    raise AssertionError("does not come to rest")


def results(place: Path) -> dict[str, dict[str, Any]]:
    return {path.parent.name: json.loads(path.read_text()) for path in place.glob("out/results/*/prediction.json")}


def lines(place: Path, kind: str) -> list[str]:
    ledger = (place / "out/state/ledger.jsonl").read_text().splitlines()
    return [line["content"] for line in map(json.loads, filter(None, ledger)) if line["kind"] == kind]


def assert_once(place: Path, contents: list[str], *, spare: bool = True) -> None:
    """Each content has one result and one line, and nothing else is there."""
    assert sorted(results(place)) == sorted(contents)
    assert sorted(lines(place, "done")) == sorted(contents)
    state = place / "out/state"
    assert [list((state / name).iterdir()) for name in ("staging", "attempts", "work")] == [[], [], []]
    assert not spare or not list((place / "out").rglob(".*"))


def watcher_of(place: Path, pipeline: Pipeline, dicom_out: Path | None = None) -> Watcher:
    settings = WatchSettings(settle=0.0, patience=0.0, poll=0.01)
    clock = Clock()
    inbox = Inbox(place / "in", settle=0.0, clock=clock)
    status = WatchStatus({}, {}, 9, dicom=Counter())
    return Watcher(pipeline, inbox, Outbox(place / "out", dicom_out=dicom_out), settings, status, clock, lambda _: None)

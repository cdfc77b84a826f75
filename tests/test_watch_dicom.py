"""magsd watch --dicom-out: the DICOM results of each film once, over kills, full disks and faults."""

from __future__ import annotations

import errno
import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest

import dicom_film
import watch_kills
from magsd.cli import main
from magsd_runtime.dicom_results import writing
from magsd_runtime.errors import UsageError
from magsd_runtime.files import write_text
from magsd_runtime.outbox import Outbox
from magsd_runtime.pipeline import Pipeline
from test_watch_crashes import Killed, at_call, memory, quick_overlay, trial
from watch_trial import Clock, assert_once, bundle, lines, pipeline, place, put, results, settle, watcher_of

pydicom = pytest.importorskip("pydicom")
pytest.importorskip("highdicom")
__all__ = ["bundle", "memory", "pipeline", "place", "quick_overlay"]  # fixtures

ALL = {"secondary_capture", "structured_report", "presentation_state", "parametric_map"}
MADE = ("parametric-map-2.25.2.dcm", "secondary-capture-2.25.1.dcm")


def send(place: Path, name: str = "film", **attributes: Any) -> Path:
    """Put a DICOM film into the inbox."""
    folder = place / "made"
    folder.mkdir(exist_ok=True)
    return Path(shutil.move(dicom_film.save(folder, **attributes), place / "in" / f"{name}.dcm"))


def reasons(record: dict[str, Any]) -> list[str]:
    return [reason["code"] for reason in record["reasons"]]


# --- what comes out ------------------------------------------------------------------------------


def test_each_dicom_film_has_its_results_once_and_others_a_note(place: Path, pipeline: Pipeline) -> None:
    send(place)
    send(place, "lateral", ViewPosition="LL", SOPInstanceUID="1.2.3.8")
    send(place, "no study", StudyInstanceUID=None, SOPInstanceUID="1.2.3.9")
    picture = put(place, "film.png", 3)
    out = place / "dicom"
    watcher = watcher_of(place, pipeline, out)
    settle(watcher)
    watcher.outbox.close()
    found = results(place)
    assert len(found) == 4
    by_kind: dict[str, set[str]] = {}
    for record in found.values():
        written = {kind: Path(file) for kind, file in record["files"].items() if kind in ALL}
        for path in written.values():
            dataset = pydicom.dcmread(path)
            assert dataset.StudyInstanceUID == "1.2.3.4.5"
            assert dataset.PatientID == "PID-4711"
            assert path.parent == out
        by_kind[record["status"] + str(len(by_kind))] = set(written)
    kinds = sorted(by_kind.values(), key=len)
    assert kinds[:3] == [set(), set(), {"secondary_capture"}]
    assert {"secondary_capture", "structured_report", "parametric_map"} <= kinds[3]
    assert sorted(path.name for path in out.iterdir()) == sorted(
        Path(file).name for record in found.values() for kind, file in record["files"].items() if kind in ALL
    )
    assert reasons(found[picture]) == ["no_dicom_results"]
    assert "not a DICOM file" in found[picture]["reasons"][0]["message"]
    assert sum("no_dicom_results" in reasons(record) for record in found.values()) == 2
    assert watcher.status.to_dict()["dicom_since_start"] == {"written": 2, "none": 2, "failed": 0}
    assert 'magsd_watch_dicom_total{outcome="written"} 2\n' in watcher.status.metrics()
    assert not list((place / "out/results").glob("*/dicom"))


def test_what_is_made_again_replaces_what_was_there(place: Path, pipeline: Pipeline) -> None:
    send(place)
    out = place / "dicom"
    watcher = watcher_of(place, pipeline, out)
    settle(watcher)
    watcher.outbox.close()
    first = {path.name: pydicom.dcmread(path) for path in out.iterdir()}
    shutil.rmtree(place / "out")  # all of its memory
    again = watcher_of(place, pipeline, out)
    settle(again)
    again.outbox.close()
    second = {path.name: pydicom.dcmread(path) for path in out.iterdir()}
    assert sorted(first) == sorted(second)
    for name, dataset in first.items():
        assert dataset.SOPInstanceUID == second[name].SOPInstanceUID
        assert dataset.SeriesInstanceUID == second[name].SeriesInstanceUID


def test_without_the_option_there_are_none_and_nothing_is_said(place: Path, pipeline: Pipeline) -> None:
    send(place)
    watcher = watcher_of(place, pipeline)
    watcher.status.dicom = None
    settle(watcher)
    watcher.outbox.close()
    [record] = results(place).values()
    assert set(record["files"]) == {"json", "overlay"}
    assert "no_dicom_results" not in reasons(record)
    assert watcher.status.to_dict()["dicom_since_start"] is None
    assert "dicom" not in watcher.status.metrics()


def test_as_a_command(place: Path, bundle: Path, capfd: pytest.CaptureFixture[str]) -> None:
    send(place)
    times = ["--settle", "0", "--patience", "0", "--poll", "0.01", "--once", "--threads", "1", "--backend", "cpu"]
    arguments = [str(place / "in"), "--out", str(place / "out"), "--bundle", str(bundle), *times]
    assert main(["watch", *arguments, "--dicom-out", str(place / "dicom")]) == 0
    status = json.loads((place / "out/status.json").read_text())
    assert status["dicom_since_start"] == {"written": 1, "none": 0, "failed": 0}
    assert len(list((place / "dicom").glob("*.dcm"))) >= 3
    for wrong in ("in", "in/dicom", ".", "out", "out/results", "out/state/dicom"):
        capfd.readouterr()
        assert main(["watch", *arguments, "--dicom-out", str(place / wrong)]) == 2
        assert "--dicom-out" in capfd.readouterr().err, wrong


def test_a_folder_that_cannot_be_made_gives_the_lock_back(place: Path) -> None:
    (place / "file").write_text("")
    with pytest.raises(UsageError, match=r"--dicom-out .*no folder can be made there"):
        Outbox(place / "out", dicom_out=place / "file/dicom")
    Outbox(place / "out").close()


# --- what goes wrong -----------------------------------------------------------------------------


def test_a_fault_is_tried_again_and_then_quarantined_with_its_reason(
    place: Path, pipeline: Pipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    tries = 0

    def fail(case: Any) -> None:
        nonlocal tries
        tries += 1
        raise ValueError(f"of {case.source.header.PatientName}")

    send(place)
    content = put(place, "film.png", 3)
    watcher = watcher_of(place, pipeline, place / "dicom")
    with monkeypatch.context() as patch:
        patch.setattr("magsd_runtime.dicom_results.structured_report.structured_report", fail)
        patch.delenv("MAGSD_TRACEBACK", raising=False)
        settle(watcher)
    assert tries == 3
    assert watcher.status.dicom == {"failed": 3, "none": 1}
    [reason] = [json.loads(path.read_text()) for path in place.glob("out/quarantine/*/reason.json")]
    assert reason["code"] == "dicom_failed"
    assert reason["message"].startswith("no DICOM results: the structured-report could not be made (ValueError;")
    assert list(results(place)) == [content]  # others go on
    assert list((place / "dicom").iterdir()) == []
    # moved back by hand, as docs/watch.md says
    [held] = place.glob("out/quarantine/*/input.dcm")
    os.rename(held, place / "in/film.dcm")
    shutil.rmtree(held.parent)
    settle(watcher)
    watcher.outbox.close()
    assert len(results(place)) == 2
    assert len(list((place / "dicom").iterdir())) >= 3


def test_a_fault_that_passes_leaves_no_trace(place: Path, pipeline: Pipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    real, calls = writing.write_results, []

    def once(*arguments: Any) -> Any:
        calls.append(1)
        if len(calls) == 1:
            raise MemoryError
        return real(*arguments)

    monkeypatch.setattr(writing, "write_results", once)
    send(place)
    watcher = watcher_of(place, pipeline, place / "dicom")
    settle(watcher)
    watcher.outbox.close()
    [record] = results(place).values()
    assert reasons(record) == []
    assert lines(place, "quarantined") == []


def test_a_folder_that_is_gone_blocks_and_the_results_come_when_it_is_back(place: Path, pipeline: Pipeline) -> None:
    watcher = watcher_of(place, pipeline, place / "dicom")
    os.rmdir(place / "dicom")
    send(place)
    for _ in range(3):
        assert isinstance(watcher.clock, Clock)
        watcher.clock.now += 61
        watcher.round()
    assert watcher.status.state == "blocked"
    assert watcher.status.problem == "--dicom-out cannot be written: No such file or directory"
    assert results(place) == {}
    (place / "dicom").mkdir()
    settle(watcher)
    watcher.outbox.close()
    assert watcher.status.problem is None
    assert_once(place, list(results(place)))
    assert len(results(place)) == 1
    assert len(list((place / "dicom").iterdir())) >= 3


# --- cut off anywhere ----------------------------------------------------------------------------


@pytest.fixture(params=["one file system", "two"])
def apart(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    """Two quick files in place of the real results, and no rename between OUT and the folder of --dicom-out."""

    def write(folder: Path, *_: Any) -> dict[str, Path]:
        for name in MADE:
            write_text(folder / name, name)
        return {name.rpartition("-")[0]: folder / name for name in MADE}

    monkeypatch.setattr(writing, "write_results", write)
    return request.param == "two"


def keep_apart(patch: pytest.MonkeyPatch) -> None:
    real = os.rename

    def rename(source: Any, target: Any) -> None:
        if "staging" in str(source) and "dicom_out" in str(target):
            raise OSError(errno.EXDEV, "Invalid cross-device link")
        real(source, target)

    patch.setattr(os, "rename", rename)


@pytest.mark.usefixtures("quick_overlay")
def test_a_kill_at_any_call_loses_no_dicom_result(
    memory: Path, pipeline: Pipeline, monkeypatch: pytest.MonkeyPatch, apart: bool
) -> None:
    number, twice = 0, 0
    while True:
        number += 1
        place = trial(memory, number)
        good, out = put(place, "film.png", 1), place / "dicom_out"
        watcher = watcher_of(place, pipeline, out)
        killed = False
        with monkeypatch.context() as patch:
            if apart:
                keep_apart(patch)
            made = at_call(patch, number, Killed, once=False)
            try:
                settle(watcher)
            except Killed:
                killed = True
        watcher.outbox.close()
        # Whoever takes results away does so at once; what shows is whole
        taken = {path.name: path.read_text() for path in out.iterdir() if not path.name.startswith(".")}
        assert all(name == text for name, text in taken.items())
        if results(place):
            assert sorted(taken) == sorted(MADE), "a prediction shows before its DICOM results"
        for name in taken:
            (out / name).unlink()
        with monkeypatch.context() as patch:
            if apart:
                keep_apart(patch)
            again = watcher_of(place, pipeline, out)
            settle(again)
        again.outbox.close()
        assert_once(place, [good])
        later = sorted(path.name for path in out.iterdir())
        assert set(taken) | set(later) == set(MADE), made[-1]
        twice += len(set(taken) & set(later))
        assert not twice or apart, made[-1]
        shutil.rmtree(place)
        if not killed:
            break
    assert number > 30
    # Four calls between a copy's rename and the end of its original: the same bytes under the same name once more
    assert twice <= 4 * len(MADE)


@pytest.mark.usefixtures("quick_overlay")
def test_a_full_disk_at_any_call_loses_no_dicom_result(
    memory: Path, pipeline: Pipeline, monkeypatch: pytest.MonkeyPatch, apart: bool
) -> None:
    number, blocked = 0, 0
    while True:
        number += 1
        place = trial(memory, number)
        good, out = put(place, "film.png", 1), place / "dicom_out"
        watcher = watcher_of(place, pipeline, out)
        with monkeypatch.context() as patch:
            if apart:
                keep_apart(patch)
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
        assert {path.name: path.read_text() for path in out.iterdir()} == {name: name for name in MADE}
        shutil.rmtree(place)
        if calls < number:
            break
    assert number > 30
    assert blocked > 5


def test_the_first_release_of_a_result_can_still_be_shown_without_the_option(place: Path, pipeline: Pipeline) -> None:
    """Cut off between line and rename, and started again without --dicom-out: the results stay with the prediction."""
    send(place)
    watcher = watcher_of(place, pipeline, place / "dicom")
    os.rmdir(place / "dicom")
    assert isinstance(watcher.clock, Clock)
    watcher.clock.now += 61
    watcher.round()
    watcher.outbox.close()
    again = watcher_of(place, pipeline)
    settle(again)
    again.outbox.close()
    [content] = results(place)
    assert len(list((place / "out/results" / content / "dicom").iterdir())) >= 3
    assert lines(place, "done") == [content]


def test_kills_under_load(place: Path, bundle: Path) -> None:
    count = watch_kills.run(place / "trial", bundle, kills=3, seed=1, longest=4.0, pause=0.3, dicom=True)
    assert count.kills == 3
    assert count.dicom_objects > 0
    assert count.good, count

"""magsd watch: each film once, whatever happens in between."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest

from magsd.cli import main
from magsd_runtime import audit, outbox, watching
from magsd_runtime.inbox import Inbox
from magsd_runtime.outbox import Outbox
from magsd_runtime.pipeline import Pipeline, Result
from magsd_runtime.prediction import Prediction, Reason
from magsd_runtime.watch_status import WatchStatus
from magsd_runtime.watching import MOST_ATTEMPTS, Watcher, WatchSettings
from watch_trial import NAME, Clock, assert_once, bundle, lines, pipeline, place, put, results, settle

__all__ = ["bundle", "pipeline", "place"]  # fixtures

ROOT = Path(__file__).resolve().parents[1]
ENVIRONMENT = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, [ROOT, ROOT / "runtime"])), "OMP_NUM_THREADS": "1"}


Make = Callable[..., Watcher]


@pytest.fixture
def make(place: Path, pipeline: Pipeline) -> Iterator[Make]:
    """A watcher of place/in; making another one is a restart."""
    made: list[Watcher] = []

    def restart(pipeline: Pipeline = pipeline, **settings: Any) -> Watcher:
        for watcher in made:
            watcher.outbox.close()
        chosen = WatchSettings(**{"settle": 0.0, "patience": 0.0, "poll": 0.01, **settings})
        clock = Clock()
        status = WatchStatus({"name": "tiny", "sha256": "0"}, {"name": "cpu"}, chosen.queue)
        inbox = Inbox(place / "in", settle=chosen.settle, clock=clock)
        made.append(Watcher(pipeline, inbox, Outbox(place / "out"), chosen, status, clock, lambda _: None))
        return made[-1]

    yield restart
    for watcher in made:
        watcher.outbox.close()


# --- what comes out ------------------------------------------------------------------------------


def test_a_result_is_what_infer_says_and_names_no_file(place: Path, make: Make, pipeline: Pipeline) -> None:
    content = put(place, f"{NAME}.png")
    (place / "in" / f"{NAME}.dcm").write_bytes(b"no film of " + NAME.encode())
    settle(make())
    expected = pipeline.predict(place / "in" / f"{NAME}.png").prediction.to_dict()
    result = results(place)[content]
    for name in ("status", "label", "probabilities", "findings", "image", "model", "preprocessing_sha256"):
        assert result[name] == expected[name], name
    assert result["path"] == f"sha256:{content}"
    assert result["files"] == {"json": "prediction.json", "overlay": "overlay.jpg"}
    picture = cv2.imread(str(place / "out/results" / content / "overlay.jpg"))
    assert picture is not None
    everything = [path.relative_to(place).as_posix() for path in (place / "out").rglob("*")]
    for path in (place / "out").rglob("*"):
        if path.is_file() and path.name != "input.dcm":
            everything.append(path.read_bytes().decode("latin-1") + ascii(path.read_bytes()))
    text = "\n".join(everything)
    for secret in ("ANNA", "LLER", "1950-03", str(place / "in")):
        assert secret not in text, secret


def test_a_content_is_judged_once_over_names_and_restarts(place: Path, make: Make) -> None:
    contents = [put(place, f"{number}.png", number) for number in range(3)]
    put(place, "0 again.png", 0)
    watcher = make()
    settle(watcher)
    assert_once(place, contents)
    assert watcher.status.judged == 3
    assert lines(place, "again") == [contents[0]]
    shutil.rmtree(place / "out/results" / contents[1])  # somebody took it away: that is what it is for
    os.rename(place / "in/2.png", place / "in/renamed.png")
    put(place, "1 again.png", 1)
    contents.append(put(place, "3.png", 3))
    again = make()
    settle(again)
    assert again.status.judged == 1
    assert sorted(results(place)) == sorted({contents[0], contents[2], contents[3]})
    assert sorted(lines(place, "done")) == sorted(contents)


def test_the_same_name_with_another_content_is_another_film(place: Path, make: Make) -> None:
    watcher = make()
    first = put(place, "film.png", 1)
    settle(watcher)
    second = put(place, "film.png", 2)
    settle(watcher)
    assert_once(place, [first, second])


def test_rejected_films_have_results_and_names_can_be_kept(place: Path, make: Make) -> None:
    (place / "in/ward 7").mkdir()
    cv2.imwrite(str(place / "in/ward 7/flat.png"), np.full((80, 80), 9, np.uint8))
    settle(make(keep_names=True, overlay=False))
    [result] = results(place).values()
    assert (result["status"], result["path"]) == ("rejected", "ward 7/flat.png")
    assert result["files"] == {"json": "prediction.json"}


def test_inputs_are_deleted_only_on_demand_and_after_their_result(place: Path, make: Make) -> None:
    content = put(place, "a.png")
    settle(make())
    assert (place / "in/a.png").exists()
    put(place, "b.png", 5)
    settle(make(delete_done=True))  # also what an earlier run has done
    assert list((place / "in").iterdir()) == []
    assert len(results(place)) == 2
    assert content in results(place)


# --- finished or not -----------------------------------------------------------------------------


def test_a_sender_that_pauses_is_given_time(place: Path, make: Make) -> None:
    content = put(place, "a.png")
    data = (place / "in/a.png").read_bytes()
    (place / "in/a.png").write_bytes(data[:200])
    watcher = make(settle=2.0, patience=30.0)
    assert isinstance(watcher.clock, Clock)
    for _ in range(4):
        watcher.round()
        watcher.clock.now += 5
    assert watcher.status.judged == 1  # could not be read, and has 30 seconds to change
    assert not list((place / "out/quarantine").iterdir())
    (place / "in/a.png").write_bytes(data)
    settle(watcher)
    assert_once(place, [content])


def test_a_film_that_changes_while_it_is_judged_is_judged_again(
    place: Path, make: Make, pipeline: Pipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    put(place, "a.png", 1)
    judge = Pipeline.predict
    after: list[str] = []

    def predict(self: Pipeline, path: Any, **options: Any) -> Result:
        result = judge(self, path, **options)
        if not after:
            after.append(put(place, "a.png", 2))
        return result

    monkeypatch.setattr(Pipeline, "predict", predict)
    settle(make())
    assert_once(place, after)


def test_a_file_that_may_not_be_read_stops_no_other(place: Path, make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    closed, other = put(place, "closed.png", 1), put(place, "open.png", 2)
    monkeypatch.setattr(watching, "sha256_file", lambda path: refuse() if path.name == "closed.png" else digest(path))

    def refuse() -> str:
        raise PermissionError(errno.EACCES, "Permission denied")

    def digest(path: Path) -> str:
        return hashlib.sha256(path.read_bytes()).hexdigest()

    watcher = make()
    while watcher.round() or watcher._anything_left():
        watcher.clock.now += 1  # type: ignore[attr-defined]
    watcher._report(force=True)
    assert list(results(place)) == [other]
    assert watcher.status.inaccessible == 1
    monkeypatch.undo()
    os.chmod(place / "in/closed.png", 0o600)
    settle(watcher)
    watcher._report(force=True)
    assert_once(place, [closed, other])
    assert watcher.status.inaccessible == 0


def test_the_queue_is_bounded_and_the_oldest_come_first(place: Path, make: Make) -> None:
    contents = []
    for number in (3, 1, 4, 2):
        contents.append((number, put(place, f"{number}.png", number)))
        os.utime(place / "in" / f"{number}.png", (number, number))
    watcher = make(queue=2)
    watcher.round()
    assert (watcher.inbox.ready, len(watcher._queue)) == (4, 1)
    settle(watcher)
    assert lines(place, "done") == [content for _, content in sorted(contents)]


# --- quarantine ----------------------------------------------------------------------------------


def test_what_cannot_be_read_goes_into_quarantine_with_a_reason(place: Path, make: Make) -> None:
    (place / "in/x.png").write_bytes(b"no image at all")
    (place / "in/y").write_bytes(b"no image at all")
    content = hashlib.sha256(b"no image at all").hexdigest()
    settle(make())
    folder = place / "out/quarantine" / content
    reason = json.loads((folder / "reason.json").read_text())
    assert (reason["code"], reason["sha256"], reason["bytes"]) == ("unreadable", content, 15)
    assert "not an image" in reason["message"]
    [held] = folder.glob("input*")
    assert held.read_bytes() == b"no image at all"
    assert len(list((place / "in").iterdir())) == 1  # the second name stays, and is known
    assert len(lines(place, "quarantined")) == 1
    # to try it again, its folder is taken out of the quarantine and the file put back
    shutil.move(held, place / "in/z.png")
    shutil.rmtree(folder)
    settle(make())
    assert len(lines(place, "retry")) == 1
    assert len(lines(place, "quarantined")) == 2
    assert (folder / "reason.json").exists()


def test_an_input_that_cannot_be_moved_is_copied(place: Path, make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    (place / "in/x.png").write_bytes(b"no image")
    rename = os.rename

    def other_device(source: Any, target: Any) -> None:
        if Path(source).parent.name == "in":
            raise OSError(errno.EXDEV, "Invalid cross-device link")
        rename(source, target)

    monkeypatch.setattr(os, "rename", other_device)
    settle(make())
    [held] = (place / "out/quarantine").glob("*/input*")
    assert held.read_bytes() == b"no image"
    assert list((place / "in").iterdir()) == []


def test_faults_are_tried_three_times(place: Path, make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    content = put(place, "a.png")
    calls: list[int] = []

    def predict(self: Pipeline, path: Any, **options: Any) -> Result:
        calls.append(1)
        return Result(Prediction(str(path), "error", (Reason("out_of_memory", "not enough memory"),)), None, None)

    monkeypatch.setattr(Pipeline, "predict", predict)
    settle(make())
    assert len(calls) == 3
    reason = json.loads((place / "out/quarantine" / content / "reason.json").read_text())
    assert reason["code"] == "out_of_memory"


def test_an_input_that_always_brings_the_process_down_is_put_away(place: Path, make: Make) -> None:
    poison, other = put(place, "a.png", 1), put(place, "b.png", 2)
    os.utime(place / "in/a.png", (1, 1))
    for attempt in range(MOST_ATTEMPTS):
        watcher = make()
        assert watcher.outbox.attempts(poison) == attempt
        watcher.outbox.begin(poison)  # as if it were killed while it judged
    watcher = make()
    settle(watcher)
    assert list(results(place)) == [other]
    reason = json.loads((place / "out/quarantine" / poison / "reason.json").read_text())
    assert reason["code"] == "stopped_magsd"
    assert watcher.status.judged == 1


def test_a_suspect_waits_until_others_are_done(place: Path, make: Make) -> None:
    suspect, other = put(place, "a.png", 1), put(place, "b.png", 2)
    os.utime(place / "in/a.png", (1, 1))
    watcher = make()
    watcher.outbox.begin(suspect)
    settle(watcher)
    assert lines(place, "done") == [other, suspect]


def test_a_lost_ledger_is_made_from_the_results(place: Path, make: Make) -> None:
    contents = [put(place, f"{number}.png", number) for number in range(2)]
    (place / "in/bad.png").write_bytes(b"no image")
    settle(make())
    (place / "out/state/ledger.jsonl").unlink()
    (place / "in/bad.png").write_bytes(b"no image")
    watcher = make()
    settle(watcher)
    assert watcher.status.judged == 0
    assert watcher.status.recovered == 3
    assert_once(place, contents)
    assert watcher.outbox.ledger.statuses == {"ok": 2}


# --- DICOM instances -----------------------------------------------------------------------------


def dicom(path: Path, pixels: np.ndarray, uid: str, patient: str) -> None:
    pydicom = pytest.importorskip("pydicom")
    dataset = pydicom.Dataset()
    dataset.SOPClassUID, dataset.SOPInstanceUID, dataset.PatientName = "1.2.840.10008.5.1.4.1.1.7", uid, patient
    dataset.file_meta = pydicom.dataset.FileMetaDataset()
    dataset.file_meta.TransferSyntaxUID = pydicom.uid.ExplicitVRLittleEndian
    dataset.Rows, dataset.Columns = pixels.shape
    dataset.SamplesPerPixel, dataset.PhotometricInterpretation = 1, "MONOCHROME2"
    dataset.BitsAllocated = dataset.BitsStored = 8
    dataset.HighBit, dataset.PixelRepresentation = 7, 0
    dataset.PixelData = pixels.tobytes()
    dataset.save_as(path, enforce_file_format=True)


def test_an_instance_that_is_sent_again_with_another_header_is_no_new_film(
    place: Path, make: Make, pipeline: Pipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The reading of DICOM is not what is tested here: the pixels come from pydicom alone."""
    pydicom = pytest.importorskip("pydicom")
    judge = pipeline.predict

    def predict(self: Pipeline, path: Any, **options: Any) -> Result:
        picture = place / "decoded.png"
        cv2.imwrite(str(picture), pydicom.dcmread(path).pixel_array)
        result = judge(picture, **options)
        return replace(result, prediction=replace(result.prediction, path=str(path)))

    rng = np.random.default_rng(3)
    one, two = (cv2.resize(rng.integers(0, 256, (9, 8)).astype(np.uint8), (96, 112)) for _ in range(2))
    dicom(place / "in/a.dcm", one, "1.2.3.4", "OLD^NAME")
    monkeypatch.setattr(Pipeline, "predict", predict)
    settle(make())
    dicom(place / "in/b.dcm", one, "1.2.3.4", "NEW^NAME")  # the same film, corrected
    dicom(place / "in/c.dcm", two, "1.2.3.4", "NEW^NAME")  # against the standard: other pixels, same UID
    dicom(place / "in/d.dcm", one, "1.2.3.5", "NEW^NAME")  # the same pixels as another instance
    watcher = make()
    settle(watcher)
    hashes = {name: hashlib.sha256((place / "in" / name).read_bytes()).hexdigest() for name in ("a.dcm", "b.dcm", "c.dcm", "d.dcm")}  # fmt: skip  # noqa: E501
    assert_once(place, [hashes["a.dcm"], hashes["c.dcm"], hashes["d.dcm"]])
    assert lines(place, "duplicate") == [hashes["b.dcm"]]
    assert "1.2.3" not in (place / "out/state/ledger.jsonl").read_text()
    judged = make()
    settle(judged)
    assert judged.status.judged == 0


# --- the command ---------------------------------------------------------------------------------


def command(place: Path, bundle: Path, *more: str) -> list[str]:
    times = ["--settle", "0.1", "--patience", "0.2", "--poll", "0.02", "--threads", "1"]
    return ["watch", str(place / "in"), "--out", str(place / "out"), "--bundle", str(bundle), *times, *more]


def test_sigterm_finishes_and_stops(place: Path, bundle: Path) -> None:
    content = put(place, "a.png")
    process = subprocess.Popen(
        [sys.executable, "-m", "magsd.cli", *command(place, bundle)], env=ENVIRONMENT, stderr=subprocess.PIPE, text=True
    )
    for _ in range(2400):  # a minute: a busy machine takes its time to start
        time.sleep(0.025)
        if results(place):
            break
    process.send_signal(signal.SIGTERM)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 0
    assert_once(place, [content])
    assert "Research use only" in said
    assert "a.png" not in said
    assert json.loads((place / "out/status.json").read_text())["state"] == "stopped"


def test_once_audits_and_tells_what_was_wrong(place: Path, bundle: Path, capsys: pytest.CaptureFixture[str]) -> None:
    log = place / "log"
    content = put(place, "a.png")
    arguments = command(place, bundle, "--once", "--audit", str(log))
    assert main(arguments) == 0
    log.write_bytes(log.read_bytes() + b'{"torn')
    (place / "in/bad.png").write_bytes(b"no image")
    capsys.readouterr()
    assert main(arguments) == 3
    assert "notes a write that was cut off" in capsys.readouterr().err
    verdict = audit.verify(log)
    assert verdict.problem is None
    assert verdict.repairs == (2,)
    records = [json.loads(line) for line in log.read_bytes().splitlines() if line.endswith(b"}")]
    assert records[0]["input"]["sha256"] == content
    assert main(arguments) == 0  # nothing new


def test_status_and_metrics(place: Path, bundle: Path) -> None:
    contents = [put(place, f"{NAME} {number}.png", number) for number in range(2)]
    (place / "in" / f"{NAME}.txt").write_bytes(b"no image")
    main(command(place, bundle, "--once", "--queue", "7"))
    status = json.loads((place / "out/status.json").read_text())
    assert status["results"] == {"ok": 2, "review": 0, "rejected": 0}
    assert (status["quarantined"], status["duplicates"], status["ready"], status["waiting"]) == (1, 0, 0, 0)
    assert status["last"]["sha256"] in contents
    assert status["queue_limit"] == 7
    manifest = json.loads((bundle / "bundle.json").read_text())
    assert status["model"]["sha256"] == manifest["model"]["sha256"]
    text = (place / "out/metrics.prom").read_text()
    for line in text.splitlines():
        assert re.fullmatch(r'# (HELP|TYPE) \w+ .+|[a-z_]+(\{\w+="[^"]*"(,\w+="[^"]*")*\})? [0-9.e+-]+', line), line
    samples = dict(line.rsplit(" ", 1) for line in text.splitlines() if not line.startswith("#"))
    assert samples['magsd_watch_results_total{status="ok"}'] == "2"
    assert samples["magsd_watch_quarantined_total"] == "1"
    assert samples['magsd_watch_state{state="stopped"}'] == "1"
    assert float(samples['magsd_watch_seconds_total{step="total"}']) > 0
    assert NAME not in text + json.dumps(status, ensure_ascii=False)


def test_wrong_usage(place: Path, bundle: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def code(inbox: Path, out: Path) -> int:
        return main(["watch", str(inbox), "--out", str(out), "--bundle", str(bundle), "--once"])

    assert code(place / "missing", place / "out") == 2
    assert code(place / "in", place / "in" / "out") == 2
    assert code(place / "in", place) == 2
    assert code(place / "in", place / "in") == 2
    (place / "file").write_text("x")
    assert code(place / "in", place / "file") == 2
    holder = Outbox(place / "out")
    capsys.readouterr()
    assert code(place / "in", place / "out") == 2
    assert "another magsd watch" in capsys.readouterr().err
    holder.close()
    assert code(place / "in", place / "out") == 0


def test_names_of_inputs_never_reach_the_disk(place: Path) -> None:
    box = Outbox(place / "out")
    (place / "in/NAME.DCM").write_bytes(b"x")
    (place / "in/NAME.secret").write_bytes(b"y")
    with box.private_name(place / "in/NAME.DCM", "a" * 64) as name:
        assert name.name == "a" * 64 + ".dcm"
        assert name.read_bytes() == b"x"
    with box.private_name(place / "in/NAME.secret", "b" * 64) as name:
        assert name.name == "b" * 64
    assert not list((place / "out/state/work").iterdir())
    box.close()


def test_a_file_system_without_links(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_links(*_: Any, **__: Any) -> None:
        raise OSError(errno.EPERM, "Operation not permitted")

    box = Outbox(place / "out")
    (place / "in/a.png").write_bytes(b"x")
    monkeypatch.setattr(outbox.os, "symlink", no_links)
    with box.private_name(place / "in/a.png", "a" * 64) as name:
        assert not name.is_symlink()
        assert name.read_bytes() == b"x"
    box.close()


def test_help_loads_nothing_heavy() -> None:
    code = (
        "import sys\nfrom magsd.cli import main\n"
        "try:\n    main(['watch', '--help'])\nexcept SystemExit as stop:\n    assert stop.code == 0\n"
        "assert not {'numpy', 'cv2', 'PIL', 'onnxruntime', 'torch'} & set(sys.modules)\n"
    )
    subprocess.run([sys.executable, "-c", code], env=ENVIRONMENT, check=True, stdout=subprocess.DEVNULL)

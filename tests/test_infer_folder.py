"""`magsd infer` of many films: side by side, in order or not, gone on with after a kill."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
import warnings
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import tiny_bundle
from magsd_runtime import hardware, naming, resuming
from magsd_runtime.dicom.parsing import quiet
from magsd_runtime.errors import UsageError
from magsd_runtime.inferring_commands import _share, infer
from magsd_runtime.parallel import AHEAD, side_by_side
from magsd_runtime.pipeline import Pipeline
from test_runtime_commands import ENVIRONMENT, records


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_bundle.build(tmp_path_factory.mktemp("bundle") / "b")


@pytest.fixture
def films(tmp_path: Path) -> Path:
    """Twelve films, each another one; one that is none, and one without contrast."""
    folder = tmp_path / "films"
    folder.mkdir()
    rng = np.random.default_rng(5)
    y, x = np.mgrid[0:160, 0:140]
    for number in range(12):
        centre = rng.uniform(30, 110, 2)
        blob = 120 * np.exp(-((x - centre[0]) ** 2 + (y - centre[1]) ** 2) / 600)
        film = np.clip(60 + blob + rng.normal(0, 12, x.shape), 0, 255).astype(np.uint8)
        cv2.imwrite(str(folder / f"{number:02}.png"), film)
    (folder / "05a.png").write_bytes(b"no picture")
    cv2.imwrite(str(folder / "07a.png"), np.full((100, 100), 90, np.uint8))
    return folder


def without_times(line: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in line.items() if key != "timings_ms"}


def totals(lines: list[dict[str, Any]], before: int = 0) -> str:
    statuses = Counter(line["status"] for line in lines)
    assert set(statuses) == {"error", "ok", "rejected"}
    parts = ", ".join(f"{statuses[status]} {status}" for status in sorted(statuses))
    return f"{len(lines)} images: {parts}{f'; {before} of them before' if before else ''}\n"


def run(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, list[dict[str, Any]], str]:
    code = infer([str(argument) for argument in arguments])
    captured = capsys.readouterr()
    return code, [json.loads(line) for line in captured.out.splitlines()], captured.err


# --- side by side --------------------------------------------------------------------------------


@settings(max_examples=40, deadline=None)
@given(st.lists(st.integers(0, 3), max_size=30), st.integers(1, 4), st.booleans())
def test_every_item_once_and_in_order_if_asked(delays: list[int], jobs: int, ordered: bool) -> None:
    through: list[int] = []

    def work(item: tuple[int, int]) -> Iterator[int]:
        time.sleep(item[1] / 2000)
        yield item[0]
        through.append(item[0])

    found = list(side_by_side(work, enumerate(delays), jobs, ordered=ordered))
    assert (found if ordered else sorted(found)) == list(range(len(delays)))
    assert sorted(through) == list(range(len(delays))), "what comes after the outcome is done as well"


def test_no_more_is_begun_than_may_be_ahead_and_an_early_end_ends_all() -> None:
    begun: list[int] = []
    taken = threading.Event()

    def items() -> Iterator[int]:
        yield from range(10_000)

    def work(item: int) -> Iterator[int]:
        begun.append(item)
        yield item

    results = side_by_side(work, items(), 2)
    for expected in range(50):
        assert next(results) == expected
        assert len(begun) <= expected + 1 + 2 * AHEAD
    results.close()  # type: ignore[attr-defined]
    count = len(begun)
    assert not taken.wait(0.05)
    assert len(begun) == count


def test_unordered_a_slow_one_holds_up_nobody() -> None:
    go_on = threading.Event()

    def work(item: int) -> Iterator[int]:
        if item == 0:
            assert go_on.wait(30)
        yield item

    results = side_by_side(work, range(8), 2, ordered=False)
    assert sorted(next(results) for _ in range(7)) == list(range(1, 8))
    go_on.set()
    assert list(results) == [0]


def test_what_one_raises_is_raised_and_nothing_begins_after_it() -> None:
    begun: list[int] = []

    def work(item: int) -> Iterator[int]:
        begun.append(item)
        if item == 3:
            raise KeyError("three")
        yield item

    results = side_by_side(work, range(1000), 2)
    assert [next(results) for _ in range(3)] == [0, 1, 2]
    with pytest.raises(KeyError, match="three"):
        next(results)
    assert len(begun) <= 4 + 2 * AHEAD


@pytest.mark.parametrize("ordered", [True, False])
def test_an_outcome_is_there_before_its_work_is_through_and_the_end_waits_for_that(ordered: bool) -> None:
    taken = threading.Event()
    through: list[int] = []

    def work(item: int) -> Iterator[int]:
        yield item
        assert taken.wait(30)
        through.append(item)

    results = side_by_side(work, range(2), 2, ordered=ordered)
    assert {next(results), next(results)} == {0, 1}
    assert through == []
    taken.set()
    assert list(results) == []
    assert sorted(through) == [0, 1]


def test_what_is_raised_after_an_outcome_is_raised_too() -> None:
    begun: list[int] = []

    def work(item: int) -> Iterator[int]:
        begun.append(item)
        yield item
        if item == 3:
            raise KeyError("three")

    with pytest.raises(KeyError, match="three"):
        list(side_by_side(work, range(100_000), 2))
    assert len(begun) < 100_000
    taken = threading.Event()

    def last(item: int) -> Iterator[int]:
        yield item
        if item == 9:
            assert taken.wait(30)
            raise KeyError("nine")

    results = side_by_side(last, range(10), 2)
    assert [next(results) for _ in range(10)] == list(range(10))
    taken.set()
    with pytest.raises(KeyError, match="nine"):
        next(results)


@pytest.mark.parametrize(
    ("jobs", "threads", "images", "expected"),
    [
        (None, None, 1, (1, None)), (8, None, 1, (1, None)), (None, None, 9, (4, 1)), (None, None, 3, (3, 1)),
        (2, None, 9, (2, 2)), (1, None, 9, (1, None)), (None, 1, 9, (1, 1)), (3, 1, 9, (3, 1)), (None, 2, 9, (2, 1)),
        (None, 8, 2, (2, 4)), (1, 3, 9, (1, 3)), (16, None, 9, (9, 1)),
    ],
)  # fmt: skip
def test_the_threads_are_shared_out(
    monkeypatch: pytest.MonkeyPatch, jobs: int | None, threads: int | None, images: int, expected: Any
) -> None:
    monkeypatch.setattr("magsd_runtime.backends.onnx_runtime.available_cores", lambda: 4)
    assert _share(jobs, threads, images) == expected


@pytest.mark.parametrize(
    ("groups", "limits", "expected"),
    [
        ("0::/\n", {}, []),
        ("0::/\n", {"cpu.max": "max 100000\n"}, []),
        ("0::/\n", {"cpu.max": "150000 100000\n"}, [1.5]),
        ("0::/a/b\n", {"a/b/cpu.max": "400000 100000\n", "a/cpu.max": "max 100000\n", "cpu.max": "5 10\n"}, [4, 0.5]),
        ("0::/host/its/name\n", {"cpu.max": "200000 100000\n"}, [2]),
        ("5:cpuset:/\n3:cpu,cpuacct:/c\n", {"cpu/c/cpu.cfs_quota_us": "30\n", "cpu/c/cpu.cfs_period_us": "10\n"}, [3]),
        ("3:cpu:/\n0::/\n", {"cpu/cpu.cfs_quota_us": "-1\n", "cpu/cpu.cfs_period_us": "100000\n"}, []),
        ("0::/\n", {"cpu.max": "5 0\n"}, []),
        ("nonsense\n\n1\n", {"cpu.max": "x\n"}, []),
    ],
)  # fmt: skip
def test_a_containers_quota_of_the_cores(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, groups: str, limits: dict[str, str], expected: list[float]
) -> None:
    for name, text in limits.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    (tmp_path / "groups").write_text(groups)
    quotas = list(hardware._cpu_quotas(str(tmp_path / "groups"), str(tmp_path)))
    assert quotas == expected
    monkeypatch.setattr(hardware, "_cpu_quotas", lambda: iter(quotas))
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(3)))
    assert hardware.usable_cores() == max(1, min([3, *(-int(-quota // 1) for quota in expected)]))


def test_no_film_is_opened_for_the_name_of_another(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first result of a hundred thousand films waits for none of them."""
    opened: list[str] = []
    monkeypatch.setattr(naming, "_lends_its_name", lambda path: opened.append(path.name) or path.suffix == ".png")
    monkeypatch.setattr(naming, "_content_sha256", lambda path: opened.append(path.name))
    names = naming.OutputNames([str(tmp_path / name) for name in ("a.png", "b.dcm", "c.png", "d.dcm")])
    assert opened == []
    assert [names[2].stem, names[3].stem] == ["c", "input-4"]
    assert opened == ["c.png", "d.dcm", "d.dcm"]


def test_side_by_side_gives_what_one_after_the_other_gives(
    bundle: Path, films: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    common = (films, "--bundle", bundle, "--json")
    code, alone, said = run(capsys, *common, "--jobs", 1)
    assert (code, len(alone), said) == (3, 14, totals(alone))
    for options in ((), ("--jobs", 3), ("--jobs", 3, "--unordered"), ("--threads", 2)):
        again, lines, same = run(capsys, *common, *options)
        assert (again, same) == (code, said)
        if "--unordered" in options:
            lines.sort(key=lambda line: line["path"])
        assert [without_times(line) for line in lines] == [without_times(line) for line in alone]
    for jobs in (1, 3):
        assert run(capsys, *common, "--jobs", jobs, "--out", tmp_path / str(jobs))[0] == 3
    files = sorted(path.name for path in (tmp_path / "1").iterdir())
    assert files == sorted(path.name for path in (tmp_path / "3").iterdir())
    for name in files:
        contents = [(tmp_path / jobs / name).read_bytes() for jobs in ("1", "3")]
        if name.endswith(".json"):
            one, three = (without_times(json.loads(content)) for content in contents)
            assert {**one, "files": None} == {**three, "files": None}
        else:
            assert contents[0] == contents[1]


def test_the_first_line_is_out_while_the_next_film_is_judged(
    bundle: Path, films: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    first_is_out = threading.Event()
    predict, shown = Pipeline.predict, []

    def watched(self: Pipeline, path: Path, **options: Any) -> Any:
        assert Path(path).name == "00.png" or first_is_out.wait(30)
        return predict(self, path, **options)

    class Out:
        def write(self, text: str) -> int:
            shown.append(text)
            first_is_out.set()
            return len(text)

        def flush(self) -> None: ...

        def isatty(self) -> bool:
            return False

    monkeypatch.setattr(Pipeline, "predict", watched)
    monkeypatch.setattr(sys, "stdout", Out())
    assert infer([str(films), "--bundle", str(bundle), "--json", "--jobs", "2"]) == 3
    assert len([text for text in shown if text.strip()]) == 14


@pytest.mark.parametrize("jobs", ["1", "2"])
def test_a_line_is_out_before_its_picture_is_drawn_and_the_end_waits_for_the_pictures(
    bundle: Path, films: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, jobs: str
) -> None:
    """Each picture is drawn only once its film's line was seen; without that it would never be."""
    from magsd_runtime import overlay

    draw, seen = overlay.save_overlay, {f"{number:02}": threading.Event() for number in range(12)}
    late: list[str] = []

    def watched(path: Path, *arguments: Any) -> None:
        stem = path.name.removesuffix("_overlay.jpg")
        if stem in seen and not seen[stem].wait(30):
            late.append(stem)
        draw(path, *arguments)

    class Out:
        def write(self, text: str) -> int:
            if text.strip():
                event = seen.get(Path(json.loads(text)["path"]).stem)
                if event is not None:
                    event.set()
            return len(text)

        def flush(self) -> None: ...

        def isatty(self) -> bool:
            return False

    monkeypatch.setattr(overlay, "save_overlay", watched)
    monkeypatch.setattr(sys, "stdout", Out())
    out = tmp_path / "out"
    assert infer([str(films), "--bundle", str(bundle), "--out", str(out), "--json", "--jobs", jobs]) == 3
    assert not late
    for number in range(12):
        assert cv2.imread(str(out / f"{number:02}_overlay.jpg")) is not None


@pytest.mark.parametrize("jobs", [1, 2])
def test_a_picture_that_fails_is_told_at_the_end_and_in_the_record(
    bundle: Path, films: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any, jobs: int
) -> None:
    from magsd_runtime import overlay

    draw = overlay.save_overlay

    def fail(path: Path, *arguments: Any) -> None:
        if path.name == "03_overlay.jpg":
            raise RuntimeError("no font")
        draw(path, *arguments)

    monkeypatch.setattr(overlay, "save_overlay", fail)
    monkeypatch.delenv("MAGSD_TRACEBACK", raising=False)
    code, lines, said = run(capsys, films, "--bundle", bundle, "--json", "--out", tmp_path, "--jobs", jobs)
    assert code == 1
    reason = "the overlay could not be drawn (RuntimeError)"
    assert said == totals(lines) + f"magsd infer: no overlay of 1 of 14 images ({reason}); the predictions stand\n"
    for number in (3, 4):
        record = json.loads((tmp_path / f"{number:02}.json").read_text())
        line = next(line for line in lines if line["path"] == record["path"])
        assert line["status"] == record["status"]
        assert ("overlay_failed" in [each["code"] for each in record["reasons"]]) is (number == 3)
        assert ("overlay" in record["files"]) is (number != 3)


def test_a_folder_that_cannot_be_written_ends_the_run_with_one_line(
    bundle: Path, films: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("magsd_runtime.files.write_json", refuse)
    with pytest.raises(UsageError, match="No space left on device"):
        infer([str(films), "--bundle", str(bundle), "--out", str(tmp_path / "out"), "--jobs", "2"])


INTERRUPTED = """
import sys, threading
from concurrent.futures import ThreadPoolExecutor
from magsd_runtime.pipeline import Pipeline
from magsd import cli

predict, end = Pipeline.predict, ThreadPoolExecutor.shutdown

def hanging(self, path, **options):
    if path.name == "05.png":
        threading.Event().wait()
    return predict(self, path, **options)

def ending(self, **options):
    print("ending", flush=True)
    end(self, **options)

Pipeline.predict, ThreadPoolExecutor.shutdown = hanging, ending
cli.run()
"""


def test_a_second_ctrl_c_does_not_wait_for_a_film_that_hangs(bundle: Path, films: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    arguments = ["infer", str(films), "--bundle", str(bundle), "--out", str(out), "--jobs", "2", "--json"]
    process = subprocess.Popen(
        [sys.executable, "-c", INTERRUPTED, *arguments], env=ENVIRONMENT, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        # a shell's background job ignores Ctrl-C, and so would its children
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )  # fmt: skip
    assert process.stdout is not None
    # the others are done: the thread that is left judges them
    while len(list(out.glob("[!.]*.json"))) < 13 and process.poll() is None:
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    lines = []
    while (line := process.stdout.readline()) and line != "ending\n":
        lines.append(json.loads(line))
    process.send_signal(signal.SIGINT)
    rest, errors = process.communicate(timeout=60)
    assert (process.returncode, rest, errors) == (130, "", "magsd infer: interrupted\n")
    assert [Path(line["path"]).name for line in lines] == [f"{number:02}.png" for number in range(5)]
    for path in out.iterdir():
        assert path.suffix != ".json" or json.loads(path.read_text())["status"]
        assert path.suffix != ".jpg" or cv2.imread(str(path)) is not None


def test_quiet_is_quiet_until_the_last_thread_has_left() -> None:
    """pydicom's warnings and log lines quote the header."""
    import logging

    logger, said = logging.getLogger("pydicom"), []
    handler = logging.Handler()
    handler.emit = said.append  # type: ignore[method-assign]
    logger.addHandler(handler)
    inside, leave = threading.Event(), threading.Event()

    def other() -> None:
        with quiet():
            inside.set()
            leave.wait(30)
            logger.warning("a name")
            warnings.warn("a name", stacklevel=1)

    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            thread = threading.Thread(target=other)
            with quiet():
                thread.start()
                assert inside.wait(30)
            leave.set()
            thread.join()
            assert not said
            assert not caught
            logger.warning("of ours")
            warnings.warn("of ours", stacklevel=1)
            assert len(said) == len(caught) == 1
    finally:
        logger.removeHandler(handler)


# --- --resume ------------------------------------------------------------------------------------


def command(films: Path, bundle: Path, out: Path, *more: str) -> list[str]:
    arguments = ["infer", str(films), "--bundle", str(bundle), "--out", str(out), "--resume", "--json", *more]
    return [sys.executable, "-m", "magsd.cli", *arguments]


def results(out: Path) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for path in out.iterdir():
        if path.name == "lines.jsonl":
            continue
        if path.name.startswith(".") or path.suffix != ".json":
            found[path.name] = path.read_bytes()
        else:
            record = without_times(json.loads(path.read_text()))
            found[path.name] = {**record, "files": sorted(record["files"])}
    return found


@pytest.mark.parametrize(("jobs", "more"), [("1", ()), ("2", ()), ("2", ("--unordered", "--no-overlay"))])
def test_killed_and_gone_on_with_it_ends_as_if_it_had_not_been(
    bundle: Path, films: Path, tmp_path: Path, jobs: str, more: tuple[str, ...]
) -> None:
    for number in range(30):  # enough that it is never through before it is killed
        shutil.copy(films / f"{number % 12:02}.png", films / f"more{number}.png")
    out, whole = tmp_path / "out", tmp_path / "whole"

    def arguments(folder: Path) -> list[str]:
        return command(films, bundle, folder, "--jobs", jobs, "--lines", str(folder / "lines.jsonl"), *more)

    subprocess.run(arguments(whole), env=ENVIRONMENT, capture_output=True)
    seen: list[str] = []
    for lines in (1, 9, 4):
        child = subprocess.Popen(arguments(out), env=ENVIRONMENT, stdout=subprocess.PIPE, text=True)
        assert child.stdout is not None
        seen += [json.loads(child.stdout.readline())["path"] for _ in range(lines)]
        child.send_signal(signal.SIGKILL)
        child.communicate()
        in_file = {json.loads(line)["path"] for line in (out / "lines.jsonl").read_text().splitlines()}
        assert set(seen) <= in_file, "what was told is kept"
    done = subprocess.run(arguments(out), env=ENVIRONMENT, capture_output=True, text=True)
    assert done.returncode == 3
    last = [line["path"] for line in records(done.stdout)]
    # only films whose picture was being drawn when their line was out already, one a thread
    assert len(set(seen) & set(last)) <= 3 * int(jobs)
    found, expected = results(out), results(whole)
    records_of_all = [record for name, record in expected.items() if name.endswith(".json") and name[0] != "."]
    assert done.stderr == totals(records_of_all, before=44 - len(last))
    assert {name: found[name] for name in expected} == expected
    assert {name for name in found.keys() - expected.keys() if not name.startswith(".")} == set()
    lines_of = [read_lines(folder / "lines.jsonl") for folder in (out, whole)]
    assert [len(each) for each in lines_of] == [44, 44], "nothing lost, nothing doubled"
    if "--unordered" in more:
        lines_of = [sorted(each, key=lambda line: line["path"]) for each in lines_of]
    assert lines_of[0] == lines_of[1]
    assert [line["path"] for line in lines_of[1]] == sorted(str(path) for path in films.iterdir())


def read_lines(file: Path) -> list[dict[str, Any]]:
    return [{**without_times(line), "files": None} for line in records(file.read_text())]


@pytest.fixture
def finished(bundle: Path, films: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Path:
    out = tmp_path / "out"
    code, lines, said = run(capsys, films, "--bundle", bundle, "--json", "--out", out, "--resume")
    assert (code, len(lines), said) == (3, 14, totals(lines))
    code, none, said = run(capsys, films, "--bundle", bundle, "--json", "--out", out, "--resume")
    assert (code, none, said) == (3, [], totals(lines, before=14))
    return out


def again(capsys: pytest.CaptureFixture[str], films: Path, bundle: Path, out: Path, *more: object) -> list[str]:
    _, lines, _ = run(capsys, films, "--bundle", bundle, "--json", "--out", out, "--resume", *more)
    return [Path(line["path"]).name for line in lines]


def edit(file: Path, **changes: Any) -> None:
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


def test_what_is_not_as_it_would_be_is_done_again(
    bundle: Path, films: Path, finished: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    later = time.time() + 60
    os.utime(films / "00.png", (later, later))  # the film has changed
    (finished / "01.json").unlink()
    (finished / "02.json").write_text('{"status": "ok"')
    (finished / "03.json").write_text("[]")
    (finished / "04_overlay.jpg").unlink()
    edit(finished / "05.json", path="another.png")
    edit(finished / "06.json", reasons=[{"code": "out_of_memory", "message": "m"}], status="error")
    files = json.loads((finished / "07.json").read_text())["files"]
    edit(finished / "07.json", files={"json": files["json"]})
    old = (finished / resuming.MARK).stat().st_mtime_ns - 1
    os.utime(finished / "08.json", ns=(old, old))
    wanted = [f"{number:02}.png" for number in range(9)]
    assert again(capsys, films, bundle, finished) == wanted
    os.utime(films / "00.png", (1, 1))
    assert again(capsys, films, bundle, finished) == []
    assert again(capsys, films, bundle, finished, "--no-overlay") == []


def test_a_record_without_an_overlay_is_not_enough_where_one_is_asked_for(
    bundle: Path, films: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    assert len(again(capsys, films, bundle, out, "--no-overlay")) == 14
    # the file that is no picture can have none
    assert len(again(capsys, films, bundle, out)) == 13


def test_other_rules_or_another_calibration_begin_anew(
    bundle: Path, films: Path, finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rules = tmp_path / "rules.json"
    print_rules = subprocess.run(
        [sys.executable, "-m", "magsd.cli", "infer", "--print-rules"], env=ENVIRONMENT, capture_output=True, text=True
    )
    changed = json.loads(print_rules.stdout)
    changed["uncertainty"]["unsure"] = "ok"
    rules.write_text(json.dumps(changed))
    other = tmp_path / "other"
    shutil.copytree(bundle, other)
    edit(other / "bundle.json", version="2")
    assert len(again(capsys, films, other, finished)) == 14
    assert again(capsys, films, other, finished) == []
    assert len(again(capsys, films, other, finished, "--rules", rules)) == 14
    assert len(again(capsys, films, other, finished)) == 14
    # a run of the first bundle without --resume makes what is there nobody's
    run(capsys, films / "00.png", "--bundle", bundle, "--json", "--out", finished)
    assert not (finished / resuming.MARK).exists()
    assert len(again(capsys, films, other, finished)) == 14
    # one of the same bundle does not
    run(capsys, films / "00.png", "--bundle", other, "--json", "--out", finished)
    assert again(capsys, films, other, finished) == []


def test_resume_needs_the_records(bundle: Path, films: Path) -> None:
    with pytest.raises(UsageError, match="--resume goes with --out or --lines"):
        infer([str(films), "--bundle", str(bundle), "--resume"])


# --- --lines -------------------------------------------------------------------------------------


@pytest.fixture
def lines(bundle: Path, films: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Path:
    file = tmp_path / "lines" / "lines.jsonl"
    code, printed, said = run(capsys, films, "--bundle", bundle, "--json", "--lines", file)
    assert (code, len(printed), said) == (3, 14, totals(printed))
    assert records(file.read_text()) == printed
    return file


def gone_on(capsys: pytest.CaptureFixture[str], films: Path, bundle: Path, file: Path, *more: object) -> list[str]:
    code, lines, _ = run(capsys, films, "--bundle", bundle, "--json", "--lines", file, "--resume", *more)
    assert code == 3
    return [Path(line["path"]).name for line in lines]


def test_a_torn_file_of_lines_is_gone_on_with_wherever_it_was_torn(
    bundle: Path, films: Path, lines: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    whole, expected = lines.read_bytes(), read_lines(lines)
    names = sorted(path.name for path in films.iterdir())
    ends = [place + 1 for place, byte in enumerate(whole) if byte == ord("\n")]
    assert gone_on(capsys, films, bundle, lines) == []
    assert lines.read_bytes() == whole
    for done, length in ((0, 0), (0, 1), (0, ends[0] - 1), (1, ends[0]), (6, ends[5] + 700), (13, ends[13] - 1)):
        lines.write_bytes(whole[:length])
        assert gone_on(capsys, films, bundle, lines) == names[done:]
        assert read_lines(lines) == expected


def test_lines_that_do_not_count_are_judged_again_and_all_is_in_order_at_the_end(
    bundle: Path, films: Path, lines: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    expected = read_lines(lines)
    content = lines.read_bytes().splitlines(keepends=True)
    fault = {**json.loads(content[4]), "status": "error", "reasons": [{"code": "out_of_memory", "message": "m"}]}
    content[2], content[7] = b"{}\n", b'{"path": 3, "status": "ok", "reasons": [], "schema": "magsd.prediction/1"}\n'
    content[4] = json.dumps(fault).encode() + b"\n"
    content[9] += b"\0" * 40 + b"\n"
    content += [content[0], content[0]]
    lines.write_bytes(b"".join(content))
    names = sorted(path.name for path in films.iterdir())
    assert gone_on(capsys, films, bundle, lines) == [names[number] for number in (2, 4, 7)]
    assert read_lines(lines) == expected
    # a film that came later has its place, one that was changed is judged again, and those of other folders stay
    later = time.time() + 60
    os.utime(films / "03.png", (later, later))
    shutil.copy2(films / "03.png", films / "03a.png")
    other = films.parent / "other"
    other.mkdir()
    shutil.copy(films / "00.png", other / "00.png")
    assert len(run(capsys, other, "--bundle", bundle, "--json", "--lines", lines, "--resume")[1]) == 1
    assert gone_on(capsys, films, bundle, lines) == ["03.png", "03a.png"]
    paths = [line["path"] for line in read_lines(lines)]
    assert paths == [str(other / "00.png"), *sorted(str(path) for path in films.iterdir())]


def test_a_fault_of_the_machine_has_its_line_and_is_judged_again(
    bundle: Path, films: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "lines.jsonl"
    monkeypatch.delenv("MAGSD_TRACEBACK", raising=False)
    with monkeypatch.context() as patch:
        patch.setattr("magsd_runtime.pipeline.standardize", lambda *_: (_ for _ in ()).throw(MemoryError()))
        code, printed, _ = run(capsys, films, "--bundle", bundle, "--json", "--lines", file, "--jobs", 1)
        assert (code, len(printed)) == (3, 14)
        again, printed, _ = run(capsys, films, "--bundle", bundle, "--json", "--lines", file, "--resume", "--jobs", 1)
        assert (again, len(printed)) == (3, 13)  # not the one that is no picture
    assert len(read_lines(file)) == 14
    assert len(gone_on(capsys, films, bundle, file)) == 13
    assert run(capsys, films, "--bundle", bundle, "--json", "--lines", tmp_path / "healthy.jsonl")[0] == 3
    assert read_lines(file) == read_lines(tmp_path / "healthy.jsonl")


def test_lines_are_never_mixed_or_overwritten(
    bundle: Path, films: Path, lines: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    import fcntl

    content = lines.read_bytes()
    common = [str(films), "--bundle", str(bundle), "--lines", str(lines)]
    with pytest.raises(UsageError, match="is there already: --resume goes on with it"):
        infer(common)
    other = tmp_path / "other"
    shutil.copytree(bundle, other)
    edit(other / "bundle.json", version="2")
    with pytest.raises(UsageError, match="holds results of another bundle"):
        infer([str(films), "--bundle", str(other), "--lines", str(lines), "--resume"])
    foreign = tmp_path / "notes.txt"
    foreign.write_text("mine\n")
    with pytest.raises(UsageError, match="holds results of another bundle"):
        infer([str(films), "--bundle", str(bundle), "--lines", str(foreign), "--resume"])
    with open(lines.with_name(".lines.jsonl.lock"), "ab") as held:
        fcntl.flock(held.fileno(), fcntl.LOCK_EX)
        with pytest.raises(UsageError, match="another magsd infer writes it"):
            infer([*common, "--resume"])
    with pytest.raises(UsageError, match="cannot be written"):
        infer([str(films), "--bundle", str(bundle), "--lines", str(films / "00.png" / "lines.jsonl")])
    assert lines.read_bytes() == content
    assert foreign.read_text() == "mine\n"
    capsys.readouterr()


def test_with_records_and_lines_a_film_is_done_where_it_has_both(
    bundle: Path, films: Path, lines: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    expected, out = read_lines(lines), tmp_path / "out"
    names = sorted(path.name for path in films.iterdir())
    assert gone_on(capsys, films, bundle, lines, "--out", out) == names
    assert read_lines(lines) == expected
    (out / "03.json").unlink()
    content = lines.read_bytes().splitlines(keepends=True)
    lines.write_bytes(b"".join(content[:9] + content[10:]))
    assert gone_on(capsys, films, bundle, lines, "--out", out) == [names[3], names[9]]
    assert read_lines(lines) == expected
    assert (out / "03.json").exists()

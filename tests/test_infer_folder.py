"""`magsd infer` of many films: side by side, in order or not, the same as of each film alone."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import cv2
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import tiny_bundle
from drawn_film import drawn_film
from magsd_runtime import hardware, naming
from magsd_runtime.dicom.parsing import quiet
from magsd_runtime.errors import UsageError
from magsd_runtime.inferring_commands import _share, infer
from magsd_runtime.parallel import AHEAD, side_by_side
from magsd_runtime.pipeline import Pipeline
from many_films import draw, run, totals, without_times
from test_runtime_commands import ENVIRONMENT


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_bundle.build(tmp_path_factory.mktemp("bundle") / "b")


@pytest.fixture
def films(tmp_path: Path) -> Path:
    return draw(tmp_path / "films")


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
    monkeypatch.setattr("magsd_runtime.hardware.usable_cores", lambda: 4)
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


def test_the_shipped_model_says_of_films_together_what_it_says_of_each_alone(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "films"
    folder.mkdir()
    for number, (height, width) in enumerate([(300, 260), (512, 640), (900, 800), (1300, 1100)]):
        cv2.imwrite(str(folder / f"{number}.png"), drawn_film(number, height, width))
    alone = [run(capsys, film, "--json")[1][0] for film in sorted(folder.iterdir())]
    assert any(line["findings"] for line in alone)
    for options in (("--jobs", 2), ("--jobs", 3, "--threads", 3), ("--jobs", 1)):
        together = run(capsys, folder, "--json", *options)[1]
        assert list(map(without_times, together)) == list(map(without_times, alone))


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

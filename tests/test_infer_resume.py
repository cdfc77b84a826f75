"""`magsd infer --resume`: gone on with after a kill, from the records of --out and from the file of --lines."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import tiny_bundle
from magsd_runtime import resuming
from magsd_runtime.errors import UsageError
from magsd_runtime.inferring_commands import infer
from magsd_runtime.lines_file import LinesFile
from many_films import draw, run, totals, without_times
from test_runtime_commands import ENVIRONMENT, records


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_bundle.build(tmp_path_factory.mktemp("bundle") / "b")


@pytest.fixture
def films(tmp_path: Path) -> Path:
    return draw(tmp_path / "films")


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
        place = lines.stat().st_ino
        assert gone_on(capsys, films, bundle, lines) == names[done:]
        assert read_lines(lines) == expected
        assert lines.stat().st_ino == place, "a disk without room for a second file is enough"


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


GOOD, FAULTY, NO_PREDICTION, NO_JSON = range(4)


def piece(kind: int, film: int, number: int) -> bytes:
    reasons = [{"code": "fault" if kind == FAULTY else "no_contrast", "message": str(number)}]
    value = {"schema": "magsd.prediction/1", "path": f"{film}.png", "status": "error", "reasons": reasons}
    if kind == NO_PREDICTION:
        del value[sorted(value)[number % 4]]
    return (b"\xff{" + bytes([number % 256]) if kind == NO_JSON else json.dumps(value).encode()).replace(
        b"\n", b""
    ) + b"\n"


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 3), st.integers(0, 3)), max_size=12), st.integers(0, 300), st.booleans())
def test_what_is_kept_of_any_file(
    tmp_path_factory: pytest.TempPathFactory, kinds: list[tuple[int, int]], torn: int, ordered: bool
) -> None:
    """Against the plainest way of saying it: the last line of a film counts."""
    folder = tmp_path_factory.mktemp("lines")
    file, mark = folder / "lines", folder / ".lines.resume.json"
    pieces = [piece(kind, film, number) for number, (kind, film) in enumerate(kinds)]
    content = b"".join(pieces)
    content = content[: max(0, len(content) - torn)]
    whole = pieces[: content.count(b"\n")]
    file.write_bytes(content)
    mark.write_text("{}")
    lines = LinesFile(file, {}, resume=True)
    last = {film: (kind, number) for number, (kind, film) in enumerate(kinds[: len(whole)]) if kind in (GOOD, FAULTY)}
    kept = sorted((number, film) for film, (kind, number) in last.items() if kind == GOOD)
    assert file.read_bytes() == b"".join(whole[number] for number, _ in kept)
    assert [film for film in range(4) if lines.earlier_status(f"{film}.png")] == sorted(film for _, film in kept)
    new = [piece(FAULTY, film, 99) for film in (2, 0)]
    for film, line in zip((2, 0), new):
        lines.add(line.decode().rstrip(), f"{film}.png")
    lines.finish([f"{film}.png" for film in (3, 2, 1, 0)] if ordered else None)
    final = {film: whole[number] for number, film in kept if film not in (0, 2)} | {2: new[0], 0: new[1]}
    if ordered and kept:
        final = {film: final[film] for film in (3, 2, 1, 0) if film in final}
    assert file.read_bytes() == b"".join(final.values())

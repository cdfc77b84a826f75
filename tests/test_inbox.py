"""Which files of a folder are finished, and what the ledger remembers of them."""

from __future__ import annotations

import errno
import json
import os
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from magsd_runtime.inbox import Inbox, identity, instance_key
from magsd_runtime.ledger import AGAIN, DONE, DUPLICATE, QUARANTINED, RETRY, Entry, Identity, Ledger


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def inbox(tmp_path: Path, clock: Clock) -> Inbox:
    (tmp_path / "in").mkdir()
    return Inbox(tmp_path / "in", settle=2.0, clock=clock)


def names(inbox: Inbox, limit: int = 100) -> list[str]:
    return [candidate.path.relative_to(inbox.folder).as_posix() for candidate in inbox.scan(limit)]


# --- inbox ---------------------------------------------------------------------------------------


def test_a_file_is_finished_when_it_has_not_changed_for_the_settle_time(inbox: Inbox, clock: Clock) -> None:
    film = inbox.folder / "a.dcm"
    film.write_bytes(b"x")
    for _ in range(5):  # a slow sender
        assert names(inbox) == []
        assert inbox.waiting == 1
        with open(film, "ab") as file:
            file.write(b"x")
        clock.now += 1.9
    assert names(inbox) == []
    clock.now += 1.9
    assert names(inbox) == []
    clock.now += 0.2
    assert names(inbox) == ["a.dcm"]
    assert inbox.scan(9)[0].unchanged_for == pytest.approx(2.1)
    assert (inbox.ready, inbox.waiting) == (1, 0)


def test_the_times_of_a_file_are_not_held_against_our_clock(inbox: Inbox, clock: Clock) -> None:
    for name, age in (("old", 1e9), ("future", -1e6)):
        (inbox.folder / name).write_bytes(b"x")
        when = (inbox.folder / name).stat().st_mtime - age
        os.utime(inbox.folder / name, (when, when))
    assert names(inbox) == []
    clock.now += 2
    assert names(inbox) == ["old", "future"]


@pytest.mark.parametrize("change", ["content", "size", "times", "replaced"])
def test_any_change_makes_it_wait_again(inbox: Inbox, clock: Clock, change: str) -> None:
    film = inbox.folder / "a"
    film.write_bytes(b"one")
    names(inbox)
    clock.now += 2
    [candidate] = inbox.scan(9)
    inbox.settle(candidate)
    assert names(inbox) == []
    assert inbox.waiting == 0
    if change == "content":
        film.write_bytes(b"two")
    elif change == "size":
        film.write_bytes(b"three")
    elif change == "times":
        before = film.stat()
        film.write_bytes(b"two")
        os.utime(film, ns=(before.st_atime_ns, before.st_mtime_ns))  # as cp -p does
    else:
        (inbox.folder / ".b").write_bytes(b"one")
        os.replace(inbox.folder / ".b", film)
    assert names(inbox) == []
    clock.now += 2
    assert names(inbox) == ["a"]


def test_put_off_is_for_a_time(inbox: Inbox, clock: Clock) -> None:
    (inbox.folder / "a").write_bytes(b"x")
    names(inbox)
    clock.now += 2
    inbox.put_off(inbox.scan(9)[0], 10)
    clock.now += 9
    assert names(inbox) == []
    assert inbox.waiting == 1
    clock.now += 1
    assert names(inbox) == ["a"]


def test_hidden_unfinished_and_foreign_things_are_passed_over(inbox: Inbox, clock: Clock, tmp_path: Path) -> None:
    for name in (".a", "~a", "a~", "a.tmp", "A.PART", "a.filepart", "a.crdownload", ".hidden/a", "deep/er/.x"):
        (inbox.folder / name).parent.mkdir(parents=True, exist_ok=True)
        (inbox.folder / name).write_bytes(b"x")
    (tmp_path / "secret").write_bytes(b"x")
    (inbox.folder / "link").symlink_to(tmp_path / "secret")
    (inbox.folder / "folder").symlink_to(tmp_path)
    os.mkfifo(inbox.folder / "pipe")
    for name in ("a", "deep/er/b.dcm", "c.partial.png"):
        (inbox.folder / name).write_bytes(b"x")
    names(inbox)
    clock.now += 2
    assert sorted(names(inbox)) == ["a", "c.partial.png", "deep/er/b.dcm"]
    os.rename(inbox.folder / "A.PART", inbox.folder / "A.png")
    names(inbox)
    clock.now += 2
    assert "A.png" in names(inbox)


def test_the_oldest_come_first_and_no_more_than_the_limit(inbox: Inbox, clock: Clock) -> None:
    for number in (3, 1, 2, 5, 4):
        (inbox.folder / str(number)).write_bytes(b"x")
        os.utime(inbox.folder / str(number), (number, number))
    names(inbox)
    clock.now += 2
    assert names(inbox, 3) == ["1", "2", "3"]
    assert inbox.ready == 5


def test_a_file_that_goes_is_forgotten_and_a_folder_that_goes_is_an_error(inbox: Inbox, clock: Clock) -> None:
    (inbox.folder / "a").write_bytes(b"x")
    names(inbox)
    clock.now += 2
    os.rename(inbox.folder / "a", inbox.folder / ".a")
    assert names(inbox) == []
    os.rename(inbox.folder / ".a", inbox.folder / "a")
    assert names(inbox) == []  # renamed in: it might be another one by now
    (inbox.folder / "a").unlink()
    inbox.folder.rmdir()
    with pytest.raises(FileNotFoundError):
        inbox.scan(9)


def test_the_key_of_a_dicom_instance(tmp_path: Path) -> None:
    pydicom = pytest.importorskip("pydicom")
    dataset = pydicom.Dataset()
    dataset.SOPClassUID, dataset.SOPInstanceUID, dataset.PatientName = "1.2.840.10008.5.1.4.1.1.7", "1.2.3.4", "X^Y"
    dataset.file_meta = pydicom.dataset.FileMetaDataset()
    dataset.file_meta.TransferSyntaxUID = pydicom.uid.ExplicitVRLittleEndian
    dataset.save_as(tmp_path / "a", enforce_file_format=True)
    dataset.PatientName = "Z"
    dataset.save_as(tmp_path / "b", enforce_file_format=True)
    (tmp_path / "bare").write_bytes((tmp_path / "a").read_bytes()[132:])  # without the preamble
    (tmp_path / "cut").write_bytes((tmp_path / "a").read_bytes()[:140])
    (tmp_path / "text").write_bytes(b"1.2.3.4" * 100)
    keys = [instance_key(tmp_path / name) for name in ("a", "b", "bare", "cut", "text", "missing")]
    assert keys[0] is not None
    assert "1.2.3" not in keys[0]
    assert keys == [keys[0], keys[0], keys[0], None, None, None]
    dataset.SOPInstanceUID = "1.2.3.5"
    dataset.save_as(tmp_path / "c", enforce_file_format=True)
    assert instance_key(tmp_path / "c") not in keys


# --- ledger --------------------------------------------------------------------------------------

ONE = Identity(1, 2, 3, 4)
ENTRIES = [
    Entry(DONE, "a" * 64, "ok", identity=ONE),
    Entry(DONE, "b" * 64, "review", "i" * 64, "p" * 64),
    Entry(QUARANTINED, "c" * 64, "unreadable", identity=Identity(9, 9, 9, 9)),
    Entry(DUPLICATE, "d" * 64, instance="i" * 64, pixels="p" * 64),
    Entry(AGAIN, "a" * 64, identity=Identity(5, 2, 3, 4)),
]


def fill(path: Path) -> Ledger:
    ledger = Ledger(path)
    for entry in ENTRIES:
        ledger.append(entry)
    return ledger


def check(ledger: Ledger) -> None:
    assert [ledger.state(letter * 64) for letter in "abcde"] == [DONE, DONE, QUARANTINED, DUPLICATE, None]
    assert ledger.content_of(ONE) == ledger.content_of(Identity(5, 2, 3, 4)) == "a" * 64
    assert ledger.content_of(Identity(6, 2, 3, 4)) is None
    assert ledger.twin("i" * 64, "p" * 64) == "b" * 64
    assert ledger.twin("i" * 64, "q" * 64) is None
    assert ledger.counts == {DONE: 2, QUARANTINED: 1, DUPLICATE: 1, AGAIN: 1}
    assert ledger.statuses == {"ok": 1, "review": 1}


def test_a_ledger_says_the_same_when_it_is_read_again(tmp_path: Path) -> None:
    check(fill(tmp_path / "l"))
    check(Ledger(tmp_path / "l"))
    lines = [json.loads(line) for line in (tmp_path / "l").read_text().splitlines()]
    assert [line["kind"] for line in lines] == [entry.kind for entry in ENTRIES]
    assert all(line["time"].endswith("Z") for line in lines)


def test_a_retry_takes_a_content_back(tmp_path: Path) -> None:
    ledger = fill(tmp_path / "l")
    ledger.append(Entry(RETRY, "c" * 64))
    for one in (ledger, Ledger(tmp_path / "l")):
        assert one.state("c" * 64) is None
        assert one.content_of(Identity(9, 9, 9, 9)) is None
        assert one.content_of(ONE) == "a" * 64


@given(st.data())
def test_a_ledger_cut_off_anywhere_goes_on(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    path = tmp_path_factory.mktemp("ledger") / "l"
    fill(path)
    content = path.read_bytes()
    end = data.draw(st.integers(0, len(content)))
    path.write_bytes(content[:end] + data.draw(st.sampled_from([b"", b"\0" * 30])))
    ledger = Ledger(path)
    whole = content[: end + 1].count(b"\n")  # a line that lacks nothing but its end counts
    assert sum(ledger.counts.values()) in (whole, content[:end].count(b"\n"))
    ledger.append(Entry(DONE, "e" * 64, "ok"))
    again = Ledger(path)
    assert again.counts == ledger.counts
    assert again.state("e" * 64) == DONE
    assert again.damaged <= 1


@pytest.mark.parametrize(
    "line", [b"{}", b"[]", b"1", b"\xff", b'{"kind":1,"content":2}', b'{"kind":"done"}', b"[" * 9999]
)
def test_a_damaged_line_is_passed_over_and_counted(tmp_path: Path, line: bytes) -> None:
    fill(tmp_path / "l")
    lines = (tmp_path / "l").read_bytes().splitlines()
    (tmp_path / "l").write_bytes(b"\n".join([*lines[:2], line, *lines[2:], b""]))
    ledger = Ledger(tmp_path / "l")
    check(ledger)
    assert ledger.damaged == 1


@pytest.mark.parametrize("cannot_cut", [False, True])
def test_a_full_disk_leaves_no_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cannot_cut: bool) -> None:
    ledger = fill(tmp_path / "l")
    write, calls = os.write, []

    def full(descriptor: int, line: Any) -> int:
        calls.append(1)
        if len(calls) > 1:
            raise OSError(errno.ENOSPC, "No space left on device")
        return write(descriptor, bytes(line)[:20])

    monkeypatch.setattr(os, "write", full)
    if cannot_cut:
        monkeypatch.setattr(os, "ftruncate", lambda *_: full(0, b""))
    with pytest.raises(OSError, match="No space"):
        ledger.append(Entry(DONE, "e" * 64, "ok"))
    monkeypatch.undo()
    assert ledger.state("e" * 64) is None
    ledger.append(Entry(DONE, "f" * 64, "ok"))
    again = Ledger(tmp_path / "l")
    assert (again.state("e" * 64), again.state("f" * 64), again.damaged) == (None, DONE, int(cannot_cut))


def test_the_identity_of_a_file(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"abc")
    status = (tmp_path / "a").stat()
    assert identity(tmp_path / "a") == (status.st_ino, 3, status.st_mtime_ns, status.st_ctime_ns)

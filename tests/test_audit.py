"""The audit log: every change of a record is found, nothing of a patient is in it, a result can be repeated."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from magsd.cli import main
from magsd_runtime import audit
from magsd_runtime.audit import BrokenChainError, append, repair, verify
from magsd_runtime.errors import ArtefactError, UsageError

ROOT = Path(__file__).resolve().parents[1]
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(ROOT / "runtime"), "OMP_NUM_THREADS": "1"}


def new_log(path: Path, count: int) -> bytes:
    path.unlink(missing_ok=True)
    for number in range(count):
        append(path, "test", {"value": number / 3, "text": "Füße\n"})
    return path.read_bytes()


def check_by_hand(content: bytes) -> list[dict[str, Any]]:
    """The chain as the documentation describes it, without the module's own code."""
    records, previous = [], "0" * 64
    lines = content.split(b"\n")
    assert lines.pop() == b""
    for number, line in enumerate(lines, 1):
        record = json.loads(line)
        stated = record.pop("hash")
        text = json.dumps(record, sort_keys=True, separators=(",", ":"), ensure_ascii=True)
        assert hashlib.sha256(text.encode()).hexdigest() == stated
        assert (record["seq"], record["previous"]) == (number, previous)
        assert json.dumps({**record, "hash": stated}, sort_keys=True, separators=(",", ":")).encode() == line
        previous = stated
        records.append(record)
    return records


# --- the chain -----------------------------------------------------------------------------------


def test_a_log_is_a_chain_as_described(tmp_path: Path) -> None:
    content = new_log(tmp_path / "log", 5)
    records = check_by_hand(content)
    assert [record["value"] for record in records] == [number / 3 for number in range(5)]
    verdict = verify(tmp_path / "log")
    assert verdict.problem is None
    assert verdict.records == 5
    assert verdict.head == json.loads(content.splitlines()[-1])["hash"]
    assert verdict.first_time == records[0]["time"]


@pytest.fixture(scope="module")
def six(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, bytes]:
    path = tmp_path_factory.mktemp("six") / "log"
    return path, new_log(path, 6)


@settings(max_examples=400, deadline=None)
@given(data=st.data())
def test_any_single_byte_edit_is_found_at_its_record(six: tuple[Path, bytes], data: st.DataObject) -> None:
    path, content = six
    place = data.draw(st.integers(0, len(content) - 1))
    byte = data.draw(st.integers(0, 255).filter(lambda value: value != content[place]))
    path.write_bytes(content[:place] + bytes([byte]) + content[place + 1 :])
    verdict = verify(path)
    assert verdict.problem is not None
    assert verdict.problem.seq == content[:place].count(b"\n") + 1
    assert verdict.records == verdict.problem.seq - 1


@settings(max_examples=200, deadline=None)
@given(data=st.data())
def test_any_byte_inserted_or_removed_is_found(six: tuple[Path, bytes], data: st.DataObject) -> None:
    path, content = six
    place = data.draw(st.integers(0, len(content) - 1))
    more = data.draw(st.binary(max_size=2))
    less = data.draw(st.integers(0 if more else 1, 3))
    changed = content[:place] + more + content[place + less :]
    path.write_bytes(changed)
    verdict = verify(path)
    if changed == content:
        assert verdict.problem is None
    else:
        assert verdict.problem is not None
        assert abs(verdict.problem.seq - (content[:place].count(b"\n") + 1)) <= 1


@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_deletion_exchange_insertion_and_repetition_are_found(six: tuple[Path, bytes], data: st.DataObject) -> None:
    path, content = six
    lines = content.splitlines(keepends=True)
    head = json.loads(lines[-1])["hash"]
    kind = data.draw(st.sampled_from(["delete", "swap", "repeat", "insert", "cut"]))
    at = data.draw(st.integers(0, len(lines) - 1))
    if kind == "delete":
        count = data.draw(st.integers(1, 3))
        changed = lines[:at] + lines[at + count :]
    elif kind == "swap":
        other = data.draw(st.integers(0, len(lines) - 1).filter(lambda value: value != at))
        changed = list(lines)
        changed[at], changed[other] = changed[other], changed[at]
    elif kind == "repeat":
        other = data.draw(st.integers(0, len(lines)))
        changed = [*lines[:other], lines[at], *lines[other:]]
    elif kind == "insert":  # a record whose own hash is right
        record = {**json.loads(lines[at]), "value": -1}
        del record["hash"]
        changed = [*lines[:at], audit.canonical({**record, "hash": audit.sha256_of(record)}) + b"\n", *lines[at:]]
    else:
        changed = lines[:at]
    path.write_bytes(b"".join(changed))
    verdict = verify(path, head=head)
    if changed == lines:
        assert verdict.problem is None
    else:
        assert verdict.problem is not None
        first = next((i for i, (a, b) in enumerate(zip(lines, changed)) if a != b), min(len(lines), len(changed)))
        assert verdict.problem.seq in (first + 1, first + 2)  # a new hash shows in the record that follows
    # what only the head can show, as the documentation says
    if kind == "cut" or (kind == "delete" and at + count >= len(lines)):
        assert verify(path).problem is None


@pytest.mark.parametrize(
    ("old", "new"),
    [
        (b"\\u00fc", b"\\u00FC"),
        (b'{"hash"', b'{ "hash"'),
        (b'"seq":2', b'"seq":2,"seq":2'),
        (b"0.3333333333333333", b"0.33333333333333330"),
    ],
)
def test_another_spelling_of_the_same_record_is_an_edit(tmp_path: Path, old: bytes, new: bytes) -> None:
    path = tmp_path / "log"
    lines = new_log(path, 3).splitlines(keepends=True)
    assert old in lines[1]
    path.write_bytes(lines[0] + lines[1].replace(old, new) + lines[2])
    problem = verify(path).problem
    assert problem is not None
    assert problem.seq == 2
    assert "not in the form" in str(problem)


def test_a_record_that_was_replaced_with_a_right_hash_is_found(tmp_path: Path) -> None:
    path = tmp_path / "log"
    lines = new_log(path, 4).splitlines(keepends=True)
    record = {**json.loads(lines[1]), "value": 99}
    del record["hash"]
    lines[1] = audit.canonical({**record, "hash": audit.sha256_of(record)}) + b"\n"
    path.write_bytes(b"".join(lines))
    problem = verify(path).problem
    assert problem is not None
    assert problem.seq == 3
    assert "one of the two was replaced" in str(problem)


@given(st.binary(max_size=300))
def test_no_bytes_make_verify_fail(tmp_path_factory: pytest.TempPathFactory, content: bytes) -> None:
    path = tmp_path_factory.getbasetemp() / "any"
    path.write_bytes(content)
    assert (verify(path).problem is None) == (content == b"")


@pytest.mark.parametrize("line", [b"[" * 5000, b"1" * 5000, b"{" + b'"a":{' * 2000, b"NaN", b'{"a":1e999}', b"\xff"])
def test_hostile_json_is_damage(tmp_path: Path, line: bytes) -> None:
    (tmp_path / "log").write_bytes(line + b"\n")
    problem = verify(tmp_path / "log").problem
    assert problem is not None
    assert not problem.torn


def test_a_head_that_was_noted(tmp_path: Path) -> None:
    path = tmp_path / "log"
    new_log(path, 3)
    head = verify(path).head
    assert verify(path, head=head).after_head == 0
    append(path, "test", {})
    verdict = verify(path, head=head)
    assert (verdict.problem, verdict.after_head) == (None, 1)
    assert verify(path, head="0" * 64).after_head == 4  # noted when the log was empty
    wrong = verify(path, head="1" * 64)
    assert "no record has the head" in str(wrong.problem)


def test_a_clock_that_was_set_back_is_noted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    times = iter(["2026-03-01T00:00:00.000Z", "2026-02-01T00:00:00.000Z", "2026-04-01T00:00:00.000Z"])
    monkeypatch.setattr(audit, "utc_now", lambda: next(times))
    new_log(tmp_path / "log", 3)
    verdict = verify(tmp_path / "log")
    assert verdict.problem is None
    assert verdict.backwards == (2,)


# --- writing -------------------------------------------------------------------------------------

WRITER = """
import sys
from magsd_runtime.audit import append
for number in range(int(sys.argv[3])):
    append(sys.argv[1], "test", {"writer": sys.argv[2], "number": number, "text": "x" * 3000})
    print(number, flush=True)
"""


def test_processes_that_append_at_once_make_one_chain(tmp_path: Path) -> None:
    path = tmp_path / "log"
    commands = [[sys.executable, "-c", WRITER, str(path), name, "40"] for name in "abc"]
    writers = [subprocess.Popen(command, env=ENVIRONMENT, stdout=subprocess.DEVNULL) for command in commands]
    assert [writer.wait(timeout=60) for writer in writers] == [0, 0, 0]
    records = check_by_hand(path.read_bytes())
    for name in "abc":
        assert [record["number"] for record in records if record["writer"] == name] == list(range(40))


def test_a_kill_leaves_whole_records_or_a_torn_end(tmp_path: Path) -> None:
    path = tmp_path / "log"
    rng = random.Random(5)
    told = 0
    for _ in range(8):
        command = [sys.executable, "-c", WRITER, str(path), "a", "100000"]
        writer = subprocess.Popen(command, env=ENVIRONMENT, stdout=subprocess.PIPE)
        assert writer.stdout is not None
        writer.stdout.readline()
        time.sleep(rng.uniform(0, 0.03))
        writer.send_signal(signal.SIGKILL)
        told += 1 + len(writer.stdout.read().split())
        writer.wait()
        verdict = verify(path)
        assert verdict.problem is None or verdict.problem.torn
        repair(path)
    verdict = verify(path)
    assert verdict.problem is None
    assert verdict.records - len(verdict.repairs) >= told  # what append returned from is there


def torn_logs(path: Path) -> Any:
    """Logs of two records, the third cut off after each of its bytes, the line break included."""
    whole = new_log(path, 3)
    start = whole[:-1].rindex(b"\n") + 1
    for end in range(start + 1, len(whole)):
        yield whole[:end], len(whole[start:end])


def test_a_torn_end_is_refused_noted_and_then_the_log_goes_on(tmp_path: Path) -> None:
    path = tmp_path / "log"
    for count, (content, size) in enumerate(torn_logs(path)):
        path.write_bytes(content)
        problem = verify(path).problem
        assert problem is not None
        assert problem.torn
        assert problem.seq == 3
        if count % 20:
            continue  # the rest of the way for some of them: it waits for the disk
        with pytest.raises(BrokenChainError, match="audit repair"):
            append(path, "test", {})
        assert path.read_bytes() == content
        record = repair(path)
        assert record is not None
        assert record["seq"] == 3
        assert record["torn"]["bytes"] == size + len(b"#torn\n")
        assert path.read_bytes().startswith(content)  # no byte is removed
        append(path, "test", {})
        verdict = verify(path)
        assert (verdict.problem, verdict.records, verdict.repairs) == (None, 4, (3,))
        assert repair(path) is None


def test_a_repair_that_was_cut_off_is_repaired_too(tmp_path: Path) -> None:
    path = tmp_path / "log"
    content = next(content for content, size in torn_logs(path) if size == 77)
    path.write_bytes(content)
    repair(path)
    whole = path.read_bytes()
    for end in [*range(len(content) + 1, len(whole), 9), len(content) + len(b"#torn\n")]:
        path.write_bytes(whole[:end])
        with pytest.raises(BrokenChainError, match="audit repair"):
            append(path, "test", {})
        problem = verify(path).problem
        assert problem is not None
        assert problem.torn
        record = repair(path)
        assert record is not None
        assert record["seq"] == 3
        assert verify(path).repairs == (3,)
        assert path.read_bytes().startswith(whole[:end])


def test_the_torn_bytes_cannot_be_changed_later(tmp_path: Path) -> None:
    path = tmp_path / "log"
    content = next(content for content, size in torn_logs(path) if size == 77)
    path.write_bytes(content)
    repair(path)
    append(path, "test", {})
    whole = path.read_bytes()
    for place in range(len(content) - 77, len(content) + 6):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
        problem = verify(path).problem
        assert problem is not None
        assert problem.seq == 3


def test_a_repair_never_covers_an_edit(tmp_path: Path) -> None:
    path = tmp_path / "log"
    content = new_log(path, 3)
    edited = content.replace(b'"seq":2', b'"seq":9')
    for damaged in (edited, edited[:-5], content[: content.rindex(b"{")] + b"{}\n"):
        path.write_bytes(damaged)
        with pytest.raises(BrokenChainError, match="cannot be repaired"):
            repair(path)
        assert path.read_bytes() == damaged
    path.write_bytes(content[: content.rindex(b"{")] + b"{}\n")
    with pytest.raises(BrokenChainError, match="damaged log"):
        append(path, "test", {})


def test_a_full_disk_leaves_the_log_as_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "log"
    content = new_log(path, 2)
    write, calls = os.write, []

    def full(descriptor: int, data: Any) -> int:
        calls.append(len(data))
        if len(calls) == 2:
            raise OSError(errno.ENOSPC, "No space left on device")
        return write(descriptor, bytes(data)[:40])

    monkeypatch.setattr(os, "write", full)
    with pytest.raises(UsageError, match="No space left"):
        append(path, "test", {})
    assert len(calls) == 2
    monkeypatch.undo()
    assert path.read_bytes() == content
    append(path, "test", {})
    assert verify(path).records == 3


@pytest.mark.parametrize("name", ["missing/log", "."])
def test_a_log_that_cannot_be_written(tmp_path: Path, name: str) -> None:
    with pytest.raises(UsageError, match="cannot be opened"):
        append(tmp_path / name, "test", {})


def test_facts_cannot_take_the_place_of_the_chain(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="seq"):
        append(tmp_path / "log", "test", {"seq": 7})
    with pytest.raises(ValueError):
        append(tmp_path / "log", "test", {"value": float("nan")})
    assert (tmp_path / "log").read_bytes() == b""


def test_the_verbs_of_audit(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    log = tmp_path / "log"
    content = new_log(log, 3)
    head = json.loads(content.splitlines()[-1])["hash"]
    assert main(["audit", "verify", str(log)]) == 0
    out = capsys.readouterr().out
    assert f"head {head}" in out
    assert "cannot show records missing at its end" in out
    log.write_bytes(b"".join(content.splitlines(keepends=True)[:2]))
    assert main(["audit", "verify", str(log)]) == 0
    assert main(["audit", "verify", str(log), "--head", head.upper(), "--json"]) == 4
    verdict = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert verdict["intact"] is False
    assert "cut off" in verdict["problem"]["message"]
    log.write_bytes(content[:-20])
    assert main(["audit", "verify", str(log)]) == 4
    assert "record 3 is torn" in capsys.readouterr().out
    assert main(["audit", "repair", str(log)]) == 0
    assert main(["audit", "verify", str(log), "--json"]) == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["repairs"] == [3]
    log.write_bytes(content.replace(b'"seq":2', b'"seq":7'))
    assert main(["audit", "verify", str(log)]) == 4
    assert "BROKEN: record 2 was edited" in capsys.readouterr().out
    assert main(["audit", "repair", str(log)]) == 4
    assert main(["audit", "repair", str(tmp_path / "none")]) == 2
    assert not (tmp_path / "none").exists()
    assert main(["audit", "verify", str(tmp_path / "none")]) == 2


def test_errors_are_precise() -> None:
    with pytest.raises(ArtefactError, match="no line break"):
        audit.read_record(b"{}")
    record = {"schema": "magsd.audit/2"}
    line = audit.canonical({**record, "hash": audit.sha256_of(record)}) + b"\n"
    with pytest.raises(ArtefactError, match=r"magsd\.audit/2"):
        audit.read_record(line)

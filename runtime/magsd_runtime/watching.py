"""Folder mode: each finished file of an inbox is judged once, with a model that stays loaded.

One process, one film after the other. What it has done is in the outbox's ledger, so that it can be stopped anywhere.
"""

from __future__ import annotations

import hashlib
import os
import sys
import time
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from .audit import utc_now
from .errors import MagsdError, UsageError
from .files import path_text, sha256_file, write_json
from .inbox import Candidate, Inbox, identity, instance_key
from .ledger import AGAIN, DONE, DUPLICATE, QUARANTINED, RETRY, Entry
from .outbox import Outbox, write_reason
from .pipeline import Pipeline, Result
from .prediction import Reason
from .watch_status import WatchStatus

if TYPE_CHECKING:
    from .images import Radiograph

MOST_ATTEMPTS = 5  # of an input during which the process was killed each time
_FAULTS = 3  # times that a fault of magsd or of the machine is met with another try
_LONGEST_WAIT = 60.0  # seconds between tries of what does not work
_HEARTBEAT = 10.0  # seconds after which the status is written although nothing has changed


@dataclass(frozen=True)
class WatchSettings:
    """``settle``, ``patience``, ``poll`` in seconds; see ``magsd watch --help``."""

    settle: float = 2.0
    patience: float = 30.0
    poll: float = 0.5
    queue: int = 100
    overlay: bool = True
    delete_done: bool = False
    keep_names: bool = False


class _BlockedError(Exception):
    """Not the input's fault: nothing can go on until somebody has made room, or given a permission."""


class _DicomFailedError(Exception):
    """A fault of magsd or of the machine: the DICOM results could not be made. The text quotes nothing of a header."""


@dataclass
class Watcher:
    """See the module; :meth:`run` until told to stop, or :meth:`round` by round."""

    pipeline: Pipeline
    inbox: Inbox
    outbox: Outbox
    settings: WatchSettings
    status: WatchStatus
    clock: Callable[[], float] = time.monotonic
    say: Callable[[str], None] = lambda line: print(line, file=sys.stderr, flush=True)
    _queue: deque[Candidate] = field(default_factory=deque)
    _scanned: float = float("-inf")
    _recovered: bool = False
    _put_off_once: set[str] = field(default_factory=set)
    _faults: dict[str, int] = field(default_factory=dict)
    _inaccessible: set[Path] = field(default_factory=set)
    _reported: float = float("-inf")
    _shown: dict[str, Any] = field(default_factory=dict)
    _wait: float = 0.0

    def run(self, stop: Callable[[], bool], *, once: bool = False) -> None:
        """Until ``stop()``; with ``once`` until nothing is left to be done. A film that was begun is finished.

        Raises
        ------
        UsageError
            With ``once``, if the disk is full or something else is in the way.
        """
        self._warm_up()
        while not stop():
            worked = self.round()
            if once and self.status.problem is not None:
                raise UsageError(f"blocked: {self.status.problem}")
            if once and not worked and not self._anything_left():
                break
            if not worked:
                self._pause(self._wait or self.settings.poll, stop)
        self.status.state = "stopped"
        self._report(force=True)

    def round(self) -> bool:
        """Look, and deal with at most one file. Returns whether there was one; never raises for a full disk."""
        try:
            worked = self._round()
        except (_BlockedError, OSError, MagsdError) as error:
            text = error.strerror or type(error).__name__ if isinstance(error, OSError) else str(error)
            if self.status.problem != text:
                self.say(f"magsd watch: blocked: {text}; trying again")
            self.status.block(text)
            self._wait = min(_LONGEST_WAIT, max(self.settings.poll, 2 * self._wait))
            self._queue.clear()
            self._recovered, worked = False, False
        else:
            if self.status.problem is not None:
                self.say("magsd watch: goes on")
            self._wait = 0.0
            self.status.unblock("working" if worked else "watching")
        self._report()
        return worked

    def _round(self) -> bool:
        if not self._recovered:
            self.status.recovered += self.outbox.recover()
            self._recovered = True
        self._look()
        while self._queue:
            candidate = self._queue.popleft()
            if self._deal_with(candidate):
                return True
        return False

    def _look(self) -> None:
        now = self.clock()
        if self._queue and now - self._scanned < 10 * self.settings.poll:
            return
        try:
            self._queue = deque(self.inbox.scan(self.settings.queue))
        except OSError as error:
            raise _BlockedError(f"the inbox cannot be listed ({error.strerror or error})") from error
        self._scanned = now
        self._inaccessible = {path for path in self._inaccessible if path.exists()}

    def _anything_left(self) -> bool:
        return self.inbox.ready > 0 or self.inbox.waiting > len(self._inaccessible)

    # --- one file ---

    def _deal_with(self, candidate: Candidate) -> bool:
        """Returns whether it was judged; what is known already costs nothing."""
        known = self.outbox.ledger.content_of(candidate.identity)
        if known is not None and self._is_settled(candidate, known):
            return False
        try:
            content = sha256_file(candidate.path)
            unchanged = identity(candidate.path) == candidate.identity
        except FileNotFoundError:
            return False
        except OSError:
            self._inaccessible.add(candidate.path)
            self.inbox.put_off(candidate, _LONGEST_WAIT)
            return False
        self._inaccessible.discard(candidate.path)
        if not unchanged:
            return False  # its time begins anew with the next look
        if self.outbox.ledger.state(content) is not None:
            if self.outbox.ledger.content_of(candidate.identity) is None:
                self.outbox.ledger.append(Entry(AGAIN, content, identity=candidate.identity))
            if self._is_settled(candidate, content):
                return False
        return self._judge(candidate, content)

    def _is_settled(self, candidate: Candidate, content: str) -> bool:
        """Whether a known content needs nothing more; finishes what a kill may have left of it."""
        ledger = self.outbox.ledger
        if ledger.state(content) == QUARANTINED:
            if self.outbox.is_lifted(content):
                ledger.append(Entry(RETRY, content))
                return False
            self.outbox.take_in(candidate.path, content)
        elif self.settings.delete_done:
            self._delete(candidate)
        self.inbox.settle(candidate)
        return True

    def _judge(self, candidate: Candidate, content: str) -> bool:
        attempts = self.outbox.attempts(content)
        if attempts >= MOST_ATTEMPTS:
            message = f"magsd was stopped {attempts} times while it judged this file: it is not tried again"
            self._quarantine(candidate, content, Reason("stopped_magsd", message))
            self.outbox.end(content)
            return True
        if attempts and content not in self._put_off_once:  # others first: it may bring us down again
            self._put_off_once.add(content)
            self.inbox.put_off(candidate, min(_LONGEST_WAIT, 0.5 * 2**attempts))
            return False
        self.outbox.begin(content)
        try:
            with self.outbox.private_name(candidate.path, content) as name:
                self._judge_under(name, candidate, content)
        except (OSError, MagsdError):  # no fault of this input; any other exception counts as an attempt
            self.outbox.end(content)
            raise
        self.outbox.end(content)
        self._put_off_once.discard(content)
        return True

    def _judge_under(self, name: Path, candidate: Candidate, content: str) -> None:
        with_heat = self.settings.overlay or self.outbox.dicom_out is not None
        result = self.pipeline.predict(name, with_heat=with_heat)
        self.status.judged += 1
        for step, milliseconds in result.prediction.timings_ms.items():
            self.status.seconds[step] = self.status.seconds.get(step, 0.0) + milliseconds / 1000
        try:
            if identity(candidate.path) != candidate.identity:
                return  # its time begins anew with the next look
        except OSError:
            return  # gone
        if result.prediction.status == "error":
            self._not_judged(candidate, content, result.prediction.reasons[0])
        else:
            self._keep(candidate, content, result, name)

    def _keep(self, candidate: Candidate, content: str, result: Result, name: Path) -> None:
        ledger, status = self.outbox.ledger, result.prediction.status
        entry = Entry(DONE, content, status, identity=candidate.identity)
        instance = instance_key(name)
        if instance is not None and result.radiograph is not None:
            entry = replace(entry, instance=instance, pixels=_pixels_sha256(result.radiograph))
            assert entry.pixels is not None
            if (twin := ledger.twin(instance, entry.pixels)) is not None:
                ledger.append(replace(entry, kind=DUPLICATE, status=""))
                self.say(f"{utc_now()} {content[:12]} is the film of {twin[:12]}, sent again with other bytes")
                self._is_settled(candidate, content)
                return
        try:
            self.outbox.commit(entry, lambda folder: self._write(folder, candidate, content, result, name))
        except _DicomFailedError as error:
            self.status.note_dicom("failed")
            self._not_judged(candidate, content, Reason("dicom_failed", str(error)))
            return
        self._faults.pop(content, None)
        milliseconds = result.prediction.timings_ms.get("total", 0.0)
        self.status.last = {"time": utc_now(), "sha256": content, "status": status, "milliseconds": milliseconds}
        self.say(f"{utc_now()} {content[:12]} {status} {milliseconds:.0f} ms")
        self._is_settled(candidate, content)

    def _write(self, folder: Path, candidate: Candidate, content: str, result: Result, name: Path) -> None:
        shown = f"sha256:{content}"
        if self.settings.keep_names:
            relative = os.fspath(candidate.path.relative_to(self.inbox.folder))
            shown = path_text(relative)
        prediction = replace(result.prediction, path=shown)
        files = {"json": "prediction.json"}
        if self.settings.overlay and result.radiograph is not None:
            from .overlay import save_overlay

            try:
                save_overlay(folder / "overlay.jpg", result.radiograph, result.heat, prediction)
                files["overlay"] = "overlay.jpg"
            except OSError:
                raise
            except Exception as error:  # the answer stands without its picture
                reason = Reason("overlay_failed", f"the overlay could not be drawn ({type(error).__name__})")
                prediction = replace(prediction, reasons=(*prediction.reasons, reason))
        if (dicom_out := self.outbox.dicom_out) is not None:
            from .dicom_results.writing import write_results

            try:
                written = write_results(folder / "dicom", name, result, self.pipeline.bundle)
                paths = {kind: os.fspath(dicom_out / path.name) for kind, path in written.items()}
                files.update({kind.replace("-", "_"): path_text(path) for kind, path in paths.items()})
                self.status.note_dicom("written")
            except UsageError as error:  # it is no DICOM film, or one whose header does not do
                reason = Reason("no_dicom_results", f"no DICOM results: {error}")
                prediction = replace(prediction, reasons=(*prediction.reasons, reason))
                self.status.note_dicom("none")
            except MagsdError as error:
                raise _DicomFailedError(f"no DICOM results: {error}") from None
            except MemoryError:
                raise _DicomFailedError("no DICOM results: not enough memory, close other programs") from None
        write_json(folder / "prediction.json", replace(prediction, files=files).to_dict())

    def _not_judged(self, candidate: Candidate, content: str, reason: Reason) -> None:
        if reason.code == "unreadable":
            # A sender that pauses looks as if it had finished
            if candidate.unchanged_for < self.settings.patience:
                self.inbox.put_off(candidate, self.settings.patience - candidate.unchanged_for)
                return
        elif self._faults.get(content, 0) + 1 < _FAULTS:
            self._faults[content] = self._faults.get(content, 0) + 1
            self.say(f"magsd watch: {content[:12]}: {reason.message}; trying again")
            self.inbox.put_off(candidate, min(_LONGEST_WAIT, 5.0 * self._faults[content]))
            return
        self._quarantine(candidate, content, reason)

    def _quarantine(self, candidate: Candidate, content: str, reason: Reason) -> None:
        size, now = candidate.identity.size, utc_now()
        self.outbox.commit(
            Entry(QUARANTINED, content, reason.code, identity=candidate.identity, time=now),
            lambda folder: write_reason(folder, content, reason.code, reason.message, size, now),
        )
        self._faults.pop(content, None)
        self.say(f"{now} {content[:12]} quarantined: {reason.message}")
        self._is_settled(candidate, content)

    def _delete(self, candidate: Candidate) -> None:
        with suppress(OSError):  # gone, or a folder that we may not change: it is known, and stays
            if identity(candidate.path) == candidate.identity:
                candidate.path.unlink()

    # --- around it ---

    def _warm_up(self) -> None:
        """The first run of everything is several times slower, and no film should wait for it."""
        for path in sorted((self.pipeline.bundle.path / "golden").glob("*.png"))[:1]:
            Pipeline.predict(self.pipeline, path)  # as no audited pipeline would: this is nobody's film

    def _pause(self, seconds: float, stop: Callable[[], bool]) -> None:
        end = self.clock() + seconds
        while not stop() and (left := end - self.clock()) > 0:
            time.sleep(min(0.1, left))

    def _report(self, *, force: bool = False) -> None:
        now = self.clock()
        if not force and now - self._reported < 1.0:
            return
        status, ledger = self.status, self.outbox.ledger
        status.results = ledger.statuses
        status.quarantined, status.ledger_damaged = ledger.counts[QUARANTINED], ledger.damaged
        status.duplicates = ledger.counts[DUPLICATE] + ledger.counts[AGAIN]
        status.ready, status.waiting = self.inbox.ready, self.inbox.waiting
        status.inaccessible = len(self._inaccessible)
        shown = status.to_dict() | {"updated": ""}
        if not force and shown == self._shown and now - self._reported < _HEARTBEAT:
            return  # spares the flash memory of a device that has nothing to do
        self._reported, self._shown = now, shown
        with suppress(OSError):  # the disk is full: said already, and no reason to stop
            status.write(self.outbox.folder / "status.json", self.outbox.folder / "metrics.prom")


def _pixels_sha256(radiograph: Radiograph) -> str:
    digest = hashlib.sha256(repr(radiograph.pixels.shape).encode())
    digest.update(np.ascontiguousarray(radiograph.pixels).data)
    return digest.hexdigest()

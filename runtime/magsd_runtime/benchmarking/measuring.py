"""Processes of several backends take turns, so that whatever else the machine does hits all of them alike."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from ..errors import BackendUnavailableError, MagsdError
from .summary import FILES, Measured

TURN_SECONDS = 0.2
"""A turn is as many calls as fit into this, at least one and at most 20."""
PATIENCE = 300.0
"""Seconds without a word after which a process is given up."""


class Worker:
    """One backend's process; killed when it is closed, whatever it is doing."""

    def __init__(self, bundle: Path, backend: str, image: Path, threads: int | None) -> None:
        self.backend = backend
        program = [sys.executable, "-m", "magsd_runtime.benchmarking.worker", str(bundle), backend, str(image)]
        started = time.perf_counter()
        self._process = subprocess.Popen(
            [*program, *([] if threads is None else [str(threads)])],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)},
        )  # fmt: skip
        self._errors: list[str] = []
        # An unread pipe would stop a talkative library
        self._reader = threading.Thread(target=self._read_errors, daemon=True)
        self._reader.start()
        try:
            self.facts = self._answer()
        except BaseException:
            self.close()
            raise
        self.start_seconds = time.perf_counter() - started

    def ask(self, **what: Any) -> dict[str, Any]:
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError):  # its last words say why
            self._process.stdin.write(json.dumps(what) + "\n")
            self._process.stdin.flush()
        return self._answer()

    def close(self) -> None:
        self._process.kill()
        self._process.wait()
        self._reader.join()
        for stream in (self._process.stdin, self._process.stdout, self._process.stderr):
            if stream is not None:
                with contextlib.suppress(OSError):
                    stream.close()

    def _answer(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        late = threading.Timer(PATIENCE, self._process.kill)
        late.start()
        try:
            line = self._process.stdout.readline()
        finally:
            late.cancel()
        try:
            facts = json.loads(line)
        except ValueError:
            self._process.kill()
            self._reader.join(5)
            said = " ".join("".join(self._errors).split())[-300:]
            raise BackendUnavailableError(
                f"backend {self.backend}: its process ended or was silent for {PATIENCE:.0f} s ({said or 'no message'})"
            ) from None
        if "error" in facts:
            kind = BackendUnavailableError if facts["code"] == BackendUnavailableError.exit_code else MagsdError
            error = kind(facts["error"])
            error.exit_code = facts["code"]
            raise error
        return facts

    def _read_errors(self) -> None:
        assert self._process.stderr is not None
        with contextlib.suppress(ValueError, OSError):
            self._errors.extend(self._process.stderr)


def measure(
    bundle: Path,
    backends: Sequence[str],
    image: Path,
    *,
    batches: Sequence[int],
    rounds: int,
    starts: int = 3,
    threads: int | None = None,
    required: bool = True,
    report: Callable[[str], None] = lambda line: None,
) -> tuple[list[Measured], dict[str, str]]:
    """Measure each of ``backends``; those that cannot run, and why, by name.

    ``required``: a backend that cannot run is an error. ``starts``: processes that are started to time the first
    answer, in turns; the last ones stay for ``rounds`` of turns, each of the file and of every batch size.

    Raises
    ------
    BackendUnavailableError
        If one that is required cannot run, or none can.
    MagsdError
        If the bundle or the image cannot be used, or a process dies.
    """
    measured, left_out = {}, {}
    with _workers() as alive:
        for name in backends:  # who can run at all; this also warms the file cache
            report(f"trying     {name}")
            try:
                worker = Worker(bundle, name, image, threads)
            except MagsdError as error:
                if required or not _unavailable(error):
                    raise
                left_out[name] = str(error)
                continue
            worker.close()
            measured[name] = Measured(
                name, worker.facts["device"], worker.facts["precision"], str(worker.facts["reason"])
            )
        if not measured:
            raise BackendUnavailableError("; ".join(left_out.values()) or "no backend was named")
        for number in range(starts):
            report(f"starting   {number + 1} of {starts}")
            for name, one in measured.items():
                worker = Worker(bundle, name, image, threads)
                one.starts.append(worker.start_seconds)
                one.opens.append(worker.facts["open_seconds"])
                if number + 1 < starts:
                    worker.close()
                else:
                    alive[name] = worker
        for batch in (FILES, *sorted(batches)):
            report("measuring  " + ("from the file to the prediction" if batch == FILES else f"batches of {batch}"))
            calls = {name: _warm_up(worker, batch) for name, worker in alive.items()}
            for one in measured.values():
                one.turns[batch] = []
            for _ in range(rounds):
                for name, worker in alive.items():
                    measured[name].turns[batch].append(_turn(worker, batch, calls[name]))
            for name, worker in alive.items():
                measured[name].peak_bytes[batch] = worker.ask(memory=True)["peak_bytes"]
    return list(measured.values()), left_out


def _unavailable(error: MagsdError) -> bool:
    """Whether it is the backend that is not to be had, rather than the bundle or the image that is wrong."""
    return error.exit_code in (2, BackendUnavailableError.exit_code)


def _turn(worker: Worker, batch: int, calls: int) -> list[float]:
    asked = {"files": calls} if batch == FILES else {"batch": batch, "calls": calls}
    return worker.ask(**asked)["seconds"]


def _warm_up(worker: Worker, batch: int) -> int:
    """How many calls make a turn."""
    _turn(worker, batch, 1)
    (seconds,) = _turn(worker, batch, 1)
    return max(1, min(20, int(TURN_SECONDS / max(seconds, 1e-6))))


@contextlib.contextmanager
def _workers() -> Iterator[dict[str, Worker]]:
    alive: dict[str, Worker] = {}
    try:
        yield alive
    finally:
        for worker in alive.values():
            worker.close()

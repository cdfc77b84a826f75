"""Processes of several backends take turns, so that whatever else the machine does hits all of them alike."""

from __future__ import annotations

import contextlib
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from ..errors import BackendUnavailableError, MagsdError
from .conversation import Conversation, Silent
from .summary import FILES, Measured

TURN_SECONDS = 0.2
"""A turn is as many calls as fit into this, at least one and at most 20."""
PATIENCE = 300.0
"""Seconds without a word after which a process is given up."""


class Worker(Conversation):
    """One backend's process."""

    def __init__(self, bundle: Path, backend: str, image: Path, threads: int | None) -> None:
        self.backend = backend
        program = [sys.executable, "-m", "magsd_runtime.benchmarking.worker", str(bundle), backend, str(image)]
        started = time.perf_counter()
        super().__init__(
            [*program, *([] if threads is None else [str(threads)])],
            {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)},
            patience=PATIENCE,
        )
        self.start_seconds = time.perf_counter() - started

    def _answer(self) -> dict[str, Any]:
        try:
            facts = super()._answer()
        except Silent as error:
            raise BackendUnavailableError(f"backend {self.backend}: {error}") from None
        if "error" in facts:
            kind = BackendUnavailableError if facts["code"] == BackendUnavailableError.exit_code else MagsdError
            error = kind(facts["error"])
            error.exit_code = facts["code"]
            raise error
        return facts


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

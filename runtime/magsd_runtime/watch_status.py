"""What the watcher says of itself: ``status.json`` for people and scripts, ``metrics.prom`` for Prometheus.

Both are replaced whole. No name of an input is in them.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ._version import __version__
from .audit import utc_now
from .files import write_json, write_text

STATUS_SCHEMA = "magsd.watch-status/1"
STATES = ("starting", "watching", "working", "blocked", "stopped")
DICOM_OUTCOMES = ("written", "none", "failed")
_RESULTS = ("ok", "review", "rejected", "error")


@dataclass
class WatchStatus:
    """``state``: starting, watching (nothing to do), working, blocked (see ``problem``; it is tried again), stopped.

    ``results``, ``quarantined``, ``duplicates``: since the ledger was begun. ``ready``: finished files not yet judged,
    of which the queue holds at most ``queue_limit``; ``waiting``: files that are not finished or were put off;
    ``inaccessible``: of these, files that may not be read. ``seconds``: spent on judging since the start, by step.
    ``dicom``: films since the start whose DICOM results were ``written``, that got ``none`` (no DICOM, or a header that
    does not do), and tries that ``failed``; None where no DICOM results are made.
    """

    model: Mapping[str, Any]
    backend: Mapping[str, Any]
    queue_limit: int
    started: str = field(default_factory=utc_now)
    state: str = "starting"
    problem: str | None = None
    problem_since: str | None = None
    results: Counter[str] = field(default_factory=Counter)
    quarantined: int = 0
    duplicates: int = 0
    ready: int = 0
    waiting: int = 0
    inaccessible: int = 0
    recovered: int = 0
    ledger_damaged: int = 0
    judged: int = 0
    seconds: dict[str, float] = field(default_factory=dict)
    last: Mapping[str, Any] | None = None
    dicom: Counter[str] | None = None

    def note_dicom(self, outcome: str) -> None:
        """Count one of :data:`DICOM_OUTCOMES`."""
        if self.dicom is not None:
            self.dicom[outcome] += 1

    def block(self, problem: str) -> None:
        """Say why nothing goes on."""
        if self.problem != problem:
            self.problem, self.problem_since = problem, utc_now()
        self.state = "blocked"

    def unblock(self, state: str) -> None:
        self.state, self.problem, self.problem_since = state, None, None

    def to_dict(self) -> dict[str, Any]:
        return {
            "schema": STATUS_SCHEMA,
            "state": self.state,
            "problem": None if self.problem is None else {"message": self.problem, "since": self.problem_since},
            "pid": os.getpid(),
            "magsd": __version__,
            "started": self.started,
            "updated": utc_now(),
            "model": dict(self.model),
            "backend": dict(self.backend),
            "results": {name: self.results[name] for name in _RESULTS if self.results[name] or name != "error"},
            "quarantined": self.quarantined,
            "duplicates": self.duplicates,
            "ready": self.ready,
            "waiting": self.waiting,
            "inaccessible": self.inaccessible,
            "queue_limit": self.queue_limit,
            "recovered": self.recovered,
            "ledger_damaged": self.ledger_damaged,
            "judged_since_start": self.judged,
            "dicom_since_start": None if self.dicom is None else {name: self.dicom[name] for name in DICOM_OUTCOMES},
            "last": None if self.last is None else dict(self.last),
            "research_use_only": True,
        }

    def metrics(self) -> str:
        """Prometheus' text format, version 0.0.4."""
        lines: list[str] = []

        def add(name: str, kind: str, text: str, *values: tuple[str, float]) -> None:
            lines.extend([f"# HELP magsd_watch_{name} {text}", f"# TYPE magsd_watch_{name} {kind}"])
            lines.extend(f"magsd_watch_{name}{labels} {value:.15g}" for labels, value in values)

        facts = {"version": __version__, "model": self.model.get("name"), "model_sha256": self.model.get("sha256"),
                 "backend": self.backend.get("name")}  # fmt: skip
        add("info", "gauge", "What runs.", (_labels(facts), 1))
        add("state", "gauge", "1 for the present state.",
            *((_labels({"state": name}), float(name == self.state)) for name in STATES))  # fmt: skip
        add("results_total", "counter", "Results written, by status.",
            *((_labels({"status": name}), self.results[name]) for name in _RESULTS))  # fmt: skip
        add("quarantined_total", "counter", "Inputs put into quarantine.", ("", self.quarantined))
        add("duplicates_total", "counter", "Inputs whose result was there already.", ("", self.duplicates))
        add("ready", "gauge", "Finished files not yet judged.", ("", self.ready))
        add("waiting", "gauge", "Files that are not finished, or were put off.", ("", self.waiting))
        add("inaccessible", "gauge", "Files that may not be read.", ("", self.inaccessible))
        add("queue_limit", "gauge", "Most files held in the queue.", ("", self.queue_limit))
        add("recovered", "gauge", "What was put right after a kill or an error.", ("", self.recovered))
        add("ledger_damaged", "gauge", "Lines of the ledger that could not be read.", ("", self.ledger_damaged))
        add("judged_total", "counter", "Inputs judged since the start.", ("", self.judged))
        if self.dicom is not None:
            add("dicom_total", "counter", "DICOM results since the start, by outcome.",
                *((_labels({"outcome": name}), self.dicom[name]) for name in DICOM_OUTCOMES))  # fmt: skip
        add("seconds_total", "counter", "Time spent on judging since the start, by step.",
            *((_labels({"step": name}), value) for name, value in sorted(self.seconds.items())))  # fmt: skip
        return "\n".join(lines) + "\n"

    def write(self, status: Path, metrics: Path) -> None:
        """Replace both files. Raises OSError."""
        write_json(status, self.to_dict())
        write_text(metrics, self.metrics())


def _labels(values: Mapping[str, Any]) -> str:
    def escaped(value: Any) -> str:
        return str(value).replace("\\", r"\\").replace("\n", r"\n").replace('"', r"\"")

    return "{" + ",".join(f'{name}="{escaped(value)}"' for name, value in values.items()) + "}"

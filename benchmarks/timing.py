"""What the benchmarks share: interleaved timing, medians with their spread, ratios, machine facts.

Variants take turns within one run, so that noise of the machine hits all of them alike. Ratios travel
to other machines, milliseconds do not.
"""

from __future__ import annotations

import itertools
import os
import platform
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import datetime, timezone
from importlib import metadata
from pathlib import Path
from typing import Any

from magsd_runtime.files import write_json


@dataclass(frozen=True)
class Timing:
    """Seconds of each run of one variant, in the order in which they ran."""

    seconds: tuple[float, ...]

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)

    @property
    def quartiles(self) -> tuple[float, float]:
        """The middle half of the runs lies between these."""
        if len(self.seconds) < 2:
            return (self.median, self.median)
        low, _, high = statistics.quantiles(self.seconds, n=4, method="inclusive")
        return (low, high)

    def to_dict(self) -> dict[str, Any]:
        low, high = self.quartiles
        return {
            "median_ms": 1e3 * self.median,
            "quartiles_ms": [1e3 * low, 1e3 * high],
            "runs_ms": [1e3 * seconds for seconds in self.seconds],
        }


def measure(
    variants: Mapping[str, Callable[[], object]],
    *,
    repeats: int,
    seconds: float = 0.0,
    warmup: int = 1,
    synchronize: Callable[[], object] = lambda: None,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, Timing]:
    """Run the variants in turns: ``warmup`` uncounted, then ``repeats``; ``synchronize`` ends each run.

    ``seconds``: go on for at least so long in all, beyond ``repeats`` where that is sooner.
    ``clock``: wall time, or ``time.process_time`` where other programs take the processor away.
    """
    taken: dict[str, list[float]] = {name: [] for name in variants}
    begun = time.perf_counter()
    for turn in itertools.count(-warmup):
        if turn == 0:
            begun = time.perf_counter()
        if turn >= repeats and time.perf_counter() - begun >= seconds:
            break
        for name, run in variants.items():
            synchronize()
            started = clock()
            run()
            synchronize()
            if turn >= 0:
                taken[name].append(clock() - started)
    return {name: Timing(tuple(runs)) for name, runs in taken.items()}


def table(timings: Mapping[str, Timing], *, baseline: str, title: str = "") -> str:
    """One line a variant: median, quartiles, and the ratio of its median to that of ``baseline``."""
    width = max(len(title), *(len(name) for name in timings)) + 2
    lines = [f"{title:{width}}{'median ms':>11}{'quartiles':>19}{'ratio':>8}"]
    reference = timings[baseline].median
    for name, timing in timings.items():
        low, high = timing.quartiles
        spread = f"{1e3 * low:.1f} to {1e3 * high:.1f}"
        lines.append(f"{name:{width}}{1e3 * timing.median:11.1f}{spread:>19}{timing.median / reference:8.2f}")
    return "\n".join(lines)


def machine(*packages: str) -> dict[str, Any]:
    """Facts without which the numbers mean nothing. ``packages``: whose versions matter."""
    facts: dict[str, Any] = {
        "time": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "processor": _processor(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "load": os.getloadavg()[0] if hasattr(os, "getloadavg") else None,
        "system": platform.platform(),
        "python": platform.python_version(),
    }
    return {**facts, **{name: metadata.version(name) for name in packages}}


def describe(facts: Mapping[str, Any]) -> str:
    """The machine's facts in one line."""
    return ", ".join(f"{name} {value}" for name, value in facts.items())


def save(path: Path | None, results: Mapping[str, Any]) -> None:
    """Write ``results`` as JSON, if a path was given."""
    if path is not None:
        write_json(path, dict(results))


def _processor() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()

"""A command as a process of its own: how long, how much processor time, how much memory at most."""

from __future__ import annotations

import functools
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import NamedTemporaryFile

from magsd_runtime.errors import DataError
from timing import measure

ROOT = Path(__file__).resolve().parents[2]
PATIENCE = 1800.0
"""Seconds after which a command is given up."""

# The peak that the system reports covers the process that started the command, up to the moment it became it: so a
# bare Python of 9 MB starts it. It covers processes that the command itself started and waited for: the largest one.
_STARTER = """
import os, sys, time
began = time.perf_counter()
child = os.posix_spawnp(sys.argv[2], sys.argv[2:], os.environ)
_, status, used = os.wait4(child, 0)
seconds = time.perf_counter() - began
with open(sys.argv[1], "w") as file:
    file.write(f"{seconds} {used.ru_utime + used.ru_stime} {used.ru_maxrss} {os.waitstatus_to_exitcode(status)}")
"""


@dataclass(frozen=True)
class Job:
    """``environment`` is added to this process's own. Exit codes other than ``allowed`` are a failure."""

    command: Sequence[str]
    environment: Mapping[str, str] = field(default_factory=dict)
    allowed: Sequence[int] = (0,)
    stdin: str = ""


@dataclass(frozen=True)
class Finished:
    """``seconds`` from start to end; ``processor``: seconds of all its threads; ``peak_mb``: resident memory, 10^6
    bytes, of its largest process."""

    seconds: float
    processor: float
    peak_mb: float
    code: int
    output: str


def run(job: Job, folder: Path) -> Finished:
    """Run to the end, in ``folder``.

    Raises
    ------
    DataError
        If it ends with a code that is not allowed, or not within :data:`PATIENCE`; with its last words.
    """
    name = " ".join(str(part) for part in job.command[:6])
    with NamedTemporaryFile() as facts:
        starter = [sys.executable, "-I", "-S", "-c", _STARTER, facts.name]
        try:
            done = subprocess.run(
                [*starter, *map(str, job.command)], env={**importable(), **job.environment}, cwd=folder,
                input=job.stdin, capture_output=True, text=True, errors="replace", timeout=PATIENCE,
            )  # fmt: skip
        except subprocess.TimeoutExpired as error:
            raise DataError(f"{name}: not done after {PATIENCE:.0f} s") from error
        words = facts.read().split()
    if len(words) != 4:
        raise DataError(f"{name}: could not be started ({' '.join(done.stderr.split())[-300:]})")
    seconds, processor, peak, code = float(words[0]), float(words[1]), int(words[2]), int(words[3])
    if code not in job.allowed:
        said = (done.stderr.strip() or done.stdout.strip()).splitlines()
        raise DataError(f"{name}: ended with {code}: {said[-1][-300:] if said else 'no message'}")
    return Finished(seconds, processor, peak * (1 if sys.platform == "darwin" else 1024) / 1e6, code, done.stdout)


def in_turns(jobs: Mapping[str, Job], folder: Path, *, repeats: int, warmup: int = 1) -> dict[str, list[Finished]]:
    """Run all in turns, ``warmup`` rounds uncounted and then ``repeats``; raises as :func:`run`."""
    found: dict[str, list[Finished]] = {name: [] for name in jobs}
    rounds = {name: lambda name=name, job=job: found[name].append(run(job, folder)) for name, job in jobs.items()}
    measure(rounds, repeats=repeats, warmup=warmup)
    return {name: runs[warmup:] for name, runs in found.items()}


def magsd(*arguments: object) -> list[str]:
    """The command line of ``magsd ...``."""
    return [sys.executable, "-m", "magsd.cli", *map(str, arguments)]


def program(name: str, *arguments: object) -> list[str]:
    """The command line of one of the suite's own programs."""
    return [sys.executable, str(Path(__file__).with_name(name)), *map(str, arguments)]


@functools.cache
def importable() -> dict[str, str]:
    """This process's environment; with the checkout on the path only if magsd is not installed: each folder on the
    path makes every import a little slower."""
    asked = [sys.executable, "-c", "import magsd.cli, magsd_runtime, magsd_export"]
    if subprocess.run(asked, cwd=os.sep, capture_output=True).returncode == 0:
        return dict(os.environ)
    paths = [str(ROOT), str(ROOT / "runtime"), str(ROOT / "export"), os.environ.get("PYTHONPATH", "")]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in paths if path)}

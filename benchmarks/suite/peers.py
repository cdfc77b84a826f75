"""Whole tools on the same film: one command each, from start to end, in turns with `magsd infer`."""

from __future__ import annotations

import importlib.util
from importlib import metadata

from magsd_runtime.errors import DataError

from .context import Context
from .figures import ratio, spread
from .processes import Job, in_turns, magsd, program, run
from .report import Bars, Report, Table

OURS = "magsd infer, kept graph"
PEERS = {
    "ultralytics": (("ultralytics",), "peer_ultralytics.py"),
    "torchxrayvision": (("torchxrayvision", "skimage"), "peer_torchxrayvision.py"),
}
"""By name: the modules that must be there, and the program."""


def run_part(context: Context) -> Report:
    film = context.film(128 if context.quick else 1024)
    jobs = {OURS: Job(magsd("infer", film, "--json"), context.kept(context.shipped), (0, 3))}
    skipped, versions = {}, {OURS: metadata.version("magsd") if installed("magsd") else "this checkout"}
    for name, (modules, script) in PEERS.items():
        if missing := [module for module in modules if not installed(module)]:
            skipped[name] = f"{', '.join(missing)} not installed"
            continue
        job = Job(program(script, film))
        try:
            run(job, context.work)
        except DataError as error:
            skipped[name] = str(error)
            continue
        jobs[name], versions[name] = job, metadata.version(name)
    runs = in_turns(jobs, context.work, repeats=context.repeats, warmup=context.warmup)
    base = [one.seconds for one in runs[OURS]]
    rows, data, drawn = [], {}, []
    for name, found in runs.items():
        seconds = spread([1e3 * one.seconds for one in found])
        times, peak = ratio([one.seconds for one in found], base), max(one.peak_mb for one in found)
        rows.append((f"{name} {versions[name]}", seconds.median, f"{seconds.low:.0f} to {seconds.high:.0f}",
                     f"{times.median:.2f}", f"{times.low:.2f} to {times.high:.2f}", peak))  # fmt: skip
        data[name] = {
            "ms": seconds.to_dict(), "over_magsd": times.to_dict(), "peak_mb": peak, "version": versions[name],
        }  # fmt: skip
        drawn.append((name, seconds.median, seconds.high))
    columns = ("whole process", "ms", "middle half", "x magsd", "middle half", "peak MB")
    return Report((Table("One film, PNG; from start to the class.", columns, tuple(rows)),),
                  bars=(Bars("time", "ms", tuple(drawn)),), skipped=skipped, data=data)  # fmt: skip


def installed(module: str) -> bool:
    return importlib.util.find_spec(module) is not None

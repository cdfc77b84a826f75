"""How time and memory grow, each curve with its exponent and whether it bends upward (:func:`figures.growth`).

Every point of a curve has its turn in every round. Time is wall time, or with --processor-time that of the processor;
of programs with one thread, folds and scores, it is always the processor's. Memory is the peak of a process of its own.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping, Sequence
from statistics import median

from magsd_runtime.benchmarking.measuring import Worker
from magsd_runtime.pipeline import Pipeline
from timing import measure

from .context import Context
from .figures import Spread, growth, spread
from .films import folder_of
from .processes import Finished, Job, in_turns, magsd, program
from .report import Curve, Report, Table

SIDES = (64, 128, 256, 512, 1024, 2048, 4096, 8000)
FILES = (1, 2, 5, 10, 30, 100, 300, 1000)
BATCHES = (1, 2, 4, 8, 16, 32, 64)
FOLDS = (2, 5, 10, 20, 50, 100)
ROWS = (1_000, 3_000, 10_000, 30_000, 100_000)
SCORED = (300, 1_000, 3_000, 10_000, 30_000)
FEW = 3
"""Rounds of what takes long; more than that only if fewer are asked for in all."""


def run_part(context: Context) -> Report:
    curves: list[Curve] = []
    parts = (by_side, by_files, by_batch, by_threads, by_folds, by_rows, by_scored)
    for part in parts:
        context.say(f"growth: {part.__name__.replace('_', ' ')}")
        curves += part(context)
    rows = [
        (f"{curve.y_label} by {curve.x_label}: {curve.name}", *(one(curve, x) for x in (0, len(curve.x) // 2, -1)))
        for curve in curves
    ]
    table = Table("The first, the middle and the last point of each curve.", ("curve", "first", "middle", "last"),
                  tuple(rows))  # fmt: skip
    bent = [curve for curve in curves if curve.growth.bends]
    names = "; ".join(f"{curve.y_label} by {curve.x_label} ({curve.name})" for curve in bent)
    note = f"Bends upward: {names}." if bent else "No curve bends upward."
    return Report((table,), curves=tuple(curves), notes=() if context.quick else (note,))


def one(curve: Curve, place: int) -> str:
    return f"{curve.x[place]:g}: {curve.y[place]:.3g}"


def by_side(context: Context) -> list[Curve]:
    """The side of a square film: from the file to the prediction in a warm process, and the peak of `magsd infer`."""
    sides = (64, 128, 192, 256) if context.quick else SIDES
    films = {side: context.film(side) for side in sides}
    clock = time.process_time if context.processor_time else time.perf_counter
    with Pipeline.open(context.shipped, "cpu", threads=context.used_threads) as pipeline:
        calls: dict[str, Callable[[], object]] = {
            str(side): lambda film=film: pipeline.predict(film, with_heat=False) for side, film in films.items()
        }
        taken = measure(calls, repeats=context.repeats, warmup=context.warmup, clock=clock)
    milliseconds = {side: [1e3 * value for value in taken[str(side)].seconds] for side in sides}
    jobs = {str(side): Job(magsd("infer", film, "--json"), allowed=(0, 3)) for side, film in films.items()}
    runs = in_turns(jobs, context.work, repeats=few(context), warmup=0)
    peaks = {side: [one.peak_mb for one in runs[str(side)]] for side in sides}
    return [
        curve("file to prediction, batch 1", "side, pixels", "ms", milliseconds, 2),
        curve("magsd infer of one PNG", "side, pixels", "peak MB", peaks, 2),
    ]


def by_files(context: Context) -> list[Curve]:
    """Films of 512 pixels in a folder: `magsd infer FOLDER` as a whole process."""
    counts, side = ((1, 2, 4, 8), 128) if context.quick else (FILES, 512)
    jobs = {
        count: Job(magsd("infer", folder_of(context.work / "films", count, side), "--json"), allowed=(0, 3))
        for count in counts
    }
    runs = whole(jobs, context)
    return [
        curve(f"magsd infer FOLDER, {side} pixels", "files", "s", seconds(runs, context), 1),
        curve(f"magsd infer FOLDER, {side} pixels", "files", "peak MB", peak(runs), 0),
    ]


def by_batch(context: Context) -> list[Curve]:
    """The network alone; batches grow in one process, so its peak is that of the largest until then."""
    batches = (1, 2, 3, 4) if context.quick else BATCHES
    taken: dict[float, list[float]] = {batch: [] for batch in batches}
    worker = Worker(context.shipped, "cpu", context.film(128), context.threads)
    peaks = {}
    try:
        for batch in batches:
            worker.ask(batch=batch, calls=1)
            peaks[batch] = [worker.ask(memory=True)["peak_bytes"] / 1e6]
        for _ in range(context.repeats):
            for batch in batches:
                taken[batch].append(1e3 * median(worker.ask(batch=batch, calls=3)["seconds"]))
    finally:
        worker.close()
    return [
        curve("network alone", "batch", "ms", taken, 1),
        curve("network alone", "batch", "peak MB", peaks, 1),
    ]


def by_threads(context: Context) -> list[Curve]:
    """A process for each number of threads, up to twice the cores; more of them should not take longer."""
    threads = range(1, 3 if context.quick else 2 * max(2, context.used_threads) + 1)
    workers: dict[int, Worker] = {}
    taken: dict[float, list[float]] = {count: [] for count in threads}
    try:
        for count in threads:
            workers[count] = Worker(context.shipped, "cpu", context.film(128), count)
        for worker in workers.values():
            worker.ask(batch=1, calls=2)
        for _ in range(context.repeats):
            for count, worker in workers.items():
                taken[count].append(1e3 * median(worker.ask(batch=1, calls=10)["seconds"]))
    finally:
        for worker in workers.values():
            worker.close()
    return [curve("network alone, batch 1", "threads", "ms", taken, 0)]


def by_folds(context: Context) -> list[Curve]:
    rows, counts = (300, (2, 3, 4, 5)) if context.quick else (10_000, FOLDS)
    jobs = {count: Job(program("rows_worker.py", "folds", rows, count)) for count in counts}
    runs = whole(jobs, context)
    name = f"folds and their splits, {rows:,} rows"
    return [curve(name, "folds", "processor s", inner(runs), 1), curve(name, "folds", "peak MB", peak(runs), 0)]


def by_rows(context: Context) -> list[Curve]:
    counts = (100, 200, 300, 400) if context.quick else ROWS
    jobs = {count: Job(program("rows_worker.py", "folds", count, 5)) for count in counts}
    runs = whole(jobs, context)
    name = "5 folds and their splits"
    return [curve(name, "rows", "processor s", inner(runs), 1), curve(name, "rows", "peak MB", peak(runs), 1)]


def by_scored(context: Context) -> list[Curve]:
    counts = (50, 100) if context.quick else SCORED
    jobs = {count: Job(program("rows_worker.py", "scores", count, 5)) for count in counts}
    runs = whole(jobs, context)
    name = "scores of predictions, 5 folds, 200 resamples"
    return [curve(name, "rows", "processor s", inner(runs), 1), curve(name, "rows", "peak MB", peak(runs), 1)]


def few(context: Context) -> int:
    return min(FEW, context.repeats)


def whole(jobs: Mapping[int, Job], context: Context) -> dict[int, list[Finished]]:
    named = {str(count): job for count, job in jobs.items()}
    runs = in_turns(named, context.work, repeats=few(context), warmup=0)
    return {count: runs[str(count)] for count in jobs}


def seconds(runs: Mapping[int, Sequence[Finished]], context: Context) -> dict[int, list[float]]:
    return {
        count: [one.processor if context.processor_time else one.seconds for one in found]
        for count, found in runs.items()
    }


def inner(runs: Mapping[int, Sequence[Finished]]) -> dict[int, list[float]]:
    """Processor seconds that a program of one thread measured within itself."""
    return {
        count: [json.loads(one.output.splitlines()[-1])["processor"] for one in found] for count, found in runs.items()
    }


def peak(runs: Mapping[int, Sequence[Finished]]) -> dict[int, list[float]]:
    return {count: [one.peak_mb for one in found] for count, found in runs.items()}


def curve(
    name: str, x_label: str, y_label: str, values: Mapping[int, Sequence[float]] | Mapping[float, Sequence[float]],
    expected: float,
) -> Curve:  # fmt: skip
    """``values``: by x, what each round took; ``expected``: the exponent that the work itself asks for."""
    x = tuple(float(value) for value in values)
    spreads: list[Spread] = [spread(found) for found in values.values()]
    y = tuple(found.median for found in spreads)
    low, high = tuple(found.low for found in spreads), tuple(found.high for found in spreads)
    return Curve(name, x_label, y_label, x, y, growth(x, y, expected=expected), low, high)

"""The network alone: engines in turns, each in a process of its own, for two in one slow each other."""

from __future__ import annotations

import contextlib
import importlib.util
from pathlib import Path
from statistics import median
from typing import Any

from magsd_runtime.benchmarking.conversation import Conversation, Silent
from magsd_runtime.errors import DataError

from .context import Context
from .engine_worker import ENGINES
from .figures import ratio, spread
from .processes import importable, program
from .report import Bars, Goal, Report, Table

OURS = "ONNX Runtime"
BATCHES = (1, 8)
TURN_SECONDS = 0.3
"""A turn is as many calls as fit into this, at least one and at most 20."""
PATIENCE = 600.0
"""Seconds without a word after which an engine is given up; torch.compile takes minutes."""


class Engine(Conversation):
    """One engine's process."""

    def __init__(self, name: str, bundle: Path, threads: int, *, quick: bool) -> None:
        command = [*program("engine_worker.py", name, bundle, threads), *(["--quick"] if quick else [])]
        super().__init__(command, importable(), patience=PATIENCE)

    def _answer(self) -> dict[str, Any]:
        try:
            facts = super()._answer()
        except Silent as error:
            raise DataError(str(error)) from None
        if "error" in facts:
            raise DataError(facts["error"])
        return facts


def run_part(context: Context) -> Report:
    rows, goals, drawn, skipped, data = [], [], [], {}, {}
    batches = BATCHES[:1] if context.quick else BATCHES
    for name, bundle in context.bundles.items():
        with contextlib.ExitStack() as stack:
            engines: dict[str, Engine] = {}
            for engine, (module, _) in ENGINES.items():
                if context.quick and engine == "torch, eager, channels last":
                    continue
                context.say(f"network: {name}, opening {engine}")
                if importlib.util.find_spec(module) is None:
                    skipped[f"{name}, {engine}"] = f"{module} is not installed"
                    continue
                try:
                    engines[engine] = Engine(engine, bundle, context.used_threads, quick=context.quick)
                    stack.callback(engines[engine].close)
                except DataError as error:
                    skipped[f"{name}, {engine}"] = str(error)
            for batch in batches:
                found = in_turns(engines, batch, context)
                fastest = min(found, key=lambda engine: median(found[engine]))
                bars = []
                for engine, seconds in found.items():
                    times, taken = ratio(seconds, found[OURS]), spread([1e3 * value for value in seconds])
                    facts = engines[engine].facts
                    rows.append((name, batch, f"{engine} {facts['version']}", taken.median,
                                 f"{taken.low:.3g} to {taken.high:.3g}", f"{times.median:.2f}",
                                 f"{times.low:.2f} to {times.high:.2f}"))  # fmt: skip
                    bars.append((engine, taken.median, taken.high))
                    data[f"{name}, batch {batch}, {engine}"] = {
                        "ms": taken.to_dict(), "over_onnx_runtime": times.to_dict(), "version": facts["version"],
                        "peak_mb": (engines[engine].ask(memory=True)["peak_bytes"] or 0) / 1e6,
                    }  # fmt: skip
                drawn.append(Bars(f"{name}, batch {batch}", "ms", tuple(bars)))
                if batch == 1:
                    over = ratio(found[OURS], found[fastest]).median
                    goals.append(Goal(f"{name}: ONNX Runtime over the fastest engine ({fastest})", 1.0, "x", over))
    columns = ("bundle", "batch", "engine", "ms", "middle half", "x ONNX Runtime", "middle half")
    table = Table("float32; a round is a turn of each engine, and its time the median of the calls in that turn.",
                  columns, tuple(rows))  # fmt: skip
    return Report((table,), tuple(goals), tuple(drawn), skipped=skipped, data=data)


def in_turns(engines: dict[str, Engine], batch: int, context: Context) -> dict[str, list[float]]:
    """By engine, the median of the calls of each round, in seconds."""
    kind = "processor" if context.processor_time else "seconds"
    calls = {}
    for name, engine in engines.items():
        (once,) = engine.ask(batch=batch, calls=1)["seconds"]
        calls[name] = 1 if context.quick else max(1, min(20, int(TURN_SECONDS / max(once, 1e-6))))
    found: dict[str, list[float]] = {name: [] for name in engines}
    for number in range(-context.warmup, context.repeats):
        for name, engine in engines.items():
            taken = median(engine.ask(batch=batch, calls=calls[name])[kind])
            if number >= 0:
                found[name].append(taken)
    return found

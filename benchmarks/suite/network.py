"""The network alone: engines in turns, each in a process of its own, for two in one slow each other."""

from __future__ import annotations

import contextlib
import importlib.util
import json
import subprocess
import threading
from pathlib import Path
from typing import Any

from magsd_runtime.errors import DataError

from .context import Context
from .engine_worker import ENGINES
from .figures import middle, ratio, spread
from .processes import importable, program
from .report import Bars, Goal, Report, Table

OURS = "ONNX Runtime"
BATCHES = (1, 8)
TURN_SECONDS = 0.3
"""A turn is as many calls as fit into this, at least one and at most 20."""
PATIENCE = 600.0
"""Seconds without a word after which an engine is given up; torch.compile takes minutes."""


class Engine:
    """One engine's process; killed when it is closed."""

    def __init__(self, name: str, bundle: Path, threads: int, *, quick: bool) -> None:
        self.name = name
        command = [*program("engine_worker.py", name, bundle, threads), *(["--quick"] if quick else [])]
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True,
            env=importable(),
        )  # fmt: skip
        try:
            self.facts = self._answer()
        except BaseException:
            self.close()
            raise

    def ask(self, **what: Any) -> dict[str, Any]:
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError):  # the missing answer says it
            self._process.stdin.write(json.dumps(what) + "\n")
            self._process.stdin.flush()
        return self._answer()

    def close(self) -> None:
        self._process.kill()
        self._process.wait()
        for stream in (self._process.stdin, self._process.stdout):
            if stream is not None:
                with contextlib.suppress(OSError):
                    stream.close()

    def _answer(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        late = threading.Timer(PATIENCE, self._process.kill)
        late.start()
        try:
            # some libraries print on stdout what is not for us
            facts: dict[str, Any] = {}
            for line in self._process.stdout:
                with contextlib.suppress(ValueError):
                    facts = json.loads(line)
                    break
        finally:
            late.cancel()
        if not facts or "error" in facts:
            raise DataError(facts.get("error", f"its process ended, or was silent for {PATIENCE:.0f} s"))
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
                fastest = min(found, key=lambda engine: middle(found[engine]))
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
            taken = middle(engine.ask(batch=batch, calls=calls[name])[kind])
            if number >= 0:
                found[name].append(taken)
    return found

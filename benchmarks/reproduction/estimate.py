"""How long the cells will take: from cells measured, from one measured step, or computed from an assumed rate.

The work of a cell is multiply-adds x images x epochs x passes. A pass forward counts 1, one backward 2, of the network
without its backbone 0 where the backbone is not trained; attention-guided augmentation adds a pass for each kind.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

from magsd_runtime.errors import DataError
from magsd_runtime.files import write_json

from .cells import Cell, settings_of, unique
from .plan import AssumedRate

START_SECONDS = 15.0
"""Starting, reading and evaluating, until a cell was measured."""
_NETWORK = ("model", "backbone", "size", "attention_scales", "num_attention_maps", "pooling")


@dataclass(frozen=True)
class Estimate:
    """Seconds for all cells, and how many of them are judged by what."""

    seconds: float
    like: int  # by cells of the same data and settings but fold and seed
    rate: int  # by the multiply-adds of other measured cells
    step: int  # by one measured step
    assumed: int  # by an assumed rate: computed, nothing was measured


def passes(cell: Cell) -> float:
    """Passes forward through the network that one image of one epoch costs, a pass backward counted as two."""
    config = cell.config
    forward = 1 + (len(config.attention_augmentation) if config.loss != "cross-entropy" else 0)
    return forward * (1.0 if config.backbone_rate == 0 else 3.0)


def work(cell: Cell, multiply_adds: float) -> float:
    """Multiply-adds of a cell; the validation of an epoch is one pass."""
    config = cell.config
    images = cell.images * (config.folds - 1) / config.folds
    held = config.validation_fraction
    return multiply_adds * images * config.epochs * ((1 - held) * passes(cell) + held)


@dataclass(frozen=True)
class Costs:
    """What the estimate knows: multiply-adds by network, and seconds per multiply-add from one step, if measured."""

    multiply_adds: Mapping[str, float]
    step_rate: float | None = None

    def work(self, cell: Cell) -> float:
        return work(cell, self.multiply_adds[network_of(cell)])

    def seconds(
        self, cell: Cell, results: Mapping[str, Mapping[str, Any]], assumed: AssumedRate | None = None
    ) -> tuple[float, str]:
        """Seconds of one cell and what they come from: like, rate, step or assumed."""
        measured = [_seconds(each) for each in results.values() if _like(each, cell)]
        if measured:
            return median(measured), "like"
        known = [each for each in results.values() if each.get("multiply_adds")]
        if known:
            # medians: a cell whose process was held up for a while tells nothing of the others
            overhead = median(_overhead(each) for each in known)
            rate = median(each["seconds"]["epochs"] / each["multiply_adds"] for each in known)
            return overhead + rate * self.work(cell), "rate"
        if self.step_rate is not None:
            return START_SECONDS + self.step_rate * self.work(cell), "step"
        if assumed is None:
            raise DataError("nothing was measured and the plan assumes no rate")
        return START_SECONDS + self.work(cell) / assumed.multiply_adds_per_second, "assumed"


def estimate(
    cells: Sequence[Cell], costs: Costs, results: Mapping[str, Mapping[str, Any]], assumed: AssumedRate | None = None
) -> Estimate:
    """Of the cells that have no result yet, one after the other. ``results`` must have ``multiply_adds`` added."""
    total = 0.0
    by: dict[str, int] = dict.fromkeys(("like", "rate", "step", "assumed"), 0)
    for cell in unique(list(cells)):
        if cell.key not in results:
            seconds, basis = costs.seconds(cell, results, assumed)
            total += seconds
            by[basis] += 1
    return Estimate(total, **by)


def with_work(cells: Sequence[Cell], costs: Costs, results: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """The results with the multiply-adds of their cells."""
    by_key = {cell.key: cell for cell in cells}
    return {key: {**result, "multiply_adds": costs.work(by_key[key])} for key, result in results.items()}


def read_costs(
    cells: Sequence[Cell], cache: Path | None, *, measure: Cell | None = None, threads: int | None = None
) -> Costs:
    """Count the networks of ``cells``, or take them from the file ``cache``; time one step of ``measure``.

    Raises
    ------
    DataError
        If the counting fails.
    """
    known: dict[str, float] = {}
    if cache is not None and cache.is_file():
        try:
            known = {str(k): float(v) for k, v in json.loads(cache.read_text(encoding="utf-8")).items()}
        except (ValueError, AttributeError, TypeError):
            known = {}  # made again
    new = {network_of(cell): cell for cell in cells if network_of(cell) not in known}
    if not new and measure is None:
        return Costs(known)
    request = {
        "count": [_request(cell) for cell in new.values()], "threads": threads,
        "measure": None if measure is None else _request(measure),
    }  # fmt: skip
    answer = _ask(request)
    known |= dict(zip(new, answer["multiply_adds"]))
    if cache is not None and new:
        write_json(cache, known)
    rate = None
    if measure is not None:
        step = known[network_of(measure)] * measure.config.batch_size * passes(measure)
        rate = answer["step_seconds"] / step
    return Costs(known, rate)


def network_of(cell: Cell) -> str:
    """What the multiply-adds depend on, as text."""
    settings = settings_of(cell.config)
    return " ".join(f"{name}={settings[name]}" for name in _NETWORK) + f" classes={cell.classes}"


def duration(seconds: float) -> str:
    """``3 h 20 min``, ``12 min`` or ``40 s``."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    if minutes < 90:
        return f"{minutes} min"
    hours = round(minutes / 60)
    return f"{minutes // 60} h {minutes % 60} min" if hours < 48 else f"{hours / 24:.1f} days"


def _ask(request: Mapping[str, Any]) -> dict[str, Any]:
    """The answer of step_costs.py."""
    script = Path(__file__).parents[1] / "step_costs.py"
    child = subprocess.run([sys.executable, str(script)], input=json.dumps(request), capture_output=True, text=True)
    if child.returncode:
        said = child.stderr.strip().splitlines() or ["nothing"]
        raise DataError(f"{script} ended with exit code {child.returncode}: {said[-1][:300]}")
    return json.loads(child.stdout.splitlines()[-1])


def _request(cell: Cell) -> dict[str, Any]:
    return {"settings": {**cell.config.to_dict(), "weights": "none"}, "classes": cell.classes}


def _like(result: Mapping[str, Any], cell: Cell) -> bool:
    settings = settings_of(cell.config)
    return result["manifest_sha256"] == cell.digest and all(
        settings.get(name) == value for name, value in result["settings"].items() if name != "seed"
    )


def _overhead(result: Mapping[str, Any]) -> float:
    start = result["seconds"]["start"]
    return result["seconds"]["evaluation"] + (START_SECONDS / 2 if start is None else start)


def _seconds(result: Mapping[str, Any]) -> float:
    return result["seconds"]["epochs"] + _overhead(result)

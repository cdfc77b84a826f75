"""Percentiles and ratios of what was measured; the table and the record. Pure: no process, no clock."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from statistics import median
from typing import Any

import numpy as np

from ..errors import RESEARCH_USE

FILES = 0
"""In place of a batch size: from the file to the prediction."""


def _quantiles(values: Sequence[float], *shares: float) -> list[float]:
    return [float(value) for value in np.quantile(values, shares)]


@dataclass
class Measured:
    """One backend. ``starts``: seconds from starting a process to its first answer, one a start; ``opens`` those of
    opening the bundle and the network within. ``turns``: by batch size, or :data:`FILES`, the seconds of each call, a
    list a round. ``peak_bytes``: of its process, by the largest batch that had run; None where unknown."""

    name: str
    device: str = ""
    precision: str = ""
    reason: str = ""
    starts: list[float] = field(default_factory=list)
    opens: list[float] = field(default_factory=list)
    turns: dict[int, list[list[float]]] = field(default_factory=dict)
    peak_bytes: dict[int, int | None] = field(default_factory=dict)

    def calls(self, batch: int) -> list[float]:
        return [seconds for turn in self.turns[batch] for seconds in turn]


def ratios(baseline: Measured, other: Measured, batch: int) -> tuple[float, float, float]:
    """How many times faster ``other`` was than ``baseline`` in the same round: median, lower and upper quartile."""
    found = [median(base) / median(turn) for base, turn in zip(baseline.turns[batch], other.turns[batch])]
    middle, low, high = _quantiles(found, 0.5, 0.25, 0.75)
    return middle, low, high


def row(baseline: Measured, measured: Measured, batch: int) -> dict[str, Any]:
    """The figures of one backend at one batch size; milliseconds a call."""
    calls = measured.calls(batch)
    middle, low, high = ratios(baseline, measured, batch)
    p50, p90, p99 = (1e3 * value for value in _quantiles(calls, 0.5, 0.9, 0.99))
    return {
        "batch": batch or None,
        "calls": len(calls),
        "p50_ms": p50,
        "p90_ms": p90,
        "p99_ms": p99,
        "images_per_second": max(batch, 1) * len(calls) / sum(calls),
        "faster_than_first": middle,
        "faster_quartiles": [low, high],
        "peak_bytes": measured.peak_bytes.get(batch),
    }


def record(
    bundle: dict[str, Any], machine: dict[str, Any], measured: Sequence[Measured], left_out: dict[str, str]
) -> dict[str, Any]:
    """``magsd.benchmark/1``; ratios are to the first backend."""
    return {
        "schema": "magsd.benchmark/1",
        "bundle": bundle,
        "machine": machine,
        "backends": [
            {
                "name": one.name,
                "device": one.device,
                "precision": one.precision,
                "reason": one.reason,
                "first_result_ms": 1e3 * median(one.starts),
                "open_ms": 1e3 * median(one.opens),
                "starts": len(one.starts),
                "file_to_prediction": row(measured[0], one, FILES),
                "network": [row(measured[0], one, batch) for batch in sorted(one.turns) if batch != FILES],
            }
            for one in measured
        ],
        "left_out": left_out,
        "research_use_only": True,
    }


def format_record(facts: dict[str, Any]) -> str:
    """The record for people, several lines."""
    machine = facts["machine"]
    lines = [
        f"bundle   {facts['bundle']['name']} {facts['bundle']['version']} ({facts['bundle']['path']})",
        f"machine  {machine['processor']}, {machine['cores']} cores, {machine['threads']}, load {machine['load']}"
        + (f"; {machine['gpu']}" if machine.get("gpu") else ""),
        f"{'':24}{'calls':>6}{'ms p50':>9}{'p90':>9}{'p99':>9}{'images/s':>10}{'x first':>9}  (quartiles)  main memory",
    ]
    for backend in facts["backends"]:
        lines.append(f"{backend['name']} ({backend['device']}, {backend['precision']})")
        lines.append(
            f"{'  process to answer':24}{backend['starts']:6}{backend['first_result_ms']:9.0f}"
            f"   of which opening the bundle and the network {backend['open_ms']:.0f}"
        )
        lines.append(_line("file to prediction", backend["file_to_prediction"]))
        lines += [_line(f"network, batch {entry['batch']}", entry) for entry in backend["network"]]
    lines += [f"left out: {name}: {reason}" for name, reason in facts["left_out"].items()]
    return "\n".join([*lines, RESEARCH_USE])


def _line(what: str, entry: dict[str, Any]) -> str:
    low, high = entry["faster_quartiles"]
    peak = "-" if entry["peak_bytes"] is None else f"{entry['peak_bytes'] / 1e6:.0f} MB"
    return (
        f"  {what:22}{entry['calls']:6}{entry['p50_ms']:9.2f}{entry['p90_ms']:9.2f}{entry['p99_ms']:9.2f}"
        f"{entry['images_per_second']:10.1f}{entry['faster_than_first']:9.2f}  ({low:.2f} to {high:.2f}){peak:>14}"
    )

"""ONNX Runtime's session options on the CPU: what each costs and gains, one at a time, against the ones magsd uses.

    python benchmarks/session_options.py [MODEL.onnx] [--rounds 9] [--threads 2] [--json FILE]

Each variant is a process of its own, for two sessions in one process disturb each other; they take turns. MODEL: that
of the bundle in the box by default. Printed: processor and wall time of opening, of the first call and of a later one,
as ratios to magsd's options in the same round, median over the rounds; the largest difference of an output to theirs;
the peak of memory.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from magsd_runtime.benchmarking.worker import peak_memory
from magsd_runtime.shipped import choose_bundle
from timing import describe, machine, save

VARIANTS = (
    "as magsd", "no arena", "no memory pattern", "spinning", "parallel executor", "extended optimisation",
    "basic optimisation", "no optimisation", "denormals to zero", "one thread",
)  # fmt: skip
CALLS = 15


def options_of(variant: str, threads: int) -> Any:
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.intra_op_num_threads = 1 if variant == "one thread" else threads
    options.inter_op_num_threads = 1
    options.log_severity_level = 3
    options.add_session_config_entry("session.intra_op.allow_spinning", "1" if variant == "spinning" else "0")
    if variant == "no arena":
        options.enable_cpu_mem_arena = False
    elif variant == "no memory pattern":
        options.enable_mem_pattern = False
    elif variant == "parallel executor":
        options.execution_mode = ort.ExecutionMode.ORT_PARALLEL
        options.inter_op_num_threads = threads
    elif variant == "denormals to zero":
        options.add_session_config_entry("session.set_denormal_as_zero", "1")
    elif variant.endswith("optimisation"):
        level = {"extended": "EXTENDED", "basic": "BASIC", "no": "DISABLE_ALL"}[variant.split()[0]]
        name = "ORT_DISABLE_ALL" if level == "DISABLE_ALL" else f"ORT_ENABLE_{level}"
        options.graph_optimization_level = getattr(ort.GraphOptimizationLevel, name)
    return options


def work(model: Path, variant: str, threads: int) -> dict[str, Any]:
    """One variant, in this process: seconds (wall, processor) of each step, outputs' file, peak of memory."""
    import onnxruntime as ort

    taken: dict[str, list[float]] = {}

    def timed(step: str, call: Any) -> Any:
        wall, processor = time.perf_counter(), time.process_time()
        result = call()
        taken[step] = [time.perf_counter() - wall, time.process_time() - processor]
        return result

    session = timed(
        "open",
        lambda: ort.InferenceSession(str(model), options_of(variant, threads), providers=["CPUExecutionProvider"]),
    )
    (given,) = session.get_inputs()
    side = given.shape[-1]
    image = np.random.default_rng(0).normal(size=(1, 1, side, side)).astype(np.float32)
    outputs = timed("first", lambda: session.run(None, {given.name: image}))
    for _ in range(3):
        session.run(None, {given.name: image})
    timed("later", lambda: [session.run(None, {given.name: image}) for _ in range(CALLS)])
    taken["later"] = [seconds / CALLS for seconds in taken["later"]]
    return {**taken, "peak": peak_memory(), "outputs": [float(np.abs(values).max()) for values in outputs],
            "sums": [values.astype(np.float64).ravel()[:2000].tolist() for values in outputs]}  # fmt: skip


def summarise(rounds: Sequence[dict[str, dict[str, Any]]]) -> list[dict[str, Any]]:
    """A row a variant: ratios to the first one in the same round, medians."""
    rows = []
    for variant in rounds[0]:
        row: dict[str, Any] = {"variant": variant}
        for step in ("open", "first", "later"):
            for clock, index in (("wall", 0), ("processor", 1)):
                row[f"{step}_{clock}"] = statistics.median(
                    turn[variant][step][index] / turn[VARIANTS[0]][step][index] for turn in rounds
                )
        row["peak_mb"] = statistics.median((turn[variant]["peak"] or 0) / 1e6 for turn in rounds)
        ours, theirs = rounds[0][VARIANTS[0]]["sums"], rounds[0][variant]["sums"]
        row["difference"] = max(float(np.abs(np.subtract(a, b)).max()) for a, b in zip(ours, theirs))
        rows.append(row)
    return rows


def format_rows(rows: Sequence[dict[str, Any]]) -> str:
    lines = [
        "| ratio to magsd's options: processor time (wall) | open | first call | later call | peak memory | outputs |",
        "|---|---|---|---|---|---|",
    ]
    for row in rows:
        steps = [f"{row[f'{step}_processor']:.2f} ({row[f'{step}_wall']:.2f})" for step in ("open", "first", "later")]
        same = "the same bits" if row["difference"] == 0 else f"differ by {row['difference']:.1g}"
        lines.append(f"| {row['variant']} | {' | '.join(steps)} | {row['peak_mb']:.0f} MB | {same} |")
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("model", nargs="?", type=Path)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--json", type=Path, metavar="FILE")
    parser.add_argument("--variant", choices=VARIANTS, help=argparse.SUPPRESS)
    options = parser.parse_args(argv)
    model = options.model or Path(choose_bundle(None)) / "model.onnx"
    if options.variant:
        print(json.dumps(work(model, options.variant, options.threads)))
        return 0
    if not model.is_file():
        print(f"session_options: {model}: no such file", file=sys.stderr)
        return 2
    facts = machine("onnxruntime")
    print(describe(facts))
    command = [sys.executable, __file__, str(model), "--threads", str(options.threads), "--variant"]
    rounds = [
        {
            variant: json.loads(subprocess.run([*command, variant], check=True, capture_output=True, text=True).stdout)
            for variant in VARIANTS
        }
        for _ in range(options.rounds)
    ]
    rows = summarise(rounds)
    print(format_rows(rows))
    save(options.json, {"machine": facts, "model": model.name, "threads": options.threads, "rows": rows})
    return 0


if __name__ == "__main__":
    raise SystemExit(main())

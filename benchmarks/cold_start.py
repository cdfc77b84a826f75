"""Cold start: `magsd --help` and `magsd infer` of one image as whole processes, and what they import.

    python benchmarks/cold_start.py BUNDLE IMAGE [--runs 15] [--json FILE]

`magsd infer` runs twice: without, and with ONNX Runtime's optimised graph that `magsd verify` keeps (docs/backends.md),
in a cache folder of this run's own.

The commands take turns in one run, so that the machine's noise hits all of them alike; read the ratios.
The last lines give the import time of each heavy module within `magsd infer`, and prove that torch
is not among them.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import statistics
import subprocess
import sys
import time
from pathlib import Path
from tempfile import TemporaryDirectory

PLAIN, KEPT = "magsd infer, one image", "the same with the kept graph"
HEAVY = (
    "numpy",
    "cv2",
    "PIL.Image",
    "onnxruntime",
    "tqdm",
    "torch",
    "torchvision",
    "matplotlib",
    "sklearn",
    "onnx",
)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("bundle", type=Path)
    parser.add_argument("image", type=Path)
    parser.add_argument("--runs", type=int, default=15)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()

    python = sys.executable
    infer = ["-m", "magsd.cli", "infer", str(arguments.image), "--bundle", str(arguments.bundle), "--json"]
    commands = {
        "python -c pass": [python, "-c", "pass"],
        "import numpy, cv2, onnxruntime": [python, "-c", "import numpy, cv2, onnxruntime"],
        "magsd --help": [python, "-m", "magsd.cli", "--help"],
        "magsd doctor": [python, "-m", "magsd.cli", "doctor"],
        PLAIN: [python, *infer],
        KEPT: [python, *infer],
    }
    times: dict[str, list[float]] = {name: [] for name in commands}
    with TemporaryDirectory() as folder:
        cache = Path(folder) / "graphs"
        kept = {**os.environ, "MAGSD_CACHE": str(cache)}
        subprocess.run(
            [python, "-m", "magsd.cli", "verify", str(arguments.bundle)], check=True, capture_output=True, env=kept
        )
        if not any(cache.glob("*/graph.onnx")):
            sys.exit("magsd verify kept no graph")
        without = {**os.environ, "MAGSD_CACHE": "off"}
        for turn in range(arguments.runs + 1):
            for name, command in commands.items():
                started = time.perf_counter()
                subprocess.run(command, check=True, capture_output=True, env=kept if name == KEPT else without)
                if turn:  # the first turn warms the file cache
                    times[name].append(time.perf_counter() - started)
        peak = {PLAIN: peak_memory([python, *infer], without), KEPT: peak_memory([python, *infer], kept)}
        modules = import_times([python, "-X", "importtime", *infer])
    floor = statistics.median(times["import numpy, cv2, onnxruntime"])
    rows = [
        {"command": name, "median_ms": 1e3 * statistics.median(t), "min_ms": 1e3 * min(t), "max_ms": 1e3 * max(t),
         "ratio_to_imports": statistics.median(t) / floor}
        for name, t in times.items()
    ]  # fmt: skip
    print(f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}")
    print(f"{'whole process':34}{'median ms':>10}{'min':>8}{'max':>8}{'x imports':>11}")
    for row in rows:
        print(
            f"{row['command']:34}{row['median_ms']:10.0f}{row['min_ms']:8.0f}{row['max_ms']:8.0f}{row['ratio_to_imports']:11.2f}"
        )
    for name, size in peak.items():
        print(f"peak memory of {name}: {size:.0f} MB")
    print("imports within magsd infer, ms (with what each pulls in):")
    for name in HEAVY:
        print(f"  {name:14}{modules[name]:8.1f}" if name in modules else f"  {name:14}     not imported")
    if arguments.json:
        arguments.json.write_text(json.dumps({"rows": rows, "imports_ms": modules, "peak_mb": peak}, indent=2) + "\n")
    if "torch" in modules:
        sys.exit("torch was imported by magsd infer")


def import_times(command: list[str]) -> dict[str, float]:
    """Cumulative import time in ms of each heavy module that the command loads."""
    errors = subprocess.run(command, check=True, capture_output=True, text=True).stderr
    found: dict[str, float] = {}
    for line in errors.splitlines():
        match = re.match(r"import time:\s+\d+ \|\s+(\d+) \|( +)(\S+)$", line)
        if not match:
            continue
        name, milliseconds = match[3], int(match[1]) / 1e3
        if name in HEAVY:
            found[name] = milliseconds
        # importlib.import_module leaves no line for the package itself: its outermost parts stand for it
        elif len(match[2]) == 1 and (package := name.partition(".")[0]) in HEAVY:
            found[package] = found.get(package, 0.0) + milliseconds
    return found


def peak_memory(command: list[str], environment: dict[str, str]) -> float:
    """Peak resident memory in MB of one run: in a process of its own, for the figure covers all children."""
    script = (
        "import resource, subprocess, sys; subprocess.run(sys.argv[1:], check=True, capture_output=True); "
        "print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, *command], check=True, capture_output=True, text=True, env=environment
    )
    scale = 1e6 if sys.platform == "darwin" else 1e3
    return int(done.stdout) / scale


if __name__ == "__main__":
    main()

"""From the command to the answer: whole processes in turns, against the bare imports and the same through torch."""

from __future__ import annotations

import importlib.util
import re
import subprocess
import sys
from pathlib import Path
from statistics import median

from magsd_runtime.errors import DataError

from .context import Context
from .figures import ratio, spread
from .processes import Finished, Job, in_turns, magsd, program, run
from .report import Bars, Goal, Report, Table

NOTHING, IMPORTS = "python -c pass", "import numpy, cv2, onnxruntime"
SIDE = 1024
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
_LIMITS = {"tf_efficientnet_lite0": (1.6, 130.0), "resnet50": (1.9, 220.0)}
"""By backbone: times the bare imports, and MB."""


def run_part(context: Context) -> Report:
    side = 128 if context.quick else SIDE
    film = context.film(side)
    jobs = {
        NOTHING: Job([sys.executable, "-c", "pass"]),
        IMPORTS: Job([sys.executable, "-c", "import numpy, cv2, onnxruntime"]),
        "magsd --help": Job(magsd("--help")),
        "magsd doctor": Job(magsd("doctor")),
    }
    skipped: dict[str, str] = {}
    for name, bundle in context.bundles.items():
        infer = magsd("infer", film, "--bundle", bundle, "--json")
        jobs[f"infer, {name}"] = Job(infer, {"MAGSD_CACHE": "off"}, (0, 3))
        jobs[kept(name)] = Job(infer, context.kept(bundle), (0, 3))
        if importlib.util.find_spec("torch") and importlib.util.find_spec("timm"):
            weights = context.work / f"{name.replace(' ', '-')}.pt"
            try:
                run(Job(program("through_torch.py", "--make", bundle, weights)), context.work)
                jobs[torch_of(name)] = Job(program("through_torch.py", weights, film))
            except DataError as error:
                skipped[torch_of(name)] = str(error)
        else:
            skipped[torch_of(name)] = "torch and timm are not installed: pip install 'magsd[train]'"
    context.say(f"cold: {len(jobs)} commands, {context.repeats} rounds")
    runs = in_turns(jobs, context.work, repeats=context.repeats, warmup=context.warmup)
    imports = import_times([sys.executable, "-X", "importtime", *magsd("infer", film, "--json")[1:]])
    if "torch" in imports:
        raise DataError("magsd infer imports torch, which it never may")

    base = [one.seconds for one in runs[IMPORTS]]
    rows, data = [], {}
    for name, found in runs.items():
        seconds = spread([one.seconds for one in found])
        times, peak = ratio([one.seconds for one in found], base), max(one.peak_mb for one in found)
        rows.append((name, 1e3 * seconds.median, f"{1e3 * seconds.low:.0f} to {1e3 * seconds.high:.0f}",
                     f"{times.median:.2f}", f"{times.low:.2f} to {times.high:.2f}", peak))  # fmt: skip
        data[name] = {
            "seconds": seconds.to_dict(), "processor_seconds": spread([one.processor for one in found]).to_dict(),
            "times_imports": times.to_dict(), "peak_mb": peak,
        }  # fmt: skip
    columns = ("whole process", "ms", "middle half", "x imports", "middle half", "peak MB")
    bars = Bars("time", "ms", tuple((name, 1e3 * data[name]["seconds"]["median"], 1e3 * data[name]["seconds"]["high"])
                                    for name in runs))  # fmt: skip
    memory = Bars("peak of memory", "MB", tuple((name, data[name]["peak_mb"], data[name]["peak_mb"]) for name in runs))
    heavy = tuple((name, value) for name, value in sorted(imports.items(), key=lambda item: -item[1]))
    return Report(
        (Table(f"One drawn film of {side} x {side} pixels, PNG.", columns, tuple(rows)),
         Table("Imports within `magsd infer`, each with what it pulls in; torch is not among them.",
               ("module", "ms"), heavy)),
        tuple(goals(context, runs)), (bars, memory), skipped=skipped,
        data={"processes": data, "imports_ms": imports, "film": film.name},
    )  # fmt: skip


def goals(context: Context, runs: dict[str, list[Finished]]) -> list[Goal]:
    """Ratios and differences are of the same round."""
    seconds = {name: [one.seconds for one in found] for name, found in runs.items()}
    found = []
    for name, bundle in context.bundles.items():
        times, megabytes = _LIMITS.get(backbone_of(bundle), (None, None))
        if times is None or megabytes is None:
            continue
        found.append(Goal(f"{kept(name)}: over the bare imports", times, "x",
                          ratio(seconds[kept(name)], seconds[IMPORTS]).median))  # fmt: skip
        if torch_of(name) in seconds and name == "in the box":
            share = ratio(seconds[kept(name)], seconds[torch_of(name)]).median
            found.append(Goal(f"{kept(name)}: over the same through torch", round(1 / 15, 4), "x", share))
        found.append(Goal(f"{kept(name)}: peak of memory", megabytes, "MB", max(r.peak_mb for r in runs[kept(name)])))
    over = [one - other for one, other in zip(seconds["magsd --help"], seconds[NOTHING])]
    found.append(Goal("magsd --help: above python -c pass", 0.15, "s", median(over)))
    found.append(Goal("magsd doctor", 0.5, "s", median(seconds["magsd doctor"])))
    return found


def kept(name: str) -> str:
    return f"infer, {name}, kept graph"


def torch_of(name: str) -> str:
    return f"through torch, {name}"


def backbone_of(bundle: Path) -> str:
    from magsd_runtime.bundle import load_bundle

    return str(load_bundle(bundle).manifest["model"]["architecture"].get("backbone", ""))


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

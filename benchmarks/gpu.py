"""What only a GPU can show, in one command: the engine, its ratios, the training step, training for real.

    python benchmarks/gpu.py [--data M.csv] [--out DIR] [--json FILE] [--minutes 9] [--only engine,ratios,...]
    python benchmarks/gpu.py --dry-run        everything of it that a CPU can execute, small; measures nothing

From a checkout without an install: PYTHONPATH=.:export:runtime. TensorRT that is unpacked in a folder: --tensorrt DIR.
The most important part comes first. Each runs in a process of its own, with a share of the time and what the parts
before it left, so a crash or a damaged CUDA context ends one part, and what that part had found is kept; --json is
written anew after each. Films: --data, or phantoms. --out keeps what is made, and a second run goes on with it; --bring
gathers of it what is worth taking off the machine. Without a CUDA device this says so and exits with 6; with 1 when
something failed.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

import torch

from gpu_parts.context import NOT_MEASURED, OUT_OF_TIME, Context, command, in_a_line
from magsd_runtime import hardware
from magsd_runtime.files import write_json
from timing import describe, machine

# Name: what it is, and its share of the time, in the order of importance
PARTS = {
    "engine": ("the engine: built, compared, timed, refused where it must be", 38),
    "ratios": ("the engine against PyTorch, ONNX Runtime and the device's limits", 24),
    "step": ("the training step", 16),
    "training": ("training for real", 14),
    "tests": ("the tests that need a GPU", 8),
}

GRACE = 20.0
"""Seconds beyond its time after which a part is stopped: it looks at the clock itself between what it does."""


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--data", type=Path, metavar="M.csv", help="films (default: phantoms, made here)")
    parser.add_argument("--out", type=Path, metavar="DIR", help="for what is made (default: a temporary folder)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="written anew after each part")
    parser.add_argument("--bring", type=Path, metavar="DIR", help="figures and trained weights, in parts of 15 MiB")
    parser.add_argument("--minutes", type=float, default=9.0, help="for all parts (default: 9)")
    parser.add_argument("--only", metavar="A,B", help=f"of {', '.join(PARTS)}")
    parser.add_argument("--networks", metavar="A,B", help="backbones, or shipped (default: resnet50,shipped)")
    parser.add_argument("--run", type=Path, metavar="RUN", help="a training run whose weights the first network has")
    parser.add_argument("--trt", choices=("auto", "tensorrt", "rtx"), default="auto", help="library of the engines")
    parser.add_argument("--tensorrt", type=Path, metavar="DIR", help="where TensorRT is unpacked")
    parser.add_argument("--dry-run", action="store_true", help="on the CPU, small, without any figure")
    parser.add_argument("--part", choices=tuple(PARTS), help=argparse.SUPPRESS)
    parser.add_argument("--result", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args(argv)
    if not options.dry_run and not torch.cuda.is_available():
        print("benchmarks/gpu.py: torch sees no CUDA device here, so there is nothing to measure", file=sys.stderr)
        return 6
    chosen = options.only.split(",") if options.only else list(PARTS)
    if unknown := [name for name in chosen if name not in PARTS]:
        parser.error(f"--only names {', '.join(unknown)}: expected some of {', '.join(PARTS)}")
    if options.tensorrt is not None and str(options.tensorrt.resolve()) not in sys.path:
        sys.path.insert(0, str(options.tensorrt.resolve()))
    if options.part:
        return child(options)
    if options.run is not None:
        options.run = options.run.resolve()
    started = time.monotonic()
    options.out = (options.out or Path(mkdtemp(prefix="magsd-gpu-"))).resolve()
    options.out.mkdir(parents=True, exist_ok=True)
    for path in (options.json, options.bring):
        if path is not None:
            path.parent.mkdir(parents=True, exist_ok=True)
    if options.data is None:
        options.data = options.out / "phantoms" / "manifest.csv"
        if not options.data.is_file():
            command("phantoms", "--out", options.data.parent, "--count", 24 if options.dry_run else 240)
    results: dict[str, Any] = {
        "schema": "magsd.gpu/2",
        "what": "a dry run: checks on a CPU, nothing is measured" if options.dry_run else "measured on this GPU",
        "dry_run": options.dry_run, "machine": machine(), "torch": torch.__version__,
        "gpu": None if options.dry_run else graphics(), "data": str(options.data), "parts": {},
    }  # fmt: skip
    print(describe(results["machine"]))
    print(f"DRY RUN: {results['what']}" if options.dry_run else describe(results["gpu"]), flush=True)
    for name, ends in schedule(chosen, 60 * options.minutes):
        print(f"\n{PARTS[name][0]}", flush=True)
        results["parts"][name] = run_part(options, name, started + ends)
        print(json.dumps(results["parts"][name], indent=2), flush=True)
        if options.json:
            write_json(options.json, results)
    if options.bring is not None:
        from gpu_parts.bringing import bring

        write_json(options.bring / "gpu.json", results)
        print("\nbrought: " + ", ".join(bring(options.out / "trained", options.bring)), flush=True)
    print("\n" + summary(results))
    return 1 if any(path[-1] == "failed" for path, _ in leaves(results["parts"])) else 0


def schedule(chosen: Sequence[str], seconds: float) -> list[tuple[str, float]]:
    """When each part must have ended, in seconds from the start: by its share; what one leaves, the next may use."""
    total, ends, found = sum(PARTS[name][1] for name in chosen), 0.0, []
    for name in chosen:
        ends += seconds * PARTS[name][1] / total
        found.append((name, ends))
    return found


def run_part(options: argparse.Namespace, name: str, deadline: float) -> dict[str, Any]:
    """What the part found in a process of its own, until ``deadline`` of ``time.monotonic``, and how it ended."""
    result = options.out / f"{name}.json"
    result.unlink(missing_ok=True)
    left = deadline - time.monotonic()
    if left <= 0:
        return {"skipped": OUT_OF_TIME}
    arguments = [
        "--part", name, "--result", str(result), "--out", str(options.out), "--data", str(options.data.resolve()),
        "--minutes", str(left / 60), "--trt", options.trt,
    ]  # fmt: skip
    for option in ("networks", "run", "tensorrt"):
        if getattr(options, option) is not None:
            arguments += [f"--{option}", str(getattr(options, option))]
    started = time.monotonic()
    # What a benchmark of one's own folder imports must be found by its processes as well
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    log = options.out / f"{name}.log"
    with log.open("w", encoding="utf-8") as output:
        process = subprocess.Popen(
            [sys.executable, __file__, *arguments, *(["--dry-run"] if options.dry_run else [])],
            stdout=output, stderr=subprocess.STDOUT, env=environment, start_new_session=True,
        )  # fmt: skip
        try:
            code: int | None = process.wait(left + GRACE)
        except subprocess.TimeoutExpired:
            code = None
        finally:
            _kill(process)
    found = json.loads(result.read_text(encoding="utf-8")) if result.is_file() else {}
    if not options.dry_run:
        found["seconds"] = round(time.monotonic() - started, 1)
    if code is None:
        found["stopped"] = OUT_OF_TIME
    elif code:
        last = (log.read_text(encoding="utf-8", errors="replace").strip().splitlines() or ["nothing was said"])[-1]
        found["failed"] = f"its process ended with {code}: {last[-300:]}"
    return found


def _kill(process: subprocess.Popen[bytes]) -> None:
    """The process and those that it started, which form a group."""
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def child(options: argparse.Namespace) -> int:
    """One part, in its own process."""
    from gpu_parts import engine, ratios, training

    parts = {
        "engine": engine.engine, "ratios": ratios.ratios, "step": training.step, "training": training.for_real,
        "tests": training.tests,
    }  # fmt: skip
    default = "test_efficientnet,shipped" if options.dry_run else "resnet50,shipped"
    torch.backends.cudnn.benchmark = True
    context = Context(
        device=torch.device("cpu") if options.dry_run else torch.device("cuda", 0), out=options.out, data=options.data,
        deadline=time.monotonic() + 60 * options.minutes, dry=options.dry_run,
        library="rtx" if options.dry_run else options.trt,
        networks=tuple((options.networks or default).split(",")), run=options.run, result=options.result,
    )  # fmt: skip
    try:
        parts[options.part](context)
    except Exception as error:
        context.found["failed"] = in_a_line(error)
        if os.environ.get("MAGSD_TRACEBACK"):
            raise
    finally:
        context.save()
    return 0


def graphics() -> dict[str, Any]:
    """The GPU, its driver and its libraries."""
    properties, driver = torch.cuda.get_device_properties(0), hardware.cuda_driver()
    return {
        "name": properties.name, "compute_capability": f"{properties.major}.{properties.minor}",
        "memory_bytes": properties.total_memory, "multiprocessors": properties.multi_processor_count,
        "driver": driver["version"], "driver_cuda": driver["cuda_version"], "torch_cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version(),
    }  # fmt: skip


def leaves(facts: Any, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any]]:
    """Every value that is no object, and the names on the way to it."""
    if isinstance(facts, dict):
        for name, value in facts.items():
            yield from leaves(value, (*path, str(name)))
    elif path:
        yield path, facts


def summary(results: dict[str, Any]) -> str:
    """A line a part; what failed; the ratios that decide. In a dry run no figure at all."""
    lines = [f"DRY RUN: {results['what']}"] if results["dry_run"] else []
    for name, part in results["parts"].items():
        wrong = [(path, why) for path, why in leaves(part) if path[-1] in ("failed", "skipped", "stopped")]
        lines.append(f"{name:10}{'done' if not wrong else ', '.join(sorted({path[-1] for path, _ in wrong}))}")
        lines += [f"  {' / '.join(path)}: {why}"[:180] for path, why in wrong]
        for path, value in leaves(part):
            if path[-1] in ("passed", "label_agreement", "fp16_size_of_fp32", "images_per_second", "ratio"):
                lines.append(f"  {' / '.join(path)}: {value}")
    unmeasured = sum(value == NOT_MEASURED for _, value in leaves(results["parts"]))
    return "\n".join([*lines, *([f"{unmeasured} figures {NOT_MEASURED}"] if unmeasured else [])])


if __name__ == "__main__":
    sys.exit(main())

"""What only a GPU can show, in one command: the engine, its ratios, the training step, training for real.

    python benchmarks/gpu.py [--data M.csv] [--out DIR] [--json FILE] [--minutes 9] [--only engine,ratios,...]
    python benchmarks/gpu.py --dry-run        everything of it that a CPU can execute, small; measures nothing

From a checkout without an install: PYTHONPATH=.:export:runtime. TensorRT that is unpacked in a folder: --tensorrt DIR.
The most important part comes first; each stands alone, and one that fails, or for which no time is left, is reported
and the next begins. Films: --data, or phantoms. --out keeps what is made, and a second run goes on with it. Without a
CUDA device this says so and exits with 6; with 1 when a part failed.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

import torch

from timing import describe, machine

Part = Callable[[Any], Any]


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--data", type=Path, metavar="M.csv", help="films (default: phantoms, made here)")
    parser.add_argument("--out", type=Path, metavar="DIR", help="for what is made (default: a temporary folder)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="written anew after each part")
    parser.add_argument("--minutes", type=float, default=9.0, help="for all parts (default: 9)")
    parser.add_argument("--only", metavar="A,B", help="of engine, ratios, step, training, tests")
    parser.add_argument("--trt", choices=("auto", "tensorrt", "rtx"), default="auto", help="library of the engines")
    parser.add_argument("--tensorrt", type=Path, metavar="DIR", help="where TensorRT is unpacked")
    parser.add_argument("--dry-run", action="store_true", help="on the CPU, small, without any figure")
    options = parser.parse_args(argv)
    if not options.dry_run and not torch.cuda.is_available():
        print("benchmarks/gpu.py: torch sees no CUDA device here, so there is nothing to measure", file=sys.stderr)
        return 6
    if options.tensorrt is not None:
        sys.path.insert(0, str(options.tensorrt))
        os.environ["PYTHONPATH"] = os.pathsep.join([str(options.tensorrt), os.environ.get("PYTHONPATH", "")])
    from gpu_parts import engine, ratios, training
    from gpu_parts.context import Context, command

    parts: dict[str, tuple[str, Part]] = {
        "engine": ("the engine: built, compared, refused where it must be, timed", engine.engine),
        "ratios": ("the engine against PyTorch, ONNX Runtime and the device's limits", ratios.ratios),
        "step": ("the training step", training.step),
        "training": ("training for real", training.for_real),
        "tests": ("the tests that need a GPU", training.tests),
    }
    chosen = options.only.split(",") if options.only else list(parts)
    if unknown := [name for name in chosen if name not in parts]:
        parser.error(f"--only names {', '.join(unknown)}: expected some of {', '.join(parts)}")
    out = options.out or Path(mkdtemp(prefix="magsd-gpu-"))
    out.mkdir(parents=True, exist_ok=True)
    data = options.data
    if data is None:
        data = out / "phantoms" / "manifest.csv"
        if not data.is_file():
            command("phantoms", "--out", data.parent, "--count", 24 if options.dry_run else 240)
    torch.backends.cudnn.benchmark = True
    context = Context(
        device=torch.device("cpu") if options.dry_run else torch.device("cuda", 0), out=out, data=data.resolve(),
        deadline=time.monotonic() + 60 * options.minutes, library="rtx" if options.dry_run else options.trt,
    )  # fmt: skip
    results: dict[str, Any] = {
        "schema": "magsd.gpu/1", "machine": machine(), "dry_run": options.dry_run, "torch": torch.__version__,
        "gpu": None if options.dry_run else torch.cuda.get_device_name(), "data": str(data), "parts": {},
    }  # fmt: skip
    print(describe(results["machine"]))
    print("dry run: no GPU, nothing is measured" if options.dry_run else results["gpu"], flush=True)
    for name in chosen:
        print(f"\n{parts[name][0]}", flush=True)
        results["parts"][name] = _run(parts[name][1], context)
        print(json.dumps(results["parts"][name], indent=2), flush=True)
        if options.json:
            temporary = options.json.with_name(options.json.name + ".part")
            temporary.write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
            temporary.replace(options.json)
    print("\n" + summary(results))
    return 1 if any("failed" in part for part in results["parts"].values()) else 0


def _run(part: Part, context: Any) -> dict[str, Any]:
    if time.monotonic() > context.deadline:
        return {"skipped": "out of time"}
    started = time.monotonic()
    try:
        found = part(context)
    except Exception as error:  # the other parts are worth their figures all the same
        if os.environ.get("MAGSD_TRACEBACK"):
            raise
        return {"failed": f"{type(error).__name__}: {' '.join(str(error).split())}"}
    return {**found, "seconds": round(time.monotonic() - started, 1)}


def summary(results: dict[str, Any]) -> str:
    """A line a part, and of the engine and the ratios what decides."""
    lines = []
    for name, part in results["parts"].items():
        state = "failed" if "failed" in part else "skipped" if "skipped" in part else "done"
        lines.append(f"{name:10}{state:9}{part.get('failed', part.get('skipped', ''))}"[:160].rstrip())
    for backbone, found in results["parts"].get("engine", {}).items():
        if isinstance(found, dict):
            passed = {
                key: value["passed"] for key, value in found.items() if isinstance(value, dict) and "passed" in value
            }
            lines.append(f"{backbone}: FP16 plan {found['fp16_size_of_fp32']} of FP32's, compared: {passed}")
    for batch, rows in results["parts"].get("ratios", {}).items():
        if batch.startswith("batch") and isinstance(rows, dict):
            shown = [f"{name} {row if isinstance(row, str) else row['ratio']}" for name, row in rows.items()]
            lines.append(f"{batch}: {', '.join(shown)}")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())

"""What only a GPU can show, in one command: no step waits for the device, and what a step costs.

    python benchmarks/gpu.py [--json FILE] [--minutes 9]

From a checkout without an install: PYTHONPATH=.:export:runtime. Each part stands alone: one that fails is
reported and the next begins. Without a CUDA device this says so and exits with 6.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from magsd.config import TrainingConfig, resolve
from magsd.models import build_model
from magsd.step import draw_generator, training_step
from timing import describe, machine

HERE = Path(__file__).resolve().parent


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--json", type=Path)
    parser.add_argument("--minutes", type=float, default=9.0, help="no part begins later than this (default: 9)")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        print("benchmarks/gpu.py: torch sees no CUDA device here, so there is nothing to measure", file=sys.stderr)
        return 6
    torch.backends.cudnn.benchmark = True
    results: dict[str, Any] = {"machine": machine(), "gpu": torch.cuda.get_device_name(), "parts": {}}
    print(describe(results["machine"]))
    print(results["gpu"])
    parts: dict[str, Callable[[], Any]] = {
        "a step never waits for the device": no_synchronisation,
        "images a second": throughput,
        "vectorised augmentation against a loop over images": against_the_loop,
        "tests that need a GPU": gpu_tests,
    }
    started = time.monotonic()
    for name, part in parts.items():
        print(f"\n{name}", flush=True)
        if time.monotonic() - started > 60 * arguments.minutes:
            results["parts"][name] = {"skipped": "out of time"}
        else:
            try:
                results["parts"][name] = part()
            except Exception as error:  # the other parts are worth their figures all the same
                results["parts"][name] = {"failed": f"{type(error).__name__}: {error}"}
        print(json.dumps(results["parts"][name], indent=2))
        if arguments.json:
            arguments.json.write_text(json.dumps(results, indent=2) + "\n")
    return 1 if any("failed" in part for part in results["parts"].values() if isinstance(part, dict)) else 0


class Stepper:
    """A network on the GPU and one batch that stays there."""

    def __init__(self, batch: int, **settings: Any) -> None:
        self.config: TrainingConfig = resolve({"weights": "none", **settings})
        self.device = torch.device("cuda", 0)
        self.model = build_model(self.config, num_classes=3).to(self.device)
        self.model.to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]
        trained = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        self.optimizer = torch.optim.SGD(trained, lr=1e-4, momentum=0.9)
        size = (batch, 1, self.config.size, self.config.size)
        self.images = torch.randint(0, 256, size, dtype=torch.uint8, device=self.device)
        self.labels = torch.arange(batch, device=self.device) % 3
        self.count = 0

    def __call__(self) -> None:
        self.count += 1
        generator = draw_generator(self.device, 0, 0, 0, self.count, 0)
        self.optimizer.zero_grad(set_to_none=True)
        training_step(self.model, self.images, self.labels, generator, self.config)
        self.optimizer.step()


def no_synchronisation() -> dict[str, str]:
    """PyTorch raises at the first call that makes the host wait."""
    step = Stepper(8, backbone="resnet18")
    for _ in range(3):  # libraries may wait while they choose algorithms
        step()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(5):
            step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return {"result": "5 steps of resnet18, none waited"}


def throughput() -> list[dict[str, Any]]:
    """Images a second of the whole MAG-SD step, and of a plain network's."""
    rows = []
    for model in ("magsd", "plain"):
        for precision, tf32 in (("fp32", False), ("fp32", True), ("bf16", False)):
            for batch in (32, 128):
                torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = tf32
                step = Stepper(batch, model=model, precision=precision)
                for _ in range(5):
                    step()
                torch.cuda.synchronize()
                begin, turns = time.perf_counter(), 0
                while turns < 5 or time.perf_counter() - begin < 3:
                    step()
                    turns += 1
                    if turns % 5 == 0:
                        torch.cuda.synchronize()
                torch.cuda.synchronize()
                rate = batch * turns / (time.perf_counter() - begin)
                name = "tf32" if tf32 else precision
                rows.append({"model": model, "precision": name, "batch": batch, "images_per_second": round(rate, 1)})
                del step
                torch.cuda.empty_cache()
    return rows


def against_the_loop() -> dict[str, str]:
    command = [sys.executable, str(HERE / "training_step.py"), "--device", "cuda", "--backbone", "resnet50",
               "--batch", "32"]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, timeout=240)
    print(done.stdout)
    return {"exit": str(done.returncode), "error": done.stderr[-500:] if done.returncode else ""}


def gpu_tests() -> dict[str, str]:
    command = [sys.executable, "-m", "pytest", "-q", "-m", "gpu", str(HERE.parent / "tests")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240, cwd=HERE.parent)
    return {"result": done.stdout.strip().splitlines()[-1] if done.stdout.strip() else done.stderr[-300:]}


if __name__ == "__main__":
    sys.exit(main())

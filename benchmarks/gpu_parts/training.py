"""Parts 3 and 4: what a training step costs and whether it ever waits for the device; training for real."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import torch

from magsd.config import TrainingConfig, resolve
from magsd.models import build_model
from magsd.step import draw_generator, training_step

from .context import NOT_MEASURED, Context, script

BENCHMARKS = Path(__file__).resolve().parents[1]
ROOT = BENCHMARKS.parent


class Stepper:
    """A network on the device and one batch that stays there."""

    def __init__(self, context: Context, batch: int, **settings: Any) -> None:
        self.config: TrainingConfig = resolve({"weights": "none", "size": context.size, **settings})
        self.device = context.device
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


def step(context: Context) -> dict[str, Any]:
    """Synchronisation, images a second by precision and batch, the phases of a step, and the loop over images."""
    found: dict[str, Any] = {"waits": no_synchronisation(context), "images a second": throughput(context)}
    size = (
        ["--quick", "--device", "cpu"] if context.dry else ["--device", "cuda", "--backbone", "resnet50", "--batch", 32]
    )
    target = context.out / "training_step.json"
    code, said = script(context, BENCHMARKS / "training_step.py", *size, "--json", target)
    found["phases, vectorised and in a loop"] = (
        (NOT_MEASURED if context.dry else json.loads(target.read_text(encoding="utf-8")))
        if code == 0
        else {"failed": said[-300:]}
    )
    return found


def no_synchronisation(context: Context) -> str:
    """PyTorch raises at the first call that makes the host wait."""
    one = Stepper(context, 4 if context.dry else 8, backbone=context.backbones()[-1])
    for _ in range(1 if context.dry else 3):  # libraries may wait while they choose algorithms
        one()
    if context.dry:
        return NOT_MEASURED
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(5):
            one()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return "5 steps, none waited"


def throughput(context: Context) -> list[dict[str, Any]]:
    """Images a second of the whole MAG-SD step, and of a plain network's."""
    rows = []
    for model in ("magsd", "plain"):
        for precision, tf32 in (("fp32", False), ("fp32", True), ("bf16", False)):
            for batch in (32, 128):
                torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = tf32
                batch_here = 4 if context.dry else batch
                one = Stepper(
                    context, batch_here, model=model, precision=precision, backbone=context.backbones()[0]
                )  # fmt: skip
                name = "tf32" if tf32 else precision
                row = {"model": model, "precision": name, "batch": batch}
                rows.append({**row, "images_per_second": _rate(context, one, batch_here)})
                del one
                if not context.dry:
                    torch.cuda.empty_cache()
    return rows


def _rate(context: Context, one: Stepper, batch: int) -> Any:
    for _ in range(1 if context.dry else 5):
        one()
    if context.dry:
        return NOT_MEASURED
    torch.cuda.synchronize()
    begin, turns = time.perf_counter(), 0
    while turns < 5 or time.perf_counter() - begin < 2:
        one()
        turns += 1
        if turns % 5 == 0:
            torch.cuda.synchronize()
    torch.cuda.synchronize()
    return round(batch * turns / (time.perf_counter() - begin), 1)


def for_real(context: Context) -> dict[str, Any]:
    """Train on the films as far as the time goes; the same command goes on where it stopped, on any machine."""
    run = context.out / "trained"
    settings = ["--epochs", 1, "--folds", 3, "--fold", 0, "--backbone", "test_efficientnet", "--size", 64, "--weights",
                "none", "--batch-size", 8] if context.dry else ["--epochs", 30, "--backbone", "resnet50", "--weights",
                "none", "--precision", "bf16"]  # fmt: skip
    code, said = script(
        context, "-m", "magsd.cli", "train", "--data", context.data, "--out", run, "--resume", "--quiet", "--json",
        "--device", context.device.type, *settings,
    )  # fmt: skip
    if code not in (0, 124):
        raise RuntimeError(f"magsd train ended with {code}: {said[-300:]}")
    finished = [json.loads(line) for line in said.splitlines() if line.startswith("{")]
    epochs = {path.parent.name: len(path.read_text().splitlines()) - 1 for path in sorted(run.glob("fold*/log.csv"))}
    return {
        "out": str(run),
        "finished": code == 0,
        "epochs": epochs,
        "results": NOT_MEASURED if context.dry else finished,
    }


def tests(context: Context) -> dict[str, str]:
    """The tests that need a GPU."""
    code, said = script(context, "-m", "pytest", "-q", "-m", "gpu", "-p", "no:cacheprovider", ROOT / "tests")
    last = said.strip().splitlines()[-1] if said.strip() else "nothing was said"
    if code not in (0, 5, 124):  # 5: there were none
        raise RuntimeError(f"pytest ended with {code}: {last}")
    return {"exit": str(code), "result": last}

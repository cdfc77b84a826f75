"""Parts 3 to 5: what a training step costs and whether it ever waits for the device; training for real; the tests."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor
from torch.nn import functional

from magsd import attention_augmentation as attention_guided
from magsd import step as step_module
from magsd.config import TrainingConfig, resolve
from magsd.models import build_model
from magsd.step import draw_generator, training_step
from training_step import loop_attention, loop_augment

from .context import NOT_MEASURED, Context, milliseconds, script

BENCHMARKS = Path(__file__).resolve().parents[1]
ROOT = BENCHMARKS.parent
PRECISIONS = (("fp32", False), ("fp32", True), ("bf16", False))
"""Precision of autocast, and whether float32 products may be TF32."""


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

    def in_a_loop(self) -> None:
        """The same step, its augmentation one image after the other."""
        with loops():
            self()

    def passes(self) -> None:
        """Four forward and backward passes and the optimizer, and nothing else of a step."""
        self.optimizer.zero_grad(set_to_none=True)
        image = (self.images.float() / 127.5 - 1).contiguous(memory_format=torch.channels_last)
        for _ in range(4):
            with torch.autocast(self.device.type, torch.bfloat16, enabled=self.config.precision == "bf16"):
                logits = self.model(image).logits
            functional.cross_entropy(logits.float(), self.labels).backward()
        self.optimizer.step()


@contextmanager
def loops() -> Iterator[None]:
    """Steps augment image by image, with ``.item()`` and ``nonzero``, as ``training_step.py`` has it for reference."""

    def attention_in_a_loop(
        images: Tensor, attention: Tensor, names: Any, generator: torch.Generator, **_: float
    ) -> tuple[Tensor, ...]:
        return loop_attention(
            images, attention, attention_guided.draw_attention(names, len(images), generator)
        )  # fmt: skip

    with patch.object(step_module, "augment", loop_augment), patch.object(
        attention_guided, "augment", attention_in_a_loop
    ):  # fmt: skip
        yield


def step(context: Context) -> None:
    """Whether a step waits for the device; of each precision and batch, what it costs and where that goes."""
    context.attempt(context.found, "waits", partial(no_synchronisation, context))
    rows = context.found.setdefault("steps", {})
    for batch in (32, 128):
        for precision, tf32 in PRECISIONS:
            name = f"{'tf32' if tf32 else precision}, batch {batch}"
            context.attempt(rows, name, partial(cost, context, precision, tf32, batch))


def no_synchronisation(context: Context) -> str:
    """PyTorch raises at the first call that makes the host wait."""
    one = Stepper(context, 4 if context.dry else 8, backbone=context.backbone)
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


def cost(context: Context, precision: str, tf32: bool, batch: int) -> dict[str, Any]:
    """The MAG-SD step, its four passes alone, the step with the loop over images, and a plain network's, in turns."""
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = tf32
    images = 4 if context.dry else batch
    if context.cuda:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    settings = {"precision": precision, "backbone": context.backbone}
    one = Stepper(context, images, model="magsd", **settings)
    one()
    peak = torch.cuda.max_memory_allocated() if context.cuda else None
    other = Stepper(context, images, model="plain", **settings)
    calls = {"MAG-SD step": one, "four passes": one.passes, "in a loop": one.in_a_loop, "plain step": other}
    found = milliseconds(context, calls, seconds=0.8, warmup=4)
    if context.dry:
        return {**found, "images_per_second": NOT_MEASURED, "outside_the_passes": NOT_MEASURED}
    return {
        **found,
        "images_per_second": round(1e3 * images / found["MAG-SD step"]["ms"], 1),
        "plain_images_per_second": round(1e3 * images / found["plain step"]["ms"], 1),
        "outside_the_passes": round(1 - found["four passes"]["ratio"], 4),
        "peak_memory_bytes": peak,
    }


def for_real(context: Context) -> None:
    """Train five folds as far as the time goes; the same command goes on where it stopped, on any machine."""
    run = context.out / "trained"
    settings = ["--epochs", 1, "--folds", 3, "--fold", 0, "--backbone", context.backbone, "--size", 64, "--weights",
                "none", "--batch-size", 8] if context.dry else ["--epochs", 30, "--folds", 5, "--backbone",
                context.backbone, "--weights", "none", "--precision", "bf16"]  # fmt: skip
    code, said = script(
        context.left, "-m", "magsd.cli", "train", "--data", context.data, "--out", run, "--resume", "--quiet", "--json",
        "--device", context.device.type, *settings,
    )  # fmt: skip
    finished = [json.loads(line) for line in said.splitlines() if line.startswith("{")]
    epochs = {path.parent.name: len(path.read_text().splitlines()) - 1 for path in sorted(run.glob("fold*/log.csv"))}
    context.found.update(
        out=str(run), finished=code == 0, epochs=epochs, results=NOT_MEASURED if context.dry else finished
    )
    context.save()
    if code not in (0, 124):
        raise RuntimeError(f"magsd train ended with {code}: {said[-300:]}")
    if code == 0:
        context.attempt(context.found, "evaluation", partial(evaluation, context, run))


def evaluation(context: Context, run: Path) -> dict[str, Any]:
    """``magsd evaluate`` on the folds that were held out."""
    report = context.out / "trained-report"
    code, said = script(
        context.left, "-m", "magsd.cli", "evaluate", run, "--data", context.data, "--out", report, "--json"
    )  # fmt: skip
    if code != 0:
        raise RuntimeError(f"magsd evaluate ended with {code}: {said[-300:]}")
    if context.dry:
        return {"report": str(report), "metrics": NOT_MEASURED}
    metrics = json.loads((report / "metrics.json").read_text(encoding="utf-8"))
    return {"report": str(report), "metrics": metrics["classification"]}


def tests(context: Context) -> None:
    """The tests that need a GPU, slow ones too."""
    # The others may need what a machine for training lacks, and a file that cannot be imported stops pytest
    files = [path for path in sorted((ROOT / "tests").glob("test_*.py")) if "mark.gpu" in path.read_text("utf-8")]
    code, said = script(
        context.left, "-m", "pytest", "-q", "-m", "gpu", "-p", "no:cacheprovider", "--rootdir", ROOT, *files
    )  # fmt: skip
    last = said.strip().splitlines()[-1] if said.strip() else "nothing was said"
    last = last.rpartition(" in ")[0] or last  # without the seconds
    context.found.update(exit=code, result="stopped: out of time" if code == 124 else last)
    if code not in (0, 5, 124):  # 5: there were none
        raise RuntimeError(f"pytest ended with {code}: {last}")

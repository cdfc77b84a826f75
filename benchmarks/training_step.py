"""Where the time of a MAG-SD training step goes, and what vectorised augmentation is worth.

    python benchmarks/training_step.py [--backbone tf_efficientnet_lite0] [--batch 16] [--quick] [--json FILE]
    python benchmarks/training_step.py --allocator     glibc's settings for memory, in fresh processes

The step is taken apart into data augmentation, primary forward, attention augmentation, auxiliary
forwards, backward and optimizer. Each runs with vectorised augmentation and with a loop over the
images as in the authors' released code, in turns; both get the same draws, and the largest difference
of their results is printed.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import resource
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from magsd import attention_augmentation as aga
from magsd.augmentation import (
    AugmentationDraws,
    AugmentationRanges,
    augment,
    draw_augmentation,
    normalize_batch,
)
from magsd.losses import soft_distance_loss
from magsd.models import MANet
from timing import Timing, describe, machine, measure, save, table

NAMES = ("mixup", "patching", "dimming")
PHASES = (
    "data augmentation",
    "primary forward",
    "attention augmentation",
    "auxiliary forwards",
    "backward and optimizer",
)
# what speed-minded users set by hand; the last variant sets the same at run time
MALLOC = {"MALLOC_MMAP_THRESHOLD_": 8 << 30, "MALLOC_TRIM_THRESHOLD_": 16 << 30, "MALLOC_TOP_PAD_": 256 << 20}

DataAugmentation = Callable[[Tensor, AugmentationDraws], Tensor]
AttentionAugmentation = Callable[[Tensor, Tensor, dict[str, aga.AttentionDraws]], tuple[Tensor, ...]]


def loop_augment(images: Tensor, draws: AugmentationDraws) -> Tensor:
    """Data augmentation, one image after the other."""
    fields = [field.name for field in dataclasses.fields(draws)]
    singles = [
        augment(images[i : i + 1], AugmentationDraws(**{name: getattr(draws, name)[i : i + 1] for name in fields}))
        for i in range(len(images))
    ]
    return torch.cat(singles)


@torch.no_grad()
def loop_attention(images: Tensor, attention: Tensor, draws: dict[str, aga.AttentionDraws]) -> tuple[Tensor, ...]:
    """Attention augmentation as the released code has it: a loop with ``.item()`` and ``nonzero``."""
    size = images.shape[2]
    padding = int(0.1 * size + 0.5)
    results: list[Tensor] = []
    for name, draw in draws.items():
        batch = []
        for index in range(len(images)):
            image = images[index]
            weights = attention[index].sum((1, 2)).double().sqrt().cumsum(0)
            position = draw.position[index].item() * weights[-1].item()
            chosen = attention[index, min(int((weights <= position).sum().item()), len(weights) - 1)]
            upsampled = functional.interpolate(chosen[None, None], (size, size), mode="bilinear")[0, 0]
            region = upsampled > draw.threshold[index] * chosen.max()
            if name == "dimming":
                batch.append(torch.where(region, image * 0.1, image))
                continue
            points = region.nonzero()
            x0, y0, x1, y1 = 0, 0, size, size
            if len(points):
                x0 = max(int(points[:, 1].min().item()) - padding, 0)
                y0 = max(int(points[:, 0].min().item()) - padding, 0)
                x1 = min(int(points[:, 1].max().item()) + 1 + padding, size)
                y1 = min(int(points[:, 0].max().item()) + 1 + padding, size)
            crop = image[:, y0:y1, x0:x1]
            if name == "mixup":
                enlarged = functional.interpolate(crop[None], (size, size), mode="bilinear")[0]
                batch.append(0.6 * image + 0.4 * enlarged)
            else:
                left = int((draw.place[index, 0] * (size - (x1 - x0) + 1)).item())
                top = int((draw.place[index, 1] * (size - (y1 - y0) + 1)).item())
                left, top = min(left, size - (x1 - x0)), min(top, size - (y1 - y0))
                patched = image.clone()
                patched[:, top : top + y1 - y0, left : left + x1 - x0] = crop
                batch.append(patched)
        results.append(torch.stack(batch))
    return tuple(results)


class Step:
    """A network, a batch and the draws of one step; every call of :meth:`run` does the same work."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        self.device = torch.device(arguments.device)
        torch.manual_seed(0)
        layout = torch.channels_last if arguments.channels_last else torch.contiguous_format
        self.layout = layout
        model = MANet(arguments.backbone, num_classes=3)
        self.model = model.to(self.device).to(memory_format=layout).train()  # pyright: ignore[reportCallIssue]
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=1e-3, momentum=0.9, weight_decay=1e-6)
        n, size = arguments.batch, arguments.size
        smooth = functional.interpolate(torch.rand(n, 1, 9, 9), (size, size), mode="bicubic")
        noise = 8 * torch.randn(n, 1, size, size)
        self.images = (255 * smooth + noise).clamp(0, 255).to(torch.uint8).to(self.device)
        self.labels = (torch.arange(n) % 3).to(self.device)
        generator = torch.Generator(self.device).manual_seed(1)
        self.draws = draw_augmentation(AugmentationRanges(), n, generator)
        self.attention_draws = aga.draw_attention(NAMES, n, generator)

    def synchronize(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()

    def run(
        self,
        data_augmentation: DataAugmentation,
        attention_augmentation: AttentionAugmentation,
        phase: Callable[[str], None] = lambda name: None,
    ) -> None:
        """One step; ``phase`` is called with the name of each phase when it ends."""
        self.optimizer.zero_grad(set_to_none=True)
        image = normalize_batch(data_augmentation(self.images, self.draws))
        phase(PHASES[0])
        primary = self.model(image.contiguous(memory_format=self.layout))
        phase(PHASES[1])
        augmented = attention_augmentation(image, primary.attention.detach(), self.attention_draws)
        phase(PHASES[2])
        auxiliary = [self.model(each.contiguous(memory_format=self.layout)).logits for each in augmented]
        phase(PHASES[3])
        soft_distance_loss(primary.logits, auxiliary, self.labels).backward()
        self.optimizer.step()
        phase(PHASES[4])


def largest_differences(step: Step) -> dict[str, float]:
    """Vectorised against loop, same draws: of z-scored images, or of 0 to 255 for data augmentation."""
    data = augment(step.images, step.draws)
    image = normalize_batch(data)
    with torch.no_grad():
        attention = step.model(image).attention
    pairs = zip(
        aga.apply_draws(image, attention, step.attention_draws),
        loop_attention(image, attention, step.attention_draws),
    )
    differences = {"data augmentation": float((data - loop_augment(step.images, step.draws)).abs().max())}
    for name, (vectorised, loop) in zip(NAMES, pairs):
        differences[name] = float((vectorised - loop).abs().max())
    return differences


def benchmark(arguments: argparse.Namespace) -> dict[str, Any]:
    step = Step(arguments)
    facts = machine("torch", "timm")
    if step.device.type == "cuda":
        facts["gpu"] = torch.cuda.get_device_name(step.device)
    facts["threads"] = torch.get_num_threads()
    print(describe(facts))
    print(
        f"{arguments.backbone}, batch {arguments.batch}, {arguments.size} x {arguments.size}, "
        f"{'channels last' if arguments.channels_last else 'contiguous'}, random weights\n"
    )
    differences = largest_differences(step)
    print("largest difference, vectorised against loop, same draws")
    for name, value in differences.items():
        print(f"  {name:24}{value:.1e}")

    ways: dict[str, tuple[DataAugmentation, AttentionAugmentation]] = {
        "vectorised": (augment, aga.apply_draws),
        "loop": (loop_augment, loop_attention),
    }
    split: dict[str, dict[str, list[float]]] = {way: {name: [] for name in PHASES} for way in ways}

    clock = time.process_time if arguments.cpu_time else time.perf_counter
    print("processor time of this process" if arguments.cpu_time else "wall time")

    def taken_apart(way: str) -> None:
        last = clock()

        def phase(name: str) -> None:
            nonlocal last
            step.synchronize()
            now = clock()
            split[way][name].append(now - last)
            last = now

        step.run(*ways[way], phase)

    measure(
        {way: lambda way=way: taken_apart(way) for way in ways},
        repeats=arguments.repeats, warmup=0, synchronize=step.synchronize,
    )  # fmt: skip
    phases = {}
    for name in PHASES:
        # the first turn warms up
        timings = {way: Timing(tuple(split[way][name][1:] or split[way][name])) for way in ways}
        phases[name] = {way: timing.to_dict() for way, timing in timings.items()}
        print("\n" + table(timings, baseline="vectorised", title=name))
    # on a GPU the phases above wait for each other; this does not
    whole = measure(
        {way: lambda way=way: step.run(*ways[way]) for way in ways},
        repeats=arguments.repeats, synchronize=step.synchronize, clock=clock,
    )  # fmt: skip
    print("\n" + table(whole, baseline="vectorised", title="whole step, not interrupted"))
    if not arguments.cpu_time:
        print(f"\n{arguments.batch / whole['vectorised'].median:.1f} images/s")
    return {
        "machine": facts,
        "settings": {k: v for k, v in vars(arguments).items() if k not in ("json", "child", "allocator")},
        "largest_difference": differences,
        "phases": phases,
        "whole_step": {way: timing.to_dict() for way, timing in whole.items()},
    }


def child(arguments: argparse.Namespace) -> None:
    """Whole steps in this process; their seconds and page faults as one JSON line."""
    if arguments.child == "mallopt":
        from magsd.allocator import keep_freed_memory

        if not keep_freed_memory():
            raise SystemExit("the C library has no mallopt")
    step = Step(arguments)
    clock = time.process_time if arguments.cpu_time else time.perf_counter
    seconds, faults = [], []
    for turn in range(arguments.repeats + 1):
        before, started = resource.getrusage(resource.RUSAGE_SELF).ru_minflt, clock()
        step.run(augment, aga.apply_draws)
        if turn:
            seconds.append(clock() - started)
            faults.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    print(json.dumps({"seconds": seconds, "faults": faults, "peak_mb": peak / 1024}))


def allocator(arguments: argparse.Namespace) -> dict[str, Any]:
    """Fresh processes in turns: glibc as it is, set through the environment, set by mallopt at run time."""
    clean = {name: value for name, value in os.environ.items() if not name.startswith("MALLOC_")}
    variants = {
        "default": ("default", clean),
        "environment": ("default", {**clean, **{name: str(value) for name, value in MALLOC.items()}}),
        "mallopt": ("mallopt", clean),
    }
    command = [
        sys.executable, __file__, "--backbone", arguments.backbone, "--batch", str(arguments.batch),
        "--size", str(arguments.size), "--repeats", str(arguments.repeats), "--device", "cpu",
        "--channels-last" if arguments.channels_last else "--no-channels-last",
    ]  # fmt: skip
    if arguments.threads:
        command += ["--threads", str(arguments.threads)]
    if arguments.cpu_time:
        command.append("--cpu-time")
    runs: dict[str, list[dict[str, Any]]] = {name: [] for name in variants}
    for _ in range(arguments.rounds):
        for name, (way, environment) in variants.items():
            output = subprocess.run([*command, "--child", way], env=environment, check=True, capture_output=True)
            runs[name].append(json.loads(output.stdout.splitlines()[-1]))
    timings = {name: Timing(tuple(s for run in each for s in run["seconds"])) for name, each in runs.items()}
    facts = machine("torch", "timm")
    print(describe(facts))
    layout = "channels last" if arguments.channels_last else "contiguous"
    print(f"{arguments.backbone}, batch {arguments.batch}, {layout}, fresh processes in turns\n")
    print(table(timings, baseline="default", title="processor time" if arguments.cpu_time else "whole step"))
    results: dict[str, Any] = {"machine": facts}
    for name, each in runs.items():
        faults = sorted(f for run in each for f in run["faults"])
        peak = max(run["peak_mb"] for run in each)
        print(f"{name:14}{faults[len(faults) // 2]:>10} page faults a step{peak:>9.0f} MB peak")
        results[name] = {
            **timings[name].to_dict(),
            "page_faults_median": faults[len(faults) // 2],
            "peak_mb": peak,
        }
    return results


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--backbone", default="tf_efficientnet_lite0")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--size", type=int, default=224)
    parser.add_argument("--repeats", type=int, default=7, help="turns that count")
    parser.add_argument("--rounds", type=int, default=2, help="with --allocator: processes a variant")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--threads", type=int, default=0, help="0: torch decides")
    parser.add_argument(
        "--cpu-time", action="store_true",
        help="processor time of the process instead of wall time: for a busy machine, CPU only, --threads 1",
    )  # fmt: skip
    parser.add_argument("--channels-last", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--allocator", action="store_true", help="compare glibc's memory settings instead")
    parser.add_argument("--quick", action="store_true", help="small and short: does it run at all?")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--child", choices=("default", "mallopt"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.quick:
        arguments.batch, arguments.size, arguments.repeats, arguments.rounds = 4, 64, 2, 1
    if arguments.cpu_time and (arguments.device != "cpu" or arguments.threads != 1):
        parser.error("--cpu-time needs --device cpu --threads 1")
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    if arguments.child:
        child(arguments)
    else:
        save(arguments.json, allocator(arguments) if arguments.allocator else benchmark(arguments))


if __name__ == "__main__":
    main()

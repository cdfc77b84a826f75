"""Multiply-adds of networks, and the measured time of one training step; used by reproduce.py.

    python benchmarks/step_costs.py < request.json

Request: {"count": [{"settings": {...}, "classes": 2}, ...], "measure": null or one of these, "threads": 1}. Answer:
{"multiply_adds": [...], "step_seconds": 0.5}. A process of its own, so that the caller needs no PyTorch.
"""

from __future__ import annotations

import json
import sys
import time
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from magsd.config import TrainingConfig, resolve
from magsd.models import build_model
from magsd.step import training_step
from models import count

STEPS = 3
"""Steps that are timed, after one that is not; the fastest counts."""


def step_seconds(config: TrainingConfig, classes: int) -> float:
    """Seconds of one training step on noise, on this machine's GPU if it has one, or its CPU."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.manual_seed(0)
    model = build_model(config, num_classes=classes).to(device).train()
    if config.channels_last:
        model.to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]
    if config.backbone_rate == 0:
        model.get_submodule("backbone").requires_grad_(False)
    images = torch.randint(0, 256, (config.batch_size, 1, config.size, config.size), dtype=torch.uint8, device=device)
    labels = torch.arange(config.batch_size, device=device) % classes
    generator = torch.Generator(device).manual_seed(0)
    seconds = []
    for _ in range(STEPS + 1):
        model.zero_grad(set_to_none=True)
        started = time.perf_counter()
        training_step(model, images, labels, generator, config, backward=lambda term: term.backward())
        if device.type == "cuda":
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - started)
    return min(seconds[1:])


def answer(request: dict[str, Any]) -> dict[str, Any]:
    found = []
    for each in request["count"]:
        config = resolve(each["settings"])
        with FakeTensorMode():
            found.append(count(build_model(config, num_classes=each["classes"]), config.size)[1])
    if request.get("threads"):
        torch.set_num_threads(request["threads"])
    one = request.get("measure")
    seconds = None if one is None else step_seconds(resolve(one["settings"]), one["classes"])
    return {"multiply_adds": found, "step_seconds": seconds}


if __name__ == "__main__":
    print(json.dumps(answer(json.load(sys.stdin))))

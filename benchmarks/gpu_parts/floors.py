"""What a device allows: its measured rates, and the least time that they leave for a network's sums and bytes."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from magsd.models.classifiers import ImageNetClassifier
from magsd.models.ma_net import MANet

from .context import NOT_MEASURED, Context
from .half import trained

SIDE = 8192
COPIED = 1 << 30
"""Of the matrices, and bytes of what is copied: both far larger than any cache."""


def rates(context: Context) -> dict[str, Any]:
    """Products of square matrices of random numbers, in 10^12 operations a second, and a copy within the device's
    memory, in 10^9 bytes read or written a second."""
    if context.dry:
        return dict.fromkeys(("fp16_tflops", "tf32_tflops", "fp32_tflops", "copy_gb_per_s"), NOT_MEASURED)
    found: dict[str, Any] = {}
    for name, kind, tf32 in (
        ("fp16", torch.float16, False), ("tf32", torch.float32, True), ("fp32", torch.float32, False),
    ):  # fmt: skip
        torch.backends.cuda.matmul.allow_tf32 = tf32
        a, b = (torch.randn(SIDE, SIDE, device=context.device, dtype=kind) for _ in range(2))
        found[f"{name}_tflops"] = round(2 * SIDE**3 / _seconds(context, lambda a=a, b=b: a @ b) / 1e12, 3)
    torch.backends.cuda.matmul.allow_tf32 = False
    source = torch.randn(COPIED // 4, device=context.device)
    target = torch.empty_like(source)
    found["copy_gb_per_s"] = round(2 * source.nbytes / _seconds(context, lambda: target.copy_(source)) / 1e9, 1)
    return found


def floors(context: Context, folder: Path, batches: Sequence[int]) -> dict[str, Any]:
    """Of MA-Net and of the plain network: multiply-adds of an image, bytes of the weights in float16, and the
    milliseconds below which no FP16 run of a batch lies, whichever of sums and bytes needs longer.

    Bytes: weights and input read once, in the trunk's float16. Weights that stay in the cache between two calls are not
    read again, so at batch 1 a call may be faster than the bytes say. Activations count as free.
    """
    model = trained(context, folder)
    networks: dict[str, nn.Module] = {
        "MA-Net": MANet(model.backbone_name, num_classes=3),
        "plain": ImageNetClassifier(model.backbone_name, num_classes=3),
    }
    measured, found = context.found.get("rates", {}), {}
    for name, network in networks.items():
        sums, weights = multiply_adds(network, context.size), 2 * sum(each.numel() for each in network.parameters())
        found[name] = {"multiply_adds": sums, "weights_bytes": weights}
        for batch in batches:
            found[name][f"batch {batch}"] = (
                least(batch, sums, weights + 4 * batch * context.size**2, measured)
                if not context.dry and "copy_gb_per_s" in measured
                else NOT_MEASURED
            )
    return found


def multiply_adds(network: nn.Module, size: int) -> int:
    """Of one image, convolutions and matrix products; counted on tensors without storage."""
    with FakeTensorMode(allow_non_fake_inputs=True), FlopCounterMode(display=False) as counter, torch.no_grad():
        network.eval()(torch.zeros(1, 1, size, size))
    return counter.get_total_flops() // 2


def least(batch: int, sums: int, moved: int, measured: dict[str, float]) -> dict[str, float]:
    """Milliseconds for ``batch`` x ``sums`` multiply-adds and for ``moved`` bytes, by the measured rates."""
    arithmetic = 1e3 * 2 * batch * sums / (measured["fp16_tflops"] * 1e12)
    memory = 1e3 * moved / (measured["copy_gb_per_s"] * 1e9)
    return {
        "sums_ms": round(arithmetic, 4),
        "bytes_ms": round(memory, 4),
        "floor_ms": round(max(arithmetic, memory), 4),
    }


def _seconds(context: Context, call: Callable[[], object], repeats: int = 20) -> float:
    """Mean of ``repeats`` calls in a row: the device is kept busy."""
    for _ in range(3):
        call()
    context.synchronize()
    started = time.perf_counter()
    for _ in range(repeats):
        call()
    context.synchronize()
    return (time.perf_counter() - started) / repeats

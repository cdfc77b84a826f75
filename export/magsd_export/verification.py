"""The PyTorch side of the parity check; the comparison itself is :mod:`magsd_runtime.parity`, for devices too."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from magsd_runtime.bundle import OUTPUT_NAMES
from magsd_runtime.parity import (
    BATCH_SIZES,
    TOLERANCES,
    Difference,
    Network,
    Outputs,
    ParityReport,
    Tolerance,
    compare,
    hostile_inputs,
)

__all__ = [
    "BATCH_SIZES",
    "TOLERANCES",
    "Difference",
    "Network",
    "Outputs",
    "ParityReport",
    "Tolerance",
    "compare",
    "hostile_inputs",
    "torch_network",
]


def torch_network(model: Any) -> Network:
    """``model`` (a torch module on any device, left in evaluation mode) as a :data:`Network`."""
    import torch

    device = next(model.parameters()).device
    model.eval()

    def run(images: NDArray[np.float32]) -> Outputs:
        with torch.inference_mode():
            outputs = model(torch.from_numpy(np.ascontiguousarray(images)).to(device))
        return {name: output.float().cpu().numpy() for name, output in zip(OUTPUT_NAMES, outputs)}

    return run

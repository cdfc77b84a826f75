"""The checkpoint that a bundle was exported from, as a backend: the side ``torch`` of ``magsd verify --compare``."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from magsd.checkpoint import load_model
from magsd_runtime.bundle import Bundle
from magsd_runtime.errors import MagsdError, UsageError

from .sources import find_checkpoint
from .verification import Network, torch_network


class TorchBackend:
    """A model in evaluation mode on the CPU, float32; see ``magsd_runtime.backends.Backend``."""

    name, device, precision = "torch", "cpu", "fp32"

    def __init__(self, network: Network) -> None:
        self._network: Network | None = network

    def run(self, images: NDArray[np.float32]) -> dict[str, NDArray[np.float32]]:
        if self._network is None:
            raise MagsdError("the torch backend was closed and cannot run")
        return {name: values.astype(np.float32, copy=False) for name, values in self._network(images).items()}

    def close(self) -> None:
        self._network = None


def open_torch(bundle: Bundle, run: Path, threads: int | None = None) -> TorchBackend:
    """The checkpoint that ``run`` names (see :func:`find_checkpoint`), which must fit the bundle.

    Raises
    ------
    UsageError
        If there is no checkpoint, or it has other classes or another preprocessing than the bundle.
    CheckpointError
        If it is damaged.
    """
    source = find_checkpoint(run)
    model, info = load_model(source.checkpoint)
    if tuple(info.classes) != bundle.classes or info.preprocessing != bundle.preprocessing:
        raise UsageError(
            f"{source.checkpoint}: has other classes or another preprocessing than {bundle.path}: name the run, fold "
            "or checkpoint that the bundle was exported from"
        )
    if threads is not None:
        torch.set_num_threads(threads)
    return TorchBackend(torch_network(model))

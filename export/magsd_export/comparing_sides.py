"""Networks that only the training side can run, as backends: the sides ``torch`` and ``fp16-rounded`` of ``magsd verify
--compare``."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from magsd_runtime.bundle import Bundle
from magsd_runtime.errors import BackendUnavailableError, BundleError, MagsdError, UsageError

from .sources import find_checkpoint
from .verification import Network, torch_network


class NetworkBackend:
    """A network on the CPU; see ``magsd_runtime.backends.Backend``."""

    device = "cpu"

    def __init__(self, name: str, precision: str, network: Network) -> None:
        self.name, self.precision = name, precision
        self._network: Network | None = network

    def run(self, images: NDArray[np.float32]) -> dict[str, NDArray[np.float32]]:
        if self._network is None:
            raise MagsdError(f"the {self.name} backend was closed and cannot run")
        return {name: values.astype(np.float32, copy=False) for name, values in self._network(images).items()}

    def close(self) -> None:
        self._network = None


def open_torch(bundle: Bundle, run: Path, threads: int | None = None) -> NetworkBackend:
    """The checkpoint that ``run`` names (see :func:`find_checkpoint`), in float32, which must fit the bundle.

    Raises
    ------
    UsageError
        If there is no checkpoint, or it has other classes or another preprocessing than the bundle.
    CheckpointError
        If it is damaged.
    """
    import torch

    from magsd.checkpoint import load_model

    source = find_checkpoint(run)
    model, info = load_model(source.checkpoint)
    if tuple(info.classes) != bundle.classes or info.preprocessing != bundle.preprocessing:
        raise UsageError(
            f"{source.checkpoint}: has other classes or another preprocessing than {bundle.path}: name the run, fold "
            "or checkpoint that the bundle was exported from"
        )
    if threads is not None:
        torch.set_num_threads(threads)
    return NetworkBackend("torch", "fp32", torch_network(model))


def open_rounded(bundle: Bundle, threads: int | None = None) -> NetworkBackend:
    """``model.fp16.onnx`` with every rounding of its trunk written out: see
    :func:`magsd_export.precision.rounded_twin`.

    Raises
    ------
    BackendUnavailableError
        If the bundle has no network in half precision.
    """
    import onnx

    from .precision import onnx_network, rounded_twin

    try:
        path, _ = bundle.onnx_file("fp16")
    except BundleError as error:
        raise BackendUnavailableError(f"fp16-rounded: {error}") from error
    return NetworkBackend("fp16-rounded", "fp16", onnx_network(rounded_twin(onnx.load(str(path))), threads=threads))

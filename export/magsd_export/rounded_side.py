"""A bundle's half-precision network, rounded as on a GPU: the side ``fp16-rounded`` of ``magsd verify --compare``."""

from __future__ import annotations

import numpy as np
import onnx
from numpy.typing import NDArray

from magsd_runtime.bundle import Bundle
from magsd_runtime.errors import BackendUnavailableError, BundleError, MagsdError

from .precision import onnx_network, rounded_twin
from .verification import Network


class RoundedBackend:
    """``model.fp16.onnx`` with every rounding written out, on the CPU; see ``magsd_runtime.backends.Backend``."""

    name, device, precision = "fp16-rounded", "cpu", "fp16"

    def __init__(self, network: Network) -> None:
        self._network: Network | None = network

    def run(self, images: NDArray[np.float32]) -> dict[str, NDArray[np.float32]]:
        if self._network is None:
            raise MagsdError(f"the {self.name} backend was closed and cannot run")
        return {name: values.astype(np.float32, copy=False) for name, values in self._network(images).items()}

    def close(self) -> None:
        self._network = None


def open_rounded(bundle: Bundle, threads: int | None = None) -> RoundedBackend:
    """See :func:`magsd_export.precision.rounded_twin`.

    Raises
    ------
    BackendUnavailableError
        If the bundle has no network in half precision.
    """
    try:
        path, _ = bundle.onnx_file("fp16")
    except BundleError as error:
        raise BackendUnavailableError(f"{RoundedBackend.name}: {error}") from error
    return RoundedBackend(onnx_network(rounded_twin(onnx.load(str(path))), threads=threads))

"""ONNX Runtime, on the CPU or on an NVIDIA GPU through its CUDA provider."""

from __future__ import annotations

import contextlib
import io
import os
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..bundle import INPUT_NAME, OUTPUT_NAMES, Bundle
from ..errors import BackendUnavailableError, BundleError, MagsdError
from . import import_onnxruntime

PROVIDERS = {
    "cpu": "CPUExecutionProvider",
    "cpu-int8": "CPUExecutionProvider",
    "cpu-fp16": "CPUExecutionProvider",  # not offered by --backend: for its rounding, which magsd verify looks at
    "cuda": "CUDAExecutionProvider",
}
PRECISIONS = {"cpu-int8": "int8", "cpu-fp16": "fp16"}  # of the others fp32


class OnnxRuntimeBackend:
    """One session on ``model.onnx``, ``model.int8.onnx`` or ``model.fp16.onnx``; ``name``: one of :data:`PROVIDERS`.

    See ``backends.open_backend``.
    """

    def __init__(self, bundle: Bundle, name: str, *, threads: int | None = None) -> None:
        ort = import_onnxruntime()
        self.name = name
        self.device = "cuda:0" if name == "cuda" else "cpu"
        self.precision = PRECISIONS.get(name, "fp32")
        model = _model_path(bundle, name)
        self._session: Any = _open_session(ort, model, name, threads or available_cores())
        inputs = [value.name for value in self._session.get_inputs()]
        outputs = {value.name for value in self._session.get_outputs()}
        if inputs != [INPUT_NAME] or not outputs >= set(OUTPUT_NAMES):
            raise BundleError(
                f"{model}: has inputs {inputs} and outputs {sorted(outputs)}, expected "
                f"[{INPUT_NAME!r}] and {sorted(OUTPUT_NAMES)}: export the bundle again"
            )

    def run(self, images: NDArray[np.float32]) -> dict[str, NDArray[np.float32]]:
        if self._session is None:
            raise MagsdError(f"the {self.name} backend was closed and cannot run")
        try:
            arrays = self._session.run(list(OUTPUT_NAMES), {INPUT_NAME: images})
        except Exception as error:  # its exceptions have no common base but this one
            raise MagsdError(f"the network failed on {self.device}: {_one_line(error)}") from error
        return dict(zip(OUTPUT_NAMES, arrays))

    def close(self) -> None:
        self._session = None


def available_cores() -> int:
    """CPU cores that this process may use, at least 1."""
    if hasattr(os, "sched_getaffinity"):
        return max(1, len(os.sched_getaffinity(0)))
    return os.cpu_count() or 1


def _model_path(bundle: Bundle, name: str) -> Path:
    """The network's file; cpu-int8 and cpu-fp16 ask for one that not every bundle has."""
    if name not in PRECISIONS:
        return bundle.model_path
    try:
        return bundle.onnx_file(PRECISIONS[name])[0]
    except BundleError as error:
        raise BackendUnavailableError(f"backend {name}: {error}") from error


def _open_session(ort: Any, model: Path, name: str, threads: int) -> Any:
    provider = PROVIDERS[name]
    if provider not in ort.get_available_providers():
        raise BackendUnavailableError(
            f"backend {name}: ONNX Runtime {ort.__version__} is installed without it: "
            "pip uninstall -y onnxruntime, then pip install 'magsd[gpu]'"
        )
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.log_severity_level = 3
    # Waiting threads that spin gain a few per cent on an idle machine and halve the speed of a busy one
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    providers: list[Any] = [provider]
    if name == "cuda":
        # TF32 keeps 10 bits of the mantissa: not the FP32 that the bundle was verified with.
        # Heuristic: the exhaustive search of algorithms makes the first image wait for seconds.
        providers = [(provider, {"use_tf32": "0", "cudnn_conv_algo_search": "HEURISTIC"})]
        _load_cuda_libraries(ort)
    try:
        session = ort.InferenceSession(str(model), options, providers=providers)
    except Exception as error:  # its exceptions have no common base but this one
        if name == "cuda" and "cuda" in str(error).lower():
            raise BackendUnavailableError(_cuda_failed(_one_line(error))) from error
        raise BundleError(f"{model}: ONNX Runtime {ort.__version__} cannot load it ({_one_line(error)})") from error
    # A provider that does not load is dropped with no more than a log line
    if provider not in session.get_providers():
        raise BackendUnavailableError(_cuda_failed("its CUDA provider did not load"))
    return session


def _load_cuda_libraries(ort: Any) -> None:
    """Load CUDA and cuDNN from their pip packages, where ONNX Runtime offers to (1.21 and newer)."""
    if hasattr(ort, "preload_dlls"):
        # It prints what it does not find; whether the provider loads is judged afterwards
        with contextlib.redirect_stdout(io.StringIO()), contextlib.suppress(Exception):
            ort.preload_dlls()


def _cuda_failed(reason: str) -> str:
    return f"backend cuda: {reason}: magsd doctor says what this machine has; --backend cpu works without a GPU"


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:300] or type(error).__name__

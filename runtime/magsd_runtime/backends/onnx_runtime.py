"""ONNX Runtime: on the CPU, and on an NVIDIA GPU through its CUDA, TensorRT and TensorRT-RTX providers.

A provider that was asked for and does not load is an error: ONNX Runtime itself goes on without it, on the CPU.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import io
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .. import graph_cache, hardware
from ..bundle import INPUT_NAME, MODEL_NAMES, OUTPUT_NAMES, Bundle
from ..errors import BackendUnavailableError, BundleError, MagsdError, MissingExtraError
from . import import_onnxruntime

PROVIDERS = {
    "cpu": "CPUExecutionProvider",
    "cpu-int8": "CPUExecutionProvider",
    "cpu-fp16": "CPUExecutionProvider",  # not offered by --backend: for its rounding, which magsd verify looks at
    "cuda": "CUDAExecutionProvider",
    "ort-tensorrt": "TensorrtExecutionProvider",
    "ort-rtx": "NvTensorRTRTXExecutionProvider",  # as version 0.5.0 calls itself; its sources have nv_tensorrt_rtx too
}
_CACHED = {"cpu": "fp32", "cpu-int8": "int8"}  # backends whose optimised graph may be kept, and their precision
_HEAVY = frozenset({"Conv", "Einsum", "Gemm", "MatMul"})  # nearly all of the time
PRECISIONS = {"cpu-int8": "int8", "cpu-fp16": "fp16"}  # of the others fp32


class OnnxRuntimeBackend:
    """One session on ``model.onnx``, ``model.int8.onnx`` or ``model.fp16.onnx``; ``name``: one of :data:`PROVIDERS`.
    ``optimised``: whether its graph came from :mod:`graph_cache`.

    See ``backends.open_backend``.
    """

    def __init__(self, bundle: Bundle, name: str, *, threads: int | None = None) -> None:
        ort = import_onnxruntime()
        self.name = name
        self.device = "cpu" if PROVIDERS[name] == "CPUExecutionProvider" else "cuda:0"
        self.precision = _precision(bundle, name)
        model = _model_path(bundle, name)
        threads = threads or hardware.usable_cores()
        session = _open_optimised(ort, bundle, name, threads)
        self.optimised = session is not None
        self._session: Any = session or _open_session(ort, model, name, threads, bundle.model_sha256)
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


def _precision(bundle: Bundle, name: str) -> str:
    """TensorRT-RTX takes types from the graph, so half precision is safe there. The TensorRT provider builds weakly
    typed: it may put float32 layers of a half-precision graph into half precision, where the head overflows."""
    if name == "ort-rtx" and "fp16" in bundle.manifest.get("precisions", {}):
        return "fp16"
    return PRECISIONS.get(name, "fp32")


def _model_path(bundle: Bundle, name: str) -> Path:
    """The network's file; cpu-int8 and cpu-fp16 ask for one that not every bundle has."""
    precision = _precision(bundle, name)
    if precision == "fp32":
        return bundle.model_path
    try:
        return bundle.onnx_file(precision)[0]
    except BundleError as error:
        raise BackendUnavailableError(f"backend {name}: {error}") from error


def why_not(ort: Any, name: str) -> MagsdError | None:
    """Why the backend ``name`` cannot run here, as far as that can be known without loading its provider."""
    provider = PROVIDERS[name]
    if name == "ort-rtx":
        if _RTX_PLUGIN not in sys.modules and importlib.util.find_spec(_RTX_PLUGIN) is None:
            return MissingExtraError(
                "--backend ort-rtx needs onnxruntime-ep-nv-tensorrt-rtx, which is not installed: pip install "
                "'onnxruntime>=1.24' onnxruntime-ep-nv-tensorrt-rtx (not beside onnxruntime-gpu)"
            )
        if not hasattr(ort, "register_execution_provider_library"):
            return BackendUnavailableError(
                f"backend ort-rtx: ONNX Runtime {ort.__version__} takes no plugin providers: pip install -U onnxruntime"
            )
    elif provider not in ort.get_available_providers():
        return BackendUnavailableError(
            f"backend {name}: ONNX Runtime {ort.__version__} is installed without it: "
            "pip uninstall -y onnxruntime, then pip install 'magsd[gpu]'"
        )
    if provider == "CPUExecutionProvider":
        return None
    driver = hardware.cuda_driver()  # asked itself: a provider's own complaint about it is a page of log
    if driver["devices"]:
        return None
    return BackendUnavailableError(_gpu_failed(name, str(driver["problem"] or "the NVIDIA driver finds no GPU")))


def _open_session(ort: Any, model: Path, name: str, threads: int, sha256: str = "") -> Any:
    provider = PROVIDERS[name]
    if (error := why_not(ort, name)) is not None:
        raise error
    options = _options(ort, threads)
    providers: list[Any] | None = [provider]
    if provider != "CPUExecutionProvider":
        options.add_session_config_entry("session.record_ep_graph_assignment_info", "1")  # for _require_nodes
    if name == "ort-rtx":
        _add_rtx(ort, options)
        providers = None  # the options name the device
    elif name in ("cuda", "ort-tensorrt"):
        # TF32 keeps 10 bits of the mantissa: not the FP32 that the bundle was verified with.
        # Heuristic: the exhaustive search of algorithms makes the first image wait for seconds.
        providers = [("CUDAExecutionProvider", {"use_tf32": "0", "cudnn_conv_algo_search": "HEURISTIC"})]
        if name == "ort-tensorrt":
            os.environ.setdefault("NVIDIA_TF32_OVERRIDE", "0")  # its provider has no option for it
            providers.insert(0, (provider, _tensorrt_options(ort, sha256)))
            with contextlib.suppress(ImportError, OSError):
                importlib.import_module("tensorrt_libs")  # pip puts them where the system does not look
        _load_cuda_libraries(ort)
    try:
        # enable_fallback: else a provider that fails, now or in the middle of a run, is replaced by the CPU
        session = ort.InferenceSession(str(model), options, providers=providers, enable_fallback=0)
    except Exception as error:  # its exceptions have no common base but this one
        if provider != "CPUExecutionProvider" and any(word in str(error).lower() for word in ("cuda", "tensorrt")):
            raise BackendUnavailableError(_gpu_failed(name, _one_line(error))) from error
        raise BundleError(f"{model}: ONNX Runtime {ort.__version__} cannot load it ({_one_line(error)})") from error
    loaded = session.get_providers()
    if name == "ort-rtx":  # the only one that was added, whatever another version calls itself
        provider = next((item for item in loaded if item != "CPUExecutionProvider"), provider)
    # A provider that does not load is dropped with no more than a log line
    if provider not in loaded:
        raise BackendUnavailableError(_gpu_failed(name, f"its {provider} did not load"))
    if provider != "CPUExecutionProvider":
        _require_nodes(session, name, provider)
    return session


def _require_nodes(session: Any, name: str, provider: str) -> None:
    """That the network really runs on the provider asked for: what it does not take, the CPU gets without a word.

    Small things may (shapes, mostly). An ONNX Runtime that does not tell which node went where is taken at its word.

    Raises
    ------
    BackendUnavailableError
        If the provider took nothing, or the CPU has convolutions or matrix products.
    """
    try:
        parts = session.get_provider_graph_assignment_info()
    except Exception:  # not there, or not told; its exceptions have no common base but this one
        return
    placed = {(part.ep_name, node.op_type) for part in parts for node in part.get_nodes()}
    if provider not in {where for where, _ in placed}:
        raise BackendUnavailableError(_gpu_failed(name, f"its {provider} took no part of the network"))
    left = sorted(kind for where, kind in placed if where == "CPUExecutionProvider" and kind in _HEAVY)
    if left:
        raise BackendUnavailableError(_gpu_failed(name, f"it would leave {' and '.join(left)} to the CPU"))


def _tensorrt_options(ort: Any, sha256: str) -> dict[str, str]:
    """The provider builds its engine when it is first opened, for minutes; kept for the next time where that may be.

    A folder for each network: the provider names an engine by the graph's names and takes it for another network with
    other weights (microsoft/onnxruntime issue 6455).
    """
    folder = graph_cache.cache_folder()
    if folder is None or not sha256:
        return {}
    kept = folder / "tensorrt" / f"{sha256[:32]}-{ort.__version__}"
    try:
        for made in (folder, folder / "tensorrt", kept):
            made.mkdir(mode=0o700, parents=True, exist_ok=True)
            if not graph_cache.is_ours(made):
                return {}
    except OSError:
        return {}
    return {
        "trt_engine_cache_enable": "1", "trt_engine_cache_path": str(kept),
        "trt_timing_cache_enable": "1", "trt_timing_cache_path": str(kept),
    }  # fmt: skip


def _add_rtx(ort: Any, options: Any) -> None:
    """Add the GPU that the TensorRT-RTX plugin provider finds to ``options``."""
    try:
        plugin = importlib.import_module(_RTX_PLUGIN)
        name = plugin.get_ep_name()
        if name not in _registered:
            ort.register_execution_provider_library(name, plugin.get_library_path())
            _registered.add(name)
        devices = [device for device in ort.get_ep_devices() if device.ep_name == name]
    except Exception as error:  # its exceptions have no common base but this one
        raise BackendUnavailableError(_gpu_failed("ort-rtx", _one_line(error))) from error
    if not devices:
        raise BackendUnavailableError(_gpu_failed("ort-rtx", "its provider finds no GPU that it supports"))
    options.add_provider_for_devices(devices[:1], {})


_RTX_PLUGIN = "onnxruntime_ep_nv_tensorrt_rtx"
_registered: set[str] = set()
"""Plugin providers of this process: a second registration is an error."""


def _options(ort: Any, threads: int) -> Any:
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.log_severity_level = 3
    # Waiting threads that spin gain a few per cent on an idle machine and halve the speed of a busy one
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    return options


def _open_optimised(ort: Any, bundle: Bundle, name: str, threads: int) -> Any:
    """A session on the graph that :func:`prepare` kept; None where there is none, or it does not open."""
    sha256 = _cached_as(bundle, name)
    graph = None if sha256 is None else graph_cache.find(sha256, ort.__version__)
    return None if graph is None else _open_graph(ort, graph, threads)


def _cached_as(bundle: Bundle, name: str) -> str | None:
    """The hash of the network whose optimised graph may be kept; None of a bundle that is still being written."""
    facts = bundle.manifest.get("files", {}).get(MODEL_NAMES.get(_CACHED.get(name, ""), ""))
    return None if facts is None else str(facts["sha256"])


def _open_graph(ort: Any, graph: Path, threads: int) -> Any:
    options = _options(ort, threads)
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL  # it is optimised
    try:
        return ort.InferenceSession(str(graph), options, providers=["CPUExecutionProvider"])
    except Exception:  # whatever it is, the network itself is still there
        return None


def prepare(bundle: Bundle, name: str, images: Callable[[], NDArray[np.float32]]) -> bool:
    """Keep the optimised graph of the backend ``name`` (cpu, cpu-int8) for the next start; whether one is kept now.

    ``images``: gives network inputs float32 (N, 1, S, S) on which it must give what the network gives, to the last bit;
    called only where a graph is made.
    """
    sha256 = _cached_as(bundle, name)
    if sha256 is None:
        return False
    ort = import_onnxruntime()
    if graph_cache.find(sha256, ort.__version__) is not None:
        return True
    inputs = images()
    model, threads = _model_path(bundle, name), hardware.usable_cores()
    plain = _open_session(ort, model, name, threads)

    def make(graph: Path, weights: str) -> None:
        options = _options(ort, threads)
        options.optimized_model_filepath = str(graph)
        for key, value in (
            ("session.optimized_model_external_initializers_file_name", weights),
            ("session.optimized_model_external_initializers_min_size_in_bytes", "1024"),
            ("session.save_external_prepacked_constant_initializers", "1"),
        ):
            options.add_session_config_entry(key, value)
        try:
            ort.InferenceSession(str(model), options, providers=["CPUExecutionProvider"])
        except Exception as error:  # an old library that cannot do this
            raise OSError(str(error)) from error

    def same(graph: Path) -> bool:
        session = _open_graph(ort, graph, threads)
        if session is None:
            return False
        for batch in (inputs[:1], inputs):
            given = {INPUT_NAME: np.ascontiguousarray(batch)}
            pairs = zip(plain.run(list(OUTPUT_NAMES), given), session.run(list(OUTPUT_NAMES), given))
            if not all(np.array_equal(one, other, equal_nan=True) for one, other in pairs):
                return False
        return True

    return graph_cache.write(sha256, ort.__version__, make, same) is not None


def _load_cuda_libraries(ort: Any) -> None:
    """Load CUDA and cuDNN from their pip packages, where ONNX Runtime offers to (1.21 and newer)."""
    if hasattr(ort, "preload_dlls"):
        # It prints what it does not find; whether the provider loads is judged afterwards
        with contextlib.redirect_stdout(io.StringIO()), contextlib.suppress(Exception):
            ort.preload_dlls()


def _gpu_failed(name: str, reason: str) -> str:
    return f"backend {name}: {reason}: magsd doctor says what this machine has; --backend cpu works without a GPU"


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:300] or type(error).__name__

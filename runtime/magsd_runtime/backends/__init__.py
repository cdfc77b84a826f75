"""Backends run the network. Each is one small file; names, shapes and types are checked here, once.

``open_backend`` uses what is asked for by name, or refuses with the reason; only ``auto`` chooses.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import numpy as np
from numpy.typing import NDArray

from ..backend_names import BACKENDS
from ..bundle import INPUT_NAME, OUTPUT_NAMES, Bundle
from ..errors import BackendUnavailableError, MagsdError, MissingExtraError, UsageError, require

if TYPE_CHECKING:
    from types import ModuleType


class Backend(Protocol):
    """A network that is ready to run. ``name`` is what --backend calls it."""

    @property
    def name(self) -> str: ...

    @property
    def device(self) -> str: ...

    @property
    def precision(self) -> str: ...

    def run(self, images: NDArray[np.float32]) -> dict[str, NDArray[np.float32]]:
        """float32 (N, 1, S, S) -> logits (N, C), attention (N, M, h, w), evidence (N, C, M),
        embedding (N, D), all float32 and the caller's to keep."""
        ...

    def close(self) -> None:
        """Release the network; a closed backend cannot run."""
        ...


@dataclass(frozen=True)
class Choice:
    """The backend that ``auto`` tries first, and why (one clause)."""

    name: str
    reason: str


def choose_backend() -> Choice:
    """What ``auto`` would use on this machine; opens nothing.

    Raises
    ------
    MissingExtraError
        If no ONNX Runtime is installed.
    """
    ort = import_onnxruntime()
    if "CUDAExecutionProvider" not in ort.get_available_providers():
        return Choice("cpu", f"ONNX Runtime {ort.__version__} is installed without CUDA")
    from ..hardware import cuda_driver

    driver = cuda_driver()
    if driver["devices"]:
        return Choice("cuda", f"ONNX Runtime {ort.__version__} has CUDA, and {driver['devices'][0]} is here")
    return Choice("cpu", f"ONNX Runtime {ort.__version__} has CUDA, but {driver['problem']}")


def open_backend(bundle: Bundle, name: str = "auto", *, threads: int | None = None) -> CheckedBackend:
    """Open the bundle's network on the backend ``name``, one of :data:`BACKENDS`.

    ``auto`` takes an engine only if its passport fits this machine and it was compared here when it was built;
    it never takes ``cpu-int8``, the bundle's ``model.int8.onnx``, which is another network to the last digit but one,
    nor ONNX Runtime's TensorRT providers (``ort-tensorrt``, ``ort-rtx``), which compile on the device, unseen.

    ``threads`` limits the CPU threads of one call (default: all that this process may use).

    Raises
    ------
    UsageError
        If there is no backend of that name, or ``threads`` is below 1.
    MissingExtraError
        If its library is not installed.
    BackendUnavailableError
        If it was asked for by name and cannot run here.
    BundleError
        If the model cannot be loaded or does not fit the bundle's description.
    EngineError
        If ``tensorrt`` was asked for, and none of the bundle's engines may run here.
    """
    if name not in BACKENDS:
        raise UsageError(f"backend is {name!r}: expected one of {', '.join(BACKENDS)}")
    if threads is not None and threads < 1:
        raise UsageError(f"threads is {threads}: expected 1 or more")
    if name == "tensorrt":
        from .tensorrt_engine import open_by_name

        return CheckedBackend(open_by_name(bundle), bundle, "tensorrt was asked for")
    if name == "auto" and (engine := _proven_engine(bundle)) is not None:
        return engine
    from .onnx_runtime import OnnxRuntimeBackend

    if name != "auto":
        return CheckedBackend(OnnxRuntimeBackend(bundle, name, threads=threads), bundle, f"{name} was asked for")
    choice = choose_backend()
    reason = choice.reason
    if choice.name != "cpu":
        try:
            return CheckedBackend(OnnxRuntimeBackend(bundle, choice.name, threads=threads), bundle, choice.reason)
        except BackendUnavailableError as error:
            reason = str(error)
    return CheckedBackend(OnnxRuntimeBackend(bundle, "cpu", threads=threads), bundle, reason)


def _proven_engine(bundle: Bundle) -> CheckedBackend | None:
    """The bundle's engine for this machine, if it has one that was compared here."""
    if not (bundle.path / "engines").is_dir():
        return None
    from .tensorrt_engine import engines_here, open_engine

    fit, _ = engines_here(bundle)
    for passport in fit:
        if passport.proven:
            reason = f"the engine {passport.plan} was built for this GPU and compared on it"
            try:
                return CheckedBackend(open_engine(bundle, passport), bundle, reason)
            except MagsdError:  # ONNX Runtime is here all the same; asked for by name, this is an error
                continue
    return None


class CheckedBackend:
    """A backend behind the checks that all of them share; ``reason`` says why this one is used."""

    def __init__(self, inner: Backend, bundle: Bundle, reason: str) -> None:
        self._inner = inner
        self._size = bundle.preprocessing.size
        self._classes = len(bundle.classes)
        self.name, self.device, self.precision = inner.name, inner.device, inner.precision
        self.reason = reason

    def run(self, images: NDArray[np.float32]) -> dict[str, NDArray[np.float32]]:
        """See :meth:`Backend.run`; N >= 1.

        Raises
        ------
        ValueError
            If ``images`` is not float32 (N, 1, S, S).
        MagsdError
            If the network fails, or its outputs have other names, shapes or types than promised.
        """
        shape = (1, self._size, self._size)
        if images.dtype != np.float32 or images.shape[1:] != shape or images.ndim != 4 or not len(images):
            raise ValueError(
                f"{INPUT_NAME} is {images.dtype} {images.shape}: expected float32 (N, 1, S, S) with S = {self._size}"
            )
        outputs = self._inner.run(np.ascontiguousarray(images))
        self._check(outputs, len(images))
        return outputs

    def close(self) -> None:
        self._inner.close()

    def __enter__(self) -> CheckedBackend:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _check(self, outputs: dict[str, NDArray[np.float32]], count: int) -> None:
        if set(outputs) != set(OUTPUT_NAMES):
            raise MagsdError(f"the network gave {sorted(outputs)}: expected {sorted(OUTPUT_NAMES)}")
        maps = outputs["attention"].shape[1] if outputs["attention"].ndim == 4 else 0
        patterns: dict[str, tuple[int | None, ...]] = {  # None: any size
            "logits": (count, self._classes),
            "attention": (count, maps, None, None),
            "evidence": (count, self._classes, maps),
            "embedding": (count, None),
        }
        for name, expected in patterns.items():
            array = outputs[name]
            fits = array.ndim == len(expected) and all(
                size >= 1 and want in (None, size) for size, want in zip(array.shape, expected)
            )
            if array.dtype != np.float32 or not fits:
                raise MagsdError(f"the network's {name} is {array.dtype} {array.shape}: expected {expected}")


def import_onnxruntime() -> ModuleType:
    """ONNX Runtime, silenced below errors.

    Raises
    ------
    MissingExtraError
        If it is not installed.
    """
    try:
        ort = require("onnxruntime", feature="running a model", extra="cpu")
        # A half-removed package (onnxruntime and onnxruntime-gpu share a folder) imports as nothing
        if not hasattr(ort, "InferenceSession"):
            raise MissingExtraError(
                "onnxruntime is installed incompletely: pip uninstall -y onnxruntime onnxruntime-gpu, "
                "then pip install 'magsd[cpu]' or 'magsd[gpu]'"
            )
    except ImportError as error:
        raise BackendUnavailableError(f"ONNX Runtime cannot be loaded ({error}): reinstall it") from error
    ort.set_default_logger_severity(3)  # errors; its warnings about hardware it does not find help nobody
    return ort

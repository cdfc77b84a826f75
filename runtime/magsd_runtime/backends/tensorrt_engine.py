"""A TensorRT or TensorRT-RTX engine on the first NVIDIA GPU, without torch.

Not yet run on a GPU (docs/engines.md): ``auto`` takes it only where the engine's passport fits this machine and its
outputs were compared on this GPU when it was built.
"""

from __future__ import annotations

import contextlib
import threading
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..bundle import INPUT_NAME, OUTPUT_NAMES, Bundle
from ..engines.building import Profile
from ..engines.cuda import Buffer, CudaError, Driver, Graph, Stream
from ..engines.library import Library, Messages, find_library
from ..engines.passport import FOLDER, Passport, check_engine, read_passports, this_machine
from ..errors import BackendUnavailableError, EngineError, EngineMismatchError, MagsdError

MOST_GRAPHS = 4  # batch sizes with a graph, each with an execution context and its scratch memory


@dataclass
class _Captured:
    """One batch size, ready to be launched: a graph is bound to the context that it was captured from."""

    context: Any
    graph: Graph


class TensorRTBackend:
    """One plan, ready to run; safe to call from several threads, one at a time. See ``backends.open_backend``.

    ``content``: the plan; ``library``: the one that built it; ``size``: S of the input; ``profile``: its batch sizes.
    Larger batches are run in parts, smaller ones filled up with zeros. ``driver``: for tests.

    Raises
    ------
    BackendUnavailableError
        If there is no driver or no GPU, found out before any call of the library.
    EngineError
        If the library does not open the plan, or it has other inputs and outputs than a bundle's network.
    """

    name = "tensorrt"
    device = "cuda:0"

    def __init__(
        self,
        content: bytes,
        library: Library,
        *,
        precision: str,
        size: int,
        profile: Profile,
        driver: Driver | None = None,
    ) -> None:
        self.precision = precision
        self._library, self._profile = library, profile
        self._lock = threading.Lock()
        self._runtime: Any = None
        self._engine: Any = None
        self._context: Any = None
        self._captured: dict[int, _Captured] = {}
        self._uncapturable = library.is_rtx  # it captures graphs itself, see _new_context
        self._buffers: dict[str, Buffer] = {}
        self._stream: Stream | None = None
        self._driver = driver or Driver()
        try:
            self._said = Messages(library)
            self._deserialize(content)
            self._stream = Stream(self._driver)
            for name, shape in self._shapes(size).items():
                self._buffers[name] = Buffer(self._driver, (profile.maximum, *shape))
            self._context = self._new_context()
            self.run(np.zeros((profile.minimum, 1, size, size), np.float32))  # the first call loads kernels
        except BaseException:
            self._release()
            raise

    def run(self, images: NDArray[np.float32]) -> dict[str, NDArray[np.float32]]:
        with self._lock:
            if self._engine is None:
                raise MagsdError("the tensorrt backend was closed and cannot run")
            self._driver.enter()
            outputs = {
                name: np.empty((len(images), *self._buffers[name].host.shape[1:]), np.float32) for name in OUTPUT_NAMES
            }
            for start in range(0, len(images), self._profile.maximum):
                part = images[start : start + self._profile.maximum]
                batch = max(len(part), self._profile.minimum)
                host = self._buffers[INPUT_NAME].host
                host[: len(part)] = part
                host[len(part) : batch] = 0
                self._execute(batch)
                for name, values in outputs.items():
                    values[start : start + len(part)] = self._buffers[name].host[: len(part)]
            return outputs

    def close(self) -> None:
        with self._lock:
            self._release()

    def _execute(self, batch: int) -> None:
        """From pinned input to pinned outputs, for the first ``batch`` rows."""
        assert self._stream is not None
        if batch in self._captured:
            self._captured[batch].graph.launch(self._stream)
            self._stream.wait()
            return
        self._enqueue(self._context, batch)
        self._stream.wait()
        if not self._uncapturable and len(self._captured) < MOST_GRAPHS:
            self._capture(batch)

    def _enqueue(self, context: Any, batch: int) -> None:
        assert self._stream is not None
        image = self._buffers[INPUT_NAME]
        if not context.set_input_shape(INPUT_NAME, (batch, *image.host.shape[1:])):
            raise MagsdError(f"the engine refuses a batch of {batch} ({self._said.first_error()})")
        image.to_device(batch, self._stream)
        if not context.execute_async_v3(self._stream.address):
            raise MagsdError(f"the engine failed on {self.device} ({self._said.first_error()})")
        for name in OUTPUT_NAMES:
            self._buffers[name].to_host(batch, self._stream)

    def _capture(self, batch: int) -> None:
        """Copies and network of this batch size as one graph; what cannot be captured goes on without."""
        assert self._stream is not None
        context = self._new_context()
        self._enqueue(context, batch)  # a first run may allocate, which a capture may not
        self._stream.wait()
        try:
            with self._stream.capturing() as graph:
                self._enqueue(context, batch)
        except MagsdError:  # CudaError too
            self._uncapturable = True
            return
        self._captured[batch] = _Captured(context, graph)

    def _new_context(self) -> Any:
        if self._library.is_rtx:
            config = self._engine.create_runtime_config()
            # its kernels are compiled and exchanged while it runs: it alone knows when to capture
            config.cuda_graph_strategy = self._library.module.CudaGraphStrategy.WHOLE_GRAPH_CAPTURE
            context = self._engine.create_execution_context(config)
        else:
            context = self._engine.create_execution_context()
        if context is None:
            raise MagsdError(f"the engine cannot be prepared to run ({self._said.first_error()})")
        for name, buffer in self._buffers.items():
            if not context.set_tensor_address(name, buffer.address):
                raise MagsdError(f"the engine refuses the memory of {name} ({self._said.first_error()})")
        return context

    def _deserialize(self, content: bytes) -> None:
        self._runtime = self._library.module.Runtime(self._said.logger)
        self._engine = None if self._runtime is None else self._runtime.deserialize_cuda_engine(content)
        if self._engine is None:
            raise EngineError(
                f"{self._library.title} does not open the engine ({self._said.first_error()}): "
                "build it again on this machine with magsd engine"
            )

    def _shapes(self, size: int) -> dict[str, tuple[int, ...]]:
        """Shapes without the batch of the input and the four outputs, all float32."""
        trt, engine = self._library.module, self._engine
        names = [engine.get_tensor_name(index) for index in range(engine.num_io_tensors)]
        shapes = {name: tuple(engine.get_tensor_shape(name))[1:] for name in names}
        types = {name: engine.get_tensor_dtype(name) for name in names}
        inputs = [name for name in names if engine.get_tensor_mode(name) == trt.TensorIOMode.INPUT]
        if (
            inputs != [INPUT_NAME]
            or set(names) != {INPUT_NAME, *OUTPUT_NAMES}
            or shapes[INPUT_NAME] != (1, size, size)
            or any(kind != trt.DataType.FLOAT for kind in types.values())
            or any(length < 1 for shape in shapes.values() for length in shape)
        ):
            raise EngineError(f"the engine has tensors {shapes}: expected those of the bundle; build it again")
        return shapes

    def _release(self) -> None:
        """Graphs before the contexts they were captured from, contexts before engine and memory, all of it once."""
        if self._driver.closed:
            return
        with contextlib.suppress(CudaError):
            self._driver.enter()
        for captured in self._captured.values():
            captured.graph.close()
        self._captured.clear()
        self._context = None
        self._engine = None
        self._runtime = None  # an engine must not outlive it
        for buffer in self._buffers.values():
            buffer.close()
        self._buffers.clear()
        if self._stream is not None:
            self._stream.close()
        self._driver.close()


def open_engine(bundle: Bundle, passport: Passport) -> TensorRTBackend:
    """Open the engine of ``passport``, after everything in it was compared with bundle and machine.

    Raises
    ------
    EngineError, EngineMismatchError, MissingExtraError, BackendUnavailableError
        As :func:`magsd_runtime.engines.passport.check_engine`, or if the library does not open it.
    """
    plan = check_engine(bundle, passport)
    library = find_library("rtx" if passport.library == "tensorrt_rtx" else "tensorrt", gpu=True)
    if library.version != passport.library_version:
        # its package says another version than the library that it loads
        raise EngineMismatchError(
            f"{plan}: was built with {passport.title}, and {library.title} is what is loaded here"
        )
    return TensorRTBackend(
        plan.read_bytes(),
        library,
        precision=passport.precision,
        size=bundle.preprocessing.size,
        profile=Profile.parse(passport.profile),
    )


def engines_here(bundle: Bundle) -> tuple[tuple[Passport, ...], tuple[MagsdError, ...]]:
    """The bundle's engines that may run here, half precision first, and why each other one may not."""
    passports, broken = read_passports(bundle.path / FOLDER)
    fit: list[Passport] = []
    refused: list[MagsdError] = list(broken)
    machine = this_machine() if passports else None
    for passport in passports:
        try:
            check_engine(bundle, passport, machine)
        except MagsdError as error:
            refused.append(error)
        else:
            fit.append(passport)
    return tuple(sorted(fit, key=lambda passport: (not passport.proven, passport.precision))), tuple(refused)


def open_by_name(bundle: Bundle) -> TensorRTBackend:
    """The engine for ``--backend tensorrt``: the first that may run here, or why none may.

    Raises
    ------
    BackendUnavailableError
        If the bundle has no engine.
    MagsdError
        Of the first engine that may not run, if none may.
    """
    fit, refused = engines_here(bundle)
    if fit:
        return open_engine(bundle, fit[0])
    if refused:
        raise refused[0]
    raise BackendUnavailableError(
        f"backend tensorrt: {bundle.path} has no engine: magsd engine {bundle.path} builds one on this machine"
    )

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

DEVICE = "cuda:0"
MOST_CONTEXTS = 2  # callers at once: one copies while the other computes; each has scratch memory of its own
MOST_GRAPHS = 4  # batch sizes with a graph, each with an execution context and its scratch memory

_MAKING = threading.Lock()
"""TensorRT's guide ("Thread Safety") says that contexts may run at once, not that they may be made at once. They share
the engine's one optimization profile: TensorRT 8.6 had to be asked for that (PROFILE_SHARING_0806), 10 always does."""


@dataclass
class _Captured:
    """One batch size, ready to be launched: a graph is bound to the context that it was captured from."""

    context: Any
    graph: Graph


class TensorRTBackend:
    """One plan, ready to run; safe to call from several threads, ``contexts`` of them at once. See
    ``backends.open_backend``.

    ``content``: the plan; ``library``: the one that built it; ``size``: S of the input; ``profile``: its batch sizes.
    Larger batches are run in parts, smaller ones filled up with zeros. ``driver``: for tests. Each caller at once needs
    buffers and scratch memory of its own, made when it is first needed; where there is no memory for it, callers wait.
    ``graphs``: whether batch sizes become CUDA graphs; without is for measuring what they bring.

    Raises
    ------
    BackendUnavailableError
        If there is no driver or no GPU, found out before any call of the library.
    EngineError
        If the library does not open the plan, or it has other inputs and outputs than a bundle's network.
    """

    name = "tensorrt"
    device = DEVICE

    def __init__(
        self,
        content: bytes,
        library: Library,
        *,
        precision: str,
        size: int,
        profile: Profile,
        driver: Driver | None = None,
        contexts: int = MOST_CONTEXTS,
        graphs: bool = True,
    ) -> None:
        self.precision = precision
        self._library, self._profile = library, profile
        self._most, self._graphs = contexts, graphs
        self._free: list[_Lane] = []
        self._made = 0
        self._changed = threading.Condition()
        self._runtime: Any = None
        self._engine: Any = None
        self._driver = driver or Driver()
        try:
            self._said = Messages(library)
            self._deserialize(content)
            self._tensors = self._shapes(size)
            self.run(np.zeros((profile.minimum, 1, size, size), np.float32))  # the first call loads kernels
        except BaseException:
            self.close()
            raise

    def run(self, images: NDArray[np.float32]) -> dict[str, NDArray[np.float32]]:
        lane = self._take()
        try:
            self._driver.enter()
            return lane.run(images)
        finally:
            with self._changed:
                self._free.append(lane)
                self._changed.notify_all()

    def close(self) -> None:
        """Wait for those who are being served, then release everything, once."""
        with self._changed:
            self._engine = None
            self._changed.notify_all()
            while len(self._free) < self._made:
                self._changed.wait()
            lanes, self._free, self._made = self._free, [], 0
            self._runtime, runtime = None, self._runtime  # an engine must not outlive it
            if self._driver.closed:
                return
            with contextlib.suppress(CudaError):
                self._driver.enter()
            for lane in lanes:
                lane.close()
            del lanes, runtime
            self._driver.close()

    def _take(self) -> _Lane:
        """A lane that nobody uses: one that is free, a new one, or the next that becomes free."""
        with self._changed:
            while True:
                if self._engine is None:
                    raise MagsdError("the tensorrt backend was closed and cannot run")
                if self._free:
                    return self._free.pop()
                if self._made < self._most:
                    self._made += 1
                    engine = self._engine
                    break
                self._changed.wait()
        try:
            self._driver.enter()
            return _Lane(
                self._driver, self._library, engine, self._said, self._profile, self._tensors, graphs=self._graphs
            )
        except BaseException as error:
            with self._changed:
                self._made -= 1
                # The others go on, and this one waits for one of them; without any there is nothing to wait for
                fewer = isinstance(error, MagsdError) and self._made > 0
                if fewer:
                    self._most = self._made
                self._changed.notify_all()
            if not fewer:
                raise
        return self._take()

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


class _Lane:
    """What one caller at a time needs: a stream, buffers, an execution context, and its captured graphs."""

    def __init__(
        self, driver: Driver, library: Library, engine: Any, said: Messages, profile: Profile,
        tensors: dict[str, tuple[int, ...]], *, graphs: bool,
    ) -> None:  # fmt: skip
        self._driver, self._library, self._said, self._profile = driver, library, said, profile
        self._engine: Any = engine
        self._captured: dict[int, _Captured] = {}
        self._graphs = graphs
        self._uncapturable = library.is_rtx or not graphs  # RTX captures graphs itself, see _new_context
        self._buffers: dict[str, Buffer] = {}
        self._context: Any = None
        self._stream: Stream | None = None
        try:
            self._stream = Stream(driver)
            for name, shape in tensors.items():
                self._buffers[name] = Buffer(driver, (profile.maximum, *shape))
            self._context = self._new_context()
        except BaseException:
            self.close()
            raise

    def run(self, images: NDArray[np.float32]) -> dict[str, NDArray[np.float32]]:
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
        """Graphs before the contexts they were captured from, contexts before the memory that they know."""
        for captured in self._captured.values():
            captured.graph.close()
        self._captured.clear()
        self._context = None
        for buffer in self._buffers.values():
            buffer.close()
        self._buffers.clear()
        if self._stream is not None:
            self._stream.close()
            self._stream = None
        self._engine = None

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
            raise MagsdError(f"the engine failed on {DEVICE} ({self._said.first_error()})")
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
        with _MAKING:
            if self._library.is_rtx:
                config = self._engine.create_runtime_config()
                # its kernels are compiled and exchanged while it runs: it alone knows when to capture
                strategies = self._library.module.CudaGraphStrategy
                config.cuda_graph_strategy = strategies.WHOLE_GRAPH_CAPTURE if self._graphs else strategies.DISABLED
                context = self._engine.create_execution_context(config)
            else:
                context = self._engine.create_execution_context()
        if context is None:
            raise MagsdError(f"the engine cannot be prepared to run ({self._said.first_error()})")
        for name, buffer in self._buffers.items():
            if not context.set_tensor_address(name, buffer.address):
                raise MagsdError(f"the engine refuses the memory of {name} ({self._said.first_error()})")
        return context


def open_engine(bundle: Bundle, passport: Passport, *, graphs: bool = True) -> TensorRTBackend:
    """Open the engine of ``passport``, after everything in it was compared with bundle and machine.

    ``graphs``: see :class:`TensorRTBackend`.

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
        graphs=graphs,
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

"""A driver and a TensorRT runtime in main memory: what they are asked to do is done, and checked as they would.

``FakeCuda`` stands in for libcuda.so.1: memory is malloc'd, copies copy, a capturing stream records instead of working
and a launched graph repeats what was recorded. Each pointer is known or refused, so that a wrong one is found.
``fake_tensorrt`` has an engine that computes a given function on that memory.
"""

from __future__ import annotations

import ctypes
import itertools
import threading
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np

Function = Callable[[np.ndarray], dict[str, np.ndarray]]


class FakeCuda:
    """``memory``: what is allocated now, by address. ``calls``: names, in order. ``failing``: names that fail."""

    def __init__(self) -> None:
        self.memory: dict[int, ctypes.Array[ctypes.c_char]] = {}
        self.streams: dict[int, list[Callable[[], None]] | None] = {}
        self.graphs: dict[int, list[Callable[[], None]]] = {}
        self.calls: list[str] = []
        self.failing: dict[str, int] = {}
        self.launches = 0
        self.retained = 0
        self.most_memory: int | None = None  # blocks, after which there is no more
        self._handles = itertools.count(1001)
        self._entered = threading.local()

    def __getattr__(self, name: str) -> Any:
        if not name.startswith("cu"):
            raise AttributeError(name)
        function = type(self).__dict__[f"do_{name}"]

        def call(*arguments: Any) -> int:
            self.calls.append(name)
            if name.startswith(("cuMem", "cuStream", "cuGraph")):  # as a driver's "invalid device context"
                assert getattr(self._entered, "done", False), f"{name} in a thread that did not enter the context"
            if name in self.failing:
                return self.failing[name]
            return function(self, *arguments) or 0

        return call

    @property
    def empty(self) -> bool:
        """Whether everything was given back."""
        return not (self.memory or self.streams or self.graphs or self.retained)

    def work(self, stream: int, job: Callable[[], None]) -> None:
        recording = self.streams[stream]
        job() if recording is None else recording.append(job)

    def handle(self) -> int:
        return next(self._handles)

    # the driver's functions

    def do_cuInit(self, flags: Any) -> None: ...
    def do_cuDeviceGet(self, device: Any, index: Any) -> None: ...
    def do_cuCtxSetCurrent(self, context: Any) -> None:
        assert context.value == 77
        self._entered.done = True

    def do_cuDevicePrimaryCtxRetain(self, context: Any, device: Any) -> None:
        context._obj.value = 77
        self.retained += 1

    def do_cuDevicePrimaryCtxRelease_v2(self, device: Any) -> None:
        self.retained -= 1

    def do_cuGetErrorName(self, code: Any, text: Any) -> None:
        text._obj.value = b"CUDA_ERROR_TEST"

    def _allocate(self, pointer: Any, size: int) -> None:
        block = ctypes.create_string_buffer(b"\xff" * size, size)  # NaN, until it is written
        self.memory[ctypes.addressof(block)] = block
        pointer._obj.value = ctypes.addressof(block)

    def do_cuMemAlloc_v2(self, pointer: Any, size: Any) -> int:
        if self.most_memory is not None and len(self.memory) >= self.most_memory:
            return 2  # CUDA_ERROR_OUT_OF_MEMORY
        self._allocate(pointer, size.value)
        return 0

    def do_cuMemHostAlloc(self, pointer: Any, size: Any, flags: Any) -> None:
        self._allocate(pointer, size.value)

    def do_cuMemFree_v2(self, pointer: Any) -> None:
        del self.memory[pointer.value]

    do_cuMemFreeHost = do_cuMemFree_v2

    def _copy(self, target: int, source: int, size: int, stream: Any) -> None:
        assert size <= len(self.memory[target])
        assert size <= len(self.memory[source])
        self.work(stream.value, lambda: ctypes.memmove(target, source, size) and None)

    def do_cuMemcpyHtoDAsync_v2(self, target: Any, source: Any, size: Any, stream: Any) -> None:
        self._copy(target.value, source.value, size.value, stream)

    do_cuMemcpyDtoHAsync_v2 = do_cuMemcpyHtoDAsync_v2

    def do_cuStreamCreate(self, stream: Any, flags: Any) -> None:
        stream._obj.value = self.handle()
        self.streams[stream._obj.value] = None

    def do_cuStreamDestroy_v2(self, stream: Any) -> None:
        del self.streams[stream.value]

    def do_cuStreamSynchronize(self, stream: Any) -> int:
        return 0 if self.streams[stream.value] is None else 900

    def do_cuStreamBeginCapture_v2(self, stream: Any, mode: Any) -> None:
        assert self.streams[stream.value] is None
        self.streams[stream.value] = []

    def do_cuStreamEndCapture(self, stream: Any, graph: Any) -> None:
        recorded = self.streams[stream.value]
        assert recorded is not None
        self.streams[stream.value] = None
        graph._obj.value = self.handle()
        self.graphs[graph._obj.value] = recorded

    def do_cuGraphInstantiateWithFlags(self, executable: Any, graph: Any, flags: Any) -> None:
        executable._obj.value = self.handle()
        self.graphs[executable._obj.value] = self.graphs[graph.value]

    def do_cuGraphLaunch(self, executable: Any, stream: Any) -> None:
        self.launches += 1
        for job in self.graphs[executable.value]:
            self.work(stream.value, job)

    def do_cuGraphDestroy(self, graph: Any) -> None:
        del self.graphs[graph.value]

    do_cuGraphExecDestroy = do_cuGraphDestroy


class FakeContext:
    def __init__(self, engine: FakeEngine) -> None:
        self.engine, self.shape, self.addresses, self.runs = engine, (), {}, 0
        self.busy = threading.Lock()

    def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
        low, high = self.engine.profile
        if name != "image" or not low <= shape[0] <= high or shape[1:] != self.engine.shapes["image"]:
            return False
        self.shape = shape
        return True

    def set_tensor_address(self, name: str, address: int) -> bool:
        self.addresses[name] = address
        return name in self.engine.shapes and address in self.engine.cuda.memory

    def execute_async_v3(self, stream: int) -> bool:
        if self.engine.failing or set(self.addresses) != set(self.engine.shapes):
            return False
        if self.engine.cuda.streams[stream] is not None and self.engine.uncapturable:
            return False
        self.runs += 1
        addresses, shape = dict(self.addresses), self.shape

        def job() -> None:
            count = int(np.prod(shape))
            image = np.ctypeslib.as_array((ctypes.c_float * count).from_address(addresses["image"])).reshape(shape)
            assert self.busy.acquire(blocking=False), "a context is run by two threads at once"
            try:
                outputs = self.engine.function(image.copy())
            finally:
                self.busy.release()
            for name, values in outputs.items():
                flat = np.ascontiguousarray(values, np.float32)
                assert flat.nbytes <= len(self.engine.cuda.memory[addresses[name]])
                ctypes.memmove(addresses[name], flat.ctypes.data, flat.nbytes)

        self.engine.cuda.work(stream, job)
        return True


class FakeEngine:
    def __init__(self, cuda: FakeCuda, function: Function, size: int, profile: tuple[int, int]) -> None:
        outputs = function(np.zeros((1, 1, size, size), np.float32))
        self.shapes = {"image": (1, size, size), **{name: values.shape[1:] for name, values in outputs.items()}}
        self.cuda, self.function, self.profile = cuda, function, profile
        self.failing = self.uncapturable = False
        self.float, self.input, self.output = "FLOAT", "INPUT", "OUTPUT"  # the library's words
        self.contexts: list[FakeContext] = []
        self.num_io_tensors = len(self.shapes)

    def get_tensor_name(self, index: int) -> str:
        return list(self.shapes)[index]

    def get_tensor_shape(self, name: str) -> tuple[int, ...]:
        return (-1, *self.shapes[name])

    def get_tensor_dtype(self, name: str) -> Any:
        return self.float

    def get_tensor_mode(self, name: str) -> Any:
        return self.input if name == "image" else self.output

    def create_runtime_config(self) -> SimpleNamespace:
        return SimpleNamespace(cuda_graph_strategy="DISABLED")

    def create_execution_context(self, config: Any = None) -> FakeContext:
        context = FakeContext(self)
        context.config = config  # type: ignore[attr-defined]
        self.contexts.append(context)
        return context


def fake_tensorrt(engine: FakeEngine | None) -> Any:
    """A module of which ``Runtime`` opens the plan ``b"plan"``, and refuses others with a message."""

    class ILogger: ...

    class Runtime:
        def __init__(self, logger: Any) -> None:
            self.logger = logger

        def deserialize_cuda_engine(self, content: bytes) -> FakeEngine | None:
            if content == b"plan":
                return engine
            self.logger.log("Severity.INFO", "reading")
            self.logger.log("Severity.ERROR", "Serialization assertion\n magicTagRead == kMAGIC_TAG failed")
            return None

    return SimpleNamespace(
        ILogger=ILogger, Runtime=Runtime, Builder=None, __version__="10.9.0.34",
        TensorIOMode=SimpleNamespace(INPUT="INPUT", OUTPUT="OUTPUT"), DataType=SimpleNamespace(FLOAT="FLOAT"),
        CudaGraphStrategy=SimpleNamespace(WHOLE_GRAPH_CAPTURE="WHOLE", DISABLED="NONE"),
    )  # fmt: skip

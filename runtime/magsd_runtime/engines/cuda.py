"""The few calls of the NVIDIA driver that running a plan needs, by ctypes: memory, copies, a stream, a graph.

The driver's library comes with every driver, Jetson's too, so nothing needs to be installed, and it is asked whether it
works before any call that could crash. CUDA driver API reference: memory, stream and graph management.
"""

from __future__ import annotations

import contextlib
import ctypes
import sys
from collections.abc import Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..errors import BackendUnavailableError, MagsdError

_NON_BLOCKING = 1  # CU_STREAM_NON_BLOCKING: does not wait for the legacy stream
_THREAD_LOCAL = 1  # CU_STREAM_CAPTURE_MODE_THREAD_LOCAL: other threads may allocate meanwhile
_NOT_SUPPORTED = 801  # CUDA_ERROR_NOT_SUPPORTED


class CudaError(MagsdError):
    """A call of the driver failed; ``code`` is its CUresult."""

    def __init__(self, call: str, code: int, name: str) -> None:
        super().__init__(f"the GPU failed: {call} gave {name} ({code}): magsd doctor says what this machine has")
        self.code = code


class Driver:
    """The first GPU's primary context, which TensorRT uses too; :meth:`close` gives it back.

    Raises
    ------
    BackendUnavailableError
        If there is no driver, or it shows no GPU.
    """

    def __init__(self, library: Any = None) -> None:
        self._library = _load() if library is None else library
        self._context = ctypes.c_void_p()
        self._device = ctypes.c_int(0)
        try:
            self.call("cuInit", ctypes.c_uint(0))
            self.call("cuDeviceGet", ctypes.byref(self._device), ctypes.c_int(0))
            self.call("cuDevicePrimaryCtxRetain", ctypes.byref(self._context), self._device)
        except CudaError as error:
            reason = "it finds no GPU" if error.code in (100, 101) else f"CUDA error {error.code}"
            raise BackendUnavailableError(
                f"the NVIDIA driver cannot be used ({reason}): --backend cpu works without a GPU"
            ) from error
        try:
            self.enter()
        except CudaError:
            self.close()
            raise

    @property
    def closed(self) -> bool:
        return not self._context

    def call(self, name: str, *arguments: Any) -> None:
        """Call ``name``; every argument is a ctypes value.

        Raises
        ------
        CudaError
            If it does not give CUDA_SUCCESS, or this driver is too old to have it.
        """
        function = getattr(self._library, name, None)
        if function is None:
            raise CudaError(name, _NOT_SUPPORTED, "a driver too old to have it")
        code = int(function(*arguments))
        if code:
            raise CudaError(name, code, self._error_name(code))

    def enter(self) -> None:
        """Make the context current in this thread, as every call below expects."""
        self.call("cuCtxSetCurrent", self._context)

    def close(self) -> None:
        if self._context:
            with contextlib.suppress(CudaError):
                self.call("cuDevicePrimaryCtxRelease_v2", self._device)
            self._context = ctypes.c_void_p()

    def _error_name(self, code: int) -> str:
        text = ctypes.c_char_p()
        function = getattr(self._library, "cuGetErrorName", None)
        if function is None or function(ctypes.c_int(code), ctypes.byref(text)) or not text.value:
            return "an error"
        return text.value.decode("ascii", "replace")


class Buffer:
    """Float32 values on the device and, page-locked, on the host: ``host`` is an array of ``shape``."""

    def __init__(self, driver: Driver, shape: tuple[int, ...]) -> None:
        self._driver = driver
        self._device, self._host = ctypes.c_uint64(0), ctypes.c_void_p()
        count = int(np.prod(shape))
        driver.call("cuMemAlloc_v2", ctypes.byref(self._device), ctypes.c_size_t(4 * count))
        try:
            driver.call("cuMemHostAlloc", ctypes.byref(self._host), ctypes.c_size_t(4 * count), ctypes.c_uint(0))
        except CudaError:
            self.close()
            raise
        assert self._host.value is not None
        flat = np.ctypeslib.as_array((ctypes.c_float * count).from_address(self._host.value))
        self.host: NDArray[np.float32] = flat.reshape(shape)

    @property
    def address(self) -> int:
        return int(self._device.value)

    def to_device(self, rows: int, stream: Stream) -> None:
        """Begin to copy the first ``rows`` of the first axis."""
        self._driver.call("cuMemcpyHtoDAsync_v2", self._device, self._host, self._bytes(rows), stream.handle)

    def to_host(self, rows: int, stream: Stream) -> None:
        self._driver.call("cuMemcpyDtoHAsync_v2", self._host, self._device, self._bytes(rows), stream.handle)

    def close(self) -> None:
        if self._device.value:
            with contextlib.suppress(CudaError):
                self._driver.call("cuMemFree_v2", self._device)
            self._device = ctypes.c_uint64(0)
        if self._host.value:
            with contextlib.suppress(CudaError):
                self._driver.call("cuMemFreeHost", self._host)
            self._host = ctypes.c_void_p()

    def _bytes(self, rows: int) -> ctypes.c_size_t:
        return ctypes.c_size_t(self.host[:rows].nbytes)


class Stream:
    """A queue of work on the GPU."""

    def __init__(self, driver: Driver) -> None:
        self._driver = driver
        self.handle = ctypes.c_void_p()
        driver.call("cuStreamCreate", ctypes.byref(self.handle), ctypes.c_uint(_NON_BLOCKING))

    @property
    def address(self) -> int:
        return int(self.handle.value or 0)

    def wait(self) -> None:
        """Until all that was queued is done; an error of any of it is raised here."""
        self._driver.call("cuStreamSynchronize", self.handle)

    @contextlib.contextmanager
    def capturing(self) -> Iterator[Graph]:
        """What is queued in the block does not run; it becomes the graph, complete when the block ends.

        Raises
        ------
        CudaError
            If something in the block cannot be captured.
        """
        graph = Graph(self._driver)
        self._driver.call("cuStreamBeginCapture_v2", self.handle, ctypes.c_int(_THREAD_LOCAL))
        try:
            yield graph
        except BaseException:
            # a stream that is left capturing refuses everything
            with contextlib.suppress(CudaError):
                self._driver.call("cuStreamEndCapture", self.handle, ctypes.byref(graph.source))
            graph.close()
            raise
        self._driver.call("cuStreamEndCapture", self.handle, ctypes.byref(graph.source))
        graph.finish()

    def close(self) -> None:
        if self.handle.value:
            with contextlib.suppress(CudaError):
                self._driver.call("cuStreamDestroy_v2", self.handle)
            self.handle = ctypes.c_void_p()


class Graph:
    """Work that was captured once and is launched in one call."""

    def __init__(self, driver: Driver) -> None:
        self._driver = driver
        self.source, self._executable = ctypes.c_void_p(), ctypes.c_void_p()

    def finish(self) -> None:
        try:
            self._driver.call(
                "cuGraphInstantiateWithFlags", ctypes.byref(self._executable), self.source, ctypes.c_ulonglong(0)
            )
        except CudaError:
            self.close()
            raise

    def launch(self, stream: Stream) -> None:
        self._driver.call("cuGraphLaunch", self._executable, stream.handle)

    def close(self) -> None:
        for name, handle in (("cuGraphExecDestroy", self._executable), ("cuGraphDestroy", self.source)):
            if handle.value:
                with contextlib.suppress(CudaError):
                    self._driver.call(name, handle)
                handle.value = None


def _load() -> Any:
    name = "nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1"
    try:
        return ctypes.CDLL(name)
    except OSError as error:
        raise BackendUnavailableError(
            f"there is no NVIDIA driver ({name} was not found): --backend cpu works without a GPU"
        ) from error

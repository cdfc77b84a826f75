"""The TensorRT backend on a driver and a runtime in main memory; on a GPU, where there is one, the real thing."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import tiny_bundle
from fake_gpu import FakeCuda, FakeEngine, fake_tensorrt
from magsd_runtime.backends import CheckedBackend, open_backend
from magsd_runtime.backends.tensorrt_engine import MOST_CONTEXTS, MOST_GRAPHS, TensorRTBackend
from magsd_runtime.bundle import load_bundle
from magsd_runtime.engines.building import Profile
from magsd_runtime.engines.cuda import Buffer, CudaError, Driver, Stream
from magsd_runtime.engines.library import Library, find_library
from magsd_runtime.errors import BackendUnavailableError, EngineError, MagsdError
from magsd_runtime.hardware import cuda_driver

SIZE = 8


def network(images: np.ndarray) -> dict[str, np.ndarray]:
    """Outputs that depend on each image alone, of the shapes of a network with 3 classes, 2 maps and 5 features."""
    flat = images.reshape(len(images), -1)
    return {
        "logits": flat[:, :3] * 2,
        "attention": np.abs(images[:, :, ::4, ::4]).repeat(2, axis=1),
        "evidence": flat[:, :6].reshape(-1, 3, 2) - 1,
        "embedding": flat[:, 7:12],
    }


class Machine:
    """A fake GPU, an engine on it, and the backend that runs it."""

    def __init__(self, profile: Profile | None = None, *, rtx: bool = False) -> None:
        profile = profile or Profile(2, 3, 4)
        self.cuda = FakeCuda()
        self.engine = FakeEngine(self.cuda, network, SIZE, (profile.minimum, profile.maximum))
        self.profile = profile
        name = "tensorrt_rtx" if rtx else "tensorrt"
        self.library = Library(name, "10.9.0.34", fake_tensorrt(self.engine))

    def open(self, content: bytes = b"plan", size: int = SIZE, **settings: Any) -> TensorRTBackend:
        return TensorRTBackend(
            content, self.library, precision="fp16", size=size, profile=self.profile, driver=Driver(self.cuda),
            **settings,
        )  # fmt: skip

    def all_released(self) -> bool:
        return self.cuda.empty


def images(count: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(count, 1, SIZE, SIZE)).astype(np.float32)


@pytest.mark.parametrize("rtx", [False, True])
def test_any_number_of_images_gives_each_its_own_outputs(rtx: bool) -> None:
    machine = Machine(rtx=rtx)
    backend = machine.open()
    assert (backend.name, backend.device, backend.precision) == ("tensorrt", "cuda:0", "fp16")
    for count in (1, 2, 3, 4, 5, 9, 11, 1, 4, 11):
        given = images(count, seed=count)
        outputs = backend.run(given)
        for name, expected in network(given).items():
            np.testing.assert_array_equal(outputs[name], expected, err_msg=f"{name} of {count}")
    backend.close()
    assert machine.all_released()


def test_outputs_are_the_callers_to_keep() -> None:
    backend = Machine().open()
    first = backend.run(images(2, 1))
    kept = {name: values.copy() for name, values in first.items()}
    backend.run(images(2, 2))
    for name, values in kept.items():
        np.testing.assert_array_equal(first[name], values)
        first[name][:] = 0
    np.testing.assert_array_equal(backend.run(images(2, 1))["logits"], kept["logits"])


def test_a_batch_size_is_captured_once_and_then_launched() -> None:
    machine = Machine(Profile(1, 2, 8))
    backend = machine.open()  # warm-up: the smallest batch is captured
    before = machine.cuda.launches
    for _ in range(3):
        backend.run(images(1))
    assert machine.cuda.launches == before + 3
    runs = sum(context.runs for context in machine.engine.contexts)
    for count in (2, 3, 4, 5, 6, 5, 6):
        backend.run(images(count))
    captured = machine.cuda.calls.count("cuStreamBeginCapture_v2")
    assert captured == MOST_GRAPHS  # 1, 2, 3, 4; each context holds memory, so 5 and 6 go without
    assert sum(context.runs for context in machine.engine.contexts) == runs + 3 * 3 + 4
    assert len(machine.engine.contexts) == 1 + MOST_GRAPHS
    backend.close()
    assert machine.all_released()


def test_what_cannot_be_captured_runs_without_graphs() -> None:
    machine = Machine()
    machine.engine.uncapturable = True
    backend = machine.open()
    for count in (2, 3, 2):
        given = images(count)
        np.testing.assert_array_equal(backend.run(given)["logits"], network(given)["logits"])
    assert machine.cuda.launches == 0
    assert machine.cuda.calls.count("cuStreamBeginCapture_v2") == 1  # tried once
    backend.close()
    assert machine.all_released()


def test_rtx_is_left_to_capture_its_own_graphs() -> None:
    machine = Machine(rtx=True)
    backend = machine.open()
    backend.run(images(4))
    assert "cuStreamBeginCapture_v2" not in machine.cuda.calls
    assert [context.config.cuda_graph_strategy for context in machine.engine.contexts] == ["WHOLE"]


def test_without_graphs_there_are_none() -> None:
    """What graphs bring can only be measured against an engine that has none, which RTX must be told."""
    machine = Machine()
    backend = machine.open(graphs=False)
    for count in (2, 3, 2):
        given = images(count)
        np.testing.assert_array_equal(backend.run(given)["logits"], network(given)["logits"])
    assert machine.cuda.launches == 0
    assert "cuStreamBeginCapture_v2" not in machine.cuda.calls
    machine = Machine(rtx=True)
    machine.open(graphs=False).run(images(4))
    assert [context.config.cuda_graph_strategy for context in machine.engine.contexts] == ["NONE"]


def ask(backend: TensorRTBackend, seed: int, turns: int) -> int:
    """How many of ``turns`` calls gave another caller's outputs, or wrong ones."""
    wrong = 0
    for turn in range(turns):
        given = images(1 + (seed + turn) % 5, seed=100 * seed + turn)
        outputs = backend.run(given)
        wrong += not all(np.array_equal(outputs[name], expected) for name, expected in network(given).items())
    return wrong


@pytest.mark.parametrize("rtx", [False, True])
def test_several_threads_get_each_its_own_outputs(rtx: bool) -> None:
    """The stand-ins refuse a context that two threads run at once, and a thread that did not enter the driver's."""
    machine = Machine(rtx=rtx)
    backend = machine.open()
    with ThreadPoolExecutor(5) as pool:
        calls = [pool.submit(ask, backend, seed, 20) for seed in range(5)]
    assert [call.result() for call in calls] == [0] * 5
    assert 1 <= len(machine.cuda.streams) <= MOST_CONTEXTS
    backend.close()
    assert machine.all_released()


class Together:
    """A network that waits until ``count`` calls are in it at once, and holds all of them until then."""

    def __init__(self, machine: Machine, count: int) -> None:
        self.entered = threading.Semaphore(0)
        self.barrier = threading.Barrier(count + 1)
        machine.engine.function = self

    def __call__(self, given: np.ndarray) -> dict[str, np.ndarray]:
        self.entered.release()
        self.barrier.wait(30)
        return network(given)


def test_as_many_calls_as_there_are_contexts_run_at_once_and_the_next_waits() -> None:
    machine = Machine(rtx=True)  # every call runs the network once
    backend = machine.open()
    ask(backend, 1, 10)
    assert len(machine.cuda.streams) == 1  # one caller needs no more
    together = Together(machine, MOST_CONTEXTS)
    with ThreadPoolExecutor(MOST_CONTEXTS + 1) as pool:
        calls = [pool.submit(backend.run, images(2, seed)) for seed in range(MOST_CONTEXTS + 1)]
        for _ in range(MOST_CONTEXTS):
            assert together.entered.acquire(timeout=30)
        assert not together.entered.acquire(timeout=0.05)  # the last one is not in it
        assert len(machine.cuda.streams) == MOST_CONTEXTS
        machine.engine.function = network  # for the one that waits
        together.barrier.wait(30)
        for seed, call in enumerate(calls):
            np.testing.assert_array_equal(call.result()["logits"], network(images(2, seed))["logits"])
    assert len(machine.cuda.streams) == MOST_CONTEXTS
    backend.close()
    assert machine.all_released()


@pytest.mark.parametrize("blocks", [1, 7])
def test_without_memory_for_another_context_the_callers_share_what_there_is(blocks: int) -> None:
    """``blocks``: what more may be allocated; a context takes ten, on host and device."""
    machine = Machine()
    backend = machine.open()
    held = len(machine.cuda.memory)
    assert held == 10
    machine.cuda.most_memory = held + blocks
    with ThreadPoolExecutor(4) as pool:
        calls = [pool.submit(ask, backend, seed, 10) for seed in range(4)]
    assert [call.result() for call in calls] == [0] * 4
    assert len(machine.cuda.memory) == held  # what a half-made one had is given back
    backend.close()
    assert machine.all_released()


def test_closing_waits_for_the_call_that_runs_and_refuses_the_one_that_waits() -> None:
    machine = Machine(rtx=True)
    backend = machine.open(contexts=1)
    together = Together(machine, 1)
    with ThreadPoolExecutor(3) as pool:
        running = pool.submit(backend.run, images(2, 1))
        assert together.entered.acquire(timeout=30)
        waiting = pool.submit(backend.run, images(2, 2))
        closing = pool.submit(backend.close)
        with pytest.raises(MagsdError, match="was closed"):
            waiting.result(30)
        assert not closing.done()
        assert not machine.all_released()
        together.barrier.wait(30)
        np.testing.assert_array_equal(running.result(30)["logits"], network(images(2, 1))["logits"])
        closing.result(30)
    assert machine.all_released()


def test_a_plan_that_is_refused_is_an_error_with_the_reason() -> None:
    machine = Machine()
    with pytest.raises(EngineError, match=r"does not open the engine \(Serialization assertion magicTagRead"):
        machine.open(b"something else")
    assert machine.all_released()


def test_an_engine_of_another_network_is_refused() -> None:
    machine = Machine()
    with pytest.raises(EngineError, match="expected those of the bundle"):
        machine.open(size=SIZE * 2)
    machine.engine.shapes["more"] = (3,)
    machine.engine.num_io_tensors += 1
    with pytest.raises(EngineError, match="expected those of the bundle"):
        machine.open()
    assert machine.all_released()


def test_a_failing_network_is_an_error_and_all_is_released() -> None:
    machine = Machine()
    backend = machine.open()
    machine.engine.failing = True
    with pytest.raises(MagsdError, match="the engine failed on cuda:0"):
        backend.run(images(3))
    backend.close()
    with pytest.raises(MagsdError, match="was closed"):
        backend.run(images(2))
    backend.close()
    assert machine.all_released()


@pytest.mark.parametrize(
    "call",
    ["cuMemAlloc_v2", "cuMemHostAlloc", "cuStreamCreate", "cuMemcpyHtoDAsync_v2", "cuStreamSynchronize"],
)
def test_a_driver_that_fails_while_opening_leaves_nothing(call: str) -> None:
    machine = Machine()
    machine.cuda.failing = {call: 2}
    with pytest.raises(CudaError, match=rf"{call} gave CUDA_ERROR_TEST \(2\)"):
        machine.open()
    assert machine.all_released()


@pytest.mark.parametrize(
    ("call", "code", "reason"), [("cuInit", 100, "finds no GPU"), ("cuInit", 803, "CUDA error 803"),
                                 ("cuDeviceGet", 101, "finds no GPU"), ("cuDevicePrimaryCtxRetain", 2, "error 2")],
)  # fmt: skip
def test_a_driver_without_a_gpu_is_unavailable(call: str, code: int, reason: str) -> None:
    cuda = FakeCuda()
    cuda.failing = {call: code}
    with pytest.raises(BackendUnavailableError, match=reason) as caught:
        Driver(cuda)
    assert caught.value.exit_code == 6


def test_no_driver_is_found_out_before_the_library_is_called() -> None:
    if cuda_driver()["devices"]:
        pytest.skip("there is a GPU here")

    class Untouchable:
        def __getattr__(self, name: str) -> Any:
            raise AssertionError(f"{name} was used")

    library = Library("tensorrt", "10.9", Untouchable())
    with pytest.raises(BackendUnavailableError, match="NVIDIA driver"):
        TensorRTBackend(b"plan", library, precision="fp16", size=SIZE, profile=Profile(1, 1, 1))


def test_the_real_library_refuses_what_it_cannot_open_here() -> None:
    """Only the driver is a stand-in: TensorRT-RTX gives None and a log line, and that becomes the error."""
    pytest.importorskip("tensorrt_rtx", reason="TensorRT-RTX is not installed")
    if cuda_driver()["devices"]:
        pytest.skip("there is a GPU here")
    cuda = FakeCuda()
    with pytest.raises(EngineError, match="does not open the engine") as caught:
        TensorRTBackend(
            b"no plan" * 100, find_library("rtx", gpu=False), precision="fp16", size=SIZE, profile=Profile(1, 1, 1),
            driver=Driver(cuda),
        )  # fmt: skip
    assert "gave no reason" not in str(caught.value)
    assert cuda.empty


def test_a_capture_that_fails_half_way_leaves_the_stream_usable() -> None:
    cuda = FakeCuda()
    driver = Driver(cuda)
    stream, buffer = Stream(driver), Buffer(driver, (2, 3))
    capture = stream.capturing()
    capture.__enter__()
    buffer.to_device(1, stream)
    assert capture.__exit__(ValueError, ValueError("half way"), None) is False
    stream.wait()
    buffer.host[:] = 5
    buffer.to_device(2, stream)
    buffer.host[:] = 0
    buffer.to_host(1, stream)
    assert buffer.host.tolist() == [[5, 5, 5], [0, 0, 0]]
    cuda.failing = {"cuGraphInstantiateWithFlags": 1}
    with pytest.raises(CudaError), stream.capturing():
        buffer.to_device(1, stream)
    for thing in (buffer, stream, driver):
        thing.close()
    assert cuda.empty


def test_a_driver_too_old_says_which_call_it_lacks() -> None:
    driver = Driver(FakeCuda())
    driver._library = object()
    with pytest.raises(CudaError, match="cuGraphLaunch gave a driver too old"):
        driver.call("cuGraphLaunch")


@pytest.mark.gpu
@pytest.mark.slow
@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_an_engine_built_here_agrees_with_the_cpu(tmp_path: Path, precision: str) -> None:
    """Never run yet: no GPU was at hand. Build, parity, passport, ``auto``, on whatever library is installed."""
    if not cuda_driver()["devices"]:
        pytest.skip(f"needs a GPU: {cuda_driver()['problem']}")
    from magsd_export.halving import halve_bundle
    from magsd_runtime.engines.making import make_engine

    path = halve_bundle(tiny_bundle.build(tmp_path / "plain"), tmp_path / "bundle").bundle.path
    built = make_engine(load_bundle(path), precision=precision, profile=Profile(1, 4, 8))
    assert built.passport.proven
    given = np.random.default_rng(0).normal(size=(11, 1, 224, 224)).astype(np.float32)
    with open_backend(load_bundle(path), "auto") as engine, open_backend(load_bundle(path), "cpu") as cpu:
        assert isinstance(engine, CheckedBackend)
        assert (engine.name, engine.precision) == ("tensorrt", precision)
        found, wanted = engine.run(given), cpu.run(given)
        for name in wanted:
            scale = np.abs(wanted[name]).max()
            np.testing.assert_allclose(found[name], wanted[name], atol=scale * (1e-4 if precision == "fp32" else 0.03))

"""What the tests of engines share: a tiny bundle in both precisions, TensorRT-RTX, an engine of another machine."""

from __future__ import annotations

import hashlib
import shutil
from pathlib import Path
from typing import Any

import pytest

import tiny_bundle
from fake_gpu import FakeCuda, FakeEngine
from magsd_export.halving import halve_bundle
from magsd_runtime.backends import open_backend
from magsd_runtime.bundle import Bundle, load_bundle
from magsd_runtime.engines import cuda, making, passport
from magsd_runtime.engines.building import Plan, Profile, build_plan
from magsd_runtime.engines.library import Library, find_library
from magsd_runtime.engines.passport import (
    Machine,
    Passport,
    engine_name,
)
from magsd_runtime.errors import (
    MagsdError,
)

A_GPU = Machine("Linux x86_64", "NVIDIA Test 3060", "8.6", "580.95.05", None)
NO_GPU = Machine("Linux x86_64", None, None, None, "there is no NVIDIA driver")
tensorrt_rtx: Any
try:
    import tensorrt_rtx

    RTX: Library | None = find_library("rtx", gpu=False)
except (ImportError, MagsdError):
    tensorrt_rtx, RTX = None, None
needs_rtx = pytest.mark.skipif(RTX is None, reason="TensorRT-RTX is not installed: pip install 'magsd[tensorrt-rtx]'")


@pytest.fixture(scope="module")
def halved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle with a tiny network in both precisions."""
    folder = tmp_path_factory.mktemp("bundle")
    return halve_bundle(tiny_bundle.build(folder / "plain"), folder / "half").bundle.path


@pytest.fixture
def bundle(halved: Path, tmp_path: Path) -> Bundle:
    shutil.copytree(halved, tmp_path / "bundle")
    return load_bundle(tmp_path / "bundle")


def rtx() -> Library:
    assert RTX is not None
    return RTX


def build(onnx_file: Path, precision: str = "fp32", **options: Any) -> Plan:
    settings: dict[str, Any] = {"profile": Profile(1, 2, 4), "size": 224, "compute_capability": "8.6", **options}
    return build_plan(rtx(), onnx_file, precision=precision, **settings)


@pytest.fixture
def an_engine(bundle: Bundle) -> Passport:
    """A passport and a plan for ``A_GPU`` in ``bundle``; the plan is no engine."""
    content = b"a plan" * 1000
    made = Passport(
        plan=engine_name(A_GPU.gpu, "8.6", "tensorrt", "10.13.3.9", "fp16"), plan_size=len(content),
        plan_sha256=hashlib.sha256(content).hexdigest(), model="tiny 1", model_sha256=bundle.model_sha256,
        onnx="model.fp16.onnx", onnx_sha256=bundle.onnx_file("fp16")[1], precision="fp16",
        layers={"HALF": 95, "FLOAT": 39}, profile="1:8:32", library="tensorrt", library_version="10.13.3.9",
        compute_capability="8.6", system="Linux x86_64", gpu=A_GPU.gpu, driver=A_GPU.driver, workspace=None,
        build_seconds=12.5, created="2026-11-23T12:00:00+00:00", magsd_version="0.1.0",
        parity={"status": "passed"}, warnings=("a warning",),
    )  # fmt: skip
    (bundle.path / "engines").mkdir()
    (bundle.path / "engines" / made.plan).write_bytes(content)
    made.save(bundle.path / "engines")
    return made


@pytest.fixture
def on_the_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """This machine is the one of ``an_engine``, as far as can be asked."""
    monkeypatch.setattr(passport, "this_machine", lambda: A_GPU)
    monkeypatch.setattr(passport, "installed_version", lambda name: {"tensorrt": "10.13.3.9"}.get(name))


class GpuLibrary:
    """TensorRT-RTX as far as building goes, under TensorRT's name, with its timing cache; running is a stand-in."""

    def __init__(self, engine: FakeEngine) -> None:
        self.engine, self.caches = engine, []
        engine.float = tensorrt_rtx.DataType.FLOAT
        engine.input, engine.output = tensorrt_rtx.TensorIOMode.INPUT, tensorrt_rtx.TensorIOMode.OUTPUT
        library = self

        class Config:
            def __init__(self, real: Any) -> None:
                self.real = real

            def __getattr__(self, name: str) -> Any:
                return getattr(self.real, name)

            def create_timing_cache(self, content: bytes) -> Any:
                library.caches.append(content)
                return Cache(content)

            def set_timing_cache(self, cache: Any, ignore_mismatch: bool) -> bool:
                assert ignore_mismatch is False
                return cache.content in (b"", b"timings 1")

        class Cache:
            def __init__(self, content: bytes) -> None:
                self.content = content

            def serialize(self) -> bytes:
                return b"timings 1"

        class Builder:
            def __init__(self, logger: Any) -> None:
                self.real = tensorrt_rtx.Builder(logger)

            def __getattr__(self, name: str) -> Any:
                return getattr(self.real, name)

            def create_builder_config(self) -> Config:
                return Config(self.real.create_builder_config())

            def build_serialized_network(self, network: Any, config: Config) -> Any:
                config.real.num_compute_capabilities = 1
                config.real.set_compute_capability(tensorrt_rtx.ComputeCapability.SM86, 0)
                return self.real.build_serialized_network(network, config.real)

        class Runtime:
            def __init__(self, logger: Any) -> None: ...

            def deserialize_cuda_engine(self, content: bytes) -> FakeEngine:
                assert content[:4] == b"vtrt"
                return engine

        self.Builder, self.Runtime = Builder, Runtime

    def __getattr__(self, name: str) -> Any:
        return getattr(tensorrt_rtx, name)


@pytest.fixture
def gpu(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> GpuLibrary:
    import magsd_runtime.backends.tensorrt_engine as engine_module

    driver = FakeCuda()
    cpu = open_backend(bundle, "cpu")
    library = GpuLibrary(FakeEngine(driver, cpu.run, 224, (1, 4)))
    found = Library("tensorrt", "10.13.3.9", library)
    monkeypatch.setattr(cuda, "_load", lambda: driver)
    monkeypatch.setattr(making, "find_library", lambda *_, **__: found)
    monkeypatch.setattr(engine_module, "find_library", lambda *_, **__: found)
    monkeypatch.setattr(passport, "installed_version", lambda name: "10.13.3.9")
    for module in (making, engine_module, passport):
        monkeypatch.setattr(module, "this_machine", lambda: A_GPU)
    return library

"""``--backend ort-tensorrt`` and ``ort-rtx``: ONNX Runtime's own TensorRT providers, on stand-ins for them.

Neither has run on a GPU (docs/backends.md); what is tested is what is asked for, and that nothing goes on quietly.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

import tiny_bundle
from magsd_runtime import hardware
from magsd_runtime.backends import onnx_runtime, open_backend
from magsd_runtime.bundle import Bundle, load_bundle
from magsd_runtime.errors import BackendUnavailableError, MissingExtraError

RTX = "NvTensorRTRTXExecutionProvider"


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return load_bundle(tiny_bundle.build(tmp_path_factory.mktemp("bundle") / "tiny"))


class Options:
    """Session options that remember what was added."""

    def __init__(self) -> None:
        self.entries: dict[str, str] = {}
        self.devices: list[Any] = []

    def add_session_config_entry(self, key: str, value: str) -> None:
        self.entries[key] = value

    def add_provider_for_devices(self, devices: list[Any], options: dict[str, str]) -> None:
        assert options == {}
        self.devices = devices


class Session:
    """A session; ``loaded`` decides which providers really load."""

    loaded: tuple[str, ...] = ()
    last: Any = None
    error: str | None = None

    def __init__(self, path: str, options: Options, providers: list[Any] | None) -> None:
        if Session.error is not None:
            raise RuntimeError(Session.error)
        Session.last = self
        self.path, self.options, self.providers = path, options, providers
        asked = [RTX] if options.devices else []
        asked += [item if isinstance(item, str) else item[0] for item in providers or []]
        self.used = [name for name in asked if name in Session.loaded] + ["CPUExecutionProvider"]

    def get_providers(self) -> list[str]:
        return self.used

    def get_inputs(self) -> list[Any]:
        return [SimpleNamespace(name="image")]

    def get_outputs(self) -> list[Any]:
        return [SimpleNamespace(name=name) for name in ("logits", "attention", "evidence", "embedding")]


@pytest.fixture
def ort(monkeypatch: pytest.MonkeyPatch) -> Any:
    """onnxruntime with both providers, a plugin package beside it, and a GPU."""
    module: Any = ModuleType("onnxruntime")
    module.__version__ = "9.9"
    module.InferenceSession, module.SessionOptions = Session, Options
    module.set_default_logger_severity = lambda level: None
    module.get_available_providers = lambda: ["TensorrtExecutionProvider", "CUDAExecutionProvider"]
    module.registered = []
    module.register_execution_provider_library = lambda name, path: module.registered.append((name, path))
    module.get_ep_devices = lambda: [SimpleNamespace(ep_name="other"), SimpleNamespace(ep_name=RTX)]
    plugin: Any = ModuleType("onnxruntime_ep_nv_tensorrt_rtx")
    plugin.get_ep_name, plugin.get_library_path = lambda: RTX, lambda: "/lib/rtx.so"
    monkeypatch.setitem(sys.modules, "onnxruntime", module)
    monkeypatch.setitem(sys.modules, "onnxruntime_ep_nv_tensorrt_rtx", plugin)
    monkeypatch.setattr(onnx_runtime, "_registered", set())
    monkeypatch.setattr(Session, "loaded", ("TensorrtExecutionProvider", "CUDAExecutionProvider", RTX))
    monkeypatch.setattr(Session, "error", None)
    monkeypatch.setattr(hardware, "cuda_driver", lambda: {"devices": ["Some GPU"], "problem": None})
    monkeypatch.setenv("NVIDIA_TF32_OVERRIDE", "taken back after the test")
    monkeypatch.delenv("NVIDIA_TF32_OVERRIDE")
    return module


def test_the_tensorrt_provider_is_asked_for_with_its_cache_and_without_tf32(
    bundle: Bundle, ort: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MAGSD_CACHE", str(tmp_path / "cache"))
    backend = open_backend(bundle, "ort-tensorrt")
    assert (backend.name, backend.device, backend.precision) == ("ort-tensorrt", "cuda:0", "fp32")
    (name, options), (fallback, cuda) = Session.last.providers
    assert (name, fallback) == ("TensorrtExecutionProvider", "CUDAExecutionProvider")
    assert options["trt_engine_cache_path"] == str(tmp_path / "cache" / "tensorrt")
    assert (tmp_path / "cache" / "tensorrt").is_dir()
    assert "trt_fp16_enable" not in options
    assert cuda["use_tf32"] == "0"
    assert os.environ["NVIDIA_TF32_OVERRIDE"] == "0"
    monkeypatch.setenv("MAGSD_CACHE", "off")
    open_backend(bundle, "ort-tensorrt")
    assert Session.last.providers[0] == ("TensorrtExecutionProvider", {})


def test_the_rtx_provider_gets_the_first_gpu_that_it_finds(bundle: Bundle, ort: Any) -> None:
    for _ in range(2):  # a library is registered once a process
        backend = open_backend(bundle, "ort-rtx")
        assert (backend.name, backend.device) == ("ort-rtx", "cuda:0")
        assert [device.ep_name for device in Session.last.options.devices] == [RTX]
        assert Session.last.providers is None
    assert ort.registered == [(RTX, "/lib/rtx.so")]


@pytest.mark.parametrize("name", ["ort-tensorrt", "ort-rtx"])
def test_one_that_does_not_load_is_no_quiet_cpu_run(
    bundle: Bundle, ort: Any, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.setattr(Session, "loaded", ("CUDAExecutionProvider",))
    with pytest.raises(BackendUnavailableError, match=f"backend {name}: its .* did not load"):
        open_backend(bundle, name)
    monkeypatch.setattr(Session, "error", "libnvinfer.so.10: the TensorRT library is not there")
    with pytest.raises(BackendUnavailableError, match=r"libnvinfer\.so\.10"):
        open_backend(bundle, name)
    monkeypatch.setattr(hardware, "cuda_driver", lambda: {"devices": [], "problem": "there is no NVIDIA driver"})
    with pytest.raises(BackendUnavailableError, match="there is no NVIDIA driver") as caught:
        open_backend(bundle, name)
    assert caught.value.exit_code == 6


def test_the_rtx_provider_without_its_package_a_new_runtime_or_a_gpu_of_its_kind(
    bundle: Bundle, ort: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    ort.get_ep_devices = list
    with pytest.raises(BackendUnavailableError, match="finds no GPU that it supports"):
        open_backend(bundle, "ort-rtx")
    del ort.register_execution_provider_library
    with pytest.raises(BackendUnavailableError, match=r"ONNX Runtime 9\.9 takes no plugin providers"):
        open_backend(bundle, "ort-rtx")
    monkeypatch.delitem(sys.modules, "onnxruntime_ep_nv_tensorrt_rtx")
    with pytest.raises(MissingExtraError, match="onnxruntime-ep-nv-tensorrt-rtx, which is not installed"):
        open_backend(bundle, "ort-rtx")


def test_with_the_real_onnx_runtime_they_are_refused_here(bundle: Bundle) -> None:
    if hardware.cuda_driver()["devices"]:
        pytest.skip("there is a GPU here")
    for name in ("ort-tensorrt", "ort-rtx"):
        with pytest.raises((BackendUnavailableError, MissingExtraError), match="pip install"):
            open_backend(bundle, name)
    with open_backend(bundle, "auto") as backend:
        assert backend.name == "cpu"

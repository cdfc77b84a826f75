"""``--backend ort-tensorrt`` and ``ort-rtx``: ONNX Runtime's own TensorRT providers, on stand-ins for them.

Neither has run on a GPU (docs/backends.md); what is tested is what is asked for, and that nothing goes on quietly.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest

import tiny_bundle
from magsd.cli import main
from magsd_runtime import hardware
from magsd_runtime.backends import onnx_runtime, open_backend
from magsd_runtime.bundle import Bundle, load_bundle
from magsd_runtime.errors import BackendUnavailableError, MagsdError, MissingExtraError

RTX = "NvTensorRTRTXExecutionProvider"
NO_DRIVER = {
    "devices": [], "details": [], "problem": "there is no NVIDIA driver", "version": None, "cuda_version": None
}  # fmt: skip


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
    """A session; ``loaded`` decides which providers really load, ``placed`` which of them gets which node (None: an
    ONNX Runtime that does not tell)."""

    loaded: tuple[str, ...] = ()
    placed: tuple[tuple[str, str], ...] | None = None
    last: Any = None
    error: str | None = None

    def __init__(self, path: str, options: Options, providers: list[Any] | None, enable_fallback: int = 1) -> None:
        assert enable_fallback == 0  # ONNX Runtime's own: the CPU, where a provider fails
        if Session.error is not None:
            raise RuntimeError(Session.error)
        Session.last = self
        self.path, self.options, self.providers = path, options, providers
        asked = [RTX] if options.devices else []
        asked += [item if isinstance(item, str) else item[0] for item in providers or []]
        self.used = [name for name in asked if name in Session.loaded] + ["CPUExecutionProvider"]

    def get_providers(self) -> list[str]:
        return self.used

    def get_provider_graph_assignment_info(self) -> list[Any]:
        assert self.options.entries["session.record_ep_graph_assignment_info"] == "1"
        if Session.placed is None:
            raise RuntimeError("not told")
        return [
            SimpleNamespace(ep_name=name, get_nodes=lambda kind=kind: [SimpleNamespace(op_type=kind)])
            for name, kind in Session.placed
        ]

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
    monkeypatch.setattr(Session, "placed", None)
    gpu = {"name": "Some GPU", "compute_capability": "8.6", "memory": None}
    monkeypatch.setattr(
        hardware, "cuda_driver", lambda: {**NO_DRIVER, "devices": ["Some GPU"], "details": [gpu], "problem": None}
    )
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
    # it takes the engine of a network with the same names for its own: each network needs a folder
    folder = Path(options["trt_engine_cache_path"])
    assert folder == tmp_path / "cache" / "tensorrt" / f"{bundle.model_sha256[:32]}-9.9"
    assert folder.is_dir()
    assert folder.stat().st_mode & 0o077 == 0
    assert "trt_fp16_enable" not in options
    assert cuda["use_tf32"] == "0"
    assert os.environ["NVIDIA_TF32_OVERRIDE"] == "0"
    monkeypatch.setenv("MAGSD_CACHE", "off")
    open_backend(bundle, "ort-tensorrt")
    assert Session.last.providers[0] == ("TensorrtExecutionProvider", {})


@pytest.mark.skipif(sys.platform == "win32", reason="POSIX permissions")
def test_an_engine_is_not_kept_where_others_may_write(
    bundle: Bundle, ort: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MAGSD_CACHE", str(tmp_path / "cache"))
    open_backend(bundle, "ort-tensorrt")
    (tmp_path / "cache" / "tensorrt").chmod(0o777)
    open_backend(bundle, "ort-tensorrt")
    assert Session.last.providers[0] == ("TensorrtExecutionProvider", {})


def test_the_rtx_provider_gets_the_first_gpu_that_it_finds(bundle: Bundle, ort: Any) -> None:
    for _ in range(2):  # a library is registered once a process
        backend = open_backend(bundle, "ort-rtx")
        assert (backend.name, backend.device) == ("ort-rtx", "cuda:0")
        assert [device.ep_name for device in Session.last.options.devices] == [RTX]
        assert Session.last.providers is None
    assert ort.registered == [(RTX, "/lib/rtx.so")]


@pytest.mark.parametrize("called", ["NvTensorRTRTXExecutionProvider", "nv_tensorrt_rtx"])
def test_the_rtx_provider_is_the_one_that_was_added_whatever_it_calls_itself(
    bundle: Bundle, ort: Any, monkeypatch: pytest.MonkeyPatch, called: str
) -> None:
    monkeypatch.setattr(Session, "get_providers", lambda self: [called, "CPUExecutionProvider"])
    monkeypatch.setattr(Session, "placed", ((called, "Conv"), ("CPUExecutionProvider", "Shape")))
    assert open_backend(bundle, "ort-rtx").name == "ort-rtx"
    monkeypatch.setattr(Session, "get_providers", lambda self: ["CPUExecutionProvider"])
    with pytest.raises(BackendUnavailableError, match="its NvTensorRTRTXExecutionProvider did not load"):
        open_backend(bundle, "ort-rtx")


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
    monkeypatch.setattr(hardware, "cuda_driver", lambda: NO_DRIVER)
    with pytest.raises(BackendUnavailableError, match="there is no NVIDIA driver") as caught:
        open_backend(bundle, name)
    assert caught.value.exit_code == 6


@pytest.mark.parametrize("name", ["cuda", "ort-tensorrt", "ort-rtx"])
def test_one_that_loads_and_leaves_the_network_to_the_cpu_is_refused(
    bundle: Bundle, ort: Any, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    provider, cpu = onnx_runtime.PROVIDERS[name], "CPUExecutionProvider"
    for placed in ([(provider, "Conv")], [(provider, "Conv"), (cpu, "Shape"), (cpu, "Concat")]):
        monkeypatch.setattr(Session, "placed", tuple(placed))
        assert open_backend(bundle, name).name == name
    for placed, words in [
        ([(cpu, "Conv"), (cpu, "MatMul")], f"{provider} took no part of the network"),
        ([], "took no part of the network"),
        (
            [(provider, "Relu"), (cpu, "MatMul"), (cpu, "Conv"), (cpu, "Shape")],
            "would leave Conv and MatMul to the CPU",
        ),
    ]:
        monkeypatch.setattr(Session, "placed", tuple(placed))
        with pytest.raises(BackendUnavailableError, match=words) as caught:
            open_backend(bundle, name)
        assert caught.value.exit_code == 6


def test_the_real_onnx_runtime_does_not_fall_back_to_the_cpu_in_the_middle(
    bundle: Bundle, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its Python layer answers a provider's failure with a session on the CPU, and a line on stdout."""
    from onnxruntime.capi.onnxruntime_pybind11_state import EPFail

    class Failing:
        def __init__(self, real: Any) -> None:
            self.real = real

        def __getattr__(self, name: str) -> Any:
            return getattr(self.real, name)

        def run(self, *arguments: Any) -> Any:
            raise EPFail("the device was lost")

    with open_backend(bundle, "cpu") as backend:
        session = backend._inner._session  # type: ignore[attr-defined]
        monkeypatch.setattr(session, "_sess", Failing(session._sess))
        with pytest.raises(MagsdError, match="the network failed on cpu: the device was lost"):
            backend.run(np.zeros((1, 1, 224, 224), np.float32))
    assert capsys.readouterr().out == ""


def test_the_real_onnx_runtime_tells_where_the_nodes_went(bundle: Bundle) -> None:
    """A session on the CPU is what a GPU's provider must not quietly become."""
    real = onnx_runtime.import_onnxruntime()
    if not hasattr(real.InferenceSession, "get_provider_graph_assignment_info"):
        pytest.skip(f"ONNX Runtime {real.__version__} does not tell")
    options = real.SessionOptions()
    options.add_session_config_entry("session.record_ep_graph_assignment_info", "1")
    session = real.InferenceSession(str(bundle.model_path), options, providers=["CPUExecutionProvider"])
    with pytest.raises(BackendUnavailableError, match="CUDAExecutionProvider took no part of the network"):
        onnx_runtime._require_nodes(session, "cuda", "CUDAExecutionProvider")
    with pytest.raises(BackendUnavailableError, match="would leave Conv"):
        onnx_runtime._require_nodes(session, "cpu", "CPUExecutionProvider")


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


def test_doctor_says_of_each_what_is_in_its_way(
    ort: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["doctor", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)["backends"]
    assert [item["name"] for item in found] == ["cuda", "ort-tensorrt", "ort-rtx"]
    assert all(item["possible"] for item in found)
    assert main(["doctor"]) == 0
    assert "cuda, ort-tensorrt, ort-rtx: nothing known is in its way; opening it shows" in capsys.readouterr().out
    monkeypatch.delitem(sys.modules, "onnxruntime_ep_nv_tensorrt_rtx")
    ort.get_available_providers = lambda: ["CUDAExecutionProvider"]
    assert main(["doctor"]) == 0
    text = capsys.readouterr().out
    assert "ort-tensorrt: ONNX Runtime 9.9 is installed without it" in text
    assert "ort-rtx: --backend ort-rtx needs onnxruntime-ep-nv-tensorrt-rtx, which is not installed" in text
    monkeypatch.setattr(hardware, "cuda_driver", lambda: NO_DRIVER)
    assert main(["doctor"]) == 0
    assert "cuda, ort-tensorrt, ort-rtx: not here, there is no NVIDIA driver" in capsys.readouterr().out


@pytest.mark.gpu
@pytest.mark.slow
@pytest.mark.parametrize("name", ["cuda", "ort-tensorrt", "ort-rtx"])
def test_on_a_gpu_each_that_is_installed_agrees_with_the_cpu(bundle: Bundle, name: str) -> None:
    """Never run yet: no GPU was at hand."""
    if (reason := onnx_runtime.why_not(onnx_runtime.import_onnxruntime(), name)) is not None:
        pytest.skip(str(reason))
    given = np.random.default_rng(0).normal(size=(5, 1, 224, 224)).astype(np.float32)
    with open_backend(bundle, name) as gpu, open_backend(bundle, "cpu") as cpu:
        found, wanted = gpu.run(given), cpu.run(given)
    for output, values in wanted.items():
        np.testing.assert_allclose(found[output], values, atol=1e-4 * np.abs(values).max(), err_msg=output)

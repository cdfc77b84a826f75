"""Backends against a NumPy reference of the tiny network."""

from __future__ import annotations

import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest

import tiny_bundle
from magsd_runtime import hardware
from magsd_runtime.backends import CheckedBackend, choose_backend, open_backend
from magsd_runtime.bundle import Bundle, load_bundle
from magsd_runtime.errors import (
    BackendUnavailableError,
    BundleError,
    MagsdError,
    MissingExtraError,
    UsageError,
)
from magsd_runtime.preprocessing import PreprocessingSpec


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return load_bundle(tiny_bundle.build(tmp_path_factory.mktemp("bundle") / "b"))


def reference(images: np.ndarray, n_classes: int) -> dict[str, np.ndarray]:
    """The tiny network from its description, in float64 loops where it matters."""
    constants = {name: value.astype(np.float64) for name, value in tiny_bundle.weights(n_classes).items()}
    count, _, size, _ = images.shape
    step = size // 7
    both = np.concatenate([np.abs(images), images], axis=1).astype(np.float64)
    blocks = np.zeros((count, 2, 7, 7))
    for y in range(7):
        for x in range(7):
            blocks[:, :, y, x] = both[:, :, y * step : (y + 1) * step, x * step : (x + 1) * step].mean((2, 3))
    attention = np.zeros((count, tiny_bundle.MAPS, 7, 7))
    features = np.zeros((count, tiny_bundle.FEATURES, 7, 7))
    for target, weight, bias in ((attention, "A", "a"), (features, "F", "f")):
        for m in range(target.shape[1]):
            value = sum(constants[weight][m, c, 0, 0] * blocks[:, c] for c in range(2)) + constants[bias][m]
            target[:, m] = np.maximum(value, 0)
    evidence = np.zeros((count, n_classes, tiny_bundle.MAPS))
    for m in range(tiny_bundle.MAPS):
        part = (attention[:, m, None] * features).mean((2, 3))
        evidence[:, :, m] = part @ constants["W"][:, m].T
    return {
        "logits": evidence.sum(-1),
        "attention": attention,
        "evidence": evidence,
        "embedding": features.mean((2, 3)),
    }


@pytest.mark.parametrize("count", [1, 3])
def test_outputs_equal_the_reference_and_are_the_callers(bundle: Bundle, count: int) -> None:
    rng = np.random.default_rng(1)
    first = rng.normal(size=(count, 1, 224, 224)).astype(np.float32)
    with open_backend(bundle, "cpu") as backend:
        assert (backend.name, backend.device, backend.precision) == ("cpu", "cpu", "fp32")
        outputs = backend.run(first)
        kept = {name: array.copy() for name, array in outputs.items()}
        backend.run(-first)
        for name, expected in reference(first, 3).items():
            np.testing.assert_allclose(outputs[name], expected, atol=1e-4, err_msg=name)
            np.testing.assert_array_equal(outputs[name], kept[name])
            outputs[name][:] = 0  # writable, and the next run does not mind
        np.testing.assert_array_equal(backend.run(first)["logits"], kept["logits"])
        np.testing.assert_allclose(kept["logits"], kept["evidence"].sum(-1), atol=1e-5)


@pytest.mark.parametrize("threads", [1, 2])
def test_the_number_of_threads_does_not_change_the_result(bundle: Bundle, threads: int) -> None:
    image = np.random.default_rng(2).normal(size=(1, 1, 224, 224)).astype(np.float32)
    with open_backend(bundle, "cpu") as one, open_backend(bundle, "cpu", threads=threads) as other:
        np.testing.assert_allclose(one.run(image)["logits"], other.run(image)["logits"], atol=1e-5)


@pytest.mark.parametrize(
    "images",
    [
        np.zeros((1, 224, 224), np.float32),
        np.zeros((1, 1, 224, 223), np.float32),
        np.zeros((1, 3, 224, 224), np.float32),
        np.zeros((0, 1, 224, 224), np.float32),
        np.zeros((1, 1, 224, 224), np.float64),
        np.zeros((1, 1, 224, 224), np.uint8),
    ],
)
def test_images_of_another_shape_or_type_are_refused(bundle: Bundle, images: np.ndarray) -> None:
    with open_backend(bundle, "cpu") as backend, pytest.raises(ValueError, match="expected float32"):
        backend.run(images)


def test_images_need_not_be_contiguous(bundle: Bundle) -> None:
    images = np.random.default_rng(3).normal(size=(2, 1, 224, 448)).astype(np.float32)[::-1, :, :, ::2]
    with open_backend(bundle, "cpu") as backend:
        np.testing.assert_allclose(backend.run(images)["logits"], reference(images, 3)["logits"], atol=1e-4)


class Faulty:
    name, device, precision = "cpu", "cpu", "fp32"

    def __init__(self, **changes: Any) -> None:
        self.changes = changes

    def run(self, images: np.ndarray) -> dict[str, Any]:
        shapes = {"logits": (1, 3), "attention": (1, 4, 7, 7), "evidence": (1, 3, 4), "embedding": (1, 6)}
        outputs = {name: np.zeros(shape, np.float32) for name, shape in shapes.items()}
        outputs.update(self.changes)
        return {name: array for name, array in outputs.items() if array is not None}

    def close(self) -> None: ...


@pytest.mark.parametrize(
    "changes",
    [
        {"logits": None},
        {"more": np.zeros(1, np.float32)},
        {"logits": np.zeros((1, 2), np.float32)},
        {"logits": np.zeros((1, 3), np.float16)},
        {"attention": np.zeros((4, 7, 7), np.float32)},
        {"attention": np.zeros((1, 0, 7, 7), np.float32)},
        {"evidence": np.zeros((1, 3, 5), np.float32)},
        {"embedding": np.zeros((2, 6), np.float32)},
    ],
)
def test_outputs_that_break_the_contract_are_caught_for_every_backend(bundle: Bundle, changes: dict[str, Any]) -> None:
    image = np.zeros((1, 1, 224, 224), np.float32)
    CheckedBackend(Faulty(), bundle, "test").run(image)
    with pytest.raises(MagsdError, match="the network"):
        CheckedBackend(Faulty(**changes), bundle, "test").run(image)


def test_a_closed_backend_says_so(bundle: Bundle) -> None:
    backend = open_backend(bundle, "cpu")
    backend.close()
    with pytest.raises(MagsdError, match="was closed"):
        backend.run(np.zeros((1, 1, 224, 224), np.float32))


def test_wrong_names_and_threads_are_usage_errors(bundle: Bundle) -> None:
    with pytest.raises(UsageError, match="expected one of auto, cpu, cpu-int8, cuda"):
        open_backend(bundle, "tpu")
    with pytest.raises(UsageError, match="threads is 0"):
        open_backend(bundle, "cpu", threads=0)


def test_a_model_that_is_none_or_another_is_a_bundle_error(bundle: Bundle, tmp_path: Path) -> None:
    import onnx
    from onnx import TensorProto, helper

    broken = tiny_bundle.build(tmp_path / "b")
    (broken / "model.onnx").write_bytes(b"no model")
    tiny_bundle.write_manifest(
        broken, tiny_bundle.CLASSES, PreprocessingSpec(), 1.0, {"map": "attention", "threshold": 0.5}
    )
    with pytest.raises(BundleError, match="cannot load it"):
        open_backend(load_bundle(broken), "cpu")
    graph = helper.make_graph(
        [helper.make_node("Relu", ["x"], ["y"])],
        "other",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [1])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [1])],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=8)
    onnx.save(model, str(broken / "model.onnx"))
    tiny_bundle.write_manifest(
        broken, tiny_bundle.CLASSES, PreprocessingSpec(), 1.0, {"map": "attention", "threshold": 0.5}
    )
    with pytest.raises(BundleError, match=r"has inputs \['x'\]"):
        open_backend(load_bundle(broken), "cpu")


# --- the choice, with a stand-in for ONNX Runtime with CUDA -------------------------------------------


class FakeSession:
    """Stands in for a session; the provider list says what really loaded."""

    loaded: list[str]
    options: Any

    def __init__(self, path: str, options: Any, providers: list[Any], **settings: Any) -> None:
        wanted = [provider if isinstance(provider, str) else provider[0] for provider in providers]
        FakeSession.options = options
        self._providers = [name for name in wanted if name in FakeSession.loaded] or ["CPUExecutionProvider"]

    def get_providers(self) -> list[str]:
        return self._providers

    def get_inputs(self) -> list[Any]:
        return [SimpleNamespace(name="image")]

    def get_outputs(self) -> list[Any]:
        return [SimpleNamespace(name=name) for name in ("logits", "attention", "evidence", "embedding")]


@pytest.fixture
def fake_ort(monkeypatch: pytest.MonkeyPatch) -> Any:
    """onnxruntime as its GPU package looks; ``FakeSession.loaded`` decides whether CUDA loads."""
    ort: Any = ModuleType("onnxruntime")
    ort.__version__ = "9.9"
    ort.InferenceSession = FakeSession
    ort.get_available_providers = lambda: ["CUDAExecutionProvider", "CPUExecutionProvider"]
    ort.set_default_logger_severity = lambda level: None

    class SessionOptions:
        def __init__(self) -> None:
            self.entries: dict[str, str] = {}

        def add_session_config_entry(self, key: str, value: str) -> None:
            self.entries[key] = value

    ort.SessionOptions = SessionOptions

    def preload() -> None:
        print("Failed to load libcudnn.so.9")  # as the real one does, on stdout
        raise RuntimeError("no directory")

    ort.preload_dlls = preload
    monkeypatch.setitem(sys.modules, "onnxruntime", ort)
    FakeSession.loaded = ["CUDAExecutionProvider", "CPUExecutionProvider"]
    return ort


def driver(*names: str, problem: str | None = None) -> dict[str, Any]:
    return {"version": None, "cuda_version": None, "devices": list(names), "details": [], "problem": problem}


def test_auto_takes_cuda_where_provider_and_gpu_are(
    bundle: Bundle, fake_ort: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(hardware, "cuda_driver", lambda: driver("Some GPU"))
    assert choose_backend().name == "cuda"
    backend = open_backend(bundle, "auto", threads=3)
    assert (backend.name, backend.device) == ("cuda", "cuda:0")
    assert "Some GPU" in backend.reason
    assert FakeSession.options.entries["session.intra_op.allow_spinning"] == "0"
    assert FakeSession.options.intra_op_num_threads == 3
    assert capsys.readouterr().out == ""


def test_auto_without_gpu_takes_the_cpu_and_says_why(
    bundle: Bundle, fake_ort: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hardware, "cuda_driver", lambda: driver(problem="the NVIDIA driver finds no GPU"))
    backend = open_backend(bundle)
    assert backend.name == "cpu"
    assert "finds no GPU" in backend.reason


def test_a_cuda_provider_that_does_not_load_is_refused_by_name_and_left_by_auto(
    bundle: Bundle, fake_ort: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """ONNX Runtime itself goes on with the CPU and no more than a log line."""
    monkeypatch.setattr(hardware, "cuda_driver", lambda: driver("Some GPU"))
    FakeSession.loaded = ["CPUExecutionProvider"]
    with pytest.raises(BackendUnavailableError, match="did not load") as caught:
        open_backend(bundle, "cuda")
    assert caught.value.exit_code == 6
    backend = open_backend(bundle, "auto")
    assert backend.name == "cpu"
    assert "did not load" in backend.reason


def test_cuda_by_name_without_its_provider_names_the_install_command(bundle: Bundle) -> None:
    import onnxruntime

    if "CUDAExecutionProvider" in onnxruntime.get_available_providers():
        pytest.skip("this ONNX Runtime has CUDA")
    with pytest.raises(BackendUnavailableError, match=r"pip install 'magsd\[gpu\]'"):
        open_backend(bundle, "cuda")
    assert open_backend(bundle, "auto").name == "cpu"


def test_without_onnx_runtime_the_extra_is_named(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(MissingExtraError, match=r"pip install 'magsd\[cpu\]'"):
        open_backend(bundle, "cpu")


def test_a_half_removed_onnx_runtime_is_no_traceback(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "onnxruntime", ModuleType("onnxruntime"))
    with pytest.raises(MissingExtraError, match="installed incompletely"):
        open_backend(bundle, "cpu")

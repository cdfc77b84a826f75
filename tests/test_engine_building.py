"""Engines built for real by TensorRT-RTX on this CPU, and every way in which none can be."""

from __future__ import annotations

import hashlib
import importlib
import sys
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from types import ModuleType
from typing import Any

import onnx
import pytest
from onnx import TensorProto, helper

import tiny_bundle
from engine_trial import A_GPU, NO_GPU, build, bundle, halved, needs_rtx, rtx, tensorrt_rtx
from magsd.cli import main
from magsd_export.precision import write_half
from magsd_runtime.bundle import Bundle, load_bundle
from magsd_runtime.engines import making
from magsd_runtime.engines.building import Profile
from magsd_runtime.engines.library import Library, Messages, find_library, installed_version, version_numbers
from magsd_runtime.engines.making import make_engine
from magsd_runtime.engines.passport import (
    read_passport,
)
from magsd_runtime.errors import (
    BackendUnavailableError,
    EngineBuildError,
    MagsdError,
    MissingExtraError,
    UsageError,
)

__all__ = ["bundle", "halved"]  # fixtures


SHIPPED = Path(__file__).resolve().parents[1] / "runtime" / "magsd_runtime" / "shipped" / "covid-cxr"


@needs_rtx
@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_an_engine_and_its_passport(bundle: Bundle, precision: str, capfd: pytest.CaptureFixture[str]) -> None:
    built = make_engine(
        bundle, precision=precision, profile=Profile(1, 4, 16), library="rtx", compute_capability="8.6",
        workspace=64 << 20,
    )  # fmt: skip
    assert built.path == bundle.path / "engines" / f"any-sm86-rtx{rtx().version}-{precision}.engine"
    assert sorted(path.name for path in built.path.parent.iterdir()) == [built.path.name, f"{built.path.stem}.json"]
    content = built.path.read_bytes()
    found = read_passport(built.path.with_suffix(".json"))
    assert found == built.passport
    assert found.plan_sha256 == hashlib.sha256(content).hexdigest()
    assert found.plan_size == len(content)
    assert (found.library, found.library_version) == ("tensorrt_rtx", tensorrt_rtx.__version__)
    onnx_file = bundle.path / found.onnx
    assert found.onnx_sha256 == hashlib.sha256(onnx_file.read_bytes()).hexdigest()
    assert found.onnx == {"fp32": "model.onnx", "fp16": "model.fp16.onnx"}[precision]
    assert found.model_sha256 == bundle.model_sha256
    assert (found.profile, found.precision, found.workspace) == ("1:4:16", precision, 64 << 20)
    assert ("HALF" in found.layers) == (precision == "fp16")
    assert "FLOAT" in found.layers
    assert found.compute_capability == "8.6"
    assert (found.gpu, found.driver) == (None, None)
    assert found.build_seconds > 0
    assert found.parity["status"] == "not measured"
    assert not found.proven
    captured = capfd.readouterr()
    assert captured.out == captured.err == ""
    # the bundle itself is as it was
    assert load_bundle(bundle.path).manifest == bundle.manifest


@needs_rtx
def test_the_shipped_network_in_both_precisions(tmp_path: Path) -> None:
    """EfficientNet-lite0 MA-Net: parsed, types, dynamic batch, and half the size."""
    write_half(SHIPPED / "model.onnx", tmp_path / "half.onnx")
    profile = Profile(1, 8, 32)
    full = build(SHIPPED / "model.onnx", "fp32", profile=profile)
    half = build(tmp_path / "half.onnx", "fp16", profile=profile)
    assert set(full.layers) <= {"FLOAT", "INT64"}
    assert half.layers["HALF"] > 80  # 48 convolutions of the trunk, their activations and sums
    assert half.layers["FLOAT"] < half.layers["HALF"]
    assert len(half.content) <= 0.6 * len(full.content)


@needs_rtx
@pytest.mark.slow
def test_a_resnet50_network_in_both_precisions(tmp_path: Path) -> None:
    """The paper's backbone with random weights, from torch to the plan."""
    import torch

    from magsd.models import MANet
    from magsd_export.to_onnx import export_onnx
    from magsd_runtime.preprocessing import PreprocessingSpec

    torch.manual_seed(0)
    model = MANet("resnet50", num_classes=3).eval()
    export_onnx(model, PreprocessingSpec(), tmp_path / "model.onnx", {})
    write_half(tmp_path / "model.onnx", tmp_path / "half.onnx")
    profile = Profile(1, 8, 32)
    full = build(tmp_path / "model.onnx", "fp32", profile=profile)
    half = build(tmp_path / "half.onnx", "fp16", profile=profile)
    assert set(full.layers) <= {"FLOAT", "INT64"}
    assert half.layers["HALF"] > 100  # 53 convolutions, rectifiers and sums
    assert len(half.content) <= 0.6 * len(full.content)
    assert len(full.content) > 90e6


@needs_rtx
@pytest.mark.parametrize("capability", ["8.0", "8.9", "12.0"])
def test_other_gpus_can_be_named(bundle: Bundle, capability: str) -> None:
    built = make_engine(bundle, library="rtx", compute_capability=capability)
    assert built.passport.compute_capability == capability
    assert f"-sm{capability.replace('.', '')}-" in built.path.name


@needs_rtx
@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_what_a_gpu_cannot_do_is_said(bundle: Bundle, precision: str) -> None:
    """TensorRT-RTX multiplies no float32 matrices on Turing, and pooling is one: for those, TensorRT."""
    with pytest.raises(EngineBuildError, match=r"cannot build an engine of it .*Turing \(SM75\): FP32 GEMM"):
        make_engine(bundle, precision=precision, library="rtx", compute_capability="7.5")
    assert not (bundle.path / "engines").exists()


@needs_rtx
def test_the_library_is_found_where_it_is_installed() -> None:
    assert installed_version("tensorrt_rtx") == tensorrt_rtx.__version__
    if installed_version("tensorrt") is None:
        assert find_library("auto", gpu=True).is_rtx


@needs_rtx
def test_a_library_that_was_only_unpacked_is_asked_for_its_version(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where there is no network, TensorRT comes as a folder without a package's facts."""
    asked: list[str] = []

    def nothing(name: str) -> str:
        asked.append(name)
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(metadata, "version", nothing)
    assert installed_version("tensorrt_rtx") == tensorrt_rtx.__version__
    assert "tensorrt-rtx" in asked
    monkeypatch.setitem(sys.modules, "tensorrt_rtx", None)  # as if it were not there
    assert installed_version("tensorrt_rtx") is None
    assert installed_version("another") is None


# What cannot be built.


@needs_rtx
def test_without_a_profile_nothing_is_built_and_the_reason_is_given(bundle: Bundle) -> None:
    with pytest.raises(EngineBuildError, match="no optimization profile") as caught:
        build(bundle.model_path, profile=None)
    assert caught.value.exit_code == 4
    assert any(line.startswith("ERROR: ") for line in caught.value.log)
    assert "\n" not in str(caught.value)


@needs_rtx
@pytest.mark.parametrize("kept", [0, 100, 0.5, 0.99])
def test_a_damaged_onnx_file_cannot_be_parsed(bundle: Bundle, tmp_path: Path, kept: float) -> None:
    content = bundle.model_path.read_bytes()
    size = int(kept * len(content)) if isinstance(kept, float) else kept
    (tmp_path / "damaged.onnx").write_bytes(content[:size])
    with pytest.raises(EngineBuildError, match=r"damaged\.onnx") as caught:
        build(tmp_path / "damaged.onnx")
    assert "gave no reason" not in str(caught.value)


@needs_rtx
def test_a_damaged_onnx_file_in_a_bundle_is_refused_before_that(
    bundle: Bundle, capfd: pytest.CaptureFixture[str]
) -> None:
    content = bytearray((bundle.path / "model.fp16.onnx").read_bytes())
    content[-9] ^= 4
    (bundle.path / "model.fp16.onnx").write_bytes(bytes(content))
    assert main(["engine", str(bundle.path), "--compute-capability", "8.6"]) == 4
    assert "model.fp16.onnx: was altered" in capfd.readouterr().err
    assert not (bundle.path / "engines").exists()


def changed(source: Path, target: Path, change: Callable[[onnx.ModelProto], object]) -> Path:
    model = onnx.load(source)
    change(model)
    onnx.save(model, str(target))
    return target


def antialias(model: onnx.ModelProto) -> None:
    """What an antialiased resize becomes in ONNX; in front of everything."""
    scales = helper.make_tensor("scales", TensorProto.FLOAT, [4], [1.0, 1.0, 1.0, 1.0])
    model.graph.initializer.append(scales)
    for node in model.graph.node:
        for index, name in enumerate(node.input):
            if name == "image":
                node.input[index] = "resized"
    resize = helper.make_node("Resize", ["image", "", "scales"], ["resized"], antialias=1, mode="linear")
    model.graph.node.insert(0, resize)


def unknown_operator(model: onnx.ModelProto) -> None:
    next(node for node in model.graph.node if "attention" in node.output).op_type = "Enchant"


@needs_rtx
@pytest.mark.parametrize(("change", "name"), [(antialias, "[Aa]ntialias"), (unknown_operator, "Enchant")])
def test_an_operator_that_it_does_not_know_is_named(
    bundle: Bundle, tmp_path: Path, change: Callable[[onnx.ModelProto], object], name: str
) -> None:
    path = changed(bundle.model_path, tmp_path / "odd.onnx", change)
    with pytest.raises(EngineBuildError, match=f"cannot parse it .*{name}"):
        build(path)


@needs_rtx
def test_half_precision_that_is_not_there_is_an_error_and_so_is_one_not_asked_for(bundle: Bundle) -> None:
    with pytest.raises(EngineBuildError, match=r"fp16 was asked for, and no layer is in half precision \(\d+ FLOAT"):
        build(bundle.model_path, "fp16")
    with pytest.raises(EngineBuildError, match="fp32 was asked for, and layers are in half precision"):
        build(bundle.path / "model.fp16.onnx", "fp32")


@needs_rtx
def test_a_network_with_other_inputs_or_outputs_is_refused(bundle: Bundle, tmp_path: Path) -> None:
    def renamed(model: onnx.ModelProto) -> None:
        model.graph.output[0].name = "scores"
        node = next(node for node in model.graph.node if "logits" in node.output)
        node.output[0] = "scores"

    with pytest.raises(EngineBuildError, match=r"expected .*export the bundle again"):
        build(changed(bundle.model_path, tmp_path / "renamed.onnx", renamed))
    with pytest.raises(EngineBuildError, match=r"expected .*\(-1, 1, 160, 160\)"):
        build(bundle.model_path, size=160)

    def fixed(model: onnx.ModelProto) -> None:
        model.graph.input[0].type.tensor_type.shape.dim[0].dim_value = 4

    with pytest.raises(EngineBuildError, match="expected"):
        build(changed(bundle.model_path, tmp_path / "fixed.onnx", fixed))


@pytest.mark.parametrize("text", ["", "8", "1:8", "1:2:3:4", "a:b:c", "0:1:2", "4:2:8", "1:9:8", "1:8:9999", "1:-2:3"])
def test_batch_sizes_that_are_none(text: str) -> None:
    with pytest.raises(UsageError, match="--batch is"):
        Profile.parse(text)


def test_batch_sizes_read_as_they_are_written() -> None:
    assert Profile.parse("1:8:32") == Profile(1, 8, 32)
    assert str(Profile(2, 2, 2)) == "2:2:2"


@needs_rtx
@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"compute_capability": "9.0"}, UsageError, r"is 9\.0: .* builds for 7\.5, .*8\.6"),
        ({"compute_capability": "86"}, UsageError, "expected major.minor"),
        ({"compute_capability": None}, UsageError, "name the GPU that will run the engine by --compute-capability"),
        ({"precision": "int8"}, UsageError, "--precision is 'int8'"),
        ({"workspace": 1000}, UsageError, "expected a MiB or more"),
        ({"library": "lite"}, UsageError, "--trt is 'lite'"),
    ],
)
def test_arguments_that_cannot_be(
    bundle: Bundle, monkeypatch: pytest.MonkeyPatch, options: dict[str, Any], error: type[MagsdError], message: str
) -> None:
    monkeypatch.setattr(making, "this_machine", lambda: NO_GPU)
    with pytest.raises(error, match=message):
        make_engine(bundle, **{"library": "rtx", "compute_capability": "8.6", **options})
    assert not (bundle.path / "engines").exists()


@needs_rtx
def test_a_folder_that_cannot_be_written_is_said(bundle: Bundle) -> None:
    (bundle.path / "engines").write_text("in the way")
    with pytest.raises(UsageError, match="an engine cannot be written there"):
        make_engine(bundle, library="rtx", compute_capability="8.6")


def test_a_bundle_without_half_precision_names_the_command(tmp_path: Path) -> None:
    plain = load_bundle(tiny_bundle.build(tmp_path / "plain"))
    with pytest.raises(MagsdError, match=r"no network in fp16: magsd export .* --precision fp16") as caught:
        make_engine(plain, precision="fp16")
    assert caught.value.exit_code == 4


# Which library.


def installed(monkeypatch: pytest.MonkeyPatch, **modules: Any) -> None:
    """Only these are installed: a version, or the exception of an import."""
    real = importlib.import_module

    def fake(name: str, package: str | None = None) -> Any:
        if name not in ("tensorrt", "tensorrt_rtx"):
            return real(name, package)
        found = modules.get(name)
        if found is None:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
        if isinstance(found, Exception):
            raise found
        module: Any = ModuleType(name)
        module.__version__, module.Builder = found, object
        return module

    monkeypatch.setattr(importlib, "import_module", fake)


def test_auto_takes_tensorrt_on_a_gpu_and_rtx_without(monkeypatch: pytest.MonkeyPatch) -> None:
    installed(monkeypatch, tensorrt="10.3.0", tensorrt_rtx="1.7.1.116")
    assert find_library("auto", gpu=True).title == "TensorRT 10.3.0"
    assert find_library("auto", gpu=False).title == "TensorRT-RTX 1.7.1.116"
    assert find_library("rtx", gpu=True).is_rtx
    installed(monkeypatch, tensorrt_rtx="1.7.1.116")
    assert find_library("auto", gpu=True).is_rtx
    installed(monkeypatch, tensorrt="11.4.0.106")
    assert not find_library("auto", gpu=False).is_rtx


def test_without_any_both_extras_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    installed(monkeypatch)
    with pytest.raises(MissingExtraError, match=r"magsd\[tensorrt\].*magsd\[tensorrt-rtx\].*JetPack"):
        find_library(gpu=False)
    with pytest.raises(MissingExtraError, match=r"pip install 'magsd\[tensorrt\]'.*JetPack"):
        find_library("tensorrt", gpu=True)
    with pytest.raises(MissingExtraError, match=r"TensorRT-RTX is not installed: pip install 'magsd\[tensorrt-rtx\]'$"):
        find_library("rtx", gpu=True)


@pytest.mark.parametrize(
    ("found", "message"),
    [
        ("8.6.1", r"TensorRT 8\.6\.1 is installed, and 10\.3 or newer, below 12"),
        ("10.2.0", "10.3 or newer"),
        ("12.0.0", "below 12"),
        ("", "installed incompletely"),
        (ImportError("libnvonnxparser.so.11: cannot open shared object file"), "cannot be loaded .*libnvonnxparser"),
        (ModuleNotFoundError("No module named 'tensorrt_bindings'", name="tensorrt_bindings"), "incompletely"),
    ],
)
def test_a_library_that_cannot_be_used_says_why(monkeypatch: pytest.MonkeyPatch, found: Any, message: str) -> None:
    installed(monkeypatch, tensorrt=found)
    for choice in ("tensorrt", "auto"):
        with pytest.raises(BackendUnavailableError, match=message):
            find_library(choice, gpu=True)
    installed(monkeypatch, tensorrt=found, tensorrt_rtx="1.7.1.116")
    assert find_library("auto", gpu=True).is_rtx


def test_versions_are_compared_as_numbers() -> None:
    assert version_numbers("10.13.0.35") == (10, 13, 0, 35)
    assert version_numbers("10.3.0.post1") == (10, 3, 0)
    assert version_numbers("dev") == ()


def test_tensorrt_without_its_gpu_says_what_builds_without(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    installed(monkeypatch, tensorrt="10.16.1.11")
    monkeypatch.setattr(making, "this_machine", lambda: NO_GPU)
    with pytest.raises(BackendUnavailableError, match=r"builds only on the GPU .*no NVIDIA driver.*tensorrt-rtx"):
        make_engine(bundle)
    monkeypatch.setattr(making, "this_machine", lambda: A_GPU)
    with pytest.raises(UsageError, match=r"builds for the GPU that is here, NVIDIA Test 3060 \(8\.6\)"):
        make_engine(bundle, compute_capability="8.9")


def test_messages_keep_their_order_and_the_first_error() -> None:
    class Logger: ...

    said = Messages(Library("tensorrt", "10.3", type("module", (), {"ILogger": Logger})))
    assert said.first_error() == "the library gave no reason"
    for severity, text in (("VERBOSE", "a"), ("WARNING", "b\n  c"), ("ERROR", "first"), ("INTERNAL_ERROR", "second")):
        said.logger.log(f"Severity.{severity}", text)
    said.logger.log("Severity.WARNING", "b c")
    assert said.first_error() == "first"
    assert said.lines() == ("WARNING: b c", "ERROR: first", "INTERNAL_ERROR: second", "WARNING: b c")
    assert said.lines(verbose=True)[0] == "VERBOSE: a"
    assert said.warnings() == ("b c",)

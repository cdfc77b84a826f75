"""Engines: built for real by TensorRT-RTX on this CPU, their passports, and every way to be refused.

What runs an engine is tested in test_tensorrt_backend.py.
"""

from __future__ import annotations

import hashlib
import importlib
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

import tiny_bundle
from fake_gpu import FakeCuda, FakeEngine
from magsd.cli import main
from magsd_export.halving import halve_bundle
from magsd_export.precision import write_half
from magsd_runtime.backends import open_backend
from magsd_runtime.bundle import Bundle, load_bundle
from magsd_runtime.doctor import examine, format_report
from magsd_runtime.engines import cuda, making, passport
from magsd_runtime.engines.building import Plan, Profile, build_plan
from magsd_runtime.engines.library import Library, Messages, find_library, installed_version, version_numbers
from magsd_runtime.engines.making import make_engine, measure_parity
from magsd_runtime.engines.passport import (
    Machine,
    Passport,
    check_engine,
    engine_name,
    read_passport,
    read_passports,
    this_machine,
)
from magsd_runtime.errors import (
    BackendUnavailableError,
    EngineBuildError,
    EngineError,
    EngineMismatchError,
    MagsdError,
    MissingExtraError,
    UsageError,
    VerificationError,
)
from magsd_runtime.hardware import cuda_driver

SHIPPED = Path(__file__).resolve().parents[1] / "runtime" / "magsd_runtime" / "shipped" / "covid-cxr"
A_GPU = Machine("Linux x86_64", "NVIDIA Test 3060", "8.6", "580.95.05", None)
NO_GPU = Machine("Linux x86_64", None, None, None, "there is no NVIDIA driver")
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


# Building, for real.


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


# The passport.


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


def test_the_name_says_which_gpu_library_and_precision() -> None:
    name = engine_name("NVIDIA GeForce RTX 3060", "8.6", "tensorrt", "10.13.3.9", "fp16")
    assert name == "nvidia-geforce-rtx-3060-sm86-trt10.13.3.9-fp16.engine"
    assert engine_name(None, "12.0", "tensorrt_rtx", "1.7.1", "fp32") == "any-sm120-rtx1.7.1-fp32.engine"
    assert engine_name("../../x", "8.6", "tensorrt", "10.3", "fp16") == "x-sm86-trt10.3-fp16.engine"


@pytest.mark.usefixtures("on_the_gpu")
def test_where_everything_fits_the_plan_may_be_opened(bundle: Bundle, an_engine: Passport) -> None:
    assert read_passports(bundle.path / "engines") == ((an_engine,), ())
    assert check_engine(bundle, an_engine) == bundle.path / "engines" / an_engine.plan
    # one that was built without a GPU names none, and no driver
    check_engine(bundle, replace(an_engine, gpu=None, driver=None))


@pytest.mark.usefixtures("on_the_gpu")
@pytest.mark.parametrize(
    ("here", "message"),
    [
        (replace(A_GPU, gpu="NVIDIA Test 3080"), "the GPU is NVIDIA Test 3080, it was built for NVIDIA Test 3060"),
        (replace(A_GPU, compute_capability="8.9"), r"compute capability is 8\.9, it was built for 8\.6"),
        (replace(A_GPU, driver="590.10"), r"the driver is 590\.10, it was built for 580\.95\.05"),
        (replace(A_GPU, system="Linux aarch64"), "the platform is Linux aarch64, it was built for Linux x86_64"),
        (
            replace(A_GPU, gpu="NVIDIA L4", compute_capability="8.9", driver="1"),
            "8.9, .*; the GPU is NVIDIA L4.*; the dr",
        ),
    ],
)
def test_an_engine_of_another_machine_names_the_difference_and_the_command(
    bundle: Bundle, an_engine: Passport, here: Machine, message: str
) -> None:
    with pytest.raises(EngineMismatchError, match=message) as caught:
        check_engine(bundle, an_engine, here)
    assert caught.value.exit_code == 4
    assert f"build it again: magsd engine {bundle.path} --precision fp16 --batch 1:8:32 --trt tensorrt" in str(
        caught.value
    )
    assert "\n" not in str(caught.value)


@pytest.mark.usefixtures("on_the_gpu")
def test_another_version_of_the_library_is_a_mismatch_and_none_an_extra(
    bundle: Bundle, an_engine: Passport, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(passport, "installed_version", lambda name: "10.16.1.11")
    with pytest.raises(EngineMismatchError, match=r"TensorRT 10\.16\.1\.11 is here, it was built with 10\.13\.3\.9"):
        check_engine(bundle, an_engine)
    monkeypatch.setattr(passport, "installed_version", lambda name: None)
    with pytest.raises(MissingExtraError, match=r"needs TensorRT 10\.13\.3\.9, which is not installed"):
        check_engine(bundle, an_engine)


@pytest.mark.usefixtures("on_the_gpu")
def test_without_a_driver_nothing_else_is_asked(bundle: Bundle, an_engine: Passport) -> None:
    with pytest.raises(BackendUnavailableError, match="cannot run here, there is no NVIDIA driver") as caught:
        check_engine(bundle, an_engine, NO_GPU)
    assert caught.value.exit_code == 6


@pytest.mark.usefixtures("on_the_gpu")
@pytest.mark.parametrize("damage", ["byte", "cut", "gone"])
def test_a_damaged_plan_is_found_by_its_hash(bundle: Bundle, an_engine: Passport, damage: str) -> None:
    path = bundle.path / "engines" / an_engine.plan
    content = bytearray(path.read_bytes())
    if damage == "byte":
        content[3000] ^= 1
        path.write_bytes(bytes(content))
    elif damage == "cut":
        path.write_bytes(bytes(content[:-1]))
    else:
        path.unlink()
    with pytest.raises(EngineError, match=r"is damaged|cannot be read .*: build it again: magsd engine"):
        check_engine(bundle, an_engine)


@pytest.mark.usefixtures("on_the_gpu")
def test_an_engine_of_another_network_is_stale(bundle: Bundle, an_engine: Passport) -> None:
    for other in (replace(an_engine, onnx_sha256="0" * 64), replace(an_engine, model_sha256="0" * 64)):
        with pytest.raises(EngineError, match=r"built from another network than the bundle's model\.fp16\.onnx"):
            check_engine(bundle, other)


def test_every_changed_byte_of_a_passport_is_found(bundle: Bundle, an_engine: Passport) -> None:
    path = bundle.path / "engines" / f"{an_engine.plan.removesuffix('.engine')}.json"
    content = path.read_bytes()
    assert read_passport(path) == an_engine
    for position in range(0, len(content), 7):
        spoilt = bytearray(content)
        spoilt[position] ^= 1
        path.write_bytes(bytes(spoilt))
        if content[position : position + 1].isspace():  # may be no change at all to JSON
            continue
        with pytest.raises(EngineError, match=re.escape(str(path))):
            read_passport(path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"schema": "magsd.engine/2"}, "schema is 'magsd.engine/2'"),
        ({"plan": "../../etc/passwd.engine"}, "expected the name of an .engine file"),
        ({"plan": "bundle.json"}, "expected the name of an .engine file"),
        ({"library": "onnx"}, "library is 'onnx'"),
        ({"plan_sha256": "12"}, "plan_sha256"),
        ({"plan_size": "1"}, "plan_size is a str"),
        ({"gpu": 7}, "gpu is a int"),
        ({"parity": None}, "parity is a NoneType"),
        ({"warnings": [1]}, "warnings holds something"),
    ],
)
def test_a_passport_that_makes_no_sense_is_refused(
    bundle: Bundle, an_engine: Passport, change: dict[str, Any], message: str
) -> None:
    facts = {**an_engine.to_dict(), **change}
    facts.pop("passport_sha256")
    facts["passport_sha256"] = passport._digest(facts)  # altered on purpose, with a new hash
    path = bundle.path / "engines" / "odd.json"
    path.write_text(json.dumps(facts))
    with pytest.raises(EngineError, match=message):
        read_passport(path)
    facts.pop("model", None)
    found, broken = read_passports(path.parent)
    assert found == (an_engine,)
    assert len(broken) == 1


@pytest.mark.parametrize("content", [b"", b"[]", b"{}", b"\xff\xfe", b"{" * 100_000])
def test_what_is_no_passport_is_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "x.json").write_bytes(content)
    with pytest.raises(EngineError, match=r"x\.json: .*build the engine again"):
        read_passport(tmp_path / "x.json")
    with pytest.raises(EngineError, match="no passport beside this plan"):
        read_passport(tmp_path / "y.json")


def test_this_machine_is_asked_without_any_library() -> None:
    machine = this_machine()
    driver = cuda_driver()
    if driver["devices"]:
        assert machine.gpu == driver["devices"][0]
        assert machine.driver
        return
    assert (machine.gpu, machine.compute_capability, machine.driver) == (None, None, None)
    assert machine.problem == driver["problem"]


# The backend that is chosen.


def test_by_name_without_an_engine_the_command_is_named(bundle: Bundle) -> None:
    with pytest.raises(BackendUnavailableError, match=r"has no engine: magsd engine .* builds one"):
        open_backend(bundle, "tensorrt")
    with open_backend(bundle, "auto") as backend:
        assert backend.name == "cpu"


@needs_rtx
def test_a_real_engine_without_a_driver_is_refused_and_auto_goes_on(bundle: Bundle) -> None:
    if cuda_driver()["devices"]:
        pytest.skip("there is a GPU here")
    make_engine(bundle, library="rtx", compute_capability="8.6")
    with pytest.raises(BackendUnavailableError, match=r"cannot run here, .*NVIDIA driver"):
        open_backend(bundle, "tensorrt")
    with open_backend(bundle, "auto") as backend:
        assert backend.name == "cpu"
    assert main(["verify", str(bundle.path), "--backend", "tensorrt"]) == 6


@pytest.mark.usefixtures("on_the_gpu")
def test_auto_never_opens_an_engine_that_was_not_compared(
    bundle: Bundle, an_engine: Passport, monkeypatch: pytest.MonkeyPatch
) -> None:
    import magsd_runtime.backends.tensorrt_engine as engine_module

    monkeypatch.setattr(engine_module, "this_machine", lambda: A_GPU)
    opened: list[str] = []

    def open_engine(bundle: Bundle, passport: Passport) -> Any:
        opened.append(passport.parity["status"])
        raise EngineError("as if the library refused it")

    monkeypatch.setattr(engine_module, "open_engine", open_engine)
    replace(an_engine, parity={"status": "not measured"}).save(bundle.path / "engines")
    with open_backend(bundle, "auto") as backend:
        assert backend.name == "cpu"
    assert opened == []
    with pytest.raises(EngineError, match="as if"):
        open_backend(bundle, "tensorrt")  # by name it is opened, or the reason given
    an_engine.save(bundle.path / "engines")
    with open_backend(bundle, "auto") as backend:
        assert backend.name == "cpu"  # it was tried, and there is ONNX Runtime
    assert opened == ["not measured", "passed"]


# The whole way on a GPU, with its driver and the running of the engine in main memory.


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


@needs_rtx
def test_on_a_gpu_the_engine_is_compared_and_then_chosen(bundle: Bundle, gpu: GpuLibrary) -> None:
    built = make_engine(bundle, profile=Profile(1, 2, 4))
    assert built.path.name == "nvidia-test-3060-sm86-trt10.13.3.9-fp16.engine"
    assert (built.passport.gpu, built.passport.driver) == (A_GPU.gpu, A_GPU.driver)
    assert built.passport.proven
    parity = built.passport.parity
    assert parity["reference"] == "ONNX, float32, CPU"
    assert parity["inputs"]["real"]["images"] == len(tiny_bundle.GOLDEN)
    assert len(parity["inputs"]["synthetic"]) == 8
    assert gpu.engine.cuda.empty
    with open_backend(bundle, "auto") as backend:
        assert (backend.name, backend.precision) == ("tensorrt", "fp16")
        assert "was built for this GPU and compared on it" in backend.reason
        given = np.random.default_rng(0).normal(size=(6, 1, 224, 224)).astype(np.float32)
        with open_backend(bundle, "cpu") as cpu:
            np.testing.assert_allclose(backend.run(given)["logits"], cpu.run(given)["logits"], atol=1e-5)
    assert gpu.engine.cuda.empty
    assert main(["verify", str(bundle.path), "--backend", "tensorrt"]) == 0


@needs_rtx
def test_timings_are_kept_for_the_next_build_and_others_left(bundle: Bundle, gpu: GpuLibrary) -> None:
    make_engine(bundle, profile=Profile(1, 2, 4))
    cache = bundle.path / "engines" / "nvidia-test-3060-sm86-trt10.13.3.9-timing.cache"
    assert cache.read_bytes() == b"timings 1"
    make_engine(bundle, profile=Profile(1, 2, 4))
    assert gpu.caches == [b"", b"timings 1"]
    cache.write_bytes(b"of another GPU")
    make_engine(bundle, profile=Profile(1, 2, 4))
    assert gpu.caches[2:] == [b"of another GPU", b""]
    assert read_passports(cache.parent)[1] == ()


@needs_rtx
def test_an_engine_that_differs_is_not_kept(bundle: Bundle, gpu: GpuLibrary, capfd: pytest.CaptureFixture[str]) -> None:
    right = gpu.engine.function

    def wrong(images: np.ndarray) -> dict[str, np.ndarray]:
        outputs = right(images)
        return {**outputs, "attention": outputs["attention"] * 1.2}

    gpu.engine.function = wrong
    with pytest.raises(
        VerificationError, match=r"the engine is not kept: parity failed: attention differs by .* from ONNX "
    ):
        make_engine(bundle, profile=Profile(1, 2, 4))
    assert not (bundle.path / "engines").exists()
    assert main(["engine", str(bundle.path), "--batch", "1:2:4"]) == 5
    assert capfd.readouterr().err.splitlines()[-1].startswith("magsd engine: the engine is not kept")
    assert gpu.engine.cuda.empty


@needs_rtx
def test_without_onnx_runtime_the_golden_outputs_are_the_reference(
    bundle: Bundle, gpu: GpuLibrary, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    library = Library("tensorrt", "10.13.3.9", gpu)
    parity = measure_parity(bundle, library, b"vtrt", "fp16", Profile(1, 2, 4))
    assert parity["status"] == "passed"
    assert "no ONNX Runtime" in parity["reference"]
    assert parity["inputs"]["synthetic"] == []
    assert parity["inputs"]["real"]["images"] == len(tiny_bundle.GOLDEN)
    right = gpu.engine.function
    gpu.engine.function = lambda images: {**right(images), "logits": right(images)["logits"] + 1}
    with pytest.raises(VerificationError, match="from the bundle's golden outputs"):
        measure_parity(bundle, library, b"vtrt", "fp16", Profile(1, 2, 4))


@needs_rtx
def test_doctor_says_of_each_engine_whether_it_would_load(
    bundle: Bundle, gpu: GpuLibrary, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MAGSD_BUNDLE", str(bundle.path))
    assert examine()["engines"] == []
    make_engine(bundle, profile=Profile(1, 2, 4))
    report = examine()
    assert [(engine["fits"], engine["proven"]) for engine in report["engines"]] == [(True, True)]
    assert report["backend"]["name"] == "tensorrt"
    assert "may run here (TensorRT 10.13.3.9, fp16, compared on this GPU)" in format_report(report)
    monkeypatch.setattr(passport, "this_machine", lambda: replace(A_GPU, driver="590.10"))
    (bundle.path / "engines" / "broken.json").write_text("{")
    report = examine()
    assert [engine["fits"] for engine in report["engines"]] == [False, False]
    assert report["backend"]["name"] != "tensorrt"
    assert "the driver is 590.10, it was built for 580.95.05" in format_report(report)
    json.dumps(report, allow_nan=False)


# The command line.


@needs_rtx
def test_magsd_engine_prints_the_passport(bundle: Bundle, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    command = ["engine", str(bundle.path), "--trt", "rtx", "--compute-capability", "8.6", "--batch", "1:2:4"]
    log = tmp_path / "log.txt"
    assert main([*command, "--workspace", "64", "--log", str(log)]) == 0
    captured = capfd.readouterr()
    assert "parity      not measured" in captured.out
    assert "--backend auto will not choose this engine" in captured.out
    assert "HALF" in captured.out
    assert captured.out.splitlines()[-1] == "Research use only. Not for clinical use."
    assert [line.split()[0] for line in captured.err.splitlines()] == ["building", "built"]
    assert len(log.read_text().splitlines()) > 20
    assert main([*command, "--json"]) == 0
    record = json.loads(capfd.readouterr().out)
    assert record["schema"] == "magsd.engine/1"
    assert Path(record["engine"]).is_file()
    assert record["profile"] == "1:2:4"


@needs_rtx
def test_a_failed_build_shows_what_the_library_said(
    bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    import magsd_runtime.engines.building as building

    monkeypatch.setattr(building, "layer_types", lambda network: {"FLOAT": 7})
    log = tmp_path / "log.txt"
    command = ["engine", str(bundle.path), "--trt", "rtx", "--compute-capability", "8.6", "--log", str(log)]
    assert main(command) == 4
    captured = capfd.readouterr()
    assert captured.out == ""
    lines = captured.err.splitlines()
    assert "no layer is in half precision (7 FLOAT)" in lines[-1]
    assert any(line.startswith("INFO: ") for line in lines)
    assert "INFO: " in log.read_text()
    assert not (bundle.path / "engines").exists()


@needs_rtx
def test_export_trt_builds_what_engine_builds(
    bundle: Bundle, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "new"
    command = ["export", str(bundle.path), "--out", str(out), "--trt", "rtx", "--compute-capability", "8.6", "--json"]
    assert main([*command, "--batch", "1:2:4"]) == 0  # --trt alone means fp16
    record = json.loads(capfd.readouterr().out)
    assert record["engine"]["precision"] == "fp16"
    assert record["engine"]["profile"] == "1:2:4"
    assert Path(record["engine"]["engine"]).parent == out / "engines"
    assert load_bundle(out).onnx_file("fp16")[1] == record["engine"]["onnx_sha256"]


@needs_rtx
def test_a_device_needs_neither_torch_nor_onnx(bundle: Bundle) -> None:
    program = (
        "import sys\nfrom magsd.cli import main\n"
        "code = main(['engine', sys.argv[1], '--trt', 'rtx', '--compute-capability', '8.6'])\n"
        "heavy = {'torch', 'onnx', 'timm', 'magsd_export', 'magsd.checkpoint'} & set(sys.modules)\n"
        "sys.exit(f'imported {heavy}' if heavy else code)\n"
    )
    root = Path(__file__).resolve().parents[1]
    paths = os.pathsep.join(str(root / part) for part in ("", "export", "runtime"))
    process = subprocess.run(
        [sys.executable, "-c", program, str(bundle.path)],
        env={**os.environ, "PYTHONPATH": paths}, capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    assert process.returncode == 0, process.stdout + process.stderr
    assert "not measured" in process.stdout


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["--batch", "8"], 2, "expected MIN:OPT:MAX"),
        (["--workspace", "0"], 2, "--workspace is 0"),
    ],
)
def test_wrong_options_are_one_line(
    bundle: Bundle, capfd: pytest.CaptureFixture[str], arguments: list[str], code: int, message: str
) -> None:
    assert main(["engine", str(bundle.path), *arguments]) == code
    err = capfd.readouterr().err
    assert message in err
    assert len(err.splitlines()) == 1


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

"""From a bundle to the engine that is run: which backend is chosen, the whole way on a GPU, the commands.

What runs an engine is tested in test_tensorrt_backend.py.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import tiny_bundle
from engine_trial import A_GPU, GpuLibrary, an_engine, bundle, gpu, halved, needs_rtx, on_the_gpu
from magsd.cli import main
from magsd_runtime.backends import open_backend
from magsd_runtime.bundle import Bundle, load_bundle
from magsd_runtime.doctor import examine, format_report
from magsd_runtime.engines import passport
from magsd_runtime.engines.building import Profile
from magsd_runtime.engines.library import Library
from magsd_runtime.engines.making import make_engine, measure_parity
from magsd_runtime.engines.passport import (
    Passport,
    read_passports,
)
from magsd_runtime.errors import (
    BackendUnavailableError,
    EngineError,
    VerificationError,
)
from magsd_runtime.hardware import cuda_driver

__all__ = ["an_engine", "bundle", "gpu", "halved", "on_the_gpu"]  # fixtures


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

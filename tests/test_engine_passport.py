"""An engine's passport: what it says, and what it keeps from being opened."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from engine_trial import A_GPU, NO_GPU, an_engine, bundle, halved, on_the_gpu
from magsd_runtime.bundle import Bundle
from magsd_runtime.engines import passport
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
    EngineError,
    EngineMismatchError,
    MissingExtraError,
)
from magsd_runtime.hardware import cuda_driver

__all__ = ["an_engine", "bundle", "halved", "on_the_gpu"]  # fixtures


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

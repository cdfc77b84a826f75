from __future__ import annotations

import contextlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import tiny_bundle
from magsd_runtime.bundle import load_bundle
from magsd_runtime.errors import BundleError
from magsd_runtime.preprocessing import PreprocessingSpec

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=5),
    lambda children: st.lists(children, max_size=3) | st.dictionaries(st.text(max_size=5), children, max_size=3),
    max_leaves=5,
)


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_bundle.build(
        tmp_path_factory.mktemp("bundle") / "b",
        temperature=1.5,
        localization={"map": "evidence", "threshold": 0.4},
    )


@pytest.fixture
def bundle(original: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(original, tmp_path / "b"))


def edit(bundle: Path, change: Callable[[dict[str, Any]], object]) -> None:
    path = bundle / "bundle.json"
    manifest = json.loads(path.read_text())
    change(manifest)
    path.write_text(json.dumps(manifest))


def test_a_sound_bundle(original: Path) -> None:
    bundle = load_bundle(original)
    assert (bundle.name, bundle.version) == ("tiny", "1")
    assert bundle.classes == tiny_bundle.CLASSES
    assert bundle.preprocessing == PreprocessingSpec()
    assert bundle.temperature == 1.5
    assert bundle.localization == {"map": "evidence", "threshold": 0.4}
    assert bundle.minimum_score == 0
    assert bundle.model_path == original / "model.onnx"
    assert bundle.model_sha256 == bundle.manifest["files"]["model.onnx"]["sha256"]


def test_a_field_that_is_not_known_here_is_no_reason_to_refuse(bundle: Path) -> None:
    edit(bundle, lambda manifest: manifest.update(something_new={"mean": [0.0]}))
    assert load_bundle(bundle).manifest["something_new"] == {"mean": [0.0]}


@pytest.mark.parametrize("name", ["model.onnx", "golden/noise.png", "golden/expected.npz"])
def test_every_missing_cut_or_altered_file_is_named(bundle: Path, name: str) -> None:
    path = bundle / name
    content = path.read_bytes()
    middle = len(content) // 2
    path.write_bytes(content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :])
    with pytest.raises(BundleError, match=f"{name}: was altered"):
        load_bundle(bundle)
    assert load_bundle(bundle, check_files=False).name == "tiny"
    path.write_bytes(content[:-1])
    for check in (True, False):
        with pytest.raises(BundleError, match=f"{name}: has {len(content) - 1} bytes"):
            load_bundle(bundle, check_files=check)
    path.unlink()
    for check in (True, False):
        with pytest.raises(BundleError, match=f"{name}: is missing"):
            load_bundle(bundle, check_files=check)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda m: m.update(schema="magsd.bundle/2"), "of version 2, this magsd reads version 1"),
        (lambda m: m.update(schema="other/1"), "schema is 'other/1'"),
        (lambda m: m.pop("schema"), "schema is None"),
        (lambda m: m.pop("classes"), "classes is missing"),
        (lambda m: m.update(classes=["a"]), "two or more"),
        (lambda m: m.update(classes=["a", "a"]), "holds a name twice"),
        (lambda m: m["preprocessing"].update(size=256), "not the hash of preprocessing"),
        (lambda m: m["preprocessing"].update(version=2), "preprocessing spec has"),
        (lambda m: m["preprocessing"].update(lungs=True), "preprocessing spec has"),
        (lambda m: m.update(preprocessing_sha256="0" * 64), "not the hash of preprocessing"),
        (lambda m: m["calibration"].update(temperature=0), "temperature is 0"),
        (lambda m: m["calibration"].update(temperature=float("nan")), "finite number"),
        (lambda m: m["calibration"].update(temperature=10**400), "finite number"),
        (lambda m: m["calibration"].update(temperature=True), "finite number"),
        (lambda m: m.pop("calibration"), "calibration is a NoneType"),
        (lambda m: m["calibration"].update(fitted=True), "calibration.source is missing"),
        (lambda m: m["calibration"].update(model_sha256="0" * 64), "calibration is that of model 000000000000"),
        (lambda m: m["localization"].update(map="gradient"), "localization.map is 'gradient'"),
        (lambda m: m["localization"].update(threshold=1.5), "threshold is 1.5"),
        (lambda m: m["localization"].update(minimum_score=1.5), "localization.minimum_score is 1.5, expected 0 to 1"),
        (lambda m: m["localization"].update(minimum_score=-0.1), "localization.minimum_score is -0.1"),
        (lambda m: m["localization"].update(minimum_score="0.5"), "localization.minimum_score is a str"),
        (lambda m: m["localization"].update(minimum_score=None), "localization.minimum_score is a NoneType"),
        (lambda m: m["model"].update(sha256="0" * 64), "model.sha256 is not the sha256"),
        (lambda m: m["files"].pop("model.onnx"), "does not list model.onnx"),
        (lambda m: m.pop("files"), "does not list model.onnx"),
        (lambda m: m["files"].update({"../x": {"sha256": "", "size": 0}}), "leads out of the bundle"),
        (lambda m: m["files"].update({"/etc/hosts": {"sha256": "", "size": 0}}), "leads out of the bundle"),
        (lambda m: m["files"].update({"model.onnx": {"size": 1}}), "no sha256 and size"),
        (lambda m: m["files"].update({"a\0b": {"sha256": "", "size": 0}}), "is missing|cannot be read"),
        (lambda m: m["files"].update({"a" * 999: {"sha256": "", "size": 0}}), "is missing|cannot be read"),
    ],
)
def test_what_is_wrong_is_said_in_one_line(
    bundle: Path, change: Callable[[dict[str, Any]], object], message: str
) -> None:
    edit(bundle, change)
    with pytest.raises(BundleError, match=message) as caught:
        load_bundle(bundle)
    assert "\n" not in str(caught.value)
    assert str(bundle) in str(caught.value)


@pytest.mark.parametrize("value", [0, 0.0, 0.75, 1])
def test_a_bundle_may_name_a_minimum_score(bundle: Path, value: float) -> None:
    edit(bundle, lambda m: m["localization"].update(minimum_score=value))
    assert load_bundle(bundle).minimum_score == value


def test_what_is_no_bundle(tmp_path: Path) -> None:
    with pytest.raises(BundleError, match="no such folder"):
        load_bundle(tmp_path / "absent")
    with pytest.raises(BundleError, match=r"holds no bundle\.json"):
        load_bundle(tmp_path)
    file = tmp_path / "model.onnx"
    file.write_bytes(b"x")
    with pytest.raises(BundleError, match="is a file"):
        load_bundle(file)
    for content in (b"{", b"\xff\xfe", b"[1]", b"", b"[" * 100_000):
        (tmp_path / "bundle.json").write_bytes(content)
        with pytest.raises(BundleError):
            load_bundle(tmp_path)


@settings(max_examples=200, deadline=None)
@given(st.data())
def test_any_field_replaced_by_anything_loads_or_is_refused(original: Path, data: st.DataObject) -> None:
    """No other exception than BundleError, whatever stands in bundle.json."""
    manifest = json.loads((original / "bundle.json").read_text())
    holder = manifest
    while True:
        key = data.draw(st.sampled_from(sorted(holder)))
        if not (isinstance(holder[key], dict) and holder[key] and data.draw(st.booleans())):
            break
        holder = holder[key]
    holder[key] = data.draw(JSON)
    from magsd_runtime import bundle

    folder = original.parent / "fuzzed"
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(original, folder)
    (folder / "bundle.json").write_text(json.dumps(manifest))
    with contextlib.suppress(BundleError):
        bundle.load_bundle(folder)

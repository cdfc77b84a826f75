"""INT8: what is quantized and what is not, the order and number of layers in float, bundles with and without."""

from __future__ import annotations

import csv
import dataclasses
import json
import shutil
from collections.abc import Iterable
from pathlib import Path

import cv2
import numpy as np
import onnx
import pytest
import torch
from numpy.typing import NDArray
from onnx import numpy_helper

import tiny_bundle
from magsd.data import Record, read_manifest
from magsd.models import MANet
from magsd_export import int8_bundle
from magsd_export.commands import export
from magsd_export.int8 import Calibrated, calibrate, quantize, write_int8
from magsd_export.int8_bundle import divide, manifest_of, quantize_bundle
from magsd_export.int8_choice import Choice, Effect, Reference, choose, rank
from magsd_export.precision import onnx_network
from magsd_export.to_onnx import export_onnx
from magsd_runtime.backends import open_backend
from magsd_runtime.bundle import load_bundle
from magsd_runtime.errors import (
    BackendUnavailableError,
    BundleError,
    DataError,
    MagsdError,
    UsageError,
    VerificationError,
)
from magsd_runtime.parity import Outputs
from magsd_runtime.pipeline import Pipeline
from magsd_runtime.preprocessing import PreprocessingSpec
from magsd_runtime.verification import verify_bundle
from tiny_export import write_run

SIZE = 64


def film(seed: int, size: int = SIZE) -> NDArray[np.float32]:
    """A smooth random picture, float32 (1, size, size), mean 0 and variance 1."""
    values = cv2.resize(np.random.default_rng(seed).normal(size=(6, 6)), (size, size), interpolation=cv2.INTER_CUBIC)
    return ((values - values.mean()) / values.std()).astype(np.float32)[np.newaxis]


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(5)
    model = MANet("test_efficientnet", num_classes=3, num_attention_maps=8)
    path = tmp_path_factory.mktemp("onnx") / "model.onnx"
    export_onnx(model.eval(), PreprocessingSpec(size=SIZE), path, {"magsd.model": "test"})
    return path


@pytest.fixture(scope="module")
def calibrated(source: Path) -> Calibrated:
    return calibrate(source, [film(seed) for seed in range(4)])


# The graph.


def quantized_weights(model: onnx.ModelProto) -> dict[str, NDArray[np.generic]]:
    """Weights in integers by the name of the float tensor; biases, in 32 bits, left out."""
    found = {tensor.name: numpy_helper.to_array(tensor) for tensor in model.graph.initializer}
    return {name.removesuffix("_quantized"): values for name, values in found.items() if values.dtype == np.int8
            and values.ndim == 4}  # fmt: skip


def test_the_whole_trunk_is_in_integers_and_the_head_in_float(calibrated: Calibrated, source: Path) -> None:
    model = quantize(calibrated)
    weights = quantized_weights(model)
    assert set(weights) == {calibrated.weights[layer] for layer in calibrated.layers}
    assert all(name.startswith("backbone.") for name in weights)
    floats = {tensor.name for tensor in onnx.load(source).graph.initializer if "backbone." not in tensor.name}
    kept = {tensor.name for tensor in model.graph.initializer if tensor.data_type == onnx.TensorProto.FLOAT}
    head = {name for name in floats if name.startswith(("attention_generator", "classifier"))}
    assert len(head) == 2  # one a scale
    assert head <= kept
    assert {p.key: p.value for p in model.metadata_props} == {"magsd.model": "test", "magsd.precision": "int8"}


def test_two_products_of_weights_and_activations_fit_16_bits(calibrated: Calibrated) -> None:
    # what x86 without VNNI adds in 16 bits: 255 * w + 255 * w
    for name, values in quantized_weights(quantize(calibrated)).items():
        assert 2 * 255 * int(np.abs(values.astype(int)).max()) <= 32767, name
    full = quantized_weights(quantize(calibrated, reduce_range=False))
    assert max(int(np.abs(values.astype(int)).max()) for values in full.values()) == 127


def test_weights_are_rounded_with_a_scale_for_each_output_channel(calibrated: Calibrated) -> None:
    """Against quantization written out: symmetric, the largest weight of a channel is 64."""
    originals = {t.name: numpy_helper.to_array(t).astype(np.float64) for t in calibrated.model.graph.initializer}
    for name, values in quantized_weights(quantize(calibrated)).items():
        scale = np.abs(originals[name]).max((1, 2, 3), keepdims=True) / 64
        expected = np.rint(originals[name] / scale)
        assert np.abs(values - expected).max() <= 1, name  # a tie of float32 may fall either way
        assert (values == expected).mean() > 0.99, name


def test_a_layer_left_in_float_keeps_its_weights(calibrated: Calibrated, source: Path) -> None:
    left = calibrated.layers[2]
    model = quantize(calibrated, [left])
    weights = quantized_weights(model)
    assert calibrated.weights[left] not in weights
    assert len(weights) == len(calibrated.layers) - 1
    before = {t.name: numpy_helper.to_array(t) for t in onnx.load(source).graph.initializer}
    after = {t.name: numpy_helper.to_array(t) for t in model.graph.initializer}
    np.testing.assert_array_equal(after[calibrated.weights[left]], before[calibrated.weights[left]])


@pytest.mark.slow
def test_a_sum_is_in_integers_only_where_all_that_it_adds_is(tmp_path: Path) -> None:
    torch.manual_seed(5)
    model = MANet("test_resnet", num_classes=3, num_attention_maps=8)
    export_onnx(model.eval(), PreprocessingSpec(size=SIZE), tmp_path / "model.onnx", {"magsd.model": "test"})
    residual = calibrate(tmp_path / "model.onnx", [film(0)])
    nodes = residual.model.graph.node
    rests_on = dict(residual.others)
    total = next(node for node in nodes if node.op_type == "Add" and len(rests_on.get(node.name, ())) == 2)
    relu = next(node.name for node in nodes if total.output[0] in node.input)

    def in_integers(leave: Iterable[str]) -> bool:
        """Integers of a sum end at 0 by their range: its ReLU is gone."""
        model = quantize(residual, leave)
        given = next(node.input for node in model.graph.node if node.name == total.name)
        assert relu in {node.name for node in model.graph.node} or all("Dequantize" in name for name in given)
        return relu not in {node.name for node in model.graph.node}

    assert in_integers([])
    assert not any(in_integers([layer]) for layer in rests_on[total.name])
    assert in_integers([next(layer for layer in residual.layers if layer not in rests_on[total.name])])


def test_its_outputs_are_close_to_those_of_float32_on_what_it_was_calibrated_on(
    calibrated: Calibrated, source: Path
) -> None:
    image = film(0)[np.newaxis]
    exact, found = onnx_network(onnx.load(source))(image), onnx_network(quantize(calibrated))(image)
    for name in exact:
        scale = np.abs(exact[name]).max()
        assert 0 < np.abs(found[name] - exact[name]).max() < 0.5 * scale, name


def test_what_cannot_be_quantized_is_refused(calibrated: Calibrated, source: Path, tmp_path: Path) -> None:
    with pytest.raises(MagsdError, match="none"):
        calibrate(source, [])
    with pytest.raises(MagsdError, match="nothing to quantize"):
        quantize(calibrated, calibrated.layers)
    with pytest.raises(MagsdError, match="no such layer to leave in float: nowhere"):
        quantize(calibrated, ["nowhere"])
    tiny_bundle.write_network(tmp_path / "tiny.onnx", 3, 224)
    with pytest.raises(MagsdError, match="no convolution"):
        # all of its convolutions make the last feature maps and the attention at once
        calibrate(only_head(tmp_path / "tiny.onnx"), [film(0, 224)])


def only_head(path: Path) -> Path:
    """The tiny network with its mean taken of what the image gives without any convolution."""
    model = onnx.load(path)
    for node in model.graph.node:
        if node.op_type == "GlobalAveragePool":
            node.input[0] = "blocks"
    del model.graph.output[3].type.tensor_type.shape.dim[:]
    onnx.save(model, path)
    return path


def test_the_same_films_give_the_same_file(source: Path, calibrated: Calibrated, tmp_path: Path) -> None:
    write_int8(quantize(calibrated), tmp_path / "a.onnx")
    write_int8(quantize(calibrate(source, [film(seed) for seed in range(4)])), tmp_path / "b.onnx")
    assert (tmp_path / "a.onnx").read_bytes() == (tmp_path / "b.onnx").read_bytes()


# What it costs.


def network_of(logits: list[list[float]], maps: list[NDArray[np.float64]]):
    """A network that gives the outputs of the n-th film for an image of the value n."""

    def run(images: NDArray[np.float32]) -> Outputs:
        number = int(images[0, 0, 0, 0])
        return {"logits": np.array([logits[number]]), "attention": maps[number][np.newaxis, np.newaxis]}

    return run


def test_the_effect_is_what_its_definition_says() -> None:
    images = [np.full((1, 2, 2), value, np.float32) for value in range(3)]
    one, other = np.array([[1.0, 2.0], [3.0, 5.0]]), np.array([[1.0, 2.5], [2.0, 5.0]])
    before = [[2.0, 0.0], [0.0, 1.0], [0.5, 0.0]]
    after = [[1.0, 0.0], [0.0, 1.0], [0.0, 0.5]]
    reference = Reference(network_of(before, [one, one, one]), images, 2.0)
    effect = reference.effect(network_of(after, [one, other, one]))

    def probability(logits: list[float]) -> float:
        return 1 / (1 + np.exp((logits[1] - logits[0]) / 2))

    drops = [abs(probability(a) - probability(b)) for a, b in zip(before, after)]
    correlation = np.corrcoef(one.ravel(), other.ravel())[0, 1]
    assert effect.films == 3
    assert effect.label_agreement == pytest.approx(2 / 3)
    assert effect.probability_mean == pytest.approx(np.mean(drops))
    assert effect.probability_largest == pytest.approx(max(drops))
    assert effect.correlation_mean == pytest.approx((2 + correlation) / 3)
    assert effect.correlation_lowest == pytest.approx(correlation)
    flat = reference.effect(network_of(before, [one, np.ones((2, 2)), one]))
    assert flat.correlation_lowest == 0  # a map that shows nothing any more
    with pytest.raises(MagsdError, match="infinities"):
        reference.effect(network_of([[np.nan, 0.0]] * 3, [one] * 3))


def effect(agreement: float = 1.0, mean: float = 0.0, correlation: float = 1.0) -> Effect:
    return Effect(100, agreement, mean, mean, correlation, correlation)


@pytest.mark.parametrize(
    ("found", "within"),
    [
        (effect(), True),
        (effect(0.99, 0.01, 0.97), True),
        (effect(0.9899), False),
        (effect(mean=0.0101), False),
        (effect(correlation=0.9699), False),
    ],
)
def test_bounds_on_both_sides(found: Effect, within: bool) -> None:
    assert found.within(0.01) is within


def test_the_layer_with_the_largest_effect_comes_first() -> None:
    effects = {"a": effect(mean=0.01), "b": effect(mean=0.3), "c": effect(correlation=0.8)}
    assert [layer for layer, _ in rank(effects, effects.__getitem__)] == ["b", "c", "a"]


@pytest.mark.parametrize(("needed", "layers"), [(0, 10), (1, 10), (5, 10), (6, 10), (3, 120)])
def test_the_fewest_layers_are_left_in_float(needed: int, layers: int) -> None:
    ranked = [f"layer {number}" for number in range(layers)]
    asked: list[int] = []

    def judge(leave) -> Effect:
        assert list(leave) == ranked[: len(leave)]
        asked.append(len(leave))
        return effect(mean=0.0 if len(leave) >= needed else 0.5 - 0.01 * len(leave))

    choice = choose(ranked, judge, max_drop=0.01)
    assert choice.tried == len(asked) <= 26
    assert max(asked) <= layers // 2
    if needed <= layers // 2:
        assert choice.found
        assert needed <= len(choice.leave) < needed + max(1, layers // 2 // 25 + 1)
    else:
        assert not choice.found
        assert len(choice.leave) == layers // 2  # the best of what was tried


def test_the_effects_of_real_layers_alone_order_them(calibrated: Calibrated, source: Path) -> None:
    """A layer whose weights are spread over five decades in one channel suffers most."""
    layer = calibrated.layers[3]
    spoiled = onnx.ModelProto()
    spoiled.CopyFrom(onnx.load(source))
    weight = next(t for t in spoiled.graph.initializer if t.name == calibrated.weights[layer])
    values = numpy_helper.to_array(weight).copy()
    values[:, 0] *= 40  # each channel's scale follows its largest weight: the others are rounded away
    weight.CopyFrom(numpy_helper.from_array(values, weight.name))
    path = source.with_name("spoiled.onnx")
    onnx.save(spoiled, path)
    images = [film(seed) for seed in range(4)]
    again = calibrate(path, images)
    reference = Reference(onnx_network(onnx.load(path)), images, 1.0)
    ranked = rank(again.layers, lambda one: reference.effect(onnx_network(quantize(again, set(again.layers) - {one}))))
    assert [name for name, _ in ranked].index(layer) < len(ranked) // 3


# Films.


def record(number: int, patient: str, label: str = "a") -> Record:
    return Record(Path(f"{number}.png"), label, patient)


def test_no_patient_is_in_two_parts() -> None:
    records = [record(number, f"patient {number // 3}", "ab"[number % 2]) for number in range(300)]
    parts = divide(records)
    patients = [{r.patient for r in part} for part in parts.values()]
    assert len(patients[0] | patients[1] | patients[2]) == sum(map(len, patients)) == 100
    assert [len(found) for found in patients] == [25, 25, 50]
    assert divide(list(reversed(records))) == parts


def test_films_come_from_the_manifest_or_the_run_or_nowhere(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="a bundle holds none: --calibration-data"):
        manifest_of(None, None)
    with pytest.raises(UsageError, match="are not there"):
        manifest_of(None, (str(tmp_path / "gone.csv"), "0"))
    table = write_films(tmp_path, 4)
    with pytest.raises(UsageError, match="has changed"):
        manifest_of(None, (str(table), "0"))
    manifest = read_manifest(table)
    assert manifest_of(None, (str(table), manifest.digest())) == manifest
    assert manifest_of(table, None) == manifest


def write_films(folder: Path, count: int) -> Path:
    """Pictures of ``count`` patients, and their manifest."""
    with open(folder / "films.csv", "w", newline="") as file:
        table = csv.writer(file)
        table.writerow(["path", "label", "patient"])
        for number in range(count):
            pixels = film(number, 96)[0]
            pixels = 255 * (pixels - pixels.min()) / np.ptp(pixels)
            cv2.imwrite(str(folder / f"{number}.png"), pixels.astype(np.uint8))
            table.writerow([f"{number}.png", tiny_bundle.CLASSES[number % 3], f"p{number}"])
    return folder / "films.csv"


# Bundles.


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("int8")
    write_films(folder, 100)
    tiny_bundle.build(folder / "plain")
    return folder


@pytest.fixture(scope="module")
def quantized(folder: Path) -> Path:
    command = [str(folder / "plain"), "--out", str(folder / "quantized"), "--precision", "int8",
               "--calibration-data", str(folder / "films.csv"), "--max-drop", "0.2"]  # fmt: skip
    assert export(command) == 0
    return folder / "quantized"


def test_a_bundle_gets_int8_and_says_what_was_measured(folder: Path, quantized: Path) -> None:
    before, after = load_bundle(folder / "plain"), load_bundle(quantized)
    path, sha256 = after.onnx_file("int8")
    entry = after.manifest["precisions"]["int8"]
    assert path.name == "model.int8.onnx"
    assert entry["sha256"] == sha256
    assert entry["model_sha256"] == after.model_sha256 == before.model_sha256
    assert entry["films"]["digest"] == read_manifest(folder / "films.csv").digest()
    assert [entry["films"][part]["films"] for part in ("calibration", "choice", "check")] == [25, 25, 50]
    assert len({entry["films"][part]["inputs_sha256"] for part in ("calibration", "choice", "check")}) == 3
    assert entry["verification"]["films"] == 50
    assert entry["verification"]["label_agreement"] >= 0.8
    assert entry["verification"]["probability_mean"] <= 0.2
    assert before.manifest["files"].items() <= after.manifest["files"].items()
    # what it says of the check is what these networks do
    films = int8_bundle._read("check", divide(read_manifest(folder / "films.csv").records)["check"], after).images
    with open_backend(after, "cpu") as exact, open_backend(after, "cpu-int8") as backend:
        found = Reference(exact.run, films, after.temperature).effect(backend.run)
    assert found.to_dict() == pytest.approx({k: v for k, v in entry["verification"].items() if k in found.to_dict()})


def test_it_runs_when_asked_for_and_never_by_itself(folder: Path, quantized: Path) -> None:
    bundle = load_bundle(quantized)
    with open_backend(bundle, "auto") as backend:
        assert backend.precision == "fp32"
    with Pipeline.open(str(quantized), "cpu-int8") as pipeline:
        prediction = pipeline.predict(str(folder / "3.png")).prediction.to_dict()
    assert prediction["backend"] == {"name": "cpu-int8", "device": "cpu", "precision": "int8"}
    with Pipeline.open(str(quantized), "cpu") as pipeline:
        exact = pipeline.predict(str(folder / "3.png")).prediction.to_dict()
    assert exact["probabilities"] != prediction["probabilities"]
    assert exact["probabilities"] == pytest.approx(prediction["probabilities"], abs=0.2)


def test_a_bundle_without_it_loads_and_says_how_to_make_one(folder: Path) -> None:
    bundle = load_bundle(folder / "plain")
    with pytest.raises(BackendUnavailableError, match=r"no network in int8: magsd export .* --calibration-data"):
        open_backend(bundle, "cpu-int8")


def test_it_proves_itself_by_its_own_golden_values(quantized: Path, tmp_path: Path) -> None:
    bundle = load_bundle(quantized)
    with open_backend(bundle, "cpu-int8") as backend:
        report = verify_bundle(bundle, backend)
        assert report.passed
        assert report.backend["precision"] == "int8"
    copy = tmp_path / "copy"
    shutil.copytree(quantized, copy)
    with np.load(copy / "golden" / "expected.int8.npz") as file:
        arrays = {name: file[name] for name in file.files}
    arrays["ramp/logits"] = arrays["ramp/logits"] + 1
    np.savez(copy / "golden" / "expected.int8.npz", **arrays)  # type: ignore[arg-type]
    altered = dataclasses.replace(bundle, path=copy)
    with open_backend(bundle, "cpu-int8") as backend:
        assert not verify_bundle(altered, backend).passed
    with open_backend(bundle, "cpu") as backend:
        assert verify_bundle(altered, backend).passed  # of float32, nothing was changed
    (copy / "golden" / "expected.int8.npz").unlink()
    with open_backend(bundle, "cpu-int8") as backend, pytest.raises(BundleError, match="golden"):
        verify_bundle(altered, backend)


@pytest.mark.parametrize("name", ["model.int8.onnx", "golden/expected.int8.npz"])
def test_one_wrong_byte_is_refused(quantized: Path, tmp_path: Path, name: str) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(quantized, copy)
    content = bytearray((copy / name).read_bytes())
    content[len(content) // 2] ^= 1
    (copy / name).write_bytes(content)
    with pytest.raises(BundleError, match="was altered"):
        load_bundle(copy)


def test_one_of_another_model_is_refused(quantized: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(quantized, copy)
    manifest = json.loads((copy / "bundle.json").read_text())
    manifest["precisions"]["int8"]["model_sha256"] = "0" * 64
    (copy / "bundle.json").write_text(json.dumps(manifest))
    with pytest.raises(BundleError, match=r"model\.int8\.onnx is not described as made from this model"):
        load_bundle(copy)
    del manifest["precisions"]
    (copy / "bundle.json").write_text(json.dumps(manifest))
    with pytest.raises(BundleError, match="name different networks"):
        load_bundle(copy)


def test_bounds_that_cannot_be_met_leave_no_bundle(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    manifest = read_manifest(folder / "films.csv")
    with pytest.raises(VerificationError, match=r"--max-drop 1e-06 .* probability off by .*; nothing was written"):
        quantize_bundle(folder / "plain", tmp_path / "new", manifest, max_drop=1e-6)
    assert list(tmp_path.iterdir()) == []

    # met on the films of the choice, missed on those of the check
    def lucky(ranked, judge, *, max_drop: float) -> Choice:
        return Choice((), judge(()), 1, True)

    monkeypatch.setattr(int8_bundle, "choose", lucky)
    with pytest.raises(VerificationError, match="on films that it was not chosen on: labels equal"):
        quantize_bundle(folder / "plain", tmp_path / "new", manifest, max_drop=1e-6)
    assert list(tmp_path.iterdir()) == []


def test_too_few_films_are_refused(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"usable films for the calibration, at least 24 are needed: give 96"):
        quantize_bundle(folder / "plain", tmp_path / "new", read_manifest(write_films(tmp_path, 20)))
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--precision", "int8"], "a bundle holds none"),
        (["--max-drop", "0.1"], "go with --precision int8"),
        (["--precision", "fp16", "--calibration-data", "M.csv"], "go with --precision int8"),
        (["--precision", "int8", "--trt"], "for CPUs"),
        (["--precision", "int8", "--calibration-data", "{films}", "--max-drop", "2"], "--max-drop is 2"),
        (["--precision", "int8", "--calibration-data", "{films}", "--fold", "1"], "--fold goes with a run"),
    ],
)
def test_options_that_do_not_fit(folder: Path, tmp_path: Path, options: list[str], message: str) -> None:
    given = [option.format(films=folder / "films.csv") for option in options]
    with pytest.raises(UsageError, match=message):
        export([str(folder / "plain"), "--out", str(tmp_path / "new"), *given])


def test_half_precision_may_be_added_to_it(quantized: Path, tmp_path: Path) -> None:
    assert export([str(quantized), "--out", str(tmp_path / "both"), "--precision", "fp16"]) == 0
    assert set(load_bundle(tmp_path / "both").manifest["precisions"]) == {"fp16", "int8"}


# A run.


def test_a_run_s_bundle_comes_with_it_or_not_at_all(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    run = write_run(tmp_path / "run", tmp_path / "data", {0: {"auc": 0.9, "accuracy": 0.9, "loss": 0.1}})
    command = [str(run), "--out", str(tmp_path / "new" / "bundle"), "--precision", "int8", "--images", "2"]
    with pytest.raises(DataError, match="usable films for the calibration"):  # its own are too few
        export(command)
    assert list((tmp_path / "new").iterdir()) == []
    films = ["--calibration-data", str(folder / "films.csv"), "--max-drop", "0.9"]
    assert export([*command, *films]) == 0
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["bundle"]
    bundle = load_bundle(tmp_path / "new" / "bundle")
    assert bundle.manifest["precisions"]["int8"]["bounds"]["max_drop"] == 0.9
    assert bundle.manifest["precisions"]["int8"]["layers"]["trunk"] > 1
    with open_backend(bundle, "cpu-int8") as backend:
        assert verify_bundle(bundle, backend).passed

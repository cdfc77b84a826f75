"""Evaluation: who predicts whom, scores over folds, what is left out and said, and the folder that is left."""

from __future__ import annotations

import csv
import json
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import torch

from magsd import judging
from magsd.checkpoint import load_model
from magsd.cli import main
from magsd.config import resolve
from magsd.confounds import source_confound
from magsd.data import Record, read_manifest
from magsd.distributed import Processes
from magsd.evaluation import _model_notes, evaluate, evaluate_predictions
from magsd.evaluation_output import check_out, predictions_csv
from magsd.folds import Folds, load_folds
from magsd.ground_truth import read_truth
from magsd.metrics import SCORES, classification_scores
from magsd.predictors import Predictions, Run, predict, read_log
from magsd.training import train
from magsd_runtime.bundle import Bundle
from magsd_runtime.calibration_record import Calibration
from magsd_runtime.errors import DataError, UsageError
from magsd_runtime.images import read_radiograph
from magsd_runtime.localization import class_evidence_map, mean_attention_map
from magsd_runtime.preprocessing import PreprocessingSpec, normalize, preprocess
from tiny_run import TINY, write_tiny_manifest


def predictions(count: int = 24, folds: int = 3, seed: int = 0, unknown: int = 0) -> Predictions:
    rng = np.random.default_rng(seed)
    labels = [("a", "b", "c")[number % 3] for number in range(count)] + ["d"] * unknown
    records = tuple(
        Record(Path(f"{n:02d}.png"), label, f"p{n // 2}", source="xy"[n % 2]) for n, label in enumerate(labels)
    )
    probabilities = rng.dirichlet(np.ones(3), len(labels))
    return Predictions(("a", "b", "c"), records, np.arange(len(labels)) // 2 % folds, probabilities)


def test_a_value_is_the_mean_over_folds_and_json_has_no_nan() -> None:
    data = predictions()
    result = evaluate_predictions(data, resamples=50)
    of_folds = []
    for fold in range(3):
        part = data.select(data.folds == fold)
        of_folds.append(
            classification_scores(labels=part.labels, predicted=part.predicted, probabilities=part.probabilities)
        )
    for name in SCORES:
        values = [scores[name] for scores in of_folds]
        assert result["classification"][name]["value"] == pytest.approx(np.mean(values))
        assert result["classification"][name]["std"] == pytest.approx(np.std(values, ddof=1))
        low, high = result["classification"][name]["ci95"]
        assert 0 <= low <= high <= 1
        assert [fold[name] for fold in result["folds"]] == pytest.approx(values)
    assert np.array(result["confusion"]["counts"]).sum() == 24
    assert sum(row["images"] for row in result["calibration"]["bins"]) == 24
    assert {name: row["images"] for name, row in result["per_class"].items()} == {"a": 8, "b": 8, "c": 8}
    assert {name: row["images"] for name, row in result["by_source"].items()} == {"x": 12, "y": 12}
    json.dumps(result, allow_nan=False)


def test_worst_are_the_most_confident_errors() -> None:
    data = predictions(60)
    worst = evaluate_predictions(data, resamples=0)["worst"]
    wrong = data.select(data.labels != data.predicted)
    confidence = np.sort(wrong.probabilities.max(axis=1))[::-1]
    assert [row["probability"] for row in worst] == pytest.approx(confidence[:20])
    assert all(row["label"] != row["predicted"] for row in worst)


def test_classes_the_model_does_not_know_are_in_no_score() -> None:
    with_unknown = evaluate_predictions(predictions(unknown=5), resamples=20)
    assert np.array(with_unknown["confusion"]["counts"]).sum() == 24
    only = predictions(unknown=5)
    with pytest.raises(
        DataError, match="no image has a class that the model knows: the manifest has d; the model a, b, c"
    ):
        evaluate_predictions(only.select(only.labels < 0))


def test_a_class_without_images_has_no_value_and_leaves_the_means() -> None:
    data = predictions(folds=1)
    result = evaluate_predictions(data.select(data.labels != 2), resamples=20)
    assert result["per_class"]["c"]["sensitivity"]["value"] is None
    assert result["per_class"]["c"]["images"] == 0
    expected = np.mean([result["per_class"][name]["sensitivity"]["value"] for name in "ab"])
    assert result["classification"]["sensitivity"]["value"] == pytest.approx(expected)
    json.dumps(result, allow_nan=False)


def records(labels: str, sources: str, patients: str | None = None) -> list[Record]:
    names = patients or "".join(chr(97 + number) for number in range(len(labels)))
    return [Record(Path(str(n)), *row) for n, row in enumerate(zip(labels, names, sources))]  # label, patient, source


def test_source_confound_is_found_where_source_equals_class() -> None:
    found = source_confound(records("aaabbb", "xxxyyy"))
    assert found is not None
    assert (found["accuracy"], found["sensitivity"], found["suspicious"]) == (1.0, 1.0, True)
    found = source_confound(records("abababab", "xxyyxxyy"))
    assert found is not None
    assert not found["suspicious"]
    assert source_confound(records("aaabbb", "xxxxxx")) is None
    assert source_confound(records("aaaaaa", "xxyyzz")) is None


def test_a_source_of_one_patient_explains_nothing() -> None:
    """A source's other images are of the same patient, so they say nothing about a new patient of it."""
    found = source_confound(records("aabbaabb", "xxyyzzww", "ppqqrrss"))
    assert found is not None
    assert not found["suspicious"]


@pytest.mark.data
def test_the_confound_of_the_real_data_is_found_and_their_boxes_read(cxr: Path) -> None:
    found = source_confound(read_manifest(cxr / "dataset_a.csv").records)
    assert found is not None
    assert (found["sensitivity"], found["suspicious"]) == (1.0, True)  # every covid19 image is of one source
    found = source_confound(read_manifest(cxr / "dataset_b.csv").records)
    assert found is not None
    assert found["suspicious"]
    # three of its classes are almost equally common in one source: that of the fourth gives it away all the same
    found = source_confound(read_manifest(cxr / "dataset_c.csv").records)
    assert found is not None
    assert found["suspicious"]
    assert found["told"]["covid19"] > 0.9
    for record in read_manifest(cxr / "localization.csv").records:
        truth = read_truth(record, PreprocessingSpec())
        assert truth.mask.sum() == pytest.approx(truth.box.area, rel=0.05)


def test_a_run_without_attention_says_that_its_maps_mean_nothing() -> None:
    config = resolve({"model": "plain"})
    target = Run(Path("run"), config, Folds(0, 5, {}), (0,), ("a", "b"), {})
    scores = {"folds": [{"fold": 0, "auc": 0.5}]}
    assert [note["level"] for note in _model_notes(target, scores)] == ["warning"]
    assert _model_notes(replace(target, config=resolve({})), scores) == []


def test_predict_is_the_same_for_every_batch_size_and_keeps_marked_heat_maps() -> None:
    rng = np.random.default_rng(0)
    images = list(rng.integers(0, 256, (7, 32, 32)).astype(np.uint8))
    weights = rng.normal(0, 0.1, (3, 32 * 32)).astype(np.float32)

    def network(batch: np.ndarray) -> dict[str, np.ndarray]:
        assert batch.dtype == np.float32
        logits = batch.reshape(len(batch), -1) @ weights.T
        attention = np.abs(batch[:, 0, :8, :4]).reshape(-1, 2, 4, 4)
        return {"logits": logits, "attention": attention, "evidence": np.stack([logits, logits * 0.5], axis=2)}

    heat_classes = {1: 2, 5: None}
    whole = predict(network, images, temperature=2.0, heat_classes=heat_classes, batch=100)
    for size in (1, 3):
        parts = predict(network, images, temperature=2.0, heat_classes=heat_classes, batch=size)
        np.testing.assert_allclose(parts.probabilities, whole.probabilities, atol=1e-6)
        assert sorted(parts.heats) == [1, 5]
    for index, image in enumerate(images):
        outputs = network(normalize(image)[np.newaxis])
        exponents = np.exp(outputs["logits"][0].astype(np.float64) / 2)
        np.testing.assert_allclose(whole.probabilities[index], exponents / exponents.sum(), atol=1e-5)
        if index in heat_classes:
            wanted = 2 if index == 1 else int(outputs["logits"][0].argmax())
            expected = class_evidence_map(outputs["attention"][0], outputs["evidence"][0], wanted)
            np.testing.assert_allclose(whole.heats[index]["evidence"], expected, atol=1e-5)
            mean = mean_attention_map(outputs["attention"][0])
            np.testing.assert_allclose(whole.heats[index]["attention"], mean, atol=1e-6)


def test_an_output_folder_is_only_replaced_when_it_is_ours_and_told_to(tmp_path: Path) -> None:
    check_out(tmp_path / "new", False)
    out = tmp_path / "out"
    out.mkdir()
    check_out(out, False)
    (out / "metrics.json").write_text("{}")
    (out / "figures").mkdir()
    (out / "figures" / "roc.png").write_bytes(b"")
    with pytest.raises(UsageError, match="holds an earlier evaluation: add --force"):
        check_out(out, False)
    check_out(out, True)
    (out / "figures" / "mine.png").write_bytes(b"")
    with pytest.raises(UsageError, match=r"holds figures/mine\.png, so it is no earlier evaluation"):
        check_out(out, True)
    (out / "figures" / "mine.png").unlink()
    (out / "metrics.json").unlink()
    with pytest.raises(UsageError, match=r"holds no metrics\.json"):
        check_out(out, True)
    (tmp_path / "file").write_text("")
    with pytest.raises(UsageError, match="is a file"):
        check_out(tmp_path / "file", True)


def test_a_log_reads_as_numbers_or_none(tmp_path: Path) -> None:
    (tmp_path / "log.csv").write_text("epoch,validation_auc,best\n1,,1\n2,nan,0\n3,0.5,1\n")
    rows = read_log(tmp_path / "log.csv")
    assert [row["validation_auc"] for row in rows] == [None, None, 0.5]
    assert [row["epoch"] for row in rows] == [1.0, 2.0, 3.0]


def test_predictions_csv_survives_awkward_names() -> None:
    record = Record(Path('odd, "name"\n.png'), "a", "p;1", source="")
    data = Predictions(("a", "b,c"), (record,), np.array([-1]), np.array([[0.25, 0.75]]))
    row = next(csv.DictReader(predictions_csv(data).splitlines(keepends=True)))
    assert row["path"] == 'odd, "name"\n.png'
    assert (row["fold"], row["predicted"], row["probability_b,c"]) == ("", "b,c", "0.75")


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A tiny cross-validated run and its manifest, which has boxes for one of its two classes."""
    folder = tmp_path_factory.mktemp("evaluation")
    manifest = write_tiny_manifest(folder / "data", patients=24)
    config = resolve({**TINY, "data": str(manifest), "epochs": 2, "validation_fraction": 0.3})
    train(config, folder / "run", Processes(0, 1, torch.device("cpu")))
    return folder / "run", manifest


def read_predictions(out: Path) -> list[dict[str, str]]:
    with open(out / "predictions.csv", newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def check_localization_table(out: Path, found: dict[str, Any]) -> None:
    """Means of the table's lines, kept apart by method, are those of metrics.json."""
    with open(out / "localization.csv", newline="", encoding="utf-8") as file:
        lines = list(csv.DictReader(file))
    methods = {**found["maps"], **found["baselines"]}
    assert {line["method"] for line in lines} == set(methods)
    for name, row in methods.items():
        own = [line for line in lines if line["method"] == name]
        assert len(own) == found["predictions"]
        for column, score in (("iou", "iou_mean"), ("peak_inside", "pointing"), ("energy_inside", "energy_inside"),
                              ("mask_iou", "mask_iou_mean"), ("regions_iou", "regions_iou_mean")):  # fmt: skip
            assert sum(float(line[column]) for line in own) / len(own) == pytest.approx(row[score], abs=1e-5)


def test_every_image_is_predicted_by_the_one_model_that_never_saw_its_patient(
    run: tuple[Path, Path], tmp_path: Path
) -> None:
    folder, data = run
    metrics = evaluate(folder, data, tmp_path / "out", resamples=50)
    rows = read_predictions(tmp_path / "out")
    manifest, folds = read_manifest(data), load_folds(folder / "folds.json")
    assert sorted(row["path"] for row in rows) == sorted(str(record.path) for record in manifest.records)
    config = resolve({**TINY, "data": str(data), "epochs": 2, "validation_fraction": 0.3})
    for fold in range(3):
        split = folds.split(manifest, fold, validation_fraction=0.3, seed=config.seed)
        own = {row["path"] for row in rows if row["fold"] == str(fold)}
        assert own == {str(manifest.records[index].path) for index in split.test}
    model, info = load_model(folder / "fold1" / "best.pt")
    for row in rows:
        if row["fold"] == "1":
            image = preprocess(read_radiograph(row["path"]).pixels, info.preprocessing)
            with torch.no_grad():
                expected = torch.softmax(model(torch.from_numpy(image[np.newaxis])).logits.double(), dim=1)[0]
            for name, value in zip(info.classes, expected.tolist()):
                assert float(row[f"probability_{name}"]) == pytest.approx(value, abs=1e-4)
    assert metrics["data"]["evaluated_images"] == 24
    assert [fold["fold"] for fold in metrics["folds"]] == [0, 1, 2]
    assert metrics == json.loads((tmp_path / "out" / "metrics.json").read_text())
    localization = metrics["localization"]
    assert localization["images"] == 12
    assert "training-side" in localization["chosen_on"]
    assert set(localization["tuning_images"]) == {"0", "1", "2"}
    assert {"central_box", "random_map"} < set(localization["baselines"])
    figures = {path.name for path in (tmp_path / "out" / "figures").iterdir()}
    assert figures == {
        "confusion.png", "roc.png", "reliability.png", "localization.png", "localization_curves.png", "training.png"
    }  # fmt: skip
    check_localization_table(tmp_path / "out", localization)
    assert "Cross-validation" in (tmp_path / "out" / "report.html").read_text()


def test_a_fold_without_a_model_is_said_and_left_out(run: tuple[Path, Path], tmp_path: Path) -> None:
    folder, data = run
    partial = tmp_path / "partial"
    shutil.copytree(folder, partial)
    shutil.rmtree(partial / "fold2")
    metrics = evaluate(partial, data, tmp_path / "out", resamples=0)
    assert [fold["fold"] for fold in metrics["folds"]] == [0, 1]
    assert metrics["data"]["evaluated_images"] < 24
    assert any("are not evaluated" in note["text"] and note["level"] == "warning" for note in metrics["notes"])
    assert metrics["classification"]["accuracy"]["ci95"] is None
    one = evaluate(partial, data, tmp_path / "one", fold=1, resamples=0)
    assert [fold["fold"] for fold in one["folds"]] == [1]
    with pytest.raises(UsageError, match=r"--fold is 2: .* has models of folds 0, 1"):
        evaluate(partial, data, tmp_path / "two", fold=2)


def external_manifest(folder: Path, data: Path) -> Path:
    """Other images: 6 of patients whom the run has met (its own files), 5 of strangers, 1 of a strange class."""
    lines = data.read_text().splitlines()
    rows = [lines[0]]
    rows += [f"{data.parent}/{line}" for line in lines[1:7]]
    rng = np.random.default_rng(5)
    folder.mkdir()
    for number in range(6):
        cv2.imwrite(str(folder / f"new{number}.png"), rng.integers(0, 255, (90, 70)).astype(np.uint8))
        label = ("blob", "plain")[number % 2] if number < 5 else "other"
        rows.append(f"new{number}.png,{label},stranger{number},,,,")
    (folder / "manifest.csv").write_text("\n".join(rows) + "\n")
    return folder / "manifest.csv"


def test_on_another_manifest_no_model_predicts_a_patient_it_has_seen(run: tuple[Path, Path], tmp_path: Path) -> None:
    folder, data = run
    other = external_manifest(tmp_path / "other", data)
    metrics = evaluate(folder, other, tmp_path / "out", resamples=20)
    rows = read_predictions(tmp_path / "out")
    assignment = load_folds(folder / "folds.json").assignment
    for row in rows:
        assert assignment.get(row["patient"], int(row["fold"])) == int(row["fold"])
    of_strangers = [row for row in rows if row["patient"].startswith("stranger")]
    assert len(of_strangers) == 6 * 3
    assert len(rows) == 6 * 3 + 6
    texts = [note["text"] for note in metrics["notes"]]
    assert any(text.startswith("6 images are of 6 patients who are in the training data") for text in texts)
    assert any("classes that the model does not know (other)" in text for text in texts)
    assert np.array(metrics["confusion"]["counts"]).sum() == 5 * 3 + 6
    assert "training-side" in metrics["localization"]["chosen_on"]  # the run's own manifest is still there


def test_thresholds_come_from_the_other_patients_where_the_training_data_are_gone(
    run: tuple[Path, Path], tmp_path: Path
) -> None:
    folder, data = run
    moved = tmp_path / "moved"
    shutil.copytree(folder, moved)
    text = (moved / "config.yaml").read_text()
    (moved / "config.yaml").write_text(text.replace(str(data), str(tmp_path / "gone.csv")))
    other = external_manifest(tmp_path / "other", data)
    metrics = evaluate(moved, other, tmp_path / "out", resamples=0, map_name="evidence")
    assert "leave one patient out" in metrics["localization"]["chosen_on"] or (
        "only one patient" in metrics["localization"]["chosen_on"]
    )
    assert metrics["localization"]["map"] == "evidence"
    assert metrics["localization"]["tuning_images"] == {}


@contextmanager
def fake_network(bundle: Bundle, device: str) -> Iterator[tuple[Callable[..., Any], str]]:
    def network(batch: np.ndarray) -> dict[str, np.ndarray]:
        bright = batch.max(axis=(1, 2, 3))
        logits = np.stack([bright, 3 - bright], axis=1)
        attention = np.maximum(batch[:, :, ::16, ::16], 0).repeat(2, axis=1)
        return {"logits": logits, "attention": attention, "evidence": np.stack([logits / 2] * 2, axis=2)}

    yield network, "fake (cpu)"


def test_a_bundle_is_judged_with_its_own_map_threshold_and_temperature(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = write_tiny_manifest(tmp_path / "data", patients=12)
    training = {"training": {"data": {"digest": read_manifest(data).digest()}}}
    bundle = Bundle(
        tmp_path, training, "chest", "1", ("blob", "plain"), PreprocessingSpec(size=64), Calibration(2.0),
        {"map": "evidence", "threshold": 0.41, "chosen_on": "phantoms"}, "0" * 64,
    )  # fmt: skip
    monkeypatch.setattr("magsd.evaluation.open_target", lambda path: bundle)
    monkeypatch.setattr(judging, "bundle_network", fake_network)
    metrics = evaluate(tmp_path / "bundle", data, tmp_path / "out", resamples=20)
    assert metrics["target"]["kind"] == "bundle"
    assert metrics["localization"]["map"] == "evidence"
    assert metrics["localization"]["threshold"] == pytest.approx(0.41)
    assert metrics["localization"]["chosen_on"] == "the bundle's threshold (phantoms)"
    assert metrics["localization"]["minimum_score"] == 0
    assert [fold["fold"] for fold in metrics["folds"]] == [None]
    assert any("trained on this very manifest" in note["text"] for note in metrics["notes"])
    row = read_predictions(tmp_path / "out")[0]
    spec = bundle.preprocessing
    with fake_network(bundle, "cpu") as (network, _):
        logits = network(preprocess(read_radiograph(row["path"]).pixels, spec)[np.newaxis])["logits"][0]
    expected = 1 / (1 + np.exp((logits[1] - logits[0]) / 2.0))
    assert float(row["probability_blob"]) == pytest.approx(expected, abs=1e-5)
    assert row["fold"] == ""
    with pytest.raises(UsageError, match="--fold is for a run"):
        evaluate(tmp_path / "bundle", data, tmp_path / "again", fold=0)


def test_a_bundle_is_judged_with_its_own_minimum_score(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = write_tiny_manifest(tmp_path / "data", patients=12)
    where = {"map": "evidence", "threshold": 0.2, "minimum_score": 0.8, "chosen_on": "phantoms"}
    training = {"training": {"data": {"digest": "another"}}}
    bundle = Bundle(
        tmp_path, training, "chest", "1", ("blob", "plain"), PreprocessingSpec(size=64), Calibration(), where, "0" * 64
    )
    monkeypatch.setattr("magsd.evaluation.open_target", lambda path: bundle)
    monkeypatch.setattr(judging, "bundle_network", fake_network)
    found = {}
    for name, minimum in (("own", None), ("same", 0.8), ("none", 0.0)):
        result = evaluate(tmp_path / "bundle", data, tmp_path / name, resamples=20, minimum_score=minimum)
        found[name] = result["localization"]
        assert found[name]["threshold"] == pytest.approx(0.2)
    assert found["own"] == found["same"]
    assert (found["own"]["minimum_score"], found["own"]["chosen_on"]) == (0.8, "the bundle's threshold (phantoms)")
    assert found["none"]["minimum_score"] == 0
    assert found["none"]["chosen_on"] == "the bundle's threshold (phantoms); its own minimum score is 0.8"
    assert found["none"]["mask_iou_mean"] != found["own"]["mask_iou_mean"]
    assert found["none"]["baselines"]["central_box"] == found["own"]["baselines"]["central_box"]
    assert "reaches 0.8" in (tmp_path / "own" / "report.html").read_text()
    assert "reaches" not in (tmp_path / "none" / "report.html").read_text()
    for wrong in (-0.1, 1.01, float("nan")):
        with pytest.raises(UsageError, match=r"--minimum-score is .*: expected 0 to 1"):
            evaluate(tmp_path / "bundle", data, tmp_path / "again", minimum_score=wrong)


def test_the_command_prints_a_table_or_json_and_refuses_to_overwrite(
    run: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, data = run
    command = ["evaluate", str(folder), "--data", str(data), "--out", str(tmp_path / "out"), "--bootstrap", "10"]
    assert main(command) == 0
    shown = capsys.readouterr()
    assert "accuracy" in shown.out
    assert "central box" in shown.out
    assert "report.html" in shown.out
    assert main([*command, "--json"]) == 2
    assert "--force" in capsys.readouterr().err
    assert main([*command, "--json", "--force", "--quiet"]) == 0
    shown = capsys.readouterr()
    value = json.loads(shown.out)
    assert set(value["classification"]) == set(SCORES)
    assert value["localization"]["minimum_score"] == 0
    assert shown.err == ""
    assert main([*command, "--force", "--minimum-score", "0.9", "--quiet"]) == 0
    assert "regions that reach 0.9)" in capsys.readouterr().out
    assert json.loads((tmp_path / "out" / "metrics.json").read_text())["localization"]["minimum_score"] == 0.9
    assert main([*command, "--force", "--minimum-score", "2"]) == 2
    assert "--minimum-score is 2: expected 0 to 1" in capsys.readouterr().err
    assert main(["evaluate", str(tmp_path), "--data", str(data), "--out", str(tmp_path / "no")]) == 2
    assert "neither a run nor a bundle" in capsys.readouterr().err


def test_a_failure_leaves_an_earlier_evaluation_whole(
    run: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, data = run
    out = tmp_path / "out"
    evaluate(folder, data, out, resamples=0)
    before = {path.relative_to(out): path.read_bytes() for path in out.rglob("*") if path.is_file()}

    def fail(folder: Path, *_: object) -> None:
        folder.mkdir()
        raise RuntimeError("disk full")

    monkeypatch.setattr("magsd.evaluation_output._write_figures", fail)
    with pytest.raises(RuntimeError, match="disk full"):
        evaluate(folder, data, out, resamples=0, force=True)
    assert {path.relative_to(out): path.read_bytes() for path in out.rglob("*") if path.is_file()} == before
    assert [path.name for path in tmp_path.iterdir()] == ["out"]

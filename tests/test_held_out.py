"""Export calibrates on the held-out predictions of an evaluation, and on nothing else."""

from __future__ import annotations

import csv
import io
import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import magsd_export.bundling as bundling
from magsd.checkpoint import CheckpointInfo, load_checkpoint, load_model, save_checkpoint
from magsd.cli import main
from magsd.evaluation import evaluate
from magsd.folds import FINAL, load_folds
from magsd_export.bundling import build_bundle
from magsd_export.held_out import held_out_calibration, read_held_out
from magsd_export.sources import Source, find_checkpoint
from magsd_runtime.bundle import load_bundle
from magsd_runtime.calibration import fit_temperature, probabilities
from magsd_runtime.conformal import minimum_probabilities
from magsd_runtime.errors import CalibrationError, UsageError
from magsd_runtime.images import read_radiograph
from magsd_runtime.preprocessing import preprocess
from tiny_export import write_run
from tiny_run import write_tiny_manifest

SCORES = {fold: {"loss": 0.5, "accuracy": 0.8, "auc": 0.8 + fold / 100} for fold in range(3)}
Rows = list[dict[str, str]]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of three folds, never trained, on 80 patients of two classes."""
    folder = tmp_path_factory.mktemp("place")
    write_tiny_manifest(folder / "data", patients=80)
    made = write_run(folder / "run", folder / "data", SCORES)
    (made / "manifest.json").write_text(json.dumps(info_of(made).data))
    return made


@pytest.fixture(scope="module")
def raw(run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What magsd evaluate leaves of it."""
    out = tmp_path_factory.mktemp("evaluation") / "raw"
    evaluate(run, run.parent / "data" / "manifest.csv", out, resamples=2)
    return out


@pytest.fixture
def report(raw: Path, tmp_path: Path) -> Path:
    """The same with the logits of a network that has learnt something."""
    folder = Path(shutil.copytree(raw, tmp_path / "report"))
    rng = np.random.default_rng(2)

    def better(rows: Rows) -> None:
        for row in rows:
            for name in ("blob", "plain"):
                row[f"logit_{name}"] = f"{2 * (rng.normal() + (row['label'] == name)):.9g}"

    edit(folder, better)
    return folder


def edit(folder: Path, change: Callable[[Rows], object]) -> None:
    path = folder / "predictions.csv"
    rows = read(folder)
    change(rows)
    text = io.StringIO()
    table = csv.DictWriter(text, list(rows[0]), lineterminator="\n")
    table.writeheader()
    table.writerows(rows)
    path.write_text(text.getvalue())


def edit_metrics(folder: Path, part: str, **values: Any) -> None:
    path = folder / "metrics.json"
    metrics = json.loads(path.read_text())
    metrics[part].update(values)
    path.write_text(json.dumps(metrics))


def read(folder: Path) -> Rows:
    with open(folder / "predictions.csv", newline="") as file:
        return list(csv.DictReader(file))


def info_of(run: Path, fold: int = 1) -> CheckpointInfo:
    return load_checkpoint(run / f"fold{fold}" / "best.pt")[1]


def source_of(run: Path, fold: int = 1) -> Source:
    return find_checkpoint(run, fold)


@pytest.fixture(scope="module")
def model(run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_bundle(run, tmp_path_factory.mktemp("out") / "b", fold=1, images=0).bundle.model_path


@pytest.fixture
def quick(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The exporter replaced by a copy of what it wrote for fold 1."""
    monkeypatch.setattr(bundling, "export_onnx", lambda _model, _spec, path, _metadata, **_: shutil.copy(model, path))


def test_evaluate_writes_every_logit_to_its_last_bit(run: Path, raw: Path) -> None:
    rows = read(raw)
    assert len(rows) == 80
    model, info = load_model(run / "fold2" / "best.pt")
    for row in rows:
        logits = np.array([[float(row["logit_blob"]), float(row["logit_plain"])]])
        shown = [float(row["probability_blob"]), float(row["probability_plain"])]
        assert shown == pytest.approx(probabilities(logits)[0], rel=1e-5)
        assert [f"{np.float32(value):.9g}" for value in logits[0]] == [row["logit_blob"], row["logit_plain"]]
        if row["fold"] == "2":
            image = preprocess(read_radiograph(row["path"]).pixels, info.preprocessing)
            with torch.inference_mode():
                expected = model(torch.from_numpy(image[np.newaxis])).logits[0].numpy()
            assert logits[0] == pytest.approx(expected, abs=1e-4)


def test_export_fits_the_held_out_predictions(
    run: Path, report: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "bundle"
    arguments = ["export", str(run), "--fold", "1", "--out", str(out), "--images", "2", "--evaluation", str(report)]
    assert main([*arguments, "--positive", "blob", "--coverage", "0.8"]) == 0
    text = capfd.readouterr().out
    rows = read(report)
    logits = np.array([[float(row["logit_blob"]), float(row["logit_plain"])] for row in rows])
    labels = np.array([["blob", "plain"].index(row["label"]) for row in rows])
    bundle = load_bundle(out)
    calibration = bundle.calibration
    assert calibration.fitted
    assert calibration.temperature == fit_temperature(logits, labels).temperature
    assert calibration.model_sha256 == bundle.model_sha256
    assert calibration.source == "held-out predictions of test folds 0, 1, 2 of the run that this model is fold 1 of"
    assert calibration.data is not None
    assert calibration.data.digest == bundle.manifest["training"]["data"]["digest"]
    assert (calibration.data.images, calibration.data.patients) == (80, 80)
    assert (calibration.positive_class, calibration.default) == ("blob", "sensitivity_90")
    assert [point.name for point in calibration.operating_points] == ["sensitivity_90", "sensitivity_95"]
    assert f"{calibration.temperature:.3f}" in text
    assert "positive for blob where its probability" in text
    expected = minimum_probabilities(
        probabilities(logits, calibration.temperature), labels, [row["patient"] for row in rows], 0.8
    )
    assert expected is not None
    assert calibration.sets is not None
    assert (calibration.sets.coverage, list(calibration.sets.minimum_probability.values())) == (0.8, list(expected))
    assert "a class is possible, at 80 % coverage" in text
    card = (out / "MODEL_CARD.md").read_text()
    assert f"Temperature {calibration.temperature:.3f}, fitted on 80 images of 80 patients: held-out" in card
    assert card.count("## Calibration") == 1
    for path in out.rglob("*.*"):
        if path.is_file():
            assert str(report).encode() not in path.read_bytes()
    assert main(["verify", str(out)]) == 0
    assert main(["infer", rows[0]["path"], "--bundle", str(out), "--json"]) == 0
    decision = json.loads(capfd.readouterr().out.splitlines()[-1])["decision"]
    assert (decision["positive_class"], decision["threshold"]) == ("blob", calibration.operating_points[0].threshold)


@pytest.mark.usefixtures("quick")
def test_the_final_model_takes_the_calibration_of_its_folds(run: Path, report: Path, tmp_path: Path) -> None:
    whole = Path(shutil.copytree(run, tmp_path / "run"))
    network, info = load_model(run / "fold1" / "best.pt")  # whose export is at hand
    (whole / "final").mkdir()
    save_checkpoint(whole / "final" / "best.pt", replace(info, fold=FINAL), network)
    built = build_bundle(whole, tmp_path / "b", fold=FINAL, images=0, evaluation=report, positive="plain")
    assert built.bundle.calibration.source == (
        "held-out folds of the same recipe: cross-validation, test folds 0, 1, 2; this model was trained on all folds"
    )
    assert built.notes == ()
    # alone in its folder, it needs to be told where its cross-validation is
    alone = tmp_path / "elsewhere"
    alone.mkdir()
    shutil.copy(whole / "final" / "best.pt", alone / "best.pt")
    found = build_bundle(alone / "best.pt", tmp_path / "c", images=0, calibration=report / "predictions.csv")
    assert found.bundle.temperature == built.bundle.temperature
    assert "same recipe" in found.bundle.calibration.source
    assert found.notes == ("no operating points: no class was named by --positive (blob, plain)",)


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda rows: [row.pop("logit_blob") for row in rows],
            "predictions.csv has no logit_blob: evaluate the run again",
        ),
        (
            lambda rows: rows.__delitem__(slice(30, None)),
            "20 patients of every class of the model are needed, and blob has",
        ),
    ],
)
def test_an_evaluation_that_cannot_calibrate_leaves_the_bundle_uncalibrated(
    run: Path, report: Path, tmp_path: Path, change: Callable[[Rows], object], message: str
) -> None:
    edit(report, change)
    built = build_bundle(run, tmp_path / "b", fold=1, images=0, evaluation=report, positive="blob")
    record = built.bundle.manifest["calibration"]
    assert (record["temperature"], record["fitted"], record["operating_points"]) == (1.0, False, {})
    assert message in record["source"]
    assert str(tmp_path) not in record["source"]
    assert built.notes[0].startswith(f"probabilities are not calibrated: --evaluation {report}: ")
    assert f"None (not fitted: {record['source'][12:]})" in (built.bundle.path / "MODEL_CARD.md").read_text()
    with pytest.raises(CalibrationError, match=f"--calibration {report}: .*{message}"):
        build_bundle(run, tmp_path / "c", fold=1, images=0, calibration=report)
    assert not (tmp_path / "c").exists()


def calibrated(run: Path, report: Path, **keywords: Any) -> Any:
    return held_out_calibration(info_of(run), source_of(run), **{"evaluation": None, "calibration": report, **keywords})


def test_an_image_that_a_model_was_trained_on_is_no_case(run: Path, report: Path) -> None:
    """One fold number changed: that patient was in the training of the model that is now said to have judged it."""
    edit(report, lambda rows: rows[7].update(fold=str((int(rows[7]["fold"]) + 1) % 3)))
    message = r"1 images were judged by a model that was trained on images of the same patients \(1\)"
    with pytest.raises(UsageError, match=f"--calibration {report}: {message}"):
        calibrated(run, report)
    with pytest.raises(UsageError, match=f"--evaluation {report}: {message}"):
        calibrated(run, report, evaluation=report, calibration=None)
    # without the run beside it, only what the predictions say of each other is known
    edit_metrics(report, "target", path="/nowhere")
    cases, _ = read_held_out(report, info_of(run), source_of(run), "it", own=False)
    assert len(cases.labels) == 80
    edit(report, lambda rows: rows[7].update(patient=next(r["patient"] for r in rows if r["fold"] != rows[7]["fold"])))
    with pytest.raises(UsageError, match=r"2 images were judged .* \(1\)"):
        read_held_out(report, info_of(run), source_of(run), "it", own=False)


def test_every_prediction_is_of_the_model_that_never_saw_the_patient(run: Path, report: Path) -> None:
    """The guard's premise, against the folds themselves."""
    assignment = load_folds(run / "folds.json").assignment
    assert all(assignment[row["patient"]] == int(row["fold"]) for row in read(report))


@pytest.mark.parametrize(
    ("part", "values", "message"),
    [
        ("target", {"kind": "bundle"}, "is of a bundle, which does not know the images that it was trained on"),
        ("target", {"classes": ["a", "b"]}, "of another recipe: its classes"),
        ("target", {"preprocessing_sha256": "0" * 64}, "of another recipe: its preprocessing_sha256"),
        ("target", {"backbone": "resnet50"}, "of another recipe: its backbone is resnet50"),
        ("target", {"epochs": 99}, "of another recipe: its epochs is 99"),
        ("target", {"attention_augmentation": []}, "of another recipe: its attention_augmentation"),
        ("data", {"digest": "0" * 64}, "of another manifest than the training"),
    ],
)
def test_predictions_of_another_model_or_other_data_are_refused(
    run: Path, report: Path, part: str, values: dict[str, Any], message: str
) -> None:
    edit_metrics(report, part, **values)
    with pytest.raises(UsageError, match=message):
        calibrated(run, report)


@pytest.mark.parametrize(
    "values",
    [{"fold": ""}, {"fold": "-1"}, {"fold": "x"}, {"label": "other"}, {"logit_blob": "nan"}, {"logit_plain": ""}],
)
def test_lines_that_are_no_held_out_prediction_are_refused(run: Path, report: Path, values: dict[str, str]) -> None:
    edit(report, lambda rows: rows[3].update(values))
    with pytest.raises(UsageError, match=r"predictions\.csv line 5 is no prediction of a cross-validation"):
        calibrated(run, report)


def test_an_image_counts_once(run: Path, report: Path) -> None:
    edit(report, lambda rows: rows.append(dict(rows[0])))
    with pytest.raises(UsageError, match=r"line 82 .* an image is there twice"):
        calibrated(run, report)


def test_what_is_no_evaluation_and_wishes_without_one(run: Path, report: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"no metrics\.json there"):
        calibrated(run, tmp_path)
    (report / "predictions.csv").unlink()
    with pytest.raises(CalibrationError, match=r"the evaluation holds no predictions\.csv"):
        calibrated(run, report)
    with pytest.raises(UsageError, match="--positive needs held-out predictions"):
        calibrated(run, report, calibration=None, positive="blob")
    with pytest.raises(UsageError, match="--positive is 'flu'"):
        calibrated(run, report, positive="flu")
    assert calibrated(run, report, calibration=None)[0].to_dict() == {
        "temperature": 1.0, "fitted": False, "operating_points": {},
    }  # fmt: skip

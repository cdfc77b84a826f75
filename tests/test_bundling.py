"""A checkpoint becomes a bundle, or nothing: contents, proof, what is taken from the run, what is refused."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import torch
from torch import nn

import magsd_export.bundling as bundling
from magsd.checkpoint import load_checkpoint
from magsd.data import read_manifest
from magsd.folds import load_folds
from magsd_export.bundling import Built, build_bundle, git_commit
from magsd_export.golden import golden_images, write_golden
from magsd_export.sources import (
    DEFAULT_LOCALIZATION,
    Source,
    find_checkpoint,
    localization,
    read_evaluation,
    real_images,
)
from magsd_export.to_onnx import export_onnx
from magsd_runtime.backends import open_backend
from magsd_runtime.bundle import load_bundle
from magsd_runtime.bundle_writing import list_files
from magsd_runtime.errors import CheckpointError, DataError, UsageError, VerificationError
from magsd_runtime.pipeline import Pipeline
from magsd_runtime.preprocessing import preprocess
from magsd_runtime.verification import preprocessed_sha256, verify_bundle
from tiny_export import write_run

ROOT = Path(__file__).resolve().parents[1]
SCORES = {
    0: {"loss": 0.9, "accuracy": 0.6, "auc": 0.70},
    1: {"loss": 0.4, "accuracy": 0.8, "auc": 0.95},
    2: {"loss": 0.3, "accuracy": 0.9, "auc": 0.90},
}


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with three folds, never trained, and its data beside it."""
    folder = tmp_path_factory.mktemp("secret-place")
    return write_run(folder / "run", folder / "data", SCORES)


@pytest.fixture(scope="module")
def built(run: Path, tmp_path_factory: pytest.TempPathFactory) -> Built:
    return build_bundle(run, tmp_path_factory.mktemp("out") / "bundle", version="2.1", images=9)


@pytest.fixture
def quick(built: Built, monkeypatch: pytest.MonkeyPatch) -> None:
    """The exporter replaced by a copy of what it wrote before: for tests of everything else."""
    model = built.bundle.model_path
    monkeypatch.setattr(bundling, "export_onnx", lambda _model, _spec, path, _metadata, **_: shutil.copy(model, path))


def test_bundle_holds_what_it_lists_and_the_runtime_accepts_it(built: Built) -> None:
    bundle = load_bundle(built.bundle.path)
    on_disk = {path.relative_to(bundle.path).as_posix() for path in bundle.path.rglob("*") if path.is_file()}
    assert on_disk == {"bundle.json", *bundle.manifest["files"]}
    assert {"model.onnx", "MODEL_CARD.md", "golden/expected.npz", "golden/expected.json"} <= on_disk
    for name, facts in bundle.manifest["files"].items():
        content = (bundle.path / name).read_bytes()
        assert facts == {"sha256": hashlib.sha256(content).hexdigest(), "size": len(content)}
    assert bundle.classes == ("blob", "plain")
    assert (bundle.name, bundle.version) == ("magsd-test_efficientnet", "2.1")
    assert bundle.localization == DEFAULT_LOCALIZATION
    with open_backend(bundle, "cpu") as backend:
        assert verify_bundle(bundle, backend).passed


def test_manifest_has_the_fields_of_the_contract(built: Built) -> None:
    manifest = built.bundle.manifest
    assert set(manifest) == {
        "schema", "magsd_version", "created", "model", "classes", "preprocessing", "preprocessing_sha256", "inputs",
        "outputs", "calibration", "localization", "training", "intended_use", "licence", "versions", "git_commit",
        "verification", "files",
    }  # fmt: skip
    assert manifest["inputs"] == [{"name": "image", "dtype": "float32", "shape": ["N", 1, 64, 64]}]
    assert {output["name"]: output["shape"] for output in manifest["outputs"]} == {
        "logits": ["N", 2], "attention": ["N", 4, 2, 2], "evidence": ["N", 2, 4], "embedding": ["N", 64],
    }  # fmt: skip
    assert manifest["calibration"] == {"temperature": 1.0, "fitted": False, "operating_points": {}}
    training = manifest["training"]
    assert (training["fold"], training["epoch"], training["validation"]) == (1, 2, SCORES[1])
    assert training["data"]["images_per_class"] == {"blob": 12, "plain": 12}
    assert training["evaluation"] is None
    assert {"torch", "onnx", "onnxruntime", "opencv", "numpy", "python"} <= set(manifest["versions"])
    assert manifest["model"]["architecture"]["parameters"] > 10_000
    verification = manifest["verification"]
    assert verification["passed"]
    assert verification["inputs"]["real"]["images"] == 9
    assert verification["inputs"]["real"]["source"] == "test and validation images of the run, fold 1"
    assert verification["inputs"]["real"]["skipped"] == 0
    for row in verification["worst_differences"].values():
        assert 0 <= row["share_of_tolerance"] <= 1


def test_bundle_names_no_path_and_no_image_of_the_machine(built: Built, run: Path) -> None:
    for path in built.bundle.path.rglob("*"):
        if not path.is_file() or path.suffix == ".png":
            continue
        content = path.read_bytes()
        for place in (run, run.parent, Path.home(), Path.cwd(), built.bundle.path):
            assert str(place).encode() not in content, (path, place)
        assert b"secret-place" not in content, path
        for record in read_manifest(run.parent / "data" / "manifest.csv").records:
            assert record.path.name.encode() not in content, (path, record.path)


def test_model_card_says_what_a_reader_must_know(built: Built) -> None:
    card = (built.bundle.path / "MODEL_CARD.md").read_text(encoding="utf-8")
    for text in (
        "Research use only", "blob, plain", "| blob | 12 |", "24 images of 24 patients", "auc 0.9500",
        "No test results were given", "stretch to 64 x 64", "not a radiologist's finding", "Apache-2.0",
        "probabilities are as the network gives them", "fold 1 of 3", "9 radiographs",
    ):  # fmt: skip
        assert text in card, text


def test_bundle_predicts_what_torch_predicts(built: Built) -> None:
    """From the file to the logits by hand, against the runtime's pipeline."""
    from magsd.checkpoint import load_model

    model, info = load_model(built.source.checkpoint)
    with Pipeline.open(built.bundle.path, "cpu") as pipeline:
        for path in sorted((built.bundle.path / "golden").glob("*.png")):
            prediction = pipeline.predict(path).prediction
            pixels = cv2.imread(str(path), cv2.IMREAD_GRAYSCALE)
            assert pixels is not None
            image = preprocess(np.asarray(pixels, np.uint8), info.preprocessing)
            with torch.no_grad():
                wanted = torch.softmax(model(torch.from_numpy(image[np.newaxis])).logits.double(), 1)[0].numpy()
            assert prediction.probabilities is not None
            np.testing.assert_allclose(list(prediction.probabilities.values()), wanted, atol=1e-4)
            assert prediction.label == info.classes[int(wanted.argmax())]


def test_verify_needs_no_torch(built: Built) -> None:
    program = (
        "import sys\nfrom magsd.cli import main\n"
        "code = main(['verify', sys.argv[1]])\n"
        "heavy = {'torch', 'onnx', 'timm', 'magsd_export', 'magsd.checkpoint'} & set(sys.modules)\n"
        "sys.exit(f'imported {heavy}' if heavy else code)\n"
    )
    paths = os.pathsep.join(str(ROOT / part) for part in ("", "export", "runtime"))
    process = subprocess.run(
        [sys.executable, "-c", program, str(built.bundle.path)],
        env={**os.environ, "PYTHONPATH": paths}, capture_output=True, text=True,
    )  # fmt: skip
    assert process.returncode == 0, process.stdout + process.stderr
    assert "PASSED" in process.stdout


# Publishing: all or nothing.


def spoilt_exporter(spoil: Any) -> Any:
    """The real exporter, given a network that ``spoil`` has changed."""

    def export(model: nn.Module, spec: Any, path: Path, metadata: dict[str, str], **_: Any) -> None:
        import copy

        changed = copy.deepcopy(model)
        with torch.no_grad():
            spoil(changed)
        export_onnx(changed, spec, path, metadata)

    return export


def test_failed_parity_names_the_output_and_leaves_nothing(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def half_a_percent_more(model: Any) -> None:
        model.classifier.weight *= 1.005

    monkeypatch.setattr(bundling, "export_onnx", spoilt_exporter(half_a_percent_more))
    with pytest.raises(VerificationError, match=r"logits differs by .* for input .*allowed") as caught:
        build_bundle(run, tmp_path / "bundle")
    assert caught.value.exit_code == 5
    assert list(tmp_path.iterdir()) == []


@pytest.mark.usefixtures("quick")
def test_an_existing_folder_is_refused_and_a_bundle_replaced_with_force(
    built: Built, run: Path, tmp_path: Path
) -> None:
    out = tmp_path / "bundle"
    shutil.copytree(built.bundle.path, out)
    (out / "stale").write_text("of the old bundle")
    with pytest.raises(UsageError, match="exists: add --force"):
        build_bundle(run, out)
    again = build_bundle(run, out, name="other", force=True)
    assert again.bundle.name == "other"
    assert not (out / "stale").exists()
    assert [path.name for path in tmp_path.iterdir()] == ["bundle"]


@pytest.mark.usefixtures("quick")
def test_a_failure_with_force_keeps_the_old_bundle(
    built: Built, run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "bundle"
    shutil.copytree(built.bundle.path, out)
    before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}

    def fail(folder: Path) -> None:
        raise VerificationError("as if the golden inputs had failed")

    monkeypatch.setattr(bundling, "prove", fail)
    with pytest.raises(VerificationError, match="as if"):
        build_bundle(run, out, force=True)
    assert {path: path.read_bytes() for path in out.rglob("*") if path.is_file()} == before
    assert [path.name for path in tmp_path.iterdir()] == ["bundle"]


@pytest.mark.usefixtures("quick")
def test_if_the_last_rename_fails_the_old_bundle_is_put_back(
    built: Built, run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "bundle"
    shutil.copytree(built.bundle.path, out)
    rename = os.rename

    def fails_at_the_end(source: Any, target: Any) -> None:
        if Path(target) == out and str(source).endswith(".new"):
            raise OSError("the disk is gone")
        rename(source, target)

    monkeypatch.setattr(os, "rename", fails_at_the_end)
    with pytest.raises(OSError, match="the disk is gone"):
        build_bundle(run, out, force=True)
    assert load_bundle(out).model_sha256 == built.bundle.model_sha256
    assert [path.name for path in tmp_path.iterdir()] == ["bundle"]


def test_force_replaces_nothing_but_a_bundle(run: Path, tmp_path: Path) -> None:
    home = tmp_path / "home"
    home.mkdir()
    (home / "thesis.txt").write_text("years of work")
    file = tmp_path / "file"
    file.write_text("x")
    link = tmp_path / "link"
    link.symlink_to(home)
    for out in (home, file, link):
        with pytest.raises(UsageError, match="is no bundle"):
            build_bundle(run, out, force=True)
    assert (home / "thesis.txt").read_text() == "years of work"


def test_golden_inputs_that_fail_stop_the_bundle(built: Built, tmp_path: Path) -> None:
    folder = tmp_path / "bundle"
    shutil.copytree(built.bundle.path, folder)
    name = next(iter(json.loads((folder / "golden" / "expected.json").read_text())))
    with np.load(folder / "golden" / "expected.npz") as file:
        arrays = {key: file[key] for key in file.files}
    arrays[f"{name}/logits"] = arrays[f"{name}/logits"] + 1
    keywords: dict[str, Any] = dict(arrays)
    np.savez(folder / "golden" / "expected.npz", **keywords)
    manifest = json.loads((folder / "bundle.json").read_text())
    manifest["files"] = list_files(folder)
    (folder / "bundle.json").write_text(json.dumps(manifest))
    with pytest.raises(VerificationError, match=f"golden inputs \\({name}\\)"):
        bundling.prove(folder)


@pytest.mark.parametrize(
    ("option", "value"), [("name", "a/b"), ("name", ""), ("name", "x" * 65), ("version", "1 0"), ("images", -1)]
)
def test_impossible_names_and_numbers_are_refused(run: Path, tmp_path: Path, option: str, value: Any) -> None:
    with pytest.raises(UsageError, match="--"):
        build_bundle(run, tmp_path / "bundle", **{option: value})
    assert list(tmp_path.iterdir()) == []


def test_out_below_a_file_is_refused(run: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(UsageError, match="no folder can be made there"):
        build_bundle(run, tmp_path / "file" / "bundle")


# Which checkpoint.


def test_the_best_validation_score_chooses_the_fold(run: Path) -> None:
    source = find_checkpoint(run)
    assert source.checkpoint == run / "fold1" / "best.pt"
    assert "best validation auc of 3 folds (0.9500)" in source.reason
    assert "no test score" in source.reason
    assert find_checkpoint(run, 2).checkpoint == run / "fold2" / "best.pt"
    assert find_checkpoint(run / "fold0").checkpoint == run / "fold0" / "best.pt"
    assert find_checkpoint(run / "fold0" / "best.pt").run == run


@pytest.mark.parametrize(
    ("select", "scores", "best"),
    [
        ("loss", SCORES, 2),
        ("accuracy", SCORES, 2),
        ("auc", {**SCORES, 0: {"loss": 0.1, "accuracy": 0.99, "auc": None}}, 0),
        ("auc", {0: {"loss": 0.5, "accuracy": 0.5, "auc": 0.9}, 1: {"loss": 0.4, "accuracy": 0.5, "auc": 0.9}}, 1),
        ("auc", {0: {"loss": 0.5, "accuracy": 0.5, "auc": 0.9}, 1: {"loss": 0.5, "accuracy": 0.5, "auc": 0.9}}, 0),
    ],
)
def test_the_score_is_the_one_that_chose_the_epoch(
    tmp_path: Path, select: str, scores: dict[int, dict[str, Any]], best: int
) -> None:
    made = write_run(tmp_path / "run", tmp_path / "data", scores, select=select)
    assert find_checkpoint(made).checkpoint.parent.name == f"fold{best}"


def test_what_is_no_run_is_said(run: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no such run or checkpoint"):
        find_checkpoint(tmp_path / "nowhere")
    with pytest.raises(UsageError, match="is not a run of magsd train"):
        find_checkpoint(tmp_path)
    (tmp_path / "config.yaml").write_text("epochs: 3\n")
    with pytest.raises(UsageError, match=r"no fold with a best\.pt yet"):
        find_checkpoint(tmp_path)
    with pytest.raises(UsageError, match=r"--fold 7: .* has fold 0, fold 1, fold 2"):
        find_checkpoint(run, 7)
    with pytest.raises(UsageError, match="goes with a run folder"):
        find_checkpoint(run / "fold0" / "best.pt", 0)
    weights = tmp_path / "best.safetensors"
    weights.write_bytes(b"x")
    with pytest.raises(UsageError, match=r"weights only: export the best\.pt"):
        find_checkpoint(weights)
    damaged = tmp_path / "best.pt"
    damaged.write_bytes((run / "fold0" / "best.pt").read_bytes()[:5000])
    with pytest.raises(CheckpointError):
        build_bundle(damaged, tmp_path / "bundle")


# Which images, and what is known of the run.


def info_of(run: Path, fold: int = 1) -> Any:
    return load_checkpoint(run / f"fold{fold}" / "best.pt")[1]


def test_own_images_are_the_test_and_validation_parts(run: Path) -> None:
    info = info_of(run)
    images = real_images(Source(run / "fold1" / "best.pt", run, ""), info, None, 1000)
    manifest = read_manifest(run.parent / "data" / "manifest.csv")
    split = load_folds(run / "folds.json").split(
        manifest, 1, validation_fraction=info.config.validation_fraction, seed=info.config.seed
    )
    used = {record.path for record in images.records}
    assert used == {manifest.records[index].path for index in (*split.test, *split.validation)}
    assert not used & {manifest.records[index].path for index in split.train}
    limited = real_images(Source(run / "fold1" / "best.pt", run, ""), info, None, 4).records
    assert sorted(record.label for record in limited) == ["blob", "blob", "plain", "plain"]


def test_a_manifest_given_is_used_and_what_cannot_be_read_is_counted(run: Path, tmp_path: Path) -> None:
    rows = ["path,label,patient"]
    for index, content in enumerate(["good", "flat", "broken", "good"]):
        path = tmp_path / f"{index}.png"
        if content == "broken":
            path.write_bytes(b"\x89PNG\r\n\x1a\n")
        else:
            noise = np.random.default_rng(index).integers(0, 255, (70, 70))
            cv2.imwrite(str(path), (noise if content == "good" else np.full((70, 70), 9)).astype(np.uint8))
        rows.append(f"{path.name},{'blob' if index % 2 else 'plain'},p{index}")
    (tmp_path / "m.csv").write_text("\n".join(rows) + "\n")
    info = info_of(run)
    source = Source(run / "fold1" / "best.pt", run, "")
    images = real_images(source, info, tmp_path / "m.csv", 10)
    arrays = dict(images)
    assert len(arrays) == 2
    assert images.skipped == 2
    # iterating again starts again
    assert len(dict(images)) == 2
    assert images.skipped == 2
    assert all(array.shape == (1, 64, 64) and array.dtype == np.float32 for array in arrays.values())
    assert all(name.startswith("radiograph ") for name in arrays)
    with pytest.raises(DataError):
        real_images(source, info, tmp_path / "none.csv", 10)


@pytest.mark.usefixtures("quick")
def test_a_manifest_of_unreadable_images_is_an_error(run: Path, tmp_path: Path) -> None:
    (tmp_path / "0.png").write_bytes(b"no image")
    (tmp_path / "m.csv").write_text("path,label,patient\n0.png,blob,p\n")
    with pytest.raises(DataError, match="none of its 1 images could be read"):
        build_bundle(run, tmp_path / "bundle", data=tmp_path / "m.csv")
    assert not (tmp_path / "bundle").exists()


def test_without_its_images_parity_is_judged_on_synthetic_ones_and_says_so(tmp_path: Path) -> None:
    made = write_run(tmp_path / "run", tmp_path / "data", {0: SCORES[0]})
    source, info = find_checkpoint(made), info_of(made, 0)
    shutil.move(tmp_path / "data", tmp_path / "elsewhere")
    gone = real_images(source, info, None, 10)
    assert list(gone) == []
    assert gone.facts["source"].startswith("none: the run's manifest or folds are not there")
    shutil.move(tmp_path / "elsewhere", tmp_path / "data")
    manifest = tmp_path / "data" / "manifest.csv"
    manifest.write_text(manifest.read_text().replace("p00", "p99"))
    assert real_images(source, info, None, 10).facts["source"] == "none: the run's manifest has changed"
    alone = tmp_path / "alone.pt"
    shutil.copy(source.checkpoint, alone)
    assert real_images(find_checkpoint(alone), info, None, 10).facts["source"].startswith("none: the checkpoint lies")


def test_localization_comes_from_the_run_the_evaluation_or_the_default(tmp_path: Path) -> None:
    made = write_run(tmp_path / "run", tmp_path / "data", {0: SCORES[0]})
    source, info = find_checkpoint(made), info_of(made, 0)
    assert localization(source, info, None) == DEFAULT_LOCALIZATION
    metrics = {"localization": {"map": "evidence", "threshold": 0.35, "chosen_on": "training-side images", "iou": 1}}
    assert localization(source, info, metrics) == {
        "map": "evidence", "threshold": 0.35, "chosen_on": "training-side images, magsd evaluate",
    }  # fmt: skip
    assert localization(source, info, {"localization": None}) == DEFAULT_LOCALIZATION
    zero = {"localization": {**metrics["localization"], "minimum_score": 0.0}}
    assert localization(source, info, zero) == localization(source, info, metrics)
    faint = {"localization": {**metrics["localization"], "minimum_score": 0.7}}
    assert localization(source, info, faint) == {**localization(source, info, metrics), "minimum_score": 0.7}
    own = {"map": "evidence", "threshold": 0.6, "chosen_on": "validation images"}
    (made / "localization.json").write_text(json.dumps(own))
    assert localization(source, info, faint) == own
    (made / "localization.json").write_text(json.dumps({**own, "minimum_score": 0.8}))
    assert localization(source, info, metrics) == {**own, "minimum_score": 0.8}
    for score in (-0.1, 1.1, None, "0.5"):
        (made / "localization.json").write_text(json.dumps({**own, "minimum_score": score}))
        with pytest.raises(UsageError, match=r"not usable: .*minimum_score 0 to 1"):
            localization(source, info, None)
    for wrong in ({**own, "map": "cam"}, {**own, "threshold": 1.5}, {**own, "threshold": None}, {"map": "evidence"}):
        (made / "localization.json").write_text(json.dumps(wrong))
        with pytest.raises(UsageError, match=r"localization\.json is not usable"):
            localization(source, info, None)


def test_plain_pooling_says_that_its_heat_maps_mean_nothing(tmp_path: Path) -> None:
    made = write_run(
        tmp_path / "run", tmp_path / "data", {0: SCORES[0]}, model="plain",
    )  # fmt: skip
    built = build_bundle(made, tmp_path / "bundle", images=2)
    assert "heat maps say nothing" in built.bundle.localization["chosen_on"]
    assert "heat maps and boxes say nothing" in (built.bundle.path / "MODEL_CARD.md").read_text()


def metrics_of(run: Path, **target: Any) -> dict[str, Any]:
    info = info_of(run)
    score = {"value": 0.812, "std": 0.01, "ci95": [0.7, 0.9]}
    return {
        "schema": "magsd.metrics/1",
        "created": "2026-01-01T00:00:00+00:00",
        "target": {
            "kind": "run", "name": run.name, "classes": list(info.classes), "trained_folds": [0, 1, 2],
            "preprocessing_sha256": info.preprocessing.sha256(), **target,
        },
        "data": {"digest": info.data["digest"], "evaluated_images": 24, "evaluated_patients": 23},
        "classification": {"accuracy": score, "auc": {**score, "ci95": None}},
        "folds": [{"fold": 0, "accuracy": 0.5, "auc": 0.6}, {"fold": 1, "accuracy": 0.75, "auc": 0.86}],
        "localization": {
            "map": "evidence", "threshold": 0.4, "chosen_on": "chosen on training-side images of each fold",
            "iou_mean": 0.31, "iou_mean_ci95": [0.2, 0.4], "iou_at_25": 0.55, "images": 7,
        },
    }  # fmt: skip


@pytest.mark.usefixtures("quick")
def test_results_of_an_evaluation_reach_bundle_and_card(run: Path, tmp_path: Path) -> None:
    (tmp_path / "report").mkdir()
    (tmp_path / "report" / "metrics.json").write_text(json.dumps(metrics_of(run)))
    built = build_bundle(run, tmp_path / "bundle", evaluation=tmp_path / "report")
    assert built.bundle.localization["map"] == "evidence"
    assert built.bundle.localization["threshold"] == 0.4
    facts = built.bundle.manifest["training"]["evaluation"]
    assert facts["this_fold"]["accuracy"] == 0.75
    assert facts["same_manifest_as_training"]
    card = (built.bundle.path / "MODEL_CARD.md").read_text()
    assert "| accuracy | 0.8120 | 0.7000 to 0.9000 | 0.7500 |" in card
    assert "| auc | 0.8120 | - | 0.8600 |" in card
    assert "Localization (evidence map, 7 images with boxes or masks): mean IoU 0.3100, share above 0.25 0.5500" in card
    assert "minimum_score" not in built.bundle.localization
    assert (facts["localization"]["minimum_score"], facts["localization"]["iou_mean"]) == (0.0, 0.31)
    assert "stays below" not in card
    assert "mean over 3 folds, of which this bundle is fold 1" in card


@pytest.mark.usefixtures("quick")
def test_a_minimum_score_reaches_bundle_and_card(run: Path, tmp_path: Path) -> None:
    metrics = metrics_of(run)
    metrics["localization"]["minimum_score"] = 0.75
    (tmp_path / "metrics.json").write_text(json.dumps(metrics))
    built = build_bundle(run, tmp_path / "bundle", evaluation=tmp_path)
    assert built.bundle.localization["minimum_score"] == built.bundle.minimum_score == 0.75
    assert built.bundle.manifest["training"]["evaluation"]["localization"]["minimum_score"] == 0.75
    card = (built.bundle.path / "MODEL_CARD.md").read_text()
    assert "Localization (evidence map, regions that reach 0.75, 7 images with boxes or masks): mean IoU" in card
    assert "A region whose largest heat stays below 0.75 is left out, unless it is the strongest. A box is" in card


@pytest.mark.parametrize(
    "target",
    [{"kind": "bundle"}, {"name": "another"}, {"classes": ["a", "b"]}, {"preprocessing_sha256": "0" * 64}],
)
def test_results_of_another_model_are_refused(run: Path, tmp_path: Path, target: dict[str, Any]) -> None:
    (tmp_path / "metrics.json").write_text(json.dumps(metrics_of(run, **target)))
    with pytest.raises(UsageError, match=f"of another model: its {next(iter(target))}"):
        read_evaluation(tmp_path, info_of(run), find_checkpoint(run))


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"schema": "other/1", "target": {}}'])
def test_what_is_no_evaluation_is_refused(run: Path, tmp_path: Path, content: str) -> None:
    with pytest.raises(UsageError, match=r"no metrics\.json there"):
        read_evaluation(tmp_path, info_of(run), find_checkpoint(run))
    (tmp_path / "metrics.json").write_text(content)
    with pytest.raises(UsageError, match=r"metrics\.json"):
        read_evaluation(tmp_path, info_of(run), find_checkpoint(run))


# Golden inputs.


def test_golden_images_never_change() -> None:
    found = {
        name: (pixels.shape, hashlib.sha256(pixels.tobytes()).hexdigest()[:16])
        for name, pixels in golden_images().items()
    }
    assert found == GOLDEN


GOLDEN = {
    "chest": ((640, 512), "7df78de66cfc3384"),
    "gradient": ((300, 420), "bbb4160070076cc3"),
    "noise": ((260, 200), "1b5a6a48d0714eaf"),
}


class FakeBackend:
    """Gives the logits that a test wants, image by image."""

    name, device, precision = "cpu", "cpu", "fp32"

    def __init__(self, logits: list[list[float]]) -> None:
        self.logits = iter(logits)
        self.inputs: list[np.ndarray] = []

    def run(self, images: np.ndarray) -> dict[str, np.ndarray]:
        self.inputs.append(images[0])
        logits = np.array([next(self.logits)], np.float32)
        ones = np.ones((1, 2, 2, 2), np.float32)
        return {"logits": logits, "attention": ones, "evidence": ones[:, :, :, 0], "embedding": ones[:, 0, 0]}

    def close(self) -> None: ...


@pytest.mark.parametrize(
    ("logits", "kept"),
    [
        ([[1.0, 0.0], [0.0, 1.0], [5.0, 1.0]], ["chest", "gradient", "noise"]),
        ([[1.0, 1.0001], [0.0, 1.0], [50.0, 49.95]], ["gradient"]),
        ([[1.0, 1.0], [1.0, 1.0005], [1.0, 1.0001]], ["gradient"]),
    ],
)
def test_golden_inputs_have_a_clear_label(
    built: Built, tmp_path: Path, logits: list[list[float]], kept: list[str]
) -> None:
    backend = FakeBackend(logits)
    write_golden(tmp_path / "golden", built.bundle, backend)
    expected = json.loads((tmp_path / "golden" / "expected.json").read_text())
    assert list(expected) == kept
    assert sorted(path.stem for path in (tmp_path / "golden").glob("*.png")) == sorted(kept)
    inputs = dict(zip(golden_images(), backend.inputs))
    with np.load(tmp_path / "golden" / "expected.npz") as file:
        assert {key.partition("/")[0] for key in file.files} == set(kept)
        for name in kept:
            wanted = logits[list(golden_images()).index(name)]
            np.testing.assert_allclose(file[f"{name}/logits"], wanted, rtol=1e-6)
            assert expected[name]["label"] == built.bundle.classes[int(np.argmax(wanted))]
            assert expected[name]["preprocessed_sha256"] == preprocessed_sha256(inputs[name])
            pixels = golden_images()[name]
            assert np.array_equal(inputs[name], preprocess(pixels, built.bundle.preprocessing))


# The commit.


def test_git_commit_is_of_this_checkout_or_none(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    if (ROOT / ".git").exists() and shutil.which("git"):
        head = subprocess.run(["git", "-C", str(ROOT), "rev-parse", "HEAD"], capture_output=True, text=True)
        assert head.returncode == 0
        assert (git_commit() or "").removesuffix("-dirty") == head.stdout.strip()
    monkeypatch.setenv("PATH", str(tmp_path))  # no git there
    assert git_commit() is None
    monkeypatch.undo()
    # installed: the package lies in no checkout of magsd, even if an unrelated one surrounds it
    installed = tmp_path / "venv" / "lib" / "magsd_export" / "bundling.py"
    (tmp_path / ".git").mkdir()
    monkeypatch.setattr(bundling, "__file__", str(installed))
    assert git_commit() is None

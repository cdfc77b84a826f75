"""LungNet: its training on drawn films, its export, and a classifier that is cropped by it."""

from __future__ import annotations

import csv
import json
import math
from dataclasses import replace
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch

import magsd.fold_training
from magsd.checkpoint import load_checkpoint
from magsd.cli import main
from magsd.config import resolve
from magsd.distributed import Processes
from magsd.folds import FINAL
from magsd.losses import attention_divergence, lung_opacity, outside_share
from magsd.lung_training import images_without_lungs, read_lung_films, train_lungs
from magsd.models import build_model
from magsd.schedule import epoch_batches
from magsd.training import train
from magsd_export.lung_network import export_lungs
from magsd_runtime.bundle import LOCALIZATION_MAPS
from magsd_runtime.errors import DataError, UsageError
from magsd_runtime.lungs import find_lungs, register
from test_resume import Killed
from tiny_run import TINY, write_tiny_manifest

GROUP = Processes(0, 1, torch.device("cpu"))


def write_lung_films(folder: Path, count: int = 40) -> Path:
    """Two dark ellipses on grey, and where they are."""
    rng = np.random.default_rng(7)
    folder.mkdir()
    rows = []
    for index in range(count):
        film = rng.normal(160, 10, (96, 96))
        mask = np.zeros((96, 96), np.uint8)
        for x in (30, 66):
            centre = (x + int(rng.integers(-4, 5)), 48 + int(rng.integers(-6, 7)))
            cv2.ellipse(mask, centre, (12, 26), 0, 0, 360, 255, -1)
        film[mask > 0] -= 90
        cv2.imwrite(str(folder / f"{index}.png"), np.clip(film, 0, 255).astype(np.uint8))
        cv2.imwrite(str(folder / f"{index}-mask.png"), mask)
        rows.append({"path": f"{index}.png", "mask": f"{index}-mask.png", "patient": f"p{index}"})
    with open(folder / "lungs.csv", "w", newline="") as file:
        table = csv.DictWriter(file, ["path", "mask", "patient"])
        table.writeheader()
        table.writerows(rows)
    return folder / "lungs.csv"


def test_it_learns_and_opencv_computes_the_same(tmp_path: Path) -> None:
    data = read_lung_films(write_lung_films(tmp_path / "data"))
    model, scores = train_lungs(data, epochs=12)
    assert scores.mean > 0.8, scores
    assert 0 < scores.films < 20
    export_lungs(model, tmp_path / "lungs.onnx")
    sha256 = register(tmp_path / "lungs.onnx")
    film = cv2.imread(str(tmp_path / "data" / "0.png"), cv2.IMREAD_GRAYSCALE)
    mask = cv2.imread(str(tmp_path / "data" / "0-mask.png"), cv2.IMREAD_GRAYSCALE)
    assert film is not None
    assert mask is not None
    drawn = cv2.resize(mask, (128, 128)) > 127
    found = find_lungs(film, sha256)
    assert 2 * (found & drawn).sum() / (found.sum() + drawn.sum()) > 0.8


def test_images_without_lungs_are_of_the_promised_kinds() -> None:
    films = torch.rand((3, 1, 128, 128)) * 255
    images = images_without_lungs(films, 60, torch.Generator().manual_seed(1))
    assert images.shape == (60, 1, 128, 128)
    assert float(images.min()) >= 0
    assert float(images.max()) <= 255
    grey = [image for image in images if bool(image.min() == image.max())]
    sorted_films = [film.flatten().sort().values for film in films]
    shuffled = [
        image for image in images if any(torch.equal(image.flatten().sort().values, one) for one in sorted_films)
    ]
    assert not any(torch.equal(image, film) for film in films for image in shuffled)
    assert len(grey) > 10
    assert len(shuffled) > 10
    assert len(images) - len(grey) - len(shuffled) > 10


def test_what_is_wrong_with_the_films_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write_lung_films(tmp_path / "data", count=3)
    with pytest.raises(DataError, match="films to train on"):
        train_lungs(read_lung_films(path))
    cv2.imwrite(str(tmp_path / "data" / "1-mask.png"), np.zeros((96, 96), np.uint8))
    with pytest.raises(DataError, match=r"mask 1-mask\.png is empty"):
        read_lung_films(path)
    path.write_text("path,label\n1.png,x\n")
    assert main(["train-lungs", "--data", str(path), "--out", str(tmp_path / "out.onnx")]) == 2
    assert "path, mask" in capsys.readouterr().err
    assert not (tmp_path / "out.onnx").exists()


def test_outside_share() -> None:
    attention = torch.rand((3, 4, 5, 5), generator=torch.Generator().manual_seed(0))
    inside = torch.rand((3, 1, 5, 5), generator=torch.Generator().manual_seed(1))
    inside[2] = 0
    expected = 0.0
    for image in range(2):
        mean = attention[image].mean(0)
        expected += float((mean * (1 - inside[image, 0])).sum() / mean.sum()) / 3
    assert float(outside_share(attention, inside)) == pytest.approx(expected, rel=1e-5)


def test_lung_opacity() -> None:
    generator = torch.Generator().manual_seed(0)
    size, rim = 64, 2
    images = torch.rand((3, 1, size, size), generator=generator) * 255
    lungs = 0.5 + 0.5 * torch.rand((3, 1, size, size), generator=generator)
    lungs[0, :, :, :20] = 0
    lungs[2] = 0
    found = lung_opacity(images, lungs)[:, 0].numpy()
    for image in range(3):
        film, lung = images[image, 0].numpy().astype(np.float64), lungs[image, 0].numpy()
        inner = np.zeros_like(film)
        for row in range(size):
            for column in range(size):
                top, left = max(0, row - rim), max(0, column - rim)
                inner[row, column] = lung[top : row + rim + 1, left : column + rim + 1].min()
        mean = (film * inner).sum() / inner.sum() if inner.any() else 0.0
        np.testing.assert_allclose(found[image], np.maximum(film - mean, 0) * inner, atol=1e-2)
    assert found[0, :, :22].sum() == 0 < found[0, :, 22:].sum()
    assert found[2].sum() == 0
    # a plain film has no opacity, whatever its grey
    assert float(lung_opacity(torch.full((1, 1, size, size), 200.0), lungs[:1]).max()) < 1e-2


def test_attention_divergence() -> None:
    generator = torch.Generator().manual_seed(0)
    attention = torch.rand((3, 4, 5, 5), generator=generator)
    target = torch.rand((3, 1, 5, 5), generator=generator)
    target[1, :, :3] = 0
    target[2] = 0
    expected = 0.0
    for image in range(2):
        given = attention[image].mean(0) / attention[image].mean(0).sum()
        wanted = target[image, 0] / target[image, 0].sum()
        expected += sum(
            float(w) * math.log(float(w) / float(g)) for w, g in zip(wanted.flatten(), given.flatten()) if w
        )
    assert float(attention_divergence(attention, target)) == pytest.approx(expected / 3, rel=1e-3)
    same = attention.mean(1, keepdim=True) * 7
    assert float(attention_divergence(attention, same)) == pytest.approx(0, abs=1e-4)
    # the gradient leads there, also from attention that is 0 everywhere in one image
    attention[0] = 0
    attention.requires_grad_(True)
    attention_divergence(attention, target).backward()
    assert attention.grad is not None
    assert bool(torch.isfinite(attention.grad).all())
    with torch.no_grad():
        nearer = (attention - 0.1 * attention.grad).clamp(min=0)
        assert float(attention_divergence(nearer, target)) < float(attention_divergence(attention, target))


def test_sources_are_drawn_by_the_root_of_their_size() -> None:
    config = resolve({**TINY, "sampling": "balanced-sources", "batch_size": 1000})
    labels = np.repeat([0, 1], [900, 100])
    sources = np.concatenate([np.repeat([0, 1], [720, 180]), np.repeat([0, 1], [99, 1])])
    train_part = np.arange(1000)
    drawn = np.concatenate(
        [
            np.concatenate(epoch_batches(config, train_part, torch.from_numpy(labels), epoch, 1, sources))
            for epoch in range(60)
        ]
    )
    share = {
        (label, source): float(np.mean((labels[drawn] == label) & (sources[drawn] == source)))
        for label in (0, 1)
        for source in (0, 1)
    }
    assert share[0, 0] + share[0, 1] == pytest.approx(0.5, abs=0.01)
    assert share[0, 0] / share[0, 1] == pytest.approx(2.0, abs=0.1)
    assert share[1, 0] / share[1, 1] == pytest.approx(99**0.5, rel=0.15)


SETTINGS = {
    **TINY, "epochs": 4, "crop": "lungs", "lung_attention": 0.5, "tone": 0.3, "blur": 1.0, "noise": 5.0,
    "erasing": 0.2, "sampling": "balanced-sources", "average": 0.9, "select": "last",
}  # fmt: skip


def test_a_cropped_final_model_from_training_to_inference(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    manifest = write_tiny_manifest(tmp_path / "data")
    config = resolve({**SETTINGS, "data": str(manifest)})
    (result,) = train(config, tmp_path / "run", GROUP, fold=FINAL)
    assert result.folder == tmp_path / "run" / "final"
    assert result.epoch == 4
    assert result.validation == {"loss": None, "accuracy": None, "auc": None}
    rows = list(csv.DictReader((result.folder / "log.csv").open()))
    assert [row["validation_loss"] for row in rows] == [""] * 4
    bundle = tmp_path / "bundle"
    (tmp_path / "run" / "localization.json").write_text(
        json.dumps({"map": "evidence-lungs", "threshold": 0.3, "chosen_on": "a test"})
    )
    assert main(["export", str(tmp_path / "run"), "--out", str(bundle), "--final"]) == 0
    described = json.loads((bundle / "bundle.json").read_text())
    assert described["preprocessing"]["version"] == 2
    assert described["localization"]["map"] == "evidence-lungs"
    assert "inside the lung fields" in (bundle / "MODEL_CARD.md").read_text()
    assert described["files"]["lungs.onnx"]["sha256"] == described["preprocessing"]["lungs_sha256"]
    assert main(["verify", str(bundle)]) == 0
    capsys.readouterr()
    # noise with a bright square: nothing that a chest film has
    assert main(["infer", str(tmp_path / "data" / "00.png"), "--bundle", str(bundle), "--json"]) == 3
    record = json.loads(capsys.readouterr().out)
    assert [reason["code"] for reason in record["reasons"]] == ["tiny", "no_lungs"]
    assert (record["status"], record["label"]) == ("rejected", None)
    report = ["--data", str(manifest), "--map", "evidence-lungs", "--bootstrap", "20"]
    assert main(["evaluate", str(bundle), *report, "--out", str(tmp_path / "report")]) == 0
    localization = json.loads((tmp_path / "report" / "metrics.json").read_text())["localization"]
    assert localization["map"] == "evidence-lungs"
    assert set(localization["maps"]) == set(LOCALIZATION_MAPS)
    assert "inside the lung fields" in (tmp_path / "report" / "report.html").read_text()
    (bundle / "lungs.onnx").write_bytes((bundle / "lungs.onnx").read_bytes()[:-1] + b"x")
    assert main(["infer", str(tmp_path / "data" / "00.png"), "--bundle", str(bundle)]) == 4
    assert "lungs.onnx" in capsys.readouterr().err


def test_what_goes_together_is_checked(tmp_path: Path) -> None:
    for wrong, message in (
        ({"lung_attention": 1.0}, "add --crop lungs"),
        ({"lungs": "x.onnx"}, "add --crop lungs"),
        ({"average": 1.0}, "0 to below 1"),
        ({"tone": -1.0}, "0 or more"),
        ({"crop": "lungs", "lung_attention": 1.0, "model": "plain"}, "needs attention"),
    ):
        with pytest.raises(UsageError, match=message):
            resolve({**TINY, **wrong})
    config = resolve({**TINY, "data": str(write_tiny_manifest(tmp_path / "data"))})
    with pytest.raises(UsageError, match="add --select last"):
        train(config, tmp_path / "run", GROUP, fold=FINAL)


def test_the_average_survives_a_kill(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = resolve({**SETTINGS, "data": str(write_tiny_manifest(tmp_path / "data"))})
    train(config, tmp_path / "whole", GROUP, fold=0)
    monkeypatch.setattr(magsd.fold_training, "CHECKPOINT_SECONDS", -1.0)
    step, count = magsd.fold_training.training_step, iter(range(10**6))

    def killed(*arguments: object, **named: object) -> object:
        if next(count) % 3 == 2:
            raise Killed
        return step(*arguments, **named)  # type: ignore[arg-type]

    monkeypatch.setattr(magsd.fold_training, "training_step", killed)
    for _ in range(100):
        try:
            train(config, tmp_path / "killed", GROUP, fold=0, resume=True)
            break
        except Killed:
            continue
    else:
        pytest.fail("never finished")
    for name in ("last.pt", "best.pt"):
        one, other = (load_checkpoint(tmp_path / run / "fold0" / name)[0] for run in ("whole", "killed"))
        assert all(torch.equal(value, other["model"][key]) for key, value in one["model"].items())
        if name == "last.pt":
            assert one["average"]["steps"] == other["average"]["steps"] > 0
            model = one["average"]["model"]
            assert all(torch.equal(value, other["average"]["model"][key]) for key, value in model.items())
    assert replace(config, average=0.0) != config


def test_the_attention_generator_has_a_rate_of_its_own(tmp_path: Path) -> None:
    data = str(write_tiny_manifest(tmp_path / "data"))
    moved = {}
    for rate in (0.0, 1.0, 10.0):
        config = resolve({**TINY, "epochs": 1, "data": data, "backbone_rate": 0.0, "attention_rate": rate})
        train(config, tmp_path / str(rate), GROUP, fold=0)
        model = load_checkpoint(tmp_path / str(rate) / "fold0" / "last.pt")[0]["model"]
        torch.manual_seed(0)
        begin = build_model(resolve(TINY), num_classes=2)
        moved[rate] = sum(
            float((model[name] - value.detach()).abs().sum())
            for name, value in begin.named_parameters()
            if name.startswith("attention_generator.")
        )
        assert not torch.equal(model["classifier.weight"], begin.state_dict()["classifier.weight"])
    assert moved[0.0] == 0
    assert 3 * moved[1.0] < moved[10.0]


def test_a_backbone_with_rate_0_keeps_its_weights(tmp_path: Path) -> None:
    data = str(write_tiny_manifest(tmp_path / "data"))
    models = {}
    for rate in (0.0, 0.5, 1.0):
        config = resolve({**TINY, "epochs": 1, "data": data, "backbone_rate": rate})
        train(config, tmp_path / str(rate), GROUP, fold=0)
        models[rate] = load_checkpoint(tmp_path / str(rate) / "fold0" / "last.pt")[0]["model"]
    torch.manual_seed(0)
    begin = build_model(resolve(TINY), num_classes=2)
    moved = {
        rate: sum(
            float((models[rate][name] - value.detach()).abs().sum())
            for name, value in begin.named_parameters()
            if name.startswith("backbone.")
        )
        for rate in models
    }
    assert moved[0.0] == 0
    assert all(
        torch.equal(models[0.0][name], value)
        for name, value in begin.state_dict().items()
        if name.startswith("backbone.")
    )
    assert 0.3 * moved[1.0] < moved[0.5] < 0.7 * moved[1.0]
    assert not torch.equal(models[0.0]["classifier.weight"], begin.state_dict()["classifier.weight"])

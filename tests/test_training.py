"""The training loop's parts: order, schedule, choice of the epoch, checkpoints, and that it learns."""

from __future__ import annotations

import csv
import dataclasses
import json
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from magsd.checkpoint import load_checkpoint, load_model
from magsd.config import TrainingConfig, resolve
from magsd.distributed import Processes, choose_device
from magsd.run_folder import locked, resumed_config
from magsd.schedule import epoch_batches, learning_rate
from magsd.training import train
from magsd_runtime.errors import BackendUnavailableError, CheckpointError, UsageError
from tiny_run import TINY, write_tiny_manifest

GROUP = Processes(0, 1, torch.device("cpu"))


def tiny(tmp_path: Path, *, patients: int = 24, **changes: object) -> TrainingConfig:
    manifest = tmp_path / "data" / "manifest.csv"
    if not manifest.exists():
        write_tiny_manifest(manifest.parent, patients=patients)
    return resolve({**TINY, "data": str(manifest), **changes})


@given(
    images=st.integers(1, 60), batch=st.integers(1, 16), epoch=st.integers(0, 5), world=st.integers(1, 4)
)  # fmt: skip
def test_an_epoch_takes_every_image_and_fills_only_the_last_batch(
    images: int, batch: int, epoch: int, world: int
) -> None:
    config = resolve({**TINY, "batch_size": batch})
    indices = np.arange(100, 100 + images)
    batches = epoch_batches(config, indices, torch.zeros(200, dtype=torch.int64), epoch, world)
    flat = np.concatenate(batches)
    assert sorted(set(flat)) == list(indices)
    assert all(len(b) == batch for b in batches[:-1])
    assert len(batches[-1]) % world == 0
    assert len(flat) - images < world
    again = epoch_batches(config, indices, torch.zeros(200, dtype=torch.int64), epoch, world)
    assert all(np.array_equal(a, b) for a, b in zip(batches, again, strict=True))


def test_balanced_sampling_draws_every_class_equally_often() -> None:
    labels = torch.tensor([0] * 950 + [1] * 50)
    config = resolve({**TINY, "sampling": "balanced", "batch_size": 1000})
    drawn = np.concatenate([epoch_batches(config, np.arange(1000), labels, e)[0] for e in range(10)])
    assert 0.45 < np.mean(drawn >= 950) < 0.55


def test_the_schedules() -> None:
    step = resolve({**TINY, "epochs": 150, "learning_rate": 1.0})
    assert [learning_rate(step, e) for e in (0, 74.9, 75, 124.9)] == pytest.approx([1, 1, 0.1, 0.1])
    assert learning_rate(step, 125) == pytest.approx(0.01)
    cosine = dataclasses.replace(step, schedule="cosine", warmup_epochs=10.0)
    rates = [learning_rate(cosine, e) for e in np.linspace(0, 150, 301)]
    assert rates[0] > 0
    assert max(rates) == pytest.approx(1, abs=0.01)
    peak = int(np.argmax(rates))
    assert rates[: peak + 1] == sorted(rates[: peak + 1])
    assert rates[peak:] == sorted(rates[peak:], reverse=True)
    assert rates[-1] == pytest.approx(0)


def test_without_tensorboard_there_are_no_curves_and_no_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard.writer", None)
    train(tiny(tmp_path, patients=12, epochs=1, folds=2), tmp_path / "run", GROUP, fold=0)
    assert (tmp_path / "run" / "fold0" / "log.csv").is_file()
    assert not (tmp_path / "run" / "fold0" / "tensorboard").exists()


def test_a_run_learns_and_leaves_what_it_promises(tmp_path: Path) -> None:
    # one easy task: is there a bright square
    config = tiny(tmp_path, patients=48, epochs=10, folds=2, augment_probability=0.0)
    lines: list[str] = []
    results = train(config, tmp_path / "run", GROUP, fold=0, report=lines.append)
    folder = tmp_path / "run" / "fold0"
    for name in ("config.yaml", "folds.json", "manifest.json", "environment.json"):
        assert (tmp_path / "run" / name).is_file(), name
    for name in ("last.pt", "best.pt", "best.safetensors", "log.csv"):
        assert (folder / name).is_file(), name
    assert list((folder / "tensorboard").iterdir())
    rows = list(csv.DictReader((folder / "log.csv").open()))
    assert [int(row["epoch"]) for row in rows] == list(range(1, 11))
    assert float(rows[-1]["train_loss"]) < 0.5 * float(rows[0]["train_loss"])
    # the chosen epoch has the best validation score of the log
    best = max(rows, key=lambda row: (float(row["validation_auc"]), -float(row["validation_loss"])))
    assert results[0].epoch == int(best["epoch"])
    model, info = load_model(folder / "best.pt")
    assert info.epoch == results[0].epoch
    assert info.classes == ("blob", "plain")
    assert info.preprocessing == config.preprocessing()
    assert not model.training
    assert model(torch.zeros(2, 1, 64, 64)).logits.shape == (2, 2)
    assert any("images/s" in line for line in lines)
    assert json.loads((tmp_path / "run" / "manifest.json").read_text())["images"] == 48


@pytest.mark.parametrize(
    "changes",
    [
        {"loss": "l2", "attention_augmentation": ("mixup",)},
        {
            "soft_distance_rule": "confidence",
            "soft_distance_reduction": "mean",
            "auxiliary_passes": "one-batch",
        },
        {"model": "plain"},
        {"model": "plain", "pooling": "gmp", "class_weights": "balanced"},
        {"model": "magsd-oaug", "attention_scales": 3, "sampling": "balanced"},
        {
            "precision": "bf16",
            "gradient_clip": 1.0,
            "schedule": "cosine",
            "warmup_epochs": 0.5,
            "nesterov": True,
        },
        {
            "select": "loss",
            "attention_scales": 1,
            "fit": "letterbox",
            "clahe_clip": 0.0,
            "channels_last": False,
        },
        {"precision": "fp16", "gradient_clip": 0.5},
        {"select": "accuracy", "fit": "crop", "attention_augmentation": ("dimming", "patching")},
    ],
)
def test_every_option_trains(tmp_path: Path, changes: dict[str, object]) -> None:
    config = tiny(tmp_path, epochs=1, **changes)
    [result] = train(config, tmp_path / "run", GROUP, fold=1)
    assert np.isfinite(result.validation["loss"])


def test_the_same_seed_gives_the_same_weights_and_another_seed_others(tmp_path: Path) -> None:
    states = []
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        train(tiny(tmp_path, epochs=1, seed=seed), tmp_path / name, GROUP, fold=0)
        states.append(load_checkpoint(tmp_path / name / "fold0" / "last.pt")[0]["model"])
    assert all(torch.equal(states[0][k], states[1][k]) for k in states[0])
    assert not all(torch.equal(states[0][k], states[2][k]) for k in states[0])


def test_a_run_is_not_overwritten_and_a_resumed_run_is_the_same_run(tmp_path: Path) -> None:
    config = tiny(tmp_path, epochs=1)
    train(config, tmp_path / "run", GROUP, fold=0)
    with pytest.raises(UsageError, match="add --resume"):
        train(config, tmp_path / "run", GROUP, fold=0)
    with pytest.raises(UsageError, match=r"--epochs is 9 but the run in .* has 1"):
        resumed_config(tmp_path / "run", {"epochs": "9"})
    assert resumed_config(tmp_path / "run", {"epochs": "1"}) == config
    with (tmp_path / "data" / "manifest.csv").open("a") as manifest:
        manifest.write("00.png,blob,p00,1,1,9,9\n")
    with pytest.raises(CheckpointError, match="manifest has changed"):
        train(config, tmp_path / "run", GROUP, fold=0, resume=True)


def test_two_processes_never_share_a_run_folder(tmp_path: Path) -> None:
    with locked(tmp_path, GROUP), pytest.raises(UsageError, match="another process"), locked(tmp_path, GROUP):
        pass


def test_a_fold_that_does_not_exist(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="--fold is 3: expected 0 to 2"):
        train(tiny(tmp_path), tmp_path / "run", GROUP, fold=3)


def test_a_loss_that_explodes_stops_the_run_and_keeps_the_checkpoints(tmp_path: Path) -> None:
    config = tiny(tmp_path, epochs=4, learning_rate=1e30)
    with pytest.raises(UsageError, match="no longer finite"):
        train(config, tmp_path / "run", GROUP, fold=0)
    last = tmp_path / "run" / "fold0" / "last.pt"
    if last.exists():
        assert all(torch.isfinite(value).all() for value in load_checkpoint(last)[0]["model"].values())


def test_weights_lost_in_the_last_update_of_an_epoch_are_not_saved(tmp_path: Path) -> None:
    # one step an epoch: its loss is taken before the update that destroys the weights
    config = tiny(tmp_path, epochs=2, learning_rate=1e38, batch_size=64)
    with pytest.raises(UsageError, match="no longer finite"):
        train(config, tmp_path / "run", GROUP, fold=0)
    assert not list((tmp_path / "run" / "fold0").glob("*.pt"))


def test_a_checkpoint_of_another_fold_or_without_its_best_model_is_refused(tmp_path: Path) -> None:
    config = tiny(tmp_path, epochs=1)
    train(config, tmp_path / "run", GROUP, fold=0)
    (tmp_path / "run" / "fold1").mkdir()
    shutil.copy(tmp_path / "run" / "fold0" / "last.pt", tmp_path / "run" / "fold1" / "last.pt")
    with pytest.raises(CheckpointError, match="is of fold 0"):
        train(config, tmp_path / "run", GROUP, fold=1, resume=True)
    (tmp_path / "run" / "fold0" / "best.pt").unlink()
    with pytest.raises(CheckpointError, match="is gone"):
        train(config, tmp_path / "run", GROUP, fold=0, resume=True)
    (tmp_path / "run" / "config.yaml").unlink()
    with pytest.raises(UsageError, match=r"without their config\.yaml"):
        train(config, tmp_path / "run", GROUP, fold=0)


def test_another_manifest_or_a_lost_description_is_said_before_anything_else(tmp_path: Path) -> None:
    config = tiny(tmp_path, epochs=1)
    train(config, tmp_path / "run", GROUP, fold=0)
    other = write_tiny_manifest(tmp_path / "other", patients=30)
    moved = resumed_config(tmp_path / "run", {"data": str(other)})
    with pytest.raises(CheckpointError, match="manifest has changed"):
        train(moved, tmp_path / "run", GROUP, fold=0, resume=True)
    (tmp_path / "run" / "manifest.json").unlink()
    with pytest.raises(CheckpointError, match=r"manifest\.json is missing"):
        train(config, tmp_path / "run", GROUP, fold=0, resume=True)


def test_what_can_never_work_is_said_before_there_is_a_run(tmp_path: Path) -> None:
    write_tiny_manifest(tmp_path / "data", classes=("blob", "plain", "third"))
    with pytest.raises(UsageError, match="--label-smoothing"):
        train(tiny(tmp_path, label_smoothing=0.4), tmp_path / "run", GROUP, fold=0)
    with pytest.raises(UsageError, match="multiple of 2 processes"):
        train(tiny(tmp_path, batch_size=3), tmp_path / "run", Processes(0, 2, torch.device("cpu")))
    assert not (tmp_path / "run" / "config.yaml").exists()


def test_a_fold_goes_on_without_the_pretrained_file(tmp_path: Path) -> None:
    train(tiny(tmp_path, epochs=1), tmp_path / "first", GROUP, fold=0)
    weights = tmp_path / "weights.pt"
    shutil.copy(tmp_path / "first" / "fold0" / "best.pt", weights)
    config = tiny(tmp_path, epochs=1, weights=str(weights))
    train(config, tmp_path / "run", GROUP, fold=0)
    weights.unlink()
    [result] = train(config, tmp_path / "run", GROUP, fold=0, resume=True)
    assert result.epoch == 1
    with pytest.raises(UsageError, match="no such file"):
        train(config, tmp_path / "run", GROUP, fold=1, resume=True)


def test_a_run_whose_data_have_moved_goes_on(tmp_path: Path) -> None:
    train(tiny(tmp_path, epochs=1), tmp_path / "run", GROUP, fold=0)
    moved = tmp_path / "elsewhere"
    (tmp_path / "data").rename(moved)
    config = resumed_config(tmp_path / "run", {"data": str(moved / "manifest.csv")})
    [result] = train(config, tmp_path / "run", GROUP, fold=0, resume=True)
    assert result.epoch == 1
    assert resumed_config(tmp_path / "run", {}).data == str(moved / "manifest.csv")


@pytest.mark.parametrize("content", [b"", b"not a checkpoint", b"PK\x03\x04 half a zip"])
def test_a_damaged_checkpoint_is_one_clear_line(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "best.pt"
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=r"best\.pt"):
        load_model(path)


def test_a_checkpoint_of_a_newer_version_or_with_an_altered_spec_is_refused(tmp_path: Path) -> None:
    train(tiny(tmp_path, epochs=1), tmp_path / "run", GROUP, fold=0)
    path = tmp_path / "run" / "fold0" / "best.pt"
    content = torch.load(path, weights_only=True)
    torch.save({**content, "version": 99}, path)
    with pytest.raises(CheckpointError, match="version 99"):
        load_model(path)
    info = {**content["info"], "preprocessing": {**content["info"]["preprocessing"], "clahe_clip": 2.0}}
    torch.save({**content, "info": info}, path)
    with pytest.raises(CheckpointError, match="differs from its hash"):
        load_model(path)


def test_a_device_asked_for_and_missing_is_an_error() -> None:
    with pytest.raises(UsageError, match="--device is 'tpu'"):
        choose_device("tpu")
    if not torch.cuda.is_available():
        with pytest.raises(BackendUnavailableError, match="sees no CUDA device"):
            choose_device("cuda")
        assert choose_device("auto").type == "cpu"

"""Each figure is a PNG of a sensible size that shows its data, also for awkward names and missing values."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import cv2
import numpy as np
import pytest

from magsd.figures import (
    PanelItem,
    confusion_figure,
    localization_figure,
    reliability_figure,
    roc_figure,
    training_figure,
)
from magsd.metrics import roc_curves
from magsd_runtime.calibration import reliability
from magsd_runtime.prediction import Box


def picture(path: Path) -> np.ndarray:
    image = cv2.imread(str(path))
    assert image is not None
    assert min(image.shape[:2]) > 200
    assert max(image.shape[:2]) < 4000
    assert path.stat().st_size < 3_000_000
    assert image.std() > 5
    return image


def panel_item(iou: float = 0.3, mask: bool = False) -> PanelItem:
    y, x = np.mgrid[0:120, 0:150]
    heat = np.exp(-((x - 60.0) ** 2 + (y - 50.0) ** 2) / 800).astype(np.float32)
    return PanelItem(
        title="film_$1$_{x}.png\nsick, fold 0",
        pixels=np.full((120, 150), 128, np.uint8),
        heat=heat,
        threshold=0.5,
        predicted=Box(40, 30, 80, 70),
        boxes=[Box(50, 40, 100, 90)],
        mask=(x > 70) & (y > 50) if mask else None,
        iou=iou,
    )


@pytest.mark.parametrize("count", [2, 3, 6])
def test_confusion_matrix_is_bluer_where_more_of_a_class_went(tmp_path: Path, count: int) -> None:
    confusion = np.full((count, count), 1)
    confusion[np.diag_indices(count)] = 50
    confusion[-1] = 0  # a class without images
    names = [f"a rather long class name {number} $x$" for number in range(count)]
    confusion_figure(tmp_path / "c.png", confusion=confusion, classes=names)
    image = picture(tmp_path / "c.png").astype(int)
    blue = (image[..., 0] - image[..., 2] > 60) & (image[..., 2] < 60)
    assert blue.mean() > 0.02


def test_roc_curves_of_a_perfect_and_a_useless_class(tmp_path: Path) -> None:
    labels = np.array([0, 0, 1, 1, 2, 2])
    probabilities = np.full((6, 3), 0.2)
    probabilities[:2, 0] = 0.6
    curves = roc_curves(labels=labels, probabilities=probabilities, classes=["a_b", "$c$", "c"])
    assert [curve.auc for curve in curves] == pytest.approx([1.0, 0.5, 0.5, 2 / 3])
    roc_figure(tmp_path / "roc.png", curves)
    picture(tmp_path / "roc.png")


def test_reliability_diagram_with_empty_bins(tmp_path: Path) -> None:
    probabilities = np.array([[0.9, 0.1], [0.6, 0.4], [0.65, 0.35]])
    result = reliability(labels=np.array([0, 1, 0]), probabilities=probabilities)
    reliability_figure(tmp_path / "r.png", bins=result["bins"], ece=result["ece"])
    picture(tmp_path / "r.png")


@pytest.mark.parametrize("count", [1, 2, 5])
def test_localization_panel_draws_both_boxes(tmp_path: Path, count: int) -> None:
    items = [panel_item(mask=number == 1) for number in range(count)]
    localization_figure(tmp_path / "p.png", items)
    image = picture(tmp_path / "p.png").astype(int)
    blue, green, red = image[..., 0], image[..., 1], image[..., 2]
    assert ((green > 180) & (red < 120) & (blue < 180)).sum() > 50 * count  # drawn by people
    assert ((red > 220) & (green > 120) & (green < 190) & (blue < 110)).sum() > 50 * count  # predicted


def test_panel_without_any_region(tmp_path: Path) -> None:
    item = panel_item()
    empty = PanelItem(item.title, item.pixels, item.heat * 0, 0.5, None, item.boxes, None, 0.0)
    localization_figure(tmp_path / "p.png", [empty])
    picture(tmp_path / "p.png")


def test_panel_shows_the_regions_that_count(tmp_path: Path) -> None:
    """A faint second region is drawn without a minimum score, and not drawn with one."""
    item = panel_item()
    heat = np.maximum(item.heat, 0.6 * np.roll(item.heat, 70, axis=1))
    left = np.zeros(heat.shape, bool)
    left[:, :90] = True
    plain = replace(item, heat=heat, region=heat > 0.5)
    strict = replace(plain, minimum_score=0.8, region=(heat > 0.5) & left)
    drawn = {}
    for name, one in (("item", item), ("plain", plain), ("strict", strict)):
        localization_figure(tmp_path / f"{name}.png", [replace(one, predicted=None)])
        image = picture(tmp_path / f"{name}.png").astype(int)
        blue, green, red = image[..., 0], image[..., 1], image[..., 2]
        drawn[name] = int(((red > 220) & (green > 120) & (green < 190) & (blue < 110)).sum())
    assert drawn["plain"] > 1.2 * drawn["strict"]
    assert drawn["strict"] == pytest.approx(drawn["item"], rel=0.2)


@pytest.mark.parametrize("auc", [0.7, None])
@pytest.mark.parametrize("epochs", [1, 4])
def test_training_curves_with_and_without_auc(tmp_path: Path, auc: float | None, epochs: int) -> None:
    rows = [
        {
            "epoch": float(number + 1),
            "train_loss": 1 / (number + 1),
            "validation_loss": None if number == 2 else 1.2 / (number + 1),
            "validation_accuracy": 0.6,
            "validation_auc": auc,
            "best": float(number == 0),
        }
        for number in range(epochs)
    ]
    training_figure(tmp_path / "t.png", {0: rows, 3: rows})
    picture(tmp_path / "t.png")


def test_equal_data_give_equal_files(tmp_path: Path) -> None:
    for name in ("a.png", "b.png"):
        confusion_figure(tmp_path / name, confusion=np.eye(2, dtype=np.int64), classes=["a", "b"])
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()

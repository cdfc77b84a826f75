"""Figures 6, 7 and 8 side by side: every panel shows its data, whatever the number of models, films and classes."""

from __future__ import annotations

from pathlib import Path

import cv2
import numpy as np
import pytest

from magsd.figures import localization_curves_figure
from magsd.paper_figures import (
    Film,
    ModelCurve,
    Shown,
    confusion_panels_figure,
    localization_grid_figure,
    roc_panels_figure,
)
from magsd_runtime.prediction import Box


def picture(path: Path) -> np.ndarray:
    image = cv2.imread(str(path))
    assert image is not None
    assert path.stat().st_size < 3_000_000
    return image.astype(int)


def coloured(image: np.ndarray, colour: str, tolerance: int = 25) -> int:
    """How many pixels are about of a colour given as #rrggbb."""
    red, green, blue = (int(colour[at : at + 2], 16) for at in (1, 3, 5))
    return int((np.abs(image - [blue, green, red]).max(axis=2) < tolerance).sum())


def curve(name: str, auc: float, ours: bool = False) -> ModelCurve:
    rate = np.linspace(0, 1, 50)
    return ModelCurve(name, rate, rate ** ((1 - auc) / auc), auc, None if auc < 0.55 else 0.01, ours)


def test_the_three_largest_areas_stand_out(tmp_path: Path) -> None:
    # of the colours in order of rank: 1 blue, 2 vermilion, 3 green, 4 purple
    curves = [curve("$d$", 0.6), curve("b_2", 0.95), curve("c", 0.9), curve("a", 0.98), curve("ours", 0.55, True)]
    roc_panels_figure(
        tmp_path / "r.png", [("data set A", curves), ("data set B", curves[:2])], "a caption\nof two lines"
    )
    image = picture(tmp_path / "r.png")
    left = image[:, : image.shape[1] // 2]
    areas = [coloured(left, colour) for colour in ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#1b2733")]
    assert min(areas[:3]) > 2 * areas[3]
    assert areas[4] > 500  # MAG-SD is there, last as it is
    right = image[:, image.shape[1] // 2 :]
    assert coloured(right, "#0072b2") > 500
    assert coloured(right, "#cc79a7") == 0


def test_confusion_matrices_of_two_to_four_classes_share_a_bar(tmp_path: Path) -> None:
    panels = [
        (f"data set {count}", np.full((count, count), 3) + 60 * np.eye(count, dtype=np.int64),
         [f"class_{k}_of_{count}" for k in range(count)])
        for count in (2, 3, 4)
    ]  # fmt: skip
    confusion_panels_figure(tmp_path / "c.png", panels)
    image = picture(tmp_path / "c.png")
    dark = (image[..., 0] - image[..., 2] > 60) & (image[..., 2] < 60)
    third = image.shape[1] // 3
    assert all(dark[:, at * third : (at + 1) * third].mean() > 0.02 for at in range(3))


def film(kind: str, heat: bool = True) -> Film:
    y, x = np.mgrid[0:100, 0:120]
    warm = np.exp(-((x - 60.0) ** 2 + (y - 40.0) ** 2) / 500).astype(np.float32)
    mask = (x > 70) & (y > 50)
    shown = [
        Shown(warm, warm > 0.5, Box(45, 25, 75, 55), 0.3),
        Shown(None, None, Box(30, 25, 90, 75), 0.1),
        Shown(warm * 0, warm > 2, None, 0.0),
    ]
    boxes = [Box(10, 10, 40, 60), Box(80, 20, 110, 70)]
    return Film(
        "film_$1$.png\nsick", np.full((100, 120), 128, np.uint8), boxes, mask if kind == "mask" else None,
        shown if heat else shown[1:2] * 3,
    )  # fmt: skip


@pytest.mark.parametrize("kind", ["box", "mask"])
@pytest.mark.parametrize("films", [1, 4])
def test_each_film_is_beside_what_each_model_says(tmp_path: Path, kind: str, films: int) -> None:
    columns = ["MAG-SD, A\nattention", "central box", "nothing"]
    localization_grid_figure(tmp_path / "l.png", columns, [film(kind)] * films, "a caption")
    image = picture(tmp_path / "l.png")
    quarters = np.array_split(image, 4, axis=1)
    for quarter in quarters:  # what people drew is on every picture
        assert coloured(quarter, "#3ddc84", 60) > 100 * films
    found = [coloured(quarter, "#ff9d2e", 45) for quarter in quarters]
    assert found[1] > 40 * films  # the region, and with boxes the box around it
    if kind == "box":
        assert found[2] > 60 * films
    localization_grid_figure(tmp_path / "cold.png", columns, [film(kind, heat=False)] * films)
    cold, warm = (np.array_split(picture(tmp_path / name), 4, axis=1)[1] for name in ("cold.png", "l.png"))
    assert (warm[..., 2] - warm[..., 0] > 60).sum() > 2 * (cold[..., 2] - cold[..., 0] > 60).sum()


def test_curves_of_maps_and_baselines(tmp_path: Path) -> None:
    grid = np.arange(1, 20) / 20
    row = {
        "sweep": {"threshold": grid.tolist(), "iou_mean": (0.2 - 0.1 * grid).tolist()},
        "iou_distribution": [5, 3, *[0] * 17, 1], "threshold": 0.4, "iou_mean": 0.16,
    }  # fmt: skip
    maps = {"attention": row, "evidence": row, "attention-lungs": row}
    localization_curves_figure(tmp_path / "c.png", maps, {"central_box": row, "random_map": row})
    # equal rows lie on each other: the last is on top, the dots of the maps below it are not
    assert coloured(picture(tmp_path / "c.png"), "#e69f00") > 300

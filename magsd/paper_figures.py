"""The paper's Figures 6, 7 and 8 of several models and data sets side by side; those of one model: magsd.figures."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from magsd_runtime.prediction import Box

from .figures import (
    COLOURS,
    DRAWN,
    FAINT,
    INK,
    LINES,
    PANEL_DPI,
    PREDICTED,
    draw_confusion,
    new_figure,
    save_figure,
    share_bar,
    short_name,
)

EMPHASIZED = 3
"""How many of the largest areas stand out, as in the paper's Figure 6."""


@dataclass(frozen=True, eq=False)
class ModelCurve:
    """One model's ROC curve: rates (N,), the mean of its folds' areas and their deviation; ``ours``: MAG-SD."""

    name: str
    false_positive_rate: NDArray[np.float64]
    true_positive_rate: NDArray[np.float64]
    auc: float
    std: float | None
    ours: bool = False


@dataclass(frozen=True, eq=False)
class Shown:
    """What one method says of one film: heat 0 to 1 (H, W) or none, the region that counts, a box; in its pixels."""

    heat: NDArray[np.float32] | None
    region: NDArray[np.bool_] | None
    box: Box | None
    iou: float


@dataclass(frozen=True, eq=False)
class Film:
    """A row of Figure 7: uint8 (H, W), what people drew (boxes or a mask (H, W)), and one :class:`Shown` a column."""

    title: str
    pixels: NDArray[np.uint8]
    boxes: Sequence[Box]
    mask: NDArray[np.bool_] | None
    shown: Sequence[Shown]


def roc_panels_figure(path: Path, panels: Sequence[tuple[str, Sequence[ModelCurve]]], caption: str = "") -> None:
    """Fig. 6: a chart for each data set with every model; the largest areas stand out, and so does MAG-SD."""
    lines = max(len(curves) for _, curves in panels)
    legend_height = 0.35 + 0.2 * lines
    figure = new_figure(5.2 * len(panels) + 0.3, 5.5 + legend_height)
    charts, legends = figure.subplots(2, len(panels), squeeze=False, height_ratios=(4.9, legend_height))
    for axes, below, (title, curves) in zip(charts, legends, panels):
        ordered = sorted(curves, key=lambda curve: -curve.auc)
        inset = axes.inset_axes((0.43, 0.07, 0.54, 0.54))
        handles, others = [], 0
        for rank, curve in enumerate(ordered):
            strong = rank < EMPHASIZED < len(ordered)
            colour, line = (INK, "solid") if curve.ours else (
                COLOURS[others % len(COLOURS)], LINES[others // len(COLOURS) % len(LINES)]
            )  # fmt: skip
            others += not curve.ours
            faint = not (strong or curve.ours) and len(ordered) > EMPHASIZED
            style: dict[str, Any] = {
                "color": colour, "linestyle": line, "linewidth": 2.6 if strong else 1.1 if faint else 1.7,
                "alpha": 0.65 if faint else 1.0, "zorder": 4 if curve.ours else 3 if strong else 2,
            }  # fmt: skip
            deviation = "" if curve.std is None else f" ± {curve.std:.3f}"
            label = f"{curve.auc:.3f}{deviation}  {short_name(curve.name, 34)}"
            handles += axes.plot(curve.false_positive_rate, curve.true_positive_rate, label=label, **style)
            inset.plot(curve.false_positive_rate, curve.true_positive_rate, **style)
        for each in (axes, inset):
            each.plot([0, 1], [0, 1], color=FAINT, linewidth=1, linestyle=(0, (4, 4)))
            each.grid(color="#e4e8ec", linewidth=0.8)
        inset.set(xlim=(0, 0.4), ylim=(0.6, 1.005), facecolor="white")
        inset.set_title("upper left corner", fontsize=8, color=INK, pad=2, backgroundcolor="white")
        inset.tick_params(labelsize=7, colors=INK)
        axes.set(xlim=(-0.02, 1.02), ylim=(-0.02, 1.02))
        axes.set_title(short_name(title, 48), fontsize=12, color=INK)
        axes.set_xlabel("false positive rate (1 - specificity)")
        axes.set_ylabel("true positive rate (sensitivity)")
        below.set_axis_off()
        legend = below.legend(
            handles=handles, loc="upper center", frameon=False, fontsize=9, title="AUC", handlelength=3,
            labelspacing=0.3, borderpad=0, borderaxespad=0,
        )  # fmt: skip
        for text in legend.get_texts()[: EMPHASIZED if len(ordered) > EMPHASIZED else 0]:
            text.set_fontweight("bold")
    save_figure(figure, path, caption=caption)


def confusion_panels_figure(
    path: Path, panels: Sequence[tuple[str, NDArray[np.int64], Sequence[str]]], caption: str = ""
) -> None:
    """Fig. 8: a confusion matrix (C, C) for each data set, rows true classes, with its classes."""
    widths = [1.6 + 1.05 * len(classes) for _, _, classes in panels]
    figure = new_figure(sum(widths) + 0.9, max(widths) + 0.5)
    grid = figure.subplots(1, len(panels), squeeze=False, width_ratios=widths)[0]
    picture = None
    for axes, (title, confusion, classes) in zip(grid, panels):
        picture = draw_confusion(axes, confusion, classes)
        axes.set_title(short_name(title, 48), fontsize=12, color=INK)
    share_bar(figure, picture, grid[-1])
    save_figure(figure, path, caption=caption)


def localization_grid_figure(path: Path, columns: Sequence[str], films: Sequence[Film], caption: str = "") -> None:
    """Fig. 7: a row for each film: itself with what people drew, then for each column heat, region, box and IoU."""
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

    side = 1.75
    aspect = float(np.mean([film.pixels.shape[0] / film.pixels.shape[1] for film in films]))
    figure = new_figure(side * (len(columns) + 1) + 0.2, (side * aspect + 0.22) * len(films) + 1.75)
    grid = figure.subplots(len(films), len(columns) + 1, squeeze=False)
    for row, film in zip(grid, films):
        for axes in row:
            axes.imshow(film.pixels, cmap="gray", vmin=0, vmax=255)
            axes.set_xticks([])
            axes.set_yticks([])
            axes.spines[:].set_visible(False)
            _draw_truth(axes, film)
        row[0].set_title(
            "\n".join(short_name(line, 26) for line in film.title.splitlines()), fontsize=7, color=INK, pad=3
        )
        for axes, shown in zip(row[1:], film.shown):
            _draw_shown(axes, film, shown)
            axes.set_title(f"IoU {shown.iou:.2f}", fontsize=8, color=INK, pad=3)
    for axes, text in zip(grid[0], ("drawn by people", *columns)):
        title = axes.get_title()
        axes.set_title(f"{text}\n\n{title}", fontsize=8, color=INK, pad=3)
    kind = "box or mask" if any(film.mask is not None for film in films) else "box"
    handles: list[Any] = [
        Line2D([], [], color=DRAWN, linewidth=1.8, label=f"{kind} drawn by people"),
        Patch(facecolor="none", edgecolor=PREDICTED, label="heat above the threshold"),
        Line2D([], [], color=PREDICTED, linewidth=1.8, linestyle=(0, (4, 2)), label="box around it"),
    ]
    figure.legend(handles=handles, loc="outside upper center", ncols=3, frameon=False, fontsize=9)
    save_figure(figure, path, PANEL_DPI + 14, caption)


def _draw_truth(axes: Any, film: Film) -> None:
    if film.mask is not None:
        axes.contour(film.mask.astype(float), levels=[0.5], colors=[DRAWN], linewidths=1.4)
    else:
        for box in film.boxes:
            _draw_box(axes, box, DRAWN, "solid")


def _draw_shown(axes: Any, film: Film, shown: Shown) -> None:
    if shown.heat is not None:
        axes.imshow(shown.heat, cmap="inferno", vmin=0, vmax=1, alpha=0.65 * shown.heat)
    if shown.region is not None and shown.region.any() and not shown.region.all():
        axes.contour(shown.region.astype(float), levels=[0.5], colors=[PREDICTED], linewidths=1.0)
    if shown.box is not None and film.mask is None:
        _draw_box(axes, shown.box, PREDICTED, (0, (4, 2)))


def _draw_box(axes: Any, box: Box, colour: str, line: Any) -> None:
    from matplotlib.patches import Rectangle

    # imshow puts pixel centres at integers, boxes have their edges there
    corner = (box.x0 - 0.5, box.y0 - 0.5)
    axes.add_patch(
        Rectangle(corner, box.width, box.height, fill=False, edgecolor=colour, linewidth=1.6, linestyle=line)
    )

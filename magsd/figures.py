"""Figures of an evaluation, after the paper's Figs. 6, 7 and 8. Each function writes one PNG.

matplotlib's object interface is used: no window system and no global state.
"""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from magsd_runtime.errors import RESEARCH_USE, require
from magsd_runtime.files import replacing
from magsd_runtime.prediction import Box

from .metrics import RocCurve

if TYPE_CHECKING:
    from matplotlib.figure import Figure

DPI = 130
PANEL_DPI = 96  # films do not compress: the report would grow by megabytes
INK, FAINT = "#1b2733", "#8793a0"
# Told apart in print and by most colour-blind readers (Okabe and Ito)
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#7f6000", "#444444")
LINES = ("solid", (0, (1, 1)), (0, (4, 1, 1, 1)))  # of curves beyond the colours
PREDICTED, DRAWN = "#ff9d2e", "#3ddc84"


@dataclass(frozen=True, eq=False)
class PanelItem:
    """One image of the localization panel: uint8 (H, W), heat 0 to 1 (H, W), boxes in its pixels.

    ``region``, bool (H, W), is what of the heat above the threshold counts with a ``minimum_score``.
    """

    title: str
    pixels: NDArray[np.uint8]
    heat: NDArray[np.float32]
    threshold: float
    predicted: Box | None
    boxes: Sequence[Box]
    mask: NDArray[np.bool_] | None
    iou: float
    minimum_score: float = 0.0
    region: NDArray[np.bool_] | None = None


def confusion_figure(path: Path, *, confusion: NDArray[np.int64], classes: Sequence[str]) -> None:
    """Fig. 8: the share of each true class above, the count below; rows are true classes, (C, C)."""
    size = 2.0 + 0.95 * len(classes)
    figure = new_figure(size + 0.6, size)
    axes = figure.add_subplot()
    share_bar(figure, draw_confusion(axes, confusion, classes), axes)
    save_figure(figure, path)


def draw_confusion(axes: Any, confusion: NDArray[np.int64], classes: Sequence[str]) -> Any:
    """One confusion matrix (C, C), rows true classes, on ``axes``; the picture, for its colour bar."""
    count = len(classes)
    rows = confusion.sum(axis=1, keepdims=True)
    share = np.divide(confusion, rows, out=np.zeros(confusion.shape), where=rows > 0)
    picture = axes.imshow(share, cmap="Blues", vmin=0, vmax=1)
    for row in range(count):
        for column in range(count):
            colour = "white" if share[row, column] > 0.55 else INK
            value = f"{share[row, column]:.2f}" if rows[row, 0] else "–"
            axes.text(column, row - 0.09, value, ha="center", va="center", color=colour, fontsize=13)
            axes.text(
                column,
                row + 0.2,
                str(confusion[row, column]),
                ha="center",
                va="center",
                color=colour,
                fontsize=9,
            )
    names = [short_name(name) for name in classes]
    if max(map(len, names)) > 9:
        axes.set_xticks(range(count), names, rotation=30, ha="right", rotation_mode="anchor")
    else:
        axes.set_xticks(range(count), names)
    axes.set_yticks(range(count), names)
    axes.set_xlabel("predicted class")
    axes.set_ylabel("true class")
    axes.spines[:].set_visible(False)
    axes.tick_params(length=0)
    return picture


def share_bar(figure: Figure, picture: Any, axes: Any) -> None:
    """The colour bar of :func:`draw_confusion`, beside ``axes`` (one or several)."""
    bar = figure.colorbar(picture, ax=axes, fraction=0.045, pad=0.03)
    bar.set_label("share of the true class")
    bar.outline.set_visible(False)  # pyright: ignore[reportCallIssue]


def roc_figure(path: Path, curves: Sequence[RocCurve]) -> None:
    """Fig. 6: one curve a class against the rest and their macro mean, the area in the legend."""
    figure = new_figure(6.0, 5.4)
    axes = figure.add_subplot()
    axes.plot([0, 1], [0, 1], color=FAINT, linewidth=1, linestyle=(0, (4, 4)), label="chance, AUC 0.500")
    for index, curve in enumerate(curves):
        last = index == len(curves) - 1 and index > 0
        style: dict[str, Any] = (
            {"color": INK, "linewidth": 2.2, "linestyle": (0, (5, 2))}
            if last
            else {
                "color": COLOURS[index % len(COLOURS)],
                "linewidth": 1.8,
                "linestyle": LINES[index // len(COLOURS) % len(LINES)],
            }
        )
        label = f"{short_name(curve.name)}, AUC {curve.auc:.3f}"
        axes.plot(curve.false_positive_rate, curve.true_positive_rate, label=label, **style)
    axes.set(xlim=(-0.02, 1.02), ylim=(-0.02, 1.02), aspect="equal")
    axes.set_xlabel("false positive rate (1 - specificity)")
    axes.set_ylabel("true positive rate (sensitivity)")
    axes.grid(color="#e4e8ec", linewidth=0.8)
    axes.legend(loc="lower right", frameon=True, framealpha=0.95, edgecolor="#d5dbe1", fontsize=9)
    save_figure(figure, path)


def reliability_figure(path: Path, *, bins: Sequence[Mapping[str, Any]], ece: float) -> None:
    """Accuracy of each confidence bin beside the diagonal of perfect calibration; counts below."""
    figure = new_figure(5.6, 6.2)
    upper, lower = figure.subplots(2, 1, sharex=True, height_ratios=(4, 1))
    used = [row for row in bins if row["images"]]
    width = bins[0]["high"] - bins[0]["low"]
    centres = [(row["low"] + row["high"]) / 2 for row in used]
    upper.plot([0, 1], [0, 1], color=FAINT, linewidth=1, linestyle=(0, (4, 4)), label="perfectly calibrated")
    upper.bar(
        centres,
        [row["accuracy"] for row in used],
        width * 0.92,
        color="#6aaed6",
        edgecolor="#2b6ea6",
        label="accuracy",
    )
    upper.scatter(
        [row["confidence"] for row in used], [row["accuracy"] for row in used],
        s=22, color=COLOURS[1], zorder=3, label="at the mean confidence",
    )  # fmt: skip
    upper.set(xlim=(0, 1), ylim=(0, 1.02))
    upper.set_ylabel("share that is right")
    figure.legend(loc="outside upper center", ncols=3, frameon=False, fontsize=9)
    upper.text(
        0.97, 0.05, f"ECE {ece:.3f}", ha="right", transform=upper.transAxes, fontsize=13, color=INK,
        bbox={"facecolor": "white", "edgecolor": "#d5dbe1", "boxstyle": "round,pad=0.4"},
    )  # fmt: skip
    lower.bar(centres, [row["images"] for row in used], width * 0.92, color="#c3ccd5")
    lower.set_xlabel("confidence: probability of the predicted class")
    lower.set_ylabel("images")
    for axes in (upper, lower):
        axes.grid(axis="y", color="#e4e8ec", linewidth=0.8)
        axes.set_axisbelow(True)
    save_figure(figure, path)


def localization_figure(path: Path, items: Sequence[PanelItem]) -> None:
    """Fig. 7: each image with its heat; below it the thresholded region, what was drawn, and the IoU."""
    columns = min(4, len(items))
    rows = -(-len(items) // columns)
    side_by_side = columns > 2
    figure = new_figure(2.75 * columns, 5.95 * rows + (0.7 if side_by_side else 1.15))
    grid = figure.subplots(2 * rows, columns, squeeze=False)
    for axes in grid.ravel():
        axes.set_axis_off()
    for index, item in enumerate(items):
        upper = grid[2 * (index // columns)][index % columns]
        lower = grid[2 * (index // columns) + 1][index % columns]
        for axes in (upper, lower):
            axes.imshow(item.pixels, cmap="gray", vmin=0, vmax=255)
        upper.imshow(item.heat, cmap="inferno", vmin=0, vmax=1, alpha=0.7 * item.heat)
        upper.set_title(item.title, fontsize=8, color=INK)
        _draw_region(lower, item)
        least = f", peak {item.minimum_score:.2f}" if item.minimum_score else ""
        lower.set_title(f"IoU {item.iou:.2f}   (threshold {item.threshold:.2f}{least})", fontsize=9, color=INK)
    handles = _panel_handles(any(item.mask is not None for item in items), any(item.minimum_score for item in items))
    figure.legend(
        handles=handles, loc="outside upper center", ncols=3 if side_by_side else 1, frameon=False, fontsize=9
    )
    save_figure(figure, path, PANEL_DPI)


def localization_curves_figure(
    path: Path, maps: Mapping[str, Mapping[str, Any]], baselines: Mapping[str, Mapping[str, Any]]
) -> None:
    """``maps``, ``baselines``: of ``evaluate_localization``. Left: mean IoU by threshold; right: images by IoU."""
    figure = new_figure(10.5, 4.4)
    left, right = figure.subplots(1, 2)
    for number, (name, row) in enumerate({**maps, **baselines}.items()):
        style: dict[str, Any] = {
            "color": COLOURS[number % len(COLOURS)], "linewidth": 1.8,
            "linestyle": "solid" if name in maps else LINES[1],
        }  # fmt: skip
        label = name.replace("-lungs", ", inside the lungs").replace("_", " ")
        left.plot(row["sweep"]["threshold"], row["sweep"]["iou_mean"], label=label, **style)
        if name in maps:
            left.scatter([row["threshold"]], [row["iou_mean"]], s=34, color=style["color"], zorder=3)
        counts = np.array(row["iou_distribution"])
        # at each edge of a bin the share of images whose IoU is that or more
        share = np.concatenate([np.cumsum(counts[::-1])[::-1], [0]]) / counts.sum()
        right.plot(np.linspace(0, 1, len(share)), share, **style)
    left.set(xlim=(0, 1), ylim=(0, None))
    left.set_xlabel("threshold of the heat (dot: as chosen, never on the image itself)")
    left.set_ylabel("mean IoU")
    right.axvline(0.25, color=FAINT, linewidth=1)
    right.set(xlim=(0, 1), ylim=(0, 1.02))
    right.set_xlabel("IoU (grey line: the paper's 0.25)")
    right.set_ylabel("share of images with this IoU or more")
    for axes in (left, right):
        axes.grid(color="#e4e8ec", linewidth=0.8)
    figure.legend(loc="outside upper center", ncols=4, frameon=False, fontsize=9)
    save_figure(figure, path)


def training_figure(path: Path, logs: Mapping[int, Sequence[Mapping[str, float | None]]]) -> None:
    """Loss and validation score by epoch from each fold's ``log.csv``; dots: the chosen epochs."""
    figure = new_figure(10.5, 3.9)
    left, right = figure.subplots(1, 2)
    for number, (fold, rows) in enumerate(sorted(logs.items())):
        colour = COLOURS[number % len(COLOURS)]
        best = [row for row in rows if row.get("best")][-1:]
        _line(left, rows, "train_loss", colour, linestyle=(0, (3, 2)))
        _line(left, rows, "validation_loss", colour, label=f"fold {fold}")
        has_auc = any(row.get("validation_auc") is not None for row in rows)
        score = "validation_auc" if has_auc else "validation_accuracy"
        _line(right, rows, score, colour, label=f"fold {fold}")
        for axes, name in ((left, "validation_loss"), (right, score)):
            axes.scatter(
                [row["epoch"] for row in best], [row[name] for row in best], s=34, color=colour, zorder=3
            )  # fmt: skip
        right.set_ylabel("validation AUC" if has_auc else "validation accuracy")
    left.set_ylabel("loss (dashed: training, solid: validation)")
    for axes in (left, right):
        axes.set_xlabel("epoch")
        axes.grid(color="#e4e8ec", linewidth=0.8)
        axes.locator_params(axis="x", integer=True)
    if len(logs) > 1:
        right.legend(frameon=False, fontsize=8)
    save_figure(figure, path)


def _draw_region(axes: Any, item: PanelItem) -> None:
    from matplotlib.patches import Rectangle

    if item.mask is not None:
        axes.contour(item.mask.astype(float), levels=[0.5], colors=[DRAWN], linewidths=1.6)
    above = item.heat > item.threshold
    # the shrunk heat may have lost a peak: what counts was decided on the whole
    if item.minimum_score and item.region is not None:
        above = item.region
    if above.any() and not above.all():
        axes.contourf(above.astype(float), levels=[0.5, 1.5], colors=[PREDICTED], alpha=0.22)
        axes.contour(above.astype(float), levels=[0.5], colors=[PREDICTED], linewidths=1.2)
    drawn = [] if item.mask is not None else list(item.boxes)
    shown: list[tuple[Box, str, Any]] = [(box, DRAWN, "-") for box in drawn]
    if item.predicted is not None and item.mask is None:
        shown.append((item.predicted, PREDICTED, (0, (4, 2))))
    for box, colour, style in shown:
        # imshow puts pixel centres at integers, boxes have their edges there
        corner = (box.x0 - 0.5, box.y0 - 0.5)
        axes.add_patch(
            Rectangle(corner, box.width, box.height, fill=False, edgecolor=colour, linewidth=1.8, linestyle=style)
        )


def _panel_handles(masks: bool, peaks: bool) -> list[Any]:
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

    handles: list[Any] = [
        Patch(
            facecolor=PREDICTED,
            alpha=0.35,
            edgecolor=PREDICTED,
            label="attention above the threshold" + (", where its peak suffices" if peaks else ""),
        ),
        Line2D([], [], color=PREDICTED, linestyle=(0, (4, 2)), label="box around it"),
        Line2D([], [], color=DRAWN, label="drawn by people (box or mask)" if masks else "box drawn by people"),
    ]
    return handles


def _line(axes: Any, rows: Sequence[Mapping[str, float | None]], name: str, colour: str, **style: Any) -> None:
    points = [(row["epoch"], row[name]) for row in rows if row.get(name) is not None]
    # a single epoch is a point, which no line shows
    marker = "o" if len(points) == 1 else None
    axes.plot([x for x, _ in points], [y for _, y in points], color=colour, linewidth=1.5, marker=marker, **style)


def short_name(name: str, limit: int = 22) -> str:
    """``name`` as matplotlib shows it, cut to ``limit`` characters."""
    # matplotlib would read $...$ as mathematics
    return (name if len(name) <= limit else name[: limit - 1] + "…").replace("$", r"\$")


def new_figure(width: float, height: float) -> Figure:
    """An empty figure, in inches, that makes room for what is in it."""
    require("matplotlib", feature="the figures of magsd evaluate", extra="train")
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")


def save_figure(figure: Figure, path: Path, dpi: int = DPI, caption: str = "") -> None:
    """Write it as ``path`` with the line that no picture goes without, after ``caption``."""
    width = int(15 * figure.get_figwidth())  # characters of this size that fit
    lines = [line for part in caption.splitlines() for line in textwrap.wrap(part, width)]
    figure.supxlabel("\n".join([*lines, RESEARCH_USE]), fontsize=8, color=FAINT)
    for axes in figure.axes:
        axes.tick_params(colors=INK, labelsize=9)
        for label in (axes.xaxis.label, axes.yaxis.label):
            label.set(fontsize=10, color=INK)
        for side in ("top", "right"):
            axes.spines[side].set_visible(False)
    with replacing(path) as temporary:
        # without a date or version inside, equal results are equal files
        figure.savefig(temporary, dpi=dpi, format="png", metadata={"Software": None})

"""Figures 6, 7 and 8 of the paper from finished cells; the drawing itself is in magsd.figures and paper_figures."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

from magsd.figures import confusion_figure
from magsd.localization_metrics import Case, box_iou, fitted_heat, mask_iou, random_heat, unit_heat
from magsd.metrics import roc_curves
from magsd.paper_figures import (
    Film,
    ModelCurve,
    Shown,
    confusion_panels_figure,
    localization_grid_figure,
    roc_panels_figure,
)
from magsd_runtime.images import read_radiograph
from magsd_runtime.localization import enclosing_box, heat_mask
from magsd_runtime.prediction import Box
from scores import read_predictions

from .cells import Cell, collect
from .localizing import Judgement, compare
from .plan import Plan
from .variants import REFERENCE, title_of

GRID = np.linspace(0, 1, 401)
"""False positive rates at which the folds' curves are averaged."""
FILMS = 6
MODELS = 3
"""Of Figure 7: rows, and models, which have two columns each."""
FILM_SIDE = 320
BASELINES = {"central_box_fitted": "central box,\nfitted size", "random_map": "random map\n(one draw)"}


def draw(
    plan: Plan, cells: Sequence[Cell], out: Path, to: Path, data_root: Path, say: Callable[[str], None], *,
    also: Sequence[str] = (), device: str = "auto",
) -> list[Path]:  # fmt: skip
    """Draw what can be drawn of the cells done; return the files. What cannot is said."""
    results = collect(list(cells), out)
    done: dict[tuple[str, str], list[Cell]] = {}
    planned: dict[tuple[str, str], set[str]] = {}
    for cell in cells:
        planned.setdefault((cell.data, cell.variant), set()).add(cell.key)
        of_row = done.setdefault((cell.data, cell.variant), [])
        if cell.key in results and cell.key not in {other.key for other in of_row}:
            of_row.append(cell)
    files, rocs, confusions = [], [], []
    for name in plan.data:
        rows = {variant: found for (data, variant), found in done.items() if data == name and found}
        if not rows:
            say(f"Figures 6 and 8, data set {name}: no cell is done")
            continue
        short = {variant: len(planned[name, variant]) for variant in rows}
        curves = _curves(rows, short, results, out)
        if curves:
            rocs.append((f"data set {name}", curves))
            files.append(to / f"figure-6-{name}.png")
            roc_panels_figure(files[-1], rocs[-1:], _roc_caption(plan))
        if REFERENCE in rows:
            classes = results[rows[REFERENCE][0].key]["classes"]
            counts = np.sum([np.array(results[cell.key]["confusion"], np.int64) for cell in rows[REFERENCE]], axis=0)
            title = f"data set {name}, {_folds(len(rows[REFERENCE]), short[REFERENCE])}"
            confusions.append((title, np.asarray(counts, np.int64), classes))
            files.append(to / f"figure-8-{name}.png")
            confusion_figure(files[-1], confusion=confusions[-1][1], classes=classes)
    if len(rocs) > 1:
        files.append(to / "figure-6.png")
        roc_panels_figure(files[-1], rocs, _roc_caption(plan))
    if len(confusions) > 1:
        files.append(to / "figure-8.png")
        caption = f"MAG-SD, plan {plan.name}: every film once, judged by the fold that never saw its patient."
        confusion_panels_figure(files[-1], confusions, caption)
    if plan.localization is not None:
        report, judgements = compare(plan, cells, out, data_root, say, also=also, device=device)
        files.append(to / "figure-7-localization.png")
        # the first, then those asked for: stable, so that the others keep their order
        shown = [judgements[0], *sorted(judgements[1:], key=lambda each: not each.model.asked)][:MODELS]
        _localization(files[-1], report, shown)
        if len(judgements) > MODELS:
            say(f"Figure 7 shows {MODELS} of {len(judgements)} models: {', '.join(each.model.title for each in shown)}")
    return files


def _roc_caption(plan: Plan) -> str:
    return (
        f"Plan {plan.name}. Macro means over classes, curves averaged over folds at equal rates; AUC: mean ± standard "
        "deviation over folds.\nThick: the three largest, as in the paper, which does not say that they differ."
    )


def _folds(done: int, planned: int) -> str:
    return f"{done} of {planned} cells"


def _curves(
    rows: Mapping[str, Sequence[Cell]], planned: Mapping[str, int], results: Mapping[str, Mapping[str, Any]], out: Path
) -> list[ModelCurve]:
    """One curve a variant: macro means over classes, averaged over folds at equal rates."""
    curves = []
    for variant in rows:
        rates, areas = [], []
        for cell in rows[variant]:
            predictions = read_predictions(cell.folder(out) / "evaluation")
            of_classes = roc_curves(
                labels=predictions.labels, probabilities=predictions.probabilities, classes=predictions.classes
            )
            if of_classes:
                macro = of_classes[-1]
                rates.append(np.interp(GRID, macro.false_positive_rate, macro.true_positive_rate))
                areas.append(results[cell.key]["scores"]["auc"])
        known = [area for area in areas if area is not None]
        if rates and known:
            rate = np.concatenate([[0.0], np.mean(rates, axis=0)])
            few = "" if len(known) == planned[variant] else f" ({len(known)} of {planned[variant]} cells)"
            deviation = float(np.std(known, ddof=1)) if len(known) > 1 else None
            curves.append(
                ModelCurve(
                    title_of(variant) + few, np.concatenate([[0.0], GRID]), rate, float(np.mean(known)), deviation,
                    variant == REFERENCE,
                )
            )  # fmt: skip
    return curves


def _localization(path: Path, report: Mapping[str, Any], judgements: Sequence[Judgement]) -> None:
    """Figure 7: films evenly from the best to the worst mean IoU of the maps shown; nothing is picked by eye."""
    shown = {
        (number, film.method, film.case.record.path): film
        for number, each in enumerate(judgements)
        for film in reversed(each.found.films)  # so that the lowest fold's stays
    }
    names = ("attention", "evidence")
    common = set.intersection(*({case.record.path for case in each.cases} for each in judgements))
    ordered = sorted(
        common,
        key=lambda film: (
            -sum(shown[number, name, film].scores["iou_mean"] for number in range(len(judgements)) for name in names),
            str(film),
        ),
    )
    count = min(FILMS, len(ordered))
    picked = [ordered[round(at)] for at in np.linspace(0, len(ordered) - 1, count)]
    columns = [
        f"{each.model.title}\n{name}\nmean {each.found.summary['maps'][name]['iou_mean']:.2f}"
        for each in judgements
        for name in names
    ]
    baselines = judgements[0].found.summary["baselines"]
    columns += [f"{text}\nmean {baselines[name]['iou_mean']:.2f}" for name, text in BASELINES.items()]
    films = []
    for film in picked:
        cells = [
            _shown(unit_heat(found.case.heats[name], found.case.truth, each.spec), found.case, found.threshold or 0.5)
            for number, each in enumerate(judgements)
            for name in names
            for found in [shown[number, name, film]]
        ]
        fitted = shown[0, "central_box_fitted", film]
        box = _shown(fitted_heat(fitted.case.truth), fitted.case, fitted.threshold or 0.5, draw_heat=False)
        # the first draw of those whose mean the table has
        draw = random_heat(fitted.case, judgements[0].spec, (0, 0, judgements[0].cases.index(fitted.case)))
        films.append(_film(fitted.case, [*cells, box, _shown(draw, fitted.case, 0.5)]))
    part = judgements[0].found.summary
    caption = (
        f"{count} of {part['images']} films ({Path(report['manifest']).name}), evenly from the best to the worst. "
        "Each model's lowest fold; means: all films and folds. IoU of enclosing boxes, or of masks.\n"
        "Thresholds were chosen on other patients (random map: 0.5). A region is what the network attended to, no "
        "radiologist's finding."
    )
    localization_grid_figure(path, columns, films, caption)


def _shown(heat: NDArray[np.float32], case: Case, threshold: float, *, draw_heat: bool = True) -> Shown:
    counted, truth = heat_mask(heat, threshold), case.truth
    box = enclosing_box(counted)
    iou = mask_iou(counted, truth.mask) if truth.kind == "mask" else box_iou(box, truth.box)
    size, factor = _size(case)
    return Shown(
        np.asarray(cv2.resize(heat, size, interpolation=cv2.INTER_AREA), np.float32) if draw_heat else None,
        np.asarray(cv2.resize(counted.astype(np.uint8), size, interpolation=cv2.INTER_NEAREST)) > 0
        if draw_heat or truth.kind == "mask"
        else None,
        None if box is None else _scaled(box, factor),
        iou,
    )


def _film(case: Case, shown: Sequence[Shown]) -> Film:
    size, factor = _size(case)
    pixels = cv2.resize(read_radiograph(case.record.path).pixels, size, interpolation=cv2.INTER_AREA)
    mask = None
    if case.truth.kind == "mask":
        mask = np.asarray(cv2.resize(case.truth.mask.astype(np.uint8), size, interpolation=cv2.INTER_NEAREST)) > 0
    boxes = [_scaled(Box(x, y, x + w, y + h), factor) for x, y, w, h in case.record.boxes]
    name = case.record.path.name
    title = f"{name if len(name) <= 26 else '…' + name[-25:]}\n{case.record.label}"  # names differ at their end
    return Film(title, np.asarray(pixels, np.uint8), boxes, mask, shown)


def _size(case: Case) -> tuple[tuple[int, int], float]:
    width, height = case.truth.width, case.truth.height
    factor = min(1.0, FILM_SIDE / max(width, height))
    return (max(1, round(width * factor)), max(1, round(height * factor))), factor


def _scaled(box: Box, factor: float) -> Box:
    return Box(box.x0 * factor, box.y0 * factor, box.x1 * factor, box.y1 * factor)

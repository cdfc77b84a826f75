"""Figures 6, 7 and 8 of the paper from finished cells; the drawing itself is in magsd.figures."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from commands import magsd
from magsd.figures import confusion_figure, roc_figure
from magsd.metrics import RocCurve, roc_curves
from scores import read_predictions

from .cells import Cell, collect, unique
from .plan import Plan
from .variants import REFERENCE, TABLES

GRID = np.linspace(0, 1, 401)
"""False positive rates at which the folds' curves are averaged."""


def draw(
    plan: Plan, cells: Sequence[Cell], out: Path, to: Path, data_root: Path, say: Callable[[str], None]
) -> list[Path]:
    """Draw what can be drawn of the cells done; return the files. What cannot is said."""
    results = collect(list(cells), out)
    done: dict[tuple[str, str], list[Cell]] = {}
    for cell in cells:
        of_row = done.setdefault((cell.data, cell.variant), [])
        if cell.key in results and cell.key not in {other.key for other in of_row}:
            of_row.append(cell)
    files = []
    for name in plan.data:
        rows = {variant: found for (data, variant), found in done.items() if data == name and found}
        if rows:
            path = to / f"figure-6-{name}.png"
            roc_figure(path, _curves(rows, results, out))
            files.append(path)
        else:
            say(f"Figures 6 and 8, data set {name}: no cell is done")
        if REFERENCE in rows:
            path = to / f"figure-8-{name}.png"
            first = results[rows[REFERENCE][0].key]
            counts = sum(np.array(results[cell.key]["confusion"], np.int64) for cell in rows[REFERENCE])
            confusion_figure(path, confusion=np.asarray(counts, np.int64), classes=first["classes"])
            files.append(path)
    if plan.localization is not None:
        files += _localization(plan, plan.localization, done, out, to, data_root, say)
    return files


def _curves(rows: Mapping[str, Sequence[Cell]], results: Mapping[str, Mapping[str, Any]], out: Path) -> list[RocCurve]:
    """One curve a variant, the full model's last: macro means over classes, averaged over folds at equal rates."""
    texts = {row.variant: row.text for table in reversed(TABLES) for row in table.rows}
    curves = []
    for variant in sorted(rows, key=lambda name: name == REFERENCE):
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
        if rates:
            rate = np.concatenate([[0.0], np.mean(rates, axis=0)])
            known = [area for area in areas if area is not None]
            title = f"{texts.get(variant, variant)}" if variant == REFERENCE else variant
            curves.append(RocCurve(title, np.concatenate([[0.0], GRID]), rate, float(np.mean(known))))
    return curves


def _localization(
    plan: Plan, what: tuple[str, str], done: Mapping[tuple[str, str], Sequence[Cell]], out: Path, to: Path,
    data_root: Path, say: Callable[[str], None],
) -> list[Path]:  # fmt: skip
    """Figure 7 by `magsd evaluate` of the full model of the lowest fold whose weights were kept."""
    manifest, data = what
    for cell in unique(list(done.get((data, REFERENCE), ()))):
        run = cell.folder(out) / "run"
        if (run / f"fold{cell.fold}" / "best.pt").is_file():
            folder = to / "localization"
            options = ("--force", "--quiet", "--fold", cell.fold)
            magsd("evaluate", run, "--data", data_root / manifest, "--out", folder, *options)
            say(f"Figure 7: {cell.title} on {manifest}; what was measured is in {folder / 'metrics.json'}")
            return sorted(path for path in (folder / "figures").glob("localization*.png"))
    say(f"Figure 7: no full model of data set {data} is done and kept (keep in the plan, or --keep)")
    return []

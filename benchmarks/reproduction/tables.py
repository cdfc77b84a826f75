"""The paper's tables as data: our figures of each row beside the published ones, and paired comparisons by fold.

A fold's figure is the mean over its seeds, so that the unit of every mean, deviation and test is the fold. A pair is
a fold in which both models have the same seed.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from magsd.metrics import fold_summary

from . import published
from .cells import SCORES, Cell
from .plan import Plan
from .statistics import compare
from .variants import REFERENCE, TABLES, Row, Table

SCHEMA = "magsd.reproduction/1"
PUBLISHED_SCORES = ("accuracy", "sensitivity", "specificity", "f1")

Results = Mapping[str, Mapping[str, Any]]
Index = Mapping[tuple[str, str], Sequence[Cell]]


def build(plan: Plan, cells: Sequence[Cell], results: Results, data: Mapping[str, Any], out: Path) -> dict[str, Any]:
    """All tables of a plan. ``results`` by key; ``data``: facts of each data set, as of :func:`data_facts`."""
    index: dict[tuple[str, str], list[Cell]] = {}
    for cell in cells:
        of_row = index.setdefault((cell.data, cell.variant), [])
        if cell.key not in {other.key for other in of_row}:
            of_row.append(cell)
    results = {key: {**each, "scores": scores_of(each, plan.positive or {})} for key, each in results.items()}
    tables = [_table(table, tuple(data), index, results, out) for table in TABLES]
    planned = {cell.key for cell in cells}
    comparisons = sum(len(part["comparisons"]) for table in tables for part in table["data"].values())
    return {
        "schema": SCHEMA,
        "research_use_only": True,
        "plan": {"name": plan.name, "folds": plan.folds, "seeds": list(plan.seeds), "epochs": dict(plan.epochs),
                 "settings": dict(plan.settings or {})},
        "cells": {"planned": len(planned), "done": len(planned & set(results))},
        "data": dict(data),
        "tables": tables,
        "comparisons": comparisons,
        "notes": _notes(plan, index, results, comparisons),
    }  # fmt: skip


def scores_of(result: Mapping[str, Any], positive: Mapping[str, str]) -> dict[str, float | None]:
    """The scores of a cell; on a data set with a positive class, Equations (9) to (11) of that class."""
    scores = dict(result["scores"])
    label = positive.get(result["data"])
    if label is None:
        return scores
    confusion = np.array(result["confusion"], np.int64)  # (2, 2), rows are true classes
    row = result["classes"].index(label)
    hits, misses = int(confusion[row, row]), int(confusion[row, 1 - row])
    alarms, rejected = int(confusion[1 - row, row]), int(confusion[1 - row, 1 - row])
    return {
        **scores,
        "sensitivity": hits / (hits + misses) if hits + misses else None,
        "specificity": rejected / (rejected + alarms) if rejected + alarms else None,
        "f1": 2 * hits / (2 * hits + alarms + misses) if hits + misses else None,
    }


def data_facts(name: str, records: Sequence[Any]) -> dict[str, Any]:
    """Images and patients of each class of one data set, and the paper's images."""
    labels = sorted({record.label for record in records})
    return {
        "classes": {
            label: {
                "images": sum(record.label == label for record in records),
                "patients": len({record.patient for record in records if record.label == label}),
            }
            for label in labels
        },
        "images": len(records),
        "patients": len({record.patient for record in records}),
        "published": dict(published.IMAGES.get(name, {})),
    }


def _table(table: Table, data: Sequence[str], index: Index, results: Results, out: Path) -> dict[str, Any]:
    parts = {}
    for name in data:
        rows = [
            _row(row, name, index, results, out) for row in table.rows if not row.extra or (name, row.variant) in index
        ]
        pairs = [(row.variant, REFERENCE) for row in table.rows if row.variant != REFERENCE] + list(table.pairs)
        compared = [
            _comparison(name, pair, index, results) for pair in pairs if {(name, v) for v in pair} <= set(index)
        ]
        parts[name] = {"rows": rows, "comparisons": [each for each in compared if each["scores"]["accuracy"]["n"]]}
    return {"number": table.number, "title": table.title, "data": parts}


def _row(row: Row, data: str, index: Index, results: Results, out: Path) -> dict[str, Any]:
    cells = index.get((data, row.variant), ())
    done = [cell for cell in cells if cell.key in results]
    failed = [cell for cell in cells if cell.key not in results and (cell.folder(out) / "failed.json").is_file()]
    known = None if row.extra else published.TABLES_3_TO_8.get(row.variant, {}).get(data)
    config = cells[0].config if cells else None
    return {
        "variant": row.variant, "text": row.text, "extra": row.extra,
        "planned": len(cells), "done": len(done), "failed": len(failed),
        "network": None if config is None else {
            "model": config.model, "backbone": config.backbone, "size": config.size, "epochs": config.epochs,
        },
        "scores": {score: fold_summary([*_of_folds(done, results, score).values()]) for score in SCORES},
        "published": None if known is None else dict(zip(PUBLISHED_SCORES, ({"mean": m, "std": s} for m, s in known))),
    }  # fmt: skip


def _of_folds(cells: Sequence[Cell], results: Results, score: str) -> dict[int, float | None]:
    """The mean over seeds of each fold that has one; None where the score is not defined for a seed."""
    folds: dict[int, list[float | None]] = {}
    for cell in cells:
        folds.setdefault(cell.fold, []).append(results[cell.key]["scores"][score])
    return {fold: _mean(values) for fold, values in sorted(folds.items())}


def _mean(values: Sequence[float | None]) -> float | None:
    defined = [value for value in values if value is not None]
    return float(np.mean(defined)) if defined and len(defined) == len(values) else None


def _comparison(data: str, pair: tuple[str, str], index: Index, results: Results) -> dict[str, Any]:
    """``pair[0]`` minus ``pair[1]``, score by score, over the folds in which both have the same seeds."""
    one, other = (
        {(cell.fold, cell.config.seed): results[cell.key] for cell in index[data, name] if cell.key in results}
        for name in pair
    )
    both = sorted(one.keys() & other.keys())
    images = [one[place]["images"] for place in both]
    ratio = float(np.mean([each["test"] / each["train"] for each in images])) if images else 1.0
    scores = {}
    for score in SCORES:
        folds: dict[int, list[float]] = {}
        for fold, seed in both:
            values = one[fold, seed]["scores"][score], other[fold, seed]["scores"][score]
            if None not in values:
                folds.setdefault(fold, []).append(values[0] - values[1])
        differences = [float(np.mean(values)) for values in folds.values()]
        scores[score] = {"differences": differences, **asdict(compare(differences, test_to_train=ratio))}
    printed = [published.TABLES_3_TO_8.get(name, {}).get(data) for name in pair]
    published_difference = (
        {score: round(a[0] - b[0], 2) for score, a, b in zip(PUBLISHED_SCORES, printed[0], printed[1])}
        if printed[0] is not None and printed[1] is not None
        else None
    )
    return {
        "variant": pair[0], "against": pair[1], "test_to_train": ratio, "scores": scores,
        "published_difference": published_difference,
    }  # fmt: skip


def _notes(plan: Plan, index: Index, results: Results, comparisons: int) -> list[str]:
    """What the figures are of, and what they can and cannot show."""
    notes = [
        "Ours: mean and sample standard deviation over the folds done, which hold patients apart; sensitivity, "
        "specificity, F1 and AUC are macro means over classes"
        + "".join(
            f", on data set {name} sensitivity, specificity and F1 those of {label} (which class is positive there, "
            "the paper does not say)"
            for name, label in (plan.positive or {}).items()
        )
        + ".",
        "The data differ: the paper's rows are of its own films and folds. Beside each other they are no comparison "
        "of methods.",
    ]
    notes += _networks(plan, index)
    notes += _warnings(results)
    notes += [
        "GMP and GAP train no attention, so they train without attention-guided augmentation and with plain cross "
        "entropy: what differs from the last row is not the pooling alone. Held against attention pooling without "
        "augmentation, it is.",
        f"Differences are paired by fold. With {plan.folds} folds the sign-flip test cannot give less than "
        f"p = {2 / 2**plan.folds:.4g}, whatever the differences are"
        + (", so it can never reach 0.05." if 2 / 2**plan.folds > 0.05 else ".")
        + " The paired t test takes the folds as independent, which they are not (they share most of their training "
        "images), and finds too much; the corrected one (Nadeau and Bengio 2003) allows for that. The deviation over "
        "folds is no error of the mean.",
    ]
    if len(plan.seeds) == 1:
        notes.append(
            "One seed: a difference contains what another initialisation and order would have changed, and no test "
            "over folds takes that out."
        )
    if comparisons > 1:
        notes.append(
            f"{comparisons} comparisons, and p values not corrected for their number: about {0.05 * comparisons:.1f} "
            "of them would fall below 0.05 without any difference in truth."
        )
    commits = sorted({str(each["commit"] or each["magsd_version"]) for each in results.values()})
    if len(commits) > 1:
        notes.append(f"The cells were made by {len(commits)} states of magsd: {', '.join(commits)}.")
    return notes


def _networks(plan: Plan, index: Index) -> list[str]:
    """Backbone, size and epochs of each data set's rows: those of most, and the others by name."""
    parts = []
    for name in plan.data:
        of_variant = {
            variant: (cells[0].config.backbone, cells[0].config.size, cells[0].config.epochs)
            for (data, variant), cells in index.items()
            if data == name
        }
        if not of_variant:
            continue
        every = list(of_variant.values())
        most = max(every, key=every.count)
        others = [
            f"{variant} ({each[0]}, {each[1]} pixels, {each[2]} epochs)"
            for variant, each in of_variant.items()
            if each != most
        ]
        but = f", but {', '.join(others)}" if others else ""
        parts.append("data set {}: {} at {} pixels, {} epochs".format(name, *most) + but)
    return [f"Plan {plan.name}, {'; '.join(parts)}. The paper: ResNet50 at 224 pixels, 100 epochs."]


def _warnings(results: Results) -> list[str]:
    """What `magsd evaluate` warned of, once a data set."""
    found: dict[str, list[str]] = {}
    cells: dict[str, int] = {}
    for result in results.values():
        cells[result["data"]] = cells.get(result["data"], 0) + 1
        if sources := [text for text in result["notes"] if "source alone" in text]:
            found.setdefault(result["data"], []).append(sources[0])
    return [
        f"Data set {name}, {len(texts)} of {cells[name]} cells, the first: {texts[0]}"
        for name, texts in sorted(found.items())
    ]

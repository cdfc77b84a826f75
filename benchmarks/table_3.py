"""Scores over folds in the form of the paper's Table 3, and the rows of that table; see subgroups.py."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from magsd.evaluation import evaluate_predictions
from magsd.metrics import fold_summary
from magsd.predictors import Predictions
from magsd_runtime.calibration import RELIABILITY_BINS
from reproduction.published import DATA_SETS, TABLES_3_TO_8, Scores
from reproduction.variants import TABLES

TABLE_3_COLUMNS = ("accuracy", "sensitivity", "specificity", "f1")
TABLE_3: Mapping[str, Mapping[str, Scores]] = {
    data: {row.text: TABLES_3_TO_8[row.variant][data] for row in TABLES[0].rows if not row.extra} for data in DATA_SETS
}
"""Mean and deviation in percent, by data set and model, as printed."""

DATA_DIFFER = (
    "The data differ: the paper's rows are of its own films and folds, this evaluation is of other films. "
    "Beside each other they are no comparison of methods."
)


def over_folds(predictions: Predictions, *, resamples: int, seed: int) -> dict[str, Any]:
    """Each score as ``magsd evaluate`` has it, mean and deviation over the models, and the calibration error."""
    report = evaluate_predictions(predictions, resamples=resamples, seed=seed)
    return {
        "models": len(report["folds"]),
        "films": len({record.path for record in predictions.records}),
        **report["classification"],
        "ece": {**fold_summary([fold["ece"] for fold in report["folds"]]), "pooled": report["calibration"]["ece"]},
        "each": [
            {name: fold[name] for name in (*report["classification"], "ece", "images")} for fold in report["folds"]
        ],
    }


def folds_table(found: Mapping[str, Any], data_set: str) -> str:
    """Mean and deviation over models, above the paper's rows: percent, in the form of its Table 3."""
    head = ["", "ACC (%)", "SEN (%)", "SPC (%)", "F1 (%)", "AUC", "ECE"]
    cells = [_mean_deviation(found[name], 100) for name in TABLE_3_COLUMNS]
    name = f"this evaluation: {found['films']} films, {found['models']} model{'s' * (found['models'] > 1)}"
    lines = [[name, *cells, _mean_deviation(found["auc"], 1), _mean_deviation(found["ece"], 1)]]
    for row, values in TABLE_3[data_set].items():
        lines.append([f"paper, {row}", *(f"{mean:.2f}±{deviation:.2f}" for mean, deviation in values), "", ""])
    pooled = "-" if found["ece"]["pooled"] is None else f"{found['ece']['pooled']:.4f}"
    notes = [
        "Mean and sample standard deviation over the folds' models; macro means over classes; AUC of each class "
        "against the rest.",
        f"ECE: {RELIABILITY_BINS} bins, of the probabilities in predictions.csv (those of a run are before any "
        f"temperature, those of a bundle after its own); over all predictions {pooled}.",
        f"Paper: Table 3, data set {data_set}, which gives no AUC and no ECE. {DATA_DIFFER}",
    ]
    if found["models"] < 2:
        notes.insert(0, "One model only: no deviation.")
    return "\n".join([markdown(head, lines), "", *(f"- {text}" for text in notes)])


def markdown(head: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    """A Markdown table."""
    rows = [head, ["---"] * len(head), *lines]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in rows)


def _mean_deviation(score: Mapping[str, Any], factor: float) -> str:
    if score["value"] is None:
        return "-"
    digits = 2 if factor == 100 else 3
    deviation = "" if score["std"] is None else f"±{factor * score['std']:.{digits}f}"
    return f"{factor * score['value']:.{digits}f}{deviation}"

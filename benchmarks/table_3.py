"""Scores over folds in the form of the paper's Table 3, and the rows of that table; see subgroups.py."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from magsd.evaluation import evaluate_predictions
from magsd.metrics import fold_summary
from magsd.predictors import Predictions
from magsd_runtime.calibration import RELIABILITY_BINS

TABLE_3_COLUMNS = ("accuracy", "sensitivity", "specificity", "f1")
TABLE_3: Mapping[str, Mapping[str, tuple[tuple[float, float], ...]]] = {
    "A": {
        "VGG16": ((92.88, 1.35), (91.51, 1.17), (92.77, 1.89), (92.08, 1.44)),
        "ResNet18": ((90.94, 1.39), (91.87, 1.55), (88.56, 1.79), (89.83, 1.46)),
        "ResNet50": ((92.94, 1.19), (91.16, 1.14), (94.25, 1.53), (92.31, 1.39)),
        "InceptionV3": ((94.13, 1.13), (92.94, 1.02), (94.49, 1.11), (93.62, 1.12)),
        "Narin et al., ResNet": ((93.88, 1.18), (93.01, 1.32), (93.63, 1.36), (93.30, 1.55)),
        "Narin et al., InceptionV3": ((94.56, 1.75), (92.19, 1.62), (94.91, 1.47), (93.40, 1.47)),
        "COVID-Net": ((93.25, 1.70), (91.62, 1.88), (93.70, 1.80), (92.51, 1.89)),
        "BCNN": ((96.00, 1.52), (96.43, 1.78), (94.52, 1.60), (95.39, 1.42)),
        "BCNN, attention": ((96.43, 1.45), (96.31, 1.55), (96.16, 1.74), (96.23, 1.30)),
        "FPN": ((94.88, 1.61), (95.11, 1.75), (94.30, 1.22), (94.65, 1.72)),
        "U-Net": ((95.76, 1.07), (94.92, 1.10), (95.91, 1.62), (95.38, 1.13)),
        "MAG-SD(OAUG)": ((94.31, 1.28), (91.70, 1.33), (95.89, 1.94), (93.37, 1.38)),
        "MAG-SD": ((96.94, 1.10), (97.83, 1.53), (94.93, 1.26), (96.23, 1.02)),
    },
    "B": {
        "VGG16": ((90.68, 1.64), (91.05, 2.12), (94.90, 0.82), (89.44, 1.98)),
        "ResNet18": ((92.06, 1.14), (92.03, 1.13), (95.62, 1.03), (91.12, 1.34)),
        "ResNet50": ((92.56, 0.76), (92.07, 1.68), (95.85, 0.47), (91.74, 0.93)),
        "InceptionV3": ((93.06, 1.19), (91.73, 1.13), (96.23, 0.77), (92.42, 1.51)),
        "Narin et al., ResNet": ((93.41, 1.14), (93.71, 1.72), (96.26, 0.62), (93.12, 1.49)),
        "Narin et al., InceptionV3": ((93.45, 1.21), (93.00, 1.24), (96.40, 0.50), (93.04, 1.02)),
        "COVID-Net": ((88.94, 1.28), (89.95, 2.41), (93.75, 0.58), (87.98, 1.56)),
        "BCNN": ((94.41, 1.37), (95.26, 1.23), (96.71, 0.81), (96.71, 1.60)),
        "BCNN, attention": ((95.11, 1.55), (96.61, 2.00), (97.26, 0.72), (94.12, 1.92)),
        "FPN": ((93.27, 1.20), (94.05, 0.82), (96.20, 0.78), (92.86, 1.11)),
        "U-Net": ((93.00, 1.55), (92.59, 1.39), (96.08, 0.82), (92.33, 1.84)),
        "MAG-SD(OAUG)": ((93.25, 0.90), (92.01, 0.93), (96.29, 0.45), (92.06, 1.17)),
        "MAG-SD": ((95.85, 1.27), (95.74, 1.20), (97.73, 0.45), (95.54, 1.59)),
    },
}
"""Li et al., "Multiscale Attention Guided Network for COVID-19 Diagnosis Using Chest X-Ray Images", 2021, Table 3,
data sets A and B: mean and deviation in percent, as printed (BCNN's F1 on B repeats its specificity there).
"""

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

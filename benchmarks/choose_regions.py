"""Which heat map, threshold and minimum score make the best boxes, chosen by cross-validation over the folds' models.

    python benchmarks/choose_regions.py RUN --data localization.csv [--write] [--json FILE]

All trained folds of RUN (not a final model) judge the boxed films, none of which they were trained on. For each map
and minimum score the threshold is chosen on the other patients (leave one patient out), and so is, for the line
"chosen", the whole combination: that line is the honest estimate, the best of the table is not. `--write` puts the
combination that is best over all films into RUN/localization.json, which `magsd export` takes over.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from magsd.data import read_manifest
from magsd.judging import judge_run
from magsd.localization_metrics import THRESHOLDS, Case, central_box_scores, mean_interval, score_heat, unit_heat
from magsd.predictors import Run, open_target
from magsd.progress import no_bar
from magsd_runtime.errors import RESEARCH_USE, DataError, MagsdError, UsageError
from magsd_runtime.files import write_text
from magsd_runtime.localization import IN_LUNGS
from magsd_runtime.preprocessing import PreprocessingSpec
from timing import save

MINIMUM_SCORES = (0.0, 0.6, 0.7, 0.8, 0.9)
"""Not 1.0, which shows one region only: these films have one box each, but patients have two lungs."""


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("run", type=Path)
    parser.add_argument("--data", required=True, type=Path, metavar="BOXES.csv")
    parser.add_argument("--write", action="store_true", help="write RUN/localization.json")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--json", type=Path, metavar="FILE")
    arguments = parser.parse_args(argv)
    try:
        run = open_target(arguments.run)
        if not isinstance(run, Run):
            raise UsageError(f"{arguments.run} is a bundle: expected the folder of a run")
        cases = judge_run(run, read_manifest(arguments.data), None, arguments.device, 8, no_bar).cases
        if not cases:
            raise DataError(f"{arguments.data}: no film has a box")
        result = choose(cases, run.preprocessing)
    except MagsdError as error:
        print(f"choose_regions: {error}", file=sys.stderr)
        return error.exit_code
    print(table(result))
    print(RESEARCH_USE)
    if arguments.write:
        best = result["best"]
        kept = {name: best[name] for name in ("map", "threshold", "minimum_score")}
        text = json.dumps({**kept, "chosen_on": result["chosen_on"]}, indent=1)
        write_text(arguments.run / "localization.json", text + "\n")
    save(arguments.json, result)
    return 0


def choose(cases: Sequence[Case], spec: PreprocessingSpec) -> dict[str, Any]:
    """Mean IoU of every combination, leave one patient out, and of the choice among them."""
    names = sorted(cases[0].heats)
    names += [name + IN_LUNGS for name in names] if spec.crop == "lungs" else []
    combinations = [(name, minimum) for name in names for minimum in MINIMUM_SCORES]
    # (combinations, cases, thresholds)
    iou = np.array([[_iou(case, spec, *each) for case in cases] for each in combinations])
    patients = np.array([case.record.patient for case in cases], dtype=object)
    rows = []
    for (name, minimum), values in zip(combinations, iou):
        honest = _left_out(values[None], patients)
        rows.append({"map": name, "minimum_score": minimum, **_summary(honest, patients)})
    chosen = _left_out(iou, patients)
    at = np.unravel_index(int(iou.mean(1).argmax()), iou.mean(1).shape)
    name, minimum = combinations[int(at[0])]
    count = len({case.record.path for case in cases})
    models = len({case.fold for case in cases})
    central = np.array([central_box_scores(case).iou[0] for case in cases])
    return {
        "films": count, "models": models, "patients": len(set(patients)),
        "rows": rows,
        "chosen": _summary(chosen, patients),
        "central_box": _summary(central, patients),
        "best": {
            "map": name, "minimum_score": minimum, "threshold": float(THRESHOLDS[int(at[1])]),
            "iou_of_the_choice_itself": float(iou.mean(1)[at]),
        },
        "chosen_on": f"the best mean IoU on {count} boxed films by {models} held-out models, together with the map "
        "and the minimum score (benchmarks/choose_regions.py)",
    }  # fmt: skip


def table(result: dict[str, Any]) -> str:
    lines = [f"{result['films']} films of {result['patients']} patients, {result['models']} models", ""]
    lines.append(f"{'map':18}{'minimum score':>14}{'mean IoU':>10}   95 % interval     IoU >= 0.25")
    for row in result["rows"]:
        lines.append(f"{row['map']:18}{row['minimum_score']:>14.1f}{_shown(row)}")
    lines.append(f"{'chosen':32}{_shown(result['chosen'])}")
    lines.append(f"{'central box':32}{_shown(result['central_box'])}")
    best = result["best"]
    lines.append("")
    lines.append(
        f"best over all: {best['map']}, threshold {best['threshold']:.2f}, minimum score {best['minimum_score']:.1f}"
    )
    return "\n".join(lines)


def _shown(row: dict[str, Any]) -> str:
    interval = "-" if row["ci95"] is None else " to ".join(f"{value:.3f}" for value in row["ci95"])
    return f"{row['iou']:10.3f}   {interval:16}{row['iou_at_25']:13.3f}"


def _summary(values: NDArray[np.float64], patients: NDArray[Any]) -> dict[str, Any]:
    return {
        "iou": float(values.mean()),
        "ci95": mean_interval(values, patients.tolist(), 1000, 0),
        "iou_at_25": float((values >= 0.25).mean()),
    }


def _left_out(iou: NDArray[np.float64], patients: NDArray[Any]) -> NDArray[np.float64]:
    """(K, cases, T) -> (cases,): each case at the combination and threshold that are best on the other patients."""
    values = np.empty(iou.shape[1])
    for patient in set(patients):
        own = patients == patient
        others = iou[:, ~own].mean(1) if (~own).any() else np.zeros((iou.shape[0], iou.shape[2]))
        best, threshold = np.unravel_index(int(others.argmax()), others.shape)
        values[own] = iou[best, own, threshold]
    return values


def _iou(case: Case, spec: PreprocessingSpec, name: str, minimum: float) -> NDArray[np.float64]:
    heat = unit_heat(case.heats[name.removesuffix(IN_LUNGS)], case.truth, spec, name)
    return score_heat(heat, case.truth, minimum_score=minimum).iou


if __name__ == "__main__":
    sys.exit(main())

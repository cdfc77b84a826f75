"""Retrain one fold of the shipped model's recipe and hold it against the recorded figures.

    python benchmarks/retrain_fold.py --out DIR [--fold 0] [--data-root CXR] [--threads 2] [--json FILE]
    python benchmarks/retrain_fold.py --record RUN --out DIR                        how the record was made

Makes train.csv as shipped_data.py does, trains the fold with configs/covid-cxr.yaml, evaluates it on the patients of
that fold, whom it has not seen, and compares each figure with configs/covid-cxr.folds.json: value and 95 % interval,
patients resampled, of the fold's model that the model card counts. Exit code 0 where every figure lies in its
interval, else 1. What is finished in DIR is not done again; a training that was stopped goes on. One fold took about 13
minutes on one thread of this project's machines.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import shipped_data
from commands import magsd
from magsd_runtime.errors import RESEARCH_USE, ArtefactError, MagsdError, UsageError
from magsd_runtime.files import write_json, write_text
from scores import default_data_root
from timing import describe, machine, save

CONFIGS = Path(__file__).resolve().parents[1] / "configs"
CONFIG = CONFIGS / "covid-cxr.yaml"
RECORD = CONFIGS / "covid-cxr.folds.json"
FIGURES = ("accuracy", "sensitivity", "specificity", "f1", "auc")


def main(argv: Sequence[str] | None = None) -> int:
    arguments = _arguments(argv)
    try:
        write_text(_made(arguments.out) / "train.csv", shipped_data.table(shipped_data.rows_of(arguments.data_root)))
        if arguments.record is not None:
            record(arguments.record, arguments.out)
            return 0
        rows = read_record(RECORD)
        if not 0 <= arguments.fold < len(rows):
            raise UsageError(f"--fold {arguments.fold}: expected 0 to {len(rows) - 1}")
        found = retrained(arguments.out, arguments.fold, arguments.threads)
        lines, inside = compared(found, rows[arguments.fold])
    except MagsdError as error:
        print(f"retrain_fold: {error}", file=sys.stderr)
        return error.exit_code
    facts = machine("torch", "numpy", "opencv-python-headless")
    print(f"{describe(facts)}\n\n{lines}\n{RESEARCH_USE}")
    save(arguments.json, {"machine": facts, "fold": arguments.fold, "found": found, "inside": inside})
    return 0 if inside else 1


def retrained(out: Path, fold: int, threads: int | None) -> dict[str, Any]:
    """Figures of one fold, trained in ``out``.

    Raises
    ------
    DataError
        If a command fails.
    """
    data, run = out / "train.csv", out / "run"
    threading = [] if threads is None else ["--threads", str(threads)]
    magsd("train", "--config", CONFIG, "--data", data, "--out", run, "--fold", fold, "--resume", *threading)
    return figures(run, data, fold, out / f"evaluation-{fold}")


def figures(run: Path, data: Path, fold: int, out: Path) -> dict[str, Any]:
    """``images``, ``patients`` and the :data:`FIGURES` with ``value`` and ``ci95`` of a run's fold."""
    magsd("evaluate", run, "--data", data, "--fold", fold, "--out", out, "--force", "--quiet")
    metrics = json.loads((out / "metrics.json").read_text(encoding="utf-8"))
    return {
        "images": metrics["data"]["evaluated_images"],
        "patients": metrics["data"]["evaluated_patients"],
        **{name: {key: metrics["classification"][name][key] for key in ("value", "ci95")} for name in FIGURES},
    }


def compared(found: Mapping[str, Any], recorded: Mapping[str, Any]) -> tuple[str, bool]:
    """The table, and whether all of it is as recorded: as many films, and each figure in its interval."""
    lines = [f"{'':12}{'now':>8}{'recorded':>10}   95 % interval"]
    inside = True
    for name in ("images", "patients"):
        same = found[name] == recorded[name]
        inside &= same
        lines.append(f"{name:12}{found[name]:8}{recorded[name]:10}   {'' if same else 'OTHER FILMS'}")
    for name in FIGURES:
        value, (low, high) = found[name]["value"], recorded[name]["ci95"]
        within = low <= value <= high
        inside &= within
        told = "inside" if within else "OUTSIDE"
        lines.append(f"{name:12}{value:8.3f}{recorded[name]['value']:10.3f}   {low:.3f} to {high:.3f}, {told}")
    return "\n".join(lines), inside


def record(run: Path, out: Path) -> None:
    """Write :data:`RECORD` from a run with all its folds trained."""
    rows, fold = [], 0
    while (run / f"fold{fold}" / "best.pt").is_file():
        rows.append(figures(run, out / "train.csv", fold, out / f"recorded-{fold}"))
        fold += 1
    if not rows:
        raise UsageError(f"--record {run}: it has no fold0/best.pt")
    write_json(RECORD, {"config": CONFIG.name, "machine": machine("torch"), "folds": rows})
    print(f"{RECORD}: {len(rows)} folds")


def read_record(path: Path) -> list[dict[str, Any]]:
    """One entry a fold.

    Raises
    ------
    ArtefactError
        If the file is missing or damaged.
    """
    try:
        rows = json.loads(path.read_text(encoding="utf-8"))["folds"]
        assert all({"images", "patients", *FIGURES} <= set(row) for row in rows)
    except (OSError, ValueError, KeyError, TypeError, AssertionError) as error:
        raise ArtefactError(f"{path}: no record of folds ({type(error).__name__})") from error
    return rows


def _made(folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0], epilog=RESEARCH_USE)
    parser.add_argument("--out", required=True, type=Path, metavar="DIR", help="of train.csv, run and evaluation")
    parser.add_argument("--fold", type=int, default=0, metavar="K")
    parser.add_argument("--threads", type=int, metavar="N", help="CPU threads of the training")
    parser.add_argument("--data-root", type=Path, default=default_data_root(), metavar="CXR")
    parser.add_argument("--record", type=Path, metavar="RUN", help="write the record from a run of all folds instead")
    parser.add_argument("--json", type=Path, metavar="FILE")
    return parser.parse_args(argv)


if __name__ == "__main__":
    sys.exit(main())

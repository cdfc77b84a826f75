"""What each step against shortcuts does: a ladder of recipes, each trained and measured on both sides of a stand-in.

    python benchmarks/steps.py --list
    python benchmarks/steps.py --out DIR [--steps plain,frozen] [--sides 0,1] [--threads 1] [--json FILE]

A step is what the step before it is, and one thing more. Each is trained by `magsd train --final` on train-S.csv of
elsewhere.py (kermany's hospital and half of the contributors of cohen are kept from it), exported, and measured

    inside      nih films of held-out patients against COVID-19: the source gives the class away (o4 of elsewhere.py)
    elsewhere   the mean of o1, o2 and o3 of elsewhere.py, with its interval, and these three
    on boxes    localization.csv: mean IoU of boxes, threshold chosen on the other patients; how often the hottest
                point lies inside the box; the share of the attention inside the lungs of lung_masks.csv's test films

What is finished in DIR is not done again, and a training goes on from its checkpoint. On one thread of this
project's machines a step takes from 10 minutes (frozen) to 40 (trained backbone, MAG-SD's four passes) a side.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import elsewhere
from magsd.config import read_config, resolve
from magsd.data import Manifest, read_manifest
from magsd_runtime.bundle import load_bundle
from magsd_runtime.errors import RESEARCH_USE, DataError, MagsdError, UsageError
from magsd_runtime.files import write_text
from reactions import attention_in_lungs, read_lung_masks
from scores import default_data_root, read_predictions, shown
from timing import save

RECIPE = Path(__file__).parents[1] / "configs" / "covid-cxr.yaml"
MINIMUM_SCORE = 0.8
"""Of a region on the boxed films, for every step: fainter ones do not widen the box."""


@dataclass(frozen=True)
class Step:
    """``settings`` are options of `magsd train` that differ from those of the step ``after``."""

    name: str
    text: str
    after: str
    settings: Mapping[str, Any]


LADDER = (
    Step("plain", "MA-Net, cross entropy, whole film, 6 epochs", "", {
        "model": "magsd-oaug", "backbone": "tf_efficientnet_lite0", "epochs": 6, "batch_size": 16,
        "learning_rate": 0.003, "schedule": "cosine", "warmup_epochs": 0.5, "gradient_clip": 5.0,
        "rotation": 15.0, "vertical_flip": False, "select": "last",
    }),
    Step("strong", "strong random tone, blur, noise, erasing; sources balanced", "plain", {
        "tone": 0.5, "blur": 1.5, "noise": 10.0, "erasing": 0.3, "sampling": "balanced-sources",
    }),
    Step("lungs", "cropped to the lung fields", "strong", {"crop": "lungs"}),
    Step("frozen", "the backbone keeps its ImageNet weights", "lungs", {
        "backbone_rate": 0.0, "weight_decay": 0.001, "average": 0.99,
    }),
    Step("spectrum", "equalized as a whole; another film's spectrum instead of the strong changes", "frozen", {
        "tone": 0.0, "blur": 0.0, "noise": 0.0, "erasing": 0.0, "spectrum": 1.0, "clahe_clip": 40.0, "clahe_grid": 1,
    }),
    Step("opacity", "attention taught to look at lung opacities", "spectrum", {
        "lung_attention": 10.0, "lung_attention_target": "opacity", "attention_rate": 300.0,
    }),
    Step("magsd", "MAG-SD: attention-guided augmentation, soft distance", "opacity", {"model": "magsd"}),
    # other choices at the end of the ladder
    Step("l2", "L2 instead of the soft distance", "magsd", {"loss": "l2"}),
    Step("epochs12", "12 epochs", "magsd", {"epochs": 12}),
    Step("size288", "288 pixels", "magsd", {"size": 288}),
)  # fmt: skip
STEPS = {step.name: step for step in LADDER}


def main(argv: Sequence[str] | None = None) -> int:
    arguments = _arguments(argv)
    if arguments.list:
        print("\n".join(f"{step.name:10} {step.text}\n{'':10} {_options(step.settings)}" for step in LADDER))
        return 0
    try:
        names, sides = _chosen(arguments)
        elsewhere.make(arguments.data_root, arguments.out / "elsewhere")
        for name in names:
            for side in sides:
                measure(STEPS[name], side, arguments.out, arguments.data_root, arguments.threads)
        result = collect(arguments.out, names, arguments.bootstrap)
    except MagsdError as error:
        print(f"steps: {error}", file=sys.stderr)
        return error.exit_code
    print(table(result))
    print(RESEARCH_USE)
    save(arguments.json, result)
    return 0


def settings_of(name: str) -> dict[str, Any]:
    """All options of a step that differ from magsd's defaults."""
    step = STEPS[name]
    return {**(settings_of(step.after) if step.after else {}), **step.settings}


def measure(step: Step, side: int, out: Path, data_root: Path, threads: int | None) -> None:
    """Train, export and evaluate one step on one side, as far as it is not done.

    Raises
    ------
    DataError
        If one of the commands fails.
    """
    folder, made = out / f"{step.name}-{side}", out / "elsewhere"
    run, bundle, test = folder / "run", folder / "bundle", made / f"test-{side}.csv"
    config = folder / "config.yaml"
    if not (folder / "attention.json").is_file():
        folder.mkdir(parents=True, exist_ok=True)
        # JSON is YAML
        write_text(config, json.dumps(settings_of(step.name), indent=1) + "\n")
        threading = [] if threads is None else ["--threads", str(threads)]
        train = ["train", "--config", config, "--data", made / f"train-{side}.csv", "--out", run, "--final"]
        _magsd(*train, "--resume", "--quiet", *threading)
        _magsd("export", run, "--final", "--out", bundle, "--force")
    if not (folder / "test" / "metrics.json").is_file():
        _magsd("evaluate", bundle, "--data", test, "--out", folder / "test", "--batch", "8", "--quiet")
    if not (folder / "boxes" / "metrics.json").is_file():
        boxes = ["--data", data_root / "localization.csv", "--out", folder / "boxes", "--map", "attention"]
        _magsd("evaluate", bundle, *boxes, "--batch", "8", "--quiet", "--minimum-score", str(MINIMUM_SCORE))
    if not (folder / "attention.json").is_file():
        masks = read_lung_masks(data_root / "lung_masks.csv")
        found = attention_in_lungs(load_bundle(bundle), _masked(test, masks), masks, lungs=lambda film: None)
        write_text(folder / "attention.json", json.dumps(found["lungs of the mask files"]) + "\n")


def collect(out: Path, names: Sequence[str], resamples: int) -> dict[str, Any]:
    """The figures of each step, over the sides that are there; None where there is none."""
    result: dict[str, Any] = {}
    for name in names:
        folders = [folder for side in elsewhere.SIDES if (folder := out / f"{name}-{side}") and _is_done(folder)]
        if not folders:
            result[name] = None
            continue
        named = {str(folder): read_predictions(folder / "test") for folder in folders}
        scores = elsewhere.score(named, resamples=resamples)
        tests = [_read(folder / "test" / "metrics.json") for folder in folders]
        maps = [_read(folder / "boxes" / "metrics.json")["localization"]["maps"] for folder in folders]
        chosen = [each.get("attention-lungs", each["attention"]) for each in maps]
        result[name] = {
            "sides": len(folders),
            "scores": scores.get("mean") or next(iter(scores["evaluations"].values())),
            "ece": _mean([test["calibration"]["ece"] for test in tests]),
            "box_iou": _mean([each["iou_mean"] for each in chosen]),
            "pointing": _mean([each["pointing"] for each in chosen]),
            "in_lungs": _mean([_read(folder / "attention.json")["attention"]["value"] for folder in folders]),
        }
    return result


def table(result: Mapping[str, Any]) -> str:
    """One line a step."""
    columns = ("o4", "elsewhere", "o1", "o2", "o3", "ece", "box_iou", "pointing", "in_lungs")
    lines = [f"| step | {' | '.join(columns)} | sides |", "|---" * (len(columns) + 2) + "|"]
    for name, row in result.items():
        if row is None:
            lines.append(f"| {name} |" + " - |" * (len(columns) + 1))
            continue
        cells = [shown(row["scores"][column]) for column in columns[:5]]
        cells += [f"{row[column]:.3f}" for column in columns[5:]]
        lines.append(f"| {name} | {' | '.join(cells)} | {row['sides']} |")
    return "\n".join(lines)


def is_the_recipe(name: str) -> bool:
    """Whether a step is configs/covid-cxr.yaml, the recipe of the shipped model."""
    return resolve(settings_of(name)) == resolve(read_config(RECIPE))


def _masked(manifest: Path, masks: Mapping[Path, Path]) -> Manifest:
    films = read_manifest(manifest)
    return replace(films, records=tuple(record for record in films.records if record.path.resolve() in masks))


def _magsd(*arguments: object) -> None:
    command = [sys.executable, "-m", "magsd.cli", *map(str, arguments)]
    print("magsd " + " ".join(command[3:]), file=sys.stderr, flush=True)
    code = subprocess.run(command, stdout=subprocess.DEVNULL).returncode
    if code:
        raise DataError(f"magsd {command[3]} ended with exit code {code}; see above")


def _is_done(folder: Path) -> bool:
    return all((folder / name).is_file() for name in ("test/metrics.json", "boxes/metrics.json", "attention.json"))


def _read(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8"))


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def _options(settings: Mapping[str, Any]) -> str:
    return " ".join(f"--{name.replace('_', '-')} {value}" for name, value in settings.items())


def _chosen(arguments: argparse.Namespace) -> tuple[list[str], list[int]]:
    if arguments.out is None:
        raise UsageError("name the folder of the runs with --out DIR, or see the steps with --list")
    names = arguments.steps.split(",") if arguments.steps else list(STEPS)
    sides = [int(side) for side in arguments.sides.split(",")] if arguments.sides else []
    if unknown := [name for name in names if name not in STEPS]:
        raise UsageError(f"--steps {','.join(unknown)}: expected any of {', '.join(STEPS)}")
    if any(side not in elsewhere.SIDES for side in sides):
        raise UsageError(f"--sides {arguments.sides}: expected 0, 1 or 0,1")
    return names, sides


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--list", action="store_true", help="print the steps and end")
    parser.add_argument("--out", type=Path, metavar="DIR")
    parser.add_argument("--steps", default="", metavar="NAME,...", help="default: all")
    parser.add_argument("--sides", default="0,1", metavar="0,1", help="sides to train; empty: only show what is there")
    parser.add_argument("--threads", type=int)
    parser.add_argument("--data-root", type=Path, default=default_data_root(), metavar="CXR")
    parser.add_argument("--bootstrap", type=int, default=1000, metavar="N", help="resamples (default: 1000)")
    parser.add_argument("--json", type=Path, metavar="FILE")
    return parser.parse_args(argv)


if __name__ == "__main__":
    sys.exit(main())

"""What each step against shortcuts does: a ladder of recipes, each trained and measured on both sides of a stand-in.

    python benchmarks/steps.py --list
    python benchmarks/steps.py --out DIR [--steps plain,frozen] [--sides 0,1] [--threads 1] [--json FILE]

A step is what the step before it is, and one thing more. Each is trained by `magsd train --final` on train-S.csv of
elsewhere.py (kermany's hospital and half of the contributors of cohen are kept from it), exported, and measured

    inside      o4 and o5 of elsewhere.py: the hospitals of the training films, where the source gives COVID-19 away
    elsewhere   the mean of o1, o2 and o3 of elsewhere.py, with its interval, and these three
    all of them macro AUC of the three classes, accuracy and calibration error (no temperature) on test-S.csv
    on boxes    localization.csv, whose patients are in no training: `box_iou`, mean IoU of the mean attention map;
                `box_shown`, the same map as it is shipped: cut to the lung fields where the step finds them, regions
                below a heat of 0.9 left out; `pointing`, how often the hottest point lies in the box
    in_lungs    share of the attention in the lungs of lung_masks.csv, on the test films that it has; `chance`, the
                lungs' share of what the network sees: a crop raises both

Thresholds of boxes are chosen on the other patients. But the form of `box_shown` was chosen on these boxed films for
the last step, and favours it; nothing of `box_iou` was. All but o1 to o5 and elsewhere are plain means of the sides.

What is finished in DIR is not done again, and a training goes on from its checkpoint. On one thread of this
project's machines a step takes from 10 minutes (frozen) to 40 (trained backbone, MAG-SD's four passes) a side.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import elsewhere
from commands import magsd
from magsd.config import read_config, resolve
from magsd.data import Manifest, read_manifest
from magsd_runtime.bundle import load_bundle
from magsd_runtime.errors import RESEARCH_USE, MagsdError, UsageError
from magsd_runtime.files import write_text
from reactions import attention_in_lungs, read_lung_masks
from scores import default_data_root, read_predictions, shown
from timing import save

BOXES = {"boxes-all": 0.0, "boxes-shown": 0.9}
"""Evaluations on localization.csv, and the heat that a region must reach in them: fainter ones do not widen a box."""
COLUMNS = (
    "o4", "o5", "elsewhere", "o1", "o2", "o3", "auc", "accuracy", "ece",
    "box_iou", "box_shown", "pointing", "in_lungs", "chance", "sides",
)  # fmt: skip


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
    Step("attention", "attention taught to look at lung opacities", "spectrum", {
        "lung_attention": 10.0, "lung_attention_target": "opacity", "attention_rate": 300.0,
    }),
    Step("magsd", "MAG-SD: attention-guided augmentation, soft distance", "attention", {"model": "magsd"}),
    # other choices at the end of the ladder
    Step("untaught", "its attention not taught where to look", "magsd", {"lung_attention": 0.0, "attention_rate": 1.0}),
    Step("l2", "L2 instead of the soft distance", "magsd", {"loss": "l2"}),
    Step("constant", "a constant learning rate instead of the cosine", "magsd", {"schedule": "constant"}),
    Step("looks", "the strong random looks as well, beside the spectra", "magsd", {
        "tone": 0.5, "blur": 1.5, "noise": 10.0, "erasing": 0.3,
    }),
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
        if sides:
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
    check_settings(folder, step.name)
    if not (bundle / "bundle.json").is_file():
        folder.mkdir(parents=True, exist_ok=True)
        # JSON is YAML
        write_text(folder / "config.yaml", json.dumps(settings_of(step.name), indent=1) + "\n")
        threading = [] if threads is None else ["--threads", str(threads)]
        train = ["train", "--config", folder / "config.yaml", "--data", made / f"train-{side}.csv", "--out", run]
        magsd(*train, "--final", "--resume", "--quiet", *threading)
        magsd("export", run, "--final", "--out", bundle)
    if not (folder / "test" / "metrics.json").is_file():
        magsd("evaluate", bundle, "--data", test, "--out", folder / "test", "--batch", "8", "--quiet")
    for name, minimum in BOXES.items():
        if not (folder / name / "metrics.json").is_file():
            # a bundle's threshold is that of its own map, attention: with another one the attention gets the best
            # threshold of the other patients
            boxes = ["--data", data_root / "localization.csv", "--out", folder / name, "--map", "evidence"]
            magsd("evaluate", bundle, *boxes, "--batch", "8", "--quiet", "--minimum-score", str(minimum))
    if not (folder / "attention.json").is_file():
        masks = read_lung_masks(data_root / "lung_masks.csv")
        found = attention_in_lungs(load_bundle(bundle), _masked(test, masks), masks, lungs=lambda film: None)
        write_text(folder / "attention.json", json.dumps(found["lungs of the mask files"]) + "\n")


def check_settings(folder: Path, name: str) -> None:
    """Refuse what an earlier ladder left.

    Raises
    ------
    UsageError
        If ``folder`` was trained with other settings than those of step ``name``.
    """
    config = folder / "config.yaml"
    if config.is_file() and resolve(read_config(config)) != resolve(settings_of(name)):
        raise UsageError(f"{folder} has other settings than step {name}: remove it, or choose another --out")


def collect(out: Path, names: Sequence[str], resamples: int) -> dict[str, Any]:
    """The figures of each step, over the sides that are there; None where there is none."""
    result: dict[str, Any] = {}
    for name in names:
        folders = [folder for side in elsewhere.SIDES if (folder := out / f"{name}-{side}") and _is_done(folder)]
        if not folders:
            result[name] = None
            continue
        for folder in folders:
            check_settings(folder, name)
        scores = elsewhere.score({str(each): read_predictions(each / "test") for each in folders}, resamples=resamples)
        tests = [_read(folder / "test" / "metrics.json") for folder in folders]
        every, strong = (
            [_read(folder / boxes / "metrics.json")["localization"]["maps"] for folder in folders] for boxes in BOXES
        )
        lungs = [_read(folder / "attention.json") for folder in folders]
        result[name] = {
            **(scores.get("mean") or next(iter(scores["evaluations"].values()))),
            **{key: _mean([test["classification"][key]["value"] for test in tests]) for key in ("auc", "accuracy")},
            "ece": _mean([test["calibration"]["ece"] for test in tests]),
            "box_iou": _mean([each["attention"]["iou_mean"] for each in every]),
            "box_shown": _mean([each.get("attention-lungs", each["attention"])["iou_mean"] for each in strong]),
            "pointing": _mean([each["attention"]["pointing"] for each in every]),
            "in_lungs": _mean([each["attention"]["value"] if each["films"] else None for each in lungs]),
            "chance": _mean([each["chance"] if each["films"] else None for each in lungs]),
            "sides": len(folders),
        }
    return result


def table(result: Mapping[str, Any]) -> str:
    """One line a step; a dash where there is nothing."""
    lines = [f"| step | {' | '.join(COLUMNS)} |", "|---" * (len(COLUMNS) + 1) + "|"]
    for name, row in result.items():
        lines.append(f"| {name} | {' | '.join(_cell((row or {}).get(column)) for column in COLUMNS)} |")
    return "\n".join(lines)


def _cell(value: Mapping[str, Any] | float | None) -> str:
    if isinstance(value, Mapping):
        return shown(value)
    return "-" if value is None else str(value) if isinstance(value, int) else f"{value:.3f}"


def _masked(manifest: Path, masks: Mapping[Path, Path]) -> Manifest:
    films = read_manifest(manifest)
    return replace(films, records=tuple(record for record in films.records if record.path.resolve() in masks))


def _is_done(folder: Path) -> bool:
    files = [f"{name}/metrics.json" for name in ("test", *BOXES)]
    return all((folder / name).is_file() for name in (*files, "attention.json"))


def _read(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8"))


def _mean(values: Sequence[float | None]) -> float | None:
    """None if one of them is."""
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if len(known) == len(values) else None


def _options(settings: Mapping[str, Any]) -> str:
    """As they are typed."""
    switches = {True: "--{}", False: "--no-{}"}
    return " ".join(
        (switches[value] if isinstance(value, bool) else "--{} {}").format(name.replace("_", "-"), value)
        for name, value in settings.items()
    )


def _chosen(arguments: argparse.Namespace) -> tuple[list[str], list[int]]:
    if arguments.out is None:
        raise UsageError("name the folder of the runs with --out DIR, or see the steps with --list")
    names = arguments.steps.split(",") if arguments.steps else list(STEPS)
    sides = arguments.sides.split(",") if arguments.sides else []
    if unknown := [name for name in names if name not in STEPS]:
        raise UsageError(f"--steps {','.join(unknown)}: expected any of {', '.join(STEPS)}")
    if not set(sides) <= set(map(str, elsewhere.SIDES)):
        raise UsageError(f"--sides {arguments.sides}: expected 0, 1 or 0,1")
    return names, [int(side) for side in sides]


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

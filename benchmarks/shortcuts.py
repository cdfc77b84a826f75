"""The shortcut table: how much can be told without the lungs, and what a trained network does when films change.

    python benchmarks/shortcuts.py --data M.csv --only c                                    a minute
    python benchmarks/shortcuts.py --data M.csv --work DIR --only a,b --epochs 10           two trainings
    python benchmarks/shortcuts.py --data M.csv --target RUN|BUNDLE --only d,e              minutes

    a  a network trained and tested on the border alone: the central 70 % of width and height blanked
    b  a network trained and tested on thumbnails of 32 x 32 pixels
    c  classifiers that see aspect ratio, size and a histogram of greys, and no picture; 5 folds by patient
    d  a trained network on changed films: how often its label stays, how far its probability moves, its AUC
    e  the share of a trained network's attention inside the lungs, beside the lungs' share of what it sees

a, b and c say what a score on these files can be worth; --reference trains the same recipe on unchanged films to
compare a and b with. What a and b have finished in --work is kept and not done again. In d and e a run's folds
judge only patients that they have not seen; a bundle knows no folds, so give it films that it was not trained on.
In d the lungs are found by magsd's own lung network; in e masks come from --lung-masks, and from that network.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from controls import forbid_project, plain_manifest, recipe, tabular_control, trained_control
from magsd.confounds import source_confound
from magsd.data import Manifest
from magsd.folds import load_folds, make_folds
from magsd.predictors import Run, open_target
from magsd.progress import say
from magsd_runtime.bundle import Bundle
from magsd_runtime.errors import RESEARCH_USE, MagsdError, UsageError
from magsd_runtime.lungs import packaged_sha256
from perturbations import Change, blank_centre, thumbnail
from reactions import attention_in_lungs, reactions, read_lung_masks
from scores import COVID, shown
from timing import describe, machine, save

PARTS = ("a", "b", "c", "d", "e")
CONTROLS: Mapping[str, tuple[str, str, Change]] = {
    "a": ("border", "border only, central 70 % blanked", blank_centre),
    "b": ("thumbnail", "thumbnails of 32 x 32", thumbnail),
}
QUICK = {"limit": 60, "epochs": 1, "size": 64, "bootstrap": 50, "folds": 3}


def main(argv: Sequence[str] | None = None) -> int:
    arguments = _arguments(argv)
    try:
        parts = _parts(arguments)
        manifest = plain_manifest(arguments.data, arguments.limit)
        if arguments.positive not in manifest.classes:
            raise UsageError(f"--positive is {arguments.positive}: the manifest has {', '.join(manifest.classes)}")
        target = _open(arguments) if {"d", "e"} & set(parts) else None
        results: dict[str, Any] = {
            "machine": machine("numpy", "scikit-learn", "opencv-python-headless"),
            "data": str(arguments.data),
            "images": len(manifest.records),
            "positive": arguments.positive,
            "parts": {},
        }
        print(f"{describe(results['machine'])}\n{arguments.data}: {len(manifest.records)} images")
        for part in parts:
            found, table = _measure(part, manifest, target, arguments)
            results["parts"][part] = found
            print(f"\n{table}", flush=True)
            save(arguments.json, results)  # after each: a later part that fails takes nothing with it
    except MagsdError as error:
        print(f"shortcuts: {error}", file=sys.stderr)
        return error.exit_code
    print(f"\n{RESEARCH_USE}")
    return 0


def controls_table(title: str, rows: Mapping[str, Mapping[str, Any]], positive: str) -> str:
    """One line a control: AUC of the positive class and macro AUC."""
    lines = [f"{title:36}{f'{positive} AUC':24}{'macro AUC':24}{'films':>6}{'patients':>10}"]
    for name, row in rows.items():
        areas = f"{shown(row['positive_auc']):24}{shown(row['auc']):24}"
        lines.append(f"{name:36}{areas}{row['images']:6}{row['patients']:10}")
    return "\n".join(lines)


def reactions_table(found: Mapping[str, Any], positive: str) -> str:
    lines = [f"{'d: the network on changed films':36}{'films':>6}{'same label':>12}{'mean change':>13}  {positive} AUC"]
    lines.append(f"{'as they are':36}{found['films']:6}{'':>12}{'':>13}  {shown(found['auc'])}")
    for name, row in found["changes"].items():
        if not row["films"]:
            lines.append(f"{name:36}{0:6}")
            continue
        before = "" if row["films"] == found["films"] else f", before {shown(row['auc_before'])}"
        lines.append(
            f"{name:36}{row['films']:6}{row['equal_labels']:12.3f}{row['mean_change']:13.3f}  "
            f"{shown(row['auc'])}{before}"
        )
    return "\n".join(lines)


def attention_table(rows: Mapping[str, Mapping[str, Any]]) -> str:
    title = "e: attention inside the lungs"
    lines = [f"{title:36}{'films':>6}{'attention':>26}{'heat as shown':>16}{'lungs of what is seen':>24}"]
    for name, row in rows.items():
        if not row["films"]:
            lines.append(f"{name:36}{0:6}")
            continue
        lines.append(
            f"{name:36}{row['films']:6}{shown(row['attention']):>26}{row['heat']['value']:16.3f}{row['chance']:24.3f}"
        )
    return "\n".join(lines)


def _measure(
    part: str, manifest: Manifest, target: Run | Bundle | None, arguments: argparse.Namespace
) -> tuple[dict[str, Any], str]:
    """One part's results and their table."""
    positive, resamples = arguments.positive, arguments.bootstrap
    if part in ("d", "e"):
        assert target is not None
        facts = {"target": str(arguments.target), "lungs_sha256": packaged_sha256()}
        how = {"fold": arguments.fold_of_run, "device": arguments.device, "resamples": resamples}
        if part == "d":
            found = reactions(target, manifest, positive, **how)
            return {**facts, **found}, reactions_table(found, positive)
        masks = read_lung_masks(arguments.lung_masks) if arguments.lung_masks else {}
        found = attention_in_lungs(target, manifest, masks, **how)
        return {**facts, "masks": str(arguments.lung_masks or ""), "rows": found}, attention_table(found)
    folds = (
        load_folds(arguments.folds_file, manifest)
        if arguments.folds_file
        else make_folds(manifest, arguments.folds, arguments.seed)
    )
    if part == "c":
        rows = tabular_control(manifest, folds, positive, resamples=resamples)
        source = source_confound(manifest.records)
        table = controls_table("c: no picture, 19 facts of a film", rows, positive)
        if source is not None:
            sensitivity = f"mean sensitivity {source['sensitivity']:.3f} (chance {source['chance']:.3f})"
            table += f"\nthe source alone: accuracy {source['accuracy']:.3f}, {sensitivity}"
        return {"rows": rows, "source_alone": source}, table
    if arguments.threads is not None:
        import torch

        torch.set_num_threads(arguments.threads)
    name, title, change = CONTROLS[part]
    typed = {setting: getattr(arguments, setting) for setting in ("model", "backbone", "weights", "epochs", "size")}
    settings = recipe(arguments.config, {name: value for name, value in typed.items() if value is not None})
    settings.setdefault("seed", arguments.seed)
    rows = {}
    for label, key, alteration in [(title, name, change)] + (
        [("unchanged films", "whole", None)] * arguments.reference
    ):
        rows[label] = trained_control(
            manifest, alteration, key, arguments.work, settings, folds, positive,
            fold=arguments.fold, device=arguments.device, resamples=resamples,
        )  # fmt: skip
    found = {"settings": settings, "fold": arguments.fold, "rows": rows}
    return found, controls_table(f"{part}: trained, fold {arguments.fold}", rows, positive)


def _open(arguments: argparse.Namespace) -> Run | Bundle:
    """The network of d and e.

    Raises
    ------
    UsageError, ArtefactError
        If there is none, it is damaged, or does not know the positive class.
    """
    target = open_target(arguments.target)
    if arguments.positive not in target.classes:
        raise UsageError(f"--positive is {arguments.positive}: the model knows {', '.join(target.classes)}")
    if isinstance(target, Bundle):
        say("warning: a bundle does not know its folds: figures of d and e include its training films, if given")
    return target


def _parts(arguments: argparse.Namespace) -> list[str]:
    """The parts asked for, or all that the arguments allow.

    Raises
    ------
    UsageError
        If a part is unknown, or one that was asked for lacks an argument.
    """
    lacking = {part: "--work" for part in "ab" if arguments.work is None}
    lacking |= {part: "--target" for part in "de" if arguments.target is None}
    if arguments.work is not None:
        forbid_project(arguments.work)
    if arguments.only is None:
        return [part for part in PARTS if part not in lacking]
    asked = [part.strip() for part in arguments.only.split(",")]
    for part in asked:
        if part not in PARTS:
            raise UsageError(f"--only is {arguments.only}: expected some of {','.join(PARTS)}")
        if part in lacking:
            raise UsageError(f"part {part} needs {lacking[part]}")
    return asked


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=(__doc__ or "").partition("\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--data", required=True, type=Path, metavar="M.csv", help="manifest")
    parser.add_argument("--only", metavar="a,b,c,d,e", help="parts; None: all whose arguments are given")
    parser.add_argument("--positive", default=COVID, help="class whose AUC is given")
    parser.add_argument("--limit", type=int, metavar="N", help="films at most, spread over the manifest")
    parser.add_argument("--quick", action="store_true", help=f"a smoke run: {QUICK} unless given")
    parser.add_argument("--json", type=Path, metavar="FILE")
    parser.add_argument("--bootstrap", type=int, metavar="N", help="resamples of intervals; None: 1000")
    parser.add_argument("--device", default="auto", metavar="auto|cpu|cuda")
    group = parser.add_argument_group("a, b and c")
    group.add_argument("--folds", type=int, help="folds by patient; None: 5")
    group.add_argument("--folds-file", type=Path, metavar="FILE", help="folds.json of a run")
    group.add_argument("--seed", type=int, default=0)
    group = parser.add_argument_group("a and b, as in magsd train")
    group.add_argument("--work", type=Path, metavar="DIR", help="folder of copies and runs, outside the project")
    group.add_argument("--fold", type=int, default=0, metavar="K", help="fold whose patients are the test")
    group.add_argument("--reference", action="store_true", help="train on unchanged films too")
    group.add_argument("--config", type=Path, metavar="F.yaml")
    group.add_argument("--model", help="None: plain, or that of --config")
    group.add_argument("--backbone", help="None: tf_efficientnet_lite0, or that of --config")
    group.add_argument("--weights")
    group.add_argument("--epochs", type=int, help="None: 10, or those of --config")
    group.add_argument("--size", type=int)
    group.add_argument("--threads", type=int)
    group = parser.add_argument_group("d and e")
    group.add_argument("--target", type=Path, metavar="RUN|BUNDLE")
    group.add_argument("--fold-of-run", type=int, metavar="K", help="this fold of a run only")
    group.add_argument("--lung-masks", type=Path, metavar="FILE.csv",
                       help="path,mask of films; None: lung_masks.csv beside the manifest, if it is there")  # fmt: skip
    arguments = parser.parse_args(argv)
    beside = arguments.data.parent / "lung_masks.csv"
    if arguments.lung_masks is None and beside.is_file():
        arguments.lung_masks = beside
    defaults: dict[str, Any] = {"bootstrap": 1000, "folds": 5}
    if arguments.config is None:
        defaults |= {"model": "plain", "backbone": "tf_efficientnet_lite0", "epochs": 10}
    for name, value in {**defaults, **(QUICK if arguments.quick else {})}.items():
        if getattr(arguments, name) is None:
            setattr(arguments, name, value)
    return arguments


if __name__ == "__main__":
    sys.exit(main())

"""The verbs of research: train, evaluate, phantoms. Each parses, calls one function and prints."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from magsd_runtime.errors import RESEARCH_USE, UsageError, require

from .progress import bar, no_bar, say, silent, terminal_bar


def train(argv: list[str]) -> int:
    """``magsd train``: cross-validated training; ends with the folder and validation scores of each fold."""
    from .config import overridden, read_config, resolve
    from .options import add_config_options, given_options

    parser = argparse.ArgumentParser(
        prog="magsd train",
        description=f"Train MAG-SD on a manifest of chest X-rays. Defaults are the paper's. {RESEARCH_USE}",
        epilog="Under torchrun: torchrun --nproc-per-node=2 -m magsd.cli train ...",
    )
    parser.add_argument("--out", required=True, type=Path, metavar="RUN", help="run folder to create, or to resume")
    parser.add_argument("--config", type=Path, metavar="F.yaml", help="settings; options given beside it win")
    parser.add_argument("--fold", type=int, metavar="K", help="train this fold only, counted from 0")
    parser.add_argument("--final", action="store_true", help="train one model on all folds, to be deployed")
    parser.add_argument("--resume", action="store_true", help="go on with the run in --out, or start it")
    parser.add_argument("--device", default="auto", metavar="auto|cpu|cuda", help="where to train (default: auto)")
    parser.add_argument("--threads", type=int, metavar="N", help="CPU threads (default: torch's choice)")
    parser.add_argument("--strict-data", action="store_true", help="treat the data report's warnings as errors")
    parser.add_argument("--quiet", action="store_true", help="no progress on stderr")
    parser.add_argument("--json", action="store_true", help="print the result as one JSON object a fold")
    add_config_options(parser)
    arguments = parser.parse_args(argv)

    for module in ("torch", "timm", "sklearn", "safetensors", "yaml"):
        require(module, feature="magsd train", extra="train")
    from .allocator import keep_freed_memory
    from .distributed import processes
    from .folds import FINAL, fold_in_words
    from .run_folder import resumed_config
    from .training import train as train_run

    given = given_options(arguments)
    if arguments.config is not None:
        given = overridden(read_config(arguments.config), given)
    for name in ("data", "folds_file", "weights", "lungs"):
        # a run may be resumed from another folder
        if given.get(name) and not (name == "weights" and given[name] in ("imagenet", "none")):
            given[name] = str(Path(given[name]).absolute())
    if arguments.resume and (arguments.out / "config.yaml").is_file():
        config = resumed_config(arguments.out, given)
    else:
        config = resolve(given)
    if not config.data:
        raise UsageError(
            "--data is missing: a manifest CSV (path,label,patient) or a folder with one subfolder a class"
        )
    if arguments.threads is not None:
        import torch

        if arguments.threads < 1:
            raise UsageError(f"--threads is {arguments.threads}: expected 1 or more")
        torch.set_num_threads(arguments.threads)
    if arguments.final and arguments.fold is not None:
        raise UsageError("--final trains on all folds: leave --fold out")
    with processes(arguments.device) as group:
        if group.device.type == "cpu":
            keep_freed_memory()
        results = train_run(
            config,
            arguments.out,
            group,
            fold=FINAL if arguments.final else arguments.fold,
            resume=arguments.resume,
            strict_data=arguments.strict_data,
            report=silent if arguments.quiet or not group.is_main else say,
            progress=no_bar if arguments.quiet or not group.is_main else terminal_bar,
        )
        if group.is_main:
            for result in results:
                if arguments.json:
                    print(json.dumps({"fold": result.fold, "run": str(result.folder), "epoch": result.epoch,
                                      "validation": result.validation, "research_use_only": True}))  # fmt: skip
                else:
                    scores = "  ".join(f"{k} {v:.4f}" for k, v in result.validation.items() if v is not None)
                    how = "the last" if config.select == "last" else "chosen by validation"
                    print(f"{fold_in_words(result.fold)}: epoch {result.epoch} {how}  {scores}  {result.folder}")
            if not arguments.json:
                print(RESEARCH_USE)
    return 0


def evaluate(argv: list[str]) -> int:
    """``magsd evaluate``: metrics.json, predictions.csv, figures and a report of a run or a bundle."""
    from magsd_runtime.bundle import LOCALIZATION_MAPS

    parser = argparse.ArgumentParser(
        prog="magsd evaluate",
        description=(
            "Evaluate a run (each fold's model on the patients that it has not seen) or a bundle on a "
            "manifest. "
            f"Leaves metrics.json, predictions.csv, figures and report.html. {RESEARCH_USE}"
        ),
    )
    parser.add_argument("target", type=Path, metavar="RUN|BUNDLE", help="folder of magsd train or magsd export")
    parser.add_argument("--data", required=True, type=Path, metavar="M.csv", help="manifest, or a class folder")
    parser.add_argument("--out", required=True, type=Path, metavar="DIR", help="folder to write")
    parser.add_argument("--force", action="store_true", help="replace an earlier evaluation in --out")
    parser.add_argument("--device", default="auto", metavar="auto|cpu|cuda", help="where to predict (default: auto)")
    parser.add_argument("--batch", type=int, default=32, metavar="N", help="images a step (default: 32)")
    parser.add_argument("--fold", type=int, metavar="K", help="this fold of a run only")
    parser.add_argument(
        "--map",
        choices=LOCALIZATION_MAPS,
        help="map of the headline localization (default: the bundle's, or attention); all are reported",
    )
    parser.add_argument(
        "--minimum-score",
        type=float,
        metavar="X",
        help="heat, 0 to 1, that a region must reach to count, in all maps (default: the bundle's, or 0)",
    )
    parser.add_argument(
        "--bootstrap",
        type=int,
        default=1000,
        metavar="N",
        help="resamples of intervals (default: 1000)",
    )
    parser.add_argument("--seed", type=int, default=0, help="seed of resamples and random maps (default: 0)")
    parser.add_argument("--quiet", action="store_true", help="no progress on stderr")
    parser.add_argument("--json", action="store_true", help="print the main numbers as one JSON object")
    arguments = parser.parse_args(argv)

    for module in ("sklearn", "matplotlib"):
        require(module, feature="magsd evaluate", extra="train")
    from .evaluation import evaluate as evaluate_target
    from .evaluation_output import summary, summary_table

    metrics = evaluate_target(
        arguments.target,
        arguments.data,
        arguments.out,
        device=arguments.device,
        batch=arguments.batch,
        resamples=arguments.bootstrap,
        map_name=arguments.map,
        minimum_score=arguments.minimum_score,
        fold=arguments.fold,
        seed=arguments.seed,
        force=arguments.force,
        progress=no_bar if arguments.quiet else bar,
    )
    if not arguments.quiet:
        for entry in metrics["notes"]:
            say(f"{entry['level']}: {entry['text']}")
    if arguments.json:
        print(json.dumps(summary(metrics, arguments.out), allow_nan=False))
    else:
        print(summary_table(metrics))
        print(f"report: {arguments.out / 'report.html'}")
        print(RESEARCH_USE)
    return 0


def phantoms(argv: list[str]) -> int:
    """``magsd phantoms``: synthetic chest films with known opacities and a manifest, to try everything on."""
    parser = argparse.ArgumentParser(
        prog="magsd phantoms",
        description=f"Make synthetic chest films with known opacities, and their manifest. {RESEARCH_USE}",
    )
    parser.add_argument("--out", required=True, type=Path, metavar="DIR", help="folder to write")
    parser.add_argument("--count", type=int, default=100, metavar="N", help="films of each class (default: 100)")
    parser.add_argument("--size", type=int, default=512, metavar="PX", help="about this many pixels (default: 512)")
    parser.add_argument("--seed", type=int, default=0, help="the same seed makes the same films (default: 0)")
    parser.add_argument("--keep", action="store_true", help="do nothing if --out has a manifest already")
    arguments = parser.parse_args(argv)

    from .phantoms import write_phantoms

    manifest = arguments.out / "manifest.csv"
    if manifest.exists():
        if not arguments.keep:
            raise UsageError(f"{manifest} exists: choose another --out, or --keep it")
    else:
        if arguments.count < 1:
            raise UsageError(f"--count is {arguments.count}: expected 1 or more")
        progress = bar("phantoms")
        manifest = write_phantoms(
            arguments.out, n_per_class=arguments.count, size=arguments.size, seed=arguments.seed, progress=progress
        )
    print(manifest)
    return 0

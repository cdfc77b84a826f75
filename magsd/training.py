"""A whole run: weights, data, folds, the run folder, then one fold after the other."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

from magsd_runtime.errors import DataError, UsageError
from magsd_runtime.preprocessing import normalize

from .config import TrainingConfig, write_config
from .data import Prepared, prepare, read_manifest
from .distributed import Processes
from .fold_training import FoldData, FoldResult, train_fold
from .folds import FINAL, Folds, fold_in_words, fold_name, load_folds, make_folds
from .models import build_model, load_imagenet_weights
from .progress import Progress, Report, no_bar, silent
from .run_folder import check_same_data, data_facts, is_set_up, locked, set_up


def train(
    config: TrainingConfig,
    out: Path,
    group: Processes,
    *,
    fold: int | None = None,
    resume: bool = False,
    strict_data: bool = False,
    report: Report = silent,
    progress: Progress = no_bar,
) -> list[FoldResult]:
    """Train every fold, or only ``fold``; return where the models are.

    ``fold`` :data:`~magsd.folds.FINAL` trains one model on all images, for which nothing is held out: it takes
    the last epoch, and its scores are those of the folds trained in the same way.

    Raises
    ------
    DataError
        If the manifest or the folds cannot be used; the message is the whole report.
    UsageError
        If ``out`` holds a run and ``resume`` is False, or another process trains in it.
    CheckpointError
        If a checkpoint to resume from is damaged or belongs to other data.
    """
    if fold == FINAL:
        if config.select != "last":
            raise UsageError(f"--final has no validation part to choose by --select {config.select}: add --select last")
    elif fold is not None and not 0 <= fold < config.folds:
        raise UsageError(f"--fold is {fold}: expected 0 to {config.folds - 1}")
    if config.batch_size % group.world_size:
        # unequal shares: the mean of the processes' gradients would not be the gradient of the batch
        raise UsageError(f"--batch-size is {config.batch_size}: expected a multiple of {group.world_size} processes")
    with locked(out, group):
        finished_setup = is_set_up(out)
        if finished_setup and not resume:
            raise UsageError(f"{out} holds a run already: add --resume to go on with it, or choose another --out")
        manifest = read_manifest(Path(config.data), lenient=True)
        facts = data_facts(manifest)
        if finished_setup:
            check_same_data(out, facts)
        elif any(out.glob("fold*/last.pt")) or (out / "final" / "last.pt").exists():
            raise UsageError(f"{out} holds checkpoints without their config.yaml: choose another --out")
        if config.label_smoothing * len(manifest.classes) >= 1:
            raise UsageError(
                f"--label-smoothing is {config.label_smoothing}: expected less than 1/{len(manifest.classes)} "
                f"for {len(manifest.classes)} classes"
            )
        numbers = range(config.folds) if fold is None else [fold]
        # before the images are read: weights that cannot be had are known at once
        torch.manual_seed(config.seed)
        model = build_model(config, num_classes=max(2, len(manifest.classes)))
        # a fold that goes on takes its weights from its checkpoint
        begins = any(not (out / fold_name(number) / "last.pt").is_file() for number in numbers)
        loaded = load_imagenet_weights(model, config.weights) if begins else "the weights of its checkpoints"
        if group.is_main:
            report(f"network: {config.model} on {loaded}, classes {', '.join(manifest.classes)}")
        prepared = prepare(
            manifest, config.preprocessing(), with_lungs=config.lung_attention > 0, progress=progress("reading")
        )
        folds = _checked_folds(config, prepared, out if finished_setup else None, strict_data, report, group)
        splits = {
            number: folds.split(manifest, number, validation_fraction=config.validation_fraction, seed=config.seed)
            for number in numbers
        }
        for number, split in splits.items():
            if not len(split.train) or (not len(split.validation) and number != FINAL):
                raise DataError(f"{fold_in_words(number)} has no training or no validation images: use fewer --folds")
            if config.size == 32 and len(split.train) % config.batch_size == 1 and group.world_size == 1:
                # its last feature map is one pixel: batch norm has nothing to take a variance of
                raise UsageError(
                    f"--size 32 with a last batch of one image in {fold_in_words(number)}: change --batch-size"
                )
        group.barrier()
        if not finished_setup and group.is_main:
            set_up(out, config, folds, facts, group)
        elif group.is_main:
            write_config(config, out / "config.yaml")  # the data may have moved
        group.barrier()

        images = torch.from_numpy(prepared.images).unsqueeze(1)
        lungs = None if prepared.lungs is None else torch.from_numpy(prepared.lungs).unsqueeze(1)
        labels = torch.from_numpy(manifest.label_indices())
        names = [record.source for record in manifest.records]
        sources = np.unique(names, return_inverse=True)[1].astype(np.int64)
        results = []
        for number, split in splits.items():
            validation = np.zeros((len(split.validation), 1, config.size, config.size), np.float32)
            for row, index in enumerate(split.validation):
                validation[row] = normalize(prepared.images[index])
            data = FoldData(
                images, labels, split, torch.from_numpy(validation), manifest.classes, facts, lungs, sources
            )
            results.append(train_fold(config, out / fold_name(number), number, model, data, group, report, progress))
        return results


def _checked_folds(
    config: TrainingConfig, prepared: Prepared, out: Path | None, strict: bool, report: Report, group: Processes
) -> Folds:
    """The folds, once data and folds are sound; the report names all that is wrong, the exception sums it up."""
    findings, folds = prepared.check(n_folds=config.folds, strict=strict), None
    if not findings.errors:
        folds = _folds(config, prepared, out)
        findings = prepared.check(folds=folds, strict=strict)
    if group.is_main and (findings.errors or findings.warnings):
        report(findings.format())
    findings.raise_if_errors()
    assert folds is not None  # without errors they were made
    return folds


def _folds(config: TrainingConfig, prepared: Prepared, out: Path | None) -> Folds:
    if out is not None:
        return load_folds(out / "folds.json")
    if config.folds_file:
        folds = load_folds(Path(config.folds_file))
        if folds.n_folds != config.folds:
            raise UsageError(f"{config.folds_file} has {folds.n_folds} folds, --folds says {config.folds}")
        return folds
    # near duplicates under two patient names are probably one patient: they share a fold
    records, pairs = prepared.manifest.records, prepared.pairs
    together = [(records[i].patient, records[j].patient) for i, j in zip(pairs.first, pairs.second)]
    return make_folds(prepared.manifest, config.folds, config.seed, together=together)

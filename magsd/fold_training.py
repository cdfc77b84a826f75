"""One fold: its epochs, its validation, its checkpoints, and how it goes on after a kill.

Everything random is drawn from (seed, fold, epoch, step, rank), so a run that was killed and resumed
takes the same steps as one that was not.
"""

from __future__ import annotations

import copy
import math
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from magsd_runtime.errors import CheckpointError, UsageError

from .averaging import BEGINS, WeightAverage
from .checkpoint import CheckpointInfo, load_checkpoint, save_checkpoint, save_weights
from .config import TrainingConfig
from .distributed import Processes
from .folds import Split, fold_in_words
from .metrics import roc_auc_macro
from .progress import Progress, Report, Update, no_bar, silent
from .run_folder import LOG_COLUMNS, tensorboard_writer, write_log
from .schedule import epoch_batches, learning_rate
from .step import draw_generator, training_step, wrap

CHECKPOINT_SECONDS = 120.0
"""Seconds after which an epoch that still runs is saved in between."""


@dataclass(frozen=True)
class FoldResult:
    """One trained fold: its folder, the chosen epoch and the validation scores that chose it."""

    fold: int
    folder: Path
    epoch: int
    validation: dict[str, float | None]


@dataclass(frozen=True)
class FoldData:
    """What one fold trains on. ``images`` is uint8 (N, 1, S, S) on the training device or in host memory."""

    images: torch.Tensor
    labels: torch.Tensor
    split: Split
    validation_images: torch.Tensor  # float32 (V, 1, S, S), normalized as in the runtime
    classes: tuple[str, ...]
    facts: dict[str, Any]
    lungs: torch.Tensor | None = None  # uint8 (N, 1, S, S): how much of each pixel is lung
    sources: NDArray[np.int64] | None = None  # (N,): number of each image's source


def train_fold(
    config: TrainingConfig,
    folder: Path,
    fold: int,
    initial_model: nn.Module,
    data: FoldData,
    group: Processes,
    report: Report = silent,
    progress: Progress = no_bar,
) -> FoldResult:
    """Train one fold from its last checkpoint, or from ``initial_model``; nothing to do if it is complete."""
    model = copy.deepcopy(initial_model)
    resuming = (folder / "last.pt").is_file()
    model.to(group.device)
    if config.channels_last:
        model.to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]
    if config.backbone_rate == 0:
        model.get_submodule("backbone").requires_grad_(False)  # nothing to compute backwards
    optimizer = torch.optim.SGD(
        _parameter_groups(config, model),
        lr=config.learning_rate, momentum=config.momentum,
        weight_decay=config.weight_decay, nesterov=config.nesterov,
    )  # fmt: skip
    scaler = torch.amp.GradScaler(group.device.type, enabled=config.precision == "fp16")
    average = WeightAverage(model, config.average) if config.average else None
    state = State()
    if resuming:
        state = _restore(folder, fold, config, data, model, optimizer, scaler, average, group)
    class_weights = _class_weights(config, data)
    if class_weights is not None:
        class_weights = class_weights.to(group.device)
    network = wrap(model, group)
    trainer = _Fold(config, folder, fold, data, group, model, network, class_weights, optimizer, scaler, average)
    writer = tensorboard_writer(folder, len(state.history)) if group.is_main else None
    if group.is_main and state.history:
        write_log(folder, state.history)
    if group.is_main and 0 < state.epoch < config.epochs:
        report(f"{fold_in_words(fold)}: resuming at epoch {state.epoch + 1} of {config.epochs}, step {state.step}")
    while state.epoch < config.epochs:
        state = trainer.epoch(state, progress(f"{fold_in_words(fold)} epoch {state.epoch + 1}"))
        row = state.history[-1]
        if group.is_main:
            write_log(folder, state.history)
            if writer is not None:
                for name in LOG_COLUMNS[1:7]:
                    if row[name] is not None:
                        writer.add_scalar(name, row[name], row["epoch"])
                writer.flush()
            report(_epoch_line(fold, config, row))
    if writer is not None:
        writer.close()
    group.barrier()
    best = next(row for row in state.history if row["epoch"] == state.best_epoch)
    scores = {name: best[f"validation_{name}"] for name in ("loss", "accuracy", "auc")}
    return FoldResult(fold, folder, state.best_epoch, scores)


@dataclass(frozen=True)
class State:
    """Where a fold stands: ``step`` steps of epoch ``epoch`` (counted from 0) are done."""

    epoch: int = 0
    step: int = 0
    loss_sum: float = 0.0
    correct: float = 0.0
    seconds: float = 0.0
    best_epoch: int = 0
    best_score: tuple[float, float] = (-math.inf, -math.inf)
    history: tuple[dict[str, Any], ...] = ()


@dataclass(frozen=True)
class _Fold:
    config: TrainingConfig
    folder: Path
    fold: int
    data: FoldData
    group: Processes
    model: nn.Module
    network: nn.Module  # the model, or its wrapper that averages gradients
    class_weights: torch.Tensor | None
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler
    average: WeightAverage | None

    def epoch(self, state: State, bar: Update | None) -> State:
        """The rest of one epoch, its validation and its checkpoints."""
        config, group, device = self.config, self.group, self.group.device
        batches = epoch_batches(
            config, self.data.split.train, self.data.labels, state.epoch, group.world_size, self.data.sources
        )
        self.model.train()
        if config.backbone_rate == 0:
            self.model.get_submodule("backbone").eval()  # its batch norm keeps the statistics it came with
        # what was summed before a resume counts once, not once a process
        begun = [state.loss_sum, state.correct] if group.is_main else [0.0, 0.0]
        sums = torch.tensor(begun, dtype=torch.float64, device=device)
        started = saved = time.monotonic()
        for step in range(state.step, len(batches)):
            share = torch.from_numpy(batches[step][group.rank :: group.world_size])
            images = self.data.images[share].to(device, non_blocking=True)
            labels = self.data.labels[share].to(device, non_blocking=True)
            lungs = None if self.data.lungs is None else self.data.lungs[share].to(device, non_blocking=True)
            position = state.epoch + step / len(batches)
            for parameters in self.optimizer.param_groups:
                parameters["lr"] = learning_rate(config, position) * parameters["rate"]
            generator = draw_generator(device, config.seed, self.fold, state.epoch, step, group.rank)
            # dropout and stochastic depth of a backbone draw from the global generator
            torch.manual_seed(generator.initial_seed())
            self.optimizer.zero_grad(set_to_none=True)
            loss, correct = training_step(
                self.network, images, labels, generator, config,
                lungs=lungs, class_weights=self.class_weights, backward=lambda term: self.scaler.scale(term).backward(),
            )  # fmt: skip
            if config.gradient_clip > 0:
                self.scaler.unscale_(self.optimizer)
                nn.utils.clip_grad_norm_(self.model.parameters(), config.gradient_clip)
            self.scaler.step(self.optimizer)
            self.scaler.update()
            if self.average is not None and position >= BEGINS * config.epochs:
                self.average.update(self.model)
            # sums stay on the device: reading them here would make the host wait at every step
            sums += torch.stack([loss.double() * len(share), correct.double()])
            if bar is not None:
                bar(step + 1, len(batches))
            now = time.monotonic()
            if now - saved > CHECKPOINT_SECONDS and step + 1 < len(batches) and group.world_size == 1:
                loss_sum, correct_sum = sums.tolist()
                self._require_finite(loss_sum, state)
                middle = replace(
                    state, step=step + 1, loss_sum=loss_sum, correct=correct_sum,
                    seconds=state.seconds + now - started,
                )  # fmt: skip
                self._save_last(middle)
                saved = now
        group.average_([sums])
        loss_sum, correct_sum = sums.tolist()
        seconds = state.seconds + time.monotonic() - started
        return self._finish(state, batches, loss_sum, correct_sum, seconds)

    def _finish(
        self, state: State, batches: list[NDArray[np.int64]], loss_sum: float, correct: float, seconds: float
    ) -> State:
        config, group = self.config, self.group
        images = sum(len(batch) for batch in batches)
        self._require_finite(loss_sum, state)
        # each process normalized by its own batches: the model that is judged and saved has their mean
        judged = self.model if self.average is None or not self.average.steps else self.average.model
        for model in [self.model] if judged is self.model else [self.model, judged]:
            group.average_([buffer for buffer in model.buffers() if buffer.is_floating_point()])
        scores = validate(judged, self.data, self.group.device, config.batch_size)
        # the last update of the epoch may have lost the weights
        self._require_finite(_sum_of_weights(judged) if scores["loss"] is None else scores["loss"], state)
        score = _score(config, scores, state.epoch)
        improved = score > state.best_score
        row = {
            "epoch": state.epoch + 1,
            "learning_rate": learning_rate(config, float(state.epoch)),
            "train_loss": loss_sum / images * group.world_size,
            "train_accuracy": correct / images * group.world_size,
            "validation_loss": scores["loss"],
            "validation_accuracy": scores["accuracy"],
            "validation_auc": scores["auc"],
            "best": int(improved),
            "images_per_second": images / seconds,
            "seconds": seconds,
        }
        after = State(
            epoch=state.epoch + 1,
            best_epoch=state.epoch + 1 if improved else state.best_epoch,
            best_score=score if improved else state.best_score,
            history=(*state.history, row),
        )
        if group.is_main:
            if improved:
                info = self._info(after.best_epoch, scores)
                save_checkpoint(self.folder / "best.pt", info, judged)
                save_weights(self.folder / "best.safetensors", info, judged)
            self._save_last(after)
        group.barrier()
        return after

    def _require_finite(self, loss: float, state: State) -> None:
        """Before anything is saved: a checkpoint never holds weights that are lost."""
        if not math.isfinite(loss):
            raise UsageError(
                f"the loss of {fold_in_words(self.fold)} is no longer finite in epoch {state.epoch + 1}: "
                "start again in another --out with a lower --learning-rate, --precision fp32 or --gradient-clip 1; "
                "earlier checkpoints are kept"
            )

    def _info(self, epoch: int, scores: dict[str, Any]) -> CheckpointInfo:
        return CheckpointInfo(
            self.data.classes,
            self.config.preprocessing(),
            self.config,
            self.fold,
            epoch,
            scores,
            self.data.facts,
        )

    def _save_last(self, state: State) -> None:
        position = {
            "epoch": state.epoch, "step": state.step, "loss_sum": state.loss_sum, "correct": state.correct,
            "seconds": state.seconds, "best_epoch": state.best_epoch, "best_score": list(state.best_score),
            "history": [dict(row) for row in state.history],
        }  # fmt: skip
        save_checkpoint(
            self.folder / "last.pt", self._info(state.epoch, {}), self.model,
            optimizer=self.optimizer.state_dict(), scaler=self.scaler.state_dict(), position=position,
            average=None if self.average is None else self.average.state_dict(),
        )  # fmt: skip


@torch.no_grad()
def validate(model: nn.Module, data: FoldData, device: torch.device, batch_size: int) -> dict[str, Any]:
    """Cross entropy, accuracy and macro ROC AUC (None if undefined) on the validation part; all None without one."""
    model.eval()
    if not len(data.validation_images):
        return {"loss": None, "accuracy": None, "auc": None}
    logits = torch.cat(
        [model(batch.to(device)).logits.float().cpu() for batch in data.validation_images.split(batch_size)]
    )
    labels = data.labels[torch.from_numpy(data.split.validation)]
    probabilities = torch.softmax(logits.double(), dim=1).numpy()
    return {
        "loss": float(nn.functional.cross_entropy(logits.double(), labels)),
        "accuracy": float((logits.argmax(1) == labels).double().mean()),
        "auc": roc_auc_macro(labels=labels.numpy(), probabilities=probabilities),
    }


def _score(config: TrainingConfig, scores: dict[str, Any], epoch: int) -> tuple[float, float]:
    """Higher is better; equal scores are decided by the loss. Without an AUC the accuracy stands in."""
    if config.select == "last":
        return (float(epoch), 0.0)
    loss = -scores["loss"]
    if config.select == "loss":
        return (loss, loss)
    if config.select == "accuracy" or scores["auc"] is None:
        return (scores["accuracy"], loss)
    return (scores["auc"], loss)


def _restore(
    folder: Path, fold: int, config: TrainingConfig, data: FoldData, model: nn.Module,
    optimizer: torch.optim.Optimizer, scaler: torch.amp.GradScaler, average: WeightAverage | None, group: Processes,
) -> State:  # fmt: skip
    path = folder / "last.pt"
    content, info = load_checkpoint(path, group.device)
    if info.data["digest"] != data.facts["digest"] or info.classes != data.classes:
        raise CheckpointError(f"{path} was trained on other data than this manifest: use another --out")
    # of another fold it would have been trained on this fold's test patients
    if info.fold != fold or replace(info.config, data=config.data) != config:
        raise CheckpointError(f"{path} is of fold {info.fold} or of other settings than this run: use another --out")
    try:
        model.load_state_dict(content["model"])
        optimizer.load_state_dict(content["optimizer"])
        scaler.load_state_dict(content["scaler"])
        if average is not None:
            average.load_state_dict(content["average"])
        position = content["position"]
        state = State(
            **{
                **position,
                "best_score": tuple(position["best_score"]),
                "history": tuple(position["history"]),
            }
        )
    except (KeyError, ValueError, TypeError, RuntimeError) as error:
        raise CheckpointError(f"{path} does not fit this run: {str(error)[:200]}") from error
    if state.best_epoch and not (folder / "best.pt").is_file():
        raise CheckpointError(f"{folder / 'best.pt'}, the model of epoch {state.best_epoch}, is gone: train again")
    return state


def _class_weights(config: TrainingConfig, data: FoldData) -> torch.Tensor | None:
    if config.class_weights == "none":
        return None
    counts = np.bincount(data.labels.numpy()[data.split.train], minlength=len(data.classes))
    return torch.from_numpy((counts.sum() / (len(counts) * np.maximum(counts, 1))).astype(np.float32))


def _parameter_groups(config: TrainingConfig, model: nn.Module) -> list[dict[str, Any]]:
    """The trained parameters in groups by the factor ``rate`` of their learning rate, in the network's order."""
    groups: dict[float, list[nn.Parameter]] = {}
    for name, value in model.named_parameters():
        if value.requires_grad:
            part = name.partition(".")[0]
            rate = {"backbone": config.backbone_rate, "attention_generator": config.attention_rate}.get(part, 1.0)
            groups.setdefault(rate, []).append(value)
    return [{"params": values, "rate": rate} for rate, values in groups.items()]


def _sum_of_weights(model: nn.Module) -> float:
    """Finite if all weights are."""
    return float(torch.stack([value.detach().double().sum() for value in model.parameters()]).sum())


def _epoch_line(fold: int, config: TrainingConfig, row: dict[str, Any]) -> str:
    trained = (
        f"{fold_in_words(fold)}  epoch {row['epoch']:>3}/{config.epochs}  loss {row['train_loss']:.4f}  "
        f"accuracy {row['train_accuracy']:.3f}  "
    )
    speed = f"{row['images_per_second']:.1f} images/s"
    if row["validation_loss"] is None:
        return trained + speed
    auc = "-" if row["validation_auc"] is None else f"{row['validation_auc']:.4f}"
    return (
        f"{trained}| validation loss {row['validation_loss']:.4f}  "
        f"accuracy {row['validation_accuracy']:.3f}  auc {auc}{' *' if row['best'] else '  '}  {speed}"
    )

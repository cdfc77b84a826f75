"""When and in which order: the learning rate, and the images of each step.

Both are functions of the configuration and the position alone, so there is no state to save.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from numpy.typing import NDArray

from .config import TrainingConfig


def learning_rate(config: TrainingConfig, epoch: float) -> float:
    """The learning rate at ``epoch`` (a position in epochs, 0 at the start): warm-up, then the schedule."""
    rate = config.learning_rate
    if epoch < config.warmup_epochs:
        return rate * (epoch + 1e-2 * config.warmup_epochs) / (1.01 * config.warmup_epochs)
    if config.schedule == "step":
        # milestones of the released code, 75 and 125 of its 150 epochs
        return rate * 0.1 ** ((epoch >= config.epochs / 2) + (epoch >= config.epochs * 5 / 6))
    if config.schedule == "cosine":
        length = max(config.epochs - config.warmup_epochs, 1e-9)
        return rate * 0.5 * (1 + math.cos(math.pi * min((epoch - config.warmup_epochs) / length, 1.0)))
    return rate


def epoch_batches(
    config: TrainingConfig,
    train: NDArray[np.int64],
    labels: torch.Tensor,
    epoch: int,
    world_size: int = 1,
    sources: NDArray[np.int64] | None = None,
) -> list[NDArray[np.int64]]:
    """The order of one epoch: record indices of each step over all processes.

    ``train`` are the indices of the training records, ``labels`` int64 (N,) those of all records, and so
    ``sources``, which ``balanced-sources`` needs: within a class, a source with four times the images of another
    is drawn twice as often.

    No image is dropped: the last batch is smaller, and is filled from the epoch's beginning only so far
    that every process has the same number.
    """
    rng = np.random.default_rng([config.seed, epoch])
    if config.sampling != "uniform":
        weights = _sampling_weights(config, labels.numpy()[train], None if sources is None else sources[train])
        order = rng.choice(train, size=len(train), replace=True, p=weights / weights.sum())
    else:
        order = rng.permutation(train)
    batches = [order[start : start + config.batch_size] for start in range(0, len(order), config.batch_size)]
    missing = -len(batches[-1]) % world_size
    if missing:
        batches[-1] = np.concatenate([batches[-1], np.resize(order, missing)])
    return batches


def _sampling_weights(
    config: TrainingConfig, labels: NDArray[np.int64], sources: NDArray[np.int64] | None
) -> NDArray[np.float64]:
    """float64 (N,): equal sums for all classes."""
    weights = np.ones(len(labels))
    if config.sampling == "balanced-sources" and sources is not None:
        cells = labels * (int(sources.max()) + 1) + sources
        weights = 1.0 / np.sqrt(np.bincount(cells)[cells])
    return weights / np.bincount(labels, weights)[labels]

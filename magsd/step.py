"""One training step of MAG-SD: augment, look, augment where it looked, look again, compare.

    uint8 batch -> data augmentation (Table 2; looks, if asked for) -> z-score -> I'_0 -> MA-Net -> P, A
    I'_0 and A -> mix-up, patching, dimming (section 3.3) -> I_1, I_2, I_3 -> MA-Net -> p_1, p_2, p_3
    P, p_1, p_2, p_3, label -> loss (section 3.4)

The target of the soft distance and the attention that guides the augmentation are both detached, so the
loss is a sum of terms that each depend on one pass only. Each term goes backward as soon as it is known:
the activations of one pass are alive at a time instead of those of four, and the gradients are the same.

Nothing here reads the device back: no ``.item()``, ``.cpu()``, ``nonzero`` or loop over images.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor, nn
from torch.nn import functional

from . import attention_augmentation as attention_guided
from .augmentation import AugmentationRanges, augment, draw_augmentation, normalize_batch, warp
from .config import TrainingConfig
from .distributed import Processes
from .losses import (
    attention_divergence,
    cross_entropy_loss,
    lung_opacity,
    outside_share,
    soft_distance,
    soft_target,
)
from .photometric import PhotometricRanges, disturb

_PRECISION = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def training_step(
    network: nn.Module,
    images: Tensor,
    labels: Tensor,
    generator: torch.Generator,
    config: TrainingConfig,
    *,
    lungs: Tensor | None = None,
    class_weights: Tensor | None = None,
    backward: Callable[[Tensor], None] = Tensor.backward,
) -> tuple[Tensor, Tensor]:
    """Add the gradients of one batch to the network's parameters; return loss () and right predictions ().

    ``images`` uint8 (N, 1, S, S), ``labels`` int64 (N,), ``class_weights`` (C,) for the cross entropy.
    ``lungs`` uint8 (N, 1, S, S), how much of each pixel is lung, for ``config.lung_attention``.
    ``generator`` lives on the images' device; all random draws of the step come from it. ``network`` is
    a :class:`~magsd.models.MANet` or one that :func:`wrap` returned. ``backward`` takes each term of the loss.
    """
    names = config.attention_augmentation
    draws = draw_augmentation(augmentation_ranges(config), len(images), generator)
    looks = photometric_ranges(config)
    moved = augment(images, draws)
    image = normalize_batch(disturb(moved, looks, generator) if looks.any else moved)  # I'_0 (N, 1, S, S)
    with _synchronised(network, last=not names):
        logits, attention = _look(network, image, config)
        total = _primary_term(logits, labels, config, class_weights)
        if lungs is not None and config.lung_attention > 0:
            total = total + config.lung_attention * _attention_term(
                attention, moved, warp(lungs.float(), draws), config
            )
        backward(total)
    total, logits, attention = total.detach(), logits.detach(), attention.detach()
    correct = (logits.argmax(1) == labels).sum()
    if not names:
        return total, correct
    target = soft_target(
        logits,
        labels,
        threshold=config.soft_distance_threshold,
        target_rule=config.soft_distance_rule,
        smoothing=config.label_smoothing,
    )
    augmented = attention_guided.augment(
        image, attention, names, generator, gamma=config.mixup_gamma, dimming_factor=config.dimming_factor
    )
    # one batch: (3N, 1, S, S), with one set of batch-norm statistics for all kinds
    batches = (torch.cat(augmented),) if config.auxiliary_passes == "one-batch" else augmented
    for number, batch in enumerate(batches, start=1):
        with _synchronised(network, last=number == len(batches)):
            kinds = _look(network, batch, config)[0].split(len(images))
            term = torch.stack([_auxiliary_term(each, target, labels, config, class_weights) for each in kinds]).sum()
            backward(term)
        total = total + term.detach()
    return total, correct


def _attention_term(attention: Tensor, images: Tensor, lungs: Tensor, config: TrainingConfig) -> Tensor:
    """Of the mean attention map; ``images`` and ``lungs`` (N, 1, S, S), 0 to 255, after the geometric draws."""
    inside = lungs / 255
    height, width = attention.shape[-2:]
    if config.lung_attention_target == "lungs":
        return outside_share(attention, functional.adaptive_avg_pool2d(inside, (height, width)))
    opacity = lung_opacity(images.float() / 255, inside)
    return attention_divergence(attention, functional.adaptive_avg_pool2d(opacity, (height, width)))


def _primary_term(logits: Tensor, labels: Tensor, config: TrainingConfig, class_weights: Tensor | None) -> Tensor:
    loss = cross_entropy_loss(logits, labels, class_weights=class_weights)
    return loss / (1 + len(config.attention_augmentation)) if config.loss == "l2" else loss


def _auxiliary_term(
    logits: Tensor, target: Tensor, labels: Tensor, config: TrainingConfig, class_weights: Tensor | None
) -> Tensor:
    """The share of one kind of auxiliary image in ``soft_distance_loss`` or ``l2_loss``."""
    kinds = len(config.attention_augmentation)
    if config.loss == "l2":
        return cross_entropy_loss(logits, labels, class_weights=class_weights) / (1 + kinds)
    distance = soft_distance(target, logits)
    return distance / kinds if config.soft_distance_reduction == "mean" else distance


def _look(network: nn.Module, image: Tensor, config: TrainingConfig) -> tuple[Tensor, Tensor]:
    """Logits (N, C) and attention (N, M, h, w), float32."""
    precision = _PRECISION[config.precision]
    if config.channels_last:
        image = image.contiguous(memory_format=torch.channels_last)
    with torch.autocast(image.device.type, precision, enabled=precision != torch.float32):
        output = network(image)
    return output.logits.float(), output.attention.float()


def augmentation_ranges(config: TrainingConfig) -> AugmentationRanges:
    """Table 2 as the configuration has it."""
    return AugmentationRanges(
        probability=config.augment_probability,
        brightness=config.brightness,
        contrast=config.contrast,
        crop_scale=config.crop_scale,
        crop_ratio=config.crop_ratio,
        rotation=config.rotation,
        horizontal_flip=config.horizontal_flip,
        vertical_flip=config.vertical_flip,
    )


def photometric_ranges(config: TrainingConfig) -> PhotometricRanges:
    """The changes of looks, which are not the paper's."""
    return PhotometricRanges(
        config.augment_probability, config.tone, config.blur, config.noise, config.erasing, config.spectrum
    )


def draw_generator(device: torch.device, seed: int, fold: int, epoch: int, step: int, rank: int) -> torch.Generator:
    """The generator of one step: its state depends on these numbers and nothing else."""
    digest = hashlib.sha256(f"{seed}/{fold}/{epoch}/{step}/{rank}".encode()).digest()
    generator = torch.Generator(device)
    generator.manual_seed(int.from_bytes(digest[:8], "big") >> 1)  # 63 bits: manual_seed takes an int64
    return generator


def wrap(network: nn.Module, group: Processes) -> nn.Module:
    """The network itself, or under several processes the network with averaged gradients."""
    if group.world_size == 1:
        return network
    # buffers are not broadcast: each process keeps its batch-norm statistics, averaged once an epoch
    ids = [group.device.index] if group.device.type == "cuda" else None
    return nn.parallel.DistributedDataParallel(network, device_ids=ids, broadcast_buffers=False)


def _synchronised(network: nn.Module, *, last: bool) -> AbstractContextManager[object]:
    # the processes exchange gradients once a step, in the backward of its last pass
    if isinstance(network, nn.parallel.DistributedDataParallel) and not last:
        return network.no_sync()
    return nullcontext()

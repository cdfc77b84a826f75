"""One training step of MAG-SD: augment, look, augment where it looked, look again, compare.

    uint8 batch -> data augmentation (Table 2) -> z-score -> I'_0 -> MA-Net -> P, A
    I'_0 and A -> mix-up, patching, dimming (section 3.3) -> I_1, I_2, I_3 -> MA-Net -> p_1, p_2, p_3
    P, p_1, p_2, p_3, label -> loss (section 3.4)

All of it is one module, so that several processes synchronise once a step, and nothing in it reads
the device back: no ``.item()``, ``.cpu()``, ``nonzero`` or loop over images.
"""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor, nn

from . import attention_augmentation as attention_guided
from .augmentation import AugmentationRanges, augment, draw_augmentation, normalize_batch
from .config import TrainingConfig
from .distributed import Processes
from .losses import l2_loss, soft_distance_loss

_PRECISION = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


class TrainingStep(nn.Module):
    """The loss of one batch. ``class_weights`` (C,) weigh the cross entropy."""

    class_weights: Tensor | None

    def __init__(self, model: nn.Module, config: TrainingConfig, class_weights: Tensor | None) -> None:
        super().__init__()
        self.model = model
        self.config = config
        self.ranges = augmentation_ranges(config)
        self.register_buffer("class_weights", class_weights, persistent=False)

    def forward(self, images: Tensor, labels: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """images uint8 (N, 1, S, S), labels int64 (N,) -> loss (), number of right predictions ().

        ``generator`` lives on the images' device; all random draws of the step come from it.
        """
        config = self.config
        draws = draw_augmentation(self.ranges, len(images), generator)
        image = normalize_batch(augment(images, draws))  # I'_0 (N, 1, S, S)
        logits, attention = self._network(image)
        auxiliary: list[Tensor] = []
        if config.attention_augmentation:
            augmented = attention_guided.augment(
                image, attention, config.attention_augmentation, generator,
                gamma=config.mixup_gamma, dimming_factor=config.dimming_factor,
            )  # fmt: skip
            if config.auxiliary_passes == "one-batch":
                auxiliary = list(self._network(torch.cat(augmented))[0].chunk(len(augmented)))
            else:
                auxiliary = [self._network(each)[0] for each in augmented]
        loss = self._loss(logits, auxiliary, labels)
        return loss, (logits.detach().argmax(1) == labels).sum()

    def _network(self, image: Tensor) -> tuple[Tensor, Tensor]:
        precision = _PRECISION[self.config.precision]
        if self.config.channels_last:
            image = image.contiguous(memory_format=torch.channels_last)
        with torch.autocast(image.device.type, precision, enabled=precision != torch.float32):
            output = self.model(image)
        return output.logits.float(), output.attention.float()

    def _loss(self, logits: Tensor, auxiliary: list[Tensor], labels: Tensor) -> Tensor:
        config = self.config
        if config.loss == "soft-distance":
            return soft_distance_loss(
                logits, auxiliary, labels,
                threshold=config.soft_distance_threshold,
                target_rule=config.soft_distance_rule,
                reduction=config.soft_distance_reduction,
                smoothing=config.label_smoothing,
                class_weights=self.class_weights,
            )  # fmt: skip
        return l2_loss(logits, auxiliary, labels, class_weights=self.class_weights)


def augmentation_ranges(config: TrainingConfig) -> AugmentationRanges:
    """Table 2 as the configuration has it."""
    probability = config.augment_probability
    return AugmentationRanges(
        probability=probability,
        brightness=config.brightness,
        contrast=config.contrast,
        crop_scale=config.crop_scale,
        crop_ratio=config.crop_ratio,
        rotation=config.rotation,
        horizontal_flip=config.horizontal_flip,
        vertical_flip=config.vertical_flip,
    )


def draw_generator(device: torch.device, seed: int, fold: int, epoch: int, step: int, rank: int) -> torch.Generator:
    """The generator of one step: its state depends on these numbers and nothing else."""
    digest = hashlib.sha256(f"{seed}/{fold}/{epoch}/{step}/{rank}".encode()).digest()
    generator = torch.Generator(device)
    generator.manual_seed(int.from_bytes(digest[:8], "big") >> 1)  # 63 bits: manual_seed takes an int64
    return generator


def wrap(step: TrainingStep, group: Processes) -> nn.Module:
    """The step itself, or under several processes the step with averaged gradients."""
    if group.world_size == 1:
        return step
    # buffers are not broadcast: each process keeps its batch-norm statistics, averaged once an epoch
    ids = [group.device.index] if group.device.type == "cuda" else None
    return nn.parallel.DistributedDataParallel(step, device_ids=ids, broadcast_buffers=False)

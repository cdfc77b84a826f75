"""The networks. :func:`build_model` makes the one that a training configuration describes."""

from __future__ import annotations

from typing import Protocol

from .ma_net import MANet, MANetOutput, Pooling
from .weights import load_imagenet_weights

__all__ = ["MANet", "MANetOutput", "build_model", "load_imagenet_weights"]


class ModelConfig(Protocol):
    """The part of :class:`magsd.config.TrainingConfig` that a network depends on."""

    @property
    def backbone(self) -> str: ...
    @property
    def attention_scales(self) -> int: ...
    @property
    def num_attention_maps(self) -> int: ...
    @property
    def pooling(self) -> Pooling: ...


def build_model(config: ModelConfig, *, num_classes: int) -> MANet:
    """The network that ``config`` describes, with random weights, in training mode on the CPU.

    Raises
    ------
    UsageError
        As :class:`MANet`.
    """
    return MANet(
        config.backbone,
        num_classes=num_classes,
        attention_scales=config.attention_scales,
        num_attention_maps=config.num_attention_maps,
        pooling=config.pooling,
    )

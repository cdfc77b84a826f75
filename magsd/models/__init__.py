"""The networks. :func:`build_model` makes the one that a training configuration describes.

Whatever the network, it maps float32 (N, 1, S, S) to the four outputs of :class:`MANetOutput`.
"""

from __future__ import annotations

from typing import Protocol

from torch import nn

from .bilinear import AttentionBilinearCNN, BilinearCNN
from .classifiers import NARIN_HIDDEN, ImageNetClassifier
from .covid_net import CovidNet
from .feature_fusion import FPNClassifier, UNetClassifier
from .ma_net import MANet, MANetOutput, Pooling
from .weights import load_imagenet_weights

__all__ = [
    "AttentionBilinearCNN",
    "BilinearCNN",
    "CovidNet",
    "FPNClassifier",
    "ImageNetClassifier",
    "MANet",
    "MANetOutput",
    "UNetClassifier",
    "build_model",
    "load_imagenet_weights",
]


class ModelConfig(Protocol):
    """The part of :class:`magsd.config.TrainingConfig` that a network depends on."""

    @property
    def model(self) -> str: ...
    @property
    def backbone(self) -> str: ...
    @property
    def attention_scales(self) -> int: ...
    @property
    def num_attention_maps(self) -> int: ...
    @property
    def pooling(self) -> Pooling: ...


def build_model(config: ModelConfig, *, num_classes: int) -> nn.Module:
    """The network that ``config`` describes, with random weights, in training mode on the CPU.

    Raises
    ------
    UsageError
        As :class:`MANet`.
    """
    match config.model:
        case "vgg16" | "resnet18" | "resnet50" | "inception-v3":
            return ImageNetClassifier(config.backbone, num_classes=num_classes)
        case "narin-resnet50" | "narin-inception-v3":
            return ImageNetClassifier(config.backbone, num_classes=num_classes, hidden=NARIN_HIDDEN)
        case "covid-net":
            return CovidNet(num_classes=num_classes)
        case "bcnn":
            return BilinearCNN(config.backbone, num_classes=num_classes)
        case "bcnn-attention":
            return AttentionBilinearCNN(
                config.backbone,
                num_classes=num_classes,
                attention_scales=config.attention_scales,
                num_attention_maps=config.num_attention_maps,
            )
        case "fpn":
            return FPNClassifier(config.backbone, num_classes=num_classes)
        case "unet":
            return UNetClassifier(config.backbone, num_classes=num_classes)
    return MANet(
        config.backbone,
        num_classes=num_classes,
        attention_scales=config.attention_scales,
        num_attention_maps=config.num_attention_maps,
        pooling=config.pooling,
    )

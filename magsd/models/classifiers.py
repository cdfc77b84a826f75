"""The networks of Table 3 that classify as on ImageNet: VGG16, ResNet18, ResNet50, Inception v3, Narin et al.

    image        (N, 1, S, S)
    features     (N, D, h, w)      ResNet50 at 224: (N, 2048, 7, 7); Inception v3 at 299: (N, 2048, 8, 8)
    embedding    (N, E)            their global average; VGG16: its two fully connected layers, E = 4096
    logits       (N, C)            linear

The networks are timm's, without their last layer. Sources:

- VGG16: Simonyan and Zisserman 2014, arXiv:1409.1556, configuration D, dropout 0.5 as there.
- ResNet18, ResNet50: He et al. 2016 (the stride of 2 in the 3x3 convolution, as torchvision and timm have it).
- Inception v3: Szegedy et al. 2016, without the auxiliary classifier, which serves a loss of its own.
- Narin et al. 2020, arXiv:2003.10849: ResNet50 and Inception v3 pretrained on ImageNet, with a new head.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from magsd_runtime.errors import UsageError

from .ma_net import MANetOutput, float32_from_here

NARIN_HIDDEN = 1024
"""Units of the hidden layer of Narin et al.'s head. Ours: a common choice. Their text, as far as we could read it,
says that the networks got a new head and not how wide it is."""

_DROPOUT = {"vgg16": 0.5}


class ImageNetClassifier(nn.Module):
    """timm's network ``backbone`` for grey images and ``num_classes``.

    ``hidden``: a fully connected layer of so many units with ReLU before the last one (Narin et al.); 0: none.
    """

    def __init__(self, backbone: str, *, num_classes: int, hidden: int = 0, in_channels: int = 1) -> None:
        import timm

        super().__init__()
        if num_classes < 2:
            raise UsageError(f"num_classes is {num_classes}: expected at least 2")
        self.backbone_name = backbone
        dropout = _DROPOUT.get(backbone, 0.0)
        self.backbone: Any = timm.create_model(
            backbone, pretrained=False, in_chans=in_channels, num_classes=0, drop_rate=dropout
        )
        width = int(self.backbone.head_hidden_size)
        self.hidden = nn.Sequential(nn.Linear(width, hidden), nn.ReLU()) if hidden else nn.Identity()
        self.dropout = nn.Dropout(dropout)
        self.classifier = nn.Linear(hidden or width, num_classes)

    def forward(self, image: Tensor) -> MANetOutput:
        """image (N, 1, S, S), z-scored -> :func:`output_without_attention`."""
        features = self.backbone.forward_features(image)  # (N, D, h, w)
        embedding = self.backbone.forward_head(features, pre_logits=True).flatten(1)  # (N, E)
        with float32_from_here(image):
            embedding = self.dropout(embedding.float())
            return output_without_attention(self.classifier(self.hidden(embedding)), features, embedding)


def output_without_attention(logits: Tensor, features: Tensor, embedding: Tensor) -> MANetOutput:
    """What a network without attention says in MA-Net's four outputs.

    Its one map is the mean of the positive last features (N, D, h, w) over the channels: where the network finds
    structure at all. It is not attention, was not trained to localize, and is the same map for every class.
    ``evidence`` (N, C, 1) is the logits, so that they are its sum, as in MA-Net.
    """
    activation = torch.relu(features.float()).mean(1, keepdim=True)  # (N, 1, h, w)
    return MANetOutput(logits, activation, logits[:, :, None], embedding)

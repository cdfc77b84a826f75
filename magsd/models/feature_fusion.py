"""FPN and U-Net as classifiers: the fused maps of every level, averaged, side by side, one linear layer.

Shapes are those of ResNet50 at 224 x 224.

    image      (N, 1, 224, 224)
    FPN        (N, 256, 56, 56), (N, 256, 28, 28), (N, 256, 14, 14), (N, 256, 7, 7)      vector (N, 1024)
    U-Net      (N, 256, 14, 14), (N, 128, 28, 28), (N, 64, 56, 56), (N, 32, 112, 112)    vector (N, 480)
    logits     (N, C)

Sources: Lin et al. 2017, "Feature Pyramid Networks for Object Detection" (P2 to P5 of 256 channels; torchvision's
``FeaturePyramidNetwork``). Ronneberger et al. 2015, "U-Net": each step up doubles the resolution, takes the encoder's
map of the same size beside it, and convolves twice; here over a pretrained encoder, padded so that sizes are kept,
with batch norm and nearest-neighbour upsampling. The MAG-SD paper names FPN and U-Net as "multiscale feature fusion
models" and does not say how they classify: averaging every fused level is our choice, the same for both.
"""

from __future__ import annotations

from collections import OrderedDict

import torch
from torch import Tensor, nn
from torch.nn import functional

from magsd_runtime.errors import UsageError

from .classifiers import output_without_attention
from .ma_net import MANetOutput, create_backbone, float32_from_here

FPN_REDUCTIONS = (4, 8, 16, 32)
FPN_CHANNELS = 256
UNET_REDUCTIONS = (2, 4, 8, 16, 32)
UNET_CHANNELS = (256, 128, 64, 32)


class FPNClassifier(nn.Module):
    """Feature pyramid over timm's ``backbone`` (C2 to C5, strides 4 to 32)."""

    def __init__(self, backbone: str = "resnet50", *, num_classes: int) -> None:
        from torchvision.ops import FeaturePyramidNetwork

        super().__init__()
        if num_classes < 2:
            raise UsageError(f"num_classes is {num_classes}: expected at least 2")
        self.backbone_name = backbone
        self.backbone, self.taps, channels = create_backbone(backbone, FPN_REDUCTIONS, channels_first=True)
        self.pyramid = FeaturePyramidNetwork(list(channels), FPN_CHANNELS)
        self.classifier = nn.Linear(len(channels) * FPN_CHANNELS, num_classes)

    def forward(self, image: Tensor) -> MANetOutput:
        """image (N, 1, S, S), z-scored, S a multiple of 32 -> ``output_without_attention`` of P5, h = w = S / 32."""
        features = self.backbone(image)
        levels = self.pyramid(OrderedDict((str(tap), features[tap]) for tap in self.taps))
        return _classify(image, list(levels.values()), features[self.taps[-1]], self.classifier)


class UNetClassifier(nn.Module):
    """U-Net's encoder and decoder over timm's ``backbone`` (strides 2 to 32)."""

    def __init__(self, backbone: str = "resnet50", *, num_classes: int) -> None:
        super().__init__()
        if num_classes < 2:
            raise UsageError(f"num_classes is {num_classes}: expected at least 2")
        self.backbone_name = backbone
        self.backbone, self.taps, channels = create_backbone(backbone, UNET_REDUCTIONS, channels_first=True)
        below = (channels[-1], *UNET_CHANNELS[:-1])
        self.up = nn.ModuleList(
            _block(under + skip, out) for under, skip, out in zip(below, channels[-2::-1], UNET_CHANNELS)
        )
        self.classifier = nn.Linear(sum(UNET_CHANNELS), num_classes)

    def forward(self, image: Tensor) -> MANetOutput:
        """image (N, 1, S, S), z-scored, S a multiple of 32 -> ``output_without_attention``, h = w = S / 32."""
        features = self.backbone(image)
        encoded = [features[tap] for tap in self.taps]
        x, levels = encoded[-1], []
        for block, skip in zip(self.up, encoded[-2::-1]):
            x = functional.interpolate(x, scale_factor=2.0, mode="nearest")
            x = block(torch.cat([x, skip], dim=1))
            levels.append(x)
        return _classify(image, levels, encoded[-1], self.classifier)


def _classify(image: Tensor, levels: list[Tensor], last: Tensor, classifier: nn.Module) -> MANetOutput:
    """``levels``: fused maps (N, D_i, h_i, w_i); ``last`` (N, D, h, w), whose activation is the map that is shown."""
    with float32_from_here(image):
        vector = torch.cat([level.float().mean((2, 3)) for level in levels], dim=1)
        return output_without_attention(classifier(vector), last, vector)


def _block(inputs: int, outputs: int) -> nn.Sequential:
    layers: list[nn.Module] = []
    for channels in (inputs, outputs):
        layers += [
            nn.Conv2d(channels, outputs, 3, padding=1, bias=False),
            nn.BatchNorm2d(outputs),
            nn.ReLU(inplace=True),
        ]
    return nn.Sequential(*layers)

"""COVID-Net, large variant (COVIDNet-CXR Large): Wang, Lin and Wong 2020, arXiv:2003.09871.

    image       (N, 1, 224, 224)
    conv1       (N, 64, 112, 112)     7x7, stride 2; then pooled to 56 x 56
    stage 1     (N, 256, 56, 56)      3 PEPX
    stage 2     (N, 512, 28, 28)      4 PEPX
    stage 3     (N, 1024, 14, 14)     6 PEPX
    stage 4     (N, 2048, 7, 7)       3 PEPX
    flattened   (N, 100352)
    FC          1024, 256, C

PEPX: 1x1 projection, 1x1 expansion, 3x3 depthwise, 1x1 projection, 1x1 extension. Long-range connections: every
PEPX sees the sum of all before it in its stage and of one 1x1 convolution of the stage's input; the large variant is
the one with these convolutions.

Published: the pattern, the connections, the shapes above (taken from public discussions of the authors' network: the
paper's Figure 2 could not be opened for this), 127.4 million parameters and 3.59 billion multiply-adds
(docs/models.md of the authors' repository). Not published as text: the widths inside each PEPX, which a machine
searched for, and where batch norm stands. Ours: projections to a quarter (stages 1 and 2) or three eighths (3 and 4) of
the stage's channels and expansion to a half, the simplest rule of a search whose totals are both within 1 % of the
published ones; batch norm after every convolution, ReLU after every one but the last of a PEPX. The authors
pretrained on ImageNet; their weights are of another library and other widths, so this network starts from random ones.
"""

from __future__ import annotations

from fractions import Fraction

import torch
from torch import Tensor, nn
from torch.nn import functional

from magsd_runtime.errors import UsageError

from .classifiers import output_without_attention
from .ma_net import MANetOutput, float32_from_here

SIZE = 224
STAGES = (  # channels, PEPX modules, projection as a share of the channels
    (256, 3, Fraction(1, 4)),
    (512, 4, Fraction(1, 4)),
    (1024, 6, Fraction(3, 8)),
    (2048, 3, Fraction(3, 8)),
)
EXPANSION = Fraction(1, 2)
FULLY_CONNECTED = (1024, 256)


class CovidNet(nn.Module):
    """COVID-Net large for ``num_classes`` and images of 224 x 224: its first fully connected layer sees 7 x 7."""

    def __init__(self, *, num_classes: int, in_channels: int = 1) -> None:
        super().__init__()
        if num_classes < 2:
            raise UsageError(f"num_classes is {num_classes}: expected at least 2")
        self.stem = _convolution(in_channels, 64, 7, stride=2)
        inputs = (64, *(channels for channels, _, _ in STAGES[:-1]))
        self.stages = nn.ModuleList(
            Stage(into, channels, modules, int(channels * share), int(channels * EXPANSION))
            for into, (channels, modules, share) in zip(inputs, STAGES)
        )
        side = SIZE // 32
        first, second = FULLY_CONNECTED
        self.fully_connected = nn.Sequential(
            nn.Linear(STAGES[-1][0] * side * side, first), nn.ReLU(), nn.Linear(first, second), nn.ReLU()
        )
        self.classifier = nn.Linear(second, num_classes)

    def forward(self, image: Tensor) -> MANetOutput:
        """image (N, 1, 224, 224), z-scored -> :func:`~.classifiers.output_without_attention`, E = 256."""
        x = torch.relu(self.stem(image))  # (N, 64, 112, 112)
        for stage in self.stages:
            x = stage(functional.max_pool2d(x, 2))  # each stage at half the resolution of the one before
        embedding = self.fully_connected(x.flatten(1))  # (N, 256)
        with float32_from_here(image):
            embedding = embedding.float()
            return output_without_attention(self.classifier(embedding), x, embedding)


class Stage(nn.Module):
    """PEPX modules in a row, each on the sum of all before it and of the stage's 1x1 convolution."""

    def __init__(self, inputs: int, channels: int, modules: int, projection: int, expansion: int) -> None:
        super().__init__()
        self.long_range = _convolution(inputs, channels, 1)
        self.pepx = nn.ModuleList(
            pepx(inputs if position == 0 else channels, channels, projection, expansion) for position in range(modules)
        )

    def forward(self, x: Tensor) -> Tensor:
        """(N, inputs, h, w) -> the sum of all its parts, rectified (N, channels, h, w)."""
        total = self.long_range(x)
        for position, module in enumerate(self.pepx):
            total = total + module(x if position == 0 else torch.relu(total))
        return torch.relu(total)


def pepx(inputs: int, outputs: int, projection: int, expansion: int) -> nn.Sequential:
    """Projection, expansion, depthwise representation, projection, extension."""
    return nn.Sequential(
        _convolution(inputs, projection, 1),
        nn.ReLU(inplace=True),
        _convolution(projection, expansion, 1),
        nn.ReLU(inplace=True),
        _convolution(expansion, expansion, 3, groups=expansion),
        nn.ReLU(inplace=True),
        _convolution(expansion, projection, 1),
        nn.ReLU(inplace=True),
        _convolution(projection, outputs, 1),
    )


def _convolution(inputs: int, outputs: int, kernel: int, *, stride: int = 1, groups: int = 1) -> nn.Sequential:
    convolution = nn.Conv2d(inputs, outputs, kernel, stride, padding=kernel // 2, groups=groups, bias=False)
    nn.init.kaiming_normal_(convolution.weight, mode="fan_out", nonlinearity="relu")
    return nn.Sequential(convolution, nn.BatchNorm2d(outputs))

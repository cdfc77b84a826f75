"""Bilinear CNN, and the same with multiscale attention and attention pooling. Shapes: VGG16 at 224 x 224.

    image           (N, 1, 224, 224)
    f               (N, 512, 14, 14)     the last feature map of stride 16: relu5_3 of VGG16
    bilinear        (N, 512, 512)        f times f transposed, averaged over the positions
    with attention  (N, 32, 512)         A times f transposed: the attention maps A take the place of one stream
    vector          (N, 262144)          signed square root, L2 norm, times 100; with attention (N, 16384)
    logits          (N, C)               linear

Source: Lin, RoyChowdhury and Maji 2015, "Bilinear CNN Models for Fine-Grained Visual Recognition": B-CNN [D, D], both
streams one VGG16 cut after relu5_3 (its symmetric, shared form). The factor 100 is MA-Net's, so that one learning rate
serves all models of Table 3; theirs fits the last layer first.

"BCNN (Attention)" is described by one sentence of the MAG-SD paper (section 4.4.1): multiscale attention and attention
pooling "were transported to BCNN". Attention pooling, Eq. (1), is a bilinear pooling of attention maps with features,
so we put it where BCNN pools; attention comes from the feature maps of strides 8 and 16 (relu4_3, relu5_3).
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from magsd_runtime.errors import UsageError

from .classifiers import output_without_attention
from .ma_net import (
    FEATURE_SCALE,
    MANetOutput,
    MultiscaleAttention,
    attention_pooling,
    create_backbone,
    float32_from_here,
    map_evidence,
)

REDUCTIONS = (4, 8, 16)


class BilinearCNN(nn.Module):
    """B-CNN [D, D] over timm's ``backbone``, cut after its features of stride 16."""

    def __init__(self, backbone: str = "vgg16", *, num_classes: int) -> None:
        super().__init__()
        if num_classes < 2:
            raise UsageError(f"num_classes is {num_classes}: expected at least 2")
        self.backbone_name = backbone
        self.backbone, (self.tap,), (channels,) = create_backbone(
            backbone, REDUCTIONS[-1:], channels_first=True, cut=True
        )
        self.classifier = nn.Linear(channels * channels, num_classes)

    def forward(self, image: Tensor) -> MANetOutput:
        """image (N, 1, S, S), z-scored, S a multiple of 32 -> ``output_without_attention``, h = w = S / 16."""
        features = self.backbone(image)[self.tap]
        with float32_from_here(image):
            features = features.float()  # (N, D, h, w)
            vector = bilinear_pooling(features).flatten(1)  # (N, D * D)
            return output_without_attention(self.classifier(vector), features, features.mean((2, 3)))


class AttentionBilinearCNN(nn.Module):
    """The bilinear CNN whose one stream is MA-Net's attention; each logit is the sum of its maps' evidence."""

    def __init__(
        self, backbone: str = "vgg16", *, num_classes: int, attention_scales: int = 2, num_attention_maps: int = 32
    ) -> None:
        super().__init__()
        if num_classes < 2:
            raise UsageError(f"num_classes is {num_classes}: expected at least 2")
        self.backbone_name = backbone
        self.backbone, self.taps, channels = create_backbone(
            backbone, REDUCTIONS[-attention_scales:], channels_first=True, cut=True
        )
        self.attention_generator = MultiscaleAttention(channels, REDUCTIONS[-attention_scales:], num_attention_maps)
        # no bias: evidence is to sum to the logits
        self.classifier = nn.Linear(num_attention_maps * channels[-1], num_classes, bias=False)

    def forward(self, image: Tensor) -> MANetOutput:
        """image (N, 1, S, S), z-scored, S a multiple of 32 -> :class:`MANetOutput`, h = w = S / 16."""
        outputs = self.backbone(image)
        with float32_from_here(image):
            features = [outputs[tap].float() for tap in self.taps]
            attention = self.attention_generator(features)  # (N, M, h, w)
            evidence = map_evidence(attention_pooling(features[-1], attention), self.classifier.weight)  # (N, C, M)
            return MANetOutput(evidence.sum(2), attention, evidence, features[-1].mean((2, 3)))


def bilinear_pooling(features: Tensor) -> Tensor:
    """Features (N, D, h, w) -> their outer product (N, D, D), averaged over the positions, of length 100.

    sign(x) * sqrt(abs(x) + 1e-12), then the L2 norm over all D * D values. The average in place of the paper's sum
    changes nothing but the place of rounding: the norm takes a factor out.
    """
    n, d, h, w = features.shape
    flat = features.reshape(n, d, h * w)
    product = (flat / (h * w)) @ flat.transpose(1, 2)  # (N, D, D)
    product = torch.sign(product) * torch.sqrt(product.abs() + 1e-12)
    squared_norm = (product * product).sum((1, 2), keepdim=True)
    return product * (FEATURE_SCALE * torch.rsqrt(squared_norm.clamp(min=1e-24)))

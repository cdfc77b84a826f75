"""MA-Net, the network of MAG-SD: paper, section 3.2. Shapes are those of ResNet50 at 224 x 224.

    image                  (N, 1, 224, 224)
    f1, f2, f3             (N, 512, 28, 28), (N, 1024, 14, 14), (N, 2048, 7, 7)     backbone
    attention A            (N, 32, 7, 7)           multiscale attention generator, section 3.2.2
    part feature matrix    (N, 32, 2048)           attention pooling, Eq. (1)
    feature vector         (N, 65536)              signed square root, L2 norm, times 100
    evidence               (N, C, 32)              each map's share of each logit
    logits                 (N, C)                  the sum of the evidence over the maps

What the paper leaves open follows the authors' released code: 1x1 convolutions without bias, batch
norm with eps 1e-3, average pooling to the last grid, the signed square root, the factor 100 and the
bias-free classifier. All after the backbone runs in float32, also under autocast: the L2 norm sums
65,536 terms, float16 ends at 65,504, and its epsilon would be 0.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor, nn
from torch.nn import functional

from magsd_runtime.errors import UsageError

REDUCTIONS = (8, 16, 32)  # strides of f1, f2, f3
FEATURE_SCALE = 100.0  # released code: without it, logits of a unit vector barely differ

Pooling = Literal["attention", "gap", "gmp"]


class MANetOutput(NamedTuple):
    """``logits`` (N, C); ``attention`` (N, M, h, w) >= 0; ``evidence`` (N, C, M); ``embedding`` (N, D).

    All float32. ``logits`` is ``evidence`` summed over the maps; ``embedding`` is the global average of f3.
    """

    logits: Tensor
    attention: Tensor
    evidence: Tensor
    embedding: Tensor


class MANet(nn.Module):
    """Multiscale attention network over any timm backbone with features at strides 8, 16 and 32.

    ``attention_scales``: how many of the last feature maps attention comes from: 1, 2 or 3 (Table 5).
    ``pooling``: ``attention`` is the paper's; ``gap`` and ``gmp`` (Table 6) pool f3 plainly. Attention is
    then no part of the classification: its parameters are frozen at their random start, and ``evidence``
    is logits / M for every map, which says nothing about the maps.

    The backbone starts with random weights; see :mod:`magsd.models.weights` for pretrained ones.

    Raises
    ------
    UsageError
        If timm does not know the backbone, it lacks one of the strides, or a number is out of range.
    """

    def __init__(
        self,
        backbone: str = "resnet50",
        *,
        num_classes: int,
        attention_scales: int = 2,
        num_attention_maps: int = 32,
        pooling: Pooling = "attention",
    ) -> None:
        super().__init__()
        if attention_scales not in (1, 2, 3):
            raise UsageError(f"attention_scales is {attention_scales}: expected 1, 2 or 3")
        if num_attention_maps < 1 or num_classes < 2:
            raise UsageError(
                f"num_attention_maps is {num_attention_maps} and num_classes {num_classes}: "
                "expected at least 1 and at least 2"
            )
        if pooling not in get_args(Pooling):
            raise UsageError(f"pooling is {pooling!r}: expected attention, gap or gmp")
        self.backbone_name = backbone
        self.pooling = pooling
        self.attention_scales = attention_scales
        self.num_attention_maps = num_attention_maps
        self.backbone, self.taps, channels = create_backbone(backbone)
        # transformers such as Swin give (N, h, w, D)
        self.features_nhwc = str(getattr(self.backbone, "output_fmt", "")).endswith("NHWC")
        self.feature_channels = channels[-1]  # D
        self.attention_generator = MultiscaleAttention(
            channels[-attention_scales:], REDUCTIONS[-attention_scales:], num_attention_maps
        )
        maps = num_attention_maps if pooling == "attention" else 1
        # uniform in +-1/sqrt(M * D): with vectors of length 100, logits start near +-0.25
        self.classifier = nn.Linear(maps * self.feature_channels, num_classes, bias=False)
        if pooling != "attention":
            self.attention_generator.requires_grad_(False)

    def forward(self, image: Tensor) -> MANetOutput:
        """image (N, 1, S, S), z-scored, S a multiple of 32 -> :class:`MANetOutput`, h = w = S / 32."""
        features = self.backbone(image)
        with float32_from_here(image):
            scales = [features[tap].float() for tap in self.taps]  # f1, f2, f3
            if self.features_nhwc:
                scales = [feature.permute(0, 3, 1, 2) for feature in scales]  # (N, h, w, D) -> (N, D, h, w)
            f3 = scales[-1]  # (N, D, h, w)
            attention = self.attention_generator(scales[-self.attention_scales :])  # (N, M, h, w)
            embedding = f3.mean((2, 3))  # (N, D)
            if self.pooling == "attention":
                evidence = map_evidence(attention_pooling(f3, attention), self.classifier.weight)  # (N, C, M)
                return MANetOutput(evidence.sum(2), attention, evidence, embedding)
            logits = self.classifier(embedding if self.pooling == "gap" else f3.amax((2, 3)))  # (N, C)
            # (N, C) -> (N, C, M): no map has a share of its own
            evidence = (logits / self.num_attention_maps)[:, :, None].expand(-1, -1, self.num_attention_maps)
            return MANetOutput(logits, attention, evidence, embedding)


class MultiscaleAttention(nn.Module):
    """Attention generator, section 3.2.2: a 1x1 convolution a scale, resized to the last grid and added."""

    def __init__(self, channels: tuple[int, ...], reductions: tuple[int, ...], num_attention_maps: int) -> None:
        super().__init__()
        self.ratios = tuple(reductions[-1] // reduction for reduction in reductions)
        self.branches = nn.ModuleList(_attention_branch(channel, num_attention_maps) for channel in channels)

    def forward(self, features: list[Tensor]) -> Tensor:
        """Feature maps, the last with the coarsest grid (N, D, h, w) -> attention (N, M, h, w), 0 or more."""
        maps = [
            _average_pool(branch(feature), ratio)  # (N, M, ratio * h, ratio * w) -> (N, M, h, w)
            for branch, feature, ratio in zip(self.branches, features, self.ratios)
        ]
        attention = maps[-1]
        for other in maps[:-1]:
            attention = attention + other
        return attention


def attention_pooling(features: Tensor, attention: Tensor) -> Tensor:
    """Features (N, D, h, w) and attention (N, M, h, w) -> normalized part features (N, M, D) of length 100.

    Eq. (1) and the global average of each part feature map as one contraction, then
    sign(x) * sqrt(abs(x) + 1e-12) and the L2 norm over all M * D values. Attention that is zero
    everywhere gives zeros, with a finite gradient.
    """
    n, d, h, w = features.shape
    m = attention.shape[1]
    # divided before the contraction: after it, float16 would already have overflowed
    scaled = (attention / (h * w)).reshape(n, m, h * w)
    parts = scaled @ features.reshape(n, d, h * w).transpose(1, 2)  # (N, M, hw) x (N, hw, D) -> (N, M, D)
    parts = torch.sign(parts) * torch.sqrt(parts.abs() + 1e-12)
    # x / max(norm, 1e-12), written so that neither value nor gradient divides by zero
    squared_norm = (parts * parts).sum((1, 2), keepdim=True)  # (N, 1, 1)
    return parts * (FEATURE_SCALE * torch.rsqrt(squared_norm.clamp(min=1e-24)))


def map_evidence(parts: Tensor, weight: Tensor) -> Tensor:
    """Part features (N, M, D) and classifier weight (C, M * D) -> evidence (N, C, M).

    The classifier has no bias and sees M blocks of D values, so a logit is exactly the sum of M terms.
    """
    m, d = parts.shape[1:]
    blocks = weight.reshape(-1, m, d)  # (C, M, D)
    # (M, N, D) x (M, D, C) -> (M, N, C) -> (N, C, M)
    return torch.bmm(parts.transpose(0, 1), blocks.permute(1, 2, 0)).permute(1, 2, 0)


def _attention_branch(channels: int, num_attention_maps: int) -> nn.Sequential:
    convolution = nn.Conv2d(channels, num_attention_maps, kernel_size=1, bias=False)
    nn.init.kaiming_normal_(convolution.weight, mode="fan_out", nonlinearity="relu")
    return nn.Sequential(convolution, nn.BatchNorm2d(num_attention_maps, eps=1e-3), nn.ReLU())


def _average_pool(attention: Tensor, ratio: int) -> Tensor:
    return functional.avg_pool2d(attention, ratio) if ratio > 1 else attention


def float32_from_here(image: Tensor) -> AbstractContextManager[object]:
    """No autocast from here on: the head's sums and its epsilon need float32."""
    # an exported graph carries no autocast region
    if torch.compiler.is_exporting():
        return nullcontext()
    return torch.autocast(image.device.type, enabled=False)


def create_backbone(
    name: str, reductions: tuple[int, ...] = REDUCTIONS, *, channels_first: bool = False, cut: bool = False
) -> tuple[nn.Module, tuple[int, ...], tuple[int, ...]]:
    """timm's network ``name`` for one-channel images, the positions among its outputs of the feature maps whose
    strides are ``reductions``, and their channels. Of several maps of one stride, the last: "layers before
    downsampling" (section 3.2.2). ``cut`` leaves out the layers after the last of them.

    Raises
    ------
    UsageError
        If timm does not know the network, it lacks one of the strides, or with ``channels_first`` if its feature
        maps are (N, h, w, D).
    """
    import timm

    if not timm.is_model(name):
        close = timm.list_models(f"*{name.strip()}*")[:3] or ["resnet50", "resnet18", "tf_efficientnet_lite0"]
        raise UsageError(f"--backbone {name!r} is not known to timm: try one of {', '.join(close)}")
    try:
        backbone = timm.create_model(name, pretrained=False, features_only=True, in_chans=1)
    except (RuntimeError, AttributeError, TypeError, ValueError, AssertionError) as error:
        reason = " ".join(str(error).split())
        raise UsageError(f"--backbone {name} gives no feature maps of one-channel images: {reason}") from error
    info = backbone.feature_info
    found: list[int] = list(info.reduction())  # pyright: ignore[reportCallIssue, reportAttributeAccessIssue]
    channels: list[int] = list(info.channels())  # pyright: ignore[reportCallIssue, reportAttributeAccessIssue]
    if missing := [reduction for reduction in reductions if reduction not in found]:
        *others, last = map(str, reductions)
        wanted = f"{', '.join(others)} and {last}" if others else last
        raise UsageError(
            f"--backbone {name} has features at strides {found}, not at {missing}: "
            f"choose a backbone with strides {wanted}, such as resnet50"
        )
    if channels_first and str(getattr(backbone, "output_fmt", "")).endswith("NHWC"):
        raise UsageError(f"--backbone {name} is no convolutional network: choose one such as resnet50")
    taps = tuple(len(found) - 1 - found[::-1].index(reduction) for reduction in reductions)
    if cut and taps[-1] + 1 < len(found):
        backbone = timm.create_model(name, pretrained=False, features_only=True, in_chans=1, out_indices=taps)
        _freeze_unused(backbone)  # not every network of timm leaves out what it does not need
        return backbone, tuple(range(len(taps))), tuple(channels[tap] for tap in taps)
    return backbone, taps, tuple(channels[tap] for tap in taps)


def _freeze_unused(backbone: nn.Module) -> None:
    """Freeze the parameters that no feature map depends on: several processes would wait for their gradients."""
    parameters = list(backbone.parameters())
    last = backbone.eval()(torch.zeros(1, 1, 64, 64))[-1]
    gradients = torch.autograd.grad(last.sum(), parameters, allow_unused=True)
    for parameter, gradient in zip(parameters, gradients):
        parameter.requires_grad_(gradient is not None)
    backbone.train()

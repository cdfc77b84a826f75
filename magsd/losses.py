"""Losses of MAG-SD: soft distance regularization (section 3.4, Algorithm 1), and what it is compared with.

All take logits of any float type and compute in float32, also under autocast.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, get_args

import torch
from torch import Tensor
from torch.nn import functional

from magsd_runtime.errors import UsageError

TargetRule = Literal["label-and-confidence", "confidence"]
Reduction = Literal["sum", "mean"]


def soft_distance_loss(
    primary_logits: Tensor,
    auxiliary_logits: Sequence[Tensor],
    labels: Tensor,
    *,
    threshold: float = 0.7,
    target_rule: TargetRule = "label-and-confidence",
    reduction: Reduction = "sum",
    smoothing: float = 0.01,
    class_weights: Tensor | None = None,
) -> Tensor:
    """Cross entropy of the primary image plus the soft distances of the auxiliary images, Eq. (7).

    ``primary_logits`` (N, C), ``auxiliary_logits`` any number of (N, C), ``labels`` int64 (N,),
    ``class_weights`` (C,) for the cross entropy -> a float32 scalar. The distance of one auxiliary image
    is the mean over images and classes of abs(P' - softmax(p)), Eq. (6), with P' of :func:`soft_target`.
    ``reduction``: ``sum`` of the distances as in the released code, or Eq. (7)'s ``mean``. Without
    auxiliary images this is the cross entropy.

    Raises
    ------
    UsageError
        For an unknown rule or reduction, or a smoothing that leaves the label no majority.
    """
    if reduction not in get_args(Reduction):
        raise UsageError(f"soft distance reduction is {reduction!r}: expected sum or mean")
    loss = cross_entropy_loss(primary_logits, labels, class_weights=class_weights)
    if not auxiliary_logits:
        return loss
    target = soft_target(primary_logits, labels, threshold=threshold, target_rule=target_rule, smoothing=smoothing)
    distances = torch.stack([soft_distance(target, logits) for logits in auxiliary_logits])  # (K,)
    return loss + (distances.sum() if reduction == "sum" else distances.mean())


def soft_target(
    primary_logits: Tensor,
    labels: Tensor,
    *,
    threshold: float = 0.7,
    target_rule: TargetRule = "label-and-confidence",
    smoothing: float = 0.01,
) -> Tensor:
    """P' of Algorithm 1, lines 3-7: probabilities, float32 (N, C), detached from the primary image.

    Where the prediction is trusted, its softmax; elsewhere the label with ``smoothing`` for every other
    class. ``label-and-confidence`` (released code) trusts a prediction of at least ``threshold`` whose
    class is the label, so that a confidently wrong one is never a target; ``confidence`` (the paper)
    trusts any prediction above ``threshold``.

    Raises
    ------
    UsageError
        As :func:`soft_distance_loss`.
    """
    if target_rule not in get_args(TargetRule):
        raise UsageError(f"soft distance rule is {target_rule!r}: expected label-and-confidence or confidence")
    num_classes = primary_logits.shape[1]
    if not 0 <= smoothing * num_classes < 1:
        raise UsageError(
            f"label smoothing is {smoothing} a class: expected 0 to below {1 / num_classes:.3g} "
            f"for {num_classes} classes, so that the label stays the largest"
        )
    probabilities = torch.softmax(primary_logits.detach().float(), dim=1)  # (N, C)
    confidence, predicted = probabilities.max(dim=1)  # (N,)
    if target_rule == "confidence":
        trusted = confidence > threshold
    else:
        trusted = (predicted == labels) & (confidence >= threshold)
    one_hot = functional.one_hot(labels, num_classes).float()  # (N, C)
    smoothed = one_hot * (1 - num_classes * smoothing) + smoothing
    return torch.where(trusted[:, None], probabilities, smoothed)


def l2_loss(
    primary_logits: Tensor,
    auxiliary_logits: Sequence[Tensor],
    labels: Tensor,
    *,
    class_weights: Tensor | None = None,
) -> Tensor:
    """The alternative "L2" of Table 8: every image is compared with the ground truth.

    As in the released code, the mean of the cross entropies of the primary and the auxiliary images.
    Shapes as in :func:`soft_distance_loss`.
    """
    losses = [
        cross_entropy_loss(logits, labels, class_weights=class_weights)
        for logits in (primary_logits, *auxiliary_logits)
    ]
    return torch.stack(losses).mean()


def cross_entropy_loss(logits: Tensor, labels: Tensor, *, class_weights: Tensor | None = None) -> Tensor:
    """Cross entropy of logits (N, C) and labels int64 (N,), weighted mean over the images, float32."""
    weights = None if class_weights is None else class_weights.float()
    return functional.cross_entropy(logits.float(), labels, weight=weights)


def soft_distance(target: Tensor, logits: Tensor) -> Tensor:
    """Mean over images and classes of abs(target - softmax(logits)), Eq. (6): both (N, C) -> ()."""
    return (target - torch.softmax(logits.float(), dim=1)).abs().mean()


def outside_share(attention: Tensor, inside: Tensor) -> Tensor:
    """Mean over the images of the share of the mean attention map that lies outside: (), 0 to 1.

    ``attention`` (N, M, h, w), at least 0; ``inside`` (N, 1, h, w), 0 to 1, how much of each cell is inside.
    An image with nothing inside adds 0. Not in the paper: it keeps the attention in the lung fields.
    """
    mean = attention.mean(1)  # (N, h, w)
    outside = (mean * (1 - inside[:, 0])).sum((1, 2)) / (mean.sum((1, 2)) + 1e-6)
    return (outside * (inside.sum((1, 2, 3)) > 0)).mean()


def lung_opacity(images: Tensor, lungs: Tensor) -> Tensor:
    """How far each pixel of the lung fields is brighter than their own mean: (N, 1, S, S), at least 0.

    ``images`` (N, 1, S, S), any scale; ``lungs`` (N, 1, S, S), 0 to 1, how much of a pixel is lung. An opacity is
    what the word says, less black than aerated lung; the mean of the same film's lungs is the least that can be
    assumed about what is normal. A rim of S / 32 pixels is left out: there the ribs and the chest wall are bright.
    """
    rim = images.shape[-1] // 32
    inner = -functional.max_pool2d(-lungs, 2 * rim + 1, stride=1, padding=rim)  # an erosion
    area = inner.sum((2, 3), keepdim=True)
    mean = (images * inner).sum((2, 3), keepdim=True) / (area + 1e-6)
    return (images - mean).clamp(min=0) * inner


def attention_divergence(attention: Tensor, target: Tensor) -> Tensor:
    """Kullback-Leibler divergence of the mean attention map from a target, mean over the images: (), nats, 0 or more.

    ``attention`` (N, M, h, w) and ``target`` (N, 1, h, w), at least 0; both are made to sum to 1 over the cells.
    An image whose target is 0 everywhere adds 0. Not in the paper: it teaches the attention where to look.
    """
    wanted = target.flatten(1)  # (N, h * w)
    mass = wanted.sum(1, keepdim=True)
    wanted = wanted / (mass + 1e-6)
    mean = attention.mean(1).flatten(1)
    given = mean / (mean.sum(1, keepdim=True) + 1e-6)
    divergence = (wanted * ((wanted + 1e-6).log() - (given + 1e-6).log())).sum(1)
    return (divergence * (mass[:, 0] > 0)).mean()

"""A step's gradients, taken pass by pass, are those of the whole loss as the paper writes it."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from magsd import attention_augmentation as attention_guided
from magsd.augmentation import augment, draw_augmentation, normalize_batch
from magsd.config import TrainingConfig, resolve
from magsd.losses import l2_loss, soft_distance_loss
from magsd.models import build_model
from magsd.step import augmentation_ranges, draw_generator, training_step
from tiny_run import TINY

CPU = torch.device("cpu")


def batch() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(5)
    images = torch.randint(0, 256, (6, 1, 64, 64), dtype=torch.uint8, generator=generator)
    return images, torch.arange(6) % 3


def whole_loss(model: nn.Module, config: TrainingConfig, weights: torch.Tensor | None) -> torch.Tensor:
    """All passes in one graph, then one loss: Algorithm 1 read from top to bottom."""
    images, labels = batch()
    generator = draw_generator(CPU, 0, 0, 0, 0, 0)
    image = normalize_batch(augment(images, draw_augmentation(augmentation_ranges(config), 6, generator)))
    output = model(image)
    auxiliary = []
    if config.attention_augmentation:
        kinds = attention_guided.augment(
            image, output.attention.detach(), config.attention_augmentation, generator,
            gamma=config.mixup_gamma, dimming_factor=config.dimming_factor,
        )  # fmt: skip
        if config.auxiliary_passes == "one-batch":
            auxiliary = list(model(torch.cat(kinds)).logits.chunk(len(kinds)))
        else:
            auxiliary = [model(kind).logits for kind in kinds]
    if config.loss == "l2":
        return l2_loss(output.logits, auxiliary, labels, class_weights=weights)
    return soft_distance_loss(
        output.logits, auxiliary, labels, threshold=config.soft_distance_threshold,
        target_rule=config.soft_distance_rule, reduction=config.soft_distance_reduction,
        smoothing=config.label_smoothing, class_weights=weights,
    )  # fmt: skip


@pytest.mark.parametrize("weights", [None, torch.tensor([0.5, 1.0, 2.0])])
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"auxiliary_passes": "one-batch"},
        {"soft_distance_reduction": "mean", "soft_distance_rule": "confidence", "soft_distance_threshold": 0.4},
        {"loss": "l2"},
        {"loss": "l2", "auxiliary_passes": "one-batch", "attention_augmentation": ("patching", "mixup")},
        {"attention_augmentation": ("dimming",)},
        {"model": "magsd-oaug"},
        {"model": "plain"},
    ],
)
def test_gradients_pass_by_pass_are_those_of_the_whole_loss(changes: dict, weights: torch.Tensor | None) -> None:
    config = resolve({**TINY, "channels_last": False, **changes})
    torch.manual_seed(0)
    by_pass = build_model(config, num_classes=3)
    whole = copy.deepcopy(by_pass)
    images, labels = batch()
    loss, correct = training_step(
        by_pass, images, labels, draw_generator(CPU, 0, 0, 0, 0, 0), config, class_weights=weights
    )
    expected = whole_loss(whole, config, weights)
    expected.backward()
    torch.testing.assert_close(loss, expected.detach())
    assert 0 <= int(correct) <= 6
    for (name, one), two in zip(by_pass.named_parameters(), whole.parameters(), strict=True):
        if two.grad is None:
            assert one.grad is None, name
            continue
        scale = float(two.grad.abs().max()) + 1e-6
        torch.testing.assert_close(one.grad, two.grad, rtol=1e-3, atol=1e-4 * scale, msg=name)
    for (name, one), two in zip(by_pass.named_buffers(), whole.buffers(), strict=True):
        torch.testing.assert_close(one, two, msg=name)


def test_the_draws_depend_on_every_number_and_on_nothing_else() -> None:
    states = set()
    for numbers in [
        (0, 0, 0, 0, 0),
        (1, 0, 0, 0, 0),
        (0, 1, 0, 0, 0),
        (0, 0, 1, 0, 0),
        (0, 0, 0, 1, 0),
        (0, 0, 0, 0, 1),
    ]:
        first, again = (torch.rand(4, generator=draw_generator(CPU, *numbers)) for _ in range(2))
        assert torch.equal(first, again)
        states.add(tuple(first.tolist()))
    assert len(states) == 6

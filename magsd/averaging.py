"""The average of the weights over the last part of a training: one model, flatter and less tied to its last batches.

Source: Polyak and Juditsky 1992; Cha et al. 2021 (SWAD) for what it does on data of another origin.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import nn

BEGINS = 0.5
"""Share of the training after which the averaging begins."""


class WeightAverage:
    """``model`` is the average so far: every step counts equally until ``decay`` forgets the oldest.

    Integer buffers, such as batch norm's counter, are those of the last step.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.model = copy.deepcopy(model).requires_grad_(False)
        self.decay = decay
        self.steps = 0

    @torch.no_grad()
    def update(self, model: nn.Module) -> None:
        self.steps += 1
        weight = max(1 - self.decay, 1 / self.steps)
        for mean, value in zip(_tensors(self.model), _tensors(model), strict=True):
            if mean.is_floating_point():
                mean.lerp_(value, weight)
            else:
                mean.copy_(value)

    def state_dict(self) -> dict[str, Any]:
        return {"model": self.model.state_dict(), "steps": self.steps}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.model.load_state_dict(state["model"])
        self.steps = int(state["steps"])


def _tensors(model: nn.Module) -> list[torch.Tensor]:
    return [*model.parameters(), *model.buffers()]

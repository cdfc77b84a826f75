"""The average of the weights, against a plain mean and the recursion of its description."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from magsd.averaging import WeightAverage


def network(value: float) -> nn.Module:
    model = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))
    for tensor in [*model.parameters(), *model.buffers()]:
        with torch.no_grad():
            tensor.fill_(value)
    return model


def value_of(average: WeightAverage) -> float:
    return float(next(average.model.parameters()).flatten()[0])


def test_it_is_the_plain_mean_until_the_decay_forgets() -> None:
    average = WeightAverage(network(100.0), decay=0.9)
    for step in range(1, 11):
        average.update(network(float(step)))
        assert value_of(average) == pytest.approx(sum(range(1, step + 1)) / step, rel=1e-5)
    before = value_of(average)
    average.update(network(50.0))
    assert value_of(average) == pytest.approx(0.9 * before + 0.1 * 50, rel=1e-5)


def test_counters_are_the_last_ones_and_statistics_are_averaged() -> None:
    average = WeightAverage(network(0.0), decay=0.99)
    for value in (2.0, 4.0):
        average.update(network(value))
    norm = average.model[1]  # pyright: ignore[reportIndexIssue]
    assert int(norm.num_batches_tracked) == 4
    assert float(norm.running_mean[0]) == pytest.approx(3.0)


def test_it_goes_on_where_it_was_saved() -> None:
    one = WeightAverage(network(0.0), decay=0.5)
    for value in (1.0, 5.0, 2.0):
        one.update(network(value))
    two = WeightAverage(network(7.0), decay=0.5)
    two.load_state_dict(one.state_dict())
    for average in (one, two):
        average.update(network(9.0))
    assert value_of(one) == value_of(two)
    assert not next(two.model.parameters()).requires_grad

"""Losses against Algorithm 1 written with plain Python loops."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from magsd.losses import cross_entropy_loss, l2_loss, soft_distance_loss, soft_target
from magsd_runtime.errors import UsageError


def softmax(row):
    largest = max(row)
    powers = [math.exp(x - largest) for x in row]
    return [p / sum(powers) for p in powers]


def algorithm_1(primary, auxiliaries, labels, *, threshold, rule, reduction, smoothing, weights):
    """The paper's Algorithm 1 image by image; ``rule`` and ``reduction`` as the released code differs."""
    n, c = len(primary), len(primary[0])
    weighted = sum(-weights[y] * math.log(softmax(row)[y]) for row, y in zip(primary, labels))
    cross_entropy = weighted / sum(weights[y] for y in labels)
    distances = []
    for auxiliary in auxiliaries:
        total = 0.0
        for row, other, y in zip(primary, auxiliary, labels):
            p = softmax(row)
            best = max(range(c), key=lambda k: p[k])
            if rule == "confidence":
                trusted = p[best] > threshold
            else:
                trusted = best == y and p[best] >= threshold
            target = p if trusted else [1 - smoothing * (c - 1) if k == y else smoothing for k in range(c)]
            q = softmax(other)
            total += sum(abs(a - b) for a, b in zip(target, q))
        distances.append(total / (n * c))
    if not distances:
        return cross_entropy
    return cross_entropy + (sum(distances) if reduction == "sum" else sum(distances) / len(distances))


@st.composite
def cases(draw):
    n, c, k = draw(st.integers(1, 5)), draw(st.integers(2, 5)), draw(st.integers(0, 3))
    logits = draw(hnp.arrays(np.float64, (k + 1, n, c), elements=st.floats(-6, 6)))
    labels = draw(hnp.arrays(np.int64, n, elements=st.integers(0, c - 1)))
    weights = draw(hnp.arrays(np.float64, c, elements=st.floats(0.1, 3)))
    return logits, labels, weights


@given(
    cases(),
    st.sampled_from(["label-and-confidence", "confidence"]),
    st.sampled_from(["sum", "mean"]),
    st.floats(0, 1),
    st.floats(0, 0.15),
)
@settings(max_examples=150, deadline=None)
def test_soft_distance_is_algorithm_1(case, rule, reduction, threshold, smoothing):
    logits, labels, weights = case
    # a confidence that equals the threshold but for rounding may fall either way
    confidences = [max(softmax(row)) for row in logits[0]]
    if any(abs(x - threshold) < 1e-5 for x in confidences):
        return
    top = np.sort(logits[0], axis=1)
    if np.any(top[:, -1] - top[:, -2] < 1e-5):  # nor may ties of the largest logit
        return
    tensors = [torch.from_numpy(x).float() for x in logits]
    loss = soft_distance_loss(
        tensors[0], tensors[1:], torch.from_numpy(labels), threshold=threshold, target_rule=rule,
        reduction=reduction, smoothing=smoothing, class_weights=torch.from_numpy(weights),
    )  # fmt: skip
    expected = algorithm_1(
        logits[0].tolist(), logits[1:].tolist(), labels.tolist(), threshold=threshold, rule=rule,
        reduction=reduction, smoothing=smoothing, weights=weights.tolist(),
    )  # fmt: skip
    assert loss.dtype == torch.float32
    assert float(loss) == pytest.approx(expected, rel=2e-5, abs=2e-5)


def test_default_is_the_released_codes_rule_and_sum():
    # probabilities 0.9 / 0.1, and twice the label is not the prediction
    primary = torch.tensor([[math.log(9.0), 0.0], [math.log(9.0), 0.0]])
    auxiliary = [torch.zeros(2, 2), torch.zeros(2, 2), torch.zeros(2, 2)]
    labels = torch.tensor([0, 1])
    distance = (abs(0.9 - 0.5) + abs(0.01 - 0.5)) / 2  # image 0 trusted; image 1: the smoothed label
    expected = -(math.log(0.9) + math.log(0.1)) / 2 + 3 * distance
    assert float(soft_distance_loss(primary, auxiliary, labels)) == pytest.approx(expected, rel=1e-6)


def test_a_confidently_wrong_prediction_is_a_target_only_under_the_papers_rule():
    primary, labels = torch.tensor([[5.0, 0.0]]), torch.tensor([1])
    torch.testing.assert_close(soft_target(primary, labels), torch.tensor([[0.01, 0.99]]))
    paper = soft_target(primary, labels, target_rule="confidence")
    torch.testing.assert_close(paper, torch.softmax(primary, 1))


def test_the_threshold_itself_is_trusted_by_the_released_code_only():
    primary, labels = torch.zeros(1, 2), torch.tensor([0])  # confidence exactly one half
    torch.testing.assert_close(soft_target(primary, labels, threshold=0.5), torch.full((1, 2), 0.5))
    paper = soft_target(primary, labels, threshold=0.5, target_rule="confidence")
    torch.testing.assert_close(paper, torch.tensor([[0.99, 0.01]]))


def test_the_target_carries_no_gradient():
    primary = torch.tensor([[3.0, 0.0], [0.2, 0.0]], requires_grad=True)
    auxiliary = torch.tensor([[0.5, 0.1], [-0.5, 0.3]], requires_grad=True)
    labels = torch.tensor([0, 1])
    soft_distance_loss(primary, [auxiliary], labels).backward()
    gradient = primary.grad
    assert auxiliary.grad is not None
    assert auxiliary.grad.abs().min() > 0
    primary.grad = None
    cross_entropy_loss(primary, labels).backward()
    torch.testing.assert_close(gradient, primary.grad)


def test_without_auxiliary_images_it_is_the_cross_entropy():
    logits, labels = torch.randn(4, 3), torch.tensor([0, 2, 1, 1])
    weights = torch.tensor([1.0, 2.0, 0.5])
    expected = torch.nn.functional.cross_entropy(logits, labels, weight=weights)
    assert soft_distance_loss(logits, [], labels, class_weights=weights) == expected
    assert l2_loss(logits, [], labels, class_weights=weights) == expected


@given(cases())
@settings(max_examples=40, deadline=None)
def test_l2_is_the_mean_of_the_cross_entropies(case):
    logits, labels, weights = case
    tensors = [torch.from_numpy(x).float() for x in logits]
    loss = l2_loss(tensors[0], tensors[1:], torch.from_numpy(labels), class_weights=torch.from_numpy(weights))
    entropies = [
        sum(-weights[y] * math.log(softmax(row)[y]) for row, y in zip(block.tolist(), labels))
        / sum(weights[y] for y in labels)
        for block in logits
    ]
    assert float(loss) == pytest.approx(sum(entropies) / len(entropies), rel=2e-5, abs=2e-5)


def test_float16_logits_give_a_float32_loss():
    logits, labels = torch.tensor([[30.0, -30.0]]), torch.tensor([1])
    loss = soft_distance_loss(logits.half(), [logits.half()], labels)
    assert loss.dtype == torch.float32
    assert float(loss) == pytest.approx(60 + 0.99, rel=1e-5)
    with torch.autocast("cpu", torch.bfloat16):
        assert soft_distance_loss(logits, [logits], labels) == loss


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"target_rule": "paper"}, "label-and-confidence or confidence"),
        ({"reduction": "max"}, "expected sum or mean"),
        ({"smoothing": 0.5}, "below 0.5 for 2 classes"),
        ({"smoothing": -0.1}, "expected 0"),
    ],
)
def test_wrong_options_are_refused(options, message):
    with pytest.raises(UsageError, match=message):
        soft_distance_loss(torch.zeros(1, 2), [torch.zeros(1, 2)], torch.tensor([0]), **options)

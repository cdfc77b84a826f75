"""Metrics against loops written from equations (8) to (11), and the bootstrap against explicit resampling."""

from __future__ import annotations

import inspect
import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from magsd import metrics
from magsd.metrics import (
    SCORES,
    bootstrap_intervals,
    class_scores,
    classification_scores,
    confusion_matrix,
    fold_summary,
    patient_weights,
    roc_auc,
    roc_auc_macro,
    roc_curves,
)


@st.composite
def predictions(draw: st.DrawFn) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Labels (N,), predicted (N,), probabilities (N, C) with ties; some classes may be absent."""
    classes = draw(st.integers(2, 4))
    count = draw(st.integers(1, 30))
    labels = np.array(draw(st.lists(st.integers(0, classes - 1), min_size=count, max_size=count)), np.int64)
    cells = st.lists(st.integers(0, 4), min_size=classes, max_size=classes).filter(any)
    raw = np.array(draw(st.lists(cells, min_size=count, max_size=count)), np.float64)
    probabilities = raw / raw.sum(axis=1, keepdims=True)
    return labels, probabilities.argmax(axis=1), probabilities


def counts(labels: np.ndarray, predicted: np.ndarray, k: int) -> tuple[int, int, int, int]:
    tp = tn = fp = fn = 0
    for label, guess in zip(labels, predicted):
        if label == k and guess == k:
            tp += 1
        elif label == k:
            fn += 1
        elif guess == k:
            fp += 1
        else:
            tn += 1
    return tp, tn, fp, fn


def slow_auc(positive: np.ndarray, scores: np.ndarray) -> float | None:
    """The share of pairs (one positive, one negative) in the right order; ties count one half."""
    pairs = [(p, n) for p in scores[positive] for n in scores[~positive]]
    return sum((p > n) + 0.5 * (p == n) for p, n in pairs) / len(pairs) if pairs else None


def slow_class(labels: np.ndarray, predicted: np.ndarray, probabilities: np.ndarray, k: int) -> dict:
    tp, tn, fp, fn = counts(labels, predicted, k)
    has_images = tp + fn > 0
    return {
        "images": tp + fn,
        "accuracy": (tp + tn) / (tp + tn + fp + fn),  # (8)
        "sensitivity": tp / (tp + fn) if has_images else None,  # (9)
        "specificity": tn / (tn + fp) if tn + fp else None,  # (10)
        "f1": 2 * tp / (2 * tp + fp + fn) if has_images else None,  # (11)
        "auc": slow_auc(labels == k, probabilities[:, k]),
    }


@settings(max_examples=60, deadline=None)
@given(predictions())
def test_scores_of_a_class_are_equations_8_to_11(data: tuple[np.ndarray, np.ndarray, np.ndarray]) -> None:
    labels, predicted, probabilities = data
    rows = class_scores(labels=labels, predicted=predicted, probabilities=probabilities)
    for k, row in enumerate(rows):
        expected = slow_class(labels, predicted, probabilities, k)
        assert row.keys() == expected.keys()
        for name, value in expected.items():
            assert (row[name] is None) == (value is None), name
            assert value is None or row[name] == pytest.approx(value, abs=1e-12), name


@settings(max_examples=60, deadline=None)
@given(predictions())
def test_macro_scores_are_means_over_the_classes_that_have_images(data: tuple) -> None:
    labels, predicted, probabilities = data
    scores = classification_scores(labels=labels, predicted=predicted, probabilities=probabilities)
    rows = [slow_class(labels, predicted, probabilities, k) for k in set(labels.tolist())]
    assert scores["accuracy"] == pytest.approx(np.mean(labels == predicted))
    for name in SCORES[1:]:
        values = [row[name] for row in rows]
        expected = None if None in values else sum(values) / len(values)
        assert (scores[name] is None) == (expected is None), name
        assert expected is None or scores[name] == pytest.approx(expected, abs=1e-12), name
    assert scores["auc"] == roc_auc_macro(labels=labels, probabilities=probabilities)


@settings(max_examples=60, deadline=None)
@given(predictions())
def test_rows_of_the_confusion_matrix_are_true_classes(data: tuple) -> None:
    labels, predicted, probabilities = data
    classes = probabilities.shape[1]
    expected = np.zeros((classes, classes), np.int64)
    for label, guess in zip(labels, predicted):
        expected[label, guess] += 1
    found = confusion_matrix(labels=labels, predicted=predicted, num_classes=classes)
    np.testing.assert_array_equal(found, expected)


def test_one_class_only_has_no_specificity_and_no_auc() -> None:
    probabilities = np.array([[0.9, 0.1], [0.2, 0.8]])
    scores = classification_scores(
        labels=np.zeros(2, np.int64), predicted=np.array([0, 1]), probabilities=probabilities
    )
    assert scores == {
        "accuracy": 0.5,
        "sensitivity": 0.5,
        "specificity": None,
        "f1": pytest.approx(2 / 3),
        "auc": None,
    }


def test_no_images_and_scores_that_are_not_numbers_have_no_value() -> None:
    empty = classification_scores(
        labels=np.zeros(0, np.int64), predicted=np.zeros(0, np.int64), probabilities=np.zeros((0, 2))
    )
    assert empty == dict.fromkeys(SCORES)
    assert roc_auc(positive=np.array([True, False]), scores=np.array([np.nan, 0.5])) is None


def test_labels_and_predictions_cannot_change_places() -> None:
    for name, function in inspect.getmembers(metrics, inspect.isfunction):
        if function.__module__ == metrics.__name__ and "labels" in (p := inspect.signature(function).parameters):
            assert all(value.kind is value.KEYWORD_ONLY for value in p.values()), name


@settings(max_examples=60, deadline=None)
@given(predictions())
def test_roc_curves_enclose_their_areas_and_the_macro_curve_the_mean_area(data: tuple) -> None:
    labels, _, probabilities = data
    names = [f"class {k}" for k in range(probabilities.shape[1])]
    curves = roc_curves(labels=labels, probabilities=probabilities, classes=names)
    for curve in curves:
        assert (np.diff(curve.false_positive_rate) >= 0).all()
        assert (np.diff(curve.true_positive_rate) >= -1e-12).all()
        assert curve.false_positive_rate[0] == 0
        assert curve.true_positive_rate[-1] == pytest.approx(1)
        x, y = curve.false_positive_rate, curve.true_positive_rate
        area = float((np.diff(x) * (y[1:] + y[:-1]) / 2).sum())
        assert area == pytest.approx(curve.auc, abs=1e-9)
    if curves:
        assert curves[-1].name == "macro mean"
        assert curves[-1].auc == pytest.approx(roc_auc_macro(labels=labels, probabilities=probabilities))


@settings(max_examples=40, deadline=None)
@given(predictions(), st.integers(0, 2**32 - 1))
def test_bootstrap_equals_resampling_patients_one_by_one(data: tuple, seed: int) -> None:
    labels, predicted, probabilities = data
    rng = np.random.default_rng(seed)
    patients = np.array([f"p{n}" for n in rng.integers(0, max(2, len(labels) // 2), len(labels))])
    folds = rng.integers(0, 2, len(labels))
    found = bootstrap_intervals(
        labels=labels, predicted=predicted, probabilities=probabilities,
        patients=patients.tolist(), folds=folds, resamples=20, seed=seed,
    )  # fmt: skip
    names = sorted(set(patients.tolist()))
    if len(names) < 2:
        assert found == dict.fromkeys(SCORES)
        return
    values: dict[str, list[float]] = {name: [] for name in SCORES}
    for weights in np.concatenate(list(patient_weights(len(names), len(labels), resamples=20, seed=seed))):
        assert weights.sum() == len(names)
        drawn = [
            row for name, times in zip(names, weights) for row in np.flatnonzero(patients == name).repeat(int(times))
        ]
        of_folds: dict[str, list[float]] = {name: [] for name in SCORES}
        for fold in (0, 1):
            rows = np.array([row for row in drawn if folds[row] == fold], np.int64)
            if not len(rows):
                continue
            of_folds["accuracy"].append(float(np.mean(labels[rows] == predicted[rows])))
            scores = [
                slow_class(labels[rows], predicted[rows], probabilities[rows], k)
                for k in set(labels[folds == fold].tolist())
            ]
            for name in SCORES[1:]:
                if all(score[name] is not None for score in scores):
                    of_folds[name].append(sum(score[name] for score in scores) / len(scores))
        for name in SCORES:
            if of_folds[name]:
                values[name].append(float(np.mean(of_folds[name])))
    for name in SCORES:
        expected = np.percentile(values[name], [2.5, 97.5]) if values[name] else None
        assert (found[name] is None) == (expected is None), name
        if expected is not None:
            assert found[name] == pytest.approx(expected, abs=1e-9), name


def test_bootstrap_of_1500_images_takes_seconds_and_repeats_with_its_seed() -> None:
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 3, 1500)
    probabilities = rng.dirichlet(np.ones(3), 1500)
    arguments = {
        "labels": labels,
        "predicted": probabilities.argmax(axis=1),
        "probabilities": probabilities,
        "patients": [f"p{n}" for n in rng.integers(0, 900, 1500)],
        "folds": rng.integers(0, 5, 1500),
    }
    started = time.perf_counter()
    first = bootstrap_intervals(**arguments, resamples=1000, seed=3)
    assert time.perf_counter() - started < 10
    assert first == bootstrap_intervals(**arguments, resamples=1000, seed=3)
    assert first != bootstrap_intervals(**arguments, resamples=1000, seed=4)
    low, high = first["auc"] or [0, 0]
    assert 0.45 < low < 0.5 < high < 0.55


def test_images_of_one_patient_widen_the_interval() -> None:
    """Twenty copies of each of 30 patients' images know no more than the 30."""
    rng = np.random.default_rng(1)
    labels = rng.integers(0, 2, 30)
    positive = np.clip(0.5 + 0.2 * (labels - 0.5) + rng.normal(0, 0.2, 30), 0.01, 0.99)
    probabilities = np.stack([1 - positive, positive], axis=1)
    single = bootstrap_intervals(
        labels=labels, predicted=probabilities.argmax(axis=1), probabilities=probabilities,
        patients=[str(n) for n in range(30)], folds=np.zeros(30, np.int64), resamples=500, seed=0,
    )  # fmt: skip
    copied = probabilities.repeat(20, axis=0)
    many = bootstrap_intervals(
        labels=labels.repeat(20), predicted=copied.argmax(axis=1), probabilities=copied,
        patients=[str(n) for n in np.arange(30).repeat(20)], folds=np.zeros(600, np.int64),
        resamples=500, seed=0,
    )  # fmt: skip
    assert many == {name: pytest.approx(interval) for name, interval in single.items()}


def test_fold_summary_is_mean_and_sample_deviation() -> None:
    assert fold_summary([0.5, None, 0.7]) == {"value": pytest.approx(0.6), "std": pytest.approx(0.02**0.5)}
    assert fold_summary([0.5]) == {"value": 0.5, "std": None}
    assert fold_summary([None]) == {"value": None, "std": None}

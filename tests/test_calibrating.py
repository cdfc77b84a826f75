"""A calibration as a whole: when there are too few cases, what it holds, what its record refuses, what it decides."""

from __future__ import annotations

import contextlib
import copy
import hashlib
import json
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from magsd_runtime.calibrating import Cases, calibrate, check_wanted, patients_needed
from magsd_runtime.calibration import (
    fit_temperature,
    negative_log_likelihood,
    operating_points,
    probabilities,
    reliability,
)
from magsd_runtime.calibration_record import Calibration
from magsd_runtime.calibration_text import CARD_HEADING, format_calibration, with_section
from magsd_runtime.errors import ArtefactError, CalibrationError, UsageError

CLASSES = ("covid", "normal", "other")
MODEL = "a" * 64


def some_cases(per_class: tuple[int, ...] = (40, 50, 45), *, images: int = 1, seed: int = 0) -> Cases:
    """``per_class`` patients of each class with ``images`` images each; logits twice too large."""
    rng = np.random.default_rng(seed)
    labels = np.repeat(np.arange(len(per_class)), per_class).repeat(images)
    logits = rng.normal(0, 1, (len(labels), len(per_class)))
    logits[np.arange(len(labels)), labels] += 1
    patients = [f"p{number}" for number in range(sum(per_class)) for _ in range(images)]
    return Cases(CLASSES[: len(per_class)], 2 * logits, labels, tuple(patients), "d" * 64)


def fitted(cases: Cases, **keywords: Any) -> tuple[Calibration, list[str]]:
    return calibrate(cases, model_sha256=MODEL, source="a test", **keywords)


def test_everything_is_what_the_parts_give() -> None:
    cases = some_cases(images=2)
    found, notes = fitted(cases, positive="normal", sensitivities=(0.8, 0.95), start=1.7)
    fit = fit_temperature(cases.logits, cases.labels)
    assert (found.temperature, found.fitted, found.model_sha256, found.source) == (
        fit.temperature,
        True,
        MODEL,
        "a test",
    )
    assert notes == []
    assert found.before is not None
    assert found.after is not None
    for scores, temperature in ((found.before, 1.7), (found.after, fit.temperature)):
        values = probabilities(cases.logits, temperature)
        assert scores.temperature == temperature
        assert scores.nll == pytest.approx(negative_log_likelihood(cases.logits, cases.labels, temperature))
        assert scores.ece == reliability(labels=cases.labels, probabilities=values)["ece"]
    calibrated = probabilities(cases.logits, fit.temperature)[:, 1]
    assert found.operating_points == operating_points(
        positive=cases.labels == 1, probability=calibrated, patients=cases.patients, sensitivities=(0.8, 0.95)
    )
    assert (found.positive_class, found.default) == ("normal", "sensitivity_80")
    assert found.data == cases.facts()
    assert found.data is not None
    assert (found.data.images, found.data.patients) == (270, 135)
    assert found.data.images_per_class == {"covid": 80, "normal": 100, "other": 90}
    assert found.data.patients_per_class == {"covid": 40, "normal": 50, "other": 45}


def test_cross_validation_leaves_out_whole_patients() -> None:
    cases = some_cases(images=3)
    found, _ = fitted(cases)
    expected = np.zeros(cases.logits.shape)
    for fold in range(5):
        inside = []
        for patient in cases.patients:
            digest = hashlib.sha256(b"calibration fold\0" + patient.encode()).digest()
            inside.append(int.from_bytes(digest[:8], "big") % 5 == fold)
        out = np.array(inside)
        temperature = fit_temperature(cases.logits[~out], cases.labels[~out]).temperature
        expected[out] = probabilities(cases.logits[out], temperature)
    assert found.ece_cross_validated == reliability(labels=cases.labels, probabilities=expected)["ece"]
    assert found.after is not None
    assert found.ece_cross_validated != found.after.ece


@pytest.mark.parametrize(
    ("per_class", "message"),
    [
        ((19, 40, 40), "20 patients of every class of the model are needed, and covid has 19$"),
        ((40, 3, 12), "normal has 3, other has 12$"),
        ((40, 0, 40), "normal has none$"),
    ],
)
def test_too_few_cases_are_counted_by_class(per_class: tuple[int, ...], message: str) -> None:
    with pytest.raises(CalibrationError, match=message):
        fitted(some_cases(per_class))


def test_many_images_of_few_patients_are_few_cases() -> None:
    with pytest.raises(CalibrationError, match=r"covid has 19$"):
        fitted(some_cases((19, 20, 20), images=10))
    assert fitted(some_cases((20, 20, 20), images=2))[0].fitted


def test_enough_for_a_temperature_may_be_too_few_for_operating_points() -> None:
    found, notes = fitted(some_cases((29, 40, 40)), positive="covid")
    assert found.fitted
    assert (found.positive_class, found.operating_points, found.default) == (None, (), None)
    assert notes == [
        "no operating point at sensitivity 0.9: 29 patients have images of covid, and 30 are needed",
        "no operating point at sensitivity 0.95: 29 patients have images of covid, and 30 are needed",
    ]
    found, notes = fitted(some_cases((30, 40, 40)), positive="covid", sensitivities=(0.98, 0.9))
    assert (found.default, [point.name for point in found.operating_points]) == ("sensitivity_90", ["sensitivity_90"])
    assert notes == ["no operating point at sensitivity 0.98: 30 patients have images of covid, and 50 are needed"]
    few_negative = some_cases((60, 25))
    found, notes = fitted(few_negative, positive="covid")
    assert not found.operating_points
    assert notes == ["no operating points: 25 patients have images without covid, and 30 are needed"]
    assert "named by --positive (covid, normal)" in fitted(few_negative)[1][0]


def test_one_case_may_always_be_missed() -> None:
    for target in (0.5, 0.9, 0.95, 0.96, 0.975, 0.98, 0.99):
        count = patients_needed(target)
        assert count >= 30
        assert (count - 1) / count >= target


def test_cases_without_a_best_temperature_are_refused() -> None:
    cases = some_cases()
    right = cases.labels == cases.logits.argmax(axis=1)
    easy = cases.logits + 20 * (np.arange(3) == cases.labels[:, np.newaxis]) * ~right[:, np.newaxis]
    with pytest.raises(CalibrationError, match="135 images: all are classified right"):
        fitted(replace(cases, logits=easy))
    with pytest.raises(CalibrationError, match="say too little about their labels"):
        fitted(replace(cases, logits=-cases.logits))


@pytest.mark.parametrize(
    ("positive", "sensitivities", "message"),
    [
        ("flu", (0.9,), "--positive is 'flu': the model's classes are covid, normal, other"),
        (None, (1.0,), "--sensitivity is 1: expected"),
        (None, (0.0,), "--sensitivity is 0: expected"),
        (None, (float("nan"),), "--sensitivity is nan"),
        (None, (), "names none"),
        (None, (0.9, 0.9), "one twice"),
    ],
)
def test_wrong_wishes_are_named(positive: str | None, sensitivities: tuple[float, ...], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        check_wanted(CLASSES, positive, sensitivities)


# The record.


@pytest.fixture(scope="module")
def calibration() -> Calibration:
    return fitted(some_cases(), positive="covid")[0]


def read(record: Any, model: str = MODEL) -> Calibration:
    return Calibration.from_dict(record, classes=CLASSES, model_sha256=model)


def test_the_record_survives_json(calibration: Calibration) -> None:
    for value in (calibration, fitted(some_cases())[0], Calibration(2.5), Calibration(source="not fitted: why")):
        again = read(json.loads(json.dumps(value.to_dict(), allow_nan=False)))
        assert replace(again, model_sha256=value.model_sha256) == value
    assert Calibration().to_dict() == {"temperature": 1.0, "fitted": False, "operating_points": {}}
    later = {**calibration.to_dict(), "something_new": 1}
    assert read(later) == calibration


def test_a_calibration_of_another_model_is_refused(calibration: Calibration) -> None:
    with pytest.raises(ArtefactError, match=r"that of model aaaaaaaaaaaa\.\.\., and this model is bbbbbbbbbbbb.*never"):
        read(calibration.to_dict(), "b" * 64)
    with pytest.raises(ArtefactError, match="never carried over"):
        read({"temperature": 1.0, "model_sha256": MODEL}, "b" * 64)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda r: r.pop("temperature"), "temperature is missing"),
        (lambda r: r.update(temperature=0), "expected a number above 0"),
        (lambda r: r.update(temperature="1"), "temperature is a str"),
        (lambda r: r.update(fitted=1), "fitted is a int"),
        (lambda r: r.update(fitted=False), "without a fitted temperature"),
        (lambda r: r.pop("model_sha256"), "model_sha256 is missing"),
        (lambda r: r.update(model_sha256="x"), "expected a SHA-256"),
        (lambda r: r.pop("source"), "source is missing"),
        (lambda r: r.update(data=None), "data is a NoneType"),
        (lambda r: r["data"].update(images=-1), "images is -1"),
        (lambda r: r["data"].update(images=True), "images is True"),
        (lambda r: r["data"]["images_per_class"].pop("covid"), "names other classes than the bundle"),
        (lambda r: r["after"].update(ece=1.5), "ece is 1.5, expected 0 to 1"),
        (lambda r: r.update(temperature_ci95=[2, 1]), "must not exceed"),
        (lambda r: r.update(temperature_ci95=[1]), "expected two"),
        (lambda r: r.update(positive_class="flu"), "positive_class is 'flu'"),
        (lambda r: r.update(positive_class=None), "positive_class is None"),
        (lambda r: r.update(default_operating_point="sensitivity_99"), "default_operating_point is 'sensitivity_99'"),
        (lambda r: r.update(operating_points={}), "without operating points"),
        (lambda r: r["operating_points"].update(sensitivity_90=3), "sensitivity_90 is a int"),
        (
            lambda r: r["operating_points"]["sensitivity_90"].update(threshold=-0.1),
            "threshold is -0.1, expected 0 to 1",
        ),
        (lambda r: r["operating_points"]["sensitivity_90"].pop("positives"), "positives is missing"),
    ],
)
def test_a_senseless_record_is_refused(
    calibration: Calibration, change: Callable[[dict[str, Any]], object], message: str
) -> None:
    record = copy.deepcopy(calibration.to_dict())
    change(record)
    with pytest.raises(ArtefactError, match=message) as caught:
        read(record)
    assert "\n" not in str(caught.value)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda children: st.lists(children, max_size=3) | st.dictionaries(st.text(max_size=5), children, max_size=3),
    max_leaves=5,
)


@settings(max_examples=300, deadline=None)
@given(st.data())
def test_any_field_replaced_by_anything_is_read_or_refused(calibration: Calibration, data: st.DataObject) -> None:
    record = copy.deepcopy(calibration.to_dict())
    holder = record
    while True:
        key = data.draw(st.sampled_from(sorted(holder)))
        if not (isinstance(holder[key], dict) and holder[key] and data.draw(st.booleans())):
            break
        holder = holder[key]
    holder[key] = data.draw(JSON)
    with contextlib.suppress(ArtefactError):
        read(record)


# What it decides and says.


def test_a_decision_is_the_default_threshold_and_nothing_else(calibration: Calibration) -> None:
    point = calibration.point()
    assert point is not None
    assert point.name == "sensitivity_90"
    rest = (1 - point.threshold) / 2
    at = calibration.decide({"covid": point.threshold, "normal": rest, "other": rest})
    assert at is not None
    assert at.to_dict() == {
        "positive_class": "covid", "probability": point.threshold, "operating_point": "sensitivity_90",
        "threshold": point.threshold, "positive": True,
    }  # fmt: skip
    below = calibration.decide({"covid": float(np.nextafter(point.threshold, 0)), "normal": 1.0, "other": 0.0})
    assert below is not None
    assert not below.positive
    other = replace(calibration, default="sensitivity_95").decide({"covid": 0.3, "normal": 0.4, "other": 0.3})
    assert other is not None
    assert other.threshold == calibration.operating_points[1].threshold
    assert Calibration(2.0).decide({"covid": 1.0}) is None


def test_decisions_on_the_cases_reach_the_sensitivity() -> None:
    cases = some_cases()
    found, _ = fitted(cases, positive="covid")
    values = probabilities(cases.logits, found.temperature)
    decisions = [found.decide(dict(zip(CLASSES, row))) for row in values]
    hits = [decision is not None and decision.positive for decision in decisions]
    own = np.array(hits)[cases.labels == 0]
    assert own.mean() == found.operating_points[0].sensitivity >= 0.9


def test_the_card_has_one_section_of_the_calibration_in_force(calibration: Calibration) -> None:
    first = with_section("# x\n\n### Calibration\n\nr\n", Calibration())
    assert (
        first == "# x\n\n### Calibration\n\nr\n\n## Calibration\n\nNone: probabilities are as the network gives them.\n"
    )
    card = first + "\n## Input\n\ni\n"
    assert with_section(card, Calibration()) == card
    new = with_section(card, calibration)
    head, _, section = new.partition(f"\n{CARD_HEADING}\n")
    assert head == "# x\n\n### Calibration\n\nr\n"
    assert section.startswith("\nTemperature 2.")
    assert section.endswith(".\n\n## Input\n\ni\n")
    assert "None" not in section
    assert with_section(new, Calibration()) == card
    point = calibration.operating_points[0]
    assert f"| sensitivity_90 (default) | {point.threshold:.4f} | {point.sensitivity:.3f} (" in new


def test_the_table_shows_before_and_after_and_the_points(calibration: Calibration) -> None:
    assert calibration.before is not None
    assert calibration.ece_cross_validated is not None
    text = format_calibration(calibration)
    assert f"{calibration.before.ece:.4f}" in text
    assert f"{calibration.ece_cross_validated:.4f}  cross-validated" in text
    assert "positive for covid" in text
    lines = text.splitlines()
    assert [line.endswith("default") for line in lines if line.startswith("sensitivity_")] == [True, False]
    assert format_calibration(Calibration(source="not fitted: few")) == (
        "calibration  none (not fitted: few): probabilities are as the network gives them"
    )
